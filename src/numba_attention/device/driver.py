"""The CUDA driver: memory, streams and launches, through the public interfaces of cuda.core and cuda.bindings.

Both packages are imported when a `Driver` is first used, not with this module. Tests replace `runtime.driver` by
another object with these methods, and so run everything but the kernels without a GPU.
"""

import ctypes
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np

from ..errors import BackendUnavailableError, NumbaAttentionWarning
from ..options import Array
from . import diagnosis
from .diagnosis import arch_of
from .launches import Launches, Machine

DEFAULT_STREAM = 1  # the legacy default stream, as CUDA Array Interface and DLPack write it
PER_THREAD_STREAM = 2  # the default stream of each thread, another one for every thread
_CHUNK = 2**23  # bytes of a staging buffer: large enough to keep the bus busy, small enough to stay pinned
_STATIC_SHARED = 48 * 1024  # bytes of shared memory that a block may have without a request
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


@dataclass(frozen=True)
class Device:
    """The properties of a GPU by which kernels are chosen."""

    ordinal: int
    compute_capability: tuple[int, int]
    arch: str  # what to compile for: "sm_80", "sm_90a"
    multiprocessors: int
    shared_memory: int  # bytes that a block can have on request
    name: str = ""


@dataclass(eq=False)
class Kernel:
    """The machine code of a kernel, and how to launch it."""

    name: str
    cubin: bytes
    threads: int
    shared: int  # bytes of dynamic shared memory
    addresses: tuple[int, ...]  # which of its integer parameters are addresses
    seed: int | None = None  # which of them is the seed of dropout
    loaded: dict[int, Any] = field(default_factory=dict, repr=False)  # loaded kernel, by device
    functions: dict[int, Any] = field(default_factory=dict, repr=False)  # by context


class Memory:
    """Memory of a device. When it is no longer referenced, it is freed in the order of its stream."""

    __slots__ = ("_buffer", "_driver", "_ordinal", "address")

    def __init__(self, buffer: Any, driver: "Driver", ordinal: int) -> None:
        self._buffer = buffer  # a buffer of cuda.core, which frees itself
        self._driver, self._ordinal = driver, ordinal
        self.address = int(buffer.handle)

    def __del__(self) -> None:
        # The order of the default stream is that of the current GPU's, where cuda.core before 1.2 frees the memory of
        # any GPU; in a thread without a GPU it would not be freed at all.
        try:
            if self._driver.of_thread() != self._ordinal:
                with self._driver.on(self._ordinal):
                    self._buffer = None
        except Exception:  # the process ends
            pass


class Slab:
    """Memory of a device that belongs to no stream. It is freed when it is not referenced and the device is done."""

    def __init__(self, driver: "Driver", address: int) -> None:
        self.address = address
        weakref.finalize(self, driver._free, address, driver.current()).atexit = False


_thread = threading.local()
_provider: Callable[[], Machine | None] | None = None
_machine: Machine | None = None


def provide(provider: Callable[[], Machine | None]) -> None:
    """Say where the machine code of repeated calls comes from."""
    global _provider
    _provider = provider


def machine() -> Machine | None:
    """Return the machine code of repeated calls, which is loaded or compiled once; None if that cannot be."""
    global _machine, _provider
    if _machine is None and _provider is not None:
        try:
            _machine = _provider()
        except RuntimeError:  # the compiler cannot run here and now: see `cpu.compiler_thread`
            return None
        except Exception as error:  # a release of Numba or LLVM that does otherwise: nothing but time depends on it
            _provider = None
            warnings.warn(
                f"the host's part of repeated calls on a GPU runs in Python, which takes twice as long: {error!r}",
                NumbaAttentionWarning,
                stacklevel=2,
            )
    return _machine


def identity(stream: int) -> Any:
    """Return what identifies a stream besides its handle, which may be the same in different threads."""
    if stream != PER_THREAD_STREAM:
        return None
    try:
        return _thread.identity
    except AttributeError:
        _thread.identity = object()  # a new object, because identifiers of threads are reused
        return _thread.identity


