"""What attention over Dask arrays costs beside attention itself.

Run: ``python benchmarks/dask_arrays.py graph|tasks|efficiency|scaling|heads``. Times are of the CPU, summed over the
processes that take part, because a shared machine has no other that can be compared. The two ways of `efficiency` take
turns, and each has its minimum. `scaling` is for a machine with many cores, and has wall-clock times too.
"""

import argparse
import atexit
import os
import pickle
import shutil
import tempfile
import time

import numpy as np

import numba_attention as na

try:
    import dask
    import dask.array as da

    import numba_attention.dask as nad
except ImportError:  # asv imports every file of this folder, in environments without Dask
    pass


def graph():
    """Seconds to build and to optimise the graph of 1M positions, and its size."""
    n = 2**20
    print("rows x keys a block, causal: tasks, build s, optimise s, pickled MB")
    for rows, keys, causal in (
        (16384, 16384, True),
        (16384, 65536, True),
        (16384, 65536, False),
        (32768, 131072, True),
    ):
        q, k = (da.zeros((1, 16, n, 64), chunks=(1, 1, c, 64), dtype=np.float32) for c in (rows, keys))
        start = time.process_time()
        out = na.attention(q, k, k, is_causal=causal)
        built = time.process_time()
        (optimised,) = dask.optimize(out)
        tasks = dict(optimised.__dask_graph__())
        end = time.process_time()
        size = len(pickle.dumps(tasks)) / 1e6
        print(
            f"{rows} x {keys}, {causal}: {len(tasks)}, {built - start:.2f}, {end - built:.2f}, {size:.1f}", flush=True
        )


def used(pids):
    import psutil

    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def tasks():
    """CPU time of a task of 16 x 16 pairs: scheduler, messages and the Python of a call."""
    from distributed import Client, LocalCluster

    x = da.zeros((1, 2, 384, 8), chunks=(1, 1, 16, 8), dtype=np.float32)
    out = na.attention(x, x, x)
    number = len(dict(dask.optimize(out)[0].__dask_graph__()))
    for scheduler in ("synchronous", "threads"):
        out.compute(scheduler=scheduler)
        start = time.process_time()
        out.compute(scheduler=scheduler, num_workers=2)
        print(
            f"{scheduler}: {(time.process_time() - start) / number * 1e6:.0f} us of CPU a task, {number} tasks",
            flush=True,
        )
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        nad.warmup(client, ["float32"])
        workers = list(client.run(os.getpid).values())
        before = used([os.getpid()]), used(workers)
        out.compute()
        here, there = used([os.getpid()]) - before[0], used(workers) - before[1]
        print(
            f"distributed: {here / number * 1e6:.0f} us in client and scheduler, "
            f"{there / number * 1e6:.0f} us in workers"
        )


