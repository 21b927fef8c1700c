"""Calls that are repeated from what was seen of the first one, and those that must not be."""

import sys
import threading
import types
from functools import partial

import numpy as np
import pytest

import numba_attention as na
from device import CupyArray, NumbaArray, Tensor, install
from emulator import emulated
from numba_attention.cuda import tile_shapes
from numba_attention.device import constants, replay
from numba_attention.device.headers import address_of

KINDS = {"torch": Tensor, "cupy": CupyArray, "numba": NumbaArray}


@pytest.fixture
def gpu(monkeypatch):
    install(monkeypatch)
    monkeypatch.setattr(replay, "_recorded", replay.BoundedCache())
    monkeypatch.setattr(replay, "_workspaces", replay.BoundedCache())
    with emulated(monkeypatch, races=False) as driver:
        yield driver


@pytest.fixture(params=KINDS)
def give(request, gpu):
    return KINDS[request.param]


@pytest.fixture
def repeated(monkeypatch):
    """How many calls were repeated so far."""
    calls = []
    repeat = replay.Recorded.repeat

    def counted(self, *arguments):
        calls.append(self)
        return repeat(self, *arguments)

    monkeypatch.setattr(replay.Recorded, "repeat", counted)
    return calls


def arrays(seed=0, L=20, S=33, E=16, H=4, Hkv=2, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((2, heads, n, E)).astype(dtype) for heads, n in ((H, L), (Hkv, S), (Hkv, S))]


def pages(x):
    """What three pages of 16 tokens hold for each of two sequences."""
    return np.ascontiguousarray(x.reshape(2, 2, 3, 16, *x.shape[3:]).swapaxes(1, 2).reshape(6, 2, 16, *x.shape[3:]))


def close(got, want, limit=1e-5):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_allclose(a.array, b, atol=limit)


def test_other_numbers_in_other_places(give, repeated):
    for seed in range(3):
        q, k, v = arrays(seed)
        got = na.attention(*map(give, (q, k, v)), is_causal=True, return_lse=True)
        assert type(got[0]) is give
        close(got, na.attention(q, k, v, is_causal=True, return_lse=True, backend="reference"))
    assert len(repeated) == 2


def test_gradients(give, repeated):
    for seed in range(2):
        q, k, v = arrays(seed)
        out, lse = na.attention(q, k, v, window=(9, 3), return_lse=True, backend="reference")
        got = na.attention_backward(*map(give, (out, q, k, v, out, lse)), window=(9, 3))
        assert type(got) is na.Gradients
        close(got, na.attention_backward(out, q, k, v, out, lse, window=(9, 3), backend="reference"))
        grad_lse = np.ones_like(lse)
        got = na.attention_backward(*map(give, (out, q, k, v, out, lse)), grad_lse=give(grad_lse), window=(9, 3))
        close(got, na.attention_backward(out, q, k, v, out, lse, grad_lse=grad_lse, window=(9, 3), backend="reference"))
    assert len(repeated) == 2


def test_matrices(give, repeated):
    for seed in range(2):
        q, k, v = (x[0, 0] for x in arrays(seed))
        out = na.attention(*map(give, (q, k, v)))
        assert out.shape == q.shape
        close([out], [na.attention(q, k, v, backend="reference")])
    assert len(repeated) == 1


def test_seeds(give, repeated):
    """Calls that differ by the seed of dropout repeat one plan, whatever the seed is."""
    q, k, v = arrays()
    out, lse = na.attention(q, k, v, return_lse=True, backend="reference")
    there = [give(x) for x in (q, k, v)]
    address = address_of(there[0].header)
    count = []
    for seed in (7, 0, 2**64 - 1, address, 2**63, 7):
        options = {"dropout_p": 0.4, "seed": seed}
        close([na.attention(*there, **options)], [na.attention(q, k, v, **options, backend="reference")])
        got = na.attention_backward(*map(give, (out, q, k, v, out, lse)), **options)
        close(got, na.attention_backward(out, q, k, v, out, lse, **options, backend="reference"))
        count.append(len(repeated))
    assert count == [0, 2, 4, 6, 8, 10]
    for seed in (-1, 2**64, 1.5, None):
        with pytest.raises((TypeError, ValueError), match="seed must be"):
            na.attention(*there, dropout_p=0.4, seed=seed)
    with pytest.raises(ValueError, match="seed must be"):
        na.attention(*there, dropout_p=0.4)
    na.attention(*there, dropout_p=0.3, seed=7)
    na.attention(*there, dropout_p=0.4, seed=7, is_causal=True)
    assert len(repeated) == 10, "other options beside the same seed"


def test_results_are_new_each_time(gpu, repeated):
    q, k, v = map(Tensor, arrays())
    first = na.attention(q, k, v)
    kept = first.array.copy()
    q.array[...] = 0
    second = na.attention(q, k, v)
    assert len(repeated) == 1
    assert address_of(first.header) != address_of(second.header)
    np.testing.assert_array_equal(first.array, kept)
    assert not np.allclose(second.array, kept)


def test_a_tensor_on_the_host_among_others(gpu, repeated):
    q, k, v = map(Tensor, arrays())
    na.attention(q, k, v)
    k.is_cuda = False
    with pytest.raises(TypeError, match=r"key must be a numpy\.ndarray or"):
        na.attention(q, k, v)
    assert not repeated


