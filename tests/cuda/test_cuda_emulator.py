"""The instructions that kernels are made of, in the emulator; and that it finds what a GPU does wrong now and then."""

import ml_dtypes
import numpy as np
import pytest

from emulator import BlockMemory, Emit, Emulator, Memory, Value
from numba_attention.cuda.products import Simt, TensorCores, TripleTF32
from numba_attention.cuda.scoring import tanh
from numba_attention.cuda.tiles import Rows, Tile, fetch

HALVES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


class Block:
    """One block of threads with shared memory, outside any kernel."""

    def __init__(self, threads=32, size=4096, landing="wait", races=True):
        self.memory, self.block_memory = Memory(), BlockMemory(size, landing, races)
        self.emit = Emit(self, threads)
        self.thread = Value("i", np.arange(threads))

    def allow(self, *arrays):
        self.memory.allow([(x.ctypes.data, x.nbytes) for x in arrays])


def address(array):
    return Value("l", array.ctypes.data)


def values(numbers, kind="f"):
    return [Value(kind, x) for x in numbers]


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_unpacks_and_packs(dtype):
    block = Block(65536)
    words = np.arange(65536, dtype=np.uint32)
    low, high = block.emit.unpack(dtype, Value("i", (words | (words[::-1] << 16)).view(np.int32)))
    want = words.astype(np.uint16).view(HALVES[dtype]).astype(np.float32)
    np.testing.assert_array_equal(low.x, want)
    np.testing.assert_array_equal(high.x, want[::-1])
    back = block.emit.pack(dtype, low, high).x.view(np.uint32)
    finite = np.isfinite(want)
    np.testing.assert_array_equal((back & 0xFFFF)[finite], words[finite])


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_rounded_to_nearest_even(dtype):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(4000), 2.0 ** rng.uniform(-30, 17, 4000), [0.0, np.inf, -np.inf]])
    x = np.resize(x.astype(np.float32), 8032)
    got = Block(len(x)).emit.to_half(dtype, Value("f", x)).x
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got, x.astype(HALVES[dtype]).view(np.uint16))


def test_tanh_of_scores():
    """Small and large ones, NaN and infinity, in the threads of warps that take one branch or the other."""
    rng, threads = np.random.default_rng(0), 64
    x = np.concatenate([rng.standard_normal((threads, 40)), rng.uniform(-12, 12, (threads, 40))], 1)
    x[:32, :40] *= 0.1
    x[0, [1, 50, 51]] = np.nan, np.inf, -np.inf
    x = x.astype(np.float32)
    got = np.stack([y.x for y in tanh(Block(threads).emit, values(x.T))], 1)
    np.testing.assert_allclose(got, np.tanh(x.astype(np.float64)), rtol=2.5e-7)


