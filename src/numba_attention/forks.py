"""What a fork leaves to the child: locks that somebody can release, and whether OpenMP may be used.

Imported with the package, so that it knows of forks from then on. A child inherits no lock that a thread of its parent
held: that thread is not there to release it. And all locks are reentrant: a signal handler, finalizer or trace function
runs in the thread that it interrupts, and would wait for ever for a lock that this thread holds.
"""

import os
import sys
import threading
import time
from typing import Any

PATIENCE = 60.0  # seconds that a fork waits for compilers to finish; a kernel takes up to half a minute

_renewed: list[Any] = []  # new in a child: what they protect is whole between any two lines
_awaited: list[Any] = []  # waited for before a fork: what they protect cannot be used halfway through a change
_forking = threading.RLock()
_held: list[Any] = []
_broken = _openmp_is_lost = False


def renewed() -> Any:
    """A lock that is free in a child, whoever held it in the parent."""
    lock = threading.RLock()
    _renewed.append(lock)
    return lock


def await_before_fork(lock: Any) -> None:
    """Let a fork wait until no other thread holds this lock, so that a child finds what it protects whole."""
    _awaited.append(lock)


def broken() -> bool:
    """Whether this is a child in which what the awaited locks protect may be halfway through a change for ever."""
    return _broken


def openmp_is_lost() -> bool:
    """Whether Numba's parallel functions must not be used in this child.

    GNU OpenMP ends a child that enters a region after its parent did, in whatever function.
    """
    return _openmp_is_lost


def _before_fork() -> None:
    _forking.acquire()
    end = time.monotonic() + PATIENCE
    for lock in _awaited:
        if not lock.acquire(timeout=max(0.0, end - time.monotonic())):
            break
        _held.append(lock)


def _release() -> None:
    while _held:
        _held.pop().release()
    _forking.release()


def _in_child() -> None:
    global _broken, _openmp_is_lost
    lost = _awaited[len(_held) :]
    _release()
    for lock in (*lost, *_renewed):
        lock._at_fork_reinit()
    _broken = _broken or bool(lost)
    _openmp_is_lost = _openmp_is_lost or _uses_gnu_openmp()


def _uses_gnu_openmp() -> bool:
    """Whether Numba has started threads of GNU OpenMP; without importing Numba, which not every process has."""
    parallel = sys.modules.get("numba.np.ufunc.parallel")
    try:
        if parallel is None or parallel.threading_layer() != "omp":
            return False
    except ValueError:  # no threading layer has been started
        return False
    return getattr(sys.modules.get("numba.np.ufunc.omppool"), "openmp_vendor", "GNU") == "GNU"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_release, after_in_child=_in_child)
