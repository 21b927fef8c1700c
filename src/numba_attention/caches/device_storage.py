"""Storage of a cache whose arrays are on a GPU: kernels write to it what `Storage` writes on the host."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..device import replay, runtime
from ..device.headers import address_of, has_whole_words
from ..device.operands import Operands, Seen, look, words_of
from ..options import Array
from .storage import Arrays, Storage

WARPS = 4
CHUNK = 16  # bytes that are copied at a time where rows allow it
Originals = tuple[Any, Any, Any, Any]  # arrays of a cache as the caller passed them


class Side(NamedTuple):
    """Keys or values to be written."""

    source: Array  # (sequences, heads, tokens, features)
    target: Array  # (rows, heads, places, features)
    scale: Array | None = None  # (rows, heads, places)


@dataclass(frozen=True)
class DeviceStorage(Storage):
    """A storage format on a GPU, whose arrays are headers."""

    on_device = True

    @classmethod
    def of(cls, form: Storage) -> "DeviceStorage":
        return cls(form.name, form.dtype, form.limit, form.square)

    def look(
        self, originals: Originals, rows: list[tuple[int, int]], key: Any, value: Any, start: int, dtype: Any
    ) -> Seen | None:  # fmt: skip
        """Return what storing new arrays from a place on depends on, with the addresses of that place; see `replay`.

        `dtype` is that of the cache, which new arrays must have; `rows` are the address of each array of the cache, and
        the bytes from one of its rows to the next.
        """
        # `look` passes over None, and the addresses would be those of other arrays.
        seen = None if key is None or value is None else look((key, value, *originals))
        if seen is None:
            return None
        seen.addresses = [*seen.addresses[:2], *[address + start * stride for address, stride in rows]]
        seen.add("append", self.name, dtype, words_of(seen.addresses))
        return seen

    def repeat(self, seen: Seen) -> bool:
        """Store as in an earlier call that differs in addresses alone, if there was one."""
        recorded = replay.find(seen.key)
        if recorded is not None:
            seen.repeat(recorded)
        return recorded is not None

    @contextmanager
    def using(self, originals: Originals, seen: Seen | None = None, **new: Any) -> Iterator[list[Array]]:
        """Run a block in the order of the streams of a cache and of new arrays, whose headers it gets.

        What it does can then be repeated if it was `seen`.
        """
        names = ("cache.key", "cache.value", "cache.key_scale", "cache.value_scale")
        held = {name: x for name, x in zip(names, originals, strict=True) if x is not None}
        call = Operands(new | held)
        with runtime.using(call.device, call.stream):
            for name, x in held.items():
                call.device_array(name, x)  # waits for the stream of that array
            if seen is None:
                yield [call.device_array(name, x) for name, x in new.items()]
            else:
                with replay.recording(seen.addresses) as recorder:
                    yield [call.device_array(name, x) for name, x in new.items()]
                recorder.keep(seen.key, None)
            call.finish()

    def extend(self, arrays: Arrays, key: Array, value: Array, start: int) -> None:
        tokens = key.shape[2]
        # The place is a part of the addresses, so that a call at another place repeats the launch.
        places: Any = [None if x is None else x[:, :, start : start + tokens] for x in arrays]
        _write(self._sides(places, key, value), self.limit is not None, len(key) * tokens)

    def scatter(
        self, arrays: Arrays, key: Array, value: Array, source: tuple[Array, Array], to: tuple[Array, Array]
    ) -> None:
        _write(self._sides(arrays, key, value), self.limit is not None, len(to[0]), entries=(*source, *to))

    def _sides(self, arrays: Arrays, key: Array, value: Array) -> list[Side]:
        return [Side(key, arrays[0], arrays[2]), Side(value, arrays[1], arrays[3])]

    def move(self, arrays: Arrays, sources: Array, targets: Array, tokens: int) -> None:
        places = np.arange(tokens)
        if not np.intersect1d(sources, targets).size:
            _copy(arrays, arrays, _each(sources, places), _each(targets, places))
            return
        scratch = _scratch(arrays, len(sources), tokens)
        own = _each(np.arange(len(sources)), places)
        _copy(arrays, scratch, _each(sources, places), own)
        _copy(scratch, arrays, own, _each(targets, places))

    def saved(self, arrays: Arrays, rows: Array, places: Array) -> Callable[[], None]:
        scratch = _scratch(arrays, *places.shape)
        there = np.repeat(rows.ravel(), places.shape[1]), places.ravel()
        own = _each(np.arange(len(places)), np.arange(places.shape[1]))
        _copy(arrays, scratch, there, own)
        return lambda: _copy(scratch, arrays, own, there)


def _each(rows: Array, places: Array) -> tuple[Array, Array]:
    """Return row and place of every place of every row."""
    return np.repeat(rows, len(places)), np.tile(places, len(rows))


def _scratch(arrays: Arrays, rows: int, places: int) -> Arrays:
    """Allocate arrays like those of a cache, for so many rows and places."""
    stream = runtime.stream()
    shapes = (None if x is None else (rows, x.shape[1], places, *x.shape[3:]) for x in arrays)
    found = (None if s is None else runtime.empty(s, x.dtype, stream) for s, x in zip(shapes, arrays, strict=True))  # type: ignore[union-attr]
    return tuple(found)  # type: ignore[return-value]


def _copy(sources: Arrays, targets: Arrays, of: tuple[Array, Array], to: tuple[Array, Array]) -> None:
    """Copy what is stored at rows and places, scales too."""
    _write([Side(sources[0], targets[0]), Side(sources[1], targets[1])], False, len(to[0]), entries=(*of, *to))
    scales = [
        Side(source[..., None], target[..., None])
        for source, target in zip(sources[2:], targets[2:], strict=True)
        if source is not None and target is not None
    ]
    if scales:
        _write(scales, False, len(to[0]), entries=(*of, *to))


def _write(sides: Sequence[Side], scaled: bool, tokens: int, entries: tuple[Array, ...] | None = None) -> None:
    """Launch the kernel that writes tokens: of `entries` (sequence, token, row, place), or each to its own place."""
    from ..cuda import append, kernels
    from ..cuda.parameters import REALS
    from ..cuda.spec import Spec

    source, target, _ = sides[0]
    heads, each = target.shape[1], source.shape[2]
    if not tokens:
        return
    if tokens * heads >= 2**31:
        raise ValueError(
            f"a call can append up to 2**31 rows to a cache on a GPU, got {tokens} tokens of {heads} heads"
        )
    copied = source.dtype == target.dtype and not scaled
    wide = copied and all(has_whole_words(x, CHUNK) for side in sides for x in side[:2])
    of, to = source.dtype.name, target.dtype.name
    if copied:
        of = to = "float32" if wide else append.element_storage(source.itemsize)
    integers = []
    for n in range(2):
        x, y, scale = sides[min(n, len(sides) - 1)]
        features, columns = x.shape[-1], [x.strides[-1], y.strides[-1]]
        if wide:  # words of 32 bits
            features, columns = features * x.itemsize // 4, [4, 4]
        addresses = [address_of(x), address_of(y), 0 if scale is None else address_of(scale)]
        of_scale = (0, 0, 0) if scale is None else scale.strides
        integers += [*addresses, *x.strides[:3], columns[0], *y.strides[:3], columns[1], *of_scale, features]
    listed = None
    if entries is not None:
        listed = runtime.upload(np.stack(entries, axis=1).astype(np.int32), runtime.stream())
    integers += [0 if listed is None else address_of(listed), heads, tokens, each]
    device = runtime.current_device()
    c = Spec("append", of, 32, 32, warps=WARPS, aligned=wide, to=to, arch=device.arch)
    grid = (-(-tokens * heads // WARPS), len(sides), 1)
    runtime.launch(kernels.compiled(c), grid, integers, [0.0] * len(REALS), runtime.stream())
