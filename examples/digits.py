"""Learn to read handwritten digits: a small vision transformer in NumPy, what it looks at, and how to fool it.

    python examples/digits.py --out pictures

The images are scikit-learn's: 1797 digits of 8 x 8 pixels. An image is cut into 16 patches of 2 x 2 pixels, which are
the tokens; one more token asks the question, and after two blocks what it has gathered is classified. Training takes
a minute or two. Then it is shown where the heads of the last block look, and each test image is changed a little in the
direction that confuses the model most.

References
----------
.. [1] Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021, section 3.1: the vision transformer.
.. [2] Goodfellow et al., "Explaining and Harnessing Adversarial Examples", 2015, section 4: fast gradient sign.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from numba_attention.nn import Adam, LayerNorm, Linear, Module, TransformerBlock, cross_entropy, warmup_cosine

SIDE, PATCH = 8, 2
GRID = SIDE // PATCH


def load(seed=0, test=360):
    """Images (n, 8, 8) from 0 to 1 and their digits, shuffled and split: to train with, to test with."""
    images, digits = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, SIDE, SIDE)
    order = np.random.default_rng(seed).permutation(len(images))
    return (images[order[test:]], digits[order[test:]]), (images[order[:test]], digits[order[:test]])


def patches_of(images):
    """Images (n, 8, 8) to tokens (n, 16, 4)."""
    n = len(images)
    return images.reshape(n, GRID, PATCH, GRID, PATCH).swapaxes(2, 3).reshape(n, GRID**2, PATCH**2)


def images_of(patches):
    """The inverse of `patches_of`, for gradients."""
    n = len(patches)
    return patches.reshape(n, GRID, GRID, PATCH, PATCH).swapaxes(2, 3).reshape(n, SIDE, SIDE)


def shifted(images, rng):
    """Move two images in three by up to a pixel either way: more to learn from."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (SIDE, SIDE), (1, 2))
    n = len(images)
    down, right = rng.integers(0, 3, (2, n))
    still = rng.random(n) < 1 / 3
    return windows[np.arange(n), np.where(still, 1, down), np.where(still, 1, right)]


class Positions:
    """The question before the patches, and a learned vector added for each place."""

    def __init__(self, places, features, rng, dtype):
        self.question = (0.02 * rng.standard_normal((1, features))).astype(dtype)
        self.places = (0.02 * rng.standard_normal((places + 1, features))).astype(dtype)
        self.grads = {}

    def parameters(self):
        return {"question": self.question, "places": self.places}

    def forward(self, x):
        question = np.broadcast_to(self.question, (len(x), *self.question.shape))
        return np.concatenate([question, x], axis=1) + self.places, None

    def backward(self, grad, ctx):
        self.grads = {"question": grad[:, :1].sum(0), "places": grad.sum(0)}
        return grad[:, 1:]


class VisionTransformer(Module):
    """Patches, positions, blocks, and a classifier of what the question has become, as in [1]_."""

    def __init__(self, features=64, heads=4, blocks=2, rng=None, dtype=np.float32, dropout=0.0):
        rng = np.random.default_rng(rng)
        self.embed = Linear(PATCH**2, features, rng, dtype)
        self.positions = Positions(GRID**2, features, rng, dtype)
        settings = {"rng": rng, "dtype": dtype, "dropout": dropout}
        self.blocks = [TransformerBlock(features, heads, **settings) for _ in range(blocks)]
        self.norm = LayerNorm(features, dtype)
        self.classify = Linear(features, 10, rng, dtype)

    def forward(self, images, training=False):
        """Scores (n, 10) of the ten digits; in training, attention weights are dropped."""
        contexts = []
        x = patches_of(images)
        for part in self.embed, self.positions:
            x, ctx = part.forward(x)
            contexts.append(ctx)
        for block in self.blocks:
            x, ctx = block.forward(x, training=training)
            contexts.append(ctx)
        question, ctx = self.norm.forward(x[:, 0])
        scores, last = self.classify.forward(question)
        return scores, (contexts, x.shape, ctx, last)

    def backward(self, grad, ctx):
        """Gradient of the images; those of the parameters are in `grads`."""
        contexts, shape, normed, last = ctx
        of_question = self.norm.backward(self.classify.backward(grad, last), normed)
        grad = np.zeros(shape, grad.dtype)
        grad[:, 0] = of_question
        for block, ctx in zip(reversed(self.blocks), reversed(contexts[2:]), strict=True):
            grad, _ = block.backward(grad, ctx)
        return images_of(self.embed.backward(self.positions.backward(grad, contexts[1]), contexts[0]))

    def attention(self, images):
        """Where the question looks in the last block: probabilities (n, heads, 16 patches)."""
        x = patches_of(images)
        for part in self.embed, self.positions, *self.blocks[:-1]:
            x, _ = part.forward(x)
        last = self.blocks[-1]
        _, weights = last.attention(last.norm.forward(x)[0], need_weights=True, average_weights=False)
        return weights[:, :, 0, 1:]


