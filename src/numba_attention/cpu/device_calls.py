"""What the host does in repeated calls on a GPU, in machine code: it reads tensors, and launches kernels.

Functions of C are called by their addresses: one of PyTorch that describes a tensor (of its DLPack exchange API), and
those of the CUDA driver.
"""

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .builtin import exception_named
from .cache import Function
from .machine_code import part
from .objects import TYPE
from .simd import I8, I32, I64, Builder, Value, call, void_pointer
from .views import UNBOUNDED, carray

POINTER = I8.as_pointer()
OPERANDS = 16  # most arrays of a call
AXES = 8  # most axes of an array
TENSOR = 3 + 2 * AXES  # most words of a tensor: device, dtype and number of axes, alignment, shape, strides
WORDS = OPERANDS * (1 + TENSOR)  # of all addresses, then of all tensors
DATA, DEVICE, DTYPE, SHAPE, STRIDES, OFFSET = range(6)  # words of a DLTensor
ROOM = WORDS + 8

# A record of launches: three functions of the driver, a context, how many launches there are, the address of the first,
# that of what is cleared, and room for the current context.
LAUNCH, CLEAR, CURRENT, CONTEXT, COUNT, FIRST, CLEARS, FOUND = range(8)
HEAD = 8
# A launch: the function, the grid, threads and shared memory of a block, the address of its parameters and of `extra`,
# how many of the parameters are addresses; then for each of these its place, the number of the array, and how far in.
FUNCTION, X, Y, Z, THREADS, SHARED, PARAMETERS, EXTRA, PATCHES = range(9)
LAUNCH_HEAD = 9
OTHER_CONTEXT = -1


