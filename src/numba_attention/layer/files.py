"""Tensors in safetensors files, in one file or in several that an index lists."""

from __future__ import annotations  # short types in help()

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from ..options import Array


class Tensors:
    """The names of the tensors of a file, or of the files of an index (``*.index.json``); `read` loads some of them.

    Raises
    ------
    ImportError
        The safetensors library is not installed.
    FileNotFoundError, IsADirectoryError
        There is no such file, or it is a folder.
    ValueError
        A file is damaged.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        if not isinstance(path, str | PathLike):
            raise TypeError(
                f"path must be a string or path-like, got {type(path).__module__}.{type(path).__qualname__}; "
                "from_torch takes tensors in memory"
            )
        if os.path.isdir(path):
            raise IsADirectoryError(
                f"{os.fspath(path)} is a folder; pass the path of its file, such as model.safetensors"
            )
        self.path = path
        self._library = library()
        self.names: dict[str, str | PathLike[str]] = {}  # to the file that each is in
        if os.fspath(path).endswith(".json"):
            try:
                index = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
                self.names = {name: Path(path).parent / file for name, file in index.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{os.fspath(path)} is no index of safetensors files: {error!r}") from None
        else:
            with self._open(path) as file:
                self.names = dict.fromkeys(file.keys(), path)

    def read(self, names: Iterable[str]) -> dict[str, Array]:
        """Load these tensors."""
        by_file: dict[Any, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.names[name]].append(name)
        arrays: dict[str, Array] = {}
        for path, own in by_file.items():
            with self._open(path) as file:
                arrays |= {name: file.get_tensor(name) for name in own}
        return arrays

    @contextmanager
    def _open(self, path: str | PathLike[str]) -> Iterator[Any]:
        try:
            with self._library.safe_open(path, "np") as file:
                yield file
        except self._library.SafetensorError as error:
            raise ValueError(f"{os.fspath(path)} is no whole safetensors file: {error}") from None


def library() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("safetensors files need that library: pip install 'numba-attention[demo]'") from error
    return safetensors
