"""One step of the online softmax over a tile of scores: weights, running maximum, running denominator.

The state of a query row is (m, l, acc): maximum so far, denominator, unnormalised output. Merging two states (rescale
both to the larger m, add) is associative with identity (-inf, 0, 0); this folds one tile of keys into the state. The
backward pass has the denominators already, as lse. Milakov and Gimelshein, "Online normalizer calculation for softmax",
2018, algorithm 3.

Scores s are in some unit, that of the products or the natural one, which `factor` takes to powers of 2. The maximum is
subtracted from the scores as they are, and the difference multiplied: 2**((s - m) * factor). A maximum that is
multiplied and rounded first is off by half a unit in its last place, which from scores of 1e9 on is more than all
exponents.
"""

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from .exp import EXP2_BF16, EXP2_F32, EXP2_F64, TwoStages, exp2_product
from .gemm import pack_pairs
from .simd import I64, Builder, Value, Vector, at, in_two_stages, interleave, loop, pointer, routine, splat, store
from .spec import Spec

# Rows of the state scratch, each one vector block of query_tile values.
TILE_MAX, MAX, SUM, RESCALE, INVERSE, SLOPE, POSITION, FIRST, SPAN, BEFORE, SUM_HIGH, SUM_LOW, ROWS = range(13)
# Rows of a state besides, of derivatives along a direction: dlse, the tangent of delta, the sums of P ds and of dD.
MU, DELTA_TANGENT, SUM_MOVED, SUM_MOVED_GRADS, SECOND_ROWS = range(5)
LEVEL = 64  # tiles of keys whose sum is then added to a second, compensated level
SLACK = 2.0**-6  # binary logarithm of how far a recomputed weight may exceed 1, before its rounding
SUM_ROWS = 8  # rows of a tile that a micro-kernel of role "sum" takes at once, at most


def _coefficients(spec: Spec, pairs: bool) -> tuple[float, ...]:
    return EXP2_F64 if spec.vector.bits == 64 else EXP2_BF16 if pairs else EXP2_F32


def _real(spec: Spec) -> str:
    return "f64" if spec.vector.bits == 64 else "f32"


def _exponential(spec: Spec, b: Builder, factor: Value, pairs: bool) -> TwoStages:
    """The function 2**(x * factor) of vectors."""
    return exp2_product(spec.vector, b, factor, _coefficients(spec, pairs))


def _finite(vector: Vector, b: Builder, m: Value) -> Value:
    """The maximum to subtract: 0 for a row that has seen nothing, so that -inf - m stays -inf and not NaN."""
    return b.select(b.fcmp_ordered("==", m, vector.const(float("-inf"))), vector.const(0.0), m)


def _weigh_rows(
    spec: Spec, pairs: bool, b: Builder, scores: Value, n: Value, weights: Value, weigh: Callable[[int], TwoStages]
) -> list[Value]:
    """Replace scores by their weights, or write those as pairs; returns the sum of the weights, vector by vector.

    ``weigh(v)`` makes weights of vector v of a row.
    """
    vector = spec.vector
    NV = spec.block[1]
    width = vector.bytes * vector.width
    row_bytes = NV * width
    zeros = [vector.const(0.0)] * NV
    of_vector = [weigh(v) for v in range(NV)]

    def begin(row: Value, v: int) -> list[Value]:
        return of_vector[v].begin(vector.load(b, row, v * width))

    def finish(row: Value, v: int, values: list[Value], total: Value) -> Value:
        p = of_vector[v].finish(values)
        vector.store(b, p, row, v * width)
        return b.fadd(total, p)

    def pair(i: Value, carried: list[Value]) -> list[Value]:
        row, out, *totals = carried
        both = interleave(b, 2 * NV, lambda k: of_vector[k % NV](vector.load(b, row, k * width)))
        for v, (p0, p1) in enumerate(zip(both[:NV], both[NV:], strict=True)):
            totals[v] = b.fadd(b.fadd(totals[v], p0), p1)
            store(b, pack_pairs(b, p0, p1), out, v * width, align=4)
        return [at(b, row, 2 * row_bytes), at(b, out, row_bytes), *totals]

    if not pairs:
        return in_two_stages(b, n, scores, row_bytes, zeros, begin, finish)
    # Padding: pairs need an even number of rows, so that a row of hidden scores is appended.
    odd = b.and_(n, I64(1))
    with b.if_then(b.icmp_signed("!=", odd, I64(0))):
        row = at(b, scores, b.mul(n, I64(row_bytes)))
        for v in range(NV):
            vector.store(b, vector.const(float("-inf")), row, v * width)
    return loop(b, b.lshr(b.add(n, I64(1)), I64(1)), [scores, weights, *zeros], pair)[2:]


