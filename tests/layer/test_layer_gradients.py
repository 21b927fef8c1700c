"""`forward` and `backward` of the layer: against torch.nn.MultiheadAttention, a formula in PyTorch, and differences."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numba_attention as na

D, H = 24, 4
PADDING = np.arange(9) >= np.array([9, 4, 1])[:, None]
SCATTERED = np.random.default_rng(5).random((3, 9)) < 0.4
SCATTERED[:, 0] = False
HIDDEN = np.triu(np.ones((6, 9), bool), 1)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def frozen(*arrays):
    """Arrays that raise when written to."""
    for array in arrays:
        array.flags.writeable = False
    return arrays


def layer_with_biases(*arguments, seed=0, **options):
    """A layer in float64 whose biases are not 0, which would hide one that is not used."""
    layer = na.MultiHeadAttention(*arguments, dtype=np.float64, rng=seed, **options)
    for n, (name, parameter) in enumerate(layer.parameters().items()):
        if name.endswith("bias"):
            parameter[:] = normal(*parameter.shape, seed=100 + n)
    return layer


def assert_near(got, want, atol=1e-10):
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def assert_grads_are_like_parameters(layer):
    assert list(layer.grads) == list(layer.parameters())
    for name, parameter in layer.parameters().items():
        assert layer.grads[name].shape == parameter.shape, name
        assert layer.grads[name].dtype == parameter.dtype, name


# Against torch.nn.MultiheadAttention.


@pytest.fixture(params=["packed", "kdim and vdim", "no bias"])
def pair(torch, request):
    """A module of PyTorch in float64, and the layer with its parameters."""
    options = {"packed": {}, "kdim and vdim": {"kdim": 10, "vdim": 7}, "no bias": {"bias": False}}[request.param]
    return make_pair(torch, **options)


def make_pair(torch, **options):
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(D, H, batch_first=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return module, na.MultiHeadAttention.from_torch(module.state_dict(), H)


def grads_of_module(module):
    """The gradients of its parameters by our names."""
    named = {name: parameter.grad.numpy() for name, parameter in module.named_parameters()}
    parts = ("q_proj", "k_proj", "v_proj")
    for kind in ("weight", "bias"):
        if f"in_proj_{kind}" in named:
            thirds = np.split(named.pop(f"in_proj_{kind}"), 3)
            named |= {f"{part}.{kind}": third for part, third in zip(parts, thirds, strict=True)}
        named |= {f"{part}.{kind}": named.pop(f"{part}_{kind}") for part in parts if f"{part}_{kind}" in named}
    return named


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
def test_cross_attention_is_that_of_torch(torch, pair, theirs, ours):
    module, layer = pair
    inputs = [normal(3, n, size, seed=size + n) for n, size in ((6, D), (9, layer.kdim), (9, layer.vdim))]
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    grad_out = normal(3, 6, D, seed=3)
    want, _ = module(*tensors, **{name: torch.from_numpy(mask) for name, mask in theirs.items()})
    want.backward(torch.from_numpy(grad_out))

    out, ctx = layer.forward(*frozen(*inputs), **ours)
    grads = layer.backward(*frozen(grad_out), ctx)
    assert_near(out, want.detach().numpy())
    for got, tensor in zip(grads[:3], tensors, strict=True):
        assert_near(got, tensor.grad.numpy())
    assert_grads_are_like_parameters(layer)
    for name, grad in grads_of_module(module).items():
        assert_near(layer.grads[name], grad)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("average", [None, True, False])
def test_self_attention_is_that_of_torch(torch, bias, average):
    module, layer = make_pair(torch, bias=bias)
    x, grad_out = normal(3, 40, D), normal(3, 40, D, seed=1)
    tensor = torch.tensor(x, requires_grad=True)
    want, want_weights = module(tensor, tensor, tensor, need_weights=average is not None, average_attn_weights=average)
    want.backward(torch.from_numpy(grad_out))

    if average is None:
        out, ctx = layer.forward(x)
    else:
        (out, weights), ctx = layer.forward(x, need_weights=True, average_weights=average)
        assert_near(weights, want_weights.detach().numpy())
    grads = layer.backward(grad_out, ctx)
    assert_near(out, want.detach().numpy())
    assert_near(grads.query, tensor.grad.numpy())
    assert set(grads[1:]) == {None}
    for name, grad in grads_of_module(module).items():
        assert_near(layer.grads[name], grad)


# Against the formula, for what that module cannot do.


def positions_and_visible(L, S, batch, H, options):
    """Key positions of the queries (*batch, L), and who sees whom (*batch, H, L, S), from the text of `attention`."""
    queries = np.broadcast_to(np.asarray(options.get("query_lengths", L)), batch)
    keys = np.broadcast_to(np.asarray(options.get("key_lengths", S)), batch)
    offset = 0 * keys
    if options.get("is_causal") == "bottom-right":
        offset = keys - queries
    if "query_offset" in options:
        offset = np.broadcast_to(np.asarray(options["query_offset"]), batch)
    positions = offset[..., None] + np.arange(L)
    p, j = positions[..., None, :, None], np.arange(S)
    visible = (np.arange(L)[:, None] < queries[..., None, None, None]) & (j < keys[..., None, None, None])
    if options.get("is_causal"):
        visible = visible & (j <= p)
    left, right = options.get("window", (None, None))
    visible = visible & (p - j <= (np.inf if left is None else left)) & (j - p <= (np.inf if right is None else right))
    if "mask" in options:
        visible = visible & options["mask"]
    return positions, np.broadcast_to(visible, (*batch, H, L, S))


def rotated(torch, x, positions, base=10000.0, dim=None, interleaved=False):
    """x (..., L, E) at positions (..., L): pairs as complex numbers, multiplied by exp(i * angle)."""
    dim = x.shape[-1] if dim is None else dim
    pairs = x[..., :dim].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    angles = torch.from_numpy(positions).double()[..., None] * base ** (-torch.arange(0, dim, 2).double() / dim)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    turned = torch.view_as_real(turned)
    turned = turned if interleaved else turned.transpose(-1, -2)
    return torch.cat([turned.flatten(-2), x[..., dim:]], -1)


def by_formula(torch, layer, parameters, inputs, options):
    """The layer in PyTorch, from the definitions."""

    def project(x, name):
        out = x @ parameters[f"{name}.weight"].T
        return out + parameters[f"{name}.bias"] if layer.bias else out

    tensors = {name: x for name, x in options.items() if isinstance(x, torch.Tensor)}
    options = {name: x.detach().numpy() if name in tensors else x for name, x in options.items()}
    batch = np.broadcast_shapes(*(x.shape[:-2] for x in inputs))
    L, S = inputs[0].shape[-2], inputs[1].shape[-2]
    positions, visible = positions_and_visible(L, S, batch, layer.num_heads, options)
    visible = torch.from_numpy(visible.copy())
    q, k, v = (
        project(x, name).unflatten(-1, (-1, layer.head_dim)).transpose(-2, -3)
        for x, name in zip(inputs, ("q_proj", "k_proj", "v_proj"), strict=True)
    )
    if layer.rotary is not None:
        how = {} if layer.rotary is True else layer.rotary
        q = rotated(torch, q.expand(*batch, *q.shape[-3:]), positions[..., None, :], **how)
        k = rotated(torch, k, np.arange(S), **how)
    repeats = layer.num_heads // layer.num_kv_heads
    k, v = (x.repeat_interleave(repeats, -3) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * options.get("scale", layer.head_dim**-0.5)
    if "softcap" in options:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    if "alibi_slopes" in options:
        distance = np.abs(positions[..., None, :, None] - np.arange(S))
        scores = scores - torch.from_numpy(options["alibi_slopes"][:, None, None] * distance)
    if "bias" in options:
        scores = scores + tensors["bias"]
    scores = scores.masked_fill(~visible, -torch.inf)
    sinks = torch.full((layer.num_heads,), -torch.inf, dtype=torch.float64)
    sinks = tensors.get("sinks", sinks)[:, None, None].expand(*scores.shape[:-1], 1)
    seen = visible.any(-1, keepdim=True)
    scores = torch.cat([scores, sinks], -1).masked_fill(~seen, 0)
    weights = (torch.softmax(scores, -1) * seen)[..., :-1]
    return project((weights @ v).transpose(-2, -3).flatten(-2), "out_proj")


SLOPES = 2.0 ** -np.arange(1, H + 1)
LENGTHS = np.array([9, 5, 0])
CASES = {
    "grouped heads": ({"num_kv_heads": 2}, {}),
    "one key head": ({"num_kv_heads": 1, "head_dim": 10}, {"is_causal": True}),
    "lengths": ({}, {"key_lengths": LENGTHS, "query_lengths": np.array([6, 0, 3])}),
    "window": ({}, {"window": (2, 1)}),
    "window from an offset": ({}, {"window": (2, None), "query_offset": np.array([3, 0, -2])}),
    "softcap": ({}, {"softcap": 0.5, "scale": 1.5}),
    "alibi": ({"num_kv_heads": 2}, {"alibi_slopes": SLOPES, "is_causal": "bottom-right"}),
    "sinks": ({}, {"sinks": normal(H, seed=8), "is_causal": True, "query_offset": -2}),
    "bias": ({"num_kv_heads": 2}, {"bias": normal(H, 1, 9, seed=9)}),
    "bias for every pair": ({}, {"bias": normal(3, H, 6, 9, seed=9), "mask": ~HIDDEN}),
    "rotary": ({"rotary": True}, {}),
    "rotary, causal": ({"rotary": {"interleaved": True}, "num_kv_heads": 2}, {"is_causal": True}),
    "rotary, in part": ({"rotary": {"dim": 4, "base": 100.0}}, {"query_offset": 3}),
    "rotary, aligned to the end": (
        {"rotary": True},
        {"is_causal": "bottom-right", "key_lengths": LENGTHS, "query_lengths": np.array([4, 5, 0])},
    ),
    "rotary, offsets": ({"rotary": {"interleaved": True}}, {"query_offset": np.array([3, 0, -2]), "is_causal": True}),
    "everything": (
        {"rotary": True, "num_kv_heads": 2, "bias": False},
        {
            "is_causal": True,
            "window": (4, None),
            "query_offset": np.array([3, 0, 2]),
            "softcap": 2.0,
            "alibi_slopes": SLOPES,
            "bias": normal(1, 6, 9, seed=9),
            "sinks": normal(H, seed=8),
            "key_lengths": np.array([9, 5, 1]),
        },
    ),
}  # fmt: skip
# Lengths and leading dimensions of query, key and value; None: not passed.
CALLS = {
    "cross": ((3, 6), (3, 9), (3, 9)),
    "key is value": ((3, 6), (3, 9), None),
    "queries for all": ((6,), (3, 9), None),
    "keys for all": ((3, 6), (9,), (1, 9)),
}


def check(torch, layer, given, options, atol=1e-10):
    """Hold one forward and backward against autograd over the formula."""
    tensors = [None if x is None else torch.tensor(x, requires_grad=True) for x in given]
    key = tensors[0] if tensors[1] is None else tensors[1]
    parameters = {name: torch.tensor(x, requires_grad=True) for name, x in layer.parameters().items()}
    learned = {n: torch.tensor(options[n], requires_grad=True) for n in ("bias", "sinks") if n in options}
    inputs = [tensors[0], key, key if tensors[2] is None else tensors[2]]
    want = by_formula(torch, layer, parameters, inputs, options | learned)
    grad_out = normal(*want.shape, seed=77)
    want.backward(torch.from_numpy(grad_out))

    out, ctx = layer.forward(*given, **options)
    np.testing.assert_array_equal(out, layer(*given, **options))
    assert_near(out, want.detach().numpy(), atol)
    grads = layer.backward(grad_out, ctx)
    for got, tensor in zip(grads[:5], [*tensors, learned.get("bias"), learned.get("sinks")], strict=True):
        assert (got is None) == (tensor is None)
        if got is not None:
            assert_near(got, tensor.grad.numpy(), atol)
    assert_grads_are_like_parameters(layer)
    for name, parameter in parameters.items():
        assert_near(layer.grads[name], parameter.grad.numpy(), atol)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("call", CALLS)
def test_cross_attention_is_that_of_the_formula(torch, case, call):
    made, options = CASES[case]
    layer = layer_with_biases(D, H, **made)
    given = [None if shape is None else normal(*shape, D, seed=n) for n, shape in enumerate(CALLS[call])]
    frozen(*(x for x in (*given, *options.values()) if isinstance(x, np.ndarray)))
    check(torch, layer, given, options)


@pytest.mark.parametrize("case", CASES)
def test_self_attention_is_that_of_the_formula(torch, case):
    made, options = CASES[case]
    layer = layer_with_biases(D, H, **made)
    options = {name: x[..., :6] if name in ("mask", "bias") else x for name, x in options.items()}
    if "key_lengths" in options:
        options["key_lengths"] = np.minimum(options["key_lengths"], 6)
    check(torch, layer, (normal(3, 6, D), None, None), options)


@pytest.mark.parametrize("rotary", [None, True])
def test_features_of_their_own(torch, rotary):
    layer = layer_with_biases(D, H, kdim=10, vdim=10, rotary=rotary)
    check(torch, layer, (normal(3, 6, D), normal(3, 9, 10), None), {})
    layer = layer_with_biases(D, H, kdim=D, vdim=7, rotary=rotary)
    x = normal(3, 6, D)
    check(torch, layer, (x, x, normal(3, 6, 7)), {})


# For itself.


def test_parts_of_self_attention_add_up():
    layer = layer_with_biases(D, H, num_kv_heads=2, rotary=True)
    x, grad_out = normal(3, 6, D), normal(3, 6, D, seed=1)
    (_, whole), (_, two), (_, three) = layer.forward(x), layer.forward(x, x), layer.forward(x, x, x)
    want, of_parameters = layer.backward(grad_out, whole).query, layer.grads
    for ctx in (two, three):
        parts = layer.backward(grad_out, ctx)
        assert_near(sum(part for part in parts[:3] if part is not None), want, 1e-12)
        for name, grad in of_parameters.items():
            assert_near(layer.grads[name], grad, 1e-12)
    assert all(part is not None for part in parts[:3])


@pytest.mark.parametrize("options", [{}, {"rotary": {"interleaved": True}, "num_kv_heads": 2}], ids=str)
def test_float32(options):
    wide = layer_with_biases(96, 6, **options)
    narrow = na.MultiHeadAttention(96, 6, **options)
    narrow.load_parameters(wide.parameters())
    x, grad_out = normal(2, 150, 96), normal(2, 150, 96, seed=1)
    want = wide.backward(grad_out, wide.forward(x, is_causal=True)[1]).query
    out, ctx = narrow.forward(x.astype(np.float32), is_causal=True)
    got = narrow.backward(grad_out.astype(np.float32), ctx).query
    assert out.dtype == got.dtype == np.float32
    assert_grads_are_like_parameters(narrow)
    for one, other in [(got, want), *((narrow.grads[name], wide.grads[name]) for name in wide.grads)]:
        # The 1 is for k_proj.bias, whose gradient is 0 without rotary embedding: it moves all scores of a row alike.
        assert np.abs(one - other).max() < 1e-5 * (1 + np.abs(other).max())


def test_contexts_are_independent_and_last():
    layer = layer_with_biases(D, H, rotary=True)
    first, second, grad_out = normal(3, 6, D), normal(2, 9, D, seed=1), normal(3, 6, D, seed=2)
    _, ctx = layer.forward(first, is_causal=True)
    before = layer.backward(grad_out, ctx).query
    of_first = layer.grads
    kept = {name: x.copy() for name, x in of_first.items()}
    layer(second)
    _, other = layer.forward(second)
    layer.backward(normal(2, 9, D), other)
    assert layer.grads is not of_first
    assert all((layer.grads[name] != kept[name]).any() for name in kept)
    np.testing.assert_array_equal(layer.backward(grad_out, ctx).query, before)
    for name, x in kept.items():
        np.testing.assert_array_equal(layer.grads[name], x)
        np.testing.assert_array_equal(of_first[name], x)


def test_one_step_down_the_gradient_lowers_the_loss():
    layer = layer_with_biases(D, H)
    x, target = normal(3, 6, D), normal(3, 6, D, seed=1)
    losses = []
    for _ in range(5):
        out, ctx = layer.forward(x)
        losses.append(((out - target) ** 2).sum())
        layer.backward(out - target, ctx)
        for name, parameter in layer.parameters().items():
            parameter -= 1e-3 * layer.grads[name]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("options", [{"key_lengths": np.array([9, 4, 1])}, {"key_padding_mask": SCATTERED}], ids=list)
def test_padding_may_hold_anything(options):
    layer = layer_with_biases(D, H, rotary=True)
    query, key, grad_out = normal(3, 6, D), normal(3, 9, D, seed=1), normal(3, 6, D, seed=2)
    padding = PADDING if "key_lengths" in options else SCATTERED
    key[padding] = 0
    want, of_parameters = layer.backward(grad_out, layer.forward(query, key, **options)[1]), layer.grads
    key[padding] = np.nan
    got = layer.backward(grad_out, layer.forward(query, key, **options)[1])
    assert not got.key[padding].any()
    for one, other in zip(got[:2], want[:2], strict=True):
        np.testing.assert_array_equal(one, other)
    for name, x in of_parameters.items():
        np.testing.assert_array_equal(layer.grads[name], x)


def test_padded_queries_may_hold_anything():
    layer = layer_with_biases(D, H)
    x, grad_out, lengths = normal(3, 9, D), normal(3, 9, D, seed=2), np.array([9, 4, 1])
    want = layer.backward(grad_out, layer.forward(x, query_lengths=lengths, key_lengths=lengths)[1]).query
    of_parameters = layer.grads
    x[PADDING] = np.inf
    with np.errstate(invalid="ignore"):
        got = layer.backward(grad_out, layer.forward(x, query_lengths=lengths, key_lengths=lengths)[1]).query
    np.testing.assert_array_equal(got, want)
    for name, gradient in of_parameters.items():
        np.testing.assert_array_equal(layer.grads[name], gradient)


def test_nan_in_the_open_shows():
    layer = layer_with_biases(D, H)
    x = normal(3, 6, D)
    x[0, 2] = np.nan
    layer.backward(normal(3, 6, D), layer.forward(x)[1])
    assert all(np.isnan(layer.grads[name]).all() for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight"))


@pytest.mark.parametrize("shape", [(3, 0), (0, 6)])
def test_nothing_gives_zero(shape):
    layer = layer_with_biases(D, H, rotary=True)
    x = np.zeros((*shape, D))
    out, ctx = layer.forward(x)
    assert layer.backward(out, ctx).query.shape == x.shape
    assert not any(grad.any() for grad in layer.grads.values())


def test_no_keys():
    layer = layer_with_biases(D, H)
    out, ctx = layer.forward(normal(6, D), np.zeros((0, D)))
    np.testing.assert_array_equal(out, np.broadcast_to(layer.parameters()["out_proj.bias"], (6, D)))
    grads = layer.backward(np.ones_like(out), ctx)
    assert not grads.query.any()
    assert grads.key.shape == (0, D)


X = np.zeros((3, 5, D), np.float32)


@pytest.mark.parametrize(
    ("grad_out", "error", "named"),
    [
        (X.tolist(), TypeError, "grad_out must be a numpy.ndarray"),
        (X.astype(np.float64), TypeError, "grad_out must have dtype float32"),
        (X[:, 1:], ValueError, "grad_out must have shape"),
        (X[0], ValueError, "grad_out must have shape"),
    ],
)
def test_bad_grad_out(grad_out, error, named):
    layer = na.MultiHeadAttention(D, H)
    _, ctx = layer.forward(X)
    with pytest.raises(error, match=named):
        layer.backward(grad_out, ctx)
    assert layer.grads == {}


def test_bad_context():
    layer = na.MultiHeadAttention(D, H)
    with pytest.raises(TypeError, match="ctx must be what forward returned"):
        layer.backward(X, layer.forward(X))
    with pytest.raises(ValueError, match="ctx must come from forward of the same layer"):
        na.MultiHeadAttention(D, H).backward(X, layer.forward(X)[1])


@pytest.mark.parametrize("name", ["masks", "backend", "out", "return_lse"])
def test_unknown_option(name):
    with pytest.raises(TypeError, match=rf"forward\(\) got an unexpected keyword argument '{name}'"):
        na.MultiHeadAttention(D, H).forward(X, **{name: None})


@st.composite
def calls(draw):
    """A small layer, its inputs and options."""
    Hkv, E = draw(st.integers(1, 2)), 2 * draw(st.integers(1, 3))
    features = st.integers(1, 5)
    embed, kdim, vdim = draw(features), draw(features), draw(features)
    kind = draw(st.sampled_from(["self", "key", "all"]))
    rotary = draw(st.sampled_from([None, True, {"interleaved": True, "base": 50.0}, {"scaling": 2.0, "dim": 2}]))
    layer = layer_with_biases(
        embed,
        Hkv * draw(st.integers(1, 3)),
        num_kv_heads=Hkv,
        head_dim=E,
        kdim=embed if kind == "self" else kdim,
        vdim={"self": embed, "key": kdim, "all": vdim}[kind],
        bias=draw(st.booleans()),
        rotary=rotary,
        seed=draw(st.integers(0, 99)),
    )
    batch, L, S = draw(st.sampled_from([(), (2,), (2, 1)])), draw(st.integers(1, 5)), draw(st.integers(1, 7))
    query = normal(*batch, L, embed, seed=1)
    key = None if kind == "self" else normal(S, kdim, seed=2)
    value = normal(*batch, S, vdim, seed=3) if kind == "all" else None
    options = {}
    S = L if kind == "self" else S
    if draw(st.booleans()):
        options["is_causal"] = draw(st.sampled_from([True, "bottom-right"]))
    if draw(st.booleans()):
        options["window"] = (draw(st.integers(0, 3)), None)
    if draw(st.booleans()):
        options["query_offset"] = draw(st.integers(-2, 4))
    if draw(st.booleans()):
        options["softcap"] = 1.5
    if draw(st.booleans()):
        options["sinks"] = normal(layer.num_heads, seed=4)
    if draw(st.booleans()):
        options["bias"] = normal(*draw(st.sampled_from([(S,), (L, S), (layer.num_heads, 1, S)])), seed=5)
    if draw(st.booleans()):
        options["key_padding_mask"] = np.random.default_rng(6).random((*batch, S)) < 0.3
    return layer, (query, key, value), options


@given(calls())
def test_slope_along_a_random_direction(call):
    """Gradients of everything at once, times a direction, are the slope of the loss that differences show."""
    layer, given, options = call
    out, ctx = layer.forward(*given, **options)
    grad_out = normal(*out.shape, seed=50)
    found = layer.backward(grad_out, ctx)
    rng = np.random.default_rng(51)
    learned = {name: options[name] for name in ("bias", "sinks") if name in options}
    variables = [*(x for x in given if x is not None), *learned.values(), *layer.parameters().values()]
    grads = [grad for grad in found if grad is not None] + list(layer.grads.values())
    directions = [rng.standard_normal(x.shape) for x in variables]
    starts = [x.copy() for x in variables]

    def loss(step):
        for variable, start, direction in zip(variables, starts, directions, strict=True):
            variable[...] = start + step * direction
        return (layer(*given, **options) * grad_out).sum()

    step = 1e-5
    slope = (loss(step) - loss(-step)) / (2 * step)
    want = sum((grad * direction).sum() for grad, direction in zip(grads, directions, strict=True))
    size = sum(np.abs(grad * direction).sum() for grad, direction in zip(grads, directions, strict=True))
    assert abs(slope - want) < 1e-7 * (1 + size)


# Packed sequences.


@pytest.mark.parametrize("rotary", [None, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"is_causal": "bottom-right", "window": (3, 0)}, {"sinks": normal(H), "softcap": 3.0}],
    ids=lambda o: "-".join(o) or "plain",
)
def test_packed_sequences_as_one_after_the_other(rotary, options):
    """Each sequence alone is checked against PyTorch above."""
    starts = [0, 5, 5, 6, 17]
    packed = layer_with_biases(D, H, num_kv_heads=2, rotary=rotary)
    x, grad_out = frozen(normal(17, D), normal(17, D, seed=1))
    out, ctx = packed.forward(x, cu_seqlens=starts, **options)
    np.testing.assert_array_equal(out, packed(x, cu_seqlens=starts, **options))
    grads = packed.backward(grad_out, ctx)
    assert_grads_are_like_parameters(packed)
    of_parameters, sinks = packed.grads, 0
    sums = {name: np.zeros_like(grad) for name, grad in of_parameters.items()}
    for start, stop in itertools.pairwise(starts):
        one, ctx = packed.forward(x[start:stop], **options)
        assert_near(out[start:stop], one)
        own = packed.backward(grad_out[start:stop], ctx)
        assert_near(grads.query[start:stop], own.query)
        for name, grad in packed.grads.items():
            sums[name] += grad
        sinks = sinks + (0 if own.sinks is None else own.sinks)
    for name, grad in of_parameters.items():
        assert_near(grad, sums[name])
    assert grads.key is grads.value is grads.bias is None
    if "sinks" in options:
        assert_near(grads.sinks, sinks)


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": "bottom-right", "query_lengths": [5, 0, 1, 8]},
        {"is_causal": "bottom-right", "key_lengths": [3, 0, 1, 9]},
        {"is_causal": True, "query_offset": [0, 3, -1, 4]},
        {"query_offset": 2, "window": (3, 1)},
    ],
    ids=lambda o: "-".join(o),
)
def test_packed_queries_are_rotated_to_where_they_are_causal(options):
    """Each sequence alone is checked against PyTorch above; a shift of all positions by one would change nothing."""
    starts = [0, 5, 5, 6, 17]
    packed = layer_with_biases(D, H, num_kv_heads=2, rotary=True)
    x, grad_out = frozen(normal(17, D), normal(17, D, seed=1))
    out, ctx = packed.forward(x, cu_seqlens=starts, **options)
    grads = packed.backward(grad_out, ctx)
    for n, (start, stop) in enumerate(itertools.pairwise(starts)):
        alone = {name: x[n] if isinstance(x, list) else x for name, x in options.items()}
        one, ctx = packed.forward(x[start:stop], **alone)
        assert_near(out[start:stop], one)
        assert_near(grads.query[start:stop], packed.backward(grad_out[start:stop], ctx).query)


def test_packed_sequences_with_dropout():
    """The same mask forward and backward: the gradients are the slope of the loss."""
    layer, x, grad_out = layer_with_biases(D, H, dropout=0.4), normal(9, D), normal(9, D, seed=1)
    options = {"cu_seqlens": [0, 4, 9], "training": True, "seed": 7}
    out, ctx = layer.forward(x, **options)
    assert not np.allclose(out, layer(x, cu_seqlens=[0, 4, 9]))
    grad, step = layer.backward(grad_out, ctx).query, normal(9, D, seed=2)
    slope = [np.sum(layer(x + e * step, **options) * grad_out) for e in (1e-6, -1e-6)]
    np.testing.assert_allclose(np.sum(grad * step), (slope[0] - slope[1]) / 2e-6, rtol=1e-6)


def test_packed_sequences_are_refused():
    layer, x = layer_with_biases(D, H), normal(6, D)
    with pytest.raises(ValueError, match="cu_seqlens is for self-attention"):
        layer.forward(x, x, cu_seqlens=[0, 6])
    with pytest.raises(ValueError, match="cu_seqlens_q must go from 0 to 6"):
        layer.forward(x, cu_seqlens=[0, 5])
    _, ctx = layer.forward(x, cu_seqlens=[0, 2, 6])
    with pytest.raises(ValueError, match="grad_out must have shape"):
        layer.backward(x[:5], ctx)
