"""Second derivatives: the reference against PyTorch's autograd, every backend against the reference, and identities."""

import itertools
import re

import ml_dtypes
import numpy as np
import pytest

import numba_attention as na
from cases import SOME, Case, assert_close, grad_tolerance, graded

NAMES = ("query", "key", "value", "bias", "sinks")


class Call:
    """A case with random directions and gradients, and what is computed from them."""

    def __init__(self, arrays, kwargs, backend="cpu", seed=2, parts=NAMES, wide=False):
        rng = np.random.default_rng(seed)
        inputs = {**dict(zip(NAMES, arrays, strict=False)), **{n: kwargs.get(n) for n in NAMES[3:]}}

        def like(x):
            return rng.standard_normal(np.shape(x)).astype(np.asarray(x).dtype)

        moved = {name: None if x is None else like(x) for name, x in inputs.items()}
        self.u = na.Gradients(*(moved[name] if name in parts else None for name in NAMES))
        self.arrays, self.kwargs = arrays, {**kwargs, "backend": backend}
        out, lse = na.attention(*arrays, **self.kwargs, return_lse=True)
        self.g, self.dg = like(out), like(out)
        self.gl, self.dgl = like(lse), like(lse)
        if wide:
            self.u = na.Gradients(*(None if x is None else x.astype(np.float64) for x in self.u))
            self.arrays = [x.astype(np.float64) for x in arrays]
            for name in ("g", "dg", "gl", "dgl"):
                setattr(self, name, getattr(self, name).astype(np.float64))
            for name in NAMES[3:]:
                if kwargs.get(name) is not None:
                    self.kwargs[name] = np.asarray(kwargs[name]).astype(np.float64)
            out, lse = na.attention(*self.arrays, **self.kwargs, return_lse=True)
        self.out, self.lse = out, lse

    def jvp(self, **more):
        return na.attention_jvp(self.u, *self.arrays, **self.kwargs, **more)

    def double_backward(self, **more):
        return na.attention_double_backward(
            self.u, self.g, *self.arrays, self.out, self.lse, grad_lse=self.gl, **self.kwargs, **more
        )

    def backward_jvp(self):
        moved = self.jvp(out=self.out, lse=self.lse)
        return na.attention_backward_jvp(
            self.u, self.g, *self.arrays, *moved, grad_lse=self.gl, grad_out_tangent=self.dg,
            grad_lse_tangent=self.dgl, **self.kwargs,
        )  # fmt: skip

    def everything(self):
        first, second = self.backward_jvp()
        both = {
            "jvp": self.jvp()[2:], "closed": self.double_backward(), "open": self.double_backward(through_saved=True),
            "gradients": first[:5], "tangents": second[:5],
        }  # fmt: skip
        return {f"{name} {n}": x for name, xs in both.items() for n, x in enumerate(xs)}


def compare(got, want, relative):
    """Arrays by name; what cancels does so by parts of the size of the others."""
    offsets = {}
    for name, x in want.items():
        if x is not None and x.size:
            kind = name.split()[0]
            offsets[kind] = max(offsets.get(kind, 0), np.abs(np.nan_to_num(x.astype(np.float64))).max())
    for name, x in want.items():
        assert (got[name] is None) == (x is None), name
        if x is not None:
            try:
                assert_close(got[name], x, relative, offsets.get(name.split()[0], 0))
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


def check_case(case, dtype):
    arrays, kwargs = case.arrays(dtype), case.kwargs()
    got, want = (Call(arrays, kwargs, b, wide=b == "reference").everything() for b in ("cpu", "reference"))
    of_dtype = {"float32": 2e-5, "float64": 1e-13, "float16": 6e-3, "bfloat16": 5e-2}[dtype]
    growth = grad_tolerance(dtype, case) / grad_tolerance(dtype)
    rounded = max((5e-3 if "16" in name else 1e-6 for name in case.options if "bias" in name), default=0)
    compare(got, want, max(of_dtype * growth, rounded))


@pytest.mark.parametrize("case", SOME[::8], ids=str)
def test_float32(case):
    check_case(case, "float32")


@pytest.mark.parametrize(("case", "dtype"), graded(SOME, ["float64", "float16", "bfloat16"], 24))
def test_other_dtypes(case, dtype):
    check_case(case, dtype)


# The reference itself, and the kernels, against PyTorch.


