"""Sums over tiles: features in the lanes, where the gradients of key and value grow, and the gradient of a bias."""

from typing import Any

import numpy as np

from .gemm import micro_kernel
from .pairs import pair_tile
from .simd import I64, Builder, Value, at, load, loop, pointer, routine, store, void_pointer
from .softmax import SUM_ROWS
from .spec import Spec
from .tiles import drop_nonfinite as drop_nonfinite_of
from .tiles import has_nan as any_nan
from .tiles import row_group, widen_tile
from .views import carray

CLEAN, DIRTY, LOST = range(3)  # marks of rows: finite, NaN or infinity in grad_out, NaN in lse


def sum_blocks(spec: Spec) -> tuple[tuple[int, int], ...]:
    """Rows x vectors of the micro-kernels for the widest panel, for two vectors and for one, as registers allow."""
    return spec._replace(vectors=0).block, (SUM_ROWS if spec.host.registers == 32 else SUM_ROWS // 2, 2), (SUM_ROWS, 1)


def add_products(spec: Spec) -> Any:
    """Make ``add(sums, tile, panels, n, features)``: sums[j, e] += sum_lane tile[j, lane] rows[lane, e].

    `panels` holds the rows as `copy_rows` laid them out, `features` is padded; rows of the tile from n to the next
    multiple of `SUM_ROWS` must be 0. With bfloat16 dot products the tile is one that `pairs.narrow_tile` has rounded.
    """
    vector = spec.vector
    BM, size = spec.query_tile, vector.bytes
    depth = BM // 2 if spec.bf16_dot else BM  # in words
    row_bytes = depth * size
    (rows_wide, _), (rows_two, _), (rows_one, _) = blocks = sum_blocks(spec)
    mm_wide, mm_two, mm_one = (micro_kernel(spec, "sum", block) for block in blocks)
    wide, two, one = (n * vector.width for _, n in blocks)

    @spec.jit
    def add(sums: int, tile: int, panels: int, n: int, features: int) -> None:
        pitch = features * size
        e = 0
        while features - e >= wide:
            for j in range(0, n, rows_wide):
                c, a, b = sums + j * pitch + e * size, tile + j * row_bytes, panels + e * BM * size
                mm_wide(c, pitch, a, row_bytes, size, rows_wide, b, wide * size, depth, 0)
            e += wide
        while features - e >= two:
            for j in range(0, n, rows_two):
                c, a, b = sums + j * pitch + e * size, tile + j * row_bytes, panels + e * BM * size
                mm_two(c, pitch, a, row_bytes, size, rows_two, b, two * size, depth, 0)
            e += two
        if features - e >= one:
            for j in range(0, n, rows_one):
                c, a, b = sums + j * pitch + e * size, tile + j * row_bytes, panels + e * BM * size
                mm_one(c, pitch, a, row_bytes, size, rows_one, b, one * size, depth, 0)

    return add


def copy_rows(spec: Spec) -> Any:
    """Make ``copy(panels, rows, stride, features, padded, marks)``: the rows of a tile, widened, for `add_products`.

    A panel is as many features as the widest micro-kernel takes, of all rows, so that a panel fits the cache without
    gaps: of 128 features in one piece, the half in use shares half of the sets of the cache (2 % slower). NaN and
    infinity become 0, because weights may be 0 and 0 * NaN is NaN; `marks` is a table of int64 that is set to DIRTY for
    rows that had some, or 0. Returns whether any had. With bfloat16 dot products a panel becomes pairs of rows.
    """
    vector = spec.vector
    BM, W, size = spec.query_tile, vector.width, vector.bytes
    real: Any = vector.dtype
    wide, two, _ = (n * vector.width for _, n in sum_blocks(spec))
    bf16_dot, pair = spec.bf16_dot, pair_tile(spec)
    widen, has_nan, drop_nonfinite = widen_tile(spec), any_nan(spec), drop_nonfinite_of(spec)

    @spec.jit
    def copy(panels: int, rows: int, stride: int, features: int, padded: int, marks: int) -> bool:
        addresses = carray(void_pointer(rows), BM, np.int64)
        dirty = carray(void_pointer(marks), BM, np.int64)
        e = 0
        while e < padded:
            left = padded - e
            width = wide if left >= wide else two if left >= two else left
            count = min(width, features - e)
            panel = panels + e * BM * size
            if count < width:
                carray(void_pointer(panel), (BM, width), real)[:, count:] = 0
            for lane in range(BM):
                widen(panel + lane * width * size, addresses[lane] + e * stride, 0, stride, 1, count)
            e += width
        nonfinite: bool = has_nan(panels, padded)
        e = 0
        while (nonfinite or bf16_dot) and e < padded:
            left = padded - e
            width = wide if left >= wide else two if left >= two else left
            panel = panels + e * BM * size
            for lane in range(BM if nonfinite else 0):
                if drop_nonfinite(panel + lane * width * size, width) and marks != 0:
                    dirty[lane] = max(dirty[lane], DIRTY)
            if bf16_dot:
                pair(panel, panel, BM, width // W)
            e += width
        return nonfinite

    return copy


def write_sums(spec: Spec) -> Any:
    """Make ``write(target, row, rows, count, sums, pitch, factor)``: rows of `sums`, times a factor, rounded.

    `row` and `pitch` are strides in bytes; columns are contiguous. A row of sums is padded, one of the target is not.
    """
    vector, element = spec.vector, spec.out_element
    W, size = vector.width, element.size

    def build(
        b: Builder, target: Value, row: Value, rows: Value, count: Value, sums: Value, pitch: Value, factor: Value
    ) -> None:
        c = vector.splat(b, factor)
        whole = b.sdiv(count, I64(W))

        def line(r: Value, carried: list[Value]) -> list[Value]:
            def block(i: Value, inner: list[Value]) -> list[Value]:
                p, q = inner
                element.store(vector, b, b.fmul(vector.load(b, q), c), p)
                return [at(b, p, W * size), at(b, q, W * vector.bytes)]

            def single(i: Value, inner: list[Value]) -> list[Value]:
                p, q = inner
                element.store_one(vector, b, b.fmul(load(b, vector.element, q, align=vector.bytes), factor), p)
                return [at(b, p, size), at(b, q, vector.bytes)]

            rest = loop(b, whole, carried, block)
            loop(b, b.srem(count, I64(W)), rest, single)
            return [at(b, carried[0], row), at(b, carried[1], pitch)]

        loop(b, rows, [pointer(b, target), pointer(b, sums)], line)

    kind = "f64" if vector.bits == 64 else "f32"
    return routine(f"target row rows count sums pitch factor:{kind}", build)


def add_sums(spec: Spec) -> Any:
    """Make ``add(sums, others, n)``: sums += others, n bytes of both, a multiple of a vector."""
    vector = spec.vector
    width = vector.bytes * vector.width

    def build(b: Builder, sums: Value, others: Value, n: Value) -> None:
        def body(i: Value, carried: list[Value]) -> list[Value]:
            p, q = carried
            vector.store(b, b.fadd(vector.load(b, p), vector.load(b, q)), p)
            return [at(b, p, width), at(b, q, width)]

        loop(b, b.sdiv(n, I64(width)), [pointer(b, sums), pointer(b, others)], body)

    return routine("sums others n", build)


def add_transposed(spec: Spec) -> Any:
    """Make ``add(tile, rows, offset, stride, count, spare, once)``: row(lane)[c] += tile[c, lane].

    Rows may be the same row. `rows` is a table of addresses of compute values, `offset` and `stride` are in bytes; a
    stride of 0 sums over c, and then `spare` is room for a row of the tile. `once` says that rows of different lanes
    are different, begin at the same place of a vector, hold zeros, and get these columns only once: they are then
    written past the caches. Adding would read the zeros of new pages from memory: a backward pass of 2048 positions
    takes 0.92 to 0.94 of the time without it.
    """
    vector = spec.vector
    W, BM, size = vector.width, spec.query_tile, vector.bytes
    width = size * W
    tile_row = spec.block[1] * width

    def blocks(streams: bool) -> Any:
        def build(b: Builder, tile: Value, rows: Value, offset: Value, count: Value) -> None:
            def group(g: Value, _: list[Value]) -> list[Value]:
                zero, targets = vector.const(0.0), [at(b, row_group(b, rows, g, W, r), offset) for r in range(W)]
                source = at(b, pointer(b, tile), b.mul(g, I64(width)))

                def block(i: Value, _: list[Value]) -> list[Value]:
                    first = b.mul(i, I64(W))
                    p = at(b, source, b.mul(first, I64(tile_row)))
                    lines = [vector.load(b, p, r * tile_row) for r in range(W)]
                    for target, line in zip(targets, vector.transpose(b, lines), strict=True):
                        q = at(b, target, b.mul(first, I64(size)))
                        if streams:
                            vector.stream(b, b.fadd(zero, line), q)  # -0.0 becomes 0.0, as where it is added
                        else:
                            vector.store(b, b.fadd(vector.load(b, q), line), q)
                    return []

                loop(b, b.sdiv(count, I64(W)), [], block)
                return []

            loop(b, I64(spec.block[1]), [], group)

        return routine("tile rows offset count", build)

    by_block, past_caches = blocks(False), blocks(True)

    def columns(b: Builder, tile: Value, rows: Value, offset: Value, stride: Value, first: Value, count: Value) -> None:
        def lane(i: Value, _: list[Value]) -> list[Value]:
            target = at(b, row_group(b, rows, i, 1, 0), offset)
            source = at(b, pointer(b, tile), b.mul(i, I64(size)))

            def column(c: Value, carried: list[Value]) -> list[Value]:
                (p,) = carried
                c = b.add(c, first)
                q = at(b, target, b.mul(c, stride))
                x = load(b, vector.element, p, align=size)
                store(b, b.fadd(load(b, vector.element, q, align=size), x), q, align=size)
                return [at(b, p, tile_row)]

            loop(b, b.sub(count, first), [at(b, source, b.mul(first, I64(tile_row)))], column)
            return []

        loop(b, I64(BM), [], lane)

    one_by_one = routine("tile rows offset stride first count", columns)

    def totals(b: Builder, tile: Value, count: Value, target: Value) -> None:
        def row(c: Value, carried: list[Value]) -> list[Value]:
            p, *total = carried
            return [at(b, p, tile_row)] + [b.fadd(x, vector.load(b, p, v * width)) for v, x in enumerate(total)]

        zeros = [vector.const(0.0)] * spec.block[1]
        _, *total = loop(b, count, [pointer(b, tile), *zeros], row)
        for v, x in enumerate(total):
            vector.store(b, x, pointer(b, target), v * width)

    sum_columns = routine("tile count target", totals)

    def lanes(b: Builder, tile: Value, target: Value, count: Value) -> None:
        def row(c: Value, carried: list[Value]) -> list[Value]:
            p, q = carried
            x = vector.load(b, p)
            for v in range(1, spec.block[1]):
                x = b.fadd(x, vector.load(b, p, v * width))
            total = vector.sum(b, x)
            store(b, b.fadd(load(b, vector.element, q, align=size), total), q, align=size)
            return [at(b, p, tile_row), at(b, q, size)]

        loop(b, count, [pointer(b, tile), pointer(b, target)], row)

    sum_lanes = routine("tile target count", lanes)

    @spec.jit
    def add(tile: int, rows: int, offset: int, stride: int, count: int, spare: int, once: bool) -> None:
        addresses = carray(void_pointer(rows), BM, np.int64)
        same = True
        for lane in range(1, BM):
            same = same and addresses[lane] == addresses[0]
        if stride == 0:
            sum_columns(tile, count, spare)
            tile, count = spare, 1
        if same and stride == size:
            sum_lanes(tile, addresses[0] + offset, count)
        elif stride == size:
            # The lanes that a partial tile does not use are copies of its last row, to which they add 0.
            if once and (addresses[0] + offset) % width == 0 and addresses[BM - 1] != addresses[BM - 2]:
                past_caches(tile, rows, offset, count)
            else:
                by_block(tile, rows, offset, count)
            one_by_one(tile, rows, offset, stride, count - count % W, count)
        else:
            one_by_one(tile, rows, offset, stride, 0, count)

    return add
