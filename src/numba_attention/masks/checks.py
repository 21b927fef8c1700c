"""What a mask is made or indexed with, checked."""

import operator
from typing import Any

import numpy as np

from ..options import Array
from ..validation import as_array
from . import runs
from .runs import TILE


def as_integer(name: str, x: Any) -> int:
    try:
        if isinstance(x, bool | np.bool_):
            raise TypeError
        return operator.index(x)
    except Exception:  # `__index__` of another library's number may raise any exception
        raise TypeError(f"{name} must be an integer, got {x!r}") from None


def as_count(name: str, n: Any) -> int:
    count = as_integer(name, n)
    if count < 1:
        raise ValueError(f"{name} must be positive, got {count}")
    return count


def as_sizes(shape: Any) -> tuple[int, int]:
    """Check numbers of queries and keys."""
    try:
        L, S = shape
    except (TypeError, ValueError):
        raise TypeError(f"shape must be a pair (L, S), got {shape!r}") from None
    sizes = as_integer("L", L), as_integer("S", S)
    if min(sizes) < 0 or max(sizes) > 2**31:
        raise ValueError(f"L and S must lie between 0 and 2**31, got {sizes}")
    return sizes


def as_positions(name: str, index: Any, n: int) -> Array:
    """The positions that a slice or an array chooses."""
    if isinstance(index, slice):
        return np.arange(n)[index]
    array = as_array(name, index)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise IndexError(f"{name} of a BlockMask are chosen by a slice or a 1-D array of int or bool, got {index!r}")
    return np.arange(n)[array]


def whole_tiles(positions: Array, n: int) -> tuple[int, int] | None:
    """The tiles that these positions are, or None."""
    if not len(positions):
        return (0, 0)
    first, last = int(positions[0]), int(positions[-1]) + 1
    in_order = last - first == len(positions) and bool((np.diff(positions) == 1).all())
    if not in_order or first % TILE or (last % TILE and last != n):
        return None
    return first // TILE, runs.tiles_over(last)
