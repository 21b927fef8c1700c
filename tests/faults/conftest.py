"""Part of the whole grid; long cases run if they are asked for. Kernels are in the cache before a case is timed."""

import sys
from pathlib import Path

import pytest
from isolation import run

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
    if "faults" in config.option.markexpr:
        return
    long = [item for item in items if HERE in item.path.parents and item.get_closest_marker("faults")]
    if long:
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)


@pytest.fixture(scope="session", autouse=True)
def _kernels():
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import work; work.prepare()"
    status, output = run([sys.executable, "-c", code], 600)
    assert status == 0, output
