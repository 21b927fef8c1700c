"""numba_attention.torch: gradients by finite differences and against PyTorch's attention, and manners of a guest."""

import importlib
import inspect
import subprocess
import sys
import threading

import numpy as np
import pytest

import numba_attention as na
from numba_attention import api

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def nat(torch):
    return importlib.import_module("numba_attention.torch")


@pytest.fixture
def normal(torch):
    """Draw a leaf that requires a gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float64, requires_grad=True):
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return x.requires_grad_(requires_grad)

    return draw


# Sizes (query, key, value) and options by name; the options that are differentiable are drawn for their shapes.
SMALL = ((1, 2, 3, 2), (1, 2, 4, 2), (1, 2, 4, 3))
GROUPED = ((4, 3, 2), (2, 4, 2), (2, 4, 2))
GRADIENTS = {
    "plain": (SMALL, {}, {}),
    "matrices": (((3, 2), (4, 2), (4, 3)), {}, {}),
    "grouped": (GROUPED, {}, {}),
    "one for all": (((2, 2, 3, 2), (1, 1, 4, 2), (1, 4, 2)), {}, {}),
    "causal": (SMALL, {"is_causal": True}, {}),
    "causal grouped": (GROUPED, {"is_causal": "bottom-right"}, {}),
    "window": (SMALL, {"window": (1, 0), "query_offset": 1}, {}),
    "scale": (SMALL, {"scale": -0.7}, {}),
    "softcap": (SMALL, {"softcap": 0.9}, {}),
    "alibi": (SMALL, {"alibi_slopes": [0.5, 0.25]}, {}),
    "mask": (SMALL, {"mask": [[True, False, True, True], [False, False, True, True], [True, True, True, False]]}, {}),
    "lengths": (((2, 1, 3, 2), (2, 1, 4, 2), (2, 1, 4, 2)), {"key_lengths": [4, 2]}, {}),
    "bias": (SMALL, {}, {"bias": (1, 2, 3, 4)}),
    "bias of keys": (((2, 2, 3, 2), (2, 1, 4, 2), (2, 1, 4, 2)), {}, {"bias": (2, 1, 1, 4)}),
    "bias of heads": (SMALL, {"is_causal": "bottom-right"}, {"bias": (2, 1, 1)}),
    "bias of one": (SMALL, {"softcap": 2}, {"bias": ()}),
    "sinks": (SMALL, {}, {"sinks": (2,)}),
    "dropout": (SMALL, {"dropout_p": 0.4, "seed": 2**63 + 5}, {}),
    "all": (GROUPED, {"is_causal": "bottom-right", "softcap": 2}, {"bias": (3, 4), "sinks": (4,)}),
}


@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_by_finite_differences(torch, nat, normal, name, return_lse):
    shapes, options, more = GRADIENTS[name]
    inputs = [normal(*shape) for shape in shapes] + [normal(*shape) for shape in more.values()]

    def function(query, key, value, *rest):
        return nat.attention(query, key, value, **options, **dict(zip(more, rest, strict=True)), return_lse=return_lse)

    assert torch.autograd.gradcheck(function, inputs)


def test_gradients_through_lse_alone(torch, nat, normal):
    query, key, value = (normal(*shape) for shape in SMALL)
    assert torch.autograd.gradcheck(lambda q, k: nat.attention(q, k, value, return_lse=True)[1], (query, key))


def test_gradients_through_merged_parts(torch, nat, normal):
    """What the gradient of lse is for: attention over two sets of keys, joined."""
    query, key, value = (normal(*shape) for shape in SMALL)
    parts = [
        nat.attention(query, key[..., s, :], value[..., s, :], return_lse=True) for s in (slice(2), slice(2, None))
    ]
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    merged = (torch.softmax(lses, 0)[..., None] * outs).sum(0)
    whole = nat.attention(query, key, value)
    torch.testing.assert_close(merged, whole)
    got = torch.autograd.grad(merged.sin().sum(), (query, key, value))
    want = torch.autograd.grad(whole.sin().sum(), (query, key, value))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("seed", range(30))
def test_agrees_with_torch(torch, nat, seed):
    rng = np.random.default_rng(seed)
    name = ["float64", "float32", "bfloat16"][seed % 3]
    dtype = getattr(torch, name)
    Hkv, group, L, S, E, Ev = (int(rng.integers(1, n)) for n in (4, 4, 70, 90, 40, 40))
    lead, H = tuple(rng.integers(1, 4, rng.integers(0, 3))), Hkv * group
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    # Stored (..., length, heads, features), as models do.
    inputs = [draw(*lead, L, H, E), draw(*lead, S, Hkv, E), draw(*lead, S, Hkv, Ev)]
    kind = ["plain", "causal", "mask", "bias"][int(rng.integers(4))]
    ours, theirs = {}, {}
    if kind == "causal":
        ours, theirs = {"is_causal": True}, {"is_causal": True}
    elif kind == "mask":
        mask = torch.rand((*lead[-1:], 1, L, S), generator=generator) < 0.7
        mask[..., 0] = True
        ours, theirs = {"mask": mask}, {"attn_mask": mask}
    elif kind == "bias":
        bias = draw(H, L, S)
        inputs.append(bias)
        ours, theirs = {"bias": bias}, {"attn_mask": bias.expand(*lead, H, L, S)}
    query, key, value = (x.transpose(-3, -2) for x in inputs[:3])

    out = nat.attention(query, key, value, **ours)
    full_key, full_value = (x.repeat_interleave(group, -3) for x in (key, value))
    want = torch.nn.functional.scaled_dot_product_attention(query, full_key, full_value, **theirs)
    assert out.dtype == dtype
    close = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 0.05}[name]
    torch.testing.assert_close(out, want, rtol=close, atol=close)

    grad_out = draw(*out.shape).detach()
    got_grads, want_grads = (torch.autograd.grad(x, inputs, grad_out) for x in (out, want))
    for got, expected in zip(got_grads, want_grads, strict=True):
        assert got.dtype == dtype
        largest = float(expected.abs().max()) + 1
        torch.testing.assert_close(got, expected, rtol=close, atol=close * largest)


@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16"])
def test_memory_is_shared(torch, nat, normal, monkeypatch, name):
    """Neither transposed nor expanded tensors are copied, nor what the kernels made."""
    seen = []

    def spy(function):
        def called(*args, **kwargs):
            result = function(*args, **kwargs)
            made = [x for x in result if x is not None]
            seen.append(({key: x for key, x in kwargs.items() if isinstance(x, np.ndarray)}, made))
            return result

        return called

    for function in ("attention", "attention_backward"):
        monkeypatch.setattr(api, function, spy(getattr(api, function)))
    dtype = getattr(torch, name)
    query = normal(2, 5, 3, 8, dtype=dtype).transpose(1, 2)
    key = normal(2, 1, 7, 8, dtype=dtype)
    value = normal(1, 1, 7, 8, dtype=dtype).expand(2, 1, 7, 8)
    mask = torch.ones(7, 5, dtype=torch.bool).T
    out, lse = nat.attention(query, key, value, mask=mask, return_lse=True)
    grads = torch.autograd.grad(out.sum(), (query, key))
    (forward, made), (backward, made_grads) = seen

    def address(array):
        return array.__array_interface__["data"][0]

    for arrays in (forward, backward):
        for given, tensor in {"query": query, "key": key, "value": value, "mask": mask}.items():
            assert address(arrays[given]) == tensor.data_ptr(), given
            assert arrays[given].strides == tuple(n * tensor.itemsize for n in tensor.stride())
    assert [address(x) for x in made] == [out.data_ptr(), lse.data_ptr()]
    assert [address(x) for x in made_grads[:2]] == [x.data_ptr() for x in grads]
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if name == "float64" else torch.float32)


def test_tensors_and_arrays_mean_the_same(torch, nat, normal):
    query, key, value = (normal(2, 2, n, 4, requires_grad=False) for n in (3, 5, 5))
    options = {
        "mask": np.flip(np.tri(3, 5, 2, dtype=bool), 0),  # NumPy's negative strides are not for PyTorch
        "bias": np.arange(15.0).reshape(3, 5),
        "query_offset": np.array([0, 2]),
        "alibi_slopes": np.array([0.5, 0.25]),
        "sinks": np.array([0.1, 0.2]),
        "query_lengths": np.array([3, 2]),
        "key_lengths": np.array([5, 4]),
        "is_causal": True,
    }
    want = na.attention(*(x.numpy() for x in (query, key, value)), **options)
    tensors = {name: torch.tensor(x.copy()) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    lists = {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in options.items()}
    for given in (options, tensors, lists):
        np.testing.assert_array_equal(nat.attention(query, key, value, **given).numpy(), want)


def test_only_what_is_needed_gets_a_gradient(torch, nat, normal):
    query, key, value = (normal(1, 3, 4, requires_grad=False) for _ in range(3))
    bias = normal(3, 3, requires_grad=False)
    assert not nat.attention(query, key, value, bias=bias).requires_grad
    value.requires_grad_()
    nat.attention(query, key, value, bias=bias).sum().backward()
    assert value.grad is not None
    assert query.grad is key.grad is bias.grad is None


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_without_gradients(torch, nat, normal, mode):
    query, key, value = (normal(2, 3, 4) for _ in range(3))
    want = nat.attention(query, key, value)
    with getattr(torch, mode)():
        out, lse = nat.attention(query, key, value, return_lse=True)
    assert not out.requires_grad
    assert not lse.requires_grad
    assert out.is_inference() == (mode == "inference_mode")
    assert torch.equal(out, want)


SECOND = {
    "plain": ({"scale": 0.6, "is_causal": True}, ()),
    "softcap, bias, sinks": ({"softcap": 2.0}, ("bias", "sinks")),
    "dropout": ({"dropout_p": 0.3, "seed": 1, "key_lengths": [3, 5]}, ()),
    "score_mod": ({"score_mod": lambda s, b, h, i, j: s + 0.1 * (i - j) * s * s}, ()),
}


def twice_differentiable(torch, nat, normal, options, more):
    operands = {"query": normal(2, 2, 4, 3), "key": normal(2, 1, 5, 3), "value": normal(2, 1, 5, 2)}
    others = {"bias": normal(2, 1, 5), "sinks": normal(2)}
    tensors = operands | {name: others[name] for name in more}

    def function(*x):
        out, lse = nat.attention(**dict(zip(tensors, x, strict=True)), **options, return_lse=True)
        return out, lse

    return function, tuple(tensors.values())


@pytest.mark.parametrize(("options", "more"), SECOND.values(), ids=SECOND)
def test_gradcheck_of_second_derivatives(torch, nat, normal, options, more):
    function, tensors = twice_differentiable(torch, nat, normal, options, more)
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors, check_fwd_over_rev=True)


def test_all_orders_of_modes_agree_with_the_formula(torch, nat, normal):
    shapes = (2, 4, 3), (1, 5, 3), (1, 5, 2)
    x, u = (tuple(normal(*shape) for shape in shapes) for _ in "xu")
    u = tuple(t.detach() for t in u)

    def ours(*x):
        return nat.attention(*x, scale=0.6, softcap=3.0, is_causal=True, return_lse=True)

    def formula(q, k, v):
        k, v = (a.repeat_interleave(2, 0) for a in (k, v))
        s = 3 * torch.tanh(0.6 * q @ k.mT / 3)
        s = torch.where(torch.ones(4, 5, dtype=torch.bool).tril(), s, -torch.inf)
        return torch.softmax(s, -1) @ v, torch.logsumexp(s, -1)

    def loss(f):
        return lambda *x: (f(*x)[0] ** 3).sum() + f(*x)[1].square().sum()

    def penalty(f):
        (grad,) = torch.autograd.grad(loss(f)(*x), x[:1], create_graph=True)
        return torch.autograd.grad((grad.norm() - 1) ** 2, x)

    func, functional, every = torch.func, torch.autograd.functional, (0, 1, 2)
    orders = {
        "jvp": lambda f: func.jvp(f, x, u)[1],
        "hessian": lambda f: func.hessian(loss(f), every)(*x),
        "jacrev of jacrev": lambda f: func.jacrev(func.jacrev(loss(f)))(*x),
        "jacrev of jacfwd": lambda f: func.jacrev(func.jacfwd(loss(f)))(*x),
        "jvp of grad": lambda f: func.jvp(func.grad(loss(f), every), x, u)[1],
        "grad of jvp": lambda f: func.grad(lambda *x: func.jvp(loss(f), x, u)[1], every)(*x),
        "hvp": lambda f: functional.hvp(loss(f), x, u)[1],
        "vhp": lambda f: functional.vhp(loss(f), x, u)[1],
        "penalty": penalty,
    }
    for name, order in orders.items():
        got, want = (torch.utils._pytree.tree_leaves(order(f)) for f in (ours, formula))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4), (3, 2, 5, 4)], ids=str)
@pytest.mark.parametrize(
    ("options", "is_one"),
    [
        ({"is_causal": True}, True),
        ({"key_lengths": 3, "mask": np.arange(25).reshape(5, 5) % 4 > 0}, True),
        ({"dropout_p": 0.3, "seed": 1}, False),
        ({"score_mod": lambda s, b, h, i, j: s + 0.1 * (b + 1) * s * s}, False),
    ],
    ids=["causal", "lengths, mask", "dropout", "mod"],
)
def test_vmap_is_one_call(torch, nat, monkeypatch, shape, options, is_one):
    """Hessian, Jacobian and a batch of gradients, against calls one after the other."""
    from numba_attention import torch_autograd

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *shape, dtype=torch.float64, generator=generator)
    counted = []
    forward = torch_autograd.api.attention_backward

    def count(*arguments, **keywords):
        counted.append(1)
        return forward(*arguments, **keywords)

    def loss(*x):
        return (nat.attention(*x, **options) ** 3).sum()

    func = torch.func
    gradients = func.vmap(func.grad(loss, (0, 1)), in_dims=(0, None, 1))
    orders = {
        "hessian": lambda: func.hessian(loss, (0, 2))(*x),
        "jacrev": lambda: func.jacrev(func.jacrev(loss, 1), 0)(*x),
        "gradients": lambda: gradients(torch.stack([x[0], x[1]]), x[1], torch.stack([x[2], x[0]], 1)),
    }
    with monkeypatch.context() as patch:
        patch.setattr(torch_autograd.Call, "takes_leading_dimensions", False)
        want = {name: order() for name, order in orders.items()}
    monkeypatch.setattr(torch_autograd.api, "attention_backward", count)
    for name, order in orders.items():
        counted.clear()
        got = order()
        if name == "jacrev":  # whose backward passes are those of all entries
            assert (len(counted) <= 2) == is_one
        leaves = torch.utils._pytree.tree_leaves
        for a, b in zip(leaves(got), leaves(want[name]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_what_has_no_derivative_raises(torch, nat, normal):
    query, key, value, table = normal(1, 3, 4), normal(1, 3, 4), normal(1, 3, 4), normal(3)
    (first,) = torch.autograd.grad(nat.attention(query, key, value).square().sum(), query, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice, not three times"):
        torch.autograd.grad(second.square().sum(), query)

    def forward(*x):
        return torch.func.jvp(nat.attention, x, x)[1]

    detached = tuple(x.detach() for x in (query, key, value))
    with pytest.raises(RuntimeError, match="forward mode over nothing but reverse mode"):
        torch.func.jvp(forward, detached, detached)
    out = nat.attention(query, key, value, score_mod=lambda s, b, h, i, j, t: s + t[j], mod_args=(table,))
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"mod_args\[0\] has no second derivative"):
        grad.sum().backward()
    slopes = table[:1].detach()
    with pytest.raises(NotImplementedError, match="alibi_slopes has no forward-mode derivative"):
        torch.func.jvp(lambda x: nat.attention(*detached, alibi_slopes=x), (slopes,), (slopes,))


def test_change_in_place_between_derivatives_is_noticed(torch, nat, normal):
    leaves = [normal(2, 3, 4) for _ in range(3)]
    tensors = [1 * x for x in leaves]
    grads = torch.autograd.grad(nat.attention(*tensors).square().sum(), leaves, create_graph=True)
    with torch.no_grad():
        tensors[1].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(x.sum() for x in grads).backward()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_penalty_in_other_dtypes(torch, nat, normal, dtype):
    def penalty(x):
        grads = torch.autograd.grad(nat.attention(*x).float().square().sum(), x, create_graph=True)
        return torch.autograd.grad(sum(x.double().square().sum() for x in grads), x)

    tensors = [normal(2, 9, 4) for _ in range(3)]
    narrow = [x.detach().to(getattr(torch, dtype)).requires_grad_() for x in tensors]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    for a, b in zip(penalty(narrow), penalty(wide), strict=True):
        assert a.dtype == getattr(torch, dtype)
        assert (a - b).norm() < (0.05 if dtype == "bfloat16" else 1e-5) * b.norm()


def test_functional_gradients(torch, nat, normal):
    query, key, value = (normal(1, 3, 4) for _ in range(3))
    nat.attention(query, key, value).sin().sum().backward()
    got = torch.func.grad(lambda x: nat.attention(x, key.detach(), value.detach()).sin().sum())(query.detach())
    torch.testing.assert_close(got, query.grad)


def test_change_in_place_is_noticed(torch, nat, normal):
    for changed in ("mask", "query"):
        tensors = {name: normal(2, 3, 4).clone() for name in ("query", "key", "value")}
        tensors["mask"] = torch.ones(3, 3, dtype=torch.bool)
        out = nat.attention(**tensors)
        with torch.no_grad():
            tensors[changed].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_empty(torch, nat, normal):
    query, key, value = normal(2, 3, 4), normal(2, 0, 4), normal(2, 0, 5)
    out, lse = nat.attention(query, key, value, return_lse=True)
    out.sum().backward()
    assert not out.any()
    assert torch.isneginf(lse).all()
    assert not query.grad.any()
    assert value.grad.shape == value.shape


def make_model(torch, nat, checkpoint=None):
    """Two projections around attention, with a learned bias and sinks."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project = torch.nn.Linear(8, 24)
            self.out = torch.nn.Linear(8, 8)
            self.bias = torch.nn.Parameter(torch.zeros(2, 6, 6))
            self.sinks = torch.nn.Parameter(torch.zeros(2))

        def attend(self, x):
            q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).movedim(-3, 0).transpose(-3, -2)
            found = nat.attention(q, k, v, bias=self.bias, sinks=self.sinks, is_causal=True)
            return self.out(found.transpose(-3, -2).flatten(-2))

        def forward(self, x):
            if checkpoint is None:
                return self.attend(x)
            from torch.utils.checkpoint import checkpoint as compute_again

            return compute_again(self.attend, x, use_reentrant=checkpoint == "reentrant")

    torch.manual_seed(0)
    return Model()


