"""Files of `numba-attention run`: damaged inputs are named, results are old or new and never half."""

import io
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import numba_attention as na
from numba_attention.atomic import allocate, replacing

typer_testing = pytest.importorskip("typer.testing")

from numba_attention.cli.commands import app  # noqa: E402

X = np.arange(96, dtype=np.float32).reshape(2, 6, 8) / 96
INPUTS = ("query.npy", "key.npy", "value.npy")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n, name in enumerate(INPUTS):
        np.save(name, X + n)
    np.savez("all.npz", query=X, key=X + 1, value=X + 2)
    return tmp_path


def run(*arguments, code=0):
    result = typer_testing.CliRunner().invoke(app, ["run", *map(str, arguments)])
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result.output


def expected():
    """The textbook, in float64."""
    q, k, v = (X.astype(np.float64) + n for n in range(3))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(8)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    total = p.sum(-1)
    return p @ v / total[..., None], np.log(total) + scores.max(-1)


def npy(header, data=b"", version=(1, 0)):
    """A .npy with whatever header."""
    text = header.encode("latin1") if version[0] < 3 else header.encode()
    length = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + data


def described(shape, descr="'<f4'", fortran="False"):
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


def pickled():
    file = io.BytesIO()
    np.save(file, np.array([None, 1], object), allow_pickle=True)
    return file.getvalue()


DAMAGED = {
    "empty": b"",
    "magic only": b"\x93NUMPY",
    "magic and version": b"\x93NUMPY\x01\x00",
    "header cut": npy(described("(2, 6, 8)"))[:40],
    "no data": npy(described("(2, 6, 8)")),
    "data cut": npy(described("(2, 6, 8)"), X.tobytes()[:-1]),
    "negative shape": npy(described("(-2, 6, 8)"), X.tobytes()),
    "two negative sizes": npy(described("(-2, -6, 8)"), X.tobytes()),
    "shape of words": npy(described("('a', 6)"), X.tobytes()),
    "shape of floats": npy(described("(2.0, 6, 8)"), X.tobytes()),
    "shape of booleans": npy(described("(True, 6, 8)"), X.tobytes()),
    "huge shape": npy(described(f"({2**62}, 8, 8)"), X.tobytes()),
    "shape beyond integers": npy(described(f"({10**30}, 8)"), X.tobytes()),
    "objects": pickled(),
    "unknown dtype": npy(described("(2, 6, 8)", "'<q9'"), X.tobytes()),
    "dtype of nothing": npy(described("(2, 6, 8)", "None"), X.tobytes()),
    "dtype of fields": npy(described("(2, 6, 8)", "[('a', '<f4')]"), X.tobytes()),
    "dtype of characters": npy(described("(2, 6, 8)", "'<U1'"), X.tobytes()),
    "wrong keys": npy("{'descr': '<f4', 'shape': (2, 6, 8)}\n", X.tobytes()),
    "no dict": npy("[1, 2]\n", X.tobytes()),
    "code": npy("__import__('os').abort()\n", X.tobytes()),
    "unclosed": npy("{'descr': (((((((", X.tobytes()),
    "not latin": npy("{'descr': '\xff'", X.tobytes()),
    "version 9": npy(described("(2, 6, 8)"), X.tobytes(), (9, 0)),
    "a pickle": b"\x80\x04N.",
    "text": b"1 2 3",
    "zeros": bytes(4096),
    "zip cut": b"PK\x03\x04" + bytes(30),
}


@pytest.mark.parametrize("argument", ["query.npy", "--mask", "--key-lengths", "--sinks"])
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_array(folder, name, argument):
    """One line that names the file, no traceback, and nothing has been written or left behind."""
    Path("damaged.npy").write_bytes(DAMAGED[name])
    arguments = ["damaged.npy", *INPUTS[1:]] if argument == "query.npy" else [*INPUTS, argument, "damaged.npy"]
    before = sorted(folder.iterdir())
    output = run(*arguments, "-o", "out.npy", code=2)
    assert output.startswith("error:")
    assert re.search(r"damaged\.npy|query|mask|key_lengths|sinks", output), output
    assert sorted(folder.iterdir()) == before


