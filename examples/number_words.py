"""Learn to read numbers: an encoder-decoder transformer that turns English number words into digits.

    python examples/number_words.py
    python examples/number_words.py "three hundred and forty-two thousand seventeen"

It is trained here, in NumPy and in about a minute, on some of the numbers below a million, and tested on others that it
has never seen. A digit for each word is not enough: the 0 of 305 has no word, whether "ninety" is 90 or begins 90006 is
for the words after it to say, and some speakers leave out "and". So each digit has to look for its words; where it
looked is shown at the end.

References
----------
.. [1] Vaswani et al., "Attention Is All You Need", 2017, section 3.1: the encoder, the decoder, and what joins them.
.. [2] Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020: the norm comes first in each block.
"""

import argparse
import time
from pathlib import Path

import numpy as np

import numba_attention as na
from numba_attention.nn import (
    Adam,
    Embedding,
    LayerNorm,
    Linear,
    Module,
    TransformerBlock,
    cross_entropy,
    warmup_cosine,
)

ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
ONES += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
WORDS = {word: token for token, word in enumerate([*ONES, *TENS, "hundred", "thousand", "and"])}
DIGITS = "0123456789."
STOP = DIGITS.index(".")  # ends every number, and is what the first digit is predicted from
LARGEST = 999_999


