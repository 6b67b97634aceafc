"""The loop of a search: ask, score, tell, save; then the winner against the baselines on held-out needles.

Everything that the loop needs to go on after a kill is in the ledger: a resumed search asks the same questions and finds
most answers there.
"""

import logging
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

from longrope2_ray.errors import FencedError, RunDirError, StoppedError
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.recipe.sections import SearchSection
from longrope2_ray.rope.baselines import WITH_CRITICAL_DIM, baseline
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.rope.geometry import RopeGeometry
from longrope2_ray.search.comparison import content_id, report_units, rescaled_length
from longrope2_ray.search.evolution import Evolution
from longrope2_ray.search.lookahead import Ahead
from longrope2_ray.search.racing import Race
from longrope2_ray.search.scores import (
    SEARCH_SET,
    Score,
    Unit,
    _nll_of,
    perplexity,
    report_set,
    summarize,
)
from longrope2_ray.search.space import Candidate, SearchSpace, attention_factor
from longrope2_ray.search.status import STATUS_SECONDS, Observer, Status
from longrope2_ray.storage.rundir import RunDir

log = logging.getLogger("longrope2")


class Scorers(Protocol):
    """Whoever scores units: the Ray pool, or a plain function in tests."""

    def free(self) -> int:
        """How many units can be submitted now."""

    def submit(self, unit: Unit) -> None:
        """Hand a unit over; its score comes out of ``wait`` sooner or later, exactly once."""

    def wait(self) -> list[Score]:
        """Scores that have come in, after waiting a little for the first; may be empty."""

    def flush(self) -> list[Score]:
        """Scores that have come in by now, without waiting."""

    def counts(self) -> Mapping[str, int]:
        """Scorers by state: ``starting``, ``idle``, ``busy``."""

    def losses(self) -> Mapping[str, int]:
        """What went wrong and was mended since the start: ``requeued`` units, ``deaths`` of scorers, ``preemptions`` among
        them, ``stalls``, and units that were ``disputed`` because a number was not finite."""


