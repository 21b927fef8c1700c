"""Replay of GPU calls: a call like an earlier one repeats its launches with new addresses, in a tenth of the time.

The launches of a call depend on the layout of its arrays and on its options, not on the contents of the arrays. The
first call of a kind runs the code that checks, plans and allocates, while a `Recorder` records it. `Recorded` then
repeats the same allocations and the same launches with other addresses.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..bounded import BoundedCache
from ..errors import BackendUnavailableError
from ..options import Array
from . import driver
from .driver import Kernel, identity
from .headers import address_of, extent, held
from .launches import Launch, Launches

_BYTES = np.dtype(np.uint8)
_ALIGNMENT = 256  # bytes
SMALL = 8192  # bytes of a recorded call, without the memory that it keeps
KEPT = 2**19  # bytes of scratch memory up to which a recorded call keeps it for itself: then it need not be cleared
WORKSPACE = 2**23  # bytes of scratch memory up to which calls on a stream share it: allocating it takes 4 us
SIZE = 2**26  # bytes of all recorded calls, most of them on the GPU
_TURNS = 64  # calls after which kept memory is cleared where that is not needed for the results

_current: ContextVar["Recorder | None"] = ContextVar("numba_attention_recorder", default=None)
_recorded: "BoundedCache[Recorded]" = BoundedCache(size=SIZE)
_workspaces: "BoundedCache[list[Workspace]]" = BoundedCache(count=8)  # which no thread is using, by stream
_captured: list[Any] = []  # memory that captured CUDA graphs may use at any time


class Table(NamedTuple):
    """Numbers that a call copies to scratch memory: its number, and which of them are addresses in which array."""

    number: int
    numbers: list[int]
    patches: list[tuple[int, int, int]]

    def at(self, addresses: Sequence[int]) -> Array:
        """Return the numbers with the addresses of a call."""
        numbers = np.array(self.numbers, np.int64)
        for place, number, more in self.patches:
            numbers[place] = addresses[number] + more
        return numbers


class Made(NamedTuple):
    """An allocation of a call: a result, with shape and dtype, or scratch memory, with its size and cleared bytes.

    If it is `lasting`, what an earlier call left in cleared bytes does not change a result, but takes time.
    """

    shape: tuple[int, ...]
    dtype: Any
    size: int
    cleared: int
    lasting: bool


class Recorder:
    """Records one call. `give_up` is called if it does what cannot be repeated, such as a copy from the host.

    Parameters
    ----------
    addresses : list of int
        Addresses of the arrays of the call.
    seed : int, optional
        The seed of dropout, which is another number that differs between calls of a kind.
    """

    def __init__(self, addresses: Sequence[int], seed: int | None = None) -> None:
        self._sources = {address: n for n, address in reversed(list(enumerate(addresses)))}
        self._seed = None if seed is None else len(addresses)
        self._number = len(addresses) + (seed is not None)
        self._fixed: dict[int, Array] = {}
        self.made: list[Made] = []
        self.launches: list[Launch] = []
        self.tables: list[Table] = []
        self._owners: dict[int, int] = {}  # index in `made` of each result, by its owner
        self._ranges: list[tuple[int, int, int]] = []  # first and last address of what was made, and its number
        self._alive: list[Any] = []  # kept until the call ends, so that no address is used twice
        self.operands: list[Array] = []  # headers of the arrays of the call
        self.possible = True

    def give_up(self) -> None:
        self.possible = False

    def make(self, array: Array, is_result: bool, cleared: int = 0, lasting: bool = False) -> None:
        """Record an allocation."""
        base = held(array)
        if base is None or not array.size:
            return self.give_up()
        address, number = address_of(array), self._number + len(self.made)
        self._sources[address] = number
        self._ranges.append((address, address + array.nbytes, number))
        if is_result:
            self._owners[id(base.owner)] = len(self.made)
        self._alive.append(base.owner)
        self.made.append(Made(array.shape, array.dtype, 0 if is_result else array.nbytes, cleared, lasting))

    def fix(self, array: Array) -> None:
        """Record memory whose contents and address are the same in every call of this kind."""
        self._fixed[address_of(array)] = array

    def _patches(self, integers: Sequence[int], places: Iterable[int]) -> list[tuple[int, int, int]] | None:
        """Return which arrays the addresses at these places are in, and how far in; None if one is in none of them."""
        patches = []
        for place in places:
            address = integers[place]
            if address in self._sources:
                patches.append((place, self._sources[address], 0))
            elif address and address not in self._fixed:
                inside = [(place, n, address - start) for start, end, n in self._ranges if start <= address < end]
                if not inside:
                    return None
                patches += inside
        return patches

    def keep_alive(self) -> None:
        """Keep the memory of the call for the life of the process: a CUDA graph that was captured uses it."""
        _captured.append((self._alive, [*self._fixed.values()], self.launches))

    def table(self, array: Array, numbers: Sequence[int], places: Iterable[int]) -> None:
        """Record what is copied from the host to scratch memory: numbers, of which those at `places` are addresses."""
        patches = self._patches(numbers, places)
        if patches is None:
            return self.give_up()
        self.tables.append(Table(self._sources[address_of(array)], list(numbers), patches))

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], integers: Sequence[int], reals: Sequence[float]
    ) -> None:
        patches = self._patches(integers, kernel.addresses)
        if patches is None:
            return self.give_up()
        if self._seed is not None and kernel.seed is not None:
            patches.append((kernel.seed, self._seed, 0))
        self.launches.append(Launch(kernel, grid, list(integers), patches, list(reals)))

    def keep(self, key: Any, result: Any) -> None:
        """Store the recorded call under a key of everything that it depends on."""
        if not self.possible or not self.launches or _is_ambiguous(self.operands):
            return
        try:
            pattern = _pattern(result, self._owners)
        except KeyError:  # a result that `make` did not record
            return
        recorded = Recorded(self._number, self.made, self.launches, pattern, list(self._fixed.values()), self.tables)
        driver.machine()
        _recorded.add(key, recorded, recorded.nbytes + _bytes_of(key))


def _is_ambiguous(arrays: Sequence[Array]) -> bool:
    """Whether an array begins at an element of another one, other than its first.

    An address there may be meant as a part of the other array, as of parts that are stacked, and other arrays of the
    same layouts need not overlap so. Arrays between whose elements others lie, as query, key and value of one packed
    array, are not meant.
    """
    spans = sorted(
        ((address_of(x) + first, address_of(x) + end, n) for n, x in enumerate(arrays) for first, end in [extent(x)])
    )
    for place, (_, end, n) in enumerate(spans):
        for first, _, m in spans[place + 1 :]:
            if first >= end:
                break
            pair = arrays[n], arrays[m]
            if address_of(pair[0]) != address_of(pair[1]) and (_begins_in(*pair) or _begins_in(*pair[::-1])):
                return True
    return False


def _begins_in(array: Array, other: Array) -> bool:
    """Whether an array has an element where another one begins."""
    work: Any = 10_000  # candidate solutions to try, which takes well below a millisecond
    try:
        return np.shares_memory(array, other[(slice(0, 1),) * other.ndim], max_work=work)
    except np.exceptions.TooHardError:
        return True


def _bytes_of(key: Any) -> int:
    """Return the bytes of a key, which may have contents of arrays and lists."""
    return sys.getsizeof(key) + (sum(map(_bytes_of, key)) if isinstance(key, tuple) else 0)


def _pattern(result: Any, owners: dict[int, int]) -> Any:
    """Return the result with each array replaced by the number of its allocation and its shape."""
    if result is None:
        return None
    if isinstance(result, tuple):
        parts = [_pattern(x, owners) for x in result]
        return type(result), parts
    base = held(result)
    if base is None or not result.flags.c_contiguous:
        raise KeyError(result)
    return owners[id(base.owner)], result.shape


def _built(pattern: Any, arrays: list[Any]) -> Any:
    if pattern is None:
        return None
    first, second = pattern
    if not isinstance(first, type):
        array = arrays[first]
        return array if array.shape == second else array.reshape(second)
    parts = [_built(x, arrays) for x in second]
    return first(*parts) if hasattr(first, "_fields") else first(parts)


class Seen(Protocol):
    """A call to be repeated: what `operands.Seen` has."""

    addresses: list[int]
    family: Any
    device: int
    stream: int
    seed: int | None


class Workspace(NamedTuple):
    """Scratch memory that is used by one thread at a time."""

    memory: Any
    start: int
    size: int


def _new_workspace(seen: Seen, size: int) -> Workspace:
    memory, start = seen.family.new((size,), _BYTES, seen.device, seen.stream)
    return Workspace(memory, start, size)


class Own(Launches):
    """What one thread repeats a call with: its launches, and scratch memory if the call keeps it for itself."""

    workspace: Workspace | None = None
    turns = 0  # the calls until the memory is cleared


class Recorded:
    """A recorded call, which can be repeated.

    Scratch memory is used again by later calls, which is safe because calls that use it follow one another on one
    stream: as the library's own pool gives freed memory to the next call on that stream.
    """

    def __init__(
        self, number: int, made: list[Made], launches: list[Launch], pattern: Any, fixed: list[Array],
        tables: list[Table],
    ) -> None:  # fmt: skip
        self._launches, self._pattern, self._fixed, self.tables = launches, pattern, fixed, tables
        # All scratch memory of a call is one allocation. With each recorded one its place in that, None for results.
        self._made: list[tuple[Made, int | None]] = []
        self._scratch = 0
        for x in made:
            self._made.append((x, self._scratch if x.size else None))
            self._scratch += -(-x.size // _ALIGNMENT) * _ALIGNMENT
        self._arrays = number + len(made)
        cleared = [(n, x) for n, x in enumerate(made, number) if x.size and x.cleared]
        cleared.sort(key=lambda item: item[1].lasting)  # what kept memory needs not comes last
        self._clears = [(n, 0, x.cleared) for n, x in cleared]
        self._each_time = sum(not x.lasting for _, x in cleared)
        self._keeps = self._scratch <= KEPT and self._each_time < len(cleared)
        self._free: list[Own] = []  # what no thread is using
        self._kinds: list[Any] = []  # of results, as their library makes them

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps, without those of its key."""
        return SMALL + sum(x.nbytes for x in self._fixed) + (self._scratch if self._keeps else 0)

    def repeat(self, driver: Any, seen: Seen) -> Any:
        """Repeat the call. The device of what was seen is the current one if the library allocates on that."""
        family, device, stream = seen.family, seen.device, seen.stream
        addresses, arrays = [*seen.addresses], []
        if seen.seed is not None:
            addresses.append(seen.seed)
        is_captured = driver.is_capturing(stream, device)  # a graph may run beside later calls: it has its own memory
        try:
            own = self._free.pop()
        except IndexError:
            own = Own(self._launches, self._clears, self._arrays)
        free = memory = workspace = None
        start = 0
        clears = len(self._clears)
        if self._scratch:
            size = self._scratch
            if not family.has_pool:
                memory = driver.allocate(size, stream)
                start = memory.address
            elif is_captured or size > WORKSPACE:
                memory, start = family.new((size,), _BYTES, device, stream)
            elif self._keeps:
                workspace = own.workspace
                if workspace is None:
                    workspace = own.workspace = _new_workspace(seen, size)
                elif own.turns:
                    clears = self._each_time
                own.turns = (own.turns or _TURNS) - 1
            else:
                place = driver, family.name, device, stream, identity(stream)
                free = _workspaces.get(place)
                if free is None:
                    free = []
                    _workspaces.add(place, free, 0)
                try:
                    workspace = free.pop()
                except IndexError:
                    workspace = None
                if workspace is None or workspace.size < size:
                    workspace = _new_workspace(seen, size)
            if workspace is not None:
                memory, start, _ = workspace
        if not self._kinds:
            self._kinds = [None if x.size else family.kind(x.shape, x.dtype, device) for x, _ in self._made]
        for kind, (_, offset) in zip(self._kinds, self._made, strict=True):
            array, address = family.make(kind, stream) if offset is None else (memory, start + offset)
            arrays.append(array)
            addresses.append(address)
        if self.tables:
            refuse_table(is_captured)
            for table in self.tables:
                driver.write(addresses[table.number], table.at(addresses), stream)
        driver.repeat(own, addresses, clears, stream, device)
        # Threads whose calls overlapped have memory of their own: one is kept, so that the memory is what is counted.
        if self._free:
            own.workspace = None
        self._free.append(own)
        if free is not None and workspace is not None and not free:
            free.append(workspace)
        if is_captured:
            _captured.append((self, arrays))
        return _built(self._pattern, arrays)


