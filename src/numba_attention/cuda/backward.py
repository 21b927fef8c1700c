"""The backward pass: FlashAttention-2 (Dao 2023), algorithm 2, in one kernel or in two.

Blocks that own tiles of keys sum dK and dV over queries and, for grouped heads, over the heads of the group. dQ is
summed over keys by other blocks, which own tiles of queries, without atomics: the same call has the same bits. With
``fused_dq`` the blocks of keys add their parts of dQ to memory by atomics, which takes five products instead of seven.

Every kernel recomputes the weights, P = exp(S - lse), as 2**(score * factor + offset), and dS = P (dO V^T - delta) with
delta = rowsum(dO O) - dlse; `rowwise` computes delta and offsets. Where the lse of a row is too large to determine its
denominator, `normalizers` provides the maximum of the row, which is subtracted from its scores first. The operands
that are summed over are double-buffered: the next tile is copied while this one is used.

Features beyond those of tiles pass in slices (`operands`): a block owns a slab of the features of one gradient.
"""

import numpy as np

from . import bias_tiles
from .blocks import (
    BACKWARD,
    FACTS,
    Block,
    Lanes,
    block_of,
    make_landed,
    make_marks,
    make_scale,
    packed_block,
    stage,
    work_item,
)
from .dropout import first_of_block, is_dropped, kept, mark, unmark
from .emit import I32, I64, SIZES, Emit, KernelFunction, Macro, Pred, Regs, Target
from .operands import Operands, both
from .parameters import PARAMETERS, Parameters
from .products import Layout, TensorCores
from .results import not_finite, write_row
from .softmax import across, recenter, recompute
from .spec import Spec, compute_capability, lay_out
from .tiles import CHUNK, Tile
from .visits import aligned, make_visits

NAMES = {"query": (*BACKWARD, "grad_query"), "key": (*BACKWARD, "grad_key", "grad_value", "sum_query")}


