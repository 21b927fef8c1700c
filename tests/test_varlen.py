"""Packed sequences: each as it would be alone, in every option, forward and backward."""

import itertools
import sys
import tracemalloc

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numba_attention as na
from cases import DTYPES, LAYOUTS, assert_close, grad_tolerance, tolerance
from numba_attention.backends import cpu_backward
from numba_attention.options import Options
from numba_attention.problem.packed import build_backward

H, HKV, E, EV = 4, 2, 24, 40
LENGTHS = [(7, 9), (0, 5), (70, 33), (3, 0), (1, 600), (40, 40)]


def starts(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def packed(lengths=LENGTHS, dtype="float32", seed=0, sizes=(H, HKV, E, EV)):
    """Query, key, value, grad_out and the offsets."""
    rng = np.random.default_rng(seed)
    of_queries, of_keys = (starts([pair[n] for pair in lengths]) for n in (0, 1))
    heads, kv_heads, features, value_features = sizes

    def normal(*shape):
        return rng.standard_normal(shape).astype(DTYPES[dtype])

    T_q, T_k = int(of_queries[-1]), int(of_keys[-1])
    q, k, v = normal(T_q, heads, features), normal(T_k, kv_heads, features), normal(T_k, kv_heads, value_features)
    return q, k, v, normal(T_q, heads, value_features), of_queries, of_keys


def of_sequence(b, of_queries, of_keys):
    return slice(of_queries[b], of_queries[b + 1]), slice(of_keys[b], of_keys[b + 1])


# Options of all sequences, and of sequence b alone with queries in these rows and keys in these columns.
n, T_Q, T_K = len(LENGTHS), sum(a for a, _ in LENGTHS), sum(b for _, b in LENGTHS)
LONGEST = max(a for a, _ in LENGTHS), max(b for _, b in LENGTHS)
rng = np.random.default_rng(1)
FLAT_MASK, EACH_MASK = rng.random((H, T_Q, T_K)) < 0.6, rng.random((n, 1, *LONGEST)) < 0.6
FLAT_BIAS, EACH_BIAS = rng.standard_normal((T_Q, T_K)), rng.standard_normal((n, H, *LONGEST))
SHARED_BIAS, COLUMN_BIAS = rng.standard_normal((H, *LONGEST)), rng.standard_normal((H, 1, T_K))
KEY_MASK, MIXED_MASK = rng.random((n, 1, 1, LONGEST[1])) < 0.6, rng.random((LONGEST[0], T_K)) < 0.6
SLOPES, SINKS = rng.random((n, H)), rng.standard_normal(H)
QUERY_LENGTHS, KEY_LENGTHS = np.array([7, 0, 50, 2, 1, 5]), np.array([4, 5, 33, 0, 500, 40])


def same(**options):
    return options, lambda b, rows, columns: options


def inside(rows, columns):
    return slice(rows.stop - rows.start), slice(columns.stop - columns.start)


OPTIONS = {
    "plain": same(),
    "causal": same(is_causal=True),
    "bottom-right": same(is_causal="bottom-right"),
    "window": same(window=(5, 2), is_causal="bottom-right"),
    "scale, softcap": same(scale=0.3, softcap=2.0),
    "slopes of heads": same(alibi_slopes=SLOPES[0]),
    "slopes": ({"alibi_slopes": SLOPES}, lambda b, rows, columns: {"alibi_slopes": SLOPES[b]}),
    "sinks": same(sinks=SINKS),
    "offsets": (
        {"query_offset": np.arange(n) - 3, "is_causal": True},
        lambda b, rows, columns: {"query_offset": b - 3, "is_causal": True},
    ),
    "lengths": (
        {"query_lengths": QUERY_LENGTHS, "key_lengths": KEY_LENGTHS, "is_causal": "bottom-right", "sinks": SINKS},
        lambda b, rows, columns: {
            "query_lengths": QUERY_LENGTHS[b],
            "key_lengths": KEY_LENGTHS[b],
            "is_causal": "bottom-right",
            "sinks": SINKS,
        },
    ),
    "mask over tokens": ({"mask": FLAT_MASK}, lambda b, rows, columns: {"mask": FLAT_MASK[:, rows, columns]}),
    "mask of each": (
        {"mask": EACH_MASK},
        lambda b, rows, columns: {"mask": EACH_MASK[b][(slice(None), *inside(rows, columns))]},
    ),
    "bias over tokens": ({"bias": FLAT_BIAS}, lambda b, rows, columns: {"bias": FLAT_BIAS[rows, columns]}),
    "bias of each": (
        {"bias": EACH_BIAS},
        lambda b, rows, columns: {"bias": EACH_BIAS[b][(slice(None), *inside(rows, columns))]},
    ),
    "bias for all": (
        {"bias": SHARED_BIAS},
        lambda b, rows, columns: {"bias": SHARED_BIAS[(slice(None), *inside(rows, columns))]},
    ),
    "mask of keys": ({"mask": KEY_MASK}, lambda b, rows, columns: {"mask": KEY_MASK[b][..., inside(rows, columns)[1]]}),
    "mask, rows of each, columns over tokens": (
        {"mask": MIXED_MASK},
        lambda b, rows, columns: {"mask": MIXED_MASK[inside(rows, columns)[0], columns]},
    ),
    "bias of columns": ({"bias": COLUMN_BIAS}, lambda b, rows, columns: {"bias": COLUMN_BIAS[:, :, columns]}),
}
BACKENDS = ["cpu", "reference"]


def cast(options, dtype):
    """Biases in the precision of the call."""
    return {k: v.astype(dtype) if k == "bias" else v for k, v in options.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_as_each_alone(option, dtype, backend):
    q, k, v, grad_out, of_queries, of_keys = packed(dtype=dtype)
    together, alone = OPTIONS[option]
    together = cast(together, dtype)
    out, lse = na.attention_varlen(q, k, v, of_queries, of_keys, return_lse=True, backend=backend, **together)
    assert out.shape == (T_Q, H, EV)
    assert lse.shape == (H, T_Q)
    grads = na.attention_varlen_backward(
        grad_out, q, k, v, out, lse, of_queries, of_keys, grad_lse=0.1 * lse_of_finite(lse), backend=backend, **together
    )
    want = [np.zeros_like(x) for x in (q, k, v)]
    want_bias = np.zeros(np.shape(together.get("bias", 0)))
    want_sinks = np.zeros(H)
    for b in range(n):
        rows, columns = of_sequence(b, of_queries, of_keys)
        one = [x.swapaxes(0, 1) for x in (q[rows], k[columns], v[columns])]
        options = cast(alone(b, rows, columns), dtype)
        one_out, one_lse = na.attention(*one, return_lse=True, backend=backend, **options)
        # A sequence has the same bits alone and in a batch.
        np.testing.assert_array_equal(out[rows].swapaxes(0, 1), one_out)
        np.testing.assert_array_equal(lse[:, rows], one_lse)
        own = na.attention_backward(
            np.ascontiguousarray(grad_out[rows].swapaxes(0, 1)), *one, one_out, one_lse,
            grad_lse=0.1 * lse_of_finite(one_lse), backend=backend, **options,
        )  # fmt: skip
        want[0][rows] = own.query.swapaxes(0, 1)
        want[1][columns], want[2][columns] = own.key.swapaxes(0, 1), own.value.swapaxes(0, 1)
        if own.bias is not None:
            add_bias(want_bias, own.bias, option, b, rows, columns)
        if own.sinks is not None:
            want_sinks += own.sinks
    for got, expected in zip(grads[:3], want, strict=True):
        np.testing.assert_array_equal(got, expected)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 1e-10, "atol": 1e-10}
    if "bias" in together:
        assert grads.bias.dtype == together["bias"].dtype
        np.testing.assert_allclose(grads.bias, want_bias, **tolerance)
    if "sinks" in together:
        np.testing.assert_allclose(grads.sinks, want_sinks, **tolerance)


def lse_of_finite(lse):
    return np.where(np.isfinite(lse), lse, 0).astype(lse.dtype)


def add_bias(total, own, option, b, rows, columns):
    if option == "bias over tokens":
        total[rows, columns] += own
    elif option == "bias of columns":
        total[:, :, columns] += own
    else:
        where = (slice(None), *inside(rows, columns))
        (total[b] if option == "bias of each" else total)[where] += own


def forward_and_backward(arrays, offsets, options, backend):
    """Out, lse and all cpu_backward, with a gradient of lse too."""
    q, k, v, grad_out = arrays
    out, lse = na.attention_varlen(q, k, v, *offsets, return_lse=True, backend=backend, **options)
    grad_lse = 0.1 * lse_of_finite(lse)
    grads = na.attention_varlen_backward(
        grad_out, q, k, v, out, lse, *offsets, grad_lse=grad_lse, backend=backend, **options
    )
    return out, lse, grads


def check(arrays, offsets, options, dtype):
    """Hold the CPU against the reference in float64, which `test_as_each_alone` holds against single calls."""
    out, lse, grads = forward_and_backward(arrays, offsets, options, "cpu")
    wide = [x.astype(np.float64) for x in arrays]
    want, want_lse, want_grads = forward_and_backward(wide, offsets, options, "reference")
    of_out, of_lse = tolerance(dtype)
    assert out.dtype == arrays[0].dtype
    assert_close(out, want, of_out)
    assert_close(lse, want_lse, of_lse, offset=1)
    # What cancels in one gradient does so by parts of the size of the others.
    offset = max((np.abs(x).max() for x in want_grads[:3] if x.size), default=0)
    given = [*arrays[:3], options.get("bias"), options.get("sinks")]
    for x, got, expected in zip(given, grads[:5], want_grads[:5], strict=True):
        assert (got is None) == (x is None)
        if x is not None:
            assert got.shape == x.shape
            assert got.dtype == x.dtype
            assert_close(got, expected, grad_tolerance(dtype), offset)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(option, dtype):
    *arrays, of_queries, of_keys = packed(dtype=dtype)
    check(arrays, (of_queries, of_keys), cast(OPTIONS[option][0], "float32"), dtype)


lengths = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 90)), min_size=0, max_size=7)
sizes = st.sampled_from([(2, 2, 8, 8), (4, 1, 16, 33), (3, 3, 64, 16), (6, 2, 5, 3)])


