"""Every structural mask is one half-open interval of keys per query row: the only place that decides it.

Causality, sliding windows, offsets, prefixes and lengths all reduce to ``start <= j < stop``. Both ends grow with the
query row, so the rows that see a tile of keys are an interval too. The rules have no branches, and know only `minimum`,
`maximum` and `select`: `bind` gives them those of Python, NumPy, a compiled kernel or the registers of a GPU.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np

FAR = 2**41  # reach of an unbounded window: beyond any position, far from overflow


def _choose(condition: Any, x: Any, y: Any) -> Any:
    return x if condition else y


minimum: Any = min
maximum: Any = max
select: Any = _choose


def keys_of_row(i: Any, low: Any, high: Any, queries: Any, keys: Any, prefix: Any) -> tuple[Any, Any]:
    """The keys that query row i sees.

    Parameters
    ----------
    i : int
        Query row, 0 <= i; rows at or past `queries` see nothing.
    low, high : int
        Row i sees from key i + low to key i + high: the offset of positions minus the reach to the left, and plus that
        to the right.
    queries, keys : int
        Valid lengths of the sequence.
    prefix : int
        So many first keys are seen however far `high` reaches; 0 where `low` is finite.

    Returns
    -------
    start, stop : int
        0 <= start <= stop <= keys.
    """
    start = minimum(maximum(i + low, 0), keys)
    stop = maximum(start, minimum(maximum(i + high + 1, prefix), keys))
    return start, select(i < queries, stop, start)


def rows_of_key(j: Any, low: Any, high: Any, queries: Any, keys: Any, prefix: Any) -> tuple[Any, Any]:
    """The query rows that see key j: `keys_of_row`, transposed.

    Parameters
    ----------
    j : int
        Key, 0 <= j; no row sees those at or past `keys`.
    low, high, queries, keys, prefix : int
        As for `keys_of_row`.

    Returns
    -------
    start, stop : int
        0 <= start <= stop <= queries.
    """
    zero = j - j  # of the kind of number that j is
    start = minimum(select(j < prefix, zero, maximum(j - high, 0)), queries)
    stop = maximum(start, minimum(j - low + 1, queries))
    return start, select(j < keys, stop, start)


def bind(rule: Callable[..., Any], minimum: Any, maximum: Any, select: Any) -> Any:
    """The same rule for other numbers, with their operations."""
    names = {"minimum": minimum, "maximum": maximum, "select": select}
    return FunctionType(rule.__code__, names, rule.__name__)


# For arrays of rows or keys.
keys_of_rows = bind(keys_of_row, np.minimum, np.maximum, np.where)
rows_of_keys = bind(rows_of_key, np.minimum, np.maximum, np.where)
