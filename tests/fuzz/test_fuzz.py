"""A differential fuzzer: every public function against the textbook, at any magnitude, with errors that are bounded.

``pytest tests/fuzz`` takes fixed examples, ``NUMBA_ATTENTION_FUZZ_SECONDS=600 pytest tests/fuzz`` new ones for ten
minutes a test. A failure ends with a script that makes the call again.
"""

import importlib.util

import hypothesis.strategies as st
import numpy as np
import pytest
from balls import PRECISIONS, Ball, add, computes_in, disagreement, exact, matmul, multiply, total
from budget import fuzz
from draws import (
    KINDS,
    LAYOUTS,
    Call,
    magnitudes,
    numbers,
    of_sequence,
    options_for,
    pass_by_blocks,
    query_and_key,
    scale_of,
    scales,
    sizes,
    values_like,
)
from hypothesis import given
from textbook import Sequence, merge, rotate

import numba_attention as na

dtypes = st.sampled_from(["float32", "float32", "float64", "float16", "bfloat16"])
layouts = st.sampled_from(list(LAYOUTS))


def fail_if(call, *messages):
    messages = [message for message in messages if message]
    if messages:
        pytest.fail("\n".join([*messages, "To see it again:", call.script()]), pytrace=False)


def refused(error, call, scale, dtype):
    """Whether it is the scale that is refused, which the compute type must hold times log2(e), or far positions."""
    offset = call.values.get("options", {}).get("query_offset", 0)
    if "positions must lie within" in str(error) and abs(offset) >= 2**31:
        return True
    return "scale" in str(error) and scale is not None and abs(scale) > computes_in(dtype).largest / 1.5


def run(call, scale, dtype):
    """Return what the call returns, or None where it refuses a scale as it may; anything else it raises is a fault."""
    try:
        return call()
    except ValueError as error:
        if refused(error, call, scale, dtype):
            return None
        fail_if(call, f"{type(error).__name__}: {error}")
    except Exception as error:
        fail_if(call, f"{type(error).__name__}: {error}")


def stacked(balls):
    return Ball(np.stack([b.mid for b in balls]), np.stack([b.rad for b in balls]))


def sequences(query, key, value, dtype, scale, options):
    """The textbook's sequences, of arrays (B, H, L, E) on one batch."""
    (B, H, L, E), S = query.shape, key.shape[-2]
    return [
        Sequence(
            exact(query[b]),
            exact(key[b]),
            exact(value[b]),
            dtype,
            scale=scale_of(scale, E),
            **of_sequence(options, b, H, L, S),
        ).attend()
        for b in range(B)
    ]


@st.composite
def problems(draw, allow=("query_lengths", "key_lengths"), layout=True):
    """query, key and value on a batch, dtype, scale and options."""
    dtype, batch = draw(dtypes), draw(st.sampled_from([1, 1, 2, 3]))
    H, Hkv, L, S, E, Ev = draw(sizes())
    scale = scales(draw, dtype)
    query, key = query_and_key(draw, (batch, H, L, E), (batch, Hkv, S, E), dtype, scale)
    value = values_like(draw, (batch, Hkv, S, Ev), dtype)
    options = options_for(draw, batch, H, L, S, dtype, allow)
    if scale is not None:
        options["scale"] = scale
    call = Call("", query=query, key=key, value=value, options=options)
    if layout:
        for name in ("query", "key", "value"):
            call.store(name, draw(layouts))
        pass_by_blocks(draw, call, batch, H, L, S)
    return call, dtype, scale, options


def check_torch(call, want, dtype, scale, options):
    """PyTorch's plain formula in float64 says the same as the textbook, where it has the options."""
    if importlib.util.find_spec("torch") is None or set(options) - {"bias", "mask", "scale", "is_causal"}:
        return
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, key, value = (torch.from_numpy(call.values[n].astype(np.float64)) for n in ("query", "key", "value"))
    B, H, L, S = *query.shape[:3], key.shape[2]
    visible = np.stack([of_sequence(options, b, H, L, S)["visible"] for b in range(B)])
    if not visible.any(-1).all() or not query.shape[-1]:
        return
    bias = np.zeros(visible.shape)
    if "bias" in options:
        largest = computes_in(dtype).largest
        bias = bias + np.clip(options["bias"].astype(np.float64), -largest, largest)
    bias[~visible] = -np.inf
    with sdpa_kernel(SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=torch.from_numpy(bias), scale=scale, enable_gqa=True
        ).numpy()
    finite = np.isfinite(out)  # scores of float64 may overflow there
    if dtype != "float64":
        message = disagreement(np.where(finite, out, want.mid), want, "float64", "PyTorch's result")
        fail_if(call, message)


