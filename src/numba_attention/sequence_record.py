"""The record of one sequence, which the host writes and the kernels of CPU and GPU read by name.

Machine code holds the offsets of its fields: the keys of both kernel caches cover this file.
"""

import numpy as np

SEQUENCE = np.dtype([
    (name, np.int64)
    for name in (
        "query", "key", "value", "out", "lse", "bias", "mask",  # byte offsets of the first head of this sequence
        "rows", "queries", "keys", "offset",  # rows of output, valid queries and keys, key position of query 0
        "prefix",  # keys that all queries see
        "batch", "head",  # number of the sequence and of its first head, for slopes and sinks
        "number",  # of the sequence for dropout and mods: in the whole problem, of which this may be a part
        "first",  # work item
        "lists",  # of a block mask: where those of its heads begin, see cpu/visible.py
        "pages", "key_scale", "value_scale",  # addresses: of the numbers of the pages, of the first scales
        # of the backward pass: byte offsets, and all rows of key and value
        "grad_out", "grad_lse", "grad_query", "grad_key", "grad_value", "grad_bias", "delta", "key_rows", "groups",
        "sum_query",  # on a GPU
    )
])  # fmt: skip
