"""Attention and its gradients by their formulas, on plain arrays and balls; nothing of the package takes part."""

from dataclasses import dataclass

import numpy as np
from balls import PRECISIONS, Ball, Real, add, average, computes_in, exact, matmul, multiply, softmax, total
from rules import Applied

ROUNDED_WEIGHTS = {"bfloat16": 2.0**-7}  # its products take weights and their gradients as bfloat16


@dataclass
class Sequence:
    """One sequence: arrays (H, L, E), (Hkv, S, E), (Hkv, S, Ev), what is visible, and what changes its scores."""

    query: Ball
    key: Ball
    value: Ball
    dtype: str
    visible: np.ndarray  # (H, L, S)
    scale: float
    softcap: float | None = None
    slopes: np.ndarray | None = None  # (H,)
    distance: np.ndarray | None = None  # (L, S)
    bias: np.ndarray | None = None  # (H, L, S)
    sinks: np.ndarray | None = None  # (H,)
    rows: np.ndarray | None = None  # bool (L,): what is there
    rule: tuple | None = None  # the score_mod, its mod_args, the number of the sequence, the positions of the rows
    kept: np.ndarray | float = 1.0  # (H, L, S): the factors of dropout

    def attend(self):
        """Scores pass through scale, softcap, score_mod, ALiBi, bias and mask."""
        t = self.t = computes_in(self.dtype)
        H, group = len(self.query.mid), len(self.query.mid) // len(self.key.mid)
        index = np.arange(H) // group
        self.k, self.v = self.key[index], self.value[index]
        self.raw = s = matmul(self.query, self.k.T, t, self.scale)
        if self.softcap is not None:
            cap = Real(self.softcap)
            mid = cap * np.tanh(s.mid / cap)
            s = Ball(
                mid, np.minimum(s.rad, np.where(np.isinf(s.rad), np.inf, 2 * cap)) + 8 * t.u * np.abs(mid) + t.tiny
            )
        if self.rule is not None:
            function, mod_args, b, i = self.rule
            self.applied = Applied(function, mod_args, s, b, i, t)
            s, self.visible = self.applied.scores, self.visible & self.applied.shown
        if self.slopes is not None:
            slopes = _held(self.slopes, t)[:, None, None]
            s = add(s, multiply(_rounded(slopes, t), exact(self.distance), t), t, -1)
        if self.bias is not None:
            bias = np.clip(self.bias.astype(np.float64), -t.largest, t.largest)
            s = add(s, _rounded(np.where(np.isneginf(self.bias), 0, bias), t), t)
        sink = np.full(s.mid.shape[:2], -np.inf)
        if self.sinks is not None:
            sink[:] = _held(self.sinks, t)[:, None]
        if self.rows is not None:
            sink[:, ~self.rows] = -np.inf
        seen = sink > -np.inf
        sink = Ball(sink.astype(Real), np.where(seen, 2 * t.u * np.abs(np.where(seen, sink, 0)), 0).astype(Real))
        self.weights, self.of_sink, self.lse = softmax(s, self.visible, sink, t)
        self.out = average(self.weights, self.v, t, ROUNDED_WEIGHTS.get(self.dtype, 0.0), self.kept)
        self.scores = s
        self.dropped = self._dropped(self.weights)
        return self

    def _dropped(self, x):
        if np.ndim(self.kept) == 0:
            return x
        with np.errstate(invalid="ignore"):
            rad = (x.rad + 2 * self.t.u * x.size) * self.kept
        return Ball(x.mid * self.kept, np.where(np.isinf(x.rad), np.inf, rad))

    def differentiate(self, grad_out, grad_lse=None):
        """``dS = P (dO V^T - rowsum(dO O) + dlse)``; returns balls of dQ, dK, dV, dbias, dsinks and dmod_args."""
        t, own = self.t, PRECISIONS[self.dtype]
        rounding = ROUNDED_WEIGHTS.get(self.dtype, 0.0)
        with np.errstate(all="ignore"):
            finite = np.where(np.isinf(self.lse.mid), 0, np.abs(self.lse.mid))
            loose = (self.scores.rad + (self.lse.rad + 4 * t.u * (1 + finite))[..., None]) * self.visible
            p = self.weights
            W = np.maximum(p.rad, np.minimum(p.mid * np.expm1(np.minimum(loose, 700)), 1.02 + p.mid))
            p = Ball(p.mid, np.where(np.isnan(W), np.inf, W))
            sink = self.of_sink
            loose = self.lse.rad + 8 * t.u * (1 + finite)
            sink = Ball(sink.mid, np.maximum(sink.rad, np.minimum(sink.mid * np.expm1(np.minimum(loose, 700)), 1)))
        rad = self.out.rad + own.u * self.out.size + own.tiny
        out = Ball(self.out.mid, np.where(self.out.size + rad > own.largest, np.inf, rad))  # it may be infinite
        dP = self._dropped(matmul(grad_out, self.v.T, t))
        D = total(multiply(grad_out, out, t), -1, t)
        if grad_lse is not None:
            D = add(D, grad_lse, t, -1)
        x = add(dP, D[..., None], t, -1)
        x = Ball(x.mid, x.rad + t.u * (dP.size + D.size[..., None]))
        dS = multiply(p, x, t)
        dS = Ball(np.where(self.visible, dS.mid, 0), np.where(self.visible, dS.rad + rounding * dS.size, 0))
        of_bias, of_args = dS, []
        if self.rule is not None:
            of_args = [self._by_element(dS, *x) for x in zip(self._reads(), self.rule[1][:2], strict=True)]
            dS = multiply(dS, self.applied.slope, t)
            dS = Ball(np.where(self.visible, dS.mid, 0), np.where(self.visible, dS.rad, 0))
        if self.softcap is not None:
            h = np.tanh(self.raw.mid / Real(self.softcap))
            slope = Ball(1 - h * h, np.minimum(1, self.raw.rad / Real(self.softcap)) + 8 * t.u)
            dS = multiply(dS, slope, t)
            dS = Ball(np.where(self.visible, dS.mid, 0), np.where(self.visible, dS.rad, 0))
        p = self._dropped(Ball(p.mid, np.where(self.visible, p.rad + rounding * p.size, 0)))
        dQ = matmul(dS, self.k, t, self.scale, first=False)
        dK = matmul(self._by_key_head(dS).T, self._by_key_head(self.query), t, self.scale, first=False)
        dV = matmul(self._by_key_head(p).T, self._by_key_head(grad_out), t)
        of_sink = None
        if self.sinks is not None:
            each = multiply(sink, D, t)
            of_sink = total(Ball(-each.mid, np.where(sink.mid > 0, each.rad, 0)), -1, t)
        return dQ, dK, dV, of_bias, of_sink, of_args

    def _reads(self):
        return self.applied.of_values, self.applied.of_table

    def _by_element(self, dS, read, array):
        """The sum of dS times a derivative over the pairs that read an element of an array."""
        if read is None:
            return exact(np.zeros(array.shape))
        each, index = multiply(dS, read[0], self.t), np.ravel_multi_index(read[1], array.shape)
        mid, rad, size, n = (np.zeros(array.size, Real) for _ in range(4))
        shown = self.visible
        for out, x in ((mid, each.mid), (rad, each.rad), (size, each.size), (n, np.ones(shown.shape, Real))):
            np.add.at(out, index[shown], x[shown])
        rad = np.where(size + rad > self.t.largest, np.inf, rad + n * self.t.u * size)
        return Ball(mid.reshape(array.shape), rad.reshape(array.shape))

    def _by_key_head(self, x):
        """The rows of the query heads that share a key/value head, one after another: their sums are one sum."""
        Hkv = len(self.key.mid)
        return x.reshape(Hkv, len(x.mid) // Hkv * x.mid.shape[1], x.mid.shape[2])


def _held(x, t):
    """Slopes and sinks: numbers beyond ln(2) of the largest count as that."""
    return np.clip(x.astype(np.float64), -0.693 * t.largest, 0.693 * t.largest)


def _rounded(x, t):
    """A number of any precision, as the compute type holds it."""
    x = np.asarray(x).astype(np.float64).astype(Real)
    return Ball(x, t.u * np.abs(x) + t.tiny * (x != 0))


def positions_and_visibility(L, S, offset=0, left=None, right=None, rows=None, columns=None):
    """Which keys a row sees by position, and how far they are: bool and int (L, S)."""
    distance = np.arange(L)[:, None] + offset - np.arange(S)
    visible = np.ones((L, S), bool)
    if left is not None:
        visible &= distance <= left
    if right is not None:
        visible &= -distance <= right
    if rows is not None:
        visible &= np.arange(L)[:, None] < rows
    if columns is not None:
        visible &= np.arange(S) < columns
    return visible, np.abs(distance)


def merge(outs, lses, t):
    """Results over disjoint sets of keys: a softmax over the sets, with their results as values."""
    parts, logs = np.stack([o.mid for o in outs]), np.stack([x.mid for x in lses], -1)
    scores = Ball(np.where(logs == -np.inf, 0, logs), np.zeros(logs.shape, Real))
    sink = Ball(np.full(logs.shape[:-1], -np.inf, Real), np.zeros(logs.shape[:-1], Real))
    weights, _, lse = softmax(scores, logs > -np.inf, sink, t)
    values = exact(np.moveaxis(parts, 0, -2).astype(np.float64))
    out = average(weights[..., None, :], values, t)
    return Ball(out.mid[..., 0, :], out.rad[..., 0, :]), lse, weights


def rotate(x, positions, base, dim, interleaved, dtype):
    """Pairs (a, b) become (a cos - b sin, b cos + a sin)."""
    t = computes_in(dtype)
    frequencies = Real(base) ** (-np.arange(0, dim, 2).astype(Real) / dim)
    angles = np.asarray(positions).astype(Real)[..., None] * frequencies
    first, second = (slice(0, dim, 2), slice(1, dim, 2)) if interleaved else (slice(0, dim // 2), slice(dim // 2, dim))
    x = exact(x).mid
    a, b, mid = x[..., first], x[..., second], x.copy()
    cos, sin = np.cos(angles), np.sin(angles)
    mid[..., first], mid[..., second] = a * cos - b * sin, b * cos + a * sin
    rad = np.zeros(mid.shape, Real)
    # Angles are computed in float64, frequencies as a power whose exponent is rounded.
    slack = 4 * t.u + 2.0**-52 * np.abs(angles) * (2 + np.abs(np.log(frequencies)))
    rad[..., first] = rad[..., second] = slack * (np.abs(a) + np.abs(b)) + 4 * t.tiny
    # The sum of two products may overflow only where it is too large itself.
    return Ball(mid, np.where(np.abs(mid) + rad > t.largest, np.inf, rad))
