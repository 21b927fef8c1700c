"""Right values at any magnitude, from textbook formulas in float64 on plain arrays, without any of the package's own.

Magnitudes are no powers of two, because products of those are exact and hide how a maximum was rounded.
"""

import ml_dtypes
import numpy as np
import pytest

import numba_attention as na

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype("f4"), "float64": np.dtype("f8"), "float16": np.dtype("f2"), "bfloat16": BFLOAT16}
BACKENDS = ["cpu", "reference"]
ERROR = {"float32": 1e-5, "float64": 1e-13, "float16": 1e-3, "bfloat16": 1e-2}  # relative to the largest result


def textbook(query, key, value, scale, bias=0.0, visible=None):
    """Return output, lse and weights: softmax(scale * q k^T + bias) v, scaled first, in float64."""
    query, key, value = (np.asarray(x).astype(np.float64) for x in (query, key, value))
    small, large = (scale, 1.0) if abs(scale) < 1 else (1.0, scale)
    scores = large * ((small * query) @ np.swapaxes(key, -1, -2)) + bias
    if visible is not None:
        scores = np.where(visible, scores, -np.inf)
    highest = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    weights /= total
    return weights @ value, (highest + np.log(total))[..., 0], weights


def normal(seed, *shape, dtype="f8", size=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(dtype)


def close(got, want, relative):
    got = np.asarray(got).astype(np.float64)
    assert np.isfinite(got).all(), "finite inputs give finite results"
    # By way of a common factor, so that no difference overflows.
    size = max(np.abs(want).max(), 1e-300)
    error = np.abs(got / size - want / size).max()
    assert error <= relative, f"relative error {error:.3g} exceeds {relative:.3g}"


def one_hot_enough(weights):
    """Whether no row is so near a tie that the rounding of huge scores decides it."""
    ordered = np.sort(weights, axis=-1)
    return ordered[..., -1] > 1 - 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [3e4, 1e5, 7e6, 3e12, 9e17])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("rows", [64, 1])
def test_features_that_nobody_normalised(name, size, rows, backend):
    dtype = DTYPES[name]
    key = normal(0, 1, 2, 65, 16, dtype=dtype, size=size)
    query, value = key[:, :, :rows], normal(1, 1, 2, 65, 8, dtype=dtype)
    out, lse = na.attention(query, key, value, return_lse=True, backend=backend)
    want, want_lse, weights = textbook(query, key, value, 0.25)
    assert one_hot_enough(weights).all()
    close(out, want, ERROR[name])
    close(lse, want_lse, 1e-6)
    close(na.attention_weights(query, key, backend=backend), weights, ERROR[name])


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("magnitude", [1e9, 3e9, 1.7e10, 1e19, 7e25, 2.9e37])
@pytest.mark.parametrize("rows", [40, 1])
def test_scores_that_differ_little_at_any_size(name, magnitude, rows):
    """Two keys have the maximum, whose product with the factor is no number, and one has a score far below."""
    dtype = DTYPES[name]
    query = np.full((rows, 1), magnitude).astype(dtype)
    key, value = np.array([[1], [1], [0.25]], dtype), np.array([[1, 10], [3, 10], [5, 5]], dtype)
    out, lse = na.attention(query, key, value, scale=0.77, return_lse=True)
    close(out, np.broadcast_to([2.0, 10.0], out.shape), ERROR[name])
    close(lse, np.full(lse.shape, 0.77 * float(query[0, 0]) + np.log(2)), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-45, -3e-41, 1e-300])
