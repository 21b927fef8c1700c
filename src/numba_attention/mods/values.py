"""What the names and expressions of a mod stand for while it is translated."""

from typing import Any, NamedTuple

from .program import BOOL, INT, LONG, REAL, Builder
from .reads import Path

ELEMENTS = {"bool": BOOL, "int32": INT, "int64": LONG, "float32": REAL, "float64": REAL}


class Argument(NamedTuple):
    """What is known of one of `mod_args` when a rule is compiled; a number has no axes."""

    dtype: str
    ndim: int

    @property
    def kind(self) -> str:
        return ELEMENTS[self.dtype]


class Array(NamedTuple):
    """An array of `mod_args`, of which so many indices are known."""

    place: int
    indices: tuple[tuple[int, bool], ...] = ()  # instruction, and whether it is read as it comes


class Range(NamedTuple):
    numbers: range


class Undefined(NamedTuple):
    """A name that has a value on some paths only, or values that cannot be selected."""

    why: str


Env = dict[str, Any]  # instruction numbers, arrays, tuples


class Whole(NamedTuple):
    """What all functions of one rule share."""

    b: Builder
    arguments: tuple[Argument, ...]
    values: tuple[Any, ...]
    reads: dict[Path, None]  # a set in the order of reading

    def read(self, *path: Any) -> None:
        self.reads[path] = None


class Loop(NamedTuple):
    """Where `continue` and `break` leave an unrolled loop: conditions, and the names as they are then."""

    continued: list[tuple[int, Env]]
    broken: list[tuple[int, Env]]
