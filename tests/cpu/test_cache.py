"""The kernel cache: hits, staleness, races between processes, damaged files, no place to write."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time

import pytest

from grid import share
from numba_attention import kernel_cache
from numba_attention.cpu import cache
from numba_attention.errors import NumbaAttentionWarning


def run(code, folder, **environment):
    """Run code in a fresh process with its own cache folder; return what it printed."""
    env = {**os.environ, kernel_cache.ENVIRONMENT: str(folder), **environment}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ATTEND = """
    import numpy as np, numba, numba_attention as na
    from numba_attention.backends import cpu
    from numba_attention.backends.cpu_resources import worker
    numba.set_num_threads(2)
    q = np.random.default_rng(0).standard_normal((4, 300, 32), dtype=np.float32)
    na.attention(q, q, q)
    print(worker("float32", "forward").origin, cpu.launch._launcher.origin)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(kernel_cache.ENVIRONMENT, str(tmp_path))
    kernel_cache.directory.cache_clear()
    yield tmp_path
    kernel_cache.directory.cache_clear()


def kernel(name="add"):
    def make():
        def add(a, b):
            return a + b

        return add

    return cache.Function(name, make, objects=0, integers=2)


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
    (path,) = kernel_cache.entries()
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
        kernel_cache._warned = False
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
    monkeypatch.setenv(kernel_cache.ENVIRONMENT, str(blocked / "below"))
    monkeypatch.setattr(kernel_cache, "_warned", False)
    kernel_cache.directory.cache_clear()
    with pytest.warns(NumbaAttentionWarning, match=kernel_cache.ENVIRONMENT):
        assert kernel_cache.directory() is None
    assert kernel().call(1, 2) == 3
    kernel_cache.directory.cache_clear()


@pytest.mark.filterwarnings("error")
def test_folder_that_is_deleted_in_use_is_made_again(folder):
    kernel().call(1, 2)
    shutil.rmtree(folder)
    assert kernel("after").call(1, 2) == 3
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    again = kernel("after")
    again.call(1, 2)
    assert again.origin == "loaded"


def test_folder_that_somebody_else_makes_again_is_not_used(folder, monkeypatch):
    monkeypatch.setattr(kernel_cache, "_warned", False)
    kernel().call(1, 2)
    shutil.rmtree(folder)
    make = type(folder).mkdir

    def others(self, *arguments, **options):
        make(self)
        self.chmod(0o777)

    monkeypatch.setattr(type(folder), "mkdir", others)
    with pytest.warns(NumbaAttentionWarning, match="can be written by others"):
        assert kernel("after").call(1, 2) == 3
    assert not list(folder.iterdir())


def test_tilde_is_the_home_folder(tmp_path):
    code = "from numba_attention.kernel_cache import directory; print(directory())"
    assert run(code, "~/kernels", HOME=str(tmp_path)) == str(tmp_path / "kernels")


def test_folder_is_made_for_the_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv(kernel_cache.ENVIRONMENT, str(tmp_path / "a" / "kernels"))
    kernel_cache.directory.cache_clear()
    assert stat.S_IMODE(kernel_cache.directory().stat().st_mode) == 0o700
    kernel_cache.directory.cache_clear()


AS_OTHERS = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="changes owners: needs root")


@pytest.mark.parametrize("fault", ["group may write", "all may write", pytest.param("another's", marks=AS_OTHERS)])
def test_folder_that_others_may_write_is_refused(folder, monkeypatch, fault):
    kernel().call(1, 2)
    monkeypatch.setattr(kernel_cache, "_warned", False)
    kernel_cache.directory.cache_clear()
    if fault == "another's":
        os.chown(folder, 1234, 1234)
    else:
        os.chmod(folder, 0o770 if fault == "group may write" else 0o707)
    again = kernel()
    with pytest.warns(NumbaAttentionWarning, match=r"another user \(uid 1234\)|written by others \(mode 7[07][07]\)"):
        again.call(1, 2)
    assert again.origin == "compiled"


@pytest.mark.parametrize("fault", ["group may write", "link", "pipe", pytest.param("another's", marks=AS_OTHERS)])
def test_file_that_others_may_have_written_is_refused(folder, monkeypatch, fault):
    kernel().call(1, 2)
    (path,) = kernel_cache.entries()
    monkeypatch.setattr(kernel_cache, "_warned", False)
    if fault == "group may write":
        path.chmod(0o660)
    elif fault == "another's":
        os.chown(path, 1234, 1234)
    else:
        path.rename(folder / "elsewhere")
        if fault == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(folder / "elsewhere")
    again = kernel()
    if fault in ("link", "pipe"):
        again.call(1, 2)
    else:
        with pytest.warns(NumbaAttentionWarning, match="the file"):
            again.call(1, 2)
    assert again.origin == "compiled"
    third = kernel()  # a sound file has replaced it
    assert third.call(1, 2) == 3
    assert third.origin == "loaded"


def test_file_under_another_name_is_a_miss(folder):
    def make():
        def subtract(a, b):
            return a - b

        return subtract

    kernel().call(1, 2)
    (add,) = kernel_cache.entries()
    subtract = cache.Function("subtract", make, objects=0, integers=2)
    os.replace(add, kernel_cache.path_of(subtract.name, subtract._key, ".kernel"))
    assert subtract.call(1, 2) == -1
    assert subtract.origin == "compiled"


def test_full_disk_leaves_nothing(folder, monkeypatch):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit is then an OSError
    monkeypatch.setattr(kernel_cache, "_warned", False)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.warns(NumbaAttentionWarning, match="could not be cached"):
            assert kernel().call(1, 2) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(folder) == []


def test_folder_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(kernel_cache, "LARGEST", 2500)
    now, key = time.time(), "0123456789abcdef" * 2
    ages = {f"a-{key}.kernel": 10, f"b-{key}.cubin": 20, f"c-{key}.kernel": 30}
    ages |= {"begun.kernel-part": 5, "left.kernel-part": 4000, f"old-{key}.kernel": kernel_cache.UNUSED + 9}
    of_others = dict.fromkeys([".profile", "tmp_notes", "mine.kernel"], 10**9)
    for name, age in (ages | of_others).items():
        (folder / name).write_bytes(bytes(1000))
        os.utime(folder / name, (now - age, now - age))
    kernel_cache.prune(folder)
    assert set(os.listdir(folder)) == {f"a-{key}.kernel", f"b-{key}.cubin", "begun.kernel-part", *of_others}


def test_loading_says_that_a_file_is_in_use(folder):
    kernel().call(1, 2)
    (path,) = kernel_cache.entries()
    long_ago = time.time() - 10 * 86400
    os.utime(path, (long_ago, long_ago))
    kernel().call(1, 2)
    assert path.stat().st_mtime > long_ago + 86400


@pytest.mark.parametrize("rounds", share([20, 200], 2))
def test_processes_race_for_one_empty_cache(tmp_path, rounds):
    code = f"""
    import sys
    from numba_attention.cpu.cache import Function
    def make():
        def add(a, b):
            return a + b
        return add
    for i in range({rounds}):
        kernel = Function(f"race{{i}}", make, objects=0, integers=2)
        assert kernel.call(i, 1) == i + 1
    """
    env = {**os.environ, kernel_cache.ENVIRONMENT: str(tmp_path)}
    racers = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=env) for _ in range(8)]
    assert [p.wait() for p in racers] == [0] * 8
    left = [f for f in os.listdir(tmp_path) if not f.endswith(".kernel")]
    assert left == []
    assert len(os.listdir(tmp_path)) == rounds
