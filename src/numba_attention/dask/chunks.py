"""Sizes of blocks: what fits into the memory of a worker, and how many tasks there are."""

import math
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..options import Array
from ..problem.packed import offsets
from .layout import Chunks, Layout

MOST_TASKS = 500_000  # the scheduler of distributed is one process, which takes 1 to 1.6 ms of CPU a task
RATE = 1e11  # operations a second that a thread of a worker is assumed to compute
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

    def chunks(self, shape: "Shape", shape_q: Sequence[int], shape_k: Sequence[int]) -> tuple[Chunks, Chunks]:
        """Return the sizes along the axes of query, and along those of key."""
        heads, E = self.heads, shape.E
        if shape.starts is not None:
            return _at_most((self.rows, heads * shape.group, E), shape_q), _at_most((self.keys, heads, E), shape_k)
        of_query, of_key = (heads * shape.group, self.rows, E), (heads, self.keys, E)
        return _at_most((*self.batch, *of_query), shape_q), _at_most((*self.batch, *of_key), shape_k)


def _at_most(sizes: Chunks, shape: Sequence[int]) -> Chunks:
    """Return the sizes of the last axes, at most those of an array."""
    return tuple(min(c, n) for c, n in zip(sizes[len(sizes) - len(shape) :], shape, strict=True))


class Shape(NamedTuple):
    """Sizes of a whole call; a packed one has no batch, and tokens of all sequences as rows and keys."""

    batch: tuple[int, ...]
    Hkv: int
    group: int
    rows: int
    keys: int
    E: int
    Ev: int
    itemsize: int
    starts: tuple[Array, Array] | None = None  # cu_seqlens_q and cu_seqlens_k of packed sequences

    def size(self, block: Block) -> int:
        """Return the bytes of the blocks of a task and of its result, which is in float32 at least."""
        rows, keys = block.rows * self.group, block.keys
        operands = (rows * self.E + keys * (self.E + self.Ev)) * self.itemsize
        results = rows * (2 * self.Ev + 1) * max(4, self.itemsize)
        return math.prod(block.batch) * block.heads * (operands + results)

    def number(self, block: Block) -> int:
        """Return how many tasks there are, one for each pair of blocks that has a sequence in common."""
        whole, sizes = (*self.batch, self.Hkv), (*block.batch, block.heads)
        return math.prod(-(-n // c) for n, c in zip(whole, sizes, strict=True)) * self._pairs(block.rows, block.keys)

    def seconds(self, block: Block, rate: float) -> float:
        """Return how long one thread takes for a task."""
        if self.starts is None:
            pairs = float(math.prod(block.batch) * block.heads * block.rows * block.keys)
        else:
            rows, keys = (np.diff(x).astype(np.float64) for x in self.starts)
            pairs = self.Hkv * float(rows @ keys) / max(self.number(block), 1)
        return 2 * self.group * pairs * (self.E + self.Ev) / rate

    def _pairs(self, rows: int, keys: int) -> int:
        if self.starts is None:
            return -(-self.rows // rows) * -(-self.keys // keys)
        starts_q, starts_k = self.starts
        begin = np.arange(0, self.rows, rows)
        first = np.searchsorted(starts_q, begin, side="right") - 1
        last = np.searchsorted(starts_q, np.minimum(begin + rows, self.rows), side="left")
        from_key, to_key = starts_k[first], starts_k[last]
        return int(np.where(to_key > from_key, (to_key - 1) // keys - from_key // keys + 1, 1).sum())

    def halve(self, block: Block) -> Block:
        """Divide rows or keys. Where blocks have many whole sequences, both: keys of others would be read in vain."""
        rows, keys = block.rows, block.keys
        if self.starts is not None:
            longest_q, longest_k = (int(np.diff(x).max(initial=1)) for x in self.starts)
            if rows > 2 * longest_q and keys > 2 * longest_k:
                return block._replace(rows=-(-rows // 2), keys=-(-keys // 2))
        if keys > 4 * rows or rows == 1:
            return block._replace(keys=-(-keys // 2))
        return block._replace(rows=-(-rows // 2))


def shape_of(
    shape_q: Sequence[int], shape_k: Sequence[int], itemsize: int, Ev: int, cu_seqlens_q: Any, cu_seqlens_k: Any
) -> Shape:
    """Return the sizes of a call, packed if there are offsets."""
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_q must be given where cu_seqlens_k is")
        *batch_q, H, L, E = [*(1,) * (3 - len(shape_q)), *shape_q]
        *batch_k, Hkv, S, _ = [*(1,) * (3 - len(shape_k)), *shape_k]
        batch = np.broadcast_shapes(tuple(batch_q), tuple(batch_k))
        return Shape(batch, Hkv, H // Hkv if Hkv else 1, L, S, E, Ev, itemsize)
    for name, shape in (("shape_q", shape_q), ("shape_k", shape_k)):
        if len(shape) != 3:
            raise ValueError(f"{name} must be (tokens, heads, features) with cu_seqlens_q, got {tuple(shape)}")
    (T_q, H, E), (T_k, Hkv, _) = shape_q, shape_k
    starts_q = offsets("cu_seqlens_q", cu_seqlens_q, T_q)
    starts_k = offsets("cu_seqlens_k", cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, T_k)
    if len(starts_q) != len(starts_k):
        raise ValueError(f"cu_seqlens_k must have the {len(starts_q)} offsets of cu_seqlens_q, got {len(starts_k)}")
    return Shape((), Hkv, H // Hkv if Hkv else 1, T_q, T_k, E, Ev, itemsize, (starts_q, starts_k))


def suggest(shape: Shape, workers: Workers, rate: float) -> Block:
    """Return sizes of blocks; see `numba_attention.dask.suggest_chunks`."""
    budget = workers.memory / SHARE / (workers.threads + 2)
    cores = workers.number * workers.threads
    block = Block((1,) * len(shape.batch), 1, max(shape.rows, 1), max(shape.keys, 1))
    # A block of keys travels once for each block of rows, so rows are halved only when keys are fewer than four times
    # as many: for each row there are also the output and its parts.
    while shape.size(block) > budget and block.rows + block.keys > 2:
        block = shape.halve(block)
    # Fewer tasks than threads: smaller ones, as long as each is long.
    while shape.number(block) < EACH * cores and shape.seconds(block, rate) > 2 * LONG:
        block = shape.halve(block)
    # Many short tasks: more heads in each, then more sequences.
    sizes = [block.heads, *reversed(block.batch)]
    for axis, n in enumerate([shape.Hkv, *reversed(shape.batch)]):
        while sizes[axis] < n:
            more = [*sizes[:axis], min(2 * sizes[axis], n), *sizes[axis + 1 :]]
            larger = block._replace(heads=more[0], batch=tuple(reversed(more[1:])))
            short = shape.seconds(block, rate) < SHORT
            if not short or shape.size(larger) > budget or shape.number(larger) < EACH * cores:
                break
            sizes, block = more, larger
    return block


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