def test_training(torch, nat):
    model = make_model(torch, nat)
    x = torch.randn(4, 6, 8)
    target = x.cumsum(-2) / 3
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_checkpoint(torch, nat, kind):
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain, again = make_model(torch, nat), make_model(torch, nat, kind)
    plain(x).square().sum().backward()
    again(x).square().sum().backward()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_threads(torch, nat):
    """PyTorch's pool and Numba's side by side, from several Python threads, without a hang and with the same bits."""
    torch.set_num_threads(2)
    try:
        inputs = [torch.randn(2, 4, 150, 32, generator=torch.Generator().manual_seed(n)) for n in range(3)]
        weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(3))

        def step():
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = nat.attention(*leaves, is_causal=True)
            out @ weight  # so that PyTorch's pool spins; its bits are not compared
            return [out.detach(), *torch.autograd.grad(out, leaves, inputs[0])]

        want, wrong = step(), []

        def loop():
            try:
                for _ in range(10):
                    assert all(map(torch.equal, step(), want))
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=loop, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        loop()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "hangs"
        assert not wrong, wrong[0]
    finally:
        torch.set_num_threads(1)


def test_compile_leaves_it_alone(torch, nat, normal):
    """Dynamo would trace the NumPy code below as if it were PyTorch's."""
    query, key, value = (normal(2, 5, 4) for _ in range(3))

    def function(query):
        return nat.attention(2 * query, key, value, is_causal=True) + 1

    compiled = torch.compile(function, backend="eager")
    assert torch.equal(compiled(query), function(query))
    got, want = (torch.autograd.grad(f(query).sum(), query) for f in (compiled, function))
    assert torch.equal(*got, *want)


