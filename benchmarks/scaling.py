"""How work is shared out among the threads of this machine: ``python benchmarks/scaling.py [--threads 1 2 4 8 16]``.

For each number of threads the time of a forward pass, a backward pass, a step of decoding and packed sequences, and
the efficiency: the time with one thread, divided by the number of threads and by the time with so many. Beside it a
product of matrices and PyTorch's attention, where PyTorch is installed: they say what the machine itself allows, as
its clock falls and its caches are shared where more cores work.
"""

import argparse
import datetime
import json
import os
import statistics
import time
from pathlib import Path

import numba
import numpy as np

import numba_attention as na


def works():
    """Name of each work, and a function that does it."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    q, k, v, grad = (normal(1, 16, 2048, 64) for _ in range(4))
    out, lse = na.attention(q, k, v, return_lse=True)
    cache = na.KVCache.from_arrays(*(normal(1, 8, 65536, 128) for _ in range(2)))
    step = normal(1, 32, 1, 128)
    ends = np.cumsum([0, *([1000, 300, 40, 660] * 8)])
    packed = [normal(int(ends[-1]), 8, 64) for _ in range(3)]
    return {
        "forward H16 L2048 E64": lambda: na.attention(q, k, v),
        "forward causal": lambda: na.attention(q, k, v, is_causal=True),
        "backward": lambda: na.attention_backward(grad, q, k, v, out, lse),
        "decode H32/8 S65536 E128": lambda: na.attention_decode(step, cache),
        "varlen 32 sequences": lambda: na.attention_varlen(*packed, cu_seqlens_q=ends, cu_seqlens_k=ends),
    }


def peers():
    """PyTorch's product of matrices and attention, and what sets its number of threads."""
    try:
        import torch
    except ImportError:
        return {}, lambda n: None
    a, b = torch.randn(2, 4096, 4096)
    q, k, v = torch.randn(3, 1, 16, 2048, 64)
    attend = torch.nn.functional.scaled_dot_product_attention
    memory = torch.ones(2**27)

    def trained():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        attend(*leaves).sum().backward()

    calls = {"torch matmul 4096": lambda: a @ b, "torch forward": lambda: attend(q, k, v)}
    calls |= {"torch forward and backward": trained, "torch sum of 512 MiB": lambda: memory.sum()}
    return calls, torch.set_num_threads


def seconds(call, repeats=5, least=0.3):
    call()
    taken, begin = [], time.perf_counter()
    while len(taken) < repeats or time.perf_counter() - begin < least * repeats / 5:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measure(counts, repeats, done):
    """Return the median milliseconds of each work by the number of threads, and the circumstances.

    After each work `done` is called with what there is: whoever stops the program has that.
    """
    others, set_threads = peers()
    found = {"date": datetime.date.today().isoformat(), "cores": os.cpu_count(), "works": {}}
    for name, call in (works() | others).items():
        taken = found["works"][name] = {}
        for n in counts:
            numba.set_num_threads(n)
            set_threads(n)
            taken[str(n)] = float(f"{1e3 * seconds(call, repeats):.4g}")
        done(found)
    return found


def possible(counts):
    """The numbers of threads that Numba can have here, each once."""
    return [n for n in dict.fromkeys(counts) if n <= numba.config.NUMBA_NUM_THREADS]


def line(name, taken):
    """A row of the table: milliseconds and efficiencies of one work."""
    counts = list(map(int, taken))
    first = counts[0] * taken[str(counts[0])]
    return f"| {name} | {' | '.join(f'{taken[str(n)]:.4g} ({first / n / taken[str(n)]:.2f})' for n in counts)} |"


def as_markdown(found):
    works = found["works"]
    counts = list(map(int, next(iter(works.values()))))
    lines = [f"| work | {' | '.join(f'{n} threads' for n in counts)} |\n| --- |{' ---: |' * len(counts)}"]
    lines += [line(name, taken) for name, taken in works.items()]
    lines += ["", f"{found['cores']} processors, float32, median milliseconds (efficiency); {found['date']}."]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    cores = os.cpu_count() or 1
    counts = [n for n in possible((1, 2, 4, 8, 16, 32, 64)) if n <= cores]
    parser.add_argument("--threads", type=int, nargs="+", default=counts)
    parser.add_argument("--json", type=Path, help="write every measured number to this file")
    parser.add_argument("--repeats", type=int, default=5, help="calls of a work, at least (default 5)")
    arguments = parser.parse_args()

    def done(found):
        print(line(*list(found["works"].items())[-1]), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    counts = possible(arguments.threads)
    if not counts:
        parser.error(f"Numba has {numba.config.NUMBA_NUM_THREADS} threads here")
    print(as_markdown(measure(counts, arguments.repeats, done)))


if __name__ == "__main__":
    main()
