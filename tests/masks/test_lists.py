"""The lists that kernels read, unfolded again, for the lanes of every width of vector: no kernel is compiled."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from numba_attention import BlockMask
from numba_attention.masks.lists import Geometry, lists_for

# Lanes and width of a vector: AVX-512, AVX2 and 128 bits, in float32 and float64, and the kernels for few queries.
GEOMETRIES = [(64, 16), (32, 8), (24, 8), (12, 4), (8, 4), (4, 2), (16, 16), (8, 8), (4, 4), (2, 2)]


@st.composite
def calls(draw):
    B, Hkv, group = (draw(st.sampled_from([1, 2, 3])) for _ in range(3))
    L, S = draw(st.sampled_from([1, 3, 23, 64, 70, 130])), draw(st.sampled_from([1, 63, 64, 130, 200]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.sampled_from([(1, 1), (B, 1), (1, Hkv * group), (B, Hkv * group)]))
    blocks = rng.random((*shape, L // 64 + 1, S // 64 + 1))
    share = np.repeat(np.repeat(blocks.round(), 64, -1), 64, -2)[..., :L, :S]
    noise = rng.random((*shape, L, S))
    array = noise < (share if draw(st.booleans()) else draw(st.sampled_from([0.001, 0.5, 0.999])))
    return B, Hkv, group, L, S, array, rng


def unfold(lists, place, tile, lanes, width, S):
    """What each lane of a tile sees, from its runs: bool (lanes, S); runs ascend, and do not overlap."""
    seen, list_number, before = np.zeros((lanes, -(-S // 64) * 64), bool), lists.first[place] + tile, 0
    for first, end, word in lists.runs[lists.starts[list_number] : lists.starts[list_number + 1]]:
        assert before <= first < end
        before = end
        bits = np.ones((64, lanes), bool)
        if word:
            vectors = lists.words[word].reshape(64, lanes // width, max(1, width // 8))
            bits = np.unpackbits(vectors, axis=-1, bitorder="little")[..., :width].reshape(64, lanes).astype(bool)
            assert bits.any()
            assert not bits.all()
        seen[:, first * 64 : end * 64] = np.tile(bits, (end - first, 1)).T
    return seen[:, :S]


@given(calls(), st.sampled_from(GEOMETRIES))
def test_heads_of_all_sequences(call, geometry):
    B, Hkv, group, L, S, array, rng = call
    lanes, width = geometry
    wide = np.broadcast_to(array, (B, Hkv * group, L, S))
    lengths = rng.integers(0, L + 1, B)
    lengths[0] = L
    for rows in (np.full(B, L), lengths):
        argument = L if (rows == L).all() else rows
        lists = lists_for(BlockMask.from_array(array), (B,), Hkv * group, Hkv, Geometry(*geometry), argument)
        assert lists.per_sequence == Hkv
        for b, h in np.ndindex(B, Hkv):
            tiles = -(-rows[b] * group // lanes)
            place, visited = b * Hkv + h, []
            for tile in range(tiles):
                seen = unfold(lists, place, tile, lanes, width, S)
                row = np.minimum(tile * lanes + np.arange(lanes), rows[b] * group - 1)  # lanes past the end repeat it
                np.testing.assert_array_equal(seen, wide[b, h * group + row % group, row // group])
                part = slice(*lists.starts[lists.first[place] + tile :][:2])
                visited.append(int((lists.runs[part, 1] - lists.runs[part, 0]).sum()))
            order = lists.order[lists.first[place] :][:tiles]
            np.testing.assert_array_equal(np.sort(order), np.arange(tiles))
            assert (np.diff(np.array(visited, int)[order]) <= 0).all()
            if tiles:
                np.testing.assert_allclose(lists.density[b, h], np.mean(visited) / -(-S // 64))


@given(calls(), st.sampled_from(GEOMETRIES))
def test_chosen_heads_and_rows(call, geometry):
    B, Hkv, group, L, S, array, rng = call
    lanes, width = geometry
    wide = np.broadcast_to(array, (B, Hkv * group, L, S))
    heads, rows = rng.integers(0, Hkv * group, 4), rng.integers(0, L, rng.integers(1, 90))
    lists = lists_for(BlockMask.from_array(array), (B,), Hkv * group, Hkv, Geometry(*geometry), L, (heads, rows))
    for b, n in np.ndindex(B, len(heads)):
        for tile in range(-(-len(rows) // lanes)):
            seen = unfold(lists, b * len(heads) + n, tile, lanes, width, S)
            row = rows[np.minimum(tile * lanes + np.arange(lanes), len(rows) - 1)]
            np.testing.assert_array_equal(seen, wide[b, heads[n], row])


@given(calls(), st.sampled_from(GEOMETRIES[-4:]))
def test_several_key_heads_in_a_tile(call, geometry):
    """As the kernel for few queries has them, where the rows of one head do not fill a vector."""
    B, Hkv, group, L, S, array, rng = call
    lanes, width = geometry
    wide = np.broadcast_to(array, (B, Hkv * group, L, S))
    for rows in (np.full(B, L), rng.integers(0, L + 1, B)):
        argument = L if (rows == L).all() else rows
        mask = BlockMask.from_array(array)
        lists = lists_for(mask, (B,), Hkv * group, Hkv, Geometry(*geometry), argument, None, True)
        for b in np.flatnonzero(rows):
            each = rows[b] * group
            together = 1 if each >= lanes else lanes // each
            for place, tile in np.ndindex(-(-Hkv // together), -(-each // lanes) if each >= lanes else 1):
                seen = unfold(lists, b * lists.per_sequence + place, tile, lanes, width, S)
                heads = min(together, Hkv - place * together)
                lane = np.minimum(tile * lanes + np.arange(lanes), heads * each - 1)
                head, row = np.divmod(lane, each)
                used = lane == tile * lanes + np.arange(lanes)
                expected = wide[b, (place * together + head) * group + row % group, row // group]
                np.testing.assert_array_equal(seen[used], expected[used])


def test_equal_heads_share_their_lists():
    mask = BlockMask.from_array(np.tri(640, dtype=bool))
    lists = lists_for(mask, (4,), 8, 8, Geometry(64, 16), 640)
    assert len(lists.order) == 10
    assert len(lists.words) == 2  # one partial tile, and the place of none
    assert (lists.first == 0).all()
