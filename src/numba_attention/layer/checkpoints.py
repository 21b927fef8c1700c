"""Parameters of attention as other libraries name and lay them out: recognising them, and turning them into our own."""

from __future__ import annotations  # short types in help()

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..options import Array

INPUTS = ("q_proj", "k_proj", "v_proj")
OWN = (*INPUTS, "out_proj")


class Family(NamedTuple):
    """How a family of models names the projections of its attention."""

    name: str
    inputs: tuple[str, ...]  # of queries, keys and values; or the one that holds all three, in this order
    out: str


# The first family that has all the names is taken, so more special ones come first.
FAMILIES = (
    Family("numba_attention", INPUTS, "out_proj"),  # BART, Whisper and OPT too
    Family("Llama", INPUTS, "o_proj"),
    Family("BERT", ("self.query", "self.key", "self.value"), "output.dense"),
    Family("ViT", ("attention.query", "attention.key", "attention.value"), "output.dense"),
    Family("DistilBERT", ("q_lin", "k_lin", "v_lin"), "out_lin"),
    Family("Diffusers", ("to_q", "to_k", "to_v"), "to_out.0"),
    Family("Meta's Llama", ("wq", "wk", "wv"), "wo"),
    Family("T5", ("q", "k", "v"), "o"),
    Family("Keras", ("query", "key", "value"), "attention_output"),
    Family("Flax", ("query", "key", "value"), "out"),
    Family("GPT-2", ("c_attn",), "c_proj"),
    Family("timm", ("qkv",), "proj"),
    Family("ModernBERT", ("Wqkv",), "Wo"),
    Family("Phi-3", ("qkv_proj",), "o_proj"),
    Family("torch.nn.MultiheadAttention", ("in_proj",), "out_proj"),
)
BY_NAME = {family.name: family for family in FAMILIES}

# Buffers and neighbours of attention that do not change what it computes from its projections.
_HARMLESS = ("bias", "masked_bias", "inv_freq", "freqs", "LayerNorm.weight", "LayerNorm.bias", "dropout")
# Parameters that do, and that a layer of ours does not have.
_MORE = {
    "q_norm": "normalised queries", "k_norm": "normalised keys", "norm_q": "normalised queries",
    "norm_k": "normalised keys", "query_norm": "normalised queries", "key_norm": "normalised keys",
    "sinks": "attention sinks, which each call takes as sinks=", "bias_k": "a learned key (add_bias_kv=True)",
    "bias_v": "a learned value (add_bias_kv=True)",
    "relative_attention_bias": "a position bias, which each call takes as bias=",
    "distance_embedding": "embeddings of distances", "logit_scale": "a learned scale",
}  # fmt: skip
_KINDS = ("weight", "bias")
# The last parts of names that may stand for a projection, for messages.
_ALIASES = {
    own: tuple(
        dict.fromkeys(family.inputs[n] if n < 3 else family.out for family in FAMILIES if len(family.inputs) == 3)
    )
    for n, own in enumerate(OWN)
}
_ALIASES["q_proj"] += ("query", "query_proj")
_ALIASES["k_proj"] += ("key", "key_proj")
_ALIASES["v_proj"] += ("value", "value_proj")
_ALIASES["out_proj"] += ("dense", "proj", "c_proj", "out")
_PACKED = ("c_attn", "qkv", "Wqkv", "query_key_value", "qkv_proj")
_ORDERS = (
    "and its name does not say in which order: one after the other (Falcon 7B, MPT), for each head (GPT-NeoX, BLOOM, "
    "Persimmon, Falcon RW), for each group of query heads (Falcon 40B), or otherwise (CodeGen)"
)

Names = Mapping[str, str | tuple[str, Callable[[Array], Array]]]


class Recognised(NamedTuple):
    """What was read from the parameters of another model.

    Attributes
    ----------
    family : str
        Whose names they are ("BERT", "GPT-2", ...); "names" if a map was passed.
    prefix : str
        The beginning of the names, with its last dot.
    names : dict of str to str
        For each parameter of the layer, the name it was read from.
    ignored : tuple of str
        Names below the prefix that are not parameters of the projections.
    """

    family: str
    prefix: str
    names: dict[str, str]
    ignored: tuple[str, ...] = ()


