"""Features as heads: the projections of multi-head attention, and where the rotary embedding places their rows."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..options import Array
from ..problem.dense import sum_to
from ..rotary import Turn, rotate
from .parameters import Weights
from .positions import Turns, places_of
from .projection import linear

Positions = ArrayLike | tuple[ArrayLike, ArrayLike]

# The input projections that one product can compute, as (first, last + 1), by whether key is query and value is key.
_RUNS = {
    (True, True): ((0, 3),),
    (True, False): ((0, 2), (2, 3)),
    (False, True): ((0, 1), (1, 3)),
    (False, False): ((0, 1), (1, 2), (2, 3)),
}


class Heads(Weights):
    """A layer's features as heads, and heads as features. Between `Weights` and `MultiHeadAttention`."""

    def _runs(self, key_too: bool, value_too: bool) -> tuple[tuple[int, int], ...]:
        """Return the products of the input, each of the projections first .. last - 1.

        `key_too` says that key is the array query, and `value_too` that value is the array key.
        """
        return _RUNS[False, False] if self._packed is None else _RUNS[key_too, value_too]

    def _project(self, query: Array, key: Array, value: Array) -> list[Array]:
        """Return queries (..., H, L, E), keys and values (..., Hkv, S, E), as views of products with features last."""
        inputs, projected = (query, key, value), []
        for first, last in self._runs(key is query, value is key):
            heads = self._heads(linear(inputs[first], *self._joined(first, last)))
            projected += [heads[..., self._place(n, first), :, :] for n in range(first, last)]
        return projected

    def _project_back(self, heads: Array) -> Array:
        """(..., L, H, E) -> (..., L, embed_dim)."""
        weight, bias = self._parameters["out_proj.weight"], self._parameters.get("out_proj.bias")
        return linear(as_features(heads), weight, bias)

    def _joined_gradient(
        self, grads: Sequence[Array | None], turns: tuple[Turn, Turn] | None, first: int, rows: tuple[int, ...]
    ) -> Array:
        """Join gradients of heads (..., heads, n, E) to that of the product (*rows, features) they are views of.

        The copy cannot be avoided, because the features of a row must be contiguous.
        """
        count = self._place(first + len(grads) - 1, first).stop
        joined = np.empty((*rows, count * self.head_dim), self.dtype)
        heads = self._heads(joined)
        for n, grad in enumerate(grads, first):
            assert grad is not None
            own = heads[..., self._place(n, first), :, :]
            if turns is None or n == 2:
                own[...] = grad
            elif grad.shape == own.shape:
                rotate(grad, turns[n].back(), own)
            else:  # rows whose positions differ between sequences: see `turned`
                rotate(grad, turns[n].back(), grad)
                own[...] = sum_to(grad, own.shape)
        return joined

    def _turns(
        self, positions: Positions | None, of_queries: tuple[int, ...], of_keys: tuple[int, ...], is_self: bool
    ) -> Turns | None:
        """Return the turns at the positions of the caller, or None without any."""
        if positions is None:
            return None
        if self._rotation is None:
            raise ValueError("positions must be None for a layer without rotary=")
        return places_of(self._rotation, positions, of_queries, of_keys, is_self, self.dtype).turns(self.dtype)

    def _heads(self, features: Array) -> Array:
        """(..., L, heads * E) -> (..., heads, L, E)."""
        *rows, size = features.shape
        return features.reshape(*rows, size // self.head_dim, self.head_dim).swapaxes(-3, -2)


def as_features(heads: Array) -> Array:
    """(..., L, heads, E) -> (..., L, heads * E)."""
    return heads.reshape(*heads.shape[:-2], heads.shape[-2] * heads.shape[-1])


__all__ = ["Heads", "Positions", "as_features"]
