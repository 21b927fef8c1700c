"""Sums over tiles: features in the lanes, where the gradients of key and value grow, and the gradient of a bias."""

from typing import Any

import numpy as np
from numba import carray

from .elements import Spec
from .gemm import micro_kernel
from .simd import I64, Builder, Value, at, load, loop, pointer, routine, store, void_pointer
from .softmax import SUM_ROWS
from .tiles import row_group


def padded(spec: Spec, features: int) -> int:
    """Features of a row of sums: a multiple of a vector's width."""
    W = spec.vector.width
    return -(-features // W) * W


def add_products(spec: Spec) -> Any:
    """Make ``add(sums, tile, copy, n, features)``: sums[j, e] += sum_lane tile[j, lane] copy[lane, e].

    `features` is padded; rows of the tile from n to the next multiple of `SUM_ROWS` must be 0.
    """
    vector = spec.vector
    BM, NV = spec.query_tile, spec.block[1]
    size, row_bytes = vector.bytes, BM * vector.bytes
    wide = NV * vector.width
    mm_wide = micro_kernel(spec, "sum", (4, NV), dot=False)
    mm_two, mm_one = (micro_kernel(spec, "sum", (SUM_ROWS, n), dot=False) for n in (2, 1))
    two, one = 2 * vector.width, vector.width

    @spec.jit
    def add(sums: int, tile: int, copy: int, n: int, features: int) -> None:
        pitch = features * size
        e = 0
        while features - e >= wide:
            for j in range(0, n, 4):
                mm_wide(
                    sums + j * pitch + e * size, pitch, tile + j * row_bytes, row_bytes, size, 4,
                    copy + e * size, pitch, BM, 0,
                )  # fmt: skip
            e += wide
        while features - e >= two:
            for j in range(0, n, SUM_ROWS):
                mm_two(
                    sums + j * pitch + e * size, pitch, tile + j * row_bytes, row_bytes, size, SUM_ROWS,
                    copy + e * size, pitch, BM, 0,
                )  # fmt: skip
            e += two
        if features - e >= one:
            for j in range(0, n, SUM_ROWS):
                mm_one(
                    sums + j * pitch + e * size, pitch, tile + j * row_bytes, row_bytes, size, SUM_ROWS,
                    copy + e * size, pitch, BM, 0,
                )  # fmt: skip

    return add


def write_sums(spec: Spec) -> Any:
    """Make ``write(target, row, rows, count, sums, pitch, groups, group, factor)``.

    Row r of `target` becomes factor times the sum of rows r of the groups, in order, rounded. `row`, `pitch` and
    `group` are strides in bytes; columns of the target are contiguous.
    """
    vector, element = spec.vector, spec.element
    W, size = vector.width, element.size

    def build(
        b: Builder, target: Value, row: Value, rows: Value, count: Value,
        sums: Value, pitch: Value, groups: Value, group: Value, factor: Value,
    ) -> None:  # fmt: skip
        c = vector.splat(b, factor)

        def line(r: Value, carried: list[Value]) -> list[Value]:
            out, source = carried

            def total(width: int, first: Value) -> Value:
                ty = vector.type if width > 1 else vector.element
                zero = vector.const(0.0) if width > 1 else vector.element(0.0)

                def add(g: Value, inner: list[Value]) -> list[Value]:
                    p, x = inner
                    x = b.fadd(x, load(b, ty, p, align=vector.bytes))
                    return [at(b, p, group), x]

                start = at(b, source, b.mul(first, I64(vector.bytes)))
                return loop(b, groups, [start, zero], add)[1]

            def block(i: Value, _: list[Value]) -> list[Value]:
                first = b.mul(i, I64(W))
                x = b.fmul(total(W, first), c)
                element.store(vector, b, x, at(b, out, b.mul(first, I64(size))))
                return []

            def single(i: Value, _: list[Value]) -> list[Value]:
                e = b.add(b.mul(whole, I64(W)), i)
                x = b.fmul(total(1, e), factor)
                element.store_one(vector, b, x, at(b, out, b.mul(e, I64(size))))
                return []

            whole = b.sdiv(count, I64(W))
            loop(b, whole, [], block)
            loop(b, b.srem(count, I64(W)), [], single)
            return [at(b, out, row), at(b, source, pitch)]

        loop(b, rows, [pointer(b, target), pointer(b, sums)], line)

    kind = "f64" if vector.bits == 64 else "f32"
    return routine(f"target row rows count sums pitch groups group factor:{kind}", build)


def add_transposed(spec: Spec) -> Any:
    """Make ``add(tile, rows, offset, stride, count, spare)``: row(lane)[c] += tile[c, lane]; rows may be the same row.

    `rows` is a table of addresses of compute values, `offset` and `stride` are in bytes; a stride of 0 sums over c, and
    then `spare` is room for a row of the tile.
    """
    vector = spec.vector
    W, BM, size = vector.width, spec.query_tile, vector.bytes
    width = size * W
    tile_row = spec.block[1] * width

    def blocks(b: Builder, tile: Value, rows: Value, offset: Value, count: Value) -> None:
        def group(g: Value, _: list[Value]) -> list[Value]:
            targets = [at(b, row_group(b, rows, g, W, r), offset) for r in range(W)]
            source = at(b, pointer(b, tile), b.mul(g, I64(width)))

            def block(i: Value, _: list[Value]) -> list[Value]:
                first = b.mul(i, I64(W))
                p = at(b, source, b.mul(first, I64(tile_row)))
                lines = [vector.load(b, p, r * tile_row) for r in range(W)]
                for target, line in zip(targets, vector.transpose(b, lines), strict=True):
                    q = at(b, target, b.mul(first, I64(size)))
                    vector.store(b, b.fadd(vector.load(b, q), line), q)
                return []

            loop(b, b.sdiv(count, I64(W)), [], block)
            return []

        loop(b, I64(spec.block[1]), [], group)

    by_block = routine("tile rows offset count", blocks)

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
    def add(tile: int, rows: int, offset: int, stride: int, count: int, spare: int) -> None:
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
            by_block(tile, rows, offset, count)
            one_by_one(tile, rows, offset, stride, count - count % W, count)
        else:
            one_by_one(tile, rows, offset, stride, 0, count)

    return add
