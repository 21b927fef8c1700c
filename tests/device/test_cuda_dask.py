"""Dask arrays with blocks on a GPU: where they are computed, what is copied, what the results are.

The device is the host, its kernels are the reference backend, and blocks are fakes of CuPy's arrays.
"""

import sys

import numpy as np
import pytest

import numba_attention as na
from device import CupyArray, fake_cupy

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
nad = pytest.importorskip("numba_attention.dask")

pytestmark = pytest.mark.usefixtures("synchronous", "cupy")


@pytest.fixture
def cupy(monkeypatch, device):
    """CuPy on a device; nobody touches the number of threads of kernels on the host."""
    from numba_attention.dask import tasks

    def touched(number):
        raise AssertionError("the number of threads of kernels on the host was set")

    module = fake_cupy()
    monkeypatch.setitem(sys.modules, "cupy", module)
    # As Dask does for CuPy's own arrays.
    registered = sys.modules["dask.array.dispatch"].concatenate_lookup._lookup
    monkeypatch.setitem(registered, CupyArray, concatenated)
    monkeypatch.setattr(tasks.numba, "set_num_threads", touched)
    return module


def concatenated(arrays, axis=0):
    return CupyArray(np.concatenate([x.header for x in arrays], axis))


def on_device(x, chunks):
    meta = CupyArray(np.empty((0,) * x.ndim, x.dtype))
    return da.from_array(x, chunks=chunks).map_blocks(CupyArray, meta=meta, dtype=x.dtype)


def whole(x):
    """The numbers of a lazy array, all blocks of which are on the device."""
    assert isinstance(x._meta, CupyArray)
    assert x._meta.dtype == x.dtype
    (blocks,) = dask.compute(x.to_delayed().tolist())

    def numbers(blocks):
        if isinstance(blocks, list):
            return [numbers(block) for block in blocks]
        assert type(blocks) is CupyArray
        assert blocks.dtype == x.dtype
        return np.array(blocks.array)

    return np.block(numbers(blocks))


def flat(grads):
    return [*grads[:5], *(grads.mod_args or ())]


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def tilt(score, batch, head, i, j, table, factor):
    return score + factor * table[head] * (i - 2 * j + batch)


def sieve(batch, head, i, j, table, factor):
    return (i + 3 * j + 2 * head + batch) % 4 != 0


