"""Right values at any magnitude, from textbook formulas in float64 on plain arrays, without any of the package's own.

Magnitudes are no powers of two, because products of those are exact and hide how a maximum was rounded.
"""

import itertools

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


@pytest.mark.parametrize("end", [1.25, 2.5, 5, 12])
@pytest.mark.parametrize("cap", [4e9, 2e10, 4e10])
def test_a_cap_of_huge_scores(cap, end):
    """Pairs of neighbours around the end of an interval of the table: the larger score may have the lower result."""
    middle = np.float32((end - 1) * 0.625 * cap)
    numbers = np.arange(middle.view("i4") - 3000, middle.view("i4") + 3000, dtype="i4").view("f4")
    query, key = np.ones((1, 20, 1), "f4"), np.stack([numbers[:-1], numbers[1:]], axis=-1)[:, None, :, None]
    value = np.array([[1, 0], [1, 1]], "f4")[None, None]
    out, lse = na.attention(query, key, value, scale=1.0, softcap=cap, return_lse=True)
    highest = cap * np.tanh(key[:, :, 1:, 0].astype("f8") / cap)
    close(lse, np.broadcast_to(highest, lse.shape), 1e-6)
    close(out[..., 0], np.ones(out.shape[:-1]), 1e-6)
    assert out[..., 1].min() >= 0
    assert out[..., 1].max() <= 1


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", [-1e300, 1e300])
def test_biases_beyond_the_compute_type_are_clamped(low, backend):
    """Beside float32 data they count as its largest numbers, in `lse` and in the gradients too."""
    query, key, value = (
        np.zeros((1, 8, 4), np.float32),
        np.zeros((1, 6, 4), np.float32),
        normal(1, 1, 6, 3, dtype=np.float32),
    )
    bias, limit = np.full((8, 6), low), float(np.finfo(np.float32).max)
    out, lse = na.attention(query, key, value, bias=bias, return_lse=True, backend=backend)
    close(out, np.broadcast_to(value.mean(1, keepdims=True), out.shape), 1e-6)
    close(lse, np.full(lse.shape, np.copysign(limit, low)), 1e-6)
    grads = na.attention_backward(np.ones_like(out), query, key, value, out, lse, bias=bias, backend=backend)
    close(grads.value, np.full(value.shape, 8 / 6), 1e-6)


def textbook_gradients(grad_out, query, key, value, scale, bias=0.0):
    grad_out, query, key, value = (np.asarray(x).astype(np.float64) for x in (grad_out, query, key, value))
    weights = textbook(query, key, value, scale, bias)[2]
    of_weights = grad_out @ np.swapaxes(value, -1, -2)
    of_scores = weights * (of_weights - (weights * of_weights).sum(axis=-1, keepdims=True))
    of_query, of_key = (scale * of_scores) @ key, np.swapaxes(scale * of_scores, -1, -2) @ query
    return of_query, of_key, np.swapaxes(weights, -1, -2) @ grad_out, of_scores


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("low", [-1e4, -1e9, -3e37, "lowest", 1e9])
def test_gradients_of_rows_whose_every_score_is_far_away(name, low, backend):
    """Padding as people write it. Scores of 0 leave no rounding beside the bias: weights are 1/S."""
    dtype = DTYPES[name]
    low = float(ml_dtypes.finfo(dtype).min) if low == "lowest" else low
    rows, keys = 70, 130
    query, key, value = np.zeros((rows, 8), dtype), normal(1, keys, 8, dtype=dtype), normal(2, keys, 8, dtype=dtype)
    bias = np.zeros((rows, keys), dtype)
    bias[30:] = low
    grad_out = normal(3, rows, 8, dtype=dtype)
    out, lse = na.attention(query, key, value, bias=bias, return_lse=True, backend=backend)
    close(lse, np.where(np.arange(rows) < 30, 0, float(bias[-1, 0])) + np.log(keys), 1e-6)
    grads = na.attention_backward(grad_out, query, key, value, out, lse, bias=bias, backend=backend)
    want = textbook_gradients(grad_out, query, key, value, 8**-0.5)
    for got, exact in zip((grads.query, grads.value, grads.bias), (want[0], want[2], want[3]), strict=True):
        close(got, exact, 3 * ERROR[name])
    # A part of a row, with the lse of a whole that has as many keys again, where lse can hold that.
    if abs(low) < 1e5:
        lse += lse.dtype.type(np.log(2))
        part = na.attention_backward(grad_out, query, key, value, out, lse, bias=bias, backend=backend)
        close(part.value, want[2] / 2, 0.01)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("size", [3e4, 7e6, 9e12])
