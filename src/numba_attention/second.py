"""Derivatives of `attention` along a direction, and derivatives of its gradients."""

from __future__ import annotations  # short types in help()

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike

from .backends import Backend, second_derivatives, select
from .merging import merge_jvp as _merge_jvp
from .options import Array, Gradients, OptionArguments, SecondGradients, Tangents, gather, takes_options
from .problem.second import (
    SecondProblem,
    add_tangents,
    as_starts,
    build_forward,
    build_gradient,
    build_jvp,
    build_second,
    finish,
)
from .validation import as_flag


@takes_options()
def attention_jvp(
    tangents: Gradients,
    query: Array,
    key: Array,
    value: Array,
    *,
    out: Array | None = None,
    lse: Array | None = None,
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_k: ArrayLike | None = None,
    backend: str | None = None,
    **options: Unpack[OptionArguments],
) -> Tangents:
    r"""Derivative of `attention` along a direction: a Jacobian-vector product, in linear memory.

    Parameters
    ----------
    tangents : Gradients
        The direction, a named tuple (query, key, value, bias, sinks): each of the shape and dtype of its argument, or
        None for 0, which takes no product. Its last field, `mod_args`, must be None.
    query : ndarray, shape (..., H, L, E)
        float32, float64, float16 or ``ml_dtypes.bfloat16`` on the host, of any strides; (L, E) is one head.
    key : ndarray, shape (..., Hkv, S, E)
        dtype of `query`; H must be a multiple of Hkv. Leading dimensions broadcast.
    value : ndarray, shape (..., Hkv, S, Ev)
        dtype of `query`; Ev may differ from E.
    out, lse : ndarray, shape (..., H, L, Ev) and (..., H, L), optional
        What `attention` returned with ``return_lse=True`` for the same arguments, if it is known: pass both or neither.
    cu_seqlens_q, cu_seqlens_k : array of int, shape (n + 1,), optional
        Offsets of packed sequences: pass both or neither. Arrays are then as in `attention_varlen`: `query` and what
        belongs to it (T_q, H, E or Ev), `key` and `value` (T_k, Hkv, E or Ev), `lse` and what belongs to it (H, T_q).
    **options
        Every option of `attention`, from `mask` to `seed`, by the names in the signature above: their types, shapes and
        meanings stand in ``help(numba_attention.attention)`` and, with offsets of packed sequences, in that of
        `attention_varlen`. Only `bias` and `sinks` can move; the others, `mod_args` and
        `alibi_slopes` among them, are constants.
    backend : {"auto", "cpu", "reference"}, optional
        Overrides `set_backend` and `use_backend` for this call. "cuda" has no second derivatives.

    Returns
    -------
    Tangents
        Named tuple (out, lse, out_tangent, lse_tangent): `out` and its tangent have the shape (..., H, L, Ev) and the
        dtype of `query`, `lse` and its tangent (..., H, L) in float32 (float64 for float64 input). A row that may
        attend to nothing has tangents of 0.

    Raises
    ------
    TypeError
        `tangents` is not a `Gradients`, or an argument has a dtype or type that cannot be taken.
    ValueError
        A shape, length or option is out of range, a tangent does not have the shape and dtype of its argument or
        belongs to one that was not passed, or only one of `out` and `lse`, or of the offsets, was passed.
    NotImplementedError
        The backend "cuda" was chosen, also by arrays on a GPU, or a tangent for `mod_args` was given.
    BackendUnavailableError
        The backend that was asked for cannot run here.

    See Also
    --------
    attention_backward_jvp : the derivative of the gradients along a direction.
    attention_double_backward : the same in reverse mode.

    Notes
    -----
    With ``dS = scale (dQ K.T + Q dK.T) + dbias`` the tangents are ``dlse = rowsum(P * dS)`` and
    ``dO = (P * dS) V + P dV - dlse * O``: five products for each pair of a query and a key, and six with `out` and
    `lse`, in one sweep with an online softmax, where `attention` takes two. See the page "Second derivatives".

    References
    ----------
    .. [1] Baydin et al., "Automatic Differentiation in Machine Learning: a Survey", 2018, section 3.1.

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, dq = rng.standard_normal((4, 2, 10, 8))
    >>> moved = na.attention_jvp(na.Gradients(dq, None, None), q, k, v)
    >>> difference = (na.attention(q + 1e-5 * dq, k, v) - na.attention(q - 1e-5 * dq, k, v)) / 2e-5
    >>> bool(np.allclose(moved.out_tangent, difference))
    True
    """
    settings = gather(attention_jvp, options)
    chosen = select(backend, query, key, value)
    second = second_derivatives(chosen)
    starts = as_starts(cu_seqlens_q, cu_seqlens_k)
    if (out is None) != (lse is None):
        raise ValueError("out and lse must both be given or both be None")
    forward = None
    if out is None or lse is None:
        forward = build_forward(query, key, value, starts, settings)
        assert forward.result_lse is not None
        out, lse = forward.result, forward.result_lse
    problem = build_jvp(tangents, query, key, value, out, lse, starts, settings)
    if forward is None:
        second.run(problem)
    else:
        second.run_with_forward(problem, forward)
    p = problem.gradient.forward
    assert p.result_lse is not None
    return Tangents(p.result, p.result_lse, *_tangents(problem))


