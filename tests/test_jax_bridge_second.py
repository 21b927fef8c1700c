"""numba_attention.jax: derivatives in every order of modes, against Jacobian and Hessian of the formula in float64."""

from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from dropout_mask import kept
from grid import in_turn
from jax_doubles import doubles

B, H, L, S = 2, 2, 2, 3
SHAPES = {"query": (B, H, L, 2), "key": (B, 1, S, 2), "value": (B, 1, S, 1), "bias": (1, H, 1, S), "sinks": (H,)}
ABSENT = {"bias": 0, "sinks": -np.inf}  # what means the same


def draw_inputs(rng):
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


# The formula, with arrays for options, so that one compilation serves all of them.


def terms(options):
    o = dict(options)
    i, j = np.arange(L)[:, None] + o.pop("query_offset", 0), np.arange(S)
    seen = np.broadcast_to(o.pop("mask", True), (B, H, L, S))
    seen = seen & (j < np.reshape(o.pop("key_lengths", S), (-1, 1, 1, 1)))
    seen = seen & (j <= i) if o.pop("is_causal", False) else seen
    left, right = o.pop("window", (99, 99))
    p, seed = o.pop("dropout_p", 0), o.pop("seed", 0)
    found = {
        "seen": seen & (j >= i - left) & (j <= i + right),
        "shift": -np.reshape(o.pop("alibi_slopes", 0.0), (-1, 1, 1)) * np.abs(i - j) * np.ones((H, 1, 1)),
        "drop": np.stack([kept(p, seed, b, range(H), range(L), S) for b in range(B)]),
        "curve": np.arange(1.0, B + 1)[:, None, None, None] * (i - j) * (0.1 if o.pop("score_mod", None) else 0.0),
        "scale": o.pop("scale", 2**-0.5),
        "cap": o.pop("softcap", 1e9),  # which changes nothing
    }
    assert not o
    return found


def curved(score, batch, head, i, j):
    return score + 0.1 * (batch + 1) * (i - j) * score * score


def formula(jnp, x, t):
    """Attention; rows that see nothing have weights of 0, and 0 for a log-sum-exp."""
    s = t["cap"] * jnp.tanh(t["scale"] * x["query"] @ x["key"].swapaxes(-1, -2) / t["cap"])
    s = s + t["curve"] * s * s + t["shift"] + x["bias"]
    e = jnp.where(t["seen"], jnp.exp(s), 0)
    total = e.sum(-1) + jnp.exp(x["sinks"])[:, None]
    total = jnp.where(total == 0, 1, total)
    return t["drop"] * e / total[..., None] @ x["value"], jnp.log(total)


def loss_of(jnp, results):
    out, lse = results
    return jnp.sin(out).sum() + (lse**2).sum()


class Truth(NamedTuple):
    """Results of a function and their Jacobian, and the gradient and the Hessian of a loss, of flat arrays."""

    results: Any
    jacobian: Any
    gradient: Any
    hessian: Any


@pytest.fixture(scope="module")
def truth(jax):
    from jax.flatten_util import ravel_pytree

    def compute(x, terms):
        flat, unravel = ravel_pytree(x)
        results = lambda w: formula(jax.numpy, unravel(w), terms)  # noqa: E731
        of_results = lambda w: ravel_pytree(results(w))[0]  # noqa: E731
        gradient = jax.grad(lambda w: loss_of(jax.numpy, results(w)))
        return Truth(of_results(flat), jax.jacrev(of_results)(flat), gradient(flat), jax.jacfwd(gradient)(flat))

    return jax.jit(compute, compiler_options={"xla_backend_optimization_level": 0})


# Derivatives of f by x along u, and what they are in terms of the truth: numbers for each input, and matrices.


