"""Passes of mods called on tiles that a test made, and functions made from text."""

import ctypes
import itertools
import linecache

import numpy as np

from numba_attention.cpu.simd import HOST, Vector
from numba_attention.mods.compiled import kernel_of, record_of
from numba_attention.mods.rules import as_arguments, describe, find

_numbers = itertools.count()


def function_of(text, name="mod", **scope):
    """A function whose source is `text`, found as that of a function in a file is."""
    file = f"<mod {next(_numbers)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), scope)
    return scope[name]


def call(kernel, *integers, unit=1.0):
    """Call a pass as kernels do."""
    kind = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 10, ctypes.c_double)
    result, error = ctypes.c_int64(), ctypes.c_void_p()
    kind(kernel.address)(ctypes.addressof(result), ctypes.addressof(error), *map(int, integers), unit)


def address(x):
    return x.ctypes.data


def lanes_of(dtype):
    """Rows of a tile of the forward pass on AVX-512; any number of vectors will do."""
    return 4 * Vector(8 * np.dtype(dtype).itemsize, HOST).width


def run(task, function, scores, positions, heads, mod_args=(), batch=0, j0=0, role="score_mod"):
    """Run a pass over a copy of a tile (keys, rows); return the tile, the slopes, and the kept scores."""
    values = as_arguments(mod_args)
    rule = find(role, function, describe(values), values)
    program = rule.with_slope if task in ("slope", "kept") else rule.program
    kernel = kernel_of(rule, task, program, 8 * scores.itemsize, scores.shape[1])
    tile, slopes, kept = scores.copy(), np.full_like(scores, np.nan), np.full_like(scores, np.nan)
    rows, of_rows = (np.asarray(x, np.int64) for x in (positions, heads))
    record = record_of(values)
    call(
        kernel, address(record), address(tile), len(tile), j0, batch, 0, address(rows), address(of_rows),
        address(slopes), address(kept),
    )  # fmt: skip
    return tile, slopes, kept


def plainly(function, scores, positions, heads, mod_args=(), batch=0, j0=0, with_score=True):
    """The same by plain Python, in float64."""
    function = getattr(function, "py_func", function)
    out = np.empty(scores.shape)
    for (j, lane), s in np.ndenumerate(scores.astype(np.float64)):
        first = (float(s),) if with_score else ()
        out[j, lane] = function(*first, batch, int(heads[lane]), int(positions[lane]), j0 + j, *mod_args)
    return out
