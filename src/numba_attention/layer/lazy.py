"""Calls of the layer with arrays that are not in memory, which another module of the package computes in blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..foreign import module_of_layer
from ..options import Array, Gradients


class LazyContext:
    """What `MultiHeadAttention.backward` needs from a call of `forward` with lazy arrays."""

    layer: Any

    def result(self) -> Any:
        """Return the result of the layer."""
        raise NotImplementedError

    def backward(self, grad_out: Any, mod_grads: Any) -> tuple[Gradients, dict[str, Array]]:
        """Return the gradients of the inputs, and of the parameters by name."""
        raise NotImplementedError


def implementation_for(*arrays: Any) -> Any:
    """Return the module that attends to these arrays lazily; None if all are in memory."""
    if all(x is None or type(x) is np.ndarray for x in arrays):
        return None
    return module_of_layer(arrays)
