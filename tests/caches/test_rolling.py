"""Caches with a window: what is kept, at its true position, against plain NumPy over lists of tokens."""

import copy
import math
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import numba_attention as na
from caching import check_pages, read_back, state

HKV, E, EV = 2, 16, 20
H = 2 * HKV


def kept_positions(length, window, first, oldest=0):
    """The positions that a cache keeps of a sequence of so many tokens."""
    return [j for j in range(length) if j < first or j >= max(length - window, oldest)]


def textbook(
    query, key, value, positions, at, *, causal=True, window=(None, None), slopes=None, sinks=None, softcap=None,
    mask=None, bias=None, prefix=0, scale=None,
):  # fmt: skip
    """Attention of one sequence: query (H, L, E) at positions `at`, and keys (Hkv, S, E) at `positions`."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = len(query) // len(key)
    key, value = np.repeat(key, group, 0), np.repeat(value, group, 0)
    s = np.einsum("hle,hse->hls", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * np.tanh(s / softcap)
    i, j = np.asarray(at)[:, None], np.asarray(positions, int)[None, :]
    if slopes is not None:
        s = s - np.asarray(slopes)[:, None, None] * abs(i - j)
    if bias is not None:
        s = s + bias
    visible = np.ones((len(at), len(positions)), bool)
    if causal:
        visible &= (j <= i) | (j < prefix)
    if window[0] is not None:
        visible &= i - j <= window[0]
    if window[1] is not None:
        visible &= j - i <= window[1]
    s = np.where(visible if mask is None else visible & mask, s, -np.inf)
    sink = np.full((len(query), len(at), 1), -np.inf)
    if sinks is not None:
        sink[:] = np.asarray(sinks)[:, None, None]
    s = np.concatenate([s, sink], -1)
    m = s.max(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.exp(s - np.where(np.isfinite(m), m, 0))
        total = p.sum(-1, keepdims=True)
        lse = (np.where(np.isfinite(m), m, 0) + np.log(total))[..., 0]
        return np.where(total > 0, p[..., :-1] / np.where(total > 0, total, 1), 0) @ value, lse


def make(kind, window, first, n=1, spare=0, page_size=4, **kwargs):
    if kind == "array":
        return na.KVCache(n, HKV, window + first + spare, E, EV, window=window, keep_first=first, **kwargs), None
    cache = na.PagedKVCache(60, page_size, HKV, E, EV, window=window, keep_first=first, **kwargs)
    return cache, cache.add(n)


def append(cache, ids, *arguments):
    cache.append(*(() if ids is None else (ids,)), *arguments)


def lengths_of(cache, ids):
    return cache.lengths if ids is None else cache.lengths(ids)


def tokens(n, T, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, HKV, T, E)).astype(dtype), rng.standard_normal((n, HKV, T, EV)).astype(dtype)


KINDS = ["array", "pages"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("window", "first"), [(1, 0), (5, 0), (8, 3), (7, 4), (16, 1)])
@pytest.mark.parametrize("pieces", [[1] * 40, [3] * 13, [40], [10, 1, 1, 20, 1, 3]], ids=["1", "3", "40", "mixed"])
def test_keeps_the_first_and_the_newest(kind, window, first, pieces):
    key, value = tokens(1, 40)
    cache, ids = make(kind, window, first)
    query = np.random.default_rng(5).standard_normal((1, H, 1, E)).astype(np.float32)
    done = 0
    for T in pieces:
        append(cache, ids, key[:, :, done : done + T], value[:, :, done : done + T])
        done += T
        at = kept_positions(done, window, first)
        contents = cache._contents()
        np.testing.assert_array_equal(contents.dense()[0][0], key[0][:, at].astype(np.float64))
        np.testing.assert_array_equal(contents.dense()[1][0], value[0][:, at].astype(np.float64))
        assert lengths_of(cache, ids) == done
        if kind == "array":
            place = cache.positions[0]
            assert sorted(place[place >= 0]) == at
            np.testing.assert_array_equal(cache.key[0][:, place >= 0], key[0][:, place[place >= 0]])
        else:
            check_pages(cache)
        out, lse = na.attention_decode(query, cache, return_lse=True)
        want, want_lse = textbook(query[0], key[0][:, at], value[0][:, at], at, [done - 1])
        np.testing.assert_allclose(out[0], want, atol=2e-6)
        np.testing.assert_allclose(lse[0], want_lse, atol=2e-6)


def test_pages_of_a_long_sequence_are_bounded():
    """As few pages as the documentation promises, and as many appended tokens as one likes."""
    for page_size, window, first, T in ((4, 10, 3, 1), (16, 64, 4, 47), (3, 5, 0, 2), (4, 8, 0, 1)):
        pages = math.ceil(first / page_size) + math.ceil(window / page_size) + 1
        cache = na.PagedKVCache(pages, page_size, HKV, E, EV, window=window, keep_first=first)
        ids = cache.add()
        for _ in range(80):
            cache.append(ids, *tokens(1, T))
            check_pages(cache)
        cache.append(ids, *tokens(1, 1000))  # a prompt that no pool could hold
        assert cache.lengths(ids) == 80 * T + 1000


OPTIONS = [
    {},
    {"window": (3, 0)},
    {"window": (20, 2), "is_causal": False},
    {"is_causal": False},
    {"alibi_slopes": [0.5, 0.25, 0.1, 0.02]},
    {"alibi_slopes": [0.5, 0.25, 0.1, 0.02], "window": (12, 0), "sinks": [0.5, -1, 2, 0]},
    {"sinks": [0.5, -1, 2, 0]},
    {"softcap": 2.0, "scale": 0.7},
    {"query_offset": [24, 3]},
    {"query_offset": [1, 2]},
    {"key_lengths": [27, 4], "is_causal": False},
    {"key_lengths": [2, 1]},
    {"prefix_lengths": [26, 2], "query_offset": [20, 0]},
    {"mask": "kept"},
    {"bias": "kept", "alibi_slopes": [0.5, 0.25, 0.1, 0.02]},
    {"bias": "newest", "window": (20, 0)},
    {"mask": "newest"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize(("L", "first", "spare"), [(1, 3, 0), (4, 3, 2), (3, 0, 0), (40, 2, 0)])
def test_positions_are_true(kind, options, L, first, spare):
    """A sequence that has dropped tokens, and one that has not."""
    window, lengths = 8, np.array([30, 6])
    key, value = tokens(2, 30)
    cache, ids = make(kind, window, first, 2, spare)
    for part in (slice(0, 5), slice(5, 6), slice(6, 29), slice(29, 30)):
        append(cache, ids, key[:, :, part], value[:, :, part], np.clip(lengths - part.start, 0, part.stop - part.start))
    rng = np.random.default_rng(1)
    query = rng.standard_normal((2, H, L, E)).astype(np.float32)
    S = max(len(kept_positions(n, window, first)) for n in lengths)
    given, own = dict(options), [{}, {}]
    for name in ("mask", "bias"):
        if name not in options:
            continue
        if options[name] == "newest" and (L == 1 or (lengths < L).any() or L >= S):
            pytest.skip("no such form")
        columns = S if options[name] == "kept" else L
        x = rng.random((2, H, L, columns)) < 0.7 if name == "mask" else rng.standard_normal((2, H, L, columns))
        given[name] = x if name == "mask" else x.astype(np.float32)
        for b in range(2):
            count = len(kept_positions(lengths[b], window, first))
            if options[name] == "kept":
                own[b][name] = x[b][:, :, :count]
            else:
                rest = np.full((H, L, count - L), name == "mask", x.dtype)
                own[b][name] = np.concatenate([rest, x[b]], -1)
    out, lse = na.attention_decode(query, cache, return_lse=True, **given)
    room = np.empty_like(out)
    assert na.attention_decode(query, cache, out=room, **given) is room
    np.testing.assert_array_equal(room, out)
    by_reference = na.attention_decode(query, cache, backend="reference", **given)
    np.testing.assert_allclose(out, by_reference, atol=3e-6)
    for b in range(2):
        at = np.array(kept_positions(lengths[b], window, first))
        of_keys = options.get("key_lengths", lengths)[b]
        start = options.get("query_offset", [of_keys - L] * 2)[b] if options.get("is_causal", True) else None
        if start is None:
            start = options.get("query_offset", [0, 0])[b]
        shown = at < of_keys
        for name in own[b]:
            own[b][name] = own[b][name][..., shown]
        want, want_lse = textbook(
            query[b], key[b][:, at[shown]], value[b][:, at[shown]], at[shown], start + np.arange(L),
            causal=options.get("is_causal", True), window=options.get("window", (None, None)),
            slopes=options.get("alibi_slopes"), sinks=options.get("sinks"), softcap=options.get("softcap"),
            scale=options.get("scale"), prefix=options.get("prefix_lengths", [0, 0])[b], **own[b],
        )  # fmt: skip
        np.testing.assert_allclose(out[b], want, atol=5e-6)
        np.testing.assert_allclose(lse[b], want_lse, atol=5e-6)


@pytest.mark.parametrize("storage", ["int8", "float8", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_storages(kind, storage):
    key, value = tokens(1, 90)
    cache, ids = make(kind, 50, 3, storage=storage)
    for start in range(0, 90, 15):
        append(cache, ids, key[:, :, start : start + 15], value[:, :, start : start + 15])
    at = kept_positions(90, 50, 3)
    query = np.random.default_rng(1).standard_normal((1, H, 3, E)).astype(np.float32)
    stored = [read_back(x[0][:, at], storage) for x in (key, value)]
    for options in ({}, {"slopes": [0.1, 0.2, 0.3, 0.4]}):
        given = {"alibi_slopes": options["slopes"]} if options else {}
        want, _ = textbook(query[0], *stored, at, [87, 88, 89], **options)
        np.testing.assert_allclose(na.attention_decode(query, cache, **given)[0], want, atol=3e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_the_batch(kind):
    key, value = tokens(2, 90)
    query = np.random.default_rng(1).standard_normal((2, H, 1, E)).astype(np.float32)
    both, ids = make(kind, 40, 3, 2)
    append(both, ids, key, value, [90, 60])
    out = na.attention_decode(query, both)
    for b, length in enumerate((90, 60)):
        one, own = make(kind, 40, 3)
        append(one, own, key[b : b + 1, :, :length], value[b : b + 1, :, :length])
        np.testing.assert_array_equal(na.attention_decode(query[b : b + 1], one)[0], out[b])


def test_truncate():
    """Tokens that dropped out do not come back; room beyond the window keeps some for a while."""
    key, value = tokens(1, 30)
    for spare in (0, 3):
        cache, _ = make("array", 5, 2, spare=spare)
        cache.append(key[:, :, :20], value[:, :, :20])
        cache.truncate(18)
        place = cache.positions[0]
        assert sorted(place[place >= 0]) == kept_positions(18, 5, 2, oldest=15 - spare)
        before = state(cache)
        for length in (3, 14 - spare):
            with pytest.raises(ValueError, match=f"at least {15 - spare}.*at most 2"):
                cache.truncate(length)
        assert state(cache) == before
        cache.append(key[:, :, 18:19], value[:, :, 18:19])
        place = cache.positions[0]
        assert sorted(place[place >= 0]) == kept_positions(19, 5, 2, oldest=15 - spare)
        cache.truncate(2)
        cache.append(key[:, :, 2:30], value[:, :, 2:30])
        place = cache.positions[0]
        np.testing.assert_array_equal(cache.key[0][:, place >= 0], key[0][:, place[place >= 0]])


def test_a_copy_is_on_its_own():
    for kind in KINDS:
        key, value = tokens(1, 30)
        cache, ids = make(kind, 5, 2)
        append(cache, ids, key, value)
        na.attention_decode(np.zeros((1, H, 1, E), np.float32), cache)
        before = state(cache)
        for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            assert state(other) == before
            append(other, ids, key[:, :, :9], value[:, :, :9])
            np.testing.assert_array_equal(other._contents().dense()[0][0][:, 2:], key[0][:, 4:9].astype(np.float64))
            assert state(cache) == before


def test_misuse():
    with pytest.raises(ValueError, match=r"capacity must be at least window \+ keep_first, 12, got 11"):
        na.KVCache(1, 2, 11, 8, window=10, keep_first=2)
    for make_one in (lambda **kw: na.KVCache(1, 2, 20, 8, **kw), lambda **kw: na.PagedKVCache(4, 4, 2, 8, **kw)):
        with pytest.raises(ValueError, match="keep_first must be 0 without a window"):
            make_one(keep_first=2)
        with pytest.raises(ValueError, match="window must be at least 1"):
            make_one(window=0)
        with pytest.raises(TypeError, match="window must be an integer"):
            make_one(window=(4, 0))
        with pytest.raises(ValueError, match="keep_first must be at least 0"):
            make_one(window=4, keep_first=-1)
        assert "window=4, keep_first=1" in repr(make_one(window=4, keep_first=1))


def test_too_few_pages_change_nothing():
    cache = na.PagedKVCache(5, 4, HKV, E, EV, window=12, keep_first=0)
    ids = cache.add(2)
    cache.append(ids[:1], *tokens(1, 40))
    before = state(cache)
    with pytest.raises(na.CacheFullError):
        cache.append(ids, *tokens(2, 9))
    assert state(cache) == before


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_refused_where_keys_have_dropped_out(kind):
    cache, ids = make(kind, 5, 2)
    append(cache, ids, *tokens(1, 9))
    with pytest.raises(ValueError, match="dropout_p must not be passed with a cache that has dropped keys"):
        na.attention_decode(np.zeros((1, H, 1, E), np.float32), cache, dropout_p=0.5, seed=1)
    layer, x = na.MultiHeadAttention(32, 2, dropout=0.5, rng=0), np.zeros((1, 9, 32), np.float32)
    cache = na.KVCache(1, 2, 7, 16, window=5, keep_first=2)
    with pytest.raises(ValueError, match="dropout_p must not be passed with a cache that has dropped keys"):
        layer(x, cache=cache, training=True)
    assert cache.lengths == 0


# The layer.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [
    {"is_causal": True}, {}, {"is_causal": True, "alibi_slopes": [0.3, 0.1]},
    {"is_causal": True, "sinks": [0.2, -0.3]}, {"is_causal": True, "window": (3, 0)},
    {"is_causal": True, "window": (9, 0), "alibi_slopes": [0.3, 0.1]},
], ids=lambda o: "-".join(o))  # fmt: skip
@pytest.mark.parametrize("pieces", [[20], [1, 19], [6, 2, 12], [3, 4, 4, 4, 5]], ids=str)
def test_layer_in_pieces_as_one_by_one(kind, options, pieces):
    """A prompt in pieces gives what its tokens give one after the other, with rotary positions."""
    layer = na.MultiHeadAttention(32, 2, rotary=True, dtype=np.float64, rng=0)
    x = np.random.default_rng(0).standard_normal((2, 20, 32))

    def fresh():
        if kind == "array":
            return na.KVCache(2, 2, 8, 16, dtype=np.float64, window=5, keep_first=3)
        cache = na.PagedKVCache(30, 4, 2, 16, dtype=np.float64, window=5, keep_first=3)
        cache.add(2)
        return cache

    one, cache = fresh(), fresh()
    want = np.concatenate([layer(x[:, t : t + 1], cache=one, **options) for t in range(20)], axis=1)
    if not options:  # without causality a query would see the keys that are appended with it
        pieces = [1] * 20
    got, done = [], 0
    for T in pieces:
        got.append(layer(x[:, done : done + T], cache=cache, **options))
        done += T
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=1e-12)
    for a, b in zip(cache._contents().dense(), one._contents().dense(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-13)
    # The formula: rotated keys, plain NumPy.
    p = layer.parameters()
    q, k, v = ((x @ p[f"{n}_proj.weight"].T + p[f"{n}_proj.bias"]).reshape(2, 20, 2, 16).swapaxes(1, 2) for n in "qkv")
    q, k = (na.apply_rotary(y, np.arange(20)) for y in (q, k))
    for t in (4, 8, 19):
        at = kept_positions(t + 1, 5, 3)
        for b in range(2):
            out, _ = textbook(
                q[b, :, t : t + 1], k[b][:, at], v[b][:, at], at, [t], window=options.get("window", (None, None)),
                slopes=options.get("alibi_slopes"), sinks=options.get("sinks"),
            )  # fmt: skip
            joined = out.swapaxes(0, 1).reshape(32) @ p["out_proj.weight"].T + p["out_proj.bias"]
            np.testing.assert_allclose(want[b, t], joined, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_refuses_and_leaves_the_cache_as_it_was(kind):
    layer = na.MultiHeadAttention(32, 2, dtype=np.float64, rng=0)
    x = np.random.default_rng(0).standard_normal((1, 20, 32))
    if kind == "array":
        cache = na.KVCache(1, 2, 8, 16, dtype=np.float64, window=5, keep_first=3)
    else:
        cache = na.PagedKVCache(30, 4, 2, 16, dtype=np.float64, window=5, keep_first=3)
        cache.add()
    layer(x, cache=cache)
    before = [*(y.tobytes() for y in cache._contents().dense()), cache._contents().lengths.tobytes()]
    for T, options in ((1, {"softcap": -1}), (4, {"softcap": -1}), (4, {"mask": np.ones((4, 4), bool)})):
        with pytest.raises(ValueError, match=next(iter(options))):
            layer(x[:, :T], cache=cache, **options)
        assert [*(y.tobytes() for y in cache._contents().dense()), cache._contents().lengths.tobytes()] == before


# Whatever is done in whatever order.

WINDOW, FIRST, SEQUENCES = 6, 3, 3
seeds = st.integers(0, 2**32 - 1)


class Rolling(RuleBasedStateMachine):
    """`sequences` has for each id all tokens so far, and the oldest position past the first that is still stored."""

    def __init__(self):
        super().__init__()
        self.cache, self.sequences, self.oldest = None, {}, {}

    def grow(self, names, counts, seed):
        T = max(counts, default=0)
        key, value = tokens(len(names), T, seed)
        append(self.cache, self.ids(names), key, value, counts)
        for i, (name, count) in enumerate(zip(names, counts, strict=True)):
            before = len(self.sequences[name])
            rows = zip(key[i].swapaxes(0, 1), value[i].swapaxes(0, 1), strict=True)
            self.sequences[name] = self.sequences[name] + list(rows)[:count]
            self.oldest[name] = max(self.oldest[name], self.after_append(name, before, before + count))

    def shorten(self, name, data):
        length, oldest = len(self.sequences[name]), self.oldest[name]
        choices = [n for n in range(length + 1) if n <= FIRST or n >= oldest]
        cut = data.draw(st.sampled_from(choices))
        self.sequences[name] = self.sequences[name][:cut]
        if cut <= FIRST:
            self.oldest[name] = 0
        return cut

    @precondition(lambda self: self.sequences)
    @invariant()
    def attends_to_what_is_kept(self):
        names = sorted(self.sequences)
        query = np.random.default_rng(7).standard_normal((len(names), H, 1, E)).astype(np.float32)
        slopes = [0.5, 0.25, 0.1, 0.02]
        outs = na.attention_decode(query, self.cache), na.attention_decode(query, self.cache, alibi_slopes=slopes)
        contents = self.cache._contents()
        for i, name in enumerate(names):
            held = self.sequences[name]
            at = kept_positions(len(held), WINDOW, FIRST, self.oldest[name])
            assert contents.lengths[i] == len(at)
            key, value = (
                np.array([held[j][n] for j in at]).reshape(-1, HKV, f).swapaxes(0, 1) for n, f in ((0, E), (1, EV))
            )
            for out, own in zip(outs, (None, slopes), strict=True):
                want, _ = textbook(query[i], key, value, at, [len(held) - 1], slopes=own)
                np.testing.assert_allclose(out[i], want, atol=5e-6)


class RollingArray(Rolling):
    @initialize(spare=st.sampled_from([0, 2, 5]))
    def make(self, spare):
        self.ring = WINDOW + spare
        self.cache, _ = make("array", WINDOW, FIRST, SEQUENCES, spare)
        self.sequences, self.oldest = {i: [] for i in range(SEQUENCES)}, dict.fromkeys(range(SEQUENCES), 0)

    def ids(self, names):
        return None

    def after_append(self, name, before, length):
        return length - self.ring

    @rule(T=st.integers(0, 9), seed=seeds)
    def append_to_all(self, T, seed):
        self.grow(range(SEQUENCES), [T] * SEQUENCES, seed)

    @rule(counts=st.lists(st.integers(0, 9), min_size=SEQUENCES, max_size=SEQUENCES), seed=seeds)
    def append_some(self, counts, seed):
        self.grow(range(SEQUENCES), counts, seed)

    @rule(data=st.data())
    def truncate(self, data):
        self.cache.truncate([self.shorten(name, data) for name in range(SEQUENCES)])

    @rule(index=st.lists(st.integers(0, SEQUENCES - 1), min_size=SEQUENCES, max_size=SEQUENCES))
    def reorder(self, index):
        self.cache.reorder(index)
        self.sequences = {i: list(self.sequences[source]) for i, source in enumerate(index)}
        self.oldest = {i: self.oldest[source] for i, source in enumerate(index)}


class RollingPages(Rolling):
    @initialize(page_size=st.sampled_from([1, 3, 4]))
    def make(self, page_size):
        self.size = page_size
        self.cache, ids = make("pages", WINDOW, FIRST, 1, page_size=page_size)
        self.sequences, self.oldest = {int(ids[0]): []}, {int(ids[0]): 0}

    def ids(self, names):
        return names

    def after_append(self, name, before, length):
        """The oldest page that is not wholly out of the window as it was before, or as it is if that has no overlap."""
        begin = (length if length - WINDOW >= before else before) - WINDOW  # there are pages enough
        pages_first = -(-FIRST // self.size) * self.size
        dropped = (begin - pages_first) // self.size * self.size
        return pages_first + dropped if dropped > 0 else 0

    @rule(data=st.data(), seed=seeds)
    def append(self, data, seed):
        names = data.draw(st.lists(st.sampled_from(sorted(self.sequences)), unique=True))
        counts = data.draw(st.lists(st.integers(0, 9), min_size=len(names), max_size=len(names)))
        self.grow(names, counts, seed)

    @precondition(lambda self: len(self.sequences) < SEQUENCES)
    @rule(data=st.data())
    def fork(self, data):
        source = data.draw(st.sampled_from(sorted(self.sequences)))
        name = self.cache.fork(source)
        self.sequences[name], self.oldest[name] = list(self.sequences[source]), self.oldest[source]

    @rule(data=st.data())
    def truncate(self, data):
        name = data.draw(st.sampled_from(sorted(self.sequences)))
        self.cache.truncate(name, self.shorten(name, data))

    @precondition(lambda self: len(self.sequences) > 1)
    @rule(data=st.data())
    def free(self, data):
        name = data.draw(st.sampled_from(sorted(self.sequences)))
        self.cache.free(name)
        del self.sequences[name], self.oldest[name]

    @rule(data=st.data())
    def reorder(self, data):
        names = data.draw(st.lists(st.sampled_from(sorted(self.sequences)), unique=True))
        sources = data.draw(st.lists(st.sampled_from(sorted(self.sequences)), min_size=len(names), max_size=len(names)))
        self.cache.reorder(names, sources)
        self.sequences |= {name: list(self.sequences[x]) for name, x in zip(names, sources, strict=True)}
        self.oldest |= {name: self.oldest[x] for name, x in zip(names, sources, strict=True)}

    @precondition(lambda self: self.cache is not None)
    @invariant()
    def pages_add_up(self):
        check_pages(self.cache)


TestRollingArray = RollingArray.TestCase
TestRollingPages = RollingPages.TestCase
TestRollingArray.settings = TestRollingPages.settings = settings(stateful_step_count=30)
