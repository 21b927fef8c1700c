"""Caches on a GPU: kernels store the bits that caches on the host store, and calls read them where they are."""

import sys

import ml_dtypes
import numpy as np
import pytest

import numba_attention as na
from device import CupyArray, NumbaArray, Tensor, fake_cupy, fake_torch, install
from emulator import emulated

DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
STORAGES = (None, "float16", "bfloat16", "int8", "float8")
PAIRS = [(dtype, storage) for dtype in DTYPES for storage in STORAGES if storage != dtype]


@pytest.fixture
def gpu(monkeypatch):
    install(monkeypatch)
    with emulated(monkeypatch) as driver:
        yield driver


def there(cache, give=NumbaArray, **more):
    """A cache on the device with the same arrays as an empty one on the host."""
    stored = cache._stored if isinstance(cache, na.KVCache) else None
    arrays = [give(x) if x is not None else None for x in (stored[:4] if stored is not None else cache._arrays)]
    scales = {} if arrays[2] is None else {"key_scale": arrays[2], "value_scale": arrays[3]}
    more |= {"dtype": cache.dtype, "window": cache.window, "keep_first": cache.keep_first}
    if stored is not None:
        return na.KVCache.from_arrays(*arrays[:2], 0, **scales, **more)
    return na.PagedKVCache.from_arrays(*arrays[:2], np.zeros((0, 0), int), [], **scales, **more)


def bits(x):
    """A copy on the host of a fake array."""
    return None if x is None else np.array(x.array if hasattr(x, "array") else x)


def same(cache, other):
    """Whether two caches store the same bits; signs of NaN do not count."""
    arrays = cache._stored[:4] if isinstance(cache, na.KVCache) else cache._arrays
    others = other._stored.originals if isinstance(other, na.KVCache) else other._originals
    if isinstance(cache, na.KVCache):
        np.testing.assert_array_equal(cache.lengths, other.lengths)
        np.testing.assert_array_equal(cache.positions, other.positions)
        used = cache.positions >= 0
    else:
        np.testing.assert_array_equal(cache.block_table(), other.block_table())
        np.testing.assert_array_equal(cache.lengths(), other.lengths())
        used = np.ones(cache.num_pages, bool)[:, None]
    for a, b in zip(arrays, others, strict=True):
        if a is not None:
            a, b = (np.moveaxis(bits(x), 2, 1)[:, : used.shape[1]] for x in (a, b))
            where = np.broadcast_to(used.reshape(used.shape + (1,) * (a.ndim - 2)), a.shape)
            np.testing.assert_array_equal(a[where].astype(np.float64), b[where].astype(np.float64))


def numbers(rng, shape, dtype, ends=True):
    """Numbers of all magnitudes, with a few that are special in one row or other."""
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 12, (*shape[:-1], 1))
    with np.errstate(over="ignore"):
        x = x.astype(DTYPES[dtype])
    if ends:
        flat = x.reshape(-1, shape[-1])
        largest = ml_dtypes.finfo(x.dtype).max
        for row, special in enumerate((0.0, -0.0, np.inf, np.nan, largest, -largest, ml_dtypes.finfo(x.dtype).tiny)):
            if row < len(flat) - 3:
                flat[row, :: 1 if special == 0 else 3] = special
    return x


def zeroed(cache):
    """Nothing uninitialised, which may differ."""
    for x in cache._stored[:4] if isinstance(cache, na.KVCache) else cache._arrays:
        if x is not None:
            x[...] = 0
    return cache


@pytest.mark.parametrize(("dtype", "storage"), PAIRS)
def test_append_has_the_bits_of_the_host(gpu, dtype, storage):
    rng = np.random.default_rng(0)
    cache = zeroed(na.KVCache(2, 3, 20, 40, 24, dtype=DTYPES[dtype], storage=storage))
    other = there(cache)
    for T, lengths in ((5, None), (1, None), (4, [4, 2]), (1, None), (0, None), (3, [0, 3])):
        key, value = (numbers(rng, (2, 3, T, features), dtype) for features in (40, 24))
        cache.append(key, value, lengths)
        other.append(NumbaArray(key), NumbaArray(value), lengths)
    same(cache, other)
    assert {c.task for c in gpu.configs.values()} == {"append"}


