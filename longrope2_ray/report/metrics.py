"""A run in Ray's own metrics, which Prometheus scrapes: ``ray_longrope2_<name>{run="..."}``."""

import time
from collections import deque
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from longrope2_ray.report.trainings import RECENT_STEPS, eta_seconds
from longrope2_ray.search.status import Status
from longrope2_ray.training.records import LoggedStep

# Gauge -> its description; each is a field of Status.
SEARCH_GAUGES = {
    "generation": "Last generation that was closed",
    "iterations": "Generations in all",
    "best_ppl": "Best needle perplexity so far; while descending, of the last step's documents",
    "median_ppl": "Median needle perplexity of the survivors",
    "worst_ppl": "Worst needle perplexity of the survivors",
    "best_critical_dim": "Critical dimension of the best candidate",
    "units_done": "Units scored, of this and former attempts",
    "units_eliminated": "Units never scored because racing eliminated their candidate",
    "units_left": "Units left in this generation at most",
    "units_ahead": "Units scored for candidates that no generation has asked for yet",
    "equivalents": "Cost of the search so far, in passes of the target length by FLOPs",
    "equivalents_left": "Cost of the search that is left, as expected, in the same passes",
    "descent_step": "Steps of the descent that were taken",
    "descent_steps": "Steps of the descent in all, 0 without one",
    "unit_seconds": "Median seconds of a unit",
    "eta_seconds": "Seconds to the end, estimated",
}
# Counter -> (key of Status.faults, description); they come out as ray_longrope2_<counter>_total.
FAULT_COUNTERS = {
    "units_requeued": ("requeued", "Units that were handed out again"),
    "units_disputed": ("disputed", "Units scored again because a number was not finite"),
    "scorer_deaths": ("deaths", "Scorers that died"),
    "scorer_preemptions": ("preemptions", "Scorers that died with a preempted node"),
    "scorer_stalls": ("stalls", "Scorers that were stopped because they hung"),
}
# Gauge -> its description.
TRAINING_GAUGES = {
    "loss": "NLL per target of the global batch",
    "loss_short": "NLL per target in short segments",
    "loss_long": "NLL per target in long segments",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm before clipping",
    "tokens_per_second": "Tokens of segments per second, all workers",
    "model_tflops_per_second": "Model TFLOPs per second, all workers",
    "model_flops_utilization": "Model FLOPs as a share of the accelerators' peak",
    "eta_seconds": "Seconds to the end, estimated",
    "step": "Optimizer steps taken",
    "num_steps": "Optimizer steps in all",
    "last_step_timestamp_seconds": "Unix time at which the last logged step was seen",
    "last_checkpoint_timestamp_seconds": "Unix time since which steps are not in a checkpoint",
}


class SearchMetrics:
    """Observer of a search that exports its status.

    Args:
        run: the run's name, the tag of its metrics.
    """

    def __init__(self, run: str):
        self._tags = {"run": run}
        self._gauges = {name: _gauge(name, text) for name, text in SEARCH_GAUGES.items()}
        self._survivors = _gauge("survivors", "Survivors by critical dimension", "critical_dim")
        self._scorers = _gauge("scorers", "Scorers by state", "state")
        self._committed = _gauge(
            "last_commit_timestamp_seconds",
            "Unix time of the last commit to the ledger, or of the driver's start",
        )
        self._counters = {
            name: Counter(f"longrope2_{name}", description=text, tag_keys=("run",))
            for name, (_, text) in FAULT_COUNTERS.items()
        }
        self._counted = dict.fromkeys(FAULT_COUNTERS, 0)
        self._dims: set[str] = set()
        # The start counts as a commit: an alert also notices a driver whose first unit never comes.
        self._committed.set(time.time(), self._tags)
        # Prometheus sees no increase from nothing to 1, and inc() refuses 0.
        for counter in self._counters.values():
            counter._record(0, self._tags)

    def __call__(self, status: Status, event: str) -> None:
        for name, gauge in self._gauges.items():
            value = getattr(status, name)
            if value is not None:
                gauge.set(value, self._tags)
        # A dimension without survivors drops to 0.
        self._dims |= status.critical_dims.keys()
        for dim in self._dims:
            count = status.critical_dims.get(dim, 0)
            self._survivors.set(count, {**self._tags, "critical_dim": dim})
        for state, count in status.scorers.items():
            self._scorers.set(count, {**self._tags, "state": state})
        if status.committed_at is not None:
            self._committed.set(status.committed_at, self._tags)
        self._count(status.faults)

    def _count(self, faults: Mapping[str, int]) -> None:
        """Add what is new since the last status: its faults are running totals."""
        for name, (kind, _) in FAULT_COUNTERS.items():
            new = faults.get(kind, 0) - self._counted[name]
            if new > 0:
                self._counters[name].inc(new, self._tags)
                self._counted[name] += new


class TrainingMetrics:
    """Observer of a training that exports each logged step.

    Args:
        run: the run's name, the tag of its metrics.
        checkpoint_steps: a step beyond a multiple of it proves that the checkpoint there was
            written.
    """

    def __init__(self, run: str, checkpoint_steps: int):
        self._tags = {"run": run}
        self._gauges = {
            name: _gauge(f"train_{name}", text) for name, text in TRAINING_GAUGES.items()
        }
        self._recent: deque[LoggedStep] = deque(maxlen=RECENT_STEPS)
        self._checkpoint_steps = checkpoint_steps
        self._checkpoints: int | None = None
        # A kill before the first checkpoint would cost all that follows the start.
        self._set("last_checkpoint_timestamp_seconds", time.time())

    def __call__(self, step: LoggedStep) -> None:
        self._recent.append(step)
        values = {
            **vars(step),
            **{f"loss_{window}": loss for window, loss in step.window_losses.items()},
            "eta_seconds": eta_seconds(self._recent),
            "last_step_timestamp_seconds": time.time(),
        }
        for name in self._gauges.keys() & values.keys():
            self._set(name, values[name])
        checkpoints = (step.step - 1) // self._checkpoint_steps
        if self._checkpoints is not None and checkpoints > self._checkpoints:
            self._set("last_checkpoint_timestamp_seconds", time.time())
        self._checkpoints = checkpoints

    def _set(self, name: str, value: float | None) -> None:
        if value is not None:
            self._gauges[name].set(value, self._tags)


def _gauge(name: str, description: str, *tags: str) -> Gauge:
    return Gauge(f"longrope2_{name}", description=description, tag_keys=("run", *tags))
