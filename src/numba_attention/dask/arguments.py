"""Checks of the arguments of calls with Dask arrays, before a graph is built."""

from typing import Any

import numpy as np

from ..backends.cpu_rules import limits_of
from ..masks.blockmask import BlockMask
from ..mods.compiled import check_bounds
from ..mods.language import MASK, SCORE
from ..mods.rules import describe, find
from ..options import PER_SCORE, Options
from ..problem.dense import Problem
from ..validation import as_array
from .graph import is_dask

FAN = 8  # parts that one task merges or adds: half as deep as a binary tree, and few parts wait at a time


def checked(options: Options) -> Options:
    """Refuse Dask arrays where blocks depend on the numbers, and make arrays of mask and bias."""
    others = {name: x for name, x in options._asdict().items() if name not in PER_SCORE}
    if isinstance(options.mod_args, tuple | list):
        others |= {f"mod_args[{n}]": x for n, x in enumerate(options.mod_args)}
    for name, x in others.items():
        if is_dask(x):
            raise TypeError(f"{name} is needed in every task and must be a NumPy array; pass {name}.compute()")
    for name in PER_SCORE:
        x = getattr(options, name)
        if x is not None and not is_dask(x) and not isinstance(x, BlockMask):
            converted: dict[str, Any] = {name: as_array(name, x)}
            options = options._replace(**converted)
    return options


def check_mods(problem: Problem) -> None:
    """Read the functions of a call now, and check the arrays that they read: no task is needed to find a mistake."""
    arguments = describe(problem.mod_args)
    for role, function in ((SCORE, problem.score_mod), (MASK, problem.mask_mod)):
        if function is not None:
            bounds = find(role, function, arguments, problem.mod_args).bounds
            check_bounds(bounds, problem.mod_args, limits_of(problem))


def headers(arrays: dict[str, Any]) -> dict[str, Any]:
    """Return arrays without memory for Dask arrays, and anything else as it is."""
    for name, x in arrays.items():
        if is_dask(x) and any(np.isnan(n) for n in x.shape):
            raise ValueError(f"{name} has chunks of unknown size; call {name}.compute_chunk_sizes() first")
    return {name: empty(x.shape, x.dtype) if is_dask(x) else x for name, x in arrays.items()}


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return an array of one element, broadcast to a shape."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def without_arrays(options: Options) -> Options:
    """Return the options without arrays that have names in the graph, and with the digest of a `BlockMask`."""
    mask: Any = options.mask.digest if isinstance(options.mask, BlockMask) else None
    return options._replace(mask=mask, bias=None, mod_args=())
