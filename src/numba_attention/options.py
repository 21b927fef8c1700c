"""The options every entry point shares, gathered once so that no function passes twenty arguments on."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray[Any, Any]
Causal = bool | Literal["top-left", "bottom-right"]
Window = tuple[int | None, int | None]


class Options(NamedTuple):
    """What may be asked of one attention call, exactly as the caller said it (see `attention`).

    A named tuple and not a dataclass: it is built on every call, and a frozen dataclass of this
    size costs 3 us where the whole public call has a budget of 15.
    """

    mask: ArrayLike | None = None
    bias: ArrayLike | None = None
    is_causal: Causal = False
    window: Window | Sequence[int | None] | None = None
    query_offset: ArrayLike | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi_slopes: ArrayLike | None = None
    sinks: ArrayLike | None = None
    query_lengths: ArrayLike | None = None
    key_lengths: ArrayLike | None = None


class Gradients(NamedTuple):
    """Gradients with respect to each input, of its shape and dtype; None for what was not given.

    Axes along which an input was broadcast are summed, as are the query heads that share a key/value head.
    """

    query: Array | None
    key: Array | None
    value: Array | None
    bias: Array | None = None
    sinks: Array | None = None
