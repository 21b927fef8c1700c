"""Facts about this installation for bug reports: versions, threads, vector width, GPUs, the kernel cache."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal, overload

Facts = dict[str, dict[str, str]]

_CORE = ("numba-attention", "numba", "llvmlite", "numpy", "scipy")
_CUDA = ("numba-cuda", "cuda-core", "cuda-bindings", "cuda-toolkit")
_OPTIONAL = ("ml_dtypes", "typer", "rich", "tokenizers", "safetensors", "matplotlib", "torch", "onnxruntime")


@overload
def show_config(mode: Literal["stdout"] = ...) -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> Facts: ...
def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> Facts | None:
    """Show versions, threads, SIMD width, GPUs and the kernel cache, for a bug report.

    Parameters
    ----------
    mode : {"stdout", "dicts"}, default "stdout"
        "stdout" prints the facts; "dicts" returns them. The same two modes as `numpy.show_config`.

    Returns
    -------
    facts : dict of dict of str, or None
        Section name to fact name to value; None if the facts were printed.

    Raises
    ------
    ValueError
        Unknown mode.

    Examples
    --------
    >>> import numba_attention as na
    >>> sorted(na.show_config("dicts"))
    ['Backends', 'CPU', 'GPUs', 'Kernel cache', 'Versions']
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode must be 'stdout' or 'dicts', got {mode!r}")
    facts = {
        "Versions": _versions(),
        "CPU": _cpu(),
        "GPUs": _gpus(),
        "Backends": _backends(),
        "Kernel cache": _cache(),
    }
    if mode == "dicts":
        return facts
    for section, values in facts.items():
        print(section)
        width = max(map(len, values))
        for name, value in values.items():
            print(f"  {name:{width}}  {value}")
    return None


def _versions() -> dict[str, str]:
    versions = {"python": f"{platform.python_version()} on {sys.platform} {platform.machine()}"}
    for name in _CORE + _CUDA + _OPTIONAL:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _cpu() -> dict[str, str]:
    import numba

    from .cpu.launch import threads
    from .cpu.simd import HOST

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    extras = [name for name, has in (("fma", HOST.fma), ("float16", HOST.f16), ("bfloat16 dot", HOST.bf16_dot)) if has]
    return {
        "SIMD": f"{HOST.name}, {HOST.bits} bits, {HOST.registers} registers",
        "instructions": ", ".join(extras) or "none beyond the base set",
        "threads": f"{threads()} in use of {numba.config.NUMBA_NUM_THREADS}; {usable} CPUs usable",
    }


def _gpus() -> dict[str, str]:
    """Return the GPUs that kernels can run on or, if they cannot run, those that nvidia-smi lists."""
    from .device import runtime

    if runtime.unusable() is not None:
        return _listed()
    devices = [runtime.driver.device(ordinal) for ordinal in range(runtime.driver.count())]
    return {
        f"GPU {device.ordinal}": (
            f"{device.name}, compute capability {'.'.join(map(str, device.compute_capability))}, "
            f"{device.multiprocessors} multiprocessors, for {device.arch}"
        )
        for device in devices
    }


def _listed() -> dict[str, str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"none": "no NVIDIA driver found (nvidia-smi is not on the path)"}
    try:
        answer = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"none": f"nvidia-smi failed: {error}"}
    lines = [line.partition(": ") for line in answer.stdout.splitlines() if line.startswith("GPU")]
    return {name: rest for name, _, rest in lines} or {"none": "nvidia-smi lists no device"}


def _backends() -> dict[str, str]:
    from .backends import backends

    return {name: "usable" if status else f"not usable: {status.reason}" for name, status in backends().items()}


def _cache() -> dict[str, str]:
    from .kernel_cache import directory

    folder = directory()
    if folder is None:
        return {"location": "memory only: no folder can be written (NUMBA_ATTENTION_CACHE_DIR names another)"}
    files, size = _measure(folder)
    return {"location": str(folder), "size": f"{size / 2**20:.1f} MiB in {files} files"}


def _measure(folder: Path) -> tuple[int, int]:
    files = size = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                size += path.stat().st_size
                files += 1
        except FileNotFoundError:  # another process replaced the file
            continue
    return files, size


__all__ = ["show_config"]
