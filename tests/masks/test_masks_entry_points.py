"""`mask=BlockMask` in every entry point, against a textbook over the same mask as an array of bool."""

import re

import ml_dtypes
import numpy as np
import pytest

import numba_attention as na
from numba_attention import BlockMask

DTYPES = {"float32": 2e-5, "float64": 1e-11, "float16": 4e-3, "bfloat16": 4e-2}
BACKENDS = ("cpu", "reference")
SIZES = [  # B, H, Hkv, L, S: with and without groups, of more than a tile and of less, by the kernel for few queries
    (2, 4, 2, 200, 300),
    (1, 6, 2, 130, 70),
    (2, 3, 3, 65, 129),
    (1, 8, 1, 7, 500),
    (2, 4, 4, 3, 1200),
    (3, 5, 5, 1, 64),
]


def masks(rng, B, H, L, S):
    blocks = np.repeat(np.repeat(rng.random((1, H, L // 64 + 1, S // 64 + 1)) < 0.4, 64, -1), 64, -2)[..., :L, :S]
    noise = rng.random((B, 1, L, S)) < 0.02
    noise[:, :, ::3] = False
    return {
        "each": rng.random((B, H, L, S)) < 0.3,
        "blocks": blocks,
        "causal": np.tri(L, S, S - L, dtype=bool),
        "few, and rows of nothing": noise,
        "nothing": np.zeros((L, S), bool),
        "everything": np.ones((L, S), bool),
    }


KINDS = list(masks(np.random.default_rng(0), 1, 1, 1, 1))


def arrays(rng, sizes, dtype, E=16, Ev=19):
    B, H, Hkv, L, S = sizes
    kind = np.dtype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)
    shapes = (B, H, L, E), (B, Hkv, S, E), (B, Hkv, S, Ev), (B, H, L, Ev)
    return [rng.standard_normal(shape).astype(kind) for shape in shapes]


def textbook(query, key, value, mask, sinks=None, bias=0.0):
    """Output, lse and weights in float64; 0 and -inf where a row sees nothing."""
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    key, value = (np.repeat(x, query.shape[1] // x.shape[1], axis=1) for x in (key, value))
    scores = np.where(mask, query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1]) + bias, -np.inf)
    terms = [scores] if sinks is None else [scores, np.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))]
    scores = np.concatenate(terms, axis=-1)
    highest = np.maximum(scores.max(-1, keepdims=True), -1e300)
    weights = np.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (highest + np.log(total))[..., 0]
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)[..., : key.shape[-2]]
    return weights @ value, np.where(total[..., 0] > 0, lse, -np.inf), weights


def textbook_gradients(query, key, value, mask, grad):
    """Of query, key and value, in float64."""
    out, _, p = textbook(query, key, value, mask)
    query, key, value, grad = (x.astype(np.float64) for x in (query, key, value, grad))
    G = query.shape[1] // key.shape[1]
    wide_key, wide_value = (np.repeat(x, G, axis=1) for x in (key, value))
    ds = p * (grad @ wide_value.swapaxes(-1, -2) - (grad * out).sum(-1, keepdims=True)) / np.sqrt(query.shape[-1])
    dk, dv = ds.swapaxes(-1, -2) @ query, p.swapaxes(-1, -2) @ grad
    dk, dv = (x.reshape(x.shape[0], key.shape[1], G, *x.shape[2:]).sum(2) for x in (dk, dv))
    return ds @ wide_key, dk, dv


def close(x, y, tolerance):
    np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=tolerance, atol=tolerance)


def grid():
    """Every kind in float32, and one kind of each size in the other dtypes; the rest is slow."""
    for n, sizes in enumerate(SIZES):
        for m, kind in enumerate(KINDS):
            yield "float32", sizes, kind, "cpu"
            yield "float32", sizes, kind, "reference"
            for dtype in list(DTYPES)[1:]:
                yield pytest.param(dtype, sizes, kind, "cpu", marks=() if m == n else pytest.mark.slow)


