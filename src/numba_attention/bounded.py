"""A bounded cache: a dictionary that drops its oldest entries when they are too many or take too much memory."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from . import forks

COUNT = 500
SIZE = 2**25  # bytes: the plan of a batch of 50,000 sequences takes 11 MB, and 20 MB for the gradients

V = TypeVar("V")


class BoundedCache(Generic[V]):
    """Values by key, bounded in number and in bytes. Reading takes no lock, and is safe while another thread adds.

    Parameters
    ----------
    count : int
        The largest number of values that are kept.
    size : int
        The largest number of bytes of all values together. A single value that has more is not kept.

    Attributes
    ----------
    get : callable
        Returns the value of a key, or None. It is ``dict.get`` itself, because small calls take microseconds.
    """

    def __init__(self, count: int = COUNT, size: int = SIZE) -> None:
        self._values: dict[Any, V] = {}
        self._sizes: dict[Any, int] = {}
        self._lock = forks.renewed()
        self._count, self._size = count, size
        self.get: Callable[[Any], V | None] = self._values.get

    def add(self, key: Any, value: V, size: int) -> None:
        """Keep a value of `size` bytes, and drop the oldest values if the cache is then too large."""
        if size > self._size:
            return
        with self._lock:
            self._values[key], self._sizes[key] = value, size
            # The sizes are summed each time and no running total is kept: a reentrant call, from a signal handler or
            # finalizer, may change the dictionaries between any two lines.
            while len(self._values) > self._count or sum(self._sizes.values()) > self._size:
                oldest = next(iter(self._values))
                self._values.pop(oldest, None)
                self._sizes.pop(oldest, None)

    def clear(self) -> None:
        """Drop all values."""
        with self._lock:
            self._values.clear()
            self._sizes.clear()

    @property
    def size(self) -> int:
        """Bytes of all values."""
        return sum(self._sizes.values())

    def __len__(self) -> int:
        return len(self._values)
