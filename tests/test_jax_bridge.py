"""numba_attention.jax: gradients by finite differences and against JAX's attention, transformations, no deadlock."""

import inspect
import os
import subprocess
import sys

import numpy as np
import pytest

import numba_attention as na
from jax_doubles import doubles
from numba_attention import api


@pytest.fixture
def x64(jax):
    """Doubles in this test, and in no other."""
    with doubles(jax):
        yield


def normal(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


# Sizes (query, key, value) and options by name; the options that are differentiable are drawn for their shapes.
SMALL = ((1, 2, 3, 2), (1, 2, 4, 2), (1, 2, 4, 3))
GROUPED = ((4, 3, 2), (2, 4, 2), (2, 4, 2))
GRADIENTS = {
    "plain": (SMALL, {}, {}),
    "matrices": (((3, 2), (4, 2), (4, 3)), {}, {}),
    "grouped": (GROUPED, {}, {}),
    "one for all": (((2, 2, 3, 2), (1, 1, 4, 2), (1, 4, 2)), {}, {}),
    "causal grouped": (GROUPED, {"is_causal": "bottom-right"}, {}),
    "window": (SMALL, {"window": (1, 0), "query_offset": 1}, {}),
    "scale": (SMALL, {"scale": -0.7}, {}),
    "softcap": (SMALL, {"softcap": 0.9}, {}),
    "alibi": (SMALL, {"alibi_slopes": [0.5, 0.25]}, {}),
    "mask": (SMALL, {"mask": [[True, False, True, True], [False, False, True, True], [True, True, True, False]]}, {}),
    "lengths": (((2, 1, 3, 2), (2, 1, 4, 2), (2, 1, 4, 2)), {"key_lengths": [4, 2]}, {}),
    "bias": (SMALL, {}, {"bias": (1, 2, 3, 4)}),
    "bias of keys": (((2, 2, 3, 2), (2, 1, 4, 2), (2, 1, 4, 2)), {}, {"bias": (2, 1, 1, 4)}),
    "bias of one": (SMALL, {"softcap": 2}, {"bias": ()}),
    "sinks": (SMALL, {}, {"sinks": (2,)}),
    "dropout": (SMALL, {"dropout_p": 0.4, "seed": 2**63 + 5}, {}),
    "all": (GROUPED, {"is_causal": "bottom-right", "softcap": 2}, {"bias": (3, 4), "sinks": (4,)}),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_by_finite_differences(jax, naj, x64, name):
    from jax.test_util import check_grads

    shapes, options, more = GRADIENTS[name]
    inputs = [normal(*shape, seed=n) for n, shape in enumerate((*shapes, *more.values()))]

    def function(query, key, value, *rest):
        made = naj.attention(query, key, value, **options, **dict(zip(more, rest, strict=True)), return_lse=True)
        want = na.attention(*map(np.asarray, inputs[:3]), **options, **dict(zip(more, inputs[3:], strict=True)))
        if not isinstance(made[0], jax.core.Tracer) and query is inputs[0]:
            np.testing.assert_array_equal(made[0], want)
        return made

    function(*inputs)
    check_grads(jax.jit(function), inputs, order=1, modes=["fwd", "rev"])


def test_seeds_of_dropout_may_be_traced(jax, naj):
    """One compilation for all seeds; numbers of 32 and 64 bits, arrays, and what a key of JAX holds."""
    x, traces = normal(2, 20, 8, dtype=np.float32), []

    def loss(x, seed):
        traces.append(seed)
        return naj.attention(x, x, x, dropout_p=0.3, seed=seed).sum()

    step = jax.jit(jax.value_and_grad(loss))
    key = jax.random.key(7)
    for seed, number in (
        (3, 3),
        (4, 4),
        (jax.random.key_data(key), None),
        (np.array([5, 6], np.uint32), 5 + (6 << 32)),
    ):
        if number is None:
            low, high = (int(word) for word in jax.random.key_data(key))
            number = low | high << 32
        out, lse = na.attention(x, x, x, dropout_p=0.3, seed=number, return_lse=True)
        want = na.attention_backward(np.ones_like(out), x, x, x, out, lse, dropout_p=0.3, seed=number)
        got = step(x, jax.numpy.asarray(seed))
        np.testing.assert_allclose(got[0], out.sum(), rtol=1e-5)
        np.testing.assert_allclose(got[1], sum(want[:3]), rtol=1e-4, atol=1e-5)
    assert len(traces) == 2  # an integer, and two words
    out = naj.attention(x, x, x, dropout_p=0.3, seed=2**64 - 1)
    np.testing.assert_array_equal(out, na.attention(x, x, x, dropout_p=0.3, seed=2**64 - 1))


def test_vmap_over_seeds_and_with_one_seed(jax, naj):
    x, seeds = normal(3, 2, 20, 8, dtype=np.float32), jax.numpy.arange(3)

    def one(x, seed):
        return naj.attention(x, x, x, dropout_p=0.3, seed=seed)

    got = jax.vmap(one)(x, seeds)
    same = jax.vmap(one, (0, None))(x, 5)
    for n in range(3):
        np.testing.assert_array_equal(got[n], na.attention(x[n], x[n], x[n], dropout_p=0.3, seed=n))
        np.testing.assert_array_equal(same[n], na.attention(x[n], x[n], x[n], dropout_p=0.3, seed=5))


def test_wrong_seeds(jax, naj):
    x = normal(2, 5, 8, dtype=np.float32)
    with pytest.raises(TypeError, match="seed must be an integer, or two of 32 bits"):
        naj.attention(x, x, x, dropout_p=0.3, seed=jax.numpy.ones(3, int))
    with pytest.raises(ValueError, match="seed must be an integer of 64 bits"):
        naj.attention(x, x, x, dropout_p=0.3, seed=-1)
    with pytest.raises(ValueError, match="seed must be an integer where dropout_p is positive"):
        naj.attention(x, x, x, dropout_p=0.3)


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_jax(jax, naj, seed):
    rng = np.random.default_rng(seed)
    dtype, close = [("float32", 2e-5), ("bfloat16", 0.05), ("float16", 0.01)][seed % 3]
    B, Hkv, group, L, S, E = (int(rng.integers(1, n)) for n in (3, 4, 4, 40, 50, 40))
    query, key, value, bias = (
        jax.numpy.asarray(normal(*shape, seed=seed), dtype)
        for shape in ((B, L, Hkv * group, E), (B, S, Hkv, E), (B, S, Hkv, E), (1, Hkv * group, L, S))
    )
    bias = bias.astype("float32")
    options = [{}, {"is_causal": True}, {"mask": rng.random((B, 1, L, S)) < 0.7}, {"bias": bias}][seed % 4]
    if "mask" in options:
        options["mask"][..., 0] = True

    def ours(query, key, value):
        return naj.attention(*(x.swapaxes(1, 2) for x in (query, key, value)), **options).swapaxes(1, 2)

    def theirs(query, key, value):
        wide = (x.astype("float32") for x in (query, key, value))  # XLA on the CPU has no products of float16
        return jax.nn.dot_product_attention(*wide, **options).astype(dtype)

    grad_out = jax.numpy.asarray(normal(*query.shape, seed=seed + 1), dtype)

    def with_gradients(function):
        out, pull = jax.vjp(function, query, key, value)
        return out, *pull(grad_out)

    with_gradients = jax.jit(with_gradients, static_argnums=0)
    for got, want in zip(with_gradients(ours), with_gradients(theirs), strict=True):
        assert got.dtype == want.dtype == dtype
        got, want = (np.asarray(x, np.float64) for x in (got, want))
        np.testing.assert_allclose(got, want, rtol=close, atol=close * (1 + np.abs(want).max()))


def arguments(jax):
    """Arguments of `call` below, and for each the same stacked with two variants."""
    one = [
        normal(2, 4, 3, 2), normal(2, 4, 2), normal(2, 2, 4, 3), normal(4, 3, 4), normal(4),
        np.array([4, 2], np.int32), np.arange(12).reshape(3, 4) % 5 > 0,
    ]  # fmt: skip
    variants = [lambda x: x, lambda x: ~x if x.dtype == bool else x // 2, lambda x: x[..., ::-1]]
    many = [np.stack([vary(x) for vary in variants]) for x in one]
    return one, many


@pytest.mark.parametrize("with_sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("mapped", range(7))
def test_vmap(jax, naj, x64, mapped, with_sinks):
    """One argument mapped, or all but one; values and gradients as in a loop."""

    def call(query, key, value, bias, sinks, lengths, mask):
        options = {"sinks": sinks} if with_sinks else {}
        out, lse = naj.attention(
            query, key, value, bias=bias, key_lengths=lengths, mask=mask, return_lse=True, **options
        )
        return jax.numpy.sin(out).sum() + jax.numpy.where(lse > -99, lse, 0).sum(), (out, lse)

    call = jax.value_and_grad(call, argnums=range(5), has_aux=True)
    one, many = arguments(jax)
    for axes in ([0 if n == mapped else None for n in range(7)], [None if n == mapped else 0 for n in range(7)]):
        given = [x if axis is None else xs for x, xs, axis in zip(one, many, axes, strict=True)]
        got = jax.tree.leaves(jax.jit(jax.vmap(call, axes))(*given))
        each = [call(*(x if axis is None else x[n] for x, axis in zip(given, axes, strict=True))) for n in range(3)]
        want = [np.stack(x) for x in zip(*map(jax.tree.leaves, each), strict=True)]
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_vmap_of_vmap_and_of_gradients(jax, naj, x64):
    """The gradient of what all share is summed over what was mapped."""
    query, key, value, sinks = normal(3, 5, 2, 4, 6), normal(3, 2, 7, 6), normal(5, 2, 7, 6), normal(2)

    def outer(query, key, value, sinks):
        def call(query, key, value):
            return naj.attention(query, key, value, sinks=sinks, is_causal=True)

        return jax.vmap(jax.vmap(call, (0, None, 0)), (0, 0, None))(query, key, value)

    def at_once(query, key, value, sinks):
        return naj.attention(query, key[:, None], value, sinks=sinks, is_causal=True)

    def gradients(function):
        return jax.grad(lambda *x: jax.numpy.sin(function(*x)).sum(), argnums=range(4))(query, key, value, sinks)

    np.testing.assert_allclose(outer(query, key, value, sinks), at_once(query, key, value, sinks), rtol=1e-12)
    for got, want in zip(gradients(outer), gradients(at_once), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_transformations(jax, naj):
    """Checkpoints, scans, and options that are traced."""
    x = normal(2, 6, 4, dtype=np.float32)

    def layer(x, length):
        return x + naj.attention(x, x, x, key_lengths=length, query_offset=length - 6, is_causal=True)

    def loss(x, lengths, wrap):
        return jax.lax.scan(lambda x, length: (wrap(layer)(x, length), None), x, lengths)[0].sum()

    lengths = jax.numpy.array([6, 4, 5])
    value, grad = jax.jit(jax.value_and_grad(loss), static_argnums=2)(x, lengths, lambda f: f)
    value_again, grad_again = jax.jit(jax.value_and_grad(loss), static_argnums=2)(x, lengths, jax.checkpoint)
    want = x
    for n in (6, 4, 5):
        want = want + na.attention(want, want, want, key_lengths=n, query_offset=n - 6, is_causal=True)
    np.testing.assert_allclose(value, want.sum(), rtol=1e-5)
    assert value == value_again
    np.testing.assert_array_equal(grad, grad_again)


def test_integers_and_booleans_have_no_gradient(jax, naj):
    x = normal(2, 3, 4, dtype=np.float32)

    def loss(arrays):
        return naj.attention(x, x, **arrays).sum()

    arrays = {"value": x, "mask": np.tri(3, dtype=bool), "key_lengths": 2}
    grads = jax.grad(loss, allow_int=True)(arrays)
    assert grads["value"].shape == x.shape
    assert grads["mask"].dtype == grads["key_lengths"].dtype == jax.dtypes.float0


def test_equal_calls_compile_once(jax, naj, caplog):
    x = normal(2, 3, 4, dtype=np.float32)

    def compiled(scale):
        caplog.clear()
        with jax.log_compiles():
            naj.attention(x, x, x, scale=scale)
        return any("XLA compilation" in message for message in caplog.messages)

    assert compiled(0.3)
    assert not compiled(0.3)
    assert compiled(0.4)


def test_alibi_slopes_are_constants(jax, naj):
    x, slopes = normal(2, 3, 4, dtype=np.float32), np.ones(2, np.float32)

    def loss(x, slopes):
        return naj.attention(x, x, x, alibi_slopes=slopes).sum()

    assert jax.jit(jax.grad(loss))(x, slopes).shape == x.shape
    with pytest.raises(NotImplementedError, match="stop_gradient"):
        jax.grad(loss, argnums=1)(x, slopes)
    stopped = jax.jit(jax.grad(lambda s: loss(x * s[0], jax.lax.stop_gradient(s))))(slopes)
    assert stopped[0] != 0
    assert stopped[1] == 0


def test_backend_is_chosen_when_traced(jax, naj, monkeypatch):
    """The callback may run in a thread that knows nothing of `use_backend`."""
    seen = []
    forward = api.attention
    monkeypatch.setattr(api, "attention", lambda *a, **k: (seen.append(k["backend"]), forward(*a, **k))[1])
    x = normal(2, 3, 4, dtype=np.float32)
    for name in ("reference", "cpu"):
        with na.use_backend(name):
            # A function of its own, as JAX traces the same one only once.
            compiled = jax.jit(lambda *x: naj.attention(*x)).lower(x, x, x).compile()
        compiled(x, x, x).block_until_ready()
    assert seen == ["reference", "cpu"]
    with pytest.raises(na.BackendUnavailableError):
        naj.attention(x, x, x, backend="cuda")


def test_bad_input(jax, naj):
    x = normal(2, 3, 4, dtype=np.float32)

    def refused(error, match, query=x, key=x, value=x, **options):
        for function in (naj.attention, jax.jit(lambda q, k, v: naj.attention(q, k, v, **options))):
            given = options if function is naj.attention else {}
            with pytest.raises(error, match=match):
                function(query, key, value, **given)

    refused(TypeError, r"must share one dtype", query=x.astype(np.float16))
    refused(TypeError, r"query must have dtype .* got int32", query=x.astype(np.int32))
    refused(ValueError, r"key must have the head dimension", key=x[..., :2])
    refused(TypeError, r"mask must be boolean .* pass additive values as bias=", mask=x[0, :, :3])
    refused(ValueError, r"bias of shape \(3, 4\) does not broadcast", bias=x[0])
    refused(ValueError, r"sinks must have shape \(2,\)", sinks=x[0, 0])
    refused(TypeError, r"key_lengths must not mix truth values with numbers", key_lengths=[1, True])
    refused(TypeError, r"key_lengths must be an array", key_lengths=iter([1, 2]))
    refused(ValueError, r"key_lengths must lie between 0 and 3, got 4", key_lengths=4)
    refused(ValueError, r"window must not be negative", window=(-1, 0))
    refused(ValueError, r"unknown backend", backend="fpga")
    late = jax.jit(lambda n: naj.attention(x, x, x, key_lengths=n))
    with pytest.raises(Exception, match=r"ValueError: key_lengths must lie between 0 and 3, got 4") as raised:
        late(4).block_until_ready()
    assert isinstance(raised.value, RuntimeError)
    assert np.isfinite(late(3)).all()


def test_empty(jax, naj):
    x, nothing = normal(2, 3, 4, dtype=np.float32), np.zeros((2, 0, 4), np.float32)
    out, lse = naj.attention(x, nothing, nothing, return_lse=True)
    assert not out.any()
    assert np.isneginf(lse).all()
    grads = jax.grad(lambda *a: naj.attention(*a).sum(), argnums=(0, 1))(x, nothing, nothing)
    assert not grads[0].any()
    assert grads[1].shape == nothing.shape


def test_no_deadlock_on_one_core(jax):
    """Callbacks that need what others are still computing: with jax.pure_callback, this ends in a deadlock."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("cannot choose cores here")
    code = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import jax, numpy as np, numba_attention.jax as naj
x = jax.random.normal(jax.random.key(0), (512, 512))
y = x / 512
step = jax.jit(jax.value_and_grad(lambda x: naj.attention(naj.attention(x, y, x) @ y, y, y).sum()))
for _ in range(8):
    total, grad = step(x)
    x = x + 1e-3 * naj.attention(naj.attention(x, y, y), total + x, x)
print(np.isfinite(float(x.sum() + grad.sum())))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "True", done.stderr[-2000:]


def test_signature_is_that_of_attention(naj):
    ours, theirs = (inspect.signature(f).parameters for f in (naj.attention, na.attention))
    assert [name for name in theirs if name in ours] == list(ours)
    assert all(theirs[name].default == parameter.default for name, parameter in ours.items())
    assert all(theirs[name].kind == parameter.kind for name, parameter in ours.items())


def test_missing_jax_is_named():
    code = "import sys; sys.modules['jax'] = None; import numba_attention.jax"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: numba_attention.jax needs JAX 0.6.2 or newer; install it with: pip install jax" in done.stderr
