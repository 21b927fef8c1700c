"""Greedy text from a small trained decoder: without a cache, with one, with pages, and several prompts at once.

The PyPI package `glassllm` ships the weights of a language model of 4 layers (4 query heads on 2 key/value heads,
rotary positions, 1024 tokens), trained on 230 000 tokens of English, and its own NumPy code: it says what is right.

    python examples/generate.py "The whale" --tokens 100

Every step asks for the same thing: append the new keys and values, attend to all there are. What differs is only where
they are kept.
"""

import argparse
import statistics
import time

import glassllm
import numpy as np
from threadpoolctl import threadpool_limits

import numba_attention as na


class NoCache:
    """Keeps nothing: every step is given the whole text again."""

    whole = True

    def attend(self, layer, q, k, v, lengths):
        return na.attention(q, k, v, is_causal=True, query_lengths=lengths, key_lengths=lengths)


class Contiguous:
    """One `KVCache` for each layer."""

    whole = False

    def __init__(self, config, capacity, storage=None, batch=1):
        heads, features = config.n_kv_heads, config.d_model // config.n_heads
        self.caches = [na.KVCache(batch, heads, capacity, features, storage=storage) for _ in range(config.n_layers)]

    def start(self):
        return self.caches[0].lengths

    def attend(self, layer, q, k, v, lengths):
        self.caches[layer].append(k, v, lengths)
        return na.attention_decode(q, self.caches[layer], query_lengths=lengths)


class Paged:
    """One `PagedKVCache` for each layer, in pages of 16 tokens."""

    whole = False

    def __init__(self, config, capacity, storage=None, batch=1):
        heads, features = config.n_kv_heads, config.d_model // config.n_heads
        pages = batch * -(-capacity // 16)
        self.caches = [na.PagedKVCache(pages, 16, heads, features, storage=storage) for _ in range(config.n_layers)]
        for cache in self.caches:
            self.ids = cache.add(batch)  # the same in every layer

    def start(self):
        return self.caches[0].lengths(self.ids)

    def attend(self, layer, q, k, v, lengths):
        self.caches[layer].append(self.ids, k, v, lengths)
        return na.attention_decode(q, self.caches[layer], ids=self.ids, query_lengths=lengths)


class Decoder:
    """The model, with arrays taken from glassllm's."""

    def __init__(self, model):
        self.config = model.cfg
        self.weights = {name: tensor.data for name, tensor in model.named_parameters().items()}

    def logits(self, tokens, keep, lengths=None):
        """Logits (batch, T, vocabulary) for tokens (batch, T), of which each sequence has the first `lengths`."""
        w, config = self.weights, self.config
        start = np.zeros(len(tokens), np.int64) if keep.whole else keep.start()
        positions = start[:, None, None] + np.arange(tokens.shape[1])  # for all heads
        x = w["E"][tokens]
        for layer in range(config.n_layers):
            own = f"blocks.{layer}."
            h = rms_norm(x, w[own + "norm1.gamma"], config.eps)
            q, k, v = (split(h @ w[own + name], config) for name in ("attn.W_Q", "attn.W_K", "attn.W_V"))
            q, k = (na.apply_rotary(y, positions, base=config.rope_base, interleaved=True) for y in (q, k))
            heads = keep.attend(layer, q, k, v, lengths)
            x = x + heads.swapaxes(1, 2).reshape(x.shape) @ w[own + "attn.W_O"]
            h = rms_norm(x, w[own + "norm2.gamma"], config.eps)
            gate = h @ w[own + "ffn.W1"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w[own + "ffn.W3"])) @ w[own + "ffn.W2"]
        return rms_norm(x, w["norm_f.gamma"], config.eps) @ w["E"].T

    def generate(self, prompt, n, keep):
        """The n tokens most likely to follow, one after the other, and the logits they were chosen by."""
        text, new, rows = list(prompt), list(prompt), []
        for _ in range(n):
            row = self.logits(np.array([text if keep.whole else new]), keep)[0, -1]
            new = [int(row.argmax())]
            text += new
            rows.append(row)
        return text[len(prompt) :], np.array(rows)

    def generate_batch(self, prompts, n, keep):
        """The same for several prompts at once, of any lengths, with a cache: later steps only have that."""
        lengths = np.array([len(prompt) for prompt in prompts])
        tokens = np.zeros((len(prompts), lengths.max()), np.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        logits = self.logits(tokens, keep, lengths)[np.arange(len(prompts)), lengths - 1]
        found = [logits.argmax(-1)]
        while len(found) < n:
            found.append(self.logits(found[-1][:, None], keep)[:, -1].argmax(-1))
        return np.array(found).T.tolist()


def rms_norm(x, gamma, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps)) * gamma


