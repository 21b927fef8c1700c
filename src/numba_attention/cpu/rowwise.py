"""Functions of rows with features side by side, each in one pass over memory: norms with a residual, activations."""

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from .activations import activate_tile
from .scratch import Area, lay_out, views
from .simd import I64, Builder, Value, at, fetch_add, loop, pointer, routine, void_pointer
from .spec import Spec
from .views import carray

LAYER_NORM, RMS_NORM, ACTIVATION = range(3)
PART = 1024  # numbers that are summed in vectors; such sums are added in float64, so that errors do not grow with rows

ADDRESSES = ("x", "out", "weight", "bias", "residual", "coefficients", "counter", "scratch")
INTEGERS = (
    "items", "block", "rows", "features", "last", "x_row", "out_row", "residual_row", "task", "has_bias",
    "has_residual", "scratch_size", "at_tile",
)  # fmt: skip
PARAMS = np.dtype([(name, np.int64) for name in ADDRESSES + INTEGERS] + [("eps", np.float64)])
SECOND = 8 * 4  # byte offset of the second four addresses
OWN = 8 * 6  # byte offset of the addresses that are not arrays of the caller
pack_own = struct.Struct(f"={2 + len(INTEGERS)}qd").pack_into


def areas_of(spec: Spec) -> dict[str, Area]:
    """The scratch areas of one thread."""
    return {"tile": Area((spec.query_tile,), spec.vector.dtype)}


def scratch(spec: Spec) -> dict[str, int]:
    """Byte offset of the scratch area of one thread, and its size."""
    offsets, total = lay_out(areas_of(spec))
    return {"at_tile": offsets["tile"], "scratch_size": total}


def _real(spec: Spec) -> str:
    return "f64" if spec.vector.bits == 64 else "f32"


def _sum(spec: Spec, residual: bool = False, centred: bool = False) -> Any:
    """Make a sum over whole vectors at x.

    ``(x, y, out, count)``: the sum of x, or with a residual y of x + y, which is written to out.
    ``(x, mean, count)``: the sum of the squares of x - mean.
    """
    vector = spec.vector
    width = vector.bytes * vector.width
    lanes = 4  # sums of their own, because an addition waits some cycles for the one before

    def sums(b: Builder, count: Value, addresses: list[Value], term: Callable[[list[Value]], Value]) -> Value:
        whole = b.sdiv(count, I64(lanes))

        def four(i: Value, carried: list[Value]) -> list[Value]:
            places, totals = carried[: len(addresses)], carried[len(addresses) :]
            new = [b.fadd(t, term([at(b, p, n * width) for p in places])) for n, t in enumerate(totals)]
            return [*(at(b, p, lanes * width) for p in places), *new]

        def one(i: Value, carried: list[Value]) -> list[Value]:
            *places, total = carried
            return [*(at(b, p, width) for p in places), b.fadd(total, term(places))]

        *places, a, c, d, e = loop(b, whole, [*addresses, *[vector.const(0.0)] * lanes], four)
        total = b.fadd(b.fadd(a, c), b.fadd(d, e))
        total = loop(b, b.sub(count, b.mul(whole, I64(lanes))), [*places, total], one)[-1]
        return vector.sum(b, total)

    def plain(b: Builder, x: Value, y: Value, out: Value, count: Value) -> Value:
        def term(places: list[Value]) -> Value:
            value = vector.load(b, places[0])
            if residual:
                value = b.fadd(value, vector.load(b, places[1]))
                vector.store(b, value, places[2])
            return value

        return sums(b, count, [pointer(b, p) for p in ((x, y, out) if residual else (x,))], term)

    def squares(b: Builder, x: Value, mean: Value, count: Value) -> Value:
        average = vector.splat(b, mean)

        def term(places: list[Value]) -> Value:
            value = b.fsub(vector.load(b, places[0]), average)
            return b.fmul(value, value)

        return sums(b, count, [pointer(b, x)], term)

    if centred:
        return routine(f"x mean:{_real(spec)} count", squares, result=vector.numba_type)
    return routine("x y out count", plain, result=vector.numba_type)


