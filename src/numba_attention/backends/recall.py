"""Small calls like earlier ones, without doing again what depends on their shapes only.

Checks, options, plan and parameters of a call of 1x1x1x64 take 20 times as long as its kernel. So a call that passed
every check and whose plan is used a second time is remembered: the headers of its arrays, its options, and the record
that its kernel read. A later call whose arrays have the same headers (`cpu.recall`) needs nothing but room for the
result and the addresses of its arrays. It gets the same bits. Whatever is not the same in every respect is no such call
and goes the usual way, which has the checks and the messages.

Of packed sequences the offsets must be the same too, as in the layers of a model that compute the same batch. Of a
cache the lengths may be others: they are written to the records of the sequences, from which the rest follows.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..caches.contents import Contents
from ..options import Array, Gradients, Options
from ..problem.cached import is_plain
from ..problem.dense import BackwardProblem, Problem
from ..validation import is_bottom_right

COUNT = 48  # remembered calls of a kind, of which the oldest is forgotten; comparing with a row takes 4 ns
RARELY = (
    32  # while so many are remembered already, one call in so many takes the place of the oldest: learning takes 20 us
)
LARGEST = 2e8  # flops of a call, about 1 ms, above which a few us do not matter
AXES = 5  # most axes of an array


class Recipe(NamedTuple):
    """How to do a call again."""

    row: list[int]
    template: Array  # the record of parameters, without addresses of arrays
    template_address: int
    worker: int  # address
    scratch_size: int
    items: int
    flops: float
    alone: bool  # whether one thread is enough
    results: tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]  # shapes and dtypes
    kept: tuple[object, ...]  # what the record and the row refer to: the plan, and dtypes, whose addresses are compared
    steps: Any = None  # of decoding: `Steps`


class Steps(NamedTuple):
    """What the steps of decoding have in common, whose lengths differ."""

    sequences: Array  # the records of the sequences; `first` is the number of tiles where keys are split
    address: int  # of these
    number: int
    size: int  # bytes
    split: int  # keys of a split, 0 if keys are not split
    partial_size: int  # bytes of the partial state of a tile


class _Table(NamedTuple):
    """Replaced as a whole: a reader in another thread, or one that a reentrant call interrupts, keeps the old one."""

    recipes: tuple[Recipe, ...]
    rows: Array
    address: int

    def extended(self, recipe: Recipe) -> "_Table":
        """Return a table with one more recipe, without the oldest if it would be too long."""
        recipes = (*self.recipes[-COUNT + 1 :], recipe)
        rows = np.empty((len(recipes), len(recipe.row)), np.int64)
        if len(recipes) > 1:
            rows[:-1] = self.rows[-COUNT + 1 :]
        rows[-1] = recipe.row
        return _Table(recipes, rows, rows.ctypes.data)


class Machine(NamedTuple):
    """What the calls of one entry point are done with."""

    match: Any
    run: Any
    take: Any
    put_back: Any
    threads_for: Any
    pool: Any


class Provider(NamedTuple):
    """What the CPU backend provides: it is imported at the first call, and this module with the package."""

    row_of: Any
    recipes: Mapping[str, Any]  # how to do a call again, by the name of the entry point
    machine: Callable[[str], Machine]


def provide(provider: Provider) -> None:
    """Say how calls are remembered and done again."""
    global _provider
    _provider = provider


_provider: Provider | None = None
_ndarray = id(np.ndarray)


class Memory:
    """The calls of one entry point that are remembered.

    Parameters
    ----------
    name : {"forward", "into", "backward", "decode"}
        What the machine code and the recipes of these calls are found by.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.table = NOTHING
        self.machine: Any = None
        self._misses = 0

    def learn(self, arrays: tuple[Any, ...], key: Any, return_lse: bool, problem: Any) -> None:
        """Remember a call whose plan the CPU backend had."""
        self._misses += 1
        if len(self.table.recipes) == COUNT and self._misses % RARELY:
            return
        if key is None or not all(type(x) is np.ndarray and x.ndim <= AXES for x in arrays):
            return
        assert _provider is not None
        row = _provider.row_of(_number_of(key) + return_lse, arrays)
        if any(recipe.row == row for recipe in self.table.recipes):
            return
        if self.machine is None:
            try:
                self.machine = _provider.machine(self.name)
            except RuntimeError:  # the compiler cannot run here and now: see `cpu.compiler_thread`
                return
        recipe: Recipe | None = _provider.recipes[self.name](problem, row, arrays)
        if recipe is not None:
            self.table = self.table.extended(recipe)


NOTHING = _Table((), np.empty(0, np.int64), 0)
_forward, _into, _backward, _decode = (Memory(name) for name in ("forward", "into", "backward", "decode"))
_packed_forward, _packed_backward = Memory("forward"), Memory("backward")

