"""What reaches the driver: memory, copies through pinned buffers, launches; the cache of machine code; what is missing.

The driver is a fake that does everything as late as a real one may.
"""

import ast
import ctypes
import gc
import itertools
import os
import stat
import subprocess
import sys
import threading
import types
import weakref

import numpy as np
import pytest

import numba_attention as na
from device import HostDriver
from numba_attention import kernel_cache as cache
from numba_attention.cuda import kernels
from numba_attention.cuda.spec import Spec
from numba_attention.device import constants, cubins, diagnosis, driver, runtime
from numba_attention.device.headers import held


class Code(int):
    """An error code as cuda.bindings has them."""

    name = property(
        lambda self: {0: "CUDA_SUCCESS", 2: "CUDA_ERROR_OUT_OF_MEMORY"}.get(self, f"CUDA_ERROR_{int(self)}")
    )


OK = Code(0)


class FakeAPI:
    """cuda.bindings.driver, on a machine that copies only when it is waited for."""

    CU_MEMHOSTALLOC_PORTABLE = 1
    CUevent_flags = types.SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CUpointer_attribute = types.SimpleNamespace(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL=9)
    CUfunction_attribute = types.SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8, CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT=9
    )

    def __init__(self):
        self.pending = []  # copies and events, in the order of the one stream there is
        self.done = set()
        self.events = 0
        self.calls = []
        self.context = [None]
        self.pinned = []
        self.attributes = []
        self._one_at_a_time = threading.RLock()  # no event is done before what a thread took from the list before it

    def _run(self, until=None):
        with self._one_at_a_time:
            while self.pending:
                action = self.pending.pop(0)
                if isinstance(action, int):
                    self.done.add(action)
                    if action == until:
                        return
                else:
                    ctypes.memmove(*action)

    def cuMemHostAlloc(self, size, flags):
        self.pinned.append((ctypes.c_char * size)())
        return OK, ctypes.addressof(self.pinned[-1])

    def cuEventCreate(self, flags):
        self.events += 1
        return OK, self.events

    def cuEventRecord(self, event, stream):
        self.calls.append(("record", stream))
        self.done.discard(event)
        self.pending.append(event)
        return (OK,)

    def cuEventSynchronize(self, event):
        with self._one_at_a_time:
            if event in self.pending:
                self._run(event)
        return (OK,)

    def cuEventDestroy(self, event):
        return (OK,)

    def cuStreamWaitEvent(self, stream, event, flags):
        self.calls.append(("wait", stream))
        return (OK,)

    def cuStreamSynchronize(self, stream):
        self._run()
        return (OK,)

    def cuMemcpyHtoDAsync(self, address, source, size, stream):
        self.calls.append(("to", size, stream))
        self.pending.append((address, source, size))
        return (OK,)

    def cuMemcpyDtoHAsync(self, target, address, size, stream):
        self.calls.append(("from", size, stream))
        self.pending.append((target, address, size))
        return (OK,)

    def cuKernelSetAttribute(self, attribute, value, kernel, ordinal):
        self.attributes.append((attribute, value, kernel, ordinal))
        return (OK,)

    def cuCtxGetDevice(self):
        return (OK, self.context[-1]) if self.context[-1] is not None else (Code(201), None)

    def cuCtxGetCurrent(self):
        return OK, 0 if self.context[-1] is None else 100 + self.context[-1]

    def cuCtxSetCurrent(self, context):
        self.context[-1] = context - 100 if context else None
        return (OK,)

    def cuPointerGetAttribute(self, attribute, address):
        return OK, 1

    def cuDeviceGetCount(self):
        return OK, 2


class FakeCore:
    """cuda.core."""

    def __init__(self, api):
        self.api, self.loads, self.launches, self.fail = api, [], [], None
        self.Stream = types.SimpleNamespace(from_handle=lambda handle: ("stream", handle))
        self.LaunchConfig = lambda **given: given
        self.ObjectCode = types.SimpleNamespace(from_cubin=self._from_cubin)

    def Device(self, ordinal=None):
        ordinal = self.api.context[-1] if ordinal is None else ordinal

        def allocate(size, *, stream):
            if self.fail:
                raise RuntimeError(self.fail)
            memory = np.zeros(size, np.uint8)
            self.memory = weakref.ref(memory)
            return types.SimpleNamespace(handle=memory.ctypes.data, memory=memory)

        return types.SimpleNamespace(
            set_current=lambda: self.api.context.__setitem__(-1, ordinal),
            memory_resource=types.SimpleNamespace(allocate=allocate),
            device_id=ordinal,
        )

    def _from_cubin(self, cubin):
        self.loads.append(cubin)
        if cubin == b"broken":
            raise RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU")
        return types.SimpleNamespace(get_kernel=lambda name: types.SimpleNamespace(handle=(name, cubin)))

    def launch(self, stream, config, kernel, *arguments):
        if self.fail:
            raise RuntimeError(self.fail)
        self.launches.append((stream, config, kernel.handle, arguments))


