"""Conversion of a `Problem` to the records that kernels read."""

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..cpu.params import INTEGERS, REALS, pack_rest
from ..cpu.scoring import bias_elements
from ..cpu.simd import HOST
from ..cpu.spec import Spec
from ..intervals import FAR
from ..masks.lists import Geometry, Lists, lists_for
from ..narrowing import saturated
from ..options import Array
from ..problem.dense import NUMBERS, Packing, Problem
from ..sequence_record import SEQUENCE
from ..validation import is_bfloat16


@cache
def storage_of(dtype: np.dtype[Any]) -> str:
    return "bfloat16" if is_bfloat16(dtype) else dtype.name


_ZERO = np.zeros(1, np.int64)


def address_of(array: Array | None) -> int:
    if array is None:
        return 0
    if array.dtype.names:  # NumPy would describe a record array field by field, in 40 us
        array = array.view(np.int64)
    return int(array.__array_interface__["data"][0])


def offsets_of(array: Array, batch: tuple[int, ...]) -> Array:
    """Return the byte offset of each sequence of the batch, flattened."""
    if math.prod(batch) == 1:
        return _ZERO
    total: Array = np.zeros((1,) * len(batch), np.int64)
    for axis, (n, stride) in enumerate(zip(batch, array.strides, strict=False)):
        total = total + np.arange(n).reshape((-1,) + (1,) * (len(batch) - 1 - axis)) * stride
    return total.ravel()


def stored(array: Array) -> Array:
    """Return the part of a broadcast array that is in memory: one element of every axis with stride 0."""
    return array[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides)]


def compact(array: Array, dtype: Any) -> Array:
    """Convert the dtype of a broadcast array without expanding the array."""
    return np.broadcast_to(stored(array).astype(dtype), array.shape)


def room_for(array: Array, dtype: Any) -> Array:
    """Allocate a result in another dtype, broadcast as `array` is."""
    return np.broadcast_to(np.empty_like(stored(array), dtype), array.shape)


def readable_bias(p: Problem) -> Array | None:
    """Return the bias in a dtype that the kernel reads, without expanding it; finite numbers stay finite."""
    if p.bias is None:
        return None
    names = bias_elements(Spec(storage_of(p.query.dtype), HOST))
    if storage_of(p.bias.dtype) in names:
        return p.bias
    return np.broadcast_to(saturated(stored(p.bias), names[0]), p.bias.shape)


def sequences_of(p: Problem, bias: Array | None, **more: Array | None) -> Array:
    """Return the record of each sequence, without what `fill_in` adds.

    `more` are further arrays in which the kernel needs the offset of each sequence.
    """
    sequences = np.zeros(math.prod(p.batch), SEQUENCE)
    arrays = {"query": p.query, "key": p.key, "value": p.value, "out": p.out, "lse": p.lse, "bias": bias}
    if is_paged(p):
        del arrays["key"], arrays["value"]  # pages have no offset of a sequence
    for name, array in {**arrays, "mask": p.mask, **more}.items():
        if array is not None:
            sequences[name] = starts_of(name, array, p)
    for number in NUMBERS:
        x = getattr(p, number.problem)
        default = getattr(p, number.default) if isinstance(number.default, str) else number.default
        sequences[number.record] = x if isinstance(x, int) else default
    sequences["batch"] = np.arange(len(sequences))
    sequences["number"] = p.origin.numbers(len(sequences))
    sequences["rows"], sequences["key_rows"] = p.L, p.S
    if p.packing is not None:
        sequences["rows"], sequences["key_rows"] = p.packing.query_rows, p.packing.key_rows
    return sequences


def lists_of(p: Problem, spec: Spec, few: bool = False, which: Array | None = None) -> Lists | None:
    """Return the lists of visible tiles that the kernels of a block mask read, of all sequences or of some."""
    if p.blocks is None:
        return None
    geometry = Geometry(spec.query_tile, spec.vector.width)
    rows: Array | int = p.L if p.packing is None else p.packing.query_rows
    if which is not None:
        rows = np.where(np.isin(np.arange(math.prod(p.batch)), which), rows, 0)
    chosen = None if p.heads is None or p.rows is None else (p.heads, p.rows)
    return lists_for(p.blocks, p.batch, p.H, p.Hkv, geometry, rows, chosen, few)


