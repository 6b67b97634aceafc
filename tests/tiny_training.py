"""A training in small, for tests: a tiny model, random segments of both windows, a recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import transformers
from tiny_data import manifest_of
from tiny_models import VOCABULARY, WINDOW, tiny_config, tiny_model
from tokenizers import Tokenizer, models

from longrope2_ray.data.manifest import MANIFEST
from longrope2_ray.data.packing import Segment
from longrope2_ray.data.shards import content_digest, segments_to_parquet
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.storage.rundir import RunDir

LENGTH = 96


def save_model_and_tokenizer(folder: Path) -> None:
    """A tiny Llama and a tokenizer that has a word for each token."""
    tiny_model(tiny_config("llama")).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w1", eos_token="w2"
    )
    fast.save_pretrained(folder)


def write_data(run_dir: RunDir, count: int = 8) -> None:
    """Segments as ``longrope2 data`` leaves them; random tokens, both windows."""
    rng, kinds = np.random.default_rng(0), ("short", "long")
    cuts = {"short": [0, 40, 80, LENGTH], "long": [0, LENGTH]}
    segments = [
        Segment(rng.integers(3, VOCABULARY, LENGTH), np.array(cuts[kind], dtype=np.int32), kind)
        for kind in kinds
        for _ in range(count // 2)
    ]
    (run_dir.path / "data").mkdir(parents=True, exist_ok=True)
    run_dir.write_bytes("data/segments-00000.parquet", segments_to_parquet(segments, LENGTH))
    shards = [("data/segments-00000", count // 2, count // 2)]
    manifest = manifest_of(shards, content_digest(segments), LENGTH, WINDOW)
    run_dir.write_json(MANIFEST, manifest.to_json())


def recipe_of(model_dir: str, **train: Any) -> Recipe:
    settings = {
        "factors": "yarn",
        "max_steps": 6,
        "global_batch_size": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "dtype": "float32",
        "checkpoint_steps": 2,
        "loss_chunk_tokens": 32,
        **train,
    }
    return Recipe(
        name="test",
        model={"path": model_dir, "device": "cpu"},
        search={"target_length": LENGTH},
        train=settings,
    )


def prepared_dir(folder: Path) -> Path:
    run_dir = RunDir(str(folder))
    run_dir.create()
    write_data(run_dir)
    return folder


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: row[k]
        for k in ("step", "loss", "window_losses", "num_tokens", "learning_rate", "grad_norm")
    }


def training_workers(driver_pid: int) -> list[psutil.Process]:
    """Training workers of the Ray that this driver started, and of no other."""
    children = psutil.Process(driver_pid).children(recursive=True)
    return [
        process
        for process in children
        if "TrainWorker" in process.name() + " ".join(process.cmdline())
    ]
