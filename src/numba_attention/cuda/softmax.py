"""The online softmax on registers: rows of scores in, weights and the state of each row out.

Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, with the sum of each lane kept apart until
the end. A row is spread over the lanes that `product.reduce` joins.

Scores have a unit: what takes them to natural scores, those of the formula. It is the part of the scale that queries
were not multiplied by, or 1 behind a stage. A row's maximum is kept in that unit, as one of the very numbers that it is
subtracted from, and factor = unit * log2(e).
"""

import math
from typing import Any

from .products import Layout

LN2 = math.log(2)
LOG2E = math.log2(math.e)
# The weight of a score is 2**(score * factor - maximum * factor), one fused multiply-add, as long as the rounded product
# of the maximum and the factor is within 1/8 of the exact one. Beyond, the maximum is subtracted first.
FAR = {"f": 2.0**22, "d": 2.0**51}
# The lse beyond which its rounding is more than 3e-5 of a denominator (that of float64: 4e-9).
ROUNDED = {"f": 2.0**10, "d": 2.0**25}
# Weights of 2**-LIFT and less: up to 2**29 of them, times values near the largest number, have a finite sum.
LIFT = 30


def across(e: Any, product: Any, x: Any, join: Any) -> Any:
    """Join a number of each lane of a row; all of them get the same bits."""
    for distance in product.reduce:
        x = join(x, e.shuffle_xor(x, distance))
    return x


def start(
    e: Any, product: Any, features: Layout, sinks: list[Any] | None, first: Any, lift: Any = None
) -> tuple[list[Any], ...]:
    """Maxima, sums and accumulators before the first key; a sink is a key whose value is 0, in the first lane's sum."""
    kind = product.kind
    zero, one, low = e.const(kind, 0.0), e.const(kind, 1.0), e.const(kind, -math.inf)
    accumulators = [zero] * len(features)
    if sinks is None:
        return [low] * product.slots, [zero] * product.slots, accumulators
    if lift is not None:
        one = e.select(lift > 0, e.const(kind, 2.0**-LIFT), one)
    counts = [e.select(sink.equals(-math.inf), zero, e.select(first, one, zero)) for sink in sinks]
    return sinks, counts, accumulators


def seen(e: Any, kind: str, maximum: Any) -> Any:
    """The maximum of a row, and 0 where the row has seen nothing: 2**(-inf - 0) is 0."""
    return e.select(maximum > -math.inf, maximum, e.const(kind, 0.0))


def center(
    e: Any, product: Any, layout: Layout, s: list[Any], tops: list[Any], factor: Any, lift: Any = None
) -> tuple[list[Any], list[Any]]:
    """Scores and, of each slot, an offset, such that the weight of a score is 2**(score * factor + offset).

    `tops` has the maximum of each slot (see `seen`). Where `lift` is more than 0, weights are 2**-LIFT times as large.
    """
    kind, slots = product.kind, range(product.slots)
    zero = e.const(kind, 0.0)
    offsets = [zero - top * factor for top in tops]
    limit = e.const(kind, FAR[kind])
    if lift is not None:
        limit = e.select(lift > 0, e.const(kind, -1.0), limit)
    far = [e.abs(offset) >= limit for offset in offsets]
    some = far[0]
    for slot in slots[1:]:
        some = some | far[slot]

    def subtract(state: list[Any]) -> list[Any]:
        level = zero if lift is None else e.select(lift > 0, e.const(kind, float(-LIFT)), zero)
        less = [e.select(far[slot], tops[slot], zero) for slot in slots]
        apart = [x - less[slot] for (slot, _), x in zip(layout.elements, state[: len(s)], strict=True)]
        return apart + [e.select(far[slot], level, state[len(s) + slot]) for slot in slots]

    made = e.when(some, [*s, *offsets], subtract)
    return made[: len(s)], made[len(s) :]


def fold(
    e: Any, product: Any, layout: Layout, features: Layout, s: list[Any], m: list[Any], l: list[Any], c: list[Any],
    factor: Any, lift: Any = None, at_once: bool = False,
) -> tuple[list[Any], list[Any], list[Any], list[Any]]:  # fmt: skip
    """Take in a tile of scores: its weights, and maxima, sums and accumulators with it.

    ``at_once``: accumulators are rescaled here, and not when they are needed.
    """
    p, m, l, c = list(s), list(m), list(l), list(c)
    low = e.const(product.kind, -math.inf)
    careful = getattr(product, "careful", False)
    shown = [e.select(product.is_hidden(e, x), low, x) for x in s] if careful else s
    tops, alphas = [], []
    for slot in range(product.slots):
        mine = layout.of_slot(slot)
        top = shown[mine[0]]
        for n in mine[1:]:
            top = e.max(top, shown[n])
        top = e.max(m[slot], across(e, product, top, e.max))
        tops.append(seen(e, product.kind, top))
        alphas.append(e.exp2((m[slot] - tops[slot]) * factor))
        m[slot] = top
    shown, offsets = center(e, product, layout, shown, tops, factor, lift)
    for slot in range(product.slots):
        total = l[slot] * alphas[slot]
        for n in layout.of_slot(slot):
            weight = e.exp2(e.fma(shown[n], factor, offsets[slot]))
            total = total + weight
            p[n] = e.select(product.is_hidden(e, s[n]), s[n], weight) if careful else weight
        l[slot] = total
        for n in features.of_slot(slot):
            c[n] = e.times(c[n], alphas[slot]) if at_once else c[n] * alphas[slot]
    return p, m, l, c


def total(e: Any, product: Any, l: list[Any]) -> list[Any]:
    return [across(e, product, x, lambda a, b: a + b) for x in l]


def lse(e: Any, maximum: Any, total: Any, unit: Any) -> Any:
    """The natural logarithm of the denominator of a row, of its maximum and the sum of its weights."""
    return e.fma(maximum, unit, e.log2(total) * LN2)


def is_far(e: Any, lse: Any) -> Any:
    """Whether a row has an lse so large that, rounded, it does not tell the denominator."""
    return (e.abs(lse) > ROUNDED[lse.kind]) & e.is_finite(lse)


def recenter(e: Any, s: list[Any], tops: list[Any]) -> list[Any]:
    """Subtract from each score the maximum of its row, which is 0 for rows whose lse tells the denominator.

    Products that are summed in another order may exceed it by their rounding, and nothing weighs more than the maximum.
    """
    made = []
    for x, top in zip(s, tops, strict=True):
        apart = x - top
        made.append(e.select((apart > 0.0) & (e.abs(top) > 0.0), apart - apart, apart))
    return made
