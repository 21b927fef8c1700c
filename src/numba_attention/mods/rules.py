"""Rules: functions of a call with their programs, found again by what they depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import numpy as np

from ..bounded import BoundedCache
from ..errors import is_masked
from .language import PARAMETERS, SCORE, lower
from .program import Bound, Builder, Program, gradients, slope
from .reads import Path, look_up, present, undispatched
from .values import ELEMENTS, Argument

_SIZE = 2**14  # bytes of a rule with its programs, roughly
_reads: BoundedCache[tuple[Path, ...]] = BoundedCache()
_rules: BoundedCache[Rule] = BoundedCache()


class Rule:
    """A `score_mod` or `mask_mod` for arguments of given kinds.

    Attributes
    ----------
    program : Program
        Its value.
    arguments : tuple of Argument
    bounds : set of Bound
        The indices that must be checked before a call.
    kernels : dict
        What a backend has compiled of it, by keys of the backend.
    """

    def __init__(
        self, role: str, function: FunctionType, derivative: Any, arguments: tuple[Argument, ...], values: Any
    ) -> None:
        self.arguments = arguments
        self._b = Builder()
        lowered = lower(self._b, role, function, arguments, values)
        self._output, self.reads = lowered.output, lowered.reads
        self.program = self._b.program([self._output])
        self._slope: int | None = None
        if derivative is not None:
            own = lower(self._b, SCORE, derivative, arguments, values, root=1)
            self._slope, self.reads = own.output, (*lowered.reads, *own.reads)
        self._with_slope: Program | None = None
        self._with_curve: Program | None = None
        self._gradients: dict[tuple[int, ...], Program] = {}
        self.kernels: dict[Any, Any] = {}
        self.bounds: set[Bound] = self.program.bounds | (set() if self._slope is None else self.with_slope.bounds)

    @property
    def with_slope(self) -> Program:
        """The score and its derivative with respect to the score."""
        if self._with_slope is None:
            own = slope(self._b, self._output) if self._slope is None else self._slope
            self._with_slope = self._b.program([self._output, own])
        return self._with_slope

    @property
    def with_curve(self) -> Program:
        """The score and its first and second derivative with respect to the score; at kinks the second is 0."""
        if self._with_curve is None:
            first = slope(self._b, self._output) if self._slope is None else self._slope
            self._with_curve = self._b.program([self._output, first, slope(self._b, first)])
        return self._with_curve

    @property
    def has_slope_one(self) -> bool:
        """Whether the derivative with respect to the score is 1 whatever the score is, as that of a bias."""
        program = self.with_slope
        line = program.instructions[program.outputs[1]]
        return line.op == "constant" and line.value == 1

    def gradients(self, places: tuple[int, ...]) -> Program:
        """The derivatives with respect to each read of the arrays at these places of `mod_args`."""
        program = self._gradients.get(places)
        if program is None:
            program = self._gradients[places] = self._b.program(*gradients(self._b, self._output, places))
        return program


def find(role: str, function: Any, arguments: tuple[Argument, ...], values: tuple[Any, ...]) -> Rule:
    """Return the rule of a function as it is now: names outside of it are looked up again in every call.

    Raises
    ------
    TypeError
        As `language.lower`.
    """
    derivative = getattr(function, "derivative", None) if role == SCORE else None
    function = plain(function, role)
    derivative = None if derivative is None else plain(derivative, "derivative")
    functions = function, derivative
    fixed = present(function), None if derivative is None else present(derivative), role, arguments
    reads = _reads.get(fixed)
    if reads is not None:
        rule = _rules.get((fixed, *[look_up(path, functions, values) for path in reads]))
        if rule is not None:
            return rule
    rule = Rule(role, function, derivative, arguments, values)
    reads = tuple(dict.fromkeys((*(reads or ()), *rule.reads)))
    _reads.add(fixed, reads, 512)
    _rules.add((fixed, *[look_up(path, functions, values) for path in reads]), rule, _SIZE)
    return rule


def plain(function: Any, name: str) -> FunctionType:
    """The Python function that the caller passed, also through `numba.njit`."""
    function = undispatched(function)
    if not isinstance(function, FunctionType):
        kind = f"{type(function).__module__}.{type(function).__qualname__}"
        raise TypeError(
            f"{name} must be a Python function, plain or compiled by numba.njit, got {kind}; "
            "a function defined inside of another keeps what it needs"
        )
    return function


def as_arguments(mod_args: Any) -> tuple[Any, ...]:
    """Check `mod_args`; return contiguous arrays and Python numbers.

    Raises
    ------
    TypeError
        It is no tuple, or contains what a rule cannot read.
    """
    if not isinstance(mod_args, tuple | list):
        kind = f"{type(mod_args).__module__}.{type(mod_args).__qualname__}"
        raise TypeError(f"mod_args must be a tuple of arrays and numbers, got {kind}; write mod_args=(x,)")
    return tuple(_as_argument(f"mod_args[{n}]", x) for n, x in enumerate(mod_args))


def _as_argument(name: str, x: Any) -> Any:
    if type(x) is np.ndarray and x.ndim and x.dtype in _NAMES and x.flags.c_contiguous and x.size < 2**31:
        return x
    if isinstance(x, np.ndarray) and x.ndim:
        if is_masked(x):
            raise TypeError(f"{name} is a masked array, whose mask would be lost; pass its .data")
        if x.dtype.name not in ELEMENTS or not x.dtype.isnative:
            wanted = "float32" if x.dtype.kind not in "iub" else "int32" if x.dtype.itemsize < 4 else "int64"
            raise TypeError(
                f"{name} must have dtype bool, int32, int64, float32 or float64 in native byte order, got {x.dtype}; "
                f"convert it with .astype(numpy.{wanted})"
            )
        if x.size >= 2**31:
            raise ValueError(f"{name} must have less than 2**31 elements, got {x.size}")
        return np.ascontiguousarray(x.view(np.ndarray))
    if isinstance(x, np.generic | np.ndarray):
        x = x.item() if x.dtype.kind in "biuf" else x
    if isinstance(x, bool | float):
        return x
    if isinstance(x, int):
        if not -(2**63) <= x < 2**63:
            raise ValueError(f"{name} must fit 64 bits, got {x}")
        return int(x)
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    raise TypeError(f"{name} must be a numpy.ndarray or a number, got {kind}")


def describe(values: Sequence[Any]) -> tuple[Argument, ...]:
    """The kinds of checked `mod_args`."""
    return tuple([_describe(x) for x in values])


def _describe(x: Any) -> Argument:
    if isinstance(x, np.ndarray):
        return Argument(_NAMES[x.dtype], x.ndim)
    if isinstance(x, float):
        return Argument("float64", 0)
    if isinstance(x, bool):
        return Argument("bool", 0)
    return Argument("int32" if -(2**31) <= x < 2**31 else "int64", 0)


_NAMES = {np.dtype(name): name for name in ELEMENTS}


_WIDE = {"b": np.bool_, "i": np.int64, "f": np.float64}  # what arrays of mod_args are read as


class _Elements:
    """An array of `mod_args` whose elements are numbers of Python, as positions and scores are.

    The truth values of NumPy are no numbers: the sum of two is another one, and they have no opposite.
    """

    def __init__(self, array: Any) -> None:
        self._array = array

    def __getitem__(self, index: Any) -> Any:
        x = self._array[index]
        return _Elements(x) if isinstance(x, np.ndarray) else x.item()

    def __len__(self) -> int:
        return len(self._array)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._array, name)


def vectorized(role: str, function: Any, values: tuple[Any, ...]) -> Callable[..., Any]:
    """The plain function, called by Python for each element of its first arguments; `values` are its `mod_args`.

    Where Python refuses to divide by zero, numbers of NumPy take their place, which give infinity, NaN or the integer 0
    as kernels do.
    """
    rule = plain(function, role)
    wide = [x.astype(_WIDE[x.dtype.kind]) if isinstance(x, np.ndarray) else x for x in values]
    plainly = [_Elements(x) if isinstance(x, np.ndarray) else x for x in wide]

    def one(*first: Any) -> Any:
        try:
            return rule(*first, *plainly)
        except ZeroDivisionError:
            with np.errstate(all="ignore"):
                return rule(*(np.asarray(x)[()] for x in first), *wide)

    return np.vectorize(one, otypes=[float if role == SCORE else bool])


__all__ = ["PARAMETERS", "Rule", "as_arguments", "describe", "find", "plain", "vectorized"]
