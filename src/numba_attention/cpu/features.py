"""Both products of attention with features in the lanes, for few queries: every key and value is read once.

With queries in the lanes, as `gemm` has them, one query would use one lane of sixteen. Here a score is a dot product
along the vectors of a key, and sums over lanes are taken of many scores at once, by a tree of shuffles; an output is a
row of vectors to which every value is added. A tile of scores still has queries in the lanes, those of several
key/value heads where one head has few, so that everything between the products is the code of all other kernels.

The time is that of reading memory, so the order of reading is what these loops are made for: docs/performance.md.

Rows of keys and values are found through tables of addresses (`sources`). Features are cut into vectors, of which the
last begins early enough to end with the features; where two overlap, the query has 0 in the last one.
"""

from typing import Any

import numpy as np
from llvmlite import ir

from .scratch import areas_of, views
from .simd import (
    I32,
    I64,
    Builder,
    Value,
    at,
    keep_order,
    load,
    loop,
    pointer,
    prefetch,
    routine,
    splat,
    store,
    void_pointer,
)
from .softmax import RESCALE
from .spec import Spec
from .sums import write_sums
from .tiles import load_query
from .views import carray


def _heights(spec: Spec) -> list[int]:
    """How many queries of one key/value head a product may take at once, highest first."""
    return [rows for rows in (4, 2, 1) if rows <= spec.vector.width]


def _accumulators(spec: Spec) -> int:
    return 16 if spec.host.registers == 32 else 8


def _sum_lanes(spec: Spec, b: Builder, vectors: list[Value]) -> Value:
    """The sums of 1, 2, 4 .. `width` vectors over their lanes, as one vector of so many lanes."""
    W = spec.vector.width

    def fold(x: Value, y: Value, low: list[int], half: int) -> Value:
        first, second = (b.shuffle_vector(x, y, lanes_of([lane + n for lane in low])) for n in (0, half))
        return b.fadd(first, second)

    parts, segments = list(vectors), 1  # each part holds `segments` partial sums, of `length` lanes each
    length = W
    while len(parts) > 1:
        half = length // 2
        low = [segment * length + lane for segment in range(segments) for lane in range(half)]
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [fold(x, y, low + [W + lane for lane in low], half) for x, y in pairs]
        segments, length = 2 * segments, half
    (x,) = parts
    while length > 1:
        half = length // 2
        x = fold(x, x, [segment * length + lane for segment in range(segments) for lane in range(half)], half)
        length = half
    return x