@takes_options()
def attention_backward_jvp(
    tangents: Gradients,
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array,
    out_tangent: Array,
    lse_tangent: Array,
    *,
    grad_lse: Array | None = None,
    grad_out_tangent: Array | None = None,
    grad_lse_tangent: Array | None = None,
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_k: ArrayLike | None = None,
    backend: str | None = None,
    **options: Unpack[OptionArguments],
) -> tuple[Gradients, Gradients]:
    r"""Gradients of `attention` and their derivative along a direction: a Hessian-vector product, in linear memory.

    Parameters
    ----------
    tangents : Gradients
        The direction, a named tuple (query, key, value, bias, sinks): each of the shape and dtype of its argument, or
        None for 0, which takes no product. Its last field, `mod_args`, must be None.
    grad_out : ndarray, shape (..., H, L, Ev)
        Gradient of some loss with respect to `out`, in the dtype of `query`.
    query : ndarray, shape (..., H, L, E)
        float32, float64, float16 or ``ml_dtypes.bfloat16`` on the host, of any strides; (L, E) is one head.
    key : ndarray, shape (..., Hkv, S, E)
        dtype of `query`; H must be a multiple of Hkv. Leading dimensions broadcast.
    value : ndarray, shape (..., Hkv, S, Ev)
        dtype of `query`; Ev may differ from E.
    out, lse : ndarray, shape (..., H, L, Ev) and (..., H, L)
        What `attention` returned with ``return_lse=True``.
    out_tangent, lse_tangent : ndarray, shape (..., H, L, Ev) and (..., H, L)
        What `attention_jvp` returned for this direction, in the dtypes of `out` and `lse`.
    grad_lse : ndarray, shape (..., H, L), optional
        Gradient of the loss with respect to `lse`, in its dtype, where `lse` was used too.
    grad_out_tangent : ndarray, shape (..., H, L, Ev), optional
        Tangent of `grad_out`, in its dtype, where it moves too: of a loss that is not linear in `out`.
    grad_lse_tangent : ndarray, shape (..., H, L), optional
        The same of `grad_lse`.
    cu_seqlens_q, cu_seqlens_k : array of int, shape (n + 1,), optional
        Offsets of packed sequences: pass both or neither. Arrays are then as in `attention_varlen`: `query` and what
        belongs to it (T_q, H, E or Ev), `key` and `value` (T_k, Hkv, E or Ev), `lse` and what belongs to it (H, T_q).
    **options
        Every option of `attention`, from `mask` to `seed`, by the names in the signature above: their types, shapes and
        meanings stand in ``help(numba_attention.attention)`` and, with offsets of packed sequences, in that of
        `attention_varlen`. Pass what `attention` was called with.
    backend : {"auto", "cpu", "reference"}, optional
        Overrides `set_backend` and `use_backend` for this call. "cuda" has no second derivatives.

    Returns
    -------
    gradients : Gradients
        What `attention_backward` returns: each of the shape and dtype of its argument, None for a bias or sinks that
        were not passed, and for `mod_args`.
    tangents : Gradients
        Their derivative along the direction, of the same shapes and dtypes.

    Raises
    ------
    TypeError
        `tangents` is not a `Gradients`, or an argument has a dtype or type that cannot be taken.
    ValueError
        A shape, length or option is out of range, a tangent does not have the shape and dtype of its argument or
        belongs to one that was not passed, or only one of the offsets was passed.
    NotImplementedError
        The backend "cuda" was chosen, also by arrays on a GPU, or a tangent for `mod_args` was given.
    BackendUnavailableError
        The backend that was asked for cannot run here.

    See Also
    --------
    attention_double_backward : the same product where the gradients have cotangents.

    Notes
    -----
    With ``D = P * (dP - delta)``, ``dP = dO V.T`` and ``delta = rowsum(dO * O) - dlse``, the gradient of the scores
    moves by ``P * ((dS - mu) * (dP - delta) + ddP - ddelta)``, where mu is the tangent of `lse`. That takes 17 products
    for each pair of a query and a key, five of them for the gradients themselves, in O(L + S) memory for each head. See
    the page "Second derivatives".

    References
    ----------
    .. [1] Pearlmutter, "Fast Exact Multiplication by the Hessian", 1994.

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, dq, g = rng.standard_normal((5, 2, 10, 8))
    >>> u = na.Gradients(dq, None, None)
    >>> moved = na.attention_jvp(u, q, k, v)
    >>> grads, tangents = na.attention_backward_jvp(u, g, q, k, v, *moved)
    >>> def gradient(t):
    ...     out, lse = na.attention(q + t * dq, k, v, return_lse=True)
    ...     return na.attention_backward(g, q + t * dq, k, v, out, lse).key
    >>> bool(np.allclose(tangents.key, (gradient(1e-5) - gradient(-1e-5)) / 2e-5))
    True
    """
    settings = gather(attention_backward_jvp, options)
    chosen = select(backend, grad_out, query, key, value)
    arguments = grad_out, query, key, value, out, lse, grad_lse, as_starts(cu_seqlens_q, cu_seqlens_k), settings
    moved = out_tangent, lse_tangent, grad_out_tangent, grad_lse_tangent
    problem = _along(chosen, tangents, arguments, moved)
    first = build_gradient(*arguments)
    chosen.backward(first)
    return finish(first, chosen.reduce), _moved_gradients(chosen, problem)