def copy_facts(
    e: Emit, kind: str, target: I32, address: I64, first: I32, most: I32, count: int, thread: I32, threads: int,
    asynchronous: bool,
) -> None:  # fmt: skip
    """Copy the `FACTS` of `count` queries from query `first` on to shared memory; zeros from query `most` on."""
    size = SIZES[kind]
    pitch, together = len(FACTS) * size, CHUNK // size
    for n in range(-(-count // threads)):
        index = thread + n * threads
        inside = index < count
        in_bounds = inside & (index + first < most)
        source = address + e.wide(e.select(in_bounds, index + first, index - index)) * pitch
        at = target + e.select(inside, index, index - index) * pitch
        for more in range(0, pitch, CHUNK):
            if asynchronous:
                e.copy_async(
                    at + more, source + more, e.select(in_bounds, e.const("i", CHUNK), e.const("i", 0)), inside
                )
            else:
                e.store_shared(kind, at + more, e.load(kind, source + more, together, where=in_bounds), inside)


class Tiles:
    """Shared memory of a block: the two tiles it owns, and two buffers for those it visits and facts of queries."""

    def __init__(self, c: Spec) -> None:
        of = {"query": ("query", "grad_out"), "key": ("key", "value")}
        self.own_names = of[c.task]
        self.other_names = of["key" if c.task == "query" else "query"]
        rows, columns, kept = c.rows, c.columns, c.compute
        self.size = 8 if kept == "float64" else 4
        facts = columns * len(FACTS) * self.size if c.task == "key" else 0
        self.period = 0  # bytes from one buffer to the next
        if c.is_sliced:
            names = self.own_names[0], self.other_names[0]
            if c.only == "value":  # no dP
                self.operands = [Operands(c, names)]
            else:
                self.operands = list(both(c, self.own_names, self.other_names))
            self.slab = Tile(columns, c.Ev, kept, self.operands[-1].end)
            self.facts = self.slab.end
            self.end = self.facts + facts
        else:
            self.own = lay_out((rows, c.E, kept), (rows, c.Ev, kept))
            first = self.own[1].end
            self.other = [
                Tile(columns, c.E, kept, first),
                Tile(columns, c.Ev, kept, first + columns * c.E * self.own[0].size),
            ]
            self.facts = self.other[1].end
            self.bias = bias_tiles.tile_of(c, self.facts + facts) if c.has_bias_tile else None
            self.period = (self.facts + facts if self.bias is None else self.bias.end) - first
            self.end = first + 2 * self.period
        product = c.make_product()
        if c.fused_dq:
            self.grads = Tile(rows, columns, kept, self.end)
            self.end = self.grads.end
        if c.product == "simt":
            self.scratch = self.end
            product.set_columns(columns)
            self.end += product.scratch * c.warps


def mended(b: Block) -> Pred:
    """Whether weights are to be mended in every tile: where any lse is far and, for dQ, in the last tile of keys.

    The score of a key that does not exist is 0, and its weight, exp(-lse), is infinite where all scores are below -88.
    """
    far = b.e.load("i", b.p.far) > 0
    return far | (b.first + b.c.rows > b.span.rows) if b.c.fused_dq else far


def write_own(
    b: Block, lanes: Lanes, grads: dict[str, tuple[Layout, Regs]], thread: I32, feature: I32 | None = None
) -> None:
    """Store the sums of the rows that a block owns, from a feature on; mark rows that are not finite.

    Each has its layout.
    """
    e, c, product = b.e, b.c, lanes.product
    thread = e.opaque(thread)
    lane, kind = thread & 31, product.kind
    # Underflow: the product of `rest` and `prescale` may be subnormal, so they are applied one after the other.
    rest, prescale, zero = b.p.real("rest", kind), b.p.real("prescale", kind), e.const(kind, 0.0)
    value_scale = b.p.real("dropout_scale", kind) if c.dropout else e.const(kind, 1.0)
    for slot, row in enumerate(lanes.rows(thread)):
        at = b.first + row
        in_bounds, valid = at < b.rows, at < b.span.rows
        if c.nan_safe:
            in_bounds = in_bounds & (b.is_marked(at, in_bounds) > 0)
        bad = e.const("i", 0)
        for name, (features, sum_) in grads.items():
            grad = f"grad_{name}"
            registers = features.of_slot(slot)
            z = [sum_[n] * value_scale if name == "value" else sum_[n] * rest * prescale for n in registers]
            z = [e.select(valid, number, zero) for number in z]
            if c.flags:
                bad = bad | not_finite(e, z)
            address = b.places[grad] + e.wide(at) * getattr(b.p, f"{grad}_row")
            width = b.p.int("Ev" if name == "value" else "E")
            begin, column = product.lane_feature(lane), getattr(b.p, f"{grad}_column")
            begin = begin if feature is None else begin + feature
            write_row(e, c.result, c.aligned, features, registers, z, address, column, begin, width, in_bounds)
        if c.flags:
            bad = across(e, product, bad, lambda a, b: a | b)
            b.mark(at, bad, in_bounds & product.lane_column(lane).equals(0))


def make_backward(c: Spec, on: Target) -> KernelFunction:
    """Make the kernel of ``c.task``, "query" or "key".

    Its grid is tiles for some heads (of keys), all of those, and slabs.
    """
    cuda, macro, shared_address, landed = on.cuda, on.macro, on.shared(), make_landed(c, on)
    of_keys = c.task == "key"
    product, tiles = c.make_product(), Tiles(c)
    if c.product == "simt":
        product.set_columns(c.columns)
        product.at = tiles.scratch
    kind, columns, threads = product.kind, c.columns, c.threads
    lanes = Lanes(c, product)
    layout = lanes.layout
    keeps = {"query": ("query",), "key": ("key", "value")}[c.task] if not c.only else (c.only,)
    sums = {name: product.features(c.Ev if name == "value" or c.is_sliced else c.E) for name in keeps}
    S = f"{kind}{len(layout)}"
    first, second = f"{kind}{len(sums[keeps[0]])}", f"{kind}{len(sums[keeps[-1]])}" if len(keeps) == 2 else f"{kind}1"
    names = (*NAMES[c.task], "grad_bias") if c.grad_bias else NAMES[c.task]
    staged = c.is_staged
    sliced, slab_width = c.is_sliced, c.Ev
    scale_own = make_scale(c, on, tiles.operands[0].all if sliced else tiles.own[0])
    nan_safe, two = c.nan_safe, len(keeps) == 2
    wants_ds, wants_value = "value" != c.only, "value" in keeps
    period, fused_dq = tiles.period, c.fused_dq
    BLOCK = packed_block(c, names)
    any_marked, marked = make_marks(c, on, BLOCK)
    together = compute_capability(c.arch) >= (9, 0)
    of_bias = None if c.is_sliced else tiles.bias
    writes_tile, writes_bias = c.grad_bias == "tiles", c.grad_bias not in ("", "tiles")
    lists = c.lists
    list_of, visit, show = make_visits(c, on, BLOCK, lanes)

    @macro((BLOCK, "i"), PARAMETERS, "i", "i")
    def find_work(e: Emit, p: Parameters, at_x: I32, at_y: I32) -> tuple[Block, I32]:
        index, tile, head = work_item(e, p, at_x, at_y, of_keys)
        group = p.int("group") if of_keys else e.const("i", 1)
        return block_of(e, c, p, names, index, tile, head, of_keys), group

    @macro("i4", BLOCK)
    def columns_seen(e: Emit, b: Block) -> Regs:
        """First column, the one after the last, and those that all rows see, which may be none (`mended`)."""
        begin, end, all_begin, all_end = b.span.of_rows(b.first, b.first + (c.rows - 1))
        if c.dropout and not of_keys:
            begin = first_of_block(begin)
        if lists:
            begin = aligned(begin)
        if of_bias is not None and not of_keys:
            begin = begin & -8
        elif c.pairs:
            begin = begin & -2
        return [begin, end, all_begin, e.select(mended(b), begin - begin, all_end)]

    @macro("", BLOCK, "i", "i")
    def load_own(e: Emit, b: Block, base: I32, thread: I32) -> None:
        if sliced:
            for operands in tiles.operands:
                operands.load_a(b, base, thread, b.first, b.span.rows)
            return
        for name, tile in zip(tiles.own_names, tiles.own, strict=True):
            b.load_tile(name, tile, base, thread, b.first, b.span.rows)

    def of_head(b: Block, name: str, g: I32) -> Block:
        """A block whose array of queries of that name is that of head g of the group."""
        if of_keys:
            b.places[name] = b.places[name] + b.e.wide(g) * getattr(b.p, f"{name}_head")
        return b

    @macro("", BLOCK, "i", "i", "i", "i", "i")
    def load_other(e: Emit, b: Block, base: I32, thread: I32, j: I32, g: I32, shift: I32) -> None:
        """Copy the tiles from column j on, of head g of the group, to the buffer that begins `shift` bytes further."""
        if sliced:
            of_scores = tiles.operands[0]
            of_scores.load_b(of_head(b, of_scores.names[1], g), base, thread, j, b.span.columns)
            return b.commit()
        base = base + shift
        for name, tile in zip(tiles.other_names, tiles.other, strict=True):
            of_head(b, name, g).load_tile(name, tile, base, thread, j, b.span.columns)
        if of_bias is not None:
            query, key, head = (j, b.first, g) if of_keys else (b.first, j, None)
            bias_tiles.load(b, of_bias, base, thread, query, key, head)
        load_facts(b, base, thread, j, g)

    def load_facts(b: Block, base: I32, thread: I32, j: I32, g: I32) -> None:
        e = b.e
        if of_keys:
            copy_facts(e, kind, base + tiles.facts, b.places["delta"] + e.wide(g) * b.p.delta_head, j, b.span.columns,
                       columns, e.opaque(thread), threads, c.aligned)  # fmt: skip
        b.commit()

    @macro("", BLOCK, "i", "i", "i", "i", "i")
    def load_slab(e: Emit, b: Block, base: I32, thread: I32, j: I32, g: I32, feature: I32) -> None:
        """Copy what P or dS is multiplied by, from a feature on."""
        name = tiles.other_names[0 if wants_ds else 1]
        of_head(b, name, g).load_tile(name, tiles.slab, base, thread, j, b.span.columns, feature)
        load_facts(b, base, thread, j, g)

    @macro("i i", "i", "i", "i", "i")
    def following(e: Emit, j: I32, g: I32, begin: I32, end: I32) -> tuple[I32, I32]:
        """The next tile of columns, and its head of the group."""
        after = j + columns
        over = after >= end
        return e.select(over, begin, after), e.select(over, g + 1, g)

    @macro(f"{first} {second}")
    def zeros(e: Emit) -> tuple[Regs, Regs]:
        zero = e.const(kind, 0.0)
        return [zero] * len(sums[keeps[0]]), [zero] * (len(sums[keeps[-1]]) if two else 1)

    def products(n: int, b: Block, base: I32, thread: I32, shift: I32, j: I32, g: I32) -> Regs:
        """Q K^T (0) or dO V^T (1), or their transposes."""
        e = b.e
        if not sliced:
            base, where = e.opaque(base), lanes.split(e.opaque(thread))
            return product.scores(e, tiles.own[n], tiles.other[n], base, *where, shift=shift)
        of_dp = tiles.operands[1] if wants_ds and n == 0 else None

        def beside() -> None:
            if of_dp is not None:
                of_dp.load_b(of_head(b, of_dp.names[1], g), base, thread, j, b.span.columns)
                b.commit()

        own = tiles.operands[n]
        return own.scores(
            of_head(b, own.names[1], g), product, e.opaque(base), e.opaque(thread), j, b.span.columns, beside
        )

    @macro(S, BLOCK, "i", "i", "i", "i", "i")
    def multiply(e: Emit, b: Block, base: I32, thread: I32, shift: I32, j: I32, g: I32) -> Regs:
        return products(0, b, base, thread, shift, j, g)

    @macro(f"{S} {S}" if c.has_slopes else S, BLOCK, "i", "i", "i", "i", "i", S)
    def stages(
        e: Emit, b: Block, base: I32, thread: I32, shift: I32, j: I32, g: I32, s: Regs
    ) -> Regs | tuple[Regs, Regs]:
        biases = None
        if of_bias is not None:
            assert isinstance(product, TensorCores)
            biases = bias_tiles.read(e, product, of_bias, e.opaque(base + shift), e.opaque(thread), of_keys)
        s, derivatives = stage(b, lanes, thread, j, s, g if of_keys else None, biases)
        return (s, derivatives) if c.has_slopes else s

    @macro(S, BLOCK, "i", "i", S)
    def hide(e: Emit, b: Block, thread: I32, j: I32, s: Regs) -> Regs:
        return lanes.scores(b, thread, j, of_keys).hide(s, b.span)

    def of_queries(e: Emit, name: str, b: Block | None, base: I32, thread: I32, shift: I32) -> Regs:
        """One of the `FACTS`, for each register: of its row from global memory, or of its column from shared memory."""
        more, pitch = FACTS.index(name) * tiles.size, len(FACTS) * tiles.size
        if of_keys:
            at = base + shift + product.lane_column(thread & 31) * pitch + (tiles.facts + more)
            of_column = {n: e.load_shared(kind, at + n * pitch) for n in dict.fromkeys(n for _, n in layout.elements)}
            return [of_column[n] for _, n in layout.elements]
        assert b is not None
        rows = [b.first + row for row in lanes.rows(thread)]
        at = b.places["delta"] + more
        of_slot = [e.load(kind, at + e.wide(row) * pitch, where=row < b.span.rows) for row in rows]
        return [of_slot[slot] for slot, _ in layout.elements]

    @macro("i", PARAMETERS)
    def any_far(e: Emit, p: Parameters) -> I32:
        return e.load("i", p.far)

    @macro(S, BLOCK, "i", "i", "i", S)
    def subtract(e: Emit, b: Block, base: I32, thread: I32, shift: I32, s: Regs) -> Regs:
        """Subtract the maxima of rows whose lse does not determine the denominator."""
        apart = recenter(e, s, of_queries(e, "maximum", b, base, e.opaque(thread), shift))
        return [e.select(product.is_hidden(e, x), x, y) for x, y in zip(s, apart, strict=True)] if nan_safe else apart

    @macro(S, BLOCK, "i", "i", "i", S)
    def weigh(e: Emit, b: Block, base: I32, thread: I32, shift: I32, s: Regs) -> Regs:
        """P of scores; hidden scores weigh 0."""
        factor, weights = b.p.real("factor", kind), []
        for x, offset in zip(s, of_queries(e, "offset", b, base, e.opaque(thread), shift), strict=True):
            if c.fused_dq and c.E > 96:  # all 255 registers are taken: the limit of a weight would spill one
                weight = e.exp2(e.fma(x, factor, offset))
            else:
                weight = recompute(e, x, factor, offset, c.has_nan_minimum)
            weights.append(e.select(product.is_hidden(e, x), x, weight) if nan_safe else weight)
        return weights

    @macro(S, BLOCK, "i", "i", "i", S)
    def drop(e: Emit, b: Block, thread: I32, j: I32, g: I32, p: Regs) -> Regs:
        """Mark the weights that are dropped, by their sign."""
        keeps = kept(b, lanes, thread, j, g if of_keys else None)
        return [mark(e, x, keep) for x, keep in zip(p, keeps, strict=True)]

    @macro(S, BLOCK, "i", "i", "i", "i", "i", S, *([S] if c.has_slopes else []))
    def differentiate(
        e: Emit, b: Block, base: I32, thread: I32, shift: I32, j: I32, g: I32, p: Regs,
        derivatives: Regs | None = None,
    ) -> Regs:  # fmt: skip
        """Compute dS from P: multiply by dO V^T - delta and by the derivatives of the stages."""
        dp = products(1, b, base, thread, shift, j, g)
        zero = e.const(kind, 0.0)
        ds = []
        if c.dropout:
            scale = b.p.real("dropout_scale", kind)
            dp = [e.select(is_dropped(e, weight), zero, x * scale) for weight, x in zip(p, dp, strict=True)]
            p = [e.abs(weight) for weight in p]
        for n, (x, delta) in enumerate(zip(dp, of_queries(e, "delta", b, base, e.opaque(thread), shift), strict=True)):
            y = p[n] * (x - delta)
            if derivatives is not None:
                y = y * derivatives[n]
            hidden = product.is_hidden(e, p[n]) if nan_safe else p[n].equals(0.0)
            ds.append(e.select(hidden, p[n] if nan_safe else zero, y))
        return ds

    def add_to(name: str, other_tile: Tile, size: str) -> Macro:
        @macro(size, "i", "i", "i", size, S)
        def add(e: Emit, base: I32, thread: I32, shift: I32, acc: Regs, p: Regs) -> Regs:
            if c.dropout and name == "value":
                p = [unmark(e, weight) for weight in p]
            return product.add(e, acc, p, other_tile, e.opaque(base), *lanes.split(e.opaque(thread)), shift=shift)

        return add

    summed = [tiles.slab] * 2 if sliced else tiles.other
    add_first = add_to(keeps[0], summed[keeps[0] == "value"], first)  # dQ += dS K, dK += dS^T Q, dV += P^T dO
    add_second = add_to("value", summed[1], second)

    @macro("", "i", "i", S)
    def leave(e: Emit, base: I32, thread: I32, ds: Regs) -> None:
        assert isinstance(product, TensorCores)
        product.leave(e, ds, tiles.grads, e.opaque(base), *lanes.split(e.opaque(thread)))

    @macro("", BLOCK, "i", "i", "i", "i")
    def add_queries(e: Emit, b: Block, base: I32, thread: I32, j: I32, g: I32) -> None:
        """Add dS K of this tile to the sums of dQ in global memory, by atomics."""
        warp, lane = lanes.split(e.opaque(thread))
        assert isinstance(product, TensorCores)
        total, row, feature, has_part = product.transposed(
            e, tiles.grads, tiles.own[0], e.opaque(base), warp, lane, c.warps
        )
        factor = b.p.real("rest", kind)
        at = b.places["sum_query"] + e.wide(g) * b.p.sum_query_head + e.wide(feature + (lane & 3) * 2) * 4
        for slot in (0, 1):
            i = j + row + (lane >> 2) + 8 * slot
            address, inside = at + e.wide(i) * b.p.sum_query_row, i < b.span.columns
            where = inside if has_part is None else has_part & inside
            for n in range(len(total) // 4):
                x = [total[4 * n + 2 * slot + part] * factor for part in (0, 1)]
                e.add(address + 32 * n, x, where, together)

    @macro("", BLOCK, "i", "i", "i", "i")
    def write_bias_tile(e: Emit, b: Block, base: I32, thread: I32, j: I32, g: I32) -> None:
        bias_tiles.write_tile(b, tiles.grads, e.opaque(base), e.opaque(thread), j, g)

    @macro("", BLOCK, "i", "i", "i", S)
    def write_bias(e: Emit, b: Block, thread: I32, j: I32, g: I32, ds: Regs) -> None:
        bias_tiles.write(b, lanes, e.opaque(thread), j, ds, g if of_keys else None)

    @macro("", BLOCK, "i", "i", first, second)
    def finish(e: Emit, b: Block, thread: I32, feature: I32, x: Regs, y: Regs) -> None:
        grads = {name: (sums[name], part) for name, part in zip(keeps, (x, y), strict=False)}
        write_own(b, lanes, grads, thread, feature if sliced else None)

    slopes, dropout = c.has_slopes, c.dropout

    def kernel(integers, reals):  # type: ignore[no-untyped-def]
        parameters = integers, reals
        base = shared_address(cuda.shared.array(0, np.uint8))
        thread = np.int32(cuda.threadIdx.x)
        at_x, at_y = np.int32(cuda.blockIdx.x), np.int32(cuda.blockIdx.y)
        feature = np.int32(0)
        if sliced:
            feature = np.int32(np.int32(cuda.blockIdx.z) * slab_width)
        if nan_safe:
            if any_marked(parameters) == 0:
                return
        block, group = find_work(parameters, at_x, at_y)
        if nan_safe:
            if cuda.syncthreads_or(marked(block, thread)) == 0:
                return
        begin, end, all_begin, all_end = columns_seen(block)
        x, y = zeros()
        j, g = begin, np.int32(0)
        if lists:
            until, words = np.int32(0), np.int32(0)
            turn, last = list_of(block)
            while (j >= until or j >= end) and turn < last:
                turn = np.int32(turn + 1)
                j, until, words, g = visit(block, turn, last, begin)
        if j < end:
            load_own(block, base, thread)
            load_other(block, base, thread, j, g, np.int32(0))
            landed()
            cuda.syncthreads()
            scale_own(parameters, base, thread)
            shift = np.int32(0)
            while g < group:
                landed()
                cuda.syncthreads()
                if lists:
                    next_j, next_g, next_words = np.int32(j + columns), g, words
                    while (next_j >= until or next_j >= end) and turn < last:
                        turn = np.int32(turn + 1)
                        next_j, until, next_words, next_g = visit(block, turn, last, begin)
                else:
                    next_j, next_g = following(j, g, begin, end)
                if sliced:
                    load_slab(block, base, thread, j, g, feature)
                else:
                    if next_g < group:
                        load_other(block, base, thread, next_j, next_g, np.int32(period - shift))
                s = multiply(block, base, thread, shift, j, g)
                if sliced:
                    landed()
                    cuda.syncthreads()
                    if not wants_ds:
                        if next_g < group:
                            load_other(block, base, thread, next_j, next_g, shift)
                if staged:
                    if slopes:
                        s, derivatives = stages(block, base, thread, shift, j, g, s)
                    else:
                        s = stages(block, base, thread, shift, j, g, s)
                if lists:
                    if words != 0:
                        s = show(block, thread, j, words, s)
                if j < all_begin or j + columns > all_end:
                    edge, _ = find_work(parameters, at_x, at_y)
                    s = hide(edge, thread, j, s)
                    if any_far(parameters) != 0:
                        s = subtract(edge, base, thread, shift, s)
                p = weigh(block, base, thread, shift, s)
                if dropout:
                    p = drop(block, thread, j, g, p)
                if wants_value:
                    if two:
                        y = add_second(base, thread, shift, y, p)
                    else:
                        x = add_first(base, thread, shift, x, p)
                if wants_ds:
                    if slopes:
                        ds = differentiate(block, base, thread, shift, j, g, p, derivatives)
                    else:
                        ds = differentiate(block, base, thread, shift, j, g, p)
                    if sliced:
                        cuda.syncthreads()
                        if next_g < group:
                            load_other(block, base, thread, next_j, next_g, shift)
                    if writes_bias:
                        write_bias(block, thread, j, g, ds)
                    x = add_first(base, thread, shift, x, ds)
                    if fused_dq:
                        leave(base, thread, ds)
                        cuda.syncthreads()
                        if writes_tile:
                            write_bias_tile(block, base, thread, j, g)
                        add_queries(block, base, thread, j, g)
                if lists:
                    j, g, words = next_j, next_g, next_words
                else:
                    j, g = following(j, g, begin, end)
                shift = np.int32(period - shift)
        block, group = find_work(parameters, at_x, at_y)
        finish(block, thread, feature, x, y)

    return kernel