def softmax_step(spec: Spec, pairs: bool) -> Any:
    """Make ``step(scores, n, state, factor, weights)``: fold the tile into the state and write its weights.

    If `pairs`, the weights leave as bfloat16 pairs (j, j+1) in 32-bit words at `weights`, an odd last key paired with
    weight 0; else they replace the scores. A NaN score makes its weight and the denominator NaN.
    """
    vector = spec.vector
    NV = spec.block[1]
    width = vector.bytes * vector.width
    row_bytes = NV * width

    def build(b: Builder, scores: Value, n: Value, state: Value, factor: Value, weights: Value) -> None:
        px = pointer(b, state)
        exponential = _exponential(spec, b, factor, pairs)
        highest = []
        for v in range(NV):
            old = vector.load(b, px, MAX * row_bytes + v * width)
            new = vector.max(b, vector.load(b, px, TILE_MAX * row_bytes + v * width), old)
            highest.append(_finite(vector, b, new))
            vector.store(b, new, px, MAX * row_bytes + v * width)
            vector.store(b, exponential(b.fsub(old, highest[v])), px, RESCALE * row_bytes + v * width)

        def weigh(v: int) -> TwoStages:
            return TwoStages(lambda x: exponential.begin(b.fsub(x, highest[v])), exponential.finish)

        totals = _weigh_rows(spec, pairs, b, pointer(b, scores), n, pointer(b, weights), weigh)
        for v in range(NV):
            rescale = vector.load(b, px, RESCALE * row_bytes + v * width)
            before = vector.load(b, px, SUM * row_bytes + v * width)
            vector.store(b, vector.fma(b, before, rescale, totals[v]), px, SUM * row_bytes + v * width)

    return routine(f"scores n state factor:{_real(spec)} weights", build)


def normalised_weights(spec: Spec, pairs: bool = False) -> Any:
    """Make ``weigh(scores, n, state, factor, weights)``: weights are 2**((s - m) * factor) * inverse.

    The maximum m and the inverse are the state rows MAX and INVERSE; where the weights go is as in `softmax_step`.
    """
    vector = spec.vector
    NV = spec.block[1]
    width = vector.bytes * vector.width
    row_bytes = NV * width

    def build(b: Builder, scores: Value, n: Value, state: Value, factor: Value, weights: Value) -> None:
        px = pointer(b, state)
        exponential = _exponential(spec, b, factor, pairs)
        highest, inverse = [], []
        for v in range(NV):
            highest.append(_finite(vector, b, vector.load(b, px, MAX * row_bytes + v * width)))
            inverse.append(vector.load(b, px, INVERSE * row_bytes + v * width))

        def weigh(v: int) -> TwoStages:
            return TwoStages(
                lambda x: exponential.begin(b.fsub(x, highest[v])),
                lambda values: b.fmul(exponential.finish(values), inverse[v]),
            )

        _weigh_rows(spec, pairs, b, pointer(b, scores), n, pointer(b, weights), weigh)

    return routine(f"scores n state factor:{_real(spec)} weights", build)


