"""The backward pass of half types on sm_90a in one kernel: FlashAttention-3 (Shah et al. 2024), appendix B.

A block owns 128 keys, a warpgroup 64 of them, and one more warpgroup copies tiles of queries and of the gradient of
`out` into rings of slots. Scores are transposed, so that P and dS are operands in registers of dV and dK. dS goes to
shared memory once, where both warpgroups read it for their half of the features of dQ, which they add to memory by
atomics. The rules are those of `backward`.
"""

from dataclasses import dataclass

import numpy as np

from .backward import NAMES, copy_facts, mended, write_own
from .blocks import FACTS, Block, Lanes, block_of, packed_block, work_item
from .emit import I32, I64, Emit, KernelFunction, Regs, Target
from .loading import make_landed, make_loads, make_once, rows_of, rows_that_are_whole
from .parameters import PARAMETERS, Parameters
from .softmax import recenter, recompute
from .spec import Spec
from .tiles import fetch
from .warpgroups import AT_ONCE, GROUP, LINE, ROWS, Ring, Slabs, Warpgroups, init_barriers, make_roles, make_waits

# Head dimension: slots of a ring, loads in flight before one is waited for, registers of a thread that loads and of
# one that computes.
SHAPES = {64: (2, 1, 40, 232), 128: (2, 2, 40, 232)}
GROUPS, QUERIES = 2, 64  # warpgroups that compute, and queries of a tile: one slab of dS
_SHARING = 1  # the named barrier behind which dS of both warpgroups is there
_PITCH = 4 * len(FACTS)  # bytes of the facts of a query


@dataclass(frozen=True)
class Plan:
    """Shared memory of a block."""

    key: Slabs
    value: Slabs
    queries: Ring
    grads: Ring  # of `out`
    ds: Slabs  # the first of two
    facts: int  # of the queries in each slot
    landed: int  # the barrier of keys and values
    end: int


def plan(c: Spec) -> Plan:
    slots = SHAPES[c.E][0]
    key = Slabs(c.rows, c.E, c.storage, 0)
    value = Slabs(c.rows, c.Ev, c.storage, key.end)
    query = Slabs(c.columns, c.E, c.storage, value.end)
    grad = Slabs(c.columns, c.Ev, c.storage, query.offset + slots * query.bytes)
    ds = Slabs(c.rows, c.columns, c.storage, grad.offset + slots * grad.bytes)
    facts = ds.offset + 2 * ds.bytes
    queries = Ring(query, slots, facts + slots * c.columns * _PITCH)
    grads = Ring(grad, slots, queries.end)
    return Plan(key, value, queries, grads, ds, facts, grads.end, grads.end + 8)


