"""Numbers with bounds of their error: midpoints in extended precision, radii of what a backward-stable method may miss.

Every operation adds what rounding in the compute type may do to its result, in the usual model
``fl(x op y) = (x op y)(1 + d) + e`` with ``|d| <= u`` and ``|e| <= tiny`` (Higham, "Accuracy and Stability of Numerical
Algorithms", 2002, chapters 2 and 3). A radius is infinite where the method may overflow: nothing is promised there.
"""

from dataclasses import dataclass, replace

import numpy as np

Real = np.longdouble


@dataclass(frozen=True)
class Precision:
    """A floating-point type: unit roundoff, smallest subnormal and normal number, and the largest."""

    u: float
    tiny: float
    normal: float
    largest: float
    flushes: bool = False  # subnormal numbers count as 0


PRECISIONS = {
    "float64": Precision(2.0**-53, 2.0**-1074, 2.0**-1022, float(np.finfo("f8").max)),
    "float32": Precision(2.0**-24, 2.0**-149, 2.0**-126, float(np.finfo("f4").max)),
    "float16": Precision(2.0**-11, 2.0**-24, 2.0**-14, 65504.0),
    "bfloat16": Precision(2.0**-8, 2.0**-133, 2.0**-126, float.fromhex("0x1.fep127")),
}


def computes_in(dtype):
    """The type in which results of a dtype are computed: half types accumulate in float32.

    The products of bfloat16 that processors have (AVX512_BF16, AMX) take and give 0 for subnormal numbers.
    """
    if dtype == "bfloat16":
        return replace(PRECISIONS["float32"], tiny=2.0**-126, flushes=True)
    return PRECISIONS["float64" if dtype == "float64" else "float32"]


@dataclass
class Ball:
    mid: np.ndarray
    rad: np.ndarray

    @property
    def size(self):
        return np.abs(self.mid)

    @property
    def T(self):
        return Ball(self.mid.swapaxes(-1, -2), self.rad.swapaxes(-1, -2))

    def __getitem__(self, index):
        return Ball(self.mid[index], self.rad[index])

    def reshape(self, *shape):
        return Ball(self.mid.reshape(*shape), self.rad.reshape(*shape))


def exact(x):
    x = np.asarray(x).astype(np.float64).astype(Real)
    return Ball(x, np.zeros(x.shape, Real))


def _ball(mid, rad, size, t):
    """Join midpoint and radius; `size` bounds what was met on the way."""
    rad = np.where(np.isnan(rad) | (size + rad > Real(t.largest)), np.inf, rad)
    return Ball(mid, rad)


def add(a, b, t, sign=1):
    mid = a.mid + sign * b.mid
    return _ball(mid, a.rad + b.rad + t.u * np.abs(mid), np.abs(mid), t)


def multiply(a, b, t):
    mid = a.mid * b.mid
    with np.errstate(invalid="ignore"):
        rad = a.size * b.rad + a.rad * b.size + a.rad * b.rad + t.u * np.abs(mid) + t.tiny
    return _ball(mid, rad, np.abs(mid), t)


def matmul(a, b, t, scale=1.0, first=True):
    """``scale * (a @ b)``, scaled first: then only the scaled sum must not overflow.

    Gradients are scaled at the end, and what they are made of must be below a quarter of the largest number.
    """
    n, factor = a.mid.shape[-1], np.abs(Real(scale))
    size = factor * (a.size @ b.size)
    with np.errstate(invalid="ignore"):
        rad = factor * (a.size @ b.rad + a.rad @ b.size + a.rad @ b.rad) + (n + 4) * t.u * size
    # One of the factors may be subnormal once it is scaled, or products before they are.
    tiny = t.tiny if first and not t.flushes else t.tiny * max(1, factor)
    rad = rad + tiny * (n + a.size.sum(-1)[..., :, None] + b.size.sum(-2)[..., None, :])
    met = size
    if not first:
        most = a.size + a.rad
        met = np.maximum(size, 4 * np.maximum(most @ b.size, most.max(-1, keepdims=True, initial=0)))
    return _ball(Real(scale) * (a.mid @ b.mid), rad, met, t)


def total(a, axis, t, keepdims=False):
    size, n = a.size.sum(axis, keepdims=keepdims), max(1, int(np.prod([a.mid.shape[x] for x in np.atleast_1d(axis)])))
    rad = a.rad.sum(axis, keepdims=keepdims) + n * t.u * size
    return _ball(a.mid.sum(axis, keepdims=keepdims), rad, size, t)


