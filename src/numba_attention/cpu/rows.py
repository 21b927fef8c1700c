"""The tables of a tile's rows, filled a vector of lanes at a time: addresses, intervals of keys, and the first state.

Row by row this takes 90 instructions a lane, 5 % of the time of a tile that sees 128 keys of 32 features.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from ..intervals import bind
from ..intervals import keys_of_row as rule_of_row
from .params import NEVER
from .simd import I64, Builder, Value, at, call, load, loop, pointer, routine, splat, store
from .softmax import BEFORE, MAX, SUM, SUM_HIGH, SUM_LOW
from .spec import Spec


class Lanes:
    """An int64 for each lane, with the operators that the rules of `intervals` have."""

    def __init__(self, b: Builder, value: Value) -> None:
        self.b, self.value = b, value

    def operand(self, other: Any) -> Value:
        """The vector of another operand, which may be a Python integer."""
        return other.value if isinstance(other, Lanes) else splat(self.b, I64(other), self.value.type.count)

    def __add__(self, other: Any) -> "Lanes":
        return Lanes(self.b, self.b.add(self.value, self.operand(other)))

    def __lt__(self, other: Any) -> Value:
        return self.b.icmp_signed("<", self.value, self.operand(other))


def _choose(condition: Value, x: Lanes, y: Any) -> Lanes:
    return Lanes(x.b, x.b.select(condition, x.value, x.operand(y)))


def _minimum(x: Lanes, y: Any) -> Lanes:
    return _choose(x < y, x, y)


def _maximum(x: Lanes, y: Any) -> Lanes:
    return _choose(x < y, Lanes(x.b, x.operand(y)), x)


_keys_of_row = bind(rule_of_row, _minimum, _maximum, _choose)


def _each_vector(spec: Spec, b: Builder, carried: list[Value], body: Callable[..., list[Value]]) -> list[Value]:
    """Run body(offset of the vector in a table, carried) over the vectors of int64 of a table of lanes."""
    width = spec.host.bits // 8
    return loop(b, I64(spec.query_tile * 8 // width), carried, lambda i, c: body(b.mul(i, I64(width)), c))


def _numbers(spec: Spec) -> Any:
    return ir.VectorType(I64, spec.host.bits // 64)


def place_addresses(spec: Spec) -> Any:
    """Make ``place(table, rows, heads, base, row, head)``: table[l] = base + rows[l] * row + heads[l] * head."""
    numbers = _numbers(spec)

    def build(b: Builder, table: Value, rows: Value, heads: Value, base: Value, row: Value, head: Value) -> None:
        base, row, head = (splat(b, x, numbers.count) for x in (base, row, head))
        target, rows, heads = (pointer(b, x) for x in (table, rows, heads))

        def body(offset: Value, _: list[Value]) -> list[Value]:
            x = b.add(base, b.mul(load(b, numbers, rows, offset, align=8), row))
            store(b, b.add(x, b.mul(load(b, numbers, heads, offset, align=8), head)), target, offset, align=8)
            return []

        _each_vector(spec, b, [], body)

    return routine("table rows heads base row head", build)


def place_intervals(spec: Spec) -> Any:
    """Make ``place(positions, starts, stops, low, high, queries, keys, prefix)``: the keys that each row sees.

    Rows are at `positions`, and the rest is as for `intervals.keys_of_row`. Returns the first and last key that any row
    sees, and those that all rows see.
    """
    numbers = _numbers(spec)
    lanes = numbers.count

    def build(b: Builder, positions: Value, starts: Value, stops: Value, *rest: Value) -> Value:
        positions, starts, stops = (pointer(b, x) for x in (positions, starts, stops))
        rule = [Lanes(b, splat(b, x, lanes)) for x in rest]

        def body(offset: Value, carried: list[Value]) -> list[Value]:
            any_start, any_stop, all_start, all_stop = (Lanes(b, x) for x in carried)
            start, stop = _keys_of_row(Lanes(b, load(b, numbers, positions, offset, align=8)), *rule)
            store(b, start.value, starts, offset, align=8)
            store(b, stop.value, stops, offset, align=8)
            sees = start < stop
            any_start = _choose(sees, _minimum(any_start, start), any_start)
            any_stop = _choose(sees, _maximum(any_stop, stop), any_stop)
            return [x.value for x in (any_start, any_stop, _maximum(all_start, start), _minimum(all_stop, stop))]

        first = [splat(b, I64(x), lanes) for x in (NEVER, 0, 0, NEVER)]
        result = ir.Constant(ir.ArrayType(I64, 4), ir.Undefined)
        folds = "smin", "smax", "smax", "smin"
        for n, (x, fold) in enumerate(zip(_each_vector(spec, b, first, body), folds, strict=True)):
            result = b.insert_value(result, call(b, f"llvm.vector.reduce.{fold}.v{lanes}i64", I64, x), n)
        return result

    names = "positions starts stops low high queries keys prefix"
    return routine(names, build, result=types.UniTuple(types.int64, 4))


def begin_state(spec: Spec) -> Any:
    """Make ``begin(state)``: the state of rows that have seen no key."""
    vector = spec.vector
    width = vector.bytes * vector.width
    rows = {MAX: float("-inf"), SUM: 0.0, BEFORE: float("-inf"), SUM_HIGH: 0.0, SUM_LOW: 0.0}

    def build(b: Builder, state: Value) -> None:
        for row, x in rows.items():
            for v in range(spec.block[1]):
                vector.store(b, vector.const(x), at(b, pointer(b, state), (row * spec.block[1] + v) * width))

    return routine("state", build)
