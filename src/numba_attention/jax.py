"""`attention` for JAX arrays on the CPU, with its derivatives: ``import numba_attention.jax as naj``."""

from __future__ import annotations  # short types in help()

from typing import Any, Literal, TypeAlias, Unpack, overload

import numpy as np

from .backends import select
from .masks.blockmask import BlockMask
from .narrowing import saturated
from .options import (
    PER_CALL,
    PER_HEAD,
    PER_SEQUENCE,
    OptionArguments,
    Options,
    gather,
    join_mod_args,
    split_mod_args,
    takes_options,
)
from .problem.dense import Problem, build
from .validation import as_array, as_flag, as_seed

try:
    import jax
    import jax.numpy as jnp

    from .jax_primitive import ARRAYS, OF_CALL, Static, attention_with_lse
except ImportError as error:
    raise ImportError("numba_attention.jax needs JAX 0.6.2 or newer; install it with: pip install jax") from error

JaxArray: TypeAlias = jax.Array


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
    """Exact scaled dot-product attention of JAX arrays, in linear memory; works under jit, grad, jvp and vmap.

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
        The others in the signature above: their types, shapes and meanings stand in
        ``help(numba_attention.attention)``. Arrays may be traced, and have no derivatives; numbers and names are fixed
        when a function is traced.
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
        A third derivative is asked for, or forward mode over forward mode; for `mod_args`, a second derivative or
        forward mode; for `alibi_slopes`, any derivative.

    See Also
    --------
    numba_attention.attention : the same for NumPy arrays, with every option explained.

    Notes
    -----
    It can be differentiated in forward and in reverse mode (`jax.jvp`, `jax.linearize`, `jax.grad`), and twice, in
    linear memory too: forward over reverse (`jax.hessian`, ``jax.jvp`` of ``jax.grad``), reverse over reverse and
    reverse over forward. See the page "Second derivatives".

    Axes that `jax.vmap` adds become leading dimensions of one call. There is a call for each element instead with
    dropout, `score_mod` or `mask_mod`, which count the sequences of a call, and where elements have `sinks`, or
    derivatives by them, of their own. Elements with the same seed have the same mask.

    Arrays must be on a CPU device. The number of threads is ``NUMBA_NUM_THREADS``: `numba.set_num_threads` counts
    for the thread that calls it, and XLA calls from threads of its own.

    References
    ----------
    .. [1] Dao, "FlashAttention-2", 2023, algorithms 1 and 2.
    .. [2] JAX documentation, "JAX internals: primitives" and "External callbacks".

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
    arguments = {"query": query, "key": key, "value": value}
    arguments |= {name: _as_array(name, getattr(settings, name)) for name in ARRAYS} | of_mods
    seed = None if settings.seed is None else _words_of_seed(settings.seed)
    fixed: dict[str, Any] = dict.fromkeys(ARRAYS) | {"seed": None if seed is None else 0}
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
        if name not in OF_CALL and name not in of_mods:
            arrays[name] = jnp.expand_dims(x, tuple(range(ranks.get(name, ndim) - x.ndim)))
    window = None if settings.window is None else tuple(None if x is None else int(x) for x in settings.window)
    settings = settings._replace(
        window=window, scale=problem.scale, softcap=problem.softcap, mod_args=tuple(settings.mod_args)
    )
    static = Static(problem.out.shape, str(problem.out.dtype), settings, chosen)
    out, lse = (x[0] if problem.result.ndim < ndim else x for x in attention_with_lse(static, arrays))
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


def _as_array(name: str, x: Any) -> Any:
    """Convert an option as `attention` does, before JAX would: it reads truth values among numbers as 0 and 1."""
    return x if x is None or isinstance(x, jax.Array | BlockMask) else as_array(name, x)


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
