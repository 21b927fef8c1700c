"""Imports run one way, and importing the package is cheap: nothing compiles, nothing optional is loaded."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import numba_attention

ROOT = Path(numba_attention.__file__).parent

# From the rim down. A module may import from layers below its own, and from its own.
LAYERS = [
    (
        "rim",
        ["__init__", "__main__", "benchmarking", "cli", "commands", "config", "demo", "files", "jax", "plot", "torch"],
    ),
    ("layer", ["layer", "incremental", "weights", "inputs", "renaming"]),
    ("api", ["api", "decoding", "merging", "rotary", "varlen"]),
    ("projection", ["projection"]),
    ("placing", ["placing"]),
    ("backends", ["backends"]),
    ("problem", ["problem", "cached", "packed"]),
    ("caches", ["caches"]),
    ("validation", ["validation"]),
    ("kernels", ["cpu", "cuda"]),
    ("primitives", ["bounded", "forks", "intervals", "options", "kernel_cache", "narrowing", "atomic"]),
    ("errors", ["errors"]),
]  # fmt: skip
LEVEL = {module: level for level, (_, modules) in enumerate(LAYERS) for module in modules}

# Within cpu/: the kernel, then what it is made of.
CPU = [
    ["forward", "decode", "backward", "linear"],
    ["scoring"],
    ["stages", "sums", "sources", "features"],
    ["softmax", "tiles"],
    ["gemm"],
    ["elements", "exp", "launch", "views"],
    ["cache"],
    ["simd", "params", "machine_code"],
]
CPU_LEVEL = {module: level for level, modules in enumerate(CPU) for module in modules}

# Within cuda/, on the host's side: what callers have, the device, and what both are made of.
CUDA = [
    ["arrays"],
    ["runtime"],
    ["driver", "cubins", "dlpack"],
    ["diagnosis", "headers"],
]
CUDA_LEVEL = {module: level for level, modules in enumerate(CUDA) for module in modules}

FILES = sorted(ROOT.rglob("*.py"))


def modules_imported(path):
    """Dotted names below the package that a file imports, anywhere in it, and whether at the top."""
    package = path.relative_to(ROOT).parts[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)]
            parts = (*base, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                yield (*parts, alias.name), top
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == ROOT.name:
            for alias in node.names:
                yield (*node.module.split(".")[1:], alias.name), top
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == ROOT.name:
                    yield tuple(alias.name.split(".")[1:]), top


def name_of(path):
    return path.relative_to(ROOT).with_suffix("").as_posix()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_down(path):
    own = name_of(path).split("/")[0]
    assert own in LEVEL, f"give {own} a place in LAYERS"
    for target, top in modules_imported(path):
        if target[0] not in LEVEL:  # a name defined in __init__ itself
            assert LEVEL[own] == 0, f"{own} imports {target[0]} from the package above it"
            continue
        if own == "__init__" or (target[0] == "config" and not top):
            continue
        assert LEVEL[target[0]] >= LEVEL[own], f"{own} imports {'.'.join(target)}, which is above it"


@pytest.mark.parametrize("path", sorted([*ROOT.glob("cpu/*.py"), *ROOT.glob("cuda/*.py")]), ids=name_of)
def test_imports_run_down_within_kernels(path):
    if path.stem == "__init__":
        return
    package = path.parent.name
    levels = {"cpu": CPU_LEVEL, "cuda": CUDA_LEVEL}[package]
    own = levels.get(path.stem, 0)
    for target, _ in modules_imported(path):
        if target[0] == package and len(target) > 1 and target[1] in levels:
            assert levels[target[1]] >= own, f"{path.stem} imports {target[1]}, which is above it"


def test_kernels_know_nothing_of_calls():
    """Only backends turn a Problem into numbers for a kernel."""
    for path in [*ROOT.glob("cpu/*.py"), *ROOT.glob("cuda/*.py")]:
        assert not {target[0] for target, _ in modules_imported(path)} & {"problem", "backends", "api", "merging"}


def test_no_numba_above_the_backends():
    for module in (
        "api",
        "merging",
        "problem",
        "validation",
        "options",
        "intervals",
        "errors",
        "backends/__init__",
        "backends/reference",
        "cached",
        "packed",
        "placing",
        *(f"caches/{path.stem}" for path in (ROOT / "caches").glob("*.py")),
    ):
        for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("numba", "llvmlite") for name in names), module


def test_caches_know_nothing_of_who_reads_them():
    for path in (ROOT / "caches").glob("*.py"):
        assert {target[0] for target, _ in modules_imported(path)} <= {
            "caches",
            "cuda",
            "errors",
            "narrowing",
            "options",
            "validation",
        }, path


def test_reference_stands_alone():
    """The oracle shares no code with what it judges."""
    found = {target[0] for target, _ in modules_imported(ROOT / "backends" / "reference.py")}
    assert found <= {"options", "problem"}


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_optional():
    optional = [
        "torch",
        "jax",
        "matplotlib",
        "rich",
        "typer",
        "tokenizers",
        "safetensors",
        "ml_dtypes",
        "onnxruntime",
        "pytest",
        "cuda",
        "numba_cuda",
        "cupy",
    ]
    code = f"import sys, numba_attention; print([m for m in {optional} if m in sys.modules])"
    assert run(code) == "[]"


def test_import_compiles_nothing():
    code = """
import numba.core.compiler, llvmlite.binding
def refuse(*arguments, **kwargs): raise AssertionError("compiles at import")
numba.core.compiler.compile_extra = refuse
numba.core.compiler.CompilerBase.compile_extra = refuse
import numba_attention
numba_attention.backends()
print("clean")
"""
    assert run(code) == "clean"


def test_import_starts_no_threads_and_writes_nothing(tmp_path):
    code = f"""
import os, threading
os.environ["NUMBA_ATTENTION_CACHE_DIR"] = {str(tmp_path / "cache")!r}
import numba_attention
print(threading.active_count(), os.path.exists({str(tmp_path / "cache")!r}))
"""
    assert run(code) == "1 False"


def test_reference_needs_no_numba():
    """Where nothing can be compiled, the textbook still works."""
    code = """
import sys
sys.modules["numba"] = None
import numpy as np, numba_attention as na
print(na.attention(np.ones((2, 3)), np.ones((4, 3)), np.ones((4, 5)), backend="reference").sum())
"""
    assert run(code) == "10.0"


def test_public_names():
    for name in numba_attention.__all__:
        assert getattr(numba_attention, name).__doc__, f"{name} has no docstring"
    assert sorted(numba_attention.__all__) == numba_attention.__all__
    assert np.__name__ not in vars(numba_attention)
