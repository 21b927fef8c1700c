"""Attention over a document of a million positions, whose keys and values lie in files larger than a worker's memory.

Run: ``python examples/long_document.py [positions] [folder] [picture]``. It needs ``pip install "numba-attention[dask]"
zarr``; bokeh (``pip install bokeh``) adds the dashboard, and ``task_stream.html`` in the folder; with matplotlib, a
picture of what each worker did when is written to a file of this name, from the records of the scheduler. A few queries
attend to the whole document, as in retrieval or pooling. Attention of all positions is the same call with more rows,
and takes hours, or minutes with a `window`.
"""

import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path

import dask.array as da
import numpy as np
import psutil
from distributed import Client, LocalCluster, get_task_stream, performance_report, progress, wait

import numba_attention as na

HEADS, FEATURES, QUERIES = 8, 64, 512
CHUNK = 2**15  # keys of a block: 8 MiB in float32
WORKERS, MEMORY = 2, "1GiB"


def write(folder: Path, positions: int) -> None:
    """Write keys and values as Zarr stores, block by block."""
    rng = da.random.default_rng(0)
    for name in ("key", "value"):
        x = rng.standard_normal((HEADS, positions, FEATURES), dtype=np.float32, chunks=(1, CHUNK, FEATURES))
        x.to_zarr(str(folder / f"{name}.zarr"))


def peak(dask_worker: object) -> float:
    """Return the most memory that this process has had, in MiB."""
    with suppress(AttributeError):  # Windows knows it, under another name
        return float(psutil.Process().memory_info().peak_wset / 2**20)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


ACTIONS = {"compute": "load and attend", "merge": "merge", "transfer": "receive", "disk-read": "read what was spilled"}


def draw(records: list[dict], picture: str) -> None:
    """Draw the task stream: a row for each thread of each worker, and a bar for whatever it did."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.2), layout="constrained")
    axes = figure.subplots()
    threads = sorted({(record["worker"], record["thread"]) for record in records})
    first = min(part["start"] for record in records for part in record["startstops"])
    bars: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for record in records:
        row = threads.index((record["worker"], record["thread"]))
        for part in record["startstops"]:
            action = part["action"]
            if action == "compute" and "attention-part" not in str(record["key"]):
                action = "merge"
            bars.setdefault((action, row), []).append((part["start"] - first, part["stop"] - part["start"]))
    for n, (action, label) in enumerate(ACTIONS.items()):
        for row in range(len(threads)):
            axes.broken_barh(bars.get((action, row), []), (row - 0.4, 0.8), color=f"C{n}", linewidth=0)
        axes.plot([], [], color=f"C{n}", linewidth=6, label=label)
    axes.set(xlabel="seconds", yticks=range(len(threads)), yticklabels=[f"worker {n}" for n in range(len(threads))])
    axes.legend(ncols=len(ACTIONS), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    figure.savefig(picture, dpi=110)


def main(positions: int = 2**20, folder: str | None = None, picture: str | None = None) -> None:
    """Write the stores, attend, and print time and memory."""
    with ExitStack() as stack:
        place = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = LocalCluster(n_workers=WORKERS, threads_per_worker=1, memory_limit=MEMORY)
        client = stack.enter_context(Client(stack.enter_context(cluster)))
        print(f"dashboard: {client.dashboard_link}")
        write(place, positions)
        print(f"kernels: {max(na.dask.warmup(client).values()):.1f} s")
        key, value = (da.from_zarr(str(place / f"{name}.zarr"), inline_array=True) for name in ("key", "value"))
        rng = np.random.default_rng(0)
        query = rng.standard_normal((HEADS, QUERIES, FEATURES), dtype=np.float32)
        out, lse = na.attention(query, key, value, return_lse=True)
        # Documents end somewhere: what is behind the end is neither read nor computed.
        short = na.attention(query, key, value, key_lengths=positions // 3)
        print(
            f"{key.nbytes / 2**29:.1f} GiB of keys and values in blocks of {np.prod(key.chunksize) * 4 / 2**20:.0f} MiB"
        )
        start = time.perf_counter()
        if find_spec("bokeh"):
            stack.enter_context(performance_report(filename=str(place / "task_stream.html")))
        with get_task_stream(client) as stream:
            results = client.persist([out, lse, short])
            progress(results, notebook=False)
            wait(results)
        out, lse, short = (x.compute() for x in results)
        print(
            f"\n{time.perf_counter() - start:.1f} s; most memory of a worker: {max(client.run(peak).values()):.0f} MiB"
        )
        if picture:
            draw(stream.data, picture)
        # The first head again, in one call.
        want = na.attention(query[:1], key[:1].compute(), value[:1].compute())
        print(f"largest difference from one call: {np.abs(out[:1] - want).max():.1e}")


if __name__ == "__main__":
    main(*(kind(x) for kind, x in zip((int, str, str), sys.argv[1:], strict=False)))