def two_sum(b: Builder, x: Value, y: Value) -> tuple[Value, Value]:
    """The rounded sum x + y and its error, exactly: Knuth's TwoSum."""
    total = b.fadd(x, y)
    part = b.fsub(total, x)
    return total, b.fadd(b.fsub(x, b.fsub(total, part)), b.fsub(y, part))


def add_scaled(spec: Spec) -> Any:
    """Make ``add(high, low, x, n, factor)``: add n vectors x * factor to the unevaluated sum high + low."""
    vector = spec.vector
    width = vector.bytes * vector.width

    def build(b: Builder, high: Value, low: Value, x: Value, n: Value, factor: Value) -> None:
        c = vector.splat(b, factor)

        def body(i: Value, carried: list[Value]) -> list[Value]:
            p, q, r = carried
            total, error = two_sum(b, vector.load(b, p), b.fmul(vector.load(b, r), c))
            vector.store(b, total, p)
            vector.store(b, b.fadd(vector.load(b, q), error), q)
            return [at(b, y, width) for y in carried]

        loop(b, n, [pointer(b, high), pointer(b, low), pointer(b, x)], body)

    return routine(f"high low x n factor:{_real(spec)}", build)


def second_level(spec: Spec, online: bool = True) -> Any:
    """Make ``carry(tile, rows, high, low, state, factor)``: add rows of a tile to a second level, and clear them.

    That level is an unevaluated sum high + low of two numbers, to which Knuth's TwoSum adds without error. Of sums in
    one number the error grows with their length, here with that of the first level. If `online`, what the second level
    has is first rescaled from the maximum BEFORE of the state to MAX; with the row SUM of the state, SUM_HIGH and
    SUM_LOW that is done too, and BEFORE becomes MAX. Else the state is left alone.
    """
    vector = spec.vector
    NV = spec.block[1]
    width = vector.bytes * vector.width
    row_bytes = NV * width

    def build(b: Builder, tile: Value, rows: Value, high: Value, low: Value, state: Value, factor: Value) -> None:
        px = pointer(b, state)
        exponential = _exponential(spec, b, factor, False)
        rescale = []
        for v in range(NV if online else 0):
            new = vector.load(b, px, MAX * row_bytes + v * width)
            old = vector.load(b, px, BEFORE * row_bytes + v * width)
            rescale.append(exponential(b.fsub(old, _finite(vector, b, new))))
            vector.store(b, new, px, BEFORE * row_bytes + v * width)

        def fold(p: Value, p_high: Value, p_low: Value, v: int) -> None:
            x, y, z = (vector.load(b, q, v * width) for q in (p, p_high, p_low))
            if online:
                scaled = b.fmul(y, rescale[v])
                z = vector.fma(b, z, rescale[v], vector.fma(b, y, rescale[v], b.fneg(scaled)))
                y = scaled
            total, error = two_sum(b, y, x)
            vector.store(b, total, p_high, v * width)
            vector.store(b, b.fadd(z, error), p_low, v * width)
            vector.store(b, vector.const(0.0), p, v * width)

        def body(i: Value, carried: list[Value]) -> list[Value]:
            for v in range(NV):
                p, p_high, p_low = carried
                fold(p, p_high, p_low, v)
            return [at(b, p, row_bytes) for p in carried]

        for v in range(NV if online else 0):
            total, total_high, total_low = (at(b, px, row * row_bytes) for row in (SUM, SUM_HIGH, SUM_LOW))
            fold(total, total_high, total_low, v)
        loop(b, rows, [pointer(b, tile), pointer(b, high), pointer(b, low)], body)

    return routine(f"tile rows high low state factor:{_real(spec)}", build)