DIFFERENCES = {
    "causal": {"is_causal": True}, "bottom-right": {"is_causal": "bottom-right"}, "window": {"window": (3, 1)},
    "scale": {"scale": 0.5}, "softcap": {"softcap": 2.0}, "offset": {"query_offset": 3}, "lse": {"return_lse": True},
    "lengths": {"key_lengths": 5},
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENCES)
def test_options_differ(gpu, repeated, name):
    q, k, v = arrays()
    there = [Tensor(x) for x in (q, k, v)]
    options = DIFFERENCES[name]
    for given in ({}, options, {}, options):
        got = na.attention(*there, **given)
        want = na.attention(q, k, v, **given, backend="reference")
        close(got if isinstance(got, tuple) else [got], want if isinstance(want, tuple) else [want])
    assert len(repeated) == 2


def test_layouts_differ(gpu, repeated):
    q, k, v = arrays(L=33, H=2)
    variants = [
        [Tensor(x) for x in (q, k, v)],
        [Tensor(np.ascontiguousarray(x.swapaxes(1, 2))) for x in (q, k, v)],
        [Tensor(x[:, :, :20]) for x in (q, k, v)],
        [Tensor(q), Tensor(k[:, :, :20]), Tensor(v[:, :, :20])],
    ]
    variants[1] = [Tensor.of(x.header.swapaxes(1, 2)) for x in variants[1]]
    wide = Tensor(np.zeros((2, 2, 33, 17), np.float32))  # rows that begin anywhere: another kernel
    wide.array[..., 1:] = q
    variants.append([Tensor.of(wide.header[..., 1:]), *variants[0][1:]])
    for _ in range(2):
        for there in variants:
            close([na.attention(*there)], [na.attention(*(x.array for x in there), backend="reference")])
    assert len(repeated) == len(variants)
    assert len(replay._recorded) == len(variants)


def test_alignment_differs(gpu, repeated):
    q, k, v = arrays(E=20)  # rows of 80 bytes
    room = Tensor(np.zeros(q.size + 4, np.float32))
    for start in (0, 1, 0, 1):
        x = Tensor.of(room.header[start : start + q.size].reshape(q.shape))
        x.array[...] = q
        close([na.attention(x, Tensor(k), Tensor(v))], [na.attention(q, k, v, backend="reference")])
    assert len(repeated) == 2


def test_one_array_is_several_arguments(gpu, repeated):
    """Self-attention, and then other arrays of the same layout: those are not known to be one."""
    q, k, v = arrays(L=33, H=2)
    x = Tensor(q)
    close([na.attention(x, x, x)], [na.attention(q, q, q, backend="reference")])
    close([na.attention(x, Tensor(k), Tensor(v))], [na.attention(q, k, v, backend="reference")])
    close([na.attention(x, x, Tensor(v))], [na.attention(q, q, v, backend="reference")])
    assert not repeated
    x.array[...] = k
    close([na.attention(x, x, x)], [na.attention(k, k, k, backend="reference")])
    assert len(repeated) == 1


UNSEEN = {
    "mask": lambda: {"mask": np.ones((20, 33), bool)},
    "bias": lambda: {"bias": np.ones((20, 33), np.float32)},
    "slopes on the device": lambda: {"alibi_slopes": Tensor(np.ones(4, np.float32))},
    "a number on the device": lambda: {"score_mod": scaled, "mod_args": (Tensor(np.float32(0.5)),)},
    "much on the host": lambda: {"score_mod": shifted, "mod_args": (np.ones(2000, np.float32),)},
}


def scaled(score, batch, head, i, j, factor):
    return score * factor


def shifted(score, batch, head, i, j, table):
    return score + table[head]


def shown(batch, head, i, j, table):
    return table[(i + j) % 4] > 0


def of_host(options):
    """The same options with the arrays of fakes."""
    args = {"mod_args": tuple(getattr(x, "array", x) for x in options["mod_args"])} if "mod_args" in options else {}
    return {name: getattr(x, "array", x) for name, x in options.items()} | args


@pytest.mark.parametrize("name", UNSEEN)
def test_what_depends_on_more_is_not_repeated(gpu, repeated, name):
    q, k, v = arrays()
    there = [Tensor(x) for x in (q, k, v)]
    for _ in range(2):
        options = UNSEEN[name]()
        got = na.attention(*there, **options)
        close([got], [na.attention(q, k, v, **of_host(options), backend="reference")])
    assert not repeated
    assert not replay._recorded


def rows(x, kind=np.float64):
    return np.array(x, kind)


A_MASK, ANOTHER = (na.BlockMask(lambda b, h, i, j, n=n: (i + j) % n > 0, (20, 33)) for n in (3, 4))
AN_ARRAY = np.arange(2640).reshape(4, 20, 33)

