"""The one place that knows how numba-cuda compiles: macros as intrinsics, kernels as cubins. Neither needs a driver.

numba-cuda is in maintenance mode, and what follows it has no llvmlite. Whoever ports this rewrites `emit.py` and this
module.
"""

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..device.cubins import entry
from .emit import Emit, Kind, Packed, Value, kinds_of


def _import_array_functions() -> None:
    """Import numba-cuda's functions of arrays, which ask NumPy for ``row_stack`` whatever a kernel uses.

    NumPy 2.5 removed that name, and numba-cuda (0.30.4 and before) cannot import the module without it, so nothing
    compiles. It overloads the function and never calls it: one that nobody else can name takes its place while the
    module is imported, once in a process, and NumPy is left as it was found.
    """
    name = "row_stack"
    if hasattr(np, name):
        return
    setattr(np, name, lambda tup: np.vstack(tup))
    try:
        import_module("numba.cuda.np.arrayobj")
    finally:
        delattr(np, name)


_import_array_functions()

# ptxas says so, and goes on, where it ignores setmaxnreg (C7504) or waits for each wgmma by itself (C7510 to C7514).
IGNORED = re.compile(r"\bC75(?:04|1[0-4])\b")

_NUMBA = {"i": types.int32, "l": types.int64, "f": types.float32, "d": types.float64}


class Intrinsics:
    """Makes of a macro's body an intrinsic of numba.cuda, and of a shape of registers its type."""

    cuda = cuda

    @staticmethod
    def macro(result: Kind | tuple[Kind, ...], *arguments: Kind) -> Callable[[Callable[..., Any]], Any]:
        """Decorate ``body(e, *arguments)``; registers are written as "i", "f8" (8 of float32 as a tuple), "" for none.

        A result "f8 f2" is a tuple of two tuples. What is `Packed` comes and goes as one object: a `Block`, say.
        """
        results = kinds_of(result)
        numba_result = _result(results)

        def decorate(body: Callable[..., Any]) -> Any:
            def codegen(context: Any, builder: Any, sig: Any, values: Sequence[Any]) -> Any:
                e = Emit(context, builder)
                out = body(e, *(_take(e, builder, kind, x) for kind, x in zip(arguments, values, strict=True)))
                if len(results) < 2:
                    return _give(context, builder, results[0], out) if results else context.get_dummy_value()
                parts = [_give(context, builder, kind, x) for kind, x in zip(results, out, strict=True)]
                return context.make_tuple(builder, numba_result, parts)

            names = ", ".join(f"a{n}" for n in range(len(arguments)))
            scope = {"typed": signature(numba_result, *map(_type, arguments)), "codegen": codegen}
            exec(f"def {body.__name__}(typing_context, {names}):\n    return typed, codegen", scope)
            return intrinsic(scope[body.__name__])

        return decorate

    @staticmethod
    def shared() -> Any:
        """The address of dynamic shared memory, which a kernel gets as a cuda.shared.array."""
        return _shared_address


def _type(kind: Kind) -> Any:
    if isinstance(kind, Packed):
        return types.Tuple([_type(group) for group in kind.groups])
    return types.UniTuple(_NUMBA[kind[0]], int(kind[1:])) if kind[1:] else _NUMBA[kind]


def _result(kinds: Sequence[Kind]) -> Any:
    parts = [_type(kind) for kind in kinds]
    return types.none if not parts else parts[0] if len(parts) == 1 else types.Tuple(parts)


def _take(e: Emit, builder: Any, kind: Kind, value: Any) -> Any:
    """What a macro works with, of what the kernel has."""
    if isinstance(kind, Packed):
        groups = cgutils.unpack_tuple(builder, value, len(kind.groups))
        return kind.unpack(e, *(_take(e, builder, group, x) for group, x in zip(kind.groups, groups, strict=True)))
    if kind[1:]:
        return [Value(builder, kind[0], x) for x in cgutils.unpack_tuple(builder, value, int(kind[1:]))]
    return Value(builder, kind, value)


def _give(context: Any, builder: Any, kind: Kind, out: Any) -> Any:
    """What the kernel has, of what a macro returned."""
    if isinstance(kind, Packed):
        parts = [_give(context, builder, group, x) for group, x in zip(kind.groups, kind.pack(out), strict=True)]
        return context.make_tuple(builder, _type(kind), parts)
    if kind[1:]:
        return context.make_tuple(builder, _type(kind), [x.llvm for x in out])
    return out.llvm


@intrinsic
def _shared_address(typing_context: Any, array: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, values: Sequence[Any]) -> Any:
        from llvmlite import ir

        data = context.make_array(sig.args[0])(context, builder, values[0]).data
        function = ir.FunctionType(ir.IntType(32), [ir.IntType(64)])
        code = "{ .reg .u64 t; cvta.to.shared.u64 t, $1; cvt.u32.u64 $0, t; }"
        return builder.call(ir.InlineAsm(function, code, "=r,l", False), [builder.ptrtoint(data, ir.IntType(64))])

    return signature(types.int32, array), codegen


class Cubin(NamedTuple):
    """Machine code of a kernel, and what the assembler said of it."""

    name: str
    code: bytes
    log: str

    @property
    def registers(self) -> int:
        return int(re.findall(r"Used (\d+) registers", self.log)[-1])

    @property
    def spills(self) -> int:
        """Bytes of stack and of spilled registers."""
        sizes = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads|cumulative stack size)", self.log)
        return max((int(n) for n in sizes), default=0)


def compile_kernel(function: Any, integers: int, reals: int, threads: int, arch: str, blocks: int = 1) -> Cubin:
    """Compile ``function(integers, reals)``, two tuples of int64 and float64, for "sm_80", "sm_90a" and so on."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    digits, letter = re.fullmatch(r"sm_(\d+)([af]?)", arch).groups()  # type: ignore[union-attr]
    capability: tuple[Any, ...] = (int(digits[:-1]), int(digits[-1]), *([letter] if letter else []))
    of_kernel = (types.UniTuple(types.int64, integers), types.UniTuple(types.float64, reals))
    ltoir, _ = cuda.compile(
        function, of_kernel, device=False, abi="numba", cc=capability, fastmath=False, opt=True,
        launch_bounds=(threads, blocks), output="ltoir",
    )  # fmt: skip
    options = LinkerOptions(arch=arch, link_time_optimization=True, ptxas_options=["-v"])
    linker = Linker(ObjectCode.from_ltoir(ltoir), options=options)
    code = bytes(linker.link("cubin").code)
    log = linker.get_info_log() + linker.get_error_log()
    ignored = sorted(set(IGNORED.findall(log)))
    if ignored:
        raise RuntimeError(f"the assembler did not do what the kernel says: {', '.join(ignored)} in its log:\n{log}")
    return Cubin(entry(code), code, log)
