"""Each misuse at every entry point that has such an argument: an exception that names it, and no code of the caller's.

The entry points are one table, so that a rule holds for all of them or the test says where it does not.
"""

import inspect

import ml_dtypes
import numpy as np
import pytest

import numba_attention as na
from numba_attention.backends import cpu, cpu_second, reference, reference_second

RNG = np.random.default_rng(0)
F32 = np.float32


def normal(*shape):
    return RNG.standard_normal(shape, dtype=F32)


Q, K, V = normal(2, 4, 5, 8), normal(2, 2, 9, 8), normal(2, 2, 9, 8)


def contiguous():
    cache = na.KVCache(2, 2, 20, 8)
    cache.append(K, V)
    return cache


def paged():
    cache = na.PagedKVCache(12, 4, 2, 8)
    cache.append(cache.add(2), K, V)
    return cache


def layer(**settings):
    return na.MultiHeadAttention(32, 4, num_kv_heads=2, rng=0, **settings)


OUT, LSE = normal(2, 4, 5, 8), normal(2, 4, 5)
PACKED = {"query": normal(10, 4, 8), "key": normal(18, 2, 8), "value": normal(18, 2, 8)}
STARTS = {"cu_seqlens_q": [0, 5, 10], "cu_seqlens_k": [0, 9, 18]}
X = normal(2, 5, 32)
BATCH = {"query": Q, "key": K, "value": V}

