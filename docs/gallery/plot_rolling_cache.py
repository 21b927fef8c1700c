"""
What a rolling cache keeps
==========================

A cache with ``window=12, keep_first=3`` has 15 places. Each row of the picture is one step of decoding, each column a
place, and the colour is the position of the token that is there. The first three never change; the others are a ring,
in which the newest token takes the place of the oldest. Nothing is moved, and positions stay true.
"""

import numpy as np
from matplotlib.figure import Figure

import numba_attention as na

cache = na.KVCache(batch=1, num_kv_heads=1, capacity=15, head_dim=8, window=12, keep_first=3)
token = np.zeros((1, 1, 1, 8), np.float32)
steps = np.full((60, 15), np.nan)
for step in steps:
    cache.append(token, token)
    positions = cache.positions[0]
    step[: len(positions)] = np.where(positions < 0, np.nan, positions)

figure = Figure(figsize=(4, 6), layout="constrained")
axis = figure.subplots()
picture = axis.imshow(steps, aspect="auto", interpolation="nearest")
axis.set_xlabel("place")
axis.set_ylabel("step")
figure.colorbar(picture, label="position")
