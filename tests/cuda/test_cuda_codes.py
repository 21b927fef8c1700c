"""Codes that tensor cores multiply: each code and scale on its own, what is not finite, and the ends of the ranges."""

import ml_dtypes
import numpy as np
import pytest

import numba_attention as na
from device import NumbaArray, install
from emulator import emulated
from grid import in_turn

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CODES = {"int8": np.int8, "float8": ml_dtypes.float8_e4m3fn}
PAIRS = [(dtype, storage) for dtype in DTYPES for storage in CODES]
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.fixture
def gpu(monkeypatch):
    install(monkeypatch)
    with emulated(monkeypatch) as driver:
        yield driver
    forward = [c for c in driver.configs.values() if c.task == "forward" and not c.nan_safe]
    assert forward, "no kernel has run"
    assert all(c.multiplies_codes for c in forward)


def cache_of(dtype, storage, key, value, key_scale, value_scale, lengths):
    """A cache on the device, of codes as numbers."""
    codes = [NumbaArray(np.asarray(x, np.float32).astype(CODES[storage])) for x in (key, value)]
    scales = [NumbaArray(np.asarray(x, np.float32)) for x in (key_scale, value_scale)]
    return na.KVCache.from_arrays(*codes, lengths, key_scale=scales[0], value_scale=scales[1], dtype=DTYPES[dtype])


def every_code(storage):
    """The 256 codes as numbers; those of float8 that are NaN, which caches do not store, are 0."""
    return np.nan_to_num(np.arange(256).astype(np.uint8).view(CODES[storage]).astype(np.float32))


def attended(q, key, value, scale):
    """softmax(q K^T scale) V in float64, and the lse."""
    s = np.einsum("bhld,bhsd->bhls", *(x.astype(np.float64) for x in (q, key))) * scale
    top = s.max(-1, keepdims=True)
    p = np.exp(s - top)
    return np.einsum("bhls,bhsd->bhld", p / p.sum(-1, keepdims=True), value), (top + np.log(p.sum(-1, keepdims=True)))[
        ..., 0
    ]


@pytest.mark.parametrize(("dtype", "storage"), PAIRS)
@pytest.mark.parametrize(("power", "mantissa"), in_turn([-20, -9, 0, 3, 5], [1.0, 1.37]))
def test_every_code_is_multiplied_by_its_scale(gpu, dtype, storage, power, mantissa):
    """Of one visible key, the lse is its score and the result its value; 16 heads look at a feature each."""
    B, H, S, E = 16, 16, 40, 64
    codes, scale = every_code(storage), np.float32(mantissa * 2.0**power)
    feature = 4 * np.arange(H) + np.arange(B)[:, None] % 4
    q = np.zeros((B, H, 1, E), DTYPES[dtype])
    q[np.arange(B)[:, None], np.arange(H), 0, feature] = unit = 2.0 ** np.clip(-power, -12, 12)
    key, value = np.zeros((2, B, 1, S, E), np.float32)
    key[np.arange(B)[:, None], 0, 0, feature] = codes.reshape(B, H)
    value[:, 0, 0] = np.tile(codes.reshape(4, E), (4, 1))
    key[:, :, 1:] = value[:, :, 1:] = 3  # of keys that are hidden
    scales = np.full((B, 1, S), scale)
    cache = cache_of(dtype, storage, key, value, scales, scales, np.ones(B, int))
    out, lse = na.attention_decode(NumbaArray(q), cache, scale=1.0, return_lse=True)
    np.testing.assert_allclose(lse.array[..., 0], codes.reshape(B, H) * scale * unit, rtol=3e-7, atol=5e-7)
    want = np.broadcast_to(value[:, :, :1].astype(np.float64) * scale, (B, H, 1, E))
    finite = np.isfinite(want.astype(DTYPES[dtype]).astype(np.float64))
    got = out.array.astype(np.float64)
    if mantissa == 1:
        np.testing.assert_array_equal(got[finite], want.astype(DTYPES[dtype]).astype(np.float64)[finite])
    subnormal = 2.0**-23 if dtype == "float16" else 0
    np.testing.assert_allclose(got[finite], want[finite], rtol=2 * ROUNDING[dtype], atol=subnormal)


