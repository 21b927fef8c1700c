"""Kernels by their configuration: which factory makes each, and their machine code."""

from functools import cache
from typing import Any

from .config import Config
from .cubins import cubin
from .driver import Kernel
from .parameters import INTEGERS, REALS


def make(c: Config, on: Any) -> Any:
    """Make the Python function of a kernel for a target."""
    from . import forward

    return {"forward": forward.make_forward}[c.task](c, on)


def shared(c: Config) -> int:
    """Bytes of shared memory."""
    from . import forward

    return {"forward": lambda: forward.tiles_of(c)[3]}[c.task]()


def compile_(c: Config) -> Any:
    """Compile a kernel for the architecture it names; the log of the assembler comes with it."""
    from . import toolchain

    function = make(c, toolchain.Intrinsics)
    return toolchain.compile_kernel(function, len(INTEGERS), len(REALS), c.threads, c.arch, c.blocks)


@cache
def compiled(c: Config) -> Kernel:
    """The machine code of a kernel, from the cache on disk if it is there."""
    code = cubin(c.name, lambda: compile_(c).code)
    from .toolchain import entry

    return Kernel(entry(code), code, c.threads, c.shared)