# Name: a function that makes what is called, its arguments, and which of these are arrays.
CALLS = {
    "attention": (lambda: na.attention, BATCH, ("query", "key", "value")),
    "attention_backward": (
        lambda: na.attention_backward,
        {"grad_out": OUT, **BATCH, "out": OUT, "lse": LSE, "grad_lse": LSE},
        ("grad_out", "query", "key", "value", "out", "lse", "grad_lse"),
    ),
    "attention_jvp": (
        lambda: na.attention_jvp, {"tangents": na.Gradients(Q, K, V), **BATCH, "out": OUT, "lse": LSE},
        ("query", "key", "value", "out", "lse"),
    ),
    "attention_backward_jvp": (
        lambda: na.attention_backward_jvp,
        {
            "tangents": na.Gradients(Q, K, V), "grad_out": OUT, **BATCH, "out": OUT, "lse": LSE, "out_tangent": OUT,
            "lse_tangent": LSE, "grad_lse": LSE, "grad_out_tangent": OUT, "grad_lse_tangent": LSE,
        },
        ("grad_out", "query", "key", "value", "out", "lse", "out_tangent", "lse_tangent", "grad_out_tangent"),
    ),
    "attention_double_backward": (
        lambda: na.attention_double_backward,
        {"grad_grads": na.Gradients(Q, K, V), "grad_out": OUT, **BATCH, "out": OUT, "lse": LSE, "grad_lse": LSE},
        ("grad_out", "query", "key", "value", "out", "lse", "grad_lse"),
    ),
    "attention_jvp, packed": (
        lambda: na.attention_jvp,
        {
            "tangents": na.Gradients(*PACKED.values()), **PACKED, "out": PACKED["query"], "lse": normal(4, 10),
            **STARTS,
        },
        ("query", "key", "value", "out", "lse"),
    ),
    "attention_double_backward, packed": (
        lambda: na.attention_double_backward,
        {
            "grad_grads": na.Gradients(*PACKED.values()), "grad_out": PACKED["query"], **PACKED,
            "out": PACKED["query"], "lse": normal(4, 10), "grad_lse": normal(4, 10), **STARTS,
        },
        ("grad_out", "query", "key", "value", "out", "lse", "grad_lse"),
    ),
    "attention_weights": (lambda: na.attention_weights, {"query": Q, "key": K}, ("query", "key")),
    "attention_varlen": (lambda: na.attention_varlen, PACKED | STARTS, ("query", "key", "value")),
    "attention_varlen_backward": (
        lambda: na.attention_varlen_backward,
        {"grad_out": PACKED["query"], **PACKED, "out": PACKED["query"], "lse": normal(4, 10), **STARTS},
        ("grad_out", "query", "key", "value", "out", "lse"),
    ),
    "attention_decode": (lambda: na.attention_decode, {"query": Q, "cache": contiguous()}, ("query",)),
    "attention_decode, pages": (lambda: na.attention_decode, {"query": Q, "cache": paged()}, ("query",)),
    "layer": (layer, {"query": X, "key": X + 1, "value": X + 2}, ("query", "key", "value")),
    "layer.forward": (lambda: layer().forward, {"query": X, "key": X + 1, "value": X + 2}, ("query", "key", "value")),
    "layer, rotary": (lambda: layer(rotary=True), {"query": X}, ("query",)),
    "layer, packed": (layer, {"query": X[0], "cu_seqlens": [0, 2, 5]}, ("query",)),
    "layer, packed, rotary": (lambda: layer(rotary=True), {"query": X[0], "cu_seqlens": [0, 2, 5]}, ("query",)),
    "layer, cache": (
        lambda: lambda **a: layer()(cache=contiguous(), **a), {"query": X, "key": X + 1}, ("query", "key"),
    ),
    "layer, cache, rotary": (lambda: lambda **a: layer(rotary=True)(cache=contiguous(), **a), {"query": X}, ("query",)),
    "layer, pages": (lambda: lambda **a: layer()(cache=paged(), **a), {"query": X}, ("query",)),
    "apply_rotary": (lambda: na.apply_rotary, {"x": Q, "positions": np.arange(5)}, ("x",)),
    "merge_attention": (
        lambda: na.merge_attention, {"outs": np.stack([OUT, OUT]), "lses": np.stack([LSE, LSE])}, ("outs", "lses"),
    ),
    "merge_attention_backward": (
        lambda: na.merge_attention_backward,
        {"grad_out": OUT, "grad_lse": LSE, "outs": np.stack([OUT, OUT]), "lses": np.stack([LSE, LSE])},
        ("grad_out", "grad_lse", "outs", "lses"),
    ),
    "KVCache.append": (lambda: contiguous().append, {"key": K[:, :, :1], "value": V[:, :, :1]}, ("key", "value")),
    "KVCache.append, codes": (
        lambda: na.KVCache(2, 2, 12, 8, storage="int8").append,
        {"key": K[:, :, :1], "value": V[:, :, :1]},
        ("key", "value"),
    ),
    "PagedKVCache.append": (lambda: paged().append, {"ids": [0, 1], "key": K, "value": V}, ("key", "value")),
    "KVCache.from_arrays": (lambda: na.KVCache.from_arrays, {"key": K, "value": V}, ("key", "value")),
    "KVCache.from_arrays, codes": (
        lambda: na.KVCache.from_arrays,
        {
            "key": K.astype(np.int8), "value": V.astype(np.int8),
            "key_scale": normal(2, 2, 9), "value_scale": normal(2, 2, 9),
        },
        ("key", "value", "key_scale", "value_scale"),
    ),
    "PagedKVCache.from_arrays": (
        lambda: na.PagedKVCache.from_arrays,
        {"key_pages": K, "value_pages": V, "block_table": [[0, 1]], "lengths": [12]},
        ("key_pages", "value_pages"),
    ),
}  # fmt: skip
WITH_OPTIONS = [name for name in CALLS if name.startswith(("attention", "layer"))]
ARRAYS = [(name, array) for name, (_, _, arrays) in CALLS.items() for array in arrays]


@pytest.fixture
def no_kernel(monkeypatch):
    def start(problem):
        raise AssertionError("a kernel started")

    for module in (cpu, reference):
        for name in ("forward", "weights", "backward"):
            monkeypatch.setattr(module, name, start)
    for module in (cpu_second, reference_second):
        monkeypatch.setattr(module, "run", start)


def call(name, **changes):
    make, arguments, _ = CALLS[name]
    return make()(**arguments | changes)


def refused(name, kinds, **changes):
    """Refused with an exception of one of the kinds, whose message has the name of the changed argument."""
    (argument,) = changes
    with pytest.raises(kinds, match=rf"\b{argument}\b") as caught:
        call(name, **changes)
    assert "ambiguous" not in str(caught.value)


