"""`score_mod`, `mask_mod` and `mod_args` in every entry point, forward and backward, against textbook formulas."""

import importlib.util
import itertools
import math
import os
import subprocess
import sys
import threading

import numba
import numpy as np
import pytest

import numba_attention as na
from cases import DTYPES, assert_close, grad_tolerance, tolerance
from numba_attention.mods import rules
from passes import function_of


def positional(score, batch, head, i, j, slopes, table):
    """Everything at once: a slope of the score, a table by distance, the sequence and the head."""
    x = score - slopes[head] * abs(i - j) + table[head, min(max(i - j + 8, 0), 16)]
    return 6 * math.tanh(x / 6) if batch % 2 == 0 else x * 0.75


def visible(batch, head, i, j, slopes, table):
    return (i - j) % 3 != 1 and i + head >= j - 20


def arguments(H, rng=None):
    rng = rng or np.random.default_rng(3)
    return rng.random(H, dtype=np.float32) / 4, rng.standard_normal((H, 17))


def textbook(q, k, v, offset=0, score=True, mask=True, batch=None, visible_too=None):
    """Out, lse and weights in float64, for query (B, H, L, E)."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    B, H, _, E = q.shape
    group = H // k.shape[1]
    slopes, table = (x.astype(np.float64) for x in arguments(H))
    scores = np.einsum("bhle,bhse->bhls", q, np.repeat(k, group, 1)) / math.sqrt(E)
    seen = np.ones(scores.shape, bool) if visible_too is None else np.broadcast_to(visible_too, scores.shape).copy()
    for b, h, row, j in np.ndindex(scores.shape):
        where = (b if batch is None else batch, h, row + np.broadcast_to(offset, B)[b], j, slopes, table)
        if score:
            scores[b, h, row, j] = positional(scores[b, h, row, j], *where)
        if mask:
            seen[b, h, row, j] &= visible(*where)
    scores[~seen] = -np.inf
    with np.errstate(all="ignore"):
        lse = np.log(np.exp(scores).sum(-1))
        weights = np.where(seen, np.exp(scores - lse[..., None]), 0)
    return np.einsum("bhls,bhse->bhle", weights, np.repeat(v, group, 1)), lse, weights


def draw(dtype="float32", B=2, H=2, Hkv=None, L=70, S=75, E=16):
    rng = np.random.default_rng(0)
    shapes = (B, H, L, E), (B, Hkv or H, S, E), (B, Hkv or H, S, E)
    return [rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes]


BOTH = {"score_mod": positional, "mask_mod": visible}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("Hkv", "L"), [(2, 70), (1, 70), (1, 3)], ids=["full tiles", "groups", "few queries"])
def test_attention(dtype, Hkv, L, backend):
    q, k, v = draw(dtype, Hkv=Hkv, L=L)
    options = BOTH | {"mod_args": arguments(2), "query_offset": [4, 1]}
    out, lse = na.attention(q, k, v, **options, return_lse=True, backend=backend)
    want, want_lse, _ = textbook(q, k, v, offset=[4, 1])
    assert_close(out, want, tolerance(dtype)[0])
    assert_close(lse, want_lse, tolerance(dtype)[1], offset=1)


def test_one_kind_alone():
    q, k, v = draw()
    out = na.attention(q, k, v, score_mod=positional, mod_args=arguments(2))
    assert_close(out, textbook(q, k, v, mask=False)[0], 2e-6)
    out = na.attention(q, k, v, mask_mod=visible, mod_args=arguments(2))
    assert_close(out, textbook(q, k, v, score=False)[0], 2e-6)


def test_with_other_options():
    """Between softcap and ALiBi; bias, causal mask and a window beside it."""
    q, k, v = draw(L=75)
    bias = np.random.default_rng(1).standard_normal((2, 75, 75)).astype(np.float32)
    options = {"is_causal": True, "window": (40, None), "bias": bias, "softcap": 3.0, "alibi_slopes": [0.1, 0.2]}
    options |= {"sinks": [0.5, -1.0], "mod_args": arguments(2)} | BOTH
    out, lse = na.attention(q, k, v, **options, return_lse=True)
    want, want_lse = na.attention(
        *(x.astype(float) for x in (q, k, v)), **options, return_lse=True, backend="reference"
    )
    assert_close(out, want, 2e-6)
    assert_close(lse, want_lse, 5e-7, offset=1)


def test_batch_counts_row_by_row():
    q, k, v = (x.reshape(2, 3, *x.shape[1:]) for x in draw(B=6, L=66, S=9))
    got = na.attention(q, k, v, **BOTH, mod_args=arguments(2))
    np.testing.assert_array_equal(
        got.reshape(6, *got.shape[2:]),
        na.attention(*(x.reshape(6, *x.shape[2:]) for x in (q, k, v)), **BOTH, mod_args=arguments(2)),
    )
    assert_close(got.reshape(6, *got.shape[2:]), textbook(*(x.reshape(6, *x.shape[2:]) for x in (q, k, v)))[0], 2e-6)


def each_score(rule, backend, dtype, *mod_args):
    """What a rule makes of a score of 0, for each of three queries and keys: with one key, `lse` is its score."""
    x = np.zeros((3, 1), dtype)
    columns = [
        na.attention(x, x, x, mask=column, score_mod=rule, mod_args=mod_args, return_lse=True, backend=backend)[1]
        for column in np.eye(3, dtype=bool)
    ]
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("integer", ["int32", "int64"])
def test_integers_divided_by_zero_and_the_lowest_by_minus_one(integer, dtype, backend):
    """By 0 it gives 0. Where the quotient does not fit, there is one all the same: the process must not trap."""

    def quotient(score, batch, head, i, j, of, by):
        return of[i] // by[j]

    def rest(score, batch, head, i, j, of, by):
        return of[i] % by[j]

    by = np.array([0, -2, 3], integer)
    for of in (np.array([7, -7, 0], integer), np.array([-5, 1, 2], integer)):
        with np.errstate(divide="ignore"):
            np.testing.assert_array_equal(each_score(quotient, backend, dtype, of, by), of[:, None] // by)
            np.testing.assert_array_equal(each_score(rest, backend, dtype, of, by), of[:, None] % by)
    lowest = np.array([np.iinfo(integer).min, 5, 0], integer)
    got = each_score(quotient, backend, dtype, lowest, np.array([-1, 1, -1], integer))
    np.testing.assert_array_equal(got[1:], [[-5, 5, -5], [0, 0, 0]])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_truth_values_are_numbers(backend):
    """Also those of arrays: the sum of two is 2, as in Python, and they have an opposite."""

    def added(score, batch, head, i, j, flags, times):
        return (flags[i] + flags[j]) + 10 * ((times[i] > 1) + (times[j] > 1)) - 100 * -flags[i]

    flags, times = np.array([True, False, True]), np.array([0.0, 2.0, 3.0])
    late = (times > 1).astype(int)
    want = np.add.outer(flags.astype(int), flags) + 10 * np.add.outer(late, late) + 100 * flags.astype(int)[:, None]
    np.testing.assert_array_equal(each_score(added, backend, "float64", flags, times), want)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_reals_divided_by_zero(backend):
    def inverse(score, batch, head, i, j, times):
        return (score - 1) / (times[i] - times[j]) if j > i else 1 / j

    got = each_score(inverse, backend, "float64", np.array([2.0, 2.0, 3.0]))
    # A row whose only score is -inf sees nothing.
    np.testing.assert_array_equal(got[:, 1:], [[-np.inf, 1], [1, 1], [1, 0.5]])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_packed(backend):
    rng = np.random.default_rng(0)
    starts = np.array([0, 66, 66, 70, 150])
    q, k, v = (rng.standard_normal((150, 2, 16), dtype=np.float32) for _ in range(3))
    got = na.attention_varlen(q, k, v, starts, starts, **BOTH, mod_args=arguments(2), backend=backend)
    for b, (first, last) in enumerate(itertools.pairwise(starts)):
        part = [x[None, first:last].swapaxes(1, 2) for x in (q, k, v)]
        want = textbook(*part, batch=b)[0][0].swapaxes(0, 1)
        if last > first:
            assert_close(got[first:last], want, 2e-6)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("L", [1, 5, 40])
def test_decode(L, paged):
    q, k, v = draw(Hkv=1, L=L, S=130)
    lengths = np.array([130, 77])
    if paged:
        cache = na.PagedKVCache(32, 16, 1, 16)
        cache.add(2)
        cache.append([0, 1], k, v, lengths)
    else:
        cache = na.KVCache(2, 1, 130, 16)
        cache.append(k, v, lengths)
    got = na.attention_decode(q, cache, **BOTH, mod_args=arguments(2))
    rows = np.arange(L)[:, None] + (lengths - L)[:, None, None, None]
    seen = np.arange(130) <= rows
    assert_close(got, textbook(q, k, v, offset=lengths - L, visible_too=seen)[0], 2e-6)


def test_weights():
    q, k, v = draw(Hkv=1)
    _, _, want = textbook(q, k, v)
    assert_close(na.attention_weights(q, k, **BOTH, mod_args=arguments(2)), want, 2e-6)
    got = na.attention_weights(q, k, heads=[1], rows=[60, 3, 3], **BOTH, mod_args=arguments(2))
    assert_close(got, want[:, [1]][:, :, [60, 3, 3]], 2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("L", [3, 70])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_that_see_nothing(dtype, L, backend):
    q, k, v = draw(dtype, L=L)

    def nothing(batch, head, i, j):
        return head == 1 and i != 2

    def hide(score, batch, head, i, j):
        return -math.inf if head == 0 or i == 2 else score

    for options in ({"mask_mod": nothing}, {"score_mod": hide}):
        out, lse = na.attention(q, k, v, **options, return_lse=True, backend=backend)
        empty = np.zeros(lse.shape, bool)
        empty[:, 0], empty[:, :, 2] = True, True
        assert not out.astype(float)[empty].any()
        assert (lse[empty] == -np.inf).all()
        assert np.isfinite(lse[~empty]).all()
        grads = na.attention_backward(v[..., :L, :], q, k, v, out, lse, **options, backend=backend)
        assert all(np.isfinite(x.astype(float)).all() for x in grads[:3])
        assert not grads.query.astype(float)[empty].any()


def test_nan_behind_a_mask_is_not_seen():
    q, k, v = draw()
    k[:, :, 1::2], v[:, :, 1::2] = np.nan, np.nan

    def even(batch, head, i, j):
        return j % 2 == 0

    np.testing.assert_array_equal(
        na.attention(q, k, v, mask_mod=even), na.attention(q, k, v, mask=np.arange(75) % 2 == 0)
    )


# Gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Hkv", [1, 2])
def test_gradients_against_the_reference(dtype, Hkv):
    q, k, v = draw(dtype, Hkv=Hkv, L=130)
    options = BOTH | {"mod_args": arguments(2), "is_causal": True, "softcap": 5.0, "alibi_slopes": [0.1, 0.2]}
    grads = []
    for arrays, backend in (((q, k, v), "cpu"), ([x.astype(float) for x in (q, k, v)], "reference")):
        out, lse = na.attention(*arrays, **options, return_lse=True, backend=backend)
        grad_out = np.random.default_rng(2).standard_normal(out.shape).astype(out.dtype)
        grads.append(na.attention_backward(grad_out, *arrays, out, lse, **options, mod_grads="all", backend=backend))
    got, want = grads
    assert [x.dtype for x in got.mod_args] == [np.float32, np.float64]
    for a, b in zip((*got[:3], *got.mod_args), (*want[:3], *want.mod_args), strict=True):
        # The gradients of arguments are sums over all pairs, whose parts have the errors of the others.
        assert_close(a, b, grad_tolerance(dtype) * 4, offset=np.abs(want.key).max())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_of_arguments_against_differences(backend):
    q, k, v = draw("float64", B=1, L=20, S=24)
    slopes, table = (x.astype(np.float64) for x in arguments(2))
    grad_out = np.random.default_rng(2).standard_normal(q.shape)

    def loss(slopes, table):
        return (grad_out * na.attention(q, k, v, **BOTH, mod_args=(slopes, table))).sum()

    out, lse = na.attention(q, k, v, **BOTH, mod_args=(slopes, table), return_lse=True)
    grads = na.attention_backward(
        grad_out, q, k, v, out, lse, **BOTH, mod_args=(slopes, table), mod_grads="all", backend=backend
    )
    step = 1e-6
    for n, x in enumerate((slopes, table)):
        for index in list(np.ndindex(x.shape))[:20]:
            parts = [[slopes.copy(), table.copy()] for _ in range(2)]
            parts[0][n][index] += step
            parts[1][n][index] -= step
            want = (loss(*parts[0]) - loss(*parts[1])) / (2 * step)
            assert abs(grads.mod_args[n][index] - want) < 1e-7 * max(1, abs(want))


def test_packed_gradients():
    rng = np.random.default_rng(0)
    starts = np.array([0, 66, 66, 70, 150])
    q, k, v, grad_out = (rng.standard_normal((150, 2, 16)) for _ in range(4))
    options = BOTH | {"mod_args": arguments(2)}
    grads = []
    for backend in ("cpu", "reference"):
        out, lse = na.attention_varlen(q, k, v, starts, starts, **options, return_lse=True, backend=backend)
        grads.append(
            na.attention_varlen_backward(
                grad_out, q, k, v, out, lse, starts, starts, **options, mod_grads=[1], backend=backend
            )
        )
    got, want = grads
    assert got.mod_args[0] is None
    assert want.mod_args[0] is None
    for a, b in zip((*got[:3], got.mod_args[1]), (*want[:3], want.mod_args[1]), strict=True):
        assert_close(a, b, 1e-12)


def test_a_weight_of_zero_has_no_gradient_however_steep():
    """0 times infinity: keys far below the others, where the rule has an infinite slope."""

    def steep(score, batch, head, i, j):
        return -1e30 - math.sqrt(score - score) if j == 3 else score

    q, k, v = draw("float64", L=20)
    out, lse = na.attention(q, k, v, score_mod=steep, return_lse=True)
    got = na.attention_backward(v[:, :, :20], q, k, v, out, lse, score_mod=steep)
    want = na.attention_backward(v[:, :, :20], q, k, v, out, lse, mask=np.arange(75) != 3)
    for a, b in zip(got[:3], want[:3], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_same_bits_for_any_number_of_threads():
    q, k, v = draw(H=4, Hkv=2, L=600, S=600)
    options = BOTH | {"mod_args": arguments(4)}
    results = []
    for threads in (1, 2):
        before = numba.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        out, lse = na.attention(q, k, v, **options, return_lse=True)
        grads = na.attention_backward(q, q, k, v, out, lse, **options, mod_grads="all")
        results.append([out, lse, *grads[:3], *grads.mod_args])
        numba.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_mod_grads_are_checked():
    q, k, v = draw(L=4, S=4)
    out, lse = na.attention(q, k, v, return_lse=True)
    docs = np.zeros(4, np.int32)

    def mod(score, batch, head, i, j, docs, scale):
        return score * scale + docs[i]

    def call(mod_grads, **options):
        return na.attention_backward(q, q, k, v, out, lse, mod_grads=mod_grads, **options)

    with pytest.raises(ValueError, match="mod_grads must be None without a score_mod"):
        call("all")
    options = {"score_mod": mod, "mod_args": (docs, 2.0)}
    with pytest.raises(ValueError, match="mod_grads must be 'all'"):
        call("some", **options)
    with pytest.raises(ValueError, match="mod_grads must lie between 0 and 1, got 2"):
        call([2], **options)
    with pytest.raises(TypeError, match=r"mod_args\[0\] must be an array of float32 or float64 to have a gradient"):
        call(0, **options)
    assert call("all", **options).mod_args == (None, None)
    assert call(None, **options).mod_args is None


# Layers and bridges


def test_layer():
    layer = na.MultiHeadAttention(16, 2, dtype=np.float64, rng=0)
    x = np.random.default_rng(0).standard_normal((2, 20, 16))
    options = BOTH | {"mod_args": arguments(2)}
    out, ctx = layer.forward(x, **options)
    np.testing.assert_array_equal(layer(x, **options), out)
    grads = layer.backward(np.ones_like(out), ctx, mod_grads=[0])
    slopes, table = arguments(2)
    step = np.zeros(2)
    step[1] = 1e-4
    sums = [layer(x, **BOTH, mod_args=(slopes.astype(float) + sign * step, table)).sum() for sign in (1, -1)]
    assert abs(grads.mod_args[0][1] - (sums[0] - sums[1]) / 2e-4) < 1e-5
    assert layer.backward(np.ones_like(out), ctx).mod_args is None


@pytest.mark.peer
def test_torch():
    torch = pytest.importorskip("torch")
    nat = pytest.importorskip("numba_attention.torch")
    q, k, v = (torch.tensor(x, requires_grad=True) for x in draw("float64", L=9, S=9, E=4))
    slopes, table = (torch.tensor(x.astype(float), requires_grad=True) for x in arguments(2))
    nat.attention(q, k, v, **BOTH, mod_args=(slopes, table)).square().sum().backward()
    assert torch.autograd.gradcheck(
        lambda q, slopes, table: nat.attention(q, k, v, **BOTH, mod_args=(slopes, table)), (q, slopes, table)
    )
    assert slopes.grad.shape == slopes.shape


@pytest.mark.peer
def test_jax():
    jax = pytest.importorskip("jax")
    naj = pytest.importorskip("numba_attention.jax")
    q, k, v = draw(L=9, S=9, E=4)
    slopes, table = (x.astype(np.float32) for x in arguments(2))

    def loss(q, slopes, table):
        return (naj.attention(q, k, v, **BOTH, mod_args=(slopes, table)) ** 2).sum()

    got = jax.jit(jax.grad(loss, (0, 1, 2)))(q, slopes, table)
    out, lse = na.attention(q, k, v, **BOTH, mod_args=(slopes, table), return_lse=True)
    want = na.attention_backward(2 * out, q, k, v, out, lse, **BOTH, mod_args=(slopes, table), mod_grads="all")
    for a, b in zip(got, (want.query, *want.mod_args), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    many = jax.vmap(lambda table: loss(q, slopes, table))(np.stack([table, 2 * table]))
    np.testing.assert_allclose(many[1], loss(q, slopes, 2 * table), rtol=1e-6)


# Arguments


def of_row(score, batch, head, i, j, x):
    return score + x[i]


def guarded(score, batch, head, i, j, x):
    return score + x[i] if i < 5 else score


def test_bare_indices_are_checked_before_the_call():
    q, k, v = draw(L=20)
    with pytest.raises(ValueError, match=r"mod_args\[0\] has 19 elements along axis 0, which is read at i = 0 .. 19"):
        na.attention(q, k, v, score_mod=of_row, mod_args=(np.zeros(19),))
    with pytest.raises(IndexError):
        na.attention(q, k, v, score_mod=of_row, mod_args=(np.zeros(19),), backend="reference")
    with pytest.raises(ValueError, match=r"read at i = 5 .. 24"):
        na.attention(q, k, v, score_mod=of_row, mod_args=(np.zeros(20),), query_offset=5)
    with pytest.raises(ValueError, match=r"read at i = -3 .. 16"):
        na.attention(q, k, v, score_mod=of_row, mod_args=(np.zeros(20),), query_offset=-3)
    got = na.attention(q, k, v, score_mod=guarded, mod_args=(np.ones(5),))  # read for some pairs only
    np.testing.assert_allclose(got, na.attention(q, k, v, score_mod=guarded, mod_args=(np.ones(20),)))


def test_arguments_are_checked():
    q, k, v = draw(L=4, S=4)

    def call(*mod_args, mod=of_row):
        return na.attention(q, k, v, score_mod=mod, mod_args=mod_args)

    with pytest.raises(TypeError, match=r"mod_args must be a tuple .*write mod_args=\(x,\)"):
        na.attention(q, k, v, score_mod=of_row, mod_args=np.zeros(4))
    with pytest.raises(TypeError, match=r"mod_args\[0\] must have dtype .* got float16; .*float32"):
        call(np.zeros(4, np.float16))
    with pytest.raises(TypeError, match=r"mod_args\[0\] must be a numpy.ndarray or a number, got builtins.str"):
        call("a")
    with pytest.raises(ValueError, match=r"mod_args\[0\] must not be empty"):
        call(np.zeros(0), mod=guarded)
    with pytest.raises(ValueError, match="mod_args must be empty without a score_mod or mask_mod"):
        na.attention(q, k, v, mod_args=(1,))
    with pytest.raises(TypeError, match=r"score_mod must be a Python function, plain or compiled by numba.njit"):
        call(np.zeros(4), mod="relu")
    with pytest.raises(ValueError, match=r"positions must lie within \+-2\*\*31"):
        na.attention(q, k, v, score_mod=guarded, mod_args=(np.zeros(9),), query_offset=2**31)


def test_strided_and_readonly_arguments():
    q, k, v = draw(L=20)
    x = np.random.default_rng(0).standard_normal(40)
    x.flags.writeable = False
    before = x.tobytes()
    got = na.attention(q, k, v, score_mod=of_row, mod_args=(x[::2],))
    np.testing.assert_array_equal(got, na.attention(q, k, v, score_mod=of_row, mod_args=(x[::2].copy(),)))
    assert x.tobytes() == before


# Compiling

FACTOR = 1.0


def of_global(score, batch, head, i, j):
    return score * FACTOR


def of_cell(factor):
    def mod(score, batch, head, i, j):
        return score * factor

    return mod


def test_numbers_outside_are_read_anew(monkeypatch):
    q, k, v = draw(L=20)
    np.testing.assert_array_equal(
        na.attention(q, k, v, score_mod=of_global), na.attention(q, k, v, score_mod=of_cell(1))
    )
    monkeypatch.setitem(globals(), "FACTOR", 0.5)
    want = na.attention(q, k, v, scale=0.125)
    for mod in (of_global, of_cell(0.5)):
        np.testing.assert_allclose(na.attention(q, k, v, score_mod=mod), want, rtol=1e-5, atol=1e-6)
    # 1, 1.0 and True are equal, and yet other programs.
    kinds = [na.attention(q, k, v, score_mod=of_cell(x)) for x in (1, 1.0, True, 0)]
    np.testing.assert_array_equal(kinds[0], kinds[1])
    np.testing.assert_array_equal(kinds[0], kinds[2])
    assert (kinds[3] != kinds[0]).any()


def test_helpers_outside_are_read_anew():

    def make(body):
        return function_of(f"def twice(x):\n    return {body}\n", "twice")

    mod = function_of("def mod(score, batch, head, i, j):\n    return twice(score)\n", twice=make("x + x"))
    q, k, v = draw(L=20)
    first = na.attention(q, k, v, score_mod=mod)
    mod.__globals__["twice"] = make("x * 0")
    second = na.attention(q, k, v, score_mod=mod)
    assert (first != second).any()
    np.testing.assert_allclose(second, np.broadcast_to(v.mean(2, keepdims=True), q.shape), atol=1e-6)


def test_defaults_are_read_anew():
    """A function that is defined again has the same code; a default or the code of one may be assigned anew."""
    q, k, v = draw(L=9, S=11)

    def scaled(factor):
        def mod(score, batch, head, i, j, by=factor):
            return score * by

        mod.derivative = lambda score, batch, head, i, j, by=factor: by
        return mod

    def check(mod, factor):
        out, lse = na.attention(q, k, v, score_mod=mod, return_lse=True)
        want, want_lse = na.attention(factor * q, k, v, return_lse=True, backend="reference")
        np.testing.assert_allclose(out, want, atol=1e-5)
        got = na.attention_backward(out, q, k, v, out, lse, score_mod=mod).key
        expected = na.attention_backward(out, factor * q, k, v, want, want_lse, backend="reference").key
        np.testing.assert_allclose(got, expected, atol=1e-4)

    for factor in (1.0, 2.0, 3.0):
        check(scaled(factor), factor)
    mod = scaled(2.0)
    mod.__defaults__ = mod.derivative.__defaults__ = (-2.0,)
    check(mod, -2.0)

    def helper(x):
        return x * 2.0

    def through(score, batch, head, i, j):
        return helper(score)

    check(through, 2.0)
    helper.__code__ = (lambda x: x * 5.0).__code__
    check(through, 5.0)


def test_zeros_outside_have_signs(monkeypatch):
    q, k, v = draw(L=9, S=11)
    for kind in (float, np.float32, np.float16):
        for sign in (1, -1):
            monkeypatch.setattr(sys.modules[__name__], "_zero", kind(sign * 0.0), raising=False)
            got = na.attention(q, k, v, score_mod=lambda s, b, h, i, j: s if 1.0 / _zero > 0 else -s)  # noqa: F821
            np.testing.assert_allclose(got, na.attention(sign * q, k, v, backend="reference"), atol=1e-5)


def test_found_on_disk_by_another_process(tmp_path):
    """The same text in another file: what is compiled does not depend on where the function is."""
    code = """
