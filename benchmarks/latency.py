"""What a process pays before its first result: imports, and a first call whose kernel is in the cache."""

import statistics
import subprocess
import sys

CHILD = """
import time
start = time.perf_counter()
import numba
numba_done = time.perf_counter()
import numba_attention as na
import numpy as np
done = time.perf_counter()
x = np.ones((1, 64, 64), np.float32)
na.attention(x, x, x)
print(numba_done - start, done - numba_done, time.perf_counter() - done)
"""


def _child():
    out = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout
    return [float(x) for x in out.split()]


class Latency:
    """Medians of five processes."""

    def setup_cache(self):
        _child()  # compiles, if the cache is empty
        return [statistics.median(times) for times in zip(*(_child() for _ in range(5)), strict=True)]

    def track_import_beyond_numba(self, times):
        return times[1]

    def track_first_call_from_cache(self, times):
        return times[2]

    track_import_beyond_numba.unit = track_first_call_from_cache.unit = "seconds"