class Series:
    """What a pandas Series does: comparisons by element, and no truth value."""

    def __init__(self, *values):
        self.values = np.array(values)
        self.shape, self.dtype, self.ndim = self.values.shape, self.values.dtype, 1

    def __array__(self, dtype=None, copy=None):
        return self.values

    def __len__(self):
        return len(self.values)

    def __iter__(self):
        return iter(self.values)

    def __eq__(self, other):
        return Series(*(self.values == other))

    def __ne__(self, other):
        return Series(*(self.values != other))

    __hash__ = None

    def __bool__(self):
        raise ValueError("The truth value of a Series is ambiguous.")

    def __float__(self):
        if len(self.values) == 1:
            return float(self.values[0])
        raise TypeError("cannot convert the series to <class 'float'>")


class Watched(np.ndarray):
    """A subclass whose own code must not run in the middle of a call."""

    def __array_function__(self, func, types, args, kwargs):
        raise AssertionError(f"{func.__name__} was handed to a subclass")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        raise AssertionError(f"{ufunc.__name__} was handed to a subclass")


# Arrays.


def leaves(x):
    """The arrays of a result, whatever it is."""
    if isinstance(x, na.KVCache | na.PagedKVCache):
        return list(x._contents().dense())
    if isinstance(x, tuple | list):
        return [leaf for part in x for leaf in leaves(part)]
    return [x] if isinstance(x, np.ndarray) else []


@pytest.mark.parametrize(("name", "array"), ARRAYS)
def test_subclasses_are_plain_arrays_inside(name, array):
    plain = CALLS[name][1][array]
    for given, expected in zip(leaves(call(name, **{array: plain.view(Watched)})), leaves(call(name)), strict=True):
        assert type(given) is np.ndarray
        np.testing.assert_array_equal(given, expected)


def test_one_subclass_for_all_inputs_of_a_layer():
    x = X.view(Watched)
    module = layer()
    out, ctx = module.forward(x)
    np.testing.assert_array_equal(out, module(X))
    grads = module.backward(np.ones_like(X).view(Watched), ctx)
    _, plain = module.forward(X)
    np.testing.assert_array_equal(grads.query, module.backward(np.ones_like(X), plain).query)


OUTS = {
    "attention": OUT, "attention_varlen": PACKED["query"], "attention_decode": OUT, "attention_decode, pages": OUT,
    "apply_rotary": Q,
}  # fmt: skip


@pytest.mark.parametrize("name", OUTS)
def test_out_of_a_subclass(name):
    out = np.empty_like(OUTS[name]).view(Watched)
    assert call(name, out=out) is out
    np.testing.assert_array_equal(np.asarray(out), call(name))


OPTION_ARRAYS = {
    "mask": np.ones((5, 9), bool), "bias": np.zeros((5, 9), F32), "query_offset": np.array(4),
    "alibi_slopes": np.ones(4, F32), "sinks": np.ones(4, F32), "query_lengths": np.array(5), "key_lengths": np.array(9),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTION_ARRAYS)
@pytest.mark.parametrize("name", ["attention", "attention_backward", "attention_weights", "attention_decode"])
def test_options_of_a_subclass(name, option):
    x = OPTION_ARRAYS[option]
    for given, expected in zip(
        leaves(call(name, **{option: x.view(Watched)})), leaves(call(name, **{option: x})), strict=True
    ):
        np.testing.assert_array_equal(given, expected)
    if name in OUTS:
        call(name, **{option: x.view(Watched)}, out=np.empty_like(OUT))


NO_ARRAYS = {
    "masked array": np.ma.masked_array,
    "matrix": lambda x: x.reshape(-1, x.shape[-1]).view(np.matrix),
    "list": lambda x: x.tolist(),
    "Series": lambda x: Series(1.0, 2.0),
    "number": lambda x: 3,
    "text": lambda x: "abc",
    "complex": lambda x: x.astype(np.complex64),
    "object": lambda x: x.astype(object),
    "longdouble": lambda x: x.astype(np.longdouble),
    "integers": lambda x: x.astype(np.int32),
    "other byte order": lambda x: x.astype(x.dtype.newbyteorder()) if x.itemsize > 1 else x.astype(">f4"),
}


