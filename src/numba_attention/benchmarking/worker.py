"""The process of one library, seen from the one that times all of them."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from .contenders import Skipped
from .rows import Row

_POOLS = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class Worker:
    """Starts a process (`serve`), and asks it to prepare and time contenders of its library."""

    def __init__(self, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.serve", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | dict.fromkeys(_POOLS, str(threads)),
        )

    def prepare(self, contender: str, row: Row) -> list[float]:
        """Build the contender's inputs and call it once; return some numbers of its result. May raise `Skipped`."""
        answer = self._ask(prepare=contender, row=asdict(row))
        if "skipped" in answer:
            raise Skipped(answer["skipped"])
        sample: list[float] = answer["sample"]
        return sample

    def turn(self, contender: str, seconds: float) -> float:
        """Time the prepared contender for about so long; return the seconds of one call."""
        return float(self._ask(turn=contender, seconds=seconds)["seconds"])

    def forget(self) -> None:
        """Free what was prepared."""
        self._ask(forget=True)

    def close(self) -> None:
        """End the process."""
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            print(json.dumps(request), file=stdin, flush=True)
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the process that was asked for {request} died with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


__all__ = ["Worker"]
