"""An export, saved and loaded again: what transformers runs is what pinned factors give."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny_models import (
    FAMILIES,
    VOCABULARY,
    WINDOW,
    save_tiny,
    section,
    shape_of,
    some_factors,
    tiny_config,
    tiny_model,
)
from tokenizers import Tokenizer, models

from longrope2_ray.export.config import extended_config
from longrope2_ray.export.huggingface import save_extended
from longrope2_ray.model.config import read_config
from longrope2_ray.model.loading import load_generation_config, load_model
from longrope2_ray.model.pinned_rope import PinnedRope
from longrope2_ray.model.spec import read_factors, read_shape
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
    shape = read_shape(section(base, original_length=ORIGINAL))
    factors = some_factors(shape, 1.2)
    config = extended_config(read_config(section(base)), shape, factors, LENGTH, mixed)
    loaded = load_model(section(base))
    save_extended(tmp_path / "model", config, loaded.state_dict(), tokenizer(), torch.float32)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ours = load_model(section(tmp_path / "model"))
    again = read_shape(section(tmp_path / "model"))
    assert (again.geometry, again.original_length) == (shape.geometry, ORIGINAL)
    rope = PinnedRope(ours, again)
    # transformers has one attention factor for both windows
    original = RescaleFactors(np.ones(shape.geometry.num_cosines), 1.2)
    for length in (ORIGINAL, ORIGINAL + 1, LENGTH):
        ids = (torch.arange(length) * 7 % VOCABULARY)[None]
        with rope.pinned(original if length <= ORIGINAL and mixed else factors):
            assert torch.allclose(theirs(ids).logits, ours(ids).logits, atol=1e-4), length
    said = theirs.config.get_text_config().rope_parameters
    said = said.get("full_attention", said)
    # what vLLM reads
    assert (said["short_mscale"], said["long_mscale"]) == (1.0 if mixed else 1.2, 1.2)
    read = read_factors(section(tmp_path / "model"))
    assert read is not None
    assert read.values.tolist() == factors.values.tolist()
    assert (read.attention_factor, read.source) == (1.2, str(tmp_path / "model"))
    assert read_factors(section(base)) is None


def test_an_export_keeps_stop_tokens_and_knows_its_window(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    assert load_generation_config(section(save_tiny("qwen2", tmp_path / "other"))) is not None
    own = transformers.GenerationConfig(eos_token_id=[1, 7], do_sample=True, temperature=0.6)
    own.save_pretrained(base)
    shape = read_shape(section(base))
    config = extended_config(read_config(section(base)), shape, some_factors(shape), LENGTH)
    weights = load_model(section(base)).state_dict()
    save_extended(
        tmp_path / "model",
        config,
        weights,
        tokenizer(),
        torch.float32,
        load_generation_config(section(base)),
    )
    kept = transformers.GenerationConfig.from_pretrained(tmp_path / "model")
    assert (kept.eos_token_id, kept.do_sample, kept.temperature) == ([1, 7], True, 0.6)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").model_max_length == LENGTH


def test_a_generation_config_that_could_not_be_saved_costs_no_training(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(
        '{"eos_token_id": 1, "max_new_tokens": -1}'
    )
    assert load_generation_config(section(base)) is None


def test_a_base_config_is_left_as_it_was() -> None:
    model = tiny_model(tiny_config("phi3_partial"))
    before = model.config.to_dict()
    config = extended_config(model.config, shape_of(model), some_factors(shape_of(model)), LENGTH)
    assert config.rope_parameters["partial_rotary_factor"] == 0.75
    assert model.config.to_dict() == before