@given(lengths, sizes, st.integers(0, 10))
def test_any_lengths_have_the_bits_they_have_alone(lengths, sizes, seed):
    q, k, v, grad_out, of_queries, of_keys = packed(lengths, seed=seed, sizes=sizes)
    options = {"is_causal": "bottom-right", "window": (30, None)}
    out, lse = na.attention_varlen(q, k, v, of_queries, of_keys, return_lse=True, **options)
    grads = na.attention_varlen_backward(grad_out, q, k, v, out, lse, of_queries, of_keys, **options)
    for b in range(len(lengths)):
        rows, columns = of_sequence(b, of_queries, of_keys)
        one = [x.swapaxes(0, 1) for x in (q[rows], k[columns], v[columns])]
        one_out, one_lse = na.attention(*one, return_lse=True, **options)
        own = na.attention_backward(grad_out[rows].swapaxes(0, 1), *one, one_out, one_lse, **options)
        for together, alone in zip(
            (out[rows], grads.query[rows], grads.key[columns], grads.value[columns]), (one_out, *own[:3]), strict=True
        ):
            np.testing.assert_array_equal(together.swapaxes(0, 1), alone)
        np.testing.assert_array_equal(lse[:, rows], one_lse)


def drawn_axes(draw, of_queries, of_keys, heads):
    """A shape for a mask or bias: each axis 1 or whole, rows and columns within the sequence or over all tokens."""
    rows, columns = np.diff(of_queries), np.diff(of_keys)
    row = draw(st.sampled_from([1, int(rows.max(initial=0)), int(of_queries[-1])]))
    column = draw(st.sampled_from([1, int(columns.max(initial=0)), int(of_keys[-1])]))
    over_tokens = row == of_queries[-1] or column == of_keys[-1]
    sequences = 1 if over_tokens else draw(st.sampled_from([1, len(rows)]))
    shape = sequences, draw(st.sampled_from([1, heads])), row, column
    return shape[1:] if sequences == 1 and draw(st.booleans()) else shape