@pytest.mark.parametrize("rows", [65, 3])
def test_scale_of_zero_is_the_mean(name, scale, rows, backend):
    dtype = DTYPES[name]
    query, key, value = (normal(n, 1, 2, 65, 15, dtype=dtype) for n in range(3))
    query = query[:, :, :rows]
    i, j = np.arange(rows)[:, None], np.arange(65)
    visible = {"all": j >= 0, "causal": j <= i, "window": np.abs(i - j) <= 3, "mask": (i + j) % 3 != 1}
    options = {"all": {}, "causal": {"is_causal": True}, "window": {"window": (3, 3)}}
    options["mask"] = {"mask": visible["mask"]}
    for kind, kwargs in options.items():
        seen = np.broadcast_to(visible[kind], (rows, 65)).astype(np.float64)
        weights = seen / seen.sum(axis=1, keepdims=True)
        out, lse = na.attention(query, key, value, scale=scale, return_lse=True, backend=backend, **kwargs)
        close(out, weights @ value.astype(np.float64), ERROR[name])
        np.testing.assert_allclose(lse, np.broadcast_to(np.log(seen.sum(axis=1)), lse.shape), rtol=1e-6, atol=1e-6)
        found = na.attention_weights(query, key, scale=scale, backend=backend, **kwargs)
        close(found, np.broadcast_to(weights, found.shape), ERROR[name])


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("of_query", "of_key"),
    [(3e37, 2e37), (7e30, 1e30), (1.3e20, 3e25), (3e37, 1.7e-36), (1.7e-36, 3e37), (9e-18, 7e-19), (3e-36, 0.7)],
)
@pytest.mark.parametrize("rows", [40, 2])
def test_scale_that_brings_scores_back(name, of_query, of_key, sign, rows):
    """Products beyond the range of the type, above and below, that the scale makes scores of a few units."""
    dtype = DTYPES[name]
    if name == "bfloat16" and min(of_query, of_key, of_query * of_key) < 1e-33:
        pytest.skip("the processor takes bfloat16 numbers and products below 1.2e-38 as 0")
    query, key = normal(0, rows, 16, dtype=dtype, size=of_query / 16), normal(1, 70, 16, dtype=dtype, size=of_key / 16)
    value, scale = normal(2, 70, 8, dtype=dtype), sign * 256 / of_query / of_key
    for kwargs in ({}, {"is_causal": "bottom-right"}):
        visible = None if not kwargs else np.arange(70) <= np.arange(rows)[:, None] + 70 - rows
        out, lse = na.attention(query, key, value, scale=scale, return_lse=True, **kwargs)
        want, want_lse, weights = textbook(query, key, value, scale, visible=visible)
        close(out, want, ERROR[name])
        np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-4)
        close(na.attention_weights(query, key, scale=scale, **kwargs), weights, ERROR[name])


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0}, {"alibi_slopes": np.array([0.5])}, {"sinks": np.array([2.0])}]
)
@pytest.mark.parametrize("scale", [1e-60, -0.77, 1e-12, 0.0, 5e4])
def test_options_beside_any_scale(options, scale):
    query, key = normal(0, 1, 40, 16, dtype="f4"), normal(1, 1, 40, 16, dtype="f4", size=min(1e20, 0.1 / (scale or 1)))
    value = normal(2, 1, 40, 8, dtype="f4")
    small, large = (scale, 1.0) if abs(scale) < 1 else (1.0, scale)
    scores = large * ((small * query.astype("f8")) @ np.swapaxes(key.astype("f8"), 1, 2))
    if "softcap" in options:
        scores = 3 * np.tanh(scores / 3)
    if "alibi_slopes" in options:
        scores = scores - 0.5 * np.abs(np.arange(40)[:, None] - np.arange(40))
    weights = np.exp(scores)
    total = weights.sum(axis=-1, keepdims=True) + (np.exp(2.0) if "sinks" in options else 0)
    out, lse = na.attention(query, key, value, scale=scale, return_lse=True, **options)
    close(out, weights / total @ value.astype("f8"), 1e-5)
    np.testing.assert_allclose(lse, np.log(total[..., 0]), rtol=1e-5, atol=1e-5)


def test_biases_near_the_lowest_number_differ():
    query = key = np.zeros((40, 4), np.float32)
    value, low = np.array([[1.0], [2.0]], np.float32), float(np.finfo(np.float32).min)
    bias = np.array([-3e38, low], np.float32)
    for rows in (40, 1):
        out, lse = na.attention(query[:rows], key[:2], value, bias=bias, return_lse=True)
        assert np.all(out == 1)
        np.testing.assert_allclose(lse, -3e38, rtol=1e-6)
        _, lse = na.attention(query[:rows], key[:2], value, bias=np.full(2, low, np.float32), return_lse=True)
        np.testing.assert_allclose(lse, low, rtol=1e-6)
        # A negative score beside it does not hide the key.
        out = na.attention(query[:rows] + 1e18, key[:2] - 1e18, value, bias=np.full(2, low, np.float32))
        np.testing.assert_allclose(out, 1.5)
