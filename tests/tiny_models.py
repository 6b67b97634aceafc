"""Tiny random models of every supported family: a window of 48 tokens, a vocabulary of 97."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from longrope2_ray.recipe.model import ModelSection, ModelShape
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.tasks.needle import NeedleSample

WINDOW = 48
VOCABULARY = 97

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    # Larger than usual, so that attention is far from uniform and a wrong angle shows in the
    # logits.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# name -> (config class, what differs from SHAPE, RoPE parameters)
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}, {}),
    "llama_odd_head_dim": ("LlamaConfig", {"head_dim": 20}, {"rope_theta": 5e5}),
    "mistral": ("MistralConfig", {"sliding_window": None}, {}),
    "mistral_windowed": ("MistralConfig", {"sliding_window": 40}, {}),
    "qwen2": ("Qwen2Config", {}, {"rope_theta": 1e6}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}, {}),
    "phi3": ("Phi3Config", {"sliding_window": None}, {}),
    "phi3_partial": ("Phi3Config", {"sliding_window": None}, {"partial_rotary_factor": 0.75}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}, {}),
    "olmo2": ("Olmo2Config", {}, {}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "sliding_window": 16,
            "final_logit_softcapping": 5.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        {"rope_theta": 1e6},
    ),
    # Not named anywhere in the library: structure alone must find their way.
    "gpt_neox": ("GPTNeoXConfig", {}, {"partial_rotary_factor": 0.5}),
    "cohere": ("CohereConfig", {}, {}),
}


def tiny_config(
    family: str, rope: dict[str, Any] | None = None, **changes: Any
) -> transformers.PreTrainedConfig:
    """The family's configuration; ``rope`` replaces parameters of its (full-attention) RoPE."""
    name, differences, parameters = FAMILIES[family]
    full = {"rope_type": "default", "rope_theta": 1e4, **parameters, **(rope or {})}
    if family == "gemma3":
        full = {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    settings = {**SHAPE, **differences, "rope_parameters": full, **changes}
    return getattr(transformers, name)(**settings)


def tiny_model(
    config: transformers.PreTrainedConfig, seed: int = 0
) -> transformers.PreTrainedModel:
    """Random weights from the seed, float32, evaluation mode."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return model.requires_grad_(False).eval()


def save_tiny(family: str, folder: Path, rope: dict[str, Any] | None = None, **changes: Any) -> str:
    """Write the family's model to ``folder`` as ``from_pretrained`` reads it; the folder's name."""
    tiny_model(tiny_config(family, rope, **changes)).save_pretrained(folder)
    return str(folder)


def section(path: str | Path, **fields: Any) -> ModelSection:
    """The model section of a model in float32 on the CPU, with other ``fields`` where given."""
    return ModelSection(path=str(path), **{"dtype": "float32", "device": "cpu", **fields})


def shape_of(model: transformers.PreTrainedModel) -> ModelShape:
    """The shape of a model that was never on disk, by its config alone."""
    text = model.config.get_text_config()
    rope = text.rope_parameters.get("full_attention", text.rope_parameters)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelShape(
        model_type=text.model_type,
        architecture=type(model).__name__,
        head_dim=head_dim,
        rotary_dim=int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        rope_base=rope["rope_theta"],
        original_length=WINDOW,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        vocab_size=text.vocab_size,
    )


def random_sample(length: int, num_answer_tokens: int = 7, seed: int = 0) -> NeedleSample:
    """Random tokens with the last ones for an answer."""
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, length)
    return NeedleSample(ids, (length - num_answer_tokens, length), 0.0, "key", "value", "book")


def some_values(num_cosines: int) -> np.ndarray:
    """A vector that touches every dimension differently."""
    return np.linspace(1.0, 4.0, num_cosines) ** 1.1


def some_factors(
    shape: ModelShape, attention_factor: float = 1.0, start_tokens: int = 0
) -> RescaleFactors:
    """``some_values`` for a model of this shape."""
    values = some_values(shape.geometry.num_cosines)
    return RescaleFactors(values, attention_factor, start_tokens=start_tokens)


def rotary_of(model: torch.nn.Module) -> torch.nn.Module:
    """The model's first module with a buffer of RoPE angles."""
    return next(
        m
        for m in model.modules()
        if any(n.endswith("inv_freq") for n, _ in m.named_buffers(recurse=False))
    )