def orders(jax):
    def loss(f):
        return lambda x: loss_of(jax.numpy, f(x))

    def dot(a, b):
        return sum(jax.numpy.vdot(a[name], b[name]) for name in a)

    def product(f, x):  # with the Hessian
        return jax.linearize(jax.grad(loss(f)), x)[1]

    def twice(push, u):
        return push(u), push(jax.tree.map(jax.numpy.sin, u))

    def transpose(push, x):
        return lambda c: jax.linear_transpose(push, x)(c)[0]

    def grads(function, x, u):
        return jax.grad(function, (0, 1))(x, u)

    return {
        "jvp": lambda f, x, u: jax.jvp(f, (x,), (u,)),
        "linearize": lambda f, x, u: twice(jax.linearize(f, x)[1], u),
        "jacfwd": lambda f, x, u: (jax.jacfwd(f)(x),),
        "jacrev": lambda f, x, u: (jax.jacrev(f)(x),),
        "jvp of grad": lambda f, x, u: jax.jvp(jax.grad(loss(f)), (x,), (u,)),
        "grad of grad": lambda f, x, u: grads(lambda x, u: dot(jax.grad(loss(f))(x), u), x, u),
        "grad of jvp": lambda f, x, u: grads(lambda x, u: jax.jvp(loss(f), (x,), (u,))[1], x, u),
        "hessian": lambda f, x, u: (jax.hessian(loss(f))(x),),
        "jacrev of jacfwd": lambda f, x, u: (jax.jacrev(jax.jacfwd(loss(f)))(x),),
        "jacrev of jacrev": lambda f, x, u: (jax.jacrev(jax.jacrev(loss(f)))(x),),
        "products": lambda f, x, u: twice(product(f, x), u),
        "transposed products": lambda f, x, u: twice(transpose(product(f, x), x), u),
        "transposed twice": lambda f, x, u: twice(transpose(transpose(product(f, x), x), x), u),
        "jacfwd of the product": lambda f, x, u: (jax.jacfwd(product(f, x))(u),),
        "jacrev of the product": lambda f, x, u: (jax.jacrev(product(f, x))(u),),
        "jacfwd of the transposed": lambda f, x, u: (jax.jacfwd(transpose(product(f, x), x))(u),),
        "jacrev of the transposed": lambda f, x, u: (jax.jacrev(transpose(product(f, x), x))(u),),
    }


def _vectors(t, u):
    return t.hessian @ u, t.hessian @ np.sin(u)


def _matrix(t, u):
    return (t.hessian,)


WANT = {
    "jvp": lambda t, u: (t.results, t.jacobian @ u),
    "linearize": lambda t, u: (t.jacobian @ u, t.jacobian @ np.sin(u)),
    "jacfwd": lambda t, u: (t.jacobian,),
    "jacrev": lambda t, u: (t.jacobian,),
    "jvp of grad": lambda t, u: (t.gradient, t.hessian @ u),
    "grad of grad": lambda t, u: (t.hessian @ u, t.gradient),
    "grad of jvp": lambda t, u: (t.hessian @ u, t.gradient),
    "products": _vectors,
    "transposed products": _vectors,
    "transposed twice": _vectors,
    "hessian": _matrix,
    "jacrev of jacfwd": _matrix,
    "jacrev of jacrev": _matrix,
    "jacfwd of the product": _matrix,
    "jacrev of the product": _matrix,
    "jacfwd of the transposed": _matrix,
    "jacrev of the transposed": _matrix,
}


def flat(jax, tree, is_matrix):
    """The leaves one after the other, or a row for each number of what is differentiated."""
    if not is_matrix:
        return np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])

    def of_row(node):
        return isinstance(node, dict) and not isinstance(next(iter(node.values())), dict)

    sizes = {name: np.prod(shape) for name, shape in SHAPES.items()}
    rows = jax.tree.leaves(tree, is_leaf=of_row)
    return np.concatenate([np.hstack([row[name].reshape(-1, sizes[name]) for name in sorted(row)]) for row in rows])


def stacked(elements, axes):
    first = elements[0]
    return {n: np.stack([x[n] for x in elements], axes[n]) if n in axes else a for n, a in first.items()}


