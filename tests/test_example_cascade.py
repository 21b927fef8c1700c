"""A shared prefix attended once and merged is the same as a cache for each sequence."""

import sys
from pathlib import Path

import numpy as np

import numba_attention as na

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import cascade


def test_cascade_is_exact():
    query, shared, own = cascade.arrays(batch=3, prefix=70, own=9)
    short, long, paged = cascade.caches(shared, own)
    want = na.attention_decode(query, long, backend="reference")
    np.testing.assert_allclose(cascade.cascade(query, shared, short), want, atol=2e-6)
    np.testing.assert_array_equal(na.attention_decode(query, paged), na.attention_decode(query, long))
    assert paged.free_pages > 0
