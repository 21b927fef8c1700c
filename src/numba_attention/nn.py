"""What a transformer has beside attention, in NumPy: layers, an optimiser, a loss.

Every layer has ``forward(x) -> (y, ctx)`` and ``backward(grad, ctx) -> gradient of x``, as `MultiHeadAttention` has,
and ``layer(x)`` is y alone. `parameters()` gives its arrays by name, to be changed in place; `grads`, after `backward`,
their gradients by the same names. Products run on the threads of the package's own kernels (`layer.projection`).
"""

from __future__ import annotations  # short types in help()

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .layer.attention import MultiHeadAttention
from .layer.projection import linear, linear_backward
from .options import Array

Seed = np.random.Generator | int | None
Parameters = dict[str, Array]

# tanh(x P(x^2)) = erf(x / sqrt(2)) to 2e-7 / max(1, |x|), P with these coefficients, constant first (a minimax fit by
# linear programming). NumPy's tanh is vector code, scipy.special.erf is not: 1.5 ns an element instead of 15, where the
# matrix product that made the element took 7.
_ERF = (
    0.7978891814637531,
    0.03632125518526398,
    -2.312953483162343e-05,
    -5.835626292644817e-05,
    4.407049553180517e-06,
    -1.6076867349945865e-07,
    2.4133682576609942e-09,
)
_GELU_NUMBERS = 2**15  # of a block, which with two temporaries stays in a second-level cache


def layer_norm(x: Array, weight: Array, bias: Array | None, eps: float = 1e-5, out: Array | None = None) -> Array:
    """Shift and scale each row to mean 0 and variance 1, then scale by `weight` and add `bias`.

    Parameters
    ----------
    x : ndarray, shape (..., features)
    weight, bias : ndarray, shape (features,)
    eps : float, default 1e-5
        Added to the variance.
    out : ndarray, optional
        Array for the result, which may be `x`.

    Returns
    -------
    ndarray
        Shape and dtype of `x`.

    References
    ----------
    .. [1] Ba et al., "Layer Normalization", 2016, equation 4.

    Examples
    --------
    >>> import numpy as np, numba_attention.nn as nn
    >>> nn.layer_norm(np.array([[1.0, 3.0]]), np.ones(2), np.zeros(2), eps=0)
    array([[-1.,  1.]])
    """
    out = np.subtract(x, x.mean(axis=-1, keepdims=True), out=out)
    out *= _inverse_root(out, eps)
    out *= weight
    if bias is not None:
        out += bias
    return out


def gelu(x: Array, out: Array | None = None) -> Array:
    """``x * (1 + erf(x / sqrt(2))) / 2``: x times the probability that a normal number is below x.

    Parameters
    ----------
    x : ndarray
        float32 or float64.
    out : ndarray, optional
        Array for the result, which may be `x`.

    Returns
    -------
    ndarray
        To 1e-6 in float32; in float64 as exact as `scipy.special.erf`.

    References
    ----------
    .. [1] Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, section 2.

    Examples
    --------
    >>> import numpy as np, numba_attention.nn as nn
    >>> nn.gelu(np.array([-1.0, 0.0, 1.0])).round(4)
    array([-0.1587,  0.    ,  0.8413])
    """
    if out is None:
        out = np.empty_like(x, order="C")
    elif not out.flags.c_contiguous:
        out[...] = gelu(x)
        return out
    rows, results = np.ravel(x), out.reshape(-1)
    for start in range(0, rows.size, _GELU_NUMBERS):
        part = slice(start, start + _GELU_NUMBERS)
        np.multiply(rows[part], _normal_probability(rows[part]), out=results[part])
    return out


def cross_entropy(scores: Array, target: Array, mask: Array | None = None) -> tuple[float, Array]:
    """Mean of ``-log(softmax(scores)[target])``, and its gradient.

    Parameters
    ----------
    scores : ndarray, shape (..., classes)
    target : ndarray of int, shape (...)
        The right class of each row.
    mask : ndarray of bool, shape (...), optional
        Which rows count; by default all.

    Returns
    -------
    loss : float
    grad : ndarray
        Gradient with respect to `scores`.

    Examples
    --------
    >>> import numpy as np, numba_attention.nn as nn
    >>> loss, grad = nn.cross_entropy(np.zeros((3, 2)), np.array([0, 1, 1]))
    >>> round(loss, 4), grad[0]
    (0.6931, array([-0.16666667,  0.16666667]))
    """
    rows = np.ones(np.shape(target), bool) if mask is None else np.asarray(mask)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    at_target = np.take_along_axis(p, target[..., None], -1)
    losses = -np.log(np.maximum(at_target[..., 0], np.finfo(p.dtype).tiny))
    np.put_along_axis(p, target[..., None], at_target - 1, -1)
    p *= (rows / rows.sum())[..., None].astype(p.dtype)
    return float(losses[rows].mean()), p


