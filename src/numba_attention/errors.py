"""Exceptions that callers may want to catch by name, and what their messages must know of an argument."""

import sys
from typing import Any


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for cannot run here; the message says why and what would help."""


class CacheFullError(ValueError):
    """A key/value cache has no room for the tokens that were to be appended; nothing has changed."""


class NumbaAttentionWarning(UserWarning):
    """Something works, but not as well as it could (for example, there is no folder for the kernel cache)."""


def kind_of(x: Any) -> str:
    """Return the full name of the type of x."""
    return f"{type(x).__module__}.{type(x).__qualname__}"


def is_masked(x: Any) -> bool:
    """Whether x is a masked array of NumPy: there is none before `numpy.ma` has been imported.

    NumPy imports that module when it is first named. A signal handler that interrupts such an import, and names it too,
    ends in an endless recursion of ``numpy.__getattr__``.
    """
    masked_array = getattr(sys.modules.get("numpy.ma"), "MaskedArray", None)
    return masked_array is not None and isinstance(x, masked_array)
