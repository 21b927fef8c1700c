"""Pictures of attention: with Matplotlib, as figures that are returned and not shown, and as a page for a browser."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..options import Array
from ..validation import as_array, as_size
from .explorer import Page, as_names, as_weights, explore

Figure = Any  # Matplotlib's, which is optional and has no types here


class Statistics(NamedTuple):
    """The result of `statistics`, two arrays of shape (heads,)."""

    entropy: Array  # bits
    distance: Array  # positions


def heads(
    weights: ArrayLike,
    query_labels: Sequence[str] | None = None,
    key_labels: Sequence[str] | None = None,
    *,
    titles: Sequence[str] | None = None,
) -> Figure:
    """Draw the attention of each head as a heat map: a row for each query, a column for each key.

    Parameters
    ----------
    weights : array, shape (heads, L, S) or (L, S)
        Attention probabilities, as `attention_weights` or a layer with ``need_weights`` gives them for one sequence;
        any floating dtype.
    query_labels, key_labels : sequence of L and of S str, optional
        What to write at the rows and columns, such as tokens.
    titles : sequence of str, optional
        One for each head, by default "head 0" and so on.

    Returns
    -------
    matplotlib.figure.Figure
        Use its ``savefig``. A notebook shows it by itself.

    Raises
    ------
    ImportError
        Matplotlib is not installed.
    TypeError, ValueError
        `weights` has another shape, is not floating point, or labels or titles are not as many as what they name.

    Examples
    --------
    >>> import numpy as np, numba_attention as na, numba_attention.plot as plot
    >>> q, k = np.random.default_rng(0).standard_normal((2, 4, 3, 8))
    >>> figure = plot.heads(na.attention_weights(q, k), ["a", "b", "c"], ["a", "b", "c"])
    >>> len(figure.axes)
    4
    """
    maps = _maps(weights)
    count, L, S = maps.shape
    titles = _labels("titles", titles, count) or [f"head {n}" for n in range(count)]
    rows, columns = _labels("query_labels", query_labels, L), _labels("key_labels", key_labels, S)
    # Rows and columns with labels get room for them. A map of many positions is at most as large as a page.
    height, width = (min(6.0, 1.2 + (0.17 * n if said else 0.03 * n)) for n, said in ((L, rows), (S, columns)))
    figure, axes = _grid(count, width, height)
    for axis, one, title in zip(axes, maps, titles, strict=True):
        axis.imshow(one, vmin=0, vmax=1, cmap="Blues", interpolation="nearest", aspect="auto" if L != S else "equal")
        axis.set_title(title, fontsize=9)
        for place, labels in ((axis.xaxis, columns), (axis.yaxis, rows)):
            if labels:
                place.set_ticks(range(len(labels)), labels, fontsize=8)
        if columns:
            axis.tick_params("x", rotation=90)
        axis.tick_params(length=0)
    figure.supxlabel("attended to", fontsize=9)
    return figure


def patches(
    image: ArrayLike, weights: ArrayLike, *, grid: tuple[int, int], titles: Sequence[str] | None = None
) -> Figure:
    """Draw what one query attends to over the patches of an image, head by head.

    Parameters
    ----------
    image : array, shape (height, width) or (height, width, 3)
        Drawn first by itself, then faintly below each head.
    weights : array, shape (heads, rows * columns)
        Attention of one query to each patch, row by row of patches.
    grid : (int, int)
        Rows and columns of patches.
    titles : sequence of str, optional
        One for each head, by default "head 0" and so on.

    Returns
    -------
    matplotlib.figure.Figure
        The strongest patch of each head has the darkest colour.

    Raises
    ------
    ImportError
        Matplotlib is not installed.
    TypeError, ValueError
        Shapes do not fit each other; the message names the argument.

    Examples
    --------
    >>> import numpy as np, numba_attention.plot as plot
    >>> figure = plot.patches(np.eye(8), np.full((2, 16), 1 / 16), grid=(4, 4))
    >>> len(figure.axes)
    3
    """
    picture = np.asarray(as_array("image", image))
    if picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] != 3) or not picture.size:
        raise ValueError(f"image must have shape (height, width) or (height, width, 3), got {picture.shape}")
    rows, columns = _as_grid(grid)
    maps = _floats(weights)
    if maps.ndim != 2 or maps.shape[1] != rows * columns:
        raise ValueError(f"weights must have shape (heads, {rows} * {columns}) for this grid, got {maps.shape}")
    titles = _labels("titles", titles, len(maps)) or [f"head {n}" for n in range(len(maps))]
    height, width = picture.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    figure, axes = _grid(len(maps) + 1, 1.7, 1.7 * height / width + 0.2)
    for n, axis in enumerate(axes):
        axis.set_axis_off()
        axis.imshow(picture, cmap="gray_r", alpha=1.0 if n == 0 else 0.5, interpolation="nearest", extent=extent)
        if n == 0:
            axis.set_title("image", fontsize=9)
            continue
        one = maps[n - 1].reshape(rows, columns)
        top = one.max() if one.size and one.max() > 0 else 1.0
        axis.imshow(one, cmap="Reds", alpha=0.6, vmin=0, vmax=top, interpolation="nearest", extent=extent)
        axis.set_title(titles[n - 1], fontsize=9)
    return figure


def statistics(weights: ArrayLike) -> Statistics:
    """Measure how spread out and how far-reaching the attention of each head is.

    Parameters
    ----------
    weights : array, shape (..., heads, L, S)
        Attention probabilities; any floating dtype.

    Returns
    -------
    Statistics
        Named tuple of `entropy` (bits: 0 for one key, log2(S) for all alike) and `distance` (mean of
        ``abs(i - j)``), each of shape (heads,), means over the rows and all leading dimensions. Rows that attend to
        nothing are left out; a head with no other rows has NaN.

    Raises
    ------
    TypeError, ValueError
        `weights` is not floating point or has fewer than three dimensions.

    References
    ----------
    .. [1] Clark et al., "What Does BERT Look At?", 2019, section 3.3 (entropy).
    .. [2] Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021, figure 7 (distance).

    Examples
    --------
    >>> import numpy as np, numba_attention.plot as plot
    >>> sharp, even = np.eye(4), np.full((4, 4), 0.25)
    >>> plot.statistics(np.stack([sharp, even]))
    Statistics(entropy=array([0., 2.]), distance=array([0.  , 1.25]))
    """
    maps = _floats(weights)
    if maps.ndim < 3:
        raise ValueError(f"weights must have shape (..., heads, L, S), got {maps.shape}")
    total = maps.sum(axis=-1)
    seen = total > 0
    with np.errstate(all="ignore"):
        p = maps / total[..., None]
        bits = -np.sum(np.where(p > 0, p * np.log2(p), 0), axis=-1)
        steps = np.abs(np.arange(maps.shape[-2])[:, None] - np.arange(maps.shape[-1]))
        reach = np.sum(np.where(p > 0, p * steps, 0), axis=-1)
        others = tuple(n for n in range(seen.ndim) if n != seen.ndim - 2)
        count = seen.sum(axis=others)
        means = [np.where(seen, x, 0).sum(axis=others) / count + 0.0 for x in (bits, reach)]  # + 0.0: no -0.0
    return Statistics(*means)


def profile(weights: ArrayLike, *, titles: Sequence[str] | None = None) -> Figure:
    """Draw each head as a point: how far it reaches, and how many keys it spreads over.

    Parameters
    ----------
    weights : array, shape (..., heads, L, S), or a sequence of such arrays
        Attention probabilities; an array for each layer gives each layer a colour.
    titles : sequence of str, optional
        Names of the layers.

    Returns
    -------
    matplotlib.figure.Figure
        x is the mean distance in positions, y the entropy in bits; see `statistics`.

    Raises
    ------
    ImportError
        Matplotlib is not installed.
    TypeError, ValueError
        As in `statistics`, or `titles` are not as many as the layers.

    Examples
    --------
    >>> import numpy as np, numba_attention as na, numba_attention.plot as plot
    >>> q, k = np.random.default_rng(0).standard_normal((2, 4, 30, 8))
    >>> plot.profile(na.attention_weights(q, k)).axes[0].get_xlabel()
    'mean distance (positions)'
    """
    layers = list(weights) if isinstance(weights, list | tuple) else [weights]
    names = _labels("titles", titles, len(layers))
    figure, (axis,) = _grid(1, 4.5, 3.5)
    for n, layer in enumerate(layers):
        measured = statistics(layer)
        axis.scatter(measured.distance, measured.entropy, label=names[n] if names else None)
        for head, point in enumerate(zip(measured.distance, measured.entropy, strict=True)):
            axis.annotate(str(head), point, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axis.set_xlabel("mean distance (positions)")
    axis.set_ylabel("entropy (bits)")
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.margins(0.1)
    if names:
        axis.legend()
    return figure


def _grid(count: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    """Return a figure and its `count` axes, four in a row."""
    try:
        from matplotlib.figure import Figure  # pyplot would change global state and look for a display
    except ImportError as error:
        raise ImportError("drawing needs Matplotlib: pip install 'numba-attention[plot]'") from error
    columns = max(1, min(5 if count == 5 else 4, count))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(columns * width, rows * height + 0.4), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _maps(weights: ArrayLike) -> Array:
    maps = _floats(weights)
    if maps.ndim == 2:
        maps = maps[None]
    if maps.ndim != 3:
        raise ValueError(f"weights must have shape (heads, L, S) or (L, S), of one sequence, got {maps.shape}")
    return maps


def _floats(weights: ArrayLike) -> Array:
    return as_weights(weights).astype(np.float64)


def _as_grid(grid: Any) -> tuple[int, int]:
    try:
        rows, columns = grid
    except (TypeError, ValueError):
        raise TypeError(f"grid must be a pair (rows, columns) of int, got {grid!r}") from None
    return as_size("rows of grid", rows), as_size("columns of grid", columns)


def _labels(name: str, labels: Sequence[str] | None, count: int) -> list[str]:
    if labels is None:
        return []
    return as_names(name, labels, count)


__all__ = ["Page", "Statistics", "explore", "heads", "patches", "profile", "statistics"]
