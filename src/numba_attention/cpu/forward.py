"""The forward pass on the CPU: tiled online softmax on the transposed problem, FlashAttention-2 (Dao 2023) algorithm 1.

One work item is one tile of query rows of one key/value head.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..sequence_record import SEQUENCE
from . import pairs, tiles
from .dropout import make_drop
from .gemm import micro_kernel
from .params import PARAMS, STOPPED
from .scoring import LOG2E, make_scoring
from .scratch import areas_of, layout_of, views
from .simd import fetch, fetch_add, void_pointer
from .softmax import (
    INVERSE,
    LEVEL,
    MAX,
    RESCALE,
    SUM,
    SUM_HIGH,
    SUM_LOW,
    TILE_MAX,
    invert_sums,
    normalised_weights,
    second_level,
    softmax_step,
)
from .softmax import add_tiles as add_two_tiles
from .softmax import power_below as power_below_of
from .spec import Spec
from .views import carray
from .visible import make_visible

# Prefetch across heads: a call whose queries and outputs exceed the level 2 cache waits for the next head's rows, 20 to
# 40 % of the time for 32 to 128 keys. Keys and values of one head that fill the cache would drive the next ones out.
CACHE_BYTES = 2**20
HEAD_BYTES = 2**18


def scratch(spec: Spec, E: int, Ev: int) -> tuple[dict[str, int], int, int]:
    """Byte offsets of the scratch areas of one thread, their sum, and how many rows the tile of outputs has."""
    areas, offsets, size = layout_of(spec, E, Ev)
    return offsets, size, areas["out"].shape[0]


def make_worker(spec: Spec) -> Callable[[int, int], int]:
    """Make the function that one thread runs: take work items until none is left.

    For the task "weights" it writes the probabilities and not their product with the values (`attention_weights`).
    """
    BM, BN, MR = spec.query_tile, spec.key_tile, spec.block[0]
    vector = spec.vector
    size, row_bytes = vector.bytes, BM * vector.bytes
    bf16_dot, widens_kv, item_size = spec.bf16_dot, spec.widens_kv, spec.out_element.size
    real: Any = vector.dtype
    infinity = math.inf
    with_output, quantized = spec.task == "forward", spec.quantized

    state_of, scores_of, hidden_of, values_of, out_of, extra_of, saved_of, high_of, low_of = views(
        areas_of(spec), "state scores hidden values out extra saved high low"
    )
    starts_of, stops_of, lse_rows_of = views(areas_of(spec), "starts stops lse_rows")
    place_rows, pack_rows, _, hides_all, may_hide, score_tile, sources = make_scoring(spec)
    list_of, tile_of, runs_of, clip, following = make_visible(spec)
    find_values, scale = sources.find_values, sources.scale
    mm_output = micro_kernel(spec, "first output")
    step_softmax = softmax_step(spec, pairs=bf16_dot and with_output)
    weigh = normalised_weights(spec, pairs=bf16_dot and with_output)
    carry, add_tiles, invert = second_level(spec), add_two_tiles(spec), invert_sums(spec)
    pack_values = pairs.pair_rows(spec) if bf16_dot else tiles.widen_tile(spec)
    write_tile, power_below = tiles.scatter_tile(spec), power_below_of(spec)
    has_nan, clear, drop_halves = tiles.has_nan(spec), tiles.clear_tile(spec), pairs.drop_nonfinite(spec)
    drop = make_drop(spec, pairs=bf16_dot and with_output)
    value_at = tiles.load_value(spec)
    fetch_two, fetch_rows = tiles.fetch_two(spec), tiles.fetch_rows(spec)
    prefetches = with_output and not spec.kv_storage

    @spec.jit
    def drop_nonfinite(p: Any, at: int, n: int) -> None:
        """Zero what is NaN or infinite among the packed values."""
        if bf16_dot:
            drop_halves(at + p.at_values, (n + 1) // 2 * 2 * p.Ev)
        else:
            packed = values_of(p, at)
            for x in range(n * p.Ev):
                if not math.isfinite(packed[x]):
                    packed[x] = 0

    @spec.jit
    def add_nonfinite(p: Any, s: Any, at: int, head: int, j0: int, n: int) -> None:
        """Give the NaN and infinity that `drop_nonfinite` took out to the rows that see them, and only those."""
        hidden = hidden_of(p, at)
        extra = extra_of(p, at)
        values, row, column = find_values(p, s, at, head, j0, n)
        for j in range(n):
            for e in range(p.Ev):
                x = value_at(values + j * row + e * column)
                if not math.isfinite(x):
                    for lane in range(BM):
                        if hidden[j, lane] == 0:
                            extra[e, lane] += x

    @spec.jit
    def output_tile(
        p: Any, s: Any, at: int, head: int, j0: int, n: int, later: int, nan_safe: bool, first: bool
    ) -> None:
        """O^T = O^T * rescale + V^T P^T, or V^T P^T of the first tile of keys.

        The tile of keys that begins at `later` is prefetched, unless it is -1.
        """
        out, rescale = at + p.at_out, 0 if first else at + p.at_state + RESCALE * row_bytes
        values, row, column = find_values(p, s, at, head, j0, n)
        depth, weights = n, at + p.at_scores
        if bf16_dot or widens_kv or nan_safe:
            pack_values(at + p.at_values, values, row, column, n, p.Ev)
            values, row, column = at + p.at_values, p.Ev * size, size
        if bf16_dot:
            depth, weights = (n + 1) // 2, at + p.at_weights
        if nan_safe:
            drop_nonfinite(p, at, n)
        both = (p.E + p.Ev) * item_size
        ahead = prefetches and p.page_size == 0 and p.items * BM * both > CACHE_BYTES and s.keys * both <= HEAD_BYTES
        next_head = head
        if ahead:
            next_head, later = head + 1, j0
        elif not prefetches or p.page_size != 0:
            later = -1
        share = (BN * MR + p.Ev - 1) // p.Ev  # of the keys of a tile, for each micro-kernel
        for e in range(0, p.Ev, MR):
            first = e // MR * share
            if later >= 0 and first < n:
                j = later + first
                # Queries and outputs first: prefetches beyond what the processor can have in flight are lost, which
                # those of the queries are behind those of keys and values (5 % slower).
                if ahead and j0 == 0:
                    rows = min(share, BM - first)
                    fetch_rows(at + p.at_query_rows, first, rows, p.group * p.query_head, both // 2)
                    fetch_rows(at + p.at_out_rows, first, rows, p.group * p.out_head, both // 2)
                fetch_two(
                    p.key + s.key + next_head * p.key_head + j * p.key_row, p.key_row,
                    p.value + s.value + next_head * p.value_head + j * p.value_row, p.value_row, share, both // 2,
                )  # fmt: skip
            mm_output(
                out + e * row_bytes, row_bytes, values + e * column, column, row, min(MR, p.Ev - e),
                weights, row_bytes, depth, rescale,
            )  # fmt: skip
        if nan_safe:
            add_nonfinite(p, s, at, head, j0, n)

    @spec.jit
    def scale_weights(p: Any, s: Any, at: int, j0: int, n: int, nan_safe: bool) -> None:
        """Weights times the scales of values; one that is NaN makes the rows NaN that see it."""
        scale(p, s, at, at + p.at_scores, at + p.at_value_scale_rows, p.value_scale_page, j0, n, nan_safe)
        if nan_safe:
            hidden, extra = hidden_of(p, at), extra_of(p, at)
            for lane in range(BM):
                if hidden[0, lane] != 0:
                    extra[: p.Ev, lane] = math.nan

    @spec.jit
    def carry_sums(p: Any, at: int, first: bool, factor: float) -> None:
        """Move the sums over the last tiles of keys to the second level."""
        rows = p.Ev if with_output else 0
        if first:
            high_of(p, at)[:rows] = 0
            low_of(p, at)[:rows] = 0
            lanes = state_of(p, at)
            lanes[SUM_HIGH] = lanes[SUM_LOW] = 0
        carry(at + p.at_out, rows, at + p.at_high, at + p.at_low, at + p.at_state, factor)

    @spec.jit
    def fold_keys(
        p: Any, s: Any, at: int, head: int, listed: int, seen: tuple[int, int, int, int], nan_safe: bool,
        normalized: bool,
    ) -> None:  # fmt: skip
        """Fold every visible tile of keys into the state; if `normalized`, maxima and denominators are final."""
        start, stop, all_start, all_stop = seen
        factor, visited, empty = real(p.unit * LOG2E), 0, True
        first_run, last_run = runs_of(p, listed, start)
        for run in range(first_run, last_run):
            low, high, bits = clip(p, run, start, stop)
            for j0 in range(low, high, BN):
                if fetch(p.counter) >= STOPPED:
                    return
                n = min(BN, high - j0)
                edge = j0 < all_start or j0 + n > all_stop
                if p.mask == 0 or not hides_all(p, s, at, j0, n):
                    score_tile(p, s, at, head, j0, n, edge, bits)
                    if nan_safe:
                        scores = scores_of(p, at)
                        hidden = hidden_of(p, at)
                        for j in range(n):
                            for lane in range(BM):
                                hidden[j, lane] = scores[j, lane] == -infinity
                    if normalized:
                        weigh(at + p.at_scores, n, at + p.at_state, factor, at + p.at_weights)
                    else:
                        step_softmax(at + p.at_scores, n, at + p.at_state, factor, at + p.at_weights)
                    if p.dropout != 0 and with_output:
                        drop(p, s, at, at + (p.at_weights if bf16_dot else p.at_scores), n, j0)
                    if quantized:
                        scale_weights(p, s, at, j0, n, nan_safe)
                    if with_output:
                        later = following(p, run, last_run, j0 + BN, high, start, stop)
                        output_tile(p, s, at, head, j0, n, later, nan_safe, empty)
                    empty = False
                visited += 1  # hidden or not: which tiles are hidden depends on how many rows a tile has
                if visited % LEVEL == 0:
                    clear(at + p.at_out, p.out_depth if with_output and empty else 0)
                    empty = False
                    carry_sums(p, at, visited == LEVEL, factor)
        clear(at + p.at_out, p.out_depth if with_output and empty else 0)
        if visited >= LEVEL:
            carry_sums(p, at, False, factor)
            state = at + p.at_state
            add_tiles(state + SUM * row_bytes, state + SUM_HIGH * row_bytes, state + SUM_LOW * row_bytes, 1)
            if with_output:
                add_tiles(at + p.at_out, at + p.at_high, at + p.at_low, p.Ev)

    @spec.jit
    def write_lse(p: Any, s: Any, at: int) -> None:
        """The natural log of the denominator, sink included; -inf where nothing was seen."""
        lse_rows = lse_rows_of(p, at)
        state = state_of(p, at)
        for lane in range(BM):
            m, total = np.float64(state[MAX, lane]), np.float64(state[SUM, lane])
            carray(void_pointer(lse_rows[lane]), 1, real)[0] = m * p.unit + math.log(total) if total != 0 else -infinity

    @spec.jit
    def write_scores(p: Any, at: int, j0: int, n: int) -> None:
        """Write the tile of scores, by now probabilities, to columns j0 .. j0 + n; lanes are scaled by TILE_MAX = 1."""
        state_of(p, at)[TILE_MAX] = 1
        write_tile(at + p.at_scores, at + p.at_out_rows, j0 * item_size, item_size, n, at + p.at_state)

    @spec.jit
    def write_zeros(p: Any, at: int, start: int, stop: int) -> None:
        scores_of(p, at)[:] = 0
        for j0 in range(start, stop, BN):
            if fetch(p.counter) >= STOPPED:
                return
            write_scores(p, at, j0, min(BN, stop - j0))

    @spec.jit
    def write_weights(p: Any, s: Any, at: int, head: int, listed: int, seen: tuple[int, int, int, int]) -> None:
        """Second pass of `attention_weights`: the probabilities themselves, 0 outside what the rows see."""
        start, stop, all_start, all_stop = seen
        if start > stop:  # no row sees a key
            start, stop = 0, 0
        written = 0
        first_run, last_run = runs_of(p, listed, start)
        for run in range(first_run, last_run):
            low, high, bits = clip(p, run, start, stop)
            if low >= high:
                continue
            write_zeros(p, at, written, low)
            for j0 in range(low, high, BN):
                if fetch(p.counter) >= STOPPED:
                    return
                n = min(BN, high - j0)
                if p.mask != 0 and hides_all(p, s, at, j0, n):
                    write_zeros(p, at, j0, j0 + n)
                    continue
                score_tile(p, s, at, head, j0, n, j0 < all_start or j0 + n > all_stop, bits)
                weigh(at + p.at_scores, n, at + p.at_state, real(p.unit * LOG2E), at + p.at_weights)
                if p.dropout != 0:
                    drop(p, s, at, at + p.at_scores, n, j0)
                write_scores(p, at, j0, n)
            written = high
        write_zeros(p, at, written, p.Ev)

    @spec.jit
    def save_outputs(p: Any, at: int) -> None:
        """Keep the outputs, and prepare weights that are divided by a power of two below their sum."""
        lanes, out, saved = state_of(p, at), out_of(p, at), saved_of(p, at)
        for e in range(p.Ev):
            for lane in range(BM):
                saved[e, lane] = out[e, lane]
        for lane in range(BM):
            lanes[INVERSE, lane], lanes[RESCALE, lane] = power_below(lanes[SUM, lane]), 1

    @spec.jit
    def restore_finite(p: Any, at: int) -> None:
        """Take the outputs back of the rows that were finite without normalized weights: they keep their bits."""
        lanes, out, saved = state_of(p, at), out_of(p, at), saved_of(p, at)
        for lane in range(BM):
            finite = True
            for e in range(p.Ev):
                finite = finite and math.isfinite(saved[e, lane])
            if finite:
                lanes[INVERSE, lane] = 1
                for e in range(p.Ev):
                    out[e, lane] = saved[e, lane]

    @spec.jit
    def attend(p: Any, s: Any, at: int, head: int, first_row: int) -> None:
        """One work item: fold the keys into the rows' states, then write what is asked for."""
        lanes = state_of(p, at)
        out = out_of(p, at)
        extra = extra_of(p, at)
        nan_safe, normalized = False, False
        listed = list_of(p, s, head, first_row // BM)
        count = min(BM, s.rows * p.group - first_row)
        seen = place_rows(p, s, at, head, first_row, count)
        pack_rows(at + p.at_queries, at + p.at_query_rows, p.query_column, p.E, real(p.prescale))
        while True:
            if nan_safe:
                extra[: p.Ev] = 0
            fold_keys(p, s, at, head, listed, seen, nan_safe, normalized)
            if nan_safe:
                for e in range(p.Ev):
                    for lane in range(BM):
                        out[e, lane] += extra[e, lane]
            if not with_output or normalized or not has_nan(at + p.at_out, p.Ev):
                break
            if not nan_safe:
                # NaN-safe retry: 0 * NaN and 0 * infinity are NaN, so that a value behind a mask, or with a weight that
                # underflowed, would spoil its rows. Guarding every product would slow down every call. A tile with NaN
                # or infinity in its output is recomputed instead, without such values: finite rows have the same bits.
                nan_safe = True
                seen = place_rows(p, s, at, head, first_row, count)
            else:
                # A sum of large values may overflow before it is divided by the denominator. Rows that are not finite
                # yet are recomputed with weights that sum to at most 1.
                normalized = True
                save_outputs(p, at)
        if normalized:
            restore_finite(p, at)
        if invert(at + p.at_state, real(p.dropout_scale), np.int64(normalized)):
            starts, stops, hides = starts_of(p, at), stops_of(p, at), may_hide(p)
            for lane in range(BM):
                if lanes[SUM, lane] == 0:
                    # Where keys were visible, and every score was -inf, which only infinite inputs give, NaN.
                    value = real(math.nan) if starts[lane] < stops[lane] and not hides else real(0)
                    lanes[INVERSE, lane] = lanes[RESCALE, lane] = value
        if not with_output:
            write_weights(p, s, at, head, listed, seen)
            return
        write_tile(at + p.at_out, at + p.at_out_rows, 0, p.out_column, p.Ev, at + p.at_state + RESCALE * row_bytes)
        if p.lse != 0:
            write_lse(p, s, at)

    def worker(params: int, thread: int) -> int:
        p = carray(void_pointer(params), 1, PARAMS)[0]
        sequences = carray(void_pointer(p.sequences), p.number, SEQUENCE)
        at = p.scratch + thread * p.scratch_size
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
            tiles_per_head = (s.rows * p.group + BM - 1) // BM
            head, place = divmod(item - s.first, tiles_per_head)
            attend(p, s, at, head, tile_of(p, s, head, place, tiles_per_head) * BM)

    return worker
