"""Peak memory; `peakmem_reference` is inputs, result and loaded kernel alone, so the difference is what the call needs.

The same cases, with their limits, are asserted in tests/test_memory.py.
"""

import numba_attention as na
from numba_attention.benchmarking.memory import BACKWARD_CASES, CASES, backward, level, ready


class Memory:
    params = (list(CASES),)
    param_names = ("case",)

    def setup(self, case):
        self.arguments, self.filling = ready(case)

    def peakmem_reference(self, case):
        pass

    def peakmem_attention(self, case):
        na.attention(**self.arguments)


class MemoryOfGradients:
    """Beyond the reference, these count the gradients too, and those of a bias are as large as it."""

    params = (list(BACKWARD_CASES),)
    param_names = ("case",)

    def setup(self, case):
        length, _, make = BACKWARD_CASES[case]
        backward(make(64))()
        self.call = backward(make(length))
        self.filling = level()

    def peakmem_reference(self, case):
        pass

    def peakmem_attention_backward(self, case):
        self.call()
