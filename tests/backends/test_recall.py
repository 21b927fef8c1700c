"""Small calls like earlier ones: the same bits as those of the usual way, and no check lost."""

import os
import sys
import threading

import numba
import numpy as np
import pytest

import numba_attention as na
from numba_attention.backends import cpu, recall

ml_dtypes = pytest.importorskip("ml_dtypes")
DTYPES = ["float32", "float64", "float16", ml_dtypes.bfloat16]
SHAPES = [  # of queries and of keys
    ((1, 1, 1, 64), (1, 1, 1, 64)),
    ((2, 4, 5, 16), (2, 2, 9, 16)),
    ((3, 40, 8), (3, 33, 8)),
    ((7, 32), (70, 32)),
    ((2, 1, 8, 70, 64), (3, 8, 70, 64)),
]
OPTIONS = [
    {},
    {"is_causal": True},
    {"is_causal": "bottom-right"},
    {"is_causal": False, "mask": None, "dropout_p": 0.0},
    {"scale": 0.3, "window": (5, None)},
    {"softcap": 3.0, "query_offset": 4, "is_causal": True},
]


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    for name in ("_forward", "_into", "_backward", "_decode", "_packed_forward", "_packed_backward"):
        monkeypatch.setattr(getattr(recall, name), "table", recall.NOTHING)


@pytest.fixture(autouse=True)
def number_of_threads():
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


@pytest.fixture
def usual(monkeypatch):
    """How many calls went the usual way."""
    calls = []
    for name in ("forward", "backward"):
        original = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda p, original=original: (calls.append(p), original(p))[1])
    return calls


def arrays(shapes=SHAPES[1], dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shapes[min(n, 1)]).astype(dtype) for n in range(3)]


def bits(result):
    parts = result if isinstance(result, tuple) else (result,)
    return [(x.dtype, x.shape, x.tobytes()) for x in parts if x is not None]


CASES = [("float32", shapes, options) for shapes in SHAPES for options in OPTIONS]
CASES += [(dtype, shapes, options) for dtype in DTYPES[1:] for shapes in SHAPES[1::3] for options in OPTIONS[1::4]]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("dtype", "shapes", "options"), CASES, ids=str)
def test_bits_are_the_same(dtype, shapes, options, threads, usual):
    numba.set_num_threads(min(threads, numba.get_num_threads()))
    q, k, v = arrays(shapes, dtype)
    for more in ({}, {"return_lse": True}):
        first = na.attention(q, k, v, **options, **more)
        for seed in range(1, 4):  # other numbers at other addresses
            na.attention(*arrays(shapes, dtype, seed), **options, **more)
        usual.clear()
        again = na.attention(q.copy(), k, v, **options, **more)
        assert not usual
        assert bits(again) == bits(first)
    out, lse = again
    call = (np.ones_like(out), q, k, v, out, lse)
    first = na.attention_backward(*call, **options)
    na.attention_backward(*call, **options)
    usual.clear()
    again = na.attention_backward(*call, **options)
    assert bits(again) == bits(first)
    broadcast = len({q.ndim, k.ndim}) > 1 or q.ndim == 2
    assert bool(usual) == broadcast


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("dtype", "shapes", "options"), CASES[::2], ids=str)
def test_results_in_arrays_of_the_caller(dtype, shapes, options, threads, usual):
    numba.set_num_threads(min(threads, numba.get_num_threads()))
    q, k, v = arrays(shapes, dtype)
    for more in ({}, {"return_lse": True}):
        first = na.attention(q, k, v, **options, **more)
        like = first[0] if more else first
        layouts = [
            np.empty_like(like),
            np.empty(like.T.shape, like.dtype).T,
            np.empty((*like.shape, 2), like.dtype)[..., 1],
        ]
        for out in layouts:
            for _ in range(3):
                na.attention(q, k, v, out=out, **options, **more)
            out[...] = 7
            usual.clear()
            result = na.attention(q.copy(), k, v, out=out, **options, **more)
            assert not usual
            assert (result[0] if more else result) is out
            assert bits(result) == bits(first)


