"""How a cache holds numbers: as they are, rounded, or in a byte with a scale for each token and head."""

from typing import Any

import numpy as np

from ..options import Array

_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # magnitudes that a scale takes the largest number of a row to
_BLOCK = 2**18  # numbers encoded at a time, so that temporaries stay in the cache


def resolve(storage: Any, dtype: np.dtype[Any]) -> tuple[str, np.dtype[Any]]:
    """Name and dtype of a storage, for numbers of this dtype; None is that dtype itself."""
    if storage is None:
        return dtype.name, dtype
    name = storage if isinstance(storage, str) else _name(storage)
    name = "float8_e4m3fn" if name == "float8" else name
    if name == dtype.name:
        return name, dtype
    if name in ("float16", "int8"):
        found = np.dtype(name)
    elif name in ("bfloat16", "float8_e4m3fn"):
        try:
            import ml_dtypes
        except ImportError:
            raise ImportError(f'storage {name} needs ml_dtypes: pip install "numba-attention[bfloat16]"') from None
        found = np.dtype(getattr(ml_dtypes, name))
    else:
        raise ValueError(
            f"storage must be None, 'float16', 'bfloat16', 'int8', 'float8' or the dtype {dtype}, got {storage!r}"
        )
    if found.itemsize >= dtype.itemsize:
        raise ValueError(f"storage must be smaller than the dtype of the cache, {dtype}, got {name}")
    return name, found


def _name(storage: Any) -> str:
    try:
        name: str = np.dtype(storage).name
    except TypeError:
        raise TypeError(f"storage must be None, a name or a dtype, got {storage!r}") from None
    return name


def has_scale(name: str) -> bool:
    return name in _LARGEST


def encode(x: Array, name: str, codes: Array, scale: Array | None) -> None:
    """Write x (..., T, E) to `codes`, of its shape, and where the storage has scales to `scale`, (..., T).

    A row that holds NaN or infinity has the scale NaN, so that it reads as NaN; a row of zeros has the scale 0.
    """
    if scale is None:
        with np.errstate(all="ignore"):
            codes[...] = x
        return
    T = x.shape[-2]
    rows = max(1, _BLOCK // max(1, x[..., 0, :].size))
    for start in range(0, T, rows):
        part = slice(start, start + rows)
        _encode_block(x[..., part, :], name, codes[..., part, :], scale[..., part])


def _encode_block(x: Array, name: str, codes: Array, scale: Array) -> None:
    wide = np.float64 if x.dtype == np.float64 else np.float32
    x = x.astype(wide, copy=False)
    with np.errstate(all="ignore"):
        # NaN if there is any, infinite if that is all there is: one more comparison finds both.
        factor = (np.abs(x).max(axis=-1, initial=0) / wide(_LARGEST[name])).astype(np.float32)
        scale[...] = np.where(np.isfinite(factor), factor, np.nan)
        usable = np.isfinite(factor) & (factor > 0)
        ratio = np.where(usable[..., None], x / np.where(usable, factor, 1).astype(wide)[..., None], 0)
    limit = wide(_LARGEST[name])
    np.clip(ratio, -limit, limit, out=ratio)
    if name == "int8":
        np.rint(ratio, out=ratio)
    codes[...] = ratio.astype(codes.dtype)


def decode(codes: Array, scale: Array | None) -> Array:
    """The numbers that are stored, as float64."""
    x: Array = codes.astype(np.float64)
    return x if scale is None else x * scale[..., None].astype(np.float64)


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array that begins at a cache line, so that rows of a power of two do not straddle two; not initialised."""
    count = 1
    for n in shape:
        count *= n
    raw = np.empty(count * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    found: Array = raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)
    return found
