"""Diagnosis of the CUDA installation: whether kernels can run here and, if not, what to do about it."""

import re
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from . import cubins

OLDEST = (7, 0)  # first compute capability with independent thread scheduling, which the kernels rely on
_OLDEST_OF = {12: OLDEST, 13: (7, 5)}  # oldest compute capability that each CUDA release compiles for
_EXTRAS = 'pip install "numba-attention[cuda13]", or [cuda12] for a driver of CUDA 12'
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_NONE = "the NVIDIA driver finds no GPU; is one there, and does CUDA_VISIBLE_DEVICES hide it?"


@cache
def unusable() -> str | None:
    """Return what is missing, or None. The answer is computed once."""
    for check in (_packages, _driver, _devices, _toolkit):
        try:
            reason = check()
        except Exception as error:  # a damaged installation is an answer and not an error
            reason = f"looking for a GPU failed: {error!r}"
        if reason is not None:
            return reason
    return None


def _packages() -> str | None:
    missing = [name for module, (name, _) in _NEEDED.items() if not _has(module)]
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        return f"{' and '.join(missing)} {verb} not installed; install them with {_EXTRAS}"
    for name, oldest in _NEEDED.values():
        version = _version(name)
        if version is not None and tuple(map(int, re.findall(r"\d+", version)[:2])) < oldest:
            wanted = ".".join(map(str, oldest))
            return f"{name} {version} is too old, {wanted} or newer is needed; update it with {_EXTRAS}"
    return None


# For each module its package, and the first release with which these kernels were compiled or launched.
_NEEDED = {
    "numba_cuda": ("numba-cuda", (0, 24)),
    "cuda.core": ("cuda-core", (0, 7)),
    "cuda.bindings": ("cuda-bindings", (12, 9)),
}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _has(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _driver() -> str | None:
    try:
        driver = api()
        (error,) = driver.cuInit(0)
    except Exception:  # versions of cuda.bindings raise different exceptions
        return "no NVIDIA driver library (libcuda) was found; install the driver, or start the container with --gpus"
    if int(error) == _NO_DEVICE:
        return _NONE
    if error:
        return f"the NVIDIA driver does not start: {error.name}"
    _, number = driver.cuDriverGetVersion()
    built_for = toolkit_major()
    if number // 1000 < built_for:
        newest = f"{number // 1000}.{number % 1000 // 10}"
        return (
            f"the NVIDIA driver is too old: it supports CUDA {newest}, and the packages installed are for {built_for}; "
            f"update the driver, or install {_matching(number // 1000)}"
        )
    return None


def _matching(major: int) -> str:
    return f'numba-attention[cuda{major}] in their place: pip install "numba-attention[cuda{major}]"'


def _devices() -> str | None:
    capabilities = _capabilities()
    if not capabilities:
        return _NONE
    best = max(capabilities)
    if best < OLDEST:
        return (
            f"the GPU has compute capability {best[0]}.{best[1]}, and the kernels need {OLDEST[0]}.{OLDEST[1]} (Volta)"
        )
    if best < _OLDEST_OF.get(toolkit_major(), OLDEST):
        return (
            f"the GPU has compute capability {best[0]}.{best[1]}, for which CUDA {toolkit_major()} does not compile; "
            f"install {_matching(12)}"
        )
    return None


def _capabilities() -> list[tuple[int, int]]:
    """The compute capability of each GPU."""
    driver = api()
    attribute = driver.CUdevice_attribute
    capabilities = []
    for ordinal in range(driver.cuDeviceGetCount()[1]):
        _, device = driver.cuDeviceGet(ordinal)
        _, major = driver.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        _, minor = driver.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        capabilities.append((int(major), int(minor)))
    return capabilities


def arch_of(major: int, minor: int) -> str:
    """Return the target to compile for. On Hopper it is the variant with wgmma, whose code no other GPU can run."""
    return f"sm_{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"


def _toolkit() -> str | None:
    """What a GPU lacks that is to run kernels: those in the cache, and shipped ones, need no compiler."""
    reason = no_compiler()
    if reason is None or cubins.are_kept(arch_of(*capability) for capability in _capabilities()):
        return None
    return reason


def no_compiler() -> str | None:
    """Say which library is missing that kernels are compiled with, or None."""
    missing = [name for name in ("nvvm", "nvJitLink") if not _loads(name)]
    if missing:
        return f"the CUDA compiler libraries {' and '.join(missing)} were not found; install them with {_EXTRAS}"
    return None


def _loads(library: str) -> bool:
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    try:
        load_nvidia_dynamic_lib(library)
    except DynamicLibNotFoundError:
        return False
    return True


def api() -> Any:
    return import_module("cuda.bindings.driver")


def toolkit_major() -> int:
    version: str = import_module("cuda.bindings").__version__
    return int(version.partition(".")[0])
