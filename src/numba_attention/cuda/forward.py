"""The forward pass: FlashAttention-2 (Dao 2023), algorithm 1, of which every product and option is a variant.

A block owns a tile of queries and visits the tiles of keys that any of its rows sees. Keys and values have one tile
each in shared memory, filled by asynchronous copies: values are copied while scores are computed, and the next keys
while values are summed. A quantized cache is copied as codes, which are converted to the tile once the copy has landed;
few rows multiply them as they are (`codes`).
Features beyond those of tiles pass in slices (`operands`), and a block owns a slab of the features of values.
"""

import math

import numpy as np

from . import bias_tiles
from .blocks import (
    FORWARD,
    HEAD,
    Block,
    Lanes,
    block_of,
    make_landed,
    make_marks,
    make_scale,
    packed_block,
    stage,
    work_item,
)
from .codes import Multiplied, arrange_queries, filled, split_scales
from .dropout import drop as drop_weights
from .dropout import first_of_block, kept
from .emit import I32, Emit, KernelFunction, Macro, Regs, Target
from .formats import HALVES
from .operands import Operands, own_slab
from .parameters import PARAMETERS, Parameters
from .products import Layout, Product, TensorCores
from .results import not_finite, write_row
from .softmax import across, fold, lse, relative, start, total
from .spec import Spec
from .staging import Codes, Staged, unpack
from .tiles import Tile
from .visits import aligned, make_visits


def tiles_of(c: Spec) -> tuple[Operands, Tile, int]:
    """Queries and keys, and the tile of values, in shared memory, and the bytes of all.

    Of keys and values that are multiplied as codes, there are only those of `codes_of`.
    """
    product, scored = c.make_product(), Operands(c, ("query", "key"))
    v = Tile(c.columns, c.Ev, c.compute, scored.end)
    end = scored.all.end if c.multiplies_codes else v.end
    if c.product == "simt":
        product.set_columns(c.columns)
        end += product.scratch * c.warps
    return scored, v, end


def codes_of(c: Spec) -> tuple[Codes, Codes]:
    """The codes of a quantized cache, behind the other tiles in shared memory: they become those, or are multiplied."""
    scored, v, end = tiles_of(c)
    k = scored.b
    if c.multiplies_codes:
        of_keys = Multiplied(k.rows, filled(k.columns), c.kv_storage, end)
        return of_keys, Multiplied(v.rows, filled(v.columns), c.kv_storage, of_keys.end)
    keys = Staged(k.rows, k.columns, c.kv_storage, end)
    return keys, Staged(v.rows, v.columns, c.kv_storage, keys.end)


def repeats(c: Spec) -> bool:
    """Whether a block starts over with smaller weights (`softmax.LIFT`) after an accumulator overflowed.

    A sum of values near the largest number overflows, unless all weights are smaller by a power of two. Kernels that
    flag rows leave this to the NaN-safe kernel. float16 cannot overflow a sum in float32.
    """
    return c.task == "forward" and not (c.flags or c.storage == "float16")


def _end(c: Spec) -> int:
    return codes_of(c)[1].end if c.copies_codes else tiles_of(c)[2]


def bias_of(c: Spec) -> Tile | None:
    """The tile of the bias, behind the others."""
    return bias_tiles.tile_of(c, _end(c)) if c.has_bias_tile else None


def _at_lift(c: Spec) -> int:
    of_bias = bias_of(c)
    return _end(c) if of_bias is None else of_bias.end


def shared(c: Spec) -> int:
    """Bytes of shared memory of a block: its tiles, and the flag that it has started over, which saves a register."""
    return _at_lift(c) + (16 if repeats(c) else 0)


def make_arrange(c: Spec, on: Target, tile: Tile) -> Macro:
    """Make the macro that scales queries and stores them as products of codes read them."""

    @on.macro("", PARAMETERS, "i", "i")
    def arrange(e: Emit, p: Parameters, base: I32, thread: I32) -> None:
        arrange_queries(e, tile, HALVES[c.storage], base, p.real("prescale", "f"), thread, c.threads)

    return arrange


def make_product(c: Spec) -> Product:
    product = c.make_product()
    if c.product == "simt":
        product.set_columns(c.columns)
        product.at = tiles_of(c)[1].end
    return product


