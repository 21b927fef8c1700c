"""Python functions as programs: the language of `score_mod` and `mask_mod`.

A function is read from its source, and its statements are carried out on instructions in place of numbers. Branches
that depend on the data are followed both ways, and what they assign and return is selected; helper functions are
expanded where they are called; loops are unrolled. The types are Python's but for their widths: integers have 32 bits
(64 where an array or a constant has), real numbers the width of the scores.

No Numba and no LLVM here: what cannot be said in the language is refused with the user's own line.
"""

from __future__ import annotations

import ast
import builtins
import math
import operator
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np

from .program import BOOL, INT, LENGTH, LONG, REAL, Builder, Number
from .source import Source, source_of

DEPTH = 32  # of helper functions that call one another
SCORE, MASK = "score_mod", "mask_mod"
PARAMETERS = {SCORE: ("score", "batch", "head", "i", "j"), MASK: ("batch", "head", "i", "j")}
ELEMENTS = {"bool": BOOL, "int32": INT, "int64": LONG, "float32": REAL, "float64": REAL}

# Functions of one real number.
_REALS = {
    "exp": (math.exp, np.exp),
    "exp2": (getattr(math, "exp2", None), np.exp2),
    "log2": (math.log2, np.log2),
    "sqrt": (math.sqrt, np.sqrt),
    "tanh": (math.tanh, np.tanh),
    "sin": (math.sin, np.sin),
    "cos": (math.cos, np.cos),
    "floor": (np.floor,),
    "ceil": (np.ceil,),
    "trunc": (np.trunc,),
    "rint": (np.rint,),
}
# Those whose result Python makes an integer.
_ROUNDINGS = {math.floor: "floor", math.ceil: "ceil", math.trunc: "trunc", round: "rint", int: "trunc"}
_ROUNDINGS |= {np.int32: "trunc", np.int64: "trunc"}
_BINARY = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.FloorDiv: "floordiv", ast.Mod: "mod",
    ast.Pow: "pow", ast.BitAnd: "and", ast.BitOr: "or", ast.BitXor: "xor", ast.LShift: "shl", ast.RShift: "shr",
}  # fmt: skip
_COMPARE = {ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge", ast.Eq: "eq", ast.NotEq: "ne"}
_LISTED = (
    "abs, min, max, round, float, int, bool, pow, len, range; of math and numpy: exp, exp2, log, log2, sqrt, tanh, "
    "sin, cos, floor, ceil, trunc, isnan, fabs; of numpy: abs, where, minimum, maximum, clip, rint, logical_and, "
    "logical_or, logical_not"
)


class Argument(NamedTuple):
    """What is known of one of `mod_args` when a rule is compiled; a number has no axes."""

    dtype: str
    ndim: int

    @property
    def kind(self) -> str:
        return ELEMENTS[self.dtype]


class _Array(NamedTuple):
    """An array of `mod_args`, of which so many indices are known."""

    place: int
    indices: tuple[tuple[int, bool], ...] = ()  # instruction, and whether it is read as it comes


class _Range(NamedTuple):
    items: tuple[Any, ...]


class _Undefined(NamedTuple):
    """A name that has a value on some paths only, or values that cannot be selected."""

    why: str


Env = dict[str, Any]  # instruction numbers, arrays, tuples
# One name that a function looked up outside, how to look it up again, and whether it is a number.
Read = tuple[str, Any, Any]


class Lowered(NamedTuple):
    """A function as instructions of a builder."""

    output: int
    reads: list[Read]


def lower(
    b: Builder, role: str, function: FunctionType, arguments: tuple[Argument, ...], values: tuple[Any, ...]
) -> Lowered:
    """Write the instructions of a function.

    Parameters
    ----------
    b : Builder
    role : {"score_mod", "mask_mod"}
    function : function
    arguments : tuple of Argument
        The kinds of `mod_args`.
    values : tuple
        `mod_args` themselves, of which shapes and integers are read where a loop depends on them.

    Returns
    -------
    Lowered
        The number of the instruction that is returned, and which names outside of the function it depends on.

    Raises
    ------
    TypeError
        The function says what the language cannot; the message shows where.
    """
    whole = _Whole(b, arguments, values, [])
    names = PARAMETERS[role]
    operands: list[Any] = [b.argument(name) for name in names]
    for place, argument in enumerate(arguments):
        operands.append(_Array(place) if argument.ndim else b.scalar(place, argument.kind))
    frame = _Frame(whole, source_of(function), 0, top=function)
    code = function.__code__
    least = code.co_argcount - len(function.__defaults__ or ())
    if not least <= len(operands) <= code.co_argcount:
        given = f" and the {len(arguments)} of mod_args" if arguments else ", and mod_args is empty"
        frame.source.refuse(
            frame.source.node,
            f"a {role} is called as {role}({', '.join(names)}, *mod_args), with {len(names)} arguments{given}; "
            f"this function takes {code.co_argcount}",
        )
    result = frame.run(operands, False)
    if not isinstance(result, int):
        frame.source.refuse(frame.source.node, f"a {role} must return a number")
    if role == MASK:
        if b.kind(result) == REAL:
            frame.source.refuse(frame.source.node, "a mask_mod must return a truth value, True where it may attend")
        return Lowered(b.truth(result), whole.reads)
    return Lowered(b.to(REAL, result), whole.reads)


def look_up(read: Read, function: FunctionType, values: tuple[Any, ...]) -> Any:
    """The present value of a name that a function read, in a form that can be compared."""
    where, of, name = read
    if where == "global":
        x = of.get(name, _MISSING)
    elif where == "cell":
        x = _content(of)
    elif where == "own cell":
        x = _content((function.__closure__ or ())[of])
    elif where == "attribute":
        x = getattr(of, name, _MISSING)
    elif where == "shape":
        return np.shape(values[of])[name]
    else:
        x = values[of]
    return (type(x), repr(x)) if isinstance(x, float) else (type(x), x)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


_MISSING = object()


class _Whole(NamedTuple):
    """What all functions of one rule share."""

    b: Builder
    arguments: tuple[Argument, ...]
    values: tuple[Any, ...]
    reads: list[Read]

    def read(self, *read: Any) -> None:
        if not any(read[0] == r[0] and read[1] is r[1] and read[2] == r[2] for r in self.reads):
            self.reads.append(read)


class _Loop(NamedTuple):
    """Where `continue` and `break` leave an unrolled loop: conditions, and the names as they are then."""

    continued: list[tuple[int, Env]]
    broken: list[tuple[int, Env]]


class _Frame:
    """One function at work.

    A mask is the instruction that says for which pairs a statement is carried out; FALSE where it never is.
    """

    def __init__(self, whole: _Whole, source: Source, depth: int, top: Any = None) -> None:
        self.whole, self.b, self.source, self.depth, self.top = whole, whole.b, source, depth, top
        self.true, self.false = self.b.constant(True), self.b.constant(False)
        self.result: Any = None
        self.guarded = False  # whether what is computed now is wanted for some pairs only
        self.loops: list[_Loop] = []
        self.functions: dict[type, Callable[..., Any]] = {}

    def run(self, operands: list[Any], guarded: bool) -> Any:
        """Bind the parameters, carry out the body, and return the result."""
        node, function = self.source.node, self.source.function
        self.guarded = guarded
        names = [x.arg for x in [*node.args.posonlyargs, *node.args.args]]
        if node.args.vararg or node.args.kwarg or node.args.kwonlyargs:
            self.source.refuse(node, "a mod takes positional parameters only, without * and **")
        defaults = function.__defaults__ or ()
        missing = len(names) - len(operands)
        if missing < 0 or missing > len(defaults):
            listed = ", ".join(names)
            self.source.refuse(node, f"takes {len(names)} arguments ({listed}), and is called with {len(operands)}")
        for default in defaults[len(defaults) - missing :]:
            operands = [*operands, self.constant(node, default)]
        env: Env = dict(zip(names, operands, strict=True))
        if isinstance(node, ast.Lambda):
            return self.value(node.body, env)
        alive = self.statements(node.body, env, self.true)
        if alive != self.false:
            last = node.body[-1]
            self.source.refuse(last, "may end without a return: return a value on every path")
        return self.result

    # Statements

    def statements(self, body: list[ast.stmt], env: Env, mask: int) -> int:
        """Carry out statements; return the mask of the pairs that go on after the last."""
        for statement in body:
            if mask == self.false:
                break
            mask = self.statement(statement, env, mask)
            if len(self.b.lines) > LENGTH:
                self.source.refuse(statement, f"the rule has more than {LENGTH} operations once its loops are unrolled")
        return mask

    def statement(self, node: ast.stmt, env: Env, mask: int) -> int:
        match node:
            case ast.Return(value=None):
                self.source.refuse(node, "a mod must return a value")
            case ast.Return(value=ast.expr() as value):
                self.leave(node, mask, self.value(value, env))
                return self.false
            case ast.Assign(targets=targets, value=value):
                x = self.value(value, env)
                for target in targets:
                    self.assign(target, x, env)
            case ast.AnnAssign(target=target, value=value):
                if value is not None:
                    self.assign(target, self.value(value, env), env)
            case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=value):
                old = self.value(ast.copy_location(ast.Name(name, ast.Load()), target), env)
                env[name] = self.binary(node, op, old, self.value(value, env))
            case ast.AugAssign() | ast.Delete():
                self.source.refuse(node, "arrays cannot be written to in a mod")
            case ast.If():
                return self.branch(node, env, mask)
            case ast.For():
                return self.loop(node, env, mask)
            case ast.Continue():
                self.loops[-1].continued.append((mask, dict(env)))
                return self.false
            case ast.Break():
                self.loops[-1].broken.append((mask, dict(env)))
                return self.false
            case ast.Pass() | ast.Expr(value=ast.Constant()):
                pass
            case ast.While():
                self.source.refuse(node, "while is not available in a mod: use for with range, whose length is known")
            case ast.FunctionDef() | ast.ClassDef() | ast.AsyncFunctionDef():
                self.source.refuse(node, "define helper functions outside of the mod")
            case _:
                what = type(node).__name__.lower()
                self.source.refuse(node, f"{what} is not available in a mod: it is a formula for one score")
        return mask

    def leave(self, node: ast.stmt, mask: int, x: Any) -> None:
        if self.result is None:
            self.result = x
        else:
            self.result = self.select(mask, x, self.result)
        if isinstance(self.result, _Undefined):
            self.source.refuse(node, self.result.why)

    def assign(self, target: ast.expr, x: Any, env: Env) -> None:
        match target:
            case ast.Name(id=name):
                env[name] = x
            case ast.Tuple(elts=parts):
                if not isinstance(x, tuple) or isinstance(x, _Array) or len(x) != len(parts):
                    self.source.refuse(target, f"needs {len(parts)} values")
                for part, y in zip(parts, x, strict=True):
                    self.assign(part, y, env)
            case _:
                self.source.refuse(target, "arrays cannot be written to in a mod: assign to names")

    def branch(self, node: ast.If, env: Env, mask: int) -> int:
        condition = self.truth(node.test, env)
        known = self.b.known(condition)
        if known is not None:
            return self.statements(node.body if known else node.orelse, env, mask)
        envs, masks, alive = (dict(env), dict(env)), [], []
        masks = [self.b.both(mask, condition), self.b.both(mask, self.b.negation(condition))]
        guarded, self.guarded = self.guarded, True
        for body, own, own_mask in zip((node.body, node.orelse), envs, masks, strict=True):
            alive.append(self.statements(body, own, own_mask))
        self.guarded = guarded
        if self.false in alive:
            env.clear()
            env.update(envs[1 if alive[0] == self.false else 0])
            # What follows is for the others only: an index there is not checked for all pairs before the call.
            self.guarded = True
            return alive[1] if alive[0] == self.false else alive[0]
        self.merge(condition, env, *envs)
        if alive == masks:
            return mask
        self.guarded = True
        return self.b.either(*alive)

    def merge(self, condition: int, env: Env, first: Env, second: Env) -> None:
        """The names after two branches."""
        for name in first.keys() | second.keys():
            x, y = first.get(name), second.get(name)
            if x is None or y is None:
                env[name] = _Undefined(f"{name} may have no value here: assign it on every path before")
            else:
                env[name] = self.select(condition, x, y)

    def select(self, condition: int, x: Any, y: Any) -> Any:
        if x == y and type(x) is type(y):
            return x
        if isinstance(x, int) and isinstance(y, int):
            return self.b.choose(condition, x, y)
        if type(x) is tuple and type(y) is tuple and len(x) == len(y):
            return tuple(self.select(condition, p, q) for p, q in zip(x, y, strict=True))
        for z in (x, y):
            if isinstance(z, _Undefined):
                return z
        return _Undefined("only numbers can be chosen by a condition, not arrays")

    def loop(self, node: ast.For, env: Env, mask: int) -> int:
        if node.orelse:
            self.source.refuse(node.orelse[0], "for with else is not available in a mod")
        items = self.value(node.iter, env)
        if isinstance(items, _Range):
            items = items.items
        elif not isinstance(items, tuple) or isinstance(items, _Array):
            self.source.refuse(node.iter, "a mod can loop over range and over tuples")
        guarded = self.guarded
        broken: list[tuple[int, Env]] = []
        for item in items:
            if mask == self.false:
                break
            self.loops.append(_Loop([], broken))
            self.assign(node.target, item, env)
            mask = self.statements(node.body, env, mask)
            mask = self.rejoin(self.loops.pop().continued, env, mask)
            if len(self.b.lines) > LENGTH:
                self.source.refuse(node, f"the rule has more than {LENGTH} operations once its loops are unrolled")
        mask = self.rejoin(broken, env, mask)
        self.guarded = guarded or self.guarded
        return mask

    def rejoin(self, leaving: list[tuple[int, Env]], env: Env, mask: int) -> int:
        """Let the pairs that left the body go on with the others."""
        for own_mask, own in leaving:
            if mask == self.false:
                env.clear()
                env.update(own)
                mask = own_mask
            else:
                self.merge(own_mask, env, own, dict(env))
                mask = self.b.either(mask, own_mask)
        return mask

    # Expressions

    def value(self, node: ast.expr, env: Env) -> Any:
        """The number of the instruction that computes an expression; also an array, a tuple or a range."""
        x = self.expression(node, env)
        if isinstance(x, _Undefined):
            self.source.refuse(node, x.why)
        return x

    def number(self, node: ast.expr, env: Env) -> int:
        x = self.value(node, env)
        if isinstance(x, _Array):
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

    def constant(self, node: ast.AST, x: Any) -> int:
        """A number from outside as an instruction."""
        if isinstance(x, np.generic) or (isinstance(x, np.ndarray) and x.ndim == 0):
            x = x.item()
        if isinstance(x, bool | int | float):
            if isinstance(x, int) and not -(2**63) <= x < 2**63:
                self.source.refuse(node, "integers of more than 64 bits are not available in a mod")
            return self.b.constant(x if isinstance(x, bool) else int(x) if isinstance(x, int) else float(x))
        if isinstance(x, np.ndarray) or hasattr(x, "__array__"):
            self.source.refuse(
                node, "arrays outside of the mod would be copied into its code: pass it in mod_args, as a parameter"
            )
        if isinstance(x, complex):
            self.source.refuse(node, "complex numbers are not available in a mod")
        if isinstance(x, FunctionType | ModuleType | type) or callable(x):
            self.source.refuse(node, "functions and modules can only be called or looked into here")
        kind = f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
        self.source.refuse(node, f"only numbers are available in a mod, got {kind}; arrays can be passed in mod_args")

    def find(self, node: ast.expr, env: Env) -> Any:
        """The Python object outside of the function that a name or a dotted name means, or None."""
        if isinstance(node, ast.Name) and node.id not in env:
            return self.name(node)
        if isinstance(node, ast.Attribute):
            base = self.find(node.value, env)
            if isinstance(base, ModuleType):
                x = getattr(base, node.attr, _MISSING)
                if x is _MISSING:
                    self.source.refuse(node, f"module {base.__name__} has no attribute {node.attr!r}")
                if base not in (math, np):
                    self.whole.read("attribute", base, node.attr)
                return x
        return None

    def name(self, node: ast.Name) -> Any:
        function: Any = self.source.function
        name = node.id
        code = function.__code__
        if name in code.co_freevars:
            number = code.co_freevars.index(name)
            cell = (function.__closure__ or ())[number]
            if self.top is function:
                self.whole.read("own cell", number, name)
            else:
                self.whole.read("cell", cell, name)
            x = _content(cell)
            if x is _MISSING:
                self.source.refuse(node, f"{name} has no value yet")
            return x
        if name in code.co_varnames:
            self.source.refuse(node, f"{name} has no value yet here")
        x = function.__globals__.get(name, _MISSING)
        self.whole.read("global", function.__globals__, name)
        if x is _MISSING:
            x = getattr(builtins, name, _MISSING)
        if x is _MISSING:
            self.source.refuse(node, f"name {name!r} is not defined")
        return x

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
        if isinstance(base, _Array):
            return self.attribute(node, base)
        self.source.refuse(node, f"a number has no attribute {node.attr!r} in a mod")

    def attribute(self, node: ast.Attribute, array: _Array) -> Any:
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
        if not isinstance(array, _Array):
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
            return _Array(array.place, tuple(indices))
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
        b, name = self.b, _BINARY.get(type(op))
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
            name = _COMPARE.get(type(op))
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
            self.source.refuse(node.func, f"this cannot be called in a mod; use {_LISTED}, or functions of your own")
        if any(isinstance(x, ast.Starred) for x in node.args) or any(x.arg is None for x in node.keywords):
            self.source.refuse(node, "* and ** are not available in a mod")
        function = getattr(function, "py_func", function)  # of Numba's dispatchers
        if isinstance(function, FunctionType):
            return self.expand(node, function, env)
        if node.keywords:
            self.source.refuse(node, "this function takes no keywords in a mod")
        known = _known(function)
        if known is None:
            dotted = ast.unparse(node.func)
            self.source.refuse(node.func, f"{dotted} is not available in a mod; use one of {_LISTED}")
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
        return _Frame(self.whole, source, self.depth + 1).run(operands, self.guarded)

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
                    return _Range(tuple(b.constant(n) for n in range(*(self.length(x, env) for x in parts))))
                except ValueError as error:
                    self.source.refuse(node, str(error))
            case "len", [part]:
                x = self.value(part, env)
                if isinstance(x, _Array) and not x.indices:
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
            case _, [x] if name in _REALS:
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
            self.whole.read("shape", *value)
            return int(np.shape(self.whole.values[value[0]])[value[1]])
        if op == "scalar":
            self.whole.read("value", value, None)
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


def _table() -> Iterator[tuple[Any, str]]:
    for name, functions in _REALS.items():
        yield from ((function, name) for function in functions if function is not None)
    yield from ((function, f"to {name}") for function, name in _ROUNDINGS.items())
    named: dict[str, tuple[Any, ...]] = {
        "abs": (abs, math.fabs, np.abs, np.fabs, np.absolute),
        "min": (min, np.minimum, np.fmin),
        "max": (max, np.maximum, np.fmax),
        "real": (float, np.float32, np.float64),
        "bool": (bool, np.bool_),
        "log": (math.log, np.log),
        "pow": (pow, math.pow, np.power),
        "isnan": (math.isnan, np.isnan),
        "where": (np.where,),
        "clip": (np.clip,),
        "both": (np.logical_and,),
        "either": (np.logical_or,),
        "not": (np.logical_not,),
        "range": (range,),
        "len": (len,),
    }
    for name, functions in named.items():
        yield from ((function, name) for function in functions)


_KNOWN = dict(_table())


def _known(function: Any) -> str | None:
    try:
        return _KNOWN.get(function)
    except TypeError:  # an object that cannot be hashed
        return None
