"""The reference backend: textbook attention in NumPy and float64, one head at a time. It is the oracle of the tests."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ..mods.evaluate import Evaluation
from ..mods.rules import Rule, describe, find, vectorized
from ..options import Array
from ..problem.dense import NUMBERS, BackwardProblem, Origin, Problem
from ..problem.dense import sum_to as reduce  # noqa: F401

Index = tuple[int, ...]
on_device = False


def unusable() -> str | None:
    return None


def forward(problem: Problem) -> None:
    """Write ``problem.out`` and ``problem.lse``: softmax of the scores, times the values."""
    problem = with_dense_mask(problem)
    if problem.packing is not None:
        for _, part in _parts(problem):
            forward(part)
        return
    if problem.cache is not None:
        key, value = problem.cache.dense()
        problem = replace(problem, key=key, value=value, cache=None)
    rows = np.arange(problem.L)
    with np.errstate(all="ignore"):  # infinities and NaNs in the input are no error
        for b in np.ndindex(problem.batch):
            for h in range(problem.H):
                weights, lse, visible = _softmax(problem, b, h, rows)
                weights = weights * dropout_factors(problem, b, h, rows)
                value = _float64(problem.value[(*b, _key_head(problem, h))])
                problem.out[(*b, h)] = weighted_sum(weights, value, visible)
                if problem.lse is not None:
                    problem.lse[(*b, h)] = lse


def weights(problem: Problem) -> None:
    """Write the probabilities of the chosen heads and rows to ``problem.out``."""
    problem = with_dense_mask(problem)
    heads = np.arange(problem.H) if problem.heads is None else problem.heads
    rows = np.arange(problem.L) if problem.rows is None else problem.rows
    with np.errstate(all="ignore"):
        for b in np.ndindex(problem.batch):
            for n, h in enumerate(heads):
                problem.out[(*b, n)] = _softmax(problem, b, int(h), rows)[0] * dropout_factors(problem, b, int(h), rows)


def backward(problem: BackwardProblem) -> None:
    """Write the gradients: ``dS = P (dP - rowsum(dO * O) + dlse)``, Dao et al., "FlashAttention", 2022, appendix B.2.

    The probabilities P are computed from the lse that was passed, which may be that of a larger set of keys.
    """
    f = with_dense_mask(problem.forward)
    if f.packing is not None:
        for _, _, part in backward_parts(problem, f):
            backward(part)
        return
    assert f.lse is not None
    rows = np.arange(f.L)
    if problem.bias_shape is not None:
        problem.bias = np.zeros(problem.bias_shape)
    if f.sinks is not None:
        problem.sinks = np.zeros(f.H)
    if problem.mod_grads is not None:
        problem.mod_args = [np.zeros(f.mod_args[place].shape) for place in problem.mod_grads]
    rule = None if f.score_mod is None else find("score_mod", f.score_mod, describe(f.mod_args), f.mod_args)
    with np.errstate(all="ignore"):
        for b in np.ndindex(f.batch):
            sums = [np.zeros(x.shape[len(f.batch) :]) for x in (f.key, f.value)]
            for h in range(f.H):
                n = _key_head(f, h)
                query, key, value = (_float64(x) for x in (f.query[(*b, h)], f.key[(*b, n)], f.value[(*b, n)]))
                grad_out, out, lse = (_float64(x[(*b, h)]) for x in (problem.grad_out, f.out, f.lse))
                p, visible = probabilities(f, b, h)
                delta = np.sum(grad_out * out, axis=1)
                if problem.grad_lse is not None:
                    delta -= problem.grad_lse[(*b, h)]
                kept = dropout_factors(f, b, h, rows)
                ds = np.where(visible, p * (grad_out @ value.T * kept - delta[:, None]), 0)
                add_to_bias(problem, (*b, h), ds)
                if problem.sinks is not None and f.sinks is not None:
                    # A sink is one more key whose value is 0.
                    sink = f.sinks[h].astype(f.lse.dtype)  # rounded as lse is
                    valid = np.isfinite(lse) & (rows < (f.L if f.query_lengths is None else f.query_lengths[b]))
                    problem.sinks[h] -= np.sum(np.where(valid, np.exp(np.minimum(sink - lse, 0)) * delta, 0))
                if rule is not None:
                    ds = _through_mod(problem, rule, b, h, rows, ds)
                if f.softcap is not None:
                    ds = np.where(visible, ds * (1 - np.tanh(f.scale * (query @ key.T) / f.softcap) ** 2), 0)
                problem.query[(*b, h)] = f.scale * weighted_sum(ds, key, visible)
                sums[0][n] += f.scale * weighted_sum(ds.T, query, visible.T)
                sums[1][n] += weighted_sum((p * kept).T, grad_out, (visible & (kept > 0)).T)
            problem.key[b], problem.value[b] = sums


def probabilities(f: Problem, b: Index, h: int) -> tuple[Array, Array]:
    """Return the weights of one head by the lse that was passed, and which keys are visible."""
    assert f.lse is not None
    rows, lse = np.arange(f.L), _float64(f.lse[(*b, h)])
    weights, whole, visible = _softmax(f, b, h, rows)
    p = np.where(visible, np.exp(_scores(f, b, h, rows) - lse[:, None]), 0)
    # A large lse rounds away the log of the denominator. So P is the softmax of these keys instead, unless lse is that
    # of more keys than were passed.
    mantissa = np.finfo(f.lse.dtype).nmant
    complete = lse <= whole + np.abs(lse) * 2.0 ** (4 - mantissa)
    return np.where((complete & (np.abs(lse) > 2.0 ** (mantissa // 2 - 1)))[:, None], weights, p), visible


def with_dense_mask(p: Problem) -> Problem:
    """Expand a block mask to one element for each pair."""
    if p.blocks is None:
        return p
    mask = p.blocks.to_dense()
    extra = max(0, mask.ndim - len(p.batch) - 3)
    mask = np.broadcast_to(mask.reshape(mask.shape[extra:]), (*p.batch, p.H, p.L, p.S))
    return replace(p, mask=mask, blocks=None)


def scores_of(x: Array, b: int, own: tuple[slice, slice], packed: tuple[bool, bool]) -> Array:
    """Return the part of a mask or bias that belongs to the rows and columns of sequence b."""
    rows, columns = (
        part if is_packed else slice(part.stop - part.start) for part, is_packed in zip(own, packed, strict=True)
    )
    return x[b, :, rows, columns]


def _parts(p: Problem) -> list[tuple[tuple[slice, slice], Problem]]:
    """Return every sequence of a packed problem as a problem of its own, with its rows and columns."""
    parts = []
    assert p.packing is not None
    assert p.query_lengths is not None
    assert p.key_lengths is not None
    numbers = p.origin.numbers(len(p.packing.query_rows))
    for b, (row, L, column, S) in enumerate(zip(*p.packing[:4], strict=True)):
        rows, columns = slice(row, row + L), slice(column, column + S)

        def cut(x: Array | None, packed: tuple[bool, bool], b: int = b, own: Any = (rows, columns)) -> Array | None:
            return None if x is None else scores_of(x, b, own, packed)

        part = replace(
            p, query=p.query[b, :, rows], key=p.key[b, :, columns], value=p.value[b, :, columns],
            out=p.out[b, :, rows], lse=None if p.lse is None else p.lse[b, :, rows], batch=(), L=int(L), S=int(S),
            **{number.problem: x[b] for number in NUMBERS if isinstance(x := getattr(p, number.problem), np.ndarray)},
            alibi_slopes=None if p.alibi_slopes is None else p.alibi_slopes[b],
            mask=cut(p.mask, p.packing.mask), bias=cut(p.bias, p.packing.bias), packing=None,
            origin=Origin(int(numbers[b]), p.origin.head, p.origin.key),
        )  # fmt: skip
        parts.append(((rows, columns), part))
    return parts


def backward_parts(g: BackwardProblem, f: Problem) -> Iterator[tuple[slice, slice, BackwardProblem]]:
    """Yield each packed sequence with its rows and columns, and add the gradients that sequences share.

    f is the forward problem, without a block mask.
    """
    assert f.packing is not None
    g.bias = None if g.bias_shape is None else np.zeros(g.bias_shape)
    g.sinks = None if f.sinks is None else np.zeros(f.H)
    if g.mod_grads is not None:
        g.mod_args = [np.zeros(f.mod_args[place].shape) for place in g.mod_grads]
    for b, ((rows, columns), part) in enumerate(_parts(f)):
        grad_lse = None if g.grad_lse is None else g.grad_lse[b, :, rows]
        one = replace(
            g, forward=part, grad_out=g.grad_out[b, :, rows], grad_lse=grad_lse, query=g.query[b, :, rows],
            key=g.key[b, :, columns], value=g.value[b, :, columns], bias=None, sinks=None,
        )  # fmt: skip
        where: tuple[Any, ...] = ()
        if g.bias_shape is not None:
            n, H, own_rows, own_columns = g.bias_shape
            cuts = []
            for size, own, packed in zip((own_rows, own_columns), (rows, columns), f.packing.bias, strict=True):
                cuts.append(slice(0, 1) if size == 1 else own if packed else slice(0, own.stop - own.start))
            where = (b if n > 1 else 0, slice(None), *cuts)
            one.bias_shape = (
                H,
                *(1 if size == 1 else cut.stop - cut.start for size, cut in zip(g.bias_shape[2:], cuts, strict=True)),
            )
        yield rows, columns, one
        if g.bias is not None and one.bias is not None:
            g.bias[where] += one.bias
        if g.sinks is not None and one.sinks is not None:
            g.sinks += one.sinks
        for total, part_of_it in zip(g.mod_args or (), one.mod_args or (), strict=True):
            total += part_of_it


def _mod(problem: Problem, name: str, b: Index, h: int, rows: Array, *scores: Array) -> Array:
    """Call the plain Python function for every query row and key."""
    head, i, j = counted(problem, b, h, rows)
    call = vectorized(name, getattr(problem, name), problem.mod_args)
    result: Array = call(*scores, number_of(problem, b), head, i, j)
    return result


def number_of(problem: Problem, b: Index) -> int:
    """The number of a sequence, row by row over the leading dimensions."""
    numbers = problem.origin.numbers(math.prod(problem.batch))
    return int(numbers[np.ravel_multi_index(b, problem.batch) if b else 0])


def counted(problem: Problem, b: Index, h: int, rows: Array) -> tuple[int, Array, Array]:
    """Return head, positions (rows, 1) and keys (S,) as dropout and mods count them."""
    origin = problem.origin
    return h + origin.head, positions_of(problem, b, rows)[:, None] + origin.key, np.arange(problem.S) + origin.key


def _through_mod(g: BackwardProblem, rule: Rule, b: Index, h: int, rows: Array, ds: Array) -> Array:
    """Differentiate the score_mod: add to the gradients of mod_args, and return the gradient of its score."""
    f = g.forward
    head, i, j = counted(f, b, h, rows)
    arguments = {"score": natural_scores(f, b, h, rows), "batch": number_of(f, b), "head": head, "i": i, "j": j}
    if g.mod_args:
        program = rule.gradients(g.mod_grads or ())
        evaluation = Evaluation(program, f.mod_args, **arguments)
        for site, derivative in zip(program.sites, evaluation.outputs, strict=True):
            place, indices = evaluation.place(site)
            assert g.mod_grads is not None
            np.add.at(g.mod_args[g.mod_grads.index(place)], indices, np.where(ds == 0, 0, ds * derivative))
    _, slope = Evaluation(rule.with_slope, f.mod_args, **arguments).outputs
    return np.where(ds == 0, 0, ds * slope)


def add_to_bias(problem: BackwardProblem, index: Index, ds: Array) -> None:
    """Add the gradient of the scores of one head to that of the bias, and sum where the bias was broadcast."""
    if problem.bias is None:
        return
    stretched = tuple(axis for axis in (0, 1) if problem.bias.shape[axis - 2] == 1)
    where = tuple(min(i, n - 1) for i, n in zip(index, problem.bias.shape, strict=False))
    problem.bias[where] += ds.sum(axis=stretched, keepdims=True)


def _float64(array: Array) -> Array:
    return array.astype(np.float64)


def _key_head(problem: Problem, h: int) -> int:
    """Return the key/value head that query head h reads: consecutive query heads share one."""
    return h // (problem.H // problem.Hkv)


def _of_sequence(x: Any, b: Index) -> int:
    """Return the number of sequence b, where x is an array over the batch or one number for all sequences."""
    return int(x[b]) if isinstance(x, np.ndarray) else int(x)


def positions_of(problem: Problem, b: Index, rows: Array) -> Array:
    """Return the key position of each query row."""
    return rows + _of_sequence(problem.offset, b)


def _visible(problem: Problem, b: Index, h: int, rows: Array) -> Array:
    """Return which keys each row may attend to, bool (rows, S)."""
    i, p, j = rows[:, None], positions_of(problem, b, rows)[:, None], np.arange(problem.S)
    visible = np.ones((len(rows), problem.S), bool)
    if problem.left is not None:
        visible &= p - j <= problem.left
    if problem.right is not None:
        first = 0 if problem.prefix_lengths is None else problem.prefix_lengths[b]
        visible &= (j - p <= problem.right) | (j < first)
    if problem.query_lengths is not None:
        visible &= i < problem.query_lengths[b]
    if problem.key_lengths is not None:
        visible &= j < problem.key_lengths[b]
    if problem.mask is not None:
        visible &= problem.mask[(*b, h)][rows]
    if problem.bias is not None:
        visible &= _float64(problem.bias[(*b, h)][rows]) != -np.inf
    if problem.mask_mod is not None:
        visible &= _mod(problem, "mask_mod", b, h, rows)
    return visible


def natural_scores(problem: Problem, b: Index, h: int, rows: Array) -> Array:
    """Return the scores after scale and softcap, float64 (rows, S)."""
    query, key = problem.query[(*b, h)][rows], problem.key[(*b, _key_head(problem, h))]
    query, scale = _float64(query), problem.scale
    # The scale is applied first, before anything can overflow.
    scores = (scale * query) @ _float64(key).T if abs(scale) < 1 else scale * (query @ _float64(key).T)
    if problem.softcap is not None:
        scores = problem.softcap * np.tanh(scores / problem.softcap)
    return scores


def _scores(problem: Problem, b: Index, h: int, rows: Array) -> Array:
    """Return the scores, float64 (rows, S): scale, softcap, score_mod, ALiBi and bias, in this order.

    Finite scores are clamped to the range of the type that kernels compute in, as theirs are, so that `lse` is finite.
    """
    scores = natural_scores(problem, b, h, rows)
    if problem.score_mod is not None:
        scores = _mod(problem, "score_mod", b, h, rows, scores)
    if problem.alibi_slopes is not None:
        distance = np.abs(positions_of(problem, b, rows)[:, None] - np.arange(problem.S))
        scores = scores - problem.alibi_slopes[(*b, h)] * distance
    if problem.bias is not None:
        scores = scores + _float64(problem.bias[(*b, h)][rows])
    limit = float(np.finfo(np.float64 if problem.query.dtype == np.float64 else np.float32).max)
    return np.where(np.isfinite(scores), np.clip(scores, -limit, limit), scores)


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> Array:
    """Philox-4x32-10 of counters, arrays of words that broadcast; uint64 (4, ...), each below 2**32.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
    """
    word, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    x = [np.asarray(c).astype(np.uint64) & word for c in counter]
    for n in range(10):
        k0, k1 = (np.uint64((k + n * step) % 2**32) for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        first, second = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [(second >> shift) ^ x[1] ^ k0, second & word, (first >> shift) ^ x[3] ^ k1, first & word]
    return np.stack(np.broadcast_arrays(*x))


def dropout_factors(problem: Problem, b: Index, h: int, rows: Array) -> Array:
    """Return what dropout multiplies weights with, (rows, S): 0, or the inverse of the probability of being kept.

    Weight (i, j) has the half j % 2 of word j // 8 % 4 of the random words of its counter (position of i, group of j,
    head, sequence), where the group is j // 32 * 4 + j // 2 % 4.
    """
    if not problem.dropout:
        return np.ones((len(rows), problem.S))
    sequence = number_of(problem, b)
    j, seed = np.arange(problem.S), problem.seed % 2**64
    groups = np.arange(-(-problem.S // 32) * 4)
    head, positions, _ = counted(problem, b, h, rows)
    groups = groups + problem.origin.key // 8
    words = philox((positions & 0xFFFFFFFF, groups, head, sequence), (seed % 2**32, seed >> 32))
    of_key = words[j // 8 % 4, :, j // 32 * 4 + j // 2 % 4].T
    bits = of_key >> (j % 2 * 16).astype(np.uint64) & np.uint64(0xFFFF)
    return np.where(bits >= problem.dropout, 2**16 / (2**16 - problem.dropout), 0)


def _softmax(problem: Problem, b: Index, h: int, rows: Array) -> tuple[Array, Array, Array]:
    """Return the weights (rows, S), the log of their denominators (rows,), and which keys are visible."""
    visible = _visible(problem, b, h, rows)
    scores = _scores(problem, b, h, rows)
    if problem.score_mod is not None:
        visible &= scores != -np.inf  # a score_mod may hide keys
    scores = np.where(visible, scores, -np.inf)
    sink = np.full((len(rows), 1), -np.inf)  # -inf stands for no sink
    if problem.sinks is not None:
        valid = rows < (problem.L if problem.query_lengths is None else problem.query_lengths[b])
        sink[valid] = problem.sinks[h]
    highest = np.max(np.concatenate([scores, sink], axis=1), axis=1, keepdims=True)
    highest[highest == -np.inf] = 0  # where there is nothing to attend to: exp(-inf - 0) = 0
    exponentials = np.exp(scores - highest)
    denominator = np.sum(exponentials, axis=1, keepdims=True) + np.exp(sink - highest)
    lse = highest + np.log(denominator)
    return np.where(visible, exponentials / denominator, 0), lse[:, 0], visible


def weighted_sum(weights: Array, value: Array, visible: Array) -> Array:
    """Return ``weights @ value``, in which values that a row does not see add 0 even if they are NaN or infinite."""
    finite = np.isfinite(value)
    out: Array = weights @ np.where(finite, value, 0)
    for j in np.flatnonzero(~finite.all(axis=1)):
        rest = np.where(finite[j], 0, weights[:, j, None] * value[j])
        out += np.where(visible[:, j, None], rest, 0)
    return out
