"""A dictionary of what calls need again that forgets the oldest entries when it has too many or they are too large."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from . import forks

COUNT = 500
SIZE = 2**25  # bytes: the plan of a batch of 50,000 sequences takes 11 MB, and 20 MB for the gradients

V = TypeVar("V")


class BoundedCache(Generic[V]):
    """Values by key. Reading takes no lock, and may go on in other threads while one adds.

    Parameters
    ----------
    count : int
        How many values are kept.
    size : int
        How many bytes they may have together; a value that alone has more is not kept.

    Attributes
    ----------
    get : callable
        The value of a key, or None: ``dict.get`` itself, because small calls take microseconds.
    """

    def __init__(self, count: int = COUNT, size: int = SIZE) -> None:
        self._values: dict[Any, V] = {}
        self._sizes: dict[Any, int] = {}
        self._lock = forks.renewed()
        self._count, self._size = count, size
        self.get: Callable[[Any], V | None] = self._values.get

    def add(self, key: Any, value: V, size: int) -> None:
        """Keep a value of so many bytes, and forget the oldest where there is no room."""
        if size > self._size:
            return
        with self._lock:
            self._values[key], self._sizes[key] = value, size
            # Summed anew, and not counted along: a call in the middle of this one may change what is there.
            while len(self._values) > self._count or sum(self._sizes.values()) > self._size:
                oldest = next(iter(self._values))
                self._values.pop(oldest, None)
                self._sizes.pop(oldest, None)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._values.clear()
            self._sizes.clear()

    @property
    def size(self) -> int:
        """Bytes of all values."""
        return sum(self._sizes.values())

    def __len__(self) -> int:
        return len(self._values)