def check(jax, naj, truth, order, xs, us, options, moving, axes=({}, {}), jit=False):
    """Compare derivatives by the inputs that move with the truth, for each element of a batch along axes of x and u."""
    us = [{name: u[name] for name in moving} for u in us]
    axes = axes[0], {name: axis for name, axis in axes[1].items() if name in moving}

    def ours(x, u):
        def f(part):
            out, lse = naj.attention(**x | part, **options, return_lse=True)
            return out, jax.numpy.where(jax.numpy.isneginf(lse), 0, lse)

        return orders(jax)[order](f, {name: x[name] for name in moving}, u)

    is_mapped = any(axes)
    if is_mapped:
        ours = jax.vmap(ours, tuple({n: own.get(n) for n in d[0]} for own, d in zip(axes, (xs, us), strict=True)))
    got = (jax.jit(ours) if jit else ours)(stacked(xs, axes[0]), stacked(us, axes[1]))
    for n in range(len(xs) if is_mapped else 1):
        x, u = ({a: d[n if a in own else 0][a] for a in d[0]} for d, own in zip((xs, us), axes, strict=True))
        x |= {name: np.full(SHAPES[name], ABSENT[name], float) for name in SHAPES if name not in x}
        t = truth(x, terms(options))
        moves = np.concatenate([np.full(x[name].size, name in moving) for name in sorted(x)])
        t = Truth(t.results, t.jacobian[:, moves], t.gradient[moves], t.hessian[moves][:, moves])
        want = WANT[order](t, np.concatenate([u[name].ravel() for name in sorted(u)]))
        for tree, b in zip(got, want, strict=True):
            element = jax.tree.map(lambda a, n=n: a[n], tree) if is_mapped else tree
            a = flat(jax, element, b.ndim == 2)
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12 * (1 + np.abs(b).max()))


EAGER = [(order, False) for order in WANT]
COMPILED = [(order, True) for order in ("jvp", "grad of jvp", "hessian")]


@pytest.mark.parametrize(("order", "jit"), EAGER + COMPILED)
def test_every_order_of_modes(jax, naj, truth, order, jit):
    rng = np.random.default_rng(0)
    options = {"softcap": 2.0, "is_causal": True, "query_offset": -1}
    with doubles(jax):
        assert orders(jax).keys() == WANT.keys()
        moving = [name for name in SHAPES if name != "sinks" or WANT[order] is not _matrix]  # which would split calls
        check(jax, naj, truth, order, [draw_inputs(rng)], [draw_inputs(rng)], options, moving, jit=jit)


OPTIONS = {
    "scale": lambda rng: -0.7,
    "softcap": lambda rng: 1.5,
    "is_causal": lambda rng: True,
    "window": lambda rng: (1, 0),
    "query_offset": lambda rng: 1,
    "alibi_slopes": lambda rng: rng.random(H),
    "mask": lambda rng: rng.random((B, 1, L, S)) < 0.7,
    "key_lengths": lambda rng: rng.integers(0, S, B, endpoint=True),
    "score_mod": lambda rng: curved,
}


