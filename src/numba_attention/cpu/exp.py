"""exp2 and tanh on vectors, by minimax polynomials."""

from llvmlite import ir

from .simd import Builder, Value, Vector

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


def exp2_product(
    vector: Vector, b: Builder, x: Value, factor: Value, lowest: Value, coefficients: tuple[float, ...]
) -> Value:
    """2**(x * factor) for x * factor of at most 0, or barely more; NaN where x is NaN.

    `factor` is positive and `lowest` is -(exponent bias - 1) / factor: x from there down, so also -inf, give exactly 0.
    The product is never rounded: n is the integer next to it and the rest, x * factor - n, one fused multiply-add. So
    scores may be of any size as long as the difference x of two of them is small. The power 2**(n - 1) is the low
    mantissa bits of n + 1.5 * 2**mantissa + (exponent bias - 1), moved to the exponent, and 0 at the lowest n; the
    polynomial is 2 * 2**rest, and so no result is a subnormal number, which some processors are slow at.
    """
    x = clamp(vector, b, x, lowest)
    magic = vector.const(1.5 * 2.0**vector.mantissa + vector.exponent_bias - 1)
    t = vector.fma(b, x, factor, magic)
    rest = vector.fma(b, x, factor, b.fsub(magic, t))
    p = horner(vector, b, rest, tuple(2 * c for c in coefficients))
    return b.fmul(p, vector.from_bits(b, b.shl(vector.bits_of(b, t), vector.iconst(vector.mantissa))))


def clamp(vector: Vector, b: Builder, x: Value, lowest: Value) -> Value:
    """Raise x to `lowest`; NaN stays NaN."""
    return vector.max(b, lowest, x)


def lowest_argument(vector: Vector, b: Builder, factor: Value) -> Value:
    """The x at which `exp2_product` with this factor (a scalar) becomes 0, in all lanes."""
    return vector.splat(b, b.fdiv(ir.Constant(vector.element, 1.0 - vector.exponent_bias), factor))


def horner(vector: Vector, b: Builder, x: Value, coefficients: tuple[float, ...]) -> Value:
    p = vector.const(coefficients[0])
    for c in coefficients[1:]:
        p = vector.fma(b, p, x, vector.const(c))
    return p


def tanh(vector: Vector, b: Builder, x: Value, coefficients: tuple[float, ...]) -> Value:
    """tanh(x) = -u / (2 + u) with u = exp(-2|x|) - 1, accurate relative to the result for small x too.

    With 2**f = 1 + f r(f), u = 2**n f r(f) + (2**n - 1) loses nothing where n = 0.
    """
    lowest = vector.const(-vector.exponent_bias)
    y = clamp(vector, b, b.fmul(vector.abs(b, x), vector.const(-2 * 1.4426950408889634)), lowest)
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
