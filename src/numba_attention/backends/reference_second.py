"""Second derivatives of the reference: the formulas of docs/second.md in float64, one head at a time."""

from dataclasses import replace
from typing import Any

import numpy as np

from ..mods.evaluate import Evaluation
from ..mods.rules import describe, find
from ..options import Array
from ..problem.dense import Problem
from ..problem.second import Direction, SecondProblem
from . import reference as textbook


def run(problem: SecondProblem) -> None:
    """Write what the kind of the problem asks for."""
    g, u = problem.gradient, problem.direction
    f = textbook.with_dense_mask(g.forward)
    if f.packing is not None:
        for n, (rows, columns, one) in enumerate(textbook.backward_parts(g, f)):
            moved_bias = None if u.bias is None else textbook.scores_of(u.bias, n, (rows, columns), f.packing.bias)
            run(
                replace(
                    problem, gradient=one,
                    direction=Direction(
                        _cut(u.query, rows), _cut(u.key, columns), _cut(u.value, columns), moved_bias, u.sinks
                    ),
                    **{name: _cut(getattr(problem, name), rows) for name in _OF_ROWS},
                )
            )  # fmt: skip
        return
    if problem.kind != "jvp":
        g.bias = None if g.bias_shape is None else np.zeros(g.bias_shape)
        g.sinks = None if f.sinks is None else np.zeros(f.H)
    dense = replace(problem, gradient=replace(g, forward=f))
    with np.errstate(all="ignore"):
        for b in np.ndindex(f.batch):
            sums = [np.zeros(x.shape[len(f.batch) :]) for x in (f.key, f.value)]
            for h in range(f.H):
                _one_head(dense, b, h, sums)
            if problem.kind != "jvp":
                g.key[b], g.value[b] = sums


def run_with_forward(problem: SecondProblem, forward: Problem) -> None:
    """Write the results, and then their tangents, of packed sequences by the rounded results."""
    textbook.forward(forward)
    if forward.packing is not None:
        run(problem)
        return
    g, exact = problem.gradient, np.empty(forward.out.shape)
    textbook.forward(replace(forward, out=exact))
    run(replace(problem, gradient=replace(g, forward=replace(g.forward, out=exact))))


_OF_ROWS = ("out_tangent", "lse_tangent", "grad_out_tangent", "grad_lse_tangent", "score_sums")


def _cut(x: Array | None, rows: slice) -> Any:
    """Return the rows of one packed sequence."""
    return None if x is None else x[0, :, rows]


def _slopes(f: Problem, b: Any, h: int) -> tuple[Array, Array]:
    """First and second derivative of softcap and score_mod with respect to scaled scores."""
    rows = np.arange(f.L)
    scores = textbook.natural_scores(f, b, h, rows)
    first, second = np.ones_like(scores), np.zeros_like(scores)
    if f.softcap is not None:
        t = scores / f.softcap
        first, second = 1 - t**2, -2 * t * (1 - t**2) / f.softcap
    if f.score_mod is not None:
        rule = find("score_mod", f.score_mod, describe(f.mod_args), f.mod_args)
        head, i, j = textbook.counted(f, b, h, rows)
        arguments = {"score": scores, "batch": textbook.number_of(f, b), "head": head, "i": i, "j": j}
        _, slope, curve = Evaluation(rule.with_curve, f.mod_args, **arguments).outputs
        first, second = slope * first, curve * first**2 + slope * second
    return first, second


def _one_head(problem: SecondProblem, b: Any, h: int, sums: list[Array]) -> None:
    g, u = problem.gradient, problem.direction
    f, n = g.forward, h // (g.forward.H // g.forward.Hkv)
    assert f.lse is not None
    rows = np.arange(f.L)

    def head(x: Array | None, h: int, like: Array) -> Array:
        return np.zeros(like.shape) if x is None else x[(*b, h)].astype(np.float64)

    def times(x: Array, y: Array) -> Array:  # what is hidden or weightless gives 0, whatever it is
        return np.where((x == 0) | (y == 0), 0, x * y)

    q, k, v = (x.astype(np.float64) for x in (f.query[(*b, h)], f.key[(*b, n)], f.value[(*b, n)]))
    dq, dk, dv = head(u.query, h, q), head(u.key, n, k), head(u.value, n, v)
    out, lse = f.out[(*b, h)].astype(np.float64), f.lse[(*b, h)].astype(np.float64)
    p, visible = textbook.probabilities(f, b, h)
    kept = textbook.dropout_factors(f, b, h, rows)
    visible = visible & (p != 0)
    first, second = _slopes(f, b, h)
    dz = f.scale * (dq @ k.T + q @ dk.T)
    ds = np.where(visible, times(first, dz) + head(u.bias, h, p), 0)
    sink, dsink = np.zeros(f.L), 0.0 if u.sinks is None else float(u.sinks[h])
    if f.sinks is not None:
        sink = np.where(np.isfinite(lse), np.exp(f.sinks[h] - lse), 0)
    weighted = textbook.weighted_sum
    if problem.kind != "closed":
        mu = (p * ds).sum(1) + sink * dsink
        problem.lse_tangent[(*b, h)] = mu
        own = weighted(p * kept * ds, v, visible) + weighted(p * kept, dv, visible) - mu[:, None] * out
        problem.out_tangent[(*b, h)] = own
        if problem.kind == "jvp":
            return
    grad_out = g.grad_out[(*b, h)].astype(np.float64)
    grad_out_tangent = head(problem.grad_out_tangent, h, grad_out)
    delta = (grad_out * out).sum(1) - (0 if g.grad_lse is None else g.grad_lse[(*b, h)])
    mu = ddelta = np.zeros(f.L)
    if problem.kind == "closed":
        mu = problem.lse_tangent[(*b, h)].astype(np.float64)
        ddelta = (grad_out * problem.out_tangent[(*b, h)]).sum(1) + (grad_out_tangent * out).sum(1)
        if problem.grad_lse_tangent is not None:
            ddelta = ddelta - problem.grad_lse_tangent[(*b, h)]
    off = kept * (grad_out @ v.T) - delta[:, None]
    moved = np.where(visible, p * (ds - mu[:, None]), 0)  # the tangent of P
    d = np.where(visible, p * off, 0)
    dd = np.where(visible, moved * off + p * (kept * (grad_out @ dv.T + grad_out_tangent @ v.T) - ddelta[:, None]), 0)
    if problem.score_sums is not None:
        problem.score_sums[(*b, h)] = dd.sum(1)
    textbook.add_to_bias(g, (*b, h), dd)
    if g.sinks is not None:
        g.sinks[h] -= np.where(sink == 0, 0, sink * ((dsink - mu) * delta + ddelta)).sum()
    of_product = times(d, first)
    moved_product = times(dd, first) + times(times(second, dz), d)
    g.query[(*b, h)] = f.scale * (weighted(moved_product, k, visible) + weighted(of_product, dk, visible))
    seen = visible.T
    sums[0][n] += f.scale * (weighted(moved_product.T, q, seen) + weighted(of_product.T, dq, seen))
    sums[1][n] += weighted((moved * kept).T, grad_out, seen) + weighted((p * kept).T, grad_out_tangent, seen)
