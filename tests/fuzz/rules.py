"""Rules that are drawn: each as a caller writes it, and as a formula on balls, with derivatives.

All take the same `mod_args`: a number for each head, a table for each head, a group for each position, and an integer.
"""

import math

import numpy as np
from balls import Ball, Real, add, exact, multiply

WIDTH, POSITIONS = 9, 40  # of the table, and of the groups


def slope_of_distance(score, batch, head, i, j, values, table, groups, n):
    return score - values[head] * abs(i - j)


def temperature(score, batch, head, i, j, values, table, groups, n):
    return score * values[head]


def relative(score, batch, head, i, j, values, table, groups, n):
    return score + table[head, min(max(i - j + 4, 0), 8)]


def hiding(score, batch, head, i, j, values, table, groups, n):
    if (i + j + batch) % 3 == 0:
        return -math.inf
    return score + table[head, j % 9]


def leaky(score, batch, head, i, j, values, table, groups, n):
    return score if score > 0 else 0.25 * score


def distance_from_zero(score, batch, head, i, j, values, table, groups, n):
    return abs(score) if groups[j % 40] == groups[max(i, 0) % 40] else score


def capped(score, batch, head, i, j, values, table, groups, n):
    return values[head] * math.tanh(score / 8)


def square(score, batch, head, i, j, values, table, groups, n):
    total = score
    for _ in range(n):
        total = 0.5 * total
    return total * score


def quotient(score, batch, head, i, j, values, table, groups, n):
    return values[head] / (1.0 + abs(score))


def lagging(batch, head, i, j, values, table, groups, n):
    return (i - j) % 3 != 1


def in_group(batch, head, i, j, values, table, groups, n):
    return groups[min(max(i, 0), 39)] == groups[min(j, 39)]


def some_heads_causal(batch, head, i, j, values, table, groups, n):
    return j <= i or head == 0


def striped(batch, head, i, j, values, table, groups, n):
    return not (j // 16 == i // 16 + n and (batch + head) % 2 == 0)


def nothing(batch, head, i, j, values, table, groups, n):
    return False


SCORES = [
    slope_of_distance, temperature, relative, hiding, leaky, distance_from_zero, capped, square, quotient,
]  # fmt: skip
MASKS = [lagging, in_group, some_heads_causal, striped, nothing]


class Applied:
    """A score rule over the scores of one sequence, a ball (H, L, S).

    Attributes
    ----------
    scores : Ball
        After the rule.
    shown : array of bool
        Where the rule does not return -inf.
    slope : Ball
        The derivative with respect to the score before the rule.
    of_values, of_table : (Ball, indices) or None
        The derivative with respect to the element of the array that was read, and which that is.
    """

    def __init__(self, function, mod_args, s, b, i, t):
        self.s, self.t, (H, L, S) = s, t, s.mid.shape
        self.values, self.table = (x.astype(np.float64).astype(Real) for x in mod_args[:2])
        self.groups, self.n = mod_args[2:]
        self.head, self.i, self.j = (np.broadcast_to(x, (H, L, S)) for x in np.ix_(np.arange(H), i, np.arange(S)))
        self.b, self.shown = b, np.ones((H, L, S), bool)
        self.one, self.of_values, self.of_table = exact(np.ones((H, L, S))), None, None
        with np.errstate(all="ignore"):
            self.scores, self.slope = getattr(self, function.__name__)()

    def _read(self, array, index):
        """Elements, rounded to the compute type."""
        x = array[index]
        return Ball(x, self.t.u * np.abs(x) + self.t.tiny * (x != 0))

    def _by_head(self):
        return self._read(self.values, self.head)

    def _of_table(self, column):
        index = self.head, np.broadcast_to(column, self.head.shape)
        self.of_table = self.one, index
        return self._read(self.table, index)

    def _bent(self, mid, below, above):
        """A function of the score with a kink at 0 and these slopes on its sides."""
        s, steepest = self.s, max(abs(below), abs(above))
        unsure = (s.size <= s.rad) & (s.mid != 0) | (s.mid == 0) & (s.rad > 0)
        slope = np.where(s.mid > 0, above, below).astype(Real)
        return Ball(mid, steepest * s.rad + self.t.u * np.abs(mid) + self.t.tiny), Ball(slope, unsure * Real(2))

    def slope_of_distance(self):
        distance = exact(np.abs(self.i - self.j))
        self.of_values = Ball(-distance.mid, distance.rad), (self.head,)
        return add(self.s, multiply(self._by_head(), distance, self.t), self.t, -1), self.one

    def temperature(self):
        self.of_values = self.s, (self.head,)
        return multiply(self.s, self._by_head(), self.t), self._by_head()

    def relative(self):
        return add(self.s, self._of_table(np.clip(self.i - self.j + 4, 0, 8)), self.t), self.one

    def hiding(self):
        self.shown = (self.i + self.j + self.b) % 3 != 0
        return add(self.s, self._of_table(self.j % 9), self.t), self.one

    def leaky(self):
        return self._bent(np.where(self.s.mid > 0, self.s.mid, self.s.mid / 4), 0.25, 1)

    def distance_from_zero(self):
        same = self.groups[self.j % 40] == self.groups[np.maximum(self.i, 0) % 40]
        scores, slope = self._bent(np.abs(self.s.mid), -1, 1)
        slope.mid[self.s.mid == 0] = 1
        return (
            Ball(np.where(same, x.mid, y.mid), np.where(same, x.rad, y.rad))
            for x, y in ((scores, self.s), (slope, self.one))
        )

    def capped(self):
        t, eighth = self.t, self.s.mid / 8
        tanh = np.tanh(eighth)
        error = np.minimum(self.s.rad / 8, 2) + 8 * t.u * np.abs(tanh) + t.tiny
        h = Ball(tanh, error)
        self.of_values = h, (self.head,)
        slope = Ball((1 - tanh * tanh) / 8, np.minimum(self.s.rad / 8, 1) / 4 + 8 * t.u + t.tiny)
        return multiply(self._by_head(), h, t), multiply(self._by_head(), slope, t)

    def square(self):
        part = Real(0.5) ** self.n
        half = Ball(part * self.s.mid, part * self.s.rad + self.t.tiny)
        return multiply(half, self.s, self.t), Ball(2 * half.mid, 2 * half.rad + 2 * self.t.u * half.size)

    def quotient(self):
        t, s = self.t, self.s
        below = 1 + s.size
        inverse = 1 / below
        error = np.minimum(s.rad, 1) * inverse**2 / np.maximum(1 - np.minimum(s.rad * inverse, 0.999), 1e-3)
        error = np.where(s.rad * inverse > 0.5, 1, error) + 4 * t.u * inverse + t.tiny
        self.of_values = Ball(inverse, error), (self.head,)
        _, sign = self._bent(s.mid, -1, 1)
        sign.mid[s.mid == 0] = 1
        squared = multiply(self.of_values[0], self.of_values[0], t)
        slope = multiply(multiply(sign, squared, t), self._by_head(), t)
        return multiply(self._by_head(), self.of_values[0], t), Ball(-slope.mid, slope.rad + 4 * t.u * slope.size)
