"""Arrays of the real libraries on a real GPU: what `test_cuda_arrays.py` plays with fakes."""

import threading

import numpy as np
import pytest

import numba_attention as na
from cases import assert_close, grad_tolerance, tolerance
from numba_attention.device import arrays, runtime

pytestmark = pytest.mark.gpu

RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal((2, heads, 70, 64), dtype=np.float32) for heads in (4, 2, 2))
OUT, LSE = na.attention(Q, K, V, is_causal=True, return_lse=True, backend="reference")
HALF = "float16"


class Torch:
    def __init__(self):
        self.module = pytest.importorskip("torch")
        if not self.module.cuda.is_available():
            pytest.skip("this PyTorch has no CUDA")
        self.kind = self.module.Tensor

    def give(self, x):
        return self.module.from_numpy(np.ascontiguousarray(x)).cuda()

    def back(self, x):
        assert x.is_cuda
        return x.cpu().numpy()


class Cupy:
    def __init__(self):
        self.module = pytest.importorskip("cupy")
        self.kind = self.module.ndarray

    def give(self, x):
        return self.module.asarray(x)

    def back(self, x):
        return self.module.asnumpy(x)


class Numba:
    def __init__(self):
        pytest.importorskip("numba_cuda")
        from numba import cuda
        from numba.cuda.cudadrv.devicearray import DeviceNDArray

        self.module, self.kind = cuda, DeviceNDArray

    def give(self, x):
        return self.module.to_device(np.ascontiguousarray(x))

    def back(self, x):
        return x.copy_to_host()


class Jax:
    def __init__(self):
        self.module = pytest.importorskip("jax")
        try:
            self.device = self.module.devices("cuda")[0]
        except RuntimeError:
            pytest.skip("this JAX has no CUDA")
        self.kind = self.module.Array

    def give(self, x):
        return self.module.device_put(x, self.device)

    def back(self, x):
        assert x.devices() == {self.device}
        return np.asarray(x)


@pytest.fixture(params=[Torch, Cupy, Numba, Jax], ids=lambda kind: kind.__name__.lower())
def library(request):
    return request.param()


def near(got, want, dtype=HALF, offset=0.0):
    assert_close(got, want, 4 * tolerance(dtype)[0], offset)


def halves(*given):
    return [x.astype(HALF) for x in given]


def test_attention(library):
    out, lse = na.attention(*map(library.give, halves(Q, K, V)), is_causal=True, return_lse=True)
    assert isinstance(out, library.kind)
    assert isinstance(lse, library.kind)
    near(library.back(out), OUT)
    assert_close(library.back(lse), LSE, 1e-3, 1)


def test_backward(library):
    bias = RNG.standard_normal((4, 1, 70)).astype(np.float32)
    out, lse = na.attention(Q, K, V, bias=bias, return_lse=True, backend="reference")
    want = na.attention_backward(out, Q, K, V, out, lse, bias=bias, backend="reference")
    given = [library.give(x) for x in halves(out, Q, K, V, out)]
    got = na.attention_backward(*given, library.give(lse), bias=library.give(bias))
    for a, b in zip(got[:4], want[:4], strict=True):
        assert isinstance(a, library.kind)
        assert_close(library.back(a), b, 8 * grad_tolerance(HALF))


def test_varlen(library):
    (x,) = halves(RNG.standard_normal((50, 2, 64)))
    starts = np.array([0, 20, 20, 50], np.int32)
    want = na.attention_varlen(x, x, x, starts, starts, backend="reference")
    got = na.attention_varlen(*map(library.give, (x, x, x, starts, starts)))
    near(library.back(got), want)


def test_decode(library):
    query, key, value = halves(Q[:, :, :1], K, V)
    want = na.attention_decode(query, na.KVCache.from_arrays(key, value, [70, 33]), backend="reference")
    cache = na.KVCache.from_arrays(library.give(key), library.give(value), [70, 33])
    near(library.back(na.attention_decode(library.give(query), cache)), want)


def test_strides(library):
    """Views are taken without a copy."""
    if isinstance(library, Jax):
        pytest.skip("arrays of JAX are contiguous")
    if isinstance(library, Numba):  # which transposes matrices only
        views = [library.give(np.concatenate([x, x], axis=2))[:, :, : x.shape[2], :] for x in halves(Q, K, V)]
    else:
        stored = [library.give(np.ascontiguousarray(x.swapaxes(-3, -2))) for x in halves(Q, K, V)]
        views = [x.transpose(1, 2) if isinstance(library, Torch) else x.transpose((0, 2, 1, 3)) for x in stored]
    near(library.back(na.attention(*views, is_causal=True)), OUT)


def test_out(library):
    if isinstance(library, Jax):
        pytest.skip("arrays of JAX cannot be written to")
    given = [library.give(x) for x in halves(Q, K, V)]
    out = library.give(np.zeros_like(halves(Q)[0]))
    assert na.attention(*given, is_causal=True, out=out) is out
    near(library.back(out), OUT)


