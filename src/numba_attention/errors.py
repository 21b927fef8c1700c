"""Exceptions that callers may want to catch by name."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for that cannot run here; the message says why and what would help."""


class CacheFullError(ValueError):
    """A key/value cache has no room for what was to be appended, and is as it was before."""


class NumbaAttentionWarning(UserWarning):
    """Something works, but not as well as it could (for example: no place for the kernel cache)."""