def test_an_array_for_the_result_is_checked_as_ever(usual):
    q, k, v = arrays(((2, 3, 8, 16),) * 2)
    out = np.empty_like(q)
    for _ in range(4):
        na.attention(q, k, v, out=out)
    assert len(usual) == 2
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writeable"):
        na.attention(q, k, v, out=out)
    for x, name in ((q, "query"), (k, "key"), (v, "value")):
        with pytest.raises(ValueError, match=f"shares memory with {name}"):
            na.attention(q, k, v, out=x)
    with pytest.raises(TypeError, match="out must have the dtype"):
        na.attention(q, k, v, out=np.empty(q.shape))
    with pytest.raises(ValueError, match="out must have shape"):
        na.attention(q, k, v, out=np.empty_like(q[:1]))
    with pytest.raises(ValueError, match="must not overlap itself"):
        na.attention(q, k, v, out=np.lib.stride_tricks.as_strided(out.copy(), out.shape, (0, *out.strides[1:])))
    room = np.zeros((2, 6, 8, 16), np.float32)  # rows of the result between those of the query: no overlap, but near
    room[:, ::2] = q
    for _ in range(3):
        na.attention(room[:, ::2], k, v, out=room[:, 1::2])
    assert room[:, 1::2].tobytes() == na.attention(q, k, v).tobytes()


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
def test_calls_of_a_layer(options, usual):
    layer = na.MultiHeadAttention(32, 4, rng=0)
    x = np.random.default_rng(0).standard_normal((2, 7, 32), dtype=np.float32)
    first = layer(x, **options)
    for _ in range(2):
        layer(x, **options)
    usual.clear()
    assert layer(x.copy(), **options).tobytes() == first.tobytes()
    assert not usual


def learned(q, k, v, **options):
    """Let this call be remembered."""
    for _ in range(3):
        na.attention(q, k, v, **options)
    assert recall.forward(q, k, v, options, False) is not None


class Child(np.ndarray):
    pass


def misaligned(x):
    room = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    room[...] = x
    return room


OTHERS = {
    "shape": lambda x: x[:, :, :3],
    "strides": lambda x: np.asfortranarray(x),
    "order of axes": lambda x: x.swapaxes(-1, -2).copy().swapaxes(-1, -2),
    "subclass": lambda x: x.view(Child),
    "alignment": misaligned,
    "readonly": lambda x: np.broadcast_to(x, x.shape),
    "dtype": lambda x: x.astype("float64"),
    "byte order": lambda x: x.astype(">f4"),
    "kind": lambda x: x.view(np.int32),
    "None": lambda x: None,
    "list": lambda x: x.tolist(),
    "number": lambda x: 3.5,
    "axes": lambda x: x[0],
    "no axes": lambda x: x[0, 0, 0, 0],
    "empty": lambda x: x[:, :, :0],
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_other_arrays_are_checked_as_ever(place, other, monkeypatch):
    """Result or error are those of a process that remembers nothing."""
    call = arrays()
    learned(*call)
    call[place] = OTHERS[other](call[place])
    got = outcome(lambda: na.attention(*call))
    monkeypatch.setattr(recall._forward, "table", recall.NOTHING)
    assert got == outcome(lambda: na.attention(*call))


def outcome(call):
    try:
        return bits(call())
    except (TypeError, ValueError) as error:
        return type(error), str(error)


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": 1}, {"is_causal": np.True_}, {"is_causal": "up"}, {"is_causal": None}, {"scale": True},
        {"scale": "0.3"}, {"scale": float("nan")}, {"scale": np.float32(0.3)}, {"causal": True}, {"window": [1, 2]},
        {"window": (1, 2, 3)}, {"window": (1.0, 2)}, {"window": (np.int64(1), 2)}, {"softcap": 0.0}, {"softcap": -1},
        {"mask": True}, {"bias": 0.0}, {"query_offset": 1.0}, {"key_lengths": 3}, {"seed": 3}, {"dropout_p": 0},
        {"return_lse": 1}, {"return_lse": None}, {"return_lse": "yes"}, {"backend": "gpu"}, {"backend": "reference"},
        {"out": np.zeros((2, 4, 5, 16), np.float64)}, {"out": np.zeros((2, 4, 5, 16), np.float32)},
    ],
    ids=str,
)  # fmt: skip
def test_other_options_are_checked_as_ever(options, monkeypatch):
    call = arrays()
    for known in OPTIONS:
        learned(*call, **known)
    learned(*call, is_causal=True, scale=1.0, window=(1, 2))
    learned(*call, window=(1, 2))
    learned(*call, scale=1.0)
    got = outcome(lambda: na.attention(*call, **options))
    monkeypatch.setattr(recall._forward, "table", recall.NOTHING)
    assert got == outcome(lambda: na.attention(*call, **options))


