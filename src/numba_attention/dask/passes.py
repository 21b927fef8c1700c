"""The graphs of the forward and the backward pass: one task for each visible pair of blocks, then merges or sums."""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from typing import Any

from ..options import Gradients
from . import tasks
from .graph import Key, List, Operands, Task, TaskRef, array, key_of, tree
from .layout import Chunks, Index, Layout
from .tasks import Run

OPERANDS = ("query", "key", "value")


class Results:
    """Chunks of the results, and keys of their blocks: those of arrays of one head have no axes before the rows."""

    def __init__(self, layout: Layout, Ev: int, flat: bool) -> None:
        self._first = -2 if flat else 0
        self.out: Sequence[Chunks] = (*layout.scores[:-1], (Ev,))[self._first :]
        self.lse: Sequence[Chunks] = layout.scores[:-1][-1 if flat else 0 :]
        self._flat = flat

    def keys(self, out: str, lse: str, index: Index) -> tuple[Key, Key]:
        """Return the keys of a block of out and of lse at an index (*batch, head, rows)."""
        return (out, *(*index, 0)[self._first :]), (lse, *index[-1 if self._flat else 0 :])


def forward(
    operands: Operands, results: Results, Ev: int, token: str, run: Run, fan: int, dtype: Any, lse_dtype: Any
) -> tuple[Any, Any]:
    """Return out and lse as lazy arrays."""
    layout = operands.layout
    part, merged, out, lse = (f"attention-{x}-{token}" for x in ("part", "merge", "out", "lse"))
    no_keys = len(layout.scores[-1])  # stands for a block of keys
    states: dict[Key, Task] = operands.tasks
    outs: dict[Key, Task] = {}
    lses: dict[Key, Task] = {}
    # Batch and heads outermost: Dask keeps a block until its last reader is done, so that a worker holds the keys and
    # values of the heads in progress only.
    for batch, h, r, pairs in layout.pairs():
        query = operands.block(operands.query, (*batch, h, r, 0))
        state_keys: list[Key] = []
        for s, options in pairs:
            key = (part, *batch, h, r, no_keys if s is None else s)
            if s is None:
                states[key] = Task(key, tasks.no_keys, query, _heads_of(layout, results, batch, h), Ev, options, run)
            else:
                more = operands.of_mods(batch, h, s)
                states[key] = Task(key, tasks.part, query, *operands.of_pair(batch, h, r, s), options, run, *more)
            state_keys.append(key)
        state = TaskRef(tree(states, (merged, *batch, h, r), state_keys, tasks.merge, fan))
        out_key, lse_key = results.keys(out, lse, (*batch, h, r))
        outs[out_key] = Task(out_key, tasks.out_of, state, dtype)
        lses[lse_key] = Task(lse_key, tasks.lse_of, state)
    return (
        array(out, states | outs, operands.arrays, dtype, results.out, operands.like),
        array(lse, states | lses, operands.arrays, lse_dtype, results.lse, operands.like),
    )


