"""The public functions: signature, documentation, and a few lines that hand over to `problem` and a backend."""

from __future__ import annotations  # short types in help()

from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike

from . import backends, device_call
from .backends import recall
from .foreign import Family
from .merging import merge as _merge
from .merging import merge_backward as _merge_backward
from .options import Array, Gradients, OptionArguments, Options, check_names, gather, takes_options
from .problem.dense import Empty, build, build_backward, build_weights, finish

Index = ArrayLike | slice


@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    return_lse: Literal[False] = ...,
    out: Array | None = ...,
    backend: str | None = ...,
    **options: Unpack[OptionArguments],
) -> Array: ...
@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    return_lse: Literal[True],
    out: Array | None = ...,
    backend: str | None = ...,
    **options: Unpack[OptionArguments],
) -> tuple[Array, Array]: ...
@takes_options()
def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    return_lse: bool = False,
    out: Array | None = None,
    backend: str | None = None,
    **options: Unpack[OptionArguments],
) -> Array | tuple[Array, Array]:
    r"""Exact scaled dot-product attention, ``softmax(scale * query @ key.T + ...) @ value``, in linear memory.

    Parameters
    ----------
    query : ndarray, shape (..., H, L, E)
        float32, float64, float16 or ``ml_dtypes.bfloat16``. Two-dimensional input (L, E) is one head. An array on a
        GPU, of PyTorch, CuPy, JAX, Numba or with ``__cuda_array_interface__``, is taken as it is; so is the result.
        With a Dask array among the three, this is `numba_attention.dask.attention`.
        Leading dimensions broadcast with those of `key` and `value` as in `numpy.matmul`. Any strides are
        taken without a copy: pass ``x.swapaxes(-3, -2)`` for (B, S, H, E) storage.
    key : ndarray, shape (..., Hkv, S, E)
        dtype of `query`. H must be a multiple of Hkv (Hkv == H: multi-head, 1: multi-query,
        between: grouped-query attention; query head h reads key head ``h // (H // Hkv)``).
    value : ndarray, shape (..., Hkv, S, Ev)
        dtype of `query`; Ev may differ from E.
    mask : array of bool, broadcastable to (..., H, L, S), or BlockMask, optional
        True where a query may attend to a key. A `BlockMask` is stored by tiles, and hidden ones take no time.
    bias : array of float, broadcastable to (..., H, L, S), optional
        Added to the scaled scores. -inf hides a key exactly as a False in `mask` does.
    is_causal : bool or {"top-left", "bottom-right"}, default False
        True or "top-left": query i sits at key position i; "bottom-right": at
        ``i + (key length - query length)`` of its sequence. It attends to keys at or before its position.
    window : (left, right), optional
        Query at position p attends to key positions p-left .. p+right inclusive; None on a side is unbounded.
    query_offset : int or array of int, shape (...,), optional
        Query i sits at key position ``i + query_offset``, whatever `is_causal` says of alignment.
    scale : float, optional
        Factor of the scores, by default ``1 / sqrt(E)``.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)``; must be positive.
    alibi_slopes : array of float, shape (H,) or (..., H), optional
        Adds ``-slope * |position(i) - j|``.
    sinks : array of float, shape (H,), optional
        One extra logit per head that takes part in the softmax denominator only. Finite slopes and sinks beyond ln(2)
        times the largest number of the compute type, 2.36e38 in float32, count as that number.
    query_lengths, key_lengths : int or array of int, shape (...,), optional
        Valid prefix of each sequence; rows past the query length are 0 with lse = -inf.
    prefix_lengths : int or array of int, shape (...,), optional
        So many first keys of each sequence are seen by all of its rows, however `is_causal` or a window is bounded on
        the right: a prefix language model. Not beside a window that is bounded on the left.
    score_mod : function, optional
        ``score_mod(score, batch, head, i, j, *mod_args)`` returns what takes the place of a score: a Python function,
        plain or compiled by `numba.njit`, that is read from its source and runs as vector code. i is the position of
        the query (its row and the offset, within its sequence when packed), j that of the key, and batch the number of
        the sequence, row by row over the leading dimensions. -inf hides the key. The page "Mods" says what such
        functions may contain, and `numba_attention.mods` has some.
    mask_mod : function, optional
        ``mask_mod(batch, head, i, j, *mod_args)`` returns whether a query may attend to a key.
    mod_args : tuple of arrays and numbers, optional
        What both functions are called with after j: arrays of bool, int32, int64, float32 or float64.
    dropout_p : float, default 0.0
        Each weight becomes 0 with this probability, at least 0 and less than 1, in steps of 2**-16; the others are
        divided by the probability of being kept. `lse` and the denominator of the softmax are those without dropout.
    seed : int, optional
        Chooses which weights are dropped, 0 <= seed < 2**64; needed where `dropout_p` is positive. The same seed drops
        the same weights in every function, dtype and backend: they follow from the seed, the sequence (its row-major
        index over the leading dimensions, or its number in a packed batch), the query head, the position of the query
        (its row plus `query_offset` or what `is_causal` says) and the key.
    return_lse : bool, default False
        Also return the natural log of the softmax denominator of each row.
    out : ndarray, shape (..., H, L, Ev), optional
        Array for the result: dtype of `query`, writeable, no overlap with an input.
    backend : {"auto", "cpu", "cuda", "reference"}, optional
        Overrides `set_backend` and `use_backend` for this call.

    Returns
    -------
    out : ndarray, shape (..., H, L, Ev)
        dtype of `query`. A row that may attend to nothing is 0.
    lse : ndarray, shape (..., H, L)
        Only if `return_lse`: float32 (float64 for float64 input), sink included, -inf for empty rows.

    Raises
    ------
    TypeError
        An argument has a dtype or type that cannot be taken; the message says how to convert it.
    ValueError
        A shape, length or option is out of range; the message names the argument and what was expected.
    BackendUnavailableError
        The backend that was asked for cannot run here.

    See Also
    --------
    attention_weights : the probabilities themselves.
    merge_attention : join results over disjoint sets of keys.

    Notes
    -----
    Scores pass through scale, softcap, `score_mod`, ALiBi, bias, mask and `mask_mod` in this order. Time is
    O(H L S (E + Ev)) for the visible pairs only, and extra memory is O(threads x tile). Half types accumulate in
    float32. The result has the same bits for any number of threads and for a sequence alone or in a batch. NaN or
    infinity in a key or value reaches the rows that attend to it and no other.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, section 3.2.
    .. [2] Dao, "FlashAttention-2", 2023, algorithm 1.
    .. [3] Press et al., "Train Short, Test Long" (ALiBi), 2022, section 3.
    .. [4] Ainslie et al., "GQA", 2023, section 2.2.
    .. [5] Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2024, section 3.
    .. [6] Srivastava et al., "Dropout", 2014, and Salmon et al., "Parallel random numbers" (Philox), 2011.

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((2, 8, 100, 64), dtype=np.float32) for _ in range(3))
    >>> out, lse = na.attention(q, k, v, is_causal=True, return_lse=True)
    >>> out.shape, lse.shape
    ((2, 8, 100, 64), (2, 8, 100))
    >>> bool(np.allclose(out[..., 0, :], v[..., 0, :], atol=1e-6))  # the first query sees the first key only
    True
    """
    again = backend is None and type(query) is np.ndarray and backends.is_host_default()
    if again:
        known = recall.forward(query, key, value, options, return_lse, out=out)
        if known is not None:
            return known
    check_names(attention, options)
    chosen = backends.select(backend, query, key, value)
    if chosen.on_device:
        if isinstance(chosen, Family):
            operands = {"query": query, "key": key, "value": value, "return_lse": return_lse, "backend": backend}
            result: Array | tuple[Array, Array] = chosen.call(attention, operands | {"out": out}, options)
            return result
        operands = {"query": query, "key": key, "value": value}
        return device_call.run(_attention, chosen, operands, options, entry=attention, out=out, return_lse=return_lse)
    settings = gather(attention, options)
    return _attention(chosen, query, key, value, settings, return_lse, out, again=again)


