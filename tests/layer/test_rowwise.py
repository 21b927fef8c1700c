"""Activations and norms, alone and after products: against float64 formulas, in place, with any strides."""

import numba
import numpy as np
import pytest
from scipy.special import erf, ndtr

import numba_attention as na
from numba_attention import nn
from numba_attention.layer import projection, rowwise
from numba_attention.layer.activations import with_numpy
from numba_attention.layer.projection import linear
from numba_attention.layer.rowwise import activated, normalized
from processes import GUARDED, run

RNG = np.random.default_rng(0)
FORMULAS = {
    "gelu": lambda x: x * ndtr(x),
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}
SIZES = [1, 2, 15, 16, 17, 63, 64, 65, 130, 1000, 8192, 8193, 20_000]
FEATURES = [1, 2, 15, 16, 17, 64, 65, 100, 384, 1023, 1025, 3000]


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    """Work of any size on so many threads."""
    if request.param > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("one core")
    monkeypatch.setattr(projection.modules()[0], "SMALL", 0)
    before = numba.get_num_threads()
    numba.set_num_threads(request.param)
    yield request.param
    numba.set_num_threads(before)


def test_gelu_is_exact_to_float32():
    """The error of erf is at most 5 units of 2**-24, the distance of the numbers below 1."""
    x = np.linspace(-12, 12, 400_001, dtype=np.float32)
    x = x[x != 0]
    wide = x.astype(np.float64)
    got = activated("gelu", x)
    assert np.abs(got / wide * 2 - 1 - erf(wide / np.sqrt(2))).max() < 5 * 2.0**-24
    assert (np.abs(got - wide * ndtr(wide)) <= 2e-7 * np.maximum(1, np.abs(wide))).all()
    near = (x > -5) & (x < 0)  # relative to the result, where x * (1 + erf) / 2 would cancel
    assert np.abs(got / (wide * ndtr(wide)) - 1)[near & (x > -3)].max() < 1e-4


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_activations(name, dtype, threads):
    for size in SIZES:
        x = (RNG.standard_normal(size) * 4).astype(dtype)
        kept = x.copy()
        want = FORMULAS[name](x.astype(np.float64))
        tolerance = 1e-6 if dtype == "float32" else 1e-14
        got = activated(name, x)
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance, err_msg=str(size))
        np.testing.assert_array_equal(x, kept)
        np.testing.assert_allclose(with_numpy(name, x), want, rtol=tolerance, atol=tolerance)
        wide = np.zeros(2 * size, dtype)[::2]
        wide[:] = x
        np.testing.assert_array_equal(activated(name, wide), got)
        assert activated(name, wide, wide) is wide
        np.testing.assert_array_equal(wide, got)
        assert activated(name, x, x) is x
        np.testing.assert_array_equal(x, got)


@pytest.mark.parametrize("name", FORMULAS)
def test_numbers_at_the_ends(name):
    x = np.array([0, -0.0, 1e-30, 30, -30, 1e10, -1e10, 3e38, -3e38, np.inf, np.nan], np.float32)
    with np.errstate(all="ignore"):
        got = activated(name, x)
    want = np.array([0, 0, 5e-31, 30, 0, 1e10, 0, 3e38, 0, np.inf, np.nan], np.float32)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-11)
    assert not np.signbit(got[0])


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_overlapping_arrays(order):
    memory = RNG.standard_normal(1001).astype(np.float32)
    x, out = (memory[:-1], memory[1:]) if order == "forward" else (memory[1:], memory[:-1])
    want = activated("silu", x.copy())
    activated("silu", x, out)
    np.testing.assert_array_equal(out, want)
    rows = RNG.standard_normal((11, 40)).astype(np.float32)
    weight, bias = RNG.standard_normal((2, 40)).astype(np.float32)
    x, out = rows[:-1], rows[1:]
    want = normalized(x.copy(), weight, bias, 1e-5)
    normalized(x, weight, bias, 1e-5, out)
    np.testing.assert_array_equal(out, want)


def norm(x, weight, bias, eps, center):
    x = x.astype(np.float64)
    if center:
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight
    return x if bias is None else x + bias


