"""The projections of a layer, forward and backward, on the threads that attention runs on.

NumPy's products are as fast, but the threads of its BLAS keep spinning for 0.1 s after each product, on the cores that
the next parallel kernel needs: attention right after a NumPy product takes up to twice as long.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..bounded import BoundedCache
from ..options import Array
from ..validation import as_array, as_ndarray, check_out, is_bfloat16, overlaps_itself
from .activations import check_activation, coefficients_of, with_numpy

ITEMS = 16  # work items to aim for, so that many threads have work and finish together
SLAB = 512  # largest number of rows of an item, so that its tile of outputs, 128 KiB, stays in the L2 cache
SHORT_SLAB = 128  # smallest number of rows of an item, if there are so many: packing then costs 8 % of the item
PANELS = 4  # tiles of lanes that share one pass over the rows, in sums over many rows
DEPTH = 1024  # terms of a partial sum: adding it to the others costs 3 %

_F32, _F64 = np.dtype(np.float32), np.dtype(np.float64)  # native; dtypes of the other byte order compare as different


def linear(
    x: Array, weight: Array, bias: Array | None = None, out: Array | None = None, activation: str | None = None
) -> Array:
    """Project the last axis: ``x @ weight.T + bias``, and apply an activation to the result.

    Parameters
    ----------
    x : ndarray, shape (..., K)
    weight : ndarray, shape (N, K)
    bias : ndarray, shape (N,), optional
    out : ndarray, shape (..., N), optional
        Array for the result.
    activation : {"gelu", "gelu_tanh", "silu"}, optional
        Applied to each tile of the result while it is in the cache, with the same bits as afterwards.

    Returns
    -------
    ndarray, shape (..., N)

    Raises
    ------
    TypeError, ValueError
        There is no such activation, an argument is no array of numbers, a shape does not fit, or `out` cannot be
        written; the message names the argument.

    See Also
    --------
    linear_backward : the gradients, of the product without activation.

    Notes
    -----
    A row of the result has the same bits whatever other rows are in the call, and for any number of threads. That holds
    for float32 and float64; NumPy computes everything else, float16 and bfloat16 in float32, rounded once.

    Examples
    --------
    >>> import numpy as np
    >>> linear(np.ones((2, 3)), np.arange(6.0).reshape(2, 3), np.array([0.5, 0]))
    array([[ 3.5, 12. ],
           [ 3.5, 12. ]])
    """
    check_activation(activation)
    if not usable(x, weight, bias, out) or weight.ndim != 2 or x.shape[-1:] != weight.shape[1:]:
        return _with_numpy(x, weight, bias, out, activation)
    N = len(weight)
    shape = (*x.shape[:-1], N)
    if not (bias is None or bias.shape == (N,)) or not (out is None or out.shape == shape):
        return _with_numpy(x, weight, bias, out, activation)
    if out is not None and _can_be_written(out, x, weight, bias):
        target = out
    else:
        target = np.empty(shape, x.dtype)
    coefficients = None if activation is None else coefficients_of(activation, x.dtype)
    _multiply(as_matrix(x), weight, as_matrix(target), bias, coefficients=coefficients)
    if activation is not None and coefficients is None:
        with_numpy(activation, target, target)
    if out is None or target is out:
        return target
    _write(out, target)
    return out


def linear_backward(
    grad: Array, x: Array, weight: Array, need_bias: bool = True, need_input: bool = True
) -> tuple[Array | None, Array, Array | None]:
    """Gradients of `linear`.

    Parameters
    ----------
    grad : ndarray, shape (..., N)
        Gradient with respect to the result.
    x : ndarray, shape (..., K)
    weight : ndarray, shape (N, K)
    need_bias, need_input : bool, default True
        Whether to compute the gradients of the bias and of x.

    Returns
    -------
    grad_x : ndarray, shape (..., K), or None
        ``grad @ weight``; a row depends on its row of `grad` alone, as in `linear`.
    grad_weight : ndarray, shape (N, K)
        ``grad.T @ x``, summed over all rows.
    grad_bias : ndarray, shape (N,), or None
        The sum of the rows of `grad`.

    Examples
    --------
    >>> import numpy as np
    >>> grad_x, grad_weight, grad_bias = linear_backward(np.ones((4, 2)), np.ones((4, 3)), np.ones((2, 3)))
    >>> grad_x.shape, grad_weight[0], grad_bias
    ((4, 3), array([4., 4., 4.]), array([4., 4.]))
    """
    if not usable(grad, x, weight) or (*x.shape[:-1], *weight.shape) != (*grad.shape, *x.shape[-1:]):
        return _backward_with_numpy(grad, x, weight, need_bias, need_input)
    rows = as_matrix(grad)
    grad_x = None
    if need_input:
        grad_x = np.empty(x.shape, x.dtype)
        _multiply(rows, weight.T, as_matrix(grad_x))
    grad_weight = np.empty(weight.shape, x.dtype)
    grad_bias = np.empty(len(weight), x.dtype) if need_bias else None
    _multiply(rows.T, as_matrix(x).T, grad_weight, sums=grad_bias, long=True)
    return grad_x, grad_weight, grad_bias


def without_idle_rows(x: Array, grad: Array) -> Array:
    """Return x with 0 in rows whose gradient is 0, if any number is not finite: they contribute nothing, not 0 * NaN.

    Rows of padding have the gradient 0 and may contain anything.
    """
    return x if np.isfinite(x).all() else np.where(grad.any(axis=-1, keepdims=True), x, 0)


def usable(*arrays: Array | None) -> bool:
    """Whether the kernel can read these arrays, and at least one is not None."""
    first = arrays[0]
    if type(first) is not np.ndarray or first.dtype not in (_F32, _F64):
        return False
    dtype = first.dtype
    return all(a is None or (type(a) is np.ndarray and a.dtype == dtype) for a in arrays) and modules() is not None


def _can_be_written(out: Array, *others: Array | None) -> bool:
    """Whether the kernel may write to `out` directly: it is a matrix in memory and does not overlap an input."""
    matrix = out.flags.writeable and ((out.ndim == 2 and not overlaps_itself(out)) or out.flags.c_contiguous)
    return matrix and not any(np.may_share_memory(out, other) for other in others if other is not None)


def _with_numpy(x: Array, weight: Array, bias: Array | None, out: Array | None, activation: str | None) -> Array:
    x, weight = _numbers("x", x), _numbers("weight", weight)
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (N, K), got {weight.shape}")
    N, K = weight.shape
    if x.shape[-1:] != (K,):
        raise ValueError(f"x must have shape (..., {K}), as weight has {K} columns, got {x.shape}")
    if bias is not None:
        bias = _numbers("bias", bias)
        if bias.shape not in ((N,), ()):
            raise ValueError(f"bias must have shape ({N},), got {bias.shape}")
    made = np.result_type(*(array for array in (x, weight, bias) if array is not None))
    with np.errstate(all="ignore"):  # infinities and NaNs in the input are no error
        result: Array = np.matmul(_widened(x, made), _widened(weight, made).T)
        if bias is not None:
            result = result + bias
        if activation is not None:
            result = with_numpy(activation, result)
        if _is_half(made) and getattr(out, "dtype", made) == made:
            result = result.astype(made)
    if out is None:
        return result
    _write(out, result)
    return out


def _write(out: Any, result: Array) -> None:
    """Copy a result to the caller's array, whose numbers may be wider."""
    given = as_ndarray("out", out)
    fits = np.can_cast(result.dtype, given.dtype, "same_kind")
    np.copyto(check_out(given, result.shape, given.dtype if fits else result.dtype, {}, of="the result"), result)


