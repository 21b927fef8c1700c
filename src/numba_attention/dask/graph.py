"""Dask's side: operands on agreed chunks, keys of their blocks, trees of tasks, and arrays made of a graph.

`Task`, `TaskRef`, `List` and `convert_legacy_graph` are of ``dask._task_spec``, and expressions of
``dask.array._array_expr``: private, and imported in this module only.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import dask.array as da
import numpy as np
from dask._task_spec import Alias, DataNode, List, Task, TaskRef, convert_legacy_graph
from dask.array.utils import meta_from_array
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from ..device.arrays import on_device
from ..masks.blockmask import BlockMask
from ..options import Options
from ..philox import BLOCK
from ..problem.dense import Problem
from .layout import Chunks, Heads, Index, Layout, at_multiples, blocks_of_heads, counts
from .packed import PackedLayout, at_multiples_within
from .tasks import to_device

Key = tuple[Any, ...]
__all__ = [
    "Key",
    "List",
    "Operands",
    "Task",
    "TaskRef",
    "array",
    "device_meta",
    "is_dask",
    "key_of",
    "layout_of",
    "on_chunks",
    "packed_layout_of",
    "placed",
    "tree",
]


def is_dask(x: Any) -> bool:
    """Whether x is a Dask array, of either kind."""
    return isinstance(x, da.Array)


def _one_of(chunks: Sequence[Chunks], shape: tuple[int, ...]) -> tuple[Chunks, ...]:
    """Return chunks for the last axes, with one block along an axis of size 1."""
    return tuple(c if n != 1 else (1,) for c, n in zip(chunks[len(chunks) - len(shape) :], shape, strict=True))


def on_chunks(x: Any, chunks: Sequence[Chunks]) -> Any:
    """Return x as a Dask array with these chunks along its last axes; one that has them already is not changed."""
    wanted = _one_of(chunks, x.shape)
    if not is_dask(x):
        x = da.from_array(x, chunks=wanted)
    elif x.chunks != wanted:
        x = x.rechunk(wanted)
    return lowered(x)


def lowered(x: Any) -> Any:
    """Return an array whose keys are final: with array.query-planning, those of a rechunk or a transpose are not."""
    return type(x)(x.expr.lower_completely()) if hasattr(x, "expr") else x


def device_meta(*arrays: Any) -> Any:
    """Return an array without elements that is like the blocks on a GPU; None if all blocks are on the host."""
    metas = (getattr(x, "_meta", x) for x in arrays)
    return next((meta for meta in metas if on_device(meta)), None)


def placed(name: str, x: Any, like: Any) -> Any:
    """Return a Dask array whose blocks are where those like `like` are: one task for each block copies it to a GPU.

    Without `like`, blocks must be on the host.
    """
    if on_device(x._meta):
        if like is None:
            raise TypeError(f"{name} has blocks on a GPU, and query, key and value have not; all must be in one place")
        return x
    if like is None:
        return x
    meta = meta_from_array(like, ndim=x.ndim, dtype=x.dtype)
    return lowered(x.map_blocks(to_device, like=like, dtype=x.dtype, meta=meta))


def _chunks_of(axis: int, size: int, *arrays: Any) -> Chunks:
    """Return the chunks of the first array that has some along an axis; one that is broadcast has none."""
    for x in arrays:
        if is_dask(x) and x.ndim >= -axis and x.shape[axis] == size != 1:  # not (1, 0)
            chunks: Chunks = x.chunks[axis]
            return chunks
    return (size,)


def _heads_of(problem: Problem, query: Any, key: Any, value: Any) -> Heads:
    """Return the blocks of heads, as `query` has them, or else `key`."""
    heads = _chunks_of(-3, problem.H, query)
    if not is_dask(query):
        group = problem.H // problem.Hkv if problem.Hkv else 1
        heads = tuple(group * size for size in _chunks_of(-3, problem.Hkv, key, value))
    return blocks_of_heads(heads, problem.Hkv)


def layout_of(problem: Problem, query: Any, key: Any, value: Any, options: Options) -> Layout:
    """Return the blocks of a problem: `query` decides batch, heads and rows, `key` the keys, if they have chunks.

    A common refinement of the chunks of all arrays would be worse: chunks of 1000 and of 1001 have hundreds of slivers.
    """
    n = len(problem.batch)
    batch = [_chunks_of(axis - n - 3, problem.batch[axis], query, key, value) for axis in range(n)]
    heads = _heads_of(problem, query, key, value)
    rows, keys = _chunks_of(-2, problem.L, query), _chunks_of(-2, problem.S, key, value)
    if problem.dropout:
        keys = at_multiples(keys, BLOCK)
    return Layout(problem, batch, heads, rows, keys, options)


def packed_layout_of(problem: Problem, query: Any, key: Any, value: Any, options: Options) -> PackedLayout:
    """Return the blocks of packed sequences, whose arrays are of shape (heads, tokens, features) here."""
    rows, keys = (_chunks_of(-2, x.shape[-2], x) for x in (query, key))
    if not is_dask(key):
        keys = _chunks_of(-2, value.shape[-2], value)
    if problem.dropout:
        keys = at_multiples_within(keys, problem, BLOCK)
    return PackedLayout(problem, (), _heads_of(problem, query, key, value), rows, keys, options)


class Operands:
    """Query, key, value, mask and bias as Dask arrays on the chunks of a layout, and the keys of their blocks.

    Parameters
    ----------
    layout : Layout
    query, key, value : array
    options : Options
        For `mask` and `bias`.
    mods : object, optional
        What tasks with a `score_mod` or `mask_mod` need beside it.
    like : array, optional
        What blocks on a GPU are like, where all blocks are to be.
    stream : bool
        Whether the tasks that read a block of keys load it themselves. A load that is a task of its own is kept by
        Dask until its last reader is done; as each block of rows reads all keys, all of them would be in memory.
    """

    def __init__(
        self, layout: Layout, query: Any, key: Any, value: Any, options: Options, mods: Any, like: Any, stream: bool
    ) -> None:
        batch, heads, (rows, keys) = layout.scores[:-3], layout.heads, layout.scores[-2:]
        self.layout, self.like = layout, like
        of_keys = (*batch, heads.key, keys)
        self.query = self._placed("query", query, (*batch, heads.query, rows, (query.shape[-1],)))
        self.key = self._placed("key", key, (*of_keys, (key.shape[-1],)))
        self.value = self._placed("value", value, (*of_keys, (value.shape[-1],)))
        self.mask, self.bias = (
            None if x is None or isinstance(x, BlockMask) else self._placed(name, x, layout.chunks_of(name))
            for name, x in (("mask", options.mask), ("bias", options.bias))
        )
        self.mods = None if mods is None else DataNode(f"attention-mods-{tokenize(mods)}", mods)
        self.loads: dict[Key, Task] = {}
        if stream:
            for x in (self.key, self.value):
                self.loads |= loads_of(x)

    def _placed(self, name: str, x: Any, chunks: Sequence[Chunks]) -> Any:
        return placed(name, on_chunks(x, chunks), self.like)

    @property
    def arrays(self) -> list[Any]:
        """The arrays whose blocks tasks refer to."""
        return [x for x in (self.query, self.key, self.value, self.mask, self.bias) if x is not None]

    def block(self, x: Any, index: Index) -> Any:
        """Return what a task gets for the block of x at an index of all axes: a reference, or a load."""
        key = key_of(x, index)
        return self.loads.get(key) or TaskRef(key)

    @property
    def tasks(self) -> dict[Any, Any]:
        """What tasks refer to and is in none of the arrays."""
        return {} if self.mods is None else {self.mods.key: self.mods}

    def of_mods(self, batch: Index, h: int, s: int) -> tuple[Any, ...]:
        """Return the origin of a pair, and what its mods need; nothing if neither matters."""
        if not counts(self.layout.problem):
            return ()
        return self.layout.origin(batch, h, s), None if self.mods is None else self.mods.ref()

    def of_pair(self, batch: Index, h: int, r: int, s: int) -> tuple[Any, ...]:
        """Return the blocks of key, value, mask and bias of a pair."""
        of_keys = (*batch, self.layout.heads.key_block[h], s, 0)
        mask, bias = (
            None if x is None else self.block(x, self.layout.index_of(name, (*batch, h, r, s)))
            for name, x in (("mask", self.mask), ("bias", self.bias))
        )
        return self.block(self.key, of_keys), self.block(self.value, of_keys), mask, bias


def key_of(x: Any, index: Index) -> Key:
    """Return the key of the block of x at an index of all axes, of which x has the last ones, some of size 1."""
    shape = x.shape
    return (x.name, *(0 if n == 1 else i for n, i in zip(shape, index[len(index) - len(shape) :], strict=True)))


def loads_of(x: Any) -> dict[Key, Task]:
    """Return the blocks of x that are loads, by key: tasks that depend on nothing, or only on what they load from.

    Tasks in a line after a load (a transpose, a change of dtype) become part of it.
    """
    graph = convert_legacy_graph(dict(x.__dask_graph__()))
    loads = {key: load_of(graph, key) for key in _keys(x.name, x.chunks)}
    return {key: task for key, task in loads.items() if task is not None}


def load_of(graph: dict[Any, Any], key: Key) -> Task | None:
    """Return one task for the line of tasks that ends with a block; None if it has other inputs than one store."""
    task = graph[key]
    while isinstance(task, Task) and len(task.dependencies) == 1:
        (first,) = task.dependencies
        before = graph[first]
        if isinstance(before, DataNode) or not isinstance(first, tuple):  # the store
            return task
        task = task.substitute({first: before.target if isinstance(before, Alias) else before})
    return task if isinstance(task, Task) and not task.dependencies else None


def _keys(name: str, chunks: Sequence[Chunks]) -> Any:
    return product((name,), *(range(len(c)) for c in chunks))


def tree(tasks: dict[Key, Task], name: Key, keys: list[Key], function: Callable[..., Any], fan: int, *rest: Any) -> Key:
    """Reduce neighbours, `fan` at a time, until one is left; return its key."""
    level = 0
    while len(keys) > 1:
        above = []
        for i in range(0, len(keys), fan):
            group = keys[i : i + fan]
            if len(group) == 1:
                above.append(group[0])
                continue
            key = (f"{name[0]}-{level}", *name[1:], i // fan)
            tasks[key] = Task(key, function, List(*map(TaskRef, group)), *rest)
            above.append(key)
        keys, level = above, level + 1
    return keys[0]


def array(
    name: str, tasks: dict[Key, Task], inputs: Sequence[Any], dtype: Any, chunks: Sequence[Chunks], like: Any = None
) -> Any:
    """Return the Dask array whose blocks are tasks of a graph that reads blocks of `inputs`.

    The blocks are arrays of NumPy, or else like `like`.
    """
    meta = np.empty((0,) * len(chunks), dtype)
    if like is not None:
        meta = meta_from_array(like, ndim=len(chunks), dtype=dtype)
    if hasattr(inputs[0], "expr"):
        from dask.array._array_expr._collection import from_graph

        whole: dict[Any, Any] = dict(tasks)
        for x in inputs:
            whole.update(x.__dask_graph__())
        return from_graph(whole, meta, tuple(chunks), list(_keys(name, chunks)), name)
    graph = HighLevelGraph.from_collections(name, tasks, dependencies=inputs)
    return da.Array(graph, name, tuple(chunks), meta=meta)
