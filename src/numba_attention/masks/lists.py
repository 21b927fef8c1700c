"""The lists that kernels read: for each tile of query rows, the runs of tiles of keys in which something is visible.

A kernel's tile has other rows than a tile of the mask: as many as it has lanes, and those of all query heads that share
a key/value head, position by position. So a list joins several rows of tiles of the mask, and where they are partial
their bits are laid out anew, a vector of lanes to each byte or group of bytes.
"""

import math
from typing import NamedTuple

import numpy as np

from ..options import Array
from . import runs
from .blockmask import BlockMask
from .runs import EMPTY, FULL, TILE

CHUNK = 64  # partial tiles whose bits are laid out at once: 2 MiB, some times over


class Geometry(NamedTuple):
    """How the lanes of a kernel's tiles are laid out."""

    lanes: int  # of a tile
    width: int  # of a vector

    @property
    def row_bytes(self) -> int:
        """Bytes of the bits of all lanes for one key."""
        each: int = max(1, self.width // 8)
        return self.lanes // self.width * each


class Lists(NamedTuple):
    """Lists of visible tiles; the kernels find them through `record`, the addresses of the arrays before it."""

    first: Array  # int64: of each key/value head of each sequence, its first list
    starts: Array  # int64 (lists + 1,): where the runs of a list begin
    runs: Array  # int32 (runs, 3): first tile of keys, the one after the last, and which words: 0 if all is visible
    words: Array  # uint8 (n, 64, row bytes): bit by bit, which lane sees which key; the first is not used
    order: Array  # int64 (lists,): the tiles of a head, longest lists first
    record: Array  # int64 (5,)
    density: Array  # float64 (sequences, key/value heads): share of the tiles of keys that are in the lists

    @property
    def per_sequence(self) -> int:
        """How many places in `first` a sequence has."""
        return int(self.density.shape[1])

    def share_of(self, which: Array | None = None) -> float:
        """Share of the tiles that are visited, of all sequences or of some."""
        density = self.density if which is None else self.density[which]
        return float(density.mean()) if density.size else 0.0


def lists_for(
    mask: BlockMask, batch: tuple[int, ...], H: int, Hkv: int, geometry: Geometry, rows: Array | int,
    chosen: tuple[Array, Array] | None = None, few: bool = False,
) -> Lists:  # fmt: skip
    """Return the lists for the key/value heads of all sequences. They are kept with the mask.

    Parameters
    ----------
    mask : BlockMask
    batch : tuple of int
    H, Hkv : int
        Query heads, and key/value heads, of which each serves H / Hkv of them.
    geometry : Geometry
    rows : int or array of int, shape (sequences,)
        Query rows of each sequence.
    chosen : (heads, rows), optional
        Query heads and query rows, of which each head then has tiles of its own.
    few : bool
        Whether a tile has the rows of several key/value heads where those of one do not fill it; how many depends on
        the rows of the sequence.
    """
    each = rows.tobytes() if isinstance(rows, np.ndarray) else rows
    key = batch, H, Hkv, geometry, each, None if chosen is None else tuple(x.tobytes() for x in chosen), few
    lists = mask.kept.get(key)
    if lists is None:
        lists = make_lists(mask, batch, H, Hkv, geometry, rows, chosen, few)
        mask.keep(key, lists)
    return lists


def make_lists(
    mask: BlockMask, batch: tuple[int, ...], H: int, Hkv: int, geometry: Geometry, rows: Array | int,
    chosen: tuple[Array, Array] | None = None, few: bool = False,
) -> Lists:  # fmt: skip
    """Make the lists of `lists_for`, which are not kept."""
    L, lanes = mask.shape[-2], geometry.lanes
    planes = mask.planes_over((*batch, H)).reshape(math.prod(batch), H)
    positions = np.arange(L)
    group = H // Hkv if Hkv else 1
    if chosen is not None:
        planes, positions, group = planes[:, chosen[0]], chosen[1], 1
        rows = len(positions)
    # The planes of the query heads that share tiles, and which of these heads and which position each lane of each tile
    # has, for each number of rows.
    lengths, length = np.unique(np.broadcast_to(rows, len(planes)), return_inverse=True)
    shares, members, positions_of, tiles = [], [], [], []
    for n, count in enumerate(lengths.tolist()):
        together = max(1, lanes // max(1, count * group)) if few else 1  # key/value heads of a tile
        shares.append(_sharing(planes[length == n], group, together))
        head, row = _lanes(count * group, together, lanes)
        members.append((head * group + row % group) * (shares[n].shape[-1] > 1))
        positions_of.append(positions[row // group] if len(positions) else row)
        tiles.append(len(row))
    # Sets of heads that have the same masks, and so many rows, share their lists.
    sets, width = (max((x.shape[axis] for x in shares), default=0) for axis in (1, 2))
    kinds = np.zeros((len(planes), sets, width + 1), np.int64)
    kinds[..., -1] = length.reshape(-1, 1)
    for n, x in enumerate(shares):
        kinds[length == n, : x.shape[1], : x.shape[2]] = x
        kinds[length == n, x.shape[1] :] = kinds[length == n, :1]  # a sequence with fewer sets
    kinds, where = np.unique(kinds.reshape(-1, width + 1), axis=0, return_inverse=True)
    empty = np.zeros((0, lanes), np.int64)
    return _lists(
        mask, kinds[:, :-1], kinds[:, -1], np.array(tiles, np.int64), where.reshape(len(planes), sets),
        np.concatenate([empty, *members]), np.concatenate([empty, *positions_of]), geometry,
    )  # fmt: skip


def _sharing(planes: Array, group: int, together: int) -> Array:
    """The planes of the query heads that share tiles, (sequences, sets, heads); one where those of a set are equal.

    A set has the heads of `together` key/value heads; the last repeats its last head.
    """
    heads = planes.shape[1]
    sets = -(-heads // (group * together))
    members = np.minimum(np.arange(sets * together * group), max(heads - 1, 0)).reshape(sets, together * group)
    sharing = planes[:, members] if heads else np.zeros((len(planes), 0, group * together), np.int64)
    return sharing[..., :1] if (sharing == sharing[..., :1]).all() else sharing


def _lanes(n: int, together: int, lanes: int) -> tuple[Array, Array]:
    """Which of the heads of a tile, and which of its n rows, each lane has; lanes beyond the last row repeat it."""
    total = n * together
    lane = np.minimum(np.arange(-(-total // lanes) * lanes), max(total - 1, 0)).reshape(-1, lanes)
    return np.divmod(lane, max(n, 1))


def _lists(
    mask: BlockMask, planes: Array, length: Array, tiles_of: Array, kind_of: Array, member: Array, position: Array,
    geometry: Geometry,
) -> Lists:  # fmt: skip
    """Make the lists of kinds of heads, from the lanes of tiles (tiles, lanes).

    A kind has planes of the mask, and a length. The tiles of each length, `tiles_of` each, follow one another.
    """
    rows, columns = mask._tiles
    tiles = tiles_of[length]
    begins = np.cumsum(tiles) - tiles
    kind = np.repeat(np.arange(len(tiles)), tiles)
    tile = np.arange(len(kind)) - begins[kind]
    place = tile + (np.cumsum(tiles_of) - tiles_of)[length[kind]]
    slots, pattern, patterns = _slots(member, position, rows)
    slot = slots[place]
    which = planes[kind[:, None], slot // max(rows, 1)] * rows + slot % max(rows, 1)
    item, ends, ids = runs.merge(mask._runs, which, columns)
    first = np.zeros_like(ends)
    first[1:] = np.where(item[1:] == item[:-1], ends[:-1], 0)
    seen = (ids != EMPTY).any(axis=1)
    item, first, ends, ids = item[seen], first[seen], ends[seen], ids[seen]
    # Runs that repeat equal tiles over equal lanes have equal words.
    partial = (ids != FULL).any(axis=1)
    keys = np.concatenate([pattern[place[item]][partial, None], ids[partial]], axis=1)
    distinct, number = np.unique(keys, axis=0, return_inverse=True)
    words = np.zeros((len(distinct) + 1, TILE, geometry.row_bytes), np.uint8)
    hides, complete = np.zeros(len(words), bool), np.zeros(len(words), bool)
    for part in range(1, len(words), CHUNK):
        chunk, where = distinct[part - 1 : part - 1 + CHUNK], slice(part, part + CHUNK)
        words[where] = _words(mask._runs.tiles, chunk[:, 1:], patterns[chunk[:, 0]], geometry)
        hides[where] = ~words[where].any(axis=(1, 2))
        complete[where] = (words[where] == _all_lanes(geometry)).all(axis=(1, 2))
    word = np.zeros(len(item), np.int64)
    word[partial] = number.ravel() + 1
    visible = ~hides[word]
    word[complete[word]] = 0
    item, first, ends, word = item[visible], first[visible], ends[visible], word[visible]
    starts = np.searchsorted(item, np.arange(len(kind) + 1))
    length = np.bincount(item, ends - first, len(kind)).astype(np.int64)
    # Longest first; of equal lists the last, as under a causal mask, where the order is then the same.
    order = tile[np.lexsort((-tile, -length, kind))]
    share = np.bincount(kind, length, len(tiles)) / np.maximum(tiles * columns, 1)
    arrays = (
        begins[kind_of].ravel().astype(np.int64), starts.astype(np.int64),
        np.ascontiguousarray(np.stack([first, ends, word], axis=1).astype(np.int32)), words, order.astype(np.int64),
    )  # fmt: skip
    record = np.array([array.__array_interface__["data"][0] for array in arrays], np.int64)
    return Lists(*arrays, record, share[kind_of])


def _slots(member: Array, position: Array, rows: int) -> tuple[Array, Array, Array]:
    """Which rows of tiles of the mask the lanes of each tile have.

    Returns
    -------
    slots : array of int, shape (tiles, K)
        member * rows + row of tiles; where a tile has fewer than K, the last is repeated.
    pattern : array of int, shape (tiles,)
        Which of the patterns a tile has.
    patterns : array of int, shape (n, 2, lanes)
        Of each lane, its slot and its bit.
    """
    code = member * max(rows, 1) + position // TILE
    in_order = np.argsort(code, axis=1, kind="stable")
    ascending = np.take_along_axis(code, in_order, axis=1)
    rank = np.zeros_like(code)
    np.cumsum(ascending[:, 1:] != ascending[:, :-1], axis=1, out=rank[:, 1:])
    slot = np.empty_like(code)
    np.put_along_axis(slot, in_order, rank, axis=1)
    slots = np.repeat(ascending[:, -1:], int(rank.max(initial=0)) + 1, axis=1)
    np.put_along_axis(slots, rank, ascending, axis=1)
    lanes = np.stack([slot, position % TILE], axis=1).astype(np.uint8)
    patterns, pattern = np.unique(lanes.reshape(len(lanes), 2 * lanes.shape[2]), axis=0, return_inverse=True)
    return slots, pattern.ravel(), patterns.reshape(-1, *lanes.shape[1:])


def _words(tiles: Array, ids: Array, patterns: Array, geometry: Geometry) -> Array:
    """The bits of the lanes (n, 64 keys, row bytes), from the tiles (n, K) of their slots, and their patterns."""
    slot, bit = patterns[:, 0], patterns[:, 1]
    if geometry.width >= 8 and not slot.any() and (bit == bit[:, :1] + np.arange(geometry.lanes)).all():
        shifted = tiles[ids[:, 0]] >> bit[:, :1].astype(np.uint64)  # the lanes are rows of one tile, in order
        return np.ascontiguousarray(shifted, "<u8").view(np.uint8).reshape(-1, TILE, 8)[..., : geometry.row_bytes]
    of_lanes = tiles[np.take_along_axis(ids, slot.astype(np.int64), axis=1)]  # n, lanes, keys
    bits = ((of_lanes >> bit[:, :, None].astype(np.uint64)) & np.uint64(1)).astype(np.uint8).swapaxes(1, 2)
    return _packed(bits, geometry)


def _packed(bits: Array, geometry: Geometry) -> Array:
    vectors = bits.reshape(*bits.shape[:-1], geometry.lanes // geometry.width, geometry.width)
    packed = np.packbits(vectors, axis=-1, bitorder="little")
    return packed.reshape(*bits.shape[:-1], geometry.row_bytes)


def _all_lanes(geometry: Geometry) -> Array:
    """The words of a tile in which every lane sees every key."""
    return _packed(np.ones((1, TILE, geometry.lanes), np.uint8), geometry)
