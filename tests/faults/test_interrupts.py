"""Ctrl-C in the middle of long calls: soon heard, and nothing is left in a state that later calls would suffer from."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import work
from isolation import isolated

import numba_attention as na

SOON = 0.5  # seconds from the signal to the exception
LONG = 2**24  # positions; axes of stride 0 have so many without memory


class Interrupt:
    """Ctrl-C some time after the block is entered, which it must leave by KeyboardInterrupt, soon."""

    def __init__(self, after):
        self.after = after

    def __enter__(self):
        self.timer = threading.Timer(self.after, self.send)
        self.timer.start()

    def send(self):
        self.sent = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)

    def __exit__(self, kind, error, traceback):
        now = time.monotonic()
        self.timer.join()
        assert kind is KeyboardInterrupt, f"{kind} instead of KeyboardInterrupt: the call ended before or did not care"
        assert now - self.sent < SOON, f"KeyboardInterrupt arrived {now - self.sent:.2f} s after the signal"
        return True


def endless(*shape):
    """Rows of random numbers, repeated without memory."""
    *lead, _, E = shape
    row = np.random.default_rng(0).standard_normal((*lead, 1, E), dtype=np.float32)
    return np.broadcast_to(row, shape)


def long_forward():
    na.attention(endless(8, 16384, 64), endless(8, 2**17, 64), endless(8, 2**17, 64))


def long_forward_of_one_tile():
    """A single row, whose keys are all there is to share out."""
    na.attention(endless(1, 1, 64), endless(1, LONG * 32, 64), endless(1, LONG * 32, 64))


def long_forward_of_many_keys():
    na.attention(endless(2, 48, 64), endless(2, LONG, 64), endless(2, LONG, 64))


def long_backward():
    x = endless(8, 32768, 64)
    lse = np.full((8, 32768), np.log(32768.0), np.float32)
    na.attention_backward(x, x, x, x, x, lse)


def long_decode():
    cache = na.KVCache.from_arrays(*[endless(1, 1, LONG * 4, 64)] * 2)
    na.attention_decode(endless(1, 16, 4, 64), cache)


def long_varlen():
    x = endless(2 * 65536, 8, 64)
    na.attention_varlen(x, x, x, [0, 65536, 2 * 65536], [0, 65536, 2 * 65536])


def long_weights():
    na.attention_weights(endless(8, 2**15, 64), endless(8, 2**15, 64), heads=[0], rows=slice(0, 2**13))


def long_layer():
    x = np.random.default_rng(0).standard_normal((40000, 256), dtype=np.float32)
    na.MultiHeadAttention(256, 4, rng=0)(x)


def long_projection():
    x = np.random.default_rng(0).standard_normal((2**19, 256), dtype=np.float32)
    na.MultiHeadAttention(256, 4, head_dim=512, rng=0)(x, cu_seqlens=np.arange(0, 2**19 + 1, 8))


LONG_CALLS = {
    function.__name__.removeprefix("long_"): function
    for function in (
        long_forward,
        long_forward_of_one_tile,
        long_forward_of_many_keys,
        long_backward,
        long_decode,
        long_varlen,
        long_layer,
    )
}


@pytest.mark.parametrize("threads", [2, pytest.param(1, marks=pytest.mark.faults)])
@pytest.mark.parametrize("call", LONG_CALLS)
@isolated
def test_long_call(call, threads):
    import numba

    want = work.prepare()
    numba.set_num_threads(threads)
    with Interrupt(after=0.4):
        LONG_CALLS[call]()
    for name, again in work.CALLS.items():
        work.same(again(), want[name])


@pytest.mark.faults
@pytest.mark.parametrize("call", [long_weights.__name__, long_projection.__name__])
@isolated
def test_long_call_with_kernels_of_its_own(call):
    want = work.prepare()
    with Interrupt(after=0.4):
        globals()[call]()
    work.same(work.forward(), want["forward"])


@isolated
def test_handler_that_raises_another_exception():
    """As timeouts do that are set by an alarm."""

    class TooLongError(Exception):
        pass

    def handler(number, frame):
        raise TooLongError

    want = work.prepare()
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    begin = time.monotonic()
    with pytest.raises(TooLongError):
        long_forward()
    assert time.monotonic() - begin < 0.3 + SOON
    work.same(work.forward(), want["forward"])


@isolated
def test_handler_that_returns():
    """The call goes on, and its result is as without."""
    heard = []
    want = work.prepare()
    signal.signal(signal.SIGALRM, lambda number, frame: heard.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    for _ in range(100):
        for name in ("forward", "backward", "decode", "varlen"):
            work.same(work.CALLS[name](), want[name])
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert heard


@isolated
def test_interrupts_at_any_moment():
    """Between, before and within kernels: no lock stays taken, no buffer lost, and later results keep their bits."""
    want, rng = work.prepare(), random.Random(0)
    interrupts = 0
    for n in range(200):
        name = list(work.CALLS)[n % len(work.CALLS)]
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 8e-3))
            work.CALLS[name]()
            time.sleep(0.02)
        except KeyboardInterrupt:
            interrupts += 1
        work.same(work.CALLS[name](), want[name])
    assert interrupts > 100


@isolated
def test_interrupts_of_changes_to_a_cache():
    """Every sequence keeps its tokens, and a token of which one was appended was appended whole or not at all."""
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, 2, 4, 3000, 64), dtype=np.float32)
    delay = random.Random(0)
    for paged in (False, True):
        for _ in range(60):
            if paged:
                cache = na.PagedKVCache(900, 16, 4, 64)
                ids = cache.add(2)
                append = lambda k, v, cache=cache, ids=ids: cache.append(ids, k, v)  # noqa: E731
                lengths = lambda cache=cache, ids=ids: cache.lengths(ids)  # noqa: E731
            else:
                cache = na.KVCache(2, 4, 6000, 64)
                append, lengths = cache.append, lambda cache=cache: cache.lengths
            append(key[:, :, :1000], value[:, :, :1000])
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            try:
                signal.setitimer(signal.ITIMER_REAL, delay.uniform(1e-5, 3e-3))
                append(key[:, :, 1000:], value[:, :, 1000:])
                time.sleep(0.01)
            except KeyboardInterrupt:
                pass
            n = int(lengths()[0])
            assert lengths().tolist() in ([1000, 1000], [3000, 3000])
            got = na.attention_decode(key[:, :, :1], cache)
            want = na.attention_decode(key[:, :, :1], na.KVCache.from_arrays(key[:, :, :n], value[:, :, :n]))
            np.testing.assert_array_equal(got, want)
            append(key[:, :, :5], value[:, :, :5])
            assert lengths().tolist() == [n + 5] * 2


@isolated
def test_while_another_thread_computes():
    """Only the main thread is interrupted."""
    want, ready = work.prepare(), threading.Event()
    results = []

    def other():
        for n in range(400):
            results.append(work.forward())
            if n == 2:
                ready.set()

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    with Interrupt(after=0.3):
        long_forward()
    thread.join()
    for result in results:
        work.same(result, want["forward"])


@isolated(seconds=90)
def test_while_compiling(tmp_path):
    os.environ["NUMBA_ATTENTION_CACHE_DIR"] = tmp_path
    threading.Timer(1.5, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        work.forward()
    work.check(["forward"])
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".kernel")] == []


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
@isolated
def test_command(kind, tmp_path):
    """Ends soon, and the old result is there whole."""
    x = np.random.default_rng(0).standard_normal((32, 16384, 64), dtype=np.float32)
    path, out = os.path.join(tmp_path, "x.npy"), os.path.join(tmp_path, "out.npy")
    np.save(path, x)
    np.save(out, np.arange(3))
    command = [sys.executable, "-m", "numba_attention", "run", path, path, path, "-o", out]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    time.sleep(2)
    assert process.poll() is None, process.communicate()
    begin = time.monotonic()
    process.send_signal(kind)
    output = process.communicate(timeout=20)[0].decode()
    assert time.monotonic() - begin < SOON + 0.5  # and what the interpreter takes to end
    assert process.returncode != 0
    assert "Traceback" not in output
    np.testing.assert_array_equal(np.load(out), np.arange(3))
    if kind == signal.SIGINT:
        assert sorted(os.listdir(tmp_path)) == ["out.npy", "x.npy"]
