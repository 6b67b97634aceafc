"""A model's config: read through transformers, with what an export wrote into it told apart."""

from typing import TYPE_CHECKING, Any

from longrope2_ray.model.source import find_model
from longrope2_ray.recipe.model import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def read_own_config(section: ModelSection) -> "PreTrainedConfig":
    """Read the model's config as it lies on disk or on the hub.

    Raises:
        ValueError: if transformers cannot read it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    source = find_model(section)
    try:
        return AutoConfig.from_pretrained(source.location, **source.options)
    except (OSError, ValueError, KeyError, TypeError, ImportError, StrictDataclassError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            "model.path: expected a model whose config transformers can read, "
            f"got {section.path!r}: {reason}"
        ) from error


def read_config(section: ModelSection) -> "PreTrainedConfig":
    """Read the config of the base model, with ``model.sliding_window`` in it where that is set.

    A model that ``longrope2_ray.export`` wrote is read as the base model that it grew from, since
    its factors are pinned into it from here.

    Raises:
        ValueError: if transformers cannot read it, or there is no window to replace.
    """
    config = read_own_config(section)
    text = config.get_text_config()
    if extension := extension_of(config):
        text.max_position_embeddings = extension["original_max_position_embeddings"]
        kept = ("rope_theta", "partial_rotary_factor")
        base = {key: value for key, value in extension.items() if key in kept}
        base["rope_type"] = "default"
        rope = text.rope_parameters
        by_type = "full_attention" in rope
        text.rope_parameters = {**rope, "full_attention": base} if by_type else base
    if section.sliding_window is not None:
        if not getattr(text, "sliding_window", None):
            raise ValueError(
                "model.sliding_window: expected a model with sliding layers, "
                f"got {section.path!r}, whose config has none"
            )
        text.sliding_window = section.sliding_window
    return config


def full_attention_rope(config: "PreTrainedConfig") -> dict[str, Any]:
    """The RoPE parameters of a config's full-attention layers; empty where there are none."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return rope.get("full_attention", rope) or {}


def extension_of(config: "PreTrainedConfig") -> dict[str, Any] | None:
    """The RoPE parameters that ``longrope2_ray.export`` wrote; None in any other config.

    Told by ``longrope`` with an attention factor of its own (transformers makes one up where
    there is none) and short factors that are all 1, or those of the long window.
    """
    rope = full_attention_rope(config)
    if rope.get("rope_type") != "longrope" or rope.get("attention_factor") is None:
        return None
    short = rope.get("short_factor") or [None]
    return rope if set(short) == {1.0} or short == rope.get("long_factor") else None
