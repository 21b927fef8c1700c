"""The mods that are timed, by the name of their row."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..mods import alibi, relative_positions, softcap

Number = Any


def identity(score: Number, batch: int, head: int, i: int, j: int) -> Number:
    """The score as it is: what a mod costs at least."""
    return score


def exponential(score: Number, batch: int, head: int, i: int, j: int) -> Number:
    return math.exp(score)


def logarithm(score: Number, batch: int, head: int, i: int, j: int) -> Number:
    return math.log(2 + abs(score))


def power(score: Number, batch: int, head: int, i: int, j: int) -> Number:
    return abs(score) ** 0.3


def mod_of(name: str, heads: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return the function of a row, and what it is called with."""
    slopes = (2.0 ** -np.arange(1, heads + 1)).astype(np.float32)
    table = np.random.default_rng(3).standard_normal((heads, 257)).astype(np.float32)
    rules: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "identity": (identity, ()),
        "ALiBi": (alibi, (slopes,)),
        "softcap": (softcap, (30.0,)),
        "table": (relative_positions, (table,)),
        "exp": (exponential, ()),
        "log": (logarithm, ()),
        "pow": (power, ()),
    }
    return rules[name]
