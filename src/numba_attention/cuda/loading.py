"""What the warpgroup that loads does on sm_90a: copies of whole tiles and of last rows, and when they have landed."""

from .blocks import Block
from .emit import I32, I64, Emit, Macro, Packed, Target
from .parameters import PARAMETERS, Parameters
from .tiles import Rows, fetch, scale_rows
from .warpgroups import AT_ONCE, GROUP, Ring, Slabs, fetch_whole

LOADING = 8  # the named barrier of the warpgroup that loads; those of others have the numbers from 1 on


def make_landed(on: Target, lag: int) -> tuple[Macro, Macro]:
    """Make the macros that close a group of copies and wait for all but the newest ones, and that wait for all."""

    @on.macro("")
    def landed_but_some(e: Emit) -> None:
        e.commit()
        e.wait(lag)
        e.fence_proxy()

    @on.macro("")
    def landed(e: Emit) -> None:
        e.wait(0)
        e.fence_proxy()

    return landed_but_some, landed


def make_once(on: Target, tile: Slabs, landed: int) -> tuple[Macro, Macro]:
    """Make the macros for what is loaded once, before the first tile of a ring: to say that it is there, and to ask.

    `tile` is the operand that is multiplied by the power of two in the scale; `landed` is the barrier.
    """

    @on.macro("", PARAMETERS, "i", "i")
    def publish(e: Emit, p: Parameters, base: I32, thread: I32) -> None:
        e.wait(1)
        e.sync_named(e.const("i", LOADING), GROUP)
        scale_rows(e, tile, base, p.real("prescale", "f"), thread, GROUP)
        e.fence_proxy()
        e.arrive(base + landed)

    @on.macro("i", "i")
    def is_there(e: Emit, base: I32) -> I32:
        passed: I32 = e.has_passed(base + landed, e.const("i", 0))
        return passed

    return publish, is_there


def rows_of(b: Block, name: str, address: I64, row: I32, most: I32) -> Rows:
    """Rows of an array of E or Ev features, which begin at multiples of 16 bytes and have no gaps."""
    width = b.p.int("E" if name in ("query", "key") else "Ev")
    stride, column = getattr(b.p, f"{name}_row"), getattr(b.p, f"{name}_column")
    return Rows(address, stride, column, most - row, width, row)


def rows_that_are_whole(b: Block, number: I32) -> I32:
    """Rows that `fetch_whole` may copy: none where the features of an array are fewer than those of a tile."""
    exact = b.p.int("E").equals(b.c.E) & b.p.int("Ev").equals(b.c.Ev)
    return b.e.select(exact, number, number - number)


def make_loads(on: Target, block: Packed, storage: str, name: str, ring: Ring) -> tuple[Macro, Macro]:
    """Make the macros that copy rows of an array to the slot of tile number n: as many as a tile has, or the last."""

    def place(b: Block, head: I32) -> I64:
        start: I64 = b.places[name] + b.e.wide(head) * getattr(b.p, f"{name}_head")
        return start

    @on.macro("", block, "i", "i", "i", "i", "i")
    def load_tile(e: Emit, b: Block, base: I32, thread: I32, n: I32, head: I32, row: I32) -> None:
        pitch = getattr(b.p, f"{name}_row")
        address = place(b, head) + e.wide(row) * pitch
        fetch_whole(e, ring.tile, e.opaque(base) + ring.shift(n), address, pitch, e.opaque(thread), GROUP)

    @on.macro("", block, "i", "i", "i", "i", "i")
    def load_last(e: Emit, b: Block, base: I32, thread: I32, n: I32, head: I32, row: I32) -> None:
        rows = rows_of(b, name, place(b, head), row, b.span.columns)
        target = e.opaque(base) + ring.shift(n)
        fetch(e, ring.tile, target, rows, e.opaque(thread), GROUP, storage, True, most=AT_ONCE)

    return load_tile, load_last
