"""Calls like earlier ones: the headers of their arrays are compared with those of calls that passed every check.

A row of a table describes the arrays of a call: a word that says what else the call was (its options), and for each
array the dtype, the number of axes, the shape and the strides. An array matches if it is exactly a `numpy.ndarray`, is
aligned and has the same header; None, subclasses, other byte orders and all else match nothing.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..sequence_record import SEQUENCE
from .cache import Function
from .machine_code import part
from .objects import ALIGNED, DESCR, DIMS, FLAGS, ND, STRIDES, TYPE, data_of
from .params import ADDRESSES, PARAMS
from .pool import call_on_threads, call_worker
from .simd import void_pointer
from .views import carray

AXES = 5  # most axes of an array
ARRAY = 2 + 2 * AXES  # words of an array: dtype, number of axes, shape, strides
WORDS = PARAMS.itemsize // 8
ARRAY_TYPE = id(np.ndarray)
_INDEX = {name: n for n, name in enumerate(ADDRESSES)}
COUNTER, SCRATCH, LSE = (_INDEX[name] for name in ("counter", "scratch", "lse"))
SEQUENCES, COUNTS, PARTIAL = (_INDEX[name] for name in ("sequences", "counts", "partial"))
ITEMS = len(ADDRESSES)  # the first of the integers after the addresses
GRAD_OUT, GRAD_QUERY, GRAD_KEY, GRAD_VALUE = (
    _INDEX[name] for name in ("grad_out", "grad_query", "grad_key", "grad_value")
)
_FIELDS = {name: n for n, name in enumerate(SEQUENCE.names)}  # type: ignore[arg-type]
SEQUENCE_WORDS = len(_FIELDS)
ROWS, KEYS, OFFSET, FIRST, PAGES, KEY_SCALE, VALUE_SCALE = (
    _FIELDS[name] for name in ("rows", "keys", "offset", "first", "pages", "key_scale", "value_scale")
)


def row_of(kind: int, arrays: tuple[Any, ...]) -> list[int]:
    """The row of a call with these arrays."""
    row = [kind]
    for x in arrays:
        shape, strides = list(x.shape), list(x.strides)
        row += [id(x.dtype), x.ndim, *shape, *strides, *[0] * (ARRAY - 2 - 2 * x.ndim)]
    return row


def template_of(rest: bytes, items: int, addresses: dict[str, int]) -> np.ndarray[Any, Any]:
    """The record of a call without the addresses of its arrays, and with those that are named here."""
    record = np.zeros(1, PARAMS)
    words = record.view(np.int64)
    words[len(ADDRESSES) :] = np.frombuffer(rest, np.int64)
    record["items"] = items
    for name, address in addresses.items():
        record[name] = address
    return words


@part
def _matches(array: int, row: int, ndarray: int) -> bool:
    """Whether the array whose object is at an address has the header at `row`."""
    header = carray(void_pointer(array), FLAGS + 1, np.int64)
    want = carray(void_pointer(row), ARRAY, np.int64)
    if header[TYPE] != ndarray or header[DESCR] != want[0] or header[FLAGS] & ALIGNED == 0:
        return False
    n = want[1]
    if header[ND] & 0xFFFFFFFF != n:
        return False
    shape = carray(void_pointer(header[DIMS]), AXES, np.int64)
    strides = carray(void_pointer(header[STRIDES]), AXES, np.int64)
    for axis in range(n):  # noqa: SIM110 - Numba compiles no generators without reference counts
        if shape[axis] != want[2 + axis] or strides[axis] != want[2 + n + axis]:
            return False
    return True


def _make_match_three() -> Callable[..., int]:
    def match(a: int, b: int, c: int, kind: int, table: int, count: int, ndarray: int) -> int:
        """The number of the row that a call with these arrays matches, or -1."""
        at = table
        for n in range(count):
            if (
                carray(void_pointer(at), 1, np.int64)[0] == kind
                and _matches(a, at + 8, ndarray)
                and _matches(b, at + 8 * (1 + ARRAY), ndarray)
                and _matches(c, at + 8 * (1 + 2 * ARRAY), ndarray)
            ):
                return n
            at += 8 * (1 + 3 * ARRAY)
        return -1

    return match


def _make_match_six() -> Callable[..., int]:
    def match(
        a: int, b: int, c: int, d: int, e: int, f: int, kind: int, table: int, count: int, ndarray: int
    ) -> int:  # fmt: skip
        at = table
        for n in range(count):
            if (
                carray(void_pointer(at), 1, np.int64)[0] == kind
                and _matches(a, at + 8, ndarray)
                and _matches(b, at + 8 * (1 + ARRAY), ndarray)
                and _matches(c, at + 8 * (1 + 2 * ARRAY), ndarray)
                and _matches(d, at + 8 * (1 + 3 * ARRAY), ndarray)
                and _matches(e, at + 8 * (1 + 4 * ARRAY), ndarray)
                and _matches(f, at + 8 * (1 + 5 * ARRAY), ndarray)
            ):
                return n
            at += 8 * (1 + 6 * ARRAY)
        return -1

    return match


@part
def _begin(template: int, params: int, counter: int, scratch: int) -> None:
    """Copy the record of an earlier call; the caller then writes the addresses of this one's arrays."""
    source = carray(void_pointer(template), WORDS, np.int64)
    target = carray(void_pointer(params), WORDS, np.int64)
    for n in range(WORDS):
        target[n] = source[n]
    target[COUNTER], target[SCRATCH] = counter, scratch
    carray(void_pointer(counter), 1, np.int64)[0] = 0


