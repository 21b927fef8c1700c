"""The runs of a mask that a function says: evaluated by machine code, on all threads, some rows of tiles at a time."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..cpu import launch
from ..cpu.masks import JOB, find_runs
from ..mods.compiled import compiled_bits
from . import runs
from .runs import TILE, Pieces, Runs

AT_ONCE = 2**24  # bytes of the tiles of the rows that are evaluated at once
ROOM = 2**26  # largest number of bytes of distinct partial tiles


def runs_of(function: Any, mod_args: Any, size: tuple[int, int], batch: int, heads: int, offset: int = 0) -> Runs:
    """Evaluate a `mask_mod` for each pair of positions.

    Parameters
    ----------
    function : callable
    mod_args : tuple
    size : (L, S)
    batch, heads : int
    offset : int
        Position of query 0.

    Returns
    -------
    Runs
        The rows of the heads of all sequences, one after another.

    Raises
    ------
    TooManyTiles
        Distinct tiles take more than `ROOM`.
    """
    bits = compiled_bits(function, mod_args, size, batch, heads, offset)
    rows, columns = (runs.tiles_over(n) for n in size)
    total = batch * heads * rows

    def pieces() -> Iterator[Pieces]:
        if not columns or not total:
            return
        step = min(total, max(AT_ONCE // (columns * TILE * 8), launch.threads()))
        words, ends = np.empty((step, columns, TILE), np.uint64), np.empty((step, columns), np.int32)
        counts, job, counter = np.empty(step, np.int64), np.zeros(1, JOB), np.zeros(1, np.int64)
        for name, array in (("words", words), ("ends", ends), ("counts", counts), ("counter", counter)):
            job[name] = array.ctypes.data
        job["call"], job["data"], job["heads"], job["offset"] = bits.address, bits.data, heads, offset
        job["rows"], job["columns"], (job["L"], job["S"]) = rows, columns, size
        for first in range(0, total, step):
            items = min(step, total - first)
            counter[0], job["first"], job["items"] = 0, first, items
            launch.run(find_runs, job.ctypes.data, min(launch.threads(), items))
            row = np.repeat(np.arange(items), counts[:items])
            run = np.arange(len(row)) - np.repeat(np.cumsum(counts[:items]) - counts[:items], counts[:items])
            yield Pieces(row + first, ends[row, run], words[row, run])

    return runs.collect(pieces(), total, ROOM)
