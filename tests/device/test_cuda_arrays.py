"""Arrays of other libraries on a device: what is taken, where it runs, and what comes back.

The device is the host, its kernels are the reference backend, and the libraries are fakes; `test_cuda_interop.py` has
the real ones. What only a real device can show, that nothing on the host touches its memory, a subprocess shows here
with memory that may not be read.
"""

import gc
import subprocess
import sys
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import numba_attention as na
from cases import CASES, DTYPES, check, check_backward
from device import (
    ByDLPack,
    CupyArray,
    Fake,
    HostDriver,
    Interface,
    JaxArray,
    NumbaArray,
    Tensor,
    fake_cupy,
    fake_jax,
    fake_torch,
    install,
)
from numba_attention.backends import cuda as backend
from numba_attention.device import arrays, runtime
from numba_attention.device.dlpack import Exported, read
from numba_attention.device.headers import header, held, stored

RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal((2, heads, 7, 8), dtype=np.float32) for heads in (4, 2, 2))


@pytest.fixture
def libraries(monkeypatch, device):
    """Fakes of every library, and what each is."""
    made = {"torch": fake_torch(), "cupy": fake_cupy(), "jax": fake_jax()}
    install(monkeypatch, **made)
    return types.SimpleNamespace(**made)


KINDS = {"torch": Tensor, "cupy": CupyArray, "jax": JaxArray, "numba": NumbaArray}
RESULTS = {**{name: (kind, kind) for name, kind in KINDS.items()}, "interface": (Interface, NumbaArray),
           "dlpack": (ByDLPack, NumbaArray)}  # fmt: skip


@pytest.fixture(params=RESULTS)
def kinds(request, libraries):
    """A kind of array, and the kind of its results."""
    return RESULTS[request.param]


def equal(got, want, kind):
    assert type(got) is kind
    assert held(got.array) is not None
    assert got.array.dtype == want.dtype
    np.testing.assert_array_equal(got.array, want)


# One call of every function, for every kind.


def test_attention(kinds):
    give, get = kinds
    want, want_lse = na.attention(Q, K, V, is_causal=True, return_lse=True, backend="reference")
    out, lse = na.attention(give(Q), give(K), give(V), is_causal=True, return_lse=True)
    equal(out, want, get)
    equal(lse, want_lse, get)
    equal(na.attention(give(Q), give(K), give(V), is_causal=True), want, get)


def test_matrices(kinds):
    """Two axes in, two out: a view of what was made."""
    give, get = kinds
    one = Q[0, 0]
    out, lse = na.attention(*map(give, (one, one, one)), return_lse=True)
    want, want_lse = na.attention(one, one, one, return_lse=True, backend="reference")
    equal(out, want, get)
    equal(lse, want_lse, get)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(kinds, dtype):
    give, get = kinds
    if give is Interface and dtype == "bfloat16":
        pytest.skip("the interface has no letter for it")
    x = Q.astype(DTYPES[dtype])
    equal(na.attention(give(x), give(x), give(x)), na.attention(x, x, x, backend="reference"), get)


def test_backward(kinds):
    give, get = kinds
    bias, sinks = RNG.standard_normal((4, 1, 7)), np.ones(4, np.float32)
    key = K[:1]  # broadcast over sequences: its gradient is summed
    out, lse = na.attention(Q, key, V, bias=bias, sinks=sinks, return_lse=True, backend="reference")
    grad = np.ones_like(out)
    want = na.attention_backward(grad, Q, key, V, out, lse, bias=bias, sinks=sinks, backend="reference")
    there = [give(x) for x in (grad, Q, key, V, out, lse)]
    got = na.attention_backward(*there, bias=give(bias), sinks=give(sinks))
    assert type(got) is na.Gradients
    assert got.mod_args is want.mod_args is None
    for a, b in zip(got[:5], want[:5], strict=True):
        equal(a, b, get)


def test_varlen(kinds):
    give, get = kinds
    x = RNG.standard_normal((11, 2, 8), dtype=np.float32)
    starts = np.array([0, 4, 4, 11], np.int32)
    out, lse = na.attention_varlen(x, x, x, starts, starts, return_lse=True, backend="reference")
    got, got_lse = na.attention_varlen(*map(give, (x, x, x, starts, starts)), return_lse=True)
    equal(got, out, get)
    equal(got_lse, lse, get)
    want = na.attention_varlen_backward(out, x, x, x, out, lse, starts, starts, backend="reference")
    grads = na.attention_varlen_backward(*map(give, (out, x, x, x, out, lse)), give(starts), starts.tolist())
    for a, b in zip(grads[:3], want[:3], strict=True):
        equal(a, b, get)
    assert grads.bias is grads.sinks is None


