"""Attention kernels that build no (T, T) mask."""

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Causal attention of T positions to themselves, (B, H, T, E); key and value have K heads, with K dividing H."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.is_cuda and query.dtype == torch.float32:
        # On CUDA only the memory-efficient kernel takes float32, and it knows no groups: without the copies torch
        # would fall back to a T x T product.
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        groups = 1
    return nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1
    )


def banded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None,
    window: int | None,
    block_queries: int = 256,
) -> torch.Tensor:
    """Causal attention of the last Q of T positions, each seeing at most ``window`` tokens; (B, H, Q, E).

    The masks are (block, window + block) or (Q, T): never (T, T). Query heads that share a key head are stacked
    as rows, so keys and values are not repeated.

    Args:
        query: (B, H, Q, E).
        key: (B, K, T, E), with K dividing H; ``value`` likewise.
        window: tokens that a query sees, itself among them; None for all before it.
        block_queries: queries handled at a time.
    """
    batch, num_heads, num_queries, _ = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    groups = num_heads // num_kv_heads
    offset = num_keys - num_queries
    out = query.new_empty(batch, num_heads, num_queries, value.shape[-1])
    for first in range(0, num_queries, block_queries):
        last = min(first + block_queries, num_queries)
        low, high = 0 if window is None else max(0, offset + first - window + 1), offset + last
        at = torch.arange(offset + first, high, device=query.device)[:, None]
        seen = torch.arange(low, high, device=query.device)[None, :]
        mask = seen <= at
        if window is not None:
            mask &= seen > at - window
        rows = query[:, :, first:last].reshape(batch, num_kv_heads, groups * (last - first), -1)
        block = nn.functional.scaled_dot_product_attention(
            rows,
            key[:, :, low:high],
            value[:, :, low:high],
            attn_mask=mask.repeat(groups, 1),
            scale=scaling,
        )
        out[:, :, first:last] = block.reshape(batch, num_heads, last - first, -1)
    return out


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """flash-attn's kernel: causal, aligned to the last key where there are fewer queries; (B, Q, H, E)."""
    from flash_attn import flash_attn_func

    before = -1 if window is None else window - 1
    return flash_attn_func(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        softmax_scale=scaling,
        causal=True,
        window_size=(before, 0 if window is not None else -1),
    )


def _input_device(model: "PreTrainedModel") -> torch.device:
    """Where token ids go; with several GPUs, that of the embeddings."""
    return next(model.get_input_embeddings().parameters()).device


def decoder_layers(model: "PreTrainedModel", num_layers: int) -> list[nn.Module]:
    """The decoder's layers, found as the list that has as many modules as the model has layers; [] if there is none."""
    for module in model.get_decoder().children():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return list(module)
    return []
