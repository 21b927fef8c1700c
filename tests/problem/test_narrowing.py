"""Options and data in a wider dtype than kernels compute in: what is finite stays finite, -inf alone hides.

Expected values are those of the textbook in float64 on plain arrays, or numbers that follow without computing.
"""

import ml_dtypes
import numpy as np
import pytest

import numba_attention as na
from numba_attention.narrowing import saturated

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}
TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2, "float64": 1e-12}
LARGEST = np.finfo(np.float64).max
B, H, L, S, E = 2, 4, 6, 9, 8


def normal(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype])


def textbook(q, k, v, extra=0.0, hidden=False):
    """Out, lse and probabilities of (..., S) arrays in float64; `extra` is added to the scores."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) + extra
    scores = np.where(hidden, -np.inf, scores)
    highest = scores.max(-1, keepdims=True)
    p = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    total = p.sum(-1, keepdims=True)
    p = np.divide(p, total, out=np.zeros_like(p), where=total > 0)
    return p @ v, p


def calls(dtype, bias=None, **options):
    """Outputs of every function that takes options, for the same arrays, as (B, H, L, E)."""
    q, k, v = (normal(B, H, n, E, dtype=dtype, seed=seed) for seed, n in enumerate((L, S, S)))
    if bias is not None:
        options["bias"] = bias
    yield "attention", na.attention(q, k, v, **options)
    packed = [x.swapaxes(1, 2).reshape(-1, H, E) for x in (q, k, v)]
    out = na.attention_varlen(*packed, [0, L, 2 * L], [0, S, 2 * S], **options)
    yield "attention_varlen", out.reshape(B, L, H, E).swapaxes(1, 2)
    for cache in (na.KVCache(B, H, S + 1, E, dtype=DTYPES[dtype]), na.PagedKVCache(9, 4, H, E, dtype=DTYPES[dtype])):
        ids = () if isinstance(cache, na.KVCache) else (cache.add(B),)
        cache.append(*ids, k, v)
        yield type(cache).__name__, na.attention_decode(q, cache, is_causal=False, **options)
        few = {name: x[..., -1:, :] if name == "bias" and x.shape[-2] > 1 else x for name, x in options.items()}
        one = na.attention_decode(q[:, :, -1:], cache, is_causal=False, **few)
        yield (
            f"{type(cache).__name__}, one query",
            np.concatenate([out.reshape(B, L, H, E).swapaxes(1, 2)[:, :, :-1], one], 2),
        )
    weights = na.attention_weights(q, k, **options)
    yield "attention_weights", weights.astype(np.float64) @ v.astype(np.float64)


BIASES = {
    "lowest everywhere": lambda: np.full((H, L, S), -LARGEST),
    "large everywhere": lambda: np.full((L, S), 1e300),
    "low everywhere": lambda: np.full((B, 1, 1, S), -1e300),
    "lowest but for some": lambda: np.where(np.arange(S) < 4, 0.0, -LARGEST)[None],
    "large for some": lambda: np.where(np.arange(S) < 4, 1e300, 0.0)[None],
    "low and hidden": lambda: np.where(np.arange(S) < 4, -1e300, -np.inf)[None],
    "hidden": lambda: np.full((L, S), -np.inf),
    "beyond float16": lambda: np.where(np.arange(S) < 4, 1e5, -1e5)[None],
}


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_in_float64(dtype, name):
    """Weights that are equal where biases are, whatever the scores beside them, as float32 cannot tell them apart."""
    bias = np.broadcast_to(BIASES[name](), (B, H, L, S))
    v = normal(B, H, S, E, dtype=dtype, seed=2).astype(np.float64)
    top = bias == bias.max(-1, keepdims=True)
    top &= bias > -np.inf
    if name in ("lowest but for some", "beyond float16"):
        q, k = (normal(B, H, n, E, dtype=dtype, seed=seed) for seed, n in enumerate((L, S)))
        expected, _ = textbook(q, k, v, 0.0, ~top)
    else:
        p = top / np.maximum(top.sum(-1, keepdims=True), 1)
        expected = p @ v
    tolerance = 0.02 if name == "beyond float16" and dtype != "float64" else 4 * TOLERANCE[dtype]
    for function, out in calls(dtype, BIASES[name]()):
        np.testing.assert_allclose(out.astype(np.float64), expected, atol=tolerance, err_msg=function)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_with_a_bias_in_float64(dtype):
    q, k, v, grad = (normal(H, n, E, dtype=dtype, seed=seed) for seed, n in enumerate((L, S, S, L)))
    bias = np.where(np.arange(S) < 4, 0.0, -LARGEST)[None]
    out, lse = na.attention(q, k, v, bias=bias, return_lse=True)
    grads = na.attention_backward(grad, q, k, v, out, lse, bias=bias)
    hidden = na.attention_backward(grad, q, k, v, out, lse, bias=np.where(bias < 0, -np.inf, 0))
    for name in ("query", "key", "value", "bias"):
        x, y = (np.asarray(getattr(g, name), np.float64) for g in (grads, hidden))
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, y, atol=8 * TOLERANCE[dtype], err_msg=name)
    assert grads.bias.dtype == np.float64


@pytest.mark.parametrize("number", [LARGEST, 1e300, 1e39])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_slopes_and_sinks_beyond_float32(dtype, number):
    v = normal(B, H, S, E, dtype=dtype, seed=2).astype(np.float64)
    for function, out in calls(dtype, alibi_slopes=np.full(H, number)):
        if "KVCache" not in function:  # whose queries sit elsewhere
            np.testing.assert_allclose(out, v[:, :, :L], atol=4 * TOLERANCE[dtype], err_msg=function)
    for function, out in calls(dtype, sinks=np.full(H, number)):
        assert not out.any(), function
    plain = dict(calls(dtype))
    for function, out in calls(dtype, sinks=np.full(H, -number)):
        np.testing.assert_allclose(out, plain[function], atol=TOLERANCE[dtype], err_msg=function)


def test_sinks_alone_tell_low_from_nothing():
    """A row that sees nothing has the lse of its sink; only a sink of -inf is none."""
    x = normal(1, 3, E)
    _, lse = na.attention(x, x, x, mask=False, sinks=np.array([-1e300]), return_lse=True)
    assert np.isfinite(lse).all()
    _, lse = na.attention(x, x, x, mask=False, sinks=np.array([-np.inf]), return_lse=True)
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_of_every_size(dtype):
    plain = dict(calls(dtype))
    for softcap in (1e8, 1e30, 3e38, 1e39, 1e300, LARGEST, np.nextafter(0, 1)):
        for function, out in calls(dtype, softcap=softcap):
            assert np.isfinite(out).all(), (function, softcap)
            if softcap > 1:
                np.testing.assert_allclose(
                    out,
                    plain[function],
                    atol=4 * TOLERANCE["float32" if dtype == "float64" else dtype],
                    err_msg=function,
                )
    v = normal(B, H, S, E, dtype=dtype, seed=2).astype(np.float64)
    mean = np.broadcast_to(v.mean(2, keepdims=True), (B, H, L, E))
    for softcap in (1e-8, 1e-30, 1e-300, np.nextafter(0, 1)):
        for function, out in calls(dtype, softcap=softcap):
            np.testing.assert_allclose(out, mean, atol=4 * max(softcap, TOLERANCE[dtype]), err_msg=function)


@pytest.mark.parametrize("rotary", [None, True])
def test_bias_of_a_layer(rotary):
    layer = na.MultiHeadAttention(32, 4, rng=0, rotary=rotary)
    x = normal(2, 5, 32)
    hidden = layer(x, mask=np.arange(5) < 3)
    bias = np.where(np.arange(5) < 3, 0.0, -LARGEST)[None]
    np.testing.assert_allclose(layer(x, bias=bias), hidden, atol=1e-6)
    cache = na.KVCache(2, 4, 5, 8)
    np.testing.assert_allclose(layer(x, bias=bias, cache=cache), hidden, atol=1e-6)
    out, ctx = layer.forward(x, bias=np.full((5, 5), -LARGEST))
    assert np.isfinite(out).all()
    assert all(np.isfinite(g).all() for g in layer.backward(out, ctx)[:1])


@pytest.mark.torch
def test_bias_of_tensors(torch):
    import numba_attention.torch as nat

    q, k, v = (torch.from_numpy(normal(H, n, E, seed=n)) for n in (L, S, S))
    bias = torch.full((L, S), -LARGEST, dtype=torch.float64, requires_grad=True)
    out = nat.attention(q, k, v, bias=bias)
    np.testing.assert_allclose(out.detach(), np.broadcast_to(v.mean(1, keepdim=True), out.shape), atol=1e-6)
    out.sum().backward()
    assert torch.isfinite(bias.grad).all()


def test_bias_of_jax_arrays():
    pytest.importorskip("jax")
    import numba_attention.jax as naj

    q, k, v = (normal(H, n, E, seed=n) for n in (L, S, S))
    out = np.asarray(naj.attention(q, k, v, bias=np.full((L, S), -LARGEST)))
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(1, keepdims=True), out.shape), atol=1e-6)
    assert not np.asarray(naj.attention(q, k, v, sinks=np.full(H, 1e300))).any()
    np.testing.assert_allclose(naj.attention(q, q, q, alibi_slopes=np.full(H, 1e300)), q, atol=1e-6)


NUMBERS = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    65504.0,
    70000.0,
    -1e30,
    3.4e38,
    1e39,
    -1e300,
    LARGEST,
    np.inf,
    -np.inf,
    np.nan,
    1e-300,
]


@pytest.mark.parametrize(("source", "target"), [
    ("float64", "float32"), ("float64", "float16"), ("float64", "bfloat16"), ("float32", "float16"),
    ("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "float32"), ("float16", "bfloat16"),
    ("bfloat16", "float32"), ("float32", "float64"),
])  # fmt: skip
def test_saturated(source, target):
    largest = float(ml_dtypes.finfo(DTYPES[target]).max)
    with np.errstate(all="ignore"):
        x = np.array(NUMBERS).astype(DTYPES[source])
    before = x.copy()
    with np.errstate(all="raise", under="ignore"):
        result = saturated(x, DTYPES[target])
        alone = saturated(x[3].reshape(()), DTYPES[target])
    assert x.tobytes() == before.tobytes()
    assert result.dtype == DTYPES[target]
    assert alone == result[3]
    many = saturated(np.tile(x, 2000), DTYPES[target])
    np.testing.assert_array_equal(many.astype(np.float64), np.tile(result, 2000).astype(np.float64))
    few = x[:4]  # that fit into all but float16
    np.testing.assert_array_equal(saturated(few, DTYPES[target]).astype(np.float64), result[:4].astype(np.float64))
    wide = x.astype(np.float64)
    with np.errstate(all="ignore"):
        expected = np.where(np.isfinite(wide), np.clip(wide, -largest, largest), wide).astype(DTYPES[target])
    np.testing.assert_array_equal(result.astype(np.float64), expected.astype(np.float64))


def test_parameters_of_other_byte_orders_and_widths():
    wide = na.MultiHeadAttention(8, 2, dtype=np.float64, rng=0)
    state = {name: x.astype(">f8") for name, x in wide.parameters().items()}
    packed = {
        "in_proj_weight": np.concatenate([state[f"{n}_proj.weight"] for n in "qkv"]),
        "in_proj_bias": np.concatenate([state[f"{n}_proj.bias"] for n in "qkv"]),
        "out_proj.weight": state["out_proj.weight"], "out_proj.bias": state["out_proj.bias"],
    }  # fmt: skip
    layer = na.MultiHeadAttention.from_torch(packed, 2)
    assert layer.dtype == np.float64
    for name, x in layer.parameters().items():
        np.testing.assert_array_equal(x, wide.parameters()[name])
        assert x.dtype.isnative
    for dtype in (np.longdouble, np.float16, ml_dtypes.bfloat16, ">f4", ">f2"):
        other = na.MultiHeadAttention.from_torch({name: x.astype(dtype) for name, x in packed.items()}, 2)
        assert other.dtype == (np.float64 if dtype is np.longdouble else np.float32)
        narrow = wide.parameters()["q_proj.weight"].astype(dtype)
        np.testing.assert_array_equal(other.parameters()["q_proj.weight"], narrow.astype(other.dtype))


@pytest.mark.parametrize("number", [1e39, -1e300])
def test_parameters_that_do_not_fit(number):
    layer = na.MultiHeadAttention(8, 2, rng=0)
    before = {name: x.copy() for name, x in layer.parameters().items()}
    given = {name: x.astype(np.float64) for name, x in before.items()}
    given["out_proj.bias"][3] = number
    with np.errstate(all="raise"), pytest.raises(ValueError, match=r"out_proj\.bias must fit in the float32"):
        layer.load_parameters(given)
    for name, x in layer.parameters().items():
        np.testing.assert_array_equal(x, before[name])
    for odd in (np.inf, np.nan):
        given["out_proj.bias"][3] = odd
        layer.load_parameters(given)


@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
def test_few_numbers_of_another_byte_order(name):
    x = normal(H, L, E)
    given = np.linspace(0.1, 1, H)
    for dtype in (">f8", ">f4", ">f2"):
        np.testing.assert_array_equal(
            na.attention(x, x, x, **{name: given.astype(dtype)}),
            na.attention(x, x, x, **{name: given.astype(np.dtype(dtype).newbyteorder("="))}),
        )
    with pytest.raises(TypeError, match="bias must be floating point, got >f8; convert it to native byte order"):
        na.attention(x, x, x, bias=np.zeros((L, L), ">f8"))
