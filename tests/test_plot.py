"""Pictures are rendered, and what is in them is looked at."""

import ml_dtypes
import numpy as np
import pytest

import numba_attention as na

pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg

from numba_attention import plot


def pixels(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def weights(heads=4, L=5, S=7, seed=0):
    q, k = (np.random.default_rng(seed).standard_normal((heads, n, 8)) for n in (L, S))
    return na.attention_weights(q, k)


@pytest.mark.parametrize("heads", [1, 2, 4, 5, 7])
def test_heads(heads):
    maps = weights(heads)
    rows, columns = [f"q{n}" for n in range(5)], [f"k{n}" for n in range(7)]
    figure = plot.heads(maps, rows, columns)
    assert len(figure.axes) == heads
    for n, axis in enumerate(figure.axes):
        np.testing.assert_allclose(axis.images[0].get_array(), maps[n])
        assert axis.get_title() == f"head {n}"
        assert [label.get_text() for label in axis.get_xticklabels()] == columns
        assert [label.get_text() for label in axis.get_yticklabels()] == rows
    assert len(np.unique(pixels(figure).reshape(-1, 3), axis=0)) > 20


def test_one_map_and_titles_and_no_labels():
    (axis,) = plot.heads(weights(1)[0], titles=["mine"]).axes
    assert axis.get_title() == "mine"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_other_dtypes(dtype):
    maps = weights().astype(dtype)
    np.testing.assert_allclose(plot.heads(maps).axes[2].images[0].get_array(), maps[2].astype(np.float64))
    assert np.isfinite(plot.statistics(maps).entropy).all()


def test_darker_is_more():
    figure = plot.heads(np.eye(2))
    (axis,) = figure.axes
    image = pixels(figure)
    height = image.shape[0]

    def colour(column, row):
        x, y = axis.transData.transform((column, row)).astype(int)
        return int(image[height - 1 - y, x].sum())

    assert colour(0, 0) < colour(1, 0)
    assert colour(1, 1) < colour(0, 1)


def test_patches():
    image = np.linspace(0, 1, 64).reshape(8, 8)
    maps = np.zeros((2, 16))
    maps[0, 3] = maps[1, 12] = 0.5
    figure = plot.patches(image, maps, grid=(4, 4))
    first, second, third = figure.axes
    np.testing.assert_array_equal(first.images[0].get_array(), image)
    assert first.get_title() == "image"
    for axis, place in ((second, (0, 3)), (third, (3, 0))):
        over = axis.images[1]
        assert np.unravel_index(np.argmax(over.get_array()), (4, 4)) == place
        assert over.get_extent() == axis.images[0].get_extent()
    assert len(np.unique(pixels(figure).reshape(-1, 3), axis=0)) > 20
    plot.patches(np.zeros((8, 8, 3)), np.zeros((1, 16)), grid=(4, 4))  # nothing attended to, and colours


def test_statistics():
    sharp = np.roll(np.eye(4), 1, axis=1)
    even = np.full((4, 4), 0.25)
    entropy, distance = plot.statistics(np.stack([sharp, even]))
    np.testing.assert_allclose(entropy, [0, 2])
    np.testing.assert_allclose(distance, [(1 + 1 + 1 + 3) / 4, 1.25])
    batched = plot.statistics(np.stack([np.stack([sharp, even])] * 3))
    np.testing.assert_allclose(batched, (entropy, distance))


def test_rows_that_attend_to_nothing_are_left_out():
    maps = np.stack([np.eye(4), np.zeros((4, 4))])
    maps[0, :2] = 0
    maps[0, 2] = 0.25
    entropy, distance = plot.statistics(maps)
    np.testing.assert_allclose(entropy, [1, np.nan])
    np.testing.assert_allclose(distance, [0.5, np.nan])


def test_profile():
    layers = [weights(seed=0), weights(seed=1)]
    (axis,) = plot.profile(layers, titles=["first", "second"]).axes
    assert [len(points.get_offsets()) for points in axis.collections] == [4, 4]
    np.testing.assert_allclose(axis.collections[1].get_offsets()[:, 1], plot.statistics(layers[1]).entropy)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["first", "second"]


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: plot.heads(np.zeros((2, 3, 4, 5))), ValueError, r"weights .*heads, L, S.*\(2, 3, 4, 5\)"),
        (lambda: plot.heads(np.zeros((2, 3, 4), int)), TypeError, "weights .*int64"),
        (lambda: plot.heads(weights(), ["a"]), ValueError, "query_labels must have length 5, got 1"),
        (lambda: plot.heads(weights(), None, ["a"]), ValueError, "key_labels must have length 7, got 1"),
        (lambda: plot.heads(weights(), titles=["a"]), ValueError, "titles must have length 4, got 1"),
        (lambda: plot.patches(np.zeros(8), np.zeros((1, 16)), grid=(4, 4)), ValueError, "image"),
        (lambda: plot.patches(np.zeros((8, 8)), np.zeros((1, 15)), grid=(4, 4)), ValueError, r"weights .*4 \* 4"),
        (lambda: plot.patches(np.eye(8), np.zeros((1, 16)), grid=4), TypeError, "grid must be a pair"),
        (lambda: plot.patches(np.eye(8), np.zeros((1, 16)), grid=(4.0, 4)), TypeError, "rows of grid must be an int"),
        (lambda: plot.patches(np.eye(8), np.zeros((1, 16)), grid=(-4, -4)), ValueError, "rows of grid must be posit"),
        (lambda: plot.patches(np.zeros((0, 8)), np.zeros((1, 16)), grid=(4, 4)), ValueError, r"image .*\(0, 8\)"),
        (lambda: plot.heads(np.ma.masked_array(weights())), TypeError, "weights is a masked array"),
        (lambda: plot.heads([[1.0, 0.0], [1.0]]), ValueError, "weights is not an array"),
        (lambda: plot.heads(weights(), 3), TypeError, "query_labels must be a sequence of str"),
        (lambda: plot.heads(weights(), titles=4), TypeError, "titles must be a sequence of str"),
        (lambda: plot.statistics(np.zeros((4, 4))), ValueError, "weights"),
        (lambda: plot.profile([weights()], titles=["a", "b"]), ValueError, "titles must have length 1, got 2"),
    ],
)
def test_bad_input(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