def formula(torch, q, k, v, bias, sinks, o):
    """The formula, so that no branch that is not taken has NaN in its derivatives."""
    H, L = q.shape[-3:-1]
    k, v = (x.repeat_interleave(H // x.shape[-3], -3) for x in (k, v))
    s = o.get("scale", q.shape[-1] ** -0.5) * (q @ k.mT)
    if "softcap" in o:
        s = o["softcap"] * torch.tanh(s / o["softcap"])
    p = torch.arange(L)[:, None] + o.get("query_offset", 0)
    distance = (p - torch.arange(k.shape[-2])).double()
    if "score_mod" in o:
        s = s + (0.3 + 0.1 * torch.arange(H).double()[:, None, None] + 0.05 * (distance % 3)) * torch.sin(s)
    if "alibi_slopes" in o:
        s = s - torch.tensor(np.asarray(o["alibi_slopes"]))[:, None, None] * distance.abs()
    seen = torch.ones(s.shape, dtype=torch.bool)
    if bias is not None:
        seen = seen & (bias != -torch.inf)
        s = s + torch.where(bias == -torch.inf, 0, bias)
    if o.get("is_causal"):
        seen = seen & (distance >= 0)
    if "window" in o:
        seen = seen & (distance <= o["window"][0]) & (-distance <= o["window"][1])
    if "mask" in o:
        seen = seen & torch.tensor(np.asarray(o["mask"]))
    s = torch.where(seen, s, 0)
    top = s.detach().amax(-1, keepdim=True)
    e = torch.where(seen, torch.exp(s - top), 0)
    total = e.sum(-1)
    if sinks is not None:
        total = total + torch.exp(sinks[:, None] - top[..., 0])
    some = torch.where(total == 0, 1, total)
    return e @ v / some[..., None], torch.where(total == 0, 0, some.log() + top[..., 0])


def mod(score, batch, head, i, j):
    return score + (0.3 + 0.1 * head + 0.05 * ((i - j) % 3)) * np.sin(score)


GRID = {
    "plain": {},
    "scale": {"scale": -0.4},
    "causal": {"is_causal": True},
    "window, offset, alibi": {"window": (4, 1), "query_offset": 3, "alibi_slopes": [0.1, 0.2, 0.3, 0.4]},
    "softcap": {"softcap": 0.8},
    "sinks": {"sinks": True, "is_causal": True},
    "bias": {"bias": (4, 9, 12)},
    "bias of keys": {"bias": (12,), "softcap": 2.0},
    "bias of rows": {"bias": (2, 1, 9, 1)},
    "mask": {"mask": True, "bias": (9, 12), "softcap": 1.0, "sinks": True},
    "score_mod": {"score_mod": mod},
    "score_mod, softcap": {"score_mod": mod, "softcap": 1.1, "sinks": True, "mask": True},
}
ABSENT = [(), ("query",), ("key",), ("value",), ("bias", "sinks"), ("query", "key"), ("query", "key", "bias", "sinks")]


@pytest.mark.parametrize(("options", "absent"), list(zip(GRID.values(), itertools.cycle(ABSENT))), ids=GRID)
@pytest.mark.parametrize("Hkv", [4, 2])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_against_autograd(torch, options, absent, Hkv, backend):
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal(shape) for shape in [(2, 4, 9, 8), (2, Hkv, 12, 8), (2, Hkv, 12, 5)]]
    o = dict(options)
    if "bias" in o:
        o["bias"] = rng.standard_normal(o["bias"])
        o["bias"][..., :1] = -np.inf
    if "sinks" in o:
        o["sinks"] = rng.standard_normal(4)
        o["sinks"][1] = -np.inf
    if "mask" in o:
        o["mask"] = rng.random((9, 12)) < 0.7
        o["mask"][4] = False
    call = Call(arrays, o, backend, parts=[name for name in NAMES if name not in absent])

    inputs = {**dict(zip(NAMES, arrays, strict=False)), **{n: o[n] for n in NAMES[3:] if n in o}}
    leaves = [torch.tensor(x, requires_grad=True) for x in inputs.values()]
    moved = [torch.zeros_like(x) if (m := getattr(call.u, n)) is None else torch.tensor(m) for n, x in
             zip(inputs, leaves, strict=True)]  # fmt: skip
    g, gl = torch.tensor(call.g, requires_grad=True), torch.tensor(call.gl, requires_grad=True)

    def f(*xs):
        of = dict(zip(inputs, xs, strict=True))
        return formula(torch, *(of.get(n) for n in NAMES), o)

    def gradient(g, gl, *xs):
        out, lse = f(*xs)
        found = torch.autograd.grad((out, lse), xs, (g, gl), create_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if a is None else a for a, x in zip(found, xs, strict=True)]

    def arrays_of(tensors, like):
        return [np.zeros(x.shape) if t is None else t.detach().numpy() for t, x in zip(tensors, like, strict=True)]

    want_out, want_lse = torch.func.jvp(f, tuple(leaves), tuple(moved))[1]
    got = call.jvp()
    want = {"jvp out": want_out, "jvp lse": want_lse}
    compare({"jvp out": got.out_tangent, "jvp lse": got.lse_tangent}, {n: x.detach().numpy() for n, x in want.items()},
            1e-13)  # fmt: skip

    grads = gradient(g, gl, *leaves)
    product = sum((a * m).sum() for a, m in zip(grads, moved, strict=True))
    second = arrays_of(torch.autograd.grad(product, [*leaves, g, gl], allow_unused=True), [*leaves, g, gl])
    names = [*inputs, "grad_out", "grad_lse"]
    closed = call.double_backward()
    compare({f"closed {n}": getattr(closed, n) for n in names},
            {f"closed {n}": x for n, x in zip(names, second, strict=True)}, 1e-13)  # fmt: skip

    # The open form and one plain backward pass of what comes back to out and lse.
    opened = call.double_backward(through_saved=True)
    rest = na.attention_backward(
        opened.out, *arrays, call.out, call.lse, grad_lse=np.nan_to_num(opened.lse), **call.kwargs
    )
    compare({f"open {n}": getattr(opened, n) + getattr(rest, n) for n in inputs},
            {f"open {n}": x for n, x in zip(inputs, second, strict=False)}, 1e-13)  # fmt: skip

    dg, dgl = torch.tensor(call.dg), torch.tensor(call.dgl)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual
        duals = [dual(x.detach(), m).requires_grad_() for x, m in zip(leaves, moved, strict=True)]
        tangents = [
            torch.autograd.forward_ad.unpack_dual(a).tangent
            for a in gradient(dual(g.detach(), dg), dual(gl.detach(), dgl), *duals)
        ]
    first, both = call.backward_jvp()
    compare({f"first {n}": getattr(first, n) for n in inputs},
            {f"first {n}": x.detach().numpy() for n, x in zip(inputs, grads, strict=True)}, 1e-13)  # fmt: skip
    compare({f"hvp {n}": getattr(both, n) for n in inputs},
            {f"hvp {n}": x for n, x in zip(inputs, arrays_of(tangents, leaves), strict=True)}, 1e-13)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"query_lengths": 3, "key_lengths": 4, "is_causal": "bottom-right", "softcap": 0.7},
        {"dropout_p": 0.4, "seed": 3, "sinks": np.array([0.5, -np.inf])},
        {"is_causal": True, "prefix_lengths": 2, "window": (None, 1)},
        {"mask": na.BlockMask.causal(5, 6)},
    ],
    ids=["lengths", "dropout", "prefix", "BlockMask"],
)
def test_against_differences(options):
    """What PyTorch lacks."""
    rng = np.random.default_rng(4)
    arrays = [rng.standard_normal((2, m, 4)) for m in (5, 6, 6)]
    call = Call(arrays, options, parts=NAMES[:3])

    def at(t):
        moved = [x + t * m for x, m in zip(arrays, call.u, strict=False)]
        out, lse = na.attention(*moved, **call.kwargs, return_lse=True)
        grads = na.attention_backward(call.g, *moved, out, lse, grad_lse=call.gl, **call.kwargs)
        return [out, np.where(np.isfinite(lse), lse, 0), *grads[:3]]

    t = 1e-5
    want = [(a - b) / (2 * t) for a, b in zip(at(t), at(-t), strict=True)]
    got = [*call.jvp()[2:], *call.double_backward()[:3]]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-8)


