"""The backend on a GPU, one new thing a step, in the order in which things can go wrong: python smoke.py

Each step is held against the reference backend in float64, and steps of magnitudes against plain NumPy. After a step
that fails the rest goes on in a new process, since a fault of a kernel ends the context of its own. `--only NAME` runs
one step (under compute-sanitizer or cuda-gdb, say).
"""

import argparse
import functools
import math
import os
import subprocess
import sys
import time

import numpy as np

STEPS = {}


def step(function):
    STEPS[function.__name__] = function
    return function


class Skip(Exception):
    pass


def dtypes(name):
    if name in ("bfloat16", "float8_e4m3fn"):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


LIMITS = {"float64": 1e-12, "float32": 4e-6, "float16": 2e-3, "bfloat16": 2e-2}
RNG = np.random.default_rng(0)


def normal(*shape, dtype="float32"):
    return RNG.standard_normal(shape).astype(dtypes(dtype))


def wide(*arrays):
    return [np.asarray(x).astype(np.float64) for x in arrays]


COLLECTING = bool(os.environ.get("NA_KIT_COLLECT"))  # which kernels steps ask for, on a driver that runs none


def error(got, want):
    """The largest error over the largest magnitude; where it is, if that is much."""
    if COLLECTING:
        return 0.0
    got, want = wide(got, want)
    if got.shape != want.shape:
        raise AssertionError(f"shape {got.shape}, wanted {want.shape}")
    bad = np.isnan(got) != np.isnan(want)
    if bad.any():
        raise AssertionError(
            f"{bad.sum()} of {bad.size} are NaN or should be, the first at {tuple(np.argwhere(bad)[0])}"
        )
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite & ~np.isnan(want)], want[~finite & ~np.isnan(want)]):
        raise AssertionError("infinities differ")
    if not finite.any():
        return 0.0
    off = np.abs(np.where(finite, got - np.where(finite, want, 0), 0))
    return float(off.max() / max(np.abs(want[finite]).max(), 1e-30))


def near(name, got, want, limit):
    if COLLECTING:
        return name
    found = error(got, want)
    if not found <= limit:
        got, want = wide(got, want)
        off = np.abs(got - want) > limit * np.abs(want).max()
        axes = ["".join("X" if hit else "." for hit in off.any(axis=tuple(k for k in range(off.ndim) if k != n))[:64])
                for n in range(off.ndim)]  # fmt: skip
        raise AssertionError(f"{name}: error {found:.3g} > {limit:g}, {off.sum()} of {off.size} wrong; by axis {axes}")
    return f"{name} {found:.1e}"


def forward(dtype, L=17, S=33, E=32, Ev=None, H=2, Hkv=None, B=1, **options):
    import numba_attention as na

    q, k, v = (normal(B, h, n, e, dtype=dtype) for h, n, e in
               ((H, L, E), (Hkv or H, S, E), (Hkv or H, S, Ev or E)))  # fmt: skip
    out, lse = na.attention(q, k, v, **options, return_lse=True, backend="cuda")
    want, want_lse = na.attention(*wide(q, k, v), **options, return_lse=True, backend="reference")
    return " ".join([near("out", out, want, LIMITS[dtype]), near("lse", lse, want_lse, 2e-6)])


def both(dtype, L=40, S=50, E=64, Ev=None, H=2, Hkv=None, **options):
    import numba_attention as na

    shapes = (H, L, E), (Hkv or H, S, E), (Hkv or H, S, Ev or E)
    q, k, v = (normal(1, *shape, dtype=dtype) for shape in shapes)
    want, want_lse = na.attention(*wide(q, k, v), **options, return_lse=True, backend="reference")
    out, lse, grad = want.astype(q.dtype), want_lse.astype(np.float64 if dtype == "float64" else np.float32), normal(
        *want.shape, dtype=dtype)  # fmt: skip
    got = na.attention_backward(grad, q, k, v, out, lse, **options, backend="cuda")
    expected = na.attention_backward(*wide(grad, q, k, v), want, want_lse, **options, backend="reference")
    limit = LIMITS[dtype] * 3
    return " ".join(near(f"d{name}", a, b, limit) for name, a, b in zip("qkv", got, expected, strict=False))


def device_facts():
    from numba_attention.device import runtime

    found = runtime.driver.device(0)
    return f"{found.name}, {found.arch}, {found.multiprocessors} multiprocessors, {found.shared_memory} B shared"


@step
def device():
    return device_facts()


@step
def memory():
    """No kernel: allocate in the order of a stream, copy there and back."""
    from numba_attention.device import runtime

    x = normal(3 * 2**20 + 5)
    with runtime.using(0, runtime.DEFAULT_STREAM):
        there = runtime.upload(x, runtime.DEFAULT_STREAM)
        out = np.empty_like(x)
        runtime.download(there, out, runtime.DEFAULT_STREAM)
    assert COLLECTING or np.array_equal(x, out)
    return f"{x.nbytes} bytes"


@step
def convert_and_sum():
    """One kernel without shared memory: a cubin is loaded, parameters arrive."""
    from numba_attention.backends.device_sums import reduce
    from numba_attention.device import runtime

    x = normal(3, 40, 5)
    with runtime.using(0, runtime.DEFAULT_STREAM):
        there = runtime.upload(x, runtime.DEFAULT_STREAM)
        made = reduce(there, (3, 1, 5), np.dtype(np.float32),
                      lambda shape, dtype: runtime.empty(shape, dtype, runtime.DEFAULT_STREAM))  # fmt: skip
        out = np.empty(made.shape, made.dtype)
        runtime.download(made, out, runtime.DEFAULT_STREAM)
    return near("sum", out, x.sum(1, keepdims=True), 1e-6)


@step
def float32_no_async_copies():
    return forward("float32", E=30)  # rows that are not multiples of 16 bytes: loads through registers


@step
def float32():
    return forward("float32")


@step
def float32_two_tiles():
    return forward("float32", L=140, S=200, is_causal=True)


@step
def float16_one_product():
    return forward("float16", L=16, S=16)


@step
def float16():
    return forward("float16", L=140, S=200)


@step
def bfloat16_E64_causal():
    return forward("bfloat16", L=300, S=300, E=64, H=4, Hkv=2, is_causal=True)


