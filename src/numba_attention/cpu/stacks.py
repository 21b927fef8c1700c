"""Stacks of threads: enough for what runs there, whatever `threading.stack_size` says.

A program may set that to as little as 32 KiB for its own threads. A kernel needs up to 32 KiB, Python and LLVM's
optimiser more. Where nothing is set, the system's own size suffices.
"""

import _thread
from collections.abc import Iterator
from contextlib import contextmanager

from .. import forks

KERNELS = 2**20  # bytes
COMPILERS = 2**24
_lock = forks.renewed()  # of two threads that set a size at once, one would restore that of the other


@contextmanager
def of_size(size: int) -> Iterator[None]:
    """Let threads that are started meanwhile have stacks of at least so many bytes."""
    with _lock:
        before = _thread.stack_size()
        if before == 0 or before >= size:
            yield
            return
        _thread.stack_size(size)
        try:
            yield
        finally:
            _thread.stack_size(before)
