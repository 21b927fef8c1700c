"""Query heads of one key head as rows of the same tiles, in the emulator: against a textbook in float64."""

import ml_dtypes
import numpy as np
import pytest

import numba_attention as na
from caching import filled
from cases import DTYPES
from emulator import emulated

BOUNDS = {"float32": 2e-6, "float64": 1e-13, "float16": 2e-3, "bfloat16": 1.5e-2}
# H, Hkv, L, S, E, Ev: groups of 17 to 128, which are some warps of a tile, one tile, or several; a speculative step.
SIZES = [
    (17, 1, 1, 70, 40, 40), (64, 2, 1, 130, 64, 24), (128, 1, 1, 40, 128, 128), (160, 1, 1, 40, 32, 32),
    (48, 1, 3, 70, 33, 64), (8, 2, 5, 90, 64, 64), (24, 1, 2, 50, 200, 256),
]  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    with emulated(monkeypatch) as driver:
        yield driver


def normal(seed, *shape, dtype):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(DTYPES[dtype])


def arrays(sizes, dtype, batch=()):
    H, Hkv, L, S, E, Ev = sizes
    return [normal(n, *batch, *x, dtype=dtype) for n, x in enumerate(((H, L, E), (Hkv, S, E), (Hkv, S, Ev)))]


