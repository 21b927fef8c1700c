"""What must hold for any input: laws of the softmax, the hidden stays hidden, the same bits whatever is beside."""

import itertools

import hypothesis.strategies as st
import numba
import numpy as np
import pytest
from hypothesis import given

import numba_attention as na
from cases import DTYPES, Case, assert_close, oracle, tolerance
from strategies import cases, dtypes, seeds

BAD = [np.nan, np.inf, -np.inf]


def same(got, want):
    """Bit for bit, NaN where there is NaN."""
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)


def close(got, want, dtype, case):
    of_out, of_lse = tolerance(dtype, case)
    assert_close(got[0], want[0], 2 * of_out)
    assert_close(got[1], want[1], 2 * of_lse, offset=1)


def attend(*arrays, **kwargs):
    return na.attention(*arrays, **kwargs, return_lse=True)


# Laws of the softmax.


@given(cases(), dtypes, seeds)
def test_order_of_keys(case, dtype, seed):
    query, key, value = case.arrays(dtype)
    rng = np.random.default_rng(seed)
    bias, mask = rng.standard_normal((case.L, case.S)), rng.random(case.S) < 0.8
    order = rng.permutation(case.S)
    got = attend(query, key[..., order, :], value[..., order, :], bias=bias[:, order], mask=mask[order])
    close(got, attend(query, key, value, bias=bias, mask=mask), dtype, case)


@given(cases(), dtypes, seeds, st.booleans())
def test_keys_in_parts(case, dtype, seed, causal):
    query, key, value = case.arrays(dtype)
    rng = np.random.default_rng(seed)
    cuts = [0, *sorted(rng.integers(0, case.S + 1, 2)), case.S]
    parts = [
        attend(query, key[..., a:b, :], value[..., a:b, :], is_causal=causal, query_offset=-int(a))
        for a, b in itertools.pairwise(cuts)
    ]
    close(na.merge_attention(*zip(*parts, strict=True)), attend(query, key, value, is_causal=causal), dtype, case)


@given(cases(), dtypes, seeds, st.booleans())
def test_rows_apart(case, dtype, seed, causal):
    query, key, value = case.arrays(dtype)
    cut = int(np.random.default_rng(seed).integers(0, case.L + 1))
    out, lse = attend(query, key, value, is_causal=causal)
    close(
        attend(query[..., cut:, :], key, value, is_causal=causal, query_offset=cut),
        (out[..., cut:, :], lse[..., cut:]),
        dtype,
        case,
    )


@given(cases(), dtypes, st.floats(-20, 20))
def test_constant_added_to_scores(case, dtype, constant):
    query, key, value = case.arrays(dtype)
    out, lse = attend(query, key, value)
    shifted, shifted_lse = attend(query, key, value, bias=constant)
    close((shifted, shifted_lse), (out, lse + constant), dtype, Case(magnitude=3))


@given(cases(), dtypes)
def test_a_mask_says_what_an_interval_says(case, dtype):
    query, key, value = case.arrays(dtype)
    i, j = np.arange(case.L)[:, None] + 3, np.arange(case.S)
    by_interval = attend(query, key, value, window=(9, 2), query_offset=3)
    inside = (i - 9 <= j) & (j <= i + 2)
    close(attend(query, key, value, mask=inside), by_interval, dtype, case)
    close(attend(query, key, value, bias=np.where(inside, 0, -np.inf)), by_interval, dtype, case)
    same(attend(query, key, value, is_causal=True), attend(query, key, value, window=(None, 0)))


@given(cases(), dtypes)
def test_groups_are_repeated_keys(case, dtype):
    query, key, value = case.arrays(dtype)
    group = case.H // case.Hkv
    repeated = attend(query, np.repeat(key, group, axis=-3), np.repeat(value, group, axis=-3))
    close(attend(query, key, value), repeated, dtype, case)


@given(cases(), dtypes, st.integers(-5, 5))
def test_scale_belongs_to_query_or_scores(case, dtype, exponent):
    query, key, value = case.arrays(dtype)
    factor = query.dtype.type(2.0**exponent)
    close(
        attend(query * factor, key, value, scale=0.25 / float(factor)),
        attend(query, key, value, scale=0.25),
        dtype,
        case,
    )


