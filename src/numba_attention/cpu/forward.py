"""The forward pass on the CPU: tiled online softmax on the transposed problem, FlashAttention-2 (Dao 2023) algorithm 1.

One work item is one tile of query rows of one key/value head. The query heads that share a key/value head are rows of
the same tile, position by position (row r is query r // G of head r % G), so that each key and value is read once for
all of them and the intervals of a tile stay narrow.
"""

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
from numba import carray

from ..intervals import visible as _visible
from . import pairs, stages, tiles
from .elements import ELEMENTS, Spec
from .gemm import micro_kernel
from .params import PARAMS, SEQUENCE
from .simd import fetch_add, void_pointer
from .softmax import FIRST, MAX, POSITION, RESCALE, ROWS, SLOPE, SPAN, SUM, TILE_MAX, normalised_weights, softmax_step

LOG2E, LN2 = math.log2(math.e), math.log(2)
NEVER = 2**62
FEATURES = 128  # that a score sums in one chain; longer ones are summed in parts, at half the error for 256 of them
LANE_TABLES = ("query_rows", "out_rows", "bias_rows", "mask_rows", "lse_rows", "starts", "stops", "positions")


def bias_elements(spec: Spec) -> tuple[str, ...]:
    """What a bias may be stored as: the compute type, and the type of the queries where that is another."""
    compute = f"float{spec.vector.bits}"
    return (compute,) if spec.storage == compute else (compute, spec.storage)