@fuzz(250)
@given(problems(), st.integers(0, 3))
def test_attention(problem, peer):
    call, dtype, scale, options = problem
    call.expression = "na.attention(query, key, value, return_lse=True, **options)"
    result = run(call, scale, dtype)
    if result is None:
        return
    want = sequences(*(call.values[n] for n in ("query", "key", "value")), dtype, scale, options)
    out, lse = stacked([s.out for s in want]), stacked([s.lse for s in want])
    own = "float64" if dtype == "float64" else "float32"
    fail_if(call, disagreement(result[0], out, dtype, "out"), disagreement(result[1], lse, own, "lse"))
    if peer == 0:
        check_torch(call, out, dtype, scale, options)


@fuzz(120)
@given(problems(), st.data())
def test_attention_weights(problem, data):
    call, dtype, scale, options = problem
    query, key = call.values["query"], call.values["key"]
    H, L = query.shape[1:3]
    del call.values["value"]
    call.values["heads"] = data.draw(st.lists(st.integers(0, H - 1), max_size=3)) or None
    call.values["rows"] = data.draw(st.lists(st.integers(0, L - 1), max_size=5)) or None if L else None
    call.expression = "na.attention_weights(query, key, heads=heads, rows=rows, **options)"
    result = run(call, scale, dtype)
    if result is None:
        return
    want = stacked([s.dropped for s in sequences(query, key, key, dtype, scale, options)])
    # Of a row with an infinite score, which has no softmax, nothing is promised, nor of what it does not see.
    want = Ball(want.mid, np.where(np.isinf(want.rad).any(-1, keepdims=True), np.inf, want.rad))
    if call.values["heads"] is not None:
        want = want[:, call.values["heads"]]
    if call.values["rows"] is not None:
        want = want[:, :, call.values["rows"]]
    fail_if(call, disagreement(result, want, dtype, "weights"))


@st.composite
def packed_problems(draw):
    dtype, n = draw(dtypes), draw(st.integers(1, 3))
    H, Hkv, _, _, E, Ev = draw(sizes())
    length = st.one_of(st.integers(0, 5), st.integers(6, 30))
    starts = [np.cumsum([0, *(draw(length) for _ in range(n))]) for _ in range(2)]
    scale = scales(draw, dtype)
    query, key = query_and_key(draw, (int(starts[0][-1]), H, E), (int(starts[1][-1]), Hkv, E), dtype, scale)
    value = values_like(draw, (int(starts[1][-1]), Hkv, Ev), dtype)
    L, S = (int(np.diff(x).max()) for x in starts)
    options = options_for(draw, n, H, L, S, dtype)
    if scale is not None:
        options["scale"] = scale
    call = Call("", query=query, key=key, value=value, of_query=starts[0], of_key=starts[1], options=options)
    pass_by_blocks(draw, call, n, H, L, S)
    return call, dtype, scale, options


def packed_sequences(call, dtype, scale, options):
    query, key, value = (call.values[n].swapaxes(0, 1) for n in ("query", "key", "value"))
    starts = call.values["of_query"], call.values["of_key"]
    L, S = (int(np.diff(x).max()) for x in starts)
    want = []
    for b in range(len(starts[0]) - 1):
        rows, columns = (slice(int(x[b]), int(x[b + 1])) for x in starts)
        n, m = rows.stop - rows.start, columns.stop - columns.start
        lengths = {"query_lengths": n, "key_lengths": m}
        fields = of_sequence({**options, **lengths}, b, query.shape[0], L, S)
        for name in ("visible", "bias", "kept"):
            if name in fields:
                fields[name] = fields[name][:, :n, :m]
        if "rule" in fields:
            fields["rule"] = *fields["rule"][:3], fields["rule"][3][:n]
        if "distance" in fields:
            fields["distance"] = fields["distance"][:n, :m]
        fields["rows"] = fields["rows"][:n]
        parts = exact(query[:, rows]), exact(key[:, columns]), exact(value[:, columns])
        want.append((rows, columns, Sequence(*parts, dtype, scale=scale_of(scale, query.shape[-1]), **fields).attend()))
    return want