@pytest.mark.parametrize("kind", NO_ARRAYS)
@pytest.mark.parametrize(("name", "array"), ARRAYS)
def test_no_array(name, array, kind, no_kernel):
    make, arguments, _ = CALLS[name]
    with pytest.raises((TypeError, ValueError), match=rf"\b{array}\b|share one dtype"):
        make()(**arguments | {array: NO_ARRAYS[kind](arguments[array])})


# Numbers.

NO_NUMBERS = [
    np.complex64(1 + 2j), np.complex128(1), 1j, True, np.True_, "1", b"1", bytearray(b"1"), np.str_("1"), [1.0], (1.0,),
    np.ones(1), np.ones((1, 1)), np.array(1j), np.array(True), np.array("1"), np.array(None), np.ma.masked,
    np.ma.masked_array(1.0), np.datetime64("2020"), np.timedelta64(3, "s"), Series(1.0), Series(1.0, 2.0), object(),
    float, {"a": 1}, np.array([1.0], object),
]  # fmt: skip
NO_FINITE = [np.nan, np.inf, -np.inf, 10**400, -(10**400), np.float32("inf"), np.float16("nan"), np.array(np.inf)]
NUMBERS = [1, 1.5, np.float32(1.5), np.float16(1), np.int64(2), np.array(1.5), ml_dtypes.bfloat16(1), np.uint8(3)]


@pytest.mark.parametrize("option", ["scale", "softcap"])
@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_no_number(name, option, no_kernel):
    for x in NO_NUMBERS:
        refused(name, TypeError, **{option: x})
    for x in NO_FINITE:
        refused(name, ValueError, **{option: x})


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_scale_beyond_the_compute_type(name, no_kernel):
    for x in (1e300, -1e300, 1e39, np.float64(3e38)):
        refused(name, ValueError, scale=x)


def test_scale_beyond_float64():
    double = {key: x.astype(np.float64) for key, x in BATCH.items()}
    for x in (1.7e308, -1.7e308):
        with pytest.raises(ValueError, match="scale must lie within"):
            na.attention(**double, scale=x)
    na.attention(**double, scale=1e300)


def test_every_kind_of_number():
    for x in NUMBERS:
        np.testing.assert_array_equal(call("attention", scale=x), call("attention", scale=float(x)))
        na.apply_rotary(Q, 3, base=x, scaling=x)


@pytest.mark.parametrize("make", [
    lambda **a: na.apply_rotary(Q, 3, **a),
    lambda **a: layer(rotary=a),
], ids=["apply_rotary", "layer"])  # fmt: skip
@pytest.mark.parametrize("option", ["base", "scaling", "factor"])
def test_no_number_for_rotary(make, option):
    for x in [*NO_NUMBERS, *NO_FINITE, 0, -1.0]:
        if option == "scaling" and isinstance(x, dict):
            continue
        given = {"scaling": {"type": "ntk", "factor": x}} if option == "factor" else {option: x}
        with pytest.raises((TypeError, ValueError), match=option):
            make(**given)
    for kind in (Series(1), np.array(["ntk"]), 3, None, ["ntk"]):
        with pytest.raises((TypeError, ValueError), match="scaling"):
            make(scaling={"type": kind, "factor": 2.0})


# Integers.

NO_INTEGERS = [
    2**63,
    -(2**63) - 1,
    10**400,
    np.uint64(2**64 - 1),
    1.0,
    np.float64(1),
    "1",
    1j,
    True,
    np.True_,
    object(),
]
NO_INTEGERS += [Series(1.0), np.ma.masked_array(1), np.array(1, object)]


@pytest.mark.parametrize("option", ["query_offset", "query_lengths", "key_lengths", "prefix_lengths"])
@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_no_integer(name, option, no_kernel):
    for x in NO_INTEGERS:
        with pytest.raises((TypeError, ValueError), match=option):
            call(name, **{option: x})


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_no_window(name, no_kernel):
    for x in (
        3,
        "ab",
        (1, 2, 3),
        (1.0, 2),
        (None, True),
        Series(1.0, 2.0),
        (-1, 0),
        np.ones((2, 2)),
        (1j, 0),
        ([1], 2),
    ):
        refused(name, (TypeError, ValueError), window=x)
    if "cache" not in name and "pages" not in name:
        with pytest.raises(AssertionError, match="a kernel started"):
            call(name, window=(2**63, 10**400))