def test_weights(kinds):
    give, get = kinds
    want = na.attention_weights(Q, K, heads=[1, 3], rows=slice(2, 5), backend="reference")
    equal(na.attention_weights(give(Q), give(K), heads=give(np.array([1, 3])), rows=slice(2, 5)), want, get)


def test_decode(kinds):
    give, get = kinds
    host, there = na.KVCache.from_arrays(K, V, [7, 5]), na.KVCache.from_arrays(give(K), give(V), [7, 5])
    query = Q[:, :, :2]
    want, want_lse = na.attention_decode(query, host, return_lse=True, backend="reference")
    got, lse = na.attention_decode(give(query), there, return_lse=True)
    equal(got, want, get)
    equal(lse, want_lse, get)
    np.testing.assert_array_equal(na.attention_decode(query, there), want)  # results are where the query is
    assert type(there.key) is give
    assert there.key.shape == (2, 2, 7, 8)


def test_decode_pages(kinds):
    give, get = kinds
    pages = RNG.standard_normal((2, 6, 2, 4, 8), dtype=np.float32)
    table, lengths = np.array([[3, 1], [5, -1]]), np.array([7, 3])
    host = na.PagedKVCache.from_arrays(*pages, table, lengths)
    there = na.PagedKVCache.from_arrays(*map(give, (*pages, table, lengths)))
    query = Q[:, :, :1]
    equal(na.attention_decode(give(query), there), na.attention_decode(query, host, backend="reference"), get)
    equal(
        na.attention_decode(give(query[:1]), there, ids=[1]),
        na.attention_decode(query[:1], host, ids=[1], backend="reference"),
        get,
    )


@pytest.mark.parametrize("option", ["mask", "bias"])
def test_decode_tree(kinds, option):
    """A mask over the newest keys only is made as wide as the cache."""
    give, get = kinds
    query, square = Q[:, :, :3], np.tril(np.ones((3, 3)))
    given = {option: square.astype(bool if option == "mask" else np.float32)}
    host, there = na.KVCache.from_arrays(K, V), na.KVCache.from_arrays(give(K), give(V))
    want = na.attention_decode(query, host, is_causal=False, backend="reference", **given)
    there_given = {name: give(x) for name, x in given.items()}
    equal(na.attention_decode(give(query), there, is_causal=False, **there_given), want, get)


def test_merge(kinds):
    give, get = kinds
    parts = [na.attention(Q, K[:, :, s], V[:, :, s], return_lse=True) for s in (slice(0, 3), slice(3, 7))]
    outs, lses = ([part[n] for part in parts] for n in (0, 1))
    out, lse = na.merge_attention([give(x) for x in outs], [give(x) for x in lses])
    want, want_lse = na.merge_attention(outs, lses)
    equal(out, want, get)
    equal(lse, want_lse, get)
    grads = na.merge_attention_backward(give(want), None, [give(x) for x in outs], [give(x) for x in lses])
    for got, wanted in zip(grads, na.merge_attention_backward(want, None, outs, lses), strict=True):
        assert type(got) is list
        for a, b in zip(got, wanted, strict=True):
            equal(a, b, get)


def test_out(kinds):
    give, _ = kinds
    out = give(np.zeros_like(Q))
    if give is JaxArray:
        with pytest.raises(ValueError, match="out must be writeable"):
            na.attention(give(Q), give(K), give(V), out=out)
        return
    found, lse = na.attention(give(Q), give(K), give(V), out=out, return_lse=True)
    assert found is out
    assert type(lse) is kinds[1]
    np.testing.assert_array_equal(out.array, na.attention(Q, K, V, backend="reference"))
    with pytest.raises(ValueError, match="out must have shape"):
        na.attention(give(Q), give(K), give(V), out=give(Q[:1]))
    with pytest.raises(TypeError, match=r"out must be on the GPU as query is, got numpy\.ndarray"):
        na.attention(give(Q), give(K), give(V), out=np.zeros_like(Q))
    with pytest.raises(ValueError, match="out must not overlap an input, it shares memory with query"):
        na.attention(out, give(K), give(V), out=out)


def test_options(kinds):
    """Wherever each of them is."""
    give, get = kinds
    options = {
        "mask": RNG.random((7, 7)) < 0.8,
        "bias": RNG.standard_normal((4, 1, 7)),
        "query_lengths": np.array([7, 4], np.int32),
        "key_lengths": np.array([5, 7]),
        "query_offset": np.array([1, 0]),
        "alibi_slopes": np.array([0.5, 0.25, 0.125, 0.0625], np.float32),
        "sinks": np.ones(4, np.float32),
    }
    want = na.attention(Q, K, V, **options, backend="reference")
    there = {name: give(x) for name, x in options.items()}
    for chosen in (options, there, {name: x.tolist() for name, x in options.items()}):
        equal(na.attention(give(Q), give(K), give(V), **chosen), want, get)


