"""What a mod may say: passes over a tile against plain Python, slopes against differences, and what is refused."""

import ctypes
import linecache
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numba_attention as na
from mod_functions import DOCS, FUNCTIONS, TABLE, plain_arguments, rounding
from numba_attention.mods.compiled import compiled_bits
from passes import function_of, lanes_of, plainly, run

SMOOTH = [x for x in FUNCTIONS if x[0] not in (rounding,)]
names = [function.__name__ for function, _ in FUNCTIONS]


def tile(dtype, in_a_row, keys=40):
    rng = np.random.default_rng(1)
    lanes = lanes_of(dtype)
    scores = (3 * rng.standard_normal((keys, lanes))).astype(dtype)
    positions = np.arange(lanes) + 11 if in_a_row else rng.integers(0, 75, lanes)
    heads = np.full(lanes, 1) if in_a_row else rng.integers(0, 2, lanes)
    return scores, positions, heads


@pytest.mark.parametrize("in_a_row", [True, False], ids=["run", "any rows"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("function", "mod_args"), FUNCTIONS, ids=names)
def test_pass_against_plain_python(function, mod_args, dtype, in_a_row):
    scores, positions, heads = tile(dtype, in_a_row)
    got, _, _ = run("score", function, scores, positions, heads, mod_args, batch=2, j0=4)
    want = plainly(function, scores, positions, heads, plain_arguments(mod_args), batch=2, j0=4)
    tolerance = 4e-6 if dtype == "float32" else 1e-13
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("in_a_row", [True, False], ids=["run", "any rows"])
@pytest.mark.parametrize(("function", "mod_args"), SMOOTH, ids=[function.__name__ for function, _ in SMOOTH])
def test_slopes_against_differences(function, mod_args, in_a_row):
    scores, positions, heads = tile("float64", in_a_row)
    value, slopes, kept = run("kept", function, scores, positions, heads, mod_args, batch=1)
    np.testing.assert_array_equal(kept, scores)
    np.testing.assert_array_equal(value, run("score", function, scores, positions, heads, mod_args, batch=1)[0])
    step = 1e-6
    above, below = (
        plainly(function, scores + x, positions, heads, plain_arguments(mod_args), batch=1) for x in (step, -step)
    )
    with np.errstate(invalid="ignore"):
        want = np.where(above == below, 0, (above - below) / (2 * step))
    np.testing.assert_allclose(slopes, want, rtol=2e-7, atol=2e-6)


def test_derivative_of_the_users_own():
    def rough(score, batch, head, i, j):
        return math.floor(score)

    def straight_through(score, batch, head, i, j):
        return 1.0 + 0 * head

    rough.derivative = straight_through
    value, slopes, _ = run("slope", rough, *tile("float32", True))
    assert (slopes == 1).all()
    assert (value == np.floor(tile("float32", True)[0])).all()


def test_kinks():
    scores = np.zeros_like(tile("float64", True)[0])
    _, slopes, _ = run("slope", lambda score, batch, head, i, j: abs(score), scores, *tile("float64", True)[1:])
    assert (slopes == 1).all()
    _, slopes, _ = run("slope", lambda s, batch, head, i, j: max(s, 3 * s), scores, *tile("float64", True)[1:])
    assert (slopes == 1).all()


# Random rules


# Integers stay small: theirs have 32 bits in a mod, and any number in Python.
LEAVES = ["score", "i % 8", "(j - i) % 5", "head", "batch", "2", "3", "0.5", "1.25", "x", "table[i]", "docs[j]"]


def _joined(parts):
    binary = st.builds(
        lambda op, x, y: f"({x} {op} {y})", st.sampled_from(["+", "-", "*", "/ 7 -", "// 3 +", "% 5 -"]), parts, parts
    )
    function = st.builds(lambda f, x: f"{f}({x})", st.sampled_from(["abs", "math.tanh", "np.sin", "float"]), parts)
    pair = st.builds(lambda f, x, y: f"{f}({x}, {y})", st.sampled_from(["min", "max"]), parts, parts)
    choice = st.builds(
        lambda x, y, op, p, q: f"({x} if {p} {op} {q} else {y})",
        parts, parts, st.sampled_from(["<", "<=", "==", "!="]), parts, parts,
    )  # fmt: skip
    looked_up = st.builds(lambda x: f"table[int({x}) % 65]", parts)
    return st.one_of(binary, function, pair, choice, looked_up)


EXPRESSIONS = st.recursive(st.sampled_from(LEAVES), _joined, max_leaves=8)


@settings(max_examples=25, deadline=None)
@given(first=EXPRESSIONS, second=EXPRESSIONS, third=EXPRESSIONS, test=EXPRESSIONS)
def test_random_rules_agree_with_plain_python(first, second, third, test):
    text = f"""
def mod(score, batch, head, i, j, table, docs):
    x = 1.5
    x = {first}
    if {test} > 1:
        x = {second}
        if i > j:
            return x + {third}
    return x - score
"""
    function = function_of(text, math=math, np=np)
    scores, positions, heads = tile("float64", True, keys=5)
    arguments = TABLE, DOCS
    got, _, _ = run("score", function, scores, positions, heads, arguments, batch=1)
    want = plainly(function, scores, positions, heads, plain_arguments(arguments), batch=1)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9, err_msg=text)


