"""Expressions of a mod as instructions: operators, reads of arrays, calls, and names from outside."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np

from .names import Names
from .program import BOOL, INT, REAL, Number
from .reads import undispatched
from .source import source_of
from .values import Array, Env, Range, Undefined
from .vocabulary import BINARY, COMPARISONS, LISTED, REALS, meaning_of

DEPTH = 32  # of helper functions that call one another


class Expressions(Names):
    """The expressions of one function at work."""

    def run(self, operands: list[Any], guarded: bool) -> Any:
        """Bind the parameters, carry out the body, and return the result: of `statements.Frame`."""
        raise NotImplementedError

    def value(self, node: ast.expr, env: Env) -> Any:
        """The number of the instruction that computes an expression; also an array, a tuple or a range."""
        x = self.expression(node, env)
        if isinstance(x, Undefined):
            self.source.refuse(node, x.why)
        return x

    def number(self, node: ast.expr, env: Env) -> int:
        x = self.value(node, env)
        if isinstance(x, Array):
            ndim = self.whole.arguments[x.place].ndim
            self.source.refuse(node, f"this is an array with {ndim} axes: read an element, with {ndim} indices")
        if not isinstance(x, int):
            self.source.refuse(node, "a number is expected here")
        return x

    def truth(self, node: ast.expr, env: Env) -> int:
        return self.b.truth(self.number(node, env))

    def expression(self, node: ast.expr, env: Env) -> Any:
        match node:
            case ast.Constant(value=value):
                return self.constant(node, value)
            case ast.Name(id=name) if name in env:
                return env[name]
            case ast.Name() | ast.Attribute():
                return self.outside(node, env)
            case ast.BinOp(left=left, op=op, right=right):
                return self.binary(node, op, self.number(left, env), self.number(right, env))
            case ast.UnaryOp(op=op, operand=operand):
                return self.unary(node, op, self.number(operand, env))
            case ast.Compare():
                return self.comparison(node, env)
            case ast.BoolOp(op=op, values=parts):
                return self.connected(op, parts, env)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                condition = self.truth(test, env)
                known = self.b.known(condition)
                if known is not None:
                    return self.value(body if known else orelse, env)
                guarded, self.guarded = self.guarded, True
                x, y = self.value(body, env), self.value(orelse, env)
                self.guarded = guarded
                return self.select(condition, x, y)
            case ast.Tuple(elts=parts):
                return tuple(self.value(part, env) for part in parts)
            case ast.Subscript(value=array, slice=index):
                return self.element(node, self.value(array, env), index, env)
            case ast.Call():
                return self.call(node, env)
            case _:
                what = type(node).__name__
                self.source.refuse(node, f"{what} is not available in a mod: it is a formula for one score")

    def select(self, condition: int, x: Any, y: Any) -> Any:
        if x == y and type(x) is type(y):
            return x
        if isinstance(x, int) and isinstance(y, int):
            return self.b.choose(condition, x, y)
        if type(x) is tuple and type(y) is tuple and len(x) == len(y):
            return tuple(self.select(condition, p, q) for p, q in zip(x, y, strict=True))
        for z in (x, y):
            if isinstance(z, Undefined):
                return z
        return Undefined("only numbers can be chosen by a condition, not arrays")

    def outside(self, node: ast.expr, env: Env) -> Any:
        if isinstance(node, ast.Name):
            return self.constant(node, self.name(node))
        assert isinstance(node, ast.Attribute)
        root = node.value
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(root, ast.Name) and root.id not in env:
            x = self.find(node, env)
            if x is not None:
                return self.constant(node, x)
            self.source.refuse(node, "only modules and arrays have attributes in a mod")
        base = self.value(node.value, env)
        if isinstance(base, Array):
            return self.attribute(node, base)
        self.source.refuse(node, f"a number has no attribute {node.attr!r} in a mod")

    def attribute(self, node: ast.Attribute, array: Array) -> Any:
        ndim = self.whole.arguments[array.place].ndim
        if not array.indices and node.attr == "shape":
            return tuple(self.b.shape(array.place, axis) for axis in range(ndim))
        if not array.indices and node.attr == "ndim":
            return self.b.constant(ndim)
        if not array.indices and node.attr == "size":
            size = self.b.constant(1)
            for axis in range(ndim):
                size = self.b.arithmetic("mul", size, self.b.shape(array.place, axis))
            return size
        self.source.refuse(node, "of an array, a mod can use elements, shape, size and ndim")

    def element(self, node: ast.expr, array: Any, index: ast.expr, env: Env) -> Any:
        if type(array) is tuple:
            at = self.whole.b.known(self.number(index, env))
            if not isinstance(at, int) or not -len(array) <= at < len(array):
                self.source.refuse(index, f"an index within {len(array)} values, known beforehand, is expected here")
            return array[at]
        if not isinstance(array, Array):
            self.source.refuse(node, "only arrays of mod_args and tuples have elements in a mod")
        argument = self.whole.arguments[array.place]
        kind, ndim = argument.kind, argument.ndim
        indices = list(array.indices)
        for part in index.elts if isinstance(index, ast.Tuple) else [index]:
            if isinstance(part, ast.Slice) or (isinstance(part, ast.Constant) and part.value in (None, ...)):
                self.source.refuse(part, "slices are not available in a mod: read elements")
            x = self.number(part, env)
            if self.b.kind(x) == REAL:
                self.source.refuse(part, "an index must be an integer; convert it with int(...)")
            is_bare = self.b.lines[x].op == "argument" and not self.guarded
            indices.append((self.b.to(INT, x) if self.b.kind(x) == BOOL else x, is_bare))
        if len(indices) > ndim:
            self.source.refuse(index, f"{len(indices)} indices for an array with {ndim} axes")
        if len(indices) < ndim:
            return Array(array.place, tuple(indices))
        return self.b.load(array.place, kind, tuple(x for x, _ in indices), tuple(bare for _, bare in indices))

    def unary(self, node: ast.AST, op: ast.unaryop, x: int) -> int:
        b = self.b
        if isinstance(op, ast.Not):
            return b.negation(b.truth(x))
        if isinstance(op, ast.USub):
            return b.arithmetic("neg", x)
        if isinstance(op, ast.UAdd):
            return b.to(INT, x) if b.kind(x) == BOOL else x
        if b.kind(x) in (BOOL, REAL):
            self.source.refuse(node, "~ is for integers; the opposite of a truth value is `not x`")
        return b.compute("invert", b.kind(x), x)

    def binary(self, node: ast.AST, op: ast.operator, x: Any, y: Any) -> int:
        b, name = self.b, BINARY.get(type(op))
        if name is None or not isinstance(x, int) or not isinstance(y, int):
            self.source.refuse(node, "this operation is not available in a mod")
        kinds = {b.kind(x), b.kind(y)}
        if name in ("and", "or", "xor", "shl", "shr"):
            if REAL in kinds:
                self.source.refuse(node, "this operation is for integers and truth values")
            if kinds == {BOOL} and name in ("and", "or", "xor"):
                return b.both(x, y) if name == "and" else b.either(x, y) if name == "or" else b.compare("ne", x, y)
            return b.arithmetic(name, x, y)
        if name == "div":
            return b.of_reals("div", x, y)
        if name == "pow":
            return self.power(x, y)
        if name in ("floordiv", "mod") and REAL in kinds:
            whole = b.of_reals("floor", b.of_reals("div", x, y))
            return whole if name == "floordiv" else b.of_reals("sub", x, b.of_reals("mul", whole, y))
        return b.arithmetic(name, x, y)

    def power(self, x: int, y: int) -> int:
        b, exponent, base = self.b, self.b.known(y), self.b.known(x)
        if exponent is not None and math.isfinite(exponent) and exponent == int(exponent):
            n = int(exponent)
            real = isinstance(exponent, float) or n < 0
            if abs(n) <= 16:
                power, square, rest = b.constant(1), b.to(REAL, x) if real else x, abs(n)
                while rest:
                    if rest & 1:
                        power = square if b.known(power) == 1 else b.arithmetic("mul", power, square)
                    square, rest = b.arithmetic("mul", square, square), rest >> 1
                power = b.to(REAL, power) if real else power
                return b.of_reals("div", b.constant(1.0), power) if n < 0 else power
        if exponent == 0.5:
            return b.of_reals("sqrt", x)
        if base is not None and base > 0:
            return b.of_reals("exp2", b.of_reals("mul", b.of_reals("log2", x), y))
        return b.of_reals("pow", x, y)

    def comparison(self, node: ast.Compare, env: Env) -> int:
        parts = [self.number(part, env) for part in (node.left, *node.comparators)]
        result = self.true
        for op, x, y in zip(node.ops, parts, parts[1:], strict=False):
            name = COMPARISONS.get(type(op))
            if name is None:
                self.source.refuse(node, "in and is are not available in a mod: compare numbers")
            result = self.b.both(result, self.b.compare(name, x, y))
        return result

    def connected(self, op: ast.boolop, parts: list[ast.expr], env: Env) -> int:
        """Carry out `and` and `or`, which return one of their operands."""
        b, guarded = self.b, self.guarded
        result = self.number(parts[0], env)
        for part in parts[1:]:
            first = b.truth(result)
            if b.known(first) is isinstance(op, ast.Or):
                break
            self.guarded = guarded or b.known(first) is None
            x = self.number(part, env)
            if b.kind(result) == b.kind(x) == BOOL:
                result = b.both(result, x) if isinstance(op, ast.And) else b.either(result, x)
            else:
                result = b.choose(first, *((x, result) if isinstance(op, ast.And) else (result, x)))
        self.guarded = guarded
        return result

    # Calls

    def call(self, node: ast.Call, env: Env) -> Any:
        function = self.find(node.func, env)
        if function is None:
            self.source.refuse(node.func, f"this cannot be called in a mod; use {LISTED}, or functions of your own")
        if any(isinstance(x, ast.Starred) for x in node.args) or any(x.arg is None for x in node.keywords):
            self.source.refuse(node, "* and ** are not available in a mod")
        function = undispatched(function)
        if isinstance(function, FunctionType):
            return self.expand(node, function, env)
        if node.keywords:
            self.source.refuse(node, "this function takes no keywords in a mod")
        known = meaning_of(function)
        if known is None:
            dotted = ast.unparse(node.func)
            self.source.refuse(node.func, f"{dotted} is not available in a mod; use one of {LISTED}")
        return self.builtin(known, node, env)

    def expand(self, node: ast.Call, function: FunctionType, env: Env) -> Any:
        """Carry out a helper function in place."""
        if self.depth >= DEPTH:
            self.source.refuse(node, f"functions call one another more than {DEPTH} deep: recursion is not available")
        try:
            source = source_of(function)
        except TypeError as error:
            self.source.refuse(node, str(error))
        operands = [self.value(x, env) for x in node.args]
        by_name = {x.arg: self.value(x.value, env) for x in node.keywords}
        names = [x.arg for x in [*source.node.args.posonlyargs, *source.node.args.args]]
        defaults = dict(zip(reversed(names), reversed(function.__defaults__ or ()), strict=False))
        for name in names[len(operands) :]:
            if name in by_name:
                operands.append(by_name.pop(name))
            elif name in defaults:
                operands.append(self.constant(node, defaults[name]))
            else:
                self.source.refuse(node, f"{function.__name__} needs a value for {name}")
        if by_name or len(operands) > len(names):
            self.source.refuse(node, f"{function.__name__} takes {', '.join(names)}")
        result = type(self)(self.whole, source, self.depth + 1, self.path_of(node.func)).run(operands, self.guarded)
        source.check()
        return result

    def builtin(self, name: str, node: ast.Call, env: Env) -> Any:
        b = self.b
        match name, node.args:
            case "real", [ast.Constant(value=str(text))]:
                try:
                    return b.constant(float(text))
                except ValueError:
                    self.source.refuse(node, f"float({text!r}) is no number")
            case "range", parts if 1 <= len(parts) <= 3:
                try:
                    return Range(range(*(self.length(x, env) for x in parts)))
                except ValueError as error:
                    self.source.refuse(node, str(error))
            case "len", [part]:
                x = self.value(part, env)
                if isinstance(x, Array) and not x.indices:
                    return b.shape(x.place, 0)
                if type(x) is tuple:
                    return b.constant(len(x))
                self.source.refuse(part, "len is for arrays of mod_args")
        x = [self.number(part, env) for part in node.args]
        match name, x:
            case (("min" | "max"), [first, second, *others]):
                result = b.arithmetic(name, first, second)
                for other in others:
                    result = b.arithmetic(name, result, other)
                return result
            case "abs", [x]:
                return b.arithmetic("abs", x)
            case "real", [x]:
                return b.to(REAL, x)
            case "bool", [x]:
                return b.truth(x)
            case "not", [x]:
                return b.negation(b.truth(x))
            case "both", [x, y]:
                return b.both(b.truth(x), b.truth(y))
            case "either", [x, y]:
                return b.either(b.truth(x), b.truth(y))
            case "where", [condition, x, y]:
                return b.choose(b.truth(condition), x, y)
            case "clip", [x, low, high]:
                return b.arithmetic("min", b.arithmetic("max", x, low), high)
            case "pow", [x, y]:
                return self.power(x, y)
            case "log", [x]:
                return b.of_reals("log", x)
            case "log", [x, base]:
                return b.of_reals("div", b.of_reals("log", x), b.of_reals("log", base))
            case "isnan", [x]:
                return b.compute("isnan", BOOL, b.to(REAL, x))
            case (("to floor" | "to ceil" | "to trunc" | "to rint"), [x]):
                if b.kind(x) != REAL:
                    return b.to(INT, x) if b.kind(x) == BOOL else x
                return b.compute("integer", INT, b.of_reals(name[3:], x))
            case _, [x] if name in REALS:
                return b.of_reals(name, x)
        self.source.refuse(node, f"{ast.unparse(node.func)} takes another number of arguments")

    def length(self, node: ast.expr, env: Env) -> int:
        """A number that is known before the call: a constant, a shape, or an integer of mod_args."""
        x = self.number(node, env)
        n = self.fixed(x)
        if not isinstance(n, int):
            self.source.refuse(
                node,
                "the length of a loop must be known before the call: a number, the shape of an array or an integer in "
                "mod_args, and not an element of an array or a position",
            )
        return n

    def fixed(self, number: int) -> Number | None:
        """The value of an instruction on constants, shapes and numbers of mod_args, which become part of the code."""
        op, _, args, value = self.b.lines[number]
        if op == "constant":
            return value  # type: ignore[no-any-return]
        if op == "shape":
            self.whole.read(("shape", value))
            return int(np.shape(self.whole.values[value[0]])[value[1]])
        if op == "scalar":
            self.whole.read(("value", value))
            return self.whole.values[value]  # type: ignore[no-any-return]
        operands = [self.fixed(x) for x in args]
        if op in _FIXED and None not in operands:
            try:
                return _FIXED[op](*operands)  # type: ignore[no-any-return]
            except (ArithmeticError, ValueError):
                return None
        return None


_FIXED: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv,
    "mod": operator.mod, "min": min, "max": max, "abs": abs, "neg": operator.neg, "widen": int, "shl": operator.lshift,
    "shr": operator.rshift,
}  # fmt: skip
