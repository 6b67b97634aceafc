"""A model's weights over the ranks of a training: FSDP2, filled from rank 0."""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

from longrope2_ray.model.attention import decoder_layers
from longrope2_ray.training.loss import SegmentLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard_from_first_rank(
    loss: SegmentLoss, num_layers: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Shard a model with FSDP2 over all ranks, in place, with the weights that rank 0 has.

    A tensor is sent at a time: no other rank and no device ever holds the whole model.

    Args:
        loss: the loss around the model. Rank 0's float32 weights are let go of on the CPU; the
            other ranks' model may be on the meta device.
        num_layers: the model's decoder layers, each a group of FSDP2.
        dtype: type to compute in; gradients are reduced in float32.
        device: device of this rank's shards.
    """
    model = loss.model
    weights = loss.state_dict()
    buffers = dict(loss.named_buffers())
    _forget_weights(model)
    _shard(loss, num_layers, dtype, device)
    _fill_from_first_rank(loss, weights, buffers, device)


def without_noise(model: "PreTrainedModel") -> None:
    """Set every dropout and router jitter of a model, and of its config, to zero."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for holder in (model.config, model.config.get_text_config(), *model.modules()):
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and ("dropout" in name or "jitter" in name):
                setattr(holder, name, 0.0)


def _shard(loss: SegmentLoss, num_layers: int, dtype: torch.dtype, device: torch.device) -> None:
    """Apply FSDP2 to each decoder layer, then to the rest."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in decoder_layers(loss.model, num_layers):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(loss, mesh=mesh, mp_policy=policy)


def _forget_weights(model: "PreTrainedModel") -> None:
    """Put every parameter on the meta device; tied parameters stay tied."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.to("meta")))
    model.tie_weights()


def _fill_from_first_rank(
    loss: SegmentLoss,
    weights: dict[str, Any],
    buffers: dict[str, torch.Tensor],
    device: torch.device,
) -> None:
    """Give a sharded model its shards of rank 0's ``weights``, and rank 0's ``buffers``."""
    first = dist.get_rank() == 0
    loss.to_empty(device=device)
    loss.model.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(loss, weights if first else {}, options=options)
    for name, buffer in loss.named_buffers():
        if first:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)
