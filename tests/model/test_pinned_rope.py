"""Factors pinned in place, and the bits given back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from tiny_models import (
    FAMILIES,
    WINDOW,
    rotary_of,
    section,
    shape_of,
    some_factors,
    some_values,
    tiny_config,
    tiny_model,
)

from longrope2_ray.model.loading import load_model
from longrope2_ray.model.pinned_rope import PinnedRope, rescale
from longrope2_ray.model.spec import read_shape
from longrope2_ray.rope.factors import RescaleFactors

ATTENTION_FACTOR = 1.17


@pytest.mark.parametrize("family", FAMILIES)
def test_pinned_factors_equal_longrope_of_transformers(
    family: str, input_ids: torch.Tensor
) -> None:
    model = tiny_model(tiny_config(family))
    shape = shape_of(model)
    factors = some_factors(shape, ATTENTION_FACTOR)
    longrope = {
        "rope_type": "longrope",
        "long_factor": factors.values.tolist(),
        "short_factor": [1.0] * len(factors.values),
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
        with PinnedRope(model, shape).pinned(factors):
            pinned = model(input_ids=input_ids, use_cache=False).logits
        expected = native(input_ids=input_ids, use_cache=False).logits
    torch.testing.assert_close(pinned, expected, atol=1e-4, rtol=1e-4)
    assert (unscaled - expected).abs().max() > 1e-2, (
        "the factors must matter for this test to mean anything"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_gives_the_bits_back(family: str, input_ids: torch.Tensor) -> None:
    model = tiny_model(tiny_config(family))
    shape = shape_of(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.inference_mode():
        before = model(input_ids=input_ids, use_cache=False).logits
        rope = PinnedRope(model, shape)
        rope.pin(some_factors(shape, ATTENTION_FACTOR))
        rope.pin(RescaleFactors(2 * some_values(shape.geometry.num_cosines)))
        rope.restore()
        after = model(input_ids=input_ids, use_cache=False).logits
    assert torch.equal(before, after)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_positions_may_keep_the_original_angles(
    family: str, input_ids: torch.Tensor
) -> None:
    model = tiny_model(tiny_config(family))
    shape = shape_of(model)
    rope = PinnedRope(model, shape)
    rescaling = some_factors(shape, ATTENTION_FACTOR)
    ones = replace(rescaling, values=np.ones_like(rescaling.values))
    with torch.inference_mode():

        def logits(factors: RescaleFactors) -> torch.Tensor:
            with rope.pinned(factors):
                return model(input_ids=input_ids, use_cache=False).logits

        original, rescaled = logits(ones), logits(rescaling)
        some = logits(replace(rescaling, start_tokens=5))
        all_of_them = logits(replace(rescaling, start_tokens=input_ids.shape[1]))
        torch.testing.assert_close(some[:, :5], original[:, :5], atol=1e-4, rtol=1e-4)
        assert (some[:, 5:] - rescaled[:, 5:]).abs().max() > 1e-3, (
            "later positions see the first ones elsewhere"
        )
        torch.testing.assert_close(all_of_them, original, atol=1e-4, rtol=1e-4)
        assert torch.equal(logits(rescaling), rescaled), "nothing is left behind"


def test_start_tokens_count_positions_not_places_in_the_batch() -> None:
    model = tiny_model(tiny_config("llama"))
    rotary, shape = rotary_of(model), shape_of(model)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])  # two documents
    x = torch.zeros(1, 8, 1)
    rope = PinnedRope(model, shape)
    original = rotary(x, positions)
    with rope.pinned(some_factors(shape)):
        rescaled = rotary(x, position_ids=positions)
    with rope.pinned(some_factors(shape, start_tokens=2)):
        found = rotary(x, position_ids=positions)
    kept = (positions < 2)[..., None]
    for table, old, new in zip(found, original, rescaled, strict=True):
        assert torch.equal(table, torch.where(kept, old, new))


def test_pinned_restores_after_an_error() -> None:
    model = tiny_model(tiny_config("llama"))
    shape = shape_of(model)
    original = rotary_of(model).inv_freq.clone()
    with pytest.raises(KeyError), PinnedRope(model, shape).pinned(some_factors(shape, 1.5)):
        raise KeyError
    assert torch.equal(rotary_of(model).inv_freq, original)
    assert rotary_of(model).attention_scaling == 1.0


def test_sliding_layers_of_gemma3_keep_their_angles() -> None:
    model = tiny_model(tiny_config("gemma3"))
    rotary = rotary_of(model)
    sliding = rotary.sliding_attention_inv_freq.clone()
    shape = shape_of(model)
    with PinnedRope(model, shape).pinned(some_factors(shape, 1.5)):
        assert torch.equal(rotary.sliding_attention_inv_freq, sliding)
        assert (
            rotary.sliding_attention_attention_scaling,
            rotary.full_attention_attention_scaling,
        ) == (1.0, 1.5)


def test_bfloat16_keeps_the_angles_in_float32(saved: dict[str, str]) -> None:
    shape = read_shape(section(saved["llama"]))
    model = load_model(section(saved["llama"], dtype="bfloat16"))
    assert rotary_of(model).inv_freq.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16
    factors = some_factors(shape)
    expected = torch.from_numpy(shape.geometry.angles / factors.values).float()
    # the second cast finds angles that bfloat16 rounded
    for cast in (torch.nn.Module.bfloat16, torch.nn.Module.float):
        model = cast(model)
        rope = PinnedRope(model, shape)
        rope.pin(factors)
        assert torch.equal(rotary_of(model).inv_freq, expected)
        model.bfloat16()
        rope.pin(factors)
        assert torch.equal(rotary_of(model).inv_freq, expected)
        rope.restore()
        torch.testing.assert_close(
            rotary_of(model).inv_freq, torch.from_numpy(shape.geometry.angles).float()
        )
        model.bfloat16()


def test_factors_that_do_not_fit_are_refused() -> None:
    model = tiny_model(tiny_config("llama"))
    rope = PinnedRope(model, shape_of(model))
    with pytest.raises(ValueError, match=r"factors: expected 8 numbers.*got 7"):
        rope.pin(RescaleFactors(np.ones(7)))
    assert rope.factors is None


def test_a_rope_that_is_not_of_the_shape_is_refused() -> None:
    model = tiny_model(tiny_config("llama"))
    other_base = shape_of(model).model_copy(update={"rope_base": 5e5})
    with pytest.raises(ValueError, match="follow another rule"):
        PinnedRope(model, other_base)
    dynamic = tiny_model(tiny_config("llama", {"rope_type": "dynamic", "factor": 2.0}))
    with pytest.raises(ValueError, match="got 'dynamic'"):
        PinnedRope(dynamic, shape_of(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_rescale_finds_the_shape_of_a_model_of_transformers(
    family: str, saved: dict[str, str], input_ids: torch.Tensor
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(saved[family])
    factors = some_factors(shape_of(model), ATTENTION_FACTOR)
    with torch.inference_mode():
        original = model(input_ids).logits
        with PinnedRope(model, read_shape(section(saved[family]))).pinned(factors):
            expected = model(input_ids).logits
        rope = rescale(model, factors)
        assert torch.equal(model(input_ids).logits, expected)
        rope.restore()
        assert torch.equal(model(input_ids).logits, original)


def test_rescale_refuses_a_model_that_is_extended_already() -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": WINDOW}
    model = tiny_model(tiny_config("llama", yarn, max_position_embeddings=2 * WINDOW))
    with pytest.raises(ValueError, match=r"got 'yarn' in .*LlamaForCausalLM.*already extended"):
        rescale(model, some_factors(shape_of(model)))


def test_pinned_gives_back_what_was_pinned_before() -> None:
    model = tiny_model(tiny_config("llama"))
    first = some_factors(shape_of(model), 1.2)
    rope = rescale(model, first)
    pinned = rotary_of(model).inv_freq.clone()
    with rope.pinned(None):
        assert rotary_of(model).attention_scaling == 1.0
        assert not torch.equal(rotary_of(model).inv_freq, pinned)
    assert rope.factors is first
    assert torch.equal(rotary_of(model).inv_freq, pinned)
    assert rotary_of(model).attention_scaling == 1.2
