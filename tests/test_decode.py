"""`attention_decode` and layers with a cache: every storage and option, pages or not, against the textbook."""

import itertools
import threading

import ml_dtypes
import numba
import numpy as np
import pytest

import numba_attention as na
from caching import TOLERANCE, arrays, filled
from grid import share
from numba_attention.cpu.decode import SPLIT
from numba_attention.options import Options
from numba_attention.problem.cached import build

STORAGES = [None, "float16", "bfloat16", "int8", "float8"]
DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def oracle(query, cache, lengths, **options):
    """Float64 attention over what the cache holds, sequence by sequence."""
    key, value = cache._contents().dense()
    out, lse = np.zeros((*query.shape[:3], value.shape[-1])), np.zeros(query.shape[:3])
    for b, length in enumerate(lengths):
        own = {name: x[b] if name in ("mask", "bias", "alibi_slopes") else x for name, x in options.items()}
        own.setdefault("is_causal", "bottom-right")
        out[b], lse[b] = na.attention(
            query[b].astype(np.float64), key[b, :, :length], value[b, :, :length],
            return_lse=True, backend="reference", **own,
        )  # fmt: skip
    return out, lse


def check(got, want, dtype):
    np.testing.assert_allclose(got[0].astype(np.float64), want[0], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    atol = 1e-13 if dtype == "float64" else 3e-6
    np.testing.assert_allclose(got[1], want[1], atol=atol, rtol=atol)


# Few rows and many, one head and several, features that fill vectors and that do not, one split of the keys and more.
SIZES = [
    (3, 8, 2, 1, 700, 64, 64),
    (2, 5, 5, 1, 90, 24, 40),
    (1, 6, 3, 4, 1100, 16, 80),
    (2, 4, 1, 20, 130, 64, 33),
    (2, 4, 2, 90, 150, 32, 32),
    (2, 2, 2, 2, 70, 8, 5),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_storages_pages_and_sizes(sizes, storage):
    query, key, value = arrays(*sizes)
    L, S = sizes[3], sizes[4]
    lengths = np.array([S, L, (S + L) // 2])[: sizes[0]]
    cache = filled(key, value, lengths, storage)
    got = na.attention_decode(query, cache, return_lse=True)
    check(got, oracle(query, cache, lengths), "float32")
    for page_size in (1, 7, 16):
        paged = filled(key, value, lengths, storage, page_size)
        for one, other in zip(na.attention_decode(query, paged, return_lse=True), got, strict=True):
            np.testing.assert_array_equal(one, other)
    if storage is None:
        want = na.attention(query, cache.key, cache.value, key_lengths=lengths, is_causal="bottom-right")
        np.testing.assert_array_equal(got[0], want)


@pytest.mark.parametrize(
    ("dtype", "storage"), share(itertools.product(["float64", "float16", "bfloat16"], [None, "int8", "float8"]), 4)
)
def test_dtypes(dtype, storage):
    for L in (1, 90):
        query, key, value = arrays(2, 4, 2, L, 150, 32, dtype=dtype)
        lengths = np.array([150, 100])
        cache = filled(key, value, lengths, storage)
        got = na.attention_decode(query, cache, return_lse=True)
        assert got[0].dtype == query.dtype
        check(got, oracle(query, cache, lengths), dtype)
        paged = na.attention_decode(query, filled(key, value, lengths, storage, 5))
        np.testing.assert_array_equal(paged, got[0])


rng = np.random.default_rng(3)
OPTIONS = {
    "all keys": {"is_causal": False},
    "window": {"window": (20, 0)},
    "scale, softcap": {"scale": 0.2, "softcap": 3.0},
    "slopes": {"alibi_slopes": rng.random((2, 4))},
    "sinks": {"sinks": rng.standard_normal(4)},
    "mask": {"mask": rng.random((2, 4, 3, 600)) < 0.7},
    "bias": {"bias": rng.standard_normal((2, 4, 3, 600)).astype(np.float32)},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("storage", [None, "int8"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_options(option, storage, backend):
    query, key, value = arrays(2, 4, 2, 3, 600, 48)
    lengths = np.array([600, 333])
    cache = filled(key, value, lengths, storage)
    got = na.attention_decode(query, cache, return_lse=True, backend=backend, **OPTIONS[option])
    own = {name: x[..., :333] if name in ("mask", "bias") else x for name, x in OPTIONS[option].items()}
    parts = [
        oracle(query[b : b + 1], _One(cache, b), lengths[b : b + 1], **_slice(own if b else OPTIONS[option], b))
        for b in range(2)
    ]
    want = [np.concatenate(x) for x in zip(*parts, strict=True)]
    check(got, want, "float32")
    paged = na.attention_decode(query, filled(key, value, lengths, storage, 16), backend=backend, **OPTIONS[option])
    np.testing.assert_array_equal(paged, got[0])


class _One:
    """One sequence of a cache, as `oracle` reads it."""

    def __init__(self, cache, b):
        self.cache, self.b = cache, b

    def _contents(self):
        return self

    def dense(self):
        return [x[self.b : self.b + 1] for x in self.cache._contents().dense()]


def _slice(options, b):
    return {k: x[b : b + 1] if k in ("mask", "bias", "alibi_slopes") else x for k, x in options.items()}


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("storage", [None, "bfloat16"])
def test_token_by_token_is_one_causal_pass(page_size, storage):
    query, key, value = arrays(2, 8, 2, 70, 70, 32)
    whole = na.attention(query, key, value, is_causal=True)
    cache = (
        na.KVCache(2, 2, 70, 32, storage=storage)
        if page_size is None
        else na.PagedKVCache(10, 16, 2, 32, storage=storage)
    )
    ids = () if page_size is None else (cache.add(2),)
    for start, stop in [(0, 40), *((t, t + 1) for t in range(40, 66)), (66, 70)]:  # a prompt, tokens, guesses
        part = slice(start, stop)
        cache.append(*ids, key[:, :, part], value[:, :, part])
        out = na.attention_decode(query[:, :, part], cache)
        np.testing.assert_allclose(out, whole[:, :, part], atol=2e-6 if storage is None else 2e-2)


def test_tree_of_guesses():
    """Five guesses after 50 tokens: two chains that share their first guess."""
    parents = [-1, 0, 1, 0, 3]
    mask = np.zeros((5, 5), bool)
    for node in range(5):
        at = node
        while at >= 0:
            mask[node, at], at = True, parents[at]
    query, key, value = arrays(1, 4, 2, 5, 55, 32)
    cache = filled(key, value, [55])
    out = na.attention_decode(query, cache, mask=mask)
    for chain in ([0, 1, 2], [0, 3, 4]):
        rows = np.array([*range(50), *(50 + np.array(chain))])
        want = na.attention(query[:, :, chain], key[:, :, rows], value[:, :, rows], is_causal="bottom-right")
        np.testing.assert_allclose(out[:, :, chain], want, atol=2e-6)
    full = np.ones((1, 1, 5, 55), bool)
    full[..., 50:] = mask
    np.testing.assert_array_equal(na.attention_decode(query, cache, mask=full), out)
    bias = np.where(mask, 0, -np.inf).astype(np.float32)
    np.testing.assert_allclose(na.attention_decode(query, cache, bias=bias), out, atol=1e-6)


@pytest.mark.parametrize("name", ["mask", "bias"])
def test_trees_of_several_sequences(name):
    """(batch, L, L), as tree decoding gives masks, where it cannot be (H, L, L)."""
    query, key, value = arrays(3, 4, 2, 5, 30, 16)
    rng = np.random.default_rng(0)
    mask = rng.random((3, 5, 5)) < 0.5
    mask |= np.eye(5, dtype=bool)
    given = mask if name == "mask" else np.where(mask, 0, -np.inf).astype(np.float32)
    for cache in (filled(key, value, [30, 25, 7]), filled(key, value, [30, 25, 7], page_size=4)):
        out = na.attention_decode(query, cache, **{name: given})
        for b, length in enumerate([30, 25, 7]):
            full = np.ones((5, length), bool)
            full[:, length - 5 :] = mask[b]
            full &= np.arange(length) <= length - 5 + np.arange(5)[:, None]
            for h in range(4):
                scores = np.where(full, query[b, h].astype("f8") @ key[b, h // 2, :length].T.astype("f8") / 4, -np.inf)
                p = np.exp(scores - scores.max(1, keepdims=True))
                want = p / p.sum(1, keepdims=True) @ value[b, h // 2, :length].astype("f8")
                np.testing.assert_allclose(out[b, h], want, atol=5e-6)
        wide = np.broadcast_to(given[:, None], (3, 4, 5, 5))
        np.testing.assert_array_equal(na.attention_decode(query, cache, **{name: wide}), out)


@pytest.mark.parametrize("shape", [(2, 5, 5), (4, 4, 5, 5), (6, 5), (5, 6), (1, 1, 1, 5, 5), (3, 3, 5, 5)])
@pytest.mark.parametrize("name", ["mask", "bias"])
def test_mask_of_another_shape(name, shape):
    """The message shows what was passed, and both shapes that could have been."""
    query, key, value = arrays(3, 4, 2, 5, 30, 16)
    cache = filled(key, value, [30, 25, 7])
    words = rf"{name} of shape {shape} does not broadcast to \(3, 4, 5, 30\).* to \(3, 4, 5, 5\)"
    with pytest.raises(ValueError, match=words.replace(str(shape), str(shape).replace("(", r"\(").replace(")", r"\)"))):
        na.attention_decode(query, cache, **{name: np.ones(shape, bool if name == "mask" else np.float32)})


@pytest.mark.parametrize("storage", [None, "int8"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("option", [{}, {"mask": True}, {"window": (5, 0)}, {"key_lengths": 3}, {"is_causal": False}])
def test_lengths_of_a_call_do_not_change(batch, option, storage):
    """A cache in one piece that grows, or shrinks, while a call runs: backends read lengths of one moment."""
    query, key, value = arrays(batch, 4, 2, 1, 30, 16)
    cache = filled(key, value, [30, 25, 7][:batch], storage=storage)
    if "mask" in option:
        option = {"mask": np.ones((1, 30), bool)}
    problem = build(query, cache._contents(), Options(**{"is_causal": "bottom-right"} | option), None, False)
    read = [problem.S] if batch == 1 and not option and storage is None else [problem.S, problem.key_lengths]
    before = [np.array(x) for x in read]
    cache.append(key[:, :, :1], value[:, :, :1])
    cache.truncate(2)
    for x, y in zip(read, before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_ragged_prompt():
    """With query_lengths only the first queries of a sequence are there, and they are its last positions."""
    query, key, value = arrays(2, 4, 4, 6, 9, 16)
    cache = na.KVCache(2, 4, 20, 16)
    cache.append(key, value, [9, 5])
    out = na.attention_decode(query, cache, query_lengths=[6, 2])
    want = na.attention(query[1, :, :2], key[1, :, :5], value[1, :, :5], is_causal="bottom-right")
    np.testing.assert_array_equal(out[1, :, :2], want)
    assert not out[1, :, 2:].any()


def test_ids_choose_and_order():
    query, key, value = arrays(3, 4, 2, 1, 40, 16)
    cache = filled(key, value, [40, 25, 33], page_size=8)
    whole = na.attention_decode(query, cache)
    ids = cache.ids
    np.testing.assert_array_equal(na.attention_decode(query[[2, 0]], cache, ids=ids[[2, 0]]), whole[[2, 0]])
    child = cache.fork(int(ids[1]))
    np.testing.assert_array_equal(na.attention_decode(query[1:2], cache, ids=[child]), whole[1:2])
    cache.append([child], key[:1, :, :1], value[:1, :, :1])
    np.testing.assert_array_equal(na.attention_decode(query, cache, ids=ids), whole)


def test_empty_sequences_and_no_batch_axis():
    cache = na.KVCache(1, 2, 8, 16)
    query = np.ones((4, 1, 16), np.float32)
    out, lse = na.attention_decode(query, cache, return_lse=True)
    assert out.shape == (4, 1, 16)
    assert not out.any()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("storage", STORAGES)
def test_nan_reaches_its_readers_only(storage):
    query, key, value = arrays(2, 4, 2, 3, 50, 32)
    value[0, 1, 48, 5] = np.nan  # seen by the last two queries of heads 2 and 3 of sequence 0
    cache = filled(key, value, [50, 50], storage)
    out = na.attention_decode(query, cache)
    lost = np.isnan(out)
    assert lost[0, 2:, 1:, 5].all()
    lost[0, 2:, 1:] = False
    assert not lost.any()
    window = na.attention_decode(query[:, :, 2:], cache, window=(0, 0))
    assert np.isfinite(window).all()


def test_from_arrays():
    query, key, value = arrays(2, 4, 2, 1, 48, 16)
    want = na.attention(query, key, value)
    strided = [np.ascontiguousarray(x.transpose(3, 2, 0, 1)).transpose(2, 3, 1, 0) for x in (key, value)]
    np.testing.assert_array_equal(na.attention_decode(query, na.KVCache.from_arrays(key, value)), want)
    np.testing.assert_array_equal(na.attention_decode(query, na.KVCache.from_arrays(*strided)), want)
    pages = [
        np.ascontiguousarray(x.reshape(2, 2, 3, 16, 16).swapaxes(1, 2)).reshape(6, 2, 16, 16) for x in (key, value)
    ]
    paged = na.PagedKVCache.from_arrays(*pages, [[0, 1, 2], [3, 4, 5]], [48, 48])
    np.testing.assert_array_equal(na.attention_decode(query, paged), want)


def test_threads_and_concurrent_readers():
    query, key, value = arrays(2, 8, 2, 1, 1500, 64)
    cache = filled(key, value, [1500, 900], "int8", 16)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    want = na.attention_decode(query, cache)
    numba.set_num_threads(before)
    found = []

    def read():
        found.extend(na.attention_decode(query, cache) for _ in range(20))

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(found) == 80
    for out in found:
        np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": np.ones((2, 4, 1, 16))}, TypeError, "query must have the dtype of the cache, float32"),
        ({"query": np.ones((1, 4, 1, 16), np.float32)}, ValueError, "as the cache has 2 sequences"),
        ({"query": np.ones((2, 3, 1, 16), np.float32)}, ValueError, "the cache has 2 heads, which must divide the 3"),
        ({"query": np.ones((2, 4, 1, 8), np.float32)}, ValueError, "query must have shape"),
        ({"query": [1.0]}, TypeError, "query must be a numpy.ndarray"),
        ({"cache": np.ones(3)}, TypeError, "cache must be a KVCache or a PagedKVCache"),
        ({"ids": [0]}, ValueError, "ids must be None for a KVCache"),
        ({"key_lengths": [5, 1]}, ValueError, "key_lengths must lie between 0 and the lengths of the cache"),
        ({"mask": np.ones((2, 4, 1, 7), bool)}, ValueError, "mask of shape"),
        ({"mask": np.ones((2, 4, 1, 4))}, TypeError, "mask must be boolean"),
        ({"out": np.ones((2, 4, 1, 16))}, TypeError, "out must have the dtype of query"),
        ({"window": (-1, 0)}, ValueError, "window must not be negative"),
    ],
)
def test_bad_input(arguments, error, message):
    cache = na.KVCache(2, 2, 8, 16)
    cache.append(np.ones((2, 2, 4, 16), np.float32), np.ones((2, 2, 4, 16), np.float32))
    good = {"query": np.ones((2, 4, 1, 16), np.float32), "cache": cache}
    assert na.attention_decode(**good).shape == (2, 4, 1, 16)
    with pytest.raises(error, match=message):
        na.attention_decode(**good | arguments)


# Layers.


def layer_and_input(rotary=None, bias=True):
    layer = na.MultiHeadAttention(48, 6, num_kv_heads=2, rotary=rotary, bias=bias, rng=0)
    return layer, np.random.default_rng(1).standard_normal((2, 30, 48), dtype=np.float32)


@pytest.mark.parametrize("rotary", [None, True, {"interleaved": True, "dim": 4}])
@pytest.mark.parametrize("paged", [False, True])
def test_layer_token_by_token(rotary, paged):
    layer, x = layer_and_input(rotary)
    whole = layer(x, is_causal=True)
    cache = na.PagedKVCache(20, 8, 2, 8) if paged else na.KVCache(2, 2, 30, 8)
    if paged:
        cache.add(2)
    for start, stop in [(0, 20), *((t, t + 1) for t in range(20, 26)), (26, 30)]:
        out = layer(x[:, start:stop], cache=cache, is_causal=True)
        np.testing.assert_allclose(out, whole[:, start:stop], atol=3e-6)
    assert (cache.lengths() if paged else cache.lengths).tolist() == [30, 30]


@pytest.mark.parametrize("rotary", [None, True])
def test_layer_with_prompts_of_different_lengths(rotary):
    layer, x = layer_and_input(rotary)
    cache = na.KVCache(2, 2, 30, 8)
    layer(x[:, :20], cache=cache, is_causal=True, key_lengths=[20, 13])
    step = np.stack([x[0, 20:21], x[1, 13:14]])
    out = layer(step, cache=cache)
    np.testing.assert_allclose(out[0], layer(x[0, :21], is_causal=True)[-1:], atol=3e-6)
    np.testing.assert_allclose(out[1], layer(x[1, :14], is_causal=True)[-1:], atol=3e-6)


def test_layer_without_batch_axis_and_cached_memory():
    layer, x = layer_and_input()
    cache = na.KVCache(1, 2, 40, 8)
    memory, queries = x[0], x[1, :3]
    np.testing.assert_allclose(layer(queries, memory, cache=cache), layer(queries, memory), atol=2e-6)
    np.testing.assert_allclose(layer(queries, memory[:0], cache=cache), layer(queries, memory), atol=2e-6)
    assert cache.lengths.tolist() == [30]


def test_layer_leaves_the_cache_alone_where_it_refuses():
    layer, x = layer_and_input()
    cache = na.KVCache(2, 2, 32, 8)
    layer(x[:, :20], cache=cache, is_causal=True)
    with pytest.raises(ValueError, match="mask of shape"):
        layer(x[:, 20:22], cache=cache, mask=np.ones((2, 7), bool))
    with pytest.raises(na.CacheFullError):
        layer(x[:, :13], cache=cache)
    with pytest.raises(ValueError, match="need_weights must be False"):
        layer(x[:, :1], cache=cache, need_weights=True)
    with pytest.raises(ValueError, match="key_padding_mask must be None"):
        layer(x[:, :1], cache=cache, key_padding_mask=np.zeros((2, 1), bool))
    with pytest.raises(ValueError, match="cache has 2 sequences"):
        layer(x[:1, :1], cache=cache)
    with pytest.raises(TypeError, match="cache must be a KVCache"):
        layer(x[:, :1], cache=np.zeros(3))
    with pytest.raises(ValueError, match="ids must be None without a cache"):
        layer(x, ids=[0])
    assert cache.lengths.tolist() == [20, 20]
    paged = na.PagedKVCache(4, 8, 2, 8)
    paged.add(2)
    layer(x[:, :10], cache=paged, is_causal=True)
    with pytest.raises(ValueError, match="mask of shape"):
        layer(x[:, 20:22], cache=paged, mask=np.ones((2, 7), bool))
    with pytest.raises(na.CacheFullError):
        layer(x[:, :13], cache=paged)
    assert paged.lengths().tolist() == [10, 10]


def test_a_sink_counts_once_however_many_splits_there_are():
    """Against a textbook of one query: keys are dealt out to four splits."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, n, 16), dtype=np.float32) for n in (1, 3 * SPLIT + 5, 3 * SPLIT + 5))
    sinks = np.array([7.0, 9.0])
    out, lse = na.attention(query, key, value, sinks=sinks, return_lse=True)
    scores = (query.astype(np.float64) @ key.swapaxes(-1, -2) / 4)[:, 0]
    denominator = np.exp(scores).sum(-1) + np.exp(sinks)
    np.testing.assert_allclose(lse[:, 0], np.log(denominator), rtol=1e-6)
    want = np.einsum("hj,hje->he", np.exp(scores) / denominator[:, None], value)
    np.testing.assert_allclose(out[:, 0], want, atol=1e-6)


@pytest.mark.parametrize("name", ["key_scale", "value_scale"])
def test_out_overlaps_the_scales_of_a_cache(name):
    cache = na.KVCache(1, 2, 8, 4, storage="int8")
    cache.append(*np.ones((2, 1, 2, 3, 4), np.float32))
    scales = getattr(cache, name)
    out = np.lib.stride_tricks.as_strided(scales, (1, 2, 1, 4), (0, scales.strides[1], 0, scales.itemsize))
    with pytest.raises(ValueError, match=f"out must not overlap an input, it shares memory with {name}"):
        na.attention_decode(np.ones((1, 2, 1, 4), np.float32), cache, out=out)
