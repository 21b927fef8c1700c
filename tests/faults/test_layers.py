"""Calls from several Python threads, and beside parallel functions of Numba on each of its threading layers."""

import contextlib
import threading

import numba
import numpy as np
import pytest
import work
from isolation import LAYERS, isolated

import numba_attention as na


def together(functions):
    """Run functions in threads of their own that begin at once; the first exception is raised."""
    barrier, errors = threading.Barrier(len(functions)), []

    def target(function):
        try:
            barrier.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=target, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("name", ["forward", "mixed"])
@isolated
def test_first_parallel_call_from_eight_threads(name):
    """Also the first load of the kernels: nothing in the process has run before."""
    work.textbook()
    names = ["forward"] if name == "forward" else ["forward", "backward", "decode", "varlen"]
    if name == "mixed":
        numba.set_num_threads(1)
        work._forward_once()
    together([lambda name=name: work.check([name]) for name in (names * 8)[:8]])
    work.check()


@isolated
def test_calls_of_every_kind_from_eight_threads():
    want = work.prepare()

    def loop(first):
        names = list(work.CALLS)
        for n in range(25):
            name = names[(first + n) % len(names)]
            if name == "layer":  # `grads` of a shared layer belong to its last backward
                work.same([work.layer()(work.inputs()[0][0], is_causal=True)], want["layer"][:1])
            else:
                work.same(work.CALLS[name](), want[name])

    together([lambda first=first: loop(first) for first in range(8)])


@isolated
def test_threads_of_different_numbers_of_threads():
    want = work.prepare()

    def loop(number):
        numba.set_num_threads(number)
        for _ in range(50):
            work.same(work.forward(), want["forward"])
        assert numba.get_num_threads() == number

    together([lambda number=number: loop(number) for number in (1, 2, 1, 2)])


@pytest.mark.parametrize("layer", LAYERS)
@isolated
def test_beside_a_parallel_function_of_the_user(layer):
    """One loop of that function: on workqueue two at once end the process, whoever runs them."""
    want = work.prepare()
    sums = make_sums()

    def loop(call, want):
        for _ in range(50):
            work.same(call(), want)

    def ours():
        loop(work.forward, want["forward"])

    together([ours, lambda: loop(lambda: [sums(10_000)], [sums(10_000)]), ours])


@isolated(NUMBA_THREADING_LAYER="workqueue")
def test_after_a_parallel_function_of_the_user_on_workqueue():
    sums = make_sums()
    assert sums(1000) == 499500
    together([work.check] * 4)


@isolated
def test_threads_come_and_go():
    """Each thread has buffers of its own, which end with it."""
    want = work.prepare()
    for _ in range(100):
        together([lambda: work.same(work.decode(), want["decode"])] * 3)


@isolated
def test_pages_are_freed_while_another_thread_reads_them():
    """The table then has page -1, whose address lies before the array: large pages end at memory that is not mapped."""
    cache = na.PagedKVCache(4, 1024, 8, 256, dtype=np.float32)
    rng = np.random.default_rng(0)
    key = rng.standard_normal((1, 8, 4000, 256), dtype=np.float32)
    (one,) = cache.add(1)
    cache.append([one], key, key)
    query, done = rng.standard_normal((1, 8, 1, 256), dtype=np.float32), threading.Event()

    def read():
        while not done.is_set():
            with contextlib.suppress(ValueError):  # fewer keys than rows at this moment
                na.attention_decode(query, cache, ids=[one])

    def change():
        try:
            for n in range(150):
                cache.truncate(one, n % 2)
                cache.append([one], key, key, lengths=4000 - n % 2)
        finally:
            done.set()

    together([read, read, change])
    cache.truncate(one, 0)
    cache.append([one], key, key)
    scores = query[0, :, 0, None].astype("f8") @ key[0].astype("f8").swapaxes(-1, -2) / 16
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = (weights / weights.sum(-1, keepdims=True)) @ key[0]
    np.testing.assert_allclose(na.attention_decode(query, cache, ids=[one])[0], want, atol=1e-5)


def make_sums():
    """Return a parallel function as a user would write it."""

    @numba.njit(parallel=True)
    def sums(n):
        total = 0
        for i in numba.prange(n):
            total += i
        return total

    return sums