def _load(spec: Spec, b: Builder, p: Value) -> Value:
    """Load a vector of a key or value; where that is a whole cache line, by halves.

    A thread that reads every line once, as a whole, reads 16 GB/s of values on Zen 4, and by halves 28: a stream is
    recognised by a second access to its lines.
    """
    vector, element = spec.vector, spec.kv_element
    if element.size * vector.width < 64:
        return element.load(vector, b, p)
    half = ir.VectorType(vector.element, vector.width // 2)
    low = load(b, half, p, align=element.size)
    keep_order(b)  # a compiler barrier, or the two loads would be merged
    high = load(b, half, p, 32, align=element.size)
    return b.shuffle_vector(low, high, lanes_of(list(range(vector.width))))


def _row(b: Builder, rows: Value, index: Value, offset: Value) -> Value:
    """The byte pointer to a row that a table of addresses tells."""
    return at(b, pointer(b, load(b, I64, pointer(b, rows), b.mul(index, I64(8)), align=8)), offset)


def _dot_products(spec: Spec, height: int) -> Any:
    """Make ``dots(scores, rows, offset, n, queries, pitch, chunks, last, next_rows, next_offset)``.

    For `height` queries and n keys, scores[j, lane] = key j . query lane. `scores` is the address of the first of the
    lanes in a tile whose rows are one vector, key j is `offset` bytes after the address in the table `rows`, and
    queries are `pitch` bytes apart. `last` is where the last of the `chunks` vectors of a key begins, in bytes. Row j
    of `next_rows` at `next_offset` is what will be read next: it is prefetched. Rows of the tile up to the next
    multiple of `keys` are overwritten.
    """
    vector, element = spec.vector, spec.kv_element
    W = vector.width
    keys = min(8, _accumulators(spec) // height)
    row_bytes = W * vector.bytes
    together = min(W, height * keys) // height  # how many keys' sums fit into one vector

    def build(
        b: Builder, scores: Value, rows: Value, offset: Value, n: Value,
        queries: Value, pitch: Value, chunks: Value, last: Value,
        next_rows: Value, next_offset: Value,
    ) -> None:  # fmt: skip
        pq, target = pointer(b, queries), pointer(b, scores)
        end = b.sub(n, I64(1))
        query = [at(b, pq, b.mul(pitch, I64(r))) for r in range(height)]
        final = b.sub(chunks, I64(1))

        def block(i: Value, _: list[Value]) -> list[Value]:
            first = b.mul(i, I64(keys))
            acc: list[Value] = []
            for j in range(keys):
                index = b.add(first, I64(j))
                index = b.select(b.icmp_signed("<", index, end), index, end)  # padding: the last key is read again
                key = _row(b, rows, index, offset)
                later = _row(b, next_rows, index, next_offset)

                def chunk(c: Value, sums: list[Value], key: Value = key, later: Value = later) -> list[Value]:
                    where = b.select(b.icmp_signed("==", c, final), last, b.mul(c, I64(W * element.size)))
                    prefetch(b, at(b, later, where))
                    k = _load(spec, b, at(b, key, where))
                    in_query = b.mul(c, I64(row_bytes))
                    new = [vector.fma(b, vector.load(b, at(b, query[r], in_query)), k, sums[r]) for r in range(height)]
                    # Compiler barrier: keys are read one after another, each from end to end, as hardware prefetchers
                    # expect. A thread reads 30 GB/s, but 11 where the compiler interleaves loads of several keys.
                    keep_order(b)
                    return new

                acc += loop(b, chunks, [vector.const(0.0)] * height, chunk)
            for j in range(0, keys, together):
                sums = _sum_lanes(spec, b, acc[j * height : (j + together) * height])
                for m in range(together):
                    lanes = lanes_of(list(range(m * height, (m + 1) * height)))
                    row = at(b, target, b.mul(b.add(first, I64(j + m)), I64(row_bytes)))
                    store(b, b.shuffle_vector(sums, sums, lanes), row, align=vector.bytes)
            return []

        loop(b, b.sdiv(b.add(n, I64(keys - 1)), I64(keys)), [], block)

    return routine("scores rows offset n queries pitch chunks last next_rows next_offset", build)


def _weighted_rows(spec: Spec, height: int, vectors: int) -> Any:
    """Make ``add(out, pitch, weights, rescale, rows, offset, n, next_offset)`` for so many queries and vectors.

    out[r] = out[r] * rescale[r] + sum_j weights[j, r] * value j, where value j is `offset` bytes after the address in
    the table `rows`; rows of out are `pitch` bytes apart. What lies at `next_offset` is prefetched.
    """
    vector, element = spec.vector, spec.kv_element
    W = vector.width
    row_bytes = W * vector.bytes

    def build(
        b: Builder, out: Value, pitch: Value, weights: Value, rescale: Value,
        rows: Value, offset: Value, n: Value,
        next_offset: Value,
    ) -> None:  # fmt: skip
        def key(j: Value, carried: list[Value]) -> list[Value]:
            weight, *acc = carried
            value, later = _row(b, rows, j, offset), _row(b, rows, j, next_offset)
            for start in range(0, vectors * W * element.size, 64):
                prefetch(b, at(b, later, start))
            row = [_load(spec, b, at(b, value, v * W * element.size)) for v in range(vectors)]
            keep_order(b)
            new = []
            for r in range(height):
                x = splat(b, load(b, vector.element, weight, r * vector.bytes, align=vector.bytes), W)
                new += [vector.fma(b, x, row[v], acc[r * vectors + v]) for v in range(vectors)]
            return [at(b, weight, row_bytes), *new]

        zeros = [vector.const(0.0)] * (height * vectors)
        _, *acc = loop(b, n, [pointer(b, weights), *zeros], key)
        for r in range(height):
            factor = load(b, vector.element, pointer(b, rescale), r * vector.bytes, align=vector.bytes)
            x = splat(b, factor, W)
            line = at(b, pointer(b, out), b.mul(pitch, I64(r)))
            for v in range(vectors):
                before = vector.load(b, line, v * row_bytes)
                vector.store(b, vector.fma(b, before, x, acc[r * vectors + v]), line, v * row_bytes)

    return routine("out pitch weights rescale rows offset n next_offset", build)


def multiply_keys(spec: Spec) -> Any:
    """Make ``multiply(p, s, at, head, j0, n)``: products of the tile's rows with n keys, to the tile of scores."""
    vector = spec.vector
    W, size, item_size = vector.width, vector.bytes, spec.kv_element.size
    most = _heights(spec)[0]
    many, two, one = _dot_products(spec, most), _dot_products(spec, 2), _dot_products(spec, 1)
    gather = copy_strided(spec)
    (lane_counts_of,) = views(areas_of(spec), "lane_counts")

    @spec.jit
    def multiply(p: Any, s: Any, at: int, head: int, j0: int, n: int) -> None:
        lanes, each = lane_counts_of(p, at)
        chunks = (p.E + W - 1) // W
        pitch, last = chunks * W * size, (p.E - W) * item_size
        first_value = head * p.value_head
        lane = 0
        while lane < lanes:
            end, rows, offset = lane + each, at + p.at_key_rows, head * p.key_head
            next_rows, next_offset = rows, offset + p.key_head
            if end == lanes:  # prefetch ahead: after the keys of the last head, the values of the first are read
                next_rows, next_offset = at + p.at_value_rows, first_value
            if p.key_column != item_size:
                gather(at + p.at_raw_keys, rows, offset, p.key_column, p.E, n, at + p.at_raw_rows)
                rows, offset, next_rows, next_offset = at + p.at_raw_rows, 0, at + p.at_raw_rows, 0
            while lane < end:
                scores, queries = at + p.at_scores + lane * size, at + p.at_queries + lane * pitch
                if end - lane >= most:
                    many(scores, rows, offset, n, queries, pitch, chunks, last, next_rows, next_offset)
                    lane += most
                elif end - lane >= 2:
                    two(scores, rows, offset, n, queries, pitch, chunks, last, next_rows, next_offset)
                    lane += 2
                else:
                    one(scores, rows, offset, n, queries, pitch, chunks, last, next_rows, next_offset)
                    lane += 1
            head += 1

    return multiply


def copy_strided(spec: Spec) -> Any:
    """Make ``copy(target, rows, offset, stride, count, n, table)``: rows with strided features, side by side.

    Row j of `count` features begins `offset` bytes after the address in the table `rows`; where it is then, `table`
    tells.
    """
    size = spec.kv_element.size

    @spec.jit
    def copy(target: int, rows: int, offset: int, stride: int, count: int, n: int, table: int) -> None:
        sources, copies = carray(void_pointer(rows), n, np.int64), carray(void_pointer(table), n, np.int64)
        for j in range(n):
            copies[j] = target + j * count * size
            for e in range(count):
                x = carray(void_pointer(sources[j] + offset + e * stride), size, np.uint8)
                y = carray(void_pointer(copies[j] + e * size), size, np.uint8)
                for k in range(size):
                    y[k] = x[k]

    return copy


def add_values(spec: Spec) -> Any:
    """Make ``add(p, at, first, end, rows, offset, n, ahead)``: out = out * rescale + weights * values.

    That is for lanes from `first` to `end`, all of one head, and n values `offset` bytes after the addresses in the
    table `rows`. What lies `ahead` bytes further is prefetched.
    """
    vector = spec.vector
    W, size, item_size = vector.width, vector.bytes, spec.kv_element.size
    row_bytes = W * size
    # Register blocking: a product takes up to `wide` vectors of a value for two query rows, rather than fewer vectors
    # for more rows, so that values are read in the order of memory.
    wide, half = (8, 4) if _accumulators(spec) == 16 else (4, 2)
    of_wide = [_weighted_rows(spec, h, wide) for h in (1, 2)]
    of_half = [_weighted_rows(spec, h, half) for h in (1, 2, 4)]
    of_one = [_weighted_rows(spec, h, 1) for h in (1, 2, 4)]
    wide_one, wide_two = of_wide
    half_one, half_two, half_four = of_half
    one_one, one_two, one_four = of_one

    @spec.jit
    def add_block(
        out: int,
        pitch: int,
        weights: int,
        rescale: int,
        rows: int,
        offset: int,
        n: int,
        after: int,
        left: int,
        vectors: int,
    ) -> int:
        """One block of columns for as many rows as a product takes; returns how many rows."""
        if vectors == wide:
            if left >= 2:
                wide_two(out, pitch, weights, rescale, rows, offset, n, after)
                return 2
            wide_one(out, pitch, weights, rescale, rows, offset, n, after)
            return 1
        if vectors == half:
            if left >= 4:
                half_four(out, pitch, weights, rescale, rows, offset, n, after)
                return 4
            if left >= 2:
                half_two(out, pitch, weights, rescale, rows, offset, n, after)
                return 2
            half_one(out, pitch, weights, rescale, rows, offset, n, after)
            return 1
        if left >= 4:
            one_four(out, pitch, weights, rescale, rows, offset, n, after)
            return 4
        if left >= 2:
            one_two(out, pitch, weights, rescale, rows, offset, n, after)
            return 2
        one_one(out, pitch, weights, rescale, rows, offset, n, after)
        return 1

    @spec.jit
    def add(p: Any, at: int, first: int, end: int, rows: int, offset: int, n: int, ahead: int) -> None:
        chunks = (p.Ev + W - 1) // W
        whole = p.Ev // W
        pitch = chunks * row_bytes
        c = 0
        while c < chunks:
            left = whole - c
            # Values of one byte are widened once for four rows: widening them twice costs more than strided reads.
            in_order = item_size > 1 or end - first <= 2
            vectors = wide if left >= wide and in_order else half if left >= half else 1
            where = offset + (c * W if c < whole else p.Ev - W) * item_size
            lane = first
            while lane < end:
                lane += add_block(
                    at + p.at_out + lane * pitch + c * row_bytes,
                    pitch,
                    at + p.at_scores + lane * size,
                    at + p.at_state + RESCALE * row_bytes + lane * size,
                    rows,
                    where,
                    n,
                    where + ahead,
                    end - lane,
                    vectors,
                )
            c += vectors

    return add


def pack_queries(spec: Spec) -> Any:
    """Make ``pack(p, at)``: the tile's queries as rows of vectors, times a power of two, for `multiply_keys`."""
    vector = spec.vector
    W = vector.width
    real: Any = vector.dtype
    query_at = load_query(spec)
    lane_counts_of, query_rows_of, queries_of = views(areas_of(spec), "lane_counts query_rows queries")

    @spec.jit
    def pack(p: Any, at: int) -> None:
        lanes = lane_counts_of(p, at)[0]
        rows = query_rows_of(p, at)
        pitch = (p.E + W - 1) // W * W
        packed = queries_of(p, at)
        factor = real(p.prescale)
        whole = p.E // W * W
        for lane in range(lanes):
            for e in range(whole):
                packed[lane * pitch + e] = query_at(rows[lane] + e * p.query_column) * factor
            if whole < p.E:
                for e in range(p.E - W, p.E):
                    x = query_at(rows[lane] + e * p.query_column) * factor
                    packed[lane * pitch + e - (p.E - W) + whole] = x if e >= whole else real(0)

    return pack


def write_row(spec: Spec) -> Any:
    """Make ``write(target, stride, count, source, factor)``: target[e] = source[e] * factor, rounded, `count` times."""
    vector, element, size = spec.vector, spec.out_element, spec.out_element.size
    kind = "f64" if vector.bits == 64 else "f32"

    def build(b: Builder, target: Value, stride: Value, count: Value, source: Value, factor: Value) -> None:
        def single(i: Value, carried: list[Value]) -> list[Value]:
            p, q = carried
            element.store_one(vector, b, b.fmul(load(b, vector.element, q, align=vector.bytes), factor), p)
            return [at(b, p, stride), at(b, q, vector.bytes)]

        loop(b, count, [pointer(b, target), pointer(b, source)], single)

    one_by_one = routine(f"target stride count source factor:{kind}", build)
    by_vector = write_sums(spec)

    @spec.jit
    def write(target: int, stride: int, count: int, source: int, factor: float) -> None:
        if stride == size:
            by_vector(target, 0, 1, count, source, 0, factor)
        else:
            one_by_one(target, stride, count, source, factor)

    return write


def lanes_of(lanes: list[int]) -> Value:
    return ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
