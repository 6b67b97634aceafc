"""Rescale factors pinned into a loaded model's rotary buffers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from longrope2_ray.model.skeleton import rotary_buffers
from longrope2_ray.model.spec import shape_of
from longrope2_ray.recipe.model import ModelShape
from longrope2_ray.rope.factors import RescaleFactors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PinnedRope:
    """Puts rescale factors into a model's rotary buffers in place, and gives the bits back.

    The angles become ``base^(-2i/d) / factors`` (Eq. 8), divided in float64 and stored in float32
    whatever the model's dtype. The window never depends on the input here: what is pinned holds
    for every token of every call, unlike transformers' ``longrope``, which switches on the longest
    position of the batch. Families that keep one buffer for sliding and full layers alike get the
    factors in both; those that keep one for each type, only in the full ones.

    Attributes:
        model: the model, which nothing else may pin meanwhile.
        shape: the model's shape.
        factors: what is pinned; None while the model has its original RoPE.

    Raises:
        ValueError: if the model has no rotary module that can be pinned, or its angles are not
            those of ``shape``.
    """

    def __init__(self, model: "PreTrainedModel", shape: ModelShape) -> None:
        self.model = model
        self.shape = shape
        self.factors: RescaleFactors | None = None
        self._angles = shape.geometry.angles
        self._buffers = rotary_buffers(model)
        if not self._buffers:
            raise ValueError(
                "model.path: expected a rotary module with an inv_freq buffer, "
                f"got none in {shape.model_type}"
            )
        for module, prefix in self._buffers:
            self._check(module, prefix)
        self._hooks: list[RemovableHandle] = []
        self._original = [
            (
                self._float32_buffer(module, prefix).clone(),
                getattr(module, f"{prefix}attention_scaling"),
            )
            for module, prefix in self._buffers
        ]

    def pin(self, factors: RescaleFactors) -> None:
        """Divide every angle by its factor, and multiply cos and sin by the attention factor.

        Positions below ``factors.start_tokens`` keep the original angles, with the same attention
        factor (LongRoPE's ``n_hat``).

        Raises:
            ValueError: if the vector has another length than this model's.
        """
        factors.require_length(len(self._angles))
        rescaled = torch.from_numpy(self._angles / factors.values).float()
        self._unhook()
        for (module, prefix), (original, _) in zip(self._buffers, self._original, strict=True):
            self._float32_buffer(module, prefix).copy_(rescaled)
            setattr(module, f"{prefix}attention_scaling", float(factors.attention_factor))
            if factors.start_tokens:
                hook = partial(self._keep_start, prefix, original, factors.start_tokens)
                self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))
        self.factors = factors

    def restore(self) -> None:
        """Give the buffers and attention factors back exactly as they were found (in float32)."""
        self._unhook()
        for (module, prefix), (buffer, scaling) in zip(self._buffers, self._original, strict=True):
            self._float32_buffer(module, prefix).copy_(buffer)
            setattr(module, f"{prefix}attention_scaling", scaling)
        self.factors = None

    @contextmanager
    def pinned(self, factors: RescaleFactors | None) -> Iterator[None]:
        """Pin factors, or the original RoPE for None, for the length of a ``with`` block.

        What was pinned before is pinned again afterwards.

        Raises:
            ValueError: if the vector has another length than this model's.
        """
        before = self.factors
        self._set(factors)
        try:
            yield
        finally:
            self._set(before)

    @contextmanager
    def differentiable(self, factors: RescaleFactors) -> Iterator[torch.Tensor]:
        """Pin factors for a ``with`` block so that the model's output has a gradient in them.

        Yields:
            The logarithms of the factors, (d/2,) float32, a leaf that requires grad.

        Raises:
            ValueError: if the vector has another length than this model's, or in the forward pass,
                if a rotary module lays its tables out neither in two halves nor in pairs.
        """
        logs = torch.from_numpy(np.log(factors.values)).float().requires_grad_()
        with self.pinned(replace(factors, start_tokens=0)):
            hooks = [
                module.register_forward_hook(
                    partial(_tables_of, self._angles, prefix, logs), with_kwargs=True
                )
                for module, prefix in self._buffers
            ]
            try:
                yield logs
            finally:
                for hook in hooks:
                    hook.remove()

    def _set(self, factors: RescaleFactors | None) -> None:
        if factors is None:
            self.restore()
        else:
            self.pin(factors)

    def _keep_start(
        self,
        prefix: str,
        original: torch.Tensor,
        start_tokens: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tables: Any,
    ) -> tuple[torch.Tensor, ...]:
        """Forward hook of a rotary module: cos and sin of the original angles at the start."""
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if not isinstance(tables, tuple) or positions is None:
            raise ValueError(
                f"search.start_tokens: expected [0] for {type(module).__name__}, "
                "whose tables are its own"
            )
        buffer = self._float32_buffer(module, prefix)
        rescaled = buffer.clone()
        buffer.copy_(original)
        try:
            plain = module.forward(*args, **kwargs)
        finally:
            buffer.copy_(rescaled)
        kept = (positions < start_tokens)[..., None]
        return tuple(
            torch.where(kept.to(new.device), old, new)
            for old, new in zip(plain, tables, strict=True)
        )

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _check(self, module: nn.Module, prefix: str) -> None:
        """Refuse a rotary module that would undo what is pinned, or whose angles are others.

        Raises:
            ValueError: saying what was found.
        """
        rope_type = getattr(module, "rope_type", "default")
        if isinstance(rope_type, dict):
            rope_type = rope_type["full_attention"]
        if rope_type != "default":
            # Other types recompute the buffer inside forward.
            raise ValueError(
                f"model.path: expected RoPE of type 'default', got {rope_type!r}; it can't be "
                "pinned"
            )
        found = getattr(module, f"{prefix}inv_freq").detach().double().cpu().numpy()
        # 1 % lets through what bfloat16 rounded, and nothing that is another base or another rule.
        if found.shape != self._angles.shape or not np.allclose(
            found, self._angles, rtol=1e-2, atol=0
        ):
            raise ValueError(
                f"model.path: expected {len(self._angles)} angles base^(-2i/d) in the rotary "
                f"module, got {len(found)} angles that follow another rule; it can't be pinned"
            )
        if not np.allclose(found, self._angles, rtol=1e-4, atol=0):
            self._float32_buffer(module, prefix).copy_(torch.from_numpy(self._angles))

    def _float32_buffer(self, module: nn.Module, prefix: str) -> torch.Tensor:
        """The module's buffer; a new one from the float64 angles if it was cast from float32."""
        name = f"{prefix}inv_freq"
        buffer: torch.Tensor = getattr(module, name)
        if buffer.dtype != torch.float32:
            buffer = torch.from_numpy(self._angles).float().to(buffer.device)
            module.register_buffer(name, buffer, persistent=False)
        return buffer


def _tables_of(
    base_angles: np.ndarray,
    prefix: str,
    logs: torch.Tensor,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tables: Any,
) -> Any:
    """Forward hook of a rotary module: the same cos and sin, as a function of ``logs``."""
    names = [value for value in (*args, *kwargs.values()) if isinstance(value, str)]
    if prefix and names and prefix.rstrip("_") not in names:
        return tables  # those of another type of layer, which keep the original RoPE
    positions: torch.Tensor = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    cos = tables[0]
    angles = torch.from_numpy(base_angles).float().to(cos.device) / logs.to(cos.device).exp()
    turns = positions.to(cos.device)[..., None].float() * angles
    scaling = getattr(module, f"{prefix}attention_scaling")
    for layout in (torch.cat((turns, turns), dim=-1), turns.repeat_interleave(2, dim=-1)):
        own = tuple((f(layout) * scaling).to(cos.dtype) for f in (torch.cos, torch.sin))
        if own[0].shape == cos.shape and torch.allclose(own[0], cos, atol=1e-2):
            return own
    raise ValueError(
        f"search.preset: expected rotary tables in halves or in pairs, {type(module).__name__} "
        "has others, so its factors have no gradient here; take search.preset = 'paper'"
    )


def rescale(model: "PreTrainedModel", factors: RescaleFactors) -> PinnedRope:
    """Pin factors into a causal language model of transformers, in place.

    Args:
        model: what ``AutoModelForCausalLM.from_pretrained`` gives, with its original RoPE.
        factors: the factors that every token of every call gets from now on.

    Returns:
        The pinned RoPE; its ``restore()`` gives the model its original RoPE back.

    Raises:
        ValueError: if the model has no standard, unscaled rotary module, or the vector has
            another length than its angles.
    """
    what = f"{model.name_or_path!r} ({type(model).__name__})"
    rope = PinnedRope(model, shape_of(model, model.config, what))
    rope.pin(factors)
    return rope
