"""Activations on vectors: x times a logistic function of an odd polynomial, ``x / (1 + 2**(x Q(x**2)))``.

GELU, its approximation with tanh, and SiLU are this function with other coefficients, so one piece of machine code
serves all: after a matrix product while its tile is in the cache (`linear`), and over arrays (`rowwise`). A quotient
does not cancel where x is negative, as ``x * (1 + erf) / 2`` does.
"""

from functools import cache
from typing import Any

from .exp import exp2_anywhere
from .simd import Builder, Value, at, load, loop, pointer, routine
from .spec import Spec

TERMS = 8  # coefficients of Q, constant first
LARGEST = 1e18  # of x**2: its eighth power may overflow, but times a coefficient of 0 it must not be NaN


@cache
def activate_tile(spec: Spec) -> Any:
    """Make ``activate(tile, out, rows, coefficients)``: the function of each number of a tile; `out` may be the tile.

    `coefficients` is the address of those of Q, as compute values.
    """
    vector, NV = spec.vector, spec.block[1]
    width = vector.bytes * vector.width

    def build(b: Builder, tile: Value, out: Value, rows: Value, coefficients: Value) -> None:
        p = pointer(b, coefficients)
        q = [vector.splat(b, load(b, vector.element, p, n * vector.bytes, align=vector.bytes)) for n in range(TERMS)]
        one, largest = vector.const(1.0), vector.const(LARGEST)

        def row(i: Value, carried: list[Value]) -> list[Value]:
            source, target = carried
            for v in range(NV):
                x = vector.load(b, source, v * width)
                square = vector.min(b, largest, b.fmul(x, x))
                polynomial = q[-1]
                for coefficient in q[-2::-1]:
                    polynomial = vector.fma(b, polynomial, square, coefficient)
                power = exp2_anywhere(vector, b, b.fmul(x, polynomial), 1.0)
                vector.store(b, b.fdiv(x, b.fadd(one, power)), target, v * width)
            return [at(b, p, NV * width) for p in carried]

        loop(b, rows, [pointer(b, tile), pointer(b, out)], row)

    return routine("tile out rows coefficients", build)
