"""Looks of PyTorch's tensors by machine code tell apart what the checks in Python tell apart."""

import itertools

import pytest

from numba_attention.backends import cuda  # noqa: F401 - it says where the machine code is
from numba_attention.device import driver
from numba_attention.device.tensors import looks_of

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def looks():
    found = looks_of(torch)
    if found is None:
        pytest.skip("this PyTorch has no DLPack exchange API")
    assert driver.machine() is not None
    return found


class Subclass(torch.Tensor):
    """Tensors of another type."""


def tensors():
    """Operands that a call must not take for one another, by name."""
    base, other = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 8)
    room = torch.zeros(1000, dtype=torch.float16)
    at = (-room.data_ptr() % 16) // 2
    shifted = {n: room[at + n :][:192].view(2, 3, 4, 8) for n in (1, 2)}
    return {
        "plain": (base, other),
        "swapped axes": (base.transpose(1, 2).contiguous().transpose(1, 2), other),
        "other sizes": (torch.zeros(2, 3, 8, 4), other),
        "fewer axes": (torch.zeros(6, 4, 8), other),
        "a number": (torch.zeros(()), other),
        "one axis": (torch.zeros(1), other),
        "second of other sizes": (base, torch.zeros(2, 3, 5, 8)),
        "double": (base.double(), other),
        "int32": (base.int(), other),
        "half": (base.half(), other),
        "bfloat16": (base.bfloat16(), other),
        "the same twice": (base, base),
        "three": (base, other, torch.zeros(2, 3, 4, 8)),
        "first and third alike": (base, other, base),
        "second and third alike": (base, other, other),
        "with None": (base, other, None),
        "None between": (base, None, other),
        "None first": (None, base, other),
        "expanded": (torch.zeros(2, 3, 1, 8).expand(2, 3, 4, 8), other),
        **{f"{2 * n} bytes off": (shifted[n], base) for n in shifted},
        "both off": (shifted[1], shifted[2]),
    }


def test_what_differs_is_told_apart(looks):
    given = tensors()
    found = {name: looks.of(torch.Tensor, operands) for name, operands in given.items()}
    assert None not in found.values()
    for (one, (a, *_)), (two, (b, *_)) in itertools.combinations(found.items(), 2):
        assert a != b, f"{one} and {two} look the same"
    for name, operands in tensors().items():  # others of the same kind
        assert looks.of(torch.Tensor, operands)[0] == found[name][0], name
        present = [x.data_ptr() for x in operands if x is not None]
        key, addresses, device = looks.of(torch.Tensor, operands)
        assert addresses[: len(present)] == present, name
        assert device is None, "not accepted so far"
        assert not looks.accept((key, name), addresses, [*present[:-1], 1], 0)
    operands = given["with None"]
    key, addresses, _ = looks.of(torch.Tensor, operands)
    present = [x.data_ptr() for x in operands[:2]]
    assert looks.accept(key, addresses, present, 3)
    assert looks.of(torch.Tensor, operands) == (key, present, 3)


def test_what_is_refused(looks):
    plain = torch.zeros(3, 4)
    negated = torch.zeros(3, 4, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    refused = {
        "requires a gradient": plain.clone().requires_grad_(),
        "lazily negated": negated,
        "no memory": torch.zeros(0, 4),
        "sparse": torch.eye(3).to_sparse(),
        "of no device": torch.zeros(3, 4, device="meta"),
        "of another type": plain.clone().as_subclass(Subclass),
        "no tensor": "text",
        "nine axes": torch.zeros([1] * 9),
    }
    for name, x in refused.items():
        assert looks.of(torch.Tensor, (plain, x)) is None, name
        assert looks.of(torch.Tensor, (plain, plain)) is not None, f"after {name}"
    assert looks.of(torch.Tensor, (plain,) * 16) is not None
    assert looks.of(torch.Tensor, (plain,) * 17) is None
    assert looks.of(Subclass, (refused["of another type"],)) is not None


def test_without_machine_code(looks, monkeypatch):
    monkeypatch.setattr(driver, "_machine", None)
    monkeypatch.setattr(driver, "_provider", lambda: None)
    assert looks.of(torch.Tensor, (torch.zeros(3),)) is None

    def fails():
        raise RuntimeError("the compiler is busy")

    monkeypatch.setattr(driver, "_provider", fails)
    assert looks.of(torch.Tensor, (torch.zeros(3),)) is None


def test_other_versions_of_the_interface(monkeypatch):
    class Module:
        class Tensor:
            is_neg = None

    assert looks_of(Module) is None
    Module.Tensor.__dlpack_c_exchange_api__ = object()
    assert looks_of(Module) is None
