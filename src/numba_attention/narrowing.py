"""Conversion of floating-point numbers to fewer bits, in which what is finite stays finite."""

from typing import Any

import numpy as np

from .options import Array

_LARGEST = {
    "float64": float(np.finfo(np.float64).max),
    "float32": float(np.finfo(np.float32).max),
    "bfloat16": (2 - 2**-7) * 2.0**127,
    "float16": 65504.0,
}


def largest(dtype: np.dtype[Any]) -> float:
    """Return the largest finite number of a floating dtype."""
    return _LARGEST[dtype.name]


def largest_computed(dtype: np.dtype[Any]) -> float:
    """Return the largest finite number of the type that kernels compute in for arrays of this dtype."""
    return _LARGEST["float64" if dtype.itemsize == 8 else "float32"]


def saturated(x: Array, dtype: Any) -> Array:
    """Convert to `dtype`: finite numbers beyond its range become its largest finite one, infinities and NaN stay.

    A plain conversion makes them infinite, and a bias of ``numpy.finfo(numpy.float64).min`` would hide a key as -inf
    does. In NumPy itself only `astype` with a check of the result tells the two apart: `clip` takes infinities too.
    """
    target = np.dtype(dtype)
    if _LARGEST[x.dtype.name] <= _LARGEST[target.name]:
        return x.astype(target)
    with np.errstate(over="ignore"):
        result = x.astype(target)
    infinite = np.isinf(result)
    if infinite.any():
        infinite &= np.isfinite(x)
        result[infinite] = np.copysign(_LARGEST[target.name], x[infinite].astype(np.float64))
    return result
