"""Attention in training: inside documents, over sequence-parallel ranks."""

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from longrope2_ray.model.attention import banded_attention, causal_attention

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
    """Causal attention inside each of ``ranges``; (1, H, T, E).

    Args:
        query: (1, H, T, E).
        key: (1, K, T, E); ``value`` likewise.
        ranges: bounds from 0 to T.
        window: tokens that a query sees, itself among them; None for all before it in its range.
        kernel: ``flash_attention_2`` takes all ranges in one call, anything else one call for each.
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
    """Arguments of flash-attn's varlen call beside the tensors and the scale."""
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

    rows = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]  # (T, H, E)
    out = flash_attn_varlen_func(
        *rows, softmax_scale=scaling, **flash_varlen_inputs(ranges, query.device, window)
    )
    return out.transpose(0, 1)[None]


class _AllToAll(torch.autograd.Function):
    """(S, ...) to (S, ...): part j of rank i becomes part i of rank j; its own transpose, so backward is the same."""

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
    """(1, H, t, E) of this rank's tokens to (1, H / S, T, E) of this rank's heads (Ulysses)."""
    size = group.size()
    _, heads, tokens, width = tensor.shape
    received = _AllToAll.apply(tensor.reshape(size, heads // size, tokens, width), group)
    return received.transpose(0, 1).reshape(1, heads // size, size * tokens, width)


def scatter_sequence(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(1, H / S, T, E) of this rank's heads back to (1, H, t, E) of this rank's tokens."""
    size = group.size()
    _, heads, tokens, width = tensor.shape
    parts = tensor.reshape(heads, size, tokens // size, width).transpose(0, 1)
    return _AllToAll.apply(parts, group).reshape(1, size * heads, tokens // size, width)


class SegmentAttention:
    """The attention of a model in training: routes every layer through ``document_attention`` of the present segment.

    transformers makes no mask for an attention function without a mask function of its own, so neither a (T, T) mask
    nor its guess about packed documents comes into play.
    """

    def __init__(
        self, model: "PreTrainedModel", kernel: str, group: dist.ProcessGroup | None
    ) -> None:
        from transformers import AttentionInterface

        self._kernel, self._group = kernel, group
        self.ranges = np.zeros(2, dtype=np.int32)
        AttentionInterface.register(_ATTENTION_NAME, self._attend)
        model.config.get_text_config()._attn_implementation = _ATTENTION_NAME

    def _attend(
        self,
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
        """(1, H, t, E) queries to (1, t, H, E)."""
        if attention_mask is not None or softcap is not None or s_aux is not None:
            raise ValueError(
                f"model.path: {type(module).__name__} asks for a mask, a softcap or attention sinks, "
                "which training does not support"
            )
        if self._group is not None:
            query, key, value = (
                gather_sequence(tensor, self._group) for tensor in (query, key, value)
            )
        out = document_attention(
            query,
            key,
            value,
            self.ranges,
            scaling=scaling,
            window=sliding_window or None,
            kernel=self._kernel,
        )
        if self._group is not None:
            out = scatter_sequence(out, self._group)
        return out.transpose(1, 2).contiguous(), None
