"""Files that are not what they say: a Python exception that names the file, whatever is in it, and nothing is run."""

import io
import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from isolation import isolated

import numba_attention as na

X = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)


def npy(header, data=b"", version=(1, 0), magic=b"\x93NUMPY"):
    """Bytes of a .npy with this header, a string."""
    text = header.encode("latin1")
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return magic + bytes(version) + size + text + data


def described(shape="(2, 5, 8)", descr="'<f4'", order="False"):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def saved(x):
    file = io.BytesIO()
    np.save(file, x, allow_pickle=True)
    return file.getvalue()


DATA = X.tobytes()
MALFORMED_NPY = {
    "empty": b"",
    "a byte": b"\x93",
    "magic only": b"\x93NUMPY",
    "cut in its header": saved(X)[:40],
    "cut in its data": saved(X)[:-1],
    "header alone": npy(described()),
    "another magic": npy(described(), DATA, magic=b"\x93NUMPX"),
    "version 9": npy(described(), DATA, version=(9, 0)),
    "version 0": npy(described(), DATA, version=(0, 0)),
    "header size of 4 GiB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + DATA,
    "header that is no dict": npy("[1, 2]\n", DATA),
    "header that is no literal": npy("__import__('os').mkdir('exploded')\n", DATA),
    "header that nests": npy("(" * 5000 + ")" * 5000, DATA),
    "header without a shape": npy("{'descr': '<f4', 'fortran_order': False}\n", DATA),
    "negative shape": npy(described("(-2, 5, 8)"), DATA),
    "negative shapes": npy(described("(-2, -5, 8)"), DATA),
    "shape of 2**62": npy(described(f"({2**62}, 5, 8)"), DATA),
    "shape of 10**30": npy(described(f"({10**30}, 5, 8)"), DATA),
    "shapes whose product overflows": npy(described(f"({2**32}, {2**32}, 8)"), DATA),
    "shape of floats": npy(described("(2.0, 5, 8)"), DATA),
    "shape of strings": npy(described("('2', 5, 8)"), DATA),
    "shape of one dimension": npy(described("(80,)"), DATA),
    "shape of 70 dimensions": npy(described(str((1,) * 70)), DATA),
    "unknown dtype": npy(described(descr="'<q7'"), DATA),
    "dtype of objects": npy(described(descr="'|O'"), DATA),
    "pickled objects": saved(np.array([Bomb()], object)),
    "dtype of no bytes": npy(described(descr="'|V0'"), DATA),
    "structured dtype": npy(described(descr="[('a', '<f4')]"), DATA),
    "strings": saved(np.full((2, 5, 8), "x")),
    "complex": saved(X.astype(np.complex64)),
    "integers": saved(X.astype(np.int32)),
    "dates": saved(np.zeros((2, 5, 8), "M8[s]")),
    "other byte order": saved(X.astype(">f4")),
    "a zip": b"PK\x03\x04" + DATA,
    "a gzip": b"\x1f\x8b\x08\x00" + DATA,
    "text": b"1 2 3\n" * 100,
    "a pickle": b"\x80\x04\x95" + DATA,
}


