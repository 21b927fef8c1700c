"""MultiHeadAttention: against torch.nn.MultiheadAttention, and for itself."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

import numba_attention as na

D, H = 24, 4


def inputs(*lengths, seed=0, features=(D, D, D)):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((3, n, f)) for n, f in zip(lengths, features, strict=True)]


@pytest.fixture(params=["packed", "kdim and vdim", "no bias"])
def pair(torch, request):
    """A module of PyTorch in float64, and the layer with its parameters."""
    torch.manual_seed(0)
    options = {"packed": {}, "kdim and vdim": {"kdim": 10, "vdim": 7}, "no bias": {"bias": False}}[request.param]
    module = torch.nn.MultiheadAttention(D, H, batch_first=True, dtype=torch.float64, **options).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "bias" in name:  # PyTorch begins with zeros, which would hide a bias that is not used
                parameter.normal_()
    return module, na.MultiHeadAttention.from_torch(module.state_dict(), H)


def by_torch(torch, module, query, key, value, **options):
    tensors = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    with torch.no_grad():
        out, weights = module(*map(torch.from_numpy, (query, key, value)), **tensors)
    return out.numpy(), None if weights is None else weights.numpy()


PADDING = np.arange(9) >= np.array([9, 4, 1])[:, None]
SCATTERED = np.random.default_rng(5).random((3, 9)) < 0.4
SCATTERED[:, 0] = False
HIDDEN = np.triu(np.ones((6, 9), bool), 1)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"key_padding_mask": PADDING}, {"key_padding_mask": PADDING}),
        ({"key_padding_mask": SCATTERED}, {"key_padding_mask": SCATTERED}),
        ({"attn_mask": HIDDEN}, {"mask": ~HIDDEN}),
        ({"attn_mask": HIDDEN}, {"is_causal": True}),
        ({"attn_mask": HIDDEN, "key_padding_mask": SCATTERED}, {"mask": ~HIDDEN, "key_padding_mask": SCATTERED}),
        ({"attn_mask": HIDDEN, "key_padding_mask": PADDING}, {"is_causal": True, "key_padding_mask": PADDING}),
    ],
    ids=["plain", "padding at the end", "padding anywhere", "mask", "causal", "mask and padding", "causal and padding"],
)
@pytest.mark.parametrize("average", [True, False])
def test_cross_attention_is_that_of_torch(torch, pair, theirs, ours, average):
    module, layer = pair
    query, key, value = inputs(6, 9, 9, features=(D, layer.kdim, layer.vdim))
    want, want_weights = by_torch(torch, module, query, key, value, average_attn_weights=average, **theirs)
    out, weights = layer(query, key, value, need_weights=True, average_weights=average, **ours)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-10)
    np.testing.assert_allclose(weights, want_weights, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(layer(query, key, value, **ours), out)


@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_is_that_of_torch(torch, bias):
    torch.manual_seed(1)
    module = torch.nn.MultiheadAttention(D, H, bias=bias, batch_first=True, dtype=torch.float64).eval()
    layer = na.MultiHeadAttention.from_torch(module.state_dict(), H)
    (x,) = inputs(40, features=(D,))
    want, _ = by_torch(torch, module, x, x, x)
    np.testing.assert_allclose(layer(x), want, rtol=0, atol=1e-10)
    np.testing.assert_allclose(layer(x[0]), want[0], rtol=0, atol=1e-10)


def test_to_torch_and_back(torch, pair):
    module, layer = pair
    state = layer.to_torch()
    assert state.keys() == module.state_dict().keys()
    for name, parameter in module.state_dict().items():
        assert torch.equal(state[name], parameter), name


def test_grouped_heads_are_repeated_heads():
    layer = na.MultiHeadAttention(D, H, num_kv_heads=2, dtype=np.float64, rng=0)
    full = na.MultiHeadAttention(D, H, dtype=np.float64, rng=1)
    own = layer.parameters()
    spread = {name: x for name, x in own.items() if name[0] in "qo"}
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        heads = own[name].reshape(2, layer.head_dim, -1)
        spread[name] = np.repeat(heads, 2, axis=0).reshape(full.parameters()[name].shape)
    full.load_parameters(spread)
    (x,) = inputs(11, features=(D,))
    np.testing.assert_allclose(layer(x, is_causal=True), full(x, is_causal=True), rtol=0, atol=1e-13)


def test_head_dim_of_its_own():
    layer = na.MultiHeadAttention(10, 3, head_dim=8, rng=0)
    assert layer(np.ones((2, 5, 10), np.float32)).shape == (2, 5, 10)


@pytest.mark.parametrize("prefix", ["", "encoder.0.attention."])
def test_safetensors(tmp_path, prefix):
    pytest.importorskip("safetensors")
    layer = na.MultiHeadAttention(D, H, num_kv_heads=2, rng=0)
    layer.save_safetensors(tmp_path / "layer.safetensors", prefix)
    again = na.MultiHeadAttention.load_safetensors(tmp_path / "layer.safetensors", prefix, num_heads=H)
    for name, x in layer.parameters().items():
        np.testing.assert_array_equal(again.parameters()[name], x)
    with pytest.raises(ValueError, match="no weight"):
        na.MultiHeadAttention.load_safetensors(tmp_path / "layer.safetensors", "decoder.", num_heads=H)


def test_safetensors_with_rotary(tmp_path):
    pytest.importorskip("safetensors")
    layer = na.MultiHeadAttention(D, H, rotary={"base": 500.0}, dtype=np.float64, rng=0)
    layer.save_safetensors(tmp_path / "layer")
    again = na.MultiHeadAttention.load_safetensors(tmp_path / "layer", num_heads=H, rotary={"base": 500.0})
    (x,) = inputs(11, features=(D,))
    np.testing.assert_array_equal(again(x), layer(x))
    plain = na.MultiHeadAttention.load_safetensors(tmp_path / "layer", num_heads=H)
    assert (plain(x) != layer(x)).any()


def test_torch_and_rotary(torch):
    module = torch.nn.MultiheadAttention(D, H, batch_first=True)
    layer = na.MultiHeadAttention.from_torch(module.state_dict(), H, rotary=True)
    np.testing.assert_array_equal(layer.parameters()["out_proj.weight"], module.out_proj.weight.detach().numpy())
    with pytest.raises(ValueError, match="rotary=None"):
        layer.to_torch()


@pytest.mark.parametrize("rotary", [None, True, {"dim": 4, "interleaved": True}], ids=str)
def test_repr_can_be_typed_in(rotary):
    layer = na.MultiHeadAttention(D, H, num_kv_heads=2, rotary=rotary, dtype=np.float64)
    again = eval(repr(layer), {"MultiHeadAttention": na.MultiHeadAttention, "float64": np.float64})
    assert repr(again) == repr(layer)
    assert f"rotary={rotary!r}" in repr(layer)


@pytest.mark.parametrize("rotary", [None, {"interleaved": True, "scaling": {"type": "ntk", "factor": 2}}], ids=str)
def test_pickled_layer_gives_the_same_bits_in_another_process(tmp_path, rotary):
    layer = na.MultiHeadAttention(D, H, rotary=rotary, rng=0)
    (x,) = inputs(17, features=(D,))
    x = x.astype(np.float32)
    out, ctx = layer.forward(x)
    grad = layer.backward(out, ctx).query
    (tmp_path / "layer").write_bytes(pickle.dumps((layer, x, out, grad)))
    code = """
