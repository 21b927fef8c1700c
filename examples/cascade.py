"""Many sequences that share a long prefix: attended once for all of them, and merged with what each has of its own.

A system prompt, a document that many questions are asked about, the beams of a search: in a batch of B sequences the
same prefix would be read B times. Here the queries of all sequences are rows of one call over the prefix, so that it is
read once, and `merge_attention` joins that with each sequence's own part, exactly:

    python examples/cascade.py
"""

import statistics
import time

import numpy as np

import numba_attention as na

B, H, HKV, E = 16, 32, 8, 128
PREFIX, OWN = 2048, 100


def cascade(query, prefix, cache):
    """Attention of query (B, H, 1, E) to the prefix, key and value (Hkv, S, E), and to each sequence's own cache."""
    rows = np.ascontiguousarray(query[:, :, 0].swapaxes(0, 1))  # (H, B, E): the sequences are rows of one call
    shared, shared_lse = na.attention(rows, *prefix, return_lse=True)
    own, own_lse = na.attention_decode(query, cache, return_lse=True)
    parts = shared.swapaxes(0, 1)[:, :, None], own
    return na.merge_attention(parts, (shared_lse.T[:, :, None], own_lse))[0]


def arrays(batch=B, prefix=PREFIX, own=OWN, seed=0):
    """A query, the key and value of the prefix, and those of each sequence."""
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((batch, H, 1, E), dtype=np.float32)
    shared = rng.standard_normal((2, HKV, prefix, E), dtype=np.float32)
    return query, shared, rng.standard_normal((2, batch, HKV, own, E), dtype=np.float32)


def caches(shared, own):
    """One cache with the sequences' own tokens, one with the prefix in front of them, one of pages that share it."""
    batch, _, length, _ = own[0].shape
    prefix = shared.shape[2]
    short = na.KVCache(batch, HKV, length, E)
    short.append(*own)
    long = na.KVCache(batch, HKV, prefix + length, E)
    long.append(*(np.broadcast_to(x, (batch, *x.shape)) for x in shared))
    long.append(*own)
    paged = na.PagedKVCache(-(-prefix // 16) + batch * (-(-length // 16) + 1), 16, HKV, E)
    first = int(paged.add()[0])
    paged.append([first], *(x[None] for x in shared))
    ids = [first, *(paged.fork(first) for _ in range(batch - 1))]
    paged.append(ids, *own)
    return short, long, paged


def main():
    query, shared, own = arrays()
    short, long, paged = caches(shared, own)
    batch, prefix, length = len(query), shared.shape[2], own.shape[3]
    ways = {
        "a cache for each sequence": lambda: na.attention_decode(query, long),
        "pages that share the prefix": lambda: na.attention_decode(query, paged),
        "cascade": lambda: cascade(query, shared, short),
    }
    want = ways["a cache for each sequence"]()
    seconds = {name: [] for name in ways}
    for name, way in ways.items():
        print(f"{name}: largest difference {np.abs(way() - want).max():.1e}")
    for _ in range(15):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    print(f"\nB{batch} H{H} Hkv{HKV} E{E} float32, a prefix of {prefix} tokens and {length} of each sequence's own")
    slowest = statistics.median(seconds["a cache for each sequence"])
    for name, of_way in seconds.items():
        ms = statistics.median(of_way) * 1e3
        print(f"{name:28} {ms:7.2f} ms {slowest * 1e3 / ms:6.2f}x")


if __name__ == "__main__":
    main()
