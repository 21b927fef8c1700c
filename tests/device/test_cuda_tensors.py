"""Looks of PyTorch's tensors by machine code tell apart what the checks in Python tell apart."""

import ctypes
import itertools
import types

import numpy as np
import pytest

from numba_attention import NumbaAttentionWarning
from numba_attention.backends import cuda  # noqa: F401 - it says where the machine code is
from numba_attention.device import arrays, driver
from numba_attention.device.tensors import looks_of
from numba_attention.errors import BackendUnavailableError

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


class Interrupted(torch.Tensor):
    """Tensors whose user presses ctrl-C while PyTorch runs Python for them."""

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        raise KeyboardInterrupt


def without_storage(x):
    x.untyped_storage().resize_(0)
    return x


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
        "a dtype that DLPack does not know": torch.zeros(3, 4, dtype=torch.uint8).view(torch.bits8),
        "freed": without_storage(torch.zeros(3, 4)),
        "freed, with a distance from the storage": without_storage(torch.zeros(5, 4)[2:]),
    }
    for name, x in refused.items():
        assert looks.of(torch.Tensor, (plain, x)) is None, name
        assert looks.of(torch.Tensor, (plain, plain)) is not None, f"after {name}"
    assert looks.of(torch.Tensor, (plain,) * 16) is not None
    assert looks.of(torch.Tensor, (plain,) * 17) is None
    assert looks.of(Subclass, (refused["of another type"],)) is not None


def test_what_ends_a_program_is_passed_on(looks):
    with pytest.raises(KeyboardInterrupt):
        looks.of(Interrupted, (torch.zeros(3, 4).as_subclass(Interrupted),))


def test_calls_that_fail(looks):
    """Machine code reaches Python's exceptions, wherever the system has put the two."""
    for arguments in ((), (1, 2)):
        with pytest.raises(TypeError, match="expected 9 arguments"):
            driver.machine().look(*arguments)
    with pytest.raises(OverflowError):
        driver.machine().look((), int, None, False, "", None, 2**64, 0, 0)


def test_machine_code_that_cannot_be_compiled(monkeypatch):
    """Calls are then repeated in Python, and nobody tries again at each call."""
    tries = []

    def fails():
        tries.append(1)
        raise KeyError("of another release of LLVM")

    monkeypatch.setattr(driver, "_machine", None)
    monkeypatch.setattr(driver, "_provider", fails)
    with pytest.warns(NumbaAttentionWarning, match="runs in Python"):
        assert driver.machine() is None
    assert driver.machine() is None
    assert len(tries) == 1


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
    # Tables as dlpack.h has them: major and minor version, that of an older version, and five functions.
    word = ctypes.c_uint64
    oldest, one, two = ((word * 7)(version, 0, *range(11, 16)) for version in (0, 1, 2))
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)

    def found(table, older=None):
        table[1] = 0 if older is None else ctypes.addressof(older)
        Module.Tensor.__dlpack_c_exchange_api__ = new(ctypes.addressof(table), b"dlpack_exchange_api", None)
        return looks_of(Module)

    assert found(one)._read == 14
    assert found(two, one)._read == 14
    for table, older in ((two, None), (two, oldest), (oldest, None)):
        assert found(table, older) is None
    one[5] = 0  # a function that a library need not have
    assert found(one) is None


@pytest.fixture
def family(monkeypatch):
    """PyTorch, whose tensors of the host say that they are on a GPU, and whose results are on the host."""

    class OnHost(types.ModuleType):
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, shape, dtype, device):
            return torch.empty(shape, dtype=dtype)

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = arrays.TorchFamily(OnHost("torch"))
    monkeypatch.setattr(arrays, "_torch", found)
    return found


class Wrapper(torch.Tensor):
    """Tensors around others, as DTensor is."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, strides=x.stride(), dtype=x.dtype, device=x.device)

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        raise NotImplementedError


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty_like(torch.eye(3))


def inside(transform):
    """The tensor that a function gets of a transform of torch.func."""
    found = []
    transform(lambda x: (found.append(x), x.sum())[1])(torch.zeros(3, 4))
    return found[0]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_tensors_without_memory(family):
    """They have an address of 0, or a distance from 0, or none: kernels would end the context of the whole process."""
    given = {
        "freed": without_storage(torch.zeros(3, 4)),
        "freed, with a distance": without_storage(torch.zeros(5, 4)[2:]),
        "fake": fake(),
        "a wrapper": Wrapper(torch.zeros(3, 4)),
        "zeros by themselves": torch._efficientzerotensor((3, 4)),
        "of vmap": inside(torch.func.vmap),
    }
    for name, x in given.items():
        assert family.look(x) is None, name
        with pytest.raises(TypeError, match="without memory cannot be taken"):
            family.take(x, 1)
    ragged = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)])
    assert family.look(ragged) is None
    with pytest.raises(TypeError, match="a nested tensor cannot be taken"):
        family.take(ragged, 1)
    nothing = torch.zeros(0, 4)
    assert family.take(nothing, 1).shape == (0, 4)
    low = torch.zeros(3, 4)  # as there may be in a process whose heap begins low
    low.data_ptr = lambda: 4096
    assert family.take(low, 1).ctypes.data == 4096


def test_results_where_pytorch_makes_no_memory(family):
    """The error says so, and calls outside of such a mode make memory as before."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def make():
        return family.new((2, 3), np.dtype("float32"), 0, 1)

    def in_a_transform(x):
        with pytest.raises(BackendUnavailableError, match=r"makes no memory for results here"):
            make()
        return x.sum()

    for _ in range(2):  # where no kind of result is known, and where one is
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            pytest.raises(BackendUnavailableError, match="makes no memory for results here"),
        ):
            make()
        torch.func.grad(in_a_transform)(torch.zeros(3))
        tensor, address = make()
        assert type(tensor) is torch.Tensor
        assert tensor.data_ptr() == address
    with torch.inference_mode():
        family.new((5, 3), np.dtype("float32"), 0, 1)
    assert not family.new((5, 3), np.dtype("float32"), 0, 1)[0].is_inference()


def test_tangents_are_not_lost(family, looks):
    forward = torch.autograd.forward_ad
    x = torch.zeros(3, 4)
    assert arrays.looks_of(torch.Tensor) is not None
    with forward.dual_level():
        dual = forward.make_dual(x, torch.ones(3, 4))
        assert arrays.looks_of(torch.Tensor) is None
        assert family.look(dual) is None
        with pytest.raises(TypeError, match="a tensor with a tangent would lose it"):
            family.take(dual, 1)
        assert family.take(x, 1).shape == (3, 4)
    assert arrays.looks_of(torch.Tensor) is not None


def test_dtypes_that_numpy_has_not(family):
    """Headers have any dtype of ml_dtypes: the checks of calls refuse it, and name the argument."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        x = torch.zeros(3, 8, dtype=torch.uint8).view(getattr(torch, name))
        header = family.take(x, 1)
        assert header.dtype == getattr(ml_dtypes, name)
        assert (header.shape, header.strides) == (tuple(x.shape), tuple(n * x.element_size() for n in x.stride()))
        assert header.ctypes.data == x.data_ptr()
