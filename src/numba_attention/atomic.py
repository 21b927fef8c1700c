"""Files that are replaced whole or not at all."""

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

    Until then, and if the disk is full or the process ends, what is there stays as it is. A symbolic link stays one:
    what it points to is replaced. A hard link does not: other names keep the old file.
    """
    target = Path(os.path.realpath(path))
    mode = target.stat().st_mode if target.exists() else None
    if mode is not None and not stat.S_ISREG(mode):
        raise OSError(errno.EEXIST, "Is no regular file, which alone can be replaced", os.fspath(path))
    with tempfile.TemporaryDirectory(prefix=".numba-attention-", dir=target.parent) as folder:
        unfinished = Path(folder, target.name)
        yield unfinished
        if mode is not None:
            unfinished.chmod(stat.S_IMODE(mode))
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())  # a rename may reach the disk before the contents
        os.replace(unfinished, target)


def allocate(path: str | os.PathLike[str], name: str | os.PathLike[str] | None = None) -> None:
    """Take disk space for all of a file that may have holes, so that writing to its mapping cannot fail.

    A write to a mapped hole ends the process with SIGBUS where the disk is full. `name` is what errors call the file.

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
