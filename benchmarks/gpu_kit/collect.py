"""Which kernels the stages ask for, one list a stage: python collect.py FOLDER [STAGE ...]

On the stub of a driver, where nothing is compiled or run.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import gpukit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def plain():
    """What `benchmarks/gpu.py` calls and what `warmup` compiles, with arrays of the host in their place."""
    import bench
    import torch

    from numba_attention.backends import cuda

    os.environ["NUMBA_ATTENTION_BACKEND"] = "cuda"
    for _, job in cuda.warmup_jobs():
        job()
    gpu = bench.load()
    machine = gpu.Machine(dry=True)
    machine.short = 1
    machine.normal = lambda *shape, dtype="bfloat16": torch.zeros(shape, dtype=getattr(torch, dtype))
    machine.peers = lambda *_, **__: {}
    for row in gpu.rows():
        if row.bytes < 4e9:  # (the kernels of larger caches are those of smaller ones)
            calls = row.make(machine)
            for name in {"ours", "mma.sync"} & calls.keys():
                calls[name]()


def main():
    if sys.argv[1] == "--plain":
        return plain()
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    tests = os.fspath(ROOT / "tests")
    parallel = ["-n", "2"] if importlib.util.find_spec("xdist") else []
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", "not test_sanitizer", "-p",
              "no:cacheprovider", "-p", "gpukit_pytest", "--tb=no", *parallel]  # fmt: skip
    kernels = os.path.join(tests, "cuda", "test_cuda_kernels.py")
    others = [os.path.join(tests, *name) for name in (("cuda", "test_cuda_gpu.py"), ("device", "test_cuda_interop.py"))]
    stages = {
        "1-smoke": [sys.executable, HERE / "smoke.py"],
        "2-bench": [sys.executable, HERE / "collect.py", "--plain"],
        "3-grid": [*pytest, kernels, "--kit-share", "8"],
        "4-rest": [*pytest, kernels, *others],
    }
    for name, command in stages.items():
        if sys.argv[2:] and name not in sys.argv[2:]:
            continue
        target = folder / f"{name}.list"
        target.unlink(missing_ok=True)
        environment = os.environ | {"NA_KIT": "1", "NA_KIT_COLLECT": os.fspath(target), "NA_KIT_LENIENT": "1"}
        with open(folder / f"{name}.log", "w") as log:
            done = subprocess.run(command, env=environment, stdout=log, stderr=log, cwd=ROOT, check=False)
        lines = sorted(set(target.read_text().split())) if target.exists() else []
        target.write_text("".join(f"{line}\n" for line in lines))
        count = len(gpukit.collected(target))
        print(f"{name}: {count} kernels (exit {done.returncode}; results mean nothing here)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
