"""What a function looks up outside of itself: its globals and cells, attributes of modules, and values of `mod_args`.

A rule is compiled for the values that it found, and found again by what they are in a later call.
"""

from types import FunctionType
from typing import Any

import numpy as np

# Where a name is, in what, and which one: ("global", the dictionary of globals, name), ("cell", cell, name),
# ("own cell", number of the cell of the function, name), ("attribute", module, name), ("shape", place in `mod_args`,
# axis), ("value", place in `mod_args`, None).
Read = tuple[str, Any, Any]
MISSING = object()  # what a name without a value is looked up as


def look_up(read: Read, function: FunctionType, values: tuple[Any, ...]) -> Any:
    """The present value of a name that a function read, in a form that can be compared."""
    where, of, name = read
    if where == "global":
        x = of.get(name, MISSING)
    elif where == "cell":
        x = content(of)
    elif where == "own cell":
        x = content((function.__closure__ or ())[of])
    elif where == "attribute":
        x = getattr(of, name, MISSING)
    elif where == "shape":
        return np.shape(values[of])[name]
    else:
        x = values[of]
    return comparable(x)


def comparable(x: Any) -> Any:
    """A value in a form that can be compared: 0.0 is not -0.0 nor 0, and a function is what it is at present."""
    if isinstance(x, float | np.floating):
        return type(x), repr(x)
    if isinstance(x, tuple):
        return type(x), *map(comparable, x)
    function = getattr(x, "py_func", x)
    if isinstance(function, FunctionType):
        return x, *present(function)
    return type(x), x


def present(function: FunctionType) -> tuple[Any, ...]:
    """What of a function can be assigned anew, and differs where a `def` is executed again: code and defaults."""
    defaults = (function.__defaults__ or (), tuple((function.__kwdefaults__ or {}).items()))
    try:
        hash(found := comparable(defaults))
    except TypeError:  # a default that no rule can read, as the error of the rule says
        found = repr(defaults)
    return function.__code__, found


def same(read: Read, other: Read) -> bool:
    return read[0] == other[0] and read[1] is other[1] and read[2] == other[2]


def content(cell: Any) -> Any:
    """What a cell of a closure holds, or `MISSING`."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING
