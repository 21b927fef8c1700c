"""What a repeated call costs the host, part by part, in us: python host.py

On a GPU beside PyTorch's own attention; with the stub of a driver (tests/support/libcuda.c) on PyTorch's tensors of the
host, which then say that they are on a GPU. Figures are minima over rounds of the mean of a few hundred calls, without
waiting for the GPU.
"""

import cProfile
import ctypes
import pstats
import sys
import time
from array import array
from functools import partial

import numpy as np
import torch

import numba_attention as na
from numba_attention import api, device_call
from numba_attention.device import arrays, replay, runtime
from numba_attention.device.launches import Launches
from numba_attention.options import NO_OPTIONS

STUB = not torch.cuda.is_available()
CALLS, ROUNDS = 200, 12  # fewer calls than the driver queues before it waits


def us(call, calls=CALLS, rounds=ROUNDS):
    for _ in range(5):
        call()
    best = float("inf")
    for _ in range(rounds):
        synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, time.perf_counter() - begin)
    synchronize()
    return 1e6 * best / calls


def synchronize():
    if not STUB:
        torch.cuda.synchronize()


def row(name, call, **more):
    try:
        print(f"{name:72s} {us(call, **more):8.2f}", flush=True)
    except Exception as problem:
        print(f"{name:72s} {type(problem).__name__}: {str(problem)[:150]}", flush=True)


def pretend():
    """Let tensors of the host say that they are on a GPU, in as little time as one that is."""
    ctypes.CDLL("libcuda.so.1").stub_quiet(1)
    empty = torch.empty
    torch.empty = lambda shape, dtype, device: empty(shape, dtype=dtype)
    torch.Tensor.is_cuda = True
    torch.Tensor.get_device = torch.Tensor.storage_offset  # 0, by a method of C as in its place
    torch._C._cuda_getCurrentRawStream = lambda device: 0


def normal(*shape):
    x = torch.randn(shape, dtype=torch.float32).to(torch.bfloat16)
    return x if STUB else x.cuda()


def recorded_of(q, k, v, **options):
    """What the package keeps of attention of these arrays."""
    for _ in range(2):
        na.attention(q, k, v, **options)
    operands = {"query": q, "key": k, "value": v}
    seen = device_call._look(api._attention, operands, options, {"return_lse": False})
    recorded = replay.find(seen.key)
    assert recorded is not None, "calls are not repeated"
    return seen, recorded


def calls_of(q, k, v):
    out, lse = na.attention(q, k, v, return_lse=True)
    step, many = normal(1, 32, 1, 128), normal(64, 32, 1, 128)
    few = [normal(1, 2, 128, 64) for _ in range(2)]
    caches = [na.KVCache.from_arrays(*(normal(1, 8, 8192, 128) for _ in range(2))) for _ in range(1 if STUB else 8)]
    large = na.KVCache.from_arrays(*(normal(64, 8, 512, 128) for _ in range(2)))
    growing = na.KVCache.from_arrays(*(normal(64, 8, 2**12, 64) for _ in range(2)), lengths=0)
    token = [normal(64, 8, 1, 64) for _ in range(2)]
    turn = [0]
    slopes = np.float32(2.0) ** np.linspace(-1, -8, 8, dtype=np.float32)
    bias, blocks = normal(8, 128, 128), na.BlockMask.causal(128, 128)
    packed, starts = [normal(256, 8, 64) for _ in range(3)], np.arange(0, 257, 32)
    parts = [na.attention(q, x, x, return_lse=True) for x in (k, v)]
    outs, lses = ([x[n] for x in parts] for n in range(2))
    five = [outs * 2 + outs[:1], lses * 2 + lses[:1]]
    five = [[x.clone() for x in stack] for stack in five]

    def decode_in_turn():
        turn[0] += 1
        return na.attention_decode(step, caches[turn[0] % len(caches)])

    def append():
        if growing._common == growing.capacity:
            growing.truncate(0)
        growing.append(*token)

    def of_new_seeds():
        turn[0] += 1
        return na.attention(q, k, v, dropout_p=0.1, seed=turn[0])

    return {
        "attention L128": lambda: na.attention(q, k, v),
        "attention L128 with lse": lambda: na.attention(q, k, v, return_lse=True),
        "attention L128 causal (two launches)": lambda: na.attention(q, k, v, is_causal=True),
        "attention L128 causal with lse": lambda: na.attention(q, k, v, is_causal=True, return_lse=True),
        "attention L128 causal, grouped heads": lambda: na.attention(q, *few, is_causal=True),
        "attention L128, softcap": lambda: na.attention(q, k, v, softcap=20.0),
        "attention L128, BlockMask": lambda: na.attention(q, k, v, mask=blocks),
        "attention L128, bias on the GPU": lambda: na.attention(q, k, v, bias=bias),
        "attention L128, ALiBi": lambda: na.attention(q, k, v, alibi_slopes=slopes),
        "attention L128, score_mod": lambda: na.attention(q, k, v, score_mod=na.mods.alibi, mod_args=(slopes,)),
        "attention L128, dropout, a new seed in each call": of_new_seeds,
        "attention_varlen, causal": lambda: na.attention_varlen(*packed, starts, starts, is_causal=True),
        "attention_backward L128, BlockMask": lambda: na.attention_backward(out, q, k, v, out, lse, mask=blocks),
        "attention_backward L128": lambda: na.attention_backward(out, q, k, v, out, lse),
        "attention_backward L128 causal": lambda: na.attention_backward(out, q, k, v, out, lse, is_causal=True),
        "attention_decode S8192 (two launches)": lambda: na.attention_decode(step, caches[0]),
        "attention_decode S8192, 8 caches in turn": decode_in_turn,
        "attention_decode B64": lambda: na.attention_decode(many, large),
        "append of a token to 64 sequences": append,
        "merge_attention of two parts": lambda: na.merge_attention(outs, lses),
        "merge_attention of five parts": lambda: na.merge_attention(*five),
    }


