"""Threads, forks, signals and nested calls at the worst moments: each case in its own process, with a time limit."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

LAYERS = ["omp", "workqueue", "tbb"]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
needs_signals = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")

# Right values are textbook NumPy in float64 on plain arrays, so that nothing of the package judges itself.
PREPARE = """
    import os, signal, sys, threading, time
    import numpy as np, numba
    import numba_attention as na

    rng = np.random.default_rng(0)

    def arrays(B, H, L, E, dtype=np.float32):
        return [rng.standard_normal((B, H, L, E)).astype(dtype) for _ in range(3)]

    def textbook(q, k, v, scale=None):
        q, k, v = (x.astype(np.float64) for x in (q, k, v))
        s = q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1])
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        return p @ v

    def close(a, b):
        np.testing.assert_allclose(a, b, atol=2e-5)

    q, k, v = arrays(2, 4, 300, 32)
    expected = textbook(q, k, v)
"""


def run(body, layer="omp", timeout=240, prepare=PREPARE, **environment):
    code = textwrap.dedent(prepare) + textwrap.dedent(body)
    env = {
        **os.environ,
        "NUMBA_THREADING_LAYER": layer,
        "NUMBA_NUM_THREADS": "2",
        **environment,
    }
    libraries = [str(Path(sys.prefix) / "lib"), env.get("LD_LIBRARY_PATH", "")]  # where pip puts TBB, and nobody looks
    env["LD_LIBRARY_PATH"] = os.pathsep.join(x for x in libraries if x)
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code], env=env, capture_output=True, text=True, timeout=timeout
    )
    if "No threading layer could be loaded" in done.stderr:
        pytest.skip(f"{layer} is not installed")
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_a_second_import_after_modules_were_removed():
    """As tools do that reload code: both copies of the package work, also for kernels that are compiled afterwards."""
    run(
        """
        small = [x[:, :, :40] for x in (q, k, v)]
        first = na.attention(*small)
        for name in [name for name in sys.modules if name.startswith("numba_attention")]:
            del sys.modules[name]
        import numba_attention as again

        assert again is not na
        np.testing.assert_array_equal(again.attention(*small), first)
        for one in (again, na):
            close(one.attention(q, k, v), expected)
            np.testing.assert_allclose(
                one.attention(*[x.astype(np.float64) for x in (q, k, v)], score_mod=one.mods.softcap, mod_args=(1e9,)),
                expected,
            )
        """,
    )


def test_first_parallel_calls_of_many_threads():
    run(
        """
        small = [x[:, :, :1, :4] for x in (q, k, v)]
        na.attention(*small)  # kernels are loaded; no helpers yet
        assert na.attention_backward(small[0], *small, *na.attention(*small, return_lse=True))
        barrier, wrong = threading.Barrier(8), []

        def first():
            try:
                barrier.wait()
                close(na.attention(q, k, v), expected)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=first) for _ in range(8)]
        [t.start() for t in threads]; [t.join() for t in threads]
        assert not wrong, wrong[0]
        """,
    )


def test_show_config_beside_calls():
    run(
        """
        small = [x[:, :, :1, :4] for x in (q, k, v)]
        na.attention(*small)
        barrier, wrong = threading.Barrier(6), []

        def first(look):
            try:
                barrier.wait()
                for _ in range(20):
                    na.show_config("dicts") if look else close(na.attention(q, k, v), expected)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=first, args=(n % 2,)) for n in range(6)]
        [t.start() for t in threads]; [t.join() for t in threads]
        assert not wrong, wrong[0]
        """,
    )


NESTED = """
    out, lse = na.attention(q, k, v, return_lse=True)
    grad = rng.standard_normal(out.shape).astype(np.float32)
    q1, k1, v1 = arrays(1, 2, 40, 16)
    o1, lse1 = na.attention(q1, k1, v1, return_lse=True)
    cache = na.KVCache(1, 2, 1200, 16)
    cache.append(*arrays(1, 2, 1100, 16)[:2])
    other = na.KVCache(2, 4, 300, 32)
    other.append(k, v)
    layer = na.MultiHeadAttention(64, 4, rng=0)
    x = rng.standard_normal((3, 50, 64)).astype(np.float32)
    y, ctx = layer.forward(x)

    def grads():
        layer.zero_grad() if hasattr(layer, "zero_grad") else None
        layer.forward(x)
        return layer.backward(np.ones_like(y), ctx)

    calls = {
        "forward": lambda: na.attention(q, k, v),
        "weights": lambda: na.attention_weights(q, k),
        "backward": lambda: na.attention_backward(grad, q, k, v, out, lse)[:3],
        "decode": lambda: na.attention_decode(q[:, :, -1:], other),
        "step": lambda: na.attention_decode(q1[:, :, -1:], cache),
        "layer": lambda: layer(x),
    }
    def inner():
        na.attention(q1, k1, v1)
        na.attention_backward(o1, q1, k1, v1, o1, lse1)
        na.attention_decode(q1[:, :, -1:], cache)
        na.attention_weights(q1, k1)
        layer(x[:1, :3])
    wanted = {name: call() for name, call in calls.items()}
    inner()

    def same(a, b):
        for x, y in zip(a if isinstance(a, tuple) else (a,), b if isinstance(b, tuple) else (b,)):
            np.testing.assert_array_equal(x, y)