@fuzz(120)
@given(packed_problems())
def test_attention_varlen(problem):
    call, dtype, scale, options = problem
    call.expression = "na.attention_varlen(query, key, value, of_query, of_key, return_lse=True, **options)"
    result = run(call, scale, dtype)
    if result is None:
        return
    own = "float64" if dtype == "float64" else "float32"
    for rows, _, want in packed_sequences(call, dtype, scale, options):
        out, lse = result[0][rows].swapaxes(0, 1), result[1][:, rows]
        fail_if(call, disagreement(out, want.out, dtype, "out"), disagreement(lse, want.lse, own, "lse"))


def held(cache, ids):
    """What a cache stores, read back in float64: (batch, Hkv, longest, E) each."""
    if isinstance(cache, na.KVCache):
        key, value, scales = cache.key, cache.value, (cache.key_scale, cache.value_scale)
        arrays = [np.asarray(x).astype(np.float64) for x in (key, value)]
        return [x if s is None else x * s.astype(np.float64)[..., None] for x, s in zip(arrays, scales, strict=True)]
    raise TypeError(ids)


STORAGES = [None, None, "float16", "bfloat16", "int8", "float8"]


@fuzz(200)
@given(problems(allow=(), layout=False), st.sampled_from(STORAGES), st.booleans(), st.integers(1, 4))
def test_attention_decode(problem, storage, paged, rows):
    """What a cache stores is what was appended, as precisely as its bits allow; attention is to what it stores."""
    call, dtype, scale, options = problem
    query, key, value = (np.ascontiguousarray(call.values[n]) for n in ("query", "key", "value"))
    (B, Hkv, S, E), Ev = key.shape, value.shape[-1]
    if not E or not S or dtype == storage:
        return
    L = min(rows, S)
    query = np.resize(query, (B, query.shape[1], L, E)) if query.size else np.ones((B, query.shape[1], L, E), key.dtype)
    call.values |= {"query": query, "key": key, "value": value}
    for name in ("bias", "mask"):
        if name in options:
            x = options[name]
            options[name] = np.resize(x, (*x.shape[:2], 1 if x.shape[2] == 1 else L, x.shape[3])) if x.size else x[:0]
            if not options[name].size:
                del options[name]
    options.setdefault("is_causal", "bottom-right")
    if "mask" in options and rows % 2:
        pass_by_blocks(lambda strategy: True, call, B, query.shape[1], L, S)
    make = f"na.KVCache({B}, {Hkv}, {S}, {E}, {Ev}, dtype=key.dtype, storage={storage!r})"
    attend = "(na.attention_decode(query, cache, return_lse=True, **options), cache)"
    call.expression = f"(cache := {make}).append(key, value) or {attend}"
    if paged:
        make = f"na.PagedKVCache({B * (S // 4 + 1)}, 4, {Hkv}, {E}, {Ev}, dtype=key.dtype, storage={storage!r})"
        call.expression = f"(cache := {make}).append(cache.add({B}), key, value) or {attend}"
    try:
        result = call()
    except ValueError as error:
        limit = {"float16": 65504.0}.get(storage)
        large = limit is not None and max(np.abs(x.astype(np.float64)).max(initial=0) for x in (key, value)) > limit
        if refused(error, call, scale, dtype) or (large and "float16" in str(error)):
            return
        fail_if(call, f"{type(error).__name__}: {error}")
    except Exception as error:
        fail_if(call, f"{type(error).__name__}: {error}")
    (out, lse), cache = result
    stored = [read_back(x, storage) for x in (key, value)]
    if not paged:
        for name, x, got in zip(("key", "value"), (key, value), held(cache, None), strict=True):
            fail_if(call, misstored(name, x.astype(np.float64), got, storage))
        stored = held(cache, None)
    want = sequences(query, *stored, dtype, scale, {**options})
    own = "float64" if dtype == "float64" else "float32"
    fail_if(
        call,
        disagreement(out, stacked([s.out for s in want]), dtype, "out"),
        disagreement(lse, stacked([s.lse for s in want]), own, "lse"),
    )


