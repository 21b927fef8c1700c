"""The kit for a first run on a GPU (benchmarks/gpu_kit), which replaces functions of the package by name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda")
pytest.importorskip("cuda.core")
ROOT = Path(__file__).parents[2]
KIT = ROOT / "benchmarks" / "gpu_kit"


@pytest.fixture
def kit(tmp_path):
    """A function that runs Python as the kit does, on the stub of a driver."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler, for the stub")
    stub = ROOT / "tests" / "support" / "libcuda.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", tmp_path / "libcuda.so.1", stub], check=True)
    (tmp_path / "kernels").mkdir(mode=0o700)
    folders = [KIT / "site", KIT, ROOT / "src", ROOT / "tests" / "support", ROOT / "tests" / "cuda"]
    settings = {
        "NA_KIT": "1",
        "NA_KIT_NOTES": tmp_path / "notes.txt",
        "NA_KIT_CARRIED": tmp_path,
        "NUMBA_ATTENTION_KERNELS": tmp_path / "kernels",
        "NUMBA_ATTENTION_CACHE_DIR": tmp_path / "cache",
        "LD_LIBRARY_PATH": tmp_path,
        "CUDA_VISIBLE_DEVICES": "0",
        "PYTHONPATH": os.pathsep.join(map(os.fspath, folders)),
    }

    def run(*arguments, **more):
        environment = os.environ | {name: os.fspath(value) for name, value in (settings | more).items()}
        command = [sys.executable, *map(os.fspath, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("mode", ["NA_KIT_COLLECT", "NA_KIT_EMULATE"])
def test_all_that_is_replaced_is_there(kit, tmp_path, mode):
    code = "import gpukit, importlib; print(*(importlib.import_module(name).__name__ for name in gpukit.PATCHES))"
    modules = kit("-c", code, NA_KIT_LENIENT="1", **{mode: tmp_path / "asked.list"}).split()
    assert "numba_attention.device.cubins" in modules


def test_from_a_list_to_a_run(kit, tmp_path):
    """What a step asks for is compiled ahead, and found by the run."""
    asked, step = tmp_path / "asked.list", (KIT / "smoke.py", "--only", "float16_one_product")
    kit(*step, NA_KIT_COLLECT=asked)
    compiled = kit(KIT / "precompile.py", asked, "--jobs", "1", "--names", tmp_path / "names.txt")
    assert "1 kernels, 1 to be compiled\n" in compiled
    (name,) = (tmp_path / "names.txt").read_text().split()
    assert (tmp_path / "kernels" / name).stat().st_size > 1000
    assert kit(KIT / "precompile.py", asked, "--count") == "1 kernels, 0 to be compiled\n"
    kept = "from numba_attention.device import cubins; print(cubins.are_kept(['sm_90a']), cubins.are_kept(['sm_80']))"
    assert kit("-c", kept) == "True False\n"
    assert "ok   float16_one_product" in kit(*step, NA_KIT_EMULATE="1")
    notes = (tmp_path / "notes.txt").read_text().splitlines()
    assert [line.split()[0] for line in notes] == ["there"]


@pytest.mark.torch
def test_steps_of_pytorch_are_collected_and_rehearsed(kit, tmp_path, torch):
    asked, step = tmp_path / "asked.list", (KIT / "smoke.py", "--only", "torch_append_and_decode")
    assert "ok   torch_append" in kit(*step, NA_KIT_COLLECT=asked)
    names = kit("-c", f"import gpukit; print(*(c.task for c in gpukit.collected({os.fspath(asked)!r})))").split()
    assert set(names) == {"append", "forward"}
    assert "ok   torch_append" in kit(*step, NA_KIT_EMULATE="1")


def test_steps_that_the_sanitizer_runs_exist(kit):
    code = "import sanitize, smoke; print({step for _, step in sanitize.RUNS} - set(smoke.STEPS))"
    assert kit("-c", code) == "set()\n"


def test_kernels_that_the_emulator_runs_have_all_of_real_ones(kit):
    """A repeated call with another seed writes it to the place that its kernel names."""
    code = """
import gpukit
from numba_attention.cuda import kernels
from numba_attention.cuda.parameters import INTEGERS
from numba_attention.cuda.spec import Spec
for dropout in (False, True):
    print(gpukit._stands_in(kernels, Spec("forward", "float32", 32, 32, dropout=dropout)).seed, INTEGERS.index("seed"))
"""
    (none, _), (seed, place) = (line.split() for line in kit("-c", code).splitlines())
    assert (none, seed) == ("None", place)


def test_numbers_of_threads(kit):
    """Those that Numba cannot have are left out: a number that is too large would end the stage."""
    code = "import numba, scaling; print(scaling.possible([1, 2, 4, 8, 2]))"
    place = {"PYTHONPATH": os.pathsep.join(map(os.fspath, [ROOT / "benchmarks", ROOT / "src"]))}
    assert kit("-c", code, NUMBA_NUM_THREADS="4", **place) == "[1, 2, 4]\n"
    assert kit("-c", code, NUMBA_NUM_THREADS="1", **place) == "[1]\n"


@pytest.mark.torch
def test_rows_of_the_benchmark_exist(kit, torch):
    code = "import bench; print(set(bench.FIRST) - {row.name for row in bench.load().rows()})"
    assert kit("-c", code) == "set()\n"


@pytest.mark.parametrize("script", ["first_run.sh", "prepare.sh"])
def test_scripts_are_whole(script):
    text = (KIT / script).read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", KIT / script]).returncode == 0
    for name in ("src", "tests/support/libcuda.c", *(["tests/cuda/test_cuda_kernels.py"] if script[0] == "f" else [])):
        assert name in text
        assert (ROOT / name).exists()
