"""Calls in the middle of other calls: from signal handlers, finalizers, weak references, profilers and tracers.

Python runs such code between any two bytecodes of a call, in the thread of that call.
"""

import gc
import itertools
import multiprocessing.synchronize  # noqa: F401 - as Numba does; an interrupted import cannot be entered again
import os
import signal
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import llvmlite.binding.ffi
import numba
import numpy as np
import pytest
import work
from isolation import isolated
from numba.core.compiler_lock import global_compiler_lock

import numba_attention as na
from numba_attention import kernel_cache
from numba_attention.backends import recall
from numba_attention.backends.cpu_resources import addresses, worker
from numba_attention.cpu import cache, launch


def shifted(n):
    """A rule of which each number makes another."""

    def mod(score, batch, head, i, j):
        return score - abs(i - j + n) / 16

    return mod


SHAPES = [(1, 1, 2, 5, 8), (2, 2, 40, 33, 16), (1, 2, 120, 130, 32)]


class Inner:
    """The calls that come in between: small and large, of every kind in turn, each with a result that is known."""

    def __init__(self):
        rng = np.random.default_rng(1)
        self.calls, self.busy, self.count = [], False, 0
        for B, H, L, S, E in SHAPES:
            query = rng.standard_normal((B, H, L, E), dtype=np.float32)
            key, value = rng.standard_normal((2, B, H, S, E), dtype=np.float32)
            cache = na.KVCache.from_arrays(key, value)
            layer = na.MultiHeadAttention(E, 2, rng=0)
            out, lse = na.attention(query, key, value, return_lse=True)
            self.calls += [
                lambda a=(query, key, value): [na.attention(*a)],
                lambda a=(out, query, key, value, out, lse): list(na.attention_backward(*a)[:3]),
                lambda a=(query[:, :, :1], cache): [na.attention_decode(*a)],
                lambda x=query[0], layer=layer: [layer(x)],
                lambda a=(query, key, value), n=L: [na.attention(*a, score_mod=shifted(n))],
            ]
        self.want = [call() for call in self.calls]
        self.order = itertools.cycle(range(len(self.calls)))

    def __call__(self, *_):
        if self.busy:
            return
        self.busy = True
        try:
            n = next(self.order)
            work.same(self.calls[n](), self.want[n])
            self.count += 1
        finally:
            self.busy = False


@pytest.mark.parametrize("name", work.CALLS)
@pytest.mark.parametrize("hook", ["setprofile", "settrace"])
@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.faults)])
@isolated(seconds=120)
def test_at_events_of_a_call(step, hook, name):
    """One inner call for each run of the outer one: at the first event, at the one after so many steps, to the last."""
    want, inner = work.prepare()[name], Inner()
    call, install = work.CALLS[name], getattr(sys, hook)
    at = 0
    step *= 1 if name != "rules" or step == 1 else 5  # such a call has many more events
    while run_with_inner_at(at, call, install, inner, want):
        at += step
    assert inner.count >= 5


def run_with_inner_at(at, call, install, inner, want):
    """Return whether the outer call had so many events."""
    events = itertools.count()

    def hook(frame, event, argument):
        if not inner.busy and next(events) == at:
            inner()
        return hook if install is sys.settrace else None

    before = inner.count
    install(hook)
    try:
        got = call()
    finally:
        install(None)
    work.same(got, want)
    return inner.count > before


@pytest.mark.parametrize("name", work.CALLS)
@isolated
def test_from_a_signal_handler(name):
    want, inner = work.prepare()[name], Inner()
    signal.signal(signal.SIGALRM, inner)
    signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0007)
    while inner.count < 40:
        work.same(work.CALLS[name](), want)
    signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.mark.parametrize("kind", ["__del__", "weakref"])
