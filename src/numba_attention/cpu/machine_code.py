"""Machine code of kernels: as an object file, which is made, loaded and carried to other processes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from numba import njit

from . import builtin
from .target import machine


class MachineCode(NamedTuple):
    """An object file in memory, and the name of the kernel in it."""

    object: bytes
    symbol: str

    @property
    def content(self) -> bytes:
        """Of a file."""
        return self.symbol.encode() + b"\0" + self.object


# Execution engines are never freed: threads may still run their machine code when the interpreter shuts down.
_engines: list[Any] = []


def load(code: MachineCode) -> int:
    """The address of a kernel. Each lives in an engine of its own, so that no two can share a symbol.

    Raises
    ------
    ValueError
        Where the kernel is not in the object.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code.object))
    engine.finalize_object()
    address = int(engine.get_function_address(code.symbol))
    if not address:
        raise ValueError(f"no {code.symbol} in the object")
    _engines.append(engine)
    return address


try:
    from . import compiler

    part, _compile = compiler.part, compiler.compile_whole
except (ImportError, AttributeError, TypeError):  # a Numba that is built otherwise

    def part(function: Callable[..., Any]) -> Any:
        """A function that kernels call."""
        return njit(error_model="numpy")(function)

    def _compile(function: Callable[..., int], signature: Any) -> tuple[Any, Any, str]:
        """The optimised module of a kernel, a machine to emit it, and the kernel's symbol."""
        dispatcher = njit(nogil=True, error_model="numpy")(function)
        dispatcher.compile(signature)
        (result,) = dispatcher.overloads.values()
        return llvm.parse_assembly(result.library.get_llvm_str()), machine(), result.fndesc.llvm_func_name


def compile_kernel(
    function: Callable[..., int], signature: Any, wrap: Callable[[str], Any] | None = None
) -> MachineCode:
    """Compile a kernel; with `wrap`, as the function that this builds around the kernel with a symbol (`builtin`).

    Numba's compiler must not be interrupted by what calls it again: see `compiler_thread`.
    """
    module, emitter, symbol = _compile(function, signature)
    if wrap is not None:
        module.link_in(wrap(symbol))
        symbol = builtin.symbol_of(symbol)
    return MachineCode(emitter.emit_object(module), symbol)


def assembly(function: Callable[..., int], signature: Any) -> str:
    """The machine code of a kernel as text."""
    module, emitter, _ = _compile(function, signature)
    return str(emitter.emit_assembly(module))
