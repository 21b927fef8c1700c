"""Magnitudes from the least number to the largest, in the CUDA kernels, run by the emulator.

Right values are the textbook's formula in float64, which shares no code with the package.
"""

import sys

import ml_dtypes
import numpy as np
import pytest

import numba_attention as na
from caching import filled
from device import Tensor, fake_torch
from emulator import emulated
from numba_attention.backends import cuda_launch
from numba_attention.cuda import softmax, tile_shapes

F16, BF16, F32, F64 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.float64)
EPS = {F16: 2.0**-11, BF16: 2.0**-8, F32: 2.0**-24, F64: 2.0**-53}


@pytest.fixture
def gpu(monkeypatch):
    with emulated(monkeypatch, races=False) as driver:
        yield driver


def textbook(q, k, v, scale=None, hidden=None, bias=None, sinks=None):
    """Result, lse and probabilities of (heads, L, E), (heads, S, E) and (heads, S, Ev), in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + np.asarray(bias, np.float64)
    if hidden is not None:
        scores = np.where(hidden, -np.inf, scores)
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, np.asarray(sinks, np.float64)[:, None, None])
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(np.asarray(sinks, np.float64)[:, None, None] - top)
    p = weights / total
    return p @ v, (top + np.log(total))[..., 0], p


def gradients(grad, q, k, v, p, scale=None):
    grad, q, k, v = (np.asarray(x, np.float64) for x in (grad, q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dp = grad @ v.swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    return ds @ k * scale, ds.swapaxes(-1, -2) @ q * scale, p.swapaxes(-1, -2) @ grad, ds


def close(got, want, limit):
    """Within a limit times the largest of the right values."""
    got = np.asarray(got, np.float64)
    assert np.isfinite(got).all(), got
    most = np.abs(want).max()
    assert np.abs(got - want).max() <= limit * most, (got, want)


def whole(rng, shape, most, step, dtype):
    """Multiples of a number, so that scores are exact and the textbook's maximum is the kernel's."""
    return (rng.integers(-most, most + 1, shape) * float(step)).astype(dtype)


# Scores of a size at which float32 has no fractions, of numbers that sum up exactly.
STEPS = [3e4, 1e5, 7.7e17]


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"mask": True}, {"bias": True}], ids=str)
def test_huge_scores(gpu, dtype, step, options):
    rng = np.random.default_rng(0)
    L, S, E = 20, 70, 16
    q, k = whole(rng, (2, L, E), 3, 1, dtype), whole(rng, (2, S, E), 3, 1, dtype)
    v = rng.standard_normal((2, S, E)).astype(dtype)
    unit = dtype.type(step).astype(np.float64)
    scale, hidden, given = float(unit**2), None, dict(options)
    if "is_causal" in options:
        hidden = np.arange(S) > np.arange(L)[:, None]
    if "mask" in options:
        given["mask"] = rng.random((L, S)) < 0.7
        hidden = ~given["mask"]
    if "bias" in options:
        given["bias"] = np.zeros((L, S), np.float32)
    out, lse = na.attention(q, k, v, scale=scale, **given, return_lse=True, backend="cuda")
    want, want_lse, p = textbook(q, k, v, scale, hidden)
    close(out, want, 4 * EPS[dtype])
    np.testing.assert_allclose(np.asarray(lse, np.float64), want_lse, rtol=1e-6)
    weights = na.attention_weights(q, k, scale=scale, **given, backend="cuda")
    close(weights, p, 4 * EPS[dtype])
    grad = rng.standard_normal(out.shape).astype(dtype)
    found = na.attention_backward(grad, q, k, v, out, lse, scale=scale, **given, backend="cuda")
    for got, right in zip(found[:3], gradients(grad, q, k, v, p, scale)[:3], strict=True):
        close(got, right, 60 * EPS[dtype]) if np.abs(right).max() < 1e37 else None


@pytest.mark.parametrize("splits", [False, True])
def test_scores_of_the_issue(gpu, splits):
    """A maximum whose product with log2(e) is no float32 number."""
    one = np.ones((1, 1, 1), np.float32)
    out, lse = na.attention(one * np.float32(1e10), one, one, scale=1, return_lse=True, backend="cuda")
    assert (out.item(), lse.item()) == (1, np.float32(1e10))
    q = np.full((1, 1, 1), 1960753920, np.float32)
    n = 400 if splits else 1
    k = np.repeat(np.array([1, 1, 0], np.float32), n)[None, :, None]
    v = np.repeat(np.array([[1, 10], [1, 10], [5, 5]], np.float32), n, 0)[None]
    out = na.attention(q, k, v, scale=1, backend="cuda")
    np.testing.assert_allclose(out[0, 0], [1, 10], rtol=1e-6)
    assert any(c.split_kv for c in gpu.configs.values()) == splits


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.0, -0.37, 1e-40, 3e-300, 1.7e30, -2.3e-20])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (3, 2)}, {"mask": True}], ids=str)
def test_any_scale(gpu, dtype, scale, options):
    rng = np.random.default_rng(1)
    L, S, E = 9, 37, 8
    q, k, v = (rng.standard_normal((2, n, E)).astype(dtype) for n in (L, S, S))
    if scale:  # scores near 1, of any scale
        size = min(abs(scale), 1e30) if dtype == F64 else min(max(abs(scale), 1e-30), 1e30)
        small = 1 if dtype == F16 else size**-0.5
        q, k = ((np.asarray(x, np.float64) * small).astype(dtype) for x in (q, k))
    given, i, j = dict(options), np.arange(L)[:, None], np.arange(S)
    hidden = {"is_causal": j > i, "window": (j < i - 3) | (j > i + 2)}.get(next(iter(options), None))
    if "mask" in options:
        given["mask"] = rng.random((L, S)) < 0.7
        hidden = ~given["mask"]
    out, lse = na.attention(q, k, v, scale=scale, **given, return_lse=True, backend="cuda")
    with np.errstate(over="ignore"):
        want, want_lse, p = textbook(q, k, v, scale, hidden)
    if dtype == F16 and abs(scale) > 1e3:  # scores of 1e30, which round
        assert np.isfinite(np.asarray(out, np.float64)).all()
        return
    close(out, want, 20 * EPS[dtype])
    close(lse, want_lse, 20 * max(EPS[F32 if dtype != F64 else F64], 0))
    close(na.attention_weights(q, k, scale=scale, **given, backend="cuda"), p, 20 * EPS[dtype])
    grad = rng.standard_normal(out.shape).astype(dtype)
    found = na.attention_backward(grad, q, k, v, out, lse, scale=scale, **given, backend="cuda")
    for n, (got, right) in enumerate(zip(found[:3], gradients(grad, q, k, v, p, scale)[:3], strict=True)):
        most = np.abs(right).max()
        if n == 2 or (1e-30 < most < 1e30 and (dtype != F16 or most > 1e-3)):
            close(got, right, 60 * EPS[dtype])


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
@pytest.mark.parametrize("page_size", [None, 16])
def test_any_scale_in_a_cache(gpu, dtype, page_size):
    rng = np.random.default_rng(2)
    q, k, v = (rng.integers(-9, 10, (2, 2, n, 16)).astype(dtype) for n in (1, 150, 150))
    lengths = [150, 20]
    cache = filled(k, v, lengths, None, page_size)
    for scale in (0.0, 1e-40, -0.7, 1e8):
        out, lse = na.attention_decode(q, cache, scale=scale, return_lse=True, backend="cuda")
        for n, length in enumerate(lengths):
            want, want_lse, _ = textbook(q[n], k[n, :, :length], v[n, :, :length], scale)
            close(out[n], want, 8 * EPS[dtype])
            np.testing.assert_allclose(np.asarray(lse[n], np.float64), want_lse, rtol=1e-6)


LEAST = float(np.finfo(np.float32).min)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
@pytest.mark.parametrize("least", [-1e9, LEAST, -65504.0, -1e4])
def test_padding_as_people_write_it(gpu, dtype, least):
    """Rows whose every score is about -1e9: the mean, its lse, and its gradients."""
    rng = np.random.default_rng(3)
    H, L, S, E = 2, 20, 70, 16
    q, k = (whole(rng, (H, n, E), 1, 1, dtype) for n in (L, S))  # whose scores are multiples of 1/4
    v, grad = (rng.standard_normal((H, n, E)).astype(dtype) for n in (S, L))
    bias = np.zeros((L, S), np.float32)
    bias[:, 50:] = least
    bias[3:12] = least
    sinks = None if least < -1e5 else np.array([least, -3.0])
    out, lse = na.attention(q, k, v, bias=bias, sinks=sinks, return_lse=True, backend="cuda")
    want, want_lse, p = textbook(q, k, v, bias=bias, sinks=sinks)
    if least == LEAST or (least == -1e9 and dtype != F64):  # which leaves no room for the differences of scores
        p[:, 3:12] = 1 / S
        want[:, 3:12] = np.asarray(v, np.float64).mean(1, keepdims=True)
    limit = 100 * EPS[F32 if dtype == F64 and least != LEAST else dtype]
    close(out, want, limit)
    np.testing.assert_allclose(np.asarray(lse, np.float64), want_lse, rtol=1e-6, atol=1e-6)
    found = na.attention_backward(grad, q, k, v, out, lse, bias=bias, sinks=sinks, backend="cuda")
    right = gradients(grad, q, k, v, p)
    for got, x in zip(found[:3], right[:3], strict=True):
        close(got, x, limit)
    close(found[3], right[3].sum(0), max(limit, 2.0**-22))


def test_biases_near_the_least_number_differ(gpu):
    q = np.ones((1, 1, 8), np.float32)
    k, v = np.ones((1, 2, 8), np.float32), np.array([[[1.0] * 8, [3.0] * 8]], np.float32)
    out, lse = na.attention(q, k, v, bias=np.array([[-3.4e38, -3e38]], np.float32), return_lse=True, backend="cuda")
    np.testing.assert_array_equal(out, 3)
    assert lse.item() == np.float32(-3e38)
    lower = na.attention(-q * 1e18, k * 1e18, v, scale=1, bias=np.array([[LEAST, LEAST]], np.float32), backend="cuda")
    np.testing.assert_array_equal(lower, 2)  # a finite bias does not hide


@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e37, 3e38, 1e-37])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("L", [1, 20])
def test_values_near_the_largest_number(gpu, dtype, size, options, L):
    rng = np.random.default_rng(4)
    S, E = 700, 16
    q, k = (rng.standard_normal((1, n, E)).astype(dtype) * dtype.type(0.1) for n in (L, S))
    size = size**8 if dtype == F64 else size
    size = min(size, 1.7e308)
    v = np.full((1, S, E), size)
    v[..., 1:] *= rng.uniform(0.5, 1, (1, S, E - 1))
    v[..., 2] *= np.sign(rng.standard_normal(S))
    v = v.astype(dtype)
    given = dict(options)
    if "sinks" in options:
        given["sinks"] = np.array([1.3])
    hidden = np.arange(S) > np.arange(L)[:, None] if "is_causal" in options else None
    out, lse = na.attention(q, k, v, **given, return_lse=True, backend="cuda")
    want, want_lse, _ = textbook(q, k, np.asarray(v, np.float64) / size, hidden=hidden, sinks=given.get("sinks"))
    close(np.asarray(out, np.float64) / size, want, 20 * EPS[dtype] if dtype == BF16 else 400 * EPS[dtype])
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)


def test_300_equal_keys(gpu):
    k, v = np.zeros((1, 300, 1), np.float32), np.full((1, 300, 1), 3e38, np.float32)
    for L in (1, 3, 70):
        np.testing.assert_allclose(na.attention(np.ones((1, L, 1), np.float32), k, v, backend="cuda"), 3e38, rtol=1e-5)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("on_device", [False, True])
def test_a_float64_bias_beside_other_data(gpu, monkeypatch, dtype, on_device):
    """What is finite stays so, whether the host converts it or a kernel reads it."""
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((1, n, 8)).astype(dtype) for n in (5, 30, 30))
    bias = np.zeros((5, 30))
    bias[:, 20:] = np.finfo(np.float64).min
    bias[1], bias[2, :3], bias[3, 4] = np.finfo(np.float64).min, 1e300, -np.inf
    if on_device:
        monkeypatch.setitem(sys.modules, "torch", fake_torch())
        found = na.attention(*(Tensor(x) for x in (q, k, v)), bias=Tensor(bias), return_lse=True)
        out, lse = (x.array for x in found)
    else:
        out, lse = na.attention(q, k, v, bias=bias, return_lse=True, backend="cuda")
    want, _, _ = textbook(q, k, v, bias=np.clip(bias, -1e5, 1e5) + np.where(np.isinf(bias), bias, 0))
    want[0, 1], want[0, 2] = np.asarray(v, np.float64)[0].mean(0), np.asarray(v, np.float64)[0, :3].mean(0)
    close(out, want, 20 * EPS[dtype])
    assert lse[0, 1] == np.finfo(np.float32).min
    assert lse[0, 2] == np.finfo(np.float32).max


def test_a_page_that_another_thread_frees_is_never_read(gpu):
    """Pages of a freed sequence are -1 in the table: the call may be wrong, and reads nothing before the array."""
    q, k, v = (np.ones((2, 2, n, 16), np.float32) for n in (1, 50, 50))
    cache = filled(k, v, [50, 20], None, 16)
    table = np.full((2, 4), -1)
    original = cuda_launch.Work._of_cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_launch.Work, "_of_cache", lambda self, p, c: original(self, p, c._replace(table=table)))
        out = na.attention_decode(q, cache, backend="cuda")
    assert out.shape == q.shape


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_gradients_of_scores_that_are_small_differences_of_large_products(gpu, dtype):
    """Where products cancel, a score is known to within the rounding of the products: still no weight is above 1."""
    rng = np.random.default_rng(0)
    row = rng.standard_normal(8).astype(dtype)
    query = (rng.integers(-2, 3, (1, 1, 17, 1)) * row).astype(dtype)
    key = np.stack([row[[4, 5, 6, 7, 0, 1, 2, 3]], row[[7, 6, 5, 4, 3, 2, 1, 0]]])[None, None]
    key[..., 4:] *= -1  # orthogonal to all queries: every score is 0 but for rounding
    scale = {F32: 1e28, F64: 1e240}[dtype]
    value, grad = (rng.standard_normal(x.shape).astype(dtype) for x in (key, query))
    out, lse = na.attention(query, key, value, scale=scale, return_lse=True, backend="cuda")
    grads = na.attention_backward(grad, query, key, value, out, lse, scale=scale, backend="cuda")
    assert (np.abs(grads.value) <= 1.05 * np.abs(grad).sum(-2, keepdims=True)).all()


def _slope(score, batch, head, i, j, slopes):
    return score + slopes[head]


@pytest.mark.parametrize("kernel", ["fused", "two passes", "wgmma", "bias", "mods", "nan"])
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_recomputed_weights_are_at_most_1(monkeypatch, dtype, kernel):
    """An lse that is too small stands for scores that come out too large; every kernel cuts P at 2**SLACK."""
    half = dtype in (F16, BF16)
    if not half and kernel in ("two passes", "wgmma"):
        pytest.skip("one kernel for all")
    rng, large = np.random.default_rng(1), kernel == "wgmma"
    L, S, E = (256, 256, 64) if large else (20, 33, 16)
    q, k, v = (rng.standard_normal((1, 2, n, E)).astype(dtype) for n in (L, S, S))
    grad = rng.standard_normal(q.shape).astype(dtype)
    out, lse, p = textbook(q[0], k[0], v[0])
    lse, out = lse[None].astype(np.float64 if dtype == F64 else np.float32), out[None].astype(dtype)
    lse[0, 0, ::3] -= 5
    options, more = {}, {}
    if kernel == "bias":
        options = {"bias": np.zeros((2, L, S), np.float32)}
    if kernel == "mods":
        options, more = {"score_mod": _slope, "mod_args": (np.zeros(2, np.float32),)}, {"mod_grads": "all"}
    if kernel == "nan":
        grad[0, 1, 2, 1] = np.nan  # rows that see it are computed again without what is hidden
        options = {"is_causal": True}
    if kernel == "two passes":
        monkeypatch.setenv(tile_shapes.DETERMINISTIC, "1")
    if kernel != "wgmma":
        monkeypatch.setenv(tile_shapes.WGMMA, "0")
    with emulated(monkeypatch, races=False, multiprocessors=1) as driver:
        got = na.attention_backward(grad, q, k, v, out, lse, **options, **more, backend="cuda")
    assert any(c.product == "wgmma" for c in driver.configs.values()) == large
    q, k, v, grad, out, lse = (x[0].astype(np.float64) for x in (q, k, v, grad, out, lse))
    scores = q @ k.swapaxes(-1, -2) * E**-0.5
    if kernel == "nan":
        scores = np.where(np.tri(L, S, dtype=bool), scores, -np.inf)
    p = np.minimum(np.exp(scores - lse[..., None]), 2.0**softmax.SLACK)
    assert (p > 1).any()
    ds = p * (grad @ v.swapaxes(-1, -2) - (grad * out).sum(-1, keepdims=True))
    limit = {F16: 4e-3, BF16: 3e-2, F32: 1e-5, F64: 1e-12}[dtype]
    head = slice(0, 1) if kernel == "nan" else slice(None)
    for found, want in ((got.query, ds @ k * E**-0.5), (got.key, ds.swapaxes(-1, -2) @ q * E**-0.5),
                        (got.value, p.swapaxes(-1, -2) @ grad)):  # fmt: skip
        close(found[0, head], want[head], limit)
    if kernel == "bias":
        close(got.bias, ds, max(limit, 1e-6))
    if kernel == "mods":
        close(got.mod_args[0], ds.sum((-1, -2)), max(limit, 1e-6))
    if kernel == "nan":
        seen = np.isnan(got.query[0, 1].astype(np.float64)).any(-1)
        assert seen.tolist() == [row == 2 for row in range(L)]


@pytest.mark.parametrize("sink", [-3.4e38, -1e9 - 33, 1e9 + 33, 30.0])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_gradient_of_a_sink_whose_log_sum_exp_is_rounded(gpu, sink, dtype):
    """The weight of a sink is 1 where no key is seen, or all are far below: dlse arrives as it is."""
    query, key, value = np.ones((1, 5, 4), dtype), np.ones((1, 3, 4), dtype), np.ones((1, 3, 2), dtype)
    options = {"sinks": np.array([sink]), "key_lengths": 0 if sink < 0 else 3, "backend": "cuda"}
    out, lse = na.attention(query, key, value, **options, return_lse=True)
    grads = na.attention_backward(out, query, key, value, out, lse, grad_lse=np.ones_like(lse), **options)
    np.testing.assert_allclose(grads.sinks, [5.0], rtol=1e-6)
