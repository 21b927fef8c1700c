"""What a kernel is told: one record a call and one record a sequence, written by the host, read by name in the kernel.

Kernels take the address of the first record and nothing else. Array arguments would multiply specialisations by layout and
read-only flag, and cost about 0.1 us each.
"""

import struct

import numpy as np

SCRATCH = (
    "queries", "keys", "values", "scores", "weights", "bias", "mask", "out", "state", "hidden",
    "query_rows", "out_rows", "bias_rows", "mask_rows", "lse_rows", "starts", "stops", "positions",
)  # fmt: skip

INTEGERS = (
    "counter", "items", "scratch", "scratch_size", "sequences", "number",
    "heads", "group", "E", "Ev", "Ev_padded",
    "query_head", "query_row", "query_column", "key_head", "key_row", "key_column",
    "value_head", "value_row", "value_column", "out_head", "out_row", "out_column",
    "lse_head", "lse_row", "bias_head", "bias_row", "bias_column", "bias_kind",
    "mask_head", "mask_row", "mask_column", "left", "right", "slopes", "sinks", "chosen",
    *(f"at_{name}" for name in SCRATCH),
)  # fmt: skip
REALS = ("prescale", "factor", "cap_inner", "cap_outer")

PARAMS = np.dtype([(name, np.int64) for name in INTEGERS] + [(name, np.float64) for name in REALS])
_PACK = struct.Struct(f"={len(INTEGERS)}q{len(REALS)}d")
assert _PACK.size == PARAMS.itemsize

SEQUENCE = np.dtype([
    (name, np.int64)
    for name in (
        "query", "key", "value", "out", "lse", "bias", "mask",  # addresses of the first head; lse, mask: 0 if absent
        "rows", "queries", "keys", "offset",  # rows of output, valid queries and keys, key position of query 0
        "batch", "head", "first",  # index among the sequences and of the first head (for slopes, sinks), first work item
    )
])  # fmt: skip


def write(buffer: bytearray | memoryview, values: list[int | float]) -> None:
    """Write one `PARAMS` record, all integers in order and then all reals."""
    _PACK.pack_into(buffer, 0, *values)
