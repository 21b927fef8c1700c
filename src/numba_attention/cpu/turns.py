"""Several threads at one work item of the backward pass: tiles of queries take turns at each tile of keys.

A work item is a head or one group of its tiles of queries (`cpu.backward`). A thread that finds no further item takes
single tiles of those that others work at. The sums over queries, dK and dV, must be added in the order of these tiles,
or their bits would depend on the threads. So a tile may add to a tile of keys only when the tile before it has done so;
both are then computed at the same time, the later one a tile of keys behind. This costs no sums of one's own and no
adding up, however many threads come.

An item has a record: how many of its tiles are taken, and a ring of progress. The progress of a tile is its place among
the tiles of the item, and the key up to which it has added. Tiles are taken in order, and a tile is done only when the
one before it is, so that those at work are consecutive: a ring with two places more than there are threads is enough.
Only the last items of a call have records, because nobody joins others while items are left.
"""

from typing import Any

import numpy as np

from .machine_code import part
from .params import STOPPED
from .pool import LINE, listen
from .simd import fetch, fetch_add, void_pointer
from .views import carray

EACH = 4  # items that have a record, for each thread
HEADER = LINE  # words before the records
RECORDS, RING, SIZE = range(3)  # of the header: number of records, places of a ring, words of a record
TAKEN, TILES, SUMS = range(3)  # of a record, whose ring begins in the next line
FAR = 2**40  # added to TAKEN of an item that nobody can join yet
SPAN = 2**40  # more than there are keys: progress is place * SPAN + key


def records_for(items: int, threads: int) -> np.ndarray[Any, Any]:
    """Return the records of a call with so many work items."""
    records, ring = min(items, EACH * threads), -(-(threads + 2) // LINE) * LINE
    words = np.zeros(HEADER + records * (LINE + ring) + LINE, np.int64)
    words = words[-words.ctypes.data % (8 * LINE) // 8 :][: HEADER + records * (LINE + ring)]
    words[[RECORDS, RING, SIZE]] = records, ring, LINE + ring
    words[HEADER:].reshape(records, LINE + ring)[:, TAKEN] = FAR
    return words


@part
def record_of(turns: int, item: int, items: int) -> int:
    """The address of the record of an item, or 0."""
    if turns == 0:
        return 0
    header = carray(void_pointer(turns), HEADER, np.int64)
    n = item - items + header[RECORDS]
    return int(turns + 8 * (HEADER + n * header[SIZE])) if n >= 0 else 0


@part
def invite(record: int, sums: int, tiles: int) -> None:
    """Let other threads join, who add to the same sums."""
    words = carray(void_pointer(record), LINE, np.int64)
    words[TILES], words[SUMS] = tiles, sums
    fetch_add(record + 8 * TAKEN, -FAR)


@part
def sums_of(record: int) -> int:
    """The sums that all who work at an item add to."""
    fetch_add(record + 8 * TAKEN, 0)  # what was written before the item was opened is seen from here on
    return int(carray(void_pointer(record), LINE, np.int64)[SUMS])


@part
def take_tile(record: int) -> int:
    """The place of the next tile of an item, or -1 if all have been taken."""
    place = fetch_add(record + 8 * TAKEN, 1)
    return place if place < carray(void_pointer(record), LINE, np.int64)[TILES] else -1


@part
def item_to_join(turns: int, items: int, counter: int) -> int:
    """The item with the most tiles left, or -1; waits for items that are about to be opened."""
    if turns == 0:
        return -1
    header = carray(void_pointer(turns), HEADER, np.int64)
    while fetch(counter) < STOPPED:
        best, most, closed = -1, 0, 0
        for n in range(header[RECORDS]):
            record = turns + 8 * (HEADER + n * header[SIZE])
            taken = fetch(record + 8 * TAKEN)
            left = fetch(record + 8 * TILES) - taken
            if taken >= FAR // 2:
                closed = record
            elif left > most:
                best, most = items - header[RECORDS] + n, left
        if best >= 0 or closed == 0:
            return best
        listen(closed + 8 * TAKEN, fetch(closed + 8 * TAKEN), -1)
    return -1


@part
def await_turn(turns: int, record: int, place: int, key: int, counter: int) -> bool:
    """Wait until the tile before has added to all keys before `key`; whether it has, or else the call was stopped."""
    if place == 0:
        return True
    ring = carray(void_pointer(turns), HEADER, np.int64)[RING]
    slot, due = record + 8 * (LINE + (place - 1) % ring), (place - 1) * SPAN + key
    progress = fetch(slot)
    while progress < due:
        if fetch(counter) >= STOPPED:
            return False
        listen(slot, progress, -1)
        progress = fetch(slot)
    fetch_add(slot, 0)  # what was written before the progress is seen from here on
    return True


@part
def announce(turns: int, record: int, place: int, key: int) -> None:
    """Say that a tile has added to all keys before `key`."""
    ring = carray(void_pointer(turns), HEADER, np.int64)[RING]
    slot = record + 8 * (LINE + place % ring)
    fetch_add(slot, place * SPAN + key - fetch(slot))
