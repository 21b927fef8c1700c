"""Exact multi-head attention for NumPy pipelines, compiled by Numba. See `attention` to begin."""

from .api import attention, attention_weights, merge_attention
from .backends import backends, set_backend, use_backend
from .config import show_config
from .errors import BackendUnavailableError, NumbaAttentionWarning
from .layer import MultiHeadAttention

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "MultiHeadAttention",
    "NumbaAttentionWarning",
    "attention",
    "attention_weights",
    "backends",
    "merge_attention",
    "set_backend",
    "show_config",
    "use_backend",
]
