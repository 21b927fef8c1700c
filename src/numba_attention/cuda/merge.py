"""Merges the results of a row over disjoint sets of keys: each part is weighted by its share of the denominator.

A warp owns a row. The parts are found through a table in memory, so that one kernel serves any number of them.
"""

import math
from typing import Any

import numpy as np

from .emit import I32, I64, Emit, KernelFunction, Real, Regs, Target
from .formats import HALVES, KINDS, read
from .softmax import LOG2E
from .spec import Spec

AXES = 3  # of rows
# Addresses and strides of a part, in the table, and of the results.
PART = ("out", *(f"out_{n}" for n in range(AXES)), "out_column", "lse", *(f"lse_{n}" for n in range(AXES)))
INTEGERS = ("table", *PART, *(f"size_{n}" for n in range(1, AXES)), "parts", "rows", "features")
ADDRESSES = tuple(map(INTEGERS.index, ("table", "out", "lse")))
INTS = f"l{len(INTEGERS)}"
AT_ONCE = 4  # elements of a lane in flight
PLACE = ("i",) * (AXES + 1)  # the indices of a row, and whether there is one


def make_merge(c: Spec, on: Target) -> KernelFunction:
    """Make the kernel: parts of ``c.storage``, whose lse is of ``c.to``; its grid is rows by warps.

    ``c.aligned``: of half types, rows have no gaps and begin at multiples of 4 bytes, and pairs are read at once.
    """
    cuda, macro = on.cuda, on.macro
    kind = "d" if "float64" in (c.storage, c.to) else "f"
    half = HALVES.get(c.storage)
    each = 2 if half and c.aligned else 1
    per_turn, warps = 32 * AT_ONCE * each, c.warps

    def of(n: Regs, name: str) -> I64:
        return n[INTEGERS.index(name)]

    def entry(e: Emit, n: Regs, part: I32, name: str) -> I64:
        return e.load_constant("l", of(n, "table") + e.wide(part) * (8 * len(PART)) + 8 * PART.index(name))

    def log_of(e: Emit, n: Regs, part: I32, place: list[I32]) -> Real:
        """The lse of a part; -inf where there is no row."""
        at = entry(e, n, part, "lse")
        for axis in range(AXES):
            at = at + e.wide(place[axis]) * entry(e, n, part, f"lse_{axis}")
        x = e.convert(kind, e.load("d" if c.to == "float64" else "f", at, where=place[-1] > 0))
        return e.select(place[-1] > 0, x, e.const(kind, -math.inf))

    @macro("i i", INTS)
    def counts(e: Emit, n: Regs) -> tuple[I32, I32]:
        return e.narrow(of(n, "parts")), (e.narrow(of(n, "features")) + (per_turn - 1)) // per_turn

    @macro(" ".join(PLACE), INTS, "i", "i")
    def find(e: Emit, n: Regs, x: I32, thread: I32) -> list[I32]:
        row = x * warps + (thread >> 5)
        inside = row < e.narrow(of(n, "rows"))
        row = e.select(inside, row, row - row)
        place: list[I32] = []
        for axis in range(AXES - 1, 0, -1):
            size = e.narrow(of(n, f"size_{axis}"))
            place.insert(0, row % size)
            row = row // size
        return [row, *place, e.select(inside, e.const("i", 1), e.const("i", 0))]

    @macro(kind)
    def low(e: Emit) -> Real:
        return e.const(kind, -math.inf)

    @macro(kind)
    def zero(e: Emit) -> Real:
        return e.const(kind, 0.0)

    @macro(kind, INTS, "i", *PLACE, kind)
    def highest(e: Emit, n: Regs, part: I32, *rest: I32) -> Real:
        *place, top = rest
        return e.max(top, log_of(e, n, part, place))

    @macro(kind, kind)
    def settle(e: Emit, top: Real) -> Real:
        """0 where every part is empty: exp(-inf - 0) is 0."""
        return e.select(top.equals(-math.inf), e.const(kind, 0.0), top)

    def share(e: Emit, log: Real, top: Real) -> Real:
        return e.exp2((log - top) * LOG2E)

    @macro(kind, INTS, "i", *PLACE, kind, kind)
    def add_share(e: Emit, n: Regs, part: I32, *rest: I32) -> Real:
        *place, top, total = rest
        return total + share(e, log_of(e, n, part, place), top)

    @macro("", INTS, "i", *PLACE, kind, kind)
    def write_lse(e: Emit, n: Regs, thread: I32, *rest: I32) -> None:
        *place, top, total = rest
        at = of(n, "lse")
        for axis in range(AXES):
            at = at + e.wide(place[axis]) * of(n, f"lse_{axis}")
        x = top + e.log2(total) * (1 / LOG2E)
        of_lse = "d" if c.to == "float64" else "f"
        e.store(of_lse, at, [e.convert(of_lse, x)], (place[-1] > 0) & (thread & 31).equals(0))

    C = f"{kind}{AT_ONCE * each}"

    @macro(C)
    def begin(e: Emit) -> Regs:
        return [e.const(kind, 0.0)] * (AT_ONCE * each)

    @macro(C, INTS, "i", "i", "i", *PLACE, kind, kind, C)
    def add(e: Emit, n: Regs, part: I32, turn: I32, thread: I32, *rest: Any) -> Regs:
        """Add a part times its weight; an empty part adds nothing, even if its rows are NaN."""
        *place, top, total, acc = rest
        log = log_of(e, n, part, place)
        seen, weight = log.equals(-math.inf) ^ 1, share(e, log, top) / total
        at = entry(e, n, part, "out")
        for axis in range(AXES):
            at = at + e.wide(place[axis]) * entry(e, n, part, f"out_{axis}")
        step, found = entry(e, n, part, "out_column"), []
        for feature in features_of(thread, turn):
            inside = seen & (feature < e.narrow(of(n, "features")))
            address = at + e.wide(feature) * step
            if each == 2:
                assert half is not None
                found += list(e.unpack(half, e.load("i", address, where=inside)))
            else:
                found.append(e.convert(kind, read(e, c.storage, address, inside)))
        return [e.select(seen, e.fma(weight, e.convert(kind, x), y), y) for x, y in zip(found, acc, strict=True)]

    def features_of(thread: I32, turn: I32) -> list[I32]:
        return [(turn * (32 * AT_ONCE) + ((thread & 31) + 32 * m)) * each for m in range(AT_ONCE)]

    @macro("", INTS, "i", "i", *PLACE, C)
    def write(e: Emit, n: Regs, turn: I32, thread: I32, *rest: Any) -> None:
        *place, acc = rest
        at = of(n, "out")
        for axis in range(AXES):
            at = at + e.wide(place[axis]) * of(n, f"out_{axis}")
        for m, feature in enumerate(features_of(thread, turn)):
            where = (place[-1] > 0) & (feature < e.narrow(of(n, "features")))
            address, part = at + e.wide(feature) * of(n, "out_column"), acc[each * m : each * (m + 1)]
            if half and not (kind == "d" and half == "f16"):
                part = [e.convert("f", x) for x in part]
            if half and each == 2 and part[0].kind == "f":
                e.store("i", address, [e.pack(half, *part)], where)
            elif half:
                words = [e.to_half(half, x) for x in part]
                e.store("h", address, words, where)
            else:
                e.store(KINDS[c.storage], address, [e.convert(KINDS[c.storage], x) for x in part], where)

    def kernel(integers, reals):  # type: ignore[no-untyped-def]
        thread = np.int32(cuda.threadIdx.x)
        a, b, d, inside = find(integers, np.int32(cuda.blockIdx.x), thread)
        parts, turns = counts(integers)
        top, total = low(), zero()
        for part in range(parts):
            top = highest(integers, np.int32(part), a, b, d, inside, top)
        top = settle(top)
        for part in range(parts):
            total = add_share(integers, np.int32(part), a, b, d, inside, top, total)
        write_lse(integers, thread, a, b, d, inside, top, total)
        for turn in range(turns):
            acc = begin()
            for part in range(parts):
                acc = add(integers, np.int32(part), np.int32(turn), thread, a, b, d, inside, top, total, acc)
            write(integers, np.int32(turn), thread, a, b, d, inside, acc)

    return kernel


__all__ = ["ADDRESSES", "AXES", "INTEGERS", "PART", "make_merge"]
