"""What a transformer has beside attention, in plain NumPy: for the examples here, to be read and copied.

Every layer has ``forward(x) -> (y, ctx)`` and ``backward(grad, ctx) -> gradient of x``, as `na.MultiHeadAttention`
has; `parameters()` gives its arrays by name, to be changed in place, and `grads`, after `backward`, their gradients.
"""

import math

import numpy as np
from threadpoolctl import threadpool_limits

import numba_attention as na

# The products here are small, and OpenBLAS's threads spin for 0.1 s after each, on the cores that attention wants.
threadpool_limits(1, "blas")


class Module:
    """Layers by name; their parameters and gradients under ``name.parameter``."""

    def parts(self):
        return {name: part for name, part in vars(self).items() if hasattr(part, "backward")}

    def parameters(self):
        return {f"{name}.{key}": x for name, part in self.parts().items() for key, x in part.parameters().items()}

    @property
    def grads(self):
        return {f"{name}.{key}": x for name, part in self.parts().items() for key, x in part.grads.items()}


class Linear:
    """``x @ weight.T + bias``."""

    def __init__(self, inputs, outputs, rng=None, dtype=np.float32):
        limit = math.sqrt(3 / inputs)  # outputs then vary as much as inputs
        self.weight = np.random.default_rng(rng).uniform(-limit, limit, (outputs, inputs)).astype(dtype)
        self.bias = np.zeros(outputs, dtype)
        self.grads = {}

    def parameters(self):
        return {"weight": self.weight, "bias": self.bias}

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])  # as one matrix: a stack of them would be many small products
        return (rows @ self.weight.T + self.bias).reshape(*x.shape[:-1], -1), x

    def backward(self, grad, x):
        rows = grad.reshape(-1, grad.shape[-1])
        self.grads = {"weight": rows.T @ x.reshape(-1, x.shape[-1]), "bias": rows.sum(0)}
        return (rows @ self.weight).reshape(x.shape)


class Embedding:
    """A vector for each token."""

    def __init__(self, tokens, features, rng=None, dtype=np.float32):
        self.weight = np.random.default_rng(rng).standard_normal((tokens, features)).astype(dtype)
        self.grads = {}

    def parameters(self):
        return {"weight": self.weight}

    def forward(self, tokens):
        return self.weight[tokens], tokens

    def backward(self, grad, tokens):
        # A product with one-hot rows: for few tokens far faster than np.add.at.
        one_hot = (tokens.reshape(-1, 1) == np.arange(len(self.weight))).astype(grad.dtype)
        self.grads = {"weight": one_hot.T @ grad.reshape(-1, grad.shape[-1])}


class LayerNorm:
    """Each row with mean 0 and variance 1, then scaled and shifted (Ba et al., 2016, equation 4)."""

    def __init__(self, features, dtype=np.float32):
        self.weight, self.bias = np.ones(features, dtype), np.zeros(features, dtype)
        self.grads = {}

    def parameters(self):
        return {"weight": self.weight, "bias": self.bias}

    def forward(self, x):
        x = x - x.mean(-1, keepdims=True)
        inverse = 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + x.dtype.type(1e-5))
        x *= inverse
        return x * self.weight + self.bias, (x, inverse)

    def backward(self, grad, ctx):
        x, inverse = ctx
        rows = tuple(range(x.ndim - 1))
        self.grads = {"weight": (grad * x).sum(rows), "bias": grad.sum(rows)}
        grad = grad * self.weight
        return inverse * (grad - grad.mean(-1, keepdims=True) - x * (grad * x).mean(-1, keepdims=True))


class GELU:
    """x times the probability that a normal number is below x, nearly (Hendrycks and Gimpel, 2016, section 2).

    With tanh in the place of erf, for which NumPy has vector code.
    """

    def __init__(self):
        self.grads = {}

    def parameters(self):
        return {}

    def forward(self, x):
        a, b = x.dtype.type(math.sqrt(2 / math.pi)), x.dtype.type(0.044715)
        t = np.tanh(a * x * (1 + b * x * x))
        return x.dtype.type(0.5) * x * (1 + t), (x, t)

    def backward(self, grad, ctx):
        x, t = ctx
        a, b = x.dtype.type(math.sqrt(2 / math.pi)), x.dtype.type(0.044715)
        slope = a * (1 + 3 * b * x * x)
        return grad * x.dtype.type(0.5) * (1 + t + x * (1 - t * t) * slope)


