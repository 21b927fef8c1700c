"""Arrays over memory at an address, inside kernels.

`numba.carray` is an overload in Python: Numba runs its whole compiler on it once for each dtype and shape, eleven times
in the forward kernel, and what it returns needs Numba's reference counts. As an intrinsic it costs neither: 0.25 s less
to compile the forward kernel.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.core.typing.npydecl import parse_dtype
from numba.extending import intrinsic
from numba.np.numpy_support import from_dtype

from .simd import I64, Builder, Value

UNBOUNDED = 2**62  # the length of an array of which only the beginning is known


def _array(context: Any, builder: Builder, ty: Any, data: Value, shape: list[Value]) -> Value:
    """A C-contiguous array value that owns nothing."""
    from numba.np.arrayobj import make_array, populate_array  # 15 ms, which loaded kernels do without

    array = make_array(ty)(context, builder)
    itemsize = I64(context.get_abi_sizeof(context.get_data_type(ty.dtype)))
    strides = [itemsize]
    for n in shape[:0:-1]:
        strides.insert(0, builder.mul(strides[0], n))
    data = builder.bitcast(data, array.data.type)
    populate_array(array, data=data, shape=shape, strides=strides, itemsize=itemsize, meminfo=None)
    return array._getvalue()


@intrinsic
def carray(typing_context: Any, pointer: Any, shape: Any, dtype: Any) -> Any:
    """The array of this shape (an integer or a tuple) and dtype at a pointer, as `numba.carray`."""
    ndim = 1 if isinstance(shape, types.Integer) else len(shape)
    ty = types.Array(parse_dtype(dtype), ndim, "C")
    shape_type = types.int64 if ndim == 1 else types.UniTuple(types.int64, ndim)

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        sizes = [args[1]] if ndim == 1 else cgutils.unpack_tuple(builder, args[1], ndim)
        return _array(context, builder, ty, args[0], sizes)

    return ty(types.voidptr, shape_type, dtype), codegen


@cache
def view_of(field: str, shape: tuple[int, ...], kind: Any) -> Any:
    """Make ``view(p, at)``: the array that begins as many bytes after the address `at` as a field of the record p says.

    Parameters
    ----------
    field : str
    shape : tuple of int
    kind : NumPy scalar type
    """
    ty = types.Array(from_dtype(np.dtype(kind)), len(shape), "C")

    @intrinsic
    def view(typing_context: Any, p: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
            member = cgutils.get_record_member(builder, args[0], p.offset(field), I64)
            offset = context.unpack_value(builder, types.int64, member, None if p.aligned else 1)
            data = builder.inttoptr(builder.add(args[1], offset), cgutils.voidptr_t)
            return _array(context, builder, ty, data, [I64(n) for n in shape])

        return ty(p, types.int64), codegen

    return view
