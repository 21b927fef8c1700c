"""Every mod of the library against its formula on plain arrays, and against the option that does the same."""

import math

import numpy as np
import pytest

import numba_attention as na
from cases import assert_close
from numba_attention import mods

H, L = 4, 144  # 12 x 12 pixels
RNG = np.random.default_rng(0)
I, J = np.arange(L)[:, None], np.arange(L)
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
TABLE = RNG.standard_normal((H, 33)).astype(np.float32)
BUCKETS = RNG.standard_normal((H, 32)).astype(np.float32)
NUMBERS = np.sort(RNG.integers(0, 5, L)).astype(np.int32)
PREFIX = np.array([10, 70])
PARENTS = np.array([0, 0, 0, 1, 1, 2, 3, 3, 6, 5])


def t5_bucket(relative_position, bidirectional, num_buckets, max_distance):
    """As `T5Attention._relative_position_bucket` of Hugging Face's transformers, in NumPy."""
    buckets = 0
    if bidirectional:
        num_buckets //= 2
        buckets = (relative_position > 0) * num_buckets
        relative_position = np.abs(relative_position)
    else:
        relative_position = -np.minimum(relative_position, 0)
    exact = num_buckets // 2
    with np.errstate(divide="ignore"):
        scaled = np.log(relative_position / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    large = np.minimum(exact + np.where(relative_position < exact, 0, scaled).astype(int), num_buckets - 1)
    return buckets + np.where(relative_position < exact, relative_position, large)


def pixels(x, width=12):
    return x // width, x % width


def swin_groups(shift, size=4):
    """Swin's window partition of shifted pixels, and the regions of its mask (`SwinTransformerBlock`)."""
    regions = np.zeros((12, 12))
    if shift:
        slices = slice(0, -size), slice(-size, -shift), slice(-shift, None)
        for n, rows in enumerate(slices):
            for m, columns in enumerate(slices):
                regions[rows, columns] = 3 * n + m
    numbers = np.arange(144).reshape(12, 12)
    shifted = np.roll(numbers, (-shift, -shift), (0, 1))
    group = np.empty(144, int)
    for y in range(12):
        for x in range(12):
            group[shifted[y, x]] = (y // size * 3 + x // size) * 9 + regions[y, x]
    return group


def nearest(x, n, size):
    """The first of `size` neighbours of each x in 0 .. n - 1."""
    return np.clip(x - size // 2, 0, n - size)


def ancestors(parents, first):
    seen = np.zeros((L, L), bool)
    seen[:, :first] = True
    for guess in range(len(parents)):
        node = guess
        for _ in range(len(parents)):
            seen[first + guess, first + node] = True
            node = parents[node]
    return seen


def in_square():
    (y, x), (v, u) = pixels(I), pixels(J)
    top, left = nearest(y, 12, 5), nearest(x, 12, 5)
    return (v >= top) & (v < top + 5) & (u >= left) & (u < left + 5)


MASKS = {
    "causal": ((), J <= I),
    "documents": ((NUMBERS,), NUMBERS[:, None] == NUMBERS),
    "prefix_lm": ((PREFIX,), (J <= I) | (PREFIX[:, None, None, None] > J)),
    "sliding_window": ((20, 3), (I - J <= 20) & (J - I <= 3)),
    "dilated_window": ((40, 8, 4), (I - J <= 40) & (J - I <= 8) & ((I - J) % 4 == 0)),
    "neighborhood": ((12, 12, 5), in_square()),
    "shifted_windows": ((12, 4, 0), swin_groups(0)[:, None] == swin_groups(0)),
    "shifted_windows, shifted": ((12, 4, 2), swin_groups(2)[:, None] == swin_groups(2)),
}
BIASES = {
    "alibi": ((SLOPES,), -SLOPES[:, None, None] * abs(I - J)),
    "relative_positions": ((TABLE,), TABLE[:, np.clip(I - J + 16, 0, 32)]),
    "t5_bias": ((BUCKETS,), BUCKETS[:, t5_bucket(J - I, True, 32, 128)]),
    "t5_bias, far": ((BUCKETS, 20), BUCKETS[:, t5_bucket(J - I, True, 32, 20)]),
    "t5_bias_causal": ((BUCKETS,), BUCKETS[:, t5_bucket(J - I, False, 32, 128)]),
}


def draw(dtype=np.float32, heads=H):
    rng = np.random.default_rng(1)
    return [rng.standard_normal((2, n, L, 8)).astype(dtype) for n in (H, heads, heads)]


def mod_of(name):
    return getattr(mods, name.split(",")[0])


def forward_and_backward(arrays, options, **more):
    out, lse = na.attention(*arrays, **options, return_lse=True)
    grad_out = np.random.default_rng(2).standard_normal(out.shape).astype(out.dtype)
    return out, na.attention_backward(grad_out, *arrays, out, lse, **options, **more)


@pytest.mark.parametrize("heads", [H, 2], ids=["heads", "groups"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, dtype, heads):
    mod_args, mask = MASKS[name]
    arrays = draw(dtype, heads)
    got = forward_and_backward(arrays, {"mask_mod": mod_of(name), "mod_args": mod_args})
    want = forward_and_backward(arrays, {"mask": mask})
    np.testing.assert_array_equal(got[0], want[0])
    for a, b in zip(got[1][:3], want[1][:3], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("heads", [H, 2], ids=["heads", "groups"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", BIASES)
def test_biases(name, dtype, heads):
    mod_args, bias = BIASES[name]
    arrays = draw(dtype, heads)
    got = forward_and_backward(arrays, {"score_mod": mod_of(name), "mod_args": mod_args}, mod_grads=[0])
    want = forward_and_backward(arrays, {"bias": bias.astype(dtype)})
    relative = 4e-6 if dtype == np.float32 else 1e-13
    for a, b in zip((got[0], *got[1][:3]), (want[0], *want[1][:3]), strict=True):
        assert_close(a, b, relative)
    # The gradient of a table is that of the bias, summed over the places that read each element.
    table = mod_args[0]
    if table.ndim == 2:
        number = np.arange(table.size, dtype=np.float64).reshape(table.shape)
        place = BIASES_OF_PLACES[name](number).astype(int)
        total = np.bincount(place.ravel(), np.broadcast_to(want[1].bias, place.shape).ravel(), table.size)
        assert_close(got[1].mod_args[0], total.reshape(table.shape), 2e-5 if dtype == np.float32 else 2e-7)


BIASES_OF_PLACES = {
    "relative_positions": lambda table: table[:, np.clip(I - J + 16, 0, 32)],
    "t5_bias": lambda table: table[:, t5_bucket(J - I, True, 32, 128)],
    "t5_bias, far": lambda table: table[:, t5_bucket(J - I, True, 32, 20)],
    "t5_bias_causal": lambda table: table[:, t5_bucket(J - I, False, 32, 128)],
}


@pytest.mark.parametrize(
    ("score_mod", "mask_mod", "mod_args", "option"),
    [
        (mods.alibi, None, (SLOPES,), {"alibi_slopes": SLOPES}),
        (mods.softcap, None, (2.5,), {"softcap": 2.5}),
        (None, mods.causal, (), {"is_causal": True}),
        (None, mods.sliding_window, (20, 3), {"window": (20, 3)}),
        (None, mods.prefix_lm, (PREFIX,), {"is_causal": True, "prefix_lengths": PREFIX}),
    ],
    ids=["alibi", "softcap", "causal", "window", "prefix"],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_option_that_does_the_same(score_mod, mask_mod, mod_args, option, dtype):
    arrays = draw(dtype)
    got = forward_and_backward(arrays, {"score_mod": score_mod, "mask_mod": mask_mod, "mod_args": mod_args})
    want = forward_and_backward(arrays, option)
    for a, b in zip((got[0], *got[1][:3]), (want[0], *want[1][:3]), strict=True):
        assert_close(a, b, 4e-6 if dtype == np.float32 else 1e-13)


def test_tree_in_decoding():
    query, key, value = draw()
    first, guesses = L - len(PARENTS), len(PARENTS)
    cache = na.KVCache(2, H, L, 8)
    cache.append(key, value)
    mod_args = (PARENTS, first, guesses)
    got = na.attention_decode(query[:, :, first:], cache, mask_mod=mods.tree, mod_args=mod_args, is_causal=False,
                              query_offset=first)  # fmt: skip
    mask = ancestors(PARENTS, first)[first:]
    np.testing.assert_allclose(got, na.attention(query[:, :, first:], key, value, mask=mask), rtol=1e-5, atol=1e-6)


def test_every_mod_is_tested_and_has_its_source():
    tested = {name.split(",")[0] for name in (*MASKS, *BIASES)} | {"softcap", "tree"}
    assert tested == set(mods.__all__)
    for name in mods.__all__:
        text = getattr(mods, name).__doc__
        assert "Parameters" in text or name == "causal"
        assert "References" in text or name == "causal"
