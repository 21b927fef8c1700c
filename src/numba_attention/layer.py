"""Multi-head attention as a layer: the learned projections, in NumPy, around `attention`."""

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Self, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .api import attention, attention_weights
from .options import Array, Causal, Window

_INPUTS = ("q_proj", "k_proj", "v_proj")


class MultiHeadAttention:
    r"""Project, attend with several heads, project back: ``concat(head_1 .. head_H) @ out_proj.weight.T + bias``.

    Parameters
    ----------
    embed_dim : int
        Features of the queries and of the output.
    num_heads : int
        Query heads, H.
    num_kv_heads : int, optional
        Key/value heads, Hkv, a divisor of `num_heads` and by default as many: fewer give grouped-query attention,
        1 multi-query attention.
    head_dim : int, optional
        Features of a head, E; by default ``embed_dim // num_heads``, which must then divide evenly.
    kdim, vdim : int, optional
        Features of key and value, by default `embed_dim`.
    bias : bool, default True
        Whether the projections add a bias.
    rotary : None
        Reserved; anything else is refused by this version.
    dtype : {numpy.float32, numpy.float64}
        dtype of the parameters, the inputs and the outputs.
    rng : numpy.random.Generator or int, optional
        Where the initial weights come from. They are distributed as those of ``torch.nn.MultiheadAttention``:
        Xavier uniform for the inputs, uniform in ``+-1/sqrt(H * E)`` for the output, biases 0.
    backend : {"auto", "cpu", "reference"}, optional
        Backend of every call of this layer, as in `attention`.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or does not fit the others; the message names it.

    See Also
    --------
    attention : what the layer wraps, and where its options are explained.

    Notes
    -----
    Parameters are called "q_proj.weight" (H * E, embed_dim), "k_proj.weight" (Hkv * E, kdim), "v_proj.weight"
    (Hkv * E, vdim) and "out_proj.weight" (embed_dim, H * E), each (out_features, in_features) as in PyTorch, and
    "q_proj.bias", "k_proj.bias", "v_proj.bias" and "out_proj.bias". Projections are NumPy's matrix product, whose last
    bits may depend on the number of rows and on BLAS's threads; what comes between has the guarantees of `attention`.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2.
    .. [2] Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010.

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> layer = na.MultiHeadAttention(64, 8, num_kv_heads=2, rng=0)
    >>> x = np.random.default_rng(1).standard_normal((2, 10, 64), dtype=np.float32)
    >>> layer(x, is_causal=True).shape
    (2, 10, 64)
    >>> out, weights = layer(x, x[:, :7], key_lengths=[7, 3], need_weights=True)
    >>> out.shape, weights.shape
    ((2, 10, 64), (2, 10, 7))
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
        rotary: None = None,
        dtype: DTypeLike = np.float32,
        rng: np.random.Generator | int | None = None,
        backend: str | None = None,
    ) -> None:
        if rotary is not None:
            raise ValueError("rotary must be None: this version has no rotary embedding yet")
        if not isinstance(bias, bool | np.bool_):
            raise TypeError(f"bias must be True or False, got {bias!r}")
        self.embed_dim = _positive("embed_dim", embed_dim)
        self.num_heads = _positive("num_heads", num_heads)
        self.num_kv_heads = self.num_heads if num_kv_heads is None else _positive("num_kv_heads", num_kv_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, got {self.num_kv_heads} and {self.num_heads}")
        if head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads unless head_dim is given, "
                f"got {self.embed_dim} and {self.num_heads}"
            )
        self.head_dim = self.embed_dim // self.num_heads if head_dim is None else _positive("head_dim", head_dim)
        self.kdim = self.embed_dim if kdim is None else _positive("kdim", kdim)
        self.vdim = self.embed_dim if vdim is None else _positive("vdim", vdim)
        self.dtype = _real_dtype(dtype)
        self.bias = bool(bias)
        self.backend = backend
        self._allocate()
        self._initialise(_generator(rng))

    def __repr__(self) -> str:
        names = ("embed_dim", "num_heads", "num_kv_heads", "head_dim", "kdim", "vdim", "bias", "backend")
        said = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__}({said}, dtype={self.dtype})"

    @overload
    def __call__(
        self,
        query: Array,
        key: Array | None = ...,
        value: Array | None = ...,
        *,
        mask: ArrayLike | None = ...,
        bias: ArrayLike | None = ...,
        key_padding_mask: ArrayLike | None = ...,
        is_causal: Causal = ...,
        window: Window | Sequence[int | None] | None = ...,
        query_offset: ArrayLike | None = ...,
        scale: float | None = ...,
        softcap: float | None = ...,
        alibi_slopes: ArrayLike | None = ...,
        sinks: ArrayLike | None = ...,
        query_lengths: ArrayLike | None = ...,
        key_lengths: ArrayLike | None = ...,
        need_weights: Literal[False] = ...,
        average_weights: bool = ...,
    ) -> Array: ...
    @overload
    def __call__(
        self,
        query: Array,
        key: Array | None = ...,
        value: Array | None = ...,
        *,
        mask: ArrayLike | None = ...,
        bias: ArrayLike | None = ...,
        key_padding_mask: ArrayLike | None = ...,
        is_causal: Causal = ...,
        window: Window | Sequence[int | None] | None = ...,
        query_offset: ArrayLike | None = ...,
        scale: float | None = ...,
        softcap: float | None = ...,
        alibi_slopes: ArrayLike | None = ...,
        sinks: ArrayLike | None = ...,
        query_lengths: ArrayLike | None = ...,
        key_lengths: ArrayLike | None = ...,
        need_weights: Literal[True],
        average_weights: bool = ...,
    ) -> tuple[Array, Array]: ...
    def __call__(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        mask: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        key_padding_mask: ArrayLike | None = None,
        is_causal: Causal = False,
        window: Window | Sequence[int | None] | None = None,
        query_offset: ArrayLike | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: ArrayLike | None = None,
        sinks: ArrayLike | None = None,
        query_lengths: ArrayLike | None = None,
        key_lengths: ArrayLike | None = None,
        need_weights: bool = False,
        average_weights: bool = True,
    ) -> Array | tuple[Array, Array]:
        """Attend from every position of `query` to those of `key`.

        Parameters
        ----------
        query : ndarray, shape (..., L, embed_dim)
            dtype of the layer. Leading dimensions broadcast with those of `key` and `value`.
        key : ndarray, shape (..., S, kdim), optional
            By default `query`: self-attention.
        value : ndarray, shape (..., S, vdim), optional
            By default `key`.
        mask : array of bool, broadcastable to (..., H, L, S), optional
            **True where a query may attend to a key**, as in `attention` and ``scaled_dot_product_attention``; the
            `attn_mask` of ``torch.nn.MultiheadAttention`` means the opposite.
        bias : array of float, broadcastable to (..., H, L, S), optional
            Added to the scaled scores: what PyTorch takes as a `attn_mask` of floats.
        key_padding_mask : array of bool, shape (..., S), optional
            **True where a key is padding and must be ignored**: the name is PyTorch's, and so is the meaning, which is
            the opposite of `mask`.
        is_causal, window, query_offset, scale, softcap, alibi_slopes, sinks, query_lengths, key_lengths
            As in `attention`. Where padding is at the end, `key_lengths` says so in fewer words.
        need_weights : bool, default False
            Also return the attention probabilities.
        average_weights : bool, default True
            Whether these are the mean over the heads, or those of every head.

        Returns
        -------
        out : ndarray, shape (..., L, embed_dim)
            A position that may attend to nothing holds the bias of the output projection.
        weights : ndarray, shape (..., L, S), or (..., H, L, S) unless `average_weights`
            Only if `need_weights`.

        Raises
        ------
        TypeError, ValueError
            As in `attention`; the message names the argument.
        """
        key, value = self._inputs(query, key, value)
        options: dict[str, Any] = {
            "mask": mask,
            "bias": bias,
            "is_causal": is_causal,
            "window": window,
            "query_offset": query_offset,
            "scale": scale,
            "softcap": softcap,
            "alibi_slopes": alibi_slopes,
            "sinks": sinks,
            "query_lengths": query_lengths,
            "key_lengths": key_lengths,
            "backend": self.backend,
        }
        if key_padding_mask is not None:
            _hide_padding(options, key_padding_mask, key.shape[-2])
        q, k, v = self._project(query, key, value)
        batch = _batch(query, key, value)
        # As rows of features, so that the heads end up side by side for the last projection without a copy.
        heads = np.empty((*batch, query.shape[-2], self.num_heads, self.head_dim), self.dtype)
        attention(q, k, v, out=heads.swapaxes(-3, -2), **options)
        features = heads.reshape(*heads.shape[:-2], self.num_heads * self.head_dim)
        out = _linear(features, self._parameters["out_proj.weight"], self._parameters.get("out_proj.bias"))
        if not need_weights:
            return out
        return out, _averaged(q, k, options) if average_weights else attention_weights(q, k, **options)

    def parameters(self) -> dict[str, Array]:
        """Return the parameters by name.

        Returns
        -------
        dict of ndarray
            The layer's own arrays: what is written into them changes the layer.

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

    def load_parameters(self, parameters: Mapping[str, ArrayLike]) -> None:
        """Copy parameters into the layer, converted to its dtype.

        Parameters
        ----------
        parameters : mapping of str to array of float
            Every name of `parameters` and no other, each of that shape.

        Raises
        ------
        TypeError
            A parameter is not floating point.
        ValueError
            A name is missing or unknown, or a shape differs. The layer is then as it was.
        """
        arrays = {name: _floats(name, array) for name, array in parameters.items()}
        if missing := self._parameters.keys() - arrays:
            raise ValueError(f"parameters lack {', '.join(sorted(missing))}")
        if unknown := arrays.keys() - self._parameters:
            raise ValueError(f"parameters have names that this layer does not: {', '.join(sorted(unknown))}")
        for name, own in self._parameters.items():
            if arrays[name].shape != own.shape:
                raise ValueError(f"{name} must have shape {own.shape}, got {arrays[name].shape}")
        for name, own in self._parameters.items():
            own[...] = arrays[name]

    @classmethod
    def from_torch(cls, state_dict: Mapping[str, Any], num_heads: int, *, backend: str | None = None) -> Self:
        """Build a layer from the parameters of a ``torch.nn.MultiheadAttention``.

        Parameters
        ----------
        state_dict : mapping of str to tensor or array
            What its ``state_dict()`` returns, in the packed form ("in_proj_weight") or, with `kdim` or `vdim`,
            the separate one ("q_proj_weight", ...). PyTorch itself is not needed for arrays.
        num_heads : int
            The state dict does not tell.
        backend : {"auto", "cpu", "reference"}, optional
            As in `MultiHeadAttention`.

        Returns
        -------
        MultiHeadAttention
            With copies of the parameters; float64 if they are, else float32.

        Raises
        ------
        TypeError
            A parameter is not an array of floating point.
        ValueError
            Names or shapes are not those of the module, or it was made with ``add_bias_kv=True``, which adds
            a learned key that this layer does not have.
        """
        given = {name: _from_tensor(name, x) for name, x in state_dict.items()}
        if given.keys() & {"bias_k", "bias_v"}:
            raise ValueError("state_dict has bias_k and bias_v (add_bias_kv=True), which this layer does not support")
        for kind in ("weight", "bias"):
            packed = given.pop(f"in_proj_{kind}", None)
            parts = [given.pop(f"{name}_{kind}", None) for name in _INPUTS]
            if packed is not None:
                if len(packed) % 3:
                    raise ValueError(f"in_proj_{kind} must hold three equal parts, got shape {packed.shape}")
                parts = list(np.split(packed, 3))
            given |= {f"{name}.{kind}": part for name, part in zip(_INPUTS, parts, strict=True) if part is not None}
        return cls._from_parameters(given, num_heads, backend)

    def to_torch(self) -> dict[str, Any]:
        """Return the parameters as ``torch.nn.MultiheadAttention.load_state_dict`` takes them.

        Returns
        -------
        dict of torch.Tensor
            Copies; packed ("in_proj_weight") if key and value have `embed_dim` features, else separate.

        Raises
        ------
        ImportError
            PyTorch is not installed.
        ValueError
            The layer has fewer key/value heads than heads, or heads that do not add up to `embed_dim`:
            that module cannot hold them.
        """
        if self.num_kv_heads != self.num_heads or self.num_heads * self.head_dim != self.embed_dim:
            raise ValueError(
                "torch.nn.MultiheadAttention needs num_kv_heads == num_heads and num_heads * head_dim == embed_dim, "
                f"got {self!r}"
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
            state |= {f"{name}_weight": own[f"{name}.weight"] for name in _INPUTS}
        if self.bias:
            state["in_proj_bias"] = np.concatenate([own[f"{name}.bias"] for name in _INPUTS])
        return {name: torch.from_numpy(array.copy()) for name, array in state.items()}

    @classmethod
    def load_safetensors(
        cls, path: str | PathLike[str], prefix: str = "", *, num_heads: int, backend: str | None = None
    ) -> Self:
        """Build a layer from a safetensors file; needs the safetensors library.

        Parameters
        ----------
        path : str or path-like
            The file.
        prefix : str, default ""
            What stands before the names of the parameters, with its last dot: "encoder.0.self_attn.".
        num_heads : int
            The file does not tell.
        backend : {"auto", "cpu", "reference"}, optional
            As in `MultiHeadAttention`.

        Returns
        -------
        MultiHeadAttention
            Sizes follow from the shapes; float64 if the parameters are, else float32. If some of the projections
            have a bias, those of the others are 0.

        Raises
        ------
        ImportError
            The safetensors library is not installed.
        FileNotFoundError
            There is no such file.
        ValueError
            The file holds no such layer behind that prefix: neither "q_proj.weight" and its companions as
            `save_safetensors` writes them, nor the names of ``torch.nn.MultiheadAttention``.
        """
        with _safetensors().safe_open(path, "np") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a mapping
            given = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        if given.keys() & {"in_proj_weight", "q_proj_weight"}:
            return cls.from_torch(given, num_heads, backend=backend)
        return cls._from_parameters(given, num_heads, backend)

    def save_safetensors(self, path: str | PathLike[str], prefix: str = "") -> None:
        """Write the parameters to a safetensors file; needs the safetensors library.

        Parameters
        ----------
        path : str or path-like
            The file, replaced if it exists.
        prefix : str, default ""
            What to put before the names of the parameters.

        Raises
        ------
        ImportError
            The safetensors library is not installed.
        """
        arrays = {prefix + name: np.ascontiguousarray(array) for name, array in self._parameters.items()}
        _safetensors().numpy.save_file(arrays, path)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the views into packed storage, which would come back as arrays of their own."""
        state = {name: x for name, x in vars(self).items() if name not in ("_packed", "_packed_bias", "_parameters")}
        return state | {"parameters": self.parameters()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parameters = state.pop("parameters")
        vars(self).update(state)
        self._allocate()
        self.load_parameters(parameters)

    def _allocate(self) -> None:
        """Make room for the parameters; where the inputs have the same features, as views into one matrix."""
        width, narrow = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        rows = dict(zip(_INPUTS, (width, narrow, narrow), strict=True))
        columns = dict(zip(_INPUTS, (self.embed_dim, self.kdim, self.vdim), strict=True))
        cuts = [width, width + narrow]
        own: dict[str, Array] = {}
        self._packed: Array | None = None
        if len(set(columns.values())) == 1:
            # One product for all three projections of self-attention: a wide one is faster than three narrow ones.
            self._packed = np.zeros((width + 2 * narrow, self.embed_dim), self.dtype)
            parts = np.split(self._packed, cuts)
        else:
            parts = [np.zeros((rows[name], columns[name]), self.dtype) for name in _INPUTS]
        own |= {f"{name}.weight": part for name, part in zip(_INPUTS, parts, strict=True)}
        self._packed_bias = np.zeros(width + 2 * narrow, self.dtype) if self.bias else None
        if self._packed_bias is not None:
            parts = np.split(self._packed_bias, cuts)
            own |= {f"{name}.bias": part for name, part in zip(_INPUTS, parts, strict=True)}
        own["out_proj.weight"] = np.zeros((self.embed_dim, width), self.dtype)
        if self.bias:
            own["out_proj.bias"] = np.zeros(self.embed_dim, self.dtype)
        self._parameters = own

    def _initialise(self, rng: np.random.Generator) -> None:
        inputs = [self._parameters[f"{name}.weight"] for name in _INPUTS] if self._packed is None else [self._packed]
        for weight in inputs:
            limit = math.sqrt(6 / sum(weight.shape))  # Xavier; of the packed matrix as a whole, as PyTorch does
            weight[...] = rng.uniform(-limit, limit, weight.shape)
        weight = self._parameters["out_proj.weight"]
        limit = 1 / math.sqrt(weight.shape[1])
        weight[...] = rng.uniform(-limit, limit, weight.shape)

    @classmethod
    def _from_parameters(cls, given: Mapping[str, Array], num_heads: int, backend: str | None) -> Self:
        """Build the layer that has these parameters, whose shapes tell its sizes."""
        arrays = {name: _floats(name, array) for name, array in given.items()}
        weights = [arrays.get(f"{name}.weight") for name in (*_INPUTS, "out_proj")]
        missing = [name for name, w in zip((*_INPUTS, "out_proj"), weights, strict=True) if w is None]
        if missing:
            raise ValueError(f"no weight for {', '.join(missing)} among {sorted(arrays) or 'no parameters'}")
        q, k, v, out = (w for w in weights if w is not None)
        if any(w.ndim != 2 for w in (q, k, v, out)):
            raise ValueError(f"weights must be matrices, got {q.shape}, {k.shape}, {v.shape} and {out.shape}")
        head_dim, rest = divmod(len(q), _positive("num_heads", num_heads))
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
            dtype=np.float64 if all(array.dtype == np.float64 for array in arrays.values()) else np.float32,
            rng=0,
            backend=backend,
        )
        zeros = {name: own for name, own in layer._parameters.items() if name.endswith(".bias")}
        layer.load_parameters(zeros | arrays)
        return layer

    def _inputs(self, query: Array, key: Array | None, value: Array | None) -> tuple[Array, Array]:
        """Check the inputs, and return key and value with their defaults."""
        if key is None and value is not None:
            raise ValueError("key must be given where value is")
        key = query if key is None else key
        value = key if value is None else value
        sizes = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        for name, (array, features) in sizes.items():
            if not isinstance(array, np.ndarray):
                kind = f"{type(array).__module__}.{type(array).__qualname__}"
                raise TypeError(f"{name} must be a numpy.ndarray, got {kind}; convert it with numpy.asarray({name})")
            if array.dtype != self.dtype:
                raise TypeError(
                    f"{name} must have the dtype of the layer, {self.dtype}, got {array.dtype}; "
                    f"convert it with {name}.astype(layer.dtype)"
                )
            if array.ndim < 2 or array.shape[-1] != features:
                raise ValueError(f"{name} must have shape (..., length, {features}), got {array.shape}")
        if key.shape[-2] != value.shape[-2]:
            raise ValueError(f"value must be as long as key, {key.shape[-2]}, got {value.shape[-2]}")
        return key, value

    def _project(self, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
        """Queries (..., H, L, E), keys and values (..., Hkv, S, E), as views of products with the features last."""
        H, Hkv = self.num_heads, self.num_kv_heads
        if self._packed is not None and key is query and value is query:
            q, k, v = np.split(self._heads(_linear(query, self._packed, self._packed_bias)), [H, H + Hkv], axis=-3)
            return q, k, v
        own = self._parameters
        q, k, v = (
            self._heads(_linear(x, own[f"{name}.weight"], own.get(f"{name}.bias")))
            for name, x in zip(_INPUTS, (query, key, value), strict=True)
        )
        return q, k, v

    def _heads(self, features: Array) -> Array:
        """(..., L, heads * E) -> (..., heads, L, E)."""
        return features.reshape(*features.shape[:-1], -1, self.head_dim).swapaxes(-3, -2)


def _linear(x: Array, weight: Array, bias: Array | None) -> Array:
    """``x @ weight.T + bias`` over the last axis."""
    # As one matrix: over a stack of them, NumPy calls BLAS once for each, four times as slow at 128 rows.
    out = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) @ weight.T
    if bias is not None:
        out += bias
    return out.reshape(*x.shape[:-1], len(weight))


def _batch(query: Array, key: Array, value: Array) -> tuple[int, ...]:
    shapes = query.shape[:-2], key.shape[:-2], value.shape[:-2]
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        raise ValueError(
            "leading dimensions of query, key and value do not broadcast: {}, {}, {}".format(*shapes)
        ) from None


def _hide_padding(options: dict[str, Any], padding: ArrayLike, S: int) -> None:
    """Turn PyTorch's key_padding_mask into key_lengths if padding is at the end, and into a mask otherwise."""
    ignored = np.asarray(padding)
    if ignored.dtype != np.bool_:
        raise TypeError(
            f"key_padding_mask must be boolean (True = padding, ignored), got {ignored.dtype}; "
            "compare or cast it, or pass additive values as bias="
        )
    if ignored.ndim < 1 or ignored.shape[-1] != S:
        raise ValueError(f"key_padding_mask must have shape (..., {S}), got {ignored.shape}")
    # Lengths let whole tiles be skipped. Not where positions are counted from the end of the keys, though: a mask says
    # nothing about where the sequence ends.
    at_end = bool((ignored[..., :-1] <= ignored[..., 1:]).all())
    if at_end and options["key_lengths"] is None and options["is_causal"] != "bottom-right":
        options["key_lengths"] = S - np.count_nonzero(ignored, axis=-1)
        return
    seen = ~ignored[..., None, None, :]
    mask = options["mask"]
    if mask is None:
        options["mask"] = seen
    elif np.asarray(mask).dtype == np.bool_:  # anything else is refused by `attention`, in its own words
        options["mask"] = mask & seen


def _averaged(query: Array, key: Array, options: dict[str, Any]) -> Array:
    """Mean of the probabilities over the heads, one head at a time: memory for two maps and not for H."""
    H = query.shape[-3]
    total = attention_weights(query, key, heads=[0], **options)
    for h in range(1, H):
        total += attention_weights(query, key, heads=[h], **options)
    total /= H
    mean: Array = total[..., 0, :, :]
    return mean


def _positive(name: str, x: Any) -> int:
    if isinstance(x, bool) or not isinstance(x, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {x!r}")
    if x < 1:
        raise ValueError(f"{name} must be positive, got {x}")
    return int(x)


def _real_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found not in (np.dtype(np.float32), np.dtype(np.float64)) or dtype is None:
        raise TypeError(f"dtype must be float32 or float64, got {dtype!r}")
    return np.dtype(found)


def _generator(rng: np.random.Generator | int | None) -> np.random.Generator:
    if rng is not None and (isinstance(rng, bool) or not isinstance(rng, np.random.Generator | int | np.integer)):
        raise TypeError(f"rng must be a numpy.random.Generator, an integer or None, got {rng!r}")
    return np.random.default_rng(rng)


def _floats(name: str, x: ArrayLike) -> Array:
    array = np.asarray(x)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} must be floating point, got {array.dtype}")
    return array


def _from_tensor(name: str, x: Any) -> Array:
    """View a tensor as an array, without importing PyTorch."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        if "bfloat16" in str(x.dtype):  # which PyTorch cannot give to NumPy
            x = x.float()
        return np.asarray(x)
    return _floats(name, x)


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("safetensors files need that library: pip install 'numba-attention[demo]'") from error
    return safetensors


__all__ = ["MultiHeadAttention"]
