"""Arrays of other libraries on a GPU: recognising them, describing them by headers, and allocating results.

No library is imported here: whoever passes an array of a library has imported it.
"""

import sys
from typing import Any

import numpy as np

from ..bounded import BoundedCache
from ..errors import BackendUnavailableError
from ..options import Array
from . import runtime, tensors
from .dlpack import CUDA, MANAGED, Exported, of_ml_dtypes, read
from .driver import DEFAULT_STREAM
from .headers import header, held

# Addresses on a GPU are larger. A tensor whose storage was freed has the distance from it for its address.
LOWEST = tensors.LOWEST
_NEVER = (np.ndarray, np.generic, int, float, list, tuple, str)


def on_device(x: Any) -> bool:
    """Whether x is an array on a GPU."""
    if x is None or isinstance(x, _NEVER):
        return False
    # PyTorch's interface is slower than this attribute, and refuses tensors that require gradients.
    of_torch = getattr(x, "is_cuda", None)
    if isinstance(of_torch, bool):
        return of_torch
    try:
        if hasattr(x, "__cuda_array_interface__"):
            return True
        return x.__dlpack_device__()[0] in (CUDA, MANAGED)
    except Exception:  # x has no device
        return False


def take(x: Any, stream: int | None = None) -> Array:
    """Make the header of an array on a GPU, for work on `stream` (by default that of the present call)."""
    return family_of(x).take(x, runtime.stream() if stream is None else stream)


def to_host(x: Any) -> Any:
    """Copy an array on a GPU to the host, and wait for it; return anything else as it is."""
    if not on_device(x):
        return x
    family = family_of(x)
    device = family.ordinal(x)
    stream = family.stream(x, device) or DEFAULT_STREAM
    with runtime.using(device, stream):
        headed = family.take(x, stream)
        out = np.empty(headed.shape, headed.dtype)
        runtime.download(headed, out, stream)
    return out


class Family:
    """How to use the arrays of one library. This base class is for any library that supports the common protocols.

    Its results are device arrays of Numba, which support ``__cuda_array_interface__`` and DLPack.
    """

    name = "an object with __cuda_array_interface__ or __dlpack__"
    has_pool = False  # whether the library has a memory pool, so that `new` is faster than the driver
    on_current = True  # whether `new` allocates on the current GPU
    one_stream = False  # whether the library uses one current stream for all of its arrays

    def ordinal(self, x: Any) -> int:
        """Return the number of the GPU that an array is on."""
        try:
            return int(x.__dlpack_device__()[1])
        except Exception:  # not every array with the interface has DLPack
            address = _interface(x)["data"][0]
            return runtime.driver.ordinal_of(address) if address else runtime.driver.current()

    def stream(self, x: Any, device: int) -> int | None:
        """Return the stream on which an array is written; None if its library does not tell."""
        try:
            return _interface(x).get("stream") or None
        except Exception:
            return None

    def take(self, x: Any, stream: int) -> Array:
        """Make the header of an array; work on `stream` waits until the array is written."""
        try:
            interface = _interface(x)
        except Exception:
            interface = {}
        typestr = interface.get("typestr", "V")
        if "V" in typestr:  # dtypes without a letter in the interface, such as bfloat16
            return read(x.__dlpack__(stream=stream), x)
        if interface.get("mask") is not None:
            raise TypeError("a masked array on a GPU cannot be taken; pass what may be attended to as mask=")
        address, readonly = interface["data"]
        shape, strides = tuple(interface["shape"]), interface.get("strides")
        strides = None if strides is None else tuple(strides)
        return header(address or 0, shape, strides, np.dtype(typestr), x, self.ordinal(x), readonly)

    def look(self, x: Any) -> tuple[Any, int] | None:
        """Return the key and the address of an array for `replay`; None if a call with it is not repeated."""
        return None

    def new(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: int, stream: int) -> tuple[Any, int]:
        """Allocate an array for a result; return it and its address."""
        return self.make(self.kind(shape, dtype, device), stream)

    def kind(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: int) -> Any:
        """Return what `make` makes arrays of this kind from."""
        return shape, dtype

    def make(self, kind: Any, stream: int) -> tuple[Any, int]:
        """Allocate an array of a kind; return it and its address."""
        from numba import cuda

        # The array stores its stream, so that the next library that takes it can wait for that stream.
        of_numba = 0 if stream == DEFAULT_STREAM else cuda.external_stream(stream)
        array = cuda.device_array(*kind, stream=of_numba)
        return array, array.__cuda_array_interface__["data"][0]

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: int, stream: int) -> Array:
        """Allocate a result; return the header of an array of this library, or of memory of this package."""
        array, address = self.new(shape, dtype, device, stream)
        return header(address, shape, None, dtype, array, device)

    def owns(self, x: Any) -> bool:
        """Whether x is of the kind that `empty` allocates."""
        return bool(getattr(x, "__cuda_ndarray__", False))

    def give(self, array: Array, stream: int) -> Any:
        """Return the array of this library for the header of a result."""
        memory = held(array)
        if memory is not None and self.owns(memory.owner) and memory.owner.size == array.size:
            return memory.owner if tuple(memory.owner.shape) == array.shape else memory.owner.reshape(array.shape)
        return self.adopt(Exported(array), stream)

    def adopt(self, exported: Exported, stream: int) -> Any:
        """Make an array of this library from memory of this package."""
        from numba import cuda

        return cuda.as_cuda_array(exported, sync=False)