def _attention(
    chosen: backends.Backend, query: Array, key: Array, value: Array, options: Options, return_lse: bool,
    out: Array | None = None, empty: Empty = np.empty, again: bool = False,
) -> Array | tuple[Array, Array]:  # fmt: skip
    problem = build(query, key, value, options, out, return_lse, empty)
    chosen.forward(problem)
    if again and problem.plan is not None:
        recall.learn_forward(query, key, value, options, problem, out=out)
    if problem.result_lse is None:
        return problem.result
    return problem.result, problem.result_lse


@takes_options()
def attention_backward(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array,
    *,
    grad_lse: Array | None = None,
    mod_grads: ArrayLike | Literal["all"] | None = None,
    backend: str | None = None,
    **options: Unpack[OptionArguments],
) -> Gradients:
    r"""Gradients of `attention` with respect to its inputs, in linear memory.

    Parameters
    ----------
    grad_out : ndarray, shape (..., H, L, Ev)
        Gradient of some loss with respect to `out`, in the dtype of `query`.
    query, key, value : ndarray
        What `attention` was called with.
    out, lse : ndarray, shape (..., H, L, Ev) and (..., H, L)
        What it returned, with ``return_lse=True``.
    grad_lse : ndarray, shape (..., H, L), optional
        Gradient of the loss with respect to `lse`, where `lse` was used too (`merge_attention`, a z-loss).
    mod_grads : "all" or int or sequence of int, optional
        Which arrays in `mod_args` get a gradient: those that their indices say, or all of floating point.
    **options
        What `attention` was called with.
    backend : {"auto", "cpu", "cuda", "reference"}, optional
        As in `attention`.

    Returns
    -------
    Gradients
        Named tuple (query, key, value, bias, sinks, mod_args), each of the shape and dtype of its input, summed over
        the axes along which it was broadcast and over query heads that share a key/value head. `bias` and `sinks` are
        None if they were not given, and `mod_args` without `mod_grads`: else it is a tuple, with None for what has no
        gradient. A row that may attend to nothing has, and gives, the gradient 0.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As in `attention`; the message names the argument.
    NotImplementedError
        `mod_grads` on the backend "cuda" where NUMBA_ATTENTION_DETERMINISTIC is set.

    See Also
    --------
    attention : the function that is differentiated.
    merge_attention_backward : the same for `merge_attention`.

    Notes
    -----
    With ``D = rowsum(dO * O) - dlse`` the gradients are ``dV = P.T dO``, ``dS = P * (dO V.T - D)``, ``dQ = scale dS K``
    and ``dK = scale dS.T Q``. The probabilities ``P = exp(S - lse)`` are computed again, tile by tile: extra memory is
    O(L + S) features a thread, never L x S, for every option; only the gradient of a bias is as large as the bias.
    Results have the same bits for any number of threads.

    If `out` and `lse` were merged from several sets of keys, calling this with one of the sets gives the gradients of
    that set and its part of the gradient of the queries.

    References
    ----------
    .. [1] Dao et al., "FlashAttention", 2022, appendix B.2.
    .. [2] Dao, "FlashAttention-2", 2023, algorithm 2.

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((2, 8, 100, 64), dtype=np.float32) for _ in range(3))
    >>> out, lse = na.attention(q, k, v, is_causal=True, return_lse=True)
    >>> grads = na.attention_backward(np.ones_like(out), q, k, v, out, lse, is_causal=True)
    >>> grads.key.shape
    (2, 8, 100, 64)
    >>> bool(np.allclose(grads.value.sum(-2), 100, rtol=1e-4))  # the weights of each query sum to 1
    True
    """
    again = grad_lse is None and mod_grads is None and backend is None and type(query) is np.ndarray
    again = again and backends.is_host_default()
    if again:
        known = recall.backward(grad_out, query, key, value, out, lse, options)
        if known is not None:
            return known
    check_names(attention_backward, options)
    chosen = backends.select(backend, query, key, value, grad_out)
    if chosen.on_device:
        if isinstance(chosen, Family):
            operands = {
                "query": query, "key": key, "value": value, "grad_out": grad_out, "out": out, "lse": lse,
                "grad_lse": grad_lse, "mod_grads": mod_grads, "backend": backend,
            }  # fmt: skip
            gradients: Gradients = chosen.call(attention_backward, operands, options)
            return gradients
        operands = {
            "query": query, "key": key, "value": value, "out": out, "lse": lse, "grad_out": grad_out,
            "grad_lse": grad_lse,
        }  # fmt: skip
        return device_call.run(
            _attention_backward, chosen, operands, options, entry=attention_backward, mod_grads=mod_grads
        )
    settings = gather(attention_backward, options)
    return _attention_backward(
        chosen, query, key, value, out, lse, grad_out, grad_lse, mod_grads, settings, again=again
    )


