"""Attention on a cluster of processes: workers that are killed, that restart, that have little memory."""

import os
import re
import signal
import threading
import time

import numpy as np
import pytest

import numba_attention as na
from cases import DTYPES
from numba_attention import warming

da = pytest.importorskip("dask.array")
distributed = pytest.importorskip("distributed")
nad = pytest.importorskip("numba_attention.dask")
dask = pytest.importorskip("dask")

pytestmark = pytest.mark.slow


def cluster(number, memory="1GiB"):
    return distributed.LocalCluster(
        n_workers=number, threads_per_worker=1, processes=True, memory_limit=memory, dashboard_address=None
    )


class _Files:
    """Heads in one file each, of which only what is asked for is read."""

    def __init__(self, folder, shape):
        self.folder, self.shape, self.dtype, self.ndim = folder, shape, np.dtype(np.float32), len(shape)

    def __getitem__(self, index):
        heads = range(*index[0].indices(self.shape[0]))
        return np.concatenate([np.load(self.folder / f"{h:03d}.npy", mmap_mode="r")[:, *index[1:]] for h in heads])


def test_a_worker_killed_in_the_middle():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, 2, 1536, 32), dtype=np.float32) for _ in range(3)]
    lazies = [da.from_array(x, chunks=(1, 1, 128, 32)) for x in arrays]
    with cluster(2) as workers, distributed.Client(workers) as client:
        seconds = nad.warmup(client)
        assert len(seconds) == 2
        assert all(x >= 0 for x in seconds.values())
        pids = list(client.run(os.getpid).values())  # processes of this test
        out, lse = na.attention(*lazies, is_causal=True, return_lse=True)
        grads = na.attention_backward(da.ones_like(out), *lazies, out, lse, is_causal=True)
        results = out, lse, *grads[:3]
        undisturbed = dask.compute(*results)
        # The same graph with pauses, so that the signal comes while results are in memory.
        slow = [x + 0 for x in lazies]
        out, lse = na.attention(*slow, is_causal=True, return_lse=True)
        grads = na.attention_backward(da.ones_like(out), *slow, out, lse, is_causal=True)
        done = []

        def strike():
            def number(dask_scheduler):
                return sum(task.state == "memory" for task in dask_scheduler.tasks.values())

            while not done:
                if client.run_on_scheduler(number) > 20:
                    os.kill(pids[0], signal.SIGKILL)
                    done.append(time.perf_counter())
                time.sleep(0.005)

        thread = threading.Thread(target=strike)
        thread.start()
        futures = client.compute([out, lse, *grads[:3]])
        try:
            disturbed = client.gather(futures)
        finally:
            done.append(None)
            thread.join()
        assert done[0] is not None, "the work was over before the signal"
        for a, b in zip(undisturbed, disturbed, strict=True):
            np.testing.assert_array_equal(a, b)
    want = na.attention(*arrays, is_causal=True)
    np.testing.assert_allclose(undisturbed[0], want, atol=2e-6)


