"""Compiled kernels, in memory and on disk, under keys we choose.

Numba's own cache does not notice a change in another module, keeps an index and data files that several processes can
leave inconsistent, and cannot key a function made by a factory. Here one kernel is one file, under a key of everything
it depends on: the package's sources, Numba, llvmlite, Python, the CPU, what it is compiled for. Whatever fails to load
is a miss.
"""

import hashlib
import pickle
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
from numba import njit
from numba.core import config, serialize
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys
from numba.np.ufunc import parallel

from .. import forks
from ..kernel_cache import path_of, read_checked, warn_unwritten, write_checked
from .machine_code import MachineCode, compile_kernel, load

# Locks across fork(): a fork waits until no thread compiles or loads, in Numba or in LLVM. Kernels share the lock of
# Numba's compiler: a lock of their own would stay locked in a child forked while another thread reads a kernel's file.
for _lock in (
    global_compiler_lock._lock,
    getattr(parallel, "_backend_init_thread_lock", None),
    getattr(getattr(llvmlite.binding.ffi.lib, "_lock", None), "_lock", None),
):
    if _lock is not None:
        forks.await_before_fork(_lock)


def sources() -> list[Path]:
    """The files that decide what kernels compile to: theirs, the rule of intervals, the record they read."""
    package = Path(__file__).parents[1]
    return [*sorted(package.glob("cpu/*.py")), package / "intervals.py", package / "sequence_record.py"]


@cache
def _environment() -> str:
    """Everything but its name and signature that decides what a kernel compiles to."""
    digest = hashlib.sha256()
    for source in sources():
        digest.update(source.read_bytes())
    settings = (config.OPT, config.BOUNDSCHECK, config.LOOP_VECTORIZE, config.SLP_VECTORIZE, config.DEBUGINFO_DEFAULT)
    versions = (numba.__version__, llvmlite.__version__, sys.version_info[:3])
    digest.update(repr((versions, settings, cpu_target.target_context.codegen().magic_tuple())).encode())
    return digest.hexdigest()


class Kernel:
    """One function for one signature, compiled or loaded when first needed; called by other machine code.

    Parameters
    ----------
    name : str
        Says all that distinguishes this kernel from others of this package version; part of the cache key.
    make : callable
        Returns the Python function to compile; not called when the cache has the kernel.
    signature : str or numba signature

    Attributes
    ----------
    address : int
        Where its machine code begins.
    """

    address: int
    _uses: tuple[str, ...] = ("address",)

    def __init__(self, name: str, make: Callable[[], Callable[..., int]], signature: Any) -> None:
        self.name = name
        self.origin = ""  # "compiled" or "loaded", once the machine code is in memory
        self._make = make
        self._signature = signature
        self._loaded: Any = None

    def __getattr__(self, name: str) -> Any:
        """Load at first use what calls then find as plain attributes: a property would cost 0.1 us more each time."""
        if name not in self._uses:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = getattr(self, f"_find_{name}")()
        setattr(self, name, value)
        return value

    def _find_address(self) -> int:
        return int(self._get())

    def assembly(self) -> str:
        """Machine code as text; compiles afresh, because a loaded kernel has none."""
        library, _ = compile_kernel(self._function(), self._signature)
        return str(library.assembly())

    def _get(self) -> Any:
        if self._loaded is None:
            if forks.broken():
                raise RuntimeError(
                    f"kernel {self.name} cannot be loaded: this process was forked while another thread compiled, for "
                    f"more than {forks.PATIENCE:.0f} s; call what children need before forking, or start them by spawn"
                )
            with global_compiler_lock:
                if self._loaded is None:
                    self._loaded = self._load() or self._compile_and_save()
        return self._loaded

    @property
    def _key(self) -> str:
        """Everything that decides what this compiles to."""
        return f"{self.name} {self._signature} {_environment()}"

    def _load(self) -> Any:
        path = path_of(self.name, self._key, ".kernel")
        payload = None if path is None else read_checked(path, self._key)
        if payload is None:
            return None
        try:
            loaded = self._from_bytes(payload)
        except Exception:  # every error counts as a cache miss: a damaged file must not stop a call that can compile
            return None
        self.origin = "loaded"
        return loaded

    def _compile_and_save(self) -> Any:
        loaded, payload = self._compile()
        self.origin = "compiled"
        path = path_of(self.name, self._key, ".kernel")
        if path is not None:
            try:
                write_checked(path, self._key, payload())
            except Exception as error:
                warn_unwritten(error)
        return loaded

    def _function(self) -> Callable[..., int]:
        function = self._make()
        # Unique symbol: Numba numbers functions of one name by order of compilation (see `Spec.jit`).
        function.__qualname__ = function.__name__ = self.name.replace("-", "_")
        return function

    def _compile(self) -> tuple[Any, Callable[[], bytes]]:
        """What `_get` returns, and its form in a file."""
        library, symbol = compile_kernel(self._function(), self._signature)
        code = library.machine_code(symbol)
        return load(code), lambda: code.symbol.encode() + b"\0" + code.object

    def _from_bytes(self, payload: bytes) -> Any:
        symbol, _, machine_code = payload.partition(b"\0")
        return load(MachineCode(machine_code, symbol.decode()))


class Function(Kernel):
    """A kernel that Python calls, with Numba's wrapper.

    Parameters
    ----------
    name, make, signature
        As of `Kernel`.
    parallel : bool
        Whether the function has a `prange`.

    Attributes
    ----------
    call : callable
        The compiled function, called without Numba's dispatcher; arguments must have the very types.
    """

    call: Callable[..., int]
    _uses = ("address", "call")

    def __init__(
        self, name: str, make: Callable[[], Callable[..., int]], signature: Any, parallel: bool = False
    ) -> None:
        super().__init__(name, make, signature)
        self._parallel = parallel

    def _find_call(self) -> Callable[..., int]:
        return self._get().entry_point  # type: ignore[no-any-return]

    def _find_address(self) -> int:
        result = self._get()
        return int(result.library.get_pointer_to_function(result.fndesc.llvm_func_name))

    def _compile(self) -> tuple[Any, Callable[[], bytes]]:
        dispatcher = njit(parallel=self._parallel, nogil=True, error_model="numpy")(self._function())
        dispatcher.compile(self._signature)
        (result,) = dispatcher.overloads.values()
        return result, lambda: serialize.dumps(result._reduce())

    def _from_bytes(self, payload: bytes) -> Any:
        context = cpu_target.target_context
        rtsys.initialize(context)  # registers the symbols of Numba's runtime that the object code refers to
        return CompileResult._rebuild(context, *pickle.loads(payload))
