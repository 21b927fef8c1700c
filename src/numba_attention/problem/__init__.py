"""Validation: arrays and options become a `Problem`, for dense arrays, packed sequences and caches."""
