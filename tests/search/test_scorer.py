"""The scorer's short way against transformers' own forward."""

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
    some_factors,
    spec_of,
    tiny_config,
    tiny_model,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import FalconConfig, MixtralConfig

from longrope2_ray.model.attention import banded_attention
from longrope2_ray.model.loading import load_model
from longrope2_ray.model.pinned_rope import PinnedRope
from longrope2_ray.model.spec import ModelSpec, read_spec
from longrope2_ray.search.scorer import NeedleScorer, plain_loss
from longrope2_ray.tasks.needle import NeedleSample

LENGTH = 120


def ones(spec: ModelSpec) -> np.ndarray:
    return np.ones(spec.rotary_dim // 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_score_equals_the_plain_forward(family: str) -> None:
    model = tiny_model(tiny_config(family))
    spec = spec_of(model)
    scorer = NeedleScorer(model, spec, mlp_chunk_tokens=33)
    assert scorer.trimmed, "every family here can be trimmed"
    factors, sample = some_factors(spec.rotary_dim // 2), random_sample(LENGTH)
    for vector in ((ones(spec), 1.0, 0), (factors, 1.17, 6), (factors, 1.17, 0)):
        score = scorer.score(sample, *vector)
        with PinnedRope(model, spec).pinned(*vector):
            expected = plain_loss(model, sample)
        assert score.num_tokens == 7
        assert score.nll_sum / score.num_tokens == pytest.approx(expected, abs=1e-4)
    assert scorer.score(sample, ones(spec), 1.0).nll_sum != pytest.approx(score.nll_sum, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_scoring_leaves_the_model_as_it_was(family: str) -> None:
    model = tiny_model(tiny_config(family))
    spec, sample = spec_of(model), random_sample(LENGTH)
    before = plain_loss(model, sample)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    scorer = NeedleScorer(model, spec, mlp_chunk_tokens=16)
    first = scorer.score(sample, some_factors(spec.rotary_dim // 2), 1.3)
    again = scorer.score(sample, some_factors(spec.rotary_dim // 2), 1.3)
    assert first.nll_sum == again.nll_sum, "scores are deterministic"
    assert plain_loss(model, sample) == before
    assert model.config._attn_implementation == "sdpa"
    assert not model.get_decoder().layers[-1]._forward_pre_hooks
    assert "forward" not in model.get_decoder().layers[0].mlp.__dict__
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("answer_tokens", [1, 2, LENGTH - 1])
def test_answers_of_any_length(answer_tokens: int) -> None:
    model = tiny_model(tiny_config("qwen3"))
    spec, sample = spec_of(model), random_sample(LENGTH, answer_tokens)
    score = NeedleScorer(model, spec).score(sample, ones(spec), 1.0)
    assert score.nll_sum / answer_tokens == pytest.approx(plain_loss(model, sample), abs=1e-4)


def test_correct_means_that_greedy_decoding_gives_the_answer() -> None:
    model = tiny_model(tiny_config("llama"))
    spec, prompt = spec_of(model), random_sample(LENGTH)
    start, stop = prompt.answer_span
    ids = torch.from_numpy(prompt.input_ids[:start])[None]
    greedy = model.generate(
        ids, max_new_tokens=7, min_new_tokens=7, do_sample=False, eos_token_id=None
    )[0].numpy()
    scorer = NeedleScorer(model, spec)
    assert scorer.score(
        NeedleSample(greedy, (start, stop), 0.0, "", "", ""), ones(spec), 1.0
    ).correct
    for wrong in (start, stop - 1):
        other = greedy.copy()
        other[wrong] = (other[wrong] + 1) % spec.vocab_size
        assert not scorer.score(
            NeedleSample(other, (start, stop), 0.0, "", "", ""), ones(spec), 1.0
        ).correct


def test_not_a_number_is_returned_as_it_is() -> None:
    model = tiny_model(tiny_config("llama"))
    spec = spec_of(model)
    scorer = NeedleScorer(model, spec)
    model.lm_head.weight.fill_(float("nan"))
    score = scorer.score(random_sample(LENGTH), ones(spec), 1.0)
    assert np.isnan(score.nll_sum)
    assert not score.correct


def test_bfloat16_scores_like_its_own_forward(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    model, spec, sample = (
        load_model(path, dtype="bfloat16", device="cpu"),
        read_spec(path),
        random_sample(LENGTH),
    )
    score = NeedleScorer(model, spec).score(sample, ones(spec), 1.0)
    assert score.nll_sum / 7 == pytest.approx(plain_loss(model, sample), rel=2e-2)


def test_eager_attention_uses_the_familys_own_forward(tmp_path: Path) -> None:
    path = save_tiny("gemma3", tmp_path)
    model, spec, sample = (
        load_model(path, attention="eager", device="cpu"),
        read_spec(path),
        random_sample(LENGTH),
    )
    scorer = NeedleScorer(model, spec)
    assert not scorer.trimmed
    assert scorer.score(sample, ones(spec), 1.0).nll_sum / 7 == pytest.approx(
        plain_loss(model, sample), abs=1e-4
    )


def test_families_that_cannot_be_trimmed_are_scored_all_the_same() -> None:
    small = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    falcon = tiny_model(FalconConfig(**small, alibi=False, initializer_range=0.2))
    spec = ModelSpec("falcon", "FalconForCausalLM", 16, 16, 1e4, 48, 64, 256, 3, 4, 4, 97)
    scorer, sample = NeedleScorer(falcon, spec), random_sample(LENGTH)
    assert not scorer.trimmed
    assert scorer.score(sample, ones(spec), 1.0).nll_sum / 7 == pytest.approx(
        plain_loss(falcon, sample), abs=1e-4
    )


def test_mixtures_of_experts_are_trimmed_too() -> None:
    config = MixtralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, sliding_window=None, initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    model, sample = tiny_model(config), random_sample(LENGTH)
    spec = ModelSpec("mixtral", "MixtralForCausalLM", 16, 16, 1e4, 48, 64, 32, 2, 4, 2, 97)
    scorer = NeedleScorer(model, spec, mlp_chunk_tokens=16)
    assert scorer.trimmed
    assert scorer.score(sample, ones(spec), 1.0).nll_sum / 7 == pytest.approx(
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
    spec, length = spec_of(model), 2000
    scorer, sample = NeedleScorer(model, spec, mlp_chunk_tokens=100), random_sample(length)
    with LargestTensor() as largest:
        scorer.score(sample, ones(spec), 1.0)
    assert (length - 1) * spec.hidden_size <= largest.num_elements < length * VOCABULARY < length**2


@pytest.mark.parametrize(
    ("num_queries", "window"), [(50, 7), (50, 1), (50, None), (5, 7), (5, None), (5, 200)]
)
def test_banded_attention_equals_a_full_mask(num_queries: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 6, num_queries, 8, generator=generator)
    key, value = torch.randn(2, 1, 2, 50, 8, generator=generator)
    at, seen = torch.arange(50)[:, None], torch.arange(50)[None]
    mask = (seen <= at) & (seen > at - (window or 50))
    repeated = (x.repeat_interleave(3, dim=1) for x in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, *repeated, attn_mask=mask[-num_queries:], scale=0.3
    )
    out = banded_attention(query, key, value, scaling=0.3, window=window, block_queries=16)
    torch.testing.assert_close(out, expected)


def test_a_vector_of_the_wrong_length_is_refused() -> None:
    model = tiny_model(tiny_config("llama"))
    scorer = NeedleScorer(model, spec_of(model))
    with pytest.raises(ValueError, match="factors: expected 8 numbers"):
        scorer.score(random_sample(LENGTH), np.ones(9), 1.0)
