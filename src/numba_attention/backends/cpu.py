"""The CPU backend: turns a `Problem` into the records that the kernels read, and launches them."""

import ctypes
import math
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba.core import config

from ..cpu import forward as kernels
from ..cpu import launch
from ..cpu.cache import Kernel
from ..cpu.elements import Spec
from ..cpu.params import PARAMS, SCRATCH, SEQUENCE, write
from ..cpu.simd import HOST
from ..intervals import FAR
from ..options import Array
from ..problem import Problem, is_bfloat16

SMALL = 2e5  # flops, about 2 us of work: below this a parallel region costs more than it saves
KEEP = 2**24  # bytes of scratch that a Python thread holds on to between calls


class _Memory(threading.local):
    """Parameters, work counter and scratch of one calling Python thread, kept between calls."""

    def __init__(self) -> None:
        self.params = np.zeros(1, PARAMS)
        self.view = memoryview(self.params).cast("B")
        self.params_address = self.params.ctypes.data
        self.counter = ctypes.c_int64(0)
        self.counter_address = ctypes.addressof(self.counter)
        self.scratch, self.scratch_address = np.empty(0, np.uint8), 0

    def reserve(self, size: int) -> tuple[Array, int]:
        """At least `size` bytes of scratch, aligned to a cache line; raises MemoryError before anything is written."""
        if size <= self.scratch.nbytes - 64:
            return self.scratch, self.scratch_address
        scratch = np.empty(size + 64, np.uint8)
        address = -(-scratch.ctypes.data // 64) * 64
        if size <= KEEP:
            self.scratch, self.scratch_address = scratch, address
        return scratch, address


_memory = _Memory()


@cache
def _worker(storage: str, weights: bool) -> Kernel:
    spec = Spec(storage, HOST)
    name = f"{'weights' if weights else 'forward'}-{storage}-{HOST.name}"
    return Kernel(name, lambda: kernels.make_worker(spec, weights), launch.SIGNATURE)


@cache
def _layout(storage: str, E: int, Ev: int) -> tuple[Spec, list[int], int, int]:
    spec = Spec(storage, HOST)
    offsets, size = kernels.scratch(spec, E, Ev)
    block = spec.block[0]
    return spec, [offsets[name] for name in SCRATCH], size, -(-Ev // block) * block


def unusable() -> str | None:
    if config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set; unset it, or use backend='reference'"
    return None


def warmup_jobs() -> list[tuple[str, Callable[[], None]]]:
    """The kernels worth compiling ahead, each with a function that does it."""

    def job(kernel: Kernel) -> Callable[[], None]:
        return lambda: (kernel.address, None)[1]

    jobs = [(f"{kernel.name}", job(kernel)) for kernel in (launch._launcher,)]
    for storage in ("float32", "float64", "float16", "bfloat16"):
        jobs.append((f"attention, {storage}", job(_worker(storage, False))))
    jobs.append(("attention_weights, float32", job(_worker("float32", True))))
    return jobs


def forward(problem: Problem) -> None:
    """Write ``problem.out`` and ``problem.lse``."""
    _run(problem, weights=False)


def weights(problem: Problem) -> None:
    """Write the probabilities of the chosen heads and rows to ``problem.out``."""
    _run(problem, weights=True)


def _storage(dtype: np.dtype[Any]) -> str:
    return "bfloat16" if is_bfloat16(dtype) else dtype.name


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _offsets(array: Array, batch: tuple[int, ...]) -> Array | int:
    """Byte offset of each sequence of the batch, flattened."""
    total: Array = np.zeros((1,) * len(batch), np.int64)
    for axis, (n, stride) in enumerate(zip(batch, array.strides, strict=False)):
        total = total + np.arange(n).reshape((-1,) + (1,) * (len(batch) - 1 - axis)) * stride
    return total.ravel()


def _compact(array: Array, dtype: Any) -> Array:
    """Convert the dtype of a broadcast array without expanding it."""
    index = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides)
    return np.broadcast_to(array[index].astype(dtype), array.shape)


def _run(p: Problem, weights: bool) -> None:
    out = p.out
    if out.size == 0:
        return
    if p.query.dtype == np.float16 and not HOST.f16:
        raise NotImplementedError
    storage = _storage(p.query.dtype)
    spec, at, scratch_size, padded = _layout(storage, p.E, 0 if weights else p.Ev)
    H, Hkv, L, S, E = p.H, p.Hkv, p.L, p.S, p.E
    group = H // Hkv
    batch = p.batch
    B = math.prod(batch)
    heads = Hkv  # work items a sequence has per row tile
    rows, chosen = L, 0

    sequences = np.zeros(B, SEQUENCE)
    sequences["query"] = _address(p.query)
    sequences["key"] = _address(p.key)
    sequences["value"] = _address(p.value)
    sequences["out"] = _address(out)
    for name, array in (("query", p.query), ("key", p.key), ("value", p.value), ("out", out)):
        if B > 1:
            sequences[name] += _offsets(array, batch)
    sequences["queries"] = L if p.query_lengths is None else p.query_lengths.ravel()
    sequences["keys"] = S if p.key_lengths is None else p.key_lengths.ravel()
    sequences["offset"] = p.offset if isinstance(p.offset, int) else p.offset.ravel()
    sequences["batch"] = np.arange(B)
    lse = p.lse
    if lse is not None:
        sequences["lse"] = _address(lse) + _offsets(lse, batch)
    bias, bias_kind = p.bias, 0
    if bias is not None:
        names = kernels.bias_elements(spec)
        kind = _storage(bias.dtype)
        if kind not in names:
            bias, kind = _compact(bias, names[0]), names[0]
        bias_kind = 1 + names.index(kind)
        sequences["bias"] = _address(bias) + _offsets(bias, batch)
    mask = p.mask
    if mask is not None:
        sequences["mask"] = _address(mask) + _offsets(mask, batch)
    if weights:
        assert p.heads is not None and p.rows is not None
        sequences = _per_head(p, sequences, bias, mask)
        rows, chosen, heads, group = len(p.rows), _address(p.rows), 1, 1
    sequences["rows"] = rows
    tiles = -(-rows * group // spec.query_tile)
    items = len(sequences) * heads * tiles
    sequences["first"] = np.arange(len(sequences)) * (heads * tiles)

    slopes = sinks = None
    if p.alibi_slopes is not None:
        slopes = np.ascontiguousarray(p.alibi_slopes)
    if p.sinks is not None:
        sinks = np.ascontiguousarray(p.sinks)

    scale = p.scale * kernels.LOG2E
    # The power of two goes to the queries, exactly and before anything can overflow; the rest to the scores.
    factor, exponent = math.frexp(abs(scale))
    prescale = math.ldexp(math.copysign(1.0, scale), exponent)
    cap_inner = cap_outer = 0.0
    if p.softcap is not None:
        cap_inner, cap_outer = factor * kernels.LN2 / p.softcap, p.softcap * kernels.LOG2E

    memory = _memory
    number = 1
    if items > 1 and 2.0 * len(sequences) * heads * group * rows * S * (E + p.Ev) > SMALL:
        number = min(launch.threads(), items)
    scratch, scratch_address = memory.reserve(number * scratch_size)
    memory.counter.value = 0
    qs, ks, vs, os = p.query.strides[-3:], p.key.strides[-3:], p.value.strides[-3:], out.strides[-3:]
    ls = (0, 0) if lse is None else lse.strides[-2:]
    bs = (0, 0, 0) if bias is None else bias.strides[-3:]
    ms = (0, 0, 0) if mask is None else mask.strides[-3:]
    write(
        memory.view,
        [
            memory.counter_address, items, scratch_address, scratch_size, _address(sequences), len(sequences),
            H, group, E, S if weights else p.Ev, padded,
            *qs, *ks, *vs, *os, *ls, *bs, bias_kind, *ms,
            FAR if p.left is None else p.left, FAR if p.right is None else p.right,
            0 if slopes is None else _address(slopes), 0 if sinks is None else _address(sinks), chosen,
            *at, prescale, factor, cap_inner, cap_outer,
        ],
    )  # fmt: skip
    launch.run(_worker(storage, weights), memory.params_address, number)
    del scratch, slopes, sinks  # alive until here: the kernel held their addresses


def _per_head(p: Problem, sequences: Array, bias: Array | None, mask: Array | None) -> Array:
    """Make every chosen head of every sequence a sequence of its own, so that heads may be any index array."""
    assert p.heads is not None
    heads = np.tile(p.heads, len(sequences))
    number = np.tile(np.arange(len(p.heads)), len(sequences))
    each: Array = np.repeat(sequences, len(p.heads))
    each["head"] = heads
    each["query"] += heads * p.query.strides[-3]
    each["key"] += heads // (p.H // p.Hkv) * p.key.strides[-3]
    each["out"] += number * p.out.strides[-3]
    if bias is not None:
        each["bias"] += heads * bias.strides[-3]
    if mask is not None:
        each["mask"] += heads * mask.strides[-3]
    return each
