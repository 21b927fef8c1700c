"""The device as the rest of the package uses it: memory, streams and launches of the present call.

Everything goes through `driver`, which tests replace by their own.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..options import Array
from . import replay
from .cubins import cubin
from .diagnosis import arch_of
from .driver import DEFAULT_STREAM, Device, Driver, Kernel
from .headers import address_of, extent, header, held, stored

driver: Driver = Driver()
_stream: ContextVar[int] = ContextVar("numba_attention_stream", default=DEFAULT_STREAM)


def unusable() -> str | None:
    """Return why nothing can run on a GPU here, or None. It is quick and raises nothing."""
    return driver.unusable()


def stream() -> int:
    """Return the stream of the present call."""
    return _stream.get()


@contextmanager
def using(device: int, stream: int) -> Iterator[None]:
    """Run a block on a device and a stream.

    Nobody records it: a signal handler may make a call while another one is recorded.
    """
    token = _stream.set(stream)
    try:
        with driver.on(device), replay.nobody():
            yield
    finally:
        _stream.reset(token)


def current_device() -> Device:
    """Return the device of the present call."""
    return driver.device(driver.current())


def device_of(array: Array) -> Device:
    """Return the device of the memory that a header describes."""
    base = held(array)
    if base is None:
        raise TypeError("this array is in memory of the host, and has no device")
    return driver.device(base.device)


def empty(
    shape: int | tuple[int, ...], dtype: Any, stream: int, cleared: int = 0, lasting: bool = False
) -> Array:  # fmt: skip
    """Allocate memory on the current device, to be freed in the order of `stream`; return its header.

    The first `cleared` bytes are set to 0; `lasting` are those that a repeated call need not clear (`replay.Made`).
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    dtype = np.dtype(dtype)
    size = dtype.itemsize
    for n in shape:
        size *= n
    if not size:
        return header(0, shape, None, dtype, None, driver.current())
    memory = driver.allocate(size, stream)
    if cleared:
        driver.clear(memory.address, cleared, stream)
    array = header(memory.address, shape, None, dtype, memory, driver.current())
    recorder = replay.current()
    if recorder is not None:
        recorder.make(array, is_result=False, cleared=cleared, lasting=lasting)
    return array


def is_capturing(stream: int) -> bool:
    """Whether a stream of the current device is being captured into a CUDA graph."""
    return driver.is_capturing(stream, driver.current())


def clear(array: Array, stream: int) -> None:
    """Set a contiguous array, a result of the call, to 0: a recorded call repeats that for scratch memory only."""
    recorder = replay.current()
    if recorder is not None:
        recorder.give_up()
    if array.size:
        driver.clear(address_of(array), array.nbytes, stream)


def upload(array: Array, stream: int) -> Array:
    """Copy an array on the host to the device. Of an axis with stride 0, one element is copied."""
    replay.refuse_copy(is_capturing(stream))
    recorder = replay.current()
    if recorder is not None:
        recorder.give_up()
    once = stored(array)
    copy = empty(once.shape, once.dtype, stream)
    if once.size:
        driver.write(address_of(copy), once, stream)
    return copy if copy.shape == array.shape else np.broadcast_to(copy, array.shape)


def upload_table(table: Array, addresses: Iterable[int], stream: int) -> Array:
    """Copy a table of int64 to the device, of which the elements with these flat indices are addresses of the call."""
    replay.refuse_table(is_capturing(stream))
    copy = empty(table.shape, np.int64, stream)
    driver.write(address_of(copy), table, stream)
    recorder = replay.current()
    if recorder is not None:
        recorder.table(copy, table.ravel().tolist(), addresses)
    return copy


def download(array: Array, out: Array, stream: int) -> None:
    """Copy the memory of a header to an array on the host, of its shape and dtype, and wait for it."""
    if array.shape != out.shape or array.dtype != out.dtype:
        raise ValueError(f"cannot copy {array.dtype} of shape {array.shape} to {out.dtype} of shape {out.shape}")
    once = stored(array)
    if not once.size:
        return
    if once.flags.c_contiguous and out.flags.c_contiguous and once.shape == out.shape:
        driver.read(out, address_of(once), stream)
        return
    # One copy takes all bytes from the first element to the last, also those between elements.
    start, stop = extent(once)
    data = np.empty(stop - start, np.uint8)
    driver.read(data, address_of(once) + start, stream)
    first = np.ndarray((), once.dtype, data, -start)
    out[...] = as_strided(first, once.shape, once.strides)


def launch(
    kernel: Kernel, grid: tuple[int, int, int], integers: Sequence[int], reals: Sequence[float], stream: int
) -> None:
    """Run a kernel on the current device: its parameters are the integers as int64, then the reals as float64."""
    integers, reals = list(map(int, integers)), list(map(float, reals))
    recorder = replay.current()
    if recorder is not None:
        recorder.launch(kernel, grid, integers, reals)
    driver.launch(kernel, grid, integers, reals, stream)


__all__ = [
    "DEFAULT_STREAM",
    "Device",
    "Driver",
    "Kernel",
    "arch_of",
    "clear",
    "cubin",
    "current_device",
    "device_of",
    "download",
    "driver",
    "empty",
    "is_capturing",
    "launch",
    "stream",
    "unusable",
    "upload",
    "upload_table",
    "using",
]
