"""Block masks of `mask_mod`: made at the first call of many pairs, and kept for the calls that follow."""

import hashlib
import math
from dataclasses import replace
from typing import Any

import numpy as np

from ..bounded import BoundedCache
from ..masks.blockmask import BlockMask
from ..masks.evaluate import runs_of
from ..masks.runs import TooManyTiles
from ..mods.language import MASK
from ..mods.program import REAL
from ..mods.reads import comparable
from ..mods.rules import describe, find
from ..problem.dense import WHOLE, Problem

FEW_ROWS, FEW_PAIRS = 16, 2**16  # of a sequence, up to which kernels call the mask_mod
ARGUMENTS = 2**24  # largest number of bytes of mod_args that are compared with those of earlier calls

_masks: BoundedCache[tuple[BlockMask | None]] = BoundedCache()


def with_block_mask(p: Problem) -> Problem:
    """Return a problem with a block mask in place of its `mask_mod`, where that is worthwhile.

    Evaluating the pairs once takes as long as a call of the kernel that does it tile by tile, and later calls, as well
    as the backward pass, skip hidden tiles. What is decided depends on the sizes of a sequence and not on the batch,
    so that results have the same bits for a sequence alone; the sequences of a packed problem have different sizes.
    """
    few = p.L <= FEW_ROWS or p.L * p.S < FEW_PAIRS or (p.rows is not None and 4 * len(p.rows) < p.L)
    if p.mask_mod is None or few or p.origin is not WHOLE:
        return p
    if p.blocks is not None or p.packing is not None or p.cache is not None:
        return p
    offset = p.offset
    if not isinstance(offset, int) or sum(x.nbytes for x in p.mod_args if isinstance(x, np.ndarray)) > ARGUMENTS:
        return p
    rule = find(MASK, p.mask_mod, describe(p.mod_args), p.mod_args)
    if p.query.dtype == np.float64 and any(line.kind == REAL for line in rule.program.instructions):
        return p  # masks are evaluated with float32 numbers, kernels here with float64
    used = {line.value for line in rule.program.instructions if line.op == "argument"}
    batch = p.batch if "batch" in used else (1,) * len(p.batch)
    lead = (*batch, p.H if "head" in used else 1)
    key = rule, p.L, p.S, offset, lead, *[_identity(x) for x in p.mod_args]
    known = _masks.get(key)
    if known is None:
        mask = _make(p, lead, offset)
        known = (mask,)
        _masks.add(key, known, 512 if mask is None else mask.nbytes)
    (mask,) = known
    return p if mask is None else replace(p, blocks=mask, mask_mod=None)


def _make(p: Problem, lead: tuple[int, ...], offset: int) -> BlockMask | None:
    """Return the mask, or None if it is no mask by blocks."""
    size, numbers = (p.L, p.S), np.arange(math.prod(lead)).reshape(lead)
    try:
        runs = runs_of(p.mask_mod, p.mod_args, size, math.prod(lead[:-1]), lead[-1], offset)
    except TooManyTiles:
        return None
    return BlockMask.of_runs(numbers, runs, size)


def _identity(x: Any) -> Any:
    """What tells an argument from another."""
    if isinstance(x, np.ndarray):
        return x.dtype, x.shape, hashlib.blake2b(x.data, digest_size=16).digest()
    return comparable(x)
