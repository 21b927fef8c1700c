"""Exceptions that callers may want to catch by name."""


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for cannot run here; the message says why and what would help."""


class CacheFullError(ValueError):
    """A key/value cache has no room for the tokens that were to be appended; nothing has changed."""


class NumbaAttentionWarning(UserWarning):
    """Something works, but not as well as it could (for example, there is no folder for the kernel cache)."""
