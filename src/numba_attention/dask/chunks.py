"""Sizes of blocks: what fits into the memory of a worker, and how many tasks there are."""

import math
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .layout import Layout

MOST_TASKS = 500_000  # the scheduler of distributed is one process, which takes 1 to 1.6 ms of CPU a task
RATE = 1e11  # operations a second that a core is assumed to compute
LONG = 1.0  # seconds of a task beside which the 3 to 5 ms of CPU that distributed takes for it are nothing
SHORT = 0.1  # seconds of a task beside which they are 5 %
SHARE = 4  # this part of the memory of a worker is for the blocks of tasks that run or wait
EACH = 4  # tasks to aim for, for each thread, so that workers finish together


class Workers(NamedTuple):
    """What computes: a cluster, or this machine."""

    number: int
    threads: int  # of one worker
    memory: int  # bytes of one worker


def workers_here() -> Workers:
    """Return the workers of the current client of distributed, or else this machine as one worker."""
    distributed = sys.modules.get("distributed")
    if distributed is not None:
        try:
            infos = list(distributed.get_client().scheduler_info(n_workers=-1)["workers"].values())
        except (ValueError, TypeError):  # no client in this process, or a version without n_workers
            infos = []
        if infos:
            limits = [info["memory_limit"] or memory_here() for info in infos]
            return Workers(len(infos), min(info["nthreads"] for info in infos), min(limits))
    return Workers(1, os.cpu_count() or 1, memory_here())


def memory_here() -> int:
    """Return the bytes of memory of this machine; 8 GiB where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**33


class Block(NamedTuple):
    """Sizes of the blocks of a task."""

    batch: tuple[int, ...]
    heads: int  # of key; of query, times the size of a group
    rows: int
    keys: int

    def size(self, group: int, E: int, Ev: int, itemsize: int) -> int:
        """Return the bytes of the blocks of a task and of its result, which is in float32 at least."""
        rows, keys = self.rows * group, self.keys
        one = rows * E * itemsize + keys * (E + Ev) * itemsize + rows * (2 * Ev + 1) * max(4, itemsize)
        return math.prod(self.batch) * self.heads * one

    def seconds(self, group: int, E: int, Ev: int) -> float:
        """Return how long one core takes for a task."""
        return 2 * math.prod(self.batch) * self.heads * group * self.rows * self.keys * (E + Ev) / RATE


def suggest(
    shape_q: Sequence[int], shape_k: Sequence[int], itemsize: int, Ev: int, workers: Workers
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return sizes of blocks for query and for key; see `numba_attention.dask.suggest_chunks`."""
    *batch_q, H, L, E = [*(1,) * (3 - len(shape_q)), *shape_q]
    *batch_k, Hkv, S, _ = [*(1,) * (3 - len(shape_k)), *shape_k]
    batch = np.broadcast_shapes(tuple(batch_q), tuple(batch_k))
    group = H // Hkv if Hkv else 1
    budget = workers.memory / SHARE / (workers.threads + 2)
    cores = workers.number * workers.threads
    block = Block((1,) * len(batch), 1, max(L, 1), max(S, 1))

    def size(block: Block) -> int:
        return block.size(group, E, Ev, itemsize)

    def number(block: Block) -> int:
        sizes, whole = (*block.batch, block.heads, block.rows, block.keys), (*batch, Hkv, L, S)
        return math.prod(-(-n // c) for n, c in zip(whole, sizes, strict=True))

    # A block of keys travels once for each block of rows, so rows are halved only when keys are fewer than four times
    # as many: for each row there are also the output and its parts.
    while size(block) > budget and block.rows + block.keys > 2:
        block = _halve(block)
    # Fewer tasks than threads: smaller ones, as long as each is long.
    while number(block) < EACH * cores and block.seconds(group, E, Ev) > 2 * LONG:
        block = _halve(block)
    # Many short tasks: more heads in each, then more sequences.
    sizes = [block.heads, *reversed(block.batch)]
    for axis, n in enumerate([Hkv, *reversed(batch)]):
        while sizes[axis] < n:
            more = [*sizes[:axis], min(2 * sizes[axis], n), *sizes[axis + 1 :]]
            larger = block._replace(heads=more[0], batch=tuple(reversed(more[1:])))
            short = block.seconds(group, E, Ev) < SHORT
            if not short or size(larger) > budget or number(larger) < EACH * cores:
                break
            sizes, block = more, larger
    of_query = (*block.batch, block.heads * group, block.rows, E)
    of_key = (*block.batch, block.heads, block.keys, E)
    return _for(of_query, shape_q), _for(of_key, shape_k)


def _halve(block: Block) -> Block:
    if block.keys > 4 * block.rows or block.rows == 1:
        return block._replace(keys=-(-block.keys // 2))
    return block._replace(rows=-(-block.rows // 2))


def _for(sizes: tuple[int, ...], shape: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of the last axes, at most those of an array."""
    return tuple(min(c, n) for c, n in zip(sizes[len(sizes) - len(shape) :], shape, strict=True))


def count_tasks(layout: Layout, fan: int) -> int:
    """Return about how many tasks the forward pass of a layout has."""
    pairs = blocks = 0
    for batch in layout.batches():
        visible = layout.visible(batch)
        pairs += sum(max(1, len(keys)) for keys in visible)
        blocks += len(visible)
    heads = len(layout.heads.query)
    return int(heads * (pairs * (1 + 1 / (fan - 1)) + 2 * blocks))


def check_tasks(layout: Layout, fan: int) -> None:
    """Raise an error for a graph that is too large for Dask, which says what chunks would do."""
    upper = math.prod(len(chunks) for chunks in layout.scores) * 3
    if upper <= MOST_TASKS:
        return
    tasks = count_tasks(layout, fan)
    if tasks <= MOST_TASKS:
        return
    *_, L, S = (edges[-1] for edges in layout.edges)
    rows, keys = (max(chunks, default=1) for chunks in layout.scores[-2:])
    fewer = tasks
    while fewer > MOST_TASKS and (rows < L or keys < S):
        if keys < S and (keys <= 4 * rows or rows >= L):
            keys = min(2 * keys, S)
        else:
            rows = min(2 * rows, L)
        sizes = _even(L, rows), _even(S, keys)
        fewer = count_tasks(layout.coarser(*sizes), fan)
    chunks_q, chunks_k = (f"rechunk({{{layout.axis}: {n}}})" for n in (rows, keys))
    said = f"query.{chunks_q} and key.{chunks_k}, which make {fewer} tasks, would do"
    if fewer > MOST_TASKS:
        said = "take more heads and sequences in a chunk, as suggest_chunks does"
    raise ValueError(f"the chunks make {tasks} tasks, more than the {MOST_TASKS} that Dask can do; {said}")


def _even(n: int, size: int) -> tuple[int, ...]:
    return (*(size,) * (n // size), *((n % size,) if n % size else ()))


def bytes_of(*arrays: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
