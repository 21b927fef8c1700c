"""Pieces of HTML for the pictures that notebooks show of objects (`_repr_html_`)."""

import html
from collections.abc import Iterable, Sequence

BLUE, ORANGE, GREY = "#2563eb", "#ea8c1c", "#9aa4b2"
WIDE = 320  # pixels


def table(caption: str, rows: Iterable[Sequence[object]]) -> str:
    """Make a table of two or more columns."""
    cells = ("".join(f'<td style="text-align: left">{html.escape(str(cell))}</td>' for cell in row) for row in rows)
    lines = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<table><caption style="text-align: left"><b>{html.escape(caption)}</b></caption>{lines}</table>'


def bars(shares: Iterable[tuple[float, str]]) -> str:
    """Make a bar for each share of 1, one below the other, with a text that is shown when it is pointed at."""
    drawn = [
        f'<g><title>{html.escape(text)}</title><rect x="0.5" y="{14 * n + 0.5}" width="{WIDE}" height="9" fill="none" '
        f'stroke="{GREY}"/><rect x="0.5" y="{14 * n + 0.5}" width="{WIDE * share:.1f}" height="9" fill="{BLUE}"/></g>'
        for n, (share, text) in enumerate(shares)
    ]
    return _svg(WIDE + 1, 14 * len(drawn), drawn)


def squares(colours: Iterable[tuple[str, str]]) -> str:
    """Make a square of each colour, side by side, with a text that is shown when it is pointed at."""
    columns = WIDE // 10
    drawn = [
        f'<rect x="{10 * (n % columns) + 0.5}" y="{10 * (n // columns) + 0.5}" width="8" height="8" fill="{colour}" '
        f'stroke="{GREY}"><title>{html.escape(text)}</title></rect>'
        for n, (colour, text) in enumerate(colours)
    ]
    return _svg(WIDE, 10 * -(-len(drawn) // columns), drawn)


def _svg(width: int, height: int, parts: list[str]) -> str:
    return f'<svg width="{width}" height="{height + 1}" role="img">{"".join(parts)}</svg>'
