"""Arrays of other libraries on a device: recognised, described by headers, and made anew for results.

No library is imported for this: an array of one means that its library is there already.
"""

import sys
from functools import cache
from typing import Any

import numpy as np

from ..options import Array
from . import runtime
from .dlpack import CUDA, MANAGED, Exported, of_ml_dtypes, read
from .driver import DEFAULT_STREAM
from .headers import header, held

_NEVER = (np.ndarray, np.generic, int, float, list, tuple, str)


def on_device(x: Any) -> bool:
    """Whether something is an array on a GPU."""
    if x is None or isinstance(x, _NEVER):
        return False
    of_torch = getattr(x, "is_cuda", None)  # whose interface costs more, and refuses what requires a gradient
    if isinstance(of_torch, bool):
        return of_torch
    try:
        if hasattr(x, "__cuda_array_interface__"):
            return True
        return x.__dlpack_device__()[0] in (CUDA, MANAGED)
    except Exception:  # whatever has no device is not on one
        return False


def take(x: Any, stream: int | None = None) -> Array:
    """Make the header of an array on a device, for work on `stream` (by default that of the call)."""
    return family_of(x).take(x, runtime.stream() if stream is None else stream)


def to_host(x: Any) -> Any:
    """Copy an array on a device to the host, and wait for it; anything else stays as it is."""
    if not on_device(x):
        return x
    family = family_of(x)
    device = family.ordinal(x)
    stream = family.stream(x, device) or DEFAULT_STREAM
    with runtime.using(device, stream):
        found = family.take(x, stream)
        out = np.empty(found.shape, found.dtype)
        runtime.download(found, out, stream)
    return out


