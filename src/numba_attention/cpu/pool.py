"""The package's own pool of threads, of which a call waits only for those that have begun to work for it.

A caller rings a bell and works itself. A helper that hears it takes a ticket of the call and then work items, as the
caller does, until none is left; when the caller finds none, it takes the remaining tickets back. A helper that the
system does not let run in time thus finds nothing to do, and the call is as fast as on fewer threads. The parallel
regions of Numba's threading layers, in contrast, end when every thread has been there: beside a process that holds a
core, a call of 30 us then takes as long as the scheduler's slice, up to 30 ms.

All that threads share lies in memory that is never freed, in cache lines of their own: the bell and the number of
helpers that listen; slots, each of a call; and the helpers. Threads sleep at locks of Python, which are semaphores and
need neither the GIL nor the thread that acquired them. A slot's gate says, in one word that changes atomically, whether
the call still has tickets, how many, and how many helpers work for it; its generation distinguishes it from earlier
calls. Whoever works for a call has counted itself in before, so that all that belongs to it is there until it leaves.
"""

import ctypes
import os
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .. import forks
from . import stacks
from .cache import ThreadEntry
from .machine_code import part
from .simd import HOST, I8, I32, I64, Builder, Value, call, compare_exchange, fetch, fetch_add, pause, void_pointer
from .views import carray

VOID = ir.VoidType()
LINE = 16  # words of two cache lines, which some processors fetch together
SLOTS = 16  # calls that can have helpers at a time; a further one works alone
BELL, IDLE, CAPACITY = 0, LINE, 2 * LINE
FIRST_SLOT = 3 * LINE
GATE, OWNER, WORKER, PARAMS, FAILED, WAITING, LOCK = 0, *range(LINE, LINE + 6)  # of a slot, which has two lines
SLOT = 2 * LINE
FIRST_HELPER = FIRST_SLOT + SLOTS * SLOT
ASLEEP, WAKE, POOL, NUMBER = range(4)  # of a helper, which has one line
# The gate: helpers at work, tickets that are left, whether the call is open, generation.
RUNNING, TICKET, TICKETS, OPEN, GENERATION = 2**16 - 1, 2**16, 2**31 - 2**16, 2**31, 2**32
# A thread listens before it sleeps, because waking it costs the caller 3 us and takes 10 to 50 us. After each round it
# offers its core to other threads of the system, which may be the caller's core where all are busy.
ROUNDS, PAUSES = 10, 400  # of 25 ns on a Zen 5 and 45 on a Skylake: 0.1 to 0.2 ms in all


def _round_as_ieee(b: Builder) -> Callable[[], None]:
    """Set this thread's floating point to IEEE 754 as it is by default; the result restores what was set.

    A caller that flushes subnormal numbers to zero (XLA's threads, ``torch.set_flush_denormal``) does not make other
    threads do so too, but a thread that it starts inherits the mode for good: results would then depend on the number
    of threads, and on which of them took which tile.
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


@intrinsic
def call_worker(typing_context: Any, worker: Any, params: Any, thread: Any) -> Any:
    """Call the worker whose machine code is at an address, in this thread; 1 if it failed, else 0."""

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        worker, params, thread = args
        arguments = (types.int64, types.int64)
        convention = context.call_conv
        pointer = b.inttoptr(worker, convention.get_function_type(types.int64, arguments).as_pointer())
        restore = _round_as_ieee(b)
        status, _ = convention.call_function(b, pointer, types.int64, arguments, [params, thread])
        restore()
        # Workers raise nothing except IndexError with NUMBA_BOUNDSCHECK=1, which must reach the caller.
        return b.zext(status.is_error, I64)

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def _acquire(typing_context: Any, lock: Any) -> Any:
    """Wait for a lock of Python. Of Python's stable ABI, and without the GIL."""

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        return b.sext(call(b, "PyThread_acquire_lock", I32, b.inttoptr(args[0], I8.as_pointer()), I32(1)), I64)

    return types.int64(types.int64), codegen


