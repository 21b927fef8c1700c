"""Conversion of a `Problem` on a device to the parameters and records of its kernels, and their launches."""

import math
from typing import Any

import numpy as np

from ..caches.contents import Contents
from ..cuda import kernels, tile_shapes
from ..cuda.blocks import HEAD
from ..cuda.formats import HALVES
from ..cuda.parameters import ARRAYS, INTEGERS, MOST, REALS
from ..cuda.softmax import LOG2E
from ..cuda.spec import Mods, Spec
from ..device import runtime
from ..device.constants import upload
from ..device.headers import address_of, has_whole_words
from ..intervals import FAR, keys_of_rows, rows_of_keys
from ..options import Array
from ..problem.dense import Problem
from . import device_masks, device_rules
from .records import fill_in, is_paged, sequences_of, starts_of, storage_of, stored_of

_F32, _F64 = np.dtype(np.float32), np.dtype(np.float64)
HEADS = 65535  # CUDA's limit for the second dimension of a grid


def check_size(p: Problem) -> None:
    if max(p.L, p.S) * max(p.H // max(p.Hkv, 1), 1) > MOST:
        raise ValueError(f"the CUDA backend takes up to {MOST} rows of a key head, got {p.L} queries and {p.S} keys")
    if p.origin.key + p.S > MOST:
        raise ValueError(f"the CUDA backend takes keys up to number {MOST}, got {p.S} from number {p.origin.key} on")
    if p.H > HEADS:
        raise ValueError(f"the CUDA backend takes up to {HEADS} heads, got {p.H}; make some of them a batch axis")


def is_aligned(*arrays: Array) -> bool:
    """Whether rows are whole words of 16 bytes, as asynchronous copies of 16 bytes require."""
    return all(has_whole_words(x, 16) for x in arrays)


def _has_pairs(p: Problem) -> bool:
    """Whether two neighbours of bias and mask can be read at once."""
    arrays = [x for x in (p.bias, p.mask) if x is not None]
    return bool(arrays) and p.packing is None and all(has_whole_words(x, 2 * x.itemsize) for x in arrays)


def _has_tiles(p: Problem) -> bool:
    """Whether the bias can be copied in words of 16 bytes, and read as tiles of a half type."""
    if p.bias is None or p.packing is not None:
        return False
    return storage_of(p.bias.dtype) in HALVES and is_aligned(p.bias)


_AT = {name: n for n, name in enumerate(INTEGERS)}
_STRIDES = {name: [_AT[f"{name}_{axis}"] for axis in ("head", "row", "column")] for name in ARRAYS}


class Work:
    """The launches of one call, and their parameters.

    Parameters
    ----------
    p : Problem
    **more : further arrays, by name, in which the kernels need the offset of each sequence
    """

    def __init__(self, p: Problem, **more: Array | None) -> None:
        check_size(p)
        self.p = p
        self.device, self.stream = runtime.current_device(), runtime.stream()
        self.storage = storage_of(p.query.dtype)
        self.real = _F64 if self.storage == "float64" else _F32
        self.sequences = sequences_of(p, p.bias, **more)
        fill_in(p, self.sequences)
        self.hides = _hides(p, self.sequences)
        self._integers = [0] * len(INTEGERS)
        self._reals = reals(p)
        self._kept: dict[Any, Any] = {}
        self.set(
            heads=p.H, group=p.H // p.Hkv if p.Hkv else 1, E=p.E, Ev=p.Ev, dropout=p.dropout, seed=p.seed,
            left=FAR if p.left is None else p.left, right=FAR if p.right is None else p.right,
            first_key=p.origin.key, first_head=p.origin.head,
        )  # fmt: skip
        arrays = {
            "query": p.query, "key": p.key, "value": p.value, "out": p.out, "lse": p.lse, "bias": p.bias,
            "mask": p.mask, **more,
        }  # fmt: skip
        for name, x in arrays.items():
            if x is not None:
                self.put(name, x)
        for name, x in (("slopes", p.alibi_slopes), ("sinks", p.sinks)):
            if x is not None:
                self.put(name, upload(np.ascontiguousarray(x)))
        self._rules = device_rules.rules_of(p)
        if p.mod_args:
            words, arrays_of_mods = device_rules.record_of(p.mod_args)
            self.put("mods", upload(words))
            self._kept |= {f"mod_args[{n}]": x for n, x in arrays_of_mods.items()}
        if p.cache is not None:
            self._of_cache(p, p.cache)

    def _of_cache(self, p: Problem, cache: Contents) -> None:
        number = np.arange(len(self.sequences))
        for name, scale in (("key_scale", cache.key_scale), ("value_scale", cache.value_scale)):
            if scale is not None:
                self.put(name, scale)
                self.sequences[name] = number * scale.strides[0] if cache.table is None else 0
                self.set(**{f"{name}_page": scale.strides[0]})
        if cache.table is not None:
            # If another thread frees a sequence at the same time, its pages are -1. Clipped, they stay in bounds.
            table = upload(np.clip(cache.table, 0, max(len(p.key) - 1, 0)))
            self.put("pages", table)
            self.sequences["pages"] = address_of(table) + number * cache.table.shape[1] * 8
            self.set(page_size=p.key.shape[-2], key_page=p.key.strides[0], value_page=p.value.strides[0])

    def put(self, name: str, x: Array | None) -> None:
        """Set the address and strides of an array, and keep it until the launches; None sets the address to 0."""
        if x is None:
            self.set(**{name: 0})
            return
        self._kept[name] = x
        if name in _AT:  # page tables are found through the record of each sequence
            self._integers[_AT[name]] = address_of(x) if x.size else 0
        for place, stride in zip(_STRIDES.get(name, ()), x.strides[len(self.p.batch) :], strict=False):
            self._integers[place] = stride

    def set(self, **numbers: int) -> None:
        """Set integer parameters by name."""
        for name, x in numbers.items():
            self._integers[_AT[name]] = int(x)

    def spec(self, task: str, aligned: bool, result: Array | None = None) -> Spec:
        """Return the specification of the kernel for a task, with the options of this call.

        If the kernel writes a `result`, it may have another type than the operands: see `problem.dense.widened`.
        """
        p = self.p
        product = tile_shapes.product_of(self.storage, self.device, max(p.E, p.Ev))
        c = tile_shapes.for_call(
            task, self.storage, p.E, p.Ev, product, self.device,
            p.softcap is not None, p.alibi_slopes is not None, "" if p.bias is None else storage_of(p.bias.dtype),
            p.mask is not None, p.dropout > 0, is_paged(p), self.hides, aligned, stored_of(p),
            device_rules.mods_of(self._rules, task in ("query", "key")), p.blocks is not None, _has_pairs(p),
            _has_tiles(p),
        )  # fmt: skip
        return c if result is None or result.dtype == p.query.dtype else c.with_(to=storage_of(result.dtype))

    def gradients_of_mods(self, places: tuple[int, ...]) -> Mods | None:
        """Return the rules of the kernel of the gradients of these arrays."""
        return device_rules.mods_of(self._rules, False, places)

    def locate(self, name: str, x: Array) -> None:
        """Set address, strides and the offsets of sequences of one more array, before `upload_sequences`."""
        self.put(name, x)
        self.sequences[name] = starts_of(name, x, self.p)

    def empty(self, name: str, shape: Any, dtype: Any) -> Array:
        """Allocate an array on the device, and set its address."""
        array = runtime.empty(shape, dtype, self.stream)
        self.put(name, array)
        return array

    def mark_rows(self, c: Spec, rows: int) -> None:
        """Allocate a flag for each row of a kernel and, before them, a cleared one that says whether any is set.

        Where several slabs share the flag of a row, it is cleared too. Otherwise the kernel writes the flags of all
        rows, and that of an earlier call only lets the NaN-safe kernel look at them.
        """
        cleared = HEAD + rows if c.is_sliced else HEAD
        flags = runtime.empty(rows + HEAD, np.int32, self.stream, cleared=4 * cleared, lasting=not c.is_sliced)
        self.put("flags", flags)

    def upload_sequences(self) -> None:
        self.put("sequences", upload(self.sequences))

    def launch_tiles(self, c: Spec, tiles: int, items: int, heads: int, **numbers: int) -> None:
        """Launch blocks for `items` tiles of all sequences, at most `tiles` of each, for `heads` heads and slabs."""
        together = tile_shapes.heads_together(heads, tiles, tile_shapes.resident(c, self.device))
        self.launch(c, (items << together, heads >> together, c.slabs), tiles=tiles, together=together, **numbers)
        self.set(together=0)

    def launch(self, c: Spec, grid: tuple[int, int, int], **numbers: int) -> None:
        self.set(**numbers)
        if c.lists:
            lists = device_masks.lists_of(self.p, c)
            self._kept["lists", c.task, c.rows] = lists
            self.set(list_heads=lists.heads, **device_masks.addresses_of(lists))
        runtime.launch(kernels.compiled(c), grid, self._integers, self._reals, self.stream)


def _hides(p: Problem, sequences: Array) -> bool:
    """Whether a valid key may be hidden from a row: NaN in that key must then not reach the row."""
    if p.left is not None or p.mask is not None or p.bias is not None:
        return True
    if p.blocks is not None or p.score_mod is not None or p.mask_mod is not None:
        return True
    # Causality alone may hide nothing: in a decoding step the only row sees every key.
    _, stop = keys_of_rows(0, *_span(p, sequences))
    return p.right is not None and bool((stop < sequences["keys"]).any())


def _span(p: Problem, sequences: Array) -> list[Array]:
    """Return the arguments of the rules in `intervals` for each sequence."""
    low = sequences["offset"] - (FAR if p.left is None else p.left)
    high = sequences["offset"] + (FAR if p.right is None else p.right)
    return [low, high, sequences["queries"], sequences["keys"], sequences["prefix"]]


def work_list(p: Problem, sequences: Array, rows: int, of_keys: bool = False, group: int = 1) -> Array | None:
    """Return the list of all tiles of packed sequences, those with most work first; None where no list is needed.

    A position has `group` rows of the tiles.
    """
    if len(sequences) < 2 or p.packing is None:
        return None
    tiles = -(-sequences["key_rows" if of_keys else "rows"] * group // rows)
    index = np.repeat(np.arange(len(sequences)), tiles)
    tile = np.arange(len(index)) - (np.cumsum(tiles) - tiles)[index]
    seen_by = rows_of_keys if of_keys else keys_of_rows
    span = _span(p, sequences[index])
    last = np.minimum(((tile + 1) * rows - 1) // group, sequences["keys" if of_keys else "queries"][index] - 1)
    work = seen_by(np.maximum(last, 0), *span)[1] - seen_by(tile * rows // group, *span)[0]
    order = np.argsort(-work, kind="stable")
    listed: Array = (index[order] << 32) | tile[order]
    return listed.astype(np.int64)


def reals(p: Problem) -> list[float]:
    """Return the real parameters, among them the scale in two parts.

    Queries are multiplied by a power of two of at most 1, so that no product exceeds its score. float16 has too few
    exponents for that, and does not need it, because float32 can represent every product of float16 numbers.
    """
    half = storage_of(p.query.dtype) == "float16"
    size, lowest = abs(p.scale), -1022 if storage_of(p.query.dtype) == "float64" else -126
    exponent = 0 if half else max(min(math.frexp(size)[1] - 1, 0), lowest)
    prescale = math.ldexp(math.copysign(1.0, p.scale), exponent)
    rest = math.ldexp(size, -exponent)
    if rest < 2.0**lowest:
        # The scale is 0 or underflows. Scores are 0 then, and the rest is 1 so that hidden scores stay -inf.
        prescale, rest = 0.0, 1.0
    stages = p.softcap, p.score_mod, p.alibi_slopes, p.bias
    unit = rest if all(stage is None for stage in stages) else 1.0
    values = {"prescale": prescale, "rest": rest, "unit": unit, "per_unit": 1 / unit, "factor": unit * LOG2E}
    values["dropout_scale"] = 2**16 / (2**16 - p.dropout)
    if p.softcap is not None:
        values |= {"cap_inner": rest / p.softcap, "cap_outer": p.softcap}
    return [float(values.get(name, 0.0)) for name in REALS]
