"""Exact multi-head attention for NumPy pipelines, compiled by Numba. See `attention` to begin."""

from importlib import import_module
from typing import Any

from . import mods
from .api import attention, attention_backward, attention_weights, merge_attention, merge_attention_backward
from .backends import backends, set_backend, use_backend
from .caches import KVCache, PagedKVCache
from .decoding import attention_decode
from .errors import BackendUnavailableError, CacheFullError, NumbaAttentionWarning
from .layer.attention import MultiHeadAttention
from .masks.blockmask import BlockMask
from .options import Gradients, SecondGradients, Tangents
from .rotary import apply_rotary
from .second import attention_backward_jvp, attention_double_backward, attention_jvp, merge_attention_jvp
from .show_config import show_config
from .varlen import attention_varlen, attention_varlen_backward
from .warming import warmup

__version__: str
_RIMS = {"dask", "models", "nn", "onnx", "plot"}  # imported when first asked for

__all__ = [
    "BackendUnavailableError",
    "BlockMask",
    "CacheFullError",
    "Gradients",
    "KVCache",
    "MultiHeadAttention",
    "NumbaAttentionWarning",
    "PagedKVCache",
    "SecondGradients",
    "Tangents",
    "apply_rotary",
    "attention",
    "attention_backward",
    "attention_backward_jvp",
    "attention_decode",
    "attention_double_backward",
    "attention_jvp",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_weights",
    "backends",
    "merge_attention",
    "merge_attention_backward",
    "merge_attention_jvp",
    "mods",
    "set_backend",
    "show_config",
    "use_backend",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # looked up when asked for: finding the installed files takes some milliseconds
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("numba-attention")
        except PackageNotFoundError:  # the sources alone, on the path
            return "0+unknown"
    if name in _RIMS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
