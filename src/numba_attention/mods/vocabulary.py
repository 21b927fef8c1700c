"""The words of the language of mods: which operators, and which functions of Python, `math` and NumPy, mean what."""

import ast
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

# Functions of one real number.
REALS = {
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
BINARY = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.FloorDiv: "floordiv", ast.Mod: "mod",
    ast.Pow: "pow", ast.BitAnd: "and", ast.BitOr: "or", ast.BitXor: "xor", ast.LShift: "shl", ast.RShift: "shr",
}  # fmt: skip
COMPARISONS = {ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge", ast.Eq: "eq", ast.NotEq: "ne"}
LISTED = (
    "abs, min, max, round, float, int, bool, pow, len, range; of math and numpy: exp, exp2, log, log2, sqrt, tanh, "
    "sin, cos, floor, ceil, trunc, isnan, fabs; of numpy: abs, where, minimum, maximum, clip, rint, logical_and, "
    "logical_or, logical_not"
)


def _table() -> Iterator[tuple[Any, str]]:
    for name, functions in REALS.items():
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


_MEANINGS = dict(_table())


def meaning_of(function: Any) -> str | None:
    """The operation that a function means, or None if it is not available in a mod."""
    try:
        return _MEANINGS.get(function)
    except TypeError:  # an object that cannot be hashed
        return None
