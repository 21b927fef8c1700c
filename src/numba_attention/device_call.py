"""Calls on a GPU: arrays become headers, the code for NumPy arrays runs on them, and results become arrays again.

`run` is the only place that sees both the caller's arrays and the headers that the package works on.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np

from .caches.contents import Contents
from .cuda import tile_shapes
from .device import arrays, replay, runtime
from .device.headers import address_of, held
from .device.operands import Operands, Seen, look
from .errors import kind_of
from .masks.blockmask import BlockMask
from .options import NO_OPTIONS, PER_SCORE, Array, Options
from .validation import as_array, as_bools, as_floats, check_out

Result = TypeVar("Result")


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
    options: Options,
    *,
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
    options : Options
    out : array, optional
        Array for the result, which is passed to `function` only if it is not None.
    small : dict, optional
        Arguments that the host reads. They are copied from the device if they are on it.
    """
    seen = None if out is not None or small else _look(function, operands, options, rest)
    if seen is not None:
        recorded = replay.find(seen.key)
        if recorded is not None:
            return cast(Result, seen.repeat(recorded))
    call = Call({name: x for name, x in operands.items() if x is not None})
    with runtime.using(call.device, call.stream):
        if seen is not None:
            with replay.recording(seen.addresses) as recorder:
                moved = {name: None if x is None else call.device_array(name, x) for name, x in operands.items()}
                headers = function(backend, **moved, options=options, **rest, empty=call.empty)
                recorder.keep(seen.key, headers)
            return cast(Result, call.give(headers))
        moved = {name: None if x is None else call.device_array(name, x) for name, x in operands.items()}
        moved |= {name: arrays.to_host(x) for name, x in (small or {}).items()}
        target = call.out(out, operands | options._asdict())
        if target is not None:
            moved["out"] = target
        headers = function(backend, **moved, options=call.options(options), **rest, empty=call.empty)
        result: Result = _with_out(call, headers, target, out)
        call.finish()
        return result


_PLAIN = frozenset((type(None), bool, int, float, str))  # types of options that are not arrays


def _is_plain(x: Any) -> bool:
    kind = type(x)
    return kind in _PLAIN or (kind is tuple and _PLAIN.issuperset(map(type, x)))


def _look(
    function: Callable[..., Any], operands: dict[str, Any], options: Options, rest: dict[str, Any]
) -> Seen | None:
    """Return the key of a call that can be repeated: of arrays of one library on one stream, with plain options."""
    if options is not NO_OPTIONS and not all(map(_is_plain, options)):
        return None
    of_rest: list[Any] = []
    for x in rest.values():
        if type(x) in _PLAIN:
            of_rest.append(x)
            continue
        described = x.look() if isinstance(x, Contents) else x if _is_plain(x) else None
        if described is None:
            return None
        of_rest.append(described)
    seen = look(operands.values())
    if seen is None:
        return None
    of_options = None if options is NO_OPTIONS else (options, type(options.is_causal))
    return seen.of(function, of_options, *of_rest, tile_shapes.state())


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
