"""Calls beside a program that holds one core, and alone: ``python benchmarks/beside.py [--json FILE]``.

Each library has a process of its own, and they take turns. The other program is a loop that never waits.
"""

import argparse
import datetime
import json
import multiprocessing
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

REST = 0.2  # seconds between turns
WORKS = {"1, 8, 64, 64": (1, 8, 64, 64), "1, 8, 256, 64": (1, 8, 256, 64), "1, 8, 1024, 64": (1, 8, 1024, 64)}


def ours(arrays, threads):
    import numba

    import numba_attention as na

    numba.set_num_threads(threads)
    return lambda: na.attention(*arrays)


def torch_sdpa(arrays, threads):
    import torch

    torch.set_num_threads(threads)
    tensors = [torch.from_numpy(array) for array in arrays]
    return lambda: torch.nn.functional.scaled_dot_product_attention(*tensors)


CONTENDERS = {"ours": ours, "PyTorch": torch_sdpa}


def serve(name, threads, pipe):
    """Answer (shape, seconds) with the µs of every call in that time, until told None."""
    while (order := pipe.recv()) is not None:
        shape, seconds = order
        rng = np.random.default_rng(0)
        call = CONTENDERS[name]([rng.standard_normal(shape, dtype=np.float32) for _ in range(3)], threads)
        call()
        call()
        times, end = [], time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - start))
        pipe.send(times)


def hold_a_core():
    while True:
        pass


@contextmanager
def other_program(context, is_there):
    process = context.Process(target=hold_a_core, daemon=True)
    if is_there:
        process.start()
        time.sleep(0.5)
    yield
    if is_there:
        process.kill()
        process.join()


def measure(threads, rounds, seconds):
    """Return mean, median and 99 % quantile of the µs of a call in each round, and the circumstances."""
    from importlib.metadata import version

    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in CONTENDERS:
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, threads, theirs), daemon=True).start()
    found = {"date": datetime.date.today().isoformat(), "threads": threads, "rounds": rounds, "works": {}}
    found["versions"] = {name: version(name) for name in ("numba-attention", "torch")}
    for work, shape in WORKS.items():
        figures = found["works"][work] = {}
        for state in ("alone", "beside"):
            figures[state] = {name: [] for name in pipes}
            with other_program(context, state == "beside"):
                for _ in range(rounds):
                    for name, pipe in pipes.items():
                        time.sleep(REST)
                        pipe.send((shape, seconds))
                        times = pipe.recv()
                        columns = [np.mean(times), *np.quantile(times, [0.5, 0.99])]
                        figures[state][name].append([round(float(x), 2) for x in columns])
            print(work, state, figures[state], file=sys.stderr)
    for pipe in pipes.values():
        pipe.send(None)
    return found


def as_markdown(found):
    lines = [
        "| batch, heads, positions, features | library | alone: mean, 99 % | beside: mean, median, 99 % | slower |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for work, figures in found["works"].items():
        for name in CONTENDERS:
            alone, beside = (
                [statistics.median(column) for column in zip(*figures[state][name], strict=True)]
                for state in ("alone", "beside")
            )
            cells = [work, name, f"{alone[0]:.0f}, {alone[2]:.0f}", ", ".join(f"{x:.0f}" for x in beside)]
            lines.append("| " + " | ".join([*cells, f"{beside[0] / alone[0]:.1f}x"]) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    end = f"medians of {found['rounds']} rounds."
    lines += ["", f"µs, float32, {found['threads']} threads; {versions}; {found['date']}; {end}"]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn")
    parser.add_argument("--json", type=Path, help="write every measured number to this file")
    arguments = parser.parse_args()
    found = measure(arguments.threads, arguments.rounds, arguments.seconds)
    print(as_markdown(found))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
