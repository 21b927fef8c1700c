"""Validation of packed calls: sequences laid end to end, their offsets and `Options` become a `Problem`."""

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..masks.blockmask import BlockMask
from ..options import Array, Gradients, Options
from ..validation import (
    arrays_among,
    as_bools,
    as_flag,
    as_floats,
    as_ints,
    as_ndarray,
    broadcast_to,
    check_like,
    check_out,
    lse_dtype_of,
)
from .dense import (
    BackwardProblem,
    Empty,
    Packing,
    Problem,
    Reduce,
    _operands,
    _resolve,
    as_mod_grads,
    of_options,
    widened,
)


def build(
    query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, options: Options, out: Any, return_lse: bool,
    empty: Empty = np.empty,
) -> Problem:  # fmt: skip
    """Validate one `attention_varlen` call and allocate its results."""
    q, k, v = _packed_operands(query, key, value)
    packing = _packing(cu_q, cu_k, q, k)
    shape = (q.shape[1], q.shape[0], v.shape[2])
    if out is None:
        full = out = empty(shape, q.dtype)
    else:
        full = check_out(out, shape, q.dtype, {"query": q, "key": k, "value": v} | arrays_among(options))
    lse = empty(q.shape[:2], lse_dtype_of(q)) if return_lse is not False and as_flag("return_lse", return_lse) else None
    return _problem(q, k, v, packing, options, full, lse, out)


def build_backward(
    grad_out: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, grad_lse: Any, cu_q: Any, cu_k: Any,
    mod_grads: Any, options: Options, empty: Empty = np.empty, wide: bool = False,
) -> BackwardProblem:  # fmt: skip
    """Validate one `attention_varlen_backward` call and allocate the gradients of query, key and value.

    With `wide`, those of half types are float32.
    """
    q, k, v = _packed_operands(query, key, value)
    packing = _packing(cu_q, cu_k, q, k)
    shape = (q.shape[1], q.shape[0], v.shape[2])
    out = check_like("out", out, shape, q.dtype)
    grad_out = check_like("grad_out", grad_out, shape, q.dtype)
    lse = check_like("lse", lse, q.shape[:2], lse_dtype_of(q))
    if grad_lse is not None:
        grad_lse = check_like("grad_lse", grad_lse, q.shape[:2], lse_dtype_of(q))
    problem = _problem(q, k, v, packing, options, out, lse, out)
    n = len(packing.query_rows)
    made = widened(empty) if wide else empty
    grads = made(query.shape, q.dtype), made(key.shape, q.dtype), made(value.shape, q.dtype)
    dq, dk, dv = (_over(x.swapaxes(0, 1), n) for x in grads)
    bias_shape = None if options.bias is None else _four(np.asarray(options.bias).shape)
    over_lse = None if grad_lse is None else _over(grad_lse, n)
    over_out = _over(grad_out.swapaxes(0, 1), n)
    # The gradients take the place of `inputs`: they have these shapes already, and no axis was broadcast.
    places = as_mod_grads(mod_grads, problem)
    return BackwardProblem(problem, over_out, over_lse, dq, dk, dv, bias_shape, grads, options, places, empty=empty)


def finish(p: BackwardProblem, reduce: Reduce) -> Gradients:
    """Give each gradient the shape and dtype of its input."""
    return Gradients(*p.inputs, *of_options(p, reduce))


def _packed_operands(query: Any, key: Any, value: Any) -> tuple[Array, Array, Array]:
    """Check query, key and value of shape (T, heads, features); return them as (heads, T, features)."""
    arrays = []
    for name, x in (("query", query), ("key", key), ("value", value)):
        array = as_ndarray(name, x)
        if array.ndim != 3:
            raise ValueError(f"{name} must have shape (tokens, heads, features), got {array.shape}")
        arrays.append(array.swapaxes(0, 1))
    q, k, v, _ = _operands(*arrays)
    return q, k, v


def _packing(cu_q: Any, cu_k: Any, q: Array, k: Array) -> Packing:
    of_queries, of_keys = offsets("cu_seqlens_q", cu_q, q.shape[1]), offsets("cu_seqlens_k", cu_k, k.shape[1])
    if len(of_queries) != len(of_keys):
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must be about the same sequences, "
            f"got {len(of_queries) - 1} and {len(of_keys) - 1}"
        )
    return Packing(of_queries[:-1], np.diff(of_queries), of_keys[:-1], np.diff(of_keys))