def invert_sums(spec: Spec) -> Any:
    """Make ``invert(state, scale, normalized)``: the row INVERSE becomes scale / SUM, and RESCALE too.

    If `normalized`, RESCALE is also divided by what INVERSE was. Returns whether a sum is 0.
    """
    vector = spec.vector
    NV = spec.block[1]
    width = vector.bytes * vector.width
    row_bytes = NV * width

    def build(b: Builder, state: Value, scale: Value, normalized: Value) -> Value:
        px = pointer(b, state)
        c, zero, one = vector.splat(b, scale), vector.const(0.0), vector.const(1.0)
        before = splat(b, b.icmp_signed("!=", normalized, I64(0)), vector.width)
        no_sum = ir.Constant(ir.VectorType(ir.IntType(1), vector.width), [0] * vector.width)
        for v in range(NV):
            total = vector.load(b, px, SUM * row_bytes + v * width)
            no_sum = b.or_(no_sum, b.fcmp_ordered("==", total, zero))
            inverse = b.fdiv(c, total)
            divisor = b.select(before, vector.load(b, px, INVERSE * row_bytes + v * width), one)
            vector.store(b, b.fdiv(inverse, divisor), px, RESCALE * row_bytes + v * width)
            vector.store(b, inverse, px, INVERSE * row_bytes + v * width)
        lanes = b.bitcast(no_sum, ir.IntType(vector.width))
        return b.icmp_signed("!=", lanes, ir.Constant(lanes.type, 0))

    return routine(f"state scale:{_real(spec)} normalized", build, result=types.boolean)


def power_below(spec: Spec) -> Any:
    """Make ``power(total)``: the largest power of two p with p * total <= 1, 0 for 0 and NaN for NaN."""
    real: Any = spec.vector.dtype

    @spec.jit
    def power(total: float) -> Any:
        if total == 0 or not math.isfinite(total):
            return real(total)
        return real(math.ldexp(1.0, -math.frexp(total)[1]))

    return power


def add_tiles(spec: Spec) -> Any:
    """Make ``add(target, first, second, rows)``: target = first + second."""
    vector = spec.vector
    NV = spec.block[1]
    width = vector.bytes * vector.width

    def build(b: Builder, target: Value, first: Value, second: Value, rows: Value) -> None:
        def body(i: Value, carried: list[Value]) -> list[Value]:
            p, q, r = carried
            for v in range(NV):
                vector.store(b, b.fadd(vector.load(b, q, v * width), vector.load(b, r, v * width)), p, v * width)
            return [at(b, x, NV * width) for x in carried]

        loop(b, rows, [pointer(b, target), pointer(b, first), pointer(b, second)], body)

    return routine("target first second rows", build)


def softmax_gradient(spec: Spec) -> Any:
    """Make ``differentiate(scores, grads, n, state, factor)``: dS = P (dP - delta).

    Scores become P = 2**((s - m) * factor) * inverse and the gradients dP of P become dS; m, inverse and delta are the
    state rows MAX, INVERSE and SUM. A weight of exactly 0 has no gradient, whatever dP is. Rows up to the next multiple
    of `SUM_ROWS` become 0.

    No weight exceeds 1 by more than `SLACK` allows: where a score is the small difference of large products, summed in
    another order than in the forward pass, it may lie above m by any amount.
    """
    vector = spec.vector
    NV = spec.block[1]
    width = vector.bytes * vector.width
    row_bytes = NV * width
    zero = vector.const(0.0)

    def build(b: Builder, scores: Value, grads: Value, n: Value, state: Value, factor: Value) -> None:
        px = pointer(b, state)
        exponential = _exponential(spec, b, factor, spec.bf16_dot)
        slack = vector.splat(b, b.fdiv(ir.Constant(vector.element, SLACK), factor))
        highest, inverse, delta = (
            [vector.load(b, px, row * row_bytes + v * width) for v in range(NV)] for row in (MAX, INVERSE, SUM)
        )

        to_grads = b.sub(grads, scores)

        def begin(row: Value, v: int) -> list[Value]:
            return exponential.begin(vector.min(b, slack, b.fsub(vector.load(b, row, v * width), highest[v])))

        def finish(row: Value, v: int, values: list[Value], none: Value) -> Value:
            grad = at(b, row, to_grads)
            p = b.fmul(exponential.finish(values), inverse[v])
            vector.store(b, p, row, v * width)
            ds = b.fmul(p, b.fsub(vector.load(b, grad, v * width), delta[v]))
            vector.store(b, b.select(b.fcmp_ordered("==", p, zero), zero, ds), grad, v * width)
            return none

        def clear(i: Value, carried: list[Value]) -> list[Value]:
            row, grad = carried
            for v in range(NV):
                vector.store(b, zero, row, v * width)
                vector.store(b, zero, grad, v * width)
            return [at(b, row, row_bytes), at(b, grad, row_bytes)]

        in_two_stages(b, n, pointer(b, scores), row_bytes, [I64(0)] * NV, begin, finish)
        missing, rows = b.and_(b.sub(I64(0), n), I64(SUM_ROWS - 1)), b.mul(n, I64(row_bytes))
        loop(b, missing, [at(b, pointer(b, x), rows) for x in (scores, grads)], clear)

    return routine(f"scores grads n state factor:{_real(spec)}", build)


