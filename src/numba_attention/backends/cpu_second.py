"""Derivatives along a direction of the CPU backend: the record of the direction, and what is a number for each row."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from ..cpu.params import OFFSETS, SECOND, TANGENTS
from ..options import Array
from ..problem.dense import Problem
from ..problem.second import Direction, SecondProblem
from . import cpu, cpu_backward
from .records import address_of, compact, room_for, starts_of, stored, strides_of

_FULL = (np.dtype(np.float32), np.dtype(np.float64))


def run(problem: SecondProblem, online: bool = False) -> None:
    """Write what the kind of the problem asks for; if `online`, out and lse too."""
    p = problem.gradient.forward
    if p.query.dtype not in _FULL:
        _run_widened(problem)
        return
    of_results, of_gradients = problem.kind != "closed", problem.kind != "jvp"
    g, u = problem.gradient, problem.direction
    if of_results and not online:
        problem.lse_tangent[...] = 0 if u.sinks is None else _times(problem.sink_weights, u.sinks[:, None])
    moved_delta = None if of_results else _moved_delta(problem)
    record = np.zeros(1, SECOND)
    own = {name: getattr(u, name) for name in TANGENTS[:4]} | {"grad_out": problem.grad_out_tangent}
    if u.bias is not None:
        own["bias"] = compact(u.bias, problem.lse_tangent.dtype)
    offsets = np.zeros(math.prod(p.batch), OFFSETS)
    rows = p.out.shape[-2]  # of all sequences, where they are packed
    offsets["first"] = np.arange(len(offsets)) * p.H * rows if p.packing is None else p.packing.query_starts
    record["head_rows"] = rows
    for name, array in own.items():
        if array is not None and array.size:
            record[name] = address_of(array)
            offsets[name] = starts_of(name, array, p)
            for field, stride in strides_of(name, array, len(p.batch)).items():
                record[field] = stride
    record["online"] = online
    record["offsets"], record["of_results"], record["of_gradients"] = address_of(offsets), of_results, of_gradients
    for name, array in (
        ("out_tangent", problem.out_tangent), ("lse_tangent", problem.lse_tangent), ("delta_tangent", moved_delta),
        ("score_sums", problem.score_sums),
    ):  # fmt: skip
        record[name] = address_of(array)
    kept = (offsets, own, moved_delta)
    delta = cpu_backward.run(
        g if of_gradients else replace(g, bias_shape=None), cpu_backward.Along(record, of_gradients, kept)
    )
    if of_gradients and p.sinks is not None and delta is not None:
        g.sinks = _of_sinks(problem, p, delta, moved_delta)


def run_with_forward(problem: SecondProblem, forward: Problem) -> None:
    """Write out and lse, and their tangents: in one sweep, where nothing is needed of lse beforehand.

    Rows in which some number is not finite are taken from the forward pass, which has its own ways with them.
    """
    p, rows = problem.gradient.forward, problem.rows
    assert p.lse is not None
    if p.query.dtype not in _FULL:
        single = _widened(problem)
        wide = single.gradient.forward
        run_with_forward(single, replace(forward, query=wide.query, key=wide.key, value=wide.value, out=wide.out))
        stored(p.out)[...] = stored(wide.out)
        return
    if problem.direction.sinks is not None:
        cpu.forward(forward)
        run(problem)
        return
    run(problem, online=True)
    results = rows(p.out), problem.out_tangent, rows(p.lse), problem.lse_tangent
    with np.errstate(all="ignore"):
        lost = np.isnan(results[2]) | ~np.isfinite(results[3])
        for x in results[:2]:
            lost |= ~np.isfinite(x).all(-1)
    if lost.any():
        online = [x.copy() for x in results]
        cpu.forward(forward)
        run(problem)
        for x, other in zip(results, online, strict=True):
            np.copyto(x, other, where=~(lost[..., None] if x.ndim > lost.ndim else lost))


def _times(weights: Array, x: Any) -> Array:
    """A weight of 0 gives 0, whatever it is multiplied by."""
    with np.errstate(all="ignore"):
        product: Array = np.where(weights == 0, 0, weights * x)
    return product


def _moved_delta(problem: SecondProblem) -> Array:
    """The tangents of rowsum(dO * O) - dlse."""
    g, rows = problem.gradient, problem.rows
    real = problem.lse_tangent.dtype
    with np.errstate(all="ignore"):
        total = np.einsum("...e,...e->...", rows(g.grad_out), problem.out_tangent, dtype=real)
        if problem.grad_out_tangent is not None:
            moved, out = rows(problem.grad_out_tangent), rows(g.forward.out)
            total = total + np.einsum("...e,...e->...", moved, out, dtype=real)
        if problem.grad_lse_tangent is not None:
            total = total - rows(problem.grad_lse_tangent)
    return np.ascontiguousarray(total, real)


def _of_sinks(problem: SecondProblem, p: Problem, delta: Array, moved_delta: Array | None) -> Array:
    """The tangent of the gradient of the sinks, from numbers of the rows: a sink is one more key, whose value is 0."""
    moved: Any = 0.0 if problem.direction.sinks is None else problem.direction.sinks[:, None]
    with np.errstate(all="ignore"):
        change = moved * delta
        if moved_delta is not None:
            change = (moved - problem.lse_tangent) * delta + moved_delta
    parts = _times(problem.sink_weights, change)
    total: Array = -parts.sum(axis=-1).sum(axis=tuple(range(p.out.ndim - 3)))
    return total.astype(delta.dtype)


def _run_widened(problem: SecondProblem) -> None:
    """Compute half types by float32 copies of the inputs: what a derivative loses by rounding, it loses here once."""
    g, single = problem.gradient, _widened(problem)
    run(single)
    if problem.kind != "jvp":
        for name in ("query", "key", "value"):
            stored(getattr(g, name))[...] = stored(getattr(single.gradient, name))
        g.bias, g.sinks = single.gradient.bias, single.gradient.sinks


def _widened(problem: SecondProblem) -> SecondProblem:
    """The problem with float32 copies of its arrays; what is written in the precision of sums is the same array."""
    g, u = problem.gradient, problem.direction
    p = g.forward

    def wide(x: Array | None) -> Any:
        return None if x is None else compact(x, np.float32)

    forward = replace(p, query=wide(p.query), key=wide(p.key), value=wide(p.value), out=wide(p.out))
    results: dict[str, Any] = {name: room_for(getattr(g, name), np.float32) for name in ("query", "key", "value")}
    return replace(
        problem,
        gradient=replace(g, forward=forward, grad_out=wide(g.grad_out), **results),
        direction=Direction(wide(u.query), wide(u.key), wide(u.value), wide(u.bias), u.sinks),
        grad_out_tangent=wide(problem.grad_out_tangent),
    )
