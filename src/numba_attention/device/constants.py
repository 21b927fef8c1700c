"""The few numbers that the host tells kernels, such as a record for each sequence: on a device once, by their contents.

They lie in slabs that belong to no stream. A stream may be gone when what was copied on it is no longer needed, and
memory of a stream cannot be freed then.
"""

from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..options import Array
from . import replay, runtime
from .driver import Driver, identity
from .headers import header

MOST = 2**16  # bytes of one array that is kept; what is larger is copied anew in every call
SLAB = 2**18
_ALIGNMENT = 256

# Of each driver, by device: memory, its bytes, and how many are taken.
_slabs: WeakKeyDictionary[Driver, dict[int, tuple[Any, int, int]]] = WeakKeyDictionary()


def upload(array: Array) -> Array:
    """Copy an array to the current device, unless its contents are there."""
    stream = runtime.stream()
    data = array.tobytes()
    if len(data) > MOST:
        return runtime.upload(array, stream)
    made = _kept(data, runtime.driver, runtime.driver.current(), stream, identity(stream))
    recorder = replay.current()
    if recorder is not None:
        recorder.fix(made)
    return made


@lru_cache(maxsize=256)
def _kept(data: bytes, driver: Driver, device: int, stream: int, _: Any) -> Array:
    """A copy, for one stream, whose order makes sure that it is there."""
    address, slab = _room(driver, device, len(data))
    if data:
        driver.write(address, np.frombuffer(data, np.uint8), stream)
    return header(address, (len(data),), None, np.dtype(np.uint8), slab, device)


def _room(driver: Driver, device: int, size: int) -> tuple[int, Any]:
    slabs = _slabs.setdefault(driver, {})
    # Taken out, and put back at the end: another thread, or a call in the middle of this one, begins a slab of its own.
    slab, whole, taken = slabs.pop(device, (None, 0, 0))
    if slab is None or taken + size > whole:
        whole = max(SLAB, size)
        slab, taken = driver.keep(whole), 0
    slabs[device] = slab, whole, -(-(taken + size) // _ALIGNMENT) * _ALIGNMENT
    return slab.address + taken, slab
