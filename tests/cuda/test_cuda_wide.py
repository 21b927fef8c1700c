"""Results of half types in float32, for parts of a row that are merged or added up later, by the CUDA kernels."""

import numpy as np
import pytest

import numba_attention as na
from cases import DTYPES
from emulator import emulated
from numba_attention.options import Options

tasks = pytest.importorskip("numba_attention.dask.tasks")

RUN = tasks.Run("cuda", None)
# Several tiles; few queries of a group, which are one tile; few queries and many keys, whose parts `combine` joins.
SIZES = [(4, 2, 70, 100, 64, 64), (4, 2, 3, 40, 32, 32), (2, 2, 1, 700, 40, 24)]


@pytest.fixture
def gpu(monkeypatch):
    with emulated(monkeypatch) as driver:
        yield driver


def rms(x, right):
    return np.sqrt(np.mean((x.astype(np.float64) - right) ** 2))


def has_more_bits(x, dtype):
    x = x[x != 0]
    return np.mean(x.astype(dtype).astype(np.float32) != x) > 0.9


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_results_are_not_rounded(gpu, sizes, dtype):
    H, Hkv, L, S, E, Ev = sizes
    rng = np.random.default_rng(0)
    shapes = (H, L, E), (Hkv, S, E), (Hkv, S, Ev)
    q, k, v = (rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes)
    options = Options(is_causal="bottom-right")
    out, lse = tasks.part(q, k, v, None, None, options, RUN)
    assert out.dtype == lse.dtype == np.float32
    right, right_lse = na.attention(
        *(x.astype(np.float64) for x in (q, k, v)), is_causal="bottom-right", return_lse=True, backend="reference"
    )
    rounded = na.attention(q, k, v, is_causal="bottom-right", backend="cuda")
    assert rms(out, right) <= rms(rounded, right)
    assert has_more_bits(out, DTYPES[dtype])
    np.testing.assert_allclose(lse, right_lse, atol=1e-5)
    writing = [c for c in gpu.configs.values() if c.task in ("forward", "combine") and not c.split_kv]
    assert {c.to for c in writing} == {"float32", ""}
    if S > 500:
        assert any(c.task == "combine" and c.to for c in writing)


@pytest.mark.parametrize("deterministic", ["0", "1"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_are_not_rounded(gpu, monkeypatch, dtype, deterministic):
    from numba_attention.cuda import tile_shapes

    monkeypatch.setenv(tile_shapes.DETERMINISTIC, deterministic)
    rng = np.random.default_rng(1)
    shapes = (2, 30, 64), (1, 40, 64), (1, 40, 32), (2, 30, 32)
    q, k, v, grad = (rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes)
    bias, sinks = rng.standard_normal((2, 30, 40)).astype(np.float32), np.ones(2, np.float32)
    options = {"is_causal": True, "bias": bias, "sinks": sinks}
    out, lse = na.attention(q, k, v, return_lse=True, **options, backend="cuda")
    rows = grad, q, k, v, out, lse
    wide = (x.astype(np.float64) for x in rows)
    right = na.attention_backward(*wide, backend="reference", **options)
    rounded = na.attention_backward(*rows, backend="cuda", **options)
    got = tasks.pair_gradients(*rows, None, None, bias, Options(is_causal=True, sinks=sinks), RUN)
    for name in ("query", "key", "value"):
        x, y = getattr(got, name), getattr(right, name)
        assert x.dtype == np.float32
        assert rms(x, y) <= 1.01 * rms(getattr(rounded, name), y)
        assert has_more_bits(x, DTYPES[dtype])
    np.testing.assert_allclose(got.bias, rounded.bias, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.sinks, rounded.sinks, rtol=1e-5)


def test_not_on_warpgroups(gpu):
    """Kernels whose warpgroups have roles store what they read: others take their place."""
    from numba_attention.cuda.spec import Spec

    c = Spec("forward", "bfloat16", 64, 64, product="tensor", arch="sm_90a")
    assert c.suits_warpgroups()
    assert not c.with_(to="float32").suits_warpgroups()


def test_gradients_that_sequences_share_are_rounded_after_their_sum(gpu):
    """As on the CPU (tests/test_backward.py): the gradient of each sequence would overflow or lose 32 here."""
    query, key = np.zeros((2, 1, 2, 1), np.float16), np.zeros((1, 1, 1, 1), np.float16)
    out, lse = na.attention(query, key, key, return_lse=True, backend="cuda")
    grad_out = np.array([40000, 40000, -40000, -39000], np.float16).reshape(2, 1, 2, 1)
    grads = na.attention_backward(grad_out, query, key, key, out, lse, backend="cuda")
    assert [(x.dtype, x.shape) for x in grads[:3]] == [(np.float16, x.shape) for x in (query, key, key)]
    assert grads.value.item() == 992
