"""Results as a table for the terminal, as Markdown for the README, as JSON for other programs."""

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..atomic import replacing
from ..show_config import Facts
from .runner import Result

# metric -> heading, how to print it
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
    """Return the results as a table to print with rich; in parentheses the bar that a figure is held to."""
    table = Table(title="numba-attention bench", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in _headings():
        table.add_column(heading, justify="right" if heading in _NUMBERS else "left", no_wrap=True)
    for result in results:
        *cells, verdict = _cells(result)
        colour = {"pass": "green", "FAIL": "red"}.get(verdict)
        table.add_row(*cells, f"[{colour}]{verdict}[/{colour}]" if colour else verdict)
    return table


def as_markdown(results: list[Result], facts: Facts, threads: int, rounds: int) -> str:
    """Return the results as a Markdown table with the circumstances of the measurement below."""
    headings = _headings()
    lines = ["| " + " | ".join(headings) + " |", "| --- |" + " ---: |" * len(_COLUMNS) + " --- |"]
    lines += ["| " + " | ".join(_cells(result)) + " |" for result in results]
    versions = ", ".join(f"{name} {version}" for name, version in _versions(facts).items())
    spread = max((result.spread for result in results), default=0.0)
    lines += [
        "",
        f"{_processor()}, {facts['CPU']['SIMD']}; {threads} threads; {versions}; {datetime.date.today()}. "
        f"Medians of {rounds} rounds; our own times moved by up to ±{spread:.0%} between rounds. % gemm: of a NumPy "
        "matrix product in the same precision; % read: of the memory's read bandwidth; x: how many times as fast as "
        "the peer, or (x plain) the rate beside plain float32 attention; in parentheses the bar a figure is held to.",
    ]
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
    """Say who did not take part where, and why, one line for each reason."""
    rows: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, why in result.skipped.items():
            rows.setdefault((name, why), []).append(result.row.name)
    return [f"{name} left out of {', '.join(where)}: {why}" for (name, why), where in rows.items()]


def insert(path: Path, text: str) -> None:
    """Put text between the two markers of a file, in place of what is there."""
    before, start, rest = path.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"{path} has no {START} and {END}")
    with replacing(path) as unfinished:
        unfinished.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")


_NUMBERS = {heading for heading, _ in _COLUMNS.values()}


def _headings() -> list[str]:
    return ["work", *(heading for heading, _ in _COLUMNS.values()), "verdict"]


def _cells(result: Result) -> list[str]:
    metrics, bars = result.metrics, result.row.bars
    cells = [result.row.name]
    for name, (_, form) in _COLUMNS.items():
        if name not in metrics:
            cells.append("-" if name not in bars else "not measured")
            continue
        cell = _duration(metrics[name]) if name == "us" else format(metrics[name], form)
        if name in bars:
            cell += f" ({_duration(bars[name]) if name == 'us' else format(bars[name], form)})"
        cells.append(cell)
    return [*cells, _verdict(result)]


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


__all__ = ["END", "START", "as_json", "as_markdown", "as_table", "insert", "left_out"]
