"""The backends, and the choice of one for a call: by argument, context, process default, environment or array type."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from ..device.arrays import on_device
from ..errors import BackendUnavailableError
from ..foreign import Family, family_for
from ..options import Array
from ..problem.dense import BackwardProblem, Empty, Problem
from ..problem.second import SecondProblem

ENVIRONMENT = "NUMBA_ATTENTION_BACKEND"


class Backend(Protocol):
    """The interface of a backend module. Its functions write into the arrays of the problem."""

    on_device: bool  # whether the arrays of its problems are headers of GPU memory

    def forward(self, problem: Problem) -> None:
        """Write ``problem.out`` and, if it is not None, ``problem.lse``."""

    def weights(self, problem: Problem) -> None:
        """Write the probabilities of the chosen heads and rows to ``problem.out``."""

    def backward(self, problem: BackwardProblem) -> None:
        """Write the gradients of query, key and value, and make those of bias and sinks."""

    def reduce(self, x: Array, shape: tuple[int, ...], dtype: Any, empty: Empty) -> Array:
        """Sum over the axes along which `shape` was broadcast to that of x, and convert to `dtype`.

        x itself is returned if nothing is to be done, and otherwise an array that `empty` makes.
        """

    def unusable(self) -> str | None:
        """Why this backend cannot run here, or None."""


class SecondDerivatives(Protocol):
    """The module of a backend for derivatives of `attention` along a direction, and of its gradients."""

    def run(self, problem: SecondProblem) -> None:
        """Write the tangents of the results, of the gradients, or both: see `SecondProblem`."""

    def run_with_forward(self, problem: SecondProblem, forward: Problem) -> None:
        """Write the results of the forward pass, which are inputs of the problem, and their tangents."""


NAMES = ("cpu", "cuda", "reference")
# The innermost name is what calls look up. The blocks are there for generators, which may end in another order than
# they began: resetting a variable to what it was before would then bring back the choice of a block that has ended.
_context: ContextVar[str | None] = ContextVar("numba_attention_backend", default=None)
_blocks: ContextVar[tuple["_Block", ...]] = ContextVar("numba_attention_backends", default=())
_default: str | None = None


def check_name(name: str, source: str) -> str:
    """Check the name of a backend, from `source`."""
    if not isinstance(name, str):
        raise TypeError(
            f"{source} must be one of {('auto', *NAMES)}, got {type(name).__module__}.{type(name).__qualname__}"
        )
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of {('auto', *NAMES)}")
    return name


def _load(name: str) -> Backend:
    module = import_module(f"{__name__}.{name}")
    if getattr(module.__spec__, "_initializing", False):  # by this thread: for others, the import waits
        raise RuntimeError(
            f"the backend {name!r} is still being imported by what a signal handler or finalizer interrupted; call "
            "once what handlers need before they are installed"
        )
    return cast(Backend, module)


_usable: dict[str, Backend] = {}


def _get(name: str) -> Backend:
    backend = _usable.get(name)
    if backend is None:
        backend = _load(name)
        why = backend.unusable()
        if why is not None:
            raise BackendUnavailableError(f"backend {name!r} cannot run here: {why}")
        _usable[name] = backend
    return backend


# Every call looks up the environment variable. If it is not set, `os.environ.get` raises and catches an exception,
# which takes 1 µs of the 16 of a step of decoding. So the look-up uses the plain dictionary behind `os.environ`.
_variables: Any = getattr(os.environ, "_data", os.environ)
_variable = os.environ.encodekey(ENVIRONMENT) if _variables is not os.environ else ENVIRONMENT


def _of_environment() -> str:
    name = os.environ.get(ENVIRONMENT)
    return "auto" if not name else check_name(name, f"environment variable {ENVIRONMENT}")


def select(name: str | None, *arrays: Any) -> Backend:
    """Return the backend for one call. The argument takes precedence, then context, default and environment.

    If the first array is one of another library, on the host, its `Family` is returned instead.
    """
    if name is None:
        name = _context.get() or _default
        if name is None:
            name = "auto" if _variable not in _variables else _of_environment()
    else:
        check_name(name, "backend")
    for array in arrays:
        if type(array) is not np.ndarray:
            return _select_for_others(name, arrays)
    return _get("cpu" if name == "auto" else name)


def _select_for_others(name: str, arrays: Sequence[Any]) -> Backend:
    """Return the backend for arrays that are not all of NumPy's own type, or the family that the call goes to."""
    kind = type(arrays[0])
    if name == "auto" and all([type(x) is kind for x in arrays]) and on_device(arrays[0]):  # noqa: C419 - 0.2 us less
        return _get("cuda")
    are_on_device = list(map(on_device, arrays))
    some_on_device = any(are_on_device)
    if not all(are_on_device):
        family = family_for(arrays)
        if family is not None and family.is_lazy:
            return cast(Backend, family)  # its tasks choose, on machines that may have a GPU where this has none
    if name == "auto":
        name = "cuda" if some_on_device else "cpu"
    chosen = _get(name)
    if not chosen.on_device and not some_on_device:
        family = family_for(arrays)
        if family is not None:
            return cast(Backend, family)
    return chosen


