"""The pool of threads: every item is done once, by threads of different numbers, whoever comes in time."""

import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from numba_attention.cpu import launch, pool, stacks
from numba_attention.cpu.cache import Kernel
from numba_attention.cpu.simd import compare_exchange, fetch, fetch_add, pause, void_pointer
from numba_attention.cpu.views import carray

MOST = 8  # threads of a call
LISTEN = 2e-4  # seconds after which helpers fall asleep, or more
COUNTER, ITEMS, ENTERED, TWICE, WAITED_FOR, STUCK, GO, LEFT = range(8)
ALL = 16  # words in front of those of the items, after which those of the threads come
PATIENCE = 4 * 10**8  # pauses of 10 to 50 ns


def make_worker():
    def count(params, thread):
        """Do every item: add 1 to its word. The caller begins when `WAITED_FOR` threads are there, helpers at `GO`."""
        words = carray(void_pointer(params), ALL, np.int64)
        fetch_add(params + 8 * ENTERED, 1)
        if not compare_exchange(params + 8 * (ALL + words[ITEMS] + thread), 0, 1):
            fetch_add(params + 8 * TWICE, 1)
        for _ in range(PATIENCE):
            if thread > 0 or fetch(params + 8 * ENTERED) >= words[WAITED_FOR]:
                break
            pause()
        while thread > 0 and words[STUCK] and not fetch(params + 8 * GO):
            pause()
        while True:
            item = fetch_add(params + 8 * COUNTER, 1)
            if item >= words[ITEMS]:
                break
            fetch_add(params + 8 * (ALL + item), 1)
        fetch_add(params + 8 * LEFT, 1)
        return 0

    return count


counting = Kernel("count-for-tests", make_worker, launch.SIGNATURE)


def words_for(items, waited_for=1, stuck=0):
    words = np.zeros(ALL + items + MOST, np.int64)
    words[ITEMS], words[WAITED_FOR], words[STUCK] = items, waited_for, stuck
    return words


@pytest.fixture
def own_pool(monkeypatch):
    """A pool of so many threads, whatever the machine has."""
    monkeypatch.setattr(pool.numba.config, "NUMBA_NUM_THREADS", MOST)
    monkeypatch.setattr(pool, "_pool", None)


def run(words, threads):
    launch.run(counting, words.ctypes.data, threads)
    items = words[ITEMS]
    assert (words[ALL : ALL + items] == 1).all(), "an item was done more than once, or not"
    assert words[ALL + items] == 1, "the caller is thread 0"
    assert 1 <= words[ENTERED] <= threads
    assert words[LEFT] == words[ENTERED], "the call ended before a helper had left"
    assert words[TWICE] == 0, "two threads had one number"
    assert not words[ALL + items + threads :].any(), "a number beyond the threads of the call"


def test_calls_at_once(own_pool):
    """More callers than slots, with more helpers than processors, which fall asleep and are woken."""
    errors = []

    def loop(seed):
        rng = np.random.default_rng(seed)
        try:
            for n in range(150):
                run(words_for(int(rng.integers(1, 400))), int(rng.integers(2, MOST + 1)))
                if n % 10 == 0:
                    time.sleep(rng.uniform(0, 5 * LISTEN))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=loop, args=(seed,)) for seed in range(pool.SLOTS + 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


@pytest.mark.parametrize("threads", [2, 3, MOST])
def test_all_helpers_come_to_a_call_that_lasts(own_pool, threads):
    """The first time they are started, then they listen, and then they are asleep."""
    for wait in (0, 0, 0, 10 * LISTEN, 10 * LISTEN):
        time.sleep(wait)
        words = words_for(100, waited_for=threads)
        run(words, threads)
        assert words[ENTERED] == threads


def test_no_call_waits_for_helpers_that_are_elsewhere(own_pool):
    """One call holds the only helper; another is done without, as if the system had taken that thread away."""
    words = words_for(10, waited_for=2, stuck=1)
    thread = threading.Thread(target=run, args=(words, 2))
    thread.start()
    end = time.monotonic() + 20
    while words[COUNTER] <= words[ITEMS] and time.monotonic() < end:
        time.sleep(0.001)
    assert words[ENTERED] == 2
    for _ in range(100):
        other = words_for(50)
        run(other, 2)
        assert other[ENTERED] == 1
    time.sleep(0.1)
    assert thread.is_alive(), "a call must wait for a helper that has begun"
    words[GO] = 1
    thread.join(20)
    assert not thread.is_alive()


def in_a_process(code, seconds=120):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, "NUMBA_NUM_THREADS": "4"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr


def test_threads_of_python_are_coroutines():
    """As gevent makes them: a function that is "started" runs at the next wait of its caller, or at once."""
    in_a_process("""
        import _thread
        _thread.start_new_thread = lambda function, arguments: function(*arguments)
        import numpy as np, numba, numba_attention as na
        x = np.ones((1, 8, 64, 64), np.float32)
        assert (na.attention(x, x, x) == 1).all()
        try:
            numba.threading_layer()
        except ValueError:  # Numba's threads were not started either
            pass
        else:
            raise AssertionError("a threading layer runs")
    """)


def test_small_stacks():
    """The least that Python allows, for threads of the caller's: kernels need more."""
    in_a_process("""
        import threading
        try:
            least = 2**15
            threading.stack_size(least)
        except ValueError:  # Python 3.14 asks for 52 KiB
            least = 2**16
            threading.stack_size(least)
        import numpy as np, numba_attention as na
        x = np.ones((1, 8, 128, 256), np.float32)
        for _ in range(3):
            out, lse = na.attention(x, x, x, is_causal=True, return_lse=True)
            np.testing.assert_allclose(out, 1, atol=1e-6)
            na.attention_backward(x, x, x, x, out, lse, is_causal=True)
            na.attention(*(y.astype("f2") for y in (x, x, x)), softcap=5.0)
        assert threading.stack_size() == least
    """)


@pytest.mark.parametrize("own", [2**17, 0])
def test_sizes_of_stacks_are_restored(own):
    """Two threads start others at the same time, where the caller has set a small size, or none."""
    before = threading.stack_size(own)
    inside, seen = threading.Event(), []

    def other():
        inside.wait(20)
        with stacks.of_size(stacks.COMPILERS):
            seen.append(threading.stack_size())
            time.sleep(0.3)  # longer than the other one is inside

    try:
        thread = threading.Thread(target=other)
        thread.start()
        with stacks.of_size(stacks.KERNELS):
            seen.append(threading.stack_size())
            inside.set()
            time.sleep(0.1)
        thread.join(20)
        assert seen == ([stacks.KERNELS, stacks.COMPILERS] if own else [0, 0])
        assert threading.stack_size() == own
    finally:
        threading.stack_size(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_process_ends_with_helpers_at_work_and_asleep():
    code = """
        import os, time
        import numpy as np, numba_attention as na
        x = np.ones((1, 8, 64, 64), np.float32)
        na.attention(x, x, x)
        child = os.fork()
        for _ in range(3):
            na.attention(x, x, x)
        if child:
            assert os.waitpid(child, 0)[1] == 0
            time.sleep(0.01)
    """
    for _ in range(3):
        in_a_process(code)