@pytest.mark.parametrize(("dtype", "sizes", "kind", "backend"), list(grid()))
def test_forward_backward_and_weights(dtype, sizes, kind, backend):
    rng = np.random.default_rng(1)
    B, H, _, L, S = sizes
    array, tolerance = masks(rng, B, H, L, S)[kind], DTYPES[dtype]
    query, key, value, grad = arrays(rng, sizes, dtype)
    options = {"mask": BlockMask.from_array(array), "backend": backend}
    out, lse, weights = textbook(query, key, value, array)
    mine, my_lse = na.attention(query, key, value, return_lse=True, **options)
    close(mine, out, tolerance)
    close(my_lse, lse, tolerance)
    close(na.attention_weights(query, key, **options), weights, tolerance)
    rows, heads = np.random.default_rng(0).permutation(L)[: L // 2 + 1], [H - 1, 0]
    some = na.attention_weights(query, key, heads=heads, rows=rows, **options)
    close(some, weights[:, heads][:, :, rows], tolerance)
    grads = na.attention_backward(grad, query, key, value, mine, my_lse, **options)
    for x, y in zip(grads, textbook_gradients(query, key, value, array, grad), strict=False):
        close(x, y, 8 * tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_with_every_other_option(sizes, backend):
    """Against the same call with the same mask as an array."""
    rng = np.random.default_rng(2)
    B, H, _, L, S = sizes
    array = rng.random((B, H, L, S)) < 0.3
    array[..., S // 2 : S // 2 + 70] = False
    query, key, value, grad = arrays(rng, sizes, "float32")
    lengths = {"key_lengths": rng.integers(0, S + 1, B), "query_lengths": rng.integers(0, L + 1, B)}
    bias = rng.standard_normal((H, L, S)).astype(np.float32)
    for options in (
        {"is_causal": "bottom-right", "sinks": np.ones(H)},
        {"window": (40, 30), "softcap": 3.0, "query_offset": 17},
        {"alibi_slopes": np.full(H, 0.1), "bias": bias, "scale": 0.5},
        {"is_causal": True, "prefix_lengths": 5, "query_offset": 20},
        lengths,
    ):
        both = []
        for mask in (array, BlockMask.from_array(array)):
            result = na.attention(query, key, value, mask=mask, return_lse=True, backend=backend, **options)
            grads = na.attention_backward(grad, query, key, value, *result, mask=mask, backend=backend, **options)
            both.append((*result, *grads, na.attention_weights(query, key, mask=mask, backend=backend, **options)))
        for x, y in zip(*both, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                close(y, x, 2e-4)


def test_rows_that_see_nothing():
    """0 and -inf, with a sink 0 and the sink; their gradients are 0."""
    query, key, value, grad = arrays(np.random.default_rng(0), (1, 2, 1, 100, 200), "float32")
    array = np.random.default_rng(0).random((100, 200)) < 0.5
    array[40:90] = False
    for sinks in (None, np.array([0.5, -3.0])):
        options = {"mask": BlockMask.from_array(array), "sinks": sinks}
        out, lse = na.attention(query, key, value, return_lse=True, **options)
        np.testing.assert_array_equal(out[:, :, 40:90], 0)
        expected = np.full(2, -np.inf) if sinks is None else sinks
        np.testing.assert_allclose(lse[0, :, 40:90], np.broadcast_to(expected[:, None], (2, 50)))
        grads = na.attention_backward(grad, query, key, value, out, lse, **options)
        np.testing.assert_array_equal(grads.query[:, :, 40:90], 0)
        assert all(np.isfinite(x).all() for x in grads if x is not None)


@pytest.mark.parametrize("array", [np.zeros((70, 130), bool), np.tri(70, 130, 60, dtype=bool)])
def test_hidden_nan_reaches_nothing(array):
    query, key, value, grad = arrays(np.random.default_rng(0), (1, 2, 2, 70, 130), "float32")
    hidden = ~array.any(axis=0)
    key[:, :, hidden], value[:, :, hidden] = np.nan, np.inf
    if array.any():
        value[0, 0, 100, 3] = np.nan
    out, lse = na.attention(query, key, value, mask=BlockMask.from_array(array), return_lse=True)
    spoiled = np.zeros(out.shape, bool)
    if array.any():
        spoiled[0, 0, array[:, 100], 3] = True
    np.testing.assert_array_equal(np.isnan(out), spoiled)
    grads = na.attention_backward(grad, query, key, value, out, lse, mask=BlockMask.from_array(array))
    assert not np.isnan(grads.query[:, 1]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("L", [64, 100, 512, 777])
def test_causal_has_the_bits_of_is_causal(L, dtype):
    """Forward and backward, and a mask that shows everything those of no mask."""
    rng = np.random.default_rng(0)
    query, key, value, grad = arrays(rng, (1, 2, 1, L, L), dtype)
    for mask, options in (
        (BlockMask.causal(L, L), {"is_causal": True}),
        (BlockMask.from_array(np.ones((L, L), bool)), {}),
    ):
        one = na.attention(query, key, value, return_lse=True, **options)
        two = na.attention(query, key, value, return_lse=True, mask=mask)
        one += na.attention_backward(grad, query, key, value, *one, **options)[:3]
        two += na.attention_backward(grad, query, key, value, *two, mask=mask)[:3]
        for x, y in zip(one, two, strict=True):
            np.testing.assert_array_equal(x, y)


def test_same_bits_for_any_threads_and_in_a_batch():
    import numba

    rng = np.random.default_rng(0)
    query, key, value, grad = arrays(rng, (3, 4, 2, 300, 400), "float32")
    mask = BlockMask.from_array(rng.random((3, 4, 300, 400)) < 0.01)

    def run(*which):
        q, k, v, g = (x[slice(*which)] for x in (query, key, value, grad))
        result = na.attention(q, k, v, mask=mask[slice(*which)], return_lse=True)
        return *result, *na.attention_backward(g, q, k, v, *result, mask=mask[slice(*which)])[:3]

    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        one = run(0, 3)
    finally:
        numba.set_num_threads(before)
    for x, y, z in zip(one, run(0, 3), run(1, 2), strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x[1:2], z)


# Other entry points.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("over", ["sequences", "tokens"])
@pytest.mark.parametrize("rows", [[70, 0, 5, 130], [1, 3, 0, 2], [7, 1, 40, 4]], ids=["many", "few", "some few"])
@pytest.mark.parametrize("Hkv", [2, 4])
def test_packed_sequences(over, backend, rows, Hkv):
    """Also by the kernel for few queries, in whose tiles several key/value heads have rows, and by both in one call."""
    rng = np.random.default_rng(0)
    columns = [3, 9, 200, 66]
    cu_q, cu_k = (np.cumsum([0, *n]) for n in (rows, columns))
    H, E = 4, 16
    query, key, value = (
        rng.standard_normal((n, heads, E), dtype=np.float32)
        for n, heads in ((cu_q[-1], H), (cu_k[-1], Hkv), (cu_k[-1], Hkv))
    )
    shape = (4, H, max(rows), 200) if over == "sequences" else (H, cu_q[-1], cu_k[-1])
    array = rng.random(shape) < 0.3
    mask = BlockMask.from_array(array)
    results = na.attention_varlen(query, key, value, cu_q, cu_k, mask=mask, return_lse=True, backend=backend)
    grad = rng.standard_normal(results[0].shape, dtype=np.float32)
    grads = na.attention_varlen_backward(grad, query, key, value, *results, cu_q, cu_k, mask=mask, backend=backend)
    for b in range(4):
        r, c = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        own = array[b, :, : rows[b], : columns[b]] if over == "sequences" else array[:, r, c]
        if rows[b]:
            one = [x[n].swapaxes(0, 1)[None] for x, n in ((query, r), (key, c), (value, c))]
            out, lse, _ = textbook(*one, own[None])
            close(results[0][r].swapaxes(0, 1), out[0], 2e-5)
            close(results[1][:, r], lse[0], 2e-5)
            expected = textbook_gradients(*one, own[None], grad[r].swapaxes(0, 1)[None])
            for x, y, n in zip(grads, expected, (r, c, c), strict=False):
                close(x[n].swapaxes(0, 1), y[0], 2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_gradients_of_bias_and_sinks(backend):
    rng = np.random.default_rng(0)
    cu = np.array([0, 70, 75])
    query, key, value, grad = (rng.standard_normal((75, 2, 8), dtype=np.float32) for _ in range(4))
    array = rng.random((1, 2, 70, 70)) < 0.4
    options = {"bias": rng.standard_normal((2, 70, 70)).astype(np.float32), "sinks": np.ones(2), "backend": backend}
    both = []
    for mask in (array, BlockMask.from_array(array)):
        result = na.attention_varlen(query, key, value, cu, cu, mask=mask, return_lse=True, **options)
        both.append(na.attention_varlen_backward(grad, query, key, value, *result, cu, cu, mask=mask, **options))
    for name in ("query", "key", "value", "bias", "sinks"):
        x, y = (getattr(grads, name) for grads in both)
        assert x.any()
        close(y, x, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", [None, "int8"])
@pytest.mark.parametrize("L", [1, 3, 40])
def test_decoding(L, storage, backend):
    """Against the same mask as an array: about all keys, and about the newest."""
    rng = np.random.default_rng(0)
    query, key, value, _ = arrays(rng, (3, 4, 2, L, 700), "float32")
    cache = na.KVCache(3, 2, 800, 16, 19, storage=storage)
    cache.append(key, value, lengths=[700, 50, 600])
    paged = na.PagedKVCache(200, 16, 2, 16, 19, storage=storage)
    ids = paged.add(3)
    paged.append(ids, key, value, lengths=[700, 50, 600])
    for shape in ((3, 4, L, 700), (1, 1, L, 700), (3, 1, L, L)):
        array = rng.random(shape) < 0.2
        for one in (cache, paged):
            for options in ({}, {"is_causal": False}):
                results = [
                    na.attention_decode(query, one, mask=mask, return_lse=True, backend=backend, **options)
                    for mask in (array, BlockMask.from_array(array))
                ]
                for x, y in zip(*results, strict=True):
                    close(y, x, 2e-5)


def test_layer():
    rng = np.random.default_rng(0)
    layer = na.MultiHeadAttention(32, 4, num_kv_heads=2, rng=0)
    x = rng.standard_normal((2, 70, 32), dtype=np.float32)
    array = rng.random((2, 1, 70, 70)) < 0.4
    padding = rng.random((2, 70)) < 0.3
    for more in ({}, {"key_padding_mask": padding}, {"is_causal": "bottom-right", "key_padding_mask": padding}):
        results = []
        for mask in (array, BlockMask.from_array(array)):
            y, ctx = layer.forward(x, mask=mask, **more)
            results.append([y, layer.backward(np.ones_like(y), ctx).query, *layer.grads.values()])
            results[-1] += layer(x, mask=mask, need_weights=True, **more)
        for a, b in zip(*results, strict=True):
            close(b, a, 1e-4)
    cu_seqlens = [0, 30, 70]
    packed = rng.random((4, 70, 70)) < 0.4
    one, two = (layer(x[0], mask=mask, cu_seqlens=cu_seqlens) for mask in (packed, BlockMask.from_array(packed)))
    close(two, one, 1e-5)
    results = []
    for mask in (array[:, :, :5], BlockMask.from_array(array[:, :, :5])):
        cache = na.KVCache(2, 2, 80, 8)
        layer(x[:, :65], cache=cache)
        results.append(layer(x[:, 65:], cache=cache, mask=mask))
    close(results[1], results[0], 1e-5)


@pytest.mark.torch
def test_torch():
    torch = pytest.importorskip("torch")
    import numba_attention.torch as nat

    query, key, value, grad = (torch.from_numpy(x) for x in arrays(np.random.default_rng(0), SIZES[0], "float32"))
    array = np.random.default_rng(0).random((2, 4, 200, 300)) < 0.2
    results = []
    for mask in (array, BlockMask.from_array(array)):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out = nat.attention(*leaves, mask=mask)
        out.backward(grad)
        results.append([out.detach().numpy(), *(x.grad.numpy() for x in leaves)])
    for x, y in zip(*results, strict=True):
        close(y, x, 1e-4)


@pytest.mark.peer
def test_jax():
    jax = pytest.importorskip("jax")
    import numba_attention.jax as naj

    query, key, value, _ = (jax.numpy.asarray(x) for x in arrays(np.random.default_rng(0), SIZES[0], "float32"))
    array = np.random.default_rng(0).random((2, 4, 200, 300)) < 0.2
    results = []
    for mask in (array, BlockMask.from_array(array)):

        def loss(q, mask=mask):
            return (naj.attention(q, key, value, mask=mask) ** 2).sum()

        results.append([naj.attention(query, key, value, mask=mask), jax.jit(jax.grad(loss))(query)])
    for x, y in zip(*results, strict=True):
        close(y, np.asarray(x), 1e-4)
    stacked = jax.vmap(lambda q: naj.attention(q, key, value, mask=mask))(query[None])
    close(stacked[0], np.asarray(results[1][0]), 1e-6)


def test_rolling_cache():
    """The columns are the kept keys, in order of position."""
    rng = np.random.default_rng(0)
    query, key, value, _ = arrays(rng, (1, 4, 2, 1, 200), "float32")
    caches = [na.PagedKVCache(200, 16, 2, 16, 19, window=100, keep_first=5) for _ in range(2)]
    array = rng.random((1, 4, 1, 105)) < 0.3
    results = []
    for cache, mask in zip(caches, (array, BlockMask.from_array(array)), strict=True):
        ids = cache.add(1)
        for n in range(200):
            cache.append(ids, key[:, :, n : n + 1], value[:, :, n : n + 1])
        results.append(na.attention_decode(query, cache, mask=mask))
        results.append(na.attention_decode(query, cache, mask=mask, alibi_slopes=np.full(4, 0.1)))
    close(results[2], results[0], 1e-5)
    close(results[3], results[1], 1e-5)


# Misuse.


def test_another_shape_is_refused_with_both():
    query, key, value, grad = arrays(np.random.default_rng(0), (2, 4, 2, 30, 50), "float32")
    out, lse = na.attention(query, key, value, return_lse=True)
    for shape in ((30, 51), (31, 50), (50, 30), (1, 50), (3, 1, 30, 50), (2, 2, 30, 50), (2, 2, 1, 30, 50)):
        mask = BlockMask.from_array(np.ones(shape, bool))
        words = rf"mask.*{re.escape(str(mask.shape))}.*\(2, 4, 30, 50\)"
        with pytest.raises(ValueError, match=words):
            na.attention(query, key, value, mask=mask)
        with pytest.raises(ValueError, match=words):
            na.attention_backward(grad, query, key, value, out, lse, mask=mask)
        with pytest.raises(ValueError, match=words):
            na.attention_weights(query, key, mask=mask)
    cache = na.KVCache.from_arrays(key, value)
    with pytest.raises(ValueError, match=r"mask.*\(1, 1, 30, 51\).*\(2, 4, 30, 50\)"):
        na.attention_decode(query, cache, mask=BlockMask.causal(30, 51))
    q, k = query[0].swapaxes(0, 1), key[0].swapaxes(0, 1)
    with pytest.raises(ValueError, match=r"mask.*\(1, 1, 30, 51\).*\(1, 4, 30, 50\).*\(4, 30, 50\)"):
        na.attention_varlen(q, k, k, [0, 30], [0, 50], mask=BlockMask.causal(30, 51))


def test_as_a_bias_it_is_refused():
    query, key, value, _ = arrays(np.random.default_rng(0), SIZES[1], "float32")
    with pytest.raises(TypeError, match=r"bias must be an array, .*BlockMask"):
        na.attention(query, key, value, bias=BlockMask.causal(130, 70))


def test_empty_arrays():
    for sizes in ((2, 4, 2, 0, 50), (2, 4, 2, 30, 0), (0, 4, 2, 30, 50), (2, 0, 0, 30, 50)):
        query, key, value, grad = arrays(np.random.default_rng(0), sizes, "float32")
        mask = BlockMask.from_array(np.ones(sizes[3:], bool))
        out, lse = na.attention(query, key, value, mask=mask, return_lse=True)
        assert not out.any()
        assert (lse == -np.inf).all()
        na.attention_backward(grad, query, key, value, out, lse, mask=mask)
        na.attention_weights(query, key, mask=mask)


def test_lists_are_made_once():
    query, key, value, _ = arrays(np.random.default_rng(0), SIZES[0], "float32")
    mask = BlockMask.causal(200, 300)
    for _ in range(3):
        out, lse = na.attention(query, key, value, mask=mask, return_lse=True)
        na.attention_backward(out, query, key, value, out, lse, mask=mask)
    assert len(mask.kept) == 1
    for n in range(1, 20):
        na.attention_weights(query, key, rows=range(n), mask=mask)
    assert len(mask.kept) <= 8
