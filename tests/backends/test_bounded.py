"""What calls need again is kept within bounds, by number and by bytes, and may be read while others add."""

import sys
import threading

import numpy as np
import pytest

import numba_attention as na
from numba_attention.backends import cpu, cpu_backward
from numba_attention.bounded import BoundedCache
from numba_attention.layer.projection import linear


def test_oldest_are_forgotten_first():
    cache = BoundedCache(count=3, size=100)
    for key in "abcd":
        cache.add(key, key.upper(), 10)
    assert [cache.get(key) for key in "abcd"] == [None, "B", "C", "D"]
    cache.add("e", "E", 85)  # room for one more of 10
    assert [cache.get(key) for key in "bcde"] == [None, None, "D", "E"]
    assert (len(cache), cache.size) == (2, 95)


def test_what_is_too_large_is_not_kept():
    cache = BoundedCache(count=3, size=100)
    cache.add("a", 1, 60)
    cache.add("b", 2, 101)
    assert cache.get("a") == 1
    assert cache.get("b") is None


def test_a_key_again():
    cache = BoundedCache(count=3, size=100)
    for size in (60, 70, 20):
        cache.add("a", size, size)
    assert (cache.get("a"), cache.size, len(cache)) == (20, 20, 1)
    cache.clear()
    assert (cache.get("a"), cache.size, len(cache)) == (None, 0, 0)


def test_threads_and_nested_calls():
    """In a trace function, as in a signal handler, one adds while another is adding in the same thread."""
    cache = BoundedCache(count=8, size=1000)
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        nested = False

        def trace(frame, event, argument):
            nonlocal nested
            if not nested and frame.f_code is BoundedCache.add.__code__:
                nested = True
                cache.add(int(rng.integers(30)), "nested", 100)
                nested = False
            return trace

        sys.settrace(trace)
        try:
            for _ in range(300):
                cache.add(int(rng.integers(30)), "x", int(rng.integers(300)))
                if cache.get(int(rng.integers(30))) not in (None, "x", "nested"):
                    wrong.append(seed)
        except BaseException as error:
            wrong.append(error)
        finally:
            sys.settrace(None)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong, wrong[0]
    assert len(cache) <= 8
    assert cache.size <= 1000
    assert len(cache._sizes) == len(cache)


@pytest.mark.parametrize("backward", [False, True])
def test_plans_of_large_batches(backward, monkeypatch):
    """Each has a record for every sequence: 11 MB for 50,000 of them."""
    plans = BoundedCache(size=2**22)
    monkeypatch.setattr(cpu_backward if backward else cpu, "_plans", plans)
    rng = np.random.default_rng(0)
    for batch in range(5000, 5030):
        x = rng.standard_normal((batch, 1, 1, 4)).astype(np.float32)
        if backward:
            na.attention_backward(x, x, x, x, *na.attention(x, x, x, return_lse=True))
        else:
            np.testing.assert_allclose(na.attention(x, x, x), x, rtol=1e-6)
    assert 0 < len(plans) < 10
    assert plans.size >= len(plans) * 5000 * 100
    assert plans.size <= 2**22


def test_plans_of_projections(monkeypatch):
    from numba_attention.layer import projection

    plans = BoundedCache(count=5)
    monkeypatch.setattr(projection, "_plans", plans)
    for n in range(1, 12):
        np.testing.assert_array_equal(linear(np.ones((n, 3)), np.ones((2, 3))), np.full((n, 2), 3.0))
    assert len(plans) == 5
