"""Training: a loss, an optimiser and a schedule."""

from __future__ import annotations  # short types in help()

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import kind_of
from ..options import Array
from ..validation import as_array, as_floats, as_ints, as_ndarray, as_real, broadcast_to


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
    wide = _wide(scores.dtype)
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
        What to change, in place; at least one array.
    rate : float, default 1e-3
    betas : (float, float), default (0.9, 0.99)
        Decay of the running means of gradients and of their squares. PyTorch's default is (0.9, 0.999).
    decay : float, default 0
        Decay of the parameters that are matrices.
    clip : float, default 1
        The longest that all gradients together, as one vector, may be; `math.inf` for without bound, as in PyTorch,
        where ``torch.nn.utils.clip_grad_norm_`` is a call of its own.

    Raises
    ------
    TypeError, ValueError
        There is no parameter, one is no array of floating point that can be written, or a number is out of range.

    Notes
    -----
    Running means are float32 for half types, whose smallest numbers are larger than squares of gradients often are, and
    a parameter is rounded once, when it is written. A change of less than half a unit in its last place is lost then:
    train a copy in float32 where such changes must add up.

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
        if not isinstance(parameters, Mapping):
            raise TypeError(f"parameters must map names to arrays, got {kind_of(parameters)}")
        if not parameters:
            raise ValueError("parameters must have at least one array, got none")
        for name, x in parameters.items():
            array = as_floats(f"parameters[{name!r}]", as_ndarray(f"parameters[{name!r}]", x))
            if not array.flags.writeable:
                raise ValueError(f"parameters[{name!r}] must be writeable, got a read-only array")
        self.parameters, self.rate, self.betas = parameters, as_real("rate", rate), _as_betas(betas)
        self.decay, self.clip = as_real("decay", decay), math.inf if clip == math.inf else as_real("clip", clip)
        if self.decay < 0:
            raise ValueError(f"decay must not be negative, got {self.decay}")
        if self.clip <= 0:
            raise ValueError(f"clip must be positive, got {self.clip}")
        self.mean = {name: np.zeros(x.shape, _wide(x.dtype)) for name, x in parameters.items()}
        self.square = {name: np.zeros_like(mean) for name, mean in self.mean.items()}
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
        TypeError, ValueError
            A parameter has no gradient, one of another shape, or one that is no array of floating point. Nothing has
            changed then.
        """
        scale, given = as_real("scale", scale), {}
        for name, x in self.parameters.items():
            if name not in grads:
                raise ValueError(f"grads must have the gradient of each parameter, and lacks {name}")
            given[name] = as_floats(f"grads[{name!r}]", grads[name])
            if given[name].shape != x.shape:
                raise ValueError(f"the gradient of {name} must have its shape, {x.shape}, got {given[name].shape}")
        grads = given
        self.steps += 1
        first, second = self.betas
        length = math.sqrt(sum(map(_square, grads.values())))
        shorten = min(1.0, self.clip / (length + 1e-12))
        rate = scale * self.rate * math.sqrt(1 - second**self.steps) / (1 - first**self.steps)
        for name, x in self.parameters.items():
            mean, square = self.mean[name], self.square[name]
            grad = grads[name] * mean.dtype.type(shorten)
            mean += (1 - first) * (grad - mean)
            square += (1 - second) * (grad * grad - square)
            value = x.astype(mean.dtype, copy=False)
            if self.decay and x.ndim > 1:
                value *= 1 - scale * self.rate * self.decay
            value -= rate * mean / (np.sqrt(square) + 1e-8)
            if value is not x:
                x[...] = value


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in which numbers of this one are computed."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def _square(grad: Array) -> float:
    """Return the sum of squares, in float64: squares of 1e20 are beyond the range of float32."""
    numbers = grad.ravel().astype(np.float64, copy=False)
    return float(np.dot(numbers, numbers))


def _as_betas(betas: Any) -> tuple[float, float]:
    try:
        first, second = betas
    except (TypeError, ValueError):
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}") from None
    pair = as_real("betas", first), as_real("betas", second)
    if not 0 <= min(pair) <= max(pair) < 1:
        raise ValueError(f"betas must be at least 0 and less than 1, got {pair}")
    return pair


def warmup_cosine(step: int, steps: int, warmup: int = 100) -> float:
    """Return the factor of the learning rate: from 0 to 1 over `warmup` steps, then down to 0 on a cosine, and 0 after.

    Examples
    --------
    >>> import numba_attention.nn as nn
    >>> [round(nn.warmup_cosine(n, 1000), 2) for n in (0, 99, 550, 1000)]
    [0.01, 1.0, 0.5, 0.0]
    """
    now, end, start = as_real("step", step), as_real("steps", steps), as_real("warmup", warmup)
    if now < 0:
        raise ValueError(f"step must not be negative, got {step}")
    if now < start:
        return (now + 1) / start
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (now - start) / max(1, end - start))))


__all__ = ["Adam", "cross_entropy", "warmup_cosine"]
