"""Every kind of kernel once, on small sizes: ``compute-sanitizer python sanitized.py``."""

import numpy as np

import numba_attention as na
from cases import DTYPES
from numba_attention.cuda import kernels


def main():
    rng = np.random.default_rng(0)
    launched = set()
    compiled = kernels.compiled

    def remember(c):
        launched.add((c.task, c.product, c.nan_safe, c.split_kv, c.paged))
        return compiled(c)

    kernels.compiled = remember
    for name, dtype in DTYPES.items():
        q, k, v = (rng.standard_normal((2, heads, 90, 40)).astype(dtype) for heads in (4, 2, 2))
        bias, sinks = rng.standard_normal((4, 90, 90)).astype(np.float32), np.ones(4)
        for options in ({}, {"is_causal": True}, {"bias": bias, "sinks": sinks, "softcap": 3.0, "window": (40, 5)}):
            out, lse = na.attention(q, k, v, **options, return_lse=True, backend="cuda")
            na.attention_backward(out, q, k, v, out, lse, **options, backend="cuda")
        starts = [0, 50, 50, 90]
        packed = [np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in (q, k, v)]
        out, lse = na.attention_varlen(*packed, starts, starts, is_causal=True, return_lse=True, backend="cuda")
        na.attention_varlen_backward(out, *packed, out, lse, starts, starts, is_causal=True, backend="cuda")
        cache, pages = na.KVCache(2, 2, 300, 40, dtype=dtype), na.PagedKVCache(60, 16, 2, 40, dtype=dtype)
        ids = pages.add(2)
        for _ in range(3):
            cache.append(k, v)
            pages.append(ids, k, v)
        one = na.attention_decode(q[:, :, :1], cache, backend="cuda")
        other = na.attention_decode(q[:, :, :1], pages, backend="cuda")
        assert np.array_equal(one, other)
        na.attention_weights(q, k, heads=[1, 3], rows=slice(0, 70), is_causal=True, backend="cuda")
        print(name, "done", flush=True)
    assert {task for task, *_ in launched} == {
        "forward", "combine", "delta", "query", "key", "round", "bias", "sinks", "weights", "reduce"
    }  # fmt: skip
    print(len(launched), "kinds of kernels")


if __name__ == "__main__":
    main()
