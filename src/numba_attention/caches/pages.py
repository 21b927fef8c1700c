"""Which page holds what: block tables, reference counts, the free list. No keys and values here."""

from typing import NamedTuple

import numpy as np

from ..errors import CacheFullError
from ..options import Array


class Growth(NamedTuple):
    """Sequences made longer, to be written to first and committed then."""

    rows: Array  # (n,), which sequences
    added: Array  # (n,), by how many tokens
    first: Array  # (n,), the block that the first of them falls into
    filled: Array  # (n,), tokens that are there already
    pages: Array  # (n, blocks), of the blocks from `first`, -1 past the last of each row
    taken: Array  # pages that are no longer free then
    shared: Array  # pages to be copied before they are written to, because another sequence holds them too
    copies: Array  # and where to


class Sequences(NamedTuple):
    """Live sequences, a row each: what is read of them together."""

    ids: Array  # int64 (n,), ascending
    lengths: Array  # int64 (n,)
    table: Array  # int64 (n, at least as many as blocks in use), unused entries -1

    def rows(self, ids: Array) -> Array:
        """Find the rows of ids."""
        rows = np.searchsorted(self.ids, ids)
        known = (ids >= 0) & (np.append(self.ids, -1)[rows] == ids)
        if not known.all():
            raise KeyError(f"no sequence has the id {ids[~known][0]}: it was freed, or never added")
        return rows


