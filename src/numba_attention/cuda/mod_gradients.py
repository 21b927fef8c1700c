"""Gradients of arrays in `mod_args`: dS times the derivative of the score with respect to each read, added by atomics.

A block owns a tile of queries and visits all keys that a row of it sees. What the pairs of a thread add to one element
is summed in registers first, and over a warp where the element is the same for all: slopes of heads, temperatures.
"""

import numpy as np

from .blocks import BACKWARD, Block, Lanes, block_of, make_landed, make_scale, packed_block, stage_inputs
from .dropout import first_of_block
from .emit import I32, SIZES, Emit, KernelFunction, Real, Target, Value
from .instructions import Evaluation
from .parameters import PARAMETERS, Parameters
from .score_gradients import Tiles
from .spec import Spec


def make_mod_gradients(c: Spec, on: Target) -> KernelFunction:
    """Make the kernel; its grid is tiles of queries of all sequences, and heads."""
    cuda, macro, shared_address, landed = on.cuda, on.macro, on.shared(), make_landed(c, on)
    product, tiles = c.make_product(), Tiles(c)
    kind, columns = product.kind, c.columns
    if c.product == "simt":
        product.set_columns(columns)
    lanes = Lanes(c, product)
    scale_queries = make_scale(c, on, tiles.s.all)
    BLOCK = packed_block(c, BACKWARD)
    mods = c.mods
    assert mods is not None

    @macro((BLOCK, "i", "i"), PARAMETERS, "i", "i")
    def find_work(e: Emit, p: Parameters, x: I32, head: I32) -> tuple[Block, I32, I32]:
        """The tile, the first key that a row of it sees, and the one after the last."""
        count = p.int("tiles")
        b = block_of(e, c, p, BACKWARD, x // count, x % count, head)
        begin, end, _, _ = b.span.of_rows(b.first, b.first + (c.rows - 1))
        return b, first_of_block(begin) if c.dropout else begin, end

    @macro("", BLOCK, "i", "i", "i")
    def load(e: Emit, b: Block, base: I32, thread: I32, j: I32) -> None:
        tiles.load(b, base, thread, j)

    @macro("", BLOCK, "i", "i", "i")
    def add(e: Emit, b: Block, base: I32, thread: I32, j: I32) -> None:
        opaque = e.opaque(thread)
        scores, inputs = lanes.scores(b, thread, j), stage_inputs(b, lanes, thread)
        s, _ = scores.stages(tiles.scores(b, product, e.opaque(base), opaque, j), inputs)
        s = scores.hide(s, b.span)
        ds = tiles.gradients_of_scores(b, lanes, base, thread, j, s)
        evaluation = Evaluation(e, b.p.mods, mods.gradients, mods.arguments, kind)
        # Elements and what is added to them: pairs that read at one place have one and the same index.
        sums: dict[tuple[int, int], tuple[int, Value, Real]] = {}
        for own, grad in zip(scores.evaluate(evaluation, inputs, scores.natural), ds, strict=True):
            for (place, index), slope in zip(own[1], own[0], strict=True):
                x = e.select(grad.equals(0.0), grad, grad * slope)  # 0 times an infinite slope is 0
                key = place, id(index)
                sums[key] = place, index, sums[key][2] + x if key in sums else x
        for place, index, x in sums.values():
            uniform = evaluation.is_uniform(index)
            if uniform:
                for distance in (16, 8, 4, 2, 1):
                    x = x + e.shuffle_xor(x, distance)
            offset = e.load_constant("l", b.p.mods + 8 * (evaluation.first[-1] + place))
            address = b.p.partial + (offset + e.wide(index)) * SIZES[kind]
            lane = thread & 31
            some = x.equals(0.0) ^ 1
            e.add_anywhere(address, x, some & lane.equals(0) if uniform else some)

    def kernel(integers, reals):  # type: ignore[no-untyped-def]
        parameters = integers, reals
        base = shared_address(cuda.shared.array(0, np.uint8))
        thread = np.int32(cuda.threadIdx.x)
        block, j, end = find_work(parameters, np.int32(cuda.blockIdx.x), np.int32(cuda.blockIdx.y))
        while j < end:
            load(block, base, thread, j)
            landed()
            cuda.syncthreads()
            scale_queries(parameters, base, thread)
            cuda.syncthreads()
            add(block, base, thread, j)
            cuda.syncthreads()
            j = np.int32(j + columns)

    return kernel
