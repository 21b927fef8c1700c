"""Arrays of other libraries go into functions and come back as their kind, with gradients where they have any."""

import subprocess
import sys

import numpy as np
import pytest

import numba_attention as na

RNG = np.random.default_rng(0)
QUERY = RNG.standard_normal((2, 4, 5, 8), dtype=np.float32)
KEY, VALUE = RNG.standard_normal((2, 2, 2, 7, 8), dtype=np.float32)
OPTIONS = {"is_causal": "bottom-right", "window": (3, 0)}
LEADING = ("batch", "head", "time")


class Exported:
    """An array that knows DLPack and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def of_torch(x):
    return pytest.importorskip("torch").from_numpy(x.copy())


def of_jax(x):
    return pytest.importorskip("jax").numpy.asarray(x)


def of_strict(x):
    return pytest.importorskip("array_api_strict").asarray(x)


# From NumPy, back to NumPy, and the type of what comes back.
KINDS = {
    "torch": (of_torch, lambda x: x.numpy()),
    "jax": (of_jax, np.asarray),
    "array API": (of_strict, np.from_dlpack),
}


def same(actual, expected, kind):
    make, back = KINDS[kind]
    assert type(actual) is type(make(expected))
    np.testing.assert_array_equal(back(actual), expected)


@pytest.mark.peer
@pytest.mark.parametrize("kind", KINDS)
def test_functions(kind):
    make, _ = KINDS[kind]
    q, k, v = map(make, (QUERY, KEY, VALUE))
    out, lse = na.attention(QUERY, KEY, VALUE, return_lse=True, **OPTIONS)
    same(na.attention(q, k, v, **OPTIONS), out, kind)
    same(na.attention(q, k, v, backend="cpu", **OPTIONS), out, kind)
    with na.use_backend("cpu"):
        same(na.attention(q, k, v, **OPTIONS), out, kind)
    got = na.attention(q, k, v, return_lse=True, key_lengths=make(np.array([7, 7])), **OPTIONS)
    for actual, expected in zip(got, (out, lse), strict=True):
        same(actual, expected, kind)
    same(na.attention_weights(q, k, rows=[0, 2]), na.attention_weights(QUERY, KEY, rows=[0, 2]), kind)
    expected = na.attention_backward(out, QUERY, KEY, VALUE, out, lse, **OPTIONS)
    grads = na.attention_backward(make(out), q, k, v, make(out), make(lse), **OPTIONS)
    for name in ("query", "key", "value"):
        same(getattr(grads, name), getattr(expected, name), kind)
    assert grads.bias is None
    starts = [0, 2, 5]
    flat = [x[0].swapaxes(0, 1).copy() for x in (QUERY[..., :5, :], KEY[..., :5, :], VALUE[..., :5, :])]
    packed, of_packed = na.attention_varlen(*flat, starts, starts, return_lse=True)
    same(na.attention_varlen(*map(make, flat), starts, starts), packed, kind)
    expected = na.attention_varlen_backward(packed, *flat, packed, of_packed, starts, starts)
    grads = na.attention_varlen_backward(*map(make, (packed, *flat, packed, of_packed)), starts, starts)
    same(grads.key, expected.key, kind)
    cache = na.KVCache(2, 2, 8, 8)
    cache.append(KEY, VALUE)
    same(na.attention_decode(q[..., -1:, :], cache), na.attention_decode(QUERY[..., -1:, :], cache), kind)
    with pytest.raises(TypeError, match="out must be None with"):
        na.attention(q, k, v, out=np.empty_like(out))


@pytest.mark.peer
def test_gradients_of_tensors(torch):
    q, k, v = (of_torch(x).requires_grad_() for x in (QUERY, KEY, VALUE))
    bias = torch.zeros(5, 7, requires_grad=True)
    na.attention(q, k, v, bias=bias).square().mean().backward()
    out, lse = na.attention(QUERY, KEY, VALUE, return_lse=True)
    expected = na.attention_backward(2 * out / out.size, QUERY, KEY, VALUE, out, lse, bias=np.zeros((5, 7), np.float32))
    for tensor, grad in zip((q, k, v, bias), expected[:4], strict=True):
        np.testing.assert_allclose(tensor.grad.numpy(), grad, atol=1e-8)
    with pytest.raises(TypeError, match=r"query requires a gradient, which attention_weights does not .*detach"):
        na.attention_weights(q, k)
    with torch.no_grad():
        assert isinstance(na.attention_weights(q, k), torch.Tensor)
    half = q.detach().to(torch.bfloat16)
    assert na.attention_weights(half, k.detach().to(torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"key must be a torch\.Tensor"):
        na.attention(q, KEY, v)
    with pytest.raises(ValueError, match=r"query must be on the CPU, got device meta"):
        na.attention_weights(q.detach().to("meta"), k.detach())


@pytest.mark.peer
def test_advice_for_tensors_works(torch):
    layer = na.MultiHeadAttention(8, 2, rng=0)
    x = torch.randn(5, 8)
    for given, advice in (
        (x, "numpy.asarray(query)"),
        (x.clone().requires_grad_(), "query.detach().numpy()"),
        (x.to(torch.bfloat16), "query.float().numpy()"),
        (x.to(torch.bfloat16).requires_grad_(), "query.detach().float().numpy()"),
    ):
        with pytest.raises(TypeError) as caught:
            layer(given)
        assert advice in str(caught.value)
        assert layer(eval(advice, {"numpy": np, "query": given})).shape == (5, 8)


@pytest.mark.peer
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_say_how_to_convert(kind):
    q, k, v = map(KINDS[kind][0], (QUERY, KEY, VALUE))
    with pytest.raises(
        TypeError, match=r"second derivatives take numpy\.ndarray, got .*; convert each array with .*\("
    ) as caught:
        na.attention_jvp(na.Gradients(q, k, v), q, k, v)
    advice = str(caught.value).rpartition(" with ")[2]
    q, k, v = (eval(advice, {"numpy": np, "x": x}) for x in (q, k, v))
    assert na.attention_jvp(na.Gradients(q, k, v), q, k, v).out.shape == QUERY.shape


@pytest.mark.peer
def test_traced_arrays():
    jax = pytest.importorskip("jax")
    q, k, v = map(of_jax, (QUERY, KEY, VALUE))
    grads = jax.jit(jax.grad(lambda q: (na.attention(q, k, v) ** 2).mean()))(q)
    out, lse = na.attention(QUERY, KEY, VALUE, return_lse=True)
    expected = na.attention_backward(2 * out / out.size, QUERY, KEY, VALUE, out, lse)
    np.testing.assert_allclose(np.asarray(grads), expected.query, atol=1e-8)
    with pytest.raises(TypeError, match="query is traced by JAX, and attention_weights needs its numbers"):
        jax.jit(lambda q: na.attention_weights(q, k))(q)


def test_dlpack_alone():
    """What has no functions of its own comes back as an array of NumPy."""
    out = na.attention(*map(Exported, (QUERY, KEY, VALUE)), **OPTIONS)
    assert type(out) is np.ndarray
    np.testing.assert_array_equal(out, na.attention(QUERY, KEY, VALUE, **OPTIONS))
    with pytest.raises(TypeError, match=r"x must be .*numpy\.from_dlpack\(x\)"):
        na.apply_rotary(Exported(QUERY), 3)


@pytest.mark.peer
def test_xarray():
    xarray = pytest.importorskip("xarray")
    times, features = [f"t{n}" for n in range(5)], list("abcdefgh")
    q = xarray.DataArray(QUERY, {"time": times}, (*LEADING, "feature"))
    k = xarray.DataArray(KEY, {"time": range(7)}, ("batch", "kv_head", "time", "feature"))
    v = xarray.DataArray(VALUE, {"channel": features}, ("batch", "kv_head", "time", "channel"))
    expected, of_rows = na.attention(QUERY, KEY, VALUE, return_lse=True)
    out, lse = na.attention(q, k, v, return_lse=True)
    assert out.dims == (*LEADING, "channel")
    assert lse.dims == LEADING
    assert out.coords["time"].to_numpy().tolist() == times
    assert out.coords["channel"].to_numpy().tolist() == features
    np.testing.assert_array_equal(out.to_numpy(), expected)
    weights = na.attention_weights(q, k, rows=slice(1, 3))
    assert weights.dims == (*LEADING, "time_key")
    assert weights.coords["time"].to_numpy().tolist() == times[1:3]
    assert weights.coords["time_key"].to_numpy().tolist() == list(range(7))
    grads = na.attention_backward(out, q, k, v, out, lse)
    assert grads.value.dims == v.dims
    np.testing.assert_array_equal(
        grads.value.to_numpy(), na.attention_backward(expected, QUERY, KEY, VALUE, expected, of_rows).value
    )
    with pytest.raises(TypeError, match=r"attention_varlen, got a DataArray of xarray; pass query\.to_numpy\(\)"):
        na.attention_varlen(q, k, v, [0], [0])
    with pytest.raises(TypeError, match="value must be a DataArray of xarray, as query is"):
        na.attention(q, k, VALUE)


@pytest.mark.peer
def test_pandas():
    pandas = pytest.importorskip("pandas")
    q, k, v = QUERY[0, 0], KEY[0, 0], VALUE[0, 0]
    words, keys, columns = list("vwxyz"), list("abcdefg"), [f"f{n}" for n in range(8)]
    frames = pandas.DataFrame(q, words), pandas.DataFrame(k, keys), pandas.DataFrame(v, keys, columns)
    out, lse = na.attention(*frames, return_lse=True)
    expected, of_rows = na.attention(q, k, v, return_lse=True)
    pandas.testing.assert_frame_equal(out, pandas.DataFrame(expected, words, columns))
    pandas.testing.assert_series_equal(lse, pandas.Series(of_rows, words))
    weights = na.attention_weights(*frames[:2], rows=[1, 3])
    pandas.testing.assert_frame_equal(
        weights, pandas.DataFrame(na.attention_weights(q, k, rows=[1, 3]), ["w", "y"], keys)
    )
    with pytest.raises(TypeError, match=r"convert it with query\.to_numpy\(\)"):
        na.MultiHeadAttention(8, 2, rng=0)(frames[0])


def test_numpy_calls_ask_nothing(monkeypatch):
    def refuse(x):
        raise AssertionError("asked")

    for name, module in list(sys.modules.items()):
        if name.startswith("numba_attention") and hasattr(module, "family_of"):
            monkeypatch.setattr(module, "family_of", refuse)
    out, lse = na.attention(QUERY, KEY, VALUE, return_lse=True)
    with na.use_backend("cpu"):
        na.attention(QUERY, KEY, VALUE)
    na.attention_backward(out, QUERY, KEY, VALUE, out, lse)


def test_nothing_is_imported():
    code = """
import sys, numpy as np, numba_attention as na
class Exported:
    def __init__(self, x): self.x = x
    def __dlpack__(self, **options): return self.x.__dlpack__(**options)
    def __dlpack_device__(self): return self.x.__dlpack_device__()
x = np.ones((3, 4), np.float32)
na.attention(Exported(x), Exported(x), Exported(x), backend="reference")
print([name for name in ("torch", "jax", "xarray", "pandas", "dask") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
