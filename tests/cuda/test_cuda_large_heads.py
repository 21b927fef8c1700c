"""Head dimensions beyond those of tiles (`cuda.operands`), in the emulator: features in slices, results in slabs.

Right values of plain calls are the textbook's formula in float64, which shares no code with the package.
"""

import ml_dtypes
import numpy as np
import pytest

import numba_attention as na
from caching import TOLERANCE, filled
from cases import DTYPES, OPTIONS, Case, assert_close, check, check_backward, grad_tolerance, tolerance
from emulator import emulated
from grid import THOROUGH
from numba_attention import BackendUnavailableError
from numba_attention.cuda import kernels, tile_shapes
from numba_attention.cuda.spec import slab


@pytest.fixture
def gpu(monkeypatch):
    with emulated(monkeypatch) as driver:
        yield driver


def normal(*shape, dtype="float32", seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(DTYPES[dtype])


def textbook(q, k, v, grad, causal):
    """Result, lse and gradients of (L, E), (S, E) and (S, Ev), in float64."""
    q, k, v, grad = (x.astype(np.float64) for x in (q, k, v, grad))
    scale = q.shape[-1] ** -0.5
    s = q @ k.T * scale
    if causal:
        s = np.where(np.arange(len(k)) > np.arange(len(q))[:, None], -np.inf, s)
    top = s.max(-1, keepdims=True)
    total = np.exp(s - top).sum(-1, keepdims=True)
    p = np.exp(s - top) / total
    dp = grad @ v.T
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    return p @ v, (top + np.log(total))[:, 0], (ds @ k * scale, ds.T @ q * scale, p.T @ grad)


SIZES = [(257, 257), (320, 320), (512, 512), (576, 512), (1024, 1024), (64, 577), (577, 16), (300, 1)]


@pytest.mark.parametrize(("n", "E", "Ev"), [(n, *pair) for n, pair in enumerate(SIZES)])
@pytest.mark.parametrize("causal", [False, True])
def test_against_the_textbook(gpu, n, E, Ev, causal):
    L, S = 19, 40
    of_this = list(DTYPES)[n % 4 : n % 4 + 1] if not THOROUGH else DTYPES
    for dtype in of_this:
        q, k, v, grad = (normal(1, *shape, dtype=dtype) for shape in ((L, E), (S, E), (S, Ev), (L, Ev)))
        want, want_lse, of_grads = textbook(*(x[0] for x in (q, k, v, grad)), causal)
        out, lse = na.attention(q, k, v, is_causal=causal, return_lse=True, backend="cuda")
        of_out, of_lse = tolerance(dtype)
        assert_close(out[0], want, 2 * of_out)
        assert_close(lse[0], want_lse, of_lse, offset=1)
        if causal or THOROUGH:
            got = na.attention_backward(grad, q, k, v, out, lse, is_causal=causal, backend="cuda")
            most = max(np.abs(x).max() for x in of_grads)
            for x, right in zip(got[:3], of_grads, strict=True):
                assert_close(x[0], right, 2 * grad_tolerance(dtype), offset=most)
    assert all(c.is_sliced for c in gpu.configs.values() if c.task not in ("delta", "round"))


# One call for each option; head dimensions and dtypes in turn.
PAIRS = [(257, 300), (320, 64), (64, 320), (272, 272), (576, 512)]
ALONE = [
    (Case(18, 20, *PAIRS[n % 5], H=2, Hkv=n % 2 + 1, batch=(), options=(name,)), list(DTYPES)[n % 4])
    for n, name in enumerate(OPTIONS)
]
TOGETHER = [
    (
        Case(21, 70, 300, 520, H=4, Hkv=2, batch=(), options=("causal", "window", "softcap", "alibi", "sinks", "mask")),
        0,
    ),
    (Case(5, 130, 576, 512, H=4, Hkv=1, options=("key lengths", "bias", "score mod", "mask mod")), 3),
    (Case(70, 40, 272, 16, H=1, layout="features reversed", options=("dropout", "bias that hides", "sinks")), 2),
    (Case(20, 33, 290, 33, H=2, Hkv=1, layout="head-feature-length", options=("causal", "offset each")), 1),
]


@pytest.mark.parametrize(("case", "dtype"), ALONE, ids=str)
def test_each_option(gpu, case, dtype):
    check(*case.arrays(dtype), case.kwargs(), dtype, case, backend="cuda")


@pytest.mark.parametrize(("case", "dtype"), ALONE if THOROUGH else ALONE[2::5], ids=str)
def test_gradients_of_each_option(gpu, case, dtype):
    check_backward(case, dtype, backend="cuda")


@pytest.mark.parametrize(("case", "dtype"), TOGETHER, ids=str)
def test_options_together(gpu, case, dtype):
    dtype = list(DTYPES)[dtype]
    check(*case.arrays(dtype), case.kwargs(), dtype, case, backend="cuda")
    if THOROUGH:
        check_backward(case, dtype, backend="cuda")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("page_size", [None, 16])
def test_latent_attention_decodes(gpu, page_size, dtype):
    """Multi-head latent attention: every query head reads one latent key, whose first features are the value."""
    lengths, H = [130, 77], 20
    for L in (1, 2):
        q, latent = normal(2, H, L, 576, dtype=dtype), normal(2, 1, 130, 576, dtype=dtype)
        cache = filled(latent, latent[..., :512], lengths, None, page_size)
        gpu.configs.clear()
        out, lse = na.attention_decode(q, cache, return_lse=True, backend="cuda")
        want, want_lse = na.attention_decode(q, cache, return_lse=True, backend="reference")
        assert_close(out, want, TOLERANCE[dtype])
        assert_close(lse, want_lse, 1e-6, offset=1)
        made = [c for c in gpu.configs.values() if c.task == "forward" and not c.nan_safe]
        assert made
        assert all(c.pack_gqa and c.slabs == 2 for c in made), "one tile has the heads as its rows"


@pytest.mark.parametrize(("H", "dtype"), [(3, "bfloat16"), (20, "bfloat16"), (20, "float64")])
def test_parts_of_the_keys_are_joined_slab_by_slab(monkeypatch, H, dtype):
    q, latent = normal(1, H, 2, 288, dtype=dtype), normal(1, 1, 300, 288, dtype=dtype)
    latent[0, 0, 290, 3] = np.nan  # seen by no row
    options = {"key_lengths": 280, "window": (200, 0), "sinks": np.linspace(-1, 1, H)}
    with emulated(monkeypatch, multiprocessors=132) as driver:
        out, lse = na.attention(
            q, latent, latent[..., :272], **options, is_causal="bottom-right", return_lse=True, backend="cuda"
        )
        assert any(c.task == "combine" and c.slabs == 2 for c in driver.configs.values())
    wide = [x.astype(np.float64) for x in (q, latent, latent[..., :272])]
    want, want_lse = na.attention(*wide, **options, is_causal="bottom-right", return_lse=True, backend="reference")
    assert_close(out, want, tolerance(dtype)[0])
    assert_close(lse, want_lse, tolerance(dtype)[1], offset=1)


def test_values_that_are_a_part_of_the_keys(gpu):
    """A view, which is not copied."""
    q, latent = normal(1, 3, 20, 576, dtype="bfloat16"), normal(1, 1, 50, 576, dtype="bfloat16")
    out = na.attention(q, latent, latent[..., :512], is_causal="bottom-right", backend="cuda")
    want = na.attention(*(x.astype(np.float64) for x in (q, latent, latent[..., :512])), is_causal="bottom-right",
                        backend="reference")  # fmt: skip
    assert_close(out, want, tolerance("bfloat16")[0])


@pytest.mark.parametrize(("dtype", "storage"), [("bfloat16", "int8"), ("float16", "float8"), ("float32", "bfloat16")])
@pytest.mark.parametrize("L", [1, 20])
def test_caches_in_fewer_bits(gpu, dtype, storage, L):
    q, k, v = normal(2, 4, L, 320, dtype=dtype), normal(2, 2, 70, 320, dtype=dtype), normal(2, 2, 70, 272, dtype=dtype)
    cache = filled(k, v, [70, 33], storage, 16)
    out = na.attention_decode(q, cache, backend="cuda")
    assert_close(out, na.attention_decode(q, cache, backend="reference"), TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "E", "Ev"), [("bfloat16", 288, 300), ("float32", 40, 264)])
