"""Packed sequences: each as it would be alone, in every option, forward and backward."""

import itertools

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numba_attention as na
from cases import DTYPES

H, HKV, E, EV = 4, 2, 24, 40
LENGTHS = [(7, 9), (0, 5), (70, 33), (3, 0), (1, 600), (40, 40)]


def starts(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def packed(lengths=LENGTHS, dtype="float32", seed=0, sizes=(H, HKV, E, EV)):
    """Query, key, value, grad_out and the offsets."""
    rng = np.random.default_rng(seed)
    of_queries, of_keys = (starts([pair[n] for pair in lengths]) for n in (0, 1))
    heads, kv_heads, features, value_features = sizes

    def normal(*shape):
        return rng.standard_normal(shape).astype(DTYPES[dtype])

    T_q, T_k = int(of_queries[-1]), int(of_keys[-1])
    q, k, v = normal(T_q, heads, features), normal(T_k, kv_heads, features), normal(T_k, kv_heads, value_features)
    return q, k, v, normal(T_q, heads, value_features), of_queries, of_keys


def of_sequence(b, of_queries, of_keys):
    return slice(of_queries[b], of_queries[b + 1]), slice(of_keys[b], of_keys[b + 1])


# Options of all sequences, and of sequence b alone with queries in these rows and keys in these columns.
n, T_Q, T_K = len(LENGTHS), sum(a for a, _ in LENGTHS), sum(b for _, b in LENGTHS)
LONGEST = max(a for a, _ in LENGTHS), max(b for _, b in LENGTHS)
rng = np.random.default_rng(1)
FLAT_MASK, EACH_MASK = rng.random((H, T_Q, T_K)) < 0.6, rng.random((n, 1, *LONGEST)) < 0.6
FLAT_BIAS, EACH_BIAS = rng.standard_normal((T_Q, T_K)), rng.standard_normal((n, H, *LONGEST))
SHARED_BIAS, COLUMN_BIAS = rng.standard_normal((H, *LONGEST)), rng.standard_normal((H, 1, T_K))
SLOPES, SINKS = rng.random((n, H)), rng.standard_normal(H)
QUERY_LENGTHS, KEY_LENGTHS = np.array([7, 0, 50, 2, 1, 39]), np.array([4, 5, 33, 0, 500, 40])


def same(**options):
    return options, lambda b, rows, columns: options


def inside(rows, columns):
    return slice(rows.stop - rows.start), slice(columns.stop - columns.start)


OPTIONS = {
    "plain": same(),
    "causal": same(is_causal=True),
    "bottom-right": same(is_causal="bottom-right"),
    "window": same(window=(5, 2), is_causal="bottom-right"),
    "scale, softcap": same(scale=0.3, softcap=2.0),
    "slopes of heads": same(alibi_slopes=SLOPES[0]),
    "slopes": ({"alibi_slopes": SLOPES}, lambda b, rows, columns: {"alibi_slopes": SLOPES[b]}),
    "sinks": same(sinks=SINKS),
    "offsets": (
        {"query_offset": np.arange(n) - 3, "is_causal": True},
        lambda b, rows, columns: {"query_offset": b - 3, "is_causal": True},
    ),
    "lengths": (
        {"query_lengths": QUERY_LENGTHS, "key_lengths": KEY_LENGTHS, "is_causal": "bottom-right", "sinks": SINKS},
        lambda b, rows, columns: {
            "query_lengths": QUERY_LENGTHS[b],
            "key_lengths": KEY_LENGTHS[b],
            "is_causal": "bottom-right",
            "sinks": SINKS,
        },
    ),
    "mask over tokens": ({"mask": FLAT_MASK}, lambda b, rows, columns: {"mask": FLAT_MASK[:, rows, columns]}),
    "mask of each": (
        {"mask": EACH_MASK},
        lambda b, rows, columns: {"mask": EACH_MASK[b][(slice(None), *inside(rows, columns))]},
    ),
    "bias over tokens": ({"bias": FLAT_BIAS}, lambda b, rows, columns: {"bias": FLAT_BIAS[rows, columns]}),
    "bias of each": (
        {"bias": EACH_BIAS},
        lambda b, rows, columns: {"bias": EACH_BIAS[b][(slice(None), *inside(rows, columns))]},
    ),
    "bias for all": (
        {"bias": SHARED_BIAS},
        lambda b, rows, columns: {"bias": SHARED_BIAS[(slice(None), *inside(rows, columns))]},
    ),
    "bias of columns": ({"bias": COLUMN_BIAS}, lambda b, rows, columns: {"bias": COLUMN_BIAS[:, :, columns]}),
}
BACKENDS = ["cpu", "reference"]


def cast(options, dtype):
    """Biases in the precision of the call."""
    return {k: v.astype(dtype) if k == "bias" else v for k, v in options.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_as_each_alone(option, dtype, backend):
    q, k, v, grad_out, of_queries, of_keys = packed(dtype=dtype)
    together, alone = OPTIONS[option]
    together = cast(together, dtype)
    out, lse = na.attention_varlen(q, k, v, of_queries, of_keys, return_lse=True, backend=backend, **together)
    assert out.shape == (T_Q, H, EV)
    assert lse.shape == (H, T_Q)
    grads = na.attention_varlen_backward(
        grad_out, q, k, v, out, lse, of_queries, of_keys, grad_lse=0.1 * lse_of_finite(lse), backend=backend, **together
    )
    want = [np.zeros_like(x) for x in (q, k, v)]
    want_bias = np.zeros(np.shape(together.get("bias", 0)))
    want_sinks = np.zeros(H)
    for b in range(n):
        rows, columns = of_sequence(b, of_queries, of_keys)
        one = [x.swapaxes(0, 1) for x in (q[rows], k[columns], v[columns])]
        options = cast(alone(b, rows, columns), dtype)
        one_out, one_lse = na.attention(*one, return_lse=True, backend=backend, **options)
        # A sequence has the same bits alone and in a batch.
        np.testing.assert_array_equal(out[rows].swapaxes(0, 1), one_out)
        np.testing.assert_array_equal(lse[:, rows], one_lse)
        own = na.attention_backward(
            np.ascontiguousarray(grad_out[rows].swapaxes(0, 1)), *one, one_out, one_lse,
            grad_lse=0.1 * lse_of_finite(one_lse), backend=backend, **options,
        )  # fmt: skip
        want[0][rows] = own.query.swapaxes(0, 1)
        want[1][columns], want[2][columns] = own.key.swapaxes(0, 1), own.value.swapaxes(0, 1)
        if own.bias is not None:
            add_bias(want_bias, own.bias, option, b, rows, columns)
        if own.sinks is not None:
            want_sinks += own.sinks
    for got, expected in zip(grads[:3], want, strict=True):
        if "bias" in option:  # how the query tiles of heads that share a bias are grouped may differ
            np.testing.assert_allclose(got, expected, atol=2e-5 if dtype == "float32" else 1e-12)
        else:
            np.testing.assert_array_equal(got, expected)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 1e-10, "atol": 1e-10}
    if "bias" in together:
        assert grads.bias.dtype == together["bias"].dtype
        np.testing.assert_allclose(grads.bias, want_bias, **tolerance)
    if "sinks" in together:
        np.testing.assert_allclose(grads.sinks, want_sinks, **tolerance)


def lse_of_finite(lse):
    return np.where(np.isfinite(lse), lse, 0).astype(lse.dtype)


def add_bias(total, own, option, b, rows, columns):
    if option == "bias over tokens":
        total[rows, columns] += own
    elif option == "bias of columns":
        total[:, :, columns] += own
    else:
        where = (slice(None), *inside(rows, columns))
        (total[b] if option == "bias of each" else total)[where] += own


def oracle(q, k, v, of_queries, of_keys, **options):
    """Every sequence in float64, from the textbook."""
    out = np.zeros((*q.shape[:2], v.shape[2]))
    for b in range(len(of_queries) - 1):
        rows, columns = of_sequence(b, of_queries, of_keys)
        one = [x.astype(np.float64).swapaxes(0, 1) for x in (q[rows], k[columns], v[columns])]
        out[rows] = na.attention(*one, backend="reference", **options).swapaxes(0, 1)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, backend):
    q, k, v, _, of_queries, of_keys = packed(dtype=dtype)
    out = na.attention_varlen(q, k, v, of_queries, of_keys, is_causal="bottom-right", backend=backend)
    assert out.dtype == q.dtype
    want = oracle(q, k, v, of_queries, of_keys, is_causal="bottom-right")
    atol = {"float32": 2e-6, "float64": 1e-14, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(out.astype(np.float64), want, atol=atol)


lengths = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 90)), min_size=0, max_size=7)


