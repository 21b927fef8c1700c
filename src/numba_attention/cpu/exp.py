"""exp2 and tanh on vectors, by minimax polynomials."""

from .simd import Builder, Value, Vector

# Minimax on [-0.5, 0.5] in relative error with p(0) = 1, high degree first. Degree 6 is within 0.93 ulp in float32;
# degree 5, within 2 ulp, is enough where the weights are rounded to bfloat16 anyway; degree 11 (3.4e-18) is for
# float64.
EXP2_F32 = (1.5353360504377633e-4, 1.3398875016719103e-3, 9.61843691766262e-3, 5.5503323674201965e-2,
            2.4022647738456726e-1, 6.931471824645996e-1, 1.0)  # fmt: skip
EXP2_BF16 = (1.3264723820611835e-3, 9.671512991189957e-3, 5.550733581185341e-2, 2.4022242426872253e-1,
             6.931470036506653e-1, 1.0)  # fmt: skip
EXP2_F64 = (4.4347712982003767e-10, 7.0737832485031333e-9, 1.0178199571842138e-7, 1.3215435282308488e-6,
            1.5252733493127489e-5, 1.5403530457112090e-4, 1.3333558146774621e-3, 9.6181291075120942e-3,
            5.5504108664820083e-2, 2.4022650695910131e-1, 6.9314718055994533e-1, 1.0)  # fmt: skip

# tanh(x) = x p(x^2) / q(x^2) for |x| <= 9, where tanh(9) rounds to 1: relative minimax by iteratively reweighted
# least squares, 2.1e-8, 5.2 ulp with the rounding of float32.
TANH_P = (1.3354703645890378e-8, 2.060912454168264e-5, 3.495591198322849e-3, 1.338102839176021e-1, 9.999999794659612e-1)
TANH_Q = (7.776579063802191e-7, 3.285639485336246e-4, 2.5876994402906403e-2, 4.6714343990292406e-1, 1.0)


def exp2(vector: Vector, b: Builder, x: Value, coefficients: tuple[float, ...]) -> Value:
    """2**x for x <= 0, exactly 0 for x <= -exponent bias (so for -inf). A NaN may come out as any number: see `trap`."""
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


def tanh(vector: Vector, b: Builder, x: Value) -> Value:
    if vector.bits == 32:
        high, low = vector.const(9.0), vector.const(-9.0)
        clamped = b.select(b.fcmp_ordered(">", x, high), high, b.select(b.fcmp_ordered("<", x, low), low, x))
        square = b.fmul(clamped, clamped)
        p = b.fmul(clamped, horner(vector, b, square, TANH_P))
        return b.fdiv(p, horner(vector, b, square, TANH_Q))
    # (1 - e) / (1 + e) with e = exp(-2|x|): absolute error near 1e-16, which is what a capped score needs.
    magnitude = vector.abs(b, x)
    e = exp2(vector, b, b.fmul(magnitude, vector.const(-2 * 1.4426950408889634)), EXP2_F64)
    one = vector.const(1.0)
    t = b.fdiv(b.fsub(one, e), b.fadd(one, e))
    negated = b.select(b.fcmp_ordered("<", x, vector.const(0.0)), b.fsub(vector.const(0.0), t), t)
    return b.select(b.fcmp_unordered("uno", x, x), x, negated)
