"""Seconds of first calls with an empty kernel cache, each in a process of its own: ``python first_calls.py [ROUNDS]``.

Minima over the rounds, of the CPU's time, which another process on the machine disturbs less, and of the clock. Imports
of the package are not included; those of Numba's compiler are.
"""

import os
import subprocess
import sys
import tempfile

CALLS = {
    "attention": "na.attention(x, x, x)",
    "few queries": "na.attention(x[:, :, :1], x, x)",
    "weights": "na.attention_weights(x, x)",
    "packed sequences": "na.attention_varlen(y, y, y, starts, starts)",
    "layer": "na.MultiHeadAttention(64, 8, rng=0)(x[0])",
    "gradients": "na.attention_backward(x, x, x, x, x, np.ones(x.shape[:-1], np.float32))",
}
CHILD = """
import time, numpy as np, numba_attention as na
x = np.random.default_rng(0).standard_normal((1, 8, 200, 64), dtype=np.float32)
y, starts = np.ascontiguousarray(x[0].swapaxes(0, 1)), np.array([0, 100, 200])
cpu, clock = time.process_time(), time.perf_counter()
{call}
print(time.process_time() - cpu, time.perf_counter() - clock)
"""


def first(call):
    """The CPU's seconds and the clock's of a call in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"NUMBA_ATTENTION_CACHE_DIR": folder, "NUMBA_ATTENTION_KERNELS": ""}
        command = [sys.executable, "-c", CHILD.format(call=call)]
        return [float(x) for x in subprocess.run(command, env=env, capture_output=True, check=True).stdout.split()]


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    for name, call in CALLS.items():
        cpu, clock = (min(times) for times in zip(*(first(call) for _ in range(rounds)), strict=True))
        print(f"{name:18} {cpu:.2f} s of the CPU, {clock:.2f} s")
