"""The CPU backend: converts a `Problem` to the records that kernels read, and launches the kernels."""

import math
import struct
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numba.core import config

from ..bounded import BoundedCache
from ..caches.contents import Contents
from ..cpu import decode, device_calls, launch, pool
from ..cpu import forward as kernels
from ..cpu import recall as again
from ..cpu.cache import Kernel
from ..cpu.objects import headers_are_known
from ..cpu.params import ADDRESSES, ARRAYS, REST, pack_addresses
from ..cpu.simd import HOST
from ..cpu.spec import Spec
from ..options import Array
from ..problem.dense import NUMBERS, WHOLE, BackwardProblem, Problem
from ..problem.dense import sum_to as reduce  # noqa: F401
from ..sequence_record import SEQUENCE
from . import cpu_backward, recall
from .cpu_masks import with_block_mask
from .cpu_resources import SMALL, Buffers, addresses, put_back, take, threads_for, worker
from .cpu_rules import Rules, compiled_rules
from .cpu_widths import PARALLEL, vectors_for, vectors_for_all
from .records import (
    address_of,
    compact,
    fill_in,
    lists_of,
    numbers_of,
    pack,
    per_head,
    readable_bias,
    room_for,
    sequences_of,
    storage_of,
    stored,
    stored_of,
    values_of,
    varies,
)

on_device = False


def unusable() -> str | None:
    if config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set; unset it, or use backend='reference'"
    if not headers_are_known():
        return "NumPy's arrays have another header than PyArrayObject_fields of its C API; use backend='reference'"
    return None


def entries() -> tuple[Kernel, ...]:
    """Return the functions that Python calls."""
    recalled = again.match_three, again.match_six, again.forward, again.decode, again.backward
    of_gpus = device_calls.look, device_calls.launch
    return launch._launcher, launch._caller, launch._member, pool.serve, addresses, *recalled, *of_gpus


def forward(problem: Problem) -> None:
    """Write ``problem.out`` and ``problem.lse``."""
    _run(with_block_mask(problem), weights=False)


def backward(problem: BackwardProblem) -> None:
    """Write the gradients of query, key and value, and make those of bias and sinks."""
    cpu_backward.run(problem)


def weights(problem: Problem) -> None:
    """Write the probabilities of the chosen heads and rows to ``problem.out``."""
    _run(with_block_mask(problem), weights=True)


def _run_widened(p: Problem, weights: bool) -> None:
    """Compute float16 by float32 copies, on a host that cannot convert it in hardware (x86 before 2012)."""
    cache, k, v, out = p.cache, p.key, p.value, room_for(p.out, np.float32)
    if cache is None or cache.storage == "float16":
        k, v = compact(k, np.float32), compact(v, np.float32)
    if cache is not None and cache.storage == "float16":
        cache = cache._replace(key=k, value=v, storage="float32")
    _run(replace(p, query=compact(p.query, np.float32), key=k, value=v, out=out, cache=cache), weights)
    stored(p.out)[...] = stored(out)


class _Plan(NamedTuple):
    """Everything about a call that depends on shapes, strides and options only, and not on addresses or lengths."""

    kernel: Kernel
    sequences: Array
    numbers: Array  # `sequences` as int64, in the same memory
    sequences_address: int
    rest: bytes  # the PARAMS record after the addresses
    items: int  # number of work items, if the kernel does not split keys
    flops: float  # of the products, for each key
    work: float  # all work for each key, in flops that would take as long: see `cpu_resources.LONG`
    scratch_size: int
    tiles: Array | None = None  # number of query tiles of each sequence, if the kernel splits keys
    partial_size: int = 0  # bytes of the partial state of a tile


_plans: BoundedCache[_Plan] = BoundedCache()
SMALL_PLAN = 4096  # bytes of a plan and its key, without the plan's arrays
# Costs beyond the products, in flops that would take as long: SCORE for the exponential of a score, and READ for
# reading a number of a key or value from memory, which bounds the time where few queries share a key.
SCORE = 128
READ = 64


