"""The forward pass: FlashAttention-2 (Dao 2023), algorithm 1, of which every product and option is a variant.

A block owns a tile of queries and visits the tiles of keys that any of its rows sees. Keys and values have one tile each in
shared memory: the values come while the scores are made, the next keys while the values are summed.
"""

import math
from typing import Any

import numpy as np

from .config import Config, lay_out
from .parameters import TYPES, Parameters, Sequence, clamp
from .results import HEAD, write_row
from .scoring import Scores, Span, span_of
from .softmax import LN2, LOG2E, fold, start, total
from .tiles import Rows, Tile, fetch, scale_rows

PLACES, NUMBERS = "l7", "i9"  # addresses of this head, and what is told of its sequence


def tiles_of(c: Config) -> tuple[Tile, Tile, Tile, int]:
    """Tiles of queries, keys and values in shared memory, and the bytes of all."""
    product = c.make_product()
    q, k, v = lay_out((c.rows, c.E, c.compute), (c.columns, c.E, c.compute), (c.columns, c.Ev, c.compute))
    end = v.end
    if c.product == "simt":
        product.set_columns(c.columns)
        end += product.scratch * c.warps
    return q, k, v, end


def make_product(c: Config) -> Any:
    product = c.make_product()
    if c.product == "simt":
        product.set_columns(c.columns)
        product.at = tiles_of(c)[2].end
    return product


class Block:
    """What the macros of a kernel work with: its parameters, and which part of the problem it is."""

    def __init__(self, e: Any, integers: Any, reals: Any, places: Any = None, numbers: Any = None) -> None:
        self.e = e
        self.p = Parameters(e, integers, reals)
        if places is not None:
            self.query, self.key, self.value, self.out, self.lse, self.bias, self.mask = places
            self.first, low, high, rows, columns, self.offset, self.head, self.rows, self.index = numbers
            self.span = Span(e, low, high, rows, columns)


