"""Rules of callers for the kernels of the CPU: compiled, and called with the record of their arguments."""

import hashlib
import math
import struct
from typing import Any, NamedTuple

import numpy as np

from ..cpu.cache import Kernel
from ..cpu.mods import BITS_ROWS, make_kernel
from ..cpu.simd import HOST
from ..cpu.spec import Spec
from ..mods.language import MASK, SCORE
from ..mods.program import Bound, Program
from ..mods.rules import Rule, as_arguments, describe, find
from ..options import Array
from ..problem.dense import Problem
from .records import address_of, storage_of

_bits_of = struct.Struct("=d").pack
INT32 = 2**31  # positions are read as int32


class Rules(NamedTuple):
    """The addresses that a kernel finds the rules of a call by, and what must live as long as the call."""

    score: int
    mask: int
    data: int
    kept: tuple[Any, ...]
    gradient: int = 0


def compiled_rules(p: Problem, task: str, few: bool, places: tuple[int, ...] = ()) -> Rules:
    """Compile the rules of a problem, if they are not yet, and write the record of their arguments.

    Parameters
    ----------
    p : Problem
    task : {"score", "slope", "kept"}
        What is wanted of the `score_mod`.
    few : bool
        Whether the kernel is the one for few queries, whose tiles have fewer rows.
    places : tuple of int
        Which of `mod_args` the gradients are wanted of.

    Raises
    ------
    TypeError
        A function says what the language of rules cannot.
    ValueError
        An array is too short for the indices that are read from it.
    """
    arguments = describe(p.mod_args)
    spec = Spec(storage_of(p.query.dtype), HOST, "decode" if few else "forward")
    shape = spec.vector.bits, spec.query_tile
    kernels, gradient = [], 0
    for role, function in ((SCORE, p.score_mod), (MASK, p.mask_mod)):
        if function is None:
            kernels.append(0)
            continue
        rule = find(role, function, arguments, p.mod_args)
        _check_bounds(rule.bounds, p.mod_args, _positions(p), p.S, math.prod(p.batch), p.H)
        own_task = task if role == SCORE else "mask"
        program = rule.program if own_task in ("score", "mask") else rule.with_slope
        kernels.append(kernel_of(rule, own_task, program, *shape).address)
        if places and role == SCORE:
            program = rule.gradients(places)
            gradient = kernel_of(rule, "gradients", program, *shape).address if program.sites else 0
    record = record_of(p.mod_args, places)
    return Rules(kernels[0], kernels[1], address_of(record), (record, p.mod_args), gradient)


def kernel_of(rule: Rule, task: str, program: Program, bits: int, lanes: int) -> Kernel:
    """Return the pass of a rule for tiles of this shape."""
    key = task, bits, lanes, program.sites if task == "gradients" else ()
    kernel: Kernel | None = rule.kernels.get(key)
    if kernel is None:
        digest = hashlib.sha256(f"{program.text}\n{rule.arguments}".encode()).hexdigest()[:32]
        kernel = rule.kernels[key] = make_kernel(task, program, rule.arguments, digest, bits, lanes)
    return kernel


def record_of(values: tuple[Any, ...], places: tuple[int, ...] = ()) -> Array:
    """The record that passes read (`cpu.mods`): numbers, addresses and shapes of arrays, offsets of their sums."""
    words: list[int] = []
    for x in values:
        if isinstance(x, np.ndarray):
            words += [address_of(x), *x.shape]
        else:
            words.append(int.from_bytes(_bits_of(x), "little", signed=True) if isinstance(x, float) else int(x))
    offset = 0
    for place, x in enumerate(values):
        words.append(offset)
        offset += 8 * x.size if place in places else 0
    return np.array(words or [0], np.int64)


def _check_bounds(
    bounds: set[Bound], values: tuple[Any, ...], positions: tuple[int, int], keys: int, batch: int, heads: int
) -> None:
    """Check positions, and the indices that are read as they come, against the shapes of arrays."""
    first, last = positions
    if first < -INT32 or last >= INT32:
        raise ValueError(f"positions must lie within +-2**31 with a score_mod or mask_mod, got {first} to {last}")
    for place, x in enumerate(values):
        if isinstance(x, np.ndarray) and not x.size:
            raise ValueError(f"mod_args[{place}] must not be empty, got shape {x.shape}")
    limits = {"batch": (0, batch), "head": (0, heads), "i": (first, last + 1), "j": (0, keys)}
    for place, axis, name in bounds:
        low, high = limits[name]
        length = values[place].shape[axis]
        if high > length or low < 0:
            raise ValueError(
                f"mod_args[{place}] has {length} elements along axis {axis}, which is read at {name} = {low} .. "
                f"{high - 1}; make it longer, or keep the index within it (min, max, %)"
            )


def _positions(p: Problem) -> tuple[int, int]:
    """The first and the last position of a query."""
    last = max(p.L - 1, 0)
    if isinstance(p.offset, np.ndarray):
        return int(p.offset.min(initial=0)), int(p.offset.max(initial=0)) + last
    return p.offset, p.offset + last


class Bits(NamedTuple):
    """A `mask_mod` as a pass that writes bits, and the record of its arguments, which `kept` keeps.

    ``call_tile(address, data, out, n, j0, batch, head, first, rows, 0, 0, 1.0)`` (`cpu.mods`), from any thread, writes
    n words of 64 bits at `out`: bit r of word j says whether the query at position ``first + r`` sees key ``j0 + j``;
    it is 0 from `rows` on, which are 1 to 64.
    """

    address: int
    data: int
    kept: tuple[Any, ...]


def compiled_bits(
    function: Any, mod_args: Any, shape: tuple[int, int], batch: int = 1, heads: int = 1, offset: int = 0
) -> Bits:
    """Compile the pass that writes the bits of a mask.

    Parameters
    ----------
    function : function
        ``mask_mod(batch, head, i, j, *mod_args)``.
    mod_args : tuple
    shape : (L, S)
        Positions i and keys j are below these.
    batch, heads : int
        Numbers of sequences and heads, for the check of arrays that are read by these.
    offset : int
        The position of query 0.

    Raises
    ------
    TypeError, ValueError
        As `compiled_rules`.
    """
    values = as_arguments(mod_args)
    rule = find(MASK, function, describe(values), values)
    L, S = shape
    _check_bounds(rule.bounds, values, (offset, offset + max(L - 1, 0)), S, batch, heads)
    kernel = kernel_of(rule, "bits", rule.program, 32, BITS_ROWS)
    record = record_of(values)
    return Bits(kernel.address, address_of(record), (record, values))
