"""`merge_attention`: exact over disjoint keys, and a monoid."""

import itertools

import ml_dtypes
import numpy as np
import pytest

import numba_attention as na
from cases import DTYPES, Case, assert_close, grad_tolerance, oracle_backward, tolerance

CUTS = [(0, 30), (0, 1, 30), (0, 10, 20, 30), (0, 0, 17, 30, 30)]


def parts_of(query, key, value, cuts, **kwargs):
    return [
        na.attention(query, key[..., a:b, :], value[..., a:b, :], return_lse=True, **kwargs)
        for a, b in itertools.pairwise(cuts)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("stacked", [False, True])
def test_parts_make_the_whole(dtype, cuts, stacked):
    query, key, value = Case(5, 30).arrays(dtype)
    outs, lses = zip(*parts_of(query, key, value, cuts), strict=True)
    if stacked:
        outs, lses = np.stack(outs), np.stack(lses)
    out, lse = na.merge_attention(outs, lses)
    want, want_lse = na.attention(query, key, value, return_lse=True)
    assert out.dtype == want.dtype
    assert lse.dtype == want_lse.dtype
    of_out, of_lse = tolerance(dtype)
    assert_close(out, want, of_out)
    assert_close(lse, want_lse, of_lse, offset=1)


def test_sink_in_one_part():
    query, key, value = Case(5, 30).arrays("float64")
    sinks = np.array([1.0, -1.0])
    first = na.attention(query, key[..., :9, :], value[..., :9, :], sinks=sinks, return_lse=True)
    second = na.attention(query, key[..., 9:, :], value[..., 9:, :], return_lse=True)
    out, lse = na.merge_attention(*zip(first, second, strict=True))
    want, want_lse = na.attention(query, key, value, sinks=sinks, return_lse=True)
    np.testing.assert_allclose(out, want, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-13)


def some(seed, shape=(2, 4, 3), dtype=np.float64):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape).astype(dtype), rng.standard_normal(shape[:-1])


def test_associative():
    a, b, c = some(0), some(1), some(2)
    left = na.merge_attention(*zip(na.merge_attention(*zip(a, b, strict=True)), c, strict=True))
    right = na.merge_attention(*zip(a, na.merge_attention(*zip(b, c, strict=True)), strict=True))
    at_once = na.merge_attention(*zip(a, b, c, strict=True))
    for x, y, z in zip(left, right, at_once, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(x, z, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("rubbish", [0.0, 5.0, np.nan, np.inf])
def test_identity(rubbish):
    out, lse = some(0)
    nothing = np.full_like(out, rubbish), np.full_like(lse, -np.inf)
    for parts in ([(out, lse), nothing], [nothing, (out, lse), nothing]):
        got, got_lse = na.merge_attention(*zip(*parts, strict=True))
        np.testing.assert_array_equal(got, out)
        np.testing.assert_array_equal(got_lse, lse)


def test_one_part_is_itself():
    out, lse = some(0, dtype=np.float16)
    got, got_lse = na.merge_attention([out], [lse])
    np.testing.assert_array_equal(got, out)
    np.testing.assert_array_equal(got_lse, lse)


def test_nothing_at_all():
    out, lse = na.merge_attention(np.full((3, 4, 2), np.nan), np.full((3, 4), -np.inf))
    assert not out.any()
    assert np.all(lse == -np.inf)


def test_far_apart():
    outs = np.array([[[1.0]], [[2.0]]])
    out, lse = na.merge_attention(outs, np.array([[1e5], [-1e5]]))
    assert out == 1
    assert lse == 1e5
    out, lse = na.merge_attention(outs, np.array([[-1e5], [-1e5]]))
    assert out == 1.5
    assert lse == pytest.approx(-1e5 + np.log(2), abs=1e-9)


def test_nan_stays_in_its_row():
    (a, la), (b, lb) = some(0), some(1)
    a[0, 1] = np.nan
    lb[1, 2] = np.nan
    out, lse = na.merge_attention([a, b], [la, lb])
    assert np.isnan(out[0, 1]).all()
    assert np.isnan(out[1, 2]).all()
    assert np.isnan(lse[1, 2])
    assert np.isnan(out).sum() == 2 * 3
    assert np.isnan(lse).sum() == 1


def test_nan_under_a_weight_that_underflows():
    out, _ = na.merge_attention(np.array([[[1.0]], [[np.nan]]]), np.array([[0.0], [-5000.0]]))
    assert np.isnan(out)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_accumulates_in_single(dtype):
    """A thousand equal parts: added up in half precision they would stop growing."""
    outs = np.ones((1000, 1, 1), dtype)
    out, lse = na.merge_attention(outs, np.zeros((1000, 1), np.float32))
    assert out.dtype == dtype
    assert lse.dtype == np.float32
    assert float(out[0, 0]) == 1
    assert lse[0] == pytest.approx(np.log(1000), rel=1e-6)


@pytest.mark.parametrize(
    ("of_outs", "of_lses"),
    [("float32", "float32"), ("float32", "float64"), ("float64", "float64"), ("float64", "float32")],
)
def test_dtypes(of_outs, of_lses):
    outs, lses = zip(*(some(seed) for seed in range(3)), strict=True)
    want = na.merge_attention(outs, lses)
    got = na.merge_attention([x.astype(of_outs) for x in outs], [x.astype(of_lses) for x in lses])
    assert [str(x.dtype) for x in got] == [of_outs, of_lses]
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-6)


def test_any_iterable_and_any_strides():
    outs, lses = zip(*(some(seed) for seed in range(3)), strict=True)
    want = na.merge_attention(outs, lses)
    flipped = [x[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1] for x in outs]
    for got in (
        na.merge_attention(iter(outs), iter(lses)),
        na.merge_attention(flipped, [np.asfortranarray(x) for x in lses]),
        na.merge_attention(np.stack(outs, -1).transpose(3, 0, 1, 2), lses),
    ):
        for x, y in zip(got, want, strict=True):
            np.testing.assert_array_equal(x, y)


def test_inputs_stay_as_they_are():
    outs, lses = (np.stack(x) for x in zip(*(some(seed) for seed in range(3)), strict=True))
    lses[0, 0] = -np.inf
    before = outs.tobytes(), lses.tobytes()
    outs.flags.writeable = lses.flags.writeable = False
    na.merge_attention(outs, lses)
    assert (outs.tobytes(), lses.tobytes()) == before


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3), (2, 4, 0)])
def test_empty(shape):
    out, lse = na.merge_attention([np.ones(shape)] * 2, [np.ones(shape[:-1])] * 2)
    assert out.shape == shape
    assert lse.shape == shape[:-1]


