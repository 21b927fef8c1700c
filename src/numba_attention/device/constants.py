"""Small arrays that the host passes to kernels, such as the record of each sequence, cached on a GPU by their contents.

They are kept in slabs of memory that belong to no stream: a stream may be destroyed before its memory is freed, which
would then be impossible.
"""

from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..options import Array
from . import replay, runtime
from .driver import Driver, identity
from .headers import header

MOST = 2**18  # bytes up to which an array is kept, as the records of 1092 sequences; larger ones are copied every time
SLAB = 2**20
_ALIGNMENT = 256

# For each driver, by device: the slab, its size in bytes, and how many of these are used.
_slabs: WeakKeyDictionary[Driver, dict[int, tuple[Any, int, int]]] = WeakKeyDictionary()


def upload(array: Array) -> Array:
    """Copy an array to the current device, unless an array with these contents is there."""
    stream = runtime.stream()
    data = array.tobytes()
    if len(data) > MOST:
        return runtime.upload(array, stream)
    kept = _kept(data, runtime.driver, runtime.driver.current(), stream, identity(stream))
    recorder = replay.current()
    if recorder is not None:
        recorder.fix(kept)
    return kept


@lru_cache(maxsize=128)  # the one that was used last stays: a call before a capture keeps all that it uses
def _kept(data: bytes, driver: Driver, device: int, stream: int, _: Any) -> Array:
    """Return a copy for work on one stream, whose order ensures that the copy is complete."""
    replay.refuse_copy(driver.is_capturing(stream, device))
    address, slab = _room(driver, device, len(data))
    if data:
        driver.write(address, np.frombuffer(data, np.uint8), stream)
    return header(address, (len(data),), None, np.dtype(np.uint8), slab, device)


def _room(driver: Driver, device: int, size: int) -> tuple[int, Any]:
    slabs = _slabs.setdefault(driver, {})
    # The slab is taken out and put back at the end: another thread, or a reentrant call, starts a slab of its own.
    slab, whole, taken = slabs.pop(device, (None, 0, 0))
    if slab is None or taken + size > whole:
        whole = max(SLAB, size)
        slab, taken = driver.keep(whole), 0
    slabs[device] = slab, whole, -(-(taken + size) // _ALIGNMENT) * _ALIGNMENT
    return slab.address + taken, slab