def test_another_backend_takes_its_own_way(monkeypatch):
    call = arrays()
    learned(*call)
    fast = na.attention(*call)
    reference = na.attention(*call, backend="reference")
    assert bits(fast) != bits(reference)
    backends = sys.modules[recall.__package__]
    with na.use_backend("reference"):
        assert bits(na.attention(*call)) == bits(reference)
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    assert bits(na.attention(*call)) == bits(reference)
    monkeypatch.delenv(backends.ENVIRONMENT)
    monkeypatch.setattr(backends, "_default", "reference")
    assert bits(na.attention(*call)) == bits(reference)


def test_more_calls_than_are_remembered():
    """Every one of many shapes has its own result, whichever were forgotten meanwhile."""
    calls = [arrays(((1, 2, n % 9 + 1, 16), (1, 2, n // 9 + 1, 16)), seed=n) for n in range(2 * recall.COUNT)]
    want = [bits(na.attention(*call)) for call in calls]
    for _ in range(3 * recall.RARELY // 8):
        for call, result in zip(calls, want, strict=True):
            assert bits(na.attention(*call)) == result
    assert len(recall._forward.table.recipes) == recall.COUNT
    assert any(recall.forward(*call, {}, False) is not None for call in calls[recall.COUNT :])


def test_many_combinations_of_options(monkeypatch):
    """The oldest are forgotten; no number stands for two of them."""
    monkeypatch.setattr(recall, "CODES", 10)
    monkeypatch.setattr(recall, "_codes", dict(list(recall._codes.items())[:2]))
    call = arrays()
    for n in range(60):
        scale = 0.01 * (n % 30 + 1)
        want = bits(na.attention(*call, scale=scale))
        for _ in range(3):
            assert bits(na.attention(*call, scale=scale)) == want
    assert len(set(recall._codes.values())) == len(recall._codes) <= recall.CODES
    assert recall._codes[()] == 0


def test_results_are_arrays_of_their_own():
    call = arrays()
    learned(*call)
    first, second = na.attention(*call), na.attention(*call)
    kept = first.copy()
    second[...] = 0
    assert not np.shares_memory(first, second)
    np.testing.assert_array_equal(first, kept)


def test_threads_with_different_calls():
    calls = [arrays(((2, 8, 20 + n, 32), (2, 8, 40, 32)), seed=n) for n in range(4)]
    want = [bits(na.attention(*call)) for call in calls]
    errors = []

    def work(n):
        try:
            for turn in range(300):
                m = (n + turn) % 4
                assert bits(na.attention(*calls[m])) == want[m]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_in_a_forked_child():
    call = arrays(((2, 8, 64, 64), (2, 8, 64, 64)))
    want = bits(na.attention(*call))
    learned(*call)
    child = os.fork()
    if child == 0:
        os._exit(0 if bits(na.attention(*call)) == want else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_recalled_call_is_right():
    q, k, v = arrays()
    learned(q, k, v, is_causal=True)
    scores = np.einsum("bhle,bhse->bhls", q, k.repeat(2, 1), dtype=np.float64) / 4
    scores[..., ~np.tri(5, 9, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = weights / weights.sum(-1, keepdims=True) @ v.repeat(2, 1)
    np.testing.assert_allclose(na.attention(q, k, v, is_causal=True), want, atol=1e-6)


OFFSETS = [([0, 5, 5, 21], [0, 9, 12, 33]), ([0, 1, 2, 3], [0, 40, 41, 49]), ([0, 70, 90], [0, 70, 90])]


def packed(of_queries, of_keys, dtype="float32", seed=0, kind=np.int64):
    rng = np.random.default_rng(seed)
    shapes = (of_queries[-1], 4, 16), (of_keys[-1], 2, 16), (of_keys[-1], 2, 24)
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    return *arrays, np.array(of_queries, kind), np.array(of_keys, kind)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences(offsets, dtype, options, usual):
    q, k, v, cu_q, cu_k = packed(*offsets, dtype)
    first = na.attention_varlen(q, k, v, cu_q, cu_k, **options, return_lse=True)
    for seed in range(1, 4):
        na.attention_varlen(*packed(*offsets, dtype, seed), **options, return_lse=True)
    mixed = len(usual) == 4 and usual[-1].plan is None  # one kernel for short sequences and one for the others
    usual.clear()
    again = na.attention_varlen(q.copy(), k, v, cu_q.copy(), cu_k, **options, return_lse=True)
    assert bool(usual) == mixed
    assert bits(again) == bits(first)
    out, lse = again
    call = (np.ones_like(out), q, k, v, out, lse, cu_q, cu_k)
    first = na.attention_varlen_backward(*call, **options)
    na.attention_varlen_backward(*call, **options)
    usual.clear()
    again = na.attention_varlen_backward(*call, **options)
    assert not usual
    assert bits(again) == bits(first)
    parts = zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)
    for a, b, c, d in parts:
        alone = na.attention(*(x.swapaxes(0, 1) for x in (q[a:b], k[c:d], v[c:d])), **options)
        assert out[a:b].swapaxes(0, 1).tobytes() == alone.tobytes()


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_other_offsets_of_the_same_header(kind, usual):
    q, k, v, cu_q, cu_k = packed(*OFFSETS[0], kind=kind)
    others = cu_q + np.array([0, 1, 1, 0], kind), cu_k
    want = [bits(na.attention_varlen(q, k, v, *cu)) for cu in ((cu_q, cu_k), others)]
    assert want[0] != want[1]
    for _ in range(4):
        assert bits(na.attention_varlen(q, k, v, cu_q, cu_k)) == want[0]
        assert bits(na.attention_varlen(q, k, v, *others)) == want[1]
    usual.clear()
    na.attention_varlen(q, k, v, *others)
    assert not usual
    for wrong in ([0, 5, 5, 20], [0, 5, 3, 21], [0.0, 5, 5, 21], [[0, 5, 5, 21]]):
        with pytest.raises((TypeError, ValueError), match="cu_seqlens_q"):
            na.attention_varlen(q, k, v, np.array(wrong), cu_k)


@pytest.mark.parametrize("storage", [None, "float16", "int8"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("start", [0, 500, 1100])
@pytest.mark.parametrize("ragged", [False, True])
def test_steps_of_decoding(storage, batch, start, ragged, usual):
    """Steps whose lengths differ are recalled, also where the keys become more than one split."""
    rng = np.random.default_rng(0)
    cache = na.KVCache(batch, 2, 1400, 16, storage=storage)

    def new(n, heads=2):
        return rng.standard_normal((batch, heads, n, 16), dtype=np.float32)

    cache.append(new(start + 1), new(start + 1), *([np.arange(1, batch + 1) * (start + 1) // batch] if ragged else []))
    queries = [new(1, 8) for _ in range(20)]
    tokens = [(new(1), new(1)) for _ in queries]
    got = []
    for query, token in zip(queries, tokens, strict=True):
        cache.append(*token)
        got.append(na.attention_decode(query, cache, return_lse=True))
    assert len(usual) <= 2
    usual.clear()
    cache.truncate(cache.lengths - len(queries))
    for n in range(len(queries)):  # `out` goes the usual way
        cache.append(*tokens[n])
        want = na.attention_decode(queries[n], cache, return_lse=True, out=np.empty_like(got[n][0]))
        assert bits(want) == bits(got[n])
    assert len(usual) == len(queries)


@pytest.mark.parametrize("storage", [None, "int8"])
def test_steps_of_decoding_with_pages(storage, usual):
    rng = np.random.default_rng(0)
    cache = na.PagedKVCache(200, 16, 2, 16, storage=storage)
    ids = cache.add(2)

    def new(n, heads=2):
        return rng.standard_normal((2, heads, n, 16), dtype=np.float32)

    cache.append(ids, new(40), new(40), lengths=[5, 40])
    for n in range(30):
        cache.append(ids, new(1), new(1))
        query = new(1, 8)
        usual.clear()
        got = na.attention_decode(query, cache)
        assert not usual or n < 2
        assert bits(na.attention_decode(query, cache, out=np.empty_like(got))) == bits(got)


def test_other_steps_are_checked_as_ever(monkeypatch):
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, 2, 4, 50, 16), dtype=np.float32)
    cache = na.KVCache.from_arrays(key, value, lengths=[20, 30])
    query = rng.standard_normal((2, 8, 1, 16), dtype=np.float32)
    for _ in range(4):
        na.attention_decode(query, cache)
    half = na.KVCache.from_arrays(key.astype("f2"), value.astype("f2"), dtype="f4")
    calls = [
        lambda: na.attention_decode(query.astype("f8"), cache),
        lambda: na.attention_decode(query[:1], cache),
        lambda: na.attention_decode(query[:, :3], cache),
        lambda: na.attention_decode(query[..., :8], cache),
        lambda: na.attention_decode(query, cache, is_causal=False),
        lambda: na.attention_decode(query, cache, key_lengths=10),
        lambda: na.attention_decode(query, cache, return_lse=1),
        lambda: na.attention_decode(query, cache, scale=0.5),
        lambda: na.attention_decode(query, half),
        lambda: na.attention_decode(query.astype("f2"), half),
        lambda: na.attention_decode(query, na.KVCache.from_arrays(key[:, :, ::2], value[:, :, ::2])),
    ]
    got = [outcome(call) for call in calls for _ in range(3)]
    monkeypatch.setattr(recall._decode, "table", recall.NOTHING)
    monkeypatch.setattr(recall._decode, "learn", lambda *_: None)
    assert got == [outcome(call) for call in calls for _ in range(3)]


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("L", [3, 40])
def test_steps_of_several_tokens(L, paged, usual):
    """Guessed tokens and pieces of a prompt: the kernel for few queries, and the one for many."""
    rng = np.random.default_rng(0)
    cache = na.PagedKVCache(150, 16, 2, 16) if paged else na.KVCache(3, 2, 700, 16)
    ids = [cache.add(3)] if paged else []

    def new(n, heads=2):
        return rng.standard_normal((3, heads, n, 16), dtype=np.float32)

    cache.append(*ids, new(60), new(60), lengths=[60, 1, 17])
    for n in range(8):
        cache.append(*ids, new(L), new(L))
        query = new(L, 8)
        usual.clear()
        got = na.attention_decode(query, cache, return_lse=True, scale=0.3)
        assert not usual or n < 2
        want = na.attention_decode(query, cache, return_lse=True, scale=0.3, out=np.empty_like(got[0]))
        assert bits(got) == bits(want)


STEPS = [
    {"is_causal": True},
    {"scale": 0.3},
    {"is_causal": True, "rotary": True},
    {"is_causal": True, "paged": True},
    {"is_causal": True, "num_kv_heads": 2, "rotary": True, "paged": True},
]


@pytest.mark.parametrize("options", STEPS, ids=str)
def test_steps_of_a_layer(options, usual):
    """One new token at a time: remembered, and with the bits of the usual way, which an explicit offset takes."""
    options = dict(options)
    heads, rotary, paged = options.pop("num_kv_heads", 4), options.pop("rotary", None), options.pop("paged", False)
    layer = na.MultiHeadAttention(32, 4, num_kv_heads=heads, rotary=rotary, rng=0)
    x = np.random.default_rng(0).standard_normal((2, 20, 32), dtype=np.float32)
    caches = []
    for _ in range(2):
        cache = na.PagedKVCache(20, 4, heads, 8) if paged else na.KVCache(2, heads, 30, 8)
        if paged:
            cache.add(2)
        caches.append(cache)
        layer(x[:, :5], cache=cache, **options)
    for n in range(5, 20):
        usual.clear()
        got = layer(x[:, n : n + 1], cache=caches[0], **options)
        if n > 7:
            assert not usual
        assert bits(layer(x[:, n : n + 1], cache=caches[1], query_offset=n, **options)) == bits(got)
    whole = layer(x, is_causal=True, **{name: x for name, x in options.items() if name != "is_causal"})
    if options.get("is_causal"):
        np.testing.assert_allclose(got, whole[:, -1:], atol=1e-5)


def test_a_step_of_a_layer_that_is_refused_leaves_the_cache_as_it_was(monkeypatch):
    layer, cache = na.MultiHeadAttention(32, 4, rng=0), na.KVCache(2, 4, 30, 8)
    x = np.ones((2, 1, 32), np.float32)
    layer(x, cache=cache, is_causal=True)
    kept = cache.key.copy()
    for wrong in ({"window": (-1, 0)}, {"scale": float("nan")}, {"alibi_slopes": [1.0] * 3}, {"key_lengths": [2, 1]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            layer(x, cache=cache, **wrong)
        assert cache.lengths.tolist() == [1, 1]
        np.testing.assert_array_equal(cache.key, kept)