def gradient_tangents(
    tangents: Gradients, grad_out: Array, query: Array, key: Array, value: Array, *, out: Array, lse: Array,
    out_tangent: Array, lse_tangent: Array, grad_lse: Array | None = None, grad_out_tangent: Array | None = None,
    grad_lse_tangent: Array | None = None, backend: str | None = None, **options: Any,
) -> Gradients:  # fmt: skip
    """Compute the second result of `attention_backward_jvp` alone: for bridges, which have the first already."""
    settings = gather(attention_backward_jvp, options)
    chosen = select(backend, grad_out, query, key, value)
    arguments = grad_out, query, key, value, out, lse, grad_lse, None, settings
    moved = out_tangent, lse_tangent, grad_out_tangent, grad_lse_tangent
    return _moved_gradients(chosen, _along(chosen, tangents, arguments, moved))


def _along(chosen: Backend, tangents: Gradients, arguments: Any, moved: Any) -> SecondProblem:
    """Build the problem of the gradients along a direction, along which out, lse and their gradients move too."""
    second_derivatives(chosen)
    problem = build_second("closed", "tangents", tangents, build_gradient(*arguments))
    add_tangents(problem, *moved)
    return problem


def _moved_gradients(chosen: Backend, problem: SecondProblem) -> Gradients:
    second_derivatives(chosen).run(problem)
    return finish(problem.gradient, chosen.reduce)


