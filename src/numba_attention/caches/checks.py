"""Checks of the arguments of both caches."""

import operator
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from ..device import runtime
from ..device.arrays import on_device, take
from ..errors import BackendUnavailableError
from ..options import Array
from ..validation import FAR, as_ints, as_ndarray, is_bfloat16
from .device_storage import DeviceStorage
from .storage import SCALED, Arrays, Storage, ml_dtype, storage_format

_NATIVE = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16))


def check_size(name: str, x: Any, least: int = 1) -> int:
    """Check an integer argument that is a size."""
    try:
        if isinstance(x, bool | np.bool_):
            raise TypeError
        size = operator.index(x)
    except Exception:  # `__index__` of another library's number may raise any exception
        raise TypeError(f"{name} must be an integer, got {x!r}") from None
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}")
    if size > FAR:
        raise ValueError(f"{name} must be at most 2**40, got one of {size.bit_length()} bits")
    return size


def check_dtype(dtype: Any) -> np.dtype[Any]:
    """Check the dtype of a cache."""
    if isinstance(dtype, str) and dtype == "bfloat16":
        return ml_dtype(dtype)
    try:
        # NumPy reads None as float64, which is not what a caller means here.
        result: np.dtype[Any] | None = None if dtype is None else np.dtype(dtype)
    except Exception:  # TypeError, and ValueError, KeyError, SyntaxError for what looks like a description of fields
        result = None
    if result is None or not result.isnative or not (result in _NATIVE or is_bfloat16(result)):
        raise TypeError(f"dtype must be float32, float64, float16 or ml_dtypes.bfloat16, got {dtype!r}")
    return result


def check_array(name: str, x: Any, axes: int = 4) -> Array:
    """Check that x is an array with `axes` axes. Nothing is converted, because the caller wants no copy."""
    array = as_ndarray(name, x)
    if array.ndim != axes:
        raise ValueError(f"{name} must have {axes} axes, got shape {array.shape}")
    return array


