"""Caches of keys and values for decoding: one array, or pages; filled and cut in NumPy, read by the backends.

Nothing is imported here: `problem` names `contents`, and the caches use `problem`.
"""