def _attention_backward(
    chosen: backends.Backend, query: Array, key: Array, value: Array, out: Array, lse: Array, grad_out: Array,
    grad_lse: Array | None, mod_grads: Any, options: Options, empty: Empty = np.empty, again: bool = False,
) -> Gradients:  # fmt: skip
    problem = build_backward(grad_out, query, key, value, out, lse, grad_lse, mod_grads, options, empty)
    chosen.backward(problem)
    if again and problem.plan is not None:
        recall.learn_backward(grad_out, query, key, value, out, lse, options, problem)
    return finish(problem, chosen.reduce)


@takes_options()
def attention_weights(
    query: Array,
    key: Array,
    *,
    heads: Index | None = None,
    rows: Index | None = None,
    backend: str | None = None,
    **options: Unpack[OptionArguments],
) -> Array:
    """Attention probabilities, the softmax of the scores that `attention` weights the values with.

    Parameters
    ----------
    query : ndarray, shape (..., H, L, E)
    key : ndarray, shape (..., Hkv, S, E)
    heads, rows : int array, slice or bool array, optional
        Compute these query heads and these query rows only, so that chosen maps cost no L x S memory.
        They index the H and L axes as NumPy does; an integer array keeps its axis.
    **options
        As in `attention`, and broadcast against the full (..., H, L, S).
    backend : {"auto", "cpu", "cuda", "reference"}, optional
        As in `attention`.

    Returns
    -------
    weights : ndarray, shape (..., H, L, S)
        dtype of `query`; H and L are those selected. Rows sum to 1 (to less with a sink), empty rows are 0.

    Raises
    ------
    TypeError, ValueError, IndexError
        As in `attention`; IndexError for `heads` or `rows` out of range.

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, equation 1.

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> q = np.eye(4, dtype=np.float32)
    >>> na.attention_weights(q, q, is_causal=True, rows=[0, 1]).round(3)
    array([[1.   , 0.   , 0.   , 0.   ],
           [0.378, 0.622, 0.   , 0.   ]], dtype=float32)
    """
    settings = gather(attention_weights, options)
    chosen = backends.select(backend, query, key)
    if chosen.on_device:
        if isinstance(chosen, Family):
            operands = {"query": query, "key": key, "heads": heads, "rows": rows, "backend": backend}
            weights: Array = chosen.call(attention_weights, operands, options)
            return weights
        small = {"heads": heads, "rows": rows}
        return device_call.run(_attention_weights, chosen, {"query": query, "key": key}, settings, small=small)
    return _attention_weights(chosen, query, key, heads, rows, settings)


