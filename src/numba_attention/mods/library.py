"""Named mods, written as a user would: plain functions of one score and its positions, for `score_mod` and `mask_mod`.

Each says what to pass in `mod_args`. They can be called in mods of your own, and their lines copied.
"""

import math
from typing import Any

Array = Any  # of the numbers that are named
Number = Any


def alibi(score: float, batch: int, head: int, i: int, j: int, slopes: Array) -> Number:
    """ALiBi, as the option `alibi_slopes`: a penalty for distance.

    Parameters
    ----------
    score, batch, head, i, j
        As `score_mod` gets them.
    slopes : array, shape (H,)

    References
    ----------
    .. [1] Press et al., "Train Short, Test Long", 2022, section 3.

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> query = np.random.default_rng(0).standard_normal((2, 9, 4))
    >>> slopes = np.array([0.5, 0.25])
    >>> out = na.attention(query, query, query, score_mod=na.mods.alibi, mod_args=(slopes,))
    >>> bool(np.allclose(out, na.attention(query, query, query, alibi_slopes=slopes)))
    True
    """
    return score - slopes[head] * abs(i - j)


def softcap(score: float, batch: int, head: int, i: int, j: int, cap: float) -> Number:
    """A soft limit of scores, as the option `softcap`.

    Parameters
    ----------
    score, batch, head, i, j
        As `score_mod` gets them.
    cap : float

    References
    ----------
    .. [1] Gemma Team, "Gemma 2", 2024, section 2.
    """
    return cap * math.tanh(score / cap)


def relative_positions(score: float, batch: int, head: int, i: int, j: int, table: Array) -> Number:
    """A learned bias for each head and distance; distances beyond the table have that of its ends.

    Parameters
    ----------
    score, batch, head, i, j
        As `score_mod` gets them.
    table : array, shape (H, 2 * reach + 1)
        ``table[head, reach]`` is that of distance 0, ``table[head, 0]`` that of keys `reach` ahead or more.

    References
    ----------
    .. [1] Shaw et al., "Self-Attention with Relative Position Representations", 2018, section 3.2.

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> rng = np.random.default_rng(0)
    >>> query, table = rng.standard_normal((2, 9, 4)), rng.standard_normal((2, 5))
    >>> options = {"score_mod": na.mods.relative_positions, "mod_args": (table,)}
    >>> out, lse = na.attention(query, query, query, **options, return_lse=True)
    >>> grads = na.attention_backward(out, query, query, query, out, lse, **options, mod_grads="all")
    >>> grads.mod_args[0].shape
    (2, 5)
    """
    reach = table.shape[1] // 2
    return score + table[head, min(max(i - j + reach, 0), 2 * reach)]


def _t5_bucket(distance: int, buckets: int, farthest: int) -> int:
    """Half of the buckets are one distance each; the others are logarithmic, up to the farthest."""
    exact = buckets // 2
    if distance < exact:
        return distance
    rest = math.log(max(distance, 1) / exact) / math.log(farthest / exact) * (buckets - exact)
    return min(exact + int(rest), buckets - 1)


def t5_bias(score: float, batch: int, head: int, i: int, j: int, table: Array, farthest: int = 128) -> Number:
    """The relative position bias of T5's encoder: logarithmic buckets of distances, those ahead and those behind.

    Parameters
    ----------
    score, batch, head, i, j
        As `score_mod` gets them.
    table : array, shape (H, buckets)
        The transpose of T5's ``relative_attention_bias.weight``.
    farthest : int, default 128
        Distances from here on share the last bucket (T5's ``relative_attention_max_distance``).

    References
    ----------
    .. [1] Raffel et al., "Exploring the Limits of Transfer Learning", 2020, section 2.1.
    """
    half = table.shape[1] // 2
    bucket = _t5_bucket(abs(i - j), half, farthest)
    return score + table[head, bucket + half if j > i else bucket]


def t5_bias_causal(score: float, batch: int, head: int, i: int, j: int, table: Array, farthest: int = 128) -> Number:
    """The relative position bias of T5's decoder: all buckets are for keys behind, and those ahead count as distance 0.

    Parameters
    ----------
    score, batch, head, i, j
        As `score_mod` gets them.
    table : array, shape (H, buckets)
    farthest : int, default 128

    References
    ----------
    .. [1] Raffel et al., "Exploring the Limits of Transfer Learning", 2020, section 2.1.
    """
    return score + table[head, _t5_bucket(max(i - j, 0), table.shape[1], farthest)]


def causal(batch: int, head: int, i: int, j: int) -> Number:
    """Keys up to the query's own position, as the option `is_causal`, which also skips what it hides."""
    return j <= i


