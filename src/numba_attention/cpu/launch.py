"""Running a kernel on the threads of Numba's pool, safely on every threading layer."""

import os
import threading
from typing import Any

import numba
import numpy as np
from numba import prange, types
from numba.extending import intrinsic

from .cache import Kernel
from .simd import Builder, Value

SIGNATURE = "int64(int64, int64)"  # of a worker: address of the parameters, number of the thread


@intrinsic
def _call(typing_context: Any, function: Any, params: Any, thread: Any) -> Any:
    """Call the worker whose machine code is at an address."""
    arguments = (types.int64, types.int64)

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        convention = context.call_conv
        pointer = builder.inttoptr(args[0], convention.get_function_type(types.int64, arguments).as_pointer())
        status, result = convention.call_function(builder, pointer, types.int64, arguments, args[1:])
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


# One parallel region for every kernel: workers are compiled as plain functions and called through their address. Each
# kernel then compiles once for serial and parallel use, in about half the time of a function with a prange in it.
_launcher = Kernel("launch", _make_launcher, "int64(int64, int64, int64)", parallel=True)
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
        worker.call(params, 0)
        return
    address = worker.address
    if threading_layer() == "workqueue":
        with _workqueue_lock:  # two Python threads in this layer at once abort the process
            _launcher.call(address, params, number)
    else:
        _launcher.call(address, params, number)