def _attention_weights(
    chosen: backends.Backend, query: Array, key: Array, heads: Any, rows: Any, options: Options,
    empty: Empty = np.empty,
) -> Array:  # fmt: skip
    problem = build_weights(query, key, options, heads, rows, empty)
    chosen.weights(problem)
    return problem.result


def merge_attention(
    outs: Sequence[Array] | Array, lses: Sequence[Array] | Array, *, packed: bool | None = None
) -> tuple[Array, Array]:
    """Join attention results over disjoint sets of keys into the result over their union, exactly.

    Parameters
    ----------
    outs : sequence of n arrays, or one stacked array, each shape (..., L, Ev)
        Outputs of `attention` for the same queries.
    lses : sequence of n arrays, or one stacked array, each shape (..., L)
        Their log-sum-exps, as `return_lse` gives them.
    packed : bool, optional
        Whether these are results of `attention_varlen`, each of shape (T, H, Ev) and (H, T). By default the shapes
        tell. Pass True if there are as many tokens as heads, where both readings fit and (L, Ev) of each head is meant.

    Returns
    -------
    out : ndarray, shape (..., L, Ev)
        dtype of `outs`.
    lse : ndarray, shape (..., L)
        float32, or float64 if `lses` is.

    Raises
    ------
    TypeError, ValueError
        Different numbers of outputs and lses, none at all, or shapes and dtypes that do not match.

    Notes
    -----
    ``lse = log(sum(exp(lse_n)))`` and ``out = sum(exp(lse_n - lse) out_n)``: the (max, denominator, output)
    state of a row is a monoid, with lse = -inf as its identity. Sinks, if any, must be given to one of the parts only.

    References
    ----------
    .. [1] Dao et al., "FlashAttention", 2022, section 3.1 (softmax decomposed over blocks).

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((10, 8)) for _ in range(3))
    >>> parts = [na.attention(q, k[s], v[s], return_lse=True) for s in (slice(0, 3), slice(3, 10))]
    >>> out, lse = na.merge_attention(*zip(*parts))
    >>> bool(np.allclose(out, na.attention(q, k, v)))
    True
    """
    return _merge(outs, lses, packed)


