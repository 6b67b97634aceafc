"""An extended model on disk: the trained weights with a config that says which RoPE they were trained under.

transformers reads it as ``longrope``: the original RoPE up to the original window, the rescaled one beyond (or the rescaled
one for every input, where it was trained so). ``read_spec`` and
``load_model`` read it as the base model that it grew from, so that everything here pins its own factors into it.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longrope2_ray.model.spec import ModelSpec
from longrope2_ray.rope.factors import RescaleFactors

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase


def extended_config(
    config: "PreTrainedConfig",
    spec: ModelSpec,
    factors: RescaleFactors,
    target_length: int,
    mixed: bool = True,
) -> "PreTrainedConfig":
    """A copy of the base model's config with both windows in it.

    transformers applies the attention factor of ``longrope`` to short inputs too; at 1.0 both windows are exact. vLLM reads
    ``short_mscale`` and ``long_mscale`` instead.

    Args:
        config: of the base model.
        spec: what ``read_spec`` says about it.
        factors: of the long window.
        target_length: tokens of it.
        mixed: whether short inputs were trained under the original RoPE, and not under ``factors`` as long ones.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    rope: dict[str, Any] = dict(text.rope_parameters)
    inner = rope.get("full_attention", rope)
    values = factors.values.tolist()
    inner = {
        **{
            key: value
            for key, value in inner.items()
            if key in ("rope_theta", "partial_rotary_factor")
        },
        "rope_type": "longrope",
        "short_factor": [1.0] * len(values) if mixed else values,
        "long_factor": values,
        "factor": target_length / spec.original_length,
        "original_max_position_embeddings": spec.original_length,
        "attention_factor": factors.attention_factor,
        "short_mscale": 1.0 if mixed else factors.attention_factor,
        "long_mscale": factors.attention_factor,
    }
    text.rope_parameters = {**rope, "full_attention": inner} if "full_attention" in rope else inner
    text.max_position_embeddings = target_length
    if hasattr(
        text, "original_max_position_embeddings"
    ):  # Phi-3's, which transformers believes before the RoPE's own
        text.original_max_position_embeddings = spec.original_length
    return config


def save_extended(
    folder: Path,
    config: "PreTrainedConfig",
    weights: dict[str, torch.Tensor],
    tokenizer: "PreTrainedTokenizerBase",
    dtype: torch.dtype,
    generation: "GenerationConfig | None" = None,
) -> None:
    """Write a model directory that transformers loads.

    Args:
        folder: made if it is not there.
        config: what it says from now on.
        weights: whole, under transformers' names; taken out one by one, so that they are never there twice.
        tokenizer: of the base model; it learns the longer window.
        dtype: of the weights on disk.
        generation: of the base model, where it has one: its stop tokens and how it samples.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(
        {name: weights.pop(name).to(dtype) for name in list(weights)}, assign=True
    )
    model.tie_weights()
    if generation is not None:
        model.generation_config = generation
    model.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.model_max_length = config.get_text_config().max_position_embeddings
    tokenizer.save_pretrained(folder)
