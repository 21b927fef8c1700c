"""The CUDA backend: turns a `Problem`, whose arrays are headers of device memory, into launches."""

from typing import Any

from ..cuda import runtime
from ..options import Array
from ..problem import BackwardProblem, Problem

_WHY = "this version of numba-attention has no kernels for CUDA yet; copy the arrays to NumPy to use backend='cpu'"
on_device = True


def forward(problem: Problem) -> None:
    raise NotImplementedError(_WHY)


def backward(problem: BackwardProblem) -> None:
    raise NotImplementedError(_WHY)


def weights(problem: Problem) -> None:
    raise NotImplementedError(_WHY)


def reduce(x: Array, shape: tuple[int, ...], dtype: Any = None) -> Array:
    """Sum over the axes along which `shape` was broadcast to that of x, and convert to `dtype`."""
    raise NotImplementedError(_WHY)


def unusable() -> str | None:
    return runtime.unusable()
