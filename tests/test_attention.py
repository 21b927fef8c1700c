"""`attention` on the CPU against the reference: every case in every dtype, then what it may read and write."""

import itertools

import ml_dtypes
import numpy as np
import pytest

import numba_attention as na
from cases import (
    CASES,
    DTYPES,
    GROUPS,
    LAYOUTS,
    OPTIONS,
    SOME,
    VARIED,
    Case,
    assert_close,
    check,
    graded,
    oracle,
    tolerance,
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case):
    check(*case.arrays(), case.kwargs(), "float32", case)


@pytest.mark.parametrize(("case", "dtype"), graded(CASES, ["float64"]))
def test_case_in_double(case, dtype):
    check(*case.arrays(dtype), case.kwargs(), dtype, case)


@pytest.mark.parametrize(("case", "dtype"), graded(SOME, ["float16", "bfloat16"]))
def test_case_in_half(case, dtype):
    check(*case.arrays(dtype), case.kwargs(), dtype, case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_head_dimension(dtype):
    for E in range(1, 261):
        case = Case(3, 5, E, E, batch=())
        check(*case.arrays(dtype), {}, dtype, case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_short_lengths(dtype):
    for L in range(1, 70):
        for S in range(1, 70):
            case = Case(L, S, 5, 3, H=1, batch=(), options=("causal", "bottom-right") if (L + S) % 2 else ())
            check(*case.arrays(dtype), case.kwargs(), dtype, case)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("causal",), ("bottom-right", "window", "softcap", "alibi", "sinks")], ids=str)
def test_long_sequences(options):
    case = Case(2049, 3001, 64, 80, H=3, Hkv=1, batch=(1,), options=options)
    check(*case.arrays(), case.kwargs(), "float32", case)


def test_two_dimensions_are_one_head():
    query, key, value = (np.random.default_rng(0).standard_normal((9, 4)) for _ in range(3))
    out, lse = na.attention(query, key, value, is_causal=True, return_lse=True)
    want, want_lse = na.attention(query[None], key[None], value[None], is_causal=True, return_lse=True)
    assert out.shape == (9, 4)
    assert lse.shape == (9,)
    np.testing.assert_array_equal(out, want[0])
    np.testing.assert_array_equal(lse, want_lse[0])


def test_two_dimensions_beside_more():
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((3, 2, 5, 4)), rng.standard_normal((7, 4))
    np.testing.assert_array_equal(na.attention(query, key, key), na.attention(query, key[None, None], key[None, None]))


@pytest.mark.torch
def test_windows_of_other_libraries(torch):
    """A window may be what has two integers in an order: arrays of any library too."""
    query, key, value = (np.random.default_rng(n).standard_normal((20, 8), dtype=np.float32) for n in range(3))
    expected = na.attention(query, key, value, window=(1, 2))
    for pair in ([1, 2], np.array([1, 2]), range(1, 3), torch.tensor([1, 2]), torch.Size([1, 2])):
        np.testing.assert_array_equal(na.attention(query, key, value, window=pair), expected)


