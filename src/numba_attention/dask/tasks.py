"""What a task does, on a worker: one pair of blocks, or the merge or sum of several.

Results stay in float32, or float64, until the last task rounds them: parts of a row in float16 or bfloat16 would be
merged with their rounding errors.
"""

import linecache
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numba
import numpy as np

from .. import device_call
from ..backends import Backend, select
from ..device.arrays import on_device
from ..merging import merge as merge_parts
from ..mods.rules import as_arguments
from ..options import Array, Gradients, Options
from ..problem.dense import WHOLE, Empty, Origin, build, build_backward, finish, widened
from ..problem.packed import build as build_packed
from ..problem.packed import build_backward as build_packed_backward
from ..problem.packed import finish as finish_packed
from ..validation import lse_dtype_of
from .packed import Pieces

State = tuple[Array, Array]  # (out, lse) of the rows of a block over some keys


class Run(NamedTuple):
    """How a task runs its kernels."""

    backend: str | None
    threads: int | None


def threads_of_task(threads: int | None) -> int | None:
    """Return how many threads the kernels of a task use, None for as many as they would otherwise.

    The number that the user passed, or else set in NUMBA_NUM_THREADS. Without either it is 1, because workers run tasks
    on as many threads as there are cores; but the synchronous scheduler runs one task at a time in the main thread.
    """
    if threads is not None:
        return min(threads, int(numba.config.NUMBA_NUM_THREADS))
    if threading.current_thread() is threading.main_thread():
        return None
    return int(numba.config.NUMBA_NUM_THREADS) if "NUMBA_NUM_THREADS" in os.environ else 1


class Mods(NamedTuple):
    """The arguments of mods, and the text of the files that mods are defined in, which a worker may not have."""

    mod_args: tuple[Any, ...]
    files: dict[str, str]

    def restore(self) -> tuple[Any, ...]:
        """Return the arguments; the functions can be read from their source now."""
        for name, text in self.files.items():
            if linecache.getlines(name) != (lines := text.splitlines(keepends=True)):
                linecache.cache[name] = len(text), None, lines, name
        return self.mod_args


def mods_of(options: Options) -> Mods | None:
    """Return what tasks need beside the functions of a call; None without functions."""
    functions = [getattr(x, "py_func", x) for x in (options.score_mod, options.mask_mod) if x is not None]
    functions += [x.derivative for x in functions if hasattr(x, "derivative")]
    if not functions:
        return None
    names = {x.__code__.co_filename: x.__globals__ for x in functions if hasattr(x, "__code__")}
    return Mods(as_arguments(options.mod_args), {n: "".join(linecache.getlines(n, g)) for n, g in names.items()})


@contextmanager
def kernel_threads(threads: int | None) -> Iterator[None]:
    """Limit the threads of the kernels of a block of code: Numba keeps their number for each calling thread."""
    number = threads_of_task(threads)
    if number is None:
        yield
        return
    before = numba.get_num_threads()
    numba.set_num_threads(number)
    try:
        yield
    finally:
        numba.set_num_threads(before)


def threads_for(chosen: Backend, run: Run) -> Any:
    """Return what a task calls a backend in: kernels on a GPU have no threads of the host that could be limited."""
    return nullcontext() if chosen.on_device else kernel_threads(run.threads)


def to_device(block: Array, like: Any) -> Any:
    """Copy a block to the GPU of the worker, as an array of the library of `like`."""
    return device_call.placed(np.asarray(block), like)


def _filled(value: float, shape: tuple[int, ...], dtype: Any, like: Any) -> Array:
    """Return an array of one number, where another array is."""
    if not on_device(like):
        return np.full(shape, value, dtype)
    array: Array = device_call.zeros(shape, np.dtype(dtype), like)
    if value:
        array[...] = value
    return array


def _wide_type(x: Array) -> Any:
    """Return the type of parts of results for arrays like x."""
    return np.float32 if x.dtype.itemsize == 2 else x.dtype


def wide(x: Any) -> Any:
    """Return half types as float32."""
    return x if x is None or x.dtype.itemsize > 2 else x.astype(np.float32)


def _with_arrays(options: Options, mask: Any, bias: Any, mods: Mods | None) -> Options:
    """Return the options of a pair, with blocks of arrays; those of a `BlockMask` are in the options already."""
    mod_args = () if mods is None else mods.restore()
    return options._replace(mask=options.mask if mask is None else mask, bias=bias, mod_args=mod_args)


