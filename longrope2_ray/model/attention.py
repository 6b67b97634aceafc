"""Attention that builds no (T, T) mask, and the way to put it into a model.

Shapes: B batch, T key positions, Q query positions, H query heads, K key and value heads, E head
size.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, float | None, int | None], torch.Tensor
]
"""Rotated queries (B, H, Q, E), keys and values (B, K, T, E), scale of the logits, sliding window
in tokens or None; gives (B, H, Q, E)."""


def route_attention(config: "PreTrainedConfig", name: str, attend: Attend) -> None:
    """Make every layer of a model compute its attention by ``attend``.

    transformers makes no mask for an attention function without a mask function of its own, so
    nothing of size T x T is built, sliding windows included: ``attend`` knows the causal
    structure itself.

    Args:
        config: the model's text config, whose ``_attn_implementation`` is set to ``name``.
        name: what the function is registered as with transformers' ``AttentionInterface``.
        attend: computes the attention of one layer. A layer that asks for a mask, a softcap or
            attention sinks raises a ValueError in the forward pass.
    """
    from transformers import AttentionInterface

    # The signature is transformers': layers pass what they need, by keyword.
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        if attention_mask is not None or softcap is not None or s_aux is not None:
            raise ValueError(
                f"model.path: {type(module).__name__} asks for a mask, a softcap or attention "
                "sinks, which neither training nor trimmed scoring supports"
            )
        out = attend(query, key, value, scaling, sliding_window or None)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attention)
    config._attn_implementation = name


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Causal attention of T positions to themselves, (B, H, T, E).

    Args:
        query: (B, H, T, E).
        key: (B, K, T, E), with K dividing H; ``value`` likewise.
        scaling: what the logits are multiplied by; ``1 / sqrt(E)`` where it is None.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.is_cuda and query.dtype == torch.float32:
        # On CUDA only the memory-efficient kernel takes float32, and it knows no groups: without
        # the copies torch would fall back to a T x T product.
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
    """Causal attention of the last Q of T positions over a sliding window; (B, H, Q, E).

    The masks are (block, window + block) or (Q, T): never (T, T). Query heads that share a key
    head are stacked as rows, so keys and values are not repeated.

    Args:
        query: (B, H, Q, E).
        key: (B, K, T, E), with K dividing H; ``value`` likewise.
        scaling: what the logits are multiplied by; ``1 / sqrt(E)`` where it is None.
        window: tokens that a query sees, itself among them; None for all before it.
        block_queries: queries handled at a time.
    """
    batch, num_heads, num_queries, _ = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    groups = num_heads // num_kv_heads
    # The queries are the last positions, so the first of them stands behind ``offset`` keys.
    offset = num_keys - num_queries
    out = query.new_empty(batch, num_heads, num_queries, value.shape[-1])
    for first in range(0, num_queries, block_queries):
        last = min(first + block_queries, num_queries)
        # The keys that any query of this block sees; the mask cuts out what each of them sees.
        low = 0 if window is None else max(0, offset + first - window + 1)
        high = offset + last
        at = torch.arange(offset + first, high, device=query.device)[:, None]
        seen = torch.arange(low, high, device=query.device)[None, :]
        mask = seen <= at
        if window is not None:
            mask &= seen > at - window
        # Heads of a group lie beside each other, so (B, H, q, E) reshapes to (B, K, groups * q, E)
        # and the mask repeats for every head of the group.
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


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention of the last Q of T positions by flash-attn's kernel; (B, H, Q, E).

    Args:
        query: (B, H, Q, E), bfloat16 or float16, on a GPU.
        key: (B, K, T, E), with K dividing H; ``value`` likewise.
        scaling: what the logits are multiplied by; ``1 / sqrt(E)`` where it is None.
        window: tokens that a query sees, itself among them; None for all before it.
    """
    from flash_attn import flash_attn_func

    out = flash_attn_func(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
    return out.transpose(1, 2)


def input_device(model: "PreTrainedModel") -> torch.device:
    """The device where token ids go: that of the embeddings, where several GPUs share a model."""
    return next(model.get_input_embeddings().parameters()).device


def decoder_layers(model: "PreTrainedModel", num_layers: int) -> list[nn.Module]:
    """The decoder's layers; empty if there is no list of ``num_layers`` modules in it."""
    for module in model.get_decoder().children():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return list(module)
    return []
