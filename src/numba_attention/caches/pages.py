"""The page table of a paged cache: block tables, reference counts and the free list, without keys and values."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..errors import CacheFullError
from ..options import Array


class Growth(NamedTuple):
    """A planned extension of sequences: their tokens are written to the pages first, and then it is committed."""

    rows: Array  # (n,), rows of the sequences
    added: Array  # (n,), number of new tokens
    first: Array  # (n,), block of the first new token
    filled: Array  # (n,), number of tokens before them
    pages: Array  # (n, blocks), pages of the blocks from `first` on, -1 past the last block of each row
    taken: Array  # pages taken from the free list
    shared: Array  # pages that must be copied before they are written to, because another sequence shares them
    copies: Array  # pages that they are copied to


class Sequences(NamedTuple):
    """The live sequences, a row for each, in arrays that belong together."""

    ids: Array  # int64 (n,), ascending
    lengths: Array  # int64 (n,): tokens that pages hold, those that were dropped not counted
    table: Array  # int64 (n, at least as many as blocks in use), unused entries -1
    dropped: Array  # int64 (n,): tokens in the pages that the sequence has dropped, a multiple of the page size

    def rows(self, ids: Array) -> Array:
        """Return the rows of ids."""
        rows = np.searchsorted(self.ids, ids)
        is_known = (ids >= 0) & (np.append(self.ids, -1)[rows] == ids)
        if not is_known.all():
            raise KeyError(f"no sequence has the id {ids[~is_known][0]}: it was freed, or never added")
        return rows


class PageTable:
    """The live sequences, a row for each in order of id, and their pages.

    Any number of rows may list a page (`counts`); a page that no row lists is on the free list. A page is only ever
    written to past the tokens that other rows have in it; a row that would overwrite tokens of others writes to a copy.

    `sequences` is replaced as a whole, and its arrays are never changed (copy-on-write). So a kernel that reads them in
    another thread sees the pages and lengths of one moment until it ends, and a step of decoding copies nothing.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.counts = np.zeros(num_pages, np.int64)
        self.free = np.arange(num_pages)[
            ::-1
        ].copy()  # a stack: its first num_free entries are free, and the last of them is taken first
        self.num_free = num_pages
        none = np.zeros(0, np.int64)
        self.sequences = Sequences(none, none, np.full((0, 1), -1), none)
        self.next_id = 0

    def rows(self, ids: Array) -> Array:
        """Find the rows of ids."""
        return self.sequences.rows(ids)

    def look(self, ids: Array | None) -> tuple[Array, Array, Array]:
        """Return block table, lengths and dropped tokens of sequences, by default all, as they are at one moment."""
        sequences = self.sequences
        rows = slice(None) if ids is None else sequences.rows(ids)
        lengths = sequences.lengths[rows]
        table = sequences.table[rows, : -(-int(lengths.max(initial=0)) // self.page_size)]
        return table, lengths, sequences.dropped[rows]

    def add(self, lengths: Array, table: Array, dropped: Array | None = None) -> Array:
        """Add sequences that list only pages which other sequences list already; `adopt` has no such limit."""
        ids = np.arange(self.next_id, self.next_id + len(lengths))
        self._widen(table.shape[1])
        now = self.sequences
        wide = np.full((len(lengths), now.table.shape[1]), -1)
        wide[:, : table.shape[1]] = table
        np.add.at(self.counts, wide[wide >= 0], 1)
        self.next_id += len(lengths)
        self.sequences = Sequences(
            np.concatenate([now.ids, ids]),
            np.concatenate([now.lengths, lengths]),
            np.concatenate([now.table, wide]),
            np.concatenate([now.dropped, np.zeros(len(ids), np.int64) if dropped is None else dropped]),
        )
        return ids

    def adopt(self, lengths: Array, table: Array) -> None:
        """Add the first sequences, which may list any pages."""
        self.add(lengths, table)
        unused = np.flatnonzero(self.counts == 0)[::-1]
        self.num_free = len(unused)
        self.free[: self.num_free] = unused

    def grow(self, rows: Array, added: Array) -> Growth:
        """Plan the pages for `added` more tokens of each row, without changing anything."""
        _, lengths, table, _ = self.sequences
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
        self._widen(int((first + blocks).max(initial=0)))  # already here, because it may raise MemoryError
        return Growth(rows, added, first, filled, pages, taken, shared, copies)

    def _must_copy(self, pages: Array, filled: Array, writes: Array) -> Array:
        """Return which sequences must copy the first page that they write to, because others list it too."""
        writers = np.flatnonzero(writes)
        written = pages[writers, 0] if writers.size else writers
        shared = self.counts[written] > 1
        if not shared.any():
            return writers[:0]
        writers, written = writers[shared], written[shared]
        # If all sequences that list a page write to it now, one of them needs no copy: the one that has most tokens in
        # it. It writes past the tokens of all others, so a failure half-way leaves them as they were.
        order = np.argsort(-filled[writers], kind="stable")
        named, fullest, times = np.unique(written[order], return_index=True, return_counts=True)
        stays = order[fullest[times == self.counts[named]]]
        return np.delete(writers, stays)

    def commit(self, growth: Growth) -> None:
        """Apply a planned extension, after its tokens have been written."""
        self.num_free -= len(growth.taken)
        self.counts[growth.taken] = 1
        np.subtract.at(self.counts, growth.shared, 1)  # a count never becomes 0 here: see _must_copy
        ids, lengths, table, dropped = self.sequences
        if len(growth.taken):
            i, j = np.nonzero(growth.pages >= 0)
            table = table.copy()
            table[growth.rows[i], growth.first[i] + j] = growth.pages[i, j]
        lengths = lengths.copy()
        lengths[growth.rows] += growth.added
        self.sequences = Sequences(ids, lengths, table, dropped)

    def drop(self, rows: Array, first: int, dropped: Array, lengths: Array) -> Callable[[], None]:
        """Release the oldest pages of rows, those after their first blocks; return a function that undoes it.

        Parameters
        ----------
        rows : ndarray, shape (n,)
        first : int
            Blocks that stay.
        dropped, lengths : ndarray, shape (n,)
            The new values of these fields.
        """
        before, num_free = self.sequences, self.num_free
        ids, all_lengths, table, all_dropped = before
        blocks = (dropped - all_dropped[rows]) // self.page_size
        changed, all_lengths, all_dropped = table.copy(), all_lengths.copy(), all_dropped.copy()
        released = []
        for row, count in zip(rows.tolist(), blocks.tolist(), strict=True):
            if count:
                released.append(table[row, first : first + count])
                rest = table[row, first + count :]
                changed[row, first : first + len(rest)] = rest
                changed[row, first + len(rest) :] = -1
        all_lengths[rows], all_dropped[rows] = lengths, dropped
        unused = np.concatenate([*released, np.zeros(0, np.int64)])
        unused = unused[unused >= 0]
        self.sequences = Sequences(ids, all_lengths, changed, all_dropped)
        self._release(unused)

        def undo() -> None:
            self.sequences, self.num_free = before, num_free  # released pages lie above it in the stack
            np.add.at(self.counts, unused, 1)

        return undo

    def truncate(self, row: int, length: int, dropped: int = 0) -> None:
        """Shorten a sequence to so many tokens in pages."""
        ids, lengths, table, all_dropped = self.sequences
        first = -(-length // self.page_size)
        unused = table[row, first:]
        released = unused[unused >= 0]
        if len(released):
            table = table.copy()
            table[row, first:] = -1
        lengths, all_dropped = lengths.copy(), all_dropped.copy()
        lengths[row], all_dropped[row] = length, dropped
        self.sequences = Sequences(ids, lengths, table, all_dropped)
        self._release(released)

    def remove(self, row: int) -> None:
        """Remove a sequence."""
        now = self.sequences
        pages = now.table[row]
        self.sequences = Sequences(*(np.delete(x, row, axis=0) for x in now))
        self._release(pages[pages >= 0])

    def reorder(self, rows: Array, sources: Array) -> None:
        """Let each row list the pages that its source lists, for all rows at once."""
        ids, lengths, table, dropped = self.sequences
        released, taken = table[rows], table[sources]
        np.add.at(self.counts, taken[taken >= 0], 1)
        changed, changed_lengths, changed_dropped = table.copy(), lengths.copy(), dropped.copy()
        changed[rows], changed_lengths[rows], changed_dropped[rows] = taken, lengths[sources], dropped[sources]
        self.sequences = Sequences(ids, changed_lengths, changed, changed_dropped)
        self._release(released[released >= 0])

    def _release(self, pages: Array) -> None:
        np.subtract.at(self.counts, pages, 1)
        released = np.unique(pages[self.counts[pages] == 0])[::-1]
        self.free[self.num_free : self.num_free + len(released)] = released
        self.num_free += len(released)

    def _widen(self, blocks: int) -> None:
        ids, lengths, table, dropped = self.sequences
        width = table.shape[1]
        if blocks > width:
            more = max(blocks, 2 * width) - width  # doubling makes appending a token cheap on average
            table = np.pad(table, ((0, 0), (0, more)), constant_values=-1)
            self.sequences = Sequences(ids, lengths, table, dropped)