def read(
    parameters: Mapping[str, Any], num_heads: int, prefix: str = "", names: Names | str | None = None
) -> tuple[dict[str, Array], Recognised]:
    """Return the parameters of one layer as this package names and lays them out, and what was recognised.

    Parameters
    ----------
    parameters : mapping of str to ndarray
        Those of one layer, or of a model with one layer below `prefix`.
    num_heads : int
        Query heads, to be compared with kernels whose heads are an axis.
    prefix : str
        The beginning of the names.
    names : mapping, str or None
        A map of names, the name of a family, or None to recognise the family.

    Raises
    ------
    TypeError, ValueError
        There is no layer, or more than one; or parameters that change what attention computes, and are not a layer's.
    """
    parameters = _joined_biases(parameters)
    if names is not None and not isinstance(names, str):
        return by_map(parameters, prefix, names)
    below = [name for name in parameters if name.startswith(prefix)]
    layers = find(below, names)
    at_prefix = [layer for layer in layers if layer[0] == prefix]
    if len(layers) > 1 and not at_prefix:
        places = ", ".join(repr(place) for place, _ in layers[:4])
        raise ValueError(
            f"parameters have {len(layers)} attention layers, at {places}{', ...' if len(layers) > 4 else ''}; "
            "choose one with prefix=, or take all with load_layers"
        )
    if not layers:
        missing = [own for own in OWN if not any(_ends_with(name, f"{own}.weight") for name in below)]
        raise ValueError(f"no weight for {', '.join(missing)} among {_few(below)}{how_to_map(below)}")
    return convert(parameters, *(at_prefix or layers)[0], num_heads)


