"""Every argument, misused: the exception, a message that names the argument, and no kernel that has started."""

import re

import ml_dtypes
import numpy as np
import pytest

import numba_attention as na
from cases import Case
from numba_attention.backends import cpu, reference

QUERY, KEY, VALUE = Case(5, 7, 8, 6, H=4, Hkv=2, batch=(3,)).arrays()
SHAPE = (3, 4, 5, 7)
GIVEN = {
    "grad_out": np.ones((3, 4, 5, 6), np.float32),
    "query": QUERY,
    "key": KEY,
    "value": VALUE,
    "out": np.zeros((3, 4, 5, 6), np.float32),
    "lse": np.zeros((3, 4, 5), np.float32),
}


@pytest.fixture(autouse=True)
def _no_kernel_may_start(monkeypatch):
    def start(problem):
        raise AssertionError("a kernel started")

    for module in (cpu, reference):
        monkeypatch.setattr(module, "forward", start)
        monkeypatch.setattr(module, "weights", start)
        monkeypatch.setattr(module, "backward", start)


def refused(kind, words, function, *arguments, **kwargs):
    with pytest.raises(kind, match=words):
        function(*arguments, **kwargs)


# query, key and value.


class Tensor:
    """Something with the attributes of an array that is none."""

    shape, ndim, dtype = (2, 3, 4), 3, np.dtype(np.float32)

    def __array__(self, dtype=None, copy=None):
        return np.zeros(self.shape, np.float32)


def no_ndarray(x):
    return {
        "list": (x.tolist(), "numpy.asarray"),
        "tuple": (tuple(x), "numpy.asarray"),
        "number": (1.0, "numpy.asarray"),
        "None": (None, "numpy.ndarray"),
        "string": ("abc", "numpy.ndarray"),
        "other array": (Tensor(), "numpy.asarray"),
        "scalar": (np.float32(3), "numpy.asarray"),
        "masked array": (np.ma.masked_array(x), "mask="),
        "matrix": (x[0, 0].view(np.matrix), "numpy.asarray"),
        "int64": (x.astype(np.int64), "astype"),
        "uint8": (x.astype(np.uint8), "astype"),
        "bool": (x > 0, "astype"),
        "complex64": (x.astype(np.complex64), "complex"),
        "complex128": (x.astype(np.complex128), "complex"),
        "object": (x.astype(object), "floating point"),
        "str": (x.astype(str), "floating point"),
        "datetime": (np.zeros(x.shape, "datetime64[s]"), "floating point"),
        "structured": (np.zeros(x.shape, [("a", np.float32)]), "floating point"),
        "longdouble": (x.astype(np.longdouble), "astype"),
        "other byte order": (x.astype(x.dtype.newbyteorder()), "byte order"),
        "float8": (x.astype(ml_dtypes.float8_e4m3fn), "float32"),
    }


KINDS = list(no_ndarray(QUERY))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_no_array_of_floats(name, kind):
    arrays = {"query": QUERY, "key": KEY, "value": VALUE}
    arrays[name], advice = no_ndarray(arrays[name])[kind]
    refused(TypeError, rf"\b{name}\b.*{re.escape(advice)}", na.attention, **arrays)
    if name != "value":
        del arrays["value"]
        refused(TypeError, rf"\b{name}\b.*{re.escape(advice)}", na.attention_weights, **arrays)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["key", "value"])
def test_tensor(name, torch):
    arrays = {"query": QUERY, "key": KEY, "value": VALUE}
    arrays[name] = torch.from_numpy(arrays[name])
    refused(TypeError, rf"\b{name}\b.*torch.*asarray", na.attention, **arrays)


@pytest.mark.parametrize(
    ("dtypes", "words"),
    [
        (("float64", "float32", "float32"), "query, key and value.*float64"),
        (("float32", "float64", "float32"), "query, key and value.*float64"),
        (("float32", "float32", "float16"), "query, key and value.*float16"),
        (("float16", ml_dtypes.bfloat16, "float16"), "query, key and value.*bfloat16"),
    ],
)
def test_mixed_dtypes(dtypes, words):
    query, key, value = (x.astype(dtype) for x, dtype in zip((QUERY, KEY, VALUE), dtypes, strict=True))
    refused(TypeError, words, na.attention, query, key, value)
    if dtypes[0] != dtypes[1]:
        refused(TypeError, "query and key", na.attention_weights, query, key)


