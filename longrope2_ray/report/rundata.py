"""What a report tells of a run, read from its directory alone."""

import math
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longrope2_ray.report.genealogy import DescentStep, descent_steps
from longrope2_ray.report.trainings import read_steps
from longrope2_ray.rope.geometry import RopeGeometry
from longrope2_ray.search.cascade import Cascade, cascade
from longrope2_ray.search.scores import SEARCH_SET, Score, perplexity, scores_of
from longrope2_ray.search.space import Candidate
from longrope2_ray.search.status import Status, read_status
from longrope2_ray.search.winner import (
    GenerationRecord,
    Survivor,
    Winner,
    read_generations,
    read_winner,
)
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.training.records import LoggedStep


@dataclass(frozen=True)
class ClosedGeneration:
    """A closed generation, with what its newcomers cost according to the ledger.

    Attributes:
        new_ppls: id -> needle perplexity of each newcomer that was scored completely.
        units_scored: units of its newcomers that were scored.
        units_eliminated: units never scored, because racing eliminated their candidate.
        begin: Unix time of its first unit.
        end: Unix time of its last unit, or of the next generation's first.
        busy_seconds: time that scorers spent on units while it was open.
        num_scorers: scorers that worked while it was open.
    """

    record: GenerationRecord
    new_ppls: Mapping[str, float]
    units_scored: int
    units_eliminated: int
    begin: float
    end: float
    busy_seconds: float
    num_scorers: int

    @property
    def index(self) -> int:
        """The generation's number, 0 for the initial population."""
        return self.record.index

    @property
    def candidates(self) -> Sequence[Candidate]:
        """The newcomers."""
        return self.record.candidates

    @property
    def survivors(self) -> Sequence[Survivor]:
        """The best of all generations so far, best first."""
        return self.record.survivors

    @property
    def scorer_seconds(self) -> float:
        """The time that its scorers had."""
        return max(self.end - self.begin, 0.0) * self.num_scorers


@dataclass(frozen=True)
class RunData:
    """A run as its directory shows it now.

    Attributes:
        name: the recipe's name; None where neither recipe nor status is there.
        model: the model's place as the recipe names it.
        iterations: generations to search, the initial population not counted.
        methods: methods that the tables compare.
        fingerprints: fingerprints of the model and the needle sets.
        recipe_toml: text of the recipe.
        rows: the ledger's rows on the search's needles.
        target_length: target window L in tokens, 0 if it is not known.
        cascade: cheap against full-length scores.
        descent: steps of the descent; none where there is no descent.
        trainings: logged steps of each training by its name.
    """

    name: str | None
    model: str | None
    iterations: int | None
    methods: Sequence[str]
    fingerprints: Mapping[str, str]
    status: Status | None
    winner: Winner | None
    recipe_toml: str
    generations: Sequence[ClosedGeneration]
    rows: Sequence[Score]
    geometry: RopeGeometry | None
    target_length: int
    cascade: Cascade
    descent: Sequence[DescentStep]
    trainings: Mapping[str, Sequence[LoggedStep]] = field(default_factory=dict)

    @property
    def best(self) -> Survivor | None:
        """The best candidate so far, with its perplexity."""
        return self.generations[-1].survivors[0] if self.generations else None

    @property
    def ended(self) -> bool:
        """Whether nothing will change here until a command is run again."""
        # Without a search the page is written at a training's end.
        ended = self.status.ended if self.status else bool(self.trainings)
        return bool(self.winner) or ended

    @property
    def theoretical(self) -> int | None:
        """The theoretical critical dimension."""
        return self.geometry.theoretical_critical_dim if self.geometry else None

    @property
    def busy_share(self) -> float | None:
        """The share of the scorers' time that went into units, without pauses between attempts."""
        available = sum(g.scorer_seconds for g in self.generations)
        return sum(g.busy_seconds for g in self.generations) / available if available else None


