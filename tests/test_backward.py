"""The backward pass of every case against the float64 reference, and the reference against autograd and differences."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import check_grad

import numba_attention as na
from cases import CASES, SOME, Case, assert_close, check_backward, grad_tolerance, graded, oracle_backward
from numba_attention.backends import cpu_backward

LONG = [
    # Several groups of tiles, in items of their own and one after the other, and biases that heads or rows share.
    Case(1100, 300, 20, H=1, batch=()),
    Case(1100, 300, 20, H=2, Hkv=1, batch=(2,), options=("causal",)),
    Case(1100, 200, 16, H=17, batch=(), options=("window",)),
    Case(1100, 200, 16, H=1, batch=(20,)),
    Case(1100, 130, 8, 20, H=6, Hkv=2, batch=(), options=("bias of keys", "sinks")),
    Case(1100, 130, 8, H=3, batch=(2,), options=("mask of keys", "bias of rows")),
    Case(1100, 130, 8, H=6, Hkv=2, batch=(2,), options=("bias reversed", "softcap", "causal")),
    Case(1100, 130, 8, H=4, Hkv=1, batch=(2,), options=("bias transposed",)),
    Case(70, 1500, 8, H=2, batch=(), options=("bottom-right", "alibi")),
]


def given_and_gradients(case, dtype="float32", backend="cpu", **more):
    arrays, kwargs = case.arrays(dtype), case.kwargs() | more
    out, lse = na.attention(*arrays, **kwargs, return_lse=True, backend=backend)
    grad_out = np.random.default_rng(1).standard_normal(out.shape).astype(out.dtype)
    return (grad_out, *arrays, out, lse), kwargs, na.attention_backward(grad_out, *arrays, out, lse, **kwargs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case):
    check_backward(case, "float32")


@pytest.mark.parametrize(("case", "dtype"), graded(SOME, ["float64", "float16", "bfloat16"]))
def test_other_dtypes(case, dtype):
    check_backward(case, dtype)


@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_long(case, dtype):
    check_backward(case, dtype)


# The reference itself.


def by_autograd(torch, grad_out, grad_lse, query, key, value, *, bias=None, sinks=None, mask=None, **options):
    """Gradients of the formula, spelled out in PyTorch."""
    tensors = [None if x is None else torch.tensor(x, requires_grad=True) for x in (query, key, value, bias, sinks)]
    q, k, v, b, s = tensors
    H, L = q.shape[-3:-1]
    k, v = (x.repeat_interleave(H // x.shape[-3], -3) for x in (k, v))
    scores = options.get("scale", q.shape[-1] ** -0.5) * q @ k.mT
    if "softcap" in options:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    distance = np.arange(L)[:, None] + options.get("query_offset", 0) - np.arange(k.shape[-2])
    if "alibi_slopes" in options:
        slopes = np.asarray(options["alibi_slopes"])[..., None, None]
        scores = scores - torch.tensor(slopes * np.abs(distance))
    if b is not None:
        scores = scores + b
    seen = np.ones(distance.shape, bool)
    if options.get("is_causal"):
        seen &= distance >= 0
    if "window" in options:
        seen &= (distance <= options["window"][0]) & (-distance <= options["window"][1])
    if mask is not None:
        seen = seen & mask
    scores = torch.where(torch.tensor(seen), scores, -torch.inf)
    if s is not None:
        scores = torch.cat([scores, s[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse[..., None])
    if s is not None:
        weights = weights[..., :-1]
    out = weights @ v
    wanted = [x for x in tensors if x is not None]
    found = iter(torch.autograd.grad((out, lse), wanted, (torch.tensor(grad_out), torch.tensor(grad_lse))))
    return [None if x is None else next(found).numpy() for x in tensors]


GRID = {
    "plain": {},
    "scale": {"scale": -0.4},
    "causal": {"is_causal": True},
    "window": {"window": (3, 2)},
    "window and offset": {"window": (4, 1), "query_offset": 3, "alibi_slopes": [0.1, 0.2, 0.3, 0.4]},
    "softcap": {"softcap": 0.8},
    "sinks": {"sinks": True, "is_causal": True},
    "bias": {"bias": (4, 9, 12)},
    "bias of keys": {"bias": (12,), "softcap": 2.0},
    "bias of rows": {"bias": (2, 1, 9, 1)},
    "bias of heads": {"bias": (4, 1, 1), "is_causal": True},
    "bias of sequences": {"bias": (2, 1, 1, 12), "sinks": True},
    "bias of all": {"bias": ()},
    "mask": {"mask": True, "bias": (9, 12), "softcap": 1.0, "sinks": True},
}


@pytest.mark.parametrize("options", GRID.values(), ids=GRID)
@pytest.mark.parametrize("Hkv", [4, 2, 1])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_against_autograd(torch, options, Hkv, backend):
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal(shape) for shape in [(2, 4, 9, 8), (2, Hkv, 12, 8), (2, Hkv, 12, 5)])
    options = dict(options)
    if "bias" in options:
        options["bias"] = rng.standard_normal(options["bias"])
    if "sinks" in options:
        options["sinks"] = rng.standard_normal(4)
    if "mask" in options:
        options["mask"] = rng.random((9, 12)) < 0.7
    grad_out, grad_lse = rng.standard_normal((2, 4, 9, 5)), rng.standard_normal((2, 4, 9))
    out, lse = na.attention(q, k, v, **options, return_lse=True, backend=backend)
    got = na.attention_backward(grad_out, q, k, v, out, lse, grad_lse=grad_lse, **options, backend=backend)
    for a, b in zip(got[:5], by_autograd(torch, grad_out, grad_lse, q, k, v, **options), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, 1e-13, offset=1)


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_further_from_float64_than_pytorch(torch, is_causal):
    (grad_out, *arrays, _, _), kwargs, got = given_and_gradients(Case(200, 200, 64, H=4), is_causal=is_causal)
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    theirs = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=is_causal)
    theirs = torch.autograd.grad(theirs, tensors, torch.tensor(grad_out))
    want = oracle_backward(grad_out, *arrays, **kwargs)
    for a, b, w in zip(got[:3], theirs, want[:3], strict=True):
        ours, other = np.abs(a - w), np.abs(b.numpy() - w)
        assert np.sqrt(np.mean(ours**2)) <= 1.5 * np.sqrt(np.mean(other**2))
        assert ours.max() <= 3 * other.max()


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 1.2, "alibi_slopes": [0.3, -0.2], "window": (2, 3), "query_offset": 1},
        {"is_causal": "bottom-right", "sinks": [0.5, -np.inf]},
        {"query_lengths": 3, "key_lengths": 4, "is_causal": "bottom-right", "softcap": 0.7},
    ],
    ids=["softcap, alibi, window", "sinks", "lengths"],
)
@pytest.mark.parametrize("n", range(3))
def test_against_differences(options, n):
    """What PyTorch lacks: lengths, ALiBi and sinks with all the rest."""
    rng = np.random.default_rng(4)
    arrays = [rng.standard_normal((2, m, 4)) for m in (5, 6, 6)]
    grad_out, grad_lse = rng.standard_normal((2, 5, 4)), rng.standard_normal((2, 5))

    def replaced(x):
        return [*arrays[:n], x.reshape(arrays[n].shape), *arrays[n + 1 :]]

    def loss(x):
        out, lse = na.attention(*replaced(x), **options, return_lse=True)
        return np.sum(out * grad_out) + np.sum(np.where(np.isfinite(lse), lse, 0) * grad_lse)

    def gradient(x):
        out, lse = na.attention(*replaced(x), **options, return_lse=True)
        grads = na.attention_backward(grad_out, *replaced(x), out, lse, grad_lse=grad_lse, **options)
        return grads[n].ravel()

    assert check_grad(loss, gradient, arrays[n].ravel()) < 1e-6


# Invariants.


@pytest.mark.parametrize("case", [*LONG, *SOME[::12]], ids=str)
def test_same_bits_for_any_number_of_threads(case):
    import numba

    most = numba.get_num_threads()
    try:
        results = []
        for threads in (1, most):
            numba.set_num_threads(threads)
            results.append(given_and_gradients(case)[2])
    finally:
        numba.set_num_threads(most)
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("options", [(), ("causal",), ("window",), ("key lengths", "softcap")], ids=str)
def test_a_gradient_of_a_bias_past_the_caches(monkeypatch, options, dtype):
    """A partial tile, a window that begins within a vector, heads that share keys; rows of 100 begin anywhere."""
    for S in (192, 100):
        case = Case(130, S, 16, H=4, Hkv=2, batch=(2,), options=options)
        bias = np.random.default_rng(2).standard_normal((2, 4, 130, S)).astype(np.float32)
        grads = []
        for least in (2**60, 0):
            monkeypatch.setattr(cpu_backward, "STREAM", least)
            arrays, kwargs, gradients = given_and_gradients(case, dtype, bias=bias)
            grads.append(gradients)
            u = na.Gradients(*arrays[1:4], bias=bias)
            grads.append(na.attention_double_backward(u, *arrays, **kwargs))
        for n in (0, 1):
            assert grads[n].bias.any()
            for a, b in zip(grads[n], grads[n + 2], strict=True):
                np.testing.assert_array_equal(a, b)


def test_no_zero_of_a_streamed_gradient_is_negative(monkeypatch):
    """Where it is added to zeros, -0.0 becomes 0.0; so the bits are those of a smaller batch."""
    rng = np.random.default_rng(0)
    q, k, v, grad = (rng.standard_normal((2, 4, 64, 16), np.float32) for _ in range(4))
    bias, zeros = np.zeros((2, 4, 64, 64), np.float32), 0
    for seed in range(6):  # in the first rows, all keys may be dropped
        options = {"bias": bias, "is_causal": True, "dropout_p": 0.5, "seed": seed}
        out, lse = na.attention(q, k, v, **options, return_lse=True)
        found = []
        for least in (2**60, 0):
            monkeypatch.setattr(cpu_backward, "STREAM", least)
            found.append(na.attention_backward(grad, q, k, v, out, lse, **options).bias)
        np.testing.assert_array_equal(*map(np.signbit, found))
        zeros += int((found[0][..., 0, 0] == 0).sum())
    assert zeros


@pytest.mark.parametrize("H", [1, 3])
def test_same_bits_alone_and_in_a_batch(H):
    case = Case(1100, 130, 8, H=H, batch=(20,), options=("causal",))
    (grad_out, *arrays, out, lse), kwargs, together = given_and_gradients(case)
    for b in (0, 19):
        alone = na.attention_backward(*(x[b] for x in (grad_out, *arrays, out, lse)), **kwargs)
        for a, t in zip(alone[:3], together[:3], strict=True):
            np.testing.assert_array_equal(a, t[b])


@pytest.mark.parametrize("case", SOME[::9], ids=str)
def test_inputs_are_not_modified(case):
    arrays, kwargs, _ = given_and_gradients(case)
    held = {name: x for name, x in kwargs.items() if isinstance(x, np.ndarray)}
    before = [x.copy() for x in (*arrays, *held.values())]
    na.attention_backward(*arrays, **kwargs)
    for x, old in zip((*arrays, *held.values()), before, strict=True):
        np.testing.assert_array_equal(x, old)


@given(st.integers(1, 140), st.integers(1, 140), st.integers(1, 70), st.integers(1, 70), st.data())
def test_any_sizes(L, S, E, Ev, data):
    names = st.sampled_from(["causal", "window", "softcap", "sinks", "alibi", "mask", "bias of keys", "key lengths"])
    options = tuple(data.draw(st.lists(names, max_size=3, unique=True)))
    heads = data.draw(st.sampled_from([(1, 1), (2, 1), (3, 3)]))
    check_backward(Case(L, S, E, Ev, H=heads[0], Hkv=heads[1], options=options), "float32")


@given(st.integers(2, 80), st.integers(0, 79), st.floats(-3, 3))
def test_linear_in_the_gradient_of_out(L, row, factor):
    """Rows give gradients one by one, and in proportion."""
    (grad_out, *rest), kwargs, _ = given_and_gradients(Case(L, 40, 8, options=("causal",)), "float64")
    one = np.zeros_like(grad_out)
    one[..., row % L, :] = grad_out[..., row % L, :]
    parts = [na.attention_backward(x, *rest, **kwargs) for x in (grad_out, one, factor * (grad_out - one) + one)]
    for whole, first, mixed in zip(*(p[:3] for p in parts), strict=True):
        np.testing.assert_allclose(mixed, factor * (whole - first) + first, atol=1e-12)


# What is hidden stays hidden.


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize(
    "options",
    [
        {"key_lengths": 50},
        {"mask": np.arange(70) < 50},
        {"bias": np.where(np.arange(70) < 50, 0, -np.inf)},
        {"mask": np.arange(70) < 50, "softcap": 3.0},
    ],
    ids=["key_lengths", "mask", "bias", "mask, softcap"],
)
def test_hidden_keys_leave_no_trace(dtype, poison, options):
    case = Case(70, 70, 20, Ev=24)
    (grad_out, q, k, v, out, lse), _, _ = given_and_gradients(case, dtype, **options)
    want = na.attention_backward(grad_out, q, k, v, out, lse, **options)
    k[..., 50:, :] = poison
    v[..., 50:, :] = poison
    got = na.attention_backward(grad_out, q, k, v, out, lse, **options)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.asarray(got.key[..., 50:, :]).any()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("what", ["query", "grad_out", "both"])
def test_rows_past_the_query_length_leave_no_trace(dtype, what):
    case = Case(70, 70, 20)
    options = {"query_lengths": 50}
    (grad_out, q, k, v, out, lse), _, want = given_and_gradients(case, dtype, **options)
    if what != "grad_out":
        q[..., 50:, :] = np.nan
    if what != "query":
        grad_out[..., 50:, :] = np.nan
    got = na.attention_backward(grad_out, q, k, v, out, lse, **options)
    for a, b in zip(got[:3], want[:3], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["query", "key", "value", "grad_out"])
@pytest.mark.parametrize("where", [0, 30, 69])
def test_nan_reaches_what_attends_to_it_and_nothing_else(backend, name, where):
    """Under a causal mask, position `where` is seen by the rows from there on; these see the keys up to them."""
    arrays = dict(zip(("query", "key", "value"), Case(70, 70, 20, H=1, batch=()).arrays("float64"), strict=True))
    arrays["grad_out"] = np.random.default_rng(1).standard_normal((1, 70, 20))
    arrays[name][..., where, 3] = np.nan
    grad_out = arrays.pop("grad_out")
    out, lse = na.attention(*arrays.values(), is_causal=True, return_lse=True, backend=backend)
    grads = na.attention_backward(grad_out, *arrays.values(), out, lse, is_causal=True, backend=backend)
    hit = [np.isnan(g).any(axis=-1)[0] for g in grads[:3]]
    i = np.arange(70)
    rows = i == where if name in ("query", "grad_out") else i >= where
    np.testing.assert_array_equal(hit[0], rows)
    keys = i <= (where if name in ("query", "grad_out") else 69)
    np.testing.assert_array_equal(hit[1], keys)
    np.testing.assert_array_equal(hit[2], np.zeros(70, bool) if name == "value" else keys)


def test_rows_that_see_nothing_have_the_gradient_0():
    mask = np.ones((20, 30), bool)
    mask[::3] = False
    case = Case(20, 30, 8, options=("sinks",))
    _, _, grads = given_and_gradients(case, mask=mask)
    assert not grads.query[..., ::3, :].any()
    assert grads.query[..., 1::3, :].any()


def test_a_set_of_keys_gives_its_part_of_the_gradients():
    """With out and lse of all keys, the backward pass over some keys gives what they contribute."""
    rng = np.random.default_rng(5)
    q, k, v, grad_out = (rng.standard_normal((2, n, 8)) for n in (9, 30, 30, 9))
    out, lse = na.attention(q, k, v, return_lse=True)
    whole = na.attention_backward(grad_out, q, k, v, out, lse)
    cuts = [slice(0, 11), slice(11, 30)]
    parts = [na.attention_backward(grad_out, q, k[:, c], v[:, c], out, lse) for c in cuts]
    np.testing.assert_allclose(sum(p.query for p in parts), whole.query, atol=1e-13)
    np.testing.assert_allclose(np.concatenate([p.key for p in parts], 1), whole.key, atol=1e-13)
    np.testing.assert_allclose(np.concatenate([p.value for p in parts], 1), whole.value, atol=1e-13)


def test_gradients_may_be_broadcast_and_strided():
    (_, *rest), _, _ = given_and_gradients(Case(20, 30, 8))
    ones = np.ones((2, 2, 20, 8), np.float32)
    want = na.attention_backward(ones, *rest)
    got = na.attention_backward(np.broadcast_to(np.float32(1), ones.shape), *rest)
    for a, b in zip(got[:3], want[:3], strict=True):
        np.testing.assert_array_equal(a, b)


def test_broadcast_halves_are_summed_before_they_are_rounded_again():
    rng = np.random.default_rng(6)
    q = rng.standard_normal((50, 1, 8, 16)).astype(ml_dtypes.bfloat16)
    k, v = (rng.standard_normal((1, 8, 16)).astype(ml_dtypes.bfloat16) for _ in range(2))
    out, lse = na.attention(q, k, v, return_lse=True)
    grad_out = np.ones_like(out)
    got = na.attention_backward(grad_out, q, k, v, out, lse)
    want = oracle_backward(grad_out, q, k, v)
    assert got.value.shape == v.shape
    assert_close(got.value, want.value, grad_tolerance("bfloat16"))


def test_half_types_are_rounded_after_the_sum_over_sequences():
    """Keys that two sequences share: each part of the gradient would round to a multiple of 32, and two overflow."""
    query, key = np.zeros((2, 1, 2, 1), np.float16), np.zeros((1, 1, 1, 1), np.float16)
    out, lse = na.attention(query, key, key, return_lse=True)
    grad_out = np.array([40000, 40000, -40000, -39000], np.float16).reshape(2, 1, 2, 1)
    for backend in ("cpu", "reference"):
        grads = na.attention_backward(grad_out, query, key, key, out, lse, backend=backend)
        assert [x.dtype for x in grads[:3]] == [np.float16] * 3
        assert grads.value.shape == key.shape
        assert grads.value.item() == 992  # -39000 is -39008 in float16


def test_gradients_of_shared_keys_have_half_a_unit_of_error():
    dtype = np.float16  # weights of bfloat16 may be rounded before they are multiplied
    rng = np.random.default_rng(0)
    query, grad_out = (rng.standard_normal((64, 2, 5, 8)).astype(dtype) for _ in range(2))
    key, value = (rng.standard_normal((2, 9, 8)).astype(dtype) for _ in range(2))
    out, lse = na.attention(query, key[None], value[None], return_lse=True)
    grads = na.attention_backward(grad_out, query, key[None], value[None], out, lse)
    q, k, g = (x.astype(np.float64) for x in (query, key, grad_out))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    want = (weights.swapaxes(-1, -2) @ g).sum(0)
    unit = 2.0 ** (np.floor(np.log2(np.abs(want))) - 10)
    assert (np.abs(grads.value[0].astype(np.float64) - want) / unit).max() < 0.6
