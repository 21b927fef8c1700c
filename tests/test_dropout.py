"""Dropout: which weights are dropped, the same everywhere; the formulas with that mask; the layer; what is refused."""

import math

import ml_dtypes
import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numba_attention as na
from cases import DTYPES, Case, assert_close, check, check_backward, grad_tolerance, tolerance
from dropout_mask import KNOWN_ANSWERS, kept, random123, words
from numba_attention import philox
from numba_attention.backends import reference

DROP = {"dropout_p": 0.3, "seed": 0x9E3779B97F4A7C15}
rng = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


# The generator.


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers_of_random123(counter, key, answer):
    counter, key, answer = words(counter), words(key), words(answer)
    assert random123(counter, key) == answer
    assert reference.philox(tuple(counter), tuple(key)).tolist() == answer
    keys = philox.round_keys(tuple(key), lambda word, constant: (word + constant) % 2**32)
    multiply = lambda word, constant: divmod(word * constant, 2**32)  # noqa: E731
    assert philox.philox(counter, keys, multiply) == answer


# Which weights are dropped.


def mask_of(query, key, **options):
    return na.attention_weights(query, key, **options) != 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_is_that_of_the_text(dtype, backend):
    query, key = normal(2, 3, 40, 16, dtype=DTYPES[dtype]), normal(2, 3, 70, 16, dtype=DTYPES[dtype])
    got = mask_of(query, key, **DROP, query_offset=[7, -50], backend=backend)
    for b, offset in enumerate((7, -50)):
        want = kept(DROP["dropout_p"], DROP["seed"], b, range(3), np.arange(40) + offset, 70)
        np.testing.assert_array_equal(got[b], want > 0)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1, np.uint64(2**64 - 1), np.int32(5)])
def test_both_halves_of_the_seed_count(seed):
    query, key = normal(1, 5, 8), normal(1, 40, 8)
    for backend in ("cpu", "reference"):
        got = mask_of(query, key, dropout_p=0.5, seed=seed, backend=backend)
        np.testing.assert_array_equal(got, kept(0.5, int(seed), 0, [0], range(5), 40) > 0)


def test_dtypes_and_features_have_the_same_mask():
    masks = [
        mask_of(normal(2, 2, 130, E, dtype=dtype), normal(2, 2, 200, E, dtype=dtype), scale=0.05, **DROP)
        for dtype in DTYPES.values()
        for E in (1, 5, 64, 128)
    ]
    for mask in masks[1:]:
        np.testing.assert_array_equal(mask, masks[0])


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(
    "options", [{}, {"window": (37, 90)}, {"is_causal": "bottom-right"}, {"key_lengths": [77, 131]}]
)
def test_attention_over_the_identity_shows_the_mask(dtype, options):
    """All tilings: window and causality begin tiles of keys anywhere; few rows have a kernel of their own."""
    L, S, H = 150, 131, 2
    query, key = normal(2, H, L, 32, dtype=DTYPES[dtype]), normal(2, H, S, 32, dtype=DTYPES[dtype])
    identity = np.broadcast_to(np.eye(S), (2, H, S, S)).astype(DTYPES[dtype])
    weights = na.attention_weights(query, key, **DROP, **options)
    out = na.attention(query, key, identity, **DROP, **options)
    np.testing.assert_array_equal(out != 0, weights != 0)
    assert_close(out, weights, tolerance(dtype)[0])
    offset = S - L if options.get("is_causal") else 0
    rows = slice(100, 103)
    few = na.attention(query[:, :, rows], key, identity, **DROP, **(options | {"query_offset": offset + 100}))
    np.testing.assert_array_equal(few != 0, weights[:, :, rows] != 0)
    with_dropout_of_one = na.attention_weights(query, key, **DROP, **options, heads=[1], rows=[140, 3])
    np.testing.assert_array_equal(with_dropout_of_one, weights[:, 1:, [140, 3]])


