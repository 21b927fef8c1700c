"""Which backend runs a call, and who is told when it cannot."""

import contextvars
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import numba_attention as na
from numba_attention.backends import cpu, reference

X = np.ones((2, 3, 4), np.float32)
ENVIRONMENT = "NUMBA_ATTENTION_BACKEND"


@pytest.fixture
def ran(monkeypatch):
    """The names of the backends that ran, in order."""
    names = []
    for name, module in {"cpu": cpu, "reference": reference}.items():
        for task in ("forward", "weights"):
            monkeypatch.setattr(module, task, lambda problem, name=name: names.append(name))
    return names


def call(**kwargs):
    na.attention(X, X, X, **kwargs)


def test_arrays_of_numpy_run_on_the_cpu(ran):
    call()
    call(backend="auto")
    na.attention_weights(X, X)
    assert ran == ["cpu"] * 3


def test_argument(ran):
    call(backend="reference")
    na.attention_weights(X, X, backend="reference")
    call(backend="cpu")
    assert ran == ["reference", "reference", "cpu"]


def test_order(ran, monkeypatch):
    """Argument before use_backend before set_backend before the environment."""
    monkeypatch.setenv(ENVIRONMENT, "reference")
    call()
    na.set_backend("cpu")
    call()
    with na.use_backend("reference"):
        call()
        call(backend="cpu")
    call()
    assert ran == ["reference", "cpu", "reference", "cpu", "cpu"]


def test_environment(ran, monkeypatch):
    for name, expected in [("reference", "reference"), ("cpu", "cpu"), ("auto", "cpu"), ("", "cpu")]:
        monkeypatch.setenv(ENVIRONMENT, name)
        call()
        assert ran.pop() == expected


def test_auto_may_be_chosen_too(ran, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "reference")
    na.set_backend("reference")
    with na.use_backend("auto"):
        call()
    na.set_backend("auto")
    call()
    na.set_backend("reference")
    call(backend="auto")
    assert ran == ["cpu", "cpu", "cpu"]


def test_nested(ran):
    with na.use_backend("reference"):
        with na.use_backend("cpu"):
            call()
        call()
    call()
    assert ran == ["cpu", "reference", "cpu"]


def test_left_by_an_error(ran):
    def fail():
        raise KeyError("x")

    with pytest.raises(KeyError), na.use_backend("reference"):
        fail()
    call()
    assert ran == ["cpu"]


def block(backend):
    """Run in a block that goes on until the generator is closed."""
    with na.use_backend(backend):
        yield
        yield


def test_blocks_of_generators_end_in_any_order(ran):
    first, second = block("reference"), block("cpu")
    next(first)
    next(second)
    first.close()
    call()
    second.close()
    call()
    assert ran == ["cpu", "cpu"]  # and not the choice of the first block, which has ended
    third, fourth = block("reference"), block("reference")
    next(third)
    next(fourth)
    third.close()
    call()
    fourth.close()
    call()
    assert ran[2:] == ["reference", "cpu"]


def test_a_block_may_be_closed_in_another_context(ran):
    generator = block("reference")
    contextvars.copy_context().run(next, generator)
    generator.close()
    call()
    assert ran == ["cpu"]


def test_decorator(ran):
    @na.use_backend("reference")
    def function():
        call()

    function()
    function()
    call()
    assert ran == ["reference", "reference", "cpu"]


def test_context_is_of_one_thread(ran):
    inside, done = threading.Event(), threading.Event()

    def other():
        inside.wait(10)
        call()
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with na.use_backend("reference"):
        inside.set()
        done.wait(10)
    thread.join(10)
    assert ran == ["cpu"]


def test_default_is_of_the_process(ran):
    na.set_backend("reference")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result(10)
    assert ran == ["reference"]


def test_environment_of_a_fresh_process():
    code = "import numpy as np, numba_attention as na, sys; x = np.ones((3, 4)); na.attention(x, x, x);"
    code += "print('numba_attention.backends.cpu' in sys.modules)"
    for name, expected in [("reference", "False"), ("cpu", "True")]:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, ENVIRONMENT: name},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected


def test_cuda_says_why_not():
    status = na.backends()["cuda"]
    if status:
        pytest.skip("runs here")
    for attempt in (
        lambda: call(backend="cuda"),
        lambda: na.attention_weights(X, X, backend="cuda"),
        lambda: na.set_backend("cuda"),
        na.use_backend("cuda").__enter__,
    ):
        with pytest.raises(na.BackendUnavailableError, match=r"'cuda' cannot run here: .{10,}") as caught:
            attempt()
        assert status.reason in str(caught.value)


def test_failed_choice_changes_nothing(ran):
    na.set_backend("reference")
    for name, kind in [("cuda", na.BackendUnavailableError), ("gpu", ValueError)]:
        if name == "cuda" and na.backends()["cuda"]:
            continue
        with pytest.raises(kind):
            na.set_backend(name)
    call()
    assert ran == ["reference"]


def test_environment_that_cannot_run(monkeypatch):
    if na.backends()["cuda"]:
        pytest.skip("runs here")
    monkeypatch.setenv(ENVIRONMENT, "cuda")
    with pytest.raises(na.BackendUnavailableError, match="cuda"):
        call()
    call(backend="reference")


class OnGPU:
    """What CuPy and Numba device arrays have in common."""

    @property
    def __cuda_array_interface__(self):
        return {"shape": (2, 3, 4), "typestr": "<f4", "data": (0, False), "version": 3}


class ByDLPack:
    def __dlpack_device__(self):
        return (2, 0)


@pytest.mark.parametrize("kind", [OnGPU, ByDLPack])
@pytest.mark.parametrize("place", range(3))
def test_arrays_on_a_gpu_ask_for_cuda(kind, place):
    if na.backends()["cuda"]:
        pytest.skip("runs here")
    arrays = [X, X, X]
    arrays[place] = kind()
    with pytest.raises(na.BackendUnavailableError, match="cuda"):
        na.attention(*arrays)


def test_backends():
    found = na.backends()
    assert set(found) == {"cpu", "cuda", "reference"}
    for status in found.values():
        assert bool(status) == status.usable == (status.reason == "")
    assert found["cpu"]
    assert found["reference"]


def test_without_jit():
    code = "import numpy as np, numba_attention as na; print(na.backends()['cpu'].reason); x = np.ones((3, 4));"
    code += "print(na.attention(x, x, x, backend='reference').sum()); na.attention(x, x, x)"
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "NUMBA_DISABLE_JIT" in done.stdout
    assert "12.0" in done.stdout
    assert "BackendUnavailableError" in done.stderr
    assert "NUMBA_DISABLE_JIT" in done.stderr


def test_a_backend_that_is_being_imported(monkeypatch):
    """A handler that interrupts the first call of a process while it imports the backend finds half of a module."""
    q = np.ones((2, 4, 8))
    na.attention(q, q, q, backend="reference")
    module = sys.modules["numba_attention.backends.reference"]
    monkeypatch.setattr(module.__spec__, "_initializing", True, raising=False)
    monkeypatch.delitem(sys.modules["numba_attention.backends"]._usable, "reference")
    with pytest.raises(RuntimeError, match="the backend 'reference' is still being imported by what a signal handler"):
        na.attention(q, q, q, backend="reference")
    monkeypatch.undo()
    np.testing.assert_allclose(na.attention(q, q, q, backend="reference"), q)
