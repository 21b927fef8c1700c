"""A shared prefix attended once and merged is the same as a cache for each sequence."""

import functools
import sys
from pathlib import Path

import numpy as np

import numba_attention as na

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import cascade


def test_cascade_is_exact():
    query, shared, own = cascade.arrays(batch=3, prefix=70, own=9)
    short, long, paged = cascade.caches(shared, own)
    want = na.attention_decode(query, long, backend="reference")
    np.testing.assert_allclose(cascade.cascade(query, shared, short), want, atol=2e-6)
    np.testing.assert_array_equal(na.attention_decode(query, paged), na.attention_decode(query, long))
    tables = paged.block_table()
    whole = 70 // 16  # pages that the prefix fills; each sequence has a copy of the one that it shares with its own
    assert (tables[:, :whole] == tables[0, :whole]).all()
    assert len(np.unique(tables[:, whole:])) == tables[:, whole:].size


def test_run(monkeypatch, capsys):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # what main sets in a process of its own
    monkeypatch.setattr(cascade, "arrays", functools.partial(cascade.arrays, batch=2, prefix=40, own=3))
    cascade.main()
    printed = capsys.readouterr().out
    assert "a prefix of 40 tokens and 3 of each" in printed
    assert "cascade: largest difference" in printed
    assert printed.count(" ms ") == 3
