"""Exact multi-head attention for NumPy pipelines, compiled by Numba. See `attention` to begin."""

from .api import attention, attention_backward, attention_weights, merge_attention, merge_attention_backward
from .backends import backends, set_backend, use_backend
from .caches import KVCache, PagedKVCache
from .decoding import attention_decode
from .errors import BackendUnavailableError, CacheFullError, NumbaAttentionWarning
from .layer.attention import MultiHeadAttention
from .options import Gradients
from .rotary import apply_rotary
from .show_config import show_config
from .varlen import attention_varlen, attention_varlen_backward

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "CacheFullError",
    "Gradients",
    "KVCache",
    "MultiHeadAttention",
    "NumbaAttentionWarning",
    "PagedKVCache",
    "apply_rotary",
    "attention",
    "attention_backward",
    "attention_decode",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_weights",
    "backends",
    "merge_attention",
    "merge_attention_backward",
    "set_backend",
    "show_config",
    "use_backend",
]
