"""Calls over the contents of a rolling cache, whose keys are numbered without the positions that have dropped out."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..caches.contents import Contents
from ..options import Array, Options
from ..validation import as_ints, broadcast_to, is_bottom_right
from .cached import check_key_lengths, is_plain, over_keys

Part = tuple[Contents, Options]
# Options whose meaning over a gap is decided here; others would read the numbers of keys as positions.
_KNOWN = frozenset((
    "mask", "bias", "is_causal", "window", "query_offset", "scale", "softcap", "alibi_slopes", "sinks",
    "query_lengths", "key_lengths", "prefix_lengths", "seed",
))  # fmt: skip


def over_gap(query: Any, contents: Contents, options: Options) -> list[Part]:
    """Express positions by numbers of keys, in one part, or two that must be merged: the first keys and the newest.

    Keys after the gap are `dropped` positions further than their number. If the query is moved back by as many, its
    distance from them is right, and so is causality for the first keys, which every query after the gap sees. Windows
    and ALiBi depend on the distance from the first keys too, so there each side of the gap is a call of its own.
    """
    gap = contents.gap
    shape: tuple[int, ...] = getattr(query, "shape", ())
    if gap is None or len(shape) < 2:  # the checks of the call refuse such a query
        return [(contents, options)]
    L = shape[-2]
    if is_plain(options) and is_bottom_right(options.is_causal) and (contents.lengths >= gap.first + L).all():
        return [(contents._replace(gap=None), options)]  # nearly every call: the newest keys are the last numbers
    refuse_positional(options._asdict())
    first, dropped = gap
    n = len(dropped)
    lengths = contents.lengths + dropped
    if options.key_lengths is not None:
        lengths = check_key_lengths(options.key_lengths, lengths)
    keys = _number(lengths, first, dropped)
    prefix = None
    if options.prefix_lengths is not None:
        prefix = check_key_lengths(options.prefix_lengths, contents.lengths + dropped, "prefix_lengths")
    offset: Any = 0
    if options.query_offset is not None:
        offset = as_ints("query_offset", options.query_offset)
    elif is_bottom_right(options.is_causal):
        rows = L if options.query_lengths is None else as_ints("query_lengths", options.query_lengths)
        offset = lengths - rows
    offset = broadcast_to("query_offset", np.asarray(offset), (n,))
    after = (dropped == 0) | (offset - dropped >= first - 1)
    if not first or (
        options.alibi_slopes is None and options.window is None and (after.all() or not options.is_causal)
    ):
        prefix = None if prefix is None else _number(prefix, first, dropped)
        one = options._replace(query_offset=offset - dropped, key_lengths=keys, prefix_lengths=prefix)
        return [(contents._replace(gap=None), one)]
    S = int(contents.lengths.max(initial=0))
    masks = over_keys(options, contents.lengths, shape[-3] if len(shape) > 2 else 1, L, S)
    assert contents.table is not None
    parts = []
    for start, stop, ahead in ((0, first, 0), (first, S, first + dropped)):
        own = {name: x if x.shape[-1] == 1 else x[..., start:stop] for name, x in masks.items()}
        held = np.clip(contents.lengths - start, 0, stop - start)
        part = options._replace(
            query_offset=offset - ahead,
            key_lengths=np.clip(keys - start, 0, held),
            prefix_lengths=None if prefix is None else np.clip(prefix - ahead, 0, held),
            sinks=options.sinks if start == 0 else None,  # a sink counts once
            **own,
        )
        parts.append((contents._replace(table=contents.table[:, start:stop], lengths=held, gap=None), part))
    return parts


def refuse_positional(options: Mapping[str, Any]) -> None:
    """Refuse options that would read the number of a key as its position, as dropout does, which hashes it."""
    for name, default in Options._field_defaults.items():
        x = options.get(name)
        if name not in _KNOWN and x is not None and x != default:
            raise ValueError(f"{name} must not be passed with a cache that has dropped keys out of its window")


def _number(positions: Array, first: int, dropped: Array) -> Array:
    """Return how many keys are before a position."""
    return np.where(positions <= first, positions, np.maximum(first, positions - dropped))
