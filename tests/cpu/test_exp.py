"""exp2 of products and tanh against NumPy's in higher precision, over their whole range."""

import numpy as np
import pytest
from numba import njit

from numba_attention.cpu.exp import EXP2_BF16, EXP2_F32, EXP2_F64, exp2_product, tanh
from numba_attention.cpu.simd import HOST, Vector, load, pointer, routine, store


def apply(build, bits, x):
    """Run an IR function of one vector over an array."""
    vector = Vector(bits, HOST)

    def body(b, source, target):
        value = load(b, vector.type, pointer(b, source), align=vector.bytes)
        store(b, build(vector, b, value), pointer(b, target), align=vector.bytes)

    op = routine("source target", body)
    width = vector.width * vector.bytes

    @njit
    def run(source, target, n):
        for i in range(n):
            op(source + i * width, target + i * width)

    padded = np.resize(x.astype(vector.dtype), -(-len(x) // vector.width) * vector.width)
    result = np.empty_like(padded)
    run(padded.ctypes.data, result.ctypes.data, len(padded) // vector.width)
    return padded, result


def ulps(result, exact):
    return np.abs(result - exact) / np.spacing(exact.astype(result.dtype)).astype(exact.dtype)


def exp2(bits, table, factor, x):
    def build(v, b, y):
        lowest = v.const(-(v.exponent_bias - 1) / float(v.dtype(factor)))
        return exp2_product(v, b, y, v.const(factor), lowest, table)

    return apply(build, bits, x)


FACTORS = [1.0, np.log2(np.e), 1.9 * np.log2(np.e), 1e-30, 1e30]


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(("bits", "table", "limit"), [(32, EXP2_F32, 1.1), (32, EXP2_BF16, 2.2), (64, EXP2_F64, 1.5)])
def test_exp2(bits, table, limit, factor):
    x = np.r_[-np.random.default_rng(0).uniform(0, 120, 200_000), -np.logspace(-9, 0, 1000), 0.0, -1.0, -0.5] / factor
    x, result = exp2(bits, table, factor, x)
    exact = x.astype(np.longdouble) * np.longdouble(x.dtype.type(factor))
    assert ulps(result, np.exp2(exact)).max() <= limit


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(("bits", "table"), [(32, EXP2_F32), (32, EXP2_BF16), (64, EXP2_F64)])
def test_exp2_is_exactly_zero_for_what_is_hidden_one_at_zero_and_nan_for_nan(bits, table, factor):
    x = np.array([-np.inf, float(np.finfo(f"f{bits // 8}").min), -2000.0 / factor, 0.0, np.nan])
    _, result = exp2(bits, table, factor, x)
    assert list(result[:4]) == [0, 0, 0, 1]
    assert np.isnan(result[4])


@pytest.mark.parametrize(("bits", "table"), [(32, EXP2_F32), (64, EXP2_F64)])
def test_exp2_makes_no_subnormal_numbers(bits, table):
    bias = 2 ** (7 if bits == 32 else 10)
    x, result = exp2(bits, table, 1.0, -np.linspace(bias - 4, bias + 4, 4000))
    assert np.all((result == 0) | (result >= np.finfo(x.dtype).smallest_normal))
    assert np.all(np.diff(result) <= 0)


@pytest.mark.parametrize(("bits", "table", "limit"), [(32, EXP2_F32, 4), (64, EXP2_F64, 5)])
def test_tanh(bits, table, limit):
    magnitude = np.r_[np.random.default_rng(0).uniform(0, 12, 200_000), np.logspace(-8, 0, 20_000), 50.0, 1e6]
    x, result = apply(lambda v, b, y: tanh(v, b, y, table), bits, np.r_[magnitude, -magnitude])
    assert ulps(result, np.tanh(x.astype(np.longdouble))).max() <= limit
    _, special = apply(lambda v, b, y: tanh(v, b, y, table), bits, np.array([np.inf, -np.inf, 0.0, np.nan]))
    assert list(special[:3]) == [1, -1, 0]
    assert np.isnan(special[3])
