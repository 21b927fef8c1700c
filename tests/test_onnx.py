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
        ({"attn_mask": np.zeros((5, 9), bool)}, "mask"),
        ({"nonpad_kv_seqlen": [9]}, "nonpad_kv_seqlen must lie between 0 and 5"),
        ({"Q": np.zeros((1, 5, 8), np.float32)}, "q_num_heads must divide"),
    ],
)
def test_misuse(arguments, message):
    x = np.zeros((1, 2, 5, 4), np.float32)
    with pytest.raises(ValueError, match=message):
        nao.attention(**{"Q": x, "K": x, "V": x, **arguments})


def test_a_table_of_another_size_is_refused():
    x, table = np.zeros((1, 2, 5, 4), np.float32), np.zeros((1, 5, 3), np.float32)
    with pytest.raises(ValueError, match="cos_cache must have a row of 2 numbers"):
        nao.rotary_embedding(x, table, table)
    with pytest.raises(ValueError, match="position_ids must lie between 0 and 4, got -1 to 0"):
        nao.rotary_embedding(x, table[0], table[0], np.array([[-1, 0]]))
