"""The online softmax on registers: rows of scores in, weights and the state of each row out.

Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, with the sum of each lane kept apart until
the end. A row is spread over the lanes that `product.reduce` joins.

Scores have a unit: what takes them to natural scores, those of the formula. It is the part of the scale that queries
were not multiplied by, or 1 behind a stage. A row's maximum is kept in that unit, as one of the very numbers that it is
subtracted from, and factor = unit * log2(e).
"""

import math
import sys
from collections.abc import Callable

from .emit import I32, Emit, Pred, Real, Regs, Value
from .products import Layout, Product

LN2 = math.log(2)
LOG2E = math.log2(math.e)
# Empty rows: the initial maximum is the least finite number and not -inf, because -inf minus -inf is NaN.
LARGEST = {"f": float.fromhex("0x1.fffffep127"), "d": sys.float_info.max}
# The weight of a score is 2**(score * factor - maximum * factor), one fused multiply-add, as long as the rounded
# product of the maximum and the factor is within 1/8 of the exact one. Beyond, the maximum is subtracted first.
FAR = {"f": 2.0**22, "d": 2.0**51}
# The lse beyond which its rounding error is a relative error of the denominator of more than 3e-5 (float64: 4e-9).
ROUNDED = {"f": 2.0**10, "d": 2.0**25}
SLACK = 2.0**-6  # binary logarithm of how far a recomputed weight may exceed 1
# Overflow: with weights of at most 2**-LIFT, up to 2**29 values near the largest number have a finite sum.
LIFT = 30


def across(e: Emit, product: Product, x: Value, join: Callable[[Value, Value], Value]) -> Value:
    """Join a number of each lane of a row; all of them get the same bits."""
    for distance in product.reduce:
        x = join(x, e.shuffle_xor(x, distance))
    return x


def start(
    e: Emit, product: Product, features: Layout, sinks: Regs | None, first: Pred, factor: Real,
    lift: I32 | None = None,
) -> tuple[Regs, Regs, Regs]:  # fmt: skip
    """Maxima, sums and accumulators before the first key; a sink is a key whose value is 0, in the first lane's sum."""
    kind = product.kind
    zero, low = e.const(kind, 0.0), e.const(kind, -LARGEST[kind])
    accumulators = [zero] * len(features)
    if sinks is None:
        return [low] * product.slots, [zero] * product.slots, accumulators
    counts = []
    for sink in sinks:
        weight = e.exp2(excess(e, sink, factor))
        if lift is not None:
            weight = e.select(lift > 0, e.const(kind, 2.0**-LIFT), weight)
        counts.append(e.select(sink.equals(-math.inf), zero, e.select(first, weight, zero)))
    return [e.max(sink, low) for sink in sinks], counts, accumulators


def excess(e: Emit, maximum: Real, factor: Real) -> Real:
    """The logarithm of the weight of a row's maximum: the rounding error of maximum * factor, exactly, by FMA."""
    kind = maximum.kind
    rounded = maximum * factor
    return e.select(
        e.abs(rounded) >= FAR[kind], e.const(kind, 0.0), e.fma(maximum, factor, e.const(kind, 0.0) - rounded)
    )


def center(
    e: Emit, product: Product, layout: Layout, s: Regs, m: Regs, factor: Real, lift: I32 | None = None,
    before: Regs | None = None,
) -> tuple[Regs, Regs, Regs]:  # fmt: skip
    """Scores and, of each slot, an offset, such that the weight of a score is 2**(score * factor + offset).

    `m` has the maximum of each slot. Where `lift` is more than 0, weights are 2**-LIFT times as large. The logarithm of
    what takes weights with the maxima `before` to those with `m` comes last.
    """
    kind, slots = product.kind, range(product.slots)
    zero, limit = e.const(kind, 0.0), e.const(kind, FAR[kind])
    offsets = [zero - top * factor for top in m]
    steps = [e.fma(x, factor, zero) + offset for x, offset in zip(before or [], offsets, strict=False)]
    largest = e.abs(offsets[0])
    for x in offsets[1:]:
        largest = e.max(largest, e.abs(x))
    if lift is not None:
        limit = e.select(lift > 0, zero, limit)

    def subtract(state: Regs) -> Regs:
        apart, offsets, steps = state[: len(s)], state[len(s) : len(s) + len(m)], state[len(s) + len(m) :]
        level = zero if lift is None else e.select(lift > 0, e.const(kind, float(-LIFT)), zero)
        for slot in slots:
            far = e.abs(offsets[slot]) >= limit
            less = e.select(far, m[slot], zero)
            for n in layout.of_slot(slot):
                apart[n] = apart[n] - less
            offsets[slot] = e.select(far, level, offsets[slot])
            if before is not None:
                more = excess(e, before[slot], factor)
                more = more if lift is None else e.select(lift > 0, zero, more)
                steps[slot] = e.select(far, (before[slot] - m[slot]) * factor - more, steps[slot])
        return apart + offsets + steps

    centered = e.when(largest >= limit, [*s, *offsets, *steps], subtract)
    return centered[: len(s)], centered[len(s) : len(s) + len(m)], centered[len(s) + len(m) :]


