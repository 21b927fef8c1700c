"""Merging attention results over disjoint sets of keys: pairs (out, lse) are a monoid whose identity has lse = -inf."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from . import device_call
from .device.arrays import on_device
from .options import NO_OPTIONS, Array
from .validation import as_flag, as_ndarray, check_like, is_supported

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def merge(outs: Any, lses: Any, packed: bool | None = None, out: Any = None) -> tuple[Any, Any]:
    """Merge n results; see `numba_attention.merge_attention`. `out` is an array for the merged one, if not None."""
    if _on_device(outs) or _on_device(lses):
        return cast(tuple[Any, Any], _there(_merge_on_device, {"outs": outs, "lses": lses}, packed=packed, out=out))
    parts, logs, packed = _checked(outs, lses, packed)
    with np.errstate(all="ignore"):  # as in `attention`, infinities and NaNs are results
        merged, lse, _ = _merge(parts, logs)
    lse = lse.astype(logs[0].dtype)
    if out is None:
        out = merged.astype(parts[0].dtype)
    else:
        out[...] = merged
    return out, np.ascontiguousarray(lse.T) if packed else lse


def _there(function: Callable[..., Any], given: dict[str, Any], **rest: Any) -> Any:
    """Call a function of lists of arrays, or stacked ones, some of them on a GPU, where the others are copied."""
    counts = {name: len(x) if isinstance(x, list | tuple) else None for name, x in given.items()}
    named = {
        f"{name}[{n}]" if counts[name] is not None else name: x
        for name, stack in given.items()
        for n, x in enumerate(stack if counts[name] is not None else [stack])
    }

    # The first one says where results are.
    if not on_device(next(iter(named.values()), None)):
        named = dict(sorted(named.items(), key=lambda item: not on_device(item[1])))
    return device_call.run(function, None, named, NO_OPTIONS, counts=tuple(counts.values()), **rest)


def merge_backward(
    grad_out: Any, grad_lse: Any, outs: Any, lses: Any, packed: bool | None = None
) -> tuple[list[Any], list[Any]]:
    """Differentiate `merge`; see `numba_attention.merge_attention_backward`."""
    if _on_device(outs) or _on_device(lses) or on_device(grad_out):
        given = {"outs": outs, "lses": lses, "grad_out": grad_out, "grad_lse": grad_lse}
        of_outs, of_lses = _there(_merge_backward_on_device, given, packed=packed)
        return list(of_outs), list(of_lses)
    parts, logs, packed = _checked(outs, lses, packed)
    grad_out, grad_lse = _checked_gradients(grad_out, grad_lse, parts, logs, packed)
    grad_outs, grad_lses = [], []
    with np.errstate(all="ignore"):
        out, _, weights = _merge(parts, logs)
        grad = grad_out.astype(out.dtype)
        for part, log, weight in zip(parts, logs, weights, strict=True):
            empty = log == -np.inf
            inner = np.sum(grad * (part - out), axis=-1) + (0 if grad_lse is None else grad_lse)
            grad_outs.append(np.where(empty[..., None], 0, weight[..., None] * grad).astype(part.dtype))
            grad_of_log = np.where(empty, 0, weight * inner).astype(log.dtype)
            grad_lses.append(np.ascontiguousarray(grad_of_log.T) if packed else grad_of_log)
    return grad_outs, grad_lses


def _checked_gradients(
    grad_out: Any, grad_lse: Any, parts: list[Array], logs: list[Array], packed: bool
) -> tuple[Array, Array | None]:
    """Return the gradients of merged results, that of lse with the axes of the rows of the parts."""
    grad_out = check_like("grad_out", grad_out, parts[0].shape, parts[0].dtype)
    if grad_lse is None:
        return grad_out, None
    shape = logs[0].shape[::-1] if packed else logs[0].shape
    grad_lse = check_like("grad_lse", grad_lse, shape, logs[0].dtype)
    return grad_out, grad_lse.T if packed else grad_lse


def _merge_on_device(
    _: Any, *, counts: tuple[int | None, ...], options: Any, empty: Any, packed: bool | None, out: Any = None,
    **headers: Any,
) -> tuple[Array, Array]:  # fmt: skip
    """Merge results on a GPU, of which there are headers."""
    from .backends import device_merge

    outs, lses = _stacks(("outs", "lses"), counts, headers)
    parts, logs, packed = _checked(outs, lses, packed)
    merged = empty(parts[0].shape, parts[0].dtype) if out is None else out
    lse = empty(logs[0].shape[::-1] if packed else logs[0].shape, logs[0].dtype)
    device_merge.merge(parts, logs, merged, lse.T if packed else lse)
    return merged, lse


def _merge_backward_on_device(
    _: Any, *, counts: tuple[int | None, ...], options: Any, empty: Any, packed: bool | None, **headers: Any
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Differentiate `merge` on a GPU."""
    from .backends import device_merge

    outs, lses, grad_out, grad_lse = _stacks(("outs", "lses", "grad_out", "grad_lse"), counts, headers)
    parts, logs, packed = _checked(outs, lses, packed)
    grad_out, grad_lse = _checked_gradients(grad_out, grad_lse, parts, logs, packed)
    grad_outs = [empty(x.shape, x.dtype) for x in parts]
    grad_lses = [empty(x.shape[::-1] if packed else x.shape, x.dtype) for x in logs]
    of_rows = [x.T for x in grad_lses] if packed else grad_lses
    device_merge.merge_backward(grad_out, grad_lse, parts, logs, grad_outs, of_rows)
    return tuple(grad_outs), tuple(grad_lses)


