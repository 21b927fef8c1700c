"""How kernels are compiled: by the package's own passes, and whatever Numba is set to or told beside it."""

import pytest

from numba_attention.cpu import compiler, linker, machine_code
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


@pytest.mark.parametrize("setting", ["NUMBA_DEBUGINFO", "NUMBA_EXTEND_VARIABLE_LIFETIMES", "NUMBA_BOUNDSCHECK"])
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


def test_functions_of_a_kernel():
    """Symbols without the types of arguments; large functions are called, small ones may be inlined."""

    def small(x: int, y: int) -> int:
        return x * y

    small = compiler.part(small)
    source = "def large(x, y):\n" + "".join(f"    x = x * {n} + small(x, y)\n" for n in range(3, 80)) + "    return x\n"
    scope = {"small": small}
    exec(source, scope)
    large = compiler.part(scope["large"])

    def kernel(x: int) -> int:
        return large(x, 1) + small(x, x)

    dispatcher = compiler.Dispatcher(kernel)
    dispatcher.compile("int64(int64)")
    (result,) = dispatcher.overloads.values()
    module = result.library.linked(result.fndesc.llvm_func_name)
    functions = {f.name: [str(a) for a in f.attributes] for f in module.functions if not f.is_declaration}
    assert len(functions) == 3
    assert all(len(name) < 120 for name in functions), "the types of arguments are no part of a name"
    kept = [name for name, attributes in functions.items() if any("noinline" in a for a in attributes)]
    assert len(kept) == 1, kept
    assert "large" in kept[0]
    sizes = {f.name: sum(len(list(b.instructions)) for b in f.blocks) for f in module.functions if f.name in functions}
    assert all((size > linker.LARGE) == (name in kept) for name, size in sizes.items())