"""


def test_nested_call_at_every_line():
    """A trace function stands for a handler or finalizer: it calls between any two lines of the package."""
    run(
        PREPARE
        + NESTED
        + """
    busy = False
    steps = 0

    def trace(frame, event, argument):
        global busy, steps
        if "numba_attention" not in frame.f_code.co_filename:
            return None
        if event == "line" and not busy:
            busy, steps = True, steps + 1
            try:
                inner()
            finally:
                busy = False
        return trace

    for name, call in calls.items():
        sys.settrace(trace)
        try:
            result = call()
        finally:
            sys.settrace(None)
        try:
            same(result, wanted[name])
        except AssertionError as error:
            raise AssertionError(name) from error
    assert steps > 500, steps
    """,
        prepare="",
    )


@needs_signals
def test_calls_from_a_signal_handler():
    run(
        PREPARE
        + NESTED
        + """
    seen = 0
    def handler(number, frame):
        global seen
        seen += 1
        inner()
    signal.signal(signal.SIGALRM, handler)
    end = time.monotonic() + 8
    while time.monotonic() < end:
        for name, call in calls.items():
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 2e-3))
            result = call()
            signal.setitimer(signal.ITIMER_REAL, 0)
            same(result, wanted[name])
    assert seen > 50, seen
    """,
        prepare="",
    )


@needs_fork
@pytest.mark.parametrize("layer", LAYERS)
def test_fork_after_another_function_used_the_threads(layer):
    """GNU OpenMP ends a child that uses it after its parent did, in whatever function."""
    run(
        """
        @numba.njit(parallel=True)
        def users(n):
            total = 0
            for i in numba.prange(n):
                total += i
            return total

        users(100)
        child = os.fork()
        if child == 0:
            close(na.attention(q, k, v), expected)
            grandchild = os.fork()
            if grandchild == 0:
                close(na.attention(q, k, v), expected)
                os._exit(0)
            os._exit(os.waitpid(grandchild, 0)[1] and 1)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        close(na.attention(q, k, v), expected)
        """,
        layer,
    )


@needs_fork
@pytest.mark.parametrize("moment", ["compile", "load"])
def test_fork_while_another_thread_gets_a_kernel(tmp_path, moment):
    """The child finds the kernel, or gets it itself; it does not wait for a thread that it does not have."""
    run(
        """
        from numba_attention.cpu import cache
        moment = sys.argv[1] if len(sys.argv) > 1 else MOMENT
        inside = threading.Event()
        name = "_compile" if moment == "compile" else "_load"
        original = getattr(cache.Kernel, name)

        def slow(self):
            inside.set()
            if moment == "load":
                time.sleep(0.5)
            return original(self)

        setattr(cache.Kernel, name, slow)
        small = [x[:1, :1, :1, :1] for x in (q, k, v)]
        thread = threading.Thread(target=lambda: na.attention(*small))
        thread.start()
        inside.wait()
        time.sleep(0.1)
        child = os.fork()
        if child == 0:
            signal.alarm(100)
            close(na.attention(*small), textbook(*small))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        thread.join()
        assert status == 0, status
        close(na.attention(*small), textbook(*small))
        """.replace("MOMENT", repr(moment)),
        **({"NUMBA_ATTENTION_CACHE_DIR": str(tmp_path)} if moment == "compile" else {}),
    )


@needs_fork
def test_fork_that_does_not_wait_any_longer(tmp_path):
    """The child computes with the kernels it has, and says why it cannot load others."""
    run(
        """
        from numba.core.compiler_lock import global_compiler_lock
        from numba_attention import forks
        small = [x[:1, :1, :1, :1] for x in (q, k, v)]
        close(na.attention(*small), textbook(*small))
        forks.PATIENCE = 0.2
        held, stop = threading.Event(), threading.Event()

        def compile():
            with global_compiler_lock:
                held.set()
                stop.wait()

        thread = threading.Thread(target=compile)
        thread.start()
        held.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            close(na.attention(*small), textbook(*small))
            try:
                na.attention_backward(*small[:1], *small, *na.attention(*small, return_lse=True))
            except RuntimeError as error:
                os._exit(0 if "forked while another thread compiled" in str(error) else 2)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        stop.set()
        thread.join()
        na.attention_backward(*small[:1], *small, *na.attention(*small, return_lse=True))
        """
    )


def test_call_while_its_kernel_is_loaded():
    """From a signal handler or finalizer: in the same thread, which would wait for itself."""
    run(
        """
        from numba_attention.cpu import cache
        original, inside = cache.Kernel._load, False

        def load(self):
            global inside
            if not inside:
                inside = True
                close(na.attention(q, k, v), expected)
                inside = False
            return original(self)

        cache.Kernel._load = load
        close(na.attention(q, k, v), expected)
        """,
        timeout=60,
    )


@needs_fork
def test_no_lock_of_the_package_is_inherited_locked():
    run(
        """
        from numba_attention.backends import cpu
        from numba_attention.device import cubins
        locks = [cubins._lock, cpu._plans._lock]
        held, stop = threading.Event(), threading.Event()

        def hold():
            with locks[0], locks[1]:
                held.set()
                stop.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        child = os.fork()
        if child == 0:
            os._exit(0 if all(lock.acquire(timeout=5) for lock in locks) else 1)
        _, status = os.waitpid(child, 0)
        stop.set()
        thread.join()
        assert status == 0, status
        """
    )


@needs_fork
def test_fork_while_a_kernel_runs():
    run(
        """
        numba.set_num_threads(2)
        long = arrays(1, 8, 3000, 64)
        close(na.attention(q, k, v), expected)
        thread = threading.Thread(target=lambda: [na.attention(*long) for _ in range(3)])
        thread.start()
        time.sleep(0.1)
        for _ in range(5):
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                close(na.attention(q, k, v), expected)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert status == 0, status
        thread.join()
        """,
    )


# Each would take from some seconds to minutes. Arrays that repeat one row take no memory.
LONG = """
    def rows(*shape):
        return np.broadcast_to(rng.standard_normal((1,) * (len(shape) - 1) + shape[-1:]).astype(np.float32), shape)

    def backward(*shape):
        x, lse = rows(*shape), np.zeros(shape[:-1], np.float32)
        return lambda: na.attention_backward(x, x, x, x, x, lse)

    from numba_attention.layer.projection import linear, linear_backward
    long = {
        "forward": lambda: na.attention(*(rows(1, 8, 60_000, 64) for _ in range(3))),
        "one tile": lambda: na.attention(rows(1, 1, 64, 64), *(rows(1, 1, 30_000_000, 64) for _ in range(2))),
        "backward": backward(1, 8, 40_000, 64),
        "backward of a head": backward(1, 1, 200_000, 64),
        "few queries": lambda: na.attention(rows(1, 32, 1, 1024), *(rows(1, 1, 3_000_000, 1024) for _ in range(2))),
        "weights": lambda: na.attention_weights(rows(1, 1, 8_000, 16_384), rows(1, 1, 8_000, 16_384)),
        "packed": lambda: na.attention_varlen(
            *(rows(120_000, 8, 64) for _ in range(3)), np.array([0, 60_000, 120_000]), np.array([0, 60_000, 120_000])
        ),
        "projection": lambda: linear(rows(4_000, 500_000), rows(4_000, 500_000)),
        "gradient of a projection": lambda: linear_backward(
            rows(4_000_000, 512), rows(4_000_000, 512), rows(512, 512), need_input=False
        ),
    }
    # Kernels are loaded: an exception that comes while Numba compiles may be lost in one of its weakref callbacks.
    o, lse = na.attention(q, k, v, return_lse=True)
    na.attention_backward(q, q, k, v, o, lse)
    na.attention(rows(1, 1, 1, 64), *(rows(1, 1, 2, 64) for _ in range(2)))
    na.attention_weights(q, k)
    linear(rows(3, 5), rows(3, 5))