# Invariants.

LONG = [
    Case(1100, 300, 20, H=1, batch=()),
    Case(1100, 300, 20, H=2, Hkv=1, batch=(2,), options=("causal", "softcap")),
    Case(1100, 130, 8, 20, H=6, Hkv=2, batch=(), options=("bias of keys", "sinks")),
    Case(1100, 130, 8, H=3, batch=(2,), options=("mask of keys", "bias of rows", "dropout")),
    Case(70, 5000, 8, H=2, batch=(), options=("bottom-right", "alibi")),
]


@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_long(case, dtype):
    check_case(case, dtype)


@pytest.mark.parametrize("case", LONG[:4], ids=str)
def test_same_bits_for_any_number_of_threads(case):
    import numba

    most = numba.get_num_threads()
    try:
        results = []
        for threads in (1, most):
            numba.set_num_threads(threads)
            results.append(Call(case.arrays(), case.kwargs()).everything())
    finally:
        numba.set_num_threads(most)
    for name, x in results[0].items():
        np.testing.assert_array_equal(x, results[1][name], err_msg=name)


def test_same_bits_alone_and_in_a_batch():
    call = Call(Case(200, 130, 8, H=2, batch=(9,)).arrays(), {"is_causal": True})
    together = call.double_backward()
    for b in (0, 8):
        u = na.Gradients(*(None if x is None else x[b] for x in call.u))
        own = (x[b] for x in (call.g, *call.arrays, call.out, call.lse))
        alone = na.attention_double_backward(u, *own, grad_lse=call.gl[b], is_causal=True)
        for x, y in zip(alone, together, strict=True):
            if x is not None:
                np.testing.assert_array_equal(x, y[b])


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "is_causal": True}], ids=["plain", "softcap"])
def test_the_hessian_is_symmetric_and_the_gradient_is_that_of_the_results(options):
    arrays = Case(40, 70, 16).arrays("float64")
    one, other = (Call(arrays, options, seed=seed) for seed in (2, 3))
    other.g, other.gl = one.g, one.gl

    def dot(a, b):
        return sum(np.vdot(x, y) for x, y in zip(a[:3], b[:3], strict=True))

    np.testing.assert_allclose(dot(one.double_backward(), other.u), dot(other.double_backward(), one.u), rtol=1e-10)
    moved = one.jvp()
    along = np.vdot(one.g, moved.out_tangent) + np.vdot(one.gl, moved.lse_tangent)
    grads = na.attention_backward(one.g, *arrays, one.out, one.lse, grad_lse=one.gl, **options)
    np.testing.assert_allclose(along, dot(grads, one.u), rtol=1e-10)