def read_back(x, storage):
    """What was stored, by the documented rule."""
    cache = na.KVCache(*x.shape[:3], x.shape[3], dtype=x.dtype, storage=storage)
    with np.errstate(all="ignore"):
        cache.append(x, x)
    return held(cache, None)[0]


def misstored(name, x, got, storage):
    """Say where a finite number was stored with a larger error than its bits explain."""
    with np.errstate(all="ignore"):
        largest = np.abs(x).max(-1, keepdims=True, initial=0)
        # The scale is a normal float32, and a row is stored in steps of it.
        step = np.maximum(largest / {"int8": 127, "float8": 448}.get(storage, 1) * (1 + 2.0**-20), 2.0**-126)
        allowed = {
            None: 0 * x,
            "float16": np.maximum(np.abs(x) * 2.0**-11, 2.0**-25),
            "bfloat16": np.maximum(np.abs(x) * 2.0**-8, 2.0**-134),
            "int8": 0.51 * step,
            "float8": np.abs(x) * 2.0**-4 + step * 2.0**-9,
        }[storage]
        # Larger numbers are stored as the largest; with scales, rows of float64 as far as float32 goes.
        limit = {"float16": 65504.0, "bfloat16": PRECISIONS["bfloat16"].largest, None: np.inf}
        limit = limit.get(storage, PRECISIONS["float32"].largest)
        allowed = np.where(largest > limit, np.maximum(allowed, np.abs(x) - limit * (1 - 2.0**-7)), allowed)
        wrong = ~(np.abs(got - x) <= allowed * (1 + 1e-12))
    if not wrong.any():
        return None
    at = tuple(np.argwhere(wrong)[0])
    return f"{name}{list(map(int, at))} was {x[at]!r} and is stored as {got[at]!r}"


@fuzz(150)
@given(problems(), st.booleans(), st.data())
def test_attention_backward(problem, with_lse, data):
    call, dtype, scale, options = problem
    query, value = call.values["query"], call.values["value"]
    shape = (*query.shape[:-1], value.shape[-1])
    call.values["grad"] = data.draw(st.composite(lambda draw: values_like(draw, shape, dtype))())
    own = "float64" if dtype == "float64" else "float32"
    call.values["grad_lse"] = None
    if with_lse:
        call.values["grad_lse"] = data.draw(
            st.composite(lambda d: numbers(d, shape[:-1], own, d(magnitudes(0.1, 10))))()
        )
    call.expression = (
        "na.attention_backward(grad, query, key, value, *na.attention(query, key, value, return_lse=True, **options), "
        "grad_lse=grad_lse, mod_grads=mod_grads, **options)"
    )
    call.values["mod_grads"] = "all" if "score_mod" in options else None
    result = run(call, scale, dtype)
    if result is None:
        return
    want = sequences(*(call.values[n] for n in ("query", "key", "value")), dtype, scale, options)
    grads = []
    for b, s in enumerate(want):
        of_lse = None if not with_lse else exact(call.values["grad_lse"][b])
        grads.append(s.differentiate(exact(call.values["grad"][b]), of_lse))
    check_gradients(call, result, grads, dtype, options, want[0].t if want else None)
    check_laws(call, result, want, dtype, options, with_lse)


