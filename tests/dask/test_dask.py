"""Attention over Dask arrays of any chunks, against the formulas in float64 on the whole arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numba_attention as na
from cases import DTYPES

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
nad = pytest.importorskip("numba_attention.dask")


@pytest.fixture(autouse=True)
def _synchronous():
    with dask.config.set(scheduler="synchronous"):
        yield


def chop(rng, n):
    """Random chunks of an axis: uneven, often of 1, sometimes empty."""
    if n == 0:
        return (0,)
    cuts = np.sort(rng.choice(np.arange(1, n), size=rng.integers(0, min(n, 6)), replace=False)) if n > 1 else []
    chunks = [int(x) for x in np.diff([0, *cuts, n])]
    if rng.random() < 0.1:
        chunks.insert(int(rng.integers(0, len(chunks) + 1)), 0)
    return tuple(chunks)


def lazy(rng, x):
    return da.from_array(x, chunks=tuple(chop(rng, n) for n in x.shape))


def call_of(rng, dtype=np.float64):
    """Draw query, key, value and options: everything mixed."""
    B = tuple(int(x) for x in rng.integers(1, 4, size=rng.integers(0, 3)))
    Hkv = int(rng.integers(1, 4))
    H = Hkv * int(rng.choice([1, 1, 2, 3]))
    L, S = (int(rng.integers(1, 40)) if rng.random() < 0.95 else 0 for _ in range(2))
    E, Ev = int(rng.choice([4, 8])), int(rng.choice([4, 8, 5]))

    def narrow(b):
        sizes = tuple(n if rng.random() < 0.8 else 1 for n in b)
        return sizes[int(rng.integers(0, len(b) + 1)) if b and rng.random() < 0.3 else 0 :]

    q = rng.standard_normal((*(B if rng.random() < 0.8 else narrow(B)), H, L, E)).astype(dtype)
    k = rng.standard_normal((*narrow(B), Hkv, S, E)).astype(dtype)
    v = rng.standard_normal((*(k.shape[:-3] if rng.random() < 0.7 else narrow(B)), Hkv, S, Ev)).astype(dtype)
    B = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    flat = H == Hkv == 1 and all(n == 1 for n in (*q.shape[:-3], *k.shape[:-3], *v.shape[:-3])) and rng.random() < 0.5
    if flat:
        q, k, v, B = q.reshape(L, E), k.reshape(S, E), v.reshape(S, Ev), ()
    full = (*B, H, L, S)

    def some():
        sizes = tuple(n if rng.random() < 0.6 else 1 for n in full)
        return sizes[int(rng.integers(0, 3)) if rng.random() < 0.4 else 0 :]

    def per_sequence(low, high):
        return int(rng.integers(low, high)) if rng.random() < 0.3 else rng.integers(low, high, size=B)

    options = {
        "is_causal": [True, "top-left", "bottom-right"][rng.integers(3)],
        "window": [None if rng.random() < 0.3 else int(rng.integers(0, 12)) for _ in range(2)],
        "query_offset": per_sequence(-20, 40),
        "softcap": 2.0,
        "scale": 0.7,
        "alibi_slopes": rng.random(H if rng.random() < 0.5 else (*B, H)),
        "sinks": rng.standard_normal(H),
        "key_lengths": per_sequence(0, S + 1),
        "query_lengths": per_sequence(0, L + 1),
        "prefix_lengths": per_sequence(0, S + 1),
        "mask": rng.random(some()) < 0.7,
        "bias": rng.standard_normal(some()),
    }
    assert set(options) == {name for name in nad.layout.SUPPORTED}
    options["bias"][rng.random(options["bias"].shape) < 0.1] = -np.inf
    options = {name: x for name, x in options.items() if rng.random() < 0.3}
    if options.get("window") is not None and options["window"][0] is not None:
        options.pop("prefix_lengths", None)
    return (q, k, v), options


def errors(got, want):
    """Return the largest error, relative to the largest number of at least 1."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    errors = np.abs(np.subtract(got, want, out=np.zeros(got.shape), where=~same))
    return float(np.max(errors, initial=0) / np.max(np.abs(want[np.isfinite(want)]), initial=1))


def check(seed, dtype=np.float64, backend="reference", limits=(1e-12, 1e-12), **more):
    rng = np.random.default_rng(seed)
    arrays, options = call_of(rng, dtype)
    wide = [x.astype(np.float64) for x in arrays]
    want, want_lse = na.attention(*wide, return_lse=True, backend="reference", **options)
    blocks = [lazy(rng, x) if rng.random() < 0.9 else x for x in arrays]
    over_blocks = {n: lazy(rng, x) if n in ("mask", "bias") and rng.random() < 0.5 else x for n, x in options.items()}
    over_blocks |= {"backend": backend, "split_every": int(rng.integers(2, 5)), "stream": bool(rng.random() < 0.3)} | more
    out, lse = nad.attention(*blocks, return_lse=True, **over_blocks)
    assert (out.dtype, out.shape, lse.shape) == (arrays[0].dtype, want.shape, want_lse.shape)
    got, got_lse = dask.compute(out, lse)
    assert (got.dtype, got_lse.dtype) == (out.dtype, lse.dtype)
    assert errors(got, want) < limits[0]
    assert errors(got_lse, want_lse) < limits[0]
    grad_out = rng.standard_normal(want.shape).astype(dtype)
    grad_lse = rng.standard_normal(want_lse.shape).astype(got_lse.dtype) if rng.random() < 0.5 else None
    wanted = na.attention_backward(
        grad_out.astype(np.float64), *wide, want, want_lse, backend="reference", **options,
        grad_lse=None if grad_lse is None else grad_lse.astype(np.float64),
    )  # fmt: skip
    lazy_grads = nad.attention_backward(
        lazy(rng, grad_out), *blocks, out, lse, grad_lse=None if grad_lse is None else lazy(rng, grad_lse), **over_blocks
    )
    inputs = dict(zip(("query", "key", "value"), arrays, strict=True)) | options
    for name, got, want in zip(na.Gradients._fields, dask.compute(*lazy_grads), wanted, strict=True):
        assert (got is None) == (want is None), name
        if got is not None:
            assert (got.shape, got.dtype) == (inputs[name].shape, inputs[name].dtype), name
            assert errors(got, want) < limits[1], name


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_any_chunks_and_options(seed):
    check(seed)


LIMITS = {"float32": (2e-6, 1e-5), "float16": (6e-4, 2e-3), "bfloat16": (5e-3, 1.5e-2)}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("seed", range(6))
def test_dtypes_on_kernels(dtype, seed):
    check(seed, DTYPES[dtype], "cpu", LIMITS[dtype])