@intrinsic
def _release(typing_context: Any, lock: Any) -> Any:
    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        call(b, "PyThread_release_lock", VOID, b.inttoptr(args[0], I8.as_pointer()))
        return I64(0)

    return types.int64(types.int64), codegen


@intrinsic
def _yield(typing_context: Any) -> Any:
    """Let another thread of the system run on this core, if there is one (POSIX; Windows)."""

    def codegen(context: Any, b: Builder, signature: Any, args: Any) -> Value:
        return b.sext(call(b, "SwitchToThread" if os.name == "nt" else "sched_yield", I32), I64)

    return types.int64(), codegen


@part
def _word(address: int) -> int:
    return int(carray(void_pointer(address), 1, np.int64)[0])


@part
def listen(address: int, value: int, mask: int) -> bool:
    """Wait for a word to have another value, as far as the mask goes, and not for long; whether it has."""
    for _ in range(ROUNDS):
        for _ in range(PAUSES):
            if fetch(address) & mask != value & mask:
                return True
            pause()
        _yield()
    return False


@part
def _wake(pool: int, tickets: int) -> None:
    """Wake helpers if more are needed than listen: two, each of which wakes further ones, as waking takes 3 us."""
    missing = min(tickets - fetch(pool + 8 * IDLE), 2)
    helper = pool + 8 * FIRST_HELPER
    last = helper + 8 * LINE * _word(pool + 8 * CAPACITY)
    while missing > 0 and helper < last:
        if fetch(helper + 8 * ASLEEP) and compare_exchange(helper + 8 * ASLEEP, 1, 0):
            _release(_word(helper + 8 * WAKE))
            missing -= 1
        helper += 8 * LINE


