"""A toy search for tests: a small geometry, an analytic score, and scorers that are a plain
function."""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.rope.geometry import RopeGeometry
from longrope2_ray.search import lookahead, loop
from longrope2_ray.search.loop import SearchLoop
from longrope2_ray.search.racing import Race, Scores
from longrope2_ray.search.scores import (
    SEARCH_SET,
    NeedleSet,
    Score,
    Unit,
    UnitScore,
    report_set,
    scores_of,
)
from longrope2_ray.search.status import Observer
from longrope2_ray.storage.ledger import Ledger
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.workers.done import Done

GEOMETRY = RopeGeometry(head_dim=32, rotary_dim=32, base=10_000.0, original_length=256)
TARGET_LENGTH = 1024
NUM_SAMPLES = 4
NEEDLE_SETS = {
    name: NeedleSet(
        name,
        tuple(f"{name}/{i}" for i in range(NUM_SAMPLES)),
        (7,) * NUM_SAMPLES,
        (0.0, 0.25, 0.5, 0.75),
    )
    for name in (SEARCH_SET, *map(report_set, (TARGET_LENGTH, 2 * TARGET_LENGTH)))
}
IDENTITY = {
    "model": "toy",
    f"needles {SEARCH_SET}": "a",
    f"needles {report_set(TARGET_LENGTH)}": "b",
}

Nll = Callable[[Unit], float | None]


def toy_recipe(
    report: Mapping[str, Any] | None = None, look_ahead: bool = True, **search: Any
) -> Recipe:
    """A search of seconds over the toy, evolutionary unless its preset is the default one."""
    small = {"population_size": 12, "iterations": 3, "top_k": 4, "num_offspring": 6}
    bred = {} if search.get("preset") == "default" else {"preset": "paper", **small}
    return Recipe(
        name="toy",
        model={"path": "toy"},
        search={"target_length": TARGET_LENGTH, **bred, **search},
        needles={"num_samples": NUM_SAMPLES},
        report={"num_samples": NUM_SAMPLES, **(report or {})},
        scorer={"look_ahead": look_ahead},
    )


def toy_nll(unit: Unit) -> float:
    """Distance from an ideal vector in log factors, weighted differently by each sample; never
    negative."""
    ideal = np.concatenate([np.geomspace(1, 5, 5), np.linspace(5, 7, 11)])
    weights = np.random.default_rng(unit.sample).random(len(ideal)) * (1 + unit.sample)
    gap = np.log(unit.factors.values / ideal) ** 2
    start = 0.01 * math.sin(unit.factors.start_tokens) ** 2
    return float(weights @ gap) + (unit.factors.attention_factor - 1.1) ** 2 + start


@contextmanager
def without_racing(off: bool = True) -> Iterator[None]:
    """Let no race of a search eliminate anything: what exact racing has to be equal to."""

    def race_of_all(
        newcomers: Sequence[str], incumbents: Mapping[str, Scores], samples: int, top_k: int | None
    ) -> Race:
        return Race(newcomers, incumbents, samples, None)

    with pytest.MonkeyPatch.context() as patch:
        for module in (loop, lookahead) if off else ():
            patch.setattr(module, "Race", race_of_all)
        yield


class KilledError(Exception):
    """Stands for a driver that is killed while it waits."""


class ToyScorers:
    """The Scorers protocol over a plain function.

    Args:
        width: units in flight at most.
        shuffle: seed of the order in which units in flight complete; None is first in, first out.
        nll: what a unit scores.
        kill_after: raise ``KilledError`` from ``wait`` once so many units were scored.
        batch: how many units may come out of one ``wait``.
        stragglers: share of the units that come out only when no other is in flight.
    """

    def __init__(
        self,
        width: int = 1,
        shuffle: int | None = None,
        nll: Nll = toy_nll,
        kill_after: int | None = None,
        batch: int = 1,
        stragglers: float = 0.0,
    ):
        self._width, self._nll, self._kill_after, self._batch = width, nll, kill_after, batch
        self._stragglers = stragglers
        self._rng = None if shuffle is None else random.Random(shuffle)
        self._in_flight: list[Unit] = []
        self.submitted: Counter[tuple[str, str]] = Counter()
        self.submitted_after: dict[tuple[str, str], int] = {}  # how many units had been scored
        self.scored: list[tuple[str, str]] = []

    def free(self) -> int:
        return self._width - len(self._in_flight)

    def submit(self, work: Unit) -> None:
        unit = work
        assert self.free() > 0, "submitted more than free() allows"
        self._in_flight.append(unit)
        self.submitted[unit.key] += 1
        self.submitted_after[unit.key] = len(self.scored)

    def wait(self) -> list[Done[Unit, UnitScore]]:
        if self._kill_after is not None and len(self.scored) >= self._kill_after:
            raise KilledError
        assert self._in_flight, "waiting although nothing is under way"
        count = 1 if self._rng is None else self._rng.randint(1, self._batch)
        return [self._complete() for _ in range(min(count, len(self._in_flight)))]

    def counts(self) -> Mapping[str, int]:
        return {"busy": len(self._in_flight), "idle": self.free()}

    def flush(self) -> list[Done[Unit, UnitScore]]:
        return []

    def faults(self) -> Mapping[str, int]:
        return {}

    def _complete(self) -> Done[Unit, UnitScore]:
        ready = [unit for unit in self._in_flight if not self._straggles(unit)] or self._in_flight
        unit = ready[0 if self._rng is None else self._rng.randrange(len(ready))]
        self._in_flight.remove(unit)
        nll = self._nll(unit)
        self.scored.append(unit.key)
        number = math.nan if nll is None else nll
        score = UnitScore(number, 7, bool(number < 0.5), 0.01 * len(self.scored))
        return Done(unit, score, "toy")

    def _straggles(self, unit: Unit) -> bool:
        return random.Random(repr(unit.key)).random() < self._stragglers


def toy_run(
    recipe: Recipe, run_dir: RunDir, scorers: ToyScorers, observers: Sequence[Observer] = ()
) -> SearchLoop:
    """A search run over the toy; a second one on the same directory resumes the first."""
    run_dir.create()
    return SearchLoop(recipe, GEOMETRY, NEEDLE_SETS, run_dir, scorers, IDENTITY, observers)


def ledger_of(run_dir: RunDir) -> Ledger[Score]:
    """What a run has committed, as a fresh process reads it."""
    return scores_of(RunDir(run_dir.url)).load()


def result_bytes(run_dir: RunDir) -> dict[str, bytes]:
    """What may not depend on who scored, in which order: the winner and every generation."""
    names = ["winner.json", *run_dir.names("generations")]
    return {name: bytes((run_dir.path / name).read_bytes()) for name in names}
