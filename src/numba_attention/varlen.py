"""Attention of packed sequences: laid end to end on one axis, without padding."""

from __future__ import annotations  # short types in help()

from typing import Any, Literal, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike

from . import device_call
from .backends import Backend, is_host_default, recall, select
from .foreign import Family
from .options import Array, Gradients, OptionArguments, Options, check_names, gather, takes_options
from .problem.dense import Empty
from .problem.packed import build, build_backward, finish


@overload
def attention_varlen(
    query: Array,
    key: Array,
    value: Array,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    return_lse: Literal[False] = ...,
    out: Array | None = ...,
    backend: str | None = ...,
    **options: Unpack[OptionArguments],
) -> Array: ...
@overload
def attention_varlen(
    query: Array,
    key: Array,
    value: Array,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    return_lse: Literal[True],
    out: Array | None = ...,
    backend: str | None = ...,
    **options: Unpack[OptionArguments],
) -> tuple[Array, Array]: ...
@takes_options()
def attention_varlen(
    query: Array,
    key: Array,
    value: Array,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    return_lse: bool = False,
    out: Array | None = None,
    backend: str | None = None,
    **options: Unpack[OptionArguments],
) -> Array | tuple[Array, Array]:
    r"""`attention` of n sequences of different lengths, laid end to end: no padding is stored or computed.

    Parameters
    ----------
    query : ndarray, shape (T_q, H, E)
        The queries of all sequences, T_q tokens in all, with any strides.
    key : ndarray, shape (T_k, Hkv, E)
    value : ndarray, shape (T_k, Hkv, Ev)
    cu_seqlens_q : array of int, shape (n + 1,)
        Offsets of the sequences: the queries of sequence b are rows ``cu_seqlens_q[b] : cu_seqlens_q[b + 1]``. They go
        from 0 to T_q and do not decrease; sequences may be empty.
    cu_seqlens_k : array of int, shape (n + 1,)
        The same for keys and values.
    mask, bias : array, optional
        As in `attention`. An array that is broadcastable to (n, H, longest queries, longest keys) refers to positions
        within each sequence, and one that is broadcastable to (H, T_q, T_k) to the packed arrays. The size of each of
        the two last axes decides.
    **options
        As in `attention`, with n sequences: alignment and positions are those within each sequence, lengths are valid
        prefixes of each.
    return_lse : bool, default False
        Also return the natural log of the softmax denominator of each row.
    out : ndarray, shape (T_q, H, Ev), optional
        Array for the result.
    backend : {"auto", "cpu", "cuda", "reference"}, optional
        As in `attention`.

    Returns
    -------
    out : ndarray, shape (T_q, H, Ev)
        dtype of `query`. The result of a sequence without keys is 0.
    lse : ndarray, shape (H, T_q)
        Only if `return_lse`.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As in `attention`; the message names the argument.

    See Also
    --------
    attention : for sequences of one length, or with padding.
    attention_varlen_backward : the gradients.

    Notes
    -----
    The kernels are those of `attention`, and the result of every sequence has the same bits as alone. The longest
    sequences begin first, so that threads finish together.

    References
    ----------
    .. [1] Krell et al., "Efficient Sequence Packing without Cross-contamination", 2021.
    .. [2] Dao, "FlashAttention-2", 2023.

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> x = np.random.default_rng(0).standard_normal((12, 4, 32), dtype=np.float32)
    >>> starts = [0, 7, 7, 12]  # three sequences, of 7, 0 and 5 tokens
    >>> out = na.attention_varlen(x, x, x, starts, starts, is_causal=True)
    >>> last = x[7:].swapaxes(0, 1)
    >>> bool((out[7:].swapaxes(0, 1) == na.attention(last, last, last, is_causal=True)).all())
    True
    """
    again = out is None and backend is None and type(query) is np.ndarray and is_host_default()
    if again:
        known = recall.forward(query, key, value, options, return_lse, (cu_seqlens_q, cu_seqlens_k))
        if known is not None:
            return known
    check_names(attention_varlen, options)
    chosen = select(backend, query, key, value)
    if chosen.on_device:
        if isinstance(chosen, Family):
            operands = {
                "query": query, "key": key, "value": value, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k,
                "return_lse": return_lse, "out": out, "backend": backend,
            }  # fmt: skip
            result: Array | tuple[Array, Array] = chosen.call(attention_varlen, operands, options)
            return result
        operands = {"query": query, "key": key, "value": value}
        small = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        return device_call.run(
            _attention_varlen, chosen, operands, options, entry=attention_varlen, out=out, small=small,
            return_lse=return_lse,
        )  # fmt: skip
    settings = gather(attention_varlen, options)
    return _attention_varlen(
        chosen, query, key, value, cu_seqlens_q, cu_seqlens_k, settings, return_lse, out, again=again
    )


