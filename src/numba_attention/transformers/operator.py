"""Attention of a Hugging Face model as an operator of PyTorch, which autograd, ``torch.compile`` and ``vmap`` know."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from ..options import Array
from ..teams import lent
from ..torch import to_array, to_tensor
from ..torch_autograd import TEAM
from . import calls

Tensor: TypeAlias = torch.Tensor

_ARGUMENTS = (
    "Tensor? mask, Tensor? bias, Tensor? sinks, Tensor? seed, float? scale, float? softcap, bool causal, float dropout"
)
_INPUTS = ("query", "key", "value", "mask", "bias", "sinks", "seed")


@torch.library.custom_op(
    "numba_attention::attend",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, {_ARGUMENTS}) -> (Tensor, Tensor)",
)
def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None,
    seed: Tensor | None, scale: float | None, softcap: float | None, causal: bool, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output (batch, L, H, Ev) and the log-sum-exp (batch, H, L); `masks` says what `mask` may be."""
    q, k, v = (to_array(x) for x in (query, key, value))
    call, options = _call(query, key, mask, bias, sinks, seed, scale, softcap, causal, dropout)
    with lent(TEAM):
        out, lse = calls.forward(call, q, k, v, options)
    return to_tensor(out), to_tensor(lse)


@attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, bias: Any, sinks: Any, seed: Any, scale: Any, softcap: Any,
    causal: Any, dropout: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, H, L, _ = query.shape
    of_lse = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(B, L, H, value.shape[-1]), query.new_empty(B, H, L, dtype=of_lse)


@torch.library.custom_op(
    "numba_attention::attend_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor out, Tensor lse, Tensor query, Tensor key, Tensor value, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def attend_backward(
    grad: Tensor, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    bias: Tensor | None, sinks: Tensor | None, seed: Tensor | None, scale: float | None, softcap: float | None,
    causal: bool, dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of query, key, value, bias and sinks; those of what was not passed are empty."""
    of_grad, *inputs, of_out, of_lse = (to_array(x) for x in (grad, query, key, value, out, lse))
    q, k, v = inputs
    call, options = _call(query, key, mask, bias, sinks, seed, scale, softcap, causal, dropout)
    with lent(TEAM):
        dq, dk, dv, of_bias, of_sinks = calls.backward(call, of_grad, q, k, v, of_out, of_lse, options)
    more = [None if bias is None else of_bias, of_sinks]  # a bias may also be a mask of numbers
    of_more = (query.new_empty(0) if x is None else to_tensor(x) for x in more)
    return to_tensor(dq), to_tensor(dk), to_tensor(dv), *of_more


@attend_backward.register_fake
def _(
    grad: Tensor, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Any, bias: Tensor | None,
    sinks: Tensor | None, seed: Any, scale: Any, softcap: Any, causal: Any, dropout: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = (query, key, value, bias, sinks)
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.constants = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    query, key, value, mask, bias, sinks, seed, out, lse = ctx.saved_tensors
    of = attend_backward(grad.contiguous(), out, lse, query, key, value, mask, bias, sinks, seed, *ctx.constants)
    of_inputs = [*of[:3], None, None if bias is None else of[3], None if sinks is None else of[4]]
    needed = zip(of_inputs, ctx.needs_input_grad, strict=False)
    return (*(x if need else None for x, need in needed), None, None, None, None, None)


attend.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(
    "numba_attention::attend_weights",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, {_ARGUMENTS}) -> Tensor",
)
def attend_weights(
    query: Tensor, key: Tensor, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None, seed: Tensor | None,
    scale: float | None, softcap: float | None, causal: bool, dropout: float,
) -> Tensor:  # fmt: skip
    """Return the probabilities (batch, H, L, S), which have no gradient."""
    of_mask, options = _options(mask, bias, sinks, seed, scale, softcap, dropout)
    return to_tensor(calls.weights(of_mask, to_array(query), to_array(key), causal, options))


@attend_weights.register_fake
def _(
    query: Tensor, key: Tensor, mask: Any, bias: Any, sinks: Any, seed: Any, scale: Any, softcap: Any, causal: Any,
    dropout: Any,
) -> Tensor:  # fmt: skip
    return query.new_empty(*query.shape[:3], key.shape[2])


def _call(
    query: Tensor, key: Tensor, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None, seed: Tensor | None,
    scale: float | None, softcap: float | None, causal: bool, dropout: float,
) -> tuple[calls.Call, dict[str, Any]]:  # fmt: skip
    B, _, L, _ = query.shape
    of_mask, options = _options(mask, bias, sinks, seed, scale, softcap, dropout)
    call = calls.call_of(of_mask, B, L, key.shape[2], causal=causal, packable="bias" not in options)
    return call, options


def _options(
    mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None, seed: Tensor | None, scale: float | None,
    softcap: float | None, dropout: float,
) -> tuple[Array | None, dict[str, Any]]:  # fmt: skip
    """Return the mask as an array of numbers or truth values, and the options beside it."""
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "backend": "cpu"}
    options |= {name: to_array(x) for name, x in (("bias", bias), ("sinks", sinks)) if x is not None}
    if seed is not None:
        options |= {"dropout_p": dropout, "seed": int(seed)}
    if mask is None or not mask.is_floating_point():
        return None if mask is None else to_array(mask), options
    # Models write what is hidden as the lowest number of a dtype. Truth values skip tiles, and have no gradient.
    hidden = mask <= max(torch.finfo(mask.dtype).min, torch.finfo(torch.float32).min)
    if bool(((mask == 0) | hidden).all()):
        return to_array(~hidden), options
    return None, options | {"bias": to_array(mask)}


def _fold(x: Tensor | None, dim: int | None, n: int, batch: int) -> Tensor | None:
    """Fold the axis of `vmap` into the batch of a tensor (n, batch or 1, ...)."""
    if x is None:
        return None
    x = x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.expand(n, batch, *x.shape[2:]).flatten(0, 1)


@attend.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    n = info.batch_size
    for name in ("sinks", "seed"):
        if in_dims[_INPUTS.index(name)] is not None:
            raise NotImplementedError(f"vmap over {name}, of which one call has one for all sequences")
    batch = arguments[0].shape[0 if in_dims[0] is None else 1 if in_dims[0] == 0 else 0]
    folded = [_fold(x, dim, n, batch) for x, dim in zip(arguments[:5], in_dims[:5], strict=True)]
    out, lse = attend(*folded, *arguments[5:])
    return (out.unflatten(0, (n, batch)), lse.unflatten(0, (n, batch))), (0, 0)


@attend_backward.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    raise NotImplementedError("vmap over the gradients of attention")
