"""The functions that PyTorch differentiates: `attention`, its derivatives in both modes, and theirs.

Each is closed under one more derivative in either mode, until the third, which is refused. `out` and `lse` are inputs
of the gradients like others and get gradients of their own, so that the double backward pass is one sweep over the
keys, and autograd itself runs the plain backward pass for what comes back to them.

==================  ============================  =================================  ====================
function            of                            backward                           jvp
==================  ============================  =================================  ====================
Attention           inputs                        Backward                           Tangents
Backward            inputs, out, lse, grads       Second                             GradientTangents
Tangents            inputs, out, lse, direction   Second, Backward                   refused
Second              the same and direction        GradientTangents (of direction)    refused
GradientTangents    all of these                  refused                            refused
==================  ============================  =================================  ====================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from . import api, second
from .masks.blockmask import BlockMask
from .options import Array, Gradients, is_mod_arg, join_mod_args, place_of
from .teams import lent, of_library

Tensor: TypeAlias = torch.Tensor

# PyTorch's own threads, in its builds for Linux.
TEAM = of_library(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"), torch.get_num_threads)
INPUTS = Gradients._fields[:5]  # what has second derivatives


class Call:
    """What belongs to a call besides tensors: their names, in order, other options, and which gradients are wanted."""

    def __init__(self, names: tuple[str, ...], constants: dict[str, Any], wanted: tuple[str, ...] = ()) -> None:
        self.names, self.constants, self.wanted = names, constants, wanted

    @property
    def moving(self) -> tuple[str, ...]:
        """The tensors that have second derivatives."""
        return tuple(name for name in self.names if name in INPUTS)

    @property
    def takes_leading_dimensions(self) -> bool:
        """Whether one more leading dimension gives calls side by side: no tensor but three, no number of a sequence."""
        own = self.constants
        numbered = own.get("score_mod") is not None or own.get("mask_mod") is not None or own.get("dropout_p", 0) != 0
        return self.names == ("query", "key", "value") and not numbered and not isinstance(own.get("mask"), BlockMask)

    def arguments(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Arguments of a function of arrays: inputs, and what else is among the tensors, by name."""
        return dict(zip(self.names, map(to_array, tensors), strict=True)) | self.constants

    def direction(self, parts: Sequence[Tensor | None]) -> Gradients:
        """A direction of the tensors in `moving`."""
        found = {name: None if x is None else to_array(x) for name, x in zip(self.moving, parts, strict=True)}
        query, key, value, bias, sinks = (found.get(name) for name in INPUTS)
        return Gradients(query, key, value, bias, sinks)


