"""`attention` for JAX arrays on the CPU, with gradients: ``import numba_attention.jax as naj``.

XLA calls back into Python to compute attention, and the kernels read and write its buffers in place. This does not use
`jax.pure_callback`, which copies its arguments with JAX inside the callback: on a machine with one core, that copy
waits for the thread that runs the callback, and so for ever (jax issue 24255).
"""

from __future__ import annotations  # short types in help()

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, Unpack, overload

import numpy as np

from . import api, second
from .backends import select
from .masks.blockmask import BlockMask
from .narrowing import saturated
from .options import (
    PER_CALL,
    PER_HEAD,
    PER_SCORE,
    PER_SEQUENCE,
    Gradients,
    OptionArguments,
    Options,
    gather,
    is_mod_arg,
    join_mod_args,
    place_of,
    split_mod_args,
    takes_options,
)
from .problem.dense import Problem, build
from .validation import as_flag, as_seed

try:
    import jax
    import jax.numpy as jnp
    from jax.experimental.buffer_callback import buffer_callback
except ImportError as error:
    raise ImportError("numba_attention.jax needs JAX 0.6.2 or newer; install it with: pip install jax") from error

JaxArray: TypeAlias = jax.Array

# Options that are arrays, which XLA passes at each call. The others are fixed when a function is traced.
_ARRAYS = (*PER_SCORE, *PER_HEAD, *PER_SEQUENCE, *PER_CALL)
# What is the same for all elements of a call, so that `jax.vmap` makes a call for each of its own.
_OF_CALL = (*PER_CALL, "seed")
# What gradients are differentiated by, and the beginning of the names of directions.
_TWICE = (*Gradients._fields[:5], "out", "lse", "grad_out", "grad_lse")
_TANGENT = "tangent of "


