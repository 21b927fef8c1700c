"""Pictures of a `BlockMask`: of characters for `repr`, as an SVG for notebooks."""

import numpy as np

from ..options import Array
from . import runs
from .runs import FULL, Runs

WIDTH, HEIGHT = 32, 16  # characters of the picture of repr
CELLS = 64  # cells of each side of the SVG
SHADES = " ░▒█"  # nothing, less than half, half or more, everything


def shares(all_runs: Runs, tiles: tuple[int, int], height: int, width: int) -> Array:
    """Which share of each cell of a grid of at most height x width is visible, in the first of the matrices.

    A partial tile counts as half.
    """
    rows, columns = tiles
    if not rows or not columns or len(all_runs.starts) == 1:
        return np.zeros((0, 0))
    height, width = min(height, rows), min(width, columns)
    row_edges, column_edges = (np.arange(n + 1) * m // n for n, m in ((height, rows), (width, columns)))
    ids, ends, starts = all_runs.ids, all_runs.ends, all_runs.starts
    begins = runs.begins_of(all_runs)
    weight = np.where(ids > FULL, 0.5, ids)
    total = np.zeros((height, width))
    for cell in range(height):
        part = slice(starts[row_edges[cell]], starts[row_edges[cell + 1]])
        # Tiles left of an edge: those of all runs before it, and a part of the run that it cuts.
        cut = np.clip(column_edges, begins[part, None], ends[part, None]) - begins[part, None]
        total[cell] = np.diff(weight[part] @ cut)
    areas = np.diff(row_edges)[:, None] * np.diff(column_edges)
    result: Array = total / areas
    return result


def text(all_runs: Runs, tiles: tuple[int, int]) -> list[str]:
    """Lines of at most 32 characters, at most 16 of them: empty, light, half and full cells."""
    share = shares(all_runs, tiles, HEIGHT, WIDTH)
    level = np.where(share == 0, 0, np.where(share == 1, 3, np.where(share < 0.5, 1, 2)))
    return ["".join(SHADES[n] for n in line).rstrip() for line in level]


def svg(all_runs: Runs, tiles: tuple[int, int], caption: str) -> str:
    """The same picture, finer, as an SVG with a caption."""
    share = shares(all_runs, tiles, CELLS, CELLS)
    height, width = share.shape
    side = 4
    cells = "".join(
        f'<rect x="{x * side}" y="{y * side}" width="{side}" height="{side}" fill-opacity="{share[y, x]:.2f}"/>'
        for y, x in zip(*np.nonzero(share), strict=True)
    )
    return (
        f'<figure><svg xmlns="http://www.w3.org/2000/svg" width="{width * side}" height="{height * side}" '
        f'fill="currentColor"><rect width="100%" height="100%" fill="none" stroke="currentColor"/>{cells}</svg>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
