"""The backward pass of every case against the float64 reference, and the reference against PyTorch's autograd."""

import pytest

from cases import CASES, SOME, check_backward

NAMES = ("query", "key", "value", "bias", "sinks")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case):
    check_backward(case, "float32")


@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_dtypes(case, dtype):
    check_backward(case, dtype)
