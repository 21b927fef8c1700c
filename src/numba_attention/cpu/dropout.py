"""Dropout as a pass over a tile of weights (key j by row, query by lane), with the random bits of `philox`.

Random numbers are made in vectors of 64-bit lanes of which the low halves count: a product of two such lanes is one
instruction that gives the high and the low word, and a shift moves the high one into place. With all words in 32-bit
lanes each product would need two instructions and three shuffles.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from .. import philox
from .simd import I16, I32, I64, Builder, Value, at, load, loop, pointer, routine, splat, store
from .softmax import SUM
from .spec import Spec

Kept = Callable[[int], Value]


def _for_each_group(
    spec: Spec, b: Builder, n: Value, j0: Value, positions: Value, heads: Value, head: Value, batch: Value, seed: Value,
    use: Callable[[Value, int, list[Value]], None],
) -> None:  # fmt: skip
    """Build the loop over groups of eight keys, as many as n keys have from key j0 on, a multiple of `philox.BLOCK`.

    ``use(block, v, words)`` gets, for vector v of the queries, the four random words in lanes of 32 bits; the keys of
    the group are those with the number 8 m + {0, 1} past ``block``, the key number times 8 for its place in the tile.
    """
    vector = spec.vector
    wide = spec.host.bits // 64  # lanes of 64 bits
    parts = vector.width // wide
    wide_type, word_type = ir.VectorType(I64, wide), ir.VectorType(I32, vector.width)
    low_half = ir.Constant(wide_type, [2**32 - 1] * wide)
    shift = ir.Constant(wide_type, [32] * wide)

    class Words:
        """A vector of words with the operator that `philox` uses."""

        def __init__(self, llvm: Value) -> None:
            self.llvm = llvm

        def __xor__(self, other: "Words") -> "Words":
            return Words(b.xor(self.llvm, other.llvm))

    def multiply(x: Words, constant: int) -> tuple[Words, Words]:
        product = b.mul(b.and_(x.llvm, low_half), ir.Constant(wide_type, [constant] * wide))
        return Words(b.lshr(product, shift)), Words(product)

    def every(x: Value) -> Words:
        return Words(splat(b, x, wide))

    def lanes(table: Value, more: Value) -> list[Words]:
        base = pointer(b, table)
        each = splat(b, more, wide)
        return [
            Words(b.add(load(b, wide_type, base, part * wide * 8, align=wide * 8), each))
            for part in range(parts * spec.block[1])
        ]

    def words_of(results: list[list[Words]], n: int) -> Value:
        """Word n of the results for the parts of a vector, in lanes of 32 bits."""
        low = [b.trunc(result[n].llvm, ir.VectorType(I32, wide)) for result in results]
        if len(low) == 1:
            return low[0]
        order = ir.Constant(word_type, list(range(vector.width)))
        return b.shuffle_vector(low[0], low[1], order)

    seeds = b.and_(seed, I64(2**32 - 1)), b.lshr(seed, I64(32))
    keys = [
        (every(first), every(second))
        for first, second in philox.round_keys(seeds, lambda word, constant: b.add(word, I64(constant)))
    ]
    of_positions, of_heads, of_batch = lanes(positions, I64(0)), lanes(heads, head), every(batch)
    blocks = b.lshr(b.add(n, I64(philox.BLOCK - 1)), I64(5))
    first_group = b.lshr(j0, I64(3))

    def body(g: Value, carried: list[Value]) -> list[Value]:
        group = every(b.add(first_group, g))
        for v in range(spec.block[1]):
            results = [
                philox.philox((of_positions[part], group, of_heads[part], of_batch), keys, multiply)
                for part in range(v * parts, (v + 1) * parts)
            ]
            use(g, v, [words_of(results, n) for n in range(4)])
        return []

    loop(b, b.shl(blocks, I64(2)), [], body)


def _kept(spec: Spec, b: Builder, word: Value, half: int, threshold: Value) -> Value:
    """Whether a half of a word, the low one first, is at least the threshold, which is given in the high half."""
    bits = word if half else b.shl(word, ir.Constant(word.type, [16] * spec.vector.width))
    return b.icmp_unsigned(">=", bits, threshold)


def _first_key(b: Builder, g: Value) -> Value:
    """The first key of group g of a tile, counted from the tile's."""
    return b.add(b.shl(b.lshr(g, I64(2)), I64(5)), b.shl(b.and_(g, I64(3)), I64(1)))


_PLACE = "n j0 positions heads head batch seed threshold"


