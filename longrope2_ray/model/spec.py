"""What is known about a model before its weights are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from longrope2_ray.model.source import resolve_model_path
from longrope2_ray.rope.geometry import RopeGeometry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# The heads a causal language model may have; anything else (classification, bare encoder) has no next-token logits.
_LANGUAGE_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class ModelSpec:
    """What is known about a model before its weights are read; also writable by hand, to plan without the model.

    Attributes:
        model_type: transformers' name of the family, such as ``llama``.
        architecture: the class that transformers builds, such as ``LlamaForCausalLM``.
        head_dim: size of one attention head.
        rotary_dim: rotated dimensions of a head, twice the length of a factor vector.
        rope_base: RoPE base of the full-attention layers.
        original_length: pre-trained window L0, in tokens.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the MLP; of a mixture of experts, of all those that one token is sent to.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        vocab_size: rows of the output matrix.
        tie_word_embeddings: whether input and output embeddings are one matrix.
        num_parameters: all parameters; None where they were not counted.
        sliding_window: tokens that every layer is limited to; None as soon as one layer sees everything.
    """

    model_type: str
    architecture: str
    head_dim: int
    rotary_dim: int
    rope_base: float
    original_length: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False
    num_parameters: int | None = None
    sliding_window: int | None = None

    @property
    def geometry(self) -> RopeGeometry:
        return RopeGeometry(self.head_dim, self.rotary_dim, self.rope_base, self.original_length)


def read_spec(
    path: str,
    gguf_file: str | None = None,
    revision: str | None = None,
    original_length: int | None = None,
    sliding_window: int | None = None,
) -> ModelSpec:
    """Read a model's config and build it without weights; refuse by name what cannot be searched.

    Args:
        original_length: L0 where the config's ``max_position_embeddings`` is not the pre-trained window.
        sliding_window: tokens that sliding layers see, where it is not the config's.

    Raises:
        ValueError: if the path holds no causal language model with a standard, unscaled rotary module.
    """
    config = read_config(path, gguf_file, revision, sliding_window)
    text = config.get_text_config()
    model = _skeleton(config, path)
    what = f"{path!r} ({type(model).__name__})"
    if getattr(text, "kv_lora_rank", None) or getattr(text, "qk_rope_head_dim", None):
        raise ValueError(
            f"model.path: expected standard attention, got multi-head latent attention in {what}"
        )
    if (
        getattr(text, "use_bidirectional_attention", None)
        or getattr(text, "is_causal", True) is False
    ):
        raise ValueError(
            f"model.path: expected a causal language model, got bidirectional attention in {what}"
        )
    buffers = _rotary_buffers(model)
    lengths = {getattr(module, f"{prefix}inv_freq").numel() for module, prefix in buffers}
    if not buffers:
        raise ValueError(
            f"model.path: expected a model with rotary position embeddings (RoPE) in an inv_freq buffer, "
            f"got {what}, which has none"
        )
    if len(lengths) != 1:
        raise ValueError(
            f"model.path: expected one rotary size in all layers, got {sorted(lengths)} in {what}"
        )
    rope = _unscaled_rope(text, what)
    location, gguf = resolve_model_path(path, gguf_file, revision)
    if gguf and (file := Path(location) / gguf).is_file():
        _require_unscaled_gguf(file, 2 * min(lengths), what)
    # Phi-3's config class has original_max_position_embeddings 4096 even where nobody wrote it: the smaller one counts.
    lengths_known = [
        text.max_position_embeddings,
        getattr(text, "original_max_position_embeddings", None),
    ]
    length = original_length or min(known for known in lengths_known if known)
    num_heads = text.num_attention_heads
    return ModelSpec(
        model_type=text.model_type,
        architecture=type(model).__name__,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // num_heads,
        rotary_dim=2 * lengths.pop(),
        rope_base=float(rope["rope_theta"]),
        original_length=int(length),
        hidden_size=text.hidden_size,
        intermediate_size=_inner_width(text),
        num_layers=text.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or num_heads,
        vocab_size=text.vocab_size,
        tie_word_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        sliding_window=_window_of_every_layer(text),
    )


def _inner_width(text: Any) -> int:
    width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    experts = getattr(text, "num_experts_per_tok", None)
    if not experts:
        return int(width)
    one = getattr(text, "moe_intermediate_size", None) or width
    shared = getattr(text, "shared_expert_intermediate_size", None) or one * (
        getattr(text, "n_shared_experts", None) or 0
    )
    return int(experts * one + shared)


def read_config(
    path: str,
    gguf_file: str | None = None,
    revision: str | None = None,
    sliding_window: int | None = None,
) -> "PreTrainedConfig":
    """The model's config, of the base model where it was extended here, with another sliding window if one is given.

    Raises:
        ValueError: if transformers cannot read it, or there is no window to replace.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    location, gguf = resolve_model_path(path, gguf_file, revision)
    try:
        config = _as_base(AutoConfig.from_pretrained(location, **_where(gguf, revision)))
    except (OSError, ValueError, KeyError, TypeError, ImportError, StrictDataclassError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model.path: expected a model whose config transformers can read, got {path!r}: {reason}"
        ) from error
    if sliding_window is not None:
        text = config.get_text_config()
        if not getattr(text, "sliding_window", None):
            raise ValueError(
                f"model.sliding_window: expected a model with sliding layers, got {path!r}, whose config has none"
            )
        text.sliding_window = sliding_window
    return config


