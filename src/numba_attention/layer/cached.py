"""`MultiHeadAttention` with a cache: new keys and values are appended, and new queries attend to the whole cache."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..api import attention, merge_attention
from ..caches import KVCache, PagedKVCache
from ..caches.checks import check_ints, check_lengths
from ..decoding import attention_decode
from ..options import Array, Options
from ..problem.cached import is_plain
from ..problem.rolling import refuse_positional
from ..rotary import Rotation, rotate
from ..validation import as_ints, as_window, broadcast_to
from .heads import Heads, Positions
from .inputs import check_inputs
from .positions import Turns

Cache = KVCache | PagedKVCache


def attend(
    layer: Heads, query: Array, key: Array | None, value: Array | None, padding: ArrayLike | None, cache: Cache,
    ids: Any, positions: Positions | None, options: dict[str, Any],
) -> Array:  # fmt: skip
    """Project the inputs, append to the cache, attend to it, and project the result."""
    is_self = key is None
    query, key, value, _ = check_inputs(query, key, value, (layer.embed_dim, layer.kdim, layer.vdim), layer.dtype)
    if padding is not None:
        raise ValueError(
            "key_padding_mask must be None with a cache: say how many of the new keys are there with key_lengths=, "
            "and what may be attended to with mask=, about all cached keys or the newest (True = may attend)"
        )
    flat = query.ndim == key.ndim == value.ndim == 2
    q, k, v = layer._project(query, key, value)
    if flat:
        q, k, v = q[None], k[None], v[None]
    turns = layer._turns(positions, query.shape[:-1], key.shape[:-1], is_self)
    heads = _attend(cache, ids, q, k, v, turns or layer._rotation, options | {"backend": layer.backend})
    out = layer._project_back(heads)
    return out[0] if flat else out


def _attend(
    cache: Cache, ids: Any, q: Array, k: Array, v: Array, rotation: Rotation | Turns | None, options: dict[str, Any]
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
    if isinstance(rotation, Rotation):
        of_queries = of_keys = _positions(q, options["query_offset"])
        if options["query_offset"] is not before or k.shape[2] != q.shape[2]:
            of_keys = _positions(k, before)
        rotation = rotation.of_length(of_queries, of_keys)
        turn = rotation.turn(of_queries, q.dtype)
        rotation = turn, turn if of_keys is of_queries else rotation.turn(of_keys, k.dtype)
    if rotation is not None:
        rotate(q, rotation[0], q)
        rotate(k, rotation[1], k)
    if _is_step(cache, q, k, options, before):
        return _attend_step(cache, _ids(cache, ids), q, k, v, options["scale"])
    lengths, options["key_lengths"] = options.get("key_lengths"), None
    if lengths is not None:
        lengths = check_lengths("key_lengths", lengths, len(k), k.shape[2], "the number of new keys")
    heads = np.empty((len(q), q.shape[2], q.shape[1], v.shape[-1]), q.dtype)
    ids = _ids(cache, ids)
    if cache.window is not None and k.shape[2] > 1:
        added = np.full(len(k), k.shape[2]) if lengths is None else lengths
        if (before + added > cache.window + cache.keep_first).any():
            heads.swapaxes(1, 2)[...] = _attend_rolling(cache, ids, q, k, v, before, added, options)
            _append(cache, ids, k, v, lengths)
            return heads
    undo = cache._saved(k.shape[2]) if isinstance(cache, KVCache) else cache._saved(ids)
    _append(cache, ids, k, v, lengths)
    try:
        attention_decode(q, cache, ids=ids, out=heads.swapaxes(1, 2), **options)
    except BaseException:  # also KeyboardInterrupt
        undo()
        raise
    return heads


def _is_step(cache: Cache, q: Array, k: Array, options: dict[str, Any], before: Array) -> bool:
    """Whether each sequence has one query, which sees all keys there will be, and options are those of a plain step.

    `attention_decode` then needs no option but `scale`, and recognises calls like earlier ones.
    """
    if q.shape[2] != 1 or cache.window is not None or options["backend"] is not None:
        return False
    is_causal = options["is_causal"]
    sees_all = is_causal is False or (is_causal is True and k.shape[2] == 1)
    others = {name: x for name, x in options.items() if name != "backend"}
    return sees_all and options["query_offset"] is before and is_plain(Options(**others | {"query_offset": None}))


def _attend_step(cache: Cache, ids: Any, q: Array, k: Array, v: Array, scale: float | None) -> Array:
    options: Any = {} if scale is None else {"scale": scale}
    undo = cache._saved(k.shape[2]) if isinstance(cache, KVCache) else cache._saved(ids)
    _append(cache, ids, k, v, None)
    try:
        # Without `out`: for one query, (batch, H, 1, E) in memory is (batch, 1, H, E) too.
        heads = attention_decode(q, cache, ids=ids, **options)
    except BaseException:  # also KeyboardInterrupt
        undo()
        raise
    assert isinstance(heads, np.ndarray)
    return heads.swapaxes(1, 2)


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


def _append(cache: Cache, ids: Any, k: Array, v: Array, lengths: Any) -> None:
    if isinstance(cache, KVCache):
        cache.append(k, v, lengths)
    else:
        cache.append(ids, k, v, lengths)


def _attend_rolling(
    cache: Cache, ids: Any, q: Array, k: Array, v: Array, before: Array, added: Array, options: dict[str, Any]
) -> Array:
    """Attend to a rolling cache and to several tokens that will be appended to it, as if they came one by one.

    A query at position p sees what the cache would keep once p was the newest: the first tokens, and of all others
    those after ``p - window``. Each of the four parts of these keys is one interval for each query, and their results
    are merged: the cache's first tokens, its newest, the new tokens in the window, and among the new tokens those first
    ones that are further back.
    """
    n, first = cache.window, cache.keep_first
    assert n is not None
    refused = [name for name in ("mask", "bias", "prefix_lengths") if options.get(name) is not None]
    if refused:
        raise ValueError(
            f"{refused[0]} must be None where several tokens are appended to a rolling cache and others drop out; "
            "append one at a time, or attend before the window is full"
        )
    refuse_positional(options)
    position, slopes = options["query_offset"], options.get("alibi_slopes")
    left, right = as_window(options.get("window"))
    near = n - 1 if left is None else min(left, n - 1)
    contents = cache._contents() if isinstance(cache, KVCache) else cache._contents(ids)
    backend, results = options.pop("backend"), []
    if contents.lengths.any():
        dropped = np.zeros_like(before) if contents.gap is None else contents.gap.dropped
        key, value = (x.astype(q.dtype) for x in contents.dense())
        kept = contents.lengths
        of_first = options | {"query_offset": position, "key_lengths": np.minimum(kept, first)}
        newest = options | {
            "query_offset": position - first - dropped, "key_lengths": np.maximum(kept - first, 0), "sinks": None,
            "window": (near, right),
        }  # fmt: skip
        for part, where in ((of_first, slice(0, first)), (newest, slice(first, None))):
            results.append(attention(q, key[:, :, where], value[:, :, where], return_lse=True, backend=backend, **part))
        options["sinks"] = None
    new = options | {"query_offset": position - before, "key_lengths": added, "window": (near, right)}
    results.append(attention(q, k, v, return_lse=True, backend=backend, **new))
    if (before < first).any() and (left is None or left >= n):
        # Keys at least n before the query: causal, with queries n further back.
        far = options | {
            "query_offset": position - before - n, "key_lengths": np.clip(first - before, 0, added), "sinks": None,
            "is_causal": True, "window": None if left is None else (left - n, None),
        }  # fmt: skip
        out, lse = attention(q, k, v, return_lse=True, backend=backend, **far)
        if slopes is not None:  # these distances are n too small
            lse -= (np.broadcast_to(slopes, (len(q), q.shape[1])) * n)[..., None].astype(lse.dtype)
        results.append((out, lse))
    return merge_attention(*zip(*results, strict=True))[0]


def _positions(x: Array, first: Array) -> Array:
    """Return the positions of rows, which begin at `first` in every sequence."""
    rows = np.arange(x.shape[-2])
    return first[0] + rows if len(set(first.tolist())) == 1 else first[:, None, None] + rows
