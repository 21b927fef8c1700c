"""Which tiles of keys a tile of query rows visits: those of its interval, or of the runs that a block mask lists.

A list is as `masks.lists` on the host makes it: runs of consecutive tiles of keys, each with the words of bits that its
tiles share. Without a list, everything in the interval is one run.
"""

from typing import Any, NamedTuple

import numpy as np

from .params import LISTS
from .simd import void_pointer
from .spec import Spec
from .views import UNBOUNDED, carray


class Visible(NamedTuple):
    """Compiled functions; their first arguments are the records of `params`, p and s."""

    list_of: Any
    tile_of: Any
    runs_of: Any
    clip: Any
    following: Any


def make_visible(spec: Spec) -> Visible:
    """Make the functions for one kind of kernel."""
    BN = spec.key_tile
    W, NV = spec.vector.width, spec.block[1]
    word_bytes = BN * NV * max(1, W // 8)

    @spec.jit
    def list_of(p: Any, s: Any, head: int, tile: int) -> int:
        """The list of a tile of a head."""
        number: int = 0
        if p.visible != 0:
            lists = carray(void_pointer(p.visible), 1, LISTS)[0]
            number = carray(void_pointer(lists.first), UNBOUNDED, np.int64)[s.lists + head] + tile
        return number

    @spec.jit
    def tile_of(p: Any, s: Any, head: int, place: int, tiles: int) -> int:
        """The tile of a head at a place in the order of work, in which the longest come first.

        Under a causal mask the last rows see the most keys. The first, which are the shortest, then fill the gaps at
        the end.
        """
        tile: int = tiles - 1 - place
        if p.visible != 0:
            lists = carray(void_pointer(p.visible), 1, LISTS)[0]
            first = carray(void_pointer(lists.first), UNBOUNDED, np.int64)[s.lists + head]
            tile = carray(void_pointer(lists.order), UNBOUNDED, np.int64)[first + place]
        return tile

    @spec.jit
    def runs_of(p: Any, number: int, start: int) -> tuple[int, int]:
        """The runs of a list, without those that end before the key `start`."""
        if p.visible == 0:
            return 0, 1
        lists = carray(void_pointer(p.visible), 1, LISTS)[0]
        starts = carray(void_pointer(lists.starts), UNBOUNDED, np.int64)
        runs = carray(void_pointer(lists.runs), (UNBOUNDED, 3), np.int32)
        low, last = starts[number], starts[number + 1]
        high = last
        while low < high:
            middle = (low + high) // 2
            if np.int64(runs[middle, 1]) * BN <= start:
                low = middle + 1
            else:
                high = middle
        return low, last

    @spec.jit
    def clip(p: Any, run: int, start: int, stop: int) -> Any:
        """The keys of a run within start .. stop, from the first of a tile on, and the address of its words or 0."""
        if p.visible == 0:
            return start, stop, 0
        lists = carray(void_pointer(p.visible), 1, LISTS)[0]
        runs = carray(void_pointer(lists.runs), (UNBOUNDED, 3), np.int32)
        first, end, word = np.int64(runs[run, 0]), np.int64(runs[run, 1]), np.int64(runs[run, 2])
        low, high, bits = max(first * BN, start // BN * BN), min(end * BN, stop), 0
        if word != 0:
            bits = lists.words + word * word_bytes
        return low, high, bits

    @spec.jit
    def following(p: Any, run: int, last_run: int, next_key: int, high: int, start: int, stop: int) -> int:
        """Where a tile of keys begins that should be prefetched during the one that ends before `next_key`, or -1.

        `high` is where the keys of its run end. Tiles that a list picks from a long sequence come from the level 3
        cache, and are asked for in time; neighbours the processor asks for by itself. Tiles of queries are visited from
        the last to the first, so that under a window the next ones see keys before the first of these: those are asked
        for during the last two tiles: a window of 513 keys takes 0.92 of the time, and one of 257 keys 0.88.
        """
        first = -1
        if p.visible != 0:
            if next_key < high:
                first = next_key
            elif run + 1 < last_run:
                low, end, _ = clip(p, run + 1, start, stop)
                if low < end:
                    first = low
        elif start > 0 and next_key + BN >= high:
            first = max(-1, start - BN if next_key >= high else start - 2 * BN)
        return first

    return Visible(list_of, tile_of, runs_of, clip, following)
