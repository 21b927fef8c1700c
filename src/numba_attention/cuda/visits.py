"""Block masks: which tiles of columns a tile of rows visits, and which of their pairs are visible.

The list of a tile of rows has runs of tiles of `WIDTH` columns, ascending: the first, the one after the last, which
words say what is visible in each of them (0: everything), and the head of the group, by which runs of several heads
follow one another where rows are keys. A word says of one column which rows see it, bit by bit. Intervals clip a list:
what lies before their first column or beyond the last is passed over.
"""

from .blocks import Block, Lanes
from .emit import I32, Emit, Macro, Packed, Regs, Target
from .parameters import FAR
from .spec import Spec

WIDTH = 64
RUN = 16  # bytes of a run


def row_bytes(rows: int) -> int:
    """Bytes of the word of one column: a bit for each of so many rows."""
    return max(4, rows // 8)


def aligned(column: I32) -> I32:
    """The first column of the tile of a list that a column is in."""
    return column & -WIDTH


def make_visits(c: Spec, on: Target, BLOCK: Packed, lanes: Lanes) -> tuple[Macro, Macro, Macro]:
    """Make the macros that find a list, read a run of it, and hide what its words do not show."""
    product, columns = lanes.product, c.columns
    S = f"{product.kind}{len(lanes.layout)}"
    assert WIDTH % columns == 0 or not c.lists

    @on.macro("i i", BLOCK)
    def list_of(e: Emit, b: Block) -> tuple[I32, I32]:
        """The run before the first of the list of a block, and the one after the last."""
        of_head = e.wide(b.index) * b.p.list_heads + e.wide(b.head)
        number = e.load_constant("l", b.p.list_first + of_head * 8) + e.wide(b.first // c.rows)
        at = b.p.list_starts + number * 8
        return e.narrow(e.load_constant("l", at)) - 1, e.narrow(e.load_constant("l", at + 8))

    @on.macro("i i i i", BLOCK, "i", "i", "i")
    def visit(e: Emit, b: Block, turn: I32, last: I32, begin: I32) -> tuple[I32, I32, I32, I32]:
        """First column of a run, not before `begin`, the one after its last, words and head; all far at the end."""
        there, far = turn < last, e.const("i", FAR)
        first, stop, words, head = e.load("i", b.p.list_runs + e.wide(turn) * RUN, 4, there)
        return (
            e.select(there, e.max(first * WIDTH, begin), far), e.select(there, stop * WIDTH, far), words,
            e.select(there, head, far),
        )  # fmt: skip

    @on.macro(S, BLOCK, "i", "i", "i", S)
    def show(e: Emit, b: Block, thread: I32, j: I32, words: I32, s: Regs) -> Regs:
        """Hide the pairs whose bits are not set."""
        thread = e.opaque(thread)
        rows, pitch = lanes.rows(thread), row_bytes(c.rows)
        first = (j & (WIDTH - 1)) + product.lane_column(thread & 31)
        # Rows of a thread are in one group of 32: those of a warp begin at a multiple of their number.
        at = b.p.list_words + (e.wide(words) * WIDTH + e.wide(first)) * pitch + e.wide((rows[0] >> 5) * 4)
        bits = {n: e.load_constant("i", at + n * pitch) for n in dict.fromkeys(n for _, n in lanes.layout.elements)}
        low = product.hidden(e) if product.nan_safe else e.const(product.kind, float("-inf"))
        places = [row & 31 for row in rows]
        return [
            e.select(((bits[n] >> places[slot]) & 1) > 0, x, low)
            for (slot, n), x in zip(lanes.layout.elements, s, strict=True)
        ]

    return list_of, visit, show