@pytest.mark.parametrize(("dtype", "storage"), PAIRS)
@pytest.mark.parametrize(("E", "Ev"), [(32, 256), (96, 32), (192, 96), (112, 64)])
def test_scales_of_all_magnitudes(gpu, dtype, storage, E, Ev):
    rng = np.random.default_rng(E)
    B, H, Hkv, L, S = 2, 4, 2, 3, 150
    key, value = (
        rng.standard_normal((B, Hkv, S, n)) * 32 for n in (E, Ev)
    )  # fmt: skip
    key, value = (x.astype(CODES[storage]).astype(np.float32) for x in (key, value))
    key_scale = (rng.uniform(0.01, 0.05, (B, Hkv, S))).astype(np.float32)
    value_scale = (10.0 ** rng.uniform(-5, 1, (B, Hkv, S))).astype(np.float32)
    q = rng.standard_normal((B, H, L, E)).astype(DTYPES[dtype])
    cache = cache_of(dtype, storage, key, value, key_scale, value_scale, S)
    out, lse = na.attention_decode(NumbaArray(q), cache, return_lse=True, is_causal=False)
    K, V = (np.repeat(x.astype(np.float64) * s[..., None], 2, 1) for x, s in ((key, key_scale), (value, value_scale)))
    want, want_lse = attended(q, K, V, 1 / np.sqrt(E))
    bound, _ = attended(q, K, abs(V), 1 / np.sqrt(E))
    assert (abs(out.array.astype(np.float64) - want) <= 3 * ROUNDING[dtype] * bound + 1e-7).all()
    np.testing.assert_allclose(lse.array, want_lse, atol=1e-4)


@pytest.mark.parametrize(("dtype", "storage"), PAIRS)
def test_scales_that_are_not_finite(gpu, dtype, storage):
    """NaN and infinite scales of what a row does not see reach no result, and NaN that it sees does."""
    rng = np.random.default_rng(1)
    B, H, L, S, E = 1, 4, 2, 90, 64
    key, value = (rng.integers(-7, 8, (B, 1, S, E)).astype(np.float32) for _ in range(2))
    key_scale, value_scale = rng.uniform(0.01, 0.05, (2, B, 1, S)).astype(np.float32)
    q = rng.standard_normal((B, H, L, E)).astype(DTYPES[dtype])
    K, V = (np.repeat(x.astype(np.float64) * s[..., None], H, 1) for x, s in ((key, key_scale), (value, value_scale)))
    hidden = 40
    for scales, special in ((key_scale, np.nan), (value_scale, np.inf), (key_scale, np.inf), (value_scale, np.nan)):
        kept = scales[..., hidden].copy()
        scales[..., hidden] = special
        cache = cache_of(dtype, storage, key, value, key_scale, value_scale, S)
        mask = np.arange(S) != hidden
        out = na.attention_decode(NumbaArray(q), cache, mask=mask, is_causal=False)
        want, _ = attended(q, K[:, :, mask], V[:, :, mask], 1 / np.sqrt(E))
        np.testing.assert_allclose(out.array.astype(np.float64), want, atol=4 * ROUNDING[dtype])
        if np.isnan(special):
            assert np.isnan(na.attention_decode(NumbaArray(q), cache, is_causal=False).array.astype(np.float32)).all()
        scales[..., hidden] = kept


def test_queries_at_the_ends_of_the_range(gpu):
    """Scores are finite wherever products of queries with keys are, though those with codes would overflow."""
    rng = np.random.default_rng(2)
    key, value = (rng.integers(-127, 128, (1, 1, 70, 64)).astype(np.float32) for _ in range(2))
    for of_query, of_key in ((2.0**125, 2.0**-130), (2.0**-100, 2.0**94)):
        q = (rng.standard_normal((1, 2, 1, 64)) * of_query / 4).astype(ml_dtypes.bfloat16)
        key_scale = (rng.uniform(1, 2, (1, 1, 70)) * of_key / 64).astype(np.float32)
        cache = cache_of("bfloat16", "int8", key, value, key_scale, np.ones((1, 1, 70), np.float32), 70)
        out = na.attention_decode(NumbaArray(q), cache, scale=0.5)
        K = np.repeat(key.astype(np.float64) * key_scale[..., None], 2, 1)
        want, _ = attended(q, K, np.repeat(value, 2, 1), 0.5)
        np.testing.assert_allclose(out.array.astype(np.float64), want, atol=1.5)
