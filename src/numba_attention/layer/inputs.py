"""Inputs of a call of the layer: checks, padding as an option of `attention`, positions."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..masks.blockmask import BlockMask
from ..options import Array
from ..validation import as_array, as_bools, as_ints, as_ndarray, broadcast_to, is_bottom_right


def check_inputs(
    query: Array, key: Array | None, value: Array | None, features: tuple[int, int, int], dtype: np.dtype[Any]
) -> tuple[Array, Array, Array, tuple[int, ...]]:
    """Check the inputs; return query, key and value with their defaults, and their broadcast leading dimensions.

    Inputs that are the same array are returned as the same array, so that one product can do several projections.
    """
    if key is None and value is not None:
        raise ValueError("key must be given where value is")
    args = query, key, value
    query = as_ndarray("query", query)
    key = query if key is None or key is args[0] else as_ndarray("key", key)
    value = key if value is None or value is args[1] else query if value is args[0] else as_ndarray("value", value)
    for name, array, size in zip(("query", "key", "value"), (query, key, value), features, strict=True):
        if array.dtype != dtype:
            raise TypeError(
                f"{name} must have the dtype of the layer, {dtype}, got {array.dtype}; "
                f"convert it with {name}.astype(layer.dtype)"
            )
        if array.ndim < 2 or array.shape[-1] != size:
            raise ValueError(f"{name} must have shape (..., length, {size}), got {array.shape}")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"value must be as long as key, {key.shape[-2]}, got {value.shape[-2]}")
    shapes = query.shape[:-2], key.shape[:-2], value.shape[:-2]
    try:
        return query, key, value, np.broadcast_shapes(*shapes)
    except ValueError:
        raise ValueError(
            "leading dimensions of query, key and value do not broadcast: {}, {}, {}".format(*shapes)
        ) from None


def hide_padding(options: dict[str, Any], padding: ArrayLike, S: int) -> None:
    """Convert PyTorch's key_padding_mask to key_lengths if padding is at the end, and to a mask otherwise."""
    ignored = as_array("key_padding_mask", padding)
    if ignored.dtype != np.bool_:
        raise TypeError(
            f"key_padding_mask must be boolean (True = padding, ignored), got {ignored.dtype}; "
            "compare or cast it, or pass additive values as bias="
        )
    if ignored.ndim < 1 or ignored.shape[-1] != S:
        raise ValueError(f"key_padding_mask must have shape (..., {S}), got {ignored.shape}")
    # Lengths let kernels skip whole tiles. But with alignment at the end they would change the positions, which a mask
    # does not, so padding stays a mask there.
    at_end = bool((ignored[..., :-1] <= ignored[..., 1:]).all())
    if at_end and options.get("key_lengths") is None and not is_bottom_right(options.get("is_causal")):
        options["key_lengths"] = S - np.count_nonzero(ignored, axis=-1)
        return
    seen = ~ignored[..., None, None, :]
    mask = options.get("mask")
    if mask is None:
        options["mask"] = seen
        return
    if isinstance(mask, BlockMask):
        L = mask.shape[-2]
        options["mask"] = mask & BlockMask.from_array(np.broadcast_to(seen, (*seen.shape[:-2], L, S)))
        return
    shown = as_bools("mask", mask)
    try:
        options["mask"] = shown & seen
    except ValueError:
        raise ValueError(
            f"mask of shape {shown.shape} and key_padding_mask of shape {ignored.shape} do not broadcast together"
        ) from None


def query_offset(options: dict[str, Any], L: int | Array, S: int | Array, batch: tuple[int, ...]) -> int | Array:
    """Return the key position of the first query of each sequence, by the rules of `attention`."""
    if options.get("query_offset") is not None:
        return _per_sequence("query_offset", options, 0, batch)
    if is_bottom_right(options.get("is_causal")):
        return _per_sequence("key_lengths", options, S, batch) - _per_sequence("query_lengths", options, L, batch)
    return 0


def _per_sequence(name: str, options: dict[str, Any], default: int | Array, batch: tuple[int, ...]) -> int | Array:
    """Return an option that is one integer, or one for each sequence. `attention` checks the range of lengths."""
    if options.get(name) is None:
        return default
    array = as_ints(name, options[name])
    return int(array) if array.ndim == 0 else broadcast_to(name, array, batch)
