"""What a transformer has beside attention, in NumPy: layers, an optimiser, a loss.

Every layer has ``forward(x) -> (y, ctx)`` and ``backward(grad, ctx) -> gradient of x``, as `MultiHeadAttention` has,
and ``layer(x)`` is y alone. `parameters()` gives its arrays by name, to be changed in place; `grads`, after `backward`,
their gradients by the same names. Products run on the threads of the package's own kernels (`layer.projection`).
"""

from ..layer.projection import linear, linear_backward
from .blocks import MLP, TransformerBlock
from .functions import gelu, layer_norm
from .layers import GELU, Embedding, LayerNorm, Linear, Module, RMSNorm, SiLU
from .training import Adam, cross_entropy, warmup_cosine

__all__ = [
    "GELU",
    "MLP",
    "Adam",
    "Embedding",
    "LayerNorm",
    "Linear",
    "Module",
    "RMSNorm",
    "SiLU",
    "TransformerBlock",
    "cross_entropy",
    "gelu",
    "layer_norm",
    "linear",
    "linear_backward",
    "warmup_cosine",
]