def textbook(q, k, v, visible=True, bias=0.0, slopes=None, sinks=None, softcap=None):
    """Output and lse of (H, L, E), (Hkv, S, E) and (Hkv, S, Ev), the last query at the last key."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, len(q) // len(x), axis=0) for x in (k, v))
    s = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    if softcap is not None:
        s = softcap * np.tanh(s / softcap)
    distance = np.arange(k.shape[1]) - (np.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1])
    if slopes is not None:
        s = s - slopes[:, None, None] * np.abs(distance)
    s = np.where(visible & (distance <= 0), s + bias, -np.inf)
    most = s.max(-1) if sinks is None else np.maximum(s.max(-1), sinks[:, None])
    most = np.where(np.isfinite(most), most, 0)
    weights = np.exp(s - most[..., None])
    total = weights.sum(-1) + (0 if sinks is None else np.exp(sinks[:, None] - most))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total[..., None] > 0, weights @ v / total[..., None], 0), most + np.log(total)


def close(found, right, dtype):
    for x, y in zip(found, right, strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), y, atol=BOUNDS[dtype], rtol=BOUNDS[dtype])


def forward(driver):
    return [c for c in driver.configs.values() if c.task == "forward" and not c.nan_safe]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_heads_are_rows(gpu, sizes, dtype):
    H, Hkv, L, *_ = sizes
    q, k, v = arrays(sizes, dtype)
    found = na.attention(q, k, v, is_causal="bottom-right", return_lse=True, backend="cuda")
    close(found, textbook(q, k, v), dtype)
    (c,) = forward(gpu)
    assert c.pack_gqa
    rows = H // Hkv * L
    assert c.rows < 2 * rows or c.warps == 1, "no more warps than there are rows"


@pytest.mark.parametrize("dtype", DTYPES)
def test_options(gpu, dtype):
    """Each row has the slope, the sink, and the row of the mask and of the bias of its own head."""
    q, k, v = arrays((40, 2, 4, 90, 64, 64), dtype)
    rng = np.random.default_rng(1)
    mask, bias = rng.random((40, 4, 90)) < 0.5, rng.standard_normal((40, 4, 90)).astype(np.float32)
    mask[3, 1], mask[21] = False, False
    slopes, sinks = np.geomspace(1, 0.01, 40), np.linspace(-3, 3, 40)
    options = {"softcap": 3.0, "alibi_slopes": slopes, "sinks": sinks, "bias": bias, "mask": mask}
    found = na.attention(q, k, v, is_causal="bottom-right", return_lse=True, backend="cuda", **options)
    close(found, textbook(q, k, v, mask, bias, slopes, sinks, 3.0), dtype)
    found = na.attention(q, k, v, is_causal="bottom-right", mask=mask, return_lse=True, backend="cuda")
    close(found, textbook(q, k, v, mask), dtype)
    assert all(c.pack_gqa for c in forward(gpu))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parts_of_the_keys(monkeypatch, dtype):
    """Two tiles of rows, whose keys are shared out among blocks; what is hidden does not leak."""
    q, k, v = arrays((320, 2, 1, 700, 64, 40), dtype)
    k[0, 650, 3], v[1, 690, 2] = np.nan, np.inf
    with emulated(monkeypatch, multiprocessors=132) as driver:
        found = na.attention(
            q, k, v, is_causal=True, query_offset=600, window=(400, 0), return_lse=True, backend="cuda"
        )
        assert any(c.split_kv and c.pack_gqa and c.rows == 128 for c in driver.configs.values())
    seen = slice(200, 601)
    close(found, textbook(q, k[:, seen], v[:, seen]), dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_marked_rows_are_computed_again(gpu, dtype):
    """A NaN that heads of one tile see, and others behind their masks do not."""
    q, k, v = arrays((36, 1, 1, 40, 64, 64), dtype)
    v[0, 7, 5] = np.nan
    mask = np.ones((36, 1, 40), bool)
    mask[::2, :, 7] = False
    out = na.attention(q, k, v, mask=mask, backend="cuda")
    v[0, 7, 5] = 0
    want, _ = textbook(q, k, v, mask)
    close([out[::2]], [want[::2]], dtype)
    assert np.isnan(out[1::2, :, 5]).all()
    close([np.delete(out[1::2], 5, axis=-1)], [np.delete(want[1::2], 5, axis=-1)], dtype)


@pytest.mark.parametrize("storage", [None, "int8", "float8"])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_caches(gpu, dtype, page_size, storage):
    """Of different lengths; what 8 bits hold is read back from a row at a time."""
    lengths = [150, 77]
    q, k, v = arrays((64, 2, 1, 150, 64, 64), dtype, (2,))
    if storage is not None:
        scale = np.float32(448 if storage == "float8" else 127)
        held = ml_dtypes.float8_e4m3fn if storage == "float8" else np.int8
        k, v = (np.clip(x.astype(np.float32) * 16, -120, 120).round().astype(held).astype(np.float32) for x in (k, v))
        k[..., 0] = v[..., 0] = scale  # the scale of every row is 1
        k, v = (x.astype(DTYPES[dtype]) for x in (k, v))
        q = (q.astype(np.float32) / 64).astype(q.dtype)
    cache = filled(k, v, lengths, storage, page_size)
    out = na.attention_decode(q, cache, backend="cuda")
    for n, length in enumerate(lengths):
        want, _ = textbook(q[n], k[n, :, :length], v[n, :, :length])
        most = np.abs(want).max()
        close([out[n] / most], [want / most], dtype)
    assert all(c.pack_gqa and c.kv_storage == (cache.storage if storage else "") for c in forward(gpu))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_packed_sequences(gpu, dtype):
    """Tiles of all sequences come from a list: of one without queries, of few, and of more rows than a tile."""
    H, queries, keys = 24, [1, 0, 33, 3], [40, 7, 70, 3]
    starts = [np.cumsum([0, *counts]) for counts in (queries, keys)]
    q, k, v = (normal(n, *x, 32, dtype=dtype) for n, x in enumerate(((37, H), (120, 2), (120, 2))))
    out, lse = na.attention_varlen(q, k, v, *starts, is_causal="bottom-right", return_lse=True, backend="cuda")
    for n in range(4):
        rows, seen = (slice(*x[n : n + 2]) for x in starts)
        want, want_lse = textbook(q[rows].swapaxes(0, 1), *(x[seen].swapaxes(0, 1) for x in (k, v)))
        close([out[rows].swapaxes(0, 1), lse[:, rows]], [want, want_lse], dtype)
    assert all(c.pack_gqa for c in forward(gpu))
    _, _, grid, *_ = gpu.launches[0]
    assert grid[0] * grid[1] == sum(-(-n * 12 // forward(gpu)[0].rows) for n in queries) * 2, "no block without rows"


def test_tiles_that_are_full_stay_apart(gpu):
    """As many queries as a tile has rows: a tile for each head, which the kernels of sm_90 compute too."""
    q, k, v = arrays((4, 2, 128, 130, 64, 64), "float16")
    close([na.attention(q, k, v, is_causal="bottom-right", backend="cuda")], [textbook(q, k, v)[0]], "float16")
    assert not any(c.pack_gqa for c in forward(gpu))
