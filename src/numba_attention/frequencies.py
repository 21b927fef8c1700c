"""Frequencies of rotary position embeddings, and how they are scaled for sequences longer than those of the training.

The kinds of scaling are those that configs of models name in ``rope_scaling`` or ``rope_parameters``, computed in
float64: `scaled` has one function for each.
"""

from __future__ import annotations  # short types in help()

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .options import Array
from .validation import as_array, as_real

Scaling = float | Mapping[str, Any]


class Beyond(NamedTuple):
    """Frequencies of sequences that are longer than `length`."""

    length: float
    frequencies: Array | None  # float64 (dim / 2,); None: computed from the length, as below
    base: float = 1.0
    factor: float = 1.0

    def at(self, length: float, dim: int) -> Array:
        if self.frequencies is not None:
            return self.frequencies
        stretch = self.factor * length / self.length - (self.factor - 1)
        return plain(self.base * stretch ** (dim / (dim - 2)), dim)


class Frequencies(NamedTuple):
    """The angle between neighbouring positions for each pair of features, and a factor of the rotated features."""

    frequencies: Array  # float64 (dim / 2,), radians
    attention_factor: float = 1.0
    beyond: Beyond | None = None
    axes: Array | None = None  # int64 (dim / 2,), which of three positions turns each pair; None: there is one position

    def of_length(self, length: float) -> Array:
        """Return the frequencies for sequences of this length."""
        if self.beyond is None or length <= self.beyond.length:
            return self.frequencies
        return self.beyond.at(length, 2 * len(self.frequencies))


def plain(base: float, dim: int) -> Array:
    frequencies: Array = base ** (-np.arange(0, dim, 2) / dim)
    return frequencies


def scaled(scaling: Any, base: float, dim: int) -> Frequencies:
    """Check the `scaling` of `apply_rotary`, and compute the frequencies."""
    if scaling is None:
        return _finite(Frequencies(plain(base, dim)), base, scaling)
    if not isinstance(scaling, Mapping):
        scaling = {"type": "linear", "factor": _positive("scaling", scaling)}
    given = {str(key): x for key, x in scaling.items() if x is not None}
    kinds = {str(given.pop(name)) for name in ("type", "rope_type") if name in given}
    if len(kinds) > 1:
        raise ValueError(f"scaling must have one type, got {' and '.join(sorted(kinds))}")
    sections = given.pop("mrope_section", None), given.pop("mrope_interleaved", False)
    kind = kinds.pop() if kinds else "given" if "frequencies" in given else "default" if sections[0] else ""
    rule = _RULES.get(kind)
    if rule is None:
        names = ", ".join(repr(name) for name in _RULES)
        raise ValueError(f"scaling must be of type {names}, got {kind or 'a mapping without a type'!r}")
    needed, optional, function = rule
    if not needed <= given.keys() or not given.keys() <= needed | optional:
        also = f" and may have {', '.join(sorted(optional))}" if optional else ""
        raise ValueError(
            f"scaling must have the keys {', '.join(['type', *sorted(needed)])}{also} for type {kind!r}, "
            f"got {', '.join(sorted(given)) or 'no others'}"
        )
    with np.errstate(all="ignore"):
        result = function(given, base, dim)
    if sections[0] is not None:
        result = result._replace(axes=_axes(*sections, dim))
    elif kind == "mrope":
        raise ValueError("scaling must have the key mrope_section for type 'mrope'")
    return _finite(result, base, scaling)


def _finite(result: Frequencies, base: float, scaling: Any) -> Frequencies:
    if not ((result.frequencies > 0) & (result.frequencies < np.inf)).all():
        raise ValueError(f"base and scaling must leave every pair a finite frequency, got {base} and {scaling!r}")
    return result


def _default(given: dict[str, Any], base: float, dim: int) -> Frequencies:
    return Frequencies(plain(base, dim))


def _given(given: dict[str, Any], base: float, dim: int) -> Frequencies:
    """Frequencies as they are."""
    frequencies = _numbers("frequencies", given, dim)
    return Frequencies(frequencies, _number("attention_factor", given, 1.0))


