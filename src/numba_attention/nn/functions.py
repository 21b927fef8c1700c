"""Functions of rows and of numbers: layer norm and GELU."""

from __future__ import annotations  # short types in help()

from ..layer.rowwise import activated, normalized
from ..options import Array


def layer_norm(
    x: Array, weight: Array, bias: Array | None, eps: float = 1e-5, out: Array | None = None,
    residual: Array | None = None,
) -> Array:  # fmt: skip
    """Shift and scale each row to mean 0 and variance 1, then scale by `weight` and add `bias`.

    Parameters
    ----------
    x : ndarray, shape (..., features)
    weight, bias : ndarray, shape (features,)
    eps : float, default 1e-5
        Added to the variance; not negative.
    out : ndarray, optional
        Array for the result, in the dtype of `x`, which may be `x` or `residual`.
    residual : ndarray, shape (..., features), optional
        Added to `x` first, in the same pass over memory.

    Returns
    -------
    ndarray
        Shape and dtype of `x`. Half types are computed in float32.

    Raises
    ------
    TypeError, ValueError
        An argument is no array of floating point, or its shape does not fit; the message names it.

    References
    ----------
    .. [1] Ba et al., "Layer Normalization", 2016, equation 4.

    Examples
    --------
    >>> import numpy as np, numba_attention.nn as nn
    >>> nn.layer_norm(np.array([[1.0, 3.0]]), np.ones(2), np.zeros(2), eps=0)
    array([[-1.,  1.]])
    """
    return normalized(x, weight, bias, eps, out, residual)


def gelu(x: Array, out: Array | None = None) -> Array:
    """``x * (1 + erf(x / sqrt(2))) / 2``: x times the probability that a normal number is below x.

    Parameters
    ----------
    x : ndarray
        float32 or float64.
    out : ndarray, optional
        Array for the result, in the dtype of `x`, which may be `x`.

    Returns
    -------
    ndarray
        In float32 within ``2e-7 * max(1, abs(x))``; in float64 as exact as `scipy.special.ndtr`.

    References
    ----------
    .. [1] Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, section 2.

    Examples
    --------
    >>> import numpy as np, numba_attention.nn as nn
    >>> nn.gelu(np.array([-1.0, 0.0, 1.0])).round(4)
    array([-0.1587,  0.    ,  0.8413])
    """
    return activated("gelu", x, out)


__all__ = ["gelu", "layer_norm"]
