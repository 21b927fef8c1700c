"""``numba-attention bench``: this package, other libraries and the machine's own ceilings, timed side by side.

How a figure is measured, and why:

- Each library runs in a process of its own that lives for the whole run. In one process, two thread pools that spin
  disturb calls of a few milliseconds several-fold, and the other library would be timed at its worst.
- The contenders of a row take turns, one at a time, for several rounds, and each round starts with another contender.
  A machine that is shared or changes its clock slows all of them alike, so ratios are taken within a round and the
  median of the rounds is reported.
- Between turns nothing runs for a while: OpenBLAS keeps its threads spinning for 100 ms after a product (measured), and
  the next contender would share the cores with them. Within its turn every library spins and waits as it does by
  default.
- The ceilings are measured in the same rounds: a NumPy matrix product of 2048 x 2048 in the compute precision (sgemm,
  dgemm), and reading an array of 256 MiB once, on the same number of threads.
- A library whose result differs from ours is not timed, and the report says so.
"""

from .report import around, as_json, as_line, as_markdown, as_table, circumstances, from_json, insert, left_out
from .rows import ROWS, Row
from .runner import Result, run

__all__ = [
    "ROWS",
    "Result",
    "Row",
    "around",
    "as_json",
    "as_line",
    "as_markdown",
    "as_table",
    "circumstances",
    "from_json",
    "insert",
    "left_out",
    "run",
]
