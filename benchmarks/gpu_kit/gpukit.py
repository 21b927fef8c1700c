"""What the kit changes in numba_attention at run time, in every process with NA_KIT=1, without a change to the package.

NA_KIT=1               what had to be compiled is noted in NA_KIT_NOTES ("made NAME SECONDS").
NA_KIT_COLLECT=file    nothing is compiled or run: the kernels that a run asks for are appended to the file.
NA_KIT_EMULATE=1       on the stub of a driver (tests/support/libcuda.c): launches are run by the emulator of the tests.
NA_KIT_LENIENT=1       the backend is tried although versions are below its floors.
"""

import contextlib
import ctypes
import importlib.util
import os
import pickle
import sys
import time
import traceback
from pathlib import Path

PATCHES = {}


def patches(module):
    def keep(function):
        PATCHES[module] = function
        return function

    return keep


class _Finder:
    """Finds a module as usual, and patches it once it is executed."""

    def find_spec(self, name, path=None, target=None):
        patch = PATCHES.get(name)
        if patch is None:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                patch(module)

            spec.loader.exec_module = exec_module
        return spec


def install():
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def note(text):
    path = os.environ.get("NA_KIT_NOTES")
    if path:
        with open(path, "a") as file:  # one short line: whole, whoever else writes
            file.write(text + "\n")


def replace(module, name, replacement):
    """Put something in the place of what a module has under a name, and fail if the name has moved."""
    original = getattr(module, name)
    setattr(module, name, replacement(original))


@patches("numba_attention.device.cubins")
def _cubins(module):
    def noting(load_or_make):
        def replacement(key, make, sources):
            def timed():
                begin = time.perf_counter()
                code = make()
                note(f"made {key} {time.perf_counter() - begin:.1f} s")
                return code

            return load_or_make(key, timed, sources)

        return replacement

    replace(module, "_load_or_make", noting)


def note_memory(address, size):
    """Note memory that kernels may use; what was there before is freed."""
    for start in [x for x, n in REGIONS.items() if x < address + size and address < x + n]:
        del REGIONS[start]
    REGIONS[address] = size


class TorchOnHost:
    """PyTorch, whose tensors of the host say that they are on a GPU: steps are collected and rehearsed with them."""

    class cuda:
        is_available, synchronize = (staticmethod(lambda *_: True) for _ in range(2))
        stream, graph = (staticmethod(lambda *_, **__: contextlib.nullcontext()) for _ in range(2))

        class Stream:
            synchronize = staticmethod(lambda: None)

        class CUDAGraph:
            replay = staticmethod(lambda: None)

        current_stream = staticmethod(lambda *_: TorchOnHost.cuda.Stream)

    def __init__(self):
        import torch

        if torch.cuda.is_available():
            raise RuntimeError("there is a GPU")
        self._torch = torch
        empty, like, ordinal = torch.empty, torch.empty_like, torch.Tensor.device
        torch.empty = lambda *shape, device=None, **more: self._noted(empty(*shape, **more))
        torch.empty_like = lambda *given, **more: self._noted(like(*given, **more))
        torch.Tensor.is_cuda, torch.Tensor.get_device = True, lambda _: 0
        torch.Tensor.device = property(lambda x: torch.device("cuda", 0) if not x.is_meta else ordinal.__get__(x))
        torch.Tensor.cpu = lambda x: x
        torch._C._cuda_getCurrentRawStream = lambda _: 0

    def _noted(self, x):
        storage = x.untyped_storage()
        note_memory(storage.data_ptr(), storage.nbytes())
        return x

    def __getattr__(self, name):
        found = getattr(self._torch, name)
        if name not in ("randn", "zeros", "full", "arange", "linspace"):
            return found
        return lambda *given, device=None, **more: self._noted(found(*given, **more))


def _stands_in(kernels, c):
    """A kernel without machine code, for where none is run, or the emulator in its place."""
    from numba_attention.device.driver import Kernel

    code = b"\x7fELF" + c.name.encode()
    return Kernel(c.name, code, c.threads, kernels.shared(c), kernels.addresses(c), kernels.seed(c))


