"""Nothing outside the arrays is touched: with Numba's bounds checks, and with unreadable pages around each array."""

import sys

import pytest

from processes import GUARDED, run

CHECKED = """
import cases
import numba_attention as na
for dtype in {dtypes}:
    for case in [*cases.GROUPS["together"], *cases.GROUPS["heads"][:6], *cases.GROUPS["empty"]]:
        arrays, kwargs = case.arrays(dtype), case.kwargs()
        cases.check(*arrays, kwargs, dtype, case)
        cases.check_backward(case, dtype)
    {weights}
print("done")
"""
WEIGHTS = "na.attention_weights(*arrays[:2], **kwargs); na.attention_weights(*arrays[:2], heads=[], rows=[], **kwargs)"


@pytest.mark.parametrize(
    ("dtypes", "weights"),
    [
        (["float32"], "pass"),
        pytest.param(["float64", "bfloat16"], WEIGHTS, marks=pytest.mark.slow),
    ],
)
def test_with_bounds_checks(tmp_path, dtypes, weights):
    run(
        CHECKED.format(dtypes=dtypes, weights=weights),
        NUMBA_BOUNDSCHECK="1",
        NUMBA_ATTENTION_CACHE_DIR=str(tmp_path),
    )


CACHED = """
import test_decode, test_varlen
for sizes in [(2, 5, 5, 1, 90, 24, 40), (2, 4, 2, 90, 100, 32, 32)]:
    test_decode.test_storages_pages_and_sizes(sizes, {storage!r})
if {storage!r} is None:
    test_decode.test_tree_of_guesses()
    test_varlen.test_as_each_alone("sinks", "float32", "cpu")
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("storage", [None, "int8"])
def test_caches_with_bounds_checks(tmp_path, storage):
    run(CACHED.format(storage=storage), NUMBA_BOUNDSCHECK="1", NUMBA_ATTENTION_CACHE_DIR=str(tmp_path))


OUTSIDE = """
import numpy as np, pytest
from numba_attention.cpu.cache import Function
from numba_attention.cpu.simd import void_pointer
from numba_attention.cpu.views import carray

def make():
    def beyond(at, n):
        return int(carray(void_pointer(at), 4, np.int64)[n])
    return beyond

x = np.arange(4)
for nogil in (True, False):
    read = Function(f"beyond-{nogil}", make, objects=0, integers=2, nogil=nogil).call
    assert read(x.ctypes.data, 3) == 3
    with pytest.raises(IndexError, match="reads or writes outside an array"):
        read(x.ctypes.data, 4)
print("done")
"""


def test_what_is_outside_is_an_error(tmp_path):
    run(OUTSIDE, NUMBA_BOUNDSCHECK="1", NUMBA_ATTENTION_CACHE_DIR=str(tmp_path))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages with mprotect")
def test_with_unreadable_pages_around():
    """Vectors that read past the end of a row crash here and nowhere else."""
    run(GUARDED)
