"""Little memory, full disks, and memory that must not grow with the number of calls."""

import gc
import os
import resource
import threading
from pathlib import Path

import numba
import numpy as np
import pytest
import work
from disks import fill, mount_small_disk
from isolation import isolated

import numba_attention as na

MiB = 2**20


def memory():
    """Resident bytes of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def address_space():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


class Limit:
    """Only so many more bytes of address space within the block."""

    def __init__(self, more):
        self.more = more

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + self.more, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_AS, self.before)


def large():
    """Calls that need some 64 MiB or more for their results."""
    x = np.broadcast_to(np.float32(1), (8, 16, 2048, 64))
    out, lse = np.empty((8, 16, 2048, 64), np.float32), np.zeros((8, 16, 2048), np.float32)
    rows = np.ones((2**16, 64), np.float32)
    layer = na.MultiHeadAttention(64, 4, rng=0)
    return {
        "forward": lambda: na.attention(x, x, x, is_causal=True),
        "backward": lambda: na.attention_backward(out, x, x, x, out, lse, window=(8, 8)),
        "weights": lambda: (
            na.attention_weights(x[0, :1], x[0, :1], rows=slice(0, 1)).size or na.attention_weights(x[0], x[0])
        ),
        "layer": lambda: layer(rows, cu_seqlens=np.arange(0, 2**16 + 1, 64)),
        "KVCache": lambda: na.KVCache(8, 16, 2048, 64),
        "PagedKVCache": lambda: na.PagedKVCache(2048, 64, 2, 64),
        "merge": lambda: na.merge_attention([out, out], [lse, lse]),
        "rotary": lambda: na.apply_rotary(out, np.arange(2048)),
    }


@pytest.mark.parametrize("name", ["forward", "backward", "layer", "KVCache", "PagedKVCache", "merge", "rotary"])
@isolated
def test_too_little_memory_for_a_result(name):
    want, call = work.prepare(), large()[name]
    for more in (0, 1 * MiB, 16 * MiB):
        with Limit(more), pytest.raises(MemoryError):
            call()
        for again, results in want.items():
            work.same(work.CALLS[again](), results)


@pytest.mark.parametrize("name", work.CALLS)
@isolated
def test_any_little_memory(name):
    """Whatever is the first that does not fit: MemoryError or the right result, and later calls are as before."""
    want, refused = work.prepare()[name], 0
    for more in [0, 4096, *range(16384, 2 * MiB, 96 * 1024)]:
        with Limit(more):
            try:
                got = work.CALLS[name]()
            except MemoryError:
                refused += 1
                got = want
        work.same(got, want)
        work.same(work.CALLS[name](), want)


@pytest.mark.parametrize("number", [2000, pytest.param(100_000, marks=pytest.mark.faults)])
@isolated(seconds=590)
def test_resident_memory_is_flat(number):
    """Calls of every kind and of many shapes."""
    work.prepare()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 40, 32), dtype=np.float32)
    cache = na.KVCache(1, 4, 64, 32)
    layer = na.MultiHeadAttention(32, 2, rng=0)

    def calls(number):
        for n in range(number):
            L, S = n % 37 + 1, n % 31 + 1
            q, k = x[:, :, :L], x[:, :, -S:]
            if n % 5 < 2:
                na.attention(q, k, k, is_causal=bool(n % 2), scale=1 + n % 97)
            elif n % 5 == 2:
                out, lse = na.attention(q, k, k, return_lse=True)
                na.attention_backward(out, q, k, k, out, lse)
            elif n % 5 == 3:
                if int(cache.lengths[0]) == 64:
                    cache.truncate(0)
                cache.append(x[:1, :, :1], x[:1, :, :1])
                na.attention_decode(x[:1, :, :1], cache)
            else:
                layer(x[0, 0, :L])

    numba.set_num_threads(1)
    calls(2000)
    before = memory()
    calls(number)
    grown = memory() - before
    assert grown < 4 * MiB, f"{grown / MiB:.1f} MiB more after {number} calls"


@isolated
def test_resident_memory_is_flat_as_threads_come_and_go():
    want = work.prepare()

    def several(number):
        for _ in range(number):
            thread = threading.Thread(target=lambda: work.same(work.decode(), want["decode"]))
            thread.start()
            thread.join()

    several(100)
    before = memory()
    several(400)
    grown = memory() - before
    assert grown < 8 * MiB, f"{grown / MiB:.1f} MiB more after 400 threads"


@isolated
def test_many_shapes_of_large_batches():
    """What is kept of a call for the next of its kind is bounded by bytes."""
    work.prepare()
    before = memory()
    for n in range(24):
        x = np.zeros((50_000, 1, 1, n % 8 + 1), np.float32)
        out, lse = na.attention(x, x, x, scale=n + 1.0, return_lse=True)
        na.attention_backward(out, x, x, x, out, lse, scale=n + 1.0)
    del x, out, lse
    grown = memory() - before
    assert grown < 200 * MiB, f"{grown / MiB:.0f} MiB more after 24 shapes"


@pytest.mark.parametrize("target", ["out", "lse"])
@isolated
def test_command_on_a_full_disk(target, tmp_path):
    """A message, no signal of the memory that could not be written, and the old result as it was."""
    import subprocess
    import sys

    work.prepare()
    disk = Path(tmp_path, "disk")
    disk.mkdir()
    mount_small_disk(disk, MiB)
    x = np.zeros((1, 4096, 64), np.float32)
    np.save(Path(tmp_path, "x.npy"), x)
    out, lse = (disk / "out.npy", Path(tmp_path, "lse.npy")) if target == "out" else ("out.npy", disk / "lse.npy")
    np.save(disk / f"{target}.npy", np.arange(3))
    if target == "lse":
        fill(disk)
    command = [sys.executable, "-m", "numba_attention", "run", *["x.npy"] * 3, "-o", str(out), "--lse", str(lse)]
    done = subprocess.run([*command, "--window", "1,1"], cwd=tmp_path, capture_output=True, text=True, timeout=40)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr
    np.testing.assert_array_equal(np.load(disk / f"{target}.npy"), np.arange(3))
    assert sorted(path.name for path in disk.iterdir()) in (["out.npy"], ["filling", "lse.npy"])
    if target == "lse":
        assert not Path(tmp_path, "out.npy").exists()


@isolated
def test_save_on_a_full_disk(tmp_path):
    """A layer whose file cannot be written leaves the old one whole."""
    mount_small_disk(tmp_path, MiB)
    path = Path(tmp_path, "layer.safetensors")
    old = na.MultiHeadAttention(32, 4, rng=0)
    old.save_safetensors(path)
    fill(tmp_path)
    with pytest.raises(Exception, match=r"."):
        na.MultiHeadAttention(256, 4, rng=0).save_safetensors(path)
    again = na.MultiHeadAttention.load_safetensors(path, num_heads=4)
    work.same(again.parameters().values(), old.parameters().values())
    os.unlink(Path(tmp_path, "filling"))
    na.MultiHeadAttention(64, 4, rng=0).save_safetensors(path)
