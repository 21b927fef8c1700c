"""The contenders: for each library, a function from a `Row` to a call without arguments that returns the result."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..options import Array
from .rows import FIRST_CALLS, Row, block_mask, directions, gradient_of_out, inputs, numpy_dtype, scale
from .rules import mod_of

Call = Callable[[], Any]

GEMM_SIZE = 2048
READ_BYTES = 2**28
_EINSUM_PAIRS = 2**23  # above this number of scores, einsum takes seconds and gigabytes, and is left out
_TWICE = ("jvp", "double backward", "hvp")
_SCORES_BYTES = 2**31  # a library that would write more bytes of scores than this is left out


class Skipped(Exception):
    """A contender does not take part in a row; the message says why."""


def ours(row: Row, threads: int) -> Call:
    """`numba_attention.attention` and `attention_backward`, the whole public calls."""
    if row.task in FIRST_CALLS:
        return lambda: _first_call(row, threads)
    import numba

    from .. import attention, attention_backward

    numba.set_num_threads(threads)
    arrays = inputs(row)
    q, k, v = (arrays.pop(name) for name in ("query", "key", "value"))
    options: dict[str, Any] = dict(arrays)
    if row.blocks:
        options["mask"] = block_mask(row)
    if row.is_causal:
        options["is_causal"] = True
    if row.window is not None:
        options["window"] = row.window
    if row.softcap is not None:
        options["softcap"] = row.softcap
    if row.dropout:
        options |= {"dropout_p": row.dropout, "seed": 1}
    if row.mod:
        options["score_mod"], options["mod_args"] = mod_of(row.mod, row.H)
    if row.task == "forward":
        return lambda: attention(q, k, v, **options)
    if row.task in _TWICE:
        return _second_derivatives(row, (q, k, v), options)
    out, lse = attention(q, k, v, return_lse=True, **options)
    grad_out = gradient_of_out(row)

    learned = "all" if row.mod == "table" else None

    def backward() -> Any:
        return attention_backward(grad_out, q, k, v, out, lse, mod_grads=learned, **options).query

    def both() -> Any:
        new, new_lse = attention(q, k, v, return_lse=True, **options)
        return attention_backward(grad_out, q, k, v, new, new_lse, **options).query

    return backward if row.task == "backward" else both


def _second_derivatives(row: Row, arrays: tuple[Array, Array, Array], options: dict[str, Any]) -> Call:
    """Second derivatives by this package; the double backward pass as a framework calls it (`through_saved`)."""
    from .. import Gradients, attention, attention_double_backward, attention_jvp

    if row.task == "hvp":
        try:
            import torch

            from ..torch import attention as bridge
        except ModuleNotFoundError:
            raise Skipped("PyTorch is not installed, whose bridge this is") from None
        torch.set_num_threads(1)
        return _hvp(row, lambda q, k, v: bridge(q, k, v, **options))
    of_query, of_key, of_value = directions(row)
    u = Gradients(of_query, of_key, of_value)
    if row.task == "jvp":
        return lambda: attention_jvp(u, *arrays, **options).out_tangent
    out, lse = attention(*arrays, return_lse=True, **options)
    grad_out = gradient_of_out(row)
    return lambda: (
        attention_double_backward(u, grad_out, *arrays, out, lse, through_saved=True, **options).grad_out
    )  # fmt: skip


def _hvp(row: Row, attend: Callable[..., Any]) -> Call:
    """Hessian-vector product of the sum of squares of the output, forward over reverse."""
    import torch

    arrays = inputs(row)
    q, k, v = (torch.from_numpy(arrays[name]) for name in ("query", "key", "value"))
    u = tuple(torch.from_numpy(x) for x in directions(row))
    gradient = torch.func.grad(lambda *x: attend(*x).square().sum(), (0, 1, 2))
    return lambda: torch.func.jvp(gradient, (q, k, v), u)[1][0]


def _first_call(row: Row, threads: int) -> Array:
    """Let a new process make its first call with an empty kernel cache; return what it prints of the result."""
    from .. import kernel_cache

    shape = row.B, row.H, row.L, row.E
    program = (
        "import sys, numpy as np, numba_attention as na\n"
        f"x = np.ones({shape}, np.{row.dtype})\n"
        f"np.savetxt(sys.stdout, {FIRST_CALLS[row.task]}.ravel()[:251])"
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = {kernel_cache.ENVIRONMENT: folder, kernel_cache.SHIPPED: "", "NUMBA_NUM_THREADS": str(threads)}
        run = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | settings, capture_output=True, check=True
        )
    return np.array(run.stdout.split(), np.float64)


def einsum(row: Row, threads: int) -> Call:
    """Attention in plain NumPy, with einsum."""
    if row.task != "forward":
        raise Skipped("NumPy einsum is not differentiated here")
    if row.blocks:
        raise Skipped("NumPy einsum has no masks by blocks")
    if row.mod:
        raise Skipped("a mod is a rule for one score, and NumPy einsum has all at once")
    if row.dropout:
        raise Skipped("NumPy's generators would take most of the time")
    if row.B * row.H * row.L * row.S > _EINSUM_PAIRS:
        raise Skipped("too large for NumPy einsum")
    if row.dtype not in ("float32", "float64"):
        raise Skipped("NumPy has no fast arithmetic on half types")
    arrays = inputs(row)
    q = arrays["query"].reshape(row.B, row.Hkv, row.H // row.Hkv, row.L, row.E)
    k, v = arrays["key"], arrays["value"]
    bias = _bias(row, arrays)
    if bias is not None:
        bias = np.broadcast_to(bias, (row.B, row.H, row.L, row.S)).reshape(row.B, row.Hkv, -1, row.L, row.S)
    factor = q.dtype.type(scale(row))

    def call() -> Array:
        s = np.einsum("bngle,bnse->bngls", q, k, optimize=True) * factor
        if row.softcap is not None:
            s = row.softcap * np.tanh(s / row.softcap)
        if bias is not None:
            s = s + bias
        p = np.exp(s - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out: Array = np.einsum("bngls,bnse->bngle", p, v, optimize=True)
        return out.reshape(row.B, row.H, row.L, row.Ev)

    return call


def torch(row: Row, threads: int) -> Call:
    """PyTorch's `scaled_dot_product_attention`."""
    try:
        import torch
    except ModuleNotFoundError:
        raise Skipped("PyTorch is not installed") from None
    if row.softcap is not None:
        raise Skipped("scaled_dot_product_attention has no softcap")
    torch.set_num_threads(threads)
    if row.mod:
        return _flex_attention(row)
    if row.task in _TWICE:
        return _math_path(row)
    arrays = inputs(row)

    def tensor(x: Array) -> Any:
        if row.dtype == "bfloat16":
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)

    q, k, v = (tensor(arrays[name]) for name in ("query", "key", "value"))
    if row.blocks:
        mask = torch.from_numpy(block_mask(row).to_dense())
    elif row.mask and not (row.bias or row.alibi or row.window):
        mask = torch.from_numpy(arrays["mask"])
    elif row.window and not (row.bias or row.alibi):
        mask = torch.from_numpy(_window(row))
    else:
        bias = None if row.is_causal else _bias(row, arrays)
        mask = None if bias is None else torch.from_numpy(bias)
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": row.is_causal, "enable_gqa": row.H != row.Hkv}
    if row.dropout:
        options["dropout_p"] = row.dropout

    def call() -> Any:
        with torch.inference_mode():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    if row.task == "forward":
        return call
    inputs_of_task = [x.requires_grad_() for x in (q, k, v)]
    if row.bias and mask is not None:
        inputs_of_task.append(mask.requires_grad_())  # this package computes the gradient of the bias too
    grad_out = tensor(gradient_of_out(row))

    def forward() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    out = forward()

    def backward() -> Any:
        return torch.autograd.grad(out, inputs_of_task, grad_out, retain_graph=True)[0]

    def both() -> Any:
        return torch.autograd.grad(forward(), inputs_of_task, grad_out)[0]

    return backward if row.task == "backward" else both


