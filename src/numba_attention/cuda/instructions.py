"""Rules of callers on registers: the instructions of a program (`mods.program`) for the scores that a thread has.

A result is computed once for all scores that agree in what it depends on: a number that is read at a key, for all rows
of the thread. Arrays and numbers are found through a record in memory, one word of 64 bits for each: a number, or the
address of an array, which is contiguous, followed by the lengths of its axes.
"""

import math
from typing import Any

import numpy as np

from .emit import I32, I64, Emit, Pred, Real, Value

KINDS = {"b": "p", "i": "i", "l": "l"}  # of registers; real numbers have the kind of the scores
# How an element is read, and how many bytes it has.
ELEMENTS = {"bool": ("b", 1), "int32": ("i", 4), "int64": ("l", 8), "float32": ("f", 4), "float64": ("d", 8)}
LIBRARY = ("sqrt", "exp", "exp2", "log", "log2", "tanh", "floor", "ceil", "trunc", "rint")
# A multiple of pi/2 in three parts of few bits (Cody and Waite 1980), of which multiples of the first two are exact.
_PARTS = {
    "f": (1.5703125, 4.837512969970703e-4, 7.549789948768648e-8),
    "d": (1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624879595063154e-21),
}
_TERMS = {"f": 6, "d": 9}


class Evaluation:
    """The results of a program for scores, one after another.

    Parameters
    ----------
    e : Emit
    record : I64
        Address of the words of the arguments.
    program : mods.program.Program
    arguments : tuple of mods.language.Argument
        Kinds of `mod_args`.
    kind : {"f", "d"}
        Of scores.
    """

    def __init__(self, e: Emit, record: I64, program: Any, arguments: tuple[Any, ...], kind: str) -> None:
        self.e, self.record, self.arguments, self.kind = e, record, arguments, kind
        self.lines, self.outputs, self.sites = program.instructions, program.outputs, program.sites
        self.elements: list[tuple[int, I32]] = []  # array and element that each site reads for the last score
        self._uniform: set[int] = set()
        self.first = [0]  # of each argument, its first word
        for argument in arguments:
            self.first.append(self.first[-1] + 1 + argument.ndim)
        self.depends: list[tuple[str, ...]] = []
        for op, _, args, value in self.lines:
            names = {value} if op == "argument" else {name for x in args for name in self.depends[x]}
            self.depends.append(tuple(sorted(names)))
        self.known: dict[tuple[int, ...], Value] = {}

    def run(self, **given: Value) -> list[Value]:
        """The outputs for one score: given are score, batch, head, i and j."""
        results: list[Value] = []
        for n, line in enumerate(self.lines):
            if line.op == "argument":
                results.append(given[line.value])
                continue
            key = n, *(id(given[name]) for name in self.depends[n])
            if key not in self.known:
                self.known[key] = self._compute(n, results)
            results.append(self.known[key])
        self.elements = [self._element(n, results, given) for n in self.sites]
        return [results[n] for n in self.outputs]

    def is_uniform(self, index: I32) -> bool:
        """Whether all threads of a block read the same element there."""
        return id(index) in self._uniform

    def _element(self, n: int, results: list[Value], given: dict[str, Value]) -> tuple[int, I32]:
        _, _, args, (place, checked) = self.lines[n]
        names = {name for x in args for name in self.depends[x]}
        key = -1 - n, *(id(given[name]) for name in sorted(names))
        if key not in self.known:
            self.known[key] = self.flat_index(args, place, checked, results)
            if names <= {"batch", "head"}:
                self._uniform.add(id(self.known[key]))
        return place, self.known[key]

    def _kind(self, kind: str) -> str:
        return KINDS.get(kind, self.kind)

    def _word(self, place: int, n: int = 0, kind: str = "l") -> Value:
        return self.e.load_constant(kind, self.record + 8 * (self.first[place] + n))

    def _compute(self, n: int, results: list[Value]) -> Value:
        e, (op, kind, args, value) = self.e, self.lines[n]
        if op == "constant":
            return self._constant(kind, value)
        if op == "scalar":
            return self._scalar(value, kind)
        if op == "shape":
            return e.narrow(self._word(value[0], 1 + value[1]))
        if op == "load":
            return self._load(n, results)
        operands = [results[x] for x in args]
        own = self.lines[args[0]].kind
        if op == "select":
            return e.select(*operands)
        if op in ("real", "integer", "widen"):
            return self._converted(operands[0], self._kind(kind))
        if kind == "b":
            return self._truth(op, own, operands)
        if kind == "r":
            return self._real(op, operands, self._known(args[-1]))
        return self._integer(op, kind, operands, self._known(args[-1]))

    def _known(self, n: int) -> Any:
        """The value of a constant, or None."""
        return self.lines[n].value if self.lines[n].op == "constant" else None

    def _constant(self, kind: str, value: Any) -> Value:
        if kind == "b":
            return self.e.const("i", int(value)).equals(1)
        with np.errstate(over="ignore"):
            x = float(np.float32(value)) if kind == "r" and self.kind == "f" else value
        return self.e.const(self._kind(kind), x)

    def _scalar(self, place: int, kind: str) -> Value:
        if kind == "r":
            return self.e.convert(self.kind, self._word(place, kind="d"))
        word = self._word(place)
        if kind == "b":
            return word.equals(0) ^ 1
        return self.e.narrow(word) if kind == "i" else word

    def _converted(self, x: Value, kind: str) -> Value:
        e = self.e
        if x.kind == "p":
            return e.select(x, e.const(kind, 1), e.const(kind, 0))
        return e.wide(x) if kind == "l" and x.kind == "i" else e.convert(kind, x)

    def _truth(self, op: str, own: str, operands: list[Value]) -> Pred:
        x, y = operands[0], operands[-1]
        if op in ("and", "or", "not"):
            return x & y if op == "and" else x | y if op == "or" else x ^ 1
        if op == "isnan":
            return self.e.is_nan(x)
        if own == "b":
            x, y = self._converted(x, "i"), self._converted(y, "i")
        match op:
            case "lt":
                return x < y
            case "le":
                return x <= y
            case "gt":
                return x > y
            case "ge":
                return x >= y
        return x.equals(y) if op == "eq" else x.equals(y) ^ 1

    # Real numbers

    def _real(self, op: str, operands: list[Real], known: float | None) -> Real:
        e, x, y = self.e, operands[0], operands[-1]
        match op:
            case "add":
                return x + y
            case "sub":
                return x - y
            case "mul":
                return x * y
            case "div":
                return x / y
            case "neg":
                return x * -1.0
            case "abs":
                return e.abs(x)
            case "min":
                return e.select(y < x, y, x)
            case "max":
                return e.select(y > x, y, x)
            case "sin" | "cos":
                return self._sine(x, op == "cos")
            case "pow":
                return self._power(x, y, known)
        return e.library(op, x)

    def _power(self, x: Real, y: Real, known: float | None) -> Real:
        """x**y as 2**(y log2 |x|), whose relative error is that of the exponent, with the signs of IEEE 754."""
        e = self.e
        nan, one = (e.const(self.kind, number) for number in (math.nan, 1.0))
        result = e.library("exp2", e.library("log2", e.abs(x)) * y)
        if known is not None and known % 1 and abs(known) < math.inf:
            return e.select(x < 0.0, nan, result)
        whole, half = e.library("floor", y).equals(y), y * 0.5
        odd = whole & (e.library("floor", half).equals(half) ^ 1)
        signed = e.select(odd, result * -1.0, e.select(whole, result, nan))
        return e.select(y.equals(0.0) | x.equals(1.0), one, e.select(x < 0.0, signed, result))

    def _sine(self, x: Real, cosine: bool) -> Real:
        """sin(x) or cos(x), as on the CPU: libdevice keeps a table on the stack for numbers beyond 1e5."""
        e, kind = self.e, self.kind
        zero = e.const(kind, 0.0)
        quarter = e.library("rint", x * (2 / math.pi))
        for part in _PARTS[kind]:
            x = e.fma(quarter, e.const(kind, -part), x)
        one = e.const(kind, 1.0)
        x = e.select(x > one, one, e.select(x < zero - one, zero - one, x))  # `min` and `max` would lose NaN
        z = x * x
        of_sin, of_cos = [1.0], [1.0]
        for n in range(1, _TERMS[kind]):
            of_sin.append(-of_sin[-1] / (2 * n * (2 * n + 1)))
            of_cos.append(-of_cos[-1] / (2 * n * (2 * n - 1)))
        sine, cosine_of = (e.const(kind, terms[-1]) for terms in (of_sin, of_cos))
        for of_one, of_other in zip(of_sin[-2::-1], of_cos[-2::-1], strict=True):
            sine, cosine_of = e.fma(sine, z, e.const(kind, of_one)), e.fma(cosine_of, z, e.const(kind, of_other))
        rest = quarter - e.library("floor", quarter * 0.25) * 4.0
        turn = e.convert("i", rest) + (1 if cosine else 0)
        result = e.select((turn & 1) > 0, cosine_of, sine * x)
        return e.select((turn & 2) > 0, zero - result, result)

    # Integers

    def _integer(self, op: str, kind: str, operands: list[Value], known: int | None) -> Value:
        e, x, y = self.e, operands[0], operands[-1]
        match op:
            case "add":
                return x + y
            case "sub":
                return x - y
            case "mul":
                return x * y
            case "and":
                return x & y
            case "or":
                return x | y
            case "xor":
                return x ^ y
            case "neg":
                return 0 - x
            case "invert":
                return x ^ -1
            case "abs":
                return e.select(x < 0, 0 - x, x)
            case "min":
                return e.select(y < x, y, x)
            case "max":
                return e.select(y > x, y, x)
            case "shl" | "shr":
                most = 63 if kind == "l" else 31
                y = e.select((y < 0) | (y > most), e.const(kind, most), y)
                return x << y if op == "shl" else self._shifted(x, y)
        if known is not None and known > 0 and known & (known - 1) == 0:
            power = e.const(kind, known.bit_length() - 1)
            return self._shifted(x, power) if op == "floordiv" else x & (known - 1)
        quotient = self._quotient(x, y)
        return quotient if op == "floordiv" else e.select(y.equals(0), e.const(kind, 0), x - quotient * y)

    def _shifted(self, x: Value, count: Value) -> Value:
        """Shift right with the sign."""
        return self.e.select(x < 0, ((x ^ -1) >> count) ^ -1, x >> count)

    def _quotient(self, x: Value, y: Value) -> Value:
        """Divide and round down, by division without sign; by 0 it is 0."""
        e = self.e
        zero, one = e.const(x.kind, 0), e.const(x.kind, 1)
        divisor = e.select(y.equals(0), one, e.select(y < 0, 0 - y, y))
        # Rounded down: where signs differ, of -|x| it is ~((|x| - 1) // |y|).
        differ = (x ^ y) < 0
        size = e.select(x < 0, 0 - x, x)
        below = differ & (size > 0)
        found = e.select(below, size - 1, size) // divisor
        return e.select(y.equals(0), zero, e.select(below, found ^ -1, found))

    # Arrays

    def _load(self, n: int, results: list[Value]) -> Value:
        e, (_, _, args, (place, checked)) = self.e, self.lines[n]
        unit, size = ELEMENTS[self.arguments[place].dtype]
        address = self._word(place) + e.wide(self.flat_index(args, place, checked, results)) * size
        x = e.load_constant(unit, address)
        if unit == "b":
            return x > 0
        return e.convert(self.kind, x) if unit in "fd" else x

    def flat_index(self, args: tuple[int, ...], place: int, checked: tuple[bool, ...], results: list[Value]) -> I32:
        """The number of the element at the indices, each kept within its axis."""
        flat = None
        for axis, (x, is_checked) in enumerate(zip(args, checked, strict=True)):
            index, length = results[x], self.e.narrow(self._word(place, 1 + axis))
            if not is_checked:
                index = self._inside(index, length)
            flat = index if flat is None else flat * length + index
        assert flat is not None
        return flat

    def _inside(self, index: Value, length: I32) -> I32:
        """An index as Python has it, counted from the end where it is negative, and kept within the axis."""
        e = self.e
        if index.kind == "l":
            size = e.wide(length)
            index = e.select(index < 0, index + size, index)
            return e.narrow(e.max(e.min(index, size - 1), 0))
        index = e.select(index < 0, index + length, index)
        return e.max(e.min(index, length - 1), 0)
