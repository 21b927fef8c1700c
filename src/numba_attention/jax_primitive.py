"""The primitive that JAX differentiates, maps and compiles: `attention`, its derivatives in both modes, and theirs.

The primitive has six passes. All but the first are linear in some of their operands: by these, the derivative is the
same pass, and the transpose, of which reverse mode consists, is another one. `out` and `lse` are operands of the
gradients like others and get gradients of their own, so that the double backward pass is one sweep over the keys, and
JAX itself runs the plain backward pass for what comes back to them. Hessians are symmetric, so that the tangents of
gradients and the double backward pass are each other's transpose.

=================  ======================================  ================  =================  =================
pass               of                                      linear in         transpose          derivative
=================  ======================================  ================  =================  =================
attention          inputs                                                                       tangents
tangents           inputs, out, lse, direction             direction         gradients          moved tangents
gradients          inputs, out, lse, grads                 grads             tangents           gradient tangents
gradient tangents  those, and a direction of all of them   direction         second             refused
second             those, and a direction of the inputs    direction         gradient tangents  refused
moved tangents     those of tangents, and how they move    second direction  second             refused
=================  ======================================  ================  =================  =================

The last is forward mode over forward mode. No kernel computes it, and it is there to be transposed.

XLA calls back into Python, and the kernels read and write its buffers in place. This does not use
`jax.pure_callback`, which copies its arguments with JAX inside the callback: on a machine with one core, that copy
waits for the thread that runs the callback, and so for ever (jax issue 24255).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.experimental.buffer_callback import buffer_callback
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from . import api, second
from .options import (
    PER_CALL,
    PER_HEAD,
    PER_SCORE,
    PER_SEQUENCE,
    Gradients,
    Options,
    is_mod_arg,
    join_mod_args,
    place_of,
)

Arrays = dict[str, Any]

# Options that are arrays, which XLA passes at each call. The others are fixed when a function is traced.
ARRAYS = (*PER_SCORE, *PER_HEAD, *PER_SEQUENCE, *PER_CALL)
# What is the same for all elements of a call. `jax.vmap` makes a call for each of its own.
OF_CALL = (*PER_CALL, "seed")
INPUTS = Gradients._fields[:5]  # what has second derivatives, and the parts of a direction
RESULTS = ("out", "lse")
# How names of operands begin: gradients of a result, tangents of an operand, and of an operand of `tangents`.
GRAD, TANGENT, MOVED = "grad_", "tangent of ", "second tangent of "


class Static(NamedTuple):
    """The part of a call that is fixed when it is traced. It is hashable, so that equal calls share compiled code."""

    out_shape: tuple[int, ...]  # before `jax.vmap` adds axes in front
    dtype: str
    settings: Options  # the options that are not arrays, and a `BlockMask`
    backend: str

    @property
    def options(self) -> dict[str, Any]:
        """Return the options that are not arrays, and the backend."""
        fixed = {name: x for name, x in self.settings._asdict().items() if name not in ARRAYS or x is not None}
        del fixed["seed"]
        return fixed | {"backend": self.backend}


class Call(NamedTuple):
    """One pass, with the names of its operands and results, and the axes that `jax.vmap` added in front."""

    static: Static
    name: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    lead: tuple[int, ...] = ()

    def bind(self, name: str, arrays: Arrays, results: Iterable[str]) -> Arrays:
        """Bind a pass of the same call."""
        return _bind(Call(self.static, name, tuple(arrays), tuple(results), self.lead), arrays)

    def bind_along(self, arrays: Arrays, tangents: Arrays) -> Arrays:
        """Bind the pass with tangents for what it is linear in; what is missing there is 0."""
        fixed = {name: x for name, x in arrays.items() if not self.is_linear_in(name)}
        return self.bind(self.name, fixed | tangents, self.results)

    def is_linear_in(self, operand: str) -> bool:
        """Whether the pass is linear in an operand, with others of this kind."""
        prefix = _PASSES[self.name].linear_in
        return bool(prefix) and operand.startswith(prefix)


class _Pass(NamedTuple):
    run: Callable[[Arrays, Arrays, Arrays], Arrays] | None  # results to fill, a direction, and arguments -> results
    linear_in: str = ""  # how names of the operands begin in which it is linear
    transpose: str = ""
    cotangents: str = ""  # how names of its results begin as operands of the transpose


def attention_with_lse(static: Static, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """Return out and lse, for arrays with all their axes."""
    results = _bind(Call(static, "attention", tuple(arrays), RESULTS), arrays)
    return results["out"], results["lse"]


def _bind(call: Call, arrays: Arrays) -> Arrays:
    return dict(zip(call.results, _primitive.bind(*arrays.values(), call=call), strict=True))


def _shapes(*operands: Any, call: Call) -> list[ShapedArray]:
    """Results are out and lse, or have the shape of the operand of their name."""
    if call.name == "attention":
        lse_dtype = "float64" if call.static.dtype == "float64" else "float32"
        shape = call.lead + call.static.out_shape
        return [ShapedArray(shape, np.dtype(call.static.dtype)), ShapedArray(shape[:-1], np.dtype(lse_dtype))]
    own = dict(zip(call.operands, operands, strict=True))
    return [ShapedArray(call.lead + own[name].shape[len(call.lead) :], own[name].dtype) for name in call.results]


def _compute(*operands: Any, call: Call) -> list[Any]:
    if _PASSES[call.name].run is None:
        raise NotImplementedError(
            "numba_attention.jax.attention has no forward mode over forward mode; its second derivatives have reverse "
            "mode in them, as in jax.hessian, jax.jacfwd(jax.jacrev(f)) and jax.grad of jax.jvp"
        )
    if call.name not in ("attention", "gradients"):
        direction = (name.removeprefix(TANGENT) for name in call.operands if name.startswith(TANGENT))
        _refuse_mods((*call.results, *direction))
    results = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in zip(call.results, _shapes(*operands, call=call), strict=True)
    }
    made = buffer_callback(partial(_run, call), results)(**dict(zip(call.operands, operands, strict=True)))
    return [made[name] for name in call.results]


def _batch(operands: Sequence[Any], axes: Sequence[int | None], *, call: Call) -> tuple[list[Any], list[int]]:
    """Make the axes of `jax.vmap` the first, of size 1 for what is the same for all elements."""
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    moved = [x[None] if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True)]
    return _primitive.bind(*moved, call=call._replace(lead=(size, *call.lead))), [0] * len(call.results)


def _differentiate(operands: Sequence[Any], tangents: Sequence[Any], *, call: Call) -> tuple[list[Any], list[Any]]:
    arrays = dict(zip(call.operands, operands, strict=True))
    results = _bind(call, arrays)
    moving = {name: t for name, t in zip(call.operands, tangents, strict=True) if type(t) is not ad.Zero}
    linear = {name: t for name, t in moving.items() if call.is_linear_in(name)}
    others = {name: t for name, t in moving.items() if name not in linear}
    if not others:
        moved = call.bind_along(arrays, linear)
    elif call.name == "attention":
        if "alibi_slopes" in others:
            raise NotImplementedError("alibi_slopes have no gradient here; pass jax.lax.stop_gradient(alibi_slopes)")
        moved = call.bind("tangents", arrays | results | _named(TANGENT, others), RESULTS)
    elif call.name == "tangents":
        _refuse_mods(others)
        moved = call.bind("moved tangents", arrays | _named(MOVED, others), RESULTS)
        if linear:
            moved = jax.tree.map(jnp.add, moved, call.bind_along(arrays, linear))
    elif call.name == "gradients":
        _refuse_mods(others)
        moved = call.bind("gradient tangents", arrays | _named(TANGENT, moving), call.results)
    else:
        raise NotImplementedError("numba_attention.jax.attention can be differentiated twice, not three times")
    return [results[name] for name in call.results], [moved[name] for name in call.results]


def _transpose(cotangents: Sequence[Any], *operands: Any, call: Call) -> list[Any]:
    own = _PASSES[call.name]
    arrays = dict(zip(call.operands, operands, strict=True))
    wanted = {name.removeprefix(own.linear_in): name for name, x in arrays.items() if ad.is_undefined_primal(x)}
    fixed = {name: x for name, x in arrays.items() if not call.is_linear_in(name)}
    given = {name: c for name, c in zip(call.results, cotangents, strict=True) if type(c) is not ad.Zero}
    if not given:
        return [None] * len(operands)
    back = call.bind(own.transpose, fixed | _named(own.cotangents, given), wanted)
    found = {wanted[name]: _summed(x, arrays[wanted[name]].aval.shape) for name, x in back.items()}
    return [found.get(name) for name in call.operands]


def _summed(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sum over axes that `jax.vmap` added, where all elements share the operand."""
    axes = tuple(n for n, (size, own) in enumerate(zip(x.shape, shape, strict=True)) if size != own)
    return x.sum(axes, keepdims=True) if axes else x