def moved_weights(spec: Spec, of_gradients: bool) -> Any:
    """Make ``move(scores, moved, target, grads, moved_grads, n, state, second, factor)``: weights and what they become.

    Along a direction in which scores move by ds, `moved`, the weights P = 2**((s - m) * factor) * inverse move by
    P (ds - mu), `target`, which may be where `moved` is. If `of_gradients`, the gradients dP of P at `grads` become
    D = P (dP - delta), and their tangents ddP at `moved_grads` become P (ds - mu) (dP - delta) + P (ddP - ddelta).
    m, inverse and delta are rows of the state as in `softmax_gradient`, mu and ddelta rows of the second state, to
    which the sums of P (ds - mu) and of the tangents of D are added. A weight of exactly 0 makes all of them 0. Rows up
    to the next multiple of `SUM_ROWS` become 0.
    """
    vector = spec.vector
    NV = spec.block[1]
    width = vector.bytes * vector.width
    row_bytes = NV * width
    zero = vector.const(0.0)

    def build(
        b: Builder, scores: Value, moved: Value, target: Value, grads: Value, moved_grads: Value, n: Value,
        state: Value, second: Value, factor: Value,
    ) -> None:  # fmt: skip
        px, ps = pointer(b, state), pointer(b, second)
        exponential = _exponential(spec, b, factor, False)
        slack = vector.splat(b, b.fdiv(ir.Constant(vector.element, SLACK), factor))
        highest, inverse, delta = (
            [vector.load(b, px, row * row_bytes + v * width) for v in range(NV)] for row in (MAX, INVERSE, SUM)
        )
        mu, moved_delta = (
            [vector.load(b, ps, row * row_bytes + v * width) for v in range(NV)] for row in (MU, DELTA_TANGENT)
        )
        sums = SUM_MOVED, SUM_MOVED_GRADS

        def body(i: Value, carried: list[Value]) -> list[Value]:
            places, totals = carried[:5], carried[5:]
            row, source, out, grad, moved_grad = places

            def move(v: int) -> list[Value]:
                difference = vector.min(b, slack, b.fsub(vector.load(b, row, v * width), highest[v]))
                p = b.fmul(exponential(difference), inverse[v])
                is_zero = b.fcmp_ordered("==", p, zero)
                vector.store(b, p, row, v * width)
                change = b.fmul(p, b.fsub(vector.load(b, source, v * width), mu[v]))
                change = b.select(is_zero, zero, change)
                vector.store(b, change, out, v * width)
                new = [b.fadd(totals[v], change)]
                if of_gradients:
                    off = b.fsub(vector.load(b, grad, v * width), delta[v])
                    d = b.select(is_zero, zero, b.fmul(p, off))
                    moved_off = b.fsub(vector.load(b, moved_grad, v * width), moved_delta[v])
                    moved_d = vector.fma(b, p, moved_off, b.fmul(change, off))
                    moved_d = b.select(is_zero, zero, moved_d)
                    vector.store(b, d, grad, v * width)
                    vector.store(b, moved_d, moved_grad, v * width)
                    new.append(b.fadd(totals[NV + v], moved_d))
                return new

            new = interleave(b, NV, move)
            return [
                *(at(b, x, row_bytes) for x in places),
                *(total for kind in zip(*new, strict=True) for total in kind),
            ]

        def clear(i: Value, carried: list[Value]) -> list[Value]:
            for x in (carried[0], *carried[2:]) if of_gradients else (carried[0], carried[2]):
                for v in range(NV):
                    vector.store(b, zero, x, v * width)
            return [at(b, x, row_bytes) for x in carried]

        first = [pointer(b, x) for x in (scores, moved, target, grads, moved_grads)]
        count = 2 * NV if of_gradients else NV
        end = loop(b, n, [*first, *[zero] * count], body)
        for k, total in enumerate(end[5:]):
            place = sums[k // NV] * row_bytes + k % NV * width
            vector.store(b, b.fadd(vector.load(b, ps, place), total), ps, place)
        missing = b.and_(b.sub(I64(0), n), I64(SUM_ROWS - 1))
        loop(b, missing, end[:5], clear)

    return routine(f"scores moved target grads moved_grads n state second factor:{_real(spec)}", build)


def follow_weights(spec: Spec) -> Any:
    """Make ``follow(weights, moved, target, n, state, second)``: target = weights * moved, where weights are not 0.

    For weights relative to a running maximum, as `softmax_step` leaves them: the row SUM_MOVED of the second state is
    rescaled as that says, and the sums over the n rows are added.
    """
    vector = spec.vector
    NV = spec.block[1]
    width = vector.bytes * vector.width
    row_bytes = NV * width
    zero = vector.const(0.0)

    def build(b: Builder, weights: Value, moved: Value, target: Value, n: Value, state: Value, second: Value) -> None:
        px, ps = pointer(b, state), pointer(b, second)

        def body(i: Value, carried: list[Value]) -> list[Value]:
            (weight, source, out), totals = carried[:3], carried[3:]
            for v in range(NV):
                w = vector.load(b, weight, v * width)
                change = b.fmul(w, vector.load(b, source, v * width))
                change = b.select(b.fcmp_ordered("==", w, zero), zero, change)
                vector.store(b, change, out, v * width)
                totals[v] = b.fadd(totals[v], change)
            return [*(at(b, x, row_bytes) for x in (weight, source, out)), *totals]

        end = loop(b, n, [*(pointer(b, x) for x in (weights, moved, target)), *[zero] * NV], body)
        for v, total in enumerate(end[3:]):
            place = SUM_MOVED * row_bytes + v * width
            rescale = vector.load(b, px, RESCALE * row_bytes + v * width)
            vector.store(b, vector.fma(b, vector.load(b, ps, place), rescale, total), ps, place)

    return routine("weights moved target n state second", build)


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


def multiply_tile(spec: Spec, keeps_zero: bool = False) -> Any:
    """Make ``multiply(tile, n, other)``: tile *= other, over n rows; if `keeps_zero`, 0 also times infinity or NaN."""
    vector = spec.vector
    NV = spec.block[1]
    width = vector.bytes * vector.width

    def build(b: Builder, tile: Value, n: Value, other: Value) -> None:
        def body(i: Value, carried: list[Value]) -> list[Value]:
            p, q = carried
            for v in range(NV):
                x = vector.load(b, p, v * width)
                product = b.fmul(x, vector.load(b, q, v * width))
                if keeps_zero:
                    product = b.select(b.fcmp_ordered("==", x, vector.const(0.0)), x, product)
                vector.store(b, product, p, v * width)
            return [at(b, p, NV * width), at(b, q, NV * width)]

        loop(b, n, [pointer(b, tile), pointer(b, other)], body)

    return routine("tile n other", build)