@st.composite
def calls(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    names = (*tuple(SHAPES)[:3], *(name for name in ABSENT if draw(st.booleans())))
    xs, us = ([{name: a for name, a in draw_inputs(rng).items() if name in names} for _ in range(2)] for _ in "xu")
    options = {name: OPTIONS[name](rng) for name in sorted(draw(st.sets(st.sampled_from(sorted(OPTIONS)), max_size=3)))}
    if "query_offset" not in options and draw(st.integers(0, 3)) == 0:
        options |= {"dropout_p": 0.3, "seed": 2**40 + 7}
    moving = sorted(draw(st.sets(st.sampled_from(names), min_size=1)))
    axes = {}, {}
    if draw(st.booleans()):
        for own in axes:
            for name in names:
                if draw(st.booleans()):
                    own[name] = draw(st.integers(0, len(SHAPES[name])))
    return {"xs": xs, "us": us, "options": options, "moving": moving, "axes": axes}


@settings(max_examples=12)
@given(call=calls(), order=st.sampled_from(list(WANT)))
def test_random_options_and_axes_of_vmap(jax, naj, truth, call, order):
    with doubles(jax):
        check(jax, naj, truth, order, **call)


@pytest.mark.parametrize(
    ("order", "mapped"),
    in_turn(
        ["jvp", "jvp of grad", "grad of grad", "grad of jvp"],
        [{"query": 1, "value": 0}, {"key": 4, "sinks": 1}, {"bias": 0}],
    ),
    ids=str,
)
def test_derivatives_of_a_mapped_function(jax, naj, order, mapped):
    """What all elements share gets the sum over them, as in a loop."""
    rng, axes = np.random.default_rng(0), {name: mapped.get(name) for name in SHAPES}
    x, u = (stacked([draw_inputs(rng) for _ in range(3)], mapped) for _ in "xu")

    def one(x):
        return naj.attention(**x, return_lse=True)

    def loop(x):
        each = [{n: a if axes[n] is None else a.take(k, axes[n]) for n, a in x.items()} for k in range(3)]
        return jax.tree.map(lambda *a: jax.numpy.stack(a), *map(one, each))

    with doubles(jax):
        got, want = (orders(jax)[order](f, x, u) for f in (jax.vmap(one, (axes,)), loop))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12 * (1 + np.abs(b).max()))


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("float16", 5e-3), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("order", ["jvp", "jvp of grad", "grad of jvp"])
def test_other_dtypes(jax, naj, truth, dtype, close, order):
    """Against the formula of the same numbers in float64."""
    rng, number = np.random.default_rng(0), jax.numpy.asarray
    x, u = ({n: number(a, "float32" if n in ABSENT else dtype) for n, a in draw_inputs(rng).items()} for _ in "xu")
    got = orders(jax)[order](lambda x: naj.attention(**x, is_causal=True, return_lse=True), x, u)
    with doubles(jax):
        wide = {name: np.asarray(a, np.float64) for name, a in x.items()}
        along = np.concatenate([np.ravel(np.asarray(u[name], np.float64)) for name in sorted(u)])
        want = WANT[order](truth(wide, terms({"is_causal": True})), along)
    for tree, b in zip(got, want, strict=True):
        assert all(a.dtype in (dtype, "float32") for a in jax.tree.leaves(tree))
        np.testing.assert_allclose(flat(jax, tree, False), b, atol=close * (1 + np.abs(b).max()))


