"""The gradient of a tile of scores, dS, computed anew for the sums of what scores are made of: a bias, `mod_args`."""

from .blocks import Block, Lanes
from .dropout import kept
from .emit import I32, Regs
from .operands import both
from .products import Product
from .softmax import recenter, recompute
from .spec import Spec


class Tiles:
    """Shared memory: a tile of each operand. A kernel may reuse it for the sums of a tile of scores at the end."""

    def __init__(self, c: Spec) -> None:
        self.s, self.dp = both(c, ("query", "grad_out"), ("key", "value"))
        self.size = 8 if c.compute == "float64" else 4
        self.end = max(self.s.end, self.dp.end, c.rows * c.columns * self.size)

    def load(self, b: Block, base: I32, thread: I32, j: I32) -> None:
        """Copy the operands; of slices, all of those of the rows, and the first one of the keys."""
        self.s.load_a(b, base, thread, b.first, b.span.rows)
        self.dp.load_a(b, base, thread, b.first, b.span.rows)
        self.s.load_b(b, base, thread, j, b.span.columns)
        if not b.c.is_sliced:
            self.dp.load_b(b, base, thread, j, b.span.columns)
        b.commit()

    def scores(self, b: Block, product: Product, base: I32, thread: I32, j: I32) -> Regs:
        """Q K^T."""

        def beside() -> None:
            self.dp.load_b(b, base, thread, j, b.span.columns)
            b.commit()

        return self.s.scores(b, product, base, thread, j, b.span.columns, beside)

    def gradients_of_scores(self, b: Block, lanes: Lanes, base: I32, thread: I32, j: I32, s: Regs) -> Regs:
        """dS, P (dO V^T - delta), of scores after all stages; it is before the derivative of any stage.

        It is 0 where P is 0: behind what hides a key, or of scores too low for P, there may be an infinite value.
        """
        e, c, product = b.e, b.c, lanes.product
        kind, result = product.kind, []
        dp = self._of_weights(b, product, e.opaque(base), e.opaque(thread), j)
        zero, factor, facts = e.const(kind, 0.0), b.p.real("factor", kind), []
        for row in lanes.rows(thread):
            at = b.first + row
            address, in_bounds = b.places["delta"] + e.wide(at) * b.p.delta_row, at < b.span.rows
            facts.append([e.load(kind, address + n * self.size, where=in_bounds) for n in range(3)])
        apart = recenter(e, s, [facts[slot][2] for slot, _ in lanes.layout.elements])
        if c.dropout:
            scale = b.p.real("dropout_scale", kind)
            keeps = kept(b, lanes, thread, j)
            dp = [e.select(keep, x * scale, zero) for keep, x in zip(keeps, dp, strict=True)]
        for n, (slot, _) in enumerate(lanes.layout.elements):
            delta, offset, _ = facts[slot]
            hidden = product.is_hidden(e, s[n]) if c.nan_safe else s[n].equals(float("-inf"))
            weight = recompute(e, apart[n], factor, offset, c.has_nan_minimum)
            result.append(e.select(hidden | weight.equals(0.0), zero, weight * (dp[n] - delta)))
        return result

    def _of_weights(self, b: Block, product: Product, base: I32, thread: I32, j: I32) -> Regs:
        """The gradient of the weights, dO V^T, after the scores."""
        if b.c.is_sliced:
            self.dp.arrived(b.e)
        return self.dp.scores(b, product, base, thread, j, b.span.columns)
