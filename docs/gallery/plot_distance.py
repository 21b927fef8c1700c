"""
Scores that depend on the distance
==================================

Attention does not know positions unless it is told. Rotary embeddings turn queries and keys by an angle that grows
with their position, so that the product of two equal vectors depends on their distance only, and falls with it on
average. ALiBi subtracts a multiple of the distance. A score rule of your own can do anything.
"""

import numpy as np
from matplotlib.figure import Figure

import numba_attention as na

L, E = 200, 64
rng = np.random.default_rng(0)
vectors = rng.standard_normal((100, 1, E))
same = np.broadcast_to(vectors, (100, L, E))
rotated = na.apply_rotary(same.copy(), np.arange(L))
scores = np.einsum("ne,nle->nl", rotated[:, 0], rotated) / E  # of the first position with every other

figure = Figure(figsize=(6, 3.5), layout="constrained")
axis = figure.subplots()
axis.plot(scores.mean(0), label="rotary, mean of 100 vectors")
axis.plot(scores[0], label="rotary, one vector", linewidth=0.8)
for slope in (0.002, 0.01):
    axis.plot(1 - slope * np.arange(L), label=f"ALiBi, slope {slope}")
axis.set_xlabel("distance")
axis.set_ylabel("score")
axis.set_ylim(-0.6, 1.05)
axis.legend()


# %%
# What ALiBi does to the weights of the last of 200 queries, and a rule that prefers every tenth key:


def tenth(score, batch, head, i, j):
    return score + 2 * ((i - j) % 10 == 0)


zeros = np.zeros((1, L, E))
figure = Figure(figsize=(6, 3), layout="constrained")
axis = figure.subplots()
axis.plot(na.attention_weights(zeros, zeros, rows=[L - 1], is_causal=True, alibi_slopes=[0.03])[0, 0], label="ALiBi")
axis.plot(na.attention_weights(zeros, zeros, rows=[L - 1], is_causal=True, score_mod=tenth)[0, 0], label="tenth")
axis.set_xlabel("key")
axis.set_ylabel("weight")
axis.legend()
