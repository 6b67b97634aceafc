"""An extended model on disk: the trained weights with a config that says which RoPE they were trained under.

transformers reads it as ``longrope``: the original RoPE up to the original window, the rescaled one beyond. ``read_spec`` and
``load_model`` read it as the base model that it grew from, so that everything here pins its own factors into it.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longrope2_ray.factors import RescaleFactors
from longrope2_ray.model import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def extended_config(
    config: "PreTrainedConfig", spec: ModelSpec, factors: RescaleFactors, target_length: int
) -> "PreTrainedConfig":
    """A copy of the base model's config with both windows in it.

    transformers applies the attention factor of ``longrope`` to short inputs too; at 1.0 both windows are exact.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    rope: dict[str, Any] = dict(text.rope_parameters)
    inner = rope.get("full_attention", rope)
    inner = {
        **{key: value for key, value in inner.items() if key in ("rope_theta", "partial_rotary_factor")},
        "rope_type": "longrope",
        "short_factor": [1.0] * len(factors.values),
        "long_factor": factors.values.tolist(),
        "factor": target_length / spec.original_length,
        "original_max_position_embeddings": spec.original_length,
        "attention_factor": factors.attention_factor,
    }
    text.rope_parameters = {**rope, "full_attention": inner} if "full_attention" in rope else inner
    text.max_position_embeddings = target_length
    return config


def save_extended(
    folder: Path,
    config: "PreTrainedConfig",
    weights: Mapping[str, torch.Tensor],
    tokenizer: "PreTrainedTokenizerBase",
    dtype: torch.dtype,
) -> None:
    """Write a model directory that transformers loads.

    Args:
        folder: made if it is not there.
        config: what it says from now on.
        weights: whole, under transformers' names.
        dtype: of the weights on disk.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
