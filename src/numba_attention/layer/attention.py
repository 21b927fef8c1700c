"""`MultiHeadAttention`: attention between learned projections, forward and backward."""

from __future__ import annotations  # short types in help()

from collections.abc import Mapping
from types import FunctionType
from typing import Any, Literal, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike

from .. import markup
from ..options import Array, Gradients, OptionArguments, gather, takes_options
from ..validation import as_flag, check_like
from . import cached, passes, second
from .cached import Cache
from .heads import Heads, Positions
from .lazy import LazyContext, implementation_for
from .passes import Context


class LayerArguments(OptionArguments, total=False):
    """What every call of the layer takes by name, for type checkers: the options of `attention` and some of its own."""

    key_padding_mask: ArrayLike | None
    positions: Positions | None
    average_weights: bool
    training: bool


class MultiHeadAttention(Heads):
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
    rotary : bool, dict or config, optional
        True or the options of `apply_rotary` (base, dim, interleaved, scaling) for a rotary position embedding: the
        projected queries and keys are rotated to their positions: key j to j, and query i to ``i + query_offset`` or
        to its position under ``is_causal="bottom-right"``, or both to ``positions=``. True means the default options.
        A model's config, or its ``rope_parameters`` or ``rope_scaling``, is read: base, scaling and rotated part.
    dropout : float, default 0.0
        Probability with which an attention weight is dropped in training, at least 0 and less than 1: `dropout_p` of
        the calls with ``training=True``.
    dtype : {numpy.float32, numpy.float64}
        dtype of the parameters, the inputs and the outputs.
    rng : numpy.random.Generator or int, optional
        Generator or seed of the initial weights, and then of the seeds of dropout. The initial weights are distributed
        as those of ``torch.nn.MultiheadAttention``: Xavier uniform for the inputs, uniform in ``+-1/sqrt(H * E)`` for
        the output, biases 0.
    backend : {"auto", "cpu", "reference"}, optional
        Backend of every call of this layer, as in `attention`.

    Attributes
    ----------
    grads : dict of ndarray
        Gradients with respect to the parameters, by name, from the last call of `backward`; empty before.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or does not fit the others; the message names it.

    See Also
    --------
    attention : the function that the layer wraps, with its options explained.
    apply_rotary : the rotary position embedding.

    Notes
    -----
    Parameters are called "q_proj.weight" (H * E, embed_dim), "k_proj.weight" (Hkv * E, kdim), "v_proj.weight"
    (Hkv * E, vdim) and "out_proj.weight" (embed_dim, H * E), each (out_features, in_features) as in PyTorch, and
    "q_proj.bias", "k_proj.bias", "v_proj.bias" and "out_proj.bias". Projections run on the
    threads and in kernels of this package (`projection`), so results have the same bits for any number of threads, and
    for a sequence alone or in a batch. Gradients of parameters are sums over the batch.

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

    A prompt in one piece, and a token after it, with a cache:

    >>> cache = na.KVCache(batch=2, num_kv_heads=2, capacity=11, head_dim=8)
    >>> prompt, token = layer(x[:, :9], cache=cache, is_causal=True), layer(x[:, 9:], cache=cache, is_causal=True)
    >>> bool(np.allclose(np.concatenate([prompt, token], axis=1), layer(x, is_causal=True), atol=1e-6))
    True
    """

    @overload
    def __call__(
        self, query: Array, key: Array | None = ..., value: Array | None = ..., *, cache: Cache | None = ...,
        ids: ArrayLike | None = ..., cu_seqlens: ArrayLike | None = ...,
        need_weights: Literal[False] = ..., **options: Unpack[LayerArguments],
    ) -> Array: ...  # fmt: skip
    @overload
    def __call__(
        self, query: Array, key: Array | None = ..., value: Array | None = ..., *,
        need_weights: Literal[True], **options: Unpack[LayerArguments],
    ) -> tuple[Array, Array]: ...  # fmt: skip
    @takes_options()
    def __call__(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        key_padding_mask: ArrayLike | None = None,
        cache: Cache | None = None,
        ids: ArrayLike | None = None,
        cu_seqlens: ArrayLike | None = None,
        positions: Positions | None = None,
        need_weights: bool = False,
        average_weights: bool = True,
        training: bool = False,
        **options: Unpack[OptionArguments],
    ) -> Array | tuple[Array, Array]:
        """Attend from every position of `query` to those of `key`.

        Parameters
        ----------
        query : ndarray, shape (..., L, embed_dim)
            dtype of the layer. Leading dimensions broadcast with those of `key` and `value`. Inputs may be Dask arrays,
            but with a cache or `need_weights`; the result is one then.
        key : ndarray, shape (..., S, kdim), optional
            By default `query`: self-attention.
        value : ndarray, shape (..., S, vdim), optional
            By default `key`.
        mask : array of bool, broadcastable to (..., H, L, S), or BlockMask, optional
            **True where a query may attend to a key**, as in `attention` and ``scaled_dot_product_attention``; the
            `attn_mask` of ``torch.nn.MultiheadAttention`` means the opposite.
        bias : array of float, broadcastable to (..., H, L, S), optional
            Added to the scaled scores, as an `attn_mask` of floats in PyTorch.
        key_padding_mask : array of bool, shape (..., S), optional
            **True where a key is padding and must be ignored**, as in PyTorch. That is the opposite of `mask`.
        **options
            Other options as in `attention`. For padding at the end, `key_lengths` is simpler.
        cache : KVCache or PagedKVCache, optional
            Keys and values of earlier calls, one cache for each layer. The rows of `key` (by default `query`), of shape
            (batch, L, features), are projected, rotated and appended, as many as `key_lengths` says, and the queries
            attend to everything in the cache. Positions continue from the cache: query i sits at the length of its
            sequence before the call plus i, for `is_causal`, `window`, ALiBi and rotary embeddings, unless
            `query_offset` is passed. For a prompt in one piece to give what it gives token by token, pass
            ``is_causal=True``: unlike `attention_decode`, a layer is not causal by default, with a cache either, and
            tokens that come together would see each other in both directions. A `mask` or `bias` refers to all cached
            keys or to the L newest, as in `attention_decode`. With a key of length 0 nothing is appended, as for a
            memory that was cached before.
            Inference only. If an argument is refused, the cache is as it was.
        ids : array of int, shape (batch,), optional
            Which sequences of a `PagedKVCache`; by default all of them.
        cu_seqlens : array of int, shape (n + 1,), optional
            `query`, of shape (T, embed_dim), is n sequences laid end to end. Sequence b has the rows
            ``cu_seqlens[b] : cu_seqlens[b + 1]`` and attends to itself, as in `attention_varlen`, whose options apply.
        positions : array of int or float, broadcastable to (..., L), or a pair of them, optional
            Where the rotary embedding places the rows, such as ``position_ids`` of shape (batch, L); a pair, of queries
            and of keys, where `key` is passed. By default key j sits at j and queries where `attention` places them.
            With a scaling that has ``mrope_section``, also (3, ..., L). Masks and windows do not depend on it.
        need_weights : bool, default False
            Also return the attention probabilities. Not with a cache or `cu_seqlens`.
        average_weights : bool, default True
            Whether to return the mean of the probabilities over the heads, or those of every head.
        training : bool, default False
            Whether to drop attention weights with the probability `dropout` of the layer, or that of `dropout_p` if it
            is passed. Without `seed`, each such call draws one from the generator of the layer.

        Returns
        -------
        out : ndarray, shape (..., L, embed_dim)
            The result of a position that may attend to nothing is the bias of the output projection.
        weights : ndarray, shape (..., L, S), or (..., H, L, S) unless `average_weights`
            Only if `need_weights`.

        Raises
        ------
        TypeError, ValueError
            As in `attention`; the message names the argument.
        """
        settings = self._settings(gather(self.__call__, options)._asdict(), options, training)
        need_weights = as_flag("need_weights", need_weights)
        average_weights = as_flag("average_weights", average_weights)
        if cache is not None:
            if cu_seqlens is not None:
                raise ValueError("cu_seqlens must be None with a cache")
            if need_weights:
                raise ValueError("need_weights must be False with a cache; see attention_weights")
            return cached.attend(self, query, key, value, key_padding_mask, cache, ids, positions, settings)
        if ids is not None:
            raise ValueError("ids must be None without a cache")
        ctx = self._attend_any(
            query, key, value, key_padding_mask, cu_seqlens, positions, need_weights, settings, False
        )
        result: Array | tuple[Array, Array] = passes.result(self, ctx, need_weights, average_weights)
        return result

    @overload
    def forward(
        self, query: Array, key: Array | None = ..., value: Array | None = ..., *, cu_seqlens: ArrayLike | None = ...,
        need_weights: Literal[False] = ..., **options: Unpack[LayerArguments],
    ) -> tuple[Array, Context]: ...  # fmt: skip
    @overload
    def forward(
        self, query: Array, key: Array | None = ..., value: Array | None = ..., *,
        need_weights: Literal[True], **options: Unpack[LayerArguments],
    ) -> tuple[tuple[Array, Array], Context]: ...  # fmt: skip
    @takes_options()
    def forward(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        key_padding_mask: ArrayLike | None = None,
        cu_seqlens: ArrayLike | None = None,
        positions: Positions | None = None,
        need_weights: bool = False,
        average_weights: bool = True,
        training: bool = False,
        **options: Unpack[OptionArguments],
    ) -> tuple[Array | tuple[Array, Array], Context | LazyContext]:
        """Call the layer, and also return what `backward` needs.

        Parameters
        ----------
        query, key, value, key_padding_mask, cu_seqlens, positions, need_weights, average_weights, training, **options
            As for a call: ``layer(query, key, value, ...)``.

        Returns
        -------
        out : ndarray, shape (..., L, embed_dim), or (out, weights)
            As returned by a call of the layer.
        ctx : object
            The context for `backward`. It refers to the inputs and to the options that are arrays without copying them:
            do not change them until then. It also contains the projected queries, keys and values, the output of the
            attention and a number for each query and head, so memory is linear in the lengths. It has the seed of
            dropout too, so that `backward` repeats the mask.

        Raises
        ------
        TypeError, ValueError
            As for a call.

        See Also
        --------
        backward : the gradients.

        Examples
        --------
        >>> import numpy as np, numba_attention as na
        >>> layer = na.MultiHeadAttention(8, 2, rng=0)
        >>> x = np.random.default_rng(1).standard_normal((5, 8), dtype=np.float32)
        >>> out, ctx = layer.forward(x, is_causal=True)
        >>> bool((out == layer(x, is_causal=True)).all())
        True
        """
        settings = self._settings(gather(self.forward, options)._asdict(), options, training)
        need_weights = as_flag("need_weights", need_weights)
        average_weights = as_flag("average_weights", average_weights)
        ctx = self._attend_any(query, key, value, key_padding_mask, cu_seqlens, positions, need_weights, settings, True)
        return passes.result(self, ctx, need_weights, average_weights), ctx

    def backward(
        self, grad_out: Array, ctx: Context, *, mod_grads: ArrayLike | Literal["all"] | None = None
    ) -> Gradients:
        """Gradients of a loss with respect to the inputs of `forward` and, in `grads`, to the parameters.

        Parameters
        ----------
        grad_out : ndarray, shape (..., L, embed_dim)
            Gradient of the loss with respect to `out`, of its shape and dtype.
        ctx : object
            The context that `forward` of this layer returned. It may be used several times, and contexts may be used in
            any order.
        mod_grads : "all" or int or sequence of int, optional
            Which arrays in `mod_args` get a gradient, as in `attention_backward`.

        Returns
        -------
        Gradients
            Named tuple (query, key, value, bias, sinks, mod_args), each of the shape and dtype of its input. The
            gradient of an input that was not passed is None, and is part of the gradient of the input that was used in
            its place: in self-attention, that of `query` is the sum of all. `bias` and `sinks` are None unless these
            were passed, and `mod_args` without `mod_grads`.

        Raises
        ------
        TypeError, ValueError
            `grad_out` has another type, dtype or shape than `out`, or `ctx` is not of this layer.

        See Also
        --------
        attention_backward : the gradients of the attention without projections.

        Notes
        -----
        Each call sets `grads` to a new dict, with names, shapes and dtypes as in `parameters`. To accumulate gradients
        over several calls, add up the dicts. For Dask arrays, gradients are lazy, those in `grads` too, and the
        parameters are those at the time of `forward`.

        Parameters must not change between `forward` and `backward`: attention is differentiated at the values that
        `forward` kept, but the projections at the present parameters. Weights returned on `need_weights` are not
        differentiated.

        Keys that are hidden by lengths, padding or masks have the gradient 0 and contribute none, even if they are NaN.
        A query that is padding attends to keys like any other unless `query_lengths` excludes it, and if it is NaN, so
        are the gradients of these keys. The output projection uses every row of `grad_out`.

        Examples
        --------
        >>> import numpy as np, numba_attention as na
        >>> layer = na.MultiHeadAttention(8, 2, dtype=np.float64, rng=0)
        >>> x, target = np.random.default_rng(1).standard_normal((2, 5, 8))
        >>> for step in range(3):
        ...     out, ctx = layer.forward(x)
        ...     print(f"{((out - target) ** 2).sum():.2f}")
        ...     grad = layer.backward(2 * (out - target), ctx)
        ...     for name, parameter in layer.parameters().items():
        ...         parameter -= 0.05 * layer.grads[name]
        22.60
        16.90
        14.00
        >>> grad.query.shape, grad.key
        ((5, 8), None)
        """
        if isinstance(ctx, LazyContext) and ctx.layer is self:
            gradients, self.grads = ctx.backward(grad_out, mod_grads)
            return gradients
        grad_out, lse = self._check(grad_out, ctx)
        gradients, self.grads = passes.gradients(self, grad_out, ctx, lse, mod_grads)
        return gradients

    def jvp(self, tangents: Gradients, ctx: Context, *, parameters: Mapping[str, Array] | None = None) -> Array:
        """Derivative of the output of `forward` along a direction of the inputs and parameters.

        Parameters
        ----------
        tangents : Gradients
            The direction, a named tuple (query, key, value, bias, sinks): each of the shape and dtype of its input,
            None for 0 and for an input that was not passed, which moves with the input that was used in its place.
        ctx : object
            The context that `forward` of this layer returned, with the options that it was called with.
        parameters : mapping of str to ndarray, optional
            Tangents of parameters, by the names in `parameters`: each of the shape and dtype of its parameter; those
            left out are 0.

        Returns
        -------
        ndarray, shape (..., L, embed_dim)
            In the dtype of the layer.

        Raises
        ------
        TypeError, ValueError
            A tangent does not have the shape and dtype of what it belongs to, or `ctx` is not of this layer.
        NotImplementedError
            A tangent for `mod_args` was given.

        See Also
        --------
        attention_jvp : the same for the attention without projections.
        double_backward : the derivative of `backward`.

        Notes
        -----
        Projections and rotary embeddings are linear, so that tangents pass them as values do; attention between them
        takes five products for each pair of a query and a key. Memory is linear in the lengths.

        References
        ----------
        .. [1] Baydin et al., "Automatic Differentiation in Machine Learning: a Survey", 2018, section 3.1.

        Examples
        --------
        >>> import numpy as np, numba_attention as na
        >>> layer = na.MultiHeadAttention(8, 2, dtype=np.float64, rng=0)
        >>> x, dx = np.random.default_rng(1).standard_normal((2, 5, 8))
        >>> out, ctx = layer.forward(x)
        >>> moved = layer.jvp(na.Gradients(dx, None, None), ctx)
        >>> bool(np.allclose(moved, (layer(x + 1e-5 * dx) - layer(x - 1e-5 * dx)) / 2e-5))
        True
        """
        self._check_context(ctx)
        direction = second.as_direction(self, ctx, "tangents", tangents, "parameters", parameters)
        return second.jvp(self, ctx, direction)

    def double_backward(
        self, grad_grads: Gradients, grad_out: Array, ctx: Context, *, parameters: Mapping[str, Array] | None = None
    ) -> tuple[Gradients, Array]:
        """Gradients of `backward` with respect to its arguments, and in `grads` to the parameters.

        Parameters
        ----------
        grad_grads : Gradients
            Gradients of some loss with respect to what `backward` returned, a named tuple (query, key, value, bias,
            sinks): each of its shape and dtype, None for 0.
        grad_out : ndarray, shape (..., L, embed_dim)
            What `backward` was called with, in the dtype of the layer.
        ctx : object
            The context that `forward` returned.
        parameters : mapping of str to ndarray, optional
            Gradients of the loss with respect to `grads`, by the names of the parameters: each of the shape and dtype
            of its parameter; those left out are 0.

        Returns
        -------
        gradients : Gradients
            With respect to the inputs of `forward`, as of `backward`: None for an input that was not passed.
        grad_grad_out : ndarray, shape (..., L, embed_dim)
            With respect to `grad_out`, in its dtype.

        Raises
        ------
        TypeError, ValueError, NotImplementedError
            As in `jvp`.

        See Also
        --------
        attention_double_backward : the same for the attention without projections, and what it is based on.

        Notes
        -----
        Each call sets `grads` to a new dict, as `backward` does. Where `grad_out` was made of the output, what comes
        back through it is one more gradient of the output: pass it to `backward`, and add up the dicts.

        References
        ----------
        .. [1] Pearlmutter, "Fast Exact Multiplication by the Hessian", 1994.

        Examples
        --------
        A layer is trained on the gradient of its output, here to make it small:

        >>> import numpy as np, numba_attention as na
        >>> layer = na.MultiHeadAttention(8, 2, dtype=np.float64, rng=0)
        >>> x = np.random.default_rng(1).standard_normal((5, 8))
        >>> for step in range(3):
        ...     out, ctx = layer.forward(x)
        ...     slope = layer.backward(np.ones_like(out), ctx).query
        ...     print(f"{(slope ** 2).sum():.2f}")
        ...     _ = layer.double_backward(na.Gradients(2 * slope, None, None), np.ones_like(out), ctx)
        ...     for name, parameter in layer.parameters().items():
        ...         parameter -= 0.01 * layer.grads[name]
        3.07
        0.26
        0.11
        """
        grad_out, _ = self._check(grad_out, ctx)
        direction = second.as_direction(self, ctx, "grad_grads", grad_grads, "parameters", parameters)
        gradients, moved, self.grads = second.double_backward(self, ctx, direction, grad_out)
        return gradients, moved

    def _repr_html_(self) -> str:
        rows = [(name, " x ".join(map(str, x.shape)), f"{x.size:,}") for name, x in self.parameters().items()]
        total = sum(x.size for x in self.parameters().values())
        return markup.table(repr(self), [("parameter", "shape", "numbers"), *rows, ("together", "", f"{total:,}")])

    def _attend_any(
        self,
        query: Array,
        key: Array | None,
        value: Array | None,
        padding: ArrayLike | None,
        cu_seqlens: ArrayLike | None,
        positions: Positions | None,
        need_weights: bool,
        options: dict[str, Any],
        return_lse: bool,
    ) -> Any:
        lazy = implementation_for(query, key, value)
        if lazy is not None:
            if need_weights:
                raise ValueError("need_weights must be False for arrays of Dask; see attention_weights")
            return lazy.attend(self, query, key, value, padding, cu_seqlens, positions, options)
        if cu_seqlens is None:
            return passes.attend(self, query, key, value, padding, positions, options, return_lse)
        if need_weights or key is not None or value is not None:
            raise ValueError("cu_seqlens is for self-attention without need_weights: key and value must be None")
        return passes.attend_packed(self, query, padding, cu_seqlens, positions, options, return_lse)

    def _settings(self, settings: dict[str, Any], given: Mapping[str, Any], training: bool) -> dict[str, Any]:
        """Add dropout to the options of a call in training."""
        if as_flag("training", training):
            if "dropout_p" not in given:
                settings["dropout_p"] = self.dropout
            if settings["seed"] is None:
                settings["seed"] = int(self._rng.integers(2**64, dtype=np.uint64))
        return settings

    def _check(self, grad_out: Any, ctx: Any) -> tuple[Array, Array]:
        """Check the arguments of `backward`; return the gradient, and the lse of the context."""
        lse = self._check_context(ctx)
        return check_like("grad_out", grad_out, (*ctx.heads.shape[:-2], self.embed_dim), self.dtype), lse

    def _check_context(self, ctx: Any) -> Array:
        if isinstance(ctx, LazyContext):
            raise ValueError("ctx must come from forward of the same layer, for second derivatives with NumPy arrays")
        if not isinstance(ctx, Context) or ctx.lse is None:
            raise TypeError(f"ctx must be what forward returned, got {type(ctx).__module__}.{type(ctx).__qualname__}")
        if ctx.layer is not self:
            raise ValueError("ctx must come from forward of the same layer")
        return ctx.lse


# Python's errors about arguments name the function as it is called, not the base class that has its text.
for _base in Heads.__mro__[:-1]:
    for _member in vars(_base).values():
        _function = getattr(_member, "__func__", _member)
        if isinstance(_function, FunctionType):
            _function.__qualname__ = f"{MultiHeadAttention.__name__}.{_function.__name__}"

__all__ = ["MultiHeadAttention"]