@step
def bfloat16_E128():
    return forward("bfloat16", L=300, S=300, E=128, H=4, Hkv=2)  # over 48 KiB of shared memory


@step
def bfloat16_E256():
    return forward("bfloat16", L=130, S=200, E=256)


# With so many heads there are enough blocks for the kernels of sm_90a (`cuda/hopper.py`); gradients have them always.


@step
def warpgroups_E64():
    return forward("bfloat16", L=300, S=500, E=64, H=32, Hkv=16, B=3)


@step
def warpgroups_E128_causal():
    return forward("float16", L=400, S=400, E=128, H=32, B=2, is_causal=True)


@step
def warpgroups_E256():
    return forward("bfloat16", L=200, S=333, E=256, H=32, B=3)


@step
def warpgroups_window_and_lengths():
    lengths = {"query_lengths": np.array([300, 17, 260]), "key_lengths": np.array([310, 200, 0])}
    return forward("bfloat16", L=300, S=310, E=128, H=40, B=3, window=(70, 20), **lengths)


@step
def warpgroups_packed():
    import numba_attention as na

    ends = np.array([0, 300, 317, 317, 700, 900])
    q, k, v = (normal(900, 40, 64, dtype="float16") for _ in range(3))
    options = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "is_causal": True}
    got = na.attention_varlen(q, k, v, **options, backend="cuda")
    want = na.attention_varlen(*wide(q, k, v), **options, backend="reference")
    return near("out", got, want, LIMITS["float16"])


@step
def warpgroups_softcap():
    """Scores that are all small beside the cap, which take a polynomial, and scores on both sides of it."""
    shape = {"L": 260, "S": 300, "H": 32, "Hkv": 16, "B": 2}
    return "; ".join(f"{cap:g} E{E}: {forward('bfloat16', **shape, E=E, softcap=cap)}"
                     for cap, E in ((50.0, 64), (1.5, 64), (1.5, 128), (1.5, 256)))  # fmt: skip


@step
def warpgroups_alibi():
    slopes = np.linspace(-0.01, 0.3, 32)
    return "; ".join(f"E{E}: {forward('bfloat16', L=300, S=300, E=E, H=32, B=2, is_causal=True, alibi_slopes=slopes)}"
                     for E in (64, 128, 256))  # fmt: skip


@step
def warpgroups_sinks():
    sinks = np.where(np.arange(25) % 5 == 0, -np.inf, np.linspace(-2, 3, 25))
    lengths = {"query_lengths": np.array([300, 17, 260]), "key_lengths": np.array([310, 200, 0])}
    options = {"window": (70, 20), "sinks": sinks, **lengths}
    return "; ".join(f"E{E}: {forward('bfloat16', L=300, S=310, E=E, H=25, B=3, **options)}" for E in (64, 128, 256))


@step
def warpgroups_options_packed():
    import numba_attention as na

    ends = np.array([0, 300, 317, 317, 700, 900])
    options = {"softcap": 3.0, "alibi_slopes": np.linspace(0, 0.3, 40), "sinks": np.linspace(-2, 3, 40)}
    options |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "is_causal": True}
    said = []
    for E in (64, 128, 256):
        q, k, v = (normal(900, heads, E, dtype="bfloat16") for heads in (40, 8, 8))
        got = na.attention_varlen(q, k, v, **options, backend="cuda")
        want = na.attention_varlen(*wide(q, k, v), **options, backend="reference")
        said.append(near(f"E{E}", got, want, LIMITS["bfloat16"]))
    return " ".join(said)


@step
def warpgroups_nothing_leaks():
    """NaN in keys that only the last rows see: their tiles are multiplied, and a second kernel mends the rows."""
    import numba_attention as na

    said = []
    for options in ({}, {"softcap": 3.0, "alibi_slopes": np.linspace(0, 0.3, 50), "sinks": np.ones(50)}):
        q, k, v = (normal(1, 50, 300, 128, dtype="bfloat16") for _ in range(3))
        want = na.attention(*wide(q, k, v), is_causal=True, **options, backend="reference")
        k[:, :, 250:], v[:, :, 250:] = np.nan, np.inf
        got = na.attention(q, k, v, is_causal=True, **options, backend="cuda")
        said.append(near("out", got[:, :, :250], want[:, :, :250], LIMITS["bfloat16"]))
    return " ".join(said)


@step
def float64():
    return forward("float64", L=50, S=90, E=64)


@step
def tf32():
    os.environ["NUMBA_ATTENTION_TF32X3"] = "1"
    try:
        return forward("float32", L=100, S=150, E=64)
    finally:
        del os.environ["NUMBA_ATTENTION_TF32X3"]


@step
def all_options():
    options = {"softcap": 3.0, "window": (60, 20), "alibi_slopes": np.linspace(0.1, 1, 4), "sinks": np.ones(4),
               "mask": RNG.random((4, 90, 130)) < 0.7, "bias": normal(4, 90, 130), "key_lengths": 111}  # fmt: skip
    return "; ".join(f"{dtype}: {forward(dtype, L=90, S=130, E=64, H=4, Hkv=2, **options)}"
                     for dtype in ("float32", "bfloat16"))  # fmt: skip


@step
def backward_float32():
    return both("float32")


@step
def backward_bfloat16_two_passes():
    os.environ["NUMBA_ATTENTION_DETERMINISTIC"] = "1"
    try:
        return both("bfloat16", L=150, S=170, is_causal=True)
    finally:
        del os.environ["NUMBA_ATTENTION_DETERMINISTIC"]


@step
def backward_bfloat16_atomics():
    return both("bfloat16", L=150, S=170, H=4, Hkv=2, is_causal=True)


@step
def backward_float16_E128():
    return both("float16", L=150, S=170, E=128)


@step
def backward_bfloat16_E128_window():
    return both("bfloat16", L=350, S=333, E=128, H=4, Hkv=2, window=(90, 30), key_lengths=300)


@step
def warpgroups_backward_alibi():
    shape = {"L": 350, "S": 333, "H": 4, "Hkv": 2, "alibi_slopes": np.array([0.2, -0.01, 0.05, 0.0])}
    options = {"window": (90, 30), "key_lengths": 300}, {"is_causal": True}
    return "; ".join(f"E{E}: {both('bfloat16', E=E, **shape, **more)}" for E in (64, 128) for more in options)


