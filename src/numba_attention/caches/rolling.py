"""What caches with a window have in common: which tokens are kept, and where each of them is stored.

A rolling cache keeps the first `keep_first` tokens of a sequence and its newest `window`. Storage has fewer places than
the sequence has positions, so kernels find every kept token through a table with one entry for each token (pages of
one token), and the positions that are missing between the first and the newest tokens are a `Gap`.
"""

from typing import Any

import numpy as np

from ..options import Array
from .checks import check_size
from .contents import Gap


def check_window(window: Any, keep_first: Any, capacity: int | None = None) -> tuple[int | None, int]:
    """Check the arguments of a cache that say which tokens it keeps, and that it has room for them."""
    first = check_size("keep_first", keep_first, 0)
    if window is None:
        if first:
            raise ValueError(f"keep_first must be 0 without a window, got {first}")
        return None, 0
    span = check_size("window", window)
    if capacity is not None and capacity < span + first:
        raise ValueError(f"capacity must be at least window + keep_first, {span + first}, got {capacity}")
    return span, first


def kept(lengths: Array, oldest: Array, window: int, keep_first: int) -> tuple[Array, Gap]:
    """Return how many tokens each sequence keeps, and which positions are missing.

    Parameters
    ----------
    lengths : ndarray, shape (n,)
        Tokens that were appended.
    oldest : ndarray, shape (n,)
        The oldest position past the first tokens that is still stored.
    window, keep_first : int

    Returns
    -------
    counts : ndarray, shape (n,)
    gap : Gap
    """
    begin = np.maximum(np.maximum(oldest, lengths - window), keep_first)
    counts = np.minimum(lengths, keep_first) + np.maximum(lengths - begin, 0)
    return counts, Gap(keep_first, begin - keep_first)


def check_truncated(lengths: Array, oldest: Array, keep_first: int, name: str = "lengths") -> None:
    """Refuse to shorten a sequence to a length at which its newest tokens would be some that dropped out."""
    wrong = (lengths > keep_first) & (lengths < oldest)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(
            f"{name} must be at least {oldest[i]}, since older tokens have dropped out of the window, or at most "
            f"{keep_first}, the first tokens, got {lengths[i]} for sequence {i}"
        )
