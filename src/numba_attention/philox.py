"""Philox-4x32-10, the counter-based random number generator of dropout, over words of any kind.

Every weight has 16 random bits that follow from its place alone: no state, no order, and so the same mask in the
forward and the backward pass, for any tiling and number of threads, on the CPU, on a GPU and in NumPy. The key of the
generator is the seed, and its counter is (position of the query, group of keys, query head, sequence).

A group is the eight keys that one thread of a GPU holds of a row of 32 in fragments of ``mma.m16n8``: keys 2 t, 2 t + 1
of each eight, for t < 4. Key j belongs to group ``j // 32 * 4 + j // 2 % 4``, and has the half ``j % 2`` (the low 16
bits first) of word ``j // 8 % 4`` of its result.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
"""

from collections.abc import Callable, Sequence
from typing import Any

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # of the key: the golden ratio and sqrt(3) - 1, times 2**32
ROUNDS = 10
GROUP = 8  # weights with one counter
BLOCK = 32  # keys whose groups alternate: tiles of keys begin at multiples of it

Word = Any


def round_keys(key: tuple[Word, Word], add: Callable[[Word, int], Word]) -> list[tuple[Word, Word]]:
    """The keys of all rounds.

    Parameters
    ----------
    key : two words
        Low and high 32 bits of the seed.
    add : callable
        The sum of a word and a constant, modulo 2**32.
    """
    first, second = INCREMENTS
    return [(add(key[0], n * first % 2**32), add(key[1], n * second % 2**32)) for n in range(ROUNDS)]


def philox(
    counter: Sequence[Word], keys: Sequence[tuple[Word, Word]], multiply: Callable[[Word, int], tuple[Word, Word]]
) -> list[Word]:
    """Four random words of a counter of four.

    Parameters
    ----------
    counter : four words
        Any numbers with the operator ``^``, of which the low 32 bits count.
    keys : pairs of words
        What `round_keys` returns.
    multiply : callable
        The high and the low 32 bits of the product of a word and a constant.
    """
    a, b, c, d = counter
    for first, second in keys:
        (high, low), (other_high, other_low) = multiply(a, MULTIPLIERS[0]), multiply(c, MULTIPLIERS[1])
        a, b, c, d = other_high ^ b ^ first, other_low, high ^ d ^ second, low
    return [a, b, c, d]
