"""Validation of dense calls: arrays and `Options` become a `Problem`. The checks themselves are in `validation`."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..caches.contents import Contents
from ..masks.blockmask import BlockMask
from ..mods.rules import as_arguments, plain
from ..narrowing import largest_computed
from ..options import NO_OPTIONS, Array, Gradients, Options
from ..validation import (
    arrays_among,
    as_bools,
    as_few_floats,
    as_flag,
    as_floats,
    as_index,
    as_ints,
    as_real,
    as_seed,
    as_tensor,
    as_window,
    broadcast_batch,
    broadcast_to,
    check_like,
    check_out,
    is_bottom_right,
    lengths_within,
    lse_dtype_of,
    scale_of,
)

_F32, _F64, _F16 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16)


class Empty(Protocol):
    """A function that allocates results: `numpy.empty`, or that of a device."""

    def __call__(self, shape: tuple[int, ...], dtype: Any, /) -> Array:
        """Allocate an uninitialised array."""


def widened(empty: Empty) -> Empty:
    """Return a function that allocates results in float32 in place of a half type: kernels do not round them then.

    Parts of a result that are merged or added up later are rounded once, at the end.
    """

    def wide_empty(shape: tuple[int, ...], dtype: Any, /) -> Array:
        return empty(shape, np.dtype(np.float32) if np.dtype(dtype).itemsize == 2 else dtype)

    return wide_empty


class Reduce(Protocol):
    """A function that sums gradients over broadcast axes: `sum_to`, or that of a device."""

    def __call__(self, x: Array, shape: tuple[int, ...], dtype: Any, empty: Empty, /) -> Array:
        """Sum over the axes along which `shape` was broadcast to that of x, and convert to `dtype`."""


class Packing(NamedTuple):
    """The places of the sequences of a packed problem, whose arrays contain all sequences along the row axis."""

    query_starts: Array  # int64 (n,)
    query_rows: Array
    key_starts: Array
    key_rows: Array
    # Whether the rows and the columns of mask and bias are those of the packed arrays, or else of each sequence.
    mask: tuple[bool, bool] = (False, False)
    bias: tuple[bool, bool] = (False, False)


class Number(NamedTuple):
    """A number of each sequence: its field in the record that kernels read, and its field in `Problem`."""

    record: str
    problem: str
    default: str | int  # if it is None: a number for all sequences, or the name of a field of `Problem`


NUMBERS = (
    Number("queries", "query_lengths", "L"),
    Number("keys", "key_lengths", "S"),
    Number("offset", "offset", 0),
    Number("prefix", "prefix_lengths", 0),
)


class Origin(NamedTuple):
    """Where a problem lies in a larger one of which it is a block: dropout and mods count from the beginning of that.

    Positions are relative to keys: what is added to the numbers of the keys is added to positions too.
    """

    sequence: Array | int = 0  # numbers of the sequences, flat, or that of the first
    head: int = 0  # number of the first query head
    key: int = 0  # number of the first key; a multiple of `philox.BLOCK` with dropout

    def numbers(self, n: int) -> Array:
        """Return the numbers of the n sequences."""
        return self.sequence + np.arange(n) if isinstance(self.sequence, int) else self.sequence


WHOLE = Origin()


@dataclass(slots=True)
class Problem:
    """One validated attention call. Every array is broadcast to the full batch and strided, never copied.

    Query row i of a sequence sits at key position p = i + offset. It may attend to key j when
    p - left <= j <= p + right (None: unbounded) or j < prefix length, i < query length, j < key length, and mask,
    blocks and bias allow it.
    """

    query: Array  # (*batch, H, L, E)
    key: Array  # (*batch, Hkv, S, E)
    value: Array  # (*batch, Hkv, S, Ev)
    out: Array  # (*batch, H, L, Ev), to be written; dtype of query, or float32 for a half type: see `widened`
    lse: Array | None  # (*batch, H, L), float32 (float64 for float64 input), to be written if not None
    result: Array  # `out` as the caller sees it: without the head axis if every input was 2-D
    result_lse: Array | None
    batch: tuple[int, ...]
    H: int
    Hkv: int
    L: int
    S: int
    E: int
    Ev: int
    scale: float
    softcap: float | None = None
    left: int | None = None  # window and causality folded into one pair
    right: int | None = None
    offset: Array | int = 0  # int64 (*batch) or one number for all
    query_lengths: Array | None = None  # int64 (*batch)
    key_lengths: Array | None = None  # int64 (*batch)
    prefix_lengths: Array | None = None  # int64 (*batch)
    alibi_slopes: Array | None = None  # float64 (*batch, H)
    sinks: Array | None = None  # float64 (H,)
    bias: Array | None = None  # (*batch, H, L, S), any supported float dtype, -inf hides
    mask: Array | None = None  # bool (*batch, H, L, S), True = may attend
    blocks: BlockMask | None = None  # the same by blocks, of a shape that broadcasts to (*batch, H, L, S)
    score_mod: Any = None  # functions as the caller passed them
    mask_mod: Any = None
    mod_args: tuple[Any, ...] = ()  # contiguous arrays and Python numbers
    dropout: int = 0  # weights whose 16 random bits are below it are dropped: see `philox`
    seed: int = 0  # the key of the random bits, as a signed number of 64 bits
    origin: Origin = WHOLE  # of a part of another problem
    # attention_weights only: out is (*batch, len(heads), len(rows), S) and value is key, unused.
    heads: Array | None = None  # int64, chosen query heads
    rows: Array | None = None  # int64, chosen query rows
    # attention_varlen only: batch is (n,), every array covers all sequences, L and S are the largest, lengths given.
    packing: Packing | None = None
    cache: Contents | None = None  # attention_decode only: key and value are what it stores, S is the longest length
    plan: Any = None  # set by the CPU backend, if it had a plan for such a call: see `backends.recall`

    @property
    def visited(self) -> int:
        """Return the largest number of keys that a tile of 64 query rows visits, which a window bounds."""
        if self.left is None or self.right is None:
            return self.S
        return min(self.S, self.left + self.right + 64)


@dataclass(slots=True)
class BackwardProblem:
    """One validated `attention_backward` call: the forward problem, whose out and lse are inputs, and the gradients.

    `query`, `key` and `value` cover the full batch; `finish` sums what was broadcast.
    """

    forward: Problem  # its lse is not None
    grad_out: Array  # (*batch, H, L, Ev)
    grad_lse: Array | None  # (*batch, H, L), dtype of lse
    query: Array  # gradients, to be written
    key: Array
    value: Array
    bias_shape: tuple[int, ...] | None  # shape of the caller's bias, with axes of size 1 in front
    inputs: tuple[Array, Array, Array]  # query, key, value as the caller passed them
    options: Options
    mod_grads: tuple[int, ...] | None = None  # which of mod_args gradients are wanted of
    mod_args: list[Array] | None = None  # these gradients, made by the backend: of their shapes, in float64
    bias: Array | None = None  # gradient, allocated by the backend: of bias_shape, in its precision
    sinks: Array | None = None  # gradient, allocated by the backend if the problem has sinks: (H,), in its precision
    empty: Empty = np.empty  # allocates results
    dtype: Any = None  # of the results; that of `query`, `key` and `value` too, if none of them is summed by `finish`
    plan: Any = None  # as of `Problem`


def _operands(query: Any, key: Any, value: Any) -> tuple[Array, Array, Array, bool]:
    """Check query, key and value together; return them broadcast to one batch, and whether all were matrices."""
    q, k, v = as_tensor("query", query), as_tensor("key", key), as_tensor("value", value)
    if not (q.dtype is k.dtype is v.dtype or q.dtype == k.dtype == v.dtype):
        raise TypeError(f"query, key and value must share one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    _, _, _, Hkv, S = _sizes(q, k)
    if v.shape[-3] != Hkv or v.shape[-2] != S:
        raise ValueError(
            f"value must have the heads and length of key, (..., {Hkv}, {S}, Ev), got value of shape {v.shape}"
        )
    batch = q.shape[:-3]
    if not batch == k.shape[:-3] == v.shape[:-3]:
        batch = broadcast_batch({"query": batch, "key": k.shape[:-3], "value": v.shape[:-3]})
        q, k, v = (np.broadcast_to(x, batch + x.shape[-3:]) for x in (q, k, v))
    return q, k, v, query.ndim == key.ndim == value.ndim == 2


def _resolve(
    q: Array, k: Array, v: Array, options: Options, out: Array, lse: Array | None, result: Array, result_lse: Any,
    L: int | None = None, S: int | None = None,
) -> Problem:  # fmt: skip
    """Join operands, results and options in a problem."""
    H, rows, E = q.shape[-3:]
    Hkv, columns, Ev = v.shape[-3:]
    L, S = rows if L is None else L, columns if S is None else S
    scale = scale_of(options.scale, E, q.dtype)
    problem = Problem(q, k, v, out, lse, result, result_lse, q.shape[:-3], H, Hkv, L, S, E, Ev, scale)
    if options is not NO_OPTIONS:
        _apply(problem, options)
    return problem


def build(
    query: Any, key: Any, value: Any, options: Options, out: Any, return_lse: bool, empty: Empty = np.empty
) -> Problem:
    """Validate one `attention` call and allocate its results."""
    q, k, v, flat = _operands(query, key, value)
    shape = (*q.shape[:-1], v.shape[-1])
    if out is None:
        result = empty(shape, q.dtype)
        full = result
        if flat:
            result = full[0]
    else:
        result = out
        inputs = {"query": np.asarray(query), "key": np.asarray(key), "value": np.asarray(value)}
        full = check_out(out, shape[1:] if flat else shape, q.dtype, inputs | arrays_among(options))
        if flat:
            full = full[None]
    lse = result_lse = None
    if return_lse is not False and as_flag("return_lse", return_lse):
        lse = result_lse = empty(shape[:-1], lse_dtype_of(q))
        if flat:
            result_lse = lse[0]
    return _resolve(q, k, v, options, full, lse, result, result_lse)


def build_backward(
    grad_out: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, grad_lse: Any, mod_grads: Any,
    options: Options, empty: Empty = np.empty, wide: bool = False,
) -> BackwardProblem:  # fmt: skip
    """Validate one `attention_backward` call and allocate the gradients of query, key and value.

    With `wide`, the results for half types are float32. So is what is summed over broadcast axes: a sum of gradients
    that were rounded before would be off by many units in the last place.
    """
    q, k, v, flat = _operands(query, key, value)
    shape = (*q.shape[:-1], v.shape[-1])
    expected = shape[1:] if flat else shape
    out = check_like("out", out, expected, q.dtype)
    grad_out = check_like("grad_out", grad_out, expected, q.dtype)
    lse = check_like("lse", lse, expected[:-1], lse_dtype_of(q))
    if grad_lse is not None:
        grad_lse = check_like("grad_lse", grad_lse, expected[:-1], lse_dtype_of(q))
    full_out, full_lse, full_grad = (x[None] if flat else x for x in (out, lse, grad_out))
    full_grad_lse = grad_lse[None] if flat and grad_lse is not None else grad_lse
    problem = _resolve(q, k, v, options, full_out, full_lse, out, lse)
    bias_shape = None
    if options.bias is not None:
        bias_shape = np.asarray(options.bias).shape
        bias_shape = (1,) * (q.ndim - len(bias_shape)) + bias_shape
    inputs = (query, key, value)
    summed = any(x.size != y.size for x, y in zip((q, k, v), inputs, strict=True))
    made = widened(empty) if wide or summed else empty
    dq, dk, dv = (made(x.shape, x.dtype) for x in (q, k, v))
    dtype = dq.dtype if wide else q.dtype
    places = as_mod_grads(mod_grads, problem)
    return BackwardProblem(
        problem, full_grad, full_grad_lse, dq, dk, dv, bias_shape, inputs, options, places, empty=empty, dtype=dtype
    )


def as_mod_grads(mod_grads: Any, p: Problem) -> tuple[int, ...] | None:
    """Check which of `mod_args` gradients are wanted of; return their places, in order."""
    if mod_grads is None:
        return None
    if p.score_mod is None:
        raise ValueError("mod_grads must be None without a score_mod")
    are_reals = [isinstance(x, np.ndarray) and x.dtype.kind == "f" for x in p.mod_args]
    if isinstance(mod_grads, str):
        if mod_grads != "all":
            raise ValueError(f"mod_grads must be 'all', or say which of mod_args by their indices, got {mod_grads!r}")
        return tuple(np.flatnonzero(are_reals).tolist())
    places = np.atleast_1d(as_ints("mod_grads", mod_grads))
    for place in places.ravel().tolist():
        if not 0 <= place < len(p.mod_args):
            raise ValueError(f"mod_grads must lie between 0 and {len(p.mod_args) - 1}, got {place}")
        if not are_reals[place]:
            x = p.mod_args[place]
            kind = f"an array of {x.dtype}" if isinstance(x, np.ndarray) else f"the number {x!r}"
            raise TypeError(f"mod_args[{place}] must be an array of float32 or float64 to have a gradient, got {kind}")
    return tuple(sorted(set(places.ravel().tolist())))


def spread_bias(array: Array, p: Problem) -> Array:
    """Broadcast a bias (n or 1, H or 1, rows or 1, columns or 1) over sequences, heads, rows and columns."""
    rows, columns = array.shape[-2:]
    return np.broadcast_to(array, (*p.batch, p.H, p.L if rows == 1 else rows, p.S if columns == 1 else columns))


def finish(p: BackwardProblem, reduce: Reduce) -> Gradients:
    """Sum over broadcast axes, and give each gradient the shape and dtype of its input."""
    q, k, v = (
        reduce(grad, x.shape, p.dtype, p.empty) for grad, x in zip((p.query, p.key, p.value), p.inputs, strict=True)
    )
    return Gradients(q, k, v, *of_options(p, reduce))


def weights_of_sinks(sinks: Array, lse: Array) -> Array:
    """Return the weights of the sinks, of the shape of `lse`, (..., H, L). A sink is one more key, whose value is 0.

    They are 0 for rows that see neither key nor sink. Sinks are rounded as `lse` is, which near 1e9 is a multiple of 64
    in float32: where a sink has all the weight, they are equal.
    """
    with np.errstate(all="ignore"):
        apart = sinks.astype(lse.dtype)[:, None] - lse
        weights: Array = np.where(np.isfinite(lse), np.exp(np.minimum(apart, 0)), 0)
    return weights


def of_options(
    p: BackwardProblem, reduce: Reduce
) -> tuple[Array | None, Array | None, tuple[Array | None, ...] | None]:
    """Return the gradients of bias, sinks and mod_args, in the shape and dtype of their inputs, or None."""
    bias = sinks = mod_args = None
    if p.bias is not None:
        bias_of_caller = np.asarray(p.options.bias)
        bias = reduce(p.bias.reshape(bias_of_caller.shape), bias_of_caller.shape, bias_of_caller.dtype, p.empty)
    if p.sinks is not None:
        sinks = reduce(p.sinks, p.sinks.shape, np.asarray(p.options.sinks).dtype, p.empty)
    if p.mod_grads is not None:
        grads: list[Array | None] = [None] * len(p.forward.mod_args)
        made = (
            p.mod_args
            if p.mod_args is not None
            else [np.zeros(p.forward.mod_args[place].shape) for place in p.mod_grads]
        )
        for place, grad in zip(p.mod_grads, made, strict=True):
            grads[place] = grad.astype(p.forward.mod_args[place].dtype, copy=False)
        mod_args = tuple(grads)
    return bias, sinks, mod_args


def sum_to(x: Array, shape: tuple[int, ...], dtype: Any = None, empty: Empty = np.empty) -> Array:
    """Sum over the axes along which `shape` was broadcast to that of x; half types are summed in float32."""
    dtype = x.dtype if dtype is None else dtype
    if x.shape == shape:
        return x.astype(dtype, copy=False)
    extra = tuple(range(x.ndim - len(shape)))
    stretched = tuple(n for n in range(x.ndim) if n not in extra and shape[n - len(extra)] == 1 != x.shape[n])
    if any(x.shape[n] != 1 for n in extra) or stretched:
        wide = np.float32 if x.dtype.itemsize == 2 else x.dtype
        x = np.sum(x, axis=extra + stretched, dtype=wide, keepdims=True)
    result: Array = x.astype(dtype, copy=False).reshape(shape)
    return result


def build_weights(query: Any, key: Any, options: Options, heads: Any, rows: Any, empty: Empty = np.empty) -> Problem:
    """Validate one `attention_weights` call and allocate its result."""
    q, k = as_tensor("query", query), as_tensor("key", key)
    if q.dtype != k.dtype:
        raise TypeError(f"query and key must share one dtype, got {q.dtype} and {k.dtype}")
    H, L, E, Hkv, S = _sizes(q, k)
    batch = broadcast_batch({"query": q.shape[:-3], "key": k.shape[:-3]})
    q, k = (np.broadcast_to(x, batch + x.shape[-3:]) for x in (q, k))
    chosen_heads, chosen_rows = as_index("heads", heads, H), as_index("rows", rows, L)
    full = empty((*batch, len(chosen_heads), len(chosen_rows), S), q.dtype)
    result = full[0] if query.ndim == key.ndim == 2 else full
    problem = Problem(
        q, k, k, full, None, result, None, batch, H, Hkv, L, S, E, E, scale_of(options.scale, E, q.dtype),
        heads=chosen_heads, rows=chosen_rows,
    )  # fmt: skip
    _apply(problem, options)
    return problem


def _sizes(q: Array, k: Array) -> tuple[int, int, int, int, int]:
    H, L, E = q.shape[-3:]
    Hkv, S, Ek = k.shape[-3:]
    if Ek != E:
        raise ValueError(f"key must have the head dimension of query, {E}, got key of shape {k.shape}")
    if Hkv != H and (Hkv == 0 or H % Hkv):
        raise ValueError(f"key has {Hkv} heads, which must divide the {H} heads of query")
    return H, L, E, Hkv, S


def _apply(p: Problem, o: Options) -> None:
    """Validate every option that is not at its default and resolve it into the problem."""
    if o.softcap is not None:
        softcap = as_real("softcap", o.softcap)
        if softcap <= 0:
            raise ValueError(f"softcap must be positive, got {softcap}")
        # Clamped so that both softcap * log2(e) and its inverse are finite in the compute type.
        limit = largest_computed(p.query.dtype) / 4
        p.softcap = min(max(softcap, 1 / limit), limit)
    if o.query_lengths is not None:
        p.query_lengths = lengths_within("query_lengths", o.query_lengths, p.L, p.batch)
    if o.key_lengths is not None:
        p.key_lengths = lengths_within("key_lengths", o.key_lengths, p.S, p.batch)
    _positions(p, o)
    if o.prefix_lengths is not None:
        p.prefix_lengths = lengths_within("prefix_lengths", o.prefix_lengths, p.S, p.batch)
        if p.left is not None:
            raise ValueError(f"prefix_lengths must be None beside a window that is bounded on the left, {p.left}")
    if o.alibi_slopes is not None:
        slopes = as_few_floats("alibi_slopes", o.alibi_slopes, p.query.dtype)
        if not np.isfinite(slopes).all():
            raise ValueError("alibi_slopes must be finite")
        if slopes.ndim == 0 or slopes.shape[-1] != p.H:
            raise ValueError(f"alibi_slopes must have shape ({p.H},) or (..., {p.H}), got {slopes.shape}")
        p.alibi_slopes = broadcast_to("alibi_slopes", slopes, (*p.batch, p.H))
    if o.sinks is not None:
        sinks = as_few_floats("sinks", o.sinks, p.query.dtype)
        if sinks.shape != (p.H,):
            raise ValueError(f"sinks must have shape ({p.H},), one per query head, got {sinks.shape}")
        p.sinks = sinks
    if isinstance(o.mask, BlockMask):
        p.blocks = o.mask.fitting((*p.batch, p.H, p.L, p.S))
    elif o.mask is not None:
        p.mask = broadcast_to("mask", as_bools("mask", o.mask), (*p.batch, p.H, p.L, p.S))
    if o.bias is not None:
        bias = as_floats("bias", o.bias)
        p.bias = broadcast_to("bias", bias, (*p.batch, p.H, p.L, p.S))
    if o.score_mod is not None or o.mask_mod is not None:
        for name in ("score_mod", "mask_mod"):
            if getattr(o, name) is not None:
                plain(getattr(o, name), name)
        p.score_mod, p.mask_mod, p.mod_args = o.score_mod, o.mask_mod, as_arguments(o.mod_args)
    elif o.mod_args is not NO_OPTIONS.mod_args and as_arguments(o.mod_args):
        raise ValueError("mod_args must be empty without a score_mod or mask_mod that takes them")
    if o.seed is not None or type(o.dropout_p) is not float or o.dropout_p != 0:
        _drop(p, o)


def _drop(p: Problem, o: Options) -> None:
    """Resolve dropout_p and seed: a weight is dropped where a random number of 16 bits is below p.dropout."""
    probability = as_real("dropout_p", o.dropout_p)
    if not 0 <= probability < 1:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {probability}")
    seed = 0 if o.seed is None else as_seed(o.seed)
    p.dropout = min(round(probability * 2**16), 2**16 - 1)
    if probability > 0 and o.seed is None:
        raise ValueError("seed must be an integer where dropout_p is positive: the backward pass repeats its mask")
    if p.dropout:
        p.seed = seed - 2**64 if seed >= 2**63 else seed


def _positions(p: Problem, o: Options) -> None:
    """Fold is_causal, window and query_offset into left, right and offset."""
    causal = o.is_causal
    if not (
        isinstance(causal, bool | np.bool_) or (isinstance(causal, str) and causal in ("top-left", "bottom-right"))
    ):
        kind = ValueError if isinstance(causal, str) else TypeError
        raise kind(f"is_causal must be a bool, 'top-left' or 'bottom-right', got {causal!r}")
    if o.window is not None:
        p.left, p.right = as_window(o.window)
    if causal:
        p.right = 0
    if o.query_offset is not None:
        offset = as_ints("query_offset", o.query_offset)
        p.offset = int(offset) if offset.ndim == 0 else broadcast_to("query_offset", offset, p.batch)
    elif is_bottom_right(causal):
        keys = p.S if p.key_lengths is None else p.key_lengths
        queries = p.L if p.query_lengths is None else p.query_lengths
        ahead: Any = keys - queries  # of arrays without axes, NumPy makes a scalar
        p.offset = ahead if isinstance(ahead, int) else np.asarray(ahead)
