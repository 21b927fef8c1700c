"""exp2 of products, tanh and the functions of mods against NumPy's in higher precision, over their whole range."""

import numpy as np
import pytest
from numba import njit

from numba_attention.cpu import exp
from numba_attention.cpu.exp import EXP2_BF16, EXP2_F32, EXP2_F64, exp2_product, tanh, tanh_of_size, with_sign
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
        return exp2_product(v, b, v.element(factor), table)(y)

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


@pytest.mark.parametrize(("bits", "limit"), [(32, 4), (64, 5)])
def test_tanh(bits, limit):
    magnitude = np.r_[np.random.default_rng(0).uniform(0, 12, 200_000), np.logspace(-8, 0, 20_000), 50.0, 1e6]
    x, result = apply(tanh, bits, np.r_[magnitude, -magnitude])
    assert ulps(result, np.tanh(x.astype(np.longdouble))).max() <= limit
    x, special = apply(tanh, bits, np.array([np.inf, -np.inf, 0.0, -0.0, np.nan, np.finfo(f"f{bits // 8}").max]))
    assert list(special[[0, 1, 2, 3, 5]]) == [1, -1, 0, 0, 1]
    assert list(np.signbit(special[:4])) == [False, True, False, True]
    assert np.isnan(special[4])


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize(("factor", "outer"), [(1 / 50, 50.0), (3.0, 0.5), (1e-30, 1e30), (1e30, 1e-30), (1e38, 2.0)])
def test_scaled_tanh(bits, factor, outer):
    """Of numbers around the ends of every interval of the table, too."""
    ends = np.r_[np.arange(1, 2, 0.25), np.arange(2, 4, 0.5), np.arange(4, 8), np.arange(8, 18, 2)] - 1
    t = np.r_[
        np.multiply.outer(ends, 1 + np.linspace(-4e-7, 4e-7, 33)).ravel() * exp.TANH_STEP, np.logspace(-6, 1, 999)
    ]

    def build(v, b, y):
        size = tanh_of_size(v, b, v.element(factor), v.element(outer))(y)
        return with_sign(v, b, size, y)

    x, result = apply(build, bits, np.r_[t, -t, np.inf, -np.inf, np.nan] / factor)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.tanh(x.astype(np.longdouble) * x.dtype.type(factor)) * x.dtype.type(outer)
    np.testing.assert_array_equal(np.isnan(result), np.isnan(x))
    known = ~np.isnan(x)
    assert ulps(result[known], exact[known]).max() <= 6


SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -1.5, 1.0, 1e-42, 5e-324, 3e-310, 1.4142135, 1.4142136])


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", ["log", "log2"])
def test_logarithms(name, bits):
    rng = np.random.default_rng(0)
    x = np.concatenate([SPECIAL, np.exp(rng.uniform(-80, 80, 20000)), rng.uniform(0.5, 2, 20000)])
    x, got = apply(getattr(exp, name), bits, x)
    with np.errstate(all="ignore"):
        want = getattr(np, name)(x.astype(np.longdouble))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    np.testing.assert_array_equal(got[~np.isfinite(want)], want[~np.isfinite(want)].astype(got.dtype))
    close = np.isfinite(want)
    assert ulps(got[close], want[close]).max() < (3 if name == "log" else 4)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("factor", [(1.0,), exp.LOG2E], ids=["2", "e"])
def test_exponentials_anywhere(factor, bits):
    top = 128 if bits == 32 else 1024
    largest = float(np.finfo(f"f{bits // 8}").max)  # times log2(e) it is infinite
    edges = np.array([0.0, np.inf, -np.inf, np.nan, top + 1, -top - 50.0, 1e30, -1e30])
    x = np.concatenate([edges, np.random.default_rng(0).uniform(-top * 1.1, top * 1.1, 20000)]) / factor[0]
    x = np.concatenate([x, [largest, -largest]])
    x, got = apply(lambda v, b, y: exp.exp2_anywhere(v, b, y, *factor), bits, x)
    with np.errstate(all="ignore"):
        want = (np.exp2 if factor[0] == 1 else np.exp)(x.astype(np.longdouble)).astype(got.dtype)
    tiny = np.finfo(got.dtype).tiny
    small = want < 2 * tiny
    assert (got[small] <= 2 * tiny).all()
    rest = ~small & np.isfinite(want)
    assert ulps(got[rest], want[rest].astype(np.longdouble)).max() < 3
    np.testing.assert_array_equal(got[~small & ~rest], want[~small & ~rest])


@pytest.mark.parametrize("bits", [32, 64])
def test_powers(bits):
    rng = np.random.default_rng(0)
    x = np.concatenate([SPECIAL[np.isfinite(SPECIAL)], rng.uniform(-5, 5, 20000), np.exp(rng.uniform(-6, 6, 20000))])
    for y in (0.3, -1.5, 3.0, -2.0, 0.0, 17.0, 2.25):
        for known in (y, None):
            x, got = apply(lambda v, b, z, y=y, known=known: exp.power(v, b, z, v.const(y), known), bits, x)
            with np.errstate(all="ignore"):
                want = np.power(np.where(x == 0, 0, x).astype(np.float64), y)
            normal = np.abs(want) < float(np.finfo(got.dtype).max)
            tolerance = (4e-6 if bits == 32 else 1e-13) * max(1, abs(y))
            np.testing.assert_allclose(got[normal], want[normal], rtol=tolerance, atol=1e-37 if bits == 32 else 1e-306)
            np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
            assert np.isinf(got[np.isinf(want)]).all()


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", ["sin", "cos"])
def test_turns(name, bits):
    x = np.concatenate([[0.0, 1e-6, np.pi, -np.pi / 2], np.random.default_rng(0).uniform(-1e4, 1e4, 40000)])
    x, got = apply(lambda v, b, y: exp.sin(v, b, y, name == "cos"), bits, x)
    want = getattr(np, name)(x.astype(np.longdouble))
    assert np.abs(got - want).max() < (2e-7 if bits == 32 else 1e-15)
    _, got = apply(lambda v, b, y: exp.sin(v, b, y, name == "cos"), bits, np.array([np.inf, np.nan, 1e30]))
    assert np.isnan(got[:2]).all()
    far = 10.0 ** np.random.default_rng(0).uniform(4, 38 if bits == 32 else 308, 40000)
    _, got = apply(lambda v, b, y: exp.sin(v, b, y, name == "cos"), bits, np.concatenate([far, -far]))
    assert (np.abs(got) <= 1).all()
