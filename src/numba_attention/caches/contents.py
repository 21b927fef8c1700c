"""What attention reads of a cache, however it is kept."""

from typing import Any, NamedTuple

import numpy as np

from ..options import Array
from .storage import decode


class Contents(NamedTuple):
    """Keys and values of n sequences: in one array each, or in pages."""

    key: Array  # as stored: (n, Hkv, capacity, E), or pages (num_pages, Hkv, page_size, E)
    value: Array
    key_scale: Array | None  # float32, shape of key without its last axis; None where numbers are stored as they are
    value_scale: Array | None
    table: Array | None  # int64 (n, blocks), rows contiguous: the page of each block; None if there are no pages
    lengths: Array  # int64 (n,)
    storage: str  # name of how `key` and `value` hold numbers
    dtype: np.dtype[Any]  # of queries and results

    def dense(self) -> tuple[Array, Array]:
        """Key and value (n, Hkv, longest length, E) as float64, 0 past each length."""
        return self._dense(self.key, self.key_scale), self._dense(self.value, self.value_scale)

    def _dense(self, stored: Array, scale: Array | None) -> Array:
        n, longest = len(self.lengths), int(self.lengths.max(initial=0))
        found = np.zeros((n, stored.shape[1], longest, stored.shape[3]))
        for i, length in enumerate(self.lengths.tolist()):
            if self.table is None:
                found[i, :, :length] = decode(stored[i, :, :length], None if scale is None else scale[i, :, :length])
                continue
            size = stored.shape[2]
            for block in range(-(-length // size)):
                page, start = self.table[i, block], block * size
                part = slice(start, min(start + size, length))
                count = part.stop - part.start
                own = None if scale is None else scale[page, :, :count]
                found[i, :, part] = decode(stored[page, :, :count], own)
        return found