def test_rules_and_block_masks(kinds):
    """Arrays that a rule reads may be anywhere, and numbers too; a mask by blocks has a form of its own."""

    def rule(score, batch, head, i, j, slopes, factor):
        return score * factor - slopes[head] * abs(i - j)

    give, get = kinds
    slopes, factor = np.array([0.5, 0.25, 0.125, 0.0625], np.float32), np.array(0.75)
    options = {"score_mod": rule, "mask": na.BlockMask.causal(7, 7)}
    want = na.attention(Q, K, V, **options, mod_args=(slopes, 0.75), backend="reference")
    for mod_args in ((slopes, 0.75), (give(slopes), 0.75), (give(slopes), give(factor))):
        equal(na.attention(give(Q), give(K), give(V), **options, mod_args=mod_args), want, get)
    square = give(np.ones((4, 4), np.float32))
    strided = type(square).of(square.header.T)
    with pytest.raises(ValueError, match=r"mod_args\[0\] must be contiguous if it is on a GPU, got strides"):
        na.attention(give(Q), give(K), give(V), score_mod=rule, mod_args=(strided, 1.0))
    tree = na.BlockMask.from_array(np.tri(3, dtype=bool))
    host, there = na.KVCache.from_arrays(K, V), na.KVCache.from_arrays(give(K), give(V))
    want = na.attention_decode(Q[:, :, :3], host, mask=tree, is_causal=False, backend="reference")
    equal(na.attention_decode(give(Q[:, :, :3]), there, mask=tree, is_causal=False), want, get)


def test_empty_arrays(kinds):
    give, get = kinds
    none = np.zeros((2, 4, 0, 8), np.float32)
    equal(na.attention(give(none), give(none), give(none)), none, get)
    want = na.attention(Q, none, none, backend="reference")
    equal(na.attention(give(Q), give(none), give(none)), want, get)


# NumPy on the device.


@pytest.mark.parametrize("case", CASES, ids=str)
def test_arrays_of_numpy_go_there_and_back(device, case):
    """Every option, layout and shape; the memory is all given back."""
    gc.freeze()  # collecting what other tests have imported takes half a second
    check(*case.arrays(), case.kwargs(), "float32", case, backend="cuda")
    gc.collect()
    gc.unfreeze()
    assert not device.allocations


@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_gradients_of_numpy(device, case):
    check_backward(case, "float32", "cuda")


def test_numpy_out(device):
    out = np.zeros_like(Q)
    found, _ = na.attention(Q, K, V, out=out, return_lse=True, backend="cuda")
    assert found is out
    np.testing.assert_array_equal(out, na.attention(Q, K, V, backend="reference"))
    one = Q[0, 0].copy()
    into = np.zeros_like(one)
    assert na.attention(one, one, one, out=into, backend="cuda") is into
    np.testing.assert_array_equal(into, na.attention(one, one, one, backend="reference"))
    apart = np.zeros((2, 4, 7, 16), np.float32)[..., ::2]
    assert na.attention(Q, K, V, out=apart, backend="cuda") is apart
    np.testing.assert_array_equal(apart, out)
    x = Q.copy()
    with pytest.raises(ValueError, match="shares memory with query"):
        na.attention(x, K, V, out=x, backend="cuda")
    x.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        na.attention(Q, K, V, out=x, backend="cuda")
    with pytest.raises(TypeError, match="out must be a"):
        na.attention(Q, K, V, out=[1], backend="cuda")


def test_numpy_caches(device):
    for storage in (None, "float16", "int8", "float8"):
        cache = na.KVCache(2, 2, 20, 8, storage=storage)
        cache.append(K, V, lengths=[7, 4])
        want = na.attention_decode(Q[:, :, :2], cache, backend="reference")
        np.testing.assert_array_equal(na.attention_decode(Q[:, :, :2], cache, backend="cuda"), want)
        pages = na.PagedKVCache(6, 4, 2, 8, storage=storage)
        pages.append(pages.add(2), K, V, lengths=[7, 4])
        np.testing.assert_array_equal(na.attention_decode(Q[:, :, :2], pages, backend="cuda"), want)


def test_same_array_is_copied_once(device):
    na.attention(Q, Q, Q, backend="cuda")
    assert [kind for kind, _, _ in device.copies] == ["write", "read"]


def test_what_repeats_is_copied_once(device):
    mask = np.broadcast_to(RNG.random((1, 7, 1)) < 0.5, (4, 7, 7))
    na.attention(Q, Q, Q, mask=mask, backend="cuda")
    assert ("write", 7, 1) in device.copies


# Families, mixed, and devices.