def _named(prefix: str, arrays: Arrays) -> Arrays:
    return {prefix + name: x for name, x in arrays.items()}


def _refuse_mods(names: Iterable[str]) -> None:
    for name in filter(is_mod_arg, names):
        raise NotImplementedError(
            f"{name} has first derivatives in reverse mode only; pass jax.lax.stop_gradient({name})"
        )


_primitive = Primitive("numba_attention")
_primitive.multiple_results = True
_primitive.def_impl(jax.jit(_compute, static_argnames="call"))
_primitive.def_abstract_eval(_shapes)
mlir.register_lowering(_primitive, mlir.lower_fun(_compute, multiple_results=True))
batching.primitive_batchers[_primitive] = _batch
ad.primitive_jvps[_primitive] = _differentiate
ad.primitive_transposes[_primitive] = _transpose


def _run(call: Call, context: Any, results: Any, **buffers: Any) -> None:
    """Compute a pass, from buffers into buffers."""
    for targets, arrays in _calls(call, results, buffers):
        direction = {name.removeprefix(TANGENT): arrays.pop(name) for name in call.operands if name.startswith(TANGENT)}
        if call.name != "attention" and call.name != "tangents" and "grad_out" not in arrays:
            arrays["grad_out"] = _zeros_like(arrays["out"])
        run = _PASSES[call.name].run
        assert run is not None
        for name, x in run(targets, direction, join_mod_args(arrays | call.static.options)).items():
            targets[name][...] = x