def load_run(run_dir: RunDir) -> RunData:
    """Read all that a report shows.

    Raises:
        RunDirError: if another version of this tool wrote the directory.
    """
    facts = run_dir.read_json("run.json") or {}
    status, winner = read_status(run_dir), read_winner(run_dir)
    # The ledger is read after the generations, so that it has the rows of each of them.
    records = read_generations(run_dir)
    ledger = list(scores_of(run_dir).load().values())
    rows = [score for score in ledger if score.needle_set == SEARCH_SET]
    text = _recipe_toml(run_dir)
    recipe = tomllib.loads(text)
    report, known = recipe.get("report", {}), facts.get("geometry")
    return RunData(
        name=recipe.get("name") or (status.name if status else None),
        model=recipe.get("model", {}).get("path"),
        iterations=recipe.get("search", {}).get("iterations"),
        methods=_methods(winner) if winner else report.get("methods", []),
        fingerprints=winner.fingerprints if winner else facts.get("fingerprints", {}),
        status=status,
        winner=winner,
        recipe_toml=text,
        generations=_closed(records, rows, ledger, _num_samples(facts, rows)),
        rows=rows,
        geometry=_geometry(known) if known else winner.geometry if winner else None,
        target_length=facts.get("target_length") or (winner.target_length if winner else 0),
        cascade=cascade(ledger),
        descent=descent_steps(ledger),
        trainings=read_steps(run_dir),
    )


def _recipe_toml(run_dir: RunDir) -> str:
    path = run_dir.path / "recipe.toml"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _methods(winner: Winner) -> Sequence[str]:
    return tuple(dict.fromkeys(row.method for row in winner.report))


def _num_samples(facts: Mapping[str, Any], rows: Sequence[Score]) -> int:
    """Return how many samples the search's needle set has, at least as far as it was scored."""
    return int(facts.get("num_samples") or max((row.sample + 1 for row in rows), default=1))


def _geometry(body: Mapping[str, Any]) -> RopeGeometry:
    return RopeGeometry(
        body["head_dim"], body["rotary_dim"], body["rope_base"], body["original_length"]
    )


def _closed(
    records: Sequence[GenerationRecord],
    rows: Sequence[Score],
    ledger: Sequence[Score],
    num_samples: int,
) -> list[ClosedGeneration]:
    """Return the generations with their costs, oldest first.

    Args:
        rows: the ledger's rows on the search's needles.
        ledger: all rows: idle scorers take rows of the tables too, so these say who was busy.
    """
    by_id: defaultdict[str, list[Score]] = defaultdict(list)
    for row in rows:
        by_id[row.vector_id].append(row)
    generations: list[ClosedGeneration] = []
    following = math.inf
    for record in reversed(records):
        own = {candidate.id: by_id[candidate.id] for candidate in record.candidates}
        generation = _with_costs(record, own, ledger, num_samples, following)
        generations.append(generation)
        following = generation.begin
    return generations[::-1]


def _with_costs(
    record: GenerationRecord,
    own: Mapping[str, Sequence[Score]],
    ledger: Sequence[Score],
    num_samples: int,
    following: float,
) -> ClosedGeneration:
    """Return one generation with its costs.

    Args:
        own: id -> scores of each newcomer.
        following: Unix time at which the next generation began.
    """
    scored = [row for scores in own.values() for row in scores]
    # Units of a race that ended without them run on into the next generation: each second counts
    # for the generation that it falls into.
    begin = min((row.started for row in scored), default=0.0)
    end = min(max((row.started + row.seconds for row in scored), default=0.0), following)
    starts = np.array([row.started for row in ledger])
    ends = starts + np.array([row.seconds for row in ledger])
    busy = np.clip(np.minimum(ends, end) - np.maximum(starts, begin), 0, None)
    at_work = {row.scorer for row, part in zip(ledger, busy, strict=True) if part > 0}
    ppls = {id: _perplexity(scores) for id, scores in own.items() if len(scores) == num_samples}
    return ClosedGeneration(
        record=record,
        new_ppls={id: ppl for id, ppl in ppls.items() if ppl is not None},
        units_scored=len(scored),
        units_eliminated=len(own) * num_samples - len(scored),
        begin=begin,
        end=end,
        busy_seconds=float(busy.sum()),
        num_scorers=len(at_work),
    )


def _perplexity(scores: Sequence[Score]) -> float | None:
    total = math.fsum(score.nll for score in scores)
    return perplexity(total, sum(score.num_tokens for score in scores))