def test_more_elements_than_a_size_counts():
    """2**64 bytes and some, of which NumPy's count wraps around, in all three."""
    for name in INPUTS:
        Path(name).write_bytes(npy(described(f"({2**59}, 1, 8)"), bytes(64)))
    assert "query.npy holds no whole arrays" in run(*INPUTS, "-o", "out.npy", code=2)


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


ARCHIVES = {
    "empty": b"",
    "no zip": b"PK\x03\x04 and so on",
    "member cut": zipped(query=npy(described("(2, 6, 8)"), b"123"), key=b"", value=b""),
    "member empty": zipped(query=b"", key=b"", value=b""),
    "member negative": zipped(query=npy(described("(-2, 6, 8)"), X.tobytes()), key=b"", value=b""),
    "objects": zipped(query=pickled(), key=pickled(), value=pickled()),
    "text": zipped(query=b"one", key=b"two", value=b"three"),
}


@pytest.mark.parametrize("name", [*ARCHIVES, "cut", "flipped"])
def test_damaged_archive(name):
    data = Path("all.npz").read_bytes()
    contents = ARCHIVES | {"cut": data[: len(data) // 2], "flipped": data[:200] + bytes([data[200] ^ 255]) + data[201:]}
    Path("damaged.npz").write_bytes(contents[name])
    assert "damaged.npz" in run("damaged.npz", "-o", "out.npy", code=2)
    assert not Path("out.npy").exists()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_whole_arrays_of_every_kind(version, order):
    for n, name in enumerate(INPUTS):
        with open(name, "wb") as file:
            np.lib.format.write_array(file, np.asarray(X + n, order=order), version)
    run(*INPUTS, "-o", "out.npy", "--lse", "lse.npy")
    out, lse = expected()
    np.testing.assert_allclose(np.load("out.npy"), out, atol=1e-6)
    np.testing.assert_allclose(np.load("lse.npy"), lse, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 6, 8), (2, 0, 8), (2, 6, 0)])
def test_arrays_without_elements(shape):
    for name in INPUTS:
        np.save(name, np.ones(shape, np.float32))
    run(*INPUTS, "-o", "out.npy", "--lse", "lse.npy")
    assert np.load("out.npy").shape == shape
    assert np.load("lse.npy").shape == shape[:2]


def same_path():
    return "out.npy"


def other_spelling():
    Path("sub").mkdir()
    return "sub/../out.npy"


def symbolic_link():
    os.symlink("out.npy", "link.npy")
    return "link.npy"


def hard_link():
    Path("out.npy").write_bytes(b"old")
    os.link("out.npy", "hard.npy")
    return "hard.npy"


@pytest.mark.parametrize("make", [same_path, other_spelling, symbolic_link, hard_link])
def test_lse_over_out(make):
    lse = make()
    old = Path("out.npy").read_bytes() if Path("out.npy").exists() else None
    assert "another file" in run(*INPUTS, "-o", "out.npy", "--lse", lse, code=2)
    assert (Path("out.npy").read_bytes() if Path("out.npy").exists() else None) == old


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("to", ["-o", "--lse"])
@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_results_over_an_input(name, to, link):
    """Inputs are mapped: what replaces them must not be written into them."""
    target = name
    if link is not None:
        link(name, "linked.npy")
        target = "linked.npy"
    other = ["-o", "out.npy"] if to == "--lse" else ["--lse", "lse.npy"]
    run(*INPUTS, to, target, *other)
    out, lse = expected()
    np.testing.assert_allclose(np.load("out.npy" if to == "--lse" else target), out, atol=1e-6)
    np.testing.assert_allclose(np.load(target if to == "--lse" else "lse.npy"), lse, atol=1e-6)
    if link is os.symlink:
        assert Path("linked.npy").is_symlink()
    if link is os.link:
        np.testing.assert_array_equal(np.load(name), X + INPUTS.index(name))


@pytest.mark.parametrize("to", ["-o", "--lse"])
def test_results_that_cannot_be_written(folder, to):
    os.mkfifo("fifo")
    Path("directory").mkdir()
    other = ["-o", "out.npy"] if to == "--lse" else []
    for path in ("fifo", "directory", "/dev/null", "missing/out.npy", "out.npz"):
        output = run(*INPUTS, *other, to, path, code=2)
        assert path in output
        assert ".numba-attention" not in output
        assert not Path("out.npy").exists()
    assert Path("/dev/null").is_char_device()
    assert not [path for path in folder.iterdir() if path.name.startswith(".numba")]


