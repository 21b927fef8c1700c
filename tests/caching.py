"""What the tests of the caches share: what should be stored, by the book, and what a cache is in all detail."""

import ml_dtypes
import numpy as np

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
    if contents.table is not None:
        pages = cache._pages
        ids, _, table = pages.sequences
        arrays += [
            ids,
            table[:, : contents.table.shape[1]],
            pages.counts,
            np.sort(pages.free[: pages.num_free]),
        ]
        arrays.append(np.array([pages.num_free, pages.next_id]))
        assert (table[:, contents.table.shape[1] :] == -1).all()
    return [x.tobytes() for x in arrays]


def check_pages(cache):
    """Reference counts, block tables and the free list of a PagedKVCache agree."""
    pages, table = cache._pages, cache.block_table()
    used = np.arange(table.shape[1]) * cache.page_size < cache.lengths()[:, None]
    np.testing.assert_array_equal(table >= 0, used)
    named = np.bincount(table[used], minlength=cache.num_pages)
    np.testing.assert_array_equal(pages.counts, named)
    free = pages.free[: pages.num_free]
    assert sorted([*free, *np.flatnonzero(named)]) == list(range(cache.num_pages))
    assert cache.free_pages == len(free)
