"""Mixed context window training (LongRoPE2 Sec. 3.3, Fig. 5 and 10): the step, its RoPE, its attention, its loss.

Every segment carries its window. A short one is trained with the original RoPE, each document seeing only itself; a long
one with the rescaled RoPE and full causal attention. Nothing is inferred from positions or from the batch.

Shapes: T tokens of a segment, S sequence-parallel ranks, t = T / S tokens of a rank, H query heads, K key/value heads,
E head size, D model width. One segment is one micro-batch.
"""

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longrope2_ray.data.packing import Segment
from longrope2_ray.model.attention import decoder_layers
from longrope2_ray.model.pinned_rope import PinnedRope
from longrope2_ray.model.spec import DTYPES, ModelSpec
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
from longrope2_ray.training.checkpoint_reader import _DataReader, _refused, _TensorPlanner
from longrope2_ray.training.loss import SegmentLoss, require_trainable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks.

    Attributes:
        loss: NLL per target of the global batch, in nats.
        window_losses: the same for each window that the batch had.
        num_tokens: targets of the global batch.
        num_positions: tokens of the global batch, and ``num_pairs`` (query, key) pairs in its causal attention: what
            its FLOPs depend on.
        grad_norm: before clipping.
        learning_rate: that it was taken with.
    """

    loss: float
    window_losses: dict[str, float]
    num_tokens: int
    num_positions: int
    num_pairs: float
    grad_norm: float
    learning_rate: float


class MixedTrainer:
    """FSDP2 around the model, AdamW, and the mixed-window step; one code path for gloo and NCCL.

    A process group has to be there. Ranks that share a segment (``sequence_parallel``) are neighbours. Weights come from
    rank 0, a tensor at a time: no other process and no device ever holds the whole model.

    Args:
        model: float32 master weights on rank 0's CPU, which are let go; its skeleton on the meta device will do elsewhere.
        spec: what ``read_spec`` says about it.
        factors: of the long window.
        settings: of the recipe.
        num_steps: that the schedule is made for.
        kernel: ``sdpa``, or ``flash_attention_2`` for flash-attn's varlen call.
        device: that this rank computes on.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        spec: ModelSpec,
        factors: RescaleFactors,
        settings: TrainSection,
        num_steps: int,
        kernel: str = "sdpa",
        device: torch.device | None = None,
    ) -> None:
        degree, world = settings.sequence_parallel, dist.get_world_size()
        check_parallel(world, spec.num_kv_heads, settings)
        self._settings, self._factors, self._num_steps, self._world = (
            settings,
            factors,
            num_steps,
            world,
        )
        self._device = device or torch.device("cpu")
        model.requires_grad_(True).train()
        without_noise(model)
        mesh = init_device_mesh(
            self._device.type, (world // degree, degree), mesh_dim_names=("data", "sequence")
        )
        self._data_rank, self._sequence_rank = (
            mesh.get_local_rank("data"),
            mesh.get_local_rank("sequence"),
        )
        loss = SegmentLoss(model, settings.loss_chunk_tokens)
        if dist.get_rank() == 0:
            require_trainable(loss, spec.vocab_size)
        self._attention = SegmentAttention(
            model, kernel, mesh.get_group("sequence") if degree > 1 else None
        )
        if settings.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        weights, buffers = loss.state_dict(), dict(loss.named_buffers())
        _forget_weights(model)
        self._loss = _shard(
            loss, model, spec, init_device_mesh(self._device.type, (world,)), settings
        )
        _fill_from_first_rank(loss, model, weights, buffers, self._device)
        self._rope = PinnedRope(model, spec)
        self.optimizer = torch.optim.AdamW(
            self._loss.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )

    def share(self, indices: Sequence[int]) -> list[int]:
        """Which segments of a global batch this rank works on."""
        return list(indices[self._data_rank :: self._world // self._settings.sequence_parallel])

    def step(self, step: int, segments: Sequence[Segment]) -> StepResult:
        """One optimizer step on this rank's share of the global batch."""
        inputs = [self._inputs(segment) for segment in segments]
        sums = {window: [0.0, 0.0] for window in ("short", "long")}  # NLL, targets
        for segment, (_, _, targets) in zip(segments, inputs, strict=True):
            sums[segment.window][1] += float((targets != IGNORED).sum())
        count = self._all_reduce([sums["short"][1] + sums["long"][1]])[0]
        rate = learning_rate(step, self._num_steps, self._settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        for segment, (ids, positions, targets) in zip(segments, inputs, strict=True):
            with self.window(segment):
                nll = self._loss(ids, positions, targets)
                # FSDP2 averages gradients over ranks; the loss is a sum over all of them
                (nll * (self._world / max(count, 1.0))).backward()
            sums[segment.window][0] += float(nll.detach())
        norm = nn.utils.clip_grad_norm_(self._loss.parameters(), self._settings.max_grad_norm)
        self.optimizer.step()
        own_positions = float(sum(targets.numel() for _, _, targets in inputs))
        own_pairs = sum(
            float((np.diff(attention_ranges(segment)).astype(float) ** 2).sum() / 2)
            for segment in segments
        )
        short, num_short, long, num_long, num_positions, num_pairs = self._all_reduce(
            [
                *sums["short"],
                *sums["long"],
                own_positions,
                own_pairs / self._settings.sequence_parallel,
            ]
        )
        losses = {"short": (short, num_short), "long": (long, num_long)}
        return StepResult(
            (short + long) / max(count, 1.0),
            {window: total / num for window, (total, num) in losses.items() if num},
            int(count),
            int(num_positions),
            num_pairs,
            float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm),
            rate,
        )

    @contextmanager
    def window(self, segment: Segment) -> Iterator[None]:
        """The segment's attention ranges and RoPE, for forward and backward (layers are recomputed there)."""
        self._attention.ranges = attention_ranges(segment)
        if segment.window == "short" and self._settings.mixed:
            yield  # the original RoPE, bit for bit
            return
        with self._rope.pinned(self._factors.values, self._factors.attention_factor):
            yield

    def _inputs(self, segment: Segment) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(1, t) ids, positions and targets: this rank's tokens of the segment."""
        tokens = len(segment.input_ids) // self._settings.sequence_parallel
        part = slice(self._sequence_rank * tokens, (self._sequence_rank + 1) * tokens)
        arrays = (segment.input_ids, position_ids_of(segment), targets_of(segment))
        ids, positions, targets = (
            torch.as_tensor(array[part], dtype=torch.int64, device=self._device)[None]
            for array in arrays
        )
        return ids, positions, targets

    def agree(self, own: bool) -> bool:
        """Whether all ranks say so."""
        return self._all_reduce([float(not own)]) == [0.0]

    def _all_reduce(self, numbers: list[float]) -> list[float]:
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor)
        return [float(number) for number in tensor]

    # --- state

    def save(self, folder: str, step: int) -> None:
        """Write this rank's part of a checkpoint after ``step`` steps; rate and data position follow from the step."""
        model, optimizer = get_state_dict(self._loss, self.optimizer)
        save_checkpoint(
            {"model": model, "optimizer": optimizer, "step": torch.tensor(step)},
            checkpoint_id=folder,
        )

    def load(self, folder: str) -> int:
        """Take up a checkpoint, written by any number of ranks; returns its step.

        Only tensors are read: the rest, AdamW's settings, follows from the recipe.

        Raises:
            ValueError: if it holds what could run code.
        """
        model, optimizer = get_state_dict(self._loss, self.optimizer)
        step = torch.tensor(0)
        state = {"model": model, "optimizer": {"state": optimizer["state"]}, "step": step}
        reader = _DataReader(
            folder
        )  # not below: torch would go on without the metadata that this refuses
        try:
            load_checkpoint(state, storage_reader=reader, planner=_TensorPlanner())
        except CheckpointException as error:
            for failure, _ in error.failures.values():
                if isinstance(failure, pickle.UnpicklingError):
                    raise _refused(folder, failure) from error
            raise
        set_state_dict(
            self._loss, self.optimizer, model_state_dict=model, optim_state_dict=optimizer
        )
        return int(step)

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole model's float32 weights under transformers' names, on rank 0's CPU; empty elsewhere."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = get_model_state_dict(self._loss, options=options)
        return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def _shard(
    loss: SegmentLoss,
    model: "PreTrainedModel",
    spec: ModelSpec,
    mesh: DeviceMesh,
    settings: TrainSection,
) -> SegmentLoss:
    """FSDP2 over all ranks: each layer, then the rest; compute in ``train.dtype``, gradients reduced in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=DTYPES[settings.dtype], reduce_dtype=torch.float32)
    for layer in decoder_layers(model, spec.num_layers):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(loss, mesh=mesh, mp_policy=policy)
    return loss


def without_noise(model: "PreTrainedModel") -> None:
    """Put every dropout and router jitter of a model, and of its config, to zero."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for holder in (model.config, model.config.get_text_config(), *model.modules()):
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and ("dropout" in name or "jitter" in name):
                setattr(holder, name, 0.0)


def _forget_weights(model: "PreTrainedModel") -> None:
    """Put every parameter on the meta device, tied ones still one."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.to("meta")))
    model.tie_weights()


def _fill_from_first_rank(
    loss: SegmentLoss,
    model: "PreTrainedModel",
    weights: dict[str, Any],
    buffers: dict[str, torch.Tensor],
    device: torch.device,
) -> None:
    """Give a sharded model without weights its shards of rank 0's ``weights``, and rank 0's ``buffers``."""
    first = dist.get_rank() == 0
    loss.to_empty(device=device)
    model.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(loss, weights if first else {}, options=options)
    for name, buffer in loss.named_buffers():
        if first:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)
