"""What a function looks up outside of itself: its globals and cells, attributes of modules, and values of `mod_args`.

A rule is compiled for the values that it found, and found again by what they are in a later call.
"""

from types import FunctionType
from typing import Any

import numpy as np

# The steps to a value. The first is 0 or 1, for the function or its derivative; from a function one goes on by
# ("global", name) and ("cell", number of the free variable), from a module by ("attribute", name). Of `mod_args` there
# are ("shape", (place, axis)) and ("value", place), without any other step. The same names of two functions may mean
# different things, also if these have equal code: a module that is executed twice has two dictionaries of globals.
Path = tuple[Any, ...]
MISSING = object()  # what a name without a value is looked up as


def look_up(path: Path, functions: tuple[Any, ...], values: tuple[Any, ...]) -> Any:
    """The present value at the end of a path, in a form that can be compared."""
    x: Any = None
    for step in path:
        if type(step) is int:
            x = functions[step]
            continue
        where, of = step
        if where == "global":
            x = getattr(undispatched(x), "__globals__", {}).get(of, MISSING)
        elif where == "cell":
            x = content(undispatched(x), of)
        elif where == "attribute":
            x = getattr(x, of, MISSING)
        elif where == "shape":
            return np.shape(values[of[0]])[of[1]]
        else:
            x = values[of]
    return comparable(x)


def comparable(x: Any) -> Any:
    """A value in a form that can be compared: 0.0 is not -0.0 nor 0, and a function is what it is at present."""
    if isinstance(x, np.ndarray) and not x.ndim:
        x = x[()]
    if isinstance(x, float | np.floating):
        return type(x), repr(x)
    if isinstance(x, tuple):
        return type(x), *map(comparable, x)
    if isinstance(function := undispatched(x), FunctionType):
        return FunctionType, *present(function)
    try:
        hash(x)
    except TypeError:  # no rule can read it, as the error of the rule says
        return type(x), id(x)
    return type(x), x


def present(function: FunctionType) -> tuple[Any, ...]:
    """What a function consists of, but for what it looks up: code, which may be assigned anew, and defaults."""
    return function.__code__, comparable(function.__defaults__ or ())


def undispatched(x: Any) -> Any:
    """The Python function in a dispatcher of Numba; everything else as it is."""
    return getattr(x, "py_func", x)


def content(function: Any, number: int) -> Any:
    """What a cell of a function's closure holds, or `MISSING`."""
    try:
        return function.__closure__[number].cell_contents
    except (AttributeError, IndexError, TypeError, ValueError):  # an empty cell, or by now another function
        return MISSING
