"""The ``numba-attention`` command."""

from .main import main

__all__ = ["main"]