@pytest.fixture
def real(monkeypatch):
    """The driver of the package, on the fakes, as that of the process."""
    found = driver.Driver()
    found.__dict__["_api"] = FakeAPI()
    found.__dict__["_core"] = FakeCore(found._api)
    monkeypatch.setattr(runtime, "driver", found)
    return found


def kernel(shared=0, name="k", cubin=b"code"):
    return runtime.Kernel(name, cubin, 128, shared, ())


def test_launch(real):
    k = kernel()
    with real.on(1):
        runtime.launch(k, (3, 2, 1), [np.int32(5), 2**62, True], [np.float32(0.5), 2], 7)
        runtime.launch(k, (1, 1, 1), [], [], 1)
    (stream, config, handle, arguments), second = real._core.launches
    assert stream == ("stream", 7)
    assert config == {"grid": (3, 2, 1), "block": 128, "shmem_size": 0}
    assert handle == ("k", b"code")
    assert arguments == (5, 2**62, 1, 0.5, 2.0)
    assert [type(x) for x in arguments] == [int, int, int, float, float]
    assert second[3] == ()
    assert real._core.loads == [b"code"]
    assert not real._api.attributes


def test_kernels_are_loaded_once_for_each_device(real):
    k = kernel(shared=80_000)
    for ordinal in (0, 1, 0, 1):
        with real.on(ordinal):
            runtime.launch(k, (1, 1, 1), [], [], 1)
    assert len(real._core.loads) == 2
    assert real._api.attributes == [
        (attribute, value, ("k", b"code"), ordinal)
        for ordinal in (0, 1)
        for attribute, value in ((8, 80_000), (9, 100))
    ]


@pytest.mark.parametrize(("shared", "asks"), [(48 * 1024, False), (48 * 1024 + 1, True)])
def test_shared_memory_is_asked_for_where_it_must_be(real, shared, asks):
    with real.on(0):
        runtime.launch(kernel(shared), (1, 1, 1), [], [], 1)
    assert [attribute for attribute, *_ in real._api.attributes] == ([8, 9] if asks else [9])


def test_errors_of_the_driver(real):
    with real.on(0):
        with pytest.raises(
            na.BackendUnavailableError, match="kernel k could not be loaded on GPU 0: CUDA_ERROR_NO_BIN"
        ):
            runtime.launch(kernel(cubin=b"broken"), (1, 1, 1), [], [], 1)
        real._core.fail = "CUDA_ERROR_ILLEGAL_ADDRESS: bad"
        with pytest.raises(na.BackendUnavailableError, match="kernel k could not be launched on GPU 0: CUDA_ERROR_ILL"):
            runtime.launch(kernel(), (1, 1, 1), [], [], 1)
        real._core.fail = "CUDA_ERROR_OUT_OF_MEMORY: no"
        with pytest.raises(MemoryError, match="4,000,000 bytes could not be had on GPU 0"):
            runtime.empty((1000, 1000), np.float32, 1)
    real._api.cuStreamSynchronize = lambda stream: (Code(700),)
    with pytest.raises(na.BackendUnavailableError, match="failed: CUDA_ERROR_700"):
        real.synchronize(1)


def test_empty(real):
    with real.on(1):
        x = runtime.empty((2, 3), np.float32, 1)
        assert (x.shape, x.dtype, held(x).device) == ((2, 3), np.float32, 1)
        part = x[1:].T
        del x
        gc.collect()
        assert real._core.memory() is not None
        del part
        gc.collect()
        assert real._core.memory() is None
        assert runtime.empty(0, np.int8, 1).size == runtime.empty((3, 0), np.int8, 1).size == 0
        assert runtime.empty(7, np.int64, 1).shape == (7,)


