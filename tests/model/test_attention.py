"""Attention without masks, and the way to put it into a model."""

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longrope2_ray.model.attention import banded_attention, causal_attention, route_attention


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


def test_a_model_computes_its_attention_by_what_it_is_routed_to(input_ids: torch.Tensor) -> None:
    model = tiny_model(tiny_config("llama"))
    expected = model(input_ids).logits
    calls = []

    def attend(query, key, value, scaling, window):
        calls.append(query.shape)
        assert window is None
        return causal_attention(query, key, value, scaling)

    route_attention(model.config, "routed", attend)
    torch.testing.assert_close(model(input_ids).logits, expected)
    assert calls == [(1, 4, input_ids.shape[1], 16)] * 3


@pytest.mark.parametrize("asked", ["attention_mask", "softcap", "s_aux"])
def test_layers_that_ask_for_more_than_causal_attention_are_refused(asked: str) -> None:
    route_attention(tiny_config("llama"), "refusing", lambda *_: torch.zeros(1))
    tensor = torch.zeros(1, 4, 8, 16)
    arguments = {"attention_mask": None, asked: torch.zeros(1)}
    with pytest.raises(ValueError, match=r"model\.path: Linear asks for a mask"):
        ALL_ATTENTION_FUNCTIONS["refusing"](torch.nn.Linear(1, 1), *[tensor] * 3, **arguments)
