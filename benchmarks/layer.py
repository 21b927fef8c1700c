"""`MultiHeadAttention` as a whole beside PyTorch's, on equal weights and inputs: ``python benchmarks/layer.py``.

As ``numba-attention bench`` does it: a process for each contender, turns, ratios within a round and their median. The
last column is the part of the speed of a large NumPy product that our layer reaches, projections and attention together
and softmax free of charge.
"""

import argparse
import datetime
import multiprocessing
import os
import statistics
import sys
import time
from typing import NamedTuple

import numpy as np

REST = 0.15  # seconds; OpenBLAS's threads spin for 0.1 after a product
TURN = 0.15  # seconds of calls, of which the median counts
POOLS = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Row(NamedTuple):
    B: int
    L: int
    D: int
    H: int
    S: int = 0  # 0: self-attention

    def name(self):
        return f"B{self.B} L{self.L} {f'S{self.S} ' if self.S else ''}D{self.D} H{self.H}"

    def flops(self, task):
        B, L, S, D = self.B, self.L, self.S or self.L, self.D
        projections, attention = 4.0 * B * (L + S) * D * D, 4.0 * B * L * S * D
        return projections + attention if task == "forward" else 3 * projections + 3.5 * attention


ROWS = [
    Row(1, 64, 512, 8),
    Row(8, 128, 384, 12),
    Row(32, 128, 384, 12),
    Row(1, 1024, 1024, 16),
    Row(8, 512, 768, 12),
    Row(1, 2048, 512, 8),
    Row(8, 128, 512, 8, S=512),
]
TASKS = ("forward", "training")


def arrays(row):
    """Inputs, the gradient of the output, and the parameters as PyTorch names them."""
    rng, D = np.random.default_rng(0), row.D

    def normal(*shape, scale=1.0):
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    inputs = [normal(row.B, row.L, D)] + ([normal(row.B, row.S, D)] if row.S else [])
    parameters = {
        "in_proj_weight": normal(3 * D, D, scale=D**-0.5),
        "in_proj_bias": normal(3 * D),
        "out_proj.weight": normal(D, D, scale=D**-0.5),
        "out_proj.bias": normal(D),
    }
    return inputs, normal(row.B, row.L, D), parameters


def ours(row, task, threads, numpy_projections=False):
    import numba

    import numba_attention as na

    numba.set_num_threads(threads)
    if numpy_projections:
        _use_numpy()
    inputs, grad_out, parameters = arrays(row)
    layer = na.MultiHeadAttention.from_torch(parameters, row.H)
    if task == "forward":
        return lambda: [layer(*inputs)]
    if not hasattr(layer, "backward"):
        return None

    def step():
        out, ctx = layer.forward(*inputs)
        grads = layer.backward(grad_out, ctx)
        return [out, grads.query, layer.grads["out_proj.weight"], layer.grads["k_proj.weight"]]

    return step


def numpy_projections(row, task, threads):
    """Our layer as it would be if NumPy multiplied the projections."""
    return ours(row, task, threads, numpy_projections=True)


def _use_numpy():
    from numba_attention.layer import projection

    projection._usable = lambda *arrays: False


def torch(row, task, threads):
    import torch

    torch.set_num_threads(threads)
    inputs, grad_out, parameters = arrays(row)
    layer = torch.nn.MultiheadAttention(row.D, row.H, batch_first=True)
    layer.load_state_dict({name: torch.from_numpy(x) for name, x in parameters.items()})
    inputs = [torch.from_numpy(x) for x in inputs]

    def call():
        return layer(inputs[0], inputs[-1], inputs[-1], need_weights=False)[0]

    if task == "forward":
        layer.eval()
        with torch.inference_mode():
            call()

        def infer():
            with torch.inference_mode():
                return [call()]

        return infer
    grad_out = torch.from_numpy(grad_out)
    wanted = [x.requires_grad_() for x in inputs] + list(layer.parameters())

    def step():
        out = call()
        grads = torch.autograd.grad(out, wanted, grad_out)
        by_name = dict(zip([name for name, _ in layer.named_parameters()], grads[len(inputs) :], strict=True))
        keys = by_name["in_proj_weight"][row.D : 2 * row.D]
        return [out.detach(), grads[0], by_name["out_proj.weight"], keys]

    return step


