"""Validation of derivatives along a direction: tangents by name, and what a backend is asked for."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from ..options import Array, Gradients, Options
from ..validation import check_like, kind_of, lse_dtype_of
from .dense import BackwardProblem, build_backward

Kind = Literal["jvp", "closed", "open"]


class Direction(NamedTuple):
    """A direction in which the inputs move, or cotangents of their gradients; None is 0."""

    query: Array | None  # (*batch, H, L, E), and so on: as the inputs in `Problem`
    key: Array | None
    value: Array | None
    bias: Array | None  # (*batch, H, L, S)
    sinks: Array | None  # float64 (H,)


@dataclass(slots=True)
class SecondProblem:
    """One derivative along a direction. What it writes depends on the kind.

    "jvp": the tangents of out and lse. "closed": the tangents of the gradients, of which those of out and lse are
    inputs. "open": the same as if out and lse did not move, so that they are 0 there; the tangents of out and lse are
    written besides, and the row sums of the tangents of the gradients of scores.
    """

    kind: Kind
    gradient: BackwardProblem  # whose results are the tangents of the gradients; for "jvp" only its forward problem
    direction: Direction
    out_tangent: Array  # (*batch, H, L, Ev), contiguous, in the dtype of lse
    lse_tangent: Array  # (*batch, H, L), contiguous
    grad_out_tangent: Array | None = None  # (*batch, H, L, Ev)
    grad_lse_tangent: Array | None = None  # (*batch, H, L)
    score_sums: Array | None = None  # (*batch, H, L), contiguous: "open" only

    @property
    def sink_weights(self) -> Array:
        """The weights of the sinks, (*batch, H, L): 0 for rows that see neither key nor sink, and without sinks."""
        p = self.gradient.forward
        assert p.lse is not None
        if p.sinks is None:
            return np.zeros(p.lse.shape, p.lse.dtype)
        with np.errstate(all="ignore"):
            weights = np.where(np.isfinite(p.lse), np.exp(p.sinks[:, None] - p.lse), 0)
        return weights.astype(p.lse.dtype)


def _as_direction(name: str, tangents: Any, problem: BackwardProblem) -> Direction:
    """Check tangents, or cotangents of gradients: each has the shape and dtype of its input, or is None."""
    if not isinstance(tangents, tuple) or len(tangents) > len(Gradients._fields) or len(tangents) < 3:
        raise TypeError(
            f"{name} must be a numba_attention.Gradients(query, key, value, bias, sinks), with None for 0, "
            f"got {kind_of(tangents)}"
        )
    given = Gradients(*tangents)
    if given.mod_args is not None:
        raise NotImplementedError(f"{name}.mod_args must be None: arrays in mod_args have no second derivative")
    p, o = problem.forward, problem.options
    parts: list[Array | None] = []
    inputs = zip(("query", "key", "value"), problem.inputs, (p.query, p.key, p.value), strict=True)
    for part, of_caller, full in inputs:
        x = getattr(given, part)
        if x is not None:
            x = check_like(f"{name}.{part}", x, of_caller.shape, full.dtype)
            x = np.broadcast_to(x[None] if x.ndim == 2 else x, full.shape)
        parts.append(x)
    bias = sinks = None
    for part in ("bias", "sinks"):
        x, own = getattr(given, part), getattr(o, part)
        if x is not None:
            if own is None:
                raise ValueError(f"{name}.{part} must be None without {part}")
            own = np.asarray(own)
            check_like(f"{name}.{part}", x, own.shape, own.dtype)
    if given.bias is not None and p.bias is not None:
        bias = np.broadcast_to(given.bias, p.bias.shape)
    if given.sinks is not None:
        sinks = np.asarray(given.sinks, np.float64)
    return Direction(parts[0], parts[1], parts[2], bias, sinks)


def _results(p: Any) -> tuple[Array, Array]:
    """Room for the tangents of out and lse, in the precision of sums."""
    return np.empty(p.out.shape, lse_dtype_of(p.query)), np.empty(p.lse.shape, lse_dtype_of(p.query))


def _nothing(shape: tuple[int, ...], dtype: Any, /) -> Array:
    """An array that takes no memory, for what is not wanted."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def build_jvp(
    tangents: Any, query: Any, key: Any, value: Any, out: Array, lse: Array, options: Options
) -> SecondProblem:
    """Validate one `attention_jvp` call whose results are known, and allocate their tangents."""
    grad_out = _nothing(getattr(out, "shape", ()), getattr(out, "dtype", np.float32))
    gradient = build_backward(grad_out, query, key, value, out, lse, None, None, options, _nothing)
    return SecondProblem("jvp", gradient, _as_direction("tangents", tangents, gradient), *_results(gradient.forward))


def build_second(
    kind: Kind, name: str, tangents: Any, grad_out: Any, query: Any, key: Any, value: Any, out: Any, lse: Any,
    grad_lse: Any, options: Options,
) -> SecondProblem:  # fmt: skip
    """Validate a call that differentiates the backward pass, and allocate its results."""
    gradient = build_backward(grad_out, query, key, value, out, lse, grad_lse, None, options)
    problem = SecondProblem(kind, gradient, _as_direction(name, tangents, gradient), *_results(gradient.forward))
    if kind == "open":
        problem.score_sums = np.empty_like(problem.lse_tangent)
    return problem


def add_tangents(
    problem: SecondProblem, out_tangent: Any, lse_tangent: Any, grad_out_tangent: Any, grad_lse_tangent: Any
) -> None:
    """Validate the tangents of out, lse and their gradients, as the caller knows them, and add them to the problem."""
    p = problem.gradient.forward
    shape, flat = p.result.shape, p.result.ndim < p.out.ndim

    def full(name: str, x: Any, shape: tuple[int, ...], dtype: Any) -> Array:
        x = check_like(name, x, shape, dtype)
        result: Array = x[None] if flat else x
        return result

    assert p.lse is not None
    sums = p.lse.dtype
    problem.out_tangent = np.ascontiguousarray(full("out_tangent", out_tangent, shape, p.out.dtype), sums)
    problem.lse_tangent = np.ascontiguousarray(full("lse_tangent", lse_tangent, shape[:-1], sums))
    if grad_out_tangent is not None:
        problem.grad_out_tangent = full("grad_out_tangent", grad_out_tangent, shape, p.out.dtype)
    if grad_lse_tangent is not None:
        problem.grad_lse_tangent = full("grad_lse_tangent", grad_lse_tangent, shape[:-1], sums)
