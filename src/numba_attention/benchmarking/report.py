"""Results as a table for the terminal, as Markdown for the README, as JSON for other programs."""

import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..atomic import replacing
from ..show_config import Facts
from .rows import Row
from .runner import Result

# Metric of `runner.Result`: heading of its column, and format of its figures. Times have a format of their own.
_COLUMNS: dict[str, tuple[str, str]] = {
    "us": ("time", ""),
    "rate": ("GF/s", ".0f"),
    "gemm": ("% gemm", ".0%"),
    "read": ("% read", ".0%"),
    "einsum": ("x einsum", ".1f"),
    "torch": ("x PyTorch", ".2f"),
    "onnxruntime": ("x ONNX RT", ".2f"),
    "own": ("x plain", ".2f"),
}
START, END = "<!-- bench:start -->", "<!-- bench:end -->"


def as_table(results: list[Result]) -> Table:
    """Return the results as a table to print with rich.

    The bar that a figure is held to follows it in parentheses, and the last column says whether the row meets its bars.
    """
    table = Table(title="numba-attention bench", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in [*_headings(), "verdict"]:
        table.add_column(heading, justify="right" if heading in _NUMBERS else "left", no_wrap=True)
    for result in results:
        verdict = _verdict(result)
        colour = {"pass": "green", "FAIL": "red"}.get(verdict)
        table.add_row(*_cells(result, bars=True), f"[{colour}]{verdict}[/{colour}]" if colour else verdict)
    return table


def as_markdown(results: list[Result], facts: Facts, threads: int, rounds: int) -> str:
    """Return the measured figures as a Markdown table, without bars, and the circumstances of the measurement below."""
    lines = ["| " + " | ".join(_headings()) + " |", "| --- |" + " ---: |" * len(_COLUMNS)]
    lines += ["| " + " | ".join(_cells(result, bars=False)) + " |" for result in results]
    versions = ", ".join(f"{name} {version}" for name, version in _versions(facts).items())
    spread = max((result.spread for result in results), default=0.0)
    lines += [
        "",
        f"{_processor()}, {facts['CPU']['SIMD']}; {threads} threads; {versions}; {datetime.date.today()}. "
        f"Every figure is the median of {rounds} rounds; our own times varied by up to ±{spread:.0%} between rounds. "
        "GF/s: billions of floating-point operations of the matrix products in a second. % gemm: this rate, relative "
        "to NumPy's own matrix product in the same precision. % read: bytes of the inputs in a second, relative to the "
        "read bandwidth of the memory. x: how many times as fast as the other library; x plain: the rate relative to "
        "the same call in float32 without the option.",
    ]
    return "\n".join(lines)


def bars_as_markdown(rows: Sequence[Row]) -> str:
    """Return the bars of the rows as a Markdown table, for docs/performance.md."""
    names = [name for name in _COLUMNS if any(name in row.bars for row in rows)]
    lines = ["| work | " + " | ".join(_COLUMNS[name][0] for name in names) + " |", "| --- |" + " ---: |" * len(names)]
    for row in rows:
        if row.bars:
            cells = [_format(name, row.bars[name]) if name in row.bars else "-" for name in names]
            lines.append("| " + " | ".join([row.name, *cells]) + " |")
    return "\n".join(lines)


def as_json(results: list[Result], facts: Facts, threads: int, rounds: int) -> str:
    """Return everything that was measured, every round of it."""
    return json.dumps(
        {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "processor": _processor(),
            "threads": threads,
            "rounds": rounds,
            "config": facts,
            "rows": [_plain(result) for result in results],
        },
        indent=1,
    )


def left_out(results: list[Result]) -> list[str]:
    """Return one line for each library and reason, with the rows in which that library was not measured."""
    rows: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, why in result.skipped.items():
            rows.setdefault((name, why), []).append(result.row.name)
    return [f"{name} left out of {', '.join(where)}: {why}" for (name, why), where in rows.items()]


def insert(path: Path, text: str) -> None:
    """Replace what stands between the two markers of a file."""
    before, start, rest = path.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"{path} has no {START} and {END}")
    with replacing(path) as unfinished:
        unfinished.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")


_NUMBERS = {heading for heading, _ in _COLUMNS.values()}


def _headings() -> list[str]:
    return ["work", *(heading for heading, _ in _COLUMNS.values())]


def _cells(result: Result, *, bars: bool) -> list[str]:
    metrics, row = result.metrics, result.row
    cells = [row.name]
    for name in _COLUMNS:
        has_bar = bars and name in row.bars
        if name in metrics:
            cells.append(_format(name, metrics[name]) + (f" ({_format(name, row.bars[name])})" if has_bar else ""))
        else:
            cells.append("not measured" if has_bar else "-")
    return cells


def _format(name: str, figure: float) -> str:
    return _duration(figure) if name == "us" else format(figure, _COLUMNS[name][1])


def _verdict(result: Result) -> str:
    verdicts = result.verdicts.values()
    if False in verdicts or "ours" in result.skipped:
        return "FAIL"
    return "pass" if verdicts and None not in verdicts else ""


def _duration(us: float) -> str:
    for unit, factor in (("s", 1e6), ("ms", 1e3)):
        if us >= factor:
            return f"{us / factor:.3g} {unit}"
    return f"{us:.3g} µs"


def _versions(facts: Facts) -> dict[str, str]:
    wanted = ("numba-attention", "numba", "numpy", "torch", "onnxruntime", "python")
    return {name: v.partition(" ")[0] for name in wanted if (v := facts["Versions"][name]) != "not installed"}


def _plain(result: Result) -> dict[str, Any]:
    return {
        "name": result.row.name,
        "flops": result.row.flops,
        "bytes": result.row.bytes,
        "seconds": result.seconds,
        "skipped": result.skipped,
        "metrics": result.metrics,
        "bars": result.row.bars,
        "verdicts": result.verdicts,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({os.cpu_count()} CPUs)"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} CPUs)"


__all__ = ["END", "START", "as_json", "as_markdown", "as_table", "bars_as_markdown", "insert", "left_out"]
