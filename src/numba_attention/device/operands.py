"""The arrays of a call: which device and stream they are on, and their headers, in the order of streams."""

from typing import Any

import numpy as np

from ..errors import kind_of
from ..options import Array
from . import arrays, runtime


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
            if not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray | np.matrix):
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
            return family.take(x, self.stream)
        except (TypeError, BufferError) as error:
            raise TypeError(f"{name}: {error}") from error

    def finish(self) -> None:
        """Let the streams of inputs wait for the work: inputs may be changed or freed as soon as this returns."""
        for stream in self._others:
            runtime.driver.wait(stream, self.stream)
        if self._waits:  # a library that cannot wait for a stream
            runtime.driver.synchronize(self.stream)
