"""The whole CUDA backend on the stub driver of libcuda.c: real machine code, loaded and launched by the real cuda.core.

Run by test_cuda_libcuda.py in a process of its own. What a launch does, the emulator does, with the parameters that
arrived at the driver.
"""

import ctypes
import gc
import sys
import threading
import traceback

import numpy as np
import pytest

import numba_attention as na
from emulator import Emulator
from numba_attention.cuda import kernels
from numba_attention.cuda.parameters import AXES, INTEGERS, REALS
from numba_attention.device import constants, driver, replay, runtime
from numba_attention.device.launches import Launch, Launches

Run = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_int, ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
configs, regions, launches, failures = {}, {}, [], []


def note(start, size):
    """Know an allocation, and forget those that were freed: what it is made of was theirs."""
    for freed in [address for address, n in regions.items() if address < start + size and start < address + n]:
        del regions[freed]
    regions[start] = size


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
        traceback.print_exc()
        failures.append(error)
        return 1


@Run
def fail(*arguments):
    return 1


@Run
def strange(*arguments):
    return 9999  # a number of no error that cuda.bindings knows


def watch():
    """Know the configuration of every kernel, and the size of every allocation."""
    compiled, allocate, keep = kernels.compiled, runtime.driver.allocate, runtime.driver.keep

    def remember(c):
        kernel = compiled(c)
        assert kernel.cubin.startswith(b"\x7fELF")
        configs[kernel.name] = c
        return kernel

    def allocate_noted(size, stream):
        memory = allocate(size, stream)
        note(memory.address, size)
        return memory

    def keep_noted(size):
        slab = keep(size)
        note(slab.address, size)
        return slab

    kernels.compiled = remember
    runtime.driver.allocate, runtime.driver.keep = allocate_noted, keep_noted


def relaunch(kernel, grid, integers, reals, stream):
    """Launch a kernel as repeated calls do, by machine code and without: addresses are put into parameters."""
    machine = driver.machine()
    assert machine is not None
    for code in (None, machine):
        driver._machine = code
        first, addresses, patches = list(integers), [0], []
        for place in kernel.addresses:
            if integers[place]:
                patches.append((place, len(addresses), 32))
                addresses.append(integers[place] - 32)
                first[place] = 1
        own = Launches([Launch(kernel, grid, first, patches, reals)], [], len(addresses))
        runtime.driver.repeat(own, addresses, 0, stream, 0)
        assert (own.record_at != 0) == (code is not None)