def scratch(spec: Spec, E: int, Ev: int) -> tuple[dict[str, int], int]:
    """Byte offsets of the scratch areas of one thread, and their sum."""
    BM, BN, size = spec.query_tile, spec.key_tile, spec.vector.bytes
    rows = -(-Ev // spec.block[0]) * spec.block[0]
    words = (E + 1) // 2
    areas = {
        "state": ROWS * BM * size,
        "queries": BM * (4 * words if spec.dot else size * E),
        "scores": BM * BN * size,
        "out": BM * rows * size,
        "weights": BM * BN // 2 * 4 if spec.dot else 0,
        "keys": BN * (4 * words if spec.dot else size * E if spec.converts else 0),
        "values": BN * Ev * size,
        "bias": BM * BN * size,
        "mask": BM * BN * size,
        "hidden": BM * BN,
        "extra": BM * Ev * size,
        **dict.fromkeys(LANE_TABLES, BM * 8),
    }
    offsets, total = {}, 0
    for name, area in areas.items():
        offsets[name] = total
        total += -(-area // 64) * 64
    offsets["end of out"] = rows
    return offsets, total


def make_worker(spec: Spec) -> Callable[[int, int], int]:
    """Make the function that one thread runs: take work items until none is left.

    For the task "weights" it writes the probabilities and not their product with the values (`attention_weights`).
    """
    BM, BN, MR = spec.query_tile, spec.key_tile, spec.block[0]
    vector, element = spec.vector, spec.element
    size, row_bytes = vector.bytes, BM * vector.bytes
    dot, converts, item_size = spec.dot, spec.converts, element.size
    real: Any = vector.dtype
    integer: Any = np.int32 if vector.bits == 32 else np.int64
    infinity = math.inf
    biases, with_output = len(bias_elements(spec)), spec.task == "forward"

    mm_scores, mm_output = micro_kernel(spec, "scores"), micro_kernel(spec, "output")
    step_softmax = softmax_step(spec, pairs=dot and with_output)
    weigh = normalised_weights(spec)
    pack_queries = pairs.gather_pairs(spec) if dot else tiles.gather_tile(spec, element)
    pack_keys = pairs.pair_columns(spec) if dot else tiles.widen_tile(spec)
    pack_values = pairs.pair_rows(spec) if dot else tiles.widen_tile(spec)
    gather_mask = tiles.gather_tile(spec, ELEMENTS["bool"])
    gather_bias = tiles.gather_tile(spec, ELEMENTS[bias_elements(spec)[0]], saturate=True)
    gather_other_bias = tiles.gather_tile(spec, ELEMENTS[bias_elements(spec)[-1]], saturate=True)
    write_tile = tiles.scatter_tile(spec)
    has_nan, has_visible = tiles.has_nan(spec), tiles.has_visible(spec)
    value_at = tiles.load_value(spec)
    softcap, alibi, add_bias = stages.softcap(spec), stages.alibi(spec), stages.add_bias(spec)
    clip_interval, tile_max = stages.clip_interval(spec), stages.tile_max(spec)
    visible = spec.jit(FunctionType(_visible.__code__, {"min": min, "max": max}, "visible"))

    @spec.jit
    def table(address: int) -> Any:
        return carray(void_pointer(address), BM, np.int64)

    @spec.jit
    def place_rows(p: Any, s: Any, at: int, head: int, first_row: int) -> tuple[int, int, int, int]:
        """Fill the tables of the tile's rows; return the keys that any row sees, and those that all rows see."""
        query_rows, out_rows = table(at + p.at_query_rows), table(at + p.at_out_rows)
        lse_rows = table(at + p.at_lse_rows)
        bias_rows, mask_rows = table(at + p.at_bias_rows), table(at + p.at_mask_rows)
        starts, stops, positions = table(at + p.at_starts), table(at + p.at_stops), table(at + p.at_positions)
        chosen = carray(void_pointer(p.chosen), NEVER, np.int64)
        state = carray(void_pointer(at + p.at_state), (ROWS, BM), real)
        slopes = carray(void_pointer(p.slopes), NEVER, np.float64)
        sinks = carray(void_pointer(p.sinks), NEVER, np.float64)
        G = p.group
        last = s.rows * G - 1
        any_start, any_stop, all_start, all_stop = NEVER, 0, 0, NEVER
        row = first_row // G
        g = first_row - row * G
        for lane in range(BM):
            i = chosen[row] if p.chosen != 0 else row
            h = head * G + g
            query_rows[lane] = p.query + s.query + h * p.query_head + i * p.query_row
            out_rows[lane] = p.out + s.out + h * p.out_head + row * p.out_row
            lse_rows[lane] = p.lse + s.lse + h * p.lse_head + row * p.lse_row
            bias_rows[lane] = p.bias + s.bias + h * p.bias_head + i * p.bias_row
            mask_rows[lane] = p.mask + s.mask + h * p.mask_head + i * p.mask_row
            start, stop = visible(i, s.queries, s.keys, s.offset, p.left, p.right)
            starts[lane], stops[lane], positions[lane] = start, stop, i + s.offset
            if start < stop:
                any_start, any_stop = min(any_start, start), max(any_stop, stop)
            all_start, all_stop = max(all_start, start), min(all_stop, stop)
            if p.slopes != 0:
                state[SLOPE, lane] = slopes[s.batch * p.heads + s.head + h] * LOG2E
            sink = -infinity
            if p.sinks != 0 and i < s.queries:
                sink = sinks[s.head + h] * LOG2E
            state[MAX, lane] = sink
            state[SUM, lane] = 0 if sink == -infinity else 1
            if first_row + lane < last:  # past the last row, the last row stands in
                g += 1
                if g == G:
                    g = 0
                    row += 1
        return any_start, any_stop, all_start, all_stop

    @spec.jit
    def hides_all(p: Any, s: Any, at: int, j0: int, n: int) -> bool:
        """Load the tile of the mask; whether it hides every key of the tile from every row."""
        gather_mask(at + p.at_mask, at + p.at_mask_rows, j0 * p.mask_column, p.mask_column, n, real(1))
        return not has_visible(at + p.at_mask, n)

    @spec.jit
    def score_tile(p: Any, s: Any, at: int, head: int, j0: int, n: int, edge: bool) -> Any:
        """Scores of the tile's rows with keys j0 .. j0 + n; returns the factor that takes them to the log2 domain."""
        scores, state = at + p.at_scores, at + p.at_state
        keys = p.key + s.key + head * p.key_head + j0 * p.key_row
        key_row, key_column, depth = p.key_row, p.key_column, p.E
        if dot:
            depth, key_column = (p.E + 1) // 2, 4
            if p.key_column != 2 or p.E % 2 == 1:
                pack_keys(at + p.at_keys, keys, p.key_row, p.key_column, n, p.E)
                keys, key_row = at + p.at_keys, depth * 4
        elif converts:
            pack_keys(at + p.at_keys, keys, p.key_row, p.key_column, n, p.E)
            keys, key_row, key_column = at + p.at_keys, p.E * size, size
        lanes = carray(void_pointer(state), (ROWS, BM), real)
        lanes[TILE_MAX] = -infinity
        for r in range(0, n, MR):
            mm_scores(
                scores + r * row_bytes, row_bytes, keys + r * key_row, key_row, key_column, min(MR, n - r),
                at + p.at_queries, row_bytes, min(depth, FEATURES), state,
            )  # fmt: skip
        for e in range(FEATURES, depth, FEATURES):
            lanes[TILE_MAX] = 1  # taken anew below
            for r in range(0, n, MR):
                mm_output(
                    scores + r * row_bytes, row_bytes, keys + r * key_row + e * key_column, key_row, key_column,
                    min(MR, n - r), at + p.at_queries + e * row_bytes, row_bytes, min(FEATURES, depth - e),
                    state + TILE_MAX * row_bytes,
                )  # fmt: skip
        factor, unit = real(p.factor), real(1)
        if p.cap_outer != 0:
            softcap(scores, n, real(p.cap_inner), real(p.cap_outer))
            factor = unit
        if p.slopes != 0:
            positions = table(at + p.at_positions)
            for lane in range(BM):
                lanes[POSITION, lane] = positions[lane] - j0
            alibi(scores, n, state, factor)
            factor = unit
        if p.bias_kind != 0:
            rows, offset = at + p.at_bias_rows, j0 * p.bias_column
            if p.bias_kind == 1:
                gather_bias(at + p.at_bias, rows, offset, p.bias_column, n, real(LOG2E))
            elif biases == 2:
                gather_other_bias(at + p.at_bias, rows, offset, p.bias_column, n, real(LOG2E))
            add_bias(scores, n, at + p.at_bias, factor)
            factor = unit
        if p.mask != 0:
            add_bias(scores, n, at + p.at_mask, factor)
            factor = unit
        if edge:
            starts, stops = table(at + p.at_starts), table(at + p.at_stops)
            relative = carray(void_pointer(state), (ROWS, BM), integer)
            for lane in range(BM):
                first = min(max(starts[lane] - j0, 0), n)
                relative[FIRST, lane] = first
                relative[SPAN, lane] = max(min(stops[lane] - j0, n), first) - first
            clip_interval(scores, n, state)
        if edge or factor == unit or depth > FEATURES:
            tile_max(scores, n, state)
        return factor

    @spec.jit
    def drop_nonfinite(p: Any, at: int, n: int) -> None:
        """Zero what is NaN or infinite among the packed values."""
        if dot:
            halves = carray(void_pointer(at + p.at_values), NEVER, np.uint16)
            for x in range(((n + 1) // 2) * p.Ev * 2):
                if halves[x] & 0x7F80 == 0x7F80:
                    halves[x] = 0
        else:
            packed = carray(void_pointer(at + p.at_values), NEVER, real)
            for x in range(n * p.Ev):
                if not math.isfinite(packed[x]):
                    packed[x] = 0

    @spec.jit
    def add_nonfinite(p: Any, s: Any, at: int, head: int, j0: int, n: int) -> None:
        """Give the NaN and infinity that `drop_nonfinite` took out to the rows that see them, and only those."""
        hidden = carray(void_pointer(at + p.at_hidden), (BN, BM), np.uint8)
        extra = carray(void_pointer(at + p.at_extra), (NEVER, BM), real)
        values = p.value + s.value + head * p.value_head + j0 * p.value_row
        for j in range(n):
            for e in range(p.Ev):
                x = value_at(values + j * p.value_row + e * p.value_column)
                if not math.isfinite(x):
                    for lane in range(BM):
                        if hidden[j, lane] == 0:
                            extra[e, lane] += x

    @spec.jit
    def output_tile(p: Any, s: Any, at: int, head: int, j0: int, n: int, careful: bool) -> None:
        """O^T = O^T * rescale + V^T P^T."""
        out, state = at + p.at_out, at + p.at_state
        values = p.value + s.value + head * p.value_head + j0 * p.value_row
        value_row, value_column, depth, weights = p.value_row, p.value_column, n, at + p.at_scores
        if dot or converts or careful:
            pack_values(at + p.at_values, values, p.value_row, p.value_column, n, p.Ev)
            values, value_row, value_column = at + p.at_values, p.Ev * size, size
        if dot:
            depth, weights = (n + 1) // 2, at + p.at_weights
        if careful:
            drop_nonfinite(p, at, n)
        for e in range(0, p.Ev, MR):
            mm_output(
                out + e * row_bytes, row_bytes, values + e * value_column, value_column, value_row, min(MR, p.Ev - e),
                weights, row_bytes, depth, state + RESCALE * row_bytes,
            )  # fmt: skip
        if careful:
            add_nonfinite(p, s, at, head, j0, n)

    @spec.jit
    def fold_keys(p: Any, s: Any, at: int, head: int, seen: tuple[int, int, int, int], careful: bool) -> None:
        """Fold every visible tile of keys into the state of the rows."""
        start, stop, all_start, all_stop = seen
        for j0 in range(start, stop, BN):
            n = min(BN, stop - j0)
            edge = j0 < all_start or j0 + n > all_stop
            if p.mask != 0 and hides_all(p, s, at, j0, n):
                continue
            factor = score_tile(p, s, at, head, j0, n, edge)
            if careful:
                scores = carray(void_pointer(at + p.at_scores), (BN, BM), real)
                hidden = carray(void_pointer(at + p.at_hidden), (BN, BM), np.uint8)
                for j in range(n):
                    for lane in range(BM):
                        hidden[j, lane] = scores[j, lane] == -infinity
            step_softmax(at + p.at_scores, n, at + p.at_state, factor, at + p.at_weights)
            if with_output:
                output_tile(p, s, at, head, j0, n, careful)

    @spec.jit
    def write_lse(p: Any, s: Any, at: int) -> None:
        """The natural log of the denominator, sink included; -inf where nothing was seen."""
        rows = table(at + p.at_lse_rows)
        state = carray(void_pointer(at + p.at_state), (ROWS, BM), real)
        for lane in range(BM):
            m, total = np.float64(state[MAX, lane]), np.float64(state[SUM, lane])
            carray(void_pointer(rows[lane]), 1, real)[0] = (m + math.log2(total)) * LN2 if total != 0 else -infinity

    @spec.jit
    def write_scores(p: Any, at: int, j0: int, n: int) -> None:
        """Write the tile of scores, by now probabilities, to columns j0 .. j0 + n; lanes are scaled by TILE_MAX = 1."""
        carray(void_pointer(at + p.at_state), (ROWS, BM), real)[TILE_MAX] = 1
        write_tile(at + p.at_scores, at + p.at_out_rows, j0 * item_size, item_size, n, at + p.at_state)

    @spec.jit
    def write_zeros(p: Any, at: int, start: int, stop: int) -> None:
        carray(void_pointer(at + p.at_scores), (BN, BM), real)[:] = 0
        for j0 in range(start, stop, BN):
            write_scores(p, at, j0, min(BN, stop - j0))

    @spec.jit
    def write_weights(p: Any, s: Any, at: int, head: int, seen: tuple[int, int, int, int]) -> None:
        """Second pass of `attention_weights`: the probabilities themselves, 0 outside what the rows see."""
        start, stop, all_start, all_stop = seen
        if start > stop:  # nothing is seen
            start, stop = 0, 0
        write_zeros(p, at, 0, start)
        for j0 in range(start, stop, BN):
            n = min(BN, stop - j0)
            if p.mask != 0 and hides_all(p, s, at, j0, n):
                write_zeros(p, at, j0, j0 + n)
                continue
            factor = score_tile(p, s, at, head, j0, n, j0 < all_start or j0 + n > all_stop)
            weigh(at + p.at_scores, n, at + p.at_state, factor)
            write_scores(p, at, j0, n)
        write_zeros(p, at, stop, p.Ev)

    @spec.jit
    def attend(p: Any, s: Any, at: int, head: int, first_row: int) -> None:
        """One work item: fold the keys into the rows' states, then write what is asked for."""
        lanes = carray(void_pointer(at + p.at_state), (ROWS, BM), real)
        out = carray(void_pointer(at + p.at_out), (NEVER, BM), real)
        extra = carray(void_pointer(at + p.at_extra), (NEVER, BM), real)
        careful = False
        while True:
            seen = place_rows(p, s, at, head, first_row)
            if dot:
                pack_queries(at + p.at_queries, at + p.at_query_rows, p.query_column, p.E, real(p.prescale))
            else:
                pack_queries(at + p.at_queries, at + p.at_query_rows, 0, p.query_column, p.E, real(p.prescale))
            if with_output:
                out[: p.Ev_padded] = 0
            if careful:
                extra[: p.Ev] = 0
            fold_keys(p, s, at, head, seen, careful)
            if careful:
                for e in range(p.Ev):
                    for lane in range(BM):
                        out[e, lane] += extra[e, lane]
            # A weight of 0 times NaN or infinity is NaN, behind a mask or after underflow; preventing that on the way
            # would cost every call. A tile in which it may have happened is done again.
            if not with_output or careful or not has_nan(at + p.at_out, p.Ev):
                break
            careful = True
        starts, stops = table(at + p.at_starts), table(at + p.at_stops)
        for lane in range(BM):
            total = lanes[SUM, lane]
            if total != 0:
                lanes[RESCALE, lane] = real(1) / total
            elif starts[lane] < stops[lane] and p.mask == 0 and p.bias_kind == 0:
                lanes[RESCALE, lane] = math.nan  # keys were seen, and every score was -inf: infinite inputs
            else:
                lanes[RESCALE, lane] = 0
        if not with_output:
            write_weights(p, s, at, head, seen)
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
            low, high = 0, p.number  # the sequence of this item: the last that begins at or before it
            while high - low > 1:
                middle = (low + high) // 2
                if sequences[middle].first <= item:
                    low = middle
                else:
                    high = middle
            s = sequences[low]
            tiles_per_head = (s.rows * p.group + BM - 1) // BM
            head, tile = divmod(item - s.first, tiles_per_head)
            # Last rows first: under a causal mask they see most keys, and the short ones then fill the gaps.
            attend(p, s, at, head, (tiles_per_head - 1 - tile) * BM)

    return worker