def test_two_sets_of_keys():
    arrays = Case(20, 70, 8).arrays("float64")
    call = Call(arrays, {})
    q, k, v = arrays
    opened, parts = call.double_backward(through_saved=True), []
    sums = np.zeros_like(q)
    for keys in (slice(0, 30), slice(30, 70)):
        u = call.u._replace(key=call.u.key[..., keys, :], value=call.u.value[..., keys, :])
        own = k[..., keys, :], v[..., keys, :]
        part = na.attention_double_backward(
            u, call.g, q, *own, call.out, call.lse, grad_lse=call.gl, through_saved=True
        )
        sums += part.query
        np.testing.assert_allclose(part.key, opened.key[..., keys, :], atol=1e-12)
        parts.append(na.attention_jvp(u, q, *own))
    np.testing.assert_allclose(sums, opened.query, atol=1e-12)
    merged, whole = na.merge_attention_jvp(*zip(*parts, strict=True)), call.jvp()
    for a, b in zip(merged, (whole.out, whole.lse, whole.out_tangent, whole.lse_tangent), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_merged_packed_and_empty_parts():
    rng = np.random.default_rng(0)
    outs, moved = rng.standard_normal((2, 3, 7, 2, 4))
    lses, moved_lses = rng.standard_normal((2, 3, 2, 7))
    lses[0, :, 3] = -np.inf
    outs[0, 3] = moved[0, 3] = np.nan
    moved_lses[0, :, 3] = np.nan
    packed = na.merge_attention_jvp(outs, lses, moved, moved_lses)
    by_head = (np.moveaxis(x, -2, -3) for x in (outs, moved))
    outs, moved = by_head
    plain = na.merge_attention_jvp(list(outs), list(lses), list(moved), list(moved_lses), packed=False)
    np.testing.assert_array_equal(packed[1], plain[1])
    np.testing.assert_array_equal(np.moveaxis(packed[2], -2, -3), plain[2])
    np.testing.assert_array_equal(packed[3], plain[3])
    assert all(np.isfinite(x).all() for x in packed)


def test_no_further_from_float64_than_pytorch(torch):
    call = Call(Case(200, 200, 64, H=4).arrays(), {})
    got, want = call.double_backward()[:3], Call(call.arrays, {}, "reference", wide=True).double_backward()[:3]
    leaves = [torch.tensor(x, requires_grad=True) for x in call.arrays]
    out = torch.softmax(leaves[0] @ leaves[1].mT / 8, -1) @ leaves[2]
    lse = torch.logsumexp(leaves[0] @ leaves[1].mT / 8, -1)
    grads = torch.autograd.grad((out, lse), leaves, (torch.tensor(call.g), torch.tensor(call.gl)), create_graph=True)
    product = sum((a * torch.tensor(m)).sum() for a, m in zip(grads, call.u, strict=False))
    theirs = torch.autograd.grad(product, leaves)
    for a, b, w in zip(got, theirs, want, strict=True):
        ours, other = np.abs(a - w), np.abs(b.numpy() - w)
        assert np.sqrt(np.mean(ours**2)) <= 1.2 * np.sqrt(np.mean(other**2))


# One sweep for the results and their tangents, where the results are not given.


def results_of(call, **more):
    return call.jvp(**more)._asdict()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((40, 70, 16, 8), {"is_causal": True}),
        ((70, 5000, 8, 24), {"softcap": 2.0, "alibi_slopes": [0.01, 0.1]}),
        ((130, 70, 140, 8), {"dropout_p": 0.3, "seed": 1, "score_mod": mod}),
        (
            (33, 200, 64, 64),
            {"mask": np.arange(33)[:, None] % 3 > 0, "bias": 30 * np.sin(np.arange(200.0)), "scale": 3},
        ),
    ],
    ids=["causal", "many keys", "dropout, mod", "mask, bias"],
)
def test_results_known_or_not(dtype, sizes, options):
    L, S, E, Ev = sizes
    case = Case(L, S, E, Ev, H=2, Hkv=1, batch=(2,))
    for parts in (NAMES[:4], NAMES[:1], NAMES[1:2], NAMES[2:3]):
        call = Call(case.arrays(dtype), {**options, "sinks": np.ones(2)}, parts=parts)
        compare(
            results_of(call), results_of(call, out=call.out, lse=call.lse), {"float32": 2e-5, "float64": 1e-12}[dtype]
        )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("what", ["value", "tangent of value", "query"])
