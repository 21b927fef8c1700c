"""The kernel cache: hits, staleness, races between processes, damaged files, no place to write."""

import os
import subprocess
import sys
import textwrap

import pytest

from numba_attention.cpu import cache
from numba_attention.errors import NumbaAttentionWarning


def run(code, folder, **environment):
    """Run code in a fresh process with its own cache folder; return what it printed."""
    env = {**os.environ, cache.ENVIRONMENT: str(folder), **environment}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ATTEND = """
    import numpy as np, numba, numba_attention as na
    from numba_attention.backends import cpu
    from numba_attention.backends.resources import worker
    numba.set_num_threads(2)
    q = np.random.default_rng(0).standard_normal((4, 300, 32), dtype=np.float32)
    na.attention(q, q, q)
    print(worker("float32", "forward").origin, cpu.launch._launcher.origin)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path))
    cache.directory.cache_clear()
    yield tmp_path
    cache.directory.cache_clear()


def kernel(name="add"):
    def make():
        def add(a, b):
            return a + b

        return add

    return cache.Function(name, make, "int64(int64, int64)")


def test_second_process_compiles_nothing(tmp_path):
    assert run(ATTEND, tmp_path) == "compiled compiled"
    assert run(ATTEND, tmp_path) == "loaded loaded"


def test_loaded_kernel_computes(folder):
    first, second = kernel(), kernel()
    assert first.call(2, 3) == second.call(2, 3) == 5
    assert (first.origin, second.origin) == ("compiled", "loaded")


def test_changed_source_is_a_miss(folder, monkeypatch):
    kernel().call(1, 2)
    monkeypatch.setattr(cache, "_environment", lambda: "another version of some helper module")
    changed = kernel()
    assert changed.call(1, 2) == 3
    assert changed.origin == "compiled"


def test_environment_covers_sources_and_cpu(tmp_path):
    code = "from numba_attention.cpu import cache; print(cache._environment())"
    base = run(code, tmp_path)
    assert base == run(code, tmp_path)
    assert base != run(code, tmp_path, NUMBA_BOUNDSCHECK="1")
    assert base != run(code, tmp_path, NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="")


@pytest.mark.parametrize("damage", ["empty", "truncated", "bit flipped", "checksum of garbage", "folder"])
def test_damaged_file_is_a_miss(folder, damage):
    kernel().call(1, 2)
    (path,) = cache.entries()
    content = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "bit flipped":
        at = len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
    elif damage == "checksum of garbage":
        import hashlib

        path.write_bytes(hashlib.sha256(b"garbage").digest() + b"garbage")
    else:
        path.unlink()
        path.mkdir()
    again = kernel()
    if damage == "folder":
        cache._warned = False
        with pytest.warns(NumbaAttentionWarning, match="could not be cached"):
            again.call(1, 2)
    else:
        again.call(1, 2)
        assert kernel().call(1, 2) == 3
    assert again.call(1, 2) == 3
    assert again.origin == "compiled"


def test_no_place_to_write(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv(cache.ENVIRONMENT, str(blocked / "below"))
    monkeypatch.setattr(cache, "_warned", False)
    cache.directory.cache_clear()
    with pytest.warns(NumbaAttentionWarning, match=cache.ENVIRONMENT):
        assert cache.directory() is None
    assert kernel().call(1, 2) == 3
    cache.directory.cache_clear()


@pytest.mark.parametrize("rounds", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_processes_race_for_one_empty_cache(tmp_path, rounds):
    code = f"""
    import sys
    from numba_attention.cpu.cache import Function
    def make():
        def add(a, b):
            return a + b
        return add
    for i in range({rounds}):
        kernel = Function(f"race{{i}}", make, "int64(int64, int64)")
        assert kernel.call(i, 1) == i + 1
    """
    env = {**os.environ, cache.ENVIRONMENT: str(tmp_path)}
    racers = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=env) for _ in range(8)]
    assert [p.wait() for p in racers] == [0] * 8
    left = [f for f in os.listdir(tmp_path) if not f.endswith(".kernel")]
    assert left == []
    assert len(os.listdir(tmp_path)) == rounds
