"""Moving tiles between the arrays of the caller and scratch: transposed, widened, rounded.

Rows are found through a table of addresses, one per lane, in which the last row stands in for those a partial tile
lacks; so no routine here has a ragged edge in the lanes. Along the other axis, blocks of a vector's width cover what
they can and the last one overlaps its neighbour; what is narrower than a vector, or has a stride, goes one number at a
time.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from .elements import Element
from .simd import I64, Builder, Value, Vector, at, load, loop, pointer, prefetch, routine, store, void_pointer
from .spec import Spec
from .views import carray

LINE = 64  # bytes of a cache line


def _real(vector: Vector) -> str:
    return "f64" if vector.bits == 64 else "f32"


def row_group(b: Builder, rows: Value, group: Value, width: int, r: int) -> Value:
    """The byte pointer to row group * width + r of a table of int64 addresses."""
    index = b.add(b.mul(group, I64(width * 8)), I64(r * 8))
    return pointer(b, load(b, I64, pointer(b, rows), index, align=8))


@cache  # one function for all that gather the same elements, so that a kernel compiles it once
def gather_tile(spec: Spec, element: Element) -> Any:
    """Make ``gather(tile, rows, offset, stride, count, factor)``: tile[c, lane] = factor * row(lane)[c] for c < count.

    `rows` is the table of row addresses, `offset` and `stride` (bytes) find column c at row + offset + c * stride.
    """
    vector = spec.vector
    W, BM, size = vector.width, spec.query_tile, element.size
    width = vector.bytes * W
    tile_row = spec.block[1] * width

    def blocks(b: Builder, tile: Value, rows: Value, offset: Value, count: Value, factor: Value) -> None:
        c = vector.splat(b, factor)
        last = b.sub(count, I64(W))
        number = b.sdiv(b.add(count, I64(W - 1)), I64(W))

        def group(g: Value, _: list[Value]) -> list[Value]:
            sources = [at(b, row_group(b, rows, g, W, r), offset) for r in range(W)]
            target = at(b, pointer(b, tile), b.mul(g, I64(width)))

            def block(i: Value, _: list[Value]) -> list[Value]:
                first = b.mul(i, I64(W))
                first = b.select(b.icmp_signed("<", first, last), first, last)
                lines = [element.load(vector, b, at(b, s, b.mul(first, I64(size)))) for s in sources]
                out = at(b, target, b.mul(first, I64(tile_row)))
                for r, line in enumerate(vector.transpose(b, lines)):
                    vector.store(b, b.fmul(line, c), out, r * tile_row)
                return []

            loop(b, number, [], block)
            return []

        loop(b, I64(spec.block[1]), [], group)

    by_block = routine(f"tile rows offset count factor:{_real(vector)}", blocks)

    def strided(
        b: Builder, tile: Value, rows: Value, offset: Value, stride: Value, count: Value, factor: Value
    ) -> None:
        def lane(i: Value, _: list[Value]) -> list[Value]:
            source = at(b, row_group(b, rows, i, 1, 0), offset)
            target = at(b, pointer(b, tile), b.mul(i, I64(vector.bytes)))

            def column(c: Value, carried: list[Value]) -> list[Value]:
                p, q = carried
                store(b, b.fmul(element.load_one(vector, b, p), factor), q, align=vector.bytes)
                return [at(b, p, stride), at(b, q, tile_row)]

            loop(b, count, [source, target], column)
            return []

        loop(b, I64(spec.query_tile), [], lane)

    one_by_one = routine(f"tile rows offset stride count factor:{_real(vector)}", strided)

    def lines(b: Builder, tile: Value, rows: Value, offset: Value, stride: Value, count: Value, factor: Value) -> None:
        c = vector.splat(b, factor)
        source = at(b, row_group(b, rows, I64(0), W, 0), offset)

        def column(i: Value, carried: list[Value]) -> list[Value]:
            p, q = carried
            for v in range(spec.block[1]):
                line = element.load(vector, b, at(b, p, v * W * size))
                vector.store(b, b.fmul(line, c), q, v * width)
            return [at(b, p, stride), at(b, q, tile_row)]

        loop(b, count, [source, pointer(b, tile)], column)

    by_line = routine(f"tile rows offset stride count factor:{_real(vector)}", lines)

    @spec.jit
    def gather(tile: int, rows: int, offset: int, stride: int, count: int, factor: float) -> None:
        if stride == size and count >= W:
            by_block(tile, rows, offset, count, factor)
            return
        addresses = carray(void_pointer(rows), BM, np.int64)
        adjacent = True  # unit stride along the rows, as in a transposed array
        for lane in range(1, BM):
            adjacent = adjacent and addresses[lane] - addresses[lane - 1] == size
        if adjacent:
            by_line(tile, rows, offset, stride, count, factor)
        else:
            one_by_one(tile, rows, offset, stride, count, factor)

    return gather


@cache
def scatter_tile(spec: Spec) -> Any:
    """Make ``scatter(tile, rows, offset, stride, count, scale)``: row(lane)[c] = tile[c, lane] * scale[lane], rounded.

    The inverse of `gather_tile`; `scale` is the address of one compute value per lane.
    """
    vector, element = spec.vector, spec.out_element
    W, size = vector.width, element.size
    width = vector.bytes * W
    tile_row = spec.block[1] * width

    def blocks(b: Builder, tile: Value, rows: Value, offset: Value, count: Value, scale: Value) -> None:
        last = b.sub(count, I64(W))
        number = b.sdiv(b.add(count, I64(W - 1)), I64(W))

        def group(g: Value, _: list[Value]) -> list[Value]:
            targets = [at(b, row_group(b, rows, g, W, r), offset) for r in range(W)]
            source = at(b, pointer(b, tile), b.mul(g, I64(width)))
            factor = vector.load(b, at(b, pointer(b, scale), b.mul(g, I64(width))))

            def block(i: Value, _: list[Value]) -> list[Value]:
                first = b.mul(i, I64(W))
                first = b.select(b.icmp_signed("<", first, last), first, last)
                p = at(b, source, b.mul(first, I64(tile_row)))
                lines = [b.fmul(vector.load(b, p, r * tile_row), factor) for r in range(W)]
                for target, line in zip(targets, vector.transpose(b, lines), strict=True):
                    element.store(vector, b, line, at(b, target, b.mul(first, I64(size))))
                return []

            loop(b, number, [], block)
            return []

        loop(b, I64(spec.block[1]), [], group)

    by_block = routine("tile rows offset count scale", blocks)

    def strided(b: Builder, tile: Value, rows: Value, offset: Value, stride: Value, count: Value, scale: Value) -> None:
        def lane(i: Value, _: list[Value]) -> list[Value]:
            target = at(b, row_group(b, rows, i, 1, 0), offset)
            source = at(b, pointer(b, tile), b.mul(i, I64(vector.bytes)))
            factor = load(b, vector.element, pointer(b, scale), b.mul(i, I64(vector.bytes)), align=vector.bytes)

            def column(c: Value, carried: list[Value]) -> list[Value]:
                p, q = carried
                x = b.fmul(load(b, vector.element, p, align=vector.bytes), factor)
                element.store_one(vector, b, x, q)
                return [at(b, p, tile_row), at(b, q, stride)]

            loop(b, count, [source, target], column)
            return []

        loop(b, I64(spec.query_tile), [], lane)

    one_by_one = routine("tile rows offset stride count scale", strided)

    @spec.jit
    def scatter(tile: int, rows: int, offset: int, stride: int, count: int, scale: int) -> None:
        if stride == size and count >= W:
            by_block(tile, rows, offset, count, scale)
        else:
            one_by_one(tile, rows, offset, stride, count, scale)

    return scatter


@cache
def widen_tile(spec: Spec) -> Any:
    """Make ``widen(tile, source, row_stride, stride, rows, count)``: tile[r, c] = source[r, c], keys or values."""
    vector, element = spec.vector, spec.kv_element
    W, size = vector.width, element.size

    def blocks(b: Builder, tile: Value, source: Value, row_stride: Value, rows: Value, count: Value) -> None:
        last = b.sub(count, I64(W))
        number = b.sdiv(b.add(count, I64(W - 1)), I64(W))

        def row(r: Value, carried: list[Value]) -> list[Value]:
            p, q = carried

            def block(i: Value, _: list[Value]) -> list[Value]:
                first = b.mul(i, I64(W))
                first = b.select(b.icmp_signed("<", first, last), first, last)
                line = element.load(vector, b, at(b, p, b.mul(first, I64(size))))
                vector.store(b, line, at(b, q, b.mul(first, I64(vector.bytes))))
                return []

            loop(b, number, [], block)
            return [at(b, p, row_stride), at(b, q, b.mul(count, I64(vector.bytes)))]

        loop(b, rows, [pointer(b, source), pointer(b, tile)], row)

    by_block = routine("tile source row_stride rows count", blocks)

    def strided(
        b: Builder, tile: Value, source: Value, row_stride: Value, stride: Value, rows: Value, count: Value
    ) -> None:
        def row(r: Value, carried: list[Value]) -> list[Value]:
            p, q = carried

            def column(c: Value, inner: list[Value]) -> list[Value]:
                x, y = inner
                store(b, element.load_one(vector, b, x), y, align=vector.bytes)
                return [at(b, x, stride), at(b, y, vector.bytes)]

            _, q = loop(b, count, [p, q], column)
            return [at(b, p, row_stride), q]

        loop(b, rows, [pointer(b, source), pointer(b, tile)], row)

    one_by_one = routine("tile source row_stride stride rows count", strided)

    @spec.jit
    def widen(tile: int, source: int, row_stride: int, stride: int, rows: int, count: int) -> None:
        if stride == size and count >= W:
            by_block(tile, source, row_stride, rows, count)
        else:
            one_by_one(tile, source, row_stride, stride, rows, count)

    return widen


def fetch_rows(spec: Spec) -> Any:
    """Make ``fetch(rows, first, count, offset, n)``: prefetch n bytes at `offset` of `count` rows of a table."""

    def build(b: Builder, rows: Value, first: Value, count: Value, offset: Value, n: Value) -> None:
        table = at(b, pointer(b, rows), b.mul(first, I64(8)))

        def line(k: Value, carried: list[Value]) -> list[Value]:
            (start,) = carried

            def row(i: Value, _: list[Value]) -> list[Value]:
                prefetch(b, at(b, pointer(b, load(b, I64, table, b.mul(i, I64(8)), align=8)), start))
                return []

            loop(b, count, [], row)
            return [b.add(start, I64(LINE))]

        loop(b, b.sdiv(b.add(n, I64(LINE - 1)), I64(LINE)), [offset], line)

    return routine("rows first count offset n", build)


def fetch_two(spec: Spec) -> Any:
    """Make ``fetch(first, first_row, second, second_row, count, n)``: prefetch n bytes of `count` rows of two arrays.

    Their rows begin at `first` and `second`. Rows that follow one another count as one: loops that end after two lines
    take longer than the lines.
    """

    def build(
        b: Builder, first: Value, first_row: Value, second: Value, second_row: Value, count: Value, n: Value
    ) -> None:
        dense = b.and_(b.icmp_signed("==", first_row, n), b.icmp_signed("==", second_row, n))
        n = b.select(dense, b.mul(n, count), n)
        count = b.select(dense, I64(1), count)

        def row(i: Value, carried: list[Value]) -> list[Value]:
            def line(k: Value, _: list[Value]) -> list[Value]:
                for p in carried:
                    prefetch(b, at(b, p, b.mul(k, I64(LINE))))
                return []

            loop(b, b.sdiv(b.add(n, I64(LINE - 1)), I64(LINE)), [], line)
            return [at(b, carried[0], first_row), at(b, carried[1], second_row)]

        loop(b, count, [pointer(b, first), pointer(b, second)], row)

    return routine("first first_row second second_row count n", build)


def clear_tile(spec: Spec) -> Any:
    """Make ``clear(tile, rows)``: rows of a tile become 0."""
    vector = spec.vector
    width = vector.bytes * vector.width

    def build(b: Builder, tile: Value, rows: Value) -> None:
        def row(r: Value, carried: list[Value]) -> list[Value]:
            for v in range(spec.block[1]):
                vector.store(b, vector.const(0.0), carried[0], v * width)
            return [at(b, carried[0], spec.block[1] * width)]

        loop(b, rows, [pointer(b, tile)], row)

    return routine("tile rows", build)


def copy_bytes(spec: Spec) -> Any:
    """Make ``copy(target, rows, offset, count, n)``: n bytes at `offset` of each of `count` rows, one after another.

    `rows` is a table of addresses.
    """

    @spec.jit
    def copy(target: int, rows: int, offset: int, count: int, n: int) -> None:
        addresses = carray(void_pointer(rows), count, np.int64)
        for r in range(count):
            source = carray(void_pointer(addresses[r] + offset), n, np.uint8)
            out = carray(void_pointer(target + r * n), n, np.uint8)
            for i in range(n):
                out[i] = source[i]

    return copy


def load_value(spec: Spec) -> Any:
    """Make ``value(address)``: one number of a key or value as a compute value."""
    vector = spec.vector

    def build(b: Builder, address: Value) -> Value:
        return spec.kv_element.load_one(vector, b, pointer(b, address))

    return routine("address", build, result=vector.numba_type)


def load_query(spec: Spec) -> Any:
    """Make ``value(address)``: one number of a query as a compute value."""
    vector = spec.vector

    def build(b: Builder, address: Value) -> Value:
        return spec.element.load_one(vector, b, pointer(b, address))

    return routine("address", build, result=vector.numba_type)


def has_nan(spec: Spec) -> Any:
    """Make ``has_nan(tile, rows)``: whether a tile holds NaN or infinity."""
    vector = spec.vector
    zero = vector.const(0.0)
    # Sum of x * 0: NaN if any x is NaN or infinite, and cheaper than a comparison of each vector.
    return _any_lane(spec, 0.0, lambda b, x, total: vector.fma(b, x, zero, total), "uno")


def drop_nonfinite(spec: Spec) -> Any:
    """Make ``drop(address, count)``: NaN and infinity among the compute values become 0; whether there were any."""
    vector = spec.vector
    zero = vector.element(0.0)

    def build(b: Builder, address: Value, count: Value) -> Value:
        def body(i: Value, carried: list[Value]) -> list[Value]:
            p, any_nonfinite = carried
            x = load(b, vector.element, p, align=vector.bytes)
            finite = b.fcmp_ordered("==", b.fmul(x, zero), zero)
            store(b, b.select(finite, x, zero), p, align=vector.bytes)
            return [at(b, p, vector.bytes), b.or_(any_nonfinite, b.not_(finite))]

        return loop(b, count, [pointer(b, address), ir.Constant(ir.IntType(1), 0)], body)[1]

    return routine("address count", build, result=types.boolean)


def has_visible(spec: Spec) -> Any:
    """Make ``has_visible(tile, rows)``: whether a mask tile has anything above -inf."""
    return _any_lane(spec, float("-inf"), spec.vector.max, ">")


def _any_lane(spec: Spec, start: float, fold: Callable[[Builder, Value, Value], Value], test: str) -> Any:
    """Fold the rows of a tile lane by lane, and say whether any lane then stands in relation `test` to the start."""
    vector = spec.vector
    NV = spec.block[1]
    width = vector.bytes * vector.width

    def build(b: Builder, tile: Value, rows: Value) -> Value:
        # Two rows at a time: a chain for each vector of one row is not enough to keep the units busy.
        def fold_rows(count: int) -> Callable[[Value, list[Value]], list[Value]]:
            def body(r: Value, carried: list[Value]) -> list[Value]:
                p, *folded = carried
                for v in range(count * NV):
                    folded[v] = fold(b, vector.load(b, p, v * width), folded[v])
                return [at(b, p, count * NV * width), *folded]

            return body

        first = vector.const(start)
        pairs = loop(b, b.lshr(rows, I64(1)), [pointer(b, tile), *[first] * (2 * NV)], fold_rows(2))
        _, total, *others = loop(b, b.and_(rows, I64(1)), pairs, fold_rows(1))
        for x in others:
            total = b.fadd(total, x) if test == "uno" else fold(b, x, total)
        compare = b.fcmp_unordered if test == "uno" else b.fcmp_ordered
        lanes = b.bitcast(compare(test, total, first), ir.IntType(vector.width))
        return b.icmp_signed("!=", lanes, ir.Constant(lanes.type, 0))

    return routine("tile rows", build, result=types.boolean)