class Module:
    """A layer that is made of others: its parameters and gradients are those of its attributes that are layers.

    The parameter ``weight`` of the attribute ``embed`` is ``"embed.weight"``; layers in a list ``blocks`` are
    ``"blocks.0"`` and so on. Subclasses write `forward` and `backward`.
    """

    def parts(self) -> dict[str, Any]:
        """Return the layers among the attributes, by name."""
        found: dict[str, Any] = {}
        for name, part in vars(self).items():
            if hasattr(part, "backward"):
                found[name] = part
            elif isinstance(part, list | tuple):
                found |= {f"{name}.{n}": one for n, one in enumerate(part) if hasattr(one, "backward")}
        return found

    def parameters(self) -> Parameters:
        """Return the parameters by name: the arrays themselves."""
        return {f"{name}.{key}": x for name, part in self.parts().items() for key, x in part.parameters().items()}

    @property
    def grads(self) -> Parameters:
        """Gradients of the parameters by name, from the last `backward`."""
        return {f"{name}.{key}": x for name, part in self.parts().items() for key, x in part.grads.items()}

    def forward(self, x: Array) -> tuple[Any, Any]:
        """Return the result, and what `backward` needs."""
        raise NotImplementedError

    def __call__(self, x: Array, *arguments: Any, **options: Any) -> Any:
        """Return the result of `forward` alone."""
        return self.forward(x, *arguments, **options)[0]


class _Leaf(Module):
    """A layer with arrays of its own."""

    _names: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._grads: Parameters = {}

    def parameters(self) -> Parameters:
        """Return the parameters by name: the arrays themselves."""
        return {name: getattr(self, name) for name in self._names if getattr(self, name) is not None}

    @property
    def grads(self) -> Parameters:
        """Gradients of the parameters by name, from the last `backward`."""
        return self._grads


class Linear(_Leaf):
    """``x @ weight.T + bias``, over the last axis.

    Parameters
    ----------
    inputs, outputs : int
        Features.
    rng : numpy.random.Generator or int, optional
        Generator or seed of the weights, uniform with such a limit that outputs vary as much as inputs.
    dtype : {numpy.float32, numpy.float64}
    bias : bool, default True

    Examples
    --------
    >>> import numpy as np, numba_attention.nn as nn
    >>> layer = nn.Linear(8, 3, rng=0)
    >>> y, ctx = layer.forward(np.ones((2, 5, 8), np.float32))
    >>> y.shape, layer.backward(np.ones_like(y), ctx).shape, layer.grads["weight"].shape
    ((2, 5, 3), (2, 5, 8), (3, 8))
    """

    _names = ("weight", "bias")

    def __init__(
        self, inputs: int, outputs: int, rng: Seed = None, dtype: Any = np.float32, *, bias: bool = True
    ) -> None:
        super().__init__()
        limit = math.sqrt(3 / inputs)
        self.weight = np.random.default_rng(rng).uniform(-limit, limit, (outputs, inputs)).astype(dtype)
        self.bias = np.zeros(outputs, dtype) if bias else None

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Return the result, and what `backward` needs."""
        return linear(x, self.weight, self.bias), x

    def backward(self, grad: Array, x: Array) -> Array:
        """Return the gradient of x, and set `grads`."""
        grad_x, weight, bias = linear_backward(grad, x, self.weight, self.bias is not None)
        self._grads = {"weight": weight} | ({} if bias is None else {"bias": bias})
        assert grad_x is not None
        return grad_x


class Embedding(_Leaf):
    """A vector for each token.

    Parameters
    ----------
    tokens, features : int
        How many vectors, and how long.
    rng : numpy.random.Generator or int, optional
    dtype : {numpy.float32, numpy.float64}
    """

    _names = ("weight",)

    def __init__(self, tokens: int, features: int, rng: Seed = None, dtype: Any = np.float32) -> None:
        super().__init__()
        self.weight = np.random.default_rng(rng).standard_normal((tokens, features)).astype(dtype)

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Return the vectors of tokens (...), and what `backward` needs."""
        return self.weight[x], x

    def backward(self, grad: Array, tokens: Array) -> None:
        """Set `grads`. Tokens have no gradient."""
        order = np.argsort(tokens, axis=None, kind="stable")
        sorted_tokens, rows = tokens.ravel()[order], grad.reshape(-1, grad.shape[-1])[order]
        weight = np.zeros_like(self.weight)
        if len(rows):
            starts = np.flatnonzero(np.r_[True, sorted_tokens[1:] != sorted_tokens[:-1]])
            weight[sorted_tokens[starts]] = np.add.reduceat(rows, starts)
        self._grads = {"weight": weight}


