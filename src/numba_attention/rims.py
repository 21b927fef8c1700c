"""Arrays of other libraries: a function that refuses one hands its call over to the module that takes such arrays.

The question is asked where a TypeError is about to leave a function: calls with NumPy arrays pay nothing for it, and no
library is imported for it, because a type says by its module which one it belongs to.
"""

from importlib import import_module
from typing import Any

# The beginning of the name of the module of a type, and the module here that has functions for such arrays.
RIMS = {"dask.array.": "dask"}


def hand_over(error: TypeError, function: str, /, *arguments: Any, **keywords: Any) -> Any:
    """Call the function of this name for the arrays among the arguments; raise `error` if there are none.

    Parameters
    ----------
    error : TypeError
        What NumPy's code said of these arguments.
    function : str
        Name of an entry point.
    *arguments : array
        What it was called with. The first array of a library that has a module here decides.
    **keywords
        Other arguments, as the caller passed them. `out` is refused: these modules return new arrays.

    Raises
    ------
    TypeError
        `error`, or `out` is not None.
    """
    for x in arguments:
        kind = type(x)
        for prefix, name in RIMS.items():
            if f"{kind.__module__}.".startswith(prefix):
                target = getattr(import_module(f"{__package__}.{name}"), function, None)
                if target is None:
                    raise error
                if keywords.pop("out", None) is not None:
                    raise TypeError(f"out must be None for arrays of {kind.__module__}.{kind.__qualname__}")
                return target(*arguments, **keywords)
    raise error