def test_memory_mapped(tmp_path):
    x = np.random.default_rng(0).standard_normal((3, 20, 8), dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.testing.assert_array_equal(na.attention(mapped, mapped, mapped), na.attention(x, x, x))


def test_lse_is_asked_for():
    query, key, value = Case().arrays()
    alone = na.attention(query, key, value)
    assert isinstance(alone, np.ndarray)
    out, _ = na.attention(query, key, value, return_lse=True)
    np.testing.assert_array_equal(alone, out)


# What a call may read and write.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["C", "features reversed", "island"])
def test_inputs_stay_as_they_are(dtype, layout):
    case = Case(70, 130, 20, 33, H=4, Hkv=2, layout=layout, options=VARIED)
    arrays, kwargs = case.arrays(dtype), case.kwargs()
    given = [*arrays, *(x for x in kwargs.values() if isinstance(x, np.ndarray))]
    before = [x.tobytes() for x in given]
    na.attention(*arrays, **kwargs)
    assert [x.tobytes() for x in given] == before


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.endswith("for all") and name != "readonly"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_out(layout, dtype, backend):
    case = Case(70, 33, 20, 33, options=("causal",))
    arrays = case.arrays(dtype)
    want = na.attention(*arrays, is_causal=True, backend=backend)
    out = LAYOUTS[layout](np.full(want.shape, np.nan, want.dtype))
    got = na.attention(*arrays, is_causal=True, out=out, backend=backend)
    assert got is out
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("case", GROUPS["together"] + GROUPS["features"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_nothing_beside_out(case, dtype):
    query, key, value = case.arrays(dtype)
    shape = (*case.full_batch, case.H, case.L, value.shape[-1])
    sea = np.full([n + 2 for n in shape], 7, query.dtype)
    inside = (slice(1, -1),) * sea.ndim
    na.attention(query, key, value, **case.kwargs(), out=sea[inside])
    assert not np.any(sea[inside] == 7)
    sea[inside] = 7
    assert np.all(sea == 7)


def test_out_of_two_dimensions():
    x = np.random.default_rng(0).standard_normal((9, 4))
    out = np.empty((9, 4))
    assert na.attention(x, x, x, out=out) is out
    np.testing.assert_array_equal(out, na.attention(x, x, x))


def test_out_beside_an_input_in_one_buffer():
    buffer = np.random.default_rng(0).standard_normal((2, 5, 8, 6))
    x, out = buffer[0], buffer[1]
    interleaved = np.random.default_rng(0).standard_normal((5, 8, 12))
    np.testing.assert_array_equal(na.attention(x, x, x, out=out), na.attention(x, x, x))
    x, out = interleaved[..., ::2], interleaved[..., 1::2]
    np.testing.assert_array_equal(na.attention(x, x, x, out=out), na.attention(x, x, x))


# Rows that see nothing.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"mask": False},
        {"bias": -np.inf},
        {"key_lengths": 0},
        {"query_offset": -100, "is_causal": True},
        {"query_offset": 1000, "window": (3, None)},
        {"mask": np.arange(70) < 9, "bias": np.where(np.arange(70) < 9, np.float32(-np.inf), np.float32(0))},
    ],
    ids=lambda kwargs: "+".join(kwargs),
)
def test_nothing_to_attend_to(kwargs, backend, dtype):
    query, key, value = Case(66, 70).arrays(dtype)
    sinks = np.array([0.5, -3.0])
    out, lse = na.attention(query, key, value, **kwargs, return_lse=True, backend=backend)
    assert not out.astype(np.float64).any()
    assert np.all(lse == -np.inf)
    out, lse = na.attention(query, key, value, **kwargs, sinks=sinks, return_lse=True, backend=backend)
    assert not out.astype(np.float64).any()
    assert_close(lse, np.broadcast_to(sinks[:, None], lse.shape), tolerance(dtype)[1])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_past_the_query_length(backend):
    query, key, value = Case(66, 70).arrays()
    out, lse = na.attention(query, key, value, query_lengths=[3, 0], sinks=[1.0, 2.0], return_lse=True, backend=backend)
    assert out[0, :, :3].all()
    assert not out[0, :, 3:].any()
    assert not out[1].any()
    assert np.all(lse[0, :, 3:] == -np.inf)
    assert np.all(lse[1] == -np.inf)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_keys(dtype):
    query, key, value = Case(5, 0, 4, 3).arrays(dtype)
    out, lse = na.attention(query, key, value, return_lse=True)
    assert out.shape == (2, 2, 5, 3)
    assert not out.astype(np.float64).any()
    assert np.all(lse == -np.inf)


# Numbers far from 1.


def test_products_that_overflow_before_scaling():
    rng = np.random.default_rng(0)
    query, key = (1e18 * rng.standard_normal((3, 70, 16)) for _ in range(2))
    query, key = query.astype(np.float32), key.astype(np.float32)
    value = rng.standard_normal((3, 70, 16), dtype=np.float32)
    for scale in (1e-36, -1e-36, 3e-37):
        out, lse = na.attention(query * 100, key * 100, value, scale=scale / 1e4, return_lse=True)
        want, want_lse = oracle(query * 100, key * 100, value, scale=scale / 1e4)
        assert_close(out, want, 2e-6)
        assert_close(lse, want_lse, 5e-7, offset=1)


def test_scale_of_small_inputs():
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((3, 70, 16)).astype(np.float32) for _ in range(3))
    for small, scale in [(1e-15, 1e30), (1e-12, -1e24)]:
        a, b = np.float32(small) * query, np.float32(small) * key
        assert_close(na.attention(a, b, value, scale=scale), oracle(a, b, value, scale=scale)[0], 4e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shift", [-1e4, 1e4, -2e38, 2e38])
def test_bias_far_from_zero(dtype, shift):
    query, key, value = Case(33, 70).arrays(dtype)
    out, lse = na.attention(query, key, value, bias=np.float32(shift), return_lse=True)
    want, want_lse = oracle(query, key, value, bias=np.float32(shift))
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    if abs(shift) < 1e5:
        assert_close(out, want, 2e-3 if dtype == "float32" else 1e-11)
    assert_close(lse, want_lse, tolerance(dtype)[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_lowest_number_as_a_mask(dtype):
    """Models often mask with the lowest finite number where others use -inf."""
    query, key, value = Case(33, 130, 8).arrays(dtype)
    hidden = np.random.default_rng(0).random((33, 130)) < 0.5
    hidden[:, 0] = False
    lowest = ml_dtypes.finfo(query.dtype).min
    bias = np.where(hidden, lowest, query.dtype.type(0))
    np.testing.assert_array_equal(
        na.attention(query, key, value, bias=bias), na.attention(query, key, value, mask=~hidden)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_score_far_above_the_rest(dtype):
    query, key, value = Case(33, 130, 8).arrays(dtype)
    key[..., 77, :] = 0
    bias = np.zeros(130, np.float32)
    bias[77] = 3000
    out = na.attention(query, key, value, bias=bias)
    np.testing.assert_array_equal(out, np.broadcast_to(value[..., 77:78, :], out.shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_near_the_largest(dtype):
    """float16 reaches its end; the others sum 130 values before they divide."""
    query, key, value = Case(33, 130, 8).arrays(dtype)
    largest = {"float16": 6e4, "float32": 3e38 / 130, "bfloat16": 3e38 / 130, "float64": 1.7e308 / 130}[dtype]
    value = np.where(value.astype(np.float64) > 0, largest, largest / 2).astype(value.dtype)
    out = na.attention(query, key, value)
    assert np.isfinite(out.astype(np.float64)).all()
    assert_close(out, oracle(query, key, value)[0], tolerance(dtype)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_inputs(dtype):
    smallest = {"float32": 1e-45, "float64": 5e-324, "float16": 6e-8, "bfloat16": 1e-40}[dtype]
    query, key, value = Case(33, 70, 8).arrays(dtype)
    check(np.full_like(query, smallest), key, value, {}, dtype)
    check(query, np.full_like(key, smallest), value, {}, dtype)


def test_every_option_is_in_a_case():
    assert {name for case in CASES for name in case.options} == set(OPTIONS)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_only_minus_infinity_hides(dtype):
    # finfo.min is finite: where all keys have it, none is preferred. Its product with log2(e) overflows.
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((5, 8)).astype(dtype) for _ in range(3))
    for bias in (np.finfo(dtype).min, np.finfo(dtype).max):
        out = na.attention(query, key, value, bias=np.full((5, 5), bias, dtype))
        np.testing.assert_allclose(out, np.broadcast_to(value.mean(0), out.shape), atol=1e-6)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_out_of_any_layout(order):
    rng, shape = np.random.default_rng(0), (2, 3, 4, 5)
    x = rng.standard_normal(shape, dtype=np.float32)
    want = textbook_out(x)
    for factor in (1, 2):
        buffer = np.zeros([factor * shape[n] for n in order], np.float32)
        out = buffer[tuple(slice(shape[n]) for n in order)].transpose(np.argsort(order))
        assert na.attention(x, x, x, out=out) is out
        np.testing.assert_allclose(out, want, atol=1e-6)


def test_out_whose_rows_are_interleaved():
    # Elements at 2 i + 3 j for i < 3, j < 2: axes reach over each other, and no two elements meet.
    out = np.lib.stride_tricks.as_strided(np.zeros(20, np.float32), (3, 2), (8, 12))
    x = np.random.default_rng(0).standard_normal((3, 2), dtype=np.float32)
    na.attention(x, x, x, out=out)
    np.testing.assert_allclose(out, textbook_out(x), atol=1e-6)


def textbook_out(x):
    """softmax(x x.T / sqrt(E)) x in float64."""
    x = x.astype(np.float64)
    weights = np.exp(x @ x.swapaxes(-1, -2) / np.sqrt(x.shape[-1]))
    return weights / weights.sum(axis=-1, keepdims=True) @ x
