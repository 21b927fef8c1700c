"""Matrix products for the projections of a layer: out[i, j] = sum_k lanes[i, k] numbers[j, k], plus a bias.

One operand is packed, transposed, into tiles with its rows in the lanes; the other is read one number at a time from
wherever it is. So strides are arbitrary, and y = x W^T, dx = dy W and dW = dy^T x are the same kernel. OpenBLAS would
be as fast, but its threads spin for 0.1 s after a product and hold the cores that attention's threads then wait for.

A number of the output is the same sum in the same order whatever the other rows and columns: no bit depends on which
operand is in the lanes, how the work is cut, or the threads. An activation is applied to a finished tile while it is in
the cache.
"""

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from . import tiles
from .activations import activate_tile
from .gemm import micro_kernel
from .params import STOPPED
from .scratch import Area, lay_out, views
from .simd import fetch, fetch_add, void_pointer
from .spec import Spec
from .views import UNBOUNDED, carray

# Blocked summation: CHUNK products are summed in registers, then added to the tile in scratch. The packed tile, 24 KiB,
# stays in L1 (48 to 192 are within 3 %), and rounding errors grow with CHUNK + K / CHUNK, not with K.
CHUNK = 96
NO_BIAS, ADD_BIAS, SUM_LANES = range(3)  # what `bias` is for: nothing, added to the output, receives sum_k lanes[i, k]

ADDRESSES = ("lanes", "numbers", "out", "bias", "counter", "scratch")
INTEGERS = (
    "items", "blocks", "slabs", "panels", "slab", "chunk", "depth", "bias_use", "activation",
    "P", "Q", "K", "lanes_row", "lanes_k", "numbers_row", "numbers_k",
    "out_lane", "out_row", "out_group", "bias_lane", "bias_row", "bias_group",
    "scratch_size", "tile_size", "at_tiles", "at_packed", "at_rows", "at_out_rows", "at_sums", "at_ones",
)  # fmt: skip
PARAMS = np.dtype([(name, np.int64) for name in ADDRESSES + INTEGERS])
OWN = 8 * 4  # byte offset of the addresses that are not arrays of the caller
REST = 8 * len(ADDRESSES)
pack_own = struct.Struct("=2q").pack_into
pack_rest = struct.Struct(f"={len(INTEGERS)}q").pack


