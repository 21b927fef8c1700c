"""What the tests of the caches share: what should be stored, by the book, and what a cache is in all detail."""

import ml_dtypes
import numpy as np

import numba_attention as na
from cases import DTYPES

STORAGES = [None, "float16", "bfloat16", "int8", "float8"]


def read_back(x, storage):
    """What a cache of this storage should read as, in float64, one row (token and head) at a time."""
    if storage is None:
        return np.asarray(x, np.float64)
    if storage in DTYPES:
        return x.astype(DTYPES[storage]).astype(np.float64)
    limit = {"int8": 127, "float8": 448}[storage]
    wide = x.astype(np.float64 if x.dtype == np.float64 else np.float32)
    out = np.empty(x.shape)
    for row in np.ndindex(x.shape[:-1]):
        values = wide[row]
        if not np.isfinite(values).all():
            out[row] = np.nan
            continue
        scale = np.float32(np.max(np.abs(values)) / values.dtype.type(limit))
        if scale == 0:
            out[row] = 0
            continue
        steps = values / scale
        steps = np.round(steps) if storage == "int8" else steps.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        out[row] = steps * np.float64(scale)
    return out


def state(cache):
    """All that a caller could see of a cache now or later, as nested lists: equal if and only if nothing changed."""
    contents = cache._contents()
    arrays = [*contents.dense(), contents.lengths]
    if isinstance(cache, na.PagedKVCache):
        pages, used = cache._pages, cache.block_table().shape[1]
        ids, _, table, dropped = pages.sequences
        arrays += [
            ids,
            table[:, :used],
            pages.counts,
            dropped,
            np.sort(pages.free[: pages.num_free]),
        ]
        arrays.append(np.array([pages.num_free, pages.next_id]))
        assert (table[:, used:] == -1).all()
    elif cache.window is not None:
        arrays += [cache.lengths, cache.positions]
    return [x.tobytes() for x in arrays]


def check_pages(cache):
    """Reference counts, block tables and the free list of a PagedKVCache agree."""
    pages, table = cache._pages, cache.block_table()
    used = np.arange(table.shape[1]) * cache.page_size < (cache.lengths() - pages.sequences.dropped)[:, None]
    np.testing.assert_array_equal(table >= 0, used)
    named = np.bincount(table[used], minlength=cache.num_pages)
    np.testing.assert_array_equal(pages.counts, named)
    free = pages.free[: pages.num_free]
    assert sorted([*free, *np.flatnonzero(named)]) == list(range(cache.num_pages))
    assert cache.free_pages == len(free)


TOLERANCE = {"float32": 3e-6, "float64": 1e-13, "float16": 3e-3, "bfloat16": 2e-2}


def arrays(B, H, Hkv, L, S, E, Ev=None, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, H, L, E), (B, Hkv, S, E), (B, Hkv, S, E if Ev is None else Ev)
    return [rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes]


def filled(key, value, lengths, storage=None, page_size=None, seed=0):
    """A cache of these tokens, appended in pieces; pages in any order, with other sequences between."""
    B, Hkv, S, E = key.shape
    if page_size is None:
        cache = na.KVCache(B, Hkv, S + 3, E, value.shape[-1], key.dtype, storage)
        half = np.asarray(lengths) // 2
        cache.append(key[:, :, : int(half.max())], value[:, :, : int(half.max())], half)
        for b in range(B):  # the rest of each sequence, one after the other
            rest = np.zeros(B, np.int64)
            rest[b] = lengths[b] - half[b]
            part = (
                np.zeros((B, Hkv, int(rest[b]), E), key.dtype),
                np.zeros((B, Hkv, int(rest[b]), value.shape[-1]), key.dtype),
            )
            part[0][b], part[1][b] = key[b, :, half[b] : lengths[b]], value[b, :, half[b] : lengths[b]]
            cache.append(*part, rest)
        return cache
    blocks = sum(-(-int(n) // page_size) for n in lengths)
    cache = na.PagedKVCache(blocks + 40, page_size, Hkv, E, value.shape[-1], key.dtype, storage)
    rng = np.random.default_rng(seed)
    other, *ids = cache.add(B + 1).tolist()
    noise = np.full((1, Hkv, 1, max(E, value.shape[-1])), np.nan, key.dtype)
    done = np.zeros(B, np.int64)
    while (done < lengths).any():
        b = int(rng.choice(np.flatnonzero(done < lengths)))
        stop = min(int(lengths[b]), int(done[b]) + int(rng.integers(1, 2 * page_size)))
        part = slice(int(done[b]), stop)
        cache.append([ids[b]], key[b : b + 1, :, part], value[b : b + 1, :, part])
        done[b] = stop
        if cache.lengths([other])[0] < 30 and rng.random() < 0.3:
            cache.append([other], noise[..., :E], noise[..., : value.shape[-1]])
    cache.free(other)
    return cache
