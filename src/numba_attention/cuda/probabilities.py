"""The probabilities themselves, for `attention_weights`, in two passes over keys: maxima and sums, then weights."""

import numpy as np

from .blocks import FORWARD, Block, Lanes, block_of, make_landed, make_scale, packed_block, stage
from .dropout import kept
from .emit import I32, Emit, KernelFunction, Regs, Target
from .formats import HALVES, SIZES
from .forward import make_product, tiles_of
from .parameters import PARAMETERS, Parameters
from .products import Layout
from .results import write_row
from .softmax import center, fold, start, total
from .spec import Spec


def make_weights(c: Spec, on: Target) -> KernelFunction:
    """Make the kernel; its grid is tiles of chosen rows, of sequences that are one chosen head each."""
    cuda, macro, shared_address, landed = on.cuda, on.macro, on.shared(), make_landed(c, on)
    product = make_product(c)
    kind, columns = product.kind, c.columns
    lanes = Lanes(c, product)
    layout = lanes.layout
    nothing = Layout(product.slots, (), 1)
    scored = tiles_of(c)[0]
    scale_queries = make_scale(c, on, scored.all)
    S, M = f"{kind}{len(layout)}", f"{kind}{product.slots}"
    BLOCK = packed_block(c, FORWARD)
    staged = c.is_staged

    @macro((BLOCK, "i"), PARAMETERS, "i")
    def find_work(e: Emit, p: Parameters, x: I32) -> tuple[Block, I32]:
        tiles = p.int("tiles")
        b = block_of(e, c, p, FORWARD, x // tiles, x % tiles, e.const("i", 0))
        b.rows = p.int("number")  # the rows of the list
        return b, b.span.columns

    @macro("", BLOCK, "i", "i")
    def load_queries(e: Emit, b: Block, base: I32, thread: I32) -> None:
        scored.load_a(b, base, thread, b.first, b.rows)
        b.commit()

    @macro("", BLOCK, "i", "i", "i")
    def load_keys(e: Emit, b: Block, base: I32, thread: I32, j: I32) -> None:
        scored.load_b(b, base, thread, j, b.span.columns)
        b.commit()

    @macro(f"{M} {M}", BLOCK, "i")
    def begin_rows(e: Emit, b: Block, thread: I32) -> tuple[Regs, Regs]:
        sinks = None
        if c.sinks:
            sinks = [b.sink(b.head, kind)] * product.slots
        first = product.lane_column(thread & 31).equals(0)
        return start(e, product, nothing, sinks, first, b.p.real("factor", kind))[:2]

    @macro(S, BLOCK, "i", "i", "i")
    def scores(e: Emit, b: Block, base: I32, thread: I32, j: I32) -> Regs:
        s = scored.scores(b, product, base, thread, j, b.span.columns)
        if staged:
            s = stage(b, lanes, thread, j, s)[0]
        return lanes.scores(b, thread, j).hide(s, b.span)

    @macro(f"{M} {M}", PARAMETERS, S, M, M)
    def take_in(e: Emit, p: Parameters, s: Regs, m: Regs, l: Regs) -> tuple[Regs, Regs]:
        factor = p.real("factor", kind)
        return fold(e, product, layout, nothing, s, m, l, [], factor)[1:3]

    @macro(M, M)
    def sums(e: Emit, l: Regs) -> Regs:
        return total(e, product, l)

    @macro("", BLOCK, "i", "i", S, M, M)
    def write(e: Emit, b: Block, thread: I32, j: I32, s: Regs, m: Regs, l: Regs) -> None:
        factor, zero = b.p.real("factor", kind), e.const(kind, 0.0)
        apart, offsets, _ = center(e, product, layout, s, m, factor)
        keeps = kept(b, lanes, thread, j) if c.dropout else []
        for slot, row in enumerate(lanes.rows(thread)):
            at = b.first + row
            some = (l[slot] > 0.0) | e.is_nan(l[slot])
            registers = layout.of_slot(slot)
            weights, one = [], e.const(kind, 1.0) / l[slot]
            for n in registers:
                hidden = product.is_hidden(e, s[n])
                weight = e.exp2(e.fma(apart[n], factor, offsets[slot]))
                # A division is a branch for each weight; a half type does not show the difference.
                share = weight * one if c.storage in HALVES else weight / l[slot]
                weights.append(e.select(hidden, zero, e.select(some, share, zero)))
            if c.dropout:
                scale = b.p.real("dropout_scale", kind)
                weights = [e.select(keeps[n], x * scale, zero) for n, x in zip(registers, weights, strict=True)]
            store(b, registers, weights, thread, at, j)

    def store(b: Block, registers: list[int], weights: Regs, thread: I32, row: I32, j: I32) -> None:
        """Store weights of a row, of half types both neighbours together where rows begin at even elements."""
        e, p, keys = b.e, b.p, b.p.int("inner_tiles")  # all keys, valid or not
        address, column = b.places["out"] + e.wide(row) * p.out_row, p.out_column
        first, inside = product.lane_column(thread & 31) + j, row < b.rows
        if layout.neighbours == 1:
            return write_row(e, c.storage, False, layout, registers, weights, address, column, first, keys, inside)
        size = SIZES[c.storage]
        odd = (e.narrow(b.places["out"] | p.out_row) & (2 * size - 1)) + (keys & 1)
        together = odd.equals(0) & column.equals(size)
        write_row(e, c.storage, True, layout, registers, weights, address, column, first, keys, inside & together)
        apart = together ^ 1

        def each(state: Regs) -> Regs:
            where = inside & apart
            write_row(e, c.storage, False, layout, registers, weights, address, column, first, keys, where)
            return state

        e.when(apart, [], each)

    @macro("i", PARAMETERS)
    def all_keys(e: Emit, p: Parameters) -> I32:
        return p.int("inner_tiles")

    def kernel(integers, reals):  # type: ignore[no-untyped-def]
        parameters = integers, reals
        base = shared_address(cuda.shared.array(0, np.uint8))
        thread = np.int32(cuda.threadIdx.x)
        block, end = find_work(parameters, np.int32(cuda.blockIdx.x))
        m, l = begin_rows(block, thread)
        load_queries(block, base, thread)
        landed()
        cuda.syncthreads()
        scale_queries(parameters, base, thread)
        j = np.int32(0)
        while j < end:
            load_keys(block, base, thread, j)
            landed()
            cuda.syncthreads()
            m, l = take_in(parameters, scores(block, base, thread, j), m, l)
            cuda.syncthreads()
            j = np.int32(j + columns)
        l = sums(l)
        j, end = np.int32(0), all_keys(parameters)
        while j < end:
            load_keys(block, base, thread, j)
            landed()
            cuda.syncthreads()
            write(block, thread, j, scores(block, base, thread, j), m, l)
            cuda.syncthreads()
            j = np.int32(j + columns)

    return kernel
