"""exp2 and tanh against NumPy's in higher precision, over their whole range."""

import numpy as np
import pytest
from numba import njit

from numba_attention.cpu.exp import EXP2_BF16, EXP2_F32, EXP2_F64, exp2, tanh
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


@pytest.mark.parametrize(("bits", "table", "limit"), [(32, EXP2_F32, 1.0), (32, EXP2_BF16, 2.1), (64, EXP2_F64, 1.5)])
def test_exp2(bits, table, limit):
    x = np.r_[-np.random.default_rng(0).uniform(0, 120, 200_000), -np.logspace(-9, 0, 1000), 0.0, -1.0, -0.5]
    x, result = apply(lambda v, b, y: exp2(v, b, y, table), bits, x)
    assert ulps(result, np.exp2(x.astype(np.longdouble))).max() <= limit


@pytest.mark.parametrize(("bits", "table"), [(32, EXP2_F32), (64, EXP2_F64)])
def test_exp2_is_exactly_zero_for_what_is_hidden_and_one_at_zero(bits, table):
    _, result = apply(lambda v, b, y: exp2(v, b, y, table), bits, np.array([-np.inf, -1e30, -2000.0, 0.0]))
    assert list(result[:4]) == [0, 0, 0, 1]


@pytest.mark.parametrize(("bits", "table", "limit"), [(32, EXP2_F32, 4), (64, EXP2_F64, 5)])
def test_tanh(bits, table, limit):
    magnitude = np.r_[np.random.default_rng(0).uniform(0, 12, 200_000), np.logspace(-8, 0, 20_000), 50.0, 1e6]
    x, result = apply(lambda v, b, y: tanh(v, b, y, table), bits, np.r_[magnitude, -magnitude])
    assert ulps(result, np.tanh(x.astype(np.longdouble))).max() <= limit
    _, special = apply(lambda v, b, y: tanh(v, b, y, table), bits, np.array([np.inf, -np.inf, 0.0, np.nan]))
    assert list(special[:3]) == [1, -1, 0]
    assert np.isnan(special[3])
