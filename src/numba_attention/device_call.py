"""Calls on a GPU: arrays become headers, the code for NumPy arrays runs on them, and results become arrays again.

`run` is the only place that sees both the caller's arrays and the headers that the package works on.
"""

from collections.abc import Callable, Mapping
from itertools import compress
from operator import is_not
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from .caches.contents import Contents
from .cuda import tile_shapes
from .device import arrays, replay, runtime
from .device.headers import address_of, held
from .device.operands import Operands, Seen, look
from .errors import kind_of
from .masks.blockmask import BlockMask
from .mods.language import MASK, SCORE
from .mods.rules import as_arguments, describe, find
from .options import IN_PYTHON, NO_OPTIONS, PER_SCORE, Array, Options, gather
from .validation import as_array, as_bools, as_floats, check_out

Result = TypeVar("Result")
CONTENTS = 4096  # bytes of an array or list on the host up to which comparing it takes less time than planning a call


class Call(Operands):
    """One call on a GPU: its device and stream, and the conversion of its arguments and results.

    The first operand determines the kind of results.
    """

    def options(self, settings: Options) -> Options:
        """Move mask and bias to the device, and all other options to the host."""
        changed: dict[str, Any] = {}
        for name, check in (("mask", as_bools), ("bias", as_floats)):
            x = getattr(settings, name)
            if x is not None and not isinstance(x, BlockMask):
                is_on_device = arrays.family_of(x) is not arrays.HOST
                changed[name] = self.device_array(name, x if is_on_device else check(name, as_array(name, x)))
        for name, x in zip(Options._fields, settings, strict=True):
            if x is not None and name not in PER_SCORE and arrays.on_device(x):
                changed[name] = arrays.to_host(x)
        if isinstance(settings.mod_args, tuple | list):
            changed["mod_args"] = tuple(self._of_mods(f"mod_args[{n}]", x) for n, x in enumerate(settings.mod_args))
        return settings._replace(**changed) if changed else settings

    def _of_mods(self, name: str, x: Any) -> Any:
        """Make the header of an array on the device that kernels read by index; numbers come to the host."""
        if not arrays.on_device(x):
            return x
        array = self.device_array(name, x)
        if not array.ndim:
            return arrays.to_host(x)
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} must be contiguous if it is on a GPU, got strides {array.strides}")
        return array

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Allocate a result of the caller's kind."""
        array = self.family.empty(shape, np.dtype(dtype), self.device, self.stream)
        recorder = replay.current()
        if recorder is not None:
            recorder.make(array, is_result=True)
        return array

    def out(self, out: Any, inputs: dict[str, Any]) -> Array | None:
        """Make the header of the array that the caller passed as `out`."""
        if out is None:
            return None
        if arrays.on_device(out):
            return self.device_array("out", out)
        if self.family is not arrays.HOST:
            raise TypeError(f"out must be on the GPU as query is, got {kind_of(out)}")
        check_out(out, getattr(out, "shape", ()), getattr(out, "dtype", None), _of_host(inputs))  # type: ignore[arg-type]
        return runtime.empty(out.shape, out.dtype, self.stream)

    def give(self, result: Any) -> Any:
        """Convert headers among results, also in tuples and lists, to arrays of the caller's kind."""
        if isinstance(result, np.ndarray):
            return result if held(result) is None else self.family.give(result, self.stream)
        if isinstance(result, list):
            return [self.give(x) for x in result]
        if isinstance(result, tuple):
            parts = [self.give(x) for x in result]
            return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
        return result


def _of_host(inputs: dict[str, Any]) -> dict[str, Array]:
    return {name: np.asarray(x) for name, x in inputs.items() if isinstance(x, np.ndarray)}


