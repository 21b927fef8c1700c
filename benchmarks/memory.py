"""Peak memory; `peakmem_reference` is inputs, result and loaded kernel alone, so the difference is what the call needs.

The same cases, with their limits, are asserted in tests/test_memory.py.
"""

import numba_attention as na
from numba_attention.benchmarking.memory import CASES, ready


class Memory:
    params = (list(CASES),)
    param_names = ("case",)

    def setup(self, case):
        self.arguments, self.filling = ready(case)

    def peakmem_reference(self, case):
        pass

    def peakmem_attention(self, case):
        na.attention(**self.arguments)
