"""What kernels are compiled for: this machine's CPU or, to be shipped, a level of CPUs."""

import os
from functools import cache
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from numba.core.registry import cpu_target

BUILD = "NUMBA_ATTENTION_BUILD_LEVEL"  # environment variable: in a process that compiles to ship, the name of the level


class Target(NamedTuple):
    """In LLVM's words."""

    triple: str
    cpu: str
    features: str


class Level(NamedTuple):
    """A set of CPUs that run the same machine code."""

    architecture: str
    cpu: str
    features: str  # for the compiler
    needs: str  # features that a CPU must have


_V3 = "avx,avx2,bmi,bmi2,f16c,fma,lzcnt,movbe,popcnt"
_V4 = f"{_V3},avx512f,avx512bw,avx512cd,avx512dq,avx512vl"
# The levels of the x86-64 psABI, and the dot product of bfloat16 pairs; the best comes first.
LEVELS = {
    "x86-64-v4-bf16": Level("x86_64", "x86-64-v4", "+avx512bf16,-prefer-256-bit", f"{_V4},avx512bf16"),
    "x86-64-v4": Level("x86_64", "x86-64-v4", "-prefer-256-bit", _V4),
    "x86-64-v3": Level("x86_64", "x86-64-v3", "", _V3),
    "aarch64": Level("aarch64", "generic", "+neon", ""),
}


@cache
def target() -> Target:
    """What this process compiles for."""
    own = Target(*cpu_target.target_context.codegen().magic_tuple())
    if BUILD not in os.environ:
        return own
    level = LEVELS[_to_build()]
    _, system = own.triple.split("-", 1)
    return Target(f"{level.architecture}-{system}", level.cpu, level.features)


def _to_build() -> str:
    name = os.environ[BUILD]
    if name not in LEVELS:
        raise ValueError(f"{BUILD} must be one of {', '.join(LEVELS)}, got {name!r}")
    return name


def machine() -> Any:
    """LLVM's machine for the target, with the settings of Numba's."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple, cpu, features = target()
    relocation = "static" if triple.startswith("x86") else "default"
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=3, reloc=relocation, codemodel="jitdefault", jit=True
    )


@cache
def level() -> str:
    """The name of the best level that this machine has, empty if it has none."""
    if BUILD in os.environ:
        return _to_build()
    triple, _, features = target()
    has = {feature[1:] for feature in features.split(",") if feature.startswith("+")}
    for name, kind in LEVELS.items():
        if triple.startswith(kind.architecture) and has.issuperset(filter(None, kind.needs.split(","))):
            return name
    return ""