def fold(
    e: Emit, product: Product, layout: Layout, features: Layout, s: Regs, m: Regs, l: Regs, c: Regs,
    factor: Real, lift: I32 | None = None, at_once: bool = False,
) -> tuple[Regs, Regs, Regs, Regs]:  # fmt: skip
    """Update the online softmax by a tile of scores; returns its weights, and maxima, sums and accumulators.

    ``at_once``: accumulators are rescaled here, and not when they are needed.
    """
    p, before, l, c = list(s), m, list(l), list(c)
    low = e.const(product.kind, -math.inf)
    nan_safe = product.nan_safe
    shown = [e.select(product.is_hidden(e, x), low, x) for x in s] if nan_safe else s
    m = []
    for slot in range(product.slots):
        registers = layout.of_slot(slot)
        top = shown[registers[0]]
        for n in registers[1:]:
            top = e.max(top, shown[n])
        m.append(e.max(before[slot], across(e, product, top, e.max)))
    shown, offsets, steps = center(e, product, layout, shown, m, factor, lift, before)
    for slot in range(product.slots):
        alpha = e.exp2(steps[slot])
        total = l[slot] * alpha
        for n in layout.of_slot(slot):
            weight = e.exp2(e.fma(shown[n], factor, offsets[slot]))
            total = total + weight
            p[n] = e.select(product.is_hidden(e, s[n]), s[n], weight) if nan_safe else weight
        l[slot] = total
        for n in features.of_slot(slot):
            c[n] = e.times(c[n], alpha) if at_once else c[n] * alpha
    return p, m, l, c


def total(e: Emit, product: Product, l: Regs) -> Regs:
    return [across(e, product, x, lambda a, b: a + b) for x in l]


def relative(e: Emit, m: Regs, l: Regs, factor: Real, lift: I32 | None = None) -> Regs:
    """Sums of weights where the maximum of a row weighs 1."""
    sums = []
    for top, x in zip(m, l, strict=True):
        scale = e.exp2(e.const(x.kind, 0.0) - excess(e, top, factor))
        sums.append(x * (scale if lift is None else e.select(lift > 0, e.const(x.kind, 2.0**LIFT), scale)))
    return sums


def lse(e: Emit, maximum: Real, total: Real, unit: Real) -> Real:
    """The natural logarithm of the denominator of a row, of its maximum and the sum of weights relative to it."""
    return e.fma(maximum, unit, e.log2(total) * LN2)


def recompute(e: Emit, score: Real, factor: Real, offset: Real, native: bool) -> Real:
    """P of a score, exp(score - lse) as 2**(score * factor + offset), in a backward pass.

    No weight exceeds 1 by more than `SLACK` allows: where a score is the small difference of large products, summed in
    another order than in the forward pass, it may lie above lse by any amount. `native` is that of `Emit.at_most`.
    """
    return e.exp2(e.at_most(e.fma(score, factor, offset), SLACK, native))


def is_far(e: Emit, lse: Real) -> Pred:
    """Whether the lse of a row is so large that, rounded, it does not determine the denominator."""
    return (e.abs(lse) > ROUNDED[lse.kind]) & e.is_finite(lse)


def recenter(e: Emit, s: Regs, tops: Regs) -> Regs:
    """Subtract from each score the maximum of its row, which is 0 for rows whose lse determines the denominator.

    Products that are summed in another order may exceed it by their rounding, and nothing weighs more than the maximum.
    """
    centered = []
    for x, top in zip(s, tops, strict=True):
        difference = x - top
        centered.append(e.select((difference > 0.0) & (e.abs(top) > 0.0), difference - difference, difference))
    return centered
