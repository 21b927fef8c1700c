"""A bias and its gradient: tiles of it in shared memory, and which kernel sums dS over what shares an element."""

import numba
import numpy as np
import pytest

import numba_attention as na
from cases import DTYPES
from device import NumbaArray, fake_numba_cuda
from emulator import emulated
from grid import in_turn
from numba_attention.cuda import tile_shapes

B, H, L, S = 2, 2, 40, 72  # rows of S numbers of a half type are whole words of 16 bytes
LIMITS = {"float16": 3e-3, "bfloat16": 2e-2, "float32": 1e-5, "float64": 1e-12}
# The gradient of a bias of each shape: what a kernel of one pass, and one of two, do for it.
SHAPES = {
    (B, H, L, S): ("tiles", "elements"),
    (1, H, L, S): ("sums", ""),
    (B, 1, L, S): ("sums", ""),
    (L, S): ("sums", ""),
    (B, 1, 1, S): ("sums_of_rows", ""),
    (H, L, 1): ("sums_of_keys", ""),
    (1,): ("sums_of_all", ""),
}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(numba, "cuda", fake_numba_cuda(), raising=False)
    with emulated(monkeypatch) as driver:
        yield driver


def textbook(q, k, v, grad, grad_lse, bias, visible=True):
    """Output, and the gradients of query, key, value and of the scores."""
    q, k, v, grad, grad_lse, bias = (x.astype(np.float64) for x in (q, k, v, grad, grad_lse, bias))
    scale = q.shape[-1] ** -0.5
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = np.where(visible, q @ k.swapaxes(-1, -2) * scale + bias, -np.inf)
    top = np.maximum(scores.max(-1, keepdims=True), -1e30)
    p = np.exp(scores - top)
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)
    ds = p * (grad @ v.swapaxes(-1, -2) - (grad * (p @ v)).sum(-1, keepdims=True) + grad_lse[..., None])
    return p @ v, ds @ k * scale, ds.swapaxes(-1, -2) @ q * scale, p.swapaxes(-1, -2) @ grad, ds


def summed(x, shape):
    """Sums over the axes along which a shape was broadcast."""
    axes = (*range(x.ndim - len(shape)), *(n for n in range(-len(shape), 0) if shape[n] == 1))
    return x.sum(axis=axes, keepdims=True).reshape(shape)


def of_groups(x, heads):
    """Sums over the query heads of each key head."""
    return x.reshape(x.shape[0], heads, -1, *x.shape[2:]).sum(axis=2)


def check(found, want, dtype):
    found = np.array(found.array, np.float64)
    assert found.shape == want.shape
    assert np.abs(found - want).max() <= LIMITS[dtype] * np.abs(want).max()


def call(rng, dtype, of_bias, shape, E=16, Hkv=H, **options):
    """Arrays of a call, results on the device, and whether each key is visible."""
    q, k, v, grad = (
        rng.standard_normal((B, heads, n, E)).astype(DTYPES[dtype]) for heads, n in ((H, L), (Hkv, S), (Hkv, S), (H, L))
    )
    bias = rng.standard_normal(shape).astype(DTYPES[of_bias])
    there = [NumbaArray(x) for x in (q, k, v)]
    given = {"bias": NumbaArray(bias), **options}
    out, lse = na.attention(*there, **given, return_lse=True)
    # Without a gradient of lse, dS would sum to 0 over keys.
    grad_lse = rng.standard_normal((B, H, L)).astype(np.float64 if dtype == "float64" else np.float32)
    grads = na.attention_backward(NumbaArray(grad), *there, out, lse, grad_lse=NumbaArray(grad_lse), **given)
    return (q, k, v, grad, grad_lse, bias), out, grads


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("dtype", "of_bias"), [("bfloat16", "bfloat16"), ("float16", "float32")])
def test_shapes(gpu, monkeypatch, dtype, of_bias, shape, passes):
    monkeypatch.setenv(tile_shapes.DETERMINISTIC, str(passes - 1))
    arrays, out, grads = call(np.random.default_rng(0), dtype, of_bias, shape, Hkv=1)
    how = SHAPES[shape][passes - 1]
    if how == "tiles" and dtype != of_bias:
        how = "elements"
    configs = [c for c in gpu.configs.values() if not c.nan_safe]
    assert {c.grad_bias for c in configs if c.task in ("query", "key")} - {""} == {how} - {""}
    assert any(c.task == "bias" for c in configs) == (how == "")
    tiled = of_bias == "bfloat16" and shape[-1] == S
    assert all(c.has_bias_tile == tiled for c in configs if c.task in ("query", "key"))
    want = textbook(*arrays)
    check(out, want[0], dtype)
    check(grads.query, want[1], dtype)
    for found, right in ((grads.key, want[2]), (grads.value, want[3])):
        check(found, of_groups(right, 1), dtype)
    assert grads.bias.array.dtype == DTYPES[of_bias]
    check(grads.bias, summed(want[4], shape), dtype)


