"""Attention of the newest tokens to a cache of all keys and values so far."""

from __future__ import annotations  # short types in help()

from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike

from . import device_call
from .backends import Backend, is_host_default, recall, select
from .caches import KVCache, PagedKVCache
from .caches.contents import Contents
from .device import runtime
from .device.arrays import on_device
from .foreign import Family
from .masks.blockmask import BlockMask
from .merging import merge
from .options import Array, OptionArguments, Options, check_names, gather, takes_options
from .problem.cached import build, is_of_newest, over_newest
from .problem.dense import Empty
from .problem.rolling import over_gap
from .validation import as_flag

_AS_GIVEN: dict[str, Any] = {"is_causal": "bottom-right"}
_NEWEST = Options(**_AS_GIVEN)


@takes_options(is_causal="bottom-right")
def attention_decode(
    query: Array,
    cache: KVCache | PagedKVCache,
    *,
    ids: ArrayLike | None = None,
    return_lse: bool = False,
    out: Array | None = None,
    backend: str | None = None,
    **options: Unpack[OptionArguments],
) -> Array | tuple[Array, Array]:
    r"""Attention of the newest positions to everything in a key/value cache, at the speed of reading it once.

    Parameters
    ----------
    query : ndarray, shape (batch, H, L, E)
        Queries of the L newest positions of every sequence, whose keys and values are in the cache already: one to
        generate a token, a few to check guessed tokens, many to read a prompt in pieces (chunked prefill). In the dtype
        of the cache, with any strides. The shape may be (H, L, E) if there is one sequence.
    cache : KVCache or PagedKVCache
        H must be a multiple of its number of key/value heads.
    ids : int or array of int, shape (batch,), optional
        Which sequences of a `PagedKVCache`; by default all of them, in the order of their ids.
    mask : array of bool, broadcastable to (batch, H, L, S), or BlockMask, optional
        True where a query may attend to a key; S is the length of the longest sequence, in a rolling cache the number
        of its kept keys, which are in order of position. With L columns instead of S, it
        refers to the L newest keys of each sequence, and all keys before them are visible: a tree of guesses. Three
        axes mean (H, L, keys), or (batch, L, keys) if batch is not H; (batch, 1, L, keys) is never ambiguous.
    bias : array of float, broadcastable to (batch, H, L, S), optional
        Added to the scaled scores, or with L columns to those of the newest keys.
    is_causal : bool or {"top-left", "bottom-right"}, default "bottom-right"
        By default the queries are the last positions of their sequence: query i sees the keys up to position
        ``length - L + i``, its own. False: all keys.
    **options
        As in `attention`. `query_lengths` says how many of the L queries of each sequence are valid; these are then
        its last positions.
    key_lengths : int or array of int, shape (batch,), optional
        How many keys of each sequence to use, at most its length; by default all. Of a rolling cache, up to which
        position.
    return_lse : bool, default False
        Also return the natural log of the softmax denominator of each row.
    out : ndarray, shape (batch, H, L, Ev), optional
        Array for the result.
    backend : {"auto", "cpu", "cuda", "reference"}, optional
        As in `attention`.

    Returns
    -------
    out : ndarray, shape (batch, H, L, Ev)
        dtype of `query`. The result of a sequence without keys is 0.
    lse : ndarray, shape (batch, H, L)
        Only if `return_lse`.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As in `attention`; the message names the argument.

    See Also
    --------
    KVCache, PagedKVCache : where keys and values are kept.
    merge_attention : join results, of a prefix that many sequences share for example.

    Notes
    -----
    With few queries the keys are split among the threads and the partial results merged ("flash decoding" [1]_). Query
    heads that share a key/value head are computed together, so that every key and value is read once. Numbers that a
    cache stores as int8 or float8 are scaled by the kernel. Several threads may read one cache at once. Results have
    the same bits for any number of threads, alone or in a batch, and whether the cache has pages or not.

    References
    ----------
    .. [1] Dao et al., "Flash-Decoding for long-context inference", 2023.
    .. [2] Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023.

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((1, heads, 10, 64), dtype=np.float32) for heads in (8, 2, 2))
    >>> cache = na.KVCache(1, 2, 100, 64)
    >>> for t in range(10):
    ...     cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    ...     out = na.attention_decode(q[:, :, t : t + 1], cache)
    >>> whole = na.attention(q, k, v, is_causal=True)
    >>> bool(np.allclose(out, whole[:, :, -1:], atol=1e-6))
    True
    """
    if options:
        check_names(attention_decode, options)  # a name that is not known is the first mistake that is reported
    if type(cache) is KVCache:
        if ids is not None:
            raise ValueError("ids must be None for a KVCache, whose sequences are all used")
        contents = cache._contents()
    elif isinstance(cache, PagedKVCache):
        contents = cache._contents(ids)
    elif isinstance(cache, KVCache):
        contents = cache._contents()
    else:
        raise TypeError(
            f"cache must be a KVCache or a PagedKVCache, got {type(cache).__module__}.{type(cache).__qualname__}"
        )
    again = out is None and backend is None and type(query) is np.ndarray and is_host_default()
    if again:
        known = recall.decode(query, contents, options, return_lse)
        if known is not None:
            return known
    settings = gather(attention_decode, {"is_causal": "bottom-right", **options}) if options else _NEWEST
    if type(query) is not np.ndarray and not on_device(query):
        chosen = select(backend, query)
        if isinstance(chosen, Family):
            arguments = {
                "query": query, "cache": cache, "ids": ids, "return_lse": return_lse, "out": out, "backend": backend,
            }  # fmt: skip
            result: Array | tuple[Array, Array] = chosen.call(attention_decode, arguments, options)
            return result
    if contents.gap is not None:
        return _over_gap(query, contents, settings, return_lse, out, backend)
    return _attend(query, contents, settings, return_lse, out, backend, again)


