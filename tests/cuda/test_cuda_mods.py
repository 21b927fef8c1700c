"""`score_mod` and `mask_mod` on a GPU, in the emulator: instructions against plain Python, calls against textbooks."""

import itertools
import math

import numpy as np
import pytest

import numba_attention as na
from cases import DTYPES, Case, assert_close, check, check_backward, grad_tolerance, tolerance
from emulator import BlockMemory, Emit, Memory, Value, emulated
from mod_functions import FUNCTIONS, plain_arguments
from numba_attention import mods
from numba_attention.backends import cpu_masks
from numba_attention.cuda import tile_shapes
from numba_attention.cuda.instructions import Evaluation
from numba_attention.mods.compiled import record_of as host_record_of
from numba_attention.mods.rules import as_arguments, describe, find


@pytest.fixture
def driver(monkeypatch):
    with emulated(monkeypatch) as driver:
        yield driver


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


# Instructions

N = 512  # threads, each with a score of its own


class Threads:
    """Registers of threads that have a score each, and may read the arguments of a rule."""

    def __init__(self, mod_args):
        self.memory, self.block_memory = Memory(), BlockMemory(0, "wait", False)
        self.values = as_arguments(mod_args)
        self.record = host_record_of(self.values)
        arrays = [self.record, *(x for x in self.values if isinstance(x, np.ndarray))]
        self.memory.allow([(x.ctypes.data, x.nbytes) for x in arrays])
        self.emit = Emit(self, N)

    def run(self, program, kind, scores, batch, head, i, j):
        record = Value("l", self.record.ctypes.data)
        evaluation = Evaluation(self.emit, record, program, describe(self.values), kind)
        numbers = {name: Value("i", x) for name, x in (("batch", batch), ("head", head), ("i", i), ("j", j))}
        with np.errstate(all="ignore"):
            outputs = evaluation.run(score=Value(kind, scores), **numbers)
        return [np.broadcast_to(x.x, (N,)) for x in outputs]


def pairs():
    rng = np.random.default_rng(1)
    return 3 * rng.standard_normal(N), 2, rng.integers(0, 2, N), rng.integers(0, 75, N), rng.integers(0, 44, N)


@pytest.mark.parametrize("kind", ["f", "d"])
@pytest.mark.parametrize(("function", "mod_args"), FUNCTIONS, ids=[function.__name__ for function, _ in FUNCTIONS])
def test_instructions_against_plain_python(function, mod_args, kind):
    scores, batch, head, i, j = pairs()
    scores = scores.astype(np.float32 if kind == "f" else np.float64)
    threads = Threads(mod_args)
    rule = find("score_mod", function, describe(threads.values), threads.values)
    (got,) = threads.run(rule.program, kind, scores, batch, head, i, j)
    plain = getattr(function, "py_func", function)
    arguments = plain_arguments(mod_args)
    want = [plain(float(s), batch, int(h), int(p), int(k), *arguments)
            for s, h, p, k in zip(scores, head, i, j, strict=True)]  # fmt: skip
    limit = 4e-6 if kind == "f" else 1e-13
    np.testing.assert_allclose(got, want, rtol=limit, atol=limit * 10)


@pytest.mark.parametrize(("function", "mod_args"), FUNCTIONS, ids=[function.__name__ for function, _ in FUNCTIONS])
def test_slopes_against_differences(function, mod_args):
    if function.__name__ == "rounding":
        pytest.skip("steps have no difference quotient")
    scores, *where = pairs()
    threads = Threads(mod_args)
    rule = find("score_mod", function, describe(threads.values), threads.values)
    _, slope = threads.run(rule.with_slope, "d", scores, *where)
    step = 1e-6
    above, below = (threads.run(rule.program, "d", scores + x, *where)[0] for x in (step, -step))
    with np.errstate(invalid="ignore"):
        want = np.where(above == below, 0, (above - below) / (2 * step))
    np.testing.assert_allclose(slope, want, rtol=2e-7, atol=2e-6)