def run(
    function: Callable[..., Result],
    backend: Any,
    operands: dict[str, Any],
    options: Options | Mapping[str, Any],
    *,
    entry: Callable[..., Any] | None = None,
    out: Any = None,
    small: dict[str, Any] | None = None,
    **rest: Any,
) -> Result:
    """Call ``function(backend, **operands, **small, options=, **rest, empty=)`` with headers for the arrays.

    Parameters
    ----------
    function : callable
        The function that also runs on the host. It uses only shapes, strides, dtypes and addresses of its arrays.
    backend : Backend
    operands : dict
        Arrays by argument. None is passed on, and `function` checks anything that is no array.
    options : Options or mapping
        Those of `Options`, or what they are gathered from: only a call that is not repeated needs them.
    entry : callable, optional
        With a mapping: the function whose keyword arguments it has.
    out : array, optional
        Array for the result, which is passed to `function` only if it is not None.
    small : dict, optional
        Arguments that the host reads. They are copied from the device if they are on it.
    """
    seen = None if out is not None else _look(function, operands, options, rest | small if small else rest)
    if seen is not None:
        recorded = replay.find(seen.key)
        if recorded is not None:
            return cast(Result, seen.repeat(recorded))
    if not isinstance(options, Options):
        assert entry is not None
        options = gather(entry, options)
    call = Call({name: x for name, x in operands.items() if x is not None})
    addresses, seed = ((), None) if seen is None else (seen.addresses, seen.seed)
    with runtime.using(call.device, call.stream), replay.recording(addresses, seed) as recorder:
        moved = {name: None if x is None else call.device_array(name, x) for name, x in operands.items()}
        moved |= {name: arrays.to_host(x) for name, x in (small or {}).items()}
        target = call.out(out, operands | options._asdict())
        if target is not None:
            moved["out"] = target
        headers = function(backend, **moved, options=call.options(options), **rest, empty=call.empty)
        if seen is not None:
            recorder.keep(seen.key, headers)
        if runtime.is_capturing(call.stream):
            recorder.keep_alive()
        result: Result = _with_out(call, headers, target, out)
        call.finish()
        return result


_PLAIN = frozenset((type(None), bool, int, float, str))


def _describe(x: Any) -> Any:
    """Return what tells a value that the host reads from others, as a key; None if it is not worth comparing.

    The types are in the key because 1 and True are equal, and not all functions that take one take the other; numbers
    are, as they are written, because 0.0 and -0.0 are equal.
    """
    kind = type(x)
    if kind in _PLAIN:
        return kind, repr(x) if kind is float else x
    if kind is tuple or kind is list:
        is_short = 8 * len(x) <= CONTENTS  # as the array of these numbers
        return (kind, *map(_describe, x)) if is_short and _PLAIN.issuperset(map(type, x)) else None
    if kind is np.ndarray or isinstance(x, np.generic):
        if x.nbytes > CONTENTS or x.dtype.hasobject:
            return None
        return kind, x.dtype, x.shape, x.tobytes()
    if isinstance(x, Contents):
        return x.look()
    return x.token if isinstance(x, BlockMask) else None


class _Described(NamedTuple):
    """What the options of a call are, as a key; and the arrays on the GPU among them, those of mods last."""

    key: list[Any]
    arrays: list[Any]
    seed: int | None  # of dropout, which is not in the key: it is a number of the launches as addresses are
    of_mods: int  # how many arrays are those of mods, whose addresses are in memory of the GPU and not in a launch


def _describe_options(options: Options | Mapping[str, Any]) -> _Described | None:
    """Return what the options of a call are; None if a call with them is not repeated."""
    if isinstance(options, Options):
        options = dict(compress(zip(Options._fields, options, strict=True), map(is_not, options, NO_OPTIONS)))
    key: list[Any] = []
    found: list[Any] = []
    seed, has_mods = None, False
    for name, x in options.items():
        kind = type(x)
        if name == "seed" and kind is int and 0 <= x < 2**64:
            seed = x - 2**64 if x >= 2**63 else x
            key.append(name)
        elif kind in _PLAIN:
            key += name, kind, repr(x) if kind is float else x
        elif name in IN_PYTHON:
            has_mods = True
        elif name not in PER_SCORE:
            described = _describe(x)
            if described is None:
                return None
            key += name, described
        elif isinstance(x, BlockMask):
            key += name, x.token
        elif kind is np.ndarray:
            return None
        else:
            found.append(x)
            key.append(name)
    described = _Described(key, found, seed, 0)
    if not has_mods:
        return described
    try:
        return _with_mods(described, options)
    except (TypeError, ValueError):  # the checks of the call say what is wrong
        return None


