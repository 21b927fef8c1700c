"""The contents of a cache, as backends read them."""

from typing import Any, NamedTuple

import numpy as np

from ..device.arrays import to_host
from ..options import Array
from .storage import Arrays, decode, token_pages

_MOST = 2**16  # bytes of a page table up to which comparing it takes less time than planning a call


class Gap(NamedTuple):
    """The positions that a rolling cache has dropped: those of each sequence between its first and its newest tokens.

    The keys of the contents are numbered without them: key j is at position j if ``j < first``, else at
    ``j + dropped``.
    """

    first: int
    dropped: Array  # int64 (n,)


class Contents(NamedTuple):
    """The arrays of a cache as they are stored, without a copy, so they are valid until the cache changes.

    Numbers past the length of a sequence are uninitialised or out of date, and must not be read.
    """

    key: Array  # (n, Hkv, capacity, E), or pages (num_pages, Hkv, page_size, E)
    value: Array
    key_scale: Array | None  # float32, shape of key without its last axis; None where numbers are stored as they are
    value_scale: Array | None
    table: Array | None  # pages only: int64 (n, blocks); [i, j // page_size] is the page of key j of sequence i, or -1
    lengths: Array  # int64 (n,)
    storage: str  # "float32", "float64", "float16", "bfloat16", "int8" or "float8_e4m3fn": how numbers are held
    dtype: np.dtype[Any]  # that of queries and results
    originals: tuple[Any, Any, Any, Any] | None = None  # the four arrays as the caller passed them, if on a GPU
    gap: Gap | None = None  # of a rolling cache that has dropped tokens; there `lengths` counts the kept ones
    by_tokens: bool = False  # whether the arrays are `token_pages` of those of the cache, and pages have one token

    def look(self) -> tuple[Any, ...] | None:
        """Return what determines a call, besides the arrays of keys and values; None if it is too large to compare."""
        if self.table is None:
            return self.storage, self.dtype, self.lengths.tobytes()
        if self.table.nbytes > _MOST:
            return None
        lengths, table = self.lengths.tobytes(), self.table.tobytes()
        return self.storage, self.dtype, lengths, self.by_tokens, self.table.shape, table

    def gathered(self) -> "Contents":
        """Return a copy of what a rolling cache keeps, in one array, in order of position."""
        assert self.table is not None
        table = np.where(np.arange(self.table.shape[1]) < self.lengths[:, None], self.table, self.table[:, :1])
        copies: dict[str, Any] = {
            name: None if x is None else x[table, :, 0].swapaxes(1, 2).copy()
            for name, x in zip(self._fields[:4], self[:4], strict=True)
        }
        return self._replace(**copies, table=None, by_tokens=False)

    def on_host(self) -> "Contents":
        """Return the contents with copies of arrays on a GPU."""
        if self.originals is None:
            return self
        key, value, key_scale, value_scale = map(to_host, self.originals)
        return self.of((key, value, key_scale, value_scale))._replace(originals=None)

    def of(self, arrays: Arrays) -> "Contents":
        """Return the same contents of other arrays: copies of those of the cache, or headers of them."""
        if self.by_tokens and self.originals is not None:
            arrays = token_pages(arrays)
        key, value, key_scale, value_scale = arrays
        return self._replace(key=key, value=value, key_scale=key_scale, value_scale=value_scale)

    def dense(self) -> tuple[Array, Array]:
        """Return key and value as float64 (n, Hkv, max(lengths), E), zero past each length."""
        if self.originals is not None:
            return self.on_host().dense()
        return self._dense(self.key, self.key_scale), self._dense(self.value, self.value_scale)

    def _dense(self, codes: Array, scale: Array | None) -> Array:
        lengths = self.lengths.copy()
        out = np.zeros((len(lengths), codes.shape[1], int(lengths.max(initial=0)), codes.shape[3]))
        for i, length in enumerate(lengths):
            where: Any = (i, slice(None), slice(length))  # heads, tokens
            if self.table is not None:
                page, offset = np.divmod(np.arange(length), codes.shape[2])
                # The result has axes tokens, heads: NumPy puts index arrays that are separated by a slice first.
                where = (self.table[i, page], slice(None), offset)
            numbers = decode(codes[where], None if scale is None else scale[where])
            out[i, :, :length] = numbers if self.table is None else numbers.swapaxes(0, 1)
        return out
