"""Running a kernel on the threads of Numba's pool, safely on every threading layer."""

import _thread
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from .. import forks
from .cache import Function, Kernel
from .simd import HOST, I8, I32, I64, Builder, Value, call

VOID = ir.VoidType()
SIGNATURE = "int64(int64, int64)"  # of a worker: address of the parameters, number of the thread


def _round_as_ieee(b: Builder) -> Callable[[], None]:
    """Set this thread's floating point to IEEE 754 as it is by default; the result restores what was set.

    A caller that flushes subnormal numbers to zero (XLA's threads, ``torch.set_flush_denormal``) does not make the
    threads of the pool do so too, but a pool that such a thread starts inherits the mode for good: results would then
    depend on the number of threads, and on which of them took which tile.
    """
    if HOST.name == "NEON":
        mode = call(b, "llvm.aarch64.get.fpcr", I64)
        call(b, "llvm.aarch64.set.fpcr", VOID, I64(0))
        return lambda: (call(b, "llvm.aarch64.set.fpcr", VOID, mode), None)[1]
    if HOST.name == "generic":
        return lambda: None
    before, default = (cgutils.alloca_once(b, I32) for _ in range(2))
    at_before, at_default = (b.bitcast(x, I8.as_pointer()) for x in (before, default))
    b.store(I32(0x1F80), default)
    call(b, "llvm.x86.sse.stmxcsr", VOID, at_before)
    call(b, "llvm.x86.sse.ldmxcsr", VOID, at_default)
    return lambda: (call(b, "llvm.x86.sse.ldmxcsr", VOID, at_before), None)[1]


@intrinsic
def _call(typing_context: Any, function: Any, params: Any, thread: Any) -> Any:
    """Call the worker whose machine code is at an address."""
    arguments = (types.int64, types.int64)

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        convention = context.call_conv
        pointer = builder.inttoptr(args[0], convention.get_function_type(types.int64, arguments).as_pointer())
        restore = _round_as_ieee(builder)
        status, result = convention.call_function(builder, pointer, types.int64, arguments, args[1:])
        restore()
        # Workers raise nothing except IndexError with NUMBA_BOUNDSCHECK=1, which must reach the caller.
        with builder.if_then(status.is_error, likely=False):
            convention.return_status_propagate(builder, status)
        return result

    return types.int64(types.int64, types.int64, types.int64), codegen


def _make_launcher() -> Any:
    def launch(function: int, params: int, threads: int) -> int:
        for thread in prange(threads):
            _call(function, params, np.int64(thread))
        return 0

    return launch


def _make_caller() -> Any:
    def call_alone(function: int, params: int) -> int:
        return int(_call(function, params, np.int64(0)))

    return call_alone


# Function pointers: one parallel region serves all kernels, whose workers are plain functions called by address. A
# kernel is compiled once for serial and parallel use, in about half the time of a function with a prange in it.
_launcher = Function("launch", _make_launcher, "int64(int64, int64, int64)", parallel=True)
_caller = Function("call", _make_caller, "int64(int64, int64)")
_workqueue_lock = forks.renewed()


def threads() -> int:
    """How many threads a call may use: as set by `numba.set_num_threads` in this thread, 1 where more are unsafe."""
    return 1 if forks.openmp_is_lost() else int(numba.get_num_threads())


def threading_layer() -> str:
    """The threading layer in use, starting it if need be; "serial" in a forked child that must not use it."""
    if forks.openmp_is_lost():
        return "serial (forked from a process that used OpenMP)"
    numba.get_num_threads()  # starts the layer, under a lock of Numba's, and enters no region
    return str(numba.threading_layer())


def run(worker: Kernel, params: int, number: int) -> None:
    """Run a worker on `number` threads; a single one needs no parallel region."""
    address = worker.address
    if number == 1:
        _caller.call(address, params)
    elif numba.threading_layer() == "workqueue":  # `threads` has started it
        with _workqueue_lock:  # two Python threads in this layer at once abort the process
            _launcher.call(address, params, number)
    else:
        _launcher.call(address, params, number)


def run_interruptibly(worker: Kernel, params: int, number: int, stop: Callable[[], None], *kept: object) -> None:
    """Run a worker as `run` does, in a thread of its own, while the main thread waits for signals too.

    Python runs signal handlers in its main thread and not before a call of machine code returns. If one raises, `stop`
    tells the worker to return early, and the exception goes on when it has. The thread lives as long as the call: one
    that stayed would keep a second pool of OpenMP, and with more threads than cores GNU OpenMP stops spinning between
    regions, after which every small one takes 11 us and not 1.3. Starting it costs 60 to 90 us.

    Parameters
    ----------
    worker, params, number
        As for `run`.
    stop : callable
        Makes the worker return.
    *kept : object
        What must live as long as the worker runs.
    """
    worker.address  # noqa: B018 - compiled or loaded here, where Ctrl-C is heard
    call = _Call(worker, params, number, kept)
    try:
        try:
            _thread.start_new_thread(call.work, ())
        except RuntimeError:  # the system has no more threads: the call runs here, and cannot be interrupted
            return run(worker, params, number)
        call.wait()
    except BaseException:
        while not call.is_over:  # later signals are ignored: the first exception is raised
            with suppress(BaseException):
                stop()
                call.give_up()
        raise
    if call.error:
        raise call.error


class _Call:
    """A call in a thread of its own. An exception may come to the main thread at any line, also twice at one."""

    def __init__(self, worker: Kernel, params: int, number: int, kept: object) -> None:
        self._arguments = worker, params, number
        self._kept = kept
        self._owner: dict[str, str] = {}  # "worker" if it may begin, "main" if it must not
        self._wake = _thread.allocate_lock()
        self._wake.acquire()
        self.is_over = False
        self.error: BaseException | None = None

    def work(self) -> None:
        try:
            if self._owner.setdefault("owner", "worker") == "worker":
                if self._arguments[-1] > 1:
                    numba.set_num_threads(self._arguments[-1])
                run(*self._arguments)
        except BaseException as error:
            self.error = error
        finally:
            self.is_over = True
            self._wake.release()

    def wait(self) -> None:
        """Return when the worker has."""
        while not self.is_over:
            self._wake.acquire(timeout=0.1)  # on Windows, waiting for a lock is not interrupted

    def give_up(self) -> None:
        """Return when the worker has, or will never begin."""
        if self._owner.setdefault("owner", "main") == "main":
            self.is_over = True
        self.wait()
