"""Which part of a problem a block of threads is: sequence, head and rows, and where their arrays are."""

from dataclasses import replace

from .emit import I32, I64, Emit, Macro, Packed, Pred, Real, Regs, Target, Value
from .formats import SIZES
from .parameters import PARAMETERS, TYPES, Parameters, Sequence, clamp
from .products import Product
from .scoring import Scores, Span, StageInputs, span_of
from .spec import Spec
from .staging import Codes, fetch_scales
from .tiles import Rows, Tile, fetch, scale_rows

FORWARD = ("query", "key", "value", "out", "lse", "bias", "mask", "key_scale", "value_scale")
BACKWARD = ("query", "key", "value", "grad_out", "delta", "bias", "mask")
# The numbers of a query that the backward pass needs, interleaved in memory (the last is padding to 16 bytes):
# P = 2**((score - maximum) * factor + offset), and dS = P (dO V^T - delta).
FACTS = ("delta", "offset", "maximum", "")
OF_KEYS = ("key", "value", "key_scale", "value_scale", "grad_key", "grad_value")
NUMBERS = "i10"  # the registers of `Block.numbers`
HEAD = 4  # numbers before all flags; and before the sums of a part of a row: maximum, denominator, two of padding


class Block:
    """The part of the problem that a block of threads computes, and the parameters of the kernel: what macros take.

    Its rows are queries, or keys where the kernel sums over queries; `span` says which of the others they see.
    """

    def __init__(self, e: Emit, c: Spec, p: Parameters, names: tuple[str, ...], places: Regs, numbers: Regs) -> None:
        self.e, self.c, self.p = e, c, p
        self.places = dict(zip(names, places, strict=True))
        self.first, *span, self.offset, self.head, self.rows, self.index = numbers
        self.span = Span(e, span, transposed=c.task == "key")

    @property
    def numbers(self) -> Regs:
        return [self.first, *self.span.numbers, self.offset, self.head, self.rows, self.index]

    def find(self, row: I32) -> tuple[I32, I32]:
        """Query row and head of a row of the tiles."""
        if self.c.gather_rows:
            e = self.e
            return e.narrow(e.load("l", self.p.work + e.wide(row) * 8, where=row < self.rows)), self.head
        if not self.c.pack_gqa:
            return row, self.head
        group = self.p.int("group")
        return row // group, self.head * group + row % group

    def exists(self, row: I32) -> Pred:
        return self.find(row)[0] < self.rows

    @property
    def heads(self) -> I64:
        """The number of heads of the grid."""
        return self.p.heads // self.p.group if self.c.pack_gqa or self.c.task == "key" else self.p.heads

    def mark(self, row: I32, bad: I32, where: Pred) -> None:
        """Flag a row whose result is not finite, for the NaN-safe kernel, and flag that there is one.

        Slabs of a row share its flag, which is 0 before.
        """
        self.e.store("i", self.flag_at(row), [bad], where & (bad > 0) if self.c.is_sliced else where)
        self.e.store("i", self.p.flags, [self.e.const("i", 1)], where & (bad > 0))

    def is_marked(self, row: I32, in_bounds: Pred) -> I32:
        return self.e.load("i", self.flag_at(row), where=in_bounds)

    def flag_at(self, row: I32) -> I64:
        """The address of the flag of a row; the first of all flags says whether any row has one."""
        heads = self.e.wide(self.index) * self.heads + self.e.wide(self.head)
        return self.p.flags + (heads * self.p.flag_rows + self.e.wide(row) + HEAD) * 4

    def part_at(self, part: I32, row: I32, size: int) -> I64:
        """The address of a part of a row's sums: maximum, sum, and accumulators."""
        e, p = self.e, self.p
        of_head = (e.wide(part) * p.number + e.wide(self.index)) * self.heads + e.wide(self.head)
        return p.partial + (of_head * p.flag_rows + e.wide(row)) * ((self.c.Ev + HEAD) * size)

    def slope(self, head: I32, kind: str) -> Real:
        """The slope of ALiBi of a head."""
        s = Sequence(self.e, self.p, self.index)
        at = (s.batch * self.p.heads + s.head + self.e.wide(head)) * 8
        return self.e.convert(kind, self.e.load("d", self.p.slopes + at))

    def sink(self, head: I32, kind: str) -> Real:
        """The sink of a head, in the unit of the scores."""
        at = Sequence(self.e, self.p, self.index).head + self.e.wide(head)
        return self.e.convert(kind, self.e.load("d", self.p.sinks + at * 8) * self.p.real("per_unit", "d"))

    def load_tile(
        self, name: str, tile: Tile, base: I32, thread: I32, row: I32, most: I32, feature: I32 | None = None
    ) -> None:
        """Copy rows `row` to `most` of an array to a tile: E features of queries and keys, Ev of values.

        Those before `feature`, if there are such, are left out.
        """
        e, c, p = self.e, self.c, self.p
        base, thread = e.opaque(base), e.opaque(thread)
        if c.kv_storage and name in OF_KEYS:
            return self._load_stored(name, tile, base, thread, row, most, feature)
        stride, column = getattr(p, f"{name}_row"), getattr(p, f"{name}_column")
        width = self._width(name, feature)
        more: dict[str, Value] = {}
        address = self.places[name]
        if name in OF_KEYS:
            more = self._pages(name)
        elif c.gather_rows:
            more = {"listed": p.work}
        elif c.pack_gqa:
            member, group = getattr(p, f"{name}_head"), p.int("group")
            address, most = address + e.wide(self.head) * p.group * member, most * group
            more = {"group": group, "member": member}
        if feature is not None:
            address = address + e.wide(feature) * column
        rows = Rows(address, stride, column, most - row, width, row, **more)
        fetch(e, tile, base, rows, thread, c.threads, c.storage, c.aligned)

    def _width(self, name: str, feature: I32 | None) -> I32:
        """How many features an array has, from a feature on."""
        width = self.p.int("E" if name in ("query", "key") else "Ev")
        return width if feature is None else width - feature

    def _load_stored(
        self, name: str, tile: Tile, base: I32, thread: I32, row: I32, most: I32, feature: I32 | None
    ) -> None:
        """Copy codes and their scales to a tile of codes, or the numbers that they stand for to a tile of numbers."""
        e, c, p = self.e, self.c, self.p
        rows, scales = (
            Rows(self.places[x], getattr(p, f"{x}_row"), getattr(p, f"{x}_column"), most - row,
                 self._width(name, feature), row, **self._pages(x))
            for x in (name, f"{name}_scale")
        )  # fmt: skip
        if feature is not None:
            rows = replace(rows, address=rows.address + e.wide(feature) * rows.column)
        scaled = SIZES[c.kv_storage] == 1
        fetch(e, tile, base, rows, thread, c.threads, c.kv_storage, c.aligned, scales if scaled else None)
        if scaled and isinstance(tile, Codes):
            fetch_scales(e, tile, base, scales, thread, c.threads)

    def _pages(self, name: str) -> dict[str, Value]:
        """Paged arrays: the addresses of page numbers and pages, for `Rows`."""
        if not self.c.paged:
            return {}
        pages = Sequence(self.e, self.p, self.index).pages
        return {"pages": pages, "page_size": self.p.int("page_size"), "page": getattr(self.p, f"{name}_page")}

    def commit(self) -> None:
        """Close the group of asynchronous copies issued so far, which `make_landed` waits for."""
        if self.c.aligned:
            self.e.commit()


