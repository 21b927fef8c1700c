"""The whole CUDA backend on the stub driver of libcuda.c: real machine code, loaded and launched by the real cuda.core.

Run by test_cuda_libcuda.py in a process of its own. What a launch does, the emulator does, with the parameters that
arrived at the driver.
"""

import ctypes
import gc
import sys

import numpy as np
import pytest

import numba_attention as na
from emulator import Emulator
from numba_attention.cuda import kernels
from numba_attention.cuda.parameters import AXES, INTEGERS, REALS
from numba_attention.device import constants, runtime
from numba_attention.device.driver import Again

Run = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_int, ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
configs, regions, launches, failures = {}, {}, [], []


def calls(stub):
    return stub.stub_calls().decode().split()


@Run
def run(name, grid, threads, shared, stream, parameters):
    try:
        c = configs[name.decode()]
        number = 4 + 5 * AXES if c.task == "reduce" else len(INTEGERS)
        integers = [ctypes.c_int64.from_address(parameters[n]).value for n in range(number)]
        reals = [ctypes.c_double.from_address(parameters[number + n]).value for n in range(len(REALS))]
        assert (threads, shared) == (c.threads, kernels.shared(c))
        launches.append((c, stream))
        emulator = Emulator(races=False)
        emulator.run(
            kernels.make(c, emulator), tuple(grid[:3]), threads, shared, integers, reals, list(regions.items())
        )
        return 0
    except Exception as error:
        failures.append(error)
        return 1


@Run
def fail(*arguments):
    return 1


def watch():
    """Know the configuration of every kernel, and the size of every allocation."""
    compiled, allocate, keep = kernels.compiled, runtime.driver.allocate, runtime.driver.keep

    def remember(c):
        kernel = compiled(c)
        assert kernel.cubin.startswith(b"\x7fELF")
        configs[kernel.name] = c
        return kernel

    def note(size, stream):
        memory = allocate(size, stream)
        regions[memory.address] = size
        return memory

    def note_slab(size):
        slab = keep(size)
        regions[slab.address] = size
        return slab

    kernels.compiled = remember
    runtime.driver.allocate, runtime.driver.keep = note, note_slab


def main():
    stub = ctypes.CDLL("libcuda.so.1")
    stub.stub_calls.restype = ctypes.c_char_p
    stub.stub_run(run)
    assert na.backends()["cuda"], na.backends()["cuda"]
    found = runtime.driver.device(0)
    assert (found.name, found.arch, found.multiprocessors) == ("a stub", "sm_90a", 132)
    assert found.shared_memory == 232448
    print("GPU 0:", na.show_config(mode="dicts")["GPUs"]["GPU 0"])
    watch()
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, 40, 64)).astype(np.float16) for heads in (4, 2, 2))
    assert "cuCtxGetDevice_without_context" not in calls(stub)
    out, lse = na.attention(q, k, v, is_causal=True, return_lse=True, backend="cuda")
    assert not failures, failures
    made = calls(stub)
    assert "cuCtxGetDevice_without_context" not in made
    assert made.count("launch") == len(launches) > 1
    assert made.count("read") == 2, "out and lse come back"
    assert made.count("free") >= 5, "operands and results are freed in the order of the stream"
    want, want_lse = na.attention(q, k, v, is_causal=True, return_lse=True, backend="reference")
    np.testing.assert_allclose(out.astype(float), want.astype(float), atol=2e-3)
    np.testing.assert_allclose(lse, want_lse, atol=2e-3)
    print("forward:", ", ".join(c.name for c, _ in launches))
    launches.clear()
    grads = na.attention_backward(out, q, k[:1], v[:1], out, lse, is_causal=True, backend="cuda")
    assert not failures, failures
    wide = [x.astype(np.float64) for x in (out, q, k, v, out, lse)]
    expected = na.attention_backward(*wide, is_causal=True, backend="reference")
    for a, b in zip(grads[:3], expected[:3], strict=True):
        np.testing.assert_allclose(a.astype(float), b, atol=2e-2 * np.abs(b).max())
    assert {c.task for c, _ in launches} == {"delta", "normalizers", "key", "round", "query"}
    assert all(stream == 1 for _, stream in launches), "the default stream"
    print("backward:", ", ".join(c.name for c, _ in launches))
    for stream in (1, 7):  # the same launches as they are made of calls that were seen before
        launches.clear()
        once = runtime.driver.launch
        runtime.driver.launch = lambda kernel, grid, integers, reals, _, s=stream: runtime.driver.launch_again(
            [Again(kernel, grid, integers, reals)], s
        )
        calls(stub)
        again = na.attention(q, k, v, is_causal=True, backend="cuda")
        runtime.driver.launch = once
        assert not failures, failures
        assert calls(stub).count("launch_again") == len(launches) > 1
        assert {found for _, found in launches} == {stream}
        assert not runtime.driver.is_capturing(stream)
        np.testing.assert_array_equal(again, out)
    big = na.KVCache(1, 2, 300, 64, dtype=np.float16)
    big.append(*(rng.standard_normal((1, 2, 300, 64)).astype(np.float16) for _ in range(2)))
    got = na.attention_decode(q[:, :, :1], big, backend="cuda")
    np.testing.assert_allclose(
        got.astype(float), na.attention_decode(q[:, :, :1], big, backend="reference").astype(float), atol=2e-3
    )
    assert not failures, failures
    calls(stub)
    constants._kept.cache_clear()
    constants._slabs.clear()
    gc.collect()
    assert calls(stub) == ["wait_for_all", "free_at_once"], "a slab that nobody needs"
    stub.stub_most(ctypes.c_size_t(1000))
    with pytest.raises(MemoryError, match="bytes could not be had on GPU 0") as raised:
        na.attention(q, k, v, backend="cuda")
    print("out of memory:", raised.value)
    stub.stub_most(ctypes.c_size_t(2**34))
    stub.stub_run(fail)
    with pytest.raises(na.BackendUnavailableError, match="could not be launched on GPU 0") as raised:
        na.attention(q, k, v, backend="cuda")
    print("a launch that fails:", raised.value)
    c, _ = launches[0]
    kernel = kernels.compiled(c)
    with pytest.raises(na.BackendUnavailableError, match="could not be launched on GPU 0: CUDA_ERROR_INVALID_VALUE"):
        runtime.driver.launch_again([Again(kernel, (1, 1, 1), [0] * len(INTEGERS), [0.0] * len(REALS))], 1)
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
