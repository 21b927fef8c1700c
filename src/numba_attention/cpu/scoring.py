"""The rows of a tile and their scores: what the forward and the backward pass have in common.

A tile is `query_tile` query rows of one key/value head. The query heads that share a key/value head are rows of the
same tile, position by position (row r is query r // G of head r % G), so that each key and value is read once for all
of them and the intervals of a tile stay narrow.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from ..philox import BLOCK
from . import features, pairs, stages, tiles
from .elements import ELEMENTS
from .gemm import micro_kernel
from .mods import call_tile
from .rows import begin_state as state_beginner
from .rows import place_addresses
from .rows import place_intervals as intervals_placer
from .scratch import areas_of, views
from .simd import void_pointer
from .softmax import FIRST, MAX, POSITION, SLOPE, SPAN, SUM, TILE_MAX
from .sources import Sources, make_sources
from .spec import Spec
from .views import UNBOUNDED, carray

LOG2E = math.log2(math.e)
# Blocked summation: a dot product sums this many features in one chain, longer ones in parts, which halves the error
# for 256 features.
FEATURES = 128
# The cap from which the maximum is looked for among capped scores: rounding, of some 4e-7 of the cap, may put another
# one above that of the largest product, and weights far above 1 overflow.
LARGE_CAP = 2.0**20


def bias_elements(spec: Spec) -> tuple[str, ...]:
    """What a bias may be stored as: the compute type, and the type of the queries where that is another."""
    compute = f"float{spec.vector.bits}"
    return (compute,) if spec.storage == compute else (compute, spec.storage)


class Scoring(NamedTuple):
    """Compiled functions; their arguments are the records of `params`, p and s, and the thread's scratch, at."""

    place_rows: Any
    pack_rows: Any
    products: Any
    hides_all: Any
    may_hide: Any
    score_tile: Any
    sources: Sources


