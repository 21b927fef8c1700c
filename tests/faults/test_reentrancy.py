"""Calls in the middle of other calls: from signal handlers, finalizers, weak references, profilers and tracers.

Python runs such code between any two bytecodes of a call, in the thread of that call.
"""

import gc
import itertools
import multiprocessing.synchronize  # noqa: F401 - as Numba does; an interrupted import cannot be entered again
import signal
import sys
import weakref

import numpy as np
import pytest
import work
from isolation import isolated

import numba_attention as na

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
    """The handler needs the kernel whose lock the interrupted code of the same thread holds."""
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