def refuse_table(is_captured: bool) -> None:
    """Raise an error where a graph is captured that would copy a table from the host: what is there when it runs."""
    if is_captured:
        raise BackendUnavailableError(
            "merging more than two separate arrays cannot be captured in a CUDA graph, because a table of their "
            "addresses is copied from the host; stack them, or merge two at a time"
        )


def refuse_copy(is_captured: bool) -> None:
    """Raise an error where a graph is captured that would copy from the host.

    The copy would not be made now, so that what is kept of it for later calls was never written, but whenever the graph
    runs, from memory that holds what was copied last.
    """
    if is_captured:
        raise BackendUnavailableError(
            "a call that copies from the host cannot be captured in a CUDA graph: make the same call once before, on "
            "the stream that is captured, and pass arrays such as mask and bias on the GPU; what is copied must be "
            "small enough to be kept there (256 KiB, the records of 1092 sequences)"
        )


def find(key: Any) -> Recorded | None:
    return _recorded.get(key)


def current() -> Recorder | None:
    """Return the recorder of the present call, or None."""
    return _current.get()


@contextmanager
def nobody() -> Iterator[None]:
    """Record nothing within a block."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def recording(addresses: Sequence[int], seed: int | None = None) -> Iterator[Recorder]:
    """Record what is done within a block."""
    recorder = Recorder(addresses, seed)
    token = _current.set(recorder)
    try:
        yield recorder
    finally:
        _current.reset(token)
