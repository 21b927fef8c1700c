"""The CPU backend: turns a `Problem` into the records that the kernels read, and launches them."""

import ctypes
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import carray, types
from numba.core import config

from ..cpu import forward as kernels
from ..cpu import launch
from ..cpu.cache import Kernel
from ..cpu.elements import Spec
from ..cpu.params import ARRAYS, PARAMS, REST, SCRATCH, SEQUENCE, pack_addresses, pack_rest
from ..cpu.simd import HOST, void_pointer
from ..intervals import FAR
from ..options import Array
from ..problem import Problem, is_bfloat16

SMALL = 2e5  # flops, about 2 us of work: below this a parallel region costs more than it saves
KEEP = 2**24  # bytes of scratch that a Python thread holds on to between calls


class _Memory(threading.local):
    """Parameters, work counter and scratch of one calling Python thread, kept between calls."""

    def __init__(self) -> None:
        self.params = bytearray(PARAMS.itemsize)
        self.params_address = ctypes.addressof(ctypes.c_char.from_buffer(self.params))
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


def _make_addresses() -> Callable[..., int]:
    def addresses(a: Array, b: Array, c: Array, d: Array, target: int) -> int:
        found = carray(void_pointer(target), 4, np.int64)
        found[0], found[1], found[2], found[3] = a.ctypes.data, b.ctypes.data, c.ctypes.data, d.ctypes.data
        return 0

    return addresses


def _addresses_of(size: int) -> Kernel:
    """Finds where four matrices of elements of this size begin, in a tenth of the time of ``array.ctypes.data``."""
    matrix = types.Array(types.Integer.from_bitwidth(8 * size, signed=False), 2, "A", readonly=True)
    return Kernel(f"addresses-{size}", _make_addresses, types.int64(matrix, matrix, matrix, matrix, types.int64))


_addresses = {size: _addresses_of(size) for size in (2, 4, 8)}


@cache
def _worker(storage: str, task: str) -> Kernel:
    spec = Spec(storage, HOST, task)
    return Kernel(spec.name, lambda: kernels.make_worker(spec), launch.SIGNATURE)


def unusable() -> str | None:
    if config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set; unset it, or use backend='reference'"
    return None


def warmup_jobs() -> list[tuple[str, Callable[[], None]]]:
    """The kernels worth compiling ahead, each with a function that does it."""

    def job(kernel: Kernel) -> Callable[[], None]:
        return lambda: (kernel.address, None)[1]

    jobs = [(kernel.name, job(kernel)) for kernel in (launch._launcher, *_addresses.values())]
    storages = ("float32", "float64", "float16", "bfloat16")
    jobs += [(f"attention, {storage}", job(_worker(storage, "forward"))) for storage in storages]
    return [*jobs, ("attention_weights, float32", job(_worker("float32", "weights")))]


def forward(problem: Problem) -> None:
    """Write ``problem.out`` and ``problem.lse``."""
    _run(problem, weights=False)


def weights(problem: Problem) -> None:
    """Write the probabilities of the chosen heads and rows to ``problem.out``."""
    _run(problem, weights=True)


def _run_widened(p: Problem, weights: bool) -> None:
    """float16 on a host that cannot convert it in hardware (x86 before 2012): through float32 copies."""
    single: list[Array] = [x.astype(np.float32) for x in (p.query, p.key, p.value)]
    out = np.empty(p.out.shape, np.float32)
    _run(replace(p, query=single[0], key=single[1], value=single[2], out=out), weights)
    p.out[...] = out


def _storage(dtype: np.dtype[Any]) -> str:
    return "bfloat16" if is_bfloat16(dtype) else dtype.name


def _address(array: Array | None) -> int:
    if array is None:
        return 0
    return int(array.__array_interface__["data"][0])


def _offsets(array: Array, batch: tuple[int, ...]) -> Array:
    """Byte offset of each sequence of the batch, flattened."""
    total: Array = np.zeros((1,) * len(batch), np.int64)
    for axis, (n, stride) in enumerate(zip(batch, array.strides, strict=False)):
        total = total + np.arange(n).reshape((-1,) + (1,) * (len(batch) - 1 - axis)) * stride
    return total.ravel()


def _compact(array: Array, dtype: Any) -> Array:
    """Convert the dtype of a broadcast array without expanding it."""
    index = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides)
    return np.broadcast_to(array[index].astype(dtype), array.shape)


class _Plan(NamedTuple):
    """All of a call that follows from shapes, strides and options, and not from where the arrays are."""

    worker: Kernel
    sequences: Array
    sequences_address: int
    rest: bytes  # the PARAMS record after the addresses
    items: int
    flops: float
    scratch_size: int


_plans: dict[Any, _Plan] = {}


