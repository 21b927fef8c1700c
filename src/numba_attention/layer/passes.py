"""The passes of the layer between projections: attention of dense and of packed sequences, and the gradients."""

from __future__ import annotations  # short types in help()

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..api import attention, attention_backward, attention_weights
from ..options import Array, Gradients
from ..rotary import Turn
from ..validation import as_ints
from ..varlen import attention_varlen, attention_varlen_backward
from .heads import Heads, Positions, as_features
from .inputs import check_inputs, hide_padding
from .lazy import LazyContext
from .parameters import INPUTS
from .positions import default_places, packed_places, turned
from .projection import linear_backward, without_idle_rows


@dataclass(slots=True, eq=False, repr=False)
class Context:
    """What `MultiHeadAttention.backward` needs from one call of `forward`."""

    layer: Heads
    inputs: tuple[Array, Array | None, Array | None]  # query, key and value as the caller passed them
    q: Array  # (..., H, L, E)
    k: Array  # (..., Hkv, S, E)
    v: Array  # (..., Hkv, S, E)
    turns: tuple[Turn, Turn] | None  # the rotations of q and k
    heads: Array  # (..., L, H, E), the output of attention
    lse: Array | None  # (..., H, L); None if nothing will be differentiated
    options: dict[str, Any]  # those of `attention`
    starts: Array | None = None  # cu_seqlens of packed sequences: q, k, v are (T, heads, E) then, heads (T, H, E)

    @property
    def sources(self) -> tuple[int, int, int]:
        """Return which of the inputs queries, keys and values were projected from."""
        of_keys = 0 if self.inputs[1] is None else 1
        return 0, of_keys, of_keys if self.inputs[2] is None else 2


def attend(
    layer: Heads, query: Array, key: Array | None, value: Array | None, padding: ArrayLike | None,
    positions: Positions | None, options: dict[str, Any], return_lse: bool,
) -> Context:  # fmt: skip
    """Project the inputs and attend, up to the output of the heads."""
    is_given = key is not None, value is not None
    features = layer.embed_dim, layer.kdim, layer.vdim
    query, key, value, batch = check_inputs(query, key, value, features, layer.dtype)
    options["backend"] = layer.backend
    if padding is not None:
        hide_padding(options, padding, key.shape[-2])
    q, k, v = layer._project(query, key, value)
    turns = layer._turns(positions, (*batch, query.shape[-2]), (*batch, key.shape[-2]), not is_given[0])
    if turns is None and layer._rotation is not None:
        places = default_places(layer._rotation, query.shape[-2], key.shape[-2], batch, options)
        turns = places.turns(layer.dtype)
    if turns is not None:
        q, k = turned(q, turns[0]), turned(k, turns[1])
    # The memory layout is (..., L, H, E), so that the last projection reads the heads side by side without a copy.
    heads = np.empty((*batch, query.shape[-2], layer.num_heads, layer.head_dim), layer.dtype)
    _, lse = _with_lse(attention, q, k, v, out=heads.swapaxes(-3, -2), return_lse=return_lse, **options)
    inputs = query, key if is_given[0] else None, value if is_given[1] else None
    return Context(layer, inputs, q, k, v, turns, heads, lse, options)


def _with_lse(function: Any, *arguments: Any, **options: Any) -> tuple[Array, Array | None]:
    """Return the two results of an attention function; None for an lse that was not asked for."""
    result = function(*arguments, **options)
    return result if isinstance(result, tuple) else (result, None)


def attend_packed(
    layer: Heads, query: Array, padding: ArrayLike | None, cu_seqlens: ArrayLike, positions: Positions | None,
    options: dict[str, Any], return_lse: bool,
) -> Context:  # fmt: skip
    """Self-attention of packed sequences, laid end to end, up to the output of the heads."""
    inputs = query, None, None
    options["backend"] = layer.backend
    query, key, value, _ = check_inputs(query, None, None, (layer.embed_dim, layer.kdim, layer.vdim), layer.dtype)
    if query.ndim != 2:
        raise ValueError(f"query must have shape (tokens, {layer.embed_dim}) with cu_seqlens, got {query.shape}")
    if padding is not None:
        raise ValueError("key_padding_mask must be None with cu_seqlens, where there is no padding")
    q, k, v = layer._project(query, key, value)
    starts = as_ints("cu_seqlens", cu_seqlens)
    turns = layer._turns(positions, (len(query),), (len(query),), True)
    if turns is None and layer._rotation is not None:
        # `attention_varlen` checks the offsets, and its errors name them.
        turns = packed_places(layer._rotation, len(query), starts, options).turns(layer.dtype)
    if turns is not None:
        q, k = turned(q, turns[0]), turned(k, turns[1])
    q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
    heads, lse = _with_lse(attention_varlen, q, k, v, starts, starts, return_lse=return_lse, **options)
    return Context(layer, inputs, q, k, v, turns, heads, lse, options, starts)


