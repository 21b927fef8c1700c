"""The CUDA kernels, every task and option: the public calls against the oracle and cases of the CPU.

In the emulator, and on a GPU where there is one. The emulator takes twenty minutes for all of `cases.CASES`: it gets a
share of them, and the rest with ``NUMBA_ATTENTION_THOROUGH=1``.
"""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product as every
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import numba_attention as na
from caching import TOLERANCE, arrays, filled
from cases import CASES, DTYPES, GROUPS, Case, assert_close, check, check_backward, grad_tolerance, tolerance
from emulator import emulated
from grid import THOROUGH, in_turn
from numba_attention.cuda import backward, forward, kernels, tile_shapes
from numba_attention.options import Options
from strategies import cases, dtypes

ON_A_GPU = pytest.param("GPU", marks=pytest.mark.gpu)


@pytest.fixture(params=["emulator", ON_A_GPU])
def gpu(request, monkeypatch):
    """Where kernels run; `configs` has every one that was launched, by name."""
    if request.param == "emulator":
        with emulated(monkeypatch) as driver:
            yield driver
        return
    launched, compiled = {}, kernels.compiled

    def remember(c):
        launched[c.name] = c
        return compiled(c)

    monkeypatch.setattr(kernels, "compiled", remember)
    yield type("GPU", (), {"configs": launched})


def _work(case):
    return case.L * case.S * case.H * max(int(np.prod(case.full_batch)), 1)


def _share(step, most):
    """Cases with a dtype each, in turn: all of them for a GPU, and for the emulator a share of those that are small."""
    pairs = [(case, list(DTYPES)[n % 4]) for n, case in enumerate(CASES)]
    # Each option alone, small; and what has no work.
    options = [x for x in pairs if (x[0] in GROUPS["option"] and x[0].L == 18) or x[0] in GROUPS["empty"]]
    rest = [x for x in pairs if x not in options and _work(x[0]) <= most][::step]
    emulated = [pytest.param("emulator", *x, id=f"{x[0]}-{x[1]}") for x in (pairs if THOROUGH else options + rest)]
    return emulated + [pytest.param("GPU", *x, marks=pytest.mark.gpu, id=f"GPU-{x[0]}-{x[1]}") for x in pairs]


@pytest.mark.parametrize(("gpu", "case", "dtype"), _share(5, 12000), indirect=["gpu"])
def test_forward(gpu, case, dtype):
    check(*case.arrays(dtype), case.kwargs(), dtype, case, backend="cuda")


@pytest.mark.parametrize(("gpu", "case", "dtype"), _share(19, 6000), indirect=["gpu"])
def test_backward(gpu, case, dtype):
    check_backward(case, dtype, backend="cuda")


LARGER = [
    Case(70, 150, 64, H=4, Hkv=2, options=("causal",)),
    Case(130, 130, 128, 64, H=1, options=("window", "softcap")),
    Case(40, 70, 256, H=1, batch=()),
]


@pytest.mark.parametrize(("dtype", "case"), in_turn(DTYPES, LARGER), ids=str)
def test_several_tiles(gpu, case, dtype):
    check(*case.arrays(dtype), case.kwargs(), dtype, case, backend="cuda")
    if case.E <= 128:
        check_backward(case, dtype, backend="cuda")


