"""Launches that are repeated: their parameters in the form that the driver takes, in which addresses are replaced."""

from array import array
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Any, NamedTuple

PARAMETERS, SIZE_OF_PARAMETERS, END = 1, 2, 0  # CU_LAUNCH_PARAM_...: what cuLaunchKernel finds in `extra`


class Launch(NamedTuple):
    """The launch of a kernel: its integers, and which of them are addresses in which array of the call, how far in."""

    kernel: Any  # `driver.Kernel`
    grid: tuple[int, int, int]
    integers: list[int]
    patches: list[tuple[int, int, int]]
    reals: list[float]


class Machine(NamedTuple):
    """The machine code of repeated calls: see `cpu.device_calls`, whose records these functions make."""

    look: Callable[..., int]
    operands: int  # most arrays that `look` takes
    room: int  # words of its results
    launch: Callable[..., int]
    other_context: int
    record_of: Callable[..., "array[int]"]


class Launches:
    """The launches of a call, which one thread at a time repeats.

    Parameters
    ----------
    launches : sequence of Launch
    clears : sequence of (int, int, int)
        Memory to be cleared before: the number of an array, how far in, how many bytes.
    arrays : int
        How many arrays there are.

    Attributes
    ----------
    numbers : list of array
        Of each launch the parameters of the kernel, integers first and then the bits of the reals. All have 8 bytes,
        so that they are the kernel's buffer of parameters, which the driver copies at once; pointers take longer.
    """

    def __init__(self, launches: Sequence[Launch], clears: Sequence[tuple[int, int, int]], arrays: int) -> None:
        self.launches, self.clears = launches, clears
        self.numbers: list[array[int]] = []
        self._extras: list[tuple[array[int], array[int]]] = []
        for x in launches:
            numbers = array("q", x.integers)
            numbers.frombytes(array("d", x.reals).tobytes())
            first, count = numbers.buffer_info()
            size = array("Q", [8 * count])
            extra = array("Q", [PARAMETERS, first, SIZE_OF_PARAMETERS, size.buffer_info()[0], END])
            self.numbers.append(numbers)
            self._extras.append((extra, size))
        self.extras = [extra.buffer_info()[0] for extra, _ in self._extras]
        # For machine code: the addresses of all arrays, and a record that a driver makes for a context.
        self.addresses = array("q", bytes(8 * max(arrays, 1)))
        self.at = self.addresses.buffer_info()[0]
        self.pack = Struct(f"{arrays}q").pack_into
        self.record: Any = None
        self.record_at = 0

    def patch(self, addresses: Sequence[int]) -> None:
        """Write the addresses of arrays into the parameters."""
        for numbers, launch in zip(self.numbers, self.launches, strict=True):
            for place, number, more in launch.patches:
                numbers[place] = addresses[number] + more
