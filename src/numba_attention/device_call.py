"""A call whose work is on a device: its arrays become headers, the same code runs on them, its results go back.

`run` is the only place where what a caller holds and what the package works on differ.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from .caches.contents import Contents
from .cuda import tile_shapes
from .device import arrays, replay, runtime
from .device.driver import identity
from .device.headers import address_of, held
from .options import PER_SCORE, Array, Options
from .validation import as_array, as_bools, as_floats, check_out, kind_of

Result = TypeVar("Result")


class Call:
    """One call on a device: where it runs, and how its arguments and results are moved.

    Parameters
    ----------
    operands : dict of str to array
        The arrays that decide on the device, by the name of the argument. The first one decides on the kind of results.
    """

    def __init__(self, operands: dict[str, Any]) -> None:
        families = {name: arrays.family_of(x) for name, x in operands.items()}
        self._families = {id(operands[name]): family for name, family in families.items()}
        self._places: dict[str, int] = {}  # GPUs by argument
        stream = None
        self._leader = ""  # the library whose stream it is
        for name, family in families.items():
            if family is not arrays.HOST:
                self._place(name, family, operands[name])
                if stream is None:
                    self._leader = family.name
                    stream = family.stream(operands[name], self._places[name]) or runtime.DEFAULT_STREAM
        self.device = next(iter(self._places.values())) if self._places else runtime.driver.current()
        self.stream = stream or runtime.DEFAULT_STREAM
        self.family = next(iter(families.values()), arrays.HOST)
        self._others: set[int] = set()  # streams of inputs that are not this one
        self._waits = False
        # What was moved, by identity: in self-attention one array is all three.
        self._known: dict[int, tuple[Any, Array]] = {}

    def _place(self, name: str, family: arrays.Family, x: Any) -> None:
        self._places[name] = family.ordinal(x)
        if len(set(self._places.values())) > 1:
            said = ", ".join(f"{name} is on GPU {ordinal}" for name, ordinal in self._places.items())
            raise ValueError(f"{' and '.join(self._places)} must be on one GPU: {said}")

    def device_array(self, name: str, x: Any) -> Array:
        """Make the header of an array that may be on the device or the host; from there it is copied."""
        found = self._known.get(id(x))
        if found is None:
            found = self._known[id(x)] = x, self._device_array(name, x)
        return found[1]

    def _device_array(self, name: str, x: Any) -> Array:
        family = self._families.get(id(x)) or arrays.family_of(x)
        if family is arrays.HOST:
            if not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray | np.matrix):
                raise TypeError(f"{name} must be a numpy.ndarray or an array on a GPU, got {kind_of(x)}")
            if x.dtype.hasobject or x.dtype.names:
                return x  # refused by whoever looks at dtypes, in its own words
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

    def options(self, given: Options) -> Options:
        """Mask and bias on the device, all else on the host."""
        changed: dict[str, Any] = {}
        for name, check in (("mask", as_bools), ("bias", as_floats)):
            x = getattr(given, name)
            if x is not None:
                there = arrays.family_of(x) is not arrays.HOST
                changed[name] = self.device_array(name, x if there else check(name, as_array(name, x)))
        for name, x in zip(Options._fields, given, strict=True):
            if x is not None and name not in PER_SCORE and arrays.on_device(x):
                changed[name] = arrays.to_host(x)
        return given._replace(**changed) if changed else given

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Make room for a result, of the caller's kind."""
        made = self.family.empty(shape, np.dtype(dtype), self.device, self.stream)
        recorder = replay.current()
        if recorder is not None:
            recorder.make(made, is_result=True)
        return made

    def out(self, out: Any, inputs: dict[str, Any]) -> Array | None:
        """Make the header of what the caller wants the result in."""
        if out is None:
            return None
        if arrays.on_device(out):
            return self.device_array("out", out)
        if self.family is not arrays.HOST:
            raise TypeError(f"out must be on the GPU as query is, got {kind_of(out)}")
        check_out(out, getattr(out, "shape", ()), getattr(out, "dtype", None), _of_host(inputs))  # type: ignore[arg-type]
        return runtime.empty(out.shape, out.dtype, self.stream)

    def give(self, result: Any) -> Any:
        """Turn headers among results, in tuples and lists, into arrays of the caller's kind."""
        if isinstance(result, np.ndarray):
            return result if held(result) is None else self.family.give(result, self.stream)
        if isinstance(result, list):
            return [self.give(x) for x in result]
        if isinstance(result, tuple):
            given = [self.give(x) for x in result]
            return type(result)(*given) if hasattr(result, "_fields") else tuple(given)
        return result

    def finish(self) -> None:
        """Let the owners of inputs wait for the work: they may write to them, or free them, as soon as this returns."""
        for stream in self._others:
            runtime.driver.wait(stream, self.stream)
        if self._waits:  # a library that cannot be told of a stream
            runtime.driver.synchronize(self.stream)


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
    """Call ``function(backend, **operands, **small, options=, **rest, empty=)`` as the device sees the arguments.

    Parameters
    ----------
    function : callable
        What runs on the host too. It asks its arrays for shapes, strides, dtypes and addresses only.
    backend : Backend
    operands : dict
        Arrays by argument; None and what is no array of a device or the host are left to `function`.
    options : Options
    out : array, optional
        Where the result is to go; `function` is passed it only if it is given.
    small : dict, optional
        Arguments that the host reads: copied from the device if they are there.
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
                made = function(backend, **moved, options=options, **rest, empty=call.empty)
                recorder.keep(seen.key, made)
            return cast(Result, call.give(made))
        moved = {name: None if x is None else call.device_array(name, x) for name, x in operands.items()}
        moved |= {name: arrays.to_host(x) for name, x in (small or {}).items()}
        target = call.out(out, operands | options._asdict())
        if target is not None:
            moved["out"] = target
        found = function(backend, **moved, options=call.options(options), **rest, empty=call.empty)
        result: Result = _with_out(call, found, target, out)
        call.finish()
        return result


_PLAIN = (type(None), bool, int, float, str)  # what an option may be that is no array


def _is_plain(x: Any) -> bool:
    return type(x) in _PLAIN or (type(x) is tuple and all(type(y) in _PLAIN for y in x))


class _Seen(NamedTuple):
    """All that a call follows from, as a key, and what differs from one such call to the next."""

    key: Any
    addresses: list[int]
    family: arrays.Family
    device: int
    stream: int

    def repeat(self, recorded: replay.Recorded) -> Any:
        device, stream = self.device, self.stream

        def new(shape: tuple[int, ...], dtype: Any) -> tuple[Any, int]:
            return self.family.new(shape, dtype, device, stream)

        with runtime.driver.on(device):
            return recorded.repeat(runtime.driver, self.addresses, new, new if self.family.has_pool else None, stream)


def _look(
    function: Callable[..., Any], operands: dict[str, Any], options: Options, rest: dict[str, Any]
) -> _Seen | None:
    """Look at a call that may have been made before: of arrays of one library on one stream, and plain options."""
    if not all(_is_plain(option) for option in options):
        return None
    of_rest = [x.look() if isinstance(x, Contents) else (x,) if _is_plain(x) else None for x in rest.values()]
    if None in of_rest:
        return None
    looks: list[Any] = []
    addresses: list[int] = []
    family = places = None
    for x in operands.values():
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
        looks.append(look[0])
        addresses.append(look[1])
        if look[0][3:] != (places := places or look[0][3:]):  # on another device, or another stream
            return None
    if family is None or places is None:
        return None
    device = places[0]
    stream = family.stream(first, device) or runtime.DEFAULT_STREAM
    known = addresses if len(set(addresses)) == len(addresses) else None
    alike = None if known else [addresses.index(address) for address in addresses]
    key = (
        function, runtime.driver, family.name, *looks, *[address % 16 for address in addresses], *(alike or ()),
        options, type(options.is_causal), *of_rest, stream, identity(stream), tile_shapes.state(),
    )  # fmt: skip
    return _Seen(key, addresses, family, device, stream)


def _with_out(call: Call, result: Any, target: Array | None, out: Any) -> Any:
    """The results as the caller sees them; the caller's own array where it gave one."""
    if target is None:
        return call.give(result)
    first, *others = result if isinstance(result, tuple) else (result,)
    assert first is target
    if isinstance(out, np.ndarray):
        runtime.download(target, out, call.stream)
    given = (out, *(call.give(x) for x in others))
    return given if isinstance(result, tuple) else out


def through_host(function: Callable[..., Any], **arguments: Any) -> Any:
    """Call a function of small arrays that has no kernel: copy its arguments to the host, and its results back."""
    found = [x for given in arguments.values() for x in (given if isinstance(given, list | tuple) else [given])]
    call = Call({"arrays": next(x for x in found if arrays.on_device(x))})

    def there(x: Any) -> Any:
        return [there(part) for part in x] if isinstance(x, list | tuple) else arrays.to_host(x)

    def back(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return type(x)(back(part) for part in x)
        made = call.empty(x.shape, x.dtype)
        runtime.driver.write(address_of(made), x, call.stream)
        return call.family.give(made, call.stream)

    with runtime.using(call.device, call.stream):
        return back(function(**{name: there(x) for name, x in arguments.items()}))