def documents(batch: int, head: int, i: int, j: int, document: Array) -> Number:
    """Keys of the query's own document, where several are packed in one sequence.

    Parameters
    ----------
    batch, head, i, j
        As `mask_mod` gets them.
    document : array of int, shape (S,)
        The number of the document at each position.

    References
    ----------
    .. [1] Krell et al., "Efficient Sequence Packing without Cross-contamination", 2021, section 3.

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> x = np.random.default_rng(0).standard_normal((9, 4))
    >>> numbers = np.repeat([0, 1], [4, 5])
    >>> out = na.attention(x, x, x, mask_mod=na.mods.documents, mod_args=(numbers,))
    >>> bool(np.allclose(out[:4], na.attention(x[:4], x[:4], x[:4])))
    True
    """
    return document[i] == document[j]


def prefix_lm(batch: int, head: int, i: int, j: int, prefix: Array) -> Number:
    """All of a prefix, and beyond it what is not ahead, as the option `prefix_lengths` with `is_causal`.

    Parameters
    ----------
    batch, head, i, j
        As `mask_mod` gets them.
    prefix : array of int, shape (batch,)
        The length of the prefix of each sequence.

    References
    ----------
    .. [1] Raffel et al., "Exploring the Limits of Transfer Learning", 2020, section 3.2.1.
    """
    return j <= i or j < prefix[batch]


def sliding_window(batch: int, head: int, i: int, j: int, left: int, right: int) -> Number:
    """Keys from `left` behind to `right` ahead, as the option `window`, which also skips what it hides.

    Parameters
    ----------
    batch, head, i, j
        As `mask_mod` gets them.
    left, right : int

    References
    ----------
    .. [1] Beltagy et al., "Longformer", 2020, section 3.1.
    """
    return -right <= i - j <= left


def dilated_window(batch: int, head: int, i: int, j: int, left: int, right: int, step: int) -> Number:
    """A sliding window with gaps: every `step`-th key, counted from the query.

    Parameters
    ----------
    batch, head, i, j
        As `mask_mod` gets them.
    left, right : int
        Reach in positions.
    step : int

    References
    ----------
    .. [1] Beltagy et al., "Longformer", 2020, section 3.1.
    """
    return -right <= i - j <= left and (i - j) % step == 0


def neighborhood(batch: int, head: int, i: int, j: int, height: int, width: int, size: int) -> Number:
    """Neighborhood attention on an image whose pixels are numbered row by row: the nearest `size` x `size` pixels.

    At the borders the square is moved inside, so that every pixel sees equally many.

    Parameters
    ----------
    batch, head, i, j
        As `mask_mod` gets them.
    height, width : int
        Of the image, in tokens.
    size : int
        Odd, and at most `height` and `width`.

    References
    ----------
    .. [1] Hassani et al., "Neighborhood Attention Transformer", 2023, section 3.1.
    """
    top = min(max(i // width - size // 2, 0), height - size)
    left = min(max(i % width - size // 2, 0), width - size)
    return 0 <= j // width - top < size and 0 <= j % width - left < size


def shifted_windows(batch: int, head: int, i: int, j: int, width: int, size: int, shift: int) -> Number:
    """Swin's windows on an image whose pixels are numbered row by row; without a shift, and shifted by `shift`.

    Windows that the shift cuts at the border are parts of their own, as with Swin's cyclic shift and its mask.

    Parameters
    ----------
    batch, head, i, j
        As `mask_mod` gets them.
    width : int
        Of the image, in tokens.
    size : int
        Rows and columns of a window.
    shift : int
        0, or half of `size` in every second layer.

    References
    ----------
    .. [1] Liu et al., "Swin Transformer", 2021, section 3.2.
    """
    same_rows = (i // width - shift) // size == (j // width - shift) // size
    return same_rows and (i % width - shift) // size == (j % width - shift) // size


def tree(batch: int, head: int, i: int, j: int, parents: Array, first: int, depth: int) -> Number:
    """A tree of guessed tokens after a common text: each sees the text, its ancestors and itself.

    Parameters
    ----------
    batch, head, i, j
        As `mask_mod` gets them.
    parents : array of int, shape (guesses,)
        The number of the parent of each guess, and of a root its own.
    first : int
        The position of guess 0: the length of the text.
    depth : int
        Tokens on the longest path from a root to a leaf.

    References
    ----------
    .. [1] Miao et al., "SpecInfer", 2024, section 4.2.
    """
    node, sees = i - first, j < first
    for _ in range(depth):
        sees = sees or node == j - first
        node = parents[max(node, 0)]
    return sees
