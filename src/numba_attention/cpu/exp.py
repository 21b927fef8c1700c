"""exp2 and tanh on vectors, by minimax polynomials."""

from .simd import Builder, Value, Vector

# Minimax on [-0.5, 0.5] in relative error with p(0) = 1, high degree first. Degree 6 is within 0.93 ulp in float32;
# degree 5, within 2 ulp, is enough where the weights are rounded to bfloat16 anyway; degree 11, from interpolation at
# Chebyshev points, is for float64.
EXP2_F32 = (1.5353360504377633e-4, 1.3398875016719103e-3, 9.61843691766262e-3, 5.5503323674201965e-2,
            2.4022647738456726e-1, 6.931471824645996e-1, 1.0)  # fmt: skip
EXP2_BF16 = (1.3264723820611835e-3, 9.671512991189957e-3, 5.550733581185341e-2, 2.4022242426872253e-1,
             6.931470036506653e-1, 1.0)  # fmt: skip
EXP2_F64 = (4.4549605981865186e-10, 7.072585949269223e-09, 1.0178062445845774e-07, 1.321544258792169e-06,
            1.525273382983612e-05, 0.0001540353044173605, 0.0013333558146416936, 0.009618129107606888,
            0.0555041086648216, 0.24022650695910097, 0.6931471805599453, 1.0)  # fmt: skip


def exp2(vector: Vector, b: Builder, x: Value, coefficients: tuple[float, ...]) -> Value:
    """2**x for x <= 0, exactly 0 for x <= -exponent bias (so for -inf). NaN may become any number: see `trap`."""
    return exp2_clamped(vector, b, clamp(vector, b, x), coefficients)


def clamp(vector: Vector, b: Builder, x: Value) -> Value:
    """Raise x to the lowest argument of `exp2_clamped`; NaN stays NaN."""
    return vector.max(b, vector.const(-vector.exponent_bias), x)


def exp2_clamped(vector: Vector, b: Builder, x: Value, coefficients: tuple[float, ...]) -> Value:
    """2**x for -exponent bias <= x <= 0.

    The integer part of x comes from the low mantissa bits after adding 1.5 * 2**mantissa, and is added straight to the
    exponent bits of the polynomial. At the clamp the sum is the bit pattern of 0.
    """
    magic = vector.const(1.5 * 2.0**vector.mantissa)
    t = b.fadd(x, magic)
    f = b.fsub(x, b.fsub(t, magic))
    p = horner(vector, b, f, coefficients)
    exponent = b.shl(vector.bits_of(b, t), vector.iconst(vector.mantissa))
    return vector.from_bits(b, b.add(vector.bits_of(b, p), exponent))


def trap(vector: Vector, b: Builder, x: Value, total: Value) -> Value:
    """`total`, or NaN where the clamped x is NaN: one fma instead of a compare and a select on every weight."""
    return vector.fma(b, x, vector.const(0.0), total)


def horner(vector: Vector, b: Builder, x: Value, coefficients: tuple[float, ...]) -> Value:
    p = vector.const(coefficients[0])
    for c in coefficients[1:]:
        p = vector.fma(b, p, x, vector.const(c))
    return p


def tanh(vector: Vector, b: Builder, x: Value, coefficients: tuple[float, ...]) -> Value:
    """tanh(x) = -u / (2 + u) with u = exp(-2|x|) - 1, accurate relative to the result for small x too.

    With 2**f = 1 + f r(f), u = 2**n f r(f) + (2**n - 1) loses nothing where n = 0.
    """
    y = clamp(vector, b, b.fmul(vector.abs(b, x), vector.const(-2 * 1.4426950408889634)))
    magic = vector.const(1.5 * 2.0**vector.mantissa)
    t = b.fadd(y, magic)
    f = b.fsub(y, b.fsub(t, magic))
    rest = b.fmul(f, horner(vector, b, f, coefficients[:-1]))
    one = vector.const(1.0)
    power = b.add(b.shl(vector.bits_of(b, t), vector.iconst(vector.mantissa)), vector.bits_of(b, one))
    power = vector.from_bits(b, power)
    u = vector.fma(b, rest, power, b.fsub(power, one))
    magnitude = b.fdiv(b.fneg(u), b.fadd(vector.const(2.0), u))
    sign = b.and_(vector.bits_of(b, x), vector.iconst(-(2 ** (vector.bits - 1))))
    return vector.from_bits(b, b.or_(vector.bits_of(b, magnitude), sign))
