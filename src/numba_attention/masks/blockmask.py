"""`BlockMask`: a mask over long sequences that is stored by tiles, of which kernels visit those that show something."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..mods.language import MASK
from ..mods.rules import as_arguments, plain, vectorized
from ..options import Array
from ..validation import as_bools, as_ints
from . import picture, runs
from .checks import as_count, as_integer, as_positions, as_sizes, whole_tiles
from .runs import TILE, Runs
from .stored import StoredMask


class BlockMask(StoredMask):
    """Which query may attend to which key, stored by tiles of 64 x 64 positions: passed as ``mask=``.

    Kernels visit only tiles in which something is visible, and test single pairs only in tiles in which something is
    hidden, so that a mask of which a tenth of the tiles is visible takes about a tenth of the time, forward and
    backward. Equal tiles are stored once, and runs of them take a few bytes.

    Parameters
    ----------
    mask_mod : callable
        ``mask_mod(batch, head, i, j, *mod_args) -> bool``: whether query i may attend to key j.
    shape : (L, S)
        Numbers of queries and of keys.
    batch, heads : int, optional
        Numbers of sequences and of query heads; None means that all have the same mask, an axis of length 1.
    mod_args : tuple of array or number
        Handed to `mask_mod` after j.

    Attributes
    ----------
    shape : tuple of int
        (batch or 1, heads or 1, L, S), or more leading dimensions where `from_array` was given them.
    density : float
        Share of the tiles in which something is visible, from 0 to 1: of the work of dense attention, so much is done.
    nbytes : int
        Bytes that the mask takes.
    T : BlockMask
        Its transpose, from keys to queries.

    Raises
    ------
    TypeError, ValueError
        The message names the argument, and says what was expected.

    See Also
    --------
    BlockMask.from_array, BlockMask.from_sparse, BlockMask.causal, BlockMask.window, BlockMask.documents

    Notes
    -----
    Masks combine with ``&``, ``|`` and ``~``, compare with ``==``, are hashable and pickle. Indexing is that of an
    array of shape `shape`: ``mask[b, h, rows, columns]``. Query i and key j of a mask are row i of `query` and row j of
    `key`, whatever `query_offset` says of positions. A mask and options that hide keys, as `is_causal` and
    `key_lengths`, both apply.

    References
    ----------
    .. [1] Child et al., "Generating Long Sequences with Sparse Transformers", 2019.
    .. [2] Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels", 2024,
       section 4.1 (block masks).

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> mask = na.BlockMask.documents([200, 312]) & na.BlockMask.causal(512, 512)
    >>> mask
    BlockMask(shape=(1, 1, 512, 512), density=37.5 %, 9 full + 15 partial of 64 tiles, 3.3 KiB)
    ▒
    █▒
    ██▒
    ▒▒▒▒
       ▒▒
       ▒█▒
       ▒██▒
       ▒███▒
    >>> q = np.random.default_rng(0).standard_normal((1, 8, 512, 64), dtype=np.float32)
    >>> out = na.attention(q, q, q, mask=mask)
    >>> bool(np.allclose(out, na.attention(q, q, q, mask=mask.to_dense()), atol=1e-6))
    True
    """

    def __init__(
        self,
        mask_mod: Callable[..., Any],
        shape: tuple[int, int],
        *,
        batch: int | None = None,
        heads: int | None = None,
        mod_args: tuple[Any, ...] = (),
    ) -> None:
        L, S = as_sizes(shape)
        lead = tuple(1 if n is None else as_count(name, n) for name, n in (("batch", batch), ("heads", heads)))
        function, values = plain(mask_mod, MASK), as_arguments(mod_args)
        try:
            from .evaluate import runs_of
        except ImportError:  # nothing can be compiled without Numba
            result = _runs_in_numpy(function, values, (L, S), lead)
        else:
            try:
                result = runs_of(function, values, (L, S), *lead)
            except runs.TooManyTiles as error:
                raise ValueError(
                    f"mask_mod makes {error} of {TILE} x {TILE} positions over {L} x {S}: it is no mask by blocks; "
                    "pass it as mask_mod=, or an array of bool as mask="
                ) from None
        self._set(np.arange(math.prod(lead)).reshape(lead), result, (L, S))

    # Constructors.

    @classmethod
    def from_array(cls, mask: ArrayLike) -> BlockMask:
        """Make the mask of an array of bool, True where a query may attend to a key.

        Parameters
        ----------
        mask : array of bool, shape (..., L, S)
            Of any strides; axes along which it was broadcast are not expanded.

        Returns
        -------
        BlockMask
            Of the shape of `mask`, with axes of length 1 in front of two or three dimensions.

        Raises
        ------
        TypeError, ValueError
            `mask` is not boolean, or has fewer than two axes.

        Examples
        --------
        >>> import numpy as np, numba_attention as na
        >>> na.BlockMask.from_array(np.tri(128, dtype=bool)).shape
        (1, 1, 128, 128)
        """
        array = as_bools("mask", mask)
        if array.ndim < 2:
            raise ValueError(f"mask must have shape (..., L, S), got {array.shape}")
        array = array[(None,) * (4 - array.ndim)]
        lead, (L, S) = array.shape[:-2], array.shape[-2:]
        stored = array[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides[:-2])]
        planes = np.arange(math.prod(stored.shape[:-2])).reshape(stored.shape[:-2])
        rows = runs.tiles_over(L)

        def bands() -> Iterator[tuple[int, Array]]:
            for plane, index in enumerate(np.ndindex(stored.shape[:-2])):
                for first, last in runs.bands(rows, S):
                    i = np.minimum(np.arange(first * TILE, last * TILE), L - 1)
                    part = stored[index]
                    yield plane * rows + first, part[first * TILE : L] if len(i) == L - first * TILE else part[i]

        return cls.of_runs(np.broadcast_to(planes, lead), runs.from_bands(bands(), planes.size * rows, S), (L, S))

    @classmethod
    def from_sparse(
        cls,
        matrix: Any,
        shape: tuple[int, int] | None = None,
        block_size: int | tuple[int, int] | None = None,
    ) -> BlockMask:
        """Make the mask of a sparse matrix of SciPy: a query may attend to the keys that are not 0 in its row.

        Parameters
        ----------
        matrix : scipy.sparse array or matrix
            In any format; from BSR, CSR, CSC and COO the conversion is quickest.
        shape : (L, S), optional
            Numbers of queries and keys, by default those of the matrix. With `block_size` they may end inside of the
            last blocks.
        block_size : int or (int, int), optional
            If given, each entry of the matrix stands for a block of so many queries and keys.

        Returns
        -------
        BlockMask
            Of shape (1, 1, L, S).

        Raises
        ------
        TypeError, ValueError
            `matrix` is no sparse matrix of two axes, or a size does not fit it.

        Examples
        --------
        >>> import numpy as np, scipy.sparse as sp, numba_attention as na
        >>> blocks = sp.csr_array(np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]]))
        >>> na.BlockMask.from_sparse(blocks, block_size=128)
        BlockMask(shape=(1, 1, 384, 384), density=55.6 %, 20 full + 0 partial of 36 tiles, 1.2 KiB)
        ██
        ██
        ████
        ████
        ██  ██
        ██  ██
        """
        from . import sparse

        (L, S), result = sparse.runs_of(matrix, shape, block_size)
        return cls.of_runs(np.zeros((1, 1), np.int64), result, (L, S))

    @classmethod
    def causal(cls, L: int, S: int, offset: int = 0) -> BlockMask:
        """Make the causal mask: query i may attend to keys up to ``i + offset``.

        Parameters
        ----------
        L, S : int
            Numbers of queries and of keys.
        offset : int
            Position of the first query among the keys; ``S - L`` aligns the ends.

        Returns
        -------
        BlockMask
            Of shape (1, 1, L, S).

        Examples
        --------
        >>> import numba_attention as na
        >>> na.BlockMask.causal(8192, 8192)
        BlockMask(shape=(1, 1, 8192, 8192), density=50.4 %, 8128 full + 128 partial of 16384 tiles, 5.5 KiB)
        ▒░
        ██▒░
        ████▒░
        ██████▒░
        ████████▒░
        ██████████▒░
        ████████████▒░
        ██████████████▒░
        ████████████████▒░
        ██████████████████▒░
        ████████████████████▒░
        ██████████████████████▒░
        ████████████████████████▒░
        ██████████████████████████▒░
        ████████████████████████████▒░
        ██████████████████████████████▒░
        """
        L, S = as_sizes((L, S))
        first = min(max(as_integer("offset", offset), -L), S)  # further out, it hides everything or nothing
        return cls._of_intervals(np.zeros(L, np.int64), np.arange(L) + first + 1, S)

    @classmethod
    def window(cls, L: int, S: int, left: int | None, right: int | None) -> BlockMask:
        """Make the mask of a sliding window: query i may attend to keys ``i - left`` to ``i + right``.

        Parameters
        ----------
        L, S : int
            Numbers of queries and of keys.
        left, right : int or None
            None is unbounded.

        Returns
        -------
        BlockMask
            Of shape (1, 1, L, S).

        Examples
        --------
        >>> import numba_attention as na
        >>> na.BlockMask.window(8192, 8192, 512, 0).density < 0.08
        True
        """
        L, S = as_sizes((L, S))
        before = L if left is None else as_integer("left", left)
        after = S if right is None else as_integer("right", right)
        for name, reach in (("left", before), ("right", after)):
            if reach < 0:
                raise ValueError(f"{name} must not be negative, got {reach}")
        i = np.arange(L)
        return cls._of_intervals(i - min(before, L), i + min(after, S) + 1, S)

    @classmethod
    def documents(cls, lengths: ArrayLike) -> BlockMask:
        """Make the mask of documents laid end to end: each query may attend to the keys of its own document.

        Parameters
        ----------
        lengths : array of int, shape (n,)
            Of the documents; their sum is the number of queries and of keys.

        Returns
        -------
        BlockMask
            Of shape (1, 1, L, L).

        See Also
        --------
        numba_attention.attention_varlen : takes such sequences without a mask, and reads offsets instead.

        Examples
        --------
        >>> import numba_attention as na
        >>> mask = na.BlockMask.documents([3, 5]) & na.BlockMask.causal(8, 8)
        >>> mask.to_dense()[0, 0, :5].astype(int)
        array([[1, 0, 0, 0, 0, 0, 0, 0],
               [1, 1, 0, 0, 0, 0, 0, 0],
               [1, 1, 1, 0, 0, 0, 0, 0],
               [0, 0, 0, 1, 0, 0, 0, 0],
               [0, 0, 0, 1, 1, 0, 0, 0]])
        """
        count = as_ints("lengths", lengths)
        if count.ndim != 1 or (count < 0).any():
            raise ValueError(f"lengths must be one axis of numbers that are not negative, got shape {count.shape}")
        if (total := sum(count.tolist())) > 2**31:
            raise ValueError(f"lengths must sum to at most 2**31, got {total}")
        stops = np.repeat(np.cumsum(count), count)
        return cls._of_intervals(stops - np.repeat(count, count), stops, len(stops))

    @classmethod
    def _of_intervals(cls, starts: Array, stops: Array, S: int) -> BlockMask:
        starts, stops = np.clip(starts, 0, S), np.clip(stops, 0, S)
        return cls.of_runs(np.zeros((1, 1), np.int64), runs.from_intervals(starts, stops, S), (len(starts), S))

    @property
    def T(self) -> BlockMask:
        (rows, columns), (L, S) = self._tiles, self._size
        return self.of_runs(self._planes, runs.transpose(self._runs, self._distinct, rows, columns), (S, L))

    def __repr__(self) -> str:
        return "\n".join([self._line(), *picture.text(self._runs, self._tiles)])

    def _line(self) -> str:
        full, partial = self._counts
        tiles = self._planes.size * self._tiles[0] * self._tiles[1]
        return (
            f"BlockMask(shape={self.shape}, density={100 * self.density:.1f} %, {full} full + {partial} partial "
            f"of {tiles} tiles, {_bytes(self.nbytes)})"
        )

    def _repr_html_(self) -> str:
        return picture.svg(self._runs, self._tiles, self._line())

    # Operations.

    __array_ufunc__ = None  # an operation with an array is a TypeError, and not one for each of its elements

    def __and__(self, other: BlockMask) -> BlockMask:
        return self._combined(other, "&", np.bitwise_and)

    def __or__(self, other: BlockMask) -> BlockMask:
        return self._combined(other, "|", np.bitwise_or)

    __rand__, __ror__ = __and__, __or__  # for the error that says what to do with an array on the left

    def __invert__(self) -> BlockMask:
        return self.of_runs(self._planes, runs.complement(self._runs), self._size)

    def _combined(self, other: BlockMask, sign: str, operation: Any) -> BlockMask:
        if isinstance(other, np.ndarray):
            raise TypeError(f"{sign} joins a BlockMask with another one; make one with BlockMask.from_array(array)")
        if not isinstance(other, BlockMask):
            return NotImplemented
        try:
            lead = np.broadcast_shapes(self._planes.shape, other._planes.shape)
        except ValueError:
            lead = None
        if self._size != other._size or lead is None:
            raise ValueError(f"shapes of {sign} do not broadcast: {self.shape} and {other.shape}")
        both = [np.broadcast_to(mask._planes, lead).ravel() for mask in (self, other)]
        pairs, where = np.unique(np.stack(both, axis=1), axis=0, return_inverse=True)
        rows, columns = self._tiles
        result = runs.combine(self._runs, other._runs, pairs, rows, columns, operation)
        return self.of_runs(where.reshape(lead), result, self._size)

    def __getitem__(self, index: Any) -> BlockMask:
        """Index as an array of shape `shape`, with slices or integer arrays for queries and keys.

        Axes of length 1 are put in front where fewer than four are left. Slices of queries and keys that begin and end
        at multiples of 64 (or at the end) take whole tiles; others are taken bit by bit.
        """
        index = index if isinstance(index, tuple) else (index,)
        if any(x is None or isinstance(x, bool | np.bool_) for x in index) or sum(x is Ellipsis for x in index) > 1:
            raise IndexError("a BlockMask takes integers, slices, arrays and one ... as an index")
        where = next((n for n, x in enumerate(index) if x is Ellipsis), len(index))
        given = [x for x in index if x is not Ellipsis]
        index = *given[:where], *(slice(None),) * (self.ndim - len(given)), *given[where:]
        if len(index) > self.ndim:
            raise IndexError(f"too many indices: a BlockMask of shape {self.shape} has {self.ndim} axes")
        planes = self._planes[index[:-2]]
        planes = planes.reshape((1,) * (2 - planes.ndim) + planes.shape)
        chosen = [
            as_positions(name, x, n) for name, x, n in zip(("queries", "keys"), index[-2:], self._size, strict=True)
        ]
        size = len(chosen[0]), len(chosen[1])
        spans = [whole_tiles(x, n) for x, n in zip(chosen, self._size, strict=True)]
        rows = self._tiles[0]
        if spans[0] is not None and spans[1] is not None:
            which = (np.arange(self._distinct)[:, None] * rows + np.arange(*spans[0])).ravel()
            return self.of_runs(planes, runs.take(self._runs, which, *spans[1]), size)
        return self.of_runs(planes, self._by_bits(*chosen), size)

    # Other forms.

    def to_dense(self) -> Array:
        """Return the mask as an array of bool.

        Returns
        -------
        ndarray of bool, shape `shape`
            True where a query may attend to a key.
        """
        (rows, columns), (L, S) = self._tiles, self._size
        planes = np.empty((self._distinct, L, S), bool)
        for plane in range(self._distinct):
            for first, last in runs.bands(rows, S):
                band = runs.dense(self._runs, plane * rows + first, plane * rows + last, columns)
                planes[plane, first * TILE : last * TILE] = band[: L - first * TILE, :S]
        return planes[self._planes]

    def to_sparse(self) -> Any:
        """Return the mask of one head as a sparse array of SciPy.

        Returns
        -------
        scipy.sparse.csr_array of bool, shape (L, S)
            It has an element for each visible pair.

        Raises
        ------
        ValueError
            There is more than one mask: choose one with ``mask[b, h]``.
        """
        from . import sparse

        if self._planes.size != 1:
            raise ValueError(f"a mask of shape {self.shape} is no matrix: choose one with mask[b, h]")
        return sparse.matrix_of(self._runs, self._size)


def _runs_in_numpy(function: Any, values: tuple[Any, ...], size: tuple[int, int], lead: tuple[int, ...]) -> Runs:
    """The runs of a `mask_mod`, element by element."""
    visible, (L, S) = vectorized(MASK, function, values), size
    rows = runs.tiles_over(L)

    def bands() -> Iterator[tuple[int, Array]]:
        for plane, (b, h) in enumerate(np.ndindex(lead)):
            for first, last in runs.bands(rows, S):
                i = np.minimum(np.arange(first * TILE, last * TILE), L - 1)[:, None]
                yield plane * rows + first, visible(b, h, i, np.arange(S))

    return runs.from_bands(bands() if S else [], math.prod(lead) * rows, S)


def _bytes(n: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1000:
            return f"{n:.1f} {unit}" if unit != "B" and n < 100 else f"{n:.0f} {unit}"
        n = n / 1024  # type: ignore[assignment]
    return f"{n:.1f} GiB"
