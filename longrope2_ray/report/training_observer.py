"""Progress of a training on a terminal and in the job's log."""

import json
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

from longrope2_ray.report.progress import format_seconds, progress_bar, stop_bar
from longrope2_ray.report.trainings import RECENT_STEPS, eta_seconds
from longrope2_ray.training.records import LoggedStep


class TrainObserver:
    """Observer of a training that shows each logged step as a JSON line and on a progress bar.

    Args:
        metrics: is called with each step too, such as ``report.metrics.TrainingMetrics``.
    """

    def __init__(self, metrics: Callable[[LoggedStep], None] | None = None):
        self._metrics = metrics
        self._progress, self._task = progress_bar()
        self._recent: deque[LoggedStep] = deque(maxlen=RECENT_STEPS)

    def __call__(self, step: LoggedStep) -> None:
        if self._metrics is not None:
            self._metrics(step)
        self._recent.append(step)
        eta = eta_seconds(self._recent)
        losses = {f"loss_{window}": loss for window, loss in step.window_losses.items()}
        values = {**vars(step), **losses, "eta_seconds": eta}
        del values["window_losses"]
        line = {name: _rounded(value) for name, value in values.items()}
        print(json.dumps({"event": "step", **line}), file=sys.stderr, flush=True)
        self._progress.update(
            self._task,
            description="training",
            completed=step.step,
            total=step.num_steps,
            best=f"loss {step.loss:.4g}",
            eta=f"ETA {format_seconds(eta)}",
        )

    def stop(self) -> None:
        """Leave the terminal as it was."""
        stop_bar(self._progress)


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
