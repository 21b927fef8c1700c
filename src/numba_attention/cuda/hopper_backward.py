"""The backward pass of half types on sm_90a in one kernel: FlashAttention-3 (Shah et al. 2024), appendix B.

A block owns 128 keys, a warpgroup 64 of them, and one more warpgroup copies tiles of queries and of the gradient of
`out` into rings of slots. Scores are transposed, so that P is an operand in registers of dV. dS goes to shared memory,
where a warpgroup reads its own rows for dK, and both read all of them for their half of dQ: half of the queries of a
tile, or of the features. A thread adds that half to memory by one asynchronous instruction, which reads shared memory
while products go on (`Emit.add_rows`).

Products of a tile go on beside the softmax of the next one: its scores and dP are begun before dK of this tile, or its
last part. The rules are those of `backward`.
"""

from dataclasses import dataclass

import numpy as np

from .backward import NAMES, copy_facts, mended, write_own
from .blocks import FACTS, Block, Lanes, block_of, packed_block, stage, work_item
from .emit import I32, I64, Emit, KernelFunction, Real, Regs, Target
from .loading import make_landed, make_loads, make_once, rows_of, rows_that_are_whole
from .parameters import PARAMETERS, Parameters
from .rowwise import PART, TURN
from .softmax import recenter, recompute
from .spec import Spec
from .tiles import CHUNK, fetch
from .warpgroups import AT_ONCE, GROUP, ROWS, Ring, Slabs, Warpgroups, init_barriers, make_done, make_roles, make_waits

# Head dimension: queries of a tile, slots of the rings of queries and of gradients, loads in flight before one is
# waited for, how many steps of 16 queries of dK are begun before dQ is added, and registers of a thread that loads and
# of one that computes.
SHAPES = {64: (128, 3, 2, 1, 0, 40, 232), 128: (64, 3, 2, 1, 2, 40, 232)}
# That kernels here have. Beside P and dO V^T, no registers are left for the derivatives of a softcap.
OPTIONS = ("alibi",)
GROUPS = 2  # warpgroups that compute
_SHARING = 1  # the named barrier behind which dS of both warpgroups is there; those of each warpgroup follow
_PITCH = 4 * len(FACTS)  # bytes of the facts of a query
_ROW = 4 * PART  # bytes of the features of a query whose gradient a warpgroup sums
_PART = ROWS * _ROW


@dataclass(frozen=True)
class Plan:
    """Shared memory of a block."""

    key: Slabs
    value: Slabs
    queries: Ring
    grads: Ring  # of `out`
    ds: Slabs  # the first of two
    dq: int  # 64 rows of 64 features in float32, of each warpgroup
    facts: int  # of the queries in each slot
    landed: int  # the barrier of keys and values
    end: int


def plan(c: Spec) -> Plan:
    _, query_slots, grad_slots, *_ = SHAPES[c.E]
    key = Slabs(c.rows, c.E, c.storage, 0)
    value = Slabs(c.rows, c.Ev, c.storage, key.end)
    query = Slabs(c.columns, c.E, c.storage, value.end)
    grad = Slabs(c.columns, c.Ev, c.storage, query.offset + query_slots * query.bytes)
    ds = Slabs(c.rows, c.columns, c.storage, grad.offset + grad_slots * grad.bytes)
    dq = ds.offset + 2 * ds.bytes
    facts = dq + GROUPS * _PART
    queries = Ring(query, query_slots, facts + query_slots * c.columns * _PITCH)
    grads = Ring(grad, grad_slots, queries.end)
    return Plan(key, value, queries, grads, ds, dq, facts, grads.end, grads.end + 8)


