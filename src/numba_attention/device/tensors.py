"""Looks of PyTorch's tensors by machine code, in a tenth of the time that their attributes take in Python.

PyTorch (since 2.10) has functions of C for other libraries, the DLPack exchange API. One describes a tensor: address,
shape, strides, dtype and device.
"""

import ctypes
from array import array
from typing import Any

from ..bounded import BoundedCache
from . import driver

_VERSION = 1  # the major version of DLPack whose tables are read here
LOWEST = 2**32  # no memory of a GPU lies below; a tensor at 0 or a little above is a part of a storage that was freed
_NAME = b"dlpack_exchange_api"
_OLDER = 1  # the word of the table with the address of one of an older version, or 0
_FROM_OBJECT = 5  # the word of the table with dltensor_from_py_object_no_sync, after versions and three functions


class Looks:
    """Describes the tensors of calls.

    Parameters
    ----------
    read : int
        Address of the function that describes a tensor.
    is_neg : callable
        The method of tensors that says whether one is lazily negated.
    """

    def __init__(self, read: int, is_neg: Any) -> None:
        self._read, self._is_neg = read, is_neg
        self._free: list[tuple[array[int], int]] = []  # memory for descriptions that no thread is using
        self._accepted: BoundedCache[tuple[int, int]] = BoundedCache(count=2000)  # number of tensors, and device

    def of(self, kind: type, operands: tuple[Any, ...]) -> tuple[Any, list[int], int | None] | None:
        """Describe tensors of a type, and None; return a key, the addresses of the tensors, and their device.

        The key has type, shape, strides, dtype, device and alignment of each, and which of them begin at one address.
        The device is None for a key that was not accepted so far. None is returned if a tensor requires a gradient, or
        cannot be described.
        """
        code = driver.machine()
        if code is None:
            return None
        try:
            memory, at = self._free.pop()
        except IndexError:
            memory = array("q", bytes(8 * code.room))
            at = memory.buffer_info()[0]
        first = code.operands
        words = code.look(operands, kind, None, False, "requires_grad", self._is_neg, self._read, LOWEST, at)
        key = kind, memory[first : first + words].tobytes()
        number, device = self._accepted.get(key) or (first, None)
        addresses = memory[:number].tolist()
        self._free.append((memory, at))
        return (key, addresses, device) if words > 0 else None

    def accept(self, key: Any, addresses: list[int], of_python: list[int], device: int) -> bool:
        """Note what Python says of tensors with a key: their addresses and device. Whether machine code says so too."""
        agrees = addresses[: len(of_python)] == of_python
        if agrees:
            self._accepted.add(key, (len(of_python), device), 0)
        return agrees


def looks_of(module: Any) -> Looks | None:
    """Return what describes the tensors of PyTorch; None where it has no such functions."""
    capsule = getattr(module.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    try:
        table = pointer(capsule, _NAME)
    except (TypeError, ValueError):  # not such a capsule
        return None
    while table and ctypes.c_uint32.from_address(table).value > _VERSION:
        table = (ctypes.c_void_p * (_OLDER + 1)).from_address(table)[_OLDER]
    if not table or ctypes.c_uint32.from_address(table).value != _VERSION:
        return None
    read = (ctypes.c_void_p * (_FROM_OBJECT + 1)).from_address(table)[_FROM_OBJECT]
    return Looks(read, module.Tensor.is_neg) if read else None
