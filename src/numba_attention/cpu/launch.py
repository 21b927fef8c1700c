"""Running a kernel on the threads of Numba's pool, safely on every threading layer."""

import os
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from .cache import Function, Kernel
from .simd import HOST, I8, I32, I64, Builder, Value, call

VOID = ir.VoidType()
SIGNATURE = "int64(int64, int64)"  # of a worker: address of the parameters, number of the thread


def _round_as_ieee(b: Builder) -> Callable[[], None]:
    """Set this thread's floating point to IEEE 754 as it is by default; the result restores what was set.

    A caller that flushes subnormal numbers to zero (XLA's threads, ``torch.set_flush_denormal``) does not make the
    threads of the pool do so too, but a pool that is started from there does for ever: results then depended on the
    number of threads, and on which of them took which tile.
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
        # Workers raise nothing, but with NUMBA_BOUNDSCHECK=1 they may, and that must be seen.
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


# One parallel region for every kernel: workers are compiled as plain functions and called through their address. Each
# kernel then compiles once for serial and parallel use, in about half the time of a function with a prange in it.
_launcher = Function("launch", _make_launcher, "int64(int64, int64, int64)", parallel=True)
_caller = Function("call", _make_caller, "int64(int64, int64)")
_workqueue_lock = threading.Lock()
_layer: str | None = None
_forked = False


def _after_fork() -> None:
    global _forked, _workqueue_lock
    _forked = _layer == "omp"
    _workqueue_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """How many threads a call may use: as set by `numba.set_num_threads` in this thread, 1 where more are unsafe."""
    # GNU OpenMP ends a forked child that enters a region after its parent did.
    return 1 if _forked else int(numba.get_num_threads())


def threading_layer() -> str:
    """The threading layer in use, starting it if need be; "serial" in a forked child that must not use it."""
    global _layer
    if _forked:
        return "serial (forked from a process that used OpenMP)"
    if _layer is None:
        _launcher.call(0, 0, 0)
        _layer = str(numba.threading_layer())
    return _layer


def run(worker: Kernel, params: int, number: int) -> None:
    """Run a worker on `number` threads; a single one needs no parallel region."""
    if number == 1:
        _caller.call(worker.address, params)
        return
    address = worker.address
    if threading_layer() == "workqueue":
        with _workqueue_lock:  # two Python threads in this layer at once abort the process
            _launcher.call(address, params, number)
    else:
        _launcher.call(address, params, number)