def accuracy(model, images, digits):
    """Fraction of images that are read right."""
    return float((model.forward(images)[0].argmax(-1) == digits).mean())


def train(model, images, digits, epochs, rng, batch=128, tell=print):
    """Change the model's parameters, batch after batch of shifted images."""
    adam = Adam(model.parameters(), rate=2e-3, decay=0.1)
    steps = epochs * (len(images) // batch)
    for step in range(steps):
        chosen = rng.choice(len(images), batch, replace=False)
        scores, ctx = model.forward(shifted(images[chosen], rng), training=True)
        loss, grad = cross_entropy(scores, digits[chosen])
        model.backward(grad, ctx)
        adam.step(model.grads, warmup_cosine(step, steps))
        if (step + 1) % max(1, steps // 5) == 0:
            tell(f"step {step + 1}: loss {loss:.3f}")


def fool(model, images, digits, epsilon):
    """Change every pixel by epsilon at most, in the direction that the loss grows in, as in [2]_."""
    scores, ctx = model.forward(images)
    _, grad = cross_entropy(scores, digits)
    return np.clip(images + np.float32(epsilon) * np.sign(model.backward(grad, ctx)), 0, 1)


def draw(model, images, digits, changed, out):
    """Two pictures: where the heads look, and images beside their changed twins."""
    from matplotlib.figure import Figure

    from numba_attention import plot

    out.mkdir(parents=True, exist_ok=True)
    image = images[0]
    figure = plot.patches(image, model.attention(images[:1])[0], grid=(GRID, GRID))
    figure.savefig(out / "digits-attention.png", dpi=100)
    before, after = (model.forward(x)[0].argmax(-1) for x in (images, changed))
    fooled = np.flatnonzero((before == digits) & (after != digits))[:5]
    figure = Figure(figsize=(1.6 * max(2, len(fooled)), 3.6), layout="constrained")
    axes = figure.subplots(2, max(2, len(fooled)), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for column, n in enumerate(fooled):
        for axis, pixels, answer in zip(axes[:, column], (images[n], changed[n]), (before[n], after[n]), strict=True):
            axis.imshow(pixels, cmap="gray_r", vmin=0, vmax=1)
            axis.set_title(f"read as {answer}")
    figure.savefig(out / "digits-fooled.png", dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order of training")
    parser.add_argument("--dropout", type=float, default=0.1, help="of attention weights, in training")
    parser.add_argument("--epsilon", type=float, default=0.1, help="by how much a pixel (0 to 1) is changed to fool it")
    parser.add_argument("--out", type=Path, help="folder for pictures, which need matplotlib")
    arguments = parser.parse_args()

    (images, digits), (test_images, test_digits) = load(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    model = VisionTransformer(rng=rng, dropout=arguments.dropout)
    size = sum(x.size for x in model.parameters().values())
    print(f"{len(images)} images to learn from, {len(test_images)} to test with; {size} parameters")
    start = time.perf_counter()
    train(model, images, digits, arguments.epochs, rng)
    print(f"{time.perf_counter() - start:.0f} s; test accuracy {accuracy(model, test_images, test_digits):.1%}")
    for epsilon in (arguments.epsilon / 2, arguments.epsilon, 2 * arguments.epsilon):
        changed = fool(model, test_images, test_digits, epsilon)
        print(f"pixels changed by {epsilon:g} of 1: accuracy {accuracy(model, changed, test_digits):.1%}")
    if arguments.out:
        changed = fool(model, test_images, test_digits, arguments.epsilon)
        draw(model, test_images, test_digits, changed, arguments.out)
        print(f"pictures are in {arguments.out}")


if __name__ == "__main__":
    main()
