"""Models: what is known before the weights, loading them, and pinning RoPE factors in place."""

import hashlib
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from longrope2_ray.checkpoint import resolve_model_path
from longrope2_ray.rope import RopeGeometry

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("longrope2")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTIONS = ("sdpa", "flash_attention_2", "eager")
# The heads a causal language model may have; anything else (classification, bare encoder) has no next-token logits.
_LANGUAGE_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_MIB = 1 << 20


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


# ----------------------------------------------------------------------------------- what is known before weights


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
        raise ValueError(f"model.path: expected standard attention, got multi-head latent attention in {what}")
    if getattr(text, "use_bidirectional_attention", None) or getattr(text, "is_causal", True) is False:
        raise ValueError(f"model.path: expected a causal language model, got bidirectional attention in {what}")
    buffers = _rotary_buffers(model)
    lengths = {getattr(module, f"{prefix}inv_freq").numel() for module, prefix in buffers}
    if not buffers:
        raise ValueError(
            f"model.path: expected a model with rotary position embeddings (RoPE) in an inv_freq buffer, "
            f"got {what}, which has none"
        )
    if len(lengths) != 1:
        raise ValueError(f"model.path: expected one rotary size in all layers, got {sorted(lengths)} in {what}")
    rope = _unscaled_rope(text, what)
    location, gguf = resolve_model_path(path, gguf_file, revision)
    if gguf and (file := Path(location) / gguf).is_file():
        _require_unscaled_gguf(file, 2 * min(lengths), what)
    # Phi-3's config class has original_max_position_embeddings 4096 even where nobody wrote it: the smaller one counts.
    lengths_known = [text.max_position_embeddings, getattr(text, "original_max_position_embeddings", None)]
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
    path: str, gguf_file: str | None = None, revision: str | None = None, sliding_window: int | None = None
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
        kept = {key: value for key, value in inner.items() if key in ("rope_theta", "partial_rotary_factor")}
        base = {**kept, "rope_type": "default"}
        text.rope_parameters = {**rope, "full_attention": base} if "full_attention" in rope else base
    return config


def _where(gguf: str | None, revision: str | None) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained`` that are set; some loaders do not accept None."""
    return {key: value for key, value in {"gguf_file": gguf, "revision": revision}.items() if value is not None}


def _skeleton(config: "PreTrainedConfig", path: str, dtype: str | None = None) -> "PreTrainedModel":
    """The model on the meta device: every module and shape, no weights, well under a second even for large ones."""
    from transformers import AutoModelForCausalLM

    heads = config.architectures or []
    if heads and not any(name.endswith(_LANGUAGE_HEADS) for name in heads):
        raise ValueError(f"model.path: expected a causal language model, got {heads[0]} in {path!r}")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **({"dtype": DTYPES[dtype]} if dtype else {}))
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
        raise ValueError(f"model.path: expected standard RoPE parameters with a rope_theta, got {rope} in {what}")
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
    said = {name.split(".", 1)[1]: field.contents() for name, field in reader.fields.items() if ".rope." in name}
    kind, rotated = said.get("rope.scaling.type", "none"), said.get("rope.dimension_count", rotary_dim)
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
    return window if window and (layer_types is None or set(layer_types) == {"sliding_attention"}) else None


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


def model_fingerprint(path: str, gguf_file: str | None = None, revision: str | None = None) -> str:
    """Sixteen hex digits that change with the config or the weights.

    A local model: its config and, of every weight file, name, size, the first and last MiB and 64 blocks of 64 KiB evenly
    between them, so that a file of many GiB costs no full read. A hub id: the id and the commit it resolved to.

    Raises:
        ValueError: if there is no model.
    """
    location, gguf = resolve_model_path(path, gguf_file, revision)
    digest = hashlib.sha256()
    folder = Path(location)
    if folder.is_dir():
        weights = (
            [folder / gguf] if gguf else sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
        )
        if not gguf:
            digest.update((folder / "config.json").read_bytes())
        for file in weights:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(_MIB))
                for block in range(1, 65):
                    opened.seek(block * size // 65)
                    digest.update(opened.read(_MIB // 16))
                opened.seek(max(size - _MIB, 0))
                digest.update(opened.read(_MIB))
    else:
        config = read_config(path, gguf_file, revision)
        digest.update(f"{path} {gguf} {getattr(config, '_commit_hash', None) or revision}".encode())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------- loading


def load_tokenizer(path: str, gguf_file: str | None = None, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """The model's tokenizer.

    Raises:
        ValueError: if there is none beside the model.
    """
    from transformers import AutoTokenizer

    location, gguf = resolve_model_path(path, gguf_file, revision)
    try:
        return AutoTokenizer.from_pretrained(location, **_where(gguf, revision))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model.path: expected a tokenizer beside the model, got {path!r}: {reason}") from error


def load_generation_config(
    path: str, gguf_file: str | None = None, revision: str | None = None
) -> "GenerationConfig | None":
    """The model's stop tokens and sampling, None where nothing beside the model says any that can be saved again."""
    from transformers import GenerationConfig

    location, gguf = resolve_model_path(path, gguf_file, revision)
    if gguf:
        return None
    try:
        found = GenerationConfig.from_pretrained(location, **_where(None, revision))
        found.validate(strict=True)  # as saving it does, which would be too late after a training
    except OSError:
        return None
    except ValueError as error:
        log.warning("the generation_config.json of %s is left out: %s", path, str(error).strip().split("\n")[0])
        return None
    return found


