"""The process of one library: prepares and times calls on request, and sleeps in between.

Requests and answers are lines of JSON on stdin and stdout.
"""

import json
import os
import statistics
import sys
import time
from typing import Any

import numpy as np

from .contenders import CONTENDERS, Call, Skipped
from .rows import Row

_BATCH = 1e-3  # seconds; shorter calls are timed many at a time, so that reading the clock costs little


def time_call(call: Call, seconds: float) -> float:
    """Return the median time of a call, over as many as fit into `seconds`."""
    first = _time(call, 1)
    if first > seconds:
        return first
    once = _time(call, 1)
    batch = max(1, round(_BATCH / once))
    times: list[float] = []
    until = time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        times.append(_time(call, batch) / batch)
    return statistics.median(times)


def _time(call: Call, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


def _sample(result: Any) -> list[float]:
    """Return some hundred numbers spread over a result of any library."""
    if isinstance(result, list):
        return []
    if hasattr(result, "detach"):  # a PyTorch tensor: NumPy cannot read its bfloat16
        result = result.detach().double().numpy()
    flat = np.asarray(result).reshape(-1)
    step = max(1, flat.size // 251)
    return [float(x) for x in flat[::step]]


def _row(fields: dict[str, Any]) -> Row:
    fields["window"] = fields["window"] and tuple(fields["window"])
    return Row(**{**fields, "baseline": None})


def serve(threads: int) -> None:
    """Answer the lines on stdin until it is closed."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output of a library must not mix with the answers
    prepared: dict[str, Call] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if "prepare" in request:
            name = request["prepare"]
            try:
                prepared[name] = CONTENDERS[name][1](_row(request["row"]), threads)
                answer["sample"] = _sample(prepared[name]())
            except Skipped as why:
                answer["skipped"] = str(why)
            except Exception as error:
                answer["skipped"] = f"{type(error).__name__}: {error}"
        elif "turn" in request:
            answer["seconds"] = time_call(prepared[request["turn"]], request["seconds"])
        else:
            prepared.clear()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
