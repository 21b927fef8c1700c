"""
A head that learns where to look
================================

A block of a transformer learns to repeat a text backwards. Its attention before and after training, the mean of its
heads: a row for each place of the answer, a column for each place of the text.
"""

import numpy as np

import numba_attention as na
from numba_attention import nn

SYMBOLS, LENGTH, FEATURES = 8, 10, 32
rng = np.random.default_rng(0)


class Reverser(nn.Module):
    def __init__(self):
        self.embed, self.places = nn.Embedding(SYMBOLS, FEATURES, rng=0), nn.Embedding(LENGTH, FEATURES, rng=1)
        self.block, self.read = nn.TransformerBlock(FEATURES, 4, rng=2), nn.Linear(FEATURES, SYMBOLS, rng=3)

    def forward(self, text):
        places = np.broadcast_to(np.arange(LENGTH), text.shape)
        (first, of_text), (second, of_places) = self.embed.forward(text), self.places.forward(places)
        x, of_block = self.block.forward(first + second)
        scores, of_read = self.read.forward(x)
        return scores, (of_text, of_places, of_block, of_read)

    def backward(self, grad, ctx):
        of_text, of_places, of_block, of_read = ctx
        grad, _ = self.block.backward(self.read.backward(grad, of_read), of_block)
        self.embed.backward(grad, of_text)
        self.places.backward(grad, of_places)

    def looks(self, text):
        x = self.embed(text) + self.places(np.broadcast_to(np.arange(LENGTH), text.shape))
        _, weights = self.block.attention(self.block.norm(x), need_weights=True)
        return weights.mean(0)


model = Reverser()
example = rng.integers(0, SYMBOLS, (100, LENGTH))
maps = [model.looks(example)]
adam = nn.Adam(model.parameters(), rate=5e-3)
for _ in range(300):
    text = rng.integers(0, SYMBOLS, (64, LENGTH))
    scores, ctx = model.forward(text)
    loss, grad = nn.cross_entropy(scores, text[:, ::-1])
    model.backward(grad, ctx)
    adam.step(model.grads)
maps.append(model.looks(example))
print(f"loss {loss:.3f}")
figure = na.plot.heads(np.stack(maps), titles=["before", "after"])
