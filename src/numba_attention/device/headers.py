"""Headers: NumPy arrays that describe GPU memory by shape, strides, dtype and address, and must not be read.

Until a backend runs, the package uses no other properties of an array, and slices, transposes and broadcasts it with
NumPy's own functions. So an array on a GPU is represented by an `ndarray` whose address is one of the GPU, a *header*.
Reading or writing its elements on the host would end the process.
"""

import math
from typing import Any

import numpy as np

from ..options import Array

_OF_OTHERS = 2  # `dtype.isbuiltin` of a dtype that another package registered, such as ml_dtypes
_NOWHERE = 256  # address of arrays without elements: for 0, NumPy would allocate memory itself


class Held:
    """The base of a header, which keeps the owner of the memory alive and stores its device."""

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
    """Make the header of GPU memory; `strides` are in bytes, or None if the array is contiguous."""
    interface = {
        "version": 3,
        "shape": shape,
        # Other packages' dtypes have names there that NumPy does not read, as "<f1" for float8_e5m2.
        "typestr": f"|V{dtype.itemsize}" if dtype.isbuiltin == _OF_OTHERS else dtype.str,
        "data": (address if math.prod(shape) else _NOWHERE, readonly),
        "strides": strides,
    }
    array = np.asarray(Held(interface, owner, device))
    return array if array.dtype == dtype else array.view(dtype)


def held(array: Any) -> Held | None:
    """Return the base of a header or of a view of one; None for an array on the host."""
    base = array.base
    while isinstance(base, np.ndarray):
        base = base.base
    return base if type(base) is Held else None


def strided(array: Array, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """Make the header of the memory of another with other strides, from the same address on."""
    base = held(array)
    assert base is not None
    return header(address_of(array), shape, strides, array.dtype, base.owner, base.device, not array.flags.writeable)


def address_of(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def has_whole_words(array: Array, size: int) -> bool:
    """Return whether rows have no gaps, and are whole words of so many bytes, at multiples of that size."""
    if array.strides[-1] != array.itemsize or array.shape[-1] * array.itemsize % size:
        return False
    return not any(n % size for n in (address_of(array), *array.strides[:-1]))


def stored(array: Array) -> Array:
    """Return the part of a broadcast array that is in memory: one element of every axis with stride 0."""
    # The ellipsis keeps an array without axes an array. NumPy would otherwise read its element to make a scalar.
    return array[(*(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides), ...)]


def extent(array: Array) -> tuple[int, int]:
    """Return the first byte that an array occupies, relative to its address, and the byte after the last."""
    if not array.size:
        return 0, 0
    spans = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    return sum(min(span, 0) for span in spans), sum(max(span, 0) for span in spans) + array.itemsize