def _run(p: Problem, weights: bool) -> None:
    if not p.out.size and (p.lse is None or not p.lse.size):
        return
    if not HOST.f16 and (p.query.dtype == np.float16 or (p.cache is not None and p.cache.storage == "float16")):
        return _run_widened(p, weights)
    bias = readable_bias(p)
    own = take()
    try:
        for few, vectors, which in _kernels_for(p, weights):
            _run_kernel(own, p, bias, weights, few, vectors, which)
    finally:
        put_back(own)


def _kernels_for(p: Problem, weights: bool) -> list[tuple[bool, int, Array | None]]:
    """Return the kernels of a call: whether for few queries, vectors in a tile (see `Spec`), which sequences.

    The choice of one with few queries depends on the sizes of the sequence alone, so that its result has the same bits
    in any batch. The bits do not depend on the number of vectors in a tile, unless a window begins at another key.
    """
    width = HOST.bits // 8 // (8 if p.query.itemsize == 8 else 4)
    unfit = weights or p.E < width or p.Ev < width
    group = p.H // p.Hkv if p.Hkv else 1
    most = least = 0 if unfit else FEW // group
    narrows = (
        not weights
        and p.left is None
        and (p.cache is None and p.blocks is None and p.score_mod is None and p.mask_mod is None)
    )
    if narrows:
        least //= 4
    if p.query_lengths is None and (p.key_lengths is None or p.L <= least or p.L > most):
        few = p.L <= least or (p.L <= most and p.S > decode.SPLIT)
        return [(few, _vectors_for(p, width) if narrows and not few else 0, None)]
    rows = np.full(p.batch, p.L).ravel() if p.query_lengths is None else p.query_lengths.ravel()
    keys = np.full(1, p.S) if p.key_lengths is None else p.key_lengths.ravel()
    short: Array = (rows <= least) | ((rows <= most) & (keys > decode.SPLIT))
    empty = rows == 0  # nothing is to be computed, by either kernel
    if not most or not (short & ~empty).any():
        return [(False, _vectors_for(p, width, rows, keys) if narrows else 0, None)]
    if (short | empty).all():
        return [(True, 0, None)]
    vectors = _vectors_for(p, width, rows, keys, ~short) if narrows else 0
    return [(False, vectors, np.flatnonzero(~short)), (True, 0, np.flatnonzero(short))]


def _vectors_for(
    p: Problem, lanes: int, rows: Array | None = None, keys: Array | None = None, which: Array | None = None
) -> int:
    """Return the number of vectors of a tile, for all sequences alike or so many rows and keys of those of a mask."""
    group = p.H // p.Hkv if p.Hkv else 1
    flops = 4.0 * p.query.size * p.S
    threads = launch.threads() if flops > 2 * PARALLEL else 1
    ahead = None if p.right is None or p.prefix_lengths is not None else p.offset + p.right
    if rows is None and (ahead is None or isinstance(ahead, int)):
        return vectors_for(p.L * group, p.S, lanes, ahead, group, p.Hkv * math.prod(p.batch), threads)

    def chosen(x: Array) -> Array:
        return x if which is None or len(x) == 1 else x[which]

    rows = chosen(np.full(math.prod(p.batch), p.L) if rows is None else rows)
    keys = chosen(np.full(1, p.S) if keys is None else keys)
    ahead = None if ahead is None else chosen(np.ravel(ahead))
    return vectors_for_all(rows * group, keys, lanes, ahead, group, p.Hkv, threads)


