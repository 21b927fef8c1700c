"""The machine code of passes: vectors in the loops, no calls, and next to nothing spilled in them."""

import math
import re

import numpy as np
import pytest

from assembly import innermost
from numba_attention import mods
from numba_attention.cpu.simd import HOST
from numba_attention.mods.compiled import kernel_of
from numba_attention.mods.rules import as_arguments, describe, find


def functions(score, batch, head, i, j):
    return math.exp(score * 0.1) + math.log(2 + abs(score)) + (0.5 + abs(score)) ** 0.3


def branches(score, batch, head, i, j, documents):
    if documents[i] != documents[j]:
        return -math.inf
    if i > j:
        return score * 2
    return score if head == 1 else -score


def power(score, batch, head, i, j):
    return abs(score) ** 0.3


CASES = [
    (mods.alibi, (np.ones(8, np.float32),)),
    (mods.softcap, (20.0,)),
    (mods.relative_positions, (np.ones((8, 257), np.float32),)),
    (branches, (np.ones(99, np.int32),)),
    (functions, ()),
    (power, ()),
]


@pytest.mark.skipif(HOST.name not in ("AVX-512", "AVX2"), reason="looks at machine code of x86-64")
@pytest.mark.parametrize("task", ["score", "slope"])
@pytest.mark.parametrize(("function", "mod_args"), CASES, ids=[function.__name__ for function, _ in CASES])
def test_loops_are_vectors(function, mod_args, task):
    values = as_arguments(mod_args)
    rule = find("score_mod", function, describe(values), values)
    program = rule.with_slope if task == "slope" else rule.program
    code = kernel_of(rule, task, program, 32, 64).assembly()
    assert not re.findall(r"\bcallq?\s", code)
    register = "%zmm" if HOST.name == "AVX-512" else "%ymm"
    loop = innermost(code, rf"\bv(mul|add|sub|fn?m|max|min|mov[au]|cmp|perm|blend)\w*ps\b.*{register}")
    assert len(re.findall(rf"ps\b.*{register}", loop)) >= 3
    assert not re.findall(r"\bv(mul|add|sub|div)ss\b", loop)
    stored = [line for line in loop.splitlines() if re.search(rf"{register}\d+, -?\d*\(%r[sb]p", line)]
    # Eight keys that take turns spill a number here and there, and are faster than four.
    most = len(re.findall(rf"\n.*{register}", loop)) / 16 if function in (mods.softcap, power) else 0
    # Of 16 registers, the constants of a power and its slope take more than there are.
    assert len(stored) <= most or HOST.registers < 32