def test_rows_that_are_not_finite_leave_the_others_alone(dtype, what):
    """Those rows are as with known results, the others have the same bits."""
    call = Call(Case(70, 70, 8, H=1, batch=()).arrays(dtype), {"is_causal": True})
    before = results_of(call)
    {"value": call.arrays[2], "query": call.arrays[0]}.get(what, call.u.value)[:, 40, 3] = np.nan
    after = results_of(call)
    out, lse = na.attention(*call.arrays, **call.kwargs, return_lse=True)
    known = results_of(call, out=out, lse=lse)
    lost = np.isnan(after["out_tangent"]).any(-1)
    np.testing.assert_array_equal(lost[0], np.arange(70) == 40 if what == "query" else np.arange(70) >= 40)
    for name, x in after.items():
        np.testing.assert_array_equal(x[~lost], before[name][~lost], err_msg=name)
        np.testing.assert_array_equal(x[lost], known[name][lost], err_msg=name)


def test_sums_beyond_the_largest_number():
    """Unnormalised outputs of these would be infinite; the forward pass divides first."""
    q, k, v = np.zeros((70, 8), np.float32), np.zeros((300, 8), np.float32), np.full((300, 8), 1e38, np.float32)
    moved = na.attention_jvp(na.Gradients(np.ones_like(q), None, None), q, k, v)
    np.testing.assert_array_equal(moved.out, na.attention(q, k, v))
    assert not moved.lse_tangent.any()