def chunk_of(K: int) -> int:
    """How many k a chunk has; the same for every product over K of them."""
    chunks = -(-K // CHUNK)
    return -(-K // (16 * chunks)) * 16 if chunks else 16


def areas_of(spec: Spec, slab: int = UNBOUNDED, panels: int = UNBOUNDED, K: int = UNBOUNDED) -> dict[str, Area]:
    """The scratch areas of one thread."""
    BM, MR, real = spec.query_tile, spec.block[0], spec.vector.dtype
    return {
        "tiles": Area((panels * -(-slab // MR) * MR, BM), real),
        "packed": Area((chunk_of(K), BM), real),
        "rows": Area((panels, BM), np.int64),
        "out_rows": Area((BM,), np.int64),
        "sums": Area((panels, BM), real),
        "ones": Area((BM,), real),
    }


def scratch(spec: Spec, slab: int, panels: int, K: int) -> dict[str, int]:
    """Byte offsets of the scratch areas of one thread, and their sizes."""
    offsets, total = lay_out(areas_of(spec, slab, panels, K))
    addresses = {f"at_{name}": offset for name, offset in offsets.items()}
    return addresses | {"scratch_size": total, "tile_size": areas_of(spec, slab, 1, K)["tiles"].size}


def make_worker(spec: Spec) -> Callable[[int, int], int]:
    """Make the function that one thread runs: take work items until none is left.

    A work item is a block of up to `panels` tiles of lanes, times a slab of rows of the numbers, summed over one of the
    groups that the k are dealt out to.
    """
    BM, MR = spec.query_tile, spec.block[0]
    size, row_bytes = spec.vector.bytes, BM * spec.vector.bytes
    real: Any = spec.vector.dtype
    sums_of, ones_of = views(areas_of(spec), "sums ones")
    gather = tiles.gather_tile(spec, spec.element)
    scatter, copy = tiles.scatter_tile(spec), tiles.widen_tile(spec)
    activate = activate_tile(spec)
    mm = micro_kernel(spec, "sum")
    mm_one = micro_kernel(spec, "sum", (1, spec.block[1]))  # for a single row: a third of the time of four

    @spec.jit
    def place(table: int, first: int, row: int, n: int) -> None:
        """Fill a table of addresses; the last of n stands in for those the tile lacks."""
        addresses = carray(void_pointer(table), BM, np.int64)
        for lane in range(BM):
            addresses[lane] = first + min(lane, n - 1) * row

    @spec.jit
    def begin(p: Any, at: int, panel: int, lane: int, row: int, rows: int) -> None:
        """Start a tile of outputs from the bias or from 0."""
        n = min(BM, p.P - lane)
        tile = at + p.at_tiles + panel * p.tile_size
        place(at + p.at_rows + panel * BM * 8, p.lanes + lane * p.lanes_row, p.lanes_row, n)
        if p.bias_use == ADD_BIAS:
            place(at + p.at_out_rows, p.bias + lane * p.bias_lane + row * p.bias_row, p.bias_lane, n)
            gather(tile, at + p.at_out_rows, 0, p.bias_row, rows, real(1))
        else:
            carray(void_pointer(tile), (UNBOUNDED, BM), real)[:rows] = 0
            sums_of(p, at)[panel] = 0

    @spec.jit
    def add_products(p: Any, at: int, panel: int, k: int, count: int, row: int, rows: int) -> None:
        """C^T += N L^T over one chunk."""
        packed, tile = at + p.at_packed, at + p.at_tiles + panel * p.tile_size
        gather(packed, at + p.at_rows + panel * BM * 8, k * p.lanes_k, p.lanes_k, count, real(1))
        numbers = p.numbers + row * p.numbers_row + k * p.numbers_k
        for j in range(0, rows - 1, MR):
            mm(
                tile + j * row_bytes, row_bytes, numbers + j * p.numbers_row, p.numbers_row, p.numbers_k,
                min(MR, rows - j), packed, row_bytes, count, 0,
            )  # fmt: skip
        if rows % MR == 1:
            j = rows - 1
            mm_one(
                tile + j * row_bytes, row_bytes, numbers + j * p.numbers_row, 0, p.numbers_k, 1, packed, row_bytes,
                count, 0,
            )  # fmt: skip
        if p.bias_use == SUM_LANES and row == 0:
            mm_one(at + p.at_sums + panel * row_bytes, row_bytes, at + p.at_ones, 0, 0, 1, packed, row_bytes, count, 0)

    @spec.jit
    def write(p: Any, at: int, panel: int, lane: int, row: int, rows: int, group: int) -> None:
        n = min(BM, p.P - lane)
        tile = at + p.at_tiles + panel * p.tile_size
        if p.activation != 0:
            activate(tile, tile, rows, p.activation)
        out = p.out + group * p.out_group + lane * p.out_lane + row * p.out_row
        if p.out_lane == size:
            for j in range(rows):
                copy(out + j * p.out_row, tile + j * row_bytes, 0, size, 1, n)
        else:
            place(at + p.at_out_rows, out, p.out_lane, n)
            scatter(tile, at + p.at_out_rows, 0, p.out_row, rows, at + p.at_ones)
        if p.bias_use == SUM_LANES and row == 0:
            place(at + p.at_out_rows, p.bias + group * p.bias_group + lane * p.bias_lane, p.bias_lane, n)
            scatter(at + p.at_sums + panel * row_bytes, at + p.at_out_rows, 0, 0, 1, at + p.at_ones)

    @spec.jit
    def multiply(p: Any, at: int, lane: int, row: int, group: int) -> None:
        """One work item. Chunk by chunk, so that several panels find the numbers of a chunk in L2."""
        rows = min(p.slab, p.Q - row)
        panels = min(p.panels, (p.P - lane + BM - 1) // BM)
        for panel in range(panels):
            begin(p, at, panel, lane + panel * BM, row, rows)
        stop = min(p.K, (group + 1) * p.depth)
        for k in range(group * p.depth, stop, p.chunk):
            if fetch(p.counter) >= STOPPED:
                return
            for panel in range(panels):
                add_products(p, at, panel, k, min(p.chunk, stop - k), row, rows)
        for panel in range(panels):
            write(p, at, panel, lane + panel * BM, row, rows, group)

    def worker(params: int, thread: int) -> int:
        p = carray(void_pointer(params), 1, PARAMS)[0]
        at = p.scratch + thread * p.scratch_size
        ones_of(p, at)[:] = 1
        while True:
            item = fetch_add(p.counter, 1)
            if item >= p.items:
                return 0
            # Cache blocking: all blocks of lanes visit a slab of the numbers before the next slab, so that it stays in
            # the cache.
            slab, block = divmod(item, p.blocks)
            group, slab = divmod(slab, p.slabs)
            multiply(p, at, block * p.panels * BM, slab * p.slab, group)

    return worker
