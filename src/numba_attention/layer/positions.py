"""Rotary positions of the rows of a layer: those of the caller, or those that follow from offsets and lengths."""

from typing import Any

import numpy as np

from ..options import Array
from ..rotary import Rotation, Turn, check_positions, rotate
from .inputs import query_offset

Turns = tuple[Turn, Turn]


def turns_of(
    rotation: Rotation, positions: Any, of_queries: tuple[int, ...], of_keys: tuple[int, ...], is_self: bool,
    dtype: np.dtype[Any],
) -> Turns:  # fmt: skip
    """Return the turns of queries and keys at the positions that the caller passed.

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
    rotation = rotation.of_length(*(x for x, _, _ in checked))
    turns = []
    for x, _, along_axes in checked[: 1 if is_self else 2]:
        # The heads are an axis before the rows, so (batch, L) is never mistaken for (heads, L).
        turns.append(rotation.turn(x[..., None, :] if x.ndim > 1 else x, dtype, along_axes))
    return turns[0], turns[-1]


def default_turns(
    rotation: Rotation, L: int, S: int, batch: tuple[int, ...], options: dict[str, Any], dtype: np.dtype[Any]
) -> Turns:
    """Return the turns of L queries and S keys: key j sits at j, and queries as `attention` places them."""
    keys = np.arange(S)
    offset = query_offset(options, L, S, batch)
    if isinstance(offset, int):
        queries = keys if offset == 0 and L == S else offset + np.arange(L)
    else:
        queries = offset[..., None, None] + np.arange(L)
    rotation = rotation.of_length(queries, keys)
    of_keys = rotation.turn(keys, dtype)
    return of_keys if queries is keys else rotation.turn(queries, dtype), of_keys


def turned(x: Array, turn: Turn) -> Array:
    """Rotate rows, in place if possible: into a new array if there are fewer sequences than there are positions."""
    shape = np.broadcast_shapes(x.shape, (*turn.cos.shape[:-1], 1))
    if shape == x.shape:
        rotate(x, turn, x)
        return x
    result = np.empty(shape, x.dtype)
    rotate(np.broadcast_to(x, shape), turn, result)
    return result