@given(lengths, st.sampled_from([(2, 2, 8, 8), (4, 1, 16, 33), (3, 3, 64, 16)]), st.integers(0, 10))
def test_any_lengths(lengths, sizes, seed):
    q, k, v, _, of_queries, of_keys = packed(lengths, seed=seed, sizes=sizes)
    out = na.attention_varlen(q, k, v, of_queries, of_keys, is_causal="bottom-right", window=(30, None))
    want = oracle(q, k, v, of_queries, of_keys, is_causal="bottom-right", window=(30, None))
    np.testing.assert_allclose(out, want, atol=2e-6)


def test_threads():
    q, k, v, grad_out, *offsets = packed()
    before = numba.get_num_threads()
    found = []
    for threads in (1, numba.config.NUMBA_NUM_THREADS):
        numba.set_num_threads(threads)
        out, lse = na.attention_varlen(q, k, v, *offsets, return_lse=True)
        found.append([out, lse, *na.attention_varlen_backward(grad_out, q, k, v, out, lse, *offsets)[:3]])
    numba.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nan_stays_in_its_sequence():
    q, k, v, _, of_queries, of_keys = packed()
    want = na.attention_varlen(q, k, v, of_queries, of_keys)
    rows, columns = of_sequence(2, of_queries, of_keys)
    k[columns], v[columns] = np.nan, np.nan
    out = na.attention_varlen(q, k, v, of_queries, of_keys)
    assert np.isnan(out[rows]).all()
    out[rows] = want[rows]
    np.testing.assert_array_equal(out, want)


