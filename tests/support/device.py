"""A device without a GPU: its memory is the host's, its kernels what a test gives, its arrays fakes."""

import array
import ctypes
import sys
import types
import weakref
from contextlib import contextmanager
from dataclasses import replace

import numba
import numpy as np

from numba_attention.cuda.parameters import REALS
from numba_attention.device import runtime
from numba_attention.device.dlpack import Exported
from numba_attention.device.driver import Device, Driver


class HostMemory:
    """Memory of a `HostDriver`, off its books when nobody holds it."""

    def __init__(self, driver, size, ordinal, stream):
        self.buffer = np.empty(size + 256, np.uint8)
        self.buffer[:] = 0xA5  # what was never written shows
        self.address = -(-self.buffer.ctypes.data // 256) * 256
        self.size, self.ordinal, self.stream = size, ordinal, stream
        driver.allocations[self.address] = weakref.ref(self)
        weakref.finalize(self, driver.freed, self.address, stream)


class HostDriver(Driver):
    """A driver whose devices are the host.

    Parameters
    ----------
    run : callable, optional
        Called as ``run(kernel, grid, integers, reals)`` for each launch.
    devices : int
    limit : int, optional
        Bytes that can be had in one allocation.
    """

    def __init__(self, run=None, devices=2, limit=None):
        self.run, self.devices, self.limit = run, devices, limit
        self.ordinal = 0
        self.capturing = set()  # streams
        self.allocations = {}  # address: weak reference to its HostMemory
        self.frees = []  # (address, stream)
        self.waits = []  # (stream, the one that it waits for)
        self.copies = []  # ("write" or "read", bytes, stream)
        self.synchronized = []
        self.launches = []  # (kernel, device, grid, integers, reals, stream)
        self.template = Device(0, (9, 0), "sm_90a", 132, 232448, "a host that plays a GPU")

    def unusable(self):
        return None

    def count(self):
        return self.devices

    def device(self, ordinal):
        return replace(self.template, ordinal=ordinal)

    def of_thread(self):
        return self.ordinal

    @contextmanager
    def on(self, ordinal):
        before, self.ordinal = self.ordinal, ordinal
        try:
            yield
        finally:
            self.ordinal = before

    def memory_at(self, address):
        """The allocation that an address is in."""
        for start, reference in self.allocations.items():
            memory = reference()
            if memory is not None and start <= address < start + memory.size:
                return memory
        raise AssertionError(f"{address:#x} is no memory of this device")

    def ordinal_of(self, address):
        return self.memory_at(address).ordinal

    def allocate(self, size, stream):
        assert size > 0
        if self.limit is not None and size > self.limit:
            raise MemoryError(f"{size:,} bytes could not be had on GPU {self.ordinal}: CUDA_ERROR_OUT_OF_MEMORY")
        return HostMemory(self, size, self.ordinal, stream)

    def keep(self, size):
        return HostMemory(self, size, self.ordinal, None)

    def freed(self, address, stream):
        self.allocations.pop(address, None)
        self.frees.append((address, stream))

    def clear(self, address, size, stream):
        self._inside(address, size)
        ctypes.memset(address, 0, size)

    def write(self, address, array, stream):
        self.copies.append(("write", array.nbytes, stream))
        data = np.ascontiguousarray(array)
        self._inside(address, data.nbytes)
        ctypes.memmove(address, data.ctypes.data, data.nbytes)

    def read(self, array, address, stream):
        assert array.flags.c_contiguous
        self.copies.append(("read", array.nbytes, stream))
        self._inside(address, array.nbytes)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def _inside(self, address, size):
        memory = self.memory_at(address)
        assert address + size <= memory.address + memory.size
        assert memory.ordinal == self.ordinal, "memory of another device"

    def wait(self, stream, before):
        self.waits.append((stream, before))

    def is_capturing(self, stream, device):
        return stream in self.capturing

    def synchronize(self, stream):
        self.synchronized.append(stream)

    def repeat(self, own, addresses, clears, stream, device):
        with self.on(device):
            for number, more, size in own.clears[:clears]:
                self.clear(addresses[number] + more, size, stream)
            own.patch(addresses)
            for launch, numbers in zip(own.launches, own.numbers, strict=True):
                n = len(numbers) - len(REALS)
                reals = array.array("d", numbers[n:].tobytes())
                self.launch(launch.kernel, launch.grid, list(numbers[:n]), list(reals), stream)

    def launch(self, kernel, grid, integers, reals, stream):
        self.launches.append((kernel, self.ordinal, grid, tuple(integers), tuple(reals), stream))
        if self.run is not None:
            self.run(kernel, grid, integers, reals)


class Fake:
    """An array of a fake library on a `HostDriver`: `header` is its memory, `array` what a test may look at."""

    def __init__(self, array, ordinal=None):
        array = np.asarray(array)
        if ordinal is not None:
            with runtime.driver.on(ordinal):
                self.__init__(array)
            return
        made = runtime.empty(array.shape, array.dtype, 1)
        if array.size:
            made[...] = array
        self.header = made

    @classmethod
    def of(cls, header):
        self = cls.__new__(cls)
        self.header = header
        return self

    array = property(lambda self: self.header)
    shape = property(lambda self: self.header.shape)
    dtype = property(lambda self: self.header.dtype)
    size = property(lambda self: self.header.size)
    ordinal = property(lambda self: runtime.device_of(self.header).ordinal)

    def reshape(self, *shape):
        return type(self).of(self.header.reshape(*shape))

    def __getitem__(self, index):
        return type(self).of(self.header[index])


class Interface(Fake):
    """By CUDA Array Interface alone; `more` is added to it, or takes away what is None there."""

    more = types.MappingProxyType({})

    @property
    def __cuda_array_interface__(self):
        found = Exported(self.header).__cuda_array_interface__ | {"strides": self.header.strides} | dict(self.more)
        return {name: x for name, x in found.items() if name != "stream" or x is not None}


class ByDLPack(Fake):
    """By DLPack alone."""

    streams = ()  # asked for

    def __dlpack_device__(self):
        return Exported(self.header).__dlpack_device__()

    def __dlpack__(self, *, stream=None):
        self.streams = (*self.streams, stream)
        return Exported(self.header).__dlpack__()


class NumbaArray(Interface):
    """As a device array of numba.cuda shows itself."""

    __cuda_ndarray__ = True
    strides = property(lambda self: self.header.strides)


class CupyArray(Interface):
    """As an array of CuPy shows itself, with as much of its arithmetic as sums of blocks take."""

    strides = property(lambda self: self.header.strides)
    ndim = property(lambda self: self.header.ndim)
    nbytes = property(lambda self: self.header.nbytes)
    device = property(lambda self: types.SimpleNamespace(id=self.ordinal))
    data = property(lambda self: types.SimpleNamespace(ptr=self.header.ctypes.data))

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __len__(self):
        return len(self.header)

    def __add__(self, other):
        return CupyArray(self.header + other.header)

    def __setitem__(self, index, value):
        self.header[index] = getattr(value, "header", value)

    def astype(self, dtype, copy=True):
        return self if self.dtype == dtype and not copy else CupyArray(self.header.astype(dtype))

    def transpose(self, axes):
        return CupyArray.of(self.header.transpose(axes))

    def swapaxes(self, a, b):
        return CupyArray.of(self.header.swapaxes(a, b))

    def __dask_tokenize__(self):
        return "CupyArray", self.shape, str(self.dtype), self.header.tobytes()


class JaxArray(ByDLPack):
    """As an array of JAX shows itself."""

    waited = False

    def block_until_ready(self):
        self.waited = True


class Dtype:
    """As dtypes of PyTorch are."""

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return f"torch.{self.name}"

    def __eq__(self, other):
        return self.name == other.name

    def __hash__(self):
        return hash(self.name)


class Tensor(Fake):
    """As a tensor of PyTorch shows itself."""

    is_cuda = True
    requires_grad = False
    layout = "strided"
    device = property(lambda self: types.SimpleNamespace(index=self.ordinal, type="cuda"))
    dtype = property(lambda self: Dtype(self.header.dtype.name))
    size = None  # a method there

    def is_conj(self):
        return False

    def is_neg(self):
        return False

    def data_ptr(self):
        return self.header.ctypes.data if self.header.size else 0

    def untyped_storage(self):
        """Asked for at low addresses, which memory of the host has where the interpreter is linked to be there."""
        return self

    def get_device(self):
        return self.ordinal if self.is_cuda else -1

    def stride(self):
        return tuple(n // self.header.itemsize for n in self.header.strides)

    def numel(self):
        return self.header.size

    def expand(self, shape):
        return type(self).of(np.broadcast_to(self.header, shape))

    @property
    def __cuda_array_interface__(self):
        raise RuntimeError("nobody needs this of a tensor")


def from_dlpack(kind):
    """The function of that name of a fake library."""
    from numba_attention.device.dlpack import read

    return lambda exported: kind.of(read(exported.__dlpack__(), exported))


def fake_torch(stream=0):
    asked = []

    def current_stream(device):
        asked.append(device)
        return types.SimpleNamespace(cuda_stream=stream)

    def empty(shape, dtype, device):
        kind, ordinal = device
        assert kind == "cuda"
        return Tensor(np.full(shape, 0, dtype.name if dtype.name != "bfloat16" else _bfloat16()), ordinal)

    def empty_like(x, memory_format):
        assert memory_format == "contiguous"
        return empty(x.shape, x.dtype, ("cuda", x.ordinal))

    names = ("float16", "float32", "float64", "bfloat16", "uint8")
    return types.SimpleNamespace(
        Tensor=Tensor,
        strided="strided",
        is_grad_enabled=lambda: True,
        cuda=types.SimpleNamespace(current_stream=current_stream),
        device=lambda kind, ordinal: (kind, ordinal),
        empty=empty,
        empty_like=empty_like,
        contiguous_format="contiguous",
        from_dlpack=from_dlpack(Tensor),
        asked=asked,
        **{name: Dtype(name) for name in names},
    )


def fake_cupy(stream=0, streams=None):
    """Its stream is the same on all devices, or that which `streams` has for each."""
    return types.SimpleNamespace(
        ndarray=CupyArray,
        empty=lambda shape, dtype: CupyArray(np.zeros(shape, dtype)),
        from_dlpack=from_dlpack(CupyArray),
        cuda=types.SimpleNamespace(
            get_current_stream=lambda device: types.SimpleNamespace(ptr=streams[device] if streams else stream)
        ),
    )


def fake_jax():
    return types.SimpleNamespace(Array=JaxArray, dlpack=types.SimpleNamespace(from_dlpack=from_dlpack(JaxArray)))


def fake_numba_cuda():
    def device_array(shape, dtype, stream=0):
        made = NumbaArray(np.zeros(shape, dtype))
        made.more = {"stream": stream[1] if stream else None}
        return made

    return types.SimpleNamespace(
        device_array=device_array,
        external_stream=lambda handle: ("stream", handle),
        as_cuda_array=lambda exported, sync: NumbaArray.of(exported._array),
    )


def install(monkeypatch, **libraries):
    """Put fakes of libraries in the place of real ones: of PyTorch and CuPy, or of these; and of Numba's own arrays."""
    for name, library in (libraries or {"torch": fake_torch(), "cupy": fake_cupy()}).items():
        monkeypatch.setitem(sys.modules, name, library)
    monkeypatch.setattr(numba, "cuda", fake_numba_cuda(), raising=False)


def _bfloat16():
    import ml_dtypes

    return ml_dtypes.bfloat16


def reference_on(driver):
    """What stands for kernels: the reference backend, which reads the memory of a `HostDriver` as its own."""
    from numba_attention.backends import reference
    from numba_attention.problem.dense import sum_to

    def reduce(x, shape, dtype, empty):
        summed = sum_to(x, shape, dtype)
        made = empty(summed.shape, summed.dtype)
        made[...] = summed
        return made

    def backward(g):
        reference.backward(g)
        for place, x in enumerate(g.mod_args or ()):
            own = g.forward.mod_args[g.mod_grads[place]]
            g.mod_args[place] = g.empty(own.shape, own.dtype)
            g.mod_args[place][...] = x

    return {
        "forward": reference.forward,
        "backward": backward,
        "weights": reference.weights,
        "reduce": reduce,
    }


def merged_by_host(parts, logs, out, lse):
    """What stands for the kernel that merges results."""
    from numba_attention import merging

    with np.errstate(all="ignore"):
        out[...], lse[...], _ = merging._merge(parts, logs)


def merge_differentiated_by_host(grad_out, grad_lse, parts, logs, grad_parts, grad_logs):
    """What stands for the kernel of its gradient."""
    from numba_attention import merging

    found = merging.merge_backward(grad_out, grad_lse, parts, logs)
    for target, x in zip([*grad_parts, *grad_logs], [*found[0], *found[1]], strict=True):
        target[...] = x