def test_result_is_of_the_family_of_query(libraries):
    want = na.attention(Q, K, V, backend="reference")
    equal(na.attention(Tensor(Q), CupyArray(K), V), want, Tensor)
    equal(na.attention(CupyArray(Q), Tensor(K), JaxArray(V)), want, CupyArray)
    np.testing.assert_array_equal(na.attention(Q, Tensor(K), V), want)


def test_devices_must_agree(kinds, device):
    give, _ = kinds
    if give in (Tensor, ByDLPack):
        with pytest.raises(ValueError, match="query and key must be on one GPU: query is on GPU 0, key is on GPU 1"):
            na.attention(give(Q, 0), give(K, 1), give(V, 0))
        with pytest.raises(ValueError, match="query and mask must be on one GPU"):
            na.attention(give(Q, 0), K, V, mask=give(np.ones((7, 7), bool), 1))
        with pytest.raises(ValueError, match="key and value must be on one GPU"):
            na.KVCache.from_arrays(give(K, 0), give(V, 1))


def test_the_device_of_the_arrays_is_used(kinds, device):
    give, _get = kinds
    out = na.attention(*(give(x, 1) for x in (Q, K, V)))
    assert out.ordinal == 1
    assert device.current() == 0
    cache = na.KVCache.from_arrays(give(K, 1), give(V, 1))
    assert na.attention_decode(give(Q[:, :, :1], 1), cache).ordinal == 1


def test_stream_of_torch(libraries, device, monkeypatch):
    seen = []
    forward = backend.forward
    monkeypatch.setattr(backend, "forward", lambda p: (seen.append(runtime.stream()), forward(p))[1])
    monkeypatch.setitem(sys.modules, "torch", fake_torch(stream=0x1234))
    na.attention(Tensor(Q), Tensor(K), Tensor(V))
    monkeypatch.setitem(sys.modules, "torch", fake_torch(stream=0))
    na.attention(Tensor(Q), Tensor(K), V, mask=np.ones((7, 7), bool))
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(stream=0x77))
    na.attention(CupyArray(Q), CupyArray(K), CupyArray(V))
    na.attention(Q, K, V, backend="cuda")
    assert seen == [0x1234, 1, 0x77, 1]
    assert runtime.stream() == 1
    assert not device.waits


def test_the_stream_of_cupy_is_that_of_the_arrays_device(libraries, device, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(streams={0: 5, 1: 6}))
    for ordinal in (0, 1):
        na.attention(CupyArray(Q, ordinal), K, V)
    assert [stream for _, _, stream in device.copies] == [5, 5, 6, 6]


def test_streams_of_others_wait(libraries, device, monkeypatch):
    """Inputs on other streams: this one waits for them, and they for it, or they might be freed too soon."""
    monkeypatch.setitem(sys.modules, "torch", fake_torch(stream=5))
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(stream=9))
    key, value, mask = CupyArray(K), Interface(V), Interface(np.ones((7, 7), bool))
    value.more = {"stream": 11}
    na.attention(Tensor(Q), key, value, mask=mask)
    assert device.waits[:2] == [(5, 9), (5, 11)]
    assert sorted(device.waits[2:]) == [(9, 5), (11, 5)]


def test_stream_of_the_interface(libraries, device):
    query = Interface(Q)
    query.more = {"stream": 42}
    na.attention(query, Interface(K), ByDLPack(V))
    assert {stream for _, _, stream in device.copies} <= {42}
    value = ByDLPack(V)
    out = na.attention(query, Interface(K), value)
    assert value.streams == (42,)
    assert out.__cuda_array_interface__["stream"] == 42  # for whoever takes it next


