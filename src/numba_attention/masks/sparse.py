"""`BlockMask` from and to the sparse matrices of SciPy, which is imported when one is used."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import kind_of
from ..options import Array
from . import runs
from .checks import as_sizes
from .runs import EMPTY, FULL, TILE, Runs


def runs_of(matrix: Any, shape: Any, block_size: Any) -> tuple[tuple[int, int], Runs]:
    """Sizes and runs of a sparse matrix; see `BlockMask.from_sparse`."""
    import scipy.sparse

    is_sparse: bool = scipy.sparse.issparse(matrix)
    if not is_sparse:
        raise TypeError(f"matrix must be a sparse array or matrix of SciPy, got {kind_of(matrix)}")
    if matrix.ndim != 2:
        raise ValueError(f"matrix must have two axes, got shape {matrix.shape}")
    matrix = matrix.tocsr()  # sorts COO and CSC by rows, and takes the blocks of BSR apart
    if matrix.dtype != np.bool_ or not matrix.data.all():
        matrix = matrix != 0
    block = _block(block_size)
    most = matrix.shape[0] * block[0], matrix.shape[1] * block[1]
    size = most if shape is None else _checked(shape, most, block)
    if block[0] % TILE == 0 and block[1] % TILE == 0:
        return size, _of_tiles(matrix, size, block)
    entries = matrix.tocoo()
    if block == (1, 1):
        return size, _of_elements(entries.row.astype(np.int64), entries.col.astype(np.int64), size)
    return size, runs.from_bands(_bands(matrix, size, block), runs.tiles_over(size[0]), size[1])


def _block(block_size: Any) -> tuple[int, int]:
    if block_size is None:
        return (1, 1)
    pair = block_size if isinstance(block_size, tuple | list) else (block_size, block_size)
    whole = [isinstance(n, int | np.integer) and not isinstance(n, bool) for n in pair]
    if len(pair) != 2 or not all(whole):
        raise TypeError(f"block_size must be an int or a pair of int, got {block_size!r}")
    if min(pair) < 1:
        raise ValueError(f"block_size must be positive, got {block_size!r}")
    return int(pair[0]), int(pair[1])


def _checked(shape: Any, most: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Check a shape against the whole blocks that the matrix has."""
    L, S = as_sizes(shape)
    if not all(m - b < n <= m or n == m for n, m, b in zip((L, S), most, block, strict=True)):
        of = f"{most[0] // block[0]} x {most[1] // block[1]} blocks of {block[0]} x {block[1]}"
        raise ValueError(f"shape {(L, S)} does not fit a matrix of {of}, {most}")
    return L, S


def _of_tiles(matrix: Any, size: tuple[int, int], block: tuple[int, int]) -> Runs:
    """Runs of a matrix whose entries are whole tiles."""
    rows, columns = (runs.tiles_over(n) for n in size)
    down, across = block[0] // TILE, block[1] // TILE
    matrix.sort_indices()
    count = np.diff(matrix.indptr)
    row, begin = np.repeat(np.arange(len(count)), count), matrix.indices.astype(np.int64) * across
    # Entries become runs that show everything, and gaps before them runs that show nothing.
    all_rows = np.concatenate([row, row, np.arange(len(count))])
    ends = np.concatenate([begin + across, begin, np.full(len(count), columns)])
    ids = np.concatenate([np.full(len(row), FULL), np.full(len(row) + len(count), EMPTY)]).astype(np.int32)
    ends = np.minimum(ends, columns)
    order = np.lexsort((ids == EMPTY, ends, all_rows))
    all_rows, ends, ids = all_rows[order], ends[order], ids[order]
    keep = ends > 0
    keep[1:] &= (all_rows[1:] != all_rows[:-1]) | (ends[1:] != ends[:-1])
    of_blocks = runs.tidy(all_rows[keep], ends[keep], ids[keep], runs.SPECIAL, len(count))
    return runs.take(of_blocks, np.arange(rows) // down, 0, columns)


def _of_elements(i: Array, j: Array, size: tuple[int, int]) -> Runs:
    """Runs of a matrix of single elements."""
    L, S = size
    rows, columns = runs.tiles_over(L), runs.tiles_over(S)
    where = ((i // TILE) * columns + j // TILE) * TILE + j % TILE  # the word of each element
    order = np.argsort(where, kind="stable")
    where, first = np.unique(where[order], return_index=True)
    bits = np.uint64(1) << (i[order] % TILE).astype(np.uint64)
    tile, number = np.unique(where // TILE, return_inverse=True)
    words = np.zeros((len(tile), TILE), np.uint64)
    if len(where):
        words[number, where % TILE] = np.bitwise_or.reduceat(bits, first)
    row, column = np.divmod(tile, max(columns, 1))
    words = runs.repeat_edge(words, runs.inside(L)[row], runs.inside(S)[column])
    return runs.from_tiles(row, column, words, rows, columns)


def _bands(matrix: Any, size: tuple[int, int], block: tuple[int, int]) -> Iterator[tuple[int, Array]]:
    """Rows of tiles of a matrix of blocks of any size, as arrays of bool."""
    L, S = size
    for first in range(runs.tiles_over(L)):
        i = np.minimum(np.arange(first * TILE, (first + 1) * TILE), L - 1)
        low, high = i[0] // block[0], i[-1] // block[0] + 1
        wide = np.repeat(matrix[low:high].toarray(), block[1], axis=1)[:, :S]
        yield first, wide[i // block[0] - low]


def matrix_of(all_runs: Runs, size: tuple[int, int]) -> Any:
    """Return the sparse array of a mask of one head."""
    import scipy.sparse

    L, S = size
    rows, columns = runs.tiles_over(L), runs.tiles_over(S)
    length = (all_runs.ends - runs.begins_of(all_runs)).astype(np.int64)
    shown = np.repeat(np.where(all_runs.ids == EMPTY, -1, all_runs.ids), length)
    row_of, column_of = np.divmod(np.flatnonzero(shown >= 0), max(columns, 1))
    ids = shown[shown >= 0]
    i, j = [], []
    for part in range(0, len(ids), runs.CHUNK):
        where = slice(part, part + runs.CHUNK)
        distinct, number = np.unique(ids[where], return_inverse=True)
        tile, key, query = np.nonzero(runs.unpack(all_runs.tiles[distinct])[number])
        i.append(row_of[where][tile] * TILE + query)
        j.append(column_of[where][tile] * TILE + key)
    row, column = (np.concatenate(x) if x else np.zeros(0, np.int64) for x in (i, j))
    inside = (row < L) & (column < S)
    row, column = row[inside], column[inside]
    assert rows * columns == len(shown)
    return scipy.sparse.csr_array((np.ones(len(row), bool), (row, column)), shape=size)
