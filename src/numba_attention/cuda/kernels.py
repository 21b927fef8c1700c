"""Kernels by their configuration: which factory makes each, and their machine code."""

from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..device import cubins, diagnosis
from ..device.cubins import cubin, digest_of, entry, imported
from ..device.driver import Kernel
from ..errors import BackendUnavailableError
from .emit import KernelFunction, Target
from .parameters import ADDRESSES, AXES, INTEGERS, REALS
from .spec import Spec


def make(c: Spec, on: Target) -> KernelFunction:
    """Make the Python function of a kernel for a target."""
    return _maker(c)(c, on)


def _maker(c: Spec) -> Callable[[Spec, Target], KernelFunction]:
    from . import (
        append,
        backward,
        bias,
        combine,
        forward,
        hopper,
        hopper_backward,
        merge,
        mod_gradients,
        normalizers,
        probabilities,
        rowwise,
    )

    if c.product == "wgmma":
        return hopper.make_hopper if c.task == "forward" else hopper_backward.make_hopper_backward

    makers = {
        "forward": forward.make_forward, "combine": combine.make_combine, "query": backward.make_backward,
        "key": backward.make_backward, "bias": bias.make_bias, "weights": probabilities.make_weights,
        "mods": mod_gradients.make_mod_gradients, "delta": rowwise.make_delta, "round": rowwise.make_round,
        "normalizers": normalizers.make_normalizers, "sinks": rowwise.make_sinks,
        "reduce": rowwise.make_reduce, "append": append.make_append,
        "merge": merge.make_merge, "merge_backward": merge.make_merge,
    }  # fmt: skip
    return makers[c.task]


def sources(c: Spec) -> str:
    """Return a digest of the sources that the machine code of a kernel depends on, besides its name."""
    return _sources(_maker(c).__module__.rpartition(".")[2])


@cache
def _sources(module: str) -> str:
    return digest_of(imported([module, "toolchain"]))


@cache
def shared(c: Spec) -> int:
    """Bytes of shared memory of a block."""
    from . import backward, combine, forward, hopper, hopper_backward, score_gradients

    if c.product == "wgmma":
        return hopper.shared(c) if c.task == "forward" else hopper_backward.shared(c)
    if c.task == "combine":
        return combine.Shared(c).end
    if c.task in ("query", "key"):
        return backward.Tiles(c).end
    if c.task in ("bias", "mods"):
        return score_gradients.Tiles(c).end
    if c.task in ("forward", "weights", "normalizers"):
        return forward.shared(c)
    return c.threads * 8 if c.task == "sinks" else 0


def compile_(c: Spec) -> Any:
    """Compile a kernel for the architecture it names; the log of the assembler comes with it."""
    try:
        from . import toolchain

        function = make(c, toolchain.Intrinsics)
        return toolchain.compile_kernel(function, integers(c), len(REALS), c.threads, c.arch, c.blocks)
    except Exception as error:
        missing = diagnosis.no_compiler()
        if missing is not None:
            raise BackendUnavailableError(
                f"{c.name} is not in the kernel cache, nor among shipped kernels, and {missing}"
            ) from error
        # Such as AttributeError, where a release of Numba has moved what numba-cuda uses.
        raise BackendUnavailableError(
            f"numba-cuda {version('numba-cuda')} with numba {version('numba')} did not compile {c.name}: "
            f"{type(error).__name__}: {error}; releases that belong together come with "
            'pip install -U "numba-attention[cuda13]", or [cuda12] for a driver of CUDA 12'
        ) from error


@cache
def compiled(c: Spec) -> Kernel:
    """The machine code of a kernel, from the cache on disk or else compiled."""
    code = cubin(c.name, lambda: compile_(c).code, lambda: sources(c))
    return Kernel(entry(code), code, c.threads, shared(c), addresses(c), seed(c))


def ship(c: Spec, folder: Path) -> Path:
    """Write the machine code of a kernel to a folder for other machines, unless it is there."""
    return cubins.ship(folder, c.name, lambda: compile_(c).code, sources(c))


def integers(c: Spec) -> int:
    """How many integers a kernel takes."""
    from . import append, merge

    if c.task == "reduce":
        return 4 + 5 * AXES
    if c.task in merge.ARRAYS:
        return len(merge.integers_of(c.task))
    return len(append.INTEGERS if c.task == "append" else INTEGERS)


def seed(c: Spec) -> int | None:
    """Which integer of a kernel is the seed of dropout."""
    return INTEGERS.index("seed") if c.dropout else None


def addresses(c: Spec) -> tuple[int, ...]:
    """Which integers of a kernel are addresses."""
    from . import append, merge

    if c.task == "reduce":
        return 0, 1
    if c.task in merge.ARRAYS:
        return merge.addresses_of(c.task)
    return append.ADDRESSES if c.task == "append" else tuple(INTEGERS.index(name) for name in ADDRESSES)
