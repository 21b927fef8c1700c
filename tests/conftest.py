"""What every test file shares: a profile for hypothesis, backends left as they were found, what rounds leave out."""

import importlib
import signal
import sys
import threading
import zlib
from pathlib import Path

import hypothesis
import pytest

import numba_attention  # noqa: F401

# `numba_attention.backends` is the function of that name.
backends = sys.modules["numba_attention.backends"]

# Kernels compile inside an example, so no deadline; the same examples every time, so that red is news.
hypothesis.settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=500)
hypothesis.settings.load_profile("default")


# A shell starts background jobs with SIGINT ignored, and children inherit that: tests of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).parent
# Doctests import every module that is collected, and some of these only run where a stub of the driver is.
collect_ignore = ["support"]
# Kernels in the emulator and the compiler for GPUs; processes that fail, one a case; two minutes of random calls.
WHOLE_GRID_ONLY = {HERE / folder for folder in ("cuda", "faults", "fuzz")}
PEERS = ("dask", "torch_bridge", "jax_bridge", "transformers", "benchmarking")
WITH_PEERS = {
    HERE / "device",
    *(path for name in PEERS for path in HERE.glob(f"test_{name}*.py")),
}


def pytest_addoption(parser):
    parser.addoption("--turn", metavar="N/M", help="run the N-th of M shares of the tests and their cases")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--turn"):
        turn, shares = map(int, config.getoption("--turn").split("/"))
        # By a hash of their names, so that a share is no regular choice of parameters.
        left_out = [item for item in items if (zlib.crc32(item.nodeid.encode()) - turn) % shares]
        config.hook.pytest_deselected(items=left_out)
        left_out = set(left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        where = {item.path, *item.path.parents}
        if where & WHOLE_GRID_ONLY:
            item.add_marker(pytest.mark.slow)
        if where & WITH_PEERS or "torch" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.peer)


@pytest.fixture(autouse=True)
def _backend_as_found(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    monkeypatch.setattr(backends, "_default", None)
    monkeypatch.setattr(backends, "_usable", {})  # a GPU that was emulated is gone


@pytest.fixture(scope="session")
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="session")
def jax():
    return pytest.importorskip("jax")


@pytest.fixture(scope="session")
def naj(jax):
    return importlib.import_module("numba_attention.jax")


@pytest.fixture
def synchronous():
    """Tasks of Dask run one after the other, in this thread."""
    import dask

    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture
def device(monkeypatch):
    """A device that is the host, whose kernels are the reference backend."""
    from device import HostDriver, merge_differentiated_by_host, merged_by_host, reference_on
    from numba_attention.backends import cuda, device_merge
    from numba_attention.device import runtime

    driver = HostDriver()
    monkeypatch.setattr(runtime, "driver", driver)
    for name, function in reference_on(driver).items():
        monkeypatch.setattr(cuda, name, function)
    monkeypatch.setattr(device_merge, "merge", merged_by_host)
    monkeypatch.setattr(device_merge, "merge_backward", merge_differentiated_by_host)
    return driver


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is not None:
        from numba_attention.device import runtime

        reason = runtime.unusable()
        if reason is not None:
            pytest.skip(reason)
