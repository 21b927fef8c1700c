"""One token against a long cache, as a part of the speed of reading memory: ``python benchmarks/decode.py``.

For each shape: `attention_decode` with a contiguous and a paged cache and with every storage, summing 256 MiB on the
same threads (the ceiling), and PyTorch's scaled_dot_product_attention, which runs in a process of its own. All take
turns; a number is the median over the rounds of the ratio within a round. Then the time of a whole step, append and
attend, where there is next to nothing to read.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from typing import NamedTuple

import numpy as np

POOLS = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
CALLS = 3  # in a turn, of which the best counts: what disturbs a call of milliseconds only ever makes it longer


class Row(NamedTuple):
    B: int
    H: int
    Hkv: int
    S: int
    E: int

    def name(self):
        return f"B{self.B} H{self.H} Hkv{self.Hkv} S{self.S} E{self.E}"

    def bytes(self):
        return 2 * 4 * self.B * self.Hkv * self.S * self.E


ROWS = [Row(1, 32, 8, 8192, 128), Row(8, 32, 32, 2048, 128), Row(8, 32, 8, 2048, 128), Row(1, 8, 8, 8192, 64)]
STORAGES = ("float32", "bfloat16", "int8", "float8")
PAGE = 16


def arrays(row):
    rng = np.random.default_rng(0)
    query = rng.standard_normal((row.B, row.H, 1, row.E), dtype=np.float32)
    key, value = (rng.standard_normal((row.B, row.Hkv, row.S, row.E), dtype=np.float32) for _ in range(2))
    return query, key, value


def caches(row, key, value):
    """A cache of every kind, by name."""
    import numba_attention as na

    found = {}
    for storage in STORAGES:
        cache = na.KVCache(row.B, row.Hkv, row.S, row.E, storage=storage)
        cache.append(key, value)
        found[storage] = cache
    blocks = row.S // PAGE
    for storage in STORAGES:
        paged = na.PagedKVCache(row.B * blocks, PAGE, row.Hkv, row.E, storage=storage)
        ids = paged.add(row.B)
        for start in range(0, row.S, PAGE):  # as a server does it: the sequences' pages end up among each other
            paged.append(ids, key[:, :, start : start + PAGE], value[:, :, start : start + PAGE])
        found[f"{storage} paged"] = paged
    return found


def reader(threads):
    """A function that reads 256 MiB on so many threads, and how much that is."""
    import numba

    @numba.njit(fastmath=True, parallel=True)
    def read(x, parts):
        total = np.zeros(parts, np.float32)
        for part in numba.prange(parts):
            size = len(x) // parts
            piece, own = x[part * size : (part + 1) * size], np.float32(0)
            for i in range(size):
                own += piece[i]
            total[part] = own
        return total.sum()

    x = np.ones(2**26, np.float32)
    return lambda: read(x, threads), x.nbytes


def best(call):
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def serve_torch(threads, pipe):
    """Prepare a row, or time the one prepared when told None, until told to stop."""
    import torch

    torch.set_num_threads(threads)
    attend = torch.nn.functional.scaled_dot_product_attention
    call = None
    while (row := pipe.recv()) != "stop":
        if row is None:
            pipe.send(best(call))
            continue
        query, key, value = (torch.from_numpy(x) for x in arrays(row))

        def call(query=query, key=key, value=value):
            with torch.inference_mode():
                return attend(query, key, value, enable_gqa=True)

        pipe.send(call().numpy())


def measure(row, threads, rounds, pipe):
    """Seconds of every contender in every round; "read" is for as many bytes as the row has."""
    import numba_attention as na

    query, key, value = arrays(row)
    of_caches = caches(row, key, value)
    read, size = reader(threads)
    calls = {name: (lambda cache=cache: na.attention_decode(query, cache)) for name, cache in of_caches.items()}
    whole = na.attention(query, key, value)
    for name, call in calls.items():
        error = np.abs(call() - whole).max()
        assert error < (1e-5 if name.startswith("float32") else 0.05), f"{name} is off by {error}"
    read()
    pipe.send(row)
    assert np.abs(pipe.recv() - whole).max() < 1e-4
    seconds = {name: [] for name in [*calls, "read", "torch"]}
    for _ in range(rounds):
        seconds["read"].append(best(read) * row.bytes() / size)
        for name, call in calls.items():
            seconds[name].append(best(call))
        pipe.send(None)
        seconds["torch"].append(pipe.recv())
    return seconds


def ratio(seconds, name, other):
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))


def step_overhead():
    """Microseconds of a step with 64 keys, 8 heads and 64 features: append one token, attend; best of many."""
    import numba_attention as na

    rng = np.random.default_rng(0)
    key, value = (rng.standard_normal((1, 8, 64, 64), dtype=np.float32) for _ in range(2))
    new, query = key[:, :, :1].copy(), rng.standard_normal((1, 8, 1, 64), dtype=np.float32)
    fastest = np.inf
    for _ in range(200):
        cache = na.KVCache(1, 8, 96, 64)
        cache.append(key, value)
        start = time.perf_counter()
        for _ in range(16):
            cache.append(new, new)
            na.attention_decode(query, cache)
        fastest = min(fastest, (time.perf_counter() - start) / 16)
    return fastest * 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    os.environ.update(dict.fromkeys(POOLS, str(options.threads)))
    pipe, theirs = multiprocessing.get_context("spawn").Pipe()
    multiprocessing.get_context("spawn").Process(
        target=serve_torch, args=(options.threads, theirs), daemon=True
    ).start()
    print(f"{options.threads} threads, {options.rounds} rounds, float32 queries, L1")
    names = [f"{storage}{kind}" for storage in STORAGES for kind in ("", " paged")]
    print("| row | read GB/s | ms | of read | x torch |", " | ".join(f"{name}, x float32" for name in names[1:]), "|")
    print("| --- |", "--- | " * (3 + len(names)))
    for row in ROWS:
        seconds = measure(row, options.threads, options.rounds, pipe)
        read = row.bytes() / statistics.median(seconds["read"]) / 1e9
        cells = [f"{read:.0f}", f"{statistics.median(seconds['float32']) * 1e3:.2f}"]
        cells += [f"{ratio(seconds, 'read', 'float32'):.0%}", f"{ratio(seconds, 'torch', 'float32'):.1f}"]
        cells += [f"{ratio(seconds, 'float32', name):.2f}" for name in names[1:]]
        print(f"| {row.name()} |", " | ".join(cells), "|", flush=True)
    pipe.send("stop")
    print(f"step, S64 H8 E64, append included: {step_overhead():.1f} us")


if __name__ == "__main__":
    main()
