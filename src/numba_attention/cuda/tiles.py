"""Tiles in shared memory: the address of an element (swizzling), and copies from global memory.

A row of a tile is cut into chunks of 16 bytes. Chunk c of row r lies at chunk ``c ^ mask(r)`` of that row, so that
eight threads that read one chunk of eight rows, or eight chunks of one row, use every bank of shared memory once.
"""

from dataclasses import dataclass
from typing import TypeAlias

from .emit import I32, I64, Emit, Pred, Real, Regs
from .formats import HALVES, KINDS, SIZES, read

CHUNK = 16
_COPIES = 16  # most copies of a thread that are unrolled


# Of a row of a tile, for `Tile.chunk`: where it begins, the mask of its chunks, and what is to be added.
Place: TypeAlias = tuple[I32, I32 | None, int]


@dataclass(frozen=True)
class Tile:
    """``rows`` x ``columns`` elements of ``storage`` at a byte offset of shared memory."""

    rows: int
    columns: int
    storage: str
    offset: int

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return SIZES[self.storage]

    @property
    def pitch(self) -> int:
        """Bytes of a row."""
        return self.columns * SIZES[self.storage]

    @property
    def bytes(self) -> int:
        return self.rows * self.pitch

    @property
    def end(self) -> int:
        return self.offset + self.bytes

    @property
    def chunks(self) -> int:
        """Chunks of a row: a multiple of 4."""
        return self.pitch // CHUNK

    @property
    def group(self) -> int:
        """Chunks that the swizzle permutes: a line of all banks, or half of one where rows have no whole lines."""
        return 8 if self.chunks % 8 == 0 else 4

    def row(self, base: I32, row: I32, more: int = 0) -> Place:
        """Where row ``row + more`` begins, the mask of its chunks, in bytes, and what is to be added: for `chunk`.

        `more` is a multiple of 8, so that masks are the same: then it costs no register.
        """
        half = self.group == 4  # two rows make a line of all banks
        mask = ((row >> 1) & 3) * CHUNK if half else (row & 7) * CHUNK
        return base + row * self.pitch, mask, self.offset + more * self.pitch

    def row_and(self, base: I32, row: I32, more: int) -> Place:
        """As `row`, for any `more`: with as few masks as there are."""
        return self.row(base, row + more % 8 if more % 8 else row, more // 8 * 8)

    def chunk(self, place: Place, n: I32 | int, more: int = 0) -> I32:
        """The address of chunk ``n + more`` of a row; if there is more, no bit of it is one of n.

        What is `more` by whole groups is added last, where instructions take it for nothing: registers are for few
        masks.
        """
        begin, mask, constant = place
        assert mask is not None
        low, high = more % self.group, more // self.group * self.group
        mask = mask ^ (n * CHUNK)
        return begin + (mask ^ (low * CHUNK) if low else mask) + (constant + high * CHUNK)


@dataclass(frozen=True)
class Rows:
    """Rows of an array in global memory; rows beyond `number` are read as zeros."""

    address: I64  # of row 0
    row: I64  # bytes from one to the next
    column: I64  # bytes from one element to the next
    number: I32  # valid rows; none if it is not positive
    elements: I32  # of a row
    first: I32 | int = 0  # row of the array that is row 0 of the tile
    # Of an array in pages only: addresses of the page numbers, and of the pages
    pages: I64 | None = None
    page_size: I32 | None = None
    page: I64 | None = None  # bytes from one page to the next
    # Packed GQA, where the heads of a group alternate row by row: how many, and bytes from one to the next
    group: I32 | None = None
    member: I64 | None = None
    listed: I64 | None = None  # the address of a list of rows, instead of one after the other

    def at(self, e: Emit, row: I32, in_bounds: Pred, more: int = 0) -> I64:
        """The address of row ``row + more`` of the tile; that of any row if it is out of bounds."""
        if self.listed is None and self.group is None and self.pages is None:
            return self.address + e.wide(row + self.first) * self.row + self.row * more
        row = row + more
        row = e.select(in_bounds, row, row - row) + self.first
        if self.listed is not None:
            return self.address + e.load_constant("l", self.listed + e.wide(row) * 8) * self.row
        if self.group is not None:
            assert self.member is not None
            return self.address + e.wide(row // self.group) * self.row + e.wide(row % self.group) * self.member
        assert self.pages is not None
        assert self.page_size is not None
        assert self.page is not None
        page = row // self.page_size
        number = e.load_constant("l", self.pages + e.wide(page) * 8)
        return self.address + number * self.page + e.wide(row - page * self.page_size) * self.row

    @property
    def are_scattered(self) -> bool:
        """Whether the address of each row is found through memory."""
        return self.pages is not None or self.listed is not None


def fetch(
    e: Emit, tile: Tile, base: I32, rows: Rows, thread: I32, threads: int, storage: str, aligned: bool,
    scales: Rows | None = None, most: int = _COPIES,
) -> None:  # fmt: skip
    """Copy rows of an array of ``storage`` to a tile; readers wait for all copies and then for all threads.

    ``aligned``: rows begin at multiples of 16 bytes and have no gaps, so that the copy needs no registers. Else each
    number becomes one of the tile, with the factor of its row in ``scales``.
    """
    if aligned and storage == tile.storage:
        return _fetch_chunks(e, tile, base, rows, thread, threads, most)
    _fetch_elements(e, tile, base, rows, thread, threads, storage, scales)


def _fetch_chunks(e: Emit, tile: Tile, base: I32, rows: Rows, thread: I32, threads: int, most: int) -> None:
    copies, width = -(-tile.rows * tile.chunks // threads), rows.elements * SIZES[tile.storage]
    per_warp = 32 // tile.chunks  # rows that a warp copies with one instruction
    # In larger blocks, whose tiles of sums leave fewer registers, the addresses would spill.
    shared_out = rows.are_scattered and 32 % tile.chunks == 0 and threads == 32
    at_once = copies if copies <= most else most if shared_out and copies % most == 0 else most // 2
    even = copies * threads == tile.rows * tile.chunks and copies % at_once == 0
    whole, nothing = e.const("i", CHUNK), e.const("i", 0)
    apart = 0 if threads % tile.chunks else threads // tile.chunks  # rows between successive copies of a thread

    def addresses(turn: I32 | int) -> list[I64]:
        """Each lane finds the addresses of some of the rows of a turn: one lookup of a page for a row, not a chunk."""
        found = []
        for first in range(0, at_once * per_warp, 32):
            item = (thread & 31) + first
            row = item + turn * (at_once * per_warp)
            found.append(rows.at(e, row, row < rows.number))
        return found

    def body(turn: I32 | int, state: Regs) -> Regs:
        found = addresses(turn) if shared_out else []
        for n in range(at_once):
            if apart:
                row, chunk, more = thread // tile.chunks + turn * (at_once * apart), thread % tile.chunks, n * apart
            else:
                index = thread + turn * (at_once * threads) + n * threads
                row, chunk, more = index // tile.chunks, index % tile.chunks, 0
            in_bounds = (row + more < rows.number) & (chunk * CHUNK < width)
            if shared_out:
                place = n * per_warp
                source = e.shuffle(found[place // 32], (thread & 31) // tile.chunks + place % 32)
            else:
                source = rows.at(e, row, in_bounds, more)
            source = source + e.wide(chunk * CHUNK)
            target = tile.chunk(tile.row_and(base, row, more), chunk)
            e.copy_async(target, source, e.select(in_bounds, whole, nothing), None if even else row + more < tile.rows)
        return state

    if at_once == copies:
        body(0, [])
    else:  # unrolled, the addresses of that many copies would occupy registers
        e.loop(-(-copies // at_once), [], body)


def _fetch_elements(
    e: Emit, tile: Tile, base: I32, rows: Rows, thread: I32, threads: int, storage: str, scales: Rows | None
) -> None:
    total, per_chunk = tile.rows * tile.columns, CHUNK // SIZES[tile.storage]

    def body(n: I32, state: Regs) -> Regs:
        index = n * threads + thread
        row, column = index // tile.columns, index % tile.columns
        in_bounds = (row < rows.number) & (column < rows.elements) & (index < total)
        address = rows.at(e, row, in_bounds) + e.wide(column) * rows.column
        if storage == tile.storage:
            x = e.load(KINDS[storage], address, where=in_bounds)
        else:
            x = e.convert("d" if tile.storage == "float64" else "f", read(e, storage, address, in_bounds))
            if scales is not None:
                x = x * e.convert(x.kind, e.load("f", scales.at(e, row, in_bounds), where=in_bounds))
            x = e.to_half(HALVES[tile.storage], x) if tile.storage in HALVES else x
        target = tile.chunk(tile.row(base, row), column // per_chunk) + column % per_chunk * SIZES[tile.storage]
        e.store_shared(KINDS[tile.storage], target, [x], index < total)
        return state

    e.loop(-(-total // threads), [], body)


def scale_rows(e: Emit, tile: Tile, base: I32, factor: Real, thread: I32, threads: int) -> None:
    """Multiply a tile by a number that is exact in its type: a power of two, or minus one."""
    total = tile.rows * tile.chunks

    def body(n: I32, state: Regs) -> Regs:
        index = n * threads + thread
        address = base + (index * CHUNK + tile.offset)
        inside = index < total
        address = e.select(inside, address, base + tile.offset)
        if tile.storage in HALVES:
            half = HALVES[tile.storage]
            words = e.load_shared("i", address, 4)
            scaled = [e.pack(half, *(y * factor for y in e.unpack(half, x))) for x in words]
            e.store_shared("i", address, scaled, inside)
        else:
            kind, count = KINDS[tile.storage], CHUNK // SIZES[tile.storage]
            scaled = [x * factor for x in e.load_shared(kind, address, count)]
            e.store_shared(kind, address, scaled, inside)
        return state

    e.loop(-(-total // threads), [], body)