@pytest.mark.parametrize("kind", ["f", "d"])
def test_turns_of_large_numbers(kind):
    def wave(score, batch, head, i, j):
        return np.sin(score) + 2 * np.cos(score)

    threads = Threads(())
    rule = find("score_mod", wave, describe(threads.values), threads.values)
    scores = 10.0 ** np.linspace(4, 38 if kind == "f" else 308, N) * np.resize([1.0, -1.0], N)
    (got,) = threads.run(rule.program, kind, scores.astype(np.float32 if kind == "f" else np.float64), *pairs()[1:])
    assert (np.abs(got) <= 3).all()
    (got,) = threads.run(rule.program, kind, np.resize([np.inf, np.nan], N), *pairs()[1:])
    assert np.isnan(got).all()


def test_integers_at_the_edges():
    """Division rounds down for every pair of signs, by 0 it gives 0; shifts have their sign; conversions saturate."""

    def mod(score, batch, head, i, j, wide):
        return wide[i] // wide[j]

    def rest(score, batch, head, i, j, wide):
        return wide[i] % wide[j]

    def whole(score, batch, head, i, j):
        return int(score) / 2

    wide = np.array([0, 1, -1, 2, -2, 3, -3, 7, -7, 2**40, -(2**40), 2**40 + 1, 5, -5])
    i, j = (x.ravel()[:N] for x in np.meshgrid(*[np.resize(np.arange(14), 23)] * 2))
    scores, _, head, _, _ = pairs()
    for function, operation in ((mod, np.floor_divide), (rest, np.mod)):
        threads = Threads((wide,))
        rule = find("score_mod", function, describe(threads.values), threads.values)
        (got,) = threads.run(rule.program, "d", scores, 0, head, i, j)
        with np.errstate(all="ignore"):
            want = operation(wide[i], wide[j])
        np.testing.assert_array_equal(got, want)
    threads = Threads(())
    rule = find("score_mod", whole, (), ())
    far = np.resize([1e20, -1e20, np.nan, 2.9, -2.9, np.inf], N)
    (got,) = threads.run(rule.program, "d", far, 0, head, i, j)
    np.testing.assert_array_equal(got[:6], np.array([2**31 - 1, -(2**31), 0, 2, -2, 2**31 - 1]) / 2)


# Calls


def positional(score, batch, head, i, j, slopes, table):
    """Everything at once: a slope of the score, a table by distance, the sequence and the head."""
    x = score - slopes[head] * abs(i - j) + table[head, min(max(i - j + 8, 0), 16)]
    return 6 * math.tanh(x / 6) if batch % 2 == 0 else x * 0.75


def visible(batch, head, i, j, slopes, table):
    return (i - j) % 3 != 1 and i + head >= j - 20


BOTH = {"score_mod": positional, "mask_mod": visible}


def arguments(H):
    rng = np.random.default_rng(3)
    return rng.random(H, dtype=np.float32) / 4, rng.standard_normal((H, 17))