class MLP(Module):
    """Four times as wide in the middle."""

    def __init__(self, features, rng=None, dtype=np.float32):
        rng = np.random.default_rng(rng)
        self.wide = Linear(features, 4 * features, rng, dtype)
        self.bend = GELU()
        self.narrow = Linear(4 * features, features, rng, dtype)

    def forward(self, x):
        x, first = self.wide.forward(x)
        x, second = self.bend.forward(x)
        x, third = self.narrow.forward(x)
        return x, (first, second, third)

    def backward(self, grad, ctx):
        first, second, third = ctx
        return self.wide.backward(self.bend.backward(self.narrow.backward(grad, third), second), first)


class TransformerBlock(Module):
    """Self-attention, attention to a memory if `cross`, and an MLP, each after a norm and beside a way straight on.

    The norms come first, as in Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020, figure 1b.
    """

    def __init__(self, features, heads, *, rotary=None, cross=False, rng=None, dtype=np.float32):
        rng = np.random.default_rng(rng)
        self.norm = LayerNorm(features, dtype)
        self.attention = na.MultiHeadAttention(features, heads, rotary=rotary, rng=rng, dtype=dtype)
        if cross:
            self.cross_norm = LayerNorm(features, dtype)
            self.cross = na.MultiHeadAttention(features, heads, rng=rng, dtype=dtype)
        self.mlp_norm = LayerNorm(features, dtype)
        self.mlp = MLP(features, rng, dtype)

    def forward(self, x, memory=None, *, memory_lengths=None, **options):
        """Options are those of the self-attention."""
        contexts = []

        def beside(x, norm, layer, *inputs, **options):
            y, ctx = norm.forward(x)
            contexts.append(ctx)
            y, ctx = layer.forward(y, *inputs, **options)
            contexts.append(ctx)
            return x + y

        x = beside(x, self.norm, self.attention, **options)
        if memory is not None:
            x = beside(x, self.cross_norm, self.cross, memory, key_lengths=memory_lengths)
        return beside(x, self.mlp_norm, self.mlp), contexts

    def step(self, x, cache, memory=None, memory_cache=None, memory_lengths=None):
        """What `forward` gives for x, the next positions, where caches have those before it; nothing to differentiate.

        A memory of length 0 adds nothing to what `memory_cache` has.
        """
        x = x + self.attention(self.norm.forward(x)[0], cache=cache, is_causal=True)
        if memory is not None:
            x = x + self.cross(self.cross_norm.forward(x)[0], memory, cache=memory_cache, key_lengths=memory_lengths)
        return x + self.mlp.forward(self.mlp_norm.forward(x)[0])[0]

    def backward(self, grad, contexts):
        """Gradients of x and of the memory, which is None if there was none."""
        *attended, normed, last = contexts
        grad = grad + self.mlp_norm.backward(self.mlp.backward(grad, last), normed)
        of_memory = None
        if len(attended) == 4:
            *attended, normed, last = attended
            of_query, of_memory, *_ = self.cross.backward(grad, last)
            grad = grad + self.cross_norm.backward(of_query, normed)
        normed, last = attended
        return grad + self.norm.backward(self.attention.backward(grad, last).query, normed), of_memory


def cross_entropy(scores, target, mask=None):
    """Mean of -log softmax(scores)[target] where the mask is true, and its gradient with respect to the scores."""
    mask = np.ones(target.shape, bool) if mask is None else mask
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    at_target = np.take_along_axis(p, target[..., None], -1)
    loss = -np.log(np.maximum(at_target[..., 0], np.finfo(p.dtype).tiny))[mask].mean()
    np.put_along_axis(p, target[..., None], at_target - 1, -1)
    p *= (mask / mask.sum())[..., None].astype(p.dtype)
    return float(loss), p


class Adam:
    """Kingma and Ba, "Adam", 2015, algorithm 1; with decay of the weights apart from the gradients (AdamW, 2019).

    `clip` is the longest that all gradients together, as one vector, may be.
    """

    def __init__(self, parameters, rate=1e-3, *, betas=(0.9, 0.99), decay=0.0, clip=1.0):
        self.parameters, self.rate, self.betas, self.decay, self.clip = parameters, rate, betas, decay, clip
        self.mean = {name: np.zeros_like(x) for name, x in parameters.items()}
        self.square = {name: np.zeros_like(x) for name, x in parameters.items()}
        self.steps = 0

    def step(self, grads, scale=1.0):
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


def warmup_cosine(step, steps, warmup=100):
    """Factor of the learning rate: from 0 to 1 over `warmup` steps, then down to 0 on a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
