"""The layers of examples/nn.py, against finite differences."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import check_grad

pytest.importorskip("threadpoolctl")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import nn

F = np.float64
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 5, 8))
LAYERS = {
    "Linear": nn.Linear(8, 6, 0, F),
    "LayerNorm": nn.LayerNorm(8, F),
    "GELU": nn.GELU(),
    "MLP": nn.MLP(8, 0, F),
    "TransformerBlock": nn.TransformerBlock(8, 2, rotary=True, rng=0, dtype=F),
}


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
