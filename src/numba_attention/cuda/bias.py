"""The gradient of a bias: dS summed over the sequences, heads, rows and keys that share an element, in a fixed order.

A block owns a tile of the bias before broadcasting. It recomputes dS of every tile of scores that shares it, one after
the other, and sums in registers. Where all rows or all keys share an element, it sums over the tile at the end.
"""

import numpy as np

from .blocks import BACKWARD, Block, Lanes, block_of, make_landed, make_scale, packed_block, stage
from .emit import I32, Emit, KernelFunction, Pred, Real, Regs, Target
from .parameters import PARAMETERS, Parameters, Sequence
from .score_gradients import Tiles
from .spec import Spec

NAMES = (*BACKWARD, "grad_bias")


def make_bias(c: Spec, on: Target) -> KernelFunction:
    """Make the kernel; its grid is owners among sequences x tiles of rows x tiles of keys, and heads of the bias."""
    cuda, macro, shared_address, landed = on.cuda, on.macro, on.shared(), make_landed(c, on)
    product, tiles = c.make_product(), Tiles(c)
    kind, columns, threads, rows = product.kind, c.columns, c.threads, c.rows
    if c.product == "simt":
        product.set_columns(columns)
    lanes = Lanes(c, product)
    layout = lanes.layout
    S = f"{kind}{len(layout)}"
    size = tiles.size
    scale_queries = make_scale(c, on, tiles.s.all)
    BLOCK = packed_block(c, NAMES)

    @macro("i8", PARAMETERS, "i", "i")
    def shares(e: Emit, p: Parameters, x: I32, head: I32) -> Regs:
        """First row and the one after the last, keys, heads and members that share this tile; one step is one tile."""
        key_tiles = p.int("inner_tiles")
        key, x = x % key_tiles * columns, x // key_tiles
        row, owner = x % p.int("tiles") * rows, x // p.int("tiles")
        begin = e.load("l", p.members + e.wide(owner) * 8)
        end = e.load("l", p.members + e.wide(owner) * 8 + 8)
        all_rows, all_keys = p.int("bias_rows").equals(1), p.int("bias_keys").equals(1)
        far = e.const("i", 2**30)
        heads = p.int("bias_heads").equals(1)
        return [
            row, e.select(all_rows, far, row + 1), key, e.select(all_keys, far, key + 1),
            e.select(heads, e.const("i", 0), head), e.select(heads, p.int("heads"), head + 1),
            e.narrow(begin), e.narrow(end),
        ]  # fmt: skip

    @macro((BLOCK, "i", "i"), PARAMETERS, "i", "i", "i")
    def member(e: Emit, p: Parameters, n: I32, head: I32, row: I32) -> tuple[Block, I32, I32]:
        """A sequence that shares the tile, and how many rows and keys it has."""
        index = e.narrow(e.load("l", p.members + (e.wide(n) + p.number + 1) * 8))
        b = block_of(e, c, p, NAMES, index, e.const("i", 0), head)
        b.first = row
        return b, b.span.rows, b.span.columns

    @macro("", BLOCK, "i", "i", "i")
    def load(e: Emit, b: Block, base: I32, thread: I32, j: I32) -> None:
        tiles.load(b, base, thread, j)

    @macro(S, BLOCK, "i", "i", "i", S)
    def add(e: Emit, b: Block, base: I32, thread: I32, j: I32, acc: Regs) -> Regs:
        """Add the dS of one tile, before the slope of the softcap, which comes before the bias."""
        s = tiles.scores(b, product, e.opaque(base), e.opaque(thread), j)
        s = stage(b, lanes, thread, j, s)[0]
        s = lanes.scores(b, thread, j).hide(s, b.span)
        return [x + y for x, y in zip(acc, tiles.gradients_of_scores(b, lanes, base, thread, j, s), strict=True)]

    @macro(S)
    def zeros(e: Emit) -> Regs:
        return [e.const(kind, 0.0)] * len(layout)

    @macro("", "i", "i", S)
    def leave(e: Emit, base: I32, thread: I32, acc: Regs) -> None:
        column = product.lane_column(thread & 31)
        places = lanes.rows(thread)
        for (slot, n), x in zip(layout.elements, acc, strict=True):
            e.store_shared(kind, base + (places[slot] * columns + column + n) * size, [x])

    @macro("", BLOCK, "i", "i", "i", "i")
    def write(e: Emit, b: Block, base: I32, thread: I32, row: I32, key: I32) -> None:
        """Sum over what the tile shares, and store."""
        p, zero = b.p, e.const(kind, 0.0)
        all_rows, all_keys = p.int("bias_rows").equals(1), p.int("bias_keys").equals(1)
        s = Sequence(e, p, b.index)
        one = e.const("i", 1)
        most_rows, most_keys = (  # of the bias, or of this sequence in a bias of packed sequences
            e.select(p.int(f"bias_{axis}").equals(0), s.int(of), p.int(f"bias_{axis}"))
            for axis, of in (("rows", "rows"), ("keys", "key_rows"))
        )

        def store(i: I32, j: I32, x: Real, where: Pred) -> None:
            at = e.wide(e.select(all_rows, one - one, row + i)) * p.grad_bias_row
            at = at + e.wide(e.select(all_keys, one - one, key + j)) * p.grad_bias_column
            e.store(kind, b.places["grad_bias"] + at, [x], where)

        def element(i: I32, j: I32) -> Real:
            return e.load_shared(kind, base + (i * columns + j) * size)

        # Work of a thread: thread n sums row or column n, or stores the elements n, n + threads, ...
        whole = all_rows & all_keys
        neither = (all_rows | all_keys) ^ 1
        column = e.select(thread < columns, thread, thread - thread)
        line = e.select(thread < rows, thread, thread - thread)
        sums = e.loop(rows, [zero], lambda i, t: [t[0] + element(i, column)])[0]
        store(one - one, column, sums, all_rows & (all_keys ^ 1) & (thread < columns) & (key + column < most_keys))
        sums = e.loop(columns, [zero], lambda j, t: [t[0] + element(line, j)])[0]
        store(line, one - one, sums, all_keys & (all_rows ^ 1) & (thread < rows) & (row + line < most_rows))
        sums = e.loop(rows * columns, [zero], lambda n, t: [t[0] + e.load_shared(kind, base + n * size)])[0]
        store(one - one, one - one, sums, whole & thread.equals(0))

        def each(n: I32, state: Regs) -> Regs:
            index = n * threads + thread
            i, j = index // columns, index % columns
            store(
                i, j, e.load_shared(kind, base + index * size), neither & (row + i < most_rows) & (key + j < most_keys)
            )
            return state

        e.loop(rows * columns // threads, [], each)

    def kernel(integers, reals):  # type: ignore[no-untyped-def]
        parameters = integers, reals
        base = shared_address(cuda.shared.array(0, np.uint8))
        thread = np.int32(cuda.threadIdx.x)
        first_row, last_row, first_key, last_key, first_head, last_head, begin, end = shares(
            parameters, np.int32(cuda.blockIdx.x), np.int32(cuda.blockIdx.y)
        )
        acc = zeros()
        for n in range(begin, end):
            for h in range(first_head, last_head):
                row = first_row
                block, valid_rows, valid_keys = member(parameters, np.int32(n), np.int32(h), row)
                while row < min(last_row, valid_rows):
                    block, _, _ = member(parameters, np.int32(n), np.int32(h), row)
                    key = first_key
                    while key < min(last_key, valid_keys):
                        load(block, base, thread, key)
                        landed()
                        cuda.syncthreads()
                        scale_queries(parameters, base, thread)
                        cuda.syncthreads()
                        acc = add(block, base, thread, key, acc)
                        cuda.syncthreads()
                        key = np.int32(key + columns)
                    row = np.int32(row + rows)
        leave(base, thread, acc)
        cuda.syncthreads()
        block, _, _ = member(parameters, begin, first_head, first_row)
        write(block, base, thread, first_row, first_key)

    return kernel
