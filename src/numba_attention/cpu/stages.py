"""The score pipeline as passes over a tile of scores S^T (key j by row, query by lane); an absent one costs a branch.

Scores arrive as products in some unit; `factor` takes them to natural ones, those that `attention` defines. The first
of softcap, ALiBi, bias and mask applies it, and the passes after it use 1. The order is `attention`'s: scale, softcap,
ALiBi, bias, mask, and last the row intervals. Only softcap has a derivative other than 1.

In the forward pass a pass that takes the state of the rows writes the maximum of each lane to TILE_MAX, NaN left out:
reading the tile once more for it would take as long as adding a bias.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from .elements import Element
from .exp import clamp, tanh_of_size, with_sign
from .simd import I64, Builder, Value, at, in_two_stages, interleave, load, loop, pointer, routine, splat, store
from .softmax import FIRST, POSITION, SLOPE, SPAN, TILE_MAX
from .spec import Spec
from .tiles import gather_tile, row_group

Body = Callable[[Builder, Value, int, Value], Value]


def _takes_maximum(spec: Spec) -> bool:
    return spec.task not in ("backward", "second")


def _tile_pass(spec: Spec, b: Builder, scores: Value, n: Value, body: Body, state: Value = None) -> None:
    """Replace every vector s of the tile by body(b, row number, vector number, s); with a state, write the maxima."""
    vector = spec.vector
    NV = spec.block[1]
    width = vector.bytes * vector.width
    start = [vector.const(float("-inf"))] * NV if state is not None and _takes_maximum(spec) else []

    def step(j: Value, carried: list[Value]) -> list[Value]:
        row, *highest = carried

        def replace(v: int) -> list[Value]:
            x = body(b, j, v, vector.load(b, row, v * width))
            vector.store(b, x, row, v * width)
            return [vector.max(b, x, highest[v])] if highest else []

        return [at(b, row, NV * width), *(x for new in interleave(b, NV, replace) for x in new)]

    _, *highest = loop(b, n, [pointer(b, scores), *start], step)
    for v, x in enumerate(highest):
        vector.store(b, x, pointer(b, state), (TILE_MAX * NV + v) * width)


def _with_tile(
    spec: Spec, b: Builder, scores: Value, n: Value, other: Value, body: Callable[[Value, Value], Value],
    state: Value = None,
) -> None:  # fmt: skip
    """Replace every vector s of the tile by body(s, x), x being that of another tile in its place."""
    width = spec.vector.bytes * spec.vector.width
    base = pointer(b, other)

    def pick(b: Builder, j: Value, v: int, s: Value) -> Value:
        offset = b.add(b.mul(j, I64(spec.block[1] * width)), I64(v * width))
        return body(s, load(b, spec.vector.type, base, offset, align=spec.vector.bytes))

    _tile_pass(spec, b, scores, n, pick, state)


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
    """Make ``cap(scores, n, inner, outer, state)``: s = outer * tanh(s * inner), for factors of at least 0.

    So do the maxima in TILE_MAX, where it has those of the scores: the largest score has the largest result, but for
    rounding.
    """

    def build(b: Builder, scores: Value, n: Value, inner: Value, outer: Value, state: Value) -> None:
        vector = spec.vector
        NV, width = spec.block[1], vector.bytes * vector.width
        cap = tanh_of_size(vector, b, inner, outer)

        def begin(row: Value, v: int) -> list[Value]:
            return cap.begin(vector.load(b, row, v * width))

        def finish(row: Value, v: int, values: list[Value], none: Value) -> Value:
            size = cap.finish(values)
            x = vector.load(b, row, v * width)  # once more, rather than keep it in a register
            vector.store(b, with_sign(vector, b, size, x), row, v * width)
            return none

        maxima = at(b, pointer(b, state), TILE_MAX * NV * width) if _takes_maximum(spec) else None
        in_two_stages(b, n, pointer(b, scores), NV * width, [I64(0)] * NV, begin, finish, maxima)

    return routine(f"scores n inner:{_real(spec)} outer:{_real(spec)} state", build)


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


def cap_slopes(spec: Spec) -> Any:
    """Make ``slopes(scores, n, inverse, first, second)``: both derivatives of `softcap`, where it was s.

    With t = s * inverse they are 1 - t**2 and -2 t (1 - t**2) * inverse.
    """

    def build(b: Builder, scores: Value, n: Value, inverse: Value, first: Value, second: Value) -> None:
        vector = spec.vector
        x, one = vector.splat(b, inverse), vector.const(1.0)
        double = b.fmul(x, vector.const(-2.0))
        bases, width = [pointer(b, first), pointer(b, second)], vector.bytes * vector.width

        def body(b: Builder, j: Value, v: int, s: Value) -> Value:
            t = b.fmul(s, x)
            slope = vector.fma(b, b.fneg(t), t, one)
            offset = b.add(b.mul(j, I64(spec.block[1] * width)), I64(v * width))
            store(b, slope, bases[0], offset, align=vector.bytes)
            store(b, b.fmul(b.fmul(double, t), slope), bases[1], offset, align=vector.bytes)
            return s

        _tile_pass(spec, b, scores, n, body)

    return routine(f"scores n inverse:{_real(spec)} first second", build)


def _of_tiles(spec: Spec, names: str, body: Callable[..., list[Value]]) -> Any:
    """Make ``op(*tiles, n)``: each vector of the first tiles is replaced by what body(b, *vectors) returns."""

    def build(b: Builder, *arguments: Value) -> None:
        vector = spec.vector
        width = vector.bytes * vector.width
        *tiles, n = arguments

        def step(j: Value, carried: list[Value]) -> list[Value]:
            for v in range(spec.block[1]):
                results = body(b, *(vector.load(b, p, v * width) for p in carried))
                for x, p in zip(results, carried, strict=False):
                    vector.store(b, x, p, v * width)
            return [at(b, p, spec.block[1] * width) for p in carried]

        loop(b, n, [pointer(b, x) for x in tiles], step)

    return routine(f"{names} n", build)


def chain_slopes(spec: Spec) -> Any:
    """Make ``chain(first, second, of_outer, of_of_outer, n)``: both derivatives of f(c), from those of c and of f.

    They are f' c' and f'' c'**2 + f' c''.
    """

    def body(b: Builder, first: Value, second: Value, outer: Value, curve: Value) -> list[Value]:
        bent = spec.vector.fma(b, b.fmul(curve, first), first, b.fmul(outer, second))
        return [b.fmul(outer, first), bent]

    return _of_tiles(spec, "first second of_outer of_of_outer", body)


def moved_scores(spec: Spec) -> Any:
    """Make ``move(target, products, slopes, n)``: target = products * slopes, 0 where a slope is 0."""
    zero = spec.vector.const(0.0)

    def body(b: Builder, target: Value, x: Value, slope: Value) -> list[Value]:
        return [b.select(b.fcmp_ordered("==", slope, zero), zero, b.fmul(x, slope))]

    return _of_tiles(spec, "target products slopes", body)


def shift(spec: Spec) -> Any:
    """Make ``shift(target, scores, other, n)``: target = scores + other."""
    return _of_tiles(spec, "target scores other", lambda b, target, x, y: [b.fadd(x, y)])


def through_slopes(spec: Spec) -> Any:
    """Make ``through(grads, moved_grads, products, first, second, n)``: gradients of products from those of scores.

    D becomes h' D, and its tangent h' dD + h'' dz D; a factor of exactly 0 makes a term 0, whatever the others are.
    """
    zero = spec.vector.const(0.0)

    def times(b: Builder, x: Value, y: Value) -> Value:
        nothing = b.or_(b.fcmp_ordered("==", x, zero), b.fcmp_ordered("==", y, zero))
        return b.select(nothing, zero, b.fmul(x, y))

    def body(b: Builder, d: Value, moved: Value, z: Value, first: Value, second: Value) -> list[Value]:
        return [times(b, d, first), b.fadd(times(b, moved, first), times(b, times(b, second, d), z))]

    return _of_tiles(spec, "grads moved_grads products first second", body)


def drop_where(spec: Spec) -> Any:
    """Make ``drop(tile, kept, n)``: 0 where `kept` is 0."""
    zero = spec.vector.const(0.0)

    def body(b: Builder, x: Value, kept: Value) -> list[Value]:
        return [b.select(b.fcmp_ordered("==", kept, zero), zero, x)]

    return _of_tiles(spec, "tile kept", body)


def subtract_rows(spec: Spec) -> Any:
    """Make ``subtract(tile, other, n, lanes)``: tile -= other * lanes, one factor for each lane."""

    def build(b: Builder, tile: Value, other: Value, n: Value, lanes: Value) -> None:
        vector = spec.vector
        width = vector.bytes * vector.width
        factor = [b.fneg(vector.load(b, pointer(b, lanes), v * width)) for v in range(spec.block[1])]

        def step(j: Value, carried: list[Value]) -> list[Value]:
            p, q = carried
            for v in range(spec.block[1]):
                x = vector.fma(b, vector.load(b, q, v * width), factor[v], vector.load(b, p, v * width))
                vector.store(b, x, p, v * width)
            return [at(b, x, spec.block[1] * width) for x in carried]

        loop(b, n, [pointer(b, tile), pointer(b, other)], step)

    return routine("tile other n lanes", build)


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

        _tile_pass(spec, b, scores, n, body, state)

    return routine(f"scores n state factor:{_real(spec)}", build)


def add_bias(spec: Spec, element: Element) -> Any:
    """Make ``add(scores, n, rows, offset, stride, room, factor, state)``: s = s * factor + bias.

    It is -inf wherever the bias or s is, as a rule (`score_mod`) leaves it. Only -inf hides: a sum below all finite
    numbers, as ``finfo.min`` and a negative score have, becomes the lowest.

    `rows`, `offset` and `stride` say where the bias is, as in `tiles.gather_tile`, and `room` is a tile of scratch
    memory. Returns whether the maxima were written. Contiguous rows are transposed in registers, block by block, and
    added at once: by way of the tile, which the first-level cache does not hold beside the scores, it takes twice as
    long.
    """
    vector = spec.vector
    W, NV, size = vector.width, spec.block[1], element.size
    width = vector.bytes * W
    tile_row = NV * width
    gather = gather_tile(spec, element)
    real: Any = vector.dtype

    def adder(b: Builder, factor: Value) -> Callable[[Value, Value], Value]:
        c, hidden = vector.splat(b, factor), vector.const(float("-inf"))
        lowest = vector.const(float(np.finfo(vector.dtype).min))

        def add(s: Value, x: Value) -> Value:
            total = clamp(vector, b, vector.fma(b, s, c, x), lowest)
            return b.select(b.fcmp_ordered("==", vector.min(b, s, x), hidden), hidden, total)

        return add

    def by_tile(b: Builder, scores: Value, n: Value, bias: Value, factor: Value) -> None:
        _with_tile(spec, b, scores, n, bias, adder(b, factor))

    add_tile = routine(f"scores n bias factor:{_real(spec)}", by_tile)

    def by_block(b: Builder, scores: Value, n: Value, rows: Value, offset: Value, factor: Value, state: Value) -> None:
        add_to = adder(b, factor)

        def group(g: Value, _: list[Value]) -> list[Value]:
            sources = [at(b, row_group(b, rows, g, W, r), offset) for r in range(W)]
            target = at(b, pointer(b, scores), b.mul(g, I64(width)))

            def block(i: Value, highest: list[Value]) -> list[Value]:
                first = b.mul(i, I64(W))
                lines = [element.load(vector, b, at(b, p, b.mul(first, I64(size)))) for p in sources]
                row = at(b, target, b.mul(first, I64(tile_row)))
                for r, line in enumerate(vector.transpose(b, lines)):
                    total = add_to(vector.load(b, row, r * tile_row), line)
                    vector.store(b, total, row, r * tile_row)
                    highest = [vector.max(b, total, x) for x in highest]
                return highest

            start = [vector.const(float("-inf"))] if _takes_maximum(spec) else []
            for x in loop(b, b.sdiv(n, I64(W)), start, block):
                vector.store(b, x, at(b, pointer(b, state), b.mul(g, I64(width))), TILE_MAX * NV * width)
            return []

        loop(b, I64(NV), [], group)

    add_blocks = routine(f"scores n rows offset factor:{_real(spec)} state", by_block)

    @spec.jit
    def add(scores: int, n: int, rows: int, offset: int, stride: int, room: int, factor: float, state: int) -> bool:
        if stride == size and n >= W:
            rest = n % W
            add_blocks(scores, n - rest, rows, offset, factor, state)
            if rest > 0:
                gather(room, rows, offset + (n - W) * size, stride, W, real(1))
                add_tile(scores + (n - rest) * tile_row, rest, room + (W - rest) * tile_row, factor)
            return rest == 0
        gather(room, rows, offset, stride, n, real(1))
        add_tile(scores, n, room, factor)
        return False

    return add


def hide(spec: Spec) -> Any:
    """Make ``hide(scores, n, mask, factor, state)``: s = s * factor, and -inf wherever the mask is, whatever s was."""

    def build(b: Builder, scores: Value, n: Value, mask: Value, factor: Value, state: Value) -> None:
        c, hidden = spec.vector.splat(b, factor), spec.vector.const(float("-inf"))

        def body(s: Value, x: Value) -> Value:
            return b.select(b.fcmp_ordered("==", x, hidden), hidden, b.fmul(s, c))

        _with_tile(spec, b, scores, n, mask, body, state)

    return routine(f"scores n mask factor:{_real(spec)} state", build)


def hide_bits(spec: Spec) -> Any:
    """Make ``hide(scores, n, words, state)``: s = -inf where the bit of the lane is 0 in the word of the key.

    A word has the bits of each vector in bytes of their own.
    """

    def build(b: Builder, scores: Value, n: Value, words: Value, state: Value) -> None:
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

        _tile_pass(spec, b, scores, n, body, state)

    return routine("scores n words state", build)


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

        _tile_pass(spec, b, scores, n, body, state)

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
