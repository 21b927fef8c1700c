"""Merges the results of a row over disjoint sets of keys, each weighted by its share of the denominator; its gradient.

A warp owns a row. One kernel serves any number of parts. It counts to find the arrays of a part where it can: two
parts have two addresses, those of a stacked array a distance. Otherwise it finds them through a table in memory.
"""

import math
from typing import Any

import numpy as np

from .emit import I32, I64, Emit, KernelFunction, Pred, Real, Regs, Target
from .formats import HALVES, KINDS, read
from .softmax import LOG2E
from .spec import Spec

AXES = 3  # of rows
AT_ONCE = 4  # elements of a lane in flight
PLACE = ("i",) * (AXES + 1)  # the indices of a row, and whether there is one
# Arrays of each part, and after them their gradients. The merged ones are called as those of a part; those that the
# gradient kernel has in their place are gradients too.
ARRAYS = {"merge": ("out", "lse"), "merge_backward": ("out", "lse", "grad_out", "grad_lse")}


def entry_of(arrays: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the address and strides of arrays, as they follow one another in the table."""
    columns = {"out": ("out_column",), "grad_out": ("grad_out_column",)}
    return tuple(name for x in arrays for name in (x, *(f"{x}_{axis}" for axis in range(AXES)), *columns.get(x, ())))


def integers_of(task: str) -> tuple[str, ...]:
    """Names of the integers of a kernel: the merged arrays, sizes, and what is the same for all parts or counted."""
    counted = tuple(f"{x}_{which}" for x in ARRAYS[task] for which in ("second", "step"))
    parts = tuple(f"part_{name}" for name in (*entry_of(ARRAYS[task]), *counted))
    sizes = tuple(f"size_{axis}" for axis in range(1, AXES))
    return ("table", *entry_of(ARRAYS["merge"]), *sizes, "parts", "rows", "features", *parts)


def addresses_of(task: str) -> tuple[int, ...]:
    """Which of the integers are addresses."""
    arrays = [f"part_{x}{which}" for x in ARRAYS[task] for which in ("", "_second")]
    return tuple(map(integers_of(task).index, ("table", *ARRAYS["merge"], *arrays)))


def make_merge(c: Spec, on: Target) -> KernelFunction:
    """Make the kernel that merges, or the one of the gradient: parts of ``c.storage``, whose lse is of ``c.to``.

    Its grid is rows by warps.

    ``c.aligned``: of half types, rows have no gaps and begin at multiples of 4 bytes, and pairs are read at once.
    """
    cuda, macro = on.cuda, on.macro
    kind = "d" if "float64" in (c.storage, c.to) else "f"
    half = HALVES.get(c.storage)
    each = 2 if half and c.aligned else 1
    per_turn, warps = 32 * AT_ONCE * each, c.warps
    of_lse, C = KINDS[c.to], f"{kind}{AT_ONCE * each}"
    names, entries = integers_of(c.task), entry_of(ARRAYS[c.task])
    INTS = f"l{len(names)}"

    def of(n: Regs, name: str) -> I64:
        return n[names.index(name)]

    def entry(e: Emit, n: Regs, part: I32, name: str) -> I64:
        """An address or a stride of a part."""
        x, table = of(n, f"part_{name}"), of(n, "table")
        if name in ARRAYS[c.task]:
            x = x + e.wide(part) * (of(n, f"part_{name}_second") - x + of(n, f"part_{name}_step"))
        at = table + e.wide(part) * (8 * len(entries)) + 8 * entries.index(name)
        return e.select(table > 0, e.load("l", at, where=table > 0), x)

    def row_of(e: Emit, n: Regs, name: str, place: list[I32], part: I32 | None = None) -> I64:
        """The address of a row of an array, of a part or of the merged ones."""

        def number(name: str) -> I64:
            return of(n, name) if part is None else entry(e, n, part, name)

        at = number(name)
        for axis in range(AXES):
            at = at + e.wide(place[axis]) * number(f"{name}_{axis}")
        return at

    def log_of(e: Emit, n: Regs, part: I32, place: list[I32]) -> Real:
        """The lse of a part; -inf where there is no row."""
        at = row_of(e, n, "lse", place, part)
        x = e.convert(kind, e.load(of_lse, at, where=place[-1] > 0))
        return e.select(place[-1] > 0, x, e.const(kind, -math.inf))

    @macro("i i", INTS)
    def counts(e: Emit, n: Regs) -> tuple[I32, I32]:
        turns = (e.narrow(of(n, "features")) + (per_turn - 1)) // per_turn
        return e.narrow(of(n, "parts")), e.max(turns, 1)  # the gradient of lse needs a turn without features too

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
        x = top + e.log2(total) * (1 / LOG2E)
        at = row_of(e, n, "lse", place)
        e.store(of_lse, at, [e.convert(of_lse, x)], (place[-1] > 0) & (thread & 31).equals(0))

    @macro(C)
    def begin(e: Emit) -> Regs:
        return [e.const(kind, 0.0)] * (AT_ONCE * each)

    @macro(C, INTS, "i", "i", "i", *PLACE, kind, kind, C)
    def add(e: Emit, n: Regs, part: I32, turn: I32, thread: I32, *rest: Any) -> Regs:
        """Add a part times its weight; an empty part adds nothing, even if its rows are NaN."""
        *place, top, total, acc = rest
        log = log_of(e, n, part, place)
        seen, weight = log.equals(-math.inf) ^ 1, share(e, log, top) / total
        found = read_row(e, n, row_of(e, n, "out", place, part), entry(e, n, part, "out_column"), thread, turn, seen)
        return [e.select(seen, e.fma(weight, x, y), y) for x, y in zip(found, acc, strict=True)]

    def read_row(e: Emit, n: Regs, at: I64, step: I64, thread: I32, turn: I32, where: Pred) -> Regs:
        """The features of a row that a lane has in a turn."""
        found = []
        for feature in features_of(thread, turn):
            inside = where & (feature < e.narrow(of(n, "features")))
            address = at + e.wide(feature) * step
            if each == 2:
                assert half is not None
                found += list(e.unpack(half, e.load("i", address, where=inside)))
            else:
                found.append(read(e, c.storage, address, inside))
        return [e.convert(kind, x) for x in found]

    def features_of(thread: I32, turn: I32) -> list[I32]:
        return [(turn * (32 * AT_ONCE) + ((thread & 31) + 32 * m)) * each for m in range(AT_ONCE)]

    @macro("", INTS, "i", "i", *PLACE, C)
    def write(e: Emit, n: Regs, turn: I32, thread: I32, *rest: Any) -> None:
        *place, acc = rest
        write_row(e, n, row_of(e, n, "out", place), of(n, "out_column"), thread, turn, acc, place[-1] > 0)

    def write_row(
        e: Emit, n: Regs, at: I64, step: I64, thread: I32, turn: I32, acc: Regs, inside: Pred
    ) -> None:  # fmt: skip
        for m, feature in enumerate(features_of(thread, turn)):
            where = inside & (feature < e.narrow(of(n, "features")))
            address, part = at + e.wide(feature) * step, acc[each * m : each * (m + 1)]
            if half and not (kind == "d" and half == "f16"):
                part = [e.convert("f", x) for x in part]
            if half and each == 2 and part[0].kind == "f":
                e.store("i", address, [e.pack(half, *part)], where)
            elif half:
                words = [e.to_half(half, x) for x in part]
                e.store("h", address, words, where)
            else:
                e.store(KINDS[c.storage], address, [e.convert(KINDS[c.storage], x) for x in part], where)

    @macro(C, INTS, "i", "i", *PLACE)
    def gradient(e: Emit, n: Regs, turn: I32, thread: I32, *place: I32) -> Regs:
        """The gradient of the merged row."""
        at, there = row_of(e, n, "out", list(place)), place[-1] > 0
        return read_row(e, n, at, of(n, "out_column"), thread, turn, there)

    @macro("", INTS, "i", "i", "i", *PLACE, kind, kind, C, C)
    def differentiate(e: Emit, n: Regs, part: I32, turn: I32, thread: I32, *rest: Any) -> None:
        """Store the gradients of a part; that of lse, of the turns so far."""
        *place, top, total, merged, grad = rest
        log, there = log_of(e, n, part, place), place[-1] > 0
        seen, weight, zero = log.equals(-math.inf) ^ 1, share(e, log, top) / total, e.const(kind, 0.0)
        at, step = row_of(e, n, "out", place, part), entry(e, n, part, "out_column")
        sum_ = zero
        for x, y, g in zip(read_row(e, n, at, step, thread, turn, seen), merged, grad, strict=True):
            sum_ = e.fma(g, x - y, sum_)
        for distance in (16, 8, 4, 2, 1):
            sum_ = sum_ + e.shuffle_xor(sum_, distance)
        at, step = row_of(e, n, "grad_out", place, part), entry(e, n, part, "grad_out_column")
        weighted = [e.select(seen, weight * g, zero) for g in grad]
        write_row(e, n, at, step, thread, turn, weighted, there)
        at, lane = row_of(e, n, "grad_lse", place, part), (thread & 31).equals(0)
        before = e.load(of_lse, at, where=there & (turn > 0) & lane)
        of_merged = of(n, "lse")
        last = (turn + 1) * per_turn >= e.narrow(of(n, "features"))
        given = e.load(of_lse, row_of(e, n, "lse", place), where=there & last & (of_merged > 0))
        sum_ = sum_ + e.convert(kind, before) + e.convert(kind, given)
        result = e.select(seen, e.select(last, weight * sum_, sum_), zero)
        e.store(of_lse, at, [e.convert(of_lse, result)], there & lane)

    def merge(integers, reals):  # type: ignore[no-untyped-def]
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

    def merge_backward(integers, reals):  # type: ignore[no-untyped-def]
        thread = np.int32(cuda.threadIdx.x)
        a, b, d, inside = find(integers, np.int32(cuda.blockIdx.x), thread)
        parts, turns = counts(integers)
        top, total = low(), zero()
        for part in range(parts):
            top = highest(integers, np.int32(part), a, b, d, inside, top)
        top = settle(top)
        for part in range(parts):
            total = add_share(integers, np.int32(part), a, b, d, inside, top, total)
        for turn in range(turns):
            acc = begin()
            for part in range(parts):
                acc = add(integers, np.int32(part), np.int32(turn), thread, a, b, d, inside, top, total, acc)
            grad = gradient(integers, np.int32(turn), thread, a, b, d, inside)
            for part in range(parts):
                differentiate(integers, np.int32(part), np.int32(turn), thread, a, b, d, inside, top, total, acc, grad)

    return merge if c.task == "merge" else merge_backward


__all__ = ["ARRAYS", "AXES", "addresses_of", "entry_of", "integers_of", "make_merge"]
