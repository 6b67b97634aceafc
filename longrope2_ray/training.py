"""Mixed context window training (LongRoPE2 Sec. 3.3, Fig. 5 and 10): the step, its RoPE, its attention, its loss.

Every segment carries its window. A short one is trained with the original RoPE, each document seeing only itself; a long
one with the rescaled RoPE and full causal attention. Nothing is inferred from positions or from the batch.

Shapes: T tokens of a segment, S sequence-parallel ranks, t = T / S tokens of a rank, H query heads, K key/value heads,
E head size, D model width. One segment is one micro-batch.
"""

import io
import itertools
import math
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem
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
from torch.utils.checkpoint import checkpoint

from longrope2_ray.factors import RescaleFactors
from longrope2_ray.model import DTYPES, ModelSpec, PinnedRope
from longrope2_ray.packing import Segment
from longrope2_ray.plan import check_parallel
from longrope2_ray.recipe import TrainSection
from longrope2_ray.scoring import banded_attention, causal_attention, decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100  # a position whose next token is not a target
_ATTENTION_NAME = "longrope2_training_attention"
_PROBE_TOKENS = 16


# ------------------------------------------------------------------------------------- what follows from the step


def learning_rate(step: int, num_steps: int, settings: TrainSection) -> float:
    """Linear warm-up, then a cosine to zero at ``num_steps``; ``step`` counts from 0."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(num_steps - settings.warmup_steps, 1)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def steps_per_epoch(num_segments: int, settings: TrainSection) -> int:
    """Whole global batches in one pass over the data."""
    return num_segments // settings.global_batch_size


def batch_indices(step: int, num_segments: int, settings: TrainSection) -> list[int]:
    """Segments of one optimizer step: the data position is a function of the step, so that a resume repeats nothing."""
    epoch, batch = divmod(step, steps_per_epoch(num_segments, settings))
    order = np.random.default_rng((settings.seed, epoch)).permutation(num_segments)
    size = settings.global_batch_size
    return [int(i) for i in order[batch * size : (batch + 1) * size]]


def targets_of(segment: Segment) -> np.ndarray:
    """(T,) the next token at every position; ``IGNORED`` where it is the first one of a document, or there is none."""
    targets = np.full(len(segment.input_ids), IGNORED, dtype=np.int64)
    targets[:-1] = segment.input_ids[1:]
    targets[np.asarray(segment.cu_seqlens[1:]) - 1] = IGNORED
    return targets


def attention_ranges(segment: Segment) -> np.ndarray:
    """Bounds of what attends to what: documents in a short segment, everything in a long one (Fig. 5)."""
    ends = segment.cu_seqlens if segment.window == "short" else (0, len(segment.input_ids))
    return np.asarray(ends, dtype=np.int32)


def position_ids_of(segment: Segment) -> np.ndarray:
    """(T,) positions, from 0 in each attention range."""
    ranges = attention_ranges(segment)
    starts: np.ndarray = np.repeat(ranges[:-1], np.diff(ranges))
    return np.arange(len(segment.input_ids)) - starts


# ------------------------------------------------------------------------------------------------------- attention


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


def flash_varlen_inputs(ranges: np.ndarray, device: torch.device, window: int | None) -> dict[str, Any]:
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
    out = flash_attn_varlen_func(*rows, softmax_scale=scaling, **flash_varlen_inputs(ranges, query.device, window))
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

    def __init__(self, model: "PreTrainedModel", kernel: str, group: dist.ProcessGroup | None) -> None:
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
            query, key, value = (gather_sequence(tensor, self._group) for tensor in (query, key, value))
        out = document_attention(
            query, key, value, self.ranges, scaling=scaling, window=sliding_window or None, kernel=self._kernel
        )
        if self._group is not None:
            out = scatter_sequence(out, self._group)
        return out.transpose(1, 2).contiguous(), None


# ------------------------------------------------------------------------------------------------------------ loss


class SegmentLoss(nn.Module):
    """A causal language model that answers with the summed NLL of its targets; logits exist a chunk at a time.

    Args:
        model: with a linear language head.
        chunk_tokens: tokens whose logits exist at once.
    """

    def __init__(self, model: "PreTrainedModel", chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self._chunk_tokens = chunk_tokens

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(1, t) ids, positions and targets to a float32 scalar."""
        hidden = self.model.get_decoder()(
            input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False
        ).last_hidden_state[0]
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows, wanted in zip(hidden.split(self._chunk_tokens), targets[0].split(self._chunk_tokens), strict=True):
            total = total + checkpoint(self._chunk, rows, wanted, use_reentrant=False)
        return total

    def _chunk(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model.get_output_embeddings()(hidden).float()
        return nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def require_trainable(loss: SegmentLoss, vocab_size: int) -> None:
    """Try a few tokens on the model as it was loaded, before it is sharded: its own loss, and documents that do not leak.

    Raises:
        ValueError: if the family does something else with its logits, such as scaling or capping them; if its layers
            carry something from one document of a segment into the next, as recurrent ones do; if it fails at all.
    """
    model, family = loss.model, type(loss.model).__name__
    text, training = model.config.get_text_config(), model.training
    kernel = text._attn_implementation
    model.eval()
    try:
        own, found, leaked = _probe(loss, vocab_size)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"model.path: {family} cannot be trained here: {reason}") from error
    finally:
        text._attn_implementation = kernel
        model.train(training)
    if not math.isclose(own, found, rel_tol=1e-3):
        raise ValueError(
            f"model.path: {family} makes its loss of more than decoder and language head "
            f"({own:.4f} against {found:.4f}), which training does not support"
        )
    if not leaked <= 1e-5 * found:
        raise ValueError(
            f"model.path: {family} carries something from one document of a segment into the next (its loss moves by "
            f"{leaked:.1e}), as recurrent and convolution layers do; training needs attention layers alone"
        )


@torch.no_grad()
def _probe(loss: SegmentLoss, vocab_size: int) -> tuple[float, float, float]:
    """NLL of one document by the family's own forward, the same by ``loss``, and how much another document before it in
    its segment changes that."""
    device = next(loss.parameters()).device
    document = torch.arange(_PROBE_TOKENS, device=device) % vocab_size
    positions = torch.arange(_PROBE_TOKENS, device=device)
    logits = loss.model(input_ids=document[None], use_cache=False).logits[0].float()
    own = nn.functional.cross_entropy(logits[:-1], document[1:], reduction="sum")
    attention = SegmentAttention(loss.model, "sdpa", None)

    def nll(documents: Sequence[torch.Tensor]) -> float:
        """Of the last document."""
        count = len(documents)
        attention.ranges = np.arange(count + 1, dtype=np.int32) * _PROBE_TOKENS
        targets = torch.full((count * _PROBE_TOKENS,), IGNORED, device=device)
        targets[-_PROBE_TOKENS:-1] = document[1:]
        return float(loss(torch.cat(list(documents))[None], positions.repeat(count)[None], targets[None]))

    behind = [nll([other, document]) for other in (document, document.flip(0))]
    return float(own), nll([document]), abs(behind[0] - behind[1])


# ------------------------------------------------------------------------------------------------------------ step


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
        self._settings, self._factors, self._num_steps, self._world = settings, factors, num_steps, world
        self._device = device or torch.device("cpu")
        model.requires_grad_(True).train()
        without_noise(model)
        mesh = init_device_mesh(self._device.type, (world // degree, degree), mesh_dim_names=("data", "sequence"))
        self._data_rank, self._sequence_rank = mesh.get_local_rank("data"), mesh.get_local_rank("sequence")
        loss = SegmentLoss(model, settings.loss_chunk_tokens)
        if dist.get_rank() == 0:
            require_trainable(loss, spec.vocab_size)
        self._attention = SegmentAttention(model, kernel, mesh.get_group("sequence") if degree > 1 else None)
        if settings.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        weights, buffers = loss.state_dict(), dict(loss.named_buffers())
        _forget_weights(model)
        self._loss = _shard(loss, model, spec, init_device_mesh(self._device.type, (world,)), settings)
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
            float((np.diff(attention_ranges(segment)).astype(float) ** 2).sum() / 2) for segment in segments
        )
        short, num_short, long, num_long, num_positions, num_pairs = self._all_reduce(
            [*sums["short"], *sums["long"], own_positions, own_pairs / self._settings.sequence_parallel]
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
            torch.as_tensor(array[part], dtype=torch.int64, device=self._device)[None] for array in arrays
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
        save_checkpoint({"model": model, "optimizer": optimizer, "step": torch.tensor(step)}, checkpoint_id=folder)

    def load(self, folder: str) -> int:
        """Take up a checkpoint, written by any number of ranks; returns its step.

        Only tensors are read: the rest, AdamW's settings, follows from the recipe.

        Raises:
            ValueError: if it holds what could run code.
        """
        model, optimizer = get_state_dict(self._loss, self.optimizer)
        step = torch.tensor(0)
        state = {"model": model, "optimizer": {"state": optimizer["state"]}, "step": step}
        reader = _DataReader(folder)  # not below: torch would go on without the metadata that this refuses
        try:
            load_checkpoint(state, storage_reader=reader, planner=_TensorPlanner())
        except CheckpointException as error:
            for failure, _ in error.failures.values():
                if isinstance(failure, pickle.UnpicklingError):
                    raise _refused(folder, failure) from error
            raise
        set_state_dict(self._loss, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        return int(step)

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole model's float32 weights under transformers' names, on rank 0's CPU; empty elsewhere."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = get_model_state_dict(self._loss, options=options)
        return {name.removeprefix("model."): tensor for name, tensor in state.items()}


# What the metadata of a checkpoint may name beside dtypes, and what is made of it. Its path is not needed; Python 3.11.2
# pickles an enum as a getattr.
_METADATA_CLASSES: dict[tuple[str, str], Any] = {
    **{
        (made.__module__, made.__name__): made
        for made in (
            dcp.Metadata,
            dcp.MetadataIndex,
            dcp.StorageMeta,
            dcp.TensorStorageMetadata,
            dcp.BytesStorageMetadata,
            dcp.ChunkStorageMetadata,
            dcp.TensorProperties,
            dcp._MEM_FORMAT_ENCODING,
            _StorageInfo,
        )
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): {"torch.strided": torch.strided}.__getitem__,
    ("pathlib", "PosixPath"): lambda *parts: None,
    ("pathlib._local", "PosixPath"): lambda *parts: None,
    ("builtins", "getattr"): lambda _, name: dcp._MEM_FORMAT_ENCODING[name],
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _METADATA_CLASSES.get((module, name))
        if found is None and module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            found = vars(torch)[name]
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return found


class _DataReader(FileSystemReader):
    """Reads a checkpoint as data: torch's own reader would run the code that a forged ``.metadata`` names.

    Raises:
        ValueError: if ``.metadata`` holds anything but metadata.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        path = Path(folder, ".metadata")
        data = path.read_bytes()
        try:
            self._metadata = _MetadataUnpickler(io.BytesIO(data)).load()
        except Exception as error:  # a forged pickle can fail in any way
            raise _refused(path, error) from error
        if not isinstance(self._metadata, dcp.Metadata):
            raise _refused(path, type(self._metadata).__name__)

    def read_metadata(self, *_: Any, **__: Any) -> dcp.Metadata:
        return self._metadata


class _TensorPlanner(DefaultLoadPlanner):
    """Loads tensors, which torch reads as data; its own planner unpickles anything else."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is no tensor")


def _refused(place: str | Path, what: object) -> ValueError:
    named = re.search(r"GLOBAL (\S+)", str(what)) or re.search("(.+)", str(what))  # torch's message has many lines
    return ValueError(
        f"{place} is no checkpoint of a training, it holds something else ({named[1] if named else 'nothing'}), and "
        f"none of it was run; find out who wrote it, remove the checkpoint and run again to go on from an older one"
    )


def _shard(
    loss: SegmentLoss, model: "PreTrainedModel", spec: ModelSpec, mesh: DeviceMesh, settings: TrainSection
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