class Driver:
    """One process's access to its GPUs. A stream is an integer: the handle of a CUstream, 1 for the default stream."""

    def unusable(self) -> str | None:
        """Return why nothing can run here, or None."""
        return diagnosis.unusable()

    def count(self) -> int:
        """Return the number of GPUs."""
        return int(self._call(self._api.cuDeviceGetCount))

    def device(self, ordinal: int) -> Device:
        return _device(ordinal)

    def current(self) -> int:
        """Return the GPU of the calling thread, the first one if the thread has none."""
        return self.of_thread() or 0

    def of_thread(self) -> int | None:
        """Return the GPU of the calling thread, None if the thread has none."""
        # Without a context cuCtxGetDevice fails, which debuggers and compute-sanitizer report.
        error, context = self._api.cuCtxGetCurrent()
        if error or not int(context):
            return None
        error, ordinal = self._api.cuCtxGetDevice()
        return None if error else int(ordinal)

    @contextmanager
    def on(self, ordinal: int) -> Iterator[None]:
        """Make a GPU the current one of the calling thread, within a block."""
        if self.of_thread() == ordinal:
            yield
            return
        previous = self._call(self._api.cuCtxGetCurrent)
        self._core.Device(ordinal).set_current()
        try:
            yield
        finally:
            # A thread that had no current GPU keeps this one; libraries use the first GPU if there is none.
            if int(previous) or ordinal:
                self._call(self._api.cuCtxSetCurrent, previous)

    def ordinal_of(self, address: int) -> int:
        """Return the GPU that an address belongs to."""
        attribute = self._api.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        return int(self._call(self._api.cuPointerGetAttribute, attribute, address))

    def allocate(self, size: int, stream: int) -> Memory:
        """Allocate `size` bytes, more than 0, on the current GPU, in the order of a stream."""
        device = self._core.Device()
        try:
            buffer = device.memory_resource.allocate(size, stream=self._stream(stream))
        except Exception as error:
            what = f"{size:,} bytes could not be had on GPU {device.device_id}"
            if self.is_capturing(stream, int(device.device_id)):
                what += (
                    " while a CUDA graph is captured; make the same call once before, on the stream that is captured, "
                    "and without what is planned in every call, such as out="
                )
            raise _translated(error, what) from error
        return Memory(buffer, self, int(device.device_id))

    def keep(self, size: int) -> Slab:
        """Allocate `size` bytes, more than 0, on the current GPU, for work on any stream."""
        return Slab(self, int(self._call(self._api.cuMemAlloc, size)))

    def _free(self, address: int, ordinal: int) -> None:
        with self.on(ordinal):
            self._call(self._api.cuCtxSynchronize)
            self._call(self._api.cuMemFree, address)

    def clear(self, address: int, size: int, stream: int) -> None:
        """Set bytes of GPU memory to 0."""
        self._call(self._api.cuMemsetD8Async, address, 0, size, stream)

    def write(self, address: int, array: Array, stream: int) -> None:
        """Copy an array on the host, in C order, to a GPU."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        with self._staging() as staging:
            for start in range(0, data.size, _CHUNK):
                part = data[start : start + _CHUNK]
                slot = staging.next()
                slot.bytes[: part.size] = part
                self._call(self._api.cuMemcpyHtoDAsync, address + start, slot.address, part.size, stream)
                slot.used_on(stream)

    def read(self, array: Array, address: int, stream: int) -> None:
        """Copy GPU memory to a contiguous array on the host, and wait for it."""
        data = array.reshape(-1).view(np.uint8)
        with self._staging() as staging:
            for start in range(0, data.size, _CHUNK):
                part = data[start : start + _CHUNK]
                slot = staging.next()
                self._call(self._api.cuMemcpyDtoHAsync, slot.address, address + start, part.size, stream)
                self.synchronize(stream)
                part[:] = slot.bytes[: part.size]
        if not data.size:
            self.synchronize(stream)

    def wait(self, stream: int, before: int) -> None:
        """Let later work on `stream` wait for the work that is now on the stream `before`."""
        event = self._call(self._api.cuEventCreate, self._api.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        try:
            self._call(self._api.cuEventRecord, event, before)
            self._call(self._api.cuStreamWaitEvent, stream, event, 0)
        finally:
            self._call(self._api.cuEventDestroy, event)  # the driver defers this until the event has happened

    def is_capturing(self, stream: int, device: int) -> bool:
        """Whether a stream of a GPU is being captured into a CUDA graph."""
        if stream == DEFAULT_STREAM:
            return False
        error, status = self._api.cuStreamIsCapturing(stream)
        if int(error) != _NO_CONTEXT or self.of_thread() is not None:
            return bool(int(self._checked(self._api.cuStreamIsCapturing, error, status)))
        with self.on(device):  # a thread that has used no GPU so far
            return bool(int(self._call(self._api.cuStreamIsCapturing, stream)))

    def synchronize(self, stream: int) -> None:
        """Wait until all work on a stream is done."""
        self._call(self._api.cuStreamSynchronize, stream)

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], integers: Sequence[int], reals: Sequence[float], stream: int
    ) -> None:
        """Run a kernel whose parameters are int64, as many as there are integers, and then float64.

        They must be Python's own types: cuda.core passes an int as 64 bits and a float as a double, but a NumPy scalar
        by its own size.
        """
        ordinal = self.current()
        code = self._loaded(kernel, ordinal)
        config = self._core.LaunchConfig(grid=grid, block=kernel.threads, shmem_size=kernel.shared)
        try:
            self._core.launch(self._stream(stream), config, code, *integers, *reals)
        except Exception as error:
            raise _not_launched(error, kernel, ordinal) from error

    def repeat(self, own: Launches, addresses: Sequence[int], clears: int, stream: int, device: int) -> None:
        """Repeat launches on a GPU with the addresses of their arrays, and clear memory before.

        Of `own.clears`, the first so many are done. A launch takes 2 us less than by `launch`.
        """
        code = _machine
        if code is None:
            if self.of_thread() == device:
                return self._repeat(own, addresses, clears, stream)
            with self.on(device):
                return self._repeat(own, addresses, clears, stream)
        own.pack(own.addresses, 0, *addresses)
        error = code.launch(own.record_at, own.at, stream, clears) if own.record_at else code.other_context
        if error == code.other_context:
            with self.on(device):
                # The record is often that of this context, and another GPU was the current one of the thread.
                if own.record_at:
                    error = code.launch(own.record_at, own.at, stream, clears)
                if error == code.other_context:
                    self._record(own, code)
                    error = code.launch(own.record_at, own.at, stream, clears)
        if error:
            number, place = divmod(error, 1000)
            said = RuntimeError(self._name_of(number))
            if place >= len(own.launches):
                raise _translated(said, "cuMemsetD8Async failed")
            raise _not_launched(said, own.launches[place].kernel, device)

    def _repeat(self, own: Launches, addresses: Sequence[int], clears: int, stream: int) -> None:
        start = self._api.cuLaunchKernel
        context, on = int(self._api.cuCtxGetCurrent()[1]), self._api.CUstream(stream)
        for number, more, size in own.clears[:clears]:
            self.clear(addresses[number] + more, size, stream)
        own.patch(addresses)
        for x, extra in zip(own.launches, own.extras, strict=True):
            kernel = x.kernel
            function = self._function(kernel, context)
            try:
                (error,) = start(function, *x.grid, kernel.threads, 1, 1, kernel.shared, on, 0, extra)
            except ValueError as unknown:  # a number that cuda.bindings does not know
                raise _not_launched(unknown, kernel, self.current()) from unknown
            if error:
                raise _not_launched(RuntimeError(error.name), kernel, self.current())

    def _name_of(self, number: int) -> str:
        try:
            return str(self._api.CUresult(number).name)
        except ValueError as unknown:  # a newer driver has numbers that cuda.bindings does not know
            return str(unknown)

    def _record(self, own: Launches, code: Machine) -> None:
        """Make the record of launches for the current context."""
        context = int(self._call(self._api.cuCtxGetCurrent))
        launches = [
            (
                (int(self._function(x.kernel, context)), *x.grid, x.kernel.threads, x.kernel.shared,
                 numbers.buffer_info()[0], extra),
                x.patches,
            )
            for x, numbers, extra in zip(own.launches, own.numbers, own.extras, strict=True)
        ]  # fmt: skip
        own.record = code.record_of(self._functions, context, launches, own.clears)
        own.record_at = own.record.buffer_info()[0]

    @cached_property
    def _functions(self) -> tuple[int, ...]:
        """The addresses of functions of the driver that machine code calls."""
        flags = self._api.CUdriverProcAddress_flags.CU_GET_PROC_ADDRESS_DEFAULT
        names = (b"cuLaunchKernel", b"cuMemsetD8Async", b"cuCtxGetCurrent")
        return tuple(self._address_of(name, flags) for name in names)

    def _address_of(self, name: bytes, flags: Any) -> int:
        error, address, *_ = self._api.cuGetProcAddress(name, 12000, flags)
        if error or not int(address):
            raise BackendUnavailableError(f"the driver has no {name.decode()}")
        return int(address)

    def _function(self, kernel: Kernel, context: int) -> Any:
        """Return a kernel as a function of the current context, which the driver would look up in every launch."""
        function = kernel.functions.get(context)
        if function is None:
            handle = self._api.CUkernel(int(self._loaded(kernel, self.current()).handle))
            function = kernel.functions[context] = self._call(self._api.cuKernelGetFunction, handle)
        return function

    def _loaded(self, kernel: Kernel, ordinal: int) -> Any:
        code = kernel.loaded.get(ordinal)
        if code is None:
            code = kernel.loaded[ordinal] = self._load(kernel, ordinal)
        return code

    def _load(self, kernel: Kernel, ordinal: int) -> Any:
        try:
            code = self._core.ObjectCode.from_cubin(kernel.cubin).get_kernel(kernel.name)
            attributes = self._api.CUfunction_attribute
            wanted = []
            if kernel.shared > _STATIC_SHARED:
                wanted.append((attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.shared))
            if kernel.shared:  # prefer shared memory to level 1 cache, for as many blocks as registers allow
                wanted.append((attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100))
            for attribute, value in wanted:
                self._call(self._api.cuKernelSetAttribute, attribute, value, code.handle, ordinal)
        except Exception as error:
            raise _translated(error, f"kernel {kernel.name} could not be loaded on GPU {ordinal}") from error
        return code

    @cached_property
    def _core(self) -> Any:
        import cuda.core

        return cuda.core

    @cached_property
    def _api(self) -> Any:
        from cuda.bindings import driver

        driver.cuInit(0)
        return driver

    @cached_property
    def _free_staging(self) -> dict[int, list["_Staging"]]:
        return {}

    @contextmanager
    def _staging(self) -> Iterator["_Staging"]:
        """Take staging buffers of the current GPU, so that other threads and reentrant calls use others.

        They are not put back after an exception, because a copy may still be running.
        """
        ordinal = self.current()
        free = self._free_staging.setdefault(ordinal, [])
        try:
            staging = free.pop()
        except IndexError:
            staging = _Staging(self, ordinal)
        yield staging
        free.append(staging)

    @cached_property
    def _streams(self) -> dict[tuple[int, int], Any]:
        return {}

    def _stream(self, handle: int) -> Any:
        """Return the object of cuda.core for a stream of the current GPU, which takes 10 us to make."""
        key = handle, self.current()
        stream = self._streams.get(key)
        if stream is None:
            stream = self._streams[key] = self._core.Stream.from_handle(handle)
        return stream

    def _call(self, function: Any, *arguments: Any) -> Any:
        """Call a function of the driver, which returns an error code and its result; return the result."""
        try:
            error, *result = function(*arguments)
        except ValueError as unknown:  # a number that cuda.bindings does not know
            raise _translated(unknown, f"{function.__name__} failed") from unknown
        return self._checked(function, error, *result)

    def _checked(self, function: Any, error: Any, *result: Any) -> Any:
        if error:
            raise _translated(RuntimeError(error.name), f"{function.__name__} failed")
        return result[0] if result else None


class _Slot:
    """A piece of pinned memory, and the event after which the GPU does not use it."""

    def __init__(self, driver: Driver, ordinal: int) -> None:
        self._driver = driver
        api, call = driver._api, driver._call
        self.address = int(call(api.cuMemHostAlloc, _CHUNK, api.CU_MEMHOSTALLOC_PORTABLE))
        self.bytes: Array = np.frombuffer(memoryview((ctypes.c_uint8 * _CHUNK).from_address(self.address)), np.uint8)
        self._done = call(api.cuEventCreate, api.CUevent_flags.CU_EVENT_DISABLE_TIMING)

    def used_on(self, stream: int) -> None:
        self._driver._call(self._driver._api.cuEventRecord, self._done, stream)

    def free(self) -> None:
        self._driver._call(self._driver._api.cuEventSynchronize, self._done)


class _Staging:
    """Two pinned buffers of a GPU, which are used in turn."""

    def __init__(self, driver: Driver, ordinal: int) -> None:
        self._slots = [_Slot(driver, ordinal) for _ in range(2)]

    def next(self) -> _Slot:
        """Return the buffer that was used longest ago, when the GPU is done with it."""
        self._slots.reverse()
        self._slots[0].free()
        return self._slots[0]


@cache
def _device(ordinal: int) -> Device:
    import cuda.core

    gpu = cuda.core.Device(ordinal)
    major, minor = gpu.compute_capability
    return Device(
        ordinal,
        (int(major), int(minor)),
        arch_of(int(major), int(minor)),
        int(gpu.properties.multiprocessor_count),
        int(gpu.properties.max_shared_memory_per_block_optin),
        str(gpu.name),
    )


def _not_launched(error: Exception, kernel: Kernel, ordinal: int) -> Exception:
    return _translated(error, f"kernel {kernel.name} could not be launched on GPU {ordinal}")


def _translated(error: Exception, what: str) -> Exception:
    """Return a CUDA error as an exception that callers know."""
    if isinstance(error, MemoryError | BackendUnavailableError):
        return error
    # cuda.core before 1.0 does not say why an allocation fails.
    said = str(error)
    of_memory = "OUT_OF_MEMORY" in said or "Failed to allocate memory" in said
    kind = MemoryError if of_memory else BackendUnavailableError
    if "NOT_INITIALIZED" in said:
        said += "; a process that was forked after its parent had used a GPU cannot use one: start it by 'spawn'"
    return kind(f"{what}: {said}")