def _linear(given: dict[str, Any], base: float, dim: int) -> Frequencies:
    """Positional interpolation: Chen et al., 2023, section 2.2."""
    return Frequencies(plain(base, dim) / _number("factor", given))


def _ntk(given: dict[str, Any], base: float, dim: int) -> Frequencies:
    """NTK-aware scaling: the fastest pair stays as it is, and the slowest is slowed down by the factor."""
    _check_pairs("ntk", dim)
    return Frequencies(plain(base * np.float64(_number("factor", given)) ** (dim / (dim - 2)), dim))


def _dynamic(given: dict[str, Any], base: float, dim: int) -> Frequencies:
    """NTK-aware scaling by as much as the present sequence is longer than those of the training."""
    _check_pairs("dynamic", dim)
    length = _number("max_position_embeddings", given)
    return Frequencies(plain(base, dim), beyond=Beyond(length, None, base, _number("factor", given)))


def _yarn(given: dict[str, Any], base: float, dim: int) -> Frequencies:
    """YaRN: Peng et al., 2023, section 3, equations 17 to 22."""
    length = _number("original_max_position_embeddings", given)
    factor = _factor(given, length)
    fast, slow = _number("beta_fast", given, 32.0), _number("beta_slow", given, 1.0)

    def pair_that_turns(times: float) -> float:
        """The pair, of dim / 2 and in fractions, that makes so many turns within the original length."""
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(fast), pair_that_turns(slow)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
    own = plain(base, dim)
    frequencies = own / factor * ramp + own * (1 - ramp)
    attention_factor = given.get("attention_factor")
    if attention_factor is None:
        one, all_dim = given.get("mscale"), given.get("mscale_all_dim")
        attention_factor = _mscale(factor, 1.0)
        if one and all_dim:
            attention_factor = _mscale(factor, as_real("mscale", one)) / _mscale(
                factor, as_real("mscale_all_dim", all_dim)
            )
    return Frequencies(frequencies, _positive("attention_factor of scaling", attention_factor))


def _mscale(factor: float, slope: float) -> float:
    return 0.1 * slope * math.log(factor) + 1 if factor > 1 else 1.0


def _longrope(given: dict[str, Any], base: float, dim: int) -> Frequencies:
    """LongRoPE: Ding et al., 2024: a factor for each pair, and others for sequences beyond the original length."""
    length = _number("original_max_position_embeddings", given)
    short, long = (plain(base, dim) / _numbers(name, given, dim) for name in ("short_factor", "long_factor"))
    attention_factor = given.get("attention_factor")
    if attention_factor is None:
        factor = _factor(given, length)
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    return Frequencies(short, _positive("attention_factor of scaling", attention_factor), Beyond(length, long))


def _llama3(given: dict[str, Any], base: float, dim: int) -> Frequencies:
    """Llama 3.1: slow pairs are slowed down by the factor, fast ones stay, and those between are blended."""
    factor, length = _number("factor", given), _number("original_max_position_embeddings", given)
    low, high = _number("low_freq_factor", given), _number("high_freq_factor", given)
    if not low < high:
        raise ValueError(f"low_freq_factor of scaling must be less than high_freq_factor, got {low} and {high}")
    own = plain(base, dim)
    turns = length * own / (2 * math.pi)  # within the original length
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return Frequencies((1 - blend) * own / factor + blend * own)


Rule = tuple[set[str], set[str], Callable[[dict[str, Any], float, int], Frequencies]]
_ORIGINAL = "original_max_position_embeddings"
_RULES: dict[str, Rule] = {
    "default": (set(), set(), _default),
    "linear": ({"factor"}, set(), _linear),
    "ntk": ({"factor"}, set(), _ntk),
    "dynamic": ({"factor", "max_position_embeddings"}, {_ORIGINAL}, _dynamic),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL}, {"max_position_embeddings"}, _llama3),
    "yarn": (
        {_ORIGINAL},
        {
            "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
            "max_position_embeddings",
        },
        _yarn,
    ),
    "longrope": (
        {"short_factor", "long_factor", _ORIGINAL}, {"factor", "attention_factor", "max_position_embeddings"}, _longrope
    ),
    "mrope": (set(), set(), _default),
    "given": ({"frequencies"}, {"attention_factor"}, _given),
}  # fmt: skip