def kernels_in_memory(client):
    """How many kernels the workers have compiled or loaded."""

    def number():
        import gc

        from numba_attention.cpu.cache import Kernel

        return sum(isinstance(x, Kernel) and x.origin != "" for x in gc.get_objects())

    return sum(client.run(number).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_first_tasks_compile_nothing_after_a_warm_up(dtype):
    """Long and short blocks, single rows, packed sequences, gradients, a layer: no kernel that is not there already."""
    rng = np.random.default_rng(0)
    starts = [0, 3, 200, 700]
    lengths = 1, 20, 700  # of the queries
    with cluster(1) as workers, distributed.Client(workers) as client:
        nad.warmup(client, [dtype])
        before = kernels_in_memory(client)
        assert before > 5
        results = []
        for chunk in (1, 33, 70, 300):
            for L in lengths:
                k = da.from_array(rng.standard_normal((2, 700, 32)).astype(DTYPES[dtype]), chunks=(1, 350, 32))
                q = da.from_array(
                    rng.standard_normal((4, L, 32)).astype(DTYPES[dtype]), chunks=(2, max(chunk, L // 9), 32)
                )
                out, lse = na.attention(q, k, k, is_causal="bottom-right", return_lse=True)
                grads = na.attention_backward(out, q, k, k, out, lse, is_causal="bottom-right")
                results += [out.sum(), *(x.sum() for x in grads[:3])]
        x = k.transpose((1, 0, 2))
        out, lse = na.attention_varlen(x, x, x, starts, starts, return_lse=True)
        grads = na.attention_varlen_backward(out, x, x, x, out, lse, starts, starts)
        results += [out.sum(), *(x.sum() for x in grads[:3])]
        if dtype == "float32":
            layer = na.MultiHeadAttention(64, 2, rng=0)
            tokens = da.from_array(rng.standard_normal((300, 64), dtype=np.float32), chunks=(70, 64))
            y, ctx = layer.forward(tokens.map_blocks(na.nn.gelu))
            layer.backward(y, ctx)
            results += [y, layer.grads]
        dask.compute(*results)
        assert kernels_in_memory(client) == before


def test_warm_up_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="dtypes: unknown name 'int8', expected some of float32"):
        nad.warmup(None, [np.int8])
    with pytest.raises(ValueError, match="tasks: unknown name 'forward', expected some of attention"):
        nad.warmup(None, ["float32"], ["forward"])
    with pytest.raises(ValueError, match="tasks must be None for the backend 'cuda'"):
        nad.warmup(None, tasks=["decode"], backend="cuda")
    with pytest.raises(ValueError, match="backend must be 'cpu' or 'cuda'"):
        nad.warmup(None, backend="reference")


def test_every_task_of_the_warm_up_is_known_to_that_of_blocks():
    names = [kernel.name for kernel in warming.kernels_of_blocks(["float32", "bfloat16"], warming.TASKS)]
    for task in ("forward", "decode", "weights", "backward", "linear", "rowwise", "second"):
        assert any(name.startswith(f"{task}-float32") for name in names), task
    default = [kernel.name for kernel in warming.kernels_of_blocks(["bfloat16"], None)]
    assert set(default) < set(names)
    halves = [name for name in default if "bfloat16" in name]
    assert halves
    assert all(name.endswith("-wide") for name in halves)
    assert any(name.startswith("rowwise-float32") for name in default)


def _states(dask_scheduler):
    return {task.state for task in dask_scheduler.tasks.values()}


def test_a_worker_that_restarts():
    """A worker leaves with its results, and comes back as a new process, which takes part."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 1024, 32), dtype=np.float32) for _ in range(3)]
    lazies = [da.from_array(x, chunks=(1, 64, 32)) for x in arrays]
    with cluster(2) as workers, distributed.Client(workers) as client:
        nad.warmup(client)
        undisturbed = na.attention(*lazies, is_causal=True).compute()
        pids = client.run(os.getpid)
        future = client.compute(na.attention(*(x + 0 for x in lazies), is_causal=True))
        while not client.run_on_scheduler(
            lambda dask_scheduler: "memory" in {t.state for t in dask_scheduler.tasks.values()}
        ):
            time.sleep(0.005)
        address = next(iter(pids))
        assert client.restart_workers([address]) == {address: "OK"}
        np.testing.assert_array_equal(client.gather(future), undisturbed)
        client.wait_for_workers(2)
        after = set(client.run(os.getpid).values())
        assert len(after) == 2
        assert after != set(pids.values())
        np.testing.assert_array_equal(na.attention(*(x - 0 for x in lazies), is_causal=True).compute(), undisturbed)


class _Fatal(_Files):
    """Keys whose blocks from `fatal` on end the process that reads one, as the system does when memory is exhausted."""

    def __init__(self, shape, fatal):
        super().__init__(None, shape)
        self.fatal = fatal

    def __getitem__(self, index):
        if index[1].start >= self.fatal:
            os._exit(1)
        return np.ones([len(range(*x.indices(n))) for x, n in zip(index, self.shape, strict=True)], np.float32)


def test_killed_workers_name_the_chunks():
    shape = (1, 256, 16)
    query = da.ones(shape, chunks=shape, dtype=np.float32)
    key, value = (
        da.from_array(_Fatal(shape, fatal), chunks=(1, 64, 16), asarray=True, inline_array=True, name=f"fatal {fatal}")
        for fatal in (128, 256)
    )
    mask = np.zeros((256, 256), bool)
    mask[:, 128:] = True
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        cluster(1) as workers,
        distributed.Client(workers),
        pytest.raises(distributed.KilledWorker) as info,
    ):
        nad.attention(query, key, value, mask=mask, stream=True).compute()
    # Head 0, the first block of rows, a fatal block of keys. The scheduler counts the death of a worker against all
    # tasks that were assigned to it, so that both blocks which the mask lets through must be fatal ones.
    assert re.search(r"\('attention-part-\w+', 0, 0, [23]\)", str(info.value))


def test_data_larger_than_the_memory_of_their_worker():
    """Keys and values are results that the worker must keep; the nanny ends a worker that has too much in memory."""
    heads, keys, features = 16, 2**15, 64
    size = 2 * heads * keys * features * 4
    with cluster(1, "384MiB") as workers, distributed.Client(workers) as client:
        nad.warmup(client)
        pids = client.run(os.getpid)
        rng = da.random.default_rng(0)
        chunks = (1, 2**13, features)
        k, v = (rng.standard_normal((heads, keys, features), dtype=np.float32, chunks=chunks) for _ in range(2))
        q = rng.standard_normal((heads, 64, features), dtype=np.float32, chunks=(1, 64, features))
        q, k, v = client.persist([q, k, v])
        distributed.wait([q, k, v])
        (on_disk,) = client.run(lambda dask_worker: len(dask_worker.data.slow)).values()
        assert on_disk > 0
        got = na.attention(q, k, v, return_lse=False).compute()
        assert client.run(os.getpid) == pids, "the worker was ended for its memory"
        assert _peak(client) < 384 * 2**20 < size + _resident(client)
        head = [x[-1:].compute() for x in (q, k, v)]
    np.testing.assert_allclose(got[-1:], na.attention(*head), atol=2e-6)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_store_of_three_times_the_memory_of_a_worker(backward, tmp_path):
    """Keys and values lie in files; the largest size of the process is that of a few blocks above its beginning."""
    heads, keys, features, rows = 24, 2**15, 64, 64
    size = heads * keys * features * 4
    for name in ("key", "value"):
        folder = tmp_path / name
        folder.mkdir()
        for h in range(heads):
            rng = np.random.default_rng((h, name == "key"))
            np.save(folder / f"{h:03d}.npy", rng.standard_normal((1, keys, features), dtype=np.float32))
    with cluster(1, "440MiB") as workers, distributed.Client(workers) as client:
        nad.warmup(client)
        k, v = (_stack(tmp_path / name, (heads, keys, features), 2**12) for name in ("key", "value"))
        q = da.random.default_rng(0).standard_normal(
            (heads, rows, features), dtype=np.float32, chunks=(1, 32, features)
        )
        out, lse = nad.attention(q, k, v, return_lse=True, stream=True)
        before = _resident(client)
        if backward:
            grads = nad.attention_backward(da.ones_like(out), q, k, v, out, lse, stream=True)
            got = dask.compute(*(abs(x).sum() for x in grads[:3]))
        else:
            got = dask.compute(out)
        limit = before + (2 * size) // 3
        peak = _peak(client)
        assert peak < limit, f"{(peak - before) / 2**20:.0f} MiB for {2 * size / 2**20:.0f} in files"
    print(f"peak {(peak - before) / 2**20:.0f} MiB above {before / 2**20:.0f}, {2 * size / 2**20:.0f} in files")
    head = heads - 1
    one = [x[head : head + 1].compute() for x in (q, k, v)]
    want = na.attention(*one, return_lse=True)
    if not backward:
        np.testing.assert_allclose(got[0][head:], want[0], atol=2e-6)
    else:
        total = [0.0] * 3
        for h in range(heads):
            one = [x[h : h + 1].compute() for x in (q, k, v)]
            out, lse = na.attention(*one, return_lse=True)
            for n, grad in enumerate(na.attention_backward(np.ones_like(out), *one, out, lse)[:3]):
                total[n] += np.abs(grad).sum(dtype=np.float64)
        np.testing.assert_allclose(got, total, rtol=1e-4)


def _stack(folder, shape, keys):
    return da.from_array(_Files(folder, shape), chunks=(1, keys, shape[-1]), asarray=True, name=str(folder))


def _resident(client):
    return max(client.run(lambda: __import__("psutil").Process().memory_info().rss).values())


def _peak(client):
    """The largest resident size of a worker; that of `resource` may be inherited from the process that started it."""

    def peak():
        with open("/proc/self/status") as file:
            (line,) = (line for line in file if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    return max(client.run(peak).values())