def resolve_device(device: str) -> torch.device:
    """``auto`` is the first GPU, or the CPU where there is none.

    Raises:
        ValueError: if a GPU is asked for and absent.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"model.device: expected 'auto', 'cpu' or 'cuda', got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "model.device: expected a GPU for 'cuda', got none that torch can see; set model.device = 'cpu'"
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def check_attention(attention: str, device: str) -> None:
    """Refuse an attention kernel that cannot work; cheap, for the driver to call before any model.

    Whether there is a GPU is not asked here: the driver may sit on a node without one.

    Raises:
        ValueError: if the name is unknown, or flash-attn is asked for and absent, or meant for a CPU.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"model.attention: expected one of {', '.join(ATTENTIONS)}, got {attention!r}")
    if attention == "flash_attention_2":
        if device == "cpu":
            raise ValueError("model.attention: expected 'sdpa' or 'eager' on a CPU, got 'flash_attention_2'")
        if importlib.util.find_spec("flash_attn") is None:
            raise ValueError(
                "model.attention: expected the package flash-attn for 'flash_attention_2', got none; "
                "pip install --no-build-isolation 'longrope2_ray[gpu]' or set model.attention = 'sdpa'"
            )


def require_loadable(
    path: str,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    attention: str = "sdpa",
    sliding_window: int | None = None,
) -> Any:
    """Refuse what could not be loaded, without loading it: dtype, kernel, and local weights that are not whole.

    Returns:
        The model's config.

    Raises:
        ValueError: with the recipe's field that mends it.
    """
    from safetensors import SafetensorError, safe_open

    if dtype not in DTYPES:
        raise ValueError(f"model.dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if attention == "flash_attention_2" and dtype == "float32":
        raise ValueError("model.dtype: expected 'bfloat16' or 'float16' with flash_attention_2, got 'float32'")
    config = read_config(path, gguf_file, revision, sliding_window)
    _check_kernel(_skeleton(config, path), attention, path)
    location, gguf = resolve_model_path(path, gguf_file, revision)
    folder = Path(location)
    if gguf or not folder.is_dir():
        return config
    files = sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("*.bin")):
        raise ValueError(f"model.path: expected weights (*.safetensors or *.bin), got {path!r}, which has none")
    for file in files:
        try:
            with safe_open(file, framework="pt"):  # its header, and that the file is as long as it says
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"model.path: expected whole weights, got {file.name} in {path!r}: {error}") from error
    return config


