"""Numba's compiler, cut down to what kernels need: from Python functions to one module of LLVM.

Kernels have arrays over memory at an address, records, integers and numbers, and raise nothing. So this compiler leaves
out:

- of the tables of Numba's types and functions those for strings, lists, random numbers and linear algebra, whose import
  takes 0.25 s;
- the passes that inline closures, rewrite expressions of arrays and annotate types, and the lifetimes of variables,
  which Numba analyses anew after most passes;
- reference counts, exceptions, and what a debugger would need: a call is not followed by the question how it ended, and
  a variable is not read before it is written. That is a tenth of the instructions that LLVM optimises;
- names of types in symbols, events and errors that nobody reads: that of the record of parameters has 10 kB;
- asking dozens of candidates for each operation between numbers, where one of the same types was resolved before.

Functions are compiled for types, and not once more for each integer or truth value that is written in a call.

In a Numba without the private interfaces that this needs kernels compile by `njit`.
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import (
    cgutils,
    compiler,
    compiler_machinery,
    config,
    cpu,
    imputils,
    ir_utils,
    lowering,
    ssa,
    transforms,
    typed_passes,
    untyped_passes,
)
from numba.core.registry import CPUDispatcher, CPUTarget
from numba.core.target_extension import CPU, dispatcher_registry, jit_registry, target_override, target_registry
from numba.core.typing import context, templates
from numba.core.utils import threadsafe_cached_property

from .linker import code_generator

# Without reference counts and wrappers for Python, the machine code needs nothing of Numba or Python. Debugging is off
# whatever NUMBA_DEBUGINFO says: `_Lower` keeps variables as if it were.
_OPTIONS = {
    "nopython": True, "error_model": "numpy", "boundscheck": None, "nogil": True,
    "no_cfunc_wrapper": True, "no_cpython_wrapper": True, "_nrt": False, "debug": False,
}  # fmt: skip

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


def _declarations(context: Any, *kinds: str) -> int:
    """How many declarations the registries hold that a context takes its own from."""
    return sum(len(getattr(registry, kind)) for registry in context._registries for kind in kinds)


class _TypingContext(context.BaseContext):
    """What types operations have."""

    def __init__(self) -> None:
        self._known = -1
        self._resolved: dict[Any, Any] = {}
        super().__init__()

    def load_additional_registries(self) -> None:
        from numba.core.typing import mathdecl

        for registry in (_types, mathdecl.registry):
            self.install_registry(registry)

    def refresh(self) -> None:
        """Look for declarations where there are new ones; Numba asks for that twenty times a function."""
        number = _declarations(self, "functions", "attributes", "globals")
        if number != self._known:
            super().refresh()
            self._known = number
            self._resolved.clear()

    def resolve_function_type(self, func: Any, args: Any, kws: Any) -> Any:
        """The signature of a call; that of an operator or a type is looked up once."""
        name = func.typing_key if isinstance(func, types.Function) else func
        if kws or not isinstance(name, (type, type(operator.add))):
            return super().resolve_function_type(func, args, kws)
        key = func, tuple(args)
        if key not in self._resolved:
            self._resolved[key] = super().resolve_function_type(func, args, kws)
        return self._resolved[key]


class _Context(cpu.CPUContext):
    """What operations become in LLVM."""

    def init(self) -> None:
        self.is32bit = False
        self._known = -1
        self._internal_codegen = code_generator()

    def load_additional_registries(self) -> None:
        from numba.cpython import builtins, mathimpl, numbers, rangeobj, slicing, tupleobj  # noqa: F401
        from numba.np import arrayobj  # noqa: F401

        for registry in (_code, mathimpl.registry):
            self.install_registry(registry)

    def refresh(self) -> None:
        number = _declarations(self, "functions", "getattrs", "setattrs", "casts", "constants")
        if number != self._known:
            super().refresh()
            self._known = number
        self.typing_context.refresh()

    def mangler(self, name: str, types: Any, *, abi_tags: Any = (), uid: Any = None) -> str:
        return str(super().mangler(name, (), uid=uid))

    def get_getattr(self, typ: Any, attr: str) -> Any:
        if isinstance(typ, types.Record):  # at once, and not after an error that says that no field is special
            return self._getattrs[None].find((typ,))
        return super().get_getattr(typ, attr)

    def insert_user_function(self, func: Any, fndesc: Any, libs: Any = ()) -> None:
        if _raises():
            super().insert_user_function(func, fndesc, libs)
            return

        def call(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return context.call_internal(builder, fndesc, signature, args)

        call.libs = tuple(libs)  # type: ignore[attr-defined]
        self._defns[func].append(call, fndesc.argtypes)

    def call_internal(self, builder: Any, fndesc: Any, sig: Any, args: Any) -> Any:
        if _raises():
            return super().call_internal(builder, fndesc, sig, args)
        callee = self.declare_function(builder.module, fndesc)
        result = cgutils.alloca_once(builder, callee.args[0].type.pointee)
        no_exception = ir.Constant(callee.args[1].type, None)
        values = self.get_arg_packer(fndesc.argtypes).as_arguments(builder, args)
        builder.call(callee, [result, no_exception, *values])
        return self.get_returned_value(builder, fndesc.restype, builder.load(result))

    def post_lowering(self, module: Any, library: Any) -> None:
        """Do not link Numba's runtime, which nothing needs."""


