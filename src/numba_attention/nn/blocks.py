"""Layers made of others: MLPs and transformer blocks."""

from __future__ import annotations  # short types in help()

from typing import Any

import numpy as np

from ..layer.attention import MultiHeadAttention
from ..layer.parameters import as_generator
from ..layer.projection import linear
from ..options import Array
from ..validation import as_size
from .layers import GELU, LayerNorm, Linear, Module, RMSNorm, Seed, SiLU

_ACTIVATIONS: dict[str, Any] = {"gelu": GELU, "gelu_tanh": lambda: GELU(approximate=True), "silu": SiLU}


class MLP(Module):
    """Two linear layers with an activation between them; gated, three: ``narrow(activation(gate(x)) * wide(x))``.

    Parameters
    ----------
    features : int
    rng : numpy.random.Generator or int, optional
    dtype : {numpy.float32, numpy.float64}
    hidden : int, optional
        Features in the middle, by default four times as many.
    activation : {"gelu", "gelu_tanh", "silu"}
    gated : bool, default False
        As in LLaMA, with "silu".
    bias : bool, default True

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, section 3.3.
    .. [2] Shazeer, "GLU Variants Improve Transformer", 2020, equation 6.
    """

    def __init__(
        self,
        features: int,
        rng: Seed = None,
        dtype: Any = np.float32,
        *,
        hidden: int | None = None,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
    ) -> None:
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
        features = as_size("features", features)
        rng, hidden = as_generator(rng), 4 * features if hidden is None else as_size("hidden", hidden)
        self.wide = Linear(features, hidden, rng, dtype, bias=bias)
        if gated:
            self.gate = Linear(features, hidden, rng, dtype, bias=bias)
        self.activation = _ACTIVATIONS[activation]()
        self.narrow = Linear(hidden, features, rng, dtype, bias=bias)

    def __call__(self, x: Array) -> Array:
        """Return the result of `forward` alone: the activation is part of the first product."""
        first = getattr(self, "gate", self.wide)
        hidden = linear(x, first.weight, first.bias, activation=self.activation.name)
        if first is not self.wide:
            hidden *= self.wide(x)
        y: Array = self.narrow(hidden)
        return y

    def forward(self, x: Array) -> tuple[Array, Any]:
        """Return the result, and what `backward` needs."""
        wide, of_wide = self.wide.forward(x)
        if not hasattr(self, "gate"):
            hidden, of_activation = self.activation.forward(wide)
            y, of_narrow = self.narrow.forward(hidden)
            return y, (of_wide, of_activation, of_narrow)
        gate, of_gate = self.gate.forward(x)
        gate, of_activation = self.activation.forward(gate)
        y, of_narrow = self.narrow.forward(gate * wide)
        return y, (of_wide, of_activation, of_narrow, of_gate, gate, wide)

    def backward(self, grad: Array, ctx: Any) -> Array:
        """Return the gradient of x, and set `grads`."""
        of_wide, of_activation, of_narrow, *gated = ctx
        grad = self.narrow.backward(grad, of_narrow)
        if not gated:
            return self.wide.backward(self.activation.backward(grad, of_activation), of_wide)
        of_gate, gate, wide = gated
        of_x = self.wide.backward(grad * gate, of_wide)
        return of_x + self.gate.backward(self.activation.backward(grad * wide, of_activation), of_gate)


