"""Errors of float32 against a float64 reference, beside those of PyTorch's own float32 kernel on the same numbers."""

import numpy as np
import pytest

import numba_attention as na
from cases import oracle
from grid import share

pytestmark = pytest.mark.torch

FACTOR = 1.5  # of PyTorch's error


def pool(count, seed):
    """Random problems: (query, key, value, is_causal)."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        L, S = rng.integers(1, 700, 2)
        E, Ev = rng.choice([8, 32, 40, 64, 96, 128, 256]), rng.choice([8, 32, 64, 128])
        H = int(rng.integers(1, 4))
        causal = bool(rng.random() < 0.4)
        S = L if causal else S
        magnitude = rng.choice([0.5, 1.0, 2.0])
        yield (
            *((magnitude * rng.standard_normal((1, H, n, e))).astype(np.float32) for n, e in ((L, E), (S, E), (S, Ev))),
            causal,
        )


def errors(torch, problems):
    """Maximum and RMS error of each problem over the largest output: ours, PyTorch's."""
    ours, theirs = [], []
    for query, key, value, causal in problems:
        want = oracle(query, key, value, is_causal=causal)[0]
        peer = torch.nn.functional.scaled_dot_product_attention(
            *(torch.from_numpy(x) for x in (query, key, value)), is_causal=causal
        ).numpy()
        for found, out in ((ours, na.attention(query, key, value, is_causal=causal)), (theirs, peer)):
            error = np.abs(out - want) / np.abs(want).max()
            found.append((error.max(), np.sqrt(np.mean(error**2))))
    return np.array(ours), np.array(theirs)


def hold(ours, theirs):
    """Typical, pooled and worst errors are all within the factor; 1e-9 keeps exact results out of the logarithm."""
    ratio = np.exp(np.mean(np.log((ours + 1e-9) / (theirs + 1e-9)), axis=0))
    assert np.all(ratio <= FACTOR), f"{ratio} times PyTorch's maximum and RMS error in the geometric mean"
    pooled = np.sqrt(np.mean(ours[:, 1] ** 2) / np.mean(theirs[:, 1] ** 2))
    assert pooled <= FACTOR, f"{pooled:.2f} times PyTorch's RMS error"
    worst = ours[:, 0].max() / theirs[:, 0].max()
    assert worst <= FACTOR, f"{worst:.2f} times PyTorch's worst error"


@pytest.mark.parametrize("count", share([40, 150], 2))
def test_random_shapes(torch, count):
    hold(*errors(torch, pool(count, seed=count)))


@pytest.mark.parametrize("E", [16, 64, 128, 256, 512])
def test_head_dimension(torch, E):
    """Long sums over E with scores of some size, which the exponential makes relative errors of."""
    rng = np.random.default_rng(E)
    shape = (1, 2, 200, E)
    hold(
        *errors(
            torch, [(*((2 * rng.standard_normal(shape)).astype(np.float32) for _ in range(3)), False) for _ in range(4)]
        )
    )


@pytest.mark.parametrize(
    "shape", [(4, 1, 1000, 64), (1, 4, 512, 64), (1, 2, 333, 128), (1, 1, 2048, 64), (2, 2, 64, 32)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_shape(torch, shape, causal):
    rng = np.random.default_rng(0)
    hold(
        *errors(torch, [(*(rng.standard_normal(shape, dtype=np.float32) for _ in range(3)), causal) for _ in range(3)])
    )


def test_lse_of_scores_far_from_zero():
    """The logarithm keeps its digits where the denominator is a huge or tiny number."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, 70, 16)).astype(np.float32) for _ in range(3))
    for shift in (0.0, 80.0, -80.0, 1e4, -1e4):
        lse = na.attention(query, key, value, bias=shift, return_lse=True)[1]
        want = oracle(query, key, value, bias=shift)[1]
        assert np.abs(lse - want).max() <= 3e-7 * (1 + np.abs(want).max())