def result(layer: Heads, ctx: Context | LazyContext, need_weights: bool, average_weights: bool) -> Any:
    """Project the joined heads to the result that the caller gets."""
    if isinstance(ctx, LazyContext):
        return ctx.result()
    out = layer._project_back(ctx.heads)
    if not need_weights:
        return out
    if average_weights:
        return out, _averaged(ctx.q, ctx.k, ctx.options)
    return out, attention_weights(ctx.q, ctx.k, **ctx.options)


def gradients(
    layer: Heads, grad_out: Array, ctx: Context, lse: Array, mod_grads: Any
) -> tuple[Gradients, dict[str, Array]]:
    """Return the gradients of the inputs, and of the parameters by name."""
    parameters = layer._parameters
    weight, bias = parameters["out_proj.weight"], parameters.get("out_proj.bias")
    grad, grad_weight, grad_bias = _of_projection(grad_out, as_features(ctx.heads), weight, bias is not None)
    by_name: dict[str, Array | None] = {"out_proj.weight": grad_weight, "out_proj.bias": grad_bias}
    of_heads = _of_attention(layer._heads(grad), ctx, lse, mod_grads)
    of_inputs: list[Array | None] = [None, None, None]
    for first, last in layer._runs(ctx.inputs[1] is None, ctx.inputs[2] is None):
        source = ctx.sources[first]
        x = ctx.inputs[source]
        assert x is not None
        grad = layer._joined_gradient(of_heads[:3][first:last], ctx.turns, first, x.shape[:-1])
        weight, bias = layer._joined(first, last)
        grad, grad_weight, grad_bias = _of_projection(grad, x, weight, bias is not None)
        for n in range(first, last):
            heads = layer._place(n, first)
            rows = slice(heads.start * layer.head_dim, heads.stop * layer.head_dim)
            by_name[f"{INPUTS[n]}.weight"] = grad_weight[rows]
            by_name[f"{INPUTS[n]}.bias"] = None if grad_bias is None else grad_bias[rows]
        so_far = of_inputs[source]
        of_inputs[source] = grad if so_far is None else np.add(so_far, grad, out=so_far)
    of_parameters = {name: array for name in parameters if (array := by_name[name]) is not None}
    return Gradients(of_inputs[0], of_inputs[1], of_inputs[2], *of_heads[3:]), of_parameters


def _of_attention(grad: Array, ctx: Context, lse: Array, mod_grads: Any) -> Gradients:
    """Return the gradients of projected queries, keys and values, as (..., heads, L, E), and of arrays in options."""
    if ctx.starts is None:
        heads = ctx.heads.swapaxes(-3, -2)
        return attention_backward(grad, ctx.q, ctx.k, ctx.v, heads, lse, mod_grads=mod_grads, **ctx.options)
    grads = attention_varlen_backward(
        grad.swapaxes(0, 1), ctx.q, ctx.k, ctx.v, ctx.heads, lse, ctx.starts, ctx.starts, mod_grads=mod_grads,
        **ctx.options,
    )  # fmt: skip
    q, k, v = (None if x is None else x.swapaxes(0, 1) for x in grads[:3])
    return grads._replace(query=q, key=k, value=v)


def _of_projection(grad: Array, x: Array, weight: Array, need_bias: bool) -> tuple[Array, Array, Array | None]:
    """Return the gradients of a projection."""
    x = without_idle_rows(x, grad)
    grad_x, grad_weight, grad_bias = linear_backward(grad, x, weight, need_bias)
    assert grad_x is not None
    return grad_x, grad_weight, grad_bias


def _averaged(query: Array, key: Array, options: dict[str, Any]) -> Array:
    """Return the mean of the probabilities over the heads, one head at a time: memory for two maps and not for H."""
    H = query.shape[-3]
    total = attention_weights(query, key, heads=[0], **options)
    for h in range(1, H):
        total += attention_weights(query, key, heads=[h], **options)
    total /= H
    mean: Array = total[..., 0, :, :]
    return mean


__all__ = ["Context", "attend", "attend_packed", "gradients", "result"]
