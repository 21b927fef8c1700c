"""The rules of intervals against a definition of each pair; `prefix_lengths` against a textbook at each entry point."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numba_attention as na
from numba_attention.intervals import FAR, keys_of_row, keys_of_rows, rows_of_key, rows_of_keys


@st.composite
def spans(draw):
    left, right = (draw(st.one_of(st.just(FAR), st.integers(0, 9))) for _ in range(2))
    offset, queries, keys = draw(st.integers(-12, 12)), draw(st.integers(0, 9)), draw(st.integers(0, 9))
    return offset - left, offset + right, queries, keys, draw(st.integers(0, 12)) if left == FAR else 0


@given(spans())
def test_both_rules_say_what_the_definition_says(span):
    low, high, queries, keys, prefix = span
    i, j = np.arange(12)[:, None], np.arange(12)
    seen = (i + low <= j) & ((j <= i + high) | (j < prefix)) & (i < queries) & (j < keys)
    for n in range(12):
        start, stop = keys_of_row(n, *span)
        assert 0 <= start <= stop <= keys
        np.testing.assert_array_equal(seen[n], (j >= start) & (j < stop))
        start, stop = rows_of_key(n, *span)
        assert 0 <= start <= stop <= queries
        np.testing.assert_array_equal(seen[:, n], (i[:, 0] >= start) & (i[:, 0] < stop))
    for one, many in ((keys_of_row, keys_of_rows), (rows_of_key, rows_of_keys)):
        np.testing.assert_array_equal(np.transpose([one(n, *span) for n in range(12)]), many(np.arange(12), *span))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("wide", [2**41, 2**63 - 1, 2**70])
def test_windows_wider_than_any_position_are_unbounded(wide, backend):
    """Also from the furthest positions that an offset may name, where a reach of 2**40 ends inside of the keys."""
    query, key, value = np.random.default_rng(0).standard_normal((3, 1, 9, 4))
    far = {"query_offset": 2**40, "is_causal": True, "backend": backend}
    out = na.attention(query, key, value, window=(wide, 0), **far)
    # With AVX2 a window has another kernel here, which sums in another order.
    np.testing.assert_allclose(out, na.attention(query, key, value, **far), rtol=1e-12)
    np.testing.assert_allclose(out, na.attention(query, key, value), rtol=1e-12)
    before = {"query_offset": -(2**40), "backend": backend}
    out = na.attention(query, key, value, window=(0, wide), **before)
    np.testing.assert_allclose(out, na.attention(query, key, value), rtol=1e-12)
    out = na.attention(query, key, value, window=(0, 2**40), **before)  # row i sees the keys to key i
    np.testing.assert_allclose(out, na.attention(query, key, value, is_causal=True), rtol=1e-12)


@given(spans())
def test_ends_grow_with_the_row(span):
    """So that tiles see the interval from the start of their first row to the stop of their last."""
    _, _, queries, keys, _ = span
    for rule, n in ((keys_of_rows, queries), (rows_of_keys, keys)):
        ends = np.array(rule(np.arange(n), *span))
        assert (np.diff(ends) >= 0).all()


L, PREFIX = 70, np.array([0, 9, 70])


def textbook(query, key, value, prefix):
    """A prefix language model of one sequence, in float64: (H, L, E)."""
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    i, j = np.arange(query.shape[-2])[:, None], np.arange(key.shape[-2])
    scores = np.where((j <= i + key.shape[-2] - query.shape[-2]) | (j < prefix), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights @ value, weights


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((3, 2, L, 16), dtype=np.float32) for _ in range(3)]


def test_prefix_dense_and_weights(arrays):
    q, k, v = arrays
    want = [textbook(*(x[b] for x in arrays), PREFIX[b]) for b in range(3)]
    options = {"is_causal": True, "prefix_lengths": PREFIX}
    np.testing.assert_allclose(na.attention(q, k, v, **options), [x for x, _ in want], atol=1e-6)
    np.testing.assert_allclose(na.attention_weights(q, k, **options), [x for _, x in want], atol=1e-6)


def test_prefix_gradient(arrays):
    """The derivative in one direction, by central differences of the textbook."""
    options = {"is_causal": True, "prefix_lengths": PREFIX}
    rng = np.random.default_rng(1)
    out, lse = na.attention(*arrays, **options, return_lse=True)
    grad_out = rng.standard_normal(out.shape, dtype=np.float32)
    grads = na.attention_backward(grad_out, *arrays, out, lse, **options)
    for n in range(3):
        step = rng.standard_normal(arrays[n].shape)
        ends = []
        for h in (1e-4, -1e-4):
            moved = [x + h * step if m == n else x for m, x in enumerate(arrays)]
            ends.append(sum((textbook(*(x[b] for x in moved), PREFIX[b])[0] * grad_out[b]).sum() for b in range(3)))
        np.testing.assert_allclose((grads[n] * step).sum(), (ends[0] - ends[1]) / 2e-4, rtol=1e-4)


def test_prefix_packed(arrays):
    lengths = [70, 20, 33]
    starts = np.cumsum([0, *lengths])
    packed = [np.concatenate([x[b, :, :n].swapaxes(0, 1) for b, n in enumerate(lengths)]) for x in arrays]
    prefix = [5, 20, 12]
    out, lse = na.attention_varlen(*packed, starts, starts, is_causal=True, prefix_lengths=prefix, return_lse=True)
    for b, n in enumerate(lengths):
        want, _ = textbook(*(x[b, :, :n] for x in arrays), prefix[b])
        np.testing.assert_allclose(out[starts[b] : starts[b + 1]].swapaxes(0, 1), want, atol=1e-6)
    options = {"is_causal": True, "prefix_lengths": prefix}
    grads = na.attention_varlen_backward(np.ones_like(out), *packed, out, lse, starts, starts, **options)
    alone = [x[0, :, :70] for x in arrays]
    own, own_lse = na.attention(*alone, is_causal=True, prefix_lengths=5, return_lse=True)
    want = na.attention_backward(np.ones_like(own), *alone, own, own_lse, is_causal=True, prefix_lengths=5)
    np.testing.assert_array_equal(grads.key[:70].swapaxes(0, 1), want.key)


@pytest.mark.parametrize("rows", [1, 40])
def test_prefix_of_a_cache(arrays, rows):
    q, k, v = arrays
    cache = na.KVCache(3, 2, 80, 16)
    cache.append(k, v)
    out = na.attention_decode(q[:, :, -rows:], cache, prefix_lengths=PREFIX)
    for b in range(3):
        want, _ = textbook(q[b, :, -rows:], k[b], v[b], PREFIX[b])
        np.testing.assert_allclose(out[b], want, atol=1e-6)


def test_prefix_of_the_layer(arrays):
    x = arrays[0][:, 0]
    layer = na.MultiHeadAttention(16, 2, rng=0)
    whole = layer(x, is_causal=True, prefix_lengths=PREFIX)
    q, k, v = (
        (x @ layer.parameters()[f"{name}_proj.weight"].T + layer.parameters()[f"{name}_proj.bias"])
        .reshape(3, L, 2, 8)
        .swapaxes(1, 2)
        for name in "qkv"
    )
    heads = np.array([textbook(q[b], k[b], v[b], PREFIX[b])[0] for b in range(3)]).swapaxes(1, 2).reshape(3, L, 16)
    want = heads @ layer.parameters()["out_proj.weight"].T + layer.parameters()["out_proj.bias"]
    np.testing.assert_allclose(whole, want, atol=1e-5)


@pytest.mark.parametrize("rim", ["torch", "jax"])
def test_prefix_of_the_bridges(arrays, rim):
    library = pytest.importorskip(rim)
    attention = pytest.importorskip(f"numba_attention.{rim}").attention
    convert = library.from_numpy if rim == "torch" else library.numpy.asarray
    got = np.asarray(attention(*map(convert, arrays), is_causal=True, prefix_lengths=PREFIX))
    np.testing.assert_array_equal(got, na.attention(*arrays, is_causal=True, prefix_lengths=PREFIX))


def test_prefix_beside_a_window_with_a_left_end(arrays):
    with pytest.raises(ValueError, match=r"prefix_lengths must be None beside a window that is bounded on the left, 5"):
        na.attention(*arrays, window=(5, 0), prefix_lengths=3)
    with pytest.raises(ValueError, match=r"prefix_lengths must lie between 0 and 70, got 71"):
        na.attention(*arrays, prefix_lengths=71)
