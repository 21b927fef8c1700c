"""Functions of rows and of numbers: layer norm, activations, in vector code."""

from __future__ import annotations  # short types in help()

import math

import numpy as np

from ..options import Array

# tanh(x P(x^2)) = erf(x / sqrt(2)) to 2e-7 / max(1, |x|), P with these coefficients, constant first (a minimax fit by
# linear programming). NumPy's tanh is vector code, scipy.special.erf is not: 1.5 ns an element instead of 15, where the
# matrix product that made the element took 7.
_ERF = (
    0.7978891814637531,
    0.03632125518526398,
    -2.312953483162343e-05,
    -5.835626292644817e-05,
    4.407049553180517e-06,
    -1.6076867349945865e-07,
    2.4133682576609942e-09,
)
_GELU_NUMBERS = 2**15  # of a block, which with two temporaries stays in a second-level cache


def layer_norm(x: Array, weight: Array, bias: Array | None, eps: float = 1e-5, out: Array | None = None) -> Array:
    """Shift and scale each row to mean 0 and variance 1, then scale by `weight` and add `bias`.

    Parameters
    ----------
    x : ndarray, shape (..., features)
    weight, bias : ndarray, shape (features,)
    eps : float, default 1e-5
        Added to the variance.
    out : ndarray, optional
        Array for the result, which may be `x`.

    Returns
    -------
    ndarray
        Shape and dtype of `x`.

    References
    ----------
    .. [1] Ba et al., "Layer Normalization", 2016, equation 4.

    Examples
    --------
    >>> import numpy as np, numba_attention.nn as nn
    >>> nn.layer_norm(np.array([[1.0, 3.0]]), np.ones(2), np.zeros(2), eps=0)
    array([[-1.,  1.]])
    """
    out = np.subtract(x, x.mean(axis=-1, keepdims=True), out=out)
    out *= inverse_root(out, eps)
    out *= weight
    if bias is not None:
        out += bias
    return out


def gelu(x: Array, out: Array | None = None) -> Array:
    """``x * (1 + erf(x / sqrt(2))) / 2``: x times the probability that a normal number is below x.

    Parameters
    ----------
    x : ndarray
        float32 or float64.
    out : ndarray, optional
        Array for the result, which may be `x`.

    Returns
    -------
    ndarray
        To 1e-6 in float32; in float64 as exact as `scipy.special.erf`.

    References
    ----------
    .. [1] Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, section 2.

    Examples
    --------
    >>> import numpy as np, numba_attention.nn as nn
    >>> nn.gelu(np.array([-1.0, 0.0, 1.0])).round(4)
    array([-0.1587,  0.    ,  0.8413])
    """
    if out is None:
        out = np.empty_like(x, order="C")
    elif not out.flags.c_contiguous:
        out[...] = gelu(x)
        return out
    rows, results = np.ravel(x), out.reshape(-1)
    for start in range(0, rows.size, _GELU_NUMBERS):
        part = slice(start, start + _GELU_NUMBERS)
        np.multiply(rows[part], normal_probability(rows[part]), out=results[part])
    return out


def inverse_root(x: Array, eps: float) -> Array:
    """Return 1 / sqrt(mean square + eps) of each row."""
    square = np.vecdot(x, x)[..., None] / x.dtype.type(x.shape[-1])
    result: Array = 1 / np.sqrt(square + x.dtype.type(eps))
    return result


def normal_probability(x: Array) -> Array:
    """Return (1 + erf(x / sqrt(2))) / 2."""
    if x.dtype != np.float32:
        from scipy.special import ndtr

        exact: Array = ndtr(x)
        return exact
    square = x * x
    u = square * np.float32(_ERF[-1])
    for coefficient in _ERF[-2:0:-1]:
        u += np.float32(coefficient)
        u *= square
    u += np.float32(_ERF[0])
    u *= x
    np.tanh(u, out=u)
    u += np.float32(1)
    u *= np.float32(0.5)
    return u


def tanh_probability(x: Array) -> Array:
    a, b = x.dtype.type(math.sqrt(2 / math.pi)), x.dtype.type(0.044715)
    result: Array = x.dtype.type(0.5) * (1 + np.tanh(a * x * (1 + b * x * x)))
    return result


def sigmoid(x: Array) -> Array:
    half = x.dtype.type(0.5)
    result: Array = half * (1 + np.tanh(half * x))
    return result


__all__ = ["gelu", "inverse_root", "layer_norm", "normal_probability", "sigmoid", "tanh_probability"]
