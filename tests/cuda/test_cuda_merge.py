"""Results on a GPU are merged there: formulas in float64 on plain arrays, and what is empty as on the host."""

import numpy as np
import pytest

import numba_attention as na
from cases import DTYPES
from device import CupyArray, NumbaArray, Tensor, install
from emulator import emulated

BOUNDS = {"float32": 3e-6, "float64": 1e-14, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.fixture
def gpu(monkeypatch):
    install(monkeypatch)
    with emulated(monkeypatch) as driver:
        yield driver


def textbook(outs, lses):
    """In float64, of parts on the host."""
    outs, lses = (np.array([np.asarray(x, np.float64) for x in stack]) for stack in (outs, lses))
    weights = np.exp(lses - lses.max(0)) / np.exp(lses - lses.max(0)).sum(0)
    return (weights[..., None] * outs).sum(0), lses.max(0) + np.log(np.exp(lses - lses.max(0)).sum(0))


def some(n, shape, dtype, lse_dtype=None, seed=0):
    rng = np.random.default_rng(seed)
    lse_dtype = lse_dtype or (np.float64 if dtype == "float64" else np.float32)
    outs = [rng.standard_normal(shape).astype(DTYPES[dtype]) for _ in range(n)]
    return outs, [(8 * rng.standard_normal(shape[:-1])).astype(lse_dtype) for _ in range(n)]


def on_host(x):
    return np.array(x.array)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("Ev", [64, 33, 200])
def test_formula(gpu, dtype, n, Ev):
    outs, lses = some(n, (2, 3, 5, Ev), dtype)
    want, want_lse = textbook(outs, lses)
    for give in (NumbaArray, Tensor):
        out, lse = na.merge_attention([give(x) for x in outs], tuple(map(give, lses)))
        assert type(out) is type(lse) is give
        assert on_host(out).dtype == outs[0].dtype
        assert on_host(lse).dtype == lses[0].dtype
        np.testing.assert_allclose(on_host(out).astype(float), want, atol=4 * BOUNDS[dtype], rtol=BOUNDS[dtype])
        np.testing.assert_allclose(on_host(lse), want_lse, atol=2e-5 if dtype != "float64" else 1e-13)
    stacked = na.merge_attention(NumbaArray(np.stack(outs)), NumbaArray(np.stack(lses)))
    np.testing.assert_array_equal(on_host(stacked[0]), on_host(out))
    assert {c.task for c in gpu.configs.values()} == {"merge"}
    assert all(kind == "write" and size <= 72 * n for kind, size, _ in gpu.copies), "only the table of parts"
    assert len(gpu.copies) == (0 if n < 3 else 2), "of separate arrays, and of more than two"


@pytest.mark.parametrize(("dtype", "lse_dtype"), [("float16", np.float64), ("bfloat16", np.float64),
                                                  ("float32", np.float64), ("float64", np.float32)])  # fmt: skip
def test_lse_of_another_type(gpu, dtype, lse_dtype):
    outs, lses = some(3, (4, 5, 8), dtype, lse_dtype)
    got, want = na.merge_attention(list(map(Tensor, outs)), list(map(Tensor, lses))), na.merge_attention(outs, lses)
    for a, b in zip(got, want, strict=True):
        assert on_host(a).dtype == b.dtype
        np.testing.assert_allclose(on_host(a).astype(float), b.astype(float), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_empty_or_not_finite_is_as_on_the_host(gpu, dtype):
    outs, lses = some(3, (1, 12, 8), dtype)
    inf, nan = np.inf, np.nan
    for row, values in enumerate((
        (-inf, -inf, -inf), (-inf, 1, 2), (1, -inf, -inf), (nan, 1, -inf), (inf, 1, 2), (1e4, -1e4, 0), (-1e30, 1, 2),
    )):  # fmt: skip
        for part, x in enumerate(values):
            lses[part][0, row] = x
            if x == -inf:
                outs[part][0, row] = nan  # an empty part adds nothing, whatever it holds
    outs[1][0, 9], outs[2][0, 10] = nan, inf
    outs[0][0, 11] = outs[1][0, 11] = outs[2][0, 11] = 60000 if dtype == "float16" else 1e30
    want, want_lse = na.merge_attention(outs, lses)
    got, lse = na.merge_attention(list(map(CupyArray, outs)), list(map(CupyArray, lses)))
    np.testing.assert_allclose(on_host(lse), want_lse, rtol=1e-5)
    np.testing.assert_allclose(
        on_host(got).astype(float), want.astype(float), rtol=BOUNDS[dtype], atol=4 * BOUNDS[dtype]
    )
    assert not on_host(got)[0, 0].any()


def test_any_strides_and_packed_sequences(gpu):
    """Rows in as many pieces as there are axes are made contiguous first."""
    outs, lses = some(2, (2, 3, 2, 4, 8), "float32")
    want = na.merge_attention(outs, lses)

    def turned(x, axes):
        fake = Tensor(np.ascontiguousarray(x.transpose(axes)))
        return Tensor.of(fake.header.transpose(np.argsort(axes)))

    views = [turned(outs[0], (4, 1, 3, 0, 2)), Tensor.of(Tensor(outs[1][:, ::-1].copy()).header[:, ::-1])]
    got = na.merge_attention(views, [turned(lses[0], (3, 1, 2, 0)), Tensor(lses[1])])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(on_host(a), b, rtol=1e-5, atol=1e-6)
    assert {c.task for c in gpu.configs.values()} == {"merge", "reduce"}
    outs, lses = some(3, (11, 2, 16), "bfloat16")
    lses = [np.ascontiguousarray(x.T) for x in lses]
    want = na.merge_attention(outs, lses)
    got = na.merge_attention(list(map(Tensor, outs)), list(map(Tensor, lses)))
    assert on_host(got[1]).shape == (2, 11)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(on_host(a).astype(float), b.astype(float), rtol=8e-3, atol=1e-5)


def test_some_parts_may_be_on_the_host(gpu):
    outs, lses = some(2, (3, 4, 8), "float32")
    want = na.merge_attention(outs, lses)
    got = na.merge_attention([outs[0], Tensor(outs[1])], [Tensor(lses[0]), lses[1]])
    for a, b in zip(got, want, strict=True):
        assert type(a) is Tensor
        np.testing.assert_allclose(on_host(a), b, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"outs\[0\] is on GPU 0, outs\[1\] is on GPU 1"):
        na.merge_attention([Tensor(x, n) for n, x in enumerate(outs)], list(map(Tensor, lses)))
    with pytest.raises(TypeError, match=r"outs\[1\] must be a numpy.ndarray or an array on a GPU, got builtins.str"):
        na.merge_attention([Tensor(outs[0]), "x"], list(map(Tensor, lses)))
    with pytest.raises(ValueError, match="as many, got 2 outs and 1 lses"):
        na.merge_attention(list(map(Tensor, outs)), [Tensor(lses[0])])
    with pytest.raises(ValueError, match="share one shape"):
        na.merge_attention([Tensor(outs[0]), Tensor(outs[1][:2])], list(map(Tensor, lses)))
    with pytest.raises(ValueError, match="at least one"):
        na.merge_attention([], [Tensor(lses[0])])


def test_no_rows(gpu):
    outs, lses = some(2, (2, 0, 8), "float32")
    out, lse = na.merge_attention(list(map(NumbaArray, outs)), list(map(NumbaArray, lses)))
    assert (out.shape, lse.shape) == ((2, 0, 8), (2, 0))
    assert not gpu.launches


def test_out_of_a_rolling_cache(gpu):
    """Two parts, the first keys and the newest, are merged into the caller's array."""
    rng = np.random.default_rng(1)
    host = na.KVCache(1, 2, 6, 16, window=4, keep_first=2)
    cache = na.KVCache.from_arrays(*(Tensor(np.zeros((1, 2, 6, 16), np.float32)) for _ in range(2)), 0,
                                   window=4, keep_first=2)  # fmt: skip
    key, value = (rng.standard_normal((1, 2, 9, 16), dtype=np.float32) for _ in range(2))
    host.append(key, value)
    cache.append(Tensor(key), Tensor(value))
    query = rng.standard_normal((1, 2, 1, 16), dtype=np.float32)
    out = Tensor(np.zeros_like(query))
    assert na.attention_decode(Tensor(query), cache, alibi_slopes=[0.3, 0.1], out=out) is out
    want = na.attention_decode(query, host, alibi_slopes=[0.3, 0.1], backend="reference")
    np.testing.assert_allclose(on_host(out), want, atol=1e-6)
    assert not any(kind == "read" for kind, *_ in gpu.copies)


def textbook_gradients(grad_out, grad_lse, outs, lses):
    """In float64: each part has its share of the gradient; its lse gains what the part has more than the whole."""
    outs, lses = (np.array([np.asarray(x, np.float64) for x in stack]) for stack in (outs, lses))
    out, lse = textbook(outs, lses)
    shares, grad = np.exp(lses - lse), np.asarray(grad_out, np.float64)
    of_lse = 0 if grad_lse is None else np.asarray(grad_lse, np.float64)
    return shares[..., None] * grad, shares * ((grad * (outs - out)).sum(-1) + of_lse)


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "Ev"), [(1, 64), (2, 33), (2, 300), (5, 200)])
def test_gradients(gpu, dtype, n, Ev, with_lse):
    outs, lses = some(n, (2, 3, 5, Ev), dtype)
    (grad_out,), (grad_lse,) = some(1, (2, 3, 5, Ev), dtype, seed=1)
    grad_lse = grad_lse if with_lse else None
    want, want_lse = textbook_gradients(grad_out, grad_lse, outs, lses)
    of_lse = None if grad_lse is None else Tensor(grad_lse)
    lists = [Tensor(x) for x in outs], [Tensor(x) for x in lses]
    stacks = [Tensor(np.stack(x)) for x in (outs, lses)]
    for given in (lists, stacks):
        got, got_lse = na.merge_attention_backward(Tensor(grad_out), of_lse, *given)
        assert type(got) is type(got_lse) is list
        for x, right, part in zip(got, want, outs, strict=True):
            assert on_host(x).dtype == part.dtype
            np.testing.assert_allclose(on_host(x).astype(float), right, atol=4 * BOUNDS[dtype], rtol=BOUNDS[dtype])
        for x, right, log in zip(got_lse, want_lse, lses, strict=True):
            assert on_host(x).dtype == log.dtype
            np.testing.assert_allclose(on_host(x), right, atol=2e-12 if dtype == "float64" else 2e-4)
    assert {c.task for c in gpu.configs.values()} == {"merge_backward"}
    assert all(kind == "write" and size <= 144 * n for kind, size, _ in gpu.copies), "only the table of parts"


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_what_is_empty_or_not_finite_are_as_on_the_host(gpu, dtype):
    outs, lses = some(3, (1, 9, 8), dtype)
    (grad_out,), (grad_lse,) = some(1, (1, 9, 8), dtype, seed=1)
    inf, nan = np.inf, np.nan
    for row, values in enumerate(
        ((-inf, -inf, -inf), (-inf, 1, 2), (1, -inf, -inf), (nan, 1, -inf), (1e4, -1e4, 0), (-1e30, 1, 2))
    ):
        for part, x in enumerate(values):
            lses[part][0, row] = x
            if x == -inf:
                outs[part][0, row] = nan
    outs[1][0, 7], grad_out[0, 8] = nan, inf
    want = na.merge_attention_backward(grad_out, grad_lse, outs, lses)
    got = na.merge_attention_backward(
        CupyArray(grad_out), CupyArray(grad_lse), [CupyArray(x) for x in outs], [CupyArray(x) for x in lses]
    )
    for x, y in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        limit = 1e-4 if x.shape == lses[0].shape and dtype != "float64" else BOUNDS[dtype]
        np.testing.assert_allclose(on_host(x).astype(float), y.astype(float), rtol=limit, atol=4 * limit)