def _as_base(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """The base model's config of a model that ``export`` wrote: its factors are pinned from there.

    Told by ``longrope`` with an attention factor of its own (transformers makes one up where there is none) and short
    factors that are all 1, or those of the long window.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    inner = rope.get("full_attention", rope)
    short = inner.get("short_factor") or [None]
    ours = set(short) == {1.0} or short == inner.get("long_factor")
    if inner.get("rope_type") == "longrope" and inner.get("attention_factor") is not None and ours:
        text.max_position_embeddings = inner["original_max_position_embeddings"]
        kept = {
            key: value
            for key, value in inner.items()
            if key in ("rope_theta", "partial_rotary_factor")
        }
        base = {**kept, "rope_type": "default"}
        text.rope_parameters = (
            {**rope, "full_attention": base} if "full_attention" in rope else base
        )
    return config


def _where(gguf: str | None, revision: str | None) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained`` that are set; some loaders do not accept None."""
    return {
        key: value
        for key, value in {"gguf_file": gguf, "revision": revision}.items()
        if value is not None
    }


def _skeleton(config: "PreTrainedConfig", path: str, dtype: str | None = None) -> "PreTrainedModel":
    """The model on the meta device: every module and shape, no weights, well under a second even for large ones."""
    from transformers import AutoModelForCausalLM

    heads = config.architectures or []
    if heads and not any(name.endswith(_LANGUAGE_HEADS) for name in heads):
        raise ValueError(
            f"model.path: expected a causal language model, got {heads[0]} in {path!r}"
        )
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, **({"dtype": DTYPES[dtype]} if dtype else {})
            )
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model.path: expected a causal language model, got {config.model_type} in {path!r}: {reason}"
        ) from error


def _rotary_buffers(model: "PreTrainedModel") -> list[tuple[nn.Module, str]]:
    """Every rotary module that serves full attention, with the prefix of its attributes.

    Found by structure, not by family: a module of the decoder with an ``inv_freq`` buffer and an
    ``attention_scaling``, or the ``full_attention_`` ones where a family keeps one set for each layer type.
    """
    found = []
    for module in model.get_decoder().modules():
        names = dict(module.named_buffers(recurse=False))
        for prefix in ("", "full_attention_"):
            if f"{prefix}inv_freq" in names and hasattr(module, f"{prefix}attention_scaling"):
                found.append((module, prefix))
    return found


def _unscaled_rope(text: "PreTrainedConfig", what: str) -> dict[str, Any]:
    """The RoPE parameters of the full-attention layers, which must be of type ``default``.

    Raises:
        ValueError: if the checkpoint was already extended, or rotates by something else than token positions.
    """
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    rope_type = (rope or {}).get("rope_type", "default")
    if not rope or "mrope_section" in rope or rope.get("rope_theta") is None:
        raise ValueError(
            f"model.path: expected standard RoPE parameters with a rope_theta, got {rope} in {what}"
        )
    if rope_type != "default":
        raise ValueError(
            f"model.path: expected RoPE of type 'default', got {rope_type!r} in {what}: this checkpoint was already "
            "extended. Start from the un-extended base model; if its weights were never trained with that scaling, "
            'set rope_type to "default" in a copy of its config.json'
        )
    return rope


def _require_unscaled_gguf(file: Path, rotary_dim: int, what: str) -> None:
    """Refuse what a GGUF says about its RoPE beside the base, which transformers drops.

    Raises:
        ValueError: if the file scales its RoPE, or rotates another part of a head.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    said = {
        name.split(".", 1)[1]: field.contents()
        for name, field in reader.fields.items()
        if ".rope." in name
    }
    kind, rotated = (
        said.get("rope.scaling.type", "none"),
        said.get("rope.dimension_count", rotary_dim),
    )
    tables = [t.name for t in reader.tensors if t.name.startswith(("rope_freqs", "rope_factors"))]
    if kind != "none" or tables:
        raise ValueError(
            f"model.path: expected a GGUF with unscaled RoPE, got {', '.join([f'scaling {kind!r}', *tables])} in {what}: "
            f"this checkpoint was already extended. Start from the un-extended base model"
        )
    if rotated != rotary_dim:
        raise ValueError(
            f"model.path: expected {rotary_dim} rotated dimensions, which is what transformers makes of this GGUF, got "
            f"{rotated} in {what}; use the model's own files"
        )


def _window_of_every_layer(text: "PreTrainedConfig") -> int | None:
    window = getattr(text, "sliding_window", None)
    if not getattr(text, "use_sliding_window", True):
        return None
    layer_types = getattr(text, "layer_types", None)
    return (
        window
        if window and (layer_types is None or set(layer_types) == {"sliding_attention"})
        else None
    )


def require_sight(spec: ModelSpec, path: str, target_length: int) -> None:
    """Refuse a model none of whose layers sees as far as the target: no factors find what is out of sight.

    Raises:
        ValueError: naming the field to change.
    """
    window = spec.sliding_window
    if window is not None and window < target_length:
        raise ValueError(
            f"model.sliding_window: expected {target_length} tokens (search.target_length) or more in some layer, got a "
            f"window of {window} in every layer of {path!r}; a needle farther away would be out of sight, whatever the "
            f"factors. Set it to {target_length} to let every layer see the whole input"
        )
