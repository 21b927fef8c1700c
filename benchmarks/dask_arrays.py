"""What attention over Dask arrays costs beside attention itself.

Run: ``python benchmarks/dask_arrays.py graph|tasks|efficiency``. Times are of the CPU, summed over the processes that
take part, because a shared machine has no other that can be compared. The two ways of `efficiency` take turns, and each
has its minimum.
"""

import os
import pickle
import sys
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
        nad.warmup(client)
        workers = list(client.run(os.getpid).values())
        before = used([os.getpid()]), used(workers)
        out.compute()
        here, there = used([os.getpid()]) - before[0], used(workers) - before[1]
        print(
            f"distributed: {here / number * 1e6:.0f} us in client and scheduler, "
            f"{there / number * 1e6:.0f} us in workers"
        )


def efficiency(rounds=4):
    """CPU time of 1 process with 2 threads, over that of 2 processes with 1 thread, client and scheduler included."""
    from distributed import Client, LocalCluster

    L, H = 16384, 8
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, H, L, 64), dtype=np.float32) for _ in range(3)]
    folder = os.environ.get("TMPDIR", "/tmp")
    for n, x in enumerate(arrays):
        np.save(f"{folder}/dask_arrays_{n}.npy", x)

    def load(n, rows, block_info=None):
        (_, heads, at, _) = block_info[None]["array-location"]
        file = np.load(f"{folder}/dask_arrays_{n}.npy", mmap_mode="r")
        return np.array(file[:, slice(*heads), slice(*at)])

    sizes = [(1, 2, 4096, 64), (1, 2, 8192, 64), (1, 2, 8192, 64)]
    lazies = []
    for n, size in enumerate(sizes):
        chunks = da.core.normalize_chunks(size, (1, H, L, 64))
        lazies.append(
            da.map_blocks(load, n, size[2], chunks=chunks, dtype=np.float32, meta=np.empty((0,) * 4, np.float32))
        )
    out = na.attention(*lazies)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        nad.warmup(client)
        pids = [os.getpid(), *client.run(os.getpid).values()]
        na.attention(*arrays)
        best = [np.inf, np.inf]
        for _ in range(rounds):
            for which, work in enumerate((lambda: na.attention(*arrays), lambda: out.sum().compute())):
                before = used(pids)
                work()
                best[which] = min(best[which], used(pids) - before)
        print(f"1 process: {best[0]:.2f} s of CPU, 2 processes: {best[1]:.2f}, efficiency {best[0] / best[1]:.2f}; "
              f"load {os.getloadavg()[0]:.0f}")  # fmt: skip


if __name__ == "__main__":
    {"graph": graph, "tasks": tasks, "efficiency": efficiency}[sys.argv[1]]()