def test_uploads_are_freed_on_the_stream_of_the_call(libraries, device, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", fake_torch(stream=5))
    query = Tensor(Q)
    gc.collect()
    device.frees.clear()
    na.attention(query, K, V)
    gc.collect()
    assert [stream for _, stream in device.frees if stream == 5] == [5, 5]


def test_jax_waits(libraries, device):
    query = JaxArray(Q)
    na.attention(query, query, query)
    assert query.waited
    assert device.synchronized
    device.synchronized.clear()
    na.attention(Tensor(Q), JaxArray(K), V)
    assert device.synchronized == [1]


def test_results_outlive_the_call(libraries, device):
    out = na.attention(JaxArray(Q), JaxArray(K), JaxArray(V))
    want = na.attention(Q, K, V, backend="reference")
    gc.collect()
    equal(out, want, JaxArray)
    del out
    gc.collect()
    assert not device.allocations


# What is taken.


def test_interface(device):
    x = Interface(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    found = arrays.take(x)
    assert found.ctypes.data == x.header.ctypes.data
    assert held(found[1:].T.reshape(4, 3)).owner is x
    x.more = {"strides": None, "version": 2}
    np.testing.assert_array_equal(arrays.take(x), x.array)
    flipped = Interface.of(x.header[::-1, :, ::2])
    np.testing.assert_array_equal(arrays.take(flipped), flipped.array)
    wide = Interface.of(np.broadcast_to(x.header[:, :1], (2, 5, 4)))
    assert arrays.take(wide).strides == (48, 0, 4)
    address = x.header.ctypes.data
    x.more = {"data": (address, True)}
    assert not arrays.take(x).flags.writeable
    x.more = {"mask": object()}
    with pytest.raises(TypeError, match="masked"):
        arrays.take(x)
    with pytest.raises(TypeError, match="query: a masked array"):
        na.attention(x, x, x)


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.bool_, np.int32, np.uint8]
)
def test_dlpack(device, dtype):
    x = Fake((RNG.random((3, 4, 5)) * 10).astype(dtype))
    for array in (x.header, x.header[::-1, 1:], x.header.T, x.header[..., ::2], x.header[:0], x.header[0, 0, 0]):
        exported = Exported(np.asarray(array) if np.ndim(array) else np.lib.stride_tricks.as_strided(x.header, (), ()))
        found = read(exported.__dlpack__(), exported)
        assert found.dtype == dtype
        assert found.shape == np.shape(array)
        if found.size:
            np.testing.assert_array_equal(found, array)


def test_dlpack_is_freed(device):
    from numba_attention.device import dlpack

    before = len(dlpack._lent)
    x = Fake(Q)
    capsule = Exported(x.header).__dlpack__()
    assert len(dlpack._lent) == before + 1
    found = read(capsule, None)
    del x, capsule
    gc.collect()
    assert len(device.allocations) == 1
    del found
    gc.collect()
    assert len(dlpack._lent) == before
    assert not device.allocations


def test_dlpack_is_understood_by_numpy(device):
    """A real consumer: it renames the capsule and calls the deleter."""
    from numba_attention.device import dlpack

    class OnHost(Exported):
        def __dlpack_device__(self):
            return 1, 0

        def __dlpack__(self, **kwargs):
            capsule = super().__dlpack__(**kwargs)
            dlpack._Managed.from_address(dlpack._pointer_of(capsule, b"dltensor")).tensor.device.kind = 1
            return capsule

    before = len(dlpack._lent)
    x = Fake(np.arange(12.0).reshape(3, 4))
    found = np.from_dlpack(OnHost(x.header[:, ::2]))
    np.testing.assert_array_equal(found, x.array[:, ::2])
    assert len(dlpack._lent) == before + 1
    del found
    gc.collect()
    assert len(dlpack._lent) == before


def test_dlpack_is_understood_by_torch(device, torch):
    class OnHost(Exported):
        def __dlpack_device__(self):
            return 1, 0

        def __dlpack__(self, **kwargs):
            from numba_attention.device import dlpack

            capsule = super().__dlpack__(**kwargs)
            dlpack._Managed.from_address(dlpack._pointer_of(capsule, b"dltensor")).tensor.device.kind = 1
            return capsule

    x = Fake(Q.astype(ml_dtypes.bfloat16))
    found = torch.from_dlpack(OnHost(x.header))
    assert found.dtype == torch.bfloat16
    np.testing.assert_array_equal(found.float().numpy(), x.array.astype(np.float32))


def test_dlpack_of_nothing(device):
    """An array without elements has no address, whatever its header has."""
    from numba_attention.device import dlpack

    capsule = Exported(Fake(np.zeros((2, 0, 3), np.float32)).header).__dlpack__()
    tensor = dlpack._Managed.from_address(dlpack._pointer_of(capsule, b"dltensor")).tensor
    assert tensor.data is None
    assert [tensor.shape[n] for n in range(3)] == [2, 0, 3]


def test_dlpack_of_torch_is_read(device, torch):
    x = torch.arange(24, dtype=torch.bfloat16).reshape(2, 3, 4).transpose(0, 2)[1:]
    found = read(x.__dlpack__(), x)
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), x.float().numpy())


def test_bfloat16_needs_ml_dtypes(libraries, monkeypatch):
    tensor = Tensor(Q.astype(ml_dtypes.bfloat16))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match=r"query: bfloat16 arrays need ml_dtypes.*numba-attention\[bfloat16\]"):
        na.attention(tensor, tensor, tensor)


def test_tensors_that_cannot_be_taken(libraries):
    tensor = Tensor(Q)
    tensor.requires_grad = True
    with pytest.raises(TypeError, match=r"query: a tensor that requires a gradient .*detach"):
        na.attention(tensor, tensor, tensor)
    tensor.requires_grad, tensor.layout = False, "sparse"
    with pytest.raises(TypeError, match=r"query: a tensor of layout sparse"):
        na.attention(tensor, tensor, tensor)