def softmax(scores, visible, sink, t):
    """Weights and the log of their denominator, of scores (..., S) with a last logit `sink` (...) of no value.

    If the scores are known to within D, a weight lies between what it is with its own score lowest and all others
    highest, and the reverse. Where D is large this leaves every weight between 0 and 1, and their sum still 1.
    """
    s = np.concatenate([np.where(visible, scores.mid, -np.inf), sink.mid[..., None]], -1)
    D = np.concatenate([np.where(visible, scores.rad, 0), np.where(sink.mid == -np.inf, 0, sink.rad)[..., None]], -1)
    with np.errstate(all="ignore"):
        highest = s.max(-1, keepdims=True)
        empty = highest == -np.inf
        highest = np.where(empty, 0, highest)
        x = s - highest
        D = D + 8 * t.u * (1 + np.where(x == -np.inf, 0, np.abs(x)))
        unknown = ~np.isfinite(D).all(-1, keepdims=True)
        D = np.where(unknown, 0, D)
        high, low = x + D, x - D
        upper, lower = 1 / (1 + np.exp(_log_of_others(low) - high)), 1 / (1 + np.exp(_log_of_others(high) - low))
        upper, lower = np.where(high > -np.inf, upper, 0), np.where(low > -np.inf, lower, 0)
        e = np.exp(x)
        denominator = e.sum(-1, keepdims=True)
        p = np.where(empty, 0, e / denominator)
        # What lies far below the maximum may be flushed to zero or held at the smallest normal number.
        W = np.maximum(upper - p, p - lower) + (8 + s.shape[-1]) * t.u * p + 8 * t.normal
        W = np.where(unknown, np.inf, np.where(empty, 0, W))
        lse = np.where(empty, -np.inf, highest + np.log(denominator))[..., 0]
        spread = np.maximum(_log_sum(high) - np.log(denominator), np.log(denominator) - _log_sum(low))
        rad = spread[..., 0] + (8 + s.shape[-1]) * t.u * (1 + np.abs(lse))
        rad = np.where(unknown[..., 0], np.inf, np.where(empty[..., 0], 0, rad))
    weights = Ball(np.where(visible, p[..., :-1], 0), np.where(visible, W[..., :-1], 0))
    return weights, Ball(p[..., -1], np.where(sink.mid == -np.inf, 0, W[..., -1])), Ball(lse, rad)


def _log_sum(x):
    """Over the last axis."""
    top = x.max(-1, keepdims=True)
    top = np.where(top == -np.inf, 0, top)
    return top + np.log(np.exp(x - top).sum(-1, keepdims=True))


def _log_of_others(x):
    """The log of the sum of the exponentials of all numbers along the last axis but one, for each."""
    at = x.argmax(-1)[..., None]
    top = np.take_along_axis(x, at, -1)
    top = np.where(top == -np.inf, 0, top)
    e = np.exp(x - top)
    others = top + np.log(np.maximum(e.sum(-1, keepdims=True) - e, 0))
    without = x.copy()
    np.put_along_axis(without, at, -np.inf, -1)  # a difference would lose all that is much less than the largest
    np.put_along_axis(others, at, _log_sum(without), -1)
    return others


def average(weights, values, t, rounding=0.0, factors=1.0):
    """``(weights * factors) @ values``: errors of weights that sum to 1 cancel but for the spread of factors * values.

    Factors are those of dropout.
    """
    factors = np.broadcast_to(np.asarray(factors, Real), weights.mid.shape)
    mid = (weights.mid * factors) @ values.mid
    inside = weights.mid.sum(-1, keepdims=True) > 0
    spread = np.abs(factors[..., None] * values.mid[..., None, :, :] - mid[..., :, None, :])
    n = weights.mid.shape[-1]
    with np.errstate(invalid="ignore"):
        rad = (weights.rad[..., None] * spread).sum(-2) + ((weights.size + weights.rad) * factors) @ values.rad
        rad += ((n + 8) * t.u + rounding) * ((weights.size * factors) @ values.size) + n * t.tiny
        rad += 8 * n * t.normal * factors.max(initial=1) * values.size.sum(-2)[..., None, :]
    return Ball(mid, np.where(inside, np.where(np.isnan(rad), np.inf, rad), 0))


def disagreement(got, ball, dtype, name):
    """Say where a result lies outside its ball, or None. It may also round to its own dtype."""
    own = PRECISIONS[dtype]
    got = np.asarray(got).astype(np.float64).astype(Real)
    if got.shape != ball.mid.shape:
        return f"{name} has shape {got.shape} instead of {ball.mid.shape}"
    with np.errstate(all="ignore"):
        allowed = ball.rad + own.u * (ball.size + ball.rad) + own.tiny
        wrong = ~(np.abs(got - ball.mid) <= allowed)
        beyond = ball.size + allowed >= own.largest  # infinity or the largest number, as one likes
        wrong &= ~(
            beyond & (np.abs(got) >= own.largest) & ((np.sign(got) == np.sign(ball.mid)) | (allowed > ball.size))
        )
        wrong &= ~((got == -np.inf) & (ball.mid == -np.inf))
    wrong &= ~np.isinf(ball.rad)
    if not wrong.any():
        return None
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    return (
        f"{name}{list(at)} is {float(got[at])!r} instead of {float(ball.mid[at])!r} +- {float(allowed[at]):.3g} "
        f"({int(wrong.sum())} of {wrong.size} are wrong)"
    )
