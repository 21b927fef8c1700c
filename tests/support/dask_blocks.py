"""Calls of random arrays and options over Dask arrays of random chunks, held against the formulas in float64."""

import dask
import dask.array as da
import numpy as np

import numba_attention as na
import numba_attention.dask as nad
from numba_attention.options import Options

LIMITS = {"float32": (2e-6, 1e-5), "float16": (6e-4, 2e-3), "bfloat16": (5e-3, 1.5e-2)}  # of results, of gradients


def chop(rng, n):
    """Random chunks of an axis: uneven, often of 1, sometimes empty."""
    if n == 0:
        return (0,)
    cuts = np.sort(rng.choice(np.arange(1, n), size=rng.integers(0, min(n, 6)), replace=False)) if n > 1 else []
    chunks = [int(x) for x in np.diff([0, *cuts, n])]
    if rng.random() < 0.1:
        chunks.insert(int(rng.integers(0, len(chunks) + 1)), 0)
    return tuple(chunks)


def lazy(rng, x):
    return da.from_array(x, chunks=tuple(chop(rng, n) for n in x.shape))


def tilt(score, batch, head, i, j, table, factor):
    return score + factor * table[head] * (i - 2 * j + batch)


def sieve(batch, head, i, j, table, factor):
    return (i + 3 * j + 2 * head + batch) % 4 != 0


def heads_and_features(rng):
    """Draw the numbers of heads of query and key, and of features of key and value."""
    Hkv = int(rng.integers(1, 4))
    return Hkv * int(rng.choice([1, 1, 2, 3])), Hkv, int(rng.choice([4, 8])), int(rng.choice([4, 8, 5]))


def options_of(rng, batch, H, lengths, per_sequence, per_pair):
    """Draw options, everything mixed.

    Parameters
    ----------
    rng : Generator
    batch : tuple of int
        Axes of the sequences.
    H : int
    lengths : tuple
        What numbers of query rows and of keys are below: one number, or one for each sequence.
    per_sequence : callable
        Draws numbers between two bounds, one for each sequence.
    per_pair : callable
        Draws a shape that broadcasts to that of the scores.
    """
    rows, keys = lengths
    options = {
        "is_causal": [True, "top-left", "bottom-right"][rng.integers(3)],
        "window": [None if rng.random() < 0.3 else int(rng.integers(0, 12)) for _ in range(2)],
        "query_offset": per_sequence(-20, 40),
        "softcap": 2.0,
        "scale": 0.7,
        "alibi_slopes": rng.random(H if rng.random() < 0.5 else (*batch, H)),
        "sinks": rng.standard_normal(H),
        "key_lengths": per_sequence(0, keys + 1),
        "query_lengths": per_sequence(0, rows + 1),
        "prefix_lengths": per_sequence(0, keys + 1),
        "mask": rng.random(per_pair()) < rng.choice([0.7, 0.05]),
        "bias": rng.standard_normal(per_pair()),
        "score_mod": tilt,
        "mask_mod": sieve,
        "dropout_p": 0.3,
        "seed": 7,
        "mod_args": (rng.standard_normal(H), 0.25),
    }
    assert set(options) == set(Options._fields)
    options["bias"][rng.random(options["bias"].shape) < 0.1] = -np.inf
    options = {name: x for name, x in options.items() if rng.random() < 0.3 or name in ("seed", "mod_args")}
    if not {"score_mod", "mask_mod"} & set(options):
        options.pop("mod_args")
    if options.get("window") is not None and options["window"][0] is not None:
        options.pop("prefix_lengths", None)
    return options


def errors(got, want):
    """Return the largest error, relative to the largest number of at least 1."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    errors = np.abs(np.subtract(got, want, out=np.zeros(got.shape), where=~same))
    return float(np.max(errors, initial=0) / np.max(np.abs(want[np.isfinite(want)]), initial=1))


def check(rng, name, arrays, offsets, options, backend="reference", limits=(1e-12, 1e-12)):
    """Hold a function and its backward pass over random blocks against the reference on the whole arrays.

    Parameters
    ----------
    rng : Generator
    name : "attention" or "attention_varlen"
    arrays : list of ndarray
        query, key and value.
    offsets : list of ndarray
        cu_seqlens_q and cu_seqlens_k, or nothing.
    options : dict
    backend : str
        Of the blocks.
    limits : tuple of float
        Errors of results, and of gradients.
    """
    whole, blocks = (
        [getattr(module, function) for function in (name, f"{name}_backward")] for module in (na, nad)
    )  # fmt: skip
    dtype, wide = arrays[0].dtype, [x.astype(np.float64) for x in arrays]
    want, want_lse = whole[0](*wide, *offsets, return_lse=True, backend="reference", **options)
    lazies = [lazy(rng, x) if rng.random() < 0.9 else x for x in arrays]
    over_blocks = options | {
        "backend": backend, "split_every": int(rng.integers(2, 5)), "stream": bool(rng.random() < 0.3)
    }  # fmt: skip
    for option in ("mask", "bias"):
        if isinstance(options.get(option), np.ndarray) and rng.random() < 0.5:
            over_blocks[option] = lazy(rng, options[option])
    out, lse = blocks[0](*lazies, *offsets, return_lse=True, **over_blocks)
    assert (out.dtype, out.shape, lse.shape) == (dtype, want.shape, want_lse.shape)
    got, got_lse = dask.compute(out, lse)
    assert (got.dtype, got_lse.dtype) == (out.dtype, lse.dtype)
    assert errors(got, want) < limits[0]
    assert errors(got_lse, want_lse) < limits[0]
    grad_out = rng.standard_normal(want.shape).astype(dtype)
    grad_lse = rng.standard_normal(want_lse.shape).astype(got_lse.dtype) if rng.random() < 0.5 else None
    if "score_mod" in options:
        over_blocks["mod_grads"] = "all"
    wanted = whole[1](
        grad_out.astype(np.float64), *wide, want, want_lse, *offsets, backend="reference", **options,
        grad_lse=None if grad_lse is None else grad_lse.astype(np.float64), mod_grads=over_blocks.get("mod_grads"),
    )  # fmt: skip
    lazy_grad_lse = None if grad_lse is None else lazy(rng, grad_lse)
    lazy_grads = blocks[1](lazy(rng, grad_out), *lazies, out, lse, *offsets, grad_lse=lazy_grad_lse, **over_blocks)
    inputs = dict(zip(("query", "key", "value"), arrays, strict=True)) | options
    grads = na.Gradients(*dask.compute(*lazy_grads))
    for field in na.Gradients._fields:
        got, want = getattr(grads, field), getattr(wanted, field)
        assert (got is None) == (want is None), field
        if got is None:
            continue
        if field == "mod_args":
            assert got[1] is want[1] is None
            inputs[field], got, want = options[field][0], got[0], want[0]
        assert (got.shape, got.dtype) == (inputs[field].shape, inputs[field].dtype), field
        # Gradients of mod_args are sums over all pairs, of terms that depend on the rounded output.
        assert errors(got, want) < limits[1] * (3 if field == "mod_args" else 1), field
