"""What kernels read of NumPy's arrays: their headers, at the address of the object.

The header is `PyArrayObject_fields` of NumPy's C API, on which every extension module depends that was compiled against
NumPy. Reading an address there takes some ns, and asking an array for `ctypes.data` or `__array_interface__` 1 us.
"""

import ctypes

import numpy as np

from .machine_code import part
from .simd import void_pointer
from .views import carray

HEAD = object.__basicsize__ // 8  # words of a PyObject, of which the last is the type
TYPE = HEAD - 1
DATA, ND, DIMS, STRIDES, _BASE, DESCR, FLAGS = range(HEAD, HEAD + 7)  # of `ND` and `FLAGS` the lower 32 bits
ALIGNED = 0x100  # NPY_ARRAY_ALIGNED


@part
def data_of(array: int) -> int:
    """The address of the first element of the array whose object is at an address."""
    return int(carray(void_pointer(array), DATA + 1, np.int64)[DATA])


def headers_are_known() -> bool:
    """Whether arrays have the header that kernels read."""
    array = np.arange(6.0).reshape(2, 3).T[1:]
    words = (ctypes.c_int64 * (FLAGS + 1)).from_address(id(array))
    if (words[TYPE], words[DATA], words[ND] & 0xFFFFFFFF) != (id(np.ndarray), array.ctypes.data, 2):
        return False
    shape, strides = (tuple((ctypes.c_int64 * 2).from_address(words[at])) for at in (DIMS, STRIDES))
    return (
        (shape, strides) == (array.shape, array.strides)
        and words[DESCR] == id(array.dtype)
        and bool(words[FLAGS] & ALIGNED) == array.flags.aligned
    )
