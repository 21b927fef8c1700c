"""Bias and mask are read two elements at a time where their layout allows it, and one at a time where it does not."""

import numba
import numpy as np
import pytest

import numba_attention as na
from cases import DTYPES
from device import NumbaArray, fake_numba_cuda
from emulator import emulated
from numba_attention.cuda import tile_shapes

S = 36
LIMITS = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 2e-5}
LAYOUTS = {"whole": True, "one row": True, "odd pitch": False, "shifted": False, "gaps": False, "columns": False}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(numba, "cuda", fake_numba_cuda(), raising=False)
    with emulated(monkeypatch, races=False) as driver:
        yield driver


def laid(x, layout):
    """The same numbers on the device, in memory of another layout."""
    if layout == "odd pitch":  # an odd number of elements from one row to the next
        wide = np.zeros((*x.shape[:-1], S + 1), x.dtype)
        wide[..., :S] = x
        return NumbaArray.of(NumbaArray(wide).header[..., :S])
    if layout == "shifted":  # rows begin at odd elements
        wide = np.zeros((*x.shape[:-1], S + 2), x.dtype)
        wide[..., 1 : S + 1] = x
        return NumbaArray.of(NumbaArray(wide).header[..., 1 : S + 1])
    if layout == "gaps":
        wide = np.zeros((*x.shape[:-1], 2 * S), x.dtype)
        wide[..., ::2] = x
        return NumbaArray.of(NumbaArray(wide).header[..., ::2])
    if layout == "columns":
        return NumbaArray.of(NumbaArray(np.ascontiguousarray(x.swapaxes(-1, -2))).header.swapaxes(-1, -2))
    return NumbaArray(x)


def textbook(q, k, v, bias, mask, visible):
    scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5 + bias
    scores = np.where(mask & visible, scores, -np.inf)
    top = np.maximum(scores.max(-1, keepdims=True), -1e30)
    weights = np.exp(scores - top)
    p = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return p, p @ v


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "of_bias"), [("bfloat16", "float32"), ("float16", "float16"),
                                                ("bfloat16", "bfloat16"), ("float16", "float64")])  # fmt: skip
@pytest.mark.parametrize("window", [None, (7, 3)])
def test_values(gpu, monkeypatch, layout, dtype, of_bias, window):
    """With windows, whose tiles begin at odd keys; lengths end at odd ones, behind which there are NaN."""
    if window:  # and gradients in two passes, one of which has rows of queries
        monkeypatch.setenv(tile_shapes.DETERMINISTIC, "1")
    rng = np.random.default_rng(0)
    L, rows = 21, 1 if layout == "one row" else 21
    q, k, v, grad = (rng.standard_normal((2, 2, n, 16)).astype(DTYPES[dtype]) for n in (L, S, S, L))
    bias = rng.standard_normal((2, 2, rows, S)).astype(DTYPES[of_bias])
    mask = rng.random((2, 2, rows, S)) < 0.8
    mask[..., :21] |= np.eye(rows, 21, dtype=bool)
    lengths = np.array([S, S - 3])
    bias[1, ..., S - 3 :] = np.nan
    j, i = np.arange(S), np.arange(L)[:, None]
    visible = (j < lengths[:, None, None, None]) & ((i - 7 <= j) & (j <= i + 3) if window else True)
    options = {"key_lengths": lengths, "window": window}
    given = {"bias": laid(bias, layout), "mask": laid(mask, layout), **options}
    there = [NumbaArray(x) for x in (q, k, v)]
    out, lse = na.attention(*there, **given, return_lse=True)
    grads = na.attention_backward(NumbaArray(grad), *there, out, lse, **given)
    pairs = {c.task for c in gpu.configs.values() if c.pairs}
    expected = {"forward", *(["query"] if window else []), *(["bias"] if window and rows == 1 else [])}
    assert pairs == (expected if LAYOUTS[layout] else set())
    q, k, v, grad, bias = (x.astype(np.float64) for x in (q, k, v, grad, bias))
    p, want = textbook(q, k, v, np.where(np.isnan(bias), 0, bias), mask, visible)
    ds = p * (grad @ v.swapaxes(-1, -2) - (grad * want).sum(-1, keepdims=True))
    limit = LIMITS[dtype]
    of_bias = ds.sum(-2, keepdims=True) if rows == 1 else ds
    for found, right in ((out, want), (grads.query, ds @ k / 4), (grads.key, ds.swapaxes(-1, -2) @ q / 4),
                         (grads.value, p.swapaxes(-1, -2) @ grad), (grads.bias, of_bias)):  # fmt: skip
        found = np.array(found.array, np.float64)
        assert np.abs(found - right).max() <= 2 * limit * np.abs(right).max()


@pytest.mark.parametrize("layout", ["whole", "shifted"])
def test_steps_of_decoding(gpu, layout):
    """Few rows, of all heads of a group in one tile, and keys in several parts."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, heads, n, 16)).astype(np.float16) for heads, n in ((4, 2), (2, S), (2, S)))
    bias, mask = rng.standard_normal((1, 4, 2, S)).astype(np.float32), rng.random((1, 4, 2, S)) < 0.7
    cache = na.KVCache.from_arrays(NumbaArray(k), NumbaArray(v))
    given = {"bias": laid(bias, layout), "mask": laid(mask, layout)}
    out = na.attention_decode(NumbaArray(q), cache, is_causal=False, **given)
    (c,) = (c for c in gpu.configs.values() if c.task == "forward" and not c.nan_safe)
    assert c.pack_gqa
    assert c.pairs == LAYOUTS[layout]
    k, v = (np.repeat(x.astype(np.float64), 2, axis=1) for x in (k, v))
    _, want = textbook(q.astype(np.float64), k, v, bias, mask, True)
    np.testing.assert_allclose(np.array(out.array, np.float64), want, atol=4e-3)


def test_an_odd_number_of_keys(gpu):
    """The last row of an array ends after the first of a pair: the emulator finds reads beyond it."""
    rng = np.random.default_rng(2)
    q, k = (rng.standard_normal((1, n, 16)).astype(np.float16) for n in (5, 35))
    bias = rng.standard_normal((1, 5, 35)).astype(np.float32)
    out = na.attention(q, k, k, bias=bias, backend="cuda")
    assert not any(c.pairs for c in gpu.configs.values())
    q, k = q.astype(np.float64), k.astype(np.float64)
    np.testing.assert_allclose(out, textbook(q, k, k, bias, True, True)[1], atol=4e-3)
