"""The two products of attention on tiles in shared memory, three ways: tensor cores, FMA, and float32 on tensor cores.

`scores` makes A B^T of a tile of rows (queries) and a tile of columns (keys), `add` makes ``C += P B`` of what
`scores` gave and a tile (values). A warp owns whole rows of P and C, a thread some of their elements: which, its
`Layout` says. Everything else - softmax, masks, the algorithms - knows layouts and not what multiplies.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from .emit import I32, Emit, Pred, Real, Regs
from .formats import HALVES, KINDS, SIZES
from .tiles import CHUNK, Place, Tile

HIDDEN = 0x7FC0DEAD  # bits of a float32 NaN that no arithmetic produces: the weight of what must not be multiplied


@dataclass(frozen=True)
class Layout:
    """The elements of a tile that a thread holds: (slot, column) for each register, from where its lane begins."""

    slots: int  # rows of a thread
    elements: tuple[tuple[int, int], ...]
    neighbours: int  # registers in a row that are neighbours in memory

    def __len__(self) -> int:
        return len(self.elements)

    def of_slot(self, slot: int) -> list[int]:
        return [n for n, (row, _) in enumerate(self.elements) if row == slot]


class Product(ABC):
    """What multiplies: how a warp holds scores and sums, and makes them."""

    kind: str  # of scores and sums
    storage: str  # of tiles
    rows: int  # of a warp
    slots: int  # rows of a thread
    reduce: tuple[int, ...]  # the distances of lanes that share a row
    scratch = 0  # bytes of shared memory for each warp
    at = 0  # its byte offset
    nan_safe = False  # whether weights that are `HIDDEN` are not multiplied

    def set_columns(self, columns: int) -> None:  # noqa: B027 (not every product has to)
        """Prepare for scores of so many columns."""

    @abstractmethod
    def slot_row(self, slot: int) -> int:
        """The row of a slot, from the first one of its lane."""

    @abstractmethod
    def lane_row(self, lane: I32) -> I32:
        """The first row of a lane."""

    @abstractmethod
    def lane_column(self, lane: I32) -> I32:
        """Of scores; the first column of a lane."""

    @abstractmethod
    def lane_feature(self, lane: I32) -> I32:
        """Of sums; the first column of a lane."""

    @abstractmethod
    def layout(self, columns: int) -> Layout:
        """Of scores with so many columns."""

    @abstractmethod
    def features(self, columns: int) -> Layout:
        """Of sums with so many columns."""

    @abstractmethod
    def scores(self, e: Emit, a: Tile, b: Tile, base: I32, warp: I32, lane: I32, shift: I32 | int = 0) -> Regs:
        """A B^T; B lies `shift` bytes behind its tile."""

    def add_scores(self, e: Emit, s: Regs, a: Tile, b: Tile, base: I32, warp: I32, lane: I32, shift: I32) -> Regs:
        """S + A B^T, whose sum over the features of these tiles is rounded apart: long chains of sums drift."""
        own = self.scores(e, a, b, base, warp, lane, shift)
        return [x + y for x, y in zip(s, own, strict=True)]

    @abstractmethod
    def add(self, e: Emit, c: Regs, p: Regs, b: Tile, base: I32, warp: I32, lane: I32, shift: I32 | int = 0) -> Regs:
        """C + P B, of P as `scores` gives it."""

    def is_hidden(self, e: Emit, x: Real) -> Pred:
        """Whether a score or a weight is `HIDDEN`."""
        if self.kind == "f":
            return e.bits("i", x).equals(HIDDEN)
        return e.bits("l", x).equals(HIDDEN << 32)

    def hidden(self, e: Emit) -> Real:
        if self.kind == "f":
            return e.bits("f", e.const("i", HIDDEN))
        return e.bits("d", e.const("l", HIDDEN << 32))


class TensorCores(Product):
    """float16 and bfloat16: mma.sync m16n8k16, operands by ldmatrix (PTX ISA, "Matrix fragments for mma.m16n8k16")."""

    kind = "f"

    def __init__(self, storage: str, tiles: int = 1) -> None:
        self.storage, self.tiles = storage, tiles  # tiles of 16 rows for each warp
        self.rows, self.slots = 16 * tiles, 2 * tiles
        self.half = HALVES[storage]
        self.reduce = (1, 2)

    def slot_row(self, slot: int) -> int:
        return 8 * slot

    def lane_row(self, lane: I32) -> I32:
        return lane >> 2

    def lane_column(self, lane: I32) -> I32:
        return (lane & 3) * 2

    lane_feature = lane_column

    def layout(self, columns: int) -> Layout:
        elements = [
            (2 * m + slot, 8 * n + column)
            for m in range(self.tiles) for n in range(columns // 8) for slot in (0, 1) for column in (0, 1)
        ]  # fmt: skip
        return Layout(self.slots, tuple(elements), 2)

    features = layout  # of a sum has the same order

    def scores(self, e: Emit, a: Tile, b: Tile, base: I32, warp: I32, lane: I32, shift: I32 | int = 0) -> Regs:
        zero = e.const("f", 0.0)
        per_tile = b.rows // 2  # registers of a tile of 16 rows
        s = [[zero] * per_tile for _ in range(self.tiles)]
        rows = [a.row(base, warp * self.rows + (lane & 15), 16 * m) for m in range(self.tiles)]
        columns = [b.row(base + shift, (lane & 7) + (lane >> 4) * 8, 16 * n) for n in range(b.rows // 16)]
        for k in range(a.columns // 16):
            left = [e.load_matrices(a.chunk(place, lane >> 4, 2 * k), False) for place in rows]
            for n, place in enumerate(columns):
                right = e.load_matrices(b.chunk(place, (lane >> 3) & 1, 2 * k), False)
                for m in range(self.tiles):
                    for half in (0, 1):
                        at = slice(8 * n + 4 * half, 8 * n + 4 * half + 4)
                        s[m][at] = e.multiply(self.half, left[m], right[2 * half : 2 * half + 2], s[m][at])
        return [x for part in s for x in part]

    def add_scores(self, e: Emit, s: Regs, a: Tile, b: Tile, base: I32, warp: I32, lane: I32, shift: I32) -> Regs:
        """Column by column, so that registers are for all fragments of A, of few features, and few sums."""
        s, zero, per_tile, steps = list(s), e.const("f", 0.0), b.rows // 2, range(a.columns // 16)
        rows = [a.row(base, warp * self.rows + (lane & 15), 16 * m) for m in range(self.tiles)]
        left = [[e.load_matrices(a.chunk(place, lane >> 4, 2 * k), False) for k in steps] for place in rows]
        for n in range(b.rows // 16):
            place = b.row(base + shift, (lane & 7) + (lane >> 4) * 8, 16 * n)
            own = [[zero] * 8 for _ in rows]
            for k in steps:
                right = e.load_matrices(b.chunk(place, (lane >> 3) & 1, 2 * k), False)
                for m, sums in enumerate(own):
                    for half in (0, 1):
                        at = slice(4 * half, 4 * half + 4)
                        sums[at] = e.multiply(self.half, left[m][k], right[2 * half : 2 * half + 2], sums[at])
            for m, sums in enumerate(own):
                first = m * per_tile + 8 * n
                s[first : first + 8] = [x + y for x, y in zip(s[first : first + 8], sums, strict=True)]
        return s

    def add(self, e: Emit, c: Regs, p: Regs, b: Tile, base: I32, warp: I32, lane: I32, shift: I32 | int = 0) -> Regs:
        c = list(c)
        per_tile, wide = len(p) // self.tiles, len(c) // self.tiles
        packed = [e.pack(self.half, p[n], p[n + 1]) for n in range(0, len(p), 2)]
        for k in range(b.rows // 16):
            place = b.row(base + shift, lane & 15, 16 * k)
            for n in range(b.columns // 16):
                right = e.load_matrices(b.chunk(place, lane >> 4, 2 * n), True)
                for m in range(self.tiles):
                    left = packed[m * per_tile // 2 + 4 * k : m * per_tile // 2 + 4 * k + 4]
                    for half in (0, 1):
                        at = slice(m * wide + 8 * n + 4 * half, m * wide + 8 * n + 4 * half + 4)
                        c[at] = e.multiply(self.half, left, right[2 * half : 2 * half + 2], c[at])
        return c

    def leave(self, e: Emit, p: Regs, tile: Tile, base: I32, warp: I32, lane: I32) -> None:
        """Write what `scores` gave to a tile of its rows and columns, rounded."""
        per_tile = len(p) // self.tiles
        for m in range(self.tiles):
            for slot in (0, 1):
                place = tile.row(base, warp * self.rows + (lane >> 2), 16 * m + 8 * slot)
                for n in range(tile.columns // 8):
                    at = m * per_tile + 4 * n + 2 * slot
                    word = e.pack(self.half, p[at], p[at + 1])
                    e.store_shared("i", tile.chunk(place, 0, n) + (lane & 3) * 4, [word])

    def shares(self, rows: int, columns: int, warps: int) -> tuple[int, int]:
        """How warps share out a product: number of tiles of 16 rows, and of parts of the columns; some may be idle."""
        tiles = rows // 16
        parts = max(1, min(warps // tiles, columns // 16))
        while columns // 16 % parts:
            parts -= 1
        return tiles, parts

    def transposed(
        self, e: Emit, a: Tile, b: Tile, base: I32, warp: I32, lane: I32, warps: int
    ) -> tuple[Regs, I32, I32, Pred | None]:
        """A^T B, shared out among warps: 16 rows of it as `layout` has them, first row and column, and whether any.

        The last is None where every warp has some.
        """
        tiles, parts = self.shares(a.columns, b.columns, warps)
        tile, part, features = warp % tiles, warp // tiles, b.columns // parts
        zero = e.const("f", 0.0)
        sums = [zero] * (features // 2)
        first = (lane >> 4) + part * (features // 8)
        even = features // 8 & (features // 8 - 1) == 0  # then part and chunk number have no bit in common
        for k in range(a.rows // 16):
            place = a.row(base, (lane & 7) + (lane >> 4) * 8, 16 * k)
            left = e.load_matrices(a.chunk(place, ((lane >> 3) & 1) + tile * 2), True)
            place = b.row(base, lane & 15, 16 * k)
            for n in range(features // 16):
                chunk = b.chunk(place, first, 2 * n) if even else b.chunk(place, first + 2 * n)
                right = e.load_matrices(chunk, True)
                for half in (0, 1):
                    at = slice(8 * n + 4 * half, 8 * n + 4 * half + 4)
                    sums[at] = e.multiply(self.half, left, right[2 * half : 2 * half + 2], sums[at])
        return sums, tile * 16, part * features, None if tiles * parts == warps else part < parts


def to_tf32(e: Emit, x: Real) -> I32:
    """The nearest number of 10 bits of fraction, as 32 bits: by integers, in half as many instructions as cvt.rna."""
    return (e.bits("i", x) + 0x1000) & -0x2000


class TripleTF32(TensorCores):
    """float32 on tensor cores: each number as the sum of two of 10 bits, three of their four products.

    Tensor cores round sums towards zero, and long ones drift: they sum eight features of a score, or a tile of keys,
    from zero, and the rest is added by FADD. Ootomo and Yokota, "Recovering single precision accuracy from Tensor
    Cores while surpassing the FP32 theoretical peak performance", 2022, section 3.
    """

    def __init__(self, storage: str = "float32", tiles: int = 1) -> None:
        self.storage, self.tiles = "float32", tiles
        self.rows, self.slots = 16 * tiles, 2 * tiles
        self.reduce = (1, 2)

    def _split(self, e: Emit, x: Real) -> tuple[I32, I32]:
        """Round to 10 bits of fraction, and cut off the rest, in which a NaN stays one."""
        high = to_tf32(e, x)
        return high, e.bits("i", x - e.bits("f", high)) & -0x2000

    def _multiply(self, e: Emit, a: list[tuple[I32, I32]], b: list[tuple[I32, I32]], c: Regs) -> Regs:
        (a_high, a_low), (b_high, b_low) = ([[x[n] for x in pairs] for n in (0, 1)] for pairs in (a, b))
        c = e.multiply("tf32", a_low, b_high, c)
        c = e.multiply("tf32", a_high, b_low, c)
        return e.multiply("tf32", a_high, b_high, c)

    def scores(self, e: Emit, a: Tile, b: Tile, base: I32, warp: I32, lane: I32, shift: I32 | int = 0) -> Regs:
        row, word = lane >> 2, (lane & 3) * 4
        left = [a.row(base, warp * self.rows + row, 8 * n) for n in range(self.slots)]
        right = [b.row(base + shift, row, 8 * n) for n in range(b.rows // 8)]
        per_tile = b.rows // 2

        def body(k: I32, s: Regs) -> Regs:
            def read(tile: Tile, place: Place, chunk: int) -> tuple[I32, I32]:
                return self._split(e, e.load_shared("f", tile.chunk(place, k * 2 + chunk) + word))

            s = list(s)
            rows = [
                [read(a, left[2 * m + slot], chunk) for chunk in (0, 1) for slot in (0, 1)] for m in range(self.tiles)
            ]
            for n, place in enumerate(right):
                column = [read(b, place, chunk) for chunk in (0, 1)]
                for m in range(self.tiles):
                    at = slice(m * per_tile + 4 * n, m * per_tile + 4 * n + 4)
                    product = self._multiply(e, rows[m], column, [e.const("f", 0.0)] * 4)
                    s[at] = [x + y for x, y in zip(s[at], product, strict=True)]
            return s

        return e.loop(a.columns // 8, [e.const("f", 0.0)] * (per_tile * self.tiles), body)

    def add(self, e: Emit, c: Regs, p: Regs, b: Tile, base: I32, warp: I32, lane: I32, shift: I32 | int = 0) -> Regs:
        # Layout without shuffles: the order of the summed index is free. Index t of a step of 8 is row 2t of B, and
        # t + 4 is row 2t + 1, which is where the accumulator layout has the columns of P.
        c, zero = list(c), [e.const("f", 0.0)] * 4
        per_tile, wide, steps = len(p) // self.tiles, len(c) // self.tiles, range(b.rows // 8)
        rows = [[b.row(base + shift, (lane & 3) * 2 + odd, 8 * k) for odd in (0, 1)] for k in steps]
        left = [
            [[self._split(e, p[m * per_tile + 4 * k + n]) for n in (0, 2, 1, 3)] for k in steps]
            for m in range(self.tiles)
        ]
        for n in range(b.columns // 8):
            sums = [zero] * self.tiles
            for k in steps:
                right = [
                    self._split(e, e.load_shared("f", b.chunk(place, lane >> 4, 2 * n) + ((lane >> 2) & 3) * 4))
                    for place in rows[k]
                ]
                sums = [self._multiply(e, left[m][k], right, total) for m, total in enumerate(sums)]
            for m, total in enumerate(sums):
                at = slice(m * wide + 4 * n, m * wide + 4 * n + 4)
                c[at] = [x + y for x, y in zip(c[at], total, strict=True)]
        return c


class Simt(Product):
    """float32 and float64 by FMA: a warp is a grid of lanes, each with some rows and columns at a stride.

    With one lane across, a thread has its rows to itself: no shuffles, so that this runs in Numba's simulator too.
    ``nan_safe``: weights that are `HIDDEN` are not multiplied, so that NaN in what a row does not see cannot reach it.
    """

    def __init__(self, storage: str, slots: int = 4, across: int = 8, nan_safe: bool = False) -> None:
        self.storage = "float64" if storage == "float64" else "float32"
        self.kind, self.size = KINDS[self.storage], SIZES[self.storage]
        self.slots, self.across, self.nan_safe = slots, across, nan_safe
        self.down = 32 // across
        self.rows = self.down * slots
        self.reduce = tuple(n for n in (1, 2, 4, 8, 16) if n < across)
        self.per_chunk = CHUNK // self.size

    def set_columns(self, columns: int) -> None:
        """Weights go through shared memory, a row with a gap after it."""
        self.pitch = (columns + 2 * self.per_chunk) * self.size
        self.scratch = self.rows * self.pitch

    def slot_row(self, slot: int) -> int:
        return self.down * slot

    def lane_row(self, lane: I32) -> I32:
        return lane // self.across

    def lane_column(self, lane: I32) -> I32:
        return lane % self.across

    def lane_feature(self, lane: I32) -> I32:
        return lane % self.across * self.per_chunk

    def layout(self, columns: int) -> Layout:
        elements = [(slot, self.across * n) for slot in range(self.slots) for n in range(columns // self.across)]
        return Layout(self.slots, tuple(elements), 1)

    def features(self, columns: int) -> Layout:
        elements = [
            (slot, (n * self.across) * self.per_chunk + part)
            for slot in range(self.slots) for n in range(columns // (self.across * self.per_chunk))
            for part in range(self.per_chunk)
        ]  # fmt: skip
        return Layout(self.slots, tuple(elements), self.per_chunk)

    def scores(self, e: Emit, a: Tile, b: Tile, base: I32, warp: I32, lane: I32, shift: I32 | int = 0) -> Regs:
        first = warp * self.rows + self.lane_row(lane)
        column = self.lane_column(lane)
        rows = [a.row_and(base, first, self.slot_row(slot)) for slot in range(self.slots)]
        columns = [b.row_and(base + shift, column, self.across * n) for n in range(b.rows // self.across)]

        def body(k: I32, s: Regs) -> Regs:
            left = [e.load_shared(self.kind, a.chunk(place, k), self.per_chunk) for place in rows]
            right = [e.load_shared(self.kind, b.chunk(place, k), self.per_chunk) for place in columns]
            sums = []
            for slot in range(self.slots):
                for n in range(len(columns)):
                    x = s[slot * len(columns) + n]
                    for y, z in zip(left[slot], right[n], strict=True):
                        x = e.fma(y, z, x)
                    sums.append(x)
            return sums

        zero = e.const(self.kind, 0.0)
        return e.loop(a.chunks, [zero] * (self.slots * len(columns)), body)

    def add(self, e: Emit, c: Regs, p: Regs, b: Tile, base: I32, warp: I32, lane: I32, shift: I32 | int = 0) -> Regs:
        layout = self.layout(b.rows)
        own = base + (warp * self.scratch + self.lane_row(lane) * self.pitch + self.at)
        e.sync_warp()  # the warp has read its weights of the previous tile
        for x, (slot, column) in zip(p, layout.elements, strict=True):
            at = own + (self.lane_column(lane) + column) * self.size + self.slot_row(slot) * self.pitch
            e.store_shared(self.kind, at, [x])
        e.sync_warp()
        chunks = b.columns // (self.across * self.per_chunk)

        def body(k: I32, sums: Regs) -> Regs:
            sums = list(sums)
            weights = [
                e.load_shared(self.kind, own + self.slot_row(slot) * self.pitch + k * CHUNK, self.per_chunk)
                for slot in range(self.slots)
            ]
            for part in range(self.per_chunk):
                place = b.row_and(base + shift, k * self.per_chunk, part)
                for n in range(chunks):
                    address = b.chunk(place, self.lane_column(lane), n * self.across)
                    values = e.load_shared(self.kind, address, self.per_chunk)
                    for slot in range(self.slots):
                        for i, value in enumerate(values):
                            at = (slot * chunks + n) * self.per_chunk + i
                            sums[at] = self._add(e, weights[slot][part], value, sums[at])
            return sums

        return e.loop(b.rows // self.per_chunk, c, body)

    def _add(self, e: Emit, weight: Real, value: Real, total: Real) -> Real:
        summed = e.fma(weight, value, total)
        return e.select(self.is_hidden(e, weight), total, summed) if self.nan_safe else summed
