"""How kernels are compiled: by the package's own passes, and whatever Numba is set to or told beside it."""

import pytest

from grid import share
from numba_attention.cpu import compiler, machine_code
from processes import run

EXPECTED = """
import numpy as np
import numba_attention as na

def expected(q, k, v):
    s = q.astype(float) @ k.astype(float).swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    p = np.exp(s - s.max(-1, keepdims=True))
    return p @ v.astype(float) / p.sum(-1, keepdims=True)

rng = np.random.default_rng(0)

def check(*shape, dtype=np.float32):
    q, k, v = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    np.testing.assert_allclose(na.attention(q, k, v), expected(q, k, v), rtol=0, atol=2e-6)

"""


def test_own_compiler():
    """A Numba whose private parts are others would compile kernels by `njit`, which takes three times as long."""
    assert machine_code.part is compiler.part
    assert machine_code._compile is compiler.compile_whole


@pytest.mark.parametrize(
    "setting", share(["NUMBA_DEBUGINFO", "NUMBA_EXTEND_VARIABLE_LIFETIMES", "NUMBA_BOUNDSCHECK"], 3)
)
def test_settings_of_numba(tmp_path, setting):
    """What users set to debug their own functions: kernels compile, and their variables hold what was stored."""
    code = EXPECTED + "check(2, 37, 24)\nprint('done')"
    run(code, **{setting: "1"}, NUMBA_ATTENTION_CACHE_DIR=str(tmp_path))


OVERLOADED = """
check(2, 37, 24)

import operator
from numba import njit, types
from numba.extending import overload

@overload(operator.add)
def add(x, y):
    if x == types.unicode_type and y == types.none:
        return lambda x, y: x

@njit
def own(x):
    return x + None

assert own("a") == "a"
check(2, 37, 24, dtype=np.float64)
print("done")
"""


def test_operators_that_others_register(tmp_path):
    """Operations that were resolved before are resolved anew when there are more candidates."""
    run(EXPECTED + OVERLOADED, NUMBA_ATTENTION_CACHE_DIR=str(tmp_path))


def test_names_of_functions():
    """The types of arguments are no part of a symbol: that of the record of parameters has thousands of characters."""

    def half(x: int) -> int:
        return x // 2

    half = compiler.part(half)

    def kernel(x: int) -> int:
        return half(x) + half(x + 1)

    dispatcher = compiler.Dispatcher(kernel)
    dispatcher.compile("int64(int64)")
    (result,) = dispatcher.overloads.values()
    module = result.library.linked(result.fndesc.llvm_func_name)
    names = [f.name for f in module.functions if not f.is_declaration]
    assert len(names) == 2
    assert not any("int64" in name or "x" in name.partition("half")[2] for name in names), names
