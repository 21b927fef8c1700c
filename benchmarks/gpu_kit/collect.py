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
    import ml_dtypes
    import numpy as np

    import numba_attention as na
    from numba_attention.backends import cuda

    bf16 = np.dtype(ml_dtypes.bfloat16)
    for _, job in cuda.warmup_jobs():
        job()
    tokens, hidden = 16384, 2048
    for dtype, tf32, sizes in (
        (bf16, "0", (64, 128, 256, 32)), (np.dtype(np.float16), "0", (128,)), (np.dtype(np.float32), "0", (64,)),
        (np.dtype(np.float32), "1", (64,)),
    ):  # fmt: skip
        os.environ["NUMBA_ATTENTION_TF32X3"] = tf32
        for E in sizes:
            for causal in (False, True):
                for L in (4096, 16384):
                    q = np.zeros((tokens // L, hidden // E, L, E), dtype)
                    _, lse = na.attention(q, q, q, is_causal=causal, return_lse=True, backend="cuda")
                    if dtype == bf16 and E in (64, 128):
                        na.attention_backward(q, q, q, q, q, lse, is_causal=causal, backend="cuda")
    os.environ["NUMBA_ATTENTION_TF32X3"] = "0"
    for B, S in ((1, 8192), (1, 65536), (64, 8192)):
        q, k = np.zeros((B, 32, 1, 128), bf16), np.zeros((B, 8, S, 128), bf16)
        na.attention_decode(q, na.KVCache.from_arrays(k, k), backend="cuda")
        codes, scale = np.zeros(k.shape, np.int8), np.zeros(k.shape[:-1], np.float32)
        cache = na.KVCache.from_arrays(codes, codes, key_scale=scale, value_scale=scale, dtype="bfloat16")
        na.attention_decode(q, cache, backend="cuda")
    table = np.arange(64 * 512).reshape(64, 512)
    pages = np.zeros((64 * 512, 8, 16, 128), bf16)
    na.attention_decode(q, na.PagedKVCache.from_arrays(pages, pages, table, np.full(64, 8192)), backend="cuda")
    q, k = np.zeros((64, 64, 1, 128), bf16), np.zeros((64, 1, 8192, 128), bf16)
    na.attention_decode(q, na.KVCache.from_arrays(k, k), backend="cuda")
    q = np.zeros((1, 8, 128, 64), bf16)
    na.attention(q, q, q, backend="cuda")


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
