"""Kernels ahead of time: into the cache of this machine, or into a folder for others."""

import pickle
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .mods import library
from .mods.language import MASK, SCORE
from .mods.rules import Rule, as_arguments, describe, find

if TYPE_CHECKING:
    from .cpu.cache import Kernel

DTYPES = ("float32", "float64", "float16", "bfloat16")
STORAGES = ("float16", "bfloat16", "int8", "float8_e4m3fn")  # of caches that have other numbers than the queries
TASKS = ("attention", "decode", "weights", "backward", "layer", "second")
# What `warmup` compiles by default beside all the tasks but "second" for float32.
_OTHERS = (("attention", DTYPES[1:]), ("backward", ("float64",)), ("layer", ("float64",)))
OF_BLOCKS = ("attention", "decode", "backward", "layer")  # what functions of Dask arrays call, block by block


class Pass(NamedTuple):
    """A `score_mod` or `mask_mod` as a kernel: what decides it, but for the shape of tiles."""

    task: str  # in `cpu.mods.TASKS`
    program: Any
    arguments: tuple[Any, ...]


def warmup(
    dtypes: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    *,
    storage: Sequence[str] = (),
    score_mod: Any = None,
    mask_mod: Any = None,
    mod_args: tuple[Any, ...] = (),
    mod_grads: Sequence[int] = (),
    folder: str | Path | None = None,
    levels: Sequence[str] | None = None,
) -> list[str]:
    """Compile kernels of the CPU before the first call needs them.

    Parameters
    ----------
    dtypes : sequence of str, optional
        Of queries: some of float32, float64, float16 and bfloat16. By default float32, with `attention` for the others
        and `attention_backward` for float64.
    tasks : sequence of str, optional
        What will be called; by default all but "second":

        - "attention": `attention` and `attention_varlen`, with any options
        - "decode": few queries for each key/value head, as in `attention_decode`
        - "weights": `attention_weights`
        - "backward": `attention_backward` and `attention_varlen_backward`
        - "layer": products, norms and activations of layers, beside "attention" and "backward"
        - "second": `attention_jvp`, `attention_backward_jvp` and `attention_double_backward`
    storage : sequence of str, optional
        Formats of caches other than the dtype of the queries: some of float16, bfloat16, int8 and float8_e4m3fn.
    score_mod, mask_mod : callable, optional
        As of `attention`: they are compiled for the tasks, too.
    mod_args : tuple
        Arguments of the mods, of which the dtypes and numbers of axes count.
    mod_grads : sequence of int, optional
        Places of arrays in `mod_args` whose gradients will be wanted.
    folder : path, optional
        Write the kernels there for other machines, and not into the cache of this one: see ``NUMBA_ATTENTION_KERNELS``
        in the documentation of the cache. Kernels that are there are written anew.
    levels : sequence of str, optional
        Of CPUs, for a folder; by default that of this machine.

    Returns
    -------
    list of str
        The names of the kernels, or of the files in the folder.

    Raises
    ------
    ValueError
        A name is unknown, or levels are given without a folder.
    TypeError
        A mod contains what its language has not, or `folder` is no path.
    RuntimeError
        The compiler fails.

    Examples
    --------
    >>> import numpy as np, numba_attention as na
    >>> names = na.warmup(["float32"], ["attention"], score_mod=na.mods.alibi, mod_args=(np.ones(8),))
    >>> any(name.startswith("mod-score-f32") for name in names)
    True
    """
    if levels is not None and folder is None:
        raise ValueError("levels are those of the kernels in a folder: pass folder, too")
    wanted = _pairs(dtypes, tasks, storage)
    passes = passes_of(score_mod, mask_mod, mod_args, [task for task, _ in wanted], tuple(mod_grads))
    if folder is not None:
        try:
            path = Path(folder)
        except TypeError:
            raise TypeError(f"folder must be a path or None, got {type(folder).__name__}") from None
        return _into(path, levels, wanted, storage, passes)
    kernels = list(kernels_of(wanted, storage, passes))
    for kernel in kernels:
        kernel.address  # noqa: B018 - compiles or loads it
    return [kernel.name for kernel in kernels]


