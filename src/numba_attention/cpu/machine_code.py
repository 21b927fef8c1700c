"""A kernel as one LLVM module: its inner functions are linked, optimised and turned into machine code once.

Numba makes a code library of every function that a kernel calls: it links into it all that the function calls,
optimises the lot twice and assembles it, though only the kernel itself is ever called. For the 35 functions of the
forward kernel that is 36 modules and 7.3 s; as one module it is 2.8 s, with the same bits, the same speed and half the
machine code. The private interfaces of Numba that this needs are used in this file and nowhere else; in a Numba without
them kernels compile by `njit`.
"""

import copy
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from numba import njit
from numba.core import config
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys

from . import builtin
from .builtin import Arguments
from .target import BUILD, machine, target


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


def _by_parts() -> tuple[Any, Any]:
    """The dispatchers of inner functions and of kernels; an exception in a Numba that is built otherwise."""
    from numba.core import codegen
    from numba.core.cgutils import normalize_ir_text
    from numba.core.registry import CPUDispatcher, CPUTarget

    class Part(codegen.JITCodeLibrary):
        """The IR of one function, kept for those that call it."""

        def add_ir_module(self, ir_module: Any) -> None:
            module = llvm.parse_assembly(normalize_ir_text(str(ir_module)))
            module.name, module.data_layout = ir_module.name, self._codegen._data_layout
            self._final_module.link_in(module)

        def finalize(self) -> None:
            self._finalized, self._shared_module = True, self._final_module

        def get_pointer_to_function(self, name: str) -> int:
            return 0  # no part is called from outside

    class Whole(Part):
        """The code of a kernel, with all that it calls."""

        def finalize(self) -> None:
            module = self._final_module
            entries = {f.name for f in module.functions if not f.is_declaration}
            linked: set[Any] = set()

            def link(library: Any) -> None:
                # Callers before callees: a `linkonce_odr` function that nobody calls yet would be dropped.
                for other in library._linking_libraries:
                    if other not in linked and other is not rtsys._library:  # nothing needs Numba's runtime
                        linked.add(other)
                        module.link_in(other._get_module_for_linking(), preserve=True)
                        link(other)

            link(self)
            for function in module.functions:
                if not function.is_declaration and function.name not in entries:
                    function.linkage = "internal"  # what is inlined everywhere is dropped
            # O3 takes 0.2 s more for code that is no faster; the hot loops are vectors already.
            manager, builder = self._codegen._module_pass_manager(opt=min(2, int(config.OPT)), loop_vectorize=False)
            manager.run(module, builder)
            module.verify()
            self._finalized = True

    class Codegen(codegen.JITCPUCodegen):
        def set_env(self, name: str, env: Any) -> None:
            """Do nothing: kernels have no use for Python objects, and are in no engine of Numba's."""

        def _create_empty_module(self, name: str) -> Any:
            module = super()._create_empty_module(name)
            module.triple = target().triple
            return module

    class Target(CPUTarget):
        """Numba's CPU target, with other code libraries."""

        def __init__(self, library: type) -> None:
            super().__init__("cpu")
            self._library, self._context = library, None

        @property
        def target_context(self) -> Any:
            if self._context is None:
                context = cpu_target.target_context
                own = copy.copy(context.codegen())
                own.__class__, own._library_class = Codegen, self._library
                if BUILD in os.environ:
                    own._tm = machine()
                    own._target_data = own._tm.target_data
                    own._data_layout = str(own._target_data)
                self._context = context.subtarget(_internal_codegen=own)
            return self._context

        @property
        def typing_context(self) -> Any:
            return cpu_target.typing_context

    class PartDispatcher(CPUDispatcher):
        targetdescr = Target(Part)

    class WholeDispatcher(CPUDispatcher):
        targetdescr = Target(Whole)

    Target(Whole).target_context  # noqa: B018 - fails here if it is to fail
    return PartDispatcher, WholeDispatcher


try:
    _part, _whole = _by_parts()
except (ImportError, AttributeError, TypeError):
    _part = _whole = None

# Without reference counts and wrappers for Python, the machine code needs nothing of Numba or Python.
_OPTIONS = {
    "nopython": True, "error_model": "numpy", "boundscheck": None, "nogil": True,
    "no_cfunc_wrapper": True, "no_cpython_wrapper": True, "_nrt": False,
}  # fmt: skip


def part(function: Callable[..., Any]) -> Any:
    """A function that kernels call; use in place of `njit`."""
    return _part(function, targetoptions=_OPTIONS) if _part else njit(error_model="numpy")(function)


def _compile(function: Callable[..., int], signature: Any) -> tuple[Any, Any, str]:
    """The optimised module of a kernel, a machine to emit it, and the kernel's symbol."""
    if _whole:
        dispatcher = _whole(function, targetoptions=_OPTIONS)
    else:
        dispatcher = njit(nogil=True, error_model="numpy")(function)
    dispatcher.compile(signature)
    (result,) = dispatcher.overloads.values()
    library, symbol = result.library, result.fndesc.llvm_func_name
    if _whole:
        library._ensure_finalized()
        return library._final_module, library._codegen._tm, symbol
    return llvm.parse_assembly(library.get_llvm_str()), machine(), symbol


def compile_kernel(function: Callable[..., int], signature: Any, arguments: Arguments | None = None) -> MachineCode:
    """Compile a kernel; with `arguments`, as a built-in function that passes these.

    Numba's compiler must not be interrupted by what calls it again: see `compiler_thread`.
    """
    module, emitter, symbol = _compile(function, signature)
    if arguments is not None:
        module.link_in(builtin.build(symbol, arguments))
        symbol = builtin.symbol_of(symbol)
    return MachineCode(emitter.emit_object(module), symbol)


def assembly(function: Callable[..., int], signature: Any) -> str:
    """The machine code of a kernel as text."""
    module, emitter, _ = _compile(function, signature)
    return str(emitter.emit_assembly(module))
