"""Rescale factors pinned into a loaded model's rotary buffers."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from longrope2_ray.model.spec import ModelSpec, _rotary_buffers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PinnedRope:
    """Puts rescale factors into a loaded model's rotary buffers in place, and gives the original bits back.

    The angles become ``base^(-2i/d) / factors`` (Eq. 8), divided in float64 and stored in float32 whatever the
    model's dtype. The window never depends on the input here: what is pinned holds for every token of every call,
    unlike HF's ``longrope``, which switches on the longest position of the batch. Families that keep one buffer for
    sliding and full layers alike get the factors in both; those that keep one for each type, only in the full ones.

    Raises:
        ValueError: if the model has no rotary module that can be pinned, or its angles are not those of ``spec``.
    """

    def __init__(self, model: "PreTrainedModel", spec: ModelSpec) -> None:
        self._angles = spec.geometry.angles
        self._buffers = _rotary_buffers(model)
        if not self._buffers:
            raise ValueError(
                f"model.path: expected a rotary module with an inv_freq buffer, got none in {spec.model_type}"
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

    def pin(self, values: np.ndarray, attention_factor: float, start_tokens: int = 0) -> None:
        """Rescale every angle by ``1 / values`` and multiply cos and sin by ``attention_factor``.

        Args:
            values: (d/2,) factors, finite and positive.
            start_tokens: positions below it keep the original angles, at the same temperature (LongRoPE's ``n_hat``).

        Raises:
            ValueError: if the vector does not fit this model, or holds something else than positive numbers.
        """
        values = np.asarray(values, dtype=np.float64)
        if values.shape != self._angles.shape:
            raise ValueError(
                f"factors: expected {len(self._angles)} numbers, one per cosine dimension of this model, "
                f"got shape {values.shape}"
            )
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError("factors: expected finite positive numbers, got others among them")
        rescaled = torch.from_numpy(self._angles / values).float()
        self._unhook()
        for (module, prefix), (original, _) in zip(self._buffers, self._original, strict=True):
            self._float32_buffer(module, prefix).copy_(rescaled)
            setattr(module, f"{prefix}attention_scaling", float(attention_factor))
            if start_tokens:
                hook = partial(self._keep_start, prefix, original, start_tokens)
                self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    def restore(self) -> None:
        """Give the buffers and scalings back exactly as they were found (in float32)."""
        self._unhook()
        for (module, prefix), (buffer, scaling) in zip(self._buffers, self._original, strict=True):
            self._float32_buffer(module, prefix).copy_(buffer)
            setattr(module, f"{prefix}attention_scaling", scaling)

    @contextmanager
    def pinned(
        self, values: np.ndarray, attention_factor: float, start_tokens: int = 0
    ) -> Iterator[None]:
        """Pin for the length of a ``with`` block."""
        self.pin(values, attention_factor, start_tokens)
        try:
            yield
        finally:
            self.restore()

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
        """Forward hook of a rotary module: its own cos and sin of the original angles where a sequence starts."""
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if not isinstance(tables, tuple) or positions is None:
            raise ValueError(
                f"search.start_tokens: expected [0] for {type(module).__name__}, whose tables are its own"
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
        rope_type = getattr(module, "rope_type", "default")
        if isinstance(rope_type, dict):
            rope_type = rope_type["full_attention"]
        if rope_type != "default":
            # Other types recompute the buffer inside forward and would undo what is pinned.
            raise ValueError(
                f"model.path: expected RoPE of type 'default', got {rope_type!r}; it can't be pinned"
            )
        found = getattr(module, f"{prefix}inv_freq").detach().double().cpu().numpy()
        # 1 % lets through what bfloat16 rounded, and nothing that is another base or another rule.
        if found.shape != self._angles.shape or not np.allclose(
            found, self._angles, rtol=1e-2, atol=0
        ):
            raise ValueError(
                f"model.path: expected {len(self._angles)} angles base^(-2i/d) in the rotary module, got {len(found)} "
                "angles that follow another rule; it can't be pinned"
            )
        if not np.allclose(found, self._angles, rtol=1e-4, atol=0):
            self._float32_buffer(module, prefix).copy_(torch.from_numpy(self._angles))

    def _float32_buffer(self, module: nn.Module, prefix: str) -> torch.Tensor:
        """The module's buffer; if ``model.to(bfloat16)`` cast or rounded it, a new one from the float64 angles."""
        name = f"{prefix}inv_freq"
        buffer: torch.Tensor = getattr(module, name)
        if buffer.dtype != torch.float32:
            buffer = torch.from_numpy(self._angles).float().to(buffer.device)
            module.register_buffer(name, buffer, persistent=False)
        return buffer
