"""The scratch memory of a thread: an area is declared once, by name, shape and kind.

Sizes and offsets follow on the host (`lay_out`), and in kernels the arrays over the areas (`views`). Tiles have query
rows in the lanes, so that their last axis is the query tile; what is packed otherwise is declared flat. Numbers that a
kernel learns at run time, as E and Ev, appear in the first axis only, which is `UNBOUNDED` for it.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .simd import HOST
from .softmax import ROWS, SECOND_ROWS
from .spec import Spec
from .views import UNBOUNDED, view_of

LINE = 64  # bytes of a cache line, at which every area begins


class Area(NamedTuple):
    """One area of scratch."""

    shape: tuple[int, ...]
    kind: Any  # a NumPy scalar type

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * int(np.dtype(self.kind).itemsize)


def padded(spec: Spec, features: int) -> int:
    """Features of a row in scratch: whole vectors."""
    W = spec.vector.width
    return -(-features // W) * W


def _of_scoring(spec: Spec, E: int) -> dict[str, Area]:
    """What all kernels of attention need for the scores of a tile."""
    BM, BN, real, few = spec.query_tile, spec.key_tile, spec.vector.dtype, spec.task == "decode"
    words, has_cache = (E + 1) // 2, spec.task in ("forward", "decode")
    tile, table, addresses = Area((BN, BM), real), Area((BM,), np.int64), Area((BN if has_cache else 0,), np.int64)
    queries, keys = Area((E, BM), real), Area((BN * E if spec.widens_kv else 0,), real)
    if spec.bf16_dot:  # pairs of bfloat16, in words
        queries, keys = Area((words, BM), np.int32), Area((BN * words,), np.int32)
    elif few:  # features in the lanes, and keys are read where they are
        queries, keys = Area((BM * padded(spec, E),), real), Area((0,), real)
    return {
        "state": Area((ROWS, BM), real),
        "queries": queries,
        "scores": tile,
        "keys": keys,
        "raw_keys": Area((BN * E * spec.kv_element.size if has_cache else 0,), np.uint8),
        "key_rows": addresses,
        "value_rows": addresses,
        "scales": Area((BN if spec.quantized else 0, BM), real),
        "bias": tile,
        "mask": tile,
        "query_rows": table,
        "out_rows": table,
        "bias_rows": table,
        "mask_rows": table,
        "lse_rows": table,
        "starts": table,
        "stops": table,
        "positions": table,
        "lane_rows": table,
        "lane_heads": table,
        "key_scale_rows": table,
        "value_scale_rows": table,
        "hidden": Area((BN if spec.task in ("forward", "weights", "decode") else 0, BM), np.uint8),
    }


def _of_forward(spec: Spec, E: int, Ev: int) -> dict[str, Area]:
    BM, BN, MR, real = spec.query_tile, spec.key_tile, spec.block[0], spec.vector.dtype
    return _of_scoring(spec, E) | {
        "out": Area((-(-Ev // MR) * MR, BM), real),
        "high": Area((Ev, BM), real),
        "low": Area((Ev, BM), real),
        "weights": Area((BN // 2 if spec.bf16_dot else 0, BM), np.int32),
        "values": Area((BN * Ev,), np.uint16 if spec.bf16_dot else real),
        "raw_values": Area((BN * Ev * spec.kv_element.size,), np.uint8),
        "extra": Area((Ev, BM), real),
        "saved": Area((Ev, BM), real),  # the outputs before those of normalized weights
    }


def _of_decode(spec: Spec, E: int, Ev: int) -> dict[str, Area]:
    W, BN, real = spec.vector.width, spec.key_tile, spec.vector.dtype
    return _of_scoring(spec, E) | {
        "out": Area((W * padded(spec, Ev),), real),
        "extra": Area((W * padded(spec, Ev),), real),
        "saved": Area((W * padded(spec, Ev),), real),  # the outputs before those of normalized weights
        "lane_counts": Area((2,), np.int64),  # of a tile, and of each head in it
        "raw_values": Area((BN * Ev * spec.kv_element.size,), np.uint8),
        "raw_rows": Area((BN,), np.int64),
    }


def _of_backward(spec: Spec, E: int, Ev: int, sums: int) -> dict[str, Area]:
    BM, BN, MR, real = spec.query_tile, spec.key_tile, spec.block[0], spec.vector.dtype
    words = (Ev + 1) // 2
    tile, table = Area((BN, BM), real), Area((BM,), np.int64)
    return _of_scoring(spec, E) | {
        "grads": Area((words, BM), np.int32) if spec.bf16_dot else Area((Ev, BM), real),
        "values": Area((BN * words,), np.int32) if spec.bf16_dot else Area((BN * Ev if spec.widens_kv else 0,), real),
        "grad_scores": tile,
        "cap_slopes": tile,
        "mod_slopes": tile,
        "mod_scores": tile,  # scores before the rule
        "out": Area((max(-(-E // MR) * MR, Ev), BM), real),  # the outputs, then dQ
        "high": Area((E, BM), real),
        "low": Area((E, BM), real),
        "extra": Area((Ev if spec.bf16_dot else 0, BM), real),
        "paired": Area((BN // 2 if spec.bf16_dot else 0, BM), np.int32),  # gradients of scores, keys in pairs
        "query_copy": Area((BM * padded(spec, E),), real),
        "grad_copy": Area((BM * padded(spec, Ev),), real),
        "packed_keys": Area((BN * E,), real),
        "spare": Area((max(E, BM),), real),
        "sums": Area((sums,), np.uint8),
        "grad_rows": table,
        "grad_query_rows": table,
        "grad_bias_rows": table,
        "dirty": table,
    }


def _of_second(spec: Spec, E: int, Ev: int, sums: int) -> dict[str, Area]:
    BM, BN, MR, real = spec.query_tile, spec.key_tile, spec.block[0], spec.vector.dtype
    tile, table = Area((BN, BM), real), Area((BM,), np.int64)
    first, last = (-(-n // MR) * MR for n in (max(E, Ev), Ev))
    both = Area((first + last, BM), real)  # the tangents of dQ, or the outputs, and then the tangents of the outputs
    return _of_backward(spec, E, Ev, sums) | {
        "out": both,
        "high": both,
        "low": both,
        "packed_keys": Area((BN * max(E, Ev),), real),
        "spare": Area((max(E, Ev, BM),), real),
        "second_state": Area((SECOND_ROWS, BM), real),
        "cap_curves": tile,
        "kept": tile,
        "moved_scores": tile,
        "moved_weights": tile,
        "moved_grads": tile,
        "outputs": Area((Ev, BM), real),
        "tangent_queries": Area((E, BM), real),
        "grad_tangents": Area((Ev, BM), real),
        "tangent_query_copy": Area((BM * padded(spec, E),), real),
        "grad_tangent_copy": Area((BM * padded(spec, Ev),), real),
        "tangent_query_rows": table,
        "grad_tangent_rows": table,
        "tangent_bias_rows": table,
        "out_tangent_rows": table,
    }


def areas_of(spec: Spec, E: int = UNBOUNDED, Ev: int = UNBOUNDED, sums: int = 0) -> dict[str, Area]:
    """The areas of a kernel; their names are the same for all kernels of a task.

    Parameters
    ----------
    spec : Spec
    E, Ev : int
        Features of keys and of values.
    sums : int
        Bytes of dK and dV that a thread keeps.
    """
    if spec.task == "decode":
        return _of_decode(spec, E, Ev)
    if spec.task == "second":
        return _of_second(spec, E, Ev, sums)
    return _of_backward(spec, E, Ev, sums) if spec.task == "backward" else _of_forward(spec, E, Ev)


def lay_out(areas: dict[str, Area]) -> tuple[dict[str, int], int]:
    """Byte offsets of the areas, and their sum."""
    offsets, total = {}, 0
    for name, area in areas.items():
        offsets[name] = total
        total += -(-area.size // LINE) * LINE
    return offsets, total


@lru_cache(maxsize=256)
def layout_of(spec: Spec, E: int, Ev: int, sums: int = 0) -> tuple[dict[str, Area], dict[str, int], int]:
    """The areas of a kernel, their byte offsets and their sum. Cached: 15 us, and calls with a mask ask each time."""
    areas = areas_of(spec, E, Ev, sums)
    return areas, *lay_out(areas)


def views(areas: dict[str, Area], names: str, kind: Any = None) -> list[Any]:
    """Make ``view(p, at)`` for each of the names: the area in the scratch that begins at `at`, as an array.

    With `kind`, the same memory as numbers of another kind of that size.
    """
    result = []
    for name in names.split():
        first, *others = areas[name].shape
        assert all(n < UNBOUNDED for n in others), f"{name}: only the first axis may be unknown to a kernel"
        result.append(view_of(f"at_{name}", (min(first, UNBOUNDED), *others), kind or areas[name].kind))
    return result


TASKS = ("forward", "decode", "backward", "second")
NAMES = tuple(dict.fromkeys(name for task in TASKS for name in areas_of(Spec("float32", HOST, task), 0, 0)))
