"""Results as a table for the terminal, as Markdown for the README, as JSON for other programs."""

import datetime
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..atomic import replacing
from ..show_config import Facts
from .rows import ROWS
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


def circumstances(facts: Facts, threads: int, rounds: int) -> dict[str, Any]:
    """Return what a reader of the figures must know: when, on what, with which versions they were measured."""
    wanted = ("numba-attention", "numba", "numpy", "torch", "onnxruntime", "python")
    versions = facts["Versions"]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": f"{_processor()}, {facts['CPU']['SIMD']}",
        "versions": {name: v.partition(" ")[0] for name in wanted if (v := versions[name]) != "not installed"},
        "threads": threads,
        "rounds": rounds,
    }


def as_markdown(results: list[Result], found: dict[str, Any], *, bars: bool = False) -> str:
    """Return the measured figures as a Markdown table, and the circumstances of the measurement below.

    With `bars`, the bar that a figure is held to follows it in parentheses, and figures that miss theirs are bold.
    """
    lines = ["| " + " | ".join(_headings()) + " |", "| --- |" + " ---: |" * len(_COLUMNS)]
    lines += ["| " + " | ".join(_cells(result, bars=bars, bold=bars)) + " |" for result in results]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    spreads = [result.spread for result in results if result.seconds]
    lines += [
        "",
        f"{found['processor']}; {found['threads']} threads; {versions}; {found['date']}. "
        f"Every figure is the median of {found['rounds']} rounds; our own times varied by up to "
        f"±{max(spreads, default=0.0):.0%} between rounds, in half of the rows by less than "
        f"±{statistics.median(spreads or [0.0]):.1%}. "
        "GF/s: billions of floating-point operations of the matrix products in a second. % gemm: this rate, relative "
        "to NumPy's own matrix product in the same precision. % read: bytes of the inputs in a second, relative to the "
        "read bandwidth of the memory. x: how many times as fast as the other library; x plain: the rate relative to "
        "the same call in float32 without the option.",
    ]
    return "\n".join(lines)


def as_json(results: list[Result], found: dict[str, Any]) -> str:
    """Return everything that was measured, every round of it, with one row of the benchmark on a line."""
    rows = ",\n".join(json.dumps(_plain(result)) for result in results)
    return f'{json.dumps(found, indent=1)[:-2]},\n "rows": [\n{rows}\n]}}'


def from_json(text: str) -> tuple[list[Result], dict[str, Any]]:
    """Read what `as_json` wrote, for the rows that exist today.

    A row that is not in the text, or whose work is another now, has no figures.
    """
    found = json.loads(text)
    rows = {row["name"]: row for row in found.pop("rows")}
    results = []
    for row in ROWS.values():
        then = rows.get(row.name, {})
        same = then.get("flops") == row.flops and then.get("bytes") == row.bytes
        results.append(Result(row, then["seconds"], then["skipped"]) if same else Result(row))
    return results, found


def as_line(result: Result) -> str:
    """Return the name and the figures of one row."""
    name, *cells = _cells(result, bars=False)
    figures = [f"{heading} {cell}" for heading, cell in zip(_headings()[1:], cells, strict=True) if cell != "-"]
    return f"{name}: {', '.join(figures)}"


def left_out(results: list[Result]) -> list[str]:
    """Return one line for each library and reason, with the rows in which that library was not measured."""
    rows: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, why in result.skipped.items():
            rows.setdefault((name, why), []).append(result.row.name)
    return [f"{name} left out of {', '.join(where)}: {why}" for (name, why), where in rows.items()]


def around(path: Path, name: str = "bench") -> tuple[str, str]:
    """Return what stands before and after two markers of a file, `<!-- name:start -->` and `<!-- name:end -->`.

    The markers are parts of what is returned.
    """
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, has_start, rest = path.read_text(encoding="utf-8").partition(start)
    _, has_end, after = rest.partition(end)
    if not (has_start and has_end):
        raise ValueError(f"{path} has no {start} and {end}")
    return before + start, end + after


def insert(path: Path, text: str, name: str = "bench") -> None:
    """Replace what stands between the two markers of a file, as `around` finds them."""
    before, after = around(path, name)
    made = f"{before}\n{text}\n{after}"
    if made != path.read_text(encoding="utf-8"):
        with replacing(path) as unfinished:
            unfinished.write_text(made, encoding="utf-8")


_NUMBERS = {heading for heading, _ in _COLUMNS.values()}


def _headings() -> list[str]:
    return ["work", *(heading for heading, _ in _COLUMNS.values())]


def _cells(result: Result, *, bars: bool, bold: bool = False) -> list[str]:
    metrics, row = result.metrics, result.row
    cells = [row.name]
    for name in _COLUMNS:
        has_bar = bars and name in row.bars
        if name in metrics:
            figure = _format(name, metrics[name])
            missed = bold and has_bar and not result.verdicts[name]
            figure = f"**{figure}**" if missed else figure
            cells.append(figure + (f" ({_format(name, row.bars[name])})" if has_bar else ""))
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


def _plain(result: Result) -> dict[str, Any]:
    return {
        "name": result.row.name,
        "flops": result.row.flops,
        "bytes": result.row.bytes,
        "seconds": {name: [float(f"{t:.5g}") for t in times] for name, times in result.seconds.items()},
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


__all__ = [
    "around",
    "as_json",
    "as_line",
    "as_markdown",
    "as_table",
    "circumstances",
    "from_json",
    "insert",
    "left_out",
]
