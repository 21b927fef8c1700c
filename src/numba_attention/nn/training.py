"""Training: a loss, an optimiser and a schedule."""

from __future__ import annotations  # short types in help()

import math
from collections.abc import Mapping

import numpy as np

from ..options import Array


def cross_entropy(scores: Array, target: Array, mask: Array | None = None) -> tuple[float, Array]:
    """Mean of ``-log(softmax(scores)[target])``, and its gradient.

    Parameters
    ----------
    scores : ndarray, shape (..., classes)
    target : ndarray of int, shape (...)
        The right class of each row.
    mask : ndarray of bool, shape (...), optional
        Which rows count; by default all.

    Returns
    -------
    loss : float
    grad : ndarray
        Gradient with respect to `scores`.

    Examples
    --------
    >>> import numpy as np, numba_attention.nn as nn
    >>> loss, grad = nn.cross_entropy(np.zeros((3, 2)), np.array([0, 1, 1]))
    >>> round(loss, 4), grad[0]
    (0.6931, array([-0.16666667,  0.16666667]))
    """
    rows = np.ones(np.shape(target), bool) if mask is None else np.asarray(mask)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    at_target = np.take_along_axis(p, target[..., None], -1)
    losses = -np.log(np.maximum(at_target[..., 0], np.finfo(p.dtype).tiny))
    np.put_along_axis(p, target[..., None], at_target - 1, -1)
    p *= (rows / rows.sum())[..., None].astype(p.dtype)
    return float(losses[rows].mean()), p


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
        """Change the parameters in place; `scale` is that of the learning rate, from a schedule."""
        self.steps += 1
        first, second = self.betas
        length = math.sqrt(sum(float(np.vdot(g, g)) for g in grads.values()))
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
    """Return the factor of the learning rate: from 0 to 1 over `warmup` steps, then down to 0 on a cosine.

    Examples
    --------
    >>> import numba_attention.nn as nn
    >>> [round(nn.warmup_cosine(n, 1000), 2) for n in (0, 99, 550, 1000)]
    [0.01, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


__all__ = ["Adam", "cross_entropy", "warmup_cosine"]
