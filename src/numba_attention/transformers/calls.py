"""One call of attention by a Hugging Face model, on arrays: what its mask means, the options that say so, gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..api import attention, attention_backward, attention_weights
from ..options import Array
from ..varlen import attention_varlen, attention_varlen_backward
from .masks import HEADER, UNBOUNDED


class Call(NamedTuple):
    """Which keys are read, and with which options; or which packed sequences there are."""

    keys: slice
    options: dict[str, Any]
    starts: Array | None = None  # of sequences along the flattened (batch, position) axis


def call_of(mask: Array | None, B: int, L: int, S: int, *, causal: bool, packable: bool) -> Call:
    """Turn a mask (`masks`: numbers or truth values; or None) into options of `attention`.

    Parameters
    ----------
    mask : ndarray, shape (batch, 1, 1, 3 + n) of int32, or (batch or 1, heads or 1, L, S) of bool, or None
    B, L, S : int
        Numbers of sequences, queries and keys.
    causal : bool
        Whether query i sees the keys up to i, where there is no mask.
    packable : bool
        Whether documents may become packed sequences, to which no bias applies.

    Raises
    ------
    ValueError
        The numbers are not the same for every sequence of the batch.
    """
    if mask is None:
        return Call(slice(0, S), {"is_causal": True} if causal else {})
    if mask.dtype == np.bool_:
        return Call(slice(0, S), {"mask": mask})
    offset, left, right, labels = _read(mask)
    if labels.shape[1] and L == 1:  # of several documents, one query sees its own
        own = labels[:, min(max(offset, 0), S - 1), None]
        labels = (labels == own) & (labels != 0) & (own != 0) if _documents(labels) else labels != 0
    elif labels.shape[1] and _documents(labels):
        labels = np.broadcast_to(labels, (B, S))
        starts = _starts(labels) if packable and L == S and offset == 0 else None
        if starts is None:
            return Call(slice(0, S), {"mask": dense(mask, L, S)})
        flat = labels.reshape(-1)
        lengths = np.where(flat[starts[:-1]] == 0, 0, np.diff(starts))
        hidden = {"key_lengths": lengths} if not lengths.all() else {}
        return Call(slice(0, S), _band(left, right, 0, S, S) | hidden, starts)
    # Keys that no query sees are not passed on: with one query, the whole mask is then a slice.
    first = 0 if left == UNBOUNDED else max(0, offset - left)
    stop = S if right == UNBOUNDED else max(first, min(S, offset + L + right))
    seen = labels[:, first:stop] != 0
    options: dict[str, Any] = {}
    if seen.size:
        of_any = np.flatnonzero(seen.any(axis=0))
        begin, end = (int(of_any[0]), int(of_any[-1]) + 1) if of_any.size else (0, 0)
        seen, first, stop = seen[:, begin:end], first + begin, first + end
        counts = np.count_nonzero(seen, axis=1)
        if counts.size and (seen[:, 1:] <= seen[:, :-1]).all():
            if (counts < end - begin).any():
                options["key_lengths"] = counts
        else:
            options["mask"] = np.ascontiguousarray(seen)[:, None, None]
    return Call(slice(first, stop), options | _band(left, right, offset - first, L, stop - first))


def dense(mask: Array, L: int, S: int) -> Array:
    """Return the truth values (batch, 1, L, S) that a mask of numbers stands for."""
    offset, left, right, labels = _read(mask)
    at = np.arange(L)[:, None] + offset
    gap = at - np.arange(S)
    seen = np.ones((L, S), bool)
    if left != UNBOUNDED:
        seen &= gap <= left
    if right != UNBOUNDED:
        seen &= -gap <= right
    if not labels.shape[1]:
        return seen[None, None]
    whole = seen & (labels != 0)[:, None]
    if _documents(labels):
        whole &= labels[:, np.clip(at[:, 0], 0, S - 1), None] == labels[:, None]
    result: Array = whole[:, None]
    return result


def forward(call: Call, query: Array, key: Array, value: Array, options: dict[str, Any]) -> tuple[Array, Array]:
    """Return the output (batch, L, H, Ev), as models want it, and the log-sum-exp."""
    B, H, L, _ = query.shape
    out = np.empty((B, L, H, value.shape[-1]), query.dtype)
    options = options | call.options
    if call.starts is None:
        key, value, options = _shown(call, key, value, options)
        return out, attention(query, key, value, out=out.swapaxes(1, 2), return_lse=True, **options)[1]
    packed = out.reshape(B * L, H, -1)
    q, k, v = (_pack(x) for x in (query, key, value))
    lse = attention_varlen(q, k, v, call.starts, call.starts, out=packed, return_lse=True, **options)[1]
    return out, np.ascontiguousarray(lse.reshape(H, B, L).swapaxes(0, 1))


def backward(
    call: Call, grad: Array, query: Array, key: Array, value: Array, out: Array, lse: Array, options: dict[str, Any]
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Return the gradients of query, key, value, bias and sinks; `grad` and `out` are (batch, L, H, Ev)."""
    B, L, H, Ev = out.shape
    options = options | call.options
    if call.starts is not None:
        q, k, v = (_pack(x) for x in (query, key, value))
        flat_grad, flat_out = (x.reshape(B * L, H, Ev) for x in (grad, out))
        flat_lse = lse.swapaxes(0, 1).reshape(H, B * L)
        grads = attention_varlen_backward(flat_grad, q, k, v, flat_out, flat_lse, call.starts, call.starts, **options)
        of = [x.reshape(B, L, *x.shape[1:]).swapaxes(1, 2) for x in grads[:3] if x is not None]
        return (*map(np.ascontiguousarray, of), grads.bias, grads.sinks)  # type: ignore[return-value]
    k, v, of_keys = _shown(call, key, value, options)
    grads = attention_backward(grad.swapaxes(1, 2), query, k, v, out.swapaxes(1, 2), lse, **of_keys)
    assert grads.query is not None
    assert grads.key is not None
    assert grads.value is not None
    at = call.keys, slice(None)
    of_bias = grads.bias if grads.bias is None else _whole(grads.bias, options["bias"].shape, at[:1])
    return (
        grads.query, _whole(grads.key, key.shape, at), _whole(grads.value, value.shape, at), of_bias, grads.sinks
    )  # fmt: skip


