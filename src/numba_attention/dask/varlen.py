"""Attention of packed Dask arrays, of shape (tokens, heads, features), whose chunks may cut sequences."""

from __future__ import annotations  # short types in help()

from typing import Any, Literal, Unpack

import numpy as np
from numpy.typing import ArrayLike

from ..masks.blockmask import BlockMask
from ..options import Gradients, Options, takes_options
from ..problem.packed import build, build_backward
from ..validation import as_flag
from .arguments import Arguments, Running, empty, gathered, headers_of_call
from .calls import backward, forward
from .graph import is_dask, packed_layout_of
from .passes import OPERANDS


@takes_options(Running)
def attention_varlen(
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    return_lse: bool = False,
    **options: Unpack[Arguments],
) -> Any:
    """`numba_attention.attention_varlen` over Dask arrays, lazily: chunks of tokens may cut sequences anywhere.

    Parameters
    ----------
    query, key, value : dask.array.Array or ndarray
        As in `numba_attention.attention_varlen`. The chunks of `query` are the blocks of rows and heads, those of `key`
        the blocks of keys; the others are rechunked to them.
    cu_seqlens_q, cu_seqlens_k : array of int, shape (n + 1,)
        Offsets of the sequences, as NumPy arrays.
    mask, bias : dask.array.Array or ndarray, optional
        As in `numba_attention.attention_varlen`. Axes of packed tokens are rechunked to the blocks; those of positions
        within sequences are one chunk.
    **options, return_lse, backend, threads, split_every, stream
        As in `attention`. With dropout, blocks of keys that cut a sequence begin at multiples of 32 of its positions.

    Returns
    -------
    out : dask.array.Array, shape (T_q, H, Ev)
    lse : dask.array.Array, shape (H, T_q)
        Only if `return_lse`.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As in `numba_attention.attention_varlen`, at once, and as in `attention`.

    See Also
    --------
    attention : for sequences of one length.

    Notes
    -----
    Pairs of blocks without a sequence in common have no task.

    Examples
    --------
    >>> import dask.array as da, numpy as np, numba_attention as na
    >>> x = da.random.default_rng(0).standard_normal((120, 2, 16), chunks=(50, 2, 16))
    >>> starts = [0, 70, 120]  # the chunks cut both sequences
    >>> out = na.attention_varlen(x, x, x, starts, starts, is_causal=True)
    >>> last = x[70:].compute().swapaxes(0, 1)
    >>> same = na.attention(last, last, last, is_causal=True)
    >>> bool(np.allclose(out[70:].compute().swapaxes(0, 1), same))
    True
    """
    settings, running = gathered(attention_varlen, options)
    settings = _four_axes(settings)
    _check_offsets(cu_seqlens_q, cu_seqlens_k)
    h, of_headers = headers_of_call({"query": query, "key": key, "value": value}, settings)
    offsets: dict[str, Any] = {"cu_q": cu_seqlens_q, "cu_k": cu_seqlens_k}
    problem = build(**h, **offsets, options=of_headers, out=None, return_lse=True, empty=empty)
    arrays = heads_first(query), heads_first(key), heads_first(value)
    layout = packed_layout_of(problem, *arrays, settings)
    out, lse = forward(layout, arrays, settings, running)
    out = heads_first(out)
    return (out, lse) if as_flag("return_lse", return_lse) else out


@takes_options(Running)
def attention_varlen_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    grad_lse: Any = None,
    mod_grads: ArrayLike | Literal["all"] | None = None,
    **options: Unpack[Arguments],
) -> Gradients:
    """`numba_attention.attention_varlen_backward` over Dask arrays, lazily.

    Parameters
    ----------
    grad_out : dask.array.Array or ndarray, shape (T_q, H, Ev)
        Gradient of some loss with respect to `out`, in the dtype of `query`.
    query, key, value, cu_seqlens_q, cu_seqlens_k
        What `attention_varlen` was called with.
    out, lse : dask.array.Array or ndarray, shape (T_q, H, Ev) and (H, T_q)
        What it returned, with ``return_lse=True``.
    grad_lse : dask.array.Array or ndarray, shape (H, T_q), optional
        Gradient of the loss with respect to `lse`.
    mod_grads : "all" or int or sequence of int, optional
        As in `numba_attention.attention_backward`.
    **options, backend, threads, split_every, stream
        As in `attention_varlen`.

    Returns
    -------
    Gradients
        Named tuple (query, key, value, bias, sinks, mod_args) of Dask arrays, and None, as of `attention_backward`.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As in `attention_varlen`.

    See Also
    --------
    attention_backward : the same for sequences of one length; see its notes.

    Examples
    --------
    >>> import dask.array as da, numba_attention as na
    >>> x = da.random.default_rng(0).standard_normal((120, 2, 16), chunks=(50, 2, 16))
    >>> starts = [0, 70, 120]
    >>> out, lse = na.attention_varlen(x, x, x, starts, starts, return_lse=True)
    >>> grads = na.attention_varlen_backward(da.ones_like(out), x, x, x, out, lse, starts, starts)
    >>> grads.key.shape, grads.key.chunks[0]
    ((120, 2, 16), (50, 50, 20))
    """
    settings, running = gathered(attention_varlen_backward, options)
    settings = _four_axes(settings)
    _check_offsets(cu_seqlens_q, cu_seqlens_k)
    inputs = {"grad_out": grad_out, "query": query, "key": key, "value": value}
    h, of_headers = headers_of_call(inputs | {"out": out, "lse": lse, "grad_lse": grad_lse}, settings)
    offsets: dict[str, Any] = {"cu_q": cu_seqlens_q, "cu_k": cu_seqlens_k}
    whole = build_backward(**h, **offsets, mod_grads=mod_grads, options=of_headers, empty=empty)
    arrays = heads_first(query), heads_first(key), heads_first(value)
    layout = packed_layout_of(whole.forward, *arrays, settings)
    of_rows = {"grad_out": heads_first(grad_out), "out": heads_first(out), "lse": lse, "grad_lse": grad_lse}
    grads = backward(layout, arrays, of_rows, settings, running, whole.mod_grads)
    of_arrays: dict[str, Any] = {name: heads_first(x) for name in OPERANDS if (x := grads.of(name)) is not None}
    if grads.bias is not None:
        of_bias: Any = options["bias"]
        of_arrays["bias"] = grads.bias[(0,) * (4 - np.ndim(of_bias))]
    return grads._replace(**of_arrays)


def heads_first(x: Any) -> Any:
    """Exchange the axes of tokens and heads; with array.query-planning, arrays have no `swapaxes`."""
    return x.transpose((1, 0, 2))


def _four_axes(options: Options) -> Options:
    """Give mask and bias the axes (sequences, heads, rows, columns), the first of them of size 1 if they lack them."""
    arrays: dict[str, Any] = {}
    for name in ("mask", "bias"):
        x: Any = getattr(options, name)
        if x is not None and not isinstance(x, BlockMask) and x.ndim < 4:
            arrays[name] = x[(None,) * (4 - x.ndim)]
    return options._replace(**arrays)


def _check_offsets(cu_seqlens_q: Any, cu_seqlens_k: Any) -> None:
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if is_dask(x):
            raise TypeError(f"{name} is needed to build the graph and must be a NumPy array; pass {name}.compute()")


__all__ = ["attention_varlen", "attention_varlen_backward"]
