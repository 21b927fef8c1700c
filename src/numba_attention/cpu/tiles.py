"""Moving tiles between the arrays of the caller and scratch: transposed, widened, rounded, paired.

Rows are found through a table of addresses, one per lane, in which the last row stands in for those a partial tile lacks; so no
routine here has a ragged edge in the lanes. Along the other axis, blocks of a vector's width cover what they can and the last one
overlaps its neighbour; what is narrower than a vector, or has a stride, goes one number at a time.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types

from .elements import Element, Spec, bfloat16_bits
from .simd import F32, I16, I32, I64, Builder, Value, Vector, at, load, loop, pointer, routine, store, void_pointer


def _real(vector: Vector) -> str:
    return "f64" if vector.bits == 64 else "f32"


def _row_group(b: Builder, rows: Value, group: Value, width: int, r: int) -> Value:
    """The byte pointer to row group * width + r of a table of int64 addresses."""
    index = b.add(b.mul(group, I64(width * 8)), I64(r * 8))
    return pointer(b, load(b, I64, pointer(b, rows), index, align=8))


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
            sources = [at(b, _row_group(b, rows, g, W, r), offset) for r in range(W)]
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
            source = at(b, _row_group(b, rows, i, 1, 0), offset)
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
        source = at(b, _row_group(b, rows, I64(0), W, 0), offset)

        def column(i: Value, carried: list[Value]) -> list[Value]:
            p, q = carried
            for v in range(spec.block[1]):
                vector.store(b, b.fmul(element.load(vector, b, at(b, p, v * W * size)), c), q, v * width)
            return [at(b, p, stride), at(b, q, tile_row)]

        loop(b, count, [source, pointer(b, tile)], column)

    by_line = routine(f"tile rows offset stride count factor:{_real(vector)}", lines)

    @spec.jit
    def gather(tile: int, rows: int, offset: int, stride: int, count: int, factor: float) -> None:
        if stride == size and count >= W:
            by_block(tile, rows, offset, count, factor)
            return
        addresses = carray(void_pointer(rows), BM, np.int64)
        adjacent = True  # the rows themselves lie side by side, as in an array that was transposed
        for lane in range(1, BM):
            adjacent = adjacent and addresses[lane] - addresses[lane - 1] == size
        if adjacent:
            by_line(tile, rows, offset, stride, count, factor)
        else:
            one_by_one(tile, rows, offset, stride, count, factor)

    return gather


def scatter_tile(spec: Spec) -> Any:
    """Make ``scatter(tile, rows, offset, stride, count, scale)``: row(lane)[c] = tile[c, lane] * scale[lane], rounded.

    The inverse of `gather_tile`; `scale` is the address of one compute value per lane.
    """
    vector, element = spec.vector, spec.element
    W, size = vector.width, element.size
    width = vector.bytes * W
    tile_row = spec.block[1] * width

    def blocks(b: Builder, tile: Value, rows: Value, offset: Value, count: Value, scale: Value) -> None:
        last = b.sub(count, I64(W))
        number = b.sdiv(b.add(count, I64(W - 1)), I64(W))

        def group(g: Value, _: list[Value]) -> list[Value]:
            targets = [at(b, _row_group(b, rows, g, W, r), offset) for r in range(W)]
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
            target = at(b, _row_group(b, rows, i, 1, 0), offset)
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


def widen_tile(spec: Spec) -> Any:
    """Make ``widen(tile, source, row_stride, stride, rows, count)``: tile[r, c] = source[r, c] as compute values, packed."""
    vector, element = spec.vector, spec.element
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


def load_value(spec: Spec) -> Any:
    """Make ``value(address)``: one element as a compute value."""
    vector = spec.vector

    def build(b: Builder, address: Value) -> Value:
        return spec.element.load_one(vector, b, pointer(b, address))

    return routine("address", build, result=vector.numba_type)


def has_nan(spec: Spec) -> Any:
    """Make ``has_nan(tile, rows)``: whether a tile holds NaN or infinity."""
    vector = spec.vector
    zero = vector.const(0.0)
    # x * 0 is NaN for both, and a sum of vectors is cheaper than a comparison of each.
    return _any_lane(spec, 0.0, lambda b, x, total: vector.fma(b, x, zero, total), "uno")


def has_visible(spec: Spec) -> Any:
    """Make ``has_visible(tile, rows)``: whether a mask tile has anything above -inf."""
    return _any_lane(spec, float("-inf"), spec.vector.max, ">")


def _any_lane(spec: Spec, start: float, fold: Callable[[Builder, Value, Value], Value], test: str) -> Any:
    """Fold the rows of a tile into one vector per lane, and say whether any lane then stands in relation `test` to the start."""
    vector = spec.vector
    NV = spec.block[1]
    width = vector.bytes * vector.width

    def build(b: Builder, tile: Value, rows: Value) -> Value:
        def row(r: Value, carried: list[Value]) -> list[Value]:
            p, *folded = carried
            new = [fold(b, vector.load(b, p, v * width), folded[v]) for v in range(NV)]
            return [at(b, p, NV * width), *new]

        first = vector.const(start)
        _, total, *others = loop(b, rows, [pointer(b, tile), *[first] * NV], row)
        for x in others:
            total = b.fadd(total, x) if test == "uno" else fold(b, x, total)
        compare = b.fcmp_unordered if test == "uno" else b.fcmp_ordered
        lanes = b.bitcast(compare(test, total, first), ir.IntType(vector.width))
        return b.icmp_signed("!=", lanes, ir.Constant(lanes.type, 0))

    return routine("tile rows", build, result=types.boolean)


# bfloat16 pairs in 32-bit words, for dot products: element 2i in the lower half, 2i + 1 in the upper.


def _half_word(b: Builder, p: Value) -> Value:
    return b.zext(load(b, I16, p, align=2), I32)


def _scaled(b: Builder, bits: Value, factor: Value) -> Value:
    """bfloat16 bits (in an i32) times a power of two, which is exact."""
    x = b.fmul(b.bitcast(bfloat16_bits(b, b.trunc(bits, I16), None), F32), factor)
    return b.lshr(b.bitcast(x, I32), I32(16))


def gather_pairs(spec: Spec) -> Any:
    """Make ``gather(tile, rows, stride, count, factor)``: tile[c, lane] = the pair (2c, 2c+1) of a row, scaled by 2**n.

    An odd last element is paired with 0.
    """
    vector = spec.vector
    W = vector.width
    width = 4 * W
    tile_row = spec.block[1] * width
    words = ir.VectorType(I32, W)

    def blocks(b: Builder, tile: Value, rows: Value, count: Value, factor: Value) -> None:
        c = vector.splat(b, factor)
        high = vector.iconst(-65536)
        sixteen = vector.iconst(16)
        pairs = b.lshr(count, I64(1))
        last = b.sub(pairs, I64(W))
        number = b.sdiv(b.add(pairs, I64(W - 1)), I64(W))

        def scaled(x: Value) -> Value:
            low = b.fmul(vector.from_bits(b, b.shl(x, sixteen)), c)
            top = b.fmul(vector.from_bits(b, b.and_(x, high)), c)
            return b.or_(b.lshr(vector.bits_of(b, low), sixteen), b.and_(vector.bits_of(b, top), high))

        def group(g: Value, _: list[Value]) -> list[Value]:
            sources = [_row_group(b, rows, g, W, r) for r in range(W)]
            target = at(b, pointer(b, tile), b.mul(g, I64(width)))

            def block(i: Value, _: list[Value]) -> list[Value]:
                first = b.mul(i, I64(W))
                first = b.select(b.icmp_signed("<", first, last), first, last)
                lines = [scaled(load(b, words, s, b.mul(first, I64(4)), align=2)) for s in sources]
                out = at(b, target, b.mul(first, I64(tile_row)))
                for r, line in enumerate(vector.transpose(b, lines)):
                    store(b, line, out, r * tile_row, align=4)
                return []

            loop(b, number, [], block)
            return []

        loop(b, I64(spec.block[1]), [], group)

    by_block = routine("tile rows count factor:f32", blocks)

    def strided(b: Builder, tile: Value, rows: Value, stride: Value, count: Value, factor: Value) -> None:
        def lane(i: Value, _: list[Value]) -> list[Value]:
            source = _row_group(b, rows, i, 1, 0)
            target = at(b, pointer(b, tile), b.mul(i, I64(4)))
            _pair_line(b, source, stride, count, target, tile_row, lambda x: _scaled(b, x, factor))
            return []

        loop(b, I64(spec.query_tile), [], lane)

    one_by_one = routine("tile rows stride count factor:f32", strided)

    @spec.jit
    def gather(tile: int, rows: int, stride: int, count: int, factor: float) -> None:
        if stride == 2 and count % 2 == 0 and count >= 2 * W:
            by_block(tile, rows, count, factor)
        else:
            one_by_one(tile, rows, stride, count, factor)

    return gather


def _pair_line(
    b: Builder, source: Value, stride: Value, count: Value, target: Value, step: int, change: Any = lambda x: x
) -> None:
    """Write the pairs of one strided line of `count` elements, `step` bytes apart."""
    whole = b.lshr(count, I64(1))

    def pair(i: Value, carried: list[Value]) -> list[Value]:
        p, q = carried
        low, high = change(_half_word(b, p)), change(_half_word(b, at(b, p, stride)))
        store(b, b.or_(low, b.shl(high, I32(16))), q, align=4)
        return [at(b, p, b.mul(stride, I64(2))), at(b, q, step)]

    p, q = loop(b, whole, [source, target], pair)
    with b.if_then(b.icmp_signed("!=", b.and_(count, I64(1)), I64(0))):
        store(b, change(_half_word(b, p)), q, align=4)


def pair_columns(spec: Spec) -> Any:
    """Make ``pair(tile, source, row_stride, stride, rows, count)``: row r of the tile holds the pairs along row r.

    For keys whose features are not contiguous, or odd in number. Rows of the tile are (count + 1) // 2 words.
    """

    def build(
        b: Builder, tile: Value, source: Value, row_stride: Value, stride: Value, rows: Value, count: Value
    ) -> None:
        words = b.lshr(b.add(count, I64(1)), I64(1))

        def row(r: Value, carried: list[Value]) -> list[Value]:
            p, q = carried
            _pair_line(b, p, stride, count, q, 4)
            return [at(b, p, row_stride), at(b, q, b.mul(words, I64(4)))]

        loop(b, rows, [pointer(b, source), pointer(b, tile)], row)

    return routine("tile source row_stride stride rows count", build)


def pair_rows(spec: Spec) -> Any:
    """Make ``pair(tile, source, row_stride, stride, rows, count)``: tile[r, c] = the pair (2r, c), (2r+1, c).

    An odd last row is paired with 0.
    """
    vector = spec.vector
    W = vector.width
    halves = ir.VectorType(I16, W)
    words = ir.VectorType(I32, W)

    def blocks(b: Builder, tile: Value, source: Value, row_stride: Value, rows: Value, count: Value) -> None:
        last = b.sub(count, I64(W))
        number = b.sdiv(b.add(count, I64(W - 1)), I64(W))

        def line(p: Value, second: Value | None, q: Value) -> None:
            def block(i: Value, _: list[Value]) -> list[Value]:
                first = b.mul(i, I64(W))
                first = b.select(b.icmp_signed("<", first, last), first, last)
                where = b.mul(first, I64(2))
                x = b.zext(load(b, halves, p, where, align=2), words)
                if second is not None:
                    y = b.zext(load(b, halves, second, where, align=2), words)
                    x = b.or_(x, b.shl(y, ir.Constant(words, [16] * W)))
                store(b, x, q, b.mul(first, I64(4)), align=4)
                return []

            loop(b, number, [], block)

        def row(r: Value, carried: list[Value]) -> list[Value]:
            p, q = carried
            line(p, at(b, p, row_stride), q)
            return [at(b, p, b.mul(row_stride, I64(2))), at(b, q, b.mul(count, I64(4)))]

        p, q = loop(b, b.lshr(rows, I64(1)), [pointer(b, source), pointer(b, tile)], row)
        with b.if_then(b.icmp_signed("!=", b.and_(rows, I64(1)), I64(0))):
            line(p, None, q)

    by_block = routine("tile source row_stride rows count", blocks)

    def strided(
        b: Builder, tile: Value, source: Value, row_stride: Value, stride: Value, rows: Value, count: Value
    ) -> None:
        def column(c: Value, carried: list[Value]) -> list[Value]:
            p, q = carried
            target = q
            step = b.mul(count, I64(4))

            def pair(i: Value, inner: list[Value]) -> list[Value]:
                x, y = inner
                low, high = _half_word(b, x), _half_word(b, at(b, x, row_stride))
                store(b, b.or_(low, b.shl(high, I32(16))), y, align=4)
                return [at(b, x, b.mul(row_stride, I64(2))), at(b, y, step)]

            x, y = loop(b, b.lshr(rows, I64(1)), [p, target], pair)
            with b.if_then(b.icmp_signed("!=", b.and_(rows, I64(1)), I64(0))):
                store(b, _half_word(b, x), y, align=4)
            return [at(b, p, stride), at(b, q, 4)]

        loop(b, count, [pointer(b, source), pointer(b, tile)], column)

    one_by_one = routine("tile source row_stride stride rows count", strided)

    @spec.jit
    def pair(tile: int, source: int, row_stride: int, stride: int, rows: int, count: int) -> None:
        if stride == 2 and count >= W:
            by_block(tile, source, row_stride, rows, count)
        else:
            one_by_one(tile, source, row_stride, stride, rows, count)

    return pair
