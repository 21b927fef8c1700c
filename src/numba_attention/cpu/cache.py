"""Compiled kernels, in memory and on disk, under keys we choose.

Numba's own cache does not notice a change in another module, keeps an index and data files that several processes can
leave inconsistent, and cannot key a function made by a factory. Here one kernel is one file, under a key of everything
it depends on: the package's sources, Numba, llvmlite, Python, the CPU, what it is compiled for. Whatever fails to load
is a miss.
"""

import hashlib
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
from numba import types
from numba.core import config
from numba.core.compiler_lock import global_compiler_lock
from numba.np.ufunc import parallel

from .. import forks
from ..kernel_cache import directory, file_name, path_of, read_checked, warn_unwritten, write_checked
from . import builtin, compiler_thread, machine_code, shipped
from .builtin import Arguments
from .machine_code import MachineCode, compile_kernel
from .target import target

# Locks across fork(): a fork waits until no thread compiles or loads, in Numba or in LLVM. Kernels have no lock of
# their own, which would stay locked in a child forked while another thread reads a kernel's file.
for _lock in (
    global_compiler_lock._lock,
    getattr(parallel, "_backend_init_thread_lock", None),
    getattr(getattr(llvmlite.binding.ffi.lib, "_lock", None), "_lock", None),
):
    if _lock is not None:
        forks.await_before_fork(_lock)


def sources() -> list[Path]:
    """The files that decide what kernels compile to: theirs, shared rules, the record they read."""
    package = Path(__file__).parents[1]
    shared = [package / f"{name}.py" for name in ("intervals", "philox", "sequence_record")]
    return [*sorted(package.glob("cpu/*.py")), *shared]


@cache
def _sources() -> str:
    """A digest of the sources."""
    digest = hashlib.sha256()
    for source in sources():
        digest.update(source.read_bytes())
    return digest.hexdigest()


@cache
def _environment() -> str:
    """Everything but its name and signature that decides what a kernel compiles to."""
    digest = hashlib.sha256(_sources().encode())
    settings = (config.OPT, config.BOUNDSCHECK, config.LOOP_VECTORIZE, config.SLP_VECTORIZE, config.DEBUGINFO_DEFAULT)
    versions = (numba.__version__, llvmlite.__version__, sys.version_info[:3])
    digest.update(repr((versions, settings, *target())).encode())
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
        self._address: int | None = None
        self._unwritten: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        """Load at first use what calls then find as plain attributes: a property would cost 0.1 us more each time."""
        if name not in self._uses:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = getattr(self, f"_find_{name}")()
        setattr(self, name, value)
        return value

    def _find_address(self) -> int:
        return self._get()

    def assembly(self) -> str:
        """Machine code as text; compiles afresh, because a loaded kernel has none."""
        text: str = compiler_thread.run(lambda: machine_code.assembly(self._function(), self._signature), self._title)
        return text

    @property
    def _title(self) -> str:
        return f"kernel {self.name}"

    def _get(self) -> int:
        # Loading needs no lock: a thread, or a handler that interrupts this one, may load the same file for itself.
        if self._address is None:
            forks.require_consistent_compiler(self._title)
            self._address = self._load() or compiler_thread.run(self._compile_once, self._title)
        if self._unwritten is not None:
            error, self._unwritten = self._unwritten, None
            warn_unwritten(error)
        return self._address

    def _compile_once(self) -> int:
        """Compile, unless another thread or process has done so meanwhile."""
        if self._address is None:
            self._address = self._load() or self._compile_and_save()
        return self._address

    @property
    def _kind(self) -> str:
        return f"{self.name} {self._signature}"

    @property
    def _key(self) -> str:
        """Everything that decides what this compiles to."""
        return f"{self._kind} {_environment()}"

    def _load(self) -> int | None:
        folder = directory()
        address = None if folder is None else self._load_from(folder, self._key)
        if address is None:
            key = shipped.key_of(self._kind, _sources())
            found = (self._load_from(folder, key) for folder in shipped.folders())
            address = next((address for address in found if address is not None), None)
        return address

    def _load_from(self, folder: Path, key: str) -> int | None:
        payload = read_checked(folder / file_name(self.name, key, ".kernel"), key)
        if payload is None:
            return None
        symbol, _, code = payload.partition(b"\0")
        try:
            address = machine_code.load(MachineCode(code, symbol.decode()))
        except Exception:  # every error counts as a cache miss: a damaged file must not stop a call that can compile
            return None
        self.origin = "loaded"
        return address

    def ship(self, folder: Path) -> Path:
        """Compile for the level of CPUs that this process builds for, and write a file for other machines."""
        code = compiler_thread.run(self._compile, self._title)
        key = shipped.key_of(self._kind, _sources())
        path = folder / file_name(self.name, key, ".kernel")
        write_checked(path, key, code.content, shared=True)
        return path

    def _compile_and_save(self) -> int:
        code = self._compile()
        address = machine_code.load(code)
        self.origin = "compiled"
        path = path_of(self.name, self._key, ".kernel")
        if path is not None:
            try:
                write_checked(path, self._key, code.content)
            except Exception as error:
                self._unwritten = error
        return address

    def _function(self) -> Callable[..., int]:
        function = self._make()
        # Unique symbol: Numba numbers functions of one name by order of compilation (see `Spec.jit`).
        function.__qualname__ = function.__name__ = self.name.replace("-", "_")
        return function

    def _compile(self) -> MachineCode:
        return compile_kernel(self._function(), self._signature)


class Function(Kernel):
    """A kernel that Python calls, as a built-in function.

    Parameters
    ----------
    name, make
        As of `Kernel`. All arguments of the compiled function are int64, and so is its result.
    objects : int
        Number of arguments, the first ones, that are addresses of objects. They are not checked: see `objects`.
    integers : int
        Number of arguments after these.
    nogil : bool
        Whether other threads of Python may run meanwhile.

    Attributes
    ----------
    call : callable
        The built-in function. It takes positional arguments only.
    """

    call: Callable[..., int]
    _uses = ("address", "call")

    def __init__(
        self, name: str, make: Callable[[], Callable[..., int]], objects: int, integers: int, nogil: bool = True
    ) -> None:
        self._arguments = Arguments(objects, integers, nogil)
        super().__init__(name, make, types.int64(*[types.int64] * (objects + integers)))

    def _find_call(self) -> Callable[..., int]:
        return builtin.make(self.address, self.name)  # type: ignore[no-any-return]

    def _compile(self) -> MachineCode:
        return compile_kernel(self._function(), self._signature, partial(builtin.build, arguments=self._arguments))

    @property
    def _kind(self) -> str:
        return f"{super()._kind} {self._arguments}"


class ThreadEntry(Kernel):
    """A kernel of one int64 that a thread begins with, at `address`, as a C function of one pointer."""

    def __init__(self, name: str, make: Callable[[], Callable[[int], int]]) -> None:
        super().__init__(name, make, types.int64(types.int64))

    def _compile(self) -> MachineCode:
        return compile_kernel(self._function(), self._signature, builtin.build_entry)
