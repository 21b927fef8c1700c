"""`attention_weights`: against the reference, against `attention` over the identity, and what it can select."""

import numpy as np
import pytest

import numba_attention as na
from cases import CASES, DTYPES, SOME, VARIED, Case, assert_close, graded, tolerance

WITH_KEYS = [case for case in CASES if case.key_batch is None and case.value_batch is None]
FEW = [case for case in SOME if case in WITH_KEYS]


def by_reference(query, key, **kwargs):
    return na.attention_weights(query.astype(np.float64), key.astype(np.float64), **kwargs, backend="reference")


def of_weights(dtype, case=None):
    """A weight is as exact as the output, except that it is compared with the largest and not a mean of many."""
    return tolerance(dtype, case)[0]


@pytest.mark.parametrize(("case", "dtype"), graded(WITH_KEYS, ["float32"], 2))
def test_case(case, dtype):
    query, key, _ = case.arrays()
    kwargs = case.kwargs()
    got = na.attention_weights(query, key, **kwargs)
    assert got.dtype == query.dtype
    assert_close(got, by_reference(query, key, **kwargs), of_weights("float32", case))


@pytest.mark.parametrize(("case", "dtype"), graded(FEW, ["float64", "float16", "bfloat16"]))
def test_case_in_other_dtypes(case, dtype):
    query, key, _ = case.arrays(dtype)
    kwargs = case.kwargs()
    got = na.attention_weights(query, key, **kwargs)
    assert got.dtype == query.dtype
    assert_close(got, by_reference(query, key, **kwargs), of_weights(dtype, case))


@pytest.mark.parametrize(("case", "backend"), graded(FEW, ["cpu", "reference"]))
def test_attention_over_the_identity(case, backend):
    query, key, _ = case.arrays("float64")
    kwargs = case.kwargs()
    identity = np.broadcast_to(np.eye(case.S), (*key.shape[:-1], case.S))
    out = na.attention(query, key, identity, **kwargs, backend=backend)
    assert_close(na.attention_weights(query, key, **kwargs, backend=backend), out, 1e-13 * case.scores_magnitude)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_sum_to_one(backend):
    query, key, _ = Case(70, 130).arrays()
    weights = na.attention_weights(query, key, is_causal=True, backend=backend)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert not weights[..., ~np.tri(70, 130, dtype=bool)].any()


SELECTIONS = {
    "all": (None, [0, 1, 2, 3]),
    "list": ([2, 0], [2, 0]),
    "one": ([3], [3]),
    "integer": (2, [2]),
    "negative": ([-1, 1, -4], [3, 1, 0]),
    "repeated": ([1, 1, 1, 0], [1, 1, 1, 0]),
    "array": (np.array([3, 1], np.uint8), [3, 1]),
    "tuple": ((0, 2), [0, 2]),
    "range": (range(1, 3), [1, 2]),
    "slice": (slice(1, 3), [1, 2]),
    "stepped slice": (slice(None, None, -2), [3, 1]),
    "empty slice": (slice(2, 2), []),
    "empty list": ([], []),
    "bool": (np.array([True, False, False, True]), [0, 3]),
    "bool list": ([False, True, False, False], [1]),
    "no bool": (np.zeros(4, bool), []),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", [(), VARIED], ids=["plain", "options"])
@pytest.mark.parametrize("heads", SELECTIONS)
def test_selection(heads, options, backend):
    case = Case(4, 70, 8, H=4, Hkv=2, options=options)
    query, key, _ = case.arrays()
    kwargs = case.kwargs()
    full = na.attention_weights(query, key, **kwargs, backend=backend)
    heads, expected_heads = SELECTIONS[heads]
    for rows, expected_rows in SELECTIONS.values():
        got = na.attention_weights(query, key, heads=heads, rows=rows, **kwargs, backend=backend)
        assert_close(got, full[:, np.array(expected_heads, int)][:, :, np.array(expected_rows, int)], 2e-6)


def test_rows_keep_their_position():
    case = Case(130, 200, 8, H=3, Hkv=1)
    query, key, _ = case.arrays("float64")
    kwargs = {"window": (9, 2), "query_offset": [3, 50], "alibi_slopes": [0.1, 0.2, 0.3], "query_lengths": [130, 90]}
    rows = [129, 64, 0, 3, 89, 90]
    full = na.attention_weights(query, key, **kwargs)
    assert_close(na.attention_weights(query, key, rows=rows, **kwargs), full[:, :, rows], 1e-13)
    assert_close(na.attention_weights(query, key, rows=rows, heads=[2], **kwargs), full[:, 2:][:, :, rows], 1e-13)


def test_chosen_maps_cost_no_full_matrix():
    """Rows of a score matrix of 2 ** 40 elements."""
    query = np.broadcast_to(np.float32(0.5), (1, 2**20, 2))
    key = np.broadcast_to(np.float32(0.5), (1, 2**20, 2))
    weights = na.attention_weights(query, key, rows=[5], is_causal=True)
    np.testing.assert_allclose(weights[0, 0, :6], 1 / 6, rtol=1e-6)
    assert not weights[0, 0, 6:].any()


def test_two_dimensions_are_one_head():
    x = np.random.default_rng(0).standard_normal((9, 4))
    np.testing.assert_array_equal(na.attention_weights(x, x), na.attention_weights(x[None], x[None])[0])
    np.testing.assert_array_equal(na.attention_weights(x, x, rows=[3]), na.attention_weights(x, x)[3:4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_hidden_keys_weigh_nothing(dtype, bad):
    query, key, _ = Case(70, 130).arrays(dtype)
    want = na.attention_weights(query, key, key_lengths=100)
    key[..., 100:, :] = bad
    np.testing.assert_array_equal(na.attention_weights(query, key, key_lengths=100), want)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nan_in_a_key(backend):
    query, key, _ = Case(5, 9).arrays()
    key[0, 1, 4] = np.nan
    weights = na.attention_weights(query, key, is_causal=True, backend=backend)
    sees = np.zeros(weights.shape, bool)
    sees[0, 1, 4, :5] = True  # keys that the only row to see key 4 sees
    np.testing.assert_array_equal(np.isnan(weights), sees)


def test_inputs_stay_as_they_are():
    case = Case(70, 130, options=VARIED)
    query, key, _ = case.arrays()
    kwargs = case.kwargs()
    given = [query, key, *(x for x in kwargs.values() if isinstance(x, np.ndarray))]
    before = [x.tobytes() for x in given]
    na.attention_weights(query, key, **kwargs)
    assert [x.tobytes() for x in given] == before
