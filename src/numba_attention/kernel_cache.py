"""Files of compiled kernels, for the CPU and for GPUs: one folder of the user's, one file a kernel.

Loading a kernel is running a file, and a checksum is no signature. So nothing is read from a folder or a file that
somebody else could have written, files are opened without following links, and the key of a kernel is part of what its
checksum covers: a file under another kernel's name counts as missing, as does one that is damaged.
"""

import hashlib
import os
import re
import stat
import sys
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path

from .errors import NumbaAttentionWarning

ENVIRONMENT = "NUMBA_ATTENTION_CACHE_DIR"
SUFFIXES = (".kernel", ".cubin")
_NAME = re.compile(r".*-[0-9a-f]{32}\.(kernel|cubin)")
# A version of the package has some 30 kernels of 50 KB for a CPU and some hundred of 100 KB for a GPU.
LARGEST = 256 * 2**20  # bytes that the folder is kept below
UNUSED = 90 * 86400  # seconds after which a file that nobody loaded is removed
_UNFINISHED = ".kernel-part"
_ABANDONED = 3600  # seconds after which a file that was begun and never renamed is removed
_DAY = 86400
_warned = False
_pruned = False


@cache
def directory() -> Path | None:
    """The folder of the kernel cache, or None if there is none that can be trusted: then kernels live in memory only.

    One that cannot be written to is read from all the same: an image or an administrator may have filled it.
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
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "numba-attention"


def _distrust(status: os.stat_result) -> str:
    """Why what is there may be another user's work; empty if only this user and root can have written it."""
    if not hasattr(os, "geteuid"):  # Windows: folders of a user's profile are closed to others
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
    """Where the kernel of a key is kept, under a name that people can read; None if there is no cache."""
    folder = directory()
    return folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}{suffix}" if folder else None


def read_checked(path: Path, key: str) -> bytes | None:
    """What `write_checked` wrote for this key, or None if it is not there, not whole, or may be another user's."""
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


def write_checked(path: Path, key: str, payload: bytes) -> None:
    """Write a file that other processes see whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=_UNFINISHED)
    try:
        with open(descriptor, "wb") as file:
            file.write(_checksum(key, payload) + payload)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _prune_once(path.parent)


def _checksum(key: str, payload: bytes) -> bytes:
    digest = hashlib.sha256(key.encode())
    digest.update(b"\0" + payload)
    return digest.digest()


def _open_itself(path: str, flags: int) -> int:
    """Open a regular file, but no link to one, and no pipe, at which a reader would wait for a writer."""
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(f"{path} is no regular file")


def _touch(path: Path) -> None:
    """Note that a file is in use: `prune` removes what was not for long."""
    try:
        os.utime(path)
    except OSError:  # root's, or on a read-only disk
        return


def entries() -> list[Path]:
    """The files in the cache."""
    folder = directory()
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES) if folder else []


def _prune_once(folder: Path) -> None:
    """`prune` at the first kernel that a process writes: some 20 us, beside seconds of compiling."""
    global _pruned
    if not _pruned:
        _pruned = True
        prune(folder)


def prune(folder: Path) -> None:
    """Remove what killed processes left unfinished, kernels unused for `UNUSED`, and the oldest above `LARGEST`.

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
