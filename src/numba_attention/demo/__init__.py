"""What ``numba-attention demo`` does: search a few hundred sentences by meaning with a real model, without PyTorch."""

import importlib.util
import time
from importlib.resources import files
from os import PathLike

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..models import SentenceEncoder, read_lines
from ..options import Array
from ..plot import explore
from .heads import draw_heads

QUERIES = (
    "How can I sleep better?",
    "an inexpensive dinner",
    "my laptop takes ages to start",
    "exercise at home",
    "Why does the climate get hotter?",
)
SHOWN = 3
DRAWN_BLOCK = 2  # of six, from 0: here heads are most unlike each other


def sentences() -> list[str]:
    """Return the sentences that ship with the demo."""
    text = files(__package__).joinpath("sentences.txt").read_text("utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def run(
    query: str | None,
    model_dir: str | PathLike[str] | None,
    heads_png: str | PathLike[str] | None,
    console: Console,
    html: str | PathLike[str] | None = None,
    sentences_file: str | PathLike[str] | None = None,
) -> None:
    """Embed the sentences, search them and print what is found; draw attention maps if asked.

    Parameters
    ----------
    query : str, optional
        What to search for; by default, a few examples.
    model_dir : str or path-like, optional
        Folder or wheel with the model; by default, the installed package.
    heads_png : str or path-like, optional
        Where to draw which tokens of the (first) query each head attends to.
    console : rich.console.Console
        Where to print.
    html : str or path-like, optional
        Where to write a page that shows all heads and layers for the (first) query.
    sentences_file : str or path-like, optional
        A text file with a sentence on each line to search instead of the demo's.

    Raises
    ------
    FileNotFoundError, ValueError
        The model cannot be read.
    ImportError
        A picture is asked for and Matplotlib is not installed.
    """
    if heads_png is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("drawing needs Matplotlib: pip install 'numba-attention[plot]'; --html needs nothing")
    start = time.perf_counter()
    model = SentenceEncoder(model_dir, progress=console.is_terminal).fit()
    console.print(
        f"[bold]all-MiniLM-L6-v2[/bold], {model.size_ / 1e6:.1f} million parameters, "
        f"read in {time.perf_counter() - start:.1f} s from {escape(str(model.folder_))}",
        highlight=False,
        soft_wrap=True,
    )
    texts = sentences() if sentences_file is None else read_lines(sentences_file)
    if not texts:
        raise ValueError(f"{sentences_file} has no line of text")
    queries = QUERIES if query is None else (query,)
    # Sequences of other lengths have other kernels: the throughput below is that of the model without compiling.
    start = time.perf_counter()
    for some in (queries, texts[:64]):
        model.encode(some)
    console.print(f"kernels ready in {time.perf_counter() - start:.1f} s", highlight=False)
    start = time.perf_counter()
    sequences = [encoding.ids for encoding in model.tokenize(texts)]
    embeddings = model.encode_tokens(sequences)
    seconds = time.perf_counter() - start
    tokens = sum(len(sequence) for sequence in sequences)
    console.print(
        f"{len(texts)} sentences, {tokens} tokens embedded in {seconds:.2f} s: "
        f"[bold]{len(texts) / seconds:.0f} sentences/s[/bold], {tokens / seconds:.0f} tokens/s",
        highlight=False,
    )
    for text, scores in zip(queries, model.encode(queries) @ embeddings.T, strict=True):
        console.print(_found(text, texts, scores))
    if heads_png is not None:
        names, maps = model.attention_maps(queries[0], DRAWN_BLOCK)
        draw_heads(names, maps, f"all-MiniLM-L6-v2, block {DRAWN_BLOCK + 1} of 6", heads_png)
        console.print(f"what each head attends to: {escape(str(heads_png))}", highlight=False, soft_wrap=True)
    if html is not None:
        words, layers = model.attention_maps(queries[0])
        explore(layers, words, html, title=f"all-MiniLM-L6-v2: {queries[0]}")
        console.print(f"all heads and layers, for a browser: {escape(str(html))}", highlight=False, soft_wrap=True)


def _found(query: str, texts: list[str], scores: Array) -> Table:
    table = Table(title=escape(query), title_justify="left", title_style="bold", show_header=False, box=None)
    for n in np.argsort(-scores)[:SHOWN]:
        table.add_row(f"{scores[n]:.2f}", escape(texts[n]))
    return table


__all__ = ["run"]
