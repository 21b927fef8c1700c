"""The CUDA backend: turns a `Problem`, whose arrays are headers of device memory, into launches."""

import math

import numpy as np

from ..cuda import configs, kernels, runtime
from ..cuda.config import Config
from ..cuda.headers import address_of
from ..cuda.parameters import AXES, REALS
from ..options import Array
from ..problem import BackwardProblem, Problem
from . import device_gradients
from .arguments import Work, is_aligned, upload, work_list
from .records import per_head, storage_of, stored_of

on_device = True

FEW = 16  # rows of a key head, of all its query heads: the kernel for decoding
WAVES = 4  # blocks for each multiprocessor that are worth having


def unusable() -> str | None:
    return runtime.unusable()


def forward(problem: Problem) -> None:
    """Write ``problem.out`` and ``problem.lse``."""
    p = problem
    if not p.out.size and (p.lse is None or not p.lse.size):
        return
    if stored_of(p):
        raise NotImplementedError(
            f"the CUDA backend reads caches that are stored as the queries are, {p.query.dtype}, got {stored_of(p)}"
        )
    work = Work(p)
    device, group = work.device, p.H // p.Hkv
    few = p.L * group <= FEW
    c = work.config("forward", is_aligned(p.query, p.key, p.value, p.out))
    c = c.with_(sinks=p.sinks is not None, stacked=few and group > 1)
    if few:
        c = configs.few(c, p.L * group, device)
    rows, heads = (p.L * group, p.Hkv) if c.stacked else (p.L, p.H)
    tiles, number = -(-rows // c.rows), len(work.sequences)
    listed = None if c.stacked else work_list(p, work.sequences, c.rows)
    items = number * tiles if listed is None else len(listed)
    splits = _splits(items * heads, -(-p.S // c.columns), device.multiprocessors)
    more = {"tiles": tiles, "flag_rows": tiles * c.rows, "splits": splits, "number": number}
    total = number * heads * more["flag_rows"]
    if not items:
        return
    work.upload_sequences()
    work.arrays["work"] = None if listed is None else upload(listed)
    if work.hides:
        work.arrays["flags"] = work.empty(total, np.int32)
    if splits == 1:
        work.launch(c, (items, heads, 1), **more)
    else:
        work.arrays["partial"] = work.empty(splits * total * (c.Ev + 4), work.real)
        c = c.with_(split=True, flags=False)
        work.launch(c, (items, heads, splits), **more)
        join = Config("combine", c.storage, c.E, c.Ev, warps=2, stacked=c.stacked, flags=work.hides, arch=c.arch)
        work.launch(join, (number * more["flag_rows"], heads, 1), **more)
    if work.hides:
        again = configs.careful(c, device)
        work.arrays["work"] = None
        more["tiles"] = -(-rows // again.rows)
        work.launch(again, (number * more["tiles"], heads, 1), **more)


def _splits(blocks: int, key_tiles: int, multiprocessors: int) -> int:
    """Among how many blocks to share out the keys of a tile of queries, so that every multiprocessor has work."""
    wanted = multiprocessors * WAVES
    if blocks * 2 > wanted or not blocks:
        return 1
    return max(1, min(wanted // blocks, key_tiles // 2, 256))


def backward(problem: BackwardProblem) -> None:
    """Write the gradients of query, key and value, and make those of bias and sinks."""
    device_gradients.run(problem)


def weights(problem: Problem) -> None:
    """Write the probabilities of the chosen heads and rows to ``problem.out``."""
    p = problem
    if not p.out.size or p.heads is None or p.rows is None:
        return
    work = Work(p)
    c = configs.weights(work.config("forward", is_aligned(p.query, p.key)), work.device)
    c = c.with_(sinks=p.sinks is not None)
    tiles = -(-len(p.rows) // c.rows)
    work.sequences = per_head(p, p.heads, work.sequences, p.bias)
    work.upload_sequences()
    work.arrays["work"] = upload(np.ascontiguousarray(p.rows, np.int64))
    work.launch(c, (len(work.sequences) * tiles, 1, 1), tiles=tiles, number=len(p.rows), inner_tiles=p.S)


def reduce(x: Array, shape: tuple[int, ...], dtype: object = None) -> Array:
    """Sum over the axes along which `shape` was broadcast to that of x, and convert to `dtype`."""
    kind = x.dtype if dtype is None else np.dtype(dtype)  # type: ignore[call-overload]
    if x.shape == shape and x.dtype == kind:
        return x
    stream, device = runtime.stream(), runtime.current_device()
    made = runtime.empty(shape, kind, stream)
    add_up(x, made, device.arch, stream)
    return made


def add_up(x: Array, target: Array, arch: str, stream: int, terms: bool = True) -> None:
    """Sum x over the axes that `target` does not have, or has of size 1; without terms, zeros."""
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
    c = Config("reduce", storage_of(x.dtype), 32, 32, to=storage_of(target.dtype), arch=arch)
    grid = (-(-target.size // c.threads), 1, 1)
    runtime.launch(kernels.compiled(c), grid, integers, [0.0] * len(REALS), stream)
