"""A picture of which tokens each head attends to."""

from os import PathLike

from .. import plot
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
    figure = plot.heads(maps, tokens, tokens)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
