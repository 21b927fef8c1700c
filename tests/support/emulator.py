"""Runs CUDA kernels without a GPU: the very functions that the compiler gets, on NumPy arrays of one element a thread.

A kernel's factory takes a target. `toolchain.Intrinsics` makes machine code of its macros; an `Emulator` runs them at
once, block after block. Asynchronous copies land as late as the program allows, or at once; shared memory starts as
NaN; every address is checked, and so is who wrote what another thread reads, or overwrites, without a barrier
between. What it cannot see: errors of the compiler, and speed.
"""

from __future__ import annotations

import types
from contextlib import contextmanager

import numpy as np

from device import HostDriver
from emulator_roles import WarpgroupEmit, run_block
from numba_attention.cuda import kernels
from numba_attention.cuda.emit import Packed, kinds_of
from numba_attention.device import constants, runtime
from numba_attention.device.driver import Kernel

DTYPES = {"i": np.int32, "l": np.int64, "f": np.float32, "d": np.float64, "p": np.bool_}
SIZES = {"i": 4, "l": 8, "f": 4, "d": 8, "h": 2, "b": 1}
TINY = np.float32(2.0**-126)


class Value:
    """A register of every thread, with the operators of `emit.Value`."""

    __slots__ = ("kind", "x")

    def __init__(self, kind, x):
        self.kind, self.x = kind, np.asarray(x, DTYPES[kind])

    def _other(self, other):
        if isinstance(other, Value):
            if other.kind != self.kind:
                raise TypeError(f"{self.kind} and {other.kind} do not mix")
            return other.x
        return DTYPES[self.kind](other)

    def _made(self, x):
        return Value(self.kind, x)

    def _unsigned(self, operation, other):
        unsigned = np.uint32 if self.kind == "i" else np.uint64
        a, b = self.x.astype(unsigned), np.asarray(self._other(other)).astype(unsigned)
        return self._made(operation(a, b).astype(DTYPES[self.kind]))

    def __add__(self, other):
        return self._made(self.x + self._other(other))

    def __sub__(self, other):
        return self._made(self.x - self._other(other))

    def __rsub__(self, other):
        return self._made(self._other(other) - self.x)

    def __mul__(self, other):
        return self._made(self.x * self._other(other))

    def __truediv__(self, other):
        return self._made(self.x / self._other(other))

    def __floordiv__(self, other):
        self._no_sign(other)
        return self._unsigned(lambda a, b: a // np.maximum(b, 1), other)  # (GPUs do not stop at a division by 0)

    def __mod__(self, other):
        self._no_sign(other)
        return self._unsigned(lambda a, b: a % np.maximum(b, 1), other)

    def _no_sign(self, other):
        for x in (self.x, self._other(other)):
            assert np.all(x >= 0), "divided as if it had no sign, and it has one"

    def __and__(self, other):
        return self._made(self.x & self._other(other))

    def __or__(self, other):
        return self._made(self.x | self._other(other))

    def __xor__(self, other):
        return self._made(self.x ^ self._other(other))

    def __rshift__(self, other):
        return self._unsigned(lambda a, b: a >> b, other)

    def __lshift__(self, other):
        return self._made(self.x << self._other(other))

    def __lt__(self, other):
        return Value("p", self.x < self._other(other))

    def __le__(self, other):
        return Value("p", self.x <= self._other(other))

    def __gt__(self, other):
        return Value("p", self.x > self._other(other))

    def __ge__(self, other):
        return Value("p", self.x >= self._other(other))

    def equals(self, other):
        return Value("p", self.x == self._other(other))

    __radd__, __rmul__ = __add__, __mul__


def round_half(dtype, x):
    """The 16 bits of float32 numbers (f16: of float64 too), to the nearest, ties to even."""
    x = np.ascontiguousarray(x)
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).view(np.uint16).astype(np.uint32)
    assert x.dtype == np.float32
    bits = x.view(np.uint32)
    return np.where(np.isnan(x), np.uint32(0x7FC0), (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16)


class Emit(WarpgroupEmit):
    """The methods of `emit.Emit`, for all threads of a block, or of a warpgroup, at once."""

    def __init__(self, emulator, threads):
        self._memory, self._shared, self.n = emulator.memory, emulator.block_memory, threads

    def _all(self, value):
        x = value.x
        return x if x.shape == (self.n,) else np.broadcast_to(x, (self.n,))  # (broadcasting all: 10 % of the time)

    def _where(self, where):
        return np.ones(self.n, bool) if where is None else self._all(where)

    def _words(self, value):
        return np.ascontiguousarray(self._all(value)).view(np.uint32)

    # Numbers.

    def const(self, kind, x):
        return Value(kind, np.asarray(x).astype(DTYPES[kind]))

    def select(self, condition, a, b):
        assert a.kind == b.kind
        return Value(a.kind, np.where(condition.x, a.x, b.x))

    def min(self, a, b):
        other = a._other(b)
        return Value(a.kind, np.where(a.x < other, a.x, other))

    def max(self, a, b):
        other = a._other(b)
        if a.kind in "il":
            return Value(a.kind, np.maximum(a.x, other))
        zeros = (a.x == 0) & (other == 0)  # of which the one without a sign is the larger
        return Value(a.kind, np.where(zeros, a.x + other, np.fmax(a.x, other)))

    def at_most(self, x, limit, native):
        return Value(x.kind, np.minimum(x.x, DTYPES[x.kind](limit)))

    def wide(self, x):
        assert x.kind == "i"
        return Value("l", x.x.astype(np.int64))

    def narrow(self, x):
        assert x.kind == "l"
        return Value("i", x.x.astype(np.int32))

    def convert(self, kind, x):
        if kind == "i" and x.kind in "fd":
            whole = np.clip(np.nan_to_num(np.trunc(x.x.astype(np.float64)), nan=0), -(2.0**31), 2.0**31 - 1)
            return Value("i", whole.astype(np.int32))
        return Value(kind, x.x.astype(DTYPES[kind]))

    def multiply_wide(self, x, constant):
        product = x.x.astype(np.uint32).astype(np.uint64) * np.uint64(constant % 2**32)
        return tuple(
            Value("i", half.astype(np.uint32).astype(np.int32)) for half in (product >> np.uint64(32), product)
        )

    def bits(self, kind, x):
        return Value(kind, np.ascontiguousarray(self._all(x)).view(DTYPES[kind]))

    def fma(self, a, b, c):
        assert a.kind == b.kind == c.kind
        # (Long doubles, for those of float64, would take ten times as long.)
        return Value(a.kind, (a.x.astype(np.float64) * b.x + c.x).astype(DTYPES[a.kind]))

    def times(self, a, b):
        return a * b

    def exp2(self, x):
        made = np.exp2(x.x)
        if x.kind == "d":
            return Value("d", made)
        # ex2.approx.ftz: right to 2 units in the last place (PTX ISA), and where the result is a power of two.
        off = np.where(np.ascontiguousarray(x.x).view(np.int32) & 1, np.float32(np.inf), np.float32(0))
        made = np.where(np.isfinite(made) & (x.x != np.rint(x.x)), np.nextafter(made, off), made)
        return Value("f", np.where(made < TINY, np.float32(0), made))

    def log2(self, x):
        return Value(x.kind, np.log2(x.x))

    def tanh(self, x):
        return Value(x.kind, np.tanh(x.x))

    def abs(self, x):
        return Value(x.kind, np.abs(x.x))

    def library(self, name, x):
        return Value(x.kind, getattr(np, name)(x.x))

    def opaque(self, x):
        return x

    def pack(self, dtype, low, high):
        words = round_half(dtype, self._all(low)) | (round_half(dtype, self._all(high)) << 16)
        return Value("i", words.astype(np.uint32).view(np.int32))

    def unpack(self, dtype, x):
        words = self._words(x)
        if dtype == "bf16":
            return Value("f", (words << 16).view(np.float32)), Value("f", (words & 0xFFFF0000).view(np.float32))
        halves = words.view(np.uint16).view(np.float16).reshape(-1, 2).astype(np.float32)
        return Value("f", halves[:, 0]), Value("f", halves[:, 1])

    def subtract_pair(self, dtype, a, b):
        return self.pack(dtype, *(x - y for x, y in zip(self.unpack(dtype, a), self.unpack(dtype, b), strict=True)))

    def multiply_pair(self, dtype, a, b):
        return self.pack(dtype, *(x * y for x, y in zip(self.unpack(dtype, a), self.unpack(dtype, b), strict=True)))

    def to_half(self, dtype, x):
        return Value("i", round_half(dtype, self._all(x)).astype(np.int32))

    def is_nan(self, x):
        return Value("p", np.isnan(x.x))

    def is_finite(self, x):
        return Value("p", np.isfinite(x.x))

    # Memory.

    def load(self, kind, address, count=None, where=None):
        size, where = SIZES[kind] * (count or 1), self._where(where)
        data = np.zeros((self.n, size), np.uint8)
        data[where] = self._memory.bytes_at(self._all(address)[where], size, size)
        return self._values(kind, data, count)

    def load_constant(self, kind, address):
        return self.load(kind, address)

    def store(self, kind, address, values, where):
        data, where = self._bytes(kind, values), self._where(where)
        self._memory.write(self._all(address)[where], data[where])

    def add(self, address, values, where, together):
        where = self._where(where)
        for n, x in enumerate(values):
            self._memory.add(self._all(address)[where] + 4 * n, self._all(x)[where])
        assert not together or not (self._all(address)[where] % (4 * len(values))).any(), "red: misaligned"

    def add_anywhere(self, address, x, where):
        where = self._where(where)
        self._memory.add_anywhere(self._all(address)[where], self._all(x)[where])

    def load_shared(self, kind, address, count=None):
        return self._values(kind, self._shared.read(self._all(address), SIZES[kind] * (count or 1)), count)

    def store_shared(self, kind, address, values, where=None):
        self._shared.write(self._all(address), self._bytes(kind, values), self._where(where))

    def copy_async(self, shared, address, size, where=None, width=16):
        address, size, where = (x.copy() for x in (self._all(address), self._all(size), self._where(where)))
        assert ((size >= 0) & (size <= width))[where].all(), "cp.async: size"

        def fetch():
            data = np.zeros((self.n, width), np.uint8)
            for n in np.unique(size[where]):
                which = where & (size == n)
                if n:
                    data[which, :n] = self._memory.bytes_at(address[which], int(n), width)
            return data

        self._shared.copy(self._all(shared).copy(), fetch, width, where)

    def commit(self):
        self._shared.groups.append([])

    def wait(self, groups):
        self._shared.wait(groups)

    def _values(self, kind, data, count):
        if kind in "hb":
            numbers = data.view({"h": np.uint16, "b": np.uint8}[kind]).astype(np.int32)
            kind = "i"
        else:
            numbers = np.ascontiguousarray(data).view(DTYPES[kind])
        if count is None:
            return Value(kind, numbers[:, 0].copy())
        return [Value(kind, numbers[:, n].copy()) for n in range(count)]

    def _bytes(self, kind, values):
        dtype = {"h": np.uint16, "b": np.uint8}.get(kind) or DTYPES[kind]
        assert all(x.kind == ("i" if kind in "hb" else kind) for x in values)
        return np.stack([self._all(x).astype(dtype) for x in values], 1).view(np.uint8)

    # What a warp does together.

    def shuffle_xor(self, x, distance):
        return Value(x.kind, self._all(x)[np.arange(self.n) ^ distance])

    def shuffle(self, x, lane):
        of_warp = np.arange(self.n) & -32
        return Value(x.kind, self._all(x)[of_warp + (self._all(lane) & 31)])

    def any_lane(self, condition):
        of_warps = self._all(condition).reshape(-1, min(self.n, 32))
        return Value("i", np.repeat(of_warps.any(1), of_warps.shape[1]).astype(np.int32))

    def sync_block(self):
        self._shared.sync()

    def sync_warp(self):
        self._shared.sync_warp()

    def load_matrices(self, address, transposed):
        rows = self._shared.read(self._all(address), 16, matrices=True).view(np.uint16).reshape(-1, 4, 8, 8)
        rows = rows.swapaxes(-1, -2) if transposed else rows
        lane = np.arange(32)
        low, high = (rows[:, :, lane >> 2, 2 * (lane & 3) + n].astype(np.uint32) for n in (0, 1))
        words = (low | (high << 16)).view(np.int32)
        return [Value("i", words[:, n].ravel()) for n in range(4)]

    def multiply(self, dtype, a, b, c):
        g, t = np.arange(32) >> 2, np.arange(32) & 3
        depth = 8 if dtype == "tf32" else 16
        A, B, C = (np.zeros((self.n // 32, *shape)) for shape in ((16, depth), (depth, 8), (16, 8)))

        def lanes(x):
            return x.reshape(-1, 32)

        for n, x in enumerate(c):
            C[:, g + 8 * (n // 2), 2 * t + n % 2] = lanes(self._all(x))
        for matrix, given in ((A, a), (B, b)):
            for n, x in enumerate(given):
                down, right = (8 * (n % 2), n // 2) if matrix is A else (0, n)
                if dtype == "tf32":
                    words = self._words(x)
                    assert not (words & 0x1FFF).any(), "tf32: not rounded"
                    parts, step, width = [words.view(np.float32)], 1, 4
                else:
                    parts, step, width = [y.x for y in self.unpack(dtype, x)], 2, 8
                for m, part in enumerate(parts):
                    k = step * t + m + width * right
                    matrix[(slice(None), g + down, k) if matrix is A else (slice(None), k, g)] = lanes(part)
        exact = A @ B + C
        made = exact.astype(np.float32)  # and then towards zero, as tensor cores do (Fasi et al. 2021, section 4)
        over = np.isfinite(made) & (np.abs(made) > np.abs(exact))  # (what has no room is infinite)
        made = np.where(over, np.nextafter(made, np.float32(0)), made)
        return [Value("f", made[:, g + 8 * (n // 2), 2 * t + n % 2].ravel()) for n in range(4)]

    def loop(self, count, state, body):
        count = max(np.unique(count.x).item(), 1) if isinstance(count, Value) else count
        for n in range(count):
            state = body(Value("i", n), list(state))
        return state

    def when(self, condition, state, body):
        where = np.broadcast_to(condition.x, (self.n,))
        if not where.any():
            return list(state)
        made = body(list(state))
        return [Value(x.kind, np.where(where, y.x, x.x)) for x, y in zip(state, made, strict=True)]


class Memory:
    """Memory of the device, as far as `regions` of (address, bytes) go."""

    def __init__(self):
        self.regions = np.zeros((0, 2), np.int64)

    def allow(self, regions):
        self.regions = np.array(sorted(regions), np.int64).reshape(-1, 2)
        first, last = int(self.regions[0, 0]), int((self.regions[:, 0] + self.regions[:, 1]).max())
        self.start = first
        # All of it as one array, most of which does not exist: only what is checked is touched.
        described = types.SimpleNamespace(
            __array_interface__={"version": 3, "shape": (last - first,), "typestr": "|u1", "data": (first, False)}
        )
        self.bytes = np.asarray(described)

    def _index(self, address, size, alignment):
        assert not (address % alignment).any(), f"misaligned by {set((address % alignment).tolist())} of {alignment}"
        region = np.searchsorted(self.regions[:, 0], address, "right") - 1
        start, length = self.regions[np.maximum(region, 0)].T
        outside = (region < 0) | (address + size > start + length)
        assert not outside.any(), f"out of bounds by {(address + size - start - length)[outside].max()} bytes"
        return (address - self.start)[:, None] + np.arange(size)

    def bytes_at(self, address, size, alignment):
        return self.bytes[self._index(address, size, alignment)]

    def write(self, address, data):
        index = self._index(address, data.shape[1], data.shape[1])
        self.bytes[index] = data
        assert (self.bytes[index] == data).all(), "threads write different things to one place"

    def add(self, address, x):
        index = self._index(address, 4, 4)
        assert len(np.unique(address)) == len(address), "two threads add to one place: right, but slow"
        total = self.bytes[index].view(np.float32)[:, 0] + x
        self.bytes[index] = total[:, None].view(np.uint8)

    def add_anywhere(self, address, x):
        for place, number in zip(address.tolist(), x, strict=True):
            index = self._index(np.array([place]), x.itemsize, x.itemsize)[0]
            self.bytes[index] = (self.bytes[index].view(x.dtype) + number).view(np.uint8)


class BlockMemory:
    """Shared memory, who used it last, and copies that are under way."""

    NOBODY, SEVERAL = -1, -2

    def __init__(self, size, landing, races):
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.landing, self.races = landing, races
        self.groups = [[]]
        words = -(-size // 4)
        self.epoch = self.warp_epoch = 1  # how many barriers of the block, and of warps, there have been
        self.writer, self.written, self.written_warp = np.full(words, self.NOBODY), *np.zeros((2, words), int)
        self.read_warps = np.zeros(words, np.int32)  # a bit for each warp that has read since the barrier of the block
        self.reader = np.full(words, self.NOBODY, np.int32)  # since the barrier of the warp
        self.coming = np.zeros(words, bool)
        self.conflicts = {}  # most words of one bank in one access, by its width; filled if `count` is set
        self.count = False

    def sync(self):
        self.epoch += 1
        self.read_warps[:] = 0
        self.sync_warp()

    def sync_warp(self):
        self.warp_epoch += 1
        self.reader[:] = self.NOBODY

    def _index(self, address, width, where=None):
        address = address.astype(np.int64) if where is None else address[where].astype(np.int64)
        assert not (address % width).any(), "shared memory: misaligned"
        assert (address >= 0).all(), "shared memory: out of bounds"
        assert (address + width <= self.bytes.size).all(), "shared memory: out of bounds"
        return address

    def read(self, address, width, matrices=False):
        address = self._index(address, width)
        if self.count:
            self._count("matrices" if matrices else f"read {width}", address, width)
        if self.races:
            self._check_read(address, width, matrices)
        whole = self.bytes[: self.bytes.size // width * width].view(f"V{width}")
        return whole[address // width].view(np.uint8).reshape(-1, width)

    def write(self, address, data, where):
        width = data.shape[1]
        threads = np.flatnonzero(where)
        address = self._index(address, width, where)
        if self.count:
            self._count(f"write {width}", address, width)
        if self.races:
            words = self._words(address, width)
            self._check_write(words, threads)
            self._written(words, threads)
        self.bytes[address[:, None] + np.arange(width)] = data[where]

    def copy(self, address, fetch, width, where):
        threads = np.flatnonzero(where)
        address = self._index(address, width, where)
        index, words = address[:, None] + np.arange(width), self._words(address, width)
        if self.races:
            self._check_write(words, threads)
            self.coming[words] = True
        if self.landing == "issue":
            self.bytes[index] = fetch()[where]

        def land():
            if self.landing == "wait":
                self.bytes[index] = fetch()[where]
            self.coming[words] = False
            if self.races:
                self._written(words, threads)

        self.groups[-1].append(land)

    def wait(self, groups):
        done = self.groups[: len(self.groups) - 1 - groups]
        del self.groups[: len(done)]
        for group in done:
            for land in group:
                land()

    @staticmethod
    def _words(address, width):
        return address[:, None] // 4 + np.arange(max(width // 4, 1))

    def _check_read(self, address, width, matrices):
        words, threads = self._words(address, width), np.arange(len(address))[:, None]
        assert not self.coming[words].any(), "shared memory: read while a copy is under way"
        fresh = self.written[words] == self.epoch
        if fresh.any():
            writer = self.writer[words]
            same_warp = (writer // 32 == threads // 32) & (self.written_warp[words] < self.warp_epoch)
            mine = same_warp if matrices else same_warp | (writer == threads)
            assert (~fresh | mine).all(), "shared memory: read without a barrier after another thread wrote"
        for warp in range(-(-len(words) // 32)):
            self.read_warps[words[32 * warp : 32 * warp + 32]] |= 1 << warp
        if matrices:
            self.reader[words] = self.SEVERAL
            return
        before = self.reader[words]
        self.reader[words] = threads
        several = (self.reader[words] != threads) | ((before != self.NOBODY) & (before != threads))
        self.reader[words[several]] = self.SEVERAL

    def _check_write(self, words, threads):
        threads = threads[:, None]
        assert not self.coming[words].any(), "shared memory: written while a copy is under way"
        fresh, writer = self.written[words] == self.epoch, self.writer[words]
        ordered = (writer // 32 == threads // 32) & (self.written_warp[words] < self.warp_epoch)
        assert (~fresh | ordered | (writer == threads)).all(), "shared memory: two threads write without a barrier"
        others = self.read_warps[words] & ~(1 << (threads // 32))
        assert not others.any(), "shared memory: overwritten without a barrier after another warp read"
        reader = self.reader[words]
        just = (reader != self.NOBODY) & (reader != threads)
        assert not just.any(), "shared memory: overwritten without a barrier after another thread read"

    def _written(self, words, threads):
        self.writer[words] = threads[:, None]
        assert (self.writer[words] == threads[:, None]).all() or words.size == 0 or self._sub_words, "two threads write"
        self.written[words], self.written_warp[words] = self.epoch, self.warp_epoch

    _sub_words = True  # elements of 2 bytes share words

    def _count(self, name, address, width):
        lanes = {4: 32, 8: 16}.get(width, 8) if width >= 4 else 32
        for start in range(0, len(address), lanes):
            words = np.unique(self._words(address[start : start + lanes], width))
            most = int(np.bincount(words % 32).max())
            self.conflicts[name] = max(self.conflicts.get(name, 0), most)


class Emulator:
    """A target for the factories of kernels, and what runs what they make.

    Parameters
    ----------
    landing : {"wait", "issue"}
        When asynchronous copies arrive: as late as the program allows, or at once.
    races : bool
        Whether to look for missing barriers, which takes longer.
    first : int
        The warpgroup that begins, in kernels whose warpgroups have roles.
    """

    def __init__(self, landing="wait", races=True, first=0):
        self.landing, self.races, self.first = landing, races, first
        self.memory = Memory()
        self.count_conflicts, self.conflicts = False, {}
        self.cuda = types.SimpleNamespace(
            shared=types.SimpleNamespace(array=lambda size, dtype: None),
            syncthreads=lambda: self.block_memory.sync(),
            syncthreads_or=self._any,
        )

    def _any(self, x):
        self.block_memory.sync()
        return int(np.any(x))

    def shared(self):
        return lambda array: np.int32(0)

    def macro(self, result, *arguments):
        return macro(lambda: self.emit, result, arguments)

    def run(self, kernel, grid, threads, shared, integers, reals, regions):
        """Run every block of a grid, one after the other."""
        integers, reals = tuple(map(np.int64, integers)), tuple(map(np.float64, reals))
        self.memory.allow(regions)
        self.cuda.threadIdx = types.SimpleNamespace(x=np.arange(threads, dtype=np.int32))
        for z, y, x in np.ndindex(grid[::-1]):
            self.cuda.blockIdx = types.SimpleNamespace(x=x, y=y, z=z)
            if hasattr(kernel, "warpgroups"):
                run_block(self, kernel, threads, shared, (integers, reals), lambda: Emit(self, 128))
                continue
            self.block_memory = BlockMemory(shared, self.landing, self.races)
            self.block_memory.count, self.block_memory.conflicts = self.count_conflicts, self.conflicts
            self.emit = Emit(self, threads)
            kernel(integers, reals)


def macro(emit, result, arguments):
    """Decorate a body that computes with what `emit` returns; the kinds are those of `toolchain.Intrinsics.macro`."""
    results = kinds_of(result)

    def decorate(body):
        def call(*given):
            assert len(given) == len(arguments), body.__name__
            e = emit()
            values = [_take(e, kind, x) for kind, x in zip(arguments, given, strict=True)]
            try:
                with np.errstate(all="ignore"):
                    out = body(e, *values)
            except AssertionError as error:
                raise AssertionError(f"{body.__name__}: {error}") from error
            if len(results) < 2:
                return _give(results[0], out) if results else None
            return tuple(_give(kind, x) for kind, x in zip(results, out, strict=True))

        return call

    return decorate


def _take(e, kind, x):
    if isinstance(kind, Packed):
        return kind.unpack(e, *(_take(e, group, y) for group, y in zip(kind.groups, x, strict=True)))
    if len(kind) > 1:
        assert len(x) == int(kind[1:])
        return [Value(kind[0], y) for y in x]
    return Value(kind, x)


def _give(kind, out):
    if isinstance(kind, Packed):
        return tuple(_give(group, x) for group, x in zip(kind.groups, kind.pack(out), strict=True))
    if len(kind) > 1:
        assert len(out) == int(kind[1:])
        assert all(x.kind == kind[0] for x in out)
        return tuple(_uniform(x.x) for x in out)
    assert out.kind == kind
    return _uniform(out.x)


def _uniform(x):
    """What all threads agree on as one number, which the kernel may branch on."""
    if x.ndim and x.dtype.kind == "i" and (x == x[0]).all():
        return x[0]
    return x[()] if not x.ndim else x


class EmulatedDriver(HostDriver):
    """A device whose kernels are emulated; `configs` has every one that was launched."""

    def __init__(
        self, landing="wait", races=True, capability=(9, 0), shared_memory=232448, multiprocessors=4, first=0, **options
    ):
        super().__init__(run=self.emulate, **options)
        major, minor = capability
        self.template = self.template.__class__(
            0,
            capability,
            f"sm_{major}{minor}{'a' if capability == (9, 0) else ''}",
            multiprocessors,
            shared_memory,
            "an emulated GPU",
        )
        self.landing, self.races, self.first = landing, races, first
        self.configs, self.made = {}, {}

    def compiled(self, config):
        self.configs[config.name] = config
        return Kernel(
            config.name, b"", config.threads, kernels.shared(config), kernels.addresses(config), kernels.seed(config)
        )

    def emulate(self, kernel, grid, integers, reals):
        if kernel.name not in self.made:
            emulator = Emulator(self.landing, self.races, self.first)
            self.made[kernel.name] = emulator, kernels.make(self.configs[kernel.name], emulator)
        emulator, function = self.made[kernel.name]
        held = {address: reference() for address, reference in self.allocations.items()}
        regions = [(address, memory.size) for address, memory in held.items() if memory is not None]
        emulator.run(function, grid, kernel.threads, kernel.shared, integers, reals, regions)


@contextmanager
def emulated(monkeypatch, **options):
    """Let the CUDA backend run in the emulator."""
    driver = EmulatedDriver(**options)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "driver", driver)
        patch.setattr(kernels, "compiled", driver.compiled)
        patch.setattr(constants, "SLAB", 1)  # each of its own, so that nobody reads past its end
        yield driver
