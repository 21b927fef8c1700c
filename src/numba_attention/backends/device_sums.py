"""Sums of arrays on a GPU over broadcast axes: a gradient gets the shape and dtype of its input."""

import math
from typing import Any

import numpy as np

from ..cuda import kernels
from ..cuda.formats import HALVES
from ..cuda.parameters import AXES, REALS
from ..cuda.rowwise import TOGETHER
from ..cuda.spec import Spec
from ..device import runtime
from ..device.headers import address_of
from ..options import Array
from ..problem.dense import Empty
from .records import storage_of


def reduce(x: Array, shape: tuple[int, ...], dtype: np.dtype[Any], empty: Empty) -> Array:
    """Sum over the axes along which `shape` was broadcast to that of x, and convert to `dtype`."""
    if x.shape == shape and x.dtype == dtype:
        return x
    total: Array = empty(shape, dtype)
    add_up(x, total, runtime.current_device().arch, runtime.stream())
    return total


def add_up(x: Array, target: Array, arch: str, stream: int, terms: bool = True) -> None:
    """Sum x over the axes that `target` lacks or has with size 1; without `terms`, fill `target` with zeros."""
    if not target.size:
        return
    extra = x.ndim - target.ndim
    shape, strides = (1,) * extra + target.shape, (0,) * extra + target.strides
    pairs = list(zip(x.shape, x.strides, shape, strides, strict=True))
    kept = [(n, stride, to) for n, stride, m, to in pairs if m == n and n != 1][::-1]
    summed = [(n, stride) for n, stride, m, _ in pairs if m != n]
    if max(len(kept), len(summed)) > AXES:
        raise ValueError(f"gradients of arrays of more than {AXES} dimensions cannot be summed on a GPU, got {x.shape}")
    count = math.prod(n for n, _ in summed) if terms else 0
    integers = [address_of(x), address_of(target), target.size, count]
    for n in range(AXES):
        integers += kept[n] if n < len(kept) else (1, 0, 0)
    for n in range(AXES):
        integers += summed[n] if n < len(summed) else (1, 0)
    c = Spec("reduce", storage_of(x.dtype), 32, 32, to=storage_of(target.dtype), aligned=False, arch=arch)
    each = 1
    if terms and _is_copy(x, target):
        c, each = c.with_(aligned=True), TOGETHER
    grid = (-(-target.size // (each * c.threads)), 1, 1)
    runtime.launch(kernels.compiled(c), grid, integers, [0.0] * len(REALS), stream)


def _is_copy(x: Array, target: Array) -> bool:
    """Whether float32 in one piece of memory becomes as much of a half type, of which threads convert several."""
    if x.dtype != np.float32 or storage_of(target.dtype) not in HALVES or x.size != target.size or x.size % TOGETHER:
        return False
    in_order = x.flags.c_contiguous and target.flags.c_contiguous
    return in_order and not any(address_of(array) % 16 for array in (x, target))
