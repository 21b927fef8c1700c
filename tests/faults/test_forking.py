"""Processes that are forked at the worst moments, and those that begin anew."""

import multiprocessing
import multiprocessing.synchronize
import os
import signal
import sys
import threading
import time

import numba
import numpy as np
import pytest
import work
from isolation import LAYERS, isolated

import numba_attention as na


def in_child(function, seconds=20):
    """Fork, run a function in the child, and hold it to its end within so many seconds."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"child: {os.waitstatus_to_exitcode(status)}"
            return
        time.sleep(0.005)
    os.kill(child, signal.SIGABRT)  # faulthandler says where it is
    os.waitpid(child, 0)
    raise AssertionError(f"child did not end within {seconds} s")


def import_all():
    """Import what a first call imports: Python itself leaves a module locked that was being imported at a fork."""
    empty = np.empty((1, 0, 32), np.float32)
    na.attention(empty, empty, empty)


def make_users_function():
    @numba.njit(parallel=True)
    def double(x):
        out = np.empty_like(x)
        for i in numba.prange(len(x)):
            out[i] = 2 * x[i]
        return out

    return double


@isolated
def test_after_use():
    want = work.prepare()

    def compute():
        for name, call in work.CALLS.items():
            work.same(call(), want[name])

    in_child(compute)
    in_child(lambda: in_child(compute))
    compute()


@isolated
def test_before_use():
    in_child(work.check)
    work.check()


@pytest.mark.parametrize("used", ["nothing", "one thread"])
@pytest.mark.parametrize("layer", LAYERS)
@isolated
def test_after_a_parallel_function_of_the_user(layer, used):
    """Which started the pool of threads that a child of OpenMP must not use, before this package ran in parallel."""
    if used == "one thread":
        numba.set_num_threads(1)
        work.check()
        numba.set_num_threads(2)
    double = make_users_function()
    np.testing.assert_array_equal(double(np.ones(1000)), 2)
    in_child(work.check)
    work.check()


@isolated
def test_while_another_thread_computes():
    want, done = work.prepare(), threading.Event()

    def loop():
        while not done.is_set():
            work.forward()
            work.backward()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        for _ in range(20):
            time.sleep(0.003)
            in_child(lambda: work.same(work.forward() + work.decode(), want["forward"] + want["decode"]))
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("threads", [1, 2])
@isolated
def test_while_another_thread_loads_kernels(threads):
    """From a cache that is full: locks that are held at the fork are held for ever in the child."""
    work.textbook()
    import_all()
    numba.set_num_threads(threads)
    thread = threading.Thread(target=work.check)
    thread.start()
    children = 0
    while thread.is_alive():
        in_child(work.check)
        children += 1
        time.sleep(0.001)
    thread.join()
    assert children
    work.check()


@isolated(seconds=120)
def test_while_another_thread_compiles(tmp_path):
    os.environ["NUMBA_ATTENTION_CACHE_DIR"] = tmp_path
    work.textbook()
    import_all()
    thread = threading.Thread(target=work.check, args=[["forward"]])
    thread.start()
    time.sleep(1.5)
    assert thread.is_alive()  # it takes some seconds
    in_child(lambda: work.check(["forward"]), seconds=60)
    thread.join()
    work.check(["forward"])


@isolated
def test_while_another_thread_compiles_a_function_of_the_user():
    """Numba has one lock for all compiling, which a kernel that is loaded does without."""
    work.prepare()
    thread = threading.Thread(target=lambda: make_users_function()(np.ones(10)))
    thread.start()
    time.sleep(0.1)
    in_child(work.check)
    thread.join()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@isolated
def test_multiprocessing(method):
    work.prepare()
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["numba_attention"])
    processes = [context.Process(target=work.check) for _ in range(2)]
    for process in processes:
        process.start()
    work.check()
    for process in processes:
        process.join(40)
        assert process.exitcode == 0
    work.check()


@isolated
def test_pool_that_is_forked_from_a_thread():
    """As a server does that computes in threads and hands some work to processes."""
    work.prepare()
    results = []

    def serve():
        with multiprocessing.get_context("fork").Pool(2) as pool:
            results.append(pool.apply_async(work.forward).get(30))

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(20):
        work.forward()
    thread.join()
    work.same(results[0], work.forward())


@isolated
def test_settings_survive_in_the_child():
    work.prepare()
    numba.set_num_threads(1)

    def check():
        assert numba.get_num_threads() == 1
        assert na.show_config("dicts")["CPU"]["threads"].startswith("1 in use")
        work.check()

    in_child(check)
