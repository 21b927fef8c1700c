"""Compiling in a thread that nothing interrupts.

Python runs signal handlers, finalizers, trace functions and profilers in the middle of other code, in the same thread.
Numba's compiler does not bear being entered again there: its tables are half filled, and LLVM aborts the process when
the engine that it finalizes is finalized again. So the compiler runs in a thread of its own. Signal handlers run in the
main thread only, trace functions and profilers in threads that were started with them, and the garbage collector, which
runs finalizers in whichever thread allocates, is paused meanwhile. A handler that calls the package while the
interrupted thread waits for the compiler waits as well.

Kernels are loaded in the thread that needs them. A handler may interrupt it between two calls of LLVM while it holds
llvmlite's lock, for which a thread of the compiler would wait for ever: there the handler compiles itself.
"""

import _thread
import atexit
import gc
import os
from collections.abc import Callable
from typing import Any

import llvmlite.binding.ffi
from numba.core.compiler_lock import global_compiler_lock

from .. import forks
from . import stacks

_llvm_lock = getattr(getattr(llvmlite.binding.ffi.lib, "_lock", None), "_lock", None)


class _Job:
    """A call in the compiler's thread."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._process = os.getpid()
        self._wake = _thread.allocate_lock()
        self._wake.acquire()
        self.is_over = False
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        _jobs.append(self)
        try:
            with global_compiler_lock:
                was_enabled = gc.isenabled()
                gc.disable()
                try:
                    self.result = self._function()
                finally:
                    if was_enabled:
                        gc.enable()
        except BaseException as error:
            self.error = error
        finally:
            self.is_over = True
            _jobs.remove(self)
            self._wake.release()

    def wait(self) -> bool:
        """Return True when the function has returned, and False in a forked child, which lacks the thread."""
        while not self.is_over:
            if self._process != os.getpid():
                return False
            self._wake.acquire(timeout=0.1)
        return True


_jobs: list[_Job] = []


def run(function: Callable[[], Any], what: str) -> Any:
    """Return what a function that compiles returns; it runs in a thread of its own, under Numba's lock.

    Raises
    ------
    RuntimeError
        Where the compiler cannot run: in a finalizer or handler that interrupted Numba's compiler in this thread, or in
        a child that was forked in the middle of compiling. `what` is what is needed.
    """
    while True:
        forks.require_consistent_compiler(what)
        job = _Job(function)
        if global_compiler_lock.is_locked():  # by this thread, for which the other one would wait
            if not forks.holds_locks():
                raise _interrupted(what)
            job.run()
        elif _holds_llvm():
            lock = global_compiler_lock._lock  # whose owner may wait for LLVM's
            if not lock.acquire(blocking=False):
                raise _interrupted(what)
            try:
                job.run()
            finally:
                lock.release()
        else:
            try:
                with stacks.of_size(stacks.COMPILERS):
                    _thread.start_new_thread(job.run, ())
            except RuntimeError:  # the system has no more threads, or the interpreter is shutting down
                job.run()
        if job.wait():
            break
    if job.error is not None:
        raise job.error
    return job.result


def _interrupted(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what} cannot be compiled in a signal handler or finalizer that interrupts Numba's compiler; "
        "call once what handlers need, or run numba-attention warmup"
    )


def _holds_llvm() -> bool:
    """Whether this thread was interrupted in a call of llvmlite, after LLVM and before the lock was released."""
    is_owned = getattr(_llvm_lock, "_is_owned", None)
    return is_owned is not None and bool(is_owned())


@atexit.register
def _wait() -> None:
    """Let compilers finish: LLVM must not run while its library is unloaded."""
    for job in _jobs.copy():
        job.wait()
