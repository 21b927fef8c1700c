"""What a task does, on a worker: one pair of blocks, or the merge or sum of several.

Results stay in float32, or float64, until the last task rounds them: parts of a row in float16 or bfloat16 would be
merged with their rounding errors.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numba
import numpy as np

from ..api import attention as attend
from ..api import attention_backward as differentiate
from ..merging import merge as merge_parts
from ..options import Array, Gradients, Options

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


def wide(x: Any) -> Any:
    """Return half types as float32."""
    return x if x is None or x.dtype.itemsize > 2 else x.astype(np.float32)


def _settings(options: Options, mask: Any, bias: Any) -> dict[str, Any]:
    """Return the options of a pair, with blocks of arrays; those of a `BlockMask` are in the options already."""
    return options._replace(mask=options.mask if mask is None else mask, bias=bias)._asdict()


def part(query: Array, key: Array, value: Array, mask: Any, bias: Any, options: Options, run: Run) -> State:
    """Attend to one block of keys."""
    settings = _settings(options, mask, bias)
    with kernel_threads(run.threads):
        return attend(wide(query), wide(key), wide(value), return_lse=True, backend=run.backend, **settings)


def no_keys(query: Array, heads: tuple[int, ...], Ev: int, options: Options, run: Run) -> State:
    """Return the state of rows that see nothing; `heads` are the axes of keys before their length."""
    key, value = (np.empty((*heads, 0, n), query.dtype) for n in (query.shape[-1], Ev))
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
    bias: Any, options: Options, run: Run, left: Gradients | None = None, above: Gradients | None = None,
) -> Gradients:  # fmt: skip
    """Return the part of every gradient that one pair of blocks has, added to the sums of other pairs.

    `out` and `lse` are those of all keys. `left` is a pair of the same rows, `above` one of the same keys.
    """
    settings = _settings(options, mask, wide(bias))
    grad_out, query, key, value, out = (wide(x) for x in (grad_out, query, key, value, out))
    with kernel_threads(run.threads):
        grads = differentiate(grad_out, query, key, value, out, lse, grad_lse=grad_lse, backend=run.backend, **settings)
    sums: dict[str, Any] = {} if left is None else {"query": add([left, grads], "query")}
    if above is not None:
        sums |= {name: add([above, grads], name) for name in ("key", "value")}
    return grads._replace(**sums)


def no_keys_gradients(
    grad_out: Array, query: Array, heads: tuple[int, ...], out: Array, lse: Array, grad_lse: Any, options: Options,
    run: Run,
) -> Gradients:  # fmt: skip
    """Return the gradients of rows that see their sinks only."""
    key, value = (np.empty((*heads, 0, n), query.dtype) for n in (query.shape[-1], out.shape[-1]))
    return pair_gradients(grad_out, query, key, value, out, lse, grad_lse, None, None, options, run)


def add(parts: Sequence[Any], name: str, dtype: Any = None) -> Array:
    """Add up the gradients of one input, in this order: fields of what a pair has, and sums; the last has a dtype."""
    arrays = [getattr(x, name) if isinstance(x, Gradients) else x for x in parts]
    total: Array = arrays[0]
    for x in arrays[1:]:
        total = total + x
    return total if dtype is None else total.astype(dtype, copy=False)


def zeros(shape: tuple[int, ...], dtype: Any) -> Array:
    """Return the gradient of a block that no row sees."""
    return np.zeros(shape, dtype)
