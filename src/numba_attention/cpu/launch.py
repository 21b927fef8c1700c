"""Running a kernel on the threads of Numba's pool, safely on every threading layer."""

import _thread
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .. import forks
from .cache import Function, Kernel
from .simd import HOST, I8, I32, I64, Builder, Value, call, loop

VOID = ir.VoidType()
SIGNATURE = "int64(int64, int64)"  # of a worker: address of the parameters, number of the thread


def _round_as_ieee(b: Builder) -> Callable[[], None]:
    """Set this thread's floating point to IEEE 754 as it is by default; the result restores what was set.

    A caller that flushes subnormal numbers to zero (XLA's threads, ``torch.set_flush_denormal``) does not make the
    threads of the pool do so too, but a pool that such a thread starts inherits the mode for good: results would then
    depend on the number of threads, and on which of them took which tile.
    """
    if HOST.name == "NEON":
        mode = call(b, "llvm.aarch64.get.fpcr", I64)
        call(b, "llvm.aarch64.set.fpcr", VOID, I64(0))
        return lambda: (call(b, "llvm.aarch64.set.fpcr", VOID, mode), None)[1]
    if HOST.name == "generic":
        return lambda: None
    before, default = (cgutils.alloca_once(b, I32) for _ in range(2))
    at_before, at_default = (b.bitcast(x, I8.as_pointer()) for x in (before, default))
    b.store(I32(0x1F80), default)
    call(b, "llvm.x86.sse.stmxcsr", VOID, at_before)
    call(b, "llvm.x86.sse.ldmxcsr", VOID, at_default)
    return lambda: (call(b, "llvm.x86.sse.ldmxcsr", VOID, at_before), None)[1]


def _call_worker(context: Any, b: Builder, worker: Value, params: Value, thread: Value) -> Value:
    """Call the worker whose machine code is at an address; 1 if it failed, else 0."""
    arguments = (types.int64, types.int64)
    convention = context.call_conv
    pointer = b.inttoptr(worker, convention.get_function_type(types.int64, arguments).as_pointer())
    restore = _round_as_ieee(b)
    status, _ = convention.call_function(b, pointer, types.int64, arguments, [params, thread])
    restore()
    # Workers raise nothing except IndexError with NUMBA_BOUNDSCHECK=1, which must reach the caller.
    return b.zext(status.is_error, I64)


@intrinsic
def _call(typing_context: Any, worker: Any, params: Any, thread: Any) -> Any:
    """Call a worker in this thread; 1 if it failed, else 0."""

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        return _call_worker(context, builder, *args)

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def _call_on_threads(typing_context: Any, pool: Any, size: Any, worker: Any, params: Any, threads: Any) -> Any:
    """Call a worker in so many threads of Numba's pool; 1 if it failed in any, else 0.

    `pool` and `size` are the addresses of two functions of the threading layer (numba/np/ufunc/parallel.py):
    ``numba_parallel_for``, which calls a function of the kind of a generalised ufunc in all threads of the pool that
    may be used, and ``get_num_threads``, which tells their number.
    """

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        pool, size, worker, params, threads = args
        words = I64.as_pointer()
        pointers = I8.as_pointer().as_pointer()
        # What every thread needs: worker, params, threads, and whether the worker failed.
        shared = cgutils.alloca_once(builder, I64, 4)
        for n, value in enumerate((worker, params, threads, I64(0))):
            builder.store(value, builder.gep(shared, [I64(n)]))
        kind = ir.FunctionType(VOID, [pointers, words, words, I8.as_pointer()])
        body = ir.Function(builder.module, kind, f"{builder.function.name}.thread")
        body.linkage = "internal"
        _build_thread(context, body)
        # An array of bytes at address 0, of which thread i gets element i: so its address is the thread's number.
        null = cgutils.alloca_once(builder, I8.as_pointer())
        builder.store(ir.Constant(I8.as_pointer(), None), null)
        ones = cgutils.alloca_once(builder, I64)
        builder.store(I64(1), ones)
        number = builder.call(builder.inttoptr(size, ir.FunctionType(I32, []).as_pointer()), [])
        length = cgutils.alloca_once(builder, I64)
        # One element for every thread, though some have no work: a team of another size would cost OpenMP new threads,
        # and the work queue gives all elements to one thread where they are fewer than the threads.
        builder.store(builder.sext(number, I64), length)
        bytes_ = I8.as_pointer()
        arguments = [builder.bitcast(x, bytes_) for x in (body, null, length, ones, shared)]
        kinds = [bytes_, pointers, words, words, bytes_, I64, I64, I32]
        arguments = [builder.bitcast(x, kind) for x, kind in zip(arguments, kinds, strict=False)]
        function = builder.inttoptr(pool, ir.FunctionType(VOID, kinds).as_pointer())
        builder.call(function, [*arguments, I64(0), I64(1), number])
        return builder.load(builder.gep(shared, [I64(3)]))

    return types.int64(*[types.int64] * 5), codegen


