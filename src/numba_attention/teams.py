"""Threads that another library lends for the time of a call: those of PyTorch's OpenMP.

OpenMP's threads keep their cores after a parallel region, libgomp's for up to 7 ms on a Zen 5, before they sleep. A
kernel that starts in that time on threads of its own shares the cores with them. As a parallel region of the same
library it begins at once, on the threads that are awake.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Team(NamedTuple):
    """A library of OpenMP, by the function that its compilers call for a parallel region."""

    parallel: Any  # void (*)(void (*function)(void *), void *data, unsigned threads, unsigned flags)
    size: Callable[[], int]  # how many threads its own regions have: another number would end some, or start more


def of_library(path: str, size: Callable[[], int]) -> Team | None:
    """Return the team of the OpenMP that a loaded library uses; None if it has none that can be called so."""
    try:
        library = ctypes.CDLL(path, os.RTLD_NOLOAD | os.RTLD_NOW)  # searches what the library depends on, too
        parallel = library.GOMP_parallel
    except (AttributeError, OSError):  # on Windows there is no RTLD_NOLOAD, on macOS no such function
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return Team(parallel, size)


_lent = threading.local()
_is_child = False


@contextmanager
def lent(team: Team | None) -> Iterator[None]:
    """Let kernels that this thread starts meanwhile run on a team."""
    before = getattr(_lent, "team", None)
    _lent.team = team
    try:
        yield
    finally:
        _lent.team = before


def team_for(threads: int) -> Team | None:
    """Return the team that is lent to this thread, if its own regions have so many threads."""
    team: Team | None = getattr(_lent, "team", None)
    return team if team is not None and not _is_child and team.size() == threads else None


def _forget() -> None:
    """A forked child has none of the threads that OpenMP would wait for."""
    global _is_child
    _is_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
