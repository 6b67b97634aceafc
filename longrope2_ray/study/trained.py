"""The held-out needles of a trial's trained model, in the training's folder."""

from collections.abc import Mapping

import numpy as np

from longrope2_ray.recipe.model import ModelShape
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.search.preparation import Prepared, prepare
from longrope2_ray.search.scores import NeedleSummary, report_set
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.study.preparation import TRAINED_FILE, PreparedTrial
from longrope2_ray.training.records import Trained, TrainingResult, training_dir


def prepare_trained(job: PreparedTrial, trained: Trained) -> Prepared:
    """Return the inputs of scoring the trained model of a trial on its report's needles."""
    recipe = job.trial.recipe
    model = recipe.model.model_copy(update={"path": trained.model})
    return prepare(recipe.model_copy(update={"model": model}))


def window_factors(
    result: TrainingResult, shape: ModelShape, lengths: list[int]
) -> dict[str, RescaleFactors]:
    """Return needle set -> the RoPE that the trained model serves a prompt of that length with.

    After mixed training it is the original one up to L0, else what it was trained with.
    """
    original = RescaleFactors(np.ones_like(result.factors.values), source="unscaled")
    short = shape.original_length if result.mixed else 0
    return {
        report_set(length): original if length <= short else result.factors for length in lengths
    }


def write_trained(job: PreparedTrial, needles: Mapping[str, NeedleSummary]) -> None:
    """Write the scores of a trained model, with the fingerprints of what was scored."""
    folder = training_dir(job.trial.recipe, RunDir(job.url))
    body = {name: summary.to_json() for name, summary in needles.items()}
    folder.write_json(TRAINED_FILE, {"fingerprints": job.report_fingerprints, "needles": body})


def read_trained(job: PreparedTrial) -> dict[str, NeedleSummary]:
    """Read the scores of a trained model by needle set; empty without any."""
    folder = training_dir(job.trial.recipe, RunDir(job.url))
    body = folder.read_or_skip(TRAINED_FILE) or {}
    return {name: NeedleSummary.from_json(row) for name, row in body.get("needles", {}).items()}