def product(row, task, threads):
    a = np.ones((2048, 2048), np.float32)
    out = np.empty_like(a)
    return lambda: [np.matmul(a, a, out=out)]


CONTENDERS = {"ours": ours, "torch": torch, "numpy projections": numpy_projections, "sgemm": product}
FLOPS_OF_PRODUCT = 2.0 * 2048**3


def serve(name, threads, pipe):
    """Prepare (row, task), or time what was prepared when told None, until told to stop."""
    call = None
    while (order := pipe.recv()) != "stop":
        if order is not None:
            call = CONTENDERS[name](*order, threads)
            pipe.send(None if call is None else [np.asarray(x) for x in call()])
            continue
        times, until = [], time.perf_counter() + TURN
        while len(times) < 3 or time.perf_counter() < until:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        pipe.send(statistics.median(times))


def measure(names, rows, tasks, threads, rounds):
    """Yield, for each row and task, the seconds of each contender in each round."""
    os.environ.update(dict.fromkeys(POOLS, str(threads)))
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in names:
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, threads, theirs), daemon=True).start()

    def ask(name, order):
        pipes[name].send(order)
        return pipes[name].recv()

    for task in tasks:
        for row in rows:
            results = {name: ask(name, (row, task)) for name in names}
            for theirs in ("torch", "numpy projections"):
                if results.get(theirs) is None or results["ours"] is None:
                    continue
                for a, b in zip(results["ours"], results[theirs], strict=True):
                    assert np.abs(a - b).max() < 1e-3 * max(1, np.abs(b).max()), f"{theirs} finds other numbers"
            taking_part = [name for name in names if results[name] is not None]
            seconds = {name: [] for name in taking_part}
            for n in range(rounds):
                for name in taking_part[n % len(taking_part) :] + taking_part[: n % len(taking_part)]:
                    time.sleep(REST)
                    seconds[name].append(ask(name, None))
            yield row, task, seconds
    for pipe in pipes.values():
        pipe.send("stop")


def ratio(seconds, name):
    return statistics.median(theirs / own for theirs, own in zip(seconds[name], seconds["ours"], strict=True))


def table(names, rows, tasks, threads, rounds):
    from importlib.metadata import version

    others = [name for name in names if name not in ("ours", "sgemm")]
    yield "| layer, float32 | ms | " + " | ".join(f"x {name}" for name in others) + " | of sgemm |"
    yield "| --- |" + " ---: |" * (len(others) + 2)
    for row, task, seconds in measure(names, rows, tasks, threads, rounds):
        if "ours" not in seconds:
            continue
        cells = [f"{task}, {row.name()}", f"{1e3 * statistics.median(seconds['ours']):.3g}"]
        cells += [f"{ratio(seconds, name):.2f}" for name in others]
        cells.append(f"{100 * ratio(seconds, 'sgemm') * row.flops(task) / FLOPS_OF_PRODUCT:.0f} %")
        spread = {name: f"{1e3 * min(times):.3g}-{1e3 * max(times):.3g} ms" for name, times in seconds.items()}
        print(task, row.name(), spread, file=sys.stderr)
        yield "| " + " | ".join(cells) + " |"
    versions = ", ".join(f"{name} {version(name)}" for name in ("numba-attention", "numpy", "torch"))
    yield f"\n{threads} threads; {versions}; {datetime.date.today()}; medians of {rounds} rounds."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help=f"only these of the {len(ROWS)}, from 0")
    parser.add_argument("--numpy", action="store_true", help="also time our layer with projections by NumPy")
    arguments = parser.parse_args()
    names = ["ours", "torch", "sgemm"] + ["numpy projections"] * arguments.numpy
    rows = ROWS if arguments.rows is None else [ROWS[n] for n in arguments.rows]
    for line in table(names, rows, arguments.tasks, arguments.threads, arguments.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