def packed_block(c: Spec, names: tuple[str, ...]) -> Packed:
    """Declare the `Block` of a kernel, with the addresses of the arrays of these names, for its macros."""

    def unpack(e: Emit, integers: Regs, reals: Regs, places: Regs, numbers: Regs) -> Block:
        return Block(e, c, Parameters(e, integers, reals), names, places, numbers)

    def pack(b: Block) -> tuple[Regs, Regs, Regs, Regs]:
        return b.p.integers, b.p.reals, list(b.places.values()), b.numbers

    return Packed((*TYPES, f"l{len(names)}", NUMBERS), unpack, pack)


def make_landed(c: Spec, on: Target) -> Macro:
    """Make the macro that waits for the asynchronous copies of a thread; before sm_80 there are none."""

    @on.macro("")
    def landed(e: Emit) -> None:
        if c.aligned:
            e.wait(0)

    return landed


def make_scale(c: Spec, on: Target, tile: Tile) -> Macro:
    """Make the macro that multiplies a tile of queries, or keys, by the power of two in the scale."""

    @on.macro("", PARAMETERS, "i", "i")
    def scale(e: Emit, p: Parameters, base: I32, thread: I32) -> None:
        factor = p.real("prescale", "d" if c.compute == "float64" else "f")
        scale_rows(e, tile, base, factor, thread, c.threads)

    return scale


def make_marks(c: Spec, on: Target, BLOCK: Packed) -> tuple[Macro, Macro]:
    """Make the macros that say whether any row is flagged, and whether the row of a thread is."""

    @on.macro("i", PARAMETERS)
    def any_marked(e: Emit, p: Parameters) -> I32:
        return e.load("i", p.flags)

    @on.macro("i", BLOCK, "i")
    def marked(e: Emit, b: Block, thread: I32) -> I32:
        row = b.first + thread
        return b.is_marked(row, (thread < c.rows) & b.exists(row))

    return any_marked, marked


