"""Attention in blocks of rows and keys: which pairs of blocks see each other, and the options of each pair.

Nothing here depends on Dask. Every structural option of the whole problem becomes one of the pair (rows r0 .. r1, keys
k0 .. k1), because causality, windows and ALiBi depend on the difference of position and key only:

    query_offset' = query_offset + r0 - k0
    key_lengths' = clip(key_lengths - k0, 0, k1 - k0), and prefix_lengths likewise
    query_lengths' = clip(query_lengths - r0, 0, r1 - r0)

Sinks are counted in one pair of each row block. Dropout and mods count sequences, heads, positions and keys from an
`Origin`, which each pair gets.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np

from ..intervals import FAR, keys_of_rows
from ..masks.blockmask import BlockMask
from ..options import Array, Options
from ..problem.dense import Origin, Problem

Chunks = tuple[int, ...]
Index = tuple[int, ...]

# Options that are the same in every pair. Arrays in mod_args are a task of their own.
OF_THE_WHOLE = ("score_mod", "mask_mod", "dropout_p", "seed")


def counts(problem: Problem) -> bool:
    """Whether the numbers of sequences, heads, positions and keys in the whole problem matter in a block."""
    return bool(problem.dropout) or problem.score_mod is not None or problem.mask_mod is not None


def edges_of(chunks: Chunks) -> Chunks:
    """Return where blocks begin, and where the last one ends."""
    return tuple(int(x) for x in np.cumsum((0, *chunks)))


def at_multiples(chunks: Chunks, of: int) -> Chunks:
    """Return chunks that begin at multiples of a number, close to `chunks`."""
    *edges, end = edges_of(chunks)
    moved = sorted({min(round(edge / of) * of, end) for edge in edges} | {end})
    return tuple(b - a for a, b in pairwise(moved)) if end else chunks


class Heads(NamedTuple):
    """Blocks of heads, where several query heads may read one key head."""

    query: Chunks
    key: Chunks
    key_block: Index  # of each block of query heads, the block of the key heads that it reads


def blocks_of_heads(chunks: Chunks, Hkv: int) -> Heads:
    """Return blocks of query heads that either contain whole groups or lie inside one, close to `chunks`.

    Parameters
    ----------
    chunks : tuple of int
        Wanted sizes of the blocks of query heads.
    Hkv : int
        Number of key/value heads, which divides the number of query heads.
    """
    edges = edges_of(chunks)
    G = edges[-1] // Hkv if Hkv else 1
    whole = all(edge % G == 0 for edge in edges)
    inside = all((b - 1) // G == a // G for a, b in pairwise(edges))
    if not whole and not inside:
        edges = tuple(sorted({-(-edge // G) * G for edge in edges}))
        chunks, whole = tuple(b - a for a, b in pairwise(edges)), True
    if whole:
        return Heads(chunks, tuple(n // G for n in chunks), tuple(range(len(chunks))))
    return Heads(chunks, (1,) * Hkv, tuple(edge // G for edge in edges[:-1]))


class Layout:
    """The blocks of one problem.

    Parameters
    ----------
    problem : Problem
        The whole problem. Its arrays may be headers: they are not read.
    batch, heads, rows, keys
        Sizes of the blocks along each axis of the batch, along the query heads, the queries and the keys.
    options : Options
        Those of the call. Pairs that a mask hides that can be looked at now are left out.
    """

    def __init__(
        self, problem: Problem, batch: Sequence[Chunks], heads: Heads, rows: Chunks, keys: Chunks, options: Options
    ) -> None:
        self.problem = problem
        self.options = options
        self.mask: Any = options.mask if isinstance(options.mask, BlockMask | np.ndarray) else None
        self._blocks_of_mask: dict[Index, Any] = {}
        self._visible: dict[Index, list[list[int]]] = {}
        self.heads = heads
        self.scores = (*batch, heads.query, rows, keys)  # sizes of the blocks of scores, (*batch, H, L, S)
        self.edges = tuple(edges_of(chunks) for chunks in self.scores)

    axis = -2  # of rows and keys in the arrays that the caller passed
    token: Any = None  # what tells this layout from others beside options and arrays

    def coarser(self, rows: Chunks, keys: Chunks) -> "Layout":
        """Return the layout with other blocks of rows and keys."""
        return type(self)(self.problem, self.scores[:-3], self.heads, rows, keys, self.options)

    def chunks_of(self, name: str) -> tuple[Chunks, ...]:
        """Return the blocks of `mask` or `bias`, if no axis has size 1."""
        return self.scores

    def index_of(self, name: str, index: Index) -> Index:
        """Return which block of `mask` or `bias` the pair (*batch, head, row, key) reads."""
        return index

    def batches(self) -> Iterator[Index]:
        """Yield the index of each block of sequences."""
        return product(*(range(len(chunks)) for chunks in self.scores[:-3]))

    def shape(self, index: Index) -> tuple[int, ...]:
        """Return the sizes of a block, whose index is that of its first axes."""
        return tuple(chunks[i] for chunks, i in zip(self.scores, index, strict=False))

    def _of_block(self, x: Any, batch: Index) -> Array:
        """Return the numbers of the sequences of a block, flat, for one number or an array of one for each."""
        if not isinstance(x, np.ndarray):
            return np.full(1, x, np.int64)
        where = tuple(slice(edges[i], edges[i + 1]) for edges, i in zip(self.edges, batch, strict=False))
        block: Array = x[where]
        return block.ravel()

    def visible(self, batch: Index) -> list[list[int]]:
        """Return, for each block of rows, which blocks of keys some row of some sequence of the block sees.

        Intervals of the rows of a sequence overlap or touch, and both ends grow with the row: their union goes from the
        start of the first row to the stop of the last valid one.
        """
        if batch not in self._visible:
            self._visible[batch] = self._find_visible(batch)
        return self._visible[batch]

    def _find_visible(self, batch: Index) -> list[list[int]]:
        p = self.problem
        queries = self._of_block(p.L if p.query_lengths is None else p.query_lengths, batch)
        keys = self._of_block(p.S if p.key_lengths is None else p.key_lengths, batch)
        prefix = self._of_block(0 if p.prefix_lengths is None else p.prefix_lengths, batch)
        offset = self._of_block(p.offset, batch)
        low = np.full_like(offset, -FAR) if p.left is None else offset - p.left
        high = np.full_like(offset, FAR) if p.right is None else offset + p.right
        begin, end = np.asarray(self.edges[-1][:-1]), np.asarray(self.edges[-1][1:])
        blocks = []
        for r0, r1 in pairwise(self.edges[-2]):
            last = np.minimum(r1, queries) - 1
            start = keys_of_rows(np.full_like(last, r0), low, high, queries, keys, prefix)[0]
            stop = keys_of_rows(last, low, high, queries, keys, prefix)[1]
            stop = np.where(last >= r0, stop, start)
            seen = (start[:, None] < end) & (stop[:, None] > begin) & (begin < end) & (start < stop)[:, None]
            blocks.append([int(s) for s in np.flatnonzero(seen.any(axis=0))])
        return blocks

    def local(self, batch: Index, r: int, s: int | None) -> Options:
        """Return the options of rows r and keys s, or of no keys, but those that depend on the head."""
        p = self.problem
        r0, r1 = self.edges[-2][r : r + 2]
        k0, k1 = (0, 0) if s is None else self.edges[-1][s : s + 2]
        options: dict[str, Any] = {"scale": p.scale, "softcap": p.softcap}
        if s is not None:
            options |= {name: getattr(self.options, name) for name in OF_THE_WHOLE}
        if p.query_lengths is not None:
            options["query_lengths"] = self._numbers(np.clip(p.query_lengths - r0, 0, r1 - r0), batch)
        if s is None:
            return Options(**options)
        if p.left is not None or p.right is not None:
            options["window"] = (p.left, p.right)
        if p.left is not None or p.right is not None or p.alibi_slopes is not None or counts(p):
            options["query_offset"] = self._numbers(p.offset + (r0 - k0), batch)
        if p.key_lengths is not None:
            options["key_lengths"] = self._numbers(np.clip(p.key_lengths - k0, 0, k1 - k0), batch)
        if p.prefix_lengths is not None:
            options["prefix_lengths"] = self._numbers(np.clip(p.prefix_lengths - k0, 0, k1 - k0), batch)
        return Options(**options)

    def pairs(self) -> Iterator[tuple[Index, int, int, list[tuple[int | None, Any]]]]:
        """Yield the index (batch, head, row) of each block of rows, and the blocks of keys it sees with their options.

        A block that sees nothing has one pair with no keys, so that its rows exist and see their sinks. Sinks are
        options of the first pair of a block of rows.
        """
        for batch in self.batches():
            visible = self.visible(batch)
            local: list[list[tuple[int | None, Options]]] = [
                [(s, self.local(batch, r, s)) for s in keys] for r, keys in enumerate(visible)
            ]
            for h in range(len(self.heads.query)):
                always, once = self.of_heads(batch, h)
                for r, pairs in enumerate(local):
                    if self.mask is not None:
                        pairs = self._through_mask(batch, h, r, pairs)
                    if not pairs:
                        pairs = [(None, self.local(batch, r, None))]
                    if always:
                        pairs = [(s, options._replace(**always)) for s, options in pairs]
                    if once:  # in the first pair
                        pairs = [(pairs[0][0], pairs[0][1]._replace(**once)), *pairs[1:]]
                    yield batch, h, r, pairs

    def _through_mask(self, batch: Index, h: int, r: int, pairs: list[Any]) -> list[Any]:
        """Leave out the pairs that the mask hides; the others get their block of a `BlockMask`."""
        shown = []
        for s, options in pairs:
            block = self._block_of_mask((*batch, h, r, s))
            if block is not None:
                shown.append((s, options if isinstance(block, np.ndarray) else options._replace(mask=block)))
        return shown

    def _block_of_mask(self, index: Index) -> Any:
        """Return a block of the mask, or None if it hides every pair."""
        mask = self.mask
        index = ((0,) * max(0, mask.ndim - len(index)) + index)[-mask.ndim :]
        index = tuple(0 if n == 1 else i for n, i in zip(mask.shape, index, strict=True))
        if index not in self._blocks_of_mask:
            edges = ((0, 1),) * max(0, mask.ndim - len(self.edges)) + self.edges
            block = mask[
                tuple(
                    slice(0, 1) if n == 1 else slice(*of_axis[i : i + 2])
                    for n, i, of_axis in zip(mask.shape, index, edges[-mask.ndim :], strict=True)
                )
            ]
            shows = block.any() if isinstance(block, np.ndarray) else block.density > 0
            self._blocks_of_mask[index] = block if shows else None
        return self._blocks_of_mask[index]

    def _numbers(self, x: Any, batch: Index) -> Any:
        """Return the numbers of a block of sequences: one number if they are equal, else an array."""
        if not isinstance(x, np.ndarray):
            return int(x)
        block = x[tuple(slice(edges[i], edges[i + 1]) for edges, i in zip(self.edges, batch, strict=False))]
        same = block.size and (block == block.flat[0]).all()
        return int(block.flat[0]) if same else np.ascontiguousarray(block)

    def origin(self, batch: Index, h: int, s: int) -> Origin | None:
        """Return where a pair lies in the whole problem, if that matters."""
        p, n = self.problem, len(self.scores) - 3
        if not counts(p):
            return None
        where = [np.arange(*edges[i : i + 2]) for edges, i in zip(self.edges, batch, strict=False)]
        numbers = np.ravel_multi_index(np.ix_(*where), p.batch) if n else np.zeros(1, np.int64)
        return Origin(np.asarray(numbers, np.int64).ravel(), self.edges[n][h], self.edges[-1][s])

    def of_heads(self, batch: Index, h: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the options that a block of heads has in every pair, and those that count in one pair of each row."""
        p, n = self.problem, len(self.scores) - 3
        heads = slice(*self.edges[n][h : h + 2])
        always, once = {}, {}
        if p.alibi_slopes is not None:
            where = [slice(edges[i], edges[i + 1]) for edges, i in zip(self.edges, batch, strict=False)]
            of_batch = [w if stride else 0 for w, stride in zip(where, p.alibi_slopes.strides, strict=False)]
            if not any(p.alibi_slopes.strides[:-1]):
                always["alibi_slopes"] = np.ascontiguousarray(p.alibi_slopes[(*of_batch, heads)])
            else:
                always["alibi_slopes"] = np.ascontiguousarray(p.alibi_slopes[(*where, heads)])
        if p.sinks is not None:
            once["sinks"] = p.sinks[heads]
        return always, once
