"""Exact attention over Dask arrays, with the sequence itself in chunks: lazy, out of core, on one machine or many.

`numba_attention.attention` and `attention_backward` hand over to these functions when they are called with Dask arrays.
"""

from __future__ import annotations  # short types in help()

from collections.abc import Sequence
from typing import Any, Literal, Unpack

import numpy as np
from dask.base import tokenize
from numpy.typing import ArrayLike

from ..backends import check_name, select
from ..backends.cpu_rules import limits_of
from ..masks.blockmask import BlockMask
from ..mods.compiled import check_bounds
from ..mods.language import MASK, SCORE
from ..mods.rules import describe, find
from ..options import PER_SCORE, Gradients, OptionArguments, Options, gather, takes_options
from ..problem.dense import Problem, build, build_backward
from ..validation import as_array, as_flag, lse_dtype_of
from . import chunks as _chunks
from . import passes
from .graph import Operands, is_dask, layout_of, on_chunks
from .tasks import Run, mods_of

_FAN = 8  # parts that one task merges or adds: half as deep as a binary tree, and few parts wait at a time


@takes_options()
def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    return_lse: bool = False,
    backend: str | None = None,
    threads: int | None = None,
    split_every: int = _FAN,
    stream: bool | None = None,
    **options: Unpack[OptionArguments],
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
        heads and sequences as in one call. With dropout, blocks of keys begin at multiples of 32.
    return_lse : bool, default False
        Also return the natural log of the softmax denominator of each row.
    backend : {"auto", "cpu", "cuda", "reference"}, optional
        As in `numba_attention.attention`. What `set_backend` and `use_backend` say is looked up now, in this process.
    threads : int, optional
        Threads of the kernels of one task. By default NUMBA_NUM_THREADS if that is set in the environment of the
        worker, else 1, because workers run as many tasks at a time as they have threads. Under the synchronous
        scheduler, by default, as many as Numba has.
    split_every : int, default 8
        How many results over different keys one task merges.
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
    TypeError, ValueError, BackendUnavailableError
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
    settings = _checked(gather(attention, options))
    h = _headers({"query": query, "key": key, "value": value, "mask": settings.mask, "bias": settings.bias})
    of_headers = settings._replace(mask=h["mask"], bias=h["bias"])
    problem = build(h["query"], h["key"], h["value"], of_headers, None, True, _empty)
    _check_mods(problem)
    layout = layout_of(problem, query, key, value, settings)
    fan = _fan(split_every)
    _chunks.check_tasks(layout, fan)
    run = Run(_backend(backend, query, key, value), _threads(threads))
    mods = mods_of(settings)
    operands = Operands(layout, query, key, value, settings, mods, _streams(stream, layout, key, value))
    arrays = [x.name for x in operands.arrays]
    token = tokenize(
        "attention", arrays, _without_arrays(settings), run, fan, bool(operands.loads), list(operands.tasks)
    )
    results = passes.Results(layout, problem.Ev, problem.result.ndim == 2)
    out, lse = passes.forward(
        operands, results, problem.Ev, token, run, fan, problem.query.dtype, np.dtype(lse_dtype_of(problem.query))
    )
    return (out, lse) if as_flag("return_lse", return_lse) else out