def part(
    query: Array, key: Array, value: Array, mask: Any, bias: Any, options: Options | Pieces, run: Run,
    origin: Origin | None = None, mods: Mods | None = None,
) -> State:  # fmt: skip
    """Attend to one block of keys; `options` of packed sequences are the pieces of the pair."""
    chosen = select(run.backend, query, key, value)
    with threads_for(chosen, run):
        if not isinstance(options, Options):
            return _part_in_pieces(chosen, query, key, value, mask, bias, options, mods)
        return _attend(chosen, query, key, value, _with_arrays(options, mask, bias, mods), origin)


def _attend(
    chosen: Backend, query: Array, key: Array, value: Array, options: Options, origin: Origin | None,
    starts: dict[str, Array] | None = None,
) -> State:  # fmt: skip
    """Attend, on a GPU or on the host; `starts` are the offsets of packed sequences."""
    arrays, starts = {"query": query, "key": key, "value": value}, starts or {}
    if chosen.on_device:
        return device_call.run(_forward, chosen, arrays, options, small=starts, origin=origin)
    return _forward(chosen, **arrays, **starts, options=options, origin=origin, empty=np.empty)


def _forward(
    backend: Backend, query: Array, key: Array, value: Array, options: Options, origin: Origin | None, empty: Empty,
    starts_q: Array | None = None, starts_k: Array | None = None,
) -> State:  # fmt: skip
    if starts_q is None:
        problem = build(query, key, value, options, None, True, widened(empty))
    else:
        problem = build_packed(query, key, value, starts_q, starts_k, options, None, True, widened(empty))
    problem.origin = origin or WHOLE
    backend.forward(problem)
    assert problem.result_lse is not None
    return problem.result, problem.result_lse


def no_keys(query: Array, heads: tuple[int, ...], Ev: int, options: Options | Pieces, run: Run) -> State:
    """Return the state of rows that see nothing; `heads` are the axes of keys before their length."""
    key, value = (_filled(0, (*heads, 0, n), query.dtype, query) for n in (query.shape[-1], Ev))
    return part(query, key, value, None, None, options, run)


def merge(parts: Sequence[State]) -> State:
    """Join the states of the same rows over several blocks of keys."""
    outs, lses = zip(*parts, strict=True)
    return merge_parts(outs, lses)


def out_of(state: State, dtype: Any) -> Array:
    return state[0].astype(dtype, copy=False)


def lse_of(state: State) -> Array:
    return state[1]


def pair_gradients(
    grad_out: Array, query: Array, key: Array, value: Array, out: Array, lse: Array, grad_lse: Any, mask: Any,
    bias: Any, options: Options | Pieces, run: Run, origin: Origin | None = None, mods: Mods | None = None,
    mod_grads: Any = None, left: Gradients | None = None, above: Gradients | None = None,
) -> Gradients:  # fmt: skip
    """Return the part of every gradient that one pair of blocks has, added to the sums of other pairs.

    `out` and `lse` are those of all keys. `left` is a pair of the same rows, `above` one of the same keys.
    """
    bias = wide(bias)
    chosen = select(run.backend, grad_out, query, key, value)
    rows = {"query": query, "grad_out": grad_out, "out": out, "lse": lse, "grad_lse": grad_lse}
    arrays = rows | {"key": key, "value": value}
    with threads_for(chosen, run):
        if isinstance(options, Options):
            grads = _differentiate(chosen, arrays, _with_arrays(options, mask, bias, mods), origin, mod_grads)
        else:
            grads = _gradients_in_pieces(chosen, arrays, mask, bias, options, mods, mod_grads)
    sums: dict[str, Any] = {} if left is None else {"query": add([left, grads], "query")}
    if left is not None and grads.mod_args is not None:
        places = [n for n, x in enumerate(grads.mod_args) if x is not None]
        of_args = {n: add([left, grads], f"mod_args[{n}]") for n in places}
        sums["mod_args"] = tuple(of_args.get(n) for n in range(len(grads.mod_args)))
    if above is not None:
        sums |= {name: add([above, grads], name) for name in ("key", "value")}
    return grads._replace(**sums)


def _differentiate(
    chosen: Backend, arrays: dict[str, Any], options: Options, origin: Origin | None, mod_grads: Any,
    starts: dict[str, Array] | None = None,
) -> Gradients:  # fmt: skip
    """Return gradients, on a GPU or on the host; `starts` are the offsets of packed sequences."""
    starts = starts or {}
    if chosen.on_device:
        return device_call.run(_backward, chosen, arrays, options, small=starts, origin=origin, mod_grads=mod_grads)
    return _backward(chosen, **arrays, **starts, options=options, origin=origin, mod_grads=mod_grads, empty=np.empty)


