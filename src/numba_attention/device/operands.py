"""The arrays of a call: which device and stream they are on, their headers in the order of streams, and their looks."""

from typing import Any

import numpy as np

from ..errors import is_masked, kind_of
from ..options import Array
from . import arrays, replay, runtime
from .driver import identity


class Operands:
    """The arrays of one call on a GPU: its device and stream, and headers in place of its arrays.

    The stream is that of the first array on a GPU. It waits for arrays on other streams, and `finish` lets these wait.

    Parameters
    ----------
    operands : dict of str to array
        The arrays that determine the device, by the name of the argument.
    """

    def __init__(self, operands: dict[str, Any]) -> None:
        families = {name: arrays.family_of(x) for name, x in operands.items()}
        self._families = {id(operands[name]): family for name, family in families.items()}
        self._places: dict[str, int] = {}  # the number of the GPU of each argument
        stream = None
        self._leader = ""  # the library whose stream the call uses
        for name, family in families.items():
            if family is not arrays.HOST:
                self._place(name, family, operands[name])
                if stream is None:
                    self._leader = family.name
                    stream = family.stream(operands[name], self._places[name]) or runtime.DEFAULT_STREAM
        self.device = next(iter(self._places.values())) if self._places else runtime.driver.current()
        self.stream = stream or runtime.DEFAULT_STREAM
        self.family = next(iter(families.values()), arrays.HOST)
        self._others: set[int] = set()  # other streams, of inputs
        self._waits = False
        # Headers by identity of their arrays: in self-attention, query, key and value are one array.
        self._headers: dict[int, tuple[Any, Array]] = {}

    def _place(self, name: str, family: arrays.Family, x: Any) -> None:
        self._places[name] = family.ordinal(x)
        if len(set(self._places.values())) > 1:
            said = ", ".join(f"{name} is on GPU {ordinal}" for name, ordinal in self._places.items())
            raise ValueError(f"{' and '.join(self._places)} must be on one GPU: {said}")

    def device_array(self, name: str, x: Any) -> Array:
        """Make the header of an array. An array on the host is copied to the device."""
        entry = self._headers.get(id(x))
        if entry is None:
            entry = self._headers[id(x)] = x, self._device_array(name, x)
        return entry[1]

    def _device_array(self, name: str, x: Any) -> Array:
        family = self._families.get(id(x)) or arrays.family_of(x)
        if family is arrays.HOST:
            if not isinstance(x, np.ndarray) or isinstance(x, np.matrix) or is_masked(x):
                raise TypeError(f"{name} must be a numpy.ndarray or an array on a GPU, got {kind_of(x)}")
            if x.dtype.hasobject or x.dtype.names:
                return x  # the checks of dtypes refuse it, with a message of their own
            return runtime.upload(np.asarray(x), self.stream)
        if name not in self._places:
            self._place(name, family, x)
        same = family.one_stream and family.name == self._leader
        stream = self.stream if same else family.stream(x, self.device)
        if stream is not None and stream != self.stream and stream not in self._others:
            runtime.driver.wait(self.stream, stream)
            self._others.add(stream)
        self._waits |= family.name == "jax"
        try:
            array = family.take(x, self.stream)
        except (TypeError, BufferError) as error:
            raise TypeError(f"{name}: {error}") from error
        recorder = replay.current()
        if recorder is not None:
            recorder.operands.append(array)
        return array

    def finish(self) -> None:
        """Let the streams of inputs wait for the work: inputs may be changed or freed as soon as this returns."""
        for stream in self._others:
            runtime.driver.wait(stream, self.stream)
        if self._waits:  # a library that cannot wait for a stream
            runtime.driver.synchronize(self.stream)


class Seen:
    """Everything that a call depends on, as a key for `replay`, and what differs between calls with that key."""

    __slots__ = ("addresses", "device", "family", "key", "seed", "stream")

    def __init__(self, key: Any, addresses: list[int], family: arrays.Family, device: int, stream: int) -> None:
        self.key, self.addresses, self.family, self.device, self.stream = key, addresses, family, device, stream
        self.seed: int | None = None  # of dropout, as a signed number of 64 bits

    def add(self, *more: Any) -> None:
        """Add to the key what else the call depends on."""
        self.key = (self.key, *more)

    def repeat(self, recorded: replay.Recorded) -> Any:
        driver = runtime.driver
        on_current = self.family.on_current or recorded.tables
        if not on_current or driver.of_thread() == self.device:  # entering a block takes 1 us
            return recorded.repeat(driver, self)
        with driver.on(self.device):
            return recorded.repeat(driver, self)


def words_of(addresses: list[int]) -> tuple[Any, ...]:
    """Return what a call depends on of addresses: their alignment, and which of them are the same."""
    alike = None if len(set(addresses)) == len(addresses) else tuple(map(addresses.index, addresses))
    return alike, *[address & 15 for address in addresses]


def look(operands: tuple[Any, ...]) -> Seen | None:
    """Return what a call with these arrays depends on; None unless all are of one library, on one stream."""
    first = None
    for first in operands:
        if first is not None:
            break
    else:
        return None
    kind = type(first)
    of_tensors = arrays.looks_of(kind)
    if of_tensors is None:
        return _look_at_each(operands)
    family, looks = of_tensors
    found = looks.of(kind, operands)
    if found is None:
        return _look_at_each(operands)
    key, addresses, device = found
    if device is None:
        seen = _look_at_each(operands)
        if seen is None or not looks.accept(key, addresses, seen.addresses, seen.device):
            return seen
        addresses, device = seen.addresses, seen.device
    stream = family.stream(first, device) or runtime.DEFAULT_STREAM
    return Seen((runtime.driver, key, stream, identity(stream)), addresses, family, device, stream)


def _look_at_each(operands: tuple[Any, ...]) -> Seen | None:
    looks: list[Any] = []
    addresses: list[int] = []
    family = first = places = None
    for x in operands:
        if x is None:
            looks.append(None)
            continue
        if family is None:
            family, first = arrays.family_of(x), x
        elif type(x) is not type(first):
            return None
        look = family.look(x)
        if look is None or not look[1]:
            return None
        described, address = look
        looks.append(described)
        addresses.append(address)
        if places is None:
            places = described[3:]
        elif described[3:] != places:  # on another device, or another stream
            return None
    if family is None or places is None:
        return None
    device = places[0]
    stream = family.stream(first, device) or runtime.DEFAULT_STREAM
    key = runtime.driver, family.name, *looks, *words_of(addresses), stream, identity(stream)
    return Seen(key, addresses, family, device, stream)