@pytest.mark.parametrize("name", work.CALLS)
@isolated
def test_from_the_garbage_collector(name, kind):
    """Which runs at any allocation of a container, in any thread."""
    want, inner = work.prepare()[name], Inner()
    references, errors = [], []

    def finalize(*_):
        try:
            inner()
        except BaseException as error:  # would only be printed
            errors.append(error)

    class Garbage:
        def __init__(self):
            self.itself = self
            if kind == "weakref":
                references.append(weakref.ref(self, finalize))

    if kind == "__del__":
        Garbage.__del__ = finalize
    before = gc.get_threshold()
    for n in range(40):
        garbage = [Garbage() for _ in range(4)]
        del garbage
        gc.set_threshold(n % 37 + 1, 1000, 1000)
        got = work.CALLS[name]()
        gc.set_threshold(*before)
        work.same(got, want)
        references.clear()
    assert not errors, errors[0]
    assert inner.count > 20


@isolated
def test_from_a_finalizer_of_an_array_that_is_passed():
    """The last reference to an input ends inside the call."""
    want, inner = work.prepare()["forward"], Inner()

    class Owned(np.ndarray):
        def __del__(self):
            inner()

    for _ in range(50):
        arrays = [x.copy().view(Owned) for x in work.inputs()[:3]]
        got = na.attention(arrays.pop(0), arrays.pop(0), arrays.pop(0), is_causal=True, return_lse=True)
        work.same(got, want)


@pytest.mark.parametrize("moment", range(5))
@isolated(seconds=20)
def test_signal_while_a_kernel_loads(moment):
    """The handler needs the kernel that the interrupted code of the same thread is loading."""
    work.textbook()
    empty = np.empty((1, 0, 32), np.float32)
    na.attention(empty, empty, empty)  # imports the backend
    calls = []

    def handler(number, frame):
        calls.append(number)
        work.check(["forward"])

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.005 * moment)
    work.check(["forward"])
    while not calls:
        signal.pause()
    work.check(["forward"])


@pytest.mark.parametrize("moment", range(5))
@isolated(seconds=30)
def test_signal_while_a_rule_compiles(moment, tmp_path):
    """The handler calls with the rule that the interrupted call translates or compiles, and with another."""
    want = work.prepare()
    compile_into(tmp_path)
    query, key, value, _ = work.inputs()
    calls = []

    def attend(n):
        return na.attention(query, key, value, score_mod=shifted(n))

    def handler(number, frame):
        calls.append((attend(1), attend(2)))
        work.same(work.rules(), want["rules"])

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.02 * moment)
    first = attend(1)
    while not calls:
        signal.pause()
    distance = np.abs(np.subtract.outer(np.arange(work.L), np.arange(work.L)) + np.array([1, 2])[:, None, None])
    for n, got in enumerate(calls[0]):
        bias = (-distance[n] / 16).astype(np.float32)
        np.testing.assert_allclose(got, na.attention(query, key, value, bias=bias), atol=1e-5)
    work.same([first], calls[0][:1])


@pytest.mark.parametrize("hook", ["setprofile", "settrace"])
@pytest.mark.parametrize("step", [29, pytest.param(3, marks=pytest.mark.faults)])
@isolated(seconds=300)
def test_at_events_of_loading(step, hook):
    """A call that needs the kernels at an event of a call that loads them, for every event after so many others."""
    work.textbook()
    numba.set_num_threads(2)
    want = work.forward()
    busy = inner = 0

    def call():
        nonlocal busy, inner
        busy = 1
        try:
            work.same(work.forward(), want)
        finally:
            busy = 0
        inner += 1

    at, install = 0, getattr(sys, hook)
    while inner == at // step:
        events = itertools.count()

        def trace(frame, event, argument, at=at, events=events):
            if not busy and next(events) == at:
                call()
            return trace if install is sys.settrace else None

        forget_kernels()
        install(trace)
        try:
            got = work.forward()
        finally:
            install(None)
        work.same(got, want)
        at += step
    assert inner > 200 // step


def forget_kernels():
    """Let the next call load what `work.forward` needs, as a new process does."""
    recall._forward.table = recall.NOTHING
    for kernel in (launch._launcher, launch._caller, addresses, worker("float32", "forward")):
        kernel._address = None
        for name in kernel._uses:
            kernel.__dict__.pop(name, None)


class Adders:
    """Small kernels, which compile in some 50 ms; each number is a new one."""

    def __init__(self):
        self._kernels = {}

    def __getitem__(self, n):
        def make():
            def add(a, b):
                return a + b + n

            return add

        return self._kernels.setdefault(n, cache.Function(f"add-{n}", make, objects=0, integers=2))

    def check(self, n):
        assert self[n].call(1, 2) == 3 + n


