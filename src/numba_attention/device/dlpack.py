"""Reading and writing DLPack, the protocol by which libraries exchange arrays, and the only one with bfloat16.

This uses a few ctypes structures and not the reader of cuda.core (`StridedMemoryView`), which takes a third of a second
to import, needs the driver even to describe an array, and is not installed where only an error message is needed.
"""

import ctypes
from typing import Any

import numpy as np

from ..options import Array
from .headers import address_of, header, held

CUDA, MANAGED = 2, 13  # kDLCUDA, kDLCUDAManaged: the kinds of GPU memory
_KINDS = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}
_OF_ML_DTYPES = {(4, 16): "bfloat16", (10, 8): "float8_e4m3fn"}  # by code and bits


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("ordinal", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("type", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # in elements; null if contiguous
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_NAME = b"dltensor"  # name of a capsule that no library has consumed
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def read(capsule: Any, owner: Any) -> Array:
    """Make the header of what ``owner.__dlpack__()`` returned.

    The capsule is kept and not marked as consumed: when the header is deleted, it calls the producer's deleter.
    """
    tensor = _Managed.from_address(_pointer_of(capsule, _NAME)).tensor
    dtype = _dtype_of(tensor.type)
    shape = tuple(tensor.shape[n] for n in range(tensor.ndim))
    strides = tuple(tensor.strides[n] * dtype.itemsize for n in range(tensor.ndim)) if tensor.strides else None
    address = (tensor.data or 0) + tensor.byte_offset
    return header(address, shape, strides, dtype, (owner, capsule), tensor.device.ordinal)


def _dtype_of(element: _Type) -> np.dtype[Any]:
    if element.lanes == 1:
        if (element.code, element.bits) in _OF_ML_DTYPES:
            return of_ml_dtypes(_OF_ML_DTYPES[element.code, element.bits])
        kind = _KINDS.get(element.code)
        if kind == "b" and element.bits == 8:
            return np.dtype(np.bool_)
        if kind is not None and element.bits in (8, 16, 32, 64, 128):
            try:
                return np.dtype(f"{kind}{element.bits // 8}")
            except TypeError:
                pass
    raise TypeError(
        f"an array of DLPack type code {element.code}, {element.bits} bits, {element.lanes} lanes cannot be taken"
    )


def of_ml_dtypes(name: str) -> np.dtype[Any]:
    """Return the dtype of ml_dtypes with a name that NumPy does not have."""
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(
            f"{name} arrays need ml_dtypes; install it with: pip install 'numba-attention[bfloat16]'"
        ) from None
    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return dtype


class Exported:
    """The memory of a header, exported to other libraries by DLPack and ``__cuda_array_interface__``."""

    def __init__(self, array: Array) -> None:
        self._array = array
        base = held(array)
        self._device = 0 if base is None else base.device

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        array = self._array
        return {
            "version": 3,
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (address_of(array) if array.size else 0, False),
            "strides": None if array.flags.c_contiguous else array.strides,
            "stream": None,  # it is used on the stream on which it was written
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self._device

    def __dlpack__(self, **_: Any) -> Any:
        """Export the memory in the oldest form of the protocol, which every library accepts."""
        array = self._array
        sizes = (ctypes.c_int64 * (2 * array.ndim))(*array.shape, *(n // array.itemsize for n in array.strides))
        first = ctypes.addressof(sizes)
        managed = _Managed()
        tensor = managed.tensor
        tensor.data = address_of(array) if array.size else None
        tensor.device, tensor.ndim = _Device(CUDA, self._device), array.ndim
        tensor.type = _type_of(array.dtype)
        tensor.shape = ctypes.cast(first, ctypes.POINTER(ctypes.c_int64))
        tensor.strides = ctypes.cast(first + 8 * array.ndim, ctypes.POINTER(ctypes.c_int64))
        managed.deleter = ctypes.cast(_delete, ctypes.c_void_p).value
        address = ctypes.addressof(managed)
        _lent[address] = managed, sizes, array
        return _new_capsule(address, _NAME, ctypes.cast(_destroy, ctypes.c_void_p))


def _type_of(dtype: np.dtype[Any]) -> _Type:
    codes = {kind: code for code, kind in _KINDS.items()} | {name: code for (code, _), name in _OF_ML_DTYPES.items()}
    return _Type(codes.get(dtype.name) or codes[dtype.kind], 8 * dtype.itemsize, 1)


_lent: dict[int, Any] = {}  # exported memory, by the address of its description
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
# A capsule that is being destroyed is passed as an address, because ctypes would change its reference count.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer_at = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _delete(address: int) -> None:
    _lent.pop(address, None)


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _destroy(capsule: int) -> None:
    if _is_valid(capsule, _NAME):  # otherwise a library consumed it, and calls the deleter
        _lent.pop(_pointer_at(capsule, _NAME), None)
