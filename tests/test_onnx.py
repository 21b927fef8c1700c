"""ONNX's own test cases of its operators, run by the package."""

import warnings

import numpy as np
import pytest

import numba_attention.onnx as nao

OPERATORS = ("Attention", "RotaryEmbedding")


def official_cases():
    """The node cases of the installed onnx; those that expand an operator to primitive ones do not have it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import onnx.backend.test.case.node as node
            import onnx.backend.test.case.node.attention
            import onnx.backend.test.case.node.rotaryembedding  # noqa: F401
    except ImportError:
        return []
    # `collect_testcases` computes the cases of all operators, which takes 10 s.
    cases = {case.name: case for case in node._NodeTestCases}
    return [case for case in cases.values() if any(n.op_type in OPERATORS for n in case.model.graph.node)]


CASES = official_cases()
pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def onnx():
    return pytest.importorskip("onnx")


def compare(case, got, want):
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        # float16 and bfloat16: the operator rounds scores and probabilities to them, and this package does not.
        half = {"float16": 2e-3, "bfloat16": 2e-2}.get(x.dtype.name, 0)
        x, y = (np.asarray(a, np.float64) for a in (x, y))
        np.testing.assert_allclose(x, y, rtol=max(case.rtol, half), atol=max(case.atol, 1e-6, half))


def test_there_are_cases(onnx):
    by_operator = [{n.op_type for n in case.model.graph.node} for case in CASES]
    assert sum("Attention" in ops for ops in by_operator) >= 60
    assert sum("RotaryEmbedding" in ops for ops in by_operator) >= 8


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_official_case(onnx, case):
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(case.model, new_ops=nao.ops)
    names = [x.name for x in case.model.graph.input]
    for inputs, outputs in case.data_sets:
        compare(case, evaluator.run(None, dict(zip(names, inputs, strict=True))), outputs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_official_case_as_function(onnx, case):
    (node,) = case.model.graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    names = [x.name for x in case.model.graph.input]
    for inputs, outputs in case.data_sets:
        by_name = dict(zip(names, inputs, strict=True))
        arguments = [by_name.get(name) for name in node.input]
        if node.op_type == "RotaryEmbedding":
            compare(case, [nao.rotary_embedding(*arguments, **attributes)], outputs)
            continue
        if len(node.output) == 4:
            attributes.setdefault("qk_matmul_output_mode", 0)
        got = nao.attention(*arguments, **attributes)
        compare(case, [x for x, name in zip(got, node.output, strict=False) if name], outputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"past_key": np.zeros((1, 2, 3, 4), np.float32)}, "past_key and past_value must be given together"),
        ({"left_window_size": -2}, "left_window_size must be -1"),
        ({"qk_matmul_output_mode": 4}, "qk_matmul_output_mode must be 0, 1, 2 or 3"),
        ({"attn_mask": np.zeros((5, 9), bool)}, r"attn_mask of shape \(5, 9\) does not broadcast to \(1, 2, 5, 5\)"),
        ({"nonpad_kv_seqlen": [9]}, "nonpad_kv_seqlen must lie between 0 and 5"),
        ({"Q": np.zeros((1, 5, 8), np.float32)}, "q_num_heads must divide"),
    ],
)
def test_misuse(arguments, message):
    x = np.zeros((1, 2, 5, 4), np.float32)
    with pytest.raises(ValueError, match=message):
        nao.attention(**{"Q": x, "K": x, "V": x, **arguments})


X = np.zeros((1, 2, 5, 4), np.float32)
FLAT = np.zeros((1, 5, 8), np.float32)
TABLE = np.zeros((5, 2), np.float32)
PLACES = np.zeros((1, 5), int)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"Q": X.astype(int)}, TypeError, "Q must have dtype float32"),  # the result would be rounded to integers
        ({"V": X.astype(np.complex64)}, TypeError, "V must have dtype float32"),
        ({"K": X[..., :3]}, ValueError, "K must have as many features in a head as Q, 4, got 3"),
        ({"V": X[:, :, :3]}, ValueError, "V must have as many heads and keys as K"),
        ({"K": np.tile(X, (1, 2, 1, 1)), "V": np.tile(X, (1, 2, 1, 1))}, ValueError, "K must have a number of heads"),
        ({"Q": np.tile(X, (2, 1, 1, 1)), "K": np.tile(X, (3, 1, 1, 1))}, ValueError, "must have one batch size"),
        ({"past_key": X, "past_value": X[:, :, :3]}, ValueError, "past_value must be as long as past_key, 5, got 3"),
        ({"Q": FLAT, "q_num_heads": 2.0}, TypeError, "q_num_heads must be an integer"),
        ({"Q": FLAT, "q_num_heads": -2}, ValueError, "q_num_heads must be positive"),
        ({"attn_mask": "a"}, TypeError, "attn_mask must be floating point"),
        ({"attn_mask": np.zeros((5, 5), complex)}, TypeError, "attn_mask must be floating point"),
        ({"is_causal": "no"}, TypeError, "is_causal must be 0 or 1"),
        ({"is_causal": np.ones(2)}, TypeError, "is_causal must be 0 or 1"),
        ({"left_window_size": 1.5}, TypeError, "left_window_size must be an integer"),
        ({"right_window_size": "1"}, TypeError, "right_window_size must be an integer"),
        ({"softcap": "a"}, TypeError, "softcap must be a real number"),
        ({"softmax_precision": 99}, ValueError, "softmax_precision must be one of"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        nao.attention(**{"Q": X, "K": X, "V": X, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"X": X.astype(int)}, TypeError, "X must have dtype float32"),
        ({"X": FLAT, "num_heads": 2.0}, TypeError, "num_heads must be an integer"),
        ({"cos_cache": TABLE * 1j}, TypeError, "cos_cache must be floating point"),
        ({"sin_cache": TABLE.astype(int)}, TypeError, "sin_cache must be floating point"),
        ({"position_ids": PLACES[0]}, ValueError, r"position_ids must have shape \(1, 5\), got \(5,\)"),
        ({"rotary_embedding_dim": 3}, ValueError, "rotary_embedding_dim must be even"),
        ({"rotary_embedding_dim": -4}, ValueError, "rotary_embedding_dim must be positive"),
        ({"rotary_embedding_dim": 6}, ValueError, "rotary_embedding_dim must be even and at most the 4 features"),
        ({"X": X[..., :3]}, ValueError, "rotary_embedding_dim must be even"),
        ({"interleaved": "no"}, TypeError, "interleaved must be 0 or 1"),
    ],
)
def test_wrong_arguments_of_rotary_embedding_are_named(arguments, error, message):
    given = {"X": X, "cos_cache": TABLE, "sin_cache": TABLE, "position_ids": PLACES, **arguments}
    with pytest.raises(error, match=message):
        nao.rotary_embedding(**given)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)])
def test_one_sequence_of_queries_or_keys_for_all(sizes):
    rng = np.random.default_rng(0)
    query, key = (rng.standard_normal((n, 5, 8)) for n in sizes)
    got = nao.attention(query, key, key, q_num_heads=2, kv_num_heads=2, attn_mask=np.ones((2, 1, 5, 5), bool)).Y
    heads = lambda x: x.reshape(len(x), 5, 2, 4).swapaxes(1, 2)  # noqa: E731
    weights = np.exp(heads(query) @ heads(key).swapaxes(-1, -2) / 2)
    want = (weights / weights.sum(-1, keepdims=True)) @ heads(key)
    np.testing.assert_allclose(got, want.swapaxes(1, 2).reshape(2, 5, 8), rtol=1e-12)


def test_a_table_of_another_size_is_refused():
    x, table = np.zeros((1, 2, 5, 4), np.float32), np.zeros((1, 5, 3), np.float32)
    with pytest.raises(ValueError, match="cos_cache must have a row of 2 numbers"):
        nao.rotary_embedding(x, table, table)
    with pytest.raises(ValueError, match="position_ids must lie between 0 and 4, got -1 to 0"):
        nao.rotary_embedding(x, table[0], table[0], np.array([[-1, 0]]))