def make_forward(c: Config, on: Any) -> Any:
    """Make the kernel; its grid is tiles of all sequences, heads (of keys, if they are stacked), splits."""
    cuda, macro, shared_address = on.cuda, on.macro, on.shared()
    product = make_product(c)
    kind = product.kind
    layout, features = product.layout(c.columns), product.features(c.Ev)
    q, k, v, _ = tiles_of(c)
    columns, threads = c.columns, c.threads
    S, C, M = f"{kind}{len(layout)}", f"{kind}{len(features)}", f"{kind}{product.slots}"
    split, careful, flags = c.split, c.careful, c.flags

    def lanes(thread: Any) -> tuple[Any, Any]:
        return thread >> 5, thread & 31

    def tile_rows(thread: Any) -> list[Any]:
        """Rows of the tile that a thread has."""
        warp, lane = lanes(thread)
        first = warp * product.rows + product.lane_row(lane)
        return [first + product.slot_row(slot) for slot in range(product.slots)]

    def find(b: Block, row: Any) -> tuple[Any, Any]:
        """Query row and head of a row of all tiles."""
        if not c.stacked:
            return row, b.head
        group = b.p.int("group")
        return row // group, b.head * group + row % group

    @macro(f"{PLACES} {NUMBERS}", *TYPES, "i", "i")
    def place(e: Any, integers: Any, reals: Any, x: Any, head: Any) -> Any:
        p = Parameters(e, integers, reals)
        tiles, listed = p.int("tiles"), p.work > 0
        entry = e.load("l", p.work + e.wide(x) * 8, where=listed)
        index = e.select(listed, e.narrow(entry >> 32), x // tiles)
        tile = e.select(listed, e.narrow(entry & 0x7FFFFFFF), tiles - 1 - x % tiles)
        s = Sequence(e, p, index)
        rows = e.wide(head)
        keys = rows if c.stacked else e.wide(head // p.int("group"))
        zero = e.const("l", 0)
        across = zero if c.stacked else rows
        paged = zero if c.paged else s.key + keys * p.key_head
        paged_value = zero if c.paged else s.value + keys * p.value_head
        if c.paged:
            paged, paged_value = keys * p.key_head, keys * p.value_head
        places = [
            p.query + s.query + across * p.query_head, p.key + paged, p.value + paged_value,
            p.out + s.out + across * p.out_head,
            p.lse + s.lse + across * p.lse_head,
            p.bias + s.bias + across * p.bias_head if c.bias else zero,
            p.mask + s.mask + across * p.mask_head if c.mask else zero,
        ]  # fmt: skip
        numbers = [tile * c.rows, *span_of(e, p, s), clamp(e, s.offset), head, s.int("rows"), index]
        return places, numbers

    @macro("i4", *TYPES, PLACES, NUMBERS, "i")
    def keys_seen(e: Any, integers: Any, reals: Any, places: Any, numbers: Any, part: Any) -> Any:
        """First key, the one after the last, and those that all rows see."""
        b = Block(e, integers, reals, places, numbers)
        first, _ = find(b, b.first)
        last, _ = find(b, b.first + (c.rows - 1))
        begin, end, all_begin, all_end = b.span.of_rows(first, last)
        if split:
            tiles = (end - begin + columns - 1) // columns
            share = (e.max(tiles, 0) + b.p.int("splits") - 1) // b.p.int("splits") * columns
            begin = begin + part * share
            end = e.min(end, begin + share)
        return [begin, end, all_begin, all_end]

    @macro("i", *TYPES, NUMBERS, "i")
    def marked(e: Any, integers: Any, reals: Any, numbers: Any, thread: Any) -> Any:
        """Whether a row of the tile is to be done again, asked by one thread for each."""
        b = Block(e, integers, reals, [None] * 7, numbers)
        return e.load("i", flag_at(b, thread), where=(thread < c.rows) & exists(b, b.first + thread))

    def flag_at(b: Block, row: Any) -> Any:
        e, p = b.e, b.p
        heads = p.heads // p.group if c.stacked else p.heads
        at = (e.wide(b.index) * heads + e.wide(b.head)) * p.flag_rows
        return p.flags + (at + e.wide(b.first + row)) * 4

    def exists(b: Block, row: Any) -> Any:
        return find(b, row)[0] < b.rows

    def slopes(b: Block, thread: Any) -> list[Any]:
        """The slope of ALiBi of each slot."""
        at = b.p.slopes + b.e.wide(b.index) * b.p.heads * 8
        heads = [find(b, b.first + row)[1] for row in tile_rows(thread)] if c.stacked else [b.head] * product.slots
        found = {id(h): b.e.convert(kind, b.e.load("d", at + b.e.wide(h) * 8)) for h in {id(h): h for h in heads}.values()}
        return [found[id(h)] for h in heads]

    @macro("", *TYPES, PLACES, NUMBERS, "i", "i")
    def load_queries(e: Any, integers: Any, reals: Any, places: Any, numbers: Any, base: Any, thread: Any) -> None:
        b = Block(e, integers, reals, places, numbers)
        p = b.p
        if c.stacked:
            rows = Rows(b.query + e.wide(b.head) * p.group * p.query_head, p.query_row, p.query_column,
                        b.rows * p.int("group") - b.first, p.int("E"), b.first, group=p.int("group"),
                        member=p.query_head)  # fmt: skip
        else:
            rows = Rows(b.query, p.query_row, p.query_column, b.rows - b.first, p.int("E"), b.first)
        fetch(e, q, base, rows, thread, threads, c.storage, c.aligned)

    def load_rows(b: Block, name: str, tile: Tile, base: Any, thread: Any, j: Any) -> None:
        p, e = b.p, b.e
        row, column = getattr(p, f"{name}_row"), getattr(p, f"{name}_column")
        number = p.int("E" if name == "key" else "Ev")
        pages: dict[str, Any] = {}
        if c.paged:
            pages = {"pages": Sequence(e, p, b.index).pages, "page_size": p.int("page_size"),
                     "page": getattr(p, f"{name}_page")}  # fmt: skip
        rows = Rows(getattr(b, name), row, column, b.span.columns - j, number, j, **pages)
        fetch(e, tile, base, rows, thread, threads, c.storage, c.aligned)
        e.commit()

    @macro("", *TYPES, PLACES, NUMBERS, "i", "i", "i")
    def load_keys(e: Any, integers: Any, reals: Any, places: Any, numbers: Any, base: Any, thread: Any, j: Any) -> None:
        load_rows(Block(e, integers, reals, places, numbers), "key", k, base, thread, j)

    @macro("", *TYPES, PLACES, NUMBERS, "i", "i", "i")
    def load_values(e: Any, integers: Any, reals: Any, places: Any, numbers: Any, base: Any, thread: Any, j: Any) -> None:
        load_rows(Block(e, integers, reals, places, numbers), "value", v, base, thread, j)

    @macro("", *TYPES, "i", "i")
    def scale_queries(e: Any, integers: Any, reals: Any, base: Any, thread: Any) -> None:
        factor = Parameters(e, integers, reals).real("prescale", "d" if c.compute == "float64" else "f")
        scale_rows(e, q, base, factor, thread, threads)

    @macro("")
    def landed(e: Any) -> None:
        e.wait(0)

    @macro(f"{M} {M} {C}", *TYPES, PLACES, NUMBERS, "i", "i")
    def begin_rows(e: Any, integers: Any, reals: Any, places: Any, numbers: Any, thread: Any, part: Any) -> Any:
        sinks = None
        first = product.lane_column(lanes(thread)[1]).equals(0)
        if c.sinks:
            b = Block(e, integers, reals, places, numbers)
            sinks = []
            for row in tile_rows(thread):
                _, head = find(b, b.first + row)
                sinks.append(e.convert(kind, e.load("d", b.p.sinks + e.wide(head) * 8) * LOG2E))
            if split:
                low = e.const(kind, -math.inf)
                sinks = [e.select(part.equals(0), sink, low) for sink in sinks]
        return start(e, product, features, sinks, first)

    @macro(S, "i", "i")
    def multiply_keys(e: Any, base: Any, thread: Any) -> Any:
        return product.scores(e, q, k, base, *lanes(thread))

    def in_tile(b: Block, thread: Any, j: Any) -> Scores:
        _, lane = lanes(thread)
        rows = [find(b, b.first + row)[0] for row in tile_rows(thread)]
        return Scores(b.e, c, b.p, product, layout, rows, product.lane_column(lane) + j)

    staged = c.softcap or c.alibi or bool(c.bias) or c.mask

    @macro(S, *TYPES, PLACES, NUMBERS, "i", "i", S)
    def stages(
        e: Any, integers: Any, reals: Any, places: Any, numbers: Any, thread: Any, j: Any, s: Any
    ) -> Any:
        b = Block(e, integers, reals, places, numbers)
        where = {"offset": b.offset, "bias": b.bias, "mask": b.mask, "rows": b.rows, "key_rows": b.span.columns}
        if c.stacked:
            where["heads"] = [find(b, b.first + row)[1] for row in tile_rows(thread)]
        if c.alibi:
            where["slopes"] = slopes(b, thread)
        return in_tile(b, thread, j).stages(s, where)[0]

    @macro(S, *TYPES, PLACES, NUMBERS, "i", "i", S)
    def hide(e: Any, integers: Any, reals: Any, places: Any, numbers: Any, thread: Any, j: Any, s: Any) -> Any:
        b = Block(e, integers, reals, places, numbers)
        return in_tile(b, thread, j).hide(s, b.span)

    @macro(f"{S} {M} {M} {C}", *TYPES, S, M, M, C)
    def take_in(e: Any, integers: Any, reals: Any, s: Any, m: Any, l: Any, acc: Any) -> Any:
        factor = None if staged else Parameters(e, integers, reals).real("factor", kind)
        return fold(e, product, layout, features, s, m, l, acc, factor)

    @macro(C, "i", "i", C, S)
    def add_values(e: Any, base: Any, thread: Any, acc: Any, p: Any) -> Any:
        return product.add(e, acc, p, v, base, *lanes(thread))

    @macro("", *TYPES, PLACES, NUMBERS, "i", "i", M, M, C)
    def finish(
        e: Any, integers: Any, reals: Any, places: Any, numbers: Any, thread: Any, part: Any, m: Any, l: Any, acc: Any
    ) -> None:
        b = Block(e, integers, reals, places, numbers)
        l = total(e, product, l)
        if split:
            return write_part(b, thread, part, m, l, acc)
        _, lane = lanes(thread)
        zero, low = e.const(kind, 0.0), e.const(kind, -math.inf)
        begins = product.lane_column(lane).equals(0)
        for slot, row in enumerate(tile_rows(thread)):
            i, head = find(b, b.first + row)
            there, valid = i < b.rows, i < b.span.rows
            if careful:
                there = there & (e.load("i", flag_at(b, row), where=there) > 0)
            apart = e.wide(head) if c.stacked else e.const("l", 0)
            some = (l[slot] > 0.0) | e.is_nan(l[slot])
            scale = e.select(some, e.const(kind, 1.0) / l[slot], zero)
            mine = features.of_slot(slot)
            x = [e.select(valid, acc[n] * scale, zero) for n in mine]
            if flags:
                bad = e.const("i", 0)
                for y in x:
                    bad = bad | e.select(e.is_finite(y), e.const("i", 0), e.const("i", 1))
                bad = across_lanes(e, bad)
                e.store("i", flag_at(b, row), [bad], there & begins)
            address = b.out + apart * b.p.out_head + e.wide(i) * b.p.out_row
            write_row(e, c.storage, c.aligned, features, mine, x, address, b.p.out_column, product.lane_feature(lane), b.p.int("Ev"), there)
            lse = e.select(some & valid, (m[slot] + e.log2(l[slot])) * LN2, low)
            address = b.lse + apart * b.p.lse_head + e.wide(i) * b.p.lse_row
            e.store(kind, address, [lse], there & begins & (b.p.lse > 0))

    def across_lanes(e: Any, x: Any) -> Any:
        for distance in product.reduce:
            x = x | e.shuffle_xor(x, distance)
        return x

    def write_part(b: Block, thread: Any, part: Any, m: Any, l: Any, acc: Any) -> None:
        """Leave maximum, sum and accumulators of each row to `combine`."""
        e, p = b.e, b.p
        _, lane = lanes(thread)
        heads = p.heads // p.group if c.stacked else p.heads
        of_head = (e.wide(part) * p.number + e.wide(b.index)) * heads + e.wide(b.head)
        width, size = c.Ev + HEAD, 8 if kind == "d" else 4
        for slot, row in enumerate(tile_rows(thread)):
            at = p.partial + (of_head * p.flag_rows + e.wide(b.first + row)) * (width * size)
            there = exists(b, b.first + row)
            begins = product.lane_column(lane).equals(0) & there
            e.store(kind, at, [m[slot]], begins)
            e.store(kind, at + size, [l[slot]], begins)
            first = product.lane_feature(lane)
            group = features.neighbours
            mine = features.of_slot(slot)
            for n in range(0, len(mine), group):
                column = features.elements[mine[n]][1]
                target = at + e.wide(first + column) * size + HEAD * size
                e.store(kind, target, [acc[mine[n + i]] for i in range(group)], there)

    def kernel(integers, reals):  # type: ignore[no-untyped-def]
        base = shared_address(cuda.shared.array(0, np.uint8))
        thread, part = np.int32(cuda.threadIdx.x), np.int32(cuda.blockIdx.z)
        places, numbers = place(integers, reals, np.int32(cuda.blockIdx.x), np.int32(cuda.blockIdx.y))
        if careful:
            if cuda.syncthreads_or(marked(integers, reals, numbers, thread)) == 0:
                return
        j, end, all_begin, all_end = keys_seen(integers, reals, places, numbers, part)
        m, l, acc = begin_rows(integers, reals, places, numbers, thread, part)
        if j < end:
            load_queries(integers, reals, places, numbers, base, thread)
            load_keys(integers, reals, places, numbers, base, thread, j)
            landed()
            cuda.syncthreads()
            scale_queries(integers, reals, base, thread)
        while j < end:
            landed()
            cuda.syncthreads()
            load_values(integers, reals, places, numbers, base, thread, j)
            s = multiply_keys(base, thread)
            if staged:
                s = stages(integers, reals, places, numbers, thread, j, s)
            if j < all_begin or j + columns > all_end:
                s = hide(integers, reals, places, numbers, thread, j, s)
            p, m, l, acc = take_in(integers, reals, s, m, l, acc)
            landed()
            cuda.syncthreads()
            j = np.int32(j + columns)
            if j < end:
                load_keys(integers, reals, places, numbers, base, thread, j)
            acc = add_values(base, thread, acc, p)
        finish(integers, reals, places, numbers, thread, part, m, l, acc)

    return kernel