def _stacks(names: tuple[str, ...], counts: tuple[int | None, ...], headers: dict[str, Any]) -> list[Any]:
    """Return the arguments that `_there` has taken apart."""
    return [
        headers[name] if count is None else [headers[f"{name}[{n}]"] for n in range(count)]
        for name, count in zip(names, counts, strict=True)
    ]


def merge_jvp(
    outs: Any, lses: Any, out_tangents: Any, lse_tangents: Any, packed: bool | None = None
) -> tuple[Any, Any, Any, Any]:
    """Merge n results and their tangents; see `numba_attention.merge_attention_jvp`."""
    if any(map(_on_device, (outs, lses, out_tangents, lse_tangents))):
        raise NotImplementedError("merge_attention_jvp takes arrays on the host; copy those on a GPU there")
    parts, logs, packed = _checked(outs, lses, packed)
    moved_parts, moved_logs = _arrays("out_tangents", out_tangents), _arrays("lse_tangents", lse_tangents)
    for name, moved, own in (("out_tangents", moved_parts, parts), ("lse_tangents", moved_logs, logs)):
        if len(moved) != len(own):
            raise ValueError(f"{name} must be as many as outs, {len(own)}, got {len(moved)}")
        shape = own[0].shape[::-1] if packed and name == "lse_tangents" else own[0].shape
        check_like(f"an array of {name}", moved[0], shape, own[0].dtype)
    moved_logs = [log.T for log in moved_logs] if packed else moved_logs
    with np.errstate(all="ignore"):
        out, lse, weights = _merge(parts, logs)
        # An empty part adds nothing, even if its rows are NaN.
        seen = [log != -np.inf for log in logs]
        terms = [np.where(s, w * x, 0) for s, w, x in zip(seen, weights, moved_logs, strict=True)]
        lse_tangent = np.add.reduce(terms).astype(logs[0].dtype)
        out_tangent = np.zeros_like(out)
        for s, w, part, moved_part, log in zip(seen, weights, parts, moved_parts, moved_logs, strict=True):
            change = moved_part.astype(out.dtype) + (log - lse_tangent)[..., None] * part.astype(out.dtype)
            out_tangent += np.where(s[..., None], w[..., None] * change, 0)
    results = lse.astype(logs[0].dtype), lse_tangent
    lse, lse_tangent = (np.ascontiguousarray(x.T) for x in results) if packed else results
    return out.astype(parts[0].dtype), lse, out_tangent.astype(parts[0].dtype), lse_tangent


