"""The oracle itself: against PyTorch's float64 math path, and loops in plain Python for what PyTorch does not have."""

import math

import numpy as np
import pytest

import numba_attention as na
from cases import DTYPES, GROUPS, OPTIONS, SOME, Case, assert_close, oracle

PYTORCH_HAS = (
    "causal", "top-left", "scale", "scale negative", "scale zero",
    *(name for name in OPTIONS if name.startswith(("mask", "bias")) and name != "mask mod"),
)  # fmt: skip
TORCH_CASES = [
    *GROUPS["heads"][::3],
    *GROUPS["batch"][::2],
    *GROUPS["features"][::4],
    *(case for case in GROUPS["layout"] if not case.options),
    *(Case(20, 30, options=(name,)) for name in PYTORCH_HAS),
    *(
        Case(20, 30, H=4, Hkv=2, options=("causal", mask, bias, "scale"))
        for mask in ("mask", "mask of keys")
        for bias in ("bias", "bias of heads")
    ),
]


@pytest.mark.torch
@pytest.mark.parametrize("case", TORCH_CASES, ids=str)
def test_against_pytorch(case, torch):
    arrays, kwargs = case.arrays("float64"), case.kwargs()
    query, key, value = (torch.from_numpy(x.copy()) for x in arrays)
    # For PyTorch all that hides or biases becomes one number per score: -inf, 0 and what lies between.
    additive = np.zeros((case.L, case.S))
    if kwargs.get("is_causal"):
        additive = np.where(np.tri(case.L, case.S, dtype=bool), additive, -np.inf)
    if "mask" in kwargs:
        additive = np.where(kwargs["mask"], additive, -np.inf)
    if "bias" in kwargs:
        additive = additive + np.asarray(kwargs["bias"]).astype(np.float64)
    additive = np.broadcast_to(additive, case.scores_shape)
    batch = case.full_batch
    query, key, value = (x.expand(*batch, *x.shape[-3:]) for x in (query, key, value))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=torch.from_numpy(additive.copy()), scale=kwargs.get("scale"), enable_gqa=True
        ).numpy()
    out = na.attention(*arrays, **kwargs, backend="reference")
    sees = (additive > -np.inf).any(axis=-1)
    assert_close(out[sees], want[sees], 1e-14 * case.scores_magnitude)
    assert not out[~sees].any()


def by_hand(query, key, value, *, visible, scale, softcap=None, slopes=None, position=None, bias=None, sinks=None):
    """Every formula with its own loop; `visible(h, i, j)`, `position(i)` and `bias(h, i, j)` are functions."""
    H, L, E = query.shape
    Hkv, S, Ev = value.shape
    out, lse = np.zeros((H, L, Ev)), np.full((H, L), -np.inf)
    for h in range(H):
        k = h * Hkv // H
        for i in range(L):
            scores = {}
            for j in range(S):
                if visible(h, i, j):
                    s = scale * sum(query[h, i, e] * key[k, j, e] for e in range(E))
                    if softcap is not None:
                        s = softcap * math.tanh(s / softcap)
                    if slopes is not None:
                        s -= slopes[h] * abs(position(i) - j)
                    if bias is not None:
                        s += bias(h, i, j)
                    scores[j] = s
            total = sum(math.exp(s) for s in scores.values())
            if sinks is not None:
                total += math.exp(sinks[h])
            if total > 0:
                lse[h, i] = math.log(total)
            for e in range(Ev):
                out[h, i, e] = sum(math.exp(s) / total * value[k, j, e] for j, s in scores.items())
    return out, lse