# Refusals


def five(score, batch, head, i, j):
    return score


def asserts(score, batch, head, i, j):
    assert i > j
    return score


def falls_off(score, batch, head, i, j):
    if i > j:
        return score


def maybe(score, batch, head, i, j):
    if i > j:
        x = 1
    return score + x


def frozen(score, batch, head, i, j):
    return score + TABLE[i]


def norm(score, batch, head, i, j):
    return np.linalg.norm(score)


def writes(score, batch, head, i, j, table):
    table[i] = score
    return score


def endless(score, batch, head, i, j):
    while score > 0:
        score -= 1
    return score


def depends(score, batch, head, i, j):
    for _ in range(i):
        score += 1
    return score


def unknown(score, batch, head, i, j):
    return score + nowhere  # noqa: F821


def slices(score, batch, head, i, j, table):
    return score + table[i:]


def real_index(score, batch, head, i, j, table):
    return table[score]


def recursive(score, batch, head, i, j):
    return recursive(score, batch, head, i, j)


def of_text(score, batch, head, i, j):
    return score + "a"


def not_a_number(score, batch, head, i, j):
    return 1j * score


def too_many(score, batch, head, i, j):
    for _ in range(10):
        for _ in range(10000):
            score = score * 1.5 + i
    return score


def far_too_many(score, batch, head, i, j):
    for _ in range(10**12):
        score = score + 1
    return score


def idle(score, batch, head, i, j):
    for _ in range(10_000):
        for _ in range(10_000):
            unused = 1.0  # the same instruction each time
    return score + unused


async def waits(score, batch, head, i, j):
    return score


def inverts(score, batch, head, i, j):
    return score * ~(i > j)


REFUSED = [
    (asserts, (), "assert is not available", "assert i > j"),
    (falls_off, (), "may end without a return", "if i > j:"),
    (maybe, (), "x may have no value here", "return score + x"),
    (frozen, (), "pass it in mod_args", "return score + TABLE[i]"),
    (norm, (), r"np.linalg.norm is not available in a mod; use one of", "return np.linalg.norm(score)"),
    (writes, (TABLE,), "arrays cannot be written", "table[i] = score"),
    (endless, (), "while is not available", "while score > 0:"),
    (depends, (), "the length of a loop must be known", "for _ in range(i):"),
    (unknown, (), "name 'nowhere' is not defined", "return score + nowhere"),
    (slices, (TABLE,), "slices are not available", "return score + table[i:]"),
    (real_index, (TABLE,), "an index must be an integer", "return table[score]"),
    (recursive, (), "recursion is not available", "return recursive"),
    (of_text, (), "only numbers are available in a mod, got str", 'return score + "a"'),
    (not_a_number, (), "complex", "return 1j"),
    (too_many, (), "more than 20000 operations", "score = score * 1.5 + i"),
    (far_too_many, (), "more than 20000 operations", "score = score + 1"),
    (idle, (), "more than 20000 operations", "for _ in range(10_000):"),
    (waits, (), "without async", "async def waits"),
    (inverts, (), "the opposite of a truth value is `not x`", "return score * ~(i > j)"),
    (five, (TABLE,), r"called as score_mod\(score, batch, head, i, j, \*mod_args\)", "def five"),
    (lambda score, i, j: score, (), "this function takes 3", "lambda score, i, j"),
]


