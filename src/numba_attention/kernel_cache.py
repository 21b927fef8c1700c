"""The kernel cache on disk, for the CPU and for GPUs: one folder for each user, one file for each kernel.

Loading a kernel executes the code in a file, and a checksum is not a signature. So nothing is read from a folder or a
file that somebody else could have written, and files are opened without following links. The checksum covers the key of
the kernel too: a file under another kernel's name counts as missing, as a damaged one does.
"""

import hashlib
import os
import re
import stat
import tempfile
import time
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import platformdirs

from .errors import NumbaAttentionWarning

ENVIRONMENT = "NUMBA_ATTENTION_CACHE_DIR"
SHIPPED = "NUMBA_ATTENTION_KERNELS"  # names a folder with kernels that were compiled elsewhere
PACKAGE = "numba_attention_kernels"  # which may be installed, too
_NAME = re.compile(r".*-[0-9a-f]{32}\.(kernel|cubin)")
# A version of the package has some 30 kernels of 50 KB for a CPU and some hundred of 100 KB for a GPU.
LARGEST = 256 * 2**20  # bytes of all files, above which the oldest are removed
UNUSED = 90 * 86400  # seconds without being loaded after which a file is removed
_UNFINISHED = ".kernel-part"
_ABANDONED = 3600  # seconds after which a temporary file that was never renamed is removed
_DAY = 86400
_warned = False
_pruned = False


@cache
def directory() -> Path | None:
    """Return the folder of the kernel cache, or None if no folder can be trusted: kernels are then kept in memory only.

    A folder that cannot be written to is still read from: a container image or an administrator may have filled it.
    """
    try:
        folder = _chosen().resolve()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = _distrust(os.stat(folder))
        if reason:
            _warn(f"the kernel cache {folder} is not used: the folder {reason}; make it yours alone (chmod 700)")
            return None
        return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        _warn(f"no kernel cache ({error}); set {ENVIRONMENT} to a writeable folder to save compiling in every process")
        return None


def _chosen() -> Path:
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named).expanduser()
    return platformdirs.user_cache_path("numba-attention", appauthor=False).expanduser()  # raises without a home


def _distrust(status: os.stat_result) -> str:
    """Return why another user may have written a file or folder; empty if only this user and root can have done so."""
    if not hasattr(os, "geteuid"):  # Windows: other users cannot write to folders of a user's profile
        return ""
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (uid {status.st_uid})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return ""


def _warn(message: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(message, NumbaAttentionWarning, stacklevel=3)


def warn_unwritten(error: Exception) -> None:
    _warn(f"a kernel could not be cached ({error!r}); set {ENVIRONMENT} to a folder that can be written")


def path_of(name: str, key: str, suffix: str) -> Path | None:
    """Return the path of the file for a key, whose name begins with a readable one; None if there is no cache."""
    folder = directory()
    return folder / file_name(name, key, suffix) if folder else None


def file_name(name: str, key: str, suffix: str) -> str:
    """Return the name of the file for a key."""
    return f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}{suffix}"


def is_trusted(folder: Path) -> bool:
    """Whether a folder exists and only this user and root can have written it; otherwise a warning says why not."""
    try:
        reason = _distrust(os.stat(folder))
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    if reason:
        _warn(f"the kernels in {folder} are not used: the folder {reason}")
    return not reason


def shipped_folders() -> list[Path]:
    """The folders with kernels that were compiled elsewhere, which are searched and never written to."""
    named = os.environ.get(SHIPPED)
    found = [Path(named).expanduser()] if named else []
    package = find_spec(PACKAGE)
    if package is not None:
        found += [Path(path) for path in package.submodule_search_locations or []]
    return [folder for folder in found if is_trusted(folder)]


def read_checked(path: Path, key: str) -> bytes | None:
    """Return what `write_checked` wrote for this key, or None if it is missing, damaged, or may be another user's."""
    try:
        with open(path, "rb", opener=_open_itself) as file:
            status = os.fstat(file.fileno())
            reason = _distrust(status)
            if reason:
                _warn(f"the kernel in {path} is not used: the file {reason}")
                return None
            content = file.read()
    except OSError:
        return None
    checksum, payload = content[:32], content[32:]
    if _checksum(key, payload) != checksum:
        return None
    if time.time() - status.st_mtime > _DAY:
        _touch(path)
    return payload


def write_checked(path: Path, key: str, payload: bytes, shared: bool = False) -> None:
    """Write a file atomically: other processes see the complete file or none. One that is `shared` all may read."""
    try:
        descriptor, temporary = _new_file(path)
    except FileNotFoundError:  # the folder was deleted after this process had found it
        if shared:
            raise
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if reason := _distrust(os.stat(path.parent)):
            raise PermissionError(f"the folder {reason}") from None
        descriptor, temporary = _new_file(path)
    try:
        with open(descriptor, "wb") as file:
            file.write(_checksum(key, payload) + payload)
        if shared:
            os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    if not shared:
        _prune_once(path.parent)


def _new_file(path: Path) -> tuple[int, str]:
    return tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=_UNFINISHED)


def _checksum(key: str, payload: bytes) -> bytes:
    digest = hashlib.sha256(key.encode())
    digest.update(b"\0" + payload)
    return digest.digest()


def _open_itself(path: str, flags: int) -> int:
    """Open a regular file, but neither a link nor a pipe, whose reader would wait for a writer."""
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(f"{path} is no regular file")


def _touch(path: Path) -> None:
    """Record that a file is in use, by its modification time: `prune` removes files that are not used for long."""
    try:
        os.utime(path)
    except OSError:  # the file is root's, or on a read-only disk
        return


def entries() -> list[Path]:
    """The files in the cache."""
    folder = directory()
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name)) if folder else []


def _prune_once(folder: Path) -> None:
    """Call `prune` at the first kernel that a process writes: that takes some 20 us, and compiling takes seconds."""
    global _pruned
    if not _pruned:
        _pruned = True
        prune(folder)


def prune(folder: Path) -> None:
    """Remove unfinished files of killed processes, kernels unused for `UNUSED`, and the oldest above `LARGEST`.

    Nothing else in the folder is touched.
    """
    now = time.time()
    kept = []
    for entry in os.scandir(folder):
        try:
            status = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                continue
            age = now - status.st_mtime
            is_kernel = _NAME.fullmatch(entry.name) is not None
            if is_kernel and age <= UNUSED:
                kept.append((status.st_mtime, status.st_size, entry.path))
            elif is_kernel or (entry.name.endswith(_UNFINISHED) and age > _ABANDONED):
                os.unlink(entry.path)
        except OSError:  # another process removed it
            continue
    total = sum(size for _, size, _ in kept)
    for _, size, path in sorted(kept):
        if total <= LARGEST:
            break
        total -= size
        try:
            os.unlink(path)
        except OSError:
            continue
