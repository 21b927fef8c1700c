"""Imports run one way, and importing the package is cheap: nothing compiles, nothing optional is loaded."""

import ast
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import numba_attention
from numba_attention import nn
from numba_attention.cpu import cache
from numba_attention.device import cubins

ROOT = Path(numba_attention.__file__).parent

DESIGN = Path(__file__).parents[1] / "docs" / "design.md"


def floors():
    """The picture of the house in docs/design.md: the rooms of each floor from the top down, of each wing."""
    picture = re.search(r"<!-- house:start -->\n```text\n(.*?)```", DESIGN.read_text(encoding="utf-8"), re.S).group(1)
    whole, *wings = [block.splitlines() for block in picture.strip().split("\n\n")]
    rooms = {"": [re.split(r"  +", line)[1].split() for line in whole]}
    return rooms | {wing[0].split()[0]: [line.split()[1:] for line in wing] for wing in wings}


FLOORS = floors()
LEVELS = {
    wing: {room: n for n, rooms in enumerate(wing_rooms) for room in rooms} for wing, wing_rooms in FLOORS.items()
}

FILES = sorted(ROOT.rglob("*.py"))


def modules_imported(path):
    """Dotted names below the package that a file imports, anywhere in it."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)]
            parts = (*base, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                yield (*parts, alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == ROOT.name:
            for alias in node.names:
                yield (*node.module.split(".")[1:], alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == ROOT.name:
                    yield tuple(alias.name.split(".")[1:])


def name_of(path):
    return path.relative_to(ROOT).with_suffix("").as_posix()


def imports_of(path):
    """The modules of the package that a file imports, dotted, wherever in the file it does so."""
    names = {name_of(file).replace("/", ".").removesuffix(".__init__") for file in FILES}
    for target in modules_imported(path):
        whole, parent = ".".join(target), ".".join(target[:-1])
        yield whole if whole in names else parent or "__init__"


@pytest.mark.parametrize("wing", FLOORS, ids=lambda wing: wing or "package")
def test_the_picture_shows_every_room_once(wing):
    shown = [room for rooms in FLOORS[wing] for room in rooms]
    assert len(shown) == len(set(shown))
    there = {path.stem for path in (ROOT / wing).glob("*.py")}
    if wing:
        there -= {"__init__"}
    else:
        there |= {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(shown) == there


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_down(path):
    room = name_of(path).split("/")[0]
    levels = LEVELS[""]
    for target in imports_of(path):
        other = target.split(".")[0]
        if room == "__init__" or other == room:
            continue
        if other == "__init__":
            assert levels[room] == 0, f"{room} imports names of the package above it"
        else:
            assert levels[other] > levels[room] or (levels[room] == 0 and levels[other] == 0), (
                f"{room} imports {target}"
            )


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in LEVELS], ids=name_of)
def test_imports_run_down_within_a_wing(path):
    wing = path.parent.name
    if path.stem == "__init__":
        return
    for target in imports_of(path):
        room, _, other = target.partition(".")
        if room == wing and other and other != path.stem:
            assert LEVELS[wing][other] > LEVELS[wing][path.stem], f"{path.stem} imports {other}"


def test_no_circles():
    """Imports inside functions count."""
    graph = {}
    for path in FILES:
        name = name_of(path).replace("/", ".").removesuffix(".__init__")
        graph[name] = {target for target in imports_of(path) if target != name}
    graph.pop("__init__")
    while leaves := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    assert not graph


@pytest.mark.parametrize(("wing", "sources"), [("cpu", cache.sources), ("cuda", cubins.sources)])
def test_digests_of_kernels_cover_all_that_is_compiled(wing, sources):
    """What modules of kernels import, and what that imports: a change there must not find old machine code."""
    covered = {name_of(path).replace("/", ".") for path in sources()}
    host = {"cpu": {"forks", "kernel_cache", "teams"}, "cuda": {"device", "errors"}}[wing]  # not in machine code
    waiting, seen = [f"{wing}.{path.stem}" for path in (ROOT / wing).glob("*.py")], set()
    while waiting:
        module = waiting.pop()
        if module in seen or module.split(".")[0] in host or module.endswith("__init__"):
            continue
        seen.add(module)
        waiting += imports_of(ROOT / f"{module.replace('.', '/')}.py")
    assert seen <= covered


def test_kernels_know_nothing_of_calls():
    """Only backends turn a Problem into numbers for a kernel."""
    for path in [*ROOT.glob("cpu/*.py"), *ROOT.glob("cuda/*.py")]:
        assert not {target[0] for target in modules_imported(path)} & {"problem", "backends", "api", "merging"}


def test_no_numba_above_the_backends():
    above = [path for path in FILES if path.parent.name in ("", "problem", "caches", "nn", ROOT.name)]
    above = [path for path in above if path.stem not in ("__main__", "show_config", "torch", "jax", "onnx", "plot")]
    for module in ["backends/__init__", "backends/reference", *map(name_of, above)]:
        for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("numba", "llvmlite") for name in names), module


def test_caches_know_nothing_of_who_reads_them():
    for path in (ROOT / "caches").glob("*.py"):
        assert {target[0] for target in modules_imported(path)} <= {
            "caches",
            "cuda",  # kernels that write to caches on a GPU
            "device",
            "errors",
            "markup",
            "narrowing",
            "options",
            "validation",
        }, path


@pytest.mark.parametrize(
    "name", ["layer.attention.MultiHeadAttention", "layer.attention.Context", *(f"nn.{name}" for name in nn.__all__)]
)
def test_public_places_of_classes_that_pickles_name(name):
    module, _, attribute = f"numba_attention.{name}".rpartition(".")
    assert pickle.loads(f"c{module}\n{attribute}\n.".encode()).__name__ == attribute


def test_reference_stands_alone():
    """The oracle shares no code with what it judges."""
    found = {target[0] for target in modules_imported(ROOT / "backends" / "reference.py")}
    assert found <= {"mods", "options", "problem"}


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_optional():
    optional = [
        "torch",
        "transformers",
        "pandas",
        "xarray",
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
        "dask",
        "distributed",
    ]
    code = f"import sys, numba_attention; print([m for m in {optional} if m in sys.modules])"
    assert run(code) == "[]"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_imports_what_numpy_imports_late(path):
    """A signal handler that interrupts the import, and calls the same code, recurses in `numpy.__getattr__`."""
    late = {"char", "core", "ctypeslib", "f2py", "fft", "ma", "matlib", "rec", "strings", "testing"}
    found = [
        node.attr
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "np"
    ]
    assert not late & set(found)


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
