"""Exceptions that callers may want to catch by name, and how their messages name a type."""

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