@step
def bias_tiles():
    """A bias in a half type is copied as tiles, and its gradient comes from the tile of dS, or by atomics."""
    import numba_attention as na

    q, k, v, grad = (normal(1, 2, n, 64, dtype="bfloat16") for n in (150, 168, 168, 150))
    said = []
    for shape in ((1, 2, 150, 168), (1, 1, 150, 168)):
        options = {"bias": normal(*shape, dtype="bfloat16"), "is_causal": True}
        wanted = options | {"bias": wide(options["bias"])[0]}
        want, want_lse = na.attention(*wide(q, k, v), **wanted, return_lse=True, backend="reference")
        out, lse = na.attention(q, k, v, **options, return_lse=True, backend="cuda")
        got = na.attention_backward(grad, q, k, v, out, lse, **options, backend="cuda")
        expected = na.attention_backward(*wide(grad, q, k, v), want, want_lse, **wanted, backend="reference")
        said.append(near("out", out, want, LIMITS["bfloat16"]))
        said += [near(f"d{name}", getattr(got, name), getattr(expected, name), 3 * LIMITS["bfloat16"])
                 for name in ("query", "key", "value", "bias")]  # fmt: skip
    return " ".join(said)


@step
def weights_of_half_types():
    import numba_attention as na

    q, k = normal(1, 2, 70, 64, dtype="bfloat16"), normal(1, 2, 131, 64, dtype="bfloat16")
    got = na.attention_weights(q, k, window=(40, 20), backend="cuda")
    return near("weights", got, na.attention_weights(*wide(q, k), window=(40, 20), backend="reference"), 1e-2)


@step
def decode_split():
    import numba_attention as na

    q, k, v = normal(1, 8, 1, 64, dtype="bfloat16"), *(normal(1, 2, 3000, 64, dtype="bfloat16") for _ in range(2))
    cache = na.KVCache.from_arrays(k, v)
    got = na.attention_decode(q, cache, backend="cuda")
    want = na.attention(*wide(q, k, v), backend="reference")
    return near("out", got, want, LIMITS["bfloat16"])


@step
def decode_many_heads():
    """More query heads of a key head than a tile has rows: several tiles, whose keys are divided."""
    import numba_attention as na

    q, k, v = normal(1, 160, 1, 128, dtype="bfloat16"), *(normal(1, 1, 3000, 128, dtype="bfloat16") for _ in range(2))
    got = na.attention_decode(q, na.KVCache.from_arrays(k, v), backend="cuda")
    return near("out", got, na.attention(*wide(q, k, v), backend="reference"), LIMITS["bfloat16"])


@step
def decode_pages_int8():
    import numba_attention as na

    pages = na.PagedKVCache(60, 16, 2, 64, dtype="bfloat16", storage="int8")
    ids = pages.add(2)
    pages.append(ids, *(normal(2, 2, 300, 64, dtype="bfloat16") for _ in range(2)))
    q = normal(2, 8, 1, 64, dtype="bfloat16")
    got = na.attention_decode(q, pages, backend="cuda")
    want = na.attention_decode(q, pages, backend="reference")
    return near("out", got, want, 3e-2)


def there(x):
    """The header of a copy on the GPU."""
    from numba_attention.device import runtime

    with runtime.using(0, runtime.DEFAULT_STREAM):
        return runtime.upload(np.ascontiguousarray(x), runtime.stream())


def here(header):
    from numba_attention.device import runtime

    out = np.empty(header.shape, header.dtype)
    with runtime.using(0, runtime.DEFAULT_STREAM):
        runtime.download(header, out, runtime.stream())
    return out


@step
def append_on_the_device():
    """A cache of arrays on the GPU stores what one on the host stores, in every format, and rolls."""
    import numba_attention as na
    from numba_attention.device.dlpack import Exported

    said = []
    for dtype, storage, window in (("float16", None, None), ("float32", "int8", None), ("float16", "int8", 40),
                                   ("bfloat16", "float16", None), ("float64", "float8", 33),
                                   ("float32", "bfloat16", 60)):  # fmt: skip
        host = na.KVCache(2, 2, 64, 64, dtype=dtypes(dtype), storage=storage, window=window)
        headers = [None if x is None else there(np.zeros_like(x)) for x in host._stored[:4]]
        arrays = [None if x is None else Exported(x) for x in headers]
        scales = {} if arrays[2] is None else {"key_scale": arrays[2], "value_scale": arrays[3]}
        cache = na.KVCache.from_arrays(*arrays[:2], 0, dtype=dtypes(dtype), window=window, **scales)
        for T, lengths in ((50, [50, 41]), (1, None), (9, [9, 3]), (20, [2, 19] if window is None else None)):
            key, value = (normal(2, 2, T, 64, dtype=dtype) for _ in range(2))
            host.append(key, value, lengths)
            cache.append(Exported(there(key)), Exported(there(value)), lengths)
        used = np.arange(64) < np.minimum(host.lengths, 64)[:, None, None]
        for name, x, y in zip("kv", headers[:2], host._stored[:2], strict=True):
            x, y = (np.where(used[..., None], z.astype(np.float64), 0) for z in (here(x), y))
            said.append(near(f"{dtype} {storage} {name}", x, y, 0.0))
        q = normal(2, 4, 1, 64, dtype=dtype)
        want = na.attention_decode(q, host, backend="reference")
        said.append(near("out", na.attention_decode(q, cache), want, max(LIMITS[dtype], 1e-5)))
    return " ".join(said)


@step
def merge_on_the_device():
    import numba_attention as na
    from numba_attention.backends import device_merge
    from numba_attention.device import runtime

    said = []
    for dtype, Ev in (("float32", 33), ("float16", 128), ("float64", 64), ("bfloat16", 96)):
        outs = [normal(2, 3, 40, Ev, dtype=dtype) for _ in range(3)]
        lses = [8 * normal(2, 3, 40, dtype="float64" if dtype == "float64" else "float32") for _ in range(3)]
        lses[0][0, 0, :5] = lses[1][0, 0, :2] = lses[2][0, 0, :1] = -np.inf
        out, lse = there(np.zeros_like(outs[0])), there(np.zeros_like(lses[0]))
        with runtime.using(0, runtime.DEFAULT_STREAM):
            device_merge.merge(list(map(there, outs)), list(map(there, lses)), out, lse)
        want, want_lse = na.merge_attention(wide(*outs), wide(*lses))
        said += [near(f"{dtype} out", here(out), want, LIMITS[dtype]),
                 near("lse", here(lse), want_lse, 1e-12 if dtype == "float64" else 2e-6)]  # fmt: skip
    return " ".join(said)


