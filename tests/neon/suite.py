"""Forward, backward and decoding on NEON against formulas in float64, with shipped kernels alone: nothing compiles.

It is a program, not a test file, for `run.sh` starts it in an emulator of aarch64, where compiling takes minutes.
"""

import math
import sys
import time
from importlib.metadata import version

import ml_dtypes
import numpy as np

import numba_attention as na
from numba_attention.cpu.cache import Kernel
from numba_attention.cpu.simd import HOST
from numba_attention.cpu.target import level

DTYPES = ("float32", "float64", "float16", "bfloat16")
# (query heads, key heads, L, S, E, Ev), options. Lengths and head dimensions that no tile divides are among them.
CASES = {
    "plain": ((2, 2, 70, 70, 32, 32), {}),
    "odd sizes": ((2, 2, 37, 101, 33, 19), {}),
    "causal, grouped": ((4, 2, 65, 97, 16, 16), {"is_causal": "bottom-right"}),
    "window": ((2, 2, 80, 80, 24, 24), {"window": (20, 7)}),
    "softcap": ((2, 2, 40, 40, 16, 16), {"softcap": 2.0}),
    "bias and mask": ((2, 2, 45, 66, 16, 16), {"bias": True, "mask": True}),
    "few queries": ((4, 2, 1, 1500, 32, 32), {}),
}
# Errors allowed: units of the dtype's eps times the largest value, for storing results, and of the arithmetic's eps.
# Gradients are computed from stored, so rounded, results of the forward pass. The formulas round as float64 does, too.
STORED = {"forward": 0.51, "decode": 0.51, "backward": 2.0}
COMPUTED = 16