def _backward(
    backend: Backend, query: Array, key: Array, value: Array, grad_out: Array, out: Array, lse: Array, grad_lse: Any,
    options: Options, origin: Origin | None, mod_grads: Any, empty: Empty, starts_q: Array | None = None,
    starts_k: Array | None = None,
) -> Gradients:  # fmt: skip
    given: dict[str, Any] = {"options": options, "mod_grads": mod_grads, "empty": empty, "wide": True}
    rows = grad_out, query, key, value, out, lse, grad_lse
    if starts_q is None:
        problem, close = build_backward(*rows, **given), finish
    else:
        problem, close = build_packed_backward(*rows, starts_q, starts_k, **given), finish_packed
    problem.forward.origin = origin or WHOLE
    backend.backward(problem)
    return close(problem, backend.reduce)


def _part_in_pieces(
    chosen: Backend, query: Array, key: Array, value: Array, mask: Any, bias: Any, pieces: Pieces, mods: Mods | None
) -> State:
    """Attend to one block of keys of packed sequences, as (heads, tokens, features)."""
    H, T, _ = query.shape
    out = _filled(0, (T, H, value.shape[-1]), _wide_type(query), query)
    lse = _filled(-np.inf, (H, T), lse_dtype_of(query), query)
    for piece in pieces:
        rows, keys = piece.rows, piece.keys
        options = _with_arrays(piece.options, piece.of("mask", mask), piece.of("bias", bias), mods)
        q, k, v = (x.swapaxes(0, 1) for x in (query[:, rows], key[:, keys], value[:, keys]))
        out[rows], lse[:, rows] = _attend(chosen, q, k, v, options, piece.origin, piece.starts)
    return out.swapaxes(0, 1), lse


def _gradients_in_pieces(
    chosen: Backend, arrays: dict[str, Any], mask: Any, bias: Any, pieces: Pieces, mods: Mods | None, mod_grads: Any
) -> Gradients:
    mod_args = () if mods is None else mods.restore()
    operands = query, key, value = arrays["query"], arrays["key"], arrays["value"]
    lse, grad_lse = arrays["lse"], arrays["grad_lse"]
    dq, dk, dv = (_filled(0, x.shape, _wide_type(x), x) for x in operands)
    of_bias = None if bias is None else _filled(0, bias.shape, bias.dtype, query)
    of_sinks = _filled(0, (len(query),), lse.dtype, query)
    of_args = {n: _filled(0, mod_args[n].shape, mod_args[n].dtype, query) for n in mod_grads or ()}
    for piece in pieces:
        rows, keys = piece.rows, piece.keys
        options = _with_arrays(piece.options, piece.of("mask", mask), piece.of("bias", bias), mods)
        parts = {name: arrays[name][:, rows].swapaxes(0, 1) for name in ("query", "grad_out", "out")}
        parts |= {"lse": lse[:, rows], "grad_lse": None if grad_lse is None else grad_lse[:, rows]}
        parts |= {"key": key[:, keys].swapaxes(0, 1), "value": value[:, keys].swapaxes(0, 1)}
        grads = _differentiate(chosen, parts, options, piece.origin, mod_grads, piece.starts)
        for total, grad, where in zip((dq, dk, dv), grads[:3], (rows, keys, keys), strict=True):
            assert grad is not None
            total[:, where] += grad.swapaxes(0, 1)
        if of_bias is not None:
            of_bias[piece.where["bias"]] += grads.bias
        if grads.sinks is not None:
            of_sinks += grads.sinks
        for n in of_args:
            of_args[n] += grads.of(f"mod_args[{n}]")
    args = None if mod_grads is None else tuple(of_args.get(n) for n in range(len(mod_args)))
    return Gradients(dq, dk, dv, of_bias, of_sinks, args)


def no_keys_gradients(
    grad_out: Array, query: Array, heads: tuple[int, ...], out: Array, lse: Array, grad_lse: Any,
    options: Options | Pieces, run: Run,
) -> Gradients:  # fmt: skip
    """Return the gradients of rows that see their sinks only."""
    key, value = (_filled(0, (*heads, 0, n), query.dtype, query) for n in (query.shape[-1], out.shape[-1]))
    return pair_gradients(grad_out, query, key, value, out, lse, grad_lse, None, None, options, run)


def add(parts: Sequence[Any], name: str | None = None, dtype: Any = None) -> Array:
    """Add up arrays, in this order: the gradient of this name where a part has several; the last sum has a dtype."""
    arrays: list[Any] = [x.of(name) if isinstance(x, Gradients) else x for x in parts]
    total: Array = arrays[0]
    for x in arrays[1:]:
        total = total + x
    return total if dtype is None else total.astype(dtype, copy=False)


def zeros(shape: tuple[int, ...], dtype: Any, like: Any = None) -> Array:
    """Return the gradient of a block that no row sees."""
    return _filled(0, shape, dtype, like)
