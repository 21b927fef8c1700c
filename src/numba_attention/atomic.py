"""Writing files atomically: a file is replaced by a complete new one, or stays as it is."""

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BLOCK = 2**20
_CANNOT_ALLOCATE = (errno.EINVAL, errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a new file, which takes the place of `path` when the block ends without an exception.

    Until then, and if the disk is full or the process ends, the old file stays as it is. A symbolic link is followed,
    and the file that it points to is replaced. Other hard links to the old file keep its contents.
    """
    target = Path(os.path.realpath(path))
    mode = target.stat().st_mode if target.exists() else None
    if mode is not None and not stat.S_ISREG(mode):
        raise OSError(errno.EEXIST, "Is no regular file, which alone can be replaced", os.fspath(path))
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".numba-attention-", dir=target.parent)
    except OSError as error:  # which would name a file that the caller does not know
        raise OSError(error.errno, os.strerror(error.errno or 0), os.fspath(path)) from None
    with temporary as folder:
        unfinished = Path(folder, target.name)
        yield unfinished
        if mode is not None:
            unfinished.chmod(stat.S_IMODE(mode))
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())  # or a rename could reach the disk before the contents do
        os.replace(unfinished, target)


def allocate(path: str | os.PathLike[str], name: str | os.PathLike[str] | None = None) -> None:
    """Allocate disk space for a whole file that may have holes, so that writing to its mapping cannot fail.

    If the disk is full, a write to a mapped hole ends the process with SIGBUS. Errors call the file `name`.

    Raises
    ------
    OSError
        The disk is full, or the file is larger than the process may write.
    """
    with open(path, "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _CANNOT_ALLOCATE:
                raise OSError(
                    error.errno, f"{os.strerror(error.errno or 0)} for {size} bytes", os.fspath(name or path)
                ) from None
            for start in range(0, size, _BLOCK):
                file.seek(start)
                block = file.read(_BLOCK)
                file.seek(start)
                file.write(block)