def flatten(parameters: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings with dotted names; the slashes of Keras are dots too."""
    for key, x in parameters.items():
        name = path + key.replace("/", ".")
        if isinstance(x, Mapping):
            yield from flatten(x, f"{name}.")
        else:
            yield name, x


def find(names: Iterable[str], of: str | None = None) -> list[tuple[str, Family]]:
    """Return the prefix and the family of every attention layer among the names, in their order."""
    if of is not None and of not in BY_NAME:
        raise ValueError(f"names must be one of {', '.join(BY_NAME)}, or a mapping, got {of!r}")
    families = FAMILIES if of is None else (BY_NAME[of],)
    names = list(names)
    known = set(names)
    layers: dict[str, Family] = {}
    for name in names:
        for family in families:
            for ending in _endings(family.inputs[0]):
                if _ends_with(name, ending):
                    prefix = name.removesuffix(ending)
                    if prefix not in layers and all(_has(known, prefix, stem) for stem in (*family.inputs, family.out)):
                        layers[prefix] = family
    return list(layers.items())


def places(names: Iterable[str], of: Names | str | None) -> list[str]:
    """Return what the names of each layer begin with, for a map of names too; numbers in them in their order."""
    names = list(names)
    if of is None or isinstance(of, str):
        found = [place for place, _ in find(names, of)]
    else:
        first = next(iter(of.values()), "")
        ending = first if isinstance(first, str) else first[0]
        endings = (ending, f"{ending}.weight")
        found = list(
            dict.fromkeys(name.removesuffix(end) for end in endings for name in names if _ends_with(name, end))
        )
    return sorted(found, key=lambda place: [int(part) if part.isdigit() else 0 for part in place.split(".")])


def convert(
    parameters: Mapping[str, Array], prefix: str, family: Family, num_heads: int
) -> tuple[dict[str, Array], Recognised]:
    """Return the parameters of a layer as this package names and lays them out, and what was recognised."""
    own: dict[str, Array] = {}
    names: dict[str, str] = {}
    used: set[str] = set()

    def take(stem: str, kind: str) -> tuple[str, Array] | None:
        for ending in _endings(stem, kind):
            name = prefix + ending
            if name in parameters:
                used.add(name)
                return name, parameters[name]
        return None

    packed = len(family.inputs) == 1
    first = take(family.inputs[0], "weight")
    # GPT-2's Conv1D has (in, out) in both projections; Qwen 1 and GPTBigCode have the same names for torch.nn.Linear.
    transposed = first is not None and _ends_with(first[0], "c_attn.weight") and _is_conv1d(first[1])
    out_name, out_weight = _weight(take(family.out, "weight"), transposed, False, num_heads, of_output=True)
    of_heads = out_name.endswith(".kernel")
    for kind in _KINDS:
        for n, stem in enumerate(family.inputs):
            found = take(stem, kind)
            if found is None:
                continue
            name, array = _weight(found, transposed, packed, num_heads) if kind == "weight" else _bias(found, of_heads)
            if not packed:
                own[f"{INPUTS[n]}.{kind}"], names[f"{INPUTS[n]}.{kind}"] = array, name
                continue
            parts = _split(name, array, out_weight.shape[1] if out_weight.ndim == 2 else 0)
            for projection, part in zip(INPUTS, parts, strict=True):
                own[f"{projection}.{kind}"], names[f"{projection}.{kind}"] = part, name
    own["out_proj.weight"], names["out_proj.weight"] = out_weight, out_name
    bias = take(family.out, "bias")
    if bias is not None:
        names["out_proj.bias"], own["out_proj.bias"] = bias
    rest = [name.removeprefix(prefix) for name in parameters if name.startswith(prefix) and name not in used]
    _check_rest(rest, prefix, family)
    return own, Recognised(family.name, prefix, names, tuple(rest))


def _joined_biases(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the names of a `torch.nn.MultiheadAttention` with kdim, which joins its biases only, as our own."""
    result = dict(parameters)
    for name in parameters:
        if _ends_with(name, "q_proj_weight"):
            prefix = name.removesuffix("q_proj_weight")
            bias = result.pop(f"{prefix}in_proj_bias", None)
            if bias is not None and bias.ndim == 1 and len(bias) % 3 == 0:
                parts = np.split(bias, 3)
                result |= {f"{prefix}{own}.bias": part for own, part in zip(INPUTS, parts, strict=True)}
            for own in INPUTS:
                if f"{prefix}{own}_weight" in result:
                    result[f"{prefix}{own}.weight"] = result.pop(f"{prefix}{own}_weight")
    return result


def by_map(parameters: Mapping[str, Any], prefix: str, names: Names) -> tuple[dict[str, Any], Recognised]:
    """Return the parameters that a map names: own name to the other name, or to that and a function of the array.

    "q_proj" stands for "q_proj.weight" and, where it exists, "q_proj.bias".
    """
    if not isinstance(names, Mapping):
        raise TypeError(f"names must be a mapping, the name of a family or None, got {names!r}")
    taken: dict[str, Any] = {}
    read: dict[str, str] = {}
    for own, source in names.items():
        name, function = source if isinstance(source, tuple) else (source, None)
        if not isinstance(name, str) or not isinstance(own, str) or not (function is None or callable(function)):
            raise TypeError(f"names must map names to names or to (name, function), got {own!r}: {source!r}")
        pairs = [(own, name)]
        if own in (*OWN, "in_proj"):
            pairs = [(f"{own}.{kind}", f"{name}.{kind}") for kind in _KINDS]
            pairs = [pair for pair in pairs if prefix + pair[1] in parameters] or pairs[:1]
        for target, at in pairs:
            if prefix + at not in parameters:
                raise ValueError(f"names: there is no {prefix + at!r}, for {target!r}, among {_few(parameters)}")
            array = parameters[prefix + at]
            taken[target], read[target] = array if function is None else function(array), prefix + at
    expected = {f"{own}.{kind}" for own in (*OWN, "in_proj") for kind in _KINDS} | {"in_proj_weight", "in_proj_bias"}
    if unknown := sorted(taken.keys() - expected):
        raise ValueError(f"names: a layer has no {', '.join(unknown)}; it has {', '.join(OWN)}, each .weight and .bias")
    for kind in _KINDS:
        for packed in (f"in_proj.{kind}", f"in_proj_{kind}"):
            if packed in taken:
                out = taken.get("out_proj.weight")
                width = out.shape[1] if out is not None and out.ndim == 2 else 0
                source = read.pop(packed)
                parts = _split(source, taken.pop(packed), width)
                taken |= {f"{own}.{kind}": part for own, part in zip(INPUTS, parts, strict=True)}
                read |= dict.fromkeys((f"{own}.{kind}" for own in INPUTS), source)
    if missing := [own for own in OWN if f"{own}.weight" not in taken]:
        raise ValueError(f"names must say which is the weight of {', '.join(missing)}{how_to_map(parameters)}")
    return taken, Recognised("names", prefix, read)


def how_to_map(names: Iterable[str]) -> str:
    """Return the end of a message that says which of these names are probably which parameters."""
    names = sorted(names)
    packed = [name for name in names if any(_ends_with(name, f"{part}.weight") for part in _PACKED)]
    said = []
    for own, aliases in _ALIASES.items():
        for kind in _KINDS:
            matches = [name for alias in aliases for name in names if _ends_with(name, f"{alias}.{kind}")]
            if matches:
                said.append(f"'{own}.{kind}': '{matches[0]}'")
    if packed:
        said.insert(0, f"'in_proj': ('{packed[0].removesuffix('.weight')}', function)")
        return (
            f"; {packed[0]} holds queries, keys and values, {_ORDERS}. Look the order up in the code of the model, and "
            f"pass names={{{', '.join(said)}}} with a function that returns the rows of all queries, then those of "
            "all keys, then of all values: docs/checkpoints.md has such functions"
        )
    if said:
        return f"; to say which is which, pass names={{{', '.join(said)}}}"
    own_names = ", ".join(f"{own!r}: ..." for own in OWN)
    return (
        f"; say which is which with names={{{own_names}}}: weights are (out_features, in_features), "
        "('name', numpy.transpose) turns one round, and biases are beside them"
    )


def _weight(
    found: tuple[str, Array] | None, transposed: bool, packed: bool, num_heads: int, of_output: bool = False
) -> tuple[str, Array]:
    """Return a weight as (out_features, in_features)."""
    assert found is not None
    name, array = found
    if name.endswith(".kernel"):  # Flax and Keras: inputs first, heads as an axis of their own
        if array.ndim == 3:
            heads = array.shape[0 if of_output else 1]
            if not packed and of_output and heads != num_heads:
                raise ValueError(f"num_heads must be that of {name}, {heads}, got {num_heads}")
            array = array.reshape((-1, array.shape[2]) if of_output else (array.shape[0], -1))
        array = array.T
    elif transposed:
        array = array.T
    return name, array


def _is_conv1d(packed: Array) -> bool:
    """Whether a packed weight is (in, out), as Conv1D of Transformers has it."""
    return packed.ndim == 2 and packed.shape[1] == 3 * packed.shape[0]


def _bias(found: tuple[str, Array], of_heads: bool) -> tuple[str, Array]:
    """Return a bias (features,); that of a kernel may have heads as an axis."""
    name, array = found
    return name, array.reshape(-1) if of_heads else array


def _split(name: str, array: Array, width: int) -> list[Array]:
    """Split a packed projection: as many rows for queries as the output has columns, the others in two halves."""
    rows = len(array) if array.ndim else 0
    if not rows or rows <= width or (rows - width) % 2:
        raise ValueError(
            f"{name} must hold queries of {width} features and two equal parts for keys and values, "
            f"got shape {array.shape}"
        )
    return np.split(array, [width, width + (rows - width) // 2])


def _check_rest(rest: list[str], prefix: str, family: Family) -> None:
    """Refuse parameters that change what attention computes."""
    unknown = []
    for name in rest:
        parts = name.split(".")
        for part, meaning in _MORE.items():
            if part in parts:
                raise ValueError(
                    f"{prefix + name} says that the model has {meaning}, which this layer has not; "
                    "to load the projections alone, say which they are with names="
                )
        if not any(name == end or name.endswith(f".{end}") for end in _HARMLESS):
            unknown.append(prefix + name)
    if unknown:
        said = ", ".join(f"{own!r}: {stem!r}" for own, stem in zip(OWN, (*family.inputs, family.out), strict=False))
        hint = f"names={{{said}}}" if len(family.inputs) == 3 else "names="
        raise ValueError(
            f"parameters have names that this layer does not: {_few(unknown)}; "
            f"to load the projections alone, say which they are with {hint}"
        )


def _endings(stem: str, kind: str = "weight") -> tuple[str, ...]:
    if stem == "in_proj":
        return (f"in_proj_{kind}",)
    return (f"{stem}.{kind}",) if kind == "bias" else (f"{stem}.weight", f"{stem}.kernel")


def _has(names: set[str], prefix: str, stem: str) -> bool:
    return any(prefix + ending in names for ending in _endings(stem))


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "no parameters"