@pytest.mark.parametrize("center", [True, False], ids=["layer norm", "RMS norm"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_norms(dtype, center, threads):
    tolerance = 2e-6 if dtype == "float32" else 4e-15
    for features in FEATURES:
        x, residual = (RNG.standard_normal((3, 7, features)).astype(dtype) + 2 for _ in range(2))
        weight, bias = RNG.standard_normal((2, features)).astype(dtype)
        both = x + residual
        for added, b in ((None, bias), (residual, bias), (residual, None), (None, None)):
            source = x if added is None else both
            want = norm(source, weight, b, 1e-3, center)
            got = normalized(x, weight, b, 1e-3, residual=added, center=center)
            size = np.abs(want).max() + np.abs(source).max()
            assert np.abs(got - want).max() <= tolerance * size, (features, added is None, b is None)
            for out in (x.copy(), residual.copy()):
                first = out if np.array_equal(out, x) else x
                second = None if added is None else residual if first is out else out
                assert normalized(first, weight, b, 1e-3, out, second, center) is out
                np.testing.assert_array_equal(out, got)
        strided = np.empty((features, 3, 14), dtype).T[::2].swapaxes(0, 1)  # features are not side by side
        strided[...] = x
        np.testing.assert_array_equal(
            normalized(strided, weight, bias, 1e-3, center=center), normalized(x, weight, bias, 1e-3, center=center)
        )


def test_a_row_does_not_depend_on_others(threads):
    x = RNG.standard_normal((500, 384)).astype(np.float32)
    weight, bias = RNG.standard_normal((2, 384)).astype(np.float32)
    whole = nn.layer_norm(x, weight, bias)
    np.testing.assert_array_equal(whole[123], nn.layer_norm(x[123], weight, bias))


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [1, 3, 130])
def test_products_with_activation(rows, dtype, name, threads):
    x, weight = RNG.standard_normal((rows, 50)).astype(dtype), RNG.standard_normal((70, 50)).astype(dtype)
    bias = RNG.standard_normal(70).astype(dtype)
    for b in (bias, None):
        got = linear(x, weight, b, activation=name)
        np.testing.assert_array_equal(got, activated(name, linear(x, weight, b)))
        want = FORMULAS[name](x.astype(np.float64) @ weight.T.astype(np.float64) + (0 if b is None else b))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 if dtype == "float32" else 1e-12)
        out = np.empty((70, rows), dtype).T
        assert linear(x, weight, b, out, name) is out
        np.testing.assert_array_equal(out, got)


def test_mlp_is_the_same_with_and_without_context():
    x = RNG.standard_normal((5, 32)).astype(np.float32)
    for options in ({}, {"activation": "gelu_tanh"}, {"activation": "silu", "gated": True}):
        mlp = nn.MLP(32, 0, **options)
        np.testing.assert_array_equal(mlp(x), mlp.forward(x)[0])


def test_without_kernels(monkeypatch):
    x = RNG.standard_normal((6, 40)).astype(np.float32)
    weight, bias = RNG.standard_normal((2, 40)).astype(np.float32)
    matrix = RNG.standard_normal((9, 40)).astype(np.float32)

    def results():
        of_both = normalized(x, weight, bias, 1e-5, residual=x)
        of_square = normalized(x, weight, None, 0.1, center=False)
        return activated("gelu", x), of_both, of_square, linear(x, matrix, activation="silu")

    fast = results()
    for module in (projection, rowwise):
        monkeypatch.setattr(module, "usable", lambda *arrays: False)
    slow = results()
    for a, b in zip(fast, slow, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_misuse():
    x = np.ones((2, 3), np.float32)
    for call in (lambda: activated("relu", x), lambda: linear(x, x, activation="relu")):
        with pytest.raises(ValueError, match="activation must be one of gelu, gelu_tanh, silu, got 'relu'"):
            call()
    with pytest.raises(ValueError, match=r"residual must have the shape of x, \(2, 3\), got \(3,\)"):
        nn.layer_norm(x, x[0], None, residual=x[0])


PAGES, _, _ = GUARDED.partition("features = ")
BETWEEN_PAGES = f"""{PAGES}
from numba_attention.layer.projection import linear
from numba_attention.layer.rowwise import activated, normalized
for n in (1, 15, 16, 17, 64, 65, 100, 1025):
    for at_end in (False, True):
        x, out, residual = (guarded(np.ones((3, n), "f4"), at_end) for _ in range(3))
        weight, bias = (guarded(np.ones(n, "f4"), at_end) for _ in range(2))
        normalized(x, weight, bias, 1e-5, out, residual)
        activated("gelu", x, out)
        linear(x, guarded(np.ones((5, n), "f4"), at_end), None, guarded(np.zeros((3, 5), "f4"), at_end), "silu")
        kept.clear()
print("done")
"""


def test_with_unreadable_pages_around():
    run(BETWEEN_PAGES)


def test_training_and_inference_agree():
    block = nn.TransformerBlock(32, 4, rng=0)
    x = RNG.standard_normal((2, 5, 32)).astype(np.float32)
    np.testing.assert_array_equal(block(x, is_causal=True), block.forward(x, is_causal=True)[0])
    cache = na.KVCache(2, 4, 8, 8)
    np.testing.assert_allclose(block.step(x, cache), block(x, is_causal=True), atol=1e-5)
