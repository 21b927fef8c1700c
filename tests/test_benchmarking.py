"""The bench: every contender computes the same thing, and figures are worked out right. Nobody's speed is asserted."""

import io
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
from benchmarks.tables import tables
from rich.console import Console

from numba_attention.benchmarking import (
    ROWS,
    Result,
    Row,
    as_json,
    as_markdown,
    as_table,
    circumstances,
    from_json,
    insert,
    left_out,
)
from numba_attention.benchmarking.contenders import CONTENDERS, Skipped
from numba_attention.show_config import show_config

SMALL = Row("small", 2, 4, 4, 24, 24, 8, 8)
VARIANTS = {
    "plain": SMALL,
    "GQA causal": replace(SMALL, Hkv=2, is_causal=True),
    "window": replace(SMALL, window=(5, 2)),
    "mask": replace(SMALL, mask=True),
    "bias": replace(SMALL, bias=True),
    "alibi": replace(SMALL, alibi=True),
    "softcap": replace(SMALL, softcap=2.0),
    "all": replace(SMALL, mask=True, bias=True, alibi=True, window=(9, 9)),
    "Ev": replace(SMALL, Ev=12),
    "float64": replace(SMALL, dtype="float64"),
    "float16": replace(SMALL, dtype="float16"),
    "bfloat16": replace(SMALL, dtype="bfloat16"),
}
# float64: ONNX takes the scale as float32.
TOLERANCES = {"float32": 1e-5, "float64": 1e-6, "float16": 1e-2, "bfloat16": 5e-2}


def result_of(contender, row):
    result = CONTENDERS[contender][1](row, 1)()
    return result.double().numpy() if hasattr(result, "double") else np.asarray(result, np.float64)


@pytest.mark.torch
@pytest.mark.parametrize("contender", ["einsum", "torch", "onnxruntime"])
@pytest.mark.parametrize("name", VARIANTS)
def test_peers_compute_the_same(name, contender):
    row = VARIANTS[name]
    try:
        theirs = result_of(contender, row)
    except Skipped as why:
        pytest.skip(str(why))
    np.testing.assert_allclose(theirs, result_of("ours", row), atol=TOLERANCES[row.dtype], rtol=0)


@pytest.mark.parametrize("row", [replace(SMALL, window=(5, 2)), replace(SMALL, L=30, window=(0, 40))])
def test_pairs_of_a_window(row):
    left, right = row.window
    assert row.pairs == sum(i - left <= j <= i + right for i in range(row.L) for j in range(row.S))


def test_operations_and_bytes():
    row = ROWS["GQA causal H32 Hkv8 2048 E128"]
    assert row.flops == 4 * 32 * 2048 * 2048 * 128 / 2
    assert row.bytes == 4 * 2048 * 128 * (32 + 2 * 8)
    assert ROWS["Ev 128, 2048 E64"].flops == 2 * 8 * 2048 * 2048 * (64 + 128)


@pytest.mark.parametrize("task", ["jvp", "double backward", "hvp"])
def test_second_derivatives_of_both_contenders_agree(torch, task):
    row = Row("small", L=40, S=70, H=2, Hkv=2, E=16, Ev=24, task=task)
    threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        got, want = (np.asarray(make(row, 1)()) for make in (CONTENDERS["ours"][1], CONTENDERS["torch"][1]))
    finally:
        torch.set_num_threads(threads[0])
        numba.set_num_threads(threads[1])
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_bars_can_be_measured():
    measured = {"us", "rate", "gemm", "read", "einsum", "torch", "onnxruntime", "own"}
    for row in ROWS.values():
        assert set(row.bars) <= measured
        assert ("own" in row.bars) == (row.baseline is not None)


def example():
    row = replace(SMALL, bars={"torch": 2.0, "own": 0.6, "onnxruntime": 1.0}, baseline=replace(SMALL, L=48))
    seconds = {"ours": [1.0, 2.0, 4.0], "torch": [3.0, 4.0, 10.0], "own": [1.0, 2.0, 4.0], "gemm": [1.0, 1.0, 1.0]}
    return Result(row, seconds, {"onnxruntime": "not installed"})


