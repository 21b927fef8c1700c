"""Activations: coefficients for the kernels, and the same functions in NumPy.

Each is ``x / (1 + 2**(x Q(x**2)))``, x times a logistic function, with a polynomial Q of its own. In GELU that is
x times the normal distribution function Phi: ``x Q(x**2) = log2(Phi(-x) / Phi(x))``.

References
----------
.. [1] Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, section 2, with the approximation by tanh.
.. [2] Elfwing et al., "Sigmoid-Weighted Linear Units", 2017, section 2.
"""

import math
from functools import cache
from typing import Any

import numpy as np

from ..options import Array

_LOG2E = 1 / math.log(2)
_COEFFICIENTS = {
    # A minimax fit by linear programming: the error of Phi is at most 3e-8 before rounding.
    "gelu": (
        -2.302209154369651, -0.10483595871879543, 9.530490454022782e-05, 0.00015883835057793952,
        -1.1236939629348813e-05, 3.545587047774167e-07, -3.378996110843091e-09, -3.8901815094467875e-11,
    ),
    "gelu_tanh": (-2 * _LOG2E * math.sqrt(2 / math.pi), -2 * _LOG2E * math.sqrt(2 / math.pi) * 0.044715),
    "silu": (-_LOG2E,),
}  # fmt: skip
_BLOCK = 2**15  # numbers that NumPy takes at a time, which with two temporaries stay in a second-level cache


def check_activation(name: str | None) -> None:
    """Refuse the name of an activation that there is not."""
    if name is not None and not (isinstance(name, str) and name in _COEFFICIENTS):
        raise ValueError(f"activation must be one of {', '.join(_COEFFICIENTS)}, got {name!r}")


@cache
def coefficients_of(name: str, dtype: np.dtype[Any]) -> Array | None:
    """Return the coefficients that a kernel reads; None where they are not exact enough, for GELU in float64."""
    if name == "gelu" and dtype == np.float64:
        return None
    from ..cpu.activations import TERMS

    coefficients = np.zeros(TERMS, dtype)
    coefficients[: len(_COEFFICIENTS[name])] = _COEFFICIENTS[name]
    return coefficients


def probability(name: str, x: Array) -> Array:
    """Return the logistic function by which x is multiplied: for GELU, (1 + erf(x / sqrt(2))) / 2."""
    real = x.dtype.type
    if name == "gelu" and x.dtype != np.float32:
        from scipy.special import ndtr

        exact: Array = ndtr(x)
        return exact
    first, *others = (c * -0.5 / _LOG2E for c in reversed(_COEFFICIENTS[name]))
    square = x * x
    u = np.full_like(x, first)
    for coefficient in others:
        u *= square
        u += real(coefficient)
    u *= x
    np.tanh(u, out=u)  # vector code, which scipy.special.erf is not
    u += real(1)
    u *= real(0.5)
    return u


def with_numpy(name: str, x: Array, out: Array | None = None) -> Array:
    """Apply an activation without kernels; `out` may be x."""
    if out is None:
        out = np.empty_like(x, order="C")
    elif not out.flags.c_contiguous:
        out[...] = with_numpy(name, x)
        return out
    numbers, results = np.ravel(x), out.reshape(-1)
    for start in range(0, numbers.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        np.multiply(numbers[part], probability(name, numbers[part]), out=results[part])
    return out


__all__ = ["check_activation", "coefficients_of", "probability", "with_numpy"]
