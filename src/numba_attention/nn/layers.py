"""Layers with arrays of their own, or with none: linear, embedding, norms, activations."""

from __future__ import annotations  # short types in help()

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..layer.activations import probability
from ..layer.parameters import as_generator, as_parameters, copy_parameters
from ..layer.projection import linear, linear_backward
from ..layer.rowwise import activated, as_eps, inverse_root, normalized
from ..options import Array
from ..validation import as_floats, as_real_dtype, as_size, indices_within

_FAR = 1e3  # beyond it an activation is x or 0, also in float64, and polynomials of x would overflow in float32
Seed = np.random.Generator | int | None
Parameters = dict[str, Array]


def _like(grad: Any, shape: tuple[int, ...]) -> Array:
    """Check a gradient, which must have the shape of what `forward` returned."""
    array = as_floats("grad", grad)
    if array.shape != shape:
        raise ValueError(f"grad must have the shape of what forward returned, {shape}, got {array.shape}")
    return array


def _layers_in(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the layers in an attribute, by name: itself, or those in lists, tuples and mappings at any depth."""
    if hasattr(value, "backward"):
        yield name, value
    elif isinstance(value, list | tuple | Mapping):
        for key, one in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _layers_in(f"{name}.{key}", one)


class Module:
    """A layer that is made of others: its parameters and gradients are those of its attributes that are layers.

    The parameter ``weight`` of the attribute ``embed`` is ``"embed.weight"``; layers in a list ``blocks`` are
    ``"blocks.0"`` and so on, and those in a dict have its keys, in lists, tuples and dicts at any depth. An array that
    is an attribute itself is no parameter: give it to a layer. Subclasses write `forward` and `backward`.

    A layer that is met twice is listed once, by its first name, and so is an array that two layers share, as in
    PyTorch. The gradient of such an array is the sum of both layers' gradients. A layer that is called twice has
    gradients of its last `backward` alone: add up those of the others.

    Examples
    --------
    >>> import numpy as np, numba_attention.nn as nn
    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         self.heads = {"mean": nn.Linear(4, 2, rng=0), "spread": [nn.Linear(4, 1, rng=1, bias=False)]}
    >>> list(Model().parameters())
    ['heads.mean.weight', 'heads.mean.bias', 'heads.spread.0.weight']
    """

    def parts(self) -> dict[str, Any]:
        """Return the layers among the attributes, by name, each once."""
        found: dict[int, tuple[str, Any]] = {}
        for name, value in vars(self).items():
            for path, part in _layers_in(name, value):
                found.setdefault(id(part), (path, part))
        return dict(found.values())

    def _leaves(self) -> dict[str, Any]:
        """Return the layers that say themselves what their parameters are, at any depth, by name, each once."""
        found: dict[int, tuple[str, Any]] = {}
        for name, part in self.parts().items():
            gathers = isinstance(part, Module) and type(part).parameters is Module.parameters
            for path, leaf in part._leaves().items() if gathers else [("", part)]:
                found.setdefault(id(leaf), (f"{name}.{path}" if path else name, leaf))
        return dict(found.values())

    def _listed(self) -> list[tuple[str, Array, Any, str]]:
        """Return each array with its first name, the layer that it belongs to, and its name there."""
        first: dict[int, str] = {}
        return [
            (first.setdefault(id(x), f"{path}.{key}"), x, leaf, key)
            for path, leaf in self._leaves().items()
            for key, x in leaf.parameters().items()
        ]

    def parameters(self) -> Parameters:
        """Return the parameters by name: the arrays themselves."""
        return {name: x for name, x, *_ in self._listed()}

    def load_parameters(self, parameters: Mapping[str, ArrayLike]) -> None:
        """Copy parameters into the layer, converted to its dtype.

        Parameters
        ----------
        parameters : mapping of str to array of float
            Exactly the names and shapes of `parameters`, such as ``numpy.load`` returns of a file that
            ``numpy.savez(path, **layer.parameters())`` wrote.

        Raises
        ------
        TypeError
            A parameter is not floating point.
        ValueError
            A name is missing or unknown, a shape differs, or a finite number would be infinite in the dtype of the
            layer. The layer is then as it was.

        Examples
        --------
        >>> import tempfile, numpy as np, numba_attention.nn as nn
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp(), "mlp.npz")
        >>> trained, mlp = nn.MLP(8, rng=0), nn.MLP(8, rng=1)
        >>> np.savez(path, **trained.parameters())
        >>> with np.load(path) as arrays:
        ...     mlp.load_parameters(arrays)
        >>> bool(np.array_equal(mlp.wide.weight, trained.wide.weight))
        True
        """
        copy_parameters(self.parameters(), as_parameters("parameters", parameters))

    @property
    def grads(self) -> Parameters:
        """Gradients of the parameters by name, from the last `backward`."""
        found: Parameters = {}
        for name, _, leaf, key in self._listed():
            grad = leaf.grads.get(key)
            if grad is not None:
                found[name] = found[name] + grad if name in found else grad
        return found

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
        inputs, outputs, dtype = as_size("inputs", inputs), as_size("outputs", outputs), as_real_dtype(dtype)
        limit = math.sqrt(3 / inputs)
        self.weight = as_generator(rng).uniform(-limit, limit, (outputs, inputs)).astype(dtype)
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
        shape = as_size("tokens", tokens), as_size("features", features)
        self.weight = as_generator(rng).standard_normal(shape).astype(as_real_dtype(dtype))

    def forward(self, x: ArrayLike) -> tuple[Array, Array]:
        """Return the vectors of tokens (...), and what `backward` needs.

        Tokens are integers from 0; others are a TypeError or a ValueError.
        """
        tokens = indices_within("tokens", x, len(self.weight))
        return self.weight[tokens], tokens

    def backward(self, grad: Array, tokens: Array) -> None:
        """Set `grads`. Tokens have no gradient."""
        grad = _like(grad, (*tokens.shape, self.weight.shape[1]))
        order = np.argsort(tokens, axis=None, kind="stable")
        sorted_tokens, rows = tokens.ravel()[order], grad.reshape(-1, grad.shape[-1])[order]
        weight = np.zeros_like(self.weight)
        if len(rows):
            starts = np.flatnonzero(np.r_[True, sorted_tokens[1:] != sorted_tokens[:-1]])
            weight[sorted_tokens[starts]] = np.add.reduceat(rows, starts)
        self._grads = {"weight": weight}


class _Norm(_Leaf):
    """A norm of rows; `forward` computes nothing that only gradients need."""

    weight: Array
    bias: Array | None
    eps: float
    _center = False

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Return the result, and what `backward` needs."""
        if np.shape(x)[-1:] != self.weight.shape:
            raise ValueError(f"x must have shape (..., {len(self.weight)}), got {np.shape(x)}")
        return normalized(x, self.weight, self.bias, self.eps, center=self._center), x

    def backward(self, grad: Array, x: Array) -> Array:
        """Return the gradient of x, and set `grads`."""
        grad, x = _like(grad, np.shape(x)), as_floats("x", x)
        if self._center:
            x = x - x.mean(axis=-1, keepdims=True)
        inverse = inverse_root(x, self.eps)
        x = x * inverse
        rows = tuple(range(x.ndim - 1))
        self._grads = {"weight": (grad * x).sum(axis=rows)}
        if self.bias is not None:
            self._grads["bias"] = grad.sum(axis=rows)
        grad = grad * self.weight
        result: Array = grad - x * (grad * x).mean(-1, keepdims=True)
        if self._center:
            result -= grad.mean(-1, keepdims=True)
        result *= inverse
        return result


