"""Machine code of GPU kernels, cached on disk: a file for each, under a key of everything that it depends on."""

import hashlib
import re
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import forks
from ..kernel_cache import entries, path_of, read_checked, warn_unwritten, write_checked

# The packages that compile kernels: another version of any of them may produce other code.
_COMPILERS = ("numba", "numba-cuda", "llvmlite", "cuda-core", "cuda-bindings", "cuda-toolkit")
_WHEELS = ("nvidia-nvvm", "nvidia-nvjitlink", "nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink-cu12")
_SUFFIX = ".cubin"
_lock = forks.renewed()  # one thread compiles, and others that need the same kernel wait for it
_made: dict[str, bytes] = {}


def cubin(key: str, make: Callable[[], bytes]) -> bytes:
    """Return the machine code of the kernel with this key, from the cache or from `make`."""
    code = _made.get(key)
    if code is None:
        with _lock:
            code = _made.get(key)
            if code is None:
                code = _made[key] = _load_or_make(key, make)
    return code


def place(key: str) -> tuple[Path | None, str]:
    """Return the path of a kernel's machine code, None if there is no cache, and the key that its checksum covers."""
    full_key = f"{key} {environment()}"
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", key)[:80]
    return path_of(f"{name}-{_mark()}", full_key, _SUFFIX), full_key


def are_kept() -> bool:
    """Whether the cache has kernels from these sources and compilers."""
    return any(path.suffix == _SUFFIX and f"-{_mark()}-" in path.name for path in entries())


def _mark() -> str:
    """Return the part of file names that identifies sources and compilers."""
    return environment()[:8]


def _load_or_make(key: str, make: Callable[[], bytes]) -> bytes:
    path, full_key = place(key)
    cached = read_checked(path, full_key) if path else None
    if cached is not None:
        return cached
    code = make()
    if path is not None:
        try:
            write_checked(path, full_key, code)
        except OSError as error:
            warn_unwritten(error)
    return code


def entry(code: bytes) -> str:
    """Return the name of the kernel in a cubin, from the name of its ``.text`` section."""
    section = re.search(rb"\0\.text\.([\w$]+)\0", code)
    assert section is not None
    return section.group(1).decode()


def sources() -> list[Path]:
    """Return the files that determine what kernels compile to: their sources, shared rules, their record."""
    package = Path(__file__).parents[1]
    shared = [package / f"{name}.py" for name in ("intervals", "philox", "sequence_record")]
    return [*sorted(package.glob("cuda/*.py")), *shared]


@cache
def environment() -> str:
    """Return what determines the machine code besides the key: sources and compilers."""
    digest = hashlib.sha256()
    for source in sources():
        digest.update(source.name.encode() + source.read_bytes())
    versions = [sys.version_info[:3], *((name, _version(name)) for name in (*_COMPILERS, *_WHEELS))]
    digest.update(repr(versions).encode())
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