class TransformerBlock(Module):
    """Self-attention, attention to a memory if `cross`, and an MLP, each after a norm and added to its input.

    Parameters
    ----------
    features, heads : int
    rotary : bool or dict, optional
        As in `MultiHeadAttention`.
    cross : bool, default False
        Whether there is attention to a memory.
    rms : bool, default False
        `RMSNorm` instead of `LayerNorm`.
    rng : numpy.random.Generator or int, optional
    dtype : {numpy.float32, numpy.float64}
    num_kv_heads : int, optional
        As in `MultiHeadAttention`.
    dropout : float, default 0.0
        Probability with which a weight of either attention is dropped in training.
    **mlp
        hidden, activation and gated, as in `MLP`.

    References
    ----------
    .. [1] Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020, figure 1b: norms first.

    Examples
    --------
    >>> import numpy as np, numba_attention.nn as nn
    >>> block = nn.TransformerBlock(32, 4, rng=0)
    >>> y, ctx = block.forward(np.ones((2, 5, 32), np.float32), is_causal=True)
    >>> grad, of_memory = block.backward(np.ones_like(y), ctx)
    >>> grad.shape, of_memory
    ((2, 5, 32), None)
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        rotary: Any = None,
        cross: bool = False,
        rms: bool = False,
        rng: Seed = None,
        dtype: Any = np.float32,
        num_kv_heads: int | None = None,
        dropout: float = 0.0,
        **mlp: Any,
    ) -> None:
        rng, norm = as_generator(rng), RMSNorm if rms else LayerNorm
        self.norm = norm(features, dtype)
        self.attention = MultiHeadAttention(
            features, heads, num_kv_heads=num_kv_heads, rotary=rotary, dropout=dropout, rng=rng, dtype=dtype
        )
        if cross:
            self.cross_norm = norm(features, dtype)
            self.cross = MultiHeadAttention(features, heads, dropout=dropout, rng=rng, dtype=dtype)
        self.mlp_norm = norm(features, dtype)
        self.mlp = MLP(features, rng, dtype, **mlp)

    def forward(
        self,
        x: Array,
        memory: Array | None = None,
        *,
        memory_lengths: Any = None,
        training: bool = False,
        **options: Any,
    ) -> tuple[Array, Any]:
        """Return the result, and what `backward` needs.

        Parameters
        ----------
        x : ndarray, shape (..., L, features)
        memory : ndarray, shape (..., S, features), optional
            Must be passed to a block with `cross`, and to no other.
        memory_lengths : int or array of int, optional
            Valid positions of the memory.
        training : bool, default False
            Whether to drop weights.
        **options
            Those of the self-attention, such as `is_causal`, `key_lengths` or `cu_seqlens`.

        Raises
        ------
        TypeError, ValueError
            A memory is missing or not meant, or as `MultiHeadAttention` raises.
        """
        self._check(memory, memory_lengths)
        contexts = []

        def added(x: Array, norm: Any, layer: Any, *inputs: Any, **options: Any) -> Array:
            y, ctx = norm.forward(x)
            contexts.append(ctx)
            y, ctx = layer.forward(y, *inputs, **options)
            contexts.append(ctx)
            result: Array = np.add(x, y, out=y)
            return result

        x = added(x, self.norm, self.attention, training=training, **options)
        if memory is not None:
            x = added(x, self.cross_norm, self.cross, memory, key_lengths=memory_lengths, training=training)
        return added(x, self.mlp_norm, self.mlp), contexts

    def step(
        self, x: Array, cache: Any, memory: Array | None = None, memory_cache: Any = None, memory_lengths: Any = None
    ) -> Array:
        """Return the result for the next positions x, where caches have those before; nothing to differentiate.

        A memory of length 0 adds nothing to what `memory_cache` has.
        """
        self._check(memory, memory_lengths)
        x = x + self.attention(self.norm(x), cache=cache, is_causal=True)
        if memory is not None:
            x = x + self.cross(self.cross_norm(x), memory, cache=memory_cache, key_lengths=memory_lengths)
        result: Array = x + self.mlp(self.mlp_norm(x))
        return result

    def _check(self, memory: Any, memory_lengths: Any) -> None:
        crosses = hasattr(self, "cross")
        if crosses and memory is None:
            raise ValueError("memory must be given to a block with cross=True")
        if not crosses and not memory is memory_lengths is None:
            name = "memory_lengths" if memory is None else "memory"
            raise ValueError(f"{name} must be None in a block without cross=True")

    def backward(self, grad: Array, contexts: Any) -> tuple[Array, Array | None]:
        """Return the gradients of x and of the memory, which is None if there was none, and set `grads`."""
        *attended, normed, last = contexts
        grad = grad + self.mlp_norm.backward(self.mlp.backward(grad, last), normed)
        of_memory = None
        if len(attended) == 4:
            *attended, normed, last = attended
            of_query, of_memory, *_ = self.cross.backward(grad, last)
            assert of_query is not None
            grad = grad + self.cross_norm.backward(of_query, normed)
        normed, last = attended
        of_x = self.attention.backward(grad, last).query
        assert of_x is not None
        return grad + self.norm.backward(of_x, normed), of_memory


__all__ = ["MLP", "TransformerBlock"]
