"""A training's steps for others to see."""

import json
import sys
import time

import numpy as np

from longrope2_ray.training.job import Row

GAUGES = {
    "loss": "NLL per target of the global batch",
    "loss_short": "The same in short segments",
    "loss_long": "The same in long segments",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm before clipping",
    "tokens_per_second": "Tokens of segments per second, all workers",
    "model_tflops_per_second": "Model TFLOPs per second, all workers",
    "model_flops_utilisation": "Model FLOPs in units of the accelerators' peak",
    "eta_seconds": "Seconds to the end, estimated",
    "step": "Optimizer steps taken",
    "num_steps": "Optimizer steps in all",
    "last_step_timestamp_seconds": "Unix time at which the last logged step was seen",
    "last_checkpoint_timestamp_seconds": "Unix time since which steps are not in a checkpoint",
}


class TrainObserver:
    """Every logged step as a JSON line, as Ray metrics, and as a progress bar on a terminal.

    Args:
        run: its name, the tag of its metrics.
        checkpoint_steps: a step beyond a multiple of it proves that the checkpoint there was written.
    """

    def __init__(self, run: str, checkpoint_steps: int) -> None:
        from ray.util.metrics import Gauge

        from longrope2_ray.report.progress import progress_bar

        self._tags = {"run": run}
        self._gauges = {
            n: Gauge(f"longrope2_train_{n}", description=d, tag_keys=("run",))
            for n, d in GAUGES.items()
        }
        self._progress, self._task = progress_bar()
        self._seconds: list[float] = []
        self._checkpoint_steps = checkpoint_steps
        self._checkpoints: int | None = None
        self._gauges["last_checkpoint_timestamp_seconds"].set(
            time.time(), self._tags
        )  # a kill would cost what follows

    def __call__(self, row: Row) -> None:
        from longrope2_ray.report.progress import format_seconds

        self._seconds = [*self._seconds, row["seconds"]][-20:]
        eta = float(np.median(self._seconds)) * (row["num_steps"] - row["step"])
        losses = {f"loss_{window}": loss for window, loss in row["window_losses"].items()}
        values = {**row, **losses, "eta_seconds": eta}
        for name, gauge in self._gauges.items():
            if values.get(name) is not None:
                gauge.set(values[name], self._tags)
        self._gauges["last_step_timestamp_seconds"].set(time.time(), self._tags)
        checkpoints = (row["step"] - 1) // self._checkpoint_steps
        if self._checkpoints is not None and checkpoints > self._checkpoints:
            self._gauges["last_checkpoint_timestamp_seconds"].set(time.time(), self._tags)
        self._checkpoints = checkpoints
        line = {
            k: float(f"{v:.5g}") if isinstance(v, float) else v
            for k, v in values.items()
            if k != "window_losses"
        }
        print(json.dumps({"event": "step", **line}), file=sys.stderr, flush=True)
        self._progress.update(
            self._task,
            description="training",
            completed=row["step"],
            total=row["num_steps"],
            best=f"loss {row['loss']:.4g}",
            eta=f"ETA {format_seconds(eta)}",
        )

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()
