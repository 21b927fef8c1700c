"""Packed sequences in blocks of tokens: which pairs of blocks see each other, and the pieces of each pair.

Chunks may cut sequences. In a pair of blocks, the first sequence that has rows and keys in both may begin before either
of them; all later ones begin inside. So a pair has at most two pieces, each of which is a packed call with one origin:
that first sequence, whose options are shifted as in `layout`, and all sequences after it, whose options are their own.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..intervals import FAR, keys_of_rows
from ..options import Array, Options
from ..problem.dense import Origin, Problem
from .layout import OF_THE_WHOLE, Chunks, Heads, Index, Layout, counts, edges_of


class Piece(NamedTuple):
    """Sequences of a pair of blocks that one call of packed attention computes."""

    rows: slice  # of the block
    keys: slice
    starts_q: Array  # offsets of the sequences within `rows` and `keys`
    starts_k: Array
    options: Options
    origin: Origin | None  # where it matters
    where: dict[str, tuple[slice, ...]]  # the part of a block of `mask` and `bias`

    @property
    def starts(self) -> dict[str, Array]:
        """The offsets, by name."""
        return {"starts_q": self.starts_q, "starts_k": self.starts_k}

    def of(self, name: str, block: Any) -> Any:
        """Return the part of a block of `mask` or `bias`."""
        return None if block is None else block[self.where[name]]


Pieces = tuple[Piece, ...]


def at_multiples_within(chunks: Chunks, problem: Problem, of: int) -> Chunks:
    """Return chunks that begin at multiples of a number within a sequence, or at its end, close to `chunks`."""
    packing = problem.packing
    assert packing is not None
    *edges, end = edges_of(chunks)
    moved = {0, end}
    for edge in edges:
        b = int(np.searchsorted(packing.key_starts, edge, side="right")) - 1
        if b >= 0:
            start, size = int(packing.key_starts[b]), int(packing.key_rows[b])
            moved.add(start + min(round((edge - start) / of) * of, size))
    return tuple(b - a for a, b in pairwise(sorted(moved))) if end else chunks


class PackedLayout(Layout):
    """The blocks of one packed problem: heads, rows and keys, where rows and keys are tokens of all sequences.

    Parameters
    ----------
    problem : Problem
        Of `problem.packed`.
    batch
        Empty.
    heads, rows, keys, options
        As of `Layout`.
    """

    axis = 0

    def __init__(
        self, problem: Problem, batch: Sequence[Chunks], heads: Heads, rows: Chunks, keys: Chunks, options: Options
    ) -> None:
        super().__init__(problem, batch, heads, rows, keys, options)
        assert problem.packing is not None
        self.packing = problem.packing
        self.mask = problem.blocks
        self.token = [x.tolist() for x in self.packing[:4]]
        self.rows_end = self.packing.query_starts + self.packing.query_rows
        self.keys_end = self.packing.key_starts + self.packing.key_rows

    def _are_tokens(self, name: str) -> tuple[bool, bool]:
        """Whether rows and columns of `mask` or `bias` are tokens of all sequences, or else positions in each."""
        return self.packing.mask if name == "mask" else self.packing.bias

    def chunks_of(self, name: str) -> tuple[Chunks, ...]:
        sizes = zip(self._are_tokens(name), self.scores[1:], (self.problem.L, self.problem.S), strict=True)
        of_pairs = [chunks if tokens else (longest,) for tokens, chunks, longest in sizes]
        return (self.problem.batch[0],), self.heads.query, *of_pairs

    def index_of(self, name: str, index: Index) -> Index:
        h, *of_pairs = index
        blocks = (n if tokens else 0 for tokens, n in zip(self._are_tokens(name), of_pairs, strict=True))
        return (0, h, *blocks)

    def _find_visible(self, batch: Index) -> list[list[int]]:
        p = self.problem
        assert p.query_lengths is not None
        low, high = -FAR if p.left is None else -p.left, FAR if p.right is None else p.right
        begin, end = np.asarray(self.edges[-1][:-1]), np.asarray(self.edges[-1][1:])
        blocks = []
        for r0, r1 in pairwise(self.edges[-2]):
            own = slice(*self._sequences(r0, r1))
            starts = self.packing.query_starts[own]
            first, last = np.maximum(r0 - starts, 0), np.minimum(r1 - starts, p.query_lengths[own]) - 1
            offset, prefix = self._numbers_of("offset", own), self._numbers_of("prefix_lengths", own)
            numbers = offset + low, offset + high, p.query_lengths[own], self._numbers_of("key_lengths", own), prefix
            start, stop = keys_of_rows(first, *numbers)[0], keys_of_rows(last, *numbers)[1]
            seen = (last >= first) & (start < stop)
            from_key = (self.packing.key_starts[own] + start)[seen, None]
            to_key = (self.packing.key_starts[own] + stop)[seen, None]
            are_seen = (from_key < end) & (to_key > begin) & (begin < end)
            blocks.append([int(s) for s in np.flatnonzero(are_seen.any(axis=0))])
        return blocks

    def _sequences(self, r0: int, r1: int) -> tuple[int, int]:
        """Return the first sequence with a row in an interval, and the one after the last."""
        first = int(np.searchsorted(self.rows_end, r0, side="right"))
        return first, max(first, int(np.searchsorted(self.packing.query_starts, r1, side="left")))

    def _numbers_of(self, name: str, own: slice) -> Array:
        """Return a number of each of some sequences; 0 by default."""
        x = getattr(self.problem, name)
        n = len(self.packing.query_starts[own])
        block: Array = x[own] if isinstance(x, np.ndarray) else np.full(n, 0 if x is None else x, np.int64)
        return block

    def pairs(self) -> Iterator[tuple[Index, int, int, list[tuple[int | None, Any]]]]:
        """Yield the index ((), head, row) of each block of rows, and the blocks of keys it sees with their pieces.

        Sinks are seen in a pair without keys, which comes first: in others, not every sequence of the block has keys.
        """
        for h in range(len(self.heads.query)):
            for r, keys in enumerate(self.visible(())):
                pairs: list[tuple[int | None, Any]] = [(s, pieces) for s in keys if (pieces := self._pieces(h, r, s))]
                if self.problem.sinks is not None:
                    pairs.insert(0, (None, self._of_sinks(h, r)))
                yield (), h, r, pairs or [(None, ())]

    def _pieces(self, h: int, r: int, s: int) -> Pieces:
        (r0, r1), (k0, k1) = self.edges[-2][r : r + 2], self.edges[-1][s : s + 2]
        of_block = slice(*self._sequences(r0, r1))
        starts, ends = self.packing.query_starts[of_block], self.rows_end[of_block]
        rows = np.clip(ends, r0, r1) - np.clip(starts, r0, r1)
        starts, ends = self.packing.key_starts[of_block], self.keys_end[of_block]
        keys = np.clip(ends, k0, k1) - np.clip(starts, k0, k1)
        both = np.flatnonzero((rows > 0) & (keys > 0))
        first, end = int(both[0]), int(both[-1]) + 1
        chosen = [slice(first, first + 1), slice(first + 1, end)]
        pieces = [
            self._piece(h, r, s, slice(of_block.start + own.start, of_block.start + own.stop), rows[own], keys[own])
            for own in chosen[: 2 if end > first + 1 else 1]
        ]
        return tuple(piece for piece in pieces if piece is not None)

    def _piece(self, h: int, r: int, s: int, own: slice, rows: Array, keys: Array) -> Piece | None:
        """Return the piece of some sequences, which have so many rows and keys in the pair; None if a mask hides it."""
        p, heads = self.problem, self._heads(h)
        first_row, first_key = int(self.packing.query_starts[own.start]), int(self.packing.key_starts[own.start])
        r0, k0 = self.edges[-2][r], self.edges[-1][s]
        row, key = max(first_row, r0), max(first_key, k0)
        before_rows, before_keys = row - first_row, key - first_key  # 0 unless there is one sequence
        options: dict[str, Any] = {"scale": p.scale, "softcap": p.softcap}
        options |= {name: getattr(self.options, name) for name in OF_THE_WHOLE}
        assert p.query_lengths is not None
        options["query_lengths"] = np.clip(p.query_lengths[own] - before_rows, 0, rows)
        options["key_lengths"] = np.clip(self._numbers_of("key_lengths", own) - before_keys, 0, keys)
        if p.left is not None or p.right is not None:
            options["window"] = (p.left, p.right)
        if p.left is not None or p.right is not None or p.alibi_slopes is not None or counts(p):
            options["query_offset"] = self._numbers_of("offset", own) + (before_rows - before_keys)
        if p.prefix_lengths is not None:
            options["prefix_lengths"] = np.clip(p.prefix_lengths[own] - before_keys, 0, keys)
        if p.alibi_slopes is not None:
            options["alibi_slopes"] = np.ascontiguousarray(p.alibi_slopes[own, heads])
        within = slice(before_rows, before_rows + int(rows.max())), slice(before_keys, before_keys + int(keys.max()))
        if p.blocks is not None:
            index = _index_of((1,) * (4 - p.blocks.ndim) + p.blocks.shape, (own, heads, *within))
            options["mask"] = p.blocks[index[4 - p.blocks.ndim :]]
            if not options["mask"].density:
                return None
        of_tokens = slice(row - r0, row - r0 + int(rows.sum())), slice(key - k0, key - k0 + int(keys.sum()))
        where = {}
        for name, x in (("mask", None if p.blocks is not None else self.options.mask), ("bias", self.options.bias)):
            if x is not None:
                readings = zip(self._are_tokens(name), of_tokens, within, strict=True)
                axes = [tokens if are_tokens else positions for are_tokens, tokens, positions in readings]
                where[name] = _index_of(np.shape(x), (own, slice(None), *axes))
        starts_q, starts_k = (np.concatenate([[0], np.cumsum(n)]) for n in (rows, keys))
        origin = Origin(np.arange(own.start, own.stop), self.edges[0][h], before_keys) if counts(p) else None
        return Piece(*of_tokens, starts_q, starts_k, Options(**options), origin, where)

    def _of_sinks(self, h: int, r: int) -> Pieces:
        """Return all sequences of a block of rows, without keys."""
        p = self.problem
        r0, r1 = self.edges[-2][r : r + 2]
        if r0 == r1:
            return ()
        own = slice(*self._sequences(r0, r1))
        starts = np.clip(self.packing.query_starts[own], r0, r1)
        rows = np.clip(self.rows_end[own], r0, r1) - starts
        assert p.query_lengths is not None
        assert p.sinks is not None
        lengths = np.clip(p.query_lengths[own] - (starts - self.packing.query_starts[own]), 0, rows)
        starts_q = np.concatenate([[0], np.cumsum(rows)])
        options = Options(scale=p.scale, query_lengths=lengths, sinks=p.sinks[self._heads(h)])
        return (Piece(slice(None), slice(None), starts_q, np.zeros_like(starts_q), options, None, {}),)

    def _heads(self, h: int) -> slice:
        return slice(*self.edges[0][h : h + 2])


def _index_of(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[slice, ...]:
    """Return an index of an array that is broadcast along axes of size 1."""
    return tuple(slice(0, 1) if n == 1 else i for n, i in zip(shape, index, strict=True))


__all__ = ["PackedLayout", "Piece", "Pieces", "at_multiples_within"]
