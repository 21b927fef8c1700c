"""
Which keys a query sees
=======================

Queries of zeros give every visible key the same weight, so the weights show what an option hides. Rows are queries,
columns keys: the darker, the fewer keys share the attention.
"""

import numpy as np

import numba_attention as na

L = 24
query = key = np.zeros((1, L, 8), np.float32)
options = {
    "is_causal=True": {"is_causal": True},
    "window=(5, 5)": {"window": (5, 5)},
    "window=(5, 0)": {"window": (5, 0)},
    "causal, prefix_lengths=8": {"is_causal": True, "prefix_lengths": 8},
    "key_lengths=15": {"key_lengths": 15},
    "causal, query_offset=-6": {"is_causal": True, "query_offset": -6},
}
maps = [na.attention_weights(query, key, **own)[0] for own in options.values()]
# Rows that see nothing are 0. The square root makes the rows with many keys visible.
figure = na.plot.heads(np.sqrt(np.stack(maps)), titles=list(options))

# %%
# ALiBi and sinks do not hide keys. ALiBi prefers near ones, and a sink takes weight that no key then has.

slopes = [[0.0], [0.05], [0.5]]
maps = [na.attention_weights(query, key, is_causal=True, alibi_slopes=slope)[0] for slope in slopes]
maps.append(na.attention_weights(query, key, is_causal=True, sinks=[2.0])[0])
figure = na.plot.heads(np.sqrt(np.stack(maps)), titles=["no slope", "slope 0.05", "slope 0.5", "sink of 2"])
