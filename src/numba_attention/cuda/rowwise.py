"""Small kernels around the backward pass: delta, gradients of sinks, sums over broadcast axes, rounding of dQ."""

import math

import numpy as np

from .blocks import Block, block_of
from .emit import I32, I64, SIZES, Emit, KernelFunction, Real, Regs, Target
from .formats import HALVES, KINDS, read
from .parameters import AXES, PARAMETERS, Parameters
from .products import Layout
from .results import not_finite, write_row
from .softmax import LOG2E, is_far
from .spec import Spec

NAMES = ("out", "grad_out", "lse", "grad_lse", "delta", "sum_query", "grad_query")


WHOLE = 8  # numbers of a half type in 16 bytes
TOGETHER = 4  # elements that a thread converts: it reads 16 bytes


def kind_of(storage: str) -> str:
    return "d" if storage == "float64" else "f"


def make_delta(c: Spec, on: Target) -> KernelFunction:
    """Make the kernel of delta = rowsum(dO O) - dlse; its grid is tiles of `rows_of` rows, and heads.

    It also writes the offset of the row (`blocks.FACTS`), and flags whether any lse does not determine its denominator.
    ``fused_dq``: it clears a row of the sums of the gradient of queries too.
    """
    cuda, macro = on.cuda, on.macro
    kind = kind_of(c.storage)

    @macro("", PARAMETERS, "i", "i", "i")
    def row(e: Emit, p: Parameters, x: I32, head: I32, thread: I32) -> None:
        b, i, lane = _row_of_lanes(e, c, p, x, head, thread)
        in_bounds, total = i < b.span.rows, e.const(kind, 0.0)
        lanes, whole = lanes_of(c), c.aligned and c.storage in HALVES  # 16 bytes at once
        each = WHOLE if whole else 1
        for n in range(-(-c.Ev // (lanes * each))):
            feature = (lane + lanes * n) * each
            inside = in_bounds & (feature < p.int("Ev"))
            operands: list[Regs] = []
            for name in ("out", "grad_out"):
                at = b.places[name] + e.wide(i) * getattr(p, f"{name}_row")
                at = at + e.wide(feature) * getattr(p, f"{name}_column")
                if whole:
                    words = e.load("i", at, 4, where=inside)
                    operands.append([y for word in words for y in e.unpack(HALVES[c.storage], word)])
                else:
                    operands.append([read(e, c.storage, at, inside)])
            for a, z in zip(*operands, strict=True):
                total = e.fma(a, z, total)
        for distance in _distances(lanes):
            total = total + e.shuffle_xor(total, distance)
        has_grad_lse = in_bounds & (p.grad_lse > 0)
        total = total - e.load(kind, b.places["grad_lse"] + e.wide(i) * p.grad_lse_row, where=has_grad_lse)
        lse = e.load(kind, b.places["lse"] + e.wide(i) * p.lse_row, where=in_bounds)
        offset = e.select(lse.equals(-math.inf), e.const(kind, 0.0), lse * -LOG2E)
        at, own, zero = b.places["delta"] + e.wide(i) * p.delta_row, in_bounds & lane.equals(0), e.const(kind, 0.0)
        facts, together = [total, offset, zero, zero], 16 // SIZES[kind]
        for n in range(0, len(facts), together):
            e.store(kind, at + n * SIZES[kind], facts[n : n + together], own)
        e.store("i", p.far, [e.const("i", 1)], own & is_far(e, lse))
        if c.fused_dq:
            for n in range(-(-c.E // (4 * lanes))):
                feature = (lane + lanes * n) * 4
                at = sums_of_row(c, b, i, feature) + e.wide(feature % PART) * 4
                e.store(kind, at, [zero] * 4, (i < b.rows) & (feature < c.E))

    def kernel(integers, reals):  # type: ignore[no-untyped-def]
        parameters = integers, reals
        row(parameters, np.int32(cuda.blockIdx.x), np.int32(cuda.blockIdx.y), np.int32(cuda.threadIdx.x))

    return kernel


def lanes_of(c: Spec) -> int:
    """How many lanes share a row: as many as read 16 bytes each of a row of a half type, or a warp."""
    if c.storage not in HALVES or (c.task == "delta" and not c.aligned):
        return 32
    lanes, features = 1, c.Ev if c.task == "delta" else c.E
    while lanes < 32 and lanes * WHOLE < features:
        lanes *= 2
    return lanes


def rows_of(c: Spec) -> int:
    """How many rows a block has."""
    return c.threads // lanes_of(c)


def _distances(lanes: int) -> list[int]:
    """Of the lanes that share a row, for a sum by shuffles."""
    return [n for n in (16, 8, 4, 2, 1) if n < lanes]


def _row_of_lanes(e: Emit, c: Spec, p: Parameters, x: I32, head: I32, thread: I32) -> tuple[Block, I32, I32]:
    """Sequence and row of a thread, and its number among those of the row."""
    tiles, lanes = p.int("tiles"), lanes_of(c)
    index, i = x // tiles, x % tiles * rows_of(c) + thread // lanes
    return block_of(e, c, p, NAMES, index, e.const("i", 0), head), i, thread % lanes


# Sums of dQ for wgmma (`Spec.in_parts`): 64 features of all rows of a head, then the next 64. Of 16 features, those of
# a thread of wgmma lie side by side: 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. In odd rows, each 16 change places with the
# next, so that what eight threads write to shared memory at once lies in different banks.
PART = 64
TURN = 64  # bytes of 16 sums


def sums_of_row(c: Spec, b: Block, i: I32, feature: I32) -> I64:
    """Where the sums of dQ of a row begin that have the part of a feature."""
    e, p = b.e, b.p
    apart = p.sum_query_head // -(-c.E // PART) if c.in_parts else e.const("l", 4 * PART)
    return b.places["sum_query"] + e.wide(i) * p.sum_query_row + e.wide(feature // PART) * apart


def place_in_part(feature: I32, row: I32) -> I32:
    """Where the sum of an even feature is among those of its part."""
    place = (feature & -16) + ((feature & 6) << 1) + ((feature & 8) >> 2)
    return place ^ (row & 1) * (TURN // 4)


def make_round(c: Spec, on: Target) -> KernelFunction:
    """Make the kernel that rounds the sums of the gradient of queries to its type; its grid is that of `make_delta`."""
    cuda, macro = on.cuda, on.macro

    @macro("", PARAMETERS, "i", "i", "i")
    def row(e: Emit, p: Parameters, x: I32, head: I32, thread: I32) -> None:
        b, i, lane = _row_of_lanes(e, c, p, x, head, thread)
        lanes, in_bounds, bad = lanes_of(c), i < b.rows, e.const("i", 0)
        target = b.places["grad_query"] + e.wide(i) * p.grad_query_row
        # A thread stores 16 bytes at once.
        part = Layout(1, tuple((0, n) for n in range(WHOLE)), WHOLE if c.result in HALVES else WHOLE // 2)
        for n in range(-(-c.E // (WHOLE * lanes))):
            feature = (lane + lanes * n) * WHOLE
            source, values = sums_of_row(c, b, i, feature), []
            for more in range(0, WHOLE, 2 if c.in_parts else 4):
                at = (feature + more) % PART
                at = place_in_part(at, i) if c.in_parts else at
                values += e.load("f", source + e.wide(at) * 4, 2 if c.in_parts else 4,
                                 where=in_bounds & (feature < c.E))  # fmt: skip
            if c.in_parts:
                values = [y * p.real("rest", "f") for y in values]
            bad = bad | not_finite(e, values)
            write_row(e, c.result, c.aligned, part, list(range(WHOLE)), values, target, p.grad_query_column, feature,
                      p.int("E"), in_bounds)  # fmt: skip
        if c.flags:
            for distance in _distances(lanes):
                bad = bad | e.shuffle_xor(bad, distance)
            b.mark(i, bad, in_bounds & lane.equals(0))

    def kernel(integers, reals):  # type: ignore[no-untyped-def]
        parameters = integers, reals
        row(parameters, np.int32(cuda.blockIdx.x), np.int32(cuda.blockIdx.y), np.int32(cuda.threadIdx.x))

    return kernel


def make_sinks(c: Spec, on: Target) -> KernelFunction:
    """Make the kernel of the gradient of sinks, each one more key whose value is 0; a block for each head."""
    cuda, macro, shared_address = on.cuda, on.macro, on.shared()
    kind, threads = kind_of(c.storage), c.threads
    size = 8 if kind == "d" else 4

    @macro("i i", PARAMETERS)
    def counts(e: Emit, p: Parameters) -> tuple[I32, I32]:
        return p.int("number"), p.int("inner_tiles")

    @macro(kind, PARAMETERS, "i", "i", "i", "i", kind)
    def add(e: Emit, p: Parameters, index: I32, turn: I32, head: I32, thread: I32, total: Real) -> Real:
        b = block_of(e, c, p, NAMES, index, e.const("i", 0), head)
        i = turn * threads + thread
        in_bounds = i < b.span.rows
        lse = e.load(kind, b.places["lse"] + e.wide(i) * p.lse_row, where=in_bounds)
        at = b.places["delta"] + e.wide(i) * p.delta_row
        delta, offset, top = (e.load(kind, at + n * SIZES[kind], where=in_bounds) for n in range(3))
        weight = e.exp2(e.fma(b.sink(head, kind) - top, p.real("factor", kind), offset))
        # Infinite lse: beside an infinite sum the sink has weight 0, as in a row without keys or sink (lse -inf).
        weighs = in_bounds & e.is_finite(lse) & (weight > 0.0)
        return e.select(weighs, total - weight * delta, e.select(in_bounds & e.is_nan(lse), lse, total))

    @macro("", "i", "i", kind)
    def leave(e: Emit, base: I32, thread: I32, x: Real) -> None:
        e.store_shared(kind, base + thread * size, [x])

    @macro("", PARAMETERS, "i", "i", "i")
    def finish(e: Emit, p: Parameters, base: I32, head: I32, thread: I32) -> None:
        total = e.loop(threads, [e.const(kind, 0.0)], lambda n, s: [s[0] + e.load_shared(kind, base + n * size)])[0]
        e.store(kind, p.partial + e.wide(head) * size, [total], thread.equals(0))

    @macro(kind)
    def zero(e: Emit) -> Real:
        return e.const(kind, 0.0)

    def kernel(integers, reals):  # type: ignore[no-untyped-def]
        parameters = integers, reals
        base = shared_address(cuda.shared.array(0, np.uint8))
        thread, head = np.int32(cuda.threadIdx.x), np.int32(cuda.blockIdx.x)
        number, turns = counts(parameters)
        total = zero()
        for index in range(number):
            for turn in range(turns):
                total = add(parameters, np.int32(index), np.int32(turn), head, thread, total)
        leave(base, thread, total)
        cuda.syncthreads()
        finish(parameters, base, head, thread)

    return kernel


def make_reduce(c: Spec, on: Target) -> KernelFunction:
    """Make the kernel that sums an array over some axes and converts: a thread for each element of the result.

    Its integers are of its own kind: source, target, elements, terms, and for each of `AXES` kept axes size, source
    and target stride, for each of as many summed axes size and stride. ``aligned``: no axis is summed, and both arrays
    are contiguous, at multiples of 16 bytes: a thread converts `TOGETHER` elements.
    """
    if c.aligned:
        return _make_convert(c, on)
    cuda, macro = on.cuda, on.macro
    of, to = c.storage, c.to
    kind, threads = "d" if "float64" in (of, to) else "f", c.threads

    @macro(f"l l i {kind}", f"l{4 + 5 * AXES}", "i", "i")
    def begin(e: Emit, n: Regs, x: I32, thread: I32) -> tuple[I64, I64, I32, Real]:
        index = e.wide(x) * threads + e.wide(thread)
        in_bounds = index < n[2]
        source, target, rest = n[0], n[1], e.select(in_bounds, index, index - index)
        for axis in range(AXES):
            size, a, b = n[4 + 3 * axis : 7 + 3 * axis]
            source, target, rest = source + rest % size * a, target + rest % size * b, rest // size
        return source, e.select(in_bounds, target, target - target), e.narrow(n[3]), e.const(kind, 0.0)

    @macro(kind, f"l{4 + 5 * AXES}", "l", "l", "i", kind)
    def add(e: Emit, n: Regs, source: I64, target: I64, term: I32, total: Real) -> Real:
        rest = e.wide(term)
        for axis in range(AXES):
            size, a = n[4 + 3 * AXES + 2 * axis : 6 + 3 * AXES + 2 * axis]
            source, rest = source + rest % size * a, rest // size
        return total + e.convert(kind, read(e, of, source, target > 0))

    @macro("", "l", kind)
    def finish(e: Emit, target: I64, total: Real) -> None:
        x = total if to == "float64" else e.convert("f", total)
        x = e.to_half(HALVES[to], x) if to in HALVES else x
        e.store(KINDS[to], target, [x], target > 0)

    def kernel(integers, reals):  # type: ignore[no-untyped-def]
        source, target, terms, total = begin(integers, np.int32(cuda.blockIdx.x), np.int32(cuda.threadIdx.x))
        for term in range(terms):
            total = add(integers, source, target, np.int32(term), total)
        finish(target, total)

    return kernel


def _make_convert(c: Spec, on: Target) -> KernelFunction:
    """Make the kernel of `make_reduce` that converts float32 to a half type."""
    cuda, macro, threads = on.cuda, on.macro, c.threads

    @macro("", f"l{4 + 5 * AXES}", "i", "i")
    def convert(e: Emit, n: Regs, x: I32, thread: I32) -> None:
        first = (e.wide(x) * threads + e.wide(thread)) * TOGETHER
        inside = first < n[2]
        numbers = e.load("f", n[0] + first * 4, TOGETHER, where=inside)
        words = [e.pack(HALVES[c.to], *numbers[i : i + 2]) for i in range(0, TOGETHER, 2)]
        e.store("i", n[1] + first * 2, words, inside)

    def kernel(integers, reals):  # type: ignore[no-untyped-def]
        convert(integers, np.int32(cuda.blockIdx.x), np.int32(cuda.threadIdx.x))

    return kernel