@part
def _run(worker: int, params: int, pool: int, threads: int) -> int:
    if threads == 1:
        return int(call_worker(worker, params, np.int64(0)))
    return int(call_on_threads(pool, worker, params, threads))


def _make_forward() -> Callable[..., int]:
    def recall_forward(
        query: int, key: int, value: int, out: int, lse: int, template: int, params: int, counter: int, scratch: int,
        worker: int, pool: int, threads: int,
    ) -> int:  # fmt: skip
        _begin(template, params, counter, scratch)
        p = carray(void_pointer(params), WORDS, np.int64)
        p[0], p[1], p[2], p[3] = data_of(query), data_of(key), data_of(value), data_of(out)
        if p[LSE] != 0:
            p[LSE] = data_of(lse)
        return int(_run(worker, params, pool, threads))

    return recall_forward


@part
def _stride_of(array: int) -> int:
    """The first stride of the array whose object is at an address."""
    header = carray(void_pointer(array), STRIDES + 1, np.int64)
    return int(carray(void_pointer(header[STRIDES]), 1, np.int64)[0])


def _make_decode() -> Callable[..., int]:
    def recall_decode(
        query: int, key: int, value: int, out: int, lse: int, key_scale: int, value_scale: int, lengths: int,
        table: int, template: int, params: int, counter: int, scratch: int, worker: int, pool: int,
        threads: int, sequences: int, number: int, longest: int, splits: int, items: int, room: int, split: int,
        paged: int,
    ) -> int:  # fmt: skip
        """After `room` bytes of scratch memory lie the records of the sequences, counts, and partial states."""
        _begin(template, params, counter, scratch)
        p = carray(void_pointer(params), WORDS, np.int64)
        p[0], p[1], p[2], p[3] = data_of(query), data_of(key), data_of(value), data_of(out)
        if p[LSE] != 0:
            p[LSE] = data_of(lse)
        words = number * SEQUENCE_WORDS
        source = carray(void_pointer(sequences), words, np.int64)
        p[SEQUENCES] = scratch + room
        target = carray(void_pointer(p[SEQUENCES]), words, np.int64)
        length, step, first = data_of(lengths), _stride_of(lengths), 0
        for n in range(number):
            at = n * SEQUENCE_WORDS
            for word in range(at, at + SEQUENCE_WORDS):
                target[word] = source[word]
            # Another thread may append meanwhile: no more keys are read than there is room for.
            keys = min(carray(void_pointer(length + n * step), 1, np.int64)[0], longest)
            target[at + KEYS], target[at + OFFSET] = keys, keys - target[at + ROWS]
            if paged != 0:
                target[at + PAGES] = data_of(table) + n * _stride_of(table)
            if key_scale != lengths:
                own = 0 if paged != 0 else n
                target[at + KEY_SCALE] = data_of(key_scale) + own * _stride_of(key_scale)
                target[at + VALUE_SCALE] = data_of(value_scale) + own * _stride_of(value_scale)
            if split != 0:  # the template says how many tiles there are
                tiles, target[at + FIRST] = target[at + FIRST], first
                first += tiles * max(1, (keys + split - 1) // split)
        if split != 0:
            p[ITEMS] = first
        if splits > 1:
            p[COUNTS] = p[SEQUENCES] + 8 * words
            p[PARTIAL] = p[COUNTS] + 8 * items
            counts = carray(void_pointer(p[COUNTS]), items, np.int64)
            for n in range(items):
                counts[n] = 0
        return int(_run(worker, params, pool, threads))

    return recall_decode


def _make_backward() -> Callable[..., int]:
    def recall_backward(
        grad_out: int, query: int, key: int, value: int, out: int, lse: int,
        grad_query: int, grad_key: int, grad_value: int,
        template: int, params: int, counter: int, scratch: int, worker: int, pool: int, threads: int,
    ) -> int:  # fmt: skip
        _begin(template, params, counter, scratch)
        p = carray(void_pointer(params), WORDS, np.int64)
        p[0], p[1], p[2], p[3] = data_of(query), data_of(key), data_of(value), data_of(out)
        p[LSE], p[GRAD_OUT] = data_of(lse), data_of(grad_out)
        p[GRAD_QUERY], p[GRAD_KEY], p[GRAD_VALUE] = data_of(grad_query), data_of(grad_key), data_of(grad_value)
        return int(_run(worker, params, pool, threads))

    return recall_backward


match_three = Function("match-three", _make_match_three, objects=3, integers=4, nogil=False)
match_six = Function("match-six", _make_match_six, objects=6, integers=4, nogil=False)
forward = Function("recall-forward", _make_forward, objects=5, integers=7)
decode = Function("recall-decode", _make_decode, objects=9, integers=15)
backward = Function("recall-backward", _make_backward, objects=9, integers=7)