@pytest.mark.parametrize("landing", ["issue", "wait"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copies_may_land_at_any_time(monkeypatch, landing, dtype):
    case = Case(70, 130, 24, H=1, batch=(), options=("causal",))
    with emulated(monkeypatch, landing=landing):
        check(*case.arrays(dtype), case.kwargs(), dtype, case, backend="cuda")
        check_backward(case, dtype, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_old_gpus(monkeypatch, dtype):
    """sm_70 has neither asynchronous copies nor tensor cores for these types: everything by FMA."""
    case = Case(20, 70, 24, Ev=40, H=2, Hkv=1, options=("causal", "mask"))
    with emulated(monkeypatch, capability=(7, 0)) as driver:
        check(*case.arrays(dtype), case.kwargs(), dtype, case, backend="cuda")
        check_backward(case, dtype, backend="cuda")
    assert all(c.product == "simt" for c in driver.configs.values())
    assert not any(c.aligned for c in driver.configs.values() if c.task in ("forward", "query", "key"))


@pytest.mark.parametrize("case", [LARGER[0], Case(20, 33, 24, options=("causal", "bias"))], ids=str)
def test_float32_on_tensor_cores(gpu, monkeypatch, case):
    """Three products of TF32 numbers: as exact as float32."""
    monkeypatch.setenv(tile_shapes.TF32X3, "1")
    check(*case.arrays("float32"), case.kwargs(), "float32", case, backend="cuda")
    check_backward(case, "float32", backend="cuda")
    assert any(c.product == "tf32" for c in gpu.configs.values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_of_halves_in_two_passes(gpu, monkeypatch, dtype):
    """On request without atomics: the same call has the same bits."""
    for asked in ("0", "1"):
        monkeypatch.setenv(tile_shapes.DETERMINISTIC, asked)
        gpu.configs.clear()
        for case in (LARGER[0], Case(20, 33, 24, 40, options=("window", "sinks")), Case(33, 20, 96, 32, H=1)):
            check_backward(case, dtype, backend="cuda")
        tasks = {c.task for c in gpu.configs.values() if not c.nan_safe}
        assert ("round" in tasks, "query" in tasks) == ((False, True) if asked == "1" else (True, False))


@pytest.mark.parametrize("shared", [101376, 166912])
def test_gpus_with_less_shared_memory(monkeypatch, shared):
    """Smaller tiles, and two passes where tiles of a single one do not fit."""
    case = Case(70, 40, 128, H=2, Hkv=1, batch=(), options=("causal",))
    with emulated(monkeypatch, capability=(8, 0), shared_memory=shared) as driver:
        for dtype in ("bfloat16", "float32"):
            check(*case.arrays(dtype), case.kwargs(), dtype, case, backend="cuda")
            check_backward(case, dtype, backend="cuda")
    assert max(kernels.shared(c) for c in driver.configs.values()) <= shared
    assert any(c.fused_dq for c in driver.configs.values()) == (shared > 150_000)


PACKED = {
    "plain": {},
    "causal": {"is_causal": "bottom-right"},
    "packed bias": {"bias": (4, 109, 116), "sinks": (4,)},
    "bias of keys": {"bias": (1, 4, 1, 64), "softcap": 2.0},
    "options": {"window": (20, 5), "alibi_slopes": (4,), "mask": (4, 109, 116)},
}


@pytest.mark.parametrize(("name", "dtype"), in_turn(PACKED, ["float32", "bfloat16"]))
def test_packed_sequences(gpu, name, dtype):
    rng = np.random.default_rng(0)
    kwargs = dict(PACKED[name])
    for option, shape in kwargs.items():
        if option in ("bias", "sinks", "alibi_slopes"):
            kwargs[option] = rng.standard_normal(shape).astype(np.float32)
        elif option == "mask":
            kwargs[option] = rng.random(shape) < 0.7
    starts = np.cumsum([0, 5, 0, 33, 70, 1]), np.cumsum([0, 9, 3, 40, 64, 0])
    q, k, v = (rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in ((109, 4, 24), (116, 2, 24), (116, 2, 40)))
    wide = [x.astype(np.float64) for x in (q, k, v)]
    out, lse = na.attention_varlen(q, k, v, *starts, **kwargs, return_lse=True, backend="cuda")
    want, want_lse = na.attention_varlen(*wide, *starts, **kwargs, return_lse=True, backend="reference")
    of_out, of_lse = tolerance(dtype)
    assert_close(out, want, of_out)
    assert_close(lse, want_lse, of_lse, offset=1)
    grad = rng.standard_normal(out.shape).astype(out.dtype)
    got = na.attention_varlen_backward(grad, q, k, v, out, lse, *starts, **kwargs, backend="cuda")
    expected = na.attention_varlen_backward(
        grad.astype(np.float64), *wide, want, want_lse, *starts, **kwargs, backend="reference"
    )
    offset = max(np.abs(x).max() for x in expected[:3])
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, 2 * grad_tolerance(dtype), offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize(("H", "Hkv", "L"), [(8, 2, 1), (4, 1, 3), (2, 2, 20)])
def test_decode(gpu, H, Hkv, L, page_size, dtype):
    """Caches of NumPy arrays, whose used part is copied to the device: keys shared out to blocks, pages looked up."""
    lengths = [130, 3 if L <= 3 else 33, 77]
    q, k, v = arrays(3, H, Hkv, L, 130, 24, 40, dtype=dtype)
    cache = filled(k, v, lengths, None, page_size)
    slopes, sinks = np.linspace(0.1, 1, H), np.linspace(-1, 1, H)
    for options in ({}, {"window": (20, 0), "sinks": sinks}, {"alibi_slopes": slopes, "softcap": 3.0}):
        out, lse = na.attention_decode(q, cache, **options, return_lse=True, backend="cuda")
        want, want_lse = na.attention_decode(q, cache, **options, return_lse=True, backend="reference")
        assert_close(out, want, TOLERANCE[dtype])
        assert_close(lse, want_lse, 1e-6, offset=1)
    tasks = {c.task for c in gpu.configs.values()}
    assert "combine" in tasks or L > 3
    if L == 1:  # a step sees every key of its cache, and nothing has to be done again
        assert not any(c.nan_safe for c in gpu.configs.values() if not (c.sinks or c.alibi))


def test_pages_change_no_bit(gpu):
    q, k, v = arrays(2, 4, 2, 1, 100, 32, dtype="float32")
    results = [na.attention_decode(q, filled(k, v, [100, 61], None, size), backend="cuda") for size in (None, 16)]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(("dtype", "S"), [*((dtype, 70) for dtype in DTYPES), ("bfloat16", 71)])
def test_weights(gpu, dtype, S):
    q, k, _ = arrays(2, 4, 2, 20, S, 24, dtype=dtype)
    chosen = {
        "heads": [2, 0],
        "rows": [3, 19, 4, 3],
        "is_causal": "bottom-right",
        "alibi_slopes": np.linspace(0.1, 1, 4),
    }
    chosen |= {"sinks": np.ones(4), "mask": np.random.default_rng(0).random((4, 20, S)) < 0.6}
    got = na.attention_weights(q, k, **chosen, backend="cuda")
    want = na.attention_weights(q.astype(np.float64), k.astype(np.float64), **chosen, backend="reference")
    assert_close(got, want, tolerance(dtype)[0] * 4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_of_rows_that_see_no_finite_key(gpu, dtype, value):
    rng = np.random.default_rng(0)
    q, k = (np.abs(rng.standard_normal((1, 1, 70, 16))).astype(DTYPES[dtype]) for _ in range(2))
    k[0, 0, 40, 3] = value
    mask = rng.random((70, 70)) < 0.5
    mask[5] = False  # a row that sees nothing
    got = na.attention_weights(q, k, mask=mask, backend="cuda")
    np.testing.assert_array_equal(np.isnan(got).any(-1), mask[:, 40][None, None])
    want = na.attention_weights(q, k, mask=mask, backend="reference")
    untouched = ~mask[:, 40]
    assert_close(got[..., untouched, :], want[..., untouched, :], tolerance(dtype)[0])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nothing_leaks_from_what_is_hidden(gpu, dtype, value):
    """A NaN behind a mask, a window, or the diagonal reaches the rows that see it and no other; gradients too."""
    rng = np.random.default_rng(0)
    L = S = 70
    q, k, v = (rng.standard_normal((1, 2, L, 16)).astype(DTYPES[dtype]) for _ in range(3))
    k[0, 0, 40, 3], v[0, 1, 50, 2], v[0, 0, 65, :] = value, value, value
    mask = rng.random((2, L, S)) < 0.8
    mask[:, :, 0] = True
    for options in ({"is_causal": True}, {"mask": mask}, {"window": (10, 3)}):
        out, lse = na.attention(q, k, v, **options, return_lse=True, backend="cuda")
        want, want_lse = na.attention(q, k, v, **options, return_lse=True, backend="reference")
        np.testing.assert_array_equal(np.isnan(out), np.isnan(want))
        np.testing.assert_array_equal(np.isnan(lse), np.isnan(want_lse))
        untouched = np.isfinite(np.asarray(want, np.float64)).all(-1)
        assert untouched.any()
        assert not untouched.all()
        assert_close(out[untouched], want[untouched], tolerance(dtype)[0])
        grad = rng.standard_normal(out.shape).astype(out.dtype)
        got = na.attention_backward(grad, q, k, v, out, lse, **options, backend="cuda")
        expected = na.attention_backward(grad, q, k, v, want, want_lse, **options, backend="reference")
        for a, b in zip(got[:3], expected[:3], strict=True):
            np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))


def test_the_same_call_has_the_same_bits(gpu):
    case = Case(40, 70, options=("causal", "bias of keys"))
    arrays_, kwargs = case.arrays("float32"), case.kwargs()
    runs = []
    for _ in range(2):
        out, lse = na.attention(*arrays_, **kwargs, return_lse=True, backend="cuda")
        runs.append([out, *na.attention_backward(out, *arrays_, out, lse, **kwargs, backend="cuda")])
    for a, b in zip(*runs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("wide", [False, True])
def test_warmup_compiles_what_calls_need(monkeypatch, wide):
    """The kernels of plain calls are those compiled ahead; so are those of blocks of Dask, whose results are wide."""
    from numba_attention.backends import cuda

    if wide:
        tasks = pytest.importorskip("numba_attention.dask.tasks")
        run = tasks.Run("cuda", None)

    def attend(q, k, v, causal):
        if wide:
            return tasks.part(q, k, v, None, None, Options(is_causal=causal), run)
        return na.attention(q, k, v, is_causal=causal, return_lse=True, backend="cuda")

    def differentiate(q, k, v, out, lse, causal):
        if wide:
            options = Options(is_causal=causal)
            return tasks.pair_gradients(q, q, k, v, out.astype(q.dtype), lse, None, None, None, options, run)
        return na.attention_backward(out, q, k, v, out, lse, is_causal=causal, backend="cuda")

    with emulated(monkeypatch, races=False) as driver:
        for _, job in cuda.warmup_jobs(wide):
            job()
        ahead = set(driver.configs)
        driver.configs.clear()
        for dtype in ("bfloat16", "float32"):
            q, k, v = (np.zeros((1, heads, 40, 64), DTYPES[dtype]) for heads in (8, 2, 2))
            for causal in (False, True):
                differentiate(q, k, v, *attend(q, k, v, causal), causal)
            few = np.zeros((1, 2, 300, 64), DTYPES[dtype])
            attend(q[:, :, :1], few, few, False)
        assert len(driver.configs) > 15
        assert any(c.to for c in driver.configs.values()) >= wide
        assert set(driver.configs) <= ahead


def test_too_many_heads_are_refused(gpu):
    q = np.zeros((65536, 1, 1), np.float32)
    with pytest.raises(ValueError, match="up to 65535 heads, got 65536; make some"):
        na.attention(q, q, q, backend="cuda")


@pytest.mark.parametrize(
    ("L", "S", "options", "multiprocessors"),
    [
        (800, 520, {"is_causal": "bottom-right"}, 132),
        (1, 600, {"is_causal": True, "query_offset": -200}, 4),
        (1, 600, {"window": (10, 0), "query_offset": 2000}, 4),
    ],
)
def test_tiles_that_see_no_keys(monkeypatch, L, S, options, multiprocessors):
    """Where keys are shared out among blocks there is nothing to share; `multiprocessors` decides on how many."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 32)).astype(np.float16) for n in (L, S, S))
    with emulated(monkeypatch, races=False, multiprocessors=multiprocessors) as driver:
        out, lse = na.attention(q, k, v, **options, return_lse=True, backend="cuda")
    assert any(c.split_kv for c in driver.configs.values())
    want, want_lse = na.attention(q, k, v, **options, return_lse=True, backend="reference")
    assert_close(out, want, tolerance("float16")[0])
    assert_close(lse, want_lse, tolerance("float16")[1], offset=1)


INTERVALS = st.fixed_dictionaries(
    {
        "is_causal": st.booleans(),
        "window": st.tuples(*(st.none() | st.integers(0, 100) for _ in range(2))),
        "query_offset": st.sampled_from([-500, -90, 0, 7, 2000]) | st.integers(-100, 700),
    }
)
DEVICES = st.sampled_from([((7, 5), 65536), ((8, 0), 166912), ((9, 0), 232448), ((12, 0), 101376)])


@settings(max_examples=200 if THOROUGH else 30, deadline=None)
@given(cases(), st.integers(1, 700), dtypes, INTERVALS, DEVICES, st.sampled_from([1, 16, 132]))
def test_any_interval_on_any_device(case, S, dtype, options, device, multiprocessors):
    """Tiles and shares of keys follow from shapes and the device; what they sum up to does not."""
    case = replace(case, L=min(case.L, 50), S=S)
    arrays_ = case.arrays(dtype)
    with (
        pytest.MonkeyPatch.context() as patch,
        emulated(patch, races=False, capability=device[0], shared_memory=device[1], multiprocessors=multiprocessors),
    ):
        got = na.attention(*arrays_, **options, return_lse=True, backend="cuda")
    want = na.attention(*(x.astype(np.float64) for x in arrays_), **options, return_lse=True, backend="reference")
    for x, y, limit, offset in zip(got, want, tolerance(dtype, case), (0, 1), strict=True):
        assert_close(x, y, 2 * limit, offset=offset)


def test_long_tiles_begin_first(monkeypatch):
    """A device begins blocks in their order: those of causal tiles with most work first, of some heads in turn."""
    seen = {"forward": [], "key": []}

    def watch(module):
        block_of = module.block_of

        def noted(e, c, p, names, index, tile, head, *rest):
            if c.task in seen and not c.nan_safe:
                seen[c.task].append((int(np.ravel(head.x)[0]), int(np.ravel(tile.x)[0])))
            return block_of(e, c, p, names, index, tile, head, *rest)

        monkeypatch.setattr(module, "block_of", noted)

    watch(forward)
    watch(backward)
    q = np.zeros((4, 600, 32), np.float16)
    with emulated(monkeypatch, races=False, multiprocessors=8):
        out, lse = na.attention(q, q, q, is_causal=True, return_lse=True, backend="cuda")
        na.attention_backward(out, q, q, q, out, lse, is_causal=True, backend="cuda")
    found = {task: list(dict.fromkeys(blocks)) for task, blocks in seen.items()}
    # Five tiles of 128 rows, and room for 16 blocks: two heads at a time.
    pairs = [(first + n, tile) for first in (0, 2) for tile in range(5) for n in (0, 1)]
    assert found["key"] == pairs
    assert found["forward"] == [(head, 4 - tile) for head, tile in pairs]


# Some of the stored formats with each dtype, in turn; rows of 24 numbers of a byte cannot be copied in pieces of 16.
STORED = [
    (storage, dtype, E, page_size)
    for n, (storage, dtype) in enumerate(every(("int8", "float8", "bfloat16", "float16"), DTYPES))
    for m, (E, page_size) in enumerate([(32, None), (32, 16), (24, None), (24, 16)])
    if storage != dtype and ((n + m) % 2 or THOROUGH)
]


@pytest.mark.parametrize(("storage", "dtype", "E", "page_size"), STORED)
@pytest.mark.parametrize("L", [1, 20])
def test_stored_in_fewer_bits(gpu, storage, dtype, E, page_size, L):
    q, k, v = arrays(3, 8, 2, L, 130, E, 40 if E == 24 else 64, dtype=dtype)
    cache = filled(k, v, [130, 33, 77], storage, page_size)
    of_out, of_lse = tolerance(dtype)
    for options in ({}, {"window": (20, 0), "softcap": 3.0}):
        out, lse = na.attention_decode(q, cache, **options, return_lse=True, backend="cuda")
        want, want_lse = na.attention_decode(q, cache, **options, return_lse=True, backend="reference")
        # (Keys and values are rounded once more on the way to tensor cores.)
        assert_close(out, want, 2 * of_out)
        assert_close(lse, want_lse, max(of_lse, of_out), offset=1)
    forward = [c for c in gpu.configs.values() if c.task == "forward" and not c.nan_safe]
    assert all(c.kv_storage for c in forward)
    assert any(c.copies_codes for c in forward) == (E == 32 or storage.startswith(("bfloat", "float16")))


@pytest.mark.parametrize("page_size", [None, 16])
def test_a_row_that_could_not_be_stored_is_nan_where_it_is_seen(gpu, page_size):
    q, k, v = arrays(2, 4, 2, 20, 100, 32, dtype="float16")
    k[0, 0, 90], v[1, 1, 95, 3] = np.inf, np.nan
    cache = filled(k, v, [100, 100], "int8", page_size)
    got = na.attention_decode(q, cache, window=(5, 0), backend="cuda")
    want = na.attention_decode(q, cache, window=(5, 0), backend="reference")
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    assert 0 < np.isnan(want).sum() < want.size
    assert_close(got[~np.isnan(want)], want[~np.isnan(want)], 2 * tolerance("float16")[0])


def test_a_wrong_kernel_is_found(monkeypatch):
    """Without the barrier after the copies the emulator must object: these tests can fail."""
    q = np.ones((1, 70, 32), np.float32)
    with emulated(monkeypatch) as driver:
        na.attention(q, q, q, backend="cuda")
        for emulator, _ in driver.made.values():
            emulator.cuda.syncthreads = lambda: None
        with pytest.raises(AssertionError, match=r"barrier|under way"):
            na.attention(q, q, q, backend="cuda")


def test_simulator():
    """The simplest form of the kernels in numba-cuda's simulator, which must be chosen before it is imported."""
    here = Path(__file__).parents[1] / "support"
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(here / "simulate.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("simulated: ") == 7