def check_new(name: str, x: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Check keys or values to be appended, of shape (n, Hkv, T, E); -1 in `shape` stands for any T."""
    x = check_array(name, x)
    if x.dtype != dtype:
        raise TypeError(
            f"{name} must have the dtype of the cache, {dtype}, got {x.dtype}; "
            f"convert it with {name}.astype(cache.dtype)"
        )
    if x.shape != tuple(size if wanted < 0 else wanted for size, wanted in zip(x.shape, shape, strict=True)):
        said = ", ".join("T" if n < 0 else str(n) for n in shape)
        raise ValueError(f"{name} must have shape ({said}), got {x.shape}")
    array: Array = x
    return array


def check_ints(name: str, x: Any) -> Array:
    """Convert integers to a new int64 array."""
    return as_ints(name, x, 2**62)


def check_lengths(name: str, x: Any, n: int, limit: int | Array, what: str) -> Array:
    """Check one length for each of n sequences, or one for all, from 0 to `limit`, which messages call `what`."""
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


class Held(NamedTuple):
    """Checked arrays that a cache is made of, or headers of arrays on a GPU, and their properties."""

    arrays: Arrays
    dtype: np.dtype[Any]  # of queries and results
    form: Storage
    read_only: str | None  # why the arrays cannot be written to, if they cannot
    originals: tuple[Any, Any, Any, Any] | None  # the arrays as the caller passed them, if on a GPU


def check_held(
    key: Any, value: Any, key_scale: Any, value_scale: Any, dtype: Any, names: tuple[str, str], middle: str
) -> Held:
    """Check the arrays from which a cache is made."""
    named = dict(zip((*names, "key_scale", "value_scale"), (key, value, key_scale, value_scale), strict=True))
    arrays, originals = _taken(named)
    arrays = tuple(None if x is None else as_ndarray(name, x) for name, x in zip(named, arrays, strict=True))
    kind = _check_pair(arrays[0], arrays[1], names, middle)
    coded = kind.name in SCALED
    if dtype is None:
        dtype = np.dtype(np.float32) if coded else kind
    else:
        dtype = check_dtype(dtype)
    if kind != dtype and kind.itemsize > 2:
        raise TypeError(
            f"{names[0]} must have the dtype {dtype} of queries, or hold fewer bits: float16, bfloat16, int8 or "
            f"float8_e4m3fn; got {kind}"
        )
    for name, x, scale in zip(tuple(named)[2:], arrays[:2], arrays[2:], strict=True):
        if (scale is not None) != coded:
            raise TypeError(
                f"{name} must be " + (f"given with {kind}" if coded else f"None where keys and values are {kind}")
            )
        if scale is not None:
            _check_scale(name, scale, x.shape[:3])
    if kind != dtype:
        for name, x in zip(names, arrays[:2], strict=True):
            check_features(name, x)
    reason = why_read_only(*(x for x in arrays if x is not None))
    form = storage_format(kind.name, dtype)
    return Held(arrays, dtype, form if originals is None else DeviceStorage.of(form), reason, originals)


def _check_pair(key: Any, value: Any, names: tuple[str, str], middle: str) -> np.dtype[Any]:
    """Check keys and values; return their dtype."""
    for name, x in zip(names, (key, value), strict=True):
        check_array(name, x)
    dtype: np.dtype[Any] = key.dtype
    if not dtype.isnative or not (dtype in _NATIVE or is_bfloat16(dtype) or dtype.name in SCALED):
        raise TypeError(
            f"{names[0]} must have dtype float32, float64, float16 or ml_dtypes.bfloat16 in native byte order, or "
            f"int8 or ml_dtypes.float8_e4m3fn with scales, got {dtype}"
        )
    if value.dtype != dtype:
        raise TypeError(f"{names[1]} must have the dtype of {names[0]}, {dtype}, got {value.dtype}")
    if value.shape[:3] != key.shape[:3]:
        shape = ", ".join(str(n) for n in key.shape[:3])
        raise ValueError(f"{names[1]} must have shape ({shape}, Ev), as {names[0]} has {middle}, got {value.shape}")
    return dtype


def _check_scale(name: str, scale: Any, shape: tuple[int, ...]) -> None:
    check_array(name, scale, 3)
    if scale.dtype != np.float32 or not scale.dtype.isnative:
        raise TypeError(f"{name} must have dtype float32 in native byte order, got {scale.dtype}")
    if scale.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, a factor for each token and head, got {scale.shape}")
    if scale.shape[-1] > 1 and scale.strides[-1] != scale.itemsize:
        raise ValueError(f"{name} must have contiguous tokens; pass numpy.ascontiguousarray({name})")


def check_features(name: str, x: Array) -> None:
    """Check that the features of each token are contiguous."""
    if x.shape[-1] > 1 and x.strides[-1] != x.itemsize:
        raise ValueError(f"{name} must have contiguous features; pass numpy.ascontiguousarray({name})")


def why_read_only(*arrays: Array) -> str | None:
    """Return why the arrays of a cache cannot be written to, or None if they can."""
    if not all(x.flags.writeable for x in arrays):
        return "read-only arrays"
    for x in arrays:
        if any(stride == 0 and size > 1 for stride, size in zip(x.strides, x.shape, strict=True)):
            return "arrays that overlap themselves"
    work: Any = 10_000  # candidate solutions to try, which takes well below a millisecond
    for x, y in combinations(arrays, 2):
        try:
            shared = np.shares_memory(x, y, max_work=work)
        except np.exceptions.TooHardError:  # undecided after that work: count it as shared
            shared = True
        if shared:
            return "a key and a value that share memory" if len(arrays) == 2 else "arrays that share memory"
    return None


def _taken(named: dict[str, Any]) -> tuple[Any, tuple[Any, Any, Any, Any] | None]:
    """Make headers of arrays on a GPU, and return them with the arrays; on the host, the arrays and None."""
    places = {name: on_device(x) for name, x in named.items() if x is not None}
    arrays = tuple(named.values())
    if not any(places.values()):
        return arrays, None
    if not all(places.values()):
        both = "both" if len(places) == 2 else "all"
        raise TypeError(f"{' and '.join(places)} must {both} be on the GPU, or {both} on the host")
    why = runtime.unusable()
    if why is not None:
        raise BackendUnavailableError(
            f"{next(iter(places))} is on a GPU, and the backend 'cuda' cannot run here: {why}"
        )
    headers = {name: take(named[name]) for name in places}
    devices = {name: runtime.device_of(x).ordinal for name, x in headers.items()}
    if len(set(devices.values())) > 1:
        said = ", ".join(f"{name} on GPU {n}" for name, n in devices.items())
        raise ValueError(f"{' and '.join(places)} must be on one GPU, got {said}")
    return tuple(headers.get(name) for name in named), arrays


def check_writeable(reason: str | None) -> None:
    """Refuse to write to arrays that cannot be written to."""
    if reason is not None:
        raise ValueError(f"this cache was made from {reason} and cannot be written to; pass copies to from_arrays")
