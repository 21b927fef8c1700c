"""What packed sequences may be given: any integers as offsets; the rest is refused in words that say what and why."""

import numpy as np
import pytest

import numba_attention as na


@pytest.mark.parametrize("kind", [list, tuple, np.int32, np.uint64, "strided"])
def test_offsets_may_be_any_integers(kind):
    q, k, v = (np.random.default_rng(0).standard_normal((12, 2, 8)) for _ in range(3))
    offsets = [np.array(x) for x in ([0, 7, 7, 12], [0, 3, 9, 12])]
    want = na.attention_varlen(q, k, v, *offsets)
    if kind == "strided":
        offsets = [np.repeat(x, 2)[::2] for x in offsets]
    else:
        offsets = [kind(x.tolist()) if kind in (list, tuple) else x.astype(kind) for x in offsets]
    np.testing.assert_array_equal(na.attention_varlen(q, k, v, *offsets), want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens_q": [0, 3, 9]}, ValueError, "cu_seqlens_q must go from 0 to 10"),
        ({"cu_seqlens_k": [1, 12]}, ValueError, "cu_seqlens_k must go from 0 to 12"),
        ({"cu_seqlens_q": [0, 8, 4, 10]}, ValueError, "cu_seqlens_q must not decrease"),
        ({"cu_seqlens_q": [0, 10]}, ValueError, "same sequences, got 1 and 2"),
        ({"cu_seqlens_q": [[0, 10]]}, ValueError, r"cu_seqlens_q must have shape \(sequences \+ 1,\)"),
        ({"cu_seqlens_q": []}, (TypeError, ValueError), "cu_seqlens_q must"),
        ({"cu_seqlens_k": [0.0, 5.0, 12.0]}, TypeError, "cu_seqlens_k must be integer"),
        ({"query": np.zeros((1, 10, 4, 8), np.float32)}, ValueError, r"query must have shape \(tokens, heads, feat"),
        ({"key": [1.0]}, TypeError, "key must be a numpy.ndarray"),
        ({"value": np.zeros((12, 2, 8))}, TypeError, "share one dtype"),
        ({"query_lengths": [4, 7]}, ValueError, "query_lengths must lie between 0 and the length of each sequence"),
        ({"mask": np.ones((4, 10, 11), bool)}, ValueError, "mask of shape"),
        ({"mask": np.ones((10, 12))}, TypeError, "mask must be boolean"),
        ({"bias": np.zeros((3, 4, 10, 12), np.float32)}, ValueError, "bias of shape"),
        ({"out": np.zeros((4, 10, 8), np.float32)}, ValueError, "out must have shape"),
        ({"out": np.zeros((10, 4, 8))}, TypeError, "out must have the dtype of query"),
        ({"out": np.broadcast_to(np.float32(0), (10, 4, 8))}, ValueError, "out must be writeable"),
        ({"query_lengths": -1}, ValueError, "query_lengths must lie .* got -1 for sequence 0 of 4"),
        ({"key_lengths": [5, 8]}, ValueError, "key_lengths must lie .* got 8 for sequence 1 of 7"),
        ({"key_lengths": [5, 5, 5]}, ValueError, "key_lengths of shape"),
        ({"prefix_lengths": [5, 8]}, ValueError, "prefix_lengths must lie .* got 8 for sequence 1 of 7"),
        ({"query_offset": [1, 2, 3]}, ValueError, "query_offset of shape"),
        ({"alibi_slopes": np.ones((3, 4))}, ValueError, "alibi_slopes of shape"),
        ({"sinks": np.ones(3)}, ValueError, "sinks must have shape"),
        ({"cu_seqlens_q": [False, True]}, TypeError, "cu_seqlens_q must be integer"),
        ({"cu_seqlens_q": [False, 5, 12]}, TypeError, "cu_seqlens_q must not mix truth values with numbers"),
        ({"cu_seqlens_k": iter([0, 5, 12])}, TypeError, "cu_seqlens_k must be an array, a number or a list"),
        ({"cu_seqlens_k": None}, TypeError, "cu_seqlens_k must be an array"),
        ({"value": np.zeros((11, 2, 8), np.float32)}, ValueError, "value must have the heads and length of key"),
        ({"key": np.zeros((12, 3, 8), np.float32)}, ValueError, "3 heads, which must divide the 4"),
        ({"bias": np.zeros((2, 1, 1, 1, 1), np.float32)}, ValueError, "bias of shape"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {
        "query": np.zeros((10, 4, 8), np.float32), "key": np.zeros((12, 2, 8), np.float32),
        "value": np.zeros((12, 2, 8), np.float32), "cu_seqlens_q": [0, 4, 10], "cu_seqlens_k": [0, 5, 12],
    }  # fmt: skip
    na.attention_varlen(**arguments)
    with pytest.raises(error, match=message):
        na.attention_varlen(**arguments | change)


def test_out_may_not_overlap():
    x = np.zeros((10, 4, 8), np.float32)
    with pytest.raises(ValueError, match="out must not overlap an input, it shares memory with key"):
        na.attention_varlen(x.copy(), x, x.copy(), [0, 10], [0, 10], out=x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad_out": np.zeros((10, 4, 9), np.float32)}, ValueError, r"grad_out must have shape \(10, 4, 8\)"),
        ({"grad_out": np.zeros((10, 4, 8))}, TypeError, "grad_out must have dtype float32"),
        ({"out": np.zeros((4, 10, 8), np.float32)}, ValueError, r"out must have shape \(10, 4, 8\)"),
        ({"lse": np.zeros((10, 4), np.float32)}, ValueError, r"lse must have shape \(4, 10\)"),
        ({"lse": None}, TypeError, "lse must be a numpy.ndarray"),
        ({"grad_lse": np.zeros((4, 10))}, TypeError, "grad_lse must have dtype float32"),
        ({"grad_lse": np.zeros((10, 4), np.float32)}, ValueError, r"grad_lse must have shape \(4, 10\)"),
        ({"cu_seqlens_k": [0, 13]}, ValueError, "cu_seqlens_k must go from 0 to 12"),
        ({"key": np.zeros((2, 8), np.float32)}, ValueError, "key must have shape"),
    ],
)
def test_bad_input_of_the_backward_pass(change, error, message):
    arguments = {
        "grad_out": np.zeros((10, 4, 8), np.float32), "query": np.zeros((10, 4, 8), np.float32),
        "key": np.zeros((12, 2, 8), np.float32), "value": np.zeros((12, 2, 8), np.float32),
        "out": np.zeros((10, 4, 8), np.float32), "lse": np.zeros((4, 10), np.float32),
        "cu_seqlens_q": [0, 10], "cu_seqlens_k": [0, 12],
    }  # fmt: skip
    na.attention_varlen_backward(**arguments)
    with pytest.raises(error, match=message):
        na.attention_varlen_backward(**arguments | change)


def test_lengths_of_no_sequences_may_be_an_empty_list():
    x = np.zeros((0, 2, 3, 4), np.float32)
    out, lse = na.attention(x, x, x, key_lengths=[], query_lengths=[], query_offset=[], is_causal=True, return_lse=True)
    assert out.shape == (0, 2, 3, 4)
    assert lse.shape == (0, 2, 3)
    with pytest.raises(TypeError, match="key_lengths must be integer"):
        na.attention(x, x, x, key_lengths=np.zeros(0))
