"""What a kernel is told: one record a call and one record a sequence, written by the host, read by name in the kernel.

Kernels take the address of the first record and nothing else. Array arguments would multiply specialisations by layout
and read-only flag, and cost about 0.1 us each.
"""

import struct

import numpy as np

from . import scratch

# Fields that change with every call come first, so that a plan can store the others as bytes (see backends/cpu.py).
ADDRESSES = (
    "query", "key", "value", "out",
    "counter", "scratch", "sequences", "lse", "bias", "mask", "slopes", "sinks", "chosen", "visible", "seed",
    "score_mod", "mask_mod", "mod_data",
    "grad_out", "grad_lse", "grad_query", "grad_key", "grad_value", "grad_bias", "delta",
    "second", "mod_gradient", "mod_sums", "mod_has_slope",
    "turns", "members", "counts", "partial",
)  # fmt: skip
INTEGERS = (
    "items", "scratch_size", "number", "heads", "group", "E", "Ev", "out_depth",
    "query_head", "query_row", "query_column", "key_head", "key_row", "key_column",
    "value_head", "value_row", "value_column", "out_head", "out_row", "out_column",
    "lse_head", "lse_row", "bias_head", "bias_row", "bias_column", "bias_kind",
    "mask_head", "mask_row", "mask_column", "left", "right",
    *(f"at_{name}" for name in scratch.NAMES),
    # KV caches: keys in a page, and strides
    "page_size", "key_page", "value_page", "key_scale_head", "key_scale_page", "value_scale_head", "value_scale_page",
    "partial_size", "staged", "tiny", "dropout",
    "first_key", "first_head",  # of the whole problem, for dropout and mods
    # backward pass
    "kv_heads", "E_padded", "Ev_padded",
    "grad_out_head", "grad_out_row", "grad_out_column", "grad_lse_head", "grad_lse_row",
    "grad_query_head", "grad_query_row", "grad_key_head", "grad_key_row", "grad_value_head", "grad_value_row",
    "grad_bias_head", "grad_bias_row", "grad_bias_column", "grad_bias_group", "grad_bias_once",
    "delta_head", "delta_row",
    "mod_sums_head", "mod_sums_group",
)  # fmt: skip
# Queries are multiplied by `prescale`, and their products with keys by `rest` to give natural scores. The softmax sees
# scores in units of `unit`: products, or natural scores where a stage has converted them. See `records.scaling_of`.
REALS = ("prescale", "rest", "unit", "cap_inner", "cap_outer", "gradient_prescale", "gradient_scale", "dropout_scale")

# Addresses of the arrays of lists of visible tiles, for calls with a block mask: see `masks.lists`.
LISTS = np.dtype([(name, np.int64) for name in ("first", "starts", "runs", "words", "order")])

# Derivatives along a direction (`cpu.second`): addresses of the tangents, 0 for those that are 0, and their strides;
# flags of what is wanted; and arrays of one number, or one row, for each row of each head of each sequence.
TANGENTS = ("query", "key", "value", "bias", "grad_out")
OFFSETS = np.dtype([(name, np.int64) for name in (*TANGENTS, "first")])  # bytes, and the number of the first row
SECOND = np.dtype([
    (name, np.int64)
    for name in (
        *TANGENTS,
        *(f"{name}_{axis}" for name in TANGENTS for axis in ("head", "row", "column")),
        "offsets", "of_results", "of_gradients", "online", "out_tangent", "lse_tangent", "delta_tangent", "score_sums",
        "head_rows",  # rows from one head to the next in those arrays
    )
])  # fmt: skip

STOPPED = 2**62  # value of the work counter that cancels a call: no item is left, and those begun are abandoned
NEVER = 2**62  # a position beyond every other

PARAMS = np.dtype([(name, np.int64) for name in ADDRESSES + INTEGERS] + [(name, np.float64) for name in REALS])
ARRAYS = 8 * 4  # byte offset of the addresses after query, key, value, out
pack_addresses = struct.Struct(f"={len(ADDRESSES) - 4}q").pack_into
pack_rest = struct.Struct(f"={len(INTEGERS)}q{len(REALS)}d").pack
REST = 8 * len(ADDRESSES)  # byte offset of the fields that a plan stores