def drop_weights(spec: Spec, pairs: bool = False) -> Any:
    """Make ``drop(weights, n, j0, positions, heads, head, batch, seed, threshold)``: dropped weights become 0.

    The tables of positions and heads are those of the rows of the tile, to whose heads `head` is added. If `pairs`,
    weights are pairs of bfloat16 in words, whose halves are exactly those of the random words.
    """
    vector, NV = spec.vector, spec.block[1]
    width = vector.bytes * vector.width
    row_bytes = NV * width

    def build(
        b: Builder, weights: Value, n: Value, j0: Value, positions: Value, heads: Value, head: Value, batch: Value,
        seed: Value, threshold: Value,
    ) -> None:  # fmt: skip
        base = pointer(b, weights)
        least = splat(b, b.trunc(b.shl(threshold, I64(16)), I32), vector.width)
        halves = ir.VectorType(I16, 2 * vector.width)
        least_half = splat(b, b.trunc(threshold, I16), 2 * vector.width)

        def single(g: Value, v: int, words: list[Value]) -> None:
            row = at(b, base, b.mul(_first_key(b, g), I64(row_bytes)))
            for m in range(philox.GROUP):
                place = at(b, row, (m % 2 + m // 2 * 8) * row_bytes + v * width)
                weight = vector.load(b, place)
                kept = _kept(spec, b, words[m // 2], m % 2, least)
                vector.store(b, b.select(kept, weight, vector.const(0.0)), place)

        def pair(g: Value, v: int, words: list[Value]) -> None:
            row = at(b, base, b.mul(b.lshr(_first_key(b, g), I64(1)), I64(row_bytes)))
            for m in range(philox.GROUP // 2):
                place = at(b, row, m * 4 * row_bytes + v * width)
                both = load(b, halves, place, align=4)
                kept = b.icmp_unsigned(">=", b.bitcast(words[m], halves), least_half)
                both = b.select(kept, both, ir.Constant(halves, [0] * (2 * vector.width)))
                store(b, both, place, align=4)

        _for_each_group(spec, b, n, j0, positions, heads, head, batch, seed, pair if pairs else single)

    return routine(f"weights {_PLACE}", build)


def make_drop(spec: Spec, pairs: bool = False) -> Any:
    """Make the compiled ``drop(p, s, at, weights, n, j0)``: `drop_weights` for the rows that scratch has tables of."""
    drop_tile = drop_weights(spec, pairs)

    @spec.jit
    def drop(p: Any, s: Any, at: int, weights: int, n: int, j0: int) -> None:
        heads = at + p.at_lane_heads
        positions, first_head = at + p.at_positions, s.head + p.first_head
        drop_tile(weights, n, j0 + p.first_key, positions, heads, first_head, s.number, p.seed, p.dropout)

    return drop


def drop_gradients(spec: Spec) -> Any:
    """Make ``drop(weights, grads, state, n, j0, ...)``, the derivative of `drop_weights` in place.

    Where a weight P was dropped, it becomes 0, and the gradient of its score, from P (dP - delta), becomes -P delta;
    delta is the row SUM of the state. A weight of exactly 0 has no gradient.
    """
    vector, NV = spec.vector, spec.block[1]
    width = vector.bytes * vector.width
    row_bytes = NV * width

    def build(
        b: Builder, weights: Value, grads: Value, state: Value, n: Value, j0: Value, positions: Value, heads: Value,
        head: Value, batch: Value, seed: Value, threshold: Value,
    ) -> None:  # fmt: skip
        bases = pointer(b, weights), pointer(b, grads)
        least = splat(b, b.trunc(b.shl(threshold, I64(16)), I32), vector.width)
        delta = [b.fneg(vector.load(b, pointer(b, state), SUM * row_bytes + v * width)) for v in range(NV)]
        zero = vector.const(0.0)

        def use(g: Value, v: int, words: list[Value]) -> None:
            offset = b.mul(_first_key(b, g), I64(row_bytes))
            row, grad_row = (at(b, base, offset) for base in bases)
            for m in range(philox.GROUP):
                distance = (m % 2 + m // 2 * 8) * row_bytes + v * width
                p, ds = vector.load(b, row, distance), vector.load(b, grad_row, distance)
                kept = _kept(spec, b, words[m // 2], m % 2, least)
                dropped = b.select(b.fcmp_ordered("==", p, zero), zero, b.fmul(p, delta[v]))
                vector.store(b, b.select(kept, p, zero), row, distance)
                vector.store(b, b.select(kept, ds, dropped), grad_row, distance)

        _for_each_group(spec, b, n, j0, positions, heads, head, batch, seed, use)

    return routine(f"weights grads state {_PLACE}", build)
