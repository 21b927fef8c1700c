"""Threads, devices and captured streams on the stub driver of libcuda.c, which is strict about contexts.

Run by test_cuda_libcuda.py in a process of its own. Kernels do nothing: it counts where they are launched.
"""

import ctypes
import gc
import os
import sys
import threading

import numpy as np
import pytest
import torch

import numba_attention as na
from numba_attention.device import arrays, driver, replay, runtime

Run = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, *[ctypes.c_void_p] * 2, ctypes.c_int, *[ctypes.c_void_p] * 2)
stub = ctypes.CDLL("libcuda.so.1")
stub.stub_calls.restype = ctypes.c_char_p
launched, repeated, recorded, stream, ordinal = [], [], [], [0], [0]


@Run
def run(*_):
    launched.append(runtime.driver.of_thread())
    return 0


def calls():
    return stub.stub_calls().decode().split()


def pretend():
    """Let tensors of the host say that they are on a GPU, and note what is done with them."""
    empty, empty_like = torch.empty, torch.empty_like
    torch.empty = lambda shape, dtype, device: empty(shape, dtype=dtype)
    torch.empty_like = lambda x, memory_format: empty_like(x, memory_format=memory_format)
    torch.Tensor.is_cuda, torch.Tensor.get_device = True, lambda self: ordinal[0]
    torch.Tensor.device = property(lambda self: torch.device("cuda", ordinal[0]))
    torch._C._cuda_getCurrentRawStream = lambda device: stream[0]
    repeat, record = replay.Recorded.repeat, driver.Driver._record
    replay.Recorded.repeat = lambda self, *given: (repeated.append(self), repeat(self, *given))[1]
    driver.Driver._record = lambda self, *given: (recorded.append(self), record(self, *given))[1]


def in_thread(call):
    """Call in a new thread, which has no context; return what the call did."""
    found = []

    def guarded():
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def done(call):
    """Where a call launched kernels, and how often it was repeated and how often launches were recorded for that."""
    launched.clear()
    repeated.clear()
    recorded.clear()
    calls()
    call()
    return set(launched), len(repeated), len(recorded)


def main():
    stub.stub_run(run)
    stub.stub_devices(2)
    assert na.backends()["cuda"], na.backends()["cuda"]
    pretend()
    q, k, v = (torch.randn(1, 4, 40, 64).half() for _ in range(3))
    parts, logs = ([torch.randn(shape) for _ in range(3)] for shape in ((2, 3, 5, 8), (2, 3, 5)))
    kinds = {"attention": lambda: na.attention(q, k, v), "merge": lambda: na.merge_attention(parts, logs)}
    for call in kinds.values():
        for handle in (0, 7):
            stream[0] = handle
            assert done(call) == ({0}, 0, 0)
            assert done(call) == ({0}, 1, 1)
            assert done(call) == ({0}, 1, 0)
            # A driver may refuse even to say whether a stream is captured where no context is the current one.
            assert in_thread(lambda call=call: done(call)[:2]) == ({0}, 1)
    assert runtime.driver.is_capturing(7, 0) is False
    stub.stub_captured(ctypes.c_void_p(7))
    assert runtime.driver.is_capturing(7, 0) is True
    assert in_thread(lambda: runtime.driver.is_capturing(7, 1)) is True
    stub.stub_captured(None)
    print("threads: done")

    # Tensors on a GPU that is not the current one: launches are recorded once, not at every call.
    stream[0], ordinal[0], arrays._torch = 21, 1, None
    for call in kinds.values():
        assert done(call) == ({1}, 0, 0)
        assert done(call) == ({1}, 1, 1)
        for _ in range(2):
            assert done(call) == ({1}, 1, 0)
        assert runtime.driver.of_thread() == 0
    print("devices: done")

    # What is copied from the host while a graph is captured would be copied when the graph runs, and not before: what
    # is kept of it for later calls was never written.
    ordinal[0], arrays._torch = 0, None
    stream[0] = 8
    stub.stub_captured(ctypes.c_void_p(8))
    mask = np.ones((40, 40), bool)
    blocks = na.BlockMask.causal(40, 40)
    for options in ({}, {"is_causal": True}, {"mask": mask}, {"mask": blocks}):
        with pytest.raises(na.BackendUnavailableError, match="make the same call once before, on the stream"):
            na.attention(q, k, v, **options)
        assert "captured_write" not in calls()
    stub.stub_captured(None)
    assert done(kinds["attention"]) == ({0}, 0, 0)
    assert "write" in calls(), "the record of the sequence, of which a failed capture left none"
    assert done(kinds["attention"]) == ({0}, 1, 1)
    stub.stub_captured(ctypes.c_void_p(8))
    assert done(kinds["attention"])[1] == 1
    assert [x for x in calls() if x != "launch_again"] == ["captured"]
    with pytest.raises(na.BackendUnavailableError, match="while a CUDA graph is captured; make the same call once"):
        na.attention(q, k, v, is_causal=True)  # all that is copied is there, and scratch memory is not
    stub.stub_captured(None)
    print("captures: done")

    stream[0] = 0
    assert done(kinds["attention"])[1] == 1
    child = os.fork()
    if not child:
        for call in (kinds["attention"], lambda: na.attention(mask[:2] * 1.0, mask * 1.0, mask * 1.0, backend="cuda")):
            with pytest.raises(na.BackendUnavailableError, match="forked after its parent had used a GPU"):
                call()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    print("forks: done")

    # Memory is freed where its GPU is the current one, which cuda.core before 1.2 does not see to.
    freed = []

    class Buffer:
        handle = 4096

        def __del__(self):
            freed.append(runtime.driver.of_thread())

    for number in (0, 1):
        held = [driver.Memory(Buffer(), runtime.driver, number)]
        held.clear()
        held = [driver.Memory(Buffer(), runtime.driver, number)]
        in_thread(held.clear)
    assert freed == [0, 0, 1, 1]
    with runtime.using(1, 1):
        there = runtime.upload(np.ones(4), 1)
    calls()
    del there
    gc.collect()
    assert calls() == ["free"]
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