def test_grouped_heads_have_masks_of_their_own():
    query, key = normal(6, 50, 16), normal(2, 70, 16)
    got = mask_of(query, key, **DROP)
    np.testing.assert_array_equal(got, mask_of(query, np.repeat(key, 3, 0), **DROP))
    identity = np.broadcast_to(np.eye(70, dtype=np.float32), (2, 70, 70))
    for n in (50, 2):
        np.testing.assert_array_equal(na.attention(query[:, :n], key, identity, **DROP) != 0, got[:, :n])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_packed_sequences_have_the_masks_of_a_batch(backend):
    starts = [0, 40, 40, 47, 140]
    x = normal(140, 2, 16)
    packed = na.attention_varlen(x, x, x, starts, starts, **DROP, is_causal=True, backend=backend)
    batch = np.zeros((4, 2, 93, 16), np.float32)
    for b in range(4):
        batch[b, :, : starts[b + 1] - starts[b]] = x[starts[b] : starts[b + 1]].swapaxes(0, 1)
    want = na.attention(batch, batch, batch, key_lengths=np.diff(starts), is_causal=True, **DROP, backend="reference")
    for b in range(4):
        own = want[b, :, : starts[b + 1] - starts[b]].swapaxes(0, 1)
        assert_close(packed[starts[b] : starts[b + 1]], own, 2e-6)


