"""Attention over arrays in .npy and .npz files, mapped into memory rather than read."""

import math
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..api import attention
from ..atomic import allocate, replacing
from ..options import Array
from ..validation import as_tensor, broadcast_batch

_NAMES = ("query", "key", "value")


def attend(inputs: Sequence[Path], out: Path, lse: Path | None, options: dict[str, Any]) -> Array:
    """Write the attention of arrays in files to a file.

    Parameters
    ----------
    inputs : sequence of Path
        Three .npy files, or one .npz with query, key and value.
    out : Path
        A .npy. It replaces an existing file, which may be an input, when everything has succeeded.
    lse : Path or None
        Another .npy for the log-sum-exps, written likewise.
    options : dict
        Further arguments of `attention`.

    Returns
    -------
    ndarray
        The result, mapped from its file.

    Raises
    ------
    OSError, ValueError, TypeError, BackendUnavailableError
        A file cannot be read or written, or `attention` raises an error.
    """
    if lse is not None and _is_same(out, lse):
        raise ValueError(f"the log-sum-exps must go to another file than the result, got {out} and {lse}")
    for path in (out, lse):
        if path is not None and path.suffix == ".npz":
            raise ValueError(f"a result is one array, in a .npy, got {path}")
    query, key, value = arrays = _arrays(inputs)
    for name, array in zip(_NAMES, arrays, strict=True):
        if array.ndim < 2:
            raise ValueError(f"{name} must have at least two dimensions, got shape {array.shape}")
        as_tensor(name, array)
    batch = broadcast_batch({name: x.shape[:-3] for name, x in zip(_NAMES, arrays, strict=True)})
    shape = (*batch, *query.shape[-3:-1], value.shape[-1])
    with ExitStack() as files:
        unfinished = files.enter_context(replacing(out))
        unfinished_lse = None if lse is None else files.enter_context(replacing(lse))
        result = np.lib.format.open_memmap(unfinished, "w+", query.dtype, shape)
        allocate(unfinished, out)
        if unfinished_lse is None:
            attention(query, key, value, out=_view(result), **options)
        else:
            _, log_sums = attention(query, key, value, out=_view(result), return_lse=True, **options)
            with unfinished_lse.open("wb") as file:  # given a name, np.save would append the suffix .npy
                np.save(file, log_sums)
        result.flush()
        del result
    return load(out)


def load(path: Path) -> Array:
    """Map a .npy into memory. The format stores bfloat16 as two untyped bytes, which are read as bfloat16."""
    array = _load(path, "r")
    if isinstance(array, np.ndarray):
        return _view(array)
    array.close()
    raise ValueError(f"{path} must be a .npy, with one array in it")


def window(text: str | None) -> tuple[int | None, int | None] | None:
    """Read "256,256" or "256,none"."""
    if text is None:
        return None
    try:
        left, right = (None if part.strip().lower() == "none" else int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"a window is LEFT,RIGHT, such as 256,0 or none,128, got {text!r}") from None
    return left, right


def numbers(name: str, text: str | None, kind: type[int] | type[float]) -> Array | None:
    """Read "3,4,5", one number, or the path of a .npy, for the option of this name."""
    if text is None:
        return None
    if text.endswith(".npy"):
        return load(Path(text))
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        said = "integers" if kind is int else "numbers"
        raise ValueError(f"{name} must be {said} separated by commas, or the path of a .npy, got {text!r}") from None
    return np.array(values if len(values) > 1 or kind is float else values[0])


def _arrays(inputs: Sequence[Path]) -> list[Array]:
    if len(inputs) == 3:
        return [load(path) for path in inputs]
    if len(inputs) != 1:
        raise ValueError(f"expected three .npy files or one .npz, got {len(inputs)} files")
    archive = _load(inputs[0], None)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{inputs[0]} must be a .npz with query, key and value, or one of three .npy files")
    with archive:
        missing = [name for name in _NAMES if name not in archive]
        if missing:
            raise ValueError(f"{inputs[0]} has no {' and no '.join(missing)}, only {', '.join(archive.files)}")
        try:
            arrays = [archive[name] for name in _NAMES]
        except Exception as error:
            raise _damaged(inputs[0], error) from error
        for name, array in zip(_NAMES, arrays, strict=True):
            if not isinstance(array, np.ndarray):  # NumPy returns bytes for a member that is no .npy
                raise _damaged(inputs[0], f"{name} is no .npy")
        return [_view(array) for array in arrays]


def _load(path: Path, mmap_mode: Literal["r"] | None) -> Any:
    """Load a .npy or .npz. A file that can be read but is damaged is a ValueError that names it."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} must be a regular file")
    size = path.stat().st_size
    try:
        with np.errstate(over="ignore"):
            loaded = np.load(path, mmap_mode=mmap_mode)
    except OSError:
        raise
    except Exception as error:  # EOFError, OverflowError, zipfile.BadZipFile or SyntaxError, depending on the header
        raise _damaged(path, error) from error
    # NumPy's own check of the size overflows for large shapes.
    if isinstance(loaded, np.memmap) and loaded.offset + math.prod(loaded.shape) * loaded.itemsize > size:
        raise _damaged(path, f"shape {loaded.shape} takes more than its {size} bytes")
    return loaded


def _damaged(path: Path, error: Exception | str) -> ValueError:
    return ValueError(f"{path} holds no whole arrays of numbers: {error}")


def _is_same(a: Path, b: Path) -> bool:
    """Whether two paths are of the same file. The files need not exist."""
    if os.path.realpath(a) == os.path.realpath(b):
        return True
    return a.exists() and b.exists() and os.path.samefile(a, b)


def _view(array: Array) -> Array:
    """Return a plain array over the same memory."""
    plain = np.asarray(array)
    if plain.dtype == np.dtype("V2"):
        import ml_dtypes

        return plain.view(ml_dtypes.bfloat16)
    return plain


__all__ = ["attend", "load", "numbers", "window"]
