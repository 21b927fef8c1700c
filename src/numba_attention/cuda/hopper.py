"""The forward pass of half types on sm_90a: FlashAttention-3 (Shah et al. 2024), sections 3.1 and 3.2.

One warpgroup copies tiles of keys and values into rings of slots, the others compute, 64 queries each. A warpgroup
begins the scores of the next tile and the sum of this one, and computes the softmax of the next tile while the sum
goes on (3.2). Two of them take turns to begin products, so that one computes exponentials while the other multiplies
(3.1). Rows whose result is not finite are left to the NaN-safe kernel of `forward`.
"""

from dataclasses import dataclass

import numpy as np

from .blocks import FORWARD, Block, Lanes, block_of, packed_block, stage, work_item
from .emit import I32, Emit, KernelFunction, Real, Regs, Target
from .forward import write_rows
from .loading import make_landed, make_loads, make_once, rows_of, rows_that_are_whole
from .parameters import PARAMETERS, Parameters
from .products import Layout
from .softmax import fold, relative, start, total
from .spec import Spec
from .tiles import fetch
from .warpgroups import AT_ONCE, GROUP, ROWS, Ring, Slabs, Warpgroups, init_barriers, make_done, make_roles, make_waits

# Head dimension: warpgroups that compute, keys of a tile, slots of a ring, loads in flight before one is waited for,
# and registers of a thread of the warpgroup that loads and of the others.
SHAPES = {64: (3, 128, 3, 2, 32, 160), 128: (2, 176, 2, 1, 40, 232), 256: (2, 80, 2, 1, 40, 232)}
OPTIONS = ("softcap", "alibi", "sinks")  # that kernels here have
# One rescaling factor of each row, in place of its accumulators, for `softmax.fold`.
_FACTORS = Layout(2, ((0, 0), (1, 0)), 1)


@dataclass(frozen=True)
class Plan:
    """Shared memory of a block."""

    queries: Slabs
    keys: Ring
    values: Ring
    landed: int  # the barrier of the queries
    end: int


def plan(c: Spec) -> Plan:
    slots = SHAPES[c.E][2]
    queries = Slabs(c.rows, c.E, c.storage, 0)
    key = Slabs(c.columns, c.E, c.storage, queries.end)
    value = Slabs(c.columns, c.Ev, c.storage, key.offset + slots * key.bytes)
    keys = Ring(key, slots, value.offset + slots * value.bytes)
    values = Ring(value, slots, keys.end)
    return Plan(queries, keys, values, values.end, values.end + 8)


