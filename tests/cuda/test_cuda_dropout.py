"""Dropout on a GPU, in the emulator: the masks of the reference in every kernel, and the gradients with them."""

import numpy as np
import pytest

import numba_attention as na
from cases import DTYPES, Case, assert_close, check, check_backward, tolerance
from emulator import emulated
from numba_attention.cuda import tile_shapes

DROP = {"dropout_p": 0.3, "seed": 2**63 + 12345}


@pytest.fixture
def driver(monkeypatch):
    with emulated(monkeypatch) as driver:
        yield driver


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


CASES = [
    Case(40, 70, 24, H=2, Hkv=1, options=("dropout", "causal")),
    Case(30, 100, 20, 40, H=1, batch=(), options=("dropout", "window", "offset negative", "bias that hides")),
    Case(20, 40, 128, H=1, batch=(), options=("dropout", "softcap", "mask", "bias of keys")),
    Case(17, 40, 160, 32, H=1, batch=(), options=("dropout", "sinks")),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(driver, case, dtype):
    check(*case.arrays(dtype), case.kwargs(), dtype, case, backend="cuda")
    check_backward(case, dtype, backend="cuda")
    assert all(c.dropout for c in driver.configs.values() if c.task in ("forward", "query", "key", "bias"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_in_two_passes(driver, monkeypatch, dtype):
    monkeypatch.setenv(tile_shapes.DETERMINISTIC, "1")
    for case in CASES[:2]:
        check_backward(case, dtype, backend="cuda")
    assert {"query", "key"} <= {c.task for c in driver.configs.values()}


def test_float32_on_tensor_cores(driver, monkeypatch):
    monkeypatch.setenv(tile_shapes.TF32X3, "1")
    check(*CASES[0].arrays("float32"), CASES[0].kwargs(), "float32", CASES[0], backend="cuda")
    check_backward(CASES[0], "float32", backend="cuda")
    assert any(c.product == "tf32" for c in driver.configs.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_old_gpus(monkeypatch, dtype):
    with emulated(monkeypatch, capability=(7, 0)):
        check(*CASES[1].arrays(dtype), CASES[1].kwargs(), dtype, CASES[1], backend="cuda")
        check_backward(CASES[1], dtype, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_show_the_mask(driver, dtype):
    query, key = (normal(2, heads, n, 32, dtype=DTYPES[dtype]) for heads, n in ((4, 40), (2, 100)))
    options = DROP | {"query_offset": [70, -3], "is_causal": True, "heads": [3, 1], "rows": [39, 0, 20]}
    got = na.attention_weights(query, key, **options, backend="cuda")
    want = na.attention_weights(query, key, **options, backend="reference")
    np.testing.assert_array_equal(got != 0, want != 0)
    assert_close(got, want, tolerance(dtype)[0])


@pytest.mark.parametrize(("dtype", "E"), [("float32", 64), ("bfloat16", 256)])
def test_few_queries_and_many_keys(driver, dtype, E):
    """Grouped heads in one tile, keys in splits that blocks share, a window that begins anywhere."""
    query, key, value = (normal(1, heads, n, E, dtype=DTYPES[dtype]) for heads, n in ((4, 3), (2, 400), (2, 400)))
    for options in ({"is_causal": "bottom-right"}, {"window": (203, 0), "query_offset": 390, "softcap": 3.0}):
        out = na.attention(query, key, value, **DROP, **options, backend="cuda")
        wide = [x.astype(np.float64) for x in (query, key, value)]
        assert_close(out, na.attention(*wide, **DROP, **options, backend="reference"), tolerance(dtype)[0])
    assert any(c.split_kv for c in driver.configs.values())
    assert any(c.pack_gqa for c in driver.configs.values())


def test_packed_sequences_and_a_cache(driver):
    x, starts = normal(90, 2, 32), [0, 40, 40, 47, 90]
    packed, lse = na.attention_varlen(x, x, x, starts, starts, **DROP, return_lse=True, backend="cuda")
    assert_close(packed, na.attention_varlen(x, x, x, starts, starts, **DROP, backend="reference"), 2e-6)
    grads = [
        na.attention_varlen_backward(np.ones_like(x), x, x, x, packed, lse, starts, starts, **DROP, backend=backend)
        for backend in ("cuda", "reference")
    ]
    for got, want in zip(*(g[:3] for g in grads), strict=True):
        assert_close(got, want, 1e-5, 1)
    cache = na.PagedKVCache(20, 16, 2, 32)
    key, value, query = normal(2, 2, 77, 32), normal(2, 2, 77, 32, seed=1), normal(2, 4, 1, 32)
    cache.append(cache.add(2), key, value)
    got = na.attention_decode(query, cache, **DROP, backend="cuda")
    assert_close(got, na.attention_decode(query, cache, **DROP, backend="reference"), 2e-6)


def test_another_seed_in_a_call_like_an_earlier_one(driver):
    query = normal(2, 70, 32)
    for seed in (1, 2, 1, 2**40):
        got = na.attention(query, query, query, dropout_p=0.3, seed=seed, backend="cuda")
        want = na.attention(query, query, query, dropout_p=0.3, seed=seed, backend="reference")
        assert_close(got, want, 2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_of_a_hidden_key_has_no_effect(driver, dtype):
    query, key, value, grad_out = (normal(1, 70, 32, dtype=DTYPES[dtype], seed=n) for n in range(4))
    mask = np.arange(70) < 50
    results = []
    for _ in range(2):
        out, lse = na.attention(query, key, value, mask=mask, **DROP, return_lse=True, backend="cuda")
        grads = na.attention_backward(grad_out, query, key, value, out, lse, mask=mask, **DROP, backend="cuda")
        results.append([out, lse, *grads[:3]])
        key[:, 50:], value[:, 50:] = np.nan, np.inf
    for clean, dirty in zip(*results, strict=True):
        assert np.isfinite(dirty.astype(np.float32)).all()
        assert_close(dirty, clean, tolerance(dtype)[0] * 5, 1)
