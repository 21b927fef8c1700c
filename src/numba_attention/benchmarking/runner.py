"""The timing of rows, in rounds of turns, and the metrics that are computed from the times."""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from .contenders import CONTENDERS, GEMM_SIZE, READ_BYTES, Skipped
from .rows import FIRST_CALLS, Row
from .worker import Worker

_REST = 0.15  # seconds between turns, because OpenBLAS and ONNX Runtime spin for 0.1 s after one
_TOLERANCE = {"float32": 1e-4, "float64": 1e-6, "float16": 1e-2, "bfloat16": 6e-2}


@dataclass(frozen=True)
class Result:
    """The times of one row: for each contender, one per round."""

    row: Row
    seconds: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """The reported figures. A figure that could not be measured is missing.

        us: microseconds of one call. rate: GF/s. gemm, read: fraction of the machine's matrix product and read
        bandwidth. einsum, torch, onnxruntime: how many times as long they take. own: rate over the baseline's rate.
        """
        if "ours" not in self.seconds:
            return {}
        ours = np.array(self.seconds["ours"])
        metrics = {"us": 1e6 * _median(ours)}
        if self.row.task in FIRST_CALLS:
            return metrics
        metrics["rate"] = self.row.flops / _median(ours) / 1e9
        for name in ("einsum", "torch", "onnxruntime"):
            if name in self.seconds:
                metrics[name] = _median(np.array(self.seconds[name]) / ours)
        work = {"gemm": (self.row.flops, 2.0 * GEMM_SIZE**3), "read": (float(self.row.bytes), float(READ_BYTES))}
        if self.row.baseline is not None:
            work["own"] = (self.row.flops, self.row.baseline.flops)
        for name, (work_of_row, work_of_ceiling) in work.items():
            if name in self.seconds:
                metrics[name] = _median((work_of_row / ours) / (work_of_ceiling / np.array(self.seconds[name])))
        return metrics

    @property
    def spread(self) -> float:
        """Half the range of our times over the rounds, relative to their median: a measure of the machine's noise."""
        ours = self.seconds.get("ours", [math.nan])
        return (max(ours) - min(ours)) / 2 / statistics.median(ours)

    @property
    def verdicts(self) -> dict[str, bool | None]:
        """For each bar of the row, whether it is met, or None if it could not be measured."""
        metrics = self.metrics
        return {
            name: None if name not in metrics else metrics[name] <= bar if name == "us" else metrics[name] >= bar
            for name, bar in self.row.bars.items()
        }


def run(
    rows: Iterable[Row],
    *,
    threads: int,
    rounds: int = 5,
    seconds: float = 0.2,
    contenders: Iterable[str] = tuple(CONTENDERS),
    progress: Callable[[Result, int], None] = lambda result, done: None,
) -> list[Result]:
    """Time each row with each contender.

    Parameters
    ----------
    rows : iterable of Row
    threads : int
        Threads of every contender.
    rounds : int, default 5
        Each contender has one turn a round.
    seconds : float, default 0.2
        Length of a turn; a longer call is made once.
    contenders : iterable of str, default all
        Some of "ours", "own", "einsum", "torch", "onnxruntime", "gemm", "read".
    progress : callable, optional
        Called with the times so far and the number of finished rounds, after preparation (0) and after each round.

    Returns
    -------
    list of Result
        In the order of the rows.
    """
    names = [name for name in CONTENDERS if name in set(contenders)]
    workers = {library: Worker(threads) for library in {CONTENDERS[name][0] for name in names}}
    try:
        return [_time_row(row, names, workers, rounds, seconds, progress) for row in rows]
    finally:
        for worker in workers.values():
            worker.close()


def _time_row(
    row: Row,
    names: list[str],
    workers: dict[str, Worker],
    rounds: int,
    seconds: float,
    progress: Callable[[Result, int], None],
) -> Result:
    result = Result(row)
    ready = _prepare(result, names, workers)
    progress(result, 0)
    for done in range(rounds):
        first = done % max(1, len(ready))
        for name in ready[first:] + ready[:first]:
            time.sleep(_REST)
            result.seconds.setdefault(name, []).append(workers[CONTENDERS[name][0]].turn(name, seconds))
        progress(result, done + 1)
    for worker in workers.values():
        worker.forget()
    return result


def _prepare(result: Result, names: list[str], workers: dict[str, Worker]) -> list[str]:
    """Set up every contender whose result agrees with ours; record why the others are left out."""
    ready: list[str] = []
    samples: dict[str, list[float]] = {}
    row = result.row
    for name in names:
        if (name == "own" and row.baseline is None) or (name != "ours" and row.task in FIRST_CALLS):
            continue
        try:
            work = row.baseline if name == "own" and row.baseline is not None else row
            samples[name] = workers[CONTENDERS[name][0]].prepare(name, work)
            if name in ("einsum", "torch", "onnxruntime") and "ours" in ready:
                _compare(samples["ours"], samples[name], _TOLERANCE[row.dtype])
        except Skipped as why:
            result.skipped[name] = str(why)
        else:
            ready.append(name)
    return ready


def _compare(ours: list[float], theirs: list[float], tolerance: float) -> None:
    error = np.abs(np.subtract(ours, theirs)).max(initial=0)
    if not error <= tolerance:
        raise Skipped(f"its result differs from ours by {error:.2g}")


def _median(values: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> float:
    return float(np.median(values))


__all__ = ["Result", "run"]