def _attention_varlen(
    chosen: Backend, query: Array, key: Array, value: Array, cu_seqlens_q: ArrayLike, cu_seqlens_k: ArrayLike,
    options: Options, return_lse: bool, out: Array | None = None, empty: Empty = np.empty, again: bool = False,
) -> Array | tuple[Array, Array]:  # fmt: skip
    problem = build(query, key, value, cu_seqlens_q, cu_seqlens_k, options, out, return_lse, empty)
    chosen.forward(problem)
    if again and problem.plan is not None:
        recall.learn_forward(query, key, value, options, problem, (cu_seqlens_q, cu_seqlens_k))
    if problem.result_lse is None:
        return problem.result
    return problem.result, problem.result_lse


@takes_options()
def attention_varlen_backward(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    grad_lse: Array | None = None,
    mod_grads: ArrayLike | Literal["all"] | None = None,
    backend: str | None = None,
    **options: Unpack[OptionArguments],
) -> Gradients:
    r"""Gradients of `attention_varlen` with respect to its inputs.

    Parameters
    ----------
    grad_out : ndarray, shape (T_q, H, Ev)
        Gradient of some loss with respect to `out`, in the dtype of `query`.
    query, key, value, cu_seqlens_q, cu_seqlens_k
        What `attention_varlen` was called with.
    out, lse : ndarray, shape (T_q, H, Ev) and (H, T_q)
        What it returned, with ``return_lse=True``.
    grad_lse : ndarray, shape (H, T_q), optional
        Gradient of the loss with respect to `lse`.
    mod_grads : "all" or int or sequence of int, optional
        As in `attention_backward`.
    **options
        What `attention_varlen` was called with.
    backend : {"auto", "cpu", "cuda", "reference"}, optional
        As in `attention`.

    Returns
    -------
    Gradients
        Named tuple (query, key, value, bias, sinks, mod_args), each of the shape and dtype of its input, as of
        `attention_backward`.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As in `attention_varlen`.

    See Also
    --------
    attention_backward : the same for sequences of one length; see its notes.

    References
    ----------
    .. [1] Dao, "FlashAttention-2", 2023, algorithm 2.

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> x = np.random.default_rng(0).standard_normal((12, 4, 32), dtype=np.float32)
    >>> starts = [0, 7, 12]
    >>> out, lse = na.attention_varlen(x, x, x, starts, starts, return_lse=True)
    >>> grads = na.attention_varlen_backward(np.ones_like(out), x, x, x, out, lse, starts, starts)
    >>> bool(np.allclose(grads.value[:7].sum(0), 7, rtol=1e-4))  # the weights of each query sum to 1
    True
    """
    again = grad_lse is None and mod_grads is None and backend is None and type(query) is np.ndarray
    again = again and is_host_default()
    if again:
        known = recall.backward(grad_out, query, key, value, out, lse, options, (cu_seqlens_q, cu_seqlens_k))
        if known is not None:
            return known
    check_names(attention_varlen_backward, options)
    chosen = select(backend, query, key, value, grad_out)
    if chosen.on_device:
        if isinstance(chosen, Family):
            operands = {
                "query": query, "key": key, "value": value, "grad_out": grad_out, "out": out, "lse": lse,
                "grad_lse": grad_lse, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k,
                "mod_grads": mod_grads, "backend": backend,
            }  # fmt: skip
            gradients: Gradients = chosen.call(attention_varlen_backward, operands, options)
            return gradients
        operands = {
            "query": query, "key": key, "value": value, "out": out, "lse": lse, "grad_out": grad_out,
            "grad_lse": grad_lse,
        }  # fmt: skip
        small = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        return device_call.run(
            _attention_varlen_backward, chosen, operands, options, entry=attention_varlen_backward, small=small,
            mod_grads=mod_grads,
        )  # fmt: skip
    settings = gather(attention_varlen_backward, options)
    return _attention_varlen_backward(
        chosen, query, key, value, out, lse, grad_out, grad_lse, cu_seqlens_q, cu_seqlens_k, mod_grads, settings,
        again=again,
    )  # fmt: skip


def _attention_varlen_backward(
    chosen: Backend, query: Array, key: Array, value: Array, out: Array, lse: Array, grad_out: Array,
    grad_lse: Array | None, cu_seqlens_q: ArrayLike, cu_seqlens_k: ArrayLike, mod_grads: Any,
    options: Options, empty: Empty = np.empty, again: bool = False,
) -> Gradients:  # fmt: skip
    problem = build_backward(
        grad_out, query, key, value, out, lse, grad_lse, cu_seqlens_q, cu_seqlens_k, mod_grads, options, empty
    )
    chosen.backward(problem)
    if again and problem.plan is not None:
        offsets = cu_seqlens_q, cu_seqlens_k
        recall.learn_backward(grad_out, query, key, value, out, lse, options, problem, offsets)
    return finish(problem, chosen.reduce)


__all__ = ["attention_varlen", "attention_varlen_backward"]
