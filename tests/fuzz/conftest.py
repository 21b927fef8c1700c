"""Part of the whole grid: two minutes. One thread, as arrays are small."""

import numba
import pytest


@pytest.fixture(autouse=True)
def _one_thread():
    """Small arrays: threads would only wait for one another."""
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    yield
    numba.set_num_threads(before)