def is_host_default() -> bool:
    """Whether a call on NumPy arrays that names no backend runs on the CPU backend."""
    name = _context.get() or _default
    return (name is None and _variable not in _variables) or name == "auto" or name == "cpu"


def second_derivatives(backend: Backend) -> SecondDerivatives:
    """Return the module of a backend for second derivatives, which the backend for GPUs does not have."""
    if isinstance(backend, Family):
        raise TypeError(
            f"second derivatives take numpy.ndarray, got {backend.name}; convert each array with {backend.conversion}"
        )
    if backend.on_device:
        raise NotImplementedError(
            "backend 'cuda' has no second derivatives; copy the arrays to the host, or use backend='cpu'"
        )
    name = vars(backend)["__name__"]
    return cast(SecondDerivatives, import_module(f"{name}_second"))


def set_backend(name: str) -> None:
    """Choose the backend of every later call in this process that does not choose its own.

    Parameters
    ----------
    name : {"auto", "cpu", "cuda", "reference"}
        "auto" takes cuda for arrays on a GPU and cpu for NumPy arrays; "reference" is textbook NumPy in float64.

    Raises
    ------
    ValueError
        Unknown name.
    BackendUnavailableError
        The backend cannot run here; the message says why.

    Examples
    --------
    >>> import numba_attention as na
    >>> na.set_backend("auto")
    """
    global _default
    if check_name(name, "set_backend") != "auto":
        _get(name)
    _default = name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend of the calls inside a ``with`` block, in this thread or task only.

    Parameters
    ----------
    name : {"auto", "cpu", "cuda", "reference"}
        As in `set_backend`.

    Raises
    ------
    ValueError, BackendUnavailableError
        As in `set_backend`.

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> q = np.ones((3, 4))
    >>> with na.use_backend("reference"):
    ...     na.attention(q, q, q).shape
    (3, 4)
    """
    if check_name(name, "use_backend") != "auto":
        _get(name)
    block = _Block(name)
    try:
        _enter((*_blocks.get(), block))
        yield
    finally:
        _enter(tuple(other for other in _blocks.get() if other is not block))


class _Block:
    """A block of `use_backend` that is being run; two with one name are different."""

    def __init__(self, name: str) -> None:
        self.name = name


def _enter(blocks: tuple[_Block, ...]) -> None:
    _blocks.set(blocks)
    _context.set(blocks[-1].name if blocks else None)


class Status(NamedTuple):
    """Whether a backend can run here and, if not, why. True in a condition if it can."""

    usable: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.usable


def backends() -> dict[str, Status]:
    """Say which backends can run here and, for each that cannot, why.

    Returns
    -------
    dict
        Backend name to ``Status(usable, reason)``, which is true in a condition if the backend is usable.

    Examples
    --------
    >>> import numba_attention as na
    >>> na.backends()["reference"]
    Status(usable=True, reason='')
    """
    reasons = {name: _load(name).unusable() for name in NAMES}
    return {name: Status(why is None, why or "") for name, why in reasons.items()}


__all__ = ["Backend", "Status", "backends", "check_name", "second_derivatives", "select", "set_backend", "use_backend"]
