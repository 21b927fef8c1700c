"""Extra memory: the bytes that `attention` or `attention_backward` needs beyond its inputs and its result.

``python -m numba_attention.benchmarking.memory CASE`` prints that number for one case. Each case needs a process of its
own, because the operating system only reports the highest memory that a process has ever had.
"""

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..api import attention, attention_backward
from ..masks.blockmask import BlockMask
from ..options import Array
from .rows import numpy_dtype

Arguments = dict[str, Any]

MiB = 2**20


def _plain(H: int, L: int, E: int = 64, Ev: int = 64, dtype: str = "float32") -> Arguments:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, dtype=np.float32).astype(numpy_dtype(dtype))

    arrays = {"query": normal(H, L, E), "key": normal(H, L, E), "value": normal(H, L, Ev)}
    return {**arrays, "out": np.zeros((H, L, Ev), numpy_dtype(dtype))}


def _bias(L: int) -> Array:
    return np.random.default_rng(1).standard_normal((L, L), dtype=np.float32)


def _mask(L: int) -> Array:
    return np.random.default_rng(2).random((L, L), dtype=np.float32) < 0.5


_OPTIONS: dict[str, Callable[[int], Arguments]] = {
    "none": lambda L: {},
    "is_causal": lambda L: {"is_causal": True},
    "window": lambda L: {"window": (L // 4, L // 8)},
    "query_offset": lambda L: {"is_causal": True, "query_offset": -5},
    "key_lengths": lambda L: {"key_lengths": L - 3},
    "query_lengths": lambda L: {"query_lengths": L - 3},
    "prefix_lengths": lambda L: {"is_causal": True, "prefix_lengths": L // 3},
    "mask": lambda L: {"mask": _mask(L)},
    "block_mask": lambda L: {"mask": BlockMask.from_array(_mask(L)[: L // 64].repeat(64, 0)) & BlockMask.causal(L, L)},
    "mask_of_keys": lambda L: {"mask": _mask(L)[:1]},
    "bias": lambda L: {"bias": _bias(L)},
    "bias_of_keys": lambda L: {"bias": _bias(L)[:1]},
    "softcap": lambda L: {"softcap": 20.0},
    "alibi_slopes": lambda L: {"alibi_slopes": [0.125]},
    "sinks": lambda L: {"sinks": [1.0]},
    "scale": lambda L: {"scale": 0.1},
    "dropout": lambda L: {"dropout_p": 0.1, "seed": 1},
    "return_lse": lambda L: {"return_lse": True},
}


def _with(option: Callable[[int], Arguments]) -> Callable[[int], Arguments]:
    return lambda L: _plain(1, L) | option(L)


def _all_together(L: int) -> Arguments:
    options: Arguments = {}
    for name, add in _OPTIONS.items():
        if name != "prefix_lengths":  # which a window with a left end excludes
            options |= add(L)
    return _plain(1, L, Ev=96) | options | {"mask": _mask(L), "bias": _bias(L), "is_causal": "bottom-right"}


# name -> (length, limit in MiB, arguments of `attention` for a length)
CASES: dict[str, tuple[int, int, Callable[[int], Arguments]]] = {
    "long": (16384, 64, lambda L: _plain(2, L)),
    **{name: (8192, 16, _with(add)) for name, add in _OPTIONS.items()},
    "Ev": (8192, 16, lambda L: _plain(1, L, Ev=128)),
    "float64": (8192, 16, lambda L: _plain(1, L, dtype="float64")),
    "float16": (8192, 16, lambda L: _plain(1, L, dtype="float16")),
    "bfloat16": (8192, 16, lambda L: _plain(1, L, dtype="bfloat16")),
    "all_together": (8192, 16, _all_together),
}


# name -> (length, limit in MiB, arguments): the same for the backward pass, whose gradients are not counted either.
BACKWARD_CASES: dict[str, tuple[int, int, Callable[[int], Arguments]]] = {
    "long": (16384, 48, lambda L: _plain(2, L)),
    **{name: (8192, 40, _with(add)) for name, add in _OPTIONS.items() if name != "return_lse"},
    "Ev": (8192, 56, lambda L: _plain(1, L, Ev=128)),
    "float64": (8192, 40, lambda L: _plain(1, L, dtype="float64")),
    "bfloat16": (8192, 40, lambda L: _plain(1, L, dtype="bfloat16")),
}


def backward(arguments: Arguments) -> Callable[[], int]:
    """Make a function that calls `attention_backward` and returns how many bytes the gradients have."""
    options = {name: x for name, x in arguments.items() if name not in ("query", "key", "value", "out", "return_lse")}
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    out, lse = attention(query, key, value, out=arguments["out"], return_lse=True, **options)
    grad_out = np.ones_like(out)

    def call() -> int:
        gradients = attention_backward(grad_out, query, key, value, out, lse, **options)
        return sum(np.asarray(x).nbytes for x in gradients if x is not None)

    return call


def extra_backward(name: str) -> int:
    """Return how many bytes more than inputs and gradients one backward call of a case has needed."""
    length, _, make = BACKWARD_CASES[name]
    backward(make(64))()
    call = backward(make(length))
    filling = level()
    before = peak()
    gradients = call()
    after = peak()
    assert filling.any()
    return after - before - gradients


def ready(name: str) -> tuple[Arguments, Array]:
    """Make the arguments of a case, load its kernel, and `level` the memory. The caller must keep both results."""
    length, _, make = CASES[name]
    attention(**make(64))
    arguments = make(length)
    return arguments, level()


def level() -> Array:
    """Fill memory up to its peak, so that any further need is a new peak.

    Compiling takes memory and frees it again, and a call could fit into that without raising the peak. Memory stays
    filled as long as the returned array exists.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    filling = np.ones(max(0, peak() - _resident()) + MiB, np.uint8)
    assert peak() - _resident() < 4 * MiB, "the process cannot be brought to its own peak"
    return filling


def peak() -> int:
    """Return the largest number of bytes that this process has ever had resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def extra(name: str) -> int:
    """Return how many bytes more than inputs and result one call of a case has needed."""
    arguments, filling = ready(name)
    before = peak()
    attention(**arguments)
    after = peak()
    assert filling.any()
    return after - before


if __name__ == "__main__":
    print(extra(sys.argv[1]))