def with_tensors(stub):
    """Calls with tensors of PyTorch on the host that say that they are on the GPU, repeated by machine code."""
    try:
        import torch
    except ImportError:
        return
    empty, empty_like, stream = torch.empty, torch.empty_like, [0]

    def noted(x):
        storage = x.untyped_storage()
        note(storage.data_ptr(), storage.nbytes())
        return x

    torch.empty = lambda shape, dtype, device: empty(shape, dtype=dtype)
    torch.empty_like = lambda x, memory_format: noted(empty_like(x, memory_format=memory_format).fill_(1))
    torch.Tensor.is_cuda, torch.Tensor.get_device = True, lambda self: 0
    torch._C._cuda_getCurrentRawStream = lambda device: stream[0]
    rng = np.random.default_rng(1)
    made, repeat = [], replay.Recorded.repeat
    replay.Recorded.repeat = lambda self, *arguments: (made.append(self), repeat(self, *arguments))[1]

    def given(*shapes):
        return [noted(torch.from_numpy(rng.standard_normal(shape).astype(np.float16))) for shape in shapes]

    def check(*tensors, **options):
        arrays = [x.numpy() for x in tensors]
        want = na.attention(*arrays, is_causal=True, return_lse=True, backend="reference", **options)
        launches.clear()
        calls(stub)
        try:
            got = na.attention(*tensors, is_causal=True, return_lse=True, **options)
        except na.BackendUnavailableError:
            assert not failures, failures
            raise
        assert not failures, failures
        assert {found for _, found in launches} == {stream[0] or 1}
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x.numpy().astype(float), y.astype(float), atol=2e-3)
        return calls(stub)

    shapes = (1, 4, 40, 64), (1, 2, 40, 64), (1, 2, 40, 64)
    count = []
    for turn in range(4):
        q, k, v = given(*shapes)
        if turn == 2:  # a key that no other row sees, and rows that the second launch computes again
            k[0, 1, 39] = torch.nan
        noted_calls = check(q, k, v)
        count.append(len(made))
        assert noted_calls.count("launch_again") == (0 if not turn else len(launches) > 1 and len(launches))
    assert count == [0, 1, 2, 3]
    assert made[0]._free[0].record_at, "not by machine code"
    thread = threading.Thread(target=check, args=(q, k, v))  # it has no context yet
    thread.start()
    thread.join()
    assert len(made) == 4
    assert not failures
    own = made[0]._free[0]
    own.record[3] += 8  # another context, which must be noticed
    check(q, k, v)
    assert len(made) == 5
    stream[0] = 7
    check(q, k, v)
    check(q, k, v)
    assert len(made) == 6
    stream[0] = 0
    strided = [noted(x.transpose(1, 2).contiguous()).transpose(1, 2) for x in (q, k, v)]
    for _ in range(2):
        check(*strided)
    assert len(made) == 7
    shifted = noted(torch.zeros(q.numel() + 1, dtype=q.dtype))[1:].view(q.shape).copy_(q)
    check(shifted, k, v)
    assert len(made) == 7, "another alignment"
    check(q, k, k)  # (not k three times: kernels of equal and of grouped heads may have one name here)
    assert len(made) == 7, "keys and values at one address"
    with pytest.raises(TypeError, match="requires a gradient"):
        na.attention(q.clone().requires_grad_(), k, v, is_causal=True, return_lse=True)
    check(q, k, v)
    assert len(made) == 8
    stub.stub_run(fail)
    with pytest.raises(na.BackendUnavailableError, match="could not be launched on GPU 0: CUDA_ERROR_INVALID_VALUE"):
        na.attention(q, k, v, is_causal=True, return_lse=True)
    stub.stub_run(strange)
    code = driver._machine
    for driver._machine in (code, None):
        with pytest.raises(na.BackendUnavailableError, match="could not be launched on GPU 0: 9999 is not a valid"):
            na.attention(q, k, v, is_causal=True, return_lse=True)
    driver._machine = code
    stub.stub_run(run)
    check(q, k, v)
    replay.Recorded.repeat = repeat
    print("tensors:", len(made), "calls were repeated")


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
        runtime.driver.launch = lambda kernel, grid, integers, reals, _, s=stream: relaunch(
            kernel, grid, integers, reals, s
        )
        calls(stub)
        again = na.attention(q, k, v, is_causal=True, backend="cuda")
        runtime.driver.launch = once
        assert not failures, failures
        assert calls(stub).count("launch_again") == len(launches) > 1
        assert {found for _, found in launches} == {stream}
        assert not runtime.driver.is_capturing(stream, 0)
        np.testing.assert_array_equal(again, out)
    with_tensors(stub)
    big = na.KVCache(1, 2, 300, 64, dtype=np.float16)
    big.append(*(rng.standard_normal((1, 2, 300, 64)).astype(np.float16) for _ in range(2)))
    got = na.attention_decode(q[:, :, :1], big, backend="cuda")
    np.testing.assert_allclose(
        got.astype(float), na.attention_decode(q[:, :, :1], big, backend="reference").astype(float), atol=2e-3
    )
    assert not failures, failures
    replay._recorded.clear()
    gc.collect()
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
        relaunch(kernel, (1, 1, 1), [0] * len(INTEGERS), [0.0] * len(REALS), 1)
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