def test_inputs_that_are_no_files():
    os.mkfifo("fifo")
    assert "fifo must be a regular file" in run("fifo", *INPUTS[1:], "-o", "out.npy", code=2)
    assert "regular file" in run("/dev/zero", *INPUTS[1:], "-o", "out.npy", code=2)


@pytest.mark.parametrize("option", ["--key-lengths", "--query-offset", "--sinks", "--alibi-slopes"])
@pytest.mark.parametrize("text", ["a", "1,,2", "1;2", "1e", "--", ""])
def test_numbers_that_are_none(option, text):
    name = option.removeprefix("--").replace("-", "_")
    said = "numbers" if name in ("sinks", "alibi_slopes") else "integers"
    output = run(*INPUTS, "-o", "out.npy", f"{option}={text}", code=2)
    assert f"{name} must be {said} separated by commas" in output


def in_a_process(limit, *arguments):
    """Run with a largest size of files: what is beyond it fails as a full disk does, and a mapped hole is SIGBUS."""

    def restrict():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "numba_attention", "run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=restrict)


@pytest.mark.parametrize("limit", [64, 300])
def test_files_that_may_not_grow(folder, limit):
    Path("out.npy").write_bytes(b"old")
    Path("lse.npy").write_bytes(b"old")
    before = sorted(folder.iterdir())
    done = in_a_process(limit, *INPUTS, "-o", "out.npy", "--lse", "lse.npy", "--backend", "reference")
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr
    assert Path("out.npy").read_bytes() == Path("lse.npy").read_bytes() == b"old"
    assert sorted(folder.iterdir()) == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, where this machine lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode
    ):
        pytest.skip("cannot mount a file system here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_full_disk(small_disk):
    """No SIGBUS: space is taken before the result is mapped and written."""
    large = np.zeros((1, 2**13, 64), np.float32)  # a result of 2 MiB
    for name in INPUTS:
        np.save(name, large[:, :16] if name != "query.npy" else large)
    (small_disk / "out.npy").write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-m", "numba_attention", "run", *INPUTS, "-o", small_disk / "out.npy"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "No space left on device for 2097280 bytes" in done.stderr
    assert f"disk{os.sep}out.npy" in done.stderr.replace("\n", "")
    assert [path.name for path in small_disk.iterdir()] == ["out.npy"]
    assert (small_disk / "out.npy").read_bytes() == b"old"


def test_nothing_is_replaced_if_the_block_fails(folder):
    Path("old").write_text("old")
    before = sorted(folder.iterdir())

    def interrupted():
        with replacing("old") as unfinished:
            unfinished.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert Path("old").read_text() == "old"
    assert sorted(folder.iterdir()) == before


def test_replaced_files_keep_their_mode():
    Path("old").write_text("old")
    Path("old").chmod(0o640)
    with replacing("old") as unfinished:
        unfinished.write_text("new")
    assert Path("old").read_text() == "new"
    assert Path("old").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("known", [True, False])
def test_allocated_files_have_no_holes(monkeypatch, known):
    if not known:  # as on systems that cannot
        monkeypatch.delattr(os, "posix_fallocate")
    with open("sparse", "wb") as file:
        file.write(b"header")
        file.seek(3 * 2**20 + 5)
        file.write(b"end")
    allocate("sparse")
    data = Path("sparse").read_bytes()
    assert data[:6] == b"header"
    assert data[-3:] == b"end"
    assert not any(data[6:-3])
    assert len(data) == 3 * 2**20 + 8
    assert Path("sparse").stat().st_blocks * 512 >= len(data)


def test_safetensors_are_replaced_whole_or_not(monkeypatch):
    pytest.importorskip("safetensors")
    import safetensors.numpy

    layer = na.MultiHeadAttention(8, 2, rng=0)
    layer.save_safetensors("layer")
    data = Path("layer").read_bytes()

    def fail(arrays, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        na.MultiHeadAttention(8, 2, rng=1).save_safetensors("layer")
    assert Path("layer").read_bytes() == data
    for damaged in (b"", data[:5], data[:-1], b"\xff" * 100, data[:8] + b"x" + data[9:]):
        Path("layer").write_bytes(damaged)
        with pytest.raises(ValueError, match="layer is no whole safetensors file"):
            na.MultiHeadAttention.load_safetensors("layer", num_heads=2)