SHAPES = {
    "small": np.arange(12.0).reshape(3, 4),
    "transposed": np.arange(12.0).reshape(3, 4).T,
    "reversed": np.arange(30)[::-3],
    "broadcast": np.broadcast_to(np.arange(4.0)[:, None], (2, 4, 5)),
    "scalar": np.array(3.5),
    "bool": np.array([True, False]),
    "empty": np.empty((0, 3)),
    "larger than the buffers": np.arange(driver._CHUNK // 2, dtype=np.int64),  # four chunks in two buffers
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("which", ["real", "stand-in"])
def test_there_and_back(name, which, request, monkeypatch):
    if which == "real":
        request.getfixturevalue("real")
    else:
        monkeypatch.setattr(runtime, "driver", HostDriver())
    array = SHAPES[name]
    with runtime.using(0, 1):
        there = runtime.upload(array, 1)
        assert there.shape == array.shape
        out = np.empty(array.shape, array.dtype)
        runtime.download(there, out, 1)
        np.testing.assert_array_equal(out, array)
        wide = np.zeros((2, *array.shape), array.dtype)
        runtime.download(np.broadcast_to(there, wide.shape), wide, 1)
        np.testing.assert_array_equal(wide, np.broadcast_to(array, wide.shape))
        if array.ndim:
            where = (slice(None, None, -1), ..., *([slice(1, None, 2)] if array.ndim > 1 else []))
            apart = np.zeros((*array[where].shape, 2), array.dtype)[..., 0]
            runtime.download(there[where], apart, 1)
            np.testing.assert_array_equal(apart, array[where])


def test_pinned_buffers_are_not_written_before_they_are_read(real):
    """Many copies, none of which the device has done when the next is asked for."""
    arrays = [np.full(1000, n) for n in range(20)]
    with runtime.using(0, 1):
        there = [runtime.upload(x, 1) for x in arrays]
        real._api._run()
        for header, x in zip(there, arrays, strict=True):
            np.testing.assert_array_equal(header, x)  # the fake's memory is the host's
    assert len(real._api.pinned) == 2


def test_pinned_buffers_are_of_one_thread_at_a_time(real):
    with runtime.using(0, 1):
        there = [runtime.empty(100_000, np.int64, 1) for _ in range(8)]

    def work(n):
        for _ in range(5):
            real.write(there[n].ctypes.data, np.full(100_000, n), 1)

    real._api.context = [0]
    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real._api._run()
    for n in range(8):
        assert (there[n] == n).all()


def calling_between_lines(function, inner):
    """A trace function that stands for a signal handler: it calls `inner` between any two lines of a function."""
    busy = False

    def trace(frame, event, argument):
        nonlocal busy
        if frame.f_code is not function.__code__:
            return None
        if event == "line" and not busy:
            busy = True
            inner()
            busy = False
        return trace

    return trace


def test_copies_in_the_middle_of_a_copy(real, monkeypatch):
    monkeypatch.setattr(driver, "_CHUNK", 800)
    with runtime.using(0, 1):
        outer, other = (runtime.empty(1000, np.int64, 1) for _ in range(2))
    data, more = np.arange(1000), np.arange(5000, 6000)
    sys.settrace(calling_between_lines(driver.Driver.write, lambda: real.write(other.ctypes.data, more, 1)))
    try:
        real.write(outer.ctypes.data, data, 1)
    finally:
        sys.settrace(None)
    real._api._run()
    np.testing.assert_array_equal(outer, data)
    np.testing.assert_array_equal(other, more)
    back = np.empty(1000, np.int64)
    sys.settrace(calling_between_lines(driver.Driver.read, lambda: real.write(other.ctypes.data, more, 1)))
    try:
        real.read(back, outer.ctypes.data, 1)
    finally:
        sys.settrace(None)
    np.testing.assert_array_equal(back, data)


def test_room_for_numbers_in_the_middle_of_another(device, monkeypatch):
    constants._kept.cache_clear()
    rooms = []
    trace = calling_between_lines(constants._room, lambda: rooms.append(constants._room(device, 0, 300)))
    with runtime.using(0, 1):
        constants._room(device, 0, 300)
        sys.settrace(trace)
        try:
            rooms += [constants._room(device, 0, 300), constants._room(device, 0, 300)]
        finally:
            sys.settrace(None)
    starts = sorted(address for address, _ in rooms)
    assert all(b - a >= 300 for a, b in itertools.pairwise(starts))


def test_download_says_what_does_not_fit(device):
    there = runtime.upload(np.ones(3), 1)
    for out in (np.ones(4), np.ones(3, np.float32)):
        with pytest.raises(ValueError, match="cannot copy"):
            runtime.download(there, out, 1)


def test_few_numbers_are_copied_once(device, monkeypatch):
    """By contents, for each stream; their memory belongs to no stream, and is freed when nobody needs it."""
    constants._kept.cache_clear()
    monkeypatch.setattr(constants, "SLAB", 1024)
    numbers = [np.full(60, n) for n in range(4)]  # two of which fit in a slab
    with runtime.using(0, 1):
        made = [constants.upload(x) for x in (*numbers, *numbers)]
        with runtime.using(0, 9):
            other = constants.upload(numbers[0])
        large = constants.upload(np.zeros(constants.MOST + 1, np.uint8))
    assert [a is b for a, b in zip(made[:4], made[4:], strict=True)] == [True] * 4
    assert other is not made[0]
    for x, there in zip((*numbers, numbers[0]), (*made[:4], other), strict=True):
        np.testing.assert_array_equal(there.view(np.int64), x)
    slabs = {held(x).owner.address for x in (*made, other)}
    assert len(slabs) == 3
    assert device.memory_at(held(large).owner.address).stream == 1
    del made, there, other
    constants._kept.cache_clear()
    gc.collect()
    assert {address for address, stream in device.frees if stream is None} < slabs
    constants._slabs.clear()
    gc.collect()
    assert {address for address, stream in device.frees if stream is None} == slabs


def test_a_thread_without_a_gpu_keeps_the_first_at_most(real):
    for ordinal, after in ((1, None), (0, 0)):
        real._api.context = [None]
        with real.on(ordinal):
            assert real.current() == ordinal
        assert real._api.context == [after]


def test_devices(real, device):
    with real.on(0):
        assert real.current() == 0
        with real.on(1):
            assert real.current() == 1
            with real.on(1):
                assert real.current() == 1
        assert real.current() == 0
    assert real.count() == 2
    assert real.ordinal_of(123) == 1
    assert [driver.arch_of(*cc) for cc in ((7, 0), (8, 6), (9, 0), (10, 0), (12, 1))] == [
        "sm_70", "sm_86", "sm_90a", "sm_100", "sm_121",
    ]  # fmt: skip
    with runtime.using(1, 5):
        x = runtime.empty(3, np.int8, 5)
        assert runtime.stream() == 5
        assert runtime.current_device().ordinal == 1
    assert runtime.stream() == 1
    assert runtime.device_of(x[1:]) == device.device(1)
    with pytest.raises(TypeError, match="memory of the host"):
        runtime.device_of(np.ones(3))


def test_wait(real):
    real.wait(5, 9)
    assert real._api.calls == [("record", 9), ("wait", 5)]


def test_launch_of_the_stand_in(monkeypatch):
    """What stands for a GPU hands launches to the function of a test."""
    seen = []
    stand_in = HostDriver(run=lambda k, grid, integers, reals: seen.append((k.name, grid, integers, reals)))
    monkeypatch.setattr(runtime, "driver", stand_in)
    runtime.launch(kernel(), (4, 1, 1), [1, 2], [0.5], 3)
    assert seen == [("k", (4, 1, 1), [1, 2], [0.5])]
    assert stand_in.launches[0][1:] == (0, (4, 1, 1), (1, 2), (0.5,), 3)


# Machine code on disk.


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cubins, "_made", {})
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path))
    found = cache.directory
    found.cache_clear()
    yield tmp_path
    found.cache_clear()


