"""Machine code of kernels on disk, beside the kernels of the CPU: a file each, under a key of all it depends on."""

import hashlib
import re
import sys
import threading
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SUFFIX = ".cubin"
# Those that compile: another version of any may give other code.
_COMPILERS = ("numba", "numba-cuda", "llvmlite", "cuda-core", "cuda-bindings", "cuda-toolkit")
_WHEELS = ("nvidia-nvvm", "nvidia-nvjitlink", "nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink-cu12")
_lock = threading.RLock()  # one thread compiles, the others find what it made
_made: dict[str, bytes] = {}


def cubin(key: str, make: Callable[[], bytes]) -> bytes:
    """Return the machine code of the kernel `key`, which says all that distinguishes it: from the cache, or made."""
    found = _made.get(key)
    if found is None:
        with _lock:
            found = _made.get(key)
            if found is None:
                found = _made[key] = _load_or_make(key, make)
    return found


def _load_or_make(key: str, make: Callable[[], bytes]) -> bytes:
    from ..cpu.cache import directory, read_checked, warn_unwritten, write_checked  # Numba, which not all need

    folder = directory()
    path = _path(folder, key) if folder else None
    found = read_checked(path) if path else None
    if found is not None:
        return found
    code = make()
    if path is not None:
        try:
            write_checked(path, code)
        except OSError as error:
            warn_unwritten(error)
    return code


def _path(folder: Path, key: str) -> Path:
    digest = hashlib.sha256(f"{key} {environment()}".encode()).hexdigest()[:32]
    return folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', key)[:80]}-{digest}{SUFFIX}"


def entry(code: bytes) -> str:
    """The name of the kernel in a cubin: that of its ``.text`` section."""
    found = re.search(rb"\0\.text\.([\w$]+)\0", code)
    assert found is not None
    return found.group(1).decode()


@cache
def environment() -> str:
    """Everything but its key that decides what a kernel compiles to: sources, offsets of what it reads, compilers."""
    from . import parameters

    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    record = parameters.SEQUENCE
    fields = sorted((name, str(field[0]), field[1]) for name, field in (record.fields or {}).items())
    digest.update(repr((fields, record.itemsize, parameters.INTEGERS, parameters.REALS)).encode())
    versions = [sys.version_info[:3], *((name, _version(name)) for name in (*_COMPILERS, *_WHEELS))]
    digest.update(repr(versions).encode())
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
