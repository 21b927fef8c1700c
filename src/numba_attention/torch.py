"""`attention` for PyTorch tensors on the CPU, with gradients: ``import numba_attention.torch as nat``.

Tensors and arrays share memory, so this module only converts names and dtypes, and defines a `torch.autograd.Function`.
"""

from __future__ import annotations  # short types in help()

from typing import Any, Literal, TypeAlias, Unpack, overload

from .options import Gradients, OptionArguments, gather, split_mod_args, takes_options
from .validation import as_flag

try:
    import torch
except ImportError as error:
    raise ImportError("numba_attention.torch needs PyTorch; install it with: pip install torch") from error
from .torch_autograd import Attention, Call, to_array, to_tensor

Tensor: TypeAlias = torch.Tensor

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
    **options: Unpack[OptionArguments],
) -> Tensor: ...
@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: Literal[True],
    backend: str | None = ...,
    **options: Unpack[OptionArguments],
) -> tuple[Tensor, Tensor]: ...
@takes_options()
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: bool = False,
    backend: str | None = None,
    **options: Unpack[OptionArguments],
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact scaled dot-product attention of tensors, differentiable, in linear memory.

    Parameters
    ----------
    query : Tensor, shape (..., H, L, E)
        On the CPU; float32, float64, float16 or bfloat16. Any strides are taken without a copy: pass
        ``x.transpose(-3, -2)`` for (B, S, H, E) storage. Two-dimensional input (L, E) is one head.
    key : Tensor, shape (..., Hkv, S, E)
        dtype of `query`; H must be a multiple of Hkv. Leading dimensions broadcast.
    value : Tensor, shape (..., Hkv, S, Ev)
        dtype of `query`; Ev may differ from E.
    mask : Tensor or array of bool, broadcastable to (..., H, L, S), or BlockMask, optional
        True where a query may attend to a key.
    bias : Tensor or array of float, broadcastable to (..., H, L, S), optional
        Added to the scaled scores. A tensor that requires a gradient gets one.
    **options
        The others in the signature above, arrays as tensors or arrays: their types, shapes and meanings stand in
        ``help(numba_attention.attention)``. They have no derivatives.
    mod_args : tuple of tensors, arrays and numbers, optional
        What `score_mod` and `mask_mod` are called with. A tensor that requires a gradient gets one.
    sinks : Tensor or array of float, shape (H,), optional
        One extra logit per head in the softmax denominator. A tensor that requires a gradient gets one.
    return_lse : bool, default False
        Also return the natural log of the softmax denominator of each row. It is differentiable too.
    backend : {"auto", "cpu", "reference"}, optional
        For this call and its gradients.

    Returns
    -------
    out : Tensor, shape (..., H, L, Ev)
        dtype of `query`. A row that may attend to nothing is 0.
    lse : Tensor, shape (..., H, L)
        Only if `return_lse`: float32 (float64 for float64 input), -inf for empty rows.

    Raises
    ------
    TypeError
        An argument is not a strided tensor of a supported dtype.
    ValueError
        A tensor is not on the CPU, a tensor that has no gradient here requires one, or a shape or option is out of
        range.
    RuntimeError
        If a third derivative is asked for, or forward mode over forward mode.
    NotImplementedError
        If a second derivative with respect to `mod_args` is asked for, or their derivative in forward mode.

    See Also
    --------
    numba_attention.attention : the same for arrays, with every option explained.

    Notes
    -----
    The gradients follow FlashAttention-2 [1]_: probabilities are computed again from `lse`, so what is kept for the
    backward pass is O(L + S) features per head, never L x S.

    It can be differentiated twice, in linear memory too: with ``create_graph=True`` (forces, gradient penalties), by
    `torch.func` (jvp, hessian, jacrev, jacfwd), and in forward mode, also over reverse mode. Axes that vmap adds are
    leading dimensions of one call; with dropout, mods, a `BlockMask` or tensors as options, calls are made one after
    the other.

    The number of threads is Numba's (`numba.set_num_threads`), not that of `torch.set_num_threads`.

    References
    ----------
    .. [1] Dao, "FlashAttention-2", 2023, algorithm 2.
    .. [2] PyTorch documentation, "Extending PyTorch", section "Extending torch.autograd".

    Examples
    --------
    >>> import torch, numba_attention.torch as nat
    >>> query = torch.randn(2, 8, 100, 64, requires_grad=True)
    >>> key, value = torch.randn(2, 2, 2, 100, 64)  # two heads that serve eight
    >>> out = nat.attention(query, key, value, is_causal=True)
    >>> out.square().mean().backward()
    >>> out.shape, query.grad.shape
    (torch.Size([2, 8, 100, 64]), torch.Size([2, 8, 100, 64]))
    """
    operands = {"query": query, "key": key, "value": value}
    for name, x in operands.items():
        if not torch.is_tensor(x):
            raise TypeError(
                f"{name} must be a torch.Tensor, got {type(x).__module__}.{type(x).__qualname__}; "
                "numba_attention.attention takes arrays"
            )
        if x.dtype not in _DTYPES:
            raise TypeError(
                f"{name} must have dtype float32, float64, float16 or bfloat16, got {x.dtype}; "
                f"convert it with {name}.to(torch.float32)"
            )
    gather(attention, options)
    fixed, of_mods = split_mod_args(options, torch.is_tensor)
    tensors = {**operands, **{name: x for name, x in fixed.items() if torch.is_tensor(x)}, **of_mods}
    constants: dict[str, Any] = {name: x for name, x in fixed.items() if name not in tensors} | {"backend": backend}
    for name, x in tensors.items():
        if x.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got device {x.device}; move it with {name}.cpu()")
        if x.layout != torch.strided:
            raise TypeError(
                f"{name} must be a strided tensor, got layout {x.layout}; convert it with {name}.to_dense()"
            )
        if x.requires_grad and name not in (*Gradients._fields, *of_mods) and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, but has none here; pass {name}.detach()")
    apply = Attention.apply
    if torch.compiler.is_dynamo_compiling():
        apply = torch.compiler.disable(apply)
    out, lse = apply(Call(tuple(tensors), constants), *tensors.values())
    return (out, lse) if as_flag("return_lse", return_lse) else out


__all__ = ["attention", "to_array", "to_tensor"]