def check_gradients(call, result, grads, dtype, options, t):
    messages = []
    for n, name in enumerate(("query", "key", "value")):
        messages.append(disagreement(result[n], stacked([g[n] for g in grads]), dtype, f"gradient of {name}"))
    if "bias" in options:
        of_bias, given_bias = stacked([g[3] for g in grads]), options["bias"]
        axes = tuple(n for n in range(4) if given_bias.shape[n] == 1)
        of_bias = total(of_bias, axes, t, keepdims=True) if axes else of_bias
        messages.append(disagreement(result.bias, of_bias, _coarser(dtype, given_bias), "gradient of bias"))
    if "sinks" in options:
        of_sinks = total(stacked([g[4] for g in grads]), 0, t)
        messages.append(disagreement(result.sinks, of_sinks, _coarser(dtype, options["sinks"]), "gradient of sinks"))
    messages += of_mod_args(result, grads, dtype, options, t)
    fail_if(call, *messages)


def of_mod_args(result, grads, dtype, options, t):
    """What is wrong with the gradients of the arrays that a score_mod reads."""
    if "score_mod" not in options:
        return
    for n in range(2):
        want = total(stacked([g[5][n] for g in grads]), 0, t)
        own = _coarser("float64" if dtype == "float64" else "float32", options["mod_args"][n])
        yield disagreement(result.mod_args[n], want, own, f"gradient of mod_args[{n}]")


def _coarser(dtype, array):
    return max(dtype, array.dtype.name, key=lambda name: PRECISIONS[name].u)


def check_laws(call, result, want, dtype, options, with_lse):
    """The weights of a row sum to 1, however well its scores are known: gradients of the values say if they did."""
    if {"sinks", "dropout_p"} & set(options):
        return
    grad, t = call.values["grad"].astype(np.float64), computes_in(dtype)
    for b, s in enumerate(want):
        some = s.visible.any(-1)
        if np.isinf(s.weights.rad).any():
            continue
        each = np.where(some[..., None], np.abs(grad[b]), 0)
        group = each.shape[0] // s.key.mid.shape[0]
        size = each.sum(1).reshape(-1, group, each.shape[-1]).sum(1)
        if size.size and size.max() > PRECISIONS[dtype].largest / 4:
            continue
        have = np.where(some[..., None], grad[b], 0).sum(1).reshape(-1, group, each.shape[-1]).sum(1)
        got = result.value[b].astype(np.float64)
        keys, rows = max(1, s.visible.shape[-1]), s.visible.shape[1] * group
        n = keys + rows
        rounding = {"bfloat16": 2.0**-6, "float16": 2.0**-10}.get(dtype, 0)
        # lse is kept in the compute type, to which a weight is relative.
        finite = np.abs(np.where(np.isfinite(s.lse.mid), s.lse.mid, 0)).astype(np.float64)
        loose = min(0.25, 8 * t.u * (1 + finite.max(initial=0)))
        allowed = (4 * n * t.u + rounding + loose) * size + PRECISIONS[dtype].u * np.abs(got).sum(1)
        allowed += n * (PRECISIONS[dtype].tiny + 16 * t.normal * np.abs(grad[b]).max(initial=0))
        allowed += keys * rows * t.tiny  # each product may be subnormal
        wrong = ~(np.abs(got.sum(1) - have) <= allowed)
        if wrong.any():
            at = tuple(np.argwhere(wrong)[0])
            fail_if(
                call,
                f"sequence {b}: gradients of the values of head and feature {list(map(int, at))} sum to "
                f"{float(got.sum(1)[at])!r}, those of the output to {float(have[at])!r}: weights do not sum to 1",
            )


@fuzz(80)
@given(packed_problems(), st.data())
def test_attention_varlen_backward(problem, data):
    call, dtype, scale, options = problem
    query, value = call.values["query"], call.values["value"]
    shape = (*query.shape[:-1], value.shape[-1])
    call.values["grad"] = data.draw(st.composite(lambda draw: values_like(draw, shape, dtype))())
    call.expression = (
        "na.attention_varlen_backward(grad, query, key, value, "
        "*na.attention_varlen(query, key, value, of_query, of_key, return_lse=True, **options), "
        "of_query, of_key, mod_grads=mod_grads, **options)"
    )
    call.values["mod_grads"] = "all" if "score_mod" in options else None
    result = run(call, scale, dtype)
    if result is None:
        return
    every = []
    for rows, columns, s in packed_sequences(call, dtype, scale, options):
        grads = s.differentiate(exact(call.values["grad"][rows].swapaxes(0, 1)))
        every.append(grads)
        got = result.query[rows], result.key[columns], result.value[columns]
        fail_if(
            call,
            *[
                disagreement(x.swapaxes(0, 1), want, dtype, f"gradient of {name}")
                for x, want, name in zip(got, grads[:3], ("query", "key", "value"), strict=True)
            ],
        )
    fail_if(call, *of_mod_args(result, every, dtype, options, computes_in(dtype)))