@pytest.mark.parametrize("rows", [64, 20])
def test_gradients_of_features_that_nobody_normalised(name, size, rows):
    dtype = DTYPES[name]
    query, key = (normal(n, 2, 64, 16, dtype=dtype, size=size) for n in range(2))
    query, value, grad_out = query[:, :rows], normal(2, 2, 64, 8, dtype=dtype), normal(3, 2, rows, 8, dtype=dtype)
    out, lse = na.attention(query, key, value, return_lse=True)
    grads = na.attention_backward(grad_out, query, key, value, out, lse)
    want = textbook_gradients(grad_out, query, key, value, 0.25)
    close(grads.value, want[2], ERROR[name])
    for got, operand in ((grads.query, key), (grads.key, query)):
        # The exact gradient is 0, and what is left is the rounding of two equal numbers, times an input.
        assert np.abs(got.astype(np.float64) - 0).max() <= 20 * ERROR[name] * np.abs(operand.astype(np.float64)).max()


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_gradients_of_scores_that_are_small_differences_of_large_products(name):
    """Where products cancel, a score is known to within the rounding of the products: still no weight is above 1."""
    rng = np.random.default_rng(0)
    size = {"float32": 1e7, "float64": 1e60}[name]
    row = rng.standard_normal(8).astype(name)
    query = (rng.integers(-2, 3, (1, 1, 17, 1)) * row).astype(name)
    key = np.stack([row[[4, 5, 6, 7, 0, 1, 2, 3]], row[[7, 6, 5, 4, 3, 2, 1, 0]]])[None, None]
    key[..., 4:] *= -1  # orthogonal to all queries: every score is 0 but for rounding
    scale = size**4
    value, grad = (rng.standard_normal(x.shape).astype(name) for x in (key, query))
    out, lse = na.attention(query, key, value, scale=scale, return_lse=True)
    dv = na.attention_backward(grad, query, key, value, out, lse, scale=scale).value
    assert (np.abs(dv) <= 1.05 * np.abs(grad).sum(-2, keepdims=True)).all()


@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize(
    ("of_query", "of_key"), [(3e37, 2e37), (7e30, 1e30), (1.3e20, 3e25), (3e37, 1.7e-34), (9e-18, 7e-19)]
)
def test_gradients_beside_a_scale_that_brings_scores_back(name, of_query, of_key):
    dtype = DTYPES[name]
    query, key = normal(0, 40, 16, dtype=dtype, size=of_query / 16), normal(1, 70, 16, dtype=dtype, size=of_key / 16)
    value, grad_out, scale = normal(2, 70, 8, dtype=dtype), normal(3, 40, 8, dtype=dtype), -256 / of_query / of_key
    out, lse = na.attention(query, key, value, scale=scale, return_lse=True)
    grads = na.attention_backward(grad_out, query, key, value, out, lse, scale=scale)
    want = textbook_gradients(grad_out, query, key, value, scale)
    for got, exact in zip((grads.query, grads.key, grads.value), want, strict=False):
        size = np.abs(exact).max()
        floor = 100 * float(np.finfo(dtype).smallest_normal)  # what underflows is lost, and no more than that
        assert np.abs(got - exact).max() <= 1e-5 * size + floor


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("rows", [40, 1])
@pytest.mark.parametrize("keys", [300, 1000, 4500])
def test_values_near_the_largest_number(name, rows, keys):
    dtype = DTYPES[name]
    largest = float(ml_dtypes.finfo(dtype).max)
    query, key = np.zeros((rows, 16), dtype), np.zeros((keys, 16), dtype)
    columns = np.tile([0.88, -0.88, 0.03, 1e-9], 4) * largest
    value = np.broadcast_to(columns, (keys, 16)).astype(dtype)
    out = na.attention(query, key, value).astype(np.float64)
    want = np.broadcast_to(value[0].astype(np.float64), out.shape)
    # bfloat16 weights of a row are rounded one by one.
    np.testing.assert_allclose(out / largest, want / largest, rtol=2 * ERROR[name], atol=1e-30)


