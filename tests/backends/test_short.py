"""Short sequences: narrow tiles have the bits of wide ones, so that the width may depend on the batch."""

import numpy as np
import pytest

import numba_attention as na
from numba_attention.backends import cpu, cpu_backward, recall

pytestmark = pytest.mark.skipif(not cpu.NARROWS, reason="this CPU has one width of tiles")
DTYPES = ["float32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("float16", "float64"))]
RNG = np.random.default_rng(0)
SHAPES = [  # B, H, Hkv, L, S, E, Ev
    (2, 4, 4, 16, 16, 64, 64),
    (1, 8, 8, 80, 80, 64, 64),
    (2, 2, 1, 15, 200, 24, 40),
    (1, 4, 2, 9, 70, 32, 16),
]
OPTIONS = [
    {},
    {"is_causal": True, "sinks": "H"},
    {"mask": "LS"},
    {"bias": "HLS", "softcap": 5.0},
    {"alibi_slopes": "H", "is_causal": "bottom-right"},
    {"dropout_p": 0.3, "seed": 5},
    {"query_lengths": 7, "key_lengths": 9},
    {"scale": 1e-8, "prefix_lengths": 5, "is_causal": True},
]


@pytest.fixture(autouse=True)
def the_usual_way(monkeypatch):
    for memory in (recall._forward, recall._backward):
        monkeypatch.setattr(memory, "table", recall.NOTHING)
        monkeypatch.setattr(memory, "learn", lambda *_: None)


def make(shape, dtype, options):
    B, H, Hkv, L, S, E, Ev = shape
    q, k, v = (RNG.standard_normal(s).astype(dtype) for s in ((B, H, L, E), (B, Hkv, S, E), (B, Hkv, S, Ev)))
    arrays = {
        "LS": RNG.random((L, S)) < 0.7,
        "HLS": RNG.standard_normal((H, L, S)).astype("float32"),
        "H": RNG.random(H).astype("float32"),
    }
    return q, k, v, {name: arrays.get(value, value) if type(value) is str else value for name, value in options.items()}


def width(monkeypatch, vectors):
    """Let tiles have so many vectors, and tile all queries."""
    monkeypatch.setattr(cpu, "FEW", 0)
    monkeypatch.setattr(cpu, "vectors_for", lambda rows, lanes: vectors)
    monkeypatch.setattr(cpu_backward, "_vectors_for", lambda p: vectors)
    cpu._plans.clear()
    cpu_backward._plans.clear()


def bits(arrays):
    return [x.tobytes() for x in arrays if x is not None]


@pytest.fixture(autouse=True)
def no_plans_are_left():
    yield
    cpu._plans.clear()
    cpu_backward._plans.clear()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths_have_the_same_bits(dtype, shape, options, monkeypatch):
    q, k, v, options = make(shape, dtype, options)
    results = []
    for vectors in (0, 1, 2):
        width(monkeypatch, vectors)
        results.append(bits(na.attention(q, k, v, return_lse=True, **options)))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("options", [*OPTIONS, {"window": (3, 2)}], ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] // s[2] * s[3] <= 32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_one_tile_have_the_same_bits(dtype, shape, options, monkeypatch):
    q, k, v, options = make(shape, dtype, options)
    out, lse = na.attention(q, k, v, return_lse=True, **options)
    grad = RNG.standard_normal(out.shape).astype(dtype)
    results = []
    for vectors in (0, 1, 2):
        if not vectors or shape[1] // shape[2] * shape[3] <= (8 if dtype == "float64" else 16) * vectors:
            width(monkeypatch, vectors)
            results.append(bits(na.attention_backward(grad, q, k, v, out, lse, **options)))
    assert len(results) > 1 or dtype == "float64"
    assert all(result == results[0] for result in results)


def test_choice():
    """Fewest lanes, unless the usual width is nearly as good; queries past the narrow widths take turns."""
    assert [cpu.vectors_for(rows, 16) for rows in (9, 16, 17, 32, 33, 48, 64, 80, 96, 128, 300, 10**6)] == [
        1, 1, 2, 2, 1, 1, 0, 1, 2, 0, 0, 0,
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (4, 4)}, {"window": (None, 0)}], ids=str)
def test_each_as_alone(options):
    """In a padded batch and in a packed one, whatever the other lengths are."""
    rows, keys = [5, 9, 16, 20, 33, 70, 12, 30], [5, 9, 600, 20, 33, 70, 500, 513]
    q, k, v = (RNG.standard_normal((2, n, 32), dtype=np.float32) for n in (sum(rows), sum(keys), sum(keys)))
    starts, key_starts = np.cumsum([0, *rows]), np.cumsum([0, *keys])
    alone = [
        na.attention(q[:, a:b], k[:, c:d], v[:, c:d], **options)
        for a, b, c, d in zip(starts, starts[1:], key_starts, key_starts[1:], strict=False)
    ]
    packed = na.attention_varlen(*(x.swapaxes(0, 1) for x in (q, k, v)), starts, key_starts, **options)
    assert packed.swapaxes(0, 1).tobytes() == np.concatenate(alone, axis=1).tobytes()
    B, L, S = len(rows), max(rows), max(keys)
    padded = [np.zeros((B, 2, n, 32), np.float32) for n in (L, S, S)]
    for n in range(B):
        padded[0][n, :, : rows[n]] = q[:, starts[n] : starts[n + 1]]
        for target, source in zip(padded[1:], (k, v), strict=True):
            target[n, :, : keys[n]] = source[:, key_starts[n] : key_starts[n + 1]]
    out = na.attention(*padded, query_lengths=rows, key_lengths=keys, **options)
    for n, result in enumerate(alone):
        assert out[n, :, : rows[n]].tobytes() == result.tobytes(), (rows[n], keys[n])
