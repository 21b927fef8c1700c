"""Calls of every kind, on arrays large enough for two threads, and their right results by the textbook in float64."""

import functools

import numba
import numpy as np
import numpy.testing  # which NumPy imports when first asked for: a signal handler that asks in the middle never ends

import numba_attention as na

B, H, L, E = 2, 4, 300, 32
TOLERANCE = 2e-5  # of float32, on inputs of magnitude 1
SLOPES = np.array([0.25, 0.125, 0.0625, 0.5], np.float32)


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((B, H, L, E), dtype=np.float32) for _ in range(4)]


@functools.cache
def cache():
    _, key, value, _ = inputs()
    return na.KVCache.from_arrays(key, value)


@functools.cache
def layer():
    return na.MultiHeadAttention(E, 4, rng=0)


def forward():
    query, key, value, _ = inputs()
    return list(na.attention(query, key, value, is_causal=True, return_lse=True))


@functools.cache
def _forward_once():
    return forward()


def backward():
    query, key, value, grad = inputs()
    out, lse = _forward_once()
    return list(na.attention_backward(grad, query, key, value, out, lse, is_causal=True)[:3])


def decode():
    return [na.attention_decode(inputs()[0][:, :, -2:], cache())]


def varlen():
    query, key, value, _ = (x[0].swapaxes(0, 1) for x in inputs())
    starts = [0, 100, 100, L]
    return [na.attention_varlen(query, key, value, starts, starts, is_causal=True)]


def project():
    x, grad = inputs()[0][0], inputs()[3][0]
    out, ctx = layer().forward(x, is_causal=True)
    grads = layer().backward(grad, ctx)
    return [out, grads.query, *layer().grads.values()]


def sloped(score, batch, head, i, j, slopes):
    return score - slopes[head] * abs(i - j)


def near(batch, head, i, j, slopes):
    return j <= i and (i - j < 40 or j % 3 == 0)


def rules():
    """Rules of callers, forward and backward: passes, a block mask made of one, gradients of arguments."""
    query, key, value, grad = inputs()
    options = {"score_mod": sloped, "mask_mod": near, "mod_args": (SLOPES,)}
    out, lse = na.attention(query, key, value, **options, return_lse=True)
    grads = na.attention_backward(grad, query, key, value, out, lse, **options, mod_grads="all")
    return [out, lse, *grads[:3], *grads.mod_args]


CALLS = {
    "forward": forward, "backward": backward, "decode": decode, "varlen": varlen, "layer": project, "rules": rules,
}  # fmt: skip


def prepare():
    """Load every kernel, also those of one thread; the results are the bits that calls must have from now on."""
    numba.set_num_threads(1)
    for call in CALLS.values():
        call()
    numba.set_num_threads(2)
    results = {name: call() for name, call in CALLS.items()}
    check()
    return results


def same(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def check(names=("forward", "backward", "decode", "varlen", "rules")):
    """Hold results against the textbook: the process computes as it should."""
    for name in names:
        for got, want in zip(CALLS[name](), textbook()[name], strict=True):
            np.testing.assert_allclose(got, want, atol=TOLERANCE * max(1, np.abs(want).max()), err_msg=name)


@functools.cache
def textbook():
    """Plain formulas on plain arrays; nothing of the package takes part."""
    query, key, value, _ = (x.astype(np.float64) for x in inputs())
    hidden = ~np.tri(L, dtype=bool)
    p, lse = _softmax(query, key, hidden)
    out = p @ value
    _, gradients = _differentiate(p, out)
    distance = np.abs(np.subtract.outer(np.arange(L), np.arange(L)))
    far = hidden | (distance >= 40) & (np.arange(L) % 3 != 0)
    by_rules, lse_by_rules = _softmax(query, key, far, -SLOPES[:, None, None] * distance)
    ds, gradients_by_rules = _differentiate(by_rules, by_rules @ value)
    of_slopes = -(ds * distance).sum((0, 2, 3))
    starts = np.repeat([0, 100], [100, L - 100])
    packed = _softmax(query[0], key[0], hidden | (starts[:, None] != starts))[0] @ value[0]
    return {
        "forward": [out, lse],
        "backward": gradients,
        "decode": [out[:, :, -2:]],
        "varlen": [packed.swapaxes(0, 1)],
        "rules": [by_rules @ value, lse_by_rules, *gradients_by_rules, of_slopes],
    }


def _differentiate(p, out):
    """Gradients of the scores, and of query, key and value."""
    query, key, value, grad = (x.astype(np.float64) for x in inputs())
    ds = p * (grad @ value.swapaxes(-1, -2) - (grad * out).sum(-1, keepdims=True))
    of_scaled = ds / np.sqrt(E)
    return ds, [of_scaled @ key, of_scaled.swapaxes(-1, -2) @ query, p.swapaxes(-1, -2) @ grad]


def _softmax(query, key, hidden, bias=0.0):
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1]) + bias
    scores[..., hidden] = -np.inf
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    total = exponentials.sum(-1, keepdims=True)
    return exponentials / total, (np.log(total) + scores.max(-1, keepdims=True))[..., 0]
