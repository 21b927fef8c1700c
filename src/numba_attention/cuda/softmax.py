"""The online softmax on registers: rows of scores in, weights and the state of each row out.

Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; in base 2, with the sum of each lane kept
apart until the end. A row is spread over the lanes that `product.reduce` joins.
"""

import math
from typing import Any

from .products import Layout

LN2 = math.log(2)
LOG2E = math.log2(math.e)


def across(e: Any, product: Any, x: Any, join: Any) -> Any:
    """Join a number of each lane of a row; all of them get the same bits."""
    for distance in product.reduce:
        x = join(x, e.shuffle_xor(x, distance))
    return x


def start(e: Any, product: Any, features: Layout, sinks: list[Any] | None, first: Any) -> tuple[list[Any], ...]:
    """Maxima, sums and accumulators before the first key; a sink is a key whose value is 0, in the first lane's sum."""
    kind = product.kind
    zero, one, low = e.const(kind, 0.0), e.const(kind, 1.0), e.const(kind, -math.inf)
    accumulators = [zero] * len(features)
    if sinks is None:
        return [low] * product.slots, [zero] * product.slots, accumulators
    counts = [e.select(sink.equals(-math.inf), zero, e.select(first, one, zero)) for sink in sinks]
    return sinks, counts, accumulators


def fold(
    e: Any, product: Any, layout: Layout, features: Layout, s: list[Any], m: list[Any], l: list[Any], c: list[Any],
    factor: Any, at_once: bool = False,
) -> tuple[list[Any], list[Any], list[Any], list[Any]]:  # fmt: skip
    """Take in a tile of scores (times `factor` in base 2): its weights, and maxima, sums and accumulators with it.

    ``at_once``: accumulators are rescaled here, and not when they are needed.
    """
    p, m, l, c = list(s), list(m), list(l), list(c)
    low, zero = e.const(product.kind, -math.inf), e.const(product.kind, 0.0)
    careful = getattr(product, "careful", False)
    for slot in range(product.slots):
        mine = layout.of_slot(slot)
        seen = [e.select(product.is_hidden(e, s[n]), low, s[n]) if careful else s[n] for n in mine]
        top = seen[0]
        for x in seen[1:]:
            top = e.max(top, x)
        top = across(e, product, top, e.max)
        top = e.max(m[slot], top if factor is None else top * factor)
        base = e.select(top > -math.inf, top, zero)  # nothing seen yet: exp2(-inf - 0) is 0
        alpha = e.exp2(m[slot] - base)
        m[slot], total = top, l[slot] * alpha
        for n, x in zip(mine, seen, strict=True):
            weight = e.exp2(x - base if factor is None else e.fma(x, factor, zero - base))
            total = total + weight
            p[n] = e.select(product.is_hidden(e, s[n]), s[n], weight) if careful else weight
        l[slot] = total
        for n in features.of_slot(slot):
            c[n] = e.times(c[n], alpha) if at_once else c[n] * alpha
    return p, m, l, c


def total(e: Any, product: Any, l: list[Any]) -> list[Any]:
    return [across(e, product, x, lambda a, b: a + b) for x in l]