def textbook(q, k, v, offset=0, batch=None, visible_too=None):
    """Out, lse and weights in float64, for query (B, H, L, E)."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    B, H, _, E = q.shape
    group = H // k.shape[1]
    slopes, table = (x.astype(np.float64) for x in arguments(H))
    scores = np.einsum("bhle,bhse->bhls", q, np.repeat(k, group, 1)) / math.sqrt(E)
    seen = np.ones(scores.shape, bool) if visible_too is None else np.broadcast_to(visible_too, scores.shape).copy()
    for b, h, row, j in np.ndindex(scores.shape):
        where = (b if batch is None else batch, h, row + np.broadcast_to(offset, B)[b], j, slopes, table)
        scores[b, h, row, j] = positional(scores[b, h, row, j], *where)
        seen[b, h, row, j] &= visible(*where)
    scores[~seen] = -np.inf
    with np.errstate(all="ignore"):
        lse = np.log(np.exp(scores).sum(-1))
        weights = np.where(seen, np.exp(scores - lse[..., None]), 0)
    return np.einsum("bhls,bhse->bhle", weights, np.repeat(v, group, 1)), lse, weights


CASES = [
    Case(40, 70, 24, H=2, Hkv=1, options=("score mod", "mask mod", "causal")),
    Case(30, 100, 20, 40, H=2, options=("score mod hides", "window", "offset negative", "bias that hides")),
    Case(20, 40, 128, H=1, batch=(), options=("score mod", "softcap", "mask", "alibi", "dropout")),
    Case(17, 40, 160, 32, H=1, batch=(), options=("mask mod", "sinks")),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(driver, case, dtype):
    check(*case.arrays(dtype), case.kwargs(), dtype, case, backend="cuda")
    check_backward(case, dtype, backend="cuda")
    assert all(c.mods for c in driver.configs.values() if c.task in ("forward", "query", "key", "bias"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_against_a_textbook(driver, dtype):
    q, k, v = (normal(2, heads, n, 24, dtype=DTYPES[dtype]) for heads, n in ((4, 40), (2, 75), (2, 75)))
    options = BOTH | {"mod_args": arguments(4), "query_offset": [4, 1]}
    out, lse = na.attention(q, k, v, **options, return_lse=True, backend="cuda")
    want, want_lse, weights = textbook(q, k, v, offset=[4, 1])
    assert_close(out, want, tolerance(dtype)[0])
    assert_close(lse, want_lse, tolerance(dtype)[1], offset=1)
    got = na.attention_weights(q, k, heads=[3, 1], rows=[39, 0, 7], **options, backend="cuda")
    assert_close(got, weights[:, [3, 1]][:, :, [39, 0, 7]], tolerance(dtype)[0])


def test_packed_sequences(driver):
    rng = np.random.default_rng(0)
    starts = np.array([0, 66, 66, 70, 110])
    q, k, v = (rng.standard_normal((110, 2, 16), dtype=np.float32) for _ in range(3))
    packed = {**BOTH, "mod_args": arguments(2)}
    got, lse = na.attention_varlen(q, k, v, starts, starts, **packed, return_lse=True, backend="cuda")
    for b, (first, last) in enumerate(itertools.pairwise(starts)):
        part = [x[None, first:last].swapaxes(1, 2) for x in (q, k, v)]
        if last > first:
            assert_close(got[first:last], textbook(*part, batch=b)[0][0].swapaxes(0, 1), 2e-6)
    grads = [
        na.attention_varlen_backward(np.ones_like(q), q, k, v, got, lse, starts, starts, **packed, backend=backend)
        for backend in ("cuda", "reference")
    ]
    for a, b in zip(*(g[:3] for g in grads), strict=True):
        assert_close(a, b, 1e-5, 1)


@pytest.mark.parametrize("paged", [False, True])
def test_decode(driver, paged):
    q, k, v = normal(2, 4, 3, 32), normal(2, 2, 200, 32), normal(2, 2, 200, 32, seed=1)
    lengths = np.array([200, 77])
    if paged:
        cache = na.PagedKVCache(40, 16, 2, 32)
        cache.append(cache.add(2), k, v, lengths)
    else:
        cache = na.KVCache(2, 2, 200, 32)
        cache.append(k, v, lengths)
    got = na.attention_decode(q, cache, **BOTH, mod_args=arguments(4), backend="cuda")
    rows = np.arange(3)[:, None] + (lengths - 3)[:, None, None, None]
    assert_close(got, textbook(q, k, v, offset=lengths - 3, visible_too=np.arange(200) <= rows)[0], 2e-6)
    assert any(c.split_kv for c in driver.configs.values())
    assert any(c.pack_gqa for c in driver.configs.values())


def test_gradients_in_two_passes(driver, monkeypatch):
    monkeypatch.setenv(tile_shapes.DETERMINISTIC, "1")
    check_backward(CASES[0], "bfloat16", backend="cuda")
    assert {"query", "key"} <= {c.task for c in driver.configs.values()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_old_gpus(monkeypatch, dtype):
    with emulated(monkeypatch, capability=(7, 0)):
        check(*CASES[1].arrays(dtype), CASES[1].kwargs(), dtype, CASES[1], backend="cuda")
        check_backward(CASES[1], dtype, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing(driver, dtype):
    def nothing(batch, head, i, j):
        return head == 1 and i != 2

    def hide(score, batch, head, i, j):
        return -math.inf if head == 0 or i == 2 else score

    q, k, v = (normal(1, 2, n, 16, dtype=DTYPES[dtype]) for n in (20, 40, 40))
    for options in ({"mask_mod": nothing}, {"score_mod": hide}, {"score_mod": hide, "alibi_slopes": [0.1, 0.2]}):
        out, lse = na.attention(q, k, v, **options, return_lse=True, backend="cuda")
        empty = np.zeros(lse.shape, bool)
        empty[:, 0], empty[:, :, 2] = True, True
        assert not out.astype(float)[empty].any()
        assert (lse[empty] == -np.inf).all()
        assert np.isfinite(lse[~empty]).all()
        grads = na.attention_backward(v[..., :20, :], q, k, v, out, lse, **options, backend="cuda")
        assert all(np.isfinite(x.astype(float)).all() for x in grads[:3])
        assert not grads.query.astype(float)[empty].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_of_a_hidden_key_has_no_effect(driver, dtype):
    """Hidden by a mask_mod, and by a score_mod that returns -inf, with stages after it."""

    def even(batch, head, i, j):
        return j % 2 == 0

    def hide(score, batch, head, i, j):
        return score if j % 2 == 0 else -math.inf

    bias = normal(70)
    for options in ({"mask_mod": even}, {"score_mod": hide}, {"score_mod": hide, "alibi_slopes": [0.1], "bias": bias}):
        q, k, v, grad_out = (normal(1, 70, 32, dtype=DTYPES[dtype], seed=n) for n in range(4))
        results = []
        for _ in range(2):
            out, lse = na.attention(q, k, v, **options, return_lse=True, backend="cuda")
            grads = na.attention_backward(grad_out, q, k, v, out, lse, **options, backend="cuda")
            results.append([out, lse, *grads[:3]])
            k[:, 1::2], v[:, 1::2] = np.nan, np.inf
        for clean, dirty in zip(*results, strict=True):
            assert np.isfinite(dirty.astype(np.float32)).all()
            assert_close(dirty, clean, tolerance(dtype)[0] * 5, 1)


def test_a_weight_of_zero_has_no_gradient_however_steep(driver):
    def steep(score, batch, head, i, j):
        return -1e30 - math.sqrt(score - score) if j == 3 else score

    q, k, v = (normal(1, n, 16, dtype=np.float64, seed=m) for m, n in enumerate((20, 30, 30)))
    out, lse = na.attention(q, k, v, score_mod=steep, return_lse=True, backend="cuda")
    got = na.attention_backward(v[:, :20], q, k, v, out, lse, score_mod=steep, backend="cuda")
    want = na.attention_backward(v[:, :20], q, k, v, out, lse, mask=np.arange(30) != 3, backend="reference")
    for a, b in zip(got[:3], want[:3], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_numbers_are_read_anew_without_another_kernel(driver):
    """Scalars and the contents of arrays are no part of a kernel; a number of the function's own is."""

    def scaled(score, batch, head, i, j, factor, table):
        return score * factor + table[j]

    q, k, v = (normal(1, 20, 16, seed=n) for n in range(3))
    for factor in (0.5, 2.0):
        table = normal(20, seed=int(factor * 10))
        got = na.attention(q, k, v, score_mod=scaled, mod_args=(factor, table), backend="cuda")
        want = na.attention(*(x.astype(float) for x in (q * np.float32(factor), k, v)), bias=table, backend="reference")
        assert_close(got, want, 2e-6)
    assert len([c for c in driver.configs.values() if c.task == "forward" and not c.nan_safe]) == 1


