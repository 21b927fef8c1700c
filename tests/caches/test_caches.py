"""KVCache and PagedKVCache: what goes in comes out, nothing else changes, and misuse is refused by name."""

import copy
import pickle
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import numba_attention as na
from caching import STORAGES, check_pages, read_back, state
from cases import DTYPES
from numba_attention.caches.storage import decode, storage_format

F8 = ml_dtypes.float8_e4m3fn


def normal(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype])


def tokens(n=2, T=5, Hkv=3, E=8, Ev=6, dtype="float32", seed=0):
    return normal(n, Hkv, T, E, dtype=dtype, seed=seed), normal(n, Hkv, T, Ev, dtype=dtype, seed=seed + 1)


def contiguous(capacity=20, **kwargs):
    return na.KVCache(2, 3, capacity, 8, 6, **kwargs)


def paged(num_pages=8, page_size=4, **kwargs):
    return na.PagedKVCache(num_pages, page_size, 3, 8, 6, **kwargs)


def equal(cache, sequences, ids=None):
    """Compare a cache with a list of pairs (key, value), each (Hkv, length, E)."""
    contents = cache._contents() if ids is None else cache._contents(ids)
    for got, want in zip(contents.dense(), zip(*sequences, strict=True), strict=True):
        longest = max(x.shape[1] for x in want)
        assert got.shape[2] == longest
        for i, x in enumerate(want):
            np.testing.assert_array_equal(got[i, :, : x.shape[1]], x.astype(np.float64))
            assert not got[i, :, x.shape[1] :].any()
    np.testing.assert_array_equal(contents.lengths, [key.shape[1] for key, _ in sequences])


# What goes in comes out.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", STORAGES)
def test_reads_as_stored(dtype, storage):
    key, value = tokens(T=7, dtype=dtype)
    want = [(read_back(key[i], storage), read_back(value[i], storage)) for i in range(2)]
    plain = contiguous(dtype=DTYPES[dtype], storage=storage)
    pages = paged(dtype=DTYPES[dtype], storage=storage)
    ids = pages.add(2)
    for part in (slice(0, 3), slice(3, 4), slice(4, 4), slice(4, 7)):
        plain.append(key[:, :, part], value[:, :, part])
        pages.append(ids, key[:, :, part], value[:, :, part])
    equal(plain, want)
    equal(pages, want)
    for cache in (plain, pages):
        assert cache.dtype == DTYPES[dtype]
        assert cache.storage == {None: dtype, "float8": "float8_e4m3fn"}.get(storage, storage)


@pytest.mark.parametrize("lengths", [[5, 2], [0, 5], [3, 3], 4, np.array([1, 0], np.uint8)])
@pytest.mark.parametrize("storage", [None, "int8"])
def test_lengths_of_what_is_appended(lengths, storage):
    plain, pages = contiguous(storage=storage), paged(storage=storage)
    ids = pages.add(2)
    first, second = tokens(seed=1), tokens(seed=2)
    for key, value in (first, second):
        plain.append(key, value, lengths)
        pages.append(ids, key, value, lengths)
    want = []
    for i, n in enumerate(np.broadcast_to(lengths, 2)):
        parts = [[read_back(x[i, :, :n], storage) for x in pair] for pair in (first, second)]
        want.append(tuple(np.concatenate(x, axis=1) for x in zip(*parts, strict=True)))
    equal(plain, want)
    equal(pages, want)
    np.testing.assert_array_equal(plain.lengths, 2 * np.broadcast_to(lengths, 2))
    np.testing.assert_array_equal(pages.lengths(ids[::-1]), 2 * np.broadcast_to(lengths, 2)[::-1])


def test_any_strides_and_nothing_kept():
    key, value = tokens(T=6)
    given = [np.asfortranarray(key), value.swapaxes(1, 2).copy().swapaxes(1, 2)]
    given[0] = np.repeat(given[0], 2, axis=-1)[..., ::2]
    plain, pages = contiguous(), paged()
    ids = pages.add(2)
    copies = [x.copy() for x in given]
    plain.append(*given)
    pages.append(ids, *given)
    for x, before in zip(given, copies, strict=True):
        np.testing.assert_array_equal(x, before)
        x[...] = np.nan
    want = [(key[i], value[i]) for i in range(2)]
    equal(plain, want)
    equal(pages, want)


def test_subclasses_and_read_only_arrays_may_be_appended(tmp_path):
    key, value = tokens()
    on_disk = np.memmap(tmp_path / "key", np.float32, "w+", shape=key.shape)
    on_disk[:] = key
    value.flags.writeable = False
    cache = contiguous()
    cache.append(on_disk, value)
    equal(cache, [(key[i], value[i]) for i in range(2)])


def test_views():
    cache = contiguous(storage="int8")
    key, value = tokens()
    cache.append(key, value, [5, 3])
    assert cache.key.shape == (2, 3, 5, 8)
    assert cache.value.shape == (2, 3, 5, 6)
    assert cache.key.dtype == np.int8
    assert cache.key_scale.shape == cache.value_scale.shape == (2, 3, 5)
    got = cache.value[0] * cache.value_scale[0].astype(np.float64)[..., None]
    np.testing.assert_array_equal(got, read_back(value[0], "int8"))
    assert np.shares_memory(cache.key, cache._contents().key)
    cache = contiguous()
    assert cache.key.shape == (2, 3, 0, 8)
    assert cache.key_scale is cache.value_scale is None
    lengths = cache.lengths
    lengths[:] = 9
    assert cache.lengths.max() == 0


def test_truncate_and_reorder():
    cache, (key, value) = na.KVCache(4, 3, 9, 8, 6), tokens(n=4, T=9)
    cache.append(key, value, [9, 2, 7, 0])
    cache.truncate([8, 2, 3, 0])
    cache.reorder([2, 0, 0, 3])
    np.testing.assert_array_equal(cache.lengths, [3, 8, 8, 0])
    equal(cache, [(key[i, :, :n], value[i, :, :n]) for i, n in ((2, 3), (0, 8), (0, 8), (3, 0))])
    cache.truncate(0)
    assert cache.lengths.max() == 0
    cache.append(key, value)  # one length again
    equal(cache, [(key[i], value[i]) for i in range(4)])