def never():
    raise AssertionError("made again")


def forget():
    cubins._made.clear()


def files(folder):
    return sorted(folder.glob("*.cubin"))


def test_cubins_are_made_once(folder):
    assert runtime.cubin("forward sm_90a f16/D=64", lambda: b"code") == b"code"
    assert runtime.cubin("forward sm_90a f16/D=64", never) == b"code"
    (file,) = files(folder)
    assert file.name.startswith("forward-sm_90a-f16-D-64-")
    forget()
    assert runtime.cubin("forward sm_90a f16/D=64", never) == b"code"
    assert runtime.cubin("forward sm_80 f16/D=64", lambda: b"other") == b"other"
    assert len(files(folder)) == 2
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    "damage", [lambda x: b"", lambda x: x[:-1], lambda x: x[:40] + b"?" + x[41:], lambda x: b"x" * 9]
)
def test_damaged_cubins_are_made_again(folder, damage):
    runtime.cubin("key", lambda: b"0123456789")
    (file,) = files(folder)
    file.write_bytes(damage(file.read_bytes()))
    forget()
    assert runtime.cubin("key", lambda: b"again") == b"again"
    forget()
    assert runtime.cubin("key", never) == b"again"


def test_cubins_of_other_versions_are_not_found(folder, monkeypatch):
    runtime.cubin("key", lambda: b"old")
    forget()
    monkeypatch.setattr(cubins, "_version", lambda name: "0.1" if name == "numba-cuda" else None)
    cubins.environment.cache_clear()
    try:
        assert runtime.cubin("key", lambda: b"new") == b"new"
    finally:
        monkeypatch.undo()
        cubins.environment.cache_clear()


