"""Threads and forks, each case in a process of its own."""

import os
import subprocess
import sys
import textwrap

import pytest

PREPARE = """
    import os, sys, threading
    import numpy as np, numba
    import numba_attention as na
    numba.set_num_threads(2)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 4, 300, 32), dtype=np.float32) for _ in range(3))
    expected = na.attention(q, k, v, backend="reference")
    out, lse = na.attention(q, k, v, return_lse=True)
    gradients = na.attention_backward(q, q, k, v, out, lse)[:3]
    def check():
        np.testing.assert_allclose(na.attention(q, k, v), expected, atol=1e-5)
        for a, b in zip(na.attention_backward(q, q, k, v, out, lse), gradients):
            np.testing.assert_array_equal(a, b)
    check()
"""


def run(body):
    code = textwrap.dedent(PREPARE) + textwrap.dedent(body)
    env = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_python_threads_at_once():
    run(
        """
        wrong = []
        def loop():
            for _ in range(50):
                try:
                    check()
                except BaseException as error:
                    wrong.append(error)
        threads = [threading.Thread(target=loop) for _ in range(4)]
        [t.start() for t in threads]; [t.join() for t in threads]
        assert not wrong, wrong[0]
        """,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_after_use():
    run(
        """
        child = os.fork()
        if child == 0:
            check()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        check()
        """,
    )


@pytest.mark.torch
def test_caller_that_flushes_subnormals():
    """As XLA does in its threads. Each result is that of one thread, and of a caller that does not."""
    pytest.importorskip("torch")
    run(
        """
        import torch

        def compute(threads, flush):
            numba.set_num_threads(threads)
            torch.set_flush_denormal(flush)
            out, lse = na.attention(60 * q, k, v, return_lse=True)
            return [out, *na.attention_backward(v, 60 * q, k, v, out, lse)[:3]]

        with np.errstate(all="ignore"):
            want = compute(1, False)
            for case in [(2, False), (1, True), (2, True)]:
                for a, b in zip(compute(*case), want):
                    np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32), err_msg=str(case))
        """,
    )
