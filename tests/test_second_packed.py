"""Second derivatives of packed sequences: each as it would be alone, in every option."""

import numba
import numpy as np
import pytest

import numba_attention as na
from cases import DTYPES, assert_close
from test_varlen import OPTIONS, H, add_bias, cast, inside, n, of_sequence, packed


def alone(x, rows):
    """Rows of one sequence as (heads, rows, features); of an lse, (heads, rows)."""
    return x[:, rows] if x.ndim == 2 else x[rows].swapaxes(0, 1)


class Call:
    """Packed arrays with a random direction and random gradients."""

    def __init__(self, options, dtype="float64", backend="cpu", lengths=None):
        given = {} if lengths is None else {"lengths": lengths}
        q, k, v, self.g, of_queries, of_keys = packed(dtype=dtype, **given)
        rng = np.random.default_rng(5)

        def like(x):
            return rng.standard_normal(np.shape(x)).astype(np.asarray(x).dtype)

        self.arrays, self.starts = [q, k, v], {"cu_seqlens_q": of_queries, "cu_seqlens_k": of_keys}
        self.options = {**options, "backend": backend}
        bias, sinks = (None if options.get(name) is None else like(options[name]) for name in ("bias", "sinks"))
        self.u = na.Gradients(like(q), like(k), like(v), bias, sinks)
        self.out, self.lse = na.attention_varlen(q, k, v, of_queries, of_keys, return_lse=True, **self.options)
        self.dg, self.gl, self.dgl = like(self.out), like(self.lse), like(self.lse)

    def results(self):
        """By name: what is one number for each row of the queries or of the keys, and what sequences share."""
        every = self.options | self.starts
        moved = na.attention_jvp(self.u, *self.arrays, **every)
        first, along = na.attention_backward_jvp(
            self.u, self.g, *self.arrays, *moved, grad_lse=self.gl, grad_out_tangent=self.dg,
            grad_lse_tangent=self.dgl, **every,
        )  # fmt: skip
        closed, opened = (
            na.attention_double_backward(
                self.u, self.g, *self.arrays, self.out, self.lse, grad_lse=self.gl, through_saved=saved, **every
            )
            for saved in (False, True)
        )
        return named(moved, first, along, closed, opened)

    def results_alone(self, b, options):
        rows, columns = of_sequence(b, *self.starts.values())
        own = [alone(x, part) for x, part in zip(self.arrays, (rows, columns, columns), strict=True)]
        u = [alone(x, part) for x, part in zip(self.u[:3], (rows, columns, columns), strict=True)]
        u = na.Gradients(*u, options.pop("tangent of bias", None), self.u.sinks)
        g, dg, gl, dgl = (np.ascontiguousarray(alone(x, rows)) for x in (self.g, self.dg, self.gl, self.dgl))
        options = options | {"backend": self.options["backend"]}
        moved = na.attention_jvp(u, *own, **options)
        known = na.attention(*own, return_lse=True, **options)
        first, along = na.attention_backward_jvp(
            u, g, *own, *moved, grad_lse=gl, grad_out_tangent=dg, grad_lse_tangent=dgl, **options
        )
        closed, opened = (
            na.attention_double_backward(u, g, *own, *known, grad_lse=gl, through_saved=saved, **options)
            for saved in (False, True)
        )
        return named(moved, first, along, closed, opened)


def named(moved, first, along, closed, opened):
    groups = {"moved": moved, "first": first, "along": along, "closed": closed, "open": opened}
    pairs = [(f"{kind} {name}", x) for kind, group in groups.items() for name, x in group._asdict().items()]
    return {name: x for name, x in pairs if x is not None}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("option", OPTIONS)
def test_as_each_alone(option, backend):
    together, of_one = OPTIONS[option]
    together = cast(together, "float64")
    call = Call(together, backend=backend)
    got = call.results()
    shared = {name: np.zeros_like(x) for name, x in got.items() if name.endswith(("bias", "sinks"))}
    for b in range(n):
        rows, columns = of_sequence(b, *call.starts.values())
        options = cast(of_one(b, rows, columns), "float64")
        if "bias" in options:
            options["tangent of bias"] = part_of_bias(call.u.bias, option, b, rows, columns)
        for name, want in call.results_alone(b, options).items():
            if name in shared:
                if name.endswith("bias"):
                    add_bias(shared[name], want, option, b, rows, columns)
                else:
                    shared[name] += want
                continue
            of_keys = name.endswith((" key", " value"))
            np.testing.assert_array_equal(alone(got[name], columns if of_keys else rows), want, err_msg=name)
    for name, want in shared.items():
        assert got[name].dtype == want.dtype
        np.testing.assert_allclose(got[name], want, rtol=1e-9, atol=1e-9, err_msg=name)


def part_of_bias(bias, option, b, rows, columns):
    """The part of sequence b, as the rows of `test_varlen.OPTIONS` take it of the bias itself."""
    if option == "bias over tokens":
        return bias[rows, columns]
    if option == "bias of columns":
        return bias[:, :, columns]
    return (bias[b] if option == "bias of each" else bias)[(slice(None), *inside(rows, columns))]