def test_cubins_of_these_versions_are_known_by_name(folder, monkeypatch):
    """What other sources or compilers made does not run here, and so nothing is there."""
    assert not cubins.are_kept()
    path, _ = cubins.place("key")
    runtime.cubin("key", lambda: b"code")
    assert files(folder) == [path]
    assert cubins.are_kept()
    monkeypatch.setattr(cubins, "environment", lambda: "0" * 64)
    assert not cubins.are_kept()
    (folder / "forward-00000000-1.kernel").write_bytes(b"of a CPU")
    assert not cubins.are_kept()


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    folder = tmp_path / "shipped"
    folder.mkdir(mode=0o755)
    monkeypatch.setenv(cache.SHIPPED, str(folder))
    cubins.folders.cache_clear()
    yield folder
    cubins.folders.cache_clear()


def test_shipped_kernels_are_found_before_compiling(folder, shipped, monkeypatch):
    """By name and sources, whatever the compilers here; nothing is written to the folder, nor copied to the cache."""
    c = Spec("combine", "float32", 64, 64, arch="sm_90a")
    path = cubins.ship(shipped, c.name, lambda: b"\0.text.combined\0", kernels.sources(c))
    assert cubins.ship(shipped, c.name, never, kernels.sources(c)) == path, "it is there already"
    assert path.name.startswith("sm_90a-combine-float32")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    shipped.chmod(0o555)
    monkeypatch.setattr(kernels, "compile_", never)
    monkeypatch.setattr(cubins, "environment", lambda: "other compilers")
    kernels.compiled.cache_clear()
    assert kernels.compiled(c).name == "combined"
    assert not files(folder)
    assert files(shipped) == [path]
    forget()
    with pytest.raises(AssertionError, match="made again"):
        cubins.cubin(c.name, never, lambda: "other sources")
    kernels.compiled.cache_clear()


def test_shipped_kernels_for_another_gpu_do_not_help(folder, shipped):
    assert not cubins.are_kept(["sm_90a"])
    cubins.ship(shipped, "combine-sm_80", lambda: b"code", "")
    assert cubins.are_kept(["sm_86", "sm_80"])
    assert not cubins.are_kept(["sm_90a"])
    assert not cubins.are_kept(["sm_8"])
    assert not cubins.are_kept()


def test_a_gpu_with_shipped_kernels_is_usable_without_a_compiler(machine, shipped, folder, monkeypatch):
    kept = cubins.are_kept
    cubins.ship(shipped, "combine-sm_80", lambda: b"code", "")
    for capability, usable in (((8, 0), True), ((9, 0), False)):
        reasons = []
        machine(Installed(devices=(capability,)), libraries=())
        monkeypatch.setattr(cubins, "are_kept", kept)
        diagnosis.unusable.cache_clear()
        reasons.append(diagnosis.unusable())
        assert (reasons == [None]) is usable
        assert usable or "nvvm and nvJitLink were not found" in reasons[0]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners of files")
def test_shipped_kernels_that_others_may_write_are_not_loaded(folder, shipped, monkeypatch):
    path = cubins.ship(shipped, "key sm_80", lambda: b"code", "")
    path.chmod(0o666)
    monkeypatch.setattr(cache, "_warned", False)
    with pytest.warns(na.NumbaAttentionWarning, match="can be written by others"):
        assert cubins.cubin("key sm_80", lambda: b"own") == b"own"


