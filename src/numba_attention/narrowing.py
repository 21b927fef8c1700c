"""Conversion of floating-point numbers to fewer bits, in which what is finite stays finite."""

from functools import cache
from typing import Any

import numpy as np

from .options import Array

_LARGEST = {
    "float64": float(np.finfo(np.float64).max),
    "float32": float(np.finfo(np.float32).max),
    "bfloat16": (2 - 2**-7) * 2.0**127,
    "float16": 65504.0,
}

FEW = 2**13  # numbers that BLAS multiplies without starting threads
ROOT = 2.0**63  # whose square is finite in float32


def largest(dtype: np.dtype[Any]) -> float:
    """Return the largest finite number of a floating dtype."""
    return _LARGEST[dtype.name]


def largest_computed(dtype: np.dtype[Any]) -> float:
    """Return the largest finite number of the type that kernels compute in for arrays of this dtype."""
    return _LARGEST["float64" if dtype.itemsize == 8 else "float32"]


def saturated(x: Array, dtype: Any) -> Array:
    """Convert to `dtype`: finite numbers beyond its range become its largest finite one, infinities and NaN stay.

    A plain conversion makes them infinite, and a bias of ``numpy.finfo(numpy.float64).min`` would hide a key as -inf
    does; `numpy.clip` takes infinities too.
    """
    target, limit = _end_of(x.dtype, dtype)
    if limit is None:
        return x.astype(target)
    if x.dtype.itemsize == 2:  # bfloat16, of which ml_dtypes does not tell whether a conversion overflows
        x = x.astype(np.float32)
    if limit > _LARGEST["float16"] and target.itemsize == 2:
        if surely_fits(x, target):
            return x.astype(target)
    else:
        try:
            with np.errstate(over="raise"):  # a flag of the processor: no pass over the numbers
                return x.astype(target)
        except FloatingPointError:
            pass
    with np.errstate(over="ignore"):
        result = x.astype(target)
    lost = np.isinf(result) & np.isfinite(x)
    result[lost] = np.copysign(limit, x[lost].astype(np.float64))
    return result


def surely_fits(x: Array, dtype: Any) -> bool:
    """Whether no number of x is beyond the range of `dtype`; may say no where there is NaN, or they almost are."""
    _, limit = _end_of(x.dtype, dtype)
    if limit is None:
        return True
    if x.dtype.itemsize == 2:
        return False
    if x.size <= FEW:  # 0.5 us for a token of 8 heads of 64; NaN and overflow compare as false
        return bool(np.vdot(x, x) < min(limit, ROOT) ** 2)
    return bool(x.max() < limit and x.min() > -limit)


@cache  # the name of a dtype is made anew at every look: 2 us
def _end_of(source: np.dtype[Any], dtype: Any) -> tuple[np.dtype[Any], float | None]:
    """The dtype to convert to, and its largest number if those of `source` may be larger."""
    target = np.dtype(dtype)
    limit = _LARGEST[target.name]
    return target, limit if _LARGEST[source.name] > limit else None
