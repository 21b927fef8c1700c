"""Derivatives along a direction: what differs from the backward pass, whose worker runs both.

Along a direction scores move by ds, weights by P (ds - mu) and gradients of scores by dD (docs/second.md). Twelve
products of a tile at most, of which those with a tangent that is 0 are left out:

    S, dZ = scale (K dQ + dK Q), dP = V dO, ddP = dV dO + V ddO                   queries in the lanes
    dout += V (P (ds - mu)) + dV P, tangent of dQ += K dZ + dK Z                  queries in the lanes
    tangent of dK += dZ Q + Z dQ, tangent of dV += P (ds - mu) dO + P ddO         features in the lanes

A call wants the tangents of the results ("jvp"), of the gradients ("closed", with mu and those of delta known), or both
at once, as if out and lse did not move ("open"). Where the results themselves are not known, the tangents are summed
beside them in one sweep, an online softmax as in the forward pass ("online"): one product more instead of two.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from . import stages, tiles
from .dropout import make_drop
from .elements import ELEMENTS
from .gemm import micro_kernel
from .params import OFFSETS, SECOND
from .scoring import FEATURES, LOG2E, Scoring, bias_elements
from .scratch import areas_of, views
from .simd import void_pointer
from .softmax import (
    DELTA_TANGENT,
    INVERSE,
    MAX,
    MU,
    RESCALE,
    SUM,
    SUM_HIGH,
    SUM_LOW,
    SUM_MOVED,
    SUM_MOVED_GRADS,
    SUM_ROWS,
    add_tiles,
    follow_weights,
    moved_weights,
    second_level,
    softmax_step,
)
from .spec import Spec
from .sums import LOST, add_products, add_transposed, copy_rows
from .views import UNBOUNDED, carray


class Second(NamedTuple):
    """Compiled functions that take the place of those of the backward pass."""

    bytes_of: Any
    load_rows: Any
    begin: Any
    visit_keys: Any
    rows_of: Any
    finish: Any
    wants_gradients: Any
    knows_lse: Any
    carry_sums: Any


def make_second(
    spec: Spec, scoring: Scoring, bytes_of: Any, load_rows: Any, lose_scores: Any, spread_nan: Any
) -> Second:
    """Make the functions for one kind of kernel, of float32 or float64, from those of its backward pass."""
    BM, MR = spec.query_tile, spec.block[0]
    size, row_bytes = spec.vector.bytes, BM * spec.vector.bytes
    real: Any = spec.vector.dtype
    nan = real(math.nan)
    second_of, moved_scores_of, kept_of, weights_of = views(areas_of(spec), "second_state moved_scores kept scores")
    moved_weights_of, moved_grads_of, out_of, state_of = views(areas_of(spec), "moved_weights moved_grads out state")
    lane_rows_of, lane_heads_of, dirty_of = views(areas_of(spec), "lane_rows lane_heads dirty")
    query_rows_of, grad_rows_of, bias_rows_of, out_rows_of = views(
        areas_of(spec), "tangent_query_rows grad_tangent_rows tangent_bias_rows out_tangent_rows"
    )
    _, pack_rows, products, _, may_hide, score_tile, _ = scoring
    high_of, low_of, lse_rows_of, starts_of, stops_of = views(areas_of(spec), "high low lse_rows starts stops")
    mm_more = micro_kernel(spec, "output")
    gather, gather_bias = (tiles.gather_tile(spec, ELEMENTS[name]) for name in (spec.storage, bias_elements(spec)[0]))
    widen, write_tile, drop_nonfinite = tiles.widen_tile(spec), tiles.scatter_tile(spec), tiles.drop_nonfinite(spec)
    value_at = tiles.load_value(spec)
    copy, add, add_to_bias = copy_rows(spec), add_products(spec), add_transposed(spec)
    move_weights, move_gradients = moved_weights(spec, False), moved_weights(spec, True)
    scale_scores, chain, move_scores = stages.multiply(spec), stages.chain_slopes(spec), stages.moved_scores(spec)
    shift, through, drop_where = stages.shift(spec), stages.through_slopes(spec), stages.drop_where(spec)
    subtract, tile_max = stages.subtract_rows(spec), stages.tile_max(spec)
    step_softmax, follow, add_levels = softmax_step(spec, pairs=False), follow_weights(spec), add_tiles(spec)
    carry, carry_online = second_level(spec, online=False), second_level(spec)
    drop = make_drop(spec)

    @spec.jit
    def wants_gradients(p: Any) -> bool:
        wants: bool = carray(void_pointer(p.second), 1, SECOND)[0].of_gradients != 0
        return wants

    @spec.jit
    def knows_lse(p: Any) -> bool:
        knows: bool = carray(void_pointer(p.second), 1, SECOND)[0].online == 0
        return knows

    @spec.jit
    def room(p: Any, s: Any) -> int:
        """Bytes of the sums of a group."""
        total: int = bytes_of(p, s) if wants_gradients(p) else 0
        return total

    @spec.jit
    def first_of_outputs(p: Any) -> int:
        """The row of the accumulators where the tangents of the outputs begin."""
        rows: int = (max(p.E, p.Ev) + MR - 1) // MR * MR
        return rows

    @spec.jit
    def rows_of(p: Any) -> int:
        rows: int = p.out_depth
        return rows

    @spec.jit
    def load_more(p: Any, s: Any, at: int, first_row: int) -> bool:
        """Tables, state and packed tangents of the rows of the tile; whether some row has NaN or infinity."""
        u = carray(void_pointer(p.second), 1, SECOND)[0]
        own = carray(void_pointer(u.offsets), UNBOUNDED, OFFSETS)[s.batch]
        rows, heads, state = lane_rows_of(p, at), lane_heads_of(p, at), second_of(p, at)
        query_rows, grad_rows = query_rows_of(p, at), grad_rows_of(p, at)
        bias_rows, out_rows = bias_rows_of(p, at), out_rows_of(p, at)
        last = s.rows * p.group - first_row
        for lane in range(BM):
            i, h = rows[lane], heads[lane]
            number = own.first + h * u.head_rows + i
            query_rows[lane] = u.query + own.query + h * u.query_head + i * u.query_row
            grad_rows[lane] = u.grad_out + own.grad_out + h * u.grad_out_head + i * u.grad_out_row
            bias_rows[lane] = u.bias + own.bias + h * u.bias_head + i * u.bias_row
            out_rows[lane] = u.out_tangent + number * p.Ev * size if lane < last else at + p.at_spare
            state[MU, lane] = state[DELTA_TANGENT, lane] = 0
            if u.of_results == 0:
                state[MU, lane] = carray(void_pointer(u.lse_tangent), UNBOUNDED, real)[number]
                moved = carray(void_pointer(u.delta_tangent), UNBOUNDED, real)[number]
                state[DELTA_TANGENT, lane] = moved / real(p.dropout_scale)
        dirty = False
        if u.of_gradients != 0:
            dirty = load_rows(p, s, at, first_row)
        marks = at + p.at_dirty
        if u.query != 0:
            table = at + p.at_tangent_query_rows
            pack_rows(at + p.at_tangent_queries, table, u.query_column, p.E, real(p.prescale))
            dirty = copy(at + p.at_tangent_query_copy, table, u.query_column, p.E, p.E_padded, marks) or dirty
        if u.grad_out != 0:
            table = at + p.at_grad_tangent_rows
            pack_rows(at + p.at_grad_tangents, table, u.grad_out_column, p.Ev, real(1))
            dirty = copy(at + p.at_grad_tangent_copy, table, u.grad_out_column, p.Ev, p.Ev_padded, marks) or dirty
        if u.online == 0:
            gather(at + p.at_outputs, at + p.at_out_rows, 0, p.out_column, p.Ev, real(1))
        return dirty

    @spec.jit
    def begin(p: Any, at: int) -> None:
        """Clear the sums of the tile's rows."""
        out_of(p, at)[: p.out_depth] = 0
        state = second_of(p, at)
        state[SUM_MOVED] = state[SUM_MOVED_GRADS] = 0

    @spec.jit
    def carry_sums(p: Any, at: int, first: bool) -> None:
        """Move the sums over the last tiles of keys to the second level."""
        if first:
            high_of(p, at)[: p.out_depth] = 0
            low_of(p, at)[: p.out_depth] = 0
        high, low, state = at + p.at_high, at + p.at_low, at + p.at_state
        if knows_lse(p):
            carry(at + p.at_out, p.out_depth, high, low, state, real(1))
        else:
            carry_online(at + p.at_out, p.out_depth, high, low, state, real(p.unit * LOG2E))

    @spec.jit
    def more_products(
        p: Any, at: int, target: int, source: int, row: int, column: int, n: int, features: int, tile: int
    ) -> None:
        """As `products` of the scoring, added to what is there."""
        for e in range(0, features, FEATURES):
            for r in range(0, n, MR):
                mm_more(
                    target + r * row_bytes, row_bytes, source + r * row + e * column, row, column, min(MR, n - r),
                    tile + e * row_bytes, row_bytes, min(FEATURES, features - e),
                    at + p.at_state + RESCALE * row_bytes,
                )  # fmt: skip

    @spec.jit
    def add_rows(
        p: Any, at: int, target: int, source: int, row: int, column: int, n: int, features: int, tile: int,
        nan_safe: bool,
    ) -> None:  # fmt: skip
        """target[e, lane] += sum_j source[j, e] tile[j, lane]; if `nan_safe`, of finite numbers alone."""
        if nan_safe:
            wide = at + p.at_packed_keys
            widen(wide, source, row, column, n, features)
            drop_nonfinite(wide, n * features)
            source, row, column = wide, features * size, size
        for e in range(0, features, MR):
            mm_more(
                target + e * row_bytes, row_bytes, source + e * column, column, row, min(MR, features - e),
                tile, row_bytes, n, at + p.at_state + RESCALE * row_bytes,
            )  # fmt: skip

    @spec.jit
    def add_nonfinite(p: Any, at: int, source: int, row: int, column: int, n: int) -> None:
        """Give NaN to the tangents of outputs of rows that see a value with NaN or infinity."""
        out, weights, first = out_of(p, at), weights_of(p, at), first_of_outputs(p)
        for j in range(n):
            for e in range(p.Ev):
                if not math.isfinite(value_at(source + j * row + e * column)):
                    for lane in range(BM):
                        if weights[j, lane] != 0:
                            out[first + e, lane] = nan

    @spec.jit
    def move(p: Any, s: Any, at: int, head: int, j0: int, n: int) -> int:
        """Tangents of the products, dz, and of the scores, whose tile it returns; they share one where they agree."""
        u = carray(void_pointer(p.second), 1, SECOND)[0]
        own = carray(void_pointer(u.offsets), UNBOUNDED, OFFSETS)[s.batch]
        dz, ds = at + p.at_moved_scores, at + p.at_moved_weights
        keys = p.key + s.key + head * p.key_head + j0 * p.key_row
        moved_keys = u.key + own.key + head * u.key_head + j0 * u.key_row
        if u.query != 0:
            tile = at + p.at_tangent_queries
            products(p, at, dz, keys, p.key_row, p.key_column, n, p.E, tile, at + p.at_keys, 0, 0, 0)
            if u.key != 0:
                more_products(p, at, dz, moved_keys, u.key_row, u.key_column, n, p.E, at + p.at_queries)
        elif u.key != 0:
            products(p, at, dz, moved_keys, u.key_row, u.key_column, n, p.E, at + p.at_queries, at + p.at_keys, 0, 0, 0)
        else:
            moved_scores_of(p, at)[:n] = 0
        if p.rest != 1:
            scale_scores(dz, n, real(p.rest))
        moved: int = dz
        if p.score_mod != 0:
            if p.cap_outer != 0:
                slopes = at + p.at_cap_slopes
                chain(slopes, at + p.at_cap_curves, at + p.at_mod_slopes, at + p.at_mod_scores, n)
                move_scores(ds, dz, slopes, n)
            else:
                move_scores(ds, dz, at + p.at_mod_slopes, n)
            moved = ds
        elif p.cap_outer != 0:
            move_scores(ds, dz, at + p.at_cap_slopes, n)
            moved = ds
        if u.bias != 0:
            gather_bias(at + p.at_bias, at + p.at_tangent_bias_rows, j0 * u.bias_column, u.bias_column, n, real(1))
            shift(ds, moved, at + p.at_bias, n)
            moved = ds
        return moved

    @spec.jit
    def move_products(p: Any, s: Any, at: int, head: int, j0: int, n: int) -> None:
        """Gradients of the weights, and their tangents."""
        u = carray(void_pointer(p.second), 1, SECOND)[0]
        own = carray(void_pointer(u.offsets), UNBOUNDED, OFFSETS)[s.batch]
        values = p.value + s.value + head * p.value_head + j0 * p.value_row
        moved_values = u.value + own.value + head * u.value_head + j0 * u.value_row
        packed, moved = at + p.at_values, at + p.at_moved_grads
        grads, moved_grads = at + p.at_grads, at + p.at_grad_tangents
        products(p, at, at + p.at_grad_scores, values, p.value_row, p.value_column, n, p.Ev, grads, packed, 0, 0, 0)
        if u.value != 0:
            products(p, at, moved, moved_values, u.value_row, u.value_column, n, p.Ev, grads, packed, 0, 0, 0)
            if u.grad_out != 0:
                more_products(p, at, moved, values, p.value_row, p.value_column, n, p.Ev, moved_grads)
        elif u.grad_out != 0:
            products(p, at, moved, values, p.value_row, p.value_column, n, p.Ev, moved_grads, packed, 0, 0, 0)
        else:
            moved_grads_of(p, at)[:n] = 0

    @spec.jit
    def add_outputs(p: Any, s: Any, at: int, head: int, j0: int, n: int, nan_safe: bool) -> None:
        """Tangents of the outputs += V (P ds) + dV P."""
        u = carray(void_pointer(p.second), 1, SECOND)[0]
        own = carray(void_pointer(u.offsets), UNBOUNDED, OFFSETS)[s.batch]
        values = p.value + s.value + head * p.value_head + j0 * p.value_row
        moved_values = u.value + own.value + head * u.value_head + j0 * u.value_row
        out = at + p.at_out + first_of_outputs(p) * row_bytes
        add_rows(p, at, out, values, p.value_row, p.value_column, n, p.Ev, at + p.at_moved_weights, nan_safe)
        if u.value != 0:
            weights = at + p.at_scores
            add_rows(p, at, out, moved_values, u.value_row, u.value_column, n, p.Ev, weights, nan_safe)
        if nan_safe:
            add_nonfinite(p, at, values, p.value_row, p.value_column, n)
            if u.value != 0:
                add_nonfinite(p, at, moved_values, u.value_row, u.value_column, n)

    @spec.jit
    def add_gradients(
        p: Any, s: Any, at: int, head: int, j0: int, n: int, sums: int, dirty: bool, nan_safe: bool
    ) -> None:
        """Tangents of the gradients."""
        u = carray(void_pointer(p.second), 1, SECOND)[0]
        own = carray(void_pointer(u.offsets), UNBOUNDED, OFFSETS)[s.batch]
        grads, moved_grads, dz = at + p.at_grad_scores, at + p.at_moved_grads, at + p.at_moved_scores
        if dirty:
            spread_nan(p, at, n)
            moved_weights, moved, weights = moved_weights_of(p, at), moved_grads_of(p, at), weights_of(p, at)
            for j in range(n):
                for lane in range(BM):
                    if math.isnan(weights[j, lane]):
                        moved_weights[j, lane] = moved[j, lane] = nan
        if p.grad_bias != 0 and not nan_safe:
            column = p.grad_bias_column
            once = p.grad_bias_once != 0
            add_to_bias(moved_grads, at + p.at_grad_bias_rows, j0 * column, column, n, at + p.at_spare, once)
        if p.cap_outer != 0:
            through(grads, moved_grads, dz, at + p.at_cap_slopes, at + p.at_cap_curves, n)
        elif p.score_mod != 0:
            through(grads, moved_grads, dz, at + p.at_mod_slopes, at + p.at_mod_scores, n)
        if p.tiny != 0:
            scale_scores(grads, n, real(p.gradient_prescale))
            scale_scores(moved_grads, n, real(p.gradient_prescale))
        keys = p.key + s.key + head * p.key_head + j0 * p.key_row
        add_rows(p, at, at + p.at_out, keys, p.key_row, p.key_column, n, p.E, moved_grads, nan_safe)
        if u.key != 0:
            moved_keys = u.key + own.key + head * u.key_head + j0 * u.key_row
            add_rows(p, at, at + p.at_out, moved_keys, u.key_row, u.key_column, n, p.E, grads, nan_safe)
        if nan_safe:
            return
        of_keys = sums + j0 * p.E_padded * size
        add(of_keys, moved_grads, at + p.at_query_copy, n, p.E_padded)
        if u.query != 0:
            add(of_keys, grads, at + p.at_tangent_query_copy, n, p.E_padded)
        of_values = sums + (s.key_rows + SUM_ROWS) * p.E_padded * size + j0 * p.Ev_padded * size
        add(of_values, at + p.at_moved_weights, at + p.at_grad_copy, n, p.Ev_padded)
        if u.grad_out != 0:
            add(of_values, at + p.at_scores, at + p.at_grad_tangent_copy, n, p.Ev_padded)

    @spec.jit
    def lose_rows(p: Any, at: int, source: int, row: int, column: int, n: int) -> None:
        """Give NaN to rows that see a value with NaN or infinity; `moved_grads` is 0 where a key is hidden."""
        out, seen = out_of(p, at), moved_grads_of(p, at)
        for j in range(n):
            for e in range(p.Ev):
                if not math.isfinite(value_at(source + j * row + e * column)):
                    for lane in range(BM):
                        if seen[j, lane] != 0:
                            out[0, lane] = nan

    @spec.jit
    def fold_keys(p: Any, s: Any, at: int, head: int, j0: int, n: int, edge: bool, bits: int, nan_safe: bool) -> None:
        """One tile of keys of an online softmax: the sums of V e and, along the direction, of V (e ds) + dV e."""
        u = carray(void_pointer(p.second), 1, SECOND)[0]
        own = carray(void_pointer(u.offsets), UNBOUNDED, OFFSETS)[s.batch]
        moved_values = u.value + own.value + head * u.value_head + j0 * u.value_row
        lanes, state, weights, target = state_of(p, at), at + p.at_state, at + p.at_scores, at + p.at_moved_weights
        lanes[RESCALE] = 1  # of sums of products in parts, before those of weights have a factor
        score_tile(p, s, at, head, j0, n, edge, bits)
        moved = move(p, s, at, head, j0, n)
        if nan_safe:
            scores, seen = weights_of(p, at), moved_grads_of(p, at)
            for j in range(n):
                for lane in range(BM):
                    seen[j, lane] = real(scores[j, lane] != -math.inf)
        tile_max(weights, n, state)
        step_softmax(weights, n, state, real(p.unit * LOG2E), weights)
        follow(weights, moved, target, n, state, at + p.at_second_state)
        if p.dropout != 0:
            kept_of(p, at)[:] = 1
            drop(p, s, at, at + p.at_kept, n, j0)
            drop_where(weights, at + p.at_kept, n)
            drop_where(target, at + p.at_kept, n)
        values = p.value + s.value + head * p.value_head + j0 * p.value_row
        out = at + p.at_out
        moved_out = out + first_of_outputs(p) * row_bytes
        add_rows(p, at, out, values, p.value_row, p.value_column, n, p.Ev, weights, nan_safe)
        add_rows(p, at, moved_out, values, p.value_row, p.value_column, n, p.Ev, target, nan_safe)
        if u.value != 0:
            lanes[RESCALE] = 1
            add_rows(p, at, moved_out, moved_values, u.value_row, u.value_column, n, p.Ev, weights, nan_safe)
        if nan_safe:
            lose_rows(p, at, values, p.value_row, p.value_column, n)
            if u.value != 0:
                lose_rows(p, at, moved_values, u.value_row, u.value_column, n)

    @spec.jit
    def visit_keys(
        p: Any, s: Any, at: int, head: int, j0: int, n: int, edge: bool, bits: int, sums: int, mod_sums: int,
        dirty: bool, nan_safe: bool, later: int,
    ) -> None:  # fmt: skip
        """One tile of keys."""
        if not knows_lse(p):
            fold_keys(p, s, at, head, j0, n, edge, bits, nan_safe)
            return
        u = carray(void_pointer(p.second), 1, SECOND)[0]
        weights, target = at + p.at_scores, at + p.at_moved_weights
        grads, moved_grads = at + p.at_grad_scores, at + p.at_moved_grads
        state, second, factor = at + p.at_state, at + p.at_second_state, real(p.unit * LOG2E)
        score_tile(p, s, at, head, j0, n, edge, bits)
        moved = move(p, s, at, head, j0, n)
        if dirty:
            lose_scores(p, at, n)
        if p.dropout != 0:
            kept_of(p, at)[:] = 1
            drop(p, s, at, at + p.at_kept, n, j0)
        if u.of_gradients != 0:
            move_products(p, s, at, head, j0, n)
            if p.dropout != 0:
                drop_where(grads, at + p.at_kept, n)
                drop_where(moved_grads, at + p.at_kept, n)
            move_gradients(weights, moved, target, grads, moved_grads, n, state, second, factor)
        else:
            move_weights(weights, moved, target, weights, weights, n, state, second, factor)
        if p.dropout != 0:
            drop_where(weights, at + p.at_kept, n)
            drop_where(target, at + p.at_kept, n)
        if u.of_results != 0:
            add_outputs(p, s, at, head, j0, n, nan_safe)
        if u.of_gradients != 0:
            add_gradients(p, s, at, head, j0, n, sums, dirty, nan_safe)

    @spec.jit
    def finish_online(p: Any, s: Any, at: int, first_row: int) -> None:
        """Out and lse of the rows, and their tangents; NaN somewhere in a row for what the forward pass must decide."""
        u = carray(void_pointer(p.second), 1, SECOND)[0]
        own = carray(void_pointer(u.offsets), UNBOUNDED, OFFSETS)[s.batch]
        rows, heads, lse_rows = lane_rows_of(p, at), lane_heads_of(p, at), lse_rows_of(p, at)
        second, lanes, sums = second_of(p, at), state_of(p, at), out_of(p, at)
        starts, stops, hides = starts_of(p, at), stops_of(p, at), may_hide(p)
        lse_tangent = carray(void_pointer(u.lse_tangent), UNBOUNDED, real)
        state = at + p.at_state
        last = s.rows * p.group - first_row
        carry_online(at + p.at_out, 0, at + p.at_high, at + p.at_low, state, real(p.unit * LOG2E))
        add_levels(state + SUM * row_bytes, state + SUM_HIGH * row_bytes, state + SUM_LOW * row_bytes, 1)
        for lane in range(BM):
            total, inverse, lse = np.float64(lanes[SUM, lane]), real(0), -math.inf
            if total != 0:
                inverse, lse = real(1 / total), np.float64(lanes[MAX, lane]) * p.unit + math.log(total)
            elif starts[lane] < stops[lane] and not hides:
                lse = math.nan
            second[MU, lane] = second[SUM_MOVED, lane] * inverse
            if lane < last:
                lse_tangent[own.first + heads[lane] * u.head_rows + rows[lane]] = second[MU, lane]
            carray(void_pointer(lse_rows[lane]), 1, real)[0] = lse
            lanes[INVERSE, lane], lanes[RESCALE, lane] = inverse * real(p.dropout_scale), 1
        first = first_of_outputs(p)
        for e in range(p.Ev):
            for lane in range(BM):
                sums[e, lane] *= lanes[INVERSE, lane]
                sums[first + e, lane] *= lanes[INVERSE, lane]
        out, ones = at + p.at_out, state + RESCALE * row_bytes
        moved_out = out + first * row_bytes
        subtract(moved_out, out, p.Ev, at + p.at_second_state + MU * row_bytes)
        write_tile(out, at + p.at_out_rows, 0, p.out_column, p.Ev, ones)
        write_tile(moved_out, at + p.at_out_tangent_rows, 0, size, p.Ev, ones)

    @spec.jit
    def finish(p: Any, s: Any, at: int, first_row: int) -> None:
        """The tangents of out and lse of the rows, and their row sums."""
        u = carray(void_pointer(p.second), 1, SECOND)[0]
        if u.of_results == 0:
            return
        if u.online != 0:
            finish_online(p, s, at, first_row)
            return
        own = carray(void_pointer(u.offsets), UNBOUNDED, OFFSETS)[s.batch]
        rows, heads, state, lanes = lane_rows_of(p, at), lane_heads_of(p, at), second_of(p, at), state_of(p, at)
        dirty = dirty_of(p, at)
        lse_tangent = carray(void_pointer(u.lse_tangent), UNBOUNDED, real)
        score_sums = carray(void_pointer(u.score_sums), UNBOUNDED, real)
        last = s.rows * p.group - first_row
        for lane in range(BM):
            number = own.first + heads[lane] * u.head_rows + rows[lane]
            if lane < last:
                # The array has the part of the sinks, which are keys of the value 0.
                mu = state[SUM_MOVED, lane] / real(p.dropout_scale) + lse_tangent[number]
                if dirty[lane] == LOST and lanes[MAX, lane] != math.inf:
                    mu = nan
                state[MU, lane] = lse_tangent[number] = mu
                if u.score_sums != 0:
                    score_sums[number] = state[SUM_MOVED_GRADS, lane]
        out = at + p.at_out + first_of_outputs(p) * row_bytes
        subtract(out, at + p.at_outputs, p.Ev, at + p.at_second_state + MU * row_bytes)
        write_tile(out, at + p.at_out_tangent_rows, 0, size, p.Ev, at + p.at_state + RESCALE * row_bytes)

    return Second(
        room, load_more, begin, visit_keys, rows_of, finish, wants_gradients, knows_lse, carry_sums,
    )  # fmt: skip