def _is_half(dtype: "np.dtype[Any]") -> bool:
    return dtype == np.float16 or is_bfloat16(dtype)


def _widened(x: Array, made: "np.dtype[Any]") -> Array:
    """As float32 where results of 16 bits are made: they are rounded once, and the products are those of BLAS."""
    return x.astype(np.float32) if _is_half(made) else x


def _numbers(name: str, x: Any) -> Array:
    """Convert an argument to a plain array of numbers."""
    array = np.asarray(as_array(name, x))
    if array.dtype.kind not in "iufcb" and not is_bfloat16(array.dtype):
        raise TypeError(f"{name} must be an array of numbers, got {array.dtype}")
    return array


def _backward_with_numpy(
    grad: Array, x: Array, weight: Array, need_bias: bool, need_input: bool
) -> tuple[Array | None, Array, Array | None]:
    grad, x, weight = _numbers("grad", grad), _numbers("x", x), _numbers("weight", weight)
    if weight.ndim != 2 or (*grad.shape, *x.shape[-1:]) != (*x.shape[:-1], *weight.shape):
        raise ValueError(
            f"grad, x and weight must have shapes (..., N), (..., K) and (N, K), got {grad.shape}, {x.shape} "
            f"and {weight.shape}"
        )
    made = np.result_type(grad, x, weight)
    grad, x, weight = (_widened(array, made) for array in (grad, x, weight))
    rows = as_matrix(grad)
    found = np.matmul(grad, weight) if need_input else None, rows.T @ as_matrix(x), rows.sum(0) if need_bias else None
    if not _is_half(made):
        return found
    grad_x, grad_weight, grad_bias = (None if array is None else array.astype(made) for array in found)
    assert grad_weight is not None
    return grad_x, grad_weight, grad_bias


