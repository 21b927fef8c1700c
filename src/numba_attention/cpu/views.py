"""Arrays over memory at an address, inside kernels.

`numba.carray` is an overload in Python: Numba runs its whole compiler on it once for each dtype and shape, eleven times
in the forward kernel, and what it returns needs Numba's reference counts. As an intrinsic it costs neither: 0.25 s less
to compile the forward kernel.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.npydecl import parse_dtype
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

from .simd import I64, Builder, Value


def _array(context: Any, builder: Builder, ty: Any, data: Value, shape: list[Value]) -> Value:
    """A C-contiguous array value that owns nothing."""
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


def table_of(count: int) -> Any:
    """Make ``table(address)``: the `count` int64 that begin there."""

    @intrinsic
    def table(typing_context: Any, address: Any) -> Any:
        ty = types.Array(types.int64, 1, "C")

        def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
            return _array(context, builder, ty, builder.inttoptr(args[0], ir.IntType(8).as_pointer()), [I64(count)])

        return ty(types.int64), codegen

    return table