def load_model(
    path: str,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    attention: str = "sdpa",
    num_gpus: int = 1,
    threads: int | None = None,
    sliding_window: int | None = None,
) -> "PreTrainedModel":
    """Load a causal language model for scoring: evaluation mode, no gradients.

    Args:
        dtype: ``float32``, ``bfloat16`` or ``float16``; the rotary buffers stay float32.
        device: ``auto``, ``cpu`` or ``cuda``.
        attention: ``sdpa``, ``flash_attention_2`` or ``eager`` (the family's own, whose memory grows with T^2).
        num_gpus: above 1, the layers are spread over that many GPUs.
        threads: CPU threads of torch; sums depend on it, so fix it where results must agree to the byte.
        sliding_window: as in ``read_spec``.

    Raises:
        ValueError: if there is no such model, its weights are not whole, or this machine lacks what is asked for.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    target = resolve_device(device)
    check_attention(attention, target.type)
    config = require_loadable(
        path,
        gguf_file=gguf_file,
        revision=revision,
        dtype=dtype,
        attention=attention,
        sliding_window=sliding_window,
    )
    if num_gpus > 1 and torch.cuda.device_count() < num_gpus:
        raise ValueError(f"scorer.gpus_per_scorer: expected {num_gpus} visible GPUs, got {torch.cuda.device_count()}")
    if threads is not None:
        torch.set_num_threads(threads)
    location, gguf = resolve_model_path(path, gguf_file, revision)
    # The config goes along because parsing a GGUF's header takes seconds.
    options: dict[str, Any] = {"config": config, **_where(gguf, revision)}
    if num_gpus > 1:
        options["device_map"] = "auto"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location, dtype=DTYPES[dtype], attn_implementation=attention, output_loading_info=True, **options
        )
    except (OSError, ImportError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model.path: expected weights that can be loaded, got {path!r}: {reason}") from error
    model, info = loaded
    if info["missing_keys"]:
        # transformers would go on with random values in their place
        raise ValueError(f"model.path: expected whole weights, got {path!r} without {sorted(info['missing_keys'])[:3]}")
    if gguf:
        # The weights are dequantized by now, but the model still says it is quantized and refuses to be moved or saved.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    if num_gpus <= 1:
        model = model.to(target)
    return model.requires_grad_(False).eval()


def load_skeleton(
    path: str,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    sliding_window: int | None = None,
) -> "PreTrainedModel":
    """What ``load_model`` gives, on the meta device: no weights are read.

    Raises:
        ValueError: if there is no such model.
    """
    return _skeleton(read_config(path, gguf_file, revision, sliding_window), path, dtype)


def _check_kernel(model: "PreTrainedModel", attention: str, path: str) -> None:
    """Refuse a kernel that the family cannot use, such as sdpa where attention logits are capped (Gemma-2)."""
    supported = {
        "sdpa": bool(getattr(model, "_supports_sdpa", False)),
        "flash_attention_2": bool(getattr(model, "_supports_flash_attn", False)),
        "eager": True,
    }
    if not supported[attention]:
        possible = [name for name, fits in supported.items() if fits]
        raise ValueError(
            f"model.attention: expected one of {', '.join(possible)} for {type(model).__name__} in {path!r}, "
            f"got {attention!r}"
        )


# ------------------------------------------------------------------------------------------------- pinning factors


class PinnedRope:
    """Puts rescale factors into a loaded model's rotary buffers in place, and gives the original bits back.

    The angles become ``base^(-2i/d) / factors`` (Eq. 8), divided in float64 and stored in float32 whatever the
    model's dtype. The window never depends on the input here: what is pinned holds for every token of every call,
    unlike HF's ``longrope``, which switches on the longest position of the batch. Families that keep one buffer for
    sliding and full layers alike get the factors in both; those that keep one for each type, only in the full ones.

    Raises:
        ValueError: if the model has no rotary module that can be pinned, or its angles are not those of ``spec``.
    """

    def __init__(self, model: "PreTrainedModel", spec: ModelSpec) -> None:
        self._angles = spec.geometry.angles
        self._buffers = _rotary_buffers(model)
        if not self._buffers:
            raise ValueError(
                f"model.path: expected a rotary module with an inv_freq buffer, got none in {spec.model_type}"
            )
        for module, prefix in self._buffers:
            self._check(module, prefix)
        self._hooks: list[RemovableHandle] = []
        self._original = [
            (self._float32_buffer(module, prefix).clone(), getattr(module, f"{prefix}attention_scaling"))
            for module, prefix in self._buffers
        ]

    def pin(self, values: np.ndarray, attention_factor: float, start_tokens: int = 0) -> None:
        """Rescale every angle by ``1 / values`` and multiply cos and sin by ``attention_factor``.

        Args:
            values: (d/2,) factors, finite and positive.
            start_tokens: positions below it keep the original angles, at the same temperature (LongRoPE's ``n_hat``).

        Raises:
            ValueError: if the vector does not fit this model, or holds something else than positive numbers.
        """
        values = np.asarray(values, dtype=np.float64)
        if values.shape != self._angles.shape:
            raise ValueError(
                f"factors: expected {len(self._angles)} numbers, one per cosine dimension of this model, "
                f"got shape {values.shape}"
            )
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError("factors: expected finite positive numbers, got others among them")
        rescaled = torch.from_numpy(self._angles / values).float()
        self._unhook()
        for (module, prefix), (original, _) in zip(self._buffers, self._original, strict=True):
            self._float32_buffer(module, prefix).copy_(rescaled)
            setattr(module, f"{prefix}attention_scaling", float(attention_factor))
            if start_tokens:
                hook = partial(self._keep_start, prefix, original, start_tokens)
                self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    def restore(self) -> None:
        """Give the buffers and scalings back exactly as they were found (in float32)."""
        self._unhook()
        for (module, prefix), (buffer, scaling) in zip(self._buffers, self._original, strict=True):
            self._float32_buffer(module, prefix).copy_(buffer)
            setattr(module, f"{prefix}attention_scaling", scaling)

    @contextmanager
    def pinned(self, values: np.ndarray, attention_factor: float, start_tokens: int = 0) -> Iterator[None]:
        """Pin for the length of a ``with`` block."""
        self.pin(values, attention_factor, start_tokens)
        try:
            yield
        finally:
            self.restore()

    def _keep_start(
        self,
        prefix: str,
        original: torch.Tensor,
        start_tokens: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tables: Any,
    ) -> tuple[torch.Tensor, ...]:
        """Forward hook of a rotary module: its own cos and sin of the original angles where a sequence starts."""
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if not isinstance(tables, tuple) or positions is None:
            raise ValueError(f"search.start_tokens: expected [0] for {type(module).__name__}, whose tables are its own")
        buffer = self._float32_buffer(module, prefix)
        rescaled = buffer.clone()
        buffer.copy_(original)
        try:
            plain = module.forward(*args, **kwargs)
        finally:
            buffer.copy_(rescaled)
        kept = (positions < start_tokens)[..., None]
        return tuple(torch.where(kept.to(new.device), old, new) for old, new in zip(plain, tables, strict=True))

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _check(self, module: nn.Module, prefix: str) -> None:
        rope_type = getattr(module, "rope_type", "default")
        if isinstance(rope_type, dict):
            rope_type = rope_type["full_attention"]
        if rope_type != "default":
            # Other types recompute the buffer inside forward and would undo what is pinned.
            raise ValueError(f"model.path: expected RoPE of type 'default', got {rope_type!r}; it can't be pinned")
        found = getattr(module, f"{prefix}inv_freq").detach().double().cpu().numpy()
        # 1 % lets through what bfloat16 rounded, and nothing that is another base or another rule.
        if found.shape != self._angles.shape or not np.allclose(found, self._angles, rtol=1e-2, atol=0):
            raise ValueError(
                f"model.path: expected {len(self._angles)} angles base^(-2i/d) in the rotary module, got {len(found)} "
                "angles that follow another rule; it can't be pinned"
            )
        if not np.allclose(found, self._angles, rtol=1e-4, atol=0):
            self._float32_buffer(module, prefix).copy_(torch.from_numpy(self._angles))

    def _float32_buffer(self, module: nn.Module, prefix: str) -> torch.Tensor:
        """The module's buffer; if ``model.to(bfloat16)`` cast or rounded it, a new one from the float64 angles."""
        name = f"{prefix}inv_freq"
        buffer: torch.Tensor = getattr(module, name)
        if buffer.dtype != torch.float32:
            buffer = torch.from_numpy(self._angles).float().to(buffer.device)
            module.register_buffer(name, buffer, persistent=False)
        return buffer
