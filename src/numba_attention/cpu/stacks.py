"""Stacks of threads: enough for what runs there, whatever `threading.stack_size` says.

A program may set that to as little as 32 KiB for its own threads, and systems differ: musl gives 128 KiB. A kernel
needs up to 32 KiB, Python and LLVM's optimiser more.
"""

import _thread
from collections.abc import Iterator
from contextlib import contextmanager

KERNELS = 2**20  # bytes
COMPILERS = 2**24


@contextmanager
def of_size(size: int) -> Iterator[None]:
    """Let threads that are started meanwhile have stacks of so many bytes."""
    before = _thread.stack_size(size)
    try:
        yield
    finally:
        _thread.stack_size(before)
