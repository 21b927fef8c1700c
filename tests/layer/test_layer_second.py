"""`jvp` and `double_backward` of the layer: against torch.nn.MultiheadAttention, differences, and symmetry."""

import numpy as np
import pytest
from test_layer_gradients import PADDING, layer_with_biases, normal

import numba_attention as na

D, H = 24, 4
RNG = np.random.default_rng(7)


def like(x):
    return RNG.standard_normal(np.shape(x))


SLOPES, BIAS, SINKS = np.linspace(0.1, 0.5, H), normal(H, 6, 9), normal(H)
POSITIONS = np.array([[0], [5]]) + np.arange(9)
CROSS, SELF = (((3, 6, D), (3, 9, 10), (3, 9, 7)), ((3, 9, D),))
# Name: what makes the layer, shapes of its inputs, options of the call, and which parameters move.
CASES = {
    "self": ({}, SELF, {}, "all"),
    "no bias, causal": ({"bias": False, "num_kv_heads": 2}, SELF, {"is_causal": True}, "all"),
    "cross": ({"kdim": 10, "vdim": 7}, CROSS, {"bias": BIAS, "sinks": SINKS}, "all"),
    "only inputs": ({"kdim": 10, "vdim": 7}, CROSS, {"softcap": 2.0}, ""),
    "only parameters": ({}, SELF, {"key_padding_mask": PADDING}, "only"),
    "value in place of key": ({"kdim": 10, "vdim": 10}, CROSS[:2], {"alibi_slopes": SLOPES}, "all"),
    "rotary": ({"rotary": True}, SELF, {"is_causal": True}, "all"),
    "rotary, positions of each": ({"rotary": True}, ((2, 9, D), (9, D)), {"positions": (POSITIONS, POSITIONS)}, "all"),
    "dropout": ({"dropout": 0.3}, SELF, {"training": True, "seed": 3}, "all"),
    "packed": ({"num_kv_heads": 1}, ((9, D),), {"cu_seqlens": [0, 4, 4, 9]}, "all"),
    "packed, rotary": ({"rotary": True}, ((9, D),), {"cu_seqlens": [0, 2, 9], "is_causal": True}, "all"),
    "leading dimensions": ({"kdim": 10, "vdim": 7}, ((2, 1, 6, D), (3, 9, 10), (1, 1, 9, 7)), {}, "all"),
}


class Call:
    def __init__(self, make, shapes, options, moving):
        self.layer = layer_with_biases(D, H, **make)
        self.inputs = [normal(*shape, seed=n) for n, shape in enumerate(shapes)]
        self.options = options
        self.out, self.ctx = self.layer.forward(*self.inputs, **options)
        self.grad_out = normal(*self.out.shape, seed=9)
        parts = [like(x) for x in self.inputs] if moving != "only" else []
        parts += [None] * (3 - len(parts))
        of_options = [None if options.get(name) is None else like(options[name]) for name in ("bias", "sinks")]
        self.u = na.Gradients(*parts, *of_options)
        self.parameters = {name: like(x) for name, x in self.layer.parameters().items()} if moving else None

    def at(self, t):
        """Output and gradients, where everything has moved by t."""
        layer = self.layer
        before = {name: x.copy() for name, x in layer.parameters().items()}
        for name, x in (self.parameters or {}).items():
            layer.parameters()[name][...] += t * x
        inputs = [x if u is None else x + t * u for x, u in zip(self.inputs, self.u, strict=False)]
        options = dict(self.options)
        for name in ("bias", "sinks"):
            if getattr(self.u, name) is not None:
                options[name] = options[name] + t * getattr(self.u, name)
        out, ctx = layer.forward(*inputs, **options)
        grads = layer.backward(self.grad_out, ctx)
        result = {"out": out, **{n: x for n, x in grads._asdict().items() if x is not None}, **layer.grads}
        layer.load_parameters(before)
        return result

    def double_backward(self):
        grads, moved = self.layer.double_backward(self.u, self.grad_out, self.ctx, parameters=self.parameters)
        return {"out": moved, **{n: x for n, x in grads._asdict().items() if x is not None}, **self.layer.grads}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_differences(case):
    call, t = Call(*case), 1e-5
    got, up, down = call.double_backward(), call.at(t), call.at(-t)
    assert list(got) == list(up)
    for name, x in got.items():
        np.testing.assert_allclose(x, (up[name] - down[name]) / (2 * t), rtol=0, atol=2e-6, err_msg=name)
    np.testing.assert_array_equal(call.layer.jvp(call.u, call.ctx, parameters=call.parameters), got["out"])


