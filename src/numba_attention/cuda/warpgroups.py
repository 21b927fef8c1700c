"""What warpgroups of sm_90a multiply: tiles in slabs, their descriptors, products, and rings of tiles behind barriers.

PTX ISA 8.0, "Asynchronous Warpgroup Level Matrix Shared Memory Layout": 128-byte swizzling. Shah et al.,
"FlashAttention-3", 2024, section 3, for the division of the work.
"""

from dataclasses import dataclass
from typing import Any

from .emit import I32, I64, Emit, Macro, Regs, Target
from .products import TensorCores
from .tiles import CHUNK, Place, Tile

LINE = 128  # bytes of a row of a slab: a line of all banks
ALIGNMENT = 1024  # of a tile: eight lines, after which the swizzle repeats
GROUP = 128  # threads of a warpgroup
ROWS = 64  # of a warpgroup
_SWIZZLED = 1 << 62
AT_ONCE = 4  # copies that are written out: with more of them, their addresses occupy registers


@dataclass(frozen=True)
class Slabs(Tile):
    """A tile of 16-bit numbers as slabs of 64 columns; chunk c of row r of a slab lies at c ^ r % 8 of its line."""

    def __post_init__(self) -> None:
        if self.offset % ALIGNMENT or self.slab % ALIGNMENT:
            raise ValueError(f"slabs begin at multiples of {ALIGNMENT} bytes, got {self}")

    @property
    def slab(self) -> int:
        """Bytes from a slab to the next."""
        return self.rows * LINE

    def row(self, base: I32, row: I32, more: int = 0) -> Place:
        return base + row * LINE, (row & 7) * CHUNK, self.offset + more * LINE

    def chunk(self, place: Place, n: I32 | int, more: int = 0) -> I32:
        begin, mask, constant = place
        assert mask is not None
        assert more == 0
        if isinstance(n, int):
            return begin + (mask ^ (n % 8 * CHUNK)) + (constant + n // 8 * self.slab)
        return begin + (mask ^ ((n & 7) * CHUNK)) + (n >> 3) * self.slab + constant

    def descriptor(self, e: Emit, base: I32, turned: bool) -> I64:
        """Of the rows from an address on; ``turned``: rows are what is summed over."""
        # In units of 16 bytes: from eight rows to the next eight and, of what is turned, from a slab to the next.
        stride, leading = 8 * LINE // 16, self.slab // 16 if turned else 1
        return e.wide((base + self.offset) >> 4) + (_SWIZZLED | stride << 32 | leading << 16)

    def step(self, n: int, turned: bool) -> int:
        """From a descriptor to that of the n-th 16 summed indices after it."""
        return n * 16 * LINE // 16 if turned else n % 4 * 2 + n // 4 * self.slab // 16


class Warpgroups(TensorCores):
    """float16 and bfloat16 by wgmma: a warp has 16 rows of the 64 of its warpgroup, as it has of mma.sync."""

    def __init__(self, storage: str) -> None:
        super().__init__(storage, 1)

    def begin_scores(self, e: Emit, a: Slabs, b: Slabs, row: I32, base: I32, shift: I32) -> Regs:
        """Begin A B^T for the 64 rows of A from `row` on; B lies `shift` bytes behind its tile."""
        left, right = a.descriptor(e, base + row * LINE, False), b.descriptor(e, base + shift, False)
        s = [e.const("f", 0.0)] * (b.rows // 2)
        for n in range(a.columns // 16):
            s = e.multiply_group(self.half, left + a.step(n, False), right + b.step(n, False), s, from_zero=n == 0)
        return s

    def begin_add(self, e: Emit, c: Regs, packed: Regs, b: Slabs, base: I32, shift: I32) -> Regs:
        """Begin C + P B, of the words that `rounded` made of P."""
        right = b.descriptor(e, base + shift, True)
        for n in range(b.rows // 16):
            left = packed[4 * n : 4 * n + 4]
            c = e.multiply_group(self.half, left, right + b.step(n, True), c, turned=(False, True))
        return c

    def begin_add_shared(
        self, e: Emit, c: Regs, a: Slabs, b: Slabs, row: I32, base: I32, of_a: I32, of_b: I32, steps: range
    ) -> Regs:
        """Begin C + A B for the 64 rows of A from `row` on, for some steps of 16 summed indices.

        A and B lie so many bytes behind their tiles.
        """
        left, right = a.descriptor(e, base + of_a + row * LINE, False), b.descriptor(e, base + of_b, True)
        for n in steps:
            c = e.multiply_group(self.half, left + a.step(n, False), right + b.step(n, True), c, turned=(False, True))
        return c

    def begin_turned(self, e: Emit, a: Slabs, b: Slabs, base: I32, of_a: I32, of_b: I32, columns: int) -> Regs:
        """Begin A^T B for some columns of B; A and B lie so many bytes behind their tiles."""
        left, right = a.descriptor(e, base + of_a, True), b.descriptor(e, base + of_b, True)
        c = [e.const("f", 0.0)] * (columns // 2)
        for n in range(a.rows // 16):
            steps = left + a.step(n, True), right + b.step(n, True)
            c = e.multiply_group(self.half, *steps, c, from_zero=n == 0, turned=(True, True))
        return c

    def rounded(self, e: Emit, p: Regs) -> Regs:
        """Weights as operands: two in 32 bits."""
        return [e.pack(self.half, p[n], p[n + 1]) for n in range(0, len(p), 2)]


def fetch_whole(e: Emit, tile: Slabs, base: I32, address: I64, pitch: I64, thread: I32, threads: int) -> None:
    """Copy as many rows of an array as a tile has, all of them there and as wide as the tile, from an address on.

    One instruction and one addition a copy: what the warps that load execute is taken from those that compute.
    """
    apart = threads // tile.chunks  # rows between successive copies of a thread
    count = tile.rows // apart
    row, chunk = thread // tile.chunks, thread % tile.chunks
    even = tile.chunk(tile.row(base, row), chunk)
    odd = even if apart % 8 == 0 else even ^ (apart * CHUNK)  # four rows on, the swizzle is another one
    at_once = next(n for n in (AT_ONCE, 2, 1) if count % n == 0)
    assert apart in (4, 8, 16)
    assert at_once % 2 == 0 or apart % 8 == 0
    step = pitch * apart

    def body(turn: I32, state: Regs) -> Regs:
        (source,) = state
        more = turn * (at_once * apart * LINE)
        for n in range(at_once):
            e.copy_whole((odd if n % 2 else even) + more, source, n * apart * LINE)
            source = source + step
        return [source]

    e.loop(count // at_once, [address + e.wide(row) * pitch + e.wide(chunk * CHUNK)], body)


@dataclass(frozen=True)
class Ring:
    """Slots for tiles that one warpgroup fills and others empty, with two barriers for each slot."""

    tile: Slabs  # in the first slot
    slots: int
    at: int  # of the barriers in shared memory: those of full slots, and those of empty ones

    @property
    def end(self) -> int:
        return self.at + 16 * self.slots

    def shift(self, n: I32) -> I32:
        """From the first slot to that of tile number n, in bytes."""
        return n % self.slots * self.tile.bytes

    def full(self, base: I32, n: I32) -> I32:
        """The address of the barrier that the loading threads arrive at when tile number n has landed."""
        return base + n % self.slots * 8 + self.at

    def empty(self, base: I32, n: I32) -> I32:
        """The address of the barrier that each warpgroup arrives at when it has read tile number n."""
        return self.full(base, n) + 8 * self.slots

    def parity(self, n: I32) -> I32:
        """The parity of the phase of tile number n in its slot."""
        return n // self.slots & 1


def init_barriers(e: Emit, rings: list[Ring], base: I32, thread: I32, readers: int, landed: int) -> None:
    """Make the barriers of rings, which so many warpgroups read, and the one at `landed` of what is loaded once."""
    first = thread.equals(0)
    for ring in rings:
        for slot in range(ring.slots):
            e.init_barrier(base + (ring.at + 8 * slot), GROUP, first)
            e.init_barrier(base + (ring.at + 8 * (ring.slots + slot)), readers, first)
    e.init_barrier(base + landed, GROUP, first)
    e.fence_proxy()


def make_waits(on: Target, ring: Ring) -> tuple[Macro, Macro, Macro]:
    """Make the macros that ask whether tile number n is there, and whether its slot is empty, and that empty it."""

    @on.macro("i", "i", "i")
    def is_full(e: Emit, base: I32, n: I32) -> I32:
        passed: I32 = e.has_passed(ring.full(base, n), ring.parity(n))
        return passed

    @on.macro("i", "i", "i")
    def is_empty(e: Emit, base: I32, n: I32) -> I32:
        passed: I32 = e.has_passed(ring.empty(base, n), ring.parity(n) ^ 1)
        return passed

    @on.macro("", "i", "i", "i")
    def release(e: Emit, base: I32, thread: I32, n: I32) -> None:
        e.arrive(ring.empty(base, n), (thread & (GROUP - 1)).equals(0))

    return is_full, is_empty, release


def make_done(on: Target, groups: int, *sums: str) -> Macro:
    """Make the macro that waits until all but the newest groups of products are done, and returns sums of others."""

    @on.macro(" ".join(sums), *sums)
    def done(e: Emit, *given: Regs) -> Any:
        found = e.wait_products(groups, *given)
        return found if len(found) > 1 else found[0]

    return done


def make_roles(on: Target, few: int, many: int) -> tuple[Macro, Macro, Macro]:
    """Make the macros that give a thread's warpgroup, and its registers: few where it loads, many where it computes."""

    @on.macro("i", "i")
    def warpgroup(e: Emit, thread: I32) -> I32:
        return thread // GROUP

    @on.macro("")
    def give(e: Emit) -> None:
        e.set_registers(few, more=False)

    @on.macro("")
    def take(e: Emit) -> None:
        e.set_registers(many, more=True)

    return warpgroup, give, take