import pickle, sys
layer, x, out, grad = pickle.load(open(sys.argv[1], "rb"))
assert layer.grads == {}
assert (layer(x) == out).all()
assert (layer.backward(out, layer.forward(x)[1]).query == grad).all()
layer.parameters()["q_proj.weight"][:] = 0  # still the layer's own, and not a copy
assert (layer(x) != out).any()
"""
    subprocess.run([sys.executable, "-c", code, os.fspath(tmp_path / "layer")], check=True)


def test_load_parameters_is_all_or_nothing():
    layer = na.MultiHeadAttention(D, H, rng=0)
    before = {name: x.copy() for name, x in layer.parameters().items()}
    given = {name: x + 1 for name, x in before.items()}
    given["out_proj.bias"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"out_proj\.bias must have shape"):
        layer.load_parameters(given)
    for name, x in layer.parameters().items():
        np.testing.assert_array_equal(x, before[name])


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"num_heads": 5}, ValueError, "embed_dim"),
        ({"num_heads": 0}, ValueError, "num_heads"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads"),
        ({"head_dim": 2.0}, TypeError, "head_dim"),
        ({"kdim": 0}, ValueError, "kdim"),
        ({"bias": 1}, TypeError, "bias"),
        ({"rotary": 10000.0}, TypeError, "rotary must be None, True or a dict"),
        ({"rotary": {"theta": 10000.0}}, ValueError, "rotary may have the keys .* got theta"),
        ({"rotary": {"dim": 8}}, ValueError, "rotary: dim must be even and between 2 and .* 6"),
        ({"rotary": {"base": "10000"}}, TypeError, "rotary: base"),
        ({"rotary": True, "head_dim": 7}, ValueError, "rotary: dim"),
        ({"dtype": np.float16}, TypeError, "dtype"),
        ({"rng": "0"}, TypeError, "rng"),
    ],
)
def test_bad_construction(arguments, error, named):
    with pytest.raises(error, match=named):
        na.MultiHeadAttention(**{"embed_dim": D, "num_heads": H, **arguments})


X = np.zeros((3, 5, D), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ((X.astype(np.float64),), TypeError, "query must have the dtype of the layer"),
        ((X.tolist(),), TypeError, "query must be a numpy.ndarray"),
        ((X[..., :-1],), ValueError, "query must have shape"),
        ((X, X[..., 1:]), ValueError, "key must have shape"),
        ((X, X, X[:, 1:]), ValueError, "value must be as long"),
        ((X, None, X), ValueError, "key must be given"),
        ((X, X[:2]), ValueError, "leading dimensions"),
    ],
)
def test_bad_inputs(arguments, error, named):
    with pytest.raises(error, match=named):
        na.MultiHeadAttention(D, H)(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"key_padding_mask": np.zeros((3, 5))}, TypeError, "key_padding_mask must be boolean"),
        ({"key_padding_mask": np.zeros((3, 4), bool)}, ValueError, "key_padding_mask must have shape"),
        ({"mask": np.zeros((5, 5))}, TypeError, "bias"),
        ({"key_lengths": 6}, ValueError, "key_lengths must lie"),
        ({"query_offset": 0.5}, TypeError, "query_offset must be integer"),
        ({"query_offset": [1, 2]}, ValueError, "query_offset of shape"),
        ({"query_offset": 2**50}, ValueError, "query_offset must lie"),
        ({"key_lengths": [[5, 5, 5]] * 2, "is_causal": "bottom-right"}, ValueError, "key_lengths of shape"),
        ({"query_lengths": 1.0, "is_causal": "bottom-right"}, TypeError, "query_lengths must be integer"),
    ],
)
@pytest.mark.parametrize("rotary", [None, True])
def test_bad_options(options, error, named, rotary):
    with pytest.raises(error, match=named):
        na.MultiHeadAttention(D, H, rotary=rotary)(X, **options)


def test_torch_state_with_extra_keys_is_refused(torch):
    module = torch.nn.MultiheadAttention(D, H, add_bias_kv=True)
    with pytest.raises(ValueError, match="bias_k"):
        na.MultiHeadAttention.from_torch(module.state_dict(), H)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: na.MultiHeadAttention(64, 8, heads=2), r"MultiHeadAttention\.__init__\(\) got an unexpected"),
        (lambda: na.MultiHeadAttention(64), r"MultiHeadAttention\.__init__\(\) missing .* 'num_heads'"),
        (lambda: na.MultiHeadAttention.from_torch({}, 8, 8), r"MultiHeadAttention\.from_torch\(\) takes"),
    ],
)
def test_errors_of_arguments_name_the_class(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_advice_for_a_list_of_integers_can_be_followed():
    x = np.ones((1, 2, 4, 8), np.float32)
    with pytest.raises(TypeError, match=r"convert it with numpy\.asarray\(sinks\)\.astype\(numpy\.float32\)"):
        na.attention(x, x, x, sinks=[1, 2])