def _merge(parts: list[Array], logs: list[Array]) -> tuple[Array, Array, list[Array]]:
    """Return the merged out and lse and the weight of each part, in float32 or float64."""
    half = parts[0].dtype not in _FLOATS
    dtype = np.result_type(np.float32 if half else parts[0].dtype, logs[0].dtype)
    highest = np.maximum.reduce(logs).astype(dtype)
    highest = np.where(highest == -np.inf, 0, highest)  # where every part is empty: exp(-inf - 0) = 0
    weights = [np.exp(log - highest) for log in logs]
    total = np.add.reduce(weights)
    weights = [weight / total for weight in weights]
    out = np.zeros(parts[0].shape, dtype)
    for part, log, weight in zip(parts, logs, weights, strict=True):
        # An empty part adds nothing even if its rows are NaN. A part whose weight underflows to 0 may add NaN.
        out += np.where(log[..., None] == -np.inf, 0, weight[..., None] * part.astype(dtype))
    return out, highest + np.log(total), weights


def _on_device(arrays: Any) -> bool:
    if isinstance(arrays, list | tuple):
        return any(on_device(x) for x in arrays)
    return on_device(arrays)


def _arrays(name: str, stack: Any) -> list[Array]:
    try:
        if isinstance(stack, np.ndarray):
            stack = as_ndarray(name, stack)
            # With the ellipsis, parts without axes are arrays too, which may be headers of memory of a GPU.
            parts = [stack[n, ...] for n in range(len(stack))]
        else:
            parts = list(stack)
    except TypeError as error:
        if isinstance(stack, np.ndarray) and stack.ndim:
            raise
        raise TypeError(
            f"{name} must be a sequence of arrays or one stacked array, got {type(stack).__qualname__}"
        ) from error
    if not parts:
        raise ValueError(f"{name} must hold at least one array")
    arrays = [
        np.asarray(x) if isinstance(x, np.generic) else as_ndarray(f"{name}[{n}]", x) for n, x in enumerate(parts)
    ]
    for array in arrays:
        if array.dtype != arrays[0].dtype:
            raise TypeError(f"{name} must share one dtype, got {arrays[0].dtype} and {array.dtype}")
        if array.shape != arrays[0].shape:
            raise ValueError(f"{name} must share one shape, got {arrays[0].shape} and {array.shape}")
    return arrays


def _checked(outs: Any, lses: Any, packed: Any) -> tuple[list[Array], list[Array], bool]:
    """Return the parts, their lses with the axes of the rows of the parts, and whether they were packed."""
    parts, logs = _arrays("outs", outs), _arrays("lses", lses)
    rows = parts[0].shape[:-1]
    if packed is None:
        packed = len(rows) == 2 and logs[0].shape == rows[::-1] != rows
    elif as_flag("packed", packed) and (len(rows) != 2 or logs[0].shape != rows[::-1]):
        raise ValueError(
            "outs and lses must hold arrays of shape (T, H, Ev) and (H, T), as attention_varlen returns them, got "
            f"{parts[0].shape} and {logs[0].shape}"
        )
    logs = [log.T for log in logs] if packed else logs
    _check(parts, logs)
    return parts, logs, bool(packed)


def _check(outs: list[Array], lses: list[Array]) -> None:
    if not is_supported(outs[0].dtype):
        raise TypeError(f"outs must be native float32, float64, float16 or ml_dtypes.bfloat16, got {outs[0].dtype}")
    if lses[0].dtype not in _FLOATS or not lses[0].dtype.isnative:
        raise TypeError(f"lses must be native float32 or float64, got {lses[0].dtype}")
    if len(outs) != len(lses):
        raise ValueError(f"outs and lses must be as many, got {len(outs)} outs and {len(lses)} lses")
    if outs[0].ndim < 2:
        raise ValueError(f"outs must hold arrays of shape (..., L, Ev), got {outs[0].shape}")
    if lses[0].shape != outs[0].shape[:-1]:
        raise ValueError(f"lses must hold arrays of shape {outs[0].shape[:-1]}, the rows of outs, got {lses[0].shape}")
