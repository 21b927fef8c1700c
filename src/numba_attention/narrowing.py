"""Saturating conversion of floating-point numbers to fewer bits: finite numbers stay finite."""

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

FEW = 2**13  # number of elements up to which BLAS computes a dot product without starting threads
ROOT = 2.0**63  # a number whose square is finite in float32


def largest(dtype: np.dtype[Any]) -> float:
    """Return the largest finite number of a floating dtype."""
    return _LARGEST[dtype.name]


def largest_computed(dtype: np.dtype[Any]) -> float:
    """Return the largest finite number of the type that kernels compute in for arrays of this dtype."""
    return _LARGEST["float64" if dtype.itemsize == 8 else "float32"]


def saturated(x: Array, dtype: Any) -> Array:
    """Convert to `dtype`: finite numbers beyond its range become its largest finite one, infinities and NaN stay.

    ``astype`` would make such numbers infinite, so that a bias of ``numpy.finfo(numpy.float64).min`` would hide a key
    as -inf does. `numpy.clip` would make infinities finite.
    """
    target, limit = _end_of(x.dtype, dtype)
    if limit is None:
        return x.astype(target)
    if x.dtype.itemsize == 2:  # bfloat16: ml_dtypes does not set the processor's overflow flag
        x = x.astype(np.float32)
    if limit > _LARGEST["float16"] and target.itemsize == 2:
        if surely_fits(x, target):
            return x.astype(target)
    else:
        try:
            with np.errstate(over="raise"):  # reads a flag of the processor, and needs no further pass over the numbers
                return x.astype(target)
        except FloatingPointError:
            pass
    with np.errstate(over="ignore"):
        result = x.astype(target)
    lost = np.isinf(result) & np.isfinite(x)
    result[lost] = np.copysign(limit, x[lost].astype(np.float64))
    return result


def surely_fits(x: Array, dtype: Any) -> bool:
    """Whether all numbers of x are certainly within the range of `dtype`.

    The answer may be False although they are, if x contains NaN or numbers near the end of the range.
    """
    _, limit = _end_of(x.dtype, dtype)
    if limit is None:
        return True
    if x.dtype.itemsize == 2:
        return False
    if x.size <= FEW:  # takes 0.5 us for a token of 8 heads of 64; comparisons with NaN and inf give False
        return bool(np.vdot(x, x) < min(limit, ROOT) ** 2)
    return bool(x.max() < limit and x.min() > -limit)


@cache  # NumPy computes the name of a dtype at each access, which takes 2 us
def _end_of(source: np.dtype[Any], dtype: Any) -> tuple[np.dtype[Any], float | None]:
    """Return `dtype` as a NumPy dtype, and its largest number if numbers of `source` can be larger, else None."""
    target = np.dtype(dtype)
    limit = _LARGEST[target.name]
    return target, limit if _LARGEST[source.name] > limit else None
