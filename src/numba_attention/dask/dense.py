"""Attention of dense Dask arrays, of shape (..., H, L, E)."""

from __future__ import annotations  # short types in help()

from typing import Any, Literal, Unpack

from numpy.typing import ArrayLike

from ..options import Gradients, takes_options
from ..problem.dense import build, build_backward
from ..validation import as_flag
from .arguments import Arguments, Running, empty, gathered, headers_of_call
from .calls import backward, forward
from .graph import layout_of


@takes_options(Running)
def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    return_lse: bool = False,
    **options: Unpack[Arguments],
) -> Any:
    """`numba_attention.attention` over Dask arrays, lazily: each visible pair of blocks is one task.

    Parameters
    ----------
    query, key, value : dask.array.Array or ndarray
        As in `numba_attention.attention`. The chunks of `query` are the blocks of sequences, heads and rows, those of
        `key` the blocks of keys; the others are rechunked to them. A NumPy array (few queries against a large
        store) has the chunks of the others along batch and heads, and one along its length.
    mask, bias : dask.array.Array or ndarray, optional
        As in `numba_attention.attention`; rechunked to the blocks. Pairs of blocks that a mask of NumPy or a
        `BlockMask` hides have no task.
    **options
        As in `numba_attention.attention`. Lengths, offsets, slopes and sinks are numbers or NumPy arrays, because they
        decide which blocks exist; so are `mod_args`, which every task gets. Dropout and mods count positions, keys,
        heads and sequences as in one call, and need blocks on the host. With dropout, blocks of keys begin at
        multiples of 32.
    return_lse : bool, default False
        Also return the natural log of the softmax denominator of each row.
    backend : {"auto", "cpu", "cuda", "reference"}, optional
        As in `numba_attention.attention`. What `set_backend` and `use_backend` say is looked up now, in this process.
        Blocks on a GPU are computed there, by "cuda".
    threads : int, optional
        Threads of the kernels of one task. By default NUMBA_NUM_THREADS if that is set in the environment of the
        worker, else 1, because workers run as many tasks at a time as they have threads. Under the synchronous
        scheduler, by default, as many as Numba has.
    split_every : int, default 8
        How many results over different keys one task merges, and how many sums one task of the backward pass adds.
    stream : bool, optional
        Whether tasks load their blocks of keys and values themselves, once for each block of rows, and do not share
        them. By default True if `key` and `value` are larger than a quarter of the memory of a worker.

    Returns
    -------
    out : dask.array.Array, shape (..., H, L, Ev)
    lse : dask.array.Array, shape (..., H, L)
        Only if `return_lse`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, BackendUnavailableError
        As in `numba_attention.attention`, at once. Also for chunks of unknown size, and for chunks that would make
        more than 500,000 tasks: the message says which would do.

    See Also
    --------
    suggest_chunks : chunks that fit the memory of the workers.
    numba_attention.merge_attention : how results over different keys are joined, exactly.

    Notes
    -----
    Pairs of blocks that causality, windows, prefixes and lengths leave empty have no task. Results over different
    blocks of keys are merged in a tree, in float32 for half types, and rounded once: for fixed chunks the bits are the
    same in every run, also if a worker is lost and its tasks run again.

    References
    ----------
    .. [1] Dao et al., "FlashAttention", 2022, section 3.1 (softmax decomposed over blocks).
    .. [2] Liu et al., "Ring Attention with Blockwise Transformers", 2023 (the sequence over several machines).

    Examples
    --------
    >>> import dask.array as da, numpy as np, numba_attention as na
    >>> rng = da.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((2, 100, 16), chunks=(1, 40, 16)) for _ in range(3))
    >>> out = na.attention(q, k, v, is_causal=True)  # nothing is computed yet
    >>> out.chunks
    ((1, 1), (40, 40, 20), (16,))
    >>> same = na.attention(q.compute(), k.compute(), v.compute(), is_causal=True)
    >>> bool(np.allclose(out.compute(), same))
    True
    """
    settings, running = gathered(attention, options)
    h, of_headers = headers_of_call({"query": query, "key": key, "value": value}, settings)
    problem = build(**h, options=of_headers, out=None, return_lse=True, empty=empty)
    layout = layout_of(problem, query, key, value, settings)
    out, lse = forward(layout, (query, key, value), settings, running)
    return (out, lse) if as_flag("return_lse", return_lse) else out


@takes_options(Running)
def attention_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    *,
    grad_lse: Any = None,
    mod_grads: ArrayLike | Literal["all"] | None = None,
    **options: Unpack[Arguments],
) -> Gradients:
    """`numba_attention.attention_backward` over Dask arrays, lazily: each visible pair of blocks is one task.

    Parameters
    ----------
    grad_out : dask.array.Array or ndarray, shape (..., H, L, Ev)
        Gradient of some loss with respect to `out`, in the dtype of `query`.
    query, key, value
        What `attention` was called with.
    out, lse : dask.array.Array or ndarray
        What it returned, with ``return_lse=True``.
    grad_lse : dask.array.Array or ndarray, shape (..., H, L), optional
        Gradient of the loss with respect to `lse`.
    mod_grads : "all" or int or sequence of int, optional
        Which arrays in `mod_args` get a gradient, as in `numba_attention.attention_backward`.
    **options, backend, threads, split_every, stream
        As in `attention`.

    Returns
    -------
    Gradients
        Named tuple (query, key, value, bias, sinks, mod_args) of Dask arrays, each with the chunks that its input has
        in the computation, and None as in `numba_attention.attention_backward`. Compute or store them together, because
        each pair of blocks has a part of all of them.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As in `attention`.

    See Also
    --------
    attention : the function that is differentiated.

    Notes
    -----
    The task of a pair of blocks adds to the gradient of the queries of the pair before it in its row, and to those of
    keys and values of the one before it in its column: in a fixed order, in float32 for half types. The gradients of
    keys and values of one block of heads must fit into the memory of the workers.

    References
    ----------
    .. [1] Dao, "FlashAttention-2", 2023, algorithm 2.

    Examples
    --------
    >>> import dask, dask.array as da, numba_attention as na
    >>> x = da.random.default_rng(0).standard_normal((2, 100, 16), chunks=(1, 40, 16))
    >>> out, lse = na.attention(x, x, x, is_causal=True, return_lse=True)
    >>> grads = na.attention_backward(da.ones_like(out), x, x, x, out, lse, is_causal=True)
    >>> query, key, value = dask.compute(*grads[:3])
    >>> key.shape
    (2, 100, 16)
    """
    settings, running = gathered(attention_backward, options)
    arrays = {"grad_out": grad_out, "query": query, "key": key, "value": value}
    h, of_headers = headers_of_call(arrays | {"out": out, "lse": lse, "grad_lse": grad_lse}, settings)
    whole = build_backward(**h, mod_grads=mod_grads, options=of_headers, empty=empty)
    layout = layout_of(whole.forward, query, key, value, settings)
    of_rows = {"grad_out": grad_out, "out": out, "lse": lse, "grad_lse": grad_lse}
    return backward(layout, (query, key, value), of_rows, settings, running, whole.mod_grads)


__all__ = ["attention", "attention_backward"]
