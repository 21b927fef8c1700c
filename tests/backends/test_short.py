"""Short sequences: narrow tiles have the bits of wide ones, so that the width may depend on the batch."""

import ml_dtypes  # noqa: F401 - the name bfloat16
import numpy as np
import pytest

import numba_attention as na
from grid import share
from numba_attention.backends import cpu, cpu_backward, cpu_widths, recall
from numba_attention.cpu.simd import HOST, Host
from numba_attention.cpu.softmax import LEVEL
from numba_attention.cpu.spec import usual_vectors

VECTORS = (0, *cpu_widths.NARROWS)
DTYPES = share(["float32", "float16", "float64", "bfloat16"], 4)
RNG = np.random.default_rng(0)
SHAPES = [  # B, H, Hkv, L, S, E, Ev
    (2, 4, 4, 16, 16, 64, 64),
    (1, 8, 8, 80, 80, 64, 64),
    (2, 2, 1, 15, 200, 24, 40),
    (1, 4, 2, 9, 70, 32, 16),
    (2, 2, 2, 7, 33, 24, 16),
    (1, 2, 2, 48, 48, 64, 64),
    (1, 4, 1, 11, 90, 40, 24),
    (1, 6, 2, 25, 65, 20, 72),
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
    monkeypatch.setattr(cpu, "_vectors_for", lambda *_: vectors)
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


def test_tiles_that_a_mask_hides_count_for_the_second_level(monkeypatch):
    """Sums move to the second level after as many tiles of keys, hidden from all rows of a tile or not."""
    q, k, v, _ = make((1, 1, 1, 48, (LEVEL + 40) * 64, 32, 32), "float32", {})
    mask = np.ones((q.shape[-2], k.shape[-2]), bool)
    lanes = HOST.bits // 32
    mask[:lanes, 64 * 5 : 64 * 9] = False
    mask[lanes : 2 * lanes, : 64 * (LEVEL + 6)] = False
    scores = np.where(mask, q[0, 0].astype("f8") @ k[0, 0].astype("f8").T / 32**0.5, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    right = weights / weights.sum(axis=1, keepdims=True) @ v[0, 0]
    results = []
    for vectors in VECTORS:
        width(monkeypatch, vectors)
        out = na.attention(q, k, v, mask=mask)
        results.append(bits([out]))
        np.testing.assert_allclose(out[0, 0], right, rtol=0, atol=1e-6)
    assert results == [results[0]] * len(VECTORS)


@pytest.mark.parametrize("options", [*OPTIONS, {"window": (3, 2)}], ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] // s[2] * s[3] <= 48], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_one_tile_have_the_same_bits(dtype, shape, options, monkeypatch):
    q, k, v, options = make(shape, dtype, options)
    out, lse = na.attention(q, k, v, return_lse=True, **options)
    grad = RNG.standard_normal(out.shape).astype(dtype)
    rows, lanes = shape[1] // shape[2] * shape[3], HOST.bits // (64 if dtype == "float64" else 32)
    results = []
    usual = usual_vectors(HOST)
    fitting = [n for n in VECTORS if n < usual and rows <= (n or usual) * lanes]
    if len(fitting) < 2:
        pytest.skip("more than one tile, whose number changes the order of sums")
    for vectors in fitting:
        width(monkeypatch, vectors)
        results.append(bits(na.attention_backward(grad, q, k, v, out, lse, **options)))
    assert results == [results[0]] * len(results)


ROWS = [8, 9, 16, 17, 24, 32, 33, 48, 64, 80, 96, 112, 128, 160, 240, 256, 300, 512, 10**6]
AVX512 = Host("AVX-512", 512, 32, True, True, False)
AVX2 = Host("AVX2", 256, 16, True, True, False)
NEON = Host("NEON", 128, 32, True, True, False)
SSE = Host("SSE", 128, 16, False, False, False)


@pytest.mark.parametrize(
    ("host", "ahead", "chosen"),
    [
        (AVX512, None, "1 1 1 2 2 2 3 3 0 5 3 0 0 5 5 0 0 0 0"),
        (AVX512, 0, "1 1 1 2 2 2 3 1 2 1 2 1 2 2 3 2 0 0 0"),
        (AVX2, None, "1 2 2 0 0 2 0 0 2 2 0 0 2 0 0 0 0 0 0"),
        (AVX2, 0, "1 2 2 0 0 2 0 0 2 2 0 2 2 2 0 0 0 0 0"),
        (NEON, None, "2 0 0 2 2 0 2 0 0 0 0 0 0 0 0 0 0 0 0"),
        (NEON, 0, "2 0 0 2 2 0 2 0 0 0 0 0 0 0 0 0 0 0 0"),
        (SSE, None, "0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0"),
        (SSE, 0, "0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0"),
    ],
    ids=lambda x: getattr(x, "name", None) or ("all" if x is None else None),
)
def test_choice(host, ahead, chosen, monkeypatch):
    """Fewest lanes and keys, unless the usual width is nearly as good."""
    monkeypatch.setattr(cpu_widths, "COSTS", cpu_widths.costs_of(host))
    rows = np.array(ROWS)
    found = [cpu_widths.vectors_for_all(n, n, host.bits // 32, ahead) for n in rows[:, None]]
    assert found == [int(n) for n in chosen.split()]


def test_choice_for_threads(monkeypatch):
    """A wide tile of one head, which leaves a thread idle, is taken only where the call is too small to matter."""
    monkeypatch.setattr(cpu_widths, "COSTS", cpu_widths.costs_of(AVX512))
    assert cpu_widths.vectors_for(80, 4096, 16, heads=1, threads=1) == 5
    assert cpu_widths.vectors_for(80, 4096, 16, heads=1, threads=2) in (1, 2, 3)
    assert cpu_widths.vectors_for(80, 4096, 16, heads=8, threads=2) == 5


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("ahead", [0, 30, 500])
def test_keys_that_tiles_visit(ahead, group, monkeypatch):
    """What a choice costs is what the tiles of all sequences cost, one after another."""
    monkeypatch.setattr(cpu_widths, "COSTS", costs := cpu_widths.costs_of(AVX512))
    for rows in range(group, 400, group):
        keys = 1 + rows * 7 % 200
        exact = []
        for vectors, of_key, of_row, of_tile in zip(*(x.ravel() for x in costs[1:]), strict=True):
            lanes = int(vectors) * 16
            ends = [min(n + lanes, rows) for n in range(0, rows, lanes)]
            seen = sum(min(keys, max(0, ahead + end / group)) for end in ends)
            exact.append(of_key * seen + (of_row * lanes + of_tile) * len(ends))
        found = cpu_widths.vectors_for_all(np.array([rows]), np.array([keys]), 16, ahead, group)
        assert exact[list(costs.choices).index(found)] <= 1.05 * min(exact), (rows, keys)


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
