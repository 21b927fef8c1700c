"""Functions of rows on the threads that attention runs on: norms with a residual, and activations."""

import numpy as np

from ..options import Array
from ..validation import as_floats
from .activations import check_activation, coefficients_of, with_numpy
from .projection import as_matrix, kernel_of, modules, usable

COLUMNS = 2**13  # numbers of an array that an activation takes as a row
BLOCK = 2**14  # numbers of a work item, in whole rows
NORM_FLOPS, ACTIVATION_FLOPS = 16.0, 32.0  # of a number, for the choice of threads


def normalized(
    x: Array, weight: Array, bias: Array | None, eps: float, out: Array | None = None,
    residual: Array | None = None, center: bool = True,
) -> Array:  # fmt: skip
    """Return the rows of x, plus those of a residual, with mean 0 if `center` and mean square 1, by weight and bias.

    `out` may be x or the residual.
    """
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {x.shape}, got {residual.shape}")
    fits = all(a is None or a.shape == x.shape[-1:] for a in (weight, bias)) and (out is None or out.shape == x.shape)
    if not fits or not usable(x, weight, bias, residual, out) or not x.size:
        return _normalized_with_numpy(x, weight, bias, eps, out, residual, center)
    target = _target(x, out)
    rows, results = _rows(x, target), as_matrix(target)
    others = None if residual is None else _rows(residual, target)
    arrays = [rows, results, *(None if a is None else np.ascontiguousarray(a) for a in (weight, bias)), others]
    kernels = modules()[2]
    task = kernels.LAYER_NORM if center else kernels.RMS_NORM
    number, features = rows.shape
    _launch(task, arrays, number, features, features, eps, NORM_FLOPS)
    return _given(target, out)


def activated(name: str, x: Array, out: Array | None = None) -> Array:
    """Return an activation of each number; `out` may be x.

    Raises
    ------
    TypeError, ValueError
        There is no such activation, x is no array of floating point, or `out` has another shape.
    """
    check_activation(name)
    coefficients = coefficients_of(name, x.dtype) if usable(x, out) else None
    if coefficients is None or not x.size or not (out is None or out.shape == x.shape):
        x = as_floats("x", x)
        if out is not None and out.shape != x.shape:
            raise ValueError(f"out must have the shape of x, {x.shape}, got {out.shape}")
        return with_numpy(name, x, out)
    target = _target(x, out)
    numbers = np.ravel(x if x is target or not np.may_share_memory(x, target) else x.copy())
    columns = min(COLUMNS, numbers.size)
    rows = -(-numbers.size // columns)
    last = numbers.size - (rows - 1) * columns
    arrays = [numbers, target.reshape(-1), None, None, None, coefficients]
    _launch(modules()[2].ACTIVATION, arrays, rows, columns, last, 0.0, ACTIVATION_FLOPS)
    return _given(target, out)


def _target(x: Array, out: Array | None) -> Array:
    """Return the array that the kernel writes: `out`, or one that is copied to it."""
    if out is not None and out.flags.c_contiguous and out.flags.writeable and x.flags.c_contiguous:
        return out
    return np.empty(x.shape, x.dtype)


def _given(target: Array, out: Array | None) -> Array:
    if out is None or out is target:
        return target
    np.copyto(out, target)
    return out


def _rows(x: Array, target: Array) -> Array:
    """Return x as rows with features side by side, which are those of the target or do not overlap it."""
    if x is not target and np.may_share_memory(x, target):
        x = x.copy()
    rows = as_matrix(x)
    return rows if rows.strides[1] == rows.itemsize else np.ascontiguousarray(rows)


def _launch(
    task: int, arrays: list[Array | None], rows: int, features: int, last: int, eps: float, flops: float
) -> None:
    """Run the kernel over rows, of which the last has `last` numbers.

    `arrays` are x, the result, weight, bias, residual and coefficients; those that a task does not read may be None.
    """
    cpu_resources, _, kernels = modules()
    x, out, weight, bias, residual, coefficients = (*arrays, None)[:6]
    assert x is not None
    assert out is not None
    kernel, spec = kernel_of(x.dtype.name, "rowwise")
    block = max(1, BLOCK // features)
    values = {
        "items": -(-rows // block),
        "block": block,
        "rows": rows,
        "features": features,
        "last": last,
        "x_row": x.strides[0] if x.ndim == 2 else features * x.itemsize,
        "out_row": out.strides[0] if out.ndim == 2 else features * x.itemsize,
        "residual_row": 0 if residual is None else residual.strides[0],
        "task": task,
        "has_bias": bias is not None,
        "has_residual": residual is not None,
        **kernels.scratch(spec),
    }
    work = flops * rows * features
    number = cpu_resources.threads_for(values["items"], work)
    kept = [x if a is None else a for a in (x, out, weight, bias, residual, coefficients)]
    own = cpu_resources.take()
    try:
        scratch, address = own.reserve(number * values["scratch_size"])
        own.counter.value = 0
        cpu_resources.addresses.call(*kept[:4], own.params_address)
        cpu_resources.addresses.call(*kept[4:], x, x, own.params_address + kernels.SECOND)
        integers = (values[name] for name in kernels.INTEGERS)
        kernels.pack_own(own.params, kernels.OWN, own.counter_address, address, *integers, eps)
        own.run(kernel, number, work, kept, scratch)
    finally:
        cpu_resources.put_back(own)


def _normalized_with_numpy(
    x: Array, weight: Array, bias: Array | None, eps: float, out: Array | None, residual: Array | None, center: bool
) -> Array:
    features = np.shape(x)[-1:]
    for name, array, shape in (("weight", weight, features), ("bias", bias, features), ("out", out, np.shape(x))):
        if array is not None and np.shape(array) != shape:
            raise ValueError(f"{name} must have shape {shape}, as x has shape {np.shape(x)}, got {np.shape(array)}")
    rows = x if residual is None else x + residual
    if center:
        rows = rows - rows.mean(axis=-1, keepdims=True)
    result: Array = rows * inverse_root(rows, eps) * weight
    if bias is not None:
        result = result + bias
    if out is None:
        return result
    np.copyto(out, result)
    return out


def inverse_root(x: Array, eps: float) -> Array:
    """Return 1 / sqrt(mean square + eps) of each row."""
    square = np.vecdot(x, x)[..., None] / x.dtype.type(x.shape[-1])
    result: Array = 1 / np.sqrt(square + x.dtype.type(eps))
    return result


__all__ = ["activated", "inverse_root", "normalized"]