L, S = 7, 9
HAND = {
    "causal": ({"is_causal": True}, {"visible": lambda h, i, j: j <= i}),
    "bottom-right": ({"is_causal": "bottom-right"}, {"visible": lambda h, i, j: j <= i + 2}),
    "bottom-right with lengths": (
        {"is_causal": "bottom-right", "key_lengths": 5, "query_lengths": 6},
        {"visible": lambda h, i, j: i < 6 and j < 5 and j <= i - 1},
    ),
    "window": ({"window": (2, 1)}, {"visible": lambda h, i, j: i - 2 <= j <= i + 1}),
    "window left": ({"window": (2, None)}, {"visible": lambda h, i, j: i - 2 <= j}),
    "window right": ({"window": (None, 0)}, {"visible": lambda h, i, j: j <= i}),
    "causal window": ({"window": (3, 2), "is_causal": True}, {"visible": lambda h, i, j: i - 3 <= j <= i}),
    "bottom-right window": (
        {"window": (3, 2), "is_causal": "bottom-right"},
        {"visible": lambda h, i, j: i + 2 - 3 <= j <= i + 2},
    ),
    "offset": ({"window": (1, 1), "query_offset": -3}, {"visible": lambda h, i, j: i - 4 <= j <= i - 2}),
    "offset beats alignment": (
        {"is_causal": "bottom-right", "query_offset": 1},
        {"visible": lambda h, i, j: j <= i + 1},
    ),
    "lengths": ({"query_lengths": 4, "key_lengths": 6}, {"visible": lambda h, i, j: i < 4 and j < 6}),
    "softcap": ({"softcap": 0.5}, {"softcap": 0.5}),
    "alibi": ({"alibi_slopes": [0.5, 0.25]}, {"slopes": [0.5, 0.25], "position": lambda i: i}),
    "alibi at an offset": (
        {"alibi_slopes": [0.5, 0.25], "query_offset": 4},
        {"slopes": [0.5, 0.25], "position": lambda i: i + 4},
    ),
    "alibi bottom-right": (
        {"alibi_slopes": [0.5, -0.25], "is_causal": "bottom-right"},
        {"slopes": [0.5, -0.25], "position": lambda i: i + 2, "visible": lambda h, i, j: j <= i + 2},
    ),
    "sinks": ({"sinks": [0.3, -2.0]}, {"sinks": [0.3, -2.0]}),
    "bias": (
        {"bias": np.arange(2.0 * L * S).reshape(2, L, S) / 60},
        {"bias": lambda h, i, j: (h * L * S + i * S + j) / 60},
    ),
    "cap before bias and slopes": (
        {"softcap": 0.7, "bias": np.arange(9.0), "alibi_slopes": [1.0, 2.0], "scale": 2.0},
        {"softcap": 0.7, "bias": lambda h, i, j: j, "slopes": [1, 2], "position": lambda i: i, "scale": 2.0},
    ),
    "hidden by bias": (
        {"bias": np.where(np.arange(9) % 3 == 0, -np.inf, 0.0), "sinks": [0.0, 1.0]},
        {"visible": lambda h, i, j: j % 3 != 0, "sinks": [0.0, 1.0]},
    ),
    "mask": ({"mask": np.arange(9) % 2 == 0}, {"visible": lambda h, i, j: j % 2 == 0}),
}


@pytest.mark.parametrize("name", HAND)
@pytest.mark.parametrize("Hkv", [1, 2])
def test_by_hand(name, Hkv):
    rng = np.random.default_rng(1)
    query, key, value = (
        rng.standard_normal((2, L, 4)),
        rng.standard_normal((Hkv, S, 4)),
        rng.standard_normal((Hkv, S, 3)),
    )
    kwargs, meaning = HAND[name]
    want, want_lse = by_hand(query, key, value, **{"visible": lambda h, i, j: True, "scale": 0.5, **meaning})
    out, lse = oracle(query, key, value, **kwargs)
    np.testing.assert_allclose(out, want, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-13, atol=1e-15)


def test_offset_and_lengths_of_each_sequence():
    rng = np.random.default_rng(2)
    query, key, value = (rng.standard_normal((3, 1, 5, 4)) for _ in range(3))
    offsets, queries, keys = [0, -1, 2], [5, 0, 3], [4, 5, 0]
    for kwargs in (
        {"query_offset": offsets, "window": (1, 0)},
        {"query_lengths": queries, "key_lengths": keys},
        {"query_lengths": queries, "key_lengths": keys, "is_causal": "bottom-right"},
    ):
        out, lse = oracle(query, key, value, **kwargs)
        for b in range(3):
            alone = {name: x[b] if isinstance(x, list) else x for name, x in kwargs.items()}
            want, want_lse = oracle(query[b], key[b], value[b], **alone)
            np.testing.assert_array_equal(out[b], want)
            np.testing.assert_array_equal(lse[b], want_lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_once(dtype):
    arrays = Case(20, 30).arrays(dtype)
    out, lse = na.attention(*arrays, return_lse=True, backend="reference")
    want, want_lse = oracle(*arrays)
    np.testing.assert_array_equal(out, want.astype(DTYPES[dtype]))
    np.testing.assert_array_equal(lse, want_lse.astype(lse.dtype))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_sums_to_one(case):
    """Attending to values of 1 gives 1 where there is anything to attend to, less what a sink takes."""
    query, key, value = case.arrays("float64")
    kwargs = case.kwargs() | {"dropout_p": 0.0}
    sinks = kwargs.get("sinks")
    out, lse = oracle(query, key, np.ones_like(value), **kwargs)
    share = 1.0 if sinks is None else -np.expm1(np.asarray(sinks)[:, None] - np.where(lse == -np.inf, 0, lse))
    want = np.where(lse == -np.inf, 0, share)
    np.testing.assert_allclose(out, np.broadcast_to(want[..., None], out.shape), atol=1e-12)


def test_what_a_row_does_not_see_may_be_anything():
    query, key, value = Case(6, 9, batch=()).arrays("float64")
    want = oracle(query, key, value, key_lengths=7)
    for bad in (np.nan, np.inf, -np.inf):
        key[:, 7:], value[:, 7:] = bad, bad
        for got, expected in zip(oracle(query, key, value, key_lengths=7), want, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_nan_under_a_weight_that_underflows():
    query, key, value = Case(6, 9, batch=()).arrays("float64")
    value[:, 4] = np.nan
    bias = np.zeros(9)
    bias[4] = -5000
    assert np.isnan(oracle(query, key, value, bias=bias)[0]).all()
    bias[4] = -np.inf
    assert np.isfinite(oracle(query, key, value, bias=bias)[0]).all()
