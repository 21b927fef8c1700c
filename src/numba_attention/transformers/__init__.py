"""Attention of Hugging Face models on the CPU: ``numba_attention.transformers.register()``."""

from __future__ import annotations  # short types in help()

from typing import Any, TypeAlias

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "numba_attention.transformers needs Transformers and PyTorch; install them with: "
        "pip install 'numba-attention[transformers]'"
    ) from error

import torch

from .masks import attention_mask as _describe
from .operator import attend, attend_weights

Tensor: TypeAlias = torch.Tensor


def register(name: str = "numba_attention") -> str:
    """Make this package's attention available to models of Hugging Face Transformers, under a name.

    Parameters
    ----------
    name : str, default "numba_attention"
        What to pass as ``attn_implementation``.

    Returns
    -------
    str
        `name`.

    Raises
    ------
    TypeError
        `name` is not a string.

    See Also
    --------
    attention_forward : what models then call.

    Notes
    -----
    Two functions are registered: the attention itself, and the function that describes masks. Causal masks, windows,
    padding, packed documents and chunks, and caches of either kind, are passed as a few numbers for each sequence and
    never as L x S truth values; masks of any other kind are passed as PyTorch's own attention gets them.

    Examples
    --------
    >>> import numba_attention.transformers
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> numba_attention.transformers.register()
    'numba_attention'
    >>> config = LlamaConfig(
    ...     hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=100,
    ...     attn_implementation="numba_attention")
    >>> import torch
    >>> LlamaForCausalLM(config)(torch.arange(10)[None]).logits.shape
    torch.Size([1, 10, 100])
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__module__}.{type(name).__qualname__}")
    transformers.AttentionInterface.register(name, attention_forward)
    transformers.AttentionMaskInterface.register(name, _describe)
    return name


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the interface of ``transformers.AttentionInterface``.

    Parameters
    ----------
    module : torch.nn.Module
        The layer. Its ``is_causal`` counts where neither `attention_mask` nor `is_causal` is given.
    query : Tensor, shape (batch, H, L, E)
        On the CPU, in float32, float64, float16 or bfloat16.
    key, value : Tensor, shape (batch, Hkv, S, E) and (batch, Hkv, S, Ev)
        Hkv divides H.
    attention_mask : Tensor, optional
        What the registered mask function returned; or truth values, or numbers that are added to the scores, of
        shape (batch or 1, H or 1, L, S).
    dropout : float, default 0
        Probability with which a weight is dropped. The seed is drawn from PyTorch's generator (`torch.manual_seed`).
    scaling : float, optional
        By default ``1 / sqrt(E)``.
    is_causal : bool, optional
        Whether query i sees the keys up to i only, where there is no mask and more than one query.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)``.
    s_aux : Tensor, shape (H,), optional
        Attention sinks. They have a gradient.
    position_bias : Tensor, broadcastable to (batch, H, L, S), optional
        Added to the scores. It has a gradient.
    output_attentions : bool, default False
        Also return the weights, which have no gradient.
    **kwargs
        Ignored: what other implementations need beside the mask.

    Returns
    -------
    out : Tensor, shape (batch, L, H, Ev)
    weights : Tensor, shape (batch, H, L, S), or None
        Only if `output_attentions`.

    Raises
    ------
    ValueError
        A tensor is not on the CPU.
    """
    if query.device.type != "cpu":
        raise ValueError(f"query must be on the CPU, got device {query.device}; move the model with model.cpu()")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    mask, bias = attention_mask, position_bias
    if mask is not None and mask.dtype != torch.int32:
        mask = mask[..., : key.shape[2]]
        if mask.is_floating_point() and (bias is not None or mask.requires_grad):
            mask, bias = None, mask if bias is None else bias + mask
    seed = torch.randint(2**62, ()) if dropout else None
    options = (mask, bias, s_aux, seed, scaling, softcap, causal, float(dropout))
    out, _ = attend(query, key, value, *options)
    return out, attend_weights(query.detach(), key.detach(), *options) if output_attentions else None


__all__ = ["attention_forward", "register"]