@given(cases(), dtypes, seeds, st.booleans())
def test_output_lies_between_the_values(case, dtype, seed, causal):
    query, key, value = case.arrays(dtype)
    mask = np.random.default_rng(seed).random((case.L, case.S)) < 0.7
    sees = mask & np.tri(case.L, case.S, dtype=bool) if causal else mask
    out = na.attention(query, key, value, mask=mask, is_causal=causal).astype(np.float64)
    value = np.repeat(value.astype(np.float64), case.H // case.Hkv, axis=-3)[..., None, :, :]
    lowest = np.where(sees[..., None], value, np.inf).min(-2)
    highest = np.where(sees[..., None], value, -np.inf).max(-2)
    slack = tolerance(dtype, case)[0] * np.abs(value).max()
    some = sees.any(-1)
    assert np.all(out[..., some, :] >= lowest[..., some, :] - slack)
    assert np.all(out[..., some, :] <= highest[..., some, :] + slack)
    assert not out[..., ~some, :].any()


# What is hidden may hold anything.


def _hidden_by(how, case, rng):
    """Keyword arguments that hide some keys from every row, and which."""
    S, L = case.S, case.L
    hidden = rng.random(S) < 0.4
    if how == "mask":
        return {"mask": ~hidden}, hidden
    if how == "full mask":
        return {"mask": np.broadcast_to(~hidden, case.scores_shape).copy()}, hidden
    if how == "bias":
        return {"bias": np.where(hidden, -np.inf, rng.standard_normal((L, S))).astype(np.float32)}, hidden
    edge = int(rng.integers(0, S + 1))
    if how == "lengths":
        return {"key_lengths": edge}, np.arange(S) >= edge
    if how == "causal":
        return {"is_causal": True, "query_offset": edge - L}, np.arange(S) >= edge
    return {"window": (2, 1), "query_offset": edge}, (np.arange(S) < edge - 2) | (np.arange(S) > edge + L)


WAYS = ["mask", "full mask", "bias", "lengths", "causal", "window"]


@pytest.mark.parametrize("how", WAYS)
@given(cases(), dtypes, seeds, st.sampled_from(BAD), st.sampled_from(BAD))
def test_hidden_keys_and_values_may_be_anything(how, case, dtype, seed, in_key, in_value):
    rng = np.random.default_rng(seed)
    query, key, value = case.arrays(dtype)
    kwargs, hidden = _hidden_by(how, case, rng)
    want = attend(query, key, value, **kwargs)
    key[..., hidden, :] = in_key
    value[..., hidden, :] = in_value
    same(attend(query, key, value, **kwargs), want)


@pytest.mark.parametrize("how", ["mask", "full mask", "lengths", "causal", "window"])
@given(cases(), dtypes, seeds, st.sampled_from(BAD))
def test_hidden_bias_may_be_anything(how, case, dtype, seed, bad):
    rng = np.random.default_rng(seed)
    query, key, value = case.arrays(dtype)
    kwargs, hidden = _hidden_by(how, case, rng)
    bias = rng.standard_normal((case.L, case.S)).astype(np.float32)
    want = attend(query, key, value, bias=bias, **kwargs)
    bias[:, hidden] = bad
    same(attend(query, key, value, bias=bias, **kwargs), want)


@given(cases(), dtypes, seeds)
def test_hidden_row_by_row(case, dtype, seed):
    """NaN that one row must not see while its neighbours in the same tile do."""
    rng = np.random.default_rng(seed)
    query, key, value = case.arrays(dtype)
    bad = rng.random(case.S) < 0.3
    mask = rng.random((case.L, case.S)) < 0.7
    clean = rng.random(case.L) < 0.5
    mask[np.ix_(clean, bad)] = False
    want = attend(query, key, value, mask=mask)
    key[..., bad, :] = np.nan
    value[..., bad, :] = np.nan
    out, lse = attend(query, key, value, mask=mask)
    hit = (mask & bad).any(-1)
    assert np.isnan(out[..., hit, :].astype(np.float64)).all()
    assert np.isnan(lse[..., hit]).all()
    same((out[..., ~hit, :], lse[..., ~hit]), (want[0][..., ~hit, :], want[1][..., ~hit]))


@given(cases([()]), dtypes, seeds, st.sampled_from(BAD), st.sampled_from(["query", "key", "value", "bias"]))
def test_bad_numbers_reach_the_rows_that_see_them(case, dtype, seed, bad, where):
    """The same rows as in the oracle, and no other row notices."""
    rng = np.random.default_rng(seed)
    query, key, value = case.arrays(dtype)
    bias = np.zeros((case.L, case.S), np.float32)
    kwargs = {"is_causal": True, "query_offset": int(rng.integers(-3, case.S + 1)), "bias": bias}
    want = attend(query, key, value, **kwargs)
    i, j, h = (int(rng.integers(n)) for n in (case.L, case.S, case.Hkv))
    sees = np.arange(case.L) + kwargs["query_offset"] >= j
    heads = np.arange(case.H) // (case.H // case.Hkv) == h
    touched = heads[:, None] & sees
    if where == "query":
        head = int(rng.integers(case.H))
        query[head, i, rng.integers(case.E)] = bad
        touched = np.zeros((case.H, case.L), bool)
        touched[head, i] = True
    elif where == "key":
        key[h, j, rng.integers(case.E)] = bad
    elif where == "value":
        value[h, j, rng.integers(case.Ev)] = bad
    else:
        bias[i, j] = bad
        touched = np.broadcast_to(np.arange(case.L) == i, (case.H, case.L))
    out, lse = attend(query, key, value, **kwargs)
    same((out[~touched], lse[~touched]), (want[0][~touched], want[1][~touched]))
    expected, expected_lse = oracle(query, key, value, **kwargs)
    of_out, of_lse = tolerance(dtype, case)
    # Beside a mask or bias the CPU takes a row whose every score is -inf as hidden.
    odd = (expected_lse == -np.inf) & np.isnan(expected).all(-1)
    np.testing.assert_array_equal(np.isfinite(out[~odd].astype(np.float64)), np.isfinite(expected[~odd]))
    if np.isnan(bad):
        assert_close(out, expected, of_out)
        assert_close(lse, expected_lse, of_lse, offset=1)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_score_is_minus_infinity(backend):
    """Infinite numbers in what a row attends to are not the same as attending to nothing."""
    query, key, value = np.full((1, 3, 1), np.inf), -np.ones((1, 5, 1)), np.ones((1, 5, 1))
    assert np.isnan(na.attention(query, key, value, backend=backend)).all()


# The same bits, whatever is beside.


@given(cases([(3,)]), dtypes, st.sampled_from([(), ("causal",), ("window", "softcap", "alibi", "sinks")]))
def test_alone_and_in_a_batch(case, dtype, options):
    case = Case(case.L, case.S, case.E, case.Ev, case.H, case.Hkv, (3,), layout=case.layout, options=options)
    query, key, value = case.arrays(dtype)
    kwargs = case.kwargs()
    out, lse = attend(query, key, value, **kwargs)
    for b in range(3):
        same(attend(query[b], key[b], value[b], **kwargs), (out[b], lse[b]))
        copies = (np.ascontiguousarray(x[b : b + 1]) for x in (query, key, value))
        same(attend(*copies, **kwargs), (out[b : b + 1], lse[b : b + 1]))


@given(cases([(3,)]), dtypes, seeds, st.sampled_from([False, True, "bottom-right"]))
def test_lengths_and_slices(case, dtype, seed, causal):
    rng = np.random.default_rng(seed)
    query, key, value = case.arrays(dtype)
    rows, keys = rng.integers(0, case.L + 1, 3), rng.integers(0, case.S + 1, 3)
    out, lse = attend(query, key, value, query_lengths=rows, key_lengths=keys, is_causal=causal)
    for b in range(3):
        alone = attend(query[b, :, : rows[b]], key[b, :, : keys[b]], value[b, :, : keys[b]], is_causal=causal)
        same(alone, (out[b, :, : rows[b]], lse[b, :, : rows[b]]))
        assert not out[b, :, rows[b] :].any()
        assert np.all(lse[b, :, rows[b] :] == -np.inf)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [(), ("causal", "key lengths", "query lengths", "bias that hides", "mask", "sinks")], ids=str
)
def test_threads(dtype, options):
    case = Case(150, 200, 64, 64, H=6, Hkv=2, options=options)
    arrays, kwargs = case.arrays(dtype), case.kwargs()
    before = numba.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            if threads <= numba.config.NUMBA_NUM_THREADS:
                numba.set_num_threads(threads)
                results += [(*attend(*arrays, **kwargs), na.attention_weights(*arrays[:2], **kwargs)) for _ in range(3)]
    finally:
        numba.set_num_threads(before)
    for result in results:
        same(result, results[0])


@given(cases(), dtypes)
def test_again(case, dtype):
    arrays = case.arrays(dtype)
    same(attend(*arrays), attend(*arrays))


@given(cases(), dtypes)
def test_where_the_arrays_lie(case, dtype):
    query, key, value = case.arrays(dtype)
    want = attend(query, key, value)
    same(attend(*(np.ascontiguousarray(x) for x in (query, key, value))), want)
    same(attend(*(np.asfortranarray(x) for x in (query, key, value))), want)
