"""A model on the meta device: every module and every shape, without weights."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from longrope2_ray.recipe.model import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# The heads a causal language model may have; any other (classification, bare encoder) gives no
# next-token logits.
_LANGUAGE_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def build_skeleton(config: "PreTrainedConfig", section: ModelSection) -> "PreTrainedModel":
    """Build the model of a config on the meta device, well under a second even for large ones.

    Args:
        config: the model's config, from ``read_config``.
        section: the model section that the config was read for; its ``dtype`` is the weights'.

    Raises:
        ValueError: if it is no causal language model, or transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    heads = config.architectures or []
    if heads and not any(name.endswith(_LANGUAGE_HEADS) for name in heads):
        raise ValueError(
            f"model.path: expected a causal language model, got {heads[0]} in {section.path!r}"
        )
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=DTYPES[section.dtype])
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            "model.path: expected a causal language model, "
            f"got {config.model_type} in {section.path!r}: {reason}"
        ) from error


def rotary_buffers(model: "PreTrainedModel") -> list[tuple[nn.Module, str]]:
    """Find every rotary module that serves full attention, with the prefix of its attributes.

    Found by structure, not by family: a module of the decoder with an ``inv_freq`` buffer and an
    ``attention_scaling``, or the ``full_attention_`` ones where a family keeps one set for each
    layer type.
    """
    found = []
    for module in model.get_decoder().modules():
        names = dict(module.named_buffers(recurse=False))
        for prefix in ("", "full_attention_"):
            if f"{prefix}inv_freq" in names and hasattr(module, f"{prefix}attention_scaling"):
                found.append((module, prefix))
    return found
