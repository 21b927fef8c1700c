"""The gradient of a bias: dS summed over the sequences, heads, rows and keys that share an element, in a fixed order.

A block owns a tile of the bias before broadcasting. It recomputes dS of every tile of scores that shares it, one after
the other, and sums in registers. Where all rows or all keys share an element, it sums over the tile at the end.
"""

import numpy as np

from .blocks import BACKWARD, Block, Lanes, block_of, make_landed, make_scale, packed_block, stage
from .emit import I32, I64, Emit, KernelFunction, Regs, Target
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

    def bounds(b: Block) -> tuple[I32, I32]:
        """Rows and keys of the bias, or of this sequence in a bias of packed sequences."""
        s = Sequence(b.e, b.p, b.index)
        most = (
            b.e.select(b.p.int(f"bias_{axis}").equals(0), s.int(of), b.p.int(f"bias_{axis}"))
            for axis, of in (("rows", "rows"), ("keys", "key_rows"))
        )
        return tuple(most)  # type: ignore[return-value]

    def address(b: Block, row: I32, key: I32) -> I64:
        """Of an element of the gradient."""
        e, p = b.e, b.p
        at: I64 = b.places["grad_bias"] + e.wide(row) * p.grad_bias_row + e.wide(key) * p.grad_bias_column
        return at

    @macro("", BLOCK, "i", "i", "i", S)
    def write(e: Emit, b: Block, thread: I32, row: I32, key: I32, acc: Regs) -> None:
        """Store the elements that a thread has: with its neighbours it fills sectors of 32 bytes."""
        most_rows, most_keys = bounds(b)
        key = key + product.lane_column(thread & 31)
        at = [address(b, row + i, key) for i in lanes.rows(thread)]
        inside = [row + i < most_rows for i in lanes.rows(thread)]
        for (slot, n), x in zip(layout.elements, acc, strict=True):
            e.store(kind, at[slot] + b.p.grad_bias_column * n, [x], inside[slot] & (key + n < most_keys))

    @macro("", BLOCK, "i", "i", "i", "i")
    def sum_rows(e: Emit, b: Block, base: I32, thread: I32, row: I32, key: I32) -> None:
        """All rows share an element: thread n sums column n, or is idle."""
        inside = thread < columns
        at = base + e.select(inside, thread, thread - thread) * size
        zero = e.const(kind, 0.0)
        x = e.loop(rows, [zero], lambda i, t: [t[0] + e.load_shared(kind, at + i * (columns * size))])[0]
        e.store(kind, address(b, row - row, key + thread), [x], inside & (key + thread < bounds(b)[1]))

    @macro("", BLOCK, "i", "i", "i", "i")
    def sum_keys(e: Emit, b: Block, base: I32, thread: I32, row: I32, key: I32) -> None:
        """All keys share an element: thread n sums row n, from column n on so that threads read different banks."""
        inside = thread < rows
        line = e.select(inside, thread, thread - thread)
        zero = e.const(kind, 0.0)
        x = e.loop(
            columns, [zero],
            lambda j, t: [t[0] + e.load_shared(kind, base + (line * columns + (j + line) % columns) * size)],
        )[0]  # fmt: skip
        e.store(kind, address(b, row + thread, key - key), [x], inside & (row + thread < bounds(b)[0]))

    @macro("", "i", "i")
    def fold(e: Emit, base: I32, thread: I32) -> None:
        """Leave the sum of every thread's share of the tile in its first elements."""
        zero, at = e.const(kind, 0.0), base + thread * size
        x = e.loop(
            rows * columns // threads, [zero], lambda n, t: [t[0] + e.load_shared(kind, at + n * (threads * size))]
        )[0]
        e.store_shared(kind, at, [x])

    @macro("", BLOCK, "i", "i")
    def sum_all(e: Emit, b: Block, base: I32, thread: I32) -> None:
        """All rows and all keys share one element."""
        zero = e.const(kind, 0.0)
        x = e.loop(threads, [zero], lambda n, t: [t[0] + e.load_shared(kind, base + n * size)])[0]
        e.store(kind, address(b, thread - thread, thread - thread), [x], thread.equals(0))

    @macro("i i", PARAMETERS)
    def shared_axes(e: Emit, p: Parameters) -> tuple[I32, I32]:
        """1 where all rows, or all keys, share an element."""
        one, zero = e.const("i", 1), e.const("i", 0)
        rows_and_keys = (e.select(p.int(f"bias_{axis}").equals(1), one, zero) for axis in ("rows", "keys"))
        return tuple(rows_and_keys)  # type: ignore[return-value]

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
        block, _, _ = member(parameters, begin, first_head, first_row)
        all_rows, all_keys = shared_axes(parameters)
        if all_rows == 0 and all_keys == 0:
            write(block, thread, first_row, first_key, acc)
        else:
            leave(base, thread, acc)
            cuda.syncthreads()
            if all_keys == 0:
                sum_rows(block, base, thread, first_row, first_key)
            elif all_rows == 0:
                sum_keys(block, base, thread, first_row, first_key)
            else:
                fold(base, thread)
                cuda.syncthreads()
                sum_all(block, base, thread)

    return kernel