SHAPES = (2, 4, 20, 8), (2, 2, 30, 8), (2, 2, 30, 5)
CHUNKS = (1, 2, 7, 8), (1, 1, 11, 8), (1, 1, 11, 5)
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": "bottom-right", "softcap": 3.0},
    "sinks": {"sinks": np.ones(4, np.float32), "window": (5, 3), "key_lengths": [30, 4]},
    "query lengths": {"query_lengths": [5, 20], "alibi_slopes": np.full(4, 0.1)},
    "block mask": {"mask": na.BlockMask.from_array(np.tri(20, 30, dtype=bool))},
    "dropout": {"dropout_p": 0.3, "seed": 2**40 + 1, "is_causal": "bottom-right"},
    "mods": {"score_mod": tilt, "mask_mod": sieve, "mod_args": (np.linspace(-1, 1, 4), 0.1)},
    "everything": {
        "dropout_p": 0.1, "seed": 5, "score_mod": tilt, "mask_mod": sieve, "mod_args": (np.linspace(-1, 1, 4), 0.1),
        "sinks": np.ones(4, np.float32), "key_lengths": [30, 4],
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_blocks_stay_on_the_device(device, name, dtype):
    options, limit = OPTIONS[name], 1e-5 if dtype == np.float32 else 5e-3
    arrays = [normal(*shape, dtype=dtype) for shape in SHAPES]
    wide = [x.astype(np.float64) for x in arrays]
    want, want_lse = na.attention(*wide, return_lse=True, backend="reference", **options)
    lazies = [on_device(x, c) for x, c in zip(arrays, CHUNKS, strict=True)]
    out, lse = nad.attention(*lazies, return_lse=True, stream=name == "causal", **options)
    np.testing.assert_allclose(whole(out), want, atol=limit)
    np.testing.assert_allclose(whole(lse), want_lse, atol=1e-5)
    grad = normal(*want.shape, dtype=dtype)
    given = options | {"mod_grads": "all" if "score_mod" in options else None}
    grads = na.attention_backward(on_device(grad, (1, 2, 7, 5)), *lazies, out, lse, **given)
    wanted = na.attention_backward(grad.astype(np.float64), *wide, want, want_lse, backend="reference", **given)
    for got, right in zip(flat(grads), flat(wanted), strict=True):
        assert (got is None) == (right is None)
        if got is not None:
            np.testing.assert_allclose(whole(got), right, atol=10 * limit)
    assert [kind for kind, *_ in device.copies if kind == "read"] == []


@pytest.mark.parametrize("name", ["sinks", "everything"])
def test_packed_blocks_stay_on_the_device(device, name):
    arrays = [normal(60, heads, 8) for heads in (4, 2, 2)]
    starts = [0, 7, 7, 40, 60]
    bias, options = normal(4, 60, 60), {"is_causal": True, "sinks": np.zeros(4, np.float32)}
    learned = {}
    if name == "everything":
        learned = {"mod_grads": 0}
        options |= {name: x for name, x in OPTIONS[name].items() if name not in ("sinks", "key_lengths")}
    lazies = [on_device(x, (13, heads, 8)) for x, heads in zip(arrays, (2, 1, 1), strict=True)]
    lazy_bias = on_device(bias, (2, 13, 13))
    out, lse = na.attention_varlen(*lazies, starts, starts, return_lse=True, bias=lazy_bias, **options)
    want, want_lse = na.attention_varlen(
        *arrays, starts, starts, return_lse=True, bias=bias, backend="reference", **options
    )
    np.testing.assert_allclose(whole(out), want, atol=1e-5)
    np.testing.assert_allclose(whole(lse), want_lse, atol=1e-5)
    grads = na.attention_varlen_backward(
        on_device(want, (13, 4, 8)), *lazies, out, lse, starts, starts, bias=lazy_bias, **options, **learned
    )
    wanted = na.attention_varlen_backward(
        want, *arrays, want, want_lse, starts, starts, bias=bias, backend="reference", **options, **learned
    )
    for got, right in zip(flat(grads), flat(wanted), strict=True):
        assert (got is None) == (right is None)
        if got is not None:
            np.testing.assert_allclose(whole(got), right, atol=1e-4)
    assert [kind for kind, *_ in device.copies if kind == "read"] == []


def test_arrays_of_numpy_are_sent_once_for_each_block(device):
    """A mask that all heads share has one copy for each of its blocks; few queries of NumPy are sent as well."""
    query, key, value = (normal(*shape) for shape in SHAPES)
    mask = np.random.default_rng(0).random((20, 30)) < 0.8
    want = na.attention(query, key, value, mask=mask, backend="reference")
    lazies = [on_device(x, c) for x, c in zip((key, value), CHUNKS[1:], strict=True)]
    lazies = dask.persist(*lazies)
    out = na.attention(query, *lazies, mask=da.from_array(mask, chunks=(20, 11)))
    device.copies.clear()
    np.testing.assert_allclose(whole(out), want, atol=1e-5)
    sent = sorted(size for kind, size, _ in device.copies if kind == "write")
    of_masks, of_queries = [20 * n for n in (8, 11, 11)], [2 * 20 * 8 * 4] * 4
    rest = list(sent)
    for size in of_masks + of_queries:
        rest.remove(size)
    assert not any(size in (20 * 11, 2 * 20 * 8 * 4) for size in rest)
    assert [kind for kind, *_ in device.copies if kind == "read"] == []


def test_what_is_refused():
    q = on_device(normal(2, 20, 8), (1, 7, 8))
    x = da.from_array(normal(2, 20, 8), chunks=(1, 7, 8))
    with pytest.raises(ValueError, match="backend must be 'cuda' for blocks on a GPU"):
        na.attention(q, q, q, backend="cpu")
    with pytest.raises(TypeError, match="bias has blocks on a GPU, and query, key and value have not"):
        na.attention(x, x, x, bias=on_device(normal(20, 20), 7))
    layer = na.MultiHeadAttention(8, 2, rng=0)
    with pytest.raises(TypeError, match="query has blocks on a GPU"):
        layer(q)


def test_a_client_without_a_gpu_builds_graphs_for_workers_that_have_one(monkeypatch, device):
    """An array on the device and one of Dask are for Dask, and so is a call that names the backend."""
    monkeypatch.setattr(type(device), "unusable", lambda self: "no driver was found")
    x = da.from_array(normal(2, 20, 8), chunks=(1, 7, 8))
    assert isinstance(na.attention(x, x, x, backend="cuda"), da.Array)
    assert isinstance(na.attention(CupyArray(normal(2, 20, 8)), *[on_device(normal(2, 20, 8), 8)] * 2), da.Array)
