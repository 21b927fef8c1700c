"""Attention over arrays in .npy and .npz files, mapped into memory rather than read."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .api import attention
from .options import Array

_NAMES = ("query", "key", "value")


def attend(inputs: Sequence[Path], out: Path, lse: Path | None, options: dict[str, Any]) -> Array:
    """Write the attention of arrays in files to a file.

    Parameters
    ----------
    inputs : sequence of Path
        Three .npy files, or one .npz with query, key and value.
    out : Path
        A .npy. It appears, whole, when everything has succeeded, and replaces what was there.
    lse : Path or None
        Where to write the log-sum-exps, if anywhere.
    options : dict
        Further arguments of `attention`.

    Returns
    -------
    ndarray
        The result, mapped from its file.

    Raises
    ------
    OSError, ValueError, TypeError, BackendUnavailableError
        Files that cannot be read or written, and what `attention` raises.
    """
    query, key, value = arrays = _arrays(inputs)
    for name, array in zip(_NAMES, arrays, strict=True):
        if array.ndim < 2:
            raise ValueError(f"{name} must have at least two dimensions, got shape {array.shape}")
    shape = (*np.broadcast_shapes(*(x.shape[:-3] for x in arrays)), *query.shape[-3:-1], value.shape[-1])
    with tempfile.TemporaryDirectory(prefix=".numba-attention-", dir=out.parent) as folder:
        unfinished = Path(folder, "out.npy")
        result = np.lib.format.open_memmap(unfinished, "w+", query.dtype, shape)
        if lse is None:
            attention(query, key, value, out=_view(result), **options)
        else:
            _, log_sums = attention(query, key, value, out=_view(result), return_lse=True, **options)
            np.save(lse, log_sums)
        result.flush()
        del result
        os.replace(unfinished, out)
    return load(out)


def load(path: Path) -> Array:
    """Map a .npy into memory; bfloat16, which the format writes as two nameless bytes, is recognised."""
    array = np.load(path, mmap_mode="r")
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} must be a .npy, with one array in it")
    return _view(array)


def window(text: str) -> tuple[int | None, int | None]:
    """Read "256,256" or "256,none"."""
    parts = text.split(",")
    if len(parts) != 2:
        raise ValueError(f"a window is LEFT,RIGHT, such as 256,0 or none,128, got {text!r}")
    left, right = (None if part.strip().lower() == "none" else int(part) for part in parts)
    return left, right


def numbers(text: str, kind: type[int] | type[float]) -> Array:
    """Read "3,4,5", one number, or the path of a .npy."""
    if text.endswith(".npy"):
        return load(Path(text))
    values = [kind(part) for part in text.split(",")]
    return np.array(values if len(values) > 1 or kind is float else values[0])


def _arrays(inputs: Sequence[Path]) -> list[Array]:
    if len(inputs) == 3:
        return [load(path) for path in inputs]
    if len(inputs) != 1:
        raise ValueError(f"expected three .npy files or one .npz, got {len(inputs)} files")
    archive = np.load(inputs[0])
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{inputs[0]} must be a .npz with query, key and value, or one of three .npy files")
    with archive:
        missing = [name for name in _NAMES if name not in archive]
        if missing:
            raise ValueError(f"{inputs[0]} has no {' and no '.join(missing)}, only {', '.join(archive.files)}")
        return [_view(archive[name]) for name in _NAMES]


def _view(array: Array) -> Array:
    """Return a plain array over the same memory."""
    plain = np.asarray(array)
    if plain.dtype == np.dtype("V2"):
        import ml_dtypes

        return plain.view(ml_dtypes.bfloat16)
    return plain


__all__ = ["attend", "load", "numbers", "window"]
