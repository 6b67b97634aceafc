"""Generation: one RoPE for a request, and the model as it was afterwards."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tiny_models import (
    VOCABULARY,
    WINDOW,
    rotary_of,
    section,
    shape_of,
    some_factors,
    tiny_config,
    tiny_model,
)

from longrope2_ray.model.generation import factors_for, generate
from longrope2_ray.model.loading import load_model, load_tokenizer
from longrope2_ray.model.pinned_rope import PinnedRope, rescale
from longrope2_ray.model.spec import read_shape
from longrope2_ray.rope.baselines import baseline
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.tasks.books import load_books

NEW = 8


@pytest.fixture
def rope() -> PinnedRope:
    model = tiny_model(tiny_config("llama"))
    model.generation_config.eos_token_id = None
    return PinnedRope(model, shape_of(model))


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (1, length), generator=generator)


def token_by_token(
    rope: PinnedRope, factors: RescaleFactors | None, ids: torch.Tensor, count: int
) -> list[int]:
    """Greedy tokens under one fixed RoPE, by a forward pass without a cache for each of them."""
    with rope.pinned(factors), torch.inference_mode():
        for _ in range(count):
            logits = rope.model(input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, -count:].tolist()


def new_tokens(out: torch.Tensor, length: int) -> list[int]:
    return out[0, length:].tolist()


@pytest.mark.parametrize(
    ("length", "is_long"),
    [(WINDOW - NEW, False), (WINDOW - NEW + 1, True), (WINDOW - 2, True), (2 * WINDOW, True)],
)
@pytest.mark.parametrize("start_tokens", [0, 4])
def test_a_request_has_one_rope(
    rope: PinnedRope, length: int, is_long: bool, start_tokens: int
) -> None:
    factors, ids = some_factors(rope.shape, 1.2, start_tokens), prompt(length)
    rescaled, original = (token_by_token(rope, f, ids, NEW) for f in (factors, None))
    assert rescaled != original, "the factors must matter for this test to mean anything"
    out = generate(rope, factors, ids, max_new_tokens=NEW)
    assert torch.equal(out[:, :length], ids)
    assert new_tokens(out, length) == (rescaled if is_long else original)
    assert factors_for(length + NEW, factors, WINDOW) is (factors if is_long else None)


@pytest.mark.parametrize("family", ["gemma3", "phi3_partial", "mistral_windowed"])
def test_other_families_too(family: str) -> None:
    model = tiny_model(tiny_config(family))
    model.generation_config.eos_token_id = None
    rope = PinnedRope(model, shape_of(model))
    factors, ids = some_factors(rope.shape, 1.1), prompt(WINDOW)
    out = generate(rope, factors, ids, max_new_tokens=NEW)
    assert new_tokens(out, WINDOW) == token_by_token(rope, factors, ids, NEW)


def test_the_reference_model_generates_under_one_rope() -> None:
    reference = section("bundled:reference")
    shape = read_shape(reference)
    rope = PinnedRope(load_model(reference), shape)
    factors = baseline("yarn", shape.geometry, 4 * shape.original_length, attention_factor=1.1)
    text = load_books(["bundled:report"])[0].text
    ids = torch.tensor(load_tokenizer(reference).encode(text[:20000]))[None]
    window = shape.original_length
    for length in (window - NEW, window - NEW // 2, 2 * window):
        chosen = factors_for(length + NEW, factors, window)
        assert (chosen is None) == (length == window - NEW)
        out = generate(rope, factors, ids[:, :length], max_new_tokens=NEW, eos_token_id=None)
        assert new_tokens(out, length) == token_by_token(rope, chosen, ids[:, :length], NEW)


def test_the_model_is_as_it_was(rope: PinnedRope) -> None:
    before = rotary_of(rope.model).inv_freq.clone()
    generate(rope, some_factors(rope.shape, 1.2), prompt(WINDOW), max_new_tokens=2)
    assert torch.equal(rotary_of(rope.model).inv_freq, before)

    def fail(*_: object) -> bool:
        assert rotary_of(rope.model).attention_scaling == 1.2
        raise KeyError

    with pytest.raises(KeyError):
        generate(
            rope,
            some_factors(rope.shape, 1.2),
            prompt(WINDOW),
            max_new_tokens=2,
            stopping_criteria=[fail],
        )
    assert torch.equal(rotary_of(rope.model).inv_freq, before)
    assert rotary_of(rope.model).attention_scaling == 1.0
    assert rope.factors is None


def test_a_rescaled_model_stays_rescaled() -> None:
    model = tiny_model(tiny_config("llama"))
    model.generation_config.eos_token_id = None
    factors = some_factors(shape_of(model), 1.2)
    rope = rescale(model, factors)
    pinned = rotary_of(model).inv_freq.clone()
    ids = prompt(WINDOW - NEW)
    short = generate(rope, factors, ids, max_new_tokens=NEW)
    assert rope.factors is factors
    assert torch.equal(rotary_of(model).inv_freq, pinned)
    rope.restore()
    assert new_tokens(short, ids.shape[1]) == token_by_token(rope, None, ids, NEW)


def padded(lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of these lengths with padding on the left, and their mask."""
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = prompt(length, row)
        mask[row, longest - length :] = 1
    return ids, mask


@pytest.mark.parametrize("lengths", [(WINDOW - NEW, 20, 11), (2 * WINDOW, WINDOW)])
def test_a_batch_of_one_window_gives_what_each_request_gives(
    rope: PinnedRope, lengths: tuple[int, ...]
) -> None:
    ids, mask = padded(lengths)
    factors = some_factors(rope.shape, 1.2)
    out = generate(rope, factors, ids, max_new_tokens=NEW, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = generate(rope, factors, prompt(length, row), max_new_tokens=NEW)
        assert out[row, -NEW:].tolist() == new_tokens(alone, length)


def test_sampling_is_passed_through(rope: PinnedRope) -> None:
    factors, ids = some_factors(rope.shape), prompt(WINDOW)
    greedy = generate(rope, factors, ids, max_new_tokens=NEW)
    torch.manual_seed(0)
    sampled = generate(
        rope, factors, ids, max_new_tokens=NEW, do_sample=True, temperature=5.0, top_k=0
    )
    assert not torch.equal(greedy, sampled)


def test_what_would_undo_the_choice_is_refused(rope: PinnedRope) -> None:
    factors = some_factors(rope.shape)
    ids, mask = padded([WINDOW, 10])
    with pytest.raises(ValueError, match=r"one window in a batch, got 1 of 2 .* apart"):
        generate(rope, factors, ids, max_new_tokens=NEW, attention_mask=mask)
    with pytest.raises(ValueError, match=r"padding_side = 'left'"):
        generate(rope, factors, ids, max_new_tokens=NEW, attention_mask=mask.flip(1))
    with pytest.raises(ValueError, match=r"attention_mask: expected the shape"):
        generate(rope, factors, ids, max_new_tokens=NEW, attention_mask=mask[:1])
    for name in ("past_key_values", "inputs_embeds", "max_length", "return_dict_in_generate"):
        with pytest.raises(ValueError, match=f"{name}: expected none"):
            generate(rope, factors, ids, max_new_tokens=NEW, **{name: 1})
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1, got 0"):
        generate(rope, factors, ids, max_new_tokens=0)
    with pytest.raises(ValueError, match=r"input_ids: expected \(B, T\)"):
        generate(rope, factors, ids[0], max_new_tokens=NEW)
    with pytest.raises(ValueError, match="factors: expected 8 numbers"):
        generate(rope, RescaleFactors(np.ones(9)), prompt(WINDOW), max_new_tokens=NEW)
