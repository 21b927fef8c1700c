"""Threads that join others at their heads: tiles add in order, and bits do not depend on who came."""

import time

import numba
import numpy as np
import pytest

import numba_attention as na
from cases import Case
from numba_attention.cpu import launch, pool, turns
from numba_attention.cpu.cache import Kernel
from numba_attention.cpu.params import STOPPED
from numba_attention.cpu.simd import fetch_add, pause, void_pointer
from numba_attention.cpu.turns import SPAN, announce, await_turn, invite, item_to_join, record_of, sums_of, take_tile
from numba_attention.cpu.views import UNBOUNDED, carray

MOST = 8  # threads
COUNTER, ITEMS, TURNS, LOGS, TILES, KEYS, MISPLACED = range(7)


def make_worker():
    def log(params, thread):
        """Write the place of every tile to the log of every key that it sees, a line each, in the order of coming."""
        words = carray(void_pointer(params), MISPLACED + 1, np.int64)
        items, turns, tiles, keys = words[ITEMS], words[TURNS], words[TILES], words[KEYS]
        while True:
            item, joins = fetch_add(params + 8 * COUNTER, 1), False
            if item >= items:
                item, joins = item_to_join(turns, items, params + 8 * COUNTER), True
                if item < 0:
                    return 0
            record, own = record_of(turns, item, items), words[LOGS] + 8 * item * keys * (tiles + 2)
            if record != 0 and not joins:
                invite(record, own, tiles)
            if joins and sums_of(record) != own:
                words[MISPLACED] = 1
            for n in range(1 if joins else tiles):
                place = n if record == 0 else take_tile(record)
                if place < 0:
                    break
                for key in range(place % 3, keys - place % 5):  # as tiles of a window, which see different keys
                    if record != 0 and not await_turn(turns, record, place, key + 1, params + 8 * COUNTER):
                        return 0
                    line = carray(void_pointer(own + 8 * key * (tiles + 2)), UNBOUNDED, np.int64)
                    count = line[0]
                    line[2 + count] = place
                    for _ in range(20 * (1 + (item + place + key) % 4)):
                        pause()
                    line[0] = count + 1
                    line[1] |= 1 << thread
                    if record != 0:
                        announce(turns, record, place, key + 1)
                if record != 0 and await_turn(turns, record, place, SPAN - 1, params + 8 * COUNTER):
                    announce(turns, record, place, SPAN - 1)

    return log


logging = Kernel("log-turns-for-tests", make_worker, launch.SIGNATURE)


@pytest.fixture
def many_threads(monkeypatch):
    """A pool of so many threads, whatever the machine has; a number of threads to be set."""
    number = [MOST]
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", MOST)
    monkeypatch.setattr(pool, "_pool", None)
    monkeypatch.setattr(launch, "threads", lambda: number[0])
    return number


@pytest.mark.parametrize(("items", "tiles"), [(1, 40), (3, 20), (50, 6), (5, 0), (9, 1)])
def test_tiles_add_in_order(many_threads, items, tiles):
    keys, joined, rounds, end = 12, 0, 0, time.monotonic() + 60
    # A busy machine may let the other threads come too late many times over.
    while rounds < 12 or (tiles >= 20 and not joined and time.monotonic() < end):
        threads, rounds = (2, 3, MOST)[rounds % 3], rounds + 1
        logs, records = np.zeros((items, keys, tiles + 2), np.int64), turns.records_for(items, threads)
        words = np.array([0, items, records.ctypes.data, logs.ctypes.data, tiles, keys, 0])
        launch.run(logging, words.ctypes.data, threads)
        assert not words[MISPLACED]
        for key in range(keys):
            places = [n for n in range(tiles) if n % 3 <= key < keys - n % 5]
            assert (logs[:, key, 0] == len(places)).all()
            np.testing.assert_array_equal(logs[:, key, 2 : 2 + len(places)], np.tile(places, (items, 1)))
        joined += (logs[..., 1] & (logs[..., 1] - 1) != 0).sum()
    assert joined or tiles < 20, "no thread has joined another"


@pytest.mark.parametrize("items", [1, 40])
def test_a_stopped_call_ends(many_threads, items):
    """Whoever waits for a tile of a thread that has returned, or for an item that is not opened, returns too."""
    records = turns.records_for(items, MOST)
    words = np.array([STOPPED, items, records.ctypes.data, 0, 5, 5, 0])
    launch.run(logging, words.ctypes.data, MOST)
    assert words[COUNTER] > STOPPED


CASES = [
    (Case(600, 200, 8, H=1, batch=(), options=("causal",)), "float32"),
    (Case(1100, 300, 20, H=2, Hkv=1, batch=(2,), options=("causal", "softcap")), "bfloat16"),
    (Case(1100, 130, 8, 20, H=6, Hkv=2, batch=(), options=("bias of keys", "sinks")), "float32"),
    (Case(1100, 130, 8, H=20, batch=(), options=("window", "dropout")), "float32"),
    (Case(1100, 130, 8, H=3, batch=(2,), options=("mask of keys", "bias of rows", "alibi")), "float64"),
    (Case(500, 130, 8, H=2, batch=(), options=("bias", "key lengths")), "float16"),
]


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=str)
def test_same_bits_whoever_joins(many_threads, case, dtype):
    arrays, kwargs = case.arrays(dtype), case.kwargs()
    out, lse = na.attention(*arrays, **kwargs, return_lse=True)
    rng = np.random.default_rng(1)
    grad_out, moved = (rng.standard_normal(out.shape).astype(out.dtype) for _ in range(2))

    def derivatives():
        grads = na.attention_backward(grad_out, *arrays, out, lse, **kwargs)
        u = na.Gradients(*arrays)
        second = na.attention_double_backward(u, moved, *arrays, out, lse, **kwargs)
        return [x for x in (*grads, *second) if x is not None]

    many_threads[0] = 1
    alone = derivatives()
    for threads in (2, MOST, MOST, MOST):
        many_threads[0] = threads
        for x, y in zip(derivatives(), alone, strict=True):
            np.testing.assert_array_equal(x, y)
