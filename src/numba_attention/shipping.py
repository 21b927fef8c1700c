"""Kernels for other machines: a folder with machine code for levels of CPUs, which needs no compiler where it is used.

Each level is compiled by a process of its own, because a process compiles for one machine.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cpu.cache import Kernel

TASKS = ("forward", "decode", "weights", "backward", "second")
STORAGES = ("float32", "float64", "float16", "bfloat16")
SHORT = ("float16", "bfloat16", "int8", "float8_e4m3fn")  # storage formats of caches that have other numbers


def build(folder: Path, levels: list[str], only: str = "", report: Callable[[str], None] = lambda line: None) -> None:
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
        command = [sys.executable, "-m", __name__, str(folder), only]
        process = subprocess.Popen(command, env=base | {BUILD: level}, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                report(f"{level}: {line.strip()}")
        if process.wait():
            raise RuntimeError(f"the compiler for {level} ended with status {process.returncode}")


def _kernels() -> "Iterator[Kernel]":
    from .backends import cpu, cpu_resources
    from .layer.projection import kernel_of

    yield from cpu.entries()
    for storage in STORAGES:
        yield from (
            cpu_resources.worker(storage, task) for task in ("forward", "decode", "weights", "backward", "second")
        )
        if cpu_resources.NARROWS:
            yield from (cpu_resources.worker(storage, task, "", n) for task in ("forward", "backward") for n in (1, 2))
        for kv_storage in SHORT:
            if kv_storage != storage:
                yield from (cpu_resources.worker(storage, task, kv_storage) for task in ("decode", "forward"))
    yield from (kernel_of(storage)[0] for storage in STORAGES[:2])


def _main(folder: str, only: str) -> None:
    for kernel in _kernels():
        if not only or any(part in kernel.name for part in only.split(",")):
            print(kernel.ship(Path(folder)).name, flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
