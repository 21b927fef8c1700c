"""Short sequences: narrow tiles have the bits of wide ones, so that the width may depend on the batch."""

import numpy as np
import pytest

import numba_attention as na
from numba_attention.backends import cpu, cpu_backward, cpu_resources, recall
from numba_attention.cpu.simd import HOST, Host

VECTORS = (0, *cpu_resources.NARROWS)
DTYPES = ["float32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("float16", "float64"))]
RNG = np.random.default_rng(0)
SHAPES = [  # B, H, Hkv, L, S, E, Ev
    (2, 4, 4, 16, 16, 64, 64),
    (1, 8, 8, 80, 80, 64, 64),
    (2, 2, 1, 15, 200, 24, 40),
    (1, 4, 2, 9, 70, 32, 16),
    (2, 2, 2, 7, 33, 24, 16),
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
    for vectors in VECTORS:
        width(monkeypatch, vectors)
        results.append(bits(na.attention(q, k, v, return_lse=True, **options)))
    assert results == [results[0]] * len(VECTORS)


@pytest.mark.parametrize("options", [*OPTIONS, {"window": (3, 2)}], ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] // s[2] * s[3] <= 32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_one_tile_have_the_same_bits(dtype, shape, options, monkeypatch):
    q, k, v, options = make(shape, dtype, options)
    out, lse = na.attention(q, k, v, return_lse=True, **options)
    grad = RNG.standard_normal(out.shape).astype(dtype)
    rows, lanes = shape[1] // shape[2] * shape[3], HOST.bits // (64 if dtype == "float64" else 32)
    results = []
    fitting = [n for n, (vectors, _) in cpu._TILES.items() if rows <= vectors * lanes]
    if len(fitting) < 2:
        pytest.skip("more than one tile, whose number changes the order of sums")
    for vectors in fitting:
        width(monkeypatch, vectors)
        results.append(bits(na.attention_backward(grad, q, k, v, out, lse, **options)))
    assert results == [results[0]] * len(results)


@pytest.mark.parametrize(
    ("host", "chosen"),
    [
        (Host("AVX-512", 512, 32, True, True, False), "1 1 1 2 2 2 1 1 0 1 2 0 0 0"),
        (Host("AVX2", 256, 16, True, True, False), "1 2 2 0 0 2 0 0 0 2 0 0 0 0"),
        (Host("NEON", 128, 32, True, True, False), "2 0 0 2 2 0 2 0 0 0 0 0 0 0"),
        (Host("SSE", 128, 16, False, False, False), "0 0 0 0 0 0 0 0 0 0 0 0 0 0"),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_choice(host, chosen, monkeypatch):
    """Fewest lanes, unless the usual width is nearly as good; queries past the narrow widths take turns."""
    monkeypatch.setattr(cpu, "_TILES", cpu.tiles_of(host))
    rows = np.array([8, 9, 16, 17, 24, 32, 33, 48, 64, 80, 96, 128, 300, 10**6])
    assert [cpu.vectors_for_all(n, host.bits // 32) for n in rows[:, None]] == [int(n) for n in chosen.split()]


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
