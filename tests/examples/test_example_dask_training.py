"""The layer of examples/dask_training.py, trained briefly on Dask arrays."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("dask.array")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import dask
import dask_training

import numba_attention as na


def test_a_step_is_that_of_numpy():
    layer = na.MultiHeadAttention(dask_training.SECRET + 1, 1, dtype=np.float32, rng=0)
    rows, secrets = dask_training.records(np.random.default_rng(1))
    loss, grads = dask_training.step(layer, rows, secrets)
    x, target = dask.compute(rows, secrets)
    out, ctx = layer.forward(x)
    error = out[..., : dask_training.SECRET] - target
    np.testing.assert_allclose(loss, np.mean(error.astype(np.float64) ** 2), rtol=1e-5)
    grad_out = np.zeros_like(out)
    grad_out[..., : dask_training.SECRET] = error * (2 / error.size)
    layer.backward(grad_out, ctx)
    for name, x in layer.grads.items():
        np.testing.assert_allclose(grads[name], x, atol=2e-6)


def test_training(monkeypatch, capsys):
    monkeypatch.setattr(dask_training, "ROWS", 128)
    monkeypatch.setattr(dask_training, "CHUNK", 50)
    with dask.config.set(scheduler="synchronous"):
        losses = dask_training.main(40)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert "step 39  loss" in capsys.readouterr().out