@pytest.mark.parametrize(
    ("query", "key", "value", "words"),
    [
        ((8,), (7, 8), (7, 6), "query"),
        ((), (7, 8), (7, 6), "query"),
        ((5, 8), (8,), (7, 6), "key"),
        ((5, 8), (7, 8), (7,), "value"),
        ((5, 8), (7, 9), (7, 6), r"key.*head dimension.*8.*\(.*7, 9\)"),
        ((4, 5, 8), (4, 7, 1), (4, 7, 6), "key.*head dimension"),
        ((5, 8), (7, 8), (6, 8), r"value.*7.*\(.*6, 8\)"),
        ((4, 5, 8), (2, 7, 8), (4, 7, 8), r"value.*\(4, 7, 8\)"),
        ((4, 5, 8), (2, 7, 8), (1, 7, 8), r"value.*\(1, 7, 8\)"),
        ((4, 5, 8), (3, 7, 8), (3, 7, 8), "key.*3 heads.*divide.*4"),
        ((4, 5, 8), (8, 7, 8), (8, 7, 8), "key.*8 heads.*divide.*4"),
        ((4, 5, 8), (0, 7, 8), (0, 7, 8), "key.*0 heads"),
        ((2, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8), r"query \(2,\).*key \(3,\)"),
        ((3, 4, 5, 8), (3, 4, 7, 8), (2, 4, 7, 8), r"value \(2,\)"),
    ],
)
def test_shapes(query, key, value, words):
    arrays = [np.ones(shape, np.float32) for shape in (query, key, value)]
    refused(ValueError, words, na.attention, *arrays)
    if words.startswith(("query", "key")):
        refused(ValueError, words, na.attention_weights, *arrays[:2])


# Options.

nan, inf = np.nan, np.inf
NO_NUMBER = [
    ("abc", TypeError),
    (None.__class__, TypeError),
    ([1.0, 2.0], TypeError),
    (np.ones(1), TypeError),
    (1j, TypeError),
]
NO_NUMBER += [(True, TypeError), (nan, ValueError), (inf, ValueError), (-inf, ValueError), (10**400, ValueError)]
NO_INTEGERS = [(1.0, TypeError), ([1.0, 2.0, 3.0], TypeError), ("abc", TypeError), (True, TypeError), (1j, TypeError)]
NO_INTEGERS += [([True, False, True], TypeError), ([None, 1, 2], TypeError), (nan, TypeError)]
NO_INTEGERS += [([1, True, 2], TypeError), ((1, 2, np.False_), TypeError), ([np.array(True), 1, 2], TypeError)]
NO_INTEGERS += [(iter([1, 2, 3]), TypeError), ({1, 2, 3}, TypeError), (np.ones(3, object), TypeError)]
NO_INTEGERS += [([1, 2, 2**70], ValueError), (2**70, ValueError)]
NO_INTEGERS += [
    ([1, 2], ValueError),
    (np.ones((3, 2), int), ValueError),
    ([[1], [2], [3]], ValueError),
    ([[1], [2, 3]], ValueError),
]
NO_FLOATS = [(["a"], TypeError), ([1j], TypeError), ([object()], TypeError), (np.ones(4, np.longdouble), TypeError)]
NO_FLOATS += [([0.5, True, 0.5, 0.5], TypeError), (iter([0.5] * 4), TypeError)]


def rule(batch, head, i, j, table):
    return table[head] > i + j