def merge_attention_backward(
    grad_out: Array,
    grad_lse: Array | None,
    outs: Sequence[Array] | Array,
    lses: Sequence[Array] | Array,
    *,
    packed: bool | None = None,
) -> tuple[list[Array], list[Array]]:
    """Gradients of `merge_attention` with respect to its parts.

    Parameters
    ----------
    grad_out : ndarray, shape (..., L, Ev)
        Gradient of some loss with respect to the merged output, in the dtype of `outs`.
    grad_lse : ndarray, shape (..., L), or None
        Gradient with respect to the merged lse, in the dtype of `lses`; None where that was not used.
    outs, lses, packed
        What `merge_attention` was called with.

    Returns
    -------
    grad_outs, grad_lses : list of n ndarrays
        Of the shapes and dtypes of the parts; pass them on to `attention_backward` as `grad_out` and `grad_lse`.
        An empty part (lse = -inf) gets 0.

    Raises
    ------
    TypeError, ValueError
        As in `merge_attention`, and for gradients that do not match the parts.

    Notes
    -----
    With ``w_n = exp(lse_n - lse)``, ``d out_n = w_n dO`` and
    ``d lse_n = w_n (rowsum(dO * (out_n - out)) + dlse)``.

    References
    ----------
    .. [1] Dao et al., "FlashAttention", 2022, section 3.1 (the decomposition that is differentiated).

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> rng = np.random.default_rng(0)
    >>> outs, lses = rng.standard_normal((2, 5, 8)), rng.standard_normal((2, 5))
    >>> grad_outs, grad_lses = na.merge_attention_backward(np.ones((5, 8)), None, outs, lses)
    >>> bool(np.allclose(sum(grad_outs), 1)), bool(np.allclose(sum(grad_lses), 0))
    (True, True)
    """
    return _merge_backward(grad_out, grad_lse, outs, lses, packed)


__all__ = ["attention", "attention_backward", "attention_weights", "merge_attention", "merge_attention_backward"]
