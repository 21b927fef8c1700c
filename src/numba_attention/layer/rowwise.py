"""Functions of rows on the threads that attention runs on: norms with a residual, and activations."""

import numpy as np

from ..options import Array
from ..validation import as_floats, as_real, check_out
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

    Raises
    ------
    TypeError, ValueError
        An argument is no array of floating point, has a shape that does not fit, or is out of range.
    """
    eps = as_eps(eps)
    if not usable(x, weight, bias, residual, out) or not x.size or not _fits(x, weight, bias, out, residual):
        return _normalized_with_numpy(x, weight, bias, eps, out, residual, center)
    target = _target(x, out)
    rows, results = _rows(x, target), as_matrix(target)
    others = None if residual is None else _rows(residual, target)
    arrays = [rows, results, *(_kept(a, target) for a in (weight, bias)), others]
    kernels = modules()[2]
    task = kernels.LAYER_NORM if center else kernels.RMS_NORM
    number, features = rows.shape
    _launch(task, arrays, number, features, features, eps, NORM_FLOPS)
    return _given(target, out)


def as_eps(eps: float) -> float:
    """Check what is added to a variance."""
    number = as_real("eps", eps)
    if number < 0:
        raise ValueError(f"eps must not be negative, got {number}")
    return number


def _fits(x: Array, weight: Array, bias: Array | None, out: Array | None, residual: Array | None) -> bool:
    same = all(a is None or a.shape == x.shape for a in (out, residual))
    rows = x.ndim > 0 and weight is not None and all(a is None or a.shape == x.shape[-1:] for a in (weight, bias))
    return same and rows


def _kept(x: Array | None, target: Array) -> Array | None:
    """Return numbers side by side that stay as they are while the target is written."""
    if x is None:
        return None
    return x.copy() if np.may_share_memory(x, target) else np.ascontiguousarray(x)


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
        x = np.asarray(as_floats("x", x))
        given = None if out is None else check_out(out, x.shape, x.dtype, {}, of="x")
        with np.errstate(all="ignore"):  # infinities and NaNs in the input are no error
            result = with_numpy(name, x, given)
        return result if out is None else out
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
    if out is not None:
        check_out(out, x.shape, x.dtype, {}, of="x")
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
    x = as_floats("x", x)
    features, dtype = x.shape[-1:], x.dtype
    wide = np.float32 if dtype.itemsize == 2 else dtype  # a square of 256 is beyond the range of float16
    if not features:
        raise ValueError("x must have shape (..., features), got ()")
    arrays: list[Array | None] = []
    named = (("weight", weight, features), ("bias", bias, features), ("residual", residual, x.shape))
    for name, array, shape in named:
        if array is None and name != "weight":
            arrays.append(None)
            continue
        array = as_floats(name, array)
        if array.shape != shape:
            kind = f"the shape of x, {shape}" if name == "residual" else f"shape {shape}, as x has shape {x.shape}"
            raise ValueError(f"{name} must have {kind}, got {array.shape}")
        arrays.append(array.astype(wide, copy=False))
    given = None if out is None else check_out(out, x.shape, dtype, {}, of="x")
    factor, shift, added = arrays
    assert factor is not None
    result = np.empty(x.shape, dtype)
    if x.size:
        with np.errstate(all="ignore"):  # infinities and NaNs in the input are no error
            rows = x.astype(wide, copy=False)
            if added is not None:
                rows = rows + added
            if center:
                rows = rows - rows.mean(axis=-1, keepdims=True)
            rows = rows * inverse_root(rows, eps) * factor
            if shift is not None:
                rows = rows + shift
            result = rows.astype(dtype, copy=False)
    if given is None or out is None:
        return result
    np.copyto(given, result)
    return out


def inverse_root(x: Array, eps: float) -> Array:
    """Return 1 / sqrt(mean square + eps) of each row."""
    square = np.vecdot(x, x)[..., None] / x.dtype.type(x.shape[-1])
    result: Array = 1 / np.sqrt(square + x.dtype.type(eps))
    return result


__all__ = ["activated", "as_eps", "inverse_root", "normalized"]