def test_a_loop_that_ends_early_may_have_any_length():
    def first(score, batch, head, i, j):
        for n in range(10**12):
            if n == 3:
                break
            score = score + n
        return score

    query = np.zeros((1, 3, 4))
    _, lse = na.attention(query, query, query, score_mod=first, return_lse=True)
    np.testing.assert_allclose(lse, 3 + np.log(3))


@pytest.mark.parametrize(("function", "mod_args", "why", "line"), REFUSED, ids=[case[0].__name__ for case in REFUSED])
def test_refused_with_the_users_line(function, mod_args, why, line):
    query = np.zeros((2, 66, 8), np.float32)
    with pytest.raises(TypeError, match=why) as caught:
        na.attention(query, query, query, score_mod=function, mod_args=mod_args)
    message = str(caught.value)
    assert line in message
    assert f'File "{__file__}", line ' in message
    number = int(message.rsplit(", line ", 1)[1].split()[0])
    assert function.__code__.co_firstlineno <= number < function.__code__.co_firstlineno + 8
    caret = message.splitlines()[-1]
    assert set(caret.strip()) == {"^"}


def test_a_mask_returns_a_truth_value():
    query = np.zeros((2, 6, 8), np.float32)
    with pytest.raises(TypeError, match="a mask_mod must return a truth value"):
        na.attention(query, query, query, mask_mod=lambda batch, head, i, j: 0.5 * i)


def test_a_shift_by_more_bits_than_memory_has():
    """Constants are computed while a mod is read, of which Python would write out 10**13 bits."""
    query = np.zeros((1, 3, 8), np.float32)
    got = na.attention_weights(query, query, score_mod=lambda score, batch, head, i, j: score + j * (1 << 10**13) * 0)
    np.testing.assert_allclose(got[0], np.full((3, 3), 1 / 3), rtol=1e-6)


def test_a_function_without_source():
    scope = {}
    exec("def mod(score, batch, head, i, j):\n    return score", scope)
    query = np.zeros((2, 6, 8), np.float32)
    # From Python 3.13 on, "<string>" is the file of `python -c`, with which pytest-xdist begins its workers.
    with pytest.raises(TypeError, match=r"its source cannot be read|its definition is not at line 1 of '<string>'"):
        na.attention(query, query, query, score_mod=scope["mod"])
    source = "def mod(score, batch, head, i, j):\n    return score - j\n"
    linecache.cache["<written by a program>"] = len(source), None, source.splitlines(True), "<written by a program>"
    exec(compile(source, "<written by a program>", "exec"), scope)
    linecache.checkcache()
    got = na.attention_weights(query, query, score_mod=scope["mod"])
    np.testing.assert_allclose(got[0, 0], np.exp(-np.arange(6.0)) / np.exp(-np.arange(6.0)).sum(), rtol=1e-6)


def of_all(batch, head, i, j, docs):
    return (docs[i] == docs[j] or i % 7 == head) and j <= i + batch


@pytest.mark.parametrize("rows", [64, 1, 37])
@pytest.mark.parametrize("function", [of_all, lambda batch, head, i, j, docs: docs[j] != head], ids=["all", "keys"])
def test_bits_of_a_tile(function, rows):
    first, n, j0 = 30, 50, 20
    docs = np.repeat(np.arange(20), 5).astype(np.int32)[: first + rows]
    docs = np.concatenate([docs, np.zeros(max(0, j0 + n - len(docs)), np.int32)])
    bits = compiled_bits(function, (docs,), (first + rows, j0 + n), batch=3, heads=4)
    words = np.full(64, 2**63 - 1, np.uint64)
    kind = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 10, ctypes.c_double)
    result, error = ctypes.c_int64(), ctypes.c_void_p()
    where = ctypes.addressof(result), ctypes.addressof(error)
    kind(bits.address)(*where, bits.data, words.ctypes.data, n, j0, 2, 3, first, rows, 0, 0, 1.0)
    got = (words[:n, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    want = np.array([[r < rows and function(2, 3, first + r, j0 + j, docs) for r in range(64)] for j in range(n)])
    np.testing.assert_array_equal(got, want)
    assert (words[n:] == 2**63 - 1).all()
