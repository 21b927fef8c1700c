"""Resources of CPU calls that outlive a call: scratch memory, parameter buffers, and the kernels themselves."""

import ctypes
import threading
from collections.abc import Callable
from functools import cache

import numpy as np
from numba.core import config

from ..cpu import backward, decode, forward, launch
from ..cpu.cache import Function, Kernel
from ..cpu.objects import data_of
from ..cpu.params import PARAMS, STOPPED
from ..cpu.simd import HOST, void_pointer
from ..cpu.spec import Spec
from ..cpu.views import carray
from ..options import Array
from ..sequence_record import SEQUENCE

SMALL = 2e5  # flops, about 2 us of work, below which a parallel region costs more than it saves
# Largest scratch memory, in bytes, that is kept between calls: 2 MiB for each of many threads, which is what gradients
# of heads of 2048 keys with 64 features take.
KEEP = 2**21 * max(8, int(config.NUMBA_NUM_THREADS))
FREE = 16  # number of buffers that are kept for concurrent calls; a further call makes its own, in 10 us
# Flops of a thread above which a call can be interrupted by signals, which costs 60 to 90 us. A loop of nothing but
# multiply-adds takes 0.1 s for them in float32. A call below this bound ends within 1 s even at a tenth of that speed.
LONG = 2e7 * HOST.bits


class Buffers:
    """Parameters, work counter and scratch memory of one call, which later calls use again."""

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
        """Return at least `size` bytes of scratch memory, aligned to a cache line, and their address.

        A MemoryError is raised here, before any result is written.
        """
        if size <= self.scratch.nbytes - 64:
            return self.scratch, self.scratch_address
        scratch = np.empty(size + 64, np.uint8)
        address = -(-scratch.ctypes.data // 64) * 64
        if size <= KEEP:
            self.scratch, self.scratch_address = scratch, address
        return scratch, address

    def run(self, kernel: Kernel, number: int, work: float, *kept: object) -> None:
        """Run a kernel on `number` threads. `work` is its work in flops; `kept` are objects that must live as long."""
        if work > LONG * number and threading.get_ident() == threading.main_thread().ident:
            self.reusable = False  # an exception may come before it is certain that the kernel is done with them
            launch.run_interruptibly(kernel, self.params_address, number, self._stop, self, kept)
            self.reusable = True
        else:
            launch.run(kernel, self.params_address, number)

    def _stop(self) -> None:
        self.counter.value = STOPPED


# Buffers belong to a call and not to a thread: a reentrant call, from a signal handler or finalizer in the middle of
# another call of the same thread, needs its own. Popping from and appending to a list are atomic and need no lock.
_free: list[Buffers] = []


def take() -> Buffers:
    """Return buffers for a call, which gives them back with `put_back`."""
    try:
        return _free.pop()
    except IndexError:
        return Buffers()


def put_back(buffers: Buffers) -> None:
    """Keep buffers for later calls."""
    if buffers.reusable and len(_free) < FREE:
        _free.append(buffers)


def _make_addresses() -> Callable[..., int]:
    def addresses(a: int, b: int, c: int, d: int, target: int) -> int:
        numbers = carray(void_pointer(target), 4, np.int64)
        numbers[0], numbers[1], numbers[2], numbers[3] = data_of(a), data_of(b), data_of(c), data_of(d)
        return 0

    return addresses


# Writes the addresses of four arrays, of any dtypes and layouts: 0.1 us, and 4 by ``array.ctypes.data``.
addresses = Function("addresses", _make_addresses, objects=4, integers=1, nogil=False)


def worker(storage: str, task: str, kv_storage: str = "", vectors: int = 0, wide: bool = False) -> Kernel:
    """Return the kernel of a task for numbers in `storage`, and keys and values in `kv_storage` if that is another.

    `vectors` and `wide` are as in `Spec`.
    """
    # functools.cache distinguishes an omitted default from the same argument
    return _worker(storage, task, kv_storage, vectors, wide)


@cache
def _worker(storage: str, task: str, kv_storage: str, vectors: int, wide: bool) -> Kernel:
    spec = Spec(storage, HOST, task, kv_storage, vectors, wide)
    makers = {"backward": backward.make_worker, "second": backward.make_worker, "decode": decode.make_worker}
    make = makers.get(task, forward.make_worker)
    return Kernel(spec.name, lambda: make(spec), launch.SIGNATURE)


def threads_for(items: int, flops: float) -> int:
    """Return the number of threads for so many work items and flops."""
    return min(launch.threads(), items) if items > 1 and flops > SMALL else 1
