"""Memory beyond inputs and result, each case in a process of its own. Speed is never asserted, memory always."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("resource")
if not os.path.exists("/proc/self/statm"):
    pytest.skip("reads the resident memory from /proc", allow_module_level=True)

from grid import share
from numba_attention.benchmarking.memory import BACKWARD_CASES, CASES, MiB


def child(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("case", share(CASES, 3))
def test_extra_memory(case):
    code = "import sys; from numba_attention.benchmarking.memory import extra; print(extra(sys.argv[1]))"
    assert child(code, case) < CASES[case][1] * MiB


@pytest.mark.parametrize("case", share(BACKWARD_CASES, 3))
def test_extra_memory_of_the_backward_pass(case):
    code = (
        "import sys; from numba_attention.benchmarking.memory import extra_backward; print(extra_backward(sys.argv[1]))"
    )
    assert child(code, case) < BACKWARD_CASES[case][1] * MiB


def test_extra_memory_of_second_derivatives():
    """A matrix of all scores would take 1024 MiB."""
    code = """
import numpy as np, numba_attention as na
from numba_attention.benchmarking.memory import level, peak
def make(L):
    q, k, v, g = np.random.default_rng(0).standard_normal((4, 1, L, 64), dtype=np.float32)
    out, lse = na.attention(q, k, v, is_causal=True, return_lse=True)
    call = na.attention_double_backward
    return lambda: call(na.Gradients(q, k, v), g, q, k, v, out, lse, is_causal=True)
make(64)()
call = make(16_384)
filling = level()
before = peak()
results = call()
print(peak() - before - sum(x.nbytes for x in results if x is not None))
"""
    assert child(code) < 64 * MiB


@pytest.mark.peer
def test_extra_memory_of_second_derivatives_through_jax():
    """A matrix of all scores would take 256 MiB, and JAX's own attention takes ten of them."""
    pytest.importorskip("jax")
    code = """
import jax, jax.numpy as jnp, numba_attention.jax as naj
from numba_attention.benchmarking.memory import level, peak
loss = lambda x: jnp.sum(naj.attention(x, x, x) ** 2)
product = jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (x,))[1])
product(jnp.ones((1, 64, 64))).block_until_ready()
x = jax.random.normal(jax.random.key(0), (1, 8192, 64))
call = product.lower(x).compile()
filling = level()
before = peak()
call(x).block_until_ready()
print(peak() - before)
"""
    assert child(code) < 96 * MiB


def test_measurement_sees_a_copy():
    code = """
from numba_attention.benchmarking.memory import peak, ready
arguments, filling = ready("none")
before = peak()
copies = [arguments["key"] + 1 for _ in range(8)]
print(peak() - before - sum(x.nbytes for x in copies))
"""
    assert abs(child(code)) < 1.5 * MiB
