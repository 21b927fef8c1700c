"""The simplest form of a kernel, a row for each thread, in the CUDA simulator of numba-cuda: NUMBA_ENABLE_CUDASIM=1.

The simulator has no shuffles and no inline PTX; the macros of a kernel run here with the emulator's instructions, one
thread at a time, and its barriers, indices and shared memory are the simulator's. Kernels that give a row to a warp,
and so shuffle, run in the emulator. Run by test_cuda_kernels.py in a process of its own.
"""

import sys
import threading
from types import SimpleNamespace

import numpy as np
from numba import config, cuda

from cases import Case, check, check_backward
from emulator import Emit, Emulator, Memory, macro
from numba_attention.cuda import kernels, tile_shapes
from numba_attention.device import runtime
from numba_attention.device.driver import Kernel

thread = threading.local()


class Shared:
    """Shared memory of the simulator, as the instructions of one thread see it."""

    def read(self, address, width, matrices=False):
        assert not matrices, "no matrices here"
        return thread.shared[address[:, None] + np.arange(width)]

    def write(self, address, data, where):
        if where[0]:
            thread.shared[address[:, None] + np.arange(data.shape[1])] = data

    def copy(self, address, fetch, width, where):
        self.write(address, fetch(), where)

    def wait(self, groups):
        pass

    def sync_warp(self):
        pass  # only a thread's own weights lie between two of them

    groups = property(lambda self: [])


class Cuda:
    """numba.cuda as a kernel sees it: while one runs, the simulator puts another module in the place of `cuda`."""

    def __getattr__(self, name):
        if name == "shared":  # which asks for a dtype, where the compiler asks for a type
            return SimpleNamespace(array=lambda size, kind: cuda.shared.array(size, np.dtype(kind)))
        return getattr(cuda, name)


class Simulator:
    """A target for the factories of kernels."""

    def __init__(self):
        self.cuda, self.memory, self.block_memory = Cuda(), Memory(), Shared()

    def shared(self):
        def address(array):
            thread.shared = np.asarray(array._ary if hasattr(array, "_ary") else array).reshape(-1).view(np.uint8)
            thread.emit = Emit(self, 1)
            return np.int32(0)

        return address

    def macro(self, result, *arguments):
        def emit():
            if not hasattr(thread, "emit"):
                thread.emit = Emit(self, 1)
            return thread.emit

        return macro(emit, result, arguments)


def simulated_driver():
    from device import HostDriver

    made = {}

    def compiled(c):
        shuffles = c.task not in ("forward", "query", "key")
        c = c if shuffles else plain(c)
        target = Emulator(races=False) if shuffles else Simulator()
        kernel = Kernel(c.name, b"", c.threads, kernels.shared(c), kernels.addresses(c), kernels.seed(c))
        function = kernels.make(c, target)

        def simulated(integers, reals):  # whose globals are those of this module, where the simulator looks for `cuda`
            function(integers, reals)

        made[c.name] = target, function if shuffles else cuda.jit(simulated)
        return kernel

    def run(kernel, grid, integers, reals):
        target, function = made[kernel.name]
        held = {address: reference() for address, reference in driver.allocations.items()}
        regions = [(address, x.size) for address, x in held.items() if x is not None]
        if isinstance(target, Emulator):
            target.run(function, grid, kernel.threads, kernel.shared, integers, reals, regions)
            return
        target.memory.allow(regions)
        numbers = tuple(map(np.int64, integers)), tuple(map(np.float64, reals))
        function[grid, kernel.threads, 0, max(kernel.shared, 1)](*numbers)

    driver = HostDriver(run=run)
    return driver, compiled


def plain(c, **options):
    """Every kernel with one row a thread."""
    return c.with_(slots=1, across=1, warps=1, columns=16, product="simt", **options)


def main():
    assert config.ENABLE_CUDASIM, "set NUMBA_ENABLE_CUDASIM=1"
    runtime.driver, kernels.compiled = simulated_driver()
    base, nan_safe = tile_shapes.base, tile_shapes.nan_safe
    tile_shapes.base = lambda *given: plain(base(*given))
    tile_shapes.few = lambda c, rows, device: c
    tile_shapes.with_options = lambda c, **options: c.with_(**options)
    tile_shapes.nan_safe = lambda c, device: plain(nan_safe(c, device))
    cases = [
        Case(L=5, S=21, H=2, batch=()),
        Case(L=17, S=19, E=33, Ev=5, H=1, batch=(), options=("causal", "alibi", "sinks")),
        Case(L=7, S=18, H=2, Hkv=1, batch=(2,), options=("window", "mask", "key lengths", "softcap")),
    ]
    for case in cases:
        for dtype in ("float32", "float64"):
            check(*case.arrays(dtype), case.kwargs(), dtype, case, backend="cuda")
            print(f"simulated: {dtype} {case}")
    case = Case(L=5, S=18, H=2, Hkv=1, batch=(), options=("causal", "alibi", "sinks"))
    check_backward(case, "float32", backend="cuda")
    print(f"simulated: gradients of {case}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