OPTIONS = {
    "mask": [
        (np.zeros(SHAPE, np.float32), TypeError, "bias"),
        (np.zeros(SHAPE, ml_dtypes.bfloat16), TypeError, "bias"),
        (np.ones(SHAPE, int), TypeError, "boolean"),
        (np.ones(SHAPE, np.uint8), TypeError, "boolean"),
        ([[0, 1, 1, 1, 1, 1, 1]], TypeError, "boolean"),
        ([[True, 1, 1, 1, 1, 1, 1]], TypeError, "truth values"),
        (1, TypeError, "boolean"),
        ("abc", TypeError, "boolean"),
        (np.ones(SHAPE, object), TypeError, "boolean"),
        (np.ones(SHAPE, complex), TypeError, "boolean"),
        (np.ones((5, 8), bool), ValueError, "broadcast"),
        (np.ones((3, 4, 5, 7, 1), bool), ValueError, "broadcast"),
        (np.ones((1, 3, 4, 5, 7), bool), ValueError, "broadcast"),
        (np.ones((2, 4, 5, 7), bool), ValueError, "broadcast"),
        (np.ones((3, 2, 5, 7), bool), ValueError, "broadcast"),
        ([[True], [True, False]], ValueError, ""),
        (np.ma.masked_array(np.ones(7, bool), np.ones(7, bool)), TypeError, "masked"),
    ],
    "bias": [
        (np.ones(SHAPE, bool), TypeError, "mask"),
        (True, TypeError, "mask"),
        (np.ones(SHAPE, int), TypeError, "astype"),
        (1, TypeError, "astype"),
        (np.ones(SHAPE, complex), TypeError, "complex"),
        (np.ones(SHAPE, object), TypeError, ""),
        (np.ones(SHAPE, np.longdouble), TypeError, ""),
        ("abc", TypeError, ""),
        (np.ones((5, 8)), ValueError, "broadcast"),
        (np.ones((1, 3, 4, 5, 7)), ValueError, "broadcast"),
        (np.ones((3, 2, 5, 7)), ValueError, "broadcast"),
        ([[1.0], [1.0, 2.0]], ValueError, ""),
        (np.ma.masked_array(np.ones(7), np.ones(7, bool)), TypeError, "masked"),
    ],
    "is_causal": [
        ("bottom", ValueError, "bottom-right"),
        ("", ValueError, "bottom-right"),
        (None, TypeError, "top-left"),
        (1, TypeError, "top-left"),
        (0, TypeError, "top-left"),
        (np.ones(3, bool), TypeError, ""),
        ([True], TypeError, ""),
    ],
    "window": [
        (3, TypeError, "pair"),
        ((3,), TypeError, "pair"),
        ((1, 2, 3), TypeError, "pair"),
        ((), TypeError, "pair"),
        ("ab", TypeError, "pair"),
        ((1.0, 2), TypeError, "pair"),
        ((None, "2"), TypeError, "pair"),
        ((True, 2), TypeError, "pair"),
        ((-1, 2), ValueError, "negative"),
        ((2, -1), ValueError, "negative"),
        (np.array([1.0, 2.0]), TypeError, "pair"),
        (np.ones((2, 2), int), TypeError, "pair"),
        ({1, 2}, TypeError, "pair"),
        ({1: 0, 2: 0}, TypeError, "pair"),
        (iter((1, 2)), TypeError, "pair"),
    ],
    "query_offset": [(x, kind, "") for x, kind in NO_INTEGERS] + [
        (2**50, ValueError, ""),
    ],
    "query_lengths": [(x, kind, "") for x, kind in NO_INTEGERS] + [
        (-1, ValueError, "between 0 and 5"),
        (6, ValueError, "between 0 and 5"),
        ([5, 0, -1], ValueError, "between 0 and 5"),
        ([5, 6, 0], ValueError, "between 0 and 5"),
        (2**64 - 1, ValueError, ""),
        (np.array([1, 2, 2**63], np.uint64), ValueError, ""),
    ],
    "key_lengths": [(x, kind, "") for x, kind in NO_INTEGERS] + [
        (-1, ValueError, "between 0 and 7"),
        (8, ValueError, "between 0 and 7"),
        ([7, 0, -1], ValueError, "between 0 and 7"),
        ([7, 8, 0], ValueError, "between 0 and 7"),
    ],
    "prefix_lengths": [(x, kind, "") for x, kind in NO_INTEGERS] + [
        (-1, ValueError, "between 0 and 7"),
        (8, ValueError, "between 0 and 7"),
        ([7, 8, 0], ValueError, "between 0 and 7"),
    ],
    "scale": [(x, kind, "") for x, kind in NO_NUMBER],
    "softcap": [(x, kind, "") for x, kind in NO_NUMBER] + [(0, ValueError, "positive"), (-1.0, ValueError, "positive")],
    "alibi_slopes": [(x, kind, "") for x, kind in NO_FLOATS] + [
        (0.5, ValueError, r"\(4,\)"),
        ([0.5] * 3, ValueError, r"\(4,\)"),
        (np.ones((2, 4)), ValueError, "broadcast"),
        (np.ones((1, 3, 4)), ValueError, "broadcast"),
        ([nan, 1.0, 1.0, 1.0], ValueError, "finite"),
        ([inf, 1.0, 1.0, 1.0], ValueError, "finite"),
        (np.ones(4, bool), TypeError, ""),
    ],
    "sinks": [(x, kind, "") for x, kind in NO_FLOATS] + [
        (0.5, ValueError, r"\(4,\)"),
        ([0.5] * 2, ValueError, r"\(4,\)"),
        (np.ones((3, 4)), ValueError, r"\(4,\)"),
        (np.ones(4, bool), TypeError, ""),
    ],
    "dropout_p": [(x, kind, "") for x, kind in NO_NUMBER if x is not None] + [
        (None, TypeError, "real number"),
        (1, ValueError, "less than 1"),
        (-1e-9, ValueError, "at least 0"),
        (0.5, ValueError, "positive"),  # without a seed
    ],
    "seed": [
        (-1, ValueError, "64 bits"),
        (2**64, ValueError, "64 bits"),
        (1.0, TypeError, "integer"),
        (True, TypeError, "integer"),
        ("1", TypeError, "integer"),
        (np.arange(2), TypeError, "integer"),
        (np.ones(1, np.float32), TypeError, "integer"),
    ],
    "score_mod": [
        (3, TypeError, "Python function"),
        ("exp", TypeError, "Python function"),
        (np.sin, TypeError, "Python function"),
    ],
    "mask_mod": [(np.True_, TypeError, "Python function"), (3, TypeError, "Python function")],
    "mod_args": [
        ((QUERY,), ValueError, "score_mod or mask_mod"),
        (QUERY, TypeError, r"tuple.*\(x,\)"),
        (3, TypeError, r"tuple.*\(x,\)"),
    ],
}  # fmt: skip
MISUSES = [
    pytest.param(name, *misuse, id=f"{name}-{n}")
    for name, misuses in OPTIONS.items()
    for n, misuse in enumerate(misuses)
]