def peers(q, k, v):
    attend = torch.nn.functional.scaled_dot_product_attention
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    result = attend(*leaves)
    grad = torch.ones_like(result)
    step, key, value = normal(1, 32, 1, 128), normal(1, 8, 8192, 128), normal(1, 8, 8192, 128)
    return {
        "torch attention L128": lambda: attend(q, k, v),
        "torch attention L128 causal": lambda: attend(q, k, v, is_causal=True),
        "torch autograd.grad of it": lambda: torch.autograd.grad(result, leaves, grad, retain_graph=True),
        "torch attention of one query, S8192": lambda: attend(step, key, value, enable_gqa=True),
    }


def parts(q, k, v):
    device = torch.device("cpu" if STUB else "cuda", 0)
    operands = {"query": q, "key": k, "value": v}
    family, driver, stream = arrays.family_of(q), runtime.driver, runtime.DEFAULT_STREAM
    row("a call of a Python function that does nothing", lambda: None)
    row("q.shape, q.stride(), q.dtype, q.data_ptr()", lambda: (q.shape, q.stride(), q.dtype, q.data_ptr()))
    row("q.device.index", lambda: q.device.index)
    row("q.get_device(), q.is_cuda, q.requires_grad, q.layout, q.is_neg()",
        lambda: (q.get_device(), q.is_cuda, q.requires_grad, q.layout, q.is_neg()))  # fmt: skip
    row("torch.empty of the result", lambda: torch.empty((1, 8, 128, 64), dtype=torch.bfloat16, device=device))
    row("torch.empty of 1 MB", lambda: torch.empty((2**20,), dtype=torch.uint8, device=device))
    if not STUB:
        row("torch.cuda.current_stream(0).cuda_stream", lambda: torch.cuda.current_stream(0).cuda_stream)
        row("torch.empty_like(q)", lambda: torch.empty_like(q))
        small = torch.zeros(32, device=device)
        row("small.add_(1), a launch by PyTorch", lambda: small.add_(1))
    row("torch._C._cuda_getCurrentRawStream(0)", lambda: torch._C._cuda_getCurrentRawStream(0))
    row("driver.of_thread()", driver.of_thread)
    row("driver.current()", driver.current)
    row("driver.allocate(1 MB) and free", lambda: driver.allocate(2**20, stream))
    memory = driver.allocate(2**20, stream)
    row("driver.clear(512 bytes)", lambda: driver.clear(memory.address, 512, stream))
    row("arrays.family_of(q)", lambda: arrays.family_of(q))
    row("family.look(q)", lambda: family.look(q))
    row("family.new of the result", lambda: family.new((1, 8, 128, 64), np.dtype("float16"), 0, stream))
    looks = arrays.looks_of(type(q))
    if looks is not None:
        row("looks of three tensors by machine code", lambda: looks[1].of(type(q), (q, k, v)))
    rest = {"return_lse": False}
    row("_look: key of the call", lambda: device_call._look(api._attention, operands, NO_OPTIONS, rest))
    seen, recorded = recorded_of(q, k, v)
    row("replay.find of the key", lambda: replay.find(seen.key))
    row("repeat: allocation, parameters, launch", lambda: seen.repeat(recorded))