def mod(score, batch, head, i, j):
    return score + 0.1 * (batch + 1) * np.sin(score) - 0.01 * head * (i - j)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {"dropout_p": 0.3, "seed": 1, "sinks": np.linspace(-1, 1, H)},
        {"score_mod": mod, "softcap": 3.0, "is_causal": "bottom-right"},
        {"mask": na.BlockMask.causal(70, 130)},
    ],
    ids=["dropout, sinks", "mod, softcap", "BlockMask"],
)
def test_against_the_reference(options, dtype):
    """What depends on the number of the sequence, and every dtype."""
    lengths = [(7, 9), (0, 5), (70, 33), (2, 130)]
    got = Call(options, dtype, lengths=lengths).results()
    wide = Call(options, dtype, "reference", lengths)
    for name in ("arrays", "u"):
        parts = [None if x is None else x.astype(np.float64) for x in getattr(wide, name)]
        setattr(wide, name, parts if name == "arrays" else na.Gradients(*parts))
    for name in ("g", "dg", "gl", "dgl"):
        setattr(wide, name, getattr(wide, name).astype(np.float64))
    wide.out, wide.lse = na.attention_varlen(*wide.arrays, **wide.starts, return_lse=True, **wide.options)
    want = wide.results()
    relative = {"float32": 1e-4, "float64": 1e-12, "float16": 2e-2, "bfloat16": 0.15}[dtype]
    for name, x in want.items():
        assert got[name].shape == x.shape
        expected = np.float32 if name.endswith("lse") or "lse_" in name else DTYPES[dtype]
        assert got[name].dtype in (expected, np.float64), name
        assert_close(got[name], x, relative, np.abs(x[np.isfinite(x)]).max())


def test_same_bits_for_any_number_of_threads():
    call = Call({"is_causal": True, "sinks": np.ones(H)}, "float32")
    most = numba.get_num_threads()
    try:
        results = []
        for threads in (1, most):
            numba.set_num_threads(threads)
            results.append(call.results())
    finally:
        numba.set_num_threads(most)
    for name, x in results[0].items():
        np.testing.assert_array_equal(x, results[1][name], err_msg=name)


@pytest.mark.parametrize("lengths", [[], [(0, 0)], [(0, 4), (0, 0)], [(3, 0)]], ids=str)
def test_nothing_to_do(lengths):
    for backend in ("cpu", "reference"):
        for name, x in Call({}, backend=backend, lengths=lengths).results().items():
            if name != "moved lse":
                assert not x.any(), name


def test_half_the_difference_of_two_steps():
    """Central differences, which know nothing of directions."""
    call, t = Call({"softcap": 2.0}, lengths=[(5, 7), (4, 3)]), 1e-5

    def gradients(t):
        arrays = [x + t * u for x, u in zip(call.arrays, call.u, strict=False)]
        out, lse = na.attention_varlen(*arrays, **call.starts, **call.options, return_lse=True)
        grads = na.attention_varlen_backward(call.g, *arrays, out, lse, **call.starts, grad_lse=call.gl, **call.options)
        return out, lse, *grads[:3]

    out, lse, *grads = ((a - b) / (2 * t) for a, b in zip(gradients(t), gradients(-t), strict=True))
    got = call.results()
    names = ("query", "key", "value", "grad_out", "grad_lse")
    for name, want in zip(names, (*grads, out, lse), strict=True):
        np.testing.assert_allclose(got[f"closed {name}"], want, atol=1e-8)


X, LSE, STARTS = np.ones((5, 2, 4), np.float32), np.ones((2, 5), np.float32), [0, 2, 5]
U = na.Gradients(X, None, None)
WRONG = {
    "one of both": (
        lambda: na.attention_jvp(U, X, X, X, cu_seqlens_q=STARTS),
        ValueError, "cu_seqlens_q and cu_seqlens_k must both be given or both be None",
    ),
    "total": (
        lambda: na.attention_jvp(U, X, X, X, cu_seqlens_q=[0, 4], cu_seqlens_k=STARTS),
        ValueError, "cu_seqlens_q must go from 0 to 5",
    ),
    "shape": (
        lambda: na.attention_jvp(na.Gradients(X[1:], None, None), X, X, X, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS),
        ValueError, r"tangents.query must have shape \(5, 2, 4\)",
    ),
    "lse_tangent": (
        lambda: na.attention_backward_jvp(
            U, X, X, X, X, X, LSE, X, LSE.T, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS
        ),
        ValueError, r"lse_tangent must have shape \(2, 5\)",
    ),
    "grad_out": (
        lambda: na.attention_double_backward(U, X[1:], X, X, X, X, LSE, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS),
        ValueError, r"grad_out must have shape \(5, 2, 4\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "words"), WRONG.values(), ids=WRONG)
def test_bad_input(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
