"""Kernels for other machines: a folder with machine code for CPUs and GPUs, which needs no compiler where it is used.

Each level of CPUs is compiled by a process of its own, because a process compiles for one machine. No GPU is needed to
compile for GPUs.
"""

import base64
import hashlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import atomic, kernel_cache

if TYPE_CHECKING:
    from .cuda.spec import Spec
    from .device.driver import Device

SUFFIXES = (".cubin", ".kernel")  # of machine code for GPUs and for CPUs
_PROGRAM = "import sys; from numba_attention.warming import write; write(*sys.argv[1:])"

# Architectures of GPUs, with the bytes of shared memory that a block can have: A100; RTX 30; RTX 40 and L4; H100 and
# H200; B200; RTX 50.
GPUS = {
    "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90a": 232448, "sm_100": 232448, "sm_120": 101376,
}  # fmt: skip


def build(
    folder: Path,
    levels: list[str],
    only: str = "",
    report: Callable[[str], None] = lambda line: None,
    request: Any = None,
) -> None:
    """Compile kernels for levels of CPUs and write them to a folder.

    Parameters
    ----------
    folder : Path
        Made if it does not exist.
    levels : list of str
        Names in ``numba_attention.cpu.target.LEVELS``.
    only : str
        Parts of names of kernels, separated by commas; all kernels if empty.
    report : callable
        Is called with a line for each file.
    request : optional
        Which kernels, as `warming` describes them; by default those for all tasks, dtypes and formats of caches, and
        for the functions in `mods`.

    Raises
    ------
    RuntimeError
        If the compiler fails; the message contains what it wrote.
    """
    from .cpu.target import BUILD

    folder.mkdir(parents=True, exist_ok=True)
    # Settings of Numba would change the machine code, or for which CPU it is.
    base = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    for level in levels:
        command = [sys.executable, "-c", _PROGRAM, str(folder), only]
        process = subprocess.Popen(command, env=base | {BUILD: level}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin as pipe:
            pickle.dump(request, pipe)
        with process.stdout as lines:
            for line in lines:
                report(f"{level}: {line.decode().strip()}")
        if process.wait():
            raise RuntimeError(f"the compiler for {level} ended with status {process.returncode}")


def build_for_gpus(
    folder: Path, archs: list[str], only: str = "", report: Callable[[str], None] = lambda line: None
) -> None:
    """Compile the common kernels for architectures of GPUs and write them to a folder. Those that are there stay.

    Parameters
    ----------
    folder : Path
        Made if it does not exist.
    archs : list of str
        Names in `GPUS`.
    only : str
        Parts of names of kernels, separated by commas; all common kernels if empty.
    report : callable
        Is called with a line for each file.

    Raises
    ------
    BackendUnavailableError
        If a kernel cannot be compiled; the message says what is missing.
    """
    from .backends.cuda import common_kernels

    folder.mkdir(parents=True, exist_ok=True)
    parts = only.split(",")
    wanted = [c for arch in archs for c in common_kernels(gpu_of(arch)) if any(part in c.name for part in parts)]
    context = multiprocessing.get_context("spawn")  # a compiler's threads and locks do not survive a fork
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(wanted) or 1), context) as pool:
        jobs = [pool.submit(_ship, c, folder) for c in wanted]
        try:
            for job in as_completed(jobs):
                report(job.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def pack(folder: Path, into: Path) -> Path:
    """Pack the kernels in a folder as a wheel, which processes find where it is installed.

    Parameters
    ----------
    folder : Path
        With the files that `build` and `build_for_gpus` wrote.
    into : Path
        Folder of the wheel, made if it does not exist.

    Returns
    -------
    Path
        The wheel ``numba_attention_kernels``, of the version of this package, which it requires: a kernel is found by
        the digest of its sources.

    Raises
    ------
    RuntimeError
        There are no kernels in the folder.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if not files:
        raise RuntimeError(f"there are no kernels in {folder}")
    package = kernel_cache.PACKAGE
    version = metadata.version("numba-attention")
    about = f"{package}-{version}.dist-info"
    contents = {f"{package}/{path.name}": path.read_bytes() for path in files}
    contents[f"{package}/__init__.py"] = b'"""Kernels of numba-attention that were compiled elsewhere."""\n'
    contents[f"{about}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: {version}\n"
        f"Summary: Compiled kernels of numba-attention\nRequires-Dist: numba-attention=={version}\n"
    ).encode()
    contents[f"{about}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: numba-attention\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = f"{about}/RECORD"
    lines = [f"{name},sha256={_encoded(data)},{len(data)}\n" for name, data in contents.items()]
    contents[record] = "".join([*lines, f"{record},,\n"]).encode()
    into.mkdir(parents=True, exist_ok=True)
    path = into / f"{package}-{version}-py3-none-any.whl"
    with atomic.replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in contents.items():
            entry = zipfile.ZipInfo(name)  # of 1980: the same kernels make the same wheel
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o100644 << 16
            wheel.writestr(entry, data)
    return path


def _encoded(data: bytes) -> str:
    """Return the digest of a file as the record of a wheel has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def gpu_of(arch: str) -> "Device":
    """Return a GPU by which kernels for an architecture are chosen."""
    from .cuda.spec import compute_capability
    from .device.driver import Device

    return Device(0, compute_capability(arch), arch, 1, GPUS[arch], arch)


def _ship(c: "Spec", folder: Path) -> str:
    from .cuda import kernels

    return kernels.ship(c, folder).name