def test_sources_of_a_kernel_are_what_it_imports():
    """As Python's own parser reads the imports; other kernels are not among them."""

    def imports(path):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = path.parents[node.level - 1]
                names = [node.module] if node.module else [alias.name for alias in node.names]
                yield from (folder / f"{name.replace('.', '/')}.py" for name in names)

    known = set(cubins.sources())
    for path in sorted(known):
        if path.parent.name == "cuda":
            want = {path}
            while more := {x for file in want for x in imports(file)} & known - want:
                want |= more
            assert cubins.imported([path.stem]) == sorted(want)
    names = {path.stem for path in cubins.imported(["forward", "toolchain"])}
    assert {"forward", "emit", "tiles", "scoring", "toolchain", "sequence_record", "intervals"} <= names
    assert not {"backward", "bias", "combine", "kernels", "tile_shapes"} & names


def test_a_machine_without_a_compiler_runs_what_is_in_the_cache(folder, machine, monkeypatch):
    """And says which kernel is not there."""
    pytest.importorskip("numba_cuda")
    from numba_attention.cuda import toolchain

    here, other = (Spec("combine", "float32", E, E, arch="sm_90a") for E in (64, 128))
    runtime.cubin(here.name, lambda: b"\0.text.combined\0")
    kept = cubins.are_kept()
    assert machine(Installed(), libraries=(), kernels=kept) is None
    monkeypatch.setattr(toolchain, "compile_kernel", never)
    forget()
    kernels.compiled.cache_clear()
    assert kernels.compiled(here).name == "combined"
    words = f"{other.name} is not in the kernel cache, nor among shipped kernels, and .* nvvm and nvJitLink"
    with pytest.raises(na.BackendUnavailableError, match=words):
        kernels.compiled(other)


def test_cubins_without_a_folder(folder, monkeypatch):
    monkeypatch.setattr(cubins, "path_of", lambda *key: None)
    assert runtime.cubin("key", lambda: b"code") == b"code"
    assert runtime.cubin("key", never) == b"code"


def test_cubins_where_nothing_can_be_written(folder, monkeypatch):
    def full(path, key, payload):
        raise OSError("no space")

    monkeypatch.setattr(cubins, "write_checked", full)
    monkeypatch.setattr(cache, "_warned", False)
    with pytest.warns(
        na.NumbaAttentionWarning if hasattr(na, "NumbaAttentionWarning") else UserWarning, match="no space"
    ):
        assert runtime.cubin("key", lambda: b"code") == b"code"


def test_a_cubin_that_cannot_be_made_is_tried_again(folder):
    def fail():
        raise KeyError("compiler")

    with pytest.raises(KeyError):
        runtime.cubin("key", fail)
    assert runtime.cubin("key", lambda: b"code") == b"code"


