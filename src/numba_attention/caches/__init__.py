"""Caches of keys and values for decoding: one array, or pages; filled and cut in NumPy, read by the backends."""

from .contiguous import KVCache
from .paged import PagedKVCache

__all__ = ["KVCache", "PagedKVCache"]
