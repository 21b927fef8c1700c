"""Rotary positions of the rows of a layer: those of the caller, or those that follow from offsets and lengths."""

from typing import Any, NamedTuple

import numpy as np

from ..options import Array
from ..rotary import Rotation, Turn, check_positions, rotate
from .inputs import query_offset

Turns = tuple[Turn, Turn]


class Places(NamedTuple):
    """Where the rows of queries and keys are placed, and the rotation for sequences that reach so far."""

    rotation: Rotation
    queries: Array  # broadcastable to the rows (..., L), or (3, ..., L)
    keys: Array  # the same array, if the rows are the same
    along_axes: tuple[bool, bool]

    def turns(self, dtype: np.dtype[Any]) -> Turns:
        """Return the turns of queries and keys."""
        of_keys = turn_at(self.rotation, self.keys, self.along_axes[1], dtype)
        if self.queries is self.keys:
            return of_keys, of_keys
        return turn_at(self.rotation, self.queries, self.along_axes[0], dtype), of_keys


def turn_at(rotation: Rotation, places: Array, along_axes: bool, dtype: np.dtype[Any]) -> Turn:
    """Return the turn of rows at these places."""
    # The heads are an axis before the rows, so (batch, L) is never mistaken for (heads, L).
    return rotation.turn(places[..., None, :] if places.ndim > 1 else places, dtype, along_axes)


def places_of(
    rotation: Rotation, positions: Any, of_queries: tuple[int, ...], of_keys: tuple[int, ...], is_self: bool,
    dtype: np.dtype[Any],
) -> Places:  # fmt: skip
    """Return the places that the caller passed.

    Parameters
    ----------
    positions : array, or pair of arrays
        Broadcastable to the rows (..., L); of queries and keys, where these are not the same rows.
    of_queries, of_keys : tuple of int
        Shapes of the rows.
    is_self : bool
        Whether keys have the rows of the queries.
    """
    pair = positions, positions
    if not is_self:
        if not isinstance(positions, tuple | list) or len(positions) != 2:
            raise ValueError("positions must be a pair, of the queries and of the keys, where key is passed")
        pair = positions[0], positions[1]
    checked = [check_positions(x, rows, rotation, dtype) for x, rows in zip(pair, (of_queries, of_keys), strict=True)]
    (queries, _, three_q), (keys, _, three_k) = checked
    return Places(rotation.of_length(queries, keys), queries, queries if is_self else keys, (three_q, three_k))


def default_places(rotation: Rotation, L: int, S: int, batch: tuple[int, ...], options: dict[str, Any]) -> Places:
    """Return the places of L queries and S keys: key j sits at j, and queries as `attention` places them."""
    keys = np.arange(S)
    offset = query_offset(options, L, S, batch)
    if isinstance(offset, int):
        queries = keys if offset == 0 and L == S else offset + np.arange(L)
    else:
        queries = offset[..., None] + np.arange(L)
    return Places(rotation.of_length(queries, keys), queries, keys, (False, False))


def packed_places(rotation: Rotation, total: int, starts: Array, options: dict[str, Any]) -> Places:
    """Return the places of packed tokens: keys count from the beginning of each sequence, queries as in padded calls.

    Offsets that are none, which `attention_varlen` refuses by name, give any places.
    """
    own = starts[:-1] if starts.ndim == 1 else np.zeros(0, np.int64)
    sequence = np.searchsorted(own, np.arange(total), side="right") - 1
    queries = keys = np.arange(total) - (own[sequence] if own.size else 0)
    lengths = np.diff(starts) if own.size else own
    offset = np.broadcast_to(query_offset(options, lengths, lengths, lengths.shape), lengths.shape)
    if offset.any():
        queries = keys + offset[sequence]
    return Places(rotation.of_length(queries, keys), queries, keys, (False, False))


def turned(x: Array, turn: Turn) -> Array:
    """Rotate rows, in place if possible: into a new array if there are fewer sequences than there are positions."""
    shape = np.broadcast_shapes(x.shape, (*turn.cos.shape[:-1], 1))
    if shape == x.shape:
        rotate(x, turn, x)
        return x
    result = np.empty(shape, x.dtype)
    rotate(np.broadcast_to(x, shape), turn, result)
    return result
