"""`BlockMask` against arrays of bool: constructors, operators, indexing, SciPy, pickles, pictures, misuse."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import numba_attention as na
from numba_attention import BlockMask

SIZES = st.sampled_from([0, 1, 2, 63, 64, 65, 127, 128, 130, 200])
LEADS = st.sampled_from([(), (1,), (3,), (1, 1), (2, 1), (1, 3), (2, 3), (2, 1, 2)])


@st.composite
def arrays(draw, lead=LEADS, sizes=None):
    """Arrays of bool that are noise, blocks, intervals, or the same for all rows or all heads."""
    lead, L, S = draw(lead), *(sizes or (draw(SIZES), draw(SIZES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["noise", "few", "blocks", "causal", "keys", "rows", "heads", "nothing", "all"]))
    if kind in ("noise", "few"):
        return rng.random((*lead, L, S)) < (0.5 if kind == "noise" else 0.002)
    if kind == "blocks":
        blocks = rng.random((*lead, L // 64 + 1, S // 64 + 1)) < 0.5
        return np.repeat(np.repeat(blocks, 64, -1), 64, -2)[..., :L, :S]
    if kind == "causal":
        return np.broadcast_to(np.tri(L, S, int(rng.integers(-70, 70)), dtype=bool), (*lead, L, S))
    shape = {"keys": (*lead, 1, S), "rows": (*lead, L, 1), "heads": (L, S), "nothing": (), "all": ()}[kind]
    values = rng.random(shape) < 0.5 if shape else kind == "all"
    return np.broadcast_to(values, (*lead, L, S))


def four(array):
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def check(mask, expected):
    """The content, and that it is in canonical form: it equals the mask that is made of its content."""
    expected = four(np.asarray(expected))
    np.testing.assert_array_equal(mask.to_dense(), expected)
    again = BlockMask.from_array(expected)
    assert mask == again
    assert hash(mask) == hash(again)
    assert mask.shape == expected.shape


@given(arrays())
def test_from_array_and_back(array):
    check(BlockMask.from_array(array), array)
    check(BlockMask.from_array(np.asfortranarray(array)), array)
    check(BlockMask.from_array(array[..., ::-1, ::-1]), array[..., ::-1, ::-1])
    check(~BlockMask.from_array(array), ~array)
    check(BlockMask.from_array(array).T, array.swapaxes(-1, -2))


@given(st.data())
def test_operators(data):
    sizes = data.draw(SIZES), data.draw(SIZES)
    lead, other = data.draw(st.sampled_from([((2, 3), (2, 3)), ((1, 3), (2, 1)), ((), (2, 2)), ((2, 1, 2), (3, 1))]))
    a, b = data.draw(arrays(st.just(lead), sizes)), data.draw(arrays(st.just(other), sizes))
    A, B = BlockMask.from_array(a), BlockMask.from_array(b)
    check(A & B, four(a) & four(b))
    check(A | B, four(a) | four(b))
    check(A & ~A, np.zeros_like(a))
    check(A | ~A, np.ones_like(a))
    assert (A == B) == (four(a).shape == four(b).shape and bool((four(a) == four(b)).all()))
    assert A != a.tolist()


@st.composite
def slices(draw, n):
    if draw(st.booleans()):
        return slice(*sorted(64 * draw(st.integers(0, n // 64 + 1)) for _ in range(2)))
    return slice(
        draw(st.integers(-n - 2, n + 2)), draw(st.integers(-n - 2, n + 2)), draw(st.sampled_from([1, 2, -1, -3]))
    )


@given(st.data())
def test_indexing(data):
    array = four(data.draw(arrays(st.just((2, 3)))))
    mask, (L, S) = BlockMask.from_array(array), array.shape[-2:]
    rows, columns = data.draw(slices(L)), data.draw(slices(S))
    check(mask[..., rows, columns], array[..., rows, columns])
    check(mask[:, :, rows], array[:, :, rows])
    check(mask[1, 2], array[1, 2])
    check(mask[-1], array[-1])
    check(mask[:, ::2], array[:, ::2])
    check(mask[[1, 0, 1]], array[[1, 0, 1]])
    check(mask[..., columns], array[..., columns])
    some = np.flatnonzero(np.random.default_rng(0).random(S) < 0.5)
    check(mask[..., :, some], array[..., some])


@given(SIZES, SIZES, st.integers(-150, 150))
def test_causal(L, S, offset):
    i, j = np.arange(L)[:, None], np.arange(S)
    check(BlockMask.causal(L, S, offset), np.broadcast_to(j <= i + offset, (L, S)))


@pytest.mark.parametrize("far", [2**62, 2**63 - 1, 2**70])
def test_far_offsets_and_windows(far):
    """No sum of positions overflows, whatever integer types sizes have."""
    check(BlockMask.causal(5, 7, far), np.ones((5, 7), bool))
    check(BlockMask.causal(5, 7, -far), np.zeros((5, 7), bool))
    check(BlockMask.window(5, 7, far, far), np.ones((5, 7), bool))
    i, j = np.arange(5)[:, None], np.arange(7)
    check(BlockMask.window(np.uint8(5), np.uint8(7), np.uint64(1), np.uint64(2)), (j >= i - 1) & (j <= i + 2))
    check(BlockMask.causal(np.int8(5), np.uint8(7), np.uint8(2)), j <= i + 2)


@given(SIZES, SIZES, st.none() | st.integers(0, 150), st.none() | st.integers(0, 150))
def test_window(L, S, left, right):
    i, j = np.arange(L)[:, None], np.arange(S)
    expected = np.ones((L, S), bool)
    if left is not None:
        expected &= j >= i - left
    if right is not None:
        expected &= j <= i + right
    check(BlockMask.window(L, S, left, right), expected)


@given(st.lists(st.integers(0, 90), min_size=1, max_size=6))
def test_documents(lengths):
    document = np.repeat(np.arange(len(lengths)), lengths)
    check(BlockMask.documents(lengths), document[:, None] == document)


def parity(batch, head, i, j, docs, n):
    if docs[i] != docs[j]:
        return False
    return (i + j + head) % n == 0 or (batch == 1 and i >= j)


def test_of_a_function_without_numba():
    """The same masks where nothing can be compiled."""
    code = """