def test_wrong_arguments_are_named(kinds):
    give, _ = kinds
    with pytest.raises(TypeError, match="query must have dtype float32"):
        na.attention(give(Q.astype(np.int32)), give(K), give(V))
    with pytest.raises(TypeError, match="share one dtype"):
        na.attention(give(Q), give(K.astype(np.float16)), give(V))
    with pytest.raises(ValueError, match="value must have the heads and length of key"):
        na.attention(give(Q), give(K), give(V[:, :, :3]))
    with pytest.raises(TypeError, match=r"key must be a numpy\.ndarray or an array on a GPU, got builtins\.list"):
        na.attention(give(Q), [1.0], give(V))
    with pytest.raises(TypeError, match="mask must be boolean"):
        na.attention(give(Q), give(K), give(V), mask=np.ones((7, 7)))
    with pytest.raises(TypeError, match="mask must be boolean"):
        na.attention(give(Q), give(K), give(V), mask=give(np.ones((7, 7))))
    with pytest.raises(ValueError, match="key_lengths must lie between 0 and 7"):
        na.attention(give(Q), give(K), give(V), key_lengths=give(np.array([8, 1])))
    with pytest.raises(TypeError, match="bias must be floating point"):
        na.attention(give(Q), give(K), give(V), bias=np.ones((7, 7), object))


def test_hosts_refuse_arrays_of_a_device(kinds):
    give, _ = kinds
    for arguments in ((give(Q), K, V), (Q, give(K), V), (give(Q), give(K), give(V))):
        with pytest.raises(TypeError, match=r"(query|key) is on a GPU \(device\.\w+\), and this call runs on the host"):
            na.attention(*arguments, backend="cpu")
    with pytest.raises(TypeError, match="mask is on a GPU"):
        na.attention(Q, K, V, mask=give(np.ones((7, 7), bool)))
    with pytest.raises(TypeError, match="key_lengths is on a GPU"):
        na.attention(Q, K, V, key_lengths=give(np.array([1, 1])))
    with pytest.raises(TypeError, match="out is on a GPU"):
        na.attention(Q, K, V, out=give(Q))
    with pytest.raises(TypeError, match="the cache is on a GPU"):
        na.attention_decode(Q[:, :, :1], na.KVCache.from_arrays(give(K), give(V)), backend="cpu")


def test_caches_are_on_one_side(kinds):
    give, _ = kinds
    cache = na.KVCache.from_arrays(give(K), give(V), 4)
    pages = na.PagedKVCache.from_arrays(give(K), give(V), [[0], [1]], 4)
    if give is JaxArray:
        for attempt in (lambda: cache.append(K[:, :, :1], V[:, :, :1]), lambda: cache.reorder([1, 0]),
                        lambda: pages.append([0, 1], K[:, :, :1], V[:, :, :1])):  # fmt: skip
            with pytest.raises(ValueError, match="made from read-only arrays"):
                attempt()
    assert pages.fork(0) == 2
    cache.truncate([3, 4])
    pages.truncate(0, 2)
    assert pages.lengths().tolist() == [2, 4, 4]
    with pytest.raises(TypeError, match="key and value must both be on the GPU"):
        na.KVCache.from_arrays(give(K), V)


def test_out_of_memory(device, libraries):
    device.limit = 1000
    with pytest.raises(MemoryError, match="1,792 bytes could not be had on GPU 0"):
        na.attention(Q, K, V, backend="cuda")


def test_errors_leave_no_trace(device, libraries, monkeypatch):
    def fail(problem):
        raise KeyError("kernel")

    monkeypatch.setattr(backend, "forward", fail)
    monkeypatch.setitem(sys.modules, "torch", fake_torch(stream=5))
    with pytest.raises(KeyError):
        na.attention(Tensor(Q, 1), Tensor(K, 1), V)
    arrays._torch._kinds.clear()  # a number for each kind of result
    gc.collect()
    assert (runtime.stream(), device.current()) == (1, 0)
    assert not device.allocations


def test_show_config_names_devices(device):
    found = na.show_config("dicts")
    assert list(found["GPUs"]) == ["GPU 0", "GPU 1"]
    assert found["GPUs"]["GPU 1"] == "a host that plays a GPU, compute capability 9.0, 132 multiprocessors, for sm_90a"
    assert found["Backends"]["cuda"] == "usable"


def test_nothing_on_a_gpu():
    for x in (1, 1.5, "x", None, Q, [Q], object(), np.float32(1)):
        assert not arrays.on_device(x)