def test_loops_checkpoints_and_branches(jax, naj):
    """Forward mode goes through `while_loop`, both modes through `scan`, `checkpoint` and `cond`."""
    lax, x, u = jax.lax, *np.random.default_rng(0).standard_normal((2, 2, 3, 2))

    def layer(x):
        return x + naj.attention(x, x, x, is_causal=True)

    def unrolled(x):
        return jax.numpy.sin(layer(layer(x))).sum()

    def scanned(x):
        return jax.numpy.sin(lax.scan(lambda x, _: (jax.checkpoint(layer)(x), None), x, None, 2)[0]).sum()

    def branched(x):
        twice = lax.cond(x.sum() > 99, lambda x: x, lambda x: layer(layer(x)), x)
        return jax.numpy.sin(twice).sum()

    def looped(x):
        return jax.numpy.sin(lax.fori_loop(0, jax.numpy.asarray(2), lambda _, x: layer(x), x)).sum()

    def product(loss):
        return jax.jit(lambda x, u: jax.jvp(jax.grad(loss), (x,), (u,)))(x, u)

    with doubles(jax):
        want = product(unrolled)
        for loss in (scanned, branched):
            for a, b in zip(product(loss), want, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
        for function in (looped, scanned):
            np.testing.assert_allclose(jax.jit(jax.jacfwd(function))(x), want[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["sinks", "key_lengths", "dropout", "score_mod", "mask_mod"])
def test_what_belongs_to_a_call_under_vmap(jax, naj, name):
    """Numbers of sequences begin at 0 in each element; constant sinks do not split a call."""
    rng = np.random.default_rng(0)
    x, sinks = rng.standard_normal((3, 2, 2, 4, 2)), rng.standard_normal(2)
    options = {
        "sinks": {"sinks": sinks},
        "key_lengths": {"key_lengths": np.array([3, 1])},
        "dropout": {"dropout_p": 0.5, "seed": 3},
        "score_mod": {"score_mod": curved},
        "mask_mod": {"mask_mod": lambda b, h, i, j: j <= i + b},
    }[name]

    def derivatives(x):
        return jax.jvp(jax.value_and_grad(lambda x: jax.numpy.sin(naj.attention(x, x, x, **options)).sum()), (x,), (x,))

    with doubles(jax):
        got = jax.vmap(derivatives)(x)
        for n in range(3):
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(derivatives(x[n])), strict=True):
                np.testing.assert_allclose(a[n], b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("moving", "count"), [("query", 1), ("sinks", 2)])
def test_directions_are_axes_of_one_call(jax, naj, monkeypatch, moving, count):
    """A Jacobian is one call, unless each direction has sinks of its own."""
    from numba_attention import second

    seen, jvp = [], second.attention_jvp
    monkeypatch.setattr(second, "attention_jvp", lambda *a, **k: seen.append(1) or jvp(*a, **k))
    x = draw_inputs(np.random.default_rng(0))
    jax.jacfwd(lambda part: naj.attention(**x | {moving: part}))(x[moving])
    assert len(seen) == count


def test_what_has_no_derivative_is_refused(jax, naj):
    x, table = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32), np.ones(3, np.float32)

    def loss(x):
        return (naj.attention(x, x, x) ** 2).sum()

    def along(f):
        return lambda x: jax.jvp(f, (x,), (x,))[1]

    def refused(error, match, function, *arguments):
        for wrapped in (function, jax.jit(function)):
            with pytest.raises(error, match=match):
                wrapped(*arguments)

    third, forward = "can be differentiated twice, not three times", "no forward mode over forward mode"
    for match, function in (
        (third, jax.grad(lambda x: jax.grad(lambda x: jax.grad(loss)(x).sum())(x).sum())),
        (third, jax.grad(lambda x: along(jax.grad(loss))(x).sum())),
        (f"{third}|{forward}", along(jax.grad(along(loss)))),
        (forward, along(along(loss))),
        (forward, jax.jacfwd(jax.jacfwd(loss))),
    ):
        refused(NotImplementedError, match, function, x)

    def of_table(x, t):
        return naj.attention(x, x, x, score_mod=lambda s, b, h, i, j, t: s + t[j], mod_args=(t,)).sum()

    once = r"mod_args\[0\] has first derivatives in reverse mode only"
    refused(NotImplementedError, once, lambda t: jax.jvp(lambda t: of_table(x, t), (t,), (t,)), table)
    refused(NotImplementedError, once, jax.grad(lambda t: jax.jvp(lambda x: of_table(x, t), (x,), (x,))[1]), table)
    refused(NotImplementedError, once, lambda x: jax.jvp(jax.grad(of_table, 1), (x, table), (x, table)), x)
    refused(NotImplementedError, once, jax.grad(lambda x: jax.grad(of_table, 1)(x, table).sum()), x)
    assert jax.grad(lambda x: jax.grad(of_table)(x, table).sum())(x).shape == x.shape
    slopes = along(lambda s: naj.attention(x, x, x, alibi_slopes=s))
    refused(NotImplementedError, "alibi_slopes have no gradient", slopes, table[:2])


def test_empty_rows_and_no_keys_have_tangents_of_0(jax, naj):
    x, nothing = np.ones((2, 3, 4), np.float32), np.zeros((2, 0, 4), np.float32)
    for key, options in ((nothing, {}), (x, {"key_lengths": 0})):
        arrays = (x, key, key)
        (out, lse), moved = jax.jvp(lambda *a, o=options: naj.attention(*a, **o, return_lse=True), arrays, arrays)
        assert np.isneginf(lse).all()
        assert not np.any([np.any(a) for a in (out, *moved)])
