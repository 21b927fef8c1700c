"""Folders with kernels for levels of CPUs: a process that has one compiles nothing."""

import math
import os
import struct
import subprocess
import sys
import textwrap

import pytest

import numba_attention as na
from grid import share
from numba_attention import kernel_cache, shipping, warming
from numba_attention.backends import cpu
from numba_attention.cpu import cache, shipped
from numba_attention.cpu.spec import Spec
from numba_attention.cpu.target import LEVELS, level
from numba_attention.errors import NumbaAttentionWarning

ENTRIES = "launch,call,serve,addresses"
HAS_LEVEL = pytest.mark.skipif(not level(), reason="this CPU has no level for which kernels are shipped")

ATTEND = """
    import numpy as np, numba, numba_attention as na
    from numba_attention.backends.cpu_resources import addresses, worker
    from numba_attention.cpu import launch
    numba.set_num_threads(2)
    q, k, v = np.random.default_rng(0).standard_normal((3, 4, 300, 32), dtype=np.float32)
    scores = q.astype(float) @ k.astype(float).swapaxes(-1, -2) / np.sqrt(32)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = weights / weights.sum(-1, keepdims=True) @ v
    np.testing.assert_allclose(na.attention(q, k, v), want, atol=1e-5)
    np.testing.assert_allclose(na.attention(q[:1, :100], k[:1], v[:1]), want[:1, :100], atol=1e-5)
    print(*(x.origin for x in (worker("float32", "forward"), launch._launcher, launch._caller, addresses)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    shipping.build(folder, [level()], f"{ENTRIES},forward-float32-{shipped.HOST.name}")
    return folder


def attend(cache_folder, **environment):
    """Call in a fresh process; return where its kernels came from."""
    base = {name: value for name, value in os.environ.items() if name != kernel_cache.SHIPPED}
    env = base | {kernel_cache.ENVIRONMENT: str(cache_folder)} | environment
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(ATTEND)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@HAS_LEVEL
def test_a_process_with_a_folder_compiles_nothing(folder, tmp_path):
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert attend(tmp_path / "cache", NUMBA_ATTENTION_KERNELS=str(folder)) == {"loaded"}
    assert list((tmp_path / "cache").iterdir()) == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@HAS_LEVEL
def test_an_installed_package_is_found(folder, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / kernel_cache.PACKAGE).symlink_to(folder)
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    assert attend(tmp_path / "cache", PYTHONPATH=path) == {"loaded"}
    assert list((tmp_path / "cache").iterdir()) == []


MODS = """
    import numpy as np, numba_attention as na
    from numba_attention.cpu import compiler_thread

    def compile(function, what):
        raise AssertionError(f"{what} is compiled")

    compiler_thread.run = compile
    reach = 9
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 40, 32), dtype=np.float32)
    i, j = np.arange(3)[:, None], np.arange(40)
    scores = q[:, :3].astype(float) @ k.astype(float).swapaxes(-1, -2) / np.sqrt(32)
    if OWN:
        slopes = np.array([0.5, 0.25])
        scores = np.where(j - i <= reach, np.sin(scores), -np.inf)
        out = na.attention(
            q[:, :3], k, v, score_mod=lambda score, batch, head, i, j: math.sin(score),
            mask_mod=lambda batch, head, i, j: j - i <= reach,
        )
    else:
        slopes = np.array([0.5, 0.25], np.float32)
        scores = scores - slopes[:, None, None] * abs(i - j)
        out = na.attention(q[:, :3], k, v, score_mod=na.mods.alibi, mod_args=(slopes,))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(out, weights / weights.sum(-1, keepdims=True) @ v, atol=1e-5)
"""


@HAS_LEVEL
@pytest.mark.parametrize("own", share([True, False], 2))
def test_kernels_of_mods_travel(tmp_path, own):
    """Named mods are in every folder, a caller's own where `warmup` is told of them, closures and lambdas too."""
    folder = tmp_path / "kernels"
    if own:
        reach = 9
        written = na.warmup(
            ["float32"], ["decode"], score_mod=lambda score, batch, head, i, j: math.sin(score),
            mask_mod=lambda batch, head, i, j: j - i <= reach, folder=folder,
        )  # fmt: skip
        assert sorted(written) == sorted(path.name for path in folder.iterdir())
    else:
        lanes = Spec("float32", shipped.HOST, "decode").query_tile
        mods = f"mod-score-f32x{lanes}"
        shipping.build(folder, [level()], f"{ENTRIES},decode-float32-{shipped.HOST.name},{mods}")
    env = os.environ | {kernel_cache.ENVIRONMENT: str(tmp_path / "cache"), kernel_cache.SHIPPED: str(folder)}
    program = tmp_path / "program.py"  # mods are read from their source
    program.write_text(f"import math\nOWN = {own}\n" + textwrap.dedent(MODS))
    done = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "cache").iterdir()) == []


