"""The CUDA backend: converts a `Problem`, whose arrays are headers of device memory, to launches of kernels."""

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np

from ..cuda import hopper, kernels, tile_shapes
from ..cuda.blocks import HEAD
from ..cuda.combine import MOST as MOST_PARTS
from ..cuda.spec import Spec
from ..device import driver, runtime
from ..device.constants import upload
from ..device.driver import Device
from ..device.launches import Machine
from ..problem.dense import BackwardProblem, Problem
from . import cuda_backward
from .cuda_launch import Work, is_aligned, work_list
from .device_masks import with_block_mask, with_fitting_rows, with_whole_mask
from .device_sums import reduce as reduce
from .records import per_head

on_device = True

FEW = 16  # rows of a key head, over all its query heads, up to which they are one tile of one warp, as in decoding


def unusable() -> str | None:
    return runtime.unusable()


def warmup_jobs(wide: bool = False) -> list[tuple[str, Callable[[], object]]]:
    """Return the names of the common kernels for the first GPU, each with a function that compiles it."""
    return [(c.name, partial(kernels.compiled, c)) for c in common_kernels(runtime.driver.device(0), wide)]


def common_kernels(device: Device, wide: bool = False) -> list[Spec]:
    """Return the kernels of a GPU that most calls use: plain and masked ones, decoding, caches, gradients.

    If `wide`, results are in float32 for half types: see `problem.dense.widened`.
    """
    copies = Spec("append", "float32", 32, 32, to="float32", arch=device.arch)  # to a cache of any dtype
    specs: dict[str, Spec] = {copies.name: copies}
    for storage in ("bfloat16", "float16", "float32"):
        for E in (64, 128):
            for hides in (False, True):
                product = tile_shapes.product_of(storage, device, E)
                c = tile_shapes.for_call(
                    "forward", storage, E, E, product, device, False, False, "", False, False, False, hides, True
                )
                if wide and storage != "float32":
                    c = c.with_(to="float32")
                alone, _, _, repeat = _kernels(c, False, 0, 1, device)
                packed, _, _, packed_repeat = _kernels(c, False, c.rows, 4, device)  # a short prompt of grouped heads
                found = [alone, packed, *cuda_backward.kernels_of(c, device)]
                if hides:
                    found += [repeat, packed_repeat]
                else:  # a step of decoding, with a key head for each query head, or for four
                    for group in (1, 4):
                        found += _kernels(c, False, group, group, device)[:3]
                large = hopper.spec_of(alone)
                if large is not None:
                    found += [large, repeat]
                specs |= {kernel.name: kernel for kernel in found}
    return list(specs.values())


def forward(problem: Problem) -> None:
    """Write ``problem.out`` and ``problem.lse``."""
    if not problem.out.size and (problem.lse is None or not problem.lse.size):
        return
    p = with_block_mask(problem)
    work = Work(p)
    group = p.H // p.Hkv
    c = work.spec("forward", is_aligned(p.query, p.key, p.value, p.out), p.out)
    few = p.L * group if p.L * group <= FEW or _is_packed(c, p.L, group) else 0
    c = c if few else with_fitting_rows(p, c)
    alone, split, join, repeat = _kernels(c, p.sinks is not None, few, group, work.device)
    rows, heads = (few, p.Hkv) if alone.pack_gqa else (p.L, p.H)
    number = len(work.sequences)
    alone = tile_shapes.by_warpgroups(alone, rows, p.S, number * heads, work.device)
    tiles = -(-rows // alone.rows)
    listed = work_list(p, work.sequences, alone.rows, group=group if alone.pack_gqa else 1)
    items = number * tiles if listed is None else len(listed)
    if not items:
        return
    splits = _splits(items * heads * alone.slabs, -(-p.S // alone.columns), tile_shapes.resident(alone, work.device))
    padded_rows = tiles * alone.rows
    work.set(tiles=tiles, flag_rows=padded_rows, splits=splits, number=number)
    work.upload_sequences()
    if listed is not None:
        work.put("work", upload(listed))
    if alone.flags:
        work.mark_rows(alone, number * heads * padded_rows)
    if splits == 1:
        work.launch_tiles(alone, tiles, items, heads)
    else:
        sums = splits * alone.slabs * number * heads * padded_rows
        work.empty("partial", sums * (alone.Ev + HEAD), work.real)
        work.launch(split, (items, heads, splits * split.slabs))
        work.launch(join, (number * padded_rows, heads, join.slabs))
    if alone.flags:
        work.put("work", None)
        tiles = -(-rows // repeat.rows)
        work.launch(repeat, (number * tiles, heads, repeat.slabs), tiles=tiles)


@lru_cache(maxsize=512)
def _kernels(c: Spec, sinks: bool, few: int, group: int, device: Device) -> tuple[Spec, Spec, Spec, Spec]:
    """Return four kernels: for all keys, for a part of the keys, for joining parts, and for repeating marked rows."""
    c = c.with_(sinks=sinks, pack_gqa=few > 0 and group > 1)
    if 0 < few <= FEW:
        c = tile_shapes.few(c, few, device)
    elif few:
        c = tile_shapes.no_more_rows(c, few)
    join = Spec(
        "combine", c.storage, c.E, c.Ev, warps=4, pack_gqa=c.pack_gqa, flags=c.flags, to=c.to, arch=c.arch,
        E_slices=c.E_slices, Ev_slices=c.Ev_slices,
    )  # fmt: skip
    return c, c.with_(split_kv=True, flags=False, to=""), join, tile_shapes.nan_safe(c, device)


def _is_packed(c: Spec, L: int, group: int) -> bool:
    """Return whether the query heads of a key head are rows of the same tiles, though they are not few.

    If a tile has more rows than there are queries, that takes fewer tiles than one or more for each head, and each tile
    reads the keys once for several heads: 16 to 128 of one latent key in multi-head latent attention (DeepSeek-V2,
    2024), all heads in multi-query attention. A tile of a block mask visits what any of its rows sees, which heads with
    masks of their own may share little of: more than one tile could then be more work.
    """
    return group > 1 and c.rows > (L * group - 1 if c.lists else L)


def _splits(blocks: int, key_tiles: int, resident: int) -> int:
    """Return among how many blocks to divide the keys of a tile of queries, so that every multiprocessor has work."""
    if blocks * 4 > resident * 3:
        return 1
    return max(1, min(resident // blocks, key_tiles // 2, MOST_PARTS))


def backward(problem: BackwardProblem) -> None:
    """Write the gradients of query, key and value, and make those of bias and sinks."""
    cuda_backward.run(problem)


def weights(problem: Problem) -> None:
    """Write the probabilities of the chosen heads and rows to ``problem.out``."""
    p = with_whole_mask(problem)
    if not p.out.size or p.heads is None or p.rows is None:
        return
    work = Work(p)
    c = tile_shapes.weights(work.spec("forward", is_aligned(p.query, p.key)), work.device)
    c = c.with_(sinks=p.sinks is not None)
    tiles = -(-len(p.rows) // c.rows)
    work.sequences = per_head(p, p.heads, work.sequences, p.bias)
    work.upload_sequences()
    work.put("work", upload(np.ascontiguousarray(p.rows, np.int64)))
    work.launch(c, (len(work.sequences) * tiles, 1, 1), tiles=tiles, number=len(p.rows), inner_tiles=p.S)


def _machine() -> Machine | None:
    from numba.core import config

    from ..cpu import device_calls as code

    if config.DISABLE_JIT:
        return None
    return Machine(code.look.call, code.OPERANDS, code.ROOM, code.launch.call, code.OTHER_CONTEXT, code.record_of)


driver.provide(_machine)
