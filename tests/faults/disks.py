"""Disks and users for the process of a case: a small disk that vanishes with the process, and a user without rights."""

import ctypes
import os

from isolation import skip

NOBODY = 65534
_NEWNS, _REC, _PRIVATE = 0x00020000, 0x4000, 0x40000


def mount_small_disk(path, size):
    """Mount a disk of so many bytes, seen by this process and its children only."""
    if os.geteuid() != 0:
        skip("only root can mount a small disk")
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.unshare(_NEWNS) == 0 and libc.mount(b"none", b"/", None, _REC | _PRIVATE, None) == 0
    if not done or libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, b"size=%d" % size) != 0:
        skip(f"no disk can be mounted: {os.strerror(ctypes.get_errno())}")


def fill(path):
    """Fill the disk to the last byte."""
    size = 2**20
    with open(os.path.join(path, "filling"), "wb", buffering=0) as file:
        while size:
            try:
                file.write(b"\1" * size)
            except OSError:
                size //= 2


def become_nobody():
    """Give up the rights of root for those of a user who owns nothing."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def needs_root():
    if os.geteuid() != 0:
        skip("only root can become another user")