def test_threads_make_a_cubin_once(folder):
    made = []

    def make():
        made.append(1)
        return b"code"

    threads = [threading.Thread(target=runtime.cubin, args=("key", make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]


# What is missing.


class Installed:
    """The driver's side of a machine."""

    CUdevice_attribute = types.SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=0, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=1
    )

    def __init__(self, start=0, version=13000, devices=((9, 0),)):
        self.start, self.version, self.devices = start, version, devices

    def cuInit(self, flags):
        return (Code(self.start),)

    def cuDriverGetVersion(self):
        return OK, self.version

    def cuDeviceGetCount(self):
        return OK, len(self.devices)

    def cuDeviceGet(self, ordinal):
        return OK, ordinal

    def cuDeviceGetAttribute(self, attribute, device):
        return OK, self.devices[device][attribute]


@pytest.fixture
def machine(monkeypatch):
    """A function that installs things and asks what is wrong."""

    def ask(installed=None, modules=True, libraries=True, toolkit=13, versions=None, kernels=False):
        monkeypatch.setattr(cubins, "are_kept", lambda archs: kernels)
        monkeypatch.setattr(diagnosis, "_version", (versions or {}).get)
        monkeypatch.setattr(diagnosis, "_has", lambda module: modules is True or module in modules)
        monkeypatch.setattr(diagnosis, "_loads", lambda library: libraries is True or library in libraries)
        monkeypatch.setattr(diagnosis, "toolkit_major", lambda: toolkit)

        def api():
            if installed is None:
                raise RuntimeError("libcuda.so.1: cannot open shared object file")
            return installed

        monkeypatch.setattr(diagnosis, "api", api)
        diagnosis.unusable.cache_clear()
        return diagnosis.unusable()

    yield ask
    diagnosis.unusable.cache_clear()


def test_nothing_is_missing(machine):
    assert machine(Installed()) is None
    assert machine(Installed(devices=((6, 1), (8, 0)))) is None
    assert machine(Installed(version=12080), toolkit=12) is None
    assert machine(Installed(version=12080, devices=((7, 0),)), toolkit=12) is None
    assert (
        machine(Installed(), versions={"numba-cuda": "0.30.4", "cuda-core": "1.2.2", "cuda-bindings": "13.5"}) is None
    )
    assert machine(Installed(version=13000), toolkit=12) is None
    assert machine(Installed(), libraries=(), kernels=True) is None  # what is in the cache needs no compiler


REASONS = {
    "packages": ({"modules": ()}, ["numba-cuda and cuda-core", "not installed", "-attention[cuda13]", "[cuda12]"]),
    "one package": ({"modules": ("cuda.core", "cuda.bindings")}, ["numba-cuda is not installed"]),
    "old package": (
        {"versions": {"numba-cuda": "0.22.2", "cuda-core": "1.0.1"}},
        ["numba-cuda 0.22.2 is too old", "0.24 or newer", "-attention[cuda13]"],
    ),
    "driver": ({}, ["no NVIDIA driver library"]),
    "no device": ({"installed": Installed(start=100)}, ["finds no GPU", "CUDA_VISIBLE_DEVICES"]),
    "hidden devices": ({"installed": Installed(devices=())}, ["finds no GPU"]),
    "driver that fails": ({"installed": Installed(start=803)}, ["does not start", "CUDA_ERROR_803"]),
    "old driver": (
        {"installed": Installed(version=12040)},
        ["too old", "CUDA 12.4", "for 13", "update the driver", "numba-attention[cuda12]"],
    ),
    "old device": ({"installed": Installed(devices=((6, 1),))}, ["compute capability 6.1", "7.0"]),
    "device that CUDA 13 does not know": (
        {"installed": Installed(devices=((7, 0),))},
        ["compute capability 7.0", "CUDA 13 does not compile", "numba-attention[cuda12]"],
    ),
    "compiler": ({"installed": Installed(), "libraries": ("nvvm",)}, ["nvJitLink", "not found", "-attention[cuda13]"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_what_is_missing_is_said(machine, name):
    given, words = REASONS[name]
    reason = machine(**given)
    assert all(word in reason for word in words), reason


def test_reasons_differ(machine):
    reasons = [machine(**given) for given, _ in REASONS.values()]
    assert len(set(reasons)) == len(reasons) - 1  # no device, and all of them hidden, are one


def test_asking_never_raises(machine):
    class Broken(Installed):
        def cuDeviceGetCount(self):
            raise KeyError("what?")

    assert "KeyError" in machine(Broken())


def test_the_reason_is_told(machine, monkeypatch):
    backends = sys.modules["numba_attention.backends"]
    monkeypatch.setattr(backends, "_usable", {})
    reason = machine(Installed(version=11080))
    assert na.backends()["cuda"] == (False, reason)
    x = np.ones((2, 3), np.float32)
    with pytest.raises(na.BackendUnavailableError, match="too old"):
        na.attention(x, x, x, backend="cuda")


def test_unusable_is_quick():
    """Asked at every `na.backends()`."""
    import time

    runtime.unusable()
    start = time.perf_counter()
    for _ in range(100):
        runtime.unusable()
    assert time.perf_counter() - start < 0.1


def test_this_machine():
    reason = runtime.unusable()
    assert reason is None or len(reason) > 20


def test_a_kernels_configuration_travels_to_other_processes():
    """Where strings have other hashes: what was pickled is found in a dictionary there."""
    code = (
        "import pickle, sys; from numba_attention.cuda.spec import Spec; c = Spec('forward', 'float32', 64, 64);"
        "hash(c); c.compute; sent = pickle.loads(bytes.fromhex(sys.argv[1])) if sys.argv[1:] else c;"
        "print({c: 'found'}.get(sent)); print(pickle.dumps(c).hex())"
    )
    sent = []
    for seed in "12":
        done = subprocess.run(
            [sys.executable, "-c", code, *sent], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        found, pickled = done.stdout.split()
        assert found == "found"
        sent = [pickled]
