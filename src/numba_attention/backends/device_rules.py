"""Rules of callers for the kernels of a GPU: their programs, and the record of their arguments in its memory."""

import hashlib
from typing import Any, NamedTuple

import numpy as np

from ..cuda.spec import Mods
from ..device.constants import upload
from ..device.headers import address_of, held
from ..mods.compiled import check_bounds, words_of
from ..mods.language import MASK, SCORE
from ..mods.rules import Rule, describe, find
from ..options import Array
from ..problem.dense import Problem
from .cpu_rules import limits_of


class Rules(NamedTuple):
    """The rules of a call, and the kinds of their arguments."""

    score: Rule | None
    mask: Rule | None
    arguments: tuple[Any, ...]


def rules_of(p: Problem) -> Rules | None:
    """Return the rules of a problem, whose indices are checked; None if it has none.

    Raises
    ------
    TypeError
        A function says what the language of rules cannot.
    ValueError
        An array is too short for the indices that are read from it.
    """
    if p.score_mod is None and p.mask_mod is None:
        return None
    arguments, rules = describe(p.mod_args), []
    for role, function in ((SCORE, p.score_mod), (MASK, p.mask_mod)):
        rule = None
        if function is not None:
            rule = find(role, function, arguments, p.mod_args)
            check_bounds(rule.bounds, p.mod_args, limits_of(p))
        rules.append(rule)
    return Rules(rules[0], rules[1], arguments)


def mods_of(rules: Rules | None, with_slope: bool, places: tuple[int, ...] = ()) -> Mods | None:
    """Return what a kernel is compiled with; with `places`, that of the gradients of these arrays."""
    if rules is None:
        return None
    key = "cuda", with_slope, rules.mask, places
    keeper = rules.score or rules.mask
    assert keeper is not None
    mods: Mods | None = keeper.kernels.get(key)
    if mods is None:
        score = mask = None
        if rules.score is not None:
            slopes = with_slope and not rules.score.has_slope_one
            score = rules.score.with_slope if slopes else rules.score.program
        if rules.mask is not None:
            mask = rules.mask.program
        gradients = None if not places or rules.score is None else rules.score.gradients(places)
        texts = ["" if program is None else program.text for program in (score, mask, gradients)]
        digest = hashlib.sha256(repr((*texts, rules.arguments)).encode()).hexdigest()[:24]
        mods = keeper.kernels[key] = Mods(score, mask, rules.arguments, digest, gradients)
    return mods


def record_of(values: tuple[Any, ...]) -> tuple[Array, dict[int, Array]]:
    """Return the words that kernels find `mod_args` by, and the arrays in the memory of the device, by their places.

    Last come the places of the sums of the gradients of arrays, which follow one another.
    """
    arrays = {
        place: x if held(x) is not None else upload(x) for place, x in enumerate(values) if isinstance(x, np.ndarray)
    }
    words = words_of(values, lambda place, _: address_of(arrays[place]))
    return np.array([*words, *offsets_of(values)], np.int64), arrays


def offsets_of(values: tuple[Any, ...]) -> list[int]:
    """Return where the sums of each array begin, and how many there are."""
    sizes = [x.size if isinstance(x, np.ndarray) else 0 for x in values]
    return [sum(sizes[:n]) for n in range(len(sizes) + 1)]
