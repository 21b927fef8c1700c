"""Whole models in NumPy, with weights from files."""

from typing import Any

__all__ = ["SentenceEncoder", "find_model", "read_lines"]


def __getattr__(name: str) -> Any:
    """Import what needs the extra ``demo`` when it is asked for, and say so if it is missing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import sentence
    except ModuleNotFoundError as missing:
        raise ImportError(
            f"numba_attention.models.{name} needs {missing.name}: pip install 'numba-attention[demo]'"
        ) from missing
    return getattr(sentence, name)
