"""``numba-attention bench``: this machine's attention, ours and its peers', and what the machine could do at most.

How a figure comes about, and why:

- Each library runs in a process of its own that lives for the whole run. In one process, two spinning thread pools
  disturb calls of a few milliseconds several-fold, and a peer would be timed at its worst.
- The contenders of a row take turns, one at a time, for several rounds, and each round starts with another. A machine
  that is shared or changes its clock does so under all of them alike, so ratios are taken within a round and their
  median is reported.
- Between turns nothing runs for a while: OpenBLAS keeps its threads spinning for 100 ms after a product (measured), and
  the next one would share the cores with them. Within its turn every library spins and waits as it does by default.
- The ceilings are measured beside the work, in the same rounds: a NumPy matrix product of 2048 x 2048 in the compute
  precision (sgemm, dgemm), and reading an array of 256 MiB once, on the same number of threads.
- Before it is timed, a peer's result is compared with ours: another answer is no contest.
"""

from .report import as_json, as_markdown, as_table, insert, left_out
from .rows import ROWS, Row
from .runner import Result, run

__all__ = ["ROWS", "Result", "Row", "as_json", "as_markdown", "as_table", "insert", "left_out", "run"]