def as_matrix(x: Array) -> Array:
    """(..., K) -> (rows, K)."""
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@cache
def modules() -> Any:
    """Import the modules that need Numba at their first use, because the reference backend works without Numba."""
    try:
        from numba.core import config

        from ..backends import cpu_resources
        from ..cpu import linear, rowwise
    except ImportError:
        return None
    return None if config.DISABLE_JIT else (cpu_resources, linear, rowwise)


class _Plan(NamedTuple):
    """Everything about a product that depends on shapes and strides only, and not on addresses."""

    kernel: Any
    swapped: bool  # whether the second operand is in the lanes
    rest: bytes  # the part of the kernel's record that follows the addresses
    items: int
    flops: float
    scratch_size: int
    groups: int


_plans: BoundedCache[_Plan] = BoundedCache()
SMALL_PLAN = 4096  # bytes of a plan and its key, roughly


def _multiply(
    a: Array, b: Array, out: Array, bias: Array | None = None, sums: Array | None = None, long: bool = False,
    coefficients: Array | None = None,
) -> None:  # fmt: skip
    """Write ``out[i, j] = sum_k a[i, k] b[j, k] + bias[j]`` and ``sums[i] = sum_k a[i, k]``.

    `coefficients` are those of an activation, and are never freed. In a `long` sum, k counts the rows of a batch, and
    the order of summation may differ from that in another batch.
    """
    if not out.size:
        if sums is not None:
            np.sum(a, axis=1, out=sums)
        return
    cpu_resources, kernels, _ = modules()
    key = (
        a.dtype, a.shape, a.strides, b.shape, b.strides, out.strides, bias is None or bias.strides, sums is None, long,
        id(coefficients),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = _make_plan(a, b, out, bias, sums, long, coefficients)
        _plans.add(key, plan, SMALL_PLAN)
    if plan.swapped and sums is not None:
        np.sum(a, axis=1, dtype=np.float64, out=sums)
        sums = None
    to, sums_to = out, sums
    if plan.groups > 1:
        to = np.empty((plan.groups, *out.shape), out.dtype)
        sums_to = None if sums is None else np.empty((plan.groups, len(sums)), sums.dtype)
    number = cpu_resources.threads_for(plan.items, plan.flops)
    first = to[0] if plan.groups > 1 else to
    extra = sums_to if bias is None else bias
    four = (b, a, first.T) if plan.swapped else (a, b, first)
    own = cpu_resources.take()
    try:
        scratch, scratch_address = own.reserve(number * plan.scratch_size)
        own.counter.value = 0
        cpu_resources.addresses.call(*four, first if extra is None else extra, own.params_address)
        kernels.pack_own(own.params, kernels.OWN, own.counter_address, scratch_address)
        own.params[kernels.REST : kernels.REST + len(plan.rest)] = plan.rest
        own.run(plan.kernel, number, plan.flops, four, extra, scratch)
    finally:
        cpu_resources.put_back(own)
    if plan.groups > 1:
        np.add.reduce(to, axis=0, out=out)
        if sums is not None and sums_to is not None:
            np.add.reduce(sums_to, axis=0, out=sums)


@cache
def kernel_of(storage: str, task: str) -> Any:
    """Return the kernel of the products, or of the functions of rows, for `storage`, and what it is compiled for."""
    from ..cpu import launch, linear, rowwise
    from ..cpu.cache import Kernel
    from ..cpu.simd import HOST
    from ..cpu.spec import Spec

    spec = Spec(storage, HOST, task)
    make = {"linear": linear, "rowwise": rowwise}[task].make_worker
    return Kernel(spec.name, lambda: make(spec), launch.SIGNATURE), spec


def _make_plan(
    a: Array, b: Array, out: Array, bias: Array | None, sums: Array | None, long: bool, coefficients: Array | None
) -> _Plan:
    _, kernels, _ = modules()
    kernel, spec = kernel_of(out.dtype.name, "linear")
    straight, crossed = (_cut(spec, *operands, long) for operands in ((a, b), (b, a)))
    swapped = crossed.cost < straight.cost
    cut = crossed if swapped else straight
    lanes, numbers, target = (b, a, out.T) if swapped else (a, b, out)
    groups, K, size = cut.groups, a.shape[1], out.itemsize
    if groups > 1:
        target = np.empty_like(out, order="C").T if swapped else np.empty_like(out, order="C")
    values = {
        "items": groups * cut.slabs * cut.blocks,
        "blocks": cut.blocks,
        "slabs": cut.slabs,
        "panels": cut.panels,
        "slab": cut.slab,
        "chunk": kernels.chunk_of(K),
        "depth": -(-K // groups),
        "activation": 0 if coefficients is None else coefficients.ctypes.data,
        "P": len(lanes),
        "Q": len(numbers),
        "K": K,
        "lanes_row": lanes.strides[0],
        "lanes_k": lanes.strides[1],
        "numbers_row": numbers.strides[0],
        "numbers_k": numbers.strides[1],
        "out_lane": target.strides[0],
        "out_row": target.strides[1],
        "out_group": out.size * size,
        **kernels.scratch(spec, cut.slab, cut.panels, K),
    }
    if bias is not None:
        values |= {"bias_use": kernels.ADD_BIAS, "bias_lane" if swapped else "bias_row": bias.strides[0]}
    elif sums is not None and not swapped:
        values |= {"bias_use": kernels.SUM_LANES, "bias_lane": size, "bias_group": len(a) * size}
    rest = kernels.pack_rest(*(values.get(name, 0) for name in kernels.INTEGERS))
    flops = 2.0 * out.size * K
    return _Plan(kernel, swapped, rest, values["items"], flops, values["scratch_size"], groups)


class _Cut(NamedTuple):
    """The division of a product into work items."""

    panels: int
    blocks: int
    slab: int
    slabs: int
    groups: int
    cost: float  # approximate number of cycles for each k


def _cut(spec: Any, lanes: Array, numbers: Array, long: bool) -> _Cut:
    """Divide a product into items for many threads. The division depends on the shape alone."""
    (P, K), Q = lanes.shape, len(numbers)
    BM, MR, W = spec.query_tile, spec.block[0], spec.vector.width
    tiles, slabs = -(-P // BM), -(-Q // SLAB)
    panels = PANELS if long else 1
    groups = max(1, min(K // DEPTH, ITEMS // (-(-tiles // panels) * slabs))) if long else 1
    while panels > 1 and -(-tiles // panels) * slabs * groups < ITEMS:
        panels //= 2
    blocks = -(-tiles // panels)
    if groups == 1:
        slabs = max(slabs, min(-(-ITEMS // blocks), Q // SHORT_SLAB))
    slab = -(-Q // (slabs * MR)) * MR
    slabs = -(-Q // slab)
    # Cycles for packing one number. Numbers that are contiguous along the lanes need not be transposed.
    pack = 0.6 if lanes.strides[1] == lanes.itemsize else 0.15 if lanes.strides[0] == lanes.itemsize else 2.0
    padded = Q if Q == 1 else -(-Q // MR) * MR
    return _Cut(panels, blocks, slab, slabs, groups, tiles * BM * (padded / W + pack * slabs))
