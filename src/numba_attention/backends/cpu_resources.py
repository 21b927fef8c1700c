"""What calls of kernels need beside the problem: memory that outlives a call, and the kernels themselves."""

import ctypes
import threading
from collections.abc import Callable
from functools import cache

import numpy as np
from numba import carray, types

from ..cpu import backward, decode, forward, launch
from ..cpu.cache import Function, Kernel
from ..cpu.params import PARAMS, STOPPED
from ..cpu.simd import HOST, void_pointer
from ..cpu.spec import Spec
from ..options import Array
from ..sequence_record import SEQUENCE

SMALL = 2e5  # flops, about 2 us of work: below this a parallel region costs more than it saves
KEEP = 2**24  # bytes of scratch that are kept between calls with the other buffers of a call
FREE = 16  # calls at once whose buffers are kept; what more there are make theirs anew, in 10 us
# Flops of a thread from which on a call waits for signals too, which costs 60 to 90 us: 0.1 s of float32 in a loop of
# nothing but multiply-adds. Work that is ten times as slow is interrupted within a second at the latest.
LONG = 2e7 * HOST.bits


class Buffers:
    """Parameters, work counter and scratch of one call, kept for later ones."""

    def __init__(self) -> None:
        self.params = bytearray(PARAMS.itemsize)
        self.params_address = ctypes.addressof(ctypes.c_char.from_buffer(self.params))
        self.counter = ctypes.c_int64(0)
        self.counter_address = ctypes.addressof(self.counter)
        self.scratch, self.scratch_address = np.empty(0, np.uint8), 0
        self.sequence = np.zeros(SEQUENCE.itemsize // 8, np.int64)  # one record
        self.sequence_address = self.sequence.ctypes.data
        self.reusable = True

    def reserve(self, size: int) -> tuple[Array, int]:
        """At least `size` bytes of scratch, aligned to a cache line; raises MemoryError before anything is written."""
        if size <= self.scratch.nbytes - 64:
            return self.scratch, self.scratch_address
        scratch = np.empty(size + 64, np.uint8)
        address = -(-scratch.ctypes.data // 64) * 64
        if size <= KEEP:
            self.scratch, self.scratch_address = scratch, address
        return scratch, address

    def run(self, kernel: Kernel, number: int, work: float, *kept: object) -> None:
        """Run a kernel on `number` threads; `kept` must live as long, `work` is how many flops it is worth."""
        if work > LONG * number and threading.get_ident() == threading.main_thread().ident:
            self.reusable = False  # unless the kernel is known to be done with them
            launch.run_interruptibly(kernel, self.params_address, number, self._stop, self, kept)
            self.reusable = True
        else:
            launch.run(kernel, self.params_address, number)

    def _stop(self) -> None:
        self.counter.value = STOPPED


# Buffers belong to a call and not to a thread: a call from a signal handler or finalizer, in the middle of another in
# the same thread, needs its own. Taking and putting back are single operations of a list: nothing comes between.
_free: list[Buffers] = []


def take() -> Buffers:
    """Buffers for a call, which puts them back at its end."""
    try:
        return _free.pop()
    except IndexError:
        return Buffers()


def put_back(buffers: Buffers) -> None:
    """Leave buffers to later calls."""
    if buffers.reusable and len(_free) < FREE:
        _free.append(buffers)


def _make_addresses() -> Callable[..., int]:
    def addresses(a: Array, b: Array, c: Array, d: Array, target: int) -> int:
        found = carray(void_pointer(target), 4, np.int64)
        found[0], found[1], found[2], found[3] = a.ctypes.data, b.ctypes.data, c.ctypes.data, d.ctypes.data
        return 0

    return addresses


def _addresses_of(size: int) -> Function:
    """Finds where four matrices of elements of this size begin, in a tenth of the time of ``array.ctypes.data``."""
    matrix = types.Array(types.Integer.from_bitwidth(8 * size, signed=False), 2, "A", readonly=True)
    return Function(f"addresses-{size}", _make_addresses, types.int64(matrix, matrix, matrix, matrix, types.int64))


addresses = {size: _addresses_of(size) for size in (2, 4, 8)}


def worker(storage: str, task: str, kv_storage: str = "") -> Kernel:
    """The kernel of a task for one way of storing numbers, and keys and values if these are stored another way."""
    return _worker(storage, task, kv_storage)  # functools.cache would take a default left out for another call


@cache
def _worker(storage: str, task: str, kv_storage: str) -> Kernel:
    spec = Spec(storage, HOST, task, kv_storage)
    make = {"backward": backward.make_worker, "decode": decode.make_worker}.get(task, forward.make_worker)
    return Kernel(spec.name, lambda: make(spec), launch.SIGNATURE)


def threads_for(items: int, flops: float) -> int:
    """How many threads to run so much work on."""
    return min(launch.threads(), items) if items > 1 and flops > SMALL else 1