class PageTable:
    """Live sequences, one row each in order of id, and the pages that hold them.

    A page is named by any number of rows (`counts`); that of none is on the free list. It is only ever written to past
    the tokens that rows have in it: whoever has fewer of them than are there writes to a copy.

    `sequences` is replaced and its arrays are never changed (copy-on-write): a kernel that reads them in another thread
    has the pages and the lengths of one moment to its end, and a step of decoding copies nothing.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.counts = np.zeros(num_pages, np.int64)
        self.free = np.arange(num_pages)[
            ::-1
        ].copy()  # a stack: its first num_free are free, the last of them goes first
        self.num_free = num_pages
        self.sequences = Sequences(np.zeros(0, np.int64), np.zeros(0, np.int64), np.full((0, 1), -1))
        self.next_id = 0

    def rows(self, ids: Array) -> Array:
        """Find the rows of ids."""
        return self.sequences.rows(ids)

    def look(self, ids: Array | None) -> tuple[Array, Array]:
        """Return block table, as wide as the longest needs, and lengths of sequences, by default all, of one moment."""
        sequences = self.sequences
        rows = slice(None) if ids is None else sequences.rows(ids)
        lengths = sequences.lengths[rows]
        return sequences.table[rows, : -(-int(lengths.max(initial=0)) // self.page_size)], lengths

    def add(self, lengths: Array, table: Array) -> Array:
        """Add sequences, which name pages that others name already; `adopt` is for the rest."""
        ids = np.arange(self.next_id, self.next_id + len(lengths))
        self._widen(table.shape[1])
        now = self.sequences
        wide = np.full((len(lengths), now.table.shape[1]), -1)
        wide[:, : table.shape[1]] = table
        np.add.at(self.counts, wide[wide >= 0], 1)
        self.next_id += len(lengths)
        self.sequences = Sequences(
            np.concatenate([now.ids, ids]), np.concatenate([now.lengths, lengths]), np.concatenate([now.table, wide])
        )
        return ids

    def adopt(self, lengths: Array, table: Array) -> None:
        """Add sequences that name whatever pages they like, before there are others."""
        self.add(lengths, table)
        unused = np.flatnonzero(self.counts == 0)[::-1]
        self.num_free = len(unused)
        self.free[: self.num_free] = unused

    def grow(self, rows: Array, added: Array) -> Growth:
        """Plan the pages for so many more tokens of each row. Nothing changes yet."""
        _, lengths, table = self.sequences
        old = lengths[rows]
        first, filled = np.divmod(old, self.page_size)
        begun = filled > 0
        blocks = (filled + added + self.page_size - 1) // self.page_size
        pages = np.full((len(rows), int(blocks.max(initial=0))), -1)
        if begun.any():
            pages[begun, 0] = table[rows[begun], first[begun]]
        copied = self._must_copy(pages, filled, begun & (added > 0))
        fresh = int(blocks.sum() - np.count_nonzero(begun))
        needed = fresh + len(copied)
        if needed > self.num_free:
            why = f" ({len(copied)} of them to copy pages that are shared)" if len(copied) else ""
            raise CacheFullError(f"{needed} pages are needed{why} and {self.num_free} of {len(self.counts)} are free")
        taken = self.free[self.num_free - needed : self.num_free][::-1].copy()
        if fresh:
            block = np.arange(pages.shape[1])
            pages[(begun[:, None] <= block) & (block < blocks[:, None])] = taken[:fresh]
        shared = copies = taken[fresh:]
        if len(copied):
            shared = pages[copied, 0]
            pages[copied, 0] = copies
        self._widen(int((first + blocks).max(initial=0)))  # here, because it may run out of memory
        return Growth(rows, added, first, filled, pages, taken, shared, copies)

    def _must_copy(self, pages: Array, filled: Array, writes: Array) -> Array:
        """Say which sequences write to a page, their first, that others name too."""
        writers = np.flatnonzero(writes)
        written = pages[writers, 0] if writers.size else writers
        shared = self.counts[written] > 1
        if not shared.any():
            return writers[:0]
        writers, written = writers[shared], written[shared]
        # Where all who name a page write to it now, one of them needs no copy. It is the one that has filled most of
        # it: what it writes is of no account to the others, so that a failure half way leaves them as they were.
        order = np.argsort(-filled[writers], kind="stable")
        named, fullest, times = np.unique(written[order], return_index=True, return_counts=True)
        stays = order[fullest[times == self.counts[named]]]
        return np.delete(writers, stays)

    def commit(self, growth: Growth) -> None:
        """Make a growth true, after its tokens have been written."""
        self.num_free -= len(growth.taken)
        self.counts[growth.taken] = 1
        np.subtract.at(self.counts, growth.shared, 1)  # never to 0: see _must_copy
        ids, lengths, table = self.sequences
        if len(growth.taken):
            i, j = np.nonzero(growth.pages >= 0)
            table = table.copy()
            table[growth.rows[i], growth.first[i] + j] = growth.pages[i, j]
        lengths = lengths.copy()
        lengths[growth.rows] += growth.added
        self.sequences = Sequences(ids, lengths, table)

    def truncate(self, row: int, length: int) -> None:
        """Shorten a sequence."""
        ids, lengths, table = self.sequences
        first = -(-length // self.page_size)
        unused = table[row, first:]
        gone = unused[unused >= 0]
        if len(gone):
            table = table.copy()
            table[row, first:] = -1
        lengths = lengths.copy()
        lengths[row] = length
        self.sequences = Sequences(ids, lengths, table)
        self._release(gone)

    def remove(self, row: int) -> None:
        """Forget a sequence."""
        ids, lengths, table = self.sequences
        pages = table[row]
        self.sequences = Sequences(np.delete(ids, row), np.delete(lengths, row), np.delete(table, row, axis=0))
        self._release(pages[pages >= 0])

    def reorder(self, rows: Array, sources: Array) -> None:
        """Let each of the rows name what its source named, all at once."""
        ids, lengths, table = self.sequences
        gone, taken = table[rows], table[sources]
        np.add.at(self.counts, taken[taken >= 0], 1)
        changed, changed_lengths = table.copy(), lengths.copy()
        changed[rows], changed_lengths[rows] = taken, lengths[sources]
        self.sequences = Sequences(ids, changed_lengths, changed)
        self._release(gone[gone >= 0])

    def _release(self, pages: Array) -> None:
        np.subtract.at(self.counts, pages, 1)
        gone = np.unique(pages[self.counts[pages] == 0])[::-1]
        self.free[self.num_free : self.num_free + len(gone)] = gone
        self.num_free += len(gone)

    def _widen(self, blocks: int) -> None:
        ids, lengths, table = self.sequences
        width = table.shape[1]
        if blocks > width:
            more = max(blocks, 2 * width) - width  # doubled: growing by a token costs next to nothing on average
            self.sequences = Sequences(ids, lengths, np.pad(table, ((0, 0), (0, more)), constant_values=-1))
