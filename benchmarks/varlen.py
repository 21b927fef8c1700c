"""Packed sequences of very uneven lengths against the sum of their parts: ``python benchmarks/varlen.py``.

Lengths from 1 to 4096, Zipf-like. A packed call is timed beside one call for each sequence, in turn; and on one thread
beside all threads: what that gains, divided by their number, says how busy they are.
"""

import argparse
import itertools
import os
import statistics
import time

import numba
import numpy as np

import numba_attention as na

H, E = 8, 64


def lengths(count=48, longest=4096, seed=0):
    """Zipf-like: the n-th longest is about ``longest / n`` tokens, in random order."""
    rng = np.random.default_rng(seed)
    sizes = np.maximum(1, longest / np.arange(1, count + 1) ** 1.1 * rng.uniform(0.8, 1, count)).astype(int)
    sizes[0], sizes[-3:] = longest, 1
    return rng.permutation(sizes)


def packed(sizes, seed=0):
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return [rng.standard_normal((starts[-1], H, E), dtype=np.float32) for _ in range(3)], starts


def heads_first(x):
    return np.ascontiguousarray(x.swapaxes(0, 1))


def calls(options, backward):
    """The packed call, and those of the sequences one after the other."""
    (q, k, v), starts = packed(lengths())
    parts = [[heads_first(x[a:b]) for x in (q, k, v)] for a, b in itertools.pairwise(starts) if a < b]
    if not backward:

        def alone():
            return [na.attention(*part, **options) for part in parts]

        return lambda: na.attention_varlen(q, k, v, starts, starts, **options), alone
    out, lse = na.attention_varlen(q, k, v, starts, starts, return_lse=True, **options)
    grad = np.ones_like(out)
    results = [na.attention(*part, return_lse=True, **options) for part in parts]
    grads = [np.ones_like(result[0]) for result in results]

    def all_backward():
        return [
            na.attention_backward(g, *part, *result, **options)
            for g, part, result in zip(grads, parts, results, strict=True)
        ]

    return lambda: na.attention_varlen_backward(grad, q, k, v, out, lse, starts, starts, **options), all_backward


class Varlen:
    """For asv: seconds of a packed call and of its parts."""

    params = (["packed", "parts"], ["forward", "backward"], [False, True])
    param_names = ("how", "task", "is_causal")

    def setup(self, how, task, is_causal):
        self.call = calls({"is_causal": is_causal}, task == "backward")[how == "parts"]
        self.call()

    def time_varlen(self, how, task, is_causal):
        self.call()


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    threads = numba.get_num_threads()
    sizes = lengths()
    print(f"{len(sizes)} sequences of {sizes.min()} to {sizes.max()} tokens, {sizes.sum()} in all; H{H} E{E} float32")
    print(f"| task | ms, {threads} threads | of the sum of its parts | threads busy |\n| --- | --- | --- | --- |")
    for name, options, backward in (
        ("forward", {}, False),
        ("forward causal", {"is_causal": True}, False),
        ("backward", {}, True),
        ("backward causal", {"is_causal": True}, True),
    ):
        together, alone = calls(options, backward)
        together(), alone()
        times = {"packed": [], "parts": [], "one": []}
        for _ in range(rounds):
            times["packed"].append(seconds(together))
            times["parts"].append(seconds(alone))
            numba.set_num_threads(1)
            times["one"].append(seconds(together))
            numba.set_num_threads(threads)
        of_parts = statistics.median(a / b for a, b in zip(times["packed"], times["parts"], strict=True))
        busy = statistics.median(a / b / threads for a, b in zip(times["one"], times["packed"], strict=True))
        ms = statistics.median(times["packed"]) * 1e3
        print(f"| {name} | {ms:.1f} | {of_parts:.1%} | {busy:.1%} |", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
