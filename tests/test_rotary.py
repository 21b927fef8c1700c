"""apply_rotary: against complex numbers, and the properties that make it a position embedding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numba_attention as na
from cases import DTYPES


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def by_complex_numbers(x, positions, base=10000.0, dim=None, interleaved=False, factor=1.0):
    """Every pair is one number a + ib, times exp(i * angle), in float64 or better."""
    x = np.asarray(x, np.longdouble)
    dim = x.shape[-1] if dim is None else dim
    angles = np.multiply.outer(np.asarray(positions, np.longdouble) / factor, base ** (-np.arange(0, dim, 2) / dim))
    out = x.copy()
    for i in range(dim // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
        turned = (x[..., a] + 1j * x[..., b]) * np.exp(1j * angles[..., i])
        out[..., a], out[..., b] = turned.real, turned.imag
    return out.astype(np.float64)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [None, 2, 6, 10])
@pytest.mark.parametrize("base", [10000.0, 100, 0.5])
def test_is_a_product_of_complex_numbers(interleaved, dim, base):
    x, positions = normal(2, 3, 7, 10), np.arange(7)
    got = na.apply_rotary(x, positions, base=base, dim=dim, interleaved=interleaved)
    want = by_complex_numbers(x, positions, base, dim, interleaved)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)
    if dim is not None:
        np.testing.assert_array_equal(got[..., dim:], x[..., dim:])


POSITIONS = {
    "one for all": 5,
    "negative": -np.arange(7),
    "float": np.linspace(0, 1, 7),
    "unsigned": np.arange(7, dtype=np.uint8),
    "list": [3, 1, 4, 1, 5, 9, 2],
    "of each sequence": np.array([10, 20])[:, None, None] + np.arange(7),
    "of each head": np.arange(3)[:, None],
    "of everything": np.arange(42).reshape(2, 3, 7),
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_positions(positions):
    x = normal(2, 3, 7, 8)
    want = by_complex_numbers(x, np.broadcast_to(positions, x.shape[:-1]))
    np.testing.assert_allclose(na.apply_rotary(x, positions), want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scaling", [4, 4.0, np.float32(4), {"type": "linear", "factor": 4}])
def test_linear_scaling_divides_positions(scaling):
    x = normal(7, 8)
    want = by_complex_numbers(x, np.arange(7), factor=4)
    np.testing.assert_allclose(na.apply_rotary(x, np.arange(7), scaling=scaling), want, rtol=0, atol=1e-13)


def test_ntk_scaling_slows_the_last_pair_by_the_factor_and_the_first_not_at_all():
    x = np.ones((1, 8))
    got = na.apply_rotary(x, 12, dim=6, interleaved=True, scaling={"type": "ntk", "factor": 4.0})
    np.testing.assert_allclose(got, by_complex_numbers(x, 12, 10000 * 4 ** (6 / 4), 6, True), rtol=0, atol=1e-13)
    turned = got[..., ::2] + 1j * got[..., 1::2]
    plain = na.apply_rotary(x, 12, dim=6, interleaved=True)
    plain = plain[..., ::2] + 1j * plain[..., 1::2]
    assert np.isclose(np.angle(turned[0, 0]), np.angle(plain[0, 0]))
    assert np.isclose(np.angle(turned[0, 2] / (1 + 1j)), np.angle(plain[0, 2] / (1 + 1j)) / 4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_dtypes(dtype, interleaved):
    x = normal(3, 50, 64).astype(DTYPES[dtype])
    got = na.apply_rotary(x, np.arange(50), interleaved=interleaved, dim=48)
    assert got.dtype == x.dtype
    want = by_complex_numbers(x.astype(np.float64), np.arange(50), dim=48, interleaved=interleaved)
    # Half a unit in the last place, of results below 8.
    limit = {"float16": 2**-9, "bfloat16": 2**-6, "float32": 1e-6}[dtype]
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=0, atol=limit * 1.01)
    in_place = x.copy()
    assert na.apply_rotary(in_place, np.arange(50), interleaved=interleaved, dim=48, out=in_place) is in_place
    np.testing.assert_array_equal(in_place, got)


def test_far_positions_are_as_exact_in_float32():
    x = normal(1, 64).astype(np.float32)
    for position in (10**5, 10**7, 2**31 - 1):
        want = by_complex_numbers(x, position)
        np.testing.assert_allclose(na.apply_rotary(x, position), want, rtol=0, atol=1e-6)


LAYOUTS = {
    "heads side by side": lambda x: np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1),
    "features apart": lambda x: np.ascontiguousarray(x.T).T,
    "backwards": lambda x: np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_layouts_and_out(layout, interleaved):
    x, positions = normal(3, 50, 8), np.arange(50)
    x.flags.writeable = False
    want = na.apply_rotary(x, positions, interleaved=interleaved, dim=6)
    got = layout(x)
    np.testing.assert_array_equal(na.apply_rotary(got, positions, interleaved=interleaved, dim=6), want)
    out = layout(np.zeros_like(x))
    assert na.apply_rotary(x, positions, interleaved=interleaved, dim=6, out=out) is out
    np.testing.assert_array_equal(out, want)
    na.apply_rotary(got, positions, interleaved=interleaved, dim=6, out=got)
    np.testing.assert_array_equal(got, want)


def test_out_that_shares_memory_in_other_places():
    memory, positions = normal(60, 8), np.arange(50)
    want = na.apply_rotary(memory[:50].copy(), positions, dim=6)
    na.apply_rotary(memory[:50], positions, dim=6, out=memory[10:])
    np.testing.assert_array_equal(memory[10:], want)
    memory = normal(50, 8)
    want = na.apply_rotary(memory.copy(), positions)
    na.apply_rotary(memory, positions, out=memory[:, :])  # the same places through another view
    np.testing.assert_array_equal(memory, want)


def test_longer_than_a_block():
    x, positions = normal(2, 2, 5000, 64).astype(np.float32), np.arange(5000)
    got = na.apply_rotary(x, positions, out=x.copy())
    for rows in (slice(0, 10), slice(2040, 2060), slice(4990, 5000)):
        np.testing.assert_array_equal(got[..., rows, :], na.apply_rotary(x[..., rows, :], positions[rows]))


@pytest.mark.parametrize("shape", [(0, 8), (0, 5, 8), (2, 0, 8)])
def test_nothing(shape):
    x = np.empty(shape, np.float32)
    assert na.apply_rotary(x, np.arange(shape[-2])).shape == shape
    assert na.apply_rotary(x, np.arange(shape[-2]), out=x) is x


def test_not_a_number_stays_in_its_pair():
    x = np.ones((3, 8))
    x[1, 2], x[2, 5] = np.nan, np.inf
    got = na.apply_rotary(x, [1, 2, 3])
    np.testing.assert_array_equal(~np.isfinite(got), [[False] * 8, [0, 0, 1, 0] * 2, [0, 1, 0, 0] * 2])


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "base": st.floats(2, 1e6),
        "dim": st.sampled_from([2, 4, 8]),
        "interleaved": st.booleans(),
        "scaling": st.floats(0.5, 8) | st.builds(dict, type=st.just("linear"), factor=st.floats(0.5, 8)),
    },
)


@given(SETTINGS, st.integers(-1000, 1000), st.integers(-1000, 1000), st.integers(-1000, 1000))
def test_products_depend_on_the_difference_of_positions_only(settings, i, j, shift):
    q, k = normal(2, 1, 8)
    near = na.apply_rotary(q, i, **settings) @ na.apply_rotary(k, j, **settings).T
    far = na.apply_rotary(q, i + shift, **settings) @ na.apply_rotary(k, j + shift, **settings).T
    np.testing.assert_allclose(far, near, rtol=0, atol=1e-10)


@given(SETTINGS, st.integers(-(2**20), 2**20))
def test_minus_the_positions_is_the_inverse_and_the_derivative(settings, position):
    x, grad = normal(2, 3, 8)
    turned = na.apply_rotary(x, position, **settings)
    back = na.apply_rotary(turned, -position, **settings)
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-13)
    # The function is linear: its derivative along x is itself, and grad . f(x) = f'(grad) . x.
    np.testing.assert_allclose(
        (na.apply_rotary(grad, -position, **settings) * x).sum(), (grad * turned).sum(), rtol=0, atol=1e-12
    )


X = np.zeros((2, 5, 8), np.float32)
P = np.arange(5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "named"),
    [
        ((X.tolist(), P), {}, TypeError, "x must be a numpy.ndarray"),
        ((np.ma.masked_array(X), P), {}, TypeError, "x must be a numpy.ndarray"),
        ((X.astype(int), P), {}, TypeError, "x must be native float32"),
        ((X.astype(">f4"), P), {}, TypeError, "x must be native float32"),
        ((X[0, 0], 0), {}, ValueError, "x must have shape"),
        ((X, "abc"), {}, TypeError, "positions must be integers or floating point"),
        ((X, [[0], [1, 2]]), {}, ValueError, "positions is not an array"),
        ((X, P > 2), {}, TypeError, "positions must be integers or floating point"),
        ((X, np.ma.masked_array(P)), {}, TypeError, "positions is a masked array"),
        ((X, P * 1j), {}, TypeError, "positions must be integers or floating point"),
        ((X, P * np.nan), {}, ValueError, "positions must be finite"),
        ((X, P[1:]), {}, ValueError, r"positions of shape \(4,\)"),
        ((X, P * np.ones((3, 2, 1))), {}, ValueError, r"positions of shape \(3, 2, 5\)"),
        ((X, P), {"base": 0}, ValueError, "base must be positive"),
        ((X, P), {"base": np.inf}, ValueError, "base must be finite"),
        ((X, P), {"base": "1"}, TypeError, "base must be a real number"),
        ((X, P), {"base": 1e-300, "scaling": {"type": "ntk", "factor": 1e-300}}, ValueError, "base and scaling"),
        ((X, P), {"dim": 3}, ValueError, "dim must be even"),
        ((X, P), {"dim": 10}, ValueError, "dim must be even and between 2 and .* 8"),
        ((X, P), {"dim": 0}, ValueError, "dim must be even"),
        ((X, P), {"dim": 4.0}, TypeError, "dim must be an integer"),
        ((X[..., 1:], P), {}, ValueError, "dim must be given"),
        ((X, P), {"interleaved": 1}, TypeError, "interleaved"),
        ((X, P), {"scaling": -1.0}, ValueError, "scaling must be positive"),
        ((X, P), {"scaling": "ntk"}, TypeError, "scaling must be a real number"),
        (
            (X, P),
            {"scaling": {"type": "yarn", "factor": 2.0}},
            ValueError,
            "scaling must have the keys type, original_max",
        ),
        ((X, P), {"scaling": {"type": "ntk"}}, ValueError, "scaling must have the keys"),
        ((X, P), {"scaling": {"type": "ntk", "factor": 0}}, ValueError, "factor of scaling"),
        ((X, P), {"scaling": {"type": "ntk", "factor": 2}, "dim": 2}, ValueError, "scaling of type 'ntk' needs dim"),
        ((X, P), {"out": X.tolist()}, TypeError, "out must be a numpy.ndarray"),
        ((X, P), {"out": X.astype(np.float64)}, TypeError, "out must have the dtype of x"),
        ((X, P), {"out": X[:1].copy()}, ValueError, "out must have shape"),
        ((X, P), {"out": np.broadcast_to(X[0], X.shape)}, ValueError, "out must be writeable"),
    ],
)
def test_bad_input(arguments, options, error, named):
    with pytest.raises(error, match=named):
        na.apply_rotary(*arguments, **options)


def test_out_that_overlaps_itself():
    out = np.lib.stride_tricks.as_strided(np.zeros((5, 8), np.float32), X.shape, (0, 32, 4))
    with pytest.raises(ValueError, match="out must not overlap itself"):
        na.apply_rotary(X, P, out=out)
