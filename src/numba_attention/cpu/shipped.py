"""Folders with kernels that were compiled elsewhere, for levels of CPUs: they are searched before a kernel compiles.

Nothing is written there. The folders are that of the environment variable ``NUMBA_ATTENTION_KERNELS`` and that of the
installed package ``numba_attention_kernels``, if there is one.
"""

import sys
from functools import cache
from pathlib import Path

from numba.core import config

from ..kernel_cache import shipped_folders
from .simd import HOST, detect
from .target import LEVELS, level, target


@cache
def folders() -> list[Path]:
    """The folders that may have kernels for this machine."""
    usual = int(config.OPT) == 3 and not config.BOUNDSCHECK and not config.DEBUGINFO_DEFAULT
    return shipped_folders() if usual and level() and _host() == HOST else []


def _host() -> object:
    """What kernels for the level take the machine for: it decides the shapes of their tiles."""
    kind = LEVELS[level()]
    return detect(target().triple, kind.cpu, kind.features)


def key_of(kernel: str, sources: str) -> str:
    """Everything that decides what a kernel for this machine's level is. Versions of Python and Numba do not."""
    return f"{kernel} {level()} {sys.platform} {object.__basicsize__} {sources}"