def backward(
    operands: Operands, results: Results, rows: dict[str, Any], token: str, run: Run, fan: int, dtypes: dict[str, Any],
    mod_args: dict[str, Any], mod_grads: Any, number: int,
) -> Gradients:  # fmt: skip
    """Return the gradients as lazy arrays.

    Each pair adds its part to the sums of the pair before it in its row (dQ) and in its column (dK, dV) of the grid of
    blocks. If all parts were tasks whose results are added up later, they would all be in memory: a pair has parts of
    three gradients, and no order of the pairs lets all three sums advance. With chains, the sums of a head are, and
    pairs on a diagonal of the grid run at the same time.

    Parameters
    ----------
    operands, results
    rows : dict
        The arrays grad_out, out, lse and grad_lse (or None), on the chunks of the results.
    token : str
    run : Run
    fan : int
        How many sums one task adds, where a gradient has several.
    dtypes : dict
        Those of the gradients, by name; the others are None.
    mod_args : dict
        The arrays in `mod_args` that have gradients, by the names of `options.split_mod_args`.
    mod_grads : object
        As in `attention_backward`.
    number : int
        How many `mod_args` there are.
    """
    layout = operands.layout
    no_keys = len(layout.scores[-1])  # stands for a block of keys
    pair = f"attention-gradients-{token}"
    of_pairs: dict[Key, Task] = operands.tasks
    parts: dict[str, dict[Index, list[Key]]] = {name: defaultdict(list) for name in (*dtypes, *mod_args)}
    arrays: dict[str, Any] = {name: getattr(operands, name, None) for name in dtypes}
    length_of_row, length_of_column = lengths_of_chains(layout)
    columns: dict[int, Key] = {}  # the last pair so far in each column
    for batch, h, r, pairs in layout.pairs():
        if r == 0:
            columns = {}
        query = operands.block(operands.query, (*batch, h, r, 0))
        given = {
            name: None if x is None else TaskRef(results.keys(x.name, x.name, (*batch, h, r))["lse" in name])
            for name, x in rows.items()
        }
        of_rows = given["out"], given["lse"], given["grad_lse"]
        before: Key | None = None
        for n, (s, options) in enumerate(pairs):
            key = (pair, *batch, h, r, no_keys if s is None else s)
            with_sinks = n == 0 and "sinks" in parts
            if s is not None:
                blocks = operands.of_pair(batch, h, r, s)
                left: Key | None = before if n % length_of_row else None
                above = columns.get(s) if r % length_of_column else None
                of_pairs[key] = Task(
                    key, tasks.pair_gradients, given["grad_out"], query, *blocks[:2], *of_rows, *blocks[2:], options,
                    run, *operands.of_mods(batch, h, s) or (None, None), mod_grads,
                    *(None if x is None else TaskRef(x) for x in (left, above)),
                )  # fmt: skip
                of_keys = (*batch, layout.heads.key_block[h], s, 0)
                _replace_last(parts["query"][key_of(operands.query, (*batch, h, r, 0))[1:]], left, key)
                for name in ("key", "value"):
                    _replace_last(parts[name][key_of(arrays[name], of_keys)[1:]], above, key)
                for name in mod_args:
                    _replace_last(parts[name][(0,) * mod_args[name].ndim], left, key)
                if "bias" in parts:
                    parts["bias"][key_of(operands.bias, layout.index_of("bias", (*batch, h, r, s)))[1:]].append(key)
                before = columns[s] = key
            elif with_sinks:
                heads = _heads_of(layout, results, batch, h)
                of_pairs[key] = Task(
                    key, tasks.no_keys_gradients, given["grad_out"], query, heads, *of_rows, options, run
                )
            if with_sinks:
                parts["sinks"][(h,)].append(key)
    inputs = [*operands.arrays, *(x for x in rows.values() if x is not None)]
    grads = {}
    for name, dtype in dtypes.items():
        chunks = (layout.heads.query,) if name == "sinks" else arrays[name].chunks
        sums = _sums(f"attention-{name}-{token}", name, parts[name], chunks, dtype, fan, operands.like)
        grads[name] = array(f"attention-{name}-{token}", of_pairs | sums, inputs, dtype, chunks, operands.like)
    for n, (name, x) in enumerate(mod_args.items()):
        whole = tuple((size,) for size in x.shape)
        sums = _sums(f"attention-mod-{n}-{token}", name, parts[name], whole, x.dtype, fan, operands.like)
        grads[name] = array(f"attention-mod-{n}-{token}", of_pairs | sums, inputs, x.dtype, whole, operands.like)
    of_args = None if mod_grads is None else tuple(grads.get(f"mod_args[{n}]") for n in range(number))
    return Gradients(grads["query"], grads["key"], grads["value"], grads.get("bias"), grads.get("sinks"), of_args)


def _replace_last(keys: list[Key], before: Key | None, key: Key) -> None:
    """Let a sum take the place of the one that it adds to, or begin another."""
    if before is not None:
        keys[-1] = key
    else:
        keys.append(key)


AT_ONCE = 32  # pairs that can be computed at the same time, for which chains are cut


def lengths_of_chains(layout: Layout) -> tuple[int, int]:
    """Return how many pairs of a row, and of a column, form one chain: all of them, unless few could run at once.

    The number depends on the chunks only, so that the bits of a sum do too, and not on the workers.
    """
    *others, rows, keys = (len(chunks) for chunks in layout.scores)
    row, column = max(keys, 1), max(rows, 1)
    grids = math.prod(others)
    while grids * -(-rows // column) * -(-keys // row) * min(row, column) < AT_ONCE and max(row, column) > 1:
        if row > column:
            row = -(-row // 2)
        else:
            column = -(-column // 2)
    return row, column


def _heads_of(layout: Layout, results: Results, batch: Index, h: int) -> tuple[int, ...]:
    """Return the sizes of a block of keys, or of one without keys, before its length."""
    if len(results.out) == 2:
        return ()
    return (*layout.shape(batch), layout.heads.key[layout.heads.key_block[h]])


def _sums(
    name: str, field: str, parts: dict[Index, list[Key]], chunks: Sequence[Chunks], dtype: Any, fan: int,
    like: Any,
) -> dict[Key, Task]:  # fmt: skip
    """Return the tasks that add up one gradient, block by block."""
    sums: dict[Key, Task] = {}
    for where in product(*(range(len(c)) for c in chunks)):
        key, keys = (name, *where), parts.get(where)
        if not keys:
            shape = tuple(c[i] for c, i in zip(chunks, where, strict=True))
            sums[key] = Task(key, tasks.zeros, shape, dtype, like)
            continue
        groups = keys
        level = 0
        while True:
            last = len(groups) <= fan
            above = []
            for i in range(0, len(groups), fan):
                group = List(*map(TaskRef, groups[i : i + fan]))
                task_key = key if last else (f"{name}-{level}", *where, i // fan)
                rest = (dtype,) if last else ()
                sums[task_key] = Task(task_key, tasks.add, group, field, *rest)
                above.append(task_key)
            if last:
                break
            groups, level = above, level + 1
    return sums