def _attend(
    query: Array, contents: Contents, settings: Options, return_lse: bool, out: Array | None, backend: str | None,
    again: bool = False,
) -> Array | tuple[Array, Array]:  # fmt: skip
    originals = contents.originals
    chosen = select(backend, query) if originals is None else select(backend, query, *originals[:2])
    if chosen.on_device:
        # Another thread may append while keys are copied. (`_replace` takes twice as long.)
        contents = Contents(*contents[:5], contents.lengths.copy(), *contents[6:])
        held = [_used(contents, x) for x in contents[:4]] if originals is None else originals
        operands = {"query": query, "key": held[0], "value": held[1], "key_scale": held[2], "value_scale": held[3]}
        return device_call.run(
            _decode_on_device, chosen, operands, _AS_GIVEN if settings is _NEWEST else settings,
            entry=attention_decode, out=out, contents=contents, return_lse=return_lse,
        )  # fmt: skip
    if originals is not None:
        raise TypeError("the cache is on a GPU, and this call runs on the host: pass backend='cuda'")
    return _decode(chosen, query, contents, settings, return_lse, out, again=again)


def _over_gap(
    query: Array, contents: Contents, settings: Options, return_lse: bool, out: Array | None, backend: str | None
) -> Array | tuple[Array, Array]:
    """Attend to what a rolling cache keeps: in one call, or in one for the first keys and one for the newest."""
    parts = over_gap(query, contents, settings)
    if contents.originals is None and select(backend, query).on_device:
        parts = [(contents.gathered(), options) for contents, options in parts]
    if len(parts) == 1:
        return _attend(query, *parts[0], return_lse, out, backend)
    results = [_attend(query, *part, True, out if n else None, backend) for n, part in enumerate(parts)]
    outs, lses = zip(*results, strict=True)
    merged, lse = merge(outs, lses, out=out)
    return (merged, lse) if as_flag("return_lse", return_lse) else merged


def _decode(
    chosen: Backend, query: Array, contents: Contents, options: Options, return_lse: bool, out: Array | None = None,
    empty: Empty = np.empty, again: bool = False,
) -> Array | tuple[Array, Array]:  # fmt: skip
    problem = build(query, contents, options, out, return_lse, empty)
    chosen.forward(problem)
    if again and problem.plan is not None:
        recall.learn_decode(query, contents, options, problem)
    if problem.result_lse is None:
        return problem.result
    return problem.result, problem.result_lse


def _used(contents: Contents, array: Array | None) -> Array | None:
    """Return the part of keys, values or scales that must be copied to a GPU."""
    if array is None or contents.table is not None:
        return array
    return array[:, :, : int(contents.lengths.max(initial=0))]


def _decode_on_device(
    chosen: Backend, query: Array, key: Array, value: Array, key_scale: Array | None, value_scale: Array | None,
    contents: Contents, options: Options, return_lse: bool, out: Array | None = None, empty: Empty = np.empty,
) -> Array | tuple[Array, Array]:  # fmt: skip
    contents_on_device = contents.of((key, value, key_scale, value_scale))
    S = int(contents.lengths.max(initial=0))
    for name in ("mask", "bias"):
        array = getattr(options, name)
        if array is not None and query.ndim >= 3 and is_of_newest(array, query.shape[-2], S):
            # The host extends the mask of a tree of guesses, which is small, to the width of the cache.
            if isinstance(array, BlockMask):
                small = array.to_dense()
            else:
                small = np.empty(array.shape, array.dtype)
                runtime.download(array, small, runtime.stream())
            wide = over_newest(name, small, contents.lengths, query.shape[-3], query.shape[-2], S)
            changed: dict[str, Any] = {name: runtime.upload(wide, runtime.stream())}
            options = options._replace(**changed)
    return _decode(chosen, query, contents_on_device, options, return_lse, out, empty)


__all__ = ["attention_decode"]
