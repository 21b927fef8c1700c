"""Validation of `attention_decode`: new queries, the contents of a cache and `Options` become a `Problem`."""

from operator import is_, itemgetter
from typing import Any

import numpy as np

from ..caches.contents import Contents
from ..masks.blockmask import BlockMask
from ..options import NO_OPTIONS, Array, Options
from ..validation import (
    arrays_among,
    as_bools,
    as_flag,
    as_floats,
    as_ints,
    as_tensor,
    broadcast_to,
    check_out,
    is_bottom_right,
    lse_dtype_of,
    scale_of,
)
from .dense import Empty, Problem, _apply


def build(
    query: Any, contents: Contents, options: Options, out: Any, return_lse: bool, empty: Empty = np.empty
) -> Problem:
    """Validate one `attention_decode` call and allocate its results."""
    q = as_tensor("query", query)
    lengths = contents.lengths
    plain = is_bottom_right(options.is_causal) and is_plain(options)  # true of nearly every call
    if contents.table is None and (len(lengths) > 1 or not plain or contents.key_scale is not None):
        # The lengths of a `KVCache` change in place: if another thread appends, a kernel could read past the columns of
        # a mask. So they are copied, except for a plain step of one sequence, of which backends read only the number S.
        lengths = lengths.copy()
    flat = query.ndim == 3 and len(lengths) == 1
    if flat:
        q = q[None]
    H, L, E, Hkv, Ev = _sizes(q, query, contents)
    S = int(lengths[0]) if len(lengths) == 1 else int(lengths.max(initial=0))
    shape = (*q.shape[:3], Ev)
    if out is None:
        full = empty(shape, q.dtype)
        result = full[0] if flat else full
    else:
        inputs = {"query": q, "key": contents.key, "value": contents.value, **arrays_among(options)}
        if contents.key_scale is not None and contents.value_scale is not None:
            inputs |= {"key_scale": contents.key_scale, "value_scale": contents.value_scale}
        result, full = out, check_out(out, shape[1:] if flat else shape, q.dtype, inputs)
        if flat:
            full = full[None]
    lse = result_lse = None
    if return_lse is not False and as_flag("return_lse", return_lse):
        lse = empty(shape[:3], lse_dtype_of(q))
        result_lse = lse[0] if flat else lse
    problem = Problem(
        q, contents.key, contents.value, full, lse, result, result_lse, q.shape[:1], H, Hkv, L, S, E, Ev,
        scale_of(options.scale, E, q.dtype), cache=contents,
    )  # fmt: skip
    if plain:
        problem.right, problem.key_lengths = 0, lengths
        problem.offset = S - L if len(lengths) == 1 else lengths - L
        return problem
    _apply(problem, _over_cache(options, lengths, H, L, S))
    return problem


_others = itemgetter(*(n for n, name in enumerate(Options._fields) if name not in ("scale", "is_causal")))
_DEFAULTS = _others(NO_OPTIONS)


def is_plain(options: Options) -> bool:
    """Whether every option but scale and is_causal is at its default."""
    return all(map(is_, _others(options), _DEFAULTS))


def _sizes(q: Array, query: Any, contents: Contents) -> tuple[int, int, int, int, int]:
    if q.dtype != contents.dtype:
        raise TypeError(
            f"query must have the dtype of the cache, {contents.dtype}, got {q.dtype}; "
            "convert it with query.astype(...)"
        )
    n, (_, Hkv, _, E), Ev = len(contents.lengths), contents.key.shape, contents.value.shape[-1]
    if q.ndim != 4 or q.shape[0] != n or q.shape[3] != E:
        raise ValueError(
            f"query must have shape ({n}, heads, length, {E}), as the cache has {n} sequences, got {query.shape}"
        )
    H, L = q.shape[1:3]
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"the cache has {Hkv} heads, which must divide the {H} heads of query")
    return H, L, E, Hkv, Ev


def _over_cache(options: Options, lengths: Array, H: int, L: int, S: int) -> Options:
    """Return options as for `attention`: with the lengths of the cache, and masks over all of its keys."""
    keys = lengths
    if options.key_lengths is not None:
        keys = check_key_lengths(options.key_lengths, lengths)
    return options._replace(key_lengths=keys, **over_keys(options, lengths, H, L, S))


def over_keys(options: Options, lengths: Array, H: int, L: int, S: int) -> dict[str, Any]:
    """Return those of mask and bias that are there, over all keys of the cache."""
    mask, bias = options.mask, options.bias
    given: dict[str, Any] = {}
    if isinstance(mask, BlockMask) and (L == S or mask.shape[-2:] != (L, L)):
        given["mask"] = mask.fitting((len(lengths), H, L, S))
    elif mask is not None:  # a block mask over the newest keys is expanded, as they may begin inside of a tile
        array = mask.to_dense() if isinstance(mask, BlockMask) else as_bools("mask", mask)
        given["mask"] = over_newest("mask", array, lengths, H, L, S)
    if bias is not None:
        given["bias"] = over_newest("bias", as_floats("bias", bias), lengths, H, L, S)
    return given


def check_key_lengths(keys: Any, lengths: Array, name: str = "key_lengths") -> Array:
    """Check a number of keys for each sequence of a cache."""
    array = broadcast_to(name, as_ints(name, keys), lengths.shape)
    if (array < 0).any() or (array > lengths).any():
        raise ValueError(f"{name} must lie between 0 and the lengths of the cache, {lengths}, got {array}")
    return array


def is_of_newest(array: Array, L: int, S: int) -> bool:
    """Whether a mask or bias has a column only for each of the L newest keys of every sequence."""
    return array.ndim >= 2 and array.shape[-1] not in (1, S) and array.shape[-1] == L


def over_newest(name: str, array: Array, lengths: Array, H: int, L: int, S: int) -> Array:
    """Extend a mask or bias about the L newest keys of every sequence to all keys, and check its shape.

    Three axes are (H, L, keys) as in broadcasting, or (sequences, L, keys) if the first axis cannot be H.
    """
    n, shape = len(lengths), array.shape
    if array.ndim == 3 and shape[0] not in (1, H) and shape[0] == n:
        array = array[:, None]
    newest = is_of_newest(array, L, S)
    full_shape = (n, H, L, L if newest else S)
    try:
        np.broadcast_to(array, full_shape)
    except ValueError:
        newest_too = "" if L in (1, S) else f", and for the newest keys alone, to {(n, H, L, L)}"
        raise ValueError(
            f"{name} of shape {shape} does not broadcast to {(n, H, L, S)}, (sequences, heads, queries, longest "
            f"sequence){newest_too}"
        ) from None
    if not newest:
        return array
    if (lengths < L).any():
        raise ValueError(f"{name} over the {L} newest keys needs so many in every sequence, got lengths {lengths}")
    array = array[(None,) * (4 - array.ndim)]
    array = np.broadcast_to(array, (n, *array.shape[1:3], L))
    full = np.full((*array.shape[:-1], S), name == "mask", array.dtype)  # earlier keys are visible, with a bias of 0
    for b, length in enumerate(lengths):
        full[b, ..., length - L : length] = array[b]
    return full
