"""Loading a model, its tokenizer and its generation config."""

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

import torch

from longrope2_ray.model.config import read_config
from longrope2_ray.model.skeleton import DTYPES, build_skeleton
from longrope2_ray.model.source import find_model
from longrope2_ray.model.spec import shape_of_skeleton
from longrope2_ray.recipe.model import ModelSection, ModelShape

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("longrope2")


def load_tokenizer(section: ModelSection) -> "PreTrainedTokenizerBase":
    """Load the model's tokenizer.

    Raises:
        ValueError: if there is none beside the model.
    """
    from transformers import AutoTokenizer

    source = find_model(section)
    try:
        return AutoTokenizer.from_pretrained(source.location, **source.options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model.path: expected a tokenizer beside the model, got {section.path!r}: {reason}"
        ) from error


def load_generation_config(section: ModelSection) -> "GenerationConfig | None":
    """Load the model's stop tokens and sampling; None where it has none that can be saved again."""
    from transformers import GenerationConfig

    source = find_model(section)
    if source.gguf_file:
        return None
    try:
        found = GenerationConfig.from_pretrained(source.location, **source.options)
        found.validate(strict=True)  # as saving it does, which would be too late after a training
    except OSError:
        return None
    except ValueError as error:
        log.warning(
            "the generation_config.json of %s is left out: %s",
            section.path,
            str(error).strip().split("\n")[0],
        )
        return None
    return found


def resolve_device(device: str) -> torch.device:
    """Find the device of ``model.device``; ``auto`` is the first GPU, or the CPU without one.

    Raises:
        ValueError: if a GPU is asked for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "model.device: expected a GPU for 'cuda', got none that torch can see; "
            "set model.device = 'cpu'"
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def check_attention(section: ModelSection) -> None:
    """Refuse an attention kernel that cannot work; cheap, for the driver to call before any model.

    Whether there is a GPU is not asked here: the driver may sit on a node without one.

    Raises:
        ValueError: if flash-attn is asked for and absent, or meant for a CPU.
    """
    if section.attention != "flash_attention_2":
        return
    if section.device == "cpu":
        raise ValueError(
            "model.attention: expected 'sdpa' or 'eager' on a CPU, got 'flash_attention_2'"
        )
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "model.attention: expected the package flash-attn for 'flash_attention_2', got none; "
            "pip install --no-build-isolation 'longrope2_ray[gpu]' or set model.attention = 'sdpa'"
        )


def require_loadable(section: ModelSection) -> ModelShape:
    """Refuse what could not be loaded or extended, without loading it; the model's shape.

    What is checked: kernel and dtype, the config, the architecture and its RoPE, and that local
    weights are whole.

    Raises:
        ValueError: with the recipe's field that mends it.
    """
    check_attention(section)
    config = read_config(section)
    skeleton = build_skeleton(config, section)
    shape = shape_of_skeleton(skeleton, config, section)
    _check_kernel(skeleton, section)
    _require_whole_weights(section)
    return shape


def load_model(
    section: ModelSection, *, threads: int | None = None, num_gpus: int = 1
) -> "PreTrainedModel":
    """Load a causal language model for scoring: evaluation mode, no gradients.

    Args:
        section: the recipe's model section; the rotary buffers stay float32 whatever its
            ``dtype``, and the memory of ``attention = "eager"`` grows with T^2.
        threads: CPU threads of torch; sums depend on it, so fix it where results must agree to
            the byte.
        num_gpus: above 1, the layers are spread over that many GPUs.

    Raises:
        ValueError: if there is no such model, its weights are not whole, or this machine lacks
            what is asked for.
    """
    device = resolve_device(section.device)
    check_attention(section.model_copy(update={"device": device.type}))
    config = read_config(section)
    _check_kernel(build_skeleton(config, section), section)
    _require_whole_weights(section)
    if num_gpus > 1 and torch.cuda.device_count() < num_gpus:
        raise ValueError(
            f"scorer.gpus_per_scorer: expected {num_gpus} visible GPUs, "
            f"got {torch.cuda.device_count()}"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    model = _from_pretrained(section, config, spread=num_gpus > 1)
    if num_gpus <= 1:
        model = model.to(device)  # type: ignore[arg-type]  # transformers wraps it untyped
    return model.requires_grad_(False).eval()


def load_skeleton(section: ModelSection) -> "PreTrainedModel":
    """Build what ``load_model`` gives on the meta device: no weights are read.

    Raises:
        ValueError: if there is no such model.
    """
    return build_skeleton(read_config(section), section)


def _from_pretrained(section: ModelSection, config: Any, spread: bool) -> "PreTrainedModel":
    """Load the weights with transformers; ``spread`` puts the layers on all visible GPUs.

    Raises:
        ValueError: if weights are missing or torn.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    source = find_model(section)
    # The config goes along because parsing a GGUF's header takes seconds.
    options: dict[str, Any] = {"config": config, **source.options}
    if spread:
        options["device_map"] = "auto"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.location,
            dtype=DTYPES[section.dtype],
            attn_implementation=section.attention,
            output_loading_info=True,
            **options,
        )
    except (OSError, ImportError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model.path: expected weights that can be loaded, got {section.path!r}: {reason}"
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        # transformers would go on with random values in their place
        raise ValueError(
            f"model.path: expected whole weights, got {section.path!r} "
            f"without {sorted(info['missing_keys'])[:3]}"
        )
    if source.gguf_file:
        # The weights are dequantized by now, but the model still says that it is quantized and
        # refuses to be moved or saved.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model


def _check_kernel(model: "PreTrainedModel", section: ModelSection) -> None:
    """Refuse a kernel that the family cannot use (sdpa where attention logits are capped, Gemma-2).

    Raises:
        ValueError: naming the kernels that it can use, or the dtypes of flash-attn.
    """
    supported = {
        "sdpa": bool(getattr(model, "_supports_sdpa", False)),
        "flash_attention_2": bool(getattr(model, "_supports_flash_attn", False)),
        "eager": True,
    }
    if section.attention == "flash_attention_2" and section.dtype == "float32":
        raise ValueError(
            "model.dtype: expected 'bfloat16' or 'float16' with flash_attention_2, got 'float32'"
        )
    if not supported[section.attention]:
        possible = [name for name, fits in supported.items() if fits]
        raise ValueError(
            f"model.attention: expected one of {', '.join(possible)} for {type(model).__name__} "
            f"in {section.path!r}, got {section.attention!r}"
        )


def _require_whole_weights(section: ModelSection) -> None:
    """Refuse a local model whose weight files are missing or shorter than their headers say.

    Raises:
        ValueError: naming the file.
    """
    from safetensors import SafetensorError, safe_open

    source = find_model(section)
    if source.gguf_file or source.folder is None:
        return
    files = sorted(source.folder.glob("*.safetensors"))
    if not files and not any(source.folder.glob("*.bin")):
        raise ValueError(
            "model.path: expected weights (*.safetensors or *.bin), "
            f"got {section.path!r}, which has none"
        )
    for file in files:
        try:
            # opening reads the header, and compares the file's size with it
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"model.path: expected whole weights, got {file.name} in {section.path!r}: {error}"
            ) from error
