"""One step of the online softmax over a tile of scores: weights, running maximum, running denominator.

The state of a query row is (m, l, acc): maximum so far in the log2 domain, denominator, unnormalised output. Merging
two states (rescale both to the larger m, add) is associative with identity (-inf, 0, 0); this folds one tile of keys
into the state. The backward pass has the denominators already, as lse. Milakov and Gimelshein, "Online normalizer
calculation for softmax", 2018, algorithm 3.
"""

from typing import Any

from llvmlite import ir

from .elements import Spec
from .exp import EXP2_BF16, EXP2_F32, EXP2_F64, clamp, exp2, exp2_clamped, trap
from .gemm import BF32
from .simd import I32, I64, Builder, Value, Vector, at, call, loop, pointer, routine, store

# Rows of the state scratch, each one vector block of query_tile values.
TILE_MAX, MAX, SUM, RESCALE, SLOPE, POSITION, FIRST, SPAN, ROWS = range(9)
SUM_ROWS = 8  # rows of a tile that a micro-kernel of role "sum" takes at once, at most


def _coefficients(spec: Spec, pairs: bool) -> tuple[float, ...]:
    return EXP2_F64 if spec.vector.bits == 64 else EXP2_BF16 if pairs else EXP2_F32


def _finite(vector: Vector, b: Builder, m: Value) -> Value:
    """The maximum to subtract: 0 for a row that has seen nothing, so that -inf - m stays -inf and not NaN."""
    return b.select(b.fcmp_ordered("==", m, vector.const(float("-inf"))), vector.const(0.0), m)


def _weights(spec: Spec, b: Builder, s: Value, total: Value, coefficients: tuple[float, ...]) -> tuple[Value, Value]:
    """exp2(s) and its addition to the denominator; a NaN score makes the denominator NaN (exp2 itself may lose it)."""
    vector = spec.vector
    x = clamp(vector, b, s)
    p = exp2_clamped(vector, b, x, coefficients)
    return p, b.fadd(trap(vector, b, x, total), p)


def softmax_step(spec: Spec, pairs: bool) -> Any:
    """Make ``step(scores, n, state, factor, weights)``: scores are scaled by factor, their weights written.

    If `pairs`, the weights leave as bfloat16 pairs (j, j+1) in 32-bit words at `weights`, an odd last key paired with
    weight 0; else they replace the scores.
    """
    vector = spec.vector
    NV = spec.block[1]
    width = vector.bytes * vector.width
    row_bytes = NV * width
    coefficients = _coefficients(spec, pairs)

    def build(b: Builder, scores: Value, n: Value, state: Value, factor: Value, weights: Value) -> None:
        ps, px, pw = pointer(b, scores), pointer(b, state), pointer(b, weights)
        c = vector.splat(b, factor)
        shift = []
        for v in range(NV):
            old = vector.load(b, px, MAX * row_bytes + v * width)
            new = vector.max(b, b.fmul(vector.load(b, px, TILE_MAX * row_bytes + v * width), c), old)
            finite = _finite(vector, b, new)
            vector.store(b, new, px, MAX * row_bytes + v * width)
            rescale = exp2(vector, b, b.fsub(old, finite), coefficients)
            vector.store(b, rescale, px, RESCALE * row_bytes + v * width)
            shift.append(b.fneg(finite))

        def weigh(p: Value, v: int, total: Value) -> tuple[Value, Value]:
            s = vector.fma(b, vector.load(b, p, v * width), c, shift[v])
            return _weights(spec, b, s, total, coefficients)

        def single(i: Value, carried: list[Value]) -> list[Value]:
            row, *totals = carried
            for v in range(NV):
                p, totals[v] = weigh(row, v, totals[v])
                vector.store(b, p, row, v * width)
            return [at(b, row, row_bytes), *totals]

        def pair(i: Value, carried: list[Value]) -> list[Value]:
            row, out, *totals = carried
            for v in range(NV):
                p0, totals[v] = weigh(row, v, totals[v])
                p1, totals[v] = weigh(at(b, row, row_bytes), v, totals[v])
                store(b, _pack_pairs(b, p0, p1), out, v * width, align=4)
            return [at(b, row, 2 * row_bytes), at(b, out, row_bytes), *totals]

        zeros = [vector.const(0.0)] * NV
        if pairs:
            # A missing odd row is made a hidden one.
            odd = b.and_(n, I64(1))
            with b.if_then(b.icmp_signed("!=", odd, I64(0))):
                row = at(b, ps, b.mul(n, I64(row_bytes)))
                for v in range(NV):
                    vector.store(b, vector.const(float("-inf")), row, v * width)
            _, _, *totals = loop(b, b.lshr(b.add(n, I64(1)), I64(1)), [ps, pw, *zeros], pair)
        else:
            _, *totals = loop(b, n, [ps, *zeros], single)
        for v in range(NV):
            rescale = vector.load(b, px, RESCALE * row_bytes + v * width)
            before = vector.load(b, px, SUM * row_bytes + v * width)
            vector.store(b, vector.fma(b, before, rescale, totals[v]), px, SUM * row_bytes + v * width)

    kind = "f64" if vector.bits == 64 else "f32"
    return routine(f"scores n state factor:{kind} weights", build)


