"""The driver's side of the CUDA backend on a stub of libcuda: the calls that cuda.core and cuda.bindings make."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda")
pytest.importorskip("cuda.core")
HERE = Path(__file__).parents[1] / "support"


@pytest.mark.parametrize("script", ["on_libcuda.py", "contexts_on_libcuda.py"])
def test_on_a_stub(tmp_path, script):
    if script.startswith("contexts"):
        pytest.importorskip("torch")
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler, for the stub")
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", library, HERE / "libcuda.c"], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": os.fspath(tmp_path), "CUDA_VISIBLE_DEVICES": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, HERE / script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("done\n")