def _on_threads_of_torch(forward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    @wraps(forward)
    def run(*arguments: Any) -> tuple[Tensor, ...]:
        with lent(TEAM):
            return forward(*arguments)

    return run


class _Function(torch.autograd.Function):
    """A function of a `Call` and tensors, of which all are saved."""

    @classmethod
    def setup_context(cls, ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call, *tensors = inputs
        if cls is Attention:
            tensors = [*tensors, *output]
        # Masks and lengths are saved too, so that autograd notices if they are changed in place before `backward`.
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *inputs: Any) -> Any:
        """One call, with one more leading dimension, or one after the other: with the bits that each has alone."""
        call, *tensors = inputs
        dims = in_dims[1:]
        if call is None:
            return cls.apply(None, *tensors), dims
        ranks = {x.ndim - isinstance(axis, int) for x, axis in zip(tensors[:3], dims[:3], strict=True)}
        if call.takes_leading_dimensions and len(ranks) == 1:
            heads = (None,) if ranks == {2} else ()  # matrices are one head

            def lead(x: Tensor | None, axis: int | None) -> Tensor | None:
                if x is None:
                    return None
                x = x.expand(info.batch_size, *x.shape) if axis is None else x.movedim(axis, 0)
                return x[(slice(None), *heads)]

            results = cls.apply(call, *map(lead, tensors, dims))
            return tuple(x.squeeze(1) if heads else x for x in results), (0,) * len(results)

        def pick(x: Any, axis: Any, n: int) -> Any:
            return x.select(axis, n) if torch.is_tensor(x) and isinstance(axis, int) else x

        rows = [
            cls.apply(*(pick(x, axis, n) for x, axis in zip(inputs, in_dims, strict=True)))
            for n in range(info.batch_size)
        ]
        return tuple(torch.stack(x) for x in zip(*rows, strict=True)), (0,) * len(rows[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError("numba_attention.torch.attention can be differentiated twice, not three times")

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise RuntimeError(
            "numba_attention.torch.attention has forward mode over nothing but reverse mode as second derivative"
        )


class Attention(_Function):
    """`attention`: out and lse."""

    @staticmethod
    @_on_threads_of_torch
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        out, lse = api.attention(**join_mod_args(call.arguments(tensors)), return_lse=True)
        return to_tensor(out), to_tensor(lse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad_out, grad_lse = grads
        call, needed = ctx.call, ctx.needs_input_grad[1:]
        if grad_out is None and grad_lse is None:
            return (None,) * (1 + len(needed))
        wanted = tuple(name for name, need in zip(call.names, needed, strict=True) if need)
        own = Call(call.names, call.constants, wanted)
        found = dict(zip(wanted, Backward.apply(own, *ctx.saved_tensors, grad_out, grad_lse), strict=True))
        return None, *(found.get(name) for name in call.names)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        moved = dict(zip(ctx.call.names, tangents[1:], strict=True))
        for name, x in moved.items():
            if x is not None and name not in INPUTS:
                raise NotImplementedError(f"{name} has no forward-mode derivative; pass {name}.detach()")
        return Tangents.apply(ctx.call, *ctx.saved_tensors, *(moved[name] for name in ctx.call.moving))


class Backward(_Function):
    """`attention_backward`: the gradients that are wanted, of (inputs, out, lse, grad_out, grad_lse)."""

    @staticmethod
    @_on_threads_of_torch
    def forward(call: Call, *saved: Any) -> tuple[Tensor, ...]:
        *inputs, out, lse, grad_out, grad_lse = saved
        of_mods = [place_of(name) for name in call.wanted if is_mod_arg(name)]
        grads = api.attention_backward(
            to_array(_or_zeros(grad_out, out)), out=to_array(out), lse=to_array(lse),
            grad_lse=None if grad_lse is None else to_array(grad_lse), mod_grads=of_mods or None,
            **join_mod_args(call.arguments(inputs)),
        )  # fmt: skip
        return tuple(to_tensor(x) for x in map(grads.of, call.wanted) if x is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        call, saved = ctx.call, ctx.saved_tensors
        if all(x is None for x in grads):
            return (None,) * (1 + len(saved))
        found = dict(zip(call.wanted, grads, strict=True))
        _refuse_mods(call, ctx.needs_input_grad[1:], found)
        return None, *_second(call, saved, [found.get(name) for name in call.moving])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        call, saved, n, tangents = ctx.call, ctx.saved_tensors, len(ctx.call.names), tangents[1:]
        moved = dict(zip(call.names, tangents[:n], strict=True))
        _refuse_mods(call, [x is not None for x in tangents], dict.fromkeys(call.wanted, True))
        parts = [moved[name] for name in call.moving]
        return GradientTangents.apply(call, *saved, *parts, *tangents[n:])


class Tangents(_Function):
    """`attention_jvp`: tangents of out and lse, of (inputs, out, lse, direction)."""

    @staticmethod
    @_on_threads_of_torch
    def forward(call: Call, *arguments: Any) -> tuple[Tensor, ...]:
        n = len(call.names)
        out, lse = map(to_array, arguments[n : n + 2])
        moved = second.attention_jvp(
            call.direction(arguments[n + 2 :]), out=out, lse=lse, **join_mod_args(call.arguments(arguments[:n]))
        )
        return to_tensor(moved.out_tangent), to_tensor(moved.lse_tangent)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad_out, grad_lse = grads
        call, n = ctx.call, len(ctx.call.names)
        saved, u = ctx.saved_tensors[: n + 2], ctx.saved_tensors[n + 2 :]
        if grad_out is None and grad_lse is None:
            return (None,) * (1 + len(ctx.saved_tensors))
        _refuse_mods(call, ctx.needs_input_grad[1:], {})
        back = _second(call, (*saved, grad_out, grad_lse), u)[:-2]
        return None, *back, *_of_direction(Backward, call, u, *saved, grad_out, grad_lse)


class GradientTangents(_Function):
    """Tangents of the wanted gradients, of what `Backward` takes and the tangents of all of that."""

    @staticmethod
    @_on_threads_of_torch
    def forward(call: Call, *arguments: Any) -> tuple[Tensor, ...]:
        n, m = len(call.names), len(call.moving)
        out, lse, grad_out, grad_lse = arguments[n : n + 4]
        direction, more = arguments[n + 4 : n + 4 + m], arguments[n + 4 + m :]
        moved_out, moved_lse, moved_grad_out, moved_grad_lse = more
        grads = second.gradient_tangents(
            call.direction(direction), to_array(_or_zeros(grad_out, out)), out=to_array(out), lse=to_array(lse),
            out_tangent=to_array(_or_zeros(moved_out, out)), lse_tangent=to_array(_or_zeros(moved_lse, lse)),
            grad_lse=_array_or_none(grad_lse), grad_out_tangent=_array_or_none(moved_grad_out),
            grad_lse_tangent=_array_or_none(moved_grad_lse), **join_mod_args(call.arguments(arguments[:n])),
        )  # fmt: skip
        return tuple(to_tensor(x) for x in map(grads.of, call.wanted) if x is not None)


class Second(_Function):
    """`attention_double_backward`, of what `Backward` takes and a direction: linear in the direction."""

    @staticmethod
    @_on_threads_of_torch
    def forward(call: Call, *arguments: Any) -> tuple[Tensor, ...]:
        n = len(call.names)
        out, lse, grad_out, grad_lse = arguments[n : n + 4]
        back = second.attention_double_backward(
            call.direction(arguments[n + 4 :]), to_array(_or_zeros(grad_out, out)), out=to_array(out),
            lse=to_array(lse), grad_lse=_array_or_none(grad_lse), through_saved=True,
            **join_mod_args(call.arguments(arguments[:n])),
        )  # fmt: skip
        names = (*call.moving, "out", "lse", "grad_out", "grad_lse")
        return tuple(to_tensor(getattr(back, name)) for name in names)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        call, n = ctx.call, len(ctx.call.names)
        saved = ctx.saved_tensors[: n + 4]
        # The product is linear in the direction, and its transpose is the tangent of the gradients along `grads`.
        # What would come back to the other arguments is a third derivative, which `Last` refuses.
        rest = [
            x.new_zeros(()).expand(x.shape) if need and x is not None else None
            for x, need in zip(saved, ctx.needs_input_grad[1:], strict=False)
        ]
        return None, *rest, *_of_direction(GradientTangents, call, ctx.saved_tensors[n + 4 :], *saved, *grads)


class Last(_Function):
    """The same tensor: a node of its own, so that a third derivative is refused where it is asked for."""

    @staticmethod
    def forward(call: None, x: Tensor) -> tuple[Tensor, ...]:
        return (x.view_as(x),)

    @classmethod
    def setup_context(cls, ctx: Any, inputs: Any, output: Any) -> None:
        pass


def _second(call: Call, saved: Sequence[Any], u: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Apply `Second`; return gradients of all names, out, lse, grad_out and grad_lse."""
    last = [Last.apply(None, x)[0] if x is not None and x.is_floating_point() else x for x in saved]
    found = dict(zip((*call.moving, "out", "lse", "grad_out", "grad_lse"), Second.apply(call, *last, *u), strict=True))
    results = [found.get(name) for name in (*call.names, "out", "lse", "grad_out", "grad_lse")]
    return [None if x is None else r for r, x in zip(results, saved, strict=True)]


def _of_direction(function: Any, call: Call, u: Sequence[Tensor | None], *arguments: Any) -> list[Tensor | None]:
    """Apply a function that gives gradients, for the parts of a direction that were passed."""
    wanted = tuple(name for name, x in zip(call.moving, u, strict=True) if x is not None)
    found = dict(zip(wanted, function.apply(Call(call.names, call.constants, wanted), *arguments), strict=True))
    return [found.get(name) for name in call.moving]


def _refuse_mods(call: Call, needed: Sequence[bool], wanted: dict[str, Any]) -> None:
    of_mods = [name for name, need in zip(call.names, needed, strict=False) if need and is_mod_arg(name)]
    of_mods += [name for name, x in wanted.items() if x is not None and is_mod_arg(name)]
    if of_mods:
        raise NotImplementedError(f"{of_mods[0]} has no second derivative; pass it without requires_grad")


def _or_zeros(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(()).expand(like.shape) if x is None else x


def _array_or_none(x: Tensor | None) -> Array | None:
    return None if x is None else to_array(x)


def to_array(tensor: Tensor) -> Array:
    """View a tensor as an array."""
    if tensor.dtype != torch.bfloat16:
        array: Array = tensor.numpy(force=True)
        return array
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        raise ImportError(
            "bfloat16 tensors need ml_dtypes; install it with: pip install 'numba-attention[bfloat16]'"
        ) from error
    # PyTorch does not know NumPy's bfloat16, so the bits are exchanged as integers.
    bits: Array = tensor.detach().resolve_neg().view(torch.int16).numpy()
    return bits.view(bfloat16)


def to_tensor(array: Array) -> Tensor:
    """View an array of this package as a tensor."""
    if array.dtype.name == "bfloat16":
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return tensor
