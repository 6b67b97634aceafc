""""""

import time

from longrope2_ray.search.status import Status

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
    "scorer_preemptions": (
        "preemptions",
        "Scorers that went with a preempted node, among the deaths",
    ),
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
            "last_commit_timestamp_seconds",
            "Unix time of the last commit to the ledger, or of the driver's start",
        )
        self._counters = {
            name: Counter(f"longrope2_{name}", description=description, tag_keys=("run",))
            for name, (_, description) in COUNTERS.items()
        }
        self._counted = dict.fromkeys(COUNTERS, 0)
        self._dims: set[str] = set()
        self._committed.set(
            time.time(), self._tags
        )  # a driver whose first unit never comes is told by it too
        for counter in self._counters.values():
            counter._record(
                0, self._tags
            )  # inc refuses 0, and Prometheus sees no increase from nothing to 1

    def __call__(self, status: Status, event: str) -> None:
        for name, gauge in self._gauges.items():
            value = getattr(status, name)
            if value is not None:
                gauge.set(value, self._tags)
        self._dims |= status.critical_dims.keys()
        for dim in self._dims:  # one that died out drops to 0
            self._survivors.set(
                status.critical_dims.get(dim, 0), {**self._tags, "critical_dim": dim}
            )
        for state, count in status.scorers.items():
            self._scorers.set(count, {**self._tags, "state": state})
        if status.committed_at is not None:
            self._committed.set(status.committed_at, self._tags)
        for name, (loss, _) in COUNTERS.items():
            new = status.losses.get(loss, 0) - self._counted[name]
            if new > 0:
                self._counters[name].inc(new, self._tags)
                self._counted[name] += new
