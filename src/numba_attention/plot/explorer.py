"""A page for a browser that shows the attention of every head and layer: `explore`."""

import base64
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..atomic import replacing
from ..errors import kind_of
from ..options import Array
from ..validation import as_array, is_bfloat16

LARGEST = 2**26  # numbers: the page then has 170 MB, which browsers still open


class Page(str):
    """The text of an HTML page, which a notebook shows by itself."""

    __slots__ = ()

    def save(self, path: str | PathLike[str]) -> None:
        """Write the page to a file."""
        with replacing(Path(path)) as unfinished:
            unfinished.write_text(self, encoding="utf-8")

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{html.escape(self)}" style="width: 100%; height: 700px; border: 0"></iframe>'


def explore(
    weights: ArrayLike | Sequence[ArrayLike],
    tokens: Sequence[str],
    path: str | PathLike[str] | None = None,
    *,
    key_tokens: Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    heads: Sequence[str] | None = None,
    title: str = "Attention",
) -> Page:
    """Make an HTML page in which heads and layers can be chosen, with a line from each token to what it attends to.

    The page is one file that needs no network. Pointing at a token (or tapping it) shows what it attends to, and at
    a key what attends to it. There is a view as a matrix, and everything can be done with the keyboard.

    Parameters
    ----------
    weights : array, shape (L, S), (heads, L, S) or (layers, heads, L, S), or a sequence of arrays (heads, L, S)
        Attention probabilities of one sequence, as `attention_weights` or a layer with ``need_weights`` gives them;
        any floating dtype. A sequence has an array for each layer, whose numbers of heads may differ.
    tokens : sequence of L str
        The queries.
    path : str or path-like, optional
        Where to write the page.
    key_tokens : sequence of S str, optional
        The keys, by default `tokens`: self-attention.
    layers : sequence of str, optional
        Names of the layers, by default "0" and so on.
    heads : sequence of str, optional
        Names of the heads.
    title : str, optional

    Returns
    -------
    Page
        The text of the page, a str. A notebook shows it, and ``page.save(path)`` writes it.

    Raises
    ------
    TypeError, ValueError
        `weights` has another shape, is not floating point, or has numbers beyond 0 and 1; tokens or names are not as
        many as what they name.
    OSError
        The file cannot be written.

    Notes
    -----
    Probabilities are stored in 16 bits, to 1 in 65535.

    References
    ----------
    .. [1] Vig, "A Multiscale Visualization of Attention in the Transformer Model", 2019.

    Examples
    --------
    >>> import numpy as np, numba_attention as na, numba_attention.plot as plot
    >>> q, k = np.random.default_rng(0).standard_normal((2, 4, 3, 8))
    >>> page = plot.explore(na.attention_weights(q, k), ["the", "old", "tree"], title="one layer")
    >>> page.startswith("<!DOCTYPE html>")
    True
    """
    maps = _layers(weights)
    L, S = maps[0].shape[1:]
    queries = as_names("tokens", tokens, L)
    keys = (
        queries
        if key_tokens is None and S == L
        else as_names("key_tokens", () if key_tokens is None else key_tokens, S)
    )
    names = [str(n) for n in range(len(maps))] if layers is None else as_names("layers", layers, len(maps))
    titles = None if heads is None else as_names("heads", heads, max(len(one) for one in maps))
    data = {
        "title": str(title),
        "queries": queries,
        "keys": keys,
        "layers": [
            {"name": name, "heads": len(one), "titles": titles, "weights": _encoded(one)}
            for name, one in zip(names, maps, strict=True)
        ],
    }
    # In a script, "</script>" in a token would end it. Lone surrogates, which some tokenizers make, are ASCII here too.
    text = json.dumps(data).replace("<", "\\u003c")
    page = Page(files(__package__).joinpath("explorer.html").read_text("utf-8").replace("/*DATA*/", text))
    if path is not None:
        page.save(path)
    return page


def _layers(weights: Any) -> list[Array]:
    """Return an array (heads, L, S) for each layer."""
    parts = list(weights) if isinstance(weights, list | tuple) else [weights]
    arrays = [as_weights(part) for part in parts]
    if len(arrays) == 1 and arrays[0].ndim == 4:
        arrays = list(arrays[0])
    arrays = [array[None] if array.ndim == 2 else array for array in arrays]
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) != 1 or any(array.ndim != 3 or not array.size for array in arrays):
        said = ", ".join(str(np.shape(part)) for part in parts)
        raise ValueError(
            f"weights must have shape (heads, L, S) or (layers, heads, L, S) of one sequence, or be an array (heads, "
            f"L, S) for each layer, got {said or 'none'}"
        )
    if sum(array.size for array in arrays) > LARGEST:
        raise ValueError(f"weights must have at most {LARGEST} numbers for a page, got {sum(x.size for x in arrays)}")
    return arrays


def _encoded(maps: Array) -> str:
    wide = maps.astype(np.float64)
    if not ((wide >= 0) & (wide <= 1 + 1e-2)).all():
        raise ValueError("weights must be probabilities, between 0 and 1")
    return base64.b64encode(np.rint(np.minimum(wide, 1) * 65535).astype("<u2").tobytes()).decode()


def as_weights(weights: Any) -> Array:
    """Convert probabilities to a plain array of floating point."""
    array = np.asarray(as_array("weights", weights))
    if array.dtype.kind != "f" and not is_bfloat16(array.dtype):
        raise TypeError(f"weights must be floating point, got {array.dtype}")
    return array


def as_names(name: str, names: Any, count: int) -> list[str]:
    """Check that there are `count` names or tokens."""
    try:
        texts = [str(text) for text in names]
    except TypeError:
        raise TypeError(f"{name} must be a sequence of str, got {kind_of(names)}") from None
    if len(texts) != count:
        raise ValueError(f"{name} must have length {count}, got {len(texts)}")
    return texts


__all__ = ["Page", "as_names", "as_weights", "explore"]
