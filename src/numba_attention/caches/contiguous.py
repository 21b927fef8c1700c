"""KVCache: the keys and the values of a batch, in one array each."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .. import markup
from ..device.arrays import to_host
from ..device.headers import address_of
from ..errors import CacheFullError
from ..options import Array
from .checks import (
    check_dtype,
    check_held,
    check_ints,
    check_lengths,
    check_new,
    check_size,
    check_writeable,
)
from .contents import Contents
from .device_storage import DeviceStorage, Originals
from .rolling import check_truncated, check_window, kept
from .storage import Arrays, Storage, each_token, megabytes, storage_format, token_pages

SHOWN = 16  # sequences in the picture of a cache


class KVCache:
    """Keys and values of the tokens so far, in one array for a whole batch.

    Memory for `capacity` tokens of each sequence is allocated at once. If lengths differ much, or sequences come and
    go, `PagedKVCache` needs less memory.

    Parameters
    ----------
    batch, num_kv_heads, capacity, head_dim : int
        Shape of the keys: sequences, key/value heads, tokens that fit, features.
    value_dim : int, optional
        Features of a value, if not `head_dim`.
    dtype : dtype, default numpy.float32
        float32, float64, float16 or ``ml_dtypes.bfloat16``: the dtype of what is appended, of queries and of results.
    storage : {None, "float16", "bfloat16", "int8", "float8"}, optional
        How numbers are stored; None means as they are. "int8" and "float8" (e4m3fn) have a float32 scale for each token
        and head. "bfloat16" and "float8" need the extra ``bfloat16``.
    window : int, optional
        Let the cache roll: each sequence keeps its newest `window` tokens and its first `keep_first`, and every other
        token drops out when it is too old. Such a cache is never full. `capacity` must be at least
        ``window + keep_first``; `truncate` can take back as many tokens as there is room beyond that without losing
        any of the window.
    keep_first : int, default 0
        The number of first tokens that never drop out, as the attention sinks of StreamingLLM [1]_.

    Attributes
    ----------
    batch, num_kv_heads, capacity, head_dim, value_dim, window, keep_first : int
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
    PagedKVCache : the same in pages, which sequences may share.

    Notes
    -----
    With "int8" and "float8" the row of one token and head is stored as ``round(x / scale)``, where scale is
    ``max|x| / 127`` or ``max|x| / 448``; a row with NaN or infinity reads as NaN. "float16" and "bfloat16" round to
    nearest, and keep NaN and infinity. Finite numbers saturate: beyond the range of the format (65504 in "float16",
    3.39e38 in "bfloat16", the range of float32 in "int8" and "float8") they are stored as its largest number.

    Threads may read one cache at the same time. While one thread changes it, what others read is undefined, but they
    read nothing outside its arrays.

    A rolling cache is a ring buffer: a new token overwrites the one that dropped out, and nothing is moved. Positions
    stay true: `lengths` counts all tokens that were appended, and `attention_decode` and layers use the position that
    each key had when it was appended for causality, windows, ALiBi and rotary embeddings.

    References
    ----------
    .. [1] Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2024, section 3.2. There, positions
       are those within the cache; here they are those in the text.

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> cache = na.KVCache(batch=2, num_kv_heads=4, capacity=100, head_dim=8)
    >>> key, value = np.random.default_rng(0).standard_normal((2, 2, 4, 10, 8), dtype=np.float32)
    >>> cache.append(key, value, lengths=[10, 7])  # two prompts, the second padded
    >>> cache.append(key[:, :, :1], value[:, :, :1])  # one new token each
    >>> cache.lengths
    array([11,  8])
    >>> cache.truncate([11, 5])
    >>> cache
    KVCache(batch=2, num_kv_heads=4, capacity=100, head_dim=8, value_dim=8, dtype=float32, storage=float32),
    lengths 5 to 11

    A cache that keeps the first two and the newest five tokens:

    >>> rolling = na.KVCache(batch=1, num_kv_heads=4, capacity=7, head_dim=8, window=5, keep_first=2)
    >>> rolling.append(key[:1], value[:1])
    >>> rolling.positions
    array([[0, 1, 7, 8, 9, 5, 6]])
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: DTypeLike = np.float32,
        storage: DTypeLike | str | None = None,
        *,
        window: int | None = None,
        keep_first: int = 0,
    ) -> None:
        shape = (
            check_size("batch", batch),
            check_size("num_kv_heads", num_kv_heads),
            check_size("capacity", capacity, 0),
        )
        E = check_size("head_dim", head_dim)
        Ev = E if value_dim is None else check_size("value_dim", value_dim)
        kind = check_dtype(dtype)
        form = storage_format(storage, kind)
        span, first = check_window(window, keep_first, shape[2])
        key, key_scale = form.allocate((*shape, E))
        value, value_scale = form.allocate((*shape, Ev))
        self._hold(
            Contents(key, value, key_scale, value_scale, None, np.zeros(shape[0], np.int64), form.name, kind), form,
            window=span, keep_first=first,
        )  # fmt: skip

    def _hold(
        self,
        contents: Contents,
        form: Storage,
        read_only: str | None = None,
        window: int | None = None,
        keep_first: int = 0,
    ) -> None:
        self._stored = contents
        self._form = form
        self._read_only = read_only
        self.batch, self.num_kv_heads, self.capacity, self.head_dim = contents.key.shape
        self.value_dim = contents.value.shape[-1]
        self.dtype, self.storage = contents.dtype, contents.storage
        self._common: int | None = None
        self._rows: list[tuple[int, int]] | None = None  # on a GPU: address of each array, and bytes from row to row
        self._lengths = contents.lengths  # changed in place, so that `contents` stays valid
        self.window, self.keep_first = window, keep_first
        # Of a rolling cache: the oldest position of each sequence, past the first tokens, that is still stored.
        self._oldest = np.full(self.batch, keep_first)
        self._tokens: Arrays | None = None
        self._settle()

    @classmethod
    def from_arrays(
        cls,
        key: Array,
        value: Array,
        lengths: ArrayLike | None = None,
        *,
        key_scale: Array | None = None,
        value_scale: Array | None = None,
        dtype: DTypeLike | None = None,
        window: int | None = None,
        keep_first: int = 0,
    ) -> Self:
        """Make a cache of existing arrays, without a copy.

        The cache reads the arrays themselves, and `append` writes to them.

        Parameters
        ----------
        key : ndarray, shape (batch, Hkv, capacity, E)
            float32, float64, float16 or ``ml_dtypes.bfloat16`` with any strides, or 8-bit codes with scales. If it is
            read-only, or shares memory with `value`, nothing can be appended. An array on a GPU stays there:
            `attention_decode` reads it there, and kernels append to it.
        value : ndarray, shape (batch, Hkv, capacity, Ev)
            In the dtype of `key`.
        lengths : int or array of int, shape (batch,), optional
            How many tokens of each sequence are valid; by default all.
        key_scale, value_scale : ndarray, shape (batch, Hkv, capacity), optional
            float32, tokens contiguous: the factor of the numbers of each token and head, if `key` and `value` are int8
            or ``ml_dtypes.float8_e4m3fn``. The codes are finite; a row with NaN has a scale of NaN.
        dtype : dtype, optional
            The dtype of queries and results, if `key` and `value` have fewer bits: float16 or bfloat16, with contiguous
            features, or 8 bits with scales. By default it is their own, or float32 if there are scales.
        window : int, optional
        keep_first : int, default 0
            Let the cache roll, as in `KVCache`; no token has dropped out yet.

        Returns
        -------
        KVCache

        Raises
        ------
        TypeError, ValueError
            An argument has the wrong type, dtype or shape, or is out of range; the message names it.

        Examples
        --------
        >>> import numpy as np, numba_attention as na
        >>> key, value = np.zeros((2, 1, 4, 100, 8), np.float32)
        >>> cache = na.KVCache.from_arrays(key, value, lengths=40)
        >>> cache.append(np.ones((1, 4, 1, 8), np.float32), np.ones((1, 4, 1, 8), np.float32))
        >>> float(key[0, 0, 40, 0])
        1.0
        """
        names = ("key", "value")
        checked = check_held(key, value, key_scale, value_scale, dtype, names, "batch, heads and capacity")
        n, Hkv, capacity, E = checked.arrays[0].shape
        Ev = checked.arrays[1].shape[-1]
        for name, size in (("batch", n), ("num_kv_heads", Hkv), ("head_dim", E), ("value_dim", Ev)):
            check_size(name, size)
        if lengths is None:
            lengths = capacity
        held = check_lengths("lengths", to_host(lengths), n, capacity, "the capacity")
        span, first = check_window(window, keep_first, capacity)
        self = cls.__new__(cls)
        contents = Contents(*checked.arrays, None, held, checked.form.name, checked.dtype, checked.originals)
        self._hold(contents, checked.form, checked.read_only, span, first)
        return self

    def append(self, key: Array, value: Array, lengths: ArrayLike | None = None) -> None:
        """Add tokens at the end of each sequence.

        Parameters
        ----------
        key : ndarray, shape (batch, Hkv, T, E)
            In the dtype of the cache, any strides. It is copied. Of a cache on a GPU it is on the same one, or on the
            host; it is copied in the order of its stream.
        value : ndarray, shape (batch, Hkv, T, Ev)
            In the dtype of the cache.
        lengths : int or array of int, shape (batch,), optional
            How many of the T tokens to append to each sequence, from the first on; by default all.

        Raises
        ------
        CacheFullError
            A sequence would exceed the capacity. The cache is as it was.
        TypeError, ValueError
            An argument has the wrong type, dtype or shape, or is out of range, or the cache was made of arrays that
            cannot be written to. The cache is as it was.
        """
        stored = self._stored
        if stored.originals is not None:
            self._append_on_gpu(stored.originals, key, value, lengths)
            return
        T = key.shape[2] if type(key) is np.ndarray and key.ndim == 4 else -1
        if (  # appending a token takes a few microseconds, so arguments that are right are not checked one by one
            T < 0
            or type(value) is not np.ndarray
            or key.dtype is not self.dtype
            or value.dtype is not self.dtype
            or key.shape != (self.batch, self.num_kv_heads, T, self.head_dim)
            or value.shape != (self.batch, self.num_kv_heads, T, self.value_dim)
        ):
            key, value, T = self._checked(key, value)
        if self._read_only is not None:
            check_writeable(self._read_only)
        length = self._common
        if lengths is not None or length is None:
            self._append_ragged(key, value, T, T if lengths is None else lengths)
            return
        start = length if self.window is None else self._slot(length)
        stop = start + T
        if stop > self.capacity:
            if self.window is None:
                raise CacheFullError(self._full(0, T))
            self._append_ragged(key, value, T, T)
            return
        if self.window is not None:
            self._drop(self._lengths + T)
        form = self._form
        if form.dtype is self.dtype:
            stored.key[:, :, start:stop] = key
            stored.value[:, :, start:stop] = value
        elif T == 1 and form.holds(key) and form.holds(value):
            stored.key[:, :, start] = key[:, :, 0]
            stored.value[:, :, start] = value[:, :, 0]
        else:
            form.extend(stored[:4], key, value, start)
        self._common = None  # until it is true again: a signal handler may end this call between any two lines
        self._lengths.fill(length + T)
        self._common = length + T

    def _append_on_gpu(self, originals: Originals, key: Any, value: Any, lengths: Any) -> None:
        form, start, seen = self._form, self._common, None
        assert isinstance(form, DeviceStorage)
        if lengths is None and start is not None and self.window is None and self._read_only is None:
            if self._rows is None:
                self._rows = [(address_of(x), x.strides[2]) for x in self._stored[:4] if x is not None]
            seen = form.look(originals, self._rows, key, value, start, self.dtype)
            # A call like an earlier one needs no checks but that of the capacity.
            stop = start + key.shape[2] if seen is not None and len(key.shape) == 4 else self.capacity + 1
            if seen is not None and stop <= self.capacity and form.repeat(seen):
                self._common = None  # as in `append`
                self._lengths.fill(stop)
                self._common = stop
                return
        with form.using(originals, seen, key=key, value=value) as (key, value):
            key, value, T = self._checked(key, value)
            check_writeable(self._read_only)
            self._append_ragged(key, value, T, T if lengths is None else to_host(lengths))

    def _checked(self, key: Any, value: Any) -> tuple[Array, Array, int]:
        """Check keys and values to be appended; return them and how many tokens they have."""
        key = check_new("key", key, (self.batch, self.num_kv_heads, -1, self.head_dim), self.dtype)
        T = key.shape[2]
        return key, check_new("value", value, (self.batch, self.num_kv_heads, T, self.value_dim), self.dtype), T

    def _append_ragged(self, key: Array, value: Array, T: int, lengths: ArrayLike) -> None:
        stored, old = self._stored, self._lengths
        added = check_lengths("lengths", lengths, self.batch, T, "the number of tokens given")
        over = np.flatnonzero(old + added > self.capacity)
        if self._form.on_device and self._common is not None and not over.size and (added == T).all():
            self._form.extend(stored[:4], key, value, self._common)
            self._change_lengths(old + added)
            return
        if over.size and self.window is None:
            raise CacheFullError(self._full(int(over[0]), int(added[over[0]])))
        sequence, token = each_token(added)
        place = old[sequence] + token
        if over.size:
            self._drop(old + added)
            stays = (place < self.keep_first) | (place >= self._oldest[sequence])
            sequence, token, place = sequence[stays], token[stays], self._slot(place[stays])
        self._form.scatter(stored[:4], key, value, (sequence, token), (sequence, place))
        self._change_lengths(old + added)

    def _slot(self, position: Any) -> Any:
        """Return the place of a position in a rolling cache: the ring lies after the first tokens."""
        first = self.keep_first
        if isinstance(position, int):
            return position if position < self.capacity else first + (position - first) % (self.capacity - first)
        return np.where(position < first, position, first + (position - first) % (self.capacity - first))

    def _drop(self, lengths: Array) -> None:
        """Forget the positions that will be overwritten when sequences grow to these lengths."""
        np.maximum(self._oldest, lengths - (self.capacity - self.keep_first), out=self._oldest)

    def _saved(self, added: int) -> Callable[[], None]:
        """Return a function that undoes the next `append` of at most so many tokens."""
        lengths, oldest = self._lengths.copy(), self._oldest.copy()
        rows = np.arange(self.batch)[:, None]
        put_back = None
        if self.window is not None:
            places = self._slot(lengths[:, None] + np.arange(added))
            with self._form.using(self._stored.originals):
                put_back = self._form.saved(self._stored[:4], rows, places)

        def undo() -> None:
            if put_back is not None:
                with self._form.using(self._stored.originals):
                    put_back()
            self._oldest[:] = oldest
            self._change_lengths(lengths)

        return undo

    def _full(self, i: int, T: int) -> str:
        length = int(self._lengths[i])
        return (
            f"{T} more tokens are needed and {self.capacity - length} are free: "
            f"sequence {i} has {length} of a capacity of {self.capacity}"
        )

    def truncate(self, lengths: ArrayLike) -> None:
        """Remove the tokens of each sequence past a length.

        Parameters
        ----------
        lengths : int or array of int, shape (batch,)
            How many tokens to keep, at most the length of the sequence.

        Raises
        ------
        TypeError, ValueError
            `lengths` has the wrong type or shape, or is out of range: of a rolling cache, also if the tokens before it
            have dropped out already. The cache is as it was.
        """
        changed = check_lengths("lengths", lengths, self.batch, self._lengths, "the current length")
        if self.window is not None:
            check_truncated(changed, self._oldest, self.keep_first)
            self._oldest[changed <= self.keep_first] = self.keep_first
        self._change_lengths(changed)

    def reorder(self, index: ArrayLike) -> None:
        """Let sequence i become a copy of sequence ``index[i]``, for all i at once, as in beam search.

        Parameters
        ----------
        index : array of int, shape (batch,)
            A sequence may be named several times, or not at all.

        Raises
        ------
        TypeError, ValueError
            `index` has the wrong type or shape, or is out of range, or the cache was made of arrays that cannot be
            written to. The cache is as it was.
        """
        source = check_ints("index", index)
        if source.shape != (self.batch,):
            raise ValueError(f"index must have shape ({self.batch},), got {source.shape}")
        if source.min() < 0 or source.max() >= self.batch:
            raise ValueError(f"index must lie between 0 and {self.batch - 1}, got {source.min()} to {source.max()}")
        check_writeable(self._read_only)
        moved = np.flatnonzero(source != np.arange(self.batch))
        longest = min(int(self._lengths[source[moved]].max(initial=0)), self.capacity)
        with self._form.using(self._stored.originals):
            self._form.move(self._stored[:4], source[moved], moved, longest)
        self._oldest[:] = self._oldest[source]
        self._change_lengths(self._lengths[source])

    @property
    def lengths(self) -> Array:
        """The number of tokens of each sequence, those that have dropped out included: int64 (batch,), a copy."""
        return self._lengths.copy()

    @property
    def positions(self) -> Array:
        """The position of each token of `key` and `value`: int64 (batch, tokens), -1 for those that are not there."""
        place, first, lengths = np.arange(self._longest()), self.keep_first, self._lengths[:, None]
        if self.window is None:
            return np.where(place < lengths, place, -1)
        newest = lengths - 1 - (lengths - 1 - place) % (self.capacity - first)  # of the positions with this place
        begin = np.maximum(np.maximum(self._oldest, self._lengths - self.window), first)[:, None]
        kept_newest = np.where((newest >= begin) & (newest < lengths), newest, -1)
        return np.where(place < first, np.where(place < lengths, place, -1), kept_newest)

    @property
    def key(self) -> Array:
        """Keys as they are stored: a view (batch, Hkv, max(lengths), E), undefined past each length.

        A rolling cache has at most `capacity` of them, and `positions` tells which is where.
        """
        key: Array = self._held(0)
        return key

    @property
    def value(self) -> Array:
        """Values as they are stored: a view (batch, Hkv, max(lengths), Ev), undefined past each length."""
        value: Array = self._held(1)
        return value

    @property
    def key_scale(self) -> Array | None:
        """Factors of the keys, one for each token and head: a float32 view (batch, Hkv, max(lengths)).

        None if numbers are stored as they are.
        """
        scale: Array | None = self._held(2)
        return scale

    @property
    def value_scale(self) -> Array | None:
        """Factors of the values, as `key_scale`."""
        scale: Array | None = self._held(3)
        return scale

    def __repr__(self) -> str:
        rolls = "" if self.window is None else f", window={self.window}, keep_first={self.keep_first}"
        return (
            f"KVCache(batch={self.batch}, num_kv_heads={self.num_kv_heads}, capacity={self.capacity}, "
            f"head_dim={self.head_dim}, value_dim={self.value_dim}, dtype={self.dtype}, storage={self.storage}"
            f"{rolls}), lengths {self._lengths.min()} to {self._lengths.max()}"
        )

    def _repr_html_(self) -> str:
        held = np.minimum(self._lengths, self.capacity).tolist()
        shares = [
            (count / max(self.capacity, 1), f"sequence {n}: {length} tokens, {count} of {self.capacity} places")
            for n, (count, length) in enumerate(zip(held, self._lengths.tolist(), strict=True))
        ]
        left_out = f"<p>and {self.batch - SHOWN} more sequences</p>" if self.batch > SHOWN else ""
        return markup.table("KVCache", self._facts()) + markup.bars(shares[:SHOWN]) + left_out

    def _facts(self) -> list[tuple[str, object]]:
        """Return what a table about the cache says, row by row."""
        names = ("batch", "num_kv_heads", "capacity", "head_dim", "value_dim", "dtype", "storage")
        rolling = ("window", "keep_first") if self.window is not None else ()
        rows = [(name, getattr(self, name)) for name in (*names, *rolling)]
        lengths = f"{self._lengths.min()} to {self._lengths.max()}"
        return [*rows, ("lengths", lengths), ("memory", megabytes(self._stored[:4]))]

    def _contents(self) -> Contents:
        if self.window is None:
            return self._stored
        stored, lengths = self._stored, self._lengths.copy()
        originals = stored.originals
        counts, gap = kept(lengths, self._oldest, self.window, self.keep_first)
        if not gap.dropped.any():
            return stored
        if self._tokens is None:
            self._tokens = token_pages(stored[:4])
        first, ring = self.keep_first, self.capacity - self.keep_first
        twice = np.concatenate([np.arange(first, self.capacity)] * 2)
        longest = int(counts.max()) - first
        table = np.empty((self.batch, first + longest), np.int64)
        table[:, :first] = np.arange(first)
        for i, start in enumerate((gap.dropped % ring).tolist()):
            table[i, first:] = twice[start : start + longest]
        table += np.arange(self.batch)[:, None] * (self.num_kv_heads * self.capacity)
        return Contents(*self._tokens, table, counts, stored.storage, stored.dtype, originals, gap, by_tokens=True)

    def __copy__(self) -> Self:
        """As `copy.deepcopy`: with arrays of its own, as a copy of an array, so that `append` changes one of them."""
        return deepcopy(self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokens": None, "_rows": None}  # of the arrays, which a copy must make of its own

    def _held(self, n: int) -> Any:
        """Return array n of the contents, as the caller passed it, up to the longest sequence."""
        stored: Any = self._stored
        array = stored[n] if stored.originals is None else stored.originals[n]
        return None if array is None else array[:, :, : self._longest()]

    def _longest(self) -> int:
        capacity: int = self.capacity
        return min(int(self._lengths.max()), capacity)

    def _change_lengths(self, lengths: Array) -> None:
        self._common = None  # until it is true again: a signal handler may end this call between any two lines
        self._lengths[:] = lengths
        self._settle()

    def _settle(self) -> None:
        """Find the length that all sequences have in common, or None: then appending cannot write to a plain slice."""
        first = int(self._lengths[0])
        self._common = first if (self._lengths == first).all() else None
