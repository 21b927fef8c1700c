"""Dequantization: keys and values of a cache in fewer bits than queries, from codes to the numbers of a tile.

Codes and their scales are copied asynchronously to a tile of their own, behind other work. When both have landed,
threads convert them to the tile that products read.
"""

from dataclasses import dataclass

from .emit import I32, Emit, Regs
from .formats import HALVES, KINDS, numbers
from .tiles import CHUNK, Place, Rows, Tile


@dataclass(frozen=True)
class Codes(Tile):
    """A tile of codes, with their scales behind them."""

    @property
    def is_scaled(self) -> bool:
        """Whether each row has a float32 factor."""
        return self.size == 1

    @property
    def scales(self) -> int:
        """Where their scales are, one for each row."""
        return self.offset + self.bytes

    @property
    def end(self) -> int:
        return self.scales + (4 * self.rows if self.is_scaled else 0)


@dataclass(frozen=True)
class Staged(Codes):
    """Codes that become a tile, without swizzling: they are read in order, which has no bank conflicts."""

    def row(self, base: I32, row: I32, more: int = 0) -> Place:
        return base + row * self.pitch, None, self.offset + more * self.pitch

    def chunk(self, place: Place, n: I32 | int, more: int = 0) -> I32:
        begin, _, constant = place
        return begin + n * CHUNK + (constant + more * CHUNK)


def fetch_scales(e: Emit, codes: Codes, base: I32, rows: Rows, thread: I32, threads: int) -> None:
    """Copy the scales of rows to shared memory; those of rows out of bounds are zero."""
    size, nothing = e.const("i", 4), e.const("i", 0)
    for n in range(-(-codes.rows // threads)):
        row = thread + n * threads
        inside, in_bounds = row < codes.rows, row < rows.number
        target = base + row * 4 + codes.scales
        e.copy_async(target, rows.at(e, row, in_bounds), e.select(in_bounds, size, nothing), inside, 4)


def unpack(e: Emit, codes: Tile, tile: Tile, base: I32, thread: I32, threads: int, at_once: int = 1) -> None:
    """Convert codes and their scales to a tile, `at_once` chunks of a thread at a time."""
    assert isinstance(codes, Staged)
    total, per_chunk, kind = tile.rows * tile.chunks, CHUNK // tile.size, KINDS[tile.storage]
    size = per_chunk * codes.size

    def body(turn: I32, state: Regs) -> Regs:
        loaded = []
        for n in range(at_once):
            index = (turn * at_once + n) * threads + thread
            inside = None if total % (threads * at_once) == 0 else index < total
            index = index if inside is None else e.select(inside, index, index - index)
            row, address = index // tile.chunks, base + index * size + codes.offset
            words = e.load_shared("i" if size >= 4 else "h", address, max(size // 4, 1))
            scale = e.load_shared("f", base + row * 4 + codes.scales) if codes.is_scaled else None
            loaded.append((row, index % tile.chunks, words, scale, inside))
        for row, chunk, words, scale, inside in loaded:
            x = [e.convert("d" if kind == "d" else "f", y) for word in words for y in numbers(e, codes.storage, word)]
            x = x[:per_chunk]
            if scale is not None:
                x = [y * e.convert(y.kind, scale) for y in x]
            target = tile.chunk(tile.row(base, row), chunk)
            if tile.storage in HALVES:
                half = HALVES[tile.storage]
                e.store_shared("i", target, [e.pack(half, x[n], x[n + 1]) for n in range(0, per_chunk, 2)], inside)
            else:
                e.store_shared(kind, target, x, inside)
        return state

    e.loop(-(-total // (threads * at_once)), [], body)