@given(lengths, sizes, st.data())
def test_any_options(lengths, sizes, data):
    draw = data.draw
    *arrays, of_queries, of_keys = packed(lengths, seed=draw(st.integers(0, 10)), sizes=sizes)
    rng, number, heads = np.random.default_rng(draw(st.integers(0, 10))), len(lengths), sizes[0]
    rows, columns = np.diff(of_queries), np.diff(of_keys)
    makers = {
        "is_causal": lambda: draw(st.sampled_from([True, "bottom-right"])),
        "window": lambda: (draw(st.sampled_from([None, 0, 20])), draw(st.sampled_from([None, 0, 20]))),
        "query_offset": lambda: rng.integers(-20, 20, number),
        "softcap": lambda: 1.5,
        "alibi_slopes": lambda: 0.1 * rng.standard_normal((number, heads) if draw(st.booleans()) else heads),
        "sinks": lambda: rng.standard_normal(heads),
        "query_lengths": lambda: rng.integers(0, rows, endpoint=True),
        "key_lengths": lambda: rng.integers(0, columns, endpoint=True),
        "mask": lambda: rng.random(drawn_axes(draw, of_queries, of_keys, heads)) < 0.7,
        "bias": lambda: rng.standard_normal(drawn_axes(draw, of_queries, of_keys, heads)).astype(np.float32),
    }
    names = draw(st.lists(st.sampled_from(sorted(makers)), max_size=4, unique=True))
    check(arrays, (of_queries, of_keys), {name: makers[name]() for name in names}, "float32")