# The gradients.


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_gradients_against_autograd(torch, with_lse, n):
    rng = np.random.default_rng(0)
    outs, lses = rng.standard_normal((n, 2, 7, 3)), 3 * rng.standard_normal((n, 2, 7))
    grad_out, grad_lse = rng.standard_normal((2, 7, 3)), rng.standard_normal((2, 7)) if with_lse else None
    tensors = [torch.tensor(x, requires_grad=True) for x in (outs, lses)]
    lse = torch.logsumexp(tensors[1], 0)
    out = (torch.exp(tensors[1] - lse)[..., None] * tensors[0]).sum(0)
    loss = (out * torch.tensor(grad_out)).sum()
    if with_lse:
        loss = loss + (lse * torch.tensor(grad_lse)).sum()
    want = torch.autograd.grad(loss, tensors)
    got = na.merge_attention_backward(grad_out, grad_lse, outs, lses)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.stack(a), b.numpy(), atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_gradients_of_parts_are_those_of_the_whole(dtype, cuts):
    case = Case(5, 30)
    query, key, value = case.arrays(dtype)
    parts = parts_of(query, key, value, cuts)
    outs, lses = zip(*parts, strict=True)
    out, _ = na.merge_attention(outs, lses)
    rng = np.random.default_rng(1)
    grad_out, grad_lse = rng.standard_normal(out.shape).astype(out.dtype), rng.standard_normal(lses[0].shape)
    grad_lse = grad_lse.astype(lses[0].dtype)
    grad_outs, grad_lses = na.merge_attention_backward(grad_out, grad_lse, outs, lses)
    assert all(g.dtype == out.dtype for g in grad_outs)
    assert all(g.dtype == lses[0].dtype for g in grad_lses)
    grads = [
        na.attention_backward(g, query, key[..., a:b, :], value[..., a:b, :], *part, grad_lse=h)
        for (a, b), part, g, h in zip(itertools.pairwise(cuts), parts, grad_outs, grad_lses, strict=True)
    ]
    want = oracle_backward(grad_out, query, key, value, grad_lse)
    wide = sum(g.query.astype(np.float64) for g in grads)
    limit = 4 * grad_tolerance(dtype)  # of a gradient that went through as many roundings
    assert_close(wide, want.query, limit, offset=1)
    assert_close(np.concatenate([g.key for g in grads], -2), want.key, limit, offset=1)
    assert_close(np.concatenate([g.value for g in grads], -2), want.value, limit, offset=1)