def test_swapping_long_sequences_takes_no_second_cache():
    """In blocks of tokens, and both ways at once."""
    key, value = tokens(T=20_000)
    cache = contiguous(20_000, storage="float8")
    cache.append(key, value)
    want = [x[::-1].copy() for x in (cache.key, cache.value, cache.key_scale, cache.value_scale)]
    tracemalloc.start()
    cache.reorder([1, 0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < sum(x.nbytes for x in want) / 5
    for got, x in zip((cache.key, cache.value, cache.key_scale, cache.value_scale), want, strict=True):
        np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize(
    "make", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "deepcopy", "pickle"]
)
def test_a_copy_is_on_its_own(make):
    key, value = tokens()
    cache, pages = contiguous(storage="int8"), paged(storage="int8")
    cache.append(key, value)
    pages.append(pages.add(2), key, value)
    for one in (cache, pages):
        before, other = state(one), make(one)
        assert state(other) == before
        other.append(*([] if one is cache else [[0, 1]]), key[:, :, :1], value[:, :, :1])
        assert other._contents().dense()[0].shape[2] == 6
        assert state(one) == before


def test_repr_says_what_matters():
    cache = contiguous(storage="float8")
    cache.append(*tokens(), [2, 5])
    assert repr(cache) == (
        "KVCache(batch=2, num_kv_heads=3, capacity=20, head_dim=8, value_dim=6, dtype=float32, storage=float8_e4m3fn), "
        "lengths 2 to 5"
    )
    assert repr(paged()).endswith("0 sequences, 8 pages free")


@pytest.mark.parametrize("E", [1, 16, 24])
@pytest.mark.parametrize("storage", STORAGES)
def test_memory_begins_at_a_cache_line(storage, E):
    for cache in (na.KVCache(2, 3, 5, E, storage=storage), na.PagedKVCache(3, 5, 2, E, storage=storage)):
        for x in cache._contents()[:4]:
            if x is not None:
                assert x.ctypes.data % 64 == 0
                assert x.flags.c_contiguous


def test_contents_cost_nothing():
    cache = contiguous()
    contents = cache._contents()
    cache.append(*tokens())
    assert cache._contents() is contents
    np.testing.assert_array_equal(contents.lengths, [5, 5])


# Storage.


def formats(x, storage):
    codes, scale = storage_format(storage, x.dtype).encode(x)
    return codes, scale, decode(codes, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [1e-3, 1, 1e3])
def test_error_of_eight_bits(dtype, magnitude):
    x = (normal(50, 64) * magnitude).astype(DTYPES[dtype])
    wide = x.astype(np.float64)
    largest = np.abs(wide).max(-1, keepdims=True)
    for storage, limit in (("int8", 127), ("float8", 448)):
        codes, scale, got = formats(x, storage)
        assert scale.dtype == np.float32
        assert scale.shape == (50,)
        np.testing.assert_allclose(scale, largest[:, 0] / limit, rtol=1e-6)
        np.testing.assert_array_equal(np.abs(codes.astype(np.float64)).max(-1), limit)  # the whole range is in use
        step = largest / limit
        # int8: half a step. e4m3: four significant bits, or below 2**-6 half a step of 2**-9.
        bound = step / 2 if storage == "int8" else np.maximum(np.abs(wide) / 16, step * 2**-10)
        assert (np.abs(got - wide) <= bound * (1 + 1e-5)).all()
        assert np.abs(got - wide).max() > (bound / 4).max()  # the bound says something


def test_rounding_is_that_of_ml_dtypes():
    x = np.concatenate([normal(1000), normal(1000) * 1e-6, [0, -0.0, np.inf, -np.inf, np.nan]]).astype(np.float32)
    for storage in ("float16", "bfloat16"):
        codes, scale, _ = formats(x, storage)
        assert scale is None
        assert codes.tobytes() == x.astype(DTYPES[storage]).tobytes()
    # With 448 in each row the scale is 1.
    x = np.arange(-448, 448, 0.125, np.float32).reshape(-1, 64)
    x[:, 0] = 448
    codes, scale, _ = formats(x, "float8")
    np.testing.assert_array_equal(scale, 1)
    assert codes.tobytes() == x.astype(F8).tobytes()


def test_all_codes_of_eight_bits_survive():
    """What was read once is stored again as the same codes."""
    every = np.arange(256, dtype=np.uint8).view(F8).astype(np.float32)
    x = every[np.isfinite(every)]
    _, _, got = formats(x, "float8")
    np.testing.assert_array_equal(got, x)
    x = np.arange(-127, 128, dtype=np.float32) * 3
    codes, _, got = formats(x, "int8")
    np.testing.assert_array_equal(codes, np.arange(-127, 128))
    np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("storage", ["int8", "float8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_at_the_edges(storage, dtype):
    kind = DTYPES[dtype]
    x = np.zeros((6, 8), kind)
    x[1, 3], x[2, 3], x[3, 3] = np.nan, np.inf, -np.inf
    x[1:4, 5] = 2
    x[4] = ml_dtypes.finfo(kind).smallest_subnormal
    x[5] = ml_dtypes.finfo(kind).max
    x[5, 0] = -x[5, 0]
    with np.errstate(all="raise"):
        codes, scale, got = formats(x, storage)
    assert not codes[:4].astype(np.float32).any()
    np.testing.assert_array_equal(scale[0], 0)
    assert not np.signbit(scale[0])
    np.testing.assert_array_equal(got[0], 0)
    assert np.isnan(got[1:4]).all()
    if dtype == "float16":
        np.testing.assert_allclose(got[4], x[4].astype(np.float64), rtol=1e-6)
    else:  # too small for a code of a scale that is not subnormal
        np.testing.assert_allclose(got[4], 0, atol=1e-38)
        assert scale[4] == np.finfo(np.float32).tiny
    most = np.finfo(np.float32).max  # beyond which numbers saturate
    np.testing.assert_allclose(got[5], np.clip(x[5].astype(np.float64), -most, most), rtol=1e-6)


@pytest.mark.parametrize("lengths", [None, [2]], ids=["whole", "ragged"])
@pytest.mark.parametrize(
    ("dtype", "storage", "number", "most"),
    [
        ("float32", "float16", 70000, 65504),
        ("float64", "float16", 1e300, 65504),
        ("bfloat16", "float16", 1e30, 65504),
        ("float32", "bfloat16", np.finfo("f4").max, 255 * 2.0**120),
        ("float64", "bfloat16", 1e300, 255 * 2.0**120),
        ("float64", "int8", 1e300, np.finfo("f4").max),
        ("float64", "float8", 1e300, np.finfo("f4").max),
        ("float32", "int8", np.finfo("f4").max, np.finfo("f4").max),
        ("float32", "float8", np.finfo("f4").max, np.finfo("f4").max),
    ],
)
def test_finite_numbers_saturate(dtype, storage, number, most, lengths):
    kind = DTYPES[dtype]
    x = np.array([number, -number, 0, number], kind).reshape(1, 1, 1, 4)
    x = np.concatenate([x, x], axis=2)
    whole, pages = (
        na.KVCache(1, 1, 4, 4, dtype=kind, storage=storage),
        na.PagedKVCache(2, 4, 1, 4, dtype=kind, storage=storage),
    )
    with np.errstate(all="raise"):
        whole.append(x, x, lengths)
        pages.append(pages.add(), x, x, lengths)
    for cache in (whole, pages):
        key, value = cache._contents().dense()
        expected = np.array([most, -most, 0, most])
        np.testing.assert_allclose(key[0, 0], [expected] * 2, rtol=1e-6)
        np.testing.assert_allclose(value[0, 0], [expected] * 2, rtol=1e-6)


def test_what_a_kernel_reads_of_pages_does_not_change():
    """A sequence that another thread shortens, frees, lengthens or replaces names no page -1 in a call that runs."""
    key, value = tokens(n=3, T=9)

    def add_tokens(cache):
        for _ in range(4):
            cache.append([1, 2], key[:2], value[:2])

    for change in (
        lambda cache: cache.truncate(1, 2),
        lambda cache: cache.free(1),
        lambda cache: cache.free(0),
        lambda cache: cache.reorder([0, 1], [2, 2]),
        lambda cache: cache.fork(0),
        lambda cache: cache.add(3),
        add_tokens,
    ):
        for ids in (None, [0, 1, 2], [1]):
            cache = paged(60)
            cache.append(cache.add(3), key, value)
            contents = cache._contents(ids)
            table, lengths = contents.table.copy(), contents.lengths.copy()
            change(cache)
            np.testing.assert_array_equal(contents.table, table)
            np.testing.assert_array_equal(contents.lengths, lengths)
            assert (contents.table >= 0).all()


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_infinities_and_nan_stay_as_they_are(storage):
    x = np.array([np.inf, -np.inf, np.nan, 1], np.float32).reshape(1, 1, 1, 4)
    cache = na.KVCache(1, 1, 4, 4, storage=storage)
    cache.append(x, x)
    np.testing.assert_array_equal(cache.key[0, 0, 0].astype(np.float32), x[0, 0, 0])


@pytest.mark.parametrize("storage", ["int8", "float8"])
def test_long_prompts_are_encoded_as_short_ones(storage):
    key, value = tokens(n=2, T=3000)
    assert key.size > 2 * 2**16  # several blocks
    plain, pages = contiguous(3000, storage=storage), paged(1500, storage=storage)
    ids = pages.add(2)
    plain.append(key, value)
    pages.append(ids, key, value)
    want = [storage_format(storage, key.dtype).encode(x) for x in (key, value)]
    for (codes, scale), got, got_scale in zip(
        want, (plain.key, plain.value), (plain.key_scale, plain.value_scale), strict=True
    ):
        np.testing.assert_array_equal(got, codes)
        np.testing.assert_array_equal(got_scale, scale)
    for a, b in zip(plain._contents().dense(), pages._contents().dense(), strict=True):
        np.testing.assert_array_equal(a, b)


SAME = [("float8", "float8_e4m3fn"), ("float8", F8), ("int8", np.int8), ("float16", np.dtype(np.float16))]
SAME += [("bfloat16", ml_dtypes.bfloat16), (None, "float32"), (None, np.float32)]


@pytest.mark.parametrize(("name", "other"), SAME)
def test_names_of_storage(name, other):
    assert contiguous(storage=other).storage == contiguous(storage=name).storage
    assert paged(storage=other)._contents().key.dtype == paged(storage=name)._contents().key.dtype


def test_dtype_by_name():
    assert contiguous(dtype="bfloat16").dtype == ml_dtypes.bfloat16
    assert contiguous(dtype=float).dtype == np.float64


def test_ml_dtypes_is_imported_when_asked_for():
    code = """
import sys, numpy as np, numba_attention as na
for dtype in (np.float32, np.float64, np.float16):
    for storage in (None, "float16", "int8"):
        x = np.ones((1, 1, 2, 4), dtype)
        na.KVCache(1, 1, 4, 4, dtype=dtype, storage=storage).append(x, x)
        cache = na.PagedKVCache(1, 4, 1, 4, dtype=dtype, storage=storage)
        cache.append(cache.add(), x, x)
assert "ml_dtypes" not in sys.modules
na.KVCache(1, 1, 4, 4, storage="float8")
assert "ml_dtypes" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kwargs", [{"storage": "float8"}, {"storage": "bfloat16"}, {"dtype": "bfloat16"}], ids=str)
def test_without_ml_dtypes(monkeypatch, kwargs):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    for make in (contiguous, paged):
        with pytest.raises(ImportError, match=r'pip install "numba-attention\[bfloat16\]"'):
            make(**kwargs)
        assert make(storage="int8").storage == "int8"


# Full, and all or nothing.


def test_full():
    assert issubclass(na.CacheFullError, ValueError)
    cache, (key, value) = contiguous(12), tokens(T=10)
    cache.append(key, value)
    cache.append(key[:, :, :2], value[:, :, :2])  # to the last
    cache.truncate([12, 9])
    before = state(cache)
    with pytest.raises(na.CacheFullError, match="5 more tokens are needed and 3 are free: sequence 1 has 9 of a cap"):
        cache.append(key, value, [0, 5])
    assert state(cache) == before
    cache.truncate(9)
    with pytest.raises(na.CacheFullError, match="10 more tokens are needed and 3 are free"):
        cache.append(key, value)


def test_out_of_pages():
    cache, (key, value) = paged(num_pages=5), tokens(T=10)
    ids = cache.add(2)
    cache.append(ids, key, value, [10, 1])
    other = cache.fork(ids[0])
    before = state(cache)
    message = r"3 pages are needed \(1 of them to copy pages that are shared\) and 1 of 5 are free"
    with pytest.raises(na.CacheFullError, match=message):
        cache.append([ids[1], other], key, value, [4, 3])
    assert state(cache) == before
    cache.append([ids[1]], key[:1], value[:1], 7)
    with pytest.raises(na.CacheFullError, match=r"^1 pages are needed and 0 of 5 are free"):
        cache.append([ids[1]], key[:1], value[:1], 1)
    cache.free(other)
    cache.append([ids[0]], key[:1], value[:1], 2)  # nobody else holds its last page now
    check_pages(cache)


class Broken(Exception):
    pass


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("order", [1, -1])
def test_failure_half_way_changes_nothing(monkeypatch, calls, order):
    """Not even where forks of different lengths write to one page."""
    cache, (key, value) = paged(storage="int8"), tokens(T=4)
    first = cache.add()[0]
    cache.append([first], key[:1], value[:1], 3)
    second = cache.fork(first)
    cache.truncate(second, 1)
    plain = contiguous(storage="int8")
    plain.append(key, value, [3, 1])
    kept, made = [state(plain), state(cache)], []
    encode = type(plain._form).encode

    def fail(form, x):
        made.append(x)
        if len(made) > calls:
            raise Broken
        return encode(form, x)

    monkeypatch.setattr(type(plain._form), "encode", fail)
    with pytest.raises(Broken):
        plain.append(key, value)
    made.clear()
    with pytest.raises(Broken):
        cache.append([first, second][::order], key, value)
    assert [state(plain), state(cache)] == kept


def test_rows_that_share_a_page_may_all_write_to_it():
    """As many copies as it takes, less one if nobody else needs the page."""
    cache, (key, value) = paged(num_pages=3), tokens(n=3, T=4)
    first = cache.add()[0]
    cache.append([first], key[:1], value[:1], 3)
    ids = [first, cache.fork(first), cache.fork(first)]
    cache.truncate(ids[1], 1)
    before = [(key[0, :, :n], value[0, :, :n]) for n in (3, 1, 3)]
    cache.append(ids, key, value, 1)
    want = [
        tuple(np.concatenate([old, new[i, :, :1]], axis=1) for old, new in zip(pair, (key, value), strict=True))
        for i, pair in enumerate(before)
    ]
    equal(cache, want)
    assert cache.free_pages == 0
    check_pages(cache)


# Pages.


def test_pages_are_taken_and_given_back():
    cache, (key, value) = paged(), tokens(n=1, T=9)
    (first,) = cache.add()
    assert cache.free_pages == 8
    cache.append([first], key, value, 4)
    assert cache.free_pages == 7  # a full page, and none ahead
    cache.append([first], key, value, 1)
    assert cache.free_pages == 6
    cache.truncate(first, 4)
    assert cache.free_pages == 7
    second = cache.fork(first)
    cache.append([second], key, value)
    assert cache.free_pages == 4
    cache.free(first)
    assert cache.free_pages == 4
    cache.free(second)
    assert cache.free_pages == 8
    assert cache.ids.size == 0
    check_pages(cache)


def test_ids_are_never_given_twice():
    cache = paged()
    first = cache.add(3)
    np.testing.assert_array_equal(first, [0, 1, 2])
    assert first.dtype == np.int64
    cache.free(2)
    assert cache.fork(0) == 3
    cache.free(3)
    np.testing.assert_array_equal(cache.add(), [4])
    np.testing.assert_array_equal(cache.ids, [0, 1, 4])
    assert cache.add(0).shape == (0,)


def test_copy_on_write():
    cache, (key, value) = paged(storage="int8"), tokens(n=1, T=6)
    (first,) = cache.add()
    cache.append([first], key, value)
    other = cache.fork(first)
    assert cache.free_pages == 6
    want = cache._contents([first]).dense()
    new = tokens(n=1, T=1, seed=7)
    cache.append([other], *new)
    np.testing.assert_array_equal(cache.block_table(), [[0, 1], [0, 2]])  # the full page is still shared
    for got, kept, x in zip(cache._contents([other]).dense(), want, new, strict=True):
        np.testing.assert_array_equal(got[:, :, :6], kept)
        np.testing.assert_array_equal(got[:, :, 6:], read_back(x, "int8"))
    for got, kept in zip(cache._contents([first]).dense(), want, strict=True):
        np.testing.assert_array_equal(got, kept)
    cache.append([first], *new)  # on its own now
    np.testing.assert_array_equal(cache.block_table(), [[0, 1], [0, 2]])
    check_pages(cache)


def test_fork_at_the_end_of_a_page_copies_nothing():
    cache, (key, value) = paged(), tokens(n=1, T=4)
    (first,) = cache.add()
    cache.append([first], key, value)
    cache.append([cache.fork(first)], key, value, 1)
    np.testing.assert_array_equal(cache.block_table(), [[0, -1], [0, 1]])
    check_pages(cache)


def test_beams():
    cache, (key, value) = paged(num_pages=20), tokens(n=3, T=6)
    ids = cache.add(3)
    cache.append(ids, key, value, [6, 3, 5])
    cache.reorder(ids, ids[[1, 2, 1]])
    want = [(key[i, :, :n], value[i, :, :n]) for i, n in ((1, 3), (2, 5), (1, 3))]
    equal(cache, want)
    assert cache.free_pages == 17
    check_pages(cache)
    cache.reorder(ids[:2], ids[[1, 0]])
    equal(cache, [want[1], want[0], want[2]])
    equal(cache, want, ids[[1, 0, 2]])
    np.testing.assert_array_equal(cache.lengths(ids[[1, 1]]), [3, 3])


# from_arrays.


@pytest.mark.parametrize("layout", ["C", "tokens first"])
def test_from_arrays_copies_nothing(layout):
    key, value = tokens(T=10)
    if layout == "tokens first":
        key, value = (x.swapaxes(1, 2).copy().swapaxes(1, 2) for x in (key, value))
    cache = na.KVCache.from_arrays(key, value, [4, 2])
    for mine, given in zip(cache._contents()[:2], (key, value), strict=True):
        assert mine.ctypes.data == given.ctypes.data
        assert mine.strides == given.strides
    equal(cache, [(key[i, :, :n], value[i, :, :n]) for i, n in ((0, 4), (1, 2))])
    new = tokens(T=3, seed=5)
    cache.append(*new)
    np.testing.assert_array_equal(key[0, :, 4:7], new[0][0])
    np.testing.assert_array_equal(value[1, :, 2:5], new[1][1])
    full = na.KVCache.from_arrays(key, value)
    assert full.capacity == 10
    np.testing.assert_array_equal(full.lengths, 10)


def test_from_arrays_keeps_its_own_lengths():
    key, value = tokens(T=10)
    lengths = np.array([4, 2])
    cache = na.KVCache.from_arrays(key, value, lengths)
    cache.append(*tokens(T=1))
    np.testing.assert_array_equal(lengths, [4, 2])


def test_pages_from_arrays():
    key, value = normal(6, 3, 4, 8), normal(6, 3, 4, 6, seed=1)
    table, lengths = np.array([[5, 2, 99], [5, 2, -7], [0, 4, 1]]), np.array([7, 6, 12])
    cache = na.PagedKVCache.from_arrays(key, value, table, lengths)
    assert cache._contents().key.ctypes.data == key.ctypes.data
    np.testing.assert_array_equal(cache.ids, [0, 1, 2])
    np.testing.assert_array_equal(cache.block_table(), [[5, 2, -1], [5, 2, -1], [0, 4, 1]])
    assert cache.free_pages == 1
    check_pages(cache)
    want = [
        tuple(np.concatenate(x[pages], axis=1)[:, :n] for x in (key, value))
        for pages, n in (([5, 2], 7), ([5, 2], 6), ([0, 4, 1], 12))
    ]
    equal(cache, want)
    shared, new = key[2].copy(), tokens(n=1, T=1, seed=4)
    cache.append([1], *new)
    np.testing.assert_array_equal(key[2], shared)
    np.testing.assert_array_equal(key[3, :, 2], new[0][0, :, 0])  # the one page that was free
    np.testing.assert_array_equal(cache.block_table([1]), [[5, 3]])
    check_pages(cache)
    assert table[0, 2] == 99


def test_a_page_named_twice_by_one_sequence():
    key, value = normal(4, 3, 4, 8), normal(4, 3, 4, 6, seed=1)
    cache = na.PagedKVCache.from_arrays(key, value, [[1, 1, 1]], 10)
    check_pages(cache)
    kept = cache._contents().dense()[0]
    new = tokens(n=1, T=1)
    cache.append([0], *new)
    np.testing.assert_array_equal(cache._contents().dense()[0][:, :, :10], kept)
    np.testing.assert_array_equal(cache._contents().dense()[0][:, :, 10:], new[0])
    check_pages(cache)
    cache.truncate(0, 4)
    check_pages(cache)
    cache.free(0)
    check_pages(cache)
    assert cache.free_pages == 4


def test_arrays_that_cannot_be_written_to():
    key, value = tokens()
    read_only = value.copy()
    read_only.flags.writeable = False
    zeros = np.lib.stride_tricks.as_strided(key, strides=(0, *key.strides[1:]))
    made_from = {
        "read-only arrays": (key, read_only),
        "arrays that overlap themselves": (zeros, value),
        "a key and a value that share memory": (key, key[..., :6]),
    }
    for reason, pair in made_from.items():
        cache = na.KVCache.from_arrays(*pair, 2)
        pages = na.PagedKVCache.from_arrays(*pair, [[0], [1]], 2)
        before = [state(cache), state(pages)]
        for call in (
            lambda cache=cache: cache.append(key, value, 1),
            lambda cache=cache: cache.reorder([1, 0]),
            lambda pages=pages: pages.append([0, 1], key, value, 1),
        ):
            with pytest.raises(ValueError, match=f"made from {reason} and cannot be written to; pass copies"):
                call()
        assert [state(cache), state(pages)] == before
        cache.truncate([1, 2])
        pages.truncate(0, 1)
        pages.reorder([0], [1])
        pages.fork(0)


@pytest.mark.parametrize("storage", ["int8", "float8", "float16", "bfloat16"])
def test_from_arrays_of_fewer_bits(storage):
    """What one cache stores makes another, which reads the same and stores the same."""
    key, value = tokens(T=10)
    cache = na.KVCache(2, 3, 16, 8, 6, storage=storage)
    cache.append(key, value, [7, 5])
    held = cache._contents()[:4]
    scales = {} if held[2] is None else {"key_scale": held[2], "value_scale": held[3]}
    other = na.KVCache.from_arrays(*(x.copy() for x in held[:2]), [7, 5], dtype=np.float32,
                                   **{name: x.copy() for name, x in scales.items()})  # fmt: skip
    assert (other.dtype, other.storage) == (cache.dtype, cache.storage)
    query = normal(2, 6, 1, 8)
    for _ in range(2):
        want = na.attention_decode(query, cache)
        np.testing.assert_array_equal(na.attention_decode(query, other), want)
        cache.append(key[:, :, :2], value[:, :, :2])
        other.append(key[:, :, :2], value[:, :, :2])
    if scales:  # the dtype is that of queries, and float32 unless said
        assert na.KVCache.from_arrays(*held[:2], 1, **scales).dtype == np.float32
        assert na.KVCache.from_arrays(*held[:2], 1, **scales, dtype="float16").dtype == np.float16
    else:
        assert na.KVCache.from_arrays(*held[:2], 1).dtype == held[0].dtype
    # The same as pages, of eight tokens: sequence after sequence.
    pages = {
        name: np.ascontiguousarray(x.reshape(2, 3, 2, 8, *x.shape[3:]).swapaxes(1, 2)).reshape(4, 3, 8, *x.shape[3:])
        for name, x in zip(("key_pages", "value_pages", *scales), held[: 2 + len(scales)], strict=True)
    }
    lengths = cache.lengths
    paged = na.PagedKVCache.from_arrays(**pages, block_table=[[0, 1], [2, 3]], lengths=lengths, dtype=np.float32)
    np.testing.assert_array_equal(na.attention_decode(query, paged), na.attention_decode(query, cache))


def test_key_and_value_of_one_array():
    both = np.zeros((2, 10, 2, 3, 8), np.float32)
    key, value = both[:, :, 0].swapaxes(1, 2), both[:, :, 1].swapaxes(1, 2)
    cache = na.KVCache.from_arrays(key, value, 0)
    cache.append(key[:, :, :1] + 1, value[:, :, :1] + 2)
    assert both.sum() == 2 * 3 * 8 * 3


# Misuse: the exception, a message that names the argument, and a cache that is as it was.

KEY, VALUE = tokens()
HELD = (KEY, VALUE)
PAGES = (KEY, VALUE, [[0], [1]], 3)
SIZES = [
    ("batch must be at least 1, got 0", lambda: na.KVCache(0, 1, 1, 1)),
    ("num_kv_heads must be at least 1", lambda: na.KVCache(1, 0, 1, 1)),
    ("capacity must be at least 0, got -1", lambda: na.KVCache(1, 1, -1, 1)),
    ("head_dim must be at least 1", lambda: na.KVCache(1, 1, 1, 0)),
    ("value_dim must be at least 1", lambda: na.KVCache(1, 1, 1, 1, 0)),
    ("num_pages must be at least 1", lambda: na.PagedKVCache(0, 1, 1, 1)),
    ("page_size must be at least 1", lambda: na.PagedKVCache(1, 0, 1, 1)),
    ("num_kv_heads must be at least 1", lambda: na.PagedKVCache(1, 1, 0, 1)),
    ("head_dim must be at least 1", lambda: na.PagedKVCache(1, 1, 1, -3)),
    ("value_dim must be at least 1", lambda: na.PagedKVCache(1, 1, 1, 1, 0)),
    ("storage must be None .* got 'int4'", lambda: contiguous(storage="int4")),
    ("storage must be None .* got 'float64'", lambda: paged(storage="float64")),
    ("storage must be None .* got <class 'int'>", lambda: paged(storage=int)),
]
KINDS = [
    ("batch must be an integer, got 1.0", lambda: na.KVCache(1.0, 1, 1, 1)),
    ("page_size must be an integer, got True", lambda: na.PagedKVCache(1, True, 1, 1)),
    ("dtype must be float32, .* got <class 'int'>", lambda: contiguous(dtype=int)),
    ("dtype must be float32, .* got None", lambda: contiguous(dtype=None)),
    ("dtype must be float32, .* got 'float31'", lambda: paged(dtype="float31")),
    ("dtype must be float32, .* got '>f4'", lambda: paged(dtype=">f4")),
    ("storage must be None, a string or a dtype, got 8", lambda: paged(storage=8)),
]


@pytest.mark.parametrize(("words", "call"), SIZES, ids=[words for words, _ in SIZES])
def test_bad_values(words, call):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(("words", "call"), KINDS, ids=[words for words, _ in KINDS])
def test_bad_types(words, call):
    with pytest.raises(TypeError, match=words):
        call()


# What is wrong with (key, value, lengths) for 2 sequences.
TOKENS = [
    (TypeError, r"key must be a numpy.ndarray, got builtins.list; .* numpy.asarray\(key\)", (KEY.tolist(), VALUE)),
    (TypeError, "value must be a numpy.ndarray, got builtins.NoneType", (KEY, None)),
    (TypeError, "value must be a numpy.ndarray, got numpy.ma", (KEY, np.ma.masked_array(VALUE))),
    (
        TypeError,
        r"key must have the dtype of the cache, float32, got float64; .* key.astype\(",
        (KEY.astype(np.float64), VALUE),
    ),
    (TypeError, "value must have the dtype of the cache, float32, got float16", (KEY, VALUE.astype(np.float16))),
    (TypeError, "key must have the dtype of the cache, float32, got >f4", (KEY.astype(">f4"), VALUE)),
    (ValueError, r"key must have 4 axes, got shape \(3, 5, 8\)", (KEY[0], VALUE[0])),
    (ValueError, r"key must have shape \(2, 3, T, 8\), got \(1, 3, 5, 8\)", (KEY[:1], VALUE)),
    (ValueError, r"key must have shape \(2, 3, T, 8\), got \(2, 3, 5, 7\)", (KEY[..., 1:], VALUE)),
    (ValueError, r"value must have shape \(2, 3, 5, 6\), got \(2, 3, 4, 6\)", (KEY, VALUE[:, :, 1:])),
    (ValueError, r"value must have shape \(2, 3, 5, 6\), got \(2, 3, 5, 8\)", (KEY, KEY)),
    (ValueError, r"value must have shape \(2, 3, 5, 6\), got \(2, 1, 5, 6\)", (KEY, VALUE[:, :1])),
    (TypeError, "lengths must be integer, got float64", (KEY, VALUE, [1.0, 2.0])),
    (TypeError, "lengths must be integer, got bool", (KEY, VALUE, [True, False])),
    (TypeError, "lengths must not mix truth values with numbers", (KEY, VALUE, [1, False])),
    (TypeError, "lengths is a masked array", (KEY, VALUE, np.ma.masked_array([1, 2]))),
    (ValueError, "lengths is not an array", (KEY, VALUE, [[1], [2, 3]])),
    (ValueError, r"lengths must be an integer or of shape \(2,\), .* got \(3,\)", (KEY, VALUE, [1, 2, 3])),
    (
        ValueError,
        "lengths must lie between 0 and the number of tokens given, 5, got 6 for se.* 1",
        (KEY, VALUE, [5, 6]),
    ),
    (ValueError, "lengths must lie between 0 and .* got -1 for sequence 0", (KEY, VALUE, [-1, 0])),
    (ValueError, "lengths must lie within", (KEY, VALUE, np.array([2**63, 0], np.uint64))),
]


@pytest.mark.parametrize(("kind", "words", "given"), TOKENS, ids=[words for _, words, _ in TOKENS])
@pytest.mark.parametrize("storage", [None, "int8"])
@pytest.mark.parametrize("held", [[3, 3], [3, 1]], ids=["even", "uneven"])
def test_bad_tokens(kind, words, given, storage, held):
    cache, pages = contiguous(storage=storage), paged(storage=storage)
    ids = pages.add(2)
    cache.append(KEY, VALUE, held)
    pages.append(ids, KEY, VALUE, held)
    before = [state(cache), state(pages)]
    with pytest.raises(kind, match=words):
        cache.append(*given)
    with pytest.raises(kind, match=words):
        pages.append(ids, *given)
    assert [state(cache), state(pages)] == before


CONTIGUOUS = [
    (ValueError, "lengths must lie between 0 and the current length, 3, got 4 for seq", lambda x: x.truncate([5, 4])),
    (ValueError, "lengths must lie between 0 and the current length, 3, got 4 for seq", lambda x: x.truncate(4)),
    (ValueError, "lengths must lie between .* got -1", lambda x: x.truncate(-1)),
    (TypeError, "lengths must be integer", lambda x: x.truncate(1.5)),
    (ValueError, r"index must have shape \(2,\), got \(3,\)", lambda x: x.reorder([0, 1, 0])),
    (ValueError, r"index must have shape \(2,\), got \(\)", lambda x: x.reorder(0)),
    (ValueError, "index must lie between 0 and 1, got 0 to 2", lambda x: x.reorder([0, 2])),
    (ValueError, "index must lie between 0 and 1, got -1 to 0", lambda x: x.reorder([0, -1])),
    (TypeError, "index must be integer, got bool", lambda x: x.reorder([True, False])),
]


@pytest.mark.parametrize(("kind", "words", "call"), CONTIGUOUS, ids=[words for _, words, _ in CONTIGUOUS])
def test_misuse(kind, words, call):
    cache = contiguous()
    cache.append(KEY, VALUE, [5, 3])
    before = state(cache)
    with pytest.raises(kind, match=words):
        call(cache)
    assert state(cache) == before


PAGED = [
    (KeyError, "no sequence has the id 2: it was freed, or never added", lambda x: x.free(2)),
    (KeyError, "no sequence has the id 7", lambda x: x.fork(7)),
    (KeyError, "no sequence has the id -1", lambda x: x.truncate(-1, 0)),
    (KeyError, "no sequence has the id 2", lambda x: x.append([0, 2], KEY, VALUE)),
    (KeyError, "no sequence has the id 9", lambda x: x.reorder([0, 1], [1, 9])),
    (KeyError, "no sequence has the id 9", lambda x: x.reorder([9, 1], [1, 0])),
    (KeyError, "no sequence has the id 3", lambda x: x.lengths([0, 3])),
    (KeyError, "no sequence has the id 3", lambda x: x.block_table([3])),
    (KeyError, "no sequence has the id -1", lambda x: x._contents([-1])),
    (ValueError, "ids must be distinct, got 1 twice", lambda x: x.append([1, 1], KEY, VALUE)),
    (ValueError, "ids must be distinct, got 0 twice", lambda x: x.reorder([0, 1, 0], [1, 0, 1])),
    (ValueError, "sources must be as many as ids, 2, got 1", lambda x: x.reorder([0, 1], [1])),
    (ValueError, r"ids must have shape \(n,\), got \(\)", lambda x: x.append(0, KEY, VALUE)),
    (ValueError, r"key must have shape \(1, 3, T, 8\), got \(2", lambda x: x.append([0], KEY, VALUE)),
    (TypeError, "ids must be integer, got float64", lambda x: x.append([0.0, 1.0], KEY, VALUE)),
    (TypeError, r"id must be an integer, got \[0\]", lambda x: x.free([0])),
    (TypeError, "id must be integer, got float64", lambda x: x.fork(0.0)),
    (TypeError, "id must be integer, got bool", lambda x: x.free(True)),
    (TypeError, "ids must not mix truth values with numbers", lambda x: x.lengths([0, True])),
    (ValueError, "length must lie between 0 and the current length, 5, got 6", lambda x: x.truncate(0, 6)),
    (ValueError, "length must be at least 0, got -1", lambda x: x.truncate(0, -1)),
    (TypeError, "length must be an integer, got 1.0", lambda x: x.truncate(0, 1.0)),
    (ValueError, "n must be at least 0", lambda x: x.add(-1)),
    (TypeError, "n must be an integer", lambda x: x.add(1.0)),
]


@pytest.mark.parametrize(("kind", "words", "call"), PAGED, ids=[words for _, words, _ in PAGED])
def test_misuse_of_pages(kind, words, call):
    cache = paged()
    cache.append(cache.add(2), KEY, VALUE, [5, 3])
    cache.free(cache.fork(0))
    before = state(cache)
    with pytest.raises(kind, match=words):
        call(cache)
    assert state(cache) == before


def test_no_sequence_in_an_empty_cache():
    for wrong in (0, -1):
        with pytest.raises(KeyError, match="no sequence has the id"):
            paged().free(wrong)
    empty = paged()
    assert empty.block_table().shape == (0, 0)
    assert empty.lengths().shape == (0,)
    empty.append([], KEY[:0], VALUE[:0])
    assert empty._contents().dense()[0].shape == (0, 3, 0, 8)


CODES = np.zeros((2, 3, 5, 8), np.int8), np.zeros((2, 3, 5, 6), np.int8)
SCALES = {"key_scale": np.ones((2, 3, 5), np.float32), "value_scale": np.ones((2, 3, 5), np.float32)}
FEWER = {
    (TypeError, "key_scale must be given with int8"): {"key_scale": None},
    (TypeError, "value_scale must be a numpy.ndarray, got builtins.float"): {"value_scale": 1.0},
    (TypeError, "value_scale must have dtype float32 in native byte order, got float64"): {
        "value_scale": np.ones((2, 3, 5))
    },
    (ValueError, r"key_scale must have shape \(2, 3, 5\), a factor .* got \(2, 3, 1\)"): {
        "key_scale": np.ones((2, 3, 1), np.float32)
    },
    (ValueError, "key_scale must have contiguous tokens"): {"key_scale": np.ones((2, 3, 10), np.float32)[..., ::2]},
    (ValueError, "key must have contiguous features"): {"key": np.zeros((2, 3, 5, 16), np.int8)[..., ::2]},
    (TypeError, "dtype must be float32, float64, float16 or"): {"dtype": np.int8},
    (TypeError, "value must have the dtype of key, int8, got float32"): {"value": VALUE},
}


@pytest.mark.parametrize(("error", "message"), FEWER)
def test_bad_arrays_of_fewer_bits(error, message):
    given = {"key": CODES[0], "value": CODES[1], **SCALES}
    na.KVCache.from_arrays(**given)
    with pytest.raises(error, match=message):
        na.KVCache.from_arrays(**given | FEWER[error, message])


FROM_ARRAYS = [
    (TypeError, "key_scale must be None where keys and", lambda: na.KVCache.from_arrays(KEY, VALUE, **SCALES)),
    (
        TypeError,
        "key must have the dtype float16 of queries, or hold fewer bits: .*; got float32",
        lambda: na.KVCache.from_arrays(KEY, VALUE, dtype=np.float16),
    ),
    (TypeError, "key must be a numpy.ndarray", lambda: na.KVCache.from_arrays([1], VALUE)),
    (TypeError, "key must have dtype .* got int64", lambda: na.KVCache.from_arrays(KEY.astype(int), VALUE)),
    (TypeError, "key must have dtype .* got >f4", lambda: na.KVCache.from_arrays(KEY.astype(">f4"), VALUE)),
    (TypeError, "value must have the dtype of key", lambda: na.KVCache.from_arrays(KEY, VALUE.astype(np.float64))),
    (ValueError, "value must have 4 axes", lambda: na.KVCache.from_arrays(KEY, VALUE[0])),
    (ValueError, r"value must have shape \(2, 3, 5, Ev\)", lambda: na.KVCache.from_arrays(KEY, VALUE[:, :, 1:])),
    (ValueError, "batch must be at least 1", lambda: na.KVCache.from_arrays(KEY[:0], VALUE[:0])),
    (ValueError, "lengths must lie between 0 and the capacity, 5, got 6", lambda: na.KVCache.from_arrays(*HELD, 6)),
    (ValueError, "lengths must be an integer or of shape", lambda: na.KVCache.from_arrays(*HELD, [1])),
    (TypeError, "key_pages must be a numpy.ndarray", lambda: na.PagedKVCache.from_arrays(None, *PAGES[1:])),
    (
        TypeError,
        "value_pages must have the dtype of key_pages",
        lambda: na.PagedKVCache.from_arrays(KEY, VALUE * 1j, [], 0),
    ),
    (
        ValueError,
        "page_size must be at least 1",
        lambda: na.PagedKVCache.from_arrays(KEY[:, :, :0], VALUE[:, :, :0], [], 0),
    ),
    (
        ValueError,
        r"key_pages must have contiguous features; pass numpy.ascontiguousarray\(key_pages\)",
        lambda: na.PagedKVCache.from_arrays(KEY[..., ::2], *PAGES[1:]),
    ),
    (
        ValueError,
        "value_pages must have contiguous features",
        lambda: na.PagedKVCache.from_arrays(KEY, VALUE[..., ::-1], *PAGES[2:]),
    ),
    (ValueError, r"block_table must have shape \(n, blocks\)", lambda: na.PagedKVCache.from_arrays(*HELD, [0, 1], 3)),
    (TypeError, "block_table must be integer", lambda: na.PagedKVCache.from_arrays(*HELD, [[0.0], [1.0]], 3)),
    (TypeError, "block_table must not mix", lambda: na.PagedKVCache.from_arrays(*HELD, [[0], [True]], 3)),
    (
        ValueError,
        r"block_table must name pages from 0 to 1, got 2 at \[1, 0\]",
        lambda: na.PagedKVCache.from_arrays(*HELD, [[0], [2]], 3),
    ),
    (
        ValueError,
        r"block_table must name pages from 0 to 1, got -1 at \[0, 1\]",
        lambda: na.PagedKVCache.from_arrays(*HELD, [[0, -1], [1, -1]], [6, 3]),
    ),
    (
        ValueError,
        "lengths must lie between 0 and what the blocks of block_table hold, 5, got 6 for sequence 1",
        lambda: na.PagedKVCache.from_arrays(*HELD, [[0], [1]], [5, 6]),
    ),
    (ValueError, "lengths must be an integer or of", lambda: na.PagedKVCache.from_arrays(*HELD, [[0], [1]], [5])),
]


@pytest.mark.parametrize(("kind", "words", "call"), FROM_ARRAYS, ids=[words for _, words, _ in FROM_ARRAYS])
def test_bad_arrays(kind, words, call):
    with pytest.raises(kind, match=words):
        call()
