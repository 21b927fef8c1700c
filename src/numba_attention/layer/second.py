"""Derivatives of the layer along a direction: those of attention between those of its projections, which are linear.

The gradients of the layer are those of ``sum(grad_out * out)``, whose Hessian is symmetric: what comes back from
gradients of the gradients is the derivative of the gradients along that direction, as for attention (docs/second.md).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..options import Array, Gradients
from ..problem.second import check_parts, given_parts
from ..second import attention_backward_jvp, attention_jvp
from ..validation import check_like
from .heads import as_features
from .parameters import INPUTS
from .positions import turned
from .projection import linear, linear_backward, without_idle_rows


class Direction(NamedTuple):
    """How inputs and parameters of a layer move; None is 0."""

    inputs: list[Array | None]  # of query, key and value; None too for what was not passed
    bias: Array | None
    sinks: Array | None
    parameters: Mapping[str, Array | None]

    def of(self, name: str) -> tuple[Array | None, Array | None]:
        """Return the tangents of weight and bias of a projection."""
        return self.parameters.get(f"{name}.weight"), self.parameters.get(f"{name}.bias")


def as_direction(layer: Any, ctx: Any, name: str, tangents: Any, of_parameters: str, parameters: Any) -> Direction:
    """Check tangents of inputs and parameters: each has the shape and dtype of what it belongs to, or is None."""
    given = given_parts(name, tangents)
    inputs: list[Array | None] = []
    for part, own in zip(("query", "key", "value"), ctx.inputs, strict=True):
        x = getattr(given, part)
        if x is not None:
            if own is None:
                raise ValueError(f"{name}.{part} must be None without {part}: it moves with the input in its place")
            x = check_like(f"{name}.{part}", x, own.shape, layer.dtype)
        inputs.append(x)
    check_parts(name, given, ctx.options)
    if not isinstance(parameters, Mapping | None):
        raise TypeError(f"{of_parameters} must be a mapping of names to arrays, got {type(parameters).__qualname__}")
    own_parameters = layer.parameters()
    for key, x in (parameters or {}).items():
        if key not in own_parameters:
            raise ValueError(f"{of_parameters} must have names of parameters, {', '.join(own_parameters)}, got {key!r}")
        if x is not None:
            check_like(f"{of_parameters}[{key!r}]", x, own_parameters[key].shape, layer.dtype)
    return Direction(inputs, given.bias, given.sinks, parameters or {})


def jvp(layer: Any, ctx: Any, direction: Direction) -> Array:
    """Return the tangent of the output of `forward`."""
    u = _of_heads(layer, ctx, direction)
    return _output(layer, ctx, direction, attention_jvp(u, **_saved(ctx)).out_tangent)


def double_backward(layer: Any, ctx: Any, direction: Direction, grad_out: Array) -> tuple[Gradients, Array, Any]:
    """Return the tangents of the gradients of inputs, output and parameters."""
    u, saved, names = _of_heads(layer, ctx, direction), _saved(ctx), layer.parameters()
    moved = attention_jvp(u, **saved)
    weight, moved_weight = names["out_proj.weight"], direction.of("out_proj")[0]
    first, along = attention_backward_jvp(
        u, _as_heads(layer, ctx, linear(grad_out, weight.T)), **saved,
        out_tangent=moved.out_tangent, lse_tangent=moved.lse_tangent,
        grad_out_tangent=None if moved_weight is None else _as_heads(layer, ctx, linear(grad_out, moved_weight.T)),
    )  # fmt: skip
    of_weight = linear_backward(grad_out, _features(ctx, moved.out_tangent), weight, False, False)[1]
    grads: dict[str, Any] = {"out_proj.weight": of_weight, "out_proj.bias": np.zeros(layer.embed_dim, layer.dtype)}
    of_inputs: list[Array | None] = [None, None, None]
    for n, (name, source, *of_heads) in enumerate(zip(INPUTS, ctx.sources, first[:3], along[:3], strict=True)):
        x, moved_x, moved_weight = ctx.inputs[source], direction.inputs[source], direction.of(name)[0]
        grad, change = (_joined(layer, ctx, heads, n, x.shape[:-1]) for heads in of_heads)
        moved_grad, of_weight, of_bias = linear_backward(change, without_idle_rows(x, change), names[f"{name}.weight"])
        if moved_x is not None:
            of_weight += linear_backward(grad, without_idle_rows(moved_x, grad), names[f"{name}.weight"], False, False)[
                1
            ]
        assert moved_grad is not None
        if moved_weight is not None:
            moved_grad += linear(grad, moved_weight.T)
        grads |= {f"{name}.weight": of_weight, f"{name}.bias": of_bias}
        so_far = of_inputs[source]
        of_inputs[source] = moved_grad if so_far is None else so_far + moved_grad
    inputs = Gradients(of_inputs[0], of_inputs[1], of_inputs[2], along.bias, along.sinks)
    return inputs, _output(layer, ctx, direction, moved.out_tangent), {name: grads[name] for name in names}


def _saved(ctx: Any) -> dict[str, Any]:
    """Return the arguments of attention that `forward` kept."""
    if ctx.starts is None:
        own = {"out": ctx.heads.swapaxes(-3, -2)}
    else:
        own = {"out": ctx.heads, "cu_seqlens_q": ctx.starts, "cu_seqlens_k": ctx.starts}
    return {"query": ctx.q, "key": ctx.k, "value": ctx.v, "lse": ctx.lse, **own, **ctx.options}


def _of_heads(layer: Any, ctx: Any, direction: Direction) -> Gradients:
    """Return the tangents of the projected queries, keys and values."""
    parts = []
    for n, (name, source) in enumerate(zip(INPUTS, ctx.sources, strict=True)):
        weight = layer.parameters()[f"{name}.weight"]
        x = _moved(ctx.inputs[source], direction.inputs[source], weight, *direction.of(name))
        if x is not None:
            x = layer._heads(x)
            if ctx.turns is not None and n < 2:
                x = turned(x, ctx.turns[n])
            x = x if ctx.starts is None else x.swapaxes(0, 1)
        parts.append(x)
    return Gradients(parts[0], parts[1], parts[2], direction.bias, direction.sinks)


def _output(layer: Any, ctx: Any, direction: Direction, moved_heads: Array) -> Array:
    """Return the tangent of the output projection."""
    weight = layer.parameters()["out_proj.weight"]
    moved = _moved(_features(ctx, ctx.heads), _features(ctx, moved_heads), weight, *direction.of("out_proj"))
    assert moved is not None
    return moved


def _moved(x: Array, moved_x: Array | None, weight: Array, moved_weight: Any, moved_bias: Any) -> Array | None:
    """Return the tangent of a projection, or None for 0."""
    if moved_x is None and moved_weight is None and moved_bias is None:
        return None
    total = np.zeros((*x.shape[:-1], len(weight)), x.dtype) if moved_x is None else linear(moved_x, weight)
    if moved_weight is not None:
        total += linear(x, moved_weight)
    if moved_bias is not None:
        total += moved_bias
    return total


def _joined(layer: Any, ctx: Any, grad: Any, n: int, rows: tuple[int, ...]) -> Array:
    """Return a gradient of heads as that of projection n, (*rows, features)."""
    joined: Array = layer._joined_gradient([grad if ctx.starts is None else grad.swapaxes(0, 1)], ctx.turns, n, rows)
    return joined


def _as_heads(layer: Any, ctx: Any, features: Array) -> Array:
    """Return features as attention has heads."""
    heads: Array = layer._heads(features)
    return heads if ctx.starts is None else heads.swapaxes(0, 1)


def _features(ctx: Any, heads: Array) -> Array:
    """Join the heads of attention, or of the context, which has them beside the features."""
    if heads is not ctx.heads and ctx.starts is None:
        heads = heads.swapaxes(-3, -2)
    return as_features(heads)