SIZES = {
    "KVCache": (na.KVCache, {"batch": 1, "num_kv_heads": 1, "capacity": 4, "head_dim": 8, "value_dim": 8}),
    "PagedKVCache": (
        na.PagedKVCache, {"num_pages": 1, "page_size": 4, "num_kv_heads": 1, "head_dim": 8, "value_dim": 8},
    ),
    "MultiHeadAttention": (
        na.MultiHeadAttention,
        {"embed_dim": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "kdim": 8, "vdim": 8},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, (_, sizes) in SIZES.items() for size in sizes])
def test_no_size(name, size):
    make, sizes = SIZES[name]
    for x in (1.0, "1", True, 1j, np.float32(2), Series(1), [1], -1):
        with pytest.raises((TypeError, ValueError), match=rf"\b{size}\b"):
            make(**sizes | {size: x})
    for x in (2**63, 10**400):
        with pytest.raises(ValueError, match=rf"\b{size}\b"):
            make(**sizes | {size: x})


# Words and truth values.


@pytest.mark.parametrize("name", [*WITH_OPTIONS, "set_backend", "use_backend", "MultiHeadAttention"])
def test_no_backend(name, no_kernel):
    make = {
        "set_backend": na.set_backend,
        "use_backend": lambda backend: na.use_backend(backend).__enter__(),
        "MultiHeadAttention": lambda backend: layer(backend=backend),
    }.get(name)
    if make is None and name.startswith("layer"):
        return  # a layer has one backend, which it was made with
    for x in (Series("cpu"), Series("cpu", "cpu"), np.array(["cpu"]), 3, b"cpu", ["cpu"], cpu, "gpu", ""):
        with pytest.raises((TypeError, ValueError), match="backend"):
            make(x) if make else call(name, backend=x)


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_no_alignment(name, no_kernel):
    for x in (
        Series(True),
        Series(True, False),
        np.array(["bottom-right"]),
        np.array([True]),
        1,
        None,
        "bottom",
        [True],
    ):
        refused(name, (TypeError, ValueError), is_causal=x)


@pytest.mark.parametrize("name", ["attention", "attention_varlen", "attention_decode", "attention_decode, pages"])
def test_no_flag(name, no_kernel):
    for x in (Series(True), np.ones(2, bool)):
        refused(name, TypeError, return_lse=x)


@pytest.mark.parametrize("flag", ["need_weights", "average_weights"])
@pytest.mark.parametrize("name", ["layer", "layer.forward"])
def test_no_flag_of_a_layer(name, flag, no_kernel):
    for x in (Series(True), np.ones(2, bool)):
        refused(name, TypeError, **{flag: x})


# Layers: parameters and padding.


@pytest.mark.parametrize("x", [3, None, "abc", [1, 2], [("q_proj.weight", 1)], Series(1.0), {1: X}, {None: X}])
def test_no_mapping_of_parameters(x):
    with pytest.raises(TypeError, match="parameters must map names to arrays"):
        layer().load_parameters(x)
    with pytest.raises(TypeError, match="state_dict must map names to arrays"):
        na.MultiHeadAttention.from_torch(x, 4)


@pytest.mark.parametrize(
    "x", [None, 3, "abc", [[1.0], [1.0, 2.0]], np.ones((32, 32), int), np.ma.ones((32, 32)), np.ones((32, 32), object)]
)
def test_no_parameter(x):
    parameters = layer().parameters() | {"out_proj.weight": x}
    with pytest.raises((TypeError, ValueError), match=r"out_proj\.weight"):
        layer().load_parameters(parameters)
    with pytest.raises((TypeError, ValueError), match=r"out_proj\.weight"):
        na.MultiHeadAttention.from_torch({"in_proj_weight": np.ones((96, 32)), "out_proj.weight": x}, 4)