def _math_path(row: Row) -> Call:
    """Second derivatives by PyTorch, whose fused kernels have none: `scaled_dot_product_attention` in matrices."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if row.B * row.H * row.L * row.S * 4 > _SCORES_BYTES:
        raise Skipped("PyTorch would write several matrices of scores: over 2 GiB each")

    def attend(*x: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.nn.functional.scaled_dot_product_attention(*x, is_causal=row.is_causal)

    if row.task == "hvp":
        return _hvp(row, attend)
    arrays = inputs(row)
    inputs_of_task = tuple(torch.from_numpy(arrays[name]) for name in ("query", "key", "value"))
    u = tuple(torch.from_numpy(x) for x in directions(row))
    if row.task == "jvp":
        return lambda: torch.func.jvp(attend, inputs_of_task, u)[1]
    grad_out = torch.from_numpy(gradient_of_out(row)).requires_grad_()
    leaves = [x.requires_grad_() for x in inputs_of_task]
    first = torch.autograd.grad(attend(*leaves), leaves, grad_out, create_graph=True)
    return lambda: torch.autograd.grad(first, [*leaves, grad_out], u, retain_graph=True)[-1]


def _flex_attention(row: Row) -> Call:
    """PyTorch's `flex_attention`, compiled: it has a function of the score too."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    if row.task != "forward":
        raise Skipped("flex_attention has no gradients on the CPU")
    if row.mod != "ALiBi":
        raise Skipped("compiling flex_attention takes minutes, and is done for ALiBi alone")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise Skipped("flex_attention is compiled by a C++ compiler, and there is none: install g++ or set CXX")
    arrays = inputs(row)
    q, k, v = (torch.from_numpy(arrays[name]) for name in ("query", "key", "value"))
    slopes = torch.from_numpy(mod_of(row.mod, row.H)[1][0])

    def alibi(score: Any, batch: Any, head: Any, i: Any, j: Any) -> Any:
        return score - slopes[head] * abs(i - j)

    compiled = torch.compile(flex_attention)

    def call() -> Any:
        with torch.inference_mode():
            return compiled(q, k, v, score_mod=alibi)

    return call


