"""The backward pass of the CPU backend: division into work items, and the launch."""

import math
import struct
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numba.core import config

from ..bounded import BoundedCache
from ..cpu import backward as kernels
from ..cpu.cache import Kernel
from ..cpu.params import ARRAYS, REST, pack_addresses
from ..cpu.scratch import LINE, padded
from ..cpu.simd import HOST
from ..cpu.softmax import SUM_ROWS
from ..cpu.spec import Spec, usual_vectors
from ..cpu.turns import records_for
from ..masks.lists import Lists
from ..options import Array
from ..problem.dense import WHOLE, BackwardProblem, Problem, spread_bias, weights_of_sinks
from . import recall
from .cpu_masks import with_block_mask
from .cpu_resources import Buffers, addresses, put_back, take, threads_for, worker
from .cpu_rules import Rules, compiled_rules
from .cpu_widths import NARROWS
from .records import (
    address_of,
    compact,
    fill_in,
    lists_of,
    numbers_of,
    pack,
    readable_bias,
    room_for,
    sequences_of,
    storage_of,
    stored,
    strides_of,
    values_of,
    varies,
)

ITEMS = 16  # work items to aim for, so that many threads have work and finish together
GROUP = 8  # least number of query tiles in a group: adding the sums of groups then costs 2 % or less
STREAM = 2**24  # bytes of a gradient of a bias from which on it is written past the caches
BUFFERS = 2**26  # largest number of bytes for the sums of the groups of all heads


class _Wave(NamedTuple):
    """Heads that are computed at the same time."""

    members: Array  # (items, 4), as the kernel reads them
    counters: int
    partial_size: int  # bytes of the sums of groups that are computed at the same time
    kept: int  # bytes of the sums of a head that one thread computes alone


class _Plan(NamedTuple):
    """Everything about a call that depends on shapes, strides and options only, and not on addresses."""

    kernel: Kernel
    sequences: Array
    sequences_address: int
    waves: list[_Wave]
    rest: bytes  # the PARAMS record after the addresses
    flops: float
    scratch_size: int
    most_groups: int
    tiles: int  # tiles of queries of a wave: how many threads can have work
    kept: int  # bytes of the sums of a head that one thread computes alone


_plans: BoundedCache[_Plan] = BoundedCache()
SMALL_PLAN = 4096  # bytes of a plan and its key, without the plan's arrays
_pack_one = struct.Struct("=q").pack_into


class Along(NamedTuple):
    """A direction, along which the kernel of `cpu.second` computes derivatives."""

    record: Array  # params.SECOND
    of_gradients: bool  # or else of the results of the forward pass alone, and no gradient is written
    kept: tuple[Any, ...]  # what must live as long as the call


