"""Loading a model, its tokenizer and its generation config."""

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longrope2_ray.model.source import resolve_model_path
from longrope2_ray.model.spec import DTYPES, _skeleton, _where, read_config

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("longrope2")


ATTENTIONS = ("sdpa", "flash_attention_2", "eager")


def load_tokenizer(
    path: str, gguf_file: str | None = None, revision: str | None = None
) -> "PreTrainedTokenizerBase":
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
        raise ValueError(
            f"model.path: expected a tokenizer beside the model, got {path!r}: {reason}"
        ) from error


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
        log.warning(
            "the generation_config.json of %s is left out: %s",
            path,
            str(error).strip().split("\n")[0],
        )
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
        raise ValueError(
            f"model.attention: expected one of {', '.join(ATTENTIONS)}, got {attention!r}"
        )
    if attention == "flash_attention_2":
        if device == "cpu":
            raise ValueError(
                "model.attention: expected 'sdpa' or 'eager' on a CPU, got 'flash_attention_2'"
            )
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
        raise ValueError(
            "model.dtype: expected 'bfloat16' or 'float16' with flash_attention_2, got 'float32'"
        )
    config = read_config(path, gguf_file, revision, sliding_window)
    _check_kernel(_skeleton(config, path), attention, path)
    location, gguf = resolve_model_path(path, gguf_file, revision)
    folder = Path(location)
    if gguf or not folder.is_dir():
        return config
    files = sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("*.bin")):
        raise ValueError(
            f"model.path: expected weights (*.safetensors or *.bin), got {path!r}, which has none"
        )
    for file in files:
        try:
            with safe_open(
                file, framework="pt"
            ):  # its header, and that the file is as long as it says
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"model.path: expected whole weights, got {file.name} in {path!r}: {error}"
            ) from error
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
        raise ValueError(
            f"scorer.gpus_per_scorer: expected {num_gpus} visible GPUs, got {torch.cuda.device_count()}"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    location, gguf = resolve_model_path(path, gguf_file, revision)
    # The config goes along because parsing a GGUF's header takes seconds.
    options: dict[str, Any] = {"config": config, **_where(gguf, revision)}
    if num_gpus > 1:
        options["device_map"] = "auto"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            output_loading_info=True,
            **options,
        )
    except (OSError, ImportError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model.path: expected weights that can be loaded, got {path!r}: {reason}"
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        # transformers would go on with random values in their place
        raise ValueError(
            f"model.path: expected whole weights, got {path!r} without {sorted(info['missing_keys'])[:3]}"
        )
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