def block_of(
    e: Emit, c: Spec, p: Parameters, names: tuple[str, ...], index: I32, tile: I32, head: I32, transposed: bool = False
) -> Block:
    """The `Block` of a tile of a sequence. Its head is a key head if its rows are keys, or queries of packed GQA.

    The addresses of arrays of queries are then those of the first head of the array, or of the group.
    """
    s = Sequence(e, p, index)
    zero, group = e.const("l", 0), p.int("group")
    if c.pack_gqa:
        of_queries, of_keys = zero, e.wide(head)
    elif transposed:
        of_queries, of_keys = e.wide(head * group), e.wide(head)
    else:
        of_queries, of_keys = e.wide(head), e.wide(head // group)
    places = []
    for name in names:
        used = {"bias": c.bias, "mask": c.mask, "key_scale": c.kv_storage, "value_scale": c.kv_storage}
        if not used.get(name, True):
            places.append(zero)
            continue
        start = zero if c.paged and name in OF_KEYS else getattr(s, name)
        of_head = of_keys if name in OF_KEYS else of_queries
        places.append(getattr(p, name) + start + of_head * getattr(p, f"{name}_head"))
    rows = s.int("key_rows" if transposed else "rows")
    numbers = [tile * c.rows, *span_of(e, p, s), clamp(e, s.offset), head, rows, index]
    return Block(e, c, p, names, places, numbers)


def work_item(e: Emit, p: Parameters, x: I32, y: I32, of_keys: bool = False) -> tuple[I32, I32, I32]:
    """Sequence, tile and head of a block, from the list of work or by counting.

    Load balance: a device starts blocks in the order of x, then y, so tiles with most work come first. Those are the
    last tiles of causal queries, which see most keys, or the first tiles of keys, which most queries see. Some heads
    alternate, so that long tiles of later heads do not start when others end.
    """
    tiles, listed, bits = p.int("tiles"), p.work > 0, p.int("together")
    x, head = e.opaque(x) >> bits, (y << bits) + (x & ((e.const("i", 1) << bits) - 1))
    entry = e.load("l", p.work + e.wide(x) * 8, where=listed)
    index = e.select(listed, e.narrow(entry >> 32), x // tiles)
    tile = x % tiles if of_keys else tiles - 1 - x % tiles
    return index, e.select(listed, e.narrow(entry & 0x7FFFFFFF), tile), head


class Lanes:
    """Which rows and columns of a tile of scores a thread has."""

    def __init__(self, c: Spec, product: Product) -> None:
        self.c, self.product, self.layout = c, product, product.layout(c.columns)

    def split(self, thread: I32) -> tuple[I32, I32]:
        """Warp and lane."""
        return thread >> 5, thread & 31

    def rows(self, thread: I32) -> Regs:
        """Row of the tile of each slot."""
        warp, lane = self.split(thread)
        first = warp * self.product.rows + self.product.lane_row(lane)
        return [first + self.product.slot_row(slot) for slot in range(self.product.slots)]

    def scores(self, b: Block, thread: I32, column: I32, transposed: bool = False) -> Scores:
        """The tile of scores that begins at a column."""
        thread = b.e.opaque(thread)
        rows = [b.find(b.first + row)[0] for row in self.rows(thread)]
        column = self.product.lane_column(thread & 31) + column
        return Scores(b.e, self.c, b.p, self.product, self.layout, rows, column, transposed)


def stage(
    b: Block, lanes: Lanes, thread: I32, column: I32, s: Regs, head: I32 | None = None, biases: Regs | None = None,
    slopes: Regs | None = None,
) -> tuple[Regs, Regs]:  # fmt: skip
    """The stages of a tile; where rows are keys, `head` is the query head, of a group from 0.

    `biases` are those of the scores, and `slopes` those of the slots, where they have been read.
    """
    inputs = replace(stage_inputs(b, lanes, thread, head, slopes), biases=biases)
    return lanes.scores(b, thread, column, head is not None).stages(s, inputs)


def stage_inputs(
    b: Block, lanes: Lanes, thread: I32, head: I32 | None = None, slopes: Regs | None = None
) -> StageInputs:
    """What the stages of a tile read; where rows are keys, `head` is the query head, of a group from 0.

    `slopes` are those of the slots, where they have been read.
    """
    transposed = head is not None
    bias, mask = b.places["bias"], b.places["mask"]
    rows, keys = (b.span.columns, b.span.rows) if transposed else (b.span.rows, b.span.columns)
    heads_of_slots = None
    if head is not None:
        bias, mask = bias + b.e.wide(head) * b.p.bias_head, mask + b.e.wide(head) * b.p.mask_head
        heads = [b.head * b.p.int("group") + head] * lanes.product.slots
    elif b.c.pack_gqa:
        heads = heads_of_slots = [b.find(b.first + row)[1] for row in lanes.rows(thread)]
    else:
        heads = [b.head] * lanes.product.slots
    if b.c.alibi and slopes is None:
        of_head = {id(h): b.slope(h, lanes.product.kind) for h in {id(h): h for h in heads}.values()}
        slopes = [of_head[id(h)] for h in heads]
    inputs = StageInputs(bias, mask, b.offset, rows, keys, slopes or [], heads_of_slots)
    if b.c.mods is not None:
        s_record, first_key = Sequence(b.e, b.p, b.index), b.p.int("first_key")
        first_head = s_record.int("head") + b.p.int("first_head")
        numbers = {id(h): first_head + h for h in {id(h): h for h in heads}.values()}
        inputs = replace(
            inputs, batch=s_record.int("number"), head_numbers=[numbers[id(h)] for h in heads],
            first_position=s_record.int("offset") + first_key, first_key=first_key,
        )  # fmt: skip
    return inputs