# Of sequences as long as these, dK and dV are summed in groups; some shapes of a bias bear on how.
LONG = [(3, 40), (1100, 130), *[(20, 30)] * 20, (2100, 90)]


@pytest.mark.parametrize("bias", [None, (1, 1), (2100, 1), (1, 130), (2100, 130)], ids=str)
@pytest.mark.parametrize("heads", [1, 2])
def test_long_and_short_sequences(bias, heads):
    q, k, v, grad_out, of_queries, of_keys = packed(LONG, sizes=(2, heads, 8, 8))
    full = None if bias is None else np.random.default_rng(2).standard_normal((2, *bias)).astype(np.float32)
    options = {"is_causal": True} | ({} if bias is None else {"bias": full})
    arrays = q, k, v, grad_out
    out, lse, grads = forward_and_backward(arrays, (of_queries, of_keys), options, "cpu")
    check(arrays, (of_queries, of_keys), options, "float32")
    for b in (1, 5, len(LONG) - 1):
        rows, columns = of_sequence(b, of_queries, of_keys)
        if bias is not None:
            whole = np.broadcast_to(full, (2, *LONG[-1][:1], 130))
            own = [s if n > 1 else slice(1) for n, s in zip(bias, inside(rows, columns), strict=True)]
            options["bias"] = whole[:, own[0], own[1]] if bias[1] == 1 else full[:, own[0], own[1]]
        offsets = [0, rows.stop - rows.start], [0, columns.stop - columns.start]
        alone = forward_and_backward(
            [x[s] for x, s in zip(arrays, (rows, columns, columns, rows), strict=True)], offsets, options, "cpu"
        )
        np.testing.assert_array_equal(out[rows], alone[0])
        np.testing.assert_array_equal(lse[:, rows], alone[1])
        for x, y, s in zip(grads, alone[2][:3], (rows, columns, columns), strict=False):
            np.testing.assert_array_equal(x[s], y)


def share_out(work, groups, size=1000):
    work, groups = np.array(work), np.array(groups)
    return cpu_backward._share_out(np.arange(len(work)), 1, groups, np.full(len(work), size), work)


def test_a_head_is_split_if_it_is_more_than_its_share():
    """Whether there are few heads, or one that is much longer than the many others."""
    few, many = share_out([5, 5], [3, 3]), share_out([5] * 40, [3] * 40)
    np.testing.assert_array_equal(few.members, [[h, g, 3000 * h, h] for h in (0, 1) for g in range(3)])
    assert (many.members[:, 1] == -1).all()
    assert len(many.members) == 40
    assert (many.partial_size, many.kept) == (0, 2000)
    mixed = share_out([5] * 40 + [100], [3] * 40 + [8])
    assert mixed.members[:8].tolist() == [[40, g, 0, 0] for g in range(8)]
    assert (mixed.members[8:, 1] == -1).all()
    assert len(mixed.members) == 48
    assert mixed.partial_size == 8000
    large = share_out([5, 5], [3, 3], cpu_backward.BUFFERS)
    assert (large.members[:, 1] == -1).all()


