"""`mask=BlockMask` on a GPU, in the emulator: against textbooks over the same mask as an array of bool."""

import numpy as np
import pytest

import numba_attention as na
from cases import DTYPES, assert_close, grad_tolerance, tolerance
from emulator import emulated
from grid import in_turn
from numba_attention import BlockMask
from numba_attention.cuda import tile_shapes


@pytest.fixture
def driver(monkeypatch):
    with emulated(monkeypatch) as driver:
        yield driver


SIZES = [  # B, H, Hkv, L, S, E: with and without groups, of more than a tile and of less, few queries
    (1, 6, 2, 70, 130, 24),
    (2, 6, 6, 40, 70, 32),
    (1, 6, 1, 2, 300, 64),
]


def arrays(sizes, dtype, seed=0):
    B, H, Hkv, L, S, E = sizes
    rng = np.random.default_rng([seed, *sizes])
    shapes = (B, H, L, E), (B, Hkv, S, E), (B, Hkv, S, E), (B, H, L, E)
    return [rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes]


def mask_of_heads(L, S):
    """Six heads: noise, blocks, a causal one, few pairs and rows of nothing, nothing, everything."""
    rng = np.random.default_rng([L, S])
    blocks = np.repeat(np.repeat(rng.random((L // 64 + 1, S // 64 + 1)) < 0.5, 64, -1), 64, -2)[:L, :S]
    few = rng.random((L, S)) < 0.05
    few[::3] = False
    heads = rng.random((L, S)) < 0.3, blocks, np.tri(L, S, S - L, dtype=bool), few, np.zeros((L, S)), np.ones((L, S))
    return np.stack(heads).astype(bool)


def textbook(q, k, v, mask, grad):
    """Output, lse and gradients in float64; 0 and -inf where a row sees nothing."""
    q, k, v, grad = (x.astype(np.float64) for x in (q, k, v, grad))
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    wide_k, wide_v = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = np.where(mask, q @ wide_k.swapaxes(-1, -2) * scale, -np.inf)
    most = np.maximum(scores.max(-1, keepdims=True), -1e300)
    exponentials = np.exp(scores - most)
    total = exponentials.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        weights, lse = np.where(total > 0, exponentials / total, 0), (most + np.log(total))[..., 0]
    lse = np.where(total[..., 0] > 0, lse, -np.inf)
    out = weights @ wide_v
    of_weights = grad @ wide_v.swapaxes(-1, -2)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True)) * scale
    shape = (*k.shape[:2], group, *k.shape[2:])
    grads = (
        of_scores @ wide_k,
        *((x.swapaxes(-1, -2) @ y).reshape(shape).sum(2) for x, y in ((of_scores, q), (weights, grad))),
    )
    return out, lse, grads


def forward_and_backward(arrays, backend="cuda", **options):
    q, k, v, grad = arrays
    out, lse = na.attention(q, k, v, **options, return_lse=True, backend=backend)
    return out, lse, na.attention_backward(grad, q, k, v, out, lse, **options, backend=backend)


@pytest.mark.parametrize(("dtype", "sizes"), in_turn(DTYPES, SIZES), ids=str)
def test_against_a_textbook(driver, sizes, dtype):
    given, mask = arrays(sizes, dtype), mask_of_heads(*sizes[3:5])
    out, lse, grads = forward_and_backward(given, mask=BlockMask.from_array(mask))
    want, want_lse, expected = textbook(*given[:3], mask, given[3])
    assert_close(out, want, tolerance(dtype)[0])
    assert_close(lse, want_lse, tolerance(dtype)[1], offset=1)
    for a, b in zip(grads[:3], expected, strict=True):
        assert_close(a, b, grad_tolerance(dtype) * 4, offset=max(1, np.abs(expected[1]).max()))
    assert {"forward", "key", "normalizers"} <= {c.task for c in driver.configs.values() if c.lists}
    assert not any(c.mask for c in driver.configs.values())


@pytest.mark.parametrize(("kind", "rows"), [("scattered", 64), ("causal", 128)])
def test_rows_of_tiles_fit_the_mask(driver, kind, rows):
    """Tiles of 128 rows would visit twice as much where neighbouring rows of tiles of a mask show other tiles."""
    sizes = (1, 2, 1, 256, 192, 64)
    blocks = (
        np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]], bool)
        if kind == "scattered"
        else np.tri(4, 3, dtype=bool)
    )
    mask, given = blocks.repeat(64, 0).repeat(64, 1), arrays(sizes, "bfloat16")
    out, lse, grads = forward_and_backward(given, mask=BlockMask.from_array(mask))
    want, want_lse, expected = textbook(*given[:3], mask, given[3])
    assert_close(out, want, tolerance("bfloat16")[0])
    assert_close(lse, want_lse, tolerance("bfloat16")[1], offset=1)
    for a, b in zip(grads[:3], expected, strict=True):
        assert_close(a, b, grad_tolerance("bfloat16") * 4, offset=max(1, np.abs(expected[1]).max()))
    assert {
        c.rows for c in driver.configs.values() if c.lists and c.product == "tensor" and c.task in ("forward", "key")
    } == {rows}