class LayerNorm(_Norm):
    """`layer_norm` with a weight and a bias of its own.

    Parameters
    ----------
    features : int
    dtype : {numpy.float32, numpy.float64}
    eps : float, default 1e-5
    """

    _names = ("weight", "bias")
    _center = True

    def __init__(self, features: int, dtype: Any = np.float32, eps: float = 1e-5) -> None:
        super().__init__()
        features, dtype = as_size("features", features), as_real_dtype(dtype)
        self.weight, self.bias, self.eps = np.ones(features, dtype), np.zeros(features, dtype), as_eps(eps)


class RMSNorm(_Norm):
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
    bias = None

    def __init__(self, features: int, dtype: Any = np.float32, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = np.ones(as_size("features", features), as_real_dtype(dtype)), as_eps(eps)


class _Activation(_Leaf):
    """A function of each number, ``x * probability(x)``."""

    name: str

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Return the result, and what `backward` needs."""
        return activated(self.name, x), x

    def backward(self, grad: Array, x: Array) -> Array:
        """Return the gradient of x, in its dtype."""
        grad, x = _like(grad, np.shape(x)), as_floats("x", x)
        wide = np.float32 if x.dtype.itemsize == 2 else x.dtype  # in float16, squares of 256 would overflow
        near = np.clip(x.astype(wide, copy=False), -_FAR, _FAR)
        p = probability(self.name, near)
        result: Array = (grad * (p + near * self._slope(near, p))).astype(x.dtype, copy=False)
        return result

    def _slope(self, x: Array, p: Array) -> Array:
        """Return the derivative of the probability p."""
        raise NotImplementedError


class GELU(_Activation):
    """`gelu`, or with ``approximate=True`` the formula with tanh that GPT-2 uses.

    References
    ----------
    .. [1] Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, section 2.
    """

    def __init__(self, approximate: bool = False) -> None:
        super().__init__()
        self.approximate = approximate

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of the activation."""
        return "gelu_tanh" if self.approximate else "gelu"

    def _slope(self, x: Array, p: Array) -> Array:
        real = x.dtype.type
        if self.approximate:
            slope: Array = 2 * p * (1 - p) * real(math.sqrt(2 / math.pi)) * (1 + real(3 * 0.044715) * x * x)
            return slope
        density: Array = real(1 / math.sqrt(2 * math.pi)) * np.exp(x * x * real(-0.5))
        return density


class SiLU(_Activation):
    """``x / (1 + exp(-x))``, also called swish.

    References
    ----------
    .. [1] Elfwing et al., "Sigmoid-Weighted Linear Units", 2017, section 2.
    """

    name = "silu"

    def _slope(self, x: Array, p: Array) -> Array:
        slope: Array = p * (1 - p)
        return slope


__all__ = ["GELU", "Embedding", "LayerNorm", "Linear", "Module", "RMSNorm", "SiLU"]
