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
    for name in ("_forward", "_backward"):
        monkeypatch.setattr(recall, name, recall._Table((), np.empty(0, np.int64), 0))


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
    before = numba.get_num_threads()
    numba.set_num_threads(min(threads, before))
    try:
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
    finally:
        numba.set_num_threads(before)


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
    table = recall._forward
    call[place] = OTHERS[other](call[place])
    got = outcome(lambda: na.attention(*call))
    monkeypatch.setattr(recall, "_forward", recall._Table((), table.rows, 0))
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
    table = recall._forward
    got = outcome(lambda: na.attention(*call, **options))
    monkeypatch.setattr(recall, "_forward", recall._Table((), table.rows, 0))
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
    assert len(recall._forward.recipes) == recall.COUNT
    assert any(recall.forward(*call, {}, False) is not None for call in calls[recall.COUNT :])


def test_many_combinations_of_options(monkeypatch):
    monkeypatch.setattr(recall, "CODES", len(recall._codes) + 5)
    call = arrays()
    for n in range(30):
        scale = 0.01 * (n + 1)
        want = bits(na.attention(*call, scale=scale))
        for _ in range(3):
            assert bits(na.attention(*call, scale=scale)) == want
    assert len(set(recall._codes.values())) == len(recall._codes) == recall.CODES


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
