"""Run a test function in a process of its own, bounded in time and memory, so that a fault takes that process along and
never the suite.

The decorated function runs twice over: in pytest as a stand-in that starts ``python case.py FILE NAME ARGUMENTS`` and
judges how that ended, and there as itself. Its arguments travel as JSON.
"""

import contextlib
import functools
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

INSIDE = "NUMBA_ATTENTION_FAULT_CASE"  # set in the process of a case
SKIPPED = 77  # its exit status where the machine lacks what the case needs
LAYERS = ["omp", "workqueue", "tbb"]


def isolated(function=None, *, seconds=60, gigabytes=8, **environment):
    """Let a test function run in a process of its own.

    An argument called ``layer`` also chooses Numba's threading layer there. `seconds` bounds the time and `gigabytes`
    the address space.
    """
    if function is None:
        return functools.partial(isolated, seconds=seconds, gigabytes=gigabytes, **environment)
    if INSIDE in os.environ:
        return function

    @functools.wraps(function)
    def stand_in(**arguments):
        __tracebackhide__ = True
        arguments = {name: str(x) if isinstance(x, Path) else x for name, x in arguments.items()}
        settings = {**environment, INSIDE: str(gigabytes), "NUMBA_NUM_THREADS": "2"}
        if "layer" in arguments:
            if arguments["layer"] == "tbb" and find_tbb() is None:
                pytest.skip("tbb is not installed")
            settings["NUMBA_THREADING_LAYER"] = arguments["layer"]
        case = [function.__code__.co_filename, function.__name__, json.dumps(arguments)]
        status, output = run([sys.executable, __file__.replace("isolation.py", "case.py"), *case], seconds, **settings)
        if status == SKIPPED:
            pytest.skip(output.strip().splitlines()[-1])
        assert status == 0, f"{_describe(status, seconds)}\n{output[-4000:]}"

    return stand_in


def run(command, seconds, **environment):
    """Run a command as the leader of a session, end whatever is left of that, and return its status and output.

    The status is None if it had to be ended. Output goes to a file: a child that outlives its
    parent would keep a pipe open.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # faulthandler prints where every thread is
            time.sleep(0.5)
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return status, output.read().decode(errors="replace")


def _describe(status, seconds):
    if status is None:
        return f"the case did not end within {seconds} s"
    if status < 0:
        return f"the process of the case was ended by {signal.Signals(-status).name}"
    return f"the case failed (exit status {status})"


def find_tbb():
    """Return the path of libtbb.so.12 as the PyPI package ``tbb`` installs it, where the loader does not look."""
    try:
        files = importlib.metadata.files("tbb") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == "libtbb.so.12"), None)


def skip(reason):
    """Leave the process of a case: the machine lacks what it needs."""
    print(reason, flush=True)
    os._exit(SKIPPED)
