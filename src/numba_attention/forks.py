"""Fork safety: which locks a forked child can use.

The module is imported with the package and registers handlers, so it knows of every later fork. A child has only the
thread that forked: a lock that another thread of the parent held would never be released, so a child gets new locks.
All locks are reentrant, because a signal handler, finalizer or trace function runs in the thread that it interrupts,
and would otherwise wait for ever for a lock that this thread holds.
"""

import os
import threading
import time
from typing import Any

PATIENCE = 60.0  # seconds that a fork waits for compilers to finish; a kernel takes up to half a minute

# Locks that are simply released in a child, because the data that they protect are consistent at every moment.
_renewed: list[Any] = []
# Locks that a fork waits for, because the data that they protect are inconsistent while somebody holds them.
_awaited: list[Any] = []
_forking = threading.RLock()
_held: list[Any] = []
_broken = False


def renewed() -> Any:
    """Return a new lock that is free in a forked child, whichever thread held it in the parent."""
    lock = threading.RLock()
    _renewed.append(lock)
    return lock


def await_before_fork(lock: Any) -> None:
    """Let forks wait until no other thread holds this lock, so that a child finds consistent data."""
    _awaited.append(lock)


def require_consistent_compiler(what: str) -> None:
    """Raise a RuntimeError in a forked child in which the data of the awaited locks may be inconsistent.

    That is so if the fork gave up waiting after `PATIENCE` seconds. `what` is what cannot be loaded or compiled then.
    """
    if _broken:
        raise RuntimeError(
            f"{what} cannot be loaded: this process was forked while another thread compiled, for more than "
            f"{PATIENCE:.0f} s; call what children need before forking, or start them by spawn"
        )


def holds_locks() -> bool:
    """Whether a fork is about to happen, or has just happened, and its thread holds the awaited locks."""
    return bool(_held)


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
    global _broken
    lost = _awaited[len(_held) :]
    _release()
    for lock in (*lost, *_renewed):
        lock._at_fork_reinit()
    _broken = _broken or bool(lost)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_release, after_in_child=_in_child)