def _shown(call: Call, key: Array, value: Array, options: dict[str, Any]) -> tuple[Array, Array, dict[str, Any]]:
    """Return the keys and values that a call reads, and the options with their columns of the bias."""
    bias = options.get("bias")
    if bias is not None and bias.ndim and bias.shape[-1] != 1:
        options = options | {"bias": bias[..., call.keys]}
    return key[..., call.keys, :], value[..., call.keys, :], options


def _whole(grad: Array, shape: tuple[int, ...], at: tuple[Any, ...]) -> Array:
    """Return a gradient of a part of an array as that of the array."""
    if grad.shape == shape:
        return grad
    whole: Array = np.zeros(shape, grad.dtype)
    whole[(Ellipsis, *at)] = grad
    return whole


def weights(mask: Array | None, query: Array, key: Array, causal: bool, options: dict[str, Any]) -> Array:
    """Return the probabilities (batch, H, L, S)."""
    B, H, L, _ = query.shape
    S = key.shape[-2]
    call = call_of(mask, B, L, S, causal=causal, packable=False)
    # The same keys as in `forward`, because the number of a key decides which weights are dropped.
    some, _, of_keys = _shown(call, key, key, options | call.options)
    return _whole(attention_weights(query, some, **of_keys), (B, H, L, S), (call.keys,))


def _band(left: int, right: int, offset: int, L: int, S: int) -> dict[str, Any]:
    """Return the window of L queries from position `offset` on over S keys, without bounds that hide nothing."""
    before = left if left != UNBOUNDED and offset + L - 1 > left else None
    after = right if right != UNBOUNDED and offset + right < S - 1 else None
    if before is None and after is None:
        return {}
    if before is None and after == 0 and offset == 0:
        return {"is_causal": True}
    return {"window": (before, after)} | ({"query_offset": offset} if offset else {})


def _read(mask: Array) -> tuple[int, int, int, Array]:
    """Return offset, left and right of a mask of numbers, and its labels (batch, n)."""
    rows = mask[:, 0, 0]
    if (rows[1:, :HEADER] != rows[:1, :HEADER]).any():
        raise ValueError("attention_mask must have the same offset and window for every sequence of the batch")
    offset, left, right = (int(n) for n in rows[0, :HEADER])
    return offset, left, right, rows[:, HEADER:]


def _documents(labels: Array) -> bool:
    """Whether some sequence has keys of two different labels."""
    least = np.where(labels != 0, labels, np.iinfo(labels.dtype).max).min(axis=1)
    return bool((labels.max(axis=1) > least).any())


def _starts(labels: Array) -> Array | None:
    """Return where documents begin along the flattened axis, or None if one goes on after another began."""
    B, S = labels.shape
    begins = np.ones((B, S), bool)
    begins[:, 1:] = labels[:, 1:] != labels[:, :-1]
    starts = np.flatnonzero(begins)
    numbers, rows = labels.reshape(-1)[starts], starts // S
    numbers, rows = numbers[numbers != 0], rows[numbers != 0]
    if ((np.diff(numbers) <= 0) & (np.diff(rows) == 0)).any():
        return None
    return np.append(starts, B * S)


def _pack(x: Array) -> Array:
    """(batch, heads, L, E) -> (batch * L, heads, E)."""
    B, heads, L, E = x.shape
    return x.swapaxes(1, 2).reshape(B * L, heads, E)
