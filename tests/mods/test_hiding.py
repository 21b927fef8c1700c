"""Scores of -inf from a rule are hidden, whatever is added to them afterwards."""

import math

import numpy as np

import numba_attention as na


def every_third(score, batch, head, i, j):
    if (i + j) % 3 == 0:
        return -math.inf
    return score


def test_a_bias_does_not_show_what_a_rule_hides():
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 2, n, 8), dtype="f4") for n in (70, 90, 90))
    bias = rng.standard_normal((2, 70, 90), dtype="f4")
    key_lengths = np.array([1])  # row 0 sees key 0 alone, which the rule hides
    for lengths, keys in ((None, 90), (key_lengths, 1)):
        out = na.attention(query, key, value, bias=bias, score_mod=every_third, key_lengths=lengths)
        scores = query.astype("f8") @ key.astype("f8").swapaxes(-1, -2) / math.sqrt(8) + bias
        i, j = np.indices((70, 90))
        visible = ((i + j) % 3 != 0) & (j < keys)
        weights = np.where(visible, np.exp(scores), 0)
        total = weights.sum(-1, keepdims=True)
        want = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0) @ value.astype("f8")
        np.testing.assert_allclose(out, want, atol=2e-6)
