"""Validation of derivatives along a direction: tangents by name, and what a backend is asked for."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from ..errors import kind_of
from ..options import Array, Gradients, Options
from ..validation import check_like, lse_dtype_of
from . import dense, packed
from .dense import BackwardProblem, Empty, Problem, Reduce, weights_of_sinks
from .packed import _over, _over_tokens

Kind = Literal["jvp", "closed", "open"]
Starts = tuple[Any, Any]  # cu_seqlens_q and cu_seqlens_k of packed sequences


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

    Packed sequences lie in one array, so what the caller does not see has one batch element there: `rows` takes it from
    arrays of the forward problem.

    "jvp": the tangents of out and lse. "closed": the tangents of the gradients, of which those of out and lse are
    inputs. "open": the same as if out and lse did not move, so that they are 0 there; the tangents of out and lse are
    written besides, and the row sums of the tangents of the gradients of scores.
    """

    kind: Kind
    gradient: BackwardProblem  # whose results are the tangents of the gradients; for "jvp" only its forward problem
    direction: Direction
    out_tangent: Array  # (*batch, H, L, Ev), contiguous, in the dtype of lse; packed: (1, H, T_q, Ev)
    lse_tangent: Array  # (*batch, H, L), contiguous; packed: (1, H, T_q)
    grad_out_tangent: Array | None = None  # (*batch, H, L, Ev)
    grad_lse_tangent: Array | None = None  # (*batch, H, L)
    score_sums: Array | None = None  # as lse_tangent: "open" only

    def rows(self, x: Array) -> Array:
        """Return an array over batch, heads and rows so that each row is there once."""
        return x if self.gradient.forward.packing is None else x[:1]

    def as_out(self, x: Array) -> Array:
        """Return an array over batch, heads, rows and features in the shape and dtype of the caller's `out`."""
        p = self.gradient.forward
        x = x.astype(p.result.dtype, copy=False)
        if p.packing is None:
            return x.reshape(p.result.shape)
        return np.ascontiguousarray(x.reshape(x.shape[-3:]).swapaxes(0, 1))

    def as_lse(self, x: Array) -> Array:
        """Return an array over batch, heads and rows in the shape of the caller's `lse`."""
        lse = self.gradient.forward.result_lse
        assert lse is not None
        return x.reshape(lse.shape)

    @property
    def sink_weights(self) -> Array:
        """The weights of the sinks, of each row once: 0 for rows that see neither key nor sink, and without sinks."""
        p = self.gradient.forward
        assert p.lse is not None
        lse = self.rows(p.lse)
        if p.sinks is None:
            return np.zeros(lse.shape, lse.dtype)
        return weights_of_sinks(p.sinks, lse).astype(lse.dtype)


def _as_direction(name: str, tangents: Any, problem: BackwardProblem) -> Direction:
    """Check tangents, or cotangents of gradients: each has the shape and dtype of its input, or is None."""
    given = given_parts(name, tangents)
    p, o = problem.forward, problem.options
    parts: list[Array | None] = []
    inputs = zip(("query", "key", "value"), problem.inputs, (p.query, p.key, p.value), strict=True)
    for part, of_caller, full in inputs:
        x = getattr(given, part)
        if x is not None:
            x = check_like(f"{name}.{part}", x, of_caller.shape, full.dtype)
            if p.packing is not None:
                x = _over(x.swapaxes(0, 1), *p.batch)
            else:
                x = np.broadcast_to(x[None] if x.ndim == 2 else x, full.shape)
        parts.append(x)
    bias = sinks = None
    check_parts(name, given, o._asdict())
    if given.bias is not None and p.bias is not None:
        packs = p.packing is not None
        bias = _over_tokens(name, np.asarray(given.bias), p)[0] if packs else np.broadcast_to(given.bias, p.bias.shape)
    if given.sinks is not None:
        sinks = np.asarray(given.sinks, np.float64)
    return Direction(parts[0], parts[1], parts[2], bias, sinks)


def given_parts(name: str, tangents: Any) -> Gradients:
    """Check that tangents have names."""
    if not isinstance(tangents, tuple) or len(tangents) > len(Gradients._fields) or len(tangents) < 3:
        raise TypeError(
            f"{name} must be a numba_attention.Gradients(query, key, value, bias, sinks), with None for 0, "
            f"got {kind_of(tangents)}"
        )
    given = Gradients(*tangents)
    if given.mod_args is not None:
        raise NotImplementedError(f"{name}.mod_args must be None: arrays in mod_args have no second derivative")
    return given