def _raises() -> bool:
    """Whether functions may raise: the IndexError of NUMBA_BOUNDSCHECK=1 is the only exception in kernels."""
    return bool(config.BOUNDSCHECK)


class _Lower(lowering.Lower):
    """The instructions of a function, without references to Python's objects."""

    def emit_environment_object(self) -> None:
        """Do nothing: it is for the objects that a function refers to."""

    def storevar(self, value: Any, name: str, argidx: Any = None) -> None:
        """Store without reading what was there, of which Numba would give up a reference."""
        self._alloca_var(name, self.typeof(name))
        if name in self._singly_assigned_vars:
            self._blk_local_varmap[name] = value
        else:
            self.builder.store(value, self.getvar(name))

    def alloca_lltype(self, name: str, lltype: Any, datamodel: Any = None) -> Any:
        return cgutils.alloca_once(self.builder, lltype, name=name)


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


class _Pass(compiler_machinery.FunctionPass):
    """A pass that does not analyse the lifetimes of variables afterwards."""

    def __init__(self) -> None:
        super().__init__()


@compiler_machinery.register_pass(mutates_CFG=True, analysis_only=False)
class _Canonicalize(_Pass):
    """Give loops one entry and one exit."""

    _name = f"{_NAME} Canonicalize"

    def run_pass(self, state: Any) -> bool:
        state.func_ir.blocks = transforms.canonicalize_cfg(state.func_ir.blocks)
        return True


@compiler_machinery.register_pass(mutates_CFG=False, analysis_only=False)
class _ReconstructSSA(_Pass):
    """Give every assignment a variable of its own."""

    _name = f"{_NAME} ReconstructSSA"

    def run_pass(self, state: Any) -> bool:
        state.func_ir = ssa.reconstruct_ssa(state.func_ir)
        state.func_ir._definitions = ir_utils.build_definitions(state.func_ir.blocks)
        return True


@compiler_machinery.register_pass(mutates_CFG=False, analysis_only=False)
class _StripPhis(_Pass):
    """Assign what a variable is to become at the ends of the blocks before."""

    _name = f"{_NAME} StripPhis"

    def run_pass(self, state: Any) -> bool:
        state.func_ir = typed_passes.PreLowerStripPhis()._strip_phi_nodes(state.func_ir)
        return True


@compiler_machinery.register_pass(mutates_CFG=True, analysis_only=False)
class _NativeLowering(typed_passes.BaseNativeLowering):
    """Write the instructions."""

    _name = f"{_NAME} NativeLowering"

    @property
    def lowering_class(self) -> Any:
        return _Lower


class _Passes(compiler_machinery.PassManager):
    """Passes without Numba's events and timers, which write the types of a function as text for each pass."""

    def _runPass(self, index: int, pss: Any, internal_state: Any) -> None:
        pss.analysis = self._analysis
        pss.run_pass(internal_state)


class _Compiler(compiler.CompilerBase):
    """The passes that kernels need."""

    def define_pipelines(self) -> list[Any]:
        passes = _Passes("kernel")
        for step in (
            untyped_passes.TranslateByteCode,
            untyped_passes.FixupArgs,
            _Canonicalize,
            untyped_passes.RewriteSemanticConstants,
            untyped_passes.DeadBranchPrune,
            untyped_passes.GenericRewrites,
            _ReconstructSSA,
            typed_passes.NopythonTypeInference,
            _StripPhis,
            _NativeLowering,
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