class Family:
    """Arrays of one library. This one is any that says where its memory is by the common protocols.

    Its results are device arrays of Numba, which understand both.
    """

    name = "an object with __cuda_array_interface__ or __dlpack__"
    has_pool = False  # whether memory that `new` takes and gives back costs less than the driver's
    one_stream = False  # whether all arrays of the library are worked on in one stream at a time

    def ordinal(self, x: Any) -> int:
        """The GPU that an array is on."""
        try:
            return int(x.__dlpack_device__()[1])
        except Exception:  # not every one that has the interface has this
            address = _interface(x)["data"][0]
            return runtime.driver.ordinal_of(address) if address else runtime.driver.current()

    def stream(self, x: Any, device: int) -> int | None:
        """The stream that an array is written on; None where its library says nothing of it."""
        try:
            return _interface(x).get("stream") or None
        except Exception:
            return None

    def take(self, x: Any, stream: int) -> Array:
        """Describe an array; work on `stream` finds it written."""
        try:
            interface = _interface(x)
        except Exception:
            interface = {}
        typestr = interface.get("typestr", "V")
        if "V" in typestr:  # bfloat16 is among those that the interface has no letter for
            return read(x.__dlpack__(stream=stream), x)
        if interface.get("mask") is not None:
            raise TypeError("a masked array on a GPU cannot be taken; pass what may be attended to as mask=")
        address, readonly = interface["data"]
        shape, strides = tuple(interface["shape"]), interface.get("strides")
        strides = None if strides is None else tuple(strides)
        return header(address or 0, shape, strides, np.dtype(typestr), x, self.ordinal(x), readonly)

    def look(self, x: Any) -> tuple[Any, int] | None:
        """All that a call follows from, of an array, as a key, and its address; None where that is not so simple."""
        return None

    def new(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: int, stream: int) -> tuple[Any, int]:
        """Make an array for a result, and say where it is."""
        from numba import cuda

        # The array then tells whoever takes it next on which stream it is written.
        of_numba = 0 if stream == DEFAULT_STREAM else cuda.external_stream(stream)
        made = cuda.device_array(shape, dtype, stream=of_numba)
        return made, made.__cuda_array_interface__["data"][0]

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: int, stream: int) -> Array:
        """Make room for a result; the header of an array of this library, or of memory of ours."""
        made, address = self.new(shape, dtype, device, stream)
        return header(address, shape, None, dtype, made, device)

    def owns(self, x: Any) -> bool:
        """Whether `empty` may have made an array."""
        return bool(getattr(x, "__cuda_ndarray__", False))

    def give(self, array: Array, stream: int) -> Any:
        """Turn the header of a result into an array of this library."""
        found = held(array)
        if found is not None and self.owns(found.owner) and found.owner.size == array.size:
            return found.owner if tuple(found.owner.shape) == array.shape else found.owner.reshape(array.shape)
        return self.adopt(Exported(array), stream)

    def adopt(self, exported: Exported, stream: int) -> Any:
        """Make an array of memory of ours."""
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
    """A library that makes its own results."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def adopt(self, exported: Exported, stream: int) -> Any:
        return self.module.from_dlpack(exported)


class TorchFamily(LibraryFamily):
    """Tensors of PyTorch, read without its protocols: those refuse tensors with gradients, and cost more."""

    name = "torch"
    has_pool = one_stream = True

    def ordinal(self, x: Any) -> int:
        return int(x.device.index or 0)

    def stream(self, x: Any, device: int) -> int | None:
        return self.module.cuda.current_stream(device).cuda_stream or DEFAULT_STREAM

    def take(self, x: Any, stream: int) -> Array:
        if x.requires_grad and self.module.is_grad_enabled():
            raise TypeError(
                "a tensor that requires a gradient would lose it here; pass x.detach(), and call attention_backward"
            )
        if x.layout != self.module.strided:
            raise TypeError(f"a tensor of layout {x.layout} cannot be taken; pass x.to_dense()")
        lazy = x.is_conj() or x.is_neg()
        if lazy:  # what it holds is still to be negated: a copy, to which no result may go
            x = x.resolve_conj().resolve_neg()
        dtype = self.dtype(x.dtype)
        strides = tuple(n * dtype.itemsize for n in x.stride())
        return header(x.data_ptr(), tuple(x.shape), strides, dtype, x, self.ordinal(x), lazy)

    def dtype(self, of_torch: Any) -> np.dtype[Any]:
        """The same dtype in NumPy."""
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
        if x.requires_grad or x.layout != self.module.strided or x.is_conj() or x.is_neg():
            return None
        return (x.shape, x.stride(), x.dtype, x.device.index or 0, None), x.data_ptr()

    def new(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: int, stream: int) -> tuple[Any, int]:
        torch = self.module
        made = torch.empty(shape, dtype=getattr(torch, _name(dtype)), device=torch.device("cuda", device))
        return made, made.data_ptr()

    def owns(self, x: Any) -> bool:
        return isinstance(x, self.module.Tensor)

    def give(self, array: Array, stream: int) -> Any:
        found = held(array)
        if found is not None and self.owns(found.owner) and found.owner.numel() == array.size:
            return found.owner.reshape(array.shape)
        return self.adopt(Exported(array), stream)


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

    def new(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: int, stream: int) -> tuple[Any, int]:
        made = self.module.empty(shape, dtype)
        return made, made.data.ptr

    def owns(self, x: Any) -> bool:
        return isinstance(x, self.module.ndarray)


class JaxFamily(LibraryFamily):
    """Arrays of JAX, which runs on streams that it does not show: both sides wait for one another."""

    name = "jax"

    def stream(self, x: Any, device: int) -> int | None:
        return None

    def take(self, x: Any, stream: int) -> Array:
        x.block_until_ready()
        array = read(x.__dlpack__(stream=stream), x)
        array.flags.writeable = False  # as all arrays of JAX
        return array

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: int, stream: int) -> Array:
        return runtime.empty(shape, dtype, stream)

    def owns(self, x: Any) -> bool:
        return False

    def adopt(self, exported: Exported, stream: int) -> Any:
        runtime.driver.synchronize(stream)
        return self.module.dlpack.from_dlpack(exported)


class HostFamily(Family):
    """Arrays of NumPy, whose results are copied back."""

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
    """The family of an array; `HOST` for all that is not an array on a device."""
    if isinstance(x, np.ndarray):
        return HOST
    torch: Any = sys.modules.get("torch")
    tensors: Any = getattr(torch, "Tensor", ())  # without it torch is being imported by another thread
    if isinstance(x, tensors):
        return TorchFamily(torch) if x.is_cuda else HOST
    if not on_device(x):
        return HOST
    for name, kind, family in _LIBRARIES:
        module = sys.modules.get(name)
        found = getattr(module, kind, None)
        if found is not None and isinstance(x, found):
            return family(module)
    return _NUMBA if getattr(x, "__cuda_ndarray__", False) else _ANY


@cache  # 2 us at every look
def _name(dtype: np.dtype[Any]) -> str:
    return dtype.name


def _interface(x: Any) -> dict[str, Any]:
    found: dict[str, Any] = x.__cuda_array_interface__
    return found
