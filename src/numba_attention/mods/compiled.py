"""Rules as passes of the CPU: compiled, with the record of their arguments, whose bounds are checked first."""

import hashlib
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..cpu.cache import Kernel
from ..cpu.mods import BITS_ROWS, make_kernel
from .language import MASK
from .program import Bound, Program
from .rules import Rule, as_arguments, describe, find
from .values import Argument

Array = np.ndarray[Any, Any]
_bits_of = struct.Struct("=d").pack
INT32 = 2**31  # positions are read as int32


def kernel_of(rule: Rule, task: str, program: Program, bits: int, lanes: int) -> Kernel:
    """Return the pass of a rule for tiles of this shape."""
    key = task, bits, lanes, program.sites if task == "gradients" else ()
    kernel: Kernel | None = rule.kernels.get(key)
    if kernel is None:
        kernel = rule.kernels[key] = pass_of(task, program, rule.arguments, bits, lanes)
    return kernel


def pass_of(task: str, program: Program, arguments: tuple[Argument, ...], bits: int, lanes: int) -> Kernel:
    """Return the pass of a program, whose name has the program's digest."""
    digest = hashlib.sha256(f"{program.text}\n{arguments}".encode()).hexdigest()[:32]
    return make_kernel(task, program, arguments, digest, bits, lanes)


def record_of(values: tuple[Any, ...], places: tuple[int, ...] = ()) -> Array:
    """The record that passes read (`cpu.mods`): numbers, addresses and shapes of arrays, offsets of their sums."""
    words = words_of(values, lambda _, x: _address_of(x))
    offset = 0
    for place, x in enumerate(values):
        words.append(offset)
        offset += 8 * x.size if place in places else 0
    return np.array(words or [0], np.int64)


def words_of(values: tuple[Any, ...], address: Callable[[int, Array], int]) -> list[int]:
    """The words of arguments: the bits of a number, or the `address` of the array at a place, and its shape."""
    words: list[int] = []
    for place, x in enumerate(values):
        if isinstance(x, np.ndarray):
            words += [address(place, x), *x.shape]
        else:
            words.append(int.from_bytes(_bits_of(x), "little", signed=True) if isinstance(x, float) else int(x))
    return words


def _address_of(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def check_bounds(bounds: set[Bound], values: tuple[Any, ...], limits: dict[str, tuple[int, int]]) -> None:
    """Check positions, and the indices that are read as they come, against the shapes of arrays.

    `limits` are the first number and the one after the last of "batch", "head", "i" and "j".
    """
    first, last = limits["i"][0], limits["i"][1] - 1
    if first < -INT32 or last >= INT32:
        raise ValueError(f"positions must lie within +-2**31 with a score_mod or mask_mod, got {first} to {last}")
    for place, x in enumerate(values):
        if isinstance(x, np.ndarray) and not x.size:
            raise ValueError(f"mod_args[{place}] must not be empty, got shape {x.shape}")
    for place, axis, name in bounds:
        low, high = limits[name]
        length = values[place].shape[axis]
        if high > length or low < 0:
            raise ValueError(
                f"mod_args[{place}] has {length} elements along axis {axis}, which is read at {name} = {low} .. "
                f"{high - 1}; make it longer, or keep the index within it (min, max, %)"
            )


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
    positions = offset, offset + max(L, 1)
    check_bounds(rule.bounds, values, {"batch": (0, batch), "head": (0, heads), "i": positions, "j": (0, S)})
    kernel = kernel_of(rule, "bits", rule.program, 32, BITS_ROWS)
    record = record_of(values)
    return Bits(kernel.address, _address_of(record), (record, values))