def test_packed_sequences(gpu, dtype, E, Ev):
    rng = np.random.default_rng(0)
    starts = np.cumsum([0, 5, 0, 33, 1]), np.cumsum([0, 9, 3, 40, 0])
    q, k, v = (rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in ((39, 2, E), (52, 1, E), (52, 1, Ev)))
    wide = [x.astype(np.float64) for x in (q, k, v)]
    kwargs = {"is_causal": "bottom-right", "sinks": np.ones(2, np.float32)}
    out, lse = na.attention_varlen(q, k, v, *starts, **kwargs, return_lse=True, backend="cuda")
    want, want_lse = na.attention_varlen(*wide, *starts, **kwargs, return_lse=True, backend="reference")
    assert_close(out, want, tolerance(dtype)[0])
    grad = rng.standard_normal(out.shape).astype(out.dtype)
    got = na.attention_varlen_backward(grad, q, k, v, out, lse, *starts, **kwargs, backend="cuda")
    expected = na.attention_varlen_backward(grad.astype(np.float64), *wide, want, want_lse, *starts, **kwargs,
                                            backend="reference")  # fmt: skip
    offset = max(np.abs(x).max() for x in expected[:3])
    for a, b in zip(got, expected, strict=True):
        if a is not None:
            assert_close(a, b, 2 * grad_tolerance(dtype), offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights(gpu, dtype):
    q, k = normal(4, 20, 300, dtype=dtype), normal(2, 70, 300, dtype=dtype)
    chosen = {"heads": [2, 0], "rows": [3, 19, 4, 3], "is_causal": "bottom-right", "sinks": np.ones(4)}
    got = na.attention_weights(q, k, **chosen, backend="cuda")
    want = na.attention_weights(q.astype(np.float64), k.astype(np.float64), **chosen, backend="reference")
    assert_close(got, want, tolerance(dtype)[0] * 4)


@pytest.mark.parametrize(("L", "dtype"), [(1, "bfloat16"), (6, "bfloat16"), (40, "float32")])
def test_block_masks(gpu, L, dtype):
    """By lists of tiles, of packed heads too: 6 queries of 4 heads are one tile."""
    q, k, v = normal(4, L, 320, dtype=dtype), normal(1, 150, 320, dtype=dtype), normal(1, 150, 288, dtype=dtype)
    mask = np.random.default_rng(0).random((4, L, 150)) < 0.5
    mask[:, :, 64:128], mask[0] = False, True
    out, lse = na.attention(q, k, v, mask=na.BlockMask.from_array(mask), return_lse=True, backend="cuda")
    wide = [x.astype(np.float64) for x in (q, k, v)]
    want, want_lse = na.attention(*wide, mask=mask, return_lse=True, backend="reference")
    assert_close(out, want, tolerance(dtype)[0])
    of_forward = [c for c in gpu.configs.values() if c.task == "forward" and not c.nan_safe]
    assert all(c.lists and c.pack_gqa == (L < 40) for c in of_forward)
    if L == 40 and not THOROUGH:
        return
    grad = normal(4, L, 288, dtype=dtype, seed=1)
    got = na.attention_backward(grad, q, k, v, out, lse, mask=na.BlockMask.from_array(mask), backend="cuda")
    expected = na.attention_backward(grad.astype(np.float64), *wide, want, want_lse, mask=mask, backend="reference")
    for a, b in zip(got[:3], expected[:3], strict=True):
        assert_close(a, b, 2 * grad_tolerance(dtype), offset=np.abs(expected.key).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_arguments_of_mods(gpu, dtype):
    q, k, v, grad = (normal(2, n, 272, dtype=dtype, seed=m) for m, n in enumerate((18, 40, 40, 18)))
    options, results = {"score_mod": na.mods.alibi, "mod_args": (np.array([0.1, 0.3]),)}, []
    for backend, arrays in (("cuda", (q, k, v)), ("reference", [x.astype(np.float64) for x in (q, k, v)])):
        out, lse = na.attention(*arrays, **options, return_lse=True, backend=backend)
        results.append(na.attention_backward(grad.astype(out.dtype), *arrays, out, lse, **options, mod_grads="all",
                                             backend=backend))  # fmt: skip
    got, want = results
    for a, b in zip((*got[:3], *got.mod_args), (*want[:3], *want.mod_args), strict=True):
        assert_close(a, b, grad_tolerance(dtype) * 4, offset=np.abs(want.key).max())
    assert any(c.task == "mods" and c.is_sliced for c in gpu.configs.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_leaks_from_what_is_hidden(gpu, dtype):
    """NaN in one slab of the values, or in one slice of the keys, reaches the rows that see it, and no other."""
    q, k, v = (normal(1, 40, 300, dtype=dtype, seed=n) for n in range(3))
    k[0, 25, 290], v[0, 30, 5], v[0, 36, 7] = np.nan, np.nan, np.inf
    options = {"is_causal": True, "softcap": 20.0} if dtype == "float32" else {"is_causal": True}
    out, lse = na.attention(q, k, v, **options, return_lse=True, backend="cuda")
    want, want_lse = na.attention(q, k, v, **options, return_lse=True, backend="reference")
    np.testing.assert_array_equal(np.isfinite(out), np.isfinite(want))
    np.testing.assert_array_equal(np.isnan(lse), np.isnan(want_lse))
    assert_close(out[:, :25], want[:, :25], tolerance(dtype)[0])
    grad = normal(1, 40, 300, dtype=dtype, seed=3)
    got = na.attention_backward(grad, q, k, v, out, lse, **options, backend="cuda")
    expected = na.attention_backward(grad, q, k, v, want, want_lse, **options, backend="reference")
    for a, b in zip(got[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_values_in_one_slab(gpu, dtype):
    """A block whose sums overflow starts over with smaller weights, without the blocks of other slabs."""
    most = float(ml_dtypes.finfo(DTYPES[dtype]).max) * 0.9
    q, k, v = np.zeros((1, 4, 320)), np.zeros((1, 50, 320)), np.ones((1, 50, 320))
    v[..., 300] = most
    q, k, v = (x.astype(DTYPES[dtype]) for x in (q, k, v))
    out = na.attention(q, k, v, backend="cuda").astype(np.float64)
    np.testing.assert_allclose(out[..., 300], np.float64(v[0, 0, 300]), rtol=1e-2 if dtype == "bfloat16" else 1e-5)
    np.testing.assert_allclose(out[..., 310], 1, rtol=1e-5)


def test_the_same_call_has_the_same_bits(gpu):
    case = Case(20, 40, 320, 272, H=2, Hkv=1, batch=(), options=("causal",))
    arrays, kwargs = case.arrays("bfloat16"), case.kwargs()
    runs = []
    for _ in range(2):
        out, lse = na.attention(*arrays, **kwargs, return_lse=True, backend="cuda")
        runs.append([out, lse, *na.attention_backward(out, *arrays, out, lse, **kwargs, backend="cuda")[:3]])
    for a, b in zip(*runs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("landing", ["issue", "wait"])
def test_copies_may_land_at_any_time(monkeypatch, landing):
    case = Case(20, 70, 320, 264, H=1, batch=(), options=("causal",))
    with emulated(monkeypatch, landing=landing):
        check(*case.arrays("float16"), case.kwargs(), "float16", case, backend="cuda")
        check_backward(case, "float16", backend="cuda")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_old_gpus(monkeypatch, dtype):
    """sm_70: no asynchronous copies, no tensor cores for these types, 96 KiB of shared memory."""
    case = Case(20, 40, 272, 264, H=1, batch=(), options=("causal",))
    with emulated(monkeypatch, capability=(7, 0), shared_memory=98304) as driver:
        check(*case.arrays(dtype), case.kwargs(), dtype, case, backend="cuda")
        check_backward(case, dtype, backend="cuda")
    assert max(kernels.shared(c) for c in driver.configs.values()) <= 98304
    assert all(c.product == "simt" for c in driver.configs.values())


def test_rows_shrink_until_they_fit_and_then_it_is_said(gpu):
    """The slices of a row stay in shared memory: 16 rows of up to some 6000 features of bfloat16 fit into 227 KiB."""
    q, k, v = (normal(1, n, 4000, dtype="bfloat16", seed=n) for n in (3, 20, 21))
    v = v[:, :20, :8]
    out = na.attention(q, k, v, backend="cuda")
    want = na.attention(*(x.astype(np.float64) for x in (q, k, v)), backend="reference")
    assert_close(out, want, tolerance("bfloat16")[0])
    q = np.zeros((1, 2, 20000), DTYPES["bfloat16"])
    with pytest.raises(
        BackendUnavailableError, match=r"head dimensions 20032 and 64 of bfloat16 need .* shared memory"
    ):
        na.attention(q, q, q[..., :8], backend="cuda")


def test_slabs():
    """As few as possible, because each computes the scores again, and as narrow as possible."""
    assert {n: slab(n) for n in (1, 64, 200, 257, 320, 512, 576, 640, 1024)} == {
        1: 32, 64: 64, 200: 256, 257: 192, 320: 192, 512: 256, 576: 192, 640: 256, 1024: 256,
    }  # fmt: skip
    device = type("Device", (), {"compute_capability": (9, 0), "arch": "sm_90a", "shared_memory": 232448})
    c = tile_shapes.base("forward", "bfloat16", 576, 512, device)
    assert (c.E_slices, c.Ev_slices, c.slabs, c.rows) == (9, 8, 2, 128)
    of_query, of_key, of_value = (
        tile_shapes.base("query", "bfloat16", 576, 512, device),
        *tile_shapes.parts(tile_shapes.base("key", "bfloat16", 576, 512, device)),
    )
    assert [x.slabs for x in (of_query, of_key, of_value)] == [3, 3, 2]
