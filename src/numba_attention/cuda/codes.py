"""Products of tensor cores with the codes of a quantized cache, which are converted in registers.

For the few rows of a decoding step, where one warp reads each code once. A code of 8 bits is exact in float16 and in
bfloat16, so its scale is left out of the conversion: a scale is a power of two, which the conversion has for nothing,
times a rest near 1. The rest of a key multiplies its scores, and that of a value its weights, both in float32. With the
power in the operand, both products have the range of the numbers that codes stand for.

Two codes make a pair of half types without a permutation of bytes: bytes 0 and 2 of a word, and bytes 1 and 3. The
order of the features in a sum is free, so queries are stored in that of the pairs. Sums have four features side by side
in a thread.
"""

from dataclasses import dataclass, replace

from .emit import I32, Emit, Real, Regs
from .products import Layout, TensorCores
from .staging import Codes
from .tiles import Tile

GROUP = 64  # bytes that a row of codes is filled up to, so that chunks are swizzled
_SIGNS = -0x7FFF8000  # 0x80008000


@dataclass(frozen=True)
class Power:
    """How the power of two of a scale is stored in 16 bits, from the exponent field F of the float32 scale."""

    least: int  # F is at least and at most
    most: int
    add: int  # makes it the exponent field of the half type
    shift: int  # of that field
    more: int = 0  # bits set beside it
    even: bool = False  # F is rounded down to an even number
    unit: int = 254  # the rest of the scale is the scale times 2**(unit - 127 - F)


# int8 in float16: 1024 + 128 with another exponent, so that code + 128 in its low bits makes the code greater.
# int8 in bfloat16: 128 with another exponent, whose lowest bit is 0 and takes the sign bit of the code: 256.
# float8: the power of two that makes up for the difference of exponent biases too, which the bits are multiplied by.
POWERS = {
    ("int8", "f16"): Power(103, 132, -102, 10, more=0x80),
    ("int8", "bf16"): Power(0, 244, 8, 7, even=True, unit=253),
    ("float8_e4m3fn", "f16"): Power(105, 134, -104, 10),
    ("float8_e4m3fn", "bf16"): Power(0, 134, 120, 7),
}


@dataclass(frozen=True)
class Multiplied(Codes):
    """A tile of codes that `CodeProducts` reads; behind the scales, which become their rests, are their powers."""

    @property
    def powers(self) -> int:
        """Where the powers are, 4 bytes for each row."""
        return self.scales + 4 * self.rows

    @property
    def end(self) -> int:
        return self.powers + 4 * self.rows