def _run(p: Problem, weights: bool) -> None:
    if not p.out.size and (p.lse is None or not p.lse.size):
        return
    if p.query.dtype == np.float16 and not HOST.f16:
        return _run_widened(p, weights)
    bias = _readable_bias(p)
    plain = p.mask is None and bias is None and p.query_lengths is None and p.key_lengths is None and not weights
    if plain and type(p.offset) is int:
        q, k, v, out = p.query, p.key, p.value, p.out
        key = (
            q.dtype, q.shape, q.strides, k.shape, k.strides, v.shape, v.strides, out.strides, p.lse is None,
            p.scale, p.softcap, p.left, p.right, p.offset,
        )  # fmt: skip
        plan = _plans.get(key)
        if plan is None:
            if len(_plans) > 500:
                _plans.clear()
            plan = _plans[key] = _make_plan(p, bias, weights)
    else:
        plan = _make_plan(p, bias, weights)
    number = 1
    if plan.items > 1 and plan.flops > SMALL:
        number = min(launch.threads(), plan.items)
    memory = _memory
    scratch, scratch_address = memory.reserve(number * plan.scratch_size)
    memory.counter.value = 0
    # Contiguous copies of a few numbers; they must live until the kernel is done with their addresses.
    slopes = None if p.alibi_slopes is None else np.ascontiguousarray(p.alibi_slopes)
    first = (0,) * len(p.batch) + (0,)
    _addresses[p.query.itemsize].call(p.query[first], p.key[first], p.value[first], p.out[first], memory.params_address)
    pack_addresses(
        memory.params, ARRAYS, memory.counter_address, scratch_address, plan.sequences_address,
        _address(p.lse), _address(bias), _address(p.mask), _address(slopes), _address(p.sinks), _address(p.rows),
    )  # fmt: skip
    memory.params[REST:] = plan.rest
    launch.run(plan.worker, memory.params_address, number)
    del scratch, slopes, bias


def _readable_bias(p: Problem) -> Array | None:
    """The bias as a type that the kernel reads, without expanding what is broadcast."""
    if p.bias is None:
        return None
    names = kernels.bias_elements(Spec(_storage(p.query.dtype), HOST))
    return p.bias if _storage(p.bias.dtype) in names else _compact(p.bias, names[0])


def _make_plan(p: Problem, bias: Array | None, weights: bool) -> _Plan:
    storage = _storage(p.query.dtype)
    spec = Spec(storage, HOST)
    offsets, scratch_size = kernels.scratch(spec, p.E, 0 if weights else p.Ev)
    sequences = np.zeros(math.prod(p.batch), SEQUENCE)
    arrays = {"query": p.query, "key": p.key, "value": p.value, "out": p.out}
    for name, array in {**arrays, "lse": p.lse, "bias": bias, "mask": p.mask}.items():
        if array is not None:
            sequences[name] = _offsets(array, p.batch)
    sequences["queries"] = p.L if p.query_lengths is None else p.query_lengths.ravel()
    sequences["keys"] = p.S if p.key_lengths is None else p.key_lengths.ravel()
    sequences["offset"] = p.offset if isinstance(p.offset, int) else p.offset.ravel()
    sequences["batch"] = np.arange(len(sequences))
    heads, group, rows = p.Hkv, p.H // p.Hkv, p.L
    if p.heads is not None and p.rows is not None:
        sequences = _per_head(p, p.heads, sequences, bias)
        heads, group, rows = 1, 1, len(p.rows)
    sequences["rows"] = rows
    items_each = heads * -(-rows * group // spec.query_tile)
    sequences["first"] = np.arange(len(sequences)) * items_each
    items = len(sequences) * items_each

    scale = p.scale * kernels.LOG2E
    # The power of two goes to the queries, exactly and before anything can overflow; the rest to the scores.
    factor, exponent = math.frexp(abs(scale))
    prescale = math.ldexp(math.copysign(1.0, scale), exponent)
    cap_inner = cap_outer = 0.0
    if p.softcap is not None:
        cap_inner, cap_outer = factor * kernels.LN2 / p.softcap, p.softcap * kernels.LOG2E
    bias_kind = 0 if bias is None else 1 + kernels.bias_elements(spec).index(_storage(bias.dtype))

    def strides(array: Array | None, n: int) -> tuple[int, ...]:
        return (0,) * n if array is None else array.strides[len(p.batch) :]

    rest = pack_rest(
        items, scratch_size, len(sequences), p.H, group, p.E, p.S if weights else p.Ev, offsets["end of out"],
        *strides(p.query, 3), *strides(p.key, 3), *strides(p.value, 3), *strides(p.out, 3), *strides(p.lse, 2),
        *strides(bias, 3), bias_kind, *strides(p.mask, 3),
        FAR if p.left is None else p.left, FAR if p.right is None else p.right,
        *(offsets[name] for name in SCRATCH),
        prescale, factor, cap_inner, cap_outer,
    )  # fmt: skip
    flops = 2.0 * len(sequences) * heads * group * rows * p.S * (p.E + p.Ev)
    worker = _worker(storage, "weights" if weights else "forward")
    return _Plan(worker, sequences, _address(sequences), rest, items, flops, scratch_size)


def _per_head(p: Problem, chosen: Array, sequences: Array, bias: Array | None) -> Array:
    """Make every chosen head of every sequence a sequence of its own, so that heads may be any index array."""
    heads = np.tile(chosen, len(sequences))
    each: Array = np.repeat(sequences, len(chosen))
    each["head"] = heads
    each["query"] += heads * p.query.strides[-3]
    each["key"] += heads // (p.H // p.Hkv) * p.key.strides[-3]
    each["out"] += np.tile(np.arange(len(chosen)), len(sequences)) * p.out.strides[-3]
    if bias is not None:
        each["bias"] += heads * bias.strides[-3]
    if p.mask is not None:
        each["mask"] += heads * p.mask.strides[-3]
    return each
