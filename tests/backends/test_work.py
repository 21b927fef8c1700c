"""The work of a call by count, which decides on threads and on whether signals are heard: windows bound it."""

import numpy as np
import pytest

import numba_attention as na
from numba_attention.backends import cpu_resources


@pytest.fixture
def counted(monkeypatch):
    """The work of each kernel that runs."""
    works = []
    original = cpu_resources.Buffers.run

    def run(self, kernel, number, work, *kept):
        works.append(work)
        original(self, kernel, number, work, *kept)

    monkeypatch.setattr(cpu_resources.Buffers, "run", run)
    return works


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"window": (63, 0), "is_causal": True}, 127 / 640),
        ({"window": (100, 28)}, 192 / 640),
        ({"window": (1000, 1000)}, 1),
        ({"window": (None, 10)}, 1),
        ({"is_causal": True}, 1),
    ],
    ids=str,
)
def test_windows(options, share, counted):
    x = np.random.default_rng(0).standard_normal((2, 640, 16), dtype=np.float32)
    works = []
    for more in ({}, options):  # a named backend: calls like earlier ones would not be planned again
        counted.clear()
        out, lse = na.attention(x, x, x, return_lse=True, backend="cpu", **more)
        na.attention_backward(x, x, x, x, out, lse, backend="cpu", **more)
        na.attention_weights(x, x, backend="cpu", **more)
        works.append(counted.copy())
    full, some = works
    assert np.divide(some, full) == pytest.approx([share, share, 1])