def test_no_library_is_imported():
    code = """
import sys, numba_attention as na, numpy as np
x = np.ones((2, 3), np.float32)
na.attention(x, x, x, backend="reference")
print([name for name in sys.modules if name.split(".")[0] in ("cuda", "numba_cuda", "torch", "cupy", "jax")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


UNTOUCHABLE = (
    f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1] / "support")!r})"""
    + """
import ctypes, mmap
import numpy as np, numba_attention as na
from device import HostDriver, Interface, NumbaArray, fake_numba_cuda
from numba_attention.backends import cuda
from numba_attention.cuda import kernels
from numba_attention.device import runtime
from numba_attention.device.driver import Kernel
from numba_attention.device.headers import header
import numba
import ml_dtypes

SIZE = 2**24
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
start = libc.mmap(None, SIZE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
assert start not in (None, 2**64 - 1)


class Memory:
    def __init__(self, address):
        self.address = address


class Nowhere(HostDriver):
    '''Its memory can be neither read nor written, as that of a GPU.'''
    taken = 0

    def allocate(self, size, stream):
        at, self.taken = self.taken, self.taken + -(-size // 256) * 256
        assert self.taken <= SIZE
        return Memory(start + at)

    def ordinal_of(self, address):
        return 0

    def write(self, address, array, stream):
        np.ascontiguousarray(array).sum()  # the host's side is read

    def read(self, array, address, stream):
        array.reshape(-1).view(np.uint8)[:] = 0


class There(NumbaArray):
    def __init__(self, shape, dtype=np.float32):
        self.header = runtime.empty(shape, dtype, 1)


runtime.driver = Nowhere()
numba.cuda = type("cuda", (), {
    "device_array": staticmethod(lambda shape, dtype, stream: There(shape, dtype)),
    "as_cuda_array": staticmethod(lambda exported, sync: There.of(exported._array)),
})
for name in ("forward", "weights"):
    setattr(cuda, name, lambda problem: None)
kernels.compiled = lambda c: Kernel(c.name, b"", c.threads, 0, ())


def backward(problem):
    if problem.bias_shape is not None:
        problem.bias = runtime.empty(problem.bias_shape, np.float32, runtime.stream())
    if problem.mod_grads:
        problem.mod_args = [problem.empty((4,), np.float32)]
    if problem.forward.sinks is not None:
        problem.sinks = runtime.empty((problem.forward.H,), np.float32, runtime.stream())


cuda.backward = backward
cuda.reduce = lambda x, shape, dtype, empty: empty(shape, dtype)
if "touch" in sys.argv:
    There((3,)).header.sum()
    print("touched")

for dtype in (np.float32, np.float16, np.float64, ml_dtypes.bfloat16):
    lse_dtype = np.float64 if dtype == np.float64 else np.float32
    q, k, v = There((2, 4, 7, 8), dtype), There((2, 2, 9, 8), dtype), There((1, 2, 9, 6), dtype)
    options = dict(mask=There((7, 9), np.bool_), bias=There((4, 1, 9)), sinks=There((4,)), softcap=3, window=(3, None),
                   key_lengths=There((2,), np.int64), is_causal="bottom-right", alibi_slopes=np.ones(4))
    out, lse = na.attention(q, k, v, return_lse=True, **options)
    assert (type(out), out.shape, lse.shape, lse.dtype) == (There, (2, 4, 7, 6), (2, 4, 7), lse_dtype)
    assert na.attention(q, k, v, out=out) is out
    lse4 = lse
    grads = na.attention_backward(out, q, k, v, out, lse, grad_lse=lse, **options)
    assert [g.shape for g in grads[:5]] == [q.shape, k.shape, v.shape, (4, 1, 9), (4,)]
    rules = dict(score_mod=lambda *_: 0.0, mod_args=(There((4,)), There((), np.float64), 2))
    rules["mask"] = na.BlockMask.causal(7, 9)
    na.attention(q, k, v, **rules)
    na.attention_backward(out, q, k, v, out, lse, **rules, mod_grads=[0])
    na.attention_weights(q, k, heads=[1], **options)
    x = There((11, 4, 8), dtype)
    starts = [0, 4, 11]
    options = dict(mask=There((4, 11, 11), np.bool_), bias=There((2, 4, 7, 7)))
    out, lse = na.attention_varlen(x, x, x, starts, starts, **options, return_lse=True)
    na.attention_varlen_backward(out, x, x, x, out, lse, starts, starts, bias=There((2, 4, 7, 7)))
    cache = na.KVCache.from_arrays(There((2, 2, 9, 8), dtype), There((2, 2, 9, 6), dtype), [9, 8])
    na.attention_decode(q, cache, return_lse=True)
    na.attention_decode(q, cache, mask=There((7, 7), np.bool_), bias=There((2, 1, 7, 9)))
    pages = There((5, 2, 4, 8), dtype), There((5, 2, 4, 6), dtype)
    pages = na.PagedKVCache.from_arrays(*pages, [[0, 1], [3, 2]], [8, 7])
    na.attention_decode(q, pages, ids=[1, 0])
    for kind in (np.int8, ml_dtypes.float8_e4m3fn):
        scales = dict(key_scale=There((2, 2, 9)), value_scale=There((2, 2, 9)), dtype=dtype)
        cache = na.KVCache.from_arrays(There((2, 2, 9, 8), kind), There((2, 2, 9, 6), kind), [9, 8], **scales)
        na.attention_decode(q, cache, return_lse=True)
        assert (cache.key_scale.shape, cache.dtype) == ((2, 2, 9), dtype)
    repr(cache), repr(pages), cache.key, cache.lengths
    for window in (None, 6):
        key, value = There((2, 2, 9, 8), np.int8), There((2, 2, 9, 6), np.int8)
        scales = dict(key_scale=There((2, 2, 9)), value_scale=There((2, 2, 9)), dtype=dtype, window=window)
        cache = na.KVCache.from_arrays(key, value, 3, **scales)
        for _ in range(3):
            cache.append(There((2, 2, 2, 8), dtype), There((2, 2, 2, 6), dtype))
        cache.append(There((2, 2, 2, 8), dtype), np.ones((2, 2, 2, 6), dtype), [0, 0])
        cache.reorder([1, 1])
        na.attention_decode(There((2, 4, 1, 8), dtype), cache, window=(3, 0))
        cache._saved(1)()
        pages = There((9, 2, 4, 8), dtype), There((9, 2, 4, 6), dtype)
        pages = na.PagedKVCache.from_arrays(*pages, [[0, 1], [3, 2]], [8, 7], window=window)
        pages.fork(1)
        pages.append([0, 1], There((2, 2, 3, 8), dtype), There((2, 2, 3, 6), dtype), [3, 1])
        na.attention_decode(There((3, 4, 1, 8), dtype), pages, alibi_slopes=np.ones(4))
    na.attention(q, k, v, mask=There((), np.bool_), bias=np.zeros(()))
    na.attention_backward(*[There((2, 4, 7, 6), dtype), q, k, v, There((2, 4, 7, 6), dtype), lse4], bias=There(()))
    n = np.ones((2, 4, 7, 8), dtype)
    na.attention(n, n, n, backend="cuda", mask=np.ones((7, 7), bool)[None, :, :1])
    na.merge_attention([x, x], [There((11, 4), lse_dtype)] * 2)
    na.attention(q, n[:, :2], There((2, 2, 7, 6), dtype))
    for wrong in (lambda: na.attention(q, k, x), lambda: na.attention(q, k, v, mask=There((3,), np.bool_)),
                  lambda: na.attention(q, k, v, out=x), lambda: na.attention(q, k, v, out=There((2, 4, 7, 6), np.int8)),
                  lambda: na.attention(q, k, v, backend="cpu"), lambda: na.attention(q, k, There((2, 2, 9), np.int8))):
        try:
            wrong()
        except (TypeError, ValueError) as error:
            str(error)
        else:
            raise AssertionError
print("untouched")
"""
)


