"""Numba's compiler, cut down to what kernels need: from Python functions to one module of LLVM.

Numba makes a code library of every function that a kernel calls: it links into it all that the function calls,
optimises the lot twice and assembles it, though only the kernel itself is ever called. For the 35 functions of the
forward kernel that is 36 modules and 7.3 s. Here a library keeps the IR of its function, and the IR of all of them
becomes a single module, as text, when the kernel is complete.

A target of its own also leaves out what kernels have no use for: of the tables of Numba's types and functions those for
strings, lists, random numbers and linear algebra, whose import takes 0.25 s; of its passes those that inline closures,
rewrite expressions of arrays and annotate types, after most of which Numba analyses the function again. Functions are
compiled for types, and not once more for each integer or truth value that is written in a call.

The private interfaces of Numba that this needs are used in this file and nowhere else; in a Numba without them kernels
compile by `njit`.
"""

import copy
import os
import re
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import codegen, compiler, compiler_machinery, config, cpu, imputils, typed_passes, untyped_passes
from numba.core.cgutils import normalize_ir_text
from numba.core.registry import CPUDispatcher, CPUTarget, cpu_target
from numba.core.target_extension import CPU, dispatcher_registry, jit_registry, target_override, target_registry
from numba.core.typing import context, templates
from numba.core.utils import threadsafe_cached_property

from .target import BUILD, machine, target

_METADATA = re.compile(r"!(\d+)\b")

# Without reference counts and wrappers for Python, the machine code needs nothing of Numba or Python.
_OPTIONS = {
    "nopython": True, "error_model": "numpy", "boundscheck": None, "nogil": True,
    "no_cfunc_wrapper": True, "no_cpython_wrapper": True, "_nrt": False,
}  # fmt: skip


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


def _codegen() -> Any:
    """Numba's code generator, which has the machine, for other libraries."""
    own = copy.copy(cpu_target.target_context.codegen())
    own.__class__ = _Codegen
    if BUILD in os.environ:
        own._tm = machine()
        own._target_data = own._tm.target_data
        own._data_layout = str(own._target_data)
    return own


_types, _code = templates.Registry(), imputils.Registry("numba_attention")


def _register_extremes(function: Any, test: str) -> None:
    """The smaller or larger of two numbers: Numba's own are functions in Python, compiled for every kind of number."""

    class Extreme(templates.AbstractTemplate):
        key = function

        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) != 2 or kws:
                return None
            kind = self.context.unify_types(*(types.unliteral(x) for x in args))
            return templates.signature(kind, kind, kind) if isinstance(kind, types.Number) else None

    @_code.lower(function, types.Number, types.Number)
    def choose(context: Any, b: Any, signature: Any, args: Any) -> Any:
        first, second = args
        compare = b.icmp_signed if isinstance(signature.return_type, types.Integer) else b.fcmp_ordered
        return b.select(compare(test, second, first), second, first)

    _types.register(Extreme)
    _types.register_global(function, types.Function(Extreme))


_register_extremes(min, "<")
_register_extremes(max, ">")


class _TypingContext(context.BaseContext):
    def load_additional_registries(self) -> None:
        from numba.core.typing import mathdecl

        for registry in (_types, mathdecl.registry):
            self.install_registry(registry)


class _Context(cpu.CPUContext):
    def init(self) -> None:
        self.is32bit = False
        self._internal_codegen = _codegen()

    def load_additional_registries(self) -> None:
        from numba.cpython import builtins, mathimpl, numbers, rangeobj, slicing, tupleobj  # noqa: F401
        from numba.np import arrayobj  # noqa: F401

        for registry in (_code, mathimpl.registry):
            self.install_registry(registry)

    def post_lowering(self, module: Any, library: Any) -> None:
        """Do not link Numba's runtime, which nothing needs."""


class _Kernels(CPU):
    """The target, as Numba knows it: by it an intrinsic finds the context for which it is defined."""


_NAME = "numba_attention"
while _NAME in target_registry:  # the package is imported again, after its modules were removed from sys.modules
    _NAME += "+"
target_registry[_NAME] = _Kernels


class _Target(CPUTarget):
    """What is compiled for."""

    @threadsafe_cached_property
    def _toplevel_typing_context(self) -> Any:
        return _TypingContext()

    @threadsafe_cached_property
    def _toplevel_target_context(self) -> Any:
        return _Context(self.typing_context, _NAME)


class _Compiler(compiler.CompilerBase):
    """The passes that kernels need."""

    def define_pipelines(self) -> list[Any]:
        passes = compiler_machinery.PassManager("kernel")
        for step in (
            untyped_passes.TranslateByteCode,
            untyped_passes.FixupArgs,
            untyped_passes.IRProcessing,
            untyped_passes.RewriteSemanticConstants,
            untyped_passes.DeadBranchPrune,
            untyped_passes.GenericRewrites,
            untyped_passes.ReconstructSSA,
            typed_passes.NopythonTypeInference,
            typed_passes.PreLowerStripPhis,
            typed_passes.IRLegalization,
            typed_passes.NativeLowering,
            typed_passes.NoPythonBackend,
        ):
            passes.add_pass(step, step.__name__)
        passes.finalize()
        return [passes]


class Dispatcher(CPUDispatcher):
    """A function that is compiled for kernels."""

    targetdescr = _Target(_NAME)

    def __init__(self, function: Any) -> None:
        super().__init__(function, targetoptions=_OPTIONS, pipeline_class=_Compiler)

    def compile(self, signature: Any) -> Any:
        with target_override(_NAME):  # or Numba fills the tables of its own target, too
            return super().compile(signature)

    def get_call_template(self, args: Any, kws: Any) -> Any:
        """Compile once for integers and truth values, and not once more for each that is written in a call."""
        return super().get_call_template([types.unliteral(x) for x in args], kws)


def part(function: Callable[..., Any]) -> Any:
    """A function that kernels call; use in place of `njit`."""
    return Dispatcher(function)


def compile_whole(function: Callable[..., int], signature: Any) -> tuple[Any, Any, str]:
    """The optimised module of a kernel, a machine to emit it, and the kernel's symbol."""
    dispatcher = Dispatcher(function)
    dispatcher.compile(signature)
    (result,) = dispatcher.overloads.values()
    library, symbol = result.library, result.fndesc.llvm_func_name
    module = library.linked(symbol)
    # O3 takes 0.2 s more for code that is no faster; the hot loops are vectors already.
    made = library.codegen._module_pass_manager(opt=min(2, int(config.OPT)), loop_vectorize=False)
    manager, *more = made if isinstance(made, tuple) else (made,)  # LLVM's old manager, up to llvmlite 0.44, is alone
    manager.run(module, *more)
    module.verify()
    return module, library.codegen._tm, symbol


# What Numba compiles its own functions with that are written in Python, where a kernel calls them.
dispatcher_registry[_Kernels], jit_registry[_Kernels] = Dispatcher, lambda **options: part
Dispatcher.targetdescr.target_context  # noqa: B018 - fails here if it is to fail