def run(g: BackwardProblem, along: Along | None = None) -> Array | None:
    """Write the gradients of query, key and value, and make those of bias and sinks.

    With a direction, write their tangents instead, and return delta (`cpu.backward.DELTA`) for that of the sinks.
    """
    g.forward = p = with_block_mask(g.forward)
    if p.query.dtype == np.float16 and not HOST.f16:
        _run_widened(g)
        return None
    task = "second" if along else "backward"
    wide = g.query.dtype != p.query.dtype
    spec = Spec(storage_of(p.query.dtype), HOST, task, vectors=0 if along else _vectors_for(p), wide=wide)
    writes = along is None or along.of_gradients
    groups = _groups(g, spec)
    bias = readable_bias(p)
    of_bias = delta = None
    if g.bias_shape is not None:
        # If all rows share one row of the bias, each group sums a gradient of the bias of its own.
        most = int(groups.max(initial=1))
        of_bias = _aligned_zeros((most if g.bias_shape[-2] == 1 else 1, *g.bias_shape), spec.vector.dtype)
    if p.sinks is not None:
        delta = np.empty(p.out.shape[-3:-1] if p.packing else p.out.shape[:-1], spec.vector.dtype)
    arrays = {
        "grad_out": g.grad_out if writes else None,
        "grad_lse": g.grad_lse if writes else None,
        "grad_query": g.query if writes else None,
        "grad_key": g.key if writes else None,
        "grad_value": g.value if writes else None,
        "grad_bias": None if of_bias is None else spread_bias(of_bias[0], p),
        "delta": None if delta is None else np.broadcast_to(delta, p.out.shape[:-1]),
    }
    rules = Rules(0, 0, 0, ())
    if p.score_mod is not None or p.mask_mod is not None:
        rules = compiled_rules(p, "curve" if along else "kept" if g.mod_grads else "slope", False, g.mod_grads or ())
    lists = lists_of(p, spec)
    plan = _find_plan(g, spec, groups, bias, arrays, of_bias, lists, writes)
    most_items = max((len(wave.members) for wave in plan.waves), default=0)
    joins = _joins(g)
    # A thread that only joins others has no use for the room for sums in its scratch, which must not add up to much.
    helpers = max(0, min(plan.tiles - most_items, BUFFERS // max(1, plan.kept))) if joins else 0
    number = threads_for(most_items + helpers, plan.flops)
    own = take()
    try:
        _run_waves(own, g, plan, bias, arrays, lists, rules, number, most_items > 0, along, joins and number > 1)
    finally:
        put_back(own)
    if of_bias is not None:
        g.bias = of_bias.sum(axis=0) if len(of_bias) > 1 else of_bias[0]
    if along is not None:
        return delta
    lse = p.result_lse if p.packing else p.lse
    if p.sinks is not None and lse is not None and delta is not None:
        g.sinks = _of_sinks(p.sinks, lse, delta)
    return None


def _aligned_zeros(shape: tuple[int, ...], dtype: Any) -> Array:
    """Return `numpy.zeros` that begin at a cache line, so that a vector of a row lies in one line and not in two."""
    size = math.prod(shape)
    room = np.zeros(size + LINE // np.dtype(dtype).itemsize, dtype)
    start = -address_of(room) % LINE // room.itemsize
    return room[start : start + size].reshape(shape)


def _vectors_for(p: Problem) -> int:
    """Return the number of vectors of queries in a tile, 0 for the usual number.

    Fewer are taken only where each sequence is one tile, whose gradients then have the same bits: those of keys and
    values are summed tile by tile.
    """
    if not p.Hkv:
        return 0
    if p.blocks is not None or p.score_mod is not None or p.mask_mod is not None:
        return 0
    rows, width = p.L * (p.H // p.Hkv), HOST.bits // (64 if p.query.itemsize == 8 else 32)
    return min((n for n in NARROWS if rows <= n * width and n < usual_vectors(HOST)), default=0)


def _run_waves(
    own: Buffers,
    g: BackwardProblem,
    plan: _Plan,
    bias: Array | None,
    arrays: dict[str, Array | None],
    lists: Lists | None,
    rules: Rules,
    number: int,
    has_items: bool,
    along: Along | None,
    joins: bool,
) -> None:
    p = g.forward
    scratch, scratch_address = own.reserve(number * plan.scratch_size)
    # Contiguous copies, which must live until the kernel is done, because the kernel reads them by their addresses.
    slopes = None if p.alibi_slopes is None else np.ascontiguousarray(p.alibi_slopes)
    sinks = None if p.sinks is None else np.ascontiguousarray(p.sinks)
    if p.H and has_items:
        addresses.call(p.query, p.key, p.value, p.out, own.params_address)
    own.params[REST:] = plan.rest
    total = np.zeros(_mod_size(g))
    for wave in plan.waves:
        counts, partial = np.zeros(wave.counters, np.int64), np.empty(wave.partial_size, np.uint8)
        mod_sums = np.zeros((wave.counters, plan.most_groups, len(total)) if len(total) else 0)
        turns = records_for(len(wave.members), number) if joins else None
        own.counter.value = 0
        _pack_one(own.params, REST, len(wave.members))
        pack_addresses(
            own.params, ARRAYS, own.counter_address, scratch_address, plan.sequences_address,
            address_of(p.lse), address_of(bias), address_of(p.mask), address_of(slopes), address_of(sinks), 0,
            0 if lists is None else address_of(lists.record), p.seed, *rules[:3],
            *(address_of(array) for array in arrays.values()), 0 if along is None else address_of(along.record),
            rules.gradient, address_of(mod_sums), rules.has_slope, address_of(turns),
            address_of(wave.members), address_of(counts), address_of(partial),
        )  # fmt: skip
        work = plan.flops / len(plan.waves)
        own.run(
            plan.kernel, number, work, g, plan, bias, lists, arrays, scratch, slopes, sinks, counts, partial, rules,
            mod_sums, along, turns,
        )  # fmt: skip
        if len(total):
            for of_group in mod_sums.reshape(-1, len(total)):  # one after the other: the bits are those of any threads
                total += of_group
    if g.mod_grads:
        g.mod_args = _split_sums(g, total)


def _find_plan(
    g: BackwardProblem, spec: Spec, groups: Array, bias: Array | None, arrays: dict[str, Any], of_bias: Array | None,
    lists: Lists | None, writes: bool,
) -> _Plan:  # fmt: skip
    p = g.forward
    part = p.origin is not WHOLE or spec.task == "second"
    packed = p.packing is not None and p.packing.query_rows.nbytes <= SMALL_PLAN
    part = part or (varies(p) and not packed)
    if part or bias is not None or p.mask is not None or lists is not None or g.mod_grads:
        return _make_plan(g, spec, groups, bias, arrays, of_bias, lists, writes)
    all_arrays = p.query, p.key, p.value, p.out, p.lse, g.grad_out, g.grad_lse
    key = (
        p.query.dtype, p.query.shape, p.value.shape, *(None if x is None else x.strides for x in all_arrays),
        p.alibi_slopes is None, p.sinks is None, p.scale, p.softcap, p.left, p.right, p.dropout,
        p.score_mod is None and p.mask_mod is None, numbers_of(p) if packed else p.offset,
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is not None:
        if plan.flops <= recall.LARGEST and plan.sequences.nbytes <= SMALL_PLAN:
            g.plan = plan
    else:
        plan = _make_plan(g, spec, groups, bias, arrays, of_bias, lists, writes)
        size = plan.sequences.nbytes + sum(wave.members.nbytes for wave in plan.waves)
        _plans.add(key, plan, size + SMALL_PLAN)
    return plan


def _make_plan(
    g: BackwardProblem, spec: Spec, groups: Array, bias: Array | None, arrays: dict[str, Any], of_bias: Array | None,
    lists: Lists | None, writes: bool,
) -> _Plan:  # fmt: skip
    p = g.forward
    E, Ev = padded(spec, p.E), padded(spec, p.Ev)
    sequences = sequences_of(p, bias, **arrays)
    if lists is not None:
        sequences["lists"] = np.arange(len(sequences)) * lists.per_sequence
    fill_in(p, sequences)
    sequences["groups"] = groups
    head_bytes = _bytes_of_sums(spec, p, sequences["key_rows"]) * writes
    work = np.repeat(sequences["rows"] * sequences["key_rows"], p.Hkv)  # of each key/value head
    if lists is not None:
        work = work * lists.density.ravel()
    most_groups = int(groups.max(initial=1))
    size = 8 * _mod_size(g)
    shared = [part for heads in _waves(g) for part in _parts_of_wave(heads, size * most_groups)]
    waves = [_share_out(heads, p.Hkv, groups, head_bytes, work) for heads in shared]
    kept = max((wave.kept for wave in waves), default=0)
    offsets, scratch_size, depth = kernels.scratch(spec, p.E, p.Ev, kept)
    values = values_of(p, spec, bias) | {
        "number": len(sequences),
        "Ev": p.Ev,
        "E_padded": E,
        "Ev_padded": Ev,
        "scratch_size": scratch_size,
        "out_depth": depth,
        "mod_sums_head": size * most_groups,
        "mod_sums_group": size,
        "grad_bias_once": of_bias is not None and _is_written_once(g, of_bias),
        "grad_bias_group": of_bias.strides[0] if of_bias is not None and len(of_bias) > 1 else 0,
    }
    for name, array in arrays.items():
        values |= strides_of(name, array, len(p.batch))
    products = 5.0 if spec.task == "backward" else 12.0 if writes else 5.0
    flops = products * float(work.sum()) * (p.E + p.Ev) * (p.H // p.Hkv if p.Hkv else 0)
    flops *= p.visited / p.S if p.S else 1
    kernel = worker(spec.storage, spec.task, vectors=spec.vectors, wide=spec.wide)
    rest = pack(values, offsets)
    row_tiles = -(-sequences["rows"] * (p.H // p.Hkv) // spec.query_tile) if p.Hkv else sequences["rows"]
    tiles = int(row_tiles.sum()) * p.Hkv // max(1, len(waves))
    return _Plan(kernel, sequences, address_of(sequences), waves, rest, flops, scratch_size, most_groups, tiles, kept)


def _is_written_once(g: BackwardProblem, of_bias: Array) -> bool:
    """Whether no two scores share a number of the bias, and its gradient is large and begins a vector in each row."""
    p = g.forward
    whole = p.packing is None and g.bias_shape == (*p.batch, p.H, p.L, p.S)
    return whole and of_bias.nbytes >= STREAM and p.S * of_bias.itemsize % (HOST.bits // 8) == 0


def _joins(g: BackwardProblem) -> bool:
    """Whether threads can join others at their heads: not where tiles add to numbers that do not belong to a key."""
    shares_columns = g.bias_shape is not None and g.bias_shape[-1] == 1
    return not (g.mod_grads or shares_columns or config.BOUNDSCHECK)


def _mod_size(g: BackwardProblem) -> int:
    """Elements of the arrays in `mod_args` of which gradients are wanted."""
    return sum(g.forward.mod_args[place].size for place in g.mod_grads or ())


def _split_sums(g: BackwardProblem, total: Array) -> list[Array]:
    shapes = [g.forward.mod_args[place].shape for place in g.mod_grads or ()]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(np.split(total, ends[:-1]), shapes, strict=True)]


def _parts_of_wave(heads: Array, size: int) -> list[Array]:
    """Divide a wave whose heads need so many bytes each for gradients of `mod_args`: each head has its own."""
    most = max(1, BUFFERS // size) if size else len(heads)
    return [heads[n : n + most] for n in range(0, len(heads), most)] if len(heads) else [heads]


def _share_out(heads: Array, Hkv: int, groups: Array, head_bytes: Array, work: Array) -> _Wave:
    """Divide heads into work items, one for each head or for each group of a long head.

    Heads are numbered sequence * Hkv + head, and so is their `work`.
    """
    if Hkv == 0:
        return _Wave(np.zeros((0, 4), np.int64), 0, 0, 0)
    index = heads // Hkv
    # The longest items come first, or one thread may still work on a long one when all others are done.
    order = np.argsort(-work[heads], kind="stable")
    heads, index = heads[order], index[order]
    of_head, size = groups[index], head_bytes[index]
    # A head with more than a thread's share of the work is split into its groups: other threads would wait for it.
    split = (of_head > 1) & (work[heads] * ITEMS > work[heads].sum())
    if (size * of_head)[split].sum() > BUFFERS:
        split[:] = False
    items = np.where(split, of_head, 1)
    sums = np.where(split, size * of_head, 0)
    alone = size * np.minimum(of_head, 2)
    which = np.repeat(np.arange(len(heads)), items)
    group = np.arange(len(which)) - (np.cumsum(items) - items)[which]
    group[~split[which]] = -1
    begins = np.cumsum(sums) - sums
    members = np.stack([heads[which], group, begins[which], which], axis=1)
    return _Wave(members, len(heads), int(sums.sum()), int(alone[~split].max(initial=0)))


def _waves(g: BackwardProblem) -> Array:
    """Return the numbers (sequence * Hkv + head) of the key/value heads, in rows that are computed one after the other.

    The heads in a row are computed at the same time. Heads that share elements of a bias are in different rows, because
    they must not add to its gradient at the same time.
    """
    p = g.forward
    shape = (*p.batch, p.Hkv)
    heads: Array = np.arange(math.prod(shape)).reshape(shape)
    shared = [] if g.bias_shape is None else [axis for axis, n in enumerate(g.bias_shape[:-2]) if n == 1]
    if p.packing is not None and any(p.packing.bias):  # of a packed bias, every sequence has its own part
        shared = [axis for axis in shared if axis != 0]
    together = math.prod(shape[axis] for axis in shared)
    heads = np.moveaxis(heads, shared, range(len(shared)))
    return heads.reshape(together, heads.size // together if together else 0)


def _groups(g: BackwardProblem, spec: Spec) -> Array:
    """Return the number of groups of the query tiles of a head: the same for a sequence alone and in a batch.

    There is one where they cannot be computed at the same time: one thread would only clear and add them.
    """
    p = g.forward
    rows = np.full(math.prod(p.batch), p.L) if p.packing is None else p.packing.query_rows
    if not p.Hkv:
        return np.ones_like(rows)
    G, heads = p.H // p.Hkv, p.Hkv
    if g.bias_shape is not None and g.bias_shape[-3] == 1:
        if G > 1 and spec.query_tile % G:
            return np.ones_like(rows)  # two tiles may contain rows that share a row of the bias
        heads = 1  # other heads wait for this one: see `_waves`
    row_tiles = -(-rows * G // spec.query_tile)
    keys = p.S if p.packing is None else p.packing.key_rows
    fit = BUFFERS // np.maximum(1, heads * _bytes_of_sums(spec, p, keys))
    groups = np.clip(np.minimum(-(-ITEMS // heads), row_tiles // GROUP), 1, 8)
    return np.where(groups <= fit, groups, 1)


def _bytes_of_sums(spec: Spec, p: Problem, keys: Any) -> Any:
    """Return the bytes of dK and dV of so many keys of a head, in the compute type."""
    return (keys + SUM_ROWS) * (padded(spec, p.E) + padded(spec, p.Ev)) * spec.vector.bytes


def _of_sinks(sinks: Array, lse: Array, delta: Array) -> Array:
    """Return the gradient of the sinks."""
    weights = weights_of_sinks(sinks, lse)
    with np.errstate(all="ignore"):
        parts = np.where(weights == 0, 0, weights * delta)
    total: Array = -parts.sum(axis=-1).sum(axis=tuple(range(lse.ndim - 2)))
    return total


def _run_widened(g: BackwardProblem) -> None:
    """Compute float16 by float32 copies, on a host that cannot convert it in hardware."""
    p = g.forward
    q, k, v, out, grad_out = (compact(x, np.float32) for x in (p.query, p.key, p.value, p.out, g.grad_out))
    grads = [room_for(x, np.float32) for x in (g.query, g.key, g.value)]
    single = replace(
        g,
        forward=replace(p, query=q, key=k, value=v, out=out),
        grad_out=grad_out,
        query=grads[0],
        key=grads[1],
        value=grads[2],
    )
    run(single)
    for grad, single_grad in zip((g.query, g.key, g.value), grads, strict=True):
        stored(grad)[...] = stored(single_grad)
    g.bias, g.sinks, g.mod_args = single.bias, single.sinks, single.mod_args