@isolated(seconds=120)
def test_signals_while_kernels_compile(tmp_path):
    """Handlers compile the kernel that is being compiled, and others."""
    compile_into(tmp_path)
    adders, numbers, calls = Adders(), itertools.count(1000), []

    def handler(number, frame):
        if len(calls) < 60:
            calls.append(number)
            adders.check(current)
            if len(calls) % 3 == 0:
                adders.check(next(numbers))

    signal.signal(signal.SIGALRM, handler)
    current = 0
    adders.check(0)
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.0113)
    while len(calls) < 60:
        current += 1
        adders.check(current)
    signal.setitimer(signal.ITIMER_REAL, 0)
    # One that a handler compiled first, before it was looked for on disk, is loaded: ask one that was left alone.
    adders.check(current + 1)
    assert adders[current + 1].origin == "compiled"
    work.check(["forward"])


@isolated(seconds=120)
def test_first_call_interrupted_again_and_again(tmp_path):
    """Nothing is compiled yet, not even what Numba sets up at its first compilation; the backend is imported."""
    import numba_attention.backends.cpu  # noqa: F401 - an interrupted import cannot be entered again

    work.textbook()
    compile_into(tmp_path)
    calls, inside = [], False

    def handler(number, frame):
        nonlocal inside
        if not inside:
            inside = True
            calls.append(number)
            work.check(["forward"] if len(calls) % 2 else ["forward", "decode"])
            inside = False

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.05)
    work.check(["forward"])
    while len(calls) < 5:
        signal.pause()
    signal.setitimer(signal.ITIMER_REAL, 0)


@isolated(seconds=120)
def test_finalizers_while_kernels_compile(tmp_path):
    """Garbage is collected at every allocation; its finalizers compile."""
    compile_into(tmp_path)
    adders, numbers, errors = Adders(), itertools.count(1000), []

    class Garbage:
        def __init__(self):
            self.itself = self

        def __del__(self):
            try:
                adders.check(next(numbers))
            except BaseException as error:
                errors.append(error)

    gc.set_threshold(1, 1, 1)
    for n in range(15):
        Garbage()
        adders.check(n)
        assert gc.isenabled()
    gc.collect()
    assert not errors, errors[0]
    assert next(numbers) == 1015


@isolated
def test_handler_that_interrupts_the_compiler_of_the_user(tmp_path):
    """Kernels that are loaded work there; others are refused with a reason, and the call succeeds later."""
    work.check(["forward"])
    compile_into(tmp_path)
    with global_compiler_lock:
        work.check(["forward"])
        with pytest.raises(RuntimeError, match="kernel add-1 cannot be compiled in a signal handler"):
            Adders().check(1)
    Adders().check(1)


@isolated
def test_handler_that_interrupts_a_call_of_llvm(tmp_path):
    """As while a kernel loads: the thread holds llvmlite's lock, for which a thread of the compiler would wait."""
    work.check(["forward"])
    compile_into(tmp_path)
    with llvmlite.binding.ffi.lib._lock:
        Adders().check(1)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(global_compiler_lock._lock.acquire).result()
            with pytest.raises(RuntimeError, match="kernel add-2 cannot be compiled in a signal handler"):
                Adders().check(2)
            pool.submit(global_compiler_lock._lock.release).result()
    Adders().check(2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@isolated
def test_handler_that_forks_while_a_kernel_compiles(tmp_path):
    """The child lacks the thread that compiles: it does so itself."""
    compile_into(tmp_path)
    adders, child = Adders(), None

    def handler(number, frame):
        nonlocal child
        child = os.fork()

    signal.signal(signal.SIGALRM, handler)
    for n in range(12):
        child = None
        signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.003 * n)
        adders.check(n)
        while child is None:
            signal.pause()
        if child == 0:
            signal.alarm(20)
            adders.check(n)
            adders.check(100 + n)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


def compile_into(folder):
    """Begin with an empty kernel cache."""
    os.environ[kernel_cache.ENVIRONMENT] = str(folder)
    kernel_cache.directory.cache_clear()
