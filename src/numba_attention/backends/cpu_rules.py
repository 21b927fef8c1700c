"""Rules of callers for the kernels of the CPU: compiled, and called with the record of their arguments."""

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..cpu.simd import HOST
from ..cpu.spec import Spec
from ..mods.compiled import check_bounds, kernel_of, record_of
from ..mods.language import MASK, SCORE
from ..mods.rules import describe, find
from ..problem.dense import Problem
from .records import address_of, storage_of


class Rules(NamedTuple):
    """The addresses that a kernel finds the rules of a call by, and what must live as long as the call."""

    score: int
    mask: int
    data: int
    kept: tuple[Any, ...]
    gradient: int = 0
    has_slope: bool = False  # whether the derivative of the score is other than 1


def compiled_rules(p: Problem, task: str, few: bool, places: tuple[int, ...] = ()) -> Rules:
    """Compile the rules of a problem, if they are not yet, and write the record of their arguments.

    Parameters
    ----------
    p : Problem
    task : {"score", "slope", "kept", "curve"}
        What is wanted of the `score_mod`.
    few : bool
        Whether the kernel is the one for few queries, whose tiles have fewer rows.
    places : tuple of int
        Which of `mod_args` the gradients are wanted of.

    Raises
    ------
    TypeError
        A function says what the language of rules cannot.
    ValueError
        An array is too short for the indices that are read from it.
    """
    arguments = describe(p.mod_args)
    shape = shape_of(storage_of(p.query.dtype), few)
    kernels, gradient, has_slope = [], 0, False
    for role, function in ((SCORE, p.score_mod), (MASK, p.mask_mod)):
        if function is None:
            kernels.append(0)
            continue
        rule = find(role, function, arguments, p.mod_args)
        check_bounds(rule.bounds, p.mod_args, limits_of(p))
        own_task = task if role == SCORE else "mask"
        if own_task in ("slope", "kept"):
            has_slope = not rule.has_slope_one
            own_task = "score" if task == "slope" and not has_slope else task
        program = rule.program if own_task in ("score", "mask") else rule.with_slope
        if own_task == "curve":
            program = rule.with_curve
        kernels.append(kernel_of(rule, own_task, program, *shape).address)
        if places and role == SCORE:
            program = rule.gradients(places)
            gradient = kernel_of(rule, "gradients", program, *shape).address if program.sites else 0
    record = record_of(p.mod_args, places)
    return Rules(kernels[0], kernels[1], address_of(record), (record, p.mod_args), gradient, has_slope)


@cache
def shape_of(storage: str, few: bool) -> tuple[int, int]:
    """The bits of a score, and the rows of a tile, for queries in this storage."""
    spec = Spec(storage, HOST, "decode" if few else "forward")
    return spec.vector.bits, spec.query_tile


def limits_of(p: Problem) -> dict[str, tuple[int, int]]:
    """The numbers that rules are called with: the first, and the one after the last."""
    first, head = p.origin.key, p.origin.head
    low, high = _ends(p.offset)
    batch = _ends(p.origin.numbers(math.prod(p.batch)))
    return {
        "batch": (batch[0], batch[1] + 1),
        "head": (head, head + p.H),
        "i": (first + low, first + high + max(p.L, 1)),
        "j": (first, first + p.S),
    }


def _ends(numbers: Any) -> tuple[int, int]:
    """The least and the greatest; of none, an interval without a number."""
    array = np.asarray(numbers)
    return (int(array.min()), int(array.max())) if array.size else (0, -1)
