"""The CUDA backend: turns a `Problem`, whose arrays are headers of device memory, into launches."""

import numpy as np

from ..cuda import configs, kernels, runtime
from ..cuda.config import Config
from ..cuda.headers import address_of
from ..options import Array
from ..problem import BackwardProblem, Problem
from .arguments import check_size, is_aligned, numbers, records, upload, work_list
from .records import is_paged, storage_of, stored_of

_WHY = "this version of numba-attention has no kernel for this on CUDA yet; copy the arrays to NumPy to use backend='cpu'"
on_device = True

FEW = 16  # rows of a key head, of all its query heads: the kernel for decoding
WAVES = 4  # blocks for each multiprocessor that are worth having


def unusable() -> str | None:
    return runtime.unusable()


def with_options(c: Config, p: Problem) -> Config:
    """Say which options a kernel is to have."""
    return c.with_(
        softcap=p.softcap is not None, alibi=p.alibi_slopes is not None, mask=p.mask is not None,
        sinks=p.sinks is not None, paged=is_paged(p), bias="" if p.bias is None else storage_of(p.bias.dtype),
    )  # fmt: skip


def forward(problem: Problem) -> None:
    """Write ``problem.out`` and ``problem.lse``."""
    p = problem
    if not p.out.size and (p.lse is None or not p.lse.size):
        return
    check_size(p)
    if stored_of(p):
        raise NotImplementedError(f"the CUDA backend reads caches as the queries are stored, got {p.cache.storage}")  # type: ignore[union-attr]
    device, stream = runtime.current_device(), runtime.stream()
    storage = storage_of(p.query.dtype)
    group = p.H // p.Hkv
    c = with_options(configs.base("forward", storage, p.E, p.Ev, device), p)
    aligned = is_aligned(p.query, p.key, p.value, p.out) and device.compute_capability >= (8, 0)
    hides = p.left is not None or p.right is not None or p.mask is not None or p.bias is not None
    stacked = p.L * group <= FEW
    c = c.with_(aligned=aligned, flags=hides, stacked=stacked and group > 1)
    if stacked:
        c = configs.few(c, p.L * group, device)
    rows = p.L * group if c.stacked else p.L
    heads = p.Hkv if c.stacked else p.H
    tiles = -(-rows // c.rows)
    sequences = records(p)
    work = None if c.stacked else work_list(p, sequences, c.rows)
    items = len(sequences) * tiles if work is None else len(work)
    splits = _splits(items * heads, -(-p.S // c.columns), device.multiprocessors)
    flag_rows = tiles * c.rows
    total = len(sequences) * heads * flag_rows
    kept = [
        upload(sequences.view(np.int64)),
        None if work is None else upload(work),
        None if p.alibi_slopes is None else upload(np.ascontiguousarray(p.alibi_slopes)),
        None if p.sinks is None else upload(np.ascontiguousarray(p.sinks)),
        runtime.empty(total, np.int32, stream) if hides else None,
        None,
    ]
    if splits > 1:
        real = np.float64 if storage == "float64" else np.float32
        kept[-1] = runtime.empty(splits * total * (c.Ev + 4), real, stream)
        c = c.with_(split=True, flags=False)
    names = ("sequences", "work", "slopes", "sinks", "flags", "partial")
    arrays: dict[str, Array | None] = {
        "query": p.query, "key": p.key, "value": p.value, "out": p.out, "lse": p.lse, "bias": p.bias, "mask": p.mask,
        **dict(zip(names, kept, strict=True)),
    }  # fmt: skip
    more = {"tiles": tiles, "flag_rows": flag_rows, "splits": splits, "number": len(sequences)}
    if items:
        integers, reals = numbers(p, c, arrays, **more)
        runtime.launch(kernels.compiled(c), (items, heads, splits), integers, reals, stream)
    if splits > 1:
        join = Config("combine", c.storage, c.E, c.Ev, warps=2, stacked=c.stacked, flags=hides, arch=c.arch)
        integers, reals = numbers(p, join, arrays, **more)
        runtime.launch(kernels.compiled(join), (len(sequences) * flag_rows, heads, 1), integers, reals, stream)
    if hides and items:
        again = configs.careful(c, device)
        more["tiles"] = -(-rows // again.rows)
        arrays["work"] = None
        integers, reals = numbers(p, again, arrays, **more)
        runtime.launch(kernels.compiled(again), (len(sequences) * more["tiles"], heads, 1), integers, reals, stream)


def _splits(blocks: int, key_tiles: int, multiprocessors: int) -> int:
    """Among how many blocks to share out the keys of a tile of queries, so that every multiprocessor has work."""
    wanted = multiprocessors * WAVES
    if blocks * 2 > wanted or not blocks:
        return 1
    return max(1, min(wanted // blocks, key_tiles // 2, 256))


def backward(problem: BackwardProblem) -> None:
    raise NotImplementedError(_WHY)


def weights(problem: Problem) -> None:
    raise NotImplementedError(_WHY)


def reduce(x: Array, shape: tuple[int, ...], dtype: object = None) -> Array:
    """Sum over the axes along which `shape` was broadcast to that of x, and convert to `dtype`."""
    raise NotImplementedError(_WHY)


__all__ = ["address_of", "backward", "forward", "on_device", "reduce", "unusable", "weights"]
