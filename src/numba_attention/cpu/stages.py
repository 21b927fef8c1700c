"""The score pipeline as passes over a tile of scores S^T (key j by row, query by lane); an absent one costs a branch.

Scores arrive as products in some unit; `factor` takes them to natural ones, those that `attention` defines. The first
of softcap, ALiBi, bias and mask applies it, and the passes after it use 1. The order is `attention`'s: scale, softcap,
ALiBi, bias, mask, and last the row intervals. Only softcap has a derivative other than 1.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from .exp import EXP2_F32, EXP2_F64, clamp, tanh
from .simd import I64, Builder, Value, at, load, loop, pointer, routine, splat, store
from .softmax import FIRST, POSITION, SLOPE, SPAN, TILE_MAX
from .spec import Spec

Body = Callable[[Builder, Value, int, Value], Value]


def _tile_pass(spec: Spec, b: Builder, scores: Value, n: Value, body: Body) -> None:
    """Replace every vector s of the tile by body(b, row number, vector number, s)."""
    vector = spec.vector
    width = vector.bytes * vector.width

    def step(j: Value, carried: list[Value]) -> list[Value]:
        (row,) = carried
        for v in range(spec.block[1]):
            vector.store(b, body(b, j, v, vector.load(b, row, v * width)), row, v * width)
        return [at(b, row, spec.block[1] * width)]

    loop(b, n, [pointer(b, scores)], step)


def _with_tile(
    spec: Spec, b: Builder, scores: Value, n: Value, other: Value, body: Callable[[Value, Value], Value]
) -> None:
    """Replace every vector s of the tile by body(s, x), x being that of another tile in its place."""
    width = spec.vector.bytes * spec.vector.width
    base = pointer(b, other)

    def pick(b: Builder, j: Value, v: int, s: Value) -> Value:
        offset = b.add(b.mul(j, I64(spec.block[1] * width)), I64(v * width))
        return body(s, load(b, spec.vector.type, base, offset, align=spec.vector.bytes))

    _tile_pass(spec, b, scores, n, pick)


def _state_row(spec: Spec, b: Builder, state: Value, row: int) -> list[Value]:
    width = spec.vector.bytes * spec.vector.width
    NV = spec.block[1]
    return [spec.vector.load(b, pointer(b, state), (row * NV + v) * width) for v in range(NV)]


def _real(spec: Spec) -> str:
    return "f64" if spec.vector.bits == 64 else "f32"


def multiply(spec: Spec) -> Any:
    """Make ``multiply(scores, n, factor)``: s = s * factor."""

    def build(b: Builder, scores: Value, n: Value, factor: Value) -> None:
        c = spec.vector.splat(b, factor)
        _tile_pass(spec, b, scores, n, lambda b, j, v, s: b.fmul(s, c))

    return routine(f"scores n factor:{_real(spec)}", build)


def softcap(spec: Spec) -> Any:
    """Make ``cap(scores, n, inner, outer)``: s = outer * tanh(s * inner)."""

    def build(b: Builder, scores: Value, n: Value, inner: Value, outer: Value) -> None:
        vector = spec.vector
        x, y = vector.splat(b, inner), vector.splat(b, outer)
        table = EXP2_F64 if vector.bits == 64 else EXP2_F32
        _tile_pass(spec, b, scores, n, lambda b, j, v, s: b.fmul(y, tanh(vector, b, b.fmul(s, x), table)))

    return routine(f"scores n inner:{_real(spec)} outer:{_real(spec)}", build)


def cap_slope(spec: Spec) -> Any:
    """Make ``slope(scores, n, inverse, slopes)``: the derivative of `softcap` where it was s: 1 - (s * inverse)**2."""

    def build(b: Builder, scores: Value, n: Value, inverse: Value, slopes: Value) -> None:
        vector = spec.vector
        x, one = vector.splat(b, inverse), vector.const(1.0)
        base, width = pointer(b, slopes), vector.bytes * vector.width

        def body(b: Builder, j: Value, v: int, s: Value) -> Value:
            t = b.fmul(s, x)
            slope = vector.fma(b, b.fneg(t), t, one)
            offset = b.add(b.mul(j, I64(spec.block[1] * width)), I64(v * width))
            store(b, slope, base, offset, align=vector.bytes)
            return s

        _tile_pass(spec, b, scores, n, body)

    return routine(f"scores n inverse:{_real(spec)} slopes", build)


def alibi(spec: Spec) -> Any:
    """Make ``lean(scores, n, state, factor)``: s = s * factor - slope * |position - j|, both relative to the tile."""

    def build(b: Builder, scores: Value, n: Value, state: Value, factor: Value) -> None:
        vector = spec.vector
        slope = [b.fneg(x) for x in _state_row(spec, b, state, SLOPE)]
        position = _state_row(spec, b, state, POSITION)
        c = vector.splat(b, factor)

        def body(b: Builder, j: Value, v: int, s: Value) -> Value:
            key = vector.splat(b, b.sitofp(j, vector.element))
            distance = vector.abs(b, b.fsub(position[v], key))
            return vector.fma(b, slope[v], distance, b.fmul(s, c))

        _tile_pass(spec, b, scores, n, body)

    return routine(f"scores n state factor:{_real(spec)}", build)


def add_bias(spec: Spec) -> Any:
    """Make ``add(scores, n, bias, factor)``: s = s * factor + bias, and -inf wherever the bias is, whatever s was.

    Only -inf hides: a sum below all finite numbers, as ``finfo.min`` and a negative score have, becomes the lowest.
    """

    def build(b: Builder, scores: Value, n: Value, bias: Value, factor: Value) -> None:
        vector = spec.vector
        c, hidden = vector.splat(b, factor), vector.const(float("-inf"))
        lowest = vector.const(float(np.finfo(vector.dtype).min))

        def body(s: Value, x: Value) -> Value:
            total = clamp(vector, b, vector.fma(b, s, c, x), lowest)
            return b.select(b.fcmp_ordered("==", x, hidden), hidden, total)

        _with_tile(spec, b, scores, n, bias, body)

    return routine(f"scores n bias factor:{_real(spec)}", build)


def hide(spec: Spec) -> Any:
    """Make ``hide(scores, n, mask, factor)``: s = s * factor, and -inf wherever the mask is, whatever s was."""

    def build(b: Builder, scores: Value, n: Value, mask: Value, factor: Value) -> None:
        c, hidden = spec.vector.splat(b, factor), spec.vector.const(float("-inf"))

        def body(s: Value, x: Value) -> Value:
            return b.select(b.fcmp_ordered("==", x, hidden), hidden, b.fmul(s, c))

        _with_tile(spec, b, scores, n, mask, body)

    return routine(f"scores n mask factor:{_real(spec)}", build)


def hide_bits(spec: Spec) -> Any:
    """Make ``hide(scores, n, words)``: s = -inf where the bit of the lane is 0 in the word of the key.

    A word has the bits of each vector in bytes of their own.
    """

    def build(b: Builder, scores: Value, n: Value, words: Value) -> None:
        vector = spec.vector
        W, NV = vector.width, spec.block[1]
        size = max(1, W // 8)
        base, hidden = pointer(b, words), vector.const(float("-inf"))
        flags = ir.VectorType(ir.IntType(1), W)

        def body(b: Builder, j: Value, v: int, s: Value) -> Value:
            bits = load(b, ir.IntType(8 * size), base, b.add(b.mul(j, I64(NV * size)), I64(v * size)))
            if W < 8:
                bits = b.trunc(bits, ir.IntType(W))
            return b.select(b.bitcast(bits, flags), s, hidden)

        _tile_pass(spec, b, scores, n, body)

    return routine("scores n words", build)


def clip_interval(spec: Spec) -> Any:
    """Make ``clip(scores, n, state)``: s = -inf unless FIRST <= j < FIRST + SPAN, integers relative to the tile."""

    def build(b: Builder, scores: Value, n: Value, state: Value) -> None:
        vector = spec.vector
        first = [vector.bits_of(b, x) for x in _state_row(spec, b, state, FIRST)]
        span = [vector.bits_of(b, x) for x in _state_row(spec, b, state, SPAN)]
        hidden = vector.const(float("-inf"))

        def body(b: Builder, j: Value, v: int, s: Value) -> Value:
            row = splat(b, b.trunc(j, vector.integer) if vector.bits == 32 else j, vector.width)
            inside = b.icmp_unsigned("<", b.sub(row, first[v]), span[v])  # rows before `first` wrap around
            return b.select(inside, s, hidden)

        _tile_pass(spec, b, scores, n, body)

    return routine("scores n state", build)


def tile_max(spec: Spec) -> Any:
    """Make ``highest(scores, n, state)``: the maximum of each lane, NaN left out, to TILE_MAX."""

    def build(b: Builder, scores: Value, n: Value, state: Value) -> None:
        vector = spec.vector
        NV = spec.block[1]
        width = vector.bytes * vector.width

        def body(j: Value, carried: list[Value]) -> list[Value]:
            row, *m = carried
            return [at(b, row, NV * width)] + [vector.max(b, vector.load(b, row, v * width), m[v]) for v in range(NV)]

        start = [vector.const(float("-inf"))] * NV
        _, *m = loop(b, n, [pointer(b, scores), *start], body)
        for v in range(NV):
            vector.store(b, m[v], pointer(b, state), (TILE_MAX * NV + v) * width)

    return routine("scores n state", build)
