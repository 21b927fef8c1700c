"""Exact attention over Dask arrays, with the sequence itself in chunks: lazy, out of core, on one machine or many.

Functions of `numba_attention` of the same names hand over to these when they are called with Dask arrays.
"""

from __future__ import annotations  # short types in help()

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import chunks as _chunks
from .dense import attention, attention_backward
from .varlen import attention_varlen, attention_varlen_backward


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


__all__ = [
    "attention", "attention_backward", "attention_varlen", "attention_varlen_backward", "suggest_chunks", "warmup",
]  # fmt: skip