def make_scoring(spec: Spec) -> Scoring:
    """Make the functions for one kind of kernel."""
    BM, MR = spec.query_tile, spec.block[0]
    vector, element = spec.vector, spec.element
    size, row_bytes = vector.bytes, BM * vector.bytes
    bf16_dot, widens_kv = spec.bf16_dot, spec.widens_kv
    real: Any = vector.dtype
    integer: Any = np.int32 if vector.bits == 32 else np.int64
    infinity = math.inf
    biases, quantized = len(bias_elements(spec)), spec.quantized
    by_features, no_tile = spec.task == "decode", np.int64(0)
    differentiates, twice = spec.task in ("backward", "second"), spec.task == "second"
    chain = 2 * FEATURES if bf16_dot else FEATURES
    # Rows of biases that are prefetched before each micro-kernel; narrow tiles are for sequences too short to gain.
    prefetches, lanes_a_row = spec.vectors == 0 and not by_features, max(1, BM // spec.key_tile)
    fetch_rows = tiles.fetch_rows(spec)

    mm_first = micro_kernel(spec, "product" if differentiates else "scores")
    mm_more = micro_kernel(spec, "output")
    pack_queries = pairs.gather_pairs(spec) if bf16_dot else tiles.gather_tile(spec, element)
    pack_keys = pairs.pair_columns(spec) if bf16_dot else tiles.widen_tile(spec)
    gather_mask = tiles.gather_tile(spec, ELEMENTS["bool"])
    add_bias = stages.add_bias(spec, ELEMENTS[bias_elements(spec)[0]])
    add_other_bias = stages.add_bias(spec, ELEMENTS[bias_elements(spec)[-1]])
    has_visible = tiles.has_visible(spec)
    softcap, cap_slope, cap_slopes = stages.softcap(spec), stages.cap_slope(spec), stages.cap_slopes(spec)
    multiply, alibi = stages.multiply(spec), stages.alibi(spec)
    hide, hide_bits = stages.hide(spec), stages.hide_bits(spec)
    clip_interval, tile_max = stages.clip_interval(spec), stages.tile_max(spec)
    sources = make_sources(spec)
    find_keys, scale = sources.find_keys, sources.scale
    place, place_intervals, begin_state = place_addresses(spec), intervals_placer(spec), state_beginner(spec)

    state_of, starts_of, stops_of, positions_of = views(areas_of(spec), "state starts stops positions")
    lane_rows_of, lane_heads_of = views(areas_of(spec), "lane_rows lane_heads")
    key_scale_rows_of, value_scale_rows_of = views(areas_of(spec), "key_scale_rows value_scale_rows")
    (relative_of,) = views(areas_of(spec), "state", integer)

    @spec.jit
    def place_numbers_of_heads(p: Any, s: Any, at: int) -> None:
        """Slopes and sinks of the tile's rows, to their state."""
        lane_heads, positions, state = lane_heads_of(p, at), positions_of(p, at), state_of(p, at)
        slopes = carray(void_pointer(p.slopes), UNBOUNDED, np.float64)
        sinks = carray(void_pointer(p.sinks), UNBOUNDED, np.float64)
        for lane in range(BM):
            h = s.head + lane_heads[lane]
            if p.slopes != 0:
                state[SLOPE, lane] = slopes[s.batch * p.heads + h]
            if p.sinks != 0 and positions[lane] < s.queries and sinks[h] != -infinity:
                state[MAX, lane], state[SUM, lane] = sinks[h] / p.unit, 1

    @spec.jit
    def place_rows(p: Any, s: Any, at: int, head: int, first_row: int, count: int) -> tuple[int, int, int, int]:
        """Fill the tables of the tile's rows; return the keys that any row sees, and those that all rows see.

        There are `count` rows, from `first_row` of a key/value head on, and of the next head where that one ends.
        """
        queries, rows, heads = at + p.at_positions, at + p.at_lane_rows, at + p.at_lane_heads
        positions, lane_rows, lane_heads = positions_of(p, at), lane_rows_of(p, at), lane_heads_of(p, at)
        chosen = carray(void_pointer(p.chosen), UNBOUNDED, np.int64)
        chooses, G, last = p.chosen != 0, p.group, s.rows
        row = first_row // G
        g = first_row - row * G
        for lane in range(BM):
            positions[lane] = chosen[row] if chooses else row  # the query, for now
            lane_rows[lane], lane_heads[lane] = row, head * G + g
            if lane + 1 < count:  # unused lanes repeat the last row
                g += 1
                if g == G:
                    g = 0
                    row += 1
                    if row == last:
                        row = 0
                        head += 1
        place(at + p.at_query_rows, queries, heads, p.query + s.query, p.query_row, p.query_head)
        place(at + p.at_out_rows, rows, heads, p.out + s.out, p.out_row, p.out_head)
        if p.lse != 0:
            place(at + p.at_lse_rows, rows, heads, p.lse + s.lse, p.lse_row, p.lse_head)
        if p.bias != 0:
            place(at + p.at_bias_rows, queries, heads, p.bias + s.bias, p.bias_row, p.bias_head)
        if p.mask != 0:
            place(at + p.at_mask_rows, queries, heads, p.mask + s.mask, p.mask_row, p.mask_head)
        if quantized:
            key_scale_rows, value_scale_rows = key_scale_rows_of(p, at), value_scale_rows_of(p, at)
            for lane in range(BM):
                h = lane_heads[lane] // G
                key_scale_rows[lane] = s.key_scale + h * p.key_scale_head
                value_scale_rows[lane] = s.value_scale + h * p.value_scale_head
        any_start, any_stop, all_start, all_stop = place_intervals(
            queries, at + p.at_starts, at + p.at_stops, s.offset - p.left, s.offset + p.right, s.queries, s.keys,
            s.prefix,
        )  # fmt: skip
        begin_state(at + p.at_state)
        if p.slopes != 0 or p.sinks != 0:
            place_numbers_of_heads(p, s, at)
        place(queries, queries, heads, s.offset + p.first_key, 1, 0)
        if p.dropout != 0:  # tiles of keys consist of whole groups of random numbers
            any_start = any_start // BLOCK * BLOCK
        return any_start, any_stop, all_start, all_stop

    @spec.jit
    def pack_rows(tile: int, rows: int, column: int, features: int, factor: float) -> None:
        """Pack the rows that a table tells, times a power of two, as the second operand of `products`."""
        if bf16_dot:
            pack_queries(tile, rows, column, features, factor)
        else:
            pack_queries(tile, rows, 0, column, features, factor)

    @spec.jit
    def products(
        p: Any, at: int, target: int, source: int, row: int, column: int, n: int, features: int, tile: int, packed: int,
        later: int, offset: int, count: int,
    ) -> None:  # fmt: skip
        """target[j, lane] = sum_e source[j, e] tile[e, lane] for j < n; in the forward pass, their maximum to TILE_MAX.

        `packed` is room for the n rows of the source, where they cannot be read from where they are. Meanwhile `count`
        bytes at `offset` of the rows in the table `later` are prefetched, unless it is 0.
        """
        depth = features
        if bf16_dot:
            depth = (features + 1) // 2
            if column != 2 or features % 2 == 1:
                pack_keys(packed, source, row, column, n, features)
                source, row = packed, depth * 4
            column = 4
        elif widens_kv:
            pack_keys(packed, source, row, column, n, features)
            source, row, column = packed, features * size, size
        lanes, state = state_of(p, at), at + p.at_state
        lanes[TILE_MAX] = -infinity
        for r in range(0, n, MR):
            if prefetches and count > 0:
                fetch_rows(later, r * lanes_a_row, lanes_a_row * MR, offset, count)
            mm_first(
                target + r * row_bytes, row_bytes, source + r * row, row, column, min(MR, n - r),
                tile, row_bytes, min(depth, FEATURES), state,
            )  # fmt: skip
        for e in range(FEATURES, depth, FEATURES):
            lanes[TILE_MAX] = 1  # here the factor of role "output"; the caller takes the maximum of complete scores
            for r in range(0, n, MR):
                mm_more(
                    target + r * row_bytes, row_bytes, source + r * row + e * column, row, column,
                    min(MR, n - r), tile + e * row_bytes, row_bytes, min(FEATURES, depth - e),
                    state + TILE_MAX * row_bytes,
                )  # fmt: skip

    @spec.jit
    def multiply_keys_by_queries(p: Any, s: Any, at: int, head: int, j0: int, n: int) -> None:
        """Products of the tile's rows with n keys."""
        if differentiates:
            keys, row, column = p.key + s.key + head * p.key_head + j0 * p.key_row, p.key_row, p.key_column
        else:
            keys, row, column = find_keys(p, s, at, head, j0, n)
        count, step = 0, p.bias_column
        if prefetches and p.bias_kind != 0 and 0 < step <= size:
            count = n * step
        # The bias of the next tile of keys: that of this one would come too late.
        products(
            p, at, at + p.at_scores, keys, row, column, n, p.E, at + p.at_queries, at + p.at_keys,
            at + p.at_bias_rows, (j0 + n) * step, count,
        )  # fmt: skip

    multiply_keys = features.multiply_keys(spec) if by_features else multiply_keys_by_queries

    @spec.jit
    def hides_all(p: Any, s: Any, at: int, j0: int, n: int) -> bool:
        """Load the tile of the mask; whether it hides every key of the tile from every row."""
        gather_mask(at + p.at_mask, at + p.at_mask_rows, j0 * p.mask_column, p.mask_column, n, real(1))
        return not has_visible(at + p.at_mask, n)

    @spec.jit
    def may_hide(p: Any) -> bool:
        """Whether scores of -inf are hidden keys; else they come from infinite inputs only."""
        hides: bool = p.mask != 0 or p.bias_kind != 0 or p.visible != 0 or p.score_mod != 0 or p.mask_mod != 0
        return hides

    @spec.jit
    def score_tile(p: Any, s: Any, at: int, head: int, j0: int, n: int, edge: bool, bits: int) -> None:
        """Scores of the tile's rows with keys j0 .. j0 + n; p.unit * LOG2E takes them to powers of 2.

        At `bits`, unless it is 0, are the words of a block mask.
        """
        scores, state = at + p.at_scores, at + p.at_state
        lanes = state_of(p, at)
        multiply_keys(p, s, at, head, j0, n)
        factor, natural = real(p.rest), real(1)
        known = not quantized and not by_features and p.E <= chain  # whether TILE_MAX has the maxima of these scores
        if quantized:
            scale(p, s, at, scores, at + p.at_key_scale_rows, p.key_scale_page, j0, n, False)
        if p.tiny != 0:
            multiply(scores, n, factor)
            factor, known = natural, False
        if p.cap_outer != 0:
            softcap(scores, n, real(p.cap_inner), real(p.cap_outer), state)
            known = known and p.cap_outer < LARGE_CAP
            if twice:
                cap_slopes(scores, n, real(1 / p.cap_outer), at + p.at_cap_slopes, at + p.at_cap_curves)
            elif differentiates:
                cap_slope(scores, n, real(1 / p.cap_outer), at + p.at_cap_slopes)
            factor = natural
        if p.score_mod != 0:
            call_tile(
                p.score_mod, p.mod_data, scores, n, j0 + p.first_key, s.number, s.head + p.first_head,
                at + p.at_positions, at + p.at_lane_heads, at + p.at_mod_slopes, at + p.at_mod_scores,
                np.float64(factor),
            )  # fmt: skip
            factor, known = natural, False
        if p.slopes != 0:
            positions = positions_of(p, at)
            for lane in range(BM):
                lanes[POSITION, lane] = positions[lane] - j0 - p.first_key
            alibi(scores, n, state, factor)
            factor, known = natural, True
        if p.bias_kind != 0:
            rows, offset, column, room = at + p.at_bias_rows, j0 * p.bias_column, p.bias_column, at + p.at_bias
            if p.bias_kind == 1:
                known = add_bias(scores, n, rows, offset, column, room, factor, state)
            elif biases == 2:
                known = add_other_bias(scores, n, rows, offset, column, room, factor, state)
            factor = natural
        if p.mask != 0:
            hide(scores, n, at + p.at_mask, factor, state)
            factor, known = natural, True
        if p.mask_mod != 0:
            call_tile(
                p.mask_mod, p.mod_data, scores, n, j0 + p.first_key, s.number, s.head + p.first_head,
                at + p.at_positions, at + p.at_lane_heads, no_tile, no_tile, np.float64(factor),
            )  # fmt: skip
            known = False
        if bits != 0:
            hide_bits(scores, n, bits, state)
            known = True
        if edge:
            starts, stops = starts_of(p, at), stops_of(p, at)
            relative = relative_of(p, at)
            for lane in range(BM):
                first = min(max(starts[lane] - j0, 0), n)
                relative[FIRST, lane] = first
                relative[SPAN, lane] = max(min(stops[lane] - j0, n), first) - first
            clip_interval(scores, n, state)
            known = True
        if not known and not differentiates:
            tile_max(scores, n, state)

    return Scoring(place_rows, pack_rows, products, hides_all, may_hide, score_tile, sources)