@part
def call_on_threads(pool: int, worker: int, params: int, threads: int) -> int:
    """Call a worker in this thread, and in up to ``threads - 1`` helpers that come in time; 1 if it failed, else 0."""
    slot = pool + 8 * FIRST_SLOT
    end = slot + 8 * SLOT * SLOTS
    while slot < end and not compare_exchange(slot + 8 * OWNER, 0, 1):
        slot += 8 * SLOT
    if slot == end:
        return int(call_worker(worker, params, np.int64(0)))
    words = carray(void_pointer(slot), SLOT, np.int64)
    words[WORKER], words[PARAMS], words[FAILED] = worker, params, 0
    gate = words[GATE]
    opened = (gate // GENERATION + 1) % 2**30 * GENERATION + OPEN + (threads - 1) * TICKET
    fetch_add(slot, opened - gate)
    fetch_add(pool + 8 * BELL, 1)
    _wake(pool, threads - 1)
    failed = call_worker(worker, params, np.int64(0))
    gate = fetch_add(slot, -OPEN) - OPEN
    while gate & RUNNING:
        if not listen(slot, gate, RUNNING):
            # The last helper to leave takes the mark and releases the lock. If there is none any more, the mark is
            # taken back; if that fails, the lock is about to be released.
            fetch_add(slot + 8 * WAITING, 1)
            if fetch_add(slot, 0) & RUNNING or not compare_exchange(slot + 8 * WAITING, 1, 0):
                _acquire(words[LOCK])
        gate = fetch_add(slot, 0)
    failed |= words[FAILED]
    fetch_add(slot + 8 * OWNER, -1)
    return int(failed)


@part
def _help(pool: int, slot: int) -> bool:
    """Work for the call in a slot if it has tickets; whether it had."""
    gate = fetch(slot)
    while gate & OPEN and gate & TICKETS:
        if compare_exchange(slot, gate, gate - TICKET + 1):
            words = carray(void_pointer(slot), SLOT, np.int64)
            tickets = (gate & TICKETS) // TICKET
            _wake(pool, tickets - 1)
            if call_worker(words[WORKER], words[PARAMS], tickets):
                words[FAILED] = 1
            gate = fetch_add(slot, -1) - 1
            if gate & (OPEN + RUNNING) == 0 and compare_exchange(slot + 8 * WAITING, 1, 0):
                _release(words[LOCK])
            return True
        gate = fetch(slot)
    return False


def _make_serve() -> Any:
    def serve(helper: int) -> int:
        """What a helper does, for ever."""
        pool, number = _word(helper + 8 * POOL), _word(helper + 8 * NUMBER)
        slots = pool + 8 * FIRST_SLOT
        while True:
            heard = fetch_add(pool + 8 * BELL, 0)
            has_helped = False
            for n in range(SLOTS):
                has_helped = _help(pool, slots + 8 * SLOT * ((n + number) % SLOTS)) or has_helped
            if has_helped:
                continue
            fetch_add(pool + 8 * IDLE, 1)
            hears = listen(pool + 8 * BELL, heard, -1)
            fetch_add(pool + 8 * IDLE, -1)
            if hears:
                continue
            fetch_add(helper + 8 * ASLEEP, 1)
            # Who rings now sees that this thread is asleep; who rang before is heard here. If waking it has begun, the
            # lock is released soon.
            if fetch_add(pool + 8 * BELL, 0) == heard or not compare_exchange(helper + 8 * ASLEEP, 1, 0):
                _acquire(_word(helper + 8 * WAKE))

    return serve


serve = ThreadEntry("serve", _make_serve)


def _python(name: str, result: Any, *arguments: Any) -> Any:
    """A function of Python's C API, of its stable ABI."""
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_allocate = _python("PyMem_RawCalloc", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
_allocate_lock = _python("PyThread_allocate_lock", ctypes.c_void_p)
_acquire_lock = _python("PyThread_acquire_lock", ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
# Not by `_thread`: a helper runs no Python, and what gevent has that module start are not threads of the system.
_start_thread = _python("PyThread_start_new_thread", ctypes.c_ulong, ctypes.c_void_p, ctypes.c_void_p)
NO_THREAD = ctypes.c_ulong(-1).value


def _new_lock() -> int:
    """The address of a lock of Python that is held."""
    lock = _allocate_lock()
    if not lock:
        raise MemoryError("no lock for a thread")
    _acquire_lock(lock, 1)
    return int(lock)


def _new_words(number: int) -> Any:
    """Zeros at the begin of a line, which are never freed: a helper reads them as long as the process lives."""
    size = 8 * (number + LINE)
    address = _allocate(1, size)
    if not address:
        raise MemoryError("no memory for the threads of a pool")
    words = np.frombuffer(memoryview((ctypes.c_int64 * (number + LINE)).from_address(address)), np.int64)
    return words[-address % (8 * LINE) // 8 :][:number]


class _Pool:
    def __init__(self) -> None:
        capacity = int(numba.config.NUMBA_NUM_THREADS) - 1
        words = _new_words(FIRST_HELPER + LINE * capacity)
        self.address = words.ctypes.data
        words[CAPACITY] = capacity
        words[FIRST_SLOT:FIRST_HELPER].reshape(SLOTS, SLOT)[:, LOCK] = [_new_lock() for _ in range(SLOTS)]
        helpers = words[FIRST_HELPER:].reshape(capacity, LINE)
        helpers[:, WAKE] = [_new_lock() for _ in range(capacity)]
        helpers[:, POOL], helpers[:, NUMBER] = self.address, range(capacity)
        self._unused = list(range(capacity))[::-1]
        self.size = 1  # a caller, and the helpers that have been started

    def grow(self, threads: int) -> None:
        """Start helpers, unless there are enough or the system has no more threads."""
        while self.size < threads and self._unused:
            number = self._unused.pop()  # by one operation: a signal handler that calls the package must not get it too
            with stacks.of_size(stacks.KERNELS):
                thread = _start_thread(serve.address, self.address + 8 * (FIRST_HELPER + LINE * number))
            if thread == NO_THREAD:
                self._unused.append(number)
                return
            self.size += 1


_pool: _Pool | None = None
_lock = forks.renewed()


def address_for(threads: int) -> int:
    """The address of the pool, with helpers for calls on so many threads."""
    global _pool
    pool = _pool
    if pool is None or pool.size < threads:
        with _lock:
            if _pool is None:
                _pool = _Pool()
            pool = _pool
            pool.grow(threads)
    return int(pool.address)


def _forget() -> None:
    """A forked child has no helpers: its first call on several threads starts new ones."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