@pytest.mark.parametrize(("name", "value", "kind", "words"), MISUSES)
def test_option(name, value, kind, words):
    refused(kind, rf"(?s)\b{name}\b.*{words}", na.attention, QUERY, KEY, VALUE, **{name: value})
    refused(kind, rf"(?s)\b{name}\b.*{words}", na.attention_weights, QUERY, KEY, **{name: value})
    refused(kind, rf"(?s)\b{name}\b.*{words}", na.attention_backward, *GIVEN.values(), **{name: value})


class Raises:
    """What another library may pass: an object whose conversions raise an exception of that library."""

    def __index__(self):
        raise RuntimeError("no")

    __bool__ = __index__


def test_what_raises_when_it_is_converted():
    refused(TypeError, "seed must be an integer", na.attention, QUERY, KEY, VALUE, seed=Raises())
    refused(TypeError, "window must be a pair", na.attention, QUERY, KEY, VALUE, window=(Raises(), 0))
    refused(TypeError, "capacity must be an integer", na.KVCache, 1, 1, Raises(), 4)
    refused(TypeError, "L must be an integer", na.BlockMask.causal, Raises(), 4)


@pytest.mark.parametrize("flag", [Raises(), np.ones(2), np.zeros(0)])
def test_flag_of_the_double_backward_pass(flag):
    directions = na.Gradients(QUERY, None, None)
    arguments = [directions, *GIVEN.values()]
    refused(
        TypeError, "through_saved must be True or False", na.attention_double_backward, *arguments, through_saved=flag
    )


@pytest.mark.parametrize(
    ("table", "kind", "words"),
    [
        (None, TypeError, r"mod_args\[0\].*number.*NoneType"),
        ([1, 2], TypeError, r"mod_args\[0\].*ndarray.*list"),
        ("a", TypeError, r"mod_args\[0\].*number.*str"),
        (np.zeros(4, complex), TypeError, r"mod_args\[0\].*complex128.*astype"),
        (np.zeros(4, ">f4"), TypeError, r"mod_args\[0\].*byte order"),
    ],
)
def test_what_mods_are_handed(table, kind, words):
    refused(kind, words, na.attention, QUERY, KEY, VALUE, mask_mod=rule, mod_args=(table,))
    refused(kind, words, na.attention_backward, *GIVEN.values(), mask_mod=rule, mod_args=(table,))


