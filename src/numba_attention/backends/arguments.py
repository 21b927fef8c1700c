"""From a `Problem` on a device to the parameters and records of its kernels."""

import math
from functools import lru_cache
from typing import Any

import numpy as np

from ..cuda import configs, kernels, runtime
from ..cuda.config import Config
from ..cuda.headers import address_of
from ..cuda.parameters import ARRAYS, FAR, INTEGERS, MOST, REALS
from ..cuda.softmax import LN2, LOG2E
from ..options import Array
from ..problem import Problem
from .records import fill_in, is_paged, sequences_of, storage_of


def check_size(p: Problem) -> None:
    if max(p.L, p.S) * max(p.H // max(p.Hkv, 1), 1) > MOST:
        raise ValueError(f"the CUDA backend takes up to {MOST} rows of a key head, got {p.L} queries and {p.S} keys")


def is_aligned(*arrays: Array) -> bool:
    """Whether rows begin at multiples of 16 bytes and have no gaps, so that they can be copied in pieces of 16."""
    for x in arrays:
        size = x.itemsize
        if x.strides[-1] != size or x.shape[-1] * size % 16 or address_of(x) % 16:
            return False
        if any(stride % 16 for stride in x.strides[:-1]):
            return False
    return True


class Work:
    """The launches of one call, and what lives on the device until they are made.

    Parameters
    ----------
    p : Problem
    more : arrays whose sequences the kernels want the offsets of, by name
    """

    def __init__(self, p: Problem, **more: Array | None) -> None:
        check_size(p)
        self.p = p
        self.device, self.stream = runtime.current_device(), runtime.stream()
        self.storage = storage_of(p.query.dtype)
        self.real = np.dtype(np.float64 if self.storage == "float64" else np.float32)
        self.sequences = sequences_of(p, p.bias, **more)
        fill_in(p, self.sequences)
        self.arrays: dict[str, Array | None] = {
            "query": p.query, "key": p.key, "value": p.value, "out": p.out, "lse": p.lse, "bias": p.bias,
            "mask": p.mask, **more,
        }  # fmt: skip
        self._kept: list[Array] = []
        for name, x in (("slopes", p.alibi_slopes), ("sinks", p.sinks)):
            if x is not None:
                self.arrays[name] = upload(np.ascontiguousarray(x))
        if is_paged(p) and p.cache is not None and p.cache.table is not None:
            table = upload(np.ascontiguousarray(p.cache.table))
            self._kept.append(table)
            self.sequences["pages"] = address_of(table) + np.arange(len(self.sequences)) * p.cache.table.shape[1] * 8
        self.hides = _hides(p, self.sequences)

    def config(self, task: str, aligned: bool) -> Config:
        """The kernel for a task, with the options of this call."""
        p = self.p
        c = configs.base(task, self.storage, p.E, p.Ev, self.device)
        return configs.with_options(
            c, softcap=p.softcap is not None, alibi=p.alibi_slopes is not None, mask=p.mask is not None,
            paged=is_paged(p), bias="" if p.bias is None else storage_of(p.bias.dtype), flags=self.hides,
            aligned=aligned and self.device.compute_capability >= (8, 0),
        )  # fmt: skip

    def empty(self, shape: Any, dtype: Any) -> Array:
        return runtime.empty(shape, dtype, self.stream)

    def upload_sequences(self) -> None:
        self.arrays["sequences"] = upload(self.sequences.view(np.int64))

    def launch(self, c: Config, grid: tuple[int, int, int], **more: int) -> None:
        integers, reals = numbers(self.p, c, self.arrays, **more)
        runtime.launch(kernels.compiled(c), grid, integers, reals, self.stream)


@lru_cache(maxsize=256)
def _uploaded(data: bytes, driver: runtime.Driver, device: int, stream: int) -> Array:
    """A copy on the device of what seldom changes; kept for a stream, on which it is freed too."""
    return runtime.upload(np.frombuffer(data, np.int64), stream)


def upload(array: Array) -> Array:
    """A copy of a few numbers on the device."""
    data = array.tobytes()
    return _uploaded(data, runtime.driver, runtime.current_device().ordinal, runtime.stream())


def _hides(p: Problem, sequences: Array) -> bool:
    """Whether some row may not see some valid key: a NaN there must not reach it."""
    if p.left is not None or p.mask is not None or p.bias is not None:
        return True
    # (A step of decoding is causal, and sees everything.)
    return p.right is not None and bool((sequences["offset"] + p.right < sequences["keys"] - 1).any())


def work_list(p: Problem, sequences: Array, rows: int, of_keys: bool = False) -> Array | None:
    """Tiles of sequences that differ in length, those with most work first; None where a count will do."""
    if len(sequences) < 2 or p.packing is None:
        return None
    tiles = -(-sequences["key_rows" if of_keys else "rows"] // rows)
    index = np.repeat(np.arange(len(sequences)), tiles)
    tile = np.arange(len(index)) - (np.cumsum(tiles) - tiles)[index]
    if of_keys:
        work = sequences["queries"][index]
        if p.right is not None:
            work = work - np.maximum(tile * rows - sequences["offset"][index] - p.right, 0)
    else:
        work = sequences["keys"][index]
        if p.right is not None:
            work = np.minimum(work, (tile + 1) * rows + sequences["offset"][index] + p.right)
    order = np.argsort(-work, kind="stable")
    made: Array = (index[order] << 32) | tile[order]
    return made.astype(np.int64)


def numbers(p: Problem, c: Config, arrays: dict[str, Array | None], **more: int) -> tuple[list[int], list[float]]:
    """The parameters of a kernel, in its order."""
    values: dict[str, int] = {
        "heads": p.H,
        "group": p.H // p.Hkv if p.Hkv else 1,
        "E": p.E,
        "Ev": p.Ev,
        "left": FAR * 4 if p.left is None else p.left,
        "right": FAR * 4 if p.right is None else p.right,
        **more,
    }
    for name, array in arrays.items():
        if array is None:
            continue
        values[name] = address_of(array) if array.size else 0
        if name in ARRAYS:
            for axis, stride in zip(("head", "row", "column"), array.strides[len(p.batch) :], strict=False):
                values[f"{name}_{axis}"] = stride
    if c.paged:
        values |= {"page_size": p.key.shape[-2], "key_page": p.key.strides[0], "value_page": p.value.strides[0]}
    real = reals(p)
    return [int(values.get(name, 0)) for name in INTEGERS], [real.get(name, 0.0) for name in REALS]


def reals(p: Problem) -> dict[str, float]:
    """What the scores are multiplied by: a power of two goes to the queries, before anything can overflow."""
    scale = p.scale * LOG2E
    factor, exponent = math.frexp(abs(scale))
    if storage_of(p.query.dtype) == "float16":  # which has no room for it, and needs none: float32 holds every product
        factor, exponent = abs(scale), 0
    prescale = math.ldexp(math.copysign(1.0, scale), exponent)
    if scale == 0:
        prescale, factor = 0.0, 1.0
    made = {"prescale": prescale, "factor": factor, "scale": p.scale}
    if p.softcap is not None:
        made |= {"cap_inner": factor * LN2 / p.softcap, "cap_outer": p.softcap * LOG2E}
    return made