def make_hopper(c: Spec, on: Target) -> KernelFunction:
    """Make the kernel; its grid is tiles for some heads, and all of those."""
    cuda, macro, shared_address = on.cuda, on.macro, on.shared()
    product = c.make_product()
    assert isinstance(product, Warpgroups)
    lanes, layout, features = Lanes(c, product), product.layout(c.columns), product.features(c.Ev)
    at, columns, loader = plan(c), c.columns, c.warps // 4
    queries, keys, values = at.queries, at.keys, at.values
    _, _, _, lag, few_registers, many_registers = SHAPES[c.E]
    in_turn, staged = loader == 2, c.is_staged
    S, M, C = f"f{len(layout)}", f"f{product.slots}", f"f{len(features)}"
    W = f"i{len(layout) // 2}"
    BLOCK = packed_block(c, FORWARD)
    key_is_there, key_slot_is_empty, release_key = make_waits(on, keys)
    value_is_there, value_slot_is_empty, release_value = make_waits(on, values)
    load_keys, load_last_keys = make_loads(on, BLOCK, c.storage, "key", keys)
    load_values, load_last_values = make_loads(on, BLOCK, c.storage, "value", values)
    warpgroup, give_registers, take_registers = make_roles(on, few_registers, many_registers)
    publish_queries, queries_are_there = make_once(on, queries, at.landed)
    landed_but_some, landed = make_landed(on, lag)
    first_scores, scores_done = make_done(on, 0, S), make_done(on, 1, S)
    sum_done, last_sum_done = make_done(on, 0, C, S), make_done(on, 0, C)

    @macro("", "i", "i")
    def prepare(e: Emit, base: I32, thread: I32) -> None:
        init_barriers(e, [keys, values], base, thread, loader, at.landed)

    @macro(BLOCK, PARAMETERS, "i", "i")
    def find_work(e: Emit, p: Parameters, x: I32, y: I32) -> Block:
        index, tile, head = work_item(e, p, x, y)
        return block_of(e, c, p, FORWARD, index, tile, head)

    @macro("i5", BLOCK)
    def keys_seen(e: Emit, b: Block) -> Regs:
        """First key, how many tiles there are from it on, the keys that all rows see, and those in whole rows."""
        begin, end, all_begin, all_end = b.span.of_rows(b.first, b.first + (c.rows - 1))
        tiles = (e.max(end - begin, 0) + (columns - 1)) // columns
        return [begin, tiles, all_begin, all_end, rows_that_are_whole(b, b.span.columns)]

    # What the warpgroup that loads does.

    @macro("", BLOCK, "i", "i")
    def load_queries(e: Emit, b: Block, base: I32, thread: I32) -> None:
        rows = rows_of(b, "query", b.places["query"], b.first, b.rows)
        fetch(e, queries, e.opaque(base), rows, e.opaque(thread), GROUP, c.storage, True, most=AT_ONCE)
        e.commit()

    # Loads have numbers: 0 is the first tile of keys, 2 n - 1 that of keys number n, 2 n + 2 that of values number n.
    # A number that stands for no tile, behind the last keys, counts as a load of nothing.

    @macro("", "i", "i", "i")
    def publish(e: Emit, base: I32, load: I32, tiles: I32) -> None:
        """Say that a load is there."""
        of_keys = (load & 1).equals(1) | load.equals(0)
        key = (load + 1) >> 1
        value = e.max((load >> 1) - 1, 0)
        barrier = e.select(of_keys, keys.full(base, key), values.full(base, value))
        exists = (load >= 0) & ((key < tiles) | (load & 1).equals(0))
        e.arrive(barrier, exists)

    # What the others do.

    @macro(f"{M} {M} {C}", BLOCK, "i")
    def begin_rows(e: Emit, b: Block, thread: I32) -> tuple[Regs, Regs, Regs]:
        sinks = [b.sink(b.head, "f")] * product.slots if c.sinks else None
        first = product.lane_column(thread & 31).equals(0)
        return start(e, product, features, sinks, first, b.p.real("factor", "f"))

    @macro("f", BLOCK)
    def slope_of_head(e: Emit, b: Block) -> Real:
        return b.slope(b.head, "f") if c.alibi else e.const("f", 0.0)

    @macro(S, BLOCK, "i", "i", "f", S)
    def stages(e: Emit, b: Block, thread: I32, j: I32, slope: Real, s: Regs) -> Regs:
        return stage(b, lanes, thread, j, s, slopes=[slope] * product.slots)[0]

    @macro("", "i")
    def wait_for_turn(e: Emit, group: I32) -> None:
        e.sync_named(group + 1, 2 * GROUP)

    @macro("", "i")
    def pass_turn(e: Emit, group: I32) -> None:
        following = e.select(group.equals(loader - 1), e.const("i", 1), group + 2)
        e.arrive_named(following, 2 * GROUP)

    @macro(S, "i", "i", "i")
    def begin_scores(e: Emit, base: I32, group: I32, n: I32) -> Regs:
        e.fence_products()
        s = product.begin_scores(e, queries, keys.tile, group * ROWS, e.opaque(base), keys.shift(n))
        e.commit_products()
        return s

    @macro(C, "i", "i", C, W)
    def begin_sum(e: Emit, base: I32, n: I32, acc: Regs, words: Regs) -> Regs:
        acc = product.begin_add(e, acc, words, values.tile, e.opaque(base), values.shift(n))
        e.commit_products()
        return acc

    @macro(C, "i", "i", C, W)
    def begin_last_sum(e: Emit, base: I32, n: I32, acc: Regs, words: Regs) -> Regs:
        e.fence_products()
        acc = product.begin_add(e, acc, words, values.tile, e.opaque(base), values.shift(n))
        e.commit_products()
        return acc

    @macro(S, BLOCK, "i", "i", S)
    def hide(e: Emit, b: Block, thread: I32, j: I32, s: Regs) -> Regs:
        return lanes.scores(b, thread, j).hide(s, b.span)

    @macro(f"{S} {M} {M} {M}", PARAMETERS, S, M, M)
    def take_in(e: Emit, p: Parameters, s: Regs, m: Regs, l: Regs) -> tuple[Regs, Regs, Regs, Regs]:
        """Weights, maxima, sums, and what accumulators are to be multiplied by."""
        ones = [e.const("f", 1.0)] * len(_FACTORS)
        return fold(e, product, layout, _FACTORS, s, m, l, ones, p.real("factor", "f"))

    @macro("i", M)
    def never(e: Emit, l: Regs) -> I32:
        return e.select((l[0] + l[1]) < -1.0, e.const("i", 1), e.const("i", 0))

    @macro("", "i")
    def keep_order(e: Emit, base: I32) -> None:
        e.arrive(base + at.landed)

    @macro(W, S)
    def rounded(e: Emit, p: Regs) -> Regs:
        return product.rounded(e, p)

    @macro(C, C, M)
    def rescale(e: Emit, acc: Regs, factors: Regs) -> Regs:
        return [x * factors[slot] for x, (slot, _) in zip(acc, features.elements, strict=True)]

    @macro("", BLOCK, "i", M, M, C)
    def finish(e: Emit, b: Block, thread: I32, m: Regs, l: Regs, acc: Regs) -> None:
        l, one = total(e, product, l), e.const("f", 1.0)
        scales = [one / x for x in l]
        l = relative(e, m, l, b.p.real("factor", "f"))
        write_rows(b, lanes, features, thread, m, l, scales, acc)

    first_loader = loader * GROUP

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
            block = find_work(parameters, x, y)
            j, tiles, _, _, whole = keys_seen(block)
            lane, zero = np.int32(thread - first_loader), np.int32(0)
            if tiles > 0:
                load_queries(block, base, lane)
                for step in range(2 * tiles + 1):
                    load = np.int32(step)
                    if load == 0 or load & 1:
                        n = np.int32((load + 1) >> 1)
                        row = np.int32(j + n * columns)
                        if n < tiles:
                            while key_slot_is_empty(base, n) == 0:
                                pass
                            if row + columns <= whole:
                                load_keys(block, base, lane, n, zero, row)
                            else:
                                load_last_keys(block, base, lane, n, zero, row)
                    else:
                        n = np.int32((load >> 1) - 1)
                        row = np.int32(j + n * columns)
                        while value_slot_is_empty(base, n) == 0:
                            pass
                        if row + columns <= whole:
                            load_values(block, base, lane, n, zero, row)
                        else:
                            load_last_values(block, base, lane, n, zero, row)
                    landed_but_some()
                    if load == 0:
                        publish_queries(parameters, base, lane)
                    publish(base, np.int32(load - lag), tiles)
                landed()
                for late in range(lag):
                    publish(base, np.int32(2 * tiles + 1 - lag + late), tiles)
        else:
            take_registers()
            block = find_work(parameters, x, y)
            j, tiles, all_begin, all_end, _ = keys_seen(block)
            m, l, acc = begin_rows(block, thread)
            slope = slope_of_head(block)
            if tiles > 0:
                if in_turn and group == loader - 1:
                    pass_turn(group)  # the last one lets the first begin
                while queries_are_there(base) == 0:
                    pass
                while key_is_there(base, np.int32(0)) == 0:
                    pass
                s = first_scores(begin_scores(base, group, np.int32(0)))
                release_key(base, thread, np.int32(0))
                if staged:
                    s = stages(block, thread, j, slope, s)
                if j < all_begin or j + columns > all_end:
                    s = hide(block, thread, j, s)
                p, m, l, factors = take_in(parameters, s, m, l)
                words = rounded(p)
                for step in range(1, tiles):
                    n, before = np.int32(step), np.int32(step - 1)
                    while key_is_there(base, n) == 0:
                        pass
                    while value_is_there(base, before) == 0:
                        pass
                    if in_turn:
                        wait_for_turn(group)
                    s = begin_scores(base, group, n)
                    acc = begin_sum(base, before, acc, words)
                    if in_turn:
                        pass_turn(group)
                    s = scores_done(s)
                    release_key(base, thread, n)
                    j = np.int32(j + columns)
                    if staged:
                        s = stages(block, thread, j, slope, s)
                    if j < all_begin or j + columns > all_end:
                        # Rematerialization: the block is computed anew, so that it does not occupy registers.
                        edge = find_work(parameters, x, y)
                        s = hide(edge, thread, j, s)
                    p, m, l, factors = take_in(parameters, s, m, l)
                    if never(l) != 0:  # a branch that the compiler moves no exponential across
                        keep_order(base)
                    acc, p = sum_done(acc, p)
                    release_value(base, thread, before)
                    words = rounded(p)
                    acc = rescale(acc, factors)
                last = np.int32(tiles - 1)
                while value_is_there(base, last) == 0:
                    pass
                acc = last_sum_done(begin_last_sum(base, last, acc, words))
            block = find_work(parameters, x, y)
            finish(block, thread, m, l, acc)

    kernel.warpgroups = loader + 1  # type: ignore[attr-defined]
    return kernel


def shared(c: Spec) -> int:
    """Bytes of shared memory of a block."""
    return plan(c).end


def spec_of(c: Spec) -> Spec | None:
    """The kernel here that does what a kernel of `forward` does; None if there is none."""
    if c.task != "forward" or c.E not in SHAPES or not c.suits_warpgroups(*OPTIONS):
        return None
    groups, columns, *_ = SHAPES[c.E]
    # A sum of bfloat16 numbers may overflow, and then the NaN-safe kernel repeats the row with smaller weights.
    flags = c.flags or c.storage == "bfloat16"
    return c.with_(product="wgmma", slots=1, warps=4 * groups, columns=columns, flags=flags)