# What is hidden stays hidden, and what is seen is not.


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize(
    "options",
    [{"key_lengths": 50}, {"mask": np.arange(70) < 50}, {"bias": np.where(np.arange(70) < 50, 0, -np.inf)}],
    ids=["key_lengths", "mask", "bias"],
)
def test_hidden_keys_leave_no_trace(dtype, poison, options):
    call = Call(Case(70, 70, 20, Ev=24).arrays(dtype), {**options, "softcap": 3.0})
    want = call.everything()
    for x in (*call.arrays[1:], call.u.key, call.u.value):
        x[..., 50:, :] = poison
    got = call.everything()
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("what", ["key", "value", "tangent of key", "tangent of value"])
def test_nan_reaches_the_rows_that_see_it(dtype, backend, what):
    call = Call(Case(70, 70, 8, H=1, batch=()).arrays(dtype), {"is_causal": True}, backend)
    before = call.double_backward()
    chosen = {"key": call.arrays[1], "value": call.arrays[2], "tangent of key": call.u.key}
    chosen.get(what, call.u.value)[:, 40, 3] = np.nan
    after = call.double_backward()
    for name in ("query", "grad_out"):
        a, b = getattr(after, name), getattr(before, name)
        np.testing.assert_array_equal(a[:, :40], b[:, :40])
        assert np.isnan(a[:, 40:]).any(-1).all(), name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("what", ["query", "grad_out", "tangent of query", "lse"])
def test_nan_of_a_row_reaches_what_it_sees_and_nothing_else(dtype, what):
    call = Call(Case(70, 70, 8, H=1, batch=()).arrays(dtype), {"window": (10, 0)})
    before = call.double_backward()
    chosen = {"query": call.arrays[0], "grad_out": call.g, "tangent of query": call.u.query, "lse": call.lse}[what]
    chosen[:, 40] = np.nan
    after = call.double_backward()
    for name in ("query", "key", "value", "grad_out", "grad_lse"):
        a, b = getattr(after, name)[0], getattr(before, name)[0]
        touched = np.isnan(a) if a.ndim == 1 else np.isnan(a).any(-1)
        expected = np.zeros(70, bool)
        expected[30 : 41 if name in ("key", "value") else 30] = True
        if name not in ("key", "value"):
            expected[40] = not (what == "grad_out" and name.startswith("grad_"))
        np.testing.assert_array_equal(touched, expected, err_msg=name)
        np.testing.assert_array_equal(a[~touched], b[~touched], err_msg=name)


def test_rows_that_see_nothing():
    call = Call(Case(70, 70, 8).arrays(), {"mask": np.arange(70)[:, None] % 2 == 0, "sinks": np.array([1.0, -np.inf])})
    second, moved = call.double_backward(), call.jvp()
    assert not second.query[..., 1::2, :].any()
    assert not moved.out_tangent[..., 1::2, :].any()
    np.testing.assert_allclose(moved.lse_tangent[:, 0, 1::2], call.u.sinks[0], rtol=1e-6)
    assert not moved.lse_tangent[:, 1, 1::2].any()


def test_inputs_are_not_modified():
    call = Call(Case(20, 33, 8).arrays(), {"bias": np.zeros((20, 33), np.float32), "sinks": np.zeros(2)})
    moved = call.jvp()
    held = [x for x in (*call.u, *call.arrays, call.g, call.gl, call.dg, call.dgl, call.out, call.lse, *moved)
            if isinstance(x, np.ndarray)]  # fmt: skip
    before = [x.copy() for x in held]
    call.everything()
    for x, old in zip(held, before, strict=True):
        np.testing.assert_array_equal(x, old)


def test_results_have_the_shapes_and_dtypes_of_their_arguments():
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64):
        q, k, v = np.ones((5, 4), dtype), np.ones((7, 4), dtype), np.ones((7, 3), dtype)
        call = Call([q, k, v], {"bias": np.ones((5, 1), np.float16)})
        second = call.double_backward(through_saved=True)
        for name, like in {
            "query": q, "key": k, "value": v, "bias": np.ones((5, 1), np.float16), "grad_out": call.g,
            "grad_lse": call.gl, "out": call.out, "lse": call.lse,
        }.items():  # fmt: skip
            result = getattr(second, name)
            assert (result.shape, result.dtype) == (like.shape, like.dtype), name
        moved = call.jvp()
        assert (moved.out_tangent.shape, moved.out_tangent.dtype) == (call.out.shape, call.out.dtype)
        assert (moved.lse_tangent.shape, moved.lse_tangent.dtype) == (call.lse.shape, call.lse.dtype)


# What is refused.

X = np.ones((2, 5, 4), np.float32)
LSE = np.ones((2, 5), np.float32)
U = na.Gradients(X, None, None)


