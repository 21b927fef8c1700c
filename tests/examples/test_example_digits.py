"""The vision transformer of examples/digits.py, trained briefly."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import check_grad

pytest.importorskip("sklearn")
pytest.importorskip("threadpoolctl")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import digits


@pytest.fixture(scope="module")
def trained():
    (images, answers), (test_images, test_answers) = digits.load()
    rng = np.random.default_rng(0)
    model = digits.VisionTransformer(features=32, rng=rng)
    digits.train(model, images, answers, 15, rng, batch=64, tell=lambda text: None)
    return model, test_images, test_answers


def test_split():
    (images, _), (test_images, _) = digits.load()
    assert len(images) == 1437
    assert len(test_images) == 360
    assert images.min() == 0
    assert images.max() == 1
    again = digits.load()[1][0]
    np.testing.assert_array_equal(test_images, again)


def test_patches_and_back():
    images = np.random.default_rng(0).random((3, 8, 8))
    patches = digits.patches_of(images)
    np.testing.assert_array_equal(patches[1, 5], images[1, 2:4, 2:4].ravel())
    np.testing.assert_array_equal(digits.images_of(patches), images)


def test_gradient_of_the_whole_model():
    model = digits.VisionTransformer(8, 2, 2, rng=0, dtype=np.float64)
    images = np.random.default_rng(0).random((2, 8, 8))
    answers = np.array([3, 7])

    def loss(x):
        return digits.cross_entropy(model.forward(x.reshape(images.shape))[0], answers)[0]

    def gradient(x):
        scores, ctx = model.forward(x.reshape(images.shape))
        return model.backward(digits.cross_entropy(scores, answers)[1], ctx).ravel()

    assert check_grad(loss, gradient, images.ravel()) < 1e-6
    assert model.grads.keys() == model.parameters().keys()
    for name, parameter in model.parameters().items():
        direction = np.random.default_rng(1).standard_normal(parameter.shape)
        values = []
        for step in (1e-5, -2e-5, 1e-5):
            parameter += step * direction
            values.append(loss(images))
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx(np.sum(model.grads[name] * direction), abs=1e-6), name


def test_learns(trained):
    model, images, answers = trained
    assert digits.accuracy(model, images, answers) > 0.88


def test_is_fooled_by_small_changes(trained):
    model, images, answers = trained
    changed = digits.fool(model, images, answers, 0.1)
    assert np.abs(changed - images).max() <= 0.1 + 1e-6
    assert digits.accuracy(model, changed, answers) < digits.accuracy(model, images, answers) - 0.2
    noise = np.clip(images + 0.1 * np.sign(np.random.default_rng(0).standard_normal(images.shape)), 0, 1)
    noisy = digits.accuracy(model, noise.astype(np.float32), answers)
    assert digits.accuracy(model, changed, answers) < noisy - 0.2  # as much noise does far less


def test_pictures(trained, tmp_path):
    pytest.importorskip("matplotlib")
    model, images, answers = trained
    weights = model.attention(images[:3])
    assert weights.shape == (3, 4, 16)
    assert (weights.sum(-1) <= 1 + 1e-5).all()
    digits.draw(model, images, answers, digits.fool(model, images, answers, 0.1), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"digits-attention.png", "digits-fooled.png"}
    assert all(path.stat().st_size > 3000 for path in tmp_path.iterdir())
