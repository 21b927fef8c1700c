"""Functions that say all that a mod may say, and arrays that plain Python reads as a mod does."""

import math

import numba
import numpy as np

CAP = 20.0
TABLE = np.linspace(-1, 1, 65).astype(np.float32)
GRID = np.random.default_rng(5).standard_normal((2, 90)).astype(np.float32)
DOCS = np.repeat(np.arange(9), 12).astype(np.int32)
WIDE = DOCS.astype(np.int64) * 2**40
FLAGS = np.random.default_rng(6).random((100, 100)) < 0.5


def helper(x, low=-1.0):
    """A helper with a default, which returns early."""
    if x < low:
        return low
    y = x * 0.5
    return y


@numba.njit
def compiled(x):
    return 1 + abs(x) / 2


def identity(score, batch, head, i, j):
    return score


def alibi(score, batch, head, i, j):
    return score - abs(i - j) * 2.0 ** (-8 * (head + 1) / 2)


def cap(score, batch, head, i, j):
    return CAP * math.tanh(score / CAP)


def relative(score, batch, head, i, j, table):
    return score + table[min(max(i - j + 32, 0), 64)]


def wraps_and_clamps(score, batch, head, i, j, table):
    return score + table[i - j] + table[i * 5]


def of_head(score, batch, head, i, j, grid):
    return score + grid[head, j] * grid[head][i]


def early(score, batch, head, i, j):
    if i < j:
        return score - 1
    if i == j:
        return 2 * score
    score = score + 3
    return score


def nested(score, batch, head, i, j):
    x = 0
    if score > 0:
        if i > 5:
            x = 1.5
        elif j > 3:
            x = -score
        else:
            return score * 3
    return score + x


def loops(score, batch, head, i, j):
    total = 0.0
    for k in range(5):
        if k == i % 3:
            continue
        if k > j:
            break
        total += k * score
    for scale in (0.5, 0.25):
        total -= scale
    return total


def shapes(score, batch, head, i, j, grid):
    total = score
    for k in range(grid.shape[0]):
        total += grid[k, j % len(grid)]
    return total + grid.size


def helpers(score, batch, head, i, j):
    return helper(score) + helper(score, low=-0.5) + compiled(score)


def math_of_all(score, batch, head, i, j):
    x = np.exp(-abs(score)) + math.log(1 + score * score) + np.sqrt(0.5 + abs(score)) + math.exp2(score / 3)
    return x + math.sin(score) - np.cos(score * 2) + np.log2(2 + abs(score)) + np.tanh(score)


def powers(score, batch, head, i, j):
    return (
        score**2
        - 0.1 * score**3
        + abs(score) ** 1.5
        + (1 + abs(score)) ** (0.1 * (i - j))
        + 2**-head
        + (score - 30.0) ** -2
    )


def integers(score, batch, head, i, j):
    return score + (i - j) // 3 - (i - j) % 4 + (i * 7 - 40) // (j + 1) + (j - 60) % (i + 2) + ((i & 5) | (j ^ 3))


def shifts(score, batch, head, i, j):
    return score + (i << 2) - (j >> 1) + ~i + -j


def rounding(score, batch, head, i, j):
    return math.floor(score) + math.ceil(score / 2) + int(score * 3) + round(score) + np.floor(score) - np.trunc(score)


def chosen(score, batch, head, i, j):
    inside = 0 <= i - j < 5 and not (i == 7 or j == 9)
    return np.where(inside, score, -score) + (1 if i > j else 0.5) + (score or 2.0) * (i > 3)


def hides(score, batch, head, i, j, docs):
    return score if docs[i] == docs[j] else float("-inf")


def of_int64(score, batch, head, i, j, docs):
    return score + (docs[i] == docs[j]) + docs[j % 7] / 2**41


def of_flags(score, batch, head, i, j, flags):
    return score if flags[i, j] and not flags[j][i] else -score


def of_numbers(score, batch, head, i, j, scale, steps, on):
    return score * scale + steps * i if on else score


def clipped(score, batch, head, i, j):
    a, b = min(score, 1.0, 2), max(score, -1, -2.0)
    return np.clip(score, -0.5, 0.5) + a * b + np.minimum(score, i) + np.maximum(score, j)


def flex_style(score, batch, head, i, j, docs):
    return np.where((i >= j) & (docs[i] == docs[j]) | (j < 2), score, -np.inf)


def of_batch(score, batch, head, i, j, slopes):
    return score * slopes[batch] - batch


FUNCTIONS = [
    (identity, ()), (alibi, ()), (cap, ()), (relative, (TABLE,)), (wraps_and_clamps, (TABLE,)), (of_head, (GRID,)),
    (early, ()), (nested, ()), (loops, ()), (shapes, (GRID,)), (helpers, ()), (math_of_all, ()), (powers, ()),
    (integers, ()), (shifts, ()), (rounding, ()), (chosen, ()), (hides, (DOCS,)), (of_int64, (WIDE,)),
    (of_flags, (FLAGS,)), (of_numbers, (0.25, 3, True)), (clipped, ()), (flex_style, (DOCS,)),
    (of_batch, (np.array([1.0, 0.5, -2.0]),)), (lambda score, batch, head, i, j: score * 2 - head, ()),
]  # fmt: skip


class Clamped(np.ndarray):
    """An array with the index rules of a mod: negative ones count from the end, others stay within."""

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        bounded = [min(max(k + n if k < 0 else k, 0), n - 1) for k, n in zip(index, self.shape, strict=False)]
        return np.asarray(self)[tuple(bounded)].item() if len(bounded) == self.ndim else super().__getitem__(index)


def plain_arguments(mod_args):
    return tuple(x.view(Clamped) if isinstance(x, np.ndarray) else x for x in mod_args)
