"""PagedKVCache: keys and values in pages, which sequences that come, go and fork may share."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .. import markup
from ..device.arrays import to_host
from ..errors import CacheFullError
from ..options import Array
from .checks import (
    check_array,
    check_dtype,
    check_features,
    check_held,
    check_ints,
    check_lengths,
    check_new,
    check_size,
    check_writeable,
)
from .contents import Contents, Gap
from .pages import PageTable
from .rolling import check_truncated, check_window, kept
from .storage import Arrays, Storage, each_token, megabytes, storage_format, token_pages

SHOWN = 1024  # pages in the picture of a cache


class PagedKVCache:
    """Keys and values of the tokens so far, in pages of a fixed size.

    A sequence takes a page when it needs one, and returns its pages when it ends. Sequences that begin with the same
    tokens can share the pages of these tokens (`fork`). A shared page is copied before it is written to.

    Parameters
    ----------
    num_pages, page_size, num_kv_heads, head_dim : int
        Number of pages, tokens of a page, key/value heads, features of a key.
    value_dim : int, optional
        Features of a value, if not `head_dim`.
    dtype : dtype, default numpy.float32
        float32, float64, float16 or ``ml_dtypes.bfloat16``: the dtype of what is appended, of queries and of results.
    storage : {None, "float16", "bfloat16", "int8", "float8"}, optional
        How numbers are stored, as in `KVCache`.
    window : int, optional
        Let sequences roll, as in `KVCache`: each keeps its newest `window` tokens and its first `keep_first`, and
        returns a page when all tokens of the page have dropped out. A sequence needs at most
        ``ceil(keep_first / page_size) + ceil(window / page_size) + 1`` pages.
    keep_first : int, default 0
        The number of first tokens that never drop out.

    Attributes
    ----------
    num_pages, page_size, num_kv_heads, head_dim, value_dim, window, keep_first : int
        As given.
    dtype : numpy.dtype
        As given.
    storage : str
        How numbers are stored: "float32", "float64", "float16", "bfloat16", "int8" or "float8_e4m3fn".

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or is out of range; the message names it.
    ImportError
        `storage` needs ml_dtypes, and it is not installed.

    See Also
    --------
    KVCache : one array for a batch, which is simpler if all sequences have about the same length.

    Notes
    -----
    Each sequence has a row in a block table, which lists its pages in order. Each page has a count of the rows that
    list it, and is free when the count is 0. The last page of a fork is shared too, however full it is.

    A method that raises leaves the cache as it was.

    Threads may read one cache at the same time. While one thread changes it, a call in another thread reads the pages
    that sequences had when the call began. These may by then contain another sequence, but nothing outside the pages is
    read.

    References
    ----------
    .. [1] Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023,
       section 4.

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> cache = na.PagedKVCache(num_pages=10, page_size=16, num_kv_heads=4, head_dim=8)
    >>> key, value = np.random.default_rng(0).standard_normal((2, 1, 4, 40, 8), dtype=np.float32)
    >>> (prompt,) = cache.add()
    >>> cache.append([prompt], key, value)
    >>> other = cache.fork(prompt)  # takes no page
    >>> cache.block_table()
    array([[0, 1, 2],
           [0, 1, 2]])
    >>> cache.append([other], key[:, :, :1], value[:, :, :1])  # copies the page that it shares and writes to
    >>> cache.block_table()
    array([[0, 1, 2],
           [0, 1, 3]])
    >>> cache.free(prompt)
    >>> cache
    PagedKVCache(num_pages=10, page_size=16, num_kv_heads=4, head_dim=8, value_dim=8, dtype=float32, storage=float32),
    1 sequence, 7 pages free
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: DTypeLike = np.float32,
        storage: DTypeLike | str | None = None,
        *,
        window: int | None = None,
        keep_first: int = 0,
    ) -> None:
        num_pages = check_size("num_pages", num_pages)
        page_size = check_size("page_size", page_size)
        shape = (num_pages, check_size("num_kv_heads", num_kv_heads), page_size)
        E = check_size("head_dim", head_dim)
        Ev = E if value_dim is None else check_size("value_dim", value_dim)
        kind = check_dtype(dtype)
        form = storage_format(storage, kind)
        span, first = check_window(window, keep_first)
        key, key_scale = form.allocate((*shape, E))
        value, value_scale = form.allocate((*shape, Ev))
        self._hold((key, value, key_scale, value_scale), kind, form, window=span, keep_first=first)

    def _hold(
        self,
        arrays: Arrays,
        dtype: np.dtype[Any],
        form: Storage,
        read_only: str | None = None,
        originals: tuple[Any, Any, Any, Any] | None = None,
        window: int | None = None,
        keep_first: int = 0,
    ) -> None:
        self._arrays, self._originals = arrays, originals
        self._form, self._read_only = form, read_only
        self.num_pages, self.num_kv_heads, self.page_size, self.head_dim = arrays[0].shape
        self.value_dim = arrays[1].shape[-1]
        self.dtype, self.storage = dtype, form.name
        self.window, self.keep_first = window, keep_first
        self._tokens: Arrays | None = None
        self._pages = PageTable(self.num_pages, self.page_size)

    @classmethod
    def from_arrays(
        cls,
        key_pages: Array,
        value_pages: Array,
        block_table: ArrayLike,
        lengths: ArrayLike,
        *,
        key_scale: Array | None = None,
        value_scale: Array | None = None,
        dtype: DTypeLike | None = None,
        window: int | None = None,
        keep_first: int = 0,
    ) -> Self:
        """Make a cache of existing pages, without a copy.

        The cache reads the arrays themselves, and `append` writes to them. The block table is copied.

        Parameters
        ----------
        key_pages : ndarray, shape (num_pages, Hkv, page_size, E)
            float32, float64, float16, ``ml_dtypes.bfloat16``, or 8-bit codes with scales; features contiguous. If it
            is read-only, or shares memory with `value_pages`, nothing can be appended. Arrays on a GPU stay there:
            `attention_decode` reads them there, and kernels append to them.
        value_pages : ndarray, shape (num_pages, Hkv, page_size, Ev)
            In the dtype of `key_pages`, features contiguous.
        block_table : array of int, shape (n, blocks)
            Pages of each sequence in order. A page that is listed several times is shared. Entries past the length of a
            sequence are ignored.
        lengths : int or array of int, shape (n,)
            Tokens of each sequence.
        key_scale, value_scale : ndarray, shape (num_pages, Hkv, page_size), optional
            float32, tokens contiguous; with pages of int8 or ``ml_dtypes.float8_e4m3fn``, as in `KVCache.from_arrays`.
        dtype : dtype, optional
            The dtype of queries and results, if the pages have fewer bits. By default it is their own, or float32 if
            there are scales.
        window : int, optional
        keep_first : int, default 0
            Let sequences roll, as in `PagedKVCache`; no token has dropped out yet.

        Returns
        -------
        PagedKVCache
            Its sequences have the ids 0 to n - 1; all other pages are free.

        Raises
        ------
        TypeError, ValueError
            An argument has the wrong type, dtype or shape, or is out of range; the message names it.

        Examples
        --------
        >>> import numpy as np, numba_attention as na
        >>> key_pages, value_pages = np.ones((2, 8, 4, 16, 64), np.float32)
        >>> cache = na.PagedKVCache.from_arrays(key_pages, value_pages, [[5, 0], [5, 3]], lengths=[20, 17])
        >>> cache.free_pages
        5
        """
        names = ("key_pages", "value_pages")
        checked = check_held(key_pages, value_pages, key_scale, value_scale, dtype, names, "pages, heads and page size")
        sizes = (*checked.arrays[0].shape, checked.arrays[1].shape[-1])
        for name, size in zip(("num_pages", "num_kv_heads", "page_size", "head_dim", "value_dim"), sizes, strict=True):
            check_size(name, size)
        for name, x in zip(names, checked.arrays[:2], strict=True):
            check_features(name, x)
        table = check_ints("block_table", to_host(block_table))
        if table.ndim != 2:
            raise ValueError(f"block_table must have shape (n, blocks), got {table.shape}")
        n, width = table.shape
        num_pages, _, page_size, _, _ = sizes
        held = check_lengths("lengths", to_host(lengths), n, width * page_size, "what the blocks of block_table hold")
        used = np.arange(width) < -(-held[:, None] // page_size)
        wrong = used & ((table < 0) | (table >= num_pages))
        if wrong.any():
            i, j = np.argwhere(wrong)[0]
            raise ValueError(f"block_table must name pages from 0 to {num_pages - 1}, got {table[i, j]} at [{i}, {j}]")
        span, first = check_window(window, keep_first)
        self = cls.__new__(cls)
        self._hold(*checked, span, first)
        self._pages.adopt(held, np.where(used, table, -1))
        return self

    def add(self, n: int = 1) -> Array:
        """Add n empty sequences.

        Parameters
        ----------
        n : int, default 1
            How many sequences to add.

        Returns
        -------
        ndarray of int64, shape (n,)
            Their ids. No id is ever used again.

        Raises
        ------
        TypeError, ValueError
            `n` is no integer, or negative.
        """
        n = check_size("n", n, 0)
        return self._pages.add(np.zeros(n, np.int64), np.empty((n, 0), np.int64))

    def append(self, ids: ArrayLike, key: Array, value: Array, lengths: ArrayLike | None = None) -> None:
        """Add tokens at the end of some sequences.

        Parameters
        ----------
        ids : array of int, shape (n,)
            Which sequences, each at most once.
        key : ndarray, shape (n, Hkv, T, E)
            In the dtype of the cache, any strides. It is copied. Of a cache on a GPU it is on the same one, or on the
            host; it is copied in the order of its stream.
        value : ndarray, shape (n, Hkv, T, Ev)
            In the dtype of the cache.
        lengths : int or array of int, shape (n,), optional
            How many of the T tokens to append to each sequence, from the first on; by default all.

        Raises
        ------
        CacheFullError
            There are too few free pages. The cache is as it was, for all ids.
        KeyError
            A sequence was freed, or never added.
        TypeError, ValueError
            An argument has the wrong type, dtype or shape, or is out of range, or the cache was made of arrays that
            cannot be written to. The cache is as it was.
        """
        rows = self._rows("ids", ids, distinct=True)
        if self._originals is None:
            self._append(rows, key, value, lengths)
            return
        with self._form.using(self._originals, key=key, value=value) as (key, value):
            self._append(rows, key, value, None if lengths is None else to_host(lengths))

    def _append(self, rows: Array, key: Array, value: Array, lengths: ArrayLike | None) -> None:
        n = len(rows)
        T = check_array("key", key).shape[2]
        key = check_new("key", key, (n, self.num_kv_heads, -1, self.head_dim), self.dtype)
        value = check_new("value", value, (n, self.num_kv_heads, T, self.value_dim), self.dtype)
        check_writeable(self._read_only)
        if lengths is None:
            added = np.full(n, T)
        else:
            added = check_lengths("lengths", lengths, n, T, "the number of tokens given")
        if self.window is None:
            self._write(rows, added, key, value, *each_token(added))
            return
        # A page is dropped only when another append follows, so that `truncate` can take back what was appended last;
        # unless the new tokens fill the window, or there are several and pages are few.
        try:
            self._append_rolling(rows, added, key, value, self._pages.sequences.lengths[rows])
        except CacheFullError:
            if added.max(initial=0) < 2:
                raise
            self._append_rolling(rows, added, key, value, self._pages.sequences.lengths[rows] + added)

    def _append_rolling(self, rows: Array, added: Array, key: Array, value: Array, newest: Array) -> None:
        """Append to sequences and drop pages that are out of the window, as it is when they hold `newest` tokens.

        Tokens that would drop out at once are left out.
        """
        assert self.window is not None
        held, old = self._pages.sequences.lengths[rows], self._pages.sequences.dropped[rows]
        lengths, first = held + old, self._first()
        end = lengths + added
        begin = np.where(end - self.window >= lengths, end, newest + old) - self.window
        dropped = np.maximum(old, (begin - first) // self.page_size * self.page_size)
        stays = lengths >= first + dropped  # some of the newest tokens, beside the first ones
        in_first = np.where(stays, 0, np.clip(first - lengths, 0, added))
        skipped = np.where(stays, 0, first + dropped - np.maximum(lengths, first))
        undo = None
        if (dropped > old).any():
            held = np.where(stays, lengths - dropped, np.minimum(lengths, first))
            undo = self._pages.drop(rows, first // self.page_size, dropped, held)
        try:
            sequence, token = each_token(added - skipped)
            source = token + np.where(token < in_first[sequence], 0, skipped[sequence])
            self._write(rows, added - skipped, key, value, sequence, source)
        except BaseException:  # also KeyboardInterrupt
            if undo is not None:
                undo()
            raise

    def _first(self) -> int:
        """Return how many tokens the pages have that never drop out: the first ones, in whole pages."""
        size: int = self.page_size
        return -(-self.keep_first // size) * size

    def _write(self, rows: Array, added: Array, key: Array, value: Array, sequence: Array, source: Array) -> None:
        """Append tokens of which `sequence` and `source` say where they are in key and value."""
        growth = self._pages.grow(rows, added)
        if len(growth.copies):
            self._form.move(self._arrays, growth.shared, growth.copies, self.page_size)
        block, place = np.divmod(growth.filled[sequence] + each_token(added)[1], self.page_size)
        self._form.scatter(self._arrays, key, value, (sequence, source), (growth.pages[sequence, block], place))
        self._pages.commit(growth)

    def fork(self, id: int) -> int:
        """Add a sequence with all the tokens of another. It shares the pages of the other and takes none.

        Parameters
        ----------
        id : int
            Which sequence.

        Returns
        -------
        int
            Id of the new sequence.

        Raises
        ------
        KeyError
            The sequence was freed, or never added.
        TypeError
            `id` is no integer.
        """
        table, lengths, dropped = self._pages.look(self._ids("id", [self._one(id)]))
        return int(self._pages.add(lengths, table, dropped)[0])

    def truncate(self, id: int, length: int) -> None:
        """Remove the tokens of a sequence past a length. Pages that no sequence needs any more become free.

        Parameters
        ----------
        id : int
            Which sequence.
        length : int
            How many tokens to keep, at most the length of the sequence.

        Raises
        ------
        KeyError
            The sequence was freed, or never added.
        TypeError, ValueError
            An argument is no integer, or `length` is out of range: of a rolling cache, also if the tokens before it
            have dropped out already.
        """
        row = self._row(id)
        dropped = int(self._pages.sequences.dropped[row])
        now = int(self._pages.sequences.lengths[row]) + dropped
        if not check_size("length", length, 0) <= now:
            raise ValueError(f"length must lie between 0 and the current length, {now}, got {length}")
        if dropped:
            check_truncated(np.array([length]), np.array([self._first() + dropped]), self.keep_first, "length")
            if length <= self.keep_first:
                dropped = 0
        self._pages.truncate(row, int(length) - dropped, dropped)

    def free(self, id: int) -> None:
        """Remove a sequence. Pages that no sequence needs any more become free.

        Parameters
        ----------
        id : int
            Which sequence.

        Raises
        ------
        KeyError
            The sequence was freed already, or never added.
        TypeError
            `id` is no integer.
        """
        self._pages.remove(self._row(id))

    def reorder(self, ids: ArrayLike, sources: ArrayLike) -> None:
        """Let sequence ``ids[i]`` become a copy of sequence ``sources[i]``, for all i at once, as in beam search.

        Only rows of the block table are copied, and pages are shared.

        Parameters
        ----------
        ids : array of int, shape (n,)
            Which sequences, each at most once.
        sources : array of int, shape (n,)
            The sequences that they become copies of. One may be listed several times, and need not be in `ids`.

        Raises
        ------
        KeyError
            A sequence was freed, or never added.
        TypeError, ValueError
            An argument has the wrong type or shape.
        """
        rows, froms = self._rows("ids", ids, distinct=True), self._rows("sources", sources)
        if rows.shape != froms.shape:
            raise ValueError(f"sources must be as many as ids, {len(rows)}, got {len(froms)}")
        self._pages.reorder(rows, froms)

    def lengths(self, ids: ArrayLike | None = None) -> Array:
        """Return the number of tokens of sequences, those that have dropped out included.

        Parameters
        ----------
        ids : array of int, shape (n,), optional
            Which sequences; by default all, in order of id.

        Returns
        -------
        ndarray of int64, shape (n,)

        Raises
        ------
        KeyError
            A sequence was freed, or never added.
        TypeError, ValueError
            `ids` has the wrong type or shape.
        """
        _, lengths, dropped = self._look(ids)
        return lengths + dropped

    def block_table(self, ids: ArrayLike | None = None) -> Array:
        """Return the pages of sequences.

        Parameters
        ----------
        ids : array of int, shape (n,), optional
            Which sequences; by default all, in order of id.

        Returns
        -------
        ndarray of int64, shape (n, blocks)
            Entry [i, j] is the page of the tokens from ``j * page_size`` of sequence i, or -1 past its end. Pages that
            a rolling cache has dropped are left out.

        Raises
        ------
        KeyError
            A sequence was freed, or never added.
        TypeError, ValueError
            `ids` has the wrong type or shape.
        """
        return self._look(ids)[0].copy()

    @property
    def ids(self) -> Array:
        """Ids of the sequences that have not been freed, ascending: int64, a copy."""
        return self._pages.sequences.ids.copy()

    @property
    def free_pages(self) -> int:
        """The number of free pages."""
        return self._pages.num_free

    def __repr__(self) -> str:
        n = len(self._pages.sequences.ids)
        rolls = "" if self.window is None else f", window={self.window}, keep_first={self.keep_first}"
        return (
            f"PagedKVCache(num_pages={self.num_pages}, page_size={self.page_size}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, value_dim={self.value_dim}, dtype={self.dtype}, storage={self.storage}"
            f"{rolls}), {n} sequence{'' if n == 1 else 's'}, {self.free_pages} pages free"
        )

    def _repr_html_(self) -> str:
        names = ("num_pages", "page_size", "num_kv_heads", "head_dim", "value_dim", "dtype", "storage")
        rolling = ("window", "keep_first") if self.window is not None else ()
        rows: list[tuple[str, object]] = [(name, getattr(self, name)) for name in (*names, *rolling)]
        rows += [("sequences", len(self._pages.sequences.ids)), ("free pages", self.free_pages)]
        rows.append(("memory", megabytes(self._arrays)))
        colours = {0: ("none", "free"), 1: (markup.BLUE, "of one sequence")}
        pages = (
            (colour, f"page {n}: {text}")
            for n, count in enumerate(self._pages.counts[:SHOWN].tolist())
            for colour, text in [colours.get(count, (markup.ORANGE, f"shared by {count} sequences"))]
        )
        left_out = f"<p>and {self.num_pages - SHOWN} more pages</p>" if self.num_pages > SHOWN else ""
        return markup.table("PagedKVCache", rows) + markup.squares(pages) + left_out

    def _contents(self, ids: ArrayLike | None = None) -> Contents:
        table, lengths, dropped = self._look(ids)
        if self.window is not None:
            oldest = np.where(dropped > 0, self._first() + dropped, self.keep_first)
            counts, gap = kept(lengths + dropped, oldest, self.window, self.keep_first)
            if gap.dropped.any():
                return self._rolled(table, dropped, counts, gap)
        return Contents(*self._arrays, table, lengths, self.storage, self.dtype, self._originals)

    def _rolled(self, table: Array, dropped: Array, counts: Array, gap: Gap) -> Contents:
        """Return what sequences keep, in pages of one token: what has dropped out is inside of pages."""
        if self._tokens is None:
            self._tokens = token_pages(self._arrays)
        size, first = self.page_size, gap.first
        tokens = np.zeros((len(table), int(counts.max(initial=0))), np.int64)
        inside = np.arange(size)
        for i, (before, left_out, count) in enumerate(zip(dropped, gap.dropped, counts, strict=True)):
            all_tokens = (table[i, :, None] * (self.num_kv_heads * size) + inside).ravel()
            tokens[i, : min(count, first)] = all_tokens[: min(count, first)]
            start = first + left_out - before
            tokens[i, first:count] = all_tokens[start : start + max(count - first, 0)]
        return Contents(*self._tokens, tokens, counts, self.storage, self.dtype, self._originals, gap, by_tokens=True)

    def __copy__(self) -> Self:
        """As `copy.deepcopy`: with arrays of its own, as a copy of an array, so that `append` changes one of them."""
        return deepcopy(self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokens": None}  # views of the arrays, which a copy must make of its own

    def _saved(self, ids: Array) -> Callable[[], None]:
        """Return a function that undoes the next `append` of a token to these sequences."""
        lengths = self.lengths(ids).tolist()

        def undo() -> None:
            for one, length in zip(ids.tolist(), lengths, strict=True):
                self.truncate(one, length)

        return undo

    def _look(self, ids: ArrayLike | None) -> tuple[Array, Array, Array]:
        return self._pages.look(None if ids is None else self._ids("ids", ids))

    def _rows(self, name: str, ids: ArrayLike, distinct: bool = False) -> Array:
        return self._pages.rows(self._ids(name, ids, distinct))

    def _ids(self, name: str, ids: ArrayLike, distinct: bool = False) -> Array:
        wanted = check_ints(name, ids)
        if wanted.ndim != 1:
            raise ValueError(f"{name} must have shape (n,), got {wanted.shape}")
        if distinct and len(wanted) > 1:
            ordered = np.sort(wanted)
            twice = ordered[1:][ordered[1:] == ordered[:-1]]
            if twice.size:
                raise ValueError(f"{name} must be distinct, got {twice[0]} twice")
        return wanted

    def _row(self, id: Any) -> int:
        return int(self._pages.rows(np.array([self._one(id)]))[0])

    def _one(self, id: Any) -> int:
        wanted = check_ints("id", id)
        if wanted.ndim != 0:
            raise TypeError(f"id must be an integer, got {id!r}")
        return int(wanted)
