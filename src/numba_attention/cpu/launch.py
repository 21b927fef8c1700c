"""Running a kernel on threads."""

import _thread
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numba
import numpy as np

from .. import teams
from . import pool, stacks
from .cache import Function, Kernel, ThreadEntry
from .pool import call_on_threads, call_worker
from .simd import fetch_add, void_pointer
from .views import carray

SIGNATURE = "int64(int64, int64)"  # of a worker: address of the parameters, number of the thread


def _make_launcher() -> Any:
    def launch(pool: int, worker: int, params: int, threads: int) -> int:
        return int(call_on_threads(pool, worker, params, threads))

    return launch


def _make_caller() -> Any:
    def call_alone(worker: int, params: int) -> int:
        return int(call_worker(worker, params, np.int64(0)))

    return call_alone


WORKER, PARAMS, THREAD, FAILED = range(4)  # words of a region of `teams`


def _make_member() -> Any:
    def member(region: int) -> int:
        """What each thread of a region does. There may be fewer than were asked for, down to the caller alone."""
        words = carray(void_pointer(region), 4, np.int64)
        if call_worker(words[WORKER], words[PARAMS], fetch_add(region + 8 * THREAD, 1)):
            words[FAILED] = 1
        return 0

    return member


# Workers are plain functions called by address, so that one launcher serves all kernels, and a kernel is compiled once
# for serial and parallel use.
_launcher = Function("launch", _make_launcher, objects=0, integers=4)
_caller = Function("call", _make_caller, objects=0, integers=2)
_member = ThreadEntry("member", _make_member)


def threads() -> int:
    """How many threads a call may use: as set by `numba.set_num_threads` in this thread.

    `numba.get_num_threads` starts Numba's threading layer, which kernels have no use for, and fails where none can be
    loaded. Before the layer runs nobody can have set a number.
    """
    try:
        numba.threading_layer()
    except ValueError:
        return int(numba.config.NUMBA_NUM_THREADS)
    return int(numba.get_num_threads())


def run(worker: Kernel, params: int, number: int) -> None:
    """Run a worker on `number` threads; a single one needs no others.

    Raises
    ------
    IndexError
        With NUMBA_BOUNDSCHECK=1, if the worker reads or writes outside an array.
    """
    address = worker.address
    if number == 1:
        failed = _caller.call(address, params)
    elif (team := teams.team_for(number)) is not None:
        region = np.array([address, params, 0, 0], np.int64)
        team.parallel(_member.address, region.ctypes.data, number, 0)
        failed = int(region[FAILED])
    else:
        failed = _launcher.call(pool.address_for(number), address, params, number)
    if failed:
        raise IndexError(f"kernel {worker.name} reads or writes outside an array")


def run_interruptibly(worker: Kernel, params: int, number: int, stop: Callable[[], None], *kept: object) -> None:
    """Run a worker as `run` does, in a thread of its own, while the main thread waits for signals too.

    Python runs signal handlers in its main thread and not before a call of machine code returns. If one raises, `stop`
    tells the worker to return early, and the exception goes on when it has. The thread lives as long as the call;
    starting it costs 60 to 90 us.

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
            with stacks.of_size(stacks.KERNELS):
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