def write_rows(
    b: Block, lanes: Lanes, features: Layout, thread: I32, m: Regs, l: Regs, scales: Regs, acc: Regs
) -> None:
    """Store rows of `out` and `lse`, of sums of weights relative to the maxima; mark rows that are not finite."""
    e, c, product, kind = b.e, b.c, lanes.product, lanes.product.kind
    thread = e.opaque(thread)
    _, lane = lanes.split(thread)
    zero, low = e.const(kind, 0.0), e.const(kind, -math.inf)
    begins = product.lane_column(lane).equals(0)
    for slot, row in enumerate(lanes.rows(thread)):
        i, head = b.find(b.first + row)
        in_bounds, valid = i < b.rows, i < b.span.rows
        if c.nan_safe:
            in_bounds = in_bounds & (b.is_marked(b.first + row, in_bounds) > 0)
        apart = e.wide(head) if c.pack_gqa else e.const("l", 0)
        some = (l[slot] > 0.0) | e.is_nan(l[slot])
        scale = e.select(some, scales[slot], zero)
        registers = features.of_slot(slot)
        x = [e.select(valid, acc[n] * scale, zero) for n in registers]
        if c.flags:
            bad = across(e, product, not_finite(e, x), lambda a, b: a | b)
            b.mark(b.first + row, bad, in_bounds & begins)
        address = b.places["out"] + apart * b.p.out_head + e.wide(i) * b.p.out_row
        first, width = product.lane_feature(lane), b.p.int("Ev")
        write_row(e, c.result, c.aligned, features, registers, x, address, b.p.out_column, first, width, in_bounds)
        of_row = e.select(some & valid, lse(e, m[slot], l[slot], b.p.real("unit", kind)), low)
        address = b.places["lse"] + apart * b.p.lse_head + e.wide(i) * b.p.lse_row
        e.store(kind, address, [of_row], in_bounds & begins & (b.p.lse > 0))


