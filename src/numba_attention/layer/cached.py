"""`MultiHeadAttention` with a cache: new keys and values are appended, and new queries attend to the whole cache."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..caches import KVCache, PagedKVCache
from ..caches.checks import check_ints, check_lengths
from ..decoding import attention_decode
from ..options import Array
from ..rotary import Rotation, rotate
from ..validation import as_ints, broadcast_to

Cache = KVCache | PagedKVCache


def attend(
    cache: Cache, ids: Any, q: Array, k: Array, v: Array, rotation: Rotation | None, options: dict[str, Any]
) -> Array:
    """Append k and v, (batch, Hkv, T, E), and return the attention of q, (batch, H, L, E), as (batch, L, H, E).

    New positions follow those in the cache. If an argument is refused, the cache is as it was.
    """
    before = _lengths(cache, ids)
    if q.ndim != 4 or len(before) != len(q) or len(k) != len(q):
        raise ValueError(
            f"query must have shape (batch, length, features), where the cache has {len(before)} sequences; "
            f"got {len(q) if q.ndim == 4 else q.ndim - 3} sequences"
        )
    if options.get("query_offset") is None:
        options["query_offset"] = before
    else:
        options["query_offset"] = broadcast_to(
            "query_offset", as_ints("query_offset", options["query_offset"]), before.shape
        )
    if rotation is not None:
        _rotate(k, before, rotation)
        _rotate(q, options["query_offset"], rotation)
    lengths, options["key_lengths"] = options.get("key_lengths"), None
    if lengths is not None:
        lengths = check_lengths("key_lengths", lengths, len(k), k.shape[2], "the number of new keys")
    heads = np.empty((len(q), q.shape[2], q.shape[1], v.shape[-1]), q.dtype)
    ids = _ids(cache, ids)
    undo = _append(cache, ids, k, v, lengths, before)
    try:
        attention_decode(q, cache, ids=ids, out=heads.swapaxes(1, 2), **options)
    except BaseException:  # also KeyboardInterrupt
        undo()
        raise
    return heads


def _ids(cache: Cache, ids: Any) -> Any:
    if isinstance(cache, KVCache):
        if ids is not None:
            raise ValueError("ids must be None for a KVCache, whose sequences are all used")
        return None
    if not isinstance(cache, PagedKVCache):
        kind = f"{type(cache).__module__}.{type(cache).__qualname__}"
        raise TypeError(f"cache must be a KVCache or a PagedKVCache, got {kind}")
    return cache.ids if ids is None else np.atleast_1d(check_ints("ids", ids))


def _lengths(cache: Cache, ids: Any) -> Array:
    ids = _ids(cache, ids)
    lengths: Array = cache.lengths if isinstance(cache, KVCache) else cache.lengths(ids)
    return lengths


def _append(cache: Cache, ids: Any, k: Array, v: Array, lengths: Any, before: Array) -> Callable[[], None]:
    """Append to the cache; return a function that undoes it."""
    if isinstance(cache, KVCache):
        cache.append(k, v, lengths)
        return lambda: cache.truncate(before)
    cache.append(ids, k, v, lengths)

    def undo() -> None:
        for one, length in zip(ids, before, strict=True):
            cache.truncate(int(one), int(length))

    return undo


def _rotate(x: Array, first: Array, rotation: Rotation) -> None:
    """Rotate rows in place to their positions, which begin at `first` in every sequence."""
    if len(set(first.tolist())) == 1:
        positions = first[0] + np.arange(x.shape[-2])
    else:
        positions = first[:, None, None] + np.arange(x.shape[-2])
    rotate(x, rotation.turn(positions, x.dtype), x)
