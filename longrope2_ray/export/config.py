"""The config of an extended model: it says under which RoPE the weights were trained.

transformers reads it as ``longrope``: the original RoPE up to the original length, the rescaled
RoPE beyond (or the rescaled RoPE for every input, if the weights were trained so). ``read_shape``
and ``load_model`` read it as the base model that it grew from, into which this package pins
factors of its own.
"""

import copy
from typing import TYPE_CHECKING, Any

from longrope2_ray.recipe.model import ModelShape
from longrope2_ray.rope.factors import RescaleFactors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def extended_config(
    config: "PreTrainedConfig",
    shape: ModelShape,
    factors: RescaleFactors,
    target_length: int,
    mixed: bool = True,
) -> "PreTrainedConfig":
    """Return a copy of the base model's config with both windows in it.

    transformers applies the attention factor of ``longrope`` to short inputs too; at 1.0 both
    windows are exact. vLLM reads ``short_mscale`` and ``long_mscale`` instead.

    Args:
        config: the base model's config.
        shape: the base model's shape.
        factors: the long window's rescale factors.
        target_length: the long window in tokens.
        mixed: whether short inputs were trained under the original RoPE; else under ``factors``.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    rope: dict[str, Any] = dict(text.rope_parameters)
    inner = rope.get("full_attention", rope)
    kept = {key: inner[key] for key in ("rope_theta", "partial_rotary_factor") if key in inner}
    values = factors.values.tolist()
    inner = {
        **kept,
        "rope_type": "longrope",
        "short_factor": [1.0] * len(values) if mixed else values,
        "long_factor": values,
        "factor": target_length / shape.original_length,
        "original_max_position_embeddings": shape.original_length,
        "attention_factor": factors.attention_factor,
        "short_mscale": 1.0 if mixed else factors.attention_factor,
        "long_mscale": factors.attention_factor,
    }
    text.rope_parameters = {**rope, "full_attention": inner} if "full_attention" in rope else inner
    text.max_position_embeddings = target_length
    # Phi-3 has this attribute, and transformers believes it before the RoPE's own
    if hasattr(text, "original_max_position_embeddings"):
        text.original_max_position_embeddings = shape.original_length
    return config