def test_bfloat16(library):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    if isinstance(library, Torch):
        given = [library.give(x).bfloat16() for x in (Q, K, V)]
        out = na.attention(*given, is_causal=True)
        assert out.dtype == library.module.bfloat16
        near(library.back(out.float()), OUT, "bfloat16")
    elif isinstance(library, Jax):
        given = [library.give(x.astype(ml_dtypes.bfloat16)) for x in (Q, K, V)]
        near(library.back(na.attention(*given, is_causal=True)).astype(np.float32), OUT, "bfloat16")
    else:
        pytest.skip("has no bfloat16 of its own")


def test_numpy_there_and_back():
    near(na.attention(*halves(Q, K, V), is_causal=True, backend="cuda"), OUT)


def test_mixed():
    torch, cupy = Torch(), Cupy()
    q, k, v = halves(Q, K, V)
    out = na.attention(torch.give(q), cupy.give(k), v, is_causal=True)
    assert isinstance(out, torch.kind)
    near(torch.back(out), OUT)


# Streams: work is put behind that of the caller, and the caller's behind it, without a word from the caller.


def test_streams_of_torch():
    library = Torch()
    torch = library.module
    given = [library.give(x) for x in halves(Q, K, V)]
    na.attention(*given, is_causal=True)  # compiled before it is timed
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [torch.empty_like(x) for x in given]
        torch.cuda._sleep(200_000_000)  # about 0.1 s: whoever does not wait reads what is not there yet
        for a, b in zip(late, given, strict=True):
            a.copy_(b)
        out = na.attention(*late, is_causal=True)
        assert not stream.query(), "the call waited for its result"
        later = out * 2
    stream.synchronize()
    near(library.back(out), OUT)
    near(library.back(later), 2 * OUT)


def test_memory_of_torch_is_not_reused_too_early():
    library = Torch()
    torch = library.module
    given = [library.give(x) for x in halves(Q, K, V)]
    for _ in range(50):
        out = na.attention(*[x.clone() for x in given], is_causal=True)  # freed at once by their owner
        torch.full_like(given[0], float("nan"))
    near(library.back(out), OUT)


def test_streams_of_cupy():
    library = Cupy()
    cupy = library.module
    given = [library.give(x) for x in halves(Q, K, V)]
    na.attention(*given, is_causal=True)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        late = [cupy.array(x) for x in given]
        out = na.attention(*late, is_causal=True)
        later = out * 2
    stream.synchronize()
    near(library.back(later), 2 * OUT)


def test_streams_of_numba():
    library = Numba()
    cuda = library.module
    stream = cuda.stream()
    given = [cuda.to_device(x, stream=stream) for x in halves(Q, K, V)]
    out = na.attention(*given, is_causal=True)
    stream.synchronize()
    near(library.back(out), OUT)


def test_inputs_on_different_streams():
    library, other = Torch(), Cupy()
    torch = library.module
    q, k, v = halves(Q, K, V)
    with other.module.cuda.Stream(non_blocking=True), torch.cuda.stream(torch.cuda.Stream()):
        query, key, value = library.give(q), other.give(k), other.give(v)
        out = na.attention(query, key, value, is_causal=True)
        torch.cuda.current_stream().synchronize()
    near(library.back(out), OUT)


def test_threads():
    """Each has a stream, and none disturbs another."""
    library = Torch()
    torch = library.module
    given = [library.give(x) for x in halves(Q, K, V)]
    torch.cuda.synchronize()
    results = {}

    def work(n):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                out = na.attention(*given, is_causal=True)
            torch.cuda.current_stream().synchronize()
            results[n] = library.back(out)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(4):
        near(results[n], OUT)


# The driver itself.


def test_device():
    with runtime.using(0, 1):
        found = runtime.current_device()
    assert found.compute_capability >= (7, 0)
    assert found.multiprocessors > 0
    assert found.shared_memory >= 48 * 1024
    assert found.name


@pytest.mark.parametrize("size", [0, 1, 1000, 3 * 2**23 + 5])
def test_copies(size):
    array = RNG.integers(0, 255, size, dtype=np.uint8)
    with runtime.using(0, 1):
        there = runtime.upload(array, 1)
        back = np.zeros_like(array)
        runtime.download(there, back, 1)
        np.testing.assert_array_equal(back, array)
        half = np.zeros_like(array[::-2])
        runtime.download(there[::-2], half, 1)
        np.testing.assert_array_equal(half, array[::-2])


def test_out_of_memory():
    with runtime.using(0, 1), pytest.raises(MemoryError, match="bytes could not be had on GPU 0"):
        runtime.empty(2**50, np.uint8, 1)


def test_take_knows_its_device(library):
    header = arrays.take(library.give(Q), 1)
    assert runtime.device_of(header).ordinal == 0
    back = np.zeros_like(Q)
    with runtime.using(0, 1):
        runtime.download(header, back, 1)
    np.testing.assert_array_equal(back, Q)


def test_memory_is_given_back():
    """What a call takes for itself is free after it."""
    library = Torch()
    given = [library.give(x) for x in halves(Q, K, V)]
    na.attention(*given)
    library.module.cuda.synchronize()
    free = library.module.cuda.mem_get_info()[0]
    for _ in range(100):
        na.attention(*given)
    library.module.cuda.synchronize()
    assert free - library.module.cuda.mem_get_info()[0] < 2**26