@step
def bias_and_mask_in_pairs():
    """Rows of an even number of keys, with a window whose tiles begin at odd ones."""
    shown, said = RNG.random((2, 40, 50)) < 0.8, []
    for dtype, of_bias in (("float16", "float32"), ("bfloat16", "float64"), ("float16", "float16")):
        options = {"bias": normal(2, 40, 50, dtype=of_bias), "mask": shown, "window": (7, 9)}
        said += [forward(dtype, L=40, S=50, **options), both(dtype, **options)]
    return " ".join(said)


@step
def latent_forward():
    """Head dimensions of multi-head latent attention: features in slices, results in slabs."""
    return forward("bfloat16", L=40, S=70, E=576, Ev=512, H=2, Hkv=1, is_causal=True)


@step
def latent_decode():
    import numba_attention as na

    q, latent = normal(1, 128, 1, 576, dtype="bfloat16"), normal(1, 1, 500, 576, dtype="bfloat16")
    got = na.attention_decode(q, na.KVCache.from_arrays(latent, latent[..., :512]), backend="cuda")
    want = na.attention(*wide(q, latent, latent[..., :512]), backend="reference")
    return near("out", got, want, LIMITS["bfloat16"])


@step
def latent_backward():
    return both("bfloat16", L=40, S=50, E=576, Ev=512, H=2, Hkv=1, is_causal=True)


@step
def nothing_leaks():
    import numba_attention as na

    q, k, v = (normal(1, 2, 70, 32, dtype="float16") for _ in range(3))
    v[0, 1, 50, 2] = np.nan
    got = na.attention(q, k, v, is_causal=True, backend="cuda")
    want = na.attention(q, k, v, is_causal=True, backend="reference")
    return near("out", got, want, LIMITS["float16"])


# Magnitudes, against the textbook's formulas in float64 on plain arrays, which share no code with the package.


def textbook(q, k, v, scale, hidden=None, bias=0.0):
    """Return output, lse and weights: softmax(scale q k^T + bias) v."""
    q, k, v = wide(q, k, v)
    scores = q @ k.swapaxes(-1, -2) * scale + bias
    if hidden is not None:
        scores = np.where(hidden, -np.inf, scores)
    most = scores.max(-1, keepdims=True)
    weights = np.exp(scores - most)
    total = weights.sum(-1, keepdims=True)
    weights = weights / total
    return weights @ v, (most + np.log(total))[..., 0], weights


def textbook_gradients(grad, q, k, v, weights, scale):
    grad, q, k, v = wide(grad, q, k, v)
    of_weights = grad @ v.swapaxes(-1, -2)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True))
    return of_scores @ k * scale, of_scores.swapaxes(-1, -2) @ q * scale, weights.swapaxes(-1, -2) @ grad


def at_scale(dtype, q, k, v, scale, is_causal, gradients=True):
    """Compare a forward pass and, where float32 can hold them, gradients."""
    import numba_attention as na

    given = {"scale": scale, "is_causal": is_causal}
    out, lse = na.attention(q, k, v, **given, return_lse=True, backend="cuda")
    hidden = np.arange(k.shape[-2]) > np.arange(q.shape[-2])[:, None] if is_causal else None
    want, want_lse, weights = textbook(q, k, v, scale, hidden)
    said = [near("out", out, want, LIMITS[dtype]), near("lse", lse, want_lse, 2e-6)]
    if gradients:
        grad = normal(*out.shape, dtype=dtype)
        got = na.attention_backward(grad, q, k, v, out, lse, **given, backend="cuda")
        expected = textbook_gradients(grad, q, k, v, weights, scale)
        said += [near(f"d{name}", a, b, LIMITS[dtype] * 3) for name, a, b in zip("qkv", got, expected, strict=False)]
    return " ".join(said)


def ties(dtype):
    """Whole numbers, whose products are exact in every type: each key has its score twice, and the highest two share.

    The two differ in features that queries do not have, so that no gradient is the rounding of 0.
    """
    q, k = (RNG.integers(-3, 4, (1, n, 64)) for n in (90, 130))
    q[..., 32:] = 0
    k[:, 1::2, :32] = k[:, ::2, :32]
    return q.astype(dtypes(dtype)), k.astype(dtypes(dtype)), normal(1, 130, 64, dtype=dtype)


@step
def huge_scores():
    """Scores at which float32 has no fractions: the maximum itself is subtracted from what it is one of."""
    said = []
    for dtype in ("float32", "bfloat16", "float64"):
        for scale in (9e8, 5.929e35):
            arrays = ties(dtype)
            small = scale < 1e10  # with a large one the gradients of queries and keys do not fit into float32
            said += [f"{dtype} {scale:g}: {at_scale(dtype, *arrays, scale, x, small)}" for x in (False, True)]
    return "; ".join(said)


@step
def huge_score_of_one_key():
    """1960753920 times log2(e) is no float32 number, and rounds up: exp2 of the rest must not be infinite."""
    import numba_attention as na

    q = np.full((1, 1, 1), 1960753920, np.float32)
    said = []
    for n in (1, 400):  # with 400 of each, keys are shared out to blocks
        k = np.repeat(np.array([1, 1, 0], np.float32), n)[None, :, None]
        v = np.repeat(np.array([[1, 10], [1, 10], [5, 5]], np.float32), n, 0)[None]
        out = na.attention(q, k, v, scale=1, backend="cuda")
        said.append(near(f"{n}", out, np.array([[[1.0, 10.0]]]), 1e-6))
    return " ".join(said)


@step
def scale_zero():
    """Every key that a row sees has the same weight, and gradients of queries and keys are 0."""
    said = []
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        arrays = [normal(1, n, 64, dtype=dtype) for n in (90, 130, 130)]
        said += [f"{dtype}: {at_scale(dtype, *arrays, 0.0, is_causal)}" for is_causal in (False, True)]
    return "; ".join(said)