@pytest.mark.parametrize("storage", [None, "int8"])
@pytest.mark.parametrize("layout", ["tokens first", "odd", "reversed", "unaligned"])
def test_any_strides(gpu, layout, storage):
    rng = np.random.default_rng(1)
    cache = zeroed(na.KVCache(2, 2, 9, 32, storage=storage))
    other = there(cache)
    key, value = (numbers(rng, (2, 2, 4, 32), "float32") for _ in range(2))

    def laid(x):
        if layout == "tokens first":
            fake = NumbaArray(np.ascontiguousarray(x.swapaxes(1, 2)))
            return NumbaArray.of(fake.header.swapaxes(1, 2))
        if layout == "odd":
            wide = np.zeros((*x.shape[:3], 3 * 32), np.float32)
            wide[..., 1::3] = x
            return NumbaArray.of(NumbaArray(wide).header[..., 1::3])
        if layout == "reversed":
            return NumbaArray.of(NumbaArray(np.ascontiguousarray(x[:, :, ::-1])).header[:, :, ::-1])
        wide = np.zeros((*x.shape[:3], 33), np.float32)
        wide[..., 1:] = x
        return NumbaArray.of(NumbaArray(wide).header[..., 1:])

    cache.append(key, value)
    other.append(laid(key), laid(value))
    same(cache, other)


@pytest.mark.parametrize("give", [Tensor, CupyArray, NumbaArray])
def test_steps_of_decoding_stay_on_the_device(gpu, give):
    """Each library's arrays, and arrays of NumPy; nothing of the size of a key is copied to or from the host."""
    rng = np.random.default_rng(2)
    host = zeroed(na.KVCache(2, 2, 12, 64))
    cache = there(host, give)
    key, value = (rng.standard_normal((2, 2, 10, 64), dtype=np.float32) for _ in range(2))
    query = rng.standard_normal((2, 4, 1, 64), dtype=np.float32)
    host.append(key[:, :, :7], value[:, :, :7])
    cache.append(give(key[:, :, :7]), give(value[:, :, :7]))
    gpu.copies.clear()
    for t in range(7, 9):
        new = key[:, :, t : t + 1], value[:, :, t : t + 1]
        host.append(*new)
        cache.append(*map(give, new))
        got = na.attention_decode(give(query), cache)
        assert type(got) is give
        np.testing.assert_allclose(bits(got), na.attention_decode(query, host, backend="reference"), atol=1e-6)
    assert all(kind == "write" and size < 1024 for kind, size, _ in gpu.copies), "records of the sequences"
    cache.append(key[:, :, 9:], value[:, :, 9:])  # NumPy
    host.append(key[:, :, 9:], value[:, :, 9:])
    same(host, cache)
    assert type(cache.key) is give


@pytest.mark.parametrize("storage", [None, "int8", "float16"])
def test_pages(gpu, storage):
    """Forks copy the page that they share before they write to it."""
    rng = np.random.default_rng(3)
    cache = zeroed(na.PagedKVCache(10, 4, 2, 16, 8, storage=storage))
    other = there(cache)
    for each in (cache, other):
        np.testing.assert_array_equal(each.add(2), [0, 1])

    def append(ids, T, lengths=None):
        key, value = (numbers(rng, (len(ids), 2, T, features), "float32") for features in (16, 8))
        cache.append(ids, key, value, lengths)
        other.append(ids, Tensor(key), Tensor(value), lengths)
        same(cache, other)

    append([0, 1], 7, [7, 6])
    assert cache.fork(0) == other.fork(0)
    append([2], 1)
    append([1, 0], 3, [1, 3])
    for each in (cache, other):
        each.reorder([1], [2])
        each.free(0)
        each.truncate(1, 5)
    append([1, 2], 2)
    query = rng.standard_normal((2, 2, 1, 16), dtype=np.float32)
    want = na.attention_decode(query, cache, backend="reference")
    np.testing.assert_allclose(bits(na.attention_decode(Tensor(query), other)), want, atol=1e-5)
    many = rng.standard_normal((2, 2, 40, 16), dtype=np.float32)
    with pytest.raises(na.CacheFullError):
        other.append([1, 2], Tensor(many), Tensor(many[..., :8].copy()))
    same(cache, other)


@pytest.mark.parametrize("storage", [None, "int8"])
@pytest.mark.parametrize("paged", [False, True])
def test_rolling(gpu, paged, storage):
    """Ring buffers and pages of which the oldest are returned, with what positions decide."""
    rng = np.random.default_rng(4)
    if paged:
        cache = zeroed(na.PagedKVCache(12, 4, 2, 32, storage=storage, window=6, keep_first=2))
    else:
        cache = zeroed(na.KVCache(2, 2, 9, 32, storage=storage, window=6, keep_first=2))
    other = there(cache, Tensor)
    if paged:
        ids = cache.add(2), other.add(2)
    query = rng.standard_normal((2, 4, 1, 32), dtype=np.float32)
    for T, lengths in ((5, [5, 3]), (1, None), (7, None), (1, None), (1, [0, 1])):
        key, value = (rng.standard_normal((2, 2, T, 32), dtype=np.float32) for _ in range(2))
        if paged:
            cache.append(ids[0], key, value, lengths)
            other.append(ids[1], Tensor(key), Tensor(value), lengths)
        else:
            cache.append(key, value, lengths)
            other.append(Tensor(key), Tensor(value), lengths)
        same(cache, other)
        for options in ({}, {"alibi_slopes": [0.5, 0.25, 0.125, 0.1]}, {"window": (4, 0), "is_causal": False}):
            want, want_lse = na.attention_decode(query, cache, return_lse=True, backend="reference", **options)
            got, lse = na.attention_decode(Tensor(query), other, return_lse=True, **options)
            np.testing.assert_allclose(bits(got), want, atol=2e-6)
            np.testing.assert_allclose(bits(lse), want_lse, atol=2e-6)
    np.testing.assert_allclose(na.attention_decode(query, other), na.attention_decode(query, cache), atol=2e-6)