def test_gradients_of_packed_sequences_and_any_strides(gpu):
    outs, lses = some(3, (7, 4, 16), "float32")
    (grad_out,), (grad_lse,) = some(1, (7, 4, 16), "float32", seed=1)
    packed = [np.ascontiguousarray(x.T) for x in lses]
    want = na.merge_attention_backward(grad_out, np.ascontiguousarray(grad_lse.T), outs, packed)
    got = na.merge_attention_backward(
        Tensor(grad_out), Tensor(np.ascontiguousarray(grad_lse.T)), list(map(Tensor, outs)), list(map(Tensor, packed))
    )
    turned = [Tensor.of(Tensor(np.ascontiguousarray(x.swapaxes(0, 1))).header.swapaxes(0, 1)) for x in outs]
    again = na.merge_attention_backward(Tensor(grad_out), Tensor(np.ascontiguousarray(grad_lse.T)), turned,
                                        list(map(Tensor, packed)))  # fmt: skip
    for found in (got, again):
        for x, y in zip([*found[0], *found[1]], [*want[0], *want[1]], strict=True):
            assert on_host(x).shape == y.shape
            np.testing.assert_allclose(on_host(x), y, atol=1e-5)
    outs, lses = some(2, (2, 3, 2, 4, 8), "float32")
    (grad_out,), (grad_lse,) = some(1, (2, 3, 2, 4, 8), "float32", seed=1)

    def apart(x):  # no axis of rows follows another
        wide = Tensor(np.zeros(tuple(n + 1 for n in x.shape), x.dtype))
        wide.array[tuple(slice(n) for n in x.shape)] = x
        return Tensor.of(wide.header[tuple(slice(n) for n in x.shape)])

    want = na.merge_attention_backward(grad_out, grad_lse, outs, lses)
    got = na.merge_attention_backward(apart(grad_out), apart(grad_lse), list(map(apart, outs)), list(map(apart, lses)))
    for x, y in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        np.testing.assert_allclose(on_host(x), y, atol=1e-5)


def test_gradients_without_features(gpu):
    """Of lse there is one all the same."""
    outs, lses = [np.zeros((2, 3, 0), np.float32)] * 2, some(2, (2, 3, 1), "float32")[1]
    grad_lse = np.ones((2, 3), np.float32)
    _, got = na.merge_attention_backward(
        Tensor(outs[0]), Tensor(grad_lse), list(map(Tensor, outs)), list(map(Tensor, lses))
    )
    for x, y in zip(got, np.exp(lses) / np.exp(lses).sum(0), strict=True):
        np.testing.assert_allclose(on_host(x), y, rtol=1e-5)
