"""The backward pass on the CPU: FlashAttention-2 (Dao 2023) algorithm 2, which recomputes weights tile by tile.

As in the forward pass a tile of queries lies in the lanes and visits its tiles of keys; five products instead of two:

    S^T = K Q^T, dP^T = V dO^T, dQ^T += K^T dS^T      queries in the lanes
    dV += P^T dO, dK += dS^T Q                        features in the lanes

The tiles of queries of one key/value head are dealt out to `groups`, a number that follows from the sizes of the
sequence alone. A group sums its dK and dV by itself, and the sums of the groups are added in order: no bit depends on
the threads or on the rest of the batch. A work item is one head, or where heads are few one group, of which the last to
be done adds them up: a row (head, group or -1, offset of the head's sums, counter) of `members`. Threads that find no
further item join others at theirs (`turns`).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..sequence_record import SEQUENCE
from . import pairs, stages, tiles
from .dropout import drop_gradients
from .gemm import micro_kernel
from .mods import call_tile
from .params import PARAMS, STOPPED
from .scoring import LOG2E, make_scoring
from .scratch import areas_of, layout_of, views
from .second import make_second
from .simd import fetch, fetch_add, void_pointer
from .softmax import (
    INVERSE,
    LEVEL,
    MAX,
    RESCALE,
    SUM,
    SUM_HIGH,
    SUM_LOW,
    SUM_ROWS,
    TILE_MAX,
    multiply_tile,
    row_products,
    second_level,
    softmax_gradient,
    softmax_step,
)
from .softmax import add_tiles as add_two_tiles
from .spec import Spec
from .sums import CLEAN, LOST, add_products, add_transposed, copy_rows, write_sums
from .sums import add_sums as sums_adder
from .turns import SPAN, announce, await_turn, invite, item_to_join, record_of, sums_of, take_tile
from .views import UNBOUNDED, carray
from .visible import make_visible

DELTA = SUM  # the row of the state that holds rowsum(dO * O) - dlse once denominators are no longer needed
# Cancellation: sums of a long sequence are cleared, added and written in parts, and the counter is polled (`STOPPED`)
# before each, so that an interrupted call returns within milliseconds.
PART = 2**24  # bytes
ROWS_AT_ONCE = 2**14


def large_lse(mantissa: int) -> tuple[float, float]:
    """Where the rounding of lse begins to matter, and how far off lse may be from rounded scores, relative to its size.

    In float32 the weights are within 6e-5 up to an lse of 1024, from where on a part that has more than 0.998 of the
    denominator counts as the whole; the factor of 2**4 leaves room for scores that were summed in another order.
    """
    return 2.0 ** (mantissa // 2 - 1), 2.0 ** (4 - mantissa)


def scratch(spec: Spec, E: int, Ev: int, sums: int) -> tuple[dict[str, int], int, int]:
    """Byte offsets of the scratch areas of one thread, their sum, and how many rows the tile of dQ has.

    `sums` is how many bytes of dK and dV a thread keeps.
    """
    areas, offsets, size = layout_of(spec, E, Ev, sums)
    depth = areas["out"].shape[0] if spec.task == "second" else -(-E // spec.block[0]) * spec.block[0]
    return offsets, size, depth


def make_worker(spec: Spec) -> Callable[[int, int], int]:
    """Make the function that one thread runs: take work items until none is left."""
    BM, BN, MR = spec.query_tile, spec.key_tile, spec.block[0]
    vector, element = spec.vector, spec.element
    size, row_bytes, vectors = vector.bytes, BM * vector.bytes, spec.block[1]
    bf16_dot, widens_kv, item_size = spec.bf16_dot, spec.widens_kv, spec.out_element.size
    real: Any = vector.dtype
    infinity = math.inf
    large, tolerance = large_lse(vector.mantissa)

    state_of, scores_of, grad_scores_of, grad_query_of, high_of, low_of = views(
        areas_of(spec), "state scores grad_scores out high low"
    )
    starts_of, stops_of, lse_rows_of, lane_rows_of, lane_heads_of = views(
        areas_of(spec), "starts stops lse_rows lane_rows lane_heads"
    )
    grad_rows_of, grad_query_rows_of, grad_bias_rows_of, dirty_of = views(
        areas_of(spec), "grad_rows grad_query_rows grad_bias_rows dirty"
    )
    scoring = make_scoring(spec)
    place_rows, pack_rows, products, hides_all, _, score_tile, _ = scoring
    list_of, tile_of, runs_of, clip, following = make_visible(spec)
    mm_query = micro_kernel(spec, "output")
    pair_keys, drop_halves = pairs.pair_rows(spec), pairs.drop_nonfinite(spec)
    narrow, pair = pairs.narrow_tile(spec), pairs.pair_tile(spec)
    gather = tiles.gather_tile(spec, element)
    widen, fetch_two = tiles.widen_tile(spec), tiles.fetch_two(spec)
    write_tile = tiles.scatter_tile(spec)
    has_nan, drop_nonfinite = tiles.has_nan(spec), tiles.drop_nonfinite(spec)
    differentiate_softmax, row_sums = softmax_gradient(spec), row_products(spec)
    scale_scores, multiply_kept = stages.multiply(spec), multiply_tile(spec, keeps_zero=True)
    tile_max, step_softmax = stages.tile_max(spec), softmax_step(spec, pairs=False)
    carry_denominator, carry, add_tiles = second_level(spec), second_level(spec, online=False), add_two_tiles(spec)
    copy, add, add_to_bias = copy_rows(spec), add_products(spec), add_transposed(spec)
    add_sums, write = sums_adder(spec), write_sums(spec)
    drop = drop_gradients(spec)

    @spec.jit
    def bytes_of(p: Any, s: Any) -> int:
        """Of the sums of one group: dK, then dV."""
        total: int = (s.key_rows + SUM_ROWS) * (p.E_padded + p.Ev_padded) * size
        return total

    @spec.jit
    def has_large_lse(p: Any, at: int) -> bool:
        """Whether some lse is so large that its rounding is an error of the weights."""
        lse_rows = lse_rows_of(p, at)
        for lane in range(BM):
            size = abs(carray(void_pointer(lse_rows[lane]), 1, real)[0])
            if size > large and size < infinity:
                return True
        return False

    @spec.jit
    def find_denominators(p: Any, s: Any, at: int, head: int, listed: int, seen: tuple[int, int, int, int]) -> None:
        """Maxima and denominators of the rows from their scores, to MAX and SUM: what a large lse has lost."""
        start, stop, all_start, all_stop = seen
        scores, state, factor, visited = at + p.at_scores, at + p.at_state, real(p.unit * LOG2E), 0
        first_run, last_run = runs_of(p, listed, start)
        for run in range(first_run, last_run):
            low, high, bits = clip(p, run, start, stop)
            for j0 in range(low, high, BN):
                if fetch(p.counter) >= STOPPED:
                    return
                n = min(BN, high - j0)
                if p.mask != 0 and hides_all(p, s, at, j0, n):
                    continue
                score_tile(p, s, at, head, j0, n, j0 < all_start or j0 + n > all_stop, bits)
                tile_max(scores, n, state)
                step_softmax(scores, n, state, factor, scores)
                visited += 1
                if visited % LEVEL == 0:
                    carry_denominator(scores, 0, scores, scores, state, factor)
        carry_denominator(scores, 0, scores, scores, state, factor)
        add_tiles(state + SUM * row_bytes, state + SUM_HIGH * row_bytes, state + SUM_LOW * row_bytes, 1)

    @spec.jit
    def place_gradients(p: Any, s: Any, at: int, head: int, first_row: int, group: int) -> bool:
        """Fill the tables and the state that only the backward pass needs; whether lse has NaN."""
        rows, heads = lane_rows_of(p, at), lane_heads_of(p, at)
        starts, stops, lse_rows = starts_of(p, at), stops_of(p, at), lse_rows_of(p, at)
        grad_rows, grad_query_rows = grad_rows_of(p, at), grad_query_rows_of(p, at)
        grad_bias_rows, dirty = grad_bias_rows_of(p, at), dirty_of(p, at)
        state = state_of(p, at)
        bias = p.grad_bias + s.grad_bias + group * p.grad_bias_group
        last = s.rows * p.group - first_row
        lost = False
        for lane in range(BM):
            i, h = rows[lane], heads[lane]
            dirty[lane] = CLEAN
            grad_rows[lane] = p.grad_out + s.grad_out + h * p.grad_out_head + i * p.grad_out_row
            grad_query_rows[lane] = p.grad_query + s.grad_query + h * p.grad_query_head + i * p.grad_query_row
            grad_bias_rows[lane] = bias + h * p.grad_bias_head + i * p.grad_bias_row
            lse = carray(void_pointer(lse_rows[lane]), 1, real)[0]
            # lse is split into a maximum in the unit of the scores and an inverse denominator, the exponential of what
            # rounding the maximum leaves of it.
            highest = real(lse / p.unit)
            inverse = math.exp(np.float64(highest) * p.unit - np.float64(lse))
            if math.isfinite(lse) and abs(lse) > large and state[SUM, lane] > 0:
                # Recomputed denominator: where lse is that of the keys of this call, within the rounding of scores, the
                # recomputed pair replaces it, so that weights sum to 1 however large scores are. An lse merged over
                # more keys is larger, and stays.
                recomputed_lse = np.float64(state[MAX, lane]) * p.unit + math.log(np.float64(state[SUM, lane]))
                if lse <= recomputed_lse + abs(np.float64(lse)) * tolerance:
                    highest, inverse = state[MAX, lane], 1 / np.float64(state[SUM, lane])
            state[MAX, lane], state[INVERSE, lane] = highest, inverse
            # Dropout: P is multiplied by the scale of kept weights here, and delta divided by it in `write_delta`, so
            # that dS = P (dP - delta) holds for kept weights, and dV = P^T dO.
            state[INVERSE, lane] *= real(p.dropout_scale)
            state[RESCALE, lane] = 1
            # A maximum of infinity makes every weight 0: for rows that see no key, and for the copies of the last row
            # in the unused lanes of a partial tile.
            if lane >= last or lse == -infinity or starts[lane] >= stops[lane]:
                state[MAX, lane], state[INVERSE, lane] = infinity, 1
            elif math.isnan(lse):
                state[MAX, lane], state[INVERSE, lane] = 0, 1
                dirty[lane], lost = LOST, True
            elif lse == infinity:
                state[INVERSE, lane] = 1
            if lane >= last:
                grad_query_rows[lane] = at + p.at_spare
        return lost

    @spec.jit
    def write_delta(p: Any, s: Any, at: int, first_row: int) -> None:
        """Subtract dlse from rowsum(dO * O), and write this delta to the array that gives the gradient of the sinks."""
        rows, heads = lane_rows_of(p, at), lane_heads_of(p, at)
        state = state_of(p, at)
        for lane in range(BM):
            i, h = rows[lane], heads[lane]
            if p.grad_lse != 0:
                address = p.grad_lse + s.grad_lse + h * p.grad_lse_head + i * p.grad_lse_row
                state[DELTA, lane] -= carray(void_pointer(address), 1, real)[0]
            if p.delta != 0:
                address = p.delta + s.delta + h * p.delta_head + i * p.delta_row
                carray(void_pointer(address), 1, real)[0] = state[DELTA, lane]
            state[DELTA, lane] /= real(p.dropout_scale)

    @spec.jit
    def load_rows(p: Any, s: Any, at: int, first_row: int) -> bool:
        """Pack what belongs to the rows of the tile but queries; whether grad_out holds NaN or infinity."""
        grads, state = at + p.at_grads, at + p.at_state
        pack_rows(grads, at + p.at_grad_rows, p.grad_out_column, p.Ev, real(1))
        if bf16_dot:
            grads = at + p.at_extra
            gather(grads, at + p.at_grad_rows, 0, p.grad_out_column, p.Ev, real(1))
        gather(at + p.at_out, at + p.at_out_rows, 0, p.out_column, p.Ev, real(1))
        row_sums(grads, at + p.at_out, p.Ev, state + DELTA * row_bytes)
        write_delta(p, s, at, first_row)
        no_marks = np.int64(0)
        copy(at + p.at_query_copy, at + p.at_query_rows, p.query_column, p.E, p.E_padded, no_marks)
        marks = at + p.at_dirty
        dirty: bool = copy(at + p.at_grad_copy, at + p.at_grad_rows, p.grad_out_column, p.Ev, p.Ev_padded, marks)
        return dirty

    @spec.jit
    def lose_scores(p: Any, at: int, n: int) -> None:
        """Where lse is NaN, the weights will be; for now they are 1, or 0 where the row does not see the key."""
        dirty = dirty_of(p, at)
        scores = scores_of(p, at)
        for j in range(n):
            for lane in range(BM):
                if dirty[lane] == LOST and scores[j, lane] != -infinity:
                    scores[j, lane] = 0

    @spec.jit
    def spread_nan(p: Any, at: int, n: int) -> None:
        """A row with NaN in lse or grad_out gives NaN to the keys and values that it sees, and to no other."""
        dirty = dirty_of(p, at)
        weights = scores_of(p, at)
        grad_scores = grad_scores_of(p, at)
        for j in range(n):
            for lane in range(BM):
                if dirty[lane] != CLEAN and weights[j, lane] != 0:
                    weights[j, lane] = grad_scores[j, lane] = math.nan

    @spec.jit
    def add_query_gradient(p: Any, s: Any, at: int, head: int, j0: int, n: int, later: int, nan_safe: bool) -> None:
        """dQ^T += K^T dS^T; the tile of keys that begins at `later` is prefetched, unless it is -1."""
        keys = p.key + s.key + head * p.key_head + j0 * p.key_row
        row, column = p.key_row, p.key_column
        grad_scores, depth, packed = at + p.at_grad_scores, n, at + p.at_packed_keys
        if bf16_dot:
            pair_keys(packed, keys, row, column, n, p.E)
            keys, row, column = packed, p.E * size, size
            grad_scores, depth = at + p.at_paired, (n + 1) // 2
            if nan_safe:
                drop_halves(packed, depth * 2 * p.E)
        elif nan_safe:
            widen(packed, keys, row, column, n, p.E)
            keys, row, column = packed, p.E * size, size
            drop_nonfinite(packed, n * p.E)
        elif widens_kv:
            keys, row, column = at + p.at_keys, p.E * size, size  # the copy in the compute type that the scores used
        next_keys = p.key + s.key + head * p.key_head + later * p.key_row
        next_values = p.value + s.value + head * p.value_head + later * p.value_row
        share = (BN * MR + p.E - 1) // p.E  # of the keys of a tile, for each micro-kernel
        for e in range(0, p.E, MR):
            j = e // MR * share
            if later >= 0 and j < BN:
                fetch_two(
                    next_keys + j * p.key_row, p.key_row, next_values + j * p.value_row, p.value_row, share,
                    (p.E + p.Ev) // 2 * element.size,
                )  # fmt: skip
            mm_query(
                at + p.at_out + e * row_bytes, row_bytes, keys + e * column, column, row, min(MR, p.E - e),
                grad_scores, row_bytes, depth, at + p.at_state + RESCALE * row_bytes,
            )  # fmt: skip

    @spec.jit
    def visit_keys(
        p: Any, s: Any, at: int, head: int, j0: int, n: int, edge: bool, bits: int, sums: int, mod_sums: int,
        dirty: bool, nan_safe: bool, later: int,
    ) -> None:  # fmt: skip
        """One tile of keys: the weights, their gradients, and what follows from both."""
        weights, grad_scores = at + p.at_scores, at + p.at_grad_scores
        score_tile(p, s, at, head, j0, n, edge, bits)
        values = p.value + s.value + head * p.value_head + j0 * p.value_row
        state = at + p.at_state
        grads = at + p.at_grads
        count, column = 0, p.grad_bias_column
        if p.grad_bias != 0 and column == size and p.grad_bias_once == 0:
            count = n * column
        products(
            p, at, grad_scores, values, p.value_row, p.value_column, n, p.Ev, grads, at + p.at_values,
            at + p.at_grad_bias_rows, j0 * column, count,
        )  # fmt: skip
        if dirty:
            lose_scores(p, at, n)
        differentiate_softmax(weights, grad_scores, n, state, real(p.unit * LOG2E))
        if dirty:
            spread_nan(p, at, n)
        if p.dropout != 0:
            positions, heads = at + p.at_positions, at + p.at_lane_heads
            drop(
                weights, grad_scores, state, n, j0 + p.first_key, positions, heads, s.head + p.first_head, s.number,
                p.seed, p.dropout,
            )  # fmt: skip
        if p.grad_bias != 0 and not nan_safe:
            once = p.grad_bias_once != 0
            add_to_bias(grad_scores, at + p.at_grad_bias_rows, j0 * column, column, n, at + p.at_spare, once)
        if p.mod_gradient != 0 and not nan_safe:
            call_tile(
                p.mod_gradient, p.mod_data, grad_scores, n, j0 + p.first_key, s.number, s.head + p.first_head,
                at + p.at_positions, at + p.at_lane_heads, at + p.at_mod_scores, mod_sums, 1.0,
            )  # fmt: skip
        if p.mod_has_slope != 0:
            multiply_kept(grad_scores, n, at + p.at_mod_slopes)
        if p.tiny != 0:
            scale_scores(grad_scores, n, real(p.gradient_prescale))
        if p.cap_outer != 0:
            multiply_kept(grad_scores, n, at + p.at_cap_slopes)
        if bf16_dot:  # the last three products are of rounded weights and gradients of scores, as the first two are
            padded = (n + SUM_ROWS - 1) // SUM_ROWS * SUM_ROWS
            pair(grad_scores, at + p.at_paired, padded, vectors)
            narrow(grad_scores, padded)
            narrow(weights, padded)
        add_query_gradient(p, s, at, head, j0, n, later, nan_safe)
        if nan_safe:
            return
        add(sums + j0 * p.E_padded * size, grad_scores, at + p.at_query_copy, n, p.E_padded)
        value_sums = sums + (s.key_rows + SUM_ROWS) * p.E_padded * size
        add(value_sums + j0 * p.Ev_padded * size, weights, at + p.at_grad_copy, n, p.Ev_padded)

    @spec.jit
    def begin(p: Any, at: int) -> None:
        """Clear dQ of the tile's rows."""
        grad_query_of(p, at)[: p.out_depth] = 0

    @spec.jit
    def rows_of(p: Any) -> int:
        """Rows of the tile of sums that grows with the keys."""
        rows: int = p.E
        return rows

    @spec.jit
    def finish(p: Any, s: Any, at: int, first_row: int) -> None:
        """Nothing is left to be done when all keys have been visited."""

    @spec.jit
    def wants_gradients(p: Any) -> bool:
        return True

    @spec.jit
    def knows_lse(p: Any) -> bool:
        """Whether lse is an input."""
        return True

    @spec.jit
    def carry_gradient(p: Any, at: int, first: bool) -> None:
        """Move the sums of dQ over the last tiles of keys to the second level."""
        if first:
            high_of(p, at)[: p.E] = 0
            low_of(p, at)[: p.E] = 0
        carry(at + p.at_out, p.E, at + p.at_high, at + p.at_low, at + p.at_state, real(1))

    if spec.task == "second":
        own = make_second(spec, scoring, bytes_of, load_rows, lose_scores, spread_nan)
        bytes_of, load_rows, begin, visit_keys, rows_of, finish, wants_gradients, knows_lse, carry_gradient = own

    @spec.jit
    def visit_rows(
        p: Any, s: Any, at: int, head: int, first_row: int, group: int, sums: int, mod_sums: int, record: int,
        place: int,
    ) -> None:  # fmt: skip
        """One tile of queries: dQ of its rows, and their part of dK and dV, in its turn if the item has a record."""
        state = state_of(p, at)
        listed = list_of(p, s, head, first_row // BM)
        seen = place_rows(p, s, at, head, first_row, min(BM, s.rows * p.group - first_row))
        start, stop, all_start, all_stop = seen
        pack_rows(at + p.at_queries, at + p.at_query_rows, p.query_column, p.E, real(p.prescale))
        dirty = False
        if knows_lse(p):
            if has_large_lse(p, at):
                find_denominators(p, s, at, head, listed, seen)
            dirty = place_gradients(p, s, at, head, first_row, group)
        dirty = load_rows(p, s, at, first_row) or dirty
        nan_safe = False
        while True:
            begin(p, at)
            visited = 0
            first_run, last_run = runs_of(p, listed, start)
            for run in range(first_run, last_run):
                low, high, bits = clip(p, run, start, stop)
                for j0 in range(low, high, BN):
                    if fetch(p.counter) >= STOPPED:
                        return
                    n = min(BN, high - j0)
                    if p.mask == 0 or not hides_all(p, s, at, j0, n):
                        edge = j0 < all_start or j0 + n > all_stop
                        later = following(p, run, last_run, j0 + BN, high, start, stop)
                        joined = record != 0 and not nan_safe
                        if joined and not await_turn(p.turns, record, place, j0 + n, p.counter):
                            return
                        visit_keys(p, s, at, head, j0, n, edge, bits, sums, mod_sums, dirty, nan_safe, later)
                        if joined:
                            announce(p.turns, record, place, j0 + n)
                        visited += 1
                        if visited % LEVEL == 0:
                            carry_gradient(p, at, visited == LEVEL)
            if visited >= LEVEL:
                carry_gradient(p, at, False)
                add_tiles(at + p.at_out, at + p.at_high, at + p.at_low, rows_of(p))
            # NaN-safe retry, as in the forward pass: a key with NaN spoils dQ of rows that do not see it, by 0 * NaN.
            if nan_safe or not has_nan(at + p.at_out, rows_of(p)):
                break
            nan_safe = True
            if not knows_lse(p):  # maxima and denominators begin anew
                seen = place_rows(p, s, at, head, first_row, min(BM, s.rows * p.group - first_row))
        finish(p, s, at, first_row)
        if not wants_gradients(p):
            return
        state[TILE_MAX] = real(p.gradient_scale)
        write_tile(at + p.at_out, at + p.at_grad_query_rows, 0, item_size, p.E, at + p.at_state + TILE_MAX * row_bytes)

    @spec.jit
    def clear_sums(p: Any, sums: int, count: int) -> None:
        for start in range(0, count, PART):
            if fetch(p.counter) >= STOPPED:
                return
            carray(void_pointer(sums + start), UNBOUNDED, real)[: min(PART, count - start) // size] = 0

    @spec.jit
    def add_group(p: Any, sums: int, others: int, count: int) -> None:
        for start in range(0, count, PART):
            if fetch(p.counter) >= STOPPED:
                return
            add_sums(sums + start, others + start, min(PART, count - start))

    @spec.jit
    def tiles_of(p: Any, s: Any, group: int) -> int:
        """Tiles of queries of a work item: those of its group, or all of a head with group -1."""
        tiles: int = (s.rows * p.group + BM - 1) // BM
        return tiles if group < 0 else (tiles - group + s.groups - 1) // s.groups

    @spec.jit
    def locate(s: Any, tiles: int, group: int, place: int) -> tuple[int, int]:
        """The group of the tile at a place of a work item, and its number in this group."""
        if group >= 0:
            return group, place
        each, more = divmod(tiles, s.groups)  # so many groups have a tile more
        longer = more * (each + 1)
        if place < longer:
            return place // (each + 1), place % (each + 1)
        return more + (place - longer) // each, (place - longer) % each

    @spec.jit
    def visit_place(
        p: Any, s: Any, at: int, head: int, item_group: int, place: int, sums: int, mod_sums: int, record: int
    ) -> None:
        """The tile of queries at a place of a work item."""
        tiles = tiles_of(p, s, -1)
        group, number = locate(s, tiles, item_group, place)
        if item_group < 0 and group > 0:  # the second and all further groups of a head share room for their sums
            others, each = sums + bytes_of(p, s), bytes_of(p, s)
            if number == 0:
                if record != 0 and not await_turn(p.turns, record, place, SPAN - 1, p.counter):
                    return
                if group > 1:
                    add_group(p, sums, others, each)
                clear_sums(p, others, each)
            sums = others
        # Longest first, as in the forward pass. Tiles are dealt to groups round robin: each group then has long rows
        # and short ones.
        first_row = tile_of(p, s, head, group + number * s.groups, tiles) * BM
        visit_rows(p, s, at, head, first_row, group, sums, mod_sums + group * p.mod_sums_group, record, place)
        if record != 0 and await_turn(p.turns, record, place, SPAN - 1, p.counter):
            announce(p.turns, record, place, SPAN - 1)

    @spec.jit
    def write_rows(
        p: Any, target: int, row: int, rows: int, count: int, source: int, pitch: int, factor: float
    ) -> None:
        for j in range(0, rows, ROWS_AT_ONCE):
            if fetch(p.counter) >= STOPPED:
                return
            write(target + j * row, row, min(ROWS_AT_ONCE, rows - j), count, source + j * pitch, pitch, factor)

    @spec.jit
    def write_keys(p: Any, s: Any, head: int, sums: int) -> None:
        """DK and dV of a head, from its sums."""
        if not wants_gradients(p):
            return
        key = p.grad_key + s.grad_key + head * p.grad_key_head
        write_rows(p, key, p.grad_key_row, s.key_rows, p.E, sums, p.E_padded * size, real(p.gradient_scale))
        sums += (s.key_rows + SUM_ROWS) * p.E_padded * size
        value = p.grad_value + s.grad_value + head * p.grad_value_head
        write_rows(p, value, p.grad_value_row, s.key_rows, p.Ev, sums, p.Ev_padded * size, real(1))

    @spec.jit
    def complete(p: Any, s: Any, head: int, group: int, slot: int, sums: int) -> None:
        """Add up the sums of groups and write dK and dV, if all groups of the head are done."""
        each = bytes_of(p, s)
        if group < 0:
            if s.groups > 1:
                add_group(p, sums, sums + each, each)
        elif fetch_add(p.counts + 8 * slot, 1) < s.groups - 1:
            return
        else:
            sums -= group * each
            for other in range(1, s.groups):
                add_group(p, sums, sums + other * each, each)
        write_keys(p, s, head, sums)

    def worker(params: int, thread: int) -> int:
        p = carray(void_pointer(params), 1, PARAMS)[0]
        sequences = carray(void_pointer(p.sequences), p.number, SEQUENCE)
        members = carray(void_pointer(p.members), (UNBOUNDED, 4), np.int64)
        at = p.scratch + thread * p.scratch_size
        while True:
            item, joins = fetch_add(p.counter, 1), False
            if item >= p.items:
                item, joins = item_to_join(p.turns, p.items, p.counter), True
                if item < 0:
                    return 0
            number, group, offset, slot = members[item]
            index, head = divmod(number, p.kv_heads)
            s = sequences[index]
            mod_sums, tiles = p.mod_sums + slot * p.mod_sums_head, tiles_of(p, s, group)
            record, most = record_of(p.turns, item, p.items), tiles
            if joins:
                sums, most = sums_of(record), 1  # and then to the item that has the most tiles left by then
            else:
                sums = at + p.at_sums if group < 0 else p.partial + offset + group * bytes_of(p, s)
                clear_sums(p, sums, bytes_of(p, s))
                if record != 0:
                    invite(record, sums, tiles)
                if tiles == 0:
                    complete(p, s, head, group, slot, sums)
            for n in range(most):
                place = n if record == 0 else take_tile(record)
                if place < 0 or fetch(p.counter) >= STOPPED:
                    break
                visit_place(p, s, at, head, group, place, sums, mod_sums, record)
                if place == tiles - 1:
                    complete(p, s, head, group, slot, sums)

    return worker