@pytest.mark.torch
@pytest.mark.parametrize("name", ["mask", "bias"])
def test_wrong_tensor_for_an_array_like(name, torch):
    refused(TypeError, rf"\b{name}\b", na.attention, QUERY, KEY, VALUE, **{name: torch.ones(SHAPE, dtype=torch.int64)})


def test_bool_scalars_of_numpy_are_no_numbers():
    for name in ("scale", "softcap"):
        refused(TypeError, name, na.attention, QUERY, KEY, VALUE, **{name: np.True_})


def test_unknown_and_positional_arguments():
    refused(TypeError, "attn_mask", na.attention, QUERY, KEY, VALUE, attn_mask=None)
    refused(TypeError, "positional", na.attention, QUERY, KEY, VALUE, None)
    refused(TypeError, "positional", na.attention_weights, QUERY, KEY, VALUE)
    refused(TypeError, "value", na.attention, QUERY, KEY)


# What the backward pass takes besides.

BACKWARD = {
    "grad_out": (np.zeros((3, 4, 5, 6), np.float32), r"\(3, 4, 5, 6\)", "float32"),
    "out": (np.zeros((3, 4, 5, 6), np.float32), r"\(3, 4, 5, 6\)", "float32"),
    "lse": (np.zeros((3, 4, 5), np.float32), r"\(3, 4, 5\)", "float32"),
    "grad_lse": (np.zeros((3, 4, 5), np.float32), r"\(3, 4, 5\)", "float32"),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name):
    good, shape, dtype = BACKWARD[name]

    def call(x):
        return lambda: na.attention_backward(**GIVEN | {name: x})

    refused(TypeError, rf"^{name} .*{dtype}.*float64", call(good.astype(np.float64)))
    refused(TypeError, rf"^{name} .*{dtype}.*float16", call(good.astype(np.float16)))
    refused(TypeError, rf"^{name} .*{dtype}", call(good.astype(">f4" if np.little_endian else "<f4")))
    refused(TypeError, rf"^{name} .*numpy.asarray", call(good.tolist()))
    refused(TypeError, rf"^{name} .*numpy.ndarray", call(np.ma.masked_array(good)))
    refused(ValueError, rf"^{name} .*{shape}", call(good[1:]))
    refused(ValueError, rf"^{name} .*{shape}", call(good[..., 1:]))
    refused(ValueError, rf"^{name} .*{shape}", call(good[None]))
    if name != "grad_lse":
        refused(TypeError, rf"^{name} .*NoneType", call(None))


def test_backward_of_mismatched_arrays():
    refused(TypeError, "dtype", na.attention_backward, **GIVEN | {"key": KEY.astype(np.float64)})
    refused(ValueError, "key", na.attention_backward, **GIVEN | {"key": KEY[..., :3]})
    refused(TypeError, "positional", na.attention_backward, *GIVEN.values(), None)
    refused(TypeError, "lse", na.attention_backward, *list(GIVEN.values())[:-1])
    refused(ValueError, "backend", na.attention_backward, *GIVEN.values(), backend="gpu")


# out.

RESULT = (3, 4, 5, 6)


def _readonly():
    out = np.zeros(RESULT, np.float32)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    ("out", "kind", "words"),
    [
        (np.zeros(RESULT), TypeError, "float32.*float64"),
        (np.zeros(RESULT, np.float16), TypeError, "float16"),
        (np.zeros(RESULT, ">f4" if np.little_endian else "<f4"), TypeError, "dtype"),
        (np.zeros((3, 4, 5, 8), np.float32), ValueError, r"\(3, 4, 5, 6\).*\(3, 4, 5, 8\)"),
        (np.zeros((1, 3, 4, 5, 6), np.float32), ValueError, "shape"),
        (np.zeros((4, 5, 6), np.float32), ValueError, "shape"),
        (np.zeros(360, np.float32), ValueError, "shape"),
        (_readonly(), ValueError, "read-only"),
        (np.broadcast_to(np.float32(0), RESULT), ValueError, ""),
        (np.lib.stride_tricks.as_strided(np.zeros(6, np.float32), RESULT, (0, 0, 0, 4)), ValueError, "overlap"),
        ([1.0], TypeError, "list"),
        (True, TypeError, "bool"),
        (np.ma.empty(RESULT, np.float32), TypeError, "Masked"),
        (np.zeros((5, 6), np.float32).view(np.matrix), TypeError, "matrix"),
    ],
)
def test_out(out, kind, words):
    refused(kind, rf"\bout\b.*{words}", na.attention, QUERY, KEY, VALUE, out=out)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("shift", [0, 1, 39])