def make_forward(c: Spec, on: Target) -> KernelFunction:
    """Make the kernel; its grid is tiles for some heads (of keys, of packed GQA), all of those, and splits."""
    cuda, macro, shared_address, landed = on.cuda, on.macro, on.shared(), make_landed(c, on)
    product = make_product(c)
    kind = product.kind
    layout, features = product.layout(c.columns), product.features(c.Ev)
    lanes = Lanes(c, product)
    scored, v, _ = tiles_of(c)
    of_bias = bias_of(c)
    coded, columns = c.copies_codes, c.columns
    # `load_keys` and `load_values` copy to these: the tiles themselves, or codes.
    keys, values = codes_of(c) if coded else (scored.b, v)
    if c.multiplies_codes:
        scored.b, v = keys, values
    # Chunks of codes in flight per thread: a block of one warp has no other warp to hide the latency of shared memory;
    # with several warps the registers are needed elsewhere.
    at_once = 4 if c.warps == 1 else 1
    scale_queries = make_arrange(c, on, scored.all) if c.multiplies_codes else make_scale(c, on, scored.all)
    S, C, M = f"{kind}{len(layout)}", f"{kind}{len(features)}", f"{kind}{product.slots}"
    split_kv, nan_safe, dropout = c.split_kv, c.nan_safe, c.dropout
    may_repeat, at_lift = repeats(c), _at_lift(c)
    # Instruction overlap: the softmax and the product with values in one basic block let the scheduler interleave
    # exponentials with tensor core instructions. Above 64 features there are no registers for both, so the softmax runs
    # before the barrier that waits for values.
    mixed = c.product == "tensor" and max(c.E, c.Ev) <= 64
    BLOCK = packed_block(c, FORWARD)
    any_marked, marked = make_marks(c, on, BLOCK)
    lists, sliced = c.lists, c.is_sliced
    list_of, visit, show = make_visits(c, on, BLOCK, lanes)

    @macro((PARAMETERS, "i"), PARAMETERS, "i")
    def find_slab(e: Emit, p: Parameters, z: I32) -> tuple[Parameters, I32]:
        return own_slab(e, c, p, z)

    @macro(BLOCK, PARAMETERS, "i", "i")
    def find_work(e: Emit, p: Parameters, x: I32, y: I32) -> Block:
        index, tile, head = work_item(e, p, x, y)
        return block_of(e, c, p, FORWARD, index, tile, head)

    @macro("i4", BLOCK, "i")
    def keys_seen(e: Emit, b: Block, part: I32) -> Regs:
        """First key, the one after the last, and those that all rows see."""
        first, _ = b.find(b.first)
        last, _ = b.find(b.first + (c.rows - 1))
        begin, end, all_begin, all_end = b.span.of_rows(first, last)
        if dropout:
            begin = first_of_block(begin)
        if lists:
            begin = aligned(begin)
        if of_bias is not None:
            begin = begin & -8
        elif c.pairs:
            begin = begin & -2
        if split_kv:
            tiles = (e.max(end - begin, 0) + columns - 1) // columns  # (integer division is unsigned)
            share = (tiles + b.p.int("splits") - 1) // b.p.int("splits") * columns
            begin = begin + part * share
            end = e.min(end, begin + share)
        return [begin, end, all_begin, all_end]

    @macro("", BLOCK, "i", "i")
    def load_queries(e: Emit, b: Block, base: I32, thread: I32) -> None:
        scored.load_a(b, base, thread, b.first, b.rows)

    @macro("", BLOCK, "i", "i", "i")
    def load_keys(e: Emit, b: Block, base: I32, thread: I32, j: I32) -> None:
        if coded:
            b.load_tile("key", keys, base, thread, j, b.span.columns)
        else:
            scored.load_b(b, base, thread, j, b.span.columns)
        if of_bias is not None:
            bias_tiles.load(b, of_bias, base, thread, b.first, j)
        b.commit()

    @macro("", BLOCK, "i", "i", "i")
    def load_values(e: Emit, b: Block, base: I32, thread: I32, j: I32) -> None:
        b.load_tile("value", values, base, thread, j, b.span.columns)
        b.commit()

    def convert(e: Emit, codes: Tile, tile: Tile, base: I32, thread: I32, are_keys: bool) -> None:
        """Prepare codes that have landed for the product that reads them."""
        base, thread = e.opaque(base), e.opaque(thread)
        if c.multiplies_codes:
            return split_scales(e, codes, HALVES[c.storage], base, thread, c.threads, are_keys)
        unpack(e, codes, tile, base, thread, c.threads, at_once)

    @macro("", "i", "i")
    def convert_keys(e: Emit, base: I32, thread: I32) -> None:
        convert(e, keys, scored.b, base, thread, True)

    @macro("", "i", "i")
    def convert_values(e: Emit, base: I32, thread: I32) -> None:
        convert(e, values, v, base, thread, False)

    @macro(f"{M} {M} {C}", BLOCK, "i", "i", "i")
    def begin_rows(e: Emit, b: Block, base: I32, thread: I32, part: I32) -> tuple[Regs, Regs, Regs]:
        sinks = None
        first = product.lane_column(thread & 31).equals(0)
        if c.sinks:
            sinks = []
            for row in lanes.rows(thread):
                _, head = b.find(b.first + row)
                sinks.append(b.sink(head, kind))
            if split_kv:
                low = e.const(kind, -math.inf)
                sinks = [e.select(part.equals(0), sink, low) for sink in sinks]
        factor = b.p.real("factor", kind)
        return start(e, product, features, sinks, first, factor, lift_of(e, base) if c.sinks else None)

    @macro(S, BLOCK, "i", "i", "i")
    def multiply_keys(e: Emit, b: Block, base: I32, thread: I32, j: I32) -> Regs:
        return scored.scores(b, product, e.opaque(base), e.opaque(thread), j, b.span.columns)

    staged = c.is_staged

    @macro(S, BLOCK, "i", "i", "i", S)
    def stages(e: Emit, b: Block, base: I32, thread: I32, j: I32, s: Regs) -> Regs:
        biases = None
        if of_bias is not None:
            assert isinstance(product, TensorCores)
            biases = bias_tiles.read(e, product, of_bias, e.opaque(base), e.opaque(thread), False)
        return stage(b, lanes, thread, j, s, biases=biases)[0]

    @macro(S, BLOCK, "i", "i", S)
    def hide(e: Emit, b: Block, thread: I32, j: I32, s: Regs) -> Regs:
        return lanes.scores(b, thread, j).hide(s, b.span)

    @macro(f"{S} {M} {M} {C}", PARAMETERS, "i", S, M, M, C)
    def take_in(
        e: Emit, p: Parameters, base: I32, s: Regs, m: Regs, l: Regs, acc: Regs
    ) -> tuple[Regs, Regs, Regs, Regs]:
        factor = p.real("factor", kind)
        at_once = max(c.E, c.Ev) <= 128 or staged
        return fold(e, product, layout, features, s, m, l, acc, factor, lift_of(e, base), at_once)

    @macro(S, BLOCK, "i", "i", S)
    def drop(e: Emit, b: Block, thread: I32, j: I32, p: Regs) -> Regs:
        return drop_weights(e, product, p, kept(b, lanes, thread, j))

    @macro(C, "i", "i", C, S)
    def add_values(e: Emit, base: I32, thread: I32, acc: Regs, p: Regs) -> Regs:
        return product.add(e, acc, p, v, e.opaque(base), *lanes.split(e.opaque(thread)))

    @macro("i", C)
    def overflows(e: Emit, acc: Regs) -> I32:
        return not_finite(e, acc)

    def lift_of(e: Emit, base: I32) -> I32 | None:
        """The flag in shared memory that is 1 where the block has started over with smaller weights."""
        return e.load_shared("i", base + at_lift) if may_repeat else None

    @macro("i", "i")
    def is_lifted(e: Emit, base: I32) -> I32 | None:
        return lift_of(e, base)

    @macro("", "i", "i", "i")
    def set_lift(e: Emit, base: I32, thread: I32, lift: I32) -> None:
        e.store_shared("i", base + at_lift, [lift], thread.equals(0))

    @macro("", BLOCK, "i", "i", "i", M, M, C)
    def finish(
        e: Emit, b: Block, base: I32, thread: I32, part: I32, m: Regs,
        l: Regs, acc: Regs,
    ) -> None:  # fmt: skip
        l, one = total(e, product, l), b.p.real("dropout_scale", kind) if dropout else e.const(kind, 1.0)
        scales = [one / x for x in l]
        l = relative(e, m, l, b.p.real("factor", kind), lift_of(e, base))
        if split_kv:
            return write_part(b, thread, part, m, l, scales, acc)
        write_rows(b, lanes, features, thread, m, l, scales, acc)

    def write_part(b: Block, thread: I32, part: I32, m: Regs, l: Regs, scales: Regs, acc: Regs) -> None:
        """Split keys: store maximum, sum and result of each row, which `combine` joins."""
        e, size, zero = b.e, 8 if kind == "d" else 4, b.e.const(kind, 0.0)
        _, lane = lanes.split(thread)
        for slot, row in enumerate(lanes.rows(thread)):
            at, in_bounds = b.part_at(part, b.first + row, size), b.exists(b.first + row)
            begins = product.lane_column(lane).equals(0) & in_bounds
            e.store(kind, at, [m[slot]], begins)
            e.store(kind, at + size, [l[slot]], begins)
            at = at + (e.wide(product.lane_feature(lane)) + HEAD) * size
            scale = e.select((l[slot] > 0.0) | e.is_nan(l[slot]), scales[slot], zero)
            registers = features.of_slot(slot)
            for n in range(0, len(registers), features.neighbours):
                x = [acc[i] * scale for i in registers[n : n + features.neighbours]]
                e.store(kind, at + features.elements[registers[n]][1] * size, x, in_bounds)

    def kernel(integers, reals):  # type: ignore[no-untyped-def]
        parameters = integers, reals
        base = shared_address(cuda.shared.array(0, np.uint8))
        thread, part = np.int32(cuda.threadIdx.x), np.int32(cuda.blockIdx.z)
        x, y = np.int32(cuda.blockIdx.x), np.int32(cuda.blockIdx.y)
        if sliced:
            parameters, part = find_slab(parameters, part)
        if nan_safe:
            if any_marked(parameters) == 0:
                return
        if nan_safe:
            block = find_work(parameters, x, y)
            if cuda.syncthreads_or(marked(block, thread)) == 0:
                return
        if may_repeat:
            set_lift(base, thread, np.int32(0))
            cuda.syncthreads()
        ready = False
        while not ready:
            ready = True
            block = find_work(parameters, x, y)
            j, end, all_begin, all_end = keys_seen(block, part)
            if lists:
                begin, until, words = j, np.int32(0), np.int32(0)
                turn, last = list_of(block)
                while (j >= until or j >= end) and turn < last:
                    turn = np.int32(turn + 1)
                    j, until, words, _ = visit(block, turn, last, begin)
            m, l, acc = begin_rows(block, base, thread, part)
            if j < end:
                load_queries(block, base, thread)
                load_keys(block, base, thread, j)
                landed()
                cuda.syncthreads()
                scale_queries(parameters, base, thread)
            while j < end:
                landed()
                cuda.syncthreads()
                if coded:
                    convert_keys(base, thread)
                    cuda.syncthreads()
                load_values(block, base, thread, j)
                s = multiply_keys(block, base, thread, j)
                if staged:
                    s = stages(block, base, thread, j, s)
                if lists:
                    if words != 0:
                        s = show(block, thread, j, words, s)
                if j < all_begin or j + columns > all_end:
                    # Rematerialization: the block is computed anew on tiles at the edge, and at the end, so that it
                    # does not occupy registers throughout the loop.
                    edge = find_work(parameters, x, y)
                    s = hide(edge, thread, j, s)
                if not mixed:
                    p, m, l, acc = take_in(parameters, base, s, m, l, acc)
                landed()
                cuda.syncthreads()
                if coded:
                    convert_values(base, thread)
                    cuda.syncthreads()
                current = j
                j = np.int32(j + columns)
                if lists:
                    while (j >= until or j >= end) and turn < last:
                        turn = np.int32(turn + 1)
                        j, until, words, _ = visit(block, turn, last, begin)
                if j < end:
                    load_keys(block, base, thread, j)
                if mixed:
                    p, m, l, acc = take_in(parameters, base, s, m, l, acc)
                if dropout:
                    p = drop(block, thread, current, p)
                acc = add_values(base, thread, acc, p)
            if may_repeat:
                if cuda.syncthreads_or(overflows(acc)) != 0:
                    if is_lifted(base) == 0:
                        cuda.syncthreads()
                        set_lift(base, thread, np.int32(1))
                        cuda.syncthreads()
                        ready = False
        block = find_work(parameters, x, y)
        finish(block, base, thread, part, m, l, acc)

    return kernel
