"""Attention in training: inside documents, over sequence-parallel ranks.

Shapes: T tokens of a segment, S sequence-parallel ranks, t = T / S tokens of a rank, H query
heads, K key/value heads, E head size.
"""

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from longrope2_ray.model.attention import banded_attention, causal_attention, route_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION_NAME = "longrope2_training_attention"


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: np.ndarray,
    *,
    scaling: float | None,
    window: int | None = None,
    kernel: str = "sdpa",
) -> torch.Tensor:
    """Return causal attention inside each of ``ranges``, (1, H, T, E).

    Args:
        query: (1, H, T, E) queries.
        key: (1, K, T, E) keys.
        value: (1, K, T, E) values.
        ranges: bounds of the ranges, ascending from 0 to T.
        scaling: factor of the attention logits; 1 / sqrt(E) if None.
        window: tokens that a query sees, itself among them; None for all before it in its range.
        kernel: ``flash_attention_2`` takes all ranges in one call, any other a call for each.
    """
    if kernel == "flash_attention_2":
        return _flash_varlen(query, key, value, ranges, scaling, window)
    pieces = []
    for first, last in itertools.pairwise(ranges):
        q, k, v = (tensor[:, :, first:last] for tensor in (query, key, value))
        if window is not None and window < last - first:
            pieces.append(banded_attention(q, k, v, scaling=scaling, window=window))
            continue
        pieces.append(causal_attention(q, k, v, scaling))
    return torch.cat(pieces, dim=2)


def flash_varlen_inputs(
    ranges: np.ndarray, device: torch.device, window: int | None
) -> dict[str, Any]:
    """Return the arguments of flash-attn's varlen call beside the tensors and the scale."""
    bounds = torch.as_tensor(np.asarray(ranges, dtype=np.int32), device=device)
    longest = int(np.diff(ranges).max())
    return {
        "cu_seqlens_q": bounds,
        "cu_seqlens_k": bounds,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
        "causal": True,
        "window_size": (-1, -1) if window is None else (window - 1, 0),
    }


def _flash_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: np.ndarray,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    # (1, H, T, E) to (T, H, E)
    rows = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    out = flash_attn_varlen_func(
        *rows, softmax_scale=scaling, **flash_varlen_inputs(ranges, query.device, window)
    )
    return out.transpose(0, 1)[None]


class _AllToAll(torch.autograd.Function):
    """All-to-all of (S, ...) tensors: part j of rank i becomes part i of rank j.

    It is its own transpose, so the backward pass is the same.
    """

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _AllToAll.apply(grads[0], ctx.group), None


def gather_sequence(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Turn (1, H, t, E) of this rank's tokens into (1, H / S, T, E) of its heads (Ulysses)."""
    size = group.size()
    _, heads, tokens, width = tensor.shape
    received = _AllToAll.apply(tensor.reshape(size, heads // size, tokens, width), group)
    return received.transpose(0, 1).reshape(1, heads // size, size * tokens, width)


def scatter_sequence(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Turn (1, H / S, T, E) of this rank's heads back into (1, H, t, E) of its tokens."""
    size = group.size()
    _, heads, tokens, width = tensor.shape
    parts = tensor.reshape(heads, size, tokens // size, width).transpose(0, 1)
    return _AllToAll.apply(parts, group).reshape(1, size * heads, tokens // size, width)


class SegmentAttention:
    """The attention of a model in training: ``document_attention`` of the present segment."""

    def __init__(
        self, model: "PreTrainedModel", kernel: str, group: dist.ProcessGroup | None
    ) -> None:
        self._kernel, self._group = kernel, group
        self.ranges = np.zeros(2, dtype=np.int32)
        route_attention(model.config.get_text_config(), _ATTENTION_NAME, self._attend)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """(1, H, t, E) queries, this rank's tokens, to (1, H, t, E)."""
        if self._group is not None:
            query, key, value = (
                gather_sequence(tensor, self._group) for tensor in (query, key, value)
            )
        out = document_attention(
            query, key, value, self.ranges, scaling=scaling, window=window, kernel=self._kernel
        )
        return out if self._group is None else scatter_sequence(out, self._group)