@patches("numba_attention.cuda.kernels")
def _kernels(module):
    target = os.environ.get("NA_KIT_COLLECT")
    if not target:
        return
    seen = {}

    def compiled(c):
        if c not in seen:
            seen[c] = _stands_in(module, c)
            with open(target, "ab") as file:
                file.write(pickle.dumps(c).hex().encode() + b"\n")
        return seen[c]

    replace(module, "compiled", lambda _: compiled)


@patches("numba_attention.device.runtime")
def _runtime(module):
    if os.environ.get("NA_KIT_EMULATE"):
        _emulate(module)


_kept = []
REGIONS = {}  # of NA_KIT_EMULATE: the memory that kernels may use, its size by where it begins
EXTRA = {}  # of NA_KIT_EMULATE: other kernels, by name: how many integers, and what makes them


def _emulate(runtime):
    from numba_attention.cuda import kernels
    from numba_attention.cuda.parameters import REALS
    from numba_attention.device import cubins

    specs, regions, emulators = {}, REGIONS, {}

    def compiled(c):
        if c.name not in specs:
            name, _ = cubins.shipped_place(c.name, kernels.sources(c))
            if any((folder / name).exists() for folder in cubins.folders()):
                note(f"there {c.name}")
            specs[c.name] = c, _stands_in(kernels, c)
        return specs[c.name][1]

    replace(kernels, "compiled", lambda _: compiled)

    def noting_memory(of):
        def made(size, *stream):
            memory = of(size, *stream)
            note_memory(memory.address, size)
            return memory

        return made

    for name in ("allocate", "keep"):
        replace(runtime.driver, name, noting_memory)

    def run(name, grid, threads, shared, stream, parameters):
        try:
            from emulator import Emulator

            if name.decode() in EXTRA:
                count, make = EXTRA[name.decode()]
                integers = [ctypes.c_int64.from_address(parameters[n]).value for n in range(count)]
                emulator = Emulator(races=False)
                emulator.run(make(emulator), tuple(grid[:3]), threads, shared, integers, [0.0], list(regions.items()))
                return 0
            c = specs[name.decode()][0]
            number = kernels.integers(c)
            integers = [ctypes.c_int64.from_address(parameters[n]).value for n in range(number)]
            reals = [ctypes.c_double.from_address(parameters[number + n]).value for n in range(len(REALS))]
            if c not in emulators:
                emulator = Emulator(races=False)
                emulators[c] = emulator, kernels.make(c, emulator)
            emulator, function = emulators[c]
            emulator.run(function, tuple(grid[:3]), threads, shared, integers, reals, list(regions.items()))
            return 0
        except Exception:
            traceback.print_exc()
            return 1

    kind = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_int, ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_void_p),
    )  # fmt: skip
    stub = ctypes.CDLL("libcuda.so.1")
    _kept.append(kind(run))
    stub.stub_run(_kept[-1])


@patches("cases")
def _cases(module):
    """Where nothing runs, nothing is right: go on all the same, so that what comes after is asked for too."""
    if os.environ.get("NA_KIT_COLLECT"):
        import numpy

        replace(module, "assert_close", lambda _: lambda *_, **__: None)
        for name in ("assert_array_equal", "assert_allclose", "assert_equal"):
            replace(numpy.testing, name, lambda _: lambda *_, **__: None)


@patches("numba_attention.device.diagnosis")
def _diagnosis(module):
    if not os.environ.get("NA_KIT_LENIENT"):
        return

    def lenient(check):
        def replacement():
            reason = check()
            if reason is not None:
                note(f"overruled {reason}")

        return replacement

    replace(module, "_packages", lenient)


def collected(path):
    """The kernels in a file of NA_KIT_COLLECT, each once."""
    found = {}
    for line in Path(path).read_text().split():
        c = pickle.loads(bytes.fromhex(line))
        found[c.name] = c
    return list(found.values())