def make_hopper_backward(c: Spec, on: Target) -> KernelFunction:
    """Make the kernel; its grid is tiles of keys for some key heads, and all of those."""
    cuda, macro, shared_address = on.cuda, on.macro, on.shared()
    product = c.make_product()
    assert isinstance(product, Warpgroups)
    lanes, layout = Lanes(c, product), product.layout(c.columns)
    of_keys, of_values, of_queries = product.features(c.E), product.features(c.Ev), product.features(c.E // 2)
    at, columns, loader, first_loader = plan(c), c.columns, GROUPS, GROUPS * GROUP
    _, lag, few_registers, many_registers = SHAPES[c.E]
    S, W, Q = f"f{len(layout)}", f"i{len(layout) // 2}", f"f{len(of_queries)}"
    K, V = f"f{len(of_keys)}", f"f{len(of_values)}"
    names = NAMES["key"]
    BLOCK = packed_block(c, names)
    query_is_there, query_slot_is_empty, release_query = make_waits(on, at.queries)
    grad_is_there, grad_slot_is_empty, release_grad = make_waits(on, at.grads)
    load_queries, load_last_queries = make_loads(on, BLOCK, c.storage, "query", at.queries)
    load_grads, load_last_grads = make_loads(on, BLOCK, c.storage, "grad_out", at.grads)
    warpgroup, give_registers, take_registers = make_roles(on, few_registers, many_registers)
    publish_own, own_is_there = make_once(on, at.key, at.landed)
    landed_but_some, landed = make_landed(on, lag)

    @macro("", "i", "i")
    def prepare(e: Emit, base: I32, thread: I32) -> None:
        init_barriers(e, [at.queries, at.grads], base, thread, GROUPS, at.landed)

    @macro((BLOCK, "i"), PARAMETERS, "i", "i")
    def find_work(e: Emit, p: Parameters, x: I32, y: I32) -> tuple[Block, I32]:
        index, tile, head = work_item(e, p, x, y, True)
        return block_of(e, c, p, names, index, tile, head, True), p.int("group")

    @macro("i6", BLOCK)
    def queries_seen(e: Emit, b: Block) -> Regs:
        """First query, number of tiles from it on, queries that all keys see, number of queries, and of whole rows."""
        begin, end, all_begin, all_end = b.span.of_rows(b.first, b.first + (c.rows - 1))
        tiles = (e.max(end - begin, 0) + (columns - 1)) // columns
        number, all_end = b.span.columns, e.select(mended(b), begin - begin, all_end)
        return [begin, tiles, all_begin, all_end, number, rows_that_are_whole(b, number)]

    # What the warpgroup that loads does.

    @macro("", BLOCK, "i", "i")
    def load_own(e: Emit, b: Block, base: I32, thread: I32) -> None:
        for name, tile in (("key", at.key), ("value", at.value)):
            rows = rows_of(b, name, b.places[name], b.first, b.span.rows)
            fetch(e, tile, e.opaque(base), rows, e.opaque(thread), GROUP, c.storage, True, most=AT_ONCE)
        e.commit()

    @macro("", BLOCK, "i", "i", "i", "i", "i")
    def load_facts(e: Emit, b: Block, base: I32, thread: I32, n: I32, head: I32, row: I32) -> None:
        source = b.places["delta"] + e.wide(head) * b.p.delta_head
        copy_facts(e, "f", facts_of(e, base, n), source, row, b.span.columns, columns, thread, GROUP, True)

    def facts_of(e: Emit, base: I32, n: I32) -> I32:
        return e.opaque(base) + n % at.queries.slots * (columns * _PITCH) + at.facts

    @macro("", "i", "i")
    def publish(e: Emit, base: I32, load: I32) -> None:
        """Say that a load is there: even ones are tiles of queries, odd ones the same tiles of the gradient of out."""
        n = e.max(load, 0) >> 1
        barrier = e.select((load & 1).equals(0), at.queries.full(base, n), at.grads.full(base, n))
        e.arrive(barrier, load >= 0)

    # What the others do.

    @macro(f"{K} {V}")
    def zeros(e: Emit) -> tuple[Regs, Regs]:
        zero = e.const("f", 0.0)
        return [zero] * len(of_keys), [zero] * len(of_values)

    @macro(S, "i", "i", "i")
    def begin_scores(e: Emit, base: I32, group: I32, n: I32) -> Regs:
        """Begin K Q^T."""
        e.fence_products()
        shift = at.queries.shift(n)
        s = product.begin_scores(e, at.key, at.queries.tile, group * ROWS, e.opaque(base), shift)
        e.commit_products()
        return s

    @macro(S, "i", "i", "i")
    def begin_slopes(e: Emit, base: I32, group: I32, n: I32) -> Regs:
        """Begin V dO^T."""
        shift = at.grads.shift(n)
        dp = product.begin_scores(e, at.value, at.grads.tile, group * ROWS, e.opaque(base), shift)
        e.commit_products()
        return dp

    @macro(S, S)
    def scores_done(e: Emit, s: Regs) -> Regs:
        return e.wait_products(1, s)[0]

    @macro(f"{S} {S}", S, S)
    def slopes_done(e: Emit, p: Regs, dp: Regs) -> list[Regs]:
        return e.wait_products(0, p, dp)

    def of_columns(e: Emit, name: str, base: I32, thread: I32, n: I32) -> Regs:
        """One of the `FACTS`, for each register."""
        first = facts_of(e, base, n) + product.lane_column(e.opaque(thread) & 31) * _PITCH + 4 * FACTS.index(name)
        of_column = {n: e.load_shared("f", first + n * _PITCH) for n in dict.fromkeys(n for _, n in layout.elements)}
        return [of_column[n] for _, n in layout.elements]

    @macro(S, BLOCK, "i", "i", S)
    def hide(e: Emit, b: Block, thread: I32, j: I32, s: Regs) -> Regs:
        return lanes.scores(b, thread, j, True).hide(s, b.span)

    @macro("i", PARAMETERS)
    def any_far(e: Emit, p: Parameters) -> I32:
        return e.load("i", p.far)

    @macro(S, "i", "i", "i", S)
    def subtract(e: Emit, base: I32, thread: I32, n: I32, s: Regs) -> Regs:
        """Subtract the maxima of rows whose lse does not determine the denominator."""
        return recenter(e, s, of_columns(e, "maximum", base, thread, n))

    @macro(S, PARAMETERS, "i", "i", "i", S)
    def weigh(e: Emit, p: Parameters, base: I32, thread: I32, n: I32, s: Regs) -> Regs:
        """P of scores."""
        factor, offsets = p.real("factor", "f"), of_columns(e, "offset", base, thread, n)
        return [recompute(e, x, factor, offset, True) for x, offset in zip(s, offsets, strict=True)]

    @macro(f"{W} {W}", "i", "i", "i", S, S)
    def differentiate(e: Emit, base: I32, thread: I32, n: I32, p: Regs, dp: Regs) -> tuple[Regs, Regs]:
        """P, and dS = P (dP - delta), as operands."""
        zero, deltas, ds = e.const("f", 0.0), of_columns(e, "delta", base, thread, n), []
        for weight, x, delta in zip(p, dp, deltas, strict=True):
            ds.append(e.select(weight.equals(0.0), zero, weight * (x - delta)))
        return product.rounded(e, p), product.rounded(e, ds)

    @macro("", "i", "i", "i", W)
    def leave(e: Emit, base: I32, thread: I32, n: I32, words: Regs) -> None:
        """Write dS to shared memory, in one of two tiles by turns, for the products of both warpgroups."""
        warp, lane = lanes.split(e.opaque(thread))
        base = e.opaque(base) + (n & 1) * at.ds.bytes
        for slot in (0, 1):
            place = at.ds.row(base, warp * product.rows + (lane >> 2), 8 * slot)
            for chunk in range(columns // 8):
                e.store_shared("i", at.ds.chunk(place, chunk) + (lane & 3) * 4, [words[2 * chunk + slot]])
        e.fence_proxy()

    @macro("", "i")
    def wait_for_others(e: Emit, base: I32) -> None:
        e.sync_named(e.const("i", _SHARING), GROUPS * GROUP)

    @macro(V, "i", "i", V, W)
    def begin_values(e: Emit, base: I32, n: I32, acc: Regs, words: Regs) -> Regs:
        """Begin dV + P^T dO."""
        e.fence_products()
        acc = product.begin_add(e, acc, words, at.grads.tile, e.opaque(base), at.grads.shift(n))
        e.commit_products()
        return acc

    @macro(Q, "i", "i", "i")
    def begin_queries(e: Emit, base: I32, group: I32, n: I32) -> Regs:
        """Begin dS K, for half of the features."""
        e.fence_products()
        width = c.E // 2
        shift = group * (width // 64 * at.key.slab if width >= 64 else width * LINE // 64)
        dq = product.begin_turned(e, at.ds, at.key, e.opaque(base), (n & 1) * at.ds.bytes, shift, width)
        e.commit_products()
        return dq

    @macro(K, "i", "i", K, W)
    def begin_keys(e: Emit, base: I32, n: I32, acc: Regs, words: Regs) -> Regs:
        """Begin dK + dS^T Q."""
        acc = product.begin_add(e, acc, words, at.queries.tile, e.opaque(base), at.queries.shift(n))
        e.commit_products()
        return acc

    @macro(Q, Q)
    def queries_done(e: Emit, dq: Regs) -> Regs:
        return e.wait_products(1, dq)[0]

    @macro(f"{K} {V}", K, V)
    def sums_done(e: Emit, gk: Regs, gv: Regs) -> list[Regs]:
        return e.wait_products(0, gk, gv)

    @macro("l", BLOCK, "i", "i")
    def sums_of(e: Emit, b: Block, thread: I32, group: I32) -> I64:
        """Where the sums of dQ of a thread begin, in the first query of the first head."""
        warp, lane = lanes.split(thread)
        row, feature = (warp & 3) * product.rows + (lane >> 2), group * (c.E // 2) + (lane & 3) * 4
        return b.places["sum_query"] + e.wide(row) * b.p.sum_query_row + e.wide(feature) * 4

    @macro("", PARAMETERS, "l", "i", "i", "i", "i", Q)
    def add_queries(e: Emit, p: Parameters, sums: I64, thread: I32, head: I32, j: I32, number: I32, dq: Regs) -> None:
        """Add to the sums of dQ, four features of a row at a time (`rowwise.place_by_fours`)."""
        warp, lane = lanes.split(e.opaque(thread))
        rest = p.real("rest", "f")
        start = sums + e.wide(head) * p.sum_query_head + e.wide(j) * p.sum_query_row
        left = number - j - ((warp & 3) * product.rows + (lane >> 2))
        for slot in (0, 1):
            row = start + p.sum_query_row * (8 * slot)
            for n in range(0, len(dq), 8):
                four = [dq[n + 4 * half + 2 * slot + part] * rest for half in (0, 1) for part in (0, 1)]
                e.add_four(row + 8 * n, four, left > 8 * slot)

    @macro("", BLOCK, "i", K, V)
    def finish(e: Emit, b: Block, thread: I32, gk: Regs, gv: Regs) -> None:
        write_own(b, lanes, {"key": (of_keys, gk), "value": (of_values, gv)}, thread)

    def kernel(integers, reals):  # type: ignore[no-untyped-def]
        parameters = integers, reals
        base = shared_address(cuda.shared.array(0, np.uint8))
        thread = np.int32(cuda.threadIdx.x)
        x, y = np.int32(cuda.blockIdx.x), np.int32(cuda.blockIdx.y)
        prepare(base, thread)
        cuda.syncthreads()
        group = warpgroup(thread)
        if group == loader:
            give_registers()
            block, heads = find_work(parameters, x, y)
            first, tiles, _, _, _, whole_rows = queries_seen(block)
            lane = np.int32(thread - first_loader)
            if tiles > 0:
                load_own(block, base, lane)
                n = np.int32(0)
                for of_head in range(heads):
                    head, row = np.int32(of_head), first
                    for _ in range(tiles):
                        whole = row + columns <= whole_rows
                        while query_slot_is_empty(base, n) == 0:
                            pass
                        load_facts(block, base, lane, n, head, row)
                        if whole:
                            load_queries(block, base, lane, n, head, row)
                        else:
                            load_last_queries(block, base, lane, n, head, row)
                        landed_but_some()
                        if n == 0:
                            publish_own(parameters, base, lane)
                        publish(base, np.int32(2 * n - lag))
                        while grad_slot_is_empty(base, n) == 0:
                            pass
                        if whole:
                            load_grads(block, base, lane, n, head, row)
                        else:
                            load_last_grads(block, base, lane, n, head, row)
                        landed_but_some()
                        publish(base, np.int32(2 * n + 1 - lag))
                        n, row = np.int32(n + 1), np.int32(row + columns)
                landed()
                for late in range(lag):
                    publish(base, np.int32(2 * n - lag + late))
        else:
            take_registers()
            block, heads = find_work(parameters, x, y)
            first, tiles, all_begin, all_end, number, _ = queries_seen(block)
            sums = sums_of(block, thread, group)
            gk, gv = zeros()
            if tiles > 0:
                while own_is_there(base) == 0:
                    pass
            n = np.int32(0)
            for of_head in range(heads):
                head, j = np.int32(of_head), first
                for _ in range(tiles):
                    while query_is_there(base, n) == 0:
                        pass
                    s = begin_scores(base, group, n)
                    while grad_is_there(base, n) == 0:
                        pass
                    dp = begin_slopes(base, group, n)
                    s = scores_done(s)
                    if j < all_begin or j + columns > all_end:
                        # Rematerialization: the block is computed anew, so that it does not occupy registers.
                        edge, _ = find_work(parameters, x, y)
                        s = hide(edge, thread, j, s)
                        if any_far(parameters) != 0:
                            s = subtract(base, thread, n, s)
                    p = weigh(parameters, base, thread, n, s)
                    p, dp = slopes_done(p, dp)
                    weights, ds = differentiate(base, thread, n, p, dp)
                    leave(base, thread, n, ds)
                    gv = begin_values(base, n, gv, weights)
                    wait_for_others(base)
                    dq = begin_queries(base, group, n)
                    gk = begin_keys(base, n, gk, ds)
                    dq = queries_done(dq)
                    add_queries(parameters, sums, thread, head, j, number, dq)
                    gk, gv = sums_done(gk, gv)
                    release_query(base, thread, n)
                    release_grad(base, thread, n)
                    n, j = np.int32(n + 1), np.int32(j + columns)
            block, _ = find_work(parameters, x, y)
            finish(block, thread, gk, gv)

    kernel.warpgroups = loader + 1  # type: ignore[attr-defined]
    return kernel


def shared(c: Spec) -> int:
    """Bytes of shared memory of a block."""
    return plan(c).end


def spec_of(c: Spec) -> Spec | None:
    """The kernel here that does what a kernel of `backward` with ``fused_dq`` does; None if there is none."""
    if c.task != "key" or not c.fused_dq or c.E not in SHAPES or not c.suits_warpgroups:
        return None
    return c.with_(product="wgmma", slots=1, warps=4 * GROUPS, columns=QUERIES)