def _build_thread(context: Any, function: Any) -> None:
    """What a thread of the pool does with its elements, of which it may have several."""
    elements, lengths, _, shared = function.args
    b = ir.IRBuilder(function.append_basic_block())
    first = b.ptrtoint(b.load(elements), I64)
    shared = b.bitcast(shared, I64.as_pointer())
    worker, params, threads = (b.load(b.gep(shared, [I64(n)])) for n in range(3))

    def body(i: Value, carried: list[Value]) -> list[Value]:
        thread = b.add(first, i)
        with b.if_then(b.icmp_signed("<", thread, threads)):
            failed = _call_worker(context, b, worker, params, thread)
            with b.if_then(b.icmp_signed("!=", failed, I64(0)), likely=False):
                b.store_atomic(I64(1), b.gep(shared, [I64(3)]), "monotonic", 8)
        return []

    loop(b, b.load(lengths), [], body)
    b.ret_void()


def _make_launcher() -> Any:
    def launch(pool: int, size: int, worker: int, params: int, threads: int) -> int:
        return int(_call_on_threads(pool, size, worker, params, threads))

    return launch


def _make_caller() -> Any:
    def call_alone(worker: int, params: int) -> int:
        return int(_call(worker, params, np.int64(0)))

    return call_alone


# Function pointers: one parallel region serves all kernels, whose workers are plain functions called by address. A
# kernel is compiled once, for serial and parallel use.
_launcher = Function("launch", _make_launcher, objects=0, integers=5)
_caller = Function("call", _make_caller, objects=0, integers=2)
_workqueue_lock = forks.renewed()


def threads() -> int:
    """How many threads a call may use: as set by `numba.set_num_threads` in this thread, 1 where more are unsafe."""
    return 1 if forks.openmp_is_lost() else int(numba.get_num_threads())


def threading_layer() -> str:
    """The threading layer in use, starting it if need be; "serial" in a forked child that must not use it."""
    if forks.openmp_is_lost():
        return "serial (forked from a process that used OpenMP)"
    numba.get_num_threads()  # starts the layer, under a lock of Numba's, and enters no region
    return str(numba.threading_layer())


@cache
def _pool() -> tuple[int, int]:
    """Addresses of the threading layer's functions, which are registered with LLVM when it starts."""
    pool, size = (llvm.address_of_symbol(name) for name in ("numba_parallel_for", "get_num_threads"))
    return pool or 0, size or 0


def pool() -> tuple[int, int]:
    """What `_call_on_threads` needs, once the threading layer runs; zeros on workqueue, whose calls must wait."""
    return (0, 0) if numba.threading_layer() == "workqueue" else _pool()


def run(worker: Kernel, params: int, number: int) -> None:
    """Run a worker on `number` threads; a single one needs no parallel region.

    Raises
    ------
    IndexError
        With NUMBA_BOUNDSCHECK=1, if the worker reads or writes outside an array.
    """
    address = worker.address
    if number == 1:
        failed = _caller.call(address, params)
    elif numba.threading_layer() == "workqueue":  # `threads` has started it
        with _workqueue_lock:  # two Python threads in this layer at once abort the process
            failed = _launcher.call(*_pool(), address, params, number)
    else:
        failed = _launcher.call(*_pool(), address, params, number)
    if failed:
        raise IndexError(f"kernel {worker.name} reads or writes outside an array")


def run_interruptibly(worker: Kernel, params: int, number: int, stop: Callable[[], None], *kept: object) -> None:
    """Run a worker as `run` does, in a thread of its own, while the main thread waits for signals too.

    Python runs signal handlers in its main thread and not before a call of machine code returns. If one raises, `stop`
    tells the worker to return early, and the exception goes on when it has. The thread lives as long as the call: one
    that stayed would keep a second pool of OpenMP, and with more threads than cores GNU OpenMP stops spinning between
    regions, after which every small one takes 11 us and not 1.3. Starting it costs 60 to 90 us.

    Parameters
    ----------
    worker, params, number
        As for `run`.
    stop : callable
        Makes the worker return.
    *kept : object
        What must live as long as the worker runs.
    """
    worker.address  # noqa: B018 - compiled or loaded here, where Ctrl-C is heard
    call = _Call(worker, params, number, kept)
    try:
        try:
            _thread.start_new_thread(call.work, ())
        except RuntimeError:  # the system has no more threads: the call runs here, and cannot be interrupted
            return run(worker, params, number)
        call.wait()
    except BaseException:
        while not call.is_over:  # later signals are ignored: the first exception is raised
            with suppress(BaseException):
                stop()
                call.give_up()
        raise
    if call.error:
        raise call.error


class _Call:
    """A call in a thread of its own. An exception may come to the main thread at any line, also twice at one."""

    def __init__(self, worker: Kernel, params: int, number: int, kept: object) -> None:
        self._arguments = worker, params, number
        self._kept = kept
        self._owner: dict[str, str] = {}  # "worker" if it may begin, "main" if it must not
        self._wake = _thread.allocate_lock()
        self._wake.acquire()
        self.is_over = False
        self.error: BaseException | None = None

    def work(self) -> None:
        try:
            if self._owner.setdefault("owner", "worker") == "worker":
                if self._arguments[-1] > 1:
                    numba.set_num_threads(self._arguments[-1])
                run(*self._arguments)
        except BaseException as error:
            self.error = error
        finally:
            self.is_over = True
            self._wake.release()

    def wait(self) -> None:
        """Return when the worker has."""
        while not self.is_over:
            self._wake.acquire(timeout=0.1)  # on Windows, waiting for a lock is not interrupted

    def give_up(self) -> None:
        """Return when the worker has, or will never begin."""
        if self._owner.setdefault("owner", "main") == "main":
            self.is_over = True
        self.wait()
