"""What both caches ask of their arguments."""

import operator
from typing import Any

import numpy as np

from ..cuda import runtime
from ..cuda.arrays import on_device, take
from ..errors import BackendUnavailableError
from ..options import Array
from ..validation import is_bfloat16
from .storage import ml_dtype

ON_GPU = "arrays on a GPU"
_NATIVE = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16))


def check_size(name: str, x: Any, least: int = 1) -> int:
    """Check a number of things."""
    try:
        if isinstance(x, bool | np.bool_):
            raise TypeError
        size = operator.index(x)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {x!r}") from None
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}")
    return size


def check_dtype(dtype: Any) -> np.dtype[Any]:
    """Check the dtype of a cache."""
    if isinstance(dtype, str) and dtype == "bfloat16":
        return ml_dtype(dtype)
    try:
        # None would be float64 to NumPy, which nobody means here.
        found: np.dtype[Any] | None = None if dtype is None else np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not found.isnative or not (found in _NATIVE or is_bfloat16(found)):
        raise TypeError(f"dtype must be float32, float64, float16 or ml_dtypes.bfloat16, got {dtype!r}")
    return found


def check_array(name: str, x: Any) -> Array:
    """Check that x is an array of four axes, without making one of it: the caller wants no copy."""
    if not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray | np.matrix):
        kind = f"{type(x).__module__}.{type(x).__qualname__}"
        raise TypeError(f"{name} must be a numpy.ndarray, got {kind}; convert it with numpy.asarray({name})")
    if x.ndim != 4:
        raise ValueError(f"{name} must have 4 axes, got shape {x.shape}")
    return x


def check_new(name: str, x: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Check keys or values to be appended, of shape (n, Hkv, T, E) where T is free: -1."""
    x = check_array(name, x)
    if x.dtype != dtype:
        raise TypeError(
            f"{name} must have the dtype of the cache, {dtype}, got {x.dtype}; "
            f"convert it with {name}.astype(cache.dtype)"
        )
    if x.shape != tuple(found if wanted < 0 else wanted for found, wanted in zip(x.shape, shape, strict=True)):
        said = ", ".join("T" if n < 0 else str(n) for n in shape)
        raise ValueError(f"{name} must have shape ({said}), got {x.shape}")


def check_ints(name: str, x: Any) -> Array:
    """Make an int64 array of integers, always a new one."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost; pass its .data")
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise ValueError(f"{name} is not an array: {error}") from None
    if array.size == 0 and not isinstance(x, np.ndarray):
        array = array.astype(np.int64)  # an empty list says nothing of its type
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integer, got {array.dtype}")
    if array.dtype.kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must fit in int64, got {array.max()}")
    return array.astype(np.int64)


def check_lengths(name: str, x: Any, n: int, limit: int | Array, what: str) -> Array:
    """Check one length for each of n sequences, or one for all, from 0 to `limit`, which is `what`."""
    lengths = check_ints(name, x)
    if lengths.shape not in ((), (n,)):
        raise ValueError(f"{name} must be an integer or of shape ({n},), one for each sequence, got {lengths.shape}")
    if lengths.ndim == 0:
        lengths = np.full(n, lengths)
    wrong = (lengths < 0) | (lengths > limit)
    if wrong.any():
        i = int(np.argmax(wrong))
        limits = np.broadcast_to(limit, (n,))
        raise ValueError(f"{name} must lie between 0 and {what}, {limits[i]}, got {lengths[i]} for sequence {i}")
    return lengths


def check_pair(key: Any, value: Any, names: tuple[str, str], middle: str) -> np.dtype[Any]:
    """Check the arrays that a cache is made of; return their dtype."""
    for name, x in zip(names, (key, value), strict=True):
        check_array(name, x)
    dtype: np.dtype[Any] = key.dtype
    if not dtype.isnative or not (dtype in _NATIVE or is_bfloat16(dtype)):
        raise TypeError(
            f"{names[0]} must have dtype float32, float64, float16 or ml_dtypes.bfloat16 in native byte order, "
            f"got {dtype}"
        )
    if value.dtype != dtype:
        raise TypeError(f"{names[1]} must have the dtype of {names[0]}, {dtype}, got {value.dtype}")
    if value.shape[:3] != key.shape[:3]:
        shape = ", ".join(str(n) for n in key.shape[:3])
        raise ValueError(f"{names[1]} must have shape ({shape}, Ev), as {names[0]} has {middle}, got {value.shape}")
    return dtype


def why_read_only(key: Array, value: Array) -> str | None:
    """Say why arrays that a cache was made of cannot be written to; None if they can."""
    if not (key.flags.writeable and value.flags.writeable):
        return "read-only arrays"
    for x in (key, value):
        if any(stride == 0 and size > 1 for stride, size in zip(x.strides, x.shape, strict=True)):
            return "arrays that overlap themselves"
    work: Any = 10_000  # candidate solutions to try, well below a millisecond
    try:
        shared = np.shares_memory(key, value, max_work=work)
    except np.exceptions.TooHardError:  # undecided in reasonable time: take it as shared
        shared = True
    return "a key and a value that share memory" if shared else None


def taken(key: Any, value: Any, names: tuple[str, str]) -> tuple[Any, Any, tuple[Any, Any] | None]:
    """Make headers of keys and values on a GPU, and say what they are of; None, and the same two, if on the host."""
    places = [on_device(x) for x in (key, value)]
    if not any(places):
        return key, value, None
    if not all(places):
        raise TypeError(f"{names[0]} and {names[1]} must both be on the GPU, or both on the host")
    why = runtime.unusable()
    if why is not None:
        raise BackendUnavailableError(f"{names[0]} is on a GPU, and the backend 'cuda' cannot run here: {why}")
    headers = take(key), take(value)
    devices = [runtime.device_of(x) for x in headers]
    if devices[0] != devices[1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must be on one GPU, got GPU {devices[0].ordinal} and GPU {devices[1].ordinal}"
        )
    return *headers, (key, value)


def check_on_host(reason: str | None) -> None:
    """Refuse what only caches on the host can do yet."""
    if reason is ON_GPU:
        raise ValueError(
            f"this cache was made from {reason}, which it only reads: write new tokens to the arrays themselves, and "
            "make the cache again with from_arrays"
        )


def check_writeable(reason: str | None) -> None:
    """Refuse to write to arrays that cannot be written to."""
    check_on_host(reason)
    if reason is not None:
        raise ValueError(f"this cache was made from {reason} and cannot be written to; pass copies to from_arrays")