def test_gradients_in_two_passes(driver, monkeypatch):
    monkeypatch.setenv(tile_shapes.DETERMINISTIC, "1")
    given, mask = arrays(SIZES[0], "bfloat16"), mask_of_heads(*SIZES[0][3:5])
    grads = forward_and_backward(given, mask=BlockMask.from_array(mask))[2]
    expected = textbook(*given[:3], mask, given[3])[2]
    for a, b in zip(grads[:3], expected, strict=True):
        assert_close(a, b, grad_tolerance("bfloat16") * 4, offset=max(1, np.abs(expected[1]).max()))
    assert {"query", "key"} <= {c.task for c in driver.configs.values() if c.lists}


def test_with_other_options(driver):
    """Intervals clip the lists; dropout counts the same keys; a bias with its gradient takes the mask as an array."""
    given, mask = arrays(SIZES[0], "float32"), mask_of_heads(*SIZES[0][3:5])
    options = {"is_causal": "bottom-right", "window": (70, None), "key_lengths": 120, "softcap": 3.0}
    for more in (
        {"dropout_p": 0.3, "seed": 5, "sinks": np.zeros(6)},
        {"bias": mask_of_heads(70, 130)[0] * np.float32(0.5)},
    ):
        got = forward_and_backward(given, mask=BlockMask.from_array(mask), **options, **more)
        wide = [x.astype(np.float64) for x in given]
        want = forward_and_backward(wide, "reference", mask=mask, **options, **more)
        for a, b in zip((*got[:2], *got[2][:4]), (*want[:2], *want[2][:4]), strict=True):
            if b is not None:
                assert_close(a, b, 1e-5, 1)


def test_hidden_tiles_are_not_visited(driver):
    """NaN in tiles that nobody sees is not read; the same mask again makes no list and copies nothing."""
    q, k, v = (np.random.default_rng(n).standard_normal((2, 130, 16)).astype(np.float32) for n in range(3))
    mask = BlockMask.from_array(np.broadcast_to(np.arange(130) < 64, (130, 130)))
    k[:, 64:], v[:, 64:] = np.nan, np.nan
    first = na.attention(q, k, v, mask=mask, backend="cuda")
    assert_close(first, na.attention(q, k[:, :64], v[:, :64], backend="reference"), 2e-6)
    copies = len(driver.copies)
    np.testing.assert_array_equal(na.attention(q, k, v, mask=mask, backend="cuda"), first)
    assert len(driver.copies) - copies <= 6  # query, key, value, the records, the result


def test_packed_sequences(driver):
    rng = np.random.default_rng(0)
    starts = [0, 70, 70, 75, 110]
    x, grad = rng.standard_normal((2, 110, 6, 16))
    mask = np.stack([rng.random((110, 110)) < 0.3, *np.ones((5, 110, 110), bool)])
    blocks, results = BlockMask.from_array(mask), []
    for backend, given in (("cuda", blocks), ("reference", mask)):
        out, lse = na.attention_varlen(x, x, x, starts, starts, mask=given, return_lse=True, backend=backend)
        grads = na.attention_varlen_backward(grad, x, x, x, out, lse, starts, starts, mask=given, backend=backend)
        results.append((out, lse, *grads[:3]))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-11, 1)


def test_a_cache(driver):
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, 2, 2, 200, 16)).astype(np.float32)
    query = rng.standard_normal((2, 4, 3, 16)).astype(np.float32)
    cache = na.KVCache(2, 2, 200, 16)
    cache.append(key, value)
    wide, newest = rng.random((2, 1, 3, 200)) < 0.3, np.tri(3, dtype=bool)
    wide[..., 0] = True
    for mask in (wide, newest):
        got = na.attention_decode(query, cache, mask=BlockMask.from_array(mask), backend="cuda")
        want = na.attention_decode(query, cache, mask=mask, backend="reference")
        assert_close(got, want, 2e-6)


def test_probabilities(driver):
    given, mask = arrays(SIZES[0], "float32"), mask_of_heads(*SIZES[0][3:5])
    some = {"heads": [5, 0], "rows": [69, 0, 7]}
    got = na.attention_weights(*given[:2], mask=BlockMask.from_array(mask), **some, backend="cuda")
    assert_close(got, na.attention_weights(*given[:2], mask=mask, **some, backend="reference"), 2e-6)


def test_rows_far_from_zero(driver):
    """Rows whose lse does not tell how many keys they see: the kernel of normalizers visits lists too."""
    q, k, v, grad = (np.random.default_rng(n).standard_normal((1, 1, 70, 16)).astype(np.float32) for n in range(4))
    mask = mask_of_heads(70, 70)[0]

    def far(score, batch, head, i, j):
        return score * 0 - 1e9

    options = {"score_mod": far}
    out, _, grads = forward_and_backward((q, k, v, grad), mask=BlockMask.from_array(mask), **options)
    weights = mask / np.maximum(mask.sum(-1, keepdims=True), 1)
    assert_close(out[0, 0], weights @ v[0, 0], 2e-6)
    assert_close(grads.value[0, 0], weights.T @ grad[0, 0], 1e-5)