def _run_kernel(
    own: Buffers, p: Problem, bias: Array | None, weights: bool, few: bool, vectors: int, which: Array | None
) -> None:
    lists = None if p.blocks is None else lists_of(p, _spec_of(p, few, vectors), few, which)
    shown = 1.0 if lists is None else lists.share_of(which)
    if (
        weights
        or p.mask is not None
        or lists is not None
        or bias is not None
        or which is not None
        or p.origin is not WHOLE
        or (p.packing is not None and p.packing.query_rows.nbytes > SMALL_PLAN)
    ):
        sequences = sequences_of(p, bias)
        if lists is not None:
            sequences["lists"] = np.arange(len(sequences)) * lists.per_sequence
        fill_in(p, sequences)
        if which is not None:
            sequences = sequences[which]
        plan = _make_plan(p, sequences, bias, weights, few, vectors)
        sequences, sequences_address = plan.sequences, plan.sequences_address
    else:
        plan = _find_plan(p, few, vectors)
        sequences, sequences_address = plan.sequences, plan.sequences_address
        if p.packing is None and varies(p):
            if p.cache is None:
                p.plan = None
            if _is_step(p):
                sequences, sequences_address = own.sequence, own.sequence_address
                sequences[:] = plan.numbers
                sequences[KEYS], sequences[OFFSET] = p.S, p.offset
            else:
                numbers = plan.numbers.copy()  # copying records goes field by field and takes 7 us
                sequences, sequences_address = numbers.view(SEQUENCE), address_of(numbers)
                fill_in(p, sequences)
                if type(p.offset) is int:
                    sequences["offset"] = p.offset
    items, counts, partial = plan.items, None, None
    if few:
        items, most = _split(plan, p, sequences)
        if most > 1:
            counts, partial = np.zeros(items, np.int64), np.empty(items * plan.partial_size, np.uint8)
    keys = (p.S if weights else p.visited) * shown  # of the weights, those outside a window are written too
    number = threads_for(items, plan.flops * keys)
    scratch, scratch_address = own.reserve(number * plan.scratch_size)
    own.counter.value = 0
    # A contiguous copy, which must live until the kernel is done, because the kernel reads it by its address.
    slopes = None if p.alibi_slopes is None else np.ascontiguousarray(p.alibi_slopes)
    addresses.call(p.query, p.key, p.value, p.out, own.params_address)
    rules = NO_RULES if p.score_mod is p.mask_mod is None else compiled_rules(p, "score", few)
    pack_addresses(
        own.params, ARRAYS, own.counter_address, scratch_address, sequences_address,
        *[0 if x is None else address_of(x) for x in (p.lse, bias, p.mask, slopes, p.sinks, p.rows)],
        0 if lists is None else address_of(lists.record), p.seed, *rules[:3], *NO_GRADIENTS,
        0 if counts is None else address_of(counts), 0 if partial is None else address_of(partial),
    )  # fmt: skip
    own.params[REST:] = plan.rest
    pack_one(own.params, REST, items)
    own.run(
        plan.kernel, number, plan.work * keys, p, lists, bias, plan, scratch, slopes, sequences, counts, partial, rules,
    )  # fmt: skip


NO_RULES = Rules(0, 0, 0, ())
NO_GRADIENTS = (0,) * (
    ADDRESSES.index("counts") - ADDRESSES.index("grad_out")
)  # the addresses that only the backward pass has
pack_one = struct.Struct("=q").pack_into