def starts_of(name: str, array: Array, p: Problem) -> Array:
    """Return the byte offset of each sequence in an array; the name says which sequences its rows belong to."""
    offsets = offsets_of(array, p.batch)
    return offsets if p.packing is None else offsets + _start_of(name, array, p.packing)


def _start_of(name: str, array: Array, packing: Packing) -> Array:
    """Return the byte offset of the first row of each sequence in a packed array."""
    if name in ("mask", "bias", "grad_bias"):
        in_rows, in_columns = packing.mask if name == "mask" else packing.bias
        row, column = (
            stride if packed else 0 for stride, packed in zip(array.strides[-2:], (in_rows, in_columns), strict=True)
        )
        offsets: Array = packing.query_starts * row + packing.key_starts * column
        return offsets
    starts = packing.key_starts if name in ("key", "value", "grad_key", "grad_value") else packing.query_starts
    offsets = starts * array.strides[2]  # the axes are sequence, head, row
    return offsets


def is_paged(p: Problem) -> bool:
    return p.cache is not None and p.cache.table is not None


def varies(p: Problem) -> bool:
    """Whether the records of the sequences contain more than follows from shapes and strides."""
    return p.cache is not None or any(isinstance(getattr(p, number.problem), np.ndarray) for number in NUMBERS)


def numbers_of(p: Problem) -> tuple[Any, ...]:
    """Return all numbers of the sequences of a packed problem, to be compared."""
    packing = p.packing
    assert packing is not None
    arrays = [packing.query_rows, packing.key_rows, *(getattr(p, number.problem) for number in NUMBERS)]
    return tuple(x.tobytes() if isinstance(x, np.ndarray) else x for x in arrays)


def fill_in(p: Problem, sequences: Array) -> None:
    """Write the fields that do not follow from shapes and strides: lengths, positions, addresses of pages, scales."""
    for number in NUMBERS:
        x = getattr(p, number.problem)
        if isinstance(x, np.ndarray):
            sequences[number.record] = x.ravel()
    if p.cache is None:
        return
    table = p.cache.table
    if table is not None:
        sequences["pages"] = address_of(table) + np.arange(len(sequences)) * table.strides[0]
    for name, scale in (("key_scale", p.cache.key_scale), ("value_scale", p.cache.value_scale)):
        if scale is not None:
            sequences[name] = address_of(scale)
            if table is None:
                sequences[name] += np.arange(len(sequences)) * scale.strides[0]


class Scaling(NamedTuple):
    """The scale of scores in two factors, prescale * rest, so that no intermediate overflows unless the result does."""

    prescale: float  # multiplies queries: plus or minus a power of two of at most 1, or 0
    rest: float  # multiplies scores: positive, and at least 1 unless tiny
    tiny: bool  # whether scores are multiplied by the rest in a pass of its own, and gradients are scaled in two steps
    of_gradients: float  # the first factor of gradients


TINY = -16  # exponent of a scale below which its rest is multiplied in a pass of its own, which costs time
LOWEST = -140  # least exponent of the prescale: with it, products of the largest float32 numbers stay finite, also when
# 2**12 of them are summed
ZERO = -300  # exponent of a scale below which every float32 score is 0


