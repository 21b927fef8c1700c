"""The parameters of multi-head attention: construction, access by name, pickling, exchange with PyTorch and files."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from os import PathLike
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from ..atomic import replacing
from ..backends import check_name
from ..frequencies import is_config, of_config
from ..narrowing import largest
from ..options import Array
from ..rotary import Rotation, rotation
from ..validation import as_array, as_real, as_real_dtype, as_size
from . import checkpoints
from .checkpoints import INPUTS, Names, Recognised
from .files import Tensors, library


class Weights:
    """The parameters of `MultiHeadAttention`, its base class.

    If query, key and value have the same number of features, the weights of their projections are views into one
    matrix, `_packed`: one product for all three projections of self-attention is faster than three narrow ones.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = True,
        rotary: bool | Mapping[str, Any] | None = None,
        dropout: float = 0.0,
        dtype: DTypeLike = np.float32,
        rng: np.random.Generator | int | None = None,
        backend: str | None = None,
    ) -> None:
        if not isinstance(bias, bool | np.bool_):
            raise TypeError(f"bias must be True or False, got {bias!r}")
        self.embed_dim = as_size("embed_dim", embed_dim)
        self.num_heads = as_size("num_heads", num_heads)
        self.num_kv_heads = self.num_heads if num_kv_heads is None else as_size("num_kv_heads", num_kv_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, got {self.num_kv_heads} and {self.num_heads}")
        if head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads unless head_dim is given, "
                f"got {self.embed_dim} and {self.num_heads}"
            )
        self.head_dim = self.embed_dim // self.num_heads if head_dim is None else as_size("head_dim", head_dim)
        self.kdim = self.embed_dim if kdim is None else as_size("kdim", kdim)
        self.vdim = self.embed_dim if vdim is None else as_size("vdim", vdim)
        self.dtype = as_real_dtype(dtype)
        self.bias = bool(bias)
        self.rotary = _rotary(rotary, self.head_dim)
        self._rotation = None if self.rotary is None else _resolved(self.rotary, self.head_dim)
        self.backend = None if backend is None else check_name(backend, "backend")
        self.loaded: Recognised | None = None
        self.dropout = as_real("dropout", dropout)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {self.dropout}")
        self._allocate()
        self._rng = as_generator(rng)
        self._initialise(self._rng)

    def __repr__(self) -> str:
        names = (
            "embed_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "kdim",
            "vdim",
            "bias",
            "rotary",
            "dropout",
            "backend",
        )
        said = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__}({said}, dtype={self.dtype})"

    def parameters(self) -> dict[str, Array]:
        """Return the parameters by name.

        Returns
        -------
        dict of ndarray
            The layer's own arrays: writing into them changes the layer.

        Examples
        --------
        >>> import numba_attention as na
        >>> for name, array in na.MultiHeadAttention(8, 2, num_kv_heads=1, bias=False).parameters().items():
        ...     print(name, array.shape)
        q_proj.weight (8, 8)
        k_proj.weight (4, 8)
        v_proj.weight (4, 8)
        out_proj.weight (8, 8)
        """
        return dict(self._parameters)

    def load_parameters(
        self, parameters: Mapping[str, ArrayLike], *, prefix: str = "", names: Names | str | None = None
    ) -> None:
        """Copy parameters into the layer, converted to its dtype.

        Parameters
        ----------
        parameters : mapping of str to array of float
            Exactly the names and shapes of `parameters`; or those of another library, as in `from_torch`.
        prefix, names : optional
            As in `from_torch`.

        Raises
        ------
        TypeError
            A parameter is not floating point.
        ValueError
            A name is missing or unknown, a shape differs, or a finite number would be infinite in the dtype of the
            layer. The layer is then as it was.
        """
        arrays = as_parameters("parameters", parameters)
        layers = checkpoints.find(arrays) if prefix or names is None else []
        if prefix or names is not None or (layers and layers[0] != ("", checkpoints.FAMILIES[0])):
            arrays, self.loaded = checkpoints.read(arrays, self.num_heads, _text("prefix", prefix), names)
            zeros = {name: np.zeros_like(x) for name, x in self._parameters.items() if name.endswith(".bias")}
            arrays = zeros | arrays
        copy_parameters(self._parameters, arrays)

    @classmethod
    def from_torch(
        cls,
        state_dict: Mapping[str, Any],
        num_heads: int,
        *,
        prefix: str = "",
        names: Names | str | None = None,
        rotary: bool | Mapping[str, Any] | None = None,
        dropout: float = 0.0,
        rng: np.random.Generator | int | None = None,
        backend: str | None = None,
    ) -> Self:
        """Build a layer from the parameters of a ``torch.nn.MultiheadAttention``, or of attention in another library.

        Parameters
        ----------
        state_dict : mapping of str to tensor or array
            What ``state_dict()`` of a module returns, or names and arrays from elsewhere, nested as Flax has them if
            need be. If the values are arrays, PyTorch is not needed. Known are the names of PyTorch, of this package,
            of BART, BERT, DistilBERT, GPT-2, Llama, ModernBERT, Phi-3, T5, ViT and Whisper in Transformers and of
            models that are named like them, of timm and Diffusers, of Meta's own Llama, of Keras
            (``{weight.path: weight.numpy() for weight in layer.weights}``) and of Flax. `loaded` says what was
            recognised.
        num_heads : int
            Query heads, which the state dict does not contain.
        prefix : str, default ""
            The beginning of the names of the parameters, with its last dot. It may be left out where there is only one
            layer.
        names : mapping of str to str, or str, optional
            Where the names are of no known family: "q_proj", "k_proj", "v_proj" and "out_proj" (or "in_proj" for the
            first three in one array, or single parameters such as "q_proj.bias"), each with its name in `state_dict`,
            or with a pair of that and a function of the array, such as ``("attn.w_out", numpy.transpose)``. Weights are
            (out_features, in_features). Names that are not mentioned are ignored. Or the name of a family, as `loaded`
            says it.
        rotary, dropout, rng, backend : optional
            As in `MultiHeadAttention`. T5 needs ``scale=1`` in each call.

        Returns
        -------
        MultiHeadAttention
            With copies of the parameters; float64 if they are, else float32. If only some of the projections have a
            bias, as in Whisper, the biases of the others are 0.

        Raises
        ------
        TypeError
            A parameter is not an array of floating point.
        ValueError
            There is no layer, more than one, or one with parameters that this layer does not have and that change what
            attention computes, such as those of normalised queries and keys. The message says how to go on.

        Examples
        --------
        >>> import numpy as np, numba_attention as na
        >>> rng = np.random.default_rng(0)
        >>> gpt2 = {"h.0.attn.c_attn.weight": rng.standard_normal((8, 24)), "h.0.attn.c_attn.bias": np.zeros(24),
        ...         "h.0.attn.c_proj.weight": rng.standard_normal((8, 8)), "h.0.attn.c_proj.bias": np.zeros(8)}
        >>> layer = na.MultiHeadAttention.from_torch(gpt2, num_heads=2)
        >>> layer.loaded.family, layer.loaded.prefix, layer.loaded.names["v_proj.weight"]
        ('GPT-2', 'h.0.attn.', 'h.0.attn.c_attn.weight')
        """
        arrays = as_parameters("state_dict", state_dict)
        parameters, loaded = checkpoints.read(arrays, as_size("num_heads", num_heads), _text("prefix", prefix), names)
        return cls._from_parameters(
            parameters, num_heads, loaded, rotary=rotary, dropout=dropout, rng=rng, backend=backend
        )

    def to_torch(self) -> dict[str, Any]:
        """Return the parameters in the form that ``torch.nn.MultiheadAttention.load_state_dict`` takes.

        Returns
        -------
        dict of torch.Tensor
            Copies; packed ("in_proj_weight") if key and value have `embed_dim` features, else separate.

        Raises
        ------
        ImportError
            PyTorch is not installed.
        ValueError
            The layer has fewer key/value heads than heads, heads that do not add up to `embed_dim`, or a rotary
            embedding, none of which that module has.
        """
        fits = self.num_kv_heads == self.num_heads and self.num_heads * self.head_dim == self.embed_dim
        if not fits or self.rotary is not None:
            raise ValueError(
                "torch.nn.MultiheadAttention needs num_kv_heads == num_heads, num_heads * head_dim == embed_dim "
                f"and rotary=None, got {self!r}"
            )
        try:
            import torch
        except ImportError as error:
            raise ImportError("to_torch needs PyTorch: pip install 'numba-attention[torch]'") from error
        own = self._parameters
        state = {name: own[name] for name in own if name.startswith("out_proj")}
        if self._packed is not None:
            state["in_proj_weight"] = self._packed
        else:
            state |= {f"{name}_weight": own[f"{name}.weight"] for name in INPUTS}
        if self.bias:
            state["in_proj_bias"] = np.concatenate([own[f"{name}.bias"] for name in INPUTS])
        return {name: torch.from_numpy(array.copy()) for name, array in state.items()}

    @classmethod
    def load_safetensors(
        cls,
        path: str | PathLike[str],
        prefix: str = "",
        *,
        num_heads: int,
        names: Names | str | None = None,
        rotary: bool | Mapping[str, Any] | None = None,
        dropout: float = 0.0,
        rng: np.random.Generator | int | None = None,
        backend: str | None = None,
    ) -> Self:
        """Build a layer from a safetensors file; needs the safetensors library.

        Parameters
        ----------
        path : str or path-like
            The file, or the index of a model in several files (``model.safetensors.index.json``).
        prefix : str, default ""
            The beginning of the names of the parameters, with its last dot, such as "encoder.0.self_attn.".
        num_heads : int
            Query heads, which the file does not contain.
        names : optional
            As in `from_torch`, which lists the names that are known.
        rotary, dropout, rng, backend : optional
            As in `MultiHeadAttention`. The file does not contain these either.

        Returns
        -------
        MultiHeadAttention
            Its sizes follow from the shapes. It is float64 if the parameters are, else float32. If only some of the
            projections have a bias, the biases of the others are 0.

        Raises
        ------
        ImportError
            The safetensors library is not installed.
        FileNotFoundError
            There is no such file.
        ValueError
            The file is damaged, or has no layer with that prefix whose names are known, or several.

        See Also
        --------
        load_layers : all layers of a file.
        """
        file = Tensors(path)
        begin = _text("prefix", prefix)
        arrays = file.read(name for name in file.names if name.startswith(begin))
        parameters, loaded = checkpoints.read(arrays, as_size("num_heads", num_heads), begin, names)
        return cls._from_parameters(
            parameters, num_heads, loaded, rotary=rotary, dropout=dropout, rng=rng, backend=backend
        )

    @classmethod
    def load_layers(
        cls,
        path: str | PathLike[str],
        pattern: str = "*",
        *,
        num_heads: int,
        names: Names | str | None = None,
        rotary: bool | Mapping[str, Any] | None = None,
        dropout: float = 0.0,
        rng: np.random.Generator | int | None = None,
        backend: str | None = None,
    ) -> dict[str, Self]:
        """Build all attention layers of a safetensors file; needs the safetensors library.

        Parameters
        ----------
        path : str or path-like
            The file, or the index of a model in several files (``model.safetensors.index.json``).
        pattern : str, default "*"
            Which layers, by what their names begin with, such as ``"encoder.layer.*.attention"``, with the wildcards of
            `fnmatch`.
        num_heads : int
            Query heads of each layer, which the file does not contain.
        names : optional
            As in `from_torch`, without what the names begin with.
        rotary, dropout, rng, backend : optional
            As in `MultiHeadAttention`.

        Returns
        -------
        dict of str to MultiHeadAttention
            By what the names of their parameters begin with, without its last dot, in the order of layers.

        Raises
        ------
        ImportError, FileNotFoundError, ValueError
            As in `load_safetensors`; ValueError if no layer fits the pattern, which lists those that there are.

        Examples
        --------
        >>> import tempfile, numba_attention as na
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> na.MultiHeadAttention(8, 2, rng=0).save_safetensors(path, prefix="encoder.0.self_attn.")
        >>> na.MultiHeadAttention.load_layers(path, "encoder.*", num_heads=2).keys()
        dict_keys(['encoder.0.self_attn'])
        """
        file = Tensors(path)
        rng = as_generator(rng)  # one for all layers: with one seed each, they would drop the same weights
        places = checkpoints.places(file.names, names)
        chosen = [place for place in places if fnmatchcase(place.removesuffix("."), _text("pattern", pattern))]
        if not chosen:
            there = ", ".join(places[:6]) + (", ..." if len(places) > 6 else "")
            hint = checkpoints.how_to_map(file.names) if not places else ""
            raise ValueError(f"no attention layer is named like {pattern!r}; there are: {there or 'none'}{hint}")
        return {
            place.removesuffix("."): cls.load_safetensors(
                path, place, num_heads=num_heads, names=names, rotary=rotary, dropout=dropout, rng=rng, backend=backend
            )
            for place in chosen
        }

    def save_safetensors(self, path: str | PathLike[str], prefix: str = "") -> None:
        """Write the parameters to a safetensors file; needs the safetensors library.

        Parameters
        ----------
        path : str or path-like
            The file. If it exists, it is replaced when the new one is complete.
        prefix : str, default ""
            The beginning of the names of the parameters.

        Raises
        ------
        ImportError
            The safetensors library is not installed.
        """
        if not isinstance(path, str | PathLike):
            raise TypeError(f"path must be a string or path-like, got {path!r}")
        _text("prefix", prefix)
        arrays = {prefix + name: np.ascontiguousarray(array) for name, array in self._parameters.items()}
        save = library().numpy.save_file
        with replacing(path) as unfinished:
            save(arrays, unfinished)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without gradients and without views, which pickle would turn into arrays of their own."""
        derived = ("_edges", "_packed", "_packed_bias", "_parameters", "grads")
        state = {name: x for name, x in vars(self).items() if name not in derived}
        return state | {"parameters": self.parameters()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parameters = state.pop("parameters")
        vars(self).update(state)
        self._allocate()
        self.load_parameters(parameters)

    def _allocate(self) -> None:
        """Allocate the parameters, as views into one matrix if the inputs have the same number of features."""
        H, Hkv = self.num_heads, self.num_kv_heads
        self._edges = (0, H, H + Hkv, H + 2 * Hkv)  # where the heads of queries, keys and values begin and end
        width, narrow = H * self.head_dim, Hkv * self.head_dim
        rows = dict(zip(INPUTS, (width, narrow, narrow), strict=True))
        columns = dict(zip(INPUTS, (self.embed_dim, self.kdim, self.vdim), strict=True))
        cuts = [width, width + narrow]
        own: dict[str, Array] = {}
        self._packed: Array | None = None
        if len(set(columns.values())) == 1:
            self._packed = np.zeros((width + 2 * narrow, self.embed_dim), self.dtype)
            parts = np.split(self._packed, cuts)
        else:
            parts = [np.zeros((rows[name], columns[name]), self.dtype) for name in INPUTS]
        own |= {f"{name}.weight": part for name, part in zip(INPUTS, parts, strict=True)}
        self._packed_bias = np.zeros(width + 2 * narrow, self.dtype) if self.bias else None
        if self._packed_bias is not None:
            parts = np.split(self._packed_bias, cuts)
            own |= {f"{name}.bias": part for name, part in zip(INPUTS, parts, strict=True)}
        own["out_proj.weight"] = np.zeros((self.embed_dim, width), self.dtype)
        if self.bias:
            own["out_proj.bias"] = np.zeros(self.embed_dim, self.dtype)
        self._parameters = own
        self.grads: dict[str, Array] = {}

    def _initialise(self, rng: np.random.Generator) -> None:
        inputs = [self._parameters[f"{name}.weight"] for name in INPUTS] if self._packed is None else [self._packed]
        for weight in inputs:
            limit = math.sqrt(6 / sum(weight.shape))  # Xavier, for the packed matrix as a whole, as in PyTorch
            weight[...] = rng.uniform(-limit, limit, weight.shape)
        weight = self._parameters["out_proj.weight"]
        limit = 1 / math.sqrt(weight.shape[1])
        weight[...] = rng.uniform(-limit, limit, weight.shape)

    def _joined(self, first: int, last: int) -> tuple[Array, Array | None]:
        """Return weight and bias of the input projections first .. last - 1; several projections must be packed."""
        if last - first == 1:
            return self._parameters[f"{INPUTS[first]}.weight"], self._parameters.get(f"{INPUTS[first]}.bias")
        assert self._packed is not None
        rows = slice(self._place(first).start * self.head_dim, self._place(last - 1).stop * self.head_dim)
        return self._packed[rows], None if self._packed_bias is None else self._packed_bias[rows]

    def _place(self, n: int, first: int = 0) -> slice:
        """Return the heads of input projection n, if those of the projections from `first` on are side by side."""
        edges = self._edges
        return slice(edges[n] - edges[first], edges[n + 1] - edges[first])

    @classmethod
    def _from_parameters(
        cls, parameters: Mapping[str, Array], num_heads: int, loaded: Recognised, **settings: Any
    ) -> Self:
        """Build a layer with these parameters, whose shapes give its sizes."""
        arrays = {name: _floats(name, array) for name, array in parameters.items()}
        weights = [arrays.get(f"{name}.weight") for name in (*INPUTS, "out_proj")]
        q, k, v, out = (w for w in weights if w is not None)
        if any(w.ndim != 2 for w in (q, k, v, out)):
            raise ValueError(f"weights must be matrices, got {q.shape}, {k.shape}, {v.shape} and {out.shape}")
        head_dim, rest = divmod(len(q), as_size("num_heads", num_heads))
        if rest or not head_dim:
            raise ValueError(f"num_heads must divide the {len(q)} rows of the query projection, got {num_heads}")
        if len(k) % head_dim or not len(k):
            raise ValueError(f"the key projection must have a multiple of head_dim = {head_dim} rows, got {len(k)}")
        layer = cls(
            len(out),
            num_heads,
            num_kv_heads=len(k) // head_dim,
            head_dim=head_dim,
            kdim=k.shape[1],
            vdim=v.shape[1],
            bias=any(name.endswith(".bias") for name in arrays),
            dtype=np.float64 if all(array.dtype.itemsize >= 8 for array in arrays.values()) else np.float32,
            **settings,
        )
        zeros = {name: own for name, own in layer._parameters.items() if name.endswith(".bias")}
        layer.load_parameters(zeros | arrays)
        layer.loaded = loaded
        return layer


def _rotary(rotary: Any, head_dim: int) -> bool | dict[str, Any] | None:
    """Check `rotary`; return it for the representation of the layer: None, True, or a copy of the dict."""
    if rotary is None or isinstance(rotary, bool | np.bool_):
        return True if rotary else None
    if is_config(rotary):
        return of_config(rotary, head_dim)
    if not isinstance(rotary, Mapping):
        raise TypeError(f"rotary must be None, True or a dict of base, dim, interleaved and scaling, got {rotary!r}")
    if unknown := rotary.keys() - {"base", "dim", "interleaved", "scaling"}:
        raise ValueError(
            f"rotary may have the keys base, dim, interleaved and scaling, got {', '.join(sorted(map(str, unknown)))}"
        )
    return dict(rotary)


def _resolved(rotary: bool | dict[str, Any], head_dim: int) -> Rotation:
    try:
        return rotation(head_dim, **({} if isinstance(rotary, bool) else rotary))
    except (TypeError, ValueError) as error:
        raise type(error)(f"rotary: {error}") from None


def as_generator(rng: np.random.Generator | int | None) -> np.random.Generator:
    """Check a generator or the seed of one."""
    if rng is not None and (isinstance(rng, bool) or not isinstance(rng, np.random.Generator | int | np.integer)):
        raise TypeError(f"rng must be a numpy.random.Generator, an integer or None, got {rng!r}")
    if isinstance(rng, int | np.integer) and rng < 0:
        raise ValueError(f"rng must not be negative, got {rng}")
    return np.random.default_rng(rng)


def copy_parameters(parameters: Mapping[str, Array], arrays: Mapping[str, Array]) -> None:
    """Copy arrays into the parameters of the same names, all of them or, where one does not fit, none."""
    if missing := parameters.keys() - arrays:
        raise ValueError(f"parameters lack {', '.join(sorted(missing))}")
    if unknown := arrays.keys() - parameters:
        raise ValueError(f"parameters have names that this layer does not: {', '.join(sorted(unknown))}")
    for name, own in parameters.items():
        if arrays[name].shape != own.shape:
            raise ValueError(f"{name} must have shape {own.shape}, got {arrays[name].shape}")
        _check_range(name, arrays[name], own.dtype)
    for name, own in parameters.items():
        own[...] = arrays[name]


def _mapping(name: str, x: Any) -> Mapping[str, Any]:
    if not isinstance(x, Mapping):
        raise TypeError(f"{name} must map names to arrays, got {type(x).__module__}.{type(x).__qualname__}")
    for key in x:
        if not isinstance(key, str):
            raise TypeError(f"{name} must map names to arrays, got the name {key!r}")
    return x


def _text(name: str, x: Any) -> str:
    if not isinstance(x, str):
        raise TypeError(f"{name} must be a string, got {x!r}")
    return x


def as_parameters(name: str, parameters: Any) -> dict[str, Array]:
    """Check a mapping, nested or not, of names to tensors or arrays of floating point."""
    leaves = dict(checkpoints.flatten(_mapping(name, parameters)))
    return {key: x for key, leaf in leaves.items() if (x := _from_tensor(key, leaf)) is not None}


def _check_range(name: str, array: Array, dtype: np.dtype[Any]) -> None:
    """Refuse finite parameters that would become infinite. Clamping them would make another model."""
    if array.dtype.itemsize > dtype.itemsize and array.size:
        with np.errstate(invalid="ignore"):
            too_large = (np.abs(array) > largest(dtype)) & np.isfinite(array)
        if too_large.any():
            raise ValueError(f"{name} must fit in the {dtype} of the layer, got {array[too_large][0]}")


def _floats(name: str, x: ArrayLike) -> Array:
    array = as_array(name, x)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} must be floating point, got {array.dtype}")
    return array


def _from_tensor(name: str, x: Any) -> Array:
    """View a tensor as an array, without importing PyTorch."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        if "bfloat16" in str(x.dtype):  # PyTorch cannot convert bfloat16 to NumPy
            x = x.float()
    return _floats(name, x)


__all__ = ["INPUTS", "Weights", "as_generator", "as_parameters", "copy_parameters"]