def test_beams_are_reordered(gpu):
    rng = np.random.default_rng(5)
    for storage in (None, "float8"):
        cache = zeroed(na.KVCache(4, 2, 6, 8, storage=storage))
        other = there(cache)
        key, value = (numbers(rng, (4, 2, 5, 8), "float32", ends=False) for _ in range(2))
        cache.append(key, value, [5, 3, 4, 1])
        other.append(NumbaArray(key), NumbaArray(value), [5, 3, 4, 1])
        for index in ([1, 0, 2, 2], [0, 1, 2, 3], [3, 3, 3, 3]):
            cache.reorder(index)
            other.reorder(index)
            same(cache, other)


def test_a_layer_appends_to_a_cache_on_the_device(gpu):
    """Rolling ones too, whose tokens come back if a call is refused."""
    layer = na.MultiHeadAttention(32, 4, rng=0)
    x = np.random.default_rng(6).standard_normal((2, 9, 32), dtype=np.float32)
    for more in ({}, {"window": 4, "keep_first": 1}):
        cache = zeroed(na.KVCache(2, 4, 12, 8, **more))
        other = there(cache)
        for part in (slice(0, 6), slice(6, 7), slice(7, 9)):
            want = layer(x[:, part], cache=cache, is_causal=True)
            np.testing.assert_allclose(layer(x[:, part], cache=other, is_causal=True), want, atol=1e-5)
        before = [bits(y) for y in other._stored.originals[:2]]
        with pytest.raises(ValueError, match="mask"):
            layer(x[:, :1], cache=other, mask=np.ones((3, 3, 3, 99), bool))
        for a, b in zip(before, other._stored.originals[:2], strict=True):
            if more:  # what the ring overwrote
                np.testing.assert_array_equal(a, bits(b))
        same(cache, other)


def test_streams(gpu, monkeypatch):
    """The kernel is on the stream of the new keys, and that of the cache waits for it."""
    monkeypatch.setitem(sys.modules, "torch", fake_torch(stream=5))
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(stream=9))
    x = np.ones((1, 2, 3, 8), np.float32)
    cache = na.KVCache.from_arrays(CupyArray(x), CupyArray(x), 0)
    gpu.waits.clear()
    cache.append(Tensor(x[:, :, :1]), Tensor(x[:, :, :1]))
    assert [stream for *_, stream in gpu.launches] == [5]
    assert gpu.waits == [(5, 9), (9, 5)]


def test_what_is_refused_leaves_the_cache(gpu):
    x = np.ones((2, 2, 4, 8), np.float32)
    cache = na.KVCache.from_arrays(Tensor(x), Tensor(x), 2)
    new = x[:, :, :1]
    for error, message, key, value, lengths in (
        (na.CacheFullError, "3 more tokens", x[:, :, :3], x[:, :, :3], None),
        (TypeError, "key must have the dtype of the cache", new.astype(np.float64), new, None),
        (ValueError, "value must have shape", new, x, None),
        (ValueError, "lengths must lie between", new, new, [2, 0]),
    ):
        with pytest.raises(error, match=message):
            cache.append(Tensor(key), Tensor(value), lengths)
    with pytest.raises(TypeError, match=r"key must be a numpy.ndarray or an array on a GPU, got builtins.list"):
        cache.append([1], Tensor(new))
    with pytest.raises(ValueError, match=r"must be on one GPU: key is on GPU 1, value is on GPU 1, cache.key"):
        cache.append(*(Tensor(new, 1) for _ in range(2)))
    assert cache.lengths.tolist() == [2, 2]
    assert not gpu.launches
    same_memory = Tensor(x)
    with pytest.raises(ValueError, match="share memory"):
        na.KVCache.from_arrays(same_memory, same_memory, 0).append(Tensor(new), Tensor(new))
    host = na.KVCache(2, 2, 4, 8)
    with pytest.raises(TypeError, match="key"):
        host.append(Tensor(new), Tensor(new))
    with pytest.raises(ValueError, match="window"):
        na.KVCache.from_arrays(Tensor(x), Tensor(x), 0, window=4, keep_first=1)