# Options of which each is planned once and then repeated: none may be taken for another of its line.
VARIANTS = {
    "slopes": [
        {"alibi_slopes": x}
        for x in (rows([1, 0.5, 0.2, 0.1]), rows([1, 0.5, 0.2, 0.3]), rows([[1, 0.5, 0.2, 0.1], [1, 2, 3, 4]]),
                  rows([[1, 0.5, 0.2, 0.1]]), rows([1, 0.5, 0.2, 0.1], np.float32), [1.0, 0.5, 0.2, 0.3])
    ],
    "sinks": [{"sinks": x} for x in (rows([0, 1, 2, 3]), rows([0, 1, 2, 4]), rows([-1e9, 1, 2, 4]))],
    "key lengths": [{"key_lengths": x} for x in (rows([3, 20], int), rows([20, 3], int), [3, 21], [21, 3], 3)],
    "query lengths": [{"query_lengths": x} for x in (rows([3, 20], int), rows([20, 3], int))],
    "which lengths": [{name: [3, 12]} for name in ("key_lengths", "query_lengths", "prefix_lengths", "query_offset")],
    "scales": [{"scale": np.float32(0.5)}, {"scale": np.float64(0.25)}, {"scale": 0.25}, {"scale": 1}, {"scale": -0.5}],
    "dropout": [{"dropout_p": x, "seed": seed} for x, seed in ((0.5, 1), (0.25, 1), (0.5, np.int64(3)))],
    "windows": [{"window": x} for x in ((3, 1), [3, 2], (3, None), (None, 3))],
    "masks by blocks": [{"mask": A_MASK}, {"mask": ANOTHER}, {"mask": A_MASK, "is_causal": True}],
    "masks": [{"mask": x} for x in (AN_ARRAY % 3 > 0, AN_ARRAY[:1] % 3 > 0, AN_ARRAY[0] % 3 > 0)],
    "biases": [{"bias": x} for x in (AN_ARRAY % 5 * np.float32(1), AN_ARRAY[0] % 5 * 0.5, AN_ARRAY[:, :1] % 5 * 0.5)],
    "bias or mask": [{"bias": AN_ARRAY[0] % 5 * np.float32(1)}, {"mask": AN_ARRAY[0] % 5 > 0}],
    "arguments": [
        {"score_mod": shifted, "mod_args": (x,)}
        for x in (rows([1, 2, 3, 4]), rows([1, 2, 3, 5]), rows([1, 2, 3, 4], np.float32), rows([1, 2, 3, 4, 5]))
    ],
    "numbers": [{"score_mod": scaled, "mod_args": (x,)} for x in (1, 2, 2.0, np.float32(0.5), True)],
    "functions": [
        {"score_mod": shifted, "mod_args": (rows([1, 0, 1, 1]),)},
        *({"mask_mod": shown, "mod_args": (rows(x),)} for x in ([1, 0, 1, 1], [1, 0, 1, 0])),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_arrays_among_options(gpu, repeated, name):
    """Each variant twice, with the numbers of other arrays the second time."""
    for seed in range(2):
        q, k, v = arrays(seed)
        there = [Tensor(x) for x in (q, k, v)]
        for options in VARIANTS[name]:
            given = {
                x: Tensor(y) if x in ("mask", "bias") and isinstance(y, np.ndarray) else y for x, y in options.items()
            }
            if "bias" in given:
                given["bias"].array[...] += seed
                options = of_host(given)
            close([na.attention(*there, **given)], [na.attention(q, k, v, **options, backend="reference")])
    assert len(repeated) == len(VARIANTS[name])


@pytest.mark.parametrize("name", ["sinks", "masks by blocks", "biases", "arguments"])
def test_gradients_with_arrays_among_options(gpu, repeated, name):
    variants = VARIANTS[name][:2]
    for seed in range(2):
        q, k, v = arrays(seed)
        for options in variants:
            more = {"mod_grads": "all"} if name == "arguments" else {}
            given = {x: Tensor(y) if x == "bias" else y for x, y in options.items()}
            out, lse = na.attention(q, k, v, **options, return_lse=True, backend="reference")
            got = na.attention_backward(*map(Tensor, (out, q, k, v, out, lse)), **given, **more)
            want = na.attention_backward(out, q, k, v, out, lse, **options, **more, backend="reference")
            close(got[:5], want[:5], 1e-4)
            assert (got.mod_args is None) == (want.mod_args is None)
            close(got.mod_args or (), want.mod_args or (), 1e-4)
    assert len(repeated) == len(variants)


def test_strides_and_places_of_an_option(gpu, repeated):
    q, k, v = arrays()
    there = [Tensor(x) for x in (q, k, v)]
    bias = np.random.default_rng(0).standard_normal((4, 20, 40)).astype(np.float32)
    for _ in range(2):
        wide, turned = Tensor(bias), Tensor(np.ascontiguousarray(bias.swapaxes(-1, -2)))
        views = [Tensor.of(wide.header[..., n : n + 33]) for n in (0, 1, 2)]
        views.append(Tensor.of(turned.header.swapaxes(-1, -2)[..., :33]))
        for x in views:
            close([na.attention(*there, bias=x)], [na.attention(q, k, v, bias=x.array, backend="reference")])
    assert len(repeated) == len(views)


def test_arguments_of_mods_on_the_device(gpu, repeated):
    """Where they are is written once: another array is another call, other numbers in it are not."""
    q, k, v = arrays()
    there = [Tensor(x) for x in (q, k, v)]
    tables = [Tensor(rows([1, 2, 3, 4], np.float32)), Tensor(rows([4, 3, 2, 1], np.float32))]
    for more in (0, 1, 2):
        for table in tables:
            table.array[...] += more
            got = na.attention(*there, score_mod=shifted, mod_args=(table,))
            close([got], [na.attention(q, k, v, score_mod=shifted, mod_args=(table.array,), backend="reference")])
    assert len(repeated) == 4


FACTOR = 2.0


def test_what_a_mod_reads_outside_of_itself(gpu, repeated, monkeypatch):
    def mod(score, batch, head, i, j):
        return score * FACTOR + shift

    q, k, v = arrays()
    there = [Tensor(x) for x in (q, k, v)]
    for number in (0.5, 0.5, 1.5):
        shift = number
        for factor in (2.0, 3.0):
            monkeypatch.setitem(globals(), "FACTOR", factor)
            close([na.attention(*there, score_mod=mod)], [na.attention(q, k, v, score_mod=mod, backend="reference")])
    assert len(repeated) == 2


def by_sign(score, batch, head, i, j, factor):
    return score if 1.0 / factor > 0 else -score


def times(factor):
    def mod(score, batch, head, i, j, by=factor):
        return score * by

    return mod


def test_numbers_that_are_equal_and_differ(gpu, repeated):
    q, k, v = arrays()
    for zero, sign in ((0.0, 1), (-0.0, -1), (0.0, 1)):
        got = na.attention(*map(Tensor, (q, k, v)), score_mod=by_sign, mod_args=(zero,))
        close([got], [na.attention(sign * q, k, v, backend="reference")])
    for factor in (1.0, 3.0):  # a default of a function that is defined again
        got = na.attention(*map(Tensor, (q, k, v)), score_mod=times(factor))
        close([got], [na.attention(factor * q, k, v, backend="reference")])
    assert len(repeated) == 1


def test_dtypes_of_a_cache(gpu, repeated):
    """Two caches of the same codes differ in the type of the numbers that they take and give."""
    codes, scale = ([Tensor(np.zeros(shape, kind)) for _ in range(2)] for shape, kind in
                    (((2, 2, 48, 16), np.int8), ((2, 2, 48), np.float32)))  # fmt: skip
    single, half = (
        na.KVCache.from_arrays(*codes, lengths=8, key_scale=scale[0], value_scale=scale[1], dtype=dtype)
        for dtype in (np.float32, np.float16)
    )
    new, query = Tensor(np.ones((2, 2, 1, 16), np.float32)), Tensor(np.ones((2, 4, 1, 16), np.float32))
    for _ in range(2):
        single.append(new, new)
        na.attention_decode(query, single)
        with pytest.raises(TypeError, match="key must have"):
            half.append(new, new)
        with pytest.raises(TypeError, match="query must have"):
            na.attention_decode(query, half)
    assert half.lengths.tolist() == [8, 8]


def test_wrong_options_are_refused_each_time(gpu, repeated):
    q, k, v = map(Tensor, arrays())
    wrong = (
        {"mod_args": np.ones(3)}, {"mod_args": 3}, {"score_mod": 3}, {"score_mod": scaled, "mod_args": ("x",)},
        {"sinks": np.ones(3)}, {"key_lengths": [3, 99]}, {"bias": Tensor(np.ones((7, 7), np.float32))}, {"mask": 3},
        {"alibi_slopes": np.array(["a"], object)}, {"window": (True, 1)},
    )  # fmt: skip
    bias = Tensor(np.ones((20, 33), np.float32))
    na.attention(q, k, v, window=(1, 1))
    na.attention(q, k, v, bias=bias)
    na.attention(q, k, v, sinks=rows([0] * 4))
    for _ in range(2):
        for options in (*wrong, {"mask": bias}, {"sinks": rows([0] * 4, int)}):
            with pytest.raises((TypeError, ValueError)):
                na.attention(q, k, v, **options)
    assert not repeated


def test_weights_and_packed_sequences(give, repeated):
    for seed in range(2):
        q, k, v = arrays(seed, L=20, S=20, H=2)
        for chosen in ([0, 3], [3, 0]):
            want = na.attention_weights(q, k, rows=np.array(chosen), backend="reference")
            close([na.attention_weights(give(q), give(k), rows=np.array(chosen))], [want])
        q, k, v = (np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in (q, k, v))
        for cuts in ([0, 8, 20], [0, 12, 20]):
            given = [np.array(cuts)] * 2
            got = na.attention_varlen(*map(give, (q, k, v)), *given)
            close([got], [na.attention_varlen(q, k, v, *given, backend="reference")])
    assert len(repeated) == 4


def test_a_broadcast_gradient(gpu, repeated):
    """It is summed into an array of the caller's library, as every result."""
    q, k, v = arrays()
    k, v = k[:1], v[:1]
    out, lse = na.attention(q, k, v, return_lse=True, backend="reference")
    for _ in range(2):
        got = na.attention_backward(*map(Tensor, (out, q, k, v, out, lse)))
        close(got, na.attention_backward(out, q, k, v, out, lse, backend="reference"))
    assert len(repeated) == 1


def test_errors_are_raised_again(gpu, repeated):
    q, k, v = map(Tensor, arrays())
    for _ in range(2):
        with pytest.raises(ValueError, match="softcap must be positive"):
            na.attention(q, k, v, softcap=-1.0)
        with pytest.raises(TypeError, match="is_causal must be"):
            na.attention(q, k, v, is_causal=1)
        na.attention(q, k, v, is_causal=True)
    assert len(repeated) == 1
    q.requires_grad = True
    with pytest.raises(TypeError, match="requires a gradient"):
        na.attention(q, k, v, is_causal=True)
    assert len(repeated) == 1


def test_empty_arrays(gpu, repeated):
    q, k, v = arrays(S=0)
    for _ in range(2):
        out = na.attention(*map(Tensor, (q, k, v)))
        assert not out.array.any()


def test_streams_and_devices(gpu, repeated, monkeypatch):
    given = arrays()
    torch = sys.modules["torch"]
    q, k, v = map(Tensor, given)
    for stream in (0, 77, 0, 77):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, s=stream: type("S", (), {"cuda_stream": s}))
        close([na.attention(q, k, v)], [na.attention(*given, backend="reference")])
        assert gpu.launches[-1][-1] == (stream or 1)
    assert len(repeated) == 2
    there = [Tensor(x, 1) for x in given]
    for _ in range(2):
        close([na.attention(*there)], [na.attention(*given, backend="reference")])
        assert gpu.launches[-1][1] == 1
    assert len(repeated) == 3


def test_types_of_plain_arguments(gpu, repeated):
    """Numbers that are equal and differ in type: one may give another shape, or be refused."""
    q, k, v = arrays(H=1, Hkv=1)
    there = [Tensor(x) for x in (q, k, v)]
    for heads in (0, False, 0):
        got = na.attention_weights(*there[:2], heads=heads)
        close([got], [na.attention_weights(q, k, heads=heads, backend="reference")])
    q, k, v = arrays()
    there = [Tensor(x) for x in (q, k, v)]
    na.attention_weights(*there[:2], heads=1)
    for heads in (True, 1.0):
        with pytest.raises((TypeError, IndexError), match="heads"):
            na.attention_weights(*there[:2], heads=heads)
    out, lse = na.attention(q, k, v, return_lse=True, backend="reference")
    operands, table = [Tensor(x) for x in (out, q, k, v, out, lse)], rows([1, 2, 3, 4], np.float32)
    mod = {"score_mod": shifted, "mod_args": (table,)}
    na.attention_backward(*operands, **mod, mod_grads=0)
    for wrong in (False, 0.0):
        with pytest.raises(TypeError):
            na.attention_backward(*operands, **mod, mod_grads=wrong)


@pytest.mark.parametrize("wrong", [lambda: rows([2.0]), lambda: {2.0: 0}, lambda: iter((2.0,)), lambda: {2.0}])
def test_arguments_of_mods_in_a_wrong_container(gpu, repeated, wrong):
    q, k, v = map(Tensor, arrays())
    for given in ((2.0,), (np.float64(2.0),)):
        na.attention(q, k, v, score_mod=scaled, mod_args=given)
    with pytest.raises(TypeError, match="mod_args must be a tuple"):
        na.attention(q, k, v, score_mod=scaled, mod_args=wrong())
    assert not repeated


def test_long_lists_are_not_compared(gpu, repeated):
    """As arrays of as many numbers are not: keys would take as much memory as they have numbers."""
    q, k = map(Tensor, arrays()[:2])
    for _ in range(2):
        na.attention_weights(q, k, rows=[0, 1] * 300)
    assert not replay._recorded
    na.attention_weights(q, k, rows=[0, 1] * 200)
    assert replay._recorded.size > 400 * 64, "the key counts"


def test_a_call_of_a_signal_handler_is_not_recorded(gpu, repeated, monkeypatch):
    """It is made between two launches of another call, which must not repeat it."""
    given, inner = arrays(), arrays(7, L=5)
    q, k, v = map(Tensor, given)
    launch, out = gpu.launch, Tensor(np.zeros_like(inner[0]))
    handlers = [lambda: na.attention(*map(Tensor, inner), out=out), lambda: na.KVCache.from_arrays(
        *(Tensor(np.zeros((1, 1, 4, 8), np.float32)) for _ in range(2)), lengths=1
    ).append(*(Tensor(np.zeros((1, 1, 1, 8), np.float32)) for _ in range(2)), [1])]  # fmt: skip

    def interrupted(*arguments):
        if handlers:
            handlers.pop()()
        launch(*arguments)

    monkeypatch.setattr(gpu, "launch", interrupted)
    na.attention(q, k, v)
    na.attention(q, k, v, return_lse=True)
    assert not handlers
    for options in ({}, {"return_lse": True}):
        gpu.launches.clear()
        na.attention(q, k, v, **options)
        assert len(gpu.launches) == 1
    assert len(repeated) == 2


def test_what_a_planned_call_in_a_graph_uses_is_kept(gpu, repeated, monkeypatch):
    """A call that is planned each time copied the record of its sequences to the GPU before the capture."""
    monkeypatch.setattr(sys.modules["torch"].cuda, "current_stream", lambda device: type("S", (), {"cuda_stream": 7}))
    monkeypatch.setattr(replay, "_captured", [])
    monkeypatch.setattr(constants, "_slabs", constants.WeakKeyDictionary())
    constants._kept.cache_clear()
    q, k, v = map(Tensor, arrays())
    out = Tensor(np.zeros_like(q.array))
    na.attention(q, k, v, out=out)
    gpu.capturing.add(7)
    na.attention(q, k, v, out=out)
    assert not repeated
    kernel, _, _, integers, *_ = gpu.launches[-1]
    constants._kept.cache_clear()
    constants._slabs.clear()
    assert all(gpu.memory_at(address) for address in {integers[place] for place in kernel.addresses} - {0})


def test_records_of_many_sequences_are_kept(gpu, repeated):
    for n, copies in ((1092, 0), (1093, 1)):
        q = Tensor(np.ones((n, 1, 1, 16), np.float32))
        na.attention(q, q, q)
        before = len(gpu.copies)
        na.attention(q, q, q)
        assert len(gpu.copies) - before == copies
    assert len(repeated) == 1


def test_what_a_graph_uses_is_kept(gpu, repeated, monkeypatch):
    monkeypatch.setattr(sys.modules["torch"].cuda, "current_stream", lambda device: type("S", (), {"cuda_stream": 7}))
    monkeypatch.setattr(replay, "_captured", [])
    q, k, v = map(Tensor, arrays(L=1, S=600))
    na.attention(q, k, v)
    na.attention(q, k, v)
    assert not replay._captured
    gpu.capturing.add(7)
    before = len(gpu.copies)
    na.attention(q, k, v)
    assert len(gpu.copies) == before, "nothing that a graph cannot repeat"
    ((kept, held),) = replay._captured
    assert kept is repeated[-1]
    assert len(held) > 1, "the result and partial sums"
    (workspaces,) = replay._workspaces._values.values()
    assert len(workspaces) == 1
    assert not any(x is workspaces[0].memory for x in held), "later calls run beside the graph"
    replay._recorded.clear()
    constants._kept.cache_clear()
    addresses = {integers[place] for kernel, _, _, integers, *_ in gpu.launches[-2:] for place in kernel.addresses}
    assert all(gpu.memory_at(address) for address in addresses - {0})


def test_memory_that_is_kept(gpu, repeated, monkeypatch):
    """Flags of rows that are not finite stay in it from one call to the next, and may not make a later one wrong."""
    monkeypatch.setattr(replay, "_TURNS", 3)
    cleared = []
    clear = gpu.clear
    monkeypatch.setattr(
        gpu, "clear", lambda address, size, stream: (cleared.append(size), clear(address, size, stream))
    )
    for turn in range(9):
        q, k, v = arrays(turn)
        if turn in (1, 4):
            k[0, 1, 30] = v[0, 0, 9] = np.nan
        got = na.attention(*map(Tensor, (q, k, v)), is_causal=True)
        close([got], [na.attention(q, k, v, is_causal=True, backend="reference")])
    assert len(repeated) == 8
    assert len(cleared) == 4, "in the first call, in the first that repeats it, and after so many turns"


def test_memory_is_kept_by_one_thread_at_a_time(gpu, repeated):
    given = arrays()
    q, k, v = map(Tensor, given)
    for _ in range(2):
        na.attention(q, k, v, is_causal=True)
    (own,) = repeated[0]._free
    repeated[0]._free.clear()  # another thread uses it
    close([na.attention(q, k, v, is_causal=True)], [na.attention(*given, is_causal=True, backend="reference")])
    (other,) = repeated[0]._free
    assert other.workspace.start != own.workspace.start
    assert other.numbers is not own.numbers


@pytest.mark.parametrize("kind", ["kept", "shared"])
def test_threads_whose_calls_overlap_leave_memory_once(gpu, repeated, monkeypatch, kind):
    given, options = (arrays(), {"is_causal": True}) if kind == "kept" else (arrays(L=1, S=600), {})
    want = na.attention(*given, **options, backend="reference")
    q, k, v = map(Tensor, given)
    for _ in range(2):
        na.attention(q, k, v, **options)
    repeat, depth = gpu.repeat, [0]

    def overlapping(*arguments):
        if depth[0] < 3:
            depth[0] += 1
            close([na.attention(q, k, v, **options)], [want])
        repeat(*arguments)

    monkeypatch.setattr(gpu, "repeat", overlapping)
    close([na.attention(q, k, v, **options)], [want])
    own = repeated[0]._free
    assert len(own) == 4
    if kind == "kept":
        assert sum(x.workspace is not None for x in own) == 1
    else:
        assert [len(free) for free in replay._workspaces._values.values()] == [1]
    monkeypatch.setattr(gpu, "repeat", repeat)
    for _ in range(3):
        close([na.attention(q, k, v, **options)], [want])


def test_memory_that_calls_share(gpu, repeated, monkeypatch):
    """Calls on a stream use it one after the other, or take another; a large call allocates its own."""

    def call(L, S):
        given = arrays(L=L, S=S)
        close([na.attention(*map(Tensor, given))], [na.attention(*given, backend="reference")])

    for L, S in ((1, 600), (1, 600), (2, 900), (2, 900), (1, 600)):
        call(L, S)
    assert len(repeated) == 3
    (free,) = replay._workspaces._values.values()
    (shared,) = free
    assert shared.size == repeated[1]._scratch > repeated[0]._scratch
    monkeypatch.setattr(replay, "WORKSPACE", shared.size - 1)
    free.clear()
    call(2, 900)
    assert not free
    call(1, 600)
    assert free[0].start != shared.start


def test_the_default_stream_of_each_thread_is_its_own(gpu, repeated, monkeypatch):
    """It has the same handle in all of them: what one has copied another would not wait for."""
    monkeypatch.setattr(sys.modules["torch"].cuda, "current_stream", lambda device: type("S", (), {"cuda_stream": 2}))
    given = arrays()
    q, k, v = map(Tensor, given)

    def call():
        close([na.attention(q, k, v)], [na.attention(*given, backend="reference")])

    counts = []
    for _ in range(2):
        before = len(gpu.copies)
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        counts.append(len(gpu.copies) - before)
    assert not repeated
    assert counts[0] == counts[1] > 0
    call()
    call()
    assert len(repeated) == 1


def test_what_kernels_are_chosen_by_counts(gpu, repeated, monkeypatch):
    q, k, v = map(Tensor, arrays())
    na.attention(q, k, v)
    monkeypatch.setenv(tile_shapes.TF32X3, "1")
    na.attention(q, k, v)
    assert not repeated
    assert {c.product for c in gpu.configs.values()} == {"simt", "tf32"}
    chosen = tile_shapes.base("forward", "float32", 16, 16, gpu.device(0)).with_(columns=16)
    tile_shapes.use("forward", "float32", 16, 16, chosen)
    try:
        na.attention(q, k, v)
        assert not repeated
        assert any(c.columns == 16 for c in gpu.configs.values())
    finally:
        tile_shapes.use("forward", "float32", 16, 16, None)


def test_scratch_is_taken_and_freed(gpu, repeated):
    """Keys shared out to blocks: partial sums, on the stream, of every call."""
    q, k, v = map(Tensor, arrays(L=1, S=600))
    for _ in range(2):
        before = len(gpu.frees)
        close([na.attention(q, k, v)], [na.attention(q.array, k.array, v.array, backend="reference")])
        assert len(gpu.frees) > before
    assert len(repeated) == 1
    assert any(c.task == "combine" for c in gpu.configs.values())


def test_only_so_many_are_remembered(gpu, monkeypatch):
    monkeypatch.setattr(replay, "_recorded", replay.BoundedCache(count=2))
    q, k, v = map(Tensor, arrays(L=3, S=3))
    for scale in (0.1, 0.2, 0.3, 0.4):
        na.attention(q, k, v, scale=scale)
        assert len(replay._recorded) <= 2


@pytest.mark.parametrize("storage", [None, "int8"])
@pytest.mark.parametrize("page_size", [None, 16])
def test_steps_of_decoding(give, gpu, repeated, page_size, storage):
    """The layers of a model make the same step on caches of their own; the next step has other lengths."""
    rng = np.random.default_rng(0)
    table, count = np.array([[3, 1, 0], [5, 2, 4]]), []
    for lengths in ([40, 33], [41, 34]):
        for _ in range(2):
            q, k, v = (
                rng.standard_normal((2, heads, n, 16), dtype=np.float32) for heads, n in ((4, 1), (2, 48), (2, 48))
            )
            scales = {}
            if storage is not None:
                full = na.KVCache(2, 2, 48, 16, storage=storage)
                full.append(k, v)
                k, v, scales = full.key, full.value, {"key_scale": full.key_scale, "value_scale": full.value_scale}
            if page_size is None:
                make = partial(na.KVCache.from_arrays, lengths=lengths)
            else:
                k, v = (pages(x) for x in (k, v))
                scales = {name: pages(x) for name, x in scales.items()}
                make = partial(na.PagedKVCache.from_arrays, block_table=table, lengths=lengths)
            cache, host = (make(f(k), f(v), **{name: f(x) for name, x in scales.items()}) for f in (give, np.asarray))
            close([na.attention_decode(give(q), cache)], [na.attention_decode(q, host, backend="reference")])
            count.append(len(repeated))
    assert count == [0, 1, 1, 2]
    assert all(c.kv_storage == (storage or "") for c in gpu.configs.values() if c.task == "forward")
    if page_size is not None and storage is None:
        table[0, 0], table[1, 1] = 2, 3
        cache, host = (na.PagedKVCache.from_arrays(f(k), f(v), table, lengths) for f in (give, np.asarray))
        close([na.attention_decode(give(q), cache)], [na.attention_decode(q, host, backend="reference")])
        assert len(repeated) == 2


def some_parts(n, seed, shape=(2, 3, 5, 8)):
    rng = np.random.default_rng(seed)
    outs = [rng.standard_normal(shape, dtype=np.float32) for _ in range(n)]
    return outs, [rng.standard_normal(shape[:-1], dtype=np.float32) for _ in range(n)]


@pytest.mark.parametrize("stacked", [False, True])
def test_merging(give, gpu, repeated, stacked):
    """Two parts, or stacked ones: other calls of their kind have other arrays, at other distances."""
    kept = []
    for seed in range(3):
        outs, lses = some_parts(5 if stacked else 2, seed)
        kept.append(give(np.zeros(1000 * seed + 1, np.float32)))
        there = [give(np.stack(x)) if stacked else [give(y) for y in x] for x in (outs, lses)]
        got, want = na.merge_attention(*there), na.merge_attention(outs, lses)
        close(got, want)
        close(na.merge_attention(*there, packed=False), want)
        grads = na.merge_attention_backward(*map(give, want), *there)
        right = na.merge_attention_backward(*want, outs, lses)
        close([*grads[0], *grads[1]], [*right[0], *right[1]])
        assert type(grads[0]) is type(grads[1]) is list
    assert len(repeated) == (4 if stacked else 6), "gradients of a stack are separate arrays, its parts within it"
    assert len(gpu.copies) == (3 if stacked else 0)


def test_merging_separate_parts(gpu, repeated):
    """Arrays that happen to lie at equal distances do not in the next call, whose table has other addresses."""
    room = Tensor(np.zeros((9, 2, 3, 5, 8), np.float32))
    for places in ((0, 1, 2), (0, 2, 7), (8, 1, 3), (4, 4, 4)):
        outs, lses = some_parts(3, places[1])
        for n, x in zip(places, outs, strict=True):
            room.array[n] = x
        outs = [room.array[n].copy() for n in places]
        there = [[Tensor.of(room.header[n]) for n in places], list(map(Tensor, lses))]
        want = na.merge_attention(outs, lses)
        close(na.merge_attention(*there), want)
        grads = na.merge_attention_backward(*map(Tensor, want), *there)
        right = na.merge_attention_backward(*want, outs, lses)
        close([*grads[0], *grads[1]], [*right[0], *right[1]])
    assert len(repeated) == 4, "one array three times is another kind of call"
    assert all(any(x.tables) for x in repeated)


def test_merging_arrays_that_begin_in_one_another(gpu, repeated):
    """Each of the outs begins where an lse does: in the next call only the first does."""
    for seed in range(2):
        lses = Tensor(np.random.default_rng(seed).standard_normal((3, 4, 5)).astype(np.float32))
        views = [Tensor.of(lses.header[n][..., None]) for n in range(3)]
        want = na.merge_attention([x.array for x in views], lses.array)
        close(na.merge_attention(views, lses), want)
        views[1:] = [Tensor.of(Tensor(x.array[..., 0] + 3).header[..., None]) for x in views[1:]]
        close(na.merge_attention(views, lses), na.merge_attention([x.array for x in views], lses.array))


def test_parts_of_a_packed_array_are_repeated(gpu, repeated):
    """Query, key and value of one array, between whose elements the others lie."""
    for seed in range(2):
        room = Tensor(np.random.default_rng(seed).standard_normal((2, 20, 3, 2, 16)).astype(np.float32))
        q, k, v = (Tensor.of(room.header[:, :, n].swapaxes(1, 2)) for n in range(3))
        close([na.attention(q, k, v)], [na.attention(q.array, k.array, v.array, backend="reference")])
    assert len(repeated) == 1


def test_merging_separate_parts_on_another_gpu(gpu, repeated):
    """Their table is copied there."""
    for seed in range(3):
        outs, lses = some_parts(3, seed)
        got = na.merge_attention([Tensor(x, 1) for x in outs], [Tensor(x, 1) for x in lses])
        close(got, na.merge_attention(outs, lses))
        assert gpu.launches[-1][1] == 1
    assert len(repeated) == 2
    assert gpu.ordinal == 0


def test_merging_separate_parts_is_not_captured(gpu, repeated, monkeypatch):
    """What is copied from the host in a graph would be what is there when the graph runs."""
    monkeypatch.setattr(
        sys.modules["torch"].cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=7)
    )
    there = [list(map(Tensor, x)) for x in some_parts(3, 0)]
    gpu.capturing.add(7)
    for _ in range(2):
        with pytest.raises(na.BackendUnavailableError, match="more than two separate arrays cannot be captured"):
            na.merge_attention(*there)
        gpu.capturing.discard(7)
        na.merge_attention(*there)
        gpu.capturing.add(7)
    na.merge_attention(*(x[:2] for x in there))


