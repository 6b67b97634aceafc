"""The scorer's short way against transformers' own forward."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    FAMILIES,
    VOCABULARY,
    random_sample,
    save_tiny,
    section,
    shape_of,
    some_factors,
    tiny_config,
    tiny_model,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import FalconConfig, MixtralConfig

from longrope2_ray.model.loading import load_model
from longrope2_ray.model.pinned_rope import PinnedRope
from longrope2_ray.model.spec import read_shape
from longrope2_ray.recipe.model import ModelShape
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.search import scorer as scorer_module
from longrope2_ray.search.cascade import attention_share
from longrope2_ray.search.scorer import NeedleScorer, plain_loss
from longrope2_ray.tasks.needle import NeedleSample

LENGTH = 120


def ones(shape: ModelShape) -> RescaleFactors:
    return RescaleFactors(np.ones(shape.geometry.num_cosines))


@pytest.mark.parametrize("family", FAMILIES)
def test_score_equals_the_plain_forward(family: str) -> None:
    model = tiny_model(tiny_config(family))
    shape = shape_of(model)
    scorer = NeedleScorer(model, shape, mlp_chunk_tokens=33)
    assert scorer.trimmed, "every family here can be trimmed"
    sample = random_sample(LENGTH)
    for factors in (ones(shape), some_factors(shape, 1.17, 6), some_factors(shape, 1.17)):
        score = scorer.score(sample, factors)
        with PinnedRope(model, shape).pinned(factors):
            expected = plain_loss(model, sample)
        assert score.num_tokens == 7
        assert score.nll_sum / score.num_tokens == pytest.approx(expected, abs=1e-4)
    assert scorer.score(sample, ones(shape)).nll_sum != pytest.approx(score.nll_sum, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_scoring_leaves_the_model_as_it_was(family: str) -> None:
    model = tiny_model(tiny_config(family))
    shape, sample = shape_of(model), random_sample(LENGTH)
    before = plain_loss(model, sample)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    scorer = NeedleScorer(model, shape, mlp_chunk_tokens=16)
    first = scorer.score(sample, some_factors(shape, 1.3))
    again = scorer.score(sample, some_factors(shape, 1.3))
    assert first.nll_sum == again.nll_sum, "scores are deterministic"
    assert plain_loss(model, sample) == before
    assert model.config._attn_implementation == "sdpa"
    assert not model.get_decoder().layers[-1]._forward_pre_hooks
    assert "forward" not in model.get_decoder().layers[0].mlp.__dict__
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("answer_tokens", [1, 2, LENGTH - 1])
def test_answers_of_any_length(answer_tokens: int) -> None:
    model = tiny_model(tiny_config("qwen3"))
    shape, sample = shape_of(model), random_sample(LENGTH, answer_tokens)
    score = NeedleScorer(model, shape).score(sample, ones(shape))
    assert score.nll_sum / answer_tokens == pytest.approx(plain_loss(model, sample), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_whole_document_is_scored_in_chunks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config(family))
    shape, sample = shape_of(model), random_sample(LENGTH).scored_whole()
    scorer = NeedleScorer(model, shape)
    factors = some_factors(shape, 1.17)
    whole, gradient = scorer.score(sample, factors), scorer.gradient(sample, factors)
    assert whole.num_tokens == LENGTH - 1
    with PinnedRope(model, shape).pinned(factors):
        plain = plain_loss(model, sample)
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, logits: seen.append(logits.shape[1])
    )
    monkeypatch.setattr(scorer_module, "LOGITS_CHUNK_TOKENS", 50)
    for trimmed in (True, False):
        scorer.trimmed = trimmed
        parts = scorer.score(sample, factors)
        assert parts.nll_sum == pytest.approx(whole.nll_sum, rel=1e-5)
        assert parts.nll_sum / parts.num_tokens == pytest.approx(plain, abs=1e-4)
    assert seen == [50, 50, 19] * 2
    scorer.trimmed = True
    again = scorer.gradient(sample, factors)
    assert again.gradient == pytest.approx(gradient.gradient, rel=1e-3, abs=1e-4)
    assert "forward" not in model.get_decoder().__dict__


def test_correct_means_that_greedy_decoding_gives_the_answer() -> None:
    model = tiny_model(tiny_config("llama"))
    shape, prompt = shape_of(model), random_sample(LENGTH)
    start, stop = prompt.answer_span
    ids = torch.from_numpy(prompt.input_ids[:start])[None]
    greedy = model.generate(
        ids, max_new_tokens=7, min_new_tokens=7, do_sample=False, eos_token_id=None
    )[0].numpy()
    scorer = NeedleScorer(model, shape)
    assert scorer.score(NeedleSample(greedy, (start, stop), 0.0, "", "", ""), ones(shape)).correct
    for wrong in (start, stop - 1):
        other = greedy.copy()
        other[wrong] = (other[wrong] + 1) % shape.vocab_size
        assert not scorer.score(
            NeedleSample(other, (start, stop), 0.0, "", "", ""), ones(shape)
        ).correct


def test_not_a_number_is_returned_as_it_is() -> None:
    model = tiny_model(tiny_config("llama"))
    shape = shape_of(model)
    scorer = NeedleScorer(model, shape)
    model.lm_head.weight.fill_(float("nan"))
    score = scorer.score(random_sample(LENGTH), ones(shape))
    assert np.isnan(score.nll_sum)
    assert not score.correct


def test_bfloat16_scores_like_its_own_forward(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    model, shape, sample = (
        load_model(section(path, dtype="bfloat16")),
        read_shape(section(path)),
        random_sample(LENGTH),
    )
    score = NeedleScorer(model, shape).score(sample, ones(shape))
    assert score.nll_sum / 7 == pytest.approx(plain_loss(model, sample), rel=2e-2)


def test_eager_attention_uses_the_familys_own_forward(tmp_path: Path) -> None:
    path = save_tiny("gemma3", tmp_path)
    model, shape, sample = (
        load_model(section(path, attention="eager")),
        read_shape(section(path)),
        random_sample(LENGTH),
    )
    scorer = NeedleScorer(model, shape)
    assert not scorer.trimmed
    assert scorer.score(sample, ones(shape)).nll_sum / 7 == pytest.approx(
        plain_loss(model, sample), abs=1e-4
    )


def test_families_that_cannot_be_trimmed_are_scored_all_the_same() -> None:
    small = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    falcon = tiny_model(FalconConfig(**small, alibi=False, initializer_range=0.2))
    shape = shape_of(falcon)
    scorer, sample = NeedleScorer(falcon, shape), random_sample(LENGTH)
    assert not scorer.trimmed
    assert scorer.score(sample, ones(shape)).nll_sum / 7 == pytest.approx(
        plain_loss(falcon, sample), abs=1e-4
    )


def test_mixtures_of_experts_are_trimmed_too() -> None:
    config = MixtralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, sliding_window=None,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    model, sample = tiny_model(config), random_sample(LENGTH)
    shape = shape_of(model)
    scorer = NeedleScorer(model, shape, mlp_chunk_tokens=16)
    assert scorer.trimmed
    assert scorer.score(sample, ones(shape)).nll_sum / 7 == pytest.approx(
        plain_loss(model, sample), abs=1e-4
    )


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation put out."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(
                    self.num_elements, tensor.untyped_storage().nbytes() // tensor.element_size()
                )
        return out


@pytest.mark.parametrize("family", ["llama", "mistral_windowed", "gemma3", "smollm3"])
def test_nothing_grows_like_all_logits_or_a_mask(family: str) -> None:
    model = tiny_model(tiny_config(family))
    shape, length = shape_of(model), 2000
    scorer, sample = NeedleScorer(model, shape, mlp_chunk_tokens=100), random_sample(length)
    with LargestTensor() as largest:
        scorer.score(sample, ones(shape))
    assert (
        (length - 1) * shape.hidden_size <= largest.num_elements < length * VOCABULARY < length**2
    )


def test_a_vector_of_the_wrong_length_is_refused() -> None:
    model = tiny_model(tiny_config("llama"))
    scorer = NeedleScorer(model, shape_of(model))
    with pytest.raises(ValueError, match="factors: expected 8 numbers"):
        scorer.score(random_sample(LENGTH), RescaleFactors(np.ones(9)))


def skipped_sample(length: int = LENGTH, dropped: int = 50) -> NeedleSample:
    """A sample of which ``dropped`` tokens in the middle are left out."""
    whole = random_sample(length)
    positions = np.delete(np.arange(length), np.arange(30, 30 + dropped))
    stop = length - dropped
    span = (stop - (whole.answer_span[1] - whole.answer_span[0]), stop)
    return NeedleSample(whole.input_ids[positions], span, 0.0, "", "", "", positions)


def masked_loss(model: Any, sample: NeedleSample) -> float:
    """Mean NLL of the answer by the family's own forward, with a mask, so that a jump of
    positions starts no other document."""
    ids, positions = (
        torch.tensor(values)[None] for values in (sample.input_ids, sample.position_ids)
    )
    labels = torch.full_like(ids, -100)
    start, stop = sample.answer_span
    labels[:, start:stop] = ids[:, start:stop]
    with torch.inference_mode():
        mask = torch.ones_like(ids)
        return float(
            model(input_ids=ids, position_ids=positions, attention_mask=mask, labels=labels).loss
        )


@pytest.mark.parametrize("family", [family for family in FAMILIES if "windowed" not in family])
def test_a_skipped_document_is_scored_at_its_positions(family: str) -> None:
    model = tiny_model(tiny_config(family))
    shape, sample = shape_of(model), skipped_sample()
    factors = some_factors(shape, 1.17)
    scorer = NeedleScorer(model, shape)
    assert scorer.trimmed
    # Its few tokens stand for all of them by a weaker attention.
    share = attention_share(len(sample.input_ids), LENGTH, 1.0)
    assert share == math.log(LENGTH - 50) / math.log(LENGTH)
    sample = replace(sample, attention_share=share)
    weaker = RescaleFactors(factors.values, share * factors.attention_factor)
    with PinnedRope(model, shape).pinned(weaker):
        expected = masked_loss(model, sample)
    score = scorer.score(sample, factors)
    assert score.nll_sum / 7 == pytest.approx(expected, abs=1e-4)
    assert scorer.gradient(sample, factors).nll_sum == pytest.approx(score.nll_sum, abs=1e-3)
    scorer.trimmed = False
    assert scorer.score(sample, factors).nll_sum == pytest.approx(score.nll_sum, abs=1e-3)
    whole = NeedleSample(sample.input_ids, sample.answer_span, 0.0, "", "", "")
    assert scorer.score(whole, factors).nll_sum != pytest.approx(score.nll_sum, abs=1e-2)


@pytest.mark.parametrize("trimmed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_finite_differences(family: str, trimmed: bool) -> None:
    model = tiny_model(tiny_config(family))
    shape, sample = shape_of(model), random_sample(LENGTH)
    scorer = NeedleScorer(model, shape)
    scorer.trimmed = trimmed
    factors = some_factors(shape, 1.17)
    found = scorer.gradient(sample, factors)
    plain = scorer.score(sample, factors)
    assert found.nll_sum == pytest.approx(plain.nll_sum, abs=1e-3)
    assert (found.num_tokens, found.correct) == (plain.num_tokens, plain.correct)
    assert len(found.gradient) == shape.geometry.num_cosines

    norm = float(np.linalg.norm(found.gradient))

    def moved(step: float) -> float:
        values = factors.values * np.exp(step * direction)
        return scorer.score(sample, RescaleFactors(values, factors.attention_factor)).nll_sum

    for seed in range(3):
        direction = np.random.default_rng(seed).normal(size=len(factors.values))
        difference = (moved(5e-4) - moved(-5e-4)) / 1e-3
        slope = float(np.dot(direction, found.gradient))
        assert slope == pytest.approx(difference, rel=0.05, abs=0.02 * norm)


def test_a_gradient_leaves_the_model_as_it_was() -> None:
    model = tiny_model(tiny_config("llama"))
    shape, sample = shape_of(model), random_sample(LENGTH)
    before = plain_loss(model, sample)
    scorer = NeedleScorer(model, shape)
    first = scorer.gradient(sample, some_factors(shape, 1.3))
    assert first.gradient == scorer.gradient(sample, some_factors(shape, 1.3)).gradient
    assert plain_loss(model, sample) == before
    assert not any("forward" in layer.__dict__ for layer in model.get_decoder().layers)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gradient_on_a_gpu_asks_for_kernels_that_sum_in_a_fixed_order() -> None:
    with scorer_module._deterministic(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()
    with scorer_module._deterministic(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
