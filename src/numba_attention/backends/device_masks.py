"""Block masks for the kernels of a GPU: lists of visible tiles in its memory, kept with the mask; or the whole mask."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..cuda import tile_shapes
from ..cuda.spec import Spec
from ..cuda.visits import row_bytes
from ..device import replay, runtime
from ..device.headers import address_of, header, held
from ..masks.blockmask import BlockMask
from ..masks.lists import Geometry, Lists, make_lists
from ..masks.runs import TILE
from ..options import Array
from ..problem.dense import Problem
from . import cpu_masks as of_host

# What a tile costs for each pair, by a model: half as many rows, for which keys and values are read twice as often; and
# bits to be tested.
SMALL_TILE, BITS = 1.25, 0.4


class DeviceLists(NamedTuple):
    """Lists in the memory of a GPU, by the names of the parameters of kernels (`cuda.visits`)."""

    list_first: Array  # int64: of each head of each sequence, its first list
    list_starts: Array  # int64 (lists + 1,): where the runs of a list begin
    list_runs: Array  # int32 (runs, 4): first tile, the one after the last, which words, head of the group
    list_words: Array  # uint8 (n, 64, bytes of a row): which rows see each column
    heads: int  # of a sequence


def lists_of(p: Problem, c: Spec) -> DeviceLists:
    """Return the lists for the tiles of a kernel, made and copied at the first call of their kind."""
    mask, key = p.blocks, _key(p, c)
    assert mask is not None
    kept = _kept_by(mask)
    lists = kept.get(key)
    if lists is None:
        made, length, of_keys = _made(p, c, kept), _length(p, c), c.task == "key"
        heads = p.Hkv if of_keys or c.pack_gqa else p.H
        group = p.H // p.Hkv if of_keys else 1
        tiles = np.broadcast_to(-(-np.asarray(length) // c.rows), (int(np.prod(p.batch)),))
        lists = kept[key] = _copied(*_joined(made, tiles, heads, group), _padded(made.words, c.rows), heads)
    recorder = replay.current()
    if recorder is not None:
        for x in _arrays(lists).values():
            recorder.fix(x)
    return lists


def _length(p: Problem, c: Spec) -> Any:
    """How many rows the tiles of a kernel have to cover, of each sequence if they differ."""
    if p.packing is not None:
        return p.packing.key_rows if c.task == "key" else p.packing.query_rows
    return p.S if c.task == "key" else p.L


def _key(p: Problem, c: Spec) -> tuple[Any, ...]:
    """What lists depend on, besides their mask."""
    length = _length(p, c)
    each = length.tobytes() if isinstance(length, np.ndarray) else length
    return p.batch, p.H, p.Hkv, c.task == "key", c.rows, c.pack_gqa, each


def _made(p: Problem, c: Spec, kept: dict[Any, Any]) -> Lists:
    """Make lists on the host."""
    mask, geometry, length = p.blocks, Geometry(c.rows, min(c.rows, 8)), _length(p, c)
    assert mask is not None
    if c.task != "key":
        return make_lists(mask, p.batch, p.H, p.Hkv if c.pack_gqa else p.H, geometry, length)
    transposed = kept.get("transposed")
    if transposed is None:
        transposed = kept["transposed"] = mask.T
    return make_lists(transposed, p.batch, p.H, p.H, geometry, length)


def with_fitting_rows(p: Problem, c: Spec) -> Spec:
    """Return a kernel with tiles of as many rows as those of the block mask, where larger ones take more time.

    A tile of 128 rows visits what either of two rows of tiles of the mask shows, and tests bits where they differ. Of a
    mask that shows a tenth of its tiles at random that is 0.22 of all, of which 93 % need the test.
    """
    if p.blocks is None or p.packing is not None or c.rows <= TILE:
        return c
    small = tile_shapes.no_more_rows(c, TILE)
    kept, key = _kept_by(p.blocks), ("rows", *_key(p, c))
    is_better = kept.get(key)
    if is_better is None:
        made = _made(p, c, kept)
        tiles = made.runs[:, 1] - made.runs[:, 0]
        tested = tiles[made.runs[:, 2] > 0].sum() / max(tiles.sum(), 1)
        is_better = kept[key] = SMALL_TILE * p.blocks.density < made.share_of() * (1 + BITS * float(tested))
    return small if is_better else c


def _kept_by(mask: BlockMask) -> dict[Any, Any]:
    """What was made of a mask for the current device."""
    key = "device", runtime.driver, runtime.driver.current()
    kept: dict[Any, Any] | None = mask.kept.get(key)
    if kept is None:
        kept = {}
        mask.keep(key, kept)
    return kept


def _joined(made: Lists, tiles: Array, heads: int, group: int) -> tuple[Array, Array, Array]:
    """First lists, starts and runs, where the lists of the heads of a group follow one another in one list."""
    runs = np.zeros((len(made.runs), 4), np.int32)
    runs[:, :3] = made.runs
    if group == 1:
        return made.first, made.starts, runs
    first = made.first.reshape(len(tiles), heads, group)
    kinds = np.concatenate([first, np.broadcast_to(tiles[:, None, None], (*first.shape[:2], 1))], axis=2)
    kinds, where = np.unique(kinds.reshape(-1, group + 1), axis=0, return_inverse=True)
    # The lists that follow one another: tile by tile, head by head.
    sources = [(kind[:-1] + np.arange(kind[-1])[:, None]).ravel() for kind in kinds]
    source = np.concatenate([*sources, np.zeros(0, np.int64)]).astype(np.int64)
    count = made.starts[source + 1] - made.starts[source]
    ends = np.cumsum(count)
    which = np.arange(int(count.sum())) - np.repeat(ends - count, count) + np.repeat(made.starts[source], count)
    joined = runs[which]
    joined[:, 3] = np.repeat(np.arange(len(source)) % group, count)
    starts = np.concatenate([np.zeros(1, np.int64), ends[group - 1 :: group]])
    begins = np.cumsum(kinds[:, -1]) - kinds[:, -1]
    return begins[where.ravel()], starts.astype(np.int64), joined


def _padded(words: Array, rows: int) -> Array:
    """Words of whole groups of 32 rows."""
    missing = row_bytes(rows) - words.shape[-1]
    return np.pad(words, ((0, 0), (0, 0), (0, missing))) if missing else words


def _copied(first: Array, starts: Array, runs: Array, words: Array, heads: int) -> DeviceLists:
    """Copy lists to the device, for work on any stream."""
    stream = runtime.stream()
    replay.refuse_copy(runtime.is_capturing(stream))
    copies = []
    for array in (first.astype(np.int64), starts, runs, words):
        if not array.size:
            copies.append(header(0, array.shape, None, array.dtype, None, runtime.driver.current()))
            continue
        slab = runtime.driver.keep(array.nbytes)
        runtime.driver.write(slab.address, np.ascontiguousarray(array), stream)
        copies.append(header(slab.address, array.shape, None, array.dtype, slab, runtime.driver.current()))
    runtime.driver.synchronize(stream)
    return DeviceLists(copies[0], copies[1], copies[2], copies[3], heads)


def with_block_mask(p: Problem) -> Problem:
    """Return a problem with a block mask in place of its `mask_mod`, where the host can and should make one."""
    on_device = any(isinstance(x, np.ndarray) and held(x) is not None for x in p.mod_args)
    return p if on_device else of_host.with_block_mask(p)


def with_whole_mask(p: Problem) -> Problem:
    """Return a problem with an array of bool in place of a block mask, for kernels that visit every tile."""
    if p.blocks is None:
        return p
    dense = p.blocks.to_dense()
    extra = max(0, dense.ndim - len(p.batch) - 3)
    shown = runtime.upload(dense.reshape(dense.shape[extra:]), runtime.stream())
    return replace(p, mask=np.broadcast_to(shown, (*p.batch, p.H, p.L, p.S)), blocks=None)


def addresses_of(lists: DeviceLists) -> dict[str, int]:
    """Return the addresses of lists, by the names of parameters."""
    return {name: address_of(x) if x.size else 0 for name, x in _arrays(lists).items()}


def _arrays(lists: DeviceLists) -> dict[str, Array]:
    return {name: x for name, x in lists._asdict().items() if name != "heads"}
