"""Generation under one RoPE for each request (LongRoPE2 Sec. 3.3).

A request whose prompt and new tokens fit into the original window L0 gets the original RoPE, any
other the rescaled one, from its first token to its last: keys that are cached under one RoPE are
wrong under the other, so nothing switches within a request.
"""

from typing import Any

import torch

from longrope2_ray.model.attention import input_device
from longrope2_ray.model.pinned_rope import PinnedRope
from longrope2_ray.rope.factors import RescaleFactors

# Arguments of transformers' generate that are refused, with the reason.
_REFUSED = {
    "past_key_values": "keys that were cached before may stand under the other RoPE",
    "inputs_embeds": "the window follows from the number of token ids",
    "max_length": "set max_new_tokens, which the window follows from",
    "return_dict_in_generate": "only the token ids are returned",
}


def factors_for(
    num_tokens: int, factors: RescaleFactors, original_length: int
) -> RescaleFactors | None:
    """Choose the RoPE of a request: None for the original one, else the rescaled one's factors.

    Args:
        num_tokens: tokens of the prompt and new tokens together.
        factors: the long window's factors.
        original_length: the original window L0 in tokens.
    """
    return None if num_tokens <= original_length else factors


def generate(
    rope: PinnedRope,
    factors: RescaleFactors,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Generate with a model under the one RoPE that the request's window asks for.

    transformers' own ``generate`` does the work, greedily unless ``do_sample`` or the like is
    given; stop tokens are those of the model's generation config. Afterwards, and after an
    exception, the model has the RoPE that it had before.

    Args:
        rope: the RoPE of the model that generates.
        factors: the long window's factors.
        input_ids: (B, T) prompts.
        max_new_tokens: the most tokens that are generated for each prompt.
        attention_mask: (B, T), 0 at padding, which stands on the left; all 1 unless given. With
            padding transformers builds a (B, 1, T, T) mask, so send long prompts one at a time.
        options: further arguments of transformers' ``generate``.

    Returns:
        (B, T + new) token ids, the prompts included.

    Raises:
        ValueError: if the requests of a batch need different RoPE, the factors do not fit the
            model, or an argument would undo the choice.
    """
    for name in sorted(_REFUSED.keys() & options.keys()):
        raise ValueError(f"{name}: expected none in a generation, since {_REFUSED[name]}")
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(
            f"input_ids: expected (B, T) token ids, got shape {tuple(input_ids.shape)}"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    length = _length_of_batch(input_ids, attention_mask, max_new_tokens, rope.shape.original_length)
    model: Any = rope.model  # a PreTrainedModel's generate is not typed
    device = input_device(model)
    with rope.pinned(factors_for(length, factors, rope.shape.original_length)):
        return model.generate(
            input_ids.to(device),
            attention_mask=attention_mask.to(device),
            max_new_tokens=max_new_tokens,
            **{"do_sample": False, **options},
        )


def _length_of_batch(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int, original_length: int
) -> int:
    """Tokens of the longest request of a batch, prompt and new ones.

    Raises:
        ValueError: if some requests fit into the original window and others do not, or the mask
            is none of left padding.
    """
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    kept = attention_mask.bool()
    if not kept[:, -1].all() or (kept[:, :-1] & ~kept[:, 1:]).any():
        raise ValueError(
            "attention_mask: expected padding on the left only; set the tokenizer's "
            "padding_side = 'left'"
        )
    lengths = kept.sum(dim=1) + max_new_tokens
    num_long = int((lengths > original_length).sum())
    if 0 < num_long < len(lengths):
        raise ValueError(
            f"input_ids: expected requests of one window in a batch, got {num_long} of "
            f"{len(lengths)} with more than {original_length} tokens, prompt and {max_new_tokens} "
            "new ones; generate for them apart"
        )
    return int(lengths.max())
