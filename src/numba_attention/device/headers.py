"""Device memory, described as NumPy describes memory: shape, strides, dtype and address, and nobody may look inside.

The rest of the package asks an array for nothing else until a backend runs, and slices, transposes and broadcasts it
with NumPy's own functions. So an array on a device is an `ndarray` whose address is one of the device: a *header*. To
read or write its elements on the host would end the process.
"""

import math
from typing import Any

import numpy as np

from ..options import Array

_NOWHERE = 256  # an array without elements needs an address that is not 0, for which NumPy would take memory itself


class Held:
    """What a header stands on: keeps the owner of the memory alive, and knows the device that it is on."""

    __slots__ = ("__array_interface__", "__weakref__", "device", "owner")

    def __init__(self, interface: dict[str, Any], owner: Any, device: int) -> None:
        self.__array_interface__ = interface
        self.owner = owner
        self.device = device


def header(
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    dtype: np.dtype[Any],
    owner: Any,
    device: int,
    readonly: bool = False,
) -> Array:
    """Describe memory of a device; `strides` are in bytes, None if the array is contiguous."""
    interface = {
        "version": 3,
        "shape": shape,
        "typestr": dtype.str,
        "data": (address if math.prod(shape) else _NOWHERE, readonly),
        "strides": strides,
    }
    array = np.asarray(Held(interface, owner, device))
    return array if array.dtype == dtype else array.view(dtype)  # bfloat16, which the interface has no letter for


def held(array: Any) -> Held | None:
    """What a header, or any view of one, stands on; None for memory of the host."""
    base = array.base
    while isinstance(base, np.ndarray):
        base = base.base
    return base if type(base) is Held else None


def address_of(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def stored(array: Array) -> Array:
    """What is in memory of a broadcast array: one element of every axis that only repeats it."""
    # (The ellipsis: without it an array that has no axes would be read, to make a scalar.)
    return array[(*(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides), ...)]


def extent(array: Array) -> tuple[int, int]:
    """The first byte that an array has elements in, relative to its address, and the byte after the last."""
    if not array.size:
        return 0, 0
    spans = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    return sum(min(span, 0) for span in spans), sum(max(span, 0) for span in spans) + array.itemsize