def test_merging_one_array_twice(gpu, repeated):
    (a, b), (x, y) = some_parts(2, 0)
    a, b, x, y = map(Tensor, (a, b, x, y))
    for outs, lses in (([a, a], [x, y]), ([a, b], [x, y]), ([b, b], [y, x]), ([b, a], [x, x])):
        want = na.merge_attention([z.array for z in outs], [z.array for z in lses])
        close(na.merge_attention(outs, lses), want)
    assert len(repeated) == 1


@pytest.mark.parametrize("storage", [None, "int8", "float16"])
def test_appending(give, gpu, repeated, storage):
    """Steps of several layers, each at a place of its own; what is refused the first time is refused again."""
    rng = np.random.default_rng(0)
    hosts = [na.KVCache(2, 2, 9, 24, 16, storage=storage) for _ in range(2)]
    for host in hosts:
        for x in host._stored[:4]:
            if x is not None:
                x[...] = 0
    there = []
    for host in hosts:
        *stored, key_scale, value_scale = (None if x is None else give(x) for x in host._stored[:4])
        scales = {} if key_scale is None else {"key_scale": key_scale, "value_scale": value_scale}
        there.append(na.KVCache.from_arrays(*stored, 0, dtype=np.float32, **scales))
    count = []
    for T in (3, 1, 1, 1, 3):
        for host, cache in zip(hosts, there, strict=True):
            key, value = (rng.standard_normal((2, 2, T, features), dtype=np.float32) for features in (24, 16))
            host.append(key, value)
            cache.append(give(key), give(value))
        count.append(len(repeated))
    assert all(kind == "read" for kind, *_ in gpu.copies)
    # A scale has four bytes: its place in a word of sixteen is another at each step, until it comes again.
    assert count == ([1, 2, 3, 4, 5] if storage == "int8" else [1, 2, 4, 6, 8])
    for host, cache in zip(hosts, there, strict=True):
        assert cache.lengths.tolist() == host.lengths.tolist() == [9, 9]
        for x, y in zip(host._stored[:4], cache._stored.originals, strict=True):
            if x is not None:
                np.testing.assert_array_equal(x, y.array)
    with pytest.raises(na.CacheFullError, match="3 more tokens"):
        there[0].append(give(key), give(value))
    with pytest.raises(ValueError, match="key must have 4 axes"):
        there[0].append(give(key[0, 0]), give(value))
    assert len(repeated) == count[-1]


