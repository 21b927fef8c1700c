"""Joins what several blocks made of the keys of a row, in the order of the keys: the same call has the same bits."""

import math
from typing import Any

import numpy as np

from .blocks import FORWARD, HEAD, NUMBERS, Block, place
from .config import Config
from .parameters import TYPES, Parameters
from .softmax import LN2
from .tiles import HALVES, KINDS

PLACES = f"l{len(FORWARD)}"


def make_combine(c: Config, on: Any) -> Any:
    """Make the kernel; its grid is rows of all sequences, and heads. A thread has every so-manieth feature of a row."""
    cuda, macro = on.cuda, on.macro
    kind = "d" if c.storage == "float64" else "f"
    size, threads = 8 if kind == "d" else 4, c.threads
    own = -(-c.Ev // threads)  # features of a thread
    C = f"{kind}{own}"

    @macro(f"{PLACES} {NUMBERS} i i", *TYPES, "i", "i")
    def find_row(e: Any, integers: Any, reals: Any, x: Any, head: Any) -> Any:
        p = Parameters(e, integers, reals)
        rows = p.int("flag_rows")
        places, numbers = place(e, c, p, FORWARD, x // rows, e.const("i", 0), head)
        return places, numbers, x % rows, p.int("splits")

    @macro(kind, *TYPES, NUMBERS, "i", "i", kind)
    def highest(e: Any, integers: Any, reals: Any, numbers: Any, row: Any, part: Any, top: Any) -> Any:
        b = Block(e, c, integers, reals, FORWARD, None, numbers)
        return e.max(top, e.load(kind, b.part_at(part, row, size), where=b.exists(row)))

    @macro(f"{kind} {C}", *TYPES, NUMBERS, "i", "i", "i", kind, kind, C)
    def add(e: Any, integers: Any, reals: Any, numbers: Any, thread: Any, row: Any, part: Any, top: Any, total: Any,
            acc: Any) -> Any:  # fmt: skip
        b = Block(e, c, integers, reals, FORWARD, None, numbers)
        at, there = b.part_at(part, row, size), b.exists(row)
        base = e.select(top > -math.inf, top, e.const(kind, 0.0))
        weight = e.exp2(e.load(kind, at, where=there) - base)
        total = e.fma(weight, e.load(kind, at + size, where=there), total)
        made = []
        for n, x in enumerate(acc):
            feature = thread + n * threads
            y = e.load(kind, at + e.wide(feature + HEAD) * size, where=there & (feature < c.Ev))
            made.append(e.fma(weight, y, x))
        return total, made

    @macro("", *TYPES, PLACES, NUMBERS, "i", "i", kind, kind, C)
    def write(e: Any, integers: Any, reals: Any, places: Any, numbers: Any, thread: Any, row: Any, top: Any, total: Any,
              acc: Any) -> None:  # fmt: skip
        b = Block(e, c, integers, reals, FORWARD, places, numbers)
        i, head = b.find(row)
        there, valid = i < b.rows, i < b.span.rows
        apart = e.wide(head) if c.stacked else e.const("l", 0)
        zero = e.const(kind, 0.0)
        some = (total > 0.0) | e.is_nan(total)
        half, bad = HALVES.get(c.storage), e.const("i", 0)
        for n, x in enumerate(acc):
            feature = thread + n * threads
            y = e.select(valid & some, x / total, zero)
            bad = bad | e.select(e.is_finite(y), e.const("i", 0), e.const("i", 1))
            address = (
                b.places["out"] + apart * b.p.out_head + e.wide(i) * b.p.out_row + e.wide(feature) * b.p.out_column
            )
            y = e.to_half(half, y) if half else y
            e.store(KINDS[c.storage], address, [y], there & (feature < b.p.int("Ev")))
        lse = e.select(some & valid, (top + e.log2(total)) * LN2, e.const(kind, -math.inf))
        address = b.places["lse"] + apart * b.p.lse_head + e.wide(i) * b.p.lse_row
        e.store(kind, address, [lse], there & thread.equals(0) & (b.p.lse > 0))
        if c.flags:  # zero before; all who write write 1
            b.mark(row, e.const("i", 1), there & (bad > 0))

    @macro("", *TYPES, NUMBERS, "i", "i")
    def clear(e: Any, integers: Any, reals: Any, numbers: Any, thread: Any, row: Any) -> None:
        b = Block(e, c, integers, reals, FORWARD, None, numbers)
        e.store("i", b.flag_at(row), [e.const("i", 0)], b.exists(row) & thread.equals(0))

    @macro(f"{kind} {kind} {C}")
    def begin(e: Any) -> Any:
        zero = e.const(kind, 0.0)
        return e.const(kind, -math.inf), zero, [zero] * own

    flags = c.flags

    def kernel(integers, reals):  # type: ignore[no-untyped-def]
        thread = np.int32(cuda.threadIdx.x)
        places, numbers, row, splits = find_row(integers, reals, np.int32(cuda.blockIdx.x), np.int32(cuda.blockIdx.y))
        if flags:
            clear(integers, reals, numbers, thread, row)
            cuda.syncthreads()
        top, total, acc = begin()
        for part in range(splits):
            top = highest(integers, reals, numbers, row, np.int32(part), top)
        for part in range(splits):
            total, acc = add(integers, reals, numbers, thread, row, np.int32(part), top, total, acc)
        write(integers, reals, places, numbers, thread, row, top, total, acc)

    return kernel