def scaling_of(scale: float, bits: int) -> Scaling:
    """Split a scale into two factors, for a compute type of `bits` bits.

    Queries are multiplied by a power of two, exactly, and never grow: a scale above 1 is left to the scores. The rest
    is never 0, because a hidden score of -inf would become NaN.
    """
    size, exponent = math.frexp(abs(scale))
    size, exponent = 2 * size, exponent - 1
    single = bits == 32
    if size == 0 or (single and exponent < ZERO):
        return Scaling(0.0, 1.0, True, 0.0)
    tiny = single and exponent < TINY
    power = max(min(exponent, 0), LOWEST if single else -1074)
    sign = math.copysign(1.0, scale)
    # Neither the first factor makes gradients of scores subnormal, nor the second factor the results.
    first = math.ldexp(sign, max(exponent, min(exponent // 2, -70))) if tiny else 1.0
    return Scaling(math.ldexp(sign, power), math.ldexp(size, exponent - power), tiny, first)


def values_of(p: Problem, spec: Spec, bias: Array | None) -> dict[str, float]:
    """Return the parameters that every kernel has, by name."""
    scaling = scaling_of(p.scale, spec.vector.bits)
    stages = p.softcap, p.score_mod, p.alibi_slopes, bias, p.mask, p.mask_mod
    staged = scaling.tiny or any(stage is not None for stage in stages)
    values: dict[str, float] = {
        "heads": p.H,
        "group": p.H // p.Hkv if p.Hkv else 0,
        "kv_heads": p.Hkv,
        "E": p.E,
        "left": FAR if p.left is None else p.left,
        "right": FAR if p.right is None else p.right,
        "bias_kind": 0 if bias is None else 1 + bias_elements(spec).index(storage_of(bias.dtype)),
        "staged": staged,
        "tiny": scaling.tiny,
        "dropout": p.dropout,
        "first_key": p.origin.key,
        "first_head": p.origin.head,
        "dropout_scale": 2**16 / (2**16 - p.dropout),
        "prescale": scaling.prescale,
        "rest": scaling.rest,
        "unit": 1 if staged else scaling.rest,
        "gradient_prescale": scaling.of_gradients,
        "gradient_scale": p.scale / scaling.of_gradients if scaling.of_gradients else 0,
    }
    if p.softcap is not None:
        values |= {"cap_inner": (1 if scaling.tiny else scaling.rest) / p.softcap, "cap_outer": p.softcap}
    arrays = {"query": p.query, "key": p.key, "value": p.value, "out": p.out, "lse": p.lse, "bias": bias}
    for name, array in {**arrays, "mask": p.mask}.items():
        values |= strides_of(name, array, len(p.batch))
    if p.cache is not None:
        values |= strides_of("key_scale", p.cache.key_scale, 1) | strides_of("value_scale", p.cache.value_scale, 1)
        if p.cache.table is not None:
            values |= {"page_size": p.key.shape[-2], "key_page": p.key.strides[0], "value_page": p.value.strides[0]}
            if p.cache.key_scale is not None and p.cache.value_scale is not None:
                values["key_scale_page"] = p.cache.key_scale.strides[0]
                values["value_scale_page"] = p.cache.value_scale.strides[0]
    return values


def stored_of(p: Problem) -> str:
    """Return how keys and values are stored if they are stored differently from queries, else an empty string."""
    if p.cache is None:
        return ""
    storage = storage_of(p.query.dtype)
    return "" if p.cache.storage == storage else p.cache.storage


def strides_of(name: str, array: Array | None, batch: int) -> dict[str, float]:
    """Return the strides of the axes after the batch, by the names of their parameters."""
    if array is None:
        return {}
    return {f"{name}_{axis}": n for axis, n in zip(("head", "row", "column"), array.strides[batch:], strict=False)}


def pack(values: dict[str, float], offsets: dict[str, int]) -> bytes:
    """Return the part of the PARAMS record that follows the addresses."""
    values = values | {f"at_{name}": offset for name, offset in offsets.items()}
    return pack_rest(*(values.pop(name, 0) for name in INTEGERS), *(float(values.pop(name, 0)) for name in REALS))


def per_head(p: Problem, chosen: Array, sequences: Array, bias: Array | None) -> Array:
    """Make a record for every chosen head of every sequence, so that heads may be any index array."""
    heads = np.tile(chosen, len(sequences))
    each: Array = np.repeat(sequences, len(chosen))
    each["head"], each["lists"] = heads, np.arange(len(heads))
    each["query"] += heads * p.query.strides[-3]
    each["key"] += heads // (p.H // p.Hkv) * p.key.strides[-3]
    each["out"] += np.tile(np.arange(len(chosen)), len(sequences)) * p.out.strides[-3]
    if bias is not None:
        each["bias"] += heads * bias.strides[-3]
    if p.mask is not None:
        each["mask"] += heads * p.mask.strides[-3]
    return each