def offsets(name: str, x: Any, total: int) -> Array:
    """Check the offsets of packed sequences, with so many tokens in all."""
    array = as_ints(name, x)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} must have shape (sequences + 1,), got {array.shape}")
    if array[0] != 0 or array[-1] != total:
        raise ValueError(f"{name} must go from 0 to {total}, the number of tokens, got {array[0]} to {array[-1]}")
    falls = np.flatnonzero(np.diff(array) < 0)
    if falls.size:
        b = falls[0]
        raise ValueError(f"{name} must not decrease, got {array[b]} and then {array[b + 1]}")
    return array


def _over(array: Array, n: int) -> Array:
    """Return a view with a first axis of n sequences, which all see the whole array."""
    return as_strided(array.view(np.ndarray), (n, *array.shape), (0, *array.strides))


def _problem(
    q: Array, k: Array, v: Array, packing: Packing, options: Options, out: Array, lse: Array | None, result: Array
) -> Problem:
    n, L, S = len(packing.query_rows), *(int(x.max(initial=0)) for x in (packing.query_rows, packing.key_rows))
    q, k, v, full = (_over(x, n) for x in (q, k, v, out.swapaxes(0, 1)))
    lengths = options._replace(
        mask=None,
        bias=None,
        query_lengths=lengths_within("query_lengths", options.query_lengths, packing.query_rows),
        key_lengths=lengths_within("key_lengths", options.key_lengths, packing.key_rows),
        prefix_lengths=None
        if options.prefix_lengths is None
        else lengths_within("prefix_lengths", options.prefix_lengths, packing.key_rows),
    )
    p = _resolve(q, k, v, lengths, full, None if lse is None else _over(lse, n), result, lse, L, S)
    if isinstance(options.mask, BlockMask):
        p.blocks = _blocks_of_sequences(options.mask, p, packing)
    elif options.mask is not None:
        p.mask, in_mask = _over_tokens("mask", as_bools("mask", options.mask), p)
        packing = packing._replace(mask=in_mask)
    if options.bias is not None:
        p.bias, in_bias = _over_tokens("bias", as_floats("bias", options.bias), p)
        packing = packing._replace(bias=in_bias)
    p.packing = packing
    return p


def _blocks_of_sequences(mask: BlockMask, p: Problem, packing: Packing) -> BlockMask:
    """Return a block mask over sequences and heads, also of one over packed tokens."""
    tokens = p.H, p.query.shape[-2], p.key.shape[-2]
    longest = *p.batch, p.H, p.L, p.S
    if mask.fits(longest) or not mask.fits(tokens):
        return mask.fitting(
            longest, f", (sequences, heads, longest, longest), nor to {tokens}, (heads, tokens, tokens)"
        )
    return mask.of_sequences(packing.query_starts, packing.query_rows, packing.key_starts, packing.key_rows)


def lengths_within(name: str, lengths: Any, rows: Array) -> Array:
    """Check the valid length of each sequence; by default it is the number of its rows."""
    if lengths is None:
        return rows
    array = broadcast_to(name, as_ints(name, lengths), rows.shape)
    wrong = np.flatnonzero((array < 0) | (array > rows))
    if wrong.size:
        b = wrong[0]
        raise ValueError(
            f"{name} must lie between 0 and the length of each sequence, got {array[b]} for sequence {b} of {rows[b]}"
        )
    return array


def _four(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * (4 - len(shape)) + shape


def _over_tokens(name: str, array: Array, p: Problem) -> tuple[Array, tuple[bool, bool]]:
    """Broadcast a mask or bias over sequences and heads; also return whether its rows and columns are packed."""
    tokens = p.query.shape[-2], p.key.shape[-2]
    longest = p.L, p.S
    if array.ndim <= 4:
        array = array.reshape(_four(array.shape))
        last_axes = array.shape[-2:]
        packed = tuple(n not in (1, most) for n, most in zip(last_axes, longest, strict=True))
        fits = all(n in (1, most, total) for n, most, total in zip(last_axes, longest, tokens, strict=True))
        if fits and all(n in (1, most) for n, most in zip(array.shape[:2], (*p.batch, p.H), strict=True)):
            shape = (*p.batch, p.H, *(n if n != 1 else most for n, most in zip(last_axes, longest, strict=True)))
            # If one sequence has all tokens, the size of an axis fits both readings, and they mean the same.
            return np.broadcast_to(array, shape), (packed[0], packed[1])
    raise ValueError(
        f"{name} of shape {array.shape} broadcasts neither to {(*p.batch, p.H, *longest)}, "
        f"(sequences, heads, longest, longest), nor to {(p.H, *tokens)}, (heads, tokens, tokens)"
    )
