"""The forward pass for few queries: split over keys, so that all threads have work, and merged ("split-K" decoding).

A tile is one vector of query rows: those of several key/value heads where each has few (`features`). A work item is a
tile and a split of the keys; where a sequence has more than one split, the last of them to be done merges the states
(maximum, denominator, output) of all, in order. Where splits begin follows from the keys alone: no bit depends on the
threads or on the rest of the batch. Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..sequence_record import SEQUENCE
from . import features, tiles
from .dropout import make_drop
from .params import PARAMS
from .scoring import LOG2E, make_scoring
from .scratch import areas_of, layout_of, views
from .simd import fetch_add, void_pointer
from .softmax import INVERSE, MAX, RESCALE, SUM, normalised_weights, softmax_step
from .softmax import add_scaled as add_scaled_of
from .softmax import power_below as power_below_of
from .spec import Spec
from .views import UNBOUNDED, carray
from .visible import make_visible

SPLIT = 512  # keys of one split (split-K)


def scratch(spec: Spec, E: int, Ev: int) -> tuple[dict[str, int], int, int]:
    """Byte offsets of the scratch areas of one thread, their sum, and the size of the state of a tile."""
    areas, offsets, size = layout_of(spec, E, Ev)
    return offsets, size, areas["out"].size + 2 * spec.vector.width * spec.vector.bytes


def make_worker(spec: Spec) -> Callable[[int, int], int]:
    """Make the function that one thread runs: take work items until none is left."""
    W, BN = spec.query_tile, spec.key_tile
    vector = spec.vector
    size, quantized = vector.bytes, spec.quantized
    value_size = spec.kv_element.size
    real: Any = vector.dtype
    infinity = math.inf

    state_of, scores_of, hidden_of, out_of, extra_of, saved_of = views(
        areas_of(spec), "state scores hidden out extra saved"
    )
    starts_of, stops_of, out_rows_of, lse_rows_of, lane_counts_of = views(
        areas_of(spec), "starts stops out_rows lse_rows lane_counts"
    )
    place_rows, _, _, hides_all, may_hide, score_tile, sources = make_scoring(spec)
    list_of, _, runs_of, clip, _ = make_visible(spec)
    locate, scale = sources.locate, sources.scale
    pack, add, gather = features.pack_queries(spec), features.add_values(spec), features.copy_strided(spec)
    step_softmax, weigh, power_below = softmax_step(spec, pairs=False), normalised_weights(spec), power_below_of(spec)
    add_scaled, drop = add_scaled_of(spec), make_drop(spec)
    value_at, write, has_nan = tiles.load_value(spec), features.write_row(spec), tiles.has_nan(spec)

    @spec.jit
    def pitch_of(p: Any) -> int:
        """Numbers in a row of outputs."""
        pitch: int = (p.Ev + W - 1) // W * W
        return pitch

    @spec.jit
    def mark_hidden(p: Any, at: int, n: int) -> None:
        scores = scores_of(p, at)
        hidden = hidden_of(p, at)
        for j in range(n):
            for lane in range(W):
                hidden[j, lane] = scores[j, lane] == -infinity

    @spec.jit
    def drop_nonfinite(p: Any, at: int, rows: int, offset: int, first: int, end: int, n: int) -> None:
        """Copy the values of a head, to `raw_values`, without NaN and infinity, which the rows get that see them."""
        hidden = hidden_of(p, at)
        extra, pitch = extra_of(p, at), pitch_of(p)
        gather(at + p.at_raw_values, rows, offset, p.value_column, p.Ev, n, at + p.at_raw_rows)
        whole = p.Ev // W * W
        for j in range(n):
            for e in range(p.Ev):
                where = at + p.at_raw_values + (j * p.Ev + e) * value_size
                x = value_at(where)
                if not math.isfinite(x):
                    carray(void_pointer(where), value_size, np.uint8)[:] = 0
                    for lane in range(first, end):
                        if hidden[j, lane] == 0:
                            # Overlapping last vector (see `features`): some features stand in two places of a row.
                            if e < whole:
                                extra[lane * pitch + e] += x
                            if whole < p.Ev and e >= p.Ev - W:
                                extra[lane * pitch + e - (p.Ev - W) + whole] += x

    @spec.jit
    def add_values(p: Any, at: int, head: int, n: int, nan_safe: bool) -> None:
        """Output = output * rescale + weights * values."""
        lanes, each = lane_counts_of(p, at)
        first = 0
        while first < lanes:
            end, rows, offset, ahead = first + each, at + p.at_value_rows, head * p.value_head, p.value_head
            if nan_safe:
                drop_nonfinite(p, at, rows, offset, first, end, n)
            elif p.value_column != value_size:
                gather(at + p.at_raw_values, rows, offset, p.value_column, p.Ev, n, at + p.at_raw_rows)
            if nan_safe or p.value_column != value_size:
                rows, offset, ahead = at + p.at_raw_rows, 0, 0
            add(p, at, first, end, rows, offset, n, ahead)
            first = end
            head += 1

    @spec.jit
    def scale_weights(p: Any, s: Any, at: int, j0: int, n: int, nan_safe: bool) -> None:
        """Weights times the scales of values; one that is NaN makes the rows NaN that see it."""
        scale(p, s, at, at + p.at_scores, at + p.at_value_scale_rows, p.value_scale_page, j0, n, nan_safe)
        if nan_safe:
            hidden, extra, pitch = hidden_of(p, at), extra_of(p, at), pitch_of(p)
            for lane in range(W):
                if hidden[0, lane] != 0:
                    extra[lane * pitch : (lane + 1) * pitch] = math.nan

    @spec.jit
    def fold_keys(
        p: Any, s: Any, at: int, head: int, listed: int, start: int, stop: int, all_start: int, all_stop: int,
        nan_safe: bool, normalized: bool,
    ) -> None:  # fmt: skip
        """Fold every visible tile of keys into the state; if `normalized`, maxima and denominators are final."""
        first_run, last_run = runs_of(p, listed, start)
        for run in range(first_run, last_run):
            low, high, bits = clip(p, run, start, stop)
            if low >= stop:
                return
            for j0 in range(low, high, BN):
                n = min(BN, high - j0)
                if p.mask != 0 and hides_all(p, s, at, j0, n):
                    continue
                locate(p, s, at, j0, n)
                score_tile(p, s, at, head, j0, n, j0 < all_start or j0 + n > all_stop, bits)
                if nan_safe:
                    mark_hidden(p, at, n)
                if normalized:
                    weigh(at + p.at_scores, n, at + p.at_state, real(p.unit * LOG2E), at + p.at_scores)
                else:
                    step_softmax(at + p.at_scores, n, at + p.at_state, real(p.unit * LOG2E), at + p.at_scores)
                if p.dropout != 0:
                    drop(p, s, at, at + p.at_scores, n, j0)
                if quantized:
                    scale_weights(p, s, at, j0, n, nan_safe)
                add_values(p, at, head, n, nan_safe)

    @spec.jit
    def attend(p: Any, s: Any, at: int, head: int, first_row: int, split: int, listed: int) -> None:
        """Fold the keys of one split into the rows' states; what takes their sums to outputs is in RESCALE."""
        lanes = lane_counts_of(p, at)[0]
        state = state_of(p, at)
        out = out_of(p, at)
        extra, saved = extra_of(p, at), saved_of(p, at)
        scores_of(p, at)[:] = 0  # lanes without a query row are never written, and must not hold NaN
        nan_safe, normalized = False, False
        start, stop, all_start, all_stop = place_rows(p, s, at, head, first_row, lanes)
        # Reproducibility: key tiles begin at multiples of BN, so that no bit of a row depends on the intervals of other
        # rows in its tile.
        start, stop = max(start // BN * BN, split * SPLIT), min(stop, (split + 1) * SPLIT)
        if split > 0:  # the sink is counted once, in the first split
            state[MAX], state[SUM] = -infinity, 0
        pack(p, at)
        while True:
            out[: lanes * pitch_of(p)] = 0
            if nan_safe:
                extra[: lanes * pitch_of(p)] = 0
            fold_keys(p, s, at, head, listed, start, stop, all_start, all_stop, nan_safe, normalized)
            if nan_safe:
                for x in range(lanes * pitch_of(p)):
                    out[x] += extra[x]
            # NaN-safe retry, and normalized weights for rows whose sums overflow: see `forward.attend`.
            if normalized or not has_nan(at + p.at_out, lanes * pitch_of(p) // W):
                break
            if not nan_safe:
                nan_safe = True
                place_rows(p, s, at, head, first_row, lanes)
                if split > 0:
                    state[MAX], state[SUM] = -infinity, 0
            else:
                normalized = True
                for x in range(lanes * pitch_of(p)):
                    saved[x] = out[x]
                for lane in range(W):
                    state[INVERSE, lane], state[RESCALE, lane] = power_below(state[SUM, lane]), 1
        if normalized:
            for lane in range(lanes):
                row, finite = lane * pitch_of(p), True
                for x in range(row, row + pitch_of(p)):
                    finite = finite and math.isfinite(saved[x])
                if finite:
                    state[INVERSE, lane] = 1
                    for x in range(row, row + pitch_of(p)):
                        out[x] = saved[x]
        for lane in range(W):
            total = state[SUM, lane]
            state[RESCALE, lane] = real(p.dropout_scale) / total if total != 0 else real(0)
            if normalized and total != 0:
                state[RESCALE, lane] /= state[INVERSE, lane]

    @spec.jit
    def store_state(p: Any, at: int, item: int) -> None:
        """Store the partial state of one split: maxima, denominators, normalized outputs."""
        lanes = lane_counts_of(p, at)[0]
        state = state_of(p, at)
        out = out_of(p, at)
        partial = carray(void_pointer(p.partial + item * p.partial_size), UNBOUNDED, real)
        pitch = pitch_of(p)
        for lane in range(W):
            partial[lane], partial[W + lane] = state[MAX, lane], state[SUM, lane]
        for lane in range(lanes):
            factor = state[RESCALE, lane]
            for x in range(lane * pitch, (lane + 1) * pitch):
                partial[2 * W + x] = out[x] * factor

    @spec.jit
    def merge(p: Any, at: int, first: int, splits: int) -> None:
        """Merge the states of all splits of a tile: outputs times their shares of the denominator, which sum to 1.

        The sum is one of two numbers, `out` and `extra`, as in `softmax.second_level`: there may be 2**15 splits.
        """
        lanes, pitch = lane_counts_of(p, at)[0], pitch_of(p)
        state = state_of(p, at)
        out = out_of(p, at)
        low = extra_of(p, at)
        out[: lanes * pitch], low[: lanes * pitch] = 0, 0
        for lane in range(lanes):
            highest = -infinity
            for split in range(splits):
                m = carray(void_pointer(p.partial + (first + split) * p.partial_size), W, real)[lane]
                highest = max(highest, m)
            total = 0.0
            for split in range(splits):
                partial = carray(void_pointer(p.partial + (first + split) * p.partial_size), 2 * W, real)
                m, part = partial[lane], 0.0
                if m != -infinity:  # -inf: no key of the split was visible
                    part = partial[W + lane] * math.exp((np.float64(m) - highest) * p.unit)
                partial[W + lane] = part
                total += part
            state[MAX, lane], state[SUM, lane], state[RESCALE, lane] = highest, total, 1
            row = lane * pitch * size
            for split in range(splits if total != 0 else 0):
                partial_row = p.partial + (first + split) * p.partial_size + 2 * W * size + row
                partial = carray(void_pointer(p.partial + (first + split) * p.partial_size), 2 * W, real)
                share = real(partial[W + lane] / total)
                add_scaled(at + p.at_out + row, at + p.at_extra + row, partial_row, pitch // W, share)
            for x in range(lane * pitch, (lane + 1) * pitch):
                out[x] += low[x]

    @spec.jit
    def finish(p: Any, s: Any, at: int) -> None:
        """Write the rows and their lse."""
        lanes = lane_counts_of(p, at)[0]
        state = state_of(p, at)
        starts, stops = starts_of(p, at), stops_of(p, at)
        out_rows, lse_rows = out_rows_of(p, at), lse_rows_of(p, at)
        whole, pitch = p.Ev // W * W, pitch_of(p)
        for lane in range(lanes):
            m, total = np.float64(state[MAX, lane]), np.float64(state[SUM, lane])
            if p.lse != 0:
                lse = m * p.unit + math.log(total) if total != 0 else -infinity
                carray(void_pointer(lse_rows[lane]), 1, real)[0] = lse
            factor = state[RESCALE, lane]
            if total == 0 and starts[lane] < stops[lane] and not may_hide(p):
                factor = real(math.nan)  # keys were visible, and every score was -inf, which only infinite inputs give
            row = at + p.at_out + lane * pitch * size
            write(out_rows[lane], p.out_column, whole, row, factor)
            if whole < p.Ev:
                write(out_rows[lane] + (p.Ev - W) * p.out_column, p.out_column, W, row + whole * size, factor)

    def worker(params: int, thread: int) -> int:
        p = carray(void_pointer(params), 1, PARAMS)[0]
        sequences = carray(void_pointer(p.sequences), p.number, SEQUENCE)
        at = p.scratch + thread * p.scratch_size
        lane_counts = lane_counts_of(p, at)
        while True:
            item = fetch_add(p.counter, 1)
            if item >= p.items:
                return 0
            low, high = 0, p.number  # binary search: the sequence of an item is the last that begins at or before it
            while high - low > 1:
                middle = (low + high) // 2
                if sequences[middle].first <= item:
                    low = middle
                else:
                    high = middle
            s = sequences[low]
            splits = max(1, (s.keys + SPLIT - 1) // SPLIT)
            tile, split = divmod(item - s.first, splits)
            rows_per_head = s.rows * p.group  # query rows of a key/value head
            if rows_per_head >= W:
                head, part = divmod(tile, (rows_per_head + W - 1) // W)
                first_row, listed = part * W, list_of(p, s, head, part)
                lane_counts[0] = lane_counts[1] = min(W, rows_per_head - first_row)
            else:
                head, first_row, listed = tile * (W // rows_per_head), 0, list_of(p, s, tile, 0)
                heads = min(W // rows_per_head, p.kv_heads - head)
                lane_counts[0], lane_counts[1] = heads * rows_per_head, rows_per_head
            attend(p, s, at, head, first_row, split, listed)
            if splits > 1:
                store_state(p, at, item)
                if fetch_add(p.counts + 8 * (item - split), 1) < splits - 1:
                    continue
                merge(p, at, item - split, splits)
            finish(p, s, at)

    return worker


def tiles_of(spec: Spec, rows: Any, group: int, kv_heads: int) -> Any:
    """How many tiles sequences with so many query rows have."""
    W, each = spec.query_tile, rows * group
    together = -(-kv_heads // (W // np.clip(each, 1, W)))
    return np.where(each >= W, kv_heads * -(-each // W), np.where(each > 0, together, 0))
