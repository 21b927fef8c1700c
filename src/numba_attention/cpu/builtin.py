"""Machine code as a built-in function of Python, and as what a thread begins with.

A built-in function is a few machine instructions around a kernel: it reads the integers from Python's objects, lets
other threads of Python run while the kernel does, and makes an integer of the result. A call takes 0.06 us; by `ctypes`
it would take 0.4. Only functions of Python's stable ABI are called, so the machine code depends neither on Numba nor on
the version of Python.
"""

import ctypes
from functools import partial
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target

I8, I32, I64 = (ir.IntType(n) for n in (8, 32, 64))
POINTER = I8.as_pointer()
METH_FASTCALL = 0x80  # CPython, methodobject.h: arguments come as an array of objects and their number


class Arguments(NamedTuple):
    """What a built-in function passes to the kernel, as int64: addresses of objects first, values of integers then."""

    objects: int
    integers: int
    nogil: bool  # whether other threads of Python may run meanwhile


def symbol_of(kernel: str) -> str:
    """The symbol of the function that `build` or `build_entry` makes around the kernel with this symbol."""
    return f"{kernel}.outer"


def build_entry(kernel: str) -> Any:
    """The LLVM module of a C function of a pointer around a kernel of an int64, for PyThread_start_new_thread."""
    module = ir.Module()
    convention = cpu_target.target_context.call_conv
    inner = ir.Function(module, convention.get_function_type(types.int64, [types.int64]), kernel)
    outer = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), symbol_of(kernel))
    b = ir.IRBuilder(outer.append_basic_block())
    convention.call_function(b, inner, types.int64, [types.int64], [b.ptrtoint(outer.args[0], I64)])
    b.ret_void()
    return llvm.parse_assembly(str(module))


def call_python(b: Any, name: str, result: Any, *args: Any) -> Any:
    """Call a function of Python, which the module declares once."""
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(result, [x.type for x in args]), name)
    return b.call(function, args)


def constant_text(b: Any, text: str) -> Any:
    """A pointer to a text of C, which ends with a byte of 0."""
    data = bytearray(text.encode() + b"\0")
    constant = ir.GlobalVariable(b.module, ir.ArrayType(I8, len(data)), b.module.get_unique_name("text"))
    constant.initializer, constant.global_constant = ir.Constant(constant.type.pointee, data), True
    constant.linkage = "internal"
    return b.bitcast(constant, POINTER)


def exception_named(b: Any, name: str) -> Any:
    """One of Python's own exceptions, found by its name.

    `PyExc_...` of C would be read at a distance of 32 bits from this code, within which Python seldom lies: only calls
    reach further.
    """
    builtins = call_python(b, "PyEval_GetBuiltins", POINTER)
    return call_python(b, "PyDict_GetItemString", POINTER, builtins, constant_text(b, name))


def build(kernel: str, arguments: Arguments) -> Any:
    """The LLVM module of a built-in function around a kernel, which is another module's."""
    module = ir.Module()
    number = arguments.objects + arguments.integers
    kinds = [types.int64] * number
    convention = cpu_target.target_context.call_conv
    inner = ir.Function(module, convention.get_function_type(types.int64, kinds), kernel)
    outer = ir.Function(module, ir.FunctionType(POINTER, [POINTER, POINTER.as_pointer(), I64]), symbol_of(kernel))
    _, given, count = outer.args
    b = ir.IRBuilder(outer.append_basic_block())

    python = partial(call_python, b)

    def fail(exception: str, message: str) -> None:
        python("PyErr_SetString", ir.VoidType(), exception_named(b, exception), constant_text(b, message))
        b.ret(ir.Constant(POINTER, None))

    with b.if_then(b.icmp_signed("!=", count, I64(number)), likely=False):
        fail("TypeError", f"expected {number} arguments")
    values = []
    for n in range(number):
        item = b.load(b.gep(given, [I64(n)]))
        if n < arguments.objects:
            values.append(b.ptrtoint(item, I64))
            continue
        value = python("PyLong_AsLongLong", I64, item)
        with b.if_then(b.icmp_signed("==", value, I64(-1)), likely=False):
            error = python("PyErr_Occurred", POINTER)
            with b.if_then(b.icmp_signed("!=", b.ptrtoint(error, I64), I64(0))):
                b.ret(ir.Constant(POINTER, None))
        values.append(value)
    state = python("PyEval_SaveThread", POINTER) if arguments.nogil else None
    status, result = convention.call_function(b, inner, types.int64, kinds, values)
    if state is not None:
        python("PyEval_RestoreThread", ir.VoidType(), state)
    # Kernels raise nothing except the IndexError of NUMBA_BOUNDSCHECK=1; what they call in Python may.
    with b.if_then(status.is_error, likely=False):
        fail("IndexError", f"{kernel} reads or writes outside an array")
    if not arguments.nogil:
        error = python("PyErr_Occurred", POINTER)
        with b.if_then(b.icmp_signed("!=", b.ptrtoint(error, I64), I64(0)), likely=False):
            b.ret(ir.Constant(POINTER, None))
    b.ret(python("PyLong_FromLongLong", POINTER, result))
    return llvm.parse_assembly(str(module))


class _MethodDef(ctypes.Structure):
    """CPython, methodobject.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    ]


_methods: list[_MethodDef] = []  # never freed: a built-in function refers to its definition as long as it lives


def make(address: int, name: str) -> Any:
    """The built-in function whose machine code is at an address."""
    method = _MethodDef(name.encode(), address, METH_FASTCALL, None)
    _methods.append(method)
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    return new(("PyCFunction_NewEx", ctypes.pythonapi))(ctypes.addressof(method), None, None)