def test_bad_input(torch, nat, normal):
    x = normal(2, 3, 4, requires_grad=False)

    def refused(error, match, query=x, key=x, value=x, **options):
        with pytest.raises(error, match=match):
            nat.attention(query, key, value, **options)

    refused(TypeError, r"key must be a torch.Tensor, got numpy.ndarray", key=x.numpy())
    refused(TypeError, r"value must be a torch.Tensor, got builtins.list", value=x.tolist())
    refused(TypeError, r"query must have dtype .* got torch.int64; convert it with query.to", query=x.long())
    refused(TypeError, r"query must have dtype .* got torch.complex128", query=x.to(torch.complex128))
    refused(TypeError, r"must share one dtype", query=x.float())
    refused(ValueError, r"query must be on the CPU, got device meta", query=x.to("meta"))
    refused(ValueError, r"mask must be on the CPU, got device meta", mask=torch.ones(3, 3, device="meta").bool())
    refused(TypeError, r"value must be a strided tensor, got layout torch.sparse_coo", value=x.to_sparse())
    refused(TypeError, r"mask must be boolean .* pass additive values as bias=", mask=torch.zeros(3, 3))
    refused(ValueError, r"bias of shape \(3, 4\) does not broadcast", bias=torch.zeros(3, 4))
    refused(ValueError, r"key_lengths must lie between 0 and 3", key_lengths=torch.tensor([4]))
    refused(ValueError, r"key must have the head dimension", key=x[..., :2])
    slopes = torch.ones(2, requires_grad=True)
    refused(ValueError, r"alibi_slopes requires a gradient, .* pass alibi_slopes.detach\(\)", alibi_slopes=slopes)
    with torch.no_grad():
        nat.attention(x, x, x, alibi_slopes=slopes)


def test_signature_is_that_of_attention(nat):
    ours, theirs = (inspect.signature(f).parameters for f in (nat.attention, na.attention))
    assert [name for name in theirs if name in ours] == list(ours)
    assert all(theirs[name].default == parameter.default for name, parameter in ours.items())
    assert all(theirs[name].kind == parameter.kind for name, parameter in ours.items())


def test_missing_torch_is_named():
    code = "import sys; sys.modules['torch'] = None; import numba_attention.torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: numba_attention.torch needs PyTorch; install it with: pip install torch" in done.stderr


def test_missing_ml_dtypes_is_named(torch, nat, normal, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    x = normal(2, 3, 4, dtype=torch.bfloat16)
    with pytest.raises(ImportError, match=r"pip install 'numba-attention\[bfloat16\]'"):
        nat.attention(x, x, x)