def launches(q, k, v):
    """The ways to launch the kernel of attention L128, whose parameters are those of a call that was."""
    from cuda.bindings import driver as bindings

    _, recorded = recorded_of(q, k, v)
    driver, stream = runtime.driver, runtime.DEFAULT_STREAM
    out = torch.empty((1, 8, 128, 64), dtype=torch.bfloat16, device="cpu" if STUB else "cuda")
    addresses = [x.data_ptr() for x in (q, k, v, out)]
    x = recorded._launches[0]
    own = Launches([x], [], len(addresses))
    own.patch(addresses)
    kernel, extra = x.kernel, own.extras[0]
    integers = list(own.numbers[0][: len(x.integers)])
    row("driver.launch (cuda.core)", lambda: driver.launch(kernel, x.grid, integers, x.reals, stream))
    row("driver.repeat", lambda: driver.repeat(own, addresses, 0, stream, 0))
    row("driver.repeat, in Python", lambda: driver._repeat(own, addresses, 0, stream))
    again = Launches([x, x], [], len(addresses))
    row("driver.repeat, one kernel twice", lambda: driver.repeat(again, addresses, 0, stream, 0))
    seen, causal = recorded_of(q, k, v, is_causal=True)
    two = causal._free[0]
    of_two = two.addresses.tolist()
    for n, (_, at) in enumerate(causal._made, len(seen.addresses)):
        if at is None:
            of_two[n] = out.data_ptr()
    row("driver.repeat, the two kernels of a causal call", lambda: driver.repeat(two, of_two, 0, stream, 0))
    driver.repeat(own, addresses, 0, stream, 0)
    code = driver._loaded(kernel, 0)
    function = driver._function(kernel, int(bindings.cuCtxGetCurrent()[1]))
    handles = {"CUkernel": int(code.handle), "CUfunction": int(function)}
    first, count = own.numbers[0].buffer_info()
    pointers = array("Q", range(first, first + 8 * count, 8))
    at = pointers.buffer_info()[0]
    library = ctypes.CDLL("libcuda.so.1")
    V, U = ctypes.c_void_p, ctypes.c_uint
    for name, handle in handles.items():
        function, on = bindings.CUfunction(handle), bindings.CUstream(stream)
        for how, parameters, more in ((f"{count} pointers", at, 0), ("one buffer", 0, extra)):
            by_bindings = (
                function, *x.grid, kernel.threads, 1, 1, kernel.shared, on, parameters, more,
            )  # fmt: skip
            by_ctypes = (
                V(handle), *map(U, (*x.grid, kernel.threads, 1, 1, kernel.shared)), V(stream), V(parameters), V(more),
            )  # fmt: skip
            row(f"cuLaunchKernel by cuda.bindings, {name}, {how}", partial(bindings.cuLaunchKernel, *by_bindings))
            row(f"cuLaunchKernel by ctypes, {name}, {how}", partial(library.cuLaunchKernel, *by_ctypes))
    synchronize()
    if not STUB:
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        print(f"the result of these launches is off by {(out - want).abs().max().item():.2g}")


def of_gpu(name, call, times=400):
    """Microseconds a call by the GPU's own events, of so many calls in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize()
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    print(f"{name + ', by events, calls in a row':72s} {1e3 * begin.elapsed_time(end) / times:8.2f}", flush=True)


def main():
    if STUB:
        pretend()
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}{', on a stub' if STUB else ''}; us")
    q, k, v = (normal(1, 8, 128, 64) for _ in range(3))
    calls = calls_of(q, k, v)
    for name, call in calls.items():
        row(name, call)
    if not STUB:
        for name, call in peers(q, k, v).items():
            row(name, call)
        for name, call in (*calls.items(), *peers(q, k, v).items()):
            of_gpu(name, call)
    print()
    parts(q, k, v)
    print()
    launches(q, k, v)
    for name in ("attention L128", "attention_backward L128", "attention_decode S8192 (two launches)"):
        call, profile = calls[name], cProfile.Profile()
        synchronize()
        profile.enable()
        for _ in range(500):
            call()
        profile.disable()
        synchronize()
        print(f"\nprofile of 500 x {name}, which takes longer than without")
        pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(16)
    print("host: done")


if __name__ == "__main__":
    main()
