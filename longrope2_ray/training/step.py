"""One optimizer step of mixed context window training (LongRoPE2 Sec. 3.3, Fig. 5 and 10).

Every segment carries its window. A short segment is trained with the original RoPE, and each of
its documents attends to itself only; a long one with the rescaled RoPE and full causal attention.
Nothing is inferred from positions or from the batch.

Shapes: T tokens of a segment, S sequence-parallel ranks, t = T / S tokens of a rank, H query
heads, K key/value heads, E head size, D model width. One segment is one micro-batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.device_mesh import init_device_mesh

from longrope2_ray.data.packing import Segment
from longrope2_ray.model.pinned_rope import PinnedRope
from longrope2_ray.model.skeleton import DTYPES
from longrope2_ray.recipe.model import ModelShape
from longrope2_ray.recipe.training import TrainSection
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.training.attention import SegmentAttention
from longrope2_ray.training.batches import (
    IGNORED,
    attention_ranges,
    check_parallel,
    learning_rate,
    position_ids_of,
    targets_of,
)
from longrope2_ray.training.checkpoint_reader import read_checkpoint
from longrope2_ray.training.loss import SegmentLoss, require_trainable
from longrope2_ray.training.records import StepResult
from longrope2_ray.training.sharding import shard_from_first_rank, without_noise

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MixedTrainer:
    """FSDP2 around the model, AdamW, and the mixed-window step, for gloo and NCCL alike.

    A process group must exist. Ranks that share a segment (``sequence_parallel``) are neighbors.

    Args:
        model: rank 0's model with float32 master weights on the CPU, which are let go of; other
            ranks may give its skeleton on the meta device.
        shape: the model's shape.
        factors: the long window's rescale factors.
        settings: the recipe's train section.
        num_steps: optimizer steps of the learning rate's schedule.
        kernel: ``sdpa``, or ``flash_attention_2`` for flash-attn's varlen call.
        device: device that this rank computes on; the CPU unless given.

    Raises:
        ValueError: if the ranks do not come out even, or the model's family cannot be trained.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        shape: ModelShape,
        factors: RescaleFactors,
        settings: TrainSection,
        num_steps: int,
        kernel: str = "sdpa",
        device: torch.device | None = None,
    ) -> None:
        # Neighbors share a segment, so that their exchange stays inside a node as far as it fits.
        degree = settings.sequence_parallel
        world_size = dist.get_world_size()
        check_parallel(world_size, shape.num_kv_heads, settings)
        self._settings = settings
        self._factors = factors
        self._num_steps = num_steps
        self._world_size = world_size
        self._device = device or torch.device("cpu")
        mesh = init_device_mesh(
            self._device.type, (world_size // degree, degree), mesh_dim_names=("data", "sequence")
        )
        self._data_rank = mesh.get_local_rank("data")
        self._sequence_rank = mesh.get_local_rank("sequence")

        model.requires_grad_(True).train()
        without_noise(model)
        self._loss = SegmentLoss(model, settings.loss_chunk_tokens)
        # Other ranks may hold a skeleton on the meta device, which computes nothing.
        if dist.get_rank() == 0:
            require_trainable(self._loss, shape.vocab_size)
        sequence_group = mesh.get_group("sequence") if degree > 1 else None
        self._attention = SegmentAttention(model, kernel, sequence_group)
        if settings.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        shard_from_first_rank(self._loss, shape.num_layers, DTYPES[settings.dtype], self._device)
        self._rope = PinnedRope(model, shape)
        self.optimizer = torch.optim.AdamW(
            self._loss.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )

    def share(self, indices: Sequence[int]) -> list[int]:
        """Return the segments of a global batch that this rank works on."""
        return list(
            indices[self._data_rank :: self._world_size // self._settings.sequence_parallel]
        )

    def step(self, step: int, segments: Sequence[Segment]) -> StepResult:
        """Take one optimizer step on this rank's share of the global batch.

        Args:
            step: optimizer steps taken before this one.
            segments: this rank's segments, as ``share`` picks them.
        """
        # The loss is a mean over the targets of the global batch, so they are counted first.
        inputs = [self._inputs(segment) for segment in segments]
        num_targets = {"short": 0.0, "long": 0.0}
        for segment, (_, _, targets) in zip(segments, inputs, strict=True):
            num_targets[segment.window] += float((targets != IGNORED).sum())
        count = self._all_reduce([num_targets["short"] + num_targets["long"]])[0]

        rate = learning_rate(step, self._num_steps, self._settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        nll = {"short": 0.0, "long": 0.0}
        for segment, (ids, positions, targets) in zip(segments, inputs, strict=True):
            with self.window(segment):
                loss = self._loss(ids, positions, targets)
                # FSDP2 averages gradients over ranks; the loss is a sum over all of them.
                (loss * (self._world_size / max(count, 1.0))).backward()
            nll[segment.window] += float(loss.detach())
        norm = nn.utils.clip_grad_norm_(self._loss.parameters(), self._settings.max_grad_norm)
        self.optimizer.step()

        # Each rank knows its own tokens only; one reduction sums what the log reports.
        num_positions = float(sum(targets.numel() for _, _, targets in inputs))
        num_pairs = sum(map(_num_pairs, segments)) / self._settings.sequence_parallel
        short, num_short, long, num_long, num_positions, num_pairs = self._all_reduce(
            [
                nll["short"],
                num_targets["short"],
                nll["long"],
                num_targets["long"],
                num_positions,
                num_pairs,
            ]
        )
        windows = {"short": (short, num_short), "long": (long, num_long)}
        return StepResult(
            loss=(short + long) / max(count, 1.0),
            window_losses={window: total / num for window, (total, num) in windows.items() if num},
            num_tokens=int(count),
            num_positions=int(num_positions),
            num_pairs=num_pairs,
            grad_norm=float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm),
            learning_rate=rate,
        )

    @contextmanager
    def window(self, segment: Segment) -> Iterator[None]:
        """Set a segment's attention ranges and RoPE while the block runs.

        The backward pass belongs in the block too, since it recomputes layers.
        """
        self._attention.ranges = attention_ranges(segment)
        if segment.window == "short" and self._settings.mixed:
            yield  # the original RoPE, bit for bit
            return
        with self._rope.pinned(self._factors):
            yield

    def _inputs(self, segment: Segment) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ids, positions and targets of this rank's tokens of a segment, each (1, t)."""
        tokens = len(segment.input_ids) // self._settings.sequence_parallel
        part = slice(self._sequence_rank * tokens, (self._sequence_rank + 1) * tokens)
        arrays = (segment.input_ids, position_ids_of(segment), targets_of(segment))
        ids, positions, targets = (
            torch.as_tensor(array[part], dtype=torch.int64, device=self._device)[None]
            for array in arrays
        )
        return ids, positions, targets

    def agree(self, own: bool) -> bool:
        """Whether all ranks call this with True; every rank must call it."""
        return self._all_reduce([float(not own)]) == [0.0]

    def _all_reduce(self, numbers: list[float]) -> list[float]:
        """Return the sums of numbers over all ranks, in float64."""
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor)
        return [float(number) for number in tensor]

    # --- state

    def save(self, folder: str, step: int) -> None:
        """Write this rank's part of a checkpoint after ``step`` optimizer steps.

        Learning rate and data position are not in it: they follow from the step.
        """
        model, optimizer = get_state_dict(self._loss, self.optimizer)
        save_checkpoint(
            {"model": model, "optimizer": optimizer, "step": torch.tensor(step)},
            checkpoint_id=folder,
        )

    def load(self, folder: str) -> int:
        """Load a checkpoint that any number of ranks wrote, and return its step.

        Only tensors are read: the rest, AdamW's settings, follows from the recipe.

        Raises:
            ValueError: if the checkpoint holds anything that could run code.
        """
        model, optimizer = get_state_dict(self._loss, self.optimizer)
        step = torch.tensor(0)
        read_checkpoint(
            folder, {"model": model, "optimizer": {"state": optimizer["state"]}, "step": step}
        )
        set_state_dict(
            self._loss, self.optimizer, model_state_dict=model, optim_state_dict=optimizer
        )
        return int(step)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the whole model's float32 weights on rank 0's CPU; nothing on other ranks.

        The names are those of transformers.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = get_model_state_dict(self._loss, options=options)
        return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def _num_pairs(segment: Segment) -> float:
    """Return the (query, key) pairs in a segment's causal attention, T^2 / 2 for each range."""
    lengths = np.diff(attention_ranges(segment)).astype(float)
    return float((lengths**2).sum() / 2)