@takes_options()
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
    backend: str | None = None,
    threads: int | None = None,
    split_every: int = _FAN,
    stream: bool | None = None,
    **options: Unpack[OptionArguments],
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
    **options, backend, threads, stream
        As in `attention`.
    split_every : int, default 8
        How many sums one task adds, where a gradient is the sum of several.

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
    settings = _checked(gather(attention_backward, options))
    h = _headers(
        {"query": query, "key": key, "value": value, "mask": settings.mask, "bias": settings.bias}
        | {"grad_out": grad_out, "out": out, "lse": lse, "grad_lse": grad_lse}
    )
    of_headers = settings._replace(mask=h["mask"], bias=h["bias"])
    of_rows = h["out"], h["lse"], h["grad_lse"]
    whole = build_backward(
        h["grad_out"], h["query"], h["key"], h["value"], *of_rows, mod_grads, of_headers, _empty
    )  # fmt: skip
    problem = whole.forward
    _check_mods(problem)
    layout = layout_of(problem, query, key, value, settings)
    fan = _fan(split_every)
    _chunks.check_tasks(layout, fan)
    run = Run(_backend(backend, query, key, value), _threads(threads))
    mods = mods_of(settings)
    operands = Operands(layout, query, key, value, settings, mods, _streams(stream, layout, key, value))
    results = passes.Results(layout, problem.Ev, problem.result.ndim == 2)
    rows = {name: on_chunks(x, results.out) for name, x in (("grad_out", grad_out), ("out", out))}
    rows |= {
        name: None if x is None else on_chunks(x, results.lse) for name, x in (("lse", lse), ("grad_lse", grad_lse))
    }
    names = [x.name for x in (*operands.arrays, *rows.values()) if x is not None]
    token = tokenize(
        "backward", mod_grads, names, _without_arrays(settings), run, fan, bool(operands.loads), list(operands.tasks)
    )
    dtypes = dict.fromkeys(passes.OPERANDS, problem.query.dtype)
    if operands.bias is not None:
        dtypes["bias"] = operands.bias.dtype
    if problem.sinks is not None:
        dtypes["sinks"] = np.asarray(settings.sinks).dtype
    mod_args = {f"mod_args[{n}]": problem.mod_args[n] for n in whole.mod_grads or ()}
    places = None if whole.mod_grads is None else list(whole.mod_grads)
    number = len(problem.mod_args)
    return passes.backward(operands, results, rows, token, run, fan, dtypes, mod_args, places, number)