def test_warmup_compiles_what_first_calls_need(monkeypatch):
    """By default for float32, with gradients and the layer; and what it is asked for."""
    default = {kernel.name for kernel in warming.kernels_for(None, None)}
    host = shipped.HOST.name
    for task, storage in (
        ("forward", "float16"),
        ("decode", "float32"),
        ("backward", "float64"),
        ("linear", "float32"),
    ):
        assert f"{task}-{storage}-{host}" in default
    some = {kernel.name for kernel in warming.kernels_for(["bfloat16"], ["decode", "backward"], ["int8"])}
    assert {f"decode-bfloat16-{host}", f"decode-bfloat16-int8-{host}", f"backward-bfloat16-{host}"} <= some
    assert not some & (default - {kernel.name for kernel in cpu.entries()})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtypes": ["float8"]}, "dtypes: unknown name 'float8', expected some of float32, float64"),
        ({"dtypes": "float32"}, r"dtypes must be a sequence of names, got 'float32'; write \['float32'\]"),
        ({"tasks": ["gradients"]}, "tasks: unknown name 'gradients', expected some of attention, decode"),
        ({"storage": ["int4"]}, "storage: unknown name 'int4'"),
        ({"levels": ["x86-64-v3"]}, "levels are those of the kernels in a folder: pass folder, too"),
        ({"folder": "kernels", "levels": ["x86-64-v9"]}, "levels: unknown name 'x86-64-v9'"),
    ],
)
def test_warmup_refuses(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        na.warmup(**arguments)
    assert list(tmp_path.iterdir()) == []


@HAS_LEVEL
def test_other_settings_compile(folder, tmp_path):
    """Machine code with bounds checks, or for another CPU, is not in the folder."""
    assert attend(tmp_path, NUMBA_ATTENTION_KERNELS=str(folder), NUMBA_BOUNDSCHECK="1") == {"compiled"}


@HAS_LEVEL
def test_other_sources_are_a_miss(folder, monkeypatch):
    monkeypatch.setattr(shipped, "folders", lambda: [folder])
    monkeypatch.setattr(kernel_cache, "directory", lambda: None)
    monkeypatch.setattr(cache, "directory", lambda: None)

    def caller():
        from numba_attention.cpu.launch import _make_caller

        return cache.Function("call", _make_caller, objects=0, integers=2)

    assert caller()._load() is not None
    monkeypatch.setattr(cache, "_sources", lambda: "another version")
    assert caller()._load() is None


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners of files")
def test_a_folder_that_others_may_write_is_refused(tmp_path, monkeypatch):
    tmp_path.chmod(0o777)
    monkeypatch.setenv(kernel_cache.SHIPPED, str(tmp_path))
    monkeypatch.setattr(kernel_cache, "_warned", False)
    shipped.folders.cache_clear()
    try:
        with pytest.warns(NumbaAttentionWarning, match="are not used: the folder can be written by others"):
            assert shipped.folders() == []
    finally:
        shipped.folders.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(not level().startswith("x86"), reason="a level of x86-64 on x86-64")
def test_a_lower_level(tmp_path):
    """This CPU as one that has AVX2 only."""
    shipping.build(tmp_path / "kernels", ["x86-64-v3"], f"{ENTRIES},forward-float32-AVX2")
    features = ",".join(f"+{name}" for name in LEVELS["x86-64-v3"].needs.split(","))
    of_cpu = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features}
    kernels = {"NUMBA_ATTENTION_KERNELS": str(tmp_path / "kernels")}
    assert attend(tmp_path / "cache", **of_cpu, **kernels) == {"loaded"}


@pytest.mark.parametrize("name", LEVELS)
def test_object_files_of_every_level(tmp_path, name):
    """They are of the right architecture, and need nothing but the C library, Python's stable ABI and Numba's maths."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads ELF files")
    machine = {"x86_64": 62, "aarch64": 183}[LEVELS[name].architecture]
    shipping.build(tmp_path, [name], "launch,serve,addresses,look-at-tensors")
    paths = list(tmp_path.iterdir())
    assert {p.name.rpartition("-")[0] for p in paths} == {
        "launch", "serve", "addresses", "look-at-tensors", "repeat-launches"
    }  # fmt: skip
    for path in paths:
        code = path.read_bytes()[32:].partition(b"\0")[2]
        assert code[:4] == b"\x7fELF"
        assert struct.unpack_from("<H", code, 18) == (machine,)
        assert external_symbols(code) <= ALLOWED


ALLOWED = {
    "PyDict_GetItemString", "PyErr_Clear", "PyErr_ExceptionMatches", "PyErr_Occurred", "PyErr_SetString",
    "PyEval_GetBuiltins", "PyEval_RestoreThread", "PyEval_SaveThread", "PyLong_AsLongLong", "PyLong_FromLongLong",
    "PyObject_CallFunctionObjArgs", "PyObject_GetAttr", "PyThread_acquire_lock", "PyThread_release_lock",
    "PyTuple_GetItem", "PyTuple_Size", "Py_DecRef", "memset", "memcpy", "sched_yield",
}  # fmt: skip


def external_symbols(code):
    """Names of the undefined symbols of a 64-bit ELF file."""
    offset, size, count = *struct.unpack_from("<Q", code, 40), *struct.unpack_from("<HH", code, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", code, offset + n * size) for n in range(count)]
    (symbols,) = (section for section in sections if section[1] == 2)
    names = code[sections[symbols[6]][4] :]
    found = set()
    for at in range(symbols[4], symbols[4] + symbols[5], 24):
        name, _, _, section = struct.unpack_from("<IBBH", code, at)
        if section == 0 and name:
            found.add(names[name : names.index(b"\0", name)].decode())
    return found


def test_command_knows_levels(tmp_path):
    command = [sys.executable, "-m", "numba_attention", "kernels", "build", str(tmp_path), "--level", "x86-64-v9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "unknown level 'x86-64-v9', expected some of x86-64-v4-bf16" in " ".join((done.stdout + done.stderr).split())


def test_command_says_that_no_kernel_was_meant(tmp_path):
    command = [sys.executable, "-m", "numba_attention", "kernels", "build", str(tmp_path)]
    command += ["--level", "x86-64-v3", "--only", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no kernel's name contains any of 'nothing'" in " ".join((done.stdout + done.stderr).split())
