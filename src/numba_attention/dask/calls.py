"""From the layout of a call to lazy arrays: how its tasks run, what a graph is recognised by, the passes."""

from typing import Any, NamedTuple

import numpy as np
from dask.base import tokenize

from ..backends import check_name, select
from ..options import Gradients, Options
from ..validation import as_flag, lse_dtype_of
from . import chunks, passes
from .arguments import Running, check_mods, without_arrays
from .graph import Operands, device_meta, on_chunks, placed
from .layout import Layout
from .tasks import Run, mods_of

Arrays = tuple[Any, Any, Any]  # query, key, value, of shape (..., heads, length, features)


class How(NamedTuple):
    """How the tasks of a call run, beside what they compute."""

    run: Run
    fan: int  # parts that one task merges or adds
    stream: bool  # whether tasks load blocks of keys themselves
    like: Any  # an array like the blocks on a GPU, where tasks run then; None for blocks on the host


def how_of(running: Running, layout: Layout, arrays: Arrays) -> How:
    """Check how tasks are to run, that mods read inside their arrays, and that the graph is not too large."""
    check_mods(layout.problem)
    fan = fan_of(running.split_every)
    chunks.check_tasks(layout, fan)
    like = device_meta(*arrays)
    run = Run(backend_of(running.backend, like is not None), threads_of(running.threads))
    return How(run, fan, is_streamed(running.stream, layout, *arrays[1:]), like)


def forward(layout: Layout, arrays: Arrays, settings: Options, running: Running) -> tuple[Any, Any]:
    """Return out, of shape (..., H, L, Ev), and lse."""
    how = how_of(running, layout, arrays)
    p = layout.problem
    operands = Operands(layout, *arrays, settings, mods_of(settings), how.like, how.stream)
    token = tokenize("attention", _identity(operands, settings, how))
    results = passes.Results(layout, p.Ev, p.result.ndim == 2)
    dtypes = p.query.dtype, np.dtype(lse_dtype_of(p.query))
    return passes.forward(operands, results, p.Ev, token, how.run, how.fan, *dtypes)


def backward(
    layout: Layout, arrays: Arrays, of_rows: dict[str, Any], settings: Options, running: Running,
    mod_grads: tuple[int, ...] | None,
) -> Gradients:  # fmt: skip
    """Return the gradients; `of_rows` are the arrays grad_out, out, lse and grad_lse (or None)."""
    how = how_of(running, layout, arrays)
    p = layout.problem
    operands = Operands(layout, *arrays, settings, mods_of(settings), how.like, how.stream)
    results = passes.Results(layout, p.Ev, p.result.ndim == 2)
    rows = {
        name: None if x is None else placed(name, on_chunks(x, results.lse if "lse" in name else results.out), how.like)
        for name, x in of_rows.items()
    }
    names = [None if x is None else x.name for x in rows.values()]
    token = tokenize("backward", mod_grads, names, _identity(operands, settings, how))
    dtypes = dict.fromkeys(passes.OPERANDS, p.query.dtype)
    if operands.bias is not None:
        dtypes["bias"] = operands.bias.dtype
    if p.sinks is not None:
        dtypes["sinks"] = np.asarray(settings.sinks).dtype
    mod_args = {f"mod_args[{n}]": p.mod_args[n] for n in mod_grads or ()}
    places = None if mod_grads is None else list(mod_grads)
    number = len(p.mod_args)
    return passes.backward(operands, results, rows, token, how.run, how.fan, dtypes, mod_args, places, number)


def _identity(operands: Operands, settings: Options, how: How) -> list[Any]:
    """Return what tells a graph from another, but the arrays of rows of a backward pass."""
    names = [x.name for x in operands.arrays]
    loaded = bool(operands.loads)
    return [names, without_arrays(settings), operands.layout.token, how.run, how.fan, loaded, list(operands.tasks)]


def backend_of(backend: str | None, on_device: bool) -> str:
    """Return the backend that tasks are to use; "auto" for blocks on a GPU, if nothing else was chosen."""
    if backend is not None:
        if check_name(backend, "backend") in ("cpu", "reference") and on_device:
            raise ValueError(f"backend must be 'cuda' for blocks on a GPU, or be left out, got {backend!r}")
        return backend
    if on_device:
        return "auto"
    chosen: Any = select(None)
    name: str = chosen.__name__.rpartition(".")[2]
    return name


def is_streamed(stream: Any, layout: Any, key: Any, value: Any) -> bool:
    if stream is not None:
        return as_flag("stream", stream)
    if len(layout.scores[-2]) < 2 and len(layout.heads.query) == len(layout.heads.key):
        return False  # every block of keys has one reader
    return chunks.bytes_of(key, value) > chunks.workers_here().memory / chunks.SHARE


def fan_of(split_every: Any) -> int:
    if isinstance(split_every, bool) or not isinstance(split_every, int | np.integer):
        raise TypeError(f"split_every must be an int, got {type(split_every).__qualname__}")
    if split_every < 2:
        raise ValueError(f"split_every must be at least 2, got {split_every}")
    return int(split_every)


def threads_of(threads: Any) -> int | None:
    if threads is None:
        return None
    if isinstance(threads, bool) or not isinstance(threads, int | np.integer):
        raise TypeError(f"threads must be an int, got {type(threads).__qualname__}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    return int(threads)
