"""The place of the CUDA backend; this version has none, and says so."""

from ..problem import BackwardProblem, Problem

_WHY = "this version of numba-attention has no CUDA backend yet; copy the arrays to NumPy to use backend='cpu'"


def forward(problem: Problem) -> None:
    raise NotImplementedError(_WHY)


def backward(problem: BackwardProblem) -> None:
    raise NotImplementedError(_WHY)


def weights(problem: Problem) -> None:
    raise NotImplementedError(_WHY)


def unusable() -> str | None:
    return _WHY