def test_out_overlaps(name, shift):
    buffer = np.zeros(2 * 4 * 5 * 2, np.float32)
    x = buffer[:40].reshape(4, 5, 2)
    arrays = {n: x if n == name else x.copy() for n in ("query", "key", "value")}
    out = buffer[shift : shift + 40].reshape(4, 5, 2)
    refused(ValueError, f"out.*overlap.*{name}", na.attention, **arrays, out=out)
    refused(ValueError, f"out.*overlap.*{name}", na.attention, **arrays, out=out[::-1, ::-1, ::-1])


@pytest.mark.parametrize("name", ["bias", "alibi_slopes", "sinks"])
def test_out_overlaps_an_option(name):
    buffer = np.zeros(RESULT, np.float32)
    array = {"bias": buffer[0, 0, :, :1], "alibi_slopes": buffer[0, :, 0, 0], "sinks": buffer[0, :, 0, 0]}[name]
    refused(ValueError, f"out.*overlap.*{name}", na.attention, QUERY, KEY, VALUE, out=buffer, **{name: array})


def test_out_overlaps_the_mask():
    buffer = np.zeros(RESULT, np.float32)
    mask = buffer.view(bool)[0, 0, :, :1]
    refused(ValueError, "out.*overlap.*mask", na.attention, QUERY, KEY, VALUE, out=buffer, mask=mask)


@pytest.mark.parametrize("option", ["score_mod", "mask_mod"])
def test_out_overlaps_what_a_mod_reads(option):
    buffer = np.zeros(RESULT, np.float32)

    def reads(*arguments):
        return arguments[-1][0] < 1 if option == "mask_mod" else arguments[-1][0]

    options = {option: reads, "mod_args": (3, buffer[0, 0, 0])}
    refused(ValueError, r"out.*overlap.*mod_args\[1\]", na.attention, QUERY, KEY, VALUE, out=buffer, **options)


@pytest.mark.parametrize("strides", [(1, 1, 1, 1), (4, 4, 6, 1), (20, 20, 3, 1), (120, 30, 6, -2), (120, 6, 24, 0)])
def test_out_overlaps_itself(strides):
    out = np.lib.stride_tricks.as_strided(np.zeros(2000, np.float32)[1000:], RESULT, [4 * n for n in strides])
    refused(ValueError, "out must not overlap itself", na.attention, QUERY, KEY, VALUE, out=out)


# attention_weights: heads and rows.


@pytest.mark.parametrize(("name", "n"), [("heads", 4), ("rows", 5)])
def test_selection(name, n):
    for index in (n, -n - 1, [0, n], np.array([-n - 1])):
        refused(IndexError, rf"\b{name}\b", na.attention_weights, QUERY, KEY, **{name: index})
    for index in (np.ones(n + 1, bool), np.ones(n - 1, bool)):
        refused(IndexError, rf"\b{name}\b", na.attention_weights, QUERY, KEY, **{name: index})
    for index in (1.0, [0.5], "a", [[0, 1]], np.ones((n, n), bool), [None], 1j, [0, True], iter([0])):
        refused(TypeError, rf"\b{name}\b", na.attention_weights, QUERY, KEY, **{name: index})
    refused(ValueError, rf"\b{name}\b", na.attention_weights, QUERY, KEY, **{name: [[0], [1, 2]]})
    refused((TypeError, ValueError), rf"\b{name}\b", na.attention_weights, QUERY, KEY, **{name: slice(0, 2, 0)})
    refused((TypeError, ValueError), rf"\b{name}\b", na.attention_weights, QUERY, KEY, **{name: slice(0.5, 2)})


# merge_attention.

OUT, LSE = np.ones((2, 5, 3), np.float32), np.ones((2, 5), np.float32)