def make_hopper_backward(c: Spec, on: Target) -> KernelFunction:
    """Make the kernel; its grid is tiles of keys for some key heads, and all of those."""
    cuda, macro, shared_address = on.cuda, on.macro, on.shared()
    product = c.make_product()
    assert isinstance(product, Warpgroups)
    lanes, layout = Lanes(c, product), product.layout(c.columns)
    of_keys, of_values, of_queries = product.features(c.E), product.features(c.Ev), product.features(PART)
    at, columns, loader, first_loader = plan(c), c.columns, GROUPS, GROUPS * GROUP
    *_, lag, early, few_registers, many_registers = SHAPES[c.E]
    staged = c.is_staged
    by_rows = c.columns == GROUPS * ROWS  # how warpgroups share out dQ: by rows or by features
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
    # Products that are waited for: of the first tile, of others beside dK of the tile before, and of the last one.
    first_scores_done, first_slopes_done = make_done(on, 1, S), make_done(on, 0, S, S)
    scores_done, slopes_done, keys_done = make_done(on, 2, S), make_done(on, 1, S, S), make_done(on, 0, K)
    values_done, queries_done, both_done = make_done(on, 1, V), make_done(on, 1, Q), make_done(on, 1, V, Q)
    last_done, sums_done = make_done(on, 2 if early else 1, V, Q), make_done(on, 0, K, V)

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
        e.fence_products()
        shift = at.grads.shift(n)
        dp = product.begin_scores(e, at.value, at.grads.tile, group * ROWS, e.opaque(base), shift)
        e.commit_products()
        return dp

    def of_columns(e: Emit, name: str, base: I32, thread: I32, n: I32) -> Regs:
        """One of the `FACTS`, for each register."""
        first = facts_of(e, base, n) + product.lane_column(e.opaque(thread) & 31) * _PITCH + 4 * FACTS.index(name)
        of_column = {n: e.load_shared("f", first + n * _PITCH) for n in dict.fromkeys(n for _, n in layout.elements)}
        return [of_column[n] for _, n in layout.elements]

    @macro("f", BLOCK, "i")
    def slope_of_head(e: Emit, b: Block, head: I32) -> Real:
        return b.slope(b.head * b.p.int("group") + head, "f") if c.alibi else e.const("f", 0.0)

    @macro(S, BLOCK, "i", "i", "i", "f", S)
    def stages(e: Emit, b: Block, thread: I32, head: I32, j: I32, slope: Real, s: Regs) -> Regs:
        """The derivatives of all of them are 1."""
        return stage(b, lanes, thread, j, s, head, slopes=[slope] * product.slots)[0]

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

    @macro("")
    def wait_for_others(e: Emit) -> None:
        """Wait until dS of both warpgroups is there, and what this one has added has been read."""
        e.wait_added(read=True)
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
        """Begin dS K, for half of the queries of a tile or half of the features."""
        e.fence_products()
        of_ds, of_key = (n & 1) * at.ds.bytes, n - n
        if by_rows:
            of_ds = of_ds + group * at.ds.slab
        else:
            of_key = group * at.key.slab
        dq = product.begin_turned(e, at.ds, at.key, e.opaque(base), of_ds, of_key, PART)
        e.commit_products()
        return dq

    def add_keys(e: Emit, base: I32, group: I32, n: I32, acc: Regs, steps: range) -> Regs:
        e.fence_products()
        of_ds, of_query = (n & 1) * at.ds.bytes, at.queries.shift(n)
        acc = product.begin_add_shared(
            e, acc, at.ds, at.queries.tile, group * ROWS, e.opaque(base), of_ds, of_query, steps
        )
        e.commit_products()
        return acc

    @macro(K, "i", "i", "i", K)
    def begin_keys(e: Emit, base: I32, group: I32, n: I32, acc: Regs) -> Regs:
        """Begin dK + dS^T Q, for the first queries of the tile."""
        return add_keys(e, base, group, n, acc, range(early))

    @macro(K, "i", "i", "i", K)
    def begin_other_keys(e: Emit, base: I32, group: I32, n: I32, acc: Regs) -> Regs:
        return add_keys(e, base, group, n, acc, range(early, columns // 16))

    @macro("l", BLOCK, "i")
    def sums_of(e: Emit, b: Block, group: I32) -> I64:
        """Where the sums of dQ of a warpgroup begin, in the first tile of the first head (`rowwise.sums_of_row`)."""
        if by_rows:
            return b.places["sum_query"] + e.wide(group) * _PART
        return b.places["sum_query"] + e.wide(group) * (b.p.sum_query_head // GROUPS)

    @macro("", PARAMETERS, "i", "l", "i", "i", "i", "i", Q)
    def add_queries(
        e: Emit, p: Parameters, base: I32, sums: I64, thread: I32, head: I32, j: I32, number: I32, dq: Regs
    ) -> None:
        """Add to the sums of dQ: 64 rows of 64 features lie side by side, here and in memory."""
        thread = e.opaque(thread)
        warp, lane = lanes.split(thread)
        group, row = thread // GROUP, (warp & 3) * product.rows + (lane >> 2)
        start = e.opaque(base) + group * _PART + row * _ROW + (lane & 3) * CHUNK + at.dq
        turn = ((row + j) & 1) * TURN  # eight rows lie in the same banks
        for slot in (0, 1):
            for n in range(0, len(dq), 8):
                four = [dq[n + 4 * half + 2 * slot + part] for half in (0, 1) for part in (0, 1)]
                turned = start + turn if n % 16 == 0 else start - turn
                e.store_shared("f", turned + (8 * n + 8 * slot * _ROW), four)
        e.fence_proxy()
        e.sync_named(group + (_SHARING + 1), GROUP)
        first = j + group * ROWS if by_rows else j
        rows = e.min(number - first, ROWS)
        target = sums + e.wide(head) * p.sum_query_head + e.wide(j) * _ROW
        lead = (thread & (GROUP - 1)).equals(0) & (rows > 0)
        e.add_rows(target, e.opaque(base) + group * _PART + at.dq, rows * _ROW, lead)

    @macro("", BLOCK, "i", K, V)
    def finish(e: Emit, b: Block, thread: I32, gk: Regs, gv: Regs) -> None:
        e.wait_added(read=False)
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
            sums = sums_of(block, group)
            gk, gv = zeros()
            if tiles > 0:
                while own_is_there(base) == 0:
                    pass
                n, last, head, j = np.int32(0), np.int32(heads * tiles - 1), np.int32(0), first
                end = np.int32(first + tiles * columns)
                while query_is_there(base, n) == 0:
                    pass
                s = begin_scores(base, group, n)
                while grad_is_there(base, n) == 0:
                    pass
                dp = begin_slopes(base, group, n)
                slope = slope_of_head(block, head)
                s = first_scores_done(s)
                if staged:
                    s = stages(block, thread, head, j, slope, s)
                if j < all_begin or j + columns > all_end:
                    s = hide(block, thread, j, s)
                    if any_far(parameters) != 0:
                        s = subtract(base, thread, n, s)
                p = weigh(parameters, base, thread, n, s)
                p, dp = first_slopes_done(p, dp)
                weights, ds = differentiate(base, thread, n, p, dp)
                while n < last:
                    leave(base, thread, n, ds)
                    gv = begin_values(base, n, gv, weights)
                    wait_for_others()
                    dq = begin_queries(base, group, n)
                    following = np.int32(n + 1)
                    if early > 0:
                        gk = begin_keys(base, group, n, gk)
                        gv, dq = both_done(gv, dq)
                        release_grad(base, thread, n)
                        add_queries(parameters, base, sums, thread, head, j, number, dq)
                        while query_is_there(base, following) == 0:
                            pass
                        s = begin_scores(base, group, following)
                    else:
                        gv = values_done(gv)
                        release_grad(base, thread, n)
                        while query_is_there(base, following) == 0:
                            pass
                        s = begin_scores(base, group, following)
                        dq = queries_done(dq)
                        add_queries(parameters, base, sums, thread, head, j, number, dq)
                    while grad_is_there(base, following) == 0:
                        pass
                    dp = begin_slopes(base, group, following)
                    gk = begin_other_keys(base, group, n, gk)
                    s = scores_done(s)
                    j = np.int32(j + columns)
                    if j == end:
                        head, j = np.int32(head + 1), first
                        slope = slope_of_head(block, head)
                    if staged:
                        s = stages(block, thread, head, j, slope, s)
                    if j < all_begin or j + columns > all_end:
                        # Rematerialization: the block is computed anew, so that it does not occupy registers.
                        edge, _ = find_work(parameters, x, y)
                        s = hide(edge, thread, j, s)
                        if any_far(parameters) != 0:
                            s = subtract(base, thread, following, s)
                    p = weigh(parameters, base, thread, following, s)
                    p, dp = slopes_done(p, dp)
                    weights, ds = differentiate(base, thread, following, p, dp)
                    gk = keys_done(gk)
                    release_query(base, thread, n)
                    n = following
                leave(base, thread, n, ds)
                gv = begin_values(base, n, gv, weights)
                wait_for_others()
                dq = begin_queries(base, group, n)
                if early > 0:
                    gk = begin_keys(base, group, n, gk)
                gk = begin_other_keys(base, group, n, gk)
                gv, dq = last_done(gv, dq)
                add_queries(parameters, base, sums, thread, head, j, number, dq)
                gk, gv = sums_done(gk, gv)
            block, _ = find_work(parameters, x, y)
            finish(block, thread, gk, gv)

    kernel.warpgroups = loader + 1  # type: ignore[attr-defined]
    return kernel


def shared(c: Spec) -> int:
    """Bytes of shared memory of a block."""
    return plan(c).end


def spec_of(c: Spec) -> Spec | None:
    """The kernel here that does what a kernel of `backward` with ``fused_dq`` does; None if there is none."""
    if c.task != "key" or not c.fused_dq or c.E not in SHAPES or not c.suits_warpgroups(*OPTIONS):
        return None
    return c.with_(product="wgmma", slots=1, warps=4 * GROUPS, columns=SHAPES[c.E][0])