class _Static(NamedTuple):
    """The part of a call that is fixed when it is traced. It is hashable, so that equal calls share compiled code."""

    ndim: int  # of query, key, value, mask and bias before `jax.vmap` adds axes in front
    out_shape: tuple[int, ...]
    dtype: str
    settings: Options  # the options that are not arrays, and a `BlockMask`
    backend: str

    @property
    def options(self) -> dict[str, Any]:
        """Return the options that are not arrays, and the backend."""
        fixed = {name: x for name, x in self.settings._asdict().items() if name not in _ARRAYS or x is not None}
        del fixed["seed"]
        return fixed | {"backend": self.backend}

    def arguments(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments of a call with these arrays."""
        return join_mod_args(arrays | self.options)


@overload
def attention(
    query: JaxArray,
    key: JaxArray,
    value: JaxArray,
    *,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
    **options: Unpack[OptionArguments],
) -> JaxArray: ...
@overload
def attention(
    query: JaxArray,
    key: JaxArray,
    value: JaxArray,
    *,
    return_lse: Literal[True],
    backend: str | None = ...,
    **options: Unpack[OptionArguments],
) -> tuple[JaxArray, JaxArray]: ...
@takes_options()
def attention(
    query: JaxArray,
    key: JaxArray,
    value: JaxArray,
    *,
    return_lse: bool = False,
    backend: str | None = None,
    **options: Unpack[OptionArguments],
) -> JaxArray | tuple[JaxArray, JaxArray]:
    """Exact scaled dot-product attention of JAX arrays, in linear memory; works under jit, grad and vmap.

    Parameters
    ----------
    query : Array, shape (..., H, L, E)
        float32, float16, bfloat16 or, where JAX is set to 64 bits, float64. Two-dimensional input (L, E) is one head.
        Note the order of axes: `jax.nn.dot_product_attention` has (..., L, H, E).
    key : Array, shape (..., Hkv, S, E)
        dtype of `query`; H must be a multiple of Hkv. Leading dimensions broadcast.
    value : Array, shape (..., Hkv, S, Ev)
        dtype of `query`; Ev may differ from E.
    mask : array of bool, broadcastable to (..., H, L, S), or BlockMask, optional
        True where a query may attend to a key. A `BlockMask` is fixed when a function is traced.
    bias : array of float, broadcastable to (..., H, L, S), optional
        Added to the scaled scores; differentiable.
    **options
        The others as in `numba_attention.attention`. Arrays may be traced, and have no gradients; numbers and names
        are fixed when a function is traced.
    sinks : array of float, shape (H,), optional
        One extra logit per head in the softmax denominator; differentiable.
    seed : int or array of int, optional
        As in `numba_attention.attention`. It may be traced, so that a jitted training step is compiled once for all
        seeds: an integer of 32 bits, or two of them, as ``jax.random.key_data(key)`` has.
    mod_args : tuple of arrays and numbers, optional
        What `score_mod` and `mask_mod` are called with; arrays of floating point are differentiable, numbers are fixed
        when a function is traced.
    return_lse : bool, default False
        Also return the natural log of the softmax denominator of each row; differentiable too.
    backend : {"auto", "cpu", "reference"}, optional
        Chosen when a function is traced.

    Returns
    -------
    out : Array, shape (..., H, L, Ev)
        dtype of `query`. A row that may attend to nothing is 0.
    lse : Array, shape (..., H, L)
        Only if `return_lse`: float32 (float64 for float64 input), -inf for empty rows.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As in `numba_attention.attention`, when the function is traced. Only lengths that are traced themselves are
        checked later; what is wrong with them comes as a `jax.errors.JaxRuntimeError`.
    NotImplementedError
        A third derivative is asked for, a second one with respect to `mod_args`, or one with respect to `alibi_slopes`.

    See Also
    --------
    numba_attention.attention : the same for NumPy arrays, with every option explained.

    Notes
    -----
    It can be differentiated twice in reverse mode, in linear memory too. JAX refuses forward mode, of which
    `jax.hessian` consists in part: use ``jax.jacrev(jax.jacrev(f))``, or ``jax.grad`` of a product with ``jax.grad``.

    Axes that `jax.vmap` adds become leading dimensions of one call. With `sinks`, `seed` or arrays in `mod_args` there
    is a call for each element instead: sinks are one per head for a whole call, arrays of mods are the same for it, and
    elements with the same seed have the same mask.

    Arrays must be on a CPU device. The number of threads is ``NUMBA_NUM_THREADS``: `numba.set_num_threads` counts
    for the thread that calls it, and XLA calls from threads of its own.

    References
    ----------
    .. [1] Dao, "FlashAttention-2", 2023, algorithms 1 and 2.
    .. [2] JAX documentation, "External callbacks" and "Custom derivative rules for Python code".

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numba_attention.jax as naj
    >>> query = jax.random.normal(jax.random.key(0), (2, 8, 100, 64))
    >>> key, value = jax.random.normal(jax.random.key(1), (2, 2, 2, 100, 64))  # two heads that serve eight
    >>> def loss(query):
    ...     return jnp.mean(naj.attention(query, key, value, is_causal=True) ** 2)
    >>> jax.jit(jax.grad(loss))(query).shape
    (2, 8, 100, 64)
    """
    fixed_options, of_mods = split_mod_args(options, _is_array)
    settings = gather(attention, fixed_options)
    arguments = {"query": query, "key": key, "value": value} | {name: getattr(settings, name) for name in _ARRAYS}
    arguments |= of_mods
    seed = None if settings.seed is None else _words_of_seed(settings.seed)
    fixed: dict[str, Any] = dict.fromkeys(_ARRAYS) | {"seed": None if seed is None else 0}
    if isinstance(settings.mask, BlockMask):
        fixed["mask"] = arguments.pop("mask")
    arrays = {name: jnp.asarray(_as_wide_as_jax(x)) for name, x in arguments.items() if x is not None}
    settings = settings._replace(**fixed)
    problem, chosen = _check(arguments, arrays, settings, backend)
    if seed is not None:
        arrays["seed"] = seed
    ndim = problem.out.ndim
    ranks = dict.fromkeys(PER_SEQUENCE, ndim - 3) | dict.fromkeys(PER_HEAD, ndim - 2)
    # Arrays get all their axes here, so that they still broadcast correctly when vmap adds one in front.
    for name, x in arrays.items():
        if name not in _OF_CALL and name not in of_mods:
            arrays[name] = jnp.expand_dims(x, tuple(range(ranks.get(name, ndim) - x.ndim)))
    window = None if settings.window is None else tuple(None if x is None else int(x) for x in settings.window)
    settings = settings._replace(
        window=window, scale=problem.scale, softcap=problem.softcap, mod_args=tuple(settings.mod_args)
    )
    static = _Static(ndim, problem.out.shape, str(problem.out.dtype), settings, chosen)
    out, lse = (x[0] if problem.result.ndim < ndim else x for x in _attention(static, arrays))
    return (out, lse) if as_flag("return_lse", return_lse) else out


def _words_of_seed(seed: Any) -> JaxArray:
    """Return the low and the high 32 bits of a seed. JAX has no integers of 64 bits unless it is set to."""
    if not isinstance(seed, jax.Array):
        number = as_seed(seed)
        return jnp.asarray(np.array([number % 2**32, number >> 32], np.uint32))
    if not jnp.issubdtype(seed.dtype, jnp.integer) or seed.shape not in ((), (2,)):
        raise TypeError(
            f"seed must be an integer, or two of 32 bits as jax.random.key_data returns, got {seed.dtype} of shape "
            f"{seed.shape}"
        )
    if seed.ndim:
        return seed.astype(jnp.uint32)
    high = seed >> 32 if seed.dtype.itemsize == 8 else jnp.zeros_like(seed)
    return jnp.stack([seed, high]).astype(jnp.uint32)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array) or (isinstance(x, np.ndarray) and x.ndim > 0)


def _as_wide_as_jax(x: Any) -> Any:
    """Convert float64 to float32 unless JAX is set to 64 bits. Its own conversion would make large numbers infinite."""
    if isinstance(x, jax.Array) or jax.config.jax_enable_x64:
        return x
    array = np.asarray(x)
    return saturated(array, np.float32) if array.dtype == np.float64 else x


def _check(
    arguments: dict[str, Any], arrays: dict[str, Any], options: Options, backend: str | None
) -> tuple[Problem, str]:
    """Check the arguments now, because an exception in a callback loses type and place; choose the backend."""
    # Traced and large arrays are represented by an array of their shape and dtype that takes no memory.
    small = (*PER_SEQUENCE, *PER_HEAD, *PER_CALL)
    examples: dict[str, Any] = {
        name: np.asarray(arguments[name])
        if name in small and not isinstance(arguments[name], jax.core.Tracer)
        else np.broadcast_to(np.zeros((), x.dtype), x.shape)
        for name, x in arrays.items()
    }
    query, key, value = (examples.pop(name) for name in ("query", "key", "value"))
    problem = build(query, key, value, Options(**join_mod_args(options._asdict() | examples)), None, True)
    # The backend is returned by name, because the callback may run in a thread in which `use_backend` has no effect.
    return problem, vars(select(backend, query, key, value))["__name__"].rpartition(".")[2]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, arrays: dict[str, Any]) -> tuple[Any, Any]:
    """Return out and lse, for arrays with all their axes."""
    lse_dtype = "float64" if static.dtype == "float64" else "float32"
    results = {
        "out": jax.ShapeDtypeStruct(static.out_shape, static.dtype),
        "lse": jax.ShapeDtypeStruct(static.out_shape[:-1], lse_dtype),
    }
    result = buffer_callback(_Forward(static), results, vmap_method="expand_dims")(**arrays)
    return result["out"], result["lse"]


def _forward(static: _Static, arrays: dict[str, Any]) -> tuple[tuple[Any, Any], tuple[Any, ...]]:
    perturbed = {name for name, x in arrays.items() if x.perturbed}
    if "alibi_slopes" in perturbed:
        raise NotImplementedError("alibi_slopes have no gradient here; pass jax.lax.stop_gradient(alibi_slopes)")
    values = {name: x.value for name, x in arrays.items()}
    result = _attention(static, values)
    # A residual is a pytree, whose structure says which gradients are wanted: a dict with names and without arrays.
    wanted = [name for name in arrays if name in perturbed and (name in Gradients._fields or is_mod_arg(name))]
    return result, (values, *result, dict.fromkeys(wanted))


def _backward(static: _Static, residual: tuple[Any, ...], cotangents: tuple[Any, Any]) -> tuple[dict[str, Any]]:
    arrays, out, lse, wanted = residual
    of_results = dict(zip(("grad_out", "grad_lse"), cotangents, strict=True))
    of_results = {name: x for name, x in of_results.items() if not isinstance(x, jax.custom_derivatives.SymbolicZero)}
    grads = dict.fromkeys(arrays)
    if of_results and wanted:
        grads |= _gradients(static, tuple(wanted), arrays | of_results | {"out": out, "lse": lse})
    return (grads,)


_attention.defvjp(_forward, _backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gradients(static: _Static, wanted: tuple[str, ...], arrays: dict[str, Any]) -> dict[str, Any]:
    results = {name: jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in wanted}
    grads: dict[str, Any] = buffer_callback(_Backward(static), results, vmap_method="expand_dims")(**arrays)
    return grads


def _gradients_forward(static: _Static, wanted: tuple[str, ...], arrays: dict[str, Any]) -> tuple[Any, Any]:
    moving = [name for name, x in arrays.items() if x.perturbed]
    _refuse_second(name for name in moving if name not in _TWICE)
    values = {name: x.value for name, x in arrays.items()}
    return _gradients(static, wanted, values), (values, dict.fromkeys(moving))


def _gradients_backward(
    static: _Static, wanted: tuple[str, ...], residual: tuple[Any, Any], cotangents: dict[str, Any]
) -> tuple[dict[str, Any]]:
    arrays, moving = residual
    zero = jax.custom_derivatives.SymbolicZero
    direction = {name: x for name, x in cotangents.items() if not isinstance(x, zero)}
    _refuse_second(name for name in direction if is_mod_arg(name))
    grads = dict.fromkeys(arrays)
    if direction and moving:
        tangents = {_TANGENT + name: x for name, x in direction.items()}
        grads |= _second(static, tuple(moving), arrays | tangents)
    return (grads,)


def _refuse_second(names: Iterable[str]) -> None:
    for name in names:
        raise NotImplementedError(f"{name} has no second derivative; pass jax.lax.stop_gradient({name})")


_gradients.defvjp(_gradients_forward, _gradients_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _second(static: _Static, moving: tuple[str, ...], arrays: dict[str, Any]) -> dict[str, Any]:
    """Return what comes back to the arguments of `_gradients`, with out and lse as arguments of their own."""
    results = {name: jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in moving}
    grads: dict[str, Any] = buffer_callback(_DoubleBackward(static), results, vmap_method="expand_dims")(**arrays)
    return grads


def _no_third_derivative(*arguments: Any) -> Any:
    raise NotImplementedError("numba_attention.jax.attention can be differentiated twice, not three times")


_second.defvjp(_no_third_derivative, _no_third_derivative)


class _Forward(NamedTuple):
    """The callback of `_attention`. It compares equal for equal calls, which are then compiled once."""

    static: _Static

    def __call__(self, context: Any, results: Any, **buffers: Any) -> None:
        for targets, arrays in _calls(self.static, results, buffers):
            _, lse = api.attention(**self.static.arguments(arrays), out=targets["out"], return_lse=True)
            targets["lse"][...] = lse


class _Backward(NamedTuple):
    """The callback of `_gradients`."""

    static: _Static

    def __call__(self, context: Any, results: Any, **buffers: Any) -> None:
        for targets, arrays in _calls(self.static, results, buffers):
            if "grad_out" not in arrays:
                arrays["grad_out"] = np.broadcast_to(np.zeros((), arrays["out"].dtype), arrays["out"].shape)
            places = [place_of(name) for name in targets if is_mod_arg(name)]
            grads = api.attention_backward(**self.static.arguments(arrays), mod_grads=places or None)
            for name, target in targets.items():
                target[...] = grads.of(name)


class _DoubleBackward(NamedTuple):
    """The callback of `_second`."""

    static: _Static

    def __call__(self, context: Any, results: Any, **buffers: Any) -> None:
        for targets, arrays in _calls(self.static, results, buffers):
            direction = Gradients(*(arrays.pop(_TANGENT + name, None) for name in Gradients._fields[:5]))
            if "grad_out" not in arrays:
                arrays["grad_out"] = np.broadcast_to(np.zeros((), arrays["out"].dtype), arrays["out"].shape)
            arguments = self.static.arguments(arrays)
            back = second.attention_double_backward(direction, through_saved=True, **arguments)
            for name, target in targets.items():
                target[...] = getattr(back, name)


def _calls(static: _Static, *buffers: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """View buffers as arrays, and split axes that vmap added into several calls if one call cannot have them."""
    results, arrays = ({name: np.asarray(x) for name, x in group.items()} for group in buffers)
    added = arrays["query"].ndim - static.ndim
    if added:
        # Such an axis has size 1 if the input is the same for all calls, yet each call has a gradient of its own.
        lead = np.broadcast_shapes(*(x.shape[:added] for x in arrays.values()))
        arrays = {name: np.broadcast_to(x, lead + x.shape[added:]) for name, x in arrays.items()}
    if added and any(name in _OF_CALL or is_mod_arg(name) for name in arrays):
        for index in np.ndindex(lead):
            yield (
                {name: x[index] for name, x in results.items()},
                _one_call({name: x[index] for name, x in arrays.items()}),
            )
    else:
        yield results, _one_call(arrays)


def _one_call(arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of one call, with the seed as one number."""
    if "seed" in arrays:
        low, high = (int(word) for word in arrays["seed"])
        arrays["seed"] = low | high << 32
    return arrays
