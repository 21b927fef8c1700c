"""Merges the results of a row over disjoint sets of keys, each weighted by its share of the denominator; its gradient.

Some lanes of a warp own a row, as many as read it once, 16 bytes each. The first loads, of several parts, are issued
before anything waits for one of them. One kernel serves any number of parts. It counts to find the arrays of a part
where it can: two parts have two addresses, those of a stacked array a distance. Otherwise it finds them through a table
in memory.
"""

import math
from dataclasses import dataclass

import numpy as np

from .emit import I32, I64, Emit, KernelFunction, Packed, Pred, Real, Regs, Target
from .formats import HALVES, KINDS, SIZES
from .softmax import LOG2E
from .spec import Spec
from .tiles import CHUNK

AXES = 3  # of rows, at most
SCATTERED = 4  # elements that a lane reads at a time where they are not neighbours
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


def lanes_of(features: int, storage: str) -> int:
    """How many lanes of a warp share a row whose chunks of 16 bytes are read whole."""
    chunks = -(-features * SIZES[storage] // CHUNK)
    return min(32, 1 << max(chunks - 1, 0).bit_length())


@dataclass(frozen=True)
class Place:
    """Which row a thread works on: its indices, whether there is one, and which of its lanes the thread is."""

    axes: list[I32]
    inside: I32
    lane: I32

    @property
    def exists(self) -> Pred:
        return self.inside > 0


def make_merge(c: Spec, on: Target) -> KernelFunction:
    """Make the kernel that merges, or the one of the gradient: parts of ``c.storage``, whose lse is of ``c.to``.

    Its grid is rows by blocks. ``c.across`` lanes share a row, ``c.slots`` parts are read at a time, and rows have
    ``c.columns`` axes. ``c.aligned``: rows have no gaps and begin at multiples of 16 bytes. ``c.paged``: the arrays of
    parts are found through the table.
    """
    cuda, macro = on.cuda, on.macro
    kind = "d" if "float64" in (c.storage, c.to) else "f"
    half, storage = HALVES.get(c.storage), KINDS[c.storage]
    each = CHUNK // SIZES[c.storage] if c.aligned else SCATTERED  # elements of a lane in a turn
    raw = "i" if half else storage  # a lane has these of a part in a turn
    loaded = CHUNK // 4 if half and c.aligned else each
    lanes, together, differentiates = c.across, c.slots, c.task == "merge_backward"
    of_lse, C, L, W = KINDS[c.to], f"{kind}{each}", f"{KINDS[c.to]}{together}", f"{raw}{loaded * together}"
    G = f"{raw}{loaded}"
    names, entries = integers_of(c.task), entry_of(ARRAYS[c.task])
    INTS = f"l{len(names)}"
    PLACE = Packed(
        (f"i{c.columns + 2}",), lambda e, x: Place(x[:-2], x[-2], x[-1]), lambda p: ([*p.axes, p.inside, p.lane],)
    )
    used = range(AXES - c.columns, AXES)  # axes of the rows

    def of(n: Regs, name: str) -> I64:
        return n[names.index(name)]

    def entry(e: Emit, n: Regs, part: I32, name: str, exists: Pred) -> I64:
        """An address or a stride of a part."""
        if c.paged:
            at = of(n, "table") + e.wide(part) * (8 * len(entries)) + 8 * entries.index(name)
            return e.load("l", at, where=exists)
        x = of(n, f"part_{name}")
        if name in ARRAYS[c.task]:
            x = x + e.wide(part) * (of(n, f"part_{name}_second") - x + of(n, f"part_{name}_step"))
        return x

    def row_of(e: Emit, n: Regs, name: str, place: Place, part: I32 | None = None, exists: Pred | None = None) -> I64:
        """The address of a row of an array, of a part or of the merged ones."""

        def number(name: str) -> I64:
            return of(n, name) if part is None or exists is None else entry(e, n, part, name, exists)

        at = number(name)
        for index, axis in zip(place.axes, used, strict=True):
            at = at + e.wide(index) * number(f"{name}_{axis}")
        return at

    def parts_of(e: Emit, n: Regs, first: I32, place: Place) -> list[tuple[I32, Pred]]:
        """The parts that are read at a time, and whether they and the row exist."""
        count = e.narrow(of(n, "parts"))
        return [(first + m, place.exists & (first + m < count)) for m in range(together)]

    @macro("i i", INTS)
    def counts(e: Emit, n: Regs) -> tuple[I32, I32]:
        per_turn = lanes * each
        turns = (e.narrow(of(n, "features")) + (per_turn - 1)) // per_turn
        return e.narrow(of(n, "parts")), e.max(turns, 1)  # the gradient of lse needs a turn without features too

    @macro(PLACE, INTS, "i", "i")
    def find(e: Emit, n: Regs, x: I32, thread: I32) -> Place:
        row = x * (c.threads // lanes) + thread // lanes
        inside = row < e.narrow(of(n, "rows"))
        row = e.select(inside, row, row - row)
        axes: list[I32] = []
        for axis in reversed(used[1:]):
            size = e.narrow(of(n, f"size_{axis}"))
            axes.insert(0, row % size)
            row = row // size
        return Place([row, *axes], e.select(inside, e.const("i", 1), e.const("i", 0)), thread % lanes)

    @macro(L, INTS, "i", PLACE)
    def read_logs(e: Emit, n: Regs, first: I32, place: Place) -> Regs:
        """The lse of some parts; -inf where there is no part."""
        logs = []
        for part, exists in parts_of(e, n, first, place):
            x = e.load(of_lse, row_of(e, n, "lse", place, part, exists), where=exists)
            logs.append(e.select(exists, x, e.const(of_lse, -math.inf)))
        return logs

    @macro(kind)
    def low(e: Emit) -> Real:
        return e.const(kind, -math.inf)

    @macro(kind)
    def zero(e: Emit) -> Real:
        return e.const(kind, 0.0)

    @macro(kind, L, kind)
    def highest(e: Emit, logs: Regs, top: Real) -> Real:
        for log in logs:
            top = e.max(top, e.convert(kind, log))
        return top

    @macro(kind, kind)
    def settle(e: Emit, top: Real) -> Real:
        """0 where every part is empty: exp(-inf - 0) is 0."""
        return e.select(top.equals(-math.inf), e.const(kind, 0.0), top)

    def share(e: Emit, log: Real, top: Real) -> Real:
        return e.exp2((e.convert(kind, log) - top) * LOG2E)

    @macro(kind, L, kind, kind)
    def add_shares(e: Emit, logs: Regs, top: Real, total: Real) -> Real:
        for log in logs:
            total = total + share(e, log, top)
        return total

    @macro("", INTS, PLACE, kind, kind)
    def write_lse(e: Emit, n: Regs, place: Place, top: Real, total: Real) -> None:
        x = top + e.log2(total) * (1 / LOG2E)
        at = row_of(e, n, "lse", place)
        e.store(of_lse, at, [e.convert(of_lse, x)], place.exists & place.lane.equals(0))

    @macro(C)
    def begin(e: Emit) -> Regs:
        return [e.const(kind, 0.0)] * each

    def features_of(place: Place, turn: I32) -> list[I32]:
        """The features that a lane has in a turn, or the first one of them if they are neighbours."""
        if c.aligned:
            return [(turn * lanes + place.lane) * each]
        return [turn * (lanes * each) + (place.lane + lanes * m) for m in range(each)]

    def read_row(e: Emit, n: Regs, at: I64, step: I64, place: Place, turn: I32, where: Pred) -> Regs:
        """What a lane has of a row in a turn, as it is in memory."""
        words: Regs = []
        for feature in features_of(place, turn):
            inside = where & (feature < e.narrow(of(n, "features")))
            if c.aligned:
                words += e.load(raw, at + e.wide(feature * SIZES[c.storage]), loaded, where=inside)
            else:
                words.append(e.load(storage, at + e.wide(feature) * step, where=inside))
        return words

    def numbers_of(e: Emit, words: Regs) -> Regs:
        if half is None:
            return [e.convert(kind, x) for x in words]
        return [e.convert(kind, x) for word in words for x in e.unpack(half, word)[: 2 if c.aligned else 1]]

    def of_parts(words: Regs) -> list[Regs]:
        return [words[m * loaded : (m + 1) * loaded] for m in range(together)]

    def write_row(e: Emit, n: Regs, at: I64, step: I64, place: Place, turn: I32, x: Regs, where: Pred) -> None:
        if half and not (kind == "d" and half == "f16"):
            x = [e.convert("f", y) for y in x]
        if not half:
            x = [e.convert(storage, y) for y in x]
        elif c.aligned and x[0].kind == "f":
            x = [e.pack(half, x[m], x[m + 1]) for m in range(0, each, 2)]
        else:
            x = [e.to_half(half, y) for y in x]
            if c.aligned:
                x = [x[m] | (x[m + 1] << 16) for m in range(0, each, 2)]
        for m, feature in enumerate(features_of(place, turn)):
            inside = where & (feature < e.narrow(of(n, "features")))
            if c.aligned:
                e.store(raw, at + e.wide(feature * SIZES[c.storage]), x, inside)
            else:
                e.store(storage, at + e.wide(feature) * step, [x[m]], inside)

    @macro(W, INTS, "i", "i", PLACE)
    def read_parts(e: Emit, n: Regs, first: I32, turn: I32, place: Place) -> Regs:
        words: Regs = []
        for part, exists in parts_of(e, n, first, place):
            at, step = row_of(e, n, "out", place, part, exists), e.const("l", 0)
            if not c.aligned:
                step = entry(e, n, part, "out_column", exists)
            words += read_row(e, n, at, step, place, turn, exists)
        return words

    @macro(C, L, W, kind, kind, C)
    def add(e: Emit, logs: Regs, words: Regs, top: Real, total: Real, acc: Regs) -> Regs:
        """Add parts times their weights; an empty part adds nothing, even if its rows are NaN."""
        for log, own in zip(logs, of_parts(words), strict=True):
            seen, weight = log.equals(-math.inf) ^ 1, share(e, log, top) / total
            acc = [e.select(seen, e.fma(weight, x, y), y) for x, y in zip(numbers_of(e, own), acc, strict=True)]
        return acc

    @macro("", INTS, "i", PLACE, C)
    def write(e: Emit, n: Regs, turn: I32, place: Place, acc: Regs) -> None:
        write_row(e, n, row_of(e, n, "out", place), of(n, "out_column"), place, turn, acc, place.exists)

    @macro(G, INTS, "i", PLACE)
    def read_gradient(e: Emit, n: Regs, turn: I32, place: Place) -> Regs:
        """The gradient of the merged row."""
        return read_row(e, n, row_of(e, n, "out", place), of(n, "out_column"), place, turn, place.exists)

    @macro(of_lse, INTS, PLACE)
    def read_gradient_of_lse(e: Emit, n: Regs, place: Place) -> Real:
        """The gradient of the merged lse; 0 where there is none."""
        return e.load(of_lse, row_of(e, n, "lse", place), where=place.exists & (of(n, "lse") > 0))

    @macro("", INTS, "i", "i", PLACE, L, W, kind, kind, C, G, of_lse)
    def differentiate(
        e: Emit, n: Regs, first: I32, turn: I32, place: Place, logs: Regs, words: Regs, top: Real, total: Real,
        merged: Regs, gradient: Regs, of_merged_lse: Real,
    ) -> None:  # fmt: skip
        """Store the gradients of parts; that of lse, of the turns so far."""
        zero, leads, grad = e.const(kind, 0.0), place.lane.equals(0), numbers_of(e, gradient)
        last = (turn + 1) * (lanes * each) >= e.narrow(of(n, "features"))
        given = e.select(last, e.convert(kind, of_merged_lse), zero)
        for (part, exists), log, own in zip(parts_of(e, n, first, place), logs, of_parts(words), strict=True):
            seen, weight = log.equals(-math.inf) ^ 1, share(e, log, top) / total
            sum_ = zero
            for x, y, g in zip(numbers_of(e, own), merged, grad, strict=True):
                sum_ = e.fma(g, x - y, sum_)
            for distance in (16, 8, 4, 2, 1):
                if distance < lanes:
                    sum_ = sum_ + e.shuffle_xor(sum_, distance)
            at, step = row_of(e, n, "grad_out", place, part, exists), e.const("l", 0)
            if not c.aligned:
                step = entry(e, n, part, "grad_out_column", exists)
            weighted = [e.select(seen, weight * g, zero) for g in grad]
            write_row(e, n, at, step, place, turn, weighted, exists)
            at = row_of(e, n, "grad_lse", place, part, exists)
            before = e.load(of_lse, at, where=exists & (turn > 0) & leads)
            sum_ = sum_ + e.convert(kind, before) + given
            result = e.select(seen, e.select(last, weight * sum_, sum_), zero)
            e.store(of_lse, at, [e.convert(of_lse, result)], exists & leads)

    def kernel(integers, reals):  # type: ignore[no-untyped-def]
        place = find(integers, np.int32(cuda.blockIdx.x), np.int32(cuda.threadIdx.x))
        parts, turns = counts(integers)
        # What is read once for all where parts and features are few; otherwise again in each loop.
        logs = read_logs(integers, np.int32(0), place)
        words = read_parts(integers, np.int32(0), np.int32(0), place)
        if differentiates:
            grad, of_merged_lse = read_gradient(integers, np.int32(0), place), read_gradient_of_lse(integers, place)
        top, total = low(), zero()
        top = highest(logs, top)
        for part in range(together, parts, together):
            logs = read_logs(integers, np.int32(part), place)
            top = highest(logs, top)
        top = settle(top)
        for part in range(0, parts, together):
            if parts > together:
                logs = read_logs(integers, np.int32(part), place)
            total = add_shares(logs, top, total)
        if not differentiates:
            write_lse(integers, place, top, total)
        for turn in range(turns):
            acc = begin()
            for part in range(0, parts, together):
                if parts > together or turn > 0:
                    logs = read_logs(integers, np.int32(part), place)
                    words = read_parts(integers, np.int32(part), np.int32(turn), place)
                acc = add(logs, words, top, total, acc)
            if not differentiates:
                write(integers, np.int32(turn), place, acc)
            else:
                if turn > 0:
                    grad = read_gradient(integers, np.int32(turn), place)
                for part in range(0, parts, together):
                    if parts > together:
                        logs = read_logs(integers, np.int32(part), place)
                        words = read_parts(integers, np.int32(part), np.int32(turn), place)
                    differentiate(
                        integers,
                        np.int32(part),
                        np.int32(turn),
                        place,
                        logs,
                        words,
                        top,
                        total,
                        acc,
                        grad,
                        of_merged_lse,
                    )

    return kernel


__all__ = ["ARRAYS", "AXES", "addresses_of", "entry_of", "integers_of", "lanes_of", "make_merge"]