def suggest_chunks(
    shape_q: Sequence[int],
    shape_k: Sequence[int],
    dtype: Any = np.float32,
    *,
    value_dim: int | None = None,
    workers: int | None = None,
    threads: int | None = None,
    memory: int | None = None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Suggest chunks of query and key for `attention`: as large as memory allows, as many as threads need.

    Parameters
    ----------
    shape_q, shape_k : sequence of int
        Shapes (..., H, L, E) of query and (..., Hkv, S, E) of key.
    dtype : dtype, default float32
    value_dim : int, optional
        Features of `value`; by default those of `key`.
    workers : int, optional
        Number of worker processes. By default those of the current client of distributed; without one, this machine
        counts as one worker.
    threads : int, optional
        Tasks that a worker runs at a time.
    memory : int, optional
        Bytes of memory of a worker.

    Returns
    -------
    chunks_q, chunks_k : tuple of int
        Sizes of the chunks of each axis, as `dask.array.Array.rechunk` and `dask.array.from_zarr` take them. Those of
        `value` are those of `key`, with the features of `value`.

    Notes
    -----
    One key head and its query heads in a chunk. A quarter of the memory holds the blocks of the tasks that run and of
    two that wait, and there are at least four tasks for each thread, unless they would be shorter than a second at
    100 GFLOP/s. Rows are a quarter of the keys or more, because keys and values travel once for each block of rows.
    Where such tasks would be shorter than 0.1 s, heads and sequences share a chunk.

    Examples
    --------
    >>> import numba_attention.dask as nad
    >>> shape = (1, 16, 1_048_576, 64)
    >>> nad.suggest_chunks(shape, shape, workers=64, threads=16, memory=64 * 2**30)
    ((1, 1, 32768, 64), (1, 1, 131072, 64))
    """
    here = None if None not in (workers, threads, memory) else _chunks.workers_here()
    given = (workers, threads, memory)
    chosen = [x if x is not None else here[n] for n, x in enumerate(given)] if here else given
    Ev = shape_k[-1] if value_dim is None else value_dim
    return _chunks.suggest(shape_q, shape_k, np.dtype(dtype).itemsize, Ev, _chunks.Workers(*chosen))


def warmup(client: Any = None) -> dict[str, float]:
    """Compile or load the common kernels on every worker, so that no task has to.

    Parameters
    ----------
    client : distributed.Client, optional
        By default the current one.

    Returns
    -------
    dict
        Seconds that it took, by the address of the worker.

    Notes
    -----
    Compiling takes some 3 seconds a kernel, and looks like a worker that hangs if a task does it. Machines that share
    the folder of the kernel cache (NUMBA_ATTENTION_CACHE_DIR), and are alike, load what one of them has compiled.

    Examples
    --------
    >>> from distributed import Client  # doctest: +SKIP
    >>> client = Client()  # doctest: +SKIP
    >>> na.dask.warmup(client)  # doctest: +SKIP
    {'tcp://127.0.0.1:40001': 0.02, 'tcp://127.0.0.1:40003': 0.02}
    """
    from distributed import get_client

    seconds: dict[str, float] = (get_client() if client is None else client).run(_warm)
    return seconds


def _warm() -> float:
    from time import perf_counter

    from ..backends.cpu import warmup_jobs

    start = perf_counter()
    for _, job in warmup_jobs():
        job()
    return perf_counter() - start


def _checked(options: Options) -> Options:
    """Refuse Dask arrays where blocks depend on the numbers, and make arrays of mask and bias."""
    others = {name: x for name, x in options._asdict().items() if name not in PER_SCORE}
    if isinstance(options.mod_args, tuple | list):
        others |= {f"mod_args[{n}]": x for n, x in enumerate(options.mod_args)}
    for name, x in others.items():
        if is_dask(x):
            raise TypeError(f"{name} is needed in every task and must be a NumPy array; pass {name}.compute()")
    for name in PER_SCORE:
        x = getattr(options, name)
        if x is not None and not is_dask(x) and not isinstance(x, BlockMask):
            converted: dict[str, Any] = {name: as_array(name, x)}
            options = options._replace(**converted)
    return options


def _check_mods(problem: Problem) -> None:
    """Read the functions of a call now, and check the arrays that they read: no task is needed to find a mistake."""
    arguments = describe(problem.mod_args)
    for role, function in ((SCORE, problem.score_mod), (MASK, problem.mask_mod)):
        if function is not None:
            bounds = find(role, function, arguments, problem.mod_args).bounds
            check_bounds(bounds, problem.mod_args, limits_of(problem))


def _headers(arrays: dict[str, Any]) -> dict[str, Any]:
    """Return arrays without memory for Dask arrays, and anything else as it is."""
    for name, x in arrays.items():
        if is_dask(x) and any(np.isnan(n) for n in x.shape):
            raise ValueError(f"{name} has chunks of unknown size; call {name}.compute_chunk_sizes() first")
    return {name: _empty(x.shape, x.dtype) if is_dask(x) else x for name, x in arrays.items()}


def _empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return an array of one element, broadcast to a shape."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def _without_arrays(options: Options) -> Options:
    """Return the options without arrays that have names in the graph, and with the digest of a `BlockMask`."""
    mask: Any = options.mask.digest if isinstance(options.mask, BlockMask) else None
    return options._replace(mask=mask, bias=None, mod_args=())


def _backend(backend: str | None, *arrays: Any) -> str:
    """Return the backend that tasks are to use; "auto" for blocks on a GPU, if nothing else was chosen."""
    if backend is not None:
        return check_name(backend, "backend")
    chosen: Any = select(None)
    name: str = chosen.__name__.rpartition(".")[2]
    are_numpy = all(isinstance(getattr(x, "_meta", x), np.ndarray) for x in arrays)
    return "auto" if name == "cpu" and not are_numpy else name


def _streams(stream: Any, layout: Any, key: Any, value: Any) -> bool:
    if stream is not None:
        return as_flag("stream", stream)
    if len(layout.scores[-2]) < 2 and len(layout.heads.query) == len(layout.heads.key):
        return False  # every block of keys has one reader
    return _chunks.bytes_of(key, value) > _chunks.workers_here().memory / _chunks.SHARE


def _fan(split_every: Any) -> int:
    if isinstance(split_every, bool) or not isinstance(split_every, int | np.integer):
        raise TypeError(f"split_every must be an int, got {type(split_every).__qualname__}")
    if split_every < 2:
        raise ValueError(f"split_every must be at least 2, got {split_every}")
    return int(split_every)


def _threads(threads: Any) -> int | None:
    if threads is None:
        return None
    if isinstance(threads, bool) or not isinstance(threads, int | np.integer):
        raise TypeError(f"threads must be an int, got {type(threads).__qualname__}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    return int(threads)


__all__ = ["attention", "attention_backward", "suggest_chunks", "warmup"]
