"""Shapes before weights, and what is refused by name."""

from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import FAMILIES, SHAPE, WINDOW, section, tiny_config, tiny_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from longrope2_ray.model.costs import layer_parameters
from longrope2_ray.model.loading import load_model
from longrope2_ray.model.spec import read_shape, require_window_reaches
from longrope2_ray.recipe.loading import load_recipe


@pytest.mark.parametrize("family", FAMILIES)
def test_shape_matches_the_loaded_model(family: str, saved: dict[str, str]) -> None:
    shape = read_shape(section(saved[family]))
    model = load_model(section(saved[family]))
    head_dim = {"llama_odd_head_dim": 20, "qwen3": 24, "gemma3": 24}.get(family, 16)
    rotary_dim = {"phi3_partial": 12, "gpt_neox": 8}.get(family, head_dim)
    assert (shape.head_dim, shape.rotary_dim, shape.original_length) == (
        head_dim,
        rotary_dim,
        WINDOW,
    )
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert shape.num_layers == 3
    assert (shape.num_heads, shape.num_kv_heads) == (4, 2)
    assert shape.sliding_window == (40 if family == "mistral_windowed" else None)
    assert shape.rope_base == {"llama_odd_head_dim": 5e5, "qwen2": 1e6, "gemma3": 1e6}.get(
        family, 1e4
    )


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("MixtralConfig", {"num_local_experts": 2, "num_experts_per_tok": 2}),
        ("Qwen3MoeConfig", {"num_experts": 2, "num_experts_per_tok": 2,
                            "moe_intermediate_size": 24, "head_dim": 16}),
        ("Qwen2MoeConfig", {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                            "shared_expert_intermediate_size": 40}),
        ("Glm4MoeConfig", {"n_routed_experts": 2, "num_experts_per_tok": 2,
                           "moe_intermediate_size": 24, "n_shared_experts": 1,
                           "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}),
    ],
)  # fmt: skip
def test_a_mixture_of_experts_counts_those_that_a_token_is_sent_to(
    config: str, changes: dict, tmp_path: Path
) -> None:
    """Here a token is sent to all experts, so it passes every matrix but those of the routers."""
    model = tiny_model(getattr(transformers, config)(**SHAPE | changes))
    model.save_pretrained(tmp_path)
    matrices = {
        name: p for name, p in model.get_decoder().layers[0].named_parameters() if p.ndim > 1
    }
    routers = [
        name for name in matrices if name.endswith(("gate.weight", "shared_expert_gate.weight"))
    ]
    assert routers
    passed = sum(p.numel() for name, p in matrices.items() if name not in routers)
    assert layer_parameters(read_shape(section(tmp_path))) == passed


def test_a_sliding_window_can_be_opened(saved: dict[str, str]) -> None:
    shape = read_shape(section(saved["mistral_windowed"]))
    with pytest.raises(
        ValueError, match=r"model\.sliding_window: expected 96 tokens .* got a window of 40"
    ):
        require_window_reaches(shape, "some model", 96)
    opened = read_shape(section(saved["mistral_windowed"], sliding_window=96))
    require_window_reaches(opened, "some model", 96)
    ids = torch.arange(90)[None]
    near = load_model(section(saved["mistral_windowed"]))
    far = load_model(section(saved["mistral_windowed"], sliding_window=96))
    full = tiny_model(tiny_config("mistral"))
    assert torch.equal(far(ids).logits, full(ids).logits)
    assert not torch.allclose(near(ids).logits, far(ids).logits, atol=1e-3)
    with pytest.raises(
        ValueError, match=r"model\.sliding_window: expected a model with sliding layers"
    ):
        read_shape(section(saved["llama"], sliding_window=96))


def test_shape_takes_another_original_length(saved: dict[str, str]) -> None:
    assert read_shape(section(saved["llama"], original_length=32)).geometry.original_length == 32


def test_shape_by_hand_knows_its_geometry() -> None:
    shape = load_recipe("llama3_8b_128k").model.shape
    assert shape is not None
    assert shape.geometry.theoretical_critical_dim == 35


def test_models_without_rope_are_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=16)
    ).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"model.path: expected a model with rotary.*GPT2LMHeadModel"
    ):
        read_shape(section(tmp_path))


def test_models_without_a_language_head_are_refused(tmp_path: Path) -> None:
    small = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 11,
    }
    BertForSequenceClassification(BertConfig(**small)).save_pretrained(tmp_path / "bert")
    with pytest.raises(
        ValueError, match="expected a causal language model, got BertForSequenceClassification"
    ):
        read_shape(section(tmp_path / "bert"))
    t5 = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=11)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="expected a causal language model, got t5"):
        read_shape(section(tmp_path / "t5"))


def test_latent_attention_is_refused(tmp_path: Path) -> None:
    config = DeepseekV3Config(
        vocab_size=11, hidden_size=16, intermediate_size=16, moe_intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8,
        q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, first_k_dense_replace=1,
    )  # fmt: skip
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="latent attention"):
        read_shape(section(tmp_path))


@pytest.mark.parametrize(
    "rope_type",
    [
        "linear",
        "dynamic",
        "yarn",
        "llama3",
        "longrope",
        "longrope with an attention factor at all lengths",
    ],
)
def test_extended_checkpoints_are_refused(rope_type: str, tmp_path: Path) -> None:
    rope = {
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 2.0, "original_max_position_embeddings": WINDOW},
        "llama3": {
            "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": WINDOW,
        },
        "longrope": {
            "factor": 2.0, "long_factor": [2.0] * 8, "short_factor": [1.0] * 7 + [1.1],
            "original_max_position_embeddings": WINDOW, "attention_factor": 1.0,
        },
        # as Phi-4-mini's, which transformers makes up
        "longrope with an attention factor at all lengths": {
            "factor": 2.0, "long_factor": [2.0] * 8, "short_factor": [1.0] * 8,
            "original_max_position_embeddings": WINDOW,
        },
    }[rope_type]  # fmt: skip
    rope_type = rope_type.split()[0]
    tiny_config(
        "llama", {"rope_type": rope_type, **rope}, max_position_embeddings=2 * WINDOW
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"got '{rope_type}'.*un-extended base model"):
        read_shape(section(tmp_path))
