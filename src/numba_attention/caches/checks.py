"""What is passed to a cache, checked."""

import operator
from typing import Any

import numpy as np

from ..options import Array

_NATIVE = {np.dtype(name) for name in ("float32", "float64", "float16")}


def size_of(name: str, n: Any) -> int:
    try:
        if isinstance(n, bool | np.bool_):
            raise TypeError
        size = operator.index(n)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {n!r}") from None
    if size < 1:
        raise ValueError(f"{name} must be positive, got {size}")
    return size


def check_dtype(dtype: Any, name: str = "dtype") -> np.dtype[Any]:
    try:
        found: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"{name} must be a dtype, got {dtype!r}") from None
    if found not in _NATIVE and not (found.name == "bfloat16" and found.isnative):
        raise TypeError(
            f"{name} must be float32, float64, float16 or ml_dtypes.bfloat16 in native byte order, got {found}"
        )
    return found


def check_new(key: Any, value: Any, shapes: tuple[tuple[int, int], int, int], dtype: np.dtype[Any]) -> int:
    """Check keys (n, Hkv, T, E) and values (n, Hkv, T, Ev) to be appended; returns T."""
    (n, heads), E, Ev = shapes
    for name, x, size in (("key", key, E), ("value", value, Ev)):
        if type(x) is not np.ndarray and (
            not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray | np.matrix)
        ):
            kind = f"{type(x).__module__}.{type(x).__qualname__}"
            raise TypeError(f"{name} must be a numpy.ndarray, got {kind}; convert it with numpy.asarray({name})")
        if x.dtype is not dtype and x.dtype != dtype:
            raise TypeError(
                f"{name} must have the dtype of the cache, {dtype}, got {x.dtype}; convert it with {name}.astype(...)"
            )
        shape = x.shape
        if len(shape) != 4 or shape[0] != n or shape[1] != heads or shape[3] != size:
            raise ValueError(f"{name} must have shape ({n}, {heads}, T, {size}), got {shape}")
    T: int = key.shape[2]
    if value.shape[2] != T:
        raise ValueError(f"value must have as many tokens as key, {T}, got {value.shape[2]}")
    return T


def lengths_of(lengths: Any, n: int, limit: int, name: str = "lengths") -> Array:
    """Check lengths, one for all or one for each, as a new int64 (n,)."""
    array = np.asarray(lengths)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integer, got {array.dtype}")
    if array.shape not in ((), (n,)):
        raise ValueError(f"{name} must have shape () or ({n},), got {array.shape}")
    if array.size and (int(array.min()) < 0 or int(array.max()) > limit):
        raise ValueError(f"{name} must lie between 0 and {limit}, got {array}")
    found: Array = np.array(np.broadcast_to(array, (n,)), np.int64)
    return found