import math, time, sys
import numpy as np, numba_attention as na
from numba_attention.mods.compiled import kernel_of
from numba_attention.mods.rules import describe, find

def mod(score, batch, head, i, j, table):
    return {cap} * math.tanh(score / {cap}) + table[i - j]

rule = find("score_mod", mod, describe((np.zeros(3),)), (np.zeros(3),))
kernel = kernel_of(rule, "score", rule.program, 32, 64)
kernel.address
print(kernel.origin)
"""
    origins = []
    for n, cap in enumerate((5.0, 5.0, 6.0)):
        file = tmp_path / f"mod{n}.py"
        file.write_text("\n" * n + code.format(cap=cap))
        environment = {"NUMBA_ATTENTION_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, str(file)], capture_output=True, text=True, env=os.environ | environment, check=True
        )
        origins.append(done.stdout.strip())
    assert origins == ["compiled", "loaded", "compiled"]


def test_threads_that_compile_at_once():
    q, k, v = draw(L=20)
    results, errors = {}, []

    def work(n):
        try:
            results[n] = na.attention(q, k, v, score_mod=of_cell(n % 4 + 0.125))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for n in range(12):
        np.testing.assert_array_equal(results[n], na.attention(q, k, v, score_mod=of_cell(n % 4 + 0.125)))


def test_threads_that_call_at_once():
    """One rule with different closures, gradients of arguments, block masks of one function: each its own result."""
    q, k, v = draw(L=300, S=300)
    slopes, table = arguments(2)

    def call(n):
        options = {"mask_mod": visible, "score_mod": positional if n % 2 else of_cell(n + 0.5)}
        options["mod_args"] = (slopes * (1 + n % 3), table)
        if not n % 2:
            options = {"score_mod": options["score_mod"]}
        out, lse = na.attention(q, k, v, **options, return_lse=True)
        grads = na.attention_backward(out, q, k, v, out, lse, **options, mod_grads="all")
        weights = na.attention_weights(q, k, rows=[n], **options)
        return [out, lse, *grads[:3], *grads.mod_args, weights]

    want = [call(n) for n in range(6)]
    got, errors = {}, []

    def work(thread):
        try:
            for n in range(6):
                got[thread, n] = call((n + thread) % 6)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    for (thread, n), result in got.items():
        for a, b in zip(result, want[(n + thread) % 6], strict=True):
            np.testing.assert_array_equal(a, b)


# Which function it is


def module_of(path, text, name="rules"):
    """Write a module and import it, whatever was imported of this name before."""
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def factor_of(module, q, k, v):
    """By which factor the rule of a module multiplies the scores, of 1 to 8 and their opposites."""
    got = na.attention(q, k, v, score_mod=module.mod)
    near = [x for x in (*range(1, 9), *range(-8, 0)) if abs(got - na.attention(q * x, k, v)).max() < 1e-5]
    return near[0] if len(near) == 1 else near


@pytest.mark.parametrize("body", ["score * FACTOR", "helper(score)"])
def test_equal_code_with_other_globals(tmp_path, body):
    """Two files of equal text but for a number: code objects compare equal, and do not know their file."""
    text = f"def helper(x):\n    return x * FACTOR\n\ndef mod(score, batch, head, i, j):\n    return {body}\n\n"
    text += "FACTOR = %s\n"
    q, k, v = draw(L=20)
    modules = [module_of(tmp_path / f"{name}.py", text % factor) for name, factor in (("a", 1), ("b", -3), ("c", 5))]
    assert modules[0].mod.__code__ == modules[1].mod.__code__
    assert [factor_of(x, q, k, v) for x in (*modules, modules[0])] == [1, -3, 5, 1]


def test_a_module_that_was_edited_and_imported_again(tmp_path):
    text = "def mod(score, batch, head, i, j):\n    return score * %s\n"
    q, k, v = draw(L=20)
    for n, source in enumerate([text % 2, text % 5, "\n\n" + text % 6]):
        module = module_of(tmp_path / "rules.py", source)
        os.utime(tmp_path / "rules.py", (n, n))
        assert factor_of(module, q, k, v) == (2, 5, 6)[n]
    of_mask = "def mod(batch, head, i, j):\n    return i >= j - %s\n"
    for n in range(2):
        module = module_of(tmp_path / "masks.py", of_mask % n)
        os.utime(tmp_path / "masks.py", (n, n))
        assert na.BlockMask(module.mod, (4, 4)).to_dense().sum() == (10, 13)[n]


def test_a_module_that_was_edited_and_not_imported_again(tmp_path):
    q, k, v = draw(L=20)
    text = "def mod(score, batch, head, i, j):\n    return 1.0 * score * %s\n"  # no rule that another test has made
    module = module_of(tmp_path / "rules.py", text % 2)
    (tmp_path / "rules.py").write_text(text % 7)
    for mod in (module.mod, function_of("def mod(s, b, h, i, j):\n    return other(s, b, h, i, j)", other=module.mod)):
        with pytest.raises(TypeError, match=r"this is not what Python runs under that name(.*\n)*.*rules.py., line 1"):
            na.attention(q, k, v, score_mod=mod)
    module = module_of(tmp_path / "gone.py", text % 2)
    na.attention(q, k, v, score_mod=module.mod, scale=0.5)
    (tmp_path / "gone.py").unlink()
    assert factor_of(module, q, k, v) == 2


def test_the_sign_of_zero_in_a_mask():
    q, k, v = draw(L=300, S=300)  # enough pairs that a block mask is made and kept

    def mask(batch, head, i, j, x):
        return 1.0 / x > 0 or i == j

    full, diagonal = na.attention(q, k, v), na.attention(q, k, v, mask_mod=lambda batch, head, i, j: i == j)
    for x in (0.0, -0.0, 0.0, np.float32(-0.0)):
        want = full if not np.signbit(x) else diagonal
        np.testing.assert_allclose(na.attention(q, k, v, mask_mod=mask, mod_args=(x,)), want, atol=1e-5)


def test_functions_that_are_defined_again_and_again_are_one_rule():
    def make(factor):
        def inner(x):
            return x * factor

        def mod(score, batch, head, i, j):
            return inner(score)

        return mod

    found = {rules.find("score_mod", make(factor), (), ()) for factor in (0.5, 2.0) * 20}
    assert len(found) == 2
    assert max(map(len, rules._reads._values.values())) < 50


def test_names_outside_that_become_no_numbers(monkeypatch):
    q, k, v = draw(L=20)
    na.attention(q, k, v, score_mod=of_global)
    for value in ([1], {}, np.ones(3)):
        monkeypatch.setitem(globals(), "FACTOR", value)
        for _ in range(2):
            with pytest.raises(TypeError, match=r"of_global: .*\n.*line"):
                na.attention(q, k, v, score_mod=of_global)
    monkeypatch.setitem(globals(), "FACTOR", np.array(0.5))
    for _ in range(2):
        got = na.attention(q, k, v, score_mod=of_global)
        np.testing.assert_allclose(got, na.attention(q, k, v, scale=0.125), rtol=1e-5, atol=1e-6)
