"""Compiling in a thread that nothing interrupts.

Python runs signal handlers, finalizers, trace functions and profilers in the middle of other code, in the same thread.
Numba's compiler does not bear being entered again there: its tables are half filled, and LLVM aborts the process when
the engine that it finalizes is finalized again. So the compiler runs in a thread of its own. Signal handlers run in the
main thread only, trace functions and profilers in threads that were started with them, and the garbage collector, which
runs finalizers in whichever thread allocates, is paused meanwhile. A handler that calls the package while the
interrupted thread waits for the compiler waits as well.
"""

import _thread
import atexit
import gc
import os
from collections.abc import Callable
from typing import Any

from numba.core.compiler_lock import global_compiler_lock

from .. import forks


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
                raise RuntimeError(
                    f"{what} cannot be compiled in a signal handler or finalizer that interrupts Numba's compiler; "
                    "call once what handlers need, or run numba-attention warmup"
                )
            job.run()
        else:
            try:
                _thread.start_new_thread(job.run, ())
            except RuntimeError:  # the system has no more threads, or the interpreter is shutting down
                job.run()
        if job.wait():
            break
    if job.error is not None:
        raise job.error
    return job.result


@atexit.register
def _wait() -> None:
    """Let compilers finish: LLVM must not run while its library is unloaded."""
    for job in _jobs.copy():
        job.wait()