def spell(number, rng=None):
    """Say a number below a million in English; with `rng`, each "and" is left out half of the time, as people do."""
    if number < 20:
        return ONES[number]
    if number < 100:
        ten, one = divmod(number, 10)
        return TENS[ten - 2] + (f"-{ONES[one]}" if one else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    count, rest = divmod(number, size)
    text = f"{spell(count, rng)} {name}"
    if rest == 0:
        return text
    say_and = rest < 100 and (rng is None or rng.random() < 0.5)
    return f"{text} and {spell(rest, rng)}" if say_and else f"{text} {spell(rest, rng)}"


def words_of(text):
    return text.lower().replace("-", " ").split()


def read(text):
    """Tokens of number words."""
    return [WORDS[word] for word in words_of(text)]


def write(number):
    """Tokens of digits, the stop included."""
    return [DIGITS.index(digit) for digit in f"{number}."]


def pad(sequences):
    """Sequences of tokens as the rows of one array, filled up with 0, and their lengths."""
    lengths = np.array([len(sequence) for sequence in sequences])
    padded = np.zeros((len(sequences), lengths.max()), int)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded, lengths


def split(largest, rng):
    """Two disjoint sets of the numbers up to `largest`: to learn from, and a tenth of them to be tested with."""
    held_out = rng.random(largest + 1) < 0.1
    held_out[0] = False  # "zero" is said in no other number: who never heard it cannot know it
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def draw(numbers, count, rng):
    """Draw some of the ordered numbers, short ones too: of all below a million, nine in ten have six digits."""
    near = numbers[-1] ** np.sqrt(rng.random(count))  # the more digits the likelier, but not tenfold
    return numbers[np.searchsorted(numbers[:-1], near - 1)]


class Translator(Module):
    """The transformer of [1]_, with the norms of [2]_, and with rotary positions instead of sines.

    The encoder makes a memory of the words, each among its neighbours. The decoder sees the digits so far, and looks up
    in the memory which one comes next.
    """

    def __init__(self, features=64, heads=4, blocks=2, rng=None, dtype=np.float32):
        rng = np.random.default_rng(rng)
        options = {"rotary": True, "rng": rng, "dtype": dtype}
        self.words = Embedding(len(WORDS), features, rng, dtype)
        self.encoder = [TransformerBlock(features, heads, **options) for _ in range(blocks)]
        self.encoder_norm = LayerNorm(features, dtype)
        self.digits = Embedding(len(DIGITS), features, rng, dtype)
        self.decoder = [TransformerBlock(features, heads, cross=True, **options) for _ in range(blocks)]
        self.decoder_norm = LayerNorm(features, dtype)
        self.classify = Linear(features, len(DIGITS), rng, dtype)

    def encode(self, words, lengths):
        """Make a memory (B, S, features) of words (B, S), of which the first `lengths` of each row count."""
        x, ctx = self.words.forward(words)
        contexts = [ctx]
        for block in self.encoder:
            x, ctx = block.forward(x, key_lengths=lengths)
            contexts.append(ctx)
        memory, ctx = self.encoder_norm.forward(x)
        return memory, [*contexts, ctx]

    def decode(self, digits, memory, lengths):
        """Scores (B, L, 11) of what follows each of the digits (B, L), the first of which is STOP."""
        x, ctx = self.digits.forward(digits)
        contexts = [ctx]
        for block in self.decoder:
            # No lengths of digits: what fills them up comes last, where no digit before it can look.
            x, ctx = block.forward(x, memory, memory_lengths=lengths, is_causal=True)
            contexts.append(ctx)
        x, normed = self.decoder_norm.forward(x)
        scores, last = self.classify.forward(x)
        return scores, [*contexts, normed, last]

    def caches(self, batch, longest, words):
        """Make the two caches of every block of the decoder, for so many digits and words."""
        heads, features = self.decoder[0].attention.num_heads, self.decoder[0].attention.head_dim
        dtype = self.decoder[0].attention.dtype
        return [[na.KVCache(batch, heads, n, features, dtype=dtype) for n in (longest, words)] for _ in self.decoder]

    def decode_next(self, digits, caches, memory, lengths):
        """Do what `decode` does for the next digits (B, 1) alone; caches keep what the others were computed from."""
        x, _ = self.digits.forward(digits)
        for block, (cache, memory_cache) in zip(self.decoder, caches, strict=True):
            x = block.step(x, cache, memory, memory_cache, lengths)
        return self.classify.forward(self.decoder_norm.forward(x)[0])[0]

    def backward(self, grad, encoded, decoded):
        """From the gradient of the scores to `grads`, by way of what `encode` and `decode` kept."""
        embedded, *contexts, normed, last = decoded
        grad = self.decoder_norm.backward(self.classify.backward(grad, last), normed)
        of_memory = 0  # every block of the decoder has looked at it
        for block, ctx in zip(reversed(self.decoder), reversed(contexts), strict=True):
            grad, of_block = block.backward(grad, ctx)
            of_memory = of_memory + of_block
        self.digits.backward(grad, embedded)
        embedded, *contexts, normed = encoded
        grad = self.encoder_norm.backward(of_memory, normed)
        for block, ctx in zip(reversed(self.encoder), reversed(contexts), strict=True):
            grad, _ = block.backward(grad, ctx)
        self.words.backward(grad, embedded)

    def looks(self, text, digits):
        """Where each of the digits looked in the last block: probabilities (heads, L, S)."""
        words, lengths = pad([read(text)])
        memory, _ = self.encode(words, lengths)
        x, _ = self.digits.forward(np.array([[STOP, *write(digits)[:-1]]]))
        *blocks, last = self.decoder
        for block in blocks:
            x, _ = block.forward(x, memory, is_causal=True)
        x = x + last.attention(last.norm.forward(x)[0], is_causal=True)
        x, _ = last.cross_norm.forward(x)
        _, weights = last.cross(x, memory, need_weights=True, average_weights=False)
        return weights[0]


def loss_of(model, words, digits):
    """Mean surprise at each digit, given the true ones before it; its gradients are then in `model.grads`."""
    words, lengths = pad(words)
    digits, counts = pad(digits)
    before = np.insert(digits[:, :-1], 0, STOP, axis=1)
    memory, encoded = model.encode(words, lengths)
    scores, decoded = model.decode(before, memory, lengths)
    loss, grad = cross_entropy(scores, digits, np.arange(digits.shape[1]) < counts[:, None])
    model.backward(grad, encoded, decoded)
    return loss


def train(model, numbers, steps, rng, batch=128, tell=print):
    """Change the model's parameters, batch after batch of numbers and what they are called; the last loss."""
    adam = Adam(model.parameters(), rate=3e-3)
    digits = [write(number) for number in numbers]
    words = [read(spell(number, rng)) for number in numbers]
    for step in range(steps):
        chosen = rng.integers(0, len(numbers), batch)
        loss = loss_of(model, [words[n] for n in chosen], [digits[n] for n in chosen])
        adam.step(model.grads, warmup_cosine(step, steps))
        if (step + 1) % max(1, steps // 6) == 0:
            tell(f"step {step + 1}: loss {loss:.4f}")
    return loss


def translate(model, texts, longest=7):
    """Turn number words into digits, always taking the likeliest one next."""
    words, lengths = pad([read(text) for text in texts])
    memory, _ = model.encode(words, lengths)
    caches = model.caches(len(texts), longest, memory.shape[1])
    digits = np.full((len(texts), 1), STOP)
    for _ in range(longest):
        scores = model.decode_next(digits[:, -1:], caches, memory, lengths)
        digits = np.append(digits, scores.argmax(-1), axis=1)
        memory, lengths = memory[:, :0], None  # its keys and values are in the caches now
    return ["".join(DIGITS[digit] for digit in row[1:]).partition(".")[0] for row in digits]


def mistakes(model, numbers, rng=None):
    """Words and answer for each of the numbers of which not every digit comes back."""
    texts = [spell(number, rng) for number in numbers]
    answers = zip(numbers, texts, translate(model, texts), strict=True)
    return [(text, answer) for number, text, answer in answers if answer != str(number)]


def show_looks(model, text, out=None):
    """Print which words each digit looked at, in percent, the mean over the heads; with `out`, draw each head."""
    digits = translate(model, [text])[0]
    words, looks = words_of(text), model.looks(text, digits)
    print(" " * 3, *words)
    for digit, row in zip(f"{digits}.", looks.mean(0), strict=True):
        cells = (f"{100 * weight:.0f}" if weight >= 0.05 else "." for weight in row)
        print(f"{digit:>3}", *(f"{cell:>{len(word)}}" for cell, word in zip(cells, words, strict=True)))
    if out:
        from numba_attention import plot

        out.mkdir(parents=True, exist_ok=True)
        plot.heads(looks, list(f"{digits}."), words).savefig(out / "number-words-attention.png", dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="*", help="number words to translate after training")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order of training")
    parser.add_argument("--out", type=Path, help="folder for a picture, which needs matplotlib")
    arguments = parser.parse_args()
    for text in arguments.text:
        if unknown := set(words_of(text)) - WORDS.keys():
            parser.error(f"not a number word: {', '.join(sorted(unknown))}")

    rng = np.random.default_rng(arguments.seed)
    known, held_out = split(LARGEST, rng)
    numbers, tests = draw(known, 20_000, rng), np.unique(draw(held_out, 2_000, rng))
    model = Translator(rng=rng)
    size = sum(x.size for x in model.parameters().values())
    print(f"{len(np.unique(numbers))} numbers to learn from, {len(tests)} others to test with; {size} parameters")
    start = time.perf_counter()
    train(model, numbers, arguments.steps, rng, arguments.batch)
    wrong = mistakes(model, tests, rng)
    right = 1 - len(wrong) / len(tests)
    print(f"{time.perf_counter() - start:.0f} s; {right:.2%} of the tests are right in every digit")
    for text, answer in wrong[:3]:
        print(f"wrong: {text} -> {answer}")

    texts = arguments.text or [spell(number, rng) for number in rng.choice(tests, 5, replace=False)]
    for text, answer in zip(texts, translate(model, texts), strict=True):
        print(f"{text} -> {answer}")
    print("where each digit looks, in percent:")
    show_looks(model, arguments.text[0] if arguments.text else "eight hundred and five thousand forty", arguments.out)


if __name__ == "__main__":
    main()
