"""A cache that holds every sequence in one piece."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import CacheFullError
from ..options import Array
from .checks import check_dtype, check_new, lengths_of, size_of
from .contents import Contents
from .storage import aligned, encode, has_scale, resolve


class KVCache:
    """Keys and values of a batch of sequences that grow token by token, for `attention_decode`.

    Parameters
    ----------
    batch, num_kv_heads, capacity, head_dim : int
        Sequences, key/value heads, most tokens of a sequence, features of a key (E).
    value_dim : int, optional
        Features of a value (Ev), by default `head_dim`.
    dtype : dtype, default float32
        Of the keys, values and queries: float32, float64, float16 or ``ml_dtypes.bfloat16``.
    storage : {None, "float16", "bfloat16", "int8", "float8"} or dtype, optional
        How numbers are held, by default as they are. int8 and float8 (e4m3fn) have a float32 scale for every token and
        head, which takes the largest magnitude to 127 or 448. bfloat16 and float8 need ml_dtypes.

    Attributes
    ----------
    capacity, batch, num_kv_heads, head_dim, value_dim : int
    dtype : dtype
    storage : str

    Raises
    ------
    TypeError, ValueError, ImportError
        An argument has the wrong type or is out of range.

    See Also
    --------
    PagedKVCache : for sequences that come and go, or share a prefix.
    attention_decode : reads it.

    Notes
    -----
    All memory is allocated at once, ``batch * num_kv_heads * capacity * (head_dim + value_dim)`` numbers; the operating
    system provides it as it is filled. Several threads may read a cache at once while none changes it.

    References
    ----------
    .. [1] Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need", 2019, section 2.4.

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> cache = na.KVCache(batch=2, num_kv_heads=4, capacity=100, head_dim=64)
    >>> new = np.ones((2, 4, 7, 64), np.float32)
    >>> cache.append(new, new, lengths=[7, 5])
    >>> cache.lengths
    array([7, 5])
    >>> cache.truncate([4, 5])  # undo the last 3 tokens of the first sequence
    >>> cache.key.shape
    (2, 4, 5, 64)
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: Any = np.float32,
        storage: Any = None,
    ) -> None:
        batch, heads = size_of("batch", batch), size_of("num_kv_heads", num_kv_heads)
        capacity, E = size_of("capacity", capacity), size_of("head_dim", head_dim)
        Ev = E if value_dim is None else size_of("value_dim", value_dim)
        real = check_dtype(dtype)
        name, stored = resolve(storage, real)
        key, value = (aligned((batch, heads, capacity, n), stored) for n in (E, Ev))
        scales = [aligned(key.shape[:3], np.dtype(np.float32)) if has_scale(name) else None for _ in range(2)]
        self._place(Contents(key, value, scales[0], scales[1], None, np.zeros(batch, np.int64), name, real))

    def _place(self, contents: Contents) -> None:
        self._held = contents
        self.batch, self.num_kv_heads, self.capacity, self.head_dim = contents.key.shape
        self.value_dim = contents.value.shape[-1]
        self.dtype, self.storage = contents.dtype, contents.storage
        lengths = contents.lengths
        # The length of all sequences while they have one: then appending is one assignment.
        self._common: int | None = int(lengths[0]) if self.batch and (lengths == lengths[0]).all() else None
        self._shapes = (
            (self.batch, self.num_kv_heads),
            self.head_dim,
            self.value_dim,
        )

    @classmethod
    def from_arrays(cls, key: Array, value: Array, lengths: ArrayLike | None = None) -> "KVCache":
        """Make a cache of arrays that are there already, without a copy.

        Parameters
        ----------
        key : ndarray, shape (batch, Hkv, capacity, E)
            Any strides. What is appended is written to it; a read-only array makes a cache that cannot grow.
        value : ndarray, shape (batch, Hkv, capacity, Ev)
            dtype of `key`.
        lengths : int or array of int, shape (batch,), optional
            How many tokens of each sequence there are, by default all.

        Returns
        -------
        KVCache
        """
        for name, x in (("key", key), ("value", value)):
            if not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray | np.matrix):
                raise TypeError(f"{name} must be a numpy.ndarray, got {type(x).__module__}.{type(x).__qualname__}")
            if x.ndim != 4:
                raise ValueError(f"{name} must have shape (batch, heads, capacity, features), got {x.shape}")
        dtype = check_dtype(key.dtype, "key")
        if value.dtype != dtype:
            raise TypeError(f"value must have the dtype of key, {dtype}, got {value.dtype}")
        if value.shape[:3] != key.shape[:3]:
            raise ValueError(f"value must have shape {(*key.shape[:3], 'Ev')}, as key has, got {value.shape}")
        batch, _, capacity, _ = key.shape
        own = np.full(batch, capacity) if lengths is None else lengths_of(lengths, batch, capacity)
        cache = cls.__new__(cls)
        cache._place(Contents(key.view(np.ndarray), value.view(np.ndarray), None, None, None, own, dtype.name, dtype))
        return cache

    @property
    def lengths(self) -> Array:
        """Tokens in each sequence, int64 (batch,); a copy."""
        return self._held.lengths.copy()

    @property
    def key(self) -> Array:
        """The keys as they are stored, a view (batch, Hkv, longest length, E); what is past a length is arbitrary."""
        return self._held.key[:, :, : self._longest()]

    @property
    def value(self) -> Array:
        """The values as they are stored, a view (batch, Hkv, longest length, Ev)."""
        return self._held.value[:, :, : self._longest()]

    @property
    def key_scale(self) -> Array | None:
        """Scales of the keys, a view (batch, Hkv, longest length), or None if the storage has none."""
        scale = self._held.key_scale
        return None if scale is None else scale[:, :, : self._longest()]

    @property
    def value_scale(self) -> Array | None:
        """Scales of the values, a view (batch, Hkv, longest length), or None if the storage has none."""
        scale = self._held.value_scale
        return None if scale is None else scale[:, :, : self._longest()]

    def _longest(self) -> int:
        return int(self._held.lengths.max(initial=0))

    def _contents(self) -> Contents:
        return self._held

    def append(self, key: Array, value: Array, lengths: ArrayLike | None = None) -> None:
        """Add tokens to the end of every sequence.

        Parameters
        ----------
        key : ndarray, shape (batch, Hkv, T, E)
            dtype of the cache. Any strides.
        value : ndarray, shape (batch, Hkv, T, Ev)
        lengths : int or array of int, shape (batch,), optional
            How many of the T tokens each sequence gets, the first ones; by default all.

        Raises
        ------
        CacheFullError
            A sequence would be longer than the capacity; nothing was appended.
        TypeError, ValueError
            Wrong type, dtype or shape.
        """
        held, start = self._held, self._common
        T = check_new(key, value, self._shapes, self.dtype)
        if start is None or lengths is not None or held.key_scale is not None:
            self._append_ragged(key, value, T, lengths)
            return
        end = start + T
        if end > self.capacity:
            raise self._full(np.full(self.batch, end))
        if not (held.key.flags.writeable and held.value.flags.writeable):
            raise ValueError("the cache was made of a read-only array and cannot grow")
        held.key[:, :, start:end] = key
        held.value[:, :, start:end] = value
        held.lengths[:] = end
        self._common = end

    def _full(self, ends: Array) -> CacheFullError:
        return CacheFullError(f"the capacity of the cache is {self.capacity} tokens, {ends.max()} would be needed")

    def _append_ragged(self, key: Array, value: Array, T: int, lengths: ArrayLike | None) -> None:
        """Sequence by sequence, unless all are alike."""
        held = self._held
        counts = np.full(self.batch, T) if lengths is None else lengths_of(lengths, self.batch, T)
        starts, ends = held.lengths, held.lengths + counts
        if (ends > self.capacity).any():
            raise self._full(ends)
        if not (held.key.flags.writeable and held.value.flags.writeable):
            raise ValueError("the cache was made of a read-only array and cannot grow")
        if self._common is not None and (counts == counts[:1]).all():
            groups: list[tuple[Any, int, int]] = [(slice(None), self._common, int(counts[0]))]
        else:
            groups = [(slice(b, b + 1), int(starts[b]), int(counts[b])) for b in range(self.batch)]
        for which, start, count in groups:
            rows = slice(start, start + count)
            for new, codes, scale in ((key, held.key, held.key_scale), (value, held.value, held.value_scale)):
                own = None if scale is None else scale[which, :, rows]
                encode(new[which, :, :count], self.storage, codes[which, :, rows], own)
        held.lengths[:] = ends
        self._common = int(ends[0]) if self.batch and (ends == ends[0]).all() else None

    def truncate(self, lengths: ArrayLike) -> None:
        """Shorten sequences: take back tokens that were appended last.

        Parameters
        ----------
        lengths : int or array of int, shape (batch,)
            New lengths, none larger than now.
        """
        held = self._held
        new = lengths_of(lengths, self.batch, self.capacity)
        if (new > held.lengths).any():
            raise ValueError(f"lengths must not exceed those of the cache, {held.lengths}, got {new}")
        held.lengths[:] = new
        self._common = int(new[0]) if self.batch and (new == new[0]).all() else None

    def reorder(self, index: ArrayLike) -> None:
        """Make sequence i what sequence ``index[i]`` was, for all i at once: the step of a beam search.

        Parameters
        ----------
        index : array of int, shape (batch,)
        """
        chosen = np.asarray(index)
        if chosen.dtype.kind not in "iu" or chosen.shape != (self.batch,):
            raise ValueError(
                f"index must be an array of int of shape ({self.batch},), got {chosen.dtype} {chosen.shape}"
            )
        if self.batch and (chosen.min() < 0 or chosen.max() >= self.batch):
            raise ValueError(f"index must lie between 0 and {self.batch - 1}, got {chosen}")
        held, longest = self._held, self._longest()
        for array in (held.key, held.value, held.key_scale, held.value_scale):
            if array is not None:
                array[:, :, :longest] = array[chosen, :, :longest]
        held.lengths[:] = held.lengths[chosen]
        self._common = self._common if self._common is not None else None

    def __repr__(self) -> str:
        return (
            f"KVCache(batch={self.batch}, num_kv_heads={self.num_kv_heads}, capacity={self.capacity}, "
            f"head_dim={self.head_dim}, value_dim={self.value_dim}, dtype={self.dtype}, storage={self.storage!r}, "
            f"lengths={self._held.lengths})"
        )
