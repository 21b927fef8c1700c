"""Merging of results on a GPU: the table of parts, and the launch of the kernel."""

import math

import numpy as np

from ..cuda import kernels
from ..cuda.merge import AXES, PART
from ..cuda.parameters import REALS
from ..cuda.spec import Spec
from ..device import runtime
from ..device.headers import address_of, has_whole_words
from ..options import Array
from .device_sums import add_up
from .records import storage_of

WARPS = 4


def merge(parts: list[Array], logs: list[Array], out: Array, lse: Array) -> None:
    """Write the merged results of parts to `out`, of the shape of each part, and to `lse`, of that of its rows."""
    rows = math.prod(lse.shape)
    if not rows:
        return
    if rows >= 2**31:
        raise ValueError(f"the CUDA backend merges up to 2**31 rows, got {rows}")
    arrays = [*parts, out], [*logs, lse]
    shape, strides = _collapsed(lse.shape, *arrays)
    if len(shape) > AXES:
        arrays = [*map(_contiguous, parts), out], [*map(_contiguous, logs), lse]
        shape, strides = _collapsed(lse.shape, *arrays)
    if len(shape) > AXES:
        raise ValueError(f"out must not have more than {AXES} axes of rows that do not follow one another in memory")
    missing = (0,) * (AXES - len(shape))
    shape = (*(1 for _ in missing), *shape)
    number = len(parts) + 1
    entries = [
        [address_of(x), *missing, *strides[n], x.strides[-1], address_of(log), *missing, *strides[number + n]]
        for n, (x, log) in enumerate(zip(*arrays, strict=True))
    ]
    table = runtime.upload(np.array(entries[:-1], np.int64), runtime.stream())
    assert table.shape[1] == len(PART)
    pairs = out.itemsize == 2 and all(has_whole_words(x, 4) for x in arrays[0])
    c = Spec(
        "merge", storage_of(out.dtype), 32, 32, warps=WARPS, aligned=pairs,
        to=storage_of(lse.dtype), arch=runtime.current_device().arch,
    )  # fmt: skip
    integers = [address_of(table), *entries[-1], *shape[1:], len(parts), rows, out.shape[-1]]
    grid = (-(-rows // WARPS), 1, 1)
    runtime.launch(kernels.compiled(c), grid, integers, [0.0] * len(REALS), runtime.stream())


def _collapsed(shape: tuple[int, ...], *groups: list[Array]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Join axes of rows that follow one another in every array; return their sizes, and the strides of each array."""
    sizes: list[int] = []
    strides: list[list[int]] = [[] for group in groups for _ in group]
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        own = [x.strides[axis] for group in groups for x in group]
        if sizes and all(of[-1] == size * step for of, step in zip(strides, own, strict=True)):
            sizes[-1] *= size
            for of, step in zip(strides, own, strict=True):
                of[-1] = step
        else:
            sizes.append(size)
            for of, step in zip(strides, own, strict=True):
                of.append(step)
    return tuple(sizes), [tuple(of) for of in strides]


def _contiguous(x: Array) -> Array:
    if x.flags.c_contiguous:
        return x
    stream = runtime.stream()
    copy = runtime.empty(x.shape, x.dtype, stream)
    add_up(x, copy, runtime.current_device().arch, stream)
    return copy
