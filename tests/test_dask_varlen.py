"""Packed sequences in Dask arrays whose chunks cut them anywhere, against the formulas on the whole arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numba_attention as na
from cases import DTYPES

da = pytest.importorskip("dask.array")
nad = pytest.importorskip("numba_attention.dask")
blocks = pytest.importorskip("dask_blocks")

pytestmark = pytest.mark.usefixtures("synchronous")


def packed_call(rng, dtype=np.float64):
    """Draw query, key, value, offsets and options: everything mixed, sequences of 0 to 40 tokens."""
    n = int(rng.integers(0, 6))
    rows, keys = (rng.integers(0, 41, size=n) * (rng.random(n) < 0.85) for _ in range(2))
    if rng.random() < 0.3:
        keys = rows
    starts = [np.concatenate([[0], np.cumsum(x)]) for x in (rows, keys)]
    (T_q, T_k), L, S = (int(x[-1]) for x in starts), int(rows.max(initial=0)), int(keys.max(initial=0))
    H, Hkv, E, Ev = blocks.heads_and_features(rng)
    shapes = (T_q, H, E), (T_k, Hkv, E), (T_k, Hkv, Ev)
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]

    def per_pair():
        axes = [n, H, int(rng.choice([L, T_q])), int(rng.choice([S, T_k]))]
        axes = [size if rng.random() < 0.6 else 1 for size in axes]
        first = int(rng.integers(0, 3)) if axes[0] == 1 and rng.random() < 0.5 else 0
        return axes[first if axes[1] == 1 else min(first, 1) :]

    def per_sequence(low, high):
        high = np.broadcast_to(high, n)
        return (low + (high - low) * rng.random(n)).astype(int)

    options = blocks.options_of(rng, (n,), H, (rows, keys), per_sequence, per_pair)
    if "mask" in options and L and S:
        for size, sequences in (((L, S), n), ((T_q, T_k), 1)):
            leading = options["mask"].shape[:-3]
            if options["mask"].shape[-2:] == size and set(leading) <= {1, sequences} and rng.random() < 0.5:
                options["mask"] = na.BlockMask.from_array(options["mask"])
                break
    return arrays, starts, options


@settings(max_examples=80)
@given(st.integers(0, 2**32 - 1))
def test_any_chunks_and_options(seed):
    rng = np.random.default_rng(seed)
    blocks.check(rng, "attention_varlen", *packed_call(rng))


@pytest.mark.parametrize("dtype", blocks.LIMITS)
@pytest.mark.parametrize("seed", range(6))
def test_dtypes_on_kernels(dtype, seed):
    rng = np.random.default_rng(seed)
    call = packed_call(rng, DTYPES[dtype])
    blocks.check(rng, "attention_varlen", *call, "cpu", blocks.LIMITS[dtype])


def whole_and_lazy(tokens, chunks, H=2, E=4):
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal((tokens, H, E)) for _ in range(3)]
    return arrays, [da.from_array(x, chunks=(chunks, H, E)) for x in arrays]


def test_attention_varlen_hands_over():
    arrays, lazies = whole_and_lazy(60, 13)
    starts = [0, 7, 7, 40, 60]
    out, lse = na.attention_varlen(*lazies, starts, starts, is_causal=True, return_lse=True, backend="reference")
    want, want_lse = na.attention_varlen(*arrays, starts, starts, is_causal=True, return_lse=True, backend="reference")
    assert out.chunks == ((13, 13, 13, 13, 8), (2,), (4,))
    np.testing.assert_allclose(out, want, atol=1e-14)
    np.testing.assert_allclose(lse, want_lse, atol=1e-14)
    options = {"is_causal": True, "backend": "reference"}
    grads = na.attention_varlen_backward(da.ones_like(out), *lazies, out, lse, starts, starts, **options)
    wanted = na.attention_varlen_backward(np.ones_like(want), *arrays, want, want_lse, starts, starts, **options)
    for got, x in zip(grads[:3], wanted[:3], strict=True):
        assert got.chunks == out.chunks
        np.testing.assert_allclose(got, x, atol=1e-13)
    assert na.attention_varlen(*lazies, starts, starts).name == na.attention_varlen(*lazies, starts, starts).name
    assert na.attention_varlen(*lazies, starts, starts).name != na.attention_varlen(*lazies, [0, 60], [0, 60]).name


def test_only_blocks_of_one_sequence_see_each_other():
    x = da.zeros((1600, 4, 8), chunks=(100, 4, 8))

    def pairs(starts, **options):
        graph = dict(na.attention_varlen(x, x, x, starts, starts, **options).__dask_graph__())
        return sum(key[0].startswith("attention-part") for key in graph)

    assert pairs([0, 1600]) == 256
    assert pairs([0, 1600], is_causal=True) == 136
    assert pairs(np.arange(0, 1601, 100)) == 16
    assert pairs(np.arange(0, 1601, 50)) == 16
    assert pairs([0, 150, 1600]) == 2 * 2 + 15 * 15 - 1
    assert pairs([0, 150, 1600], is_causal=True) == 3 + (15 * 16) // 2 - 1
    assert pairs([0, 800, 1600], window=(100, 0), is_causal=True) == 2 * (7 + 8)
    assert pairs([0, 800, 1600], key_lengths=[800, 100]) == 64 + 8
    document = na.BlockMask.documents([400, 400])
    assert pairs([0, 800, 1600], mask=document) == 4 * 16


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cu_seqlens_q": [0, 59]}, ValueError, "cu_seqlens_q must go from 0 to 60"),
        ({"cu_seqlens_k": da.arange(2)}, TypeError, "pass cu_seqlens_k.compute"),
        ({"key_lengths": [61, 0]}, ValueError, "key_lengths must lie between 0"),
        ({"mask": np.ones((59, 60), bool)}, ValueError, "mask of shape"),
        ({"split_every": 0}, ValueError, "split_every must be at least 2"),
        ({"out": np.zeros((60, 2, 4))}, TypeError, "out must be None|unexpected keyword argument 'out'"),
        ({"query": da.zeros((2, 60), chunks=7)}, ValueError, "query must have shape"),
        ({"query": da.zeros((60, 3, 4), chunks=7)}, ValueError, "must divide the 3 heads"),
    ],
)
def test_bad_input(change, error, words):
    _, (q, k, v) = whole_and_lazy(60, 13)
    call = {"query": q, "key": k, "value": v, "cu_seqlens_q": [0, 20, 60], "cu_seqlens_k": [0, 20, 60]} | change
    with pytest.raises(error, match=words):
        nad.attention_varlen(**call) if "split_every" in change else na.attention_varlen(**call)


def test_too_many_tasks():
    x = da.zeros((2**20, 1, 64), chunks=(1024, 1, 64), dtype=np.float32)
    with pytest.raises(ValueError, match=r"query.rechunk\(\{0: \d+\}\) and key.rechunk\(\{0: \d+\}\)"):
        na.attention_varlen(x, x, x, [0, 2**20], [0, 2**20])


SEQUENCES = {
    "one": [2**20],
    "many short": [512] * 2048,
    "of all lengths": [2**19, *[1000] * 300, 7, 0, 2**17],
    "none": [],
}


@pytest.mark.parametrize("memory", [2**29, 2**32])
@pytest.mark.parametrize("name", SEQUENCES)
def test_suggested_chunks(name, memory):
    starts = np.cumsum([0, *SEQUENCES[name]])
    shape_q, shape_k = (int(starts[-1]), 8, 64), (int(starts[-1]), 2, 64)
    sizes = nad.suggest_chunks(shape_q, shape_k, "float32", starts, workers=2, threads=1, memory=memory)
    for c, n in zip((*sizes[0], *sizes[1]), (*shape_q, *shape_k), strict=True):
        assert min(1, n) <= c <= n
    assert sizes[0][1] == 4 * sizes[1][1]
    of_tasks = 3 * 4 * (3 * np.prod(sizes[0]) + 2 * np.prod(sizes[1]))
    assert of_tasks <= 1.1 * memory / 4
    q, k = (da.zeros(s, chunks=c, dtype=np.float32) for s, c in zip((shape_q, shape_k), sizes, strict=True))
    out = na.attention_varlen(q, k, k, starts, starts)
    number = sum(key[0].startswith("attention-part") for key in dict(out.__dask_graph__()))
    work = 4 * 8 * 64 * np.square(np.diff(starts), dtype=float).sum() / 1e11
    if of_tasks < 0.4 * memory / 4:  # not bound by memory: tasks of a quarter of a second or longer, but for a few
        assert number <= max(3 * 8, 4 * work)
    if name == "many short":
        assert sizes[0][0] == sizes[1][0]  # blocks of keys of other sequences would be read for nothing
        assert number <= 2 * len(q.chunks[0]) * len(q.chunks[1])


def test_suggested_chunks_refuse():
    shape = (100, 2, 8)
    with pytest.raises(ValueError, match="cu_seqlens_q must go from 0 to 100"):
        nad.suggest_chunks(shape, shape, "float32", [0, 99])
    with pytest.raises(ValueError, match="shape_q must be \\(tokens, heads, features\\)"):
        nad.suggest_chunks((1, *shape), (1, *shape), "float32", [0, 100])
    with pytest.raises(ValueError, match="cu_seqlens_k must have the 2 offsets"):
        nad.suggest_chunks(shape, shape, "float32", [0, 100], [0, 50, 100])
    with pytest.raises(ValueError, match="cu_seqlens_q must be given"):
        nad.suggest_chunks(shape, shape, "float32", None, [0, 50, 100])


def test_a_faster_worker_gets_larger_chunks():
    shape, workers = (2**16, 2, 64), {"workers": 2, "threads": 1, "memory": 2**34}
    slow, fast = (nad.suggest_chunks(shape, shape, "float32", [0, 2**16], rate=r, **workers)[0] for r in (1e11, 1e14))
    assert slow[0] * slow[1] < fast[0] * fast[1]
