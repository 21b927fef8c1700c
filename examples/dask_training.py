"""A layer learns which rows of a record matter: training steps on Dask arrays, whose chunks cut the record.

Run: ``python examples/dask_training.py``. It needs ``pip install "numba-attention[dask]"``. One row in ten of a record
is marked, and contains the record's secret, a vector, with some noise; all other rows are noise. Each row shall know
the secret, so it must attend to the marked rows of all chunks. One call of `dask.compute` runs the forward and the
backward pass of a step, here in threads; with a ``distributed.Client``, on its workers. The parameters stay here.
"""

import time

import dask
import dask.array as da
import numpy as np

import numba_attention as na
from numba_attention import nn

RECORDS, ROWS, CHUNK = 8, 2**10, 2**9
SECRET = 15  # features, beside the mark
SHARE = 0.1  # of marked rows


def records(rng: np.random.Generator) -> tuple[da.Array, da.Array]:
    """Return records, (RECORDS, ROWS, SECRET + 1), and their secrets; stores of Zarr would come from `da.from_zarr`."""
    secrets = rng.standard_normal((RECORDS, 1, SECRET), dtype=np.float32)
    marks = rng.random((RECORDS, ROWS, 1)) < SHARE
    rows = marks * secrets + rng.standard_normal((RECORDS, ROWS, SECRET), dtype=np.float32)
    whole = np.concatenate([rows, marks], axis=2, dtype=np.float32)
    chunks = (1, CHUNK, -1)
    return da.from_array(whole, chunks=chunks), da.from_array(np.broadcast_to(secrets, rows.shape), chunks=chunks)


def step(layer: na.MultiHeadAttention, rows: da.Array, secrets: da.Array) -> tuple[float, dict[str, np.ndarray]]:
    """Return the loss, and its gradients with respect to the parameters."""
    out, ctx = layer.forward(rows)
    error = out[..., :SECRET] - secrets
    loss = (error**2).mean()
    grad_out = da.concatenate([error * (2 / error.size), da.zeros_like(out[..., SECRET:])], axis=2)
    layer.backward(grad_out.astype(out.dtype), ctx)
    return dask.compute(loss, layer.grads)  # nothing was computed before


def main(steps: int = 100) -> list[float]:
    """Train on new records in each step, print the loss, and return it."""
    rng = np.random.default_rng(0)
    layer = na.MultiHeadAttention(SECRET + 1, 1, rng=rng)
    adam = nn.Adam(layer.parameters(), rate=0.05)
    losses, start = [], time.perf_counter()
    for n in range(steps):
        loss, grads = step(layer, *records(rng))
        adam.step(grads, nn.warmup_cosine(n, steps, 5))
        losses.append(float(loss))
        if n % 10 == 0 or n == steps - 1:
            print(f"step {n:2d}  loss {loss:.4f}  {time.perf_counter() - start:.1f} s")
    return losses


if __name__ == "__main__":
    main()