@pytest.mark.parametrize("n", [1, 32, 128])
def test_any_lane_of_a_warp(n):
    holds = np.arange(n) == n - 1
    got = Block(n).emit.any_lane(Value("p", holds)).x
    np.testing.assert_array_equal(got, np.arange(n) // 32 == (n - 1) // 32)


def test_kinds_do_not_mix():
    with pytest.raises(TypeError, match="i and l"):
        Value("i", 1) + Value("l", 1)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_matrices_multiply(dtype):
    """What ldmatrix loads of two tiles is what mma takes: A B^T of 16 x 16 and 8 x 16; A B by the transposing load."""
    rng = np.random.default_rng(1)
    a, b, v = (rng.integers(-8, 8, shape).astype(HALVES[dtype]) for shape in ((16, 16), (16, 16), (16, 16)))
    block = Block(32, 3 * 512, races=False)
    block.block_memory.bytes[:] = np.concatenate([a, b, v]).view(np.uint8).reshape(-1)
    lane, e = block.thread, block.emit
    left = e.load_matrices((lane & 15) * 32 + (lane >> 4) * 16, False)
    right = e.load_matrices(((lane & 7) + (lane >> 4) * 8) * 32 + ((lane >> 3) & 1) * 16 + 512, False)
    across = e.load_matrices((lane & 15) * 32 + (lane >> 4) * 16 + 1024, True)
    for pair, want in ((right, a.astype(float) @ b.astype(float).T), (across, a.astype(float) @ v.astype(float))):
        for half in (0, 1):
            c = e.multiply(dtype, left, pair[2 * half : 2 * half + 2], values(np.ones((4, 32))))
            got = np.zeros((16, 8))
            g, t = np.arange(32) >> 2, np.arange(32) & 3
            for n in range(4):
                got[g + 8 * (n // 2), 2 * t + n % 2] = c[n].x
            np.testing.assert_array_equal(got, want[:, 8 * half : 8 * half + 8] + 1)


PRODUCTS = [
    (TensorCores("float16", 1), "float16", 2e-3), (TensorCores("bfloat16", 2), "bfloat16", 2e-2),
    (TripleTF32("float32", 1), "float32", 2e-6), (TripleTF32("float32", 2), "float32", 2e-6),
    (Simt("float32", 8, 8), "float32", 1e-6), (Simt("float32", 2, 4), "float32", 1e-6),
    (Simt("float32", 4, 8), "float16", 1e-6), (Simt("float32", 1, 8), "bfloat16", 1e-6),
    (Simt("float64", 4, 8), "float64", 1e-14), (Simt("float64", 2, 8, nan_safe=True), "float64", 1e-14),
]  # fmt: skip


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("product", "storage", "limit"), PRODUCTS, ids=lambda x: getattr(x, "storage", x))
@pytest.mark.parametrize(("columns", "E", "rows", "keys", "width"), [(32, 32, 13, 32, 24), (64, 96, 16, 19, 96)])
def test_products(product, storage, limit, aligned, columns, E, rows, keys, width):
    """Two warps multiply tiles of arrays that are smaller than the tiles: scores = A B^T, sums = scores B."""
    warps, rows = 2, min(rows, 2 * product.rows)
    dtype = {"bfloat16": HALVES["bf16"]}.get(storage) or np.dtype(storage)
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal((n, width)).astype(dtype) for n in (rows, keys))
    tile_a = Tile(product.rows * warps, E, product.storage, 0)
    tile_b = Tile(columns, E, product.storage, tile_a.end)
    size = tile_b.end
    if isinstance(product, Simt):
        product.set_columns(columns)
        product.at, size = size, size + warps * product.scratch
    block = Block(32 * warps, size)
    block.allow(a, b)
    e, thread = block.emit, block.thread
    base = Value("i", 0)
    block.block_memory.count = True
    for tile, x in ((tile_a, a), (tile_b, b)):
        row, column = (Value("l", n) for n in x.strides)
        described = Rows(address(x), row, column, Value("i", len(x)), Value("i", width))
        fetch(e, tile, base, described, thread, 32 * warps, storage, aligned)
    e.commit()
    e.wait(0)
    block.block_memory.sync()
    where = thread >> 5, thread & 31
    s = product.scores(e, tile_a, tile_b, base, *where)
    c = product.add(e, [Value(product.kind, np.zeros(32 * warps))] * len(product.features(E)), s, tile_b, base, *where)
    first = where[0] * product.rows + product.lane_row(where[1])
    scores, sums = np.zeros((product.rows * warps, columns)), np.zeros((product.rows * warps, E))
    for found, layout, column, target in (
        (s, product.layout(columns), product.lane_column(where[1]), scores),
        (c, product.features(E), product.lane_feature(where[1]), sums),
    ):
        for (slot, n), x in zip(layout.elements, found, strict=True):
            target[(first + product.slot_row(slot)).x, (column + n).x] = x.x
    wide_a, wide_b = a.astype(float), b.astype(float)
    want = wide_a @ wide_b.T
    np.testing.assert_allclose(scores[:rows, :keys], want, atol=limit * np.abs(want).max())
    assert not scores[rows:].any()
    assert not scores[:, keys:].any()
    want = want @ wide_b
    np.testing.assert_allclose(sums[:rows, :width], want, atol=3 * limit * np.abs(want).max())
    if isinstance(product, TensorCores) and not isinstance(product, TripleTF32):
        assert block.block_memory.conflicts["matrices"] == 1


@pytest.mark.parametrize(("slots", "columns", "E"), [(1, 64, 128), (2, 32, 64), (1, 32, 96), (2, 32, 32), (1, 64, 96)])
def test_transposed_products(slots, columns, E):
    """Four warps write scores to a tile and share out its transpose times another tile, without bank conflicts."""
    product, warps = TensorCores("float16", slots), 4
    rows = product.rows * warps
    a, b = Tile(rows, columns, "float16", 0), Tile(rows, E, "float16", rows * columns * 2)
    block = Block(32 * warps, b.end, races=False)
    rng = np.random.default_rng(3)
    given = rng.integers(-4, 4, (rows, E)).astype(np.float16)
    e, thread = block.emit, block.thread
    lane = thread & 31
    for row in range(rows):  # where `fetch` would put them
        for chunk in range(E // 8):
            at = int(b.chunk(b.row(Value("i", 0), Value("i", row)), chunk).x)
            block.block_memory.bytes[at : at + 16] = given[row, 8 * chunk : 8 * chunk + 8].view(np.uint8)
    scores = rng.integers(-4, 4, (rows, columns)).astype(float)
    layout = product.layout(columns)
    first = (thread >> 5) * product.rows + product.lane_row(lane)
    p = [
        Value("f", scores[(first + product.slot_row(slot)).x, (product.lane_column(lane) + n).x])
        for slot, n in layout.elements
    ]
    block.block_memory.count = True
    product.leave(e, p, a, Value("i", 0), thread >> 5, lane)
    block.block_memory.sync()
    sums, row, column, there = product.transposed(e, a, b, Value("i", 0), thread >> 5, lane, warps)
    got = np.full((columns, E), np.nan)
    where = np.ones(32 * warps, bool) if there is None else there.x
    for n, x in enumerate(sums):
        i = row + (lane >> 2) + 8 * (n // 2 % 2)
        j = column + (lane & 3) * 2 + 8 * (n // 4) + n % 2
        got[i.x[where], j.x[where]] = x.x[where]
    np.testing.assert_array_equal(got, scores.T @ given.astype(float))
    assert set(block.block_memory.conflicts.values()) == {1}


def test_pages_and_groups_are_found():
    pages = np.arange(6 * 4 * 8, dtype=np.float32).reshape(6, 4, 8)  # pages of 4 rows
    table = np.array([4, 0, 5])
    block = Block(32, 16 * 32 * 4)
    block.allow(pages, table)
    tile = Tile(16, 32, "float32", 0)
    more = {"pages": address(table), "page_size": Value("i", 4), "page": Value("l", pages.strides[0])}
    rows = Rows(address(pages), Value("l", 32), Value("l", 4), Value("i", 10), Value("i", 8), Value("i", 1), **more)
    fetch(block.emit, tile, Value("i", 0), rows, block.thread, 32, "float32", True)
    block.emit.commit()
    block.emit.wait(0)
    block.block_memory.sync()
    row = block.thread & 15
    got = block.emit.load_shared("f", tile.chunk(tile.row(Value("i", 0), row), block.thread >> 4), 4)
    want = np.zeros((16, 8), np.float32)
    want[:10] = pages[table].reshape(12, 8)[1:11]
    for n in range(4):
        np.testing.assert_array_equal(got[n].x, want[row.x, (np.arange(32) >> 4) * 4 + n])


# What is wrong on purpose.


def _copy(e, block, source, offset=0, size=16):
    e.copy_async(block.thread * 16, address(source) + e.wide(block.thread) * 16 + offset, Value("i", size))
    e.commit()


@pytest.fixture
def block():
    return Block(64)


@pytest.fixture
def source(block):
    buffer = np.arange(65 * 4 + 4, dtype=np.float32)
    start = -(buffer.ctypes.data // 4) % 4  # of 16 bytes
    array = buffer[start : start + 64 * 4]
    block.allow(array)
    return array


def test_a_right_copy_passes(block, source):
    _copy(block.emit, block, source)
    block.emit.wait(0)
    block.block_memory.sync()
    other = block.emit.load_shared("f", (block.thread ^ 33) * 16, 4)
    np.testing.assert_array_equal(other[1].x, source[1::4][np.arange(64) ^ 33])


def test_what_is_under_way_is_not_read(block, source):
    _copy(block.emit, block, source)
    with pytest.raises(AssertionError, match="under way"):
        block.emit.load_shared("f", block.thread * 16)


def test_copies_of_others_need_a_barrier(block, source):
    _copy(block.emit, block, source)
    block.emit.wait(0)
    block.emit.load_shared("f", block.thread * 16)  # its own it may read
    with pytest.raises(AssertionError, match="without a barrier"):
        block.emit.load_shared("f", (block.thread ^ 1) * 16)


def test_a_newer_group_is_not_waited_for(block, source):
    _copy(block.emit, block, source)
    block.emit.wait(1)
    with pytest.raises(AssertionError, match="under way"):
        block.emit.load_shared("f", block.thread * 16)


def test_out_of_bounds_is_found(block, source):
    _copy(block.emit, block, source, offset=16)
    with pytest.raises(AssertionError, match="out of bounds by 16"):
        block.emit.wait(0)


def test_misaligned_is_found(block, source):
    _copy(block.emit, block, source, offset=4, size=4)
    with pytest.raises(AssertionError, match="misaligned"):
        block.emit.wait(0)


def test_shared_memory_has_bounds(block):
    with pytest.raises(AssertionError, match="out of bounds"):
        block.emit.load_shared("f", block.thread * 64 + 64)


def test_warps_need_a_barrier_of_the_block(block):
    x = [Value("f", 1.0)]
    block.emit.store_shared("f", block.thread * 4, x)
    block.emit.sync_warp()
    block.emit.load_shared("f", (block.thread ^ 1) * 4)  # of the same warp
    with pytest.raises(AssertionError, match="without a barrier"):
        block.emit.load_shared("f", (block.thread ^ 32) * 4)


def test_lanes_need_a_barrier_of_the_warp(block):
    block.emit.store_shared("f", block.thread * 4, [Value("f", 1.0)])
    with pytest.raises(AssertionError, match="without a barrier"):
        block.emit.load_shared("f", (block.thread ^ 1) * 4)


@pytest.mark.parametrize("distance", [1, 32])
def test_what_others_read_is_not_overwritten(block, distance):
    block.emit.store_shared("f", block.thread * 4, [Value("f", 1.0)])
    block.block_memory.sync()
    block.emit.load_shared("f", (block.thread ^ distance) * 4)
    with pytest.raises(AssertionError, match="overwritten"):
        block.emit.store_shared("f", block.thread * 4, [Value("f", 2.0)])


def test_two_threads_do_not_write_one_place(block):
    result = np.zeros(4, np.float32)
    block.allow(result)
    with pytest.raises(AssertionError, match="different things"):
        block.emit.store("f", address(result), [block.emit.convert("f", block.thread)], block.thread >= 0)


def test_bank_conflicts_are_counted(block):
    block.block_memory.count = True
    block.block_memory.bytes[:] = 0
    block.emit.load_shared("f", block.thread * 4)
    assert block.block_memory.conflicts["read 4"] == 1
    block.emit.load_shared("f", block.thread * 8)
    assert block.block_memory.conflicts["read 4"] == 2
    block.emit.load_shared("f", block.thread * 0)
    assert block.block_memory.conflicts["read 4"] == 2


def test_a_kernel_may_not_branch_on_what_threads_disagree_about():
    emulator = Emulator()

    @emulator.macro("i", "i")
    def half(e, x):
        return x >> 1

    def kernel(integers, reals):
        if half(emulator.cuda.threadIdx.x):
            pass

    with pytest.raises(ValueError, match="ambiguous"):
        emulator.run(kernel, (1, 1, 1), 32, 0, [], [], [(256, 16)])
