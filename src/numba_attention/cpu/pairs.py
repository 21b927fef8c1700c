"""bfloat16 tiles as pairs in 32-bit words, for dot products: element 2i in the lower half, 2i + 1 in the upper.

The siblings of `tiles` for hosts that multiply bfloat16 natively (AVX512_BF16).
"""

from typing import Any

import numpy as np
from llvmlite import ir

from .elements import bfloat16_bits
from .gemm import narrow, pack_pairs
from .simd import F32, I16, I32, I64, Builder, Value, at, load, loop, pointer, routine, store, void_pointer
from .spec import Spec
from .tiles import row_group
from .views import UNBOUNDED, carray


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
            sources = [row_group(b, rows, g, W, r) for r in range(W)]
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
            source = row_group(b, rows, i, 1, 0)
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


def pair_tile(spec: Spec) -> Any:
    """Make ``pair(tile, target, n, vectors)``: target[r, c] = the pair (2r, c), (2r+1, c) of rounded float32.

    Rows have so many vectors; n, their number, is even. The target may be where the tile is.
    """
    vector = spec.vector
    width = vector.bytes * vector.width

    def build(b: Builder, tile: Value, target: Value, n: Value, vectors: Value) -> None:
        row_bytes = b.mul(vectors, I64(width))

        def row(i: Value, carried: list[Value]) -> list[Value]:
            def column(v: Value, inner: list[Value]) -> list[Value]:
                p, q = inner
                store(b, pack_pairs(b, vector.load(b, p), vector.load(b, at(b, p, row_bytes))), q, align=4)
                return [at(b, p, width), at(b, q, width)]

            p, q = loop(b, vectors, carried, column)
            return [at(b, p, row_bytes), q]

        loop(b, b.lshr(n, I64(1)), [pointer(b, tile), pointer(b, target)], row)

    return routine("tile target n vectors", build)


def narrow_tile(spec: Spec) -> Any:
    """Make ``narrow(tile, n)``: n rows of a tile of float32, an even number, become bfloat16, one after another."""
    vector = spec.vector
    width = vector.bytes * vector.width

    def build(b: Builder, tile: Value, n: Value) -> None:
        def step(i: Value, carried: list[Value]) -> list[Value]:
            p, q = carried
            store(b, narrow(b, vector.load(b, p), vector.load(b, p, width)), q, align=2)
            return [at(b, p, 2 * width), at(b, q, width)]

        number = b.mul(b.lshr(n, I64(1)), I64(spec.block[1]))
        loop(b, number, [pointer(b, tile), pointer(b, tile)], step)

    return routine("tile n", build)


def drop_nonfinite(spec: Spec) -> Any:
    """Make ``drop(tile, count)``: of so many bfloat16 numbers NaN and infinity become 0."""

    @spec.jit
    def drop(tile: int, count: int) -> None:
        halves = carray(void_pointer(tile), UNBOUNDED, np.uint16)
        for x in range(count):
            if halves[x] & 0x7F80 == 0x7F80:
                halves[x] = 0

    return drop
