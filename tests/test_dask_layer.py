"""`MultiHeadAttention` on Dask arrays of any chunks, against the layer on the whole arrays and finite differences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numba_attention as na

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
nad = pytest.importorskip("numba_attention.dask")
blocks = pytest.importorskip("dask_blocks")

pytestmark = pytest.mark.usefixtures("synchronous")
errors, lazy, tilt = blocks.errors, blocks.lazy, blocks.tilt


def some(rng, **options):
    return {name: x for name, x in options.items() if rng.random() < 0.35}


def call_of(rng):
    """Draw a layer, its inputs (query, key, value) and the other arguments of a call."""
    Hkv, group, E = int(rng.integers(1, 4)), int(rng.integers(1, 3)), int(rng.choice([4, 8]))
    H = Hkv * group
    dims = (int(rng.integers(3, 12)), int(rng.integers(3, 12)), int(rng.integers(3, 12)))
    packed, is_self = rng.random() < 0.25, rng.random() < 0.5
    if is_self or packed or rng.random() < 0.3:
        dims = (dims[0],) * 3
    rotary = [None, True, {"interleaved": True}, {"scaling": {"rope_type": "dynamic", "factor": 2.0}}][rng.integers(4)]
    if isinstance(rotary, dict) and "scaling" in rotary:
        rotary["scaling"]["max_position_embeddings"] = 8
    layer = na.MultiHeadAttention(
        dims[0], H, num_kv_heads=Hkv, head_dim=E, kdim=dims[1], vdim=dims[2], bias=bool(rng.random() < 0.8),
        rotary=rotary, dropout=0.3, dtype=np.float64, rng=int(rng.integers(100)), backend="reference",
    )  # fmt: skip
    for x in layer.parameters().values():
        x[...] = rng.standard_normal(x.shape) / np.sqrt(x.shape[-1])
    L = int(rng.integers(1, 20))
    S = L if is_self else int(rng.integers(1, 20))
    if packed:
        query, key, value = rng.standard_normal((L, dims[0])), None, None
        cuts = np.sort(rng.integers(0, L + 1, size=2))
        more = {"cu_seqlens": [0, *cuts, L]} | some(rng, is_causal=True, sinks=rng.standard_normal(H))
        if rotary is not None:
            more |= some(rng, positions=rng.integers(0, 50, size=L))
        return layer, (query, key, value), more
    B = tuple(int(x) for x in rng.integers(1, 4, size=rng.integers(0, 3)))
    shapes = [(*B, L, dims[0]), (*B, S, dims[1]), (*B, S, dims[2])]
    if B and rng.random() < 0.3:
        shapes[1:] = [(1, *shape[1:]) for shape in shapes[1:]]
    query, key, value = (rng.standard_normal(shape) for shape in shapes)
    if is_self:
        key = value = None
    elif dims[1] == dims[2] and rng.random() < 0.5:
        value = None
    more = some(
        rng, is_causal=[True, "bottom-right"][rng.integers(2)], window=(3, None), key_lengths=rng.integers(0, S + 1, B),
        mask=rng.random((H, L, S)) < 0.7, bias=rng.standard_normal((1, L, S)), sinks=rng.standard_normal(H),
        query_offset=rng.integers(-3, 5, B), training=True, seed=5,
    )  # fmt: skip
    if "training" in more:
        more["seed"] = 5
    else:
        more.pop("seed", None)
    if "key_lengths" not in more:
        more |= some(rng, key_padding_mask=rng.random((*B, S)) < 0.3)
    if rng.random() < 0.2:
        more |= {"score_mod": tilt, "mod_args": (rng.standard_normal(H), 0.1)}
    if rotary is not None and rng.random() < 0.4:
        of_queries = rng.integers(0, 50, size=(*B, L) if rng.random() < 0.6 else L)
        of_keys = rng.integers(0, 50, size=(*B, S) if rng.random() < 0.6 else S)
        more["positions"] = of_queries if is_self else (of_queries, of_keys)
    return layer, (query, key, value), more


def check(seed):
    rng = np.random.default_rng(seed)
    layer, inputs, more = call_of(rng)
    want, ctx = layer.forward(*inputs, **more)
    over_blocks = dict(more)
    for name in ("mask", "bias"):
        if isinstance(more.get(name), np.ndarray) and "key_padding_mask" not in more and rng.random() < 0.5:
            over_blocks[name] = lazy(rng, more[name])
    blocks = [None if x is None else lazy(rng, x) for x in inputs]
    if inputs[1] is not None and rng.random() < 0.2:
        blocks[0] = inputs[0]
    parameters = {name: x.copy() for name, x in layer.parameters().items()}
    of_a_block = int(rng.integers(1, layer.num_heads + 1)) if rng.random() < 0.5 else layer.num_heads
    with nad.heads_per_block(of_a_block):
        out, lazy_ctx = layer.forward(*blocks, **over_blocks)
    assert isinstance(out, da.Array)
    assert (out.shape, out.dtype) == (want.shape, want.dtype)
    for x in layer.parameters().values():  # a call has the parameters of its time
        x += 1
    assert errors(out.compute(), want) < 1e-12
    grad_out = rng.standard_normal(want.shape)
    mod_grads = {"mod_grads": "all"} if "score_mod" in more else {}
    grads = layer.backward(lazy(rng, grad_out), lazy_ctx, **mod_grads)
    assert list(layer.grads) == list(parameters)
    grads, of_parameters = dask.compute(grads, layer.grads)
    for name, x in layer.parameters().items():
        x[...] = parameters[name]
    wanted = layer.backward(grad_out, ctx, **mod_grads)
    for name in na.Gradients._fields:
        got, right = getattr(grads, name), getattr(wanted, name)
        assert (got is None) == (right is None), name
        if got is not None:
            assert errors(*((got[0], right[0]) if name == "mod_args" else (got, right))) < 1e-12, name
    for name, right in layer.grads.items():
        assert errors(of_parameters[name], right) < 1e-12, name


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_any_chunks_and_options(seed):
    check(seed)


def test_gradients_by_finite_differences():
    rng = np.random.default_rng(0)
    layer = na.MultiHeadAttention(8, 2, rotary=True, dtype=np.float64, rng=0)
    x, direction = rng.standard_normal((2, 2, 11, 8))
    chunks = (1, 4, 8)

    def loss():
        return float((layer(da.from_array(x, chunks=chunks), is_causal=True) * direction).sum().compute())

    _, ctx = layer.forward(da.from_array(x, chunks=chunks), is_causal=True)
    grad = layer.backward(da.from_array(direction, chunks=chunks), ctx).query.compute()
    for array, gradient in ((x, grad), *((layer.parameters()[n], g.compute()) for n, g in layer.grads.items())):
        where = np.unravel_index(np.argmax(np.abs(gradient)), gradient.shape)
        values = []
        for step in (1e-5, -2e-5):
            array[where] += step
            values.append(loss())
        array[where] += 1e-5
        np.testing.assert_allclose((values[0] - values[1]) / 2e-5, gradient[where], rtol=1e-6)


def test_what_dask_arrays_are_refused():
    layer = na.MultiHeadAttention(8, 2, rng=0)
    x = da.zeros((2, 10, 8), chunks=(1, 4, 8), dtype=np.float32)
    y, ctx = layer.forward(x)
    with pytest.raises(ValueError, match="need_weights must be False for arrays of Dask"):
        layer(x, need_weights=True)
    with pytest.raises(TypeError, match=r"query must be a numpy\.ndarray"):
        layer(x, cache=na.KVCache(2, 2, 16, 4))
    with pytest.raises(TypeError, match="key_padding_mask is needed to build the graph"):
        layer(x, key_padding_mask=da.zeros((2, 10), dtype=bool))
    with pytest.raises(TypeError, match="query must have the dtype of the layer"):
        layer(x.astype(np.float64))
    with pytest.raises(ValueError, match="query must have shape"):
        layer(x[..., :7])
    with pytest.raises(ValueError, match="query has chunks of unknown size"):
        layer(x[x[:, 0, 0] > 0])
    with pytest.raises(ValueError, match="key must be given where value is"):
        layer(x, None, x)
    with pytest.raises(ValueError, match="grad_out"):
        layer.backward(y[:, 1:], ctx)
    with pytest.raises(ValueError, match="ctx must come from forward of the same layer"):
        na.MultiHeadAttention(8, 2, rng=0).backward(y, ctx)
    with pytest.raises(ValueError, match="positions must be None for a layer without rotary="):
        layer(x, positions=np.arange(10))


def test_names_are_those_of_inputs_and_parameters():
    layer = na.MultiHeadAttention(8, 2, rng=0)
    x = da.zeros((2, 10, 8), chunks=(1, 4, 8), dtype=np.float32)
    assert layer(x).name == layer(x).name != layer(x, is_causal=True).name
    before = layer(x).name
    layer.parameters()["out_proj.bias"][0] += 1
    assert layer(x).name != before


@pytest.mark.parametrize(("heads_of_a_block", "blocks_of_query"), [(2, 4), (1, 8), (3, 3), (8, 1)])
def test_no_task_has_the_parameters_of_more_than_one_block_of_heads(heads_of_a_block, blocks_of_query):
    layer = na.MultiHeadAttention(32, 8, num_kv_heads=4, rotary=True, rng=0)
    x = da.zeros((2, 40, 32), chunks=(1, 11, 32), dtype=np.float32)
    with nad.heads_per_block(heads_of_a_block):
        y, ctx = layer.forward(x, is_causal=True)
    layer.backward(y, ctx)
    weights = {ctx.parameters[name].name for name in layer.parameters() if name.endswith("weight")}
    graph = {}
    for lazies in (y, *layer.grads.values()):
        graph |= dict(lazies.__dask_graph__())
    seen = set()
    for key, task in graph.items():
        of_parameters = {k for k in getattr(task, "dependencies", ()) if k[0] in weights}
        assert len(of_parameters) <= 1, key
        seen |= of_parameters
    assert len([key for key in seen if key[0] == ctx.parameters["q_proj.weight"].name]) == blocks_of_query
    rows = max(ctx.parameters["q_proj.weight"].chunks[0])
    assert rows <= -(-heads_of_a_block // 2) * 2 * 4
    for name, x in layer.parameters().items():
        assert layer.grads[name].shape == x.shape
    for number, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="number must be"), nad.heads_per_block(number):
            pass
