"""Masks that a function says, evaluated tile by tile on all threads, to runs of equal tiles (`masks.runs`)."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .cache import Kernel
from .launch import SIGNATURE
from .machine_code import part
from .mods import BITS_ROWS, call_tile
from .simd import HOST, fetch_add, void_pointer
from .views import UNBOUNDED, carray

TILE = BITS_ROWS
# What a worker is told: the counter of rows of tiles, `items` from `first` on, of matrices of rows x columns tiles for
# every head of every sequence; the pass that makes the bits of a tile, and its data; and of each item, the places for
# `columns` runs: 64 words of the tile that is repeated, the column after the last, and how many runs there are.
JOB = np.dtype([
    (name, np.int64)
    for name in (
        "counter", "items", "first", "rows", "columns", "heads", "L", "S", "offset",
        "call", "data", "words", "ends", "counts",
    )
])  # fmt: skip


@part
def _repeat_edge(words: int, rows: int, columns: int) -> None:
    """Repeat the last of the rows and of the columns that are inside of a tile."""
    tile = carray(void_pointer(words), TILE, np.int64)
    for j in range(columns):
        if rows < TILE and (tile[j] >> (rows - 1)) & 1 == 1:
            tile[j] |= np.int64(-1) << rows
    for j in range(columns, TILE):
        tile[j] = tile[columns - 1]


@part
def _differ(words: int, others: int) -> bool:
    """Whether two tiles differ."""
    tile, other = carray(void_pointer(words), TILE, np.int64), carray(void_pointer(others), TILE, np.int64)
    difference = np.int64(0)
    for j in range(TILE):
        difference |= tile[j] ^ other[j]
    differ: bool = difference != 0
    return differ


@part
def _find_runs(p: Any, item: int) -> None:
    """The runs of one row of tiles."""
    plane, row = divmod(p.first + item, p.rows)
    batch, head = divmod(plane, p.heads)
    rows = min(TILE, p.L - row * TILE)
    ends = carray(void_pointer(p.ends + item * p.columns * 4), UNBOUNDED, np.int32)
    words, none, count = p.words + item * p.columns * TILE * 8, np.int64(0), 0
    for column in range(p.columns):
        tile, columns = words + count * TILE * 8, min(TILE, p.S - column * TILE)
        call_tile(
            p.call,
            p.data,
            tile,
            columns,
            column * TILE,
            batch,
            head,
            p.offset + row * TILE,
            rows,
            none,
            none,
            np.float64(1),
        )
        if rows < TILE or columns < TILE:
            _repeat_edge(tile, rows, columns)
        if count == 0 or _differ(tile, tile - TILE * 8):
            count += 1
        ends[count - 1] = column + 1
    carray(void_pointer(p.counts), UNBOUNDED, np.int64)[item] = count


def _make_worker() -> Callable[[int, int], int]:
    def worker(params: int, thread: int) -> int:
        p = carray(void_pointer(params), 1, JOB)[0]
        while True:
            item = fetch_add(p.counter, 1)
            if item >= p.items:
                return 0
            _find_runs(p, item)

    return worker


find_runs = Kernel(f"mask-runs-{HOST.name}", _make_worker, SIGNATURE)