def jvp(*tangents, **options):
    return lambda: na.attention_jvp(na.Gradients(*tangents), X, X, X, **options)


def twice(*grad_grads, **options):
    u = na.Gradients(*grad_grads) if grad_grads else U
    return lambda: na.attention_double_backward(u, X, X, X, X, X, LSE, **options)


def along(out_tangent, lse_tangent):
    return lambda: na.attention_backward_jvp(U, X, X, X, X, X, LSE, out_tangent, lse_tangent)


def merged(out_tangents, lse_tangents):
    return lambda: na.merge_attention_jvp([X], [LSE], out_tangents, lse_tangents)


WRONG = {
    "no Gradients": (lambda: na.attention_jvp(X, X, X, X), TypeError, r"tangents must be a numba_attention.Gradients"),
    "shape": (jvp(X[1:], None, None), ValueError, r"tangents.query must have shape \(2, 5, 4\)"),
    "dtype": (jvp(None, None, X.astype(float)), TypeError, "tangents.value must have dtype float32"),
    "no bias": (jvp(X, None, None, X), ValueError, "tangents.bias must be None without bias"),
    "mod_args": (jvp(X, None, None, None, None, (X,)), NotImplementedError, "mod_args must be None"),
    "out alone": (jvp(X, None, None, out=X), ValueError, "out and lse must both be given"),
    "key": (twice(None, X[..., :3], None), ValueError, "grad_grads.key must have shape"),
    "sinks": (
        twice(None, None, None, None, X, sinks=np.ones(2)),
        TypeError,
        "grad_grads.sinks must have dtype",
    ),
    "option": (twice(window=3), TypeError, "window"),
    "out_tangent": (along(X[1:], LSE), ValueError, "out_tangent must have shape"),
    "lse_tangent": (along(X, LSE.astype(float)), TypeError, "lse_tangent must have dtype"),
    "numbers": (merged([X, X], [LSE]), ValueError, "out_tangents must be as many as outs, 1, got 2"),
    "merged dtype": (merged([X], [LSE.astype(float)]), TypeError, "an array of lse_tangents must have dtype"),
}


@pytest.mark.parametrize(("call", "kind", "words"), WRONG.values(), ids=WRONG)
def test_bad_input(call, kind, words, monkeypatch):
    from numba_attention.backends import cpu, cpu_second

    def start(problem):
        raise AssertionError("a kernel started")

    monkeypatch.setattr(cpu, "forward", start)
    monkeypatch.setattr(cpu_second, "run", start)
    with pytest.raises(kind, match=words):
        call()


def test_backend_for_gpus_is_refused(device):
    with pytest.raises(NotImplementedError, match=re.escape("backend 'cuda' has no second derivatives")):
        na.attention_jvp(U, X, X, X, backend="cuda")


@pytest.mark.parametrize(("backend", "packed"), [("cpu", False), ("cpu", True), ("reference", False)])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_tangents_of_half_types_are_rounded_once(backend, dtype, packed):
    """A tangent is the difference of two larger numbers, of which `out` is one: that must not be rounded before."""
    rng = np.random.default_rng(1)
    sizes = ((20, 3), (30, 3), (30, 1), (20, 1), (30, 1), (30, 1))
    arrays = [(rng.standard_normal((2, n, 16)) * scale).astype(dtype) for n, scale in sizes]
    q, k, v, dq, dk, dv = (x.astype(np.float64) for x in arrays)
    scores, moved = q @ k.swapaxes(-1, -2) / 4, (dq @ k.swapaxes(-1, -2) + q @ dk.swapaxes(-1, -2)) / 4
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    want = (weights * (moved - (weights * moved).sum(-1, keepdims=True))) @ v + weights @ dv
    starts = {"cu_seqlens_q": [0, 20], "cu_seqlens_k": [0, 30]} if packed else {}
    given = [x.swapaxes(0, 1) for x in arrays] if packed else arrays
    got = na.attention_jvp(na.Gradients(*given[3:]), *given[:3], backend=backend, **starts)
    for x, exact in ((got.out_tangent, want), (got.out, weights @ v)):
        assert x.dtype == dtype
        x = x.swapaxes(0, 1) if packed else x
        unit = 2.0 ** (np.floor(np.log2(np.abs(exact))) - (10 if dtype is np.float16 else 7))
        assert (np.abs(x.astype(np.float64) - exact) / unit).max() < 0.6
