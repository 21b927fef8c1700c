"""Training: a loss, an optimiser and a schedule."""

from __future__ import annotations  # short types in help()

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..options import Array
from ..validation import as_array, as_floats, as_ints, broadcast_to


def cross_entropy(scores: Array, target: ArrayLike, mask: ArrayLike | None = None) -> tuple[float, Array]:
    """Mean of ``-log(softmax(scores)[target])``, and its gradient.

    Parameters
    ----------
    scores : ndarray of float, shape (..., classes)
    target : array of int, shape (...)
        The right class of each row, from 0.
    mask : array of bool, broadcastable to (...), optional
        Which rows count; by default all. Other rows may have any target and any scores, and their gradient is 0.

    Returns
    -------
    loss : float
        0 if no row counts.
    grad : ndarray
        Gradient with respect to `scores`, of its shape and dtype.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or shape, or a row that counts has a target that is no class.

    Notes
    -----
    A loss is ``log(sum(exp(scores - max))) - (scores[target] - max)``, which is finite where the weight of the target
    underflows. Half types are computed in float32.

    Examples
    --------
    >>> import numpy as np, numba_attention.nn as nn
    >>> loss, grad = nn.cross_entropy(np.zeros((3, 2)), np.array([0, 1, 1]))
    >>> round(loss, 4), grad[0]
    (0.6931, array([-0.16666667,  0.16666667]))
    """
    scores, target = as_floats("scores", scores), as_ints("target", target)
    if target.shape != scores.shape[:-1] or not scores.ndim:
        raise ValueError(
            f"target must have the shape of scores without its last axis, {scores.shape[:-1]}, got {target.shape}"
        )
    counted = _counted(mask, target.shape)
    classes = scores.shape[-1]
    wrong = counted & ((target < 0) | (target >= classes))
    if wrong.any():
        raise ValueError(
            f"target must lie between 0 and {classes - 1}, got {target[wrong][0]}; leave rows out with mask="
        )
    number = int(counted.sum())
    if not number:
        return 0.0, np.zeros(scores.shape, scores.dtype)
    wide = np.float32 if scores.dtype.itemsize == 2 else scores.dtype
    p = np.where(counted[..., None], scores, 0).astype(wide, copy=False)
    p -= p.max(axis=-1, keepdims=True)
    places = np.where(counted, target, 0)[..., None]
    losses = -np.take_along_axis(p, places, -1)[..., 0]
    np.exp(p, out=p)
    total = p.sum(axis=-1, keepdims=True)
    losses += np.log(total[..., 0])
    p /= total
    np.put_along_axis(p, places, np.take_along_axis(p, places, -1) - 1, -1)
    p *= (counted / number)[..., None].astype(wide)
    return float(losses[counted].mean()), p.astype(scores.dtype, copy=False)


def _counted(mask: Any, shape: tuple[int, ...]) -> Array:
    """Return which rows count, as an array of bool of this shape."""
    if mask is None:
        return np.ones(shape, bool)
    given = as_array("mask", mask)
    if given.dtype != np.bool_:
        raise TypeError(f"mask must be boolean (True = the row counts), got {given.dtype}; compare or cast it")
    return broadcast_to("mask", given, shape)


class Adam:
    """The optimiser Adam, with decay of the weights apart from the gradients (AdamW).

    Parameters
    ----------
    parameters : dict of ndarray
        What to change, in place.
    rate : float, default 1e-3
    betas : (float, float)
        Decay of the running means of gradients and of their squares.
    decay : float, default 0
        Decay of the parameters that are matrices.
    clip : float, default 1
        The longest that all gradients together, as one vector, may be.

    References
    ----------
    .. [1] Kingma and Ba, "Adam", 2015, algorithm 1.
    .. [2] Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2.

    Examples
    --------
    >>> import numpy as np, numba_attention.nn as nn
    >>> x = {"x": np.array([3.0])}
    >>> adam = nn.Adam(x, rate=0.1)
    >>> for step in range(100):
    ...     adam.step({"x": 2 * x["x"]})
    >>> bool(abs(x["x"][0]) < 0.1)
    True
    """

    def __init__(
        self,
        parameters: Mapping[str, Array],
        rate: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        decay: float = 0.0,
        clip: float = 1.0,
    ) -> None:
        self.parameters, self.rate, self.betas, self.decay, self.clip = parameters, rate, betas, decay, clip
        self.mean = {name: np.zeros_like(x) for name, x in parameters.items()}
        self.square = {name: np.zeros_like(x) for name, x in parameters.items()}
        self.steps = 0

    def step(self, grads: Mapping[str, Array], scale: float = 1.0) -> None:
        """Change the parameters in place.

        Parameters
        ----------
        grads : dict of ndarray
            The gradient of each parameter, of its shape. Gradients by other names are left out.
        scale : float, default 1
            Factor of the learning rate, from a schedule.

        Raises
        ------
        ValueError
            A parameter has no gradient, or one of another shape. Nothing has changed then.
        """
        for name, x in self.parameters.items():
            if name not in grads:
                raise ValueError(f"grads must have the gradient of each parameter, and lacks {name}")
            if np.shape(grads[name]) != x.shape:
                raise ValueError(f"the gradient of {name} must have its shape, {x.shape}, got {np.shape(grads[name])}")
        self.steps += 1
        first, second = self.betas
        length = math.sqrt(sum(float(np.vdot(grads[name], grads[name])) for name in self.parameters))
        shorten = min(1.0, self.clip / (length + 1e-12))
        rate = scale * self.rate * math.sqrt(1 - second**self.steps) / (1 - first**self.steps)
        for name, x in self.parameters.items():
            grad, mean, square = grads[name] * x.dtype.type(shorten), self.mean[name], self.square[name]
            mean += (1 - first) * (grad - mean)
            square += (1 - second) * (grad * grad - square)
            if self.decay and x.ndim > 1:
                x *= 1 - scale * self.rate * self.decay
            x -= rate * mean / (np.sqrt(square) + 1e-8)


def warmup_cosine(step: int, steps: int, warmup: int = 100) -> float:
    """Return the factor of the learning rate: from 0 to 1 over `warmup` steps, then down to 0 on a cosine, and 0 after.

    Examples
    --------
    >>> import numba_attention.nn as nn
    >>> [round(nn.warmup_cosine(n, 1000), 2) for n in (0, 99, 550, 1000)]
    [0.01, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


__all__ = ["Adam", "cross_entropy", "warmup_cosine"]
