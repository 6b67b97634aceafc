"""What is known about a model before its weights are read; what cannot be extended is refused."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope2_ray.model.config import (
    extension_of,
    full_attention_rope,
    read_config,
    read_own_config,
)
from longrope2_ray.model.skeleton import build_skeleton, rotary_buffers
from longrope2_ray.model.source import find_model
from longrope2_ray.recipe.model import ModelSection, ModelShape
from longrope2_ray.rope.factors import RescaleFactors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def read_shape(section: ModelSection) -> ModelShape:
    """Read a model's shape from its config and from the model built without weights.

    Raises:
        ValueError: if the path holds no causal language model with a standard, unscaled rotary
            module; the message says what it holds instead.
    """
    config = read_config(section)
    return shape_of_skeleton(build_skeleton(config, section), config, section)


def shape_of_skeleton(
    skeleton: "PreTrainedModel", config: "PreTrainedConfig", section: ModelSection
) -> ModelShape:
    """The shape of a model that is already built without weights, as ``read_shape`` gives it.

    Raises:
        ValueError: as ``read_shape``.
    """
    what = f"{section.path!r} ({type(skeleton).__name__})"
    shape = shape_of(skeleton, config, what)
    source = find_model(section)
    if source.gguf_file and (file := Path(source.location) / source.gguf_file).is_file():
        _require_unscaled_gguf(file, shape.rotary_dim, what)
    if section.original_length is None:
        return shape
    return shape.model_copy(update={"original_length": section.original_length})


def shape_of(model: "PreTrainedModel", config: "PreTrainedConfig", what: str) -> ModelShape:
    """Derive the shape of a model that transformers built, with weights or without.

    Args:
        model: the model.
        config: the config that it was built from, which says more than ``model.config`` where a
            language model is one part of several.
        what: the model's name in messages.

    Raises:
        ValueError: if it is no causal language model with a standard, unscaled rotary module.
    """
    text = config.get_text_config()
    _require_standard_attention(text, what)
    rotary_dim = _rotary_dim(model, what)
    rope = _unscaled_rope(config, what)
    num_heads = text.num_attention_heads
    return ModelShape(
        model_type=text.model_type,
        architecture=type(model).__name__,
        hidden_size=text.hidden_size,
        intermediate_size=_inner_width(text),
        num_layers=text.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // num_heads,
        rotary_dim=rotary_dim,
        rope_base=float(rope["rope_theta"]),
        original_length=_original_length(text),
        vocab_size=text.vocab_size,
        tie_word_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        sliding_window=_window_of_every_layer(text),
    )


def read_factors(section: ModelSection) -> RescaleFactors | None:
    """Read the long window's factors from a model that ``longrope2_ray.export`` wrote.

    Returns:
        The factors with their attention factor; None for a model that was not extended here.

    Raises:
        ValueError: if there is no model, or its factors are not finite positive numbers.
    """
    rope = extension_of(read_own_config(section))
    if rope is None:
        return None
    return RescaleFactors(
        rope["long_factor"], attention_factor=rope["attention_factor"], source=section.path
    )


def require_window_reaches(shape: ModelShape, path: str, target_length: int) -> None:
    """Refuse a model none of whose layers attends as far back as the target length.

    No factors find a needle that lies outside every layer's sliding window.

    Raises:
        ValueError: naming the field to change.
    """
    window = shape.sliding_window
    if window is not None and window < target_length:
        raise ValueError(
            f"model.sliding_window: expected {target_length} tokens (search.target_length) or more "
            f"in some layer, got a window of {window} in every layer of {path!r}; a needle farther "
            "away would be out of sight, whatever the factors. Set it to "
            f"{target_length} to let every layer see the whole input"
        )


def _require_standard_attention(text: "PreTrainedConfig", what: str) -> None:
    if getattr(text, "kv_lora_rank", None) or getattr(text, "qk_rope_head_dim", None):
        raise ValueError(
            f"model.path: expected standard attention, got multi-head latent attention in {what}"
        )
    both_ways = getattr(text, "use_bidirectional_attention", None)
    if both_ways or getattr(text, "is_causal", True) is False:
        raise ValueError(
            f"model.path: expected a causal language model, got bidirectional attention in {what}"
        )


def _rotary_dim(model: "PreTrainedModel", what: str) -> int:
    """Rotated dimensions of a head: twice the angles in a rotary buffer, the same in all layers."""
    sizes = {
        getattr(module, f"{prefix}inv_freq").numel() for module, prefix in rotary_buffers(model)
    }
    if not sizes:
        raise ValueError(
            "model.path: expected a model with rotary position embeddings (RoPE) in an inv_freq "
            f"buffer, got {what}, which has none"
        )
    if len(sizes) != 1:
        raise ValueError(
            f"model.path: expected one rotary size in all layers, got {sorted(sizes)} in {what}"
        )
    return 2 * sizes.pop()


def _unscaled_rope(config: "PreTrainedConfig", what: str) -> dict[str, Any]:
    """The RoPE parameters of the full-attention layers, which must be of type ``default``.

    Raises:
        ValueError: if the checkpoint was already extended, or rotates by something else than
            token positions.
    """
    rope = full_attention_rope(config)
    if not rope or "mrope_section" in rope or rope.get("rope_theta") is None:
        raise ValueError(
            f"model.path: expected standard RoPE parameters with a rope_theta, got {rope} in {what}"
        )
    rope_type = rope.get("rope_type", "default")
    if rope_type != "default":
        raise ValueError(
            f"model.path: expected RoPE of type 'default', got {rope_type!r} in {what}: this "
            "checkpoint was already extended. Start from the un-extended base model; if its "
            'weights were never trained with that scaling, set rope_type to "default" in a copy '
            "of its config.json"
        )
    return rope


def _original_length(text: "PreTrainedConfig") -> int:
    """The pre-trained window that a config says.

    Phi-3's config class has ``original_max_position_embeddings`` 4096 even where nobody wrote it,
    so the smaller one counts.
    """
    own = getattr(text, "original_max_position_embeddings", None)
    return int(min(length for length in (text.max_position_embeddings, own) if length))


def _inner_width(text: "PreTrainedConfig") -> int:
    """Inner width of the MLP, or of all experts that one token is sent to, shared ones included."""
    width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    num_experts = getattr(text, "num_experts_per_tok", None)
    if not num_experts:
        return int(width)
    one = getattr(text, "moe_intermediate_size", None) or width
    num_shared = getattr(text, "n_shared_experts", None) or 0
    shared = getattr(text, "shared_expert_intermediate_size", None) or one * num_shared
    return int(num_experts * one + shared)


def _window_of_every_layer(text: "PreTrainedConfig") -> int | None:
    """The sliding window, if every layer has one."""
    if not getattr(text, "use_sliding_window", True):
        return None
    layer_types = getattr(text, "layer_types", None)
    if layer_types is not None and set(layer_types) != {"sliding_attention"}:
        return None
    return getattr(text, "sliding_window", None) or None


def _require_unscaled_gguf(file: Path, rotary_dim: int, what: str) -> None:
    """Refuse what a GGUF says about its RoPE beside the base, which transformers drops.

    Raises:
        ValueError: if the file scales its RoPE, or rotates another part of a head.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    said = {
        name.split(".", 1)[1]: field.contents()
        for name, field in reader.fields.items()
        if ".rope." in name
    }
    kind = said.get("rope.scaling.type", "none")
    tables = [t.name for t in reader.tensors if t.name.startswith(("rope_freqs", "rope_factors"))]
    if kind != "none" or tables:
        raise ValueError(
            "model.path: expected a GGUF with unscaled RoPE, "
            f"got {', '.join([f'scaling {kind!r}', *tables])} in {what}: "
            "this checkpoint was already extended. Start from the un-extended base model"
        )
    rotated = said.get("rope.dimension_count", rotary_dim)
    if rotated != rotary_dim:
        raise ValueError(
            f"model.path: expected {rotary_dim} rotated dimensions, which is what transformers "
            f"makes of this GGUF, got {rotated} in {what}; use the model's own files"
        )