def test_appending_to_what_differs_is_planned(gpu, repeated):
    """Other lengths, a ring, a cache that cannot be written to: they have looks that another cache has too."""
    rng = np.random.default_rng(1)
    key, value = (Tensor(rng.standard_normal((2, 2, 1, 8), dtype=np.float32)) for _ in range(2))

    def made(**more):
        return na.KVCache.from_arrays(*(Tensor(np.zeros((2, 2, 6, 8), np.float32)) for _ in range(2)), **more)

    plain, other, ring = made(lengths=2), made(lengths=[2, 3]), made(lengths=2, window=4)
    plain.append(key, value)
    for cache in (other, ring):
        cache.append(key, value)
    plain.append(key, value, [1, 0])
    assert not repeated
    assert plain.lengths.tolist() == [4, 3]
    assert other.lengths.tolist() == [3, 4]
    read_only = made(lengths=2)
    read_only._read_only = "it is the test's"
    with pytest.raises(ValueError, match="test's"):
        read_only.append(key, value)
    made(lengths=5).append(key, value)
    assert len(repeated) == 1


def test_appending_none_is_refused(gpu):
    stored = [Tensor(np.zeros((2, 2, 16, 8), np.float32)) for _ in range(2)]
    x = Tensor(np.ones((2, 2, 1, 8), np.float32))
    plain = na.KVCache.from_arrays(*stored, lengths=2)
    paged = na.PagedKVCache.from_arrays(*stored, [[0], [1]], [2, 2])
    for append in (plain.append, partial(paged.append, [0, 1])):
        for given in ((None, x), (None, None), (x, None)):
            with pytest.raises(TypeError, match="must be a numpy"):
                append(*given)
