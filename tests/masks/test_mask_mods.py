"""A `mask_mod` of many pairs becomes a block mask, which is kept: the same results, whatever changes between calls."""

import numpy as np
import pytest

import numba_attention as na
from numba_attention.backends import cpu_masks

REACH = 40


def within_reach(batch, head, i, j):
    return i - j < REACH and i >= j


def documents(batch, head, i, j, docs, reach):
    return docs[i] == docs[j] and i - j <= reach


def per_head(batch, head, i, j):
    return (i - j) % (head + 1) == 0 or batch == 1


@pytest.fixture
def arrays(monkeypatch):
    monkeypatch.setattr(cpu_masks, "_masks", cpu_masks.BoundedCache())
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, heads, 300, 16), dtype=np.float32) for heads in (4, 2, 2, 4)]


def run(arrays, **options):
    query, key, value, grad = arrays
    out, lse = na.attention(query, key, value, return_lse=True, **options)
    grads = na.attention_backward(grad, query, key, value, out, lse, **options)
    some = na.attention_weights(query, key, rows=slice(None, None, 2), **options)
    few = na.attention_weights(query, key, rows=[3, 150], **options)
    return out, lse, *grads[:3], some, few


def check(arrays, mask, **options):
    """Against the same mask as an array; every result of it was made by one evaluation of the function."""
    for x, y in zip(run(arrays, **options), run(arrays, mask=mask), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


B, H, I, J = np.ogrid[:2, :4, :300, :300]


def test_results_and_what_is_kept(arrays):
    check(arrays, (I >= J) & (I - J < REACH), mask_mod=within_reach)
    check(arrays, ((I - J) % (H + 1) == 0) | (B == 1), mask_mod=per_head)
    assert len(cpu_masks._masks) == 2
    shapes = [known[0].shape for known in cpu_masks._masks._values.values()]
    assert shapes == [(1, 1, 300, 300), (2, 4, 300, 300)]


def test_changed_arguments_are_seen(arrays):
    docs = np.repeat([0, 1, 2], 100).astype(np.int32)
    for _ in range(2):
        check(arrays, (docs[I] == docs[J]) & (I - J <= 50), mask_mod=documents, mod_args=(docs, 50))
        docs[70:130] = 7
    check(arrays, (docs[I] == docs[J]) & (I - J <= 9), mask_mod=documents, mod_args=(docs, 9))
    assert len(cpu_masks._masks) == 3


def test_a_changed_global_is_seen(arrays, monkeypatch):
    run(arrays, mask_mod=within_reach)
    monkeypatch.setitem(globals(), "REACH", 90)
    check(arrays, (I >= J) & (I - J < 90), mask_mod=within_reach)


def test_positions_count_from_the_offset(arrays):
    check(arrays, I + 30 >= J, mask_mod=lambda b, h, i, j: i >= j, query_offset=30)
    check(arrays, (I - 30 >= J), mask_mod=lambda b, h, i, j: i >= j, query_offset=-30)


def test_beside_other_options(arrays):
    query, key, value, _ = arrays
    mask = (I >= J) & (I - J < REACH)
    for options in (
        {"mask": np.random.default_rng(0).random((300, 300)) < 0.5},
        {"mask": na.BlockMask.window(300, 300, 100, 100)},
        {"window": (20, 20), "key_lengths": [300, 200], "softcap": 3.0},
        {"score_mod": lambda score, batch, head, i, j: score - 0.1 * abs(i - j)},
    ):
        out = na.attention(query, key, value, mask_mod=within_reach, **options)
        other = options.get("mask", True)
        other = other.to_dense() if isinstance(other, na.BlockMask) else other
        np.testing.assert_allclose(
            out, na.attention(query, key, value, **{**options, "mask": mask & other}), rtol=1e-4, atol=1e-5
        )


def test_a_function_that_makes_no_blocks_is_called_by_the_kernels(arrays, monkeypatch):
    from numba_attention.masks import evaluate

    monkeypatch.setattr(evaluate, "ROOM", 2**10)
    noise = (I * 7919 + J * 104729) % 17 < 8
    check(arrays, noise, mask_mod=lambda b, h, i, j: (i * 7919 + j * 104729) % 17 < 8)
    assert [known for (known,) in cpu_masks._masks._values.values()] == [None]


def test_real_numbers_are_as_wide_as_the_scores(arrays):
    """In float64, 0.1 * 3 > 0.3, and in float32 it is not: the rule stays with the kernel there."""
    wide = [x.astype(np.float64) for x in arrays]
    check(wide, 0.1 * (I - J) > 0.3, mask_mod=lambda b, h, i, j: 0.1 * (i - j) > 0.3)
    assert len(cpu_masks._masks) == 0
    check(wide, (I >= J) & (I - J < REACH), mask_mod=within_reach)
    assert len(cpu_masks._masks) == 1


def test_errors_are_those_of_the_kernels(arrays):
    with pytest.raises(ValueError, match=r"mod_args\[0\] has 200 elements along axis 0, which is read at"):
        run(arrays, mask_mod=documents, mod_args=(np.zeros(200, np.int32), 50))


def test_same_bits_alone_and_in_a_batch(arrays):
    query, key, value, _ = arrays
    out = na.attention(query, key, value, mask_mod=within_reach)
    np.testing.assert_array_equal(na.attention(query[1:], key[1:], value[1:], mask_mod=within_reach), out[1:])
