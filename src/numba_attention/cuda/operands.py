"""The operands of a product over features, A B^T: tiles in shared memory, whole or in slices of their features.

Head dimensions beyond those of tiles: A, the rows of a block, stays in shared memory, all of its slices one after the
other. Slices of B come into two slots in turn, each while the product of the one before is added to the scores in
registers, as in the loop over k of a matrix product. A thread has registers for the sums of at most 256 columns, a
slab of the result, so blocks share out the slabs of a row, and each of them computes the scores.
"""

from collections.abc import Callable

from .blocks import HEAD, Block
from .emit import I32, Emit, Regs
from .parameters import Parameters
from .products import Product
from .spec import Spec, lay_out
from .tiles import Tile


class Operands:
    """Where A and B are, and how they come there.

    Parameters
    ----------
    c : Spec
    names : tuple of str
        Of the arrays that are A and B.
    offset : int
        Where A begins in shared memory.
    slots : int
        Where the slots of B begin; behind A if it is None.
    first : int
        The slot of the first slice.
    """

    def __init__(
        self, c: Spec, names: tuple[str, str], offset: int = 0, slots: int | None = None, first: int = 0
    ) -> None:
        self.c, self.names, self.first = c, names, first
        of_values = names[0] in ("value", "grad_out")
        self.slices = c.Ev_slices if of_values else c.E_slices
        features = c.Ev if of_values and not c.is_sliced else c.E
        self.a = Tile(c.rows, features, c.compute, offset)
        self.all = Tile(c.rows * max(self.slices, 1), features, c.compute, offset)  # of A
        self.b = Tile(c.columns, features, c.compute, self.all.end if slots is None else slots)
        self.end = self.b.end + (self.b.bytes if self.slices else 0)

    def load_a(self, b: Block, base: I32, thread: I32, row: I32, most: I32) -> None:
        """Copy rows `row` to `most` of A."""
        if not self.slices:
            return b.load_tile(self.names[0], self.a, base, thread, row, most)

        def body(n: I32, state: Regs) -> Regs:
            at = base + n * self.a.bytes
            b.load_tile(self.names[0], self.a, at, thread, row, most, n * self.a.columns)
            return state

        b.e.loop(self._count(b), [], body)

    def _count(self, b: Block) -> I32:
        """The number of slices in a register, for a loop that is not unrolled: registers are for few addresses."""
        width = self.a.columns
        return (b.p.int("Ev" if self.names[0] in ("value", "grad_out") else "E") + (width - 1)) // width

    def load_b(self, b: Block, base: I32, thread: I32, row: I32, most: I32, n: I32 | None = None) -> None:
        """Copy rows `row` to `most` of B, or their slice n, the first one if it is None."""
        if self.slices:
            n = b.e.const("i", 0) if n is None else n
            base = base + ((n + self.first) & 1) * self.b.bytes
            return b.load_tile(self.names[1], self.b, base, thread, row, most, n * self.b.columns)
        b.load_tile(self.names[1], self.b, base, thread, row, most)

    def arrived(self, e: Emit) -> None:
        """Wait for what all threads copied."""
        if self.c.aligned:
            e.wait(0)
        e.sync_block()

    def scores(
        self, b: Block, product: Product, base: I32, thread: I32, row: I32, most: I32,
        beside: Callable[[], None] | None = None,
    ) -> Regs:  # fmt: skip
        """A B^T; of slices, the first one of B is there, and `beside` copies something beside the last product."""
        e, warp, lane = b.e, thread >> 5, thread & 31
        if not self.slices:
            return product.scores(e, self.a, self.b, base, warp, lane)

        def add(n: I32, s: Regs) -> Regs:
            at, slot = n * self.a.bytes, ((n + self.first) & 1) * self.b.bytes
            return product.add_scores(e, s, self.a, self.b, base + at, warp, lane, slot - at)

        def body(n: I32, s: Regs) -> Regs:
            self.load_b(b, base, thread, row, most, n + 1)
            b.commit()
            s = add(n, s)
            self.arrived(e)
            return s

        s = [e.const(product.kind, 0.0)] * len(product.layout(self.c.columns))
        if self.slices > 1:
            s = e.loop(self._count(b) - 1, s, body)
        if beside is not None:
            beside()
        return add(e.const("i", self.slices - 1), s)


def both(c: Spec, a: tuple[str, str], b: tuple[str, str]) -> tuple[Operands, Operands]:
    """The operands of S and of dP: rows of a block, names `a`, and what it visits, `b`; slices share two slots.

    Those of dP begin with the slot that the last ones of S do not use, so that they can come beside its product.
    """
    if not c.is_sliced:
        kept = c.compute
        tiles = lay_out((c.rows, c.E, kept), (c.rows, c.Ev, kept), (c.columns, c.E, kept))
        return Operands(c, (a[0], b[0]), 0, tiles[2].offset), Operands(c, (a[1], b[1]), tiles[1].offset, tiles[2].end)
    s = Operands(c, (a[0], b[0]))
    of_value = s.all.end
    slots = Tile(c.rows * c.Ev_slices, c.E, c.compute, of_value).end
    return (
        Operands(c, (a[0], b[0]), 0, slots),
        Operands(c, (a[1], b[1]), of_value, slots, c.E_slices & 1),
    )


def own_slab(e: Emit, c: Spec, p: Parameters, z: I32) -> tuple[Parameters, I32]:
    """The parameters of a slab of the forward pass, as if its values were all there are; and the part of the keys.

    The lse of a row is stored by the first slab.
    """
    slab, part = z % c.slabs, z // c.slabs
    feature = e.wide(slab) * c.Ev
    size = 8 if c.compute == "float64" else 4
    heads = p.heads // p.group if c.pack_gqa else p.heads
    sums = p.splits * p.number * heads * p.flag_rows * ((c.Ev + HEAD) * size)
    return p.with_(
        value=p.value + feature * p.value_column, out=p.out + feature * p.out_column, Ev=p.Ev - feature,
        lse=e.select(slab.equals(0), p.lse, p.lse - p.lse), partial=p.partial + e.wide(slab) * sums,
    ), part  # fmt: skip