@step
def gradients_of_far_rows():
    """Rows hidden by a bias of -1e9, whose lse does not tell how many keys they have (the kernel "normalizers")."""
    import numba_attention as na

    said = []
    for dtype in ("float32", "bfloat16", "float64"):
        q = np.zeros((1, 90, 64), dtypes(dtype))  # scores of 0, so that nothing is rounded beside the bias
        k, v = (normal(1, 130, 64, dtype=dtype) for _ in range(2))
        bias = np.zeros((90, 130), dtypes(dtype))
        bias[40:] = -1e9
        out, lse = na.attention(q, k, v, bias=bias, return_lse=True, backend="cuda")
        grad = normal(*out.shape, dtype=dtype)
        got = na.attention_backward(grad, q, k, v, out, lse, bias=bias, backend="cuda")
        want, want_lse, weights = textbook(q, k, v, 0.125, bias=bias.astype(np.float64))
        expected = textbook_gradients(grad, q, k, v, weights, 0.125)
        parts = [near("out", out, want, LIMITS[dtype]), near("lse", lse, want_lse, 2e-6)]
        for name, at in (("near", np.s_[:, :40]), ("far", np.s_[:, 40:])):
            parts.append(near(f"dq {name}", got[0][at], expected[0][at], LIMITS[dtype] * 3))
        parts.append(near("dv", got[2], expected[2], LIMITS[dtype] * 3))
        assert COLLECTING or not np.asarray(got[1], np.float64).any(), "queries are 0, so dk is"
        said.append(f"{dtype}: {' '.join(parts)}")
    return "; ".join(said)


@step
def values_near_the_largest_number():
    """Sums of tensor cores that have no room must be infinite, so that the block repeats its work with less weight."""
    import ml_dtypes

    import numba_attention as na

    said = []
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        largest = float(ml_dtypes.finfo(dtypes(dtype)).max)
        q, k = np.zeros((1, 40, 64), dtypes(dtype)), np.zeros((1, 1000, 64), dtypes(dtype))
        columns = np.tile([0.88, -0.88, 0.03, 1e-9], 16) * largest
        v = np.broadcast_to(columns, (1, 1000, 64)).astype(dtypes(dtype))
        out = np.asarray(na.attention(q, k, v, backend="cuda"), np.float64)
        want = np.broadcast_to(np.asarray(v[:, :1], np.float64), out.shape)
        said.append(f"{dtype} {near('out', out / largest, want / largest, LIMITS[dtype])}")
    return "; ".join(said)


def rule(score, batch, head, i, j, slopes, table):
    x = score - slopes[head] * abs(i - j) + table[min(max(i - j + 8, 0), 16)]
    return 6 * math.tanh(x / 6) if i % 5 else x * 0.75


def rule_of_sight(batch, head, i, j, slopes, table):
    return (i - j) % 3 != 1 and (slopes[head] > 0.1 or j > 4)


@step
def mods():
    """score_mod and mask_mod, forward and backward, against plain NumPy."""
    import numba_attention as na

    slopes, table = np.array([0.05, 0.2], np.float32), np.linspace(-1, 1, 17)
    i, j = np.arange(90)[:, None], np.arange(130)
    hidden = ((i - j) % 3 == 1) | ~((slopes[:, None, None] > 0.1) | (j > 4))
    said = []
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        q, k, v = (normal(2, n, 64, dtype=dtype) for n in (90, 130, 130))
        options = {"score_mod": rule, "mask_mod": rule_of_sight, "mod_args": (slopes, table)}
        out, lse = na.attention(q, k, v, **options, return_lse=True, backend="cuda")
        grad = normal(*out.shape, dtype=dtype)
        got = na.attention_backward(grad, q, k, v, out, lse, **options, mod_grads="all", backend="cuda")
        a, b, c, g = wide(q, k, v, grad)
        x = a @ b.swapaxes(-1, -2) / 8 - slopes[:, None, None] * np.abs(i - j) + table[np.clip(i - j + 8, 0, 16)]
        steep = i % 5 > 0
        scores = np.where(hidden, -np.inf, np.where(steep, 6 * np.tanh(x / 6), x * 0.75))
        slope = np.where(steep, 1 - np.tanh(x / 6) ** 2, 0.75)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        total = weights.sum(-1, keepdims=True)
        want_lse = (scores.max(-1, keepdims=True) + np.log(total))[..., 0]
        weights /= total
        of_weights = g @ c.swapaxes(-1, -2)
        of_scores = slope * weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True)) / 8
        expected = of_scores @ b, of_scores.swapaxes(-1, -2) @ a, weights.swapaxes(-1, -2) @ g
        parts = [near("out", out, weights @ c, LIMITS[dtype]), near("lse", lse, want_lse, 2e-6)]
        parts += [near(f"d{n}", x, y, LIMITS[dtype] * 3) for n, x, y in zip("qkv", got, expected, strict=False)]
        of_table = np.zeros(17)
        np.add.at(of_table, np.broadcast_to(np.clip(i - j + 8, 0, 16), scores.shape), of_scores * 8)
        of_slopes = -(of_scores * 8 * np.abs(i - j)).sum((-1, -2))
        for name, x, y in zip(("slopes", "table"), got.mod_args, (of_slopes, of_table), strict=True):
            single = dtype != "float64" or name == "slopes"
            parts.append(near(f"d{name}", x, y, max(LIMITS[dtype], 1e-5 * single) * 3))
        said.append(f"{dtype}: {' '.join(parts)}")
    return "; ".join(said)


