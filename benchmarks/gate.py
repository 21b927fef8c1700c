"""Is a commit slower? Ratios that answer it on a machine that others use too: ``python benchmarks/gate.py main``.

Each figure is the processor time of a call over that of a yardstick, which does not change with this package and
depends on the same part of the machine: NumPy's matrix product for kernels, reading the cache once for decoding, a
small NumPy function for the overhead of a call. Both run on one thread, in turns of about a millisecond in one process,
so that whatever slows the machine slows both. The 5 % quantile of each leaves out turns that were disturbed, and the
median over `PROCESSES` processes evens out where their arrays happen to lie. A figure that is more than `FACTOR` times
that of the other commit is an alarm. ``python benchmarks/gate.py --power 20`` shows how often that is right.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
FACTOR = 1.1  # half of the smallest slowdown that has to be found
PROCESSES = 5
ROUNDS = 60
TURN = 5e5  # nanoseconds
PLANTED = "slower "
CALLS = 5  # a turn has a multiple of these calls, of which a planted slowdown makes one twice
POOLS = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
UNITS = {
    "forward": "times a matrix product of 192 x 192",
    "backward": "times a matrix product of 192 x 192",
    "decode": "times reading the cache",
    "call": "times a small NumPy function",
    "call_with_arrays": "times a small NumPy function",
}


def works():
    """For each figure, a call and its yardstick."""
    import numba_attention as na

    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    a, b = normal(192, 192), normal(192, 192)
    product = np.empty_like(a)
    query, key, value = (normal(1, 2, 256, 64) for _ in range(3))
    out, lse = na.attention(query, key, value, return_lse=True)
    tokens = normal(1, 20, 1, 64)
    cache = na.KVCache(1, 5, 512, 64)
    cache.append(normal(1, 5, 512, 64), normal(1, 5, 512, 64))
    stored = cache.key.reshape(-1), cache.value.reshape(-1)
    small = tuple(normal(1, 1, 1, 64) for _ in range(3))
    lengths = np.array([1])

    def multiply(x, y, *, dtype=np.float32):
        result = np.empty(x.shape, dtype)
        np.multiply(x, y, out=result)
        return result

    def gemm():
        np.dot(a, b, out=product)

    def read():
        np.max(stored[0])
        np.max(stored[1])

    def function():
        multiply(small[0], small[1], dtype=np.float32)

    return {
        "forward": (lambda: na.attention(query, key, value), gemm),
        "backward": (lambda: na.attention_backward(out, query, key, value, out, lse), gemm),
        "decode": (lambda: na.attention_decode(tokens, cache), read),
        "call": (lambda: na.attention(*small), function),
        "call_with_arrays": (lambda: na.attention(*small, key_lengths=lengths), function),
    }


def slower(call):
    """A call that takes 20 % longer: one in `CALLS` is made twice."""
    count = 0

    def planted():
        nonlocal count
        count += 1
        if count % CALLS == 0:
            call()
        return call()

    return planted


def ratio(call, yardstick, rounds=ROUNDS, clock=time.process_time_ns):
    """The processor time of a call over that of the yardstick."""

    def turn(function, calls):
        start = clock()
        for _ in range(calls):
            function()
        return (clock() - start) / calls

    def calls_of(function):
        once = min(turn(function, CALLS) for _ in range(3))
        return CALLS * max(1, round(TURN / once / CALLS))

    functions = call, yardstick
    calls = [calls_of(function) for function in functions]
    times = [[turn(*work) for work in zip(functions, calls, strict=True)] for _ in range(rounds)]
    ours, theirs = np.quantile(times, 0.05, axis=0)
    return float(ours / theirs)


def measure(source=None, planted=False, processes=PROCESSES):
    """Figures of the package in a folder, or of the one that is installed; and those of slower calls, if wanted."""
    environment = os.environ | dict.fromkeys(POOLS, "1")
    if source is not None:
        environment["PYTHONPATH"] = str(source)
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(int(planted))]
    found = []
    for _ in range(processes):
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd="/")
        found.append(json.loads(done.stdout))
    return median_of(found)


def median_of(found):
    return {name: statistics.median(figures[name] for figures in found) for name in found[0]}


def child(planted):
    """Print the figures of this process."""
    pairs = works()
    figures = {name: ratio(*pair) for name, pair in pairs.items()}
    if planted:
        figures |= {PLANTED + name: ratio(slower(call), yardstick) for name, (call, yardstick) in pairs.items()}
    print(json.dumps(figures))


def is_slower(before, after):
    """Whether a figure became worse."""
    return after > FACTOR * before


class Gate:
    """The same figures for asv: ``asv continuous --bench Gate --factor 1.1 main HEAD``."""

    timeout = 600

    def setup_cache(self):
        return measure()

    def track_forward(self, figures):
        return figures["forward"]

    def track_backward(self, figures):
        return figures["backward"]

    def track_decode(self, figures):
        return figures["decode"]

    def track_call(self, figures):
        return figures["call"]

    def track_call_with_arrays(self, figures):
        return figures["call_with_arrays"]

    for _name, _unit in UNITS.items():
        locals()[f"track_{_name}"].unit = _unit


def compare(commit):
    """Print the figures of a commit beside those of the working tree; return whether none became worse."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x"], cwd=folder, input=archive.stdout, check=True)
        sources = Path(folder, "src"), ROOT / "src"
        for source in sources:
            measure(source, processes=1)  # compiles
        turns = [[measure(source, processes=1) for source in sources] for _ in range(PROCESSES)]
    before, after = (median_of(side) for side in zip(*turns, strict=True))
    for name, unit in UNITS.items():
        verdict = "  SLOWER" if is_slower(before[name], after[name]) else ""
        print(
            f"{name:16} {after[name] / before[name]:6.3f}: from {before[name]:.3f} to {after[name]:.3f} {unit}{verdict}"
        )
    return not any(is_slower(before[name], after[name]) for name in UNITS)


def power(pairs):
    """Print how many planted slowdowns are found, and how many pairs without one give an alarm."""
    measure(processes=1)  # compiles
    start = time.perf_counter()
    measured = [(measure(), measure(planted=True)) for _ in range(pairs)]
    for name in UNITS:
        changes = [after[PLANTED + name] / before[name] for before, after in measured]
        found = sum(is_slower(before[name], after[PLANTED + name]) for before, after in measured)
        print(f"{name}, slower by 20 %: found in {found} of {pairs}, at {min(changes):.3f} to {max(changes):.3f}")
    changes = [after[name] / before[name] for before, after in measured for name in UNITS]
    false = sum(any(is_slower(before[name], after[name]) for name in UNITS) for before, after in measured)
    print(f"unchanged: alarms in {false} of {pairs}, at {min(changes):.3f} to {max(changes):.3f}")
    loads = f"; mean load {os.getloadavg()[2]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{(time.perf_counter() - start) / pairs:.0f} s a pair{loads}, {os.cpu_count()} processors")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="to compare the working tree with")
    parser.add_argument("--power", type=int, metavar="PAIRS", help="plant slowdowns of 20 %%, and count what is found")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child)
    elif arguments.power:
        power(arguments.power)
    elif arguments.commit:
        sys.exit(not compare(arguments.commit))
    else:
        print(json.dumps(measure(), indent=1))


if __name__ == "__main__":
    main()
