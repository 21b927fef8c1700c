"""Machine code of GPU kernels on disk: in the cache, a file for each under a key of everything that it depends on.

Before a kernel compiles, folders with machine code that was compiled elsewhere are searched too. Its key there is the
kernel's name, with its architecture, and a digest of the sources that it depends on: machine code for a GPU depends on
nothing else of a machine, and that of an older compiler is as right as that of a newer one.
"""

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import forks
from ..kernel_cache import (
    entries,
    file_name,
    path_of,
    read_checked,
    shipped_folders,
    warn_unwritten,
    write_checked,
)

# The packages that compile kernels: another version of any of them may produce other code.
_COMPILERS = ("numba", "numba-cuda", "llvmlite", "cuda-core", "cuda-bindings", "cuda-toolkit")
_WHEELS = ("nvidia-nvvm", "nvidia-nvjitlink", "nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink-cu12")
_SUFFIX = ".cubin"
_PACKAGE = Path(__file__).parents[1]
_ARCH = re.compile(r"\bsm_\d+[af]?\b")
_IMPORT = re.compile(r"^[ ]*from (\.+)(\w*) import (\([^)]*\)|[^\n]*)", re.MULTILINE)
_lock = forks.renewed()  # one thread compiles, and others that need the same kernel wait for it
_made: dict[str, bytes] = {}


def cubin(key: str, make: Callable[[], bytes], sources: Callable[[], str] = str) -> bytes:
    """Return the machine code of a kernel: from the cache, from a folder of shipped kernels, or from `make`.

    Parameters
    ----------
    key : str
        The kernel's name, with the architecture that it is compiled for.
    make : callable
        Compiles the kernel.
    sources : callable
        Returns the digest of what else the code depends on, for shipped kernels; by default nothing else.
    """
    code = _made.get(key)
    if code is None:
        with _lock:
            code = _made.get(key)
            if code is None:
                code = _made[key] = _load_or_make(key, make, sources)
    return code


def place(key: str) -> tuple[Path | None, str]:
    """Return the path of a kernel's machine code, None if there is no cache, and the key that its checksum covers."""
    full_key = f"{key} {environment()}"
    return path_of(f"{_readable(key)}-{_mark()}", full_key, _SUFFIX), full_key


def shipped_place(key: str, sources: str) -> tuple[str, str]:
    """Return the name of a kernel's file in a folder of shipped kernels, and the key that its checksum covers."""
    full_key = f"{key} {sources}"
    return file_name(f"{_arch(key)}-{_readable(key)}", full_key, _SUFFIX), full_key


def ship(folder: Path, key: str, make: Callable[[], bytes], sources: str) -> Path:
    """Write a kernel to a folder for other machines, unless it is there; return the path of its file."""
    name, full_key = shipped_place(key, sources)
    path = folder / name
    if read_checked(path, full_key) is None:
        write_checked(path, full_key, make(), shared=True)
    return path


def are_kept(archs: Iterable[str] = ()) -> bool:
    """Whether there are kernels of these sources and compilers, or shipped ones for one of these architectures."""
    if any(path.suffix == _SUFFIX and f"-{_mark()}-" in path.name for path in entries()):
        return True
    beginnings = tuple(f"{arch}-" for arch in archs)
    files = (path.name for folder in folders() for path in folder.glob(f"*{_SUFFIX}"))
    return any(name.startswith(beginnings) for name in files)


@cache
def folders() -> list[Path]:
    """The folders of shipped kernels."""
    return shipped_folders()


def _readable(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", key)[:80]


def _arch(key: str) -> str:
    found = _ARCH.search(key)
    return found.group() if found else "any"


def _mark() -> str:
    """Return the part of file names that identifies sources and compilers."""
    return environment()[:8]


def _load_or_make(key: str, make: Callable[[], bytes], sources: Callable[[], str]) -> bytes:
    path, full_key = place(key)
    cached = read_checked(path, full_key) if path else None
    if cached is not None:
        return cached
    for folder in folders():
        name, shipped_key = shipped_place(key, sources())
        shipped = read_checked(folder / name, shipped_key)
        if shipped is not None:
            return shipped
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
    shared = [_PACKAGE / f"{name}.py" for name in ("intervals", "philox", "sequence_record")]
    return [*sorted(_PACKAGE.glob("cuda/*.py")), *shared]


def imported(modules: Sequence[str]) -> list[Path]:
    """Return those of `sources` that modules of ``cuda/`` are, and import, directly or not."""
    known, found = set(sources()), set()
    waiting = [_PACKAGE / "cuda" / f"{name}.py" for name in modules]
    while waiting:
        path = waiting.pop()
        if path in found or path not in known:
            continue
        found.add(path)
        for dots, module, names in _IMPORT.findall(path.read_text(encoding="utf-8")):
            folder = path.parents[len(dots) - 1]
            waiting += [folder / f"{name}.py" for name in ([module] if module else re.findall(r"\w+", names))]
    return sorted(found)


def digest_of(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def environment() -> str:
    """Return what determines the machine code besides the key: sources and compilers."""
    versions = [sys.version_info[:3], *((name, _version(name)) for name in (*_COMPILERS, *_WHEELS))]
    return hashlib.sha256(f"{digest_of(sources())} {versions}".encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
