"""An extended model as a directory that transformers loads: config, weights, tokenizer."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longrope2_ray.export.config import extended_config
from longrope2_ray.model.config import read_config
from longrope2_ray.model.loading import load_generation_config, load_tokenizer
from longrope2_ray.model.skeleton import DTYPES
from longrope2_ray.recipe.model import ModelSection, ModelShape
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.storage.rundir import RunDir

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase


def write_model(
    run_dir: RunDir,
    folder: str,
    model: ModelSection,
    shape: ModelShape,
    factors: RescaleFactors,
    weights: dict[str, torch.Tensor],
    *,
    target_length: int,
    mixed: bool,
    default_dtype: str,
) -> None:
    """Write an extended model into a folder of a run directory, its ``config.json`` last.

    Nothing loads a model directory without a config, so a model that is there is whole.

    Args:
        run_dir: the run directory.
        folder: the model's folder in it.
        model: the recipe's model section, which names the base model.
        shape: the base model's shape.
        factors: the long window's rescale factors.
        weights: all weights under transformers' names; emptied, so as not to hold them twice.
        target_length: the long window in tokens.
        mixed: whether short inputs were trained under the original RoPE.
        default_dtype: type of the weights on disk where the base model's config names none.

    Raises:
        RunDirError: if there is no space or no permission.
    """
    config = read_config(model)
    dtype_name = str(getattr(config, "dtype", None)).removeprefix("torch.")
    dtype = DTYPES.get(dtype_name, DTYPES[default_dtype])
    config = extended_config(config, shape, factors, target_length, mixed)
    (run_dir.path / folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as local:
        tokenizer = load_tokenizer(model)
        generation = load_generation_config(model)
        save_extended(Path(local), config, weights, tokenizer, dtype, generation)
        for path in sorted(Path(local).iterdir(), key=lambda path: path.name == "config.json"):
            run_dir.write_bytes(f"{folder}/{path.name}", path.read_bytes())


def save_extended(
    folder: Path,
    config: "PreTrainedConfig",
    weights: dict[str, torch.Tensor],
    tokenizer: "PreTrainedTokenizerBase",
    dtype: torch.dtype,
    generation: "GenerationConfig | None" = None,
) -> None:
    """Write a local model directory that transformers loads.

    Args:
        folder: the directory, which is made if it is not there.
        config: the extended model's config.
        weights: all weights under transformers' names; emptied, so as not to hold them twice.
        tokenizer: the base model's tokenizer; its maximum length becomes the config's.
        dtype: type of the weights on disk.
        generation: the base model's generation config, where it has one: its stop tokens and how
            it samples.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(
        {name: weights.pop(name).to(dtype) for name in list(weights)}, assign=True
    )
    model.tie_weights()
    if generation is not None:
        model.generation_config = generation
    model.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.model_max_length = config.get_text_config().max_position_embeddings
    tokenizer.save_pretrained(folder)
