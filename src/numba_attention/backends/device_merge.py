"""Merging of results on a GPU, and its gradient: where the arrays of the parts are, and the launch of the kernel."""

import math
from itertools import pairwise

import numpy as np

from ..cuda import kernels
from ..cuda.merge import ARRAYS, AXES, entry_of, integers_of, lanes_of
from ..cuda.parameters import REALS
from ..cuda.spec import Spec
from ..cuda.tiles import CHUNK
from ..device import runtime
from ..device.headers import address_of, has_whole_words, held
from ..options import Array
from .device_sums import add_up
from .records import storage_of

WARPS = 4
TOGETHER = 2  # parts that are read at a time, at most


def merge(parts: list[Array], logs: list[Array], out: Array, lse: Array) -> None:
    """Write the merged results of parts to `out`, of the shape of each part, and to `lse`, of that of its rows."""
    _launch("merge", {"out": [*parts, out], "lse": [*logs, lse]})


def merge_backward(
    grad_out: Array, grad_lse: Array | None, parts: list[Array], logs: list[Array], grad_parts: list[Array],
    grad_logs: list[Array],
) -> None:  # fmt: skip
    """Write the gradients of `merge` with respect to each part and its lse, from those of the merged ones."""
    # Where there is no gradient of lse, an lse stands for it in what depends on strides.
    arrays = {
        "out": [*parts, grad_out], "lse": [*logs, logs[0] if grad_lse is None else grad_lse], "grad_out": grad_parts,
        "grad_lse": grad_logs,
    }  # fmt: skip
    _launch("merge_backward", arrays, **({"lse": 0} if grad_lse is None else {}))


def _launch(task: str, arrays: dict[str, list[Array]], **numbers: int) -> None:
    """Launch a kernel; of `out` and `lse`, the merged ones follow those of the parts. `numbers` replace integers."""
    rows, number = arrays["lse"][0].shape, len(arrays["lse"]) - 1
    if not math.prod(rows):
        return
    if math.prod(rows) >= 2**31:
        raise ValueError(f"the CUDA backend merges up to 2**31 rows, got {math.prod(rows)}")
    shape, entries = _entries(rows, arrays)
    if len(shape) > AXES:
        given = number if task == "merge" else number + 1  # the others are results
        arrays = {name: [*map(_contiguous, x[:given]), *x[given:]] for name, x in arrays.items()}
        shape, entries = _entries(rows, arrays)
    if len(shape) > AXES:
        raise ValueError(f"out must not have more than {AXES} axes of rows that do not follow one another in memory")
    first = arrays["out"][0]
    values = dict(zip(entry_of(ARRAYS["merge"]), [*entries["out"][-1], *entries["lse"][-1]], strict=True))
    values |= {f"size_{axis}": size for axis, size in enumerate((1,) * (AXES - len(shape)) + shape)}
    values |= {"parts": number, "rows": math.prod(rows), "features": first.shape[-1]}
    counted = {name: _counted(arrays[name][:number], entries[name][:number]) for name in ARRAYS[task]}
    for name, found in counted.items():
        values |= {f"part_{x}": n for x, n in zip(entry_of((name,)), entries[name][0], strict=True)}
        values |= dict(zip((f"part_{name}_second", f"part_{name}_step"), found or (0, 0), strict=True))
    table = None  # kept until the launch
    if None in counted.values():
        joined = np.concatenate([np.array(entries[name][:number], np.int64) for name in ARRAYS[task]], axis=1)
        names = entry_of(ARRAYS[task])
        columns = [names.index(name) for name in ARRAYS[task]]
        places = [part * len(names) + column for part in range(number) for column in columns]
        table = runtime.upload_table(joined, places, runtime.stream())
        values["table"] = address_of(table)
    whole = all(has_whole_words(x, CHUNK) for name in arrays for x in arrays[name] if "out" in name)
    storage = storage_of(first.dtype)
    lanes = lanes_of(first.shape[-1], storage) if whole else 32
    c = Spec(
        task, storage, 32, 32, slots=min(number, TOGETHER), across=lanes, warps=WARPS, columns=max(len(shape), 1),
        aligned=whole, paged=table is not None, to=storage_of(arrays["lse"][0].dtype),
        arch=runtime.current_device().arch,
    )  # fmt: skip
    values |= numbers
    integers = [values.get(name, 0) for name in integers_of(task)]
    grid = (-(-math.prod(rows) // (c.threads // lanes)), 1, 1)
    runtime.launch(kernels.compiled(c), grid, integers, [0.0] * len(REALS), runtime.stream())


def _counted(arrays: list[Array], entries: list[list[int]]) -> tuple[int, int] | None:
    """Return what counting finds the array of each part by: the address of the second, or else a distance.

    None where there is neither. It must hold in every call that has such arrays, wherever those are, as calls are
    repeated with other addresses: so a distance must be within one array.
    """
    if any(entry[1:] != entries[0][1:] for entry in entries):
        return None
    addresses = [entry[0] for entry in entries]
    steps = {b - a for a, b in pairwise(addresses)} or {0}
    if len(steps) == 1 and all(held(x) is held(arrays[0]) for x in arrays):
        return addresses[0], steps.pop()
    return (addresses[1], 0) if len(addresses) == 2 else None


def _entries(
    rows: tuple[int, ...], arrays: dict[str, list[Array]]
) -> tuple[tuple[int, ...], dict[str, list[list[int]]]]:
    """Return the sizes of joined axes, and address and strides of each array as `cuda.merge.entry_of` has them.

    Axes of rows that follow one another in every array are joined.
    """
    flat = [x for of_name in arrays.values() for x in of_name]
    shape, strides = _collapsed(rows, flat)
    missing = [0] * (AXES - len(shape))
    found = iter(
        [address_of(x), *missing, *own, *([x.strides[-1]] if x.ndim > len(rows) else [])]
        for x, own in zip(flat, strides, strict=True)
    )
    return shape, {name: [next(found) for _ in of_name] for name, of_name in arrays.items()}


def _collapsed(shape: tuple[int, ...], arrays: list[Array]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Join axes of rows that follow one another in every array; return their sizes, and the strides of each array."""
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in arrays]
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        own = [x.strides[axis] for x in arrays]
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
