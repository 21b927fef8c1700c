"""Storage formats of a cache: numbers as they are, rounded to fewer bits, or 8-bit codes with a scale for each row."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..device.headers import held, strided
from ..narrowing import FEW, ROOT, largest, saturated, surely_fits
from ..options import Array

Arrays = tuple[Array, Array, Array | None, Array | None]  # keys, values, and the scales of each or None
_LIMITS = {"int8": 127.0, "float8_e4m3fn": 448.0}  # largest code of the formats that need a scale
SCALED = tuple(_LIMITS)
_SHORT = ("float16", "bfloat16", *SCALED)
_TINY = np.finfo(np.float32).tiny
_MOST = float(np.finfo(np.float32).max) * (1 - 2**-22)
_LINE = 64  # bytes of a cache line, and of the widest vector
_BLOCK = 2**16  # numbers that are encoded at a time, so that temporaries stay in the second-level cache


@dataclass(frozen=True)
class Storage:
    """A storage format."""

    on_device: ClassVar[bool] = False  # whether arrays are headers of memory of a GPU: `DeviceStorage`

    name: str
    dtype: np.dtype[Any]  # of stored numbers or codes
    limit: float | None  # largest code, if each token and head has a scale
    square: float = 0.0  # square of the largest number of the format; 0 if there are scales

    def allocate(self, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
        """Allocate uninitialised codes for numbers of `shape`, and their scales or None."""
        codes = aligned_empty(shape, self.dtype)
        return codes, None if self.limit is None else aligned_empty(shape[:-1], np.dtype(np.float32))

    def holds(self, x: Array) -> bool:
        """Whether a few float32 or float64 numbers are certainly in the range of a format without scales, in 0.6 us."""
        # Comparisons with NaN, and with squares that overflow, give False.
        return x.dtype.char in "fd" and x.size <= FEW and bool(np.vdot(x, x) < self.square)

    def encode(self, x: Array) -> tuple[Array, Array | None]:
        """Encode numbers (..., E) as codes (..., E) and scales (...).

        The scale is max|x| / limit, so that ``codes * scale`` is x to within half a step. Rows of zeros have scale 0.
        A row with NaN or infinity has scale NaN and reads as NaN. Finite numbers beyond the range of the format
        (of float32 if there are scales) are stored as its largest finite number.
        """
        if self.limit is None:
            return saturated(x, self.dtype), None
        wide = x.astype(np.float64 if x.dtype.itemsize == 8 else np.float32, copy=False)
        with np.errstate(all="ignore"):
            largest = np.maximum(wide.max(-1, initial=0), np.abs(wide.min(-1, initial=0)))  # NaN if there is one
            # The scale must not be subnormal: it would be rounded coarsely, and codes would overflow.
            scale = np.where(largest > 0, np.maximum(largest / self.limit, _TINY), largest)
            lost = ~np.isfinite(scale)
            most = _MOST / self.limit  # limit * scale is then finite in float32, rounded or not
            scale = np.minimum(scale, most).astype(np.float32)
            numbers = wide / np.where(scale > 0, scale, 1)[..., None]
            if wide.dtype.itemsize == 8 or (scale >= np.float32(most)).any():
                np.clip(numbers, -self.limit, self.limit, out=numbers)
            if self.dtype.kind == "i":
                np.rint(numbers, out=numbers)
            codes = numbers.astype(self.dtype)
        if lost.any():
            scale[lost], codes[lost] = np.nan, 0
        return codes, scale

    def write(self, codes: Array, scale: Array | None, where: tuple[Any, ...], x: Array) -> None:
        """Encode x and store it at `where`, an index of the axes before the features."""
        if scale is not None:
            codes[where], scale[where] = self.encode(x)
        else:
            codes[where] = x if surely_fits(x, self.dtype) else saturated(x, self.dtype)

    def extend(self, arrays: Arrays, key: Array, value: Array, start: int) -> None:
        """Store token t of every sequence n at place ``start + t`` of row n."""
        n, heads, tokens, features = key.shape
        for part in blocks(tokens, n * heads * features):
            where = (slice(None), slice(None), slice(start + part.start, start + part.stop))
            self.write(arrays[0], arrays[2], where, key[:, :, part])
            self.write(arrays[1], arrays[3], where, value[:, :, part])

    def scatter(
        self, arrays: Arrays, key: Array, value: Array, source: tuple[Array, Array], to: tuple[Array, Array]
    ) -> None:
        """Store single tokens: the token at sequence and position `source` goes to row (or page) and position `to`."""
        for part in blocks(len(to[0]), key[:1, :, :1].size):
            where = to[0][part], slice(None), to[1][part]
            i, t = source[0][part], source[1][part]
            self.write(arrays[0], arrays[2], where, key[i, :, t])
            self.write(arrays[1], arrays[3], where, value[i, :, t])

    def using(self, originals: Any, **new: Any) -> AbstractContextManager[list[Array]]:
        """Return a context in which the arrays of a cache may be written to; it gives the new arrays to be read."""
        return nullcontext(list(new.values()))

    def move(self, arrays: Arrays, sources: Array, targets: Array, tokens: int) -> None:
        """Let rows (or pages) become copies of others, all at once, in their first places."""
        for x in arrays:
            if x is not None:
                for part in blocks(tokens, x[targets, :, :1].size):
                    x[targets, :, part] = x[sources, :, part]

    def saved(self, arrays: Arrays, rows: Array, places: Array) -> Callable[[], None]:
        """Return a function that stores again what is at some places (n, m) of rows (n, 1) now."""
        old = [None if x is None else x[rows, :, places] for x in arrays]

        def undo() -> None:
            for x, numbers in zip(arrays, old, strict=True):
                if x is not None:
                    x[rows, :, places] = numbers

        return undo


def token_pages(arrays: Arrays) -> Arrays:
    """View arrays (n, heads, places, features) as pages of one token.

    Page ``(i * heads) * places + s`` is place s of row i: the number of its place in memory for the first head. The
    pages overlap, since each has the stride of all heads.
    """
    codes = arrays[0]
    n, heads, places, _ = codes.shape
    pages = (n * heads - heads + 1) * places

    def view(x: Array) -> Array:
        row = x.strides[2]
        shape, strides = (pages, heads, 1, *x.shape[3:]), (row, x.strides[1], row, *x.strides[3:])
        return as_strided(x, shape, strides) if held(x) is None else strided(x, shape, strides)

    key, value, key_scale, value_scale = arrays
    scales = (None if x is None else view(x) for x in (key_scale, value_scale))
    return view(key), view(value), *scales  # type: ignore[return-value]


def each_token(lengths: Array) -> tuple[Array, Array]:
    """Return the sequence and the position of every token of sequences of these lengths."""
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    return sequence, np.arange(len(sequence)) - (np.cumsum(lengths) - lengths)[sequence]


def decode(codes: Array, scale: Array | None) -> Array:
    """Decode codes (..., E) and scales (...) to float64 numbers (..., E)."""
    numbers: Array = codes.astype(np.float64)
    return numbers if scale is None else numbers * scale[..., None]


def storage_format(storage: Any, dtype: np.dtype[Any]) -> Storage:
    """Resolve the `storage` of a cache for numbers of `dtype`; None means as they are."""
    if storage is None:
        return Storage(dtype.name, dtype, None)
    if isinstance(storage, str):
        name = "float8_e4m3fn" if storage == "float8" else storage
    else:
        try:
            name = np.dtype(storage).name
        except Exception:  # TypeError, or ValueError, KeyError, SyntaxError if it looks like a description of fields
            raise TypeError(f"storage must be None, a string or a dtype, got {storage!r}") from None
    if name == dtype.name:
        return Storage(name, dtype, None)
    if name not in _SHORT:
        raise ValueError(
            f"storage must be None (that of dtype, {dtype}), 'float16', 'bfloat16', 'int8' or 'float8', got {storage!r}"
        )
    held = np.dtype(name) if name in ("float16", "int8") else ml_dtype(name)
    return Storage(name, held, _LIMITS.get(name), 0.0 if name in SCALED else min(largest(held), ROOT) ** 2)


def ml_dtype(name: str) -> np.dtype[Any]:
    """Return a dtype that NumPy itself does not have; ml_dtypes is imported at the first call only."""
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError(f'{name} needs ml_dtypes: pip install "numba-attention[bfloat16]"') from None
    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return dtype


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return `numpy.empty` aligned to a cache line, so that rows as long as a line do not straddle two of them."""
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if size > sys.maxsize - _LINE:
        raise MemoryError(f"an array of shape {shape} and {dtype} takes {size:.3g} bytes")
    buffer = np.empty(size + _LINE, np.uint8)
    start = -buffer.ctypes.data % _LINE
    result: Array = buffer[start : start + size].view(dtype).reshape(shape)
    return result


def megabytes(arrays: Arrays) -> str:
    """Say how much memory arrays take."""
    return f"{sum(x.nbytes for x in arrays if x is not None) / 2**20:.1f} MiB"


def blocks(tokens: int, numbers: int) -> Iterator[slice]:
    """Split tokens into slices to be encoded at a time; `numbers` is the count of numbers of one token."""
    step = max(1, _BLOCK // max(1, numbers))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))
