"""`MultiHeadAttention`: attention between learned projections, forward and backward."""

from __future__ import annotations  # short types in help()

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike

from .. import markup
from ..api import attention, attention_backward, attention_weights
from ..options import Array, Gradients, OptionArguments, gather, takes_options
from ..problem.dense import sum_to
from ..rotary import Turn, rotate
from ..validation import as_flag, as_ints, check_like
from ..varlen import attention_varlen, attention_varlen_backward
from . import second
from .cached import Cache, attend
from .inputs import check_inputs, hide_padding
from .lazy import LazyContext, implementation_for
from .parameters import INPUTS, Weights
from .positions import Turns, default_places, packed_places, places_of, turned
from .projection import linear, linear_backward, without_idle_rows

Positions = ArrayLike | tuple[ArrayLike, ArrayLike]

# The input projections that one product can compute, as (first, last + 1), by whether key is query and value is key.
_RUNS = {
    (True, True): ((0, 3),),
    (True, False): ((0, 2), (2, 3)),
    (False, True): ((0, 1), (1, 3)),
    (False, False): ((0, 1), (1, 2), (2, 3)),
}


@dataclass(slots=True, eq=False, repr=False)
class Context:
    """What `MultiHeadAttention.backward` needs from one call of `forward`."""

    layer: MultiHeadAttention
    inputs: tuple[Array, Array | None, Array | None]  # query, key and value as the caller passed them
    q: Array  # (..., H, L, E)
    k: Array  # (..., Hkv, S, E)
    v: Array  # (..., Hkv, S, E)
    turns: tuple[Turn, Turn] | None  # the rotations of q and k
    heads: Array  # (..., L, H, E), the output of attention
    lse: Array | None  # (..., H, L); None if nothing will be differentiated
    options: dict[str, Any]  # those of `attention`
    starts: Array | None = None  # cu_seqlens of packed sequences: q, k, v are (T, heads, E) then, heads (T, H, E)

    @property
    def sources(self) -> tuple[int, int, int]:
        """Return which of the inputs queries, keys and values were projected from."""
        of_keys = 0 if self.inputs[1] is None else 1
        return 0, of_keys, of_keys if self.inputs[2] is None else 2