@pytest.mark.parametrize("storage", [None, "bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("size", [3e4, 1.7e9, 9e17])
@pytest.mark.parametrize("rows", [1, 40])
def test_caches_of_features_that_nobody_normalised(storage, size, rows):
    """700 keys are two splits. The highest score is that of key 411; two more have it too, and share the weight."""
    keys = np.random.default_rng(0).integers(-6, 7, (700, 16)) / 8
    keys[[5, 411, 600]] = 1
    key, value = (keys * size).astype(np.float32), np.random.default_rng(1).integers(-8, 9, (700, 16)) / 8
    value[:, 0] = 1  # the largest, so that every storage holds the rest nearly exactly
    cache = na.KVCache(1, 1, 700, 16, **({} if storage is None else {"storage": storage}))
    cache.append(key[None, None], value[None, None].astype(np.float32))
    query = np.full((1, 1, rows, 16), size, np.float32)
    out, lse = na.attention_decode(query, cache, scale=0.77, is_causal=False, return_lse=True)
    close(out[0, 0], np.broadcast_to(value[[5, 411, 600]].mean(axis=0), out[0, 0].shape), 0.05)
    close(lse, np.full(lse.shape, 0.77 * 16 * size * size + np.log(3)), 0.02)
    zero = na.attention_decode(query, cache, scale=0.0, is_causal=False)
    close(zero[0, 0], np.broadcast_to(value.mean(axis=0), out[0, 0].shape), 0.05)


def test_packed_sequences_of_features_that_nobody_normalised():
    key = normal(0, 90, 2, 16, dtype="f4", size=7e6)
    query, value, starts = key, normal(1, 90, 2, 16, dtype="f4"), [0, 20, 21, 90]
    for scale in (0.25, 0.0, -3.3):
        out, lse = na.attention_varlen(query, key, value, starts, starts, scale=scale, return_lse=True)
        for first, last in itertools.pairwise(starts):
            arrays = (np.swapaxes(x[first:last], 0, 1) for x in (query, key, value))
            want, want_lse, _ = textbook(*arrays, scale)
            close(out[first:last], np.swapaxes(want, 0, 1), 1e-5)
            np.testing.assert_allclose(lse[:, first:last], want_lse, rtol=1e-5)


def test_merging_parts_of_any_size():
    outs = [np.full((2, 3), x, np.float32) for x in (1.0, 3.0, 5.0)]
    for size in (1e9, 3e19, -3.3e38, 3.3e38):
        lses = [np.full(2, x, np.float32) for x in (size, size, size - abs(size) * 0.02)]
        out, lse = na.merge_attention(outs, lses)
        np.testing.assert_allclose(out, 2)
        np.testing.assert_allclose(lse, size, rtol=1e-6)
    out, _ = na.merge_attention([np.full((2, 3), 3e38, np.float32)] * 5, [np.zeros(2, np.float32)] * 5)
    np.testing.assert_allclose(out, 3e38, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 40])
def test_error_does_not_grow_with_the_number_of_keys(rows):
    """Equal keys (of one row in memory), so that errors of a sum all go one way: 2**24 keys for few queries."""
    query, row = np.zeros((rows, 8), np.float32), np.full(8, 0.7, np.float32)
    errors = []
    for keys in (2**12, 2**24 if rows == 1 else 2**19):
        value = np.broadcast_to(row, (keys, 8))
        out, lse = na.attention(query, value, value, return_lse=True)
        errors.append(np.abs(out.astype(np.float64) / np.float64(row[0]) - 1).max())
        np.testing.assert_allclose(lse, np.log(keys), rtol=3e-7)
    assert errors[1] <= 4 * max(errors[0], 2.0**-24)


def test_error_of_scores_that_rise_all_the_time():
    """The second level of sums is rescaled with every level of the first."""
    keys = 2**16
    query, key = np.ones((40, 1), np.float32), np.linspace(0, 40, keys, dtype=np.float32)[:, None]
    value = normal(0, keys, 4, dtype="f4") + np.float32(1)
    out, lse = na.attention(query, key, value, scale=1.0, return_lse=True)
    want, want_lse, _ = textbook(query, key, value, 1.0)
    close(out, want, 2e-6)
    close(lse, want_lse, 1e-6)


def test_error_of_the_gradient_of_queries_does_not_grow_with_the_number_of_keys():
    query, keys = np.zeros((1, 8), np.float32), 2**18
    key = np.broadcast_to(np.full(8, 0.7, np.float32), (keys, 8))
    value = np.broadcast_to(np.float32([1, 2]), (keys // 2, 2)).reshape(keys, 1) * np.ones(8, np.float32)
    grad_out = np.ones((1, 8), np.float32)
    key = np.where(value[:, :1] == 1, key, -key)
    out, lse = na.attention(query, key, value, return_lse=True)
    grads = na.attention_backward(grad_out, query, key, value, out, lse)
    want = textbook_gradients(grad_out, query, key, value, 8**-0.5)
    close(grads.query, want[0], 2e-6)
    close(grads.value, want[2], 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sink", [-3.4e38, -1e9 - 33, 1e9 + 33])
def test_gradient_of_a_sink_whose_log_sum_exp_is_rounded(sink, backend):
    """The weight of a sink is 1 where no key is seen, or all are far below: dlse arrives as it is."""
    query, key, value = np.ones((1, 5, 4), np.float32), np.ones((1, 3, 4), np.float32), np.ones((1, 3, 2), np.float32)
    options = {"sinks": np.array([sink]), "key_lengths": 0 if sink < 0 else 3, "backend": backend}
    out, lse = na.attention(query, key, value, **options, return_lse=True)
    grads = na.attention_backward(out, query, key, value, out, lse, grad_lse=np.ones_like(lse), **options)
    np.testing.assert_allclose(grads.sinks, [5.0])