def _with_mods(described: _Described, options: Mapping[str, Any]) -> _Described | None:
    """Add rules and their arguments: rules as they are now, because names outside of a function may have changed."""
    key, found, values = described.key, described.arrays, []
    count = len(found)
    given = options.get("mod_args", NO_OPTIONS.mod_args)
    if not isinstance(given, tuple | list):  # which the call refuses; to look at an iterator would empty it
        return None
    for x in given:
        if arrays.on_device(x):
            if arrays.family_of(x).look(x) is None:
                return None
            values.append(arrays.take(x, runtime.DEFAULT_STREAM))
            if not values[-1].ndim:  # a number, which the host reads
                return None
            found.append(x)
            key.append("array")
            continue
        contents = _describe(x)
        if contents is None:
            return None
        values.append(x)
        key.append(contents)
    arguments = as_arguments(values)
    kinds = describe(arguments)
    for role, name in ((SCORE, "score_mod"), (MASK, "mask_mod")):
        function = options.get(name)
        key.append(None if function is None else find(role, function, kinds, arguments))
    return described._replace(of_mods=len(found) - count)


def _look(
    function: Callable[..., Any],
    operands: dict[str, Any],
    options: Options | Mapping[str, Any],
    rest: dict[str, Any],
) -> Seen | None:
    """Return the key of a call that can be repeated: of arrays of one library on one stream."""
    of_rest = []
    for x in rest.values():
        described = _describe(x)
        if described is None:
            return None
        of_rest.append(described)
    if options is NO_OPTIONS or not options:
        seen = look(tuple(operands.values()))
        if seen is not None:
            seen.add(function, *of_rest, tile_shapes.state())
        return seen
    of_options = _describe_options(options)
    if of_options is None:
        return None
    seen = look((*operands.values(), *of_options.arrays))
    if seen is None:
        return None
    # The kernels read where arrays of mods are from memory that is written when the call is planned.
    fixed = seen.addresses[len(seen.addresses) - of_options.of_mods :]
    seen.add(function, *of_rest, tile_shapes.state(), tuple(of_options.key), tuple(fixed))
    seen.seed = of_options.seed
    return seen


def _with_out(call: Call, result: Any, target: Array | None, out: Any) -> Any:
    """Return the results as the caller sees them, with the caller's own `out` if there is one."""
    if target is None:
        return call.give(result)
    first, *others = result if isinstance(result, tuple) else (result,)
    assert first is target
    if isinstance(out, np.ndarray):
        runtime.download(target, out, call.stream)
    results = (out, *(call.give(x) for x in others))
    return results if isinstance(result, tuple) else out


def placed(x: Array, like: Any) -> Any:
    """Copy an array on the host to the GPU of another array, and return an array of the same library."""
    call = Call({"like": like})
    with runtime.using(call.device, call.stream):
        replay.refuse_copy(runtime.is_capturing(call.stream))
        array = call.empty(x.shape, x.dtype)
        if x.size:
            runtime.driver.write(address_of(array), x, call.stream)
        return call.give(array)


def zeros(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """Return zeros on the GPU of another array, as an array of the same library."""
    call = Call({"like": like})
    with runtime.using(call.device, call.stream):
        array = call.empty(shape, dtype)
        if array.size:
            runtime.driver.clear(address_of(array), array.nbytes, call.stream)
        return call.give(array)