def textbook(q, k, v, grad, options):
    """Output, log-sum-exp and gradients by formulas on float64 arrays."""
    (H, L, E), (Hkv, S, _) = q.shape, k.shape
    k, v = (np.repeat(x, H // Hkv, 0) for x in (k, v))
    scale = 1 / np.sqrt(E)
    scores = scale * q @ k.swapaxes(-1, -2)
    slope = np.ones_like(scores)
    if cap := options.get("softcap"):
        scores = cap * np.tanh(scores / cap)
        slope = 1 - (scores / cap) ** 2
    scores = scores + np.float64(options.get("bias", 0))
    row, column = np.arange(L)[:, None], np.arange(S)
    visible = np.broadcast_to(options.get("mask", True), scores.shape)
    if options.get("is_causal"):
        visible = visible & (column <= row + S - L)
    if window := options.get("window"):
        visible = visible & (column >= row - window[0]) & (column <= row + window[1])
    scores = np.where(visible, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    weights /= total
    out = weights @ v
    lse = (top + np.log(total))[..., 0]
    grad_weights = grad @ v.swapaxes(-1, -2)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdims=True)) * slope * scale
    grads = grad_scores @ k, grad_scores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ grad
    return out, lse, grads[0], *(g.reshape(Hkv, H // Hkv, S, -1).sum(1) for g in grads[1:])


def error(got, want, dtype, stage):
    """The largest error by the largest right value, and the same in units of what is allowed."""
    assert got.shape == want.shape
    assert got.dtype == dtype
    largest = np.abs(want).max()
    found = np.abs(got.astype(float) - want).max() / largest
    computed = np.finfo("float64" if dtype == "float64" else "float32").eps
    stored = 0 if dtype in (np.float32, np.float64) else STORED[stage] * float(ml_dtypes.finfo(dtype).eps)
    return found, found / (stored + COMPUTED * computed)


def problem(name, dtype, seed):
    (H, Hkv, L, S, E, Ev), options = CASES[name]
    rng = np.random.default_rng(seed)
    shapes = (H, L, E), (Hkv, S, E), (Hkv, S, Ev), (H, L, Ev)
    q, k, v, grad = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    options = dict(options)
    if "bias" in options:
        options["bias"] = rng.standard_normal((H, L, S)).astype(dtype)
        options["mask"] = rng.random((L, S)) < 0.7
        options["mask"][:, 0] = True
    return (q, k, v, grad), options


def run(dtype):
    """Yield stage, case, error and its share of what is allowed."""
    for seed, name in enumerate(CASES):
        (q, k, v, grad), options = problem(name, dtype, seed)
        wide = {n: x.astype(float) if n == "bias" else x for n, x in options.items()}
        out, lse, *grads = textbook(*(x.astype(float) for x in (q, k, v, grad)), wide)
        got, got_lse = na.attention(q, k, v, return_lse=True, **options)
        yield "forward", name, *error(got, out, dtype, "forward")
        yield "forward", f"{name}, lse", *error(got_lse, lse, got_lse.dtype, "forward")
        results = na.attention_backward(grad, q, k, v, got, got_lse, **options)
        for part, result, want in zip(("query", "key", "value"), results, grads, strict=False):
            yield "backward", f"{name}, {part}", *error(result, want, dtype, "backward")
    for length, rows in ((33, 1), (600, 1), (1500, 1), (300, 3)):
        rng = np.random.default_rng(length)
        k, v = (rng.standard_normal((1, 2, length, 32)).astype(dtype) for _ in range(2))
        q = rng.standard_normal((1, 4, rows, 32)).astype(dtype)
        cache = na.KVCache(1, 2, length, 32, dtype=dtype)
        cache.append(k[:, :, :-rows], v[:, :, :-rows])
        cache.append(k[:, :, -rows:], v[:, :, -rows:])
        q64, k64, v64 = (x[0].astype(float) for x in (q, k, v))
        want = textbook(q64, k64, v64, np.zeros_like(q64), {"is_causal": True})[0]
        got = na.attention_decode(q, cache)[0]
        yield "decode", f"{rows} of {length}", *error(got, want, dtype, "decode")


def run_layer(dtype):
    """Yield case, error and its share of what is allowed, of the steps of a layer beside attention."""
    rng = np.random.default_rng(1)
    for rows, K, N in ((1, 24, 40), (37, 33, 19), (130, 64, 70)):
        x, weight, residual = (rng.standard_normal(shape).astype(dtype) for shape in ((rows, K), (N, K), (rows, N)))
        bias, gain = (rng.standard_normal(N).astype(dtype) for _ in range(2))
        y = x.astype(float) @ weight.astype(float).T + bias
        of_gelu = 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        total = y + residual
        centred = total - total.mean(-1, keepdims=True)
        normed = gain * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) + bias
        product = na.nn.linear(x, weight, bias)
        for case, got, want in (
            ("linear", product, y),
            ("GELU", na.nn.linear(x, weight, bias, activation="gelu"), of_gelu),
            ("norm", na.nn.layer_norm(product, gain, bias, 1e-5, residual=residual), normed),
        ):
            yield "layer", f"{case}, {rows} x {K} x {N}", *error(got, want, dtype, "forward")


def refuse(kernel):
    raise SystemExit(f"FAILED: the kernel {kernel.name} is not among the shipped ones")


def main():
    python, numba = sys.version.split()[0], version("numba")
    print(f"{HOST.name}, level {level()}, Python {python}, NumPy {np.__version__}, Numba {numba}")
    if HOST.name != "NEON":
        raise SystemExit("FAILED: this is no aarch64")
    Kernel._compile = refuse
    failed = 0
    for name in DTYPES:
        start, worst = time.process_time(), {}
        steps = run_layer(np.dtype(name)) if name in ("float32", "float64") else ()  # NumPy computes half types
        for stage, case, found, share in (*run(np.dtype(name)), *steps):
            worst[stage] = max(worst.get(stage, 0), found)
            if not share <= 1:
                failed += 1
                print(f"FAILED: {name} {stage}, {case}: error {found:.1e}, {share:.1f} times what is allowed")
        columns = ", ".join(f"{stage} {found:.1e}" for stage, found in worst.items())
        print(f"{name}: {columns} ({time.process_time() - start:.1f} s)", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
