"""Seconds of whole public calls, over shapes, dtypes and options."""

import numpy as np

import numba_attention as na
from numba_attention.benchmarking.rows import Row, inputs

SHAPES = {
    "1x1x1x64": Row("", 1, 1, 1, 1, 1),
    "H8 L64 E64": Row("", L=64, S=64),
    "B8 H12 L128 E32": Row("", 8, 12, 12, 128, 128, 32, 32),
    "H8 L1024 E64": Row("", L=1024, S=1024),
    "H8 L1024 E128": Row("", L=1024, S=1024, E=128, Ev=128),
    "H8 Hkv2 L1024 E64": Row("", Hkv=2, L=1024, S=1024),
    "H8 L100 S1000 E64": Row("", L=100, S=1000),
}
OPTIONS = {
    "plain": {},
    "is_causal": {"is_causal": True},
    "bottom-right": {"is_causal": "bottom-right"},
    "window": {"window": (128, 128)},
    "key_lengths": {"key_lengths": 900},
    "softcap": {"softcap": 30.0},
    "sinks": {"sinks": [1.0] * 8},
    "return_lse": {"return_lse": True},
}


class Forward:
    params = (list(SHAPES), ["float32", "float64", "float16", "bfloat16"])
    param_names = ("shape", "dtype")

    def setup(self, shape, dtype):
        row = SHAPES[shape]
        arrays = inputs(Row("", row.B, row.H, row.Hkv, row.L, row.S, row.E, row.Ev, dtype))
        self.arrays = arrays["query"], arrays["key"], arrays["value"]
        na.attention(*self.arrays)

    def time_attention(self, shape, dtype):
        na.attention(*self.arrays)


class Backward:
    params = (list(SHAPES), ["float32", "float64", "float16", "bfloat16"])
    param_names = ("shape", "dtype")

    def setup(self, shape, dtype):
        row = SHAPES[shape]
        arrays = inputs(Row("", row.B, row.H, row.Hkv, row.L, row.S, row.E, row.Ev, dtype))
        query, key, value = arrays["query"], arrays["key"], arrays["value"]
        out, lse = na.attention(query, key, value, return_lse=True)
        self.arrays = np.ones_like(out), query, key, value, out, lse
        na.attention_backward(*self.arrays)

    def time_attention_backward(self, shape, dtype):
        na.attention_backward(*self.arrays)


class Options:
    """Each option by itself, beside none."""

    params = (list(OPTIONS),)
    param_names = ("option",)

    def setup(self, option):
        arrays = inputs(SHAPES["H8 L1024 E64"])
        self.arrays = arrays["query"], arrays["key"], arrays["value"]
        na.attention(*self.arrays, **OPTIONS[option])

    def time_attention(self, option):
        na.attention(*self.arrays, **OPTIONS[option])


class Arrays:
    """The options that are arrays of scores, whole and broadcast."""

    params = (["mask", "bias", "alibi"],)
    param_names = ("option",)

    def setup(self, option):
        row = Row("", L=1024, S=1024, mask=option == "mask", bias=option == "bias", alibi=option == "alibi")
        arrays = inputs(row)
        self.arrays = tuple(arrays.pop(name) for name in ("query", "key", "value"))
        self.options = arrays
        na.attention(*self.arrays, **self.options)

    def time_attention(self, option):
        na.attention(*self.arrays, **self.options)


class Weights:
    def setup(self):
        arrays = inputs(SHAPES["H8 L1024 E64"])
        self.arrays = arrays["query"], arrays["key"]
        na.attention_weights(*self.arrays, rows=[0, 511])

    def time_all_heads_two_rows(self):
        na.attention_weights(*self.arrays, rows=[0, 511])