def _scale(spec: Spec, bias: bool) -> Any:
    """Make ``scale(x, out, weight, bias, mean, inverse, count)``: (x - mean) * inverse * weight + bias, in vectors."""
    vector = spec.vector
    width = vector.bytes * vector.width

    def build(
        b: Builder, x: Value, out: Value, weight: Value, added: Value, mean: Value, inverse: Value, count: Value
    ) -> None:
        average, factor = vector.splat(b, mean), vector.splat(b, inverse)

        def one(i: Value, carried: list[Value]) -> list[Value]:
            source, target, w, *rest = carried
            value = b.fmul(b.fsub(vector.load(b, source), average), factor)
            if bias:
                value = vector.fma(b, value, vector.load(b, w), vector.load(b, rest[0]))
            else:
                value = b.fmul(value, vector.load(b, w))
            vector.store(b, value, target)
            return [at(b, p, width) for p in carried]

        loop(b, count, [pointer(b, p) for p in ((x, out, weight, added) if bias else (x, out, weight))], one)

    real = _real(spec)
    return routine(f"x out weight added mean:{real} inverse:{real} count", build)


def make_worker(spec: Spec) -> Callable[[int, int], int]:
    """Make the function that one thread runs: take blocks of rows until none is left."""
    W, size, BM = spec.vector.width, spec.vector.bytes, spec.query_tile
    real: Any = spec.vector.dtype
    add, add_residual, add_squares = _sum(spec), _sum(spec, residual=True), _sum(spec, centred=True)
    scale, scale_and_shift = _scale(spec, False), _scale(spec, True)
    activate = activate_tile(spec)
    (tile_of,) = views(areas_of(spec), "tile")

    @spec.jit
    def normalize(p: Any, x: int, residual: int, out: int) -> None:
        """One row. Its numbers come from memory once, and from the first-level cache then."""
        n = p.features
        whole = n - n % W
        source = carray(void_pointer(x), n, real)
        result = carray(void_pointer(out), n, real)
        total = 0.0
        if p.has_residual != 0:
            other = carray(void_pointer(residual), n, real)
            for first in range(0, whole, PART):
                at = first * size
                total += add_residual(x + at, residual + at, out + at, min(PART, whole - first) // W)
            for i in range(whole, n):
                result[i] = source[i] + other[i]
            x, source = out, result
        elif p.task == LAYER_NORM:
            for first in range(0, whole, PART):
                total += add(x + first * size, 0, 0, min(PART, whole - first) // W)
        mean = real(0)
        if p.task == LAYER_NORM:
            for i in range(whole, n):
                total += source[i]
            mean = real(total / n)
        squares = 0.0
        for first in range(0, whole, PART):
            squares += add_squares(x + first * size, mean, min(PART, whole - first) // W)
        for i in range(whole, n):
            squares += (source[i] - mean) * (source[i] - mean)
        inverse = real(1.0 / math.sqrt(squares / n + p.eps))
        weight = carray(void_pointer(p.weight), n, real)
        if p.has_bias != 0:
            scale_and_shift(x, out, p.weight, p.bias, mean, inverse, whole // W)
            bias = carray(void_pointer(p.bias), n, real)
            for i in range(whole, n):
                result[i] = (source[i] - mean) * inverse * weight[i] + bias[i]
        else:
            scale(x, out, p.weight, p.weight, mean, inverse, whole // W)
            for i in range(whole, n):
                result[i] = (source[i] - mean) * inverse * weight[i]

    @spec.jit
    def activate_row(p: Any, at: int, x: int, out: int, n: int) -> None:
        whole = n - n % BM
        source = carray(void_pointer(x), n, real)
        result = carray(void_pointer(out), n, real)
        activate(x, out, whole // BM, p.coefficients)
        if whole < n:
            tile = tile_of(p, at)
            tile[:] = 0
            for i in range(whole, n):
                tile[i - whole] = source[i]
            activate(at + p.at_tile, at + p.at_tile, 1, p.coefficients)
            for i in range(whole, n):
                result[i] = tile[i - whole]

    def worker(params: int, thread: int) -> int:
        p = carray(void_pointer(params), 1, PARAMS)[0]
        at = p.scratch + thread * p.scratch_size
        while True:
            item = fetch_add(p.counter, 1)
            if item >= p.items:
                return 0
            for row in range(item * p.block, min(p.rows, (item + 1) * p.block)):
                x, out = p.x + row * p.x_row, p.out + row * p.out_row
                if p.task == ACTIVATION:
                    activate_row(p, at, x, out, p.last if row == p.rows - 1 else p.features)
                else:
                    normalize(p, x, p.residual + row * p.residual_row, out)

    return worker