@st.composite
def partial_results(draw):
    dtype, n = draw(dtypes), draw(st.integers(1, 4))
    own = "float64" if dtype == "float64" else "float32"
    L, Ev = draw(st.integers(0, 6)), draw(st.integers(1, 5))
    largest = PRECISIONS[own].largest
    outs = [values_like(draw, (2, L, Ev), dtype) for _ in range(n)]
    size = draw(st.one_of(magnitudes(0.1, 100), magnitudes(1e-10, largest)))
    lses = [numbers(draw, (2, L), own, size) for _ in range(n)]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    for x in lses:
        x[rng.random(x.shape) < 0.2] = -np.inf
    return Call("na.merge_attention(outs, lses)", outs=outs, lses=lses), dtype, own


@fuzz(150)
@given(partial_results())
def test_merge_attention(problem):
    call, dtype, own = problem
    result = run(call, None, dtype)
    outs, lses = ([exact(x) for x in call.values[n]] for n in ("outs", "lses"))
    out, lse, _ = merge(outs, lses, computes_in(dtype))
    fail_if(call, disagreement(result[0], out, dtype, "out"), disagreement(result[1], lse, own, "lse"))


@fuzz(100)
@given(partial_results(), st.data())
def test_merge_attention_backward(problem, data):
    call, dtype, own = problem
    t, shape = computes_in(dtype), call.values["outs"][0].shape
    call.values["grad"] = data.draw(st.composite(lambda d: numbers(d, shape, dtype, d(magnitudes(1e-3, 1e3))))())
    call.values["grad_lse"] = data.draw(st.composite(lambda d: numbers(d, shape[:-1], own, d(magnitudes(1e-3, 1e3))))())
    call.expression = "na.merge_attention_backward(grad, grad_lse, outs, lses)"
    result = run(call, None, dtype)
    outs, lses = ([exact(x) for x in call.values[n]] for n in ("outs", "lses"))
    out, _, weights = merge(outs, lses, t)
    grad, grad_lse = exact(call.values["grad"]), exact(call.values["grad_lse"])
    for n, (part, log) in enumerate(zip(outs, lses, strict=True)):
        weight, empty = weights[..., n], log.mid == -np.inf
        inner = add(total(multiply(grad, add(part, out, t, -1), t), -1, t), grad_lse, t)
        wants = multiply(weight[..., None], grad, t), multiply(weight, inner, t)
        wants = [
            Ball(np.where(e, 0, w.mid), np.where(e, 0, w.rad))
            for w, e in zip(wants, (empty[..., None], empty), strict=True)
        ]
        fail_if(
            call,
            disagreement(result[0][n], wants[0], dtype, f"gradient of outs[{n}]"),
            disagreement(result[1][n], wants[1], own, f"gradient of lses[{n}]"),
        )