def run_command(*arguments):
    """Run ``numba-attention run`` in this process; returns its exit status and what it wrote to stderr."""
    from typer.testing import CliRunner

    from numba_attention.cli.commands import app

    result = CliRunner().invoke(app, ["run", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@isolated
def test_malformed_npy(tmp_path):
    """In the place of an input, of a mask and of lengths."""
    os.chdir(tmp_path)
    np.save("good.npy", X)
    np.save("out.npy", np.arange(3))
    wrong = []
    for name, content in MALFORMED_NPY.items():
        Path("bad.npy").write_bytes(content)
        for arguments in (
            ["bad.npy", "good.npy", "good.npy"],
            ["good.npy", "good.npy", "bad.npy"],
            ["good.npy", "good.npy", "good.npy", "--mask", "bad.npy"],
            ["good.npy", "good.npy", "good.npy", "--bias", "bad.npy"],
            ["good.npy", "good.npy", "good.npy", "--key-lengths", "bad.npy"],
            ["good.npy", "good.npy", "good.npy", "--sinks", "bad.npy"],
        ):
            if name == "other byte order" and "--bias" in arguments:
                continue  # options are converted
            try:
                status, output = run_command(*arguments, "-o", "out.npy")
            except BaseException as error:
                wrong.append(f"{name}, {arguments}: {type(error).__name__}: {error}")
                continue
            if status != 2 or "error:" not in output or len(output) < 20:
                wrong.append(f"{name}, {arguments}: exit status {status}, {output!r}")
    assert not wrong, "\n".join(wrong)
    np.testing.assert_array_equal(np.load("out.npy"), np.arange(3))
    assert sorted(os.listdir()) == ["bad.npy", "good.npy", "out.npy"]


@isolated
def test_malformed_npz(tmp_path):
    os.chdir(tmp_path)
    good, wrong = saved(X), []

    def archive(**members):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as zip_file:
            for name, content in members.items():
                zip_file.writestr(f"{name}.npy", content)
        return file.getvalue()

    whole = archive(query=good, key=good, value=good)
    contents = {
        "empty": b"",
        "cut": whole[:-30],
        "cut in the middle": whole[: len(whole) // 2],
        "damaged": whole.replace(DATA[:8], b"\xff" * 8),
        "without value": archive(query=good, key=good),
        "objects": archive(query=good, key=good, value=saved(np.array([Bomb()], object))),
        "empty member": archive(query=good, key=good, value=b""),
        "no .npy member": archive(query=good, key=good, value=b"text"),
        "negative shape": archive(query=good, key=good, value=npy(described("(-2, 5, 8)"), DATA)),
        "large shape": archive(query=good, key=good, value=npy(described(f"({2**40}, 5, 8)"), DATA)),
    }
    for name, content in contents.items():
        Path("bad.npz").write_bytes(content)
        try:
            status, output = run_command("bad.npz", "-o", "out.npy")
        except BaseException as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
            continue
        if status != 2 or "error:" not in output or len(output) < 20:
            wrong.append(f"{name}: exit status {status}, {output!r}")
    assert os.listdir() == ["bad.npz"]
    assert not wrong, "\n".join(wrong)


@isolated
def test_things_that_are_no_files(tmp_path):
    os.chdir(tmp_path)
    np.save("good.npy", X)
    os.mkdir("folder.npy")
    os.symlink("itself.npy", "itself.npy")
    for name in ("folder.npy", "itself.npy", "missing.npy", "/dev/null", "x\0y.npy"):
        status, output = run_command("good.npy", "good.npy", name, "-o", "out.npy")
        assert status == 2, (name, output)
        assert "error" in output.lower()
    for out in ("folder.npy", "missing/out.npy", "/dev/null/out.npy"):
        status, output = run_command("good.npy", "good.npy", "good.npy", "-o", out)
        assert status == 2, (out, output)
        assert "error:" in output
    assert sorted(os.listdir()) == ["folder.npy", "good.npy", "itself.npy"]


@isolated
def test_results_over_one_another(tmp_path):
    """The result and its log-sum-exps cannot be one file, and neither may replace an input that is being read."""
    os.chdir(tmp_path)
    np.save("good.npy", X)
    os.symlink("out.npy", "alias.npy")
    for lse in ("out.npy", "./out.npy", "alias.npy"):
        status, output = run_command("good.npy", "good.npy", "good.npy", "-o", "out.npy", "--lse", lse)
        assert status == 2, output
        assert not os.path.exists("out.npy")
    status, output = run_command("good.npy", "good.npy", "good.npy", "-o", "good.npy")
    if status == 0:
        np.testing.assert_allclose(np.load("good.npy"), na.attention(X, X, X), atol=1e-6)
    else:
        np.testing.assert_array_equal(np.load("good.npy"), X)


def tensors(header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def layer_header(**changes):
    """A header of a whole layer of 8 features, and data for it."""
    header, at = {}, 0
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        for kind, shape in (("weight", [8, 8]), ("bias", [8])):
            size = 4 * int(np.prod(shape))
            header[f"{name}.{kind}"] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
            at += size
    for name, change in changes.items():
        header[name.replace("__", ".")] = header.get(name.replace("__", "."), {}) | change
    return header, bytes(at)


def malformed_safetensors():
    header, data = layer_header()
    changed = {
        "offsets past the end": {"data_offsets": [1120, 2000]},
        "offsets in reverse": {"data_offsets": [1152, 1120]},
        "negative offset": {"data_offsets": [-32, 0]},
        "huge offset": {"data_offsets": [0, 2**63]},
        "offset that overflows": {"data_offsets": [2**64, 2**64 + 32]},
        "overlap": {"data_offsets": [0, 32]},
        "unknown dtype": {"dtype": "F31"},
        "dtype of another size": {"dtype": "F64"},
        "integers": {"dtype": "I32"},
        "negative shape": {"shape": [-8]},
        "shape that overflows": {"shape": [2**62, 4]},
        "another shape": {"shape": [2, 4]},
        "shape of floats": {"shape": [8.0]},
        "no shape": {"shape": None},
    }
    return {
        "empty": b"",
        "seven bytes": b"\0" * 7,
        "size of 2**63": tensors(header, data, 2**63),
        "size of 2**64 - 1": tensors(header, data, 2**64 - 1),
        "size past the end": tensors(header, data, 10**6),
        "size 0": tensors(b"", data),
        "no JSON": tensors(b"{{{", data),
        "JSON that nests": tensors(b"[" * 100_000 + b"]" * 100_000, data),
        "a list": tensors([1, 2], data),
        "no UTF-8": tensors(b'{"\xff": 1}', data),
        "two of a name": tensors(json.dumps(header)[:-1].encode() + b', "q_proj.weight": {}}', data),
        "data cut": tensors(header, data[:-1]),
        "data too long": tensors(header, data + b"\0"),
        "no tensors": tensors({}),
        "one is missing": tensors({k: v for k, v in header.items() if k != "out_proj.weight"}, data),
        "text": b"weights" * 100,
        **{name: tensors(*layer_header(out_proj__bias=change)) for name, change in changed.items()},
        "weights of three dimensions": tensors(*layer_header(q_proj__weight={"shape": [2, 4, 8]})),
        "weights that do not fit": tensors(*layer_header(k_proj__weight={"shape": [4, 16]})),
        "weights without rows": tensors(*layer_header(q_proj__weight={"shape": [0, 8], "data_offsets": [0, 0]})),
    }


@isolated
def test_malformed_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    os.chdir(tmp_path)
    allowed = (ValueError, TypeError, OSError, safetensors.SafetensorError)
    Path("good.safetensors").write_bytes(tensors(*layer_header()))
    na.MultiHeadAttention.load_safetensors("good.safetensors", num_heads=2)
    wrong = []
    for name, content in malformed_safetensors().items():
        Path("bad.safetensors").write_bytes(content)
        try:
            na.MultiHeadAttention.load_safetensors("bad.safetensors", num_heads=2)
            wrong.append(f"{name}: taken")
        except allowed as error:
            if len(str(error)) < 10:
                wrong.append(f"{name}: {error!r} says nothing")
        except BaseException as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
    for path in (".", "missing", "/dev/null"):
        with pytest.raises(allowed, match=r".{10}"):
            na.MultiHeadAttention.load_safetensors(path, num_heads=2)
    assert not wrong, "\n".join(wrong)