@pytest.mark.parametrize("shape", [(B, H, L, S), (H, L, S), (B, 1, 1, S), (1, 1)], ids=str)
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": (9, 5)}, {"key_lengths": [S, 35]}], ids=str)
def test_what_no_row_sees(gpu, monkeypatch, options, passes, shape):
    """It has the gradient 0, also where no block visits it. Tiles of windows begin at keys of any number."""
    monkeypatch.setenv(tile_shapes.DETERMINISTIC, str(passes - 1))
    arrays, out, grads = call(np.random.default_rng(1), "bfloat16", "bfloat16", shape, **options)
    i, j = np.arange(L)[:, None], np.arange(S)
    visible = np.ones((B, 1, L, S), bool)
    if "is_causal" in options:
        visible &= j <= i
    if "window" in options:
        visible &= (i - 9 <= j) & (j <= i + 5)
    if "key_lengths" in options:
        visible &= j < np.array(options["key_lengths"])[:, None, None, None]
    want = textbook(*arrays, visible)
    for found, right in zip((out, grads.query, grads.key, grads.value), want, strict=False):
        check(found, right, "bfloat16")
    check(grads.bias, summed(want[4], shape), "bfloat16")
    if shape == (B, H, L, S):
        np.testing.assert_array_equal(np.array(grads.bias.array, np.float32)[~np.broadcast_to(visible, shape)], 0)


@pytest.mark.parametrize(("shape", "dtype"), in_turn(SHAPES, ["float32", "float64"]))
def test_without_tensor_cores(gpu, dtype, shape):
    arrays, _, grads = call(np.random.default_rng(2), dtype, dtype, shape, window=(20, 30))
    i, j = np.arange(L)[:, None], np.arange(S)
    want = textbook(*arrays, (i - 20 <= j) & (j <= i + 30))
    check(grads.bias, summed(want[4], shape), dtype)
    assert any(c.task == "bias" for c in gpu.configs.values()) == (shape != (B, H, L, S))


def test_a_score_that_is_not_linear(gpu):
    """The gradient of a bias is not dS times the slope of the softcap, which comes before: it has a pass of its own."""
    arrays, _, grads = call(np.random.default_rng(3), "float16", "float16", (B, H, L, S), softcap=2.0)
    q, k, v, grad, grad_lse, bias = (x.astype(np.float64) for x in arrays)
    scores = 2 * np.tanh(q @ k.swapaxes(-1, -2) / 4 / 2) + bias
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    want = p * (grad @ v.swapaxes(-1, -2) - (grad * (p @ v)).sum(-1, keepdims=True) + grad_lse[..., None])
    check(grads.bias, want, "float16")
    assert any(c.task == "bias" for c in gpu.configs.values())


@pytest.mark.parametrize("E", [64, 128])
def test_larger_heads(gpu, E):
    arrays, out, grads = call(np.random.default_rng(4), "bfloat16", "bfloat16", (B, H, L, S), E=E)
    want = textbook(*arrays)
    for found, right in zip((out, grads.query, grads.key, grads.value, grads.bias), want, strict=True):
        check(found, right, "bfloat16")
    assert any(c.grad_bias == "tiles" for c in gpu.configs.values())
    assert all(c.has_bias_tile for c in gpu.configs.values() if c.task in ("forward", "key") and not c.nan_safe)