def test_metrics_are_medians_of_ratios_within_a_round():
    result = example()
    assert result.metrics["us"] == 2e6
    assert result.metrics["torch"] == 2.5  # of 3, 2, 2.5; the ratio of the medians would be 2
    assert result.metrics["own"] == 0.5
    assert result.metrics["gemm"] == pytest.approx(result.row.flops / 2 / (2 * 2048**3))
    assert result.verdicts == {"torch": True, "own": False, "onnxruntime": None}
    assert result.spread == 0.75


def test_of_a_first_call_only_its_time_is_told():
    row = ROWS["first call, empty kernel cache"]
    result = Result(row, {"ours": [3.0, 5.0, 9.0]})
    assert result.metrics == {"us": 5e6}
    assert result.verdicts == {"us": False}


# Of arrays of ones, by hand: means of ones, equal weights of 8 keys, and gradients of scores that sum to 0.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "result"),
    [
        ("first call", np.ones(128)),
        ("first call of few queries", np.ones(16)),
        ("first call of weights", np.full(64, 1 / 8)),
        ("first call of the layer", None),
        ("first call of gradients", np.zeros(128)),
    ],
)
def test_a_first_call_compiles(task, result):
    row = replace(ROWS[f"{task}, empty kernel cache"], L=8, S=8, H=1, Hkv=1, E=16, Ev=16)
    call = CONTENDERS["ours"][1](row, 1)
    start = time.perf_counter()
    found = call()
    assert time.perf_counter() - start > 0.5
    if result is None:
        assert found.shape == (128,)
        assert np.ptp(found.reshape(8, 16), axis=0).max() < 1e-5  # all rows are the same
    else:
        np.testing.assert_allclose(found, result, rtol=1e-6, atol=1e-6)


def test_reports(tmp_path):
    found = circumstances(show_config("dicts"), 2, 3)
    table = as_markdown([example()], found)
    assert "| small | 2 s |" in table
    assert "| 2.50 |" in table
    assert "2 threads" in table
    assert not re.search(r"FAIL|verdict|bar\b|\(2\.00\)|\*\*", table)
    assert "| 2.50 (2.00) | not measured | **0.50** (0.60) |" in as_markdown([example()], found, bars=True)
    terminal = io.StringIO()
    Console(width=200, file=terminal).print(as_table([example()]))
    for text in ("2.50 (2.00)", "FAIL", "verdict", "not measured"):
        assert text in terminal.getvalue()
    assert left_out([example(), example()]) == ["onnxruntime left out of small, small: not installed"]
    (tmp_path / "page.md").write_text("no markers")
    with pytest.raises(ValueError, match="has no <!-- bench:start -->"):
        insert(tmp_path / "page.md", table)


def test_a_file_of_figures_is_read_as_it_was_written():
    found = circumstances(show_config("dicts"), 2, 3)
    row = ROWS["softcap 2048 E64"]
    times = Result(row, {"ours": [1.0, 2.0, 4.0], "own": [1.0, 2.0, 3.0]}, {"torch": "has no softcap"})
    changed = Result(replace(ROWS["tiny H8 64 E64"], L=65), {"ours": [1.0]})
    results, then = from_json(as_json([times, changed, Result(SMALL, {"ours": [1.0]})], found))
    assert then == found
    assert [result.row for result in results] == list(ROWS.values())
    by_name = {result.row.name: result for result in results}
    assert by_name["softcap 2048 E64"] == times
    assert not by_name["tiny H8 64 E64"].seconds, "figures of other work"
    assert not by_name["full 4096 E64"].seconds, "figures of nothing"


def test_pages_say_what_the_files_of_figures_say():
    for page, name, text in tables():
        assert f"<!-- {name}:start -->\n{text}\n<!-- {name}:end -->" in page.read_text(encoding="utf-8"), (
            f"{page.name}: run python -m benchmarks.tables"
        )


def test_benchmarks_import_without_peers():
    """asv imports every file of the folder, in an environment without the peers, and fails if one does."""
    folder = Path(__file__).parents[1] / "benchmarks"
    code = f"""
import importlib, pathlib, sys
for name in ("dask", "torch", "jax", "transformers", "onnxruntime", "cupy", "triton"):
    sys.modules[name] = None
sys.path.insert(0, {str(folder.parent)!r})
for path in sorted(pathlib.Path({str(folder)!r}).glob("*.py")):
    importlib.import_module("benchmarks." + path.stem)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