def of_config(config: Any, head_dim: int) -> dict[str, Any]:
    """Return base, dim and scaling, as `apply_rotary` takes them, of a model's config or its ``rope_parameters``.

    Parameters
    ----------
    config : mapping, or object with ``to_dict``
        A config of Hugging Face, or its ``rope_parameters`` or ``rope_scaling``.
    head_dim : int
    """
    if not isinstance(config, Mapping):
        config = config.to_dict()
    is_whole = bool(config.keys() & {"rope_parameters", "rope_scaling", "model_type", "hidden_size"})
    own = (config.get("rope_parameters") or config.get("rope_scaling") or {}) if is_whole else config
    if any(isinstance(x, Mapping) for x in own.values()):
        raise ValueError(f"the config has a rotary embedding for each kind of layer; pass one of {', '.join(own)}")
    scaling = {key: x for key, x in own.items() if key not in ("rope_theta", "partial_rotary_factor")}
    part = own.get("partial_rotary_factor") or config.get("partial_rotary_factor") or config.get("rotary_pct") or 1.0
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("dynamic", "yarn", "longrope", "llama3"):
        for name in ("max_position_embeddings", _ORIGINAL):
            if scaling.get(name) is None and config.get(name) is not None:
                scaling[name] = config[name]
        if kind in ("yarn", "longrope") and scaling.get(_ORIGINAL) is None and "max_position_embeddings" in scaling:
            scaling[_ORIGINAL] = scaling["max_position_embeddings"]
    result: dict[str, Any] = {"base": float(own.get("rope_theta") or config.get("rope_theta") or 10000.0)}
    if part != 1:
        result["dim"] = int(head_dim * part)
    if kind != "default" or scaling.get("mrope_section") is not None:
        result["scaling"] = scaling
    return result


def is_config(rotary: Any) -> bool:
    """Whether an argument is a model's config, or a part of one, and not the options of `apply_rotary`."""
    if isinstance(rotary, Mapping):
        return bool(
            rotary.keys() & {"rope_parameters", "rope_scaling", "rope_theta", "rope_type", "type", "mrope_section"}
        )
    return callable(getattr(rotary, "to_dict", None)) and not isinstance(rotary, type)


def _axes(sections: Any, interleaved: Any, dim: int) -> Array:
    """Return which of three positions (time, height, width) turns each pair."""
    counts = [as_real("mrope_section", n) for n in as_array("mrope_section", sections).reshape(-1).tolist()]
    if len(counts) != 3 or any(n < 0 or n != int(n) for n in counts) or sum(counts) != dim // 2:
        raise ValueError(f"mrope_section must be three numbers of pairs that add up to {dim // 2}, got {sections!r}")
    if not interleaved:
        return np.repeat(np.arange(3), [int(n) for n in counts])
    axes = np.zeros(dim // 2, np.int64)
    for axis in (1, 2):
        axes[axis : 3 * int(counts[axis]) : 3] = axis
    return axes


def _check_pairs(kind: str, dim: int) -> None:
    if dim == 2:
        raise ValueError(f"scaling of type {kind!r} needs dim > 2: a single pair has no slower one to stretch")


def _factor(given: dict[str, Any], length: float) -> float:
    """Return the factor, which some configs say as the new length beside the original one."""
    if given.get("factor") is not None:
        return _number("factor", given)
    if "max_position_embeddings" not in given:
        raise ValueError("scaling must have the key factor, or max_position_embeddings")
    return _number("max_position_embeddings", given) / length


def _number(name: str, given: dict[str, Any], default: float | None = None) -> float:
    if given.get(name) is None and default is not None:
        return default
    return _positive(f"{name} of scaling", given[name])


def _numbers(name: str, given: dict[str, Any], dim: int) -> Array:
    array = as_array(f"{name} of scaling", given[name])
    if array.shape != (dim // 2,) or array.dtype.kind not in "iuf":
        raise ValueError(f"{name} of scaling must be {dim // 2} numbers, one for each pair, got shape {array.shape}")
    return array.astype(np.float64)


def _positive(name: str, x: Any) -> float:
    number = as_real(name, x)
    if number <= 0:
        raise ValueError(f"{name} must be positive and finite, got {number}")
    return number
