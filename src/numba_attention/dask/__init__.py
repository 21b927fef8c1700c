"""Exact attention over Dask arrays, with the sequence itself in chunks: lazy, out of core, on one machine or many.

Functions of `numba_attention` of the same names hand over to these when they are called with Dask arrays.
"""

from __future__ import annotations  # short types in help()

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from ..backends import cuda
from ..caches.checks import check_size
from ..warming import DTYPES, kernels_of_blocks
from . import chunks as _chunks
from .dense import attention, attention_backward
from .layer import heads_per_block
from .varlen import attention_varlen, attention_varlen_backward


def suggest_chunks(
    shape_q: Sequence[int],
    shape_k: Sequence[int],
    dtype: Any = np.float32,
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_k: ArrayLike | None = None,
    *,
    value_dim: int | None = None,
    workers: int | None = None,
    threads: int | None = None,
    memory: int | None = None,
    rate: float = _chunks.RATE,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Suggest chunks of query and key for `attention`: as large as memory allows, as many as threads need.

    Parameters
    ----------
    shape_q, shape_k : sequence of int
        Shapes (..., H, L, E) of query and (..., Hkv, S, E) of key; with offsets, (T_q, H, E) and (T_k, Hkv, E).
    dtype : dtype, default float32
    cu_seqlens_q, cu_seqlens_k : array of int, shape (n + 1,), optional
        Offsets of packed sequences, for chunks for `attention_varlen`. By default, those of keys are those of queries.
    value_dim : int, optional
        Features of `value`; by default those of `key`.
    workers : int, optional
        Number of worker processes. By default those of the current client of distributed; without one, this machine
        counts as one worker.
    threads : int, optional
        Tasks that a worker runs at a time.
    memory : int, optional
        Bytes of memory of a worker.
    rate : float, default 1e11
        Operations a second of one of these tasks: 1e11 is about what a core with AVX-512 computes in float32, and 1e14
        a GPU in half types.

    Returns
    -------
    chunks_q, chunks_k : tuple of int
        Sizes of the chunks of each axis, as `dask.array.Array.rechunk` and `dask.array.from_zarr` take them. Those of
        `value` are those of `key`, with the features of `value`.

    Raises
    ------
    TypeError, ValueError
        Shapes with fewer than two axes or without heads with offsets, offsets that are not those of the tokens, or a
        number that is none or below 1.

    Notes
    -----
    One key head and its query heads in a chunk. A quarter of the memory holds the blocks of the tasks that run and of
    two that wait, and there are at least four tasks for each thread, unless they would be shorter than a second. Rows
    are a quarter of the keys or more, because keys and values travel once for each block of rows. Where such tasks
    would be shorter than 0.1 s, heads and sequences share a chunk.

    Of packed sequences, only pairs of blocks with a sequence in common are tasks. So where many sequences fit into a
    chunk, those of queries and of keys are alike: a block of rows would read keys of other sequences in vain.

    Examples
    --------
    >>> import numba_attention.dask as nad
    >>> shape = (1, 16, 1_048_576, 64)
    >>> nad.suggest_chunks(shape, shape, workers=64, threads=16, memory=64 * 2**30)
    ((1, 1, 32768, 64), (1, 1, 131072, 64))
    >>> shape, starts = (1_048_576, 16, 64), range(0, 1_048_577, 1024)  # 1024 sequences of 1024 tokens
    >>> nad.suggest_chunks(shape, shape, "float32", starts, workers=2, threads=1, memory=4 * 2**30)
    ((262144, 1, 64), (262144, 1, 64))
    """
    for name, shape_of_one in (("shape_q", shape_q), ("shape_k", shape_k)):
        if len(shape_of_one) < 2:
            raise ValueError(f"{name} must have at least two axes, (length, features), got {tuple(shape_of_one)}")
        for size in shape_of_one:
            check_size(name, size, 0)
    for name, number in (("workers", workers), ("threads", threads)):
        if number is not None:
            check_size(name, number)
    if memory is not None and not memory >= 1:
        raise ValueError(f"memory must be at least 1 byte, got {memory}")
    given = (workers, threads, memory)
    here = None if None not in given else _chunks.workers_here()
    chosen = [x if x is not None else here[n] for n, x in enumerate(given)] if here else given
    Ev = shape_k[-1] if value_dim is None else value_dim
    shape = _chunks.shape_of(shape_q, shape_k, np.dtype(dtype).itemsize, Ev, cu_seqlens_q, cu_seqlens_k)
    return _chunks.suggest(shape, _chunks.Workers(*chosen), rate).chunks(shape, shape_q, shape_k)


def warmup(
    client: Any = None,
    dtypes: Sequence[DTypeLike] = DTYPES,
    tasks: Sequence[str] | None = None,
    *,
    backend: str = "cpu",
) -> dict[str, float]:
    """Compile or load on every worker what tasks need, so that no task has to: blocks of any size, and gradients.

    Parameters
    ----------
    client : distributed.Client, optional
        By default the current one.
    dtypes : sequence of dtype, optional
        Those of the arrays. By default "float32", "float64", "float16" and "bfloat16".
    tasks : sequence of str, optional
        Some of those of `numba_attention.warmup`. By default "attention", "decode", "backward" and "layer": all that
        functions and layers of Dask arrays call. "weights" and "second" are for functions that you map over blocks.
    backend : {"cpu", "cuda"}
        "cuda" compiles the common kernels of the first GPU of each worker, of all dtypes and without `tasks`.

    Returns
    -------
    dict
        Seconds that it took, by the address of the worker.

    Raises
    ------
    ValueError
        An unknown dtype, task or backend, or tasks for the backend "cuda".

    Notes
    -----
    Compiling takes some 3 seconds a kernel, and looks like a worker that hangs if a task does it. There are up to
    seven kernels for each dtype, which depends on the CPU: with results in float32 for half types, as merges and sums
    of blocks take them. Layers have two more, in float32 and in float64: products, and norms with activations. Workers
    that share the folder of the kernel cache (NUMBA_ATTENTION_CACHE_DIR), and are alike, load what one of them has
    compiled. `score_mod` and `mask_mod` are compiled by the first task that has them, in a tenth of a second.

    Examples
    --------
    >>> from distributed import Client  # doctest: +SKIP
    >>> client = Client()  # doctest: +SKIP
    >>> na.dask.warmup(client, ["float32"])  # doctest: +SKIP
    {'tcp://127.0.0.1:40001': 0.02, 'tcp://127.0.0.1:40003': 0.02}
    """
    from distributed import get_client

    names = [x if isinstance(x, str) else np.dtype(x).name for x in ([dtypes] if isinstance(dtypes, str) else dtypes)]
    if backend not in ("cpu", "cuda"):
        raise ValueError(f"backend must be 'cpu' or 'cuda', got {backend!r}")
    if tasks is not None and backend == "cuda":
        raise ValueError(f"tasks must be None for the backend 'cuda', which has no such tasks, got {tasks}")
    kernels_of_blocks(names, tasks)  # an unknown name is found here, and not on every worker
    seconds: dict[str, float] = (get_client() if client is None else client).run(_warm, names, tasks, backend)
    return seconds


def _warm(dtypes: Sequence[str], tasks: Sequence[str] | None, backend: str) -> float:
    start = perf_counter()
    if backend == "cuda":
        for _, job in cuda.warmup_jobs(wide=True):
            job()
    else:
        for kernel in kernels_of_blocks(dtypes, tasks):
            kernel.address  # noqa: B018 - compiles or loads it
    return perf_counter() - start


__all__ = [
    "attention", "attention_backward", "attention_varlen", "attention_varlen_backward", "heads_per_block",
    "suggest_chunks", "warmup",
]  # fmt: skip
