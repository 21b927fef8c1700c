"""Kernels on the threads of PyTorch's OpenMP: the same bits, where they are used, and where they must not be."""

import importlib
import os
import subprocess
import sys
import textwrap
import threading

import numba
import numpy as np
import pytest

import numba_attention as na
from numba_attention import teams

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def two_threads(torch):
    before = numba.get_num_threads(), torch.get_num_threads()
    numba.set_num_threads(min(2, before[0]))
    torch.set_num_threads(2)
    yield
    numba.set_num_threads(before[0])
    torch.set_num_threads(before[1])


@pytest.fixture
def nat(torch):
    return importlib.import_module("numba_attention.torch")


@pytest.fixture
def regions(nat, monkeypatch):
    """The numbers of threads of the regions that are begun."""
    TEAM = importlib.import_module("numba_attention.torch_autograd").TEAM
    if TEAM is None:
        pytest.skip("PyTorch's OpenMP cannot be called here")
    if numba.get_num_threads() < 2:
        pytest.skip("one thread")
    numbers = []

    def parallel(function, data, threads, flags):
        numbers.append(threads)
        TEAM.parallel(function, data, threads, flags)

    team = teams.Team(parallel, TEAM.size)
    monkeypatch.setattr("numba_attention.torch_autograd.TEAM", team)
    return numbers


def tensors(torch, *shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "softcap": 3.0}, {"window": (30, 5)}], ids=str)
def test_the_same_bits(options, regions, torch, nat):
    q, k, v = tensors(torch, 2, 4, 300, 32)
    out, lse = nat.attention(q, k, v, return_lse=True, backend="cpu", **options)
    (out.square().sum() + lse.sum()).backward()
    assert regions == [2, 2]
    arrays = [x.detach().numpy() for x in (q, k, v)]
    want, want_lse = na.attention(*arrays, return_lse=True, **options)
    assert out.detach().numpy().tobytes() == want.tobytes()
    grads = na.attention_backward(2 * want, *arrays, want, want_lse, grad_lse=np.ones_like(want_lse), **options)
    for x, grad in zip((q, k, v), grads, strict=False):
        assert x.grad.numpy().tobytes() == grad.tobytes()


def test_another_number_of_threads_is_for_the_own_pool(regions, torch, nat):
    q, k, v = tensors(torch, 2, 4, 300, 32)
    torch.set_num_threads(1)
    nat.attention(q, k, v, backend="cpu")
    assert not regions


def test_threads_are_lent_to_one_thread_and_for_a_while():
    team = teams.Team(None, lambda: 2)
    found = []
    with teams.lent(team):
        assert teams.team_for(2) is team
        assert teams.team_for(3) is None
        with teams.lent(None):
            assert teams.team_for(2) is None
        thread = threading.Thread(target=lambda: found.append(teams.team_for(2)))
        thread.start()
        thread.join()
    assert found == [None]
    assert teams.team_for(2) is None


def test_a_library_that_is_not_loaded():
    assert teams.of_library("/no/such/library.so", lambda: 2) is None


def test_calls_at_the_same_time(regions, torch, nat):
    q, k, v = (x.detach() for x in tensors(torch, 2, 4, 300, 32))
    want = nat.attention(q, k, v, backend="cpu")
    results = []
    threads = [threading.Thread(target=lambda: results.append(nat.attention(q, k, v, backend="cpu"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(x, want) for x in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_none_of_the_threads():
    code = """
        import os, torch, numba, numba_attention.torch as nat
        x = torch.ones(2, 4, 300, 32)
        torch.set_num_threads(2)
        x @ x.mT
        nat.attention(x, x, x, backend="cpu")
        child = os.fork()
        if not child:
            good = torch.equal(nat.attention(x, x, x, backend="cpu")[0, 0, 0], x[0, 0, 0])
            os._exit(0 if good else 1)
        assert os.waitpid(child, 0)[1] == 0
        nat.attention(x, x, x, backend="cpu")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    subprocess.run(command, env=environment, check=True, timeout=100)
