"""Small calls like earlier ones, without doing again what depends on their shapes only.

Checks, options, plan and parameters of a call of 1x1x1x64 take 20 times as long as its kernel. So a call that passed
every check and whose plan is used a second time is remembered: the headers of its arrays, its options, and the record
that its kernel read. A later call whose arrays have the same headers (`cpu.recall`) needs nothing but room for the
result and the addresses of its arrays. It gets the same bits. Whatever is not the same in every respect is no such call
and goes the usual way, which has the checks and the messages.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..options import Array, Gradients, Options
from ..problem.dense import BackwardProblem, Problem

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
    """What calls are done with."""

    match_three: Any
    match_six: Any
    forward: Any
    backward: Any
    take: Any
    put_back: Any
    threads_for: Any
    pool: Any


class Provider(NamedTuple):
    """What the CPU backend provides: it is imported at the first call, and this module with the package."""

    row_of: Any
    forward_recipe: Any
    backward_recipe: Any
    machine: Callable[[], Machine]


def provide(provider: Provider) -> None:
    """Say how calls are remembered and done again."""
    global _provider
    _provider = provider


_provider: Provider | None = None
_forward = _backward = _Table((), np.empty(0, np.int64), 0)
_machine: Any = None
_misses = 0
_ndarray = id(np.ndarray)

# Options that plans depend on and nothing else does; their values are compared together with their types.
_NAMES = frozenset(("is_causal", "scale", "softcap", "window", "query_offset"))
_DEFAULTS = Options._field_defaults
_SCALARS = frozenset((bool, int, float, str, type(None)))
CODES = 1000  # combinations of options that are distinguished; others are not remembered
_codes: dict[Any, int] = {(): 0, (("is_causal", bool, True),): 2}
_numbers = itertools.count(4, 2)


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


def forward(
    query: Any, key: Any, value: Any, options: Mapping[str, Any], return_lse: Any
) -> Array | tuple[Array, Array] | None:
    """Return the result of `attention` if a call like this one is remembered, else None."""
    recipes, _, address = _forward
    if not address:
        return None
    kind = _kind_of(options)
    if return_lse is not False:
        if return_lse is not True or kind < 0:
            return None
        kind += 1
    machine = _machine
    n = machine.match_three(query, key, value, kind, address, len(recipes), _ndarray)
    if n < 0:
        return None
    recipe = recipes[n]
    number, pool, size = 1, 0, 0
    if not recipe.alone:
        number = machine.threads_for(recipe.items, recipe.flops)
        if number > 1:
            pool, size = machine.pool()
            if not pool:
                return None
    out = np.empty(*recipe.results[0])
    lse = np.empty(*recipe.results[1]) if return_lse else None
    own = machine.take()
    try:
        failed = machine.forward(
            query, key, value, out, lse, recipe.template_address, own.params_address, own.counter_address,
            own.reserve(number * recipe.scratch_size)[1], recipe.worker, pool, size, number,
        )  # fmt: skip
    finally:
        machine.put_back(own)
    assert not failed
    return out if lse is None else (out, lse)


def backward(
    grad_out: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, options: Mapping[str, Any]
) -> Gradients | None:
    """Return the result of `attention_backward` if a call like this one is remembered, else None."""
    recipes, _, address = _backward
    if not address:
        return None
    kind = _kind_of(options)
    machine = _machine
    n = machine.match_six(grad_out, query, key, value, out, lse, kind, address, len(recipes), _ndarray)
    if n < 0:
        return None
    recipe = recipes[n]
    number, pool, size = 1, 0, 0
    if not recipe.alone:
        number = machine.threads_for(recipe.items, recipe.flops)
        if number > 1:
            pool, size = machine.pool()
            if not pool:
                return None
    of_query, of_key, of_value = (np.empty(*result) for result in recipe.results)
    own = machine.take()
    try:
        failed = machine.backward(
            grad_out, query, key, value, out, lse, of_query, of_key, of_value, recipe.template_address,
            own.params_address, own.counter_address, own.reserve(number * recipe.scratch_size)[1], recipe.worker,
            pool, size, number,
        )  # fmt: skip
    finally:
        machine.put_back(own)
    assert not failed
    return Gradients(of_query, of_key, of_value)


def learn_forward(query: Any, key: Any, value: Any, options: Options, problem: Problem) -> None:
    """Remember a call of `attention` without `out`, whose plan the CPU backend had."""
    global _forward
    learned = _learned(_forward, (query, key, value), options, problem.lse is not None, "forward_recipe", problem)
    if learned is not None:
        _forward = learned


def learn_backward(
    grad_out: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, options: Options, problem: BackwardProblem
) -> None:
    """Remember a call of `attention_backward` without `grad_lse`, whose plan the CPU backend had."""
    global _backward
    arrays = grad_out, query, key, value, out, lse
    learned = _learned(_backward, arrays, options, False, "backward_recipe", problem)
    if learned is not None:
        _backward = learned


def _learned(
    table: _Table, arrays: tuple[Any, ...], options: Options, return_lse: bool, make: str, problem: Any
) -> _Table | None:
    """Return a table that has this call too; None if nothing is to be added."""
    global _machine, _misses
    _misses += 1
    if len(table.recipes) == COUNT and _misses % RARELY:
        return None
    key = _key(options._asdict())
    if key is None or not all(type(x) is np.ndarray and x.ndim <= AXES for x in arrays):
        return None
    if key not in _codes and len(_codes) < CODES:
        _codes.setdefault(key, next(_numbers))
    code = _codes.get(key, -1)
    if code < 0:
        return None
    assert _provider is not None
    row = _provider.row_of(code + return_lse, arrays)
    if any(recipe.row == row for recipe in table.recipes):
        return None
    if _machine is None:
        try:
            _machine = _provider.machine()
        except RuntimeError:  # the compiler cannot run here and now: see `cpu.compiler_thread`
            return None
    recipe: Recipe | None = getattr(_provider, make)(problem, row, arrays)
    return None if recipe is None else table.extended(recipe)
