"""The products of the layer's projections: against float64, any strides, the same bits whatever is beside."""

import itertools
import re

import hypothesis.strategies as st
import numba
import numpy as np
import pytest
from hypothesis import given

from assembly import innermost
from grid import share
from numba_attention.cpu.linear import CHUNK
from numba_attention.cpu.simd import HOST
from numba_attention.layer import projection
from numba_attention.layer.projection import linear, linear_backward
from processes import GUARDED, run

DTYPES = ["float32", "float64"]
EDGES = [1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 100, 128, 129, 130]
DEPTHS = [0, 1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 95, 96, 97, 100, 191, 193, 300, 1000]


def normal(shape, dtype="float32", seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def arrays(M, K, N, dtype="float32"):
    """X, weight, bias and the gradient of the result."""
    return normal((M, K), dtype), normal((N, K), dtype, 1), normal((N,), dtype), normal((M, N), dtype, 2)


def assert_product(got, a, b, bias=None):
    """Got is a @ b.T + bias, to within what a sum in chunks may lose at worst."""
    dtype = got.dtype
    wider = np.float64 if dtype == np.float32 else np.longdouble
    a, b = a.astype(wider), b.astype(wider)
    want, size = a @ b.T, abs(a) @ abs(b).T
    if bias is not None:
        want, size = want + bias, size + abs(bias)
    terms = min(a.shape[1], CHUNK) + a.shape[1] // CHUNK + 3
    assert got.shape == want.shape
    assert (abs(got - want) <= terms * np.finfo(dtype).eps * size).all()


def check(x, weight, bias, grad):
    kept = [np.array(a) for a in (x, weight, bias, grad)]
    assert_product(linear(x, weight, bias), x, weight, bias)
    assert_product(linear(x, weight), x, weight)
    grad_x, grad_weight, grad_bias = linear_backward(grad, x, weight)
    assert_product(grad_x, grad, weight.T)
    assert_product(grad_weight, grad.T, x.T)
    assert_product(grad_bias[:, None], grad.T, np.ones((1, len(grad)), grad.dtype))
    for a, b in zip((x, weight, bias, grad), kept, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    """Work of any size on so many threads."""
    resources, *_ = projection.modules()
    if request.param > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("one core")
    monkeypatch.setattr(resources, "SMALL", 0)
    before = numba.get_num_threads()
    numba.set_num_threads(request.param)
    yield request.param
    numba.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", DEPTHS)
def test_edges(K, dtype, threads):
    sizes = list(itertools.product(EDGES, EDGES))
    for M, N in sizes[K % 7 :: 7]:
        check(*arrays(M, K, N, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", list(itertools.product((0, 3), repeat=3)))
def test_empty(shape, dtype):
    check(*arrays(*shape, dtype))


@pytest.mark.parametrize("dtype", share(DTYPES, 2))
@pytest.mark.parametrize(
    "shape", [(1, 70, 600), (700, 130, 1200), (600, 64, 513), (3000, 20, 40), (5000, 70, 300), (9000, 3, 2)]
)
def test_several_items(shape, dtype, threads):
    """Slabs, blocks of panels, groups of rows."""
    check(*arrays(*shape, dtype))


def unaligned(x):
    copy = np.frombuffer(b"\0" + x.tobytes(), x.dtype.newbyteorder("="), x.size, 1).reshape(x.shape)
    assert x.size == 0 or not copy.flags.aligned
    return copy


def spread(x):
    wide = np.full(tuple(2 * n for n in x.shape), np.nan, x.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    view[...] = x
    return view


def read_only(x):
    x.flags.writeable = False
    return x


LAYOUTS = {
    "transposed": lambda x: np.asfortranarray(x),
    "reversed": lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
    "last first": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "every second": spread,
    "one row": lambda x: np.broadcast_to(x[:1], x.shape),
    "one column": lambda x: np.broadcast_to(x[..., :1], x.shape),
    "one number": lambda x: np.broadcast_to(x[(slice(0, 1),) * x.ndim], x.shape),
    "unaligned": unaligned,
    "read-only": read_only,
    "part": lambda x: np.concatenate([x, x, x], axis=-1)[..., x.shape[-1] : 2 * x.shape[-1]],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, dtype, threads):
    for shape in [(70, 100, 37), (5, 33, 200), (200, 17, 5), (130, 97, 129)]:
        given = arrays(*shape, dtype)
        check(*(LAYOUTS[layout](a) for a in given))
        for n in range(4):
            check(*(LAYOUTS[layout](a) if i == n else a for i, a in enumerate(given)))


@pytest.mark.parametrize("layout", ["transposed", "every second", "reversed", "unaligned", "part"])
def test_out(layout):
    for M, K, N in [(70, 40, 37), (3, 40, 200), (200, 5, 3)]:
        x, weight, bias, _ = arrays(M, K, N)
        out = LAYOUTS[layout](np.zeros((M, N), np.float32))
        if not out.flags.writeable:  # made of bytes
            out = np.frombuffer(bytearray(out.nbytes + 1), np.float32, out.size, 1).reshape(M, N)
        assert linear(x, weight, bias, out=out) is out
        np.testing.assert_array_equal(out, linear(x, weight, bias))


def test_out_that_is_no_matrix_or_is_read_from():
    x, weight, bias = normal((2, 3, 4, 8)), normal((8, 8)), normal((8,))
    want = linear(x, weight, bias)
    out = np.zeros((4, 3, 2, 8), np.float32).swapaxes(0, 2)
    assert linear(x, weight, bias, out=out) is out
    np.testing.assert_array_equal(out, want)
    given = x.copy()
    assert linear(given, weight, bias, out=given) is given
    np.testing.assert_array_equal(given, want)
    given = np.concatenate([weight, bias[None]])
    linear(x[0, 0, :2], given[:8], given[8], out=given[7:])
    np.testing.assert_array_equal(given[7:], want[0, 0, :2])


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 3), (0, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_axes(lead, dtype):
    x, weight, bias, grad = normal((*lead, 6), dtype), normal((7, 6), dtype), normal((7,), dtype), normal((*lead, 7))
    grad = grad.astype(dtype)
    rows, of_rows = x.reshape(-1, 6), grad.reshape(-1, 7)
    np.testing.assert_array_equal(linear(x, weight, bias), linear(rows, weight, bias).reshape(*lead, 7))
    grad_x, grad_weight, grad_bias = linear_backward(grad, x, weight)
    want = linear_backward(of_rows, rows, weight)
    np.testing.assert_array_equal(grad_x, want[0].reshape(x.shape))
    np.testing.assert_array_equal(grad_weight, want[1])
    np.testing.assert_array_equal(grad_bias, want[2])
    if len(lead) == 2:
        swapped = x.swapaxes(0, 1)
        np.testing.assert_array_equal(linear(swapped, weight, bias), linear(x, weight, bias).swapaxes(0, 1))


def test_only_what_is_needed():
    x, weight, _, grad = arrays(9, 8, 7)
    want = linear_backward(grad, x, weight)
    for need_bias, need_input in itertools.product((True, False), repeat=2):
        got = linear_backward(grad, x, weight, need_bias, need_input)
        assert (got[0] is not None, got[2] is not None) == (need_input, need_bias)
        for a, b in zip(got, want, strict=True):
            if a is not None:
                np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one core")
@pytest.mark.parametrize("shape", [(70, 100, 300), (4, 512, 512), (5000, 70, 300), (1500, 200, 700)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(shape, dtype):
    x, weight, bias, grad = arrays(*shape, dtype)
    before, found = numba.get_num_threads(), []
    for number in (1, 2, 2, numba.config.NUMBA_NUM_THREADS):
        numba.set_num_threads(number)
        found.append([linear(x, weight, bias), *linear_backward(grad, x, weight)])
    numba.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(300, 100, 200), (130, 97, 30), (70, 300, 700), (1100, 40, 65)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_other_rows(shape, dtype):
    x, weight, bias, grad = arrays(*shape, dtype)
    y, grad_x = linear(x, weight, bias), linear_backward(grad, x, weight)[0]
    for first, last in [(0, 1), (3, 4), (5, 7), (0, 64), (1, 66), (7, 130), (10, shape[0])]:
        rows = slice(first, last)
        np.testing.assert_array_equal(linear(x[rows], weight, bias), y[rows])
        np.testing.assert_array_equal(linear(x[rows], weight[:5], bias[:5]), y[rows, :5])
        np.testing.assert_array_equal(linear_backward(grad[rows], x[rows], weight)[0], grad_x[rows])
    np.testing.assert_array_equal(linear(weight, x), linear(x, weight).T)
    # Nor on where the numbers lie.
    np.testing.assert_array_equal(linear(spread(x), np.asfortranarray(weight), spread(bias)), y)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(70, 100, 37), (3, 40, 200)])
def test_nan_stays_in_its_row(shape, bad):
    x, weight, bias, grad = arrays(*shape)
    y, (grad_x, grad_weight, grad_bias) = linear(x, weight, bias), linear_backward(grad, x, weight)
    x[1, 2] = grad[1, 2] = bad
    others = np.arange(len(x)) != 1
    np.testing.assert_array_equal(linear(x, weight, bias)[others], y[others])
    assert not np.isfinite(linear(x, weight, bias)[1]).any()
    spoilt = linear_backward(grad, x, weight)
    np.testing.assert_array_equal(spoilt[0][others], grad_x[others])
    outputs, inputs = np.arange(len(weight)) != 2, np.arange(x.shape[1]) != 2
    np.testing.assert_array_equal(spoilt[1][outputs][:, inputs], grad_weight[outputs][:, inputs])
    np.testing.assert_array_equal(spoilt[2][outputs], grad_bias[outputs])
    assert not np.isfinite(spoilt[1][:, 2]).any()
    assert not np.isfinite(spoilt[1][2]).any()
    assert not np.isfinite(spoilt[2][2])


def rms(got, want):
    return np.sqrt(np.mean((got - want) ** 2))


@pytest.mark.parametrize("shape", [(200, 64, 200), (200, 384, 100), (100, 1024, 200), (50, 4096, 50)])
def test_no_less_exact_than_numpy(shape):
    x, weight, _, grad = arrays(*shape)
    want = x.astype(np.float64) @ weight.T
    assert rms(linear(x, weight), want) <= 1.5 * rms(x @ weight.T, want)
    want = grad.astype(np.float64) @ weight
    assert rms(linear_backward(grad, x, weight)[0], want) <= 1.5 * rms(grad @ weight, want)


@pytest.mark.parametrize("items", [1, projection.ITEMS], ids=["one sum", "groups"])
@pytest.mark.parametrize("rows", [1000, 10_000, 100_000])
def test_long_sums_no_less_exact_than_numpy(rows, items, monkeypatch):
    monkeypatch.setattr(projection, "ITEMS", items)
    monkeypatch.setattr(projection, "_plans", projection.BoundedCache())
    x, weight, _, grad = arrays(rows, 24, 40)
    _, grad_weight, grad_bias = linear_backward(grad, x, weight)
    want = grad.astype(np.float64).T @ x
    # Of sums of normal numbers in chunks: the chain over chunks rounds sums of size sqrt(k) once a chunk. OpenBLAS's
    # kernel for Haswell sums in longer chunks than that for AVX-512, and is a little more exact.
    chain = np.finfo("f4").eps * rows / np.sqrt(24 * CHUNK)
    assert rms(grad_weight, want) <= max(1.5 * rms(grad.T @ x, want), chain)
    want = grad.sum(axis=0, dtype=np.float64)
    assert rms(grad_bias, want) <= rms(np.add.reduce(grad, axis=0), want)


def test_the_rest_is_left_to_numpy():
    x, weight, bias, grad = arrays(5, 4, 3)
    want = linear(x, weight, bias)
    kinds = [np.asarray(x, ">f4"), x.astype(np.float16), x.astype(np.float64), x.tolist(), x.astype(np.complex64)]
    kinds.append(x.view(np.memmap))  # any subclass
    for other in kinds:
        np.testing.assert_allclose(linear(other, weight, bias), want, atol=1e-2)
        got = linear_backward(grad, other, weight)
        for a, b in zip(got, linear_backward(grad, x, weight), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-2)
    out = np.zeros((5, 3))
    assert linear(x, weight, bias, out=out) is out
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(linear(x, weight.tolist(), np.float32(0)), linear(x, weight), atol=1e-5)
    assert linear(np.ones((2, 3), int), np.ones((4, 3), int)).dtype == int


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_are_rounded_once(dtype):
    """Sums of 1000 terms in float32: in 16 bits they would lose half of their digits."""
    dtype = np.dtype(dtype) if dtype == "float16" else np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    x, weight, bias, grad = (a.astype(dtype) for a in arrays(1000, 40, 3))
    wide = [a.astype(np.float64) for a in (x, weight, bias, grad)]
    made = [
        (linear(x, weight, bias), wide[0] @ wide[1].T + wide[2]),
        *zip(linear_backward(grad, x, weight), (wide[3] @ wide[1], wide[3].T @ wide[0], wide[3].sum(0)), strict=True),
    ]
    for got, want in made:
        assert got.dtype == dtype
        spacing = np.spacing(abs(want).astype(dtype)).astype(np.float64)
        assert (abs(got.astype(np.float64) - want) <= 0.5001 * spacing + 1e-4).all()
    out = np.zeros((1000, 3), np.float32)
    linear(x, weight, bias, out=out)
    np.testing.assert_allclose(out, made[0][1], atol=1e-5)
    assert linear(x, weight.astype(np.float32)).dtype == np.float32


def test_errors_name_the_array():
    x, weight, bias, grad = arrays(5, 4, 3)
    misuses = {"x": [(x.T, weight), (x[0, 0], weight)], "weight": [(x, weight[0, 0])], "bias": [(x, weight, bias[:2])]}
    for name, calls in misuses.items():
        for arguments in calls:
            with pytest.raises(ValueError, match=f"^{name} must have shape"):
                linear(*arguments)
    with pytest.raises(ValueError, match="out must have shape"):
        linear(x, weight, bias, out=np.zeros((4, 3), np.float32))
    with pytest.raises(ValueError, match="read-only"):
        linear(x, weight, bias, out=read_only(np.zeros((5, 3), np.float32)))
    with pytest.raises(ValueError, match="grad, x and weight must have shapes"):
        linear_backward(grad[:4], x, weight)


@given(
    sizes=st.tuples(*[st.integers(1, 150)] * 3),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from([None, *LAYOUTS])] * 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_arrays(sizes, dtype, layouts, seed):
    M, K, N = sizes
    rng = np.random.default_rng(seed)
    given = [rng.standard_normal(shape).astype(dtype) for shape in ((M, K), (N, K), (N,), (M, N))]
    x, weight, bias, grad = (a if name is None else LAYOUTS[name](a) for a, name in zip(given, layouts, strict=True))
    check(x, weight, bias, grad)
    first, last = sorted(rng.integers(0, M + 1, 2))
    np.testing.assert_array_equal(linear(x[first:last], weight, bias), linear(x, weight, bias)[first:last])


@pytest.mark.skipif(not HOST.fma, reason="no fused multiply-add here")
@pytest.mark.parametrize("dtype", DTYPES)
def test_loop_keeps_its_block_in_registers(dtype):
    kernel, spec = projection.kernel_of(dtype, "linear")
    fma, register = ("fmla", r"v\d+\.") if HOST.name == "NEON" else ("vfmadd", {512: "%zmm", 256: "%ymm"}[HOST.bits])
    loop = innermost(kernel.assembly(), fma, without=r"\bv?f?div")  # activations have polynomials and a division
    rows, vectors = spec.block
    number = len(re.findall(rf"\b{fma}\w*\b.*{register}", loop))
    assert number > 0
    assert number % (rows * vectors) == 0
    assert not [line for line in loop.splitlines() if re.search(r"\(%rsp\)|\[sp", line) and re.search(register, line)]


CHECKED = """
import numpy as np
from test_projection import arrays, check, spread
for dtype in ("float32", "float64"):
    for shape in [(1, 1, 1), (70, 100, 37), (3, 33, 130), (130, 0, 5), (2100, 20, 30), (600, 17, 513)]:
        check(*arrays(*shape, dtype))
        check(*map(spread, arrays(*shape, dtype)))
print("done")
"""


def test_with_bounds_checks(tmp_path):
    run(CHECKED, NUMBA_BOUNDSCHECK="1", NUMBA_ATTENTION_CACHE_DIR=str(tmp_path))


PAGES, _, _ = GUARDED.partition("features = ")
BETWEEN_PAGES = f"""{PAGES}
from numba_attention.layer.projection import linear, linear_backward
from test_projection import arrays, assert_product
sizes = [1, 2, 3, 5, 15, 16, 17, 31, 33, 64, 65, 100]
for n, (M, K, N) in enumerate(list(itertools.product(sizes, sizes, sizes))[::5]):
    for at_end in (False, True):
        dtype, turn = ("float32", "float64")[n % 2], (lambda x: x, np.asfortranarray)[n // 2 % 2]
        x, weight, bias, grad = (like(turn(a), at_end) for a in arrays(M, K, N, dtype))
        out = like(turn(np.zeros((M, N), dtype)), at_end)
        assert_product(linear(x, weight, bias, out=out), x, weight, bias)
        grad_x, grad_weight, _ = linear_backward(grad, x, weight)
        assert_product(grad_x, grad, weight.T)
        assert_product(grad_weight, grad.T, x.T)
        kept.clear()
print("done")
"""


def test_with_unreadable_pages_around():
    run(BETWEEN_PAGES)