import sys
sys.modules["numba"] = None
sys.path.insert(0, {folder!r})
import numpy as np
from test_blockmask import test_of_a_function
test_of_a_function()
print("same")
"""
    code = code.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr


def test_a_function_is_evaluated_on_any_number_of_threads():
    import numba

    docs, before = np.repeat(np.arange(30), 100).astype(np.int32), numba.get_num_threads()
    whole = BlockMask(parity, (3000, 2999), heads=2, mod_args=(docs, 3))
    try:
        numba.set_num_threads(1)
        assert BlockMask(parity, (3000, 2999), heads=2, mod_args=(docs, 3)) == whole
    finally:
        numba.set_num_threads(before)


def noise(batch, head, i, j):
    return ((i * 7919 + j * 104729) ^ (i * j * 31)) % 17 < 8


def test_a_function_that_makes_no_blocks_is_refused():
    with pytest.raises(
        ValueError, match=r"over 64 MiB of distinct partial tiles .* over 40000 x 40000.*mask_mod=.*mask="
    ):
        BlockMask(noise, (40000, 40000))


def test_of_a_function():
    docs = np.repeat([4, 7, 9], [40, 50, 65]).astype(np.int32)
    mask = BlockMask(parity, (155, 155), batch=2, heads=3, mod_args=(docs, 3))
    b, h, i, j = np.ogrid[:2, :3, :155, :155]
    check(mask, (docs[i] == docs[j]) & (((i + j + h) % 3 == 0) | ((b == 1) & (i >= j))))
    check(BlockMask(lambda b, h, i, j: i >= j, (70, 130)), np.tri(70, 130, dtype=bool))
    check(BlockMask(lambda b, h, i, j: h == 1, (0, 130), heads=2), np.zeros((1, 2, 0, 130), bool))
    check(BlockMask(lambda b, h, i, j: h == 1, (70, 0), heads=2), np.zeros((1, 2, 70, 0), bool))


# SciPy.


@pytest.mark.parametrize("kind", [sp.csr_array, sp.csc_array, sp.coo_array, sp.bsr_array, sp.csr_matrix, sp.lil_array])
@given(array=arrays(st.just(())))
def test_from_and_to_sparse(kind, array):
    mask = BlockMask.from_sparse(kind(array.astype(np.float32) * -2))
    check(mask, array)
    back = mask.to_sparse()
    assert back.dtype == bool
    assert back.shape == array.shape
    np.testing.assert_array_equal(back.toarray(), array)
    assert BlockMask.from_sparse(back) == mask


@given(st.data())
def test_from_sparse_of_blocks(data):
    block = data.draw(st.sampled_from([1, 3, 64, 100, 128, (5, 64), (128, 64), (64, 1)]))
    height, width = block if isinstance(block, tuple) else (block, block)
    blocks = np.random.default_rng(data.draw(st.integers(0, 99))).random((3, 4)) < 0.5
    whole = np.repeat(np.repeat(blocks, height, 0), width, 1)
    check(BlockMask.from_sparse(sp.csr_array(blocks), block_size=block), whole)
    L, S = 3 * height - data.draw(st.integers(0, height - 1)), 4 * width - data.draw(st.integers(0, width - 1))
    check(BlockMask.from_sparse(sp.coo_matrix(blocks), (L, S), block_size=block), whole[:L, :S])


def test_explicit_zeros_of_a_sparse_matrix_hide():
    matrix = sp.csr_array((np.array([1.0, 0.0]), ([0, 1], [1, 0])), shape=(2, 2))
    check(BlockMask.from_sparse(matrix), [[False, True], [False, False]])


def test_blocks_of_bsr_are_taken_apart():
    blocks = sp.bsr_array((np.array([np.eye(2), np.ones((2, 2))]), np.array([1, 0]), np.array([0, 1, 2])), shape=(4, 4))
    check(BlockMask.from_sparse(blocks), blocks.toarray() != 0)


# What it says about itself.


def test_text_and_picture():
    text = repr(BlockMask.causal(8192, 8192)).splitlines()
    assert text[0].startswith(
        "BlockMask(shape=(1, 1, 8192, 8192), density=50.4 %, 8128 full + 128 partial of 16384 tiles, "
    )
    assert len(text) == 17
    assert max(map(len, text[1:])) == 32
    assert text[1] == "▒░"
    assert text[-1] == "█" * 30 + "▒░"
    assert repr(BlockMask.from_array(np.eye(2, dtype=bool))).splitlines()[1:] == ["▒"]
    assert repr(BlockMask.from_array(np.zeros((0, 5), bool))).endswith("B)")


def test_picture_for_notebooks():
    html = BlockMask.window(1000, 1000, 100, 0)._repr_html_()
    assert html.startswith("<figure><svg")
    assert html.count("<rect") == 1 + len(re.findall("fill-opacity", html))
    assert "shape=(1, 1, 1000, 1000)" in html


@given(arrays())
def test_density_is_the_share_of_tiles_that_kernels_visit(array):
    array, mask = four(array), BlockMask.from_array(array)
    L, S = array.shape[-2:]
    tiles = [array[..., i : i + 64, j : j + 64].any((-1, -2)) for i in range(0, L, 64) for j in range(0, S, 64)]
    assert mask.density == pytest.approx(np.mean(tiles) if np.size(tiles) else 0)


def test_memory():
    """Bytes of masks over 131072 positions: runs, and equal tiles once."""
    assert BlockMask.causal(131072, 131072).nbytes < 100_000
    documents = BlockMask.documents(np.full(40, 131072 // 40)) & BlockMask.causal(131040 // 40 * 40, 131040 // 40 * 40)
    assert documents.nbytes < 400_000
    noise = np.random.default_rng(0).random((1024, 1024)) < 0.5
    assert BlockMask.from_array(noise).nbytes < noise.nbytes / 8 + 5000
    many = np.broadcast_to(noise, (16, 8, 1024, 1024))
    assert BlockMask.from_array(many).nbytes < noise.nbytes / 8 + 7000


@given(arrays())
def test_pickle(array):
    mask = BlockMask.from_array(array)
    again = pickle.loads(pickle.dumps(mask))
    assert again == mask
    assert again.digest == mask.digest
    assert again.shape == mask.shape


def test_masks_are_keys_and_do_not_change():
    a, b = BlockMask.causal(100, 100), BlockMask.window(100, 100, None, 0)
    assert {a: 1}[b] == 1
    with pytest.raises(ValueError, match="read-only"):
        a._runs.ids[0] = 5


# Misuse.


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: BlockMask(np.ones((3, 3), bool), (3, 3)), TypeError, "mask_mod must be a Python function"),
        (lambda: BlockMask(lambda b, h, i: i > 3, (3, 3)), TypeError, "mask_mod"),
        (lambda: BlockMask(lambda b, h, i, j: i + 1.5, (3, 3)), TypeError, "truth value"),
        (lambda: BlockMask(lambda b, h, i, j, x: x[i], (5, 3), mod_args=(np.ones(4),)), TypeError, "truth value"),
        (lambda: BlockMask(lambda b, h, i, j, x: x[i] > 0, (5, 3), mod_args=(np.ones(4),)), ValueError, "4 elements"),
        (lambda: BlockMask(lambda b, h, i, j, x: x[i] > 0, (5, 3), mod_args=np.ones(5)), TypeError, "mod_args must be"),
        (lambda: BlockMask(parity, 3), TypeError, r"shape must be a pair \(L, S\)"),
        (lambda: BlockMask(parity, (3, 3), heads=0), ValueError, "heads must be positive"),
        (lambda: BlockMask(parity, (3, 3), batch=1.5), TypeError, "batch must be an integer"),
        (lambda: BlockMask.from_array(np.ones((3, 3))), TypeError, "mask must be boolean"),
        (lambda: BlockMask.from_array(np.ones(3, bool)), ValueError, r"shape \(\.\.\., L, S\), got \(3,\)"),
        (lambda: BlockMask.from_sparse(np.eye(3)), TypeError, "matrix must be a sparse array"),
        (lambda: BlockMask.from_sparse(sp.eye_array(3), block_size=0), ValueError, "block_size must be positive"),
        (lambda: BlockMask.from_sparse(sp.eye_array(3), block_size=2.0), TypeError, "block_size must be an int"),
        (lambda: BlockMask.from_sparse(sp.eye_array(3), (9, 9)), ValueError, r"shape \(9, 9\) does not fit .*\(3, 3\)"),
        (lambda: BlockMask.from_sparse(sp.eye_array(3), 9), TypeError, r"pair \(L, S\)"),
        (lambda: BlockMask.from_sparse(sp.eye_array(3), (3.0, 3)), TypeError, "L must be an integer"),
        (lambda: BlockMask.from_sparse(sp.eye_array(3), ("3", 3)), TypeError, "L must be an integer"),
        (lambda: BlockMask.causal(-1, 5), ValueError, "L and S"),
        (lambda: BlockMask.causal(3.5, 5), TypeError, "L must be an integer"),
        (lambda: BlockMask.causal(3, 5, offset=None), TypeError, "offset must be an integer"),
        (lambda: BlockMask.window(3, 5, -1, 0), ValueError, "left must not be negative"),
        (lambda: BlockMask.documents([3, -1]), ValueError, "lengths"),
        (lambda: BlockMask.documents([[3]]), ValueError, "lengths"),
        (lambda: BlockMask.documents([1.5]), TypeError, "lengths must be integer"),
        (lambda: BlockMask.documents([1, True]), TypeError, "lengths must not mix"),
        (lambda: BlockMask.documents([2**40]), ValueError, "lengths must sum"),
        (lambda: BlockMask.causal(3, 5) & BlockMask.causal(5, 3), ValueError, r"\(1, 1, 3, 5\) and \(1, 1, 5, 3\)"),
        (lambda: BlockMask.causal(3, 5) & np.ones((3, 5), bool), TypeError, r"& joins .* BlockMask.from_array"),
        (lambda: np.ones((3, 5), bool) & BlockMask.causal(3, 5), TypeError, r"& joins .* BlockMask.from_array"),
        (lambda: BlockMask.causal(3, 5)[0, 0, 0, 0], IndexError, "queries of a BlockMask"),
        (lambda: BlockMask.causal(3, 5)[0, 0, :, :, 0], IndexError, "too many indices"),
        (lambda: BlockMask.causal(3, 5)[1], IndexError, "out of bounds"),
        (lambda: BlockMask.causal(3, 5)[None], IndexError, "integers, slices"),
        (lambda: BlockMask.from_array(np.ones((2, 1, 3, 3), bool)).to_sparse(), ValueError, r"mask\[b, h\]"),
    ],
)
def test_misuse(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_scipy_is_imported_when_used():
    """By `from_sparse` and `to_sparse` alone."""
    code = "import sys, numba_attention as na; na.BlockMask.causal(9, 9); print('scipy.sparse' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_public():
    assert na.BlockMask is BlockMask
