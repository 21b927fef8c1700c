"""Split keys: joins the parts of a row that several blocks computed, in a fixed order: the same call has the same bits.

A block owns a row, and its warps share out the parts. All loads are issued before the first use: the latency of global
memory is that of hundreds of multiplications.
"""

import math

import numpy as np

from .blocks import FORWARD, HEAD, Block, block_of, packed_block
from .emit import I32, Emit, KernelFunction, Real, Regs, Target
from .formats import HALVES, KINDS
from .operands import own_slab
from .parameters import PARAMETERS, Parameters
from .results import not_finite
from .softmax import LARGEST, lse
from .spec import Spec

MOST = 256  # parts
AT_ONCE = 4  # parts that a warp reads at a time


class Shared:
    """Shared memory: maximum and denominator of each warp, and then its sums of features."""

    def __init__(self, c: Spec) -> None:
        self.size = 8 if c.storage == "float64" else 4
        self.sums = 2 * c.warps * self.size
        self.pitch = c.Ev * self.size
        self.end = self.sums + c.warps * self.pitch


def make_combine(c: Spec, on: Target) -> KernelFunction:
    """Make the kernel; its grid is rows of all sequences, heads, and slabs."""
    cuda, macro, shared_address = on.cuda, on.macro, on.shared()
    kind, shared = "d" if c.storage == "float64" else "f", Shared(c)
    size, threads, warps = shared.size, c.threads, c.warps
    own = c.Ev // 32  # features of a lane
    C = f"{kind}{own}"
    BLOCK = packed_block(c, FORWARD)
    sliced = c.is_sliced

    @macro((PARAMETERS, "i"), PARAMETERS, "i")
    def find_slab(e: Emit, p: Parameters, z: I32) -> tuple[Parameters, I32]:
        return own_slab(e, c, p, z)

    @macro((BLOCK, "i", "i"), PARAMETERS, "i", "i")
    def find_row(e: Emit, p: Parameters, x: I32, head: I32) -> tuple[Block, I32, I32]:
        rows = p.int("flag_rows")
        b = block_of(e, c, p, FORWARD, x // rows, e.const("i", 0), head)
        return b, x % rows, (p.int("splits") + (warps * AT_ONCE - 1)) // (warps * AT_ONCE)

    @macro("", BLOCK, "i", "i", "i")
    def find_sums(e: Emit, b: Block, base: I32, thread: I32, row: I32) -> None:
        """Maximum and denominator of the parts that the threads of a warp read."""
        in_bounds, total, factor, parts = b.exists(row), e.const(kind, 0.0), b.p.real("factor", kind), []
        top = low = e.const(kind, -LARGEST[kind])
        for n in range(-(-MOST // threads)):
            part = thread + n * threads
            inside, at = in_bounds & (part < b.p.int("splits")), b.part_at(part, row, size)
            parts.append((e.select(inside, e.load(kind, at, where=inside), low), e.load(kind, at + size, where=inside)))
        for maximum, _ in parts:
            top = e.max(top, maximum)
        for distance in (16, 8, 4, 2, 1):
            top = e.max(top, e.shuffle_xor(top, distance))
        for maximum, denominator in parts:
            total = e.fma(e.exp2((maximum - top) * factor), denominator, total)
        for distance in (16, 8, 4, 2, 1):
            total = total + e.shuffle_xor(total, distance)
        e.store_shared(kind, base + (thread >> 5) * (2 * size), [top, total], (thread & 31).equals(0))
        if c.flags and not sliced:
            e.store("i", b.flag_at(row), [e.const("i", 0)], in_bounds & thread.equals(0))

    @macro(f"{kind} {kind} {C}", PARAMETERS, "i")
    def begin(e: Emit, p: Parameters, base: I32) -> tuple[Real, Real, Regs]:
        """Maximum and denominator of the row."""
        factor = p.real("factor", kind)
        of_warps = [e.load_shared(kind, base + warp * (2 * size), 2) for warp in range(warps)]
        top = of_warps[0][0]
        for maximum, _ in of_warps[1:]:
            top = e.max(top, maximum)
        zero = total = e.const(kind, 0.0)
        for maximum, denominator in of_warps:
            total = e.fma(e.exp2((maximum - top) * factor), denominator, total)
        return top, total, [zero] * own

    @macro(C, BLOCK, "i", "i", "i", kind, kind, C)
    def add(e: Emit, b: Block, thread: I32, row: I32, step: I32, top: Real, total: Real,
            acc: Regs) -> Regs:  # fmt: skip
        """Add parts, each the result of its keys, times its share of the denominator: their sum cannot overflow."""
        zero, factor = e.const(kind, 0.0), b.p.real("factor", kind)
        in_bounds, lane = b.exists(row), thread & 31
        share = e.select(total.equals(0.0), zero, e.const(kind, 1.0) / total)
        parts = []
        for n in range(AT_ONCE):
            part = (step * AT_ONCE + n) * warps + (thread >> 5)
            at, inside = b.part_at(part, row, size), in_bounds & (part < b.p.int("splits"))
            begins = [e.load(kind, at + i * size, where=inside) for i in (0, 1)]
            values = [e.load(kind, at + e.wide(lane + 32 * i + HEAD) * size, where=inside) for i in range(own)]
            parts.append((inside, begins, values))
        for inside, (maximum, denominator), values in parts:
            weight = e.select(inside, e.exp2((maximum - top) * factor) * denominator * share, zero)
            acc = [e.fma(weight, y, x) for x, y in zip(acc, values, strict=True)]
        return acc

    @macro("", "i", "i", C)
    def leave(e: Emit, base: I32, thread: I32, acc: Regs) -> None:
        at = base + ((thread >> 5) * shared.pitch + shared.sums)
        for n, x in enumerate(acc):
            e.store_shared(kind, at + ((thread & 31) + 32 * n) * size, [x])

    @macro("", BLOCK, "i", "i", "i", kind, kind)
    def write(
        e: Emit, b: Block, base: I32, thread: I32, row: I32, top: Real,
        total: Real,
    ) -> None:  # fmt: skip
        i, head = b.find(row)
        in_bounds, valid = i < b.rows, i < b.span.rows
        apart = e.wide(head) if c.pack_gqa else e.const("l", 0)
        zero = e.const(kind, 0.0)

        def summed(n: I32) -> Real:
            x = e.load_shared(kind, base + (n * size + shared.sums))
            for warp in range(1, warps):
                x = x + e.load_shared(kind, base + (n * size + (shared.sums + warp * shared.pitch)))
            return x

        some = (total > 0.0) | e.is_nan(total)
        half, bad = HALVES.get(c.result), e.const("i", 0)
        for n in range(-(-c.Ev // threads)):
            feature = thread + n * threads
            inside = feature < c.Ev
            y = e.select(valid & some, summed(e.select(inside, feature, feature - feature)), zero)
            bad = bad | not_finite(e, [y])
            address = b.places["out"] + apart * b.p.out_head + e.wide(i) * b.p.out_row
            y = e.to_half(half, y) if half else y
            where = in_bounds & inside & (feature < b.p.int("Ev"))
            e.store(KINDS[c.result], address + e.wide(feature) * b.p.out_column, [y], where)
        of_row = e.select(some & valid, lse(e, top, total, b.p.real("unit", kind)), e.const(kind, -math.inf))
        address = b.places["lse"] + apart * b.p.lse_head + e.wide(i) * b.p.lse_row
        e.store(kind, address, [of_row], in_bounds & thread.equals(0) & (b.p.lse > 0))
        if c.flags:  # the flag is 0 before, and every thread that stores here stores 1
            b.mark(row, e.const("i", 1), in_bounds & (bad > 0))

    def kernel(integers, reals):  # type: ignore[no-untyped-def]
        parameters = integers, reals
        base = shared_address(cuda.shared.array(0, np.uint8))
        thread = np.int32(cuda.threadIdx.x)
        if sliced:
            parameters, _ = find_slab(parameters, np.int32(cuda.blockIdx.z))
        block, row, steps = find_row(parameters, np.int32(cuda.blockIdx.x), np.int32(cuda.blockIdx.y))
        find_sums(block, base, thread, row)
        cuda.syncthreads()
        top, total, acc = begin(parameters, base)
        for step in range(steps):
            acc = add(block, thread, row, np.int32(step), top, total, acc)
        leave(base, thread, acc)
        cuda.syncthreads()
        write(block, base, thread, row, top, total)

    return kernel