class NumbaFamily(Family):
    """Device arrays of numba.cuda."""

    name = "numba.cuda"

    def take(self, x: Any, stream: int) -> Array:
        return header(x.__cuda_array_interface__["data"][0], x.shape, x.strides, np.dtype(x.dtype), x, self.ordinal(x))

    def look(self, x: Any) -> tuple[Any, int] | None:
        interface = x.__cuda_array_interface__
        return (x.shape, x.strides, x.dtype, self.ordinal(x), interface.get("stream")), interface["data"][0]


class LibraryFamily(Family):
    """A library that allocates results itself."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def adopt(self, exported: Exported, stream: int) -> Any:
        return self.module.from_dlpack(exported)


class TorchFamily(LibraryFamily):
    """Tensors of PyTorch, read without the protocols, which are slower and refuse tensors that require gradients."""

    name = "torch"
    has_pool = one_stream = True
    on_current = False

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        # Making the object of a stream takes several us. Compilers of PyTorch use this function too.
        self._raw_stream = getattr(getattr(module, "_C", None), "_cuda_getCurrentRawStream", None)
        self._strided = module.strided
        self._contiguous = module.contiguous_format
        self._empty_like = module.empty_like
        self.looks = tensors.looks_of(module)
        self._forward_mode: Any = getattr(getattr(module, "autograd", None), "forward_ad", None)
        # One number, expanded, for each kind of result: `empty_like` takes 1.8 us, and `empty`, which reads dtype and
        # device among its arguments, 3.1.
        self._kinds: BoundedCache[Any] = BoundedCache(count=256)

    def has_tangents(self) -> bool:
        """Whether tensors may have tangents now, for derivatives in forward mode."""
        return getattr(self._forward_mode, "_current_level", -1) >= 0

    def ordinal(self, x: Any) -> int:
        return int(x.device.index or 0)

    def stream(self, x: Any, device: int) -> int | None:
        raw = self._raw_stream
        handle = self.module.cuda.current_stream(device).cuda_stream if raw is None else raw(device)
        return handle or DEFAULT_STREAM

    def take(self, x: Any, stream: int) -> Array:
        if x.requires_grad and self.module.is_grad_enabled():
            raise TypeError(
                "a tensor that requires a gradient would lose it here; pass x.detach(), and call attention_backward"
            )
        if self.has_tangents() and self._forward_mode.unpack_dual(x).tangent is not None:
            raise TypeError("a tensor with a tangent would lose it here, as nothing is differentiated in forward mode")
        if x.layout != self.module.strided:
            raise TypeError(f"a tensor of layout {x.layout} cannot be taken; pass x.to_dense()")
        if getattr(x, "is_nested", False):
            raise TypeError("a nested tensor cannot be taken; pass x.to_padded_tensor(0.0), or packed sequences")
        lazy = x.is_conj() or x.is_neg()
        if lazy:  # lazily conjugated or negated: reading it makes a copy, which is no place for a result
            x = x.resolve_conj().resolve_neg()
        dtype = self.dtype(x.dtype)
        strides = tuple(n * dtype.itemsize for n in x.stride())
        return header(_memory_of(x), tuple(x.shape), strides, dtype, x, self.ordinal(x), lazy)

    def dtype(self, of_torch: Any) -> np.dtype[Any]:
        """Return the same dtype in NumPy."""
        name = str(of_torch).rpartition(".")[2]
        if name in ("bfloat16", "float8_e4m3fn"):
            return of_ml_dtypes(name)
        try:
            return np.dtype(name)
        except TypeError:
            raise TypeError(
                f"a tensor of dtype {of_torch} cannot be taken; convert it with x.to(torch.float32)"
            ) from None

    def look(self, x: Any) -> tuple[Any, int] | None:
        if x.requires_grad or not x.is_cuda or x.layout is not self._strided or x.is_neg() or self.has_tangents():
            return None  # lazily conjugated numbers are complex, for which there are no kernels
        try:
            return (x.shape, x.stride(), x.dtype, x.get_device(), None), _memory_of(x)
        except (TypeError, RuntimeError):  # no memory, or a nested tensor
            return None

    def kind(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: int) -> Any:
        kind = self._kinds.get((shape, dtype, device))
        if kind is None:
            module = self.module
            one = module.empty((), dtype=getattr(module, dtype.name), device=module.device("cuda", device))
            _address_of_new(one)  # otherwise every later call would fail, as in this mode of PyTorch
            kind = one.expand(shape)
            self._kinds.add((shape, dtype, device), kind, 0)
        return kind

    def make(self, kind: Any, stream: int) -> tuple[Any, int]:
        tensor = self._empty_like(kind, memory_format=self._contiguous)
        return tensor, _address_of_new(tensor)

    def owns(self, x: Any) -> bool:
        return isinstance(x, self.module.Tensor)

    def give(self, array: Array, stream: int) -> Any:
        memory = held(array)
        if memory is not None and self.owns(memory.owner) and memory.owner.numel() == array.size:
            return memory.owner.reshape(array.shape)
        return self.adopt(Exported(array), stream)


def _memory_of(tensor: Any) -> int:
    """Return the address of a tensor; raise TypeError if it has elements and no memory."""
    try:
        address = int(tensor.data_ptr())
        if address >= LOWEST or not tensor.numel() or tensor.untyped_storage().data_ptr():
            return address
    except RuntimeError:  # what torch.func wraps
        pass
    raise TypeError(
        f"a {type(tensor).__name__} without memory cannot be taken, as there are in transforms of torch.func, in "
        "FakeTensorMode, and where a storage was freed"
    )


def _address_of_new(tensor: Any) -> int:
    """Return the address of a tensor that was made for a result."""
    try:
        address = int(tensor.data_ptr())
        if address or not tensor.numel():
            return address
    except RuntimeError:
        pass
    raise BackendUnavailableError(
        "PyTorch makes no memory for results here, as in transforms of torch.func and in FakeTensorMode; call this "
        "outside of them"
    )


class CupyFamily(LibraryFamily):
    """Arrays of CuPy."""

    name = "cupy"
    has_pool = one_stream = True

    def ordinal(self, x: Any) -> int:
        return int(x.device.id)

    def stream(self, x: Any, device: int) -> int | None:
        return self.module.cuda.get_current_stream(device).ptr or DEFAULT_STREAM

    def take(self, x: Any, stream: int) -> Array:
        return header(x.data.ptr, x.shape, x.strides, np.dtype(x.dtype), x, self.ordinal(x))

    def look(self, x: Any) -> tuple[Any, int] | None:
        return (x.shape, x.strides, x.dtype, x.device.id, None), x.data.ptr

    def make(self, kind: Any, stream: int) -> tuple[Any, int]:
        array = self.module.empty(*kind)
        return array, array.data.ptr

    def owns(self, x: Any) -> bool:
        return isinstance(x, self.module.ndarray)


class JaxFamily(LibraryFamily):
    """Arrays of JAX, which does not show its streams, so each side waits for the other."""

    name = "jax"

    def stream(self, x: Any, device: int) -> int | None:
        return None

    def take(self, x: Any, stream: int) -> Array:
        x.block_until_ready()
        array = read(x.__dlpack__(stream=stream), x)
        array.flags.writeable = False  # like all arrays of JAX
        return array

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: int, stream: int) -> Array:
        return runtime.empty(shape, dtype, stream)

    def owns(self, x: Any) -> bool:
        return False

    def adopt(self, exported: Exported, stream: int) -> Any:
        runtime.driver.synchronize(stream)
        return self.module.dlpack.from_dlpack(exported)


class HostFamily(Family):
    """Arrays of NumPy: inputs are copied to the GPU, and results back."""

    name = "numpy"

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: int, stream: int) -> Array:
        return runtime.empty(shape, dtype, stream)

    def give(self, array: Array, stream: int) -> Any:
        out = np.empty(array.shape, array.dtype)
        runtime.download(array, out, stream)
        return out


_ANY, _NUMBA, HOST = Family(), NumbaFamily(), HostFamily()
_LIBRARIES = (("cupy", "ndarray", CupyFamily), ("jax", "Array", JaxFamily))


def family_of(x: Any) -> Family:
    """Return the family of an array; `HOST` for anything that is not an array on a GPU."""
    if isinstance(x, np.ndarray):
        return HOST
    torch: Any = sys.modules.get("torch")
    tensors: Any = getattr(torch, "Tensor", ())  # missing while another thread imports torch
    if isinstance(x, tensors):
        return _of_torch(torch) if x.is_cuda else HOST
    if not on_device(x):
        return HOST
    for name, kind, family in _LIBRARIES:
        module = sys.modules.get(name)
        array_type = getattr(module, kind, None)
        if array_type is not None and isinstance(x, array_type):
            return family(module)
    return _NUMBA if getattr(x, "__cuda_ndarray__", False) else _ANY


def _of_torch(module: Any) -> TorchFamily:
    """Return the family of PyTorch, made once."""
    global _torch
    if _torch is None or _torch.module is not module:
        _torch = TorchFamily(module)
    return _torch


_torch: TorchFamily | None = None


def looks_of(kind: type) -> tuple[Family, tensors.Looks] | None:
    """Return the family of tensors of a type and what describes them; None for other types."""
    family = _torch
    if family is None:
        module = sys.modules.get("torch")
        if not issubclass(kind, getattr(module, "Tensor", ())):
            return None
        family = _of_torch(module)
    if family.looks is None or not issubclass(kind, family.module.Tensor) or family.has_tangents():
        return None
    return family, family.looks


def _interface(x: Any) -> dict[str, Any]:
    interface: dict[str, Any] = x.__cuda_array_interface__
    return interface
