"""Arguments of calls with Dask arrays: what all entry points share, and checks before a graph is built."""

from __future__ import annotations  # short types in help()

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..backends.cpu_rules import limits_of
from ..device.arrays import on_device
from ..masks.blockmask import BlockMask
from ..mods.compiled import check_bounds
from ..mods.language import MASK, SCORE
from ..mods.rules import describe, find
from ..options import PER_SCORE, OptionArguments, Options, gather
from ..problem.dense import Problem
from ..validation import as_array
from .graph import is_dask

FAN = 8  # parts that one task merges or adds: half as deep as a binary tree, and few parts wait at a time


class Running(NamedTuple):
    """How the tasks of a call run, as the caller passed it: their text stands in the docstring of `dense.attention`."""

    backend: str | None = None
    threads: int | None = None
    split_every: int = FAN
    stream: bool | None = None


class Arguments(OptionArguments, total=False):
    """The options and the fields of `Running` by name, for type checkers."""

    backend: str | None
    threads: int | None
    split_every: int
    stream: bool | None


def gathered(entry: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[Options, Running]:
    """Return the options that an entry point was called with, checked, and how its tasks are to run."""
    running = {name: arguments[name] for name in Running._fields if name in arguments}
    options = {name: x for name, x in arguments.items() if name not in running}
    return checked(gather(entry, options)), Running(**running)


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
        if x is not None and not is_dask(x) and not isinstance(x, BlockMask) and not on_device(x):
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
    """Return arrays without memory for Dask arrays and for arrays on a GPU, and anything else as it is."""
    for name, x in arrays.items():
        if is_dask(x) and any(np.isnan(n) for n in x.shape):
            raise ValueError(f"{name} has chunks of unknown size; call {name}.compute_chunk_sizes() first")
    return {name: empty(x.shape, x.dtype) if is_dask(x) or on_device(x) else x for name, x in arrays.items()}


def headers_of_call(arrays: dict[str, Any], options: Options) -> tuple[dict[str, Any], Options]:
    """Return headers of the arrays of a call, and options with headers of mask and bias."""
    h = headers(arrays | {name: getattr(options, name) for name in PER_SCORE})
    return {name: h[name] for name in arrays}, options._replace(**{name: h[name] for name in PER_SCORE})


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return an array of one element, broadcast to a shape."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def without_arrays(options: Options) -> Options:
    """Return the options without arrays that have names in the graph, and with the digest of a `BlockMask`."""
    mask: Any = options.mask.digest if isinstance(options.mask, BlockMask) else None
    return options._replace(mask=mask, bias=None, mod_args=())