def onnxruntime(row: Row, threads: int) -> Call:
    """ONNX Runtime's CPU kernel for the standard's Attention operator (opset 23)."""
    if row.task != "forward":
        raise Skipped("ONNX Runtime does not differentiate Attention")
    if row.mod:
        raise Skipped("the standard's Attention has no functions of scores")
    if row.blocks:
        raise Skipped("the standard's Attention has no masks by blocks")
    if row.dropout:
        raise Skipped("the standard's Attention has no dropout")
    try:
        import onnxruntime
        from onnx import TensorProto, helper
    except ModuleNotFoundError:
        raise Skipped("ONNX Runtime or onnx is not installed") from None
    types = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE, "float16": TensorProto.FLOAT16}
    if row.dtype not in types:
        raise Skipped(f"ONNX Runtime has no {row.dtype} Attention on the CPU")
    if row.B * row.H * row.L * row.S * 4 > _SCORES_BYTES:
        raise Skipped("ONNX Runtime would write all scores: over 2 GiB")
    arrays = inputs(row)
    feed = {name: arrays[name] for name in ("query", "key", "value")}
    bias = None if row.is_causal else _bias(row, arrays)
    if bias is not None:
        # The kernel of ONNX Runtime requires the axis L: a (B, 1, 1, S) mask must be expanded.
        feed["mask"] = np.ascontiguousarray(np.broadcast_to(bias, np.broadcast_shapes(bias.shape, (row.L, row.S))))
    declared = [helper.make_tensor_value_info(name, types[str(x.dtype)], x.shape) for name, x in feed.items()]
    result = helper.make_tensor_value_info("out", types[row.dtype], (row.B, row.H, row.L, row.Ev))
    node = helper.make_node(
        "Attention", list(feed), ["out"], is_causal=int(row.is_causal), scale=scale(row), softcap=row.softcap or 0.0
    )
    graph = helper.make_graph([node], "attention", declared, [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # the table reports what it refuses
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feed)[0]


def gemm(row: Row, threads: int) -> Call:
    """NumPy's matrix product: the ceiling for arithmetic on this machine."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((GEMM_SIZE, GEMM_SIZE)).astype(row.compute_dtype) for _ in range(2))
    c = np.empty_like(a)
    return lambda: np.dot(a, b, out=c)


def read(row: Row, threads: int) -> Call:
    """Read memory once, each thread a part. NumPy's max releases the interpreter lock and is bound by memory."""
    parts = np.array_split(np.ones(READ_BYTES // 4, np.float32), threads)
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(np.max, parts))


def _window(row: Row) -> Array:
    """Return the window as a boolean (L, S) array, for libraries without windows."""
    assert row.window is not None
    distance = np.arange(row.S) - np.arange(row.L)[:, None]
    return (distance >= -row.window[0]) & (distance <= row.window[1])


def _bias(row: Row, arrays: dict[str, Array]) -> Array | None:
    """Return all biases and masks of a row as one additive array, for libraries that take nothing else."""
    dtype = numpy_dtype(row.compute_dtype)
    hidden = dtype.type(-np.inf)
    parts = []
    if row.bias:
        parts.append(arrays["bias"].astype(dtype))
    if row.alibi:
        distance = np.abs(np.arange(row.L)[:, None] - np.arange(row.S))
        parts.append((-arrays["alibi_slopes"][:, None, None] * distance).astype(dtype))
    if row.mask:
        parts.append(np.where(arrays["mask"], dtype.type(0), hidden))
    if row.window is not None:
        parts.append(np.where(_window(row), dtype.type(0), hidden))
    if row.is_causal:
        parts.append(np.where(np.tri(row.L, row.S, dtype=np.bool_), dtype.type(0), hidden))
    return sum(parts[1:], parts[0]) if parts else None


# The process in which each contender runs: one per library, so that no two thread pools share a process.
CONTENDERS: dict[str, tuple[str, Callable[[Row, int], Call]]] = {
    "ours": ("numba", ours),
    "own": ("numba", ours),
    "einsum": ("numpy", einsum),
    "torch": ("torch", torch),
    "onnxruntime": ("onnxruntime", onnxruntime),
    "gemm": ("numpy", gemm),
    "read": ("numpy", read),
}

__all__ = ["CONTENDERS", "GEMM_SIZE", "READ_BYTES", "Call", "Skipped"]