def _attention(targets: Arrays, direction: Arrays, arguments: Arrays) -> Arrays:
    _, lse = api.attention(**arguments, out=targets["out"], return_lse=True)
    return {"lse": lse}


def _tangents(targets: Arrays, direction: Arrays, arguments: Arrays) -> Arrays:
    moved = second.attention_jvp(_of_inputs(direction), **arguments)
    return {"out": moved.out_tangent, "lse": moved.lse_tangent}


def _gradients(targets: Arrays, direction: Arrays, arguments: Arrays) -> Arrays:
    places = [place_of(name) for name in targets if is_mod_arg(name)]
    grads = api.attention_backward(**arguments, mod_grads=places or None)
    return {name: grads.of(name) for name in targets}


def _gradient_tangents(targets: Arrays, direction: Arrays, arguments: Arrays) -> Arrays:
    moved = {f"{name}_tangent": x for name, x in direction.items() if name not in INPUTS}
    still = {f"{name}_tangent": _zeros_like(arguments[name]) for name in RESULTS}
    grads = second.gradient_tangents(_of_inputs(direction), **arguments, **(still | moved))
    return {name: grads.of(name) for name in targets}


def _second(targets: Arrays, direction: Arrays, arguments: Arrays) -> Arrays:
    back = second.attention_double_backward(_of_inputs(direction), through_saved=True, **arguments)
    return {name: getattr(back, name) for name in targets}


_PASSES = {
    "attention": _Pass(_attention),
    "tangents": _Pass(_tangents, TANGENT, "gradients", GRAD),
    "gradients": _Pass(_gradients, GRAD, "tangents", TANGENT),
    "gradient tangents": _Pass(_gradient_tangents, TANGENT, "second", TANGENT),
    "second": _Pass(_second, TANGENT, "gradient tangents", TANGENT),
    "moved tangents": _Pass(None, MOVED, "second", GRAD),
}


def _of_inputs(direction: Arrays) -> Gradients:
    return Gradients(*(direction.get(name) for name in INPUTS))


def _zeros_like(x: Any) -> Any:
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)


def _calls(call: Call, *buffers: Arrays) -> Iterator[tuple[Arrays, Arrays]]:
    """View buffers as arrays, and split axes that vmap added into several calls if one call cannot have them."""
    views: list[Arrays] = [{name: np.asarray(x) for name, x in group.items()} for group in buffers]
    results, arrays = views
    if not call.lead and "seed" not in arrays:
        yield results, arrays
        return
    added, mods = len(call.lead), (call.static.settings.score_mod, call.static.settings.mask_mod)
    # Dropout and mods count the sequences of a call. Sinks are one for each head of a call, as are their derivatives.
    is_numbered = "seed" in arrays or mods != (None, None)
    of_call = [name for name in arrays if name.removeprefix(TANGENT) in PER_CALL]
    is_shared = all(arrays[name].shape[:added] == (1,) * added for name in of_call) and not {*PER_CALL} & {*results}
    if added:
        # Such an axis has size 1 if the input is the same for all calls, yet each call has a gradient of its own.
        arrays = {name: np.broadcast_to(x, call.lead + x.shape[added:]) for name, x in arrays.items()}
    if is_shared and not is_numbered:
        yield results, arrays | {name: arrays[name][(0,) * added] for name in of_call}
        return
    for index in np.ndindex(call.lead):
        targets, own = ({name: x[(*index, ...)] for name, x in group.items()} for group in (results, arrays))
        if "seed" in own:
            low, high = (int(word) for word in own["seed"])
            own["seed"] = low | high << 32
        yield targets, own