@pytest.mark.parametrize(
    ("outs", "lses", "kind", "words"),
    [
        (None, [LSE], TypeError, "outs"),
        (1.0, [LSE], TypeError, "outs"),
        ([OUT], None, TypeError, "lses"),
        ([OUT], 2, TypeError, "lses"),
        (np.float32(1), [LSE], TypeError, "outs"),
        (np.array(1.0), [LSE], TypeError, "outs"),
        ([], [LSE], ValueError, "outs.*at least one"),
        ([OUT], [], ValueError, "lses.*at least one"),
        (np.ones((0, 2, 5, 3)), np.ones((0, 2, 5)), ValueError, "outs.*at least one"),
        ([OUT, OUT], [LSE], ValueError, "outs and lses.*2.*1"),
        ([OUT], [LSE, LSE], ValueError, "outs and lses.*1.*2"),
        ([OUT.tolist()], [LSE], TypeError, "outs.*list.*asarray"),
        ([OUT], [LSE.tolist()], TypeError, "lses.*list.*asarray"),
        ([OUT, OUT.tolist()], [LSE, LSE], TypeError, r"outs\[1\] must .* numpy.asarray\(outs\[1\]\)$"),
        ("abc", [LSE], TypeError, "outs"),
        ([OUT, None], [LSE, LSE], TypeError, "outs"),
        (np.ma.masked_array([OUT]), [LSE], TypeError, "outs"),
        ([np.ma.masked_array(OUT)], [LSE], TypeError, "outs"),
        ([OUT, OUT.astype(np.float64)], [LSE, LSE], TypeError, "outs.*one dtype"),
        ([OUT, OUT], [LSE, LSE.astype(np.float64)], TypeError, "lses.*one dtype"),
        ([OUT.astype(int)], [LSE], TypeError, "outs"),
        ([OUT > 0], [LSE], TypeError, "outs"),
        ([OUT.astype(complex)], [LSE], TypeError, "outs"),
        ([OUT.astype(object)], [LSE], TypeError, "outs"),
        ([OUT.astype(np.longdouble)], [LSE], TypeError, "outs"),
        ([OUT.astype(OUT.dtype.newbyteorder())], [LSE], TypeError, "outs"),
        ([OUT], [LSE.astype(int)], TypeError, "lses"),
        ([OUT], [LSE.astype(np.float16)], TypeError, "lses"),
        ([OUT], [LSE.astype(complex)], TypeError, "lses"),
        ([OUT], [LSE.astype(LSE.dtype.newbyteorder())], TypeError, "lses"),
        ([OUT, OUT[:, :4]], [LSE, LSE], ValueError, "outs.*one shape"),
        ([OUT, OUT[:1]], [LSE, LSE[:1]], ValueError, "outs.*one shape"),
        ([OUT, OUT], [LSE, LSE[:, :4]], ValueError, "lses.*one shape"),
        ([OUT], [LSE[:, :4]], ValueError, r"lses.*\(2, 5\).*\(2, 4\)"),
        ([OUT], [OUT], ValueError, r"lses.*\(2, 5\)"),
        (OUT[0], LSE[0], ValueError, "outs"),
        ([OUT[0, 0]], [LSE[0, 0]], ValueError, "outs"),
    ],
)
def test_merge(outs, lses, kind, words):
    refused(kind, words, na.merge_attention, outs, lses)


# Backends.


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "numba"])
def test_unknown_backend(name, monkeypatch):
    expected = "unknown backend.*auto.*cpu.*cuda.*reference"
    refused(ValueError, f"backend.*{expected}", na.attention, QUERY, KEY, VALUE, backend=name)
    refused(ValueError, f"backend.*{expected}", na.attention_weights, QUERY, KEY, backend=name)
    refused(ValueError, f"set_backend.*{expected}", na.set_backend, name)
    refused(ValueError, f"use_backend.*{expected}", na.use_backend(name).__enter__)
    if name:
        monkeypatch.setenv("NUMBA_ATTENTION_BACKEND", name)
        refused(ValueError, f"NUMBA_ATTENTION_BACKEND.*{expected}", na.attention, QUERY, KEY, VALUE)


@pytest.mark.parametrize("name", [1, b"cpu", ["cpu"], None, na])
def test_backend_that_is_no_name(name):
    if name is not None:
        refused((TypeError, ValueError), "backend", na.attention, QUERY, KEY, VALUE, backend=name)
    refused((TypeError, ValueError), "set_backend", na.set_backend, name)
    refused((TypeError, ValueError), "use_backend", na.use_backend(name).__enter__)


def test_every_argument_has_a_test():
    import inspect

    covered = {*OPTIONS, "query", "key", "value", "out", "backend", "heads", "rows"}
    asked = {*inspect.signature(na.attention).parameters, *inspect.signature(na.attention_weights).parameters}
    assert asked - covered == {"return_lse"}  # any truth value will do
