"""Stores rows of registers to global memory, and tells whether they are finite."""

from .emit import I32, I64, Emit, Pred, Regs
from .formats import HALVES, KINDS, SIZES
from .products import Layout


def not_finite(e: Emit, numbers: Regs) -> I32:
    """1 if any of some numbers is NaN or infinite, else 0."""
    finite = e.is_finite(numbers[0])
    for x in numbers[1:]:
        finite = finite & e.is_finite(x)
    return e.select(finite, e.const("i", 0), e.const("i", 1))


def write_row(
    e: Emit, storage: str, aligned: bool, layout: Layout, registers: list[int], x: Regs, address: I64, column: I64,
    first: I32, width: I32, in_bounds: Pred,
) -> None:  # fmt: skip
    """Store some registers of a row, by number, with the values x; their lane begins at feature `first`.

    ``aligned``: the row has no gaps, and neighbours may be stored together.
    """
    size, half = SIZES[storage], HALVES.get(storage)
    if not aligned:
        for n, y in zip(registers, x, strict=True):
            feature = first + layout.elements[n][1]
            y = e.to_half(half, e.convert("f", y)) if half else y
            e.store(KINDS[storage], address + e.wide(feature) * column, [y], in_bounds & (feature < width))
        return
    group = layout.neighbours
    for n in range(0, len(registers), group):
        feature, part = first + layout.elements[registers[n]][1], x[n : n + group]
        where = in_bounds & (feature < width)
        if half:
            part = [e.pack(half, part[i], part[i + 1]) for i in range(0, group, 2)]
        e.store("i" if half else KINDS[storage], address + e.wide(feature * size), part, where)
