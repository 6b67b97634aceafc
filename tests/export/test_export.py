"""What is exported is what transformers runs: saved, loaded again, and compared with pinned factors."""

from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import (
    FAMILIES,
    VOCABULARY,
    WINDOW,
    save_tiny,
    some_factors,
    spec_of,
    tiny_config,
    tiny_model,
)
from tokenizers import Tokenizer, models

from longrope2_ray.export.huggingface import extended_config, save_extended
from longrope2_ray.model.loading import load_generation_config, load_model
from longrope2_ray.model.pinned_rope import PinnedRope
from longrope2_ray.model.spec import read_config, read_spec
from longrope2_ray.rope.factors import RescaleFactors

LENGTH = 2 * WINDOW
ORIGINAL = 24  # shorter than the config says, as the paper's Phi-3: the switch must follow


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY)}
    own = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, model_max_length=WINDOW)


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_runs_an_export_as_it_was_trained(
    family: str, mixed: bool, tmp_path: Path
) -> None:
    base = save_tiny(family, tmp_path / "base")
    spec = read_spec(base, original_length=ORIGINAL)
    values = some_factors(spec.geometry.num_cosines)
    config = extended_config(read_config(base), spec, RescaleFactors(values, 1.2), LENGTH, mixed)
    loaded = load_model(base, device="cpu")
    save_extended(tmp_path / "model", config, loaded.state_dict(), tokenizer(), torch.float32)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ours = load_model(str(tmp_path / "model"), device="cpu")
    again = read_spec(str(tmp_path / "model"))
    assert (again.geometry, again.original_length) == (spec.geometry, ORIGINAL)
    rope = PinnedRope(ours, again)
    for length in (ORIGINAL, ORIGINAL + 1, LENGTH):
        ids = (torch.arange(length) * 7 % VOCABULARY)[None]
        short = length <= ORIGINAL and mixed
        with rope.pinned(
            values if not short else values * 0 + 1, 1.2
        ):  # transformers has one attention factor for both
            assert torch.allclose(theirs(ids).logits, ours(ids).logits, atol=1e-4), length
    said = theirs.config.get_text_config().rope_parameters
    said = said.get("full_attention", said)
    assert (said["short_mscale"], said["long_mscale"]) == (
        (1.0 if mixed else 1.2),
        1.2,
    )  # what vLLM reads


def test_an_export_keeps_stop_tokens_and_knows_its_window(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    assert load_generation_config(save_tiny("qwen2", tmp_path / "other")) is not None
    own = transformers.GenerationConfig(eos_token_id=[1, 7], do_sample=True, temperature=0.6)
    own.save_pretrained(base)
    spec = read_spec(base)
    config = extended_config(
        read_config(base), spec, RescaleFactors(some_factors(spec.geometry.num_cosines)), LENGTH
    )
    weights = load_model(base, device="cpu").state_dict()
    save_extended(
        tmp_path / "model",
        config,
        weights,
        tokenizer(),
        torch.float32,
        load_generation_config(base),
    )
    kept = transformers.GenerationConfig.from_pretrained(tmp_path / "model")
    assert (kept.eos_token_id, kept.do_sample, kept.temperature) == ([1, 7], True, 0.6)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").model_max_length == LENGTH


def test_a_generation_config_that_could_not_be_saved_costs_no_training(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(
        '{"eos_token_id": 1, "max_new_tokens": -1}'
    )
    assert load_generation_config(base) is None


def test_a_base_config_is_left_as_it_was() -> None:
    model = tiny_model(tiny_config("phi3_partial"))
    before = model.config.to_dict()
    config = extended_config(model.config, spec_of(model), RescaleFactors(some_factors(6)), LENGTH)
    assert config.rope_parameters["partial_rotary_factor"] == 0.75
    assert model.config.to_dict() == before