@pytest.mark.parametrize("bias", [True, False])
def test_a_penalty_is_that_of_torch(torch, bias):
    """The gradient of a norm of gradients of inputs and parameters."""
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(D, H, batch_first=True, dtype=torch.float64, bias=bias)
    layer = na.MultiHeadAttention.from_torch(module.state_dict(), H)
    x, grad_out = normal(3, 9, D), normal(3, 9, D, seed=1)
    tensor, g = torch.tensor(x, requires_grad=True), torch.tensor(grad_out, requires_grad=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = module(tensor, tensor, tensor, need_weights=False)[0]
    first = torch.autograd.grad(out, (tensor, module.in_proj_weight), g, create_graph=True)
    leaves = (tensor, g, module.in_proj_weight, module.out_proj.weight)
    want = [a.numpy() for a in torch.autograd.grad(sum(a.square().sum() for a in first), leaves)]

    _, ctx = layer.forward(x)
    of_x = layer.backward(grad_out, ctx).query
    of_weights = {name: 2 * w for name, w in layer.grads.items() if name[0] in "qkv" and name.endswith("weight")}
    grads, moved = layer.double_backward(na.Gradients(2 * of_x, None, None), grad_out, ctx, parameters=of_weights)
    joined = np.concatenate([layer.grads[f"{n}_proj.weight"] for n in "qkv"])
    for got, expected in zip((grads.query, moved, joined, layer.grads["out_proj.weight"]), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


def test_padding_may_be_anything():
    call = Call({}, SELF, {"key_padding_mask": PADDING, "query_lengths": [9, 4, 1]}, "all")
    hidden = PADDING[..., None]
    call.grad_out[np.broadcast_to(hidden, call.out.shape)] = 0
    want = call.double_backward()
    x, u = (np.where(hidden, np.nan, a) for a in (call.inputs[0], call.u.query))
    _, ctx = call.layer.forward(x, **call.options)
    grads, moved = call.layer.double_backward(call.u._replace(query=u), call.grad_out, ctx, parameters=call.parameters)
    np.testing.assert_array_equal(grads.query, want["query"])
    np.testing.assert_array_equal(moved[~PADDING], want["out"][~PADDING])
    for name, x in call.layer.grads.items():
        np.testing.assert_array_equal(x, want[name], err_msg=name)


def test_float32_and_nothing_is_modified():
    layer = na.MultiHeadAttention(D, H, num_kv_heads=2, rotary=True, rng=0)
    x, u, g = (normal(5, D, seed=n).astype(np.float32) for n in range(3))
    _, ctx = layer.forward(x)
    held = [x, u, g, ctx.q, ctx.k, ctx.v, ctx.heads, ctx.lse, *layer.parameters().values()]
    before = [a.copy() for a in held]
    grads, moved = layer.double_backward(na.Gradients(u, None, None), g, ctx, parameters={"out_proj.bias": x[0]})
    assert {a.dtype for a in (grads.query, moved, *layer.grads.values())} == {np.dtype(np.float32)}
    for a, old in zip(held, before, strict=True):
        np.testing.assert_array_equal(a, old)


LAYER = na.MultiHeadAttention(8, 2, rng=0)
X = np.ones((5, 8), np.float32)
CTX = LAYER.forward(X)[1]
WRONG = {
    "no Gradients": (lambda: LAYER.jvp(X, CTX), TypeError, "tangents must be a numba_attention.Gradients"),
    "shape": (
        lambda: LAYER.jvp(na.Gradients(X[1:], None, None), CTX), ValueError, r"tangents.query must have shape \(5, 8\)",
    ),
    "key": (
        lambda: LAYER.jvp(na.Gradients(None, X, None), CTX), ValueError, "tangents.key must be None without key",
    ),
    "bias": (
        lambda: LAYER.double_backward(na.Gradients(X, None, None, X), X, CTX), ValueError,
        "grad_grads.bias must be None without bias",
    ),
    "grad_out": (
        lambda: LAYER.double_backward(na.Gradients(X, None, None), X[1:], CTX), ValueError,
        r"grad_out must have shape \(5, 8\)",
    ),
    "name": (
        lambda: LAYER.jvp(na.Gradients(X, None, None), CTX, parameters={"q.weight": X}), ValueError,
        "parameters must have names of parameters, q_proj.weight, .* got 'q.weight'",
    ),
    "parameter": (
        lambda: LAYER.jvp(na.Gradients(X, None, None), CTX, parameters={"q_proj.weight": X}), ValueError,
        r"parameters\['q_proj.weight'\] must have shape \(8, 8\)",
    ),
    "mapping": (
        lambda: LAYER.jvp(na.Gradients(X, None, None), CTX, parameters=[X]), TypeError, "parameters must be a mapping",
    ),
    "context": (lambda: LAYER.jvp(na.Gradients(X, None, None), None), TypeError, "ctx must be what forward returned"),
    "another layer": (
        lambda: na.MultiHeadAttention(8, 2, rng=0).jvp(na.Gradients(X, None, None), CTX), ValueError,
        "ctx must come from forward of the same layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "words"), WRONG.values(), ids=WRONG)
def test_bad_input(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
