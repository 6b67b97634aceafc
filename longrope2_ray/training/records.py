"""The records of a training: its job, the steps that are logged, its result, why it stopped."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from longrope2_ray.recipe.model import ModelShape
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.storage.rundir import RunDir

MODEL_FOLDER = "model"  # of the trained model, in the training's folder


@dataclass(frozen=True)
class TrainingJob:
    """All that a worker needs; small, and the same for every worker.

    Attributes:
        recipe: the run's recipe.
        shape: the model's shape.
        factors: the long window's rescale factors.
        num_steps: optimizer steps in all.
        num_segments: segments of the training data.
        fingerprints: fingerprints of model, data and factors.
        url: the run directory's absolute path or URL.
        claim: the driver's claim on the training's folder, new for each command. A newer one
            ends this job's workers; what stopped a former one does not stop this one.
    """

    recipe: Recipe
    shape: ModelShape
    factors: RescaleFactors
    num_steps: int
    num_segments: int
    fingerprints: Mapping[str, str]
    url: str
    claim: str | None = None

    @property
    def folder(self) -> str:
        """The name of the training's folder in the run directory."""
        return self.recipe.train.name


@dataclass(frozen=True)
class StepResult:
    """The outcome of one optimizer step, over all ranks.

    Attributes:
        loss: NLL per target of the global batch, in nats.
        window_losses: the same for each window (``short``, ``long``) that the batch had.
        num_tokens: targets of the global batch.
        num_positions: tokens of the global batch.
        num_pairs: (query, key) pairs in the global batch's causal attention.
        grad_norm: norm of the gradient before it is clipped.
        learning_rate: learning rate of the step.
    """

    loss: float
    window_losses: dict[str, float]
    num_tokens: int
    num_positions: int
    num_pairs: float
    grad_norm: float
    learning_rate: float


@dataclass(frozen=True)
class LoggedStep(StepResult):
    """One step as it is logged in ``steps/0000012.json``: its outcome, its place, its speed.

    Attributes:
        step: optimizer steps taken so far, this one among them.
        num_steps: optimizer steps in all.
        seconds: wall time of the step.
        tokens_per_second: tokens per second, all workers together.
        model_tflops_per_second: 10^12 floating-point operations of the model per second, all
            workers together; recomputed activations do not count.
        model_flops_utilization: the same as a share of the accelerators' peak; None where the
            peak is not known.
    """

    step: int
    num_steps: int
    seconds: float
    tokens_per_second: float
    model_tflops_per_second: float
    model_flops_utilization: float | None

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "LoggedStep":
        """Read a step from the content of its file.

        Raises:
            TypeError: if a field is missing, or is one too many.
        """
        return cls(**body)

    def to_json(self) -> dict[str, Any]:
        """Return the content of the step's file."""
        return asdict(self)


@dataclass(frozen=True)
class TrainingResult:
    """The result of a finished training, as ``result.json`` holds it.

    Attributes:
        step: optimizer steps taken.
        loss: the last step's NLL per target, in nats.
        window_losses: the same for each window that the last step's batch had.
        num_tokens: targets of the last step's batch.
        factors: the long window's rescale factors.
        mixed: whether short segments were trained under the original RoPE.
    """

    step: int
    loss: float
    window_losses: dict[str, float]
    num_tokens: int
    factors: RescaleFactors
    mixed: bool

    @classmethod
    def of(cls, job: TrainingJob, last: LoggedStep) -> "TrainingResult":
        """Return the result of a job whose last step is ``last``."""
        return cls(
            step=last.step,
            loss=last.loss,
            window_losses=last.window_losses,
            num_tokens=last.num_tokens,
            factors=job.factors,
            mixed=job.recipe.train.mixed,
        )

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "TrainingResult":
        """Read a result from the content of ``result.json``.

        Raises:
            KeyError: if a field is missing.
            ValueError: if the factors are none.
        """
        return cls(
            step=body["step"],
            loss=body["loss"],
            window_losses=body["window_losses"],
            num_tokens=body["num_tokens"],
            factors=RescaleFactors(
                np.array(body["factors"]), body["attention_factor"], source=body["source"]
            ),
            mixed=body["mixed"],
        )

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``result.json``."""
        return {
            "step": self.step,
            "loss": self.loss,
            "window_losses": self.window_losses,
            "num_tokens": self.num_tokens,
            "factors": self.factors.values.tolist(),
            "source": self.factors.source,
            "attention_factor": self.factors.attention_factor,
            "mixed": self.mixed,
        }


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        model: path or URL of the trained model's directory, which ``load_model`` reads.
        result: loss of the last step, and the factors that the model was trained under.
    """

    model: str
    result: TrainingResult


def training_dir(recipe: Recipe, run_dir: RunDir) -> RunDir:
    """Return the training's own folder in the run directory, named by ``train.name``."""
    return RunDir(str(run_dir.path / recipe.train.name))


def write_step(train_dir: RunDir, logged: LoggedStep) -> None:
    """Write a logged step to a file of its own."""
    train_dir.write_json(f"steps/{logged.step:07d}.json", logged.to_json())


def read_step(train_dir: RunDir, step: int) -> LoggedStep | None:
    """Read a logged step, None if it was not logged."""
    body = train_dir.read_or_skip(f"steps/{step:07d}.json")
    return None if body is None else LoggedStep.from_json(body)


def write_result(train_dir: RunDir, result: TrainingResult) -> None:
    """Write ``result.json``: the training is finished."""
    train_dir.write_json("result.json", result.to_json())


def read_result(train_dir: RunDir) -> TrainingResult | None:
    """Read the result of a finished training, None if it has not ended."""
    body = train_dir.read_or_skip("result.json")
    return None if body is None else TrainingResult.from_json(body)


def write_stop(train_dir: RunDir, message: str) -> None:
    """Write to ``stop.json`` why the command whose claim ``train_dir`` holds cannot go on."""
    train_dir.write_json("stop.json", {"claim": train_dir.claim, "message": message})


def stop_message(train_dir: RunDir) -> str | None:
    """Return why the command whose claim ``train_dir`` holds cannot go on, None if it can.

    What stopped an earlier command on the same folder does not count.
    """
    stop = train_dir.read_or_skip("stop.json")
    if stop is None or stop.get("claim") != train_dir.claim:
        return None
    return str(stop["message"])
