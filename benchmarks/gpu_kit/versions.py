"""What is there, and whether it is enough: python versions.py

`versions.py --wheels FOLDER` names the wheels of the folder that this machine needs: missing or below their floor.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FLOORS = {
    "numba": "0.61", "numpy": "2.0", "scipy": "1.13", "numba-cuda": "0.24", "cuda-core": "0.7", "cuda-bindings": "12.9",
    "platformdirs": "4",
}  # fmt: skip
TOGETHER = {"numba-cuda", "cuda-core", "cuda-bindings"}  # releases that were tested with one another
OTHERS = ("pytest", "pytest-xdist", "hypothesis", "ml-dtypes", "torch", "triton", "cupy-cuda13x", "jax", "llvmlite",
         "cuda-pathfinder", "cuda-toolkit", "nvidia-nvvm", "nvidia-nvjitlink", "nvidia-cuda-nvrtc")  # fmt: skip
COLLECTED_FOR = ("sm_90a", 132, 232448)  # architecture, multiprocessors, bytes of shared memory: H100 and H200


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def wheels(folder):
    """The wheels in a folder whose package is missing here or too old."""
    carried = {path.name.split("-")[0].replace("_", "-"): path for path in sorted(Path(folder).glob("*.whl"))}
    needed = {
        name for name in carried
        if (found := installed(name)) is None or numbers(found) < numbers(FLOORS.get(name, "0"))
    }  # fmt: skip
    if needed & TOGETHER:
        needed |= TOGETHER & carried.keys()
    return [carried[name] for name in sorted(needed)]


def numbers(text):
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def main():
    if sys.argv[1:2] == ["--wheels"]:
        print(*wheels(sys.argv[2]), sep="\n")
        return 0
    problems = []
    home = os.environ.get("CUDA_HOME")
    print(f"python {sys.version.split()[0]} at {sys.executable}, {os.cpu_count()} cores, CUDA_HOME {home}")
    for name in (*FLOORS, *OTHERS):
        found = installed(name)
        floor = FLOORS.get(name)
        enough = floor is None or (found is not None and numbers(found) >= numbers(floor))
        print(f"  {name:18} {found or '-':16} {'' if enough else f'TOO OLD OR MISSING, needs {floor}'}")
        if not enough:
            problems.append(f"{name} {found} is below {floor}: carry a wheel (README.md)")
        if found is None and name in ("pytest", "pytest-xdist", "hypothesis", "ml-dtypes"):
            problems.append(f"{name} is missing: tests cannot run; carry a wheel")
    asked = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,persistence_mode"
    for command in (["nvidia-smi", f"--query-gpu={asked}", "--format=csv"], ["nvcc", "--version"],
                    ["compute-sanitizer", "--version"]):  # fmt: skip
        if shutil.which(command[0]):
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
            print(f"$ {command[0]}\n{(done.stdout + done.stderr).strip()}")
        else:
            print(f"$ {command[0]}: not on the path")
    try:
        import cuda.pathfinder as pathfinder

        for name in ("nvvm", "nvJitLink"):
            try:
                found = pathfinder.load_nvidia_dynamic_lib(name)
                print(f"{name}: {found.abs_path} ({getattr(found, 'found_via', '')})")
            except Exception as error:
                problems.append(
                    f"no {name} ({type(error).__name__}): nothing can be compiled here, only carried cubins run"
                )
    except ImportError as error:
        problems.append(f"cuda.pathfinder: {error}")
    import numba_attention as na
    from numba_attention.device import cubins

    sources = cubins.digest_of(cubins.sources())
    print(f"numba_attention {na.__version__} from {na.__file__}; sources {sources[:12]}")
    stamp = Path(os.environ["NA_KIT_CARRIED"]) / "sources.txt"
    if stamp.exists() and stamp.read_text().strip() != sources:
        problems.append("the kernels' sources have changed since machine code was made: run prepare.sh again")
    count = sum(path.suffix == ".cubin" for folder in cubins.folders() for path in folder.iterdir())
    print(f"note: {count} kernels were carried")
    status = na.backends()["cuda"]
    print(f"backend: {status}")
    if not status:
        problems.append(f"backend: {status.reason}")
    else:
        from numba_attention.device import runtime

        device = runtime.driver.device(0)
        print(f"GPU {device.name}, {device.arch}, {device.multiprocessors} multiprocessors, "
              f"{device.shared_memory} bytes of shared memory a block")  # fmt: skip
        if (device.arch, device.multiprocessors, device.shared_memory) != COLLECTED_FOR:
            problems.append(f"the device is not the one that kernels were collected for, {COLLECTED_FOR}: some have "
                            "other shapes")  # fmt: skip
        try:
            _, number = runtime.driver._api.cuDriverGetVersion()
            print(f"driver supports CUDA {number // 1000}.{number % 1000 // 10}")
        except Exception as error:
            print(error)
    for text in problems:
        print(f"PROBLEM {text}")
    print(f"versions: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