def _find_plan(p: Problem, few: bool, vectors: int) -> _Plan:
    """Return the plan for a call without mask and bias, which all calls with the same key share.

    Of a cache, the lengths and what follows from them are not part of it; of packed sequences they are.
    """
    q, k, v, out, cache = p.query, p.key, p.value, p.out, p.cache
    key = (
        q.dtype, q.shape, q.strides, k.shape, k.strides, v.shape, v.strides, out.strides, p.lse is None,
        p.scale, p.softcap, p.alibi_slopes is None, p.left, p.right,
        p.offset if cache is None and type(p.offset) is int else None, few, vectors, p.dropout,
        p.score_mod is None and p.mask_mod is None, None if cache is None else _layout_of(cache),
        None if p.packing is None else numbers_of(p),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is not None:
        # What `recall` can remember: calls that are small, and whose keys are not split unless they are in a cache.
        if plan.flops * p.visited <= recall.LARGEST and plan.numbers.nbytes <= SMALL_PLAN:
            p.plan = plan if plan.tiles is None or p.S <= decode.SPLIT or cache is not None else None
    else:
        sequences = sequences_of(p, None)
        if p.packing is not None:
            fill_in(p, sequences)
        plan = _make_plan(p, sequences, None, False, few, vectors)
        _plans.add(key, plan, plan.numbers.nbytes + (0 if plan.tiles is None else plan.tiles.nbytes) + SMALL_PLAN)
    return plan


def _layout_of(cache: Contents) -> tuple[Any, ...]:
    scales = cache.key_scale, cache.value_scale
    return cache.storage, cache.table is None, *(None if x is None else x.strides for x in scales)


def _machine(entry: str) -> recall.Machine:
    match, run = {
        "forward": (again.match_three, again.forward),
        "into": (again.match_six, again.forward),
        "decode": (again.match_six, again.decode),
        "backward": (again.match_six, again.backward),
    }[entry]
    return recall.Machine(match.call, run.call, take, put_back, threads_for, pool.address_for)


def _forward_recipe(p: Problem, row: list[int], arrays: tuple[Array, ...]) -> recall.Recipe | None:
    """Return how to do a call again whose plan is known; None if that is not possible."""
    plan: _Plan = p.plan
    items = plan.items if plan.tiles is None else _split(plan, p, plan.sequences)[0]
    addresses = {"sequences": plan.sequences_address, "lse": int(p.lse is not None)}
    template = again.template_of(plan.rest, items, addresses)
    results = [(x.shape, x.dtype) for x in (p.result, p.result_lse) if x is not None]
    return _recipe(row, template, plan, items, plan.flops * p.visited, results, arrays)


def _decode_recipe(p: Problem, row: list[int], arrays: tuple[Array, ...]) -> recall.Recipe | None:
    """Return how to do a step of decoding again whose plan is known; None if that is not possible."""
    plan: _Plan = p.plan
    sequences, items = plan.sequences.copy(), plan.items
    if plan.tiles is not None:
        sequences["first"], items = plan.tiles, int(plan.tiles.sum())
    address = address_of(sequences)
    template = again.template_of(plan.rest, items, {"lse": int(p.lse is not None)})
    results = [(x.shape, x.dtype) for x in (p.result, p.result_lse) if x is not None]
    recipe = _recipe(row, template, plan, items, plan.flops, results, arrays)
    split = 0 if plan.tiles is None else decode.SPLIT
    steps = recall.Steps(sequences, address, len(sequences), sequences.nbytes, split, plan.partial_size)
    return None if recipe is None else recipe._replace(steps=steps)


def _backward_recipe(g: BackwardProblem, row: list[int], arrays: tuple[Array, ...]) -> recall.Recipe | None:
    """Return how to do a call again whose plan is known; None if that is not possible."""
    plan: cpu_backward._Plan = g.plan
    results = [(x.shape, g.query.dtype) for x in g.inputs]
    # Gradients of inputs that were broadcast are summed; those of packed sequences take the place of the inputs.
    summed = g.forward.packing is None and [x.shape for x in (g.query, g.key, g.value)] != [x.shape for x in g.inputs]
    if summed or len(plan.waves) != 1 or plan.waves[0].partial_size:
        return None
    members = plan.waves[0].members
    addresses = {"sequences": plan.sequences_address, "members": address_of(members)}
    template = again.template_of(plan.rest, len(members), addresses)
    return _recipe(row, template, plan, len(members), plan.flops, results, arrays)


def _recipe(
    row: list[int], template: Array, plan: Any, items: int, flops: float, results: list[Any], arrays: tuple[Array, ...]
) -> recall.Recipe | None:
    if config.BOUNDSCHECK:
        return None
    return recall.Recipe(
        row,
        template,
        address_of(template),
        plan.kernel.address,
        plan.scratch_size,
        items,
        flops,
        items == 1 or flops <= SMALL,
        tuple(results),
        (plan, *(x.dtype for x in arrays)),
    )


FEW = 2 * HOST.bits // 32  # query rows of a key/value head up to which the kernel with features in the lanes is used


def _spec_of(p: Problem, few: bool, vectors: int) -> Spec:
    task, wide = "decode" if few else "forward", p.out.dtype != p.query.dtype
    return Spec(storage_of(p.query.dtype), HOST, task, stored_of(p), 0 if few else vectors, wide)


def _make_plan(p: Problem, sequences: Array, bias: Array | None, weights: bool, few: bool, vectors: int) -> _Plan:
    if few:
        return _make_decode_plan(p, sequences, bias)
    spec = _spec_of(p, few, vectors)
    offsets, scratch_size, depth = kernels.scratch(spec, p.E, 0 if weights else p.Ev)
    heads, group = p.Hkv, p.H // p.Hkv
    if p.heads is not None and p.rows is not None:
        sequences = per_head(p, p.heads, sequences, bias)
        heads, group = 1, 1
        sequences["rows"] = len(p.rows)
    if p.packing is not None:  # longest sequences first, so that threads finish together
        sequences = sequences[np.argsort(-sequences["keys"], kind="stable")]
    rows = sequences["rows"] * group
    ends = np.cumsum(heads * -(-rows // spec.query_tile))
    sequences["first"] = ends - heads * -(-rows // spec.query_tile)
    items = int(ends[-1]) if len(ends) else 0
    sizes = {"number": len(sequences), "group": group, "Ev": p.S if weights else p.Ev}
    rest = pack(values_of(p, spec, bias) | sizes | {"scratch_size": scratch_size, "out_depth": depth}, offsets)
    scores = heads * float(rows.sum())
    flops, work = 2.0 * scores * (p.E + p.Ev), 2.0 * scores * (p.E + p.Ev + SCORE)
    kernel = worker(spec.storage, "weights" if weights else "forward", spec.kv_storage, spec.vectors, spec.wide)
    numbers = sequences.view(np.int64)
    return _Plan(kernel, sequences, numbers, address_of(numbers), rest, items, flops, work, scratch_size)


def _make_decode_plan(p: Problem, sequences: Array, bias: Array | None) -> _Plan:
    spec = _spec_of(p, True, 0)
    offsets, scratch_size, partial_size = decode.scratch(spec, p.E, p.Ev)
    sizes = {"number": len(sequences), "Ev": p.Ev, "scratch_size": scratch_size, "partial_size": partial_size}
    flops = 2.0 * p.H * float(sequences["rows"].sum()) * (p.E + p.Ev)
    kernel, rest = (
        worker(spec.storage, "decode", spec.kv_storage, wide=spec.wide),
        pack(values_of(p, spec, bias) | sizes, offsets),
    )
    work = max(flops, 2.0 * p.Hkv * len(sequences) * (p.E + p.Ev) * READ)
    tiles = decode.tiles_of(spec, sequences["rows"], p.H // p.Hkv, p.Hkv)
    numbers = sequences.view(np.int64)
    address = address_of(numbers)
    return _Plan(kernel, sequences, numbers, address, rest, 0, flops, work, scratch_size, tiles, partial_size)


_BUT_KEYS = [number.problem for number in NUMBERS if number.record != "keys"]
KEYS, OFFSET = (SEQUENCE.names.index(name) for name in ("keys", "offset"))  # type: ignore[union-attr]


def _is_step(p: Problem) -> bool:
    """Whether this is a decoding step of a single sequence, in which only the length changes: the quick path."""
    cache = p.cache
    return (
        cache is not None
        and p.key_lengths is cache.lengths
        and len(cache.lengths) == 1
        and cache.table is None
        and cache.key_scale is None
        and not any(isinstance(getattr(p, name), np.ndarray) for name in _BUT_KEYS)
    )


def _split(plan: _Plan, p: Problem, sequences: Array) -> tuple[int, int]:
    """Split the keys of every sequence; return the number of work items, and of splits of the longest sequence."""
    assert plan.tiles is not None
    if len(plan.tiles) == 1:
        keys = sequences["keys"][0] if sequences.dtype.names else sequences[KEYS]
        most = max(1, -(-int(keys) // decode.SPLIT))
        return int(plan.tiles[0]) * most, most
    splits = np.maximum(1, -(-sequences["keys"] // decode.SPLIT))
    each = splits * plan.tiles
    ends = np.cumsum(each)
    sequences["first"] = ends - each
    return int(ends[-1]), int(splits.max())


_RECIPES = {"forward": _forward_recipe, "into": _forward_recipe, "decode": _decode_recipe, "backward": _backward_recipe}
recall.provide(recall.Provider(again.row_of, _RECIPES, _machine))