def kernels_for(
    dtypes: Sequence[str] | None, tasks: Sequence[str] | None, storage: Sequence[str] = ()
) -> "list[Kernel]":
    """The kernels that `warmup` compiles for these arguments."""
    return list(kernels_of(_pairs(dtypes, tasks, storage), storage))


def kernels_of_blocks(dtypes: Sequence[str], tasks: Sequence[str] | None) -> "list[Kernel]":
    """The kernels of tasks, by default of `OF_BLOCKS`, for blocks of larger problems, of any size.

    Their results are in float32 for half types: see `problem.dense.widened`.
    """
    return list(kernels_of(_pairs(dtypes, OF_BLOCKS if tasks is None else tasks, ()), wide=True))


def _pairs(dtypes: Sequence[str] | None, tasks: Sequence[str] | None, storage: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of a task and a dtype; what is wrong with the names is said here."""
    for what, given, known in (("dtypes", dtypes, DTYPES), ("tasks", tasks, TASKS), ("storage", storage, STORAGES)):
        if isinstance(given, str):
            raise ValueError(f"{what} must be a sequence of names, got {given!r}; write [{given!r}]")
        for name in given or ():
            if name not in known:
                raise ValueError(f"{what}: unknown name {name!r}, expected some of {', '.join(known)}")
    pairs = [(task, dtype) for task in tasks or TASKS[:-1] for dtype in dtypes or DTYPES[:1]]
    if dtypes is None and tasks is None:
        pairs += [(task, dtype) for task, others in _OTHERS for dtype in others]
    return pairs


def _into(
    folder: Path,
    levels: Sequence[str] | None,
    wanted: list[tuple[str, str]],
    storage: Sequence[str],
    passes: list[Pass],
) -> list[str]:
    from .cpu.target import LEVELS, level
    from .shipping import build

    if levels is None and not level():
        raise ValueError(f"this CPU has no level for which kernels are shipped; pass some of {', '.join(LEVELS)}")
    for name in levels or ():
        if name not in LEVELS:
            raise ValueError(f"levels: unknown name {name!r}, expected some of {', '.join(LEVELS)}")
    lines: list[str] = []
    build(folder, list(levels or [level()]), "", lines.append, (wanted, tuple(storage), passes))
    return [line.split(": ", 1)[1] for line in lines]


def kernels_of(
    wanted: Iterable[tuple[str, str]], storage: Iterable[str] = (), passes: Iterable[Pass] = (), wide: bool = False
) -> "Iterator[Kernel]":
    """The kernels of pairs of a task and a dtype, and of `passes`, each once; `wide` is as in `cpu.spec.Spec`."""
    from .backends import cpu

    wanted, storage, passes = list(wanted), list(storage), list(passes)
    known: set[str] = set()

    def all_of() -> "Iterator[Kernel]":
        yield from cpu.entries()
        for task, dtype in wanted:
            yield from _of_task(task, dtype, storage, wide)
        for dtype in dict.fromkeys(dtype for _, dtype in wanted):
            for one in passes:
                yield from _of_pass(one, dtype)

    for kernel in all_of():
        if kernel.name not in known:
            known.add(kernel.name)
            yield kernel


def _of_task(task: str, dtype: str, storage: list[str], wide: bool) -> "Iterator[Kernel]":
    from .backends.cpu_resources import worker
    from .backends.cpu_widths import NARROWS
    from .cpu.simd import HOST

    if task == "layer":
        from .layer.projection import kernel_of

        yield from (
            kernel_of("float64" if dtype == "float64" else "float32", kind)[0] for kind in ("linear", "rowwise")
        )
        return
    if wide and dtype == "float16" and not HOST.f16:
        dtype = "float32"  # which blocks are converted to
    wide = wide and task in OF_BLOCKS and dtype in ("float16", "bfloat16")
    kind = "forward" if task == "attention" else task
    yield worker(dtype, kind, wide=wide)
    if task in ("attention", "backward"):  # of short sequences
        yield from (worker(dtype, kind, "", vectors, wide) for vectors in NARROWS)
    if task in ("attention", "decode"):
        yield from (worker(dtype, kind, stored) for stored in storage if stored != dtype)


def _of_pass(one: Pass, dtype: str) -> "Iterator[Kernel]":
    from .backends.cpu_rules import shape_of
    from .cpu.masks import find_runs
    from .cpu.mods import BITS_ROWS
    from .mods.compiled import pass_of

    if one.task == "bits":
        yield from (find_runs, pass_of(*one, 32, BITS_ROWS))
        return
    for few in (False, True) if one.task in ("score", "mask") else (False,):
        yield pass_of(*one, *shape_of(dtype, few))


def passes_of(
    score_mod: Any, mask_mod: Any, mod_args: tuple[Any, ...], tasks: Iterable[str], mod_grads: tuple[int, ...] = ()
) -> list[Pass]:
    """The passes of mods for tasks."""
    values = as_arguments(mod_args)
    arguments = describe(values)
    passes: list[Pass] = []
    if score_mod is not None:
        passes += _of_score(find(SCORE, score_mod, arguments, values), set(tasks), mod_grads)
    if mask_mod is not None:
        program = find(MASK, mask_mod, arguments, values).program
        passes += [Pass("mask", program, arguments), Pass("bits", program, arguments)]
    return passes


def _of_score(rule: Rule, tasks: set[str], mod_grads: tuple[int, ...]) -> Iterator[Pass]:
    yield Pass("score", rule.program, rule.arguments)
    if "backward" in tasks:
        if not rule.has_slope_one:
            yield Pass("slope", rule.with_slope, rule.arguments)
        if mod_grads:
            yield Pass("kept", rule.with_slope, rule.arguments)
            program = rule.gradients(mod_grads)
            if program.sites:
                yield Pass("gradients", program, rule.arguments)
    if "second" in tasks:
        yield Pass("curve", rule.with_curve, rule.arguments)


def named_passes() -> list[Pass]:
    """The passes of the functions in `mods`, for arguments of all kinds that they are usually called with.

    The program of `mods.tree` depends on the depth, and is not among them.
    """
    passes: list[Pass] = []
    for function, *groups in _NAMED:
        for values in groups:
            if function.__code__.co_varnames[0] == "score":
                learned = tuple(n for n, x in enumerate(values) if isinstance(x, np.ndarray))
                passes += passes_of(function, None, values, TASKS, learned)
            else:
                passes += passes_of(None, function, values, TASKS)
    return passes


def _arrays(ndim: int, *dtypes: str) -> list[tuple[Any, ...]]:
    return [(np.ones((2,) * ndim, dtype),) for dtype in dtypes]


_REAL, _WHOLE = ("float32", "float64"), ("int64", "int32")
_NAMED: list[Any] = [
    (library.alibi, *_arrays(1, *_REAL)),
    (library.softcap, (1.0,), (1,)),
    *(
        (function, *_arrays(2, *_REAL))
        for function in (library.relative_positions, library.t5_bias, library.t5_bias_causal)
    ),
    (library.causal, ()),
    *((function, *_arrays(1, *_WHOLE)) for function in (library.documents, library.prefix_lm)),
    (library.sliding_window, (1, 1)),
    *((function, (1, 1, 1)) for function in (library.dilated_window, library.neighborhood, library.shifted_windows)),
]


def write(folder: str, only: str) -> None:
    """Write kernels to a folder: what `shipping` runs for each level, and pipes the arguments of `kernels_of` to."""
    everything = [(task, dtype) for dtype in DTYPES for task in TASKS]
    request = pickle.load(sys.stdin.buffer) or (everything, STORAGES, named_passes())
    for kernel in kernels_of(*request):
        if not only or any(part in kernel.name for part in only.split(",")):
            print(kernel.ship(Path(folder)).name, flush=True)
