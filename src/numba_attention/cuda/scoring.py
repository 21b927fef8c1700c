"""From products of queries and keys to scores: stages and intervals, shared by forward and backward passes.

A tile of scores has rows and columns. In the forward pass rows are queries and columns are keys; where the backward
pass sums over queries it is the other way round. Position by position the rules are the same: a row sees one interval
of columns.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..intervals import bind, keys_of_row, rows_of_key
from .emit import I32, I64, Emit, Pred, Real, Regs, Value
from .formats import read, read_pair
from .instructions import Evaluation
from .parameters import Parameters, Sequence, clamp
from .products import Layout, Product
from .softmax import LARGEST
from .spec import Spec

# The polynomial by which CUDA's library (`__nv_tanhf`) computes tanh x = x + x x^2 p(x^2) below a limit.
SMALL = float.fromhex("0x1.333334p-1")
TANH = tuple(map(float.fromhex, ("0x1.01e104p-6", "-0x1.ac795cp-5", "0x1.10b282p-3", "-0x1.5553dap-2")))
TOGETHER = 16  # scores of a thread for which it is asked at once; 32 would spill in the kernels of sm_90a


def tanh(e: Emit, s: Regs) -> Regs:
    """Compute tanh of the scores of a thread in float32, with the bits of `Emit.tanh`.

    The library computes an exponential and a reciprocal of every number, and takes the polynomial of small ones. Scores
    are mostly small beside their cap: 7 instructions of a number are left of 15, none of them as slow as those two.
    """
    curves: Regs = []
    for first in range(0, len(s), TOGETHER):
        part = s[first : first + TOGETHER]
        largest = [e.abs(x) for x in part]
        while len(largest) > 1:
            odd = largest[len(largest) // 2 * 2 :]
            largest = [e.max(x, y) for x, y in zip(largest[::2], largest[1::2], strict=False)] + odd
        large = e.any_lane(largest[0] >= SMALL)
        part = e.when(large > 0, part, lambda numbers: [e.tanh(x) for x in numbers])
        curves += e.when(large.equals(0), part, lambda numbers: [_small_tanh(e, x) for x in numbers])
    return curves


def _small_tanh(e: Emit, x: Real) -> Real:
    square, p = x * x, e.const("f", TANH[0])
    for coefficient in TANH[1:]:
        p = e.fma(p, square, e.const("f", coefficient))
    return e.fma(e.fma(p, square, e.const("f", 0.0)), x, x)  # keeps the sign of 0


def _converted(e: Emit, kind: str, x: Real) -> Real:
    """A bias in the kind of the scores; a finite float64 is clamped so that it stays finite in float32."""
    if kind == "f" and x.kind == "d":
        most = e.const("d", LARGEST["f"])
        return e.select(
            e.is_finite(x), e.convert(kind, e.max(e.min(x, most), e.const("d", 0.0) - most)), e.convert(kind, x)
        )
    return e.convert(kind, x)


class Span:
    """Which columns of a tile each row sees, by the rules of `intervals`: keys of a query, or queries of a key.

    Parameters
    ----------
    numbers : low, high, queries, keys, prefix
        Of 32 bits, as `intervals.keys_of_row` has them.
    transposed : bool
        Whether the rows of the tile are keys.
    """

    def __init__(self, e: Emit, numbers: Regs, transposed: bool) -> None:
        self.e, self.numbers = e, numbers
        _, _, queries, keys, _ = numbers
        self.rows, self.columns = (keys, queries) if transposed else (queries, keys)
        self._rule = bind(rows_of_key if transposed else keys_of_row, e.min, e.max, e.select)

    def of_row(self, row: I32) -> tuple[I32, I32]:
        """First column and the one after the last; the interval of a row out of bounds is empty."""
        start, stop = self._rule(row, *self.numbers)
        return start, stop

    def of_rows(self, first: I32, last: I32) -> tuple[I32, I32, I32, I32]:
        """Columns that any of some rows sees, and columns that all of them see."""
        any_first, all_last = self.of_row(first)
        all_first, any_last = self.of_row(self.e.min(last, self.rows - 1))
        any_last = self.e.select(first < self.rows, any_last, any_first)  # no rows
        return any_first, any_last, all_first, all_last


def span_of(e: Emit, p: Parameters, s: Sequence) -> tuple[I32, I32, I32, I32, I32]:
    """The numbers of a `Span`."""
    low, high = clamp(e, s.offset - p.left), clamp(e, s.offset + p.right)
    return low, high, s.int("queries"), s.int("keys"), s.int("prefix")


@dataclass(frozen=True)
class StageInputs:
    """What the stages between products and softmax read."""

    bias: I64  # addresses of the elements of this head, or of head 0 where `heads` says the head of each slot
    mask: I64
    offset: I32
    rows: I32  # valid queries
    keys: I32  # valid keys
    slopes: Regs  # of ALiBi, of each slot
    heads: Regs | None = None
    biases: Regs | None = None  # the bias of each score, where it has been read
    # What rules of callers are called with: the number of the sequence, the head of each slot, the position of query 0
    # and the number of key 0.
    batch: I32 | None = None
    head_numbers: Regs | None = None
    first_position: I32 | None = None
    first_key: I32 | None = None


class Scores:
    """A tile of scores in registers: which query and key each one is of.

    Parameters
    ----------
    row : Value
        Row of the lane's slot 0, in the sequence.
    rows : list of Value
        Row of each slot.
    column : Value
        Column of the lane's first register.
    """

    def __init__(self, e: Emit, c: Spec, p: Parameters, product: Product, layout: Layout, rows: Regs, column: I32,
                 transposed: bool = False) -> None:  # fmt: skip
        self.e, self.c, self.p, self.product, self.layout = e, c, p, product, layout
        self.rows, self.column, self.transposed = rows, column, transposed
        self.natural: Regs = []  # what a score_mod was called with

    def places(self) -> list[tuple[I32, I32]]:
        """Query and key of each register."""
        columns = {n: self.column + n for n in dict.fromkeys(n for _, n in self.layout.elements)}
        positions = [(self.rows[slot], columns[n]) for slot, n in self.layout.elements]
        return [(b, a) for a, b in positions] if self.transposed else positions

    def distances(self, offset: I32) -> Regs:
        """How far each key lies before its query, in the kind of the scores.

        The GPU converts integers at the rate of exponentials, so it converts one of each row, from which the columns
        of a tile have constant distances. Above 2^24, float32 rounds both.
        """
        e, kind = self.e, self.product.kind
        if self.transposed:
            starts = [e.convert(kind, self.column + offset - row) for row in self.rows]
            return [starts[slot] + float(n) for slot, n in self.layout.elements]
        starts = [e.convert(kind, row + offset - self.column) for row in self.rows]
        return [starts[slot] - float(n) for slot, n in self.layout.elements]

    def stages(self, s: Regs, inputs: StageInputs) -> tuple[Regs, Regs]:
        """Apply softcap, score_mod, ALiBi, bias, mask and mask_mod, in this order.

        Returns the scores, natural ones unless masks are all there is, and the derivative of each where it is not 1.
        """
        e, c, p, kind = self.e, self.c, self.p, self.product.kind
        rest, derivatives = p.real("rest", kind), []
        places = self.places()
        is_natural = c.softcap or c.has_score_mod or c.alibi
        if c.softcap:
            inner, outer = p.real("cap_inner", kind), p.real("cap_outer", kind)
            curves = [x * inner for x in s]
            # Other products have no registers for it in kernels that do much else.
            curves = tanh(e, curves) if c.product == "wgmma" else [e.tanh(x) for x in curves]
            s = [x * outer for x in curves]
            derivatives = [e.const(kind, 1.0) - x * x for x in curves]
        elif is_natural:
            s = [x * rest for x in s]
        if c.has_score_mod:
            assert c.mods is not None
            self.natural = s
            results = self._run(c.mods.score, inputs, s)
            s = [outputs[0] for outputs in results]
            if c.mods.has_slope:
                derivatives = [
                    own[1] * derivatives[n] if c.softcap else own[1] for n, own in enumerate(results)
                ]  # fmt: skip
        if c.alibi:
            slopes = [e.const(kind, 0.0) - slope for slope in inputs.slopes]
            distances = self.distances(inputs.offset)
            s = [
                e.fma(e.abs(z), slopes[slot], x)
                for (slot, _), z, x in zip(self.layout.elements, distances, s, strict=True)
            ]
        low = self.product.hidden(e) if self.nan_safe else e.const(kind, -math.inf)
        if (c.bias and inputs.biases is None) or c.mask:
            inside = [(i < inputs.rows) & (j < inputs.keys) for i, j in places]
        if c.bias:
            least = e.const(kind, -LARGEST[kind])
            biased, biases = [], inputs.biases or self.elements("bias", c.bias, inputs, places, inside)
            for z, x in zip(biases, s, strict=True):
                y = _converted(e, kind, z)
                total = x + y if is_natural else e.fma(x, rest, y)
                # Only a bias of -inf hides: a sum of finite numbers that underflows to -inf becomes the least number.
                hides = y.equals(-math.inf)
                if c.has_score_mod:
                    hides = hides | x.equals(-math.inf)
                biased.append(e.select(hides, low, e.select(total < least, least, total)))
            s = biased
        elif c.has_score_mod and self.nan_safe:
            s = [e.select(x.equals(-math.inf), low, x) for x in s]
        if c.mask:
            shown = self.elements("mask", "bool", inputs, places, inside)
            s = [e.select(y > 0, x, low) for y, x in zip(shown, s, strict=True)]
        if c.mods is not None and c.mods.mask is not None:
            visible = self._run(c.mods.mask, inputs, s)
            s = [e.select(own[0], x, low) for own, x in zip(visible, s, strict=True)]
        return s, derivatives

    def elements(
        self, name: str, storage: str, inputs: StageInputs, places: list[tuple[I32, I32]], inside: list[Pred]
    ) -> Iterator[Value]:
        """The elements of the bias or the mask, each read when it is asked for; 0 out of bounds.

        ``c.pairs``: two neighbours of a thread are one load. The second may lie beyond the last valid key, and not
        beyond the row in memory; such scores are hidden afterwards.
        """
        for n in range(0, len(places), 2 if self.c.pairs else 1):
            address = self.at(name, inputs, self.layout.elements[n][0], *places[n])
            if self.c.pairs:
                yield from read_pair(self.e, storage, address, inside[n])
            else:
                yield read(self.e, storage, address, inside[n])

    def _run(self, program: Any, inputs: StageInputs, s: Regs) -> list[Regs]:
        """What a program computes for each score."""
        assert self.c.mods is not None
        evaluation = Evaluation(self.e, self.p.mods, program, self.c.mods.arguments, self.product.kind)
        return [outputs for outputs, _ in self.evaluate(evaluation, inputs, s)]

    def evaluate(
        self, evaluation: Evaluation, inputs: StageInputs, s: Regs
    ) -> list[tuple[Regs, list[tuple[int, I32]]]]:
        """Outputs of a program for each score, and which elements its sites read.

        Pairs beyond the last have the position of the last.
        """
        e, batch, heads = self.e, inputs.batch, inputs.head_numbers
        first, first_key = inputs.first_position, inputs.first_key
        assert batch is not None
        assert heads is not None
        assert first is not None
        assert first_key is not None
        places = self.places()
        rows = {id(i): e.max(e.min(i, inputs.rows - 1), 0) + first for i, _ in places}
        keys = {id(j): e.max(e.min(j, inputs.keys - 1), 0) + first_key for _, j in places}
        results = []
        for (slot, _), (i, j), x in zip(self.layout.elements, places, s, strict=True):
            outputs = evaluation.run(score=x, batch=batch, head=heads[slot], i=rows[id(i)], j=keys[id(j)])
            results.append((outputs, evaluation.elements))
        return results

    @property
    def nan_safe(self) -> bool:
        return self.product.nan_safe

    def at(self, name: str, inputs: StageInputs, slot: int, i: I32, j: I32) -> I64:
        """The address of an element of the bias or the mask."""
        e, p = self.e, self.p
        row, column, head = (getattr(p, f"{name}_{axis}") for axis in ("row", "column", "head"))
        address: I64 = (inputs.bias if name == "bias" else inputs.mask) + e.wide(i) * row + e.wide(j) * column
        return address if inputs.heads is None else address + e.wide(inputs.heads[slot]) * head

    def hide(self, s: Regs, span: Span) -> Regs:
        """Set scores outside the interval of their row to -inf, or to `products.HIDDEN`."""
        e = self.e
        low = self.product.hidden(e) if self.nan_safe else e.const(self.product.kind, -math.inf)
        ends = []
        for row in self.rows:
            first, last = span.of_row(row)
            ends.append((first - self.column, last - self.column))
        visible = []
        for (slot, n), x in zip(self.layout.elements, s, strict=True):
            first, last = ends[slot]
            seen = (first <= n) & (last > n)
            visible.append(e.select(seen, x, low))
        return visible
