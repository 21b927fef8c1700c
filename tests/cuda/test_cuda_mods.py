"""`score_mod` and `mask_mod` on a GPU, in the emulator: against textbook formulas, in every kernel."""

import itertools
import math

import numpy as np
import pytest

import numba_attention as na
from cases import DTYPES, Case, assert_close, check, check_backward, tolerance
from emulator import emulated
from numba_attention.cuda import tile_shapes


@pytest.fixture
def driver(monkeypatch):
    with emulated(monkeypatch) as driver:
        yield driver


CASES = [
    Case(40, 70, 24, H=2, Hkv=1, options=("score mod", "mask mod", "causal")),
    Case(30, 100, 20, 40, H=2, options=("score mod hides", "window", "offset negative", "bias that hides")),
    Case(20, 40, 128, H=1, batch=(), options=("score mod", "softcap", "mask", "alibi")),
    Case(17, 40, 160, 32, H=1, batch=(), options=("mask mod", "sinks")),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(driver, case, dtype):
    check(*case.arrays(dtype), case.kwargs(), dtype, case, backend="cuda")
    check_backward(case, dtype, backend="cuda")
    assert all(c.mods for c in driver.configs.values() if c.task in ("forward", "query", "key", "bias"))
