"""Training steps, a whole search and a whole training on one GPU; on the CPU in the default run."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from reference_inputs import DEVICES
from tiny_models import VOCABULARY, shape_of, some_factors, tiny_config, tiny_model
from tiny_training import LENGTH, prepared_dir, recipe_of, without_times

from longrope2_ray.data.packing import Segment
from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.recipe.training import TrainSection
from longrope2_ray.search.job import search
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.training.checkpoints import CheckpointStore
from longrope2_ray.training.job import train
from longrope2_ray.training.records import training_dir
from longrope2_ray.training.step import MixedTrainer

# ------------------------------------------------------------------------------------ training step


@contextmanager
def process_group(device: str, store: Path) -> Iterator[None]:
    """A group of this process alone."""
    if device == "cuda":
        torch.cuda.set_device(0)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def segments() -> list[Segment]:
    rng = np.random.default_rng(0)
    cuts = {"short": [0, 30, 61, LENGTH], "long": [0, LENGTH]}
    return [
        Segment(rng.integers(3, VOCABULARY, LENGTH), np.array(bounds, dtype=np.int32), window)
        for window, bounds in cuts.items()
    ]


def stepped(
    device: str, store: Path, family: str, dtype: str = "float32"
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of one step, and the gradients that it took, on the CPU."""
    model = tiny_model(tiny_config(family))
    shape = shape_of(model)
    settings = TrainSection(
        dtype=dtype, global_batch_size=2, learning_rate=1e-3, loss_chunk_tokens=32
    )
    with process_group(device, store):
        trainer = MixedTrainer(
            model, shape, some_factors(shape, 1.1), settings, 6, device=torch.device(device)
        )
        loss = trainer.step(0, segments()).loss
        grads = {
            name: parameter.grad.full_tensor().cpu()
            for name, parameter in trainer._loss.named_parameters()
        }
        assert all(parameter.device.type == device for parameter in trainer._loss.parameters())
    return loss, grads


# bfloat16 rounds weights and activations by up to 2^-9 in each of three layers.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.1)])
@pytest.mark.parametrize("family", ["llama", "mistral_windowed"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_steps_loss_and_gradients_are_those_of_the_cpu(
    tmp_path: Path, device: str, family: str, dtype: str, tolerance: float
) -> None:
    wanted, exact = stepped("cpu", tmp_path / "here", family)
    loss, grads = stepped(device, tmp_path / "there", family, dtype)
    assert loss == pytest.approx(wanted, rel=1e-5 if dtype == "float32" else 2e-2)
    assert set(grads) == set(exact)
    norm = float(sum(grad.square().sum() for grad in exact.values())) ** 0.5
    off = float(sum((grads[name] - exact[name]).square().sum() for name in exact)) ** 0.5
    assert off <= tolerance * norm


# --------------------------------------------------------------------------------------- whole jobs

SEARCH = (
    "--search.population-size", "9", "--search.top-k", "2", "--search.num-offspring", "2",
    "--search.iterations", "1", "--search.target-length", "512", "--needles.num-samples", "2",
    "--report.num-samples", "2", "--report.depth", "[0.0, 1.0]",
    "--report.methods", '["yarn", "longrope2"]',
)  # fmt: skip


def winner_of(run_dir: Path, device: str, num_scorers: int) -> bytes:
    words = ["--model.device", device, "--scorer.num-scorers", str(num_scorers)]
    share = ["--scorer.gpus-per-scorer", "0.5"] if device == "cuda" else []
    search(load_recipe("debug", [*SEARCH, *words, *share]), str(run_dir))
    return (run_dir / "winner.json").read_bytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("ray_on_this_machine")
def test_a_search_has_the_same_winner_with_one_scorer_and_two(tmp_path: Path, device: str) -> None:
    """On a GPU the two share it."""
    two, one = (winner_of(tmp_path / str(count), device, count) for count in (2, 1))
    assert one == two


# On a CPU ``tests/training`` trains and kills the same in the default run.
KINDS = [("cpu", "long"), ("cuda", "gpu")]


def on(device: str, recipe: Recipe) -> Recipe:
    model = recipe.model.model_copy(update={"device": device})
    return recipe.model_copy(update={"model": model})


def steps_of(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """Train, or go on, to the end; the steps as their files tell them."""
    train(recipe, str(folder))
    files = training_dir(recipe, RunDir(str(folder)))
    return [without_times(files.read_json(name)) for name in files.names("steps")]


def interrupt(folder: Path) -> None:
    """Leave of a training what a kill after the first checkpoint that is kept leaves."""
    place = folder / "train"
    *newer, _ = CheckpointStore(str(place), 0.0).found()
    assert newer
    for path in [place / "model", *map(Path, newer)]:
        shutil.rmtree(path)
    for path in [place / "result.json", *sorted((place / "steps").iterdir())[-1:]]:
        path.unlink()


@pytest.mark.parametrize(
    "device", [pytest.param(name, marks=getattr(pytest.mark, kind)) for name, kind in KINDS]
)
@pytest.mark.usefixtures("ray_on_this_machine")
def test_a_resumed_training_ends_as_an_undisturbed_one(
    tmp_path: Path, model_dir: str, device: str
) -> None:
    """Bit for bit on a CPU; on a GPU sums of gradients may come in another order."""
    recipe = on(device, recipe_of(model_dir, max_steps=6, num_workers=1))
    folder = prepared_dir(tmp_path / "run")
    whole = steps_of(recipe, folder)
    assert whole[-1]["step"] == 6
    interrupt(folder)
    resumed = steps_of(recipe, folder)
    assert len(resumed) == len(whole)
    tolerance = 1e-5 if device == "cuda" else 0.0
    for one, other in zip(resumed, whole, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=tolerance, abs=0)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=100 * tolerance, abs=0)
