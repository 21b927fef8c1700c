"""How a mask is kept and compared, and what a call asks of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Self

import numpy as np

from ..options import Array
from . import runs
from .runs import TILE, Runs

KINDS = 8  # of calls, for which a mask keeps what was made of it


class StoredMask:
    """Distinct boolean matrices as runs of tiles, and which of them each head of each sequence has."""

    # `_planes` (batch, heads) says which of the distinct matrices in `_runs` each head of each sequence has.
    _planes: Array
    _runs: Runs
    _size: tuple[int, int]

    @classmethod
    def of_runs(cls, planes: Array, all_runs: Runs, size: tuple[int, int]) -> Self:
        """Make a mask of runs, for which `planes` says the matrix of each head of each sequence. Not for callers."""
        mask = object.__new__(cls)
        mask._set(planes, all_runs, size)
        return mask

    def _set(self, planes: Array, all_runs: Runs, size: tuple[int, int]) -> None:
        """Keep each distinct matrix once, in the order in which the heads of all sequences name them."""
        rows, columns = (runs.tiles_over(n) for n in size)
        used, first, where = np.unique(planes.ravel(), return_index=True, return_inverse=True)
        seen: dict[Any, int] = {}
        kept: list[int] = []
        number = np.zeros(len(used), np.int64)
        for n in np.argsort(first):
            of_rows = slice(used[n] * rows, (used[n] + 1) * rows + 1)
            starts = all_runs.starts[of_rows]
            part = slice(starts[0], starts[-1])
            key = (starts - starts[0]).tobytes(), all_runs.ends[part].tobytes(), all_runs.ids[part].tobytes()
            if key not in seen:
                seen[key] = len(kept)
                kept.append(int(used[n]))
            number[n] = seen[key]
        if kept != list(range((len(all_runs.starts) - 1) // max(rows, 1))):
            which = np.array(kept, np.int64).reshape(-1, 1) * rows + np.arange(rows)
            all_runs = runs.take(all_runs, which.ravel(), 0, columns)
        self._planes, self._runs, self._size = number[where].reshape(planes.shape), all_runs, size
        for array in (self._planes, *all_runs):
            array.flags.writeable = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self._planes.shape, *self._size)

    @property
    def ndim(self) -> int:
        return self._planes.ndim + 2

    @property
    def nbytes(self) -> int:
        return int(self._planes.nbytes + sum(array.nbytes for array in self._runs))

    @property
    def density(self) -> float:
        full, partial = self._counts
        return (full + partial) / max(1, self._planes.size * self._tiles[0] * self._tiles[1])

    @property
    def _tiles(self) -> tuple[int, int]:
        L, S = self._size
        return runs.tiles_over(L), runs.tiles_over(S)

    @property
    def _distinct(self) -> int:
        """How many distinct matrices there are."""
        return int(self._planes.max(initial=-1)) + 1

    @cached_property
    def _counts(self) -> tuple[int, int]:
        """Full and partial tiles of all heads of all sequences."""
        full, partial = (
            int(count[self._planes].sum()) for count in runs.counts(self._runs, self._distinct, self._tiles[0])
        )
        return full, partial

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """What was made of this mask for calls, by what it depends on. See `keep`."""
        return {}

    def keep(self, key: Any, value: Any) -> None:
        """Keep what was made of this mask for the next calls; only that of the last few kinds of calls is kept."""
        self.kept[key] = value
        for oldest in list(self.kept)[:-KINDS]:  # a list, as other threads may change the dictionary
            self.kept.pop(oldest, None)

    @cached_property
    def token(self) -> object:
        """What tells this mask from all others in this process, also from equal ones: a key that does not keep it."""
        return object()

    @cached_property
    def digest(self) -> bytes:
        """A digest of the content: equal masks have equal ones, in every process."""
        digest = hashlib.sha256(repr(self.shape).encode())
        for array in (self._planes, *self._runs):
            digest.update(np.ascontiguousarray(array).data)
        return digest.digest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StoredMask):
            return NotImplemented
        pairs = zip((self._planes, *self._runs), (other._planes, *other._runs), strict=True)
        return self.shape == other.shape and all(np.array_equal(x, y) for x, y in pairs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self._planes, tuple(self._runs), self._size)

    # In a call.

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it broadcasts to (..., heads, L, S)."""
        lead = self._planes.shape
        extra = len(lead) - (len(shape) - 2)
        pairs = zip(lead[::-1], shape[-3::-1], strict=False)
        return self._size == shape[-2:] and set(lead[: max(extra, 0)]) <= {1} and all(n in (1, m) for n, m in pairs)

    def fitting(self, shape: tuple[int, ...], more: str = "") -> Self:
        """Return it if it broadcasts to (..., heads, L, S); the error says both shapes."""
        if not self.fits(shape):
            either = "neither" if more else "not"
            raise ValueError(f"mask, a BlockMask of shape {self.shape}, does {either} broadcast to {shape}{more}")
        return self

    def planes_over(self, shape: tuple[int, ...]) -> Array:
        """Return which of the distinct matrices each head of a call has, of shape (..., heads)."""
        extra = max(0, self._planes.ndim - len(shape))
        return np.broadcast_to(self._planes.reshape(self._planes.shape[extra:]), shape)

    def of_sequences(self, query_starts: Array, query_rows: Array, key_starts: Array, key_rows: Array) -> Self:
        """Return the parts of the sequences of a packed call, one after another, all of the longest shape."""
        places = query_starts, query_rows, key_starts, key_rows
        key = "sequences", *(x.tobytes() for x in places)
        result: Self | None = self.kept.get(key)
        if result is None:
            size = int(query_rows.max(initial=0)), int(key_rows.max(initial=0))
            parts = []
            for row, n, column, m in zip(*places, strict=True):
                i = row + np.minimum(np.arange(size[0]), max(n - 1, 0))
                j = column + np.minimum(np.arange(size[1]), max(m - 1, 0))
                shown = n > 0 and m > 0
                parts.append(self._by_bits(i if shown else np.zeros_like(i), j if shown else np.zeros_like(j)))
            planes = np.arange(len(parts))[:, None] * self._distinct + self._planes.reshape(1, -1)
            result = self.of_runs(planes, runs.joined_rows(parts), size)
            self.keep(key, result)
        return result

    def _by_bits(self, i: Array, j: Array) -> Runs:
        rows, new_rows = self._tiles[0], runs.tiles_over(len(i))

        def bands() -> Iterator[tuple[int, Array]]:
            for plane in range(self._distinct):
                for first, last in runs.bands(new_rows, max(len(j), self._size[1])):
                    row = i[np.minimum(np.arange(first * TILE, last * TILE), len(i) - 1)]
                    tiles, where = np.unique(row // TILE, return_inverse=True)
                    part = runs.take(self._runs, plane * rows + tiles, 0, self._tiles[1])
                    shown = runs.dense(part, 0, len(tiles), self._tiles[1])
                    yield plane * new_rows + first, shown[where * TILE + row % TILE][:, j].astype(bool)

        return runs.from_bands(bands(), self._distinct * new_rows, len(j))


def _rebuilt(kind: type[StoredMask], planes: Array, parts: tuple[Array, ...], size: tuple[int, int]) -> StoredMask:
    return kind.of_runs(planes, Runs(*parts), size)
