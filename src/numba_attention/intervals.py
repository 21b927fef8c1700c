"""Every structural mask is one half-open interval of keys per query row: the only place that decides it.

Causality, sliding windows, offsets and lengths all reduce to ``start <= j < stop``. Both ends grow with the query row,
so the rows that see a tile of keys are an interval too. Plain Python that compiles for any target.
"""

FAR = 2**41  # reach of an unbounded window: beyond any position, far from overflow


def visible(i: int, queries: int, keys: int, offset: int, left: int, right: int) -> tuple[int, int]:
    """The keys that query row i sees.

    Parameters
    ----------
    i : int
        Query row, 0 <= i; rows at or past `queries` see nothing.
    queries, keys : int
        Valid lengths of the sequence.
    offset : int
        Row i sits at key position p = i + offset.
    left, right : int
        Keys p - left .. p + right are within reach; `FAR` for no limit.

    Returns
    -------
    start, stop : int
        0 <= start <= stop <= keys.
    """
    if i >= queries:
        return 0, 0
    start = min(max(0, i + offset - left), keys)
    stop = min(keys, i + offset + right + 1)
    return start, max(start, stop)