def test_leading_dimensions_count_in_row_major_order():
    query, key = normal(2, 3, 1, 20, 8), normal(3, 1, 40, 8)
    got = mask_of(query, key, **DROP)
    for b in range(6):
        want = kept(DROP["dropout_p"], DROP["seed"], b, [0], range(20), 40)
        np.testing.assert_array_equal(got[b // 3, b % 3], want > 0)


@pytest.mark.parametrize("paged", [False, True])
def test_decoding_drops_what_training_dropped(paged):
    query, key, value = (normal(2, heads, 90, 32) for heads in (4, 2, 2))
    whole = na.attention(query, key, value, is_causal=True, **DROP)
    cache = na.PagedKVCache(20, 16, 2, 32) if paged else na.KVCache(2, 2, 90, 32)
    for first, last in ((0, 60), (60, 88), (88, 89), (89, 90)):
        new = key[:, :, first:last], value[:, :, first:last]
        if paged:
            cache.append(cache.add(2) if first == 0 else cache.ids, *new)
        else:
            cache.append(*new)
        got = na.attention_decode(query[:, :, first:last], cache, **DROP)
        assert_close(got, whole[:, :, first:last], 2e-6)


def test_any_number_of_threads():
    query, key, value = normal(1, 4, 300, 64), normal(1, 4, 1500, 64), normal(1, 4, 1500, 64)
    most = numba.get_num_threads()
    try:
        results = []
        for threads in (1, most):
            numba.set_num_threads(threads)
            out, lse = na.attention(query, key, value, **DROP, return_lse=True)
            grads = na.attention_backward(np.ones_like(out), query, key, value, out, lse, **DROP)
            results.append((out, lse, *grads[:3], na.attention(query[:, :, :1], key, value, **DROP)))
    finally:
        numba.set_num_threads(most)
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)


# What it computes.


CASES = [
    Case(70, 130, 20, 33, H=4, Hkv=2, options=options)
    for options in [
        ("dropout",), ("dropout few",), ("dropout", "causal", "sinks"), ("dropout", "window", "offset each", "softcap"),
        ("dropout", "bias that hides", "mask"), ("dropout", "key lengths", "query lengths", "alibi"),
    ]
] + [
    Case(5, 700, 64, H=4, Hkv=1, options=("dropout", "bottom-right")),
    Case(1, 600, 33, 17, options=("dropout", "sinks")),
    Case(1100, 200, 16, H=1, batch=(), options=("dropout", "bias of keys")),
    Case(65, 4300, 8, H=1, batch=(), options=("dropout",)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_reference(case, dtype):
    check(*case.arrays(dtype), case.kwargs(), dtype, case)
    check_backward(case, dtype)


@given(
    st.integers(1, 140),
    st.integers(1, 140),
    st.integers(1, 70),
    st.floats(0, 0.999),
    st.integers(0, 2**64 - 1),
    st.data(),
)
def test_any_sizes_probabilities_and_seeds(L, S, E, p, seed, data):
    names = st.sampled_from(
        ["causal", "window", "softcap", "sinks", "alibi", "mask", "bias of keys", "offset negative"]
    )
    case = Case(
        L, S, E, H=2, Hkv=data.draw(st.sampled_from([1, 2])), options=tuple(data.draw(st.sets(names, max_size=2)))
    )
    arrays, options = case.arrays("float64"), case.kwargs() | {"dropout_p": p, "seed": seed}
    results = []
    for backend in ("cpu", "reference"):
        out, lse = na.attention(*arrays, **options, return_lse=True, backend=backend)
        grads = na.attention_backward(np.ones_like(out), *arrays, out, lse, **options, backend=backend)
        weights = na.attention_weights(*arrays[:2], **options, backend=backend)
        results.append([out, weights, *grads[:3]])
    np.testing.assert_array_equal(*(weights != 0 for _, weights, *_ in results))
    for got, want in zip(*results, strict=True):
        assert_close(got, want, 1e-11, 1 / (1 - p))


def leaning(score, batch, head, i, j, slopes):
    return score - slopes[head] * abs(i - j) + 0.1 * batch


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("L", [1, 130])
def test_with_a_block_mask_and_a_score_mod(dtype, L):
    """Lists of tiles, and a window that begins within a tile; dropout comes after all of it."""
    S = 200
    query, key, value = (normal(2, 2, n, 16, dtype=DTYPES[dtype]) for n in (L, S, S))
    seen = rng.random((1, 2, L, S)) < 0.5
    seen[..., 64:128] = False
    seen[..., 40:] |= np.arange(40, S) % 64 < 9
    slopes = np.array([0.02, 0.1])
    for options in ({"mask": na.BlockMask.from_array(seen)}, {"score_mod": leaning, "mod_args": (slopes,)}):
        options |= {"window": (77, 40), "query_offset": 100}
        plain = options | ({"mask": seen} if "mask" in options else {})
        out, lse = na.attention(query, key, value, **DROP, **options, return_lse=True)
        wide = [x.astype(np.float64) for x in (query, key, value)]
        want, want_lse = na.attention(*wide, **DROP, **plain, return_lse=True, backend="reference")
        assert_close(out, want, 4 * tolerance(dtype)[0])
        ones = np.ones_like(out)
        got = na.attention_backward(ones, query, key, value, out, lse, **DROP, **options)
        oracle = na.attention_backward(
            ones.astype(np.float64), *wide, want, want_lse, **DROP, **plain, backend="reference"
        )
        for a, b in zip(got[:3], oracle[:3], strict=True):
            assert_close(a, b, 4 * grad_tolerance(dtype), 1)
        weights = na.attention_weights(query, key, **DROP, **options)
        assert_close(
            weights, na.attention_weights(*wide[:2], **DROP, **plain, backend="reference"), tolerance(dtype)[0]
        )


def textbook(query, key, value, grad_out, grad_lse, scale, drop):
    """Out and gradients of one head: P of the softmax, M of `dropout_mask`, out = (P M) V."""
    scores = scale * query @ key.T
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = (p * drop) @ value
    dp = grad_out @ value.T * drop
    ds = p * (dp - (dp * p).sum(-1, keepdims=True) + grad_lse[:, None])
    return out, scale * ds @ key, scale * ds.T @ query, (p * drop).T @ grad_out


@pytest.mark.parametrize("dtype", DTYPES)
def test_formulas(dtype):
    arrays = [normal(2, 2, n, 24, dtype=DTYPES[dtype]) for n in (50, 90, 90, 50)]
    query, key, value, grad_out = arrays
    grad_lse = normal(2, 2, 50, dtype=np.float64 if dtype == "float64" else np.float32)
    out, lse = na.attention(query, key, value, **DROP, return_lse=True)
    _, undropped = na.attention(query, key, value, return_lse=True)
    np.testing.assert_array_equal(lse, undropped)
    got = na.attention_backward(grad_out, query, key, value, out, lse, grad_lse=grad_lse, **DROP)
    for b in range(2):
        drop = kept(DROP["dropout_p"], DROP["seed"], b, range(2), range(50), 90)
        for h in range(2):
            wide = [x[b, h].astype(np.float64) for x in arrays]
            want = textbook(*wide, grad_lse[b, h], 24**-0.5, drop[h])
            assert_close(out[b, h], want[0], 2 * tolerance(dtype)[0])
            for grad, wanted in zip(got[:3], want[1:], strict=True):
                assert_close(grad[b, h], wanted, 2 * grad_tolerance(dtype), 1)


def test_gradients_by_differences():
    arrays = [normal(2, n, 6, dtype=np.float64) for n in (7, 40, 40)]
    grad_out = normal(2, 7, 6, dtype=np.float64)
    sinks = np.array([0.3, -0.4])
    options = DROP | {"softcap": 1.3, "sinks": sinks, "window": (20, 15)}

    def loss():
        return float((na.attention(*arrays, **options) * grad_out).sum())

    out, lse = na.attention(*arrays, **options, return_lse=True)
    grads = na.attention_backward(grad_out, *arrays, out, lse, **options)
    for x, grad in zip([*arrays, sinks], [*grads[:3], grads.sinks], strict=True):
        for index in [tuple(rng.integers(x.shape)) for _ in range(6)]:
            saved, step = x[index], 1e-5
            x[index] = saved + step
            above = loss()
            x[index] = saved - step
            slope, x[index] = (above - loss()) / (2 * step), saved
            assert math.isclose(grad[index], slope, rel_tol=1e-5, abs_tol=1e-8)


@pytest.mark.parametrize("p", [0.0, 1e-9, np.float32(0.0)])
def test_a_probability_of_nothing_changes_no_bit(p):
    arrays = [normal(2, 70, 16) for _ in range(3)]
    np.testing.assert_array_equal(na.attention(*arrays, dropout_p=p, seed=3), na.attention(*arrays))


def test_a_probability_next_to_one():
    weights = na.attention_weights(normal(64, 500, 8), normal(64, 500, 8), dropout_p=1 - 1e-9, seed=3)
    assert (weights != 0).mean() < 1e-4
    assert np.isfinite(weights).all()


def test_empty_and_hidden_rows():
    query, key = normal(2, 9, 8), normal(2, 40, 8)
    mask = np.ones((9, 40), bool)
    mask[3] = False
    out, lse = na.attention(query, key, key, mask=mask, **DROP, return_lse=True)
    assert not out[:, 3].any()
    assert (lse[:, 3] == -np.inf).all()
    grads = na.attention_backward(np.ones_like(out), query, key, key, out, lse, mask=mask, **DROP)
    assert not grads.query[:, 3].any()
    assert np.isfinite(grads.key).all()


# Statistics.


def test_kept_weights_are_independent_and_as_many_as_said():
    """Over 4 million weights: the share of dropped ones, and correlations of neighbours, within 4.5 deviations."""
    p, L, S = 0.1, 1024, 1024
    zeros = np.zeros((2, 2, L, 1), np.float32)
    weights = na.attention_weights(zeros, zeros, dropout_p=p, seed=11)
    assert set(np.unique(weights)) == {0, np.float32(65536 / (65536 - 6554) / S)}
    x = (weights == 0) - 6554 / 65536
    variance = p * (1 - p)
    deviations = {"mean": x.mean() / math.sqrt(variance / x.size)}
    for di, dj in [(0, 1), (0, 2), (0, 8), (0, 16), (0, 32), (1, 0), (8, 0), (1, 1), (1, -1), (64, 0)]:
        a, b = x[..., di:, max(dj, 0) : S + min(dj, 0)], x[..., : L - di, max(-dj, 0) : S - max(dj, 0)]
        deviations[f"{di}, {dj}"] = (a * b).mean() / variance * math.sqrt(a.size)
    deviations["heads"] = (x[:, 0] * x[:, 1]).mean() / variance * math.sqrt(x[:, 0].size)
    deviations["sequences"] = (x[0] * x[1]).mean() / variance * math.sqrt(x[0].size)
    assert {name: z for name, z in deviations.items() if abs(z) > 4.5} == {}
    # Sums of rows and columns vary as sums of independent numbers do.
    for axis in (-1, -2):
        spread = x.mean(axis).var() / (variance / 1024)
        assert abs(spread - 1) < 4.5 * math.sqrt(2 / 4096)


def test_seeds_are_independent():
    zeros = np.zeros((1, 512, 1), np.float32)
    masks = [na.attention_weights(zeros, zeros, dropout_p=0.5, seed=seed) == 0 for seed in (0, 1, 2**32, 2**63)]
    for n, one in enumerate(masks):
        for other in masks[:n]:
            assert abs((one == other).mean() - 0.5) < 4.5 * 0.5 / 512


def test_the_mean_over_seeds_is_attention_without_dropout():
    arrays = [normal(1, 8, 8, dtype=np.float64) for _ in range(3)]
    mean = np.mean([na.attention(*arrays, dropout_p=0.2, seed=seed) for seed in range(4000)], axis=0)
    np.testing.assert_allclose(mean, na.attention(*arrays), atol=0.05)


# NaN.


def test_nan_of_a_hidden_key_has_no_effect():
    for dtype in (np.float32, ml_dtypes.bfloat16):
        query, key, value = (normal(2, 70, 16, dtype=dtype) for _ in range(3))
        want = na.attention(query, key, value, key_lengths=50, **DROP)
        key[:, 50:], value[:, 50:] = np.nan, np.inf
        np.testing.assert_array_equal(na.attention(query, key, value, key_lengths=50, **DROP), want)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nan_in_a_gradient_reaches_what_its_row_sees(backend):
    query, key, value, grad_out = (normal(1, 70, 8, dtype=np.float64) for _ in range(4))
    grad_out[0, 30, 2] = np.nan
    out, lse = na.attention(query, key, value, is_causal=True, **DROP, return_lse=True)
    grads = na.attention_backward(grad_out, query, key, value, out, lse, is_causal=True, **DROP, backend=backend)
    hit = [np.isnan(x).any(-1)[0] for x in grads[:3]]
    np.testing.assert_array_equal(hit[0], np.arange(70) == 30)
    np.testing.assert_array_equal(hit[1], np.arange(70) <= 30)
    seen = na.attention_weights(query, key, is_causal=True, **DROP)[0, 30] != 0
    np.testing.assert_array_equal(hit[2], seen)


# The layer.


def layer_of(dropout, **more):
    return na.MultiHeadAttention(32, 4, num_kv_heads=2, dropout=dropout, dtype=np.float64, rng=5, **more)


def test_a_layer_drops_in_training_only():
    x = normal(2, 20, 32, dtype=np.float64)
    layer, plain = layer_of(0.4), layer_of(0.0)
    np.testing.assert_array_equal(layer(x), plain(x))
    np.testing.assert_array_equal(layer(x, training=False), plain(x))
    np.testing.assert_array_equal(plain(x, training=True), plain(x))
    one, two = layer(x, training=True), layer(x, training=True)
    assert np.abs(one - two).max() > 1e-3
    np.testing.assert_array_equal(layer(x, training=True, seed=9), layer(x, training=True, seed=9))
    np.testing.assert_array_equal(layer(x, training=True, seed=9), plain(x, dropout_p=0.4, seed=9))
    np.testing.assert_array_equal(layer(x, training=True, dropout_p=0.0), plain(x))
    assert "dropout=0.4" in repr(layer)


def test_a_layer_draws_seeds_from_its_generator():
    import pickle

    x = normal(2, 20, 32, dtype=np.float64)
    one, two = layer_of(0.4), layer_of(0.4)
    copy = pickle.loads(pickle.dumps(one))
    for _ in range(3):
        out = one(x, training=True)
        np.testing.assert_array_equal(out, two(x, training=True))
        np.testing.assert_array_equal(out, copy(x, training=True))
    shared = np.random.default_rng(1)
    first, second = (na.MultiHeadAttention(32, 4, dropout=0.5, dtype=np.float64, rng=shared) for _ in range(2))
    second.load_parameters(first.parameters())
    assert np.abs(first(x, training=True) - second(x, training=True)).max() > 1e-3


def test_backward_of_a_layer_repeats_the_mask_of_its_context():
    x, grad_out = normal(2, 2, 20, 32, dtype=np.float64)
    layer = layer_of(0.4, rotary=True)
    contexts = [layer.forward(x, is_causal=True, training=True) for _ in range(2)]
    for out, ctx in contexts[::-1]:
        grad = layer.backward(grad_out, ctx).query
        grads = dict(layer.grads)
        again, own = layer_of(0.0, rotary=True).forward(x, is_causal=True, **_drop_of(ctx))
        np.testing.assert_array_equal(out, again)
        step, direction = 1e-6, normal(*x.shape, dtype=np.float64)
        above, below = (layer(x + s * direction, is_causal=True, **_drop_of(ctx)) for s in (step, -step))
        slope = ((above - below) * grad_out).sum() / (2 * step)
        assert math.isclose((grad * direction).sum(), slope, rel_tol=1e-6)
        assert own.options["seed"] == ctx.options["seed"]
        assert grads["v_proj.weight"].any()


def _drop_of(ctx):
    return {name: ctx.options[name] for name in ("dropout_p", "seed")}


def test_weights_of_a_layer_show_the_mask():
    x = normal(2, 20, 32, dtype=np.float64)
    layer = layer_of(0.5)
    (_, weights), ctx = layer.forward(x, need_weights=True, average_weights=False, training=True)
    np.testing.assert_array_equal(weights, na.attention_weights(ctx.q, ctx.k, **_drop_of(ctx)))
    assert 0.3 < (weights == 0).mean() < 0.7
    _, mean = layer(x, need_weights=True, training=True, seed=ctx.options["seed"])
    np.testing.assert_allclose(mean, weights.mean(1), atol=1e-15)


def test_a_layer_drops_in_packed_and_cached_calls_too():
    x = normal(2, 20, 32, dtype=np.float64)
    layer = layer_of(0.5)
    want = layer(x, is_causal=True, training=True, seed=4)
    packed = layer(x.reshape(40, 32), cu_seqlens=[0, 20, 40], is_causal=True, training=True, seed=4)
    np.testing.assert_allclose(packed.reshape(want.shape), want, atol=1e-14)
    cache = na.KVCache(2, 2, 20, 8, dtype=np.float64)
    parts = [layer(x[:, c], cache=cache, is_causal=True, training=True, seed=4) for c in (slice(0, 17), slice(17, 20))]
    np.testing.assert_allclose(np.concatenate(parts, 1), want, atol=1e-14)


def test_a_transformer_block_drops_in_training():
    from numba_attention.nn import TransformerBlock

    x, memory = normal(2, 20, 32), normal(2, 9, 32)
    block, plain = (TransformerBlock(32, 4, cross=True, rng=0, dropout=p) for p in (0.3, 0.0))
    np.testing.assert_array_equal(block.forward(x, memory)[0], plain.forward(x, memory)[0])
    y, ctx = block.forward(x, memory, training=True, is_causal=True)
    assert np.abs(y - block.forward(x, memory, training=True, is_causal=True)[0]).max() > 1e-3
    seeds = {c.options["seed"] for c in ctx if hasattr(c, "options")}
    assert len(seeds) == 2
    assert np.isfinite(block.backward(np.ones_like(y), ctx)[0]).all()


def test_layers_made_from_parameters_take_dropout():
    layer = na.MultiHeadAttention(32, 4, dtype=np.float64, rng=5)
    own = layer.parameters()
    packed = {
        f"in_proj_{kind}": np.concatenate([own[f"{name}.{kind}"] for name in ("q_proj", "k_proj", "v_proj")])
        for kind in ("weight", "bias")
    }
    packed |= {name: own[name] for name in ("out_proj.weight", "out_proj.bias")}
    made = na.MultiHeadAttention.from_torch(packed, 4, dropout=0.25, rng=3)
    assert made.dropout == 0.25
    x = normal(20, 32, dtype=np.float64)
    np.testing.assert_array_equal(made(x), layer(x))
    assert np.abs(made(x, training=True) - layer(x)).max() > 1e-3


@pytest.mark.parametrize("dropout", [1.0, -0.1, 2, math.nan])
def test_a_layer_refuses_what_is_no_probability(dropout):
    with pytest.raises(ValueError, match="dropout"):
        na.MultiHeadAttention(8, 2, dropout=dropout)
    with pytest.raises(TypeError, match="dropout"):
        na.MultiHeadAttention(8, 2, dropout="much")


# What is refused.


def test_a_positive_probability_needs_a_seed():
    x = normal(4, 8)
    with pytest.raises(ValueError, match="seed must be an integer where dropout_p is positive"):
        na.attention(x, x, x, dropout_p=0.5)
    cache = na.KVCache(1, 1, 4, 8)
    cache.append(x[None, None], x[None, None])
    with pytest.raises(ValueError, match="seed"):
        na.attention_decode(x[None, None, :1], cache, dropout_p=0.5)
    with pytest.raises(ValueError, match="dropout_p"):
        na.attention_decode(x[None, None, :1], cache, dropout_p=1.5, seed=1)
    with pytest.raises(TypeError, match="seed"):
        na.attention_decode(x[None, None, :1], cache, seed="one")
