"""A cache of pages that sequences take as they grow, share, and give back."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import CacheFullError
from ..options import Array
from .checks import check_dtype, check_new, lengths_of, size_of
from .contents import Contents
from .storage import aligned, encode, has_scale, resolve


class PagedKVCache:
    """Keys and values of any number of sequences in pages of one size, for `attention_decode`.

    Parameters
    ----------
    num_pages, page_size, num_kv_heads, head_dim : int
        Pages there are, tokens in a page, key/value heads, features of a key (E).
    value_dim, dtype, storage
        As in `KVCache`.

    Attributes
    ----------
    num_pages, page_size, num_kv_heads, head_dim, value_dim : int
    dtype : dtype
    storage : str

    Raises
    ------
    TypeError, ValueError, ImportError
        An argument has the wrong type or is out of range.

    See Also
    --------
    KVCache : for a fixed batch.
    attention_decode : reads it.

    Notes
    -----
    A sequence has a list of pages, and takes a page when its last one is full. `fork` makes a sequence of the same
    pages, which are copied when one of the two writes to a page that both have: a shared prefix is stored once. Pages
    that no sequence has any more are free again. Whatever finds too few free pages changes nothing. Several threads may
    read a cache at once while none changes it.

    References
    ----------
    .. [1] Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023,
       section 4.

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> cache = na.PagedKVCache(num_pages=8, page_size=16, num_kv_heads=4, head_dim=64)
    >>> (prompt,) = cache.add()
    >>> new = np.ones((1, 4, 40, 64), np.float32)
    >>> cache.append([prompt], new, new)
    >>> other = cache.fork(prompt)
    >>> cache.append([other], new[:, :, :1], new[:, :, :1])
    >>> cache.lengths(), cache.free_pages
    (array([40, 41]), 4)
    >>> cache.block_table()
    array([[0, 1, 2],
           [0, 1, 3]])
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: Any = np.float32,
        storage: Any = None,
    ) -> None:
        pages, size = size_of("num_pages", num_pages), size_of("page_size", page_size)
        heads, E = size_of("num_kv_heads", num_kv_heads), size_of("head_dim", head_dim)
        Ev = E if value_dim is None else size_of("value_dim", value_dim)
        real = check_dtype(dtype)
        name, stored = resolve(storage, real)
        key, value = (aligned((pages, heads, size, n), stored) for n in (E, Ev))
        scales = [aligned(key.shape[:3], np.dtype(np.float32)) if has_scale(name) else None for _ in range(2)]
        self._place(key, value, scales[0], scales[1], name, real)

    def _place(
        self, key: Array, value: Array, key_scale: Array | None, value_scale: Array | None, name: str, dtype: Any
    ) -> None:
        self.num_pages, self.num_kv_heads, self.page_size, self.head_dim = key.shape
        self.value_dim, self.dtype, self.storage = value.shape[-1], dtype, name
        self._stores = [(key, key_scale), (value, value_scale)]
        self._pages: dict[int, list[int]] = {}  # of each sequence, in order
        self._lengths: dict[int, int] = {}
        self._owners = [0] * self.num_pages  # sequences that have a page
        self._free = list(range(self.num_pages - 1, -1, -1))  # a stack: the page given back last is taken first
        self._next = 0
        self._view: tuple[list[int], Contents] | None = None  # the last contents asked for, until something changes

    @classmethod
    def from_arrays(
        cls, key_pages: Array, value_pages: Array, block_table: ArrayLike, lengths: ArrayLike
    ) -> "PagedKVCache":
        """Make a cache of pages that are there already, without a copy.

        Parameters
        ----------
        key_pages : ndarray, shape (num_pages, Hkv, page_size, E)
            Features must be contiguous. What is appended is written to it.
        value_pages : ndarray, shape (num_pages, Hkv, page_size, Ev)
            dtype of `key_pages`.
        block_table : array of int, shape (n, blocks)
            The pages of each sequence in order; what is past its length is ignored. Pages may be named several times:
            they are shared.
        lengths : array of int, shape (n,)

        Returns
        -------
        PagedKVCache
            Its sequences have the ids 0 .. n - 1; pages that none has are free.
        """
        for name, x in (("key_pages", key_pages), ("value_pages", value_pages)):
            if not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray | np.matrix):
                raise TypeError(f"{name} must be a numpy.ndarray, got {type(x).__module__}.{type(x).__qualname__}")
            if x.ndim != 4:
                raise ValueError(f"{name} must have shape (pages, heads, page size, features), got {x.shape}")
            if x.shape[-1] > 1 and x.strides[-1] != x.itemsize:
                raise ValueError(
                    f"{name} must have contiguous features, got strides {x.strides}; "
                    f"use numpy.ascontiguousarray({name})"
                )
        dtype = check_dtype(key_pages.dtype, "key_pages")
        if value_pages.dtype != dtype:
            raise TypeError(f"value_pages must have the dtype of key_pages, {dtype}, got {value_pages.dtype}")
        if value_pages.shape[:3] != key_pages.shape[:3] or min(key_pages.shape[1:]) < 1:
            raise ValueError(
                f"value_pages must have the shape of key_pages but Ev, {key_pages.shape}, got {value_pages.shape}"
            )
        table = np.asarray(block_table)
        if table.ndim != 2 or (table.dtype.kind not in "iu" and table.size):
            raise ValueError(f"block_table must be an array of int, (n, blocks), got {table.dtype} {table.shape}")
        size = key_pages.shape[2]
        own = lengths_of(lengths, len(table), table.shape[1] * size)
        cache = cls.__new__(cls)
        cache._place(key_pages.view(np.ndarray), value_pages.view(np.ndarray), None, None, dtype.name, dtype)
        for i, length in enumerate(own.tolist()):
            pages = [int(page) for page in table[i, : -(-length // size)]]
            for page in pages:
                if not 0 <= page < cache.num_pages:
                    raise ValueError(f"block_table must name pages 0 .. {cache.num_pages - 1}, got {page}")
                cache._owners[page] += 1
            cache._pages[i], cache._lengths[i] = pages, length
        cache._free = [page for page in range(cache.num_pages - 1, -1, -1) if not cache._owners[page]]
        cache._next = len(table)
        return cache

    @property
    def ids(self) -> Array:
        """The sequences there are, int64, in the order they were made."""
        return np.array(sorted(self._pages), np.int64)

    @property
    def free_pages(self) -> int:
        """How many pages no sequence has."""
        return len(self._free)

    def __repr__(self) -> str:
        return (
            f"PagedKVCache(num_pages={self.num_pages}, page_size={self.page_size}, "
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, value_dim={self.value_dim}, "
            f"dtype={self.dtype}, storage={self.storage!r}, sequences={len(self._pages)}, free_pages={self.free_pages})"
        )

    def lengths(self, ids: ArrayLike | None = None) -> Array:
        """Tokens in each of these sequences, by default in all; int64, a number where `ids` is one."""
        return np.array([self._lengths[i] for i in self._known(ids)], np.int64).reshape(_shape(ids, len(self._pages)))

    def block_table(self, ids: ArrayLike | None = None) -> Array:
        """The pages of each of these sequences in order, int64 (n, most blocks), filled up with -1."""
        lists = [self._pages[i] for i in self._known(ids)]
        table = np.full((len(lists), max(map(len, lists), default=0)), -1, np.int64)
        for row, pages in zip(table, lists, strict=True):
            row[: len(pages)] = pages
        return table

    def _known(self, ids: ArrayLike | None) -> list[int]:
        """Ids as a list; each must be there."""
        if ids is None:
            return sorted(self._pages)
        array = np.asarray(ids)
        if array.ndim > 1 or (array.dtype.kind not in "iu" and array.size):
            raise TypeError(f"ids must be an int or a 1-D array of int, got {array.dtype} of shape {array.shape}")
        found: list[int] = array.reshape(-1).tolist()
        for i in found:
            if i not in self._pages:
                raise KeyError(f"there is no sequence {i} in the cache")
        return found

    def _contents(self, ids: ArrayLike | None = None) -> Contents:
        known = self._known(ids)
        if self._view is None or self._view[0] != known:
            (key, key_scale), (value, value_scale) = self._stores
            table, lengths = self.block_table(known), np.array([self._lengths[i] for i in known], np.int64)
            held = Contents(key, value, key_scale, value_scale, table, lengths, self.storage, self.dtype)
            self._view = known, held
        return self._view[1]

    def add(self, n: int = 1) -> Array:
        """Begin n empty sequences; returns their ids, int64 (n,). Ids are never used again."""
        ids = np.arange(self._next, self._next + size_of("n", n))
        self._next += len(ids)
        for i in ids.tolist():
            self._pages[i], self._lengths[i] = [], 0
        self._view = None
        return ids

    def fork(self, id: int) -> int:
        """Begin a sequence with the tokens of another, which takes no page until one of them writes; returns its id."""
        (source,) = self._known([id])
        new, self._next, self._view = self._next, self._next + 1, None
        self._pages[new], self._lengths[new] = list(self._pages[source]), self._lengths[source]
        for page in self._pages[new]:
            self._owners[page] += 1
        return new

    def free(self, id: int) -> None:
        """End a sequence; pages that no other has are free again."""
        (known,) = self._known([id])
        self._give_back(self._pages.pop(known))
        del self._lengths[known]
        self._view = None

    def truncate(self, id: int, length: int) -> None:
        """Shorten a sequence: take back tokens that were appended last."""
        (known,) = self._known([id])
        (new,) = lengths_of(length, 1, self._lengths[known], "length").tolist()
        pages, keep = self._pages[known], -(-new // self.page_size)
        self._give_back(pages[keep:])
        del pages[keep:]
        self._lengths[known], self._view = new, None

    def reorder(self, ids: ArrayLike, sources: ArrayLike) -> None:
        """Make sequence ``ids[i]`` what ``sources[i]`` was, for all i at once: the step of a beam search.

        No token is copied, and no page is taken.
        """
        known, chosen = self._distinct(ids), self._known(sources)
        if len(known) != len(chosen):
            raise ValueError(f"sources must be as many as ids, {len(known)}, got {len(chosen)}")
        new = [(list(self._pages[i]), self._lengths[i]) for i in chosen]
        for pages, _ in new:
            for page in pages:
                self._owners[page] += 1
        for i, (pages, length) in zip(known, new, strict=True):
            self._give_back(self._pages[i])
            self._pages[i], self._lengths[i] = pages, length
        self._view = None

    def append(self, ids: ArrayLike, key: Array, value: Array, lengths: ArrayLike | None = None) -> None:
        """Add tokens to the end of sequences.

        Parameters
        ----------
        ids : array of int, shape (n,)
            Different sequences.
        key : ndarray, shape (n, Hkv, T, E)
            dtype of the cache. Any strides.
        value : ndarray, shape (n, Hkv, T, Ev)
        lengths : int or array of int, shape (n,), optional
            How many of the T tokens each sequence gets, the first ones; by default all.

        Raises
        ------
        CacheFullError
            Too few pages are free; nothing was appended to any sequence.
        TypeError, ValueError, KeyError
            Wrong type, dtype or shape, or a sequence that is not there.
        """
        known = self._distinct(ids)
        T = check_new(key, value, ((len(known), self.num_kv_heads), self.head_dim, self.value_dim), self.dtype)
        counts = [T] * len(known) if lengths is None else lengths_of(lengths, len(known), T).tolist()
        if not all(store.flags.writeable for store, _ in self._stores):
            raise ValueError("the cache was made of a read-only array and cannot grow")
        self._make_room(known, counts)
        for n, (i, count) in enumerate(zip(known, counts, strict=True)):
            self._write(self._pages[i], self._lengths[i], key[n], value[n], count)
            self._lengths[i] += count
        self._view = None

    def _distinct(self, ids: ArrayLike) -> list[int]:
        known = self._known(ids)
        if len(set(known)) != len(known):
            raise ValueError(f"ids must be different, got {known}")
        return known

    def _make_room(self, ids: list[int], counts: list[int]) -> None:
        """Give every sequence the pages it will write to, none of them shared; or raise and change nothing."""
        size, owners = self.page_size, self._owners
        new, copies = [], []  # pages to take for each sequence; sequences whose last page is to be copied
        sharing: dict[int, int] = {}  # how many of these sequences will leave a page
        for i, count in zip(ids, counts, strict=True):
            pages, length = self._pages[i], self._lengths[i]
            new.append(-(-(length + count) // size) - len(pages))
            if count and length % size:
                left = sharing.get(pages[-1], 0)
                if owners[pages[-1]] - left > 1:  # the last one that has the page keeps it
                    sharing[pages[-1]] = left + 1
                    copies.append(i)
        need = sum(new) + len(copies)
        if need > len(self._free):
            raise CacheFullError(f"{need} more pages of the cache would be needed, {len(self._free)} are free")
        for i in copies:
            pages, page = self._pages[i], self._free.pop()
            used = self._lengths[i] % size
            for store, scale in self._stores:
                store[page, :, :used] = store[pages[-1], :, :used]
                if scale is not None:
                    scale[page, :, :used] = scale[pages[-1], :, :used]
            owners[pages[-1]] -= 1
            owners[page], pages[-1] = 1, page
        for i, count in zip(ids, new, strict=True):
            for _ in range(count):
                page = self._free.pop()
                owners[page] = 1
                self._pages[i].append(page)

    def _write(self, pages: list[int], length: int, key: Array, value: Array, count: int) -> None:
        """Write `count` tokens of key and value (Hkv, T, E) after the first `length`."""
        done = 0
        while done < count:
            block, slot = divmod(length + done, self.page_size)
            part = min(self.page_size - slot, count - done)
            rows = slice(slot, slot + part)
            for new, (store, scale) in zip((key, value), self._stores, strict=True):
                own = None if scale is None else scale[pages[block], :, rows]
                encode(new[:, done : done + part], self.storage, store[pages[block], :, rows], own)
            done += part

    def _give_back(self, pages: Sequence[int]) -> None:
        for page in reversed(pages):
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free.append(page)


def _shape(ids: Any, n: int) -> tuple[int, ...]:
    return (n,) if ids is None else np.shape(ids)