@takes_options()
def attention_double_backward(
    grad_grads: Gradients,
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array,
    *,
    grad_lse: Array | None = None,
    through_saved: bool = False,
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_k: ArrayLike | None = None,
    backend: str | None = None,
    **options: Unpack[OptionArguments],
) -> SecondGradients:
    r"""Gradients of `attention_backward` with respect to its arguments, in linear memory.

    Parameters
    ----------
    grad_grads : Gradients
        Gradients of some loss with respect to what `attention_backward` returned, a named tuple (query, key, value,
        bias, sinks): each of its shape and dtype, or None for 0, which takes no product. Its last field, `mod_args`,
        must be None.
    grad_out : ndarray, shape (..., H, L, Ev)
        What `attention_backward` was called with, in the dtype of `query`.
    query : ndarray, shape (..., H, L, E)
        float32, float64, float16 or ``ml_dtypes.bfloat16`` on the host, of any strides; (L, E) is one head.
    key : ndarray, shape (..., Hkv, S, E)
        dtype of `query`; H must be a multiple of Hkv. Leading dimensions broadcast.
    value : ndarray, shape (..., Hkv, S, Ev)
        dtype of `query`; Ev may differ from E.
    out, lse : ndarray, shape (..., H, L, Ev) and (..., H, L)
        What `attention` returned with ``return_lse=True``.
    grad_lse : ndarray, shape (..., H, L), optional
        What `attention_backward` was called with, in the dtype of `lse`.
    through_saved : bool, default False
        Whether `out` and `lse` count as arguments of their own. By default they are functions of query, key and
        value, and the result is complete. Else they get gradients too, which a framework for automatic
        differentiation adds to others that they have and hands on to one plain backward pass.
    cu_seqlens_q, cu_seqlens_k : array of int, shape (n + 1,), optional
        Offsets of packed sequences: pass both or neither. Arrays are then as in `attention_varlen`: `query` and what
        belongs to it (T_q, H, E or Ev), `key` and `value` (T_k, Hkv, E or Ev), `lse` and what belongs to it (H, T_q).
    **options
        Every option of `attention`, from `mask` to `seed`, by the names in the signature above: their types, shapes and
        meanings stand in ``help(numba_attention.attention)`` and, with offsets of packed sequences, in that of
        `attention_varlen`. Pass what `attention` was called with.
    backend : {"auto", "cpu", "reference"}, optional
        Overrides `set_backend` and `use_backend` for this call. "cuda" has no second derivatives.

    Returns
    -------
    SecondGradients
        Gradients of the same loss, a named tuple (query, key, value, bias, sinks, grad_out, grad_lse, out, lse): each
        of the shape and dtype of the argument, summed over axes along which it was broadcast and over query heads that
        share a key/value head. `bias` and `sinks` are None if they were not passed, `out` and `lse` without
        `through_saved`; `grad_lse` is there whether or not it was passed. A row that may attend to nothing gives 0.

    Raises
    ------
    TypeError
        `grad_grads` is not a `Gradients`, or an argument has a dtype or type that cannot be taken.
    ValueError
        A shape, length or option is out of range, a gradient does not have the shape and dtype of its argument or
        belongs to one that was not passed, or only one of the offsets was passed.
    NotImplementedError
        The backend "cuda" was chosen, also by arrays on a GPU, or a gradient of `mod_args` was given.
    BackendUnavailableError
        The backend that was asked for cannot run here.

    See Also
    --------
    attention_jvp, attention_backward_jvp : the same products in forward mode.

    Notes
    -----
    What `attention_backward` returns is the gradient of ``sum(grad_out * out) + sum(grad_lse * lse)``, whose Hessian is
    symmetric. So the result is the derivative of the gradients along the direction `grad_grads`, and what comes back
    to `grad_out` and `grad_lse` are the derivatives of `out` and `lse`. It takes 15 products for each pair of a query
    and a key, and 12 with `through_saved`; `attention_backward` takes five.

    References
    ----------
    .. [1] Pearlmutter, "Fast Exact Multiplication by the Hessian", 1994.

    Examples
    --------
    The gradient of a penalty on the gradient of the queries:

    >>> import numpy as np, numba_attention as na
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, g = rng.standard_normal((4, 2, 10, 8))
    >>> out, lse = na.attention(q, k, v, return_lse=True)
    >>> grads = na.attention_backward(g, q, k, v, out, lse)
    >>> penalty = na.attention_double_backward(na.Gradients(2 * grads.query, None, None), g, q, k, v, out, lse)
    >>> penalty.key.shape, penalty.grad_out.shape
    ((2, 10, 8), (2, 10, 8))
    """
    settings = gather(attention_double_backward, options)
    chosen = select(backend, grad_out, query, key, value)
    second, starts = second_derivatives(chosen), as_starts(cu_seqlens_q, cu_seqlens_k)
    gradient = build_gradient(grad_out, query, key, value, out, lse, grad_lse, starts, settings)
    if as_flag("through_saved", through_saved):
        problem = build_second("open", "grad_grads", grad_grads, gradient)
        second.run(problem)
        return SecondGradients(*_inputs(chosen, problem), *_tangents(problem), *_of_saved(problem))
    problem = build_second("closed", "grad_grads", grad_grads, gradient)
    problem.kind = "jvp"
    second.run(problem)
    problem.kind = "closed"
    second.run(problem)
    return SecondGradients(*_inputs(chosen, problem), *_tangents(problem))