def test_gradients_of_empty_parts_are_0():
    outs, lses = np.stack([some(0)[0], some(1)[0]]), np.stack([some(0)[1], np.full((2, 4), -np.inf)])
    outs[1] = np.nan
    grad_outs, grad_lses = na.merge_attention_backward(np.ones((2, 4, 3)), np.ones((2, 4)), outs, lses)
    np.testing.assert_array_equal(grad_outs[0], 1)
    np.testing.assert_array_equal(grad_lses[0], 1)
    assert not grad_outs[1].any()
    assert not grad_lses[1].any()
    nothing = np.full((2, 2, 4), -np.inf)
    for part in itertools.chain(*na.merge_attention_backward(np.ones((2, 4, 3)), None, outs, nothing)):
        assert not part.any()


def test_gradients_are_checked():
    outs, lses = np.ones((2, 5, 3), np.float32), np.ones((2, 5), np.float32)
    good = outs[0]
    with pytest.raises(TypeError, match=r"grad_out .*float32.*float64"):
        na.merge_attention_backward(good.astype(np.float64), None, outs, lses)
    with pytest.raises(ValueError, match=r"grad_out .*\(5, 3\).*\(4, 3\)"):
        na.merge_attention_backward(good[1:], None, outs, lses)
    with pytest.raises(ValueError, match=r"grad_lse .*\(5,\)"):
        na.merge_attention_backward(good, np.ones(4, np.float32), outs, lses)
    with pytest.raises(TypeError, match=r"grad_lse .*numpy.ndarray"):
        na.merge_attention_backward(good, [1.0] * 5, outs, lses)
    with pytest.raises(ValueError, match="outs and lses"):
        na.merge_attention_backward(good, None, outs, lses[:1])


@pytest.mark.parametrize("H", [3, 7])
def test_packed_results(H):
    """Two parts of the keys of each of three packed sequences; with 7 heads there are as many heads as tokens."""
    rng = np.random.default_rng(0)
    starts, q = [0, 2, 2, 7], rng.standard_normal((7, H, 8))
    k, v = rng.standard_normal((2, 12, H, 8))
    ends = [0, 5, 8, 12]
    want, want_lse = na.attention_varlen(q, k, v, starts, ends, return_lse=True)
    parts = [
        na.attention_varlen(q, k, v, starts, ends, return_lse=True, mask=np.tile(half, (H, 7, 1)))
        for half in (np.arange(12) % 2 == 0, np.arange(12) % 2 == 1)
    ]
    outs, lses = zip(*parts, strict=True)
    named = {"packed": True} if H == 7 else {}
    for form in ((outs, lses), (np.stack(outs), np.stack(lses))):
        out, lse = na.merge_attention(*form, **named)
        np.testing.assert_allclose(out, want, atol=1e-14)
        np.testing.assert_allclose(lse, want_lse, atol=1e-14)
    # Gradients as those of the same numbers with heads first.
    grad_out, grad_lse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    got = na.merge_attention_backward(grad_out, grad_lse, outs, lses, **named)
    dense = na.merge_attention_backward(grad_out.swapaxes(0, 1), grad_lse, [x.swapaxes(0, 1) for x in outs], lses)
    for n in range(2):
        np.testing.assert_allclose(got[0][n], dense[0][n].swapaxes(0, 1), atol=1e-14)
        np.testing.assert_allclose(got[1][n], dense[1][n], atol=1e-14)


def test_packed_is_checked():
    with pytest.raises(ValueError, match=r"\(T, H, Ev\) and \(H, T\)"):
        na.merge_attention(np.zeros((2, 3, 4, 5)), np.zeros((2, 3, 4)), packed=True)
    with pytest.raises(ValueError, match="lses must hold"):
        na.merge_attention(np.zeros((2, 3, 4, 5)), np.zeros((2, 4, 3)), packed=False)