def on_files(arrays, sizes):
    """Lazy arrays whose blocks workers read from files, which the system keeps in memory: nothing is sent to them."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    lazies = []
    for n, (x, size) in enumerate(zip(arrays, sizes, strict=True)):
        path = f"{folder}/{n}.npy"
        np.save(path, x)

        def load(path, chunks, block_info=None):
            where = block_info[None]["array-location"]
            return np.array(np.load(path, mmap_mode="r")[tuple(slice(*axis) for axis in where)])

        chunks = da.core.normalize_chunks(size, x.shape)
        meta = np.empty((0,) * x.ndim, x.dtype)
        lazies.append(da.map_blocks(load, path, size, chunks=chunks, dtype=x.dtype, meta=meta))
    return lazies


def efficiency(rounds=4):
    """CPU time of 1 process with 2 threads, over that of 2 processes with 1 thread, client and scheduler included."""
    from distributed import Client, LocalCluster

    L, H = 16384, 8
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, H, L, 64), dtype=np.float32) for _ in range(3)]
    out = na.attention(*on_files(arrays, [(1, 2, 4096, 64), (1, 2, 8192, 64), (1, 2, 8192, 64)]))
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        nad.warmup(client, ["float32"])
        pids = [os.getpid(), *client.run(os.getpid).values()]
        na.attention(*arrays)
        best = [np.inf, np.inf]
        for _ in range(rounds):
            for which, work in enumerate((lambda: na.attention(*arrays), lambda: out.sum().compute())):
                before = used(pids)
                work()
                best[which] = min(best[which], used(pids) - before)
            print(f"1 process: {best[0]:.2f} s of CPU, 2 processes: {best[1]:.2f}, efficiency {best[0] / best[1]:.2f}; "
                  f"load {os.getloadavg()[0]:.0f}", flush=True)  # fmt: skip


def scaling(counts, length, heads, rounds):
    """One problem on 1, 2, 4 ... worker processes of one thread, forward and with gradients, causal, float32.

    The chunks are the same for all: as for the most workers. Beside it one process with as many threads, where the
    sequence is not divided. Efficiencies are relative to the first number of workers, or of threads: by wall-clock
    time, for a machine that has nothing else to do, and by CPU time, for any.
    """
    import numba
    from distributed import Client, LocalCluster

    rng = np.random.default_rng(0)
    shape, most = (1, heads, length, 64), max(counts)
    arrays = [rng.standard_normal(shape, dtype=np.float32) for _ in range(3)]
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (2 * most)
    chunks_q, chunks_k = nad.suggest_chunks(shape, shape, workers=most, threads=1, memory=limit)
    q, k, v = on_files(arrays, [chunks_q, chunks_k, chunks_k])
    out, lse = na.attention(q, k, v, is_causal=True, return_lse=True)
    grads = na.attention_backward(out, q, k, v, out, lse, is_causal=True)
    lazy = {"forward": [out.sum()], "with gradients": [x.sum() for x in grads[:3]]}

    def forward():
        return na.attention(*arrays, is_causal=True, return_lse=True)

    def with_gradients():
        out, lse = forward()
        return na.attention_backward(out, *arrays, out, lse, is_causal=True)

    print(f"{os.cpu_count()} cores, L = S = {length}, {heads} heads of 64, chunks {chunks_q} and {chunks_k}; minima of "
          f"{rounds} rounds, load {os.getloadavg()[0]:.0f}")  # fmt: skip
    print("| work | workers or threads | tasks | seconds | CPU s | efficiency | by CPU time |\n|" + " --- |" * 7)
    first = {}

    def report(name, n, tasks, work, pids):
        work()
        best = [np.inf, np.inf]
        for _ in range(rounds):
            start, before = time.perf_counter(), used(pids)
            work()
            best = [min(best[0], time.perf_counter() - start), min(best[1], used(pids) - before)]
        m, *of_first = first.setdefault(name, (n, *best))
        by_time, by_cpu = of_first[0] * m / (best[0] * n), of_first[1] / best[1]
        print(f"| {name} | {n} | {tasks} | {best[0]:.2f} | {best[1]:.2f} | {by_time:.2f} | {by_cpu:.2f} |", flush=True)

    for n in counts:
        numba.set_num_threads(min(n, numba.config.NUMBA_NUM_THREADS))
        for name, work in (("forward, one process", forward), ("with gradients, one process", with_gradients)):
            report(name, n, 1, work, [os.getpid()])
        with (
            LocalCluster(n_workers=n, threads_per_worker=1, memory_limit=limit, dashboard_address=None) as cluster,
            Client(cluster) as client,
        ):
            nad.warmup(client, ["float32"])
            pids = [os.getpid(), *client.run(os.getpid).values()]
            for name, results in lazy.items():
                number = len(dict(dask.optimize(results)[0][0].__dask_graph__()))
                report(f"{name}, Dask", n, number, lambda results=results: dask.compute(*results), pids)


def heads_of_a_block(rounds):
    """CPU time of a layer, forward and backward, by the number of its heads in a block."""
    layer = na.MultiHeadAttention(1024, 16, rng=0)
    x = np.random.default_rng(0).standard_normal((1, 4096, 1024), dtype=np.float32)
    x = da.from_array(x, chunks=(1, 1024, 1024))
    best = dict.fromkeys((16, 4, 1), np.inf)
    for _ in range(rounds):
        for n in best:
            with nad.heads_per_block(n):
                y, ctx = layer.forward(x, is_causal=True)
            layer.backward(y, ctx)
            start = time.process_time()
            dask.compute(y.sum(), layer.grads, scheduler="threads", num_workers=2)
            best[n] = min(best[n], time.process_time() - start)
    for n, seconds in best.items():
        print(f"{n} heads a block: {seconds:.2f} s of CPU, {seconds / best[16]:.2f}; load {os.getloadavg()[0]:.0f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["graph", "tasks", "efficiency", "scaling", "heads"])
    cores = os.cpu_count() or 1
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= cores]
    parser.add_argument("--workers", type=int, nargs="+", default=counts, help="of scaling")
    parser.add_argument("--length", type=int, default=32768, help="of scaling")
    parser.add_argument("--heads", type=int, default=16, help="of scaling")
    parser.add_argument("--rounds", type=int, default=3, help="of efficiency, scaling and heads")
    given = parser.parse_args()
    calls = {
        "graph": graph,
        "tasks": tasks,
        "efficiency": lambda: efficiency(given.rounds),
        "heads": lambda: heads_of_a_block(given.rounds),
        "scaling": lambda: scaling(given.workers, given.length, given.heads, given.rounds),
    }
    calls[given.what]()


if __name__ == "__main__":
    main()
