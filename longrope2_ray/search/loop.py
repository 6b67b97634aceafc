"""The loop of a search: ask, score, tell, record; then compare the winner with the baselines.

All that the loop needs to go on after a kill is in the ledger: a resumed search asks for the same
units and finds most of their scores there.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from longrope2_ray.errors import FencedError, RunDirError, StoppedError
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.rope.geometry import RopeGeometry
from longrope2_ray.search.comparison import Comparison, comparisons
from longrope2_ray.search.evolution import Evolution
from longrope2_ray.search.lookahead import IdleWork
from longrope2_ray.search.proposing import Proposer, num_raced
from longrope2_ray.search.racing import Race, race_of_all
from longrope2_ray.search.scheduling import Scheduler, Scorers
from longrope2_ray.search.scores import (
    SEARCH_SET,
    WIDE_SET,
    NeedleSet,
    Score,
    descent_set,
    perplexity,
    scores_of,
)
from longrope2_ray.search.space import Candidate, SearchSpace
from longrope2_ray.search.status import Observer, Status, StatusBoard
from longrope2_ray.search.winner import (
    GenerationRecord,
    Survivor,
    Winner,
    write_generation,
    write_winner,
)
from longrope2_ray.storage.rundir import RunDir


class SearchLoop:
    """One search in one run directory.

    Args:
        recipe: the recipe of the run.
        geometry: the RoPE geometry of the model.
        needle_sets: the needle sets of the search and of the tables, by name.
        run_dir: the run directory, opened before.
        scorers: the scorers of its units.
        fingerprints: fingerprints of the model and the needle sets, for ``winner.json``.
        observers: called after commits and after every generation.
    """

    def __init__(
        self,
        recipe: Recipe,
        geometry: RopeGeometry,
        needle_sets: Mapping[str, NeedleSet],
        run_dir: RunDir,
        scorers: Scorers,
        fingerprints: Mapping[str, str],
        observers: Sequence[Observer] = (),
    ):
        self._recipe = recipe
        self._geometry = geometry
        self._needle_sets = needle_sets
        self._run_dir = run_dir
        self._scorers = scorers
        self._fingerprints = fingerprints
        self._space = SearchSpace.from_recipe(geometry, recipe.search)
        self._evolution = Evolution(self._space, recipe.search)
        self._ledger = scores_of(run_dir).load()
        self._scheduler = Scheduler(scorers, self._ledger, needle_sets, self._committed)
        self._num_samples = len(needle_sets[SEARCH_SET])
        self._open_set = SEARCH_SET
        self._idle_work = IdleWork(
            self._evolution,
            self._scheduler,
            needle_sets,
            self._comparisons,
            enabled=recipe.scorer.look_ahead,
        )
        self.status = Status.of(recipe.name, recipe.search, len(self._ledger))
        self._board = StatusBoard(self.status, run_dir, observers, needle_sets)
        self._board.found(self._ledger.values())

    def run(self) -> Winner:
        """Run the search to its end, write ``winner.json``, and return the winner.

        If it is interrupted or cannot go on, scores that have come in by then are committed, where
        storage allows.

        Raises:
            FencedError: if a newer driver owns the run directory.
            StoppedError: if the search cannot go on.
        """
        try:
            return self._run()
        except FencedError:
            raise
        except (KeyboardInterrupt, StoppedError, RunDirError) as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            self.status.state = "interrupted" if interrupted else "stopped"
            # An end that was asked for may not take long, so storage gets one try.
            self._run_dir.patience_seconds = 0.0
            with suppress(StoppedError, RunDirError):
                self._scheduler.rescue()
            with suppress(StoppedError, RunDirError):
                self.status.units_done = len(self._ledger)
                self._board.show("end")
            raise

    def _run(self) -> Winner:
        # The baselines do not depend on the winner: idle scorers score them during the search.
        self._idle_work.queue_tables(None)
        self._board.asked((row.vector_id, row.needle_set) for row in self._comparisons(None))
        if self._recipe.search.descent_steps:
            self.status.state = "descending"
            inputs = self._geometry, self._space, self._recipe.search, self._num_samples
            proposer = Proposer(*inputs, self._run_race, self._stepped)
            self._evolution.begin(proposer.propose())
        self.status.state = "searching"
        while not self._evolution.finished:
            candidates = self._evolution.ask()
            race = self._score(candidates)
            self._evolution.tell(race.totals)
            self._record(candidates, race)
        self.status.state = "reporting"
        winner = self._winner()
        write_winner(self._run_dir, winner)
        self._board.finished()
        return winner

    # --- the descent

    def _run_race(
        self, race: Race, vectors: Mapping[str, RescaleFactors], needle_set: str
    ) -> dict[str, list[Score | None]]:
        """Run a race to its end; return the scores of each vector, by sample."""
        self._open_set = needle_set
        self._board.asked((id, needle_set) for id in vectors)
        self._scheduler.run(race, vectors, needle_set, self._idle_work.units)
        self.status.units_eliminated += race.num_units_saved
        self._refresh(race)
        ids = self._needle_sets[needle_set].sample_ids
        return {id: [self._ledger.get((id, sample)) for sample in ids] for id in vectors}

    def _stepped(self, step: int, candidate: Candidate, scores: Sequence[Score]) -> None:
        """Show where the descent stands."""
        nll, num_tokens = math.fsum(s.nll for s in scores), sum(s.num_tokens for s in scores)
        self._board.stepped(step, candidate.critical_dim, perplexity(nll, num_tokens))

    # --- a generation

    def _score(self, candidates: Sequence[Candidate]) -> Race:
        """Race the candidates of the open generation against the survivors so far."""
        survivors = self._evolution.generation.survivors
        incumbents = {c.id: self._complete_row(c.id) for c in survivors}
        newcomers = [c.id for c in candidates]
        race = Race(newcomers, incumbents, self._num_samples, self._recipe.search.top_k)
        self._board.asked((id, SEARCH_SET) for id in newcomers)
        vectors = {c.id: c.factors for c in candidates}
        self._scheduler.run(race, vectors, SEARCH_SET, self._idle_work.units)
        self._refresh(race)
        return race

    def _complete_row(self, id: str) -> dict[int, float]:
        """Return sample -> NLL of a survivor, which was scored on every sample."""
        ids = self._needle_sets[SEARCH_SET].sample_ids
        return {s: self._ledger[id, sample_id].nll for s, sample_id in enumerate(ids)}

    def _record(self, candidates: Sequence[Candidate], race: Race) -> None:
        """Write the generation that was just closed, and compact the ledger."""
        generation = self._evolution.generation
        num_tokens = sum(self._needle_sets[SEARCH_SET].num_tokens)
        survivors = []
        for candidate in generation.survivors:
            total = generation.totals[candidate.id]
            survivors.append(Survivor(candidate, total, perplexity(total, num_tokens)))
        # ``tell`` has moved on to the next index; the file belongs to the one that it closed.
        index = generation.index - 1
        record = GenerationRecord(index, tuple(candidates), tuple(survivors))
        write_generation(self._run_dir, record)
        self._ledger.compact()
        self._board.closed(record, race.num_units_saved)

    # --- the tables

    def _comparisons(self, winner: Candidate | None) -> list[Comparison]:
        fixed = self._space.fixed_attention
        return list(comparisons(self._recipe, self._geometry, winner, fixed))

    def _winner(self) -> Winner:
        """Score winner and baselines on the held-out needles, and return the result."""
        best = self._evolution.best
        rows = self._comparisons(best)
        self._idle_work.end_search(best)
        self._board.asked((row.vector_id, row.needle_set) for row in rows)
        for name in dict.fromkeys(row.needle_set for row in rows):
            vectors = {row.vector_id: row.factors for row in rows if row.needle_set == name}
            race = race_of_all(list(vectors), len(self._needle_sets[name]))
            self._scheduler.run(race, vectors, name, self._idle_work.units)
            self._refresh(race)
        return Winner(
            name=self._recipe.name,
            candidate=best,
            geometry=self._geometry,
            target_length=self._recipe.search.target_length,
            search=self._scheduler.summary(best.id, SEARCH_SET),
            report=tuple(
                row.row(self._scheduler.summary(row.vector_id, row.needle_set)) for row in rows
            ),
            fingerprints=dict(self._fingerprints),
        )

    # --- the status

    def _committed(self, scores: Iterable[Score], race: Race) -> None:
        """Count scores that are in the ledger now, and show the status if it is due."""
        for score in scores:
            if score.needle_set == SEARCH_SET:
                self._idle_work.add(score)
        self._board.committed(scores)
        if self._board.is_due:
            self._refresh(race)
            self._board.show("units")

    def _refresh(self, race: Race) -> None:
        raced = num_raced(self._space)
        to_race = raced * self._num_samples - self._board.num_found(SEARCH_SET)
        generation, open_race = self._evolution.generation, (self._open_set, race.num_units_left)
        wide = self._board.num_found(WIDE_SET) > 0
        left = _units_left(self._recipe, self.status, generation.index, open_race, to_race, wide)
        rows = self._comparisons(next(iter(generation.survivors), None))
        tables = {(row.vector_id, row.needle_set) for row in rows}
        self._board.refresh(
            open_race[1], left, tables, self._scorers.counts(), self._scorers.faults()
        )


def _units_left(
    recipe: Recipe,
    status: Status,
    generation: int,
    open_race: tuple[str, int],
    to_race: int,
    wide: bool,
) -> dict[str, int]:
    """Return needle set -> units that the search needs at most, the tables' aside.

    Args:
        generation: index of the open generation.
        open_race: needle set and units left of the open race.
        to_race: units at full length that a descent needs at most.
        wide: whether the skipped documents were widened.
    """
    search, (open_set, units_open) = recipe.search, open_race
    if status.state == "descending":
        steps = range(status.descent_step, search.descent_steps)
        left = {descent_set(step, wide): search.skipped_needles for step in steps}
        left[SEARCH_SET] = max(to_race, 0)
        if open_set != SEARCH_SET:
            left[open_set] = units_open
        return left
    if status.state == "searching":
        later = (search.iterations - generation) * search.num_offspring
        return {SEARCH_SET: units_open + later * recipe.needles.num_samples}
    return {}
