"""Where a run stands, for others to see: Ray metrics, the job's log, a progress bar on a terminal.

Metrics come from the driver only: a gauge vanishes with its process, and scorers come and go.
"""

import json
import logging
import sys
import time
from dataclasses import asdict
from typing import Any

from longrope2_ray.search import Status

log = logging.getLogger("longrope2")

GAUGES = {
    "generation": "Last generation that was closed",
    "iterations": "Generations in all",
    "best_ppl": "Best needle perplexity so far",
    "median_ppl": "Median needle perplexity of the survivors",
    "worst_ppl": "Worst needle perplexity of the survivors",
    "best_critical_dim": "Critical dimension of the best candidate",
    "units_done": "Units scored, of this and former attempts",
    "units_raced_out": "Units never scored because their candidate was stopped",
    "units_left": "Units left in this generation at most",
    "units_ahead": "Units scored for candidates that no generation has asked for yet",
    "unit_seconds": "Median seconds of a unit",
    "eta_seconds": "Seconds to the end, estimated",
}

COUNTERS = {  # metric -> (key of Status.losses, description); they come out as ray_longrope2_<metric>_total
    "units_requeued": ("requeued", "Units that were handed out again"),
    "units_disputed": ("disputed", "Units scored again because a number was not finite"),
    "scorer_deaths": ("deaths", "Scorers that died"),
    "scorer_preemptions": ("preemptions", "Scorers that went with a preempted node, among the deaths"),
    "scorer_stalls": ("stalls", "Scorers that were stopped because they hung"),
}


class RayMetrics:
    """The run in Ray's own metrics: ``ray_longrope2_<name>{run="..."}``."""

    def __init__(self, run: str):
        from ray.util.metrics import Counter, Gauge

        def gauge(name: str, description: str, *tags: str) -> Gauge:
            return Gauge(f"longrope2_{name}", description=description, tag_keys=("run", *tags))

        self._tags = {"run": run}
        self._gauges = {name: gauge(name, description) for name, description in GAUGES.items()}
        self._survivors = gauge("survivors", "Survivors by critical dimension", "critical_dim")
        self._scorers = gauge("scorers", "Scorers by state", "state")
        self._committed = gauge(
            "last_commit_timestamp_seconds", "Unix time of the last commit to the ledger, or of the driver's start"
        )
        self._counters = {
            name: Counter(f"longrope2_{name}", description=description, tag_keys=("run",))
            for name, (_, description) in COUNTERS.items()
        }
        self._counted = dict.fromkeys(COUNTERS, 0)
        self._dims: set[str] = set()
        self._committed.set(time.time(), self._tags)  # a driver whose first unit never comes is told by it too
        for counter in self._counters.values():
            counter._record(0, self._tags)  # inc refuses 0, and Prometheus sees no increase from nothing to 1

    def __call__(self, status: Status, event: str) -> None:
        for name, gauge in self._gauges.items():
            value = getattr(status, name)
            if value is not None:
                gauge.set(value, self._tags)
        self._dims |= status.critical_dims.keys()
        for dim in self._dims:  # one that died out drops to 0
            self._survivors.set(status.critical_dims.get(dim, 0), {**self._tags, "critical_dim": dim})
        for state, count in status.scorers.items():
            self._scorers.set(count, {**self._tags, "state": state})
        if status.committed_at is not None:
            self._committed.set(status.committed_at, self._tags)
        for name, (loss, _) in COUNTERS.items():
            new = status.losses.get(loss, 0) - self._counted[name]
            if new > 0:
                self._counters[name].inc(new, self._tags)
                self._counted[name] += new


def log_generation(status: Status, event: str) -> None:
    """One JSON line a generation in the job's log; a terminal has the bar, and status.json the same."""
    if event != "units" and not sys.stderr.isatty():
        print(json.dumps({"event": event, **_rounded(asdict(status))}), file=sys.stderr, flush=True)


def progress_bar() -> tuple[Any, Any]:
    """A bar on a terminal, silent elsewhere, and its one task; fields ``best`` and ``eta``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[best]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[eta]}"),
        console=Console(stderr=True),
    )
    task = progress.add_task("starting", total=None, best="", eta="")
    if sys.stderr.isatty():
        progress.start()
    return progress, task


class ProgressBar:
    """Generations, units, the best so far and the ETA of a search."""

    def __init__(self) -> None:
        self._progress, self._task = progress_bar()

    def __call__(self, status: Status, event: str) -> None:
        best = f"best {status.best_ppl:.4g} at d_rcd {status.best_critical_dim}" if status.best_ppl else ""
        eta = f"ETA {format_seconds(status.eta_seconds)}" if status.eta_seconds else ""
        self._progress.update(
            self._task,
            description=f"{status.state}, {status.units_done} units",
            completed=status.generation,
            total=status.iterations,
            best=best,
            eta=eta,
        )

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()


def format_seconds(seconds: float | None) -> str:
    """``1:02:03`` or ``2:03``."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