class LayerNorm(_Leaf):
    """`layer_norm` with a weight and a bias of its own.

    Parameters
    ----------
    features : int
    dtype : {numpy.float32, numpy.float64}
    eps : float, default 1e-5
    """

    _names = ("weight", "bias")

    def __init__(self, features: int, dtype: Any = np.float32, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = np.ones(features, dtype), np.zeros(features, dtype), eps

    def forward(self, x: Array) -> tuple[Array, Any]:
        """Return the result, and what `backward` needs."""
        centred = x - x.mean(axis=-1, keepdims=True)
        inverse = _inverse_root(centred, self.eps)
        centred *= inverse
        return centred * self.weight + self.bias, (centred, inverse)

    def backward(self, grad: Array, ctx: Any) -> Array:
        """Return the gradient of x, and set `grads`."""
        x, inverse = ctx
        rows = tuple(range(x.ndim - 1))
        self._grads = {"weight": (grad * x).sum(axis=rows), "bias": grad.sum(axis=rows)}
        grad = grad * self.weight
        result: Array = inverse * (grad - grad.mean(-1, keepdims=True) - x * (grad * x).mean(-1, keepdims=True))
        return result


class RMSNorm(_Leaf):
    """Each row divided by the root of its mean square, then scaled, as in LLaMA.

    Parameters
    ----------
    features : int
    dtype : {numpy.float32, numpy.float64}
    eps : float, default 1e-6
        Added to the mean square.

    References
    ----------
    .. [1] Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4.
    """

    _names = ("weight",)

    def __init__(self, features: int, dtype: Any = np.float32, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = np.ones(features, dtype), eps

    def forward(self, x: Array) -> tuple[Array, Any]:
        """Return the result, and what `backward` needs."""
        inverse = _inverse_root(x, self.eps)
        normed = x * inverse
        return normed * self.weight, (normed, inverse)

    def backward(self, grad: Array, ctx: Any) -> Array:
        """Return the gradient of x, and set `grads`."""
        x, inverse = ctx
        self._grads = {"weight": (grad * x).sum(axis=tuple(range(x.ndim - 1)))}
        grad = grad * self.weight
        result: Array = inverse * (grad - x * (grad * x).mean(-1, keepdims=True))
        return result


class GELU(_Leaf):
    """`gelu`, or with ``approximate=True`` the formula with tanh that GPT-2 uses.

    References
    ----------
    .. [1] Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, section 2.
    """

    def __init__(self, approximate: bool = False) -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, x: Array) -> tuple[Array, Any]:
        """Return the result, and what `backward` needs."""
        p = _tanh_probability(x) if self.approximate else _normal_probability(x)
        return x * p, (x, p)

    def backward(self, grad: Array, ctx: Any) -> Array:
        """Return the gradient of x."""
        x, p = ctx
        if self.approximate:
            a, b = x.dtype.type(math.sqrt(2 / math.pi)), x.dtype.type(0.044715)
            density = 2 * p * (1 - p) * a * (1 + 3 * b * x * x)
        else:
            density = x.dtype.type(1 / math.sqrt(2 * math.pi)) * np.exp(x * x * x.dtype.type(-0.5))
        result: Array = grad * (p + x * density)
        return result


class SiLU(_Leaf):
    """``x / (1 + exp(-x))``, also called swish.

    References
    ----------
    .. [1] Elfwing et al., "Sigmoid-Weighted Linear Units", 2017, section 2.
    """

    def forward(self, x: Array) -> tuple[Array, Any]:
        """Return the result, and what `backward` needs."""
        p = _sigmoid(x)
        return x * p, (x, p)

    def backward(self, grad: Array, ctx: Any) -> Array:
        """Return the gradient of x."""
        x, p = ctx
        result: Array = grad * (p + x * p * (1 - p))
        return result


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
        rng, hidden = np.random.default_rng(rng), 4 * features if hidden is None else hidden
        self.wide = Linear(features, hidden, rng, dtype, bias=bias)
        if gated:
            self.gate = Linear(features, hidden, rng, dtype, bias=bias)
        self.activation = _ACTIVATIONS[activation]()
        self.narrow = Linear(hidden, features, rng, dtype, bias=bias)

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
        rng, norm = np.random.default_rng(rng), RMSNorm if rms else LayerNorm
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
        memory_lengths : int or array of int, optional
            Valid positions of the memory.
        training : bool, default False
            Whether to drop weights.
        **options
            Those of the self-attention, such as `is_causal`, `key_lengths` or `cu_seqlens`.
        """
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
        x = x + self.attention(self.norm(x), cache=cache, is_causal=True)
        if memory is not None:
            x = x + self.cross(self.cross_norm(x), memory, cache=memory_cache, key_lengths=memory_lengths)
        result: Array = x + self.mlp(self.mlp_norm(x))
        return result

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


class Adam:
    """The optimiser Adam, with decay of the weights apart from the gradients (AdamW).

    Parameters
    ----------
    parameters : dict of ndarray
        What to change, in place.
    rate : float, default 1e-3
    betas : (float, float)
        Decay of the running means of gradients and of their squares.
    decay : float, default 0
        Decay of the parameters that are matrices.
    clip : float, default 1
        The longest that all gradients together, as one vector, may be.

    References
    ----------
    .. [1] Kingma and Ba, "Adam", 2015, algorithm 1.
    .. [2] Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2.

    Examples
    --------
    >>> import numpy as np, numba_attention.nn as nn
    >>> x = {"x": np.array([3.0])}
    >>> adam = nn.Adam(x, rate=0.1)
    >>> for step in range(100):
    ...     adam.step({"x": 2 * x["x"]})
    >>> bool(abs(x["x"][0]) < 0.1)
    True
    """

    def __init__(
        self,
        parameters: Mapping[str, Array],
        rate: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        decay: float = 0.0,
        clip: float = 1.0,
    ) -> None:
        self.parameters, self.rate, self.betas, self.decay, self.clip = parameters, rate, betas, decay, clip
        self.mean = {name: np.zeros_like(x) for name, x in parameters.items()}
        self.square = {name: np.zeros_like(x) for name, x in parameters.items()}
        self.steps = 0

    def step(self, grads: Mapping[str, Array], scale: float = 1.0) -> None:
        """Change the parameters in place; `scale` is that of the learning rate, from a schedule."""
        self.steps += 1
        first, second = self.betas
        length = math.sqrt(sum(float(np.vdot(g, g)) for g in grads.values()))
        shorten = min(1.0, self.clip / (length + 1e-12))
        rate = scale * self.rate * math.sqrt(1 - second**self.steps) / (1 - first**self.steps)
        for name, x in self.parameters.items():
            grad, mean, square = grads[name] * x.dtype.type(shorten), self.mean[name], self.square[name]
            mean += (1 - first) * (grad - mean)
            square += (1 - second) * (grad * grad - square)
            if self.decay and x.ndim > 1:
                x *= 1 - scale * self.rate * self.decay
            x -= rate * mean / (np.sqrt(square) + 1e-8)


def warmup_cosine(step: int, steps: int, warmup: int = 100) -> float:
    """Return the factor of the learning rate: from 0 to 1 over `warmup` steps, then down to 0 on a cosine.

    Examples
    --------
    >>> import numba_attention.nn as nn
    >>> [round(nn.warmup_cosine(n, 1000), 2) for n in (0, 99, 550, 1000)]
    [0.01, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _inverse_root(x: Array, eps: float) -> Array:
    """Return 1 / sqrt(mean square + eps) of each row."""
    square = np.vecdot(x, x)[..., None] / x.dtype.type(x.shape[-1])
    result: Array = 1 / np.sqrt(square + x.dtype.type(eps))
    return result


def _normal_probability(x: Array) -> Array:
    """Return (1 + erf(x / sqrt(2))) / 2."""
    if x.dtype != np.float32:
        from scipy.special import ndtr

        exact: Array = ndtr(x)
        return exact
    square = x * x
    u = square * np.float32(_ERF[-1])
    for coefficient in _ERF[-2:0:-1]:
        u += np.float32(coefficient)
        u *= square
    u += np.float32(_ERF[0])
    u *= x
    np.tanh(u, out=u)
    u += np.float32(1)
    u *= np.float32(0.5)
    return u


def _tanh_probability(x: Array) -> Array:
    a, b = x.dtype.type(math.sqrt(2 / math.pi)), x.dtype.type(0.044715)
    result: Array = x.dtype.type(0.5) * (1 + np.tanh(a * x * (1 + b * x * x)))
    return result


def _sigmoid(x: Array) -> Array:
    half = x.dtype.type(0.5)
    result: Array = half * (1 + np.tanh(half * x))
    return result


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
