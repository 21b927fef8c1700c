"""Key/value caches for decoding, in one array or in pages. They are written with NumPy and read by the backends."""

from .contiguous import KVCache
from .paged import PagedKVCache

__all__ = ["KVCache", "PagedKVCache"]