def check_parts(name: str, given: Gradients, options: dict[str, Any]) -> None:
    """Check the tangents of options: each has the shape and dtype of its option, or is None."""
    for part in ("bias", "sinks"):
        x, own = getattr(given, part), options[part]
        if x is not None:
            if own is None:
                raise ValueError(f"{name}.{part} must be None without {part}")
            own = np.asarray(own)
            check_like(f"{name}.{part}", x, own.shape, own.dtype)


def as_starts(cu_seqlens_q: Any, cu_seqlens_k: Any) -> Starts | None:
    """Return the offsets of packed sequences, or None for arrays of `attention`."""
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k must both be given or both be None")
    return None if cu_seqlens_q is None else (cu_seqlens_q, cu_seqlens_k)


def build_forward(query: Any, key: Any, value: Any, starts: Starts | None, options: Options) -> Problem:
    """Validate a forward pass whose results nobody has yet."""
    if starts is None:
        return dense.build(query, key, value, options, None, True)
    return packed.build(query, key, value, *starts, options, None, True)


def build_gradient(
    grad_out: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, grad_lse: Any, starts: Starts | None,
    options: Options, empty: Empty = np.empty,
) -> BackwardProblem:  # fmt: skip
    """Validate a backward pass and allocate its gradients."""
    arrays = grad_out, query, key, value, out, lse, grad_lse
    if starts is None:
        return dense.build_backward(*arrays, None, options, empty)
    return packed.build_backward(*arrays, *starts, None, options, empty)


def finish(g: BackwardProblem, reduce: Reduce) -> Gradients:
    """Give each gradient the shape and dtype of its input."""
    return dense.finish(g, reduce) if g.forward.packing is None else packed.finish(g, reduce)


def _problem(kind: Kind, name: str, tangents: Any, gradient: BackwardProblem) -> SecondProblem:
    """Allocate the tangents of out and lse, in the precision of sums."""
    p = gradient.forward
    problem = SecondProblem(kind, gradient, _as_direction(name, tangents, gradient), p.out, p.out)
    out, real = problem.rows(p.out), lse_dtype_of(p.query)
    problem.out_tangent, problem.lse_tangent = np.empty(out.shape, real), np.empty(out.shape[:-1], real)
    return problem


def _nothing(shape: tuple[int, ...], dtype: Any, /) -> Array:
    """An array that takes no memory, for what is not wanted."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def build_jvp(
    tangents: Any, query: Any, key: Any, value: Any, out: Array, lse: Array, starts: Starts | None, options: Options
) -> SecondProblem:
    """Validate one `attention_jvp` call whose results are known, and allocate their tangents."""
    grad_out = _nothing(getattr(out, "shape", ()), getattr(out, "dtype", np.float32))
    gradient = build_gradient(grad_out, query, key, value, out, lse, None, starts, options, _nothing)
    return _problem("jvp", "tangents", tangents, gradient)


def build_second(kind: Kind, name: str, tangents: Any, gradient: BackwardProblem) -> SecondProblem:
    """Validate a call that differentiates the backward pass, and allocate its results."""
    problem = _problem(kind, name, tangents, gradient)
    if kind == "open":
        problem.score_sums = np.empty_like(problem.lse_tangent)
    return problem


def add_tangents(
    problem: SecondProblem, out_tangent: Any, lse_tangent: Any, grad_out_tangent: Any, grad_lse_tangent: Any
) -> None:
    """Validate the tangents of out, lse and their gradients, as the caller knows them, and add them to the problem."""
    p = problem.gradient.forward
    assert p.lse is not None
    assert p.result_lse is not None
    sums = p.lse.dtype
    of_out, of_lse = (p.result.shape, p.out.dtype), (p.result_lse.shape, sums)

    def full(name: str, x: Any, like: tuple[tuple[int, ...], Any]) -> Array:
        x = check_like(name, x, *like)
        if p.packing is not None:
            return _over(x.swapaxes(0, 1) if like is of_out else x, *p.batch)
        result: Array = x[None] if p.result.ndim < p.out.ndim else x
        return result

    out_tangent, lse_tangent = full("out_tangent", out_tangent, of_out), full("lse_tangent", lse_tangent, of_lse)
    problem.out_tangent = np.ascontiguousarray(problem.rows(out_tangent), sums)
    problem.lse_tangent = np.ascontiguousarray(problem.rows(lse_tangent))
    if grad_out_tangent is not None:
        problem.grad_out_tangent = full("grad_out_tangent", grad_out_tangent, of_out)
    if grad_lse_tangent is not None:
        problem.grad_lse_tangent = full("grad_lse_tangent", grad_lse_tangent, of_lse)