@pytest.mark.parametrize("lengths", [LENGTHS, LONG], ids=["short", "long"])
def test_same_bits_for_any_number_of_threads(lengths):
    *arrays, of_queries, of_keys = packed(lengths, sizes=(2, 1, 8, 8))
    most = numba.get_num_threads()
    found = []
    try:
        for threads in (1, most):
            numba.set_num_threads(threads)
            out, lse, grads = forward_and_backward(arrays, (of_queries, of_keys), {"is_causal": True}, "cpu")
            found.append([out, lse, *grads[:3]])
    finally:
        numba.set_num_threads(most)
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nan_stays_in_its_sequence():
    q, k, v, _, of_queries, of_keys = packed()
    want = na.attention_varlen(q, k, v, of_queries, of_keys)
    rows, columns = of_sequence(2, of_queries, of_keys)
    k[columns], v[columns] = np.nan, np.nan
    out = na.attention_varlen(q, k, v, of_queries, of_keys)
    assert np.isnan(out[rows]).all()
    out[rows] = want[rows]
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize(
    ("shape", "waves"),
    [
        ((n, H, *LONGEST), 1),
        ((n, 1, *LONGEST), HKV),
        ((1, H, *LONGEST), n),
        ((1, 1, 1, 1), n * HKV),
        ((1, H, T_Q, T_K), 1),
        ((1, 1, T_Q, T_K), HKV),
        ((1, H, 1, T_K), 1),
        ((1, H, T_Q, LONGEST[1]), 1),
    ],
    ids=str,
)
def test_heads_that_share_a_bias_do_not_run_at_the_same_time(shape, waves):
    """Nor do others wait: a packed bias is shared by no two sequences."""
    q, k, v, grad_out, *offsets = packed()
    out, lse = na.attention_varlen(q, k, v, *offsets, return_lse=True)
    options = Options(bias=np.zeros(shape, np.float32))
    found = cpu_backward._waves(build_backward(grad_out, q, k, v, out, lse, None, *offsets, None, options))
    assert sorted(found.ravel()) == list(range(n * HKV))
    assert len(found) == waves
    for wave in found:
        users = np.zeros(shape, int)
        for b, head in (divmod(number, HKV) for number in wave):
            own = of_sequence(b, *offsets)
            over_tokens = (T_Q, T_K)
            where = [
                slice(1) if size == 1 else s if size == total else slice(s.stop - s.start)
                for size, s, total in zip(shape[2:], own, over_tokens, strict=True)
            ]
            heads = slice(1) if shape[1] == 1 else slice(head * H // HKV, (head + 1) * H // HKV)
            users[(b if shape[0] > 1 else 0, heads, *where)] += 1
        assert users.max() <= 1


@pytest.mark.parametrize("which", range(4), ids=["query", "key", "value", "grad_out"])
def test_gradients_of_others_have_no_nan_of_a_sequence(which):
    *arrays, of_queries, of_keys = packed()
    want = forward_and_backward(arrays, (of_queries, of_keys), {}, "cpu")[2]
    rows, columns = of_sequence(2, of_queries, of_keys)
    arrays[which][(rows, columns, columns, rows)[which]] = np.nan
    got = forward_and_backward(arrays, (of_queries, of_keys), {}, "cpu")[2]
    assert np.isnan(got.query[rows]).all()
    for x, y, own in zip(got[:3], want[:3], (rows, columns, columns), strict=True):
        x[own] = y[own]
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts(layout, dtype):
    *arrays, of_queries, of_keys = packed(dtype=dtype)
    arrays = [LAYOUTS[layout](x) for x in arrays]
    check(arrays, (of_queries, of_keys), {"is_causal": "bottom-right"}, dtype)


def test_out():
    q, k, v, _, *offsets = packed()
    want = na.attention_varlen(q, k, v, *offsets)
    out = np.empty_like(want)
    assert na.attention_varlen(q, k, v, *offsets, out=out) is out
    np.testing.assert_array_equal(out, want)
    sea = np.full((T_Q + 2, H + 2, 2 * EV), np.nan, np.float32)
    inside = sea[1:-1, 1:-1, ::2]
    na.attention_varlen(q, k, v, *offsets, out=inside)
    np.testing.assert_array_equal(inside, want)
    inside[...] = np.nan
    assert np.isnan(sea).all()


@pytest.mark.parametrize("option", ["plain", "lengths", "mask over tokens"])
def test_every_row_is_written(monkeypatch, option):
    """Also rows that belong to no valid query or key."""
    arrays, offsets, options = packed()[:4], packed()[4:], OPTIONS[option][0]
    forward_and_backward(arrays, offsets, options, "cpu")  # no kernel compiles below
    empty = np.empty

    def poisoned(shape, dtype=float, **more):
        array = empty(shape, dtype, **more)
        if array.dtype.kind == "f":
            array[...] = np.nan
        return array

    monkeypatch.setattr(np, "empty", poisoned)
    out, lse, grads = forward_and_backward(arrays, offsets, options, "cpu")
    assert not np.isnan(out).any()
    assert not np.isnan(lse).any()
    assert not any(np.isnan(x).any() for x in grads if x is not None)
    if option == "lengths":
        of_queries, of_keys = (offsets[0], QUERY_LENGTHS), (offsets[1], KEY_LENGTHS)
        for x, (begins, valid) in zip(grads[:3], (of_queries, of_keys, of_keys), strict=True):
            for b in range(n):
                assert not x[begins[b] + valid[b] : begins[b + 1]].any()


def without_float16(monkeypatch):
    for name in ("cpu", "cpu_backward"):
        module = sys.modules[f"numba_attention.backends.{name}"]
        monkeypatch.setattr(module, "HOST", module.HOST._replace(f16=False))


def test_float16_without_conversion_in_hardware(monkeypatch):
    arrays, offsets = packed(dtype="float16")[:4], packed()[4:]
    want = forward_and_backward(arrays, offsets, {"is_causal": True}, "cpu")
    without_float16(monkeypatch)
    got = forward_and_backward(arrays, offsets, {"is_causal": True}, "cpu")
    assert_close(got[0], want[0], 1e-3)
    for a, b in zip(got[2][:3], want[2][:3], strict=True):
        assert_close(a, b, 2e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16 without conversion in hardware"])
def test_memory_does_not_grow_with_the_number_of_sequences_times_tokens(monkeypatch, dtype):
    number, tokens = 2000, 4000
    *arrays, starts, _ = packed([(tokens // number,) * 2] * number, dtype.split()[0], sizes=(2, 2, 8, 8))
    offsets, options = (starts, starts), {"mask": np.ones((1, tokens), bool)}
    if dtype != "float32":
        without_float16(monkeypatch)
    forward_and_backward(arrays, offsets, options, "cpu")
    tracemalloc.start()
    try:
        forward_and_backward(arrays, offsets, options, "cpu")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8e6  # one array that is copied for each sequence takes 512e6 bytes


@pytest.mark.parametrize("empty", [0, 2])
def test_one_sequence_has_all_tokens(empty):
    """Then as many rows as tokens are as many as in the longest sequence: both readings of a bias agree."""
    lengths = [(0, 0), (0, 0)]
    lengths.insert(empty, (30, 40))
    *arrays, of_queries, of_keys = packed(lengths)
    bias = np.random.default_rng(3).standard_normal((H, 30, 40)).astype(np.float32)
    check(arrays, (of_queries, of_keys), {"bias": bias}, "float32")
    one = [x.swapaxes(0, 1) for x in arrays[:3]]
    out = na.attention_varlen(*arrays[:3], of_queries, of_keys, bias=bias)
    np.testing.assert_array_equal(out.swapaxes(0, 1), na.attention(*one, bias=bias))


def test_no_sequences():
    q, k, v, grad_out, *offsets = packed([])
    out, lse = na.attention_varlen(q, k, v, *offsets, return_lse=True)
    assert out.shape == (0, H, EV)
    grads = na.attention_varlen_backward(grad_out, q, k, v, out, lse, *offsets)
    assert grads.key.shape == (0, HKV, E)


@pytest.mark.parametrize("rotary", [None, True])
def test_layer(rotary):
    layer = na.MultiHeadAttention(48, 4, num_kv_heads=2, rotary=rotary, rng=0)
    x, cu_seqlens = np.random.default_rng(1).standard_normal((40, 48), dtype=np.float32), [0, 7, 7, 30, 40]
    out = layer(x, cu_seqlens=cu_seqlens, is_causal=True, window=(9, None))
    for start, stop in itertools.pairwise(cu_seqlens):
        if start < stop:
            want = layer(x[start:stop], is_causal=True, window=(9, None))
            np.testing.assert_allclose(out[start:stop], want, atol=2e-6)


def test_layer_refuses():
    layer, x = na.MultiHeadAttention(8, 2, rng=0), np.zeros((6, 8), np.float32)
    with pytest.raises(ValueError, match="cu_seqlens is for self-attention"):
        layer(x, x, cu_seqlens=[0, 6])
    with pytest.raises(ValueError, match="query must have shape"):
        layer(x[None], cu_seqlens=[0, 6])
    with pytest.raises(ValueError, match="cu_seqlens_q must go from 0 to 6"):
        layer(x, cu_seqlens=[0, 5])
    with pytest.raises(ValueError, match="key_padding_mask must be None"):
        layer(x, cu_seqlens=[0, 6], key_padding_mask=np.zeros(6, bool))
    with pytest.raises(ValueError, match="cu_seqlens must be None with a cache"):
        layer(x, cu_seqlens=[0, 6], cache=na.KVCache(1, 2, 8, 4))