def merge_attention_jvp(
    outs: Sequence[Array] | Array,
    lses: Sequence[Array] | Array,
    out_tangents: Sequence[Array] | Array,
    lse_tangents: Sequence[Array] | Array,
    *,
    packed: bool | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Join results of `attention_jvp` over disjoint sets of keys into those over their union.

    Parameters
    ----------
    outs : sequence of n arrays, or one stacked array, each shape (..., L, Ev)
        `out` of `attention_jvp` for the same queries, in float32, float64, float16 or bfloat16; packed (T, H, Ev).
    lses : sequence of n arrays, or one stacked array, each shape (..., L)
        Their log-sum-exps: float32, or float64 for float64 results; packed (H, T).
    out_tangents, lse_tangents : sequences of n arrays, or stacked arrays
        Tangents of the outputs and log-sum-exps, of their shapes and dtypes.
    packed : bool, optional
        Whether results are packed. By default the shapes tell; pass True if there are as many tokens as heads, where
        both readings fit and (L, Ev) of each head is meant.

    Returns
    -------
    out, out_tangent : ndarray, shape (..., L, Ev)
        dtype of `outs`.
    lse, lse_tangent : ndarray, shape (..., L)
        float32, or float64 if `lses` are.

    Raises
    ------
    TypeError, ValueError
        Different numbers of arrays, none at all, or shapes and dtypes that do not match.
    NotImplementedError
        An array is on a GPU.

    See Also
    --------
    attention_jvp, merge_attention

    Notes
    -----
    With ``w_n = exp(lse_n - lse)``, ``dlse = sum(w_n dlse_n)`` and
    ``dout = sum(w_n (dout_n + (dlse_n - dlse) out_n))``.

    References
    ----------
    .. [1] Dao et al., "FlashAttention", 2022, section 3.1 (the decomposition that is differentiated).

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, dq = rng.standard_normal((4, 10, 8))
    >>> u = na.Gradients(dq, None, None)
    >>> parts = [na.attention_jvp(u, q, k[s], v[s]) for s in (slice(0, 3), slice(3, 10))]
    >>> merged = na.merge_attention_jvp(*zip(*parts))
    >>> bool(np.allclose(merged[2], na.attention_jvp(u, q, k, v).out_tangent))
    True
    """
    return _merge_jvp(outs, lses, out_tangents, lse_tangents, packed)


def _tangents(problem: SecondProblem) -> tuple[Array, Array]:
    """The tangents of out and lse, as the caller has out and lse."""
    return problem.as_out(problem.out_tangent), problem.as_lse(problem.lse_tangent)


def _inputs(chosen: Backend, problem: SecondProblem) -> tuple[Array, Array, Array, Array | None, Array | None]:
    query, key, value, bias, sinks, _ = finish(problem.gradient, chosen.reduce)
    assert query is not None
    assert key is not None
    assert value is not None
    return query, key, value, bias, sinks


def _of_saved(problem: SecondProblem) -> tuple[Array, Array]:
    """The gradients of out and lse, as arguments of their own."""
    g, u, rows = problem.gradient, problem.direction, problem.rows
    assert problem.score_sums is not None
    with np.errstate(all="ignore"):
        of_out = -problem.lse_tangent[..., None] * rows(g.grad_out)
        of_lse = -problem.score_sums
        if u.sinks is not None:
            delta = np.sum(rows(g.grad_out) * rows(g.forward.out), axis=-1, dtype=of_lse.dtype)
            delta -= 0 if g.grad_lse is None else rows(g.grad_lse)
            weights = problem.sink_weights
            of_lse = of_lse + np.where(weights == 0, 0, weights * u.sinks[:, None] * delta).astype(of_lse.dtype)
    return problem.as_out(of_out), problem.as_lse(of_lse)


__all__ = ["attention_backward_jvp", "attention_double_backward", "attention_jvp", "merge_attention_jvp"]