@step
def block_masks():
    """mask=BlockMask, forward and backward, against plain NumPy: hidden, partial and full tiles, and empty rows."""
    import numba_attention as na

    i, j = np.arange(150)[:, None], np.arange(200)
    shown = np.stack([(j // 64 + i // 64) % 3 == 0, (j <= i + 100) & ((i // 32) % 3 != 1), (i + j) % 5 == 0, j < 0 * i])
    mask, said = na.BlockMask.from_array(shown), []
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        for heads in (4, 2) if dtype == "bfloat16" else (2,):
            q, k, v = (normal(h, n, 64, dtype=dtype) for h, n in ((4, 150), (heads, 200), (heads, 200)))
            out, lse = na.attention(q, k, v, mask=mask, return_lse=True, backend="cuda")
            grad = normal(*out.shape, dtype=dtype)
            got = na.attention_backward(grad, q, k, v, out, lse, mask=mask, backend="cuda")
            a, b, c, g = wide(q, np.repeat(k, 4 // heads, 0), np.repeat(v, 4 // heads, 0), grad)
            scores = np.where(shown, a @ b.swapaxes(-1, -2) / 8, -np.inf)
            most = np.maximum(scores.max(-1, keepdims=True), -1e300)
            total = np.exp(scores - most).sum(-1, keepdims=True)
            with np.errstate(divide="ignore", invalid="ignore"):
                weights = np.where(total > 0, np.exp(scores - most) / total, 0)
                want_lse = np.where(total > 0, most + np.log(total), -np.inf)[..., 0]
            of_weights = g @ c.swapaxes(-1, -2)
            of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True)) / 8
            of_keys = (of_scores.swapaxes(-1, -2) @ a).reshape(heads, -1, 200, 64).sum(1)
            of_values = (weights.swapaxes(-1, -2) @ g).reshape(heads, -1, 200, 64).sum(1)
            parts = [near("out", out, weights @ c, LIMITS[dtype]), near("lse", lse, want_lse, 2e-6)]
            expected = of_scores @ b, of_keys, of_values
            parts += [near(f"d{n}", x, y, LIMITS[dtype] * 3) for n, x, y in zip("qkv", got, expected, strict=False)]
            said.append(f"{dtype} {heads}: {' '.join(parts)}")
    return "; ".join(said)


@step
def block_mask_in_few_queries():
    """Lists with keys that blocks share, and heads of a group in one tile."""
    import numba_attention as na

    shown = (np.arange(5000) // 100 % 3 == 0) & (np.arange(3)[:, None] != 1)
    q, k, v = (normal(h, n, 64, dtype="bfloat16") for h, n in ((8, 3), (2, 5000), (2, 5000)))
    out = na.attention(q, k, v, mask=na.BlockMask.from_array(shown), backend="cuda")
    b, c = wide(np.repeat(k, 4, 0), np.repeat(v, 4, 0))
    weights = np.where(shown, np.exp(wide(q)[0] @ b.swapaxes(-1, -2) / 8), 0)
    want = weights @ c / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return near("out", out, want, LIMITS["bfloat16"])


def of_functions(score, batch, head, i, j, wide):
    if head == 0:
        return np.exp(-abs(score)) + math.log(1 + score * score) + np.sqrt(0.5 + abs(score)) + 2 ** (score / 3)
    if head == 1:
        return math.sin(9 * score) - np.cos(score * 50) + np.log2(2 + abs(score)) + np.tanh(score)
    if head == 2:
        return score**3 + abs(score) ** 1.5 + (1 + abs(score)) ** (0.1 * (i - 32)) + (score - 30.0) ** -2
    if head == 3:
        return (i - 30) // 7 + (i - 30) % 7 * 100 + (9 * i - 99) // (i - 40 if i != 40 else 1) + ((i - 30) >> 1) / 4
    if head == 4:
        return math.floor(score * 8) + math.ceil(score) / 2 + int(score * 3) / 4 + round(score * 5) * 7
    return wide[i] // 3 + (wide[i] % 1000) / 7


@step
def mod_instructions():
    """Every instruction of a mod: the lse of a row with one key is its score."""
    import numba_attention as na

    large = (np.arange(64) - 30) * 10**6
    said = []
    for dtype in ("float32", "float64"):
        q, k = normal(6, 64, 64, dtype=dtype), normal(6, 1, 64, dtype=dtype)
        lse = na.attention(q, k, k, score_mod=of_functions, mod_args=(large,), return_lse=True, backend="cuda")[1]
        scores = (wide(q)[0] @ wide(k)[0].swapaxes(-1, -2))[..., 0] / 8
        want = np.array(
            [[of_functions(s, 0, h, i, 0, large) for i, s in enumerate(row)] for h, row in enumerate(scores)]
        )
        near_step = np.abs(scores[4, :, None] * [8, 1, 3, 5] % 0.5)  # rounding may fall on either side of a step
        lse = np.asarray(lse, np.float64)
        if not COLLECTING:
            lse[4] = np.where((np.minimum(near_step, 0.5 - near_step) < 1e-4).any(axis=1), want[4], lse[4])
        limit = 1e-12 if dtype == "float64" else 2e-5
        said += [near(f"{dtype} {h}", lse[h], want[h], limit) for h in range(6)]
    return " ".join(said)


ON_HOST = COLLECTING or bool(os.environ.get("NA_KIT_EMULATE"))


@functools.cache
def torch_of_gpu():
    try:
        import torch
    except ImportError:
        raise Skip("no torch") from None
    if ON_HOST:
        import gpukit

        return gpukit.TorchOnHost()
    if not torch.cuda.is_available():
        raise Skip("torch has no GPU")
    return torch


def of_torch(torch, *shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def truth(torch, q, k, v, **options):
    return torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)


def distance(got, want):
    if COLLECTING:
        return 0.0
    return float((got.double() - want).abs().max() / want.abs().max())


@step
def torch_tensors():
    import numba_attention as na

    torch = torch_of_gpu()
    q, k, v = (of_torch(torch, 2, 4, 300, 64) for _ in range(3))
    out = na.attention(q, k, v, is_causal=True)
    found = distance(out, truth(torch, q, k, v, is_causal=True))
    assert out.is_cuda
    assert found < 2e-2, found
    return f"out {found:.1e}"


@step
def torch_the_same_call_again():
    """The second time the launches are repeated as they were recorded, with other addresses."""
    import numba_attention as na

    torch = torch_of_gpu()
    worst = 0.0
    for _ in range(4):
        q, k, v = (of_torch(torch, 2, 4, 300, 64) for _ in range(3))
        out, lse = na.attention(q, k, v, is_causal=True, return_lse=True)
        grads = na.attention_backward(out, q, k, v, out, lse, is_causal=True)
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        want = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
        expected = torch.autograd.grad(want, leaves, out.double())
        worst = max(worst, distance(out, want.detach()), *map(distance, grads[:3], expected))
    assert worst < 4e-2, worst
    return f"worst {worst:.1e}"


def of_host(*tensors):
    return [x.double().cpu().numpy() for x in tensors]


@step
def torch_repeated_with_other_seeds():
    """The seed of dropout is a number of the launches: each call drops what its own seed says."""
    import numba_attention as na

    torch, worst = torch_of_gpu(), 0.0
    for seed in (7, 0, 2**64 - 1, 2**63, 7):
        q, k, v = (of_torch(torch, 1, 4, 100, 64) for _ in range(3))
        options = {"dropout_p": 0.4, "seed": seed}
        out, lse = na.attention(q, k, v, **options, return_lse=True)
        grads = na.attention_backward(out, q, k, v, out, lse, **options)
        arrays = of_host(q, k, v)
        want, want_lse = na.attention(*arrays, **options, return_lse=True, backend="reference")
        expected = na.attention_backward(of_host(out)[0], *arrays, want, want_lse, **options, backend="reference")
        worst = max(worst, *map(error, of_host(out, *grads[:3]), [want, *expected[:3]]))
        assert worst < 4e-2, (seed, worst)
    return f"worst {worst:.1e}"


@step
def torch_merge_of_many():
    """Separate parts, whose addresses are a table that every call copies; the calls after the first repeat its plan."""
    import numba_attention as na

    torch, worst = torch_of_gpu(), 0.0
    for number in (5, 5, 5, 2, 2):
        outs = [torch.randn(2, 3, 40, 64, device="cuda") for _ in range(number)]
        lses = [torch.randn(2, 3, 40, device="cuda").mul_(4) for _ in range(number)]
        got = na.merge_attention(outs, lses)
        grads = na.merge_attention_backward(*got, outs, lses)
        arrays = of_host(*outs), of_host(*lses)
        want = na.merge_attention(*arrays)
        expected = na.merge_attention_backward(*of_host(*got), *arrays)
        found = [*got, *grads[0], *grads[1]]
        worst = max(worst, *map(error, of_host(*found), [*want, *expected[0], *expected[1]]))
        assert worst < 2e-5, (number, worst)
    return f"worst {worst:.1e}"


@step
def torch_append_and_decode():
    """Steps of two layers, each with a cache of its own: all but the first repeat a plan with other places."""
    import numba_attention as na

    torch, worst = torch_of_gpu(), 0.0
    shape = 2, 2, 64, 64
    there = [na.KVCache.from_arrays(*(torch.zeros(shape, device="cuda") for _ in range(2)), 0) for _ in range(2)]
    here = [na.KVCache(*shape) for _ in range(2)]
    for tokens in (40, 1, 1, 1, 7):
        for cache, host in zip(there, here, strict=True):
            key, value = (torch.randn(2, 2, tokens, 64, device="cuda") for _ in range(2))
            cache.append(key, value)
            host.append(key.cpu().numpy(), value.cpu().numpy())
            q = torch.randn(2, 4, 1, 64, device="cuda")
            want = na.attention_decode(q.cpu().numpy(), host, backend="reference")
            worst = max(worst, error(*of_host(na.attention_decode(q, cache)), want))
            assert worst < 1e-5, (tokens, worst)
    return f"worst {worst:.1e}"


@step
def torch_in_threads():
    """Threads that have used no GPU so far, on the default stream and on one of their own."""
    import threading

    import numba_attention as na

    torch, found, failed = torch_of_gpu(), [], []
    q, k, v = (of_torch(torch, 2, 4, 300, 64) for _ in range(3))
    want = truth(torch, q, k, v, is_causal=True)
    for _ in range(2):
        na.attention(q, k, v, is_causal=True)
    torch.cuda.synchronize()

    def work(stream):
        try:
            with torch.cuda.stream(stream):  # of None: as it was
                found.extend(na.attention(q, k, v, is_causal=True) for _ in range(4))
                torch.cuda.current_stream().synchronize()
        except Exception as problem:
            failed.append(problem)

    threads = [threading.Thread(target=work, args=(x,)) for x in (None, torch.cuda.Stream(), None, torch.cuda.Stream())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    worst = max(distance(out, want) for out in found)
    assert worst < 2e-2, worst
    return f"worst {worst:.1e}"


@step
def torch_options_of_warpgroups():
    """Softcap, ALiBi and sinks in calls of some size, against a formula in float32."""
    import numba_attention as na

    torch = torch_of_gpu()
    H, L, said = 16, 2048, []
    slopes, sinks = torch.linspace(0, 0.1, H, device="cuda"), torch.linspace(-2, 8, H, device="cuda")
    distances = (torch.arange(L, device="cuda")[:, None] - torch.arange(L, device="cuda")).abs().float()
    for E in (64, 128, 256):
        q, k, v = (of_torch(torch, 1, H, L, E) for _ in range(3))
        for name in ("softcap", "small cap", "alibi", "sinks", "all"):
            causal, cap = name in ("small cap", "sinks", "all"), 30.0 if name == "softcap" else 2.0
            options = {"softcap": cap} if name in ("softcap", "small cap", "all") else {}
            if name in ("alibi", "all"):
                options["alibi_slopes"] = slopes.cpu().numpy()
            if name in ("sinks", "all"):
                options["sinks"] = sinks.cpu().numpy()
            out = na.attention(q, k, v, is_causal=causal, **options)
            if COLLECTING:
                said.append(0.0)
                continue
            s = (q.float() @ k.float().mT) * E**-0.5
            if "softcap" in options:
                s = cap * torch.tanh(s / cap)
            if "alibi_slopes" in options:
                s = s - slopes[:, None, None] * distances
            if causal:
                s = s.masked_fill(distances.triu(1) > 0, -math.inf)
            column = torch.full((1, H, L, 1), -math.inf, device="cuda")
            if "sinks" in options:
                column = sinks[:, None, None].expand(1, H, L, 1)
            want = torch.softmax(torch.cat([s, column], -1), -1)[..., :-1] @ v.float()
            said.append(distance(out, want))
            assert said[-1] < 2e-2, (E, name, said[-1])
    return f"worst {max(said):.1e}"


@step
def torch_another_stream():
    """Work on a stream of the caller's must see what was put on it before, and nothing must be freed too early."""
    import numba_attention as na

    torch = torch_of_gpu()
    stream, worst, size = torch.cuda.Stream(), 0.0, 64 if ON_HOST else 4096
    for _ in range(1 if ON_HOST else 10):
        with torch.cuda.stream(stream):
            big = torch.randn(size, size, device="cuda") @ torch.randn(size, size, device="cuda")  # keeps it busy
            q, k, v = (of_torch(torch, 2, 4, 500, 64) for _ in range(3))
            out = na.attention(q, k, v)
            want = truth(torch, q, k, v)
            del big
        stream.synchronize()
        worst = max(worst, distance(out, want))
    assert worst < 2e-2, worst
    return f"worst {worst:.1e}"


@step
def torch_graph():
    import numba_attention as na

    torch = torch_of_gpu()
    if ON_HOST and not COLLECTING:
        raise Skip("nothing runs a graph here")
    q, k, v = (of_torch(torch, 2, 4, 300, 64) for _ in range(3))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            na.attention(q, k, v)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = na.attention(q, k, v)
    worst = 0.0
    for _ in range(3):
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        worst = max(worst, distance(out, truth(torch, q, k, v)))
    assert worst < 2e-2, worst
    return f"worst {worst:.1e}"


@step
def torch_beyond_2_GiB():
    """Offsets over 2**31 bytes within one array and within one head."""
    import numba_attention as na

    torch = torch_of_gpu()
    if ON_HOST:
        raise Skip("8 GiB are too much for a rehearsal")
    k, v = (torch.zeros(1, 1, 2**25 + 2**20, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))  # 4.1 GiB
    for x in (k, v):
        x[..., -4096:, :] = torch.randn(4096, 64, device="cuda", dtype=torch.bfloat16)
    q = of_torch(torch, 1, 1, 128, 64)
    n = k.shape[-2]
    out = na.attention(q, k, v, window=(4095, 0), query_offset=n - 128)
    rows, columns = torch.arange(128, device="cuda")[:, None], torch.arange(4096 + 128, device="cuda")[None]
    tail_k, tail_v = k[..., -(4096 + 128) :, :], v[..., -(4096 + 128) :, :]
    position = n - 128 + rows
    key = n - (4096 + 128) + columns
    mask = (key <= position) & (key >= position - 4095)
    want = truth(torch, q, tail_k, tail_v, attn_mask=mask)
    found = distance(out, want)
    assert found < 2e-2, found
    many = torch.randn(1, 2**15 + 5, 520, 64, device="cuda", dtype=torch.bfloat16)  # 2.2 GB, heads beyond 2**31 bytes
    out = na.attention(many, many, many)
    want = truth(torch, many[:, -2:], many[:, -2:], many[:, -2:])
    found = max(found, distance(out[:, -2:], want))
    assert found < 2e-2, found
    return f"{found:.1e}"


@step
def cupy_arrays():
    import numba_attention as na

    try:
        import cupy

        q, k, v = (cupy.asarray(normal(1, 2, 70, 64, dtype="float16")) for _ in range(3))
    except Exception as problem:
        raise Skip(f"cupy: {type(problem).__name__}") from None
    out = na.attention(q, k, v)
    want = na.attention(*wide(*map(cupy.asnumpy, (q, k, v))), backend="reference")
    return near("out", cupy.asnumpy(out), want, LIMITS["float16"])


@step
def jax_arrays():
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import numba_attention as na

    try:
        import jax

        place = jax.devices("cuda")[0]
    except Exception as problem:
        raise Skip(f"jax: {type(problem).__name__}") from None
    q, k, v = (jax.device_put(normal(1, 2, 70, 64, dtype="float16"), place) for _ in range(3))
    out = na.attention(q, k, v)
    want = na.attention(*wide(*map(np.asarray, (q, k, v))), backend="reference")
    return near("out", np.asarray(out), want, LIMITS["float16"])


@step
def numba_arrays():
    if COLLECTING or os.environ.get("NA_KIT_EMULATE"):
        raise Skip("the stub of a driver has not what numba.cuda's own arrays call")
    from numba import cuda

    import numba_attention as na

    given = [normal(1, 2, 70, 64, dtype="float16") for _ in range(3)]
    out = na.attention(*map(cuda.to_device, given))
    want = na.attention(*wide(*given), backend="reference")
    return near("out", out.copy_to_host(), want, LIMITS["float16"])


def run(names):
    """Run steps until one fails; 0 if none did."""
    import faulthandler

    faulthandler.enable()
    for name in names:
        begin = time.perf_counter()
        print(f"BEGIN {name}", flush=True)
        try:
            said = STEPS[name]()
            from numba_attention.device import runtime

            if runtime.driver.of_thread() is not None:  # the first step makes no context
                runtime.driver._call(runtime.driver._api.cuCtxSynchronize)  # what went wrong and nobody asked for
            print(f"  ok   {name} ({time.perf_counter() - begin:.2f} s): {said}", flush=True)
        except Skip as problem:
            print(f"  skip {name}: {problem}", flush=True)
        except BaseException as problem:
            print(f"  FAIL {name}: {type(problem).__name__}: {problem}", flush=True)
            if not isinstance(problem, AssertionError):
                import traceback

                print("".join(traceback.format_exc().splitlines(True)[-12:])[-1500:], flush=True)
            return 1
    return 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--child", action="store_true")
    options = parser.parse_args()
    names = [name for name in STEPS if options.only in name]
    if options.child or options.only:
        begin = os.environ.get("NA_KIT_FROM", "")
        return run(names[names.index(begin) :] if begin in names else names)
    failed, begin = [], names[0]
    while begin:
        done, seen = [], ""
        child = subprocess.Popen(
            [sys.executable, "-u", __file__, "--child"], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"NA_KIT_FROM": begin},
        )  # fmt: skip
        for line in child.stdout:
            print(line, end="", flush=True)
            if line.startswith("BEGIN "):
                seen = line.split()[1]
            elif line.startswith(("  ok", "  skip", "  FAIL")):
                done.append(seen)
                if line.startswith("  FAIL"):
                    failed.append(seen)
        if child.wait() and seen and seen not in done:
            print(f"  FAIL {seen}: the process ended with {child.returncode}", flush=True)
            failed.append(seen)
        if not seen:
            failed.append(begin)
        at = names.index(seen or begin) + 1
        begin = names[at] if at < len(names) else ""
    said = f": FAILED {' '.join(failed)}" if failed else ""
    print(f"smoke: {len(names) - len(failed)} of {len(names)} steps without an error{said}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
