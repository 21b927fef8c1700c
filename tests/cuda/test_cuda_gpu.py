"""What only a GPU can show: instructions against their emulation, long sequences, races that a sanitizer sees.

`test_cuda_kernels.py` runs every option there too, and `test_cuda_interop.py` the arrays of other libraries. All of it:
``python benchmarks/gpu.py --verify``.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import numba_attention as na
from cases import DTYPES, Case, assert_close, check, check_backward, tolerance
from emulator import Emulator
from numba_attention.cuda import kernels, tile_shapes
from numba_attention.cuda.products import to_tf32
from numba_attention.cuda.spec import FEATURES
from numba_attention.device import runtime
from numba_attention.device.headers import address_of

gpu = pytest.mark.gpu
SUPPORT = Path(__file__).parents[1] / "support"
THREADS = 64
SHARED = 8192
TYPES = ("l4", "d1")  # three inputs and an output, by address

RNG = np.random.default_rng(0)
FLOATS = np.concatenate([
    RNG.standard_normal(41), 2.0 ** RNG.uniform(-40, 40, 12), [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, 65504.0],
    [2.0**-126, 1e-3, -7.5, 127.9],
])  # fmt: skip
OTHERS = np.where(np.arange(THREADS) == 5, np.nan, RNG.permutation(FLOATS))
THIRDS = RNG.standard_normal(THREADS)
INTEGERS = np.concatenate([RNG.integers(0, 2**31 - 1, 60), [0, 1, 31, 2**31 - 1]]).astype(np.int32)
SMALL = RNG.integers(1, 1000, THREADS).astype(np.int32)


def _of_each(e, integers, thread, kind, size):
    """The number of each input that belongs to a thread, and a function that stores results one after the other."""
    at = e.wide(thread) * size
    inputs = [e.load(kind, integers[n] + at) for n in range(3)]
    stored = []

    def store(kind, x):
        e.store(kind, integers[3] + at + len(stored) * THREADS * size, [x], thread >= 0)
        stored.append(x)

    return inputs, store


def of_floats(kind):
    size = 4 if kind == "f" else 8

    def body(e, integers, thread):
        (a, b, c), store = _of_each(e, integers, thread, kind, size)
        for x in (a + b, a - b, 1.0 - a, a * b, a / b, e.min(a, b), e.max(a, b), e.abs(a)):
            store(kind, x)
        if kind == "f":  # (fused for float64 too, but not in the emulator)
            store(kind, e.fma(a, b, c))
        one, zero = e.const(kind, 1.0), e.const(kind, 0.0)
        for test in (a < b, a <= b, a > b, a >= b, a.equals(b), e.is_nan(a), e.is_finite(a)):
            store(kind, e.select(test, one, zero))
        store(kind, e.convert(kind, e.convert("d" if kind == "f" else "f", a)))
        for distance in (1, 2, 4, 8, 16):
            store(kind, e.shuffle_xor(a, distance))
        total = e.loop(5, [c], lambda n, state: [state[0] + e.convert(kind, n)])
        store(kind, total[0])

    return body


def of_functions(kind):
    """What is right to some bits only."""

    def body(e, integers, thread):
        (a, b, c), store = _of_each(e, integers, thread, kind, 4 if kind == "f" else 8)
        for x in (e.exp2(a), e.exp2(b), e.log2(e.abs(a)), e.tanh(a), e.fma(c, c, e.abs(c))):
            store(kind, x)

    return body


def of_integers(e, integers, thread):
    (a, b, c), store = _of_each(e, integers, thread, "i", 4)
    for x in (a + b, a - b, a * b, a // c, a % c, a & b, a | b, a ^ b, a >> (c & 7), b << (c & 7), e.min(a, b)):
        store("i", x)
    store("i", e.max(a - b, 0))
    store("i", e.narrow(e.wide(a) * e.wide(b) >> 20))
    store("i", e.select(((a < b) & (a > c)) | a.equals(0), a, c))
    store("i", e.shuffle_xor(a, 3))
    store("i", e.any_lane((thread >= 70) & (thread < 75)))
    store("i", e.any_lane(a > 1000))
    store("i", e.opaque(a))


def of_halves(e, integers, thread):
    (a, _, c), store = _of_each(e, integers, thread, "f", 4)
    for half in ("f16", "bf16"):
        store("i", e.pack(half, a, c))
        store("i", e.to_half(half, a))
        for x in e.unpack(half, e.pack(half, a, c)):
            store("f", x)
    store("i", to_tf32(e, c))
    store("i", e.load("h", integers[0] + e.wide(thread) * 2))
    store("i", e.load("b", integers[0] + e.wide(thread)))
    e.store("h", integers[3] + e.wide(thread) * 2 + 10 * THREADS * 4, [e.bits("i", a)], (thread & 1).equals(0))


def of_shared_memory(e, integers, thread):
    """Asynchronous copies of every width, with zeros where nothing is copied, and vectors."""
    (a, b, _), store = _of_each(e, integers, thread, "f", 4)
    some, lane = (thread & 3) > 0, thread & 31
    whole, nothing = e.const("i", 16), e.const("i", 0)
    own, at = thread * 16, e.wide(thread & 15) * 16
    e.copy_async(own, integers[0] + at, e.select(some, whole, nothing))
    e.commit()
    e.copy_async(thread * 8 + 2048, integers[1] + e.wide(thread & 31) * 8, e.const("i", 8), width=8)
    e.copy_async(thread * 4 + 4096, integers[2] + e.wide(thread) * 4, e.const("i", 4), some, width=4)
    e.commit()
    e.wait(1)
    for x in e.load_shared("f", own, 4):
        store("f", x)
    e.wait(0)
    for x in e.load_shared("f", thread * 8 + 2048, 2):
        store("f", x)
    store("f", e.select(some, e.load_shared("f", thread * 4 + 4096), e.const("f", 0.0)))
    e.store_shared("f", own, [a, b, a, b])
    e.store_shared("f", own + 4, [b], some)
    e.sync_warp()
    other = (thread ^ 1) * 16
    for x in (*e.load_shared("f", other, 2), e.load_shared("f", other + 12)):
        store("f", x)
    for x in e.load("f", integers[0] + e.wide(lane & 15) * 16, 4, where=some):
        store("f", x)


def of_matrices(dtype):
    """Both forms of ldmatrix on rows of a tile, and a product of small numbers, which is exact."""

    def body(e, integers, thread):
        (a, b, c), store = _of_each(e, integers, thread, "i", 4)
        e.store_shared("i", thread * 16, [a, b, c, a])
        e.sync_warp()
        address = (thread & 31) * 16 + (thread >> 5) * 512
        found = []
        for transposed in (False, True):
            found.append(e.load_matrices(address, transposed))
            for x in found[-1]:
                store("i", x)
        numbers = [e.convert("f", x & 15) for x in (a, b, c, a ^ b)]
        zero = e.const("f", 0.0)
        if dtype == "tf32":
            left, right = [to_tf32(e, x) for x in numbers], [to_tf32(e, x) for x in numbers[:2]]
        else:
            left = [e.pack(dtype, x, y) for x, y in zip(numbers, numbers[1:] + numbers[:1], strict=True)]
            right = left[1:3]
        for x in e.multiply(dtype, left, right, [zero, e.const("f", 3.0), *numbers[:2]]):
            store("f", x)

    return body


EXACT = {
    "float32": (of_floats("f"), np.float32), "float64": (of_floats("d"), np.float64),
    "integers": (of_integers, np.int32),
    "halves": (of_halves, np.float32), "shared memory": (of_shared_memory, np.float32),
    **{f"matrices of {dtype}": (of_matrices(dtype), np.int32) for dtype in ("f16", "bf16", "tf32")},
}  # fmt: skip
RESULTS = 32  # of a thread, at most


def inputs(dtype):
    made = [INTEGERS, np.roll(INTEGERS, 7), SMALL] if dtype == np.int32 else [FLOATS, OTHERS, THIRDS]
    return [np.resize(x, 256).astype(dtype) for x in made]


def make(body, on):
    """A kernel of one block that runs a body."""
    cuda, address = on.cuda, on.shared()

    @on.macro("", *TYPES, "i", "i")
    def all_of_it(e, integers, reals, base, thread):
        body(e, integers, thread)

    def kernel(integers, reals):
        base = address(cuda.shared.array(0, np.uint8))
        all_of_it(integers, reals, base, np.int32(cuda.threadIdx.x))

    return kernel


def emulate(body, dtype):
    given, out = inputs(dtype), np.zeros(RESULTS * THREADS, dtype)
    emulator = Emulator(races=False)
    arrays = [*given, out]
    regions = [(x.ctypes.data, x.nbytes) for x in arrays]
    emulator.run(make(body, emulator), (1, 1, 1), THREADS, SHARED, [x.ctypes.data for x in arrays], [0.0], regions)
    return out


def compiled(body, arch):
    from numba_attention.cuda import toolchain

    made = toolchain.compile_kernel(make(body, toolchain.Intrinsics), 4, 1, THREADS, arch)
    return runtime.Kernel(made.name, made.code, THREADS, SHARED, (0, 1, 2, 3))


def run(body, dtype):
    with runtime.using(0, runtime.DEFAULT_STREAM):
        there = [
            runtime.upload(x, runtime.DEFAULT_STREAM) for x in (*inputs(dtype), np.zeros(RESULTS * THREADS, dtype))
        ]
        kernel = compiled(body, runtime.current_device().arch)
        runtime.launch(kernel, (1, 1, 1), [address_of(x) for x in there], [0.0], runtime.DEFAULT_STREAM)
        out = np.empty(RESULTS * THREADS, dtype)
        runtime.download(there[-1], out, runtime.DEFAULT_STREAM)
    return out


def same_bits(got, want):
    """As floats, so that every NaN is one."""
    both = np.isnan(got.view(np.float64 if got.itemsize == 8 else np.float32))
    unsigned = np.uint64 if got.itemsize == 8 else np.uint32
    other = np.isnan(want.view(np.float64 if got.itemsize == 8 else np.float32))
    np.testing.assert_array_equal(both, other)
    np.testing.assert_array_equal(got.view(unsigned)[~both], want.view(unsigned)[~both])


@pytest.mark.parametrize("name", EXACT)
def test_instructions_compile(name):
    """Where there is no GPU, what is to be run on one must at least be code for it, and run in the emulator."""
    pytest.importorskip("numba_cuda")
    body, dtype = EXACT[name]
    assert compiled(body, "sm_80").cubin.startswith(b"\x7fELF")
    assert emulate(body, dtype).any()


@gpu
@pytest.mark.parametrize("name", EXACT)
def test_instructions(name):
    body, dtype = EXACT[name]
    same_bits(run(body, dtype), emulate(body, dtype))


@gpu
@pytest.mark.parametrize("kind", ["f", "d"])
def test_functions(kind):
    dtype = np.float32 if kind == "f" else np.float64
    got, want = run(of_functions(kind), dtype), emulate(of_functions(kind), dtype)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_allclose(got, want, rtol=4e-7 if kind == "f" else 1e-15, atol=2.0**-126 if kind == "f" else 0)


@pytest.mark.torch
def test_the_benchmark_runs(torch):
    """Where there is no GPU, the script that measures one must at least run."""
    script = os.fspath(SUPPORT.parents[1] / "benchmarks" / "gpu.py")
    for rows in ("causal", "decode B1", "host"):
        command = [sys.executable, script, "--dry-run", "--rounds", "1", "--rows", rows]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Error" not in done.stdout
        assert f"| {rows.split()[0]}" in done.stdout.replace("forward", "causal")
    if runtime.unusable():
        done = subprocess.run([sys.executable, script, "--verify"], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert runtime.unusable() in done.stderr


# Sizes that the emulator has no time for.


def arrays(L, S, E, dtype, H=4, Hkv=2, B=2):
    rng = np.random.default_rng(1)
    shapes = ((B, H, L, E), (B, Hkv, S, E), (B, Hkv, S, E))
    return [rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes]


@gpu
@pytest.mark.parametrize("options", [(), ("causal",), ("window",)], ids=str)
@pytest.mark.parametrize("E", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_longer(dtype, E, options):
    case = Case(700, 1100, E, H=4, Hkv=2, options=options)
    check(*case.arrays(dtype), case.kwargs(), dtype, case, backend="cuda", many_keys=True)
    check_backward(case, dtype, backend="cuda")


@gpu
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_very_long(monkeypatch, dtype, tf32):
    """Sums over 60 000 keys: nothing drifts, and 32 bits suffice."""
    monkeypatch.setenv(tile_shapes.TF32X3, "1" if tf32 else "0")
    q, k, v = arrays(130, 60_000, 64, dtype, H=2, Hkv=1, B=1)
    out, lse = na.attention(q, k, v + DTYPES[dtype].type(1), return_lse=True, backend="cuda")
    wide = [x.astype(np.float64) for x in (q, k, v + DTYPES[dtype].type(1))]
    want, want_lse = na.attention(*wide, return_lse=True, backend="cpu")
    assert_close(out, want, tolerance(dtype)[0] * 2)
    assert_close(lse, want_lse, 1e-6, offset=1)


@gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits_every_time(monkeypatch, dtype):
    monkeypatch.setenv(tile_shapes.DETERMINISTIC, "1")
    q, k, v = arrays(1000, 1000, 64, dtype)
    runs = []
    for _ in range(5):
        out, lse = na.attention(q, k, v, is_causal=True, return_lse=True, backend="cuda")
        runs.append([out, lse, *na.attention_backward(out, q, k, v, out, lse, is_causal=True, backend="cuda")[:3]])
    for others in runs[1:]:
        for a, b in zip(runs[0], others, strict=True):
            np.testing.assert_array_equal(a, b)


@gpu
@pytest.mark.parametrize("task", ["forward", "query", "key"])
@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_what_the_driver_loaded(task, storage):
    """Registers and local memory as the driver sees them, and blocks that fit."""
    import cuda.core

    with runtime.using(0, runtime.DEFAULT_STREAM):
        device = runtime.current_device()
        for E in (64, 128):
            for c in tile_shapes.parts(tile_shapes.base(task, storage, E, E, device)):
                made = kernels.compile_(c)
                loaded = cuda.core.ObjectCode.from_cubin(made.code).get_kernel(made.name)
                found = loaded.attributes.local_size_bytes, loaded.attributes.num_regs
                found = tuple(x() if callable(x) else x for x in found)  # properties in cuda-core 1.2
                assert found == (0, made.registers)


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_sanitizer(tool):
    """Every kind of kernel on small sizes under NVIDIA's compute-sanitizer."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not on the path")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])}
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, os.fspath(SUPPORT / "sanitized.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "RACECHECK SUMMARY: 0 hazards" in done.stdout