class MultiHeadAttention(Weights):
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
    """

    @overload
    def __call__(
        self,
        query: Array,
        key: Array | None = ...,
        value: Array | None = ...,
        *,
        key_padding_mask: ArrayLike | None = ...,
        cache: Cache | None = ...,
        ids: ArrayLike | None = ...,
        cu_seqlens: ArrayLike | None = ...,
        positions: Positions | None = ...,
        need_weights: Literal[False] = ...,
        average_weights: bool = ...,
        training: bool = ...,
        **options: Unpack[OptionArguments],
    ) -> Array: ...
    @overload
    def __call__(
        self,
        query: Array,
        key: Array | None = ...,
        value: Array | None = ...,
        *,
        key_padding_mask: ArrayLike | None = ...,
        positions: Positions | None = ...,
        need_weights: Literal[True],
        average_weights: bool = ...,
        training: bool = ...,
        **options: Unpack[OptionArguments],
    ) -> tuple[Array, Array]: ...
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
            `query_offset` is passed. A `mask` or `bias` refers to all cached keys or to the L newest, as in
            `attention_decode`. With a key of length 0 nothing is appended, as for a memory that was cached before.
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
            return self._attend_cache(query, key, value, key_padding_mask, cache, ids, positions, settings)
        if ids is not None:
            raise ValueError("ids must be None without a cache")
        ctx = self._attend_any(
            query, key, value, key_padding_mask, cu_seqlens, positions, need_weights, settings, False
        )
        result: Array | tuple[Array, Array] = self._result(ctx, need_weights, average_weights)
        return result

    @overload
    def forward(
        self,
        query: Array,
        key: Array | None = ...,
        value: Array | None = ...,
        *,
        key_padding_mask: ArrayLike | None = ...,
        cu_seqlens: ArrayLike | None = ...,
        positions: Positions | None = ...,
        need_weights: Literal[False] = ...,
        average_weights: bool = ...,
        training: bool = ...,
        **options: Unpack[OptionArguments],
    ) -> tuple[Array, Context]: ...
    @overload
    def forward(
        self,
        query: Array,
        key: Array | None = ...,
        value: Array | None = ...,
        *,
        key_padding_mask: ArrayLike | None = ...,
        positions: Positions | None = ...,
        need_weights: Literal[True],
        average_weights: bool = ...,
        training: bool = ...,
        **options: Unpack[OptionArguments],
    ) -> tuple[tuple[Array, Array], Context]: ...
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
        return self._result(ctx, need_weights, average_weights), ctx

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
        weight, bias = self._parameters["out_proj.weight"], self._parameters.get("out_proj.bias")
        grad, grad_weight, grad_bias = _gradients(grad_out, _features(ctx.heads), weight, bias is not None)
        grads_by_name: dict[str, Array | None] = {"out_proj.weight": grad_weight, "out_proj.bias": grad_bias}
        if ctx.starts is None:
            of_heads = attention_backward(
                self._heads(grad), ctx.q, ctx.k, ctx.v, ctx.heads.swapaxes(-3, -2), lse, mod_grads=mod_grads,
                **ctx.options,
            )  # fmt: skip
        else:
            of_heads = self._packed_gradients(self._heads(grad).swapaxes(0, 1), ctx, lse, mod_grads)
        of_inputs: list[Array | None] = [None, None, None]
        for first, last in self._runs(ctx.inputs[1] is None, ctx.inputs[2] is None):
            source = ctx.sources[first]
            x = ctx.inputs[source]
            assert x is not None
            grad = self._joined_gradient(of_heads[:3][first:last], ctx.turns, first, x.shape[:-1])
            weight, bias = self._joined(first, last)
            grad, grad_weight, grad_bias = _gradients(grad, x, weight, bias is not None)
            for n in range(first, last):
                heads = self._place(n, first)
                rows = slice(heads.start * self.head_dim, heads.stop * self.head_dim)
                grads_by_name[f"{INPUTS[n]}.weight"] = grad_weight[rows]
                grads_by_name[f"{INPUTS[n]}.bias"] = None if grad_bias is None else grad_bias[rows]
            so_far = of_inputs[source]
            of_inputs[source] = grad if so_far is None else np.add(so_far, grad, out=so_far)
        self.grads = {name: array for name in self._parameters if (array := grads_by_name[name]) is not None}
        return Gradients(of_inputs[0], of_inputs[1], of_inputs[2], *of_heads[3:])

    def jvp(self, tangents: Gradients, ctx: Context, *, parameters: Mapping[str, Array] | None = None) -> Array:
        """Derivative of the output of `forward` along a direction of the inputs and parameters.

        Parameters
        ----------
        tangents : Gradients
            The direction (query, key, value, bias, sinks): each of the shape and dtype of its input, None for 0 and for
            an input that was not passed, which moves with the input that was used in its place.
        ctx : object
            The context that `forward` of this layer returned.
        parameters : mapping of str to ndarray, optional
            Tangents of parameters, by their names.

        Returns
        -------
        ndarray, shape (..., L, embed_dim)

        Raises
        ------
        TypeError, ValueError
            A tangent does not have the shape and dtype of what it belongs to, or `ctx` is not of this layer.
        NotImplementedError
            A tangent for `mod_args` was given.

        See Also
        --------
        attention_jvp : the same for the attention without projections.

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
            Gradients of some loss with respect to what `backward` returned: each of its shape and dtype, None for 0.
        grad_out, ctx
            What `backward` was called with.
        parameters : mapping of str to ndarray, optional
            Gradients of the loss with respect to `grads`, by the names of the parameters.

        Returns
        -------
        gradients : Gradients
            With respect to the inputs of `forward`, as of `backward`.
        grad_grad_out : ndarray, shape (..., L, embed_dim)
            With respect to `grad_out`.

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
            return self._attend(query, key, value, padding, positions, options, return_lse)
        if need_weights or key is not None or value is not None:
            raise ValueError("cu_seqlens is for self-attention without need_weights: key and value must be None")
        return self._attend_packed(query, padding, cu_seqlens, positions, options, return_lse)

    def _settings(self, settings: dict[str, Any], given: Mapping[str, Any], training: bool) -> dict[str, Any]:
        """Add dropout to the options of a call in training."""
        if as_flag("training", training):
            if "dropout_p" not in given:
                settings["dropout_p"] = self.dropout
            if settings["seed"] is None:
                settings["seed"] = int(self._rng.integers(2**64, dtype=np.uint64))
        return settings

    def _attend(
        self, query: Array, key: Array | None, value: Array | None, padding: ArrayLike | None,
        positions: Positions | None, options: dict[str, Any], return_lse: bool,
    ) -> Context:  # fmt: skip
        """Project the inputs and attend, up to the output of the heads."""
        is_given = key is not None, value is not None
        features = self.embed_dim, self.kdim, self.vdim
        query, key, value, batch = check_inputs(query, key, value, features, self.dtype)
        options["backend"] = self.backend
        if padding is not None:
            hide_padding(options, padding, key.shape[-2])
        q, k, v = self._project(query, key, value)
        turns = self._turns(positions, (*batch, query.shape[-2]), (*batch, key.shape[-2]), not is_given[0])
        if turns is None and self._rotation is not None:
            places = default_places(self._rotation, query.shape[-2], key.shape[-2], batch, options)
            turns = places.turns(self.dtype)
        if turns is not None:
            q, k = turned(q, turns[0]), turned(k, turns[1])
        # The memory layout is (..., L, H, E), so that the last projection reads the heads side by side without a copy.
        heads = np.empty((*batch, query.shape[-2], self.num_heads, self.head_dim), self.dtype)
        lse = None
        if return_lse:
            _, lse = attention(q, k, v, out=heads.swapaxes(-3, -2), return_lse=True, **options)
        else:
            attention(q, k, v, out=heads.swapaxes(-3, -2), **options)
        inputs = query, key if is_given[0] else None, value if is_given[1] else None
        return Context(self, inputs, q, k, v, turns, heads, lse, options)

    def _attend_cache(
        self, query: Array, key: Array | None, value: Array | None, padding: ArrayLike | None, cache: Cache, ids: Any,
        positions: Positions | None, options: dict[str, Any],
    ) -> Array:  # fmt: skip
        """Project the inputs, append to the cache, attend to it, and project the result."""
        is_self = key is None
        query, key, value, _ = check_inputs(query, key, value, (self.embed_dim, self.kdim, self.vdim), self.dtype)
        if padding is not None:
            raise ValueError(
                "key_padding_mask must be None with a cache: say how many of the new keys are there with key_lengths=, "
                "and what may be attended to with mask=, about all cached keys or the newest (True = may attend)"
            )
        flat = query.ndim == key.ndim == value.ndim == 2
        q, k, v = self._project(query, key, value)
        if flat:
            q, k, v = q[None], k[None], v[None]
        turns = self._turns(positions, query.shape[:-1], key.shape[:-1], is_self)
        heads = attend(cache, ids, q, k, v, turns or self._rotation, options | {"backend": self.backend})
        out = linear(_features(heads), self._parameters["out_proj.weight"], self._parameters.get("out_proj.bias"))
        return out[0] if flat else out

    def _attend_packed(
        self, query: Array, padding: ArrayLike | None, cu_seqlens: ArrayLike, positions: Positions | None,
        options: dict[str, Any], return_lse: bool,
    ) -> Context:  # fmt: skip
        """Self-attention of packed sequences, laid end to end, up to the output of the heads."""
        inputs = query, None, None
        options["backend"] = self.backend
        query, key, value, _ = check_inputs(query, None, None, (self.embed_dim, self.kdim, self.vdim), self.dtype)
        if query.ndim != 2:
            raise ValueError(f"query must have shape (tokens, {self.embed_dim}) with cu_seqlens, got {query.shape}")
        if padding is not None:
            raise ValueError("key_padding_mask must be None with cu_seqlens, where there is no padding")
        q, k, v = self._project(query, key, value)
        starts = as_ints("cu_seqlens", cu_seqlens)
        turns = self._turns(positions, (len(query),), (len(query),), True)
        if turns is None and self._rotation is not None:
            if options["query_offset"] is not None:
                raise ValueError("query_offset must be None with cu_seqlens and rotary positions")
            # `attention_varlen` checks the offsets, and its errors name them.
            turns = packed_places(self._rotation, len(query), starts).turns(self.dtype)
        if turns is not None:
            q, k = turned(q, turns[0]), turned(k, turns[1])
        heads = np.empty((len(query), self.num_heads, self.head_dim), self.dtype)
        q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
        lse = None
        if return_lse:
            _, lse = attention_varlen(q, k, v, starts, starts, out=heads, return_lse=True, **options)
        else:
            attention_varlen(q, k, v, starts, starts, out=heads, **options)
        return Context(self, inputs, q, k, v, turns, heads, lse, options, starts)

    def _packed_gradients(self, grad: Array, ctx: Context, lse: Array, mod_grads: Any) -> Gradients:
        """Return the gradients of the heads of packed sequences, as (heads, T, E)."""
        assert ctx.starts is not None
        grads = attention_varlen_backward(
            grad, ctx.q, ctx.k, ctx.v, ctx.heads, lse, ctx.starts, ctx.starts, mod_grads=mod_grads, **ctx.options
        )
        q, k, v = (None if x is None else x.swapaxes(0, 1) for x in grads[:3])
        return grads._replace(query=q, key=k, value=v)

    def _result(self, ctx: Context | LazyContext, need_weights: bool, average_weights: bool) -> Any:
        """Project the joined heads to the result that the caller gets."""
        if isinstance(ctx, LazyContext):
            return ctx.result()
        out = linear(_features(ctx.heads), self._parameters["out_proj.weight"], self._parameters.get("out_proj.bias"))
        if not need_weights:
            return out
        if average_weights:
            return out, _averaged(ctx.q, ctx.k, ctx.options)
        return out, attention_weights(ctx.q, ctx.k, **ctx.options)

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

    def _runs(self, key_too: bool, value_too: bool) -> tuple[tuple[int, int], ...]:
        """Return the products of the input, each of the projections first .. last - 1.

        `key_too` says that key is the array query, and `value_too` that value is the array key.
        """
        return _RUNS[False, False] if self._packed is None else _RUNS[key_too, value_too]

    def _project(self, query: Array, key: Array, value: Array) -> list[Array]:
        """Return queries (..., H, L, E), keys and values (..., Hkv, S, E), as views of products with features last."""
        inputs, projected = (query, key, value), []
        for first, last in self._runs(key is query, value is key):
            heads = self._heads(linear(inputs[first], *self._joined(first, last)))
            projected += [heads[..., self._place(n, first), :, :] for n in range(first, last)]
        return projected

    def _joined_gradient(
        self, grads: Sequence[Array | None], turns: tuple[Turn, Turn] | None, first: int, rows: tuple[int, ...]
    ) -> Array:
        """Join gradients of heads (..., heads, n, E) to that of the product (*rows, features) they are views of.

        The copy cannot be avoided, because the features of a row must be contiguous.
        """
        count = self._place(first + len(grads) - 1, first).stop
        joined = np.empty((*rows, count * self.head_dim), self.dtype)
        heads = self._heads(joined)
        for n, grad in enumerate(grads, first):
            assert grad is not None
            own = heads[..., self._place(n, first), :, :]
            if turns is None or n == 2:
                own[...] = grad
            elif grad.shape == own.shape:
                rotate(grad, turns[n].back(), own)
            else:  # rows whose positions differ between sequences: see `turned`
                rotate(grad, turns[n].back(), grad)
                own[...] = sum_to(grad, own.shape)
        return joined

    def _turns(
        self, positions: Positions | None, of_queries: tuple[int, ...], of_keys: tuple[int, ...], is_self: bool
    ) -> Turns | None:
        """Return the turns at the positions of the caller, or None without any."""
        if positions is None:
            return None
        if self._rotation is None:
            raise ValueError("positions must be None for a layer without rotary=")
        return places_of(self._rotation, positions, of_queries, of_keys, is_self, self.dtype).turns(self.dtype)

    def _heads(self, features: Array) -> Array:
        """(..., L, heads * E) -> (..., heads, L, E)."""
        *rows, size = features.shape
        return features.reshape(*rows, size // self.head_dim, self.head_dim).swapaxes(-3, -2)


def _features(heads: Array) -> Array:
    """(..., L, heads, E) -> (..., L, heads * E)."""
    return heads.reshape(*heads.shape[:-2], heads.shape[-2] * heads.shape[-1])


def _gradients(grad: Array, x: Array, weight: Array, need_bias: bool) -> tuple[Array, Array, Array | None]:
    """Return the gradients of a projection."""
    x = without_idle_rows(x, grad)
    grad_x, grad_weight, grad_bias = linear_backward(grad, x, weight, need_bias)
    assert grad_x is not None
    return grad_x, grad_weight, grad_bias


def _averaged(query: Array, key: Array, options: dict[str, Any]) -> Array:
    """Return the mean of the probabilities over the heads, one head at a time: memory for two maps and not for H."""
    H = query.shape[-3]
    total = attention_weights(query, key, heads=[0], **options)
    for h in range(1, H):
        total += attention_weights(query, key, heads=[h], **options)
    total /= H
    mean: Array = total[..., 0, :, :]
    return mean


__all__ = ["MultiHeadAttention"]
