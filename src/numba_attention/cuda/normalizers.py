"""Rows whose lse does not determine the denominator: maximum and sum of their scores, for the backward pass.

The lse of a row of scores of -1e9 is -1e9 as float32, however many keys there are. P of such a row is
2**((score - maximum) * factor - log2(sum)), and the last of these is the offset of the row.
"""

import numpy as np

from .blocks import FACTS, FORWARD, Block, Lanes, block_of, make_landed, make_scale, packed_block, stage
from .emit import I32, SIZES, Emit, KernelFunction, Regs, Target
from .forward import make_product, tiles_of
from .parameters import PARAMETERS, Parameters
from .products import Layout
from .softmax import LOG2E, fold, is_far, relative, start, total
from .spec import Spec
from .visits import aligned, make_visits

NAMES = (*FORWARD, "delta")
# How far the lse of a row may exceed that of its keys by rounding, relatively. A larger one is that of more keys than
# these, such as all of a sequence of which the call has a part.
SLACK = {"f": 2.0**-19, "d": 2.0**-48}


def make_normalizers(c: Spec, on: Target) -> KernelFunction:
    """Make the kernel; its grid is tiles of queries of all sequences, and heads."""
    cuda, macro, shared_address, landed = on.cuda, on.macro, on.shared(), make_landed(c, on)
    product = make_product(c)
    kind, columns = product.kind, c.columns
    lanes = Lanes(c, product)
    layout = lanes.layout
    nothing = Layout(product.slots, (), 1)
    scored = tiles_of(c)[0]
    scale_queries = make_scale(c, on, scored.all)
    S, M = f"{kind}{len(layout)}", f"{kind}{product.slots}"
    BLOCK = packed_block(c, NAMES)
    lists = c.lists
    list_of, visit, show = make_visits(c, on, BLOCK, lanes)

    @macro("i", PARAMETERS)
    def any_far(e: Emit, p: Parameters) -> I32:
        return e.load("i", p.far)

    @macro(BLOCK, PARAMETERS, "i", "i")
    def find_work(e: Emit, p: Parameters, x: I32, head: I32) -> Block:
        tiles = p.int("tiles")
        return block_of(e, c, p, NAMES, x // tiles, x % tiles, head)

    @macro("i i i", BLOCK, "i")
    def keys_seen(e: Emit, b: Block, thread: I32) -> tuple[I32, I32, I32]:
        """Whether the row of a thread is far, the first key that a row sees, and the one after the last."""
        begin, end, _, _ = b.span.of_rows(b.first, b.first + (c.rows - 1))
        if lists:
            begin = aligned(begin)
        row = b.first + thread
        in_bounds = (thread < c.rows) & (row < b.span.rows)
        lse = e.load(kind, b.places["lse"] + e.wide(row) * b.p.lse_row, where=in_bounds)
        return e.select(in_bounds & is_far(e, lse), begin - begin + 1, begin - begin), begin, end

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
        sinks = [b.sink(b.head, kind)] * product.slots if c.sinks else None
        first = product.lane_column(thread & 31).equals(0)
        return start(e, product, nothing, sinks, first, b.p.real("factor", kind))[:2]

    @macro(S, BLOCK, "i", "i", "i")
    def scores(e: Emit, b: Block, base: I32, thread: I32, j: I32) -> Regs:
        s = scored.scores(b, product, base, thread, j, b.span.columns)
        if c.is_staged:
            s = stage(b, lanes, thread, j, s)[0]
        return lanes.scores(b, thread, j).hide(s, b.span)

    @macro(f"{M} {M}", PARAMETERS, S, M, M)
    def take_in(e: Emit, p: Parameters, s: Regs, m: Regs, l: Regs) -> tuple[Regs, Regs]:
        return fold(e, product, layout, nothing, s, m, l, [], p.real("factor", kind))[1:3]

    @macro("", BLOCK, "i", M, M)
    def finish(e: Emit, b: Block, thread: I32, m: Regs, l: Regs) -> None:
        l, zero = relative(e, m, total(e, product, l), b.p.real("factor", kind)), e.const(kind, 0.0)
        begins = product.lane_column(thread & 31).equals(0)
        for slot, row in enumerate(lanes.rows(thread)):
            at = b.first + row
            in_bounds = begins & (at < b.span.rows)
            lse = e.load(kind, b.places["lse"] + e.wide(at) * b.p.lse_row, where=in_bounds)
            more = e.fma(m[slot], zero - b.p.real("unit", kind), lse)  # ln(sum), up to the rounding of the lse
            own = e.log2(l[slot])
            whole = more <= own * (1 / LOG2E) + e.abs(lse) * SLACK[kind]
            offset = zero - e.select(whole, own, more * LOG2E)
            address, where = b.places["delta"] + e.wide(at) * b.p.delta_row, in_bounds & is_far(e, lse)
            for name, x in (("offset", offset), ("maximum", m[slot])):
                e.store(kind, address + FACTS.index(name) * SIZES[kind], [x], where)

    def kernel(integers, reals):  # type: ignore[no-untyped-def]
        parameters = integers, reals
        base = shared_address(cuda.shared.array(0, np.uint8))
        thread = np.int32(cuda.threadIdx.x)
        if any_far(parameters) == 0:
            return
        block = find_work(parameters, np.int32(cuda.blockIdx.x), np.int32(cuda.blockIdx.y))
        far, j, end = keys_seen(block, thread)
        if cuda.syncthreads_or(far) == 0:
            return
        if lists:
            begin, until, words = j, np.int32(0), np.int32(0)
            turn, last = list_of(block)
            while (j >= until or j >= end) and turn < last:
                turn = np.int32(turn + 1)
                j, until, words, _ = visit(block, turn, last, begin)
        m, l = begin_rows(block, thread)
        load_queries(block, base, thread)
        landed()
        cuda.syncthreads()
        scale_queries(parameters, base, thread)
        while j < end:
            load_keys(block, base, thread, j)
            landed()
            cuda.syncthreads()
            s = scores(block, base, thread, j)
            if lists:
                if words != 0:
                    s = show(block, thread, j, words, s)
            m, l = take_in(parameters, s, m, l)
            cuda.syncthreads()
            j = np.int32(j + columns)
            if lists:
                while (j >= until or j >= end) and turn < last:
                    turn = np.int32(turn + 1)
                    j, until, words, _ = visit(block, turn, last, begin)
        finish(block, thread, m, l)

    return kernel