def test_a_table_that_is_too_short(driver):
    q = normal(1, 20, 16)

    def table_of_rows(score, batch, head, i, j, table):
        return score + table[i]

    with pytest.raises(ValueError, match=r"mod_args\[0\] has 19 elements along axis 0, which is read at i = 0 .. 19"):
        na.attention(q, q, q, score_mod=table_of_rows, mod_args=(np.zeros(19),), backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_arguments(driver, dtype):
    """Slopes by heads, a table by heads and distances, and one by rows and keys; grouped heads, other options."""

    def rule(score, batch, head, i, j, slopes, table, rows, scale):
        x = score - slopes[head] * abs(i - j) + table[head, min(max(i - j + 8, 0), 16)] * scale
        return 6 * math.tanh(x / 6) * rows[i] + rows[j]

    rng = np.random.default_rng(0)
    q, k, v, grad = (rng.standard_normal((2, h, n, 24)).astype(DTYPES[dtype]) for h, n in
                     ((4, 40), (2, 50), (2, 50), (4, 40)))  # fmt: skip
    args = rng.random(4, dtype=np.float32) / 4, rng.standard_normal((4, 17)), 1 + rng.random(50), 0.5
    shown = na.BlockMask.from_array(rng.random((4, 40, 50)) < 0.8)
    options = {
        "mask": shown,
        "score_mod": rule,
        "mod_args": args,
        "is_causal": "bottom-right",
        "softcap": 5.0,
        "dropout_p": 0.2,
        "seed": 3,
    }
    results = []
    for backend, arrays in (("cuda", (q, k, v)), ("reference", [x.astype(np.float64) for x in (q, k, v)])):
        out, lse = na.attention(*arrays, **options, return_lse=True, backend=backend)
        results.append(na.attention_backward(grad.astype(out.dtype), *arrays, out, lse, **options, mod_grads=[0, 1, 2],
                                             backend=backend))  # fmt: skip
    got, want = results
    assert [x.dtype for x in got.mod_args[:3]] == [np.float32, np.float64, np.float64]
    assert got.mod_args[3] is None
    for a, b in zip((*got[:3], *got.mod_args[:3]), (*want[:3], *want.mod_args[:3]), strict=True):
        assert_close(a, b, grad_tolerance(dtype) * 4, offset=np.abs(want.key).max())


def test_gradients_of_arguments_of_packed_sequences(driver):
    rng = np.random.default_rng(0)
    starts = np.array([0, 40, 40, 44, 70])
    q, k, v, grad = (rng.standard_normal((70, 2, 16)) for _ in range(4))
    options = BOTH | {"mod_args": arguments(2)}
    grads = []
    for backend in ("cuda", "reference"):
        out, lse = na.attention_varlen(q, k, v, starts, starts, **options, return_lse=True, backend=backend)
        grads.append(na.attention_varlen_backward(grad, q, k, v, out, lse, starts, starts, **options, mod_grads="all",
                                                  backend=backend))  # fmt: skip
    for a, b in zip(*(g.mod_args for g in grads), strict=True):
        assert_close(a, b, 1e-6 if a.dtype == np.float32 else 1e-12, 1)


def test_gradients_of_arguments_have_no_order(driver, monkeypatch):
    monkeypatch.setenv(tile_shapes.DETERMINISTIC, "1")
    q = normal(1, 20, 16)
    out, lse = na.attention(q, q, q, return_lse=True)
    with pytest.raises(NotImplementedError, match="mod_grads are summed by atomics in any order"):
        na.attention_backward(q, q, q, q, out, lse, score_mod=mods.alibi, mod_args=(np.ones(1),), mod_grads="all",
                              backend="cuda")  # fmt: skip


def test_a_mask_mod_becomes_a_block_mask(driver, monkeypatch):
    """Where there are many pairs, forward and backward; made of arrays on the host only."""
    monkeypatch.setattr(cpu_masks, "FEW_PAIRS", 100)
    q, k, v = (normal(1, 2, n, 16, seed=n) for n in (80, 140, 140))
    documents = np.repeat(np.arange(4), 35).astype(np.int32)
    options = {"mask_mod": mods.documents, "mod_args": (documents,)}
    out, lse = na.attention(q, k, v, **options, return_lse=True, backend="cuda")
    grads = na.attention_backward(q, q, k, v, out, lse, **options, backend="cuda")
    assert all(c.lists and c.mods is None for c in driver.configs.values() if c.task in ("forward", "query", "key"))
    mask = documents[:80, None] == documents
    want, want_lse = na.attention(q, k, v, mask=mask, return_lse=True, backend="reference")
    assert_close(out, want, 2e-6)
    for a, b in zip(grads[:3], na.attention_backward(q, q, k, v, want, want_lse, mask=mask, backend="reference"),
                    strict=False):  # fmt: skip
        assert_close(a, b, 1e-5, 1)
