"""For pytest on a GPU (-p gpukit_pytest): a share of the grid, and no test that suffers from the fault of another.

--kit-seconds N no test begins after so long, and what is known is said; failures are said as they come
--kit-share N   of parametrised cases of test_forward and test_backward every N-th, and all other tests
A kernel's fault (an illegal address, say) ends the context of its process, and every later test there would fail: the
worker leaves, and pytest-xdist begins another.
"""

import os
import time
import zlib

import pytest


def pytest_addoption(parser):
    parser.addoption("--kit-share", type=int, default=1)
    parser.addoption("--kit-seconds", type=float, default=1e9)


class Progress:
    """Where tests are counted (not in a worker of xdist)."""

    def __init__(self, config):
        self.config, self.begin, self.session, self.count = config, time.perf_counter(), None, {}

    def pytest_sessionstart(self, session):
        self.session = session

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.count[report.outcome] = self.count.get(report.outcome, 0) + 1
        if report.failed:
            said = [line for line in report.longreprtext.splitlines() if line.startswith(("E ", "worker"))] or [""]
            print(f"\nFAILED {report.nodeid}: {' | '.join(said)[:400]}", flush=True)
        if time.perf_counter() - self.begin > self.config.getoption("--kit-seconds") and self.session:
            self.session.shouldstop = "out of time"

    def pytest_sessionfinish(self):
        said = ", ".join(f"{n} {outcome}" for outcome, n in self.count.items())
        print(f"\ngrid: {said} in {time.perf_counter() - self.begin:.1f}s", flush=True)


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress(config))


def pytest_collection_modifyitems(config, items):
    share = config.getoption("--kit-share")
    if share > 1:
        grid = ("test_forward", "test_backward", "test_stored_in_fewer_bits", "test_longer")
        kept = [x for x in items if x.originalname not in grid or zlib.crc32(x.nodeid.encode()) % share == 0]
        config.hook.pytest_deselected(items=[x for x in items if x not in set(kept)])
        items[:] = kept


def _fault():
    try:
        from numba_attention.device import runtime

        api = runtime.driver._api
        (error,) = api.cuCtxSynchronize()
        harmless = not error or "NOT_INITIALIZED" in error.name or "INVALID_CONTEXT" in error.name
        return "" if harmless else error.name
    except Exception:
        return ""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    yield
    if (
        item.get_closest_marker("gpu")
        and os.environ.get("PYTEST_XDIST_WORKER")
        and not os.environ.get("NA_KIT_COLLECT")
    ):
        fault = _fault()
        if fault:
            import gpukit

            gpukit.note(f"fault {fault} after {item.nodeid}")
            os._exit(70)