class SearchRun:
    """One search in one run directory.

    Args:
        recipe: what to do.
        geometry: of the model.
        num_tokens: needle set -> answer tokens of each of its samples.
        run_dir: opened before.
        scorers: who computes.
        identity: of the model and the needle sets, for ``winner.json``.
        observers: called after every commit and every generation.
    """

    def __init__(
        self,
        recipe: Recipe,
        geometry: RopeGeometry,
        num_tokens: Mapping[str, Sequence[int]],
        run_dir: RunDir,
        scorers: Scorers,
        identity: Mapping[str, str],
        observers: Sequence[Observer] = (),
    ):
        self._recipe, self._geometry, self._num_tokens = recipe, geometry, num_tokens
        self._run_dir, self._scorers, self._identity, self._observers = (
            run_dir,
            scorers,
            identity,
            observers,
        )
        self._evolution = Evolution(SearchSpace.from_recipe(geometry, recipe.search), recipe.search)
        self._ledger = run_dir.load_scores()
        self._under_way: set[tuple[str, str, int]] = set()
        self._asked: set[tuple[str, str]] = set()
        self._not_asked = Counter(
            key[:2] for key in self._ledger
        )  # (vector, needle set) -> units in the ledger
        num_samples = len(num_tokens[SEARCH_SET])
        self._ahead = Ahead(
            self._evolution, recipe.search, num_samples, partial(self._known, SEARCH_SET)
        )
        self._report_ahead: deque[Unit] = deque()  # rows of the tables that idle scorers may take
        self._guessed = ""  # whose rows are in there
        self._to_commit: list[Score] = []
        self._blind: list[Observer] = []  # observers that have failed; no view is worth a search
        self._began, self._last_status = time.monotonic(), 0.0
        self._recent: deque[float] = deque(maxlen=200)
        self._units_here = 0
        self.status = Status(
            recipe.name, iterations=recipe.search.iterations, units_done=len(self._ledger)
        )

    def run(self) -> dict[str, Any]:
        """Search, compare, and write ``winner.json``; returns its content.

        If it is interrupted or cannot go on, scores that have come in by then are committed, where storage allows.
        """
        try:
            return self._run()
        except FencedError:
            raise
        except (KeyboardInterrupt, StoppedError, RunDirError) as error:
            self.status.state = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
            self._run_dir.patience_seconds = (
                0.0  # whoever asked for an end may not wait long for it
            )
            with suppress(StoppedError, RunDirError):
                if self._to_commit:  # an end in the middle of a commit: it may be whole
                    held = self._run_dir.load_scores()
                    self._to_commit = [score for score in self._to_commit if score.key not in held]
                self._to_commit += self._scorers.flush()
                self._commit()
            with suppress(StoppedError, RunDirError):
                self.status.units_done = len(self._ledger)
                self._tell_observer("end")
            raise

    def _run(self) -> dict[str, Any]:
        evolution = self._evolution
        self.status.state = "searching"
        self._queue_report(None)
        self._ask((unit.vector_id, unit.needle_set) for unit in self._report_ahead)
        while not evolution.finished:
            generation = evolution.generation
            race = self._race(generation.survivors, generation.candidates)
            self._score(race, {c.id: c.factors for c in generation.candidates}, SEARCH_SET)
            evolution.tell(race.totals)
            self._close_generation(generation.index, generation.candidates, race)
        self.status.state = "reporting"
        winner = self._winner()
        self._run_dir.require_ownership()
        self._run_dir.write_json("winner.json", winner)
        self.status.state, self.status.eta_seconds = "finished", 0.0
        self._tell_observer("end")
        return winner

    # --- scoring

    def _race(self, survivors: Sequence[Candidate], candidates: Sequence[Candidate]) -> Race:
        num_samples = len(self._num_tokens[SEARCH_SET])
        incumbents = {
            c.id: {s: self._nll(c.id, SEARCH_SET, s) for s in range(num_samples)} for c in survivors
        }  # complete, or they had not survived
        dims = {c.id: c.critical_dim for c in (*survivors, *candidates)}
        return Race(dims, [c.id for c in candidates], incumbents, num_samples, self._recipe.search)

    def _score(self, race: Race, vectors: Mapping[str, RescaleFactors], needle_set: str) -> None:
        """Feed the scorers until the race is over; every score is committed before it counts."""
        self._ask((id, needle_set) for id in vectors)
        for id in vectors:
            for sample in range(len(self._num_tokens[needle_set])):
                if (nll := self._known(needle_set, id, sample)) is not None:
                    race.add(id, sample, nll)
        while not race.finished:
            self._hand_out(self._units(race, vectors, needle_set))
            self._to_commit += self._scorers.wait()
            scores = self._commit()
            for score in scores:
                if score.needle_set == needle_set:
                    race.add(score.vector_id, score.sample, _nll_of(score))
                if score.needle_set == SEARCH_SET:
                    self._ahead.add(score.vector_id, score.sample, _nll_of(score))
            self._count(scores, race)
        self._refresh(race)

    def _commit(self) -> Sequence[Score]:
        """Scores that have come in into the ledger, on disk first."""
        self._run_dir.append_scores(self._to_commit)
        scores, self._to_commit = self._to_commit, []
        for score in scores:
            self._under_way.discard(score.key)
            if score.key not in self._ledger:
                self._ledger[score.key] = score
                if score.key[:2] not in self._asked:
                    self._not_asked[score.key[:2]] += 1
        return scores

    def _hand_out(self, units: Iterable[Unit]) -> None:
        """Give every free scorer a unit that is neither scored nor under way (from a race that ended without it)."""
        free = self._scorers.free()
        if free <= 0:
            return
        for unit in units:
            if unit.key in self._under_way or unit.key in self._ledger:
                continue
            self._under_way.add(unit.key)
            self._scorers.submit(unit)
            free -= 1
            if free == 0:
                return

    def _units(
        self, race: Race, vectors: Mapping[str, RescaleFactors], needle_set: str
    ) -> Iterator[Unit]:
        """Units in the order in which scorers should take them: the open race's, then what will be needed whoever
        survives, then what will be needed if the present order lasts."""
        while unit := race.next_unit():
            yield Unit(unit[0], needle_set, unit[1], vectors[unit[0]])
        if not self._recipe.scorer.look_ahead:
            return
        while self._report_ahead:
            yield self._report_ahead.popleft()
        if self.status.state != "searching":
            return
        for child, sample in self._ahead.units(race):
            yield Unit(child.id, SEARCH_SET, sample, child.factors)
        best = self._ahead.best
        if (
            self._evolution.generation.index == self._recipe.search.iterations
            and best
            and best.id != self._guessed
        ):
            self._guessed = best.id
            self._queue_report(best)
            while self._report_ahead:
                yield self._report_ahead.popleft()

    def _queue_report(self, winner: Candidate | None) -> None:
        """Let idle scorers take the rows of the tables."""
        for length, _, _, vector in self._comparisons(winner):
            name, id = report_set(length), content_id(vector)
            self._report_ahead.extend(
                Unit(id, name, sample, vector) for sample in range(len(self._num_tokens[name]))
            )

    def _ask(self, vectors: Iterable[tuple[str, str]]) -> None:
        """These (vector, needle set) are needed: their units are no longer ahead."""
        for vector in vectors:
            self._asked.add(vector)
            self._not_asked.pop(vector, None)

    def _nll(self, vector_id: str, needle_set: str, sample: int) -> float:
        return _nll_of(self._ledger[vector_id, needle_set, sample])

    def _known(self, needle_set: str, vector_id: str, sample: int) -> float | None:
        score = self._ledger.get((vector_id, needle_set, sample))
        return None if score is None else _nll_of(score)

    # --- what others see

    def _count(self, scores: Sequence[Score], race: Race) -> None:
        self._units_here += len(scores)
        self._recent.extend(s.seconds for s in scores)
        if scores:
            self.status.committed_at = round(time.time(), 3)
        if (now := time.monotonic()) - self._last_status >= STATUS_SECONDS:
            self._last_status = now
            self._refresh(race)
            self._tell_observer("units")

    def _refresh(self, race: Race) -> None:
        status = self.status
        status.units_done, status.units_ahead = len(self._ledger), self._not_asked.total()
        status.units_left = race.num_units_left
        status.unit_seconds = statistics.median(self._recent) if self._recent else None
        status.elapsed_seconds = time.monotonic() - self._began
        status.eta_seconds = self._eta(race)
        status.scorers, status.losses = dict(self._scorers.counts()), dict(self._scorers.losses())

    def _eta(self, race: Race) -> float | None:
        """Units that are probably left, at the pace of this process."""
        if not self._units_here:
            return None
        search, samples = self._recipe.search, len(self._num_tokens[SEARCH_SET])
        if self.status.state != "searching":
            left = float(race.num_units_left)
        else:
            generation = self._evolution.generation.index
            left = (
                race.num_units_left
                + (search.iterations - generation) * search.num_children * samples
            )
            asked = self.status.units_done - self.status.units_ahead
            left *= 1 - self.status.units_raced_out / max(self.status.units_raced_out + asked, 1)
            left += report_units(self._recipe)
        return left * self.status.elapsed_seconds / self._units_here

    def _tell_observer(self, event: str) -> None:
        self._run_dir.require_ownership()
        self._run_dir.write_json("status.json", asdict(self.status))
        for observe in self._observers:
            try:
                observe(self.status, event)
            except (
                Exception,
                SystemExit,
            ) as error:  # rich leaves a terminal that is gone by SystemExit
                if observe not in self._blind:
                    log.warning("%s: %s; the search goes on", type(error).__name__, error)
                    self._blind.append(observe)

    def _close_generation(self, index: int, candidates: Sequence[Candidate], race: Race) -> None:
        generation, tokens = self._evolution.generation, sum(self._num_tokens[SEARCH_SET])
        ppls = [perplexity(generation.totals[c.id], tokens) for c in generation.survivors]
        self._run_dir.write_generation(
            index,
            {
                "index": index,
                "candidates": [_candidate_json(c) for c in candidates],
                "survivors": [
                    {**_candidate_json(c), "nll_sum": generation.totals[c.id], "ppl": ppl}
                    for c, ppl in zip(generation.survivors, ppls, strict=True)
                ],
            },
        )
        self._run_dir.compact_scores(self._ledger.values())
        finite = [ppl for ppl in ppls if ppl is not None]
        status = self.status
        status.generation, status.best_critical_dim = index, self._evolution.best.critical_dim
        status.best_ppl = finite[0] if finite else None
        status.median_ppl, status.worst_ppl = (
            (statistics.median(finite), finite[-1]) if finite else (None, None)
        )
        dims = sorted(c.critical_dim for c in generation.survivors)
        status.critical_dims = {str(dim): dims.count(dim) for dim in dict.fromkeys(dims)}
        status.units_raced_out += race.num_units_saved
        self._tell_observer("generation")

    # --- the result

    def _comparisons(
        self, winner: Candidate | None
    ) -> list[tuple[int, float, str, RescaleFactors]]:
        """(length, attention factor, method, vector) of every row of the tables; without a winner, of those that do not
        depend on it."""
        recipe, geometry = self._recipe, self._geometry
        target, report = recipe.search.target_length, recipe.report
        ratio, original = target / geometry.original_length, geometry.original_length
        own = winner.attention_factor if winner else self._evolution.space.fixed_attention
        rows = []
        for length in report.lengths or [target]:
            settings = report.attention_factors or ["search"]
            numbers = [attention_factor(s, ratio, original) for s in settings]
            for factor in dict.fromkeys(own if n is None else n for n in numbers):
                for method in report.methods:
                    if factor is None or (winner is None and method in WITH_CRITICAL_DIM):
                        continue
                    if winner and method == "longrope2":
                        values = winner.factors.values
                        source = f"winner {winner.id}"
                        vector = RescaleFactors(
                            values, factor, winner.critical_dim, source, winner.start_tokens
                        )
                    else:
                        dim = (winner and winner.critical_dim) or None
                        temperature = 1.0 if method == "unscaled" else factor
                        vector = baseline(
                            method,
                            geometry,
                            rescaled_length(length, target, original),
                            critical_dim=dim if method in WITH_CRITICAL_DIM else None,
                            attention_factor=temperature,
                        )
                    rows.append((length, factor, method, vector))
        return rows

    def _winner(self) -> dict[str, Any]:
        best, geometry, search = self._evolution.best, self._geometry, self._recipe.search
        rows = self._comparisons(best)
        self._report_ahead.clear()
        self._queue_report(best)
        self._ask((content_id(vector), report_set(length)) for length, _, _, vector in rows)
        off = SearchSection.model_validate({**search.model_dump(), "racing": "off"})
        for length in dict.fromkeys(row[0] for row in rows):
            vectors = {content_id(v): v for at, _, _, v in rows if at == length}
            name = report_set(length)
            dims = dict.fromkeys(vectors, 0)
            self._score(
                Race(dims, list(vectors), {}, len(self._num_tokens[name]), off), vectors, name
            )
        table = [
            {
                "length": length,
                "method": method,
                "attention_factor": vector.attention_factor,
                "compared_at": factor,
                "critical_dim": vector.critical_dim,
                **self._summary(content_id(vector), report_set(length)),
            }
            for length, factor, method, vector in rows
        ]
        return {
            "method": "longrope2",
            "name": self._recipe.name,
            "factors": best.factors.values.tolist(),
            "attention_factor": best.attention_factor,
            "start_tokens": best.start_tokens,
            "critical_dim": best.critical_dim,
            "theoretical_critical_dim": geometry.theoretical_critical_dim,
            "ten_period_dim": geometry.ten_period_dim,
            "original_length": geometry.original_length,
            "target_length": search.target_length,
            "rope_base": geometry.base,
            "rotary_dim": geometry.rotary_dim,
            "candidate": _candidate_json(best),
            "search": self._summary(best.id, SEARCH_SET),
            "report": table,
            "fingerprints": dict(self._identity),
        }

    def _summary(self, vector_id: str, needle_set: str) -> dict[str, Any]:
        """Perplexity, accuracy and NLL by sample of one vector on one needle set."""
        scores = [
            self._ledger[vector_id, needle_set, s] for s in range(len(self._num_tokens[needle_set]))
        ]
        return summarize(scores)


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    return {
        "id": candidate.id,
        "critical_dim": candidate.critical_dim,
        "tail": list(candidate.tail),
        "attention_factor": candidate.attention_factor,
        "start_tokens": candidate.start_tokens,
        "parent_id": candidate.parent_id,
    }