@fuzz(150)
@given(dtypes, st.data(), layouts)
def test_apply_rotary(dtype, data, layout):
    draw = data.draw
    L, E = draw(st.integers(0, 9)), draw(st.sampled_from([2, 4, 5, 8, 16, 33]))
    dim = draw(st.integers(1, E // 2)) * 2
    x = draw(st.composite(lambda d: values_like(d, (2, L, E), dtype))())
    positions = np.array([draw(st.integers(-(2**31), 2**31)) for _ in range(L)], np.int64)
    base, interleaved = draw(magnitudes(1.5, 1e6)), draw(st.booleans())
    call = Call(
        "na.apply_rotary(x, positions, base=base, dim=dim, interleaved=interleaved)",
        x=x, positions=positions, base=base, dim=dim, interleaved=interleaved,
    )  # fmt: skip
    call.store("x", layout)
    result = run(call, None, dtype)
    fail_if(call, disagreement(result, rotate(call.values["x"], positions, base, dim, interleaved, dtype), dtype, "x"))


@fuzz(60)
@given(st.data())
def test_layer(data):
    """Forward and backward of self-attention: projections and attention by their formulas, errors carried through."""
    draw = data.draw
    dtype = draw(st.sampled_from(["float32", "float64"]))
    H, group, L, E, D = (draw(st.sampled_from(x)) for x in ([1, 2], [1, 2], [0, 1, 5, 20], [1, 4, 8], [3, 8, 16]))
    B, t, causal = draw(st.integers(1, 2)), PRECISIONS[dtype], draw(st.booleans())

    def make(shape, low, high):
        return draw(st.composite(lambda d: numbers(d, shape, dtype, d(magnitudes(low, high)), KINDS[:5]))())

    own = {}
    for name, rows, columns in (
        ("q_proj", H * group * E, D),
        ("k_proj", H * E, D),
        ("v_proj", H * E, D),
        ("out_proj", D, H * group * E),
    ):
        own |= {f"{name}.weight": make((rows, columns), 1e-3, 1e3), f"{name}.bias": make((rows,), 1e-3, 1e3)}
    x, grad = make((B, L, D), 1e-6, 1e6), make((B, L, D), 1e-6, 1e6)
    call = Call(
        f"(layer := na.MultiHeadAttention({D}, {H * group}, num_kv_heads={H}, head_dim={E}, dtype=x.dtype))"
        ".load_parameters(own) or "
        f"((made := layer.forward(x, is_causal={causal}))[0], layer.backward(grad, made[1]).query, layer.grads)",
        own=own, x=x, grad=grad,
    )  # fmt: skip
    result = run(call, None, dtype)
    outs, of_x, grads = [], [], {name: [] for name in own}
    w = {name: exact(array) for name, array in own.items()}
    heads = lambda y: Ball(*(z.reshape(L, z.shape[-1] // E, E).swapaxes(0, 1) for z in (y.mid, y.rad)))  # noqa: E731
    joined = lambda y: Ball(*(z.swapaxes(0, 1).reshape(L, y.mid.shape[0] * E) for z in (y.mid, y.rad)))  # noqa: E731
    project = lambda y, name: add(matmul(y, w[f"{name}.weight"].T, t), w[f"{name}.bias"], t)  # noqa: E731
    for b in range(B):
        xb, gb = exact(x[b]), exact(grad[b])
        q, k, v = (heads(project(xb, name)) for name in ("q_proj", "k_proj", "v_proj"))
        visible = np.broadcast_to(np.tri(L, L, dtype=bool) if causal else np.ones((L, L), bool), (H * group, L, L))
        s = Sequence(q, k, v, dtype, visible, E**-0.5).attend()
        flat = joined(s.out)
        outs.append(project(flat, "out_proj"))
        grads["out_proj.weight"].append(matmul(gb.T, flat, t))
        grads["out_proj.bias"].append(total(gb, 0, t))
        of_heads = s.differentiate(heads(matmul(gb, w["out_proj.weight"], t)))
        parts = None
        for name, g in zip(("q_proj", "k_proj", "v_proj"), of_heads[:3], strict=True):
            g = joined(g)
            grads[f"{name}.weight"].append(matmul(g.T, xb, t))
            grads[f"{name}.bias"].append(total(g, 0, t))
            part = matmul(g, w[f"{name}.weight"], t)
            parts = (
                part
                if parts is None
                else Ball(add(parts, part, t).mid, parts.rad + part.rad + 4 * t.u * (parts.size + part.size))
            )
        of_x.append(parts)
    messages = [
        disagreement(result[0], stacked(outs), dtype, "out"),
        disagreement(result[1], stacked(of_x), dtype, "gradient of x"),
    ]
    for name, found in grads.items():
        messages.append(disagreement(result[2][name], total(stacked(found), 0, t), dtype, f"gradient of {name}"))
    fail_if(call, *messages)