@intrinsic
def _item(typing_context: Any, items: Any, n: Any) -> Any:
    """The address of an object in a tuple."""

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        return b.ptrtoint(call(b, "PyTuple_GetItem", POINTER, b.inttoptr(args[0], POINTER), args[1]), I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _size(typing_context: Any, items: Any) -> Any:
    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        return call(b, "PyTuple_Size", I64, b.inttoptr(args[0], POINTER))

    return types.int64(types.int64), codegen


def _clear(b: Builder) -> None:
    """Forget an exception, unless it is one that ends a program, such as KeyboardInterrupt: callers see that."""
    matches = call(b, "PyErr_ExceptionMatches", I32, exception_named(b, "Exception"))
    with b.if_then(b.icmp_signed("!=", matches, I32(0))):
        call(b, "PyErr_Clear", ir.VoidType())


def _forget(b: Builder, result: Value) -> Value:
    """Release the reference to an object, or the exception in its place; return the object's address or 0."""
    with b.if_else(b.icmp_unsigned("==", b.ptrtoint(result, I64), I64(0))) as (failed, done):
        with failed:
            _clear(b)
        with done:
            call(b, "Py_DecRef", ir.VoidType(), result)
    return b.ptrtoint(result, I64)


@intrinsic
def _attribute(typing_context: Any, x: Any, name: Any) -> Any:
    """The address of the attribute of an object, which something else must refer to: True or False."""

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        return _forget(b, call(b, "PyObject_GetAttr", POINTER, *(b.inttoptr(x, POINTER) for x in args)))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _result(typing_context: Any, function: Any, x: Any) -> Any:
    """The address of what a function of Python returns for an object: True or False."""

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        name = "PyObject_CallFunctionObjArgs"
        callee = b.module.globals.get(name)
        if callee is None:
            callee = ir.Function(b.module, ir.FunctionType(POINTER, [POINTER, POINTER], var_arg=True), name)
        function, x = (b.inttoptr(x, POINTER) for x in args)
        return _forget(b, b.call(callee, [function, x, ir.Constant(POINTER, None)]))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _read(typing_context: Any, function: Any, x: Any, out: Any) -> Any:
    """Write the DLTensor of a tensor to an address; 0, or something else if that cannot be."""

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        function, *pointers = args
        pointer = b.inttoptr(function, ir.FunctionType(I32, [POINTER, POINTER]).as_pointer())
        failed = b.call(pointer, [b.inttoptr(x, POINTER) for x in pointers])
        with b.if_then(b.icmp_signed("!=", failed, I32(0)), likely=False):
            _clear(b)
        return b.sext(failed, I64)

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def _driver(typing_context: Any, function: Any, arguments: Any) -> Any:
    """Call a function of the driver. A nested tuple of one argument is passed as 32 bits; 0, or the error."""
    kinds = [I32 if isinstance(x, types.BaseTuple) else I64 for x in arguments]

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        function, packed = args
        values = [
            x if kind is I64 else b.trunc(b.extract_value(x, 0), I32)
            for kind, x in zip(kinds, cgutils.unpack_tuple(b, packed, len(kinds)), strict=True)
        ]
        pointer = b.inttoptr(function, ir.FunctionType(I32, kinds).as_pointer())
        return b.sext(b.call(pointer, values), I64)

    return types.int64(types.int64, arguments), codegen


def _make_look() -> Callable[..., int]:
    def look_at_tensors(
        operands: int, kind: int, none: int, false: int, requires_grad: int, is_neg: int, read: int, lowest: int,
        out: int,
    ) -> int:  # fmt: skip
        """Describe a tuple of tensors of one type, and None: addresses at `out`, then what alike tensors share.

        The number of words is returned, or 0 if a tensor requires a gradient, is lazily negated, has no memory (its
        address is less than `lowest`), is no strided array, or is of another type, of which `read` may not take it.
        """
        count = _size(operands)
        if count > OPERANDS:
            return 0
        words = carray(void_pointer(out), ROOM, np.int64)
        tensor = carray(void_pointer(out + 8 * WORDS), 8, np.int64)
        number, at = 0, OPERANDS
        for n in range(count):
            x = _item(operands, n)
            if x == none:
                words[at] = -1
                at += 1
                continue
            own = carray(void_pointer(x), TYPE + 1, np.int64)[TYPE]
            if own != kind or _attribute(x, requires_grad) != false or _result(is_neg, x) != false:
                return 0
            if _read(read, x, out + 8 * WORDS) != 0:
                return 0
            axes = tensor[DTYPE] & 0xFFFFFFFF
            address = tensor[DATA] + tensor[OFFSET]
            if axes > AXES or address < lowest or (axes != 0 and tensor[STRIDES] == 0):
                return 0
            words[number] = address
            same = 0  # the first tensor that begins there
            while words[same] != address:
                same += 1
            number += 1
            words[at], words[at + 1], words[at + 2] = tensor[DEVICE], tensor[DTYPE], same << 4 | (address & 15)
            at += 3
            shape = carray(void_pointer(tensor[SHAPE]), UNBOUNDED, np.int64)
            strides = carray(void_pointer(tensor[STRIDES]), UNBOUNDED, np.int64)
            for axis in range(axes):
                words[at + axis], words[at + axes + axis] = shape[axis], strides[axis]
            at += 2 * axes
        return int(at - OPERANDS)

    return look_at_tensors


@part
def _launch(start: int, own: int, stream: int) -> int:
    x = carray(void_pointer(own), LAUNCH_HEAD, np.int64)
    grid = (x[X],), (x[Y],), (x[Z],)
    return int(
        _driver(
            start,
            (x[FUNCTION], *grid, (x[THREADS],), (np.int64(1),), (np.int64(1),), (x[SHARED],), stream, np.int64(0),
             x[EXTRA]),
        )
    )  # fmt: skip


def _make_launch() -> Callable[..., int]:
    def repeat_launches(record: int, addresses: int, stream: int, clears: int) -> int:
        """Clear memory and launch kernels, whose arrays are at these addresses.

        0 is returned, or the error of the driver times 1000 and the number of the launch (of clearing: 999), or
        `OTHER_CONTEXT` if nothing is done because another context is the current one.
        """
        head = carray(void_pointer(record), HEAD, np.int64)
        if _driver(head[CURRENT], (record + 8 * FOUND,)) != 0 or head[FOUND] != head[CONTEXT]:
            return OTHER_CONTEXT
        where = carray(void_pointer(addresses), UNBOUNDED, np.int64)
        cleared = carray(void_pointer(head[CLEARS]), UNBOUNDED, np.int64)
        for n in range(clears):
            first = where[cleared[3 * n]] + cleared[3 * n + 1]
            error = _driver(head[CLEAR], (first, (np.int64(0),), cleared[3 * n + 2], stream))
            if error != 0:
                return int(error * 1000 + 999)
        at = head[FIRST]
        for n in range(head[COUNT]):
            own = carray(void_pointer(at), LAUNCH_HEAD, np.int64)
            parameters = carray(void_pointer(own[PARAMETERS]), UNBOUNDED, np.int64)
            patches = carray(void_pointer(at + 8 * LAUNCH_HEAD), UNBOUNDED, np.int64)
            for i in range(own[PATCHES]):
                parameters[patches[3 * i]] = where[patches[3 * i + 1]] + patches[3 * i + 2]
            error = _launch(head[LAUNCH], at, stream)
            if error != 0:
                return int(error * 1000 + n)
            at += 8 * (LAUNCH_HEAD + 3 * own[PATCHES])
        return 0

    return repeat_launches


look = Function("look-at-tensors", _make_look, objects=6, integers=3, nogil=False)
launch = Function("repeat-launches", _make_launch, objects=0, integers=4)


def record_of(
    functions: tuple[int, int, int],
    context: int,
    launches: Sequence[tuple[Sequence[int], Sequence[tuple[int, int, int]]]],
    clears: Sequence[tuple[int, int, int]],
) -> "array[int]":
    """Make the record of launches in a context.

    Parameters
    ----------
    functions : tuple of int
        Addresses of cuLaunchKernel, cuMemsetD8Async and cuCtxGetCurrent.
    context : int
        That of the functions of the kernels.
    launches : sequence of (words, patches)
        The first words of each launch, and which parameters are addresses: place, number of the array, how far in.
    clears : sequence of (int, int, int)
        Memory to be cleared: the number of an array, how far in, how many bytes.
    """
    words = [*functions, context, len(launches), 0, 0, 0]
    for first, patches in launches:
        words += [*first, len(patches)]
        for patch in patches:
            words += patch
    end = len(words)
    for clear in clears:
        words += clear
    record = array("q", words)
    start = record.buffer_info()[0]
    record[FIRST], record[CLEARS] = start + 8 * HEAD, start + 8 * end
    return record
