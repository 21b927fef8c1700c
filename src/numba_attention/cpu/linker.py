"""One module of LLVM from the functions of a kernel.

Numba makes a code library of every function that a kernel calls: it links into it all that the function calls,
optimises the lot twice and assembles it, though only the kernel itself is ever called. For the 35 functions of the
forward kernel that is 36 modules and 7.3 s. Here a library keeps the IR of its function, and the IR of all of them
becomes a single module, as text, when the kernel is complete.

The private interfaces of Numba that kernels are compiled by are used in this file and in `compiler`.
"""

import copy
import os
import re
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import codegen
from numba.core.cgutils import normalize_ir_text
from numba.core.registry import cpu_target

from .target import BUILD, machine, target

_METADATA = re.compile(r"!(\d+)\b")


class Library(codegen.CodeLibrary):
    """The IR of one function, and the libraries of those that it calls."""

    def __init__(self, codegen: Any, name: str) -> None:
        super().__init__(codegen, name)
        self._modules: list[Any] = []
        self._called: list[Library] = []

    def add_ir_module(self, ir_module: Any) -> None:
        self._modules.append(ir_module)

    def add_linking_library(self, library: Any) -> None:
        self._called.append(library)

    def finalize(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0  # nothing here is called from outside

    def get_function(self, name: str) -> Any:
        raise NotImplementedError

    get_llvm_str = get_asm_str = get_function

    def linked(self, symbol: str) -> Any:
        """The module of the function with this symbol and of all that it calls, which are internal to it."""
        libraries: dict[Library, None] = {}

        def visit(library: Library) -> None:
            if library not in libraries:
                libraries[library] = None
                for other in library._called:
                    visit(other)

        visit(self)
        modules = [module for library in libraries for module in library._modules]
        linked = llvm.parse_assembly(normalize_ir_text(_merged(modules)))
        linked.name, linked.data_layout = self.name, self._codegen._data_layout
        for function in linked.functions:
            if not function.is_declaration and function.name != symbol:
                function.linkage = "internal"  # what is inlined everywhere is dropped
        return linked


def _merged(modules: list[Any]) -> str:
    """The text of modules as of one: every name once, as what defines it, and metadata numbered anew."""
    defined: dict[str, str] = {}
    declared: dict[str, str] = {}
    metadata: list[str] = []
    for module in modules:
        first = len(metadata)

        def renumber(text: str, first: int = first) -> str:
            return _METADATA.sub(lambda match: f"!{int(match[1]) + first}", text)

        for name, value in module.globals.items():
            is_function = isinstance(value, ir.Function)
            if is_function and value.blocks:
                if name not in defined:
                    defined[name] = renumber(str(value)) if module.metadata else str(value)
            elif not is_function and value.initializer is not None:
                if defined.setdefault(name, str(value)) != str(value):
                    raise ValueError(f"two constants are called {name}")
            else:
                declared[name] = str(value)
        metadata += [renumber(str(value)) for value in module.metadata]
    lines = [f'target triple = "{target().triple}"', *defined.values()]
    lines += [text for name, text in declared.items() if name not in defined]
    return "\n".join([*lines, *metadata])


class _Codegen(codegen.JITCPUCodegen):
    _library_class = Library

    def set_env(self, name: str, env: Any) -> None:
        """Do nothing: kernels have no use for Python objects, and are in no engine of Numba's."""

    def _create_empty_module(self, name: str) -> Any:
        module = super()._create_empty_module(name)
        module.triple = target().triple
        return module


def code_generator() -> Any:
    """Numba's code generator, which has the machine, for other libraries."""
    own = copy.copy(cpu_target.target_context.codegen())
    own.__class__ = _Codegen
    if BUILD in os.environ:
        own._tm = machine()
        own._target_data = own._tm.target_data
        own._data_layout = str(own._target_data)
    return own
