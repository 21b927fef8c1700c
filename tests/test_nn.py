"""The layers beside attention: their formulas in float64, finite differences, and PyTorch's."""

import math

import numpy as np
import pytest
from scipy.optimize import check_grad

from numba_attention import KVCache, nn

F = np.float64
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 5, 8))
LAYERS = {
    "Linear": nn.Linear(8, 6, 0, F),
    "Linear without bias": nn.Linear(8, 6, 0, F, bias=False),
    "LayerNorm": nn.LayerNorm(8, F),
    "RMSNorm": nn.RMSNorm(8, F),
    "GELU": nn.GELU(),
    "GELU with tanh": nn.GELU(approximate=True),
    "SiLU": nn.SiLU(),
    "MLP": nn.MLP(8, 0, F),
    "gated MLP": nn.MLP(8, 0, F, hidden=5, activation="silu", gated=True, bias=False),
    "TransformerBlock": nn.TransformerBlock(8, 2, rotary=True, rng=0, dtype=F),
    "as in LLaMA": nn.TransformerBlock(
        8, 4, rotary=True, rms=True, num_kv_heads=2, rng=0, dtype=F, activation="silu", gated=True
    ),
}


def erf(x):
    return np.vectorize(math.erf)(x)


def test_formulas():
    x = RNG.standard_normal((4, 50)) * 5
    centred = x - x.mean(-1, keepdims=True)
    want = {
        nn.GELU(): x * (1 + erf(x / np.sqrt(2))) / 2,
        nn.GELU(approximate=True): x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
        nn.SiLU(): x / (1 + np.exp(-x)),
        nn.LayerNorm(50, F): centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5),
        nn.RMSNorm(50, F): x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6),
    }
    for layer, y in want.items():
        np.testing.assert_allclose(layer(x), y, rtol=1e-12, atol=1e-12)
    mlp = nn.MLP(50, 0, F, hidden=7, activation="silu", gated=True)
    p = mlp.parameters()
    gate, wide = (x @ p[f"{name}.weight"].T + p[f"{name}.bias"] for name in ("gate", "wide"))
    want = (gate / (1 + np.exp(-gate)) * wide) @ p["narrow.weight"].T + p["narrow.bias"]
    np.testing.assert_allclose(mlp(x), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("order", ["C", "F"])
def test_gelu_and_layer_norm_in_place(order):
    x = np.linspace(-12, 12, 30_000, dtype=np.float32).reshape(100, 300)
    want = x.astype(F) * (1 + erf(x.astype(F) / np.sqrt(2))) / 2
    np.testing.assert_allclose(nn.gelu(x), want, atol=1e-6)
    y = np.array(x, order=order)
    assert nn.gelu(y, out=y) is y
    np.testing.assert_array_equal(y, nn.gelu(x))
    x = RNG.standard_normal((100, 300)).astype(np.float32)
    weight, bias = RNG.standard_normal((2, 300)).astype(np.float32)
    want = nn.layer_norm(x.astype(F), weight.astype(F), bias.astype(F))
    z = np.array(x, order=order)
    assert nn.layer_norm(z, weight, bias, out=z) is z
    np.testing.assert_allclose(z, want, atol=1e-5)
    assert z.dtype == nn.layer_norm(x, weight, None).dtype == np.float32


def test_layers_in_lists_have_names():
    class Model(nn.Module):
        def __init__(self):
            self.first, self.blocks = nn.Linear(4, 4, 0), [nn.LayerNorm(4), nn.MLP(4, 0)]

    names = list(Model().parameters())
    assert names[:4] == ["first.weight", "first.bias", "blocks.0.weight", "blocks.0.bias"]
    assert "blocks.1.wide.weight" in names


class Nested(nn.Module):
    """Layers in containers of containers, one of them met twice, and an array that two layers share."""

    def __init__(self, rng=0):
        self.embed = nn.Embedding(6, 4, rng)
        self.deep = [({"a": nn.Linear(4, 4, rng, bias=False)},), 3, None]
        self.heads = {"x": nn.LayerNorm(4), 1: [nn.MLP(4, rng, hidden=2)]}
        self.again = self.deep[0][0]["a"]
        self.inside = nn.MLP(4, rng)
        self.inside.narrow = self.again
        self.out = nn.Linear(4, 6, rng, bias=False)
        self.out.weight = self.embed.weight
        self.bare = np.ones(3)


def test_layers_in_containers_are_listed_once():
    model = Nested()
    assert list(model.parts()) == ["embed", "deep.0.0.a", "heads.x", "heads.1.0", "inside", "out"]
    names = list(model.parameters())
    assert names[:4] == ["embed.weight", "deep.0.0.a.weight", "heads.x.weight", "heads.x.bias"]
    assert names[4:] == [f"{mlp}.{name}" for mlp, name in (
        ("heads.1.0", "wide.weight"), ("heads.1.0", "wide.bias"), ("heads.1.0", "narrow.weight"),
        ("heads.1.0", "narrow.bias"), ("inside", "wide.weight"), ("inside", "wide.bias"),
    )]  # fmt: skip
    x = np.ones((3, 4), np.float32)
    for layer in (model.again, model.out):
        y, ctx = layer.forward(x)
        layer.backward(np.ones_like(y), ctx)
    y, ctx = model.embed.forward([0, 5])
    model.embed.backward(np.ones_like(y), ctx)
    assert list(model.grads) == ["embed.weight", "deep.0.0.a.weight"]
    np.testing.assert_array_equal(model.grads["embed.weight"][:, 0], [4, 3, 3, 3, 3, 4])
    np.testing.assert_array_equal(model.grads["deep.0.0.a.weight"], 3)


def test_parameters_are_saved_and_loaded(tmp_path):
    model, other = Nested(0), Nested(1)
    np.savez(tmp_path / "model.npz", **model.parameters())
    kept = {name: x.copy() for name, x in other.parameters().items()}
    for change, message in (
        ({"more": np.ones(1)}, "names that this layer does not: more"),
        ({"deep.0.0.a.weight": np.ones((2, 2))}, r"deep.0.0.a.weight must have shape \(4, 4\), got \(2, 2\)"),
        ({"embed.weight": np.full((6, 4), 1e300)}, "embed.weight must fit in the float32 of the layer"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_parameters(model.parameters() | change)
    with pytest.raises(ValueError, match="parameters lack deep"):
        other.load_parameters({})
    for name, x in other.parameters().items():
        np.testing.assert_array_equal(x, kept[name])
    with np.load(tmp_path / "model.npz") as arrays:
        other.load_parameters(arrays)
    for name, x in model.parameters().items():
        np.testing.assert_array_equal(other.parameters()[name], x, err_msg=name)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(0, 4), ValueError, "inputs must be positive, got 0"),
        (lambda: nn.Linear(3, True), TypeError, "outputs must be an integer, got True"),
        (lambda: nn.Linear(3.0, 4), TypeError, r"inputs must be an integer, got 3\.0"),
        (lambda: nn.Linear(3, 4, dtype=int), TypeError, "dtype must be float32 or float64"),
        (lambda: nn.Embedding(-1, 4), ValueError, "tokens must be positive"),
        (lambda: nn.Embedding(4, 4, dtype=np.float16), TypeError, "dtype must be float32 or float64"),
        (lambda: nn.LayerNorm(0), ValueError, "features must be positive"),
        (lambda: nn.RMSNorm(4, int), TypeError, "dtype must be float32 or float64"),
        (lambda: nn.MLP(4, hidden=2.5), TypeError, r"hidden must be an integer, got 2\.5"),
        (lambda: nn.MLP("4"), TypeError, "features must be an integer, got '4'"),
        (lambda: nn.TransformerBlock(True, 1), TypeError, "features must be an integer, got True"),
    ],
)
def test_sizes_and_dtypes(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_misuse():
    with pytest.raises(ValueError, match="activation must be one of gelu, gelu_tanh, silu, got 'relu'"):
        nn.MLP(4, activation="relu")


@pytest.mark.torch
def test_gradients_are_those_of_torch(torch):
    """A block with norms, attention and MLP, from the same numbers."""
    from torch.nn import functional

    block = nn.TransformerBlock(8, 2, rng=0, dtype=F)
    for parameter in block.parameters().values():
        parameter += 0.1 * RNG.standard_normal(parameter.shape)
    p = {name: torch.tensor(x, requires_grad=True) for name, x in block.parameters().items()}
    x = torch.tensor(X, requires_grad=True)

    def heads(y, name):
        y = functional.linear(y, p[f"attention.{name}_proj.weight"], p[f"attention.{name}_proj.bias"])
        return y.reshape(2, 5, 2, 4).swapaxes(1, 2)

    y = functional.layer_norm(x, (8,), p["norm.weight"], p["norm.bias"])
    y = functional.scaled_dot_product_attention(*(heads(y, n) for n in "qkv"), is_causal=True)
    y = y.swapaxes(1, 2).reshape(2, 5, 8)
    y = x + functional.linear(y, p["attention.out_proj.weight"], p["attention.out_proj.bias"])
    z = functional.layer_norm(y, (8,), p["mlp_norm.weight"], p["mlp_norm.bias"])
    z = functional.gelu(functional.linear(z, p["mlp.wide.weight"], p["mlp.wide.bias"]))
    out = y + functional.linear(z, p["mlp.narrow.weight"], p["mlp.narrow.bias"])
    got, ctx = block.forward(X, is_causal=True)
    np.testing.assert_allclose(got, out.detach().numpy(), atol=1e-13)
    grad = RNG.standard_normal(got.shape)
    out.backward(torch.tensor(grad))
    of_x, _ = block.backward(grad, ctx)
    np.testing.assert_allclose(of_x, x.grad.numpy(), atol=1e-12)
    for name, x in block.grads.items():
        np.testing.assert_allclose(x, p[name].grad.numpy(), atol=1e-12, err_msg=name)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_gradients(layer):
    for parameter in layer.parameters().values():
        parameter += 0.1 * RNG.standard_normal(parameter.shape)  # biases too
    y, _ = layer.forward(X)
    grad = RNG.standard_normal(y.shape)

    def loss(x):
        return np.sum(grad * layer.forward(x.reshape(X.shape))[0])

    def gradient(x):
        found = layer.backward(grad, layer.forward(x.reshape(X.shape))[1])
        return (found[0] if isinstance(found, tuple) else found).ravel()

    assert check_grad(loss, gradient, X.ravel()) < 1e-5
    gradient(X)
    assert layer.grads.keys() == layer.parameters().keys()
    for name, parameter in layer.parameters().items():
        old = parameter.copy()

        def moved(values, parameter=parameter, old=old):
            parameter[...] = values.reshape(old.shape)
            value = loss(X)
            parameter[...] = old
            return value

        assert check_grad(moved, lambda _, name=name: layer.grads[name].ravel(), old.ravel()) < 1e-5, name


def test_gradients_of_memory():
    block = nn.TransformerBlock(8, 2, cross=True, rng=0, dtype=F)
    memory, grad = RNG.standard_normal((2, 7, 8)), RNG.standard_normal(X.shape)
    lengths = np.array([7, 3])

    def loss(values):
        return np.sum(grad * block.forward(X, values.reshape(memory.shape), memory_lengths=lengths, is_causal=True)[0])

    def gradient(values):
        _, ctx = block.forward(X, values.reshape(memory.shape), memory_lengths=lengths, is_causal=True)
        return block.backward(grad, ctx)[1].ravel()

    assert check_grad(loss, gradient, memory.ravel()) < 1e-5
    assert not gradient(memory).reshape(memory.shape)[1, 3:].any()


def test_embedding():
    layer = nn.Embedding(5, 3, 0, F)
    tokens = np.array([[0, 4, 4], [1, 0, 0]])
    y, ctx = layer.forward(tokens)
    np.testing.assert_array_equal(y, layer.weight[tokens])
    grad = RNG.standard_normal(y.shape)
    layer.backward(grad, ctx)
    want = np.zeros((5, 3))
    np.add.at(want, tokens, grad)
    np.testing.assert_allclose(layer.grads["weight"], want)


def test_cross_entropy():
    scores, target = RNG.standard_normal((2, 4, 6)), RNG.integers(0, 6, (2, 4))
    mask = np.array([[True, True, False, True], [True, False, False, False]])

    def loss(x):
        return nn.cross_entropy(x.reshape(scores.shape), target, mask)[0]

    def gradient(x):
        return nn.cross_entropy(x.reshape(scores.shape), target, mask)[1].ravel()

    assert check_grad(loss, gradient, scores.ravel()) < 1e-6
    assert not gradient(scores).reshape(scores.shape)[~mask].any()
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    want = -np.log(np.take_along_axis(probabilities, target[..., None], -1)[..., 0])[mask].mean()
    assert loss(scores) == pytest.approx(want)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_cross_entropy_of_scores_that_are_far_apart(dtype):
    loss, grad = nn.cross_entropy(np.array([[0, 500], [300, 0]], dtype), np.array([0, 0]))
    assert loss == 250  # the mean of 500 and 0; exp(-500) is 0
    np.testing.assert_allclose(grad, [[-0.5, 0.5], [0, 0]], atol=1e-100)
    assert grad.dtype == dtype


def test_cross_entropy_leaves_rows_out():
    scores = np.array([[np.nan, np.inf, 0], [0, 0, 0]])
    loss, grad = nn.cross_entropy(scores, np.array([-100, 1]), np.array([False, True]))
    assert loss == pytest.approx(math.log(3))
    np.testing.assert_allclose(grad, [[0, 0, 0], [1 / 3, -2 / 3, 1 / 3]])
    for nothing in (scores, scores[:0]):
        loss, grad = nn.cross_entropy(nothing, np.full(len(nothing), -100), np.zeros(len(nothing), bool))
        assert loss == 0
        assert grad.shape == nothing.shape
        assert not grad.any()


@pytest.mark.parametrize(
    ("target", "mask", "error", "message"),
    [
        ([0, -100], None, ValueError, "target must lie between 0 and 2, got -100"),
        ([0, 3], None, ValueError, "target must lie between 0 and 2, got 3"),
        ([0.0, 1.0], None, TypeError, "target must be integer"),
        ([0, 1, 2], None, ValueError, "target must have the shape"),
        ([0, 1], [1, 0], TypeError, "mask must be boolean"),
        ([0, 1], [True, False, True], ValueError, "mask of shape"),
    ],
)
def test_cross_entropy_refuses(target, mask, error, message):
    with pytest.raises(error, match=message):
        nn.cross_entropy(np.zeros((2, 3)), target, mask)


@pytest.mark.parametrize(
    ("tokens", "error"), [([-1], ValueError), ([5], ValueError), ([1.0], TypeError), ([True], TypeError)]
)
def test_embedding_refuses(tokens, error):
    with pytest.raises(error, match="tokens must"):
        nn.Embedding(5, 3, 0)(tokens)


def test_embedding_of_lists():
    layer = nn.Embedding(5, 3, 0, F)
    y, ctx = layer.forward([[1], [1]])
    layer.backward(np.ones_like(y), ctx)
    np.testing.assert_array_equal(layer.grads["weight"], np.eye(5)[1][:, None] * 2 * np.ones(3))
    assert layer([]).shape == (0, 3)


@pytest.mark.parametrize(
    ("grads", "message"), [({}, "lacks x"), ({"x": np.ones(1)}, r"gradient of x must have its shape, \(2,\)")]
)
def test_adam_refuses(grads, message):
    x = np.array([3.0, -2.0])
    adam = nn.Adam({"x": x})
    with pytest.raises(ValueError, match=message):
        adam.step(grads)
    assert adam.steps == 0
    np.testing.assert_array_equal(x, [3, -2])


def test_adam_shortens_the_gradients_of_its_own_parameters():
    steps = []
    for others in ({}, {"frozen": np.full(4, 1e6)}):
        x = {"x": np.array([0.0])}
        adam = nn.Adam(x, rate=0.1, clip=1.0)
        adam.step({"x": np.array([0.5])} | others)
        adam.step({"x": np.array([-0.1])} | others)
        steps.append(x["x"])
    np.testing.assert_array_equal(*steps)


@pytest.mark.parametrize("dtype", [np.float32, F])
@pytest.mark.parametrize("layer", [nn.GELU(), nn.GELU(approximate=True), nn.SiLU()])
@np.errstate(all="raise", under="ignore")
def test_slopes_of_large_numbers(layer, dtype):
    x = np.array([-1e30, -2e4, 2e4, 1e30], dtype)
    np.testing.assert_array_equal(layer.backward(np.ones_like(x), x), [0, 0, 1, 1])


X4, W4 = np.ones((2, 3), np.float32), np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (nn.linear, (X4[:, :2], W4), r"x must have shape \(..., 3\)"),
        (nn.linear, (X4, W4[0]), r"weight must have shape \(N, K\), got \(3,\)"),
        (nn.linear, (X4, W4, W4[:, :1]), r"bias must have shape \(4,\), got \(4, 1\)"),
        (nn.linear, (X4, W4, W4[0, :1]), r"bias must have shape \(4,\), got \(1,\)"),
        (nn.linear, (X4, W4, None, W4[:3]), r"out must have shape \(2, 4\), got \(3, 3\)"),
        (nn.linear_backward, (W4[:2], X4, W4), r"grad, x and weight must have shapes \(..., N\), \(..., K\) and"),
        (nn.layer_norm, (X4, X4[:, :1], None), r"weight must have shape \(3,\), as x has shape \(2, 3\), got \(2, 1\)"),
        (nn.layer_norm, (X4, X4[0], X4[0, :1]), r"bias must have shape \(3,\)"),
        (nn.layer_norm, (X4, X4[0], None, 1e-5, W4), r"out must have shape \(2, 3\), got \(4, 3\)"),
        (nn.gelu, (X4, W4), r"out must have shape \(2, 3\), got \(4, 3\)"),
        (nn.Linear(3, 4), (W4[:, :2],), r"x must have shape \(..., 3\)"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_shapes_that_do_not_fit(function, arguments, message, dtype):
    arguments = [x.astype(dtype) if isinstance(x, np.ndarray) else x for x in arguments]
    with pytest.raises(ValueError, match=message):
        function(*arguments)


X16 = np.array([[300.0, -200.0, 100.0], [3e4, 2e4, -4e4]], np.float16)  # squares are beyond the range of float16
LARGE, READ_ONLY = np.ones((2, 3), np.float32), np.broadcast_to(np.float32(1), (2, 3))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@np.errstate(all="raise", under="ignore")
def test_norms_of_half_types(dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    x, residual = X16.astype(dtype), X16[::-1].astype(dtype)
    weight, bias = np.array([1, 2, -1], dtype), np.array([0, 1, 2], dtype)
    for added in (None, residual):
        rows = x.astype(F) + (0 if added is None else added.astype(F))
        rows -= rows.mean(-1, keepdims=True)
        want = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-5) * weight.astype(F) + bias.astype(F)
        out = np.empty_like(x)
        got = nn.layer_norm(x, weight, bias, residual=added, out=out)
        assert got is out
        assert got.dtype == nn.layer_norm(x, weight, bias).dtype == x.dtype
        np.testing.assert_allclose(got.astype(F), want, atol=0.02)


def test_a_norm_has_the_dtype_of_its_input():
    x = RNG.standard_normal((4, 3)).astype(np.float32)
    got = nn.layer_norm(x, np.ones(3), np.zeros(3), residual=np.zeros((4, 3)))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got.std(-1), 1, atol=1e-3)


@pytest.mark.parametrize("layer", [nn.GELU(), nn.GELU(approximate=True), nn.SiLU()])
def test_slopes_of_half_types(layer):
    x = np.array([-6e4, -300, -1, 0, 1, 300, 6e4], np.float16)
    got = layer.backward(np.ones_like(x), x)
    assert got.dtype == np.float16
    step = 1e-6
    near = x.astype(F)[2:5]
    numeric = (layer(near + step) - layer(near - step)) / (2 * step)
    np.testing.assert_allclose(got.astype(F), [0, 0, *numeric, 1, 1], atol=2e-3)


def test_a_norm_whose_weight_is_in_its_result():
    """The kernel writes rows while it reads the weight."""
    x = RNG.standard_normal((3, 64)).astype(np.float32)
    rows, weight, bias = x.astype(F), x[0].astype(F), x[1].astype(F)
    rows -= rows.mean(-1, keepdims=True)
    want = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
    nn.layer_norm(x, x[0], x[1], out=x)
    np.testing.assert_allclose(x, want, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.layer_norm(np.arange(6).reshape(2, 3), X4[0], None), TypeError, "x must be floating point"),
        (lambda: nn.layer_norm(np.ma.masked_array(X4), X4[0], None), TypeError, "x is a masked array"),
        (lambda: nn.layer_norm(X4 * 1j, X4[0], None), TypeError, "x must be floating point, got complex64"),
        (lambda: nn.layer_norm(X4, None, None), TypeError, "weight must be"),
        (lambda: nn.layer_norm(X4, X4[0], "ab"), TypeError, "bias must be floating point"),
        (lambda: nn.layer_norm(X4, X4[0], None, residual=[[1.0]]), ValueError, "residual must have the shape of x"),
        (lambda: nn.layer_norm(X4, X4[0], None, eps=-1.0), ValueError, "eps must not be negative"),
        (lambda: nn.layer_norm(X4, X4[0], None, eps="a"), TypeError, "eps must be a real number"),
        (lambda: nn.layer_norm(X4, X4[0], None, out=[1]), TypeError, "out must be a numpy.ndarray"),
        (lambda: nn.layer_norm(X4, X4[0], None, out=READ_ONLY), ValueError, "out must be writeable"),
        (lambda: nn.layer_norm(X4, X4[0], None, out=np.ones((2, 3))), TypeError, "out must have the dtype of x"),
        (lambda: nn.LayerNorm(3, eps=np.nan), ValueError, "eps must be finite"),
        (lambda: nn.RMSNorm(3, eps=-1), ValueError, "eps must not be negative"),
        (lambda: nn.LayerNorm(3)(X4[:, :2]), ValueError, r"x must have shape \(..., 3\), got \(2, 2\)"),
        (lambda: nn.LayerNorm(3).backward(X4[:1], X4), ValueError, "grad must have the shape of what forward"),
        (lambda: nn.GELU().backward(X4[:1], X4), ValueError, "grad must have the shape of what forward"),
        (lambda: nn.Embedding(4, 3).backward(X4, np.arange(3)), ValueError, "grad must have the shape of what forward"),
        (lambda: nn.gelu(X4, out=READ_ONLY), ValueError, "out must be writeable"),
        (lambda: nn.gelu(X4, out=[1]), TypeError, "out must be a numpy.ndarray"),
        (lambda: nn.gelu(X4, out=np.ones((2, 3), int)), TypeError, "out must have the dtype of x"),
        (lambda: nn.linear(np.ma.masked_array(X4), W4), TypeError, "x is a masked array"),
        (lambda: nn.linear(X4, "a"), TypeError, "weight must be an array of numbers"),
        (lambda: nn.linear(X4, W4, activation=["gelu"]), ValueError, "activation must be one of"),
        (lambda: nn.linear(X4, W4, out=[1]), TypeError, "out must be a numpy.ndarray"),
        (
            lambda: nn.linear(X4, W4, out=np.ones((2, 4), int)),
            TypeError,
            "out must have the dtype of the result, float32",
        ),
        (
            lambda: nn.linear(X4, W4, out=np.broadcast_to(np.float32(1), (2, 4))),
            ValueError,
            "out must be writeable",
        ),
        (
            lambda: nn.linear(X4, W4, out=np.lib.stride_tricks.as_strided(np.ones(4, np.float32), (2, 4), (0, 4))),
            ValueError,
            "out must not overlap itself",
        ),
        (lambda: nn.linear_backward(X4, "a", W4), TypeError, "x must be an array of numbers"),
        (lambda: nn.Linear(3, 4, "a"), TypeError, "rng must be a numpy.random.Generator"),
        (lambda: nn.MLP(4, -1), ValueError, "rng must not be negative"),
        (lambda: nn.warmup_cosine("a", 3), TypeError, "step must be a real number"),
        (lambda: nn.warmup_cosine(-5, 10, 3), ValueError, "step must not be negative, got -5"),
        (lambda: nn.Adam({}), ValueError, "parameters must have at least one array, got none"),
        (lambda: nn.Adam(nn.GELU().parameters()), ValueError, "parameters must have at least one array"),
        (lambda: nn.Adam([X4]), TypeError, "parameters must map names to arrays"),
        (lambda: nn.Adam({"x": np.arange(3)}), TypeError, r"parameters\['x'\] must be floating point"),
        (lambda: nn.Adam({"x": READ_ONLY}), ValueError, r"parameters\['x'\] must be writeable"),
        (lambda: nn.Adam({"x": LARGE}, rate=np.nan), ValueError, "rate must be finite"),
        (lambda: nn.Adam({"x": LARGE}, betas=(0.9, 1.0)), ValueError, "betas must be at least 0 and less than 1"),
        (lambda: nn.Adam({"x": LARGE}, betas=0.9), TypeError, "betas must be a pair"),
        (lambda: nn.Adam({"x": LARGE}, decay=-1), ValueError, "decay must not be negative"),
        (lambda: nn.Adam({"x": LARGE}, clip=0), ValueError, "clip must be positive"),
        (lambda: nn.Adam({"x": LARGE}).step({"x": "abcdef"}), TypeError, r"grads\['x'\] must be floating point"),
        (lambda: nn.Adam({"x": LARGE}).step({"x": LARGE}, "a"), TypeError, "scale must be a real number"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_adam_shortens_gradients_whose_squares_overflow():
    x = {"x": np.zeros(2, np.float32)}
    nn.Adam(x, rate=0.1).step({"x": np.array([3e25, -4e25], np.float32)})
    np.testing.assert_allclose(x["x"], [-0.1, 0.1], rtol=1e-5)  # the first step has the length of the rate


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@np.errstate(all="raise", under="ignore")
def test_adam_of_half_types(dtype):
    """Squares of such gradients, and the smallest divisor, are 0 in float16."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    x, wide = {"x": np.zeros((2, 2), dtype)}, {"x": np.zeros((2, 2), np.float32)}
    narrow_adam, wide_adam = (nn.Adam(p, rate=0.125, decay=0.5) for p in (x, wide))
    for size in (1e-5, -3e-5, 0.0):
        grad = np.array([[size, 1e-4], [-size, 0]], dtype)
        narrow_adam.step({"x": grad})
        wide_adam.step({"x": grad.astype(np.float32)})
    assert x["x"].dtype == dtype
    assert narrow_adam.mean["x"].dtype == np.float32
    np.testing.assert_allclose(x["x"].astype(F), wide["x"], atol=4e-3)
    assert x["x"][0, 1] < -0.1


def test_adam_without_clipping():
    x = {"x": np.zeros(1)}
    adam = nn.Adam(x, clip=np.inf)
    adam.step({"x": np.array([100.0])})
    assert adam.mean["x"] == pytest.approx(10)


@pytest.mark.parametrize("x", [np.arange(3), np.ones(3, np.complex64), np.ones(3, bool)])
def test_activations_of_what_is_no_floating_point(x):
    for function in (nn.gelu, nn.SiLU()):
        with pytest.raises(TypeError, match="x must be floating point"):
            function(x)


def test_adam_finds_a_minimum():
    x = {"x": np.array([3.0, -2.0])}
    adam = nn.Adam(x, rate=0.1)
    for step in range(300):
        adam.step({"x": 2 * (x["x"] - 1)}, nn.warmup_cosine(step, 300, 10))
    np.testing.assert_allclose(x["x"], 1, atol=1e-2)


def test_schedule():
    factors = [nn.warmup_cosine(step, 100, 10) for step in range(101)]
    assert factors[0] == 0.1
    assert max(factors) == factors[9] == 1
    assert factors[-1] == pytest.approx(0)
    assert np.all(np.diff(factors[10:]) < 0)
    assert nn.warmup_cosine(150, 100, 10) == nn.warmup_cosine(10**6, 100, 10) == 0


@pytest.mark.parametrize(
    ("cross", "arguments", "message"),
    [
        (True, {}, "memory must be given"),
        (True, {"memory_lengths": [1, 2]}, "memory must be given"),
        (False, {"memory": X}, "memory must be None in a block without cross=True"),
        (False, {"memory_lengths": [1, 2]}, "memory_lengths must be None in a block without cross=True"),
    ],
)
def test_memory_of_a_block(cross, arguments, message):
    block = nn.TransformerBlock(8, 2, cross=cross, rng=0, dtype=F)
    with pytest.raises(ValueError, match=message):
        block(X, **arguments)
    with pytest.raises(ValueError, match=message):
        block.step(X, KVCache(2, 2, 9, 4, dtype=F), **arguments)