def _pack_pairs(b: Builder, low: Value, high: Value) -> Value:
    """Round two vectors to bfloat16 and interleave them into 32-bit words."""
    both = call(b, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", BF32, high, low)
    order = ir.Constant(ir.VectorType(I32, 32), [i // 2 + 16 * (i % 2) for i in range(32)])
    return b.bitcast(b.shuffle_vector(both, both, order), ir.VectorType(I32, 16))


def normalised_weights(spec: Spec) -> Any:
    """Make ``weigh(scores, n, state, factor)``: scores become exp2(score * factor - m) * rescale."""
    vector = spec.vector
    NV = spec.block[1]
    width = vector.bytes * vector.width
    row_bytes = NV * width

    def build(b: Builder, scores: Value, n: Value, state: Value, factor: Value) -> None:
        px = pointer(b, state)
        c = vector.splat(b, factor)
        shift, inverse = [], []
        for v in range(NV):
            m = vector.load(b, px, MAX * row_bytes + v * width)
            shift.append(b.fneg(_finite(vector, b, m)))
            inverse.append(vector.load(b, px, RESCALE * row_bytes + v * width))

        def body(i: Value, carried: list[Value]) -> list[Value]:
            (row,) = carried
            for v in range(NV):
                s = vector.fma(b, vector.load(b, row, v * width), c, shift[v])
                p = exp2(vector, b, s, _coefficients(spec, False))
                vector.store(b, b.fmul(p, inverse[v]), row, v * width)
            return [at(b, row, row_bytes)]

        loop(b, n, [pointer(b, scores)], body)

    kind = "f64" if vector.bits == 64 else "f32"
    return routine(f"scores n state factor:{kind}", build)


def softmax_gradient(spec: Spec) -> Any:
    """Make ``differentiate(scores, grads, n, state, factor)``: P = exp2(score * factor - lse), dS = P (dP - delta).

    Scores become P and the gradients dP of P become dS; lse (log2 domain) and delta are the state rows MAX and SUM. A
    weight of exactly 0 has no gradient, whatever dP is. Rows up to the next multiple of `SUM_ROWS` are made 0.
    """
    vector = spec.vector
    NV = spec.block[1]
    width = vector.bytes * vector.width
    row_bytes = NV * width
    zero = vector.const(0.0)

    def build(b: Builder, scores: Value, grads: Value, n: Value, state: Value, factor: Value) -> None:
        px = pointer(b, state)
        c = vector.splat(b, factor)
        shift = [b.fneg(vector.load(b, px, MAX * row_bytes + v * width)) for v in range(NV)]
        delta = [vector.load(b, px, SUM * row_bytes + v * width) for v in range(NV)]

        def body(i: Value, carried: list[Value]) -> list[Value]:
            row, grad = carried
            for v in range(NV):
                x = clamp(vector, b, vector.fma(b, vector.load(b, row, v * width), c, shift[v]))
                p = trap(vector, b, x, exp2_clamped(vector, b, x, _coefficients(spec, False)))
                vector.store(b, p, row, v * width)
                ds = b.fmul(p, b.fsub(vector.load(b, grad, v * width), delta[v]))
                vector.store(b, b.select(b.fcmp_ordered("==", p, zero), zero, ds), grad, v * width)
            return [at(b, row, row_bytes), at(b, grad, row_bytes)]

        def clear(i: Value, carried: list[Value]) -> list[Value]:
            row, grad = carried
            for v in range(NV):
                vector.store(b, zero, row, v * width)
                vector.store(b, zero, grad, v * width)
            return [at(b, row, row_bytes), at(b, grad, row_bytes)]

        end = loop(b, n, [pointer(b, scores), pointer(b, grads)], body)
        missing = b.and_(b.sub(I64(0), n), I64(SUM_ROWS - 1))
        loop(b, missing, end, clear)

    kind = "f64" if vector.bits == 64 else "f32"
    return routine(f"scores grads n state factor:{kind}", build)


def row_products(spec: Spec) -> Any:
    """Make ``multiply(a, b, n, target)``: target[lane] = sum_e a[e, lane] b[e, lane] over n rows of two tiles."""
    vector = spec.vector
    NV = spec.block[1]
    width = vector.bytes * vector.width

    def build(b: Builder, first: Value, second: Value, n: Value, target: Value) -> None:
        def body(i: Value, carried: list[Value]) -> list[Value]:
            p, q, *total = carried
            for v in range(NV):
                total[v] = vector.fma(b, vector.load(b, p, v * width), vector.load(b, q, v * width), total[v])
            return [at(b, p, NV * width), at(b, q, NV * width), *total]

        zeros = [vector.const(0.0)] * NV
        _, _, *total = loop(b, n, [pointer(b, first), pointer(b, second), *zeros], body)
        for v in range(NV):
            vector.store(b, total[v], pointer(b, target), v * width)

    return routine("first second n target", build)


def multiply_tile(spec: Spec) -> Any:
    """Make ``multiply(tile, n, other)``: tile *= other, over n rows."""
    vector = spec.vector
    NV = spec.block[1]
    width = vector.bytes * vector.width

    def build(b: Builder, tile: Value, n: Value, other: Value) -> None:
        def body(i: Value, carried: list[Value]) -> list[Value]:
            p, q = carried
            for v in range(NV):
                vector.store(b, b.fmul(vector.load(b, p, v * width), vector.load(b, q, v * width)), p, v * width)
            return [at(b, p, NV * width), at(b, q, NV * width)]

        loop(b, n, [pointer(b, tile), pointer(b, other)], body)

    return routine("tile n other", build)