"""


@needs_signals
def test_interrupt():
    """Ctrl-C is heard within half a second, and everything is usable afterwards."""
    run(
        PREPARE
        + LONG
        + """
    small = na.attention(q, k, v)
    close(small, expected)
    stop = False
    for name, call in long.items():
        sent = 0.0

        def send():
            global sent
            time.sleep(1.0)
            sent = time.monotonic()
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=send)
        thread.start()
        begin = time.monotonic()
        try:
            call()
        except KeyboardInterrupt:
            late = time.monotonic() - sent
            print(f"{name}: {late:.3f} s after the signal", flush=True)
            assert late < 0.5, (name, late)
        else:
            raise AssertionError(f"{name} was over after {time.monotonic() - begin} s")
        thread.join()
        np.testing.assert_array_equal(na.attention(q, k, v), small)
    """,
        prepare="",
    )


@needs_signals
def test_handlers_run_in_long_calls():
    """What raises nothing changes nothing: the call goes on, to the bits of a call that nothing disturbed."""
    run(
        PREPARE
        + """
    q, k, v = arrays(1, 8, 12_000, 64)
    results = []
    thread = threading.Thread(target=lambda: results.append(na.attention(q, k, v)))  # not interruptible
    thread.start(); thread.join()
    seen = []
    nested = na.attention(q[:, :, :200], k[:, :, :200], v[:, :, :200])

    def handler(number, frame):
        seen.append(time.monotonic())
        if len(seen) < 5:
            assert (na.attention(q[:, :, :200], k[:, :, :200], v[:, :, :200]) == nested).all()

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.2)
    begin = time.monotonic()
    out = na.attention(q, k, v)
    end = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0)
    np.testing.assert_array_equal(out, results[0])
    during = [t for t in seen if begin < t < end - 0.01]
    assert len(during) >= 3, (begin, end, seen)
    """,
        prepare="",
    )


@needs_signals
@pytest.mark.slow
def test_storm_of_interrupts():
    """Each ends one call; further ones that arrive while it ends are not waited for, and no memory is used twice."""
    run(
        PREPARE
        + """
    long = arrays(1, 4, 8000, 64)
    want = na.attention(q, k, v), na.attention(*(x[:, :, :700] for x in long))
    running = True

    def storm():
        while running:
            time.sleep(rng.uniform(0, 0.02))
            signal.raise_signal(signal.SIGINT) if rng.random() < 0.5 else os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=storm, daemon=True)
    interrupted, rounds, end = 0, 0, time.monotonic() + 8
    try:
        thread.start()
    except KeyboardInterrupt:
        pass
    while True:
        try:
            while time.monotonic() < end:
                rounds += 1
                na.attention(*long)
            running = False
            break
        except KeyboardInterrupt:
            interrupted += 1
    for _ in range(20):
        try:
            thread.join(0.1)
        except KeyboardInterrupt:
            pass
    assert interrupted > 50, (interrupted, rounds)
    time.sleep(0.5)
    for _ in range(20):
        np.testing.assert_array_equal(na.attention(q, k, v), want[0])
        np.testing.assert_array_equal(na.attention(*(x[:, :, :700] for x in long)), want[1])
    close(want[0], expected)
    assert threading.active_count() == 1
    """,
        prepare="",
    )


@needs_signals
def test_interrupt_of_the_command(tmp_path):
    """It ends at once, with the code of an interrupted command, and leaves no half result."""
    for name in ("q", "k", "v"):
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", np.float32, (1, 8, 100_000, 64)).flush()
    command = [sys.executable, "-m", "numba_attention", "run", "q.npy", "k.npy", "v.npy", "-o", "out.npy"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        time.sleep(8)
        assert process.poll() is None
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert time.monotonic() - begin < 1.5, output  # and the end of the interpreter
    assert process.returncode not in (0, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.npy", "q.npy", "v.npy"], output