def split(x, config):
    """(batch, T, heads * E) -> (batch, heads, T, E)."""
    features = config.d_model // config.n_heads
    return x.reshape(*x.shape[:2], x.shape[2] // features, features).swapaxes(1, 2)


def glassllm_greedy(model, prompt, n):
    """What the package itself generates, and its logits, with its own cache."""
    cache, tokens, rows, start = model.new_cache(), list(prompt), [], 0
    pending = list(prompt)
    with glassllm.no_grad():
        for _ in range(n):
            row = model.forward(pending, cache=cache, start=start).data[0, -1]
            start += len(pending)
            pending = [int(row.argmax())]
            tokens += pending
            rows.append(row)
    return tokens[len(prompt) :], np.array(rows)


def compare(decoder, model, prompt, n):
    """Print how fast each way generates n tokens, and how near it is to glassllm; return glassllm's tokens."""
    want, want_logits = glassllm_greedy(model, prompt, n)
    capacity = len(prompt) + n
    ways = {
        "no cache": NoCache,
        "KVCache": lambda: Contiguous(model.cfg, capacity),
        "PagedKVCache": lambda: Paged(model.cfg, capacity),
        "KVCache, int8": lambda: Contiguous(model.cfg, capacity, "int8"),
    }
    runs = {"glassllm": lambda: glassllm_greedy(model, prompt, n)}
    runs |= {name: lambda make=make: decoder.generate(prompt, n, make()) for name, make in ways.items()}
    results = {name: run() for name, run in runs.items()}  # compiles, or loads what was compiled before
    seconds = {name: [] for name in runs}
    for _ in range(5):  # in turn, so that a busy machine is as slow for all of them
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    print(f"{n} tokens after {len(prompt)}:   tokens/s   same tokens   largest difference of a logit")
    for name, (tokens, logits) in results.items():
        same = next((i for i, pair in enumerate(zip(tokens, want, strict=True)) if pair[0] != pair[1]), n)
        # As long as the tokens are the same: after that it is another text.
        difference = np.abs(logits[: same + 1] - want_logits[: same + 1]).max()
        print(f"{name:20} {n / statistics.median(seconds[name]):12.0f} {same:13} {difference:13.1e}")
    return want


def show_batch(decoder, model, tokenizer, texts):
    """Print how several texts go on, generated together."""
    prompts = [tokenizer.encode(text) for text in texts]
    longest = max(map(len, prompts))
    n = min(24, model.cfg.max_len - longest)
    together = decoder.generate_batch(prompts, n, Paged(model.cfg, longest + n, batch=len(prompts)))
    print(f"\nPrompts of {', '.join(str(len(prompt)) for prompt in prompts)} tokens in one PagedKVCache:")
    for text, prompt, tokens in zip(texts, prompts, together, strict=True):
        same = tokens == glassllm_greedy(model, prompt, n)[0]
        print(f"  {text}|{tokenizer.decode(tokens)!r}", "" if same else "(glassllm goes on otherwise)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="The old man looked at the sea and")
    parser.add_argument("--tokens", type=int, default=100, help="how many to generate; at most 128 with the prompt's")
    options = parser.parse_args()
    model, tokenizer = glassllm.load_pretrained("en")
    prompt = tokenizer.encode(options.prompt)
    room = model.cfg.max_len - len(prompt)
    if not prompt or room < 1 or options.tokens < 1:
        parser.error(f"prompt must have 1 to {model.cfg.max_len - 1} tokens, got {len(prompt)}; --tokens at least 1")
    decoder = Decoder(model)
    # The matrices are so small that BLAS's threads cost more than they bring, glassllm too.
    with threadpool_limits(1, user_api="blas"):
        tokens = compare(decoder, model, prompt, min(options.tokens, room))
        print(f"\n{options.prompt}{tokenizer.decode(tokens)}")
        others = ["The", "It was a cold evening in the city, and there was"]
        show_batch(decoder, model, tokenizer, [options.prompt, *others])


if __name__ == "__main__":
    main()
