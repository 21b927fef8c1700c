"""Sums of arrays on a GPU over broadcast axes: a gradient gets the shape and dtype of its input."""

import math
from typing import Any

import numpy as np

from ..cuda import kernels
from ..cuda.parameters import AXES, REALS
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
    c = Spec("reduce", storage_of(x.dtype), 32, 32, to=storage_of(target.dtype), arch=arch)
    grid = (-(-target.size // c.threads), 1, 1)
    runtime.launch(kernels.compiled(c), grid, integers, [0.0] * len(REALS), stream)