@pytest.mark.skipif(sys.platform == "win32", reason="mmap")
@pytest.mark.parametrize("touch", [False, True])
def test_nothing_on_the_host_touches_memory_of_a_device(touch):
    argv = [sys.executable, "-c", UNTOUCHABLE, *(["touch"] if touch else [])]
    done = subprocess.run(argv, capture_output=True, text=True)
    if touch:  # or the test would show nothing
        assert done.returncode < 0
        assert "touched" not in done.stdout
    else:
        assert done.stdout.strip() == "untouched", done.stderr


def test_headers():
    x = header(4096, (2, 3), None, np.dtype(np.float32), "owner", 1)
    assert (held(x).owner, held(x).device, x.ctypes.data) == ("owner", 1, 4096)
    assert held(x.T[1:][None]) is held(x)
    assert held(np.broadcast_to(x, (4, 2, 3))) is held(x)
    assert stored(np.broadcast_to(x[:1], (4, 2, 3))).shape == (1, 1, 3)
    assert held(np.ones(3)) is None
    none = header(0, (0, 3), None, np.dtype(ml_dtypes.bfloat16), None, 0)
    assert none.dtype == ml_dtypes.bfloat16
    assert held(none) is not None


def test_limits_of_the_stand_in(device):
    """The device of the tests finds what a real one would not forgive."""
    with pytest.raises(AssertionError, match="no memory of this device"):
        device.write(4096, np.ones(3), 1)
    there = Fake(Q, 0)
    with device.on(1), pytest.raises(AssertionError, match="another device"):
        device.write(there.header.ctypes.data, np.ones(3), 1)
    assert isinstance(device, HostDriver)
