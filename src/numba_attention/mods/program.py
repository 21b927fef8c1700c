"""A rule for one score as a straight-line program: what every backend compiles, and what is differentiated.

An instruction computes one number from others, in static single assignment form. Branches have become selections and
loops have been unrolled (`language`), so that all queries of a vector take the same path. Equal instructions are one
(common subexpressions), and what is constant is computed here. The text of a program decides what it compiles to, and
so is its key in the kernel cache.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# Kinds of numbers, each of which converts to those after it: truth values, integers of 32 and of 64 bits, and real
# numbers of the width in which scores are computed.
BOOL, INT, LONG, REAL = KINDS = "bilr"
LARGEST = 2**31  # int32 holds integers below it
LENGTH = 20_000  # instructions of a program; each is some 5 ns of compiling, and rules in use have less than 100

Number = bool | int | float


class Instruction(NamedTuple):
    """One number: ``op`` of the results of earlier instructions, `args`, and of a `value` that is known.

    argument: score, batch, head, i or j. constant: a number. scalar: a number in `mod_args`, by its place there.
    shape: the length of an axis (place, axis). load: an element of the array at a place; its args are the indices, and
    `value` says which of them are checked before the call. The others are arithmetic.
    """

    op: str
    kind: str
    args: tuple[int, ...] = ()
    value: Any = None


class Bound(NamedTuple):
    """An index that is read as it comes and must lie within an axis: batch, head, i or j themselves."""

    place: int  # of the array in mod_args
    axis: int
    name: str


class Program(NamedTuple):
    """Instructions, the numbers of those whose results are wanted, and the reads of arrays that are differentiated.

    `outputs` are: of a score rule, the score; with its slope, the score and its derivative with respect to the score;
    of the gradients of arrays, the derivative with respect to each of `sites`, the instructions that load.
    """

    instructions: tuple[Instruction, ...]
    outputs: tuple[int, ...]
    sites: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """Everything that decides what this compiles to."""
        return f"{self.outputs} {self.sites}\n" + "\n".join(repr(tuple(line)) for line in self.instructions)

    @property
    def bounds(self) -> set[Bound]:
        """The indices to be checked before a call."""
        return {
            Bound(line.value[0], axis, self.instructions[line.args[axis]].value)
            for line in self.instructions
            if line.op == "load"
            for axis, checked in enumerate(line.value[1])
            if checked
        }


def _floordiv(x: Any, y: Any) -> Any:
    return x // y


def _shl(x: Any, y: Any) -> Any:
    if y >= 64:  # as the kernel computes it: Python would write out all bits
        raise OverflowError
    return x << y


FOLDS: dict[str, Callable[..., Any]] = {
    "real": float, "integer": int, "widen": int,
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg,
    "abs": abs, "floordiv": _floordiv, "mod": operator.mod,
    "min": lambda x, y: y if y < x else x, "max": lambda x, y: y if y > x else x,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor, "shl": _shl, "shr": operator.rshift,
    "invert": operator.invert, "not": operator.not_,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
    "sqrt": math.sqrt, "exp": math.exp, "exp2": lambda x: 2.0**x, "log": math.log, "log2": math.log2,
    "tanh": math.tanh, "sin": math.sin, "cos": math.cos, "pow": math.pow, "isnan": math.isnan,
    "floor": lambda x: float(math.floor(x)), "ceil": lambda x: float(math.ceil(x)),
    "trunc": lambda x: float(math.trunc(x)), "rint": lambda x: float(round(x)),
}  # fmt: skip
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


class Builder:
    """Writes instructions, each at most once."""

    def __init__(self) -> None:
        self.lines: list[Instruction] = []
        self.turns = 0  # of loops that were unrolled
        self._numbers: dict[Any, int] = {}

    def _add(self, op: str, kind: str, args: tuple[int, ...] = (), value: Any = None) -> int:
        line = Instruction(op, kind, args, value)
        key = (op, kind, args, repr(value))  # repr distinguishes 0.0 from -0.0, and 1 from True
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.lines)
            self.lines.append(line)
        return number

    def kind(self, number: int) -> str:
        return self.lines[number].kind

    def known(self, number: int) -> Number | None:
        """The value of a constant, or None."""
        line = self.lines[number]
        return line.value if line.op == "constant" else None

    def argument(self, name: str) -> int:
        return self._add("argument", REAL if name == "score" else INT, value=name)

    def scalar(self, place: int, kind: str) -> int:
        return self._add("scalar", kind, value=place)

    def shape(self, place: int, axis: int) -> int:
        return self._add("shape", INT, value=(place, axis))

    def load(self, place: int, kind: str, indices: tuple[int, ...], checked: tuple[bool, ...]) -> int:
        return self._add("load", kind, indices, (place, checked))

    def constant(self, value: Number) -> int:
        if isinstance(value, bool):
            kind = BOOL
        elif isinstance(value, int):
            kind = INT if -LARGEST <= value < LARGEST else LONG
        else:
            kind, value = REAL, float(value)
        return self._add("constant", kind, value=value)

    def compute(self, op: str, kind: str, *args: int) -> int:
        """An instruction whose operands have the right kinds already, or its result if that is known."""
        known = [self.known(x) for x in args]
        if args and None not in known and op in FOLDS:
            try:
                value = FOLDS[op](*known)
                if kind == LONG:
                    return self._add("constant", LONG, value=value)
                if not isinstance(value, complex):
                    return self.constant(float(value) if kind == REAL else value)
            except (ArithmeticError, ValueError):
                pass  # as the kernel computes it: infinity, NaN
        return self._add(op, kind, args)

    def to(self, kind: str, x: int) -> int:
        """Convert to a kind further on in `KINDS`."""
        own = self.kind(x)
        if own == kind:
            return x
        return self.compute("real" if kind == REAL else "widen", kind, x)

    def joined(self, *args: int) -> tuple[str, list[int]]:
        """Operands in the kind to which all of them convert, and that kind."""
        kind = max((self.kind(x) for x in args), key=KINDS.index)
        return kind, [self.to(kind, x) for x in args]

    def arithmetic(self, op: str, *args: int) -> int:
        """Numbers of any kinds, truth values counting as 0 and 1."""
        kind, operands = self.joined(*args)
        if kind == BOOL:
            kind, operands = INT, [self.to(INT, x) for x in operands]
        return self.compute(op, kind, *operands)

    def of_reals(self, op: str, *args: int) -> int:
        return self.compute(op, REAL, *(self.to(REAL, x) for x in args))

    def compare(self, op: str, x: int, y: int) -> int:
        _, operands = self.joined(x, y)
        return self.compute(op, BOOL, *operands)

    def truth(self, x: int) -> int:
        """What Python takes for true."""
        if self.kind(x) == BOOL:
            return x
        return self.compare("ne", x, self.constant(0))

    def both(self, x: int, y: int) -> int:
        if self.known(x) is False or self.known(y) is True or x == y:
            return x
        if self.known(y) is False or self.known(x) is True:
            return y
        return self._add("and", BOOL, (x, y))

    def either(self, x: int, y: int) -> int:
        if self.known(x) is True or self.known(y) is False or x == y:
            return x
        if self.known(y) is True or self.known(x) is False:
            return y
        p, q = self.lines[x], self.lines[y]
        if p.op == q.op == "and" and p.args[0] == q.args[0] and self.negation(p.args[1]) == q.args[1]:
            return p.args[0]  # two branches that meet again
        return self._add("or", BOOL, (x, y))

    def negation(self, x: int) -> int:
        line = self.lines[x]
        return line.args[0] if line.op == "not" else self.compute("not", BOOL, x)

    def choose(self, condition: int, x: int, y: int) -> int:
        kind, (x, y) = self.joined(x, y)
        if x == y or self.known(condition) is True:
            return x
        if self.known(condition) is False:
            return y
        line = self.lines[condition]
        if line.op == "not":
            condition, x, y = line.args[0], y, x
        return self._add("select", kind, (condition, x, y))

    def program(self, outputs: list[int], sites: list[int] | None = None) -> Program:
        """The instructions that the outputs need, numbered anew."""
        sites = sites or []
        needed, waiting = set(), [*outputs, *sites]
        while waiting:
            number = waiting.pop()
            if number not in needed:
                needed.add(number)
                waiting += self.lines[number].args
        place = {number: n for n, number in enumerate(sorted(needed))}
        lines = tuple(
            self.lines[number]._replace(args=tuple(place[x] for x in self.lines[number].args)) for number in place
        )
        return Program(lines, tuple(place[n] for n in outputs), tuple(place[n] for n in sites))


def nonnegative(lines: tuple[Instruction, ...] | list[Instruction]) -> list[bool]:
    """Which integers cannot be negative: indices that need no wraparound. i may be, where queries precede the keys."""
    result: list[bool] = []
    for op, kind, args, value in lines:
        of = [result[x] for x in args]
        sure = kind == BOOL
        if op == "constant":
            sure = value >= 0
        elif op == "argument":
            sure = value in ("batch", "head", "j")
        elif op in ("shape", "abs"):
            sure = True
        elif op == "max":
            sure = any(of)
        elif op in ("min", "add", "mul", "floordiv", "shr", "real", "integer", "widen", "or", "xor"):
            sure = bool(of) and all(of)
        elif op == "mod":
            sure = of[1]
        elif op == "and":
            sure = kind == BOOL or any(of)
        elif op == "select":
            sure = of[1] and of[2]
        result.append(sure)
    return result


Tangents = dict[int, int]  # seed to derivative


class _Derivatives:
    """Dual numbers [1]_: with every instruction, its derivatives with respect to the seeds that it depends on.

    Chosen for its robustness: what a selection leaves out leaves nothing behind, not even 0 times infinity.

    References
    ----------
    .. [1] Wengert, "A simple automatic derivative evaluation program", 1964.
    """

    def __init__(self, b: Builder, seeds: list[int]) -> None:
        self.b = b
        self.of: dict[int, Tangents] = {seed: {seed: b.constant(1.0)} for seed in seeds}

    def through(self, outputs: list[int]) -> None:
        """Differentiate all instructions up to the outputs."""
        for number in range(max(outputs) + 1):
            if number not in self.of:
                line = self.b.lines[number]
                operands = [self.of.get(x, {}) for x in line.args]
                if line.kind == REAL and any(operands):
                    of = {seed: self._rule(number, line, [t.get(seed) for t in operands]) for seed in _seeds(operands)}
                    self.of[number] = {seed: x for seed, x in of.items() if x is not None}

    def _times(self, x: int | None, y: int) -> int | None:
        if x is None or self.b.known(y) == 1:
            return x
        return y if self.b.known(x) == 1 else self.b.of_reals("mul", x, y)

    def _sum(self, x: int | None, y: int | None) -> int | None:
        return y if x is None else x if y is None else self.b.of_reals("add", x, y)

    def _rule(self, number: int, line: Instruction, d: list[int | None]) -> int | None:
        b, args = self.b, line.args
        one, zero = b.constant(1.0), b.constant(0.0)
        x = args[0]

        def reals(op: str, *operands: int) -> int:
            return b.of_reals(op, *operands)

        match line.op:
            case "add":
                return self._sum(d[0], d[1])
            case "sub":
                return self._sum(d[0], None if d[1] is None else reals("neg", d[1]))
            case "neg":
                return None if d[0] is None else reals("neg", d[0])
            case "mul":
                return self._sum(self._times(d[0], args[1]), self._times(d[1], x))
            case "div":
                of_y = None if d[1] is None else reals("neg", reals("mul", number, d[1]))
                above = self._sum(d[0], of_y)
                return None if above is None else reals("div", above, args[1])
            case "min" | "max":
                second = b.compare("lt" if line.op == "min" else "gt", args[1], x)
                return b.choose(second, zero if d[1] is None else d[1], zero if d[0] is None else d[0])
            case "select":
                return b.choose(x, zero if d[1] is None else d[1], zero if d[2] is None else d[2])
            case "abs":
                return self._times(d[0], b.choose(b.compare("lt", x, zero), b.constant(-1.0), one))
            case "sqrt":
                return None if d[0] is None else reals("div", reals("mul", d[0], b.constant(0.5)), number)
            case "exp":
                return self._times(d[0], number)
            case "exp2":
                return self._times(d[0], reals("mul", number, b.constant(math.log(2))))
            case "log":
                return None if d[0] is None else reals("div", d[0], x)
            case "log2":
                return None if d[0] is None else reals("div", d[0], reals("mul", x, b.constant(math.log(2))))
            case "tanh":
                return self._times(d[0], reals("sub", one, reals("mul", number, number)))
            case "sin":
                return self._times(d[0], reals("cos", x))
            case "cos":
                return self._times(d[0], reals("neg", reals("sin", x)))
            case "pow":
                less = reals("pow", x, reals("sub", args[1], one))
                of_base = self._times(d[0], reals("mul", args[1], less))
                of_exponent = self._times(d[1], reals("mul", number, reals("log", x)))
                if of_exponent is not None:
                    of_exponent = b.choose(b.compare("gt", x, zero), of_exponent, zero)
                return self._sum(of_base, of_exponent)
        return None  # floor and the like: steps


def _seeds(operands: list[Tangents]) -> Iterator[int]:
    return iter(dict.fromkeys(seed for tangents in operands for seed in tangents))


def slope(b: Builder, output: int) -> int:
    """The derivative of a score rule with respect to its score; 0 if it does not depend on it."""
    score = b.argument("score")
    derivatives = _Derivatives(b, [score])
    derivatives.through([output])
    return derivatives.of.get(output, {}).get(score, b.constant(0.0))


def gradients(b: Builder, output: int, places: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The derivatives of a score rule with respect to each read of the arrays at these places, and those reads."""
    sites = [n for n, line in enumerate(b.lines) if line.op == "load" and line.value[0] in places]
    derivatives = _Derivatives(b, sites)
    derivatives.through([output])
    of_output = derivatives.of.get(output, {})
    return list(of_output.values()), list(of_output)