def test_strides_and_out():
    q, k, v, _, *offsets = packed()
    want = na.attention_varlen(q, k, v, *offsets)
    strided = [np.ascontiguousarray(x.transpose(2, 1, 0)).transpose(2, 1, 0) for x in (q, k, v)]
    np.testing.assert_array_equal(na.attention_varlen(*strided, *offsets), want)
    out = np.empty_like(want)
    assert na.attention_varlen(q, k, v, *offsets, out=out) is out
    np.testing.assert_array_equal(out, want)


def test_no_sequences():
    q, k, v, grad_out, *offsets = packed([])
    out, lse = na.attention_varlen(q, k, v, *offsets, return_lse=True)
    assert out.shape == (0, H, EV)
    grads = na.attention_varlen_backward(grad_out, q, k, v, out, lse, *offsets)
    assert grads.key.shape == (0, HKV, E)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens_q": [0, 3, 9]}, ValueError, "cu_seqlens_q must go from 0 to 10"),
        ({"cu_seqlens_k": [1, 12]}, ValueError, "cu_seqlens_k must go from 0 to 12"),
        ({"cu_seqlens_q": [0, 8, 4, 10]}, ValueError, "cu_seqlens_q must not decrease"),
        ({"cu_seqlens_q": [0, 10]}, ValueError, "same sequences, got 1 and 2"),
        ({"cu_seqlens_q": [[0, 10]]}, ValueError, r"cu_seqlens_q must have shape \(sequences \+ 1,\)"),
        ({"cu_seqlens_q": []}, (TypeError, ValueError), "cu_seqlens_q must"),
        ({"cu_seqlens_k": [0.0, 5.0, 12.0]}, TypeError, "cu_seqlens_k must be integer"),
        ({"query": np.zeros((1, 10, 4, 8), np.float32)}, ValueError, r"query must have shape \(tokens, heads, feat"),
        ({"key": [1.0]}, TypeError, "key must be a numpy.ndarray"),
        ({"value": np.zeros((12, 2, 8))}, TypeError, "share one dtype"),
        ({"query_lengths": [4, 7]}, ValueError, "query_lengths must lie between 0 and the length of each sequence"),
        ({"mask": np.ones((4, 10, 11), bool)}, ValueError, "mask of shape"),
        ({"mask": np.ones((10, 12))}, TypeError, "mask must be boolean"),
        ({"bias": np.zeros((3, 4, 10, 12), np.float32)}, ValueError, "bias of shape"),
        ({"out": np.zeros((4, 10, 8), np.float32)}, ValueError, "out must have shape"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {
        "query": np.zeros((10, 4, 8), np.float32), "key": np.zeros((12, 2, 8), np.float32),
        "value": np.zeros((12, 2, 8), np.float32), "cu_seqlens_q": [0, 4, 10], "cu_seqlens_k": [0, 5, 12],
    }  # fmt: skip
    na.attention_varlen(**arguments)
    with pytest.raises(error, match=message):
        na.attention_varlen(**arguments | change)


@pytest.mark.parametrize("rotary", [None, True])
def test_layer(rotary):
    layer = na.MultiHeadAttention(48, 4, num_kv_heads=2, rotary=rotary, rng=0)
    x, cu_seqlens = np.random.default_rng(1).standard_normal((40, 48), dtype=np.float32), [0, 7, 7, 30, 40]
    out = layer(x, cu_seqlens=cu_seqlens, is_causal=True, window=(9, None))
    for start, stop in itertools.pairwise(cu_seqlens):
        if start < stop:
            want = layer(x[start:stop], is_causal=True, window=(9, None))
            np.testing.assert_allclose(out[start:stop], want, atol=2e-6)


def test_layer_refuses():
    layer, x = na.MultiHeadAttention(8, 2, rng=0), np.zeros((6, 8), np.float32)
    with pytest.raises(ValueError, match="cu_seqlens is for self-attention"):
        layer(x, x, cu_seqlens=[0, 6])
    with pytest.raises(ValueError, match="query must have shape"):
        layer(x[None], cu_seqlens=[0, 6])
    with pytest.raises(ValueError, match="cu_seqlens_q must go from 0 to 6"):
        layer(x, cu_seqlens=[0, 5])
    with pytest.raises(ValueError, match="key_padding_mask must be None"):
        layer(x, cu_seqlens=[0, 6], key_padding_mask=np.zeros(6, bool))
    with pytest.raises(ValueError, match="cu_seqlens must be None with a cache"):
        layer(x, cu_seqlens=[0, 6], cache=na.KVCache(1, 2, 8, 4))
