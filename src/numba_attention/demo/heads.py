"""A picture of which tokens each head attends to."""

from os import PathLike

from ..options import Array


def draw_heads(tokens: list[str], maps: Array, title: str, path: str | PathLike[str]) -> None:
    """Draw one square per head, a row for each token: the darker, the more it attends to the token of the column.

    Parameters
    ----------
    tokens : list of str
    maps : ndarray, shape (heads, len(tokens), len(tokens))
        Attention probabilities.
    title : str
    path : str or path-like
        Where to write the picture; its suffix tells the format.

    Raises
    ------
    ImportError
        Matplotlib is not installed.
    OSError, ValueError
        The file cannot be written, or Matplotlib does not know the format.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which would look for a display
    except ImportError as error:
        raise ImportError("drawing needs Matplotlib: pip install 'numba-attention[plot]'") from error
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    side = 1.2 + 0.17 * len(tokens)
    figure = Figure(figsize=(columns * side, rows * side + 0.5), layout="constrained")
    figure.suptitle(title)
    places = range(len(tokens))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for head, axis in enumerate(axes.flat):
        if head >= len(maps):
            axis.set_axis_off()
            continue
        axis.imshow(maps[head], vmin=0, vmax=1, cmap="Blues")
        axis.set_title(f"head {head}", fontsize=9)
        axis.set_xticks(places, tokens, rotation=90, fontsize=8)
        axis.set_yticks(places, tokens, fontsize=8)
        axis.tick_params(length=0)
    figure.supxlabel("attended to", fontsize=9)
    figure.savefig(path, dpi=120)
