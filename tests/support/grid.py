"""Which combinations of parameters are tested: every one with NUMBA_ATTENTION_THOROUGH=1, otherwise a share of them."""

import os
from itertools import product

import pytest

THOROUGH = os.environ.get("NUMBA_ATTENTION_THOROUGH") == "1"


def in_turn(longer, shorter):
    """Pairs of each element of the longer of two lists with one of the shorter, which take turns; or all pairs."""
    longer, shorter = list(longer), list(shorter)
    assert len(longer) >= len(shorter)
    if THOROUGH:
        return list(product(longer, shorter))
    return [(x, shorter[n % len(shorter)]) for n, x in enumerate(longer)]


def share(cases, step):
    """Each `step`-th case for the first round of tests; the others are marked slow."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*x, marks=pytest.mark.slow if n % step else ()) for n, x in enumerate(values)]