NO_DTYPES = [3, "abc", [("a", 5)], {"a": 1}, "f4,", Series(1), ">f8", None, np.ones(3), np.float16]


@pytest.mark.parametrize("dtype", NO_DTYPES)
def test_no_dtype(dtype):
    for make in (na.KVCache, na.PagedKVCache):
        if dtype is not np.float16:
            with pytest.raises(TypeError, match="dtype"):
                make(1, 1, 1, 8, dtype=dtype)
    with pytest.raises(TypeError, match="dtype"):
        layer(dtype=dtype)


@pytest.mark.parametrize("storage", [3, [("a", 5)], {"a": 1}, Series(1), "float64", "int4", np.ones(3)])
def test_no_storage(storage):
    for make in (na.KVCache, na.PagedKVCache):
        with pytest.raises((TypeError, ValueError), match="storage"):
            make(1, 1, 1, 8, storage=storage)


PADDING = [
    np.zeros((2, 5), int), np.zeros((2, 4), bool), "abc", 1.0, np.ma.zeros((2, 5), bool), [[True], [True, False]],
    np.zeros((2, 5), object), np.bool_(True),
]  # fmt: skip


@pytest.mark.parametrize("name", ["layer", "layer.forward", "layer, rotary"])
def test_no_padding(name, no_kernel):
    for x in PADDING:
        refused(name, (TypeError, ValueError), key_padding_mask=x)
    with pytest.raises(ValueError, match=r"mask of shape .* key_padding_mask of shape"):
        call(name, key_padding_mask=np.eye(5, dtype=bool)[:2], mask=np.ones((3, 1, 5, 5), bool))


@pytest.mark.parametrize("name", ["layer, cache", "layer, pages"])
def test_padding_with_a_cache_names_what_does_it(name, no_kernel):
    with pytest.raises(ValueError, match=r"key_padding_mask must be None with a cache.*key_lengths=.*mask="):
        call(name, key_padding_mask=np.zeros((2, 5), bool))


MODELS = {
    "named differently": (
        {f"attn.{name}_projection.weight" for name in ("query", "key", "value")} | {"attn.out_projection.weight"},
        "no weight for q_proj, k_proj, v_proj, out_proj among .*; say which is which with names=",
    ),
    "a fused layer": (
        {"attn.query_key_value.weight", "attn.dense.weight"},
        r"does not say in which order: .*GPT-NeoX.*Falcon 40B.*"
        r"names=\{'in_proj': \('attn.query_key_value', function\), 'out_proj.weight': 'attn.dense.weight'\}"
        r".*docs/checkpoints.md",
    ),
    "a fused layer in blocks": (
        {"attn.qkv_proj.weight", "attn.out_proj.weight"},  # CodeGen, with the name that Phi-3 has
        r"does not say in which order: .*CodeGen.*\('attn.qkv_proj', function\)",
    ),
    "two layers": (
        {f"layers.{n}.{name}.weight" for n in (0, 1) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
        r"2 attention layers, at 'layers.0.', 'layers.1.'; choose one with prefix=",
    ),
    "normalised": (
        {f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm")},
        "q_norm.weight says that the model has normalised queries",
    ),
    "something else": (
        {f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "mixer")},
        r"names that this layer does not: mixer.weight; .*names=\{'q_proj': 'q_proj', .*'out_proj': 'o_proj'\}",
    ),
    "nothing known": ({"lstm.weight"}, "no weight for q_proj.*lstm.weight.*names="),
    "nothing": (set(), "no weight for q_proj.*no parameters.*names="),
}


@pytest.mark.parametrize("model", MODELS)
def test_names_of_another_model(model):
    names, message = MODELS[model]
    with pytest.raises(ValueError, match=message):
        na.MultiHeadAttention.from_torch(dict.fromkeys(sorted(names), np.ones((32, 32))), 4)


def test_every_option_is_in_the_table():
    """Entry points that take the options of `attention` are all here."""
    for name in na.__all__:
        member = getattr(na, name)
        if inspect.isfunction(member) and "is_causal" in inspect.signature(member).parameters:
            assert name in CALLS
