"""A run as its directory tells it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from longrope2_ray.rope.geometry import RopeGeometry
from longrope2_ray.search.scores import SEARCH_SET, Score, perplexity
from longrope2_ray.storage.rundir import RunDir

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class ClosedGeneration:
    """A generation, with what its newcomers cost according to the ledger."""

    index: int
    candidates: Sequence[Mapping[str, Any]]
    survivors: Sequence[Mapping[str, Any]]
    new_ppls: Sequence[float]  # of the candidates that were scored completely
    scored: int
    raced_out: int
    begin: float  # Unix time of its first unit
    end: float  # of its last, or of the next generation's first
    busy_seconds: float
    num_scorers: int

    @property
    def scorer_seconds(self) -> float:
        """Time that its scorers had."""
        return max(self.end - self.begin, 0.0) * self.num_scorers


@dataclass(frozen=True)
class RunData:
    """A run as its directory shows it now; ``rows`` are the ledger's rows on the search's needles, ``trainings`` the logged
    steps of each training by its name."""

    facts: Mapping[str, Any]
    status: Mapping[str, Any]
    winner: Mapping[str, Any] | None
    recipe_toml: str
    generations: Sequence[ClosedGeneration]
    rows: Sequence[Score]
    geometry: RopeGeometry | None
    target_length: int
    trainings: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def recipe(self) -> Mapping[str, Any]:
        """``section.field`` -> value."""
        return self.facts.get("recipe") or {}

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The best candidate so far, with its perplexity."""
        return self.generations[-1].survivors[0] if self.generations else None

    @property
    def theoretical(self) -> int | None:
        """The theoretical critical dimension."""
        return self.geometry.theoretical_critical_dim if self.geometry else None

    @property
    def busy_share(self) -> float | None:
        """Part of the scorers' time that went into units; pauses between generations do not count."""
        room = sum(g.scorer_seconds for g in self.generations)
        return sum(g.busy_seconds for g in self.generations) / room if room else None


def load_run(run_dir: RunDir) -> RunData:
    """Everything a report needs.

    Raises:
        RunDirError: if another version of this tool wrote the directory.
    """
    facts, winner = run_dir.read_json("run.json") or {}, run_dir.winner()
    bodies = run_dir.generations()
    for _ in range(3):
        # a running search replaces segments by one: read at that moment, the ledger lacks rows and is read again
        ledger = list(run_dir.load_scores().values())
        rows = [score for score in ledger if score.needle_set == SEARCH_SET]
        if not bodies or {c["id"] for c in bodies[-1]["survivors"]} <= {
            row.vector_id for row in rows
        }:
            break
    recipe = run_dir.path / "recipe.toml"
    return RunData(
        facts=facts,
        status=run_dir.status() or {},
        winner=winner,
        recipe_toml=recipe.read_text(encoding="utf-8") if recipe.exists() else "",
        generations=_closed(
            bodies,
            rows,
            ledger,
            facts.get("num_samples") or max((r.sample + 1 for r in rows), default=1),
        ),
        rows=rows,
        geometry=_geometry(facts.get("geometry") or winner),
        target_length=facts.get("target_length") or (winner or {}).get("target_length") or 0,
        trainings=_trainings(run_dir),
    )


def _trainings(run_dir: RunDir) -> dict[str, list[dict[str, Any]]]:
    """Logged steps of every folder that holds a training, in order."""
    found = {}
    for folder in sorted(path.name for path in run_dir.path.iterdir() if path.is_dir()):
        names = run_dir.names(f"{folder}/steps")
        if rows := [row for name in names if (row := run_dir.read_or_skip(name))]:
            found[folder] = rows
    return found


def _geometry(body: Mapping[str, Any] | None) -> RopeGeometry | None:
    if body is None:
        return None
    rotary = body["rotary_dim"]
    return RopeGeometry(
        body.get("head_dim", rotary), rotary, body["rope_base"], body["original_length"]
    )


def _closed(
    bodies: Sequence[Mapping[str, Any]],
    rows: Sequence[Score],
    ledger: Sequence[Score],
    num_samples: int,
) -> list[ClosedGeneration]:
    """``rows`` are those of the search; idle scorers take rows of the tables too, so ``ledger`` says who was busy."""
    by_id: dict[str, list[Score]] = {}
    for row in rows:
        by_id.setdefault(row.vector_id, []).append(row)
    starts = np.array([row.started for row in ledger])
    ends = starts + np.array([row.seconds for row in ledger])
    generations: list[ClosedGeneration] = []
    following = math.inf
    for body in reversed(bodies):
        own = [by_id.get(candidate["id"], []) for candidate in body["candidates"]]
        scored = [row for scores in own for row in scores]
        # units of a race that ended without them run on into the next generation; a second counts where it falls
        begin = min((row.started for row in scored), default=0.0)
        end = min(max((row.started + row.seconds for row in scored), default=0.0), following)
        busy = np.clip(np.minimum(ends, end) - np.maximum(starts, begin), 0, None)
        ppls = [_perplexity(scores) for scores in own if len(scores) == num_samples]
        generations.append(
            ClosedGeneration(
                index=body["index"],
                candidates=body["candidates"],
                survivors=body["survivors"],
                new_ppls=[ppl for ppl in ppls if ppl is not None],
                scored=len(scored),
                raced_out=len(own) * num_samples - len(scored),
                begin=begin,
                end=end,
                busy_seconds=float(busy.sum()),
                num_scorers=len(
                    {row.scorer for row, part in zip(ledger, busy, strict=True) if part > 0}
                ),
            )
        )
        following = begin
    return generations[::-1]


def _perplexity(scores: Sequence[Score]) -> float | None:
    total = math.fsum(math.inf if s.nll_sum is None else s.nll_sum for s in scores)
    return perplexity(total, sum(s.num_tokens for s in scores))
