"""A boolean matrix as runs of equal tiles of 64 x 64 positions, each distinct tile stored once.

A row of tiles is a sequence of runs, and a run says which tile is repeated: 0 is the tile that hides everything, 1 the
one that shows everything, and the others are partial. A partial tile is 64 words of 64 bits: word j, bit i is query i
and key j of the tile. Causal attention over 131072 positions takes 2048 rows of three runs, 64 KiB, and one partial
tile.

Tiles at the lower and the right edge may hang over. There the last row and the last column are repeated, so that every
operation on bits works on such a tile as on any other: it shows everything if what is inside of it does, and the
complement and the transpose of repeated bits are repeated bits.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ..options import Array

TILE = 64
EMPTY, FULL = 0, 1  # the numbers of the first two tiles
BAND = 2**24  # elements of a matrix that are held as bool at once
CHUNK = 512  # tiles that are turned into arrays of bool at once: 2 MiB
SPECIAL = np.array([[0] * TILE, [2**64 - 1] * TILE], np.uint64)
_BITS = np.dtype("<u8")  # packed bits, lowest first, in this byte order


class TooManyTiles(Exception):
    """Distinct tiles take more room than they may."""


class Runs(NamedTuple):
    """Rows of tiles. Consecutive runs of a row differ, and tiles have numbers in the order in which runs name them."""

    starts: Array  # int64 (rows + 1,): the runs of row r are starts[r] .. starts[r + 1]
    ends: Array  # int32 (runs,): the column of tiles after the last of the run
    ids: Array  # int32 (runs,): which tile is repeated
    tiles: Array  # uint64 (tiles, 64)


class Pieces(NamedTuple):
    """Runs before the tiles in them are numbered."""

    rows: Array  # (n,) row of tiles of each run, ascending
    ends: Array
    words: Array  # uint64 (n, 64): the tile that is repeated


def tiles_over(n: int) -> int:
    """How many tiles n positions take."""
    return -(-n // TILE)


def collect(pieces: Iterable[Pieces], rows: int, room: int | None = None) -> Runs:
    """Number the tiles of all runs, in order, and join runs of equal tiles.

    Parameters
    ----------
    pieces : iterable of Pieces
        In the order of rows.
    rows : int
        Rows of tiles.
    room : int, optional
        Bytes that distinct tiles may take.

    Raises
    ------
    TooManyTiles
        They take more.
    """
    numbers: dict[bytes, int] = {tile.tobytes(): n for n, tile in enumerate(SPECIAL)}
    parts = []
    for row, end, words in pieces:
        distinct, where = _distinct(words)
        known = [numbers.setdefault(tile.tobytes(), len(numbers)) for tile in distinct]
        if room is not None and len(numbers) * TILE * 8 > room:
            raise TooManyTiles(f"over {room / 2**20:.0f} MiB of distinct partial tiles")
        parts.append(joined(row, end, np.array(known, np.int32)[where] if known else where.astype(np.int32)))
    row, end, ids = (np.concatenate(x) for x in zip(*parts, strict=True)) if parts else (np.zeros(0, np.int32),) * 3
    tiles = np.frombuffer(b"".join(numbers), np.uint64).reshape(-1, TILE)
    return tidy(row, end, ids, tiles, rows)


def tidy(row: Array, ends: Array, ids: Array, tiles: Array, rows: int) -> Runs:
    """Join runs of equal tiles, drop tiles that no run names, and number the rest in order; tiles are distinct."""
    row, ends, ids = joined(row, ends, ids)
    starts = np.zeros(rows + 1, np.int64)
    np.cumsum(np.bincount(row, minlength=rows), out=starts[1:])
    used, first, where = np.unique(ids, return_index=True, return_inverse=True)
    first[used == EMPTY], first[used == FULL] = -2, -1  # these two keep their numbers
    order = np.argsort(first)
    order = order[used[order] > FULL]
    number = np.empty(len(used), np.int32)
    number[used == EMPTY], number[used == FULL] = EMPTY, FULL
    number[order] = np.arange(2, len(order) + 2)
    return Runs(starts, ends.astype(np.int32), number[where], np.concatenate([SPECIAL, tiles[used[order]]]))


def joined(row: Array, ends: Array, ids: Array) -> tuple[Array, Array, Array]:
    """Join consecutive runs of equal tiles."""
    last = np.ones(len(ids), bool)
    last[:-1] = (ids[1:] != ids[:-1]) | (row[1:] != row[:-1])
    return row[last], ends[last], ids[last]


def _distinct(words: Array) -> tuple[Array, Array]:
    """The distinct tiles in the order in which they come, and which of them each is."""
    whole = np.ascontiguousarray(words).view(np.dtype((np.void, TILE * 8))).ravel()
    _, first, where = np.unique(whole, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    order = np.argsort(first)
    rank[order] = np.arange(len(first))
    return words[first[order]], rank[where]


def rows_of(runs: Runs) -> Array:
    """The row of each run."""
    return np.repeat(np.arange(len(runs.starts) - 1), np.diff(runs.starts))


def begins_of(runs: Runs) -> Array:
    """The first column of tiles of each run."""
    begins = np.zeros_like(runs.ends)
    begins[1:] = runs.ends[:-1]
    begins[runs.starts[:-1][np.diff(runs.starts) > 0]] = 0
    return begins


# Between words and arrays of bool.


def pack(shown: Array) -> Array:
    """Words (n, 64) of tiles (n, 64 keys, 64 queries) of bool."""
    packed = np.packbits(np.ascontiguousarray(shown), axis=-1, bitorder="little")
    return packed.view(_BITS).astype(np.uint64, copy=False).reshape(len(shown), TILE)


def unpack(words: Array) -> Array:
    """Tiles (n, 64 keys, 64 queries) of 0 and 1 from words (n, 64)."""
    flat = np.ascontiguousarray(words).astype(_BITS, copy=False).view(np.uint8)
    return np.unpackbits(flat.reshape(len(words), TILE, 8), axis=-1, bitorder="little")


def repeat_edge(words: Array, rows: Array, columns: Array) -> Array:
    """Repeat the last row and the last column of tiles of which only so many rows and columns are inside (n,)."""
    result = words.copy()
    for n in np.unique(rows[rows < TILE]):
        which = rows == n
        inside = np.uint64(2 ** int(n) - 1)
        last = (result[which] >> np.uint64(n - 1)) & np.uint64(1)
        result[which] = (result[which] & inside) | ((np.uint64(0) - last) & ~inside)
    for n in np.unique(columns[columns < TILE]):
        which = columns == n
        part = result[which]
        part[:, n:] = part[:, n - 1 : n]
        result[which] = part
    return result


def inside(n: int) -> Array:
    """How many positions of each of the tiles over n positions are inside."""
    count = np.full(tiles_over(n), TILE)
    if n % TILE:
        count[-1] = n % TILE
    return count


def from_bands(bands: Iterable[tuple[int, Array]], rows: int, S: int) -> Runs:
    """Runs of arrays of bool (64 n, S), each with the number of its first row of tiles."""

    def pieces() -> Iterator[Pieces]:
        for first, band in bands:
            n, columns = len(band) // TILE, tiles_over(S)
            if not columns or not n:
                continue
            wide = np.empty((n, TILE, columns * TILE), bool)
            wide[:, :, :S] = band.reshape(n, TILE, S)
            wide[:, :, S:] = wide[:, :, S - 1 : S]
            packed = np.packbits(wide, axis=1, bitorder="little").swapaxes(1, 2)
            yield from_words(np.ascontiguousarray(packed).view(_BITS).reshape(n, columns, TILE), first)

    return collect(pieces(), rows)


def from_words(words: Array, first: int) -> Pieces:
    """Runs of the tiles (rows, columns, 64) of some whole rows."""
    n, columns = words.shape[:2]
    last = np.ones((n, columns), bool)
    if columns > 1:
        np.any(words[:, 1:] != words[:, :-1], axis=2, out=last[:, :-1])
    row, column = np.nonzero(last)
    return Pieces(row + first, column + 1, words[row, column].astype(np.uint64, copy=False))


def from_tiles(row: Array, column: Array, words: Array, rows: int, columns: int) -> Runs:
    """Runs of tiles in order of rows and columns; where there is none, nothing is shown."""
    if not columns:
        return collect([], rows)
    # Three kinds of ends: of a tile, of the gap before it, and of the gap before the end of each row.
    ends = np.concatenate([column + 1, column, np.full(rows, columns)])
    row = np.concatenate([row, row, np.arange(rows)])
    tile = np.concatenate([np.arange(len(words)), np.full(len(words) + rows, -1)])
    order = np.lexsort((tile < 0, ends, row))
    row, ends, tile = row[order], ends[order], tile[order]
    keep = ends > 0
    keep[1:] &= (row[1:] != row[:-1]) | (ends[1:] != ends[:-1])
    all_words = np.concatenate([words, SPECIAL[:1]])  # of which the last, -1, is a gap
    row, ends, tile = row[keep], ends[keep], tile[keep]
    parts = range(0, len(row), 64 * CHUNK)
    return collect((Pieces(row[n:m], ends[n:m], all_words[tile[n:m]]) for n in parts for m in [n + 64 * CHUNK]), rows)


def from_intervals(starts: Array, stops: Array, S: int) -> Runs:
    """Runs of a matrix of which row i shows the columns starts[i] .. stops[i]."""
    L, columns = len(starts), tiles_over(S)
    rows = tiles_over(L)

    def pieces() -> Iterator[Pieces]:
        for first in range(0, rows if columns else 0, CHUNK):
            last = min(first + CHUNK, rows)
            i = np.minimum(np.arange(first * TILE, last * TILE), L - 1).reshape(-1, TILE)
            start, stop = starts[i], stops[i]
            # Between these columns, all tiles of a row are alike.
            at = np.concatenate([start // TILE, start // TILE + 1, stop // TILE, stop // TILE + 1], axis=1)
            at = np.sort(np.concatenate([np.clip(at, 0, columns), np.full((len(at), 1), columns)], axis=1), axis=1)
            begins = np.concatenate([np.zeros((len(at), 1), at.dtype), at[:, :-1]], axis=1)
            row, n = np.nonzero(at > begins)
            for part in range(0, len(row), CHUNK):
                where = row[part : part + CHUNK], n[part : part + CHUNK]
                j = np.minimum(begins[where][:, None] * TILE + np.arange(TILE), S - 1)[:, :, None]
                shown = (start[where[0], None] <= j) & (j < stop[where[0], None])
                yield Pieces(where[0] + first, at[where], pack(shown))

    return collect(pieces(), rows)


# Operations.


def merge(runs: Runs, rows: Array, columns: int) -> tuple[Array, Array, Array]:
    """Cut several rows at once at the ends of all of their runs.

    Parameters
    ----------
    runs : Runs
    rows : array of int, shape (n, K)
        K rows for each result.
    columns : int
        Columns of tiles.

    Returns
    -------
    item : array of int, shape (m,)
        Which result a piece belongs to, ascending.
    ends : array of int, shape (m,)
    ids : array of int32, shape (m, K)
        The tile that each of the rows repeats there.
    """
    first, count = runs.starts[rows], np.diff(runs.starts)[rows]
    which = np.repeat(first.ravel(), count.ravel()) + _counts(count.ravel())
    item = np.repeat(np.repeat(np.arange(len(rows)), rows.shape[1]), count.ravel())
    if rows.shape[1] == 1:
        return item, runs.ends[which], runs.ids[which][:, None]
    step = columns + 1
    cuts = np.unique(item * step + runs.ends[which])
    item, ends = np.divmod(cuts, step)
    all_ends = rows_of(runs) * step + runs.ends
    ids = [runs.ids[np.searchsorted(all_ends, row[item] * step + ends)] for row in rows.T]
    return item, ends, np.stack(ids, axis=1)


def _counts(count: Array) -> Array:
    """0 .. count[0], 0 .. count[1] and so on."""
    total = np.arange(int(count.sum()))
    result: Array = total - np.repeat(np.cumsum(count) - count, count)
    return result


def stacked(parts: list[Runs]) -> Runs:
    """The rows of all parts, each with tiles of its own, which need not be distinct."""
    runs = np.cumsum([0, *(len(part.ids) for part in parts)])
    tiles = np.cumsum([0, *(len(part.tiles) for part in parts)])
    starts = [part.starts[1:] + n for part, n in zip(parts, runs, strict=False)]
    ids = [part.ids + np.int32(n) for part, n in zip(parts, tiles, strict=False)]
    return Runs(
        np.concatenate([np.zeros(1, np.int64), *starts]),
        np.concatenate([part.ends for part in parts]),
        np.concatenate(ids),
        np.concatenate([part.tiles for part in parts]),
    )


def joined_rows(parts: list[Runs]) -> Runs:
    """The rows of all parts."""
    if not parts:
        return collect([], 0)
    both = stacked(parts)
    tiles, number = _distinct(np.concatenate([SPECIAL, both.tiles]))
    return tidy(rows_of(both), both.ends, number[2:][both.ids].astype(np.int32), tiles, len(both.starts) - 1)


def combine(a: Runs, b: Runs, pairs: Array, rows: int, columns: int, operation: Callable[..., Any]) -> Runs:
    """Apply a bitwise operation to planes of `rows` rows each: those of a and of b that `pairs` (n, 2) tells."""
    both = stacked([a, b])
    planes = pairs + [0, (len(a.starts) - 1) // max(rows, 1)]
    which = (planes[:, None, :] * rows + np.arange(rows)[:, None]).reshape(-1, 2)
    item, ends, ids = merge(both, which, columns)
    code, where = np.unique(ids[:, 0].astype(np.int64) * len(both.tiles) + ids[:, 1], return_inverse=True)
    left, right = np.divmod(code, len(both.tiles))
    words, number = _distinct(np.concatenate([SPECIAL, operation(both.tiles[left], both.tiles[right])]))
    return tidy(item, ends, number[2:][where].astype(np.int32), words, len(which))


def complement(runs: Runs) -> Runs:
    """Show what is hidden, and hide what is shown."""
    swapped = np.where(runs.ids <= FULL, FULL - runs.ids, runs.ids).astype(np.int32)
    return runs._replace(ids=swapped, tiles=np.concatenate([SPECIAL, ~runs.tiles[2:]]))


def transpose(runs: Runs, planes: int, rows: int, columns: int) -> Runs:
    """Transpose each plane of rows x columns tiles."""
    tiles = np.concatenate([pack(unpack(part).swapaxes(1, 2)) for part in _parts(runs.tiles, CHUNK)])
    step = columns + 1
    all_ends = rows_of(runs) * step + runs.ends
    row: list[Array] = []
    end: list[Array] = []
    ids: list[Array] = []
    for plane in range(planes):
        for first in range(0, columns if rows else 0, max(1, 2**20 // max(rows, 1))):
            column = np.arange(first, min(first + max(1, 2**20 // max(rows, 1)), columns))
            where = np.searchsorted(all_ends, (plane * rows + np.arange(rows)) * step + column[:, None] + 1)
            count = np.tile(np.arange(1, rows + 1), len(column))
            new = np.repeat(plane * columns + column, rows)
            for parts, part in zip((row, end, ids), joined(new, count, runs.ids[where].ravel()), strict=True):
                parts.append(part)
    if not row:
        return collect([], planes * columns)
    return tidy(np.concatenate(row), np.concatenate(end), np.concatenate(ids), tiles, planes * columns)


def take(runs: Runs, rows: Array, first: int, last: int) -> Runs:
    """Chosen rows, of the columns of tiles first .. last."""
    item, ends, ids = merge(runs, rows[:, None], 0)
    before = np.zeros_like(ends)
    before[1:] = np.where(item[1:] == item[:-1], ends[:-1], 0)
    keep = (ends > first) & (before < last)
    return tidy(item[keep], np.minimum(ends[keep], last) - first, ids[keep, 0], runs.tiles, len(rows))


def dense(runs: Runs, first: int, last: int, columns: int) -> Array:
    """Rows of tiles as an array of 0 and 1, shape (64 rows, 64 columns)."""
    part = slice(runs.starts[first], runs.starts[last])
    length = (runs.ends - begins_of(runs))[part]
    ids = np.repeat(runs.ids[part], length).reshape(last - first, columns)
    distinct, where = np.unique(ids, return_inverse=True)
    bits = unpack(runs.tiles[distinct])[where.reshape(ids.shape)]  # row, column, key, query
    return bits.transpose(0, 3, 1, 2).reshape((last - first) * TILE, columns * TILE)


def _parts(x: Array, n: int) -> Iterator[Array]:
    for first in range(0, len(x), n):
        yield x[first : first + n]


def counts(runs: Runs, planes: int, rows: int) -> tuple[Array, Array]:
    """How many tiles of each plane show everything, and how many are partial."""
    plane, length = rows_of(runs) // max(rows, 1), runs.ends - begins_of(runs)
    full, partial = runs.ids == FULL, runs.ids > FULL
    return tuple(np.bincount(plane[x], length[x], planes).astype(np.int64) for x in (full, partial))  # type: ignore[return-value]


def bands(rows: int, S: int) -> Iterator[tuple[int, int]]:
    """Parts of the rows of tiles over S keys, first and last, whose bits are held as bool at once."""
    step = max(1, BAND // max(1, TILE * S))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)