def filled(features: int) -> int:
    """The columns of a tile of codes for so many features."""
    return -(-features // GROUP) * GROUP


def split_scales(e: Emit, codes: Tile, half: str, base: I32, thread: I32, threads: int, are_keys: bool) -> None:
    """Replace scales in shared memory by their rests, and store their powers: 16 bits of a row, of keys twice."""
    assert isinstance(codes, Multiplied)
    form = POWERS[codes.storage, half]
    if are_keys and half == "f16":  # products of float16 with codes do not overflow, and small keys would be rounded
        form = replace(form, least=127, most=127)
    for n in range(-(-codes.rows // threads)):
        row = thread + n * threads
        inside = None if codes.rows % threads == 0 else row < codes.rows
        row = row if inside is None else e.select(inside, row, row - row)
        at = base + row * 4 + codes.scales
        scale = e.load_shared("f", at)
        field = e.min(e.max((e.bits("i", scale) >> 23) & (0xFE if form.even else 0xFF), form.least), form.most)
        rest = scale * e.bits("f", (form.unit - field) << 23)
        power = ((field + form.add) << form.shift) | form.more
        e.store_shared("f", at, [rest], inside)
        if are_keys:
            e.store_shared("i", base + row * 4 + codes.powers, [power | (power << 16)], inside)
        else:
            e.store_shared("h", base + row * 2 + codes.powers, [power], inside)


def convert(e: Emit, storage: str, half: str, word: I32, power: I32) -> tuple[I32, I32]:
    """Two pairs of half types, each code times its power: of bytes 0 and 2, and of bytes 1 and 3."""
    if storage == "float8_e4m3fn":
        if half == "f16":
            even, odd = (word << 7) & 0x3F803F80, (word >> 1) & 0x3F803F80
        else:
            even, odd = (word << 4) & 0x07F007F0, (word >> 4) & 0x07F007F0
        even, odd = even | ((word << 8) & _SIGNS), odd | (word & _SIGNS)
        return e.multiply_pair(half, even, power), e.multiply_pair(half, odd, power)
    pairs = []
    for x in (word, word >> 8):
        if half == "f16":
            pairs.append(e.subtract_pair(half, (x & 0x00FF00FF) ^ power, power))
        else:
            pairs.append(e.subtract_pair(half, (x & 0x007F007F) | power, (x & 0x00800080) | power))
    return pairs[0], pairs[1]


def arrange_queries(e: Emit, tile: Tile, half: str, base: I32, factor: Real, thread: I32, threads: int) -> None:
    """Multiply queries by a power of two, and store each 16 features in the order in which words of codes have them."""
    total = tile.rows * tile.chunks // 2

    def body(n: I32, state: Regs) -> Regs:
        index = n * threads + thread
        inside = index < total
        index = e.select(inside, index, index - index)
        place, chunk = tile.row(base, index // (tile.chunks // 2)), index % (tile.chunks // 2) * 2
        targets = [tile.chunk(place, chunk), tile.chunk(place, chunk + 1)]
        x = [y * factor for at in targets for word in e.load_shared("i", at, 4) for y in e.unpack(half, word)]
        for odd, at in enumerate(targets):
            words = [e.pack(half, x[4 * t + odd], x[4 * t + odd + 2]) for t in range(4)]
            e.store_shared("i", at, words, inside)
        return state

    e.loop(-(-total // threads), [], body)


class CodeProducts(TensorCores):
    """Queries in a tile as `arrange_queries` leaves it, and codes of ``kv_storage`` in tiles of `Multiplied`."""

    def __init__(self, storage: str, kv_storage: str, tiles: int = 1) -> None:
        super().__init__(storage, tiles)
        self.kv_storage = kv_storage

    def lane_feature(self, lane: I32) -> I32:
        return (lane & 3) * 4

    def features(self, columns: int) -> Layout:
        elements = [
            (2 * m + slot, 16 * n + column)
            for m in range(self.tiles) for n in range(columns // 16) for slot in (0, 1) for column in range(4)
        ]  # fmt: skip
        return Layout(self.slots, tuple(elements), 4)

    def _pairs(self, e: Emit, word: I32, power: I32) -> tuple[I32, I32]:
        return convert(e, self.kv_storage, self.half, word, power)

    def _rests(self, e: Emit, codes: Multiplied, base: I32, lane: I32) -> list[Regs]:
        """The rests of the scales of a thread's columns, two for each eight."""
        first = base + (lane & 3) * 8 + codes.scales
        return [e.load_shared("f", first + 32 * n, 2) for n in range(codes.rows // 8)]

    def _weigh(self, s: Regs, rests: list[Regs]) -> Regs:
        """Scores or weights times the rest of the scale of their key."""
        per_tile = len(s) // self.tiles
        return [x * rests[n % per_tile // 4][n % 2] for n, x in enumerate(s)]

    def scores(self, e: Emit, a: Tile, b: Tile, base: I32, warp: I32, lane: I32, shift: I32 | int = 0) -> Regs:
        assert isinstance(b, Multiplied)
        per_tile = b.rows // 2  # registers of a tile of 16 rows
        s = [[e.const("f", 0.0)] * per_tile for _ in range(self.tiles)]
        rows = [a.row(base, warp * self.rows + (lane & 15), 16 * m) for m in range(self.tiles)]
        columns = [b.row(base + shift, (lane & 7) + (lane >> 4) * 8, 16 * n) for n in range(b.rows // 16)]
        first = base + (lane >> 2) * 4 + b.powers
        powers = [e.load_shared("i", first + 32 * n) for n in range(b.rows // 8)]
        for k in range(a.columns // 32):
            left = [[e.load_matrices(a.chunk(x, lane >> 4, 4 * k + 2 * step), False) for x in rows] for step in (0, 1)]
            for n, place in enumerate(columns):
                words = e.load_matrices(b.chunk(place, (lane >> 3) & 1, 2 * k), False)
                for part, word in enumerate(words):  # of 8 keys and 16 features
                    right = self._pairs(e, word, powers[2 * n + part // 2])
                    at = slice(8 * n + 4 * (part // 2), 8 * n + 4 * (part // 2) + 4)
                    for m in range(self.tiles):
                        s[m][at] = e.multiply(self.half, left[part % 2][m], right, s[m][at])
        return self._weigh([x for part in s for x in part], self._rests(e, b, base, lane))

    def add(self, e: Emit, c: Regs, p: Regs, b: Tile, base: I32, warp: I32, lane: I32, shift: I32 | int = 0) -> Regs:
        assert isinstance(b, Multiplied)
        c = list(c)
        p = self._weigh(p, self._rests(e, b, base, lane))
        per_tile, wide = len(p) // self.tiles, len(c) // self.tiles
        packed = [e.pack(self.half, p[n], p[n + 1]) for n in range(0, len(p), 2)]
        first = base + (lane & 3) * 4 + b.powers
        for k in range(b.rows // 16):
            place = b.row(base + shift, lane & 15, 16 * k)
            powers = [e.load_shared("i", first + (32 * k + 16 * half)) for half in (0, 1)]
            for n in range(wide // 16):
                words = e.load_matrices(b.chunk(place, lane >> 4, 2 * n), True)
                for part in (0, 1):  # of 16 features
                    pairs = [self._pairs(e, words[2 * part + half], powers[half]) for half in (0, 1)]
                    begin = 16 * n + 8 * part
                    for m in range(self.tiles):
                        left = packed[m * per_tile // 2 + 4 * k : m * per_tile // 2 + 4 * k + 4]
                        for odd in (0, 1):
                            at = slice(m * wide + begin + odd, m * wide + begin + 8, 2)
                            c[at] = e.multiply(self.half, left, [x[odd] for x in pairs], c[at])
        return c
