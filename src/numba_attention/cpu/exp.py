"""exp2, tanh, logarithms, powers, sine and cosine on vectors, by polynomials."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from llvmlite import ir

from .simd import I8, I16, I32, Builder, Value, Vector, call

# Minimax polynomials of 2**x on [-0.5, 0.5], in relative error with p(0) = 1, highest degree first. Degree 6 is within
# 0.93 ulp in float32; degree 5, within 2 ulp, is enough where weights are rounded to bfloat16 anyway; degree 11, by
# interpolation at Chebyshev points, is for float64.
EXP2_F32 = (1.5353360504377633e-4, 1.3398875016719103e-3, 9.61843691766262e-3, 5.5503323674201965e-2,
            2.4022647738456726e-1, 6.931471824645996e-1, 1.0)  # fmt: skip
EXP2_BF16 = (1.3264723820611835e-3, 9.671512991189957e-3, 5.550733581185341e-2, 2.4022242426872253e-1,
             6.931470036506653e-1, 1.0)  # fmt: skip
EXP2_F64 = (4.4549605981865186e-10, 7.072585949269223e-09, 1.0178062445845774e-07, 1.321544258792169e-06,
            1.525273382983612e-05, 0.0001540353044173605, 0.0013333558146416936, 0.009618129107606888,
            0.0555041086648216, 0.24022650695910097, 0.6931471805599453, 1.0)  # fmt: skip


class TwoStages(NamedTuple):
    """A function of vectors, ``finish(begin(x))``, for `in_two_stages`."""

    begin: Callable[[Value], list[Value]]
    finish: Callable[[list[Value]], Value]

    def __call__(self, x: Value) -> Value:
        return self.finish(self.begin(x))


def exp2_product(vector: Vector, b: Builder, factor: Value, coefficients: tuple[float, ...]) -> TwoStages:
    """The function 2**(x * factor) for x * factor of at most 0, or barely more; NaN where x is NaN.

    The scalar `factor` is positive. Where x * factor is at most -(exponent bias - 1), so also at -inf, the result is
    exactly 0. The product is never rounded: n is the integer next to it and the rest, x * factor - n, one fused
    multiply-add. So scores may be of any size as long as the difference x of two of them is small. The power 2**(n - 1)
    is the low mantissa bits of n + 1.5 * 2**mantissa + (exponent bias - 1), moved to the exponent, and 0 at the lowest
    n; the polynomial is 2 * 2**rest, and so no result is a subnormal number, which some processors are slow at.
    """
    lowest = vector.splat(b, b.fdiv(ir.Constant(vector.element, 1.0 - vector.exponent_bias), factor))
    c = vector.splat(b, factor)
    magic = vector.const(1.5 * 2.0**vector.mantissa + vector.exponent_bias - 1)

    def begin(x: Value) -> list[Value]:
        x = clamp(vector, b, x, lowest)
        t = vector.fma(b, x, c, magic)
        return [t, vector.fma(b, x, c, b.fsub(magic, t))]

    def finish(values: list[Value]) -> Value:
        t, rest = values
        p = horner(vector, b, rest, tuple(2 * c for c in coefficients))
        return b.fmul(p, vector.from_bits(b, b.shl(vector.bits_of(b, t), vector.iconst(vector.mantissa))))

    return TwoStages(begin, finish)


def clamp(vector: Vector, b: Builder, x: Value, lowest: Value) -> Value:
    """Raise x to `lowest`; NaN stays NaN."""
    return vector.max(b, lowest, x)


def horner(vector: Vector, b: Builder, x: Value, coefficients: tuple[float, ...]) -> Value:
    p = vector.const(coefficients[0])
    for c in coefficients[1:]:
        p = vector.fma(b, p, x, vector.const(c))
    return p


def tanh(vector: Vector, b: Builder, x: Value) -> Value:
    """tanh(x), accurate relative to the result for small x too."""
    one = ir.Constant(vector.element, 1.0)
    return with_sign(vector, b, tanh_of_size(vector, b, one, one)(x), x)


def with_sign(vector: Vector, b: Builder, size: Value, x: Value) -> Value:
    """A size of at least 0, with the sign of x."""
    sign = b.and_(vector.bits_of(b, x), vector.iconst(-(2 ** (vector.bits - 1))))
    return vector.from_bits(b, b.or_(vector.bits_of(b, size), sign))


def tanh_of_size(vector: Vector, b: Builder, factor: Value, outer: Value) -> TwoStages:
    """The function outer * tanh(|x| * factor) of vectors x, for scalars of at least 0; NaN where x is NaN."""
    by_table = vector.host.name == "AVX-512" and vector.bits == 32
    return (_tanh_by_table if by_table else _tanh_by_powers)(vector, b, factor, outer)


def _tanh_by_powers(vector: Vector, b: Builder, factor: Value, outer: Value) -> TwoStages:
    """The function outer * tanh(|x| * factor).

    It is -u / (2 + u) with u = exp(-2 |x| * factor) - 1. With 2**f = 1 + f r(f), u = 2**n f r(f) + (2**n - 1) loses
    nothing where n = 0.
    """
    coefficients = EXP2_F64 if vector.bits == 64 else EXP2_F32
    c = b.fmul(factor, ir.Constant(vector.element, -2 * LOG2E[0]))
    largest = ir.Constant(vector.element, float(-np.finfo(vector.dtype).max))
    c = b.select(b.fcmp_ordered("<", c, largest), largest, c)  # an infinite c times a score of 0 would be NaN
    highest = vector.splat(b, b.fdiv(ir.Constant(vector.element, -float(vector.exponent_bias)), c))
    c, y = vector.splat(b, c), vector.splat(b, outer)

    def begin(x: Value) -> list[Value]:
        size = vector.min(b, highest, vector.abs(b, x))  # NaN stays NaN
        magic = vector.const(1.5 * 2.0**vector.mantissa)
        t = vector.fma(b, size, c, magic)
        return [t, vector.fma(b, size, c, b.fsub(magic, t))]

    def finish(values: list[Value]) -> Value:
        t, f = values
        rest = b.fmul(f, horner(vector, b, f, coefficients[:-1]))
        one = vector.const(1.0)
        power = b.add(b.shl(vector.bits_of(b, t), vector.iconst(vector.mantissa)), vector.bits_of(b, one))
        power = vector.from_bits(b, power)
        u = vector.fma(b, rest, power, b.fsub(power, one))
        return b.fmul(y, b.fdiv(b.fsub(vector.const(0.0), u), b.fadd(vector.const(2.0), u)))

    return TwoStages(begin, finish)


# tanh(x) for y = 1 + x / TANH_STEP from 1 to 16, where it is 1 in float32: four intervals to an octave of y.
TANH_STEP = 0.625
TANH_BITS = 2  # of the mantissa of y, that count the intervals of an octave


def tanh_table() -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    """The coefficients of tanh in the distance of y from the left end of its interval, lowest degree first.

    Row ``bits >> 21 & 15`` of the bits of y in float32 is that of its interval, so the octave from 2 is the first. In
    float32 the error is at most 2e-7, relative to the result.
    """
    rows = []
    for octave in (2.0, 4.0, 8.0, 1.0):
        width = octave / 2**TANH_BITS
        for left in octave + width * np.arange(2**TANH_BITS):
            count = 5 if left == 1 else 6
            nodes = (1 - np.cos(np.pi * (2 * np.arange(count) + 1) / (2 * count))) / 2 * width  # of Chebyshev's
            values = np.tanh((left - 1 + nodes) * TANH_STEP)
            if left == 1:  # of tanh(r) / r: the product with r is small to the last bit where r is small
                values /= nodes
            row = np.linalg.solve(np.vander(nodes, increasing=True), values)
            rows.append([0.0, *row] if left == 1 else row)
    return np.array(rows)


def _tanh_by_table(vector: Vector, b: Builder, factor: Value, outer: Value) -> TwoStages:
    """The function outer * tanh(|x| * factor), by a polynomial of degree 5 for each of 16 intervals.

    `vpermps` picks the coefficients. Beside it seven multiply-adds are left for a vector in place of ten, and no
    division. `vpermt2ps`, which would pick from 32 intervals, shares the multiply-adds' units on Zen 5.
    """
    c = b.fdiv(factor, ir.Constant(vector.element, TANH_STEP))
    largest = ir.Constant(vector.element, float(np.finfo(vector.dtype).max))
    c = b.select(b.fcmp_ordered(">", c, largest), largest, c)  # an infinite c times a score of 0 would be NaN
    end = ir.Constant(vector.element, 15 * (1 - 2.0**-20))  # y stays below 16 in spite of three roundings
    highest, scale = vector.splat(b, b.fdiv(end, c)), vector.splat(b, outer)
    c, one = vector.splat(b, c), vector.const(1.0)
    shift = vector.mantissa - TANH_BITS
    columns = tanh_table().T.astype(vector.dtype).tolist()
    table = [b.fmul(scale, ir.Constant(vector.type, column)) for column in columns]

    def begin(x: Value) -> list[Value]:
        size = vector.min(b, highest, vector.abs(b, x))  # NaN stays NaN
        bits = vector.bits_of(b, vector.fma(b, size, c, one))
        left = vector.from_bits(b, b.and_(bits, vector.iconst(-(2**shift))))
        return [vector.fma(b, size, c, b.fsub(one, left)), b.lshr(bits, vector.iconst(shift))]

    def finish(values: list[Value]) -> Value:
        r, interval = values
        p = _pick(vector, b, table[-1], interval)
        for coefficients in table[-2::-1]:
            p = vector.fma(b, p, r, _pick(vector, b, coefficients, interval))
        return p

    return TwoStages(begin, finish)


def _pick(vector: Vector, b: Builder, table: Value, index: Value) -> Value:
    """For each lane the element of a table of 16 that the low four bits of the index name (AVX-512)."""
    return call(b, "llvm.x86.avx512.permvar.sf.512", vector.type, table, index)


# log(1 + f) / f on [-1/4, 1/2], in relative error 3.1e-8, by interpolation at Chebyshev points.
LOG_F32 = (5.295106411553002e-2, -1.1956825045437122e-1, 1.497289718653105e-1, -1.6835695982808357e-1,
           1.997903312671829e-1, -2.499291655505182e-1, 3.333350284006985e-1, -5.000006865297455e-1,
           9.999999977480766e-1)  # fmt: skip


LOG2E = 1.4426950408889634, 2.0355273740931033e-17  # in two parts


def exp2_anywhere(vector: Vector, b: Builder, x: Value, factor: float, rest_of_factor: float = 0.0) -> Value:
    """2**(x * (factor + rest_of_factor)) over the whole range: 0 below the normal numbers, infinity above.

    As `exp2_product`, whose results are at most 1. The largest power is 2 * 2**(exponent bias), infinity. AVX-512 has
    an instruction that multiplies by a power of two.
    """
    table = EXP2_F64 if vector.bits == 64 else EXP2_F32
    high = float(vector.dtype(factor))
    rest_of_factor += factor - high
    bias = vector.exponent_bias
    lowest = vector.const((1.0 - bias) / factor)
    highest = vector.const((bias + 1.25) / factor)  # of infinity, 2 * 2**bias
    if vector.host.name == "AVX-512":
        if factor != 1.0:  # the product may overflow; an infinite x needs no care, where the rest is NaN
            x = b.select(b.fcmp_ordered(">", x, highest), highest, x)
        n = rounded(vector, b, "rint", x if factor == 1.0 else b.fmul(x, vector.const(high)))
        rest = b.fsub(x, n) if factor == 1.0 else vector.fma(b, x, vector.const(high), b.fneg(n))
        if rest_of_factor != 0:
            rest = vector.fma(b, x, vector.const(rest_of_factor), rest)
        is_normal = b.fcmp_unordered(">", x, lowest)
        return _times_power(vector, b, horner(vector, b, rest, table), n, is_normal)
    x = clamp(vector, b, x, lowest)
    x = b.select(b.fcmp_ordered(">", x, highest), highest, x)  # NaN stays NaN
    magic = vector.const(1.5 * 2.0**vector.mantissa + bias - 1)
    t = vector.fma(b, x, vector.const(high), magic)
    rest = vector.fma(b, x, vector.const(high), b.fsub(magic, t))
    if rest_of_factor != 0:
        rest = vector.fma(b, x, vector.const(rest_of_factor), rest)
    p = horner(vector, b, rest, tuple(2 * c for c in table))
    return b.fmul(p, vector.from_bits(b, b.shl(vector.bits_of(b, t), vector.iconst(vector.mantissa))))


def _times_power(vector: Vector, b: Builder, x: Value, n: Value, flags: Value) -> Value:
    """X * 2**n where the flags are set, and 0 elsewhere; infinity for infinite n, also where x is NaN (AVX-512)."""
    kind, word = ("ps", I16) if vector.bits == 32 else ("pd", I8)
    name = f"llvm.x86.avx512.mask.scalef.{kind}.512"
    return call(b, name, vector.type, x, n, vector.const(0.0), b.bitcast(flags, word), I32(4))


def _split(vector: Vector, b: Builder, x: Value) -> tuple[Value, Value]:
    """K and m with x = 2**k m, m from 3/4 to 3/2, k a real number.

    For 0, infinity and NaN k is -inf, infinity and NaN, and for negative numbers m is NaN, so that logarithms need no
    other cases. AVX-512 has instructions for this.
    """
    one = vector.const(1.0)
    if vector.host.name == "AVX-512":
        kind, flags = ("ps", I16(-1)) if vector.bits == 32 else ("pd", I8(-1))
        zero, current, around_1_or_nan = vector.const(0.0), I32(4), I32(2 << 2 | 3)
        k = call(b, f"llvm.x86.avx512.mask.getexp.{kind}.512", vector.type, x, zero, flags, current)
        name = f"llvm.x86.avx512.mask.getmant.{kind}.512"
        m = call(b, name, vector.type, x, around_1_or_nan, zero, flags, current)
        return b.select(b.fcmp_ordered("<", m, one), b.fadd(k, one), k), m  # `getexp` is of m from 1 to 2
    shift = vector.mantissa + 1
    is_small = b.fcmp_ordered("<", x, vector.const(2.0 ** (1 - vector.exponent_bias)))  # subnormal numbers
    bits = vector.bits_of(b, b.select(is_small, b.fmul(x, vector.const(2.0**shift)), x))
    middle = int(vector.dtype(0.75).view(f"i{vector.bytes}"))
    power = b.ashr(b.sub(bits, vector.iconst(middle)), vector.iconst(vector.mantissa))
    m = vector.from_bits(b, b.sub(bits, b.shl(power, vector.iconst(vector.mantissa))))
    k = b.fadd(b.sitofp(power, vector.type), b.select(is_small, vector.const(-shift), vector.const(0.0)))
    infinity, zero = vector.const(float("inf")), vector.const(0.0)
    k = b.select(b.fcmp_ordered("<", x, infinity), k, x)
    k = b.select(b.fcmp_ordered("==", x, zero), b.fneg(infinity), k)
    m = b.select(b.fcmp_ordered("<", x, infinity), m, one)
    m = b.select(b.fcmp_ordered("==", x, zero), one, m)
    return k, b.select(b.fcmp_ordered("<", x, zero), vector.const(float("nan")), m)


def _log_near_one(vector: Vector, b: Builder, m: Value) -> tuple[Value, Value]:
    """log(m), for m from 3/4 to 3/2, as a product of two numbers.

    In float32 f Q(f) with f = m - 1; in float64 f - (h - s (h + R)) with s = f / (2 + f), h = f**2 / 2 and R the rest
    of the series of 2 atanh(s) / s, as in fdlibm's e_log.c.
    """
    one = vector.const(1.0)
    f = b.fsub(m, one)
    if vector.bits == 32:
        return f, horner(vector, b, f, LOG_F32)
    s = b.fdiv(f, b.fadd(f, vector.const(2.0)))
    z = b.fmul(s, s)
    series = b.fmul(z, horner(vector, b, z, tuple(2.0 / (2 * n + 1) for n in range(11, 0, -1))))
    half = b.fmul(b.fmul(f, f), vector.const(0.5))
    return b.fsub(f, b.fsub(half, b.fmul(s, b.fadd(half, series)))), one


def log(vector: Vector, b: Builder, x: Value) -> Value:
    """The natural logarithm, within 2 ulp."""
    power, m = _split(vector, b, x)
    return vector.fma(b, power, vector.const(0.6931471805599453), b.fmul(*_log_near_one(vector, b, m)))


def log2(vector: Vector, b: Builder, x: Value) -> Value:
    """The logarithm to base 2."""
    power, m = _split(vector, b, x)
    if vector.bits == 32:
        f = b.fsub(m, vector.const(1.0))
        return vector.fma(b, f, horner(vector, b, f, tuple(LOG2E[0] * c for c in LOG_F32)), power)
    f, rest = _log_near_one(vector, b, m)
    return vector.fma(b, b.fmul(f, vector.const(LOG2E[0])), rest, power)


def power(vector: Vector, b: Builder, x: Value, y: Value, known: float | None = None) -> Value:
    """x**y, as in IEEE 754: NaN for negative x and a y that is no integer.

    The relative error is that of y log2(x) in the compute type, 1e-6 for results up to 2**8 in float32.

    Parameters
    ----------
    vector, b, x, y
    known : float, optional
        y, where it is a constant.
    """
    zero, one, nan = vector.const(0.0), vector.const(1.0), vector.const(float("nan"))
    result = exp2_anywhere(vector, b, b.fmul(log2(vector, b, vector.abs(b, x)), y), 1.0)
    if known is not None and known % 1 and abs(known) < float("inf"):
        return b.select(b.fcmp_ordered("<", x, zero), nan, result)
    half = b.fmul(y, vector.const(0.5))
    whole = b.fcmp_ordered("==", rounded(vector, b, "floor", y), y)
    odd = b.and_(whole, b.fcmp_unordered("!=", rounded(vector, b, "floor", half), half))
    signed = b.select(odd, b.fneg(result), b.select(whole, result, nan))
    result = b.select(b.fcmp_ordered("<", x, zero), signed, result)
    is_one = b.or_(b.fcmp_ordered("==", y, zero), b.fcmp_ordered("==", x, one))
    return b.select(is_one, one, result)


def rounded(vector: Vector, b: Builder, how: str, x: Value) -> Value:
    """`how` is floor, ceil, trunc, or rint, to even."""
    return call(b, f"llvm.{how}.v{vector.width}f{vector.bits}", vector.type, x)


def sin(vector: Vector, b: Builder, x: Value, cosine: bool = False) -> Value:
    """sin(x), or cos(x): a multiple of pi/2 is taken off in three parts, and the rest goes into Taylor's series.

    The absolute error is some 1e-7 (1e-15 in float64) up to |x| = 1e4, and grows with |x| beyond. From 2**24
    (2**53) on the multiple is not exact, and the rest may be large; it is kept within what the series are for, so that
    every finite number has a result from -1 to 1.
    """
    quarter = rounded(vector, b, "rint", b.fmul(x, vector.const(2 / 3.141592653589793)))
    # Of few bits each (Cody and Waite): multiples of the first two are exact.
    parts = (1.5703125, 4.837512969970703e-4, 7.549789948768648e-8) if vector.bits == 32 else (
        1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624879595063154e-21
    )  # fmt: skip
    for part in parts:
        x = vector.fma(b, quarter, vector.const(-part), x)
    x = vector.max(b, vector.const(-1.0), vector.min(b, vector.const(1.0), x))
    z = b.fmul(x, x)
    count = 9 if vector.bits == 64 else 6
    of_sin, of_cos = [1.0], [1.0]
    for n in range(1, count):
        of_sin.append(-of_sin[-1] / (2 * n * (2 * n + 1)))
        of_cos.append(-of_cos[-1] / (2 * n * (2 * n - 1)))
    sine = b.fmul(x, horner(vector, b, z, tuple(reversed(of_sin))))
    cosine_of = horner(vector, b, z, tuple(reversed(of_cos)))
    # fptosi of a number beyond the integers is undefined, so only the rest of the division by 4 is converted.
    rest = b.fsub(quarter, b.fmul(vector.const(4.0), rounded(vector, b, "floor", b.fmul(quarter, vector.const(0.25)))))
    rest = b.select(b.fcmp_ordered("<=", rest, vector.const(4.0)), rest, vector.const(0.0))
    turn = b.add(b.fptosi(rest, vector.int_type), vector.iconst(1 if cosine else 0))
    zero = vector.iconst(0)
    swap = b.icmp_signed("!=", b.and_(turn, vector.iconst(1)), zero)
    negative = b.icmp_signed("!=", b.and_(turn, vector.iconst(2)), zero)
    result = b.select(swap, cosine_of, sine)
    result = b.select(negative, b.fneg(result), result)
    return result