# Options that plans depend on and nothing else does; their values are compared together with their types.
_NAMES = frozenset(("is_causal", "scale", "softcap", "window", "query_offset"))
_DEFAULTS = Options._field_defaults
_SCALARS = frozenset((bool, int, float, str, type(None)))
CODES = 1000  # combinations of options, and offsets of packed sequences, that have a number
OFFSETS = 2**14  # bytes of offsets above which comparing them takes longer than 5 us
_codes: dict[Any, int] = {(): 0, (("is_causal", bool, True),): 2}
_numbers = itertools.count(4, 2)
_integers = frozenset((np.dtype(np.int32), np.dtype(np.int64)))


def _number_of(key: Any) -> int:
    """Return the even number of a key, a new one if it has none. A number is never used again for another key."""
    global _codes
    number = _codes.get(key)
    if number is None:
        if len(_codes) >= CODES:  # the older half is forgotten; calls with these numbers match nothing any more
            known = list(_codes.items())
            _codes = dict(known[:2] + known[2 + CODES // 2 :])
        number = _codes.setdefault(key, next(_numbers))
    return number


def _key(options: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return what distinguishes a combination of options; None if calls with it are not remembered."""
    key = []
    for name, value in options.items():
        if value is _DEFAULTS.get(name, _NAMES):
            continue
        kind: Any = type(value)
        if kind is tuple:
            kind = tuple(map(type, value))
            if not _SCALARS.issuperset(kind):
                return None
        elif kind not in _SCALARS:
            return None
        if name not in _NAMES:
            if name == "dropout_p" and kind is float and value == 0:
                continue
            return None
        key.append((name, kind, value))
    if len(key) > 1:
        key.sort(key=lambda item: item[0])
    return tuple(key)


def _kind_of(options: Mapping[str, Any]) -> int:
    """Return the even number of a combination of options, or -1 if no call with it is remembered."""
    if not options:
        return 0
    if len(options) == 1 and options.get("is_causal") is True:
        return 2
    return _codes.get(_key(options), -1)


def _packed_key(options: Mapping[str, Any], offsets: tuple[Any, Any]) -> tuple[Any, ...] | None:
    """Return what distinguishes options and the offsets of packed sequences; None if they are not remembered."""
    parts: list[Any] = [_key(options)]
    for x in offsets:
        if type(x) is not np.ndarray or x.dtype not in _integers or x.ndim != 1 or x.nbytes > OFFSETS:
            return None
        parts += [x.itemsize, x.tobytes()]
    return None if parts[0] is None else tuple(parts)


def _decode_key(contents: Contents, options: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return what distinguishes steps of decoding, besides headers; None if they are not remembered."""
    if contents.gap is not None or contents.originals is not None or (options and tuple(options) != ("scale",)):
        return None
    key = _key(options) if options else ()
    return None if key is None else (contents.table is None, contents.key_scale is None, key)


def forward(
    query: Any, key: Any, value: Any, options: Mapping[str, Any], return_lse: Any, offsets: Any = None, out: Any = None
) -> Array | tuple[Array, Array] | None:
    """Return the result of `attention` if a call like this one is remembered, else None.

    With the `offsets` of queries and of keys: that of `attention_varlen`. With `out`: written to that array.
    """
    memory = _into if out is not None else _forward if offsets is None else _packed_forward
    recipes, _, address = memory.table
    if not address:
        return None
    kind = _kind_of(options) if offsets is None else _codes.get(_packed_key(options, offsets), -1)
    if return_lse is not False:
        if return_lse is not True or kind < 0:
            return None
        kind += 1
    machine = memory.machine
    into = () if out is None else (out, out, out)
    n = machine.match(query, key, value, *into, kind, address, len(recipes), _ndarray)
    if n < 0:
        return None
    recipe = recipes[n]
    if out is None:
        out = np.empty(*recipe.results[0])
    elif not out.flags.writeable or any(np.may_share_memory(out, x) for x in (query, key, value)):
        return None
    number = 1 if recipe.alone else machine.threads_for(recipe.items, recipe.flops)
    pool = 0 if number == 1 else machine.pool(number)
    lse = np.empty(*recipe.results[1]) if return_lse else None
    own = machine.take()
    try:
        failed = machine.run(
            query, key, value, out, lse, recipe.template_address, own.params_address, own.counter_address,
            own.reserve(number * recipe.scratch_size)[1], recipe.worker, pool, number,
        )  # fmt: skip
    finally:
        machine.put_back(own)
    assert not failed
    return out if lse is None else (out, lse)


def decode(
    query: Any, contents: Contents, options: Mapping[str, Any], return_lse: Any
) -> Array | tuple[Array, Array] | None:
    """Return the result of `attention_decode` if a step like this one is remembered, else None."""
    memory = _decode
    recipes, _, address = memory.table
    if not address or type(query) is not np.ndarray or query.dtype is not contents.dtype:
        return None
    key, value, key_scale, value_scale, table, lengths = contents[:6]
    kind = _codes.get(_decode_key(contents, options), -1)
    if kind < 0 or type(return_lse) is not bool:
        return None
    machine = memory.machine
    if key_scale is None:
        key_scale = value_scale = lengths
    n = machine.match(
        query, key, value, key_scale, value_scale, lengths, kind + return_lse, address, len(recipes), _ndarray
    )
    if n < 0:
        return None
    recipe = recipes[n]
    steps: Steps = recipe.steps
    keys = int(lengths[0]) if steps.number == 1 else int(lengths.max())
    flops = recipe.flops * keys
    if flops > LARGEST:
        return None
    splits = -(-keys // steps.split) if steps.split and keys > steps.split else 1
    items = recipe.items * splits
    number = machine.threads_for(items, flops)
    pool = 0 if number == 1 else machine.pool(number)
    out = np.empty(*recipe.results[0])
    lse = np.empty(*recipe.results[1]) if return_lse else None
    own = machine.take()
    try:
        room = number * recipe.scratch_size
        partial = items * (8 + steps.partial_size) if splits > 1 else 0
        failed = machine.run(
            query, key, value, out, lse, key_scale, value_scale, lengths, lengths if table is None else table,
            recipe.template_address, own.params_address, own.counter_address,
            own.reserve(room + steps.size + partial)[1], recipe.worker, pool, number,
            steps.address, steps.number, keys, splits, items, room, steps.split, table is not None,
        )  # fmt: skip
    finally:
        machine.put_back(own)
    assert not failed
    return out if lse is None else (out, lse)


def backward(
    grad_out: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, options: Mapping[str, Any], offsets: Any = None
) -> Gradients | None:
    """Return the result of `attention_backward` if a call like this one is remembered, else None.

    With the `offsets` of queries and of keys: that of `attention_varlen_backward`.
    """
    memory = _backward if offsets is None else _packed_backward
    recipes, _, address = memory.table
    if not address:
        return None
    kind = _kind_of(options) if offsets is None else _codes.get(_packed_key(options, offsets), -1)
    machine = memory.machine
    n = machine.match(grad_out, query, key, value, out, lse, kind, address, len(recipes), _ndarray)
    if n < 0:
        return None
    recipe = recipes[n]
    number = 1 if recipe.alone else machine.threads_for(recipe.items, recipe.flops)
    pool = 0 if number == 1 else machine.pool(number)
    of_query, of_key, of_value = (np.empty(*result) for result in recipe.results)
    own = machine.take()
    try:
        failed = machine.run(
            grad_out, query, key, value, out, lse, of_query, of_key, of_value, recipe.template_address,
            own.params_address, own.counter_address, own.reserve(number * recipe.scratch_size)[1], recipe.worker,
            pool, number,
        )  # fmt: skip
    finally:
        machine.put_back(own)
    assert not failed
    return Gradients(of_query, of_key, of_value)


def learn_forward(
    query: Any, key: Any, value: Any, options: Options, problem: Problem, offsets: Any = None, out: Any = None
) -> None:
    """Remember a call of `attention`, or of `attention_varlen` without `out`, whose plan the CPU backend had."""
    memory, distinct = _memory_and_key(_forward if out is None else _into, _packed_forward, options, offsets)
    # Machine code compares the headers of three arrays or of six.
    arrays = (query, key, value) if out is None else (query, key, value, out, out, out)
    memory.learn(arrays, distinct, problem.lse is not None, problem)


def learn_decode(query: Any, contents: Contents, options: Options, problem: Problem) -> None:
    """Remember a step of `attention_decode` without `out`, whose plan the CPU backend had."""
    if not is_bottom_right(options.is_causal) or not is_plain(options):
        return
    key, value, key_scale, value_scale, _, lengths = contents[:6]
    scales = (lengths, lengths) if key_scale is None else (key_scale, value_scale)
    distinct = _decode_key(contents, {} if options.scale is None else {"scale": options.scale})
    _decode.learn((query, key, value, *scales, lengths), distinct, problem.lse is not None, problem)


def learn_backward(
    grad_out: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, options: Options, problem: BackwardProblem,
    offsets: Any = None,
) -> None:  # fmt: skip
    """Remember a call for gradients without `grad_lse`, whose plan the CPU backend had."""
    memory, distinct = _memory_and_key(_backward, _packed_backward, options, offsets)
    memory.learn((grad_out, query, key, value, out, lse), distinct, False, problem)


def _memory_and_key(dense: Memory, packed: Memory, options: Options, offsets: Any) -> tuple[Memory, Any]:
    if offsets is None:
        return dense, _key(options._asdict())
    return packed, _packed_key(options._asdict(), offsets)
