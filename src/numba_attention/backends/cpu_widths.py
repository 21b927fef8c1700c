"""How many vectors of queries a tile has, which suits a call: its result has the same bits for all of them."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..cpu.simd import HOST, Host
from ..cpu.spec import usual_vectors
from ..options import Array

# Tiles besides the usual one: numbers of vectors of queries, and what a vector takes relative to one in the usual tile,
# by the bits of a register and the number of registers. The fewer vectors share a broadcast number, the more the loads
# bound the products. With AVX-512 a single vector takes 1.05 on a Zen 4 and 1.2 on a Zen 5; three (in blocks of 8 x 3)
# and five (4 x 5) are as fast as the usual four (4 x 4). Measured with AVX2 and SSE on a Zen 5 too, where the usual
# tile has three vectors and two, and with SSE a single one saves nothing. Those of NEON are counted, for four
# multiply-adds and three loads a cycle.
_SHARES = {
    (512, 32): {1: 1.15, 2: 1.02, 3: 1.0, 5: 1.0},
    (256, 16): {1: 1.1, 2: 1.03},
    (128, 32): {1: 1.5, 2: 1.05},
}
# What a tile takes besides its keys, and what each of its rows does, in the time of a vector with one key: tables,
# calls, and rows that are transposed in and out. Measured with AVX-512 and AVX2 on a Zen 5 for 64 features.
TILE, ROW = 16.0, 0.5
USUAL = 0.96  # the usual tile is taken unless another saves 4 %
PARALLEL = 1e6  # flops for each thread, about 5 us, below which idle threads do not matter


def narrows_of(host: Host) -> dict[int, float]:
    """Return the numbers of vectors in tiles for short sequences, with what a vector takes there."""
    return _SHARES.get((host.bits, host.registers), {})


class _Costs(NamedTuple):
    """Of each choice of `Spec.vectors`, along the first axis."""

    choices: Array
    vectors: Array
    of_key: Array  # what a tile takes for each key
    of_row: Array
    of_tile: Array


def costs_of(host: Host) -> _Costs:
    """Return the choices for a host; 0 is the usual number of vectors."""
    narrows = narrows_of(host)
    vectors = np.array([[usual_vectors(host)], *([n] for n in narrows)])
    shares = np.array([[USUAL], *([x] for x in narrows.values())])
    usual = np.array([[USUAL], *([1] for _ in narrows)])
    return _Costs(np.array([0, *narrows]), vectors, vectors * shares, ROW * usual, TILE * usual)


NARROWS = tuple(narrows_of(HOST))
COSTS = costs_of(HOST)


@lru_cache(maxsize=1024)
def vectors_for(
    rows: int, keys: int, lanes: int, ahead: int | None = None, group: int = 1, heads: int = 1, threads: int = 1
) -> int:
    """Return the number of vectors of a tile for sequences of one size; the arguments are those of `vectors_for_all`.

    `heads` counts the key/value heads of all sequences.
    """
    return vectors_for_all(np.array([rows]), np.array([keys]), lanes, ahead, group, heads, threads)


def vectors_for_all(
    rows: Array, keys: Array, lanes: int, ahead: Array | int | None = None, group: int = 1, heads: int = 1,
    threads: int = 1,
) -> int:  # fmt: skip
    """Return the number of vectors for sequences that one kernel computes: a second kernel would cost 0.1 ms.

    Parameters
    ----------
    rows : ndarray
        Query rows of a key/value head, of each sequence.
    keys : ndarray
        Keys of each sequence.
    lanes : int
        Rows of a vector.
    ahead : ndarray or int, optional
        The last key that the first query sees, where each query sees one more than the one before, so that narrow tiles
        visit fewer keys than wide ones; None if all queries see all keys.
    group : int
        Query heads of a key/value head, whose rows take turns.
    heads : int
        Key/value heads of each sequence.
    threads : int
        Threads that share the tiles.

    Returns
    -------
    int
        Vectors of a tile, 0 for the usual number.
    """
    choices, vectors, of_key, of_row, of_tile = COSTS
    tile = vectors * lanes
    tiles = -(-rows // tile)
    seen = tiles * keys
    if ahead is not None:
        # Of keys that the first query does not see, a tile's last row sees one for each position since.
        beyond, step = keys - ahead, tile / group
        before = np.maximum(np.minimum(beyond // step, tiles - 1), 0)  # tiles before the last that do not see all keys
        hidden = before * (beyond - step / 2 * (before + 1)) + np.maximum(beyond - rows / group, 0)
        seen = np.maximum(seen - hidden, 0)
    rest = of_row * tile + of_tile
    total = (of_key * seen + rest * tiles).sum(axis=1)
    if threads > 1:
        longest = (of_key * keys.max(initial=0) + rest)[:, 0]
        total = np.maximum(total * (heads / threads), longest)
    return int(choices[total.argmin()])
