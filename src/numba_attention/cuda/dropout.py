"""Dropout on registers: which weights of a tile are kept, with the random bits of `philox`.

A thread of m16n8 fragments holds all keys of a group of a row, so that one counter serves eight weights. Where rows are
keys, it holds two or four of them, and computes as many more counters.
"""

from .. import philox
from .blocks import Block, Lanes
from .emit import I32, Emit, Pred, Real, Regs
from .parameters import Sequence
from .products import Product


def _signed(constant: int) -> int:
    return constant - 2**32 if constant >= 2**31 else constant


def _kept(e: Emit, word: I32, key: I32, threshold: I32) -> Pred:
    """Whether the half of a word for a key, the low one for even keys, is at least the threshold."""
    return ((word >> ((key & 1) << 4)) & 0xFFFF) >= threshold


def kept(b: Block, lanes: Lanes, thread: I32, column: I32, head: I32 | None = None) -> list[Pred]:
    """Whether each weight of the tile that begins at a column is kept; where rows are keys, of query head `head`."""
    e, product, layout = b.e, lanes.product, lanes.layout
    s, threshold = Sequence(e, b.p, b.index), b.p.int("dropout")
    thread = e.opaque(thread)
    # The key of each round is a sum of 64 bits, of which the low half counts.
    seed = b.p.seed
    keys = philox.round_keys((seed & 0xFFFFFFFF, seed >> 32), lambda word, constant: word + constant)
    round_keys = [(e.narrow(first), e.narrow(second)) for first, second in keys]
    # The first key of a block of a larger problem is a multiple of 32: places in a group are those in the block.
    first_key, first_head = b.p.int("first_key"), s.int("head") + b.p.int("first_head")
    offset, first_group, batch = s.int("offset") + first_key, first_key >> 3, s.int("number")

    def words(position: I32, group: I32, of_head: I32) -> Regs:
        counter = position + offset, group + first_group, of_head + first_head, batch
        return philox.philox(counter, round_keys, lambda x, constant: e.multiply_wide(x, _signed(constant)))

    first = product.lane_column(thread & 31) + column
    made: dict[tuple[int, ...], Regs] = {}
    result = []
    if head is None:
        places = [b.find(b.first + row) for row in lanes.rows(thread)]
        # A tile that begins at a multiple of 32 has word 0 of a block first; one of 16 columns, word 0 or 2.
        halves = b.c.columns % philox.BLOCK != 0
        for slot, n in layout.elements:
            which = slot, n // 32, n % 8 // 2
            if which not in made:
                group = ((column >> 5) + n // 32) * 4 + (product.lane_column(thread & 31) >> 1) + n % 8 // 2
                made[which] = words(places[slot][0], group, places[slot][1])
            word = made[which][n // 8 % 4]
            if halves:
                word = e.select((column & 16) > 0, made[which][(n // 8 + 2) % 4], word)
            result.append(_kept(e, word, first + n, threshold))
        return result
    of_head = b.head * b.p.int("group") + head
    rows = [b.first + row for row in lanes.rows(thread)]
    # The rows of a warp begin at a multiple of their number. Rows of a thread that are a multiple of eight apart, in
    # one block of so many, have one group.
    block = min(product.rows, philox.BLOCK)
    for slot, n in layout.elements:
        like = product.slot_row(slot) // block * block + product.slot_row(slot) % 8
        if (like, n) not in made:
            key = rows[slot]
            made[like, n] = words(first + n, (key >> 5) * 4 + ((key >> 1) & 3), of_head)
        a = made[like, n]
        key = rows[slot]
        low, high = e.select((key & 8) > 0, a[1], a[0]), e.select((key & 8) > 0, a[3], a[2])
        result.append(_kept(e, e.select((key & 16) > 0, high, low), key, threshold))
    return result


def drop(e: Emit, product: Product, weights: Regs, kept: list[Pred]) -> Regs:
    """Weights that are dropped become 0, but for those of what is hidden, which stay `products.HIDDEN`."""
    zero = e.const(product.kind, 0.0)
    dropped = [e.select(product.is_hidden(e, x), x, zero) if product.nan_safe else zero for x in weights]
    return [e.select(keep, x, y) for keep, x, y in zip(kept, weights, dropped, strict=True)]


def first_of_block(key: I32) -> I32:
    """The first key of the block of a key, at which a tile begins."""
    return key & -philox.BLOCK


def mark(e: Emit, weight: Real, kept: Pred) -> Real:
    """A weight with its sign set where it is dropped, which takes no register."""
    integer, size = ("i", 32) if weight.kind == "f" else ("l", 64)
    bits = e.bits(integer, weight) & 2 ** (size - 1) - 1
    return e.bits(weight.kind, e.select(kept, bits, bits | -(2 ** (size - 1))))


def is_dropped(e: Emit, weight: Real) -> Pred:
    """Whether `mark` has set the sign of a weight."""
    return e.bits("i" if weight.kind == "f" else "l", weight) < 0


def unmark(e: Emit, weight: Real) -> Real:
    """The weight that multiplies: 0 where it is dropped."""
    return e.select(is_dropped(e, weight), e.const(weight.kind, 0.0), weight)
